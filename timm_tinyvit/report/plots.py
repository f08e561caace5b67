"""Plots of stores and of runs, as matplotlib figures for a page; they need matplotlib, the extra `plots`."""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..base.files import write_aside
from ..train.calibration import Reliability
from .run_folder import TrainedRun
from .statistics import StoreStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    'INTERVALS', 'can_plot', 'confusion_figure', 'curve_figures', 'plot_agreement', 'plot_curves', 'plot_histograms',
    'plot_metrics', 'plot_reliability', 'reliability_figure',
]

Plot = tuple['Figure', str, str]  # with what it shows in words, and a caption

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


def plot_curves(statistics: StoreStatistics) -> Iterator[Plot]:
    """What changes from epoch to epoch."""
    epochs = statistics.epochs
    figure, axes = _axes('epoch', 'accuracy, mean probability (%)')
    if statistics.has_labels:
        axes.plot(epochs, 100 * statistics.by_epoch('right'), 'o-', markersize=3, label='top-1')
        label = 'of both labels' if statistics.is_mixed else 'of the label'
        axes.plot(epochs, 100 * statistics.by_epoch('label_prob'), 's-', markersize=3, label=label)
    axes.plot(epochs, 100 * statistics.by_epoch('confidence'), '^-', markersize=3, label='of the top class')
    yield _finished(figure, axes), 'accuracy and probabilities by epoch', ''
    figure, axes = _axes('epoch', 'entropy (nats)')
    axes.plot(epochs, statistics.by_epoch('entropy'), 'o-', markersize=3)
    yield _finished(figure, axes), 'entropy of the targets by epoch', ''
    figure, axes = _axes('epoch', 'mass covered (%)')
    sizes = statistics.mass_sizes
    shown = sorted({0, len(sizes) // 3, 2 * len(sizes) // 3, len(sizes) - 1})
    for place, marker in zip(shown, 'os^v'):
        axes.plot(epochs, 100 * statistics.mass[:, place], f'{marker}-', markersize=3, label=f'top {sizes[place]}')
    yield _finished(figure, axes), 'mass that the most probable classes cover by epoch', ''


def plot_histograms(statistics: StoreStatistics) -> Iterator[Plot]:
    """How views, or samples, are distributed."""
    for values, label, what in (
            (100 * statistics.confidence, 'probability of the top class (%)', 'views'),
            (statistics.entropy, 'entropy (nats)', 'views'),
            (statistics.num_listed, 'classes kept', 'views'),
            (statistics.disagreement, 'disagreement between epochs (nats)', 'samples')):
        values = values[np.isfinite(values)]
        bins = 40
        if label == 'classes kept':
            if not len(values) or values.min() == values.max():
                continue
            bins = np.arange(values.min() - 0.5, values.max() + 1) if np.ptp(values) < bins else bins
        if not len(values):
            continue
        figure, axes = _axes(label, f'share of {what} (%)')
        axes.hist(values, bins, weights=np.full(len(values), 100 / len(values)))
        partners = ', with other partners in each epoch' if what == 'samples' and statistics.is_mixed else ''
        yield figure, f'histogram of the {label}', f'{len(values):,} {what}{partners}'


def plot_reliability(statistics: StoreStatistics) -> Iterator[Plot]:
    """How often the teacher is right, by how sure it is; nothing where that cannot be said."""
    found = statistics.reliability()
    if found is not None:
        yield reliability_figure({'teacher': found}, SIZE), 'reliability diagram of the teacher', INTERVALS


def plot_agreement(statistics: StoreStatistics) -> Iterator[Plot]:
    """The share of samples whose most probable class is the same in two epochs."""
    epochs, shares = statistics.epochs, 100 * statistics.agreement()
    if not np.isfinite(shares).any():
        return
    figure, axes = _axes('epoch', 'epoch')
    axes.grid(False)
    low, high = np.nanmin(shares), np.nanmax(shares)
    axes.imshow(shares, cmap='Blues', vmin=low - 0.3 * (high - low + 1), vmax=high + 0.1)
    for row, column in np.argwhere(np.isfinite(shares)):
        dark = shares[row, column] >= (low + high) / 2
        # Not quite black and white, which would become the colours of the page.
        axes.text(column, row, f'{shares[row, column]:.0f}', ha='center', va='center', fontsize=8,
                  color='#fefefe' if dark else '#111111')
    axes.set_xticks(range(len(epochs)), epochs)
    axes.set_yticks(range(len(epochs)), epochs)
    partners = ' Each epoch mixes a sample with another partner.' if statistics.is_mixed else ''
    yield figure, 'agreement between epochs', f'Samples with the same top class in two epochs, in percent.{partners}'


def _axes(xlabel: str, ylabel: str) -> tuple['Figure', 'Axes']:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout='constrained')
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _finished(figure: 'Figure', axes: 'Axes') -> 'Figure':
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    lines, _ = axes.get_legend_handles_labels()
    if lines:
        figure.legend(loc='outside upper center', ncols=len(lines), fontsize=9, frameon=False)
    return figure


def plot_metrics(metrics: Path, picture: Path) -> bool:
    """Plot the losses and the accuracy of a run's metrics.csv by epoch.

    Returns:
        Whether there is a picture: without matplotlib (the extra `plots`) there is none.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    with open(metrics, newline='') as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row['epoch']) + 1 for row in rows]
    figure = Figure(figsize=(9, 3.4), layout='constrained')
    FigureCanvasAgg(figure)
    losses, accuracy = figure.subplots(1, 2)
    for key, label in (('loss', 'loss'), ('label_loss', 'label loss'), ('distill_loss', 'distillation loss')):
        values = [float(row[key]) for row in rows]
        if any(values) and (key == 'loss' or values != [float(row['loss']) for row in rows]):
            losses.plot(epochs, values, marker='o' if len(epochs) == 1 else None, markersize=3, label=label)
    losses.set(xlabel='epoch', ylabel='training loss')
    losses.legend()
    for key, label in (('eval_top1', 'student'), ('eval_top1_ema', 'averaged weights')):
        evaluated = [(int(row['epoch']) + 1, float(row[key])) for row in rows if row.get(key)]
        if evaluated:
            accuracy.plot(*zip(*evaluated), marker='o', markersize=3, label=label)
    if len(accuracy.get_lines()) > 1:
        accuracy.legend()
    accuracy.set(xlabel='epoch', ylabel='top-1 accuracy (%)')
    for axes in (losses, accuracy):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format='png')
    write_aside(picture, buffer.getbuffer())
    return True
