"""Plots of stores and of runs, as matplotlib figures for a page; they need matplotlib, the extra `plots`."""

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.escaping import printable, without_user
from ..base.files import write_atomic
from ..base.text import short_percent
from ..train.calibration import Reliability
from ..train.metrics import read_metrics
from .features import FeatureStatistics
from .page import Page
from .run_folder import metric
from .statistics import StoreStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    'PLOTS_MISSING', 'add_plots', 'agreement_plot', 'can_plot', 'confusion_plot', 'curve_plots', 'feature_plots',
    'histogram_plots', 'plot_metrics', 'reliability_plot', 'store_plots',
]

Plot = tuple['Figure', str, str]  # with what it shows in words, and a caption
Line = tuple[str, Sequence[float], Sequence[float], dict[str, Any]]  # label, epochs, values, style

# Inches; two stand side by side on a page.
SIZE = (6.4, 3.4)
# Of one axis, above which small numbers have a power of ten.
MARGINS = dict(left=0.13, right=0.98, bottom=0.14, top=0.93)
# Up to so many epochs each has a mark of its own.
MAX_MARKS = 40
MAX_NAME, MAX_LABEL = 24, 80
WAITING, SPEED = 'waiting for data (%)', 'images per second'
# Curves of a run: what is on an axis, and the columns of its metrics.
PANELS = {
    'training loss': {
        'loss': 'loss', 'label_loss': 'label loss', 'distill_loss': 'distillation loss',
        'feature_loss': 'feature loss'},
    'top-1 accuracy (%)': {
        'eval_top1': 'student', 'eval_top1_ema': 'averaged weights', 'eval_knn': 'nearest neighbours',
        'eval_knn_ema': 'nearest neighbours, averaged weights'},
    "cosine to the teacher's features": {'feature_cosine': ''},
    'learning rate': {'lr': ''},
    'gradient norm': {'grad_norm': ''},
    WAITING: {'data_wait': ''},
    SPEED: {'images_per_second': ''},
}
PLOTS_MISSING = "Plots are left out, as matplotlib is not installed: pip install 'timm_tinyvit[plots]'."


def can_plot() -> bool:
    """Whether matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def add_plots(page: Page, plots: Iterable[Plot]) -> None:
    """Put plots on a page, which are drawn one by one; without matplotlib none."""
    for figure, alt, caption in plots if can_plot() else ():
        page.figure(figure, alt, caption)


def curve_plots(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Iterator[Plot]:
    """Losses, accuracy, learning rate, gradient norm, waiting for data and speed by epoch, of one run or several.

    Args:
        runs: The metrics of the epochs of each run, by its name.
    """
    for ylabel in PANELS:
        lines = _lines(runs, ylabel)
        if lines:
            figure, axes = _axes('epoch', ylabel)
            _draw(axes, lines)
            if ylabel in (WAITING, SPEED):
                axes.set_ylim(bottom=0)
            yield figure, f'{ylabel} by epoch', ''


def plot_metrics(metrics: Path, picture: Path) -> bool:
    """Plot the losses and the accuracy of a run's metrics.csv by epoch, as a PNG.

    Returns:
        Whether there is a picture: without matplotlib (the extra `plots`) there is none.
    """
    if not can_plot():
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout='constrained')
    runs = {'': read_metrics(metrics.parent)}
    for axes, ylabel in zip(figure.subplots(1, 2), PANELS):
        axes.set(xlabel='epoch', ylabel=ylabel)
        axes.grid(alpha=0.3)
        _draw(axes, _lines(runs, ylabel))
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format='png')
    write_atomic(picture, buffer.getbuffer())
    return True


def store_plots(statistics: StoreStatistics) -> Iterator[Plot]:
    """What changes from epoch to epoch of a store."""
    def lines(values: Mapping[str, np.ndarray], scale: float = 100) -> list[Line]:
        return [(label, statistics.epochs, scale * column, {}) for label, column in values.items()]

    shares = {'confidence': statistics.by_epoch('confidence')}
    if statistics.has_labels:
        label = 'probability of both labels' if statistics.is_mixed else 'label probability'
        shares = {'top-1': statistics.by_epoch('right'), label: statistics.by_epoch('label_prob'), **shares}
    sizes = statistics.mass_sizes
    chosen = sorted({0, len(sizes) // 3, 2 * len(sizes) // 3, len(sizes) - 1})
    mass = {f'top {sizes[place]}': statistics.mass[:, place] for place in chosen}
    for ylabel, drawn, alt in (
        ('accuracy, confidence (%)', lines(shares), 'accuracy and probabilities by epoch'),
        ('entropy (nats)', lines({'': statistics.by_epoch('entropy')}, 1), 'entropy of the targets by epoch'),
        ('mass covered (%)', lines(mass), 'mass that the most probable classes cover by epoch'),
    ):
        figure, axes = _axes('epoch', ylabel)
        _draw(axes, drawn)
        yield figure, alt, ''


def feature_plots(statistics: FeatureStatistics) -> Iterator[Plot]:
    """Lengths and variance of the vectors of a store of features."""
    figure, axes = _axes('length of a vector', 'share of views (%)')
    axes.hist(statistics.norms, bins=40, weights=np.full(len(statistics.norms), 100 / len(statistics.norms)))
    yield figure, 'histogram of the lengths of the vectors', f'{len(statistics.norms):,} views'
    shares = np.sort(statistics.variances)[::-1]
    figure, axes = _axes('numbers of a vector, by their variance', 'share of the variance (%)')
    axes.plot(range(1, len(shares) + 1), 100 * shares.cumsum() / max(shares.sum(), 1e-30))
    axes.set_ylim(bottom=0)
    yield figure, 'variance of the vectors by dimension', ''


def histogram_plots(statistics: StoreStatistics) -> Iterator[Plot]:
    """How the views of a store, or its samples, are distributed."""
    for values, label, what in (
            (100 * statistics.confidence, 'confidence (%)', 'views'),
            (statistics.entropy, 'entropy (nats)', 'views'),
            (statistics.disagreement, 'disagreement between epochs (nats)', 'samples')):
        values = values[np.isfinite(values)]
        if not len(values):
            continue
        figure, axes = _axes(label, f'share of {what} (%)')
        axes.hist(values, bins=40, weights=np.full(len(values), 100 / len(values)))
        partners = ', with other partners in each epoch' if what == 'samples' and statistics.is_mixed else ''
        yield figure, f'histogram of the {label}', f'{len(values):,} {what}{partners}'


def agreement_plot(statistics: StoreStatistics) -> Iterator[Plot]:
    """The share of samples whose most probable class is the same in two epochs of a store."""
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
    yield figure, 'agreement between epochs', f'Samples with the same prediction in two epochs, in percent.{partners}'


def reliability_plot(models: Mapping[str, Reliability], caption: str = '') -> Iterator[Plot]:
    """Reliability diagram: how often models are right where they are so sure, and how often they are.

    Args:
        models: The calibration of each, by its name.
        caption: A sentence more for the caption.
    """
    figure = _figure(SIZE, **MARGINS)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 100], [0, 100], color='gray', linestyle='--', linewidth=1)
    edges = np.linspace(0, 100, len(next(iter(models.values())).count) + 1)
    for number, (name, model) in enumerate(models.items()):
        filled = model.count > 0
        confidence = 100 * model.confidence[filled]
        above.plot(confidence, 100 * model.accuracy[filled], marker='o', markersize=4, color=f'C{number}',
                   label=f'{_plain(name)}, ECE {100 * model.error:.1f}%')
        # A bin of one sample must not look as sure as one of thousands.
        above.vlines(confidence, *(100 * end[filled] for end in model.interval()), color=f'C{number}', alpha=0.4)
        below.stairs(100 * model.count / max(1, model.count.sum()), edges, fill=True, alpha=0.45, color=f'C{number}')
    above.set(ylabel='accuracy (%)', xlim=(0, 100), ylim=(0, 100))
    below.set(xlabel='confidence (%)', ylabel='samples (%)')
    above.legend(loc='upper left')
    for axes in (above, below):
        axes.grid(alpha=0.3)
    intervals = 'Bars are 95% intervals; they are long where few samples have this confidence.'
    yield figure, f'reliability diagram of {" and ".join(models)}', f'{caption} {intervals}'.strip()


def confusion_plot(counts: np.ndarray, names: Sequence[str], title: str = 'Confusion') -> Iterator[Plot]:
    """A confusion matrix, its rows in percent.

    Args:
        counts: Samples of each label [R] that are predicted as each of these classes, and as others in more columns.
        names: Names of the columns, those of the labels first.
        title: What it is called.
    """
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    num_rows, num_columns = counts.shape
    names = [_plain(name, MAX_NAME) for name in names]
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
        text = short_percent(shares[row, column]).rstrip('%')
        axes.text(column + 0.5, row + 0.5, text, ha='center', va='center', fontsize=8)
    axes.set(ylim=(num_rows, 0), xlabel='predicted as', ylabel='label')
    axes.set_xticks(np.arange(num_columns) + 0.5, names, rotation=90, fontsize=8)
    axes.set_yticks(np.arange(num_rows) + 0.5, names[:num_rows], fontsize=8)
    axes.tick_params(length=0)
    yield figure, title, f'{title}: of each label, in percent'


def _figure(size: tuple[float, float], **margins: float) -> 'Figure':
    """An empty figure; with margins it need not measure its text, which takes half of the time."""
    from matplotlib.figure import Figure

    if not margins:
        return Figure(figsize=size, layout='constrained')
    figure = Figure(figsize=size)
    figure.subplots_adjust(**margins)
    return figure


def _axes(xlabel: str, ylabel: str) -> tuple['Figure', 'Axes']:
    figure = _figure(SIZE, **MARGINS)
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _draw(axes: 'Axes', lines: Sequence[Line]) -> None:
    """Draw lines by epoch, with a legend where any has a label."""
    for (label, epochs, values, style), marker in zip(lines, cycle('os^v')):
        axes.plot(epochs, values, label=_plain(label), linewidth=1.5, markersize=3,
                  marker=marker if len(epochs) <= MAX_MARKS else None, **style)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if any(label for label, *_ in lines):
        axes.legend()


def _lines(runs: Mapping[str, Sequence[Mapping[str, float]]], ylabel: str) -> list[Line]:
    """The curves of a panel: of several runs in a colour each, with their names."""
    lines = []
    for number, (name, rows) in enumerate(runs.items()):
        curves = _without_idle({label: metric(rows, column) for column, label in PANELS[ylabel].items()})
        for (label, points), style in zip(curves.items(), ('-', '--', ':')):
            epochs, values = np.array(points).T
            words = (name if len(runs) > 1 else '', label if len(curves) > 1 else '')
            lines.append((', '.join(filter(None, words)), epochs, values * (100 if ylabel == WAITING else 1),
                          {'color': f'C{number}', 'linestyle': style} if len(runs) > 1 else {}))
    return lines


def _without_idle(curves: Mapping[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """The curves that tell something: not only zeros, nor what the first one tells."""
    first = next(iter(curves.values()))
    return {label: points for label, points in curves.items()
            if points and (points is first or any(value for _, value in points) and points != first)}


def _plain(text: str, limit: int = MAX_LABEL) -> str:
    """Text that matplotlib takes as it is: no formula, not left out of a legend, and of a length that a plot has."""
    return re.sub('^_', ' _', printable(without_user(text), limit).replace('$', r'\$'))
