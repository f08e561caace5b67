"""The TinyViT models: the official code's figures, timm's verbs and weights, windows, and the ways of computing."""

import copy
import functools
import importlib
import json
import math
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import tiny_vit as timm_tiny_vit
from timm.models._registry import _model_entrypoints
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.nn import functional as F

import timm_tinyvit
from timm_tinyvit import tiny_vit
from timm_tinyvit.tiny_vit import TinyVit, calc_window_sizes, checkpoint_filter_fn, resize_attention_biases

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'tinyvit.json').read_text())
BUILDS = GOLDEN['builds']
VARIANTS = ['tiny_vit_5m_224', 'tiny_vit_11m_224', 'tiny_vit_21m_224', 'tiny_vit_21m_384', 'tiny_vit_21m_512']
TAGS = [
    *(f'{name}.{tag}' for name in VARIANTS[:3] for tag in ('dist_in22k', 'dist_in22k_ft_in1k', 'in1k')),
    *(f'{name}.dist_in22k_ft_in1k' for name in VARIANTS[3:]),
]


def golden_tensor(name, shape):
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith('num_batches_tracked'):
        return torch.zeros(shape, dtype=torch.int64)
    if name.endswith('running_var'):
        value = 0.5 + np.abs(normal)
    elif name.endswith('running_mean'):
        value = 0.1 * normal
    elif name.endswith('attention_biases'):
        value = 0.5 * normal
    elif len(shape) == 1 and name.endswith('weight'):
        value = 1 + 0.1 * normal
    elif len(shape) == 1:
        value = 0.1 * normal
    else:
        value = normal / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def golden_image(size):
    return torch.from_numpy(np.random.RandomState(0).standard_normal((1, 3, size, size)).astype(np.float32))


def official_state_dict(build):
    return {name: golden_tensor(name, shape) for name, shape in zip(GOLDEN['names'], BUILDS[build]['shapes'])}


def create_golden(build, **kwargs):
    """The model of a golden build with the golden weights, loaded from the official names."""
    golden = BUILDS[build]
    model = timm.create_model(
        build.split()[0], num_classes=golden['num_classes'], window_sizes=golden['window_sizes'], **kwargs)
    model.load_state_dict(checkpoint_filter_fn({'model': official_state_dict(build)}, model))
    return model.eval()


def create_timm(model):
    """timm's own TinyVit with the weights and windows of one of ours."""
    peer = timm_tiny_vit.TinyVit(
        num_classes=model.num_classes,
        embed_dims=[info['num_chs'] for info in model.feature_info],
        depths=list(model.depths),
        num_heads=[0] + [stage.blocks[0].num_heads for stage in model.stages[1:]],
        window_sizes=list(model.window_sizes),
    )
    peer.load_state_dict(model.state_dict())
    return peer.train(model.training)


def create_small(seed=0, **kwargs):
    """The 5M model with weights in which every parameter matters: none is zero or one."""
    model = timm.create_model('tiny_vit_5m_224', **{'img_size': 64, 'num_classes': 10, **kwargs}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith('running_var'):
                tensor.uniform_(0.5, 2, generator=generator)
            elif tensor.ndim == 1:
                tensor.normal_(1. if name.endswith('weight') else 0., 0.1, generator=generator)
            elif name.endswith('attention_biases'):
                tensor.normal_(0., 0.5, generator=generator)
    return model


def images(batch_size=2, size=64, seed=0, dtype=torch.float32):
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative_difference(result, reference):
    return ((result - reference).abs().max() / reference.abs().max()).item()


# The official code's figures

@pytest.mark.parametrize('build', BUILDS)
def test_logits_are_those_of_the_official_code(build):
    golden = BUILDS[build]
    with torch.inference_mode():
        logits = create_golden(build)(golden_image(golden['img_size']))[0].double()
    first = torch.tensor(golden['logits_first8'], dtype=torch.float64)
    assert relative_difference(logits[:8], first) <= 1e-4
    assert logits.norm().item() == pytest.approx(golden['logits_l2'], rel=1e-4)
    assert logits.mean().item() == pytest.approx(golden['logits_mean'], abs=1e-4 * logits.abs().max().item())
    assert logits.argmax().item() == golden['argmax']


@pytest.mark.parametrize('build', [build for build in BUILDS if build != 'tiny_vit_21m_512'] + [
    pytest.param('tiny_vit_21m_512')])
def test_gradients_are_those_of_the_official_code(build):
    golden = BUILDS[build]
    model = create_golden(build)
    model(golden_image(golden['img_size'])).square().mean().backward()
    grads = {name: param.grad for name, param in model.named_parameters()}
    for official_name, expected in golden['grad_l2'].items():
        name = tiny_vit._timm_name(official_name)
        assert grads[name].norm().item() == pytest.approx(expected, rel=1e-3), name


@pytest.mark.parametrize('build', BUILDS)
def test_every_official_tensor_has_its_place_and_shape(build):
    golden = BUILDS[build]
    model = timm.create_model(
        build.split()[0], num_classes=golden['num_classes'], window_sizes=golden['window_sizes'], device='meta')
    mapped = {tiny_vit._timm_name(name): tuple(shape) for name, shape in zip(GOLDEN['names'], golden['shapes'])}
    assert mapped == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert sum(param.numel() for param in model.parameters()) == golden['params']


# Registration

@pytest.mark.parametrize('name', VARIANTS)
def test_create_model_gives_this_packages_model_with_the_windows_of_its_size(name):
    model = timm.create_model(name, device='meta')
    assert type(model) is TinyVit
    assert list(model.window_sizes) == BUILDS[name]['window_sizes']
    assert model.num_classes == 1000
    assert model.pretrained_cfg['tag'] == 'dist_in22k_ft_in1k'
    assert model.pretrained_cfg['hf_hub_id'] == f'timm/{name}.dist_in22k_ft_in1k'


def run_python(code, *flags):
    result = subprocess.run([sys.executable, *flags, '-c', code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_changes_nothing_in_timm_but_the_five_models():
    out = run_python('''
import importlib, json, warnings
import timm
from timm.models import _registry as r
def snapshot():
    return (
        {k: (v.__module__, v.__name__) for k, v in r._model_entrypoints.items()},
        sorted(r._model_pretrained_cfgs), sorted(timm.list_models(include_tags=True)),
        sorted(timm.list_models(pretrained=True)), sorted(timm.list_models(module='tiny_vit')))
before = snapshot()
filters = list(warnings.filters)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    import timm_tinyvit
    once = snapshot()
    importlib.reload(timm_tinyvit.tiny_vit)
    importlib.reload(timm_tinyvit)
    twice = snapshot()
assert once == twice
changed = {k for k in before[0] if before[0][k] != once[0][k]}
print(json.dumps([sorted(changed), sorted(set(once[0]) - set(before[0])), before[1:] == once[1:],
                  [str(w.message) for w in caught], filters == list(warnings.filters)]))
''')
    changed, added, same_names, caught, same_filters = json.loads(out)
    assert changed == sorted(VARIANTS)
    assert not [name for name in added if name.startswith('tiny_vit')]
    assert caught == []
    assert same_filters
    if not added:
        assert same_names


@pytest.mark.parametrize('tag', TAGS)
def test_all_tags_of_timm_stay_known(tag):
    assert tag in timm.list_models('tiny_vit*', pretrained=True)
    ours = timm.get_pretrained_cfg(tag)
    theirs = timm_tiny_vit.default_cfgs[tag.split('.')[0]].cfgs[tag.split('.')[1]]
    assert ours.hf_hub_id == f'timm/{tag}'
    for field in ('num_classes', 'input_size', 'pool_size', 'crop_pct', 'crop_mode', 'mean', 'std', 'interpolation',
                  'classifier', 'first_conv', 'license'):
        assert getattr(ours, field) == getattr(theirs, field), field


# Weights

def test_the_same_seed_gives_timms_weights():
    for name in VARIANTS[:2]:
        torch.manual_seed(3)
        ours = timm.create_model(name).state_dict()
        torch.manual_seed(3)
        theirs = getattr(timm_tiny_vit, name)(pretrained_cfg_overlay={'num_classes': 1000}).state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_pretrained_loading_reads_timms_and_official_files(tmp_path):
    build = 'tiny_vit_5m_224'
    golden = create_golden(build)
    save_file(golden.state_dict(), tmp_path / 'timm.safetensors')
    torch.save({'model': official_state_dict(build)}, tmp_path / 'official.pth')
    for file in ('timm.safetensors', 'official.pth'):
        model = timm.create_model(build, pretrained=True, pretrained_cfg_overlay={'file': str(tmp_path / file)})
        assert all(torch.equal(a, b) for a, b in zip(golden.state_dict().values(), model.state_dict().values()))

    other_head = timm.create_model(
        build, pretrained=True, num_classes=7, pretrained_cfg_overlay={'file': str(tmp_path / 'official.pth')})
    assert other_head.head.fc.weight.shape == (7, 320)
    assert torch.equal(other_head.head.norm.weight, golden.head.norm.weight)

    larger = timm.create_model(
        build, pretrained=True, img_size=384, pretrained_cfg_overlay={'file': str(tmp_path / 'official.pth')})
    resized = copy.deepcopy(golden)
    resized.set_input_size(384)
    assert all(torch.equal(a, b) for a, b in zip(resized.state_dict().values(), larger.state_dict().values()))


def test_official_checkpoints_with_their_index_buffers_load():
    state_dict = official_state_dict('tiny_vit_5m_224')
    state_dict['layers.1.blocks.0.attn.attention_bias_idxs'] = torch.zeros(49, 49, dtype=torch.long)
    model = timm.create_model('tiny_vit_5m_224')
    model.load_state_dict(checkpoint_filter_fn(state_dict, model))


# Windows

@pytest.mark.parametrize(('img_size', 'expected'), [
    (224, (7, 7, 14, 7)), (384, (12, 12, 24, 12)), (512, (16, 16, 32, 16)), (256, (8, 8, 16, 8)), (32, (1, 1, 2, 1)),
    (8, (1, 1, 1, 1)), (240, (8, 8, 15, 8)), ((224, 320), (7, 7, 14, 7)), ([96, 64], (2, 2, 4, 2)),
])
def test_windows_grow_with_the_image_size(img_size, expected):
    assert calc_window_sizes(img_size) == expected
    created = timm.create_model('tiny_vit_5m_224', img_size=img_size, device='meta')
    resized = timm.create_model('tiny_vit_5m_224', device='meta')
    resized.set_input_size(img_size)
    for model in (created, resized):
        assert model.window_sizes == expected
        assert [stage.blocks[0].attn.attention_biases.shape[1] for stage in model.stages[1:]] == [
            size ** 2 for size in expected[1:]]
        size = tuple(img_size) if isinstance(img_size, (tuple, list)) else (img_size, img_size)
        assert timm.data.resolve_model_data_config(model)['input_size'] == (3, *size)
    assert timm.get_pretrained_cfg('tiny_vit_5m_224').input_size == (3, 224, 224)
