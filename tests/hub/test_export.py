"""Exported models compute what the originals compute, for every batch size."""

import importlib.util
import os
import resource
import shutil

import pytest
import timm
import torch
from support.golden_weights import relative_difference
from timm.models import save_for_hf

from timm_tinyvit import cli
from timm_tinyvit.config import commands
from timm_tinyvit.hub.export import FORMATS, export

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ('onnx', 'onnxscript', 'onnxruntime')),
    reason='onnx, onnxscript and onnxruntime are not installed: pip install "timm_tinyvit[export]"')
needs_compiler = pytest.mark.skipif(
    shutil.which('g++') is None and shutil.which('clang++') is None, reason='AOTInductor needs a C++ compiler')

BATCH_SIZES = [1, 5]


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = timm.create_model('tiny_vit_5m_224', img_size=64, num_classes=10, depths=(1, 1, 2, 1))
    for _ in range(3):  # gives the batch norms something to fold
        model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


def images(batch_size):
    return torch.randn(batch_size, 3, 64, 64, generator=torch.Generator().manual_seed(batch_size))


def test_a_torch_program_gives_the_logits(model, tmp_path):
    assert export(model, 'torch', tmp_path / 'model.pt2') <= 1e-5
    program = torch.export.load(tmp_path / 'model.pt2')
    with torch.no_grad():
        for x in map(images, BATCH_SIZES):
            assert relative_difference(program.module()(x), model(x)) <= 1e-5
    assert not any('batch_norm' in str(node.target) for node in program.graph.nodes)


@needs_onnx
def test_an_onnx_model_gives_the_logits(model, tmp_path):
    import onnxruntime

    assert export(model, 'onnx', tmp_path / 'model.onnx') <= 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ['model.onnx']
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    assert session.get_inputs()[0].shape[1:] == [3, 64, 64]
    with torch.no_grad():
        for x in map(images, BATCH_SIZES):
            logits, = session.run(['logits'], {'images': x.numpy()})
            assert relative_difference(torch.from_numpy(logits), model(x)) <= 1e-4


@needs_compiler
@pytest.mark.skipif(torch.__version__ < '2.9', reason='libraries of AOTInductor of torch 2.7 damage the heap')
def test_a_compiled_library_gives_the_logits(model, tmp_path):
    assert export(model, 'aotinductor', tmp_path / 'model.pt2') <= 1e-4


@pytest.mark.skipif(torch.__version__ >= '2.9', reason='this torch is new enough')
def test_a_library_that_would_crash_is_refused(model, tmp_path, refused):
    with refused('aotinductor needs torch 2.9', torch.__version__):
        export(model, 'aotinductor', tmp_path / 'model.pt2')
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence(model, tmp_path, refused):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with refused('model.pt2 cannot be written', 'too large'):
            export(model, 'torch', tmp_path / 'model.pt2')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_exporting_leaves_the_model_as_it_was(model, tmp_path):
    names = list(model.state_dict())
    model.train()
    try:
        export(model, 'torch', tmp_path / 'model.pt2')
        assert model.training and list(model.state_dict()) == names
        assert all(param.requires_grad for param in model.parameters())
    finally:
        model.eval()


def test_a_wrong_ending_is_refused(model, tmp_path, refused):
    with refused('.onnx', 'torch', '.pt2'):
        export(model, 'torch', tmp_path / 'model.onnx')
    assert not list(tmp_path.iterdir())


def test_the_command_exports_at_another_size(model, hub_children, tmp_path):
    save_for_hf(model, tmp_path / 'saved')
    result = hub_children.run(
        ['-m', 'timm_tinyvit', 'export', '--model', tmp_path / 'saved', '--format', 'torch', '--img-size', '48', '80',
         '--output', tmp_path / 'model.pt2'], os.environ, timeout=300)
    assert '[batch, 3, 48, 80]' in result.stdout
    program = torch.export.load(tmp_path / 'model.pt2')
    assert program.module()(torch.randn(2, 3, 48, 80)).shape == (2, 10)


def test_a_model_of_any_size_takes_any_and_one_with_patches_says_no(tmp_path, capsys):
    for name in ('test_resnet', 'test_vit'):
        save_for_hf(timm.create_model(name, num_classes=10), tmp_path / name)
    command = ['export', '--format', 'torch', '--output', str(tmp_path / 'model.pt2'), '--model']
    cli.main([*command, str(tmp_path / 'test_resnet'), '--img-size', '64'])
    assert torch.export.load(tmp_path / 'model.pt2').module()(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    with pytest.raises(SystemExit, match='2'):
        cli.main([*command, str(tmp_path / 'test_vit'), '--img-size', '8'])
    assert 'test_vit cannot take --img-size 8' in capsys.readouterr().err


def test_the_command_takes_every_format():
    assert set(commands.FORMATS) == set(FORMATS)
