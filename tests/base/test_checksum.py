"""Weights and checkpoints: a flipped bit anywhere is refused, and files of others are read as they are."""

import random

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import load_state_dict

from timm_tinyvit.models.loading import create_pretrained, read_weights
from timm_tinyvit.models.saving import export_model
from timm_tinyvit.train.checkpoint import save_checkpoint

FLIPS = 500


def write(kind, folder):
    """A file of weights of this kind, and the weights."""
    model = timm.create_model('test_resnet', num_classes=10)
    if kind == 'export':
        export_model(folder / 'model', model, data_config={'input_size': (3, 32, 32)})
        return folder / 'model' / 'model.safetensors', model.state_dict()
    return save_checkpoint(folder, {'epoch': 0, 'samples': 8, 'model': model.state_dict()}, keep=1), model.state_dict()


def same(one, two):
    return set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize('part', ['anywhere', 'first', 'last'])
@pytest.mark.parametrize('kind', ['export', 'checkpoint'])
def test_a_flipped_bit_is_refused_wherever_it_is(kind, part, tmp_path, one_sentence):
    """At random places of the whole file, of its first 4,096 bytes and of its last 512: headers and footers."""
    path, weights = write(kind, tmp_path)
    size, draw = path.stat().st_size, random.Random(part)
    places = {'anywhere': range(size), 'first': range(4096), 'last': range(size - 512, size)}[part]
    held = 0
    with open(path, 'r+b', buffering=0) as file:
        for _ in range(FLIPS):
            place, bit = draw.choice(places), 1 << draw.randrange(8)
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ bit]))
            with pytest.raises(ValueError) as error:
                read_weights(str(path))
            one_sentence(str(error.value), str(path), 'not as it was written')
            held += 1
            file.seek(place)
            file.write(bytes([byte]))
    assert held == FLIPS and same(read_weights(str(path)), weights)


@pytest.mark.parametrize('kind', ['export', 'checkpoint'])
def test_a_file_cut_short_is_refused(kind, tmp_path, refused):
    path, _ = write(kind, tmp_path)
    content = path.read_bytes()
    for size in (0, 1, 7, 23, 24, 100, len(content) // 2, len(content) - 25, len(content) - 1):
        path.write_bytes(content[:size])
        with refused(str(path)):
            read_weights(str(path))


def test_a_model_of_a_folder_is_looked_at_before_timm_loads_it(tmp_path, refused):
    path, _ = write('export', tmp_path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    for name in (str(path.parent), f'local-dir:{path.parent}'):
        with refused(str(path), 'not as it was written'):
            create_pretrained(name)


def test_libraries_read_what_has_a_checksum_and_files_without_one_are_read(tmp_path):
    for kind in ('export', 'checkpoint'):
        path, weights = write(kind, tmp_path)
        assert same(load_state_dict(str(path), weights_only=True), weights)
    path, weights = write('export', tmp_path)
    assert same(load_file(path), weights)
    save_file(weights, tmp_path / 'foreign.safetensors', metadata={'format': 'pt'})
    torch.save({'model': weights}, tmp_path / 'foreign.pt')
    for name in ('foreign.safetensors', 'foreign.pt'):
        assert same(read_weights(str(tmp_path / name)), weights)


def test_the_same_weights_are_the_same_bytes(tmp_path):
    torch.manual_seed(0)
    one, _ = write('export', tmp_path / 'one')
    torch.manual_seed(0)
    two, _ = write('export', tmp_path / 'two')
    assert one.read_bytes() == two.read_bytes()
