"""Plots of runs: curves by epoch, reliability diagrams, confusion matrices. They need matplotlib, the extra `plots`."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..train.calibration import Reliability
from .run_folder import TrainedRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['INTERVALS', 'SIZE', 'can_plot', 'confusion_figure', 'curve_figures', 'reliability_figure']

# Inches; two stand side by side on a page.
SIZE = (6.4, 3.4)
# Up to so many epochs each has a mark of its own.
MAX_MARKS = 40
LINES = ('-', '--', ':')
RATE, WAITING, SPEED = 'learning rate', 'waiting for data (%)', 'images per second'
MAX_NAME = 24
# What stands beneath a reliability diagram.
INTERVALS = 'Bars are 95% intervals: long where few samples are so sure.'


def can_plot() -> bool:
    """Whether matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def curve_figures(runs: Mapping[str, TrainedRun]) -> list[tuple['Figure', str]]:
    """Losses, accuracy, learning rate, gradient norm, waiting for data and speed by epoch, of one run or several.

    Returns:
        Figures, each with what it shows.
    """
    panels = (
        ('training loss', {'loss': 'loss', 'label_loss': 'label loss', 'distill_loss': 'distillation loss'}, 1),
        ('top-1 accuracy (%)', {'eval_top1': 'student', 'eval_top1_ema': 'averaged weights'}, 1),
        (RATE, {'lr': ''}, 1),
        ('gradient norm', {'grad_norm': ''}, 1),
        (WAITING, {'data_wait': ''}, 100),
        (SPEED, {'images_per_second': ''}, 1),
    )
    figures = []
    for title, columns, scale in panels:
        lines = []
        for number, (name, run) in enumerate(runs.items()):
            drawn = _without_idle(run, columns)
            for place, (label, points) in enumerate(drawn.items()):
                label = ', '.join(filter(None, (name if len(runs) > 1 else '', label if len(drawn) > 1 else '')))
                style = {'color': f'C{number}', 'linestyle': LINES[place]} if len(runs) > 1 else {'color': f'C{place}'}
                lines.append((label, points, style))
        if lines:
            figures.append((_curves(title, lines, scale), f'{title} by epoch'))
    return figures


def reliability_figure(models: Mapping[str, Reliability], size: tuple[float, float] = (5, 4)) -> 'Figure':
    """How often models are right where they are so sure, and how often they are; on the diagonal they could be trusted.

    Args:
        models: What was found of each, by its name.
        size: Width and height in inches.
    """
    figure = _figure(size, left=0.13, right=0.97, bottom=0.13, top=0.97)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 100], [0, 100], color='gray', linestyle='--', linewidth=1)
    edges = np.linspace(0, 100, len(next(iter(models.values())).count) + 1)
    for number, (name, found) in enumerate(models.items()):
        filled = found.count > 0
        confidence = 100 * found.confidence[filled]
        above.plot(confidence, 100 * found.accuracy[filled], marker='o', markersize=4, color=f'C{number}',
                   label=f'{_plain(name)}, ECE {100 * found.error:.1f}%')
        # A bin of one sample must not look as sure as one of thousands.
        above.vlines(confidence, *(100 * end[filled] for end in found.interval()), color=f'C{number}', alpha=0.4)
        below.stairs(100 * found.count / max(1, found.count.sum()), edges, fill=True, alpha=0.45, color=f'C{number}')
    above.set(ylabel='accuracy (%)', xlim=(0, 100), ylim=(0, 100))
    below.set(xlabel='confidence (%)', ylabel='samples (%)')
    above.legend(loc='upper left')
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure


def confusion_figure(counts: np.ndarray, names: Sequence[str]) -> 'Figure':
    """A confusion matrix, its rows in percent.

    Args:
        counts: Samples of each label [R] that are taken for each of these classes, and for others in more columns.
        names: Names of the columns, those of the labels first.
    """
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    num_rows, num_columns = counts.shape
    names = [_plain(name if len(name) <= MAX_NAME else f'{name[:MAX_NAME - 1]}…') for name in names]
    margin = 0.08 * max(map(len, names))
    figure = _figure((0.7 + margin + 0.36 * num_columns, 0.6 + margin + 0.3 * num_rows))
    axes = figure.subplots()
    # Lets the page's colour through, so that it suits light and dark; mistakes have another colour than hits.
    colors = np.zeros((*counts.shape, 4))
    hits = np.eye(num_rows, num_columns, dtype=bool)
    colors[hits, :3], colors[~hits, :3] = (0.17, 0.63, 0.17), (0.84, 0.15, 0.16)
    colors[..., 3] = np.where(counts > 0, 0.08 + 0.62 * shares ** 0.5, 0.)
    axes.pcolormesh(np.arange(num_columns + 1), np.arange(num_rows + 1), colors)
    for row, column in zip(*counts.nonzero()):
        axes.text(column + 0.5, row + 0.5, _percent(shares[row, column]), ha='center', va='center', fontsize=8)
    axes.set(ylim=(num_rows, 0), xlabel='taken for', ylabel='label')
    axes.set_xticks(np.arange(num_columns) + 0.5, names, rotation=90, fontsize=8)
    axes.set_yticks(np.arange(num_rows) + 0.5, names[:num_rows], fontsize=8)
    axes.tick_params(length=0)
    return figure


def _plain(text: str) -> str:
    """Text that matplotlib takes as it is: no formula, and not left out of a legend."""
    return re.sub('^_', ' _', text.replace('$', r'\$'))


def _percent(share: float) -> str:
    return f'{100 * share:.0f}' if share >= 0.005 else '<1'


def _without_idle(run: TrainedRun, columns: Mapping[str, str]) -> dict[str, list[tuple[int, float]]]:
    """Labels and points of the columns that say something: not only zeros, nor what the first one says."""
    points = {label: run.column(name) for name, label in columns.items()}
    first = next(iter(points.values()))
    return {label: found for number, (label, found) in enumerate(points.items())
            if found and (not number or any(value for _, value in found) and found != first)}


def _figure(size: tuple[float, float], **margins: float) -> 'Figure':
    """An empty figure; with margins it need not measure its text, which takes half of the time."""
    from matplotlib.figure import Figure

    if not margins:
        return Figure(figsize=size, layout='constrained')
    figure = Figure(figsize=size)
    figure.subplots_adjust(**margins)
    return figure


def _curves(title: str, lines: Sequence[tuple[str, list[tuple[int, float]], dict[str, str]]], scale: float) -> 'Figure':
    # Small rates have a power of ten above the axis.
    figure = _figure(SIZE, left=0.13, right=0.98, bottom=0.14, top=0.92 if title == RATE else 0.97)
    axes = figure.subplots()
    for label, points, style in lines:
        epochs, values = np.array(points).T
        axes.plot(epochs, values * scale, label=_plain(label), linewidth=1.5, markersize=3,
                  marker='o' if len(points) <= MAX_MARKS else None, **style)
    axes.set(xlabel='epoch', ylabel=title)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if title in (WAITING, SPEED):
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if any(label for label, _, _ in lines):
        axes.legend()
    return figure
