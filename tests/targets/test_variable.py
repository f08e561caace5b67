"""Records of a varying number of classes: the ladder of sizes, their lengths on disk, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from timm_tinyvit.targets.compact import CompactCodec
from timm_tinyvit.targets.sparse import SparseTargets
from timm_tinyvit.targets.sparsifier import Nucleus
from timm_tinyvit.targets.variable import VariableCodec, ladder

# Logits of 60 augmented photographs by timm's tf_efficientnet_lite0 with its ImageNet-1k weights.
TEACHER_LOGITS = Path(__file__).parents[1] / 'golden' / 'teacher_logits.npz'
SHAPES = [(1, 2), (5, 10), (12, 12), (100, 1000), (60, 100)]


def nucleus_targets(k, num_classes, top_p=0.9):
    logits = torch.from_numpy(np.load(TEACHER_LOGITS)['logits'])[:, :num_classes].float()
    # From teachers that know nothing to those that are sure, so that all sizes occur.
    logits = logits * torch.linspace(0, 4, len(logits))[:, None]
    return Nucleus(k, top_p)(logits, 0, range(len(logits)))


@pytest.mark.parametrize('k, num_classes', [*SHAPES, (2, 2), (3, 4), (24, 24), (200, 21841), (1024, 65536)])
def test_the_length_of_a_record_tells_its_size(k, num_classes):
    sizes = ladder(num_classes, k)
    assert sizes[-1] == k and list(sizes) == sorted(set(sizes))
    lengths = [CompactCodec(num_classes, size).width for size in sizes]
    assert lengths == sorted(set(lengths))
    assert VariableCodec(num_classes, k).width == 1 + max(lengths)
    if num_classes >= 1000:  # else some sizes are not shorter than the next
        steps = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
        assert sizes == (*(step for step in steps if step < k), k)


@pytest.mark.parametrize('k, num_classes', SHAPES)
def test_each_record_is_the_compact_record_of_its_size(k, num_classes):
    codec, targets = VariableCodec(num_classes, k), nucleus_targets(k, num_classes)
    records = codec.encode(targets)
    codec.check(records)
    decoded = codec.decode(torch.from_numpy(records))
    assert torch.equal(decoded.num_valid, targets.num_valid)
    data, offsets = codec.pack(records)
    assert np.array_equal(codec.unpack(data, offsets), records)
    assert data.dtype == np.uint8 and offsets.dtype == np.int64 and len(data) == offsets[-1]
    for row, size in enumerate(targets.num_valid.tolist()):
        log_rest = targets.log_rest[row:row + 1] if size < num_classes else None
        alone = SparseTargets(
            targets.ids[row:row + 1, :size], targets.log_probs[row:row + 1, :size], log_rest,
            targets.num_valid[row:row + 1], num_classes)
        compact = CompactCodec(num_classes, size)
        record = compact.encode(alone)
        assert data[offsets[row]:offsets[row + 1]].tobytes() == record.tobytes() and record[0, -1] != 0
        torch.testing.assert_close(
            decoded.densify()[row], compact.decode(torch.from_numpy(record)).densify()[0], rtol=1e-5, atol=1e-8)
    some = records[::-7]
    data, offsets = codec.pack(some)
    # Records may begin anywhere in what was read.
    assert np.array_equal(codec.unpack(np.concatenate([np.zeros(5, np.uint8), data]), offsets + 5), some)


@pytest.mark.parametrize('k, num_classes', SHAPES)
def test_a_device_decodes_all_sizes_at_once_to_the_same(k, num_classes):
    codec, targets = VariableCodec(num_classes, k), nucleus_targets(k, num_classes)
    records = torch.from_numpy(codec.encode(targets))
    expected = codec.decode(records)
    found = codec._decode_every_size(records)
    for field in ('ids', 'log_probs', 'log_rest', 'num_valid'):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field))
    # The meta device has no data: shapes that depended on them, or a wait for them, would raise.
    assert codec.decode(records.to('meta')).ids.shape == (len(targets), k)


def test_a_sharp_teacher_takes_fewer_bytes_and_loses_little():
    logits = 2 * torch.from_numpy(np.load(TEACHER_LOGITS)['logits']).float()
    log_probs = logits.double().log_softmax(1)

    def measure(codec, targets):
        records = codec.encode(targets)
        dense = codec.decode(torch.from_numpy(records)).densify().double()
        # On disk each record of variable length has an offset of 4 bytes.
        size = len(codec.pack(records)[0]) / len(records) + 4 if codec.is_variable else codec.width
        return size, (log_probs.exp() * (log_probs - dense.log())).sum(1).mean().item()

    size, kl = measure(VariableCodec(1000, 200), Nucleus(200, 0.99)(logits, 0, range(60)))
    top_k = next(k for k in range(1, 100) if CompactCodec(1000, k).width > size)
    other_size, other_kl = measure(CompactCodec(1000, top_k), SparseTargets.from_logits(logits, top_k))
    assert size < other_size < 100 and kl < 0.9 * other_kl


def test_damaged_records_are_refused_by_their_own_row(refused):
    codec, targets = VariableCodec(1000, 100), nucleus_targets(100, 1000)
    records = codec.encode(targets)
    place = int(np.bincount(records[:, 0], minlength=len(codec.sizes))[1:-1].argmax()) + 1
    row = int(np.flatnonzero(records[:, 0] == place)[1])  # not the first of its size
    length = CompactCodec(1000, codec.sizes[place]).width
    for byte, value, reason in (
            (0, len(codec.sizes), 'beyond'), (0, place - 1, 'more bytes'), (0, place + 1, 'check'),
            (3, records[row, 3] ^ 8, 'check'), (1 + length, 1, 'more bytes')):
        damaged = records.copy()
        damaged[row, byte] = value
        with refused(f'record {row} of 60', reason, error=ValueError):
            codec.check(damaged)
    with refused('[B, 138]', error=ValueError):
        codec.check(records[:, 1:])


def test_lengths_that_no_record_has_are_refused(refused):
    codec, targets = VariableCodec(1000, 100), nucleus_targets(100, 1000)
    data, offsets = codec.pack(codec.encode(targets))
    longer = offsets.copy()
    longer[8:] += 1
    with refused('record 7 of 60', error=ValueError):
        codec.unpack(data, longer)
    swapped = offsets.copy()
    swapped[[20, 21]] = swapped[[21, 20]]
    with refused('record 19 of 60', error=ValueError):
        codec.unpack(data, swapped)
    for moved in (offsets - 3, offsets + 3):
        with refused(f'of {len(data)}', error=ValueError):
            codec.unpack(data, moved)


def test_no_records_are_no_bytes():
    codec = VariableCodec(1000, 10)
    records = codec.encode(Nucleus(10, 0.5)(torch.zeros(0, 1000), 0, []))
    data, offsets = codec.pack(records)
    assert records.shape == (0, codec.width) and len(data) == 0 and offsets.tolist() == [0]
    assert codec.unpack(data, offsets).shape == (0, codec.width)
    assert codec.decode(torch.from_numpy(records), check=True).ids.shape == (0, 10)


def test_what_is_not_from_a_ladder_is_refused(refused):
    codec, targets = VariableCodec(1000, 100), nucleus_targets(100, 1000)
    for count in (0, 5, 101):
        num_valid = targets.num_valid.clone()
        num_valid[4] = count
        with refused('row 4', f'{count} valid', error=ValueError):
            codec.encode(replace(targets, num_valid=num_valid))
    with refused('a class twice', error=ValueError):
        codec.encode(replace(targets, ids=torch.zeros_like(targets.ids)))
    for arguments, reason in (
            ((1000, 10, 'none'), 'use draws or float16'), ((1000, 0), 'k = 0'), ((2000, 1025), 'at most 1,024'),
            ((65537, 10), '65,536 classes')):
        with refused(reason, error=ValueError):
            VariableCodec(*arguments)
