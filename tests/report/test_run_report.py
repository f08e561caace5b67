"""Reports of real short runs: their figures against brute force, what they survive, and runs side by side."""

import argparse
import csv
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader

from timm_tinyvit import cli
from timm_tinyvit.base.errors import InputError
from timm_tinyvit.data.classes import check_labels
from timm_tinyvit.data.dataset import SparseLogitDataset, collate
from timm_tinyvit.data.opening import open_store
from timm_tinyvit.data.sampler import EpochBatchSampler
from timm_tinyvit.data.sources import load_split
from timm_tinyvit.models.loading import Normalize
from timm_tinyvit.report import compare as run_comparison, plots, run as run_report
from timm_tinyvit.report.compare import compare_runs, mcnemar
from timm_tinyvit.report.run import write_run_report
from timm_tinyvit.report.run_folder import TrainedRun
from timm_tinyvit.store.ensemble import Ensemble
from timm_tinyvit.train.metrics import suffixed
from timm_tinyvit.train.evaluate import eval_loader
from timm_tinyvit.train.predictions import (
    Evaluation, Predictions, Recorder, confusion, keep_evaluation, samples_to_show, write_arrays,
)
from timm_tinyvit.train.teacher_comparison import StoredViews, compare_views
import train_distill
from support.flags import DATA, small_data
from support.runs import write_record

SMALL = [
    *small_data(96, 63), '--crop-pct', '1', '--model', 'test_resnet', '--epochs', '2', '--warmup-epochs', '0', '-b',
    '16', '--lr', '3e-2']


@pytest.fixture(scope='module')
def runs(tmp_path_factory, teacher):
    """Folder of a distilled run with averaged weights, `one`, and of a plain one at another rate, `two`."""
    output = tmp_path_factory.mktemp('runs')
    train_distill.main([
        *SMALL, '--teacher', teacher, '--logits', str(output / 'logits'), '--topk', '3', '--shard-size', '40',
        '--model-ema', '--model-ema-decay', '0.5', '--output', str(output), '--experiment', 'one'])
    train_distill.main([*SMALL, '--lr', '1e-2', '--output', str(output), '--experiment', 'two'])
    return output


@pytest.fixture
def no_plots(monkeypatch):
    """Pages are made without plots, which take most of their time."""
    for module in (plots, run_report, run_comparison):
        monkeypatch.setattr(module, 'can_plot', lambda: False)


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the distilled run, to be damaged."""
    shutil.copytree(runs / 'one', tmp_path / 'one')
    return tmp_path / 'one'


def fresh_probabilities(folder, split='test[:63]'):
    """Probabilities [N, C] of an exported model in plain timm, and the labels [N]."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model))
    rows = load_split(DATA, split, is_training=False)
    with torch.no_grad():
        logits = model(torch.stack([transform(row['image'].convert('RGB')) for row in rows]))
    return logits.double().softmax(1).numpy(), np.array(rows['label'])


def check_predictions(found, folder, split='test[:63]'):
    probs, labels = fresh_probabilities(folder, split)
    assert found.labels.tolist() == labels.tolist()
    assert found.ids.tolist() == np.argsort(-probs, axis=1)[:, :5].tolist()
    np.testing.assert_allclose(found.probs, -np.sort(-probs, axis=1)[:, :5], rtol=1e-4)
    np.testing.assert_allclose(found.label_log_probs, np.log(probs[np.arange(len(labels)), labels]), rtol=1e-4)
    return probs, labels


def expected_error(probs, right):
    """Expected calibration error, sample by sample."""
    bins = {}
    for prob, hit in zip(probs, right):
        bins.setdefault(max(math.ceil(prob * 15), 1), []).append((prob, hit))
    return sum(abs(sum(p for p, _ in part) - sum(hit for _, hit in part)) for part in bins.values()) / len(probs)


@pytest.mark.parametrize('ending', ['', '_ema'])
def test_a_run_keeps_what_its_last_weights_say_of_each_sample(runs, ending):
    found = Evaluation.read(runs / 'one' / f'predictions{ending}.npz')
    probs, labels = check_predictions(found.predictions, runs / 'one' / f'last{ending}')
    row = list(csv.DictReader(open(runs / 'one' / 'metrics.csv')))[-1]
    assert 100 * found.predictions.top(1) == pytest.approx(float(row[f'eval_top1{ending}']), abs=1e-4)
    assert 100 * found.predictions.top(5) == pytest.approx(float(row[f'eval_top5{ending}']), abs=1e-4)
    assert -found.predictions.label_log_probs.mean() == pytest.approx(float(row[f'eval_loss{ending}']), rel=1e-4)
    right = probs.argmax(1) == labels
    assert found.predictions.reliability().error == pytest.approx(expected_error(probs.max(1), right), abs=1e-5)
    matrix = confusion(found.predictions, np.arange(10))
    assert matrix.tolist() == [
        [sum((labels == label) & (probs.argmax(1) == other)) for other in range(10)] + [0] for label in range(10)]
    assert (found.epoch, found.num_classes, found.name(9)) == (1, 10, 'Ankle boot')
    assert found.split['num_samples'] == 63


def test_the_samples_that_are_shown_are_the_surest_with_the_pictures_that_the_model_saw(runs):
    found = Evaluation.read(runs / 'one' / 'predictions.npz')
    said = found.predictions
    right, wrong = samples_to_show(said)
    assert said.right[right].all() and not said.right[wrong].any()
    assert said.confidence[wrong].min() >= np.sort(said.confidence[~said.right])[-len(wrong)] and len(wrong) == 12
    classes = set(said.labels[said.right].tolist())
    assert set(said.labels[right].tolist()) == classes
    for label in classes:
        assert np.flatnonzero(said.right & (said.labels == label))[
            said.confidence[said.right & (said.labels == label)].argmax()] in right
    assert found.shown.tolist() == [*right, *wrong]
    rows = load_split(DATA, 'test[:63]', is_training=False)
    config = json.loads((runs / 'one' / 'last' / 'config.json').read_text())['pretrained_cfg']
    transform = create_transform(32, crop_pct=1., interpolation=config['interpolation'], normalize=False)
    for view, sample in zip(found.views, found.shown.tolist()):
        assert torch.equal(torch.from_numpy(view), transform(rows[sample]['image'].convert('RGB')))


def test_student_and_teacher_are_compared_on_views_of_the_store(runs):
    """The figures are those of the exported student, the teacher's records and its dense targets."""
    found = StoredViews.read(runs / 'one' / 'stored_views.npz')
    weights = TrainedRun.read(runs / 'one').weights
    store, replay = open_store(str(runs / 'logits'), {})
    data = SparseLogitDataset(load_split(DATA, 'train[:96]', is_training=True), replay, store)
    sampler = EpochBatchSampler(96, 16, 42, store_epochs=store.manifest.stored_epochs)
    sampler.set_epoch(1)
    batches = list(DataLoader(data, batch_sampler=sampler, collate_fn=collate))
    model = timm.create_model(f'local-dir:{runs / "one"}/{suffixed("last", weights)}', pretrained=True).eval()
    config = resolve_data_config({}, model=model)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ('mean', 'std'))
    with torch.no_grad():
        student = torch.cat([model((batch['view'] / 255 - mean) / std) for batch in batches]).double().log_softmax(1)
    teacher = torch.cat([store.codec.decode(batch['record']).densify() for batch in batches]).double()
    assert len(found.student) == 96 and found.epoch == 1
    assert found.student.labels.tolist() == torch.cat([batch['label'] for batch in batches]).tolist()
    assert found.student.best.tolist() == student.argmax(1).tolist()
    # Of classes that the codec made equally probable, any.
    best = torch.from_numpy(found.teacher.best).long()[:, None]
    assert torch.equal(teacher.gather(1, best)[:, 0], teacher.amax(1))
    np.testing.assert_allclose(found.teacher.probs[:, 0], teacher.amax(1), rtol=1e-4)
    divergence = (teacher * (teacher.log() - student)).sum(1)
    np.testing.assert_allclose(found.divergence, divergence, rtol=1e-3, atol=1e-5)
    page = (runs / 'one' / 'report.html').read_text()
    agreement = 100 * (student.argmax(1) == best[:, 0]).double().mean()
    assert f'of {agreement:.1f}%' in page and f'is {divergence.mean():.4f} nats' in page
    assert (found.weights, found.stored_epochs) == (weights, [1]) and 'of epoch 2, stored epoch 1: the student' in page


@pytest.mark.parametrize('weights, whose', [('student', 'student'), ('ema', 'student (averaged weights)')])
def test_the_page_says_whose_weights_stand_beside_the_teacher(run, no_plots, weights, whose):
    found = StoredViews.read(run / 'stored_views.npz')
    replace(found, weights=weights, stored_epochs=[3, 4]).write(run / 'stored_views.npz')
    page = write_run_report(run).read_text()
    assert f'stored epoch 3 and 4: the {whose} and the teacher agree' in page
    assert f'<th class=number>{whose}</th><th class=number>teacher</th>' in page


@pytest.mark.parametrize('ending, whose', [('', ''), ('_ema', ' (averaged weights)')])
def test_the_page_says_whose_predictions_it_shows(run, ending, whose):
    set_last_accuracy(run, ending)
    page = write_run_report(run).read_text()
    assert f'after epoch 2{whose}: top-1' in page and f'student{whose}, ECE' in page


def set_last_accuracy(folder, ending):
    """Let the weights of this ending have ended higher than the others."""
    rows = list(csv.DictReader(open(folder / 'metrics.csv')))
    for other in ('', '_ema'):
        rows[-1][f'eval_top1{other}'] = '50' if other == ending else '10'
    with open(folder / 'metrics.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_views_of_an_image_in_a_batch_are_of_several_stored_epochs(runs, run):
    """A store of 2 epochs, and 2 views per image in the fourth epoch of a training."""
    store, replay = open_store(str(runs / 'logits'), {})
    data = SparseLogitDataset(load_split(DATA, 'train[:96]', is_training=True), replay, store)
    batch = collate(data.__getitems__([(0, index) for index in range(4)]))
    model = timm.create_model(f'local-dir:{run}/last', pretrained=True)
    found = [compare_views(
        model, Normalize(*[(0.5, 0.5, 0.5)] * 2), [batch], store, Accelerator(cpu=True), epoch,
        views_per_image=views).stored_epochs for epoch, views in ((3, 2), (3, 1), (0, 1))]
    assert found == [[0, 1], [1], [0]]


def test_views_are_looked_at_until_they_are_enough(runs, run, monkeypatch):
    """And what the teachers of an ensemble say is their average."""
    monkeypatch.setattr('timm_tinyvit.train.teacher_comparison.NUM_VIEWS', 20)
    store, replay = open_store(str(runs / 'logits'), {})
    data = SparseLogitDataset(load_split(DATA, 'train[:96]', is_training=True), replay, store)
    batches = [collate(data.__getitems__([(epoch, index) for index in range(16)])) for epoch in (0, 1)]
    records = [batch['record'] for batch in batches]
    teacher = sum(store.codec.decode(record).densify() for record in records) / 2
    batch = {**batches[0], 'record': torch.cat(records, dim=1)}
    model = timm.create_model(f'local-dir:{run}/last', pretrained=True)
    normalize = Normalize(*[(0.5, 0.5, 0.5)] * 2)
    arguments = model, normalize, [batch] * 3, Ensemble([store, store]), Accelerator(cpu=True), 0
    found = compare_views(*arguments)
    assert len(found.student) == len(found.teacher) == len(found.divergence) == 32
    np.testing.assert_allclose(found.teacher.probs[:, 0], teacher.amax(1).repeat(2), rtol=1e-4)
    with torch.no_grad():
        student = model(normalize(batch['view'])).log_softmax(1)
    divergence = (teacher * (teacher.log() - student)).sum(1)
    np.testing.assert_allclose(found.divergence, divergence.repeat(2), rtol=1e-3, atol=1e-5)
    assert compare_views(*arguments, stopped=lambda: True) is None


@pytest.mark.parametrize('labels, label_classes, kept', [
    ({}, None, range(16)), ({'label2': torch.arange(16)}, 10, [2]), ({'label': torch.arange(16) + 5}, None, range(5)),
    ({}, 5, []),
], ids=['plain', 'mixed', 'of no class', 'of other classes'])
def test_a_view_without_a_label_of_the_teachers_is_not_scored(runs, run, labels, label_classes, kept):
    store, replay = open_store(str(runs / 'logits'), {})
    data = SparseLogitDataset(load_split(DATA, 'train[:96]', is_training=True), replay, store)
    batch = {**collate(data.__getitems__([(0, index) for index in range(16)])), 'label': torch.full((16,), 2), **labels}
    model = timm.create_model(f'local-dir:{run}/last', pretrained=True)
    found = compare_views(
        model, Normalize(*[(0.5, 0.5, 0.5)] * 2), [batch], store, Accelerator(cpu=True), 0, label_classes)
    assert np.flatnonzero(found.student.labels >= 0).tolist() == list(kept)
    assert len(found.student.labelled()) == len(found.teacher.labelled()) == len(kept) and len(found.divergence) == 16
    found.write(run / 'stored_views.npz')
    page = write_run_report(run).read_text()
    assert ('There is no accuracy' in page) == (not kept) and 'Both on the same 16 views' in page


def test_the_page_says_what_the_metrics_and_predictions_say(runs):
    page = (runs / 'one' / 'report.html').read_text()
    rows = list(csv.DictReader(open(runs / 'one' / 'metrics.csv')))
    for ending in ('', '_ema'):
        best = max(range(2), key=lambda epoch: float(rows[epoch][f'eval_top1{ending}']))
        best = f'{float(rows[best][f"eval_top1{ending}"]):.2f}% in epoch {best + 1}'
        assert f'{best} (selected on this validation set)' in page
    run = TrainedRun.read(runs / 'one')
    said = run.evaluation.predictions
    error = expected_error(said.confidence, said.right)
    assert f'expected calibration error {100 * error:.1f}%' in page
    assert page.count('<figure class="plot">') == 6 + 2 + 1 and 'images per second' in page
    assert page.count('class="picture"') == len(run.evaluation.shown)
    # Short enough for one line, so that all bars begin at one height.
    assert f'>{run.evaluation.name(said.labels[run.evaluation.shown[0]])} #{run.evaluation.shown[0]}<' in page
    assert 'distilled, 2 epochs' in page
    # Settings that are not the defaults come first, and not the others with them.
    table = re.search(r'Settings</h2>(.*?)</table>', page, re.DOTALL)[1]
    assert 'model_ema_decay' in table and 'weight_decay' not in table and 'weight_decay: 0.05' in page
    for name in (f'{torch.__version__}', timm.__version__, 'accelerate', 'processes'):
        assert name in page
    record = json.loads((runs / 'one' / 'run.json').read_text())
    text = re.sub('base64,[^"]*', '', page) + json.dumps(record['launches'])
    assert not re.search(rf'\b{re.escape(socket.gethostname())}\b', text) and f'{Path.home()}/' not in text
    assert 'labels alone' in (runs / 'two' / 'report.html').read_text()


def test_the_command_in_the_report_gives_its_best_accuracy(runs, capsys):
    run = TrainedRun.read(runs / 'one')
    program, *argv = shlex.split(os.path.expanduser(run.evaluation_command()))
    assert program == 'timm-tinyvit'
    capsys.readouterr()
    cli.main([*argv, '-j', '0', '--quiet'])
    said = capsys.readouterr().out
    assert float(re.search(r'top1 ([\d.]+)', said)[1]) == pytest.approx(
        run.best(run.weights)[1], abs=1e-3)


def rank_trains(environment, argv, out):
    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Generating the splits has a bar of its own.
    datasets.config.HF_DATASETS_CACHE = Path(f'{out}.cache')
    train_distill.main(argv)


def test_two_ranks_keep_the_predictions_of_one_and_only_the_first_speaks(warm_processes, tmp_path):
    """Of 63 samples the ranks have 32 and 31."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    argv = [*SMALL, '--epochs', '1', '-b', '8', '--output', str(tmp_path), '--experiment', 'run']
    ranks = [warm_processes.Process(target=rank_trains, args=(
        {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1',
         'MASTER_PORT': str(port)}, argv, str(tmp_path / f'out{rank}'))) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
    said = [(tmp_path / f'out{rank}').read_text() for rank in range(2)]
    assert [rank.exitcode for rank in ranks] == [0, 0], said
    assert said[1] == '' and len(said[0].splitlines()) == 3 and 'finished:' in said[0]
    assert '\r' not in said[0] and '\x1b' not in said[0]
    check_predictions(Evaluation.read(tmp_path / 'run' / 'predictions.npz').predictions, tmp_path / 'run' / 'last')


def test_a_run_that_is_stopped_and_goes_on_ends_with_a_whole_report(tmp_path, monkeypatch, capsys):
    """A real SIGTERM in the second epoch; the report of what there is then, and another machine afterwards."""
    argv = [*SMALL, '--output', str(tmp_path), '--experiment', 'run']
    updates, clip = [], train_distill.clip_gradients

    def clip_and_stop(*args):
        updates.append(None)
        if len(updates) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(*args)

    monkeypatch.setattr(train_distill, 'clip_gradients', clip_and_stop)
    with pytest.raises(SystemExit) as exit:
        train_distill.main(argv)
    assert exit.value.code == 143
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert '1 of 2 epochs so far' in page and 'after epoch 1' in page
    monkeypatch.undo()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        train_distill.main(argv)
    finally:
        torch.set_num_threads(threads)
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert ', 2 epochs' in page and 'after epoch 2' in page
    launches = json.loads((tmp_path / 'run' / 'run.json').read_text())['launches']
    assert [launch['epoch'] for launch in launches] == [0, 1]
    assert f'{threads} → {threads + 1}' in page and re.findall('>From epoch (.*?)<', page) == ['1', '2']


def test_no_training_ends_for_want_of_a_report(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError('no room for\npictures')

    monkeypatch.setattr(train_distill, 'write_run_report', fail)
    monkeypatch.setattr('timm_tinyvit.train.evaluate.keep_evaluation', fail)
    train_distill.main([*SMALL, '--epochs', '1', '--quiet', '--output', str(tmp_path), '--experiment', 'run'])
    said = capsys.readouterr()
    assert said.out.startswith('finished:') and len(said.out.splitlines()) == 1
    assert said.err.splitlines() == [
        f'warning: {what} cannot be made: no room for; the training goes on'
        for what in ('the predictions for the report', 'the report of the run')]


def test_a_damaged_file_costs_its_part_of_the_report(run):
    (run / 'predictions.npz').write_bytes((run / 'predictions.npz').read_bytes()[:-200])
    (run / 'predictions_ema.npz').unlink()
    (run / 'stored_views.npz').write_bytes(b'')
    (run / 'run.json').write_text('{"version": 3, "launches": 3}')
    page = write_run_report(run).read_text()
    assert page.count('class="warning"') == 3 and str(run) not in page
    for words in ('There are no predictions', 'The environment is not known', '<figure class="plot">'):
        assert words in page, words


def test_what_is_no_run_gets_one_sentence(run, refused):
    with refused('has no metrics.csv'):
        write_run_report(run.parent)
    (run / 'metrics.csv').write_text('epoch,loss\nzero,1\n')
    with refused('not readable as the metrics'):
        write_run_report(run)
    with refused('name two or more'):
        compare_runs([run])


def test_names_of_classes_may_hold_any_character(run):
    found = Evaluation.read(run / 'predictions.npz')
    names = ['<script>alert(1)</script>', '$\\frac{1$', '_hidden', '"quoted" & more', '', 'шапка', 'x' * 60, '%', '{']
    about = {'epoch': 1, 'num_classes': 10, 'names': names, 'split': found.split}
    for ending in ('', '_ema'):
        write_arrays(run / f'predictions{ending}.npz', about, shown=found.shown, views=found.views,
                     **vars(found.predictions))
    page = write_run_report(run).read_text()
    assert '<script' not in page and '&lt;script&gt;alert(1)&lt;/script&gt;' in page
    assert 'шапка' in page and '$\\frac{1$' in page


def test_without_matplotlib_there_are_tables_and_pictures(run, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'matplotlib.figure', None)
    assert not plots.can_plot()
    page = write_run_report(run).read_text()
    assert '<svg' not in page and 'timm_tinyvit[plots]' in page
    assert page.count('class="picture"') > 12 and 'Confusion, in samples' in page and 'learning rate' in page
    assert 'timm_tinyvit[plots]' in _compared(run, run.parent / 'c.html')


def _compared(run, out):
    compare_runs([run, run], out)
    return out.read_text()


@pytest.mark.parametrize('num_classes', [1000, 21841])
def test_the_page_stays_small_with_many_classes_and_samples(run, num_classes):
    """50,000 samples; the pictures are noise, which no format makes small."""
    draw = np.random.default_rng(0)
    ids = draw.permuted(np.tile(np.arange(num_classes, dtype=np.int16)[:50], (50_000, 1)), axis=1)[:, :5]
    ids = (ids + draw.integers(num_classes, size=(50_000, 1)).astype(np.int16)) % num_classes
    probs = -np.sort(-draw.dirichlet(np.ones(6), 50_000), axis=1)[:, :5]
    labels = np.where(draw.random(50_000) < 0.8, ids[:, 0], draw.integers(num_classes, size=50_000)).astype(np.int64)
    said = Predictions(ids.astype(np.int16), probs.astype(np.float32), labels, np.log(probs[:, 0]).astype(np.float32))
    shown = np.concatenate(samples_to_show(said))
    names = [f'n{number:08d}, one of the very many animals or plants' for number in range(num_classes)]
    for ending in ('', '_ema'):
        write_arrays(run / f'predictions{ending}.npz', {
            'epoch': 1, 'num_classes': num_classes, 'names': names, 'split': {}}, shown=shown,
            views=draw.integers(256, size=(len(shown), 3, 128, 128), dtype=np.uint8), **vars(said))
    assert (run / 'predictions.npz').stat().st_size < 4e6
    page = write_run_report(run).read_text()
    assert len(page) < 2e6 and 'Confusion of the 10 worst classes' in page
    assert len(_compared(run, run.parent / 'c.html')) < 2e6


def test_two_runs_side_by_side(runs, tmp_path):
    text = compare_runs([runs / 'one', runs / 'two'], tmp_path / 'page.html')
    page = (tmp_path / 'page.html').read_text()
    one, two = (TrainedRun.read(runs / name) for name in ('one', 'two'))
    said = [run.evaluation.predictions for run in (one, two)]
    right = [found.ids[:, 0] == found.labels for found in said]
    counts = [int((right[0] == a)[right[1] == b].sum()) for a, b in ((1, 1), (1, 0), (0, 1), (0, 0))]
    line = next(line.split() for line in text.splitlines() if line.startswith('two'))
    agree = 100 * (said[0].ids[:, 0] == said[1].ids[:, 0]).mean()
    assert line[:6] == ['two', f'{agree:.1f}%', *map(str, counts)]
    last = [round(run.column('eval_top1')[-1][1], 2) for run in (one, two)]
    lines = [' '.join(line.split()) for line in text.splitlines()]
    assert f'last top-1 {last[0]:.2f}% {last[1]:.2f}% {last[1] - last[0]:+.2f}' in lines
    assert 'lr 0.03 0.01' in lines and 'weight_decay' not in text
    for label in range(10):
        mask = said[0].labels == label
        gain = 100 * (right[1][mask].mean() - right[0][mask].mean())
        if gain:
            assert re.search(
                rf'<td>{one.evaluation.name(label)}</td><td class=number>{mask.sum()}</td>.*?'
                rf'<td class=number>{re.escape(f"{gain:+.1f}")}</td>', page)
    assert page.count('<figure class="plot">') == 7 and 'one, averaged weights' in page
    # Each weights' calibration is their own.
    errors = [100 * found.predictions.reliability().error for found in one.evaluations.values()]
    error = 100 * two.evaluation.predictions.reliability().error
    assert f'calibration error {errors[0]:.2f}% {error:.2f}% {round(error, 2) - round(errors[0], 2):+.2f}' in lines
    assert f'calibration error, averaged {errors[1]:.2f}% -' in lines
    assert any(line.startswith('best top-1 (selected on this validation set) ') for line in lines)
    assert 'p (McNemar)' in text and 'p (McNemar)' in page
    for said in (text, page):
        assert 'another seed of the same settings may make a larger difference' in said
        # The store is one run's alone, so that its loss is another.
        assert 'The training losses of one and two are not the same quantity' in said and 'differ in logits.' in said
        assert str(runs) not in said
    losses = [f'{run.column("loss")[-1][1]:.4f}' for run in (one, two)]
    assert f'training loss {" ".join(losses)}' in lines
    assert 'Left out' not in text and 'Left out' not in page


def test_whose_weights_are_compared_is_said(run, runs, no_plots):
    for ending, whose in (('', ''), ('_ema', ' (averaged weights)')):
        set_last_accuracy(run, ending)
        page = _compared(run, run.parent / 'c.html')
        assert f'compared with {run.parent.name}/one (1){whose}</caption>' in page
        assert f'<td>{run.parent.name}/one (2){whose}</td>' in page
        text = compare_runs([runs / 'two', run])
        assert re.search(rf'^one{re.escape(whose)} +\d', text, re.MULTILINE)


@pytest.mark.parametrize('change, differs', [
    ({}, ''), ({'lr': 1.}, ''), ({'temperature': 2.}, 'temperature'), ({'alpha': 0.5}, 'alpha'),
    ({'logits': ['/else/logits']}, ''), ({'store_hash': 'another'}, 'logits'), ({'smoothing': 0.}, 'smoothing'),
    ({'mixup': 0.8}, 'mixup'), ({'cutmix': 1.}, 'cutmix'), ({'mixup_mode': 'elem'}, '')])
def test_losses_of_other_kinds_are_not_subtracted(runs, run, change, differs):
    write_record(run, change)
    lines = [' '.join(line.split()) for line in compare_runs([runs / 'one', run]).splitlines()]
    loss = f'{TrainedRun.read(run).column("loss")[-1][1]:.4f}'
    assert f'training loss {loss} {loss}' + ('' if differs else ' +0.0000') in lines
    assert any(line.endswith(f'the runs differ in {differs}.') for line in lines) == bool(differs)


def write_evaluation(folder, **changes):
    found = Evaluation.read(folder / 'predictions.npz')
    about = {'epoch': 1, 'num_classes': 10, 'names': None, 'split': found.split}
    for ending in ('', '_ema'):
        write_arrays(folder / f'predictions{ending}.npz', about | changes, shown=found.shown, views=found.views,
                     **vars(found.predictions))


def test_runs_that_saw_other_samples_are_not_compared_one_by_one(runs, run):
    write_evaluation(run, split={'hash': 'another'})
    text = compare_runs([runs / 'two', run])
    assert 'not evaluated on the same samples' in text and 'only the first' not in text
    lines = [' '.join(line.split()) for line in text.splitlines()]
    # Nor are scores of other samples subtracted; what does not depend on them is.
    assert [line for line in lines if line.startswith('last top-1')][0].count('%') == 2
    assert not re.search(r'last (top-1|top-5|NLL) .*[+-]\d', text) and re.search(r'images per second .*[+-]\d', text)


@pytest.mark.parametrize('damage, name', [
    (lambda run: write_evaluation(run, split={'hash': 'another'}), 'one'),
    (lambda run: [file.unlink() for file in run.glob('predictions*.npz')], 'one (no predictions)')],
    ids=['other samples', 'no predictions'])
def test_a_run_that_cannot_be_compared_one_by_one_is_named(runs, run, no_plots, damage, name):
    damage(run)
    text = compare_runs([runs / 'two', run, runs / 'two'], run.parent / 'c.html')
    for said in (text, (run.parent / 'c.html').read_text()):
        assert f'Left out, as they were not evaluated on the same samples: {name}.' in said and 'only the first' in said


def test_only_names_that_repeat_are_numbered(runs, run):
    header = ' '.join(compare_runs([runs / 'one', runs / 'two', runs / 'two']).splitlines()[0].split())
    assert header == f'one {runs.name}/two (1) difference {runs.name}/two (2) difference'
    header = ' '.join(compare_runs([runs / 'one', runs / 'two', run]).splitlines()[0].split())
    assert header == f'{runs.name}/one two difference {run.parent.name}/one difference'


def test_differences_are_those_of_the_figures_that_are_shown(runs, run):
    """3.744 and 4.066 minutes are 3.74 and 4.07, and 0.33 apart."""
    folders = [run, run.parent / 'slower']
    shutil.copytree(run, folders[1])
    for folder, minutes in zip(folders, (3.744, 4.066)):
        (folder / 'metrics.csv').write_text(f'epoch,loss,seconds,images_per_second\n0,1,{60 * minutes},{minutes}\n')
    lines = [' '.join(line.split()) for line in compare_runs(folders).splitlines()]
    assert 'minutes of training 3.74 4.07 +0.33' in lines and 'images per second 3.74 4.07 +0.33' in lines


def test_what_the_store_decided_is_shown_and_no_difference_where_it_is_the_same(runs, tmp_path, no_plots):
    """One run gives the flags that the other takes from the store, which lies in another folder for it."""
    shutil.copytree(runs / 'logits', tmp_path / 'moved')
    short = [flag if flag != '2' else '1' for flag in SMALL]
    given, taken = ([*short, '--logits', str(store), '--output', str(tmp_path), '--experiment', name]
                    for store, name in ((runs / 'logits', 'given'), (tmp_path / 'moved', 'taken')))
    place = taken.index('--img-size')
    train_distill.main([*given, '--topk', '3', '--hflip', '0.5', '--scale', '0.08', '1', '--lr', '0.01'])
    train_distill.main(taken[:place] + taken[place + 2:])
    text = compare_runs([tmp_path / 'given', tmp_path / 'taken'])
    rows = text[text.index('setting '):text.index('compared with')].strip().splitlines()
    assert [line.split() for line in rows] == [['setting', 'given', 'taken'], ['lr', '0.01', '0.03']]
    shown, plain = TrainedRun.read(tmp_path / 'taken').shown_settings()
    assert {name: shown[name] for name in ('img_size', 'topk', 'teacher_dtype')} == {
        'img_size': '32', 'topk': '3', 'teacher_dtype': 'float32'}
    assert plain['scale'] == '0.08 1.0' and plain['codec'] == 'compact' and 'shard_size' not in {**shown, **plain}


def test_samples_of_a_folder_are_named_by_their_files(run, tmp_path, fashion, no_plots):
    for number, row in enumerate(fashion.select(range(12))):
        file = tmp_path / 'photos' / 'val' / str(row['label'] % 2) / f'photo {number}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        row['image'].save(file)
    rows = load_split(str(tmp_path / 'photos'), None, is_training=False)
    with pytest.raises(InputError, match=r'sample \d+ \(val/1/photo \d+\.png\) of --val-split has label 1'):
        check_labels(rows, 'label', 1, '--val-split')
    config = {'input_size': (3, 32, 32), 'crop_pct': 1., 'crop_mode': 'center', 'interpolation': 'bilinear'}
    args = argparse.Namespace(input_key=None, target_key=None, validation_batch_size=4, workers=0)
    loader, recorder = eval_loader(rows, config, args, 0, 1), Recorder()
    for batch in loader:
        recorder.add(torch.randn(len(batch['label']), 2), batch['label'])
    keep_evaluation(run / 'predictions.npz', recorder.gather(), loader, 2, epoch=1)
    (run / 'predictions_ema.npz').unlink()
    page = write_run_report(run).read_text()
    files = [os.path.relpath(row['path'], tmp_path / 'photos') for row in rows.cast_column(
        'image', datasets.Image(decode=False))['image']]
    assert all(f'>{file.split("/")[1]} {file}<' in page for file in files) and str(tmp_path / 'photos') not in page


def test_settings_name_no_folder(runs, run, no_plots):
    """Of the same name elsewhere, the difference is still said."""
    places = {'logits': ['/data/alice/logits'], 'dataset': '/data/alice/fashion_mnist', 'teacher': '~/alice/teacher/',
              'initial_checkpoint': '../alice/best', 'model': 'local-dir:/data/alice/model'}
    write_record(run, places)
    text = _compared(run, run.parent / 'c.html') + compare_runs([runs / 'one', run], run.parent / 'd.html')
    text += (run.parent / 'd.html').read_text() + re.sub('(?s)<pre>.*?</pre>', '', write_run_report(run).read_text())
    assert 'alice' not in text and str(runs) not in text
    assert re.search(r'^dataset +fashion_mnist +fashion_mnist \(in another folder\)$', text, re.MULTILINE)
    # What the store decided is known by the store, not by what the flags said.
    assert not re.search('^(logits|topk) ', text, re.MULTILINE)
    assert 'local-dir:model' in text and '>teacher<' in text and '>best<' in text


@pytest.mark.parametrize('value, expected', [
    *((name, name) for name in ('ORG/NAME', 'hf://datasets/ORG/NAME', 'hf-hub:ORG/NAME', 'train[:10%]', '/', '~')),
    ('/data/a/b/', 'b'), ('./x/y', 'y'), (['/a/b', '/c/d'], 'b d'), (None, ''), (1e-3, '0.001')])
def test_only_the_last_name_of_a_path_is_shown(value, expected):
    run = TrainedRun(Path('x'), [], {'data_dir': value}, [], None, {}, None)
    assert run.shown_settings()[0]['data_dir'] == expected


@pytest.mark.parametrize('one, other', [(0, 0), (1, 0), (3, 12), (40, 55), (7, 7)])
def test_mcnemar_is_the_binomial_sum(one, other):
    total = one + other
    tail = sum(math.comb(total, count) for count in range(min(one, other) + 1)) / 2 ** total
    assert mcnemar(one, other) == pytest.approx(min(1, 2 * tail))


def test_mcnemar_of_many_samples_is_finite():
    assert 0 < mcnemar(20_000, 20_300) < 1 and mcnemar(10_000, 30_000) == pytest.approx(0, abs=1e-300)
