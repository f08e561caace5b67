"""Runs made by hand: what pages, comparisons and plots say of metrics and predictions whose figures are known."""

import argparse
import html
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from support.runs import write_record

from timm_tinyvit.report import compare as run_comparison, plots, run as run_report
from timm_tinyvit.report.compare import compare_runs
from timm_tinyvit.report.plots import plot_metrics
from timm_tinyvit.report.run import write_run_report
from timm_tinyvit.report.run_folder import TrainedRun
from timm_tinyvit.train.calibration import calibration
from timm_tinyvit.train.evaluate import eval_loader
from timm_tinyvit.train.metrics import read_metrics
from timm_tinyvit.train.predictions import Evaluation, Predictions, Recorder, keep_evaluation, write_arrays
from timm_tinyvit.train.teacher_comparison import StoredViews

METRICS = """\
epoch,loss,lr,eval_loss,eval_top1,eval_top5,eval_loss_ema,eval_top1_ema,eval_top5_ema,seconds,data_wait,images_per_second
0,2,0.1,1.5,50,90,1.6,40,85,60,0.5,100
1,1.5,0.05,1.25,60,95,1.3,61,96,60,0.1,400
2,1.4,0.01,1.3,60,94,1.2,55,97,240,0.2,500
"""
LABELS = [0, 0, 0, 0, 1, 1, 2, 3, 3, 3]
BEST = [0, 0, 1, 1, 0, 1, 5, 3, 3, 3]
SURE = [0.9, 0.8, 0.7, 0.6, 0.5, 0.55, 0.65, 0.99, 0.97, 0.3]


def predictions(labels, best, sure, num_classes=6):
    """Of 6 classes, or 5: what the best one leaves is spread evenly over the others, the label last of them."""
    ids, probs, logs = [], [], []
    for label, first, share in zip(labels, best, sure):
        others = sorted({*range(num_classes)} - {first}, key=lambda other: (other == label, other))
        ids.append([first, *others[:4]])
        probs.append([share, *[(1 - share) / 5] * 4])
        logs.append(math.log(share if label == first else (1 - share) / 5) if label >= 0 else 0.)
    return Predictions(
        np.array(ids), np.array(probs, dtype=np.float32), np.array(labels), np.array(logs, dtype=np.float32))


@pytest.fixture
def write_run(tmp_path, monkeypatch):
    """Write the folder of a run; pages are made without plots."""
    for module in (plots, run_report, run_comparison):
        monkeypatch.setattr(module, 'can_plot', lambda: False)

    def write(name='one', metrics=METRICS, best=BEST, num_classes=6, settings=None, times=1):
        folder = tmp_path / name
        folder.mkdir()
        (folder / 'metrics.csv').write_text(metrics)
        if settings:
            write_record(folder, settings)
        write_arrays(
            folder / 'predictions.npz',
            {'epoch': 2, 'num_classes': num_classes, 'names': list('abcdef'), 'split': {'num_samples': 10}},
            shown=np.arange(10), views=np.zeros((10, 3, 4, 4), dtype=np.uint8),
            **vars(predictions(LABELS * times, best * times, SURE * times, num_classes)))
        return folder

    return write


def facts(page):
    return {html.unescape(name): html.unescape(value)
            for name, value in re.findall('<th scope="row">(.*?)</th><td>(.*?)</td>', page)}


def table(page, *header):
    """The cells of the table whose headings begin with these, row by row."""
    names = ''.join(f'<th[^>]*>{re.escape(name)}</th>' for name in header)
    found, = re.findall(f'<thead><tr>{names}.*?</table>', page, re.DOTALL)
    return [re.findall('<t[dh][^>]*>(.*?)</t[dh]>', row) for row in re.findall('<tr>(.*?)</tr>', found)]


def squeezed(text):
    return [' '.join(line.split()) for line in text.splitlines()]


def test_the_result_is_that_of_the_metrics(write_run):
    """Of equal epochs the first is the best; waiting is weighted by the seconds of the epochs."""
    stores = ['/stores/one', 'hf://datasets/ORG/two']
    page = write_run_report(write_run(settings={'epochs': 2, 'cooldown_epochs': 3, 'logits': stores})).read_text()
    assert facts(page).items() >= {
        'best top-1': '60.00% in epoch 2 (selected on this validation set)',
        'last top-1': '60.00%, top-5 94.00%, NLL 1.3000',
        'best top-1 of the averaged weights': '61.00% in epoch 2 (selected on this validation set)',
        'last top-1 of the averaged weights': '55.00%, top-5 97.00%, NLL 1.2000',
        'training': '6.0 minutes, 23% of it waiting for data', 'speed': '400 images/s',
        'learned from': 'one, two'}.items()
    assert ', 3 of 5 epochs so far' in page
    assert table(page, 'epoch') == [
        ['epoch', 'loss', 'top-1', 'averaged', 'learning rate'], ['1', '2', '50', '40', '0.1'],
        ['2', '1.5', '60', '61', '0.05'], ['3', '1.4', '60', '55', '0.01']]


def test_top5_of_five_classes_is_left_out(write_run):
    """It is always 100%."""
    runs = [write_run(best=[0] * 10, num_classes=5), write_run('two', best=[0] * 10, num_classes=5)]
    assert facts(write_run_report(runs[0]).read_text())['last top-1'] == '60.00%, NLL 1.3000'
    assert 'top-5' not in compare_runs(runs)


@pytest.mark.parametrize('seconds, expected', [(59, '59 seconds'), (90, '1.5 minutes'), (9000, '2.5 hours')])
def test_short_and_long_trainings_are_told_in_their_units(write_run, seconds, expected):
    page = write_run_report(write_run(metrics=f'epoch,loss,seconds\n0,1,{seconds}\n')).read_text()
    assert facts(page)['training'].startswith(f'{expected}, ')


def test_what_is_not_finite_is_in_no_column():
    rows = [{'epoch': 0., 'loss': math.nan}, {'epoch': 1., 'loss': 2.}, {'epoch': 2., 'lr': 1.}]
    run = TrainedRun(Path('x'), rows, {}, [], None, {}, None)
    assert run.column('loss') == [(2, 2.)] and run.best('student') is None


@pytest.mark.parametrize('text', ['', 'epoch,loss\n', 'epoch,loss\nnan,1\n', 'epoch,loss\n,1\n', 'loss\n1\n'])
def test_metrics_without_an_epoch_are_refused(tmp_path, refused, text):
    (tmp_path / 'metrics.csv').write_text(text)
    with refused('metrics.csv is not readable as the metrics of a run'):
        read_metrics(tmp_path)


def test_mistakes_are_counted_by_hand(write_run):
    page = write_run_report(write_run()).read_text()
    said = predictions(LABELS, BEST, SURE)
    assert (f'10 samples of 6 classes, after epoch 3: top-1 60.00%, mean confidence {10 * sum(SURE):.1f}%, expected '
            f'calibration error ') in page
    assert f'NLL {-said.label_log_probs.mean():.4f}.' in page
    assert table(page, 'label', 'predicted as')[1:] == [
        ['a', 'b', '2', '50.0%'], ['b', 'a', '1', '50.0%'], ['c', 'f', '1', '100.0%']]
    # Of equal classes that with more samples comes first.
    assert table(page, 'class')[1:] == [
        ['c', '1', '0.0%', 'f'], ['a', '4', '50.0%', 'b'], ['b', '2', '50.0%', 'a'], ['d', '3', '100.0%', '-']]


def test_samples_are_shown_surest_first_with_what_the_label_has(write_run):
    page = write_run_report(write_run()).read_text()
    right, wrong = (
        re.findall(r'>([a-f] #\d)<', part)
        for part in re.split('Most confident (?:correct predictions, of different|wrong predictions)', page)[1:])
    assert right == ['d #7', 'd #8', 'a #0', 'a #1', 'b #5', 'd #9']
    assert wrong == ['a #2', 'c #6', 'a #3', 'b #4']
    bars = re.findall('<li class="(.*?)" style="--share:(.*?)" title="(.*?)">', page[page.index('c #6'):])[:5]
    assert bars == [('', '65.0%', 'f'), ('', '7.0%', 'a'), ('', '7.0%', 'b'), ('label', '7.0%', 'c'),
                    ('rest', '14.0%', 'all others')]


def test_student_and_teacher_are_told_apart(write_run):
    """Of three labelled views of four the student has two right, the teacher one of these."""
    labels = [0, 1, 2, -1]
    student, teacher = (predictions(labels, best, sure) for best, sure in (
        ([0, 1, 0, 0], [0.5, 0.6, 0.7, 0.9]), ([0, 0, 0, 1], [0.9, 0.9, 0.9, 0.3])))
    run = write_run()
    StoredViews(student, teacher, np.array([0.1, 0.2, 0.3, 1.], dtype=np.float32), 2, [2]).write(
        run / 'stored_views.npz')
    page = write_run_report(run).read_text()
    assert 'same 4 views of the training data, of epoch 3, stored epoch 2: ' in page and 'top-1 class of 50.0%' in page
    assert 'is 0.4000 nats on average, median 0.2500' in page
    assert table(page, 'on views with a label') == [
        ['on views with a label', 'student', 'teacher'], ['top-1', '66.7%', '33.3%'],
        ['mean confidence', '60.0%', '90.0%'],
        ['expected calibration error', *(f'{100 * model.labelled().reliability().error:.1f}%'
                                         for model in (student, teacher))],
        ['right where the other is wrong', '33.3%', '0.0%']]


def test_launches_are_told_by_their_first_epoch(write_run):
    run = write_run()
    launches = [{'epoch': epoch, 'environment': {'torch': version, 'device': 'cpu'}}
                for epoch, version in ((0, '2.1'), (4, '2.2'))]
    write_record(run, launches=launches)
    page = write_run_report(run).read_text()
    assert re.findall('>From epoch (.*?)<', page) == ['1', '5']
    assert re.findall('<th scope="row">(?:torch|device)</th><td>(.*?)</td>', page) == ['2.1', 'cpu', '2.1 → 2.2']


def test_figures_of_runs_side_by_side_are_those_of_the_metrics(write_run):
    other = METRICS.replace('1.3,60,94,1.2,55,97', '1.1,70,96,1.0,58,98').replace(',500', ',700')
    lines = squeezed(compare_runs([write_run(), write_run('two', other)]))
    for line in (
            'best top-1 (selected on this validation set) 60.00% 70.00% +10.00', 'last top-1 60.00% 70.00% +10.00',
            'last top-5 94.00% 96.00% +2.00', 'last NLL 1.3000 1.1000 -0.2000',
            'best top-1, averaged (selected on this validation set) 61.00% 61.00% +0.00',
            'last top-1, averaged 55.00% 58.00% +3.00', 'last top-5, averaged 97.00% 98.00% +1.00',
            'last NLL, averaged 1.2000 1.0000 -0.2000', 'training loss 1.4000 1.4000 +0.0000',
            'images per second 400.00 400.00 +0.00', 'minutes of training 6.00 6.00 +0.00', 'epochs 3 3 +0'):
        assert line in lines, line


@pytest.mark.parametrize('times, chance', [(1, '0.0020'), (2, '<0.0001')])
def test_small_chances_are_told_from_none(write_run, times, chance):
    """Of 10 and 20 samples all are right in the second run alone: p is 2 / 2^10, and 2 / 2^20."""
    lines = squeezed(compare_runs([write_run(best=[5] * 10, times=times), write_run('two', best=LABELS, times=times)]))
    assert f'two 0.0% 0 0 {10 * times} 0 {chance}' in lines


def test_classes_that_gain_and_lose_most_come_first(write_run, tmp_path):
    other = [0, 1, 1, 1, 1, 1, 2, 0, 0, 3]
    compare_runs([write_run(), write_run('two', best=other)], tmp_path / 'page.html')
    gains, losses = (tmp_path / 'page.html').read_text().split('Classes where two gains most')[1].split('loses most')
    assert table(gains, 'class') == [
        ['class', 'samples', 'one', 'two', 'points'], ['c', '1', '0.0%', '100.0%', '+100.0'],
        ['b', '2', '50.0%', '100.0%', '+50.0']]
    assert table(losses, 'class')[1:] == [['d', '3', '100.0%', '33.3%', '-66.7'], ['a', '4', '50.0%', '25.0%', '-25.0']]


def test_settings_that_differ_are_named_and_not_the_folders(write_run):
    settings = {'lr': 0.1, 'opt': 'adamw', 'experiment': 'one', 'output': '/runs', 'quiet': False}
    other = settings | {'lr': 0.2, 'experiment': 'two', 'output': '/other', 'quiet': True}
    lines = squeezed(compare_runs([write_run(settings=settings), write_run('two', settings=other)]))
    place = lines.index('setting one two')
    assert lines[place + 1:place + 3] == ['lr 0.1 0.2', '']


def test_models_of_other_classes_are_not_compared_one_by_one(write_run):
    said = compare_runs([write_run(), write_run('two', num_classes=7)])
    assert run_comparison.NOT_THE_SAME in said and 'only the first' not in said


def test_curves_are_those_of_the_columns(write_run):
    figures = plots.curve_plots({'one': TrainedRun.read(write_run()).rows})
    drawn = {(figure.axes[0].get_ylabel(), line.get_label()): (line.get_xdata().tolist(), line.get_ydata().tolist())
             for figure, *_ in figures for line in figure.axes[0].get_lines()}
    epochs = [1, 2, 3]
    assert drawn.pop(('top-1 accuracy (%)', 'student')) == (epochs, [50, 60, 60])
    assert drawn.pop(('top-1 accuracy (%)', 'averaged weights')) == (epochs, [40, 61, 55])
    assert {title: points for (title, _), points in drawn.items()} == {
        'training loss': (epochs, [2, 1.5, 1.4]), 'learning rate': (epochs, [0.1, 0.05, 0.01]),
        'waiting for data (%)': (epochs, [50, 10, 20]), 'images per second': (epochs, [100, 400, 500])}


def test_a_confusion_matrix_is_of_each_label_in_percent():
    counts = np.array([[2, 2, 0], [1, 1, 6]])
    (figure, *_), = plots.confusion_plot(counts, ['a', 'b', 'any other'])
    axes, = figure.axes
    said = {text.get_position(): text.get_text() for text in axes.texts}
    assert said == {(0.5, 0.5): '50', (1.5, 0.5): '50', (0.5, 1.5): '12', (1.5, 1.5): '12', (2.5, 1.5): '75'}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('predicted as', 'label')
    assert [label.get_text() for label in axes.get_yticklabels()] == ['a', 'b']


def test_a_reliability_diagram_is_in_percent_of_all_samples():
    found = calibration(np.array([0.3] * 3 + [0.95] * 7), np.arange(10) < 6)
    (figure, *_), = plots.reliability_plot({'one': found})
    above, below = figure.axes
    line = above.get_lines()[1]
    assert line.get_label() == f'one, ECE {100 * found.error:.1f}%'
    assert line.get_xdata().tolist() == pytest.approx([30, 95])
    assert line.get_ydata().tolist() == pytest.approx([100, 300 / 7])
    heights = below.patches[0].get_data().values
    assert heights[heights > 0].tolist() == pytest.approx([30, 70])


def test_the_plot_of_a_run_is_by_epoch_from_1(tmp_path, monkeypatch):
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, 'savefig', lambda figure, *args, **options: drawn.append(figure) or savefig(figure, *args, **options))
    (tmp_path / 'metrics.csv').write_text(
        'epoch,loss,label_loss,distill_loss,eval_top1,eval_top1_ema\n'
        '0,3,1,2,50,40\n1,2,0.5,1.5,,\n2,1,0.25,0.75,70,75\n')
    assert plot_metrics(tmp_path / 'metrics.csv', tmp_path / 'metrics.png')
    losses, accuracy = (
        {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.get_lines()}
        for axes in drawn[0].axes)
    epochs = [1, 2, 3]
    assert losses == {'loss': (epochs, [3, 2, 1]), 'label loss': (epochs, [1, 0.5, 0.25]),
                      'distillation loss': (epochs, [2, 1.5, 0.75])}
    assert accuracy == {'student': ([1, 3], [50, 70]), 'averaged weights': ([1, 3], [40, 75])}
    assert drawn[0].axes[1].get_legend() is not None
    assert (tmp_path / 'metrics.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('num_classes', [1 << 15, 1 << 16])
def test_the_last_of_many_classes_is_kept(num_classes):
    recorder = Recorder()
    recorder.add(torch.eye(2, num_classes).flip(1), torch.tensor([num_classes - 1, -1]))
    found = recorder.own()
    assert found.best.tolist() == [num_classes - 1, num_classes - 2] and found.right.tolist() == [True, False]
    assert found.label_log_probs[0] == pytest.approx(np.log(found.confidence[0])) and not found.label_log_probs[1]


def test_large_pictures_of_an_evaluation_are_kept_small(fashion, tmp_path):
    args = argparse.Namespace(input_key=None, target_key=None, validation_batch_size=4, batch_size=4, workers=0)
    config = {'input_size': (3, 160, 200), 'crop_pct': 1., 'crop_mode': 'center', 'interpolation': 'bilinear'}
    loader = eval_loader(fashion.select(range(4)), config, args, rank=0, world_size=1)
    labels = fashion['label'][:4]
    keep_evaluation(tmp_path / 'predictions.npz', predictions(labels, [0] * 4, [0.5] * 4), loader, 10, 1)
    found = Evaluation.read(tmp_path / 'predictions.npz')
    assert found.views.shape == (4, 3, 102, 128) and found.views.dtype == np.uint8
    # In the order in which they are shown: the right ones first.
    for sample, picture in zip(found.shown, found.views):
        whole = Image.fromarray(loader.dataset.dataset[int(sample)]['view'].numpy().transpose(1, 2, 0))
        near = np.asarray(whole.resize((128, 102), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert np.abs(near.astype(int) - picture).max() <= 2
