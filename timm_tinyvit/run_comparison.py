"""Runs side by side: figures, curves, settings, and where they were evaluated on the same samples, whose each is.

The first run is what the others are compared with.
"""

import math
import warnings
from pathlib import Path
from collections.abc import Sequence

import numpy as np

from .errors import InputError
from .page import Page
from .predictions import Predictions, calibration, class_accuracy
from .run_figures import can_plot, curve_figures, reliability_figure
from .trained_run import TrainedRun, without_user
from .version import __version__

__all__ = ['compare_runs', 'mcnemar']

NUM_CLASSES_SHOWN = 10
# Settings that say where a run is, and not what it is.
PLACES = ('experiment', 'output', 'quiet')
AGREEMENT = ['', 'agree', 'both right', 'only the first', 'only this', 'neither', 'by chance']
NOT_THE_SAME = 'The runs were not evaluated on the same samples, so that these cannot be compared one by one.'


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
        raise InputError('one run alone has nothing to be compared with; name two or more')
    found = _named([TrainedRun.read(folder) for folder in runs])
    figures, settings, agreements = _figures(found), _settings(found), _agreements(found)
    if out is not None:
        _page(found, figures, settings, agreements).write(out)
    return '\n\n'.join([
        _text(_figures_header(found), figures), *([_text(['setting', *found], settings)] if settings else []),
        _text(AGREEMENT, agreements) if agreements else NOT_THE_SAME])


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


def _page(
        runs: dict[str, TrainedRun],
        figures: list[list[str]],
        settings: list[list[str]],
        agreements: list[list[str]],
) -> Page:
    page = Page(' and '.join(runs) if len(runs) == 2 else f'{len(runs)} runs', 'compared with the first')
    for run in runs.values():
        for problem in run.problems:
            page.warning(without_user(problem))
    page.heading('Result')
    page.table(_figures_header(runs), figures)
    with warnings.catch_warnings():
        # As in a run's own report.
        warnings.filterwarnings('ignore', message='Glyph')
        _add_curves(page, runs)
        _add_samples(page, runs, agreements)
    page.heading('Settings that differ')
    if settings:
        page.table(['setting', *runs], settings)
    else:
        page.paragraph('None does.')
    page.footer(f'timm_tinyvit {__version__}')
    return page


def _named(runs: Sequence[TrainedRun]) -> dict[str, TrainedRun]:
    """Runs by their names, with their folders' where two have the same, numbered where even those are."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f'{run.folder.resolve().parent.name}/{run.name}' for run in runs]
    if len(set(names)) < len(names):
        names = [f'{name} ({number})' for number, name in enumerate(names, 1)]
    return dict(zip(names, runs))


def _figures_header(runs: dict[str, TrainedRun]) -> list[str]:
    first, *others = runs
    return ['', first, *(text for name in others for text in (name, 'difference'))]


def _figures(runs: dict[str, TrainedRun]) -> list[list[str]]:
    """Rows of a figure of the first run, and of each other run its own and the difference."""
    columns = []
    for run in runs.values():
        values = {}
        for ending, whose in (('', ''), ('_ema', ', averaged')):
            best = run.best(f'eval_top1{ending}')
            values[f'best top-1{whose}'] = best and best[1]
            for name, text in (('top1', 'last top-1'), ('top5', 'last top-5'), ('loss', 'last loss')):
                points = run.column(f'eval_{name}{ending}')
                values[f'{text}{whose}'] = points[-1][1] if points else None
        if run.evaluation:
            values['calibration error'] = 100 * calibration(run.evaluation.predictions).error
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
        first, *others = [values.get(text) for values in columns]
        row = [text, _figure(text, first)]
        for value in others:
            known = first is not None and value is not None
            row += [_figure(text, value), _figure(text, value - first, '+') if known else '']
        rows.append(row)
    return rows


def _figure(text: str, value: float | None, sign: str = '') -> str:
    if value is None:
        return '-'
    if 'top-' in text or 'calibration' in text:
        return f'{value:{sign}.2f}' + ('' if sign else '%')
    if 'loss' in text:
        return f'{value:{sign}.4f}'
    return f'{value:{sign},.0f}' if text == 'epochs' else f'{value:{sign},.1f}'


def _settings(runs: dict[str, TrainedRun]) -> list[list[str]]:
    """Rows of a setting that is not the same in all runs."""
    shown = [{**changed, **others} for changed, others in (run.shown_settings() for run in runs.values())]
    names = dict.fromkeys(name for settings in shown for name in settings if name not in PLACES)
    rows = [[name, *(settings.get(name, '-') or '-' for settings in shown)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def _on_the_same(runs: dict[str, TrainedRun]) -> dict[str, Predictions]:
    """Predictions of the first run and of those that were evaluated on the same samples; empty where none was."""
    (_, first), *_ = runs.items()
    if first.evaluation is None:
        return {}
    same = {name: run.evaluation.predictions for name, run in runs.items()
            if run.evaluation and run.evaluation.split == first.evaluation.split
            and run.evaluation.num_classes == first.evaluation.num_classes}
    return same if len(same) > 1 else {}


def _agreements(runs: dict[str, TrainedRun]) -> list[list[str]]:
    """Rows of how a run's last evaluation compares with the first run's, sample by sample."""
    same = _on_the_same(runs)
    rows = []
    for name, said in list(same.items())[1:]:
        first = next(iter(same.values()))
        only_first, only_this = (int((a.right & ~b.right).sum()) for a, b in ((first, said), (said, first)))
        chance = mcnemar(only_first, only_this)
        rows.append([
            name, f'{100 * (first.best == said.best).mean():.1f}%', f'{int((first.right & said.right).sum()):,}',
            f'{only_first:,}', f'{only_this:,}', f'{int((~first.right & ~said.right).sum()):,}',
            '<0.0001' if chance < 1e-4 else f'{chance:.4f}'])
    return rows


def _add_curves(page: Page, runs: dict[str, TrainedRun]) -> None:
    page.heading('Curves')
    if not can_plot():
        page.paragraph("Curves and diagrams need matplotlib: pip install 'timm_tinyvit[plots]', and compare again.")
        return
    for figure, alt in curve_figures(runs):
        page.figure(figure, alt)


def _add_samples(page: Page, runs: dict[str, TrainedRun], agreements: list[list[str]]) -> None:
    page.heading('Sample by sample')
    if not agreements:
        page.paragraph(NOT_THE_SAME)
        return
    same = _on_the_same(runs)
    base, *others = same
    first = same[base]
    page.table(AGREEMENT, agreements, f'The last evaluation on the same {len(first):,} samples, beside {base}')
    page.paragraph('Agree: the most probable class is the same. By chance: how likely two equally good models differ '
                   'at least so much (McNemar, exact, two-sided).')
    if can_plot():
        page.figure(reliability_figure({name: calibration(said) for name, said in same.items()}),
                    'reliability diagrams of the runs')
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
                page.heading(f'Classes where {name} {title}', level=3)
                page.table(['class', 'samples', base, name, 'points'], [
                    [evaluation.name(label), int(counts[label]), f'{100 * before[label]:.1f}%',
                     f'{100 * after[label]:.1f}%', f'{100 * gain[label]:+.1f}'] for label in chosen])


def _text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: the first column left, the others right."""
    lines = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    return '\n'.join('  '.join(
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]).rstrip()
        for line in lines)
