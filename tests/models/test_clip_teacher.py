"""The paper's CLIP teacher: the official code's logits and checkpoint, as a timm model."""


import pytest
import timm
import torch
from support.golden_weights import golden, golden_image, golden_tensor, relative_difference
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from timm_tinyvit.models import clip_teacher

GOLDEN = golden('clip_teacher')
NAME = 'clip_vit_large_patch14_224'


def create_reduced(**kwargs):
    """The reduced build of the golden figures, without weights."""
    config = GOLDEN['reduced']['config']
    return timm.create_model(NAME, **{
        'img_size': config['image_resolution'],
        'depth': config['vision_layers'],
        'embed_dim': config['vision_width'],
        'num_heads': config['vision_width'] // 64,
        'num_classes': config['num_classes'],
        **kwargs,
    }).eval()


@pytest.fixture(scope='module')
def official():
    return {name: golden_tensor(name, shape) for name, shape in GOLDEN['reduced']['state_dict'].items()}


@pytest.mark.parametrize('wrapped', [False, True])
def test_logits_are_those_of_the_official_code(official, wrapped):
    model = create_reduced()
    checkpoint = {'model': official} if wrapped else official
    names = set(official)
    model.load_state_dict(clip_teacher.checkpoint_filter_fn(checkpoint, model))
    assert set(official) == names
    with torch.inference_mode():
        logits = model(golden_image(GOLDEN['reduced']['config']['image_resolution']))[0]
    assert relative_difference(logits, torch.tensor(GOLDEN['reduced']['logits'])) <= 1e-4


def test_the_folded_projection_is_the_two_step_one(official):
    model = create_reduced()
    weights = clip_teacher.checkpoint_filter_fn(official, model)
    features = torch.randn(5, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    two_steps = features @ official['visual.proj'].double() @ official['head.weight'].double().T
    assert relative_difference(features @ weights['head.weight'].double().T, two_steps) <= 1e-6


def test_every_tensor_of_the_official_checkpoint_has_its_place_in_the_full_model():
    model = timm.create_model(NAME, device='meta')
    assert model.num_classes == 21841
    official = {name: torch.empty(shape, device='meta') for name, shape in GOLDEN['full_state_dict'].items()}
    mapped = clip_teacher.checkpoint_filter_fn(official, model)
    assert {name: tensor.shape for name, tensor in mapped.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()}
    assert len(mapped) == len(official) - 1  # the projection went into the classifier


def test_pretrained_loading_reads_official_and_timms_files(official, tmp_path):
    model = create_reduced()
    model.load_state_dict(clip_teacher.checkpoint_filter_fn(official, model))
    torch.save({'model': official}, tmp_path / 'official.pth')
    torch.save(model.state_dict(), tmp_path / 'timm.pth')
    for file in ('official.pth', 'timm.pth'):
        loaded = create_reduced(
            pretrained=True, pretrained_cfg_overlay={'file': str(tmp_path / file), 'num_classes': 211})
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    student_head = create_reduced(
        pretrained=True, num_classes=5, pretrained_cfg_overlay={'file': str(tmp_path / 'official.pth')})
    assert torch.equal(student_head.norm.weight, model.norm.weight)
    larger = create_reduced(
        pretrained=True, img_size=84,
        pretrained_cfg_overlay={'file': str(tmp_path / 'official.pth'), 'num_classes': 211, 'input_size': (3, 56, 56)})
    assert larger.pos_embed.shape == (1, 37, 128)


def test_images_are_normalised_as_clip_does():
    config = timm.data.resolve_model_data_config(timm.create_model(NAME, device='meta'))
    assert config['mean'] == OPENAI_CLIP_MEAN == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert config['std'] == OPENAI_CLIP_STD == pytest.approx((0.26862954, 0.26130258, 0.27577711))
    assert config['input_size'] == (3, 224, 224) and config['interpolation'] == 'bicubic'


def test_the_checkpoint_of_the_paper_is_known():
    assert f'{NAME}.in22k' in timm.list_models(NAME, pretrained=True)
    assert timm.get_pretrained_cfg(f'{NAME}.in22k').url.endswith('clip_vit_large_patch14_22k.pth')
