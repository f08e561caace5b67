"""Mixup and CutMix with stored targets: who is mixed with whom, timm's own mixed views, and the labels' share."""

import csv
import shutil

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import FastCollateMixup
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch.utils.data import DataLoader

import train_distill
from support.flags import DATA, SMALL_VIEWS, SMALL_VIT, small_data
from support.launches import assert_same
from support.programs import refusal
from timm_tinyvit import save_logits
from timm_tinyvit.data.dataset import SparseLogitDataset, collate
from timm_tinyvit.data.opening import open_store
from timm_tinyvit.data.pairing import Pairing, mixed_cross_entropy, mixed_target
from timm_tinyvit.data.sampler import EpochBatchSampler
from timm_tinyvit.data.sources import load_split
from timm_tinyvit.data.view_config import ViewConfig
from timm_tinyvit.data.views import Replay, preserve_random_state, seed_view
from timm_tinyvit.teacher.copy import copy_range
from timm_tinyvit.teacher.teacher import Teacher

SPLIT = 'train[:61]'
RECIPE = dict(input_size=(3, 24, 20), re_prob=0.25)
MIXINGS = {
    'mixup': dict(mixup=0.8),
    'CutMix': dict(cutmix=1.),
    'CutMix between two sizes': dict(cutmix_minmax=(0.2, 0.8)),
    'both in turns': dict(mixup=0.8, cutmix=1., mixup_switch_prob=0.4),
    'now and then': dict(mixup=0.4, cutmix=0.5, mixup_prob=0.5),
}
PAPER = dict(mixup=0.8, cutmix=1.)
FLAGS = ['--mixup', '0.8', '--cutmix', '1', *SMALL_VIEWS]
TRAINING = [
    *small_data(61, 16), *SMALL_VIT, '--epochs', '2', '-b', '10', '--lr', '1e-3', '--warmup-epochs', '1', '--quiet',
    '--crop-pct', '1', '--alpha', '0.5']


def members_of(pairing, epoch):
    """All pairs of an epoch, [P, 2]."""
    return pairing.members(epoch, np.arange(-(-pairing.num_samples // 2)))


def matching_of(pairing, epoch):
    return {frozenset(pair) for pair in members_of(pairing, epoch).tolist()}


@pytest.fixture(scope='module')
def real(fashion):
    """Sixty-one real images: an odd number."""
    return fashion.select(range(61))


pytestmark = pytest.mark.usefixtures('one_launch_each')


# Pairs


@pytest.mark.parametrize('num_samples', [1, 2, 3, 4, 5, 1000, 1024, 1025])
def test_the_pairs_of_an_epoch_are_a_perfect_matching(num_samples):
    pairing = Pairing(3, num_samples)
    members = members_of(pairing, 7)
    assert np.array_equal(np.unique(members), np.arange(num_samples))
    # With an odd number one sample, and one only, is its own partner.
    assert (members[:, 0] == members[:, 1]).sum() == num_samples % 2
    pairs = pairing.pairs_of(7, np.arange(num_samples))
    assert (members[pairs] == np.arange(num_samples)[:, None]).any(axis=1).all()


def test_other_epochs_seeds_and_data_sets_have_other_pairs_and_the_same_ones_the_same():
    matchings = [
        matching_of(Pairing(seed, size), epoch) for seed in (0, 1) for size in (1000, 1002) for epoch in (0, 1, 2)]
    for number, one in enumerate(matchings):
        assert all(len(one & other) < 10 for other in matchings[:number])
    assert matching_of(Pairing(1, 1002), 2) == matchings[-1]


def test_the_pairs_of_a_seed_stay_what_they_are():
    """Stores on disk rely on it."""
    assert members_of(Pairing(42, 10), 3).tolist() == [[8, 2], [0, 3], [4, 7], [1, 5], [6, 9]]


@pytest.mark.parametrize('num_samples', [16, 100])
def test_every_partner_is_equally_likely(num_samples):
    epochs = 4000
    counts = np.zeros(num_samples)
    for epoch in range(epochs):
        pairing = Pairing(1, num_samples)
        first, second = pairing.members(epoch, pairing.pairs_of(epoch, np.array([3])))[0]
        counts[first + second - 3] += 1
    assert counts[3] == 0
    expected = epochs / (num_samples - 1)
    freedom = num_samples - 2
    chi_square = ((np.delete(counts, 3) - expected) ** 2 / expected).sum()
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_fourteen_million_samples_need_no_table_of_them():
    pairing = Pairing(0, 14_197_122)
    samples = np.random.Generator(np.random.PCG64(0)).integers(14_197_122, size=64)
    members = pairing.members(0, pairing.pairs_of(0, samples))
    assert (members == samples[:, None]).any(axis=1).all() and len(np.unique(members)) > 120


# Views


@pytest.mark.parametrize('mixing', MIXINGS.values(), ids=MIXINGS)
def test_both_sides_of_a_pair_are_those_that_timm_makes_of_their_views(mixing, real):
    config = ViewConfig(**RECIPE, **mixing)
    data = SparseLogitDataset(real, Replay(config, seed=9))
    plain = SparseLogitDataset(real, Replay(ViewConfig(**RECIPE), seed=9))
    timms = FastCollateMixup(
        config.mixup, config.cutmix, config.cutmix_minmax, config.mixup_prob, config.mixup_switch_prob, mode='pair',
        label_smoothing=0.1, num_classes=10)
    lams = []
    for pair, (first, second) in enumerate(members_of(data.pairing, 4)[:-1].tolist()):
        sides = plain.__getitems__([(4, first), (4, second)])
        with preserve_random_state():
            seed_view(9, 4, -1 - pair)
            views, targets = timms([(side['view'], side['label']) for side in sides])
        for key, view, target in zip([first, second], views, targets):
            found = data[4, key]
            assert torch.equal(found['view'], view)
            labels = torch.tensor([found['label'], found['label2']])
            assert torch.allclose(mixup_target(labels, 10, found['lam'], 0.1)[0], target, atol=1e-6)
            lams.append(found['lam'])
        assert [side['label'] for side in sides] == [data[4, key]['label'] for key in (first, second)]
    assert lams[::2] == lams[1::2] and len(set(lams)) > 10
    if 'mixup_prob' in mixing:
        assert 5 < lams[::2].count(1.) < 25


def test_a_sample_without_a_partner_stays_as_it_is(real):
    data = SparseLogitDataset(real, Replay(ViewConfig(**RECIPE, **PAPER), seed=9))
    plain = SparseLogitDataset(real, Replay(ViewConfig(**RECIPE), seed=9))
    for epoch in range(10):
        alone = int(members_of(data.pairing, epoch)[-1, 0])
        sample = data[epoch, alone]
        assert torch.equal(sample['view'], plain[epoch, alone]['view']) and sample['label2'] == sample['label']


def test_mixing_leaves_the_global_generators_as_they_were(real):
    data = SparseLogitDataset(real, Replay(ViewConfig(**RECIPE, **PAPER), seed=9))
    np.random.seed(5)
    expected = np.random.rand(3)
    np.random.seed(5)
    data.__getitems__([(0, 1), (0, 2)])
    assert np.array_equal(np.random.rand(3), expected)


def test_the_probe_knows_how_views_are_mixed(monkeypatch):
    replays = [Replay(ViewConfig(**RECIPE, **mixing), 0) for mixing in ({}, *MIXINGS.values())]
    probes = [replay.probe() for replay in replays]
    assert len(set(probes)) == len(probes)
    monkeypatch.setattr('timm.data.mixup.cutmix_bbox_and_lam', lambda shape, lam, **kwargs: ((0, 1, 0, 1), lam))
    changed = [name for name, replay, probe in zip(['', *MIXINGS], replays, probes) if replay.probe() != probe]
    assert changed == [name for name, mixing in MIXINGS.items() if mixing.keys() & {'cutmix', 'cutmix_minmax'}]


# The order of training


def batches(pairing, epoch=0, start=0, **options):
    sampler = EpochBatchSampler(
        **{'num_samples': pairing.num_samples, 'batch_size': 10, 'seed': 0, 'pairing': pairing, **options})
    sampler.set_epoch(epoch, start)
    return list(sampler)


@pytest.mark.parametrize('world_size', [1, 2, 3])
@pytest.mark.parametrize('batch_size', [2, 4, 10])
def test_any_world_size_and_even_batch_size_shows_the_same_pairs(world_size, batch_size):
    pairing = Pairing(5, 121)
    epoch, shown = 8, []
    for rank in range(world_size):
        share = batches(
            pairing, epoch, batch_size=batch_size, rank=rank, world_size=world_size, store_epochs=range(3, 6))
        assert len(share) == 121 // (batch_size * world_size)
        for batch in share:
            assert {view_epoch for view_epoch, _ in batch} == {5} and len(batch) == batch_size
            shown += [frozenset(index for _, index in batch[first:first + 2]) for first in range(0, batch_size, 2)]
    assert len(set(shown)) == len(shown) and set(shown) <= matching_of(pairing, 5)
    assert len(shown) == 121 // (batch_size * world_size) * batch_size * world_size // 2


def test_ranks_share_pairs_step_by_step_and_go_on_from_any_batch():
    pairing = Pairing(5, 121)
    shares = [batches(pairing, 2, rank=rank, world_size=2) for rank in range(2)]
    assert [sum(step, []) for step in zip(*shares)] == batches(pairing, 2, batch_size=20)
    for start in range(len(shares[1]) + 1):
        assert batches(pairing, 2, start, rank=1, world_size=2) == shares[1][start:]
    assert batches(pairing, 1) != batches(pairing, 2)


def test_one_decoded_image_serves_both_sides_of_its_pair(real, monkeypatch):
    data = SparseLogitDataset(real, Replay(ViewConfig(**RECIPE, **PAPER), seed=9))
    decode, decoded = data.replay.decode, []
    monkeypatch.setattr(data.replay, 'decode', lambda source: decoded.append(source) or decode(source))
    batch, *_ = batches(data.pairing)
    data.__getitems__(batch)
    assert len(decoded) == len(set(decoded)) == len(batch)


def test_odd_batches_and_several_views_of_an_image_are_refused(refused):
    with refused('batch of 5', 'even --batch-size'):
        batches(Pairing(0, 100), batch_size=5)
    with refused('other pairs in each epoch', '--views-per-image'):
        batches(Pairing(0, 100), batch_size=8, views_per_image=2)


# Labels


@pytest.mark.parametrize('smoothing', [0., 0.1])
def test_the_label_loss_is_that_of_the_dense_mixed_target(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 12, generator=generator).requires_grad_()
    labels = torch.randint(12, (6,), generator=generator)
    lam = torch.rand(3, generator=generator)
    lam = torch.cat([lam, lam.flip(0)])
    dense = mixup_target(labels, 12, lam[:, None], smoothing)
    assert torch.allclose(mixed_target(labels, labels.flip(0), lam, 12, smoothing), dense, atol=1e-7)
    expected = SoftTargetCrossEntropy()(logits, dense)
    found = mixed_cross_entropy(logits, labels, labels.flip(0), lam, smoothing)
    assert torch.allclose(found, expected, rtol=1e-6)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-7)


# The programs


@pytest.fixture(scope='module')
def filled(tmp_path_factory, teacher):
    """A store of mixed views that save_logits has filled, and all that its teacher saw, [epochs, N, 3, H, W]."""
    path, seen = tmp_path_factory.mktemp('filled') / 'logits', []
    with pytest.MonkeyPatch.context() as patch:
        look = Teacher.__call__
        patch.setattr(Teacher, '__call__', lambda self, views: seen.append(views) or look(self, views))
        save_logits.main([
            '--dataset', DATA, '--train-split', SPLIT, '--teacher', teacher, '--logits', str(path), '--topk', '3',
            '--shard-size', '16', '--teacher-batch-size', '7', '--epochs', '2', '-j', '1', *FLAGS])
    return path, torch.cat(seen).view(2, 61, 3, 32, 32)


def test_the_student_sees_what_the_teacher_saw_byte_for_byte(filled):
    path, seen = filled
    store, replay = open_store(path, {})
    assert replay.config.is_mixed
    data = SparseLogitDataset(load_split(DATA, SPLIT, is_training=True), replay, store)
    labels = torch.tensor(data.dataset['label'].to_pylist())
    sampler = EpochBatchSampler(61, 10, 1, rank=1, world_size=2, store_epochs=range(2), pairing=data.pairing)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=2, collate_fn=collate, persistent_workers=True)
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        for batch in loader:
            assert torch.equal(batch['view'], seen[epoch % 2, batch['index']])
            assert torch.equal(batch['record'], torch.from_numpy(store.read(epoch % 2, batch['index'].numpy())))
            sides = batch['index'].view(-1, 2)
            assert torch.equal(batch['label'], labels[batch['index']])
            assert torch.equal(batch['label2'], labels[sides.flip(1).flatten()])
            assert torch.equal(batch['lam'][::2], batch['lam'][1::2]) and batch['lam'].dtype == torch.float32


def train(output, name, *flags):
    """Weights after a run of two epochs."""
    train_distill.main([*TRAINING, '--output', str(output), '--experiment', name, *flags])
    return load_file(output / name / 'last' / 'model.safetensors')


@pytest.mark.launches
def test_a_run_on_mixed_views_goes_on_from_the_middle_of_an_epoch_with_the_same_bits(filled, tmp_path):
    flags = ['--logits', str(filled[0]), '--recovery-interval', '1', '--checkpoint-hist', '20']
    whole = train(tmp_path, 'run', *flags)
    files = sorted((tmp_path / 'run').glob('checkpoint-*'))
    (tmp_path / 'again').mkdir()
    shutil.copy(files[len(files) * 3 // 4], tmp_path / 'again')
    assert_same(train(tmp_path, 'again', *flags), whole)
    row = next(csv.DictReader(open(tmp_path / 'run' / 'metrics.csv')))
    parts = [float(row['label_loss']), float(row['distill_loss'])]
    assert min(parts) > 0 and float(row['loss']) == pytest.approx(sum(parts) / 2, rel=1e-5)


@pytest.mark.launches
def test_a_plain_student_sees_the_mixed_views_of_a_distilled_one(filled, tmp_path):
    """With no weight on the teacher, both learn the same from the same views and labels."""
    distilled = train(tmp_path, 'distilled', '--logits', str(filled[0]), '--alpha', '0')
    plain = train(tmp_path, 'plain', *FLAGS, '--mixup-mode', 'pair')
    assert_same(plain, distilled)


@pytest.mark.parametrize('flags, loss', [
    ([], SoftTargetCrossEntropy()), (['--bce-loss'], BinaryCrossEntropy()),
    (['--bce-loss', '--bce-sum', '--bce-target-thresh', '0.3'], BinaryCrossEntropy(
        target_threshold=0.3, sum_classes=True))], ids=['ce', 'bce', 'sum'])
@pytest.mark.launches
def test_the_label_loss_of_a_run_is_that_of_timms_mixed_targets(filled, tmp_path, flags, loss):
    """Of a student that learns nothing, so that it is known what it said."""
    rates = [text for name in ('lr', 'warmup-lr', 'min-lr') for text in (f'--{name}', '1e-30')]
    train(tmp_path, 'run', '--logits', str(filled[0]), '--epochs', '1', *rates, *flags)
    model = timm.create_model(f'local-dir:{tmp_path / "run" / "last"}', pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    store, replay = open_store(filled[0], {})
    data = SparseLogitDataset(load_split(DATA, SPLIT, is_training=True), replay, store)
    sampler = EpochBatchSampler(61, 10, 42, store_epochs=range(2), pairing=data.pairing)
    losses = []
    for batch in DataLoader(data, batch_sampler=sampler, collate_fn=collate):
        pairs = batch['label'].view(-1, 2)
        dense = [mixup_target(pair, 10, lam, 0.1) for pair, lam in zip(pairs, batch['lam'][::2])]
        logits = model((batch['view'] / 255 - mean) / std)
        losses.append(loss(logits, torch.cat(dense)).item())
    row = next(csv.DictReader(open(tmp_path / 'run' / 'metrics.csv')))
    assert float(row['label_loss']) == pytest.approx(np.mean(losses), rel=1e-5)


def test_parts_of_a_data_set_and_keys_are_refused(filled, tmp_path, teacher, capsys, refused, one_sentence):
    store, replay = open_store(filled[0], {})
    whole = load_split(DATA, SPLIT, is_training=True)
    with refused('60 samples, the store has 61'):
        SparseLogitDataset(whole.select(range(60)), replay, store)
    with refused('lacks partners', '--samples'):
        copy_range(store, tmp_path / 'copy', range(0, 20), whole)
    with refused("column 'name'", 'leave --key'):
        SparseLogitDataset(whole.add_column('name', list(range(61))), replay, key_column='name')
    common = ['--dataset', DATA, '--teacher', teacher, '--logits', str(tmp_path / 'logits'), '--epochs', '1', *FLAGS]
    for flags in (['--train-split', SPLIT], ['--streaming']):
        said = refusal(save_logits.main, [*common, *flags, '--key', 'label'], capsys)
        one_sentence(said, "column 'label'", '--streaming')
    assert not (tmp_path / 'logits').exists()
    for flags, words in (
        (['-b', '5'], 'even --batch-size'),
        (['--streaming', '--alpha', '1', '--train-split', 'train'], 'leave --streaming out'),
        (['--mixup', '0.5'], '--mixup 0.5 instead of 0.8'),
    ):
        said = refusal(lambda argv: train(tmp_path, 'refused', *argv), ['--logits', filled[0], *flags], capsys)
        one_sentence(said, words)
