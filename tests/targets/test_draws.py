"""Records of random samples: every draw comes back, in fewer bytes than probabilities would take."""

from dataclasses import replace
from math import comb, log2

import numpy as np
import pytest
import torch

from timm_tinyvit.targets.compact import CompactCodec
from timm_tinyvit.targets.draws import DrawsCodec
from timm_tinyvit.targets.sparsifier import Sample

SHAPES = [(1, 2), (10, 2), (7, 7), (10, 1000), (100, 1000), (100, 21841), (25, 65536), (4096, 65536), (300, 10)]


def samples(num_draws, num_classes, rows=24):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, num_classes, generator=generator) * torch.linspace(0, 6, rows)[:, None]
    return Sample(num_draws)(logits, 0, range(rows))


@pytest.mark.parametrize('num_draws, num_classes', SHAPES)
def test_every_draw_comes_back(num_draws, num_classes):
    codec, targets = DrawsCodec(num_classes, num_draws), samples(num_draws, num_classes)
    records = codec.encode(targets)
    assert records.shape == (24, codec.width) and records[:, -1].all() and 8 * codec.width <= 65268
    decoded = codec.decode(torch.from_numpy(records), check=True)
    for field in ('ids', 'log_probs', 'num_valid'):
        assert torch.equal(getattr(decoded, field), getattr(targets, field))
    assert decoded.log_rest is None and decoded.remainder == 'none'


@pytest.mark.parametrize('num_draws, num_classes', SHAPES)
def test_a_device_decodes_the_same_without_looking_at_the_data(num_draws, num_classes):
    codec = DrawsCodec(num_classes, num_draws)
    records = codec.encode(samples(num_draws, num_classes))
    found = codec._read(torch.from_numpy(records), torch)
    assert np.array_equal(found.numpy(), codec._read(records, np))
    assert codec.decode(torch.from_numpy(records).to('meta')).ids.shape == (24, min(num_draws, num_classes))


def test_records_are_as_small_as_promised():
    for num_draws, width, above in ((10, 11, 1.35), (100, 68, 1.15)):
        codec = DrawsCodec(1000, num_draws)
        fewest = log2(comb(1000 + num_draws - 1, num_draws)) / 8  # as many multisets as there are
        assert codec.width == width < above * fewest
        # Of as many classes, without their probabilities.
        assert codec.width < 0.62 * CompactCodec(1000, num_draws).width


@pytest.mark.parametrize('num_draws, num_classes', [(1, 2), (10, 1000), (60, 1000)])
def test_every_changed_or_moved_bit_is_an_error(num_draws, num_classes):
    codec = DrawsCodec(num_classes, num_draws)
    draw = np.random.default_rng(0)
    for record in codec.encode(samples(num_draws, num_classes, rows=4)):
        bits = np.unpackbits(record, bitorder='little')
        others = []
        for bit in range(len(bits)):
            others.append(bits.copy())
            others[-1][bit] ^= 1
            moved = bits.copy()
            moved[draw.choice(np.flatnonzero(bits == 1))] = 0
            moved[draw.choice(np.flatnonzero(bits == 0))] = 1
            others.append(moved)
        for other in np.packbits(others, axis=1, bitorder='little'):
            with pytest.raises(ValueError):
                codec.check(other[None])


def test_records_that_no_encoder_wrote_are_refused_though_their_check_is_right():
    codec = DrawsCodec(1000, 60)
    sets = codec._sets
    numbers = sets.numbers(np.arange(60)[None] * 16)
    falling, beyond = ({name: values.copy() for name, values in numbers.items()} for _ in range(2))
    falling['low'][0, :2] = [15, 0]
    beyond['low'][0, -1] = (1 << sets._low_bits) - 1
    beyond['classes'][0] = 0
    beyond['classes'][0, -60:] = 1
    falling['classes'][0] = 0
    falling['classes'][0, :60] = 1
    for fields, reason in ((falling, 'in order'), (beyond, 'beyond 1000')):
        with pytest.raises(ValueError, match=f'record 0 of 1 .*{reason}'):
            codec.check(codec._layout.write(fields))


def test_targets_that_are_no_shares_of_draws_are_refused(refused):
    codec, targets = DrawsCodec(1000, 10), samples(10, 1000)

    def changed(field, value, row=4):
        values = getattr(targets, field).clone()
        values[row] = value
        return replace(targets, **{field: values})

    for other in (
            changed('log_probs', -1.), changed('log_probs', torch.nan), changed('num_valid', 0),
            changed('num_valid', 11)):
        with refused('row 4', 'shares of 10 draws', error=ValueError):
            codec.encode(other)
    row = int((targets.num_valid == 10).nonzero()[0])
    for ids, reason in ((torch.full((10,), 7), f'row {row} of the targets names a class twice'),
                        (torch.arange(991, 1001), 'from 0 to 1000'), (torch.arange(-1, 9), 'from -1')):
        with refused(reason, error=ValueError):
            codec.encode(changed('ids', ids, row))
    with refused('was made for', error=ValueError):
        codec.encode(samples(11, 1000))
    for arguments, reason in (
            ((1000, 10, 'uniform'), '--sparsifier sample'), ((1000, 0), 'k = 0'), ((1000, 4097), 'at most 4,096'),
            ((65537, 10), '65,536 classes')):
        with refused(reason, error=ValueError):
            DrawsCodec(*arguments)
