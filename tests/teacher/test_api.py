"""Filling a store from Python: the bytes of the program, from any module that gives logits or features."""

import pytest
import timm
import torch
from torch import nn

from support.files import tree
from support.flags import DATA
from timm_tinyvit import LogitStore, ViewConfig, fill_store, load_split
from timm_tinyvit.models.loading import create_pretrained

VIEWS = ViewConfig(input_size=(3, 32, 32), scale=(0.6, 1.), color_jitter=0.)
IMAGES = dict(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), size=(32, 32))


class OwnTeacher(nn.Module):
    """A module that says nothing of itself."""

    def __init__(self, out=7):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, out, 5, stride=3)

    def forward(self, x):
        return self.layer(x).mean(dim=(2, 3))


@pytest.fixture(scope='module')
def images():
    return load_split(DATA, 'train[:120]', is_training=True)


def test_a_call_fills_the_very_bytes_of_the_program_and_goes_on_where_it_was_ended(
        filled_store, teacher, images, tmp_path):
    there = LogitStore.open(filled_store)
    arguments = create_pretrained(teacher), images, tmp_path / 'logits'
    options = dict(name=there.manifest.teacher['name'], num_workers=0, show_progress=False)
    store = fill_store(*arguments, VIEWS, 2, topk=3, shard_size=20, **options)
    assert store.manifest.epochs == 2 and not store.missing(range(2))
    # More epochs, of which one shard is lost: what is there is not made again.
    kept = store.shard_path(0, 1)
    before = kept.stat().st_mtime_ns
    store.shard_path(0, 0).unlink()
    fill_store(*arguments, epochs=4, **options)
    assert kept.stat().st_mtime_ns == before
    assert tree(tmp_path / 'logits', hidden=False) == tree(filled_store, hidden=False)


def test_any_module_with_logits_or_features_is_a_teacher(images, tmp_path, refused):
    own = OwnTeacher()
    options = dict(epochs=1, show_progress=False, **IMAGES)
    store = fill_store(own, DATA, tmp_path / 'own', VIEWS, split='train[:120]', topk=2, name='mine', **options)
    assert (store.manifest.num_classes, store.manifest.k, store.manifest.teacher['name']) == (7, 2, 'mine')
    assert store.manifest.teacher['mean'] == [0.5, 0.5, 0.5] and store.manifest.class_names == []
    vectors = fill_store(OwnTeacher(12), images, tmp_path / 'vectors', VIEWS, targets='features', **options)
    assert vectors.manifest.features['dim'] == 12
    maps = fill_store(
        OwnTeacher(12).layer, images, tmp_path / 'maps', VIEWS, targets='features', feature_grid=2, **options)
    assert maps.manifest.features['grid'] == 2 and maps.codec.decode(
        torch.from_numpy(maps.read(0, [3, 5]))).vectors.shape == (2, 4, 12)
    with refused('OwnTeacher', 'mean, size', '(224, 224)'):
        fill_store(own, images, tmp_path / 'none', VIEWS, std=(1, 1, 1))
    with refused('a str', 'timm.create_model'):
        fill_store('test_vit', images, tmp_path / 'none', VIEWS)
    with refused("'k'", 'topk'):
        fill_store(own, images, tmp_path / 'none', VIEWS, k=3, **options)
    with refused('epochs', 'range(0, 0)'):
        fill_store(own, images, tmp_path / 'none', VIEWS, **options | {'epochs': 0})
    with refused('--topk'):
        fill_store(own, images, tmp_path / 'none', VIEWS, topk=8, **options)
    with refused('OwnTeacher', 'classifier'):
        fill_store(own.layer, images, tmp_path / 'none', VIEWS, name='OwnTeacher', **options)
    with refused('other views', '--hflip 0.25'):
        fill_store(own, images, tmp_path / 'own', ViewConfig(hflip=0.25), name='mine', **options)
    # Another teacher is not mixed with the first.
    with refused('something else', 'weights'):
        fill_store(timm.create_model('test_resnet', num_classes=7), images, tmp_path / 'own', name='mine', **options)
    assert not (tmp_path / 'none').exists() and LogitStore.open(tmp_path / 'own').missing([0]) == []
