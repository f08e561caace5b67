"""Plots of a store's statistics, as matplotlib figures for a page. They need matplotlib, the extra `plots`."""

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING
from collections.abc import Iterator

import numpy as np

from ..base.files import write_atomic
from .figures import INTERVALS, SIZE, reliability_figure
from .statistics import StoreStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['plot_agreement', 'plot_curves', 'plot_histograms', 'plot_metrics', 'plot_reliability']

Plot = tuple['Figure', str, str]  # with what it shows in words, and a caption


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
    write_atomic(picture, buffer.getbuffer())
    return True
