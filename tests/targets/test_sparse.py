"""Sparse targets and their loss, against dense formulas in float64 and timm's own loss."""

import math
from dataclasses import replace

import pytest
import torch
from timm.loss import SoftTargetCrossEntropy
from torch.nn import functional as F

from timm_tinyvit.targets.sparse import SparseTargets, sparse_soft_target_cross_entropy

TEMPERATURES = [0.5, 1., 4.]


def make_logits(rows, classes, dtype=torch.float64, seed=0, spread=3.):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * spread).to(dtype)


def make_targets(k, classes=30, rows=7, dtype=torch.float64, seed=1):
    return SparseTargets.from_logits(make_logits(rows, classes, dtype, seed), k)


def dense_probabilities(targets, temperature=1.):
    """The dense target by its definition, class by class."""
    rows = []
    for row in range(len(targets)):
        rest = 0.
        if targets.log_rest is not None:
            rest = math.exp(targets.log_rest[row].item()) / (targets.num_classes - targets.k)
        probs = torch.full((targets.num_classes,), rest, dtype=torch.float64)
        probs[targets.ids[row]] = targets.log_probs[row].double().exp()
        softened = probs ** (1 / temperature)
        rows.append(softened / softened.sum())
    return torch.stack(rows)


def dense_loss(logits, targets, temperature=1.):
    """Rows of the dense soft-target cross-entropy, in float64."""
    return -(dense_probabilities(targets, temperature) * (logits.double() / temperature).log_softmax(1)).sum(1)


def loss_and_gradient(function, logits):
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits)
    # Rows of different weight, so that a gradient in the wrong row shows.
    (loss * torch.arange(1, len(loss) + 1)).sum().backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize('k', [1, 5, 29, 30])
def test_the_largest_probabilities_and_the_rest_of_the_mass_are_kept(k):
    logits = make_logits(16, 30)
    probs, order = logits.softmax(1).sort(dim=1, descending=True)
    targets = SparseTargets.from_logits(logits, k)
    assert torch.equal(targets.ids, order[:, :k])
    torch.testing.assert_close(targets.log_probs.exp(), probs[:, :k], rtol=1e-12, atol=0)
    if k == 30:
        assert targets.log_rest is None
    else:
        torch.testing.assert_close(targets.log_rest.exp(), probs[:, k:].sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_teachers_are_computed_in_float32(dtype):
    logits = make_logits(8, 50, dtype)
    targets = SparseTargets.from_logits(logits, 6)
    assert targets.log_probs.dtype == targets.log_rest.dtype == torch.float32
    exact = logits.double().log_softmax(1)
    torch.testing.assert_close(targets.log_probs.double(), exact.gather(1, targets.ids), rtol=1e-6, atol=1e-6)
    rest = exact.scatter(1, targets.ids, -math.inf).logsumexp(1)
    torch.testing.assert_close(targets.log_rest.double(), rest, rtol=1e-6, atol=1e-6)


def test_a_very_sure_teacher_keeps_the_digits_of_its_small_rest():
    logits = torch.zeros(1, 100)
    logits[0, 3] = 200.
    targets = SparseTargets.from_logits(logits, 1)
    # One minus the largest probability is zero here in float32 and in float64.
    assert targets.log_rest.item() == pytest.approx(math.log(99) - 200, rel=1e-6)
    assert targets.densify(50.)[0, 0].item() == pytest.approx(1 / (99 + math.exp(4)), rel=1e-5)


@pytest.mark.parametrize('offset', [1e4, -1e4])
def test_a_common_offset_of_the_logits_does_not_matter(offset):
    # Multiples of 1/64 are exact beside the offset.
    logits = (make_logits(4, 40) * 64).round().float() / 64
    here, there = (SparseTargets.from_logits(values, 5) for values in (logits, logits + offset))
    assert torch.equal(here.ids, there.ids)
    torch.testing.assert_close(here.log_probs, there.log_probs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(here.log_rest, there.log_rest, rtol=1e-6, atol=1e-6)
    student = make_logits(4, 40, torch.float32, seed=5)
    torch.testing.assert_close(
        sparse_soft_target_cross_entropy((student * 64).round() / 64 + offset, here).double(),
        dense_loss((student * 64).round() / 64, here).mean(), rtol=1e-5, atol=1e-5)


def test_logits_at_the_ends_of_float32_give_probabilities_all_the_same():
    logits = torch.tensor([[3e38, -3e38, 0., 1.]])
    targets = SparseTargets.from_logits(logits, 2)
    assert targets.densify().tolist() == [[1., 0., 0., 0.]]
    loss = sparse_soft_target_cross_entropy(torch.zeros(1, 4), targets)
    assert loss.item() == pytest.approx(math.log(4))


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_teacher_logits_that_are_not_finite_are_refused(bad, refused):
    logits = make_logits(5, 9)
    logits[1, 2] = logits[4, 0] = bad
    with refused('2 of 5 rows', 'NaN or infinity', error=ValueError):
        SparseTargets.from_logits(logits, 3)


@pytest.mark.parametrize('k', [0, -1, 10])
def test_a_k_that_does_not_fit_the_classes_is_refused(k, refused):
    with refused(f'k = {k}', '9 classes', error=ValueError):
        SparseTargets.from_logits(make_logits(2, 9), k)


def test_wrong_shapes_and_arguments_are_refused(refused):
    targets = make_targets(3)
    with refused('[B, C]', error=ValueError):
        SparseTargets.from_logits(torch.zeros(9), 3)
    for change in (
            dict(log_probs=targets.log_probs[:, :2]), dict(ids=targets.ids[0], log_probs=targets.log_probs[0]),
            dict(log_rest=targets.log_rest[:3]), dict(log_rest=None), dict(num_classes=3), dict(num_classes=2)):
        with refused(error=ValueError):
            replace(targets, **change)
    for logits in (torch.zeros(7, 29), torch.zeros(6, 30), torch.zeros(30)):
        with refused('student logits', '[7, 30]', error=ValueError):
            sparse_soft_target_cross_entropy(logits, targets)
    for temperature in (0., -1., math.nan):
        with refused('temperature', error=ValueError):
            sparse_soft_target_cross_entropy(torch.zeros(7, 30), targets, temperature)
    with refused('reduction', 'avg', error=ValueError):
        sparse_soft_target_cross_entropy(torch.zeros(7, 30), targets, reduction='avg')


@pytest.mark.parametrize('temperature', TEMPERATURES)
@pytest.mark.parametrize('k', [1, 5, 30])
def test_the_dense_target_is_the_one_of_the_definition(k, temperature):
    targets = make_targets(k)
    dense = targets.densify(temperature)
    torch.testing.assert_close(dense, dense_probabilities(targets, temperature), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(dense.sum(1), torch.ones(7, dtype=torch.float64), rtol=1e-12, atol=0)


def test_targets_of_all_classes_give_the_teacher_back_at_every_temperature():
    logits = make_logits(6, 20)
    targets = SparseTargets.from_logits(logits, 20)
    for temperature in TEMPERATURES:
        torch.testing.assert_close(
            targets.densify(temperature), (logits / temperature).softmax(1), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize('temperature', TEMPERATURES)
@pytest.mark.parametrize('k', [1, 5, 30])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_loss_and_gradient_equal_the_dense_formula(dtype, tolerance, k, temperature):
    targets = make_targets(k, dtype=dtype)
    student = make_logits(7, 30, dtype, seed=2)
    loss, grad = loss_and_gradient(
        lambda z: sparse_soft_target_cross_entropy(z, targets, temperature, reduction='none'), student)
    expected, expected_grad = loss_and_gradient(lambda z: dense_loss(z, targets, temperature), student.double())
    assert loss.dtype == grad.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=tolerance, atol=tolerance)


def test_float32_holds_for_22k_classes_and_a_student_far_from_zero():
    targets = make_targets(100, classes=21_841, rows=3, dtype=torch.float32)
    student = make_logits(3, 21_841, torch.float32, seed=2) + 300
    loss, grad = loss_and_gradient(
        lambda z: sparse_soft_target_cross_entropy(z, targets, reduction='none'), student)
    expected, expected_grad = loss_and_gradient(lambda z: dense_loss(z, targets), student.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-7)


def test_it_agrees_with_timm_on_the_dense_target():
    targets = make_targets(5, dtype=torch.float32)
    student = make_logits(7, 30, torch.float32, seed=3)
    torch.testing.assert_close(
        sparse_soft_target_cross_entropy(student, targets), SoftTargetCrossEntropy()(student, targets.densify()))


def test_it_agrees_with_torch_on_the_teachers_own_distribution():
    teacher, student = make_logits(7, 30), make_logits(7, 30, seed=4)
    torch.testing.assert_close(
        sparse_soft_target_cross_entropy(student, SparseTargets.from_logits(teacher, 30), 2.),
        F.cross_entropy(student / 2, (teacher / 2).softmax(1)), rtol=1e-12, atol=0)


def test_reductions_are_mean_sum_and_rows():
    targets, student = make_targets(5), make_logits(7, 30, seed=2)
    rows = sparse_soft_target_cross_entropy(student, targets, 2., 'none')
    assert rows.shape == (7,)
    torch.testing.assert_close(sparse_soft_target_cross_entropy(student, targets, 2.), rows.mean())
    torch.testing.assert_close(sparse_soft_target_cross_entropy(student, targets, 2., 'sum'), rows.sum())


@pytest.mark.parametrize('k', [4, 9])
def test_the_backward_passes_gradcheck(k):
    targets = make_targets(k, classes=9, rows=3)
    student = make_logits(3, 9, seed=2, spread=1.).requires_grad_()
    for reduction in ('none', 'mean', 'sum'):
        assert torch.autograd.gradcheck(
            lambda z, reduction=reduction: sparse_soft_target_cross_entropy(z, targets, 1.7, reduction), (student,))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_students_are_computed_in_float32_and_get_gradients_of_their_own_type(dtype):
    targets = make_targets(5, dtype=torch.float32)
    student = make_logits(7, 30, dtype, seed=2)
    loss, grad = loss_and_gradient(
        lambda z: sparse_soft_target_cross_entropy(z, targets, 2., reduction='none'), student)
    expected, expected_grad = loss_and_gradient(lambda z: dense_loss(z, targets, 2.), student.double())
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    # The gradient is exact up to its own rounding.
    torch.testing.assert_close(grad.double(), expected_grad, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_loss_scale_saves_float16_gradients_that_are_too_small_without_it():
    targets, scale = make_targets(5, 1000, 512, torch.float32), 2. ** 16
    student = make_logits(512, 1000, torch.float16, seed=2).requires_grad_()
    exact = student.detach().double().requires_grad_()
    (sparse_soft_target_cross_entropy(student, targets) * scale).backward()
    (dense_loss(exact, targets).mean() * scale).backward()
    assert (exact.grad / scale).abs().median() < torch.finfo(torch.float16).smallest_normal
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=torch.finfo(torch.float16).eps, atol=1e-6)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_a_second_backward_pass_through_the_same_loss_gives_the_same_gradient(reduction):
    targets, student = make_targets(5), make_logits(7, 30, seed=2).requires_grad_()
    loss = sparse_soft_target_cross_entropy(student, targets, reduction=reduction)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward(retain_graph=True)
    (loss * 3).backward()
    torch.testing.assert_close(student.grad, 5 * once, rtol=1e-12, atol=0)


def test_a_student_under_autocast_gets_the_float32_loss_of_its_bfloat16_logits():
    torch.manual_seed(0)
    head, features = torch.nn.Linear(16, 30), torch.randn(7, 16)
    targets = make_targets(5, dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        logits = head(features)
        assert logits.dtype == torch.bfloat16
        logits.retain_grad()
        loss = sparse_soft_target_cross_entropy(logits, targets, 2.)
    loss.backward()
    expected, _ = loss_and_gradient(lambda z: dense_loss(z, targets, 2.), logits.detach().double())
    assert loss.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16
    assert head.weight.grad.dtype == torch.float32 and head.weight.grad.abs().sum() > 0
    torch.testing.assert_close(loss.double(), expected.mean(), rtol=1e-5, atol=1e-5)


def test_targets_without_gradient_are_left_alone():
    targets = make_targets(5)
    before = targets.log_probs.clone()
    student = make_logits(7, 30, seed=2).requires_grad_()
    kept = student.detach().clone()
    sparse_soft_target_cross_entropy(student, targets).backward()
    assert torch.equal(targets.log_probs, before) and torch.equal(student, kept)


def test_the_loss_compiles_in_one_graph():
    targets, student = make_targets(5), make_logits(7, 30, seed=2)
    compiled = torch.compile(
        lambda z: sparse_soft_target_cross_entropy(z, targets, 2., reduction='none'),
        backend='aot_eager', fullgraph=True)
    loss, grad = loss_and_gradient(compiled, student)
    expected, expected_grad = loss_and_gradient(lambda z: dense_loss(z, targets, 2.), student)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


def test_moving_targets_moves_all_of_them():
    for targets in (make_targets(5), make_targets(30)):
        moved = targets.to(torch.device('meta'))
        tensors = [moved.ids, moved.log_probs, *([] if moved.log_rest is None else [moved.log_rest])]
        assert {tensor.device.type for tensor in tensors} == {'meta'}
        assert (moved.num_classes, len(moved), len(tensors)) == (30, 7, 3 if targets.k == 5 else 2)
