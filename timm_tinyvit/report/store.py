"""The report of a store, as text, as JSON and as a page: how it was made, how much is filled, and its statistics.

The page goes without pictures where the data set is not at hand or this machine makes other views, and without plots
where matplotlib is not installed; it says so.
"""

import json
import math
from pathlib import Path
from typing import Any
from collections.abc import Sequence

import numpy as np

from ..base.console import progress
from ..base.errors import InputError
from ..base.files import write_atomic
from ..base.remote_folder import is_remote
from ..base.text import counted, decimal, percent, readable_bytes, text_facts, text_table
from ..data.views import check_probe
from ..store.base import StoreReader
from ..store.manifest import Manifest
from ..store.remote import RemoteStore, open_reader
from ..train.calibration import NUM_BINS
from ..train.predictions import confused_pairs
from .features import feature_statistics
from .labels import LabelledViews, labelled_views, teacher_classes
from .page import Page, check_output
from .pictures import ShownSample, choose_samples, draw_pictures, neighbour_rows, show_samples
from .plots import (
    PLOTS_MISSING, add_plots, agreement_plot, can_plot, feature_plots, histogram_plots, reliability_plot, store_plots,
)
from .statistics import MAX_EPOCHS, MAX_SAMPLES, StoreStatistics, filled_shards, store_statistics

__all__ = [
    'describe_store', 'figures_of', 'plain_report', 'report_store', 'shards_on_disk', 'store_facts', 'store_page',
    'targets_of', 'text_report',
]

# Each is downloaded.
MAX_REMOTE_EPOCHS = 3
NUM_GALLERY_ROWS = 5
NUM_GALLERY_EPOCHS = 6
NUM_CONFUSIONS = 12
NUM_NEIGHBOURHOODS = 8
# Kinds of samples that are shown: heading, and what they are.
KINDS = {
    'varied': ('Some samples', 'Images, and the views of them that the teacher saw and a student sees.'),
    'easiest': ('The easiest samples', 'By their {measure}; of different classes where possible.'),
    'hardest': ('The hardest samples', 'By their {measure}.{hint}'),
    'disputed': ('The most disputed samples', 'The teacher predicts most differently from view to view: the KL '
                                              'divergence from the mean over the epochs is the largest.'),
}


def report_store(
        path: str,
        html: str | Path | None = None,
        gallery: str | Path | None = None,
        as_json: bool = False,
        epochs: range | None = None,
        max_samples: int | None = None,
        dataset: str | None = None,
        train_split: str | None = None,
        input_key: str | None = None,
        target_key: str | None = None,
        key_column: str | None = None,
) -> str:
    """The report of a store, as text or JSON; the page and the picture that are asked for are written.

    Args:
        path: Folder or URL of the store.
        html: File of the page.
        gallery: File of a PNG with views of several epochs; needs the data set.
        as_json: Give JSON instead of lines for people.
        epochs: Epochs to choose from; by default all, of one behind a URL three, as each is downloaded.
        max_samples: Samples to read, at most; 100,000 by default.
        dataset: The data set of the store, for labels and views.
        train_split: Its split, `train` by default.
        input_key: Its image column.
        target_key: Its label column.
        key_column: Its column of keys; that of the store by default.

    Raises:
        InputError: There is no store, it is damaged, the data set is not its own, or a file cannot be written.
    """
    check_output(html)
    check_output(gallery)
    if max_samples is not None and max_samples < 1:
        raise InputError(f'--max-samples is {max_samples}; expected 1 or more')
    max_epochs = MAX_REMOTE_EPOCHS if is_remote(path) and epochs is None else MAX_EPOCHS
    store = open_reader(path, keep_epochs=max_epochs)
    stored = store.manifest.stored_epochs
    epochs = stored if epochs is None else epochs
    if not set(epochs) <= set(stored):
        raise InputError(f'the store {store.path} is meant to hold epochs {stored.start}:{stored.stop}, but '
                         f'{epochs.start}:{epochs.stop} are asked for; fix --epochs')
    data, notes = labelled_views(store, dataset, train_split, input_key, target_key, key_column), []
    if store.manifest.features:
        return _report_features(store, data, html, gallery, as_json, epochs, max_samples or MAX_SAMPLES, max_epochs)
    if data is None:
        notes.append('teacher accuracy and pictures of the views need the images; give --dataset')
    elif data.teacher_labels is None:
        notes.append(f'teacher accuracy unknown: {data.mismatch or "the data set has no labels"}')
    with progress(total=0, desc='report', unit='view', leave=False) as bar:

        def advance(views: int, total: int) -> None:
            bar.total = total
            bar.update(views)

        statistics = store_statistics(
            store, data and data.teacher_labels, data and np.sort(data.rows), epochs, max_samples or MAX_SAMPLES,
            max_epochs, advance)
    if statistics is None:
        notes.append('the store is empty: no shard has been filled yet')
    text = (json.dumps(plain_report(store, statistics, notes), indent=2) if as_json else
            text_report(store, statistics, notes))
    if not (html or gallery):
        return text
    if statistics is None:
        raise InputError(f'the store {store.path} is empty: no shard has been filled yet; fill it first')
    names = teacher_classes(store.manifest, data) or [f'class {number}' for number in range(store.manifest.num_classes)]
    if gallery:
        if data is None:
            raise InputError('--gallery shows views, which are made from the images; give --dataset')
        check_probe(data.views.replay, store.manifest.probe, store.manifest.versions)
        chosen = {'varied': choose_samples(statistics)['varied'][:NUM_GALLERY_ROWS]}
        samples = show_samples(data, statistics, chosen, names, NUM_GALLERY_EPOCHS)['varied']
        write_atomic(Path(gallery), draw_pictures([sample.pictures for sample in samples]))
    if html:
        shown = {}
        if data is not None:
            try:
                check_probe(data.views.replay, store.manifest.probe, store.manifest.versions)
                shown = show_samples(data, statistics, choose_samples(statistics), names)
            except InputError as error:
                notes.append(f'there are no pictures: {error}')
        store_page(store, statistics, names, shown, notes).write(html)
    return text


def _report_features(
        store: StoreReader,
        data: LabelledViews | None,
        html: str | Path | None,
        gallery: str | Path | None,
        as_json: bool,
        epochs: Sequence[int],
        max_samples: int,
        max_epochs: int,
) -> str:
    """`report_store` of a store of features, whose views are shown beside those that are nearest to them."""
    statistics = feature_statistics(store, epochs, max_samples, max_epochs, data and np.sort(data.rows))
    notes, neighbours = ['none of it is filled yet'] if statistics is None else [], []
    if gallery and (data is None or statistics is None):
        raise InputError(f'--gallery shows views of {store.path}, which are made from the images; '
                         f'{"give --dataset" if data is None else "fill some of it first"}')
    if data is None:
        notes.append('pictures of nearest neighbours need the images; give --dataset')
    elif statistics is not None and (html or gallery):
        try:
            check_probe(data.views.replay, store.manifest.probe, store.manifest.versions)
            neighbours = neighbour_rows(data, statistics, NUM_NEIGHBOURHOODS)
        except InputError as error:
            if gallery:
                raise
            notes.append(f'there are no pictures: {error}')
    if gallery:
        write_atomic(Path(gallery), draw_pictures(neighbours))
    facts = _page_facts(store) if html else store_facts(store)
    figures = {} if statistics is None else statistics.figures()
    if html:
        page = _begin_page('Feature store', facts, notes, figures)
        if statistics is not None:
            add_plots(page, feature_plots(statistics))
        if neighbours:
            page.heading('Nearest neighbours')
            page.paragraph(
                f'On the left a view of epoch {statistics.epochs[0]}; beside it those of {len(statistics.rows) - 1:,} '
                f'other samples whose vectors are nearest to its own, with their cosines.')
            for row in neighbours:
                page.pictures(row, width=110)
        page.heading('The manifest')
        page.details('store.json', store.manifest.to_json())
        page.write(html)
    if as_json:
        return json.dumps({
            'store': str(store.path), 'manifest': store.manifest.to_dict(), 'size': store_size(store),
            'statistics': statistics and statistics.summary(), 'notes': notes}, indent=2)
    return '\n'.join([*(f'{name:<17}{fact}' for name, fact in (facts | figures).items()), *notes])


def _page_facts(store: StoreReader) -> dict[str, str]:
    facts = store_facts(store)
    if not (isinstance(store, RemoteStore) and store.source.is_on_hub):
        # A page may be shown to others, and a path names people and machines.
        facts['store'] = Path(store.path).resolve().name
    return facts


def _begin_page(kind: str, facts: dict[str, str], notes: Sequence[str], figures: dict[str, str]) -> Page:
    """A page that begins with what a store is, and its figures."""
    # Of one on the Hub without the commit, which stands below.
    page = Page(f'{kind} {facts["store"].rpartition("/")[2].partition("@")[0]}', facts['teacher'])
    for note in notes:
        page.warning(_sentence(note))
    page.heading('The store')
    page.facts(facts)
    page.heading('Statistics')
    page.facts(figures)
    return page


def shards_on_disk(store: StoreReader) -> str:
    """Which part of the store is on disk."""
    size, manifest = store_size(store), store.manifest
    most = 'up to ' if manifest.num_shards > 1 else ''
    return (f'{size["shards"]} of {size["all_shards"]} ({most}{manifest.shard_rows(0):,} samples each), '
            f'{size["complete_epochs"]} of {manifest.epochs} epochs complete')


def store_size(store: StoreReader) -> dict[str, Any]:
    """How much of a store is filled, and the bytes that it takes; of a complete store they are an estimate."""
    manifest = store.manifest
    filled = filled_shards(store, manifest.stored_epochs)
    views = sum(manifest.shard_rows(shard) for shards in filled.values() for shard in shards.tolist())
    all_views, size = manifest.epochs * manifest.num_samples, store.size()
    per_view = size / views if views else manifest.record_width
    return {
        'shards': sum(map(len, filled.values())),
        'all_shards': manifest.epochs * manifest.num_shards,
        'complete_epochs': sum(len(shards) == manifest.num_shards for shards in filled.values()),
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
    where = 'disk'
    if isinstance(store, RemoteStore):
        where = 'the Hub' if store.source.is_on_hub else f'{store.source.protocol}://'
    facts = {
        'store': str(store.path),
        'teacher': f'{teacher["name"]} (weights {teacher["weights"][:8]}, {teacher["dtype"]}, {teacher["device"]}, '
                   f'input {teacher["input_size"][-2]}x{teacher["input_size"][-1]})',
        'samples': f'{manifest.num_samples:,}{"" if manifest.features else f" of {manifest.num_classes:,} classes"}, '
                   f'{counted(manifest.epochs, "epoch")}, seed {manifest.seed}',
        'targets': targets_of(manifest),
        'codec': f'{manifest.codec}, records of {manifest.record_width} bytes per view',
        'shards': shards_on_disk(store),
        'size': f'{readable_bytes(size["bytes"])} on {where}, {readable_bytes(size["bytes_when_complete"])} when '
                f'complete; files take {size["bytes_per_view"]:,.1f} bytes per view, headers included'
                if size['views'] else
                f'nothing on {where} yet, about {readable_bytes(size["bytes_when_complete"])} when complete',
    }
    if manifest.key:
        facts['keys'] = f'samples are named by the column {manifest.key}'
    if manifest.first_epoch or manifest.first_sample:
        facts['begins at'] = f'epoch {manifest.first_epoch}, sample {manifest.first_sample:,}'
    return facts | {
        'views': ', '.join(f'{key}={value}' for key, value in manifest.recipe.items()),
        'made with': ', '.join(f'{key} {value}' for key, value in manifest.versions.items()),
    }


def targets_of(manifest: Manifest) -> str:
    """What a store keeps of its teacher, in words."""
    features = manifest.features
    if not features:
        return f'the {manifest.k} most probable classes, and the mass of the others'
    grid = f'{features["grid"]}x{features["grid"]} vectors' if features['grid'] else 'the pooled vector'
    projected = (f', projected, with {percent(features["variance"])} of the variance of the teacher\'s'
                 if features['projection'] else '')
    return f'features, {grid} of {features["dim"]:,} numbers{projected}'


def figures_of(statistics: StoreStatistics, store: StoreReader) -> dict[str, str]:
    """The statistics of a store in words."""
    summary, manifest = statistics.summary(), store.manifest
    figures = {
        'read': f'{len(statistics.epochs)} of {manifest.epochs} epochs, {len(statistics.rows):,} of '
                f'{manifest.num_samples:,} samples, {summary["views"]:,} views'}
    accuracy = 100 * statistics.by_epoch('right')
    if np.isfinite(accuracy).any():
        views = 'mixed views, by either label,' if statistics.is_mixed else 'views'
        scored = accuracy[np.isfinite(accuracy)]
        figures['teacher accuracy'] = (
            f'{percent(summary["accuracy"])} top-1 on the {views} of {counted(len(scored), "epoch")}, '
            f'{scored.min():.2f} to {scored.max():.2f}')
        if summary['majority_accuracy'] is not None and len(scored) > 1:
            figures['majority vote'] = (
                f'{percent(summary["majority_accuracy"])} top-1 with the class that most epochs of a sample predict')
    figures['confidence'] = f'{percent(summary["confidence"])} on average'
    if summary['calibration_error'] is not None:
        figures['calibration'] = (
            f'expected calibration error {percent(summary["calibration_error"])} ({NUM_BINS} bins)')
    if summary['label_probability'] is not None:
        both = 'both labels' if statistics.is_mixed else 'the label'
        figures['label'] = f'{percent(summary["label_probability"])} on average for {both}'
    figures['entropy'] = (
        f'{summary["entropy"]:.3f} nats on average, {math.log(manifest.num_classes):.3f} at most')
    figures['mass covered'] = ', '.join(
        f'top {size} {percent(share)}' for size, share in summary['mass'].items())
    if summary['agreement'] is not None:
        partners = ' (their partners differ)' if statistics.is_mixed else ''
        pairs, majority, all_epochs = (100 * summary[name] for name in ('agreement', 'majority', 'unanimous'))
        figures['agreement'] = (
            f'two epochs predict the same class of a sample in {pairs:.2f}% of cases{partners}, an epoch predicts the '
            f'most frequent class of a sample in {majority:.2f}%, and all epochs agree on {all_epochs:.2f}% of the '
            f'samples')
    if summary['disagreement'] is not None:
        figures['disagreement'] = (
            f'{summary["disagreement"]:.3f} nats: mean KL divergence of the targets of an epoch from their mean over '
            f'the epochs, {summary["compared_samples"]:,} samples compared'
            + (', with other partners in each epoch' if statistics.is_mixed else ''))
    return figures


def table_of(statistics: StoreStatistics) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the statistics by epoch."""
    sizes = list(map(str, statistics.mass_sizes))
    sizes = list(dict.fromkeys((sizes[0], sizes[len(sizes) // 2], sizes[-1])))
    header, rows = ['epoch', 'views', 'entropy', *(f'top {size} mass' for size in sizes)], []
    if statistics.has_labels:
        header[2:2] = ['top-1', 'both labels' if statistics.is_mixed else 'label']
    for epoch in statistics.summary()['epochs']:
        shares = [percent(epoch[name]) for name in ('accuracy', 'label_probability') if statistics.has_labels]
        rows.append([str(epoch['epoch']), f'{epoch["views"]:,}', *shares, decimal(epoch['entropy'], 3),
                     *(percent(epoch['mass'][size]) for size in sizes)])
    return header, rows


def text_report(store: StoreReader, statistics: StoreStatistics | None, notes: Sequence[str] = ()) -> str:
    """The report of a store as lines.

    Args:
        store: The store.
        statistics: Of the store; None where nothing is filled.
        notes: What else to say.
    """
    facts = store_facts(store)
    if statistics is not None:
        facts |= figures_of(statistics, store)
    lines = [text_facts(facts)]
    if statistics is not None:
        header, rows = table_of(statistics)
        lines += ['', text_table([header, *rows])]
    return '\n'.join([*lines, *(['', *notes] if notes else [])])


def plain_report(store: StoreReader, statistics: StoreStatistics | None, notes: Sequence[str] = ()) -> dict[str, Any]:
    """The same as plain JSON values: the manifest, how much is filled, and the statistics or None."""
    return {
        'store': str(store.path), 'manifest': store.manifest.to_dict(), 'size': store_size(store),
        'statistics': statistics and statistics.summary(), 'notes': list(notes)}


def store_page(
        store: StoreReader,
        statistics: StoreStatistics,
        names: Sequence[str],
        shown: dict[str, list[ShownSample]],
        notes: Sequence[str] = (),
) -> Page:
    """The report of a store as a page.

    Args:
        store: The store.
        statistics: Of the store.
        names: Names of the classes.
        shown: Samples by kind, see `choose_samples`; empty where there are no pictures.
        notes: What else to say.
    """
    page = _begin_page('Logit store', _page_facts(store), notes, figures_of(statistics, store))
    add_plots(page, histogram_plots(statistics))
    predictions = statistics.predictions
    if predictions is not None:
        add_plots(page, reliability_plot({'teacher': predictions.reliability()}))
    page.heading('Epoch by epoch')
    page.table(*table_of(statistics))
    if len(statistics.epochs) > 1:
        add_plots(page, store_plots(statistics))
        add_plots(page, agreement_plot(statistics))
    if not can_plot():
        page.paragraph(PLOTS_MISSING)
    measure, hint = ('mean entropy of the targets', '')
    if statistics.has_labels:
        measure, hint = ('mean probability of both labels', '') if statistics.is_mixed else (
            'mean probability of the label', ' Wrong labels are found here.')
    for kind, (heading, text) in KINDS.items():
        if shown.get(kind):
            page.heading(heading)
            page.paragraph(text.format(measure=measure, hint=hint))
            for sample in shown[kind]:
                page.pictures(sample.pictures, sample.title, width=110)
    confusions = [] if predictions is None else confused_pairs(predictions, NUM_CONFUSIONS)
    if confusions:
        page.heading('The most frequent confusions')
        page.table(['label', 'predicted as', 'views'], [
            [names[label], names[other], f'{count:,}'] for label, other, count in confusions])
    page.heading('The manifest')
    page.details('store.json', store.manifest.to_json())
    return page


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ('' if text.endswith('.') else '.')


def describe_store(store: StoreReader, data: LabelledViews | None = None) -> str:
    """The manifest, what is on disk, and with labels that are the teacher's classes its accuracy, as text."""
    facts = store_facts(store)
    if store.manifest.features:
        statistics = feature_statistics(store, store.manifest.stored_epochs)
        facts |= {} if statistics is None else statistics.figures()
    elif data is None or data.teacher_labels is None:
        mismatch = data and data.mismatch
        facts['teacher accuracy'] = f'unknown; {mismatch or "give --dataset to compare with the labels"}'
    else:
        statistics = store_statistics(store, data.labels, np.flatnonzero(data.labels >= 0))
        facts |= {} if statistics is None else figures_of(statistics, store)
    return text_facts(facts)
