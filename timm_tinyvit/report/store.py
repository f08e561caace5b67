"""What there is to know of a store, as text, as JSON and as a page.

The page goes without pictures where the data set is not at hand or this machine makes other views, and without plots
where matplotlib is not installed; it says so.
"""

import math
from dataclasses import asdict
from typing import Any
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..base.text import counted, readable_bytes
from ..store.base import StoreReader
from ..store.remote import RemoteStore
from ..train.calibration import NUM_BINS
from ..version import __version__
from .figures import can_plot
from .page import Page
from .pictures import ShownSample, pictures_of
from .plots import Plot, plot_agreement, plot_curves, plot_histograms, plot_reliability
from .statistics import StoreStatistics, filled_shards, label_mismatch, store_statistics

__all__ = ['describe_store', 'figures_of', 'plain_report', 'shards_on_disk', 'store_facts', 'store_page', 'text_report']

NUM_CONFUSIONS = 12
PLOTS_MISSING = "plots are left out, as matplotlib is not installed: pip install 'timm_tinyvit[plots]'"
# Kinds of samples that are shown: heading, and what they are.
KINDS = {
    'varied': ('Some samples', 'Images, and the views of them that the teacher saw and a student sees.'),
    'easiest': ('The easiest samples', 'Of as many classes as there is room for, by their {measure}.'),
    'hardest': ('The hardest samples', 'By their {measure}.{hint}'),
    'disputed': ('The most disputed samples', 'What the teacher says of them changes most from view to view: the '
                                              'KL divergence from their mean target is the largest.'),
}


def shards_on_disk(store: StoreReader) -> str:
    """Which part of the store is on disk."""
    manifest, there = store.manifest, store_size(store)
    return (f'{there["shards"]} of {there["all_shards"]} ({manifest.shard_size:,} samples each), '
            f'{there["complete_epochs"]} of {manifest.epochs} epochs complete')


def store_size(store: StoreReader) -> dict[str, Any]:
    """How much of a store is there, and the bytes that it takes; of a complete store they are an estimate."""
    manifest = store.manifest
    there = filled_shards(store, manifest.stored_epochs)
    views = sum(manifest.shard_rows(shard) for shards in there.values() for shard in shards.tolist())
    all_views, size = manifest.epochs * manifest.num_samples, store.size()
    per_view = size / views if views else manifest.record_width
    return {
        'shards': sum(map(len, there.values())),
        'all_shards': manifest.epochs * manifest.num_shards,
        'complete_epochs': sum(len(shards) == manifest.num_shards for shards in there.values()),
        'views': views,
        'all_views': all_views,
        'bytes': size,
        'bytes_per_view': per_view,
        'bytes_when_complete': round(per_view * all_views),
    }


def store_facts(store: StoreReader) -> dict[str, str]:
    """How a store was made, and what is on disk of it."""
    manifest, size = store.manifest, store_size(store)
    # A manifest that was written by another program may say less.
    unknown = dict.fromkeys(('name', 'weights', 'dtype', 'device'), 'unknown') | {'input_size': '??'}
    teacher = unknown | manifest.teacher
    where = 'the Hub' if isinstance(store, RemoteStore) else 'disk'
    facts = {
        'store': str(store.path),
        'teacher': f'{teacher["name"]} (weights {teacher["weights"][:8]}, {teacher["dtype"]}, {teacher["device"]}, '
                   f'input {teacher["input_size"][-2]}x{teacher["input_size"][-1]})',
        'samples': f'{manifest.num_samples:,} of {manifest.num_classes:,} classes, '
                   f'{counted(manifest.epochs, "epoch")}, seed {manifest.seed}',
        'targets': f'the {manifest.k} most probable classes, and the mass of the others',
        'codec': f'{manifest.codec}, records of {manifest.record_width} bytes per view',
        'shards': shards_on_disk(store),
        'size': f'{readable_bytes(size["bytes"])} on {where}, {readable_bytes(size["bytes_when_complete"])} when '
                f'complete; files take {size["bytes_per_view"]:,.1f} bytes per view, with their headers',
    }
    if manifest.key:
        facts['keys'] = f'samples are named by the column {manifest.key}'
    if manifest.first_epoch or manifest.first_sample:
        facts['begins at'] = f'epoch {manifest.first_epoch}, sample {manifest.first_sample:,}'
    return facts | {
        'views': ', '.join(f'{key}={value}' for key, value in manifest.recipe.items()),
        'made with': ', '.join(f'{key} {value}' for key, value in manifest.versions.items()),
    }


def figures_of(statistics: StoreStatistics, store: StoreReader) -> dict[str, str]:
    """The statistics of a store in words."""
    found, manifest = statistics.summary(), store.manifest
    looked = (f'{len(statistics.epochs)} of {manifest.epochs} epochs, {len(statistics.rows):,} of '
              f'{manifest.num_samples:,} samples, {found["views"]:,} views')
    figures = {'looked at': looked}
    accuracy = 100 * statistics.by_epoch('right')
    if np.isfinite(accuracy).any():
        views = 'mixed views, by either label,' if statistics.is_mixed else 'views'
        scored = accuracy[np.isfinite(accuracy)]
        figures['teacher accuracy'] = (
            f'{100 * found["accuracy"]:.2f}% top-1 on the {views} of {counted(len(scored), "epoch")}, '
            f'{scored.min():.2f} to {scored.max():.2f}')
        if found['majority_accuracy'] is not None and len(scored) > 1:
            figures['by majority'] = f'{100 * found["majority_accuracy"]:.2f}% top-1 where the epochs vote'
    figures['confidence'] = f'{100 * found["confidence"]:.2f}% for the top class in the mean'
    if found['calibration_error'] is not None:
        figures['calibration'] = (
            f'expected calibration error {100 * found["calibration_error"]:.2f}% ({NUM_BINS} bins)')
    if found['label_probability'] is not None:
        both = 'both labels' if statistics.is_mixed else 'the label'
        figures['label'] = f'{100 * found["label_probability"]:.2f}% for {both} in the mean'
    figures['entropy'] = f'{found["entropy"]:.3f} nats of at most {math.log(manifest.num_classes):.3f}'
    figures['mass covered'] = ', '.join(f'{100 * share:.2f}% by {size}' for size, share in found['mass'].items())
    listed = statistics.num_listed[np.isfinite(statistics.num_listed)]
    if listed.min() < listed.max():
        figures['classes kept'] = f'{listed.mean():.2f} in the mean, {listed.min():.0f} to {listed.max():.0f}'
    if found['agreement'] is not None:
        partners = ', whose partners differ' if statistics.is_mixed else ''
        pairs, majority, all_epochs = (100 * found[name] for name in ('agreement', 'majority', 'unanimous'))
        figures['agreement'] = (
            f'the same top class in {pairs:.2f}% of all pairs of epochs{partners}; {majority:.2f}% of the views of a '
            f'sample have its most frequent one, and {all_epochs:.2f}% of the samples have one in all epochs')
    if found['disagreement'] is not None:
        figures['disagreement'] = (
            f'{found["disagreement"]:.3f} nats of KL divergence from the mean target of a sample to that of an epoch, '
            f'{found["compared_samples"]:,} samples compared'
            + (', with other partners in each epoch' if statistics.is_mixed else ''))
    return figures


def table_of(statistics: StoreStatistics) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the statistics by epoch."""
    sizes = statistics.mass_sizes
    shown = [0, *([len(sizes) // 2] if len(sizes) > 2 else []), *([len(sizes) - 1] if len(sizes) > 1 else [])]
    columns = {'epoch': statistics.epochs, 'views': [f'{views:,}' for views in statistics.num_views]}
    if statistics.has_labels:
        columns['top-1'] = _percents(statistics.by_epoch('right'))
        columns['both labels' if statistics.is_mixed else 'label'] = _percents(statistics.by_epoch('label_prob'))
    columns['entropy'] = _numbers(statistics.by_epoch('entropy'), 3)
    for place in shown:
        columns[f'top {sizes[place]} mass'] = _percents(statistics.mass[:, place])
    listed = statistics.by_epoch('num_listed')
    if len(set(listed[np.isfinite(listed)])) > 1:
        columns['classes'] = _numbers(listed, 1)
    return list(columns), [[str(cell) for cell in row] for row in zip(*columns.values())]


def text_report(store: StoreReader, statistics: StoreStatistics | None, notes: Sequence[str] = ()) -> str:
    """All that is known of a store, as lines.

    Args:
        store: The store.
        statistics: What was found in it; None where nothing is filled.
        notes: What else to say.
    """
    facts = store_facts(store)
    if statistics is not None:
        facts |= figures_of(statistics, store)
    lines = [f'{name:<17}{value}' for name, value in facts.items()]
    if statistics is not None:
        header, rows = table_of(statistics)
        widths = [max(map(len, column)) for column in zip(header, *rows)]
        lines += ['', *('  '.join(cell.rjust(width) for cell, width in zip(row, widths)) for row in [header, *rows])]
    return '\n'.join([*lines, *(['', *notes] if notes else [])])


def plain_report(store: StoreReader, statistics: StoreStatistics | None, notes: Sequence[str] = ()) -> dict[str, Any]:
    """The same as plain JSON values: the manifest, how much is there, and the statistics or None."""
    return {
        'store': str(store.path), 'manifest': asdict(store.manifest), 'size': store_size(store),
        'statistics': statistics and statistics.summary(), 'notes': list(notes)}


def store_page(
        store: StoreReader,
        statistics: StoreStatistics,
        names: Sequence[str],
        shown: dict[str, list[ShownSample]],
        notes: Sequence[str] = (),
) -> Page:
    """All that is known of a store as a page.

    Args:
        store: The store.
        statistics: What was found in it.
        names: Names of the classes.
        shown: Samples by kind, see `choose_samples`; empty where there are no pictures.
        notes: What else to say.
    """
    facts = store_facts(store)
    if not isinstance(store, RemoteStore):
        # A page may be shown to others, and a path names people and machines.
        facts['store'] = store.path.resolve().name
    # Of one on the Hub without the commit, which stands below.
    page = Page(f'Logit store {facts["store"].rpartition("/")[2].partition("@")[0]}', facts['teacher'])
    for note in notes:
        page.warning(_sentence(note))
    page.heading('The store')
    page.facts(facts)
    page.heading('The teacher')
    page.facts(figures_of(statistics, store))
    _add_plots(page, plot_histograms, plot_reliability, statistics=statistics)
    page.heading('Epoch by epoch')
    page.table(*table_of(statistics))
    if len(statistics.epochs) > 1:
        _add_plots(page, plot_curves, plot_agreement, statistics=statistics)
    if not can_plot():
        page.paragraph(_sentence(PLOTS_MISSING))
    measure, hint = ('mean entropy of the targets', '')
    if statistics.has_labels:
        measure, hint = ('mean probability of both labels', '') if statistics.is_mixed else (
            'mean probability of the label', ' Wrong labels are found here.')
    for kind, (heading, text) in KINDS.items():
        if shown.get(kind):
            page.heading(heading)
            page.paragraph(text.format(measure=measure, hint=hint))
            for sample in shown[kind]:
                page.pictures(pictures_of(sample), sample.title, width=110)
    confusions = [] if statistics.is_mixed else statistics.confusions(NUM_CONFUSIONS)
    if confusions:
        page.heading('The most frequent mistakes')
        page.table(['label', 'top class', 'views'], [
            [names[label], names[taken], f'{count:,}'] for label, taken, count in confusions])
    page.heading('The manifest')
    page.details('store.json', store.manifest.to_json())
    page.footer(f'timm_tinyvit {__version__}, python -m timm_tinyvit.report')
    return page


def _add_plots(page: Page, *plots: Callable[[StoreStatistics], Iterable[Plot]], statistics: StoreStatistics) -> None:
    for plot in plots if can_plot() else ():
        for figure, alt, caption in plot(statistics):
            page.figure(figure, alt, caption)


def _percents(shares: np.ndarray) -> list[str]:
    return ['-' if np.isnan(share) else f'{100 * share:.2f}%' for share in shares]


def _numbers(values: np.ndarray, digits: int) -> list[str]:
    return ['-' if np.isnan(value) else f'{value:.{digits}f}' for value in values]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ('' if text.endswith('.') else '.')


def describe_store(
        store: StoreReader,
        labels: np.ndarray | None = None,
        label_names: Sequence[str] | None = None,
) -> str:
    """The manifest, what is on disk, and with labels that are the teacher's classes its accuracy, as text."""
    facts = store_facts(store)
    if labels is None or labels.max() < 0:
        facts['teacher accuracy'] = 'unknown; give --dataset to compare with the labels'
    elif mismatch := label_mismatch(labels, label_names, store.manifest.num_classes):
        facts['teacher accuracy'] = f'unknown; {mismatch}'
    else:
        statistics = store_statistics(store, labels, np.flatnonzero(labels >= 0))
        facts |= {} if statistics is None else figures_of(statistics, store)
    return '\n'.join(f'{name:<17}{fact}' for name, fact in facts.items())
