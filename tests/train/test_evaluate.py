"""`timm-tinyvit eval` against the run that made the weights, and against timm's own transform and model."""

import argparse
import csv
import shutil
from pathlib import Path

import datasets
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config

import train_distill
from timm_tinyvit import cli
from timm_tinyvit.data.classes import is_imagenet1k
from timm_tinyvit.data.sources import class_names, load_split
from timm_tinyvit.models.imagenet22k import NUM_CLASSES_22K, imagenet1k_in_22k
from support.flags import DATA
from support.golden_weights import golden
from support.programs import refusal
from timm_tinyvit.models.saving import export_model
from timm_tinyvit.models.tiny_vit import rename_official
from timm_tinyvit.report.run_folder import TrainedRun
from timm_tinyvit.train import evaluate
from timm_tinyvit.train.evaluate import eval_config

COMMON = ['--dataset', DATA, '--val-split', 'test[:32]', '-j', '0', '--quiet', '-b', '8']
SMALL = [*COMMON, '--model', 'test_efficientnet']


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Path:
    """A run with averaged weights, at 48 pixels."""
    output = tmp_path_factory.mktemp('runs')
    train_distill.main([
        *SMALL, '--train-split', 'train[:32]', '--img-size', '48', '--epochs', '1', '--warmup-epochs', '0', '--lr',
        '1e-2', '--model-ema', '--model-ema-decay', '0.5', '--output', str(output), '--experiment', 'run'])
    return output / 'run'


def evaluated(capsys, *argv, common=SMALL) -> dict[str, float]:
    capsys.readouterr()
    cli.main(['eval', *common, *argv])
    line = capsys.readouterr().out.strip().splitlines()[-1]
    return {name: float(value) for name, value in (part.split() for part in line.split(', '))}


def test_eval_repeats_what_the_run_has_said_of_both_its_weights(run, capsys):
    row, = csv.DictReader(open(run / 'metrics.csv'))
    checkpoint = sorted(run.glob('checkpoint-*.pt'))[-1]
    for weights, ending in ((run / 'last', ''), (checkpoint, ''), (run / 'last_ema', '_ema')):
        found = evaluated(capsys, str(weights), '--img-size', '48')
        assert found == {name: pytest.approx(float(row[f'eval_{name}{ending}']), abs=6e-4) for name in found}
        assert set(found) == {'loss', 'top1', 'top5'}
    assert row['eval_loss'] != row['eval_loss_ema']


def test_eval_takes_size_and_crop_from_the_folder_of_the_weights(run, capsys, tmp_path, one_sentence):
    row, = csv.DictReader(open(run / 'metrics.csv'))
    for weights in (run / 'last', run / 'last' / 'model.safetensors'):
        found = evaluated(capsys, str(weights))
        assert found['loss'] == pytest.approx(float(row['eval_loss']), abs=6e-4)
    shutil.copytree(run / 'last', tmp_path / 'last')
    (tmp_path / 'last' / 'config.json').write_text('[]')
    with pytest.raises(SystemExit):
        evaluated(capsys, str(tmp_path / 'last'))
    one_sentence(capsys.readouterr().err.strip(), 'config.json')


def test_eval_takes_the_model_from_the_folder_of_the_weights(run, capsys, tmp_path, one_sentence):
    checkpoint = str(sorted(run.glob('checkpoint-*.pt'))[-1])
    for weights in (str(run / 'last_ema'), str(run / 'last' / 'model.safetensors'), checkpoint):
        assert evaluated(capsys, weights, common=COMMON) == evaluated(capsys, weights)
    student = timm.create_model('tiny_vit_5m_224', embed_dims=(16, 32, 32, 64), num_heads=(1, 1, 1, 2), num_classes=10)
    student.set_input_size((64, 64))
    export_model(tmp_path / 'small', student, data_config={'input_size': (3, 64, 64)})
    assert set(evaluated(capsys, str(tmp_path / 'small'), common=COMMON)) == {'loss', 'top1', 'top5'}
    config = tmp_path / 'small' / 'config.json'
    config.write_text(config.read_text().replace('tiny_vit_5m_224', 'tiny_vit_6m'))
    with pytest.raises(SystemExit):
        evaluated(capsys, str(tmp_path / 'small'), common=COMMON)
    one_sentence(capsys.readouterr().err.strip(), 'local-dir:', 'tiny_vit_6m', '--model')


def test_of_epochs_of_equal_accuracy_that_of_the_smallest_loss_is_the_best(tmp_path, monkeypatch):
    losses, real = iter([0.9, 0.5, 0.5, 0.7]), evaluate.accuracy
    monkeypatch.setattr(evaluate, 'accuracy', lambda *args: real(*args) | {'top1': 50., 'loss': next(losses)})
    train_distill.main([
        *COMMON, '--train-split', 'train[:16]', '--img-size', '32', '--model', 'test_resnet', '--epochs', '4',
        '--checkpoint-hist', '4', '--output', str(tmp_path), '--experiment', 'run'])
    best = load_file(tmp_path / 'run' / 'best' / 'model.safetensors')
    same = [all(torch.equal(tensor, best[name]) for name, tensor in torch.load(file)['model'].items())
            for file in sorted((tmp_path / 'run').glob('checkpoint-*.pt'))]
    assert same == [False, True, False, False]
    assert TrainedRun.read(tmp_path / 'run').best('student') == (2, 50.)


def test_eval_prepares_images_as_timm_does(run, capsys):
    found = evaluated(
        capsys, str(run / 'last'), '--img-size', '40', '--crop-pct', '0.8', '--crop-mode', 'squash',
        '--interpolation', 'bilinear')
    model = timm.create_model(f'local-dir:{run / "last"}', pretrained=True).eval()
    flags = dict(img_size=40, crop_pct=0.8, crop_mode='squash', interpolation='bilinear')
    transform = create_transform(**resolve_data_config(flags, model=model))
    rows = datasets.load_dataset('parquet', data_files=f'{DATA}/test.parquet', split='train[:32]')
    with torch.no_grad():
        logits = model(torch.stack([transform(row['image'].convert('RGB')) for row in rows]))
    labels = torch.tensor(rows['label'])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert found['loss'] == pytest.approx(loss, abs=2e-3)
    for k in (1, 5):
        hits = (logits.topk(k).indices == labels[:, None]).any(1)
        assert found[f'top{k}'] == pytest.approx(100 * hits.double().mean().item(), abs=1e-2)


def test_size_and_crop_for_tests_are_those_of_timms_validation():
    model = timm.create_model('resnet10t', num_classes=10)
    args = argparse.Namespace(crop_pct=None, crop_mode=None, interpolation=None)
    assert [model.pretrained_cfg[name][-1] for name in ('input_size', 'test_input_size')] == [176, 224]
    for use_test_size in (True, False):
        assert eval_config(args, model, use_test_size=use_test_size) == resolve_data_config(
            {}, model=model, use_test_size=use_test_size)
    assert eval_config(args, model, (64, 64), use_test_size=True)['input_size'] == (3, 64, 64)


@pytest.mark.parametrize('largest, num_names, expected', [
    (998, None, False), (999, None, True), (1000, None, False), (5, 1000, True), (999, 1001, False)])
def test_imagenet1k_is_known_by_the_number_of_its_classes(largest, num_names, expected):
    rows = datasets.Dataset.from_dict({'label': [0, largest]})
    if num_names:
        rows = rows.cast_column('label', datasets.ClassLabel(num_names))
    assert is_imagenet1k(rows, 'label') == expected


def test_a_classifier_of_22k_is_scored_on_the_classes_of_1k(tmp_path, capsys):
    """The labels are what the official class map makes of the best of 22k's scores for them."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=NUM_CLASSES_22K).eval()
    export_model(tmp_path / 'model', model)
    rows = datasets.load_dataset('parquet', data_files=f'{DATA}/test.parquet', split='train[:16]')
    transform = create_transform(**resolve_data_config(dict(img_size=32), model=model))
    with torch.no_grad():
        scores = model(torch.stack([transform(row['image'].convert('RGB')) for row in rows]))
    columns = torch.tensor([index if index >= 0 else NUM_CLASSES_22K for index in imagenet1k_in_22k()])
    labels = torch.cat([scores, torch.zeros(16, 1)], 1)[:, columns].argmax(1).tolist()
    names = datasets.ClassLabel(names=[f'class {number}' for number in range(1000)])
    rows = rows.remove_columns('label').add_column('label', labels).cast_column('label', names)
    (tmp_path / 'data').mkdir()
    rows.to_parquet(tmp_path / 'data' / 'test.parquet')
    found = evaluated(capsys, '--val-dataset', str(tmp_path / 'data'), '--val-split', 'test', '--model', 'test_resnet',
                      '--img-size', '32', str(tmp_path / 'model'))
    assert found['top1'] == 100


def test_labels_of_fewer_classes_than_the_model_has_are_told(run, capsys, tmp_path):
    torch.manual_seed(0)
    export_model(tmp_path / 'model', timm.create_model('test_resnet', num_classes=12))
    cli.main(['eval', str(tmp_path / 'model'), *COMMON, '--img-size', '32'])
    assert '--val-split has labels of 10 classes, the model predicts 12: its accuracy' in capsys.readouterr().err


@pytest.mark.parametrize('classes', [list(range(9, -1, -1)), [3, 1, 4, 0, 9, 8, 2, 6, 7, 5], [7, 2, 5]])
def test_classes_are_evaluated_by_their_names(classes, run, capsys, tmp_path):
    rows = load_split(DATA, 'test[:32]', is_training=False)
    rows = rows.select([row for row, label in enumerate(rows['label']) if label in classes])
    names = class_names(rows, 'label')
    for name, order in (('same', range(10)), ('other', classes)):
        (tmp_path / name).mkdir()
        labels = [list(order).index(label) for label in rows['label']]
        feature = datasets.ClassLabel(names=[names[label] for label in order])
        rows.remove_columns('label').add_column('label', labels, feature=feature).to_parquet(
            tmp_path / name / 'validation.parquet')
    found = [evaluated(capsys, str(run / 'last'), common=[
        '--dataset', str(tmp_path / name), '-j', '0', '--quiet', '-b', '8']) for name in ('same', 'other')]
    assert found[0] == found[1]


def test_a_checkpoint_is_evaluated_as_what_its_run_exported(run, capsys):
    checkpoint, = run.glob('checkpoint-*.pt')
    flags = ['--model', 'test_efficientnet', '--val-split', 'test[:40]']
    assert evaluated(capsys, *flags, str(checkpoint)) == evaluated(capsys, *flags, str(run / 'last'))


def test_an_official_checkpoint_is_evaluated_under_its_own_names(tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model('tiny_vit_5m_224', num_classes=10)
    export_model(tmp_path / 'model', model)
    known = golden('tinyvit')['names']
    weights = model.state_dict()
    official = {theirs: weights[ours] for ours, theirs in rename_official({name: name for name in known}).items()}
    torch.save({'model': official}, tmp_path / 'official.pth')
    flags = ['--model', 'tiny_vit_5m_224', '--img-size', '64', '--val-split', 'test[:8]']
    assert evaluated(capsys, *flags, str(tmp_path / 'official.pth')) == evaluated(
        capsys, *flags, str(tmp_path / 'model'))


@pytest.mark.parametrize('argv, words', [
    ([], 'no weights to evaluate'),
    (['/nowhere/last'], 'there is no file /nowhere/last'),
    (['{run}/last', '--model', 'test_resnet'], 'are of another model'),
    (['{run}/last', '--num-classes', '5'], 'are of another model'),
    (['{run}/last', '--val-split', 'exam'], 'no split exam'),
], ids=['none', 'no file', 'other model', 'other classes', 'no split'])
def test_what_cannot_be_evaluated_gets_one_sentence(run, capsys, one_sentence, argv, words):
    argv = ['eval', *SMALL, *(argument.format(run=run) for argument in argv)]
    one_sentence(refusal(cli.main, argv, capsys), words)
