"""Sparsifiers: which classes are kept of a teacher's answer, and what a student learns from them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from timm_tinyvit import save_logits
from timm_tinyvit.data.opening import open_store
from timm_tinyvit.models.saving import export_model
from timm_tinyvit.targets.codecs import codecs, create_codec
from timm_tinyvit.targets.sparse import SparseTargets, sparse_soft_target_cross_entropy
from timm_tinyvit.targets.sparsifier import _split_mix, _uniform, create_sparsifier, sparsifiers
from timm_tinyvit.targets.variable import ladder

# Logits of 60 augmented photographs by timm's tf_efficientnet_lite0 with its ImageNet-1k weights.
TEACHER_LOGITS = Path(__file__).parents[1] / 'golden' / 'teacher_logits.npz'


@pytest.fixture(scope='module')
def teacher_logits():
    return torch.from_numpy(np.load(TEACHER_LOGITS)['logits']).float()


def gradient(student, targets):
    student = student.clone().requires_grad_()
    sparse_soft_target_cross_entropy(student, targets, reduction='sum').backward()
    return student.grad


def test_the_gradient_of_samples_is_the_dense_one_on_average_and_that_of_top_k_is_not(teacher_logits):
    k, num_draws = 8, 20_000
    logits = teacher_logits[7]
    probs = logits.double().softmax(0)
    student = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = student.softmax(0) - probs

    total, squares = torch.zeros(2, 1000, dtype=torch.float64)
    sample = create_sparsifier('sample', k)
    for start in range(0, num_draws, 2000):
        targets = sample(logits.expand(2000, -1), 0, range(start, start + 2000))
        part = gradient(student.expand(2000, -1), targets)
        total, squares = total + part.sum(0), squares + part.square().sum(0)
    mean = total / num_draws
    # The variance of a share of k draws is known, and is what the gradients have.
    error = (probs * (1 - probs) / (k * num_draws)).sqrt()
    likely = probs > 1e-3
    torch.testing.assert_close(
        (squares / num_draws - mean.square()).div(num_draws).sqrt()[likely], error[likely], rtol=0.2, atol=0)
    z = (mean - dense) / error
    assert z[likely].abs().max() < 4.5 and 0.8 < z[likely].square().mean() < 1.25

    top = gradient(student[None], create_sparsifier('topk', k)(logits[None], 0, [0]))[0]
    assert ((top - dense) / error)[likely].square().mean() > 100
    assert (top - dense).abs().sum() > 10 * (mean - dense).abs().sum()


def test_samples_are_a_function_of_logits_seed_epoch_and_index_alone(teacher_logits):
    sample = create_sparsifier('sample', 50, seed=3)
    whole = sample(teacher_logits, 2, range(100, 160))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    for rows in (order[:7], order[7:], order[:1]):
        part = sample(teacher_logits[rows], 2, (100 + rows).tolist())
        for field in ('ids', 'log_probs', 'num_valid'):
            assert torch.equal(getattr(part, field), getattr(whole, field)[rows])
    mixed = sample(teacher_logits, [2, 7] * 30, range(100, 160))
    assert torch.equal(mixed.densify()[::2], whole.densify()[::2])
    assert torch.equal(mixed.densify()[1::2], sample(teacher_logits, 7, range(100, 160)).densify()[1::2])
    others = [
        sample(teacher_logits, 3, range(100, 160)), sample(teacher_logits, 2, range(101, 161)),
        create_sparsifier('sample', 50, seed=4)(teacher_logits, 2, range(100, 160)),
        # Seed, epoch and index must not stand in for one another.
        create_sparsifier('sample', 50, seed=2)(teacher_logits, 3, range(100, 160)),
    ]
    for other in others:
        assert (other.densify() != whole.densify()).any(dim=1).float().mean() > 0.9
    assert len({tuple(sample(teacher_logits[:1], 0, [index]).densify()[0].tolist()) for index in range(50)}) == 50


def test_the_random_numbers_are_those_of_the_published_generator():
    # The first outputs of SplitMix64 from the state 1234567.
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert _split_mix(torch.tensor([1234567]), 5)[0].numpy().view(np.uint64).tolist() == published
    # With all the digits of float64, so that none is rounded up to 1.
    assert _uniform(torch.tensor([1234567]), 5)[0].tolist() == [(number >> 11) / 2 ** 53 for number in published]


def test_samples_are_shares_of_draws_in_class_order(teacher_logits):
    for k, num_classes in ((1, 1000), (100, 1000), (30, 4)):
        targets = create_sparsifier('sample', k, seed=-1)(teacher_logits[:, :num_classes], 0, range(60))
        assert targets.k == min(k, num_classes) and targets.remainder == 'none' and targets.log_rest is None
        counts = targets.log_probs.exp() * k
        torch.testing.assert_close(counts, counts.round(), rtol=1e-5, atol=0)
        torch.testing.assert_close((counts * targets.valid).sum(1), torch.full((60,), float(k)))
        assert (targets.ids.diff(dim=1) > 0)[targets.valid[:, 1:]].all()
        torch.testing.assert_close(targets.densify().sum(1), torch.ones(60))


def test_a_class_without_mass_is_never_drawn():
    logits = torch.tensor([[-1e4, 0., -1e4, 0., -1e4]]).expand(200, -1)
    targets = create_sparsifier('sample', 20)(logits, 0, range(200))
    assert set(targets.ids[targets.valid].tolist()) == {1, 3}


@pytest.mark.parametrize('top_p', [0.3, 0.9, 0.99, 1.0])
@pytest.mark.parametrize('k, num_classes', [(100, 1000), (10, 1000), (40, 40)])
def test_a_nucleus_covers_its_mass_or_has_k_classes(teacher_logits, top_p, k, num_classes):
    logits = teacher_logits[:, :num_classes] * 2
    targets = create_sparsifier('nucleus', k, top_p)(logits, 0, range(60))
    sizes = ladder(num_classes, k)
    assert sizes[-1] == k and set(targets.num_valid.tolist()) <= set(sizes)
    if top_p < 1:
        assert len(set(targets.num_valid.tolist())) > 1
    probs = logits.double().softmax(1).sort(dim=1, descending=True).values
    for row, size in zip(probs, targets.num_valid.tolist()):
        assert row[:size].sum() >= top_p - 1e-6 or size == k
        smaller = max((step for step in sizes if step < size), default=0)
        assert row[:smaller].sum() < top_p  # the next size down is too small
    kept = torch.where(targets.valid, targets.log_probs.exp(), 0.)
    torch.testing.assert_close(kept.sum(1) + targets.log_rest.exp(), torch.ones(60))
    rest = torch.stack([row[size:].sum() for row, size in zip(probs, targets.num_valid.tolist())])
    torch.testing.assert_close(targets.log_rest.exp().double(), rest, rtol=1e-4, atol=1e-30)
    torch.testing.assert_close(targets.densify().sum(1), torch.ones(60))


@pytest.mark.parametrize('temperature', [1., 3.])
@pytest.mark.parametrize('name', sparsifiers())
def test_the_loss_is_the_dense_loss_of_what_every_sparsifier_keeps(teacher_logits, name, temperature):
    for k, num_classes in ((20, 1000), (12, 12)):
        targets = create_sparsifier(name, k, top_p=0.8)(teacher_logits[:, :num_classes], 0, range(60))
        student = torch.randn(60, num_classes, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss = sparse_soft_target_cross_entropy(student, targets, temperature)
        loss.backward()
        grad, student.grad = student.grad, None
        dense = -(targets.densify(temperature) * F.log_softmax(student / temperature, dim=1)).sum(1).mean()
        dense.backward()
        torch.testing.assert_close(loss, dense, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, student.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('sparsifier', sparsifiers())
@pytest.mark.parametrize('codec', codecs())
def test_a_codec_holds_what_a_sparsifier_keeps_or_says_so_at_once(teacher_logits, sparsifier, codec, refused):
    kept = {
        'topk': {'compact', 'compact-small', 'compact-variable', 'float16'}, 'nucleus': {'compact-variable', 'float16'},
        'sample': {'draws', 'float16'}}
    for k, num_classes in ((20, 1000), (7, 7)):
        keep = create_sparsifier(sparsifier, k, top_p=0.9)
        assert keep.default_codec in kept[sparsifier]
        if codec not in kept[sparsifier]:
            with refused('use', error=ValueError):
                keep.check_codec(create_codec(codec, num_classes, k, keep.remainder))
            continue
        holder = create_codec(codec, num_classes, k, keep.remainder)
        keep.check_codec(holder)
        targets = keep(teacher_logits[:, :num_classes], 0, range(60))
        decoded = holder.decode(torch.from_numpy(holder.encode(targets)), check=True)
        assert torch.equal(decoded.num_valid, targets.num_valid)
        torch.testing.assert_close(decoded.densify(), targets.densify(), rtol=0.25, atol=1e-2)
        if codec in ('float16', 'draws'):
            torch.testing.assert_close(decoded.densify(), targets.densify(), rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize('name, k, key', [('nucleus', 8, ''), ('sample', 30, ''), ('sample', 30, 'name')])
def test_a_store_is_filled_with_what_the_teacher_says_again(name, k, key, tmp_path, capsys, fashion):
    export_model(tmp_path / 'teacher', timm.create_model('test_resnet', num_classes=10))
    rows = fashion.select(range(50))
    rows.add_column('name', [f'image {number}' for number in range(50)]).save_to_disk(tmp_path / 'data')
    common = [
        '--dataset', str(tmp_path / 'data'), '--key', key, '--img-size', '32', '-j', '0', '--shard-size', '32',
        '--teacher', str(tmp_path / 'teacher'), '--logits', str(tmp_path / 'logits'), '--sparsifier', name,
        '--topk', str(k), '--top-p', '0.9']
    save_logits.main([*common, '--epochs', '2'])
    save_logits.main([*common, '--check'])
    assert ', 0.000% other ids, ' in capsys.readouterr().out
    store, _ = open_store(tmp_path / 'logits', {})
    assert store.codec.name == create_sparsifier(name, k).default_codec
    targets = store.codec.decode(torch.from_numpy(store.read(1, range(50))), check=True)
    torch.testing.assert_close(targets.densify().sum(1), torch.ones(50))


def test_impossible_settings_are_refused(teacher_logits, refused):
    for name in sparsifiers():
        with refused('k = 0', error=ValueError):
            create_sparsifier(name, 0)
    for top_p in (0., -1., 1.5, float('nan')):
        with refused('top_p', str(top_p), error=ValueError):
            create_sparsifier('nucleus', 5, top_p)
    with refused('1,024', error=ValueError):
        create_sparsifier('nucleus', 1025, 0.5)
    with refused("'best'", 'nucleus', 'sample', 'topk', error=ValueError):
        create_sparsifier('best', 5)
    broken = teacher_logits.clone()
    broken[3, 5] = torch.nan
    for name in sparsifiers():
        with refused('1 of 60 rows', error=ValueError):
            create_sparsifier(name, 5)(broken, 0, range(60))
    with refused('k = 1001', error=ValueError):
        create_sparsifier('nucleus', 1001, 0.5)(teacher_logits, 0, range(60))


def test_padding_says_nothing(teacher_logits):
    for name in ('nucleus', 'sample'):
        targets = create_sparsifier(name, 20, top_p=0.5)(teacher_logits, 0, range(60))
        assert (targets.num_valid < 20).any()
        other = replace(
            targets, ids=targets.ids.where(targets.valid, 5), log_probs=targets.log_probs.where(targets.valid, -3.))
        assert isinstance(other, SparseTargets) and torch.equal(other.densify(), targets.densify())
