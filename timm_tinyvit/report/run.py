"""The report of a run: one page on how it went, what its student knows, and how it compares with its teacher.

Everything comes from the folder of the run, so that neither data nor models are at hand when the page is made: at the
end of a training, or at any time by `timm-tinyvit report RUN`. Its size does not depend on the number of
classes or samples.
"""

from pathlib import Path

import numpy as np

from ..base.escaping import shown
from ..base.text import counted, percent
from ..train.metrics import suffixed
from ..train.predictions import (
    Evaluation, Predictions, class_accuracy, confused_pairs, confusion, samples_to_show, worst_classes,
)
from ..train.teacher_comparison import StoredFeatures, StoredViews
from .page import Page, Picture
from .pictures import probability_bars
from .plots import PLOTS_MISSING, add_plots, can_plot, confusion_plot, curve_plots, reliability_plot
from .run_folder import WEIGHTS, TrainedRun
from .statistics import evenly

__all__ = ['REPORT', 'write_run_report']

REPORT = 'report.html'
# Up to so many classes the confusion matrix has all of them.
MAX_MATRIX = 20
NUM_WORST = 10


def write_run_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page on a run.

    Args:
        folder: Folder of the run.
        out: The file; by default `report.html` in the folder.

    Returns:
        The file.

    Raises:
        InputError: The folder has no metrics of a run, or the file cannot be written.
    """
    run = TrainedRun.read(folder)
    page = Page(f'Run {run.name}', _subtitle(run))
    for problem in run.problems:
        page.warning(problem)
    _add_result(page, run)
    _add_curves(page, run)
    _add_evaluation(page, run)
    _add_teacher(page, run)
    _add_settings(page, run)
    _add_environment(page, run)
    out = Path(out) if out else run.folder / REPORT
    page.write(out)
    return out


def _subtitle(run: TrainedRun) -> str:
    text = shown(run.settings.get('model', 'a run'))
    if run.settings.get('dataset'):
        text += f' on {Path(str(run.settings["dataset"])).name}'
    if run.settings.get('logits'):
        text += ', distilled'
    done = round(run.rows[-1]['epoch']) + 1
    return text + (f', {counted(done, "epoch")}' if done >= run.num_epochs else
                   f', {done} of {counted(run.num_epochs, "epoch")} so far')


def _add_result(page: Page, run: TrainedRun) -> None:
    page.heading('Result')
    facts = {}
    for weights, words in (('student', ''), ('ema', ' of the averaged weights')):
        names = {name: suffixed(f'eval_{name}', weights) for name in ('top1', 'top5', 'loss')}
        best = run.best(weights)
        if best:
            # The epoch was selected on this split, so that the figure flatters.
            facts[f'best top-1{words}'] = f'{best[1]:.2f}% in epoch {best[0]} (selected on this validation set)'
            forms = {'top1': '{:.2f}%', 'top5': 'top-5 {:.2f}%', 'loss': 'NLL {:.4f}'}
            last = {name: run.last(column) for name, column in names.items() if name != 'top5' or run.has_top5}
            facts[f'last top-1{words}'] = ', '.join(
                forms[name].format(value) for name, value in last.items() if value is not None)
    seconds = sum(value for _, value in run.column('seconds'))
    waited = sum(row['seconds'] * row['data_wait'] for row in run.rows if {'seconds', 'data_wait'} <= set(row))
    if seconds:
        facts['training'] = f'{_duration(seconds)}, {percent(waited / seconds, 0)} of it waiting for data'
    speeds = [value for _, value in run.column('images_per_second')]
    if speeds:
        facts['speed'] = f'{np.median(speeds):,.0f} images/s'
    if run.settings.get('logits'):
        facts['learned from'] = ', '.join(Path(str(store)).name for store in run.settings['logits'])
    if run.column('eval_knn'):
        facts['nearest neighbours'] = f'{run.last("eval_knn"):.2f}%'
    elif not run.column('eval_top1'):
        facts['accuracy'] = 'not evaluated yet'
    page.facts(facts)
    if run.column('eval_top1') and run.settings:
        page.details('The command that evaluates the best weights again', run.evaluation_command())


def _duration(seconds: float) -> str:
    if seconds < 60:
        return counted(round(seconds), 'second')
    return f'{seconds / 60:.1f} minutes' if seconds < 3600 else f'{seconds / 3600:.1f} hours'


def _add_curves(page: Page, run: TrainedRun) -> None:
    page.heading('Curves')
    add_plots(page, curve_plots({run.name: run.rows}))
    if not can_plot():
        page.paragraph(PLOTS_MISSING)
        names = {'loss': 'loss', 'eval_top1': 'top-1', 'eval_top1_ema': 'averaged', 'lr': 'learning rate'}
        names = {name: text for name, text in names.items() if run.column(name)}
        rows = [run.rows[place] for place in evenly(len(run.rows), 20)]
        page.table(['epoch', *names.values()], [
            [round(row['epoch']) + 1, *(f'{row[name]:.4g}' if name in row else '' for name in names)] for row in rows])


def _add_evaluation(page: Page, run: TrainedRun) -> None:
    page.heading('Validation')
    evaluation = run.evaluation
    if evaluation is None and run.column('eval_knn'):
        page.paragraph('The student has no classifier; it is evaluated by the nearest neighbours of its features.')
        return
    if evaluation is None:
        page.paragraph('There are no predictions: the run has not been evaluated yet, or by an earlier version. The '
                       'next evaluation writes them.')
        return
    predictions = evaluation.predictions
    reliability = predictions.reliability()
    page.paragraph(
        f'{len(predictions):,} samples of {evaluation.num_classes:,} classes, after epoch {evaluation.epoch + 1}'
        f'{run.label}: top-1 {percent(predictions.top(1))}, mean confidence '
        f'{percent(predictions.confidence.mean(), 1)}, expected calibration error {percent(reliability.error, 1)}, '
        f'NLL {-predictions.label_log_probs.mean():.4f}.')
    add_plots(page, reliability_plot(
        {f'student{run.label}': reliability},
        caption='On the diagonal, predictions of 80% confidence are right 80% of the time.'))
    _add_confusion(page, evaluation)
    right, wrong = samples_to_show(predictions)
    page.heading('Samples', level=3)
    if len(right):
        page.pictures(
            _pictures(evaluation, right), 'Most confident correct predictions, of different classes where possible')
    if len(wrong):
        page.pictures(_pictures(evaluation, wrong), 'Most confident wrong predictions')


def _add_confusion(page: Page, evaluation: Evaluation) -> None:
    predictions, num_classes = evaluation.predictions, evaluation.num_classes
    worst = worst_classes(predictions, num_classes, NUM_WORST)
    classes = np.arange(num_classes) if num_classes <= MAX_MATRIX else worst
    counts = confusion(predictions, classes)
    names = [evaluation.name(label) for label in classes]
    if counts[:, -1].any():
        names.append('any other')
    else:
        counts = counts[:, :-1]
    title = 'Confusion' if num_classes <= MAX_MATRIX else f'Confusion of the {len(classes)} worst classes'
    add_plots(page, confusion_plot(counts, names, title))
    if not can_plot():
        rows = [[name, *row] for name, row in zip(names, counts.tolist())]
        page.table(['label', *names], rows, f'{title}, in samples')
    samples, accuracy = class_accuracy(predictions, num_classes)
    pairs = confused_pairs(predictions, NUM_WORST)
    if pairs:
        page.heading('Most frequent confusions', level=3)
        page.table(
            ['label', 'predicted as', 'samples', 'of the label'],
            [[evaluation.name(label), evaluation.name(other), count, percent(count / samples[label], 1)]
             for label, other, count in pairs])
    page.heading('Worst classes', level=3)
    rows = []
    for label in worst:
        others = predictions.best[(predictions.labels == label) & ~predictions.right]
        mostly = evaluation.name(np.bincount(others).argmax()) if len(others) else '-'
        rows.append([evaluation.name(label), int(samples[label]), percent(accuracy[label], 1), mostly])
    page.table(['class', 'samples', 'top-1', 'mostly predicted as'], rows)


def _pictures(evaluation: Evaluation, samples: np.ndarray) -> list[Picture]:
    """Pictures of samples with the student's most probable classes; of those whose view was kept."""
    predictions, pictures = evaluation.predictions, []
    names = [evaluation.name(number) for number in range(evaluation.num_classes)]
    views = dict(zip(evaluation.shown.tolist(), evaluation.views))
    files = dict(zip(evaluation.shown.tolist(), evaluation.files))
    for sample in filter(views.__contains__, samples.tolist()):
        label = int(predictions.labels[sample])
        bars = probability_bars(
            zip(predictions.ids[sample].tolist(), predictions.probs[sample].tolist()),
            {label: float(np.exp(predictions.label_log_probs[sample]))}, names)
        pictures.append(Picture(views[sample], f'{names[label]} {files[sample] or f"#{sample}"}', bars))
    return pictures


def _add_teacher(page: Page, run: TrainedRun) -> None:
    page.heading('Student and teacher')
    views, features = run.stored_views, run.stored_features
    if features is not None:
        cosine = run.last('feature_cosine')
        page.paragraph(
            f'{_same_views(features, len(features.shared))}: of the {features.num_nearest} nearest by the vectors of '
            f'the teacher {percent(features.shared.mean(), 1)} are among the {features.num_nearest} nearest by the own '
            f'features of the student{WEIGHTS[features.weights]}; of features that have nothing in common it would be '
            f'{percent(features.num_nearest / (len(features.shared) - 1), 1)}.'
            + (f' The cosine of its projected features to those of the teacher was {cosine:.3f} in the last epoch.'
               if cosine is not None else ''))
    if views is None:
        if features is None:
            page.paragraph(
                'The student is compared with its teacher on stored views when a training ends; this one has not ended '
                'yet.' if run.settings.get('logits') else
                'The student learned from labels alone; there is no teacher to compare it with.')
        return
    student, teacher = views.student, views.teacher
    name = f'student{WEIGHTS[views.weights]}'
    page.paragraph(
        f'{_same_views(views, len(student))}: the {name} and the teacher agree on the top-1 class of '
        f'{percent((student.best == teacher.best).mean(), 1)}, and the KL divergence from the stored targets is '
        f'{views.divergence.mean():.4f} nats on average, median {np.median(views.divergence):.4f}.')
    student, teacher = student.labelled(), teacher.labelled()
    if not len(student):
        page.paragraph('There is no accuracy: no view has a single label that is a class of the teacher.')
        return
    models = {name: student.reliability(), 'teacher': teacher.reliability()}
    page.table(['on views with a label', *models], [
        [text, *(percent(value, 1) for value in values)] for text, values in (
            ('top-1', (student.top(1), teacher.top(1))),
            ('mean confidence', (student.confidence.mean(), teacher.confidence.mean())),
            ('expected calibration error', [reliability.error for reliability in models.values()]),
            ('right where the other is wrong', (_only(student, teacher), _only(teacher, student))),
        )])
    add_plots(page, reliability_plot(models))


def _same_views(views: StoredViews | StoredFeatures, count: int) -> str:
    return (f'Both on the same {count:,} views of the training data, of epoch {views.epoch + 1}, stored epoch '
            f'{" and ".join(map(str, views.stored_epochs))}')


def _only(one: Predictions, other: Predictions) -> float:
    return float((one.right & ~other.right).mean())


def _add_settings(page: Page, run: TrainedRun) -> None:
    page.heading('Settings')
    changed, others = run.shown_settings()
    if not run.settings:
        page.paragraph('The settings are not known: the run was started by an earlier version.')
        return
    page.facts(changed)
    if others:
        page.details(
            'Settings at their defaults', '\n'.join(f'{name}: {value}' for name, value in sorted(others.items())))


def _add_environment(page: Page, run: TrainedRun) -> None:
    page.heading('Environment')
    launches = run.launches
    if not launches:
        page.paragraph('The environment is not known: the run was started by an earlier version.')
    for number, launch in enumerate(launches):
        facts = launch['environment']
        if number:
            before = launches[number - 1]['environment']
            facts = {name: f'{before.get(name, "none")} → {facts.get(name, "none")}' for name in {**before, **facts}
                     if before.get(name) != facts.get(name)}
        if len(launches) > 1:
            page.heading(f'From epoch {launch["epoch"] + 1}', level=3)
        page.facts(facts)
