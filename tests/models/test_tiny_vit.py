"""The TinyViT models: the official code's figures, timm's verbs and weights, windows, and the ways of computing."""

import copy
import functools
import json
import os
import pickle

import accelerate
import pytest
import timm
import torch
from support import registry_program
from support.golden_weights import golden, golden_image, official_state_dict, relative_difference
from safetensors.torch import save_file
from timm.models import group_parameters, save_for_hf
from timm.models import tiny_vit as timm_tiny_vit
from timm.models._manipulate import reinit_non_persistent_buffers
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import freeze, reparameterize_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from timm_tinyvit.models import layers, tiny_vit
from timm_tinyvit.models.tiny_vit import (
    TinyVit,
    calc_window_sizes,
    checkpoint_filter_fn,
    rename_official,
    resize_attention_biases,
)

GOLDEN = golden('tinyvit')
BUILDS = GOLDEN['builds']
VARIANTS = ['tiny_vit_5m_224', 'tiny_vit_11m_224', 'tiny_vit_21m_224', 'tiny_vit_21m_384', 'tiny_vit_21m_512']
TAGS = [
    *(f'{name}.{tag}' for name in VARIANTS[:3] for tag in ('dist_in22k', 'dist_in22k_ft_in1k', 'in1k')),
    *(f'{name}.dist_in22k_ft_in1k' for name in VARIANTS[3:]),
]


def create_golden(build):
    """The model of a golden build with the golden weights, loaded from the official names."""
    golden = BUILDS[build]
    model = timm.create_model(
        build.split()[0], num_classes=golden['num_classes'], window_sizes=golden['window_sizes'])
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
        drop_path_rate=0.,
    )
    peer.load_state_dict(model.state_dict())
    return peer.train(model.training)


def create_small(seed=0, **kwargs):
    """The 5M model with weights in which every parameter matters: none is zero or one."""
    return copy.deepcopy(small_model(seed, **kwargs))


@functools.lru_cache(8)
def small_model(seed, **kwargs):
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
            elif tensor.ndim:
                tensor.normal_(0., tensor[0].numel() ** -0.5, generator=generator)
    return model


def images(batch_size=2, size=64, seed=0, dtype=torch.float32):
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The official code's figures

@pytest.fixture(scope='module')
def golden_model(build):
    return create_golden(build)


@pytest.mark.parametrize('build', BUILDS, scope='module')
def test_logits_are_those_of_the_official_code(build, golden_model):
    golden = BUILDS[build]
    with torch.inference_mode():
        logits = golden_model(golden_image(golden['img_size']))[0].double()
    first = torch.tensor(golden['logits_first8'], dtype=torch.float64)
    assert relative_difference(logits[:8], first) <= 1e-4
    assert logits.norm().item() == pytest.approx(golden['logits_l2'], rel=1e-4)
    assert logits.mean().item() == pytest.approx(golden['logits_mean'], abs=1e-4 * logits.abs().max().item())
    assert logits.argmax().item() == golden['argmax']


@pytest.mark.parametrize('build', BUILDS, scope='module')
def test_gradients_are_those_of_the_official_code(build, golden_model):
    golden = BUILDS[build]
    golden_model(golden_image(golden['img_size'])).square().mean().backward()
    grads = {name: param.grad for name, param in golden_model.named_parameters()}
    for name, expected in rename_official(golden['grad_l2']).items():
        assert grads[name].norm().item() == pytest.approx(expected, rel=1e-3), name


@pytest.mark.parametrize('build', BUILDS)
def test_every_official_tensor_has_its_place_and_shape(build):
    golden = BUILDS[build]
    model = timm.create_model(
        build.split()[0], num_classes=golden['num_classes'], window_sizes=golden['window_sizes'], device='meta')
    mapped = rename_official(dict(zip(GOLDEN['names'], map(tuple, golden['shapes']))))
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


@pytest.mark.launches
def test_importing_changes_nothing_in_timm_but_the_five_models(hub_children):
    child = hub_children.run(registry_program.print_changes, os.environ)
    changed, added, same_names, caught, same_filters = json.loads(child.stdout)
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
    created = timm.create_model('tiny_vit_5m_224', img_size=img_size, depths=(1, 1, 1, 1), device='meta')
    resized = timm.create_model('tiny_vit_5m_224', depths=(1, 1, 1, 1), device='meta')
    resized.set_input_size(img_size)
    for model in (created, resized):
        assert model.window_sizes == expected
        assert [stage.blocks[0].attn.attention_biases.shape[1] for stage in model.stages[1:]] == [
            size ** 2 for size in expected[1:]]
        size = tuple(img_size) if isinstance(img_size, (tuple, list)) else (img_size, img_size)
        assert timm.data.resolve_model_data_config(model)['input_size'] == (3, *size)
    assert timm.get_pretrained_cfg('tiny_vit_5m_224').input_size == (3, 224, 224)


def test_explicit_windows_win_over_the_image_size():
    model = timm.create_model('tiny_vit_5m_224', img_size=64, window_sizes=[3, 3, 3, 3])
    assert model.window_sizes == (3, 3, 3, 3)
    model.set_input_size(96, window_sizes=(2, 2, 5, 2))
    assert model.window_sizes == (2, 2, 5, 2)
    assert model(images(size=96)).shape == (2, 1000)
    model.set_input_size()
    assert model.window_sizes == (2, 2, 5, 2)


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(img_size=0), 'img_size'), (dict(img_size=(32, 32, 32)), 'img_size'), (dict(img_size=48.5), 'img_size'),
    (dict(window_sizes=(7, 7, 14)), 'window_sizes'), (dict(window_sizes=(7, 7, 0, 7)), 'window_sizes'),
])
def test_an_impossible_size_is_refused_in_one_sentence(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('tiny_vit_5m_224', device='meta', **kwargs)
    model = timm.create_model('tiny_vit_5m_224', device='meta')
    with pytest.raises(ValueError, match=message):
        model.set_input_size(**kwargs)
    assert model.window_sizes == (7, 7, 14, 7)


@pytest.mark.parametrize('size', [32, 50, 64, (96, 64), (70, 130)])
def test_images_that_the_windows_do_not_fit_are_padded_as_in_timm(size):
    model = create_small(img_size=96)
    for own_windows in (False, True):
        if own_windows:
            model.set_input_size(size)
        with torch.no_grad():
            assert relative_difference(model(images(size=size)), create_timm(model)(images(size=size))) <= 1e-5


def test_attention_biases_are_interpolated_as_in_the_official_code():
    # the official loader's bicubic interpolation of this table, without antialiasing
    table = torch.arange(9, dtype=torch.float32).square().view(1, 9)
    larger = resize_attention_biases(table, 5)[0]
    assert larger[[0, 1, 2, 7, 12, 24]].tolist() == pytest.approx(
        [-0.904704, -0.874015, -0.439999, 4.444011, 16., 69.239319],
        abs=1e-5 if torch.__version__ >= '2.11' else 3e-5)  # older ones round otherwise
    smaller = resize_attention_biases(table, 2)[0]
    assert smaller.tolist() == pytest.approx([1.430756, 6.522369, 32.397369, 53.180756], abs=1e-5)
    assert resize_attention_biases(table.half(), 2).dtype == torch.float16
    with pytest.raises(ValueError, match='square'):
        resize_attention_biases(torch.zeros(2, 8), 3)


def test_a_saved_model_says_its_windows_and_loads_in_plain_timm(logits_in_plain_timm, tmp_path):
    model = create_small(img_size=48)
    model.set_input_size(96)
    save_for_hf(model, tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['model_args']['window_sizes'] == [3, 3, 6, 3]
    assert 'img_size' not in config['model_args']
    assert config['pretrained_cfg']['input_size'] == [3, 96, 96]
    with torch.no_grad():
        expected = model(images(size=96))
    plain = logits_in_plain_timm(tmp_path, images(size=96))
    assert (plain - expected).abs().max() <= 1e-5 * expected.abs().max()

    same = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert type(same) is TinyVit and same.window_sizes == (3, 3, 6, 3)
    assert timm.data.resolve_model_data_config(same)['input_size'] == (3, 96, 96)
    larger = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=128)
    assert larger.window_sizes == (4, 4, 8, 4)
    kept = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=128, window_sizes=(3, 3, 6, 3))
    assert kept.window_sizes == (3, 3, 6, 3)


# Nothing that derives from the weights outlives a change of them

def load_other_weights(model):
    model.load_state_dict(create_small(seed=1).state_dict())


def step_in_eval_mode(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images()).square().sum().backward()
    optimizer.step()


def update_in_place(model):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.1)


def move_there_and_back(model):
    model.double()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if 'attention_biases' in name:
                param.add_(1e-9).mul_(2)
    model.float()


def train_and_return(model):
    model.train()(images(4))
    model.eval()


@pytest.mark.parametrize('change', [
    load_other_weights, step_in_eval_mode, update_in_place, move_there_and_back, train_and_return,
    lambda model: model.set_input_size(96), lambda model: model.reset_classifier(3),
])
@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_model_in_eval_mode_follows_every_change_of_its_weights(change, context):
    model = create_small()
    with context():
        model(images())
    change(model)
    with torch.no_grad():
        assert relative_difference(model(images()), create_timm(model)(images())) <= 1e-5


def test_a_model_trains_after_inference_mode():
    model = create_small()
    with torch.inference_mode():
        model(images())
    model(images()).square().mean().backward()
    model.train()
    model(images()).square().mean().backward()
    assert all(param.grad is not None for param in model.parameters())


# The same function, however it is computed

def test_a_batch_gives_what_its_images_give(monkeypatch):
    model = create_small()
    x = images(5)
    with torch.no_grad():
        expected = torch.cat([model(image[None]) for image in x])
        for slice_bytes in (1, 2 ** 18, 2 ** 40):
            monkeypatch.setattr(layers, '_SLICE_BYTES', slice_bytes)
            assert relative_difference(model(x), expected) <= 1e-5
            assert relative_difference(model(x.to(memory_format=torch.channels_last)), expected) <= 1e-5


@pytest.mark.parametrize('batch_size', [1, 3])
@pytest.mark.parametrize('train', [False, True])
def test_gradients_in_float64_are_those_of_timms_class(batch_size, train):
    model = create_small().double().train(train)
    peer = create_timm(model.float()).double()
    model.double()
    x = images(batch_size, size=96, dtype=torch.float64)  # windows of 64 on a map of 96: padded
    grads = []
    for m in (model, peer):
        inputs = x.clone().requires_grad_()
        m(inputs).square().sum().backward()
        grads.append([inputs.grad, *(param.grad for param in m.parameters())])
    scale = max(grad.abs().max() for grad in grads[1])
    for ours, theirs in zip(*grads):
        # a batch norm over one image of 3 x 3 positions is ill-conditioned, hence the absolute part
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-11 * scale)
    for ours, theirs in zip(model.buffers(), peer.buffers()):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-10)


@pytest.mark.parametrize('batch_size', [1, 4])
@pytest.mark.parametrize('train', [False, True])
def test_gradients_in_float32_are_those_of_float64(batch_size, train):
    model = create_small(img_size=96).train(train)
    reference = copy.deepcopy(model).double()
    for m in (model, reference):
        m(images(batch_size, size=96).to(m.head.fc.weight.dtype)).square().sum().backward()
    scale = max(param.grad.abs().max() for param in reference.parameters())
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters()):
        assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4 * scale), name


@pytest.mark.parametrize('shape', [
    (1, 127, 8), (128, 8), (1, 131, 8), (4, 7, 7, 8), (3, 7, 7, 8), (20, 7, 7, 8), (64, 2, 8)])
@pytest.mark.parametrize('layout', ['contiguous', 'transposed', 'expanded'])
def test_a_linear_layer_by_convolution_is_a_linear_layer(shape, layout):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    if layout == 'transposed':
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    elif layout == 'expanded':
        x = x[..., :1, :].expand(shape)
    layer = nn.Linear(8, 24)
    output_grad = torch.randn(*shape[:-1], 24, generator=generator)
    results = []
    for linear in (layers._linear_by_conv, nn.functional.linear):
        inputs = x.clone().requires_grad_()
        layer.zero_grad()
        y = linear(inputs, layer.weight, layer.bias)
        y.backward(output_grad)
        results.append([y, inputs.grad, layer.weight.grad.clone(), layer.bias.grad.clone()])
    for ours, theirs in zip(*results):
        assert ours.shape == theirs.shape and relative_difference(ours, theirs) <= 1e-5


def test_gradients_of_a_single_image_are_the_slopes():
    model = create_small().double()
    x, step = images(1, dtype=torch.float64), images(1, seed=1, dtype=torch.float64)
    inputs = x.clone().requires_grad_()
    model.forward_features(inputs).square().sum().backward()
    with torch.no_grad():
        above, below = (model.forward_features(x + sign * 1e-5 * step).square().sum() for sign in (1, -1))
    assert (inputs.grad * step).sum().item() == pytest.approx((above - below).item() / 2e-5, rel=1e-6)


@pytest.mark.parametrize('momentum', [0.1, None])
def test_training_treats_batch_norm_as_timms_class_does(momentum):
    model = create_small(drop_path_rate=0.).train()
    peer = create_timm(model)
    for m in (model, peer):
        for module in m.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
        frozen = m.stages[0].blocks[0].conv2.bn.eval()
        for seed in range(3):
            m(images(4, seed=seed)).square().mean().backward()
        assert frozen.num_batches_tracked == 0
    for (name, ours), theirs in zip(model.state_dict().items(), peer.state_dict().values()):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5), name
    assert model.patch_embed.conv1.bn.num_batches_tracked == 3


def test_low_precision_stays_close():
    model = create_small()
    with torch.no_grad():
        expected = model(images())
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert relative_difference(model(images()).float(), expected) <= 0.05
        assert relative_difference(model.bfloat16()(images().bfloat16()).float(), expected) <= 0.05


def test_autocast_trains():
    model = create_small().train()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = model(images(4)).float().square().mean()
    loss.backward()
    assert all(torch.isfinite(param.grad).all() for param in model.parameters())


def test_without_fused_attention_the_logits_are_the_same():
    model = create_small()
    with torch.no_grad():
        expected = model(images())
        for module in model.modules():
            if isinstance(module, tiny_vit.Attention):
                module.fused_attn = False
        assert relative_difference(model(images()), expected) <= 1e-5


@pytest.mark.parametrize('train', [False, True])
def test_checkpointed_gradients_are_the_same(train):
    model = create_small(drop_path_rate=0.).train(train)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images(3)).square().mean().backward()
        grads.append([param.grad for param in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*grads))


def test_fused_models_give_the_same_logits():
    model = create_small()
    with torch.no_grad():
        expected = model(images(5))
        fused = reparameterize_model(model)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
        assert relative_difference(fused(images(5)), expected) <= 1e-5
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(('device', 'dtype'), [
    ('cpu', torch.float64), ('cpu', torch.bfloat16), ('meta', torch.float32), ('meta', torch.float16)])
def test_fusing_keeps_device_and_dtype(device, dtype):
    conv_norm = layers.ConvNorm(4, 8, 3, 2, 1, device=device, dtype=dtype)
    fused = conv_norm.eval().fuse()
    assert fused.weight.device.type == device and fused.weight.dtype == fused.bias.dtype == dtype
    assert not fused.training
    if device == 'cpu':
        x = torch.randn(2, 4, 9, 9, dtype=dtype)
        assert torch.allclose(fused(x), conv_norm(x), rtol=1e-2, atol=1e-2)


# Hooks and converted modules keep their say

HOOKED = [
    'patch_embed.conv1.conv', 'patch_embed.conv1.bn', 'patch_embed.act', 'stages.0.blocks.1.conv2',
    'stages.0.blocks.1.conv2.bn', 'stages.0.blocks.1.drop_path', 'stages.1.downsample.conv3.conv',
    'stages.1.blocks.0.attn.qkv', 'stages.2.blocks.5.mlp.fc1', 'stages.2.blocks.5.mlp.act',
    'stages.3.blocks.0.local_conv.bn', 'stages.3.blocks.0', 'stages.3', 'head.norm',
]


@pytest.mark.parametrize('name', HOOKED)
def test_forward_hooks_see_the_whole_batch_once(name, monkeypatch):
    monkeypatch.setattr(layers, '_SLICE_BYTES', 1)
    model, x = create_small(), images(4)
    peer = create_timm(model)
    seen = []

    def see(module, args, output):
        seen.append((args[0].clone(), output.clone()))  # timm changes some outputs in place

    for m in (model, peer):
        m.get_submodule(name).register_forward_hook(see)
        with torch.no_grad():
            m(x)
    assert len(seen) == 2
    for ours, theirs in zip(*seen):
        # the MLPs see [B, H, W, C] where timm's see [B, H * W, C]
        assert ours.shape == theirs.shape or ours.flatten(1, 2).shape == theirs.shape
        assert relative_difference(ours.reshape(theirs.shape), theirs) <= 1e-4


@pytest.mark.parametrize('batch_size', [1, 5])
def test_hooks_on_every_block_fire_once_and_change_no_logit(batch_size, monkeypatch):
    monkeypatch.setattr(layers, '_SLICE_BYTES', 1)
    model, x = create_small(), images(batch_size)
    blocks = [model.patch_embed, *(block for stage in model.stages for block in stage.blocks)]
    seen = []
    with torch.no_grad():
        expected = model(x)
        for block in blocks:
            block.register_forward_hook(lambda module, args, output: seen.append((module, len(output))))
        assert torch.equal(model(x), expected)
    assert seen == [(block, batch_size) for block in blocks]


class Adapter(nn.Module):
    """A low-rank adapter around a frozen layer; it has no `out_features`."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_layers_can_be_replaced():
    model, x = create_small(), images(5)
    peer = create_timm(model)
    torch.manual_seed(0)
    for stage, peer_stage in zip(model.stages[1:], peer.stages[1:]):
        for block, peer_block in zip(stage.blocks, peer_stage.blocks):
            for owner, name in (('attn', 'qkv'), ('attn', 'proj'), ('mlp', 'fc1'), ('mlp', 'fc2')):
                adapter = Adapter(getattr(getattr(block, owner), name))
                peer_adapter = Adapter(getattr(getattr(peer_block, owner), name))
                peer_adapter.load_state_dict(adapter.state_dict())
                setattr(getattr(block, owner), name, adapter)
                setattr(getattr(peer_block, owner), name, peer_adapter)
            block.mlp.act, peer_block.mlp.act = nn.SiLU(), nn.SiLU()
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            assert relative_difference(model(x), peer(x)) <= 1e-5


def test_other_ways_to_reach_into_a_module_work_too(monkeypatch):
    monkeypatch.setattr(layers, '_SLICE_BYTES', 1)
    model, x = create_small(), images(3)
    peer = create_timm(model)

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    for m in (model, peer):
        nn.utils.parametrize.register_parametrization(m.patch_embed.conv1.conv, 'weight', Doubled())
        nn.utils.parametrize.register_parametrization(m.stages[1].blocks[0].mlp.fc1, 'weight', Doubled())
        m.stages[2].blocks[0].mlp.fc2.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        bn = m.stages[0].blocks[0].conv1.bn
        bn.forward = lambda x, forward=bn.forward: forward(x) + 1
        m.stages[1].downsample.conv2.bn.track_running_stats = False
        m.stages[1].downsample.conv2.bn.running_mean = m.stages[1].downsample.conv2.bn.running_var = None
    with torch.no_grad():
        assert relative_difference(model(x), peer(x)) <= 1e-5

    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: calls.append(type(module)))
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    assert calls.count(layers.LayerNorm) == 20 and calls.count(nn.BatchNorm2d) == sum(
        isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.skipif(
    torch.__version__ < '2.11' and not torch.cuda.is_available(),
    reason='before torch 2.11 a GPU is asked for where tensors only say that they are on one')
def test_on_a_gpu_every_convolution_gets_channels_last_memory():
    model = create_small()
    seen = []
    for conv in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
        conv.register_forward_pre_hook(
            lambda module, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last)))
    with FakeTensorMode():  # follows the strides and computes nothing
        weights = {name: torch.empty(value.shape, dtype=value.dtype, device='cuda') for name, value in (
            *model.named_parameters(), *model.named_buffers())}
        logits = torch.func.functional_call(model, weights, torch.empty(2, 3, 64, 64, device='cuda'))
    assert logits.device.type == 'cuda' and seen == [True] * 27


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 5e-3), (torch.bfloat16, 0.1)])
def test_a_gpu_gives_the_same_logits_and_gradients(dtype, tolerance, train):
    model, x = create_small(drop_path_rate=0.).train(train), images(8)
    on_gpu = copy.deepcopy(model).cuda()
    with torch.set_grad_enabled(train):
        expected = model(x)
        with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
            logits = on_gpu(x.cuda())
    assert relative_difference(logits.float().cpu(), expected) <= tolerance
    if train:
        for output in (logits.float(), expected):
            output.square().mean().backward()
        ours, theirs = (
            torch.cat([parameter.grad.flatten().cpu() for parameter in m.parameters()]) for m in (on_gpu, model))
        assert torch.nn.functional.cosine_similarity(ours, theirs, 0) > 0.98


def test_offloaded_weights_are_fetched(monkeypatch):
    monkeypatch.setattr(layers, '_SLICE_BYTES', 1)
    model, x = create_small(), images(3)
    with torch.no_grad():
        expected = model(x)
        offloaded = accelerate.cpu_offload(model, execution_device='cpu')
        assert {param.device.type for param in offloaded.parameters()} == {'meta'}
        assert relative_difference(offloaded(x), expected) <= 1e-5


@pytest.mark.filterwarnings('ignore:There is a performance drop')
def test_per_sample_gradients_by_torch_func_add_up():
    model, x = create_small(), images(3)
    weights = dict(model.named_parameters())

    def loss(weights, image):
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    model(x).square().sum().backward()
    scale = max(param.grad.abs().max() for param in weights.values())
    for name, param in weights.items():
        assert torch.allclose(grads[name].sum(0), param.grad, rtol=1e-3, atol=1e-5 * scale), name


def test_synchronised_batch_norm_is_called():
    model, x = create_small(), images(3)
    with torch.no_grad():
        expected = model(x)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        called = []
        for module in converted.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.forward = lambda x, forward=module.forward: called.append(1) or forward(x)
        assert relative_difference(converted(x), expected) <= 1e-5
    assert len(called) == 27


def test_frozen_and_absorbed_batch_norms_give_the_same_logits():
    model, x = create_small(), images(3)
    with torch.no_grad():
        expected = model(x)
        absorbed = copy.deepcopy(model)
        for module in absorbed.modules():
            if isinstance(module, layers.ConvNorm):
                module.conv, module.bn = nn.utils.fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        assert relative_difference(absorbed(x), expected) <= 1e-5
        freeze(model)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert relative_difference(model.train()(x), expected) <= 1e-5


def test_batch_norm_that_learns_without_gradients_sees_the_whole_batch(monkeypatch):
    monkeypatch.setattr(layers, '_SLICE_BYTES', 1)
    model = create_small(drop_path_rate=0.).train()
    peer = create_timm(model)
    with torch.no_grad():
        assert relative_difference(model(images(4)), peer(images(4))) <= 1e-4
    for ours, theirs in zip(model.buffers(), peer.buffers()):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5)


# timm's verbs

def test_features_and_head_have_timms_shapes():
    model = create_small()
    with torch.no_grad():
        features = model.forward_features(images())
        assert features.shape == (2, model.num_features, 2, 2) == (2, 320, 2, 2)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size) == (2, 320)
        assert torch.equal(model.forward_head(features), model(images()))
        assert create_small(num_classes=0)(images()).shape == (2, 320)
        assert create_small(num_classes=0, global_pool='')(images()).shape == (2, 320, 2, 2)
        assert create_small(in_chans=1)(images()[:, :1]).shape == (2, 10)

    model.reset_classifier(7)
    assert model.get_classifier().weight.shape == (7, 320) and model.num_classes == 7
    model.reset_classifier(0, '')
    assert model(images()).shape == (2, 320, 2, 2)


def test_intermediates_are_the_outputs_of_the_stages():
    model = create_small()
    outputs = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        final, intermediates = model.forward_intermediates(images())
        assert all(torch.equal(a, b) for a, b in zip(intermediates, outputs))
        assert torch.equal(final, intermediates[-1])
        assert [(x.shape[1], 64 // x.shape[2]) for x in intermediates] == [
            (info['num_chs'], info['reduction']) for info in model.feature_info]
        outputs.clear()
        second, = model.forward_intermediates(images(), indices=[1], stop_early=True, intermediates_only=True)
        assert len(outputs) == 2 and torch.equal(second, intermediates[1])

        assert model.prune_intermediate_layers([0, 2]) == [0, 2]
        assert len(model.stages) == 3 and model.num_features == 160
        assert torch.equal(model(images()), intermediates[2])


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'getter', 'fx'])
def test_every_feature_extractor_of_timm_gives_the_stages(feature_cls):
    model = create_small()
    extractor = timm.create_model(
        'tiny_vit_5m_224', img_size=64, features_only=True, feature_cls=feature_cls, out_indices=(1, 3)).eval()
    weights = model.state_dict()
    for name, tensor in extractor.state_dict().items():
        for prefix in ('model.', 'body.', 'graph_module.'):
            name = name.removeprefix(prefix)
        tensor.copy_(weights[name.replace('stages_', 'stages.')])
    with torch.no_grad():
        expected = model.forward_intermediates(images(), indices=[1, 3], intermediates_only=True)
        features = extractor(images())
    features = list(features.values()) if isinstance(features, dict) else features
    assert extractor.feature_info.channels() == [128, 320]
    assert all(relative_difference(a, b) <= 1e-5 for a, b in zip(features, expected, strict=True))


def test_drop_rates_reach_their_modules():
    model = timm.create_model('tiny_vit_5m_224', drop_rate=0.1, drop_path_rate=0.22, proj_drop_rate=0.3)
    rates = [module.drop_prob for module in model.modules() if type(module).__name__ == 'DropPath']
    assert len(rates) == 1 + 2 * 10 and max(rates) == pytest.approx(0.22)
    assert model.stages[3].blocks[1].drop_path2.drop_prob == pytest.approx(0.22)
    assert model.head.drop.p == 0.1 and model.stages[1].blocks[0].mlp.drop1.p == 0.3


def test_models_are_made_on_any_device_and_in_any_dtype():
    assert {param.dtype for param in timm.create_model('tiny_vit_5m_224', dtype=torch.float64).parameters()} == {
        torch.float64}
    model = timm.create_model('tiny_vit_5m_224', img_size=64, num_classes=10, device='meta')
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {'meta'}
    model.to_empty(device='cpu')
    model.init_weights()
    reference = create_small()
    assert all(param.std() == 0 for name, param in model.named_parameters() if name.endswith('conv3.bn.weight'))
    model.load_state_dict(reference.state_dict())
    for module in model.modules():
        if isinstance(module, tiny_vit.Attention):
            module.attention_bias_idxs.zero_()
    assert len(reinit_non_persistent_buffers(model)) == 10
    with torch.no_grad():
        assert torch.equal(model.eval()(images()), reference(images()))


def test_initialising_again_gives_the_state_of_a_new_model():
    torch.manual_seed(0)
    model = timm.create_model('tiny_vit_5m_224', img_size=32)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(3)
    model.init_weights()
    for name, param in model.named_parameters():
        if param.ndim == 1 or 'attention_biases' in name:
            expected = 1. if name.endswith('weight') else 0.
            if name.startswith('stages.0') and name.endswith('conv3.bn.weight'):
                expected = 0.
            assert (param == expected).all() or name.endswith('conv.bias'), name
        else:
            assert 0 < param.std() < 1, name


@pytest.mark.parametrize('copy_of', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal(copy_of):
    model = create_small()
    with torch.no_grad():
        assert torch.equal(copy_of(model)(images()), model(images()))


@pytest.mark.parametrize('name', VARIANTS)
def test_layer_decay_gives_every_parameter_the_papers_scale(name):
    model = timm.create_model(name, device='meta')
    names = {id(param): param_name for param_name, param in model.named_parameters()}
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.8)
    scales = {names[id(param)]: group['lr_scale'] for group in groups for param in group['params']}
    assert scales == pytest.approx(rename_official(GOLDEN['lr_scales']))


def test_weight_decay_spares_what_the_official_optimizer_spares():
    model = timm.create_model('tiny_vit_5m_224', device='meta')
    for make in (param_groups_weight_decay, param_groups_layer_decay):
        groups = make(model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay())
        spared = {id(param) for group in groups if group['weight_decay'] == 0 for param in group['params']}
        for name, param in model.named_parameters():
            official = param.ndim == 1 or name.endswith('.bias') or any(
                keyword in name for keyword in model.no_weight_decay_keywords())
            assert (id(param) in spared) == official, name


def test_coarse_groups_are_the_stem_the_stages_and_the_head():
    model = timm.create_model('tiny_vit_5m_224', device='meta')
    layers = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert layers['patch_embed.conv1.conv.weight'] == 0
    assert layers['stages.2.downsample.conv1.bn.bias'] == layers['stages.2.blocks.5.attn.qkv.weight'] == 3
    assert layers['head.fc.weight'] == 5


# Compilers

@pytest.mark.filterwarnings(
    'ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::torch.jit.TracerWarning')
def test_torchscript_gives_the_same_logits():
    model = create_small(depths=(1, 1, 1, 1))
    with torch.no_grad():
        assert relative_difference(torch.jit.script(model)(images()), model(images())) <= 1e-5
        traced = torch.jit.trace(model, images())
        assert relative_difference(traced(images(seed=1)), model(images(seed=1))) <= 1e-5


@pytest.mark.filterwarnings(
    'ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::torch.jit.TracerWarning')
def test_a_model_is_traced_with_gradients_too():
    model = create_small(depths=(1, 1, 1, 1))
    traced = torch.jit.trace(model, images())  # compares the trace with the model by itself
    assert relative_difference(traced(images(seed=1)), model(images(seed=1))) <= 1e-5


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.launches
def test_one_compiled_graph_serves_every_batch_size(train):
    torch._dynamo.reset()
    model = create_small(depths=(1, 1, 1, 1), drop_path_rate=0.).train(train)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.set_grad_enabled(train), torch._dynamo.config.patch(error_on_recompile=True):
        for batch_size in (2, 3, 5):
            x = images(batch_size)
            torch._dynamo.mark_dynamic(x, 0)
            logits, expected = compiled(x), reference(x)
            assert relative_difference(logits, expected) <= 1e-4
            if train:
                logits.square().mean().backward()
                expected.square().mean().backward()
    if train:
        scale = max(param.grad.abs().max() for param in reference.parameters())
        for ours, theirs in zip(model.parameters(), reference.parameters()):
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * scale)
