"""Feature targets: what a record keeps of a vector, what is damaged, and how far a student's features are from it."""

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from support.flags import DATA

from timm_tinyvit.targets.codecs import create_feature_codec, feature_codecs
from timm_tinyvit.targets.features import FEATURE_LOSSES, FeatureTargets, feature_loss


def vectors_of(rows, cells, dim, seed=0):
    """Vectors like those of backbones: most numbers in a bell, a few far above it, each vector of another size."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, cells, dim, generator=generator)
    vectors[:, :, :2] *= 5
    return vectors * torch.logspace(-2, 2, rows)[:, None, None]


@pytest.mark.parametrize('name, least', [('int8', 0.9995), ('float16', 0.999999)])
@pytest.mark.parametrize('dim, grid', [(1, 0), (64, 0), (768, 0), (192, 7)])
def test_vectors_come_back_with_nearly_their_direction_and_length(name, least, dim, grid):
    codec = create_feature_codec(name, dim, grid)
    vectors = vectors_of(20, max(1, grid ** 2), dim)
    records = codec.encode(codec.keep(vectors))
    assert records.dtype == np.uint8 and records.shape == (20, codec.width) and (records[:, -1] == 1).all()
    codec.check(records)
    found = codec.decode(torch.from_numpy(records), check=True).vectors
    assert found.dtype == torch.float32 and found.shape == vectors.shape
    assert F.cosine_similarity(found, vectors, dim=-1).min() > least
    torch.testing.assert_close(found.norm(dim=-1), vectors.norm(dim=-1), rtol=2e-2, atol=0)
    # What was read once changes no more.
    again = codec.decode(torch.from_numpy(codec.encode(FeatureTargets(found)))).vectors
    torch.testing.assert_close(again, found, rtol=1e-3, atol=0)


@pytest.mark.parametrize('name', feature_codecs())
def test_a_vector_of_zeros_and_one_of_tiny_numbers_are_held(name):
    codec = create_feature_codec(name, 4)
    vectors = torch.tensor([[[0., 0., 0., 0.]], [[1e-12, -1e-12, 0., 0.]], [[8e-6, -8e-6, 0., 0.]]])
    records = codec.encode(FeatureTargets(vectors))
    codec.check(records)
    torch.testing.assert_close(codec.decode(torch.from_numpy(records)).vectors, vectors, rtol=0, atol=8e-6)


@pytest.mark.parametrize('name', feature_codecs())
def test_every_other_value_of_every_byte_is_seen(name, refused):
    codec = create_feature_codec(name, 6, 2)
    records = codec.encode(FeatureTargets(vectors_of(3, 4, 6)))
    for place in range(codec.width):
        for value in range(256):
            damaged = records.copy()
            damaged[1, place] = value
            if value != records[1, place]:
                with pytest.raises(ValueError):
                    codec.check(damaged)
    records[2, 5] ^= 255
    for look in (codec.check, lambda rows: codec.decode(torch.from_numpy(rows), check=True)):
        with refused('record 2 of 3', error=ValueError):
            look(records)
    for others in (np.zeros((2, codec.width), np.uint8), np.full((2, codec.width), 255, np.uint8)):
        with refused('record 0 of 2', error=ValueError):
            codec.check(others)
    for others in (records[:, 1:], records[0]):
        with refused(str(codec.width), error=ValueError):
            codec.check(others)


@pytest.mark.parametrize('name', feature_codecs())
def test_numbers_that_a_record_cannot_hold_are_refused(name, refused):
    codec = create_feature_codec(name, 4)
    for bad in (float('nan'), float('inf')):
        vectors = torch.ones(3, 1, 4)
        vectors[1, 0, 2] = bad
        with refused('1 of 3 views', 'NaN', error=ValueError):
            codec.keep(vectors)
        with refused('NaN', error=ValueError):
            codec.encode(FeatureTargets(vectors))
    with refused(f'codec {name} does not hold', error=ValueError):
        codec.encode(FeatureTargets(torch.full((1, 1, 4), 1e9)))
    with refused('[3, 1, 5]', 'made for [B, 1, 4]', error=ValueError):
        codec.encode(FeatureTargets(torch.ones(3, 1, 5)))
    with refused('[B, cells, D]', error=ValueError):
        FeatureTargets(torch.ones(3, 4))
    # A foreign writer's record, whose check is right.
    records = codec.encode(FeatureTargets(torch.ones(2, 1, 4)))
    records[1, :2] = np.array([np.inf], '<f2').view(np.uint8)
    records[1, -5:] = codec._checks(records)[1]
    with refused('record 1 of 2 holds NaN or infinity', error=ValueError):
        codec.check(records)


def test_codecs_that_cannot_be_are_refused(refused):
    for dim, grid in ((0, 0), (-3, 0), (4, -1), (1 << 40, 0), (256, 300)):
        with refused(f'features of {dim} numbers on a grid of {grid}', error=ValueError):
            create_feature_codec('int8', dim, grid)
    with refused("no codec 'compact' of feature targets", 'float16, int8', error=ValueError):
        create_feature_codec('compact', 64)
    assert create_feature_codec('int8', 256, 64).width == 64 * 64 * 258 + 5


@pytest.mark.parametrize('name', feature_codecs())
def test_records_decode_the_same_wherever_they_lie_in_memory(name):
    codec = create_feature_codec(name, 5, 3)
    whole = torch.from_numpy(codec.encode(FeatureTargets(vectors_of(9, 9, 5))))
    expected = codec.decode(whole).vectors
    wider = torch.zeros(9, codec.width + 5, dtype=torch.uint8)
    wider[:, 3:-2] = whole
    for part, rows in ((whole[3:4], [3]), (whole[::2], [0, 2, 4, 6, 8]), (whole[1:], range(1, 9)),
                       (wider[:, 3:-2], range(9)), (whole[:0], [])):
        assert torch.equal(codec.decode(part).vectors, expected[list(rows)])


@pytest.mark.parametrize('kind', FEATURE_LOSSES)
def test_the_losses_are_those_of_torch_and_train(kind, refused):
    stored, found = FeatureTargets(vectors_of(6, 4, 8)), vectors_of(6, 4, 8, seed=1).requires_grad_()
    loss = feature_loss(found, stored, kind)
    expected = {
        'cosine': 1 - F.cosine_similarity(found.flatten(0, 1), stored.vectors.flatten(0, 1)).mean(),
        'smooth-l1': F.smooth_l1_loss(found, stored.vectors), 'mse': F.mse_loss(found, stored.vectors)}[kind]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert torch.isfinite(found.grad).all() and found.grad.abs().sum() > 0
    torch.testing.assert_close(feature_loss(stored.vectors, stored, kind), torch.tensor(0.), atol=1e-6, rtol=0)
    assert feature_loss(found.bfloat16(), stored, kind).dtype == torch.float32
    with refused('[6, 4, 7]', '[6, 4, 8]', error=ValueError):
        feature_loss(found[:, :, :7], stored, kind)


def test_int8_keeps_the_direction_of_features_of_photographs(fashion):
    """Weights of the committed teacher, a timm model that was trained on these images."""
    model = timm.create_model(f'local-dir:{DATA}/teacher', pretrained=True).eval()
    images = [np.asarray(image.convert('RGB').resize((32, 32))) for image in fashion[:64]['image']]
    views = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        features = model.forward_head(model.forward_features(views), pre_logits=True)[:, None]
    codec = create_feature_codec('int8', features.shape[2])
    found = codec.decode(torch.from_numpy(codec.encode(FeatureTargets(features)))).vectors
    assert F.cosine_similarity(found, features, dim=-1).min() > 0.9995
