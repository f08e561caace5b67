"""Students of stored features, alone, with labels and with stored classes: what they leave, and exact resume."""

import csv
import re

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from timm.layers import convert_sync_batchnorm
from timm.task import FeatureDistillationTask, TrainingTask
from torch.nn import functional as F

import train_distill
from support.flags import DATA
from support.launches import (
    SHARDED, assert_same, checkpoints, finish, kill_at_random_steps, launches, needs_sharding, weights,
)
from support.programs import refusal
from timm_tinyvit import save_logits
from timm_tinyvit.data.dataset import SparseLogitDataset, collate
from timm_tinyvit.data.opening import open_store
from timm_tinyvit.data.sampler import EpochBatchSampler
from timm_tinyvit.data.sources import load_split
from timm_tinyvit.models.features import feature_vectors
from timm_tinyvit.models.loading import Normalize
from timm_tinyvit.models.saving import export_model
from timm_tinyvit.report.run_folder import TrainedRun
from timm_tinyvit.targets.features import FEATURE_LOSSES
from timm_tinyvit.train.features import FeatureStudent
from timm_tinyvit.train.metrics import suffixed
from timm_tinyvit.train.task import SparseLogitTask

TRAIN = ['--dataset', DATA, '--train-split', 'train[:96]']
FILL = [*TRAIN, '--epochs', '2', '--img-size', '64', '--mixup', '0.5', '--shard-size', '32', '--workers', '0',
        '--quiet']
STUDENT = [*TRAIN, '--model', 'test_efficientnet', '--lr', '1e-2', '--warmup-epochs', '0', '--epochs', '2', '-b', '8',
           '-j', '0', '--val-split', 'test[:16]']


@pytest.fixture(scope='module')
def teacher_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('teacher') / 'convnext'
    export_model(folder, timm.create_model('test_convnext', num_classes=10), data_config={'input_size': (3, 64, 64)})
    return str(folder)


@pytest.fixture(scope='module')
def stores(tmp_path_factory, teacher_folder):
    """Stores of the same mixed views: pooled vectors, a projected grid, and classes."""
    folder = tmp_path_factory.mktemp('stores')
    features = ['--targets', 'features']
    for name, flags in (('pooled', [*features, '--codec', 'float16']), ('classes', ['--topk', '3']),
                        ('grid', [*features, '--feature-grid', '2', '--feature-dim', '8'])):
        save_logits.main([*FILL, '--teacher', teacher_folder, '--logits', str(folder / name), *flags])
    return folder


@pytest.fixture
def start(warm_processes, tmp_path):
    with launches(warm_processes, tmp_path) as ranks:
        yield ranks


def rows(folder):
    return [{name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(open(folder / 'metrics.csv'))]


def names_in(file):
    with safe_open(file, 'pt') as tensors:
        return set(tensors.keys())


@torch.no_grad()
def vectors_of(model, views, size, grid):
    return feature_vectors(model, model.forward_features(views), size, grid)


@pytest.mark.parametrize('logits, flags, has_classes', [
    (['pooled'], [], False),
    (['grid'], ['--num-classes', '0', '--projector', 'mlp', '--feature-loss', 'smooth-l1', '--model-ema'], False),
    (['pooled'], ['--alpha', '0.5', '--feature-weight', '2'], True),
    (['classes', 'grid'], ['--feature-loss', 'mse', '--grad-accum-steps', '2'], True),
    (['pooled', 'classes'], ['--alpha', '0.7', '--projector', 'mlp'], True)])
def test_a_student_learns_features_and_leaves_a_plain_model(stores, tmp_path, logits, flags, has_classes):
    train_distill.main([*STUDENT, '--logits', *[str(stores / name) for name in logits], '--output', str(tmp_path),
                        '--experiment', 'run', *flags])
    run, table = tmp_path / 'run', rows(tmp_path / 'run')
    assert table[-1]['feature_loss'] < table[0]['feature_loss']
    weight = 2 if '--feature-weight' in flags else 1
    alpha = float(flags[flags.index('--alpha') + 1]) if '--alpha' in flags else 1.
    for row in table:
        expected = (1 - alpha) * row['label_loss'] + alpha * row['distill_loss'] + weight * row['feature_loss']
        assert row['loss'] == pytest.approx(expected, rel=1e-5)
        assert (row['distill_loss'] > 0) == ('classes' in logits) and (row['label_loss'] > 0) == (alpha < 1)
        assert ('eval_top1' in row) == has_classes and ('eval_knn' in row) != has_classes
    for name in ('last', 'best', 'last_ema') if '--model-ema' in flags else ('last', 'best'):
        assert not any('proj' in key for key in names_in(run / name / 'model.safetensors'))
        model = timm.create_model(f'local-dir:{run / name}', pretrained=True)
        assert model.num_classes == 10 * has_classes
        backbone = timm.create_model(f'local-dir:{run / name}', pretrained=True, features_only=True)
        assert len(backbone(torch.zeros(1, 3, 64, 64))) > 1
    state = torch.load(run / checkpoints(run)[-1], weights_only=True)
    layers = {'projector', *(['projector_ema'] if '--model-ema' in flags else [])}
    assert {key for key in state if key.startswith('projector')} == layers
    assert_same(state['model'], weights(run))
    # The neighbours of a third of the views, by the exported student and by the stored vectors.
    of_folder = TrainedRun.read(run)
    found = of_folder.stored_features
    assert not of_folder.problems and of_folder.settings['logits']
    grid, size = ('grid' in logits) * 2, (64, 64)
    store, replay = open_store(stores / logits[-1 if grid else 0], {}, print)
    data = SparseLogitDataset(load_split(DATA, 'train[:96]', is_training=True), replay, store)
    sampler = EpochBatchSampler(96, 8, 42, store_epochs=store.manifest.stored_epochs, pairing=data.pairing)
    sampler.set_epoch(1)
    batches = [collate(data.__getitems__(rows)) for rows in sampler]
    model = timm.create_model(f'local-dir:{run / suffixed("last", found.weights)}', pretrained=True).eval()
    normalize, near = Normalize(model.pretrained_cfg['mean'], model.pretrained_cfg['std']), []
    for vectors in (
            [vectors_of(model, normalize(batch['view']), size, grid) for batch in batches],
            [store.codec.decode(batch['record']).vectors for batch in batches]):
        vectors = F.normalize(torch.cat(vectors).mean(dim=1), dim=1)
        near.append([set(row[1:].tolist()) for row in (vectors @ vectors.T).topk(21, dim=1).indices])
    shared = np.array([len(one & other) / 20 for one, other in zip(*near)])
    assert found.num_nearest == 20 and found.epoch == 1 and abs(found.shared - shared).max() < 0.051
    page = (run / 'report.html').read_text()
    assert ('it is evaluated by the nearest neighbours' in page) != has_classes
    assert f'teacher {100 * found.shared.mean():.1f}% are among the 20 nearest' in page and '21.1%.' in page
    assert f'was {table[-1]["feature_cosine"]:.3f} in the last epoch' in page
    if '--feature-loss' not in flags:
        assert table[-1]['feature_cosine'] == pytest.approx(1 - table[-1]['feature_loss'], abs=1e-5)
    assert table[-1]['feature_cosine'] > table[0]['feature_cosine']


def test_the_loss_is_that_of_timms_online_task(stores, teacher_folder):
    """timm runs the teacher in every step; the store holds what it said of the same views."""
    store, replay = open_store(stores / 'pooled', {}, print)
    data = SparseLogitDataset(load_split(DATA, 'train[:96]', is_training=True), replay, store)
    batch = collate(data.__getitems__([(1, row) for row in range(16)]))
    teacher = timm.create_model(f'local-dir:{teacher_folder}', pretrained=True)
    torch.manual_seed(0)
    student = timm.create_model('test_efficientnet', num_classes=10)
    config = teacher.pretrained_cfg
    student.pretrained_cfg.update(mean=config['mean'], std=config['std'])
    normalize = Normalize(config['mean'], config['std'])
    online = FeatureDistillationTask(
        student, teacher, torch.nn.CrossEntropyLoss(), distill_loss_weight=2., task_loss_weight=0.5, verbose=False)
    online.train()
    trained = FeatureStudent(student, store.manifest.features['dim'], 0, (64, 64))
    trained.projection.load_state_dict(online.trainable_module.projection.state_dict())
    stored = SparseLogitTask(
        trained, store.codec, normalize, alpha=0.5, feature_kind='mse', feature_weight=2.).train()
    assert isinstance(stored, TrainingTask)
    losses = stored(batch['view'], {key: value for key, value in batch.items() if key not in ('lam', 'label2')})
    expected = online(normalize(batch['view']), batch['label'])
    torch.testing.assert_close(losses['feature_loss'], expected['kd_loss'], rtol=2e-3, atol=0)
    torch.testing.assert_close(losses['loss'], expected['loss'], rtol=2e-3, atol=0)


@pytest.mark.parametrize('processes', [1, 2])
def test_a_run_killed_at_random_steps_ends_with_the_same_bits(start, stores, tmp_path, processes):
    argv = [*STUDENT, '--num-classes', '0', '--logits', stores / 'grid', '--projector', 'mlp', '--drop-path', '0.2',
            '--model-ema', '--batch-size', str(8 // processes)]
    finish(start([*argv, '--experiment', 'peace'], processes), tmp_path)
    argv += ['--recovery-interval', '1', '--experiment', 'killed']
    folder = tmp_path / 'killed'
    kill_at_random_steps(start, argv, processes, folder, times=2)
    assert len(re.findall('resuming .* at epoch', finish(start(argv, processes), tmp_path))) == 2
    one, two = (torch.load(tmp_path / run / checkpoints(tmp_path / run)[-1], weights_only=True)
                for run in ('peace', 'killed'))
    for name in ('model', 'ema', 'projector', 'projector_ema'):
        assert_same(one[name], two[name])
    assert [row['loss'] for row in rows(tmp_path / 'peace')] == [row['loss'] for row in rows(folder)]


@needs_sharding
def test_a_sharded_run_ends_as_one_with_the_whole_model_on_each_process(start, stores, tmp_path):
    argv = [*STUDENT, '--logits', stores / 'classes', stores / 'grid', '--model-ema', '-b', '4', '--epochs', '1',
            '--opt-eps', '1e-2', '--lr', '1e-4']
    said = finish(start([*argv, '--experiment', 'sharded'], 2, launcher=SHARDED), tmp_path)
    assert 'the student is sharded over 2 process(es)' in said
    finish(start([*argv, '--experiment', 'whole'], 2), tmp_path)
    one, two = (torch.load(tmp_path / run / checkpoints(tmp_path / run)[-1], weights_only=True)
                for run in ('sharded', 'whole'))
    for name in ('model', 'ema', 'projector', 'projector_ema'):
        assert one[name].keys() == two[name].keys()
        for key in one[name]:
            torch.testing.assert_close(one[name][key], two[name][key], rtol=1e-3, atol=1e-4)
    assert rows(tmp_path / 'sharded')[0]['loss'] == pytest.approx(rows(tmp_path / 'whole')[0]['loss'], rel=1e-4)


def test_compiled_checkpointed_and_synchronised_students_are_the_same():
    """On a CPU torch refuses to train synchronised batch norms; what is made of them gives the same features."""
    views, found = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), {}
    for way in ('plain', 'compiled', 'checkpointed', 'synchronised'):
        torch.manual_seed(0)
        model = timm.create_model('test_efficientnet', num_classes=0)
        if way == 'checkpointed':
            model.set_grad_checkpointing()
        student = FeatureStudent(convert_sync_batchnorm(model) if way == 'synchronised' else model, 8, 2, (64, 64))
        if way == 'synchronised':
            assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in student.modules())
        student.train(way != 'synchronised')
        task = torch.compile(student, backend='eager') if way == 'compiled' else student
        task(views)[1].square().sum().backward()
        found[way] = [weight.grad for weight in student.parameters()]
    for way in ('compiled', 'checkpointed'):
        for one, other in zip(found['plain'], found[way], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert [grad is None for grad in found['synchronised']] == [grad is None for grad in found['plain']]


def test_weights_that_no_loss_reaches_are_frozen():
    torch.manual_seed(0)
    model = timm.create_model('test_convnext', num_classes=0)
    student = FeatureStudent(model, 8, 2, (64, 64))
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {'head.norm.weight', 'head.norm.bias'}
    logits, vectors = student(torch.randn(2, 3, 64, 64))
    assert vectors.shape == (2, 4, 8) and logits.shape == (2, model.num_features)
    FeatureStudent(timm.create_model('test_convnext', num_classes=10), 8, 0, (64, 64))


def test_a_backbone_starts_from_a_classifiers_weights_and_a_classifier_from_a_backbones(stores, tmp_path, capsys):
    common = [*STUDENT, '--epochs', '1', '--output', str(tmp_path)]
    classifier = tmp_path / 'classifier'
    torch.manual_seed(1)
    export_model(classifier, timm.create_model('test_efficientnet', num_classes=7))
    train_distill.main([*common, '--logits', str(stores / 'pooled'), '--num-classes', '0', '--experiment', 'backbone',
                        '--initial-checkpoint', str(classifier)])
    capsys.readouterr()
    train_distill.main([*common, '--img-size', '64', '--experiment', 'tuned', '--initial-checkpoint',
                        str(tmp_path / 'backbone' / 'last')])
    assert 'it has no classifier, the student 10; it starts from zero' in capsys.readouterr().out


@pytest.mark.parametrize('logits, flags, words', [
    (['pooled'], ['--num-classes', '10'], ['holds features', '--num-classes 10', '--alpha']),
    (['classes'], ['--num-classes', '0'], ['--num-classes 0', 'store of features']),
    ([], ['--num-classes', '0'], ['--num-classes 0', 'store of features']),
    (['pooled'], ['--num-classes', '0', '--alpha', '0.5'], ['--num-classes 0', '--alpha']),
    (['pooled', 'grid'], [], ['both hold features', 'one teacher']),
    (['classes'], ['--targets', 'features'], ['--targets classes', 'features is asked for']),
    (['pooled'], ['--targets', 'classes'], ['--targets features', 'classes is asked for']),
    (['grid'], ['--feature-grid', '3'], ['--feature-grid 2', '3 is asked for']),
    (['grid'], ['--model', 'test_vit', '--model-kwargs', 'patch_size=64'], ['student', '1x1 cells', '2x2', '--model']),
    (['pooled'], ['--feature-loss', 'l7'], ['--feature-loss', *FEATURE_LOSSES]),
    (['pooled'], ['--projector', 'deep'], ['--projector', 'linear', 'mlp'])])
def test_what_a_training_refuses(stores, tmp_path, capsys, one_sentence, logits, flags, words):
    argv = [*STUDENT, '--output', tmp_path, *flags]
    argv += ['--logits', *(stores / name for name in logits)] if logits else ['--img-size', '64']
    one_sentence(refusal(train_distill.main, argv, capsys), *words)


def test_a_map_that_is_smaller_than_the_grid_is_refused(refused):
    with refused('student', '2x2 cells', '4x4'):
        FeatureStudent(timm.create_model('test_convnext', num_classes=0), 8, 4, (64, 64))
