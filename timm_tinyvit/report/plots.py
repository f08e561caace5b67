"""Plots of a store's statistics, as matplotlib figures for a page. They need matplotlib, the extra `plots`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .figures import INTERVALS, SIZE, reliability_figure
from .statistics import StoreStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['plot_agreement', 'plot_curves', 'plot_histograms', 'plot_reliability']

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
