"""The weights command: official checkpoints in, folders for plain timm out, and nothing where that cannot be."""

import argparse
import json
import os
import pickle
import sys

import pytest
import timm
import torch
from support.golden_weights import golden, golden_image, golden_tensor, official_state_dict, relative_difference

from timm_tinyvit.hub import convert
from timm_tinyvit.models import clip_teacher

GOLDEN = golden('tinyvit')
TEACHER = golden('clip_teacher')


@pytest.fixture(scope='module')
def official():
    return official_state_dict('tiny_vit_5m_224')


@pytest.fixture
def run(hub_children):
    return lambda *args: hub_children.start(['-m', 'timm_tinyvit', 'convert', *args], os.environ).wait(300)


def test_a_converted_checkpoint_gives_the_official_logits_in_plain_timm(run, official, logits_in_plain_timm, tmp_path):
    torch.save({'model': official}, tmp_path / 'official.pth')
    result = run(tmp_path / 'official.pth', '--model', 'tiny_vit_5m_224', '--output', tmp_path / 'out')
    assert result.returncode == 0, result.stderr
    assert 'shorter side to 256, then the middle 224x224' in result.stdout
    written = sorted(path.name for path in (tmp_path / 'out').iterdir())
    assert written == ['README.md', 'config.json', 'model.safetensors']

    golden = GOLDEN['builds']['tiny_vit_5m_224']
    logits = logits_in_plain_timm(tmp_path / 'out', golden_image(224))[0]
    assert relative_difference(logits[:8], torch.tensor(golden['logits_first8'])) <= 1e-4
    assert logits.norm().item() == pytest.approx(golden['logits_l2'], rel=1e-4)


@pytest.mark.parametrize(('build', 'crop_pct', 'crop_mode'), [
    ('tiny_vit_5m_224', 0.875, 'center'), ('tiny_vit_5m_224 21841 classes', 0.875, 'center'),
    ('tiny_vit_21m_384', 1., 'squash'), ('tiny_vit_21m_512', 1., 'squash'),
])
def test_the_config_says_windows_classes_and_the_official_test_crop(build, crop_pct, crop_mode, tmp_path):
    golden, name = GOLDEN['builds'][build], build.split()[0]
    torch.save(official_state_dict(build), tmp_path / 'official.pth')
    convert.convert_checkpoint(tmp_path / 'official.pth', name, tmp_path / 'out')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['architecture'] == name
    assert config['model_args']['window_sizes'] == golden['window_sizes']
    assert 'img_size' not in config['model_args']
    assert config['num_classes'] == golden['num_classes']
    data = timm.data.resolve_data_config({}, pretrained_cfg=config['pretrained_cfg'])
    assert tuple(data['input_size']) == (3, golden['img_size'], golden['img_size'])
    assert (data['crop_pct'], data['crop_mode'], data['interpolation']) == (crop_pct, crop_mode, 'bicubic')


def test_the_teacher_converts_to_the_name_that_plain_timm_knows(logits_in_plain_timm, tmp_path, monkeypatch):
    weights = {name: golden_tensor(name, shape) for name, shape in TEACHER['reduced']['state_dict'].items()}
    torch.save({'model': weights}, tmp_path / 'teacher.pth')
    create_model = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, **kwargs: create_model(
        name, img_size=56, depth=3, embed_dim=128, num_heads=2, **kwargs))
    convert.convert_checkpoint(tmp_path / 'teacher.pth', convert.TEACHER, tmp_path / 'out')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['architecture'] == 'vit_large_patch14_clip_quickgelu_224'
    assert config['pretrained_cfg']['mean'] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    logits = logits_in_plain_timm(tmp_path / 'out', golden_image(56))[0]
    assert relative_difference(logits, torch.tensor(TEACHER['reduced']['logits'])) <= 1e-4


def test_both_names_of_the_teacher_are_one_model():
    shapes = [
        {name: tensor.shape for name, tensor in timm.create_model(
            name, num_classes=21841, device='meta').state_dict().items()}
        for name in (convert.TEACHER, convert.TEACHER_IN_TIMM)]
    assert shapes[0] == shapes[1]
    assert clip_teacher.default_cfgs[convert.TEACHER].tags[0] == 'in22k'


class CfgNode(dict):
    """Stands for the settings that the official training leaves in its checkpoints."""


CfgNode.__module__ = 'yacs.config'


def test_checkpoints_of_an_official_training_run_convert(official, tmp_path, monkeypatch):
    module = argparse.Namespace(CfgNode=CfgNode)
    monkeypatch.setitem(sys.modules, 'yacs', argparse.Namespace(config=module))
    monkeypatch.setitem(sys.modules, 'yacs.config', module)
    torch.save({
        'model': official, 'optimizer': {'state': {}}, 'epoch': 299, 'max_accuracy': 79.1,
        'config': CfgNode(MODEL=CfgNode(NAME='TinyViT-5M-1k'))}, tmp_path / 'run.pth')
    said = convert.convert_checkpoint(tmp_path / 'run.pth', 'tiny_vit_5m_224', tmp_path / 'out')
    assert ' with 1000 classes\n' in said


# What cannot be converted

class Trap:
    def __reduce__(self):
        return print, ('executed',)


def truncated(official, path):
    torch.save({'model': official}, path)
    path.write_bytes(path.read_bytes()[:100_000])


def without_a_tensor(official, path):
    torch.save({'model': {name: value for name, value in official.items() if name != 'norm_head.bias'}}, path)


def with_a_tensor_more(official, path):
    torch.save({'model': {**official, 'extra': torch.zeros(1)}}, path)


def with_a_broken_value(official, path):
    torch.save({'model': {**official, 'head.bias': official['head.bias'] / 0}}, path)


BROKEN = {
    'missing': (lambda official, path: None, ['no file']),
    'empty': (lambda official, path: path.write_bytes(b''), ['no weights that can be read']),
    'text': (lambda official, path: path.write_text('Not Found'), ['no weights that can be read']),
    'truncated': (truncated, ['no weights that can be read']),
    'code': (lambda official, path: torch.save({'model': official, 'trap': Trap()}, path), ['loads with weights_only']),
    'pickle': (lambda official, path: path.write_bytes(pickle.dumps(Trap())), ['loads with weights_only']),
    'list': (lambda official, path: torch.save([1, 2], path), ['no weights that can be read']),
    'numbers': (lambda official, path: torch.save({'model': {'a': 1}}, path), ['give a state dict']),
    'another model': (lambda official, path: torch.save({'fc.weight': torch.ones(2)}, path), ['has no patch_embed']),
    'missing tensor': (without_a_tensor, ['has no head.norm.bias']),
    'further tensor': (with_a_tensor_more, ['has extra besides']),
    'not finite': (with_a_broken_value, ['head.fc.bias', 'finite']),
}


@pytest.mark.parametrize('case', BROKEN)
def test_a_wrong_file_is_refused_in_one_sentence_and_leaves_nothing(case, official, tmp_path, refused):
    make, words = BROKEN[case]
    folder = tmp_path / 'outputs'
    folder.mkdir()
    make(official, tmp_path / 'checkpoint.pth')
    with refused(str(tmp_path / 'checkpoint.pth'), *words):
        convert.convert_checkpoint(tmp_path / 'checkpoint.pth', 'tiny_vit_5m_224', folder / 'out')
    assert not list(folder.iterdir())


@pytest.mark.parametrize('name', ['tiny_vit_11m_224', 'tiny_vit_21m_512', convert.TEACHER])
def test_the_wrong_variant_is_named(name, official, tmp_path, refused):
    torch.save({'model': official}, tmp_path / 'checkpoint.pth')
    words = ['no visual.proj'] if name == convert.TEACHER else ['--model tiny_vit_5m_224']
    with refused(name, *words):
        convert.convert_checkpoint(tmp_path / 'checkpoint.pth', name, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_windows_of_another_size_are_another_variant(tmp_path, refused):
    torch.save(official_state_dict('tiny_vit_21m_384'), tmp_path / 'checkpoint.pth')
    with refused('--model tiny_vit_21m_384'):
        convert.convert_checkpoint(tmp_path / 'checkpoint.pth', 'tiny_vit_21m_224', tmp_path / 'out')


def test_a_folder_in_use_is_left_alone(official, tmp_path, refused):
    torch.save({'model': official}, tmp_path / 'checkpoint.pth')
    (tmp_path / 'out').mkdir()
    convert.convert_checkpoint(tmp_path / 'checkpoint.pth', 'tiny_vit_5m_224', tmp_path / 'out')
    before = {path: path.read_bytes() for path in (tmp_path / 'out').iterdir()}
    with refused('there already'):
        convert.convert_checkpoint(tmp_path / 'checkpoint.pth', 'tiny_vit_5m_224', tmp_path / 'out')
    assert before == {path: path.read_bytes() for path in (tmp_path / 'out').iterdir()}


def test_the_command_fails_without_a_traceback(run, tmp_path, one_sentence):
    (tmp_path / 'checkpoint.pth').write_text('Not Found')
    result = run(tmp_path / 'checkpoint.pth', '--model', 'tiny_vit_5m_224', '--output', tmp_path / 'out')
    assert result.returncode != 0 and not (tmp_path / 'out').exists()
    one_sentence(result.stderr.strip(), 'no weights that can be read')
