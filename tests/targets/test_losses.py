"""Losses from sparse targets, against their papers' formulas on dense targets in float64."""

import pytest
import torch
from torch.nn import functional as F

from timm_tinyvit.targets.losses import DISTILL_LOSSES, DistillLoss
from timm_tinyvit.targets.sparse import SparseTargets, sparse_soft_target_cross_entropy

B, C = 9, 20
SETTINGS = [
    DistillLoss(name, temperature, standardize)
    for name in DISTILL_LOSSES for temperature in (1., 4.) for standardize in (False, True)]


def make(k, dtype=torch.float64, spread=3.):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(B, C, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    # Labels that are listed, and labels that are not.
    labels = torch.arange(B) % C
    return student.to(dtype), SparseTargets.from_logits(teacher.to(dtype), k), labels


def dense_kl(p, q):
    return (p * (p.log() - q.log())).sum(1)


def dense_dkd(p, q, labels, beta=8.):
    mask = F.one_hot(labels, p.shape[1]).bool()
    pairs = [torch.stack([values[mask], values.masked_fill(mask, 0).sum(1)], 1) for values in (p, q)]
    others = [values[~mask].view(len(p), -1) for values in (p, q)]
    others = [values / values.sum(1, keepdim=True) for values in others]
    return (dense_kl(*pairs) + beta * dense_kl(*others)).mean()


def dense_dist(p, q, labels):
    def correlation(a, b):
        # Something that never changes, but for rounding, has none.
        return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1, eps=1e-8).mean()
    return 2 - correlation(p, q) - correlation(p.T, q.T)


DENSE = {
    'cross-entropy': lambda p, q, labels: -(p * q.log()).sum(1).mean(),
    'reverse-kl': lambda p, q, labels: dense_kl(q, p).mean(),
    'dkd': dense_dkd,
    'dist': dense_dist,
}


def dense(loss, logits, targets, labels):
    """The loss on the dense target."""
    teacher = targets.densify().double().log()
    logits = logits.double()
    if loss.standardize:
        teacher, logits = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (teacher, logits))
    p, q = ((x / loss.temperature).softmax(1) for x in (teacher, logits))
    return DENSE[loss.name](p, q, labels)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('loss, k', [
    (loss, k) for loss in SETTINGS for k in (1, 5, C - 1, C)
    # There a standardised teacher says the same of all views of most classes, and their correlation is but rounding.
    if (loss.name, loss.standardize, k) != ('dist', True, 1)], ids=str)
def test_every_loss_and_its_gradient_is_that_of_the_dense_target(loss, k, dtype):
    logits, targets, labels = make(k, dtype)
    values, gradients = [], []
    for function in (loss, lambda *args: dense(loss, *args)):
        leaf = logits.clone().requires_grad_()
        value = function(leaf, targets, labels)
        value.backward()
        values.append(value.double())
        gradients.append(leaf.grad.double())
    tolerance = dict(rtol=1e-9, atol=1e-10) if dtype == torch.float64 else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*values, **tolerance)
    torch.testing.assert_close(*gradients, **tolerance)


@pytest.mark.parametrize('k', [1, 5, C - 1, C])
@pytest.mark.parametrize('name', ['cross-entropy', 'reverse-kl'])
def test_the_ghost_is_one_class_of_all_that_is_not_listed(name, k):
    logits, targets, labels = make(k)
    loss = DistillLoss(name, 2., remainder='ghost')
    p, q = targets.densify(2.), (logits / 2).softmax(1)
    reduced = []
    for values in (p, q):
        listed = values.gather(1, targets.ids)
        outside = values.scatter(1, targets.ids, 0.).sum(1, keepdim=True)
        reduced.append(torch.cat([listed, outside], 1) if k < C else listed)
    torch.testing.assert_close(loss(logits, targets), DENSE[name](*reduced, labels), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('loss', [
    *SETTINGS, DistillLoss(remainder='ghost'), DistillLoss('reverse-kl', 2., True, 'ghost')], ids=str)
def test_gradients_are_those_of_finite_differences(loss):
    logits, targets, labels = make(4, spread=1.)
    assert torch.autograd.gradcheck(lambda x: loss(x, targets, labels), logits.requires_grad_())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', DISTILL_LOSSES)
def test_half_precision_logits_are_computed_in_float32(name, dtype):
    logits, targets, labels = make(4, torch.float32)
    logits = logits.to(dtype)
    assert DistillLoss(name)(logits, targets, labels) == DistillLoss(name)(logits.float(), targets, labels)


@pytest.mark.parametrize('name', DISTILL_LOSSES)
def test_very_sure_students_and_teachers_have_finite_losses_and_gradients(name):
    logits = torch.zeros(3, C)
    logits[0, 2], logits[1, 5] = 60., -60.
    teacher = torch.zeros(3, C)
    teacher[0, 3], teacher[1, 5] = 40., 40.
    logits.requires_grad_()
    for k in (1, 3, C):
        loss = DistillLoss(name)(logits, SparseTargets.from_logits(teacher, k), torch.tensor([2, 5, 0]))
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_several_teachers_count_equally():
    logits, targets, labels = make(4)
    other = make(4, spread=1.)[1]
    loss = DistillLoss('reverse-kl', 2.)
    torch.testing.assert_close(
        loss(logits, [targets, other]), (loss(logits, targets) + loss(logits, other)) / 2)


def test_softened_targets_are_the_dense_ones_at_that_temperature():
    _, targets, _ = make(5)
    torch.testing.assert_close(targets.soften(3.).densify(), targets.densify(3.))
    mixed = targets.soften(torch.linspace(1, 3, B, dtype=torch.float64)).densify()
    torch.testing.assert_close(mixed[-1], targets.densify(3.)[-1])
    torch.testing.assert_close(mixed[0], targets.densify()[0])


def test_the_default_is_the_cross_entropy_of_the_paper():
    logits, targets, _ = make(5, torch.float32)
    assert DistillLoss(temperature=2.)(logits, targets) == sparse_soft_target_cross_entropy(logits, targets, 2.)
