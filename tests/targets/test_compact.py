"""The compact codec: what comes back, how small it is, how far from the teacher, and what damaged records do."""

import math
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch

from timm_tinyvit.targets.compact import CompactCodec
from timm_tinyvit.targets.float16 import Float16Codec
from timm_tinyvit.targets.sparse import SparseTargets

# Logits of 60 augmented photographs by timm's tf_efficientnet_lite0 with its ImageNet-1k weights.
TEACHER_LOGITS = Path(__file__).parents[1] / 'golden' / 'teacher_logits.npz'
GRID = [
    (k, num_classes) for num_classes in (2, 10, 100, 1000, 21841, 65536) for k in (1, 2, 3, 10, 16, 17, 24, 100, 200)
    if k <= num_classes
]


def random_targets(k, num_classes, batch=24, seed=0, scale=3.):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, num_classes, generator=generator) * torch.linspace(0, scale, batch)[:, None]
    return SparseTargets.from_logits(logits, k)


def seal(codec, record):
    """Give a record, one number, the check that makes it a multiple of the modulus; written from the format."""
    _, bits, _, _, start = codec._layout._fields['check']
    first, modulus = {8: (1, 227), 16: (256, 65269)}[bits]
    record &= (1 << start) - 1
    check = next(c for c in range(first, first + modulus) if (record + (c << start)) % modulus == 0)
    return np.frombuffer((record + (check << start)).to_bytes(codec.width, 'little'), dtype=np.uint8)


def as_numbers(records):
    return [int.from_bytes(record.tobytes(), 'little') for record in records]


@pytest.fixture(scope='module')
def teacher_log_probs():
    return torch.from_numpy(np.load(TEACHER_LOGITS)['logits']).double().log_softmax(dim=1)


@pytest.mark.parametrize('k, num_classes', GRID)
def test_classes_come_back_exactly_and_masses_sum_to_one(k, num_classes):
    codec, targets = CompactCodec(num_classes, k), random_targets(k, num_classes)
    records = codec.encode(targets)
    assert records.shape == (len(targets), codec.width) and records.dtype == np.uint8
    codec.check(records)
    decoded = codec.decode(torch.from_numpy(records))
    torch.testing.assert_close(decoded.ids, targets.ids.sort(dim=1).values, rtol=0, atol=0)
    mass = decoded.log_probs.exp().sum(dim=1)
    if k < num_classes:
        mass += decoded.log_rest.exp()
        step = 0.2 if k > 16 else 0.5  # in the logit
        torch.testing.assert_close(
            decoded.log_rest.exp().logit(), targets.log_rest.exp().logit().clamp(min=-10), rtol=0, atol=step)
    else:
        assert decoded.log_rest is None
    torch.testing.assert_close(mass, torch.ones_like(mass))


@pytest.mark.parametrize('k, num_classes', [(10, 1000), (100, 1000)])
def test_a_less_probable_class_never_becomes_the_more_probable_one(k, num_classes):
    codec, targets = CompactCodec(num_classes, k), random_targets(k, num_classes)
    decoded = codec.decode(torch.from_numpy(codec.encode(targets)))
    order = targets.ids.argsort(dim=1).argsort(dim=1)
    log_probs = decoded.log_probs.gather(1, order)  # most probable first again
    assert (log_probs.diff(dim=1) <= 0).all()
    assert ((log_probs[:, :1] - log_probs) - (targets.log_probs[:, :1] - targets.log_probs)).abs().max() < 1.5


@pytest.mark.parametrize('k, num_classes, width', [
    (10, 1000, 18), (100, 1000, 137), (100, 21841, 194), (5, 1000, 11), (200, 1000, 267),
])
def test_records_are_as_small_as_promised(k, num_classes, width):
    assert CompactCodec(num_classes, k).width == width


@pytest.mark.parametrize('scale', [1, 2], ids=['teacher', 'sharp teacher'])
@pytest.mark.parametrize('k, bar', [(10, 0.003), (100, 0.01), (200, 0.01), (5, 0.003), (20, 0.01), (50, 0.01)])
def test_records_stay_as_close_to_a_real_teacher_as_float16(teacher_log_probs, k, bar, scale):
    log_probs = (teacher_log_probs * scale).log_softmax(dim=1)
    targets = SparseTargets.from_logits(log_probs.float(), k)

    def divergence(codec):
        dense = codec.decode(torch.from_numpy(codec.encode(targets))).densify().double()
        return (log_probs.exp() * (log_probs - dense.log())).sum(dim=1).mean().item()

    half = divergence(Float16Codec(1000, k))
    assert divergence(CompactCodec(1000, k)) - half <= max(bar * half, 5e-4)


@pytest.mark.parametrize('k, num_classes', [(1, 2), (10, 1000), (20, 21841), (100, 1000), (12, 12)])
def test_every_changed_bit_is_an_error(k, num_classes):
    codec = CompactCodec(num_classes, k)
    records = codec.encode(random_targets(k, num_classes, batch=4))
    for record in records:
        for bit in range(8 * codec.width):
            changed = record[None].copy()
            changed[0, bit // 8] ^= 1 << bit % 8
            with pytest.raises(ValueError):
                codec.check(changed)


@pytest.mark.parametrize('k, num_classes', [(10, 1000), (16, 65536), (100, 1000), (100, 21841)])
def test_every_moved_bit_is_an_error(k, num_classes):
    codec = CompactCodec(num_classes, k)
    draw = np.random.default_rng(0)
    for record in codec.encode(random_targets(k, num_classes, batch=20)):
        bits = np.unpackbits(record, bitorder='little')
        for _ in range(100):
            moved = bits.copy()
            moved[draw.choice(np.flatnonzero(bits == 1))] = 0
            moved[draw.choice(np.flatnonzero(bits == 0))] = 1
            with pytest.raises(ValueError):
                codec.check(np.packbits(moved, bitorder='little')[None])


def test_the_order_of_two_makes_every_move_in_a_record_visible():
    for modulus, bits in ((227, 226), (65269, 8 * CompactCodec(65536, 1024).width)):
        powers = [1]
        while len(powers) < bits:
            powers.append(powers[-1] * 2 % modulus)
        assert len(set(powers)) == bits
    for k, num_classes in GRID:
        codec = CompactCodec(num_classes, k)
        assert codec._layout._modulus == 65269 or 8 * codec.width <= 226


def test_records_that_no_encoder_wrote_are_refused_though_their_check_is_right():
    codec = CompactCodec(1000, 100)
    [record] = as_numbers(codec.encode(random_targets(100, 1000, batch=1)))
    # 50 bytes of levels, a string of 212 bits, the 3 low bits of each entry, then the high bits of the levels.
    start, low, high = 400, 400 + 212, 400 + 212 + 300
    assert [codec._layout._fields[name].first_bit for name in ('classes', 'low', 'levels')] == [start, low, high]
    no_classes = record & ~((1 << high) - (1 << start))
    first_places, last_places = (1 << 100) - 1 << start, (1 << 100) - 1 << start + 112
    cases = {
        'has not 100 classes': record ^ 1 << start,
        'names a class beyond 1000': no_classes | last_places | sum(1 << low + 99 + 100 * bit for bit in range(3)),
        'does not name its classes in order': no_classes | first_places | 1 << low,
        'has levels beyond 45': record | 255 | sum(1 << high + 50 * bit for bit in range(3)),
        'has spare bits that are not zero': record | 1 << codec._layout._fields['spare'].first_bit,
    }
    for reason, number in cases.items():
        with pytest.raises(ValueError, match=f'record 0 of 1 {reason}'):
            codec.check(seal(codec, number)[None])
    codec.check(seal(codec, record)[None])

    # As many ones as there should be in all, but one too few in the first record and one too many in the second.
    both = as_numbers(codec.encode(random_targets(100, 1000, batch=2)))
    one = next(bit for bit in range(start, low) if both[0] >> bit & 1)
    zero = next(bit for bit in range(start, low) if not both[1] >> bit & 1)
    with pytest.raises(ValueError, match='record 0 of 2 has not 100 classes'):
        codec.check(np.stack([seal(codec, both[0] ^ 1 << one), seal(codec, both[1] ^ 1 << zero)]))

    codec = CompactCodec(1000, 10)
    records = codec.encode(random_targets(10, 1000, batch=200))
    _, bits, _, _, start = codec._layout._fields['classes']
    with pytest.raises(ValueError, match='has a rank that no 10 classes have'):
        codec.check(seal(codec, as_numbers(records)[0] | (1 << bits) - 1 << start)[None])
    records = records[records[:, -1] < 256 - 227]
    records[:, -1] += 227  # still a multiple
    with pytest.raises(ValueError, match='has a check out of range'):
        codec.check(records)

    codec = CompactCodec(1000, 1)
    [record] = as_numbers(codec.encode(random_targets(1, 1000, batch=1)))
    with pytest.raises(ValueError, match='has levels beyond 22'):
        codec.check(seal(codec, record | 31 << codec._layout._fields['odd'].first_bit)[None])


def test_the_first_bad_record_is_named():
    codec = CompactCodec(1000, 10)
    records = codec.encode(random_targets(10, 1000))
    records[5, 3] ^= 1
    records[9, 0] ^= 1
    with pytest.raises(ValueError, match='record 5 of 24'):
        codec.check(records)
    with pytest.raises(ValueError, match=r'\[B, 18\]'):
        codec.check(records[:, 1:])


@pytest.mark.parametrize('k, num_classes', [(1, 1000), (10, 1000), (100, 1000)])
def test_random_bytes_are_refused(k, num_classes):
    codec = CompactCodec(num_classes, k)
    refused = 0
    for record in np.random.default_rng(0).integers(0, 256, (500, 1, codec.width), dtype=np.uint8):
        try:
            codec.check(record)
        except ValueError:
            refused += 1
            continue
        decoded = codec.decode(torch.from_numpy(record))  # what passes is at least a record
        assert 0 <= decoded.ids.min() and decoded.ids.max() < num_classes and decoded.log_probs.isfinite().all()
    assert refused > 480


def test_the_last_byte_is_never_zero():
    for k, num_classes in ((1, 2), (3, 10), (10, 1000), (17, 1000), (100, 1000), (200, 200)):
        assert CompactCodec(num_classes, k).encode(random_targets(k, num_classes, batch=2000))[:, -1].all()


@pytest.mark.parametrize('k, num_classes', [(1, 2), (3, 10), (10, 1000), (100, 1000), (100, 100), (17, 65536)])
def test_torch_decodes_what_numpy_decodes_without_looking_at_the_data(k, num_classes):
    codec, targets = CompactCodec(num_classes, k), random_targets(k, num_classes)
    records = codec.encode(targets)
    for ours, theirs in zip(codec._decode(torch.from_numpy(records), torch), codec._decode(records, np)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, torch.from_numpy(theirs))
    # The meta device has no data: shapes that depended on them, or a wait for them, would raise.
    decoded = codec.decode(torch.from_numpy(records).to('meta'))
    assert decoded.ids.shape == decoded.log_probs.shape == (len(targets), k)


@pytest.mark.parametrize('k, num_classes', [(10, 1000), (100, 1000)])
def test_no_records_decode_to_no_targets(k, num_classes):
    codec = CompactCodec(num_classes, k)
    records = codec.encode(random_targets(k, num_classes, batch=0))
    assert records.shape == (0, codec.width)
    assert codec.decode(torch.from_numpy(records), check=True).ids.shape == (0, k)


@pytest.mark.parametrize('k, num_classes', [(10, 1000), (100, 1000), (100, 21841)])
def test_a_record_decodes_the_same_in_batches_of_any_size(k, num_classes):
    codec = CompactCodec(num_classes, k)
    records = torch.from_numpy(codec.encode(random_targets(k, num_classes)))
    whole = codec.decode(records)
    for rows in (slice(3, 10), slice(23, None), slice(None, None, 2), slice(3, 10)):
        part = codec.decode(records[rows], check=True)
        assert torch.equal(part.ids, whole.ids[rows]) and torch.equal(part.log_rest, whole.log_rest[rows])
        torch.testing.assert_close(part.log_probs, whole.log_probs[rows])


@pytest.mark.parametrize('k', [3, 10, 100])
def test_a_teacher_that_is_sure_and_one_that_knows_nothing(k):
    codec = CompactCodec(1000, k)
    logits = torch.zeros(3, 1000)
    logits[0, 7] = 1e4  # all mass on one class
    logits[2, :2] = 20  # two that tie
    targets = SparseTargets.from_logits(logits, k)
    targets.log_probs[0, 1:] = -math.inf
    targets.log_rest[0] = -math.inf
    records = codec.encode(targets)
    codec.check(records)
    decoded = codec.decode(torch.from_numpy(records)).densify()
    torch.testing.assert_close(decoded[0, 7], torch.tensor(1.), rtol=0, atol=1e-4)
    torch.testing.assert_close(decoded[1], torch.full((1000,), 1e-3), rtol=1e-5, atol=0)
    torch.testing.assert_close(decoded[2, :2], torch.tensor([0.5, 0.5]), rtol=0, atol=1e-4)


def test_half_precision_targets_and_sliced_records_are_taken():
    codec, targets = CompactCodec(1000, 10), random_targets(10, 1000)
    half = SparseTargets(targets.ids, targets.log_probs.half(), targets.log_rest.half(), 1000)
    records = codec.encode(half)
    wide = np.zeros((len(records), 30), dtype=np.uint8)
    wide[:, 5:23] = records
    codec.check(wide[::2, 5:23])
    decoded = codec.decode(torch.from_numpy(wide)[::2, 5:23])
    assert (decoded.ids == targets.ids.sort(dim=1).values[::2]).all()


@pytest.mark.parametrize('arguments, reason', [
    (dict(num_classes=65537, k=5), '2 to 65,536 classes'), (dict(num_classes=1, k=1), '2 to 65,536 classes'),
    (dict(num_classes=10, k=0), 'k = 0'), (dict(num_classes=10, k=11), 'k = 11'),
    (dict(num_classes=2000, k=1025), 'at most 1,024 entries'),
])
def test_what_does_not_fit_is_said_in_a_sentence(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        CompactCodec(**arguments)


def test_targets_that_are_not_what_the_codec_was_made_for_are_refused():
    codec, targets = CompactCodec(1000, 3), random_targets(3, 1000, batch=2)

    def changed(**fields):
        fields = {**targets.__dict__, **fields}
        return SparseTargets(**fields)

    for reason, other in (
            ('was made for', random_targets(4, 1000)),
            ('row 1 of the targets names a class twice', changed(ids=torch.tensor([[1, 2, 3], [4, 5, 4]]))),
            ('name classes', changed(ids=torch.tensor([[1, 2, 3], [4, 5, 1000]]))),
            ('name classes', changed(ids=torch.tensor([[1, 2, 3], [4, 5, -1]]))),
            ('NaN', changed(log_probs=torch.full((2, 3), math.nan))),
            ('NaN', changed(log_rest=torch.full((2,), math.nan))),
    ):
        with pytest.raises(ValueError, match=reason):
            codec.encode(other)


def read_by_the_format(record, num_classes, k):
    """A record as docs/format.md has it, in whole numbers: [(class, probability)], rest."""
    bits = int.from_bytes(record, 'little')
    n, range_bits, rest_bits = (22, 4, 7) if k <= 16 else (45, 5, 8) if k <= 128 else (90, 5, 8)
    pair_bits = (n * n - 1).bit_length()
    layouts = []
    for low in range(17):
        places = k + (num_classes - k >> low)
        rank_bits = (comb(places, k) - 1).bit_length()
        layouts += [(rank_bits + k * low, low, 0)] if k <= 24 and rank_bits <= 62 else []
        layouts += [(places + k * low, low, 1)]
    total, low, is_string = min(layouts)

    fields = [
        (1, total - k * low), (k, low), (k // 2, pair_bits), (k % 2, (n - 1).bit_length()), (1, range_bits),
        (1, rest_bits if k < num_classes else 0)]
    at, numbers = 0, [[0] * count for count, _ in fields]
    for (count, width), found in zip(fields, numbers):
        for byte in range(width // 8 if count > 1 else 0):
            for i in range(count):
                found[i] |= (bits >> at & 255) << 8 * byte
                at += 8
    for (count, width), found in zip(fields, numbers):
        for bit in range(width // 8 * 8 if count > 1 else 0, width):
            for i in range(count):
                found[i] |= (bits >> at & 1) << bit
                at += 1
    [classes], lows, pairs, odd, [spread], [rest] = numbers

    if is_string:
        ones = [p for p in range(total - k * low) if classes >> p & 1]
    else:
        ones = []
        for j in reversed(range(k)):
            p = j
            while comb(p + 1, j + 1) <= classes:
                p += 1
            classes -= comb(p, j + 1)
            ones.insert(0, p)
    ids = [(p - j << low) + rest_of_gap + j for j, (p, rest_of_gap) in enumerate(zip(ones, lows))]
    levels = [digit for pair in pairs for digit in (pair % n, pair // n)] + odd
    drop = 1 - math.exp(-2 ** (4 * spread / (2 ** range_bits - 1)) / 8)
    weights = [(1 - drop * level / (n - 1)) ** 8 for level in levels]
    rest_mass = 0.
    if k < num_classes:
        top = math.log((num_classes - k) / k)
        rest_mass = 1 / (1 + math.exp(-(top - (top + 10) * rest / (2 ** rest_bits - 1))))
    return [(c, weight / sum(weights) * (1 - rest_mass)) for c, weight in zip(ids, weights)], rest_mass


@pytest.mark.parametrize('k, num_classes', [
    (1, 2), (3, 10), (10, 1000), (10, 65536), (20, 1000), (24, 65536), (50, 50), (100, 1000), (100, 21841), (200, 1000),
])
def test_a_reader_written_from_the_format_reads_the_same(k, num_classes):
    codec, targets = CompactCodec(num_classes, k), random_targets(k, num_classes)
    records = codec.encode(targets)
    decoded = codec.decode(torch.from_numpy(records))
    for row in range(0, len(targets), 5):
        entries, rest = read_by_the_format(records[row].tobytes(), num_classes, k)
        assert [class_id for class_id, _ in entries] == decoded.ids[row].tolist()
        np.testing.assert_allclose([mass for _, mass in entries], decoded.log_probs[row].exp(), rtol=1e-4)
        if decoded.log_rest is not None:
            np.testing.assert_allclose(rest, decoded.log_rest[row].exp(), rtol=1e-4)
