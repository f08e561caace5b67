"""The report of a run: one page on how it went, what its student knows, and how it compares with its teacher.

Everything comes from the folder of the run, so that neither data nor models are at hand when the page is made: at the
end of a training, or at any time by `python -m timm_tinyvit.report RUN`. Its size does not depend on the number of
classes or samples.
"""

from pathlib import Path

import numpy as np

from ..base.text import counted, percent
from ..train.predictions import (
    Evaluation, Predictions, class_accuracy, confused_pairs, confusion, samples_to_show, worst_classes,
)
from .page import Page, Picture
from .pictures import probability_bars
from .plots import PLOTS_MISSING, add_plots, can_plot, confusion_plot, curve_plots, reliability_plot
from .run_folder import WHOSE, TrainedRun, shown

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
    for ending, whose in (('', ''), ('_ema', ' of the averaged weights')):
        best = run.best(f'eval_top1{ending}')
        if best:
            # Of the very split that it is a figure of, so that it flatters.
            facts[f'best top-1{whose}'] = f'{best[1]:.2f}% in epoch {best[0]} (chosen on this split)'
            last = [f'{run.column(f"eval_top1{ending}")[-1][1]:.2f}%']
            for name, form in (('top5', 'top-5 {:.2f}%'), ('loss', 'loss {:.4f}')):
                values = run.column(f'eval_{name}{ending}')
                last += [form.format(values[-1][1])] if values else []
            facts[f'last top-1{whose}'] = ', '.join(last)
    seconds = sum(value for _, value in run.column('seconds'))
    waited = sum(row['seconds'] * row['data_wait'] for row in run.rows if {'seconds', 'data_wait'} <= set(row))
    if seconds:
        facts['training'] = f'{_duration(seconds)}, {percent(waited / seconds, 0)} of it waiting for data'
    speeds = [value for _, value in run.column('images_per_second')]
    if speeds:
        facts['speed'] = f'{np.median(speeds):,.0f} images/s'
    if run.settings.get('logits'):
        facts['learned from'] = ', '.join(Path(str(store)).name for store in run.settings['logits'])
    if not run.column('eval_top1'):
        facts['accuracy'] = 'not evaluated yet'
    page.facts(facts)
    if run.column('eval_top1') and run.settings:
        page.details('The command that evaluates the best weights again', run.evaluation_command())


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f'{seconds:.0f} seconds'
    return f'{seconds / 60:.1f} minutes' if seconds < 3600 else f'{seconds / 3600:.1f} hours'


def _add_curves(page: Page, run: TrainedRun) -> None:
    page.heading('Curves')
    add_plots(page, curve_plots({run.name: run.rows}))
    if not can_plot():
        page.paragraph(PLOTS_MISSING)
        names = {'loss': 'loss', 'eval_top1': 'top-1', 'eval_top1_ema': 'averaged', 'lr': 'learning rate'}
        names = {name: text for name, text in names.items() if run.column(name)}
        rows = [row for row in run.rows if 'epoch' in row]
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 20)).astype(int))
        page.table(['epoch', *names.values()], [
            [round(rows[place]['epoch']) + 1, *(f'{rows[place][name]:.4g}' if name in rows[place] else ''
                                                for name in names)] for place in chosen])


def _add_evaluation(page: Page, run: TrainedRun) -> None:
    page.heading('On the evaluation split')
    found = run.evaluation
    if found is None:
        page.paragraph('There are no predictions to look at: the run has not been evaluated yet, or it was by an '
                       'earlier version. The next evaluation leaves them.')
        return
    said = found.predictions
    reliability = said.reliability()
    page.paragraph(
        f'{len(said):,} samples of {found.num_classes:,} classes, after epoch {found.epoch + 1}{run.whose}: top-1 '
        f'{percent(said.top(1))}, mean confidence {percent(said.confidence.mean(), 1)}, expected calibration error '
        f'{percent(reliability.error, 1)}, mean negative log-probability of the label '
        f'{-said.label_log_probs.mean():.4f}.')
    add_plots(page, reliability_plot(
        {f'student{run.whose}': reliability},
        caption='On the diagonal, a confidence of 80% is right 80% of the time.'))
    _add_confusion(page, found)
    right, wrong = samples_to_show(said)
    page.heading('Samples', level=3)
    if len(right):
        page.pictures(_pictures(found, right), 'Surest of the right ones, of as many classes as there are')
    if len(wrong):
        page.pictures(_pictures(found, wrong), 'Surest of the wrong ones')


def _add_confusion(page: Page, found: Evaluation) -> None:
    said = found.predictions
    everything = found.num_classes <= MAX_MATRIX
    classes = np.arange(found.num_classes) if everything else worst_classes(said, found.num_classes, NUM_WORST)
    counts = confusion(said, classes)
    names = [found.name(label) for label in classes]
    if not counts[:, -1].any():
        counts = counts[:, :-1]
    else:
        names.append('any other')
    title = 'Confusion' if everything else f'Confusion of the {len(classes)} worst classes'
    add_plots(page, confusion_plot(counts, names, title))
    if not can_plot():
        rows = [[name, *row] for name, row in zip(names, counts.tolist())]
        page.table(['label', *names], rows, f'{title}, in samples')
    samples, accuracy = class_accuracy(said, found.num_classes)
    pairs = confused_pairs(said, NUM_WORST)
    if pairs:
        page.heading('Most frequent mistakes', level=3)
        page.table(
            ['label', 'taken for', 'samples', 'of the label'],
            [[found.name(label), found.name(other), count, percent(count / samples[label], 1)]
             for label, other, count in pairs])
    page.heading('Worst classes', level=3)
    rows = []
    for label in worst_classes(said, found.num_classes, NUM_WORST):
        others = said.best[(said.labels == label) & ~said.right]
        mostly = found.name(np.bincount(others).argmax()) if len(others) else '-'
        rows.append([found.name(label), int(samples[label]), percent(accuracy[label], 1), mostly])
    page.table(['class', 'samples', 'top-1', 'mostly taken for'], rows)


def _pictures(evaluation: Evaluation, samples: np.ndarray) -> list[Picture]:
    """Pictures of samples with the student's best classes; of those whose view was kept."""
    said, pictures = evaluation.predictions, []
    names = [evaluation.name(number) for number in range(evaluation.num_classes)]
    places = {int(sample): place for place, sample in enumerate(evaluation.shown)}
    for sample in filter(places.__contains__, samples.tolist()):
        label = int(said.labels[sample])
        bars = probability_bars(
            zip(said.ids[sample].tolist(), said.probs[sample].tolist()),
            {label: float(np.exp(said.label_log_probs[sample]))}, names)
        pictures.append(Picture(evaluation.views[places[sample]], f'{names[label]} #{sample}', bars))
    return pictures


def _add_teacher(page: Page, run: TrainedRun) -> None:
    page.heading('Student and teacher')
    found = run.stored_views
    if not run.settings.get('logits') and found is None:
        page.paragraph('The student learned from labels alone; there is no teacher to compare it with.')
        return
    if found is None:
        page.paragraph('The student looks at stored views beside its teacher when a training ends; this one has not '
                       'ended yet.')
        return
    student, teacher = found.student, found.teacher
    whose = WHOSE[found.ending]
    stored = f', stored epoch {" and ".join(map(str, found.stored_epochs))}' if found.stored_epochs else ''
    page.paragraph(
        f'Both on the same {len(student):,} views of the training data, of epoch {found.epoch + 1}{stored}: the '
        f'student{whose} and the teacher agree on the most probable class of '
        f'{percent((student.best == teacher.best).mean(), 1)}, and the KL divergence from what '
        f'the store says of the teacher is {found.divergence.mean():.4f} nats in the mean, '
        f'{np.median(found.divergence):.4f} in the median.')
    student, teacher = student.labelled(), teacher.labelled()
    if not len(student):
        page.paragraph('The views have no label each of the classes of the teacher, so that nobody is right or wrong.')
        return
    models = {f'student{whose}': student.reliability(), 'teacher': teacher.reliability()}
    page.table(['on views with a label', *models], [
        [text, *(percent(value, 1) for value in values)] for text, values in (
            ('top-1', (student.top(1), teacher.top(1))),
            ('mean confidence', (student.confidence.mean(), teacher.confidence.mean())),
            ('expected calibration error', [found.error for found in models.values()]),
            ('right where the other is wrong', (_only(student, teacher), _only(teacher, student))),
        )])
    add_plots(page, reliability_plot(models))


def _only(one: Predictions, other: Predictions) -> float:
    return float((one.right & ~other.right).mean())


def _add_settings(page: Page, run: TrainedRun) -> None:
    page.heading('Settings')
    changed, others = run.shown_settings()
    if not run.settings:
        page.paragraph('They are not known.')
        return
    page.facts(changed)
    if others:
        page.details(
            'those at their defaults', '\n'.join(f'{name}: {value}' for name, value in sorted(others.items())))


def _add_environment(page: Page, run: TrainedRun) -> None:
    page.heading('Environment')
    launches = run.launches
    if not launches:
        page.paragraph('It is not known: the run was started by an earlier version.')
    for number, launch in enumerate(launches):
        facts = launch['environment']
        if number:
            before = launches[number - 1]['environment']
            facts = {name: f'{before.get(name, "none")} → {facts.get(name, "none")}' for name in {**before, **facts}
                     if before.get(name) != facts.get(name)}
        if len(launches) > 1:
            page.heading(f'From epoch {launch["epoch"] + 1}', level=3)
        page.facts(facts)
