"""The compact codec: what comes back, how small it is, how far from the teacher, and what damaged records do."""

import math
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch

from timm_tinyvit.codec import Float16Codec
from timm_tinyvit.compact import CompactCodec, SmallCompactCodec
from timm_tinyvit.sparse import SparseTargets

# Logits of 60 augmented photographs by timm's tf_efficientnet_lite0 with its ImageNet-1k weights.
TEACHER_LOGITS = Path(__file__).with_name('golden') / 'teacher_logits.npz'
GRID = [
    (k, num_classes) for num_classes in (2, 10, 100, 1000, 21841, 65536) for k in (1, 2, 3, 10, 16, 17, 24, 100, 200)
    if k <= num_classes
]
KINDS = (CompactCodec, SmallCompactCodec)


def random_targets(k, num_classes, batch=24, seed=0, scale=3.):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, num_classes, generator=generator) * torch.linspace(0, scale, batch)[:, None]
    return SparseTargets.from_logits(logits, k)


def padded_targets(k, num_classes, remainder, batch=24):
    """Targets of which so many entries count; what lies beyond is nonsense."""
    targets = random_targets(k, num_classes, batch)
    num_valid = torch.arange(batch) % k + 1 if remainder == 'uniform' else torch.arange(batch) % (k + 1)
    beyond = torch.arange(k) >= num_valid[:, None]
    log_probs = targets.log_probs.masked_fill(beyond, math.nan)
    ids = targets.ids.masked_fill(beyond, -7)
    log_rest = (1 - log_probs.exp().nan_to_num().sum(dim=1)).clamp(min=1e-6).log() if remainder == 'uniform' else None
    return SparseTargets(ids, log_probs, log_rest, num_valid, num_classes, remainder)


def seal(codec, record):
    """Give a record, one number, the check that makes it a multiple of the modulus; written from the format."""
    start, _, bits = codec._fields['check']
    first, modulus = {2: (1, 3), 8: (1, 227), 16: (256, 65269)}[bits]
    record &= (1 << start) - 1
    check = next(c for c in range(first, first + modulus) if (record + (c << start)) % modulus == 0)
    return np.frombuffer((record + (check << start)).to_bytes(codec.width, 'little'), dtype=np.uint8)


def as_numbers(records):
    return [int.from_bytes(record.tobytes(), 'little') for record in records]


@pytest.fixture(scope='module')
def teacher_log_probs():
    return torch.from_numpy(np.load(TEACHER_LOGITS)['logits']).double().log_softmax(dim=1)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('k, num_classes', GRID)
def test_classes_come_back_exactly_and_masses_sum_to_one(kind, k, num_classes):
    codec, targets = kind(num_classes, k), random_targets(k, num_classes)
    records = codec.encode(targets)
    assert records.shape == (len(targets), codec.width) and records.dtype == np.uint8
    codec.check(records)
    decoded = codec.decode(torch.from_numpy(records))
    torch.testing.assert_close(decoded.ids, targets.ids.sort(dim=1).values, rtol=0, atol=0)
    assert decoded.num_valid.tolist() == [k] * len(targets)
    mass = decoded.log_probs.exp().sum(dim=1)
    if k < num_classes:
        mass += decoded.log_rest.exp()
        step = 0.2 if k > 16 else 0.5  # in the logit
        torch.testing.assert_close(
            decoded.log_rest.exp().logit(), targets.log_rest.exp().logit().clamp(min=-10), rtol=0, atol=step)
    else:
        assert decoded.log_rest is None
    torch.testing.assert_close(mass, torch.ones_like(mass))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('k, num_classes', [(10, 1000), (100, 1000)])
def test_a_less_probable_class_never_becomes_the_more_probable_one(kind, k, num_classes):
    codec, targets = kind(num_classes, k), random_targets(k, num_classes)
    decoded = codec.decode(torch.from_numpy(codec.encode(targets)))
    order = targets.ids.argsort(dim=1).argsort(dim=1)
    log_probs = decoded.log_probs.gather(1, order)  # most probable first again
    assert (log_probs.diff(dim=1) <= 0).all()
    assert ((log_probs[:, :1] - log_probs) - (targets.log_probs[:, :1] - targets.log_probs)).abs().max() < 1.5


@pytest.mark.parametrize('kind, k, num_classes, width', [
    (CompactCodec, 10, 1000, 18), (SmallCompactCodec, 10, 1000, 16), (CompactCodec, 100, 1000, 137),
    (CompactCodec, 100, 21841, 194), (CompactCodec, 5, 1000, 11), (CompactCodec, 200, 1000, 263),
])
def test_records_are_as_small_as_promised(kind, k, num_classes, width):
    assert kind(num_classes, k).width == width


@pytest.mark.parametrize('scale', [1, 2], ids=['teacher', 'sharp teacher'])
@pytest.mark.parametrize('kind, k, bar', [
    (CompactCodec, 10, 0.003), (SmallCompactCodec, 10, 0.01), (CompactCodec, 100, 0.01), (CompactCodec, 200, 0.01),
    (CompactCodec, 5, 0.003), (CompactCodec, 20, 0.01), (CompactCodec, 50, 0.01),
])
def test_records_stay_as_close_to_a_real_teacher_as_float16(teacher_log_probs, kind, k, bar, scale):
    log_probs = (teacher_log_probs * scale).log_softmax(dim=1)
    targets = SparseTargets.from_logits(log_probs.float(), k)

    def divergence(codec):
        dense = codec.decode(torch.from_numpy(codec.encode(targets))).densify().double()
        return (log_probs.exp() * (log_probs - dense.log())).sum(dim=1).mean().item()

    half = divergence(Float16Codec(1000, k))
    assert divergence(kind(1000, k)) - half <= max(bar * half, 5e-4)


@pytest.mark.parametrize('kind, k, num_classes, arguments', [
    (CompactCodec, 1, 2, {}), (CompactCodec, 10, 1000, {}), (SmallCompactCodec, 10, 1000, {}),
    (CompactCodec, 20, 21841, {}), (CompactCodec, 100, 1000, {}), (CompactCodec, 12, 12, {}),
    (CompactCodec, 12, 300, dict(remainder='none')), (CompactCodec, 30, 300, dict(counted=True)),
])
def test_every_changed_bit_is_an_error(kind, k, num_classes, arguments):
    codec = kind(num_classes, k, **arguments)
    if codec.counted:
        targets = padded_targets(k, num_classes, codec.remainder, batch=4)
    else:
        targets = random_targets(k, num_classes, batch=4)
    records = codec.encode(targets)
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
        assert codec._modulus == 65269 or 8 * codec.width <= 226


def test_records_that_no_encoder_wrote_are_refused_though_their_check_is_right():
    codec = CompactCodec(1000, 100)
    [record] = as_numbers(codec.encode(random_targets(100, 1000, batch=1)))
    start, count, width = codec._fields['levels']
    no_classes = record >> 512 << 512  # without the string of 212 bits and the 3 low bits of each entry
    first_places, last_places = (1 << 100) - 1, (1 << 100) - 1 << 112
    cases = {
        'has not 100 classes': record ^ 1,
        'names a class beyond 1000': no_classes | last_places | sum(1 << 212 + 99 + 100 * bit for bit in range(3)),
        'does not name its classes in order': no_classes | first_places | 1 << 212,
        'has levels beyond 45': record | sum(1 << start + bit * count for bit in range(width)),
        'has spare bits that are not zero': record | 1 << codec._fields['spare'][0],
    }
    for reason, number in cases.items():
        with pytest.raises(ValueError, match=f'record 0 of 1 {reason}'):
            codec.check(seal(codec, number)[None])
    codec.check(seal(codec, record)[None])

    codec = CompactCodec(1000, 10)
    records = codec.encode(random_targets(10, 1000, batch=200))
    with pytest.raises(ValueError, match='has a rank that no 10 classes have'):
        codec.check(seal(codec, as_numbers(records)[0] | (1 << codec._fields['classes'][2]) - 1)[None])
    records = records[records[:, -1] < 256 - 227]
    records[:, -1] += 227  # still a multiple
    with pytest.raises(ValueError, match='has a check out of range'):
        codec.check(records)


def test_padding_that_is_none_is_refused():
    codec = CompactCodec(300, 4, 'none')
    [record] = as_numbers(codec.encode(padded_targets(4, 300, 'none', batch=1)))  # no entry counts
    start = codec._fields['valid'][0]
    with pytest.raises(ValueError, match='0 to 5 valid entries, not 4'):
        targets = padded_targets(4, 300, 'none')
        codec.encode(SparseTargets(targets.ids, targets.log_probs, None, targets.num_valid // 4 * 5, 300, 'none'))
    with pytest.raises(ValueError, match='has more than 4 entries'):
        codec.check(seal(codec, record | 7 << start)[None])
    with pytest.raises(ValueError, match='has padding that is none'):
        codec.check(seal(codec, record + 5)[None])
    with pytest.raises(ValueError, match='names a class beyond 300'):
        codec.check(seal(codec, record + comb(303, 4) - 1 | 4 << start)[None])


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


@pytest.mark.parametrize('kind', KINDS)
def test_the_last_byte_is_never_zero(kind):
    for k, num_classes in ((1, 2), (3, 10), (10, 1000), (17, 1000), (100, 1000), (200, 200)):
        assert kind(num_classes, k).encode(random_targets(k, num_classes, batch=2000))[:, -1].all()


@pytest.mark.parametrize('kind, k, num_classes, arguments', [
    *((kind, k, num_classes, {}) for kind in KINDS for k, num_classes in ((1, 2), (10, 1000), (100, 1000), (100, 100))),
    (CompactCodec, 12, 300, dict(remainder='none')), (CompactCodec, 30, 300, dict(counted=True)),
])
def test_torch_decodes_what_numpy_decodes_without_looking_at_the_data(kind, k, num_classes, arguments):
    codec = kind(num_classes, k, **arguments)
    targets = (
        padded_targets(k, num_classes, codec.remainder) if codec.counted else random_targets(k, num_classes))
    records = codec.encode(targets)
    for ours, theirs in zip(codec._decode(torch.from_numpy(records), torch), codec._decode(records, np)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, torch.from_numpy(theirs))
    # The meta device has no data: shapes that depended on them, or a wait for them, would raise.
    decoded = codec.decode(torch.from_numpy(records).to('meta'))
    assert decoded.ids.shape == decoded.log_probs.shape == (len(targets), k)


@pytest.mark.parametrize('k, num_classes, remainder', [(10, 1000, 'uniform'), (100, 1000, 'uniform'), (6, 50, 'none')])
def test_no_records_decode_to_no_targets(k, num_classes, remainder):
    codec = CompactCodec(num_classes, k, remainder)
    targets = SparseTargets(
        torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k), torch.zeros(0) if remainder == 'uniform' else None,
        torch.zeros(0, dtype=torch.int64), num_classes, remainder)
    records = codec.encode(targets)
    assert records.shape == (0, codec.width)
    codec.check(records)
    assert codec.decode(torch.from_numpy(records)).ids.shape == (0, k)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('k', [3, 10, 100])
def test_a_teacher_that_is_sure_and_one_that_knows_nothing(kind, k):
    codec = kind(1000, k)
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


@pytest.mark.parametrize('remainder', ['uniform', 'none'])
@pytest.mark.parametrize('k, num_classes', [(1, 2), (4, 300), (16, 17), (40, 1000), (200, 21841)])
def test_fewer_entries_than_k_come_back(k, num_classes, remainder):
    codec = CompactCodec(num_classes, k, remainder, counted=True)
    targets = padded_targets(k, num_classes, remainder)
    records = codec.encode(targets)
    codec.check(records)
    decoded = codec.decode(torch.from_numpy(records))
    assert decoded.num_valid.tolist() == targets.num_valid.tolist()
    assert decoded.ids.min() >= 0 and decoded.ids.max() < num_classes
    for row, count in enumerate(targets.num_valid.tolist()):
        assert decoded.ids[row, :count].tolist() == sorted(targets.ids[row, :count].tolist())
        order = targets.ids[row, :count].argsort()
        torch.testing.assert_close(
            decoded.log_probs[row, :count].exp(), targets.log_probs[row, :count].exp()[order], rtol=0.25, atol=1e-3)
    if codec.has_rest:
        torch.testing.assert_close(decoded.log_rest.exp(), targets.log_rest.exp(), rtol=0.1, atol=1e-3)
        assert torch.allclose(decoded.densify().sum(dim=1), torch.ones(len(targets)))


def test_an_estimate_keeps_its_whole_mass():
    log_probs = torch.tensor([[0.3, -1., -3.], [-2., -2., -2.]])
    targets = SparseTargets(
        torch.tensor([[5, 2, 9], [0, 1, 2]]), log_probs, None, torch.tensor([3, 2]), 10, remainder='none')
    codec = CompactCodec(10, 3, 'none')
    decoded = codec.decode(torch.from_numpy(codec.encode(targets)))
    mass = torch.where(targets.valid, log_probs.exp(), 0.).sum(dim=1)
    kept = torch.where(decoded.valid, decoded.log_probs.exp(), 0.).sum(dim=1)
    torch.testing.assert_close(kept, mass, rtol=5e-4, atol=0)


def test_more_levels_are_closer_to_the_teacher(teacher_log_probs):
    targets = SparseTargets.from_logits(teacher_log_probs.float(), 10)
    errors = []
    for levels in (2, 8, 24, 100, 256):
        codec = CompactCodec(1000, 10, levels=levels)
        records = codec.encode(targets)
        codec.check(records)
        errors.append((codec.decode(torch.from_numpy(records)).densify() - targets.densify()).abs().sum())
    assert errors == sorted(errors, reverse=True)


def test_half_precision_targets_and_sliced_records_are_taken():
    codec, targets = CompactCodec(1000, 10), random_targets(10, 1000)
    half = SparseTargets(
        targets.ids, targets.log_probs.half(), targets.log_rest.half(), targets.num_valid, 1000)
    records = codec.encode(half)
    wide = np.zeros((len(records), 30), dtype=np.uint8)
    wide[:, 5:23] = records
    codec.check(wide[::2, 5:23])
    decoded = codec.decode(torch.from_numpy(wide)[::2, 5:23])
    assert (decoded.ids == targets.ids.sort(dim=1).values[::2]).all()


@pytest.mark.parametrize('arguments, reason', [
    (dict(num_classes=65537, k=5), '2 to 65,536 classes'), (dict(num_classes=1, k=1), '2 to 65,536 classes'),
    (dict(num_classes=10, k=0), 'k = 0'), (dict(num_classes=10, k=11), 'k = 11'),
    (dict(num_classes=2000, k=1025), 'at most 1,024 entries'), (dict(num_classes=10, k=3, levels=1), '2 to 256 levels'),
    (dict(num_classes=10, k=3, levels=257), '2 to 256 levels'),
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
            ('counted=True', changed(num_valid=torch.tensor([3, 2]))),
            ('NaN', changed(log_probs=torch.full((2, 3), math.nan))),
            ('NaN', changed(log_rest=torch.full((2,), math.nan))),
    ):
        with pytest.raises(ValueError, match=reason):
            codec.encode(other)


def read_by_the_format(record, num_classes, k, levels, remainder='uniform', counted=False, small=False):
    """A record as the format in the module's docstring reads, in whole numbers: [(class, probability)], rest."""
    bits = int.from_bytes(record, 'little')
    at = 0

    def numbers(count, width):
        nonlocal at
        planes = [[bits >> at + b * count + i & 1 for i in range(count)] for b in range(width)]
        at += count * width
        return [sum(plane[i] << b for b, plane in enumerate(planes)) for i in range(count)]

    most = num_classes - (1 if counted else k)
    layouts = []
    for low in range(17):
        places = k + (most >> low)
        rank_bits = (comb(places, k) - 1).bit_length()
        layouts += [(rank_bits + k * low, low, 0)] if k <= 24 and rank_bits <= 62 else []
        layouts += [(places + k * low, low, 1)]
    total, low, is_string = min(layouts)
    [classes] = numbers(1, total - k * low)
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
    ids = [(p - j << low) + rest + j for j, (p, rest) in enumerate(zip(ones, numbers(k, low)))]
    options = [(-(-k // d) * (levels ** d - 1).bit_length(), d) for d in range(1, 6) if levels ** d <= 1 << 30]
    total, digits = min(options)
    group = -(-k // digits)
    packed = numbers(group, total // group)
    level = [packed[j % group] // levels ** (j // group) % levels for j in range(k)]
    range_bits, rest_bits = (5, 8) if k > 16 else (5, 6) if small else (4, 7)
    [spread] = numbers(1, range_bits)
    drop = 1 - math.exp(-2 ** (4 * spread / (2 ** range_bits - 1)) / 8)
    weights = [(1 - drop * v / (levels - 1)) ** 8 for v in level]
    rest = 0.
    if remainder == 'none':
        mass = math.exp(numbers(1, 16)[0] / 2048 - 16)
    elif k < num_classes:
        top = math.log(most if counted else most / k)
        rest = 1 / (1 + math.exp(-(top - (top + 10) * numbers(1, rest_bits)[0] / (2 ** rest_bits - 1))))
        mass = 1 - rest
    else:
        mass = 1.
    count = numbers(1, k.bit_length())[0] if counted else k
    norm = sum(weights[:count])
    return [(ids[j], weights[j] / norm * mass) for j in range(count)], rest


@pytest.mark.parametrize('kind, k, num_classes, arguments', [
    *((kind, k, num_classes, {}) for kind in KINDS for k, num_classes in (
        (1, 2), (3, 10), (10, 1000), (20, 1000), (24, 65536), (50, 50), (100, 1000), (100, 21841), (200, 1000))),
    (CompactCodec, 12, 300, dict(remainder='none')), (CompactCodec, 30, 300, dict(counted=True)),
])
def test_a_reader_written_from_the_format_reads_the_same(kind, k, num_classes, arguments):
    codec = kind(num_classes, k, **arguments)
    targets = (
        padded_targets(k, num_classes, codec.remainder) if codec.counted else random_targets(k, num_classes))
    records = codec.encode(targets)
    decoded = codec.decode(torch.from_numpy(records))
    for row in range(0, len(targets), 5):
        entries, rest = read_by_the_format(
            records[row].tobytes(), num_classes, k, codec.levels, codec.remainder, codec.counted, kind.is_small)
        count = decoded.num_valid[row]
        assert [class_id for class_id, _ in entries] == decoded.ids[row, :count].tolist()
        np.testing.assert_allclose([mass for _, mass in entries], decoded.log_probs[row, :count].exp(), rtol=1e-4)
        if decoded.log_rest is not None:
            np.testing.assert_allclose(rest, decoded.log_rest[row].exp(), rtol=1e-4)
