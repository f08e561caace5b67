"""Runs side by side: figures, curves, settings, and predictions of the same samples one by one.

The first run is what the others are compared with.
"""

import math
from collections import Counter
from pathlib import Path
from collections.abc import Sequence

import numpy as np

from ..base.errors import InputError
from ..base.text import percent, text_table
from ..train.metrics import suffixed
from ..train.predictions import Predictions, class_accuracy
from .page import Page, check_output
from .plots import PLOTS_MISSING, add_plots, can_plot, curve_plots, reliability_plot
from .run_folder import TrainedRun

__all__ = ['compare_runs', 'mcnemar']

NUM_CLASSES_SHOWN = 10
# Settings that say where a run is, and not what it is.
PLACES = ('experiment', 'output', 'quiet')
AGREEMENT = ['agree', 'both right', 'only the first', 'only this', 'neither', 'p (McNemar)']
CHANCE = ('p is the probability that two equally accurate models differ at least this much on so many samples (exact '
          'two-sided McNemar test); another seed of the same settings may make a larger difference.')
NOT_THE_SAME = 'The runs were not evaluated on the same samples, so their predictions cannot be compared one by one.'


def compare_runs(runs: Sequence[str | Path], out: str | Path | None = None) -> str:
    """Runs side by side as a table, and where it is asked for as a page.

    Args:
        runs: Folders of two runs or more; the first is what the others are compared with.
        out: The file of the page.

    Returns:
        The tables: figures, settings that differ, and how the runs agree sample by sample.

    Raises:
        InputError: There are fewer than two, one has no metrics, or the file cannot be written.
    """
    if len(runs) < 2:
        raise InputError('one run has nothing to be compared with; name two or more')
    check_output(out)
    runs = _named([TrainedRun.read(folder) for folder in runs])
    same, losses = _evaluated_alike(runs), _other_losses(runs)
    header, figures = _figures(runs, same, losses)
    settings, agreements = _settings(runs), _agreements(runs, same)
    left_out = [name if runs[name].evaluation else f'{name} (no predictions)' for name in runs if name not in same]
    left_out = f'Left out, as they were not evaluated on the same samples: {", ".join(left_out)}.' if left_out else ''
    if out is not None:
        page = Page(' and '.join(runs) if len(runs) == 2 else f'{len(runs)} runs', 'compared with the first')
        for problem in [problem for run in runs.values() for problem in run.problems]:
            page.warning(problem)
        page.heading('Result')
        page.table(header, figures)
        page.heading('Curves')
        add_plots(page, curve_plots({name: run.rows for name, run in runs.items()}))
        for sentence in [*([] if can_plot() else [PLOTS_MISSING]), *losses.values()]:
            page.paragraph(sentence)
        page.heading('Sample by sample')
        if agreements:
            _add_samples(page, runs, same, agreements, left_out)
        else:
            page.paragraph(NOT_THE_SAME)
        page.heading('Settings that differ')
        if settings:
            page.table(['setting', *runs], settings)
        else:
            page.paragraph('No setting differs.')
        page.write(out)
    parts = [text_table([header, *figures]), *losses.values()]
    if settings:
        parts.append(text_table([['setting', *runs], *settings]))
    if agreements:
        first = _weighed(runs, next(iter(runs)))
        parts += [text_table([[f'compared with {first}', *AGREEMENT], *agreements]), left_out, CHANCE]
    else:
        parts.append(NOT_THE_SAME)
    return '\n\n'.join(filter(None, parts))


def mcnemar(only_one: int, only_other: int) -> float:
    """How likely two equally good models differ at least so much: McNemar's exact test, two-sided.

    Args:
        only_one: Samples that only the one model has right.
        only_other: Samples that only the other has right.
    """
    total, smaller = only_one + only_other, min(only_one, only_other)
    if not total:
        return 1.
    logs = [math.lgamma(total + 1) - math.lgamma(count + 1) - math.lgamma(total - count + 1) - total * math.log(2)
            for count in range(smaller + 1)]
    largest = max(logs)
    return min(1., 2 * math.exp(largest) * sum(math.exp(value - largest) for value in logs))


def _named(runs: Sequence[TrainedRun]) -> dict[str, TrainedRun]:
    """Runs by their names; those that share one with their folders', and numbered where even that is shared."""
    names = [run.name for run in runs]
    times = Counter(names)
    names = [f'{run.folder.resolve().parent.name}/{name}' if times[name] > 1 else name
             for name, run in zip(names, runs)]
    times, seen = Counter(names), Counter()
    for place, name in enumerate(names):
        if times[name] > 1:
            seen[name] += 1
            names[place] = f'{name} ({seen[name]})'
    return dict(zip(names, runs))


def _weighed(runs: dict[str, TrainedRun], name: str) -> str:
    """The name of a run, and which weights its predictions are of."""
    return f'{name}{runs[name].label}'


def _figures(
        runs: dict[str, TrainedRun],
        same: dict[str, Predictions],
        other_losses: dict[str, str],
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a figure of the first run, and of each other run its own and the difference.

    There is no difference between losses that are not the same quantity, nor between scores of other samples.
    """
    base, *names = runs
    other_samples = [name for name in names if same and runs[name].evaluation and name not in same]
    columns = []
    for run in runs.values():
        values = {}
        for weights, words in (('student', ''), ('ema', ', averaged')):
            best = run.best(weights)
            values[f'best top-1{words} (selected on this validation set)'] = best and best[1]
            for name, text in (('top1', 'last top-1'), ('top5', 'last top-5'), ('loss', 'last NLL')):
                if name == 'top5' and not run.has_top5:
                    continue
                values[f'{text}{words}'] = run.last(suffixed(f'eval_{name}', weights))
            evaluation = run.evaluations.get(weights)
            values[f'calibration error{words}'] = evaluation and 100 * evaluation.predictions.reliability().error
        for name, text in (('loss', 'training loss'), ('images_per_second', 'images per second')):
            points = [value for _, value in run.column(name)]
            if points:
                values[text] = points[-1] if name == 'loss' else float(np.median(points))
        values['minutes of training'] = sum(value for _, value in run.column('seconds')) / 60
        values['epochs'] = len(run.rows)
        columns.append(values)
    rows = []
    for text in dict.fromkeys(name for values in columns for name in values):
        if all(values.get(text) is None for values in columns):
            continue
        digits = 0 if text == 'epochs' else 4 if 'loss' in text or 'NLL' in text else 2
        of_samples = 'top-' in text or 'calibration' in text
        unit = '%' if of_samples else ''
        # Rounded first, so that the difference is that of what is read.
        first, *others = [None if values.get(text) is None else round(values[text], digits) for values in columns]
        row = [text, '-' if first is None else f'{first:,.{digits}f}{unit}']
        for name, value in zip(names, others):
            incomparable = name in other_losses if text == 'training loss' else (
                name in other_samples and (of_samples or 'NLL' in text))
            known = first is not None and value is not None and not incomparable
            row += ['-' if value is None else f'{value:,.{digits}f}{unit}',
                    f'{value - first:+,.{digits}f}' if known else '']
        rows.append(row)
    return ['', base, *(text for name in names for text in (name, 'difference'))], rows


def _other_losses(runs: dict[str, TrainedRun]) -> dict[str, str]:
    """Runs whose training loss is another quantity than the first run's, and a sentence that says why."""
    (base, first), *others = runs.items()
    sentences = {}
    for name, run in others:
        ours, theirs = first.loss_settings(), run.loss_settings()
        differing = [key for key in ours if key in theirs and ours[key] != theirs[key]]
        if differing:
            sentences[name] = (
                f'The training losses of {base} and {name} are not the same quantity, and not subtracted: the runs '
                f'differ in {", ".join(differing)}.')
    return sentences


def _evaluated_alike(runs: dict[str, TrainedRun]) -> dict[str, Predictions]:
    """Predictions of the first run and of those that were evaluated on the same samples; empty where it has none."""
    first = next(iter(runs.values())).evaluation
    return {name: run.evaluation.predictions for name, run in runs.items() if first and run.evaluation and (
        (run.evaluation.split, run.evaluation.num_classes, len(run.evaluation.predictions))
        == (first.split, first.num_classes, len(first.predictions)))}


def _settings(runs: dict[str, TrainedRun]) -> list[list[str]]:
    """Rows of a setting that is not the same in all runs."""
    shown = [{**changed, **others} for changed, others in (run.shown_settings() for run in runs.values())]
    first, *others = runs.values()
    rows = []
    for name in dict.fromkeys(name for settings in shown for name in settings if name not in PLACES):
        row = [settings.get(name, '-') or '-' for settings in shown]
        for place, run in enumerate(others, 1):
            if name == 'logits' and run.settings.get('store_hash', 0) == first.settings.get('store_hash', 1):
                row[place] = row[0]  # the same store, wherever it lies
            elif row[place] == row[0] and run.settings.get(name) != first.settings.get(name):
                row[place] += ' (in another folder)'
        if len(set(row)) > 1:
            rows.append([name, *row])
    return rows


def _agreements(runs: dict[str, TrainedRun], same: dict[str, Predictions]) -> list[list[str]]:
    """Rows of how a run's last evaluation compares with the first run's, sample by sample."""
    first = next(iter(same.values()), None)
    rows = []
    for name, other in list(same.items())[1:]:
        counts = [int(samples.sum()) for samples in (
            first.right & other.right, first.right & ~other.right, ~first.right & other.right,
            ~first.right & ~other.right)]
        chance = mcnemar(counts[1], counts[2])
        rows.append([
            _weighed(runs, name), percent((first.best == other.best).mean(), 1), *(f'{count:,}' for count in counts),
            '<0.0001' if chance < 1e-4 else f'{chance:.4f}'])
    return rows


def _add_samples(
        page: Page,
        runs: dict[str, TrainedRun],
        same: dict[str, Predictions],
        agreements: list[list[str]],
        left_out: str,
) -> None:
    base, *others = same
    first, weighed = same[base], {name: _weighed(runs, name) for name in same}
    page.table(['', *AGREEMENT], agreements,
               f'The last evaluation on the same {len(first):,} samples, compared with {weighed[base]}')
    if left_out:
        page.warning(left_out)
    page.paragraph(f'Two runs agree where they predict the same class. {CHANCE}')
    add_plots(page, reliability_plot({
        weighed[name]: predictions.reliability() for name, predictions in same.items()}))
    evaluation = runs[base].evaluation
    counts, before = class_accuracy(first, evaluation.num_classes)
    for name in others:
        _, after = class_accuracy(same[name], evaluation.num_classes)
        gain = np.nan_to_num(after - before)
        order = np.argsort(-gain, kind='stable')
        for title, chosen in (
            ('gains most', order[gain[order] > 0][:NUM_CLASSES_SHOWN]),
            ('loses most', order[::-1][gain[order[::-1]] < 0][:NUM_CLASSES_SHOWN]),
        ):
            if len(chosen):
                page.heading(f'Classes where {weighed[name]} {title}', level=3)
                page.table(['class', 'samples', weighed[base], weighed[name], 'points'], [
                    [evaluation.name(label), int(counts[label]), percent(before[label], 1),
                     percent(after[label], 1), f'{100 * gain[label]:+.1f}'] for label in chosen])
