"""Records: what a codec writes it reads again, and what is damaged it sees."""

import numpy as np
import pytest
import torch

from timm_tinyvit.targets.codecs import codecs, create_codec
from timm_tinyvit.targets.float16 import Float16Codec
from timm_tinyvit.targets.sparse import SparseTargets, sparse_soft_target_cross_entropy


def teacher_logits(rows, classes, seed=0):
    """Logits as a trained teacher gives: most classes in a bell of noise, a few related ones far above it."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator)
    peaks = torch.randint(classes, (rows, 8), generator=generator)
    return logits.scatter_add(1, peaks, 12 * torch.rand(rows, 8, generator=generator))


def round_trip(targets):
    codec = create_codec('float16', targets.num_classes, targets.k)
    records = codec.encode(targets)
    codec.check(records)
    return codec, records, codec.decode(torch.from_numpy(records))


@pytest.mark.parametrize('classes, k', [(10, 1), (10, 10), (1000, 10), (1000, 100), (21_841, 7), (70_000, 5)])
def test_ids_come_back_exactly_and_log_probabilities_within_half_precision(classes, k):
    targets = SparseTargets.from_logits(teacher_logits(64, classes), k)
    codec, records, decoded = round_trip(targets)
    assert records.shape == (64, codec.width) and records.dtype == np.uint8
    assert codec.width == (4 if classes <= 65_536 else 6) * k + (6 if k < classes else 2)
    assert torch.equal(decoded.ids, targets.ids) and decoded.ids.dtype == torch.int64
    # Half precision keeps eleven binary digits.
    torch.testing.assert_close(decoded.log_probs, targets.log_probs, rtol=2 ** -11, atol=2 ** -25)
    if k == classes:
        assert targets.log_rest is None and decoded.log_rest is None
    else:
        assert torch.equal(decoded.log_rest, targets.log_rest)
    assert decoded.num_classes == classes


def test_the_stored_target_is_the_teachers_to_a_thousandth_and_sums_to_one():
    targets = SparseTargets.from_logits(teacher_logits(64, 1000), 10)
    _, _, decoded = round_trip(targets)
    torch.testing.assert_close(decoded.densify().sum(1), torch.ones(64))
    kl = (targets.densify() * (targets.densify().log() - decoded.densify().log())).sum(1)
    assert kl.abs().max() < 1e-5
    student = teacher_logits(64, 1000, seed=1)
    torch.testing.assert_close(
        sparse_soft_target_cross_entropy(student, decoded), sparse_soft_target_cross_entropy(student, targets),
        rtol=1e-3, atol=0)


@pytest.mark.parametrize('classes', [40_000, 65_536, 65_537, 3_000_000])
def test_ids_beyond_the_sign_bit_stay_positive(classes):
    ids = torch.tensor([[classes - 1, 32_768, 32_767, 0]])
    targets = SparseTargets(
        ids=ids, log_probs=torch.full((1, 4), -2.), log_rest=torch.tensor([-1.]), num_classes=classes)
    codec, _, decoded = round_trip(targets)
    assert codec.width == 4 * (2 if classes <= 65_536 else 4) + 8 + 6
    assert torch.equal(decoded.ids, ids)


def test_classes_without_any_mass_are_held():
    logits = torch.zeros(2, 6)
    logits[:, 0] = 1e6
    targets = SparseTargets.from_logits(logits, 3)
    _, _, decoded = round_trip(targets)
    assert torch.isfinite(decoded.log_probs).all()
    assert torch.equal(decoded.densify(), torch.eye(6)[[0, 0]])


def test_the_layout_is_the_one_that_the_docstring_names():
    targets = SparseTargets(
        ids=torch.tensor([[258, 3]]), log_probs=torch.tensor([[-0.5, -2.]]), log_rest=torch.tensor([-3.]),
        num_classes=1000)
    record = Float16Codec(1000, 2).encode(targets)[0].tobytes()
    body = b'\x02\x01\x03\x00' + b'\x00\xb8\x00\xc0' + b'\x00\x00\x40\xc0'
    assert record == body + bytes([sum(body) % 256, 1 + sum(body) % 255])


def test_the_last_byte_is_never_zero():
    # Enough records that every sum of bytes occurs.
    targets = SparseTargets.from_logits(teacher_logits(4000, 50), 4)
    _, records, _ = round_trip(targets)
    assert len(np.unique(records[:, -2])) == 256
    assert np.array_equal(np.unique(records[:, -1]), np.arange(1, 256))


@pytest.mark.parametrize('classes, k', [(1000, 3), (70_000, 3)])
def test_every_other_value_of_every_byte_is_seen(classes, k, refused):
    targets = SparseTargets.from_logits(teacher_logits(3, classes), k)
    codec, records, _ = round_trip(targets)
    # Among them is a zero: 0 and 255 are equal modulo 255.
    assert (records[:, :-2] == 0).any()
    for row in range(3):
        others = np.setdiff1d(np.arange(codec.width * 256), np.arange(codec.width) * 256 + records[row])
        for damage in others.tolist():
            damaged = records[row:row + 1].copy()
            damaged[0, damage // 256] = damage % 256
            with pytest.raises(ValueError):
                codec.check(damaged)
    records[2, 0] ^= 255
    with refused('record 2 of 3', error=ValueError):
        codec.check(records)


def test_records_of_zeros_and_of_ones_are_seen(refused):
    codec = create_codec('float16', 1000, 3)
    for records in (np.zeros((2, codec.width), np.uint8), np.full((2, codec.width), 255, np.uint8)):
        with refused('record 0 of 2', error=ValueError):
            codec.check(records)


def test_a_class_that_the_teacher_does_not_have_is_seen(refused):
    wide = create_codec('float16', 1000, 4)
    records = wide.encode(SparseTargets.from_logits(teacher_logits(20, 1000), 4))
    wide.check(records)
    narrow = create_codec('float16', 10, 4)
    with refused('record 0 of 20', 'of 10', error=ValueError):
        narrow.check(records)


def test_records_of_another_width_and_targets_of_another_kind_are_refused(refused):
    targets = SparseTargets.from_logits(teacher_logits(3, 50), 4)
    codec = create_codec('float16', 50, 4)
    for records in (np.zeros((3, codec.width - 1), np.uint8), np.zeros(codec.width, np.uint8)):
        with refused(str(codec.width), error=ValueError):
            codec.check(records)
    for other in (create_codec('float16', 50, 5), create_codec('float16', 51, 4)):
        with refused('codec was made for', error=ValueError):
            other.encode(targets)


def test_records_decode_the_same_wherever_they_lie_in_memory():
    for classes, k in ((1000, 3), (70_000, 3)):
        targets = SparseTargets.from_logits(teacher_logits(9, classes), k)
        codec, records, decoded = round_trip(targets)
        whole = torch.from_numpy(records)
        wider = torch.zeros(9, codec.width + 5, dtype=torch.uint8)
        wider[:, 3:-2] = whole
        slices = {
            'one row': (whole[:1], [0]), 'an odd row': (whole[3:4], [3]), 'every other': (whole[::2], [0, 2, 4, 6, 8]),
            'from an odd offset': (whole[1:], list(range(1, 9))), 'columns': (wider[:, 3:-2], list(range(9))),
            'transposed': (whole.T.contiguous().T, list(range(9))), 'none': (whole[:0], []),
        }
        for name, (part, rows) in slices.items():
            found = codec.decode(part)
            for field in ('ids', 'log_probs', 'log_rest'):
                assert torch.equal(getattr(found, field), getattr(decoded, field)[rows]), name


def test_encoding_and_decoding_again_changes_nothing():
    targets = SparseTargets.from_logits(teacher_logits(32, 1000), 10)
    codec, records, decoded = round_trip(targets)
    assert np.array_equal(codec.encode(decoded), records)


@pytest.mark.parametrize('name', codecs())
def test_decoding_can_check_on_the_way(name, refused):
    targets = SparseTargets.from_logits(teacher_logits(16, 1000), 20)
    codec = create_codec(name, 1000, 20)
    records = codec.encode(targets)
    plain, checked = (codec.decode(torch.from_numpy(records), check=check) for check in (False, True))
    for field in ('ids', 'log_probs', 'log_rest'):
        assert torch.equal(getattr(plain, field), getattr(checked, field))
    records[9, 3] ^= 4
    with refused('record 9 of 16', error=ValueError):
        codec.check(records)
    with refused('record 9 of 16', error=ValueError):
        codec.decode(torch.from_numpy(records), check=True)
    with refused(str(codec.width), error=ValueError):
        codec.decode(torch.from_numpy(records[:, 1:]), check=True)


def test_unknown_codecs_and_impossible_k_are_refused(refused):
    assert all(name == codec.name for name, codec in codecs().items())
    with refused("'zip'", 'float16', error=ValueError):
        create_codec('zip', 10, 2)
    for k in (0, 11):
        with refused(f'k = {k}', '10 classes', error=ValueError):
            create_codec('float16', 10, k)
    with refused('65,535', error=ValueError):
        create_codec('float16', 70_000, 65_536)
