"""What is published beside the shards of a store: its card, a sample that can be read without this package, a picture.

Nothing here depends on the time, on the machine or on who publishes: the same store gives the same bytes, so that
publishing it again changes nothing.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from huggingface_hub import DatasetCard, DatasetCardData

from ..base.text import percent
from ..base.yaml_reader import card_head
from ..data.dataset import read_records
from ..data.view_config import ViewConfig
from ..models.names import hub_repo_of
from ..report.features import FeatureStatistics, feature_statistics
from ..report.labels import LabelledViews, teacher_classes
from ..report.pictures import choose_samples, draw_pictures, neighbour_rows, show_samples
from ..report.statistics import StoreStatistics, evenly, store_statistics
from ..report.store import targets_of
from ..store.base import StoreReader
from ..store.manifest import Manifest
from .model_card import CITATION, kept_metadata, render_card

__all__ = [
    'PICTURE', 'SAMPLE', 'card_statistics', 'dataset_card', 'draw_views', 'parquet_bytes', 'sample_table',
    'with_license',
]

SAMPLE, PICTURE = 'sample.parquet', 'views.png'

SAMPLE_ROWS = 1000
SAMPLE_EPOCHS = 10
SAMPLE_CLASSES = 10
SAMPLE_NUMBERS = 1 << 20  # of a sample of features
STATISTICS_SAMPLES = 10_000

# Arguments of SparseLogitDataset, and the programs' flags for them.
COLUMN_FLAGS = {'image_column': '--input-key', 'label_column': '--target-key'}

PICTURE_COLUMNS, PICTURE_ROWS, PICTURE_NEIGHBOURHOODS = 4, 3, 5
MAX_PICTURE_BYTES = 300_000


def card_statistics(
        store: StoreReader,
        epochs: Sequence[int],
        data: LabelledViews | None = None,
) -> StoreStatistics | FeatureStatistics:
    """The statistics of a store that its card gives, and that the samples of its picture are chosen by.

    Args:
        store: The store.
        epochs: Complete epochs of it.
        data: Its data set, for the accuracy.
    """
    if store.manifest.features:
        return feature_statistics(store, epochs, among=data and np.sort(data.rows))
    return store_statistics(
        store, data and data.teacher_labels, data and np.sort(data.rows), epochs, STATISTICS_SAMPLES)


def sample_table(store: StoreReader, epochs: Sequence[int], data: LabelledViews | None = None) -> pa.Table:
    """About 1,000 views in plain columns: the same samples, evenly spaced, in up to 10 epochs.

    Args:
        store: The store.
        epochs: Complete epochs of it.
        data: Its data set, for labels and names.
    """
    names, label_names = teacher_classes(store.manifest, data), data and data.label_names
    chosen = [epochs[place] for place in evenly(len(epochs), SAMPLE_EPOCHS)]
    is_features = bool(store.manifest.features)
    num_rows = SAMPLE_ROWS
    if is_features:
        num_rows = max(len(chosen), min(SAMPLE_ROWS, SAMPLE_NUMBERS // (store.codec.cells * store.codec.dim)))
    rows = evenly(store.manifest.num_samples, num_rows // len(chosen))
    views = []
    for epoch in chosen:
        targets = store.codec.decode(read_records(store, np.full(len(rows), epoch), rows))
        if is_features:
            views += [{**_label_of(row, data), 'epoch': epoch, 'index': row, 'vectors': vectors}
                      for row, vectors in zip(rows.tolist(), targets.vectors.tolist())]
            continue
        probs, order = targets.log_probs.double().exp().topk(min(SAMPLE_CLASSES, targets.k), dim=1)
        for row, classes, shares in zip(rows.tolist(), targets.ids.gather(1, order).tolist(), probs.tolist()):
            views.append({
                **_label_of(row, data), 'epoch': epoch, 'index': row, 'classes': classes,
                'names': names and [names[index] for index in classes], 'probabilities': shares,
                'rest': max(0., 1. - sum(shares))})
    columns = {
        'epoch': pa.int32(), 'index': pa.int64(), 'label': pa.int64(), 'label_name': pa.string(),
        **({'vectors': pa.list_(pa.list_(pa.float32()))} if is_features else {
            'classes': pa.list_(pa.int32()), 'names': pa.list_(pa.string()), 'probabilities': pa.list_(pa.float32()),
            'rest': pa.float32()})}
    unknown = {'label': data, 'label_name': label_names, 'names': names}
    return pa.Table.from_pylist(views, pa.schema([
        pa.field(name, kind) for name, kind in columns.items() if unknown.get(name, name) is not None]))


def _label_of(row: int, data: LabelledViews | None) -> dict[str, Any]:
    """Number and name of a sample's label, None where they are not known."""
    label = -1 if data is None else int(data.labels[row])
    names = data and data.label_names
    return {'label': None if label < 0 else label, 'label_name': names[label] if names and label >= 0 else None}


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression='zstd')
    return sink.getvalue().to_pybytes()


def draw_views(data: LabelledViews, statistics: StoreStatistics | FeatureStatistics) -> bytes:
    """A PNG of some views, each with what the teacher predicts of it: in a column an image, in a row an epoch.

    Of features a row is a view and those that are nearest to it.

    Args:
        data: The data set of the store.
        statistics: Of `card_statistics`.
    """
    if isinstance(statistics, FeatureStatistics):
        return draw_pictures(neighbour_rows(data, statistics, PICTURE_NEIGHBOURHOODS), MAX_PICTURE_BYTES)
    manifest = data.views.store.manifest
    names = teacher_classes(manifest, data) or [f'class {number}' for number in range(manifest.num_classes)]
    count = PICTURE_COLUMNS if len(statistics.epochs) > 1 else PICTURE_COLUMNS * PICTURE_ROWS
    chosen = {'varied': choose_samples(statistics)['varied'][:count]}
    samples = show_samples(data, statistics, chosen, names, PICTURE_ROWS)['varied']
    # The views alone: no whole image of the data is published.
    views = [
        replace(picture, caption=', '.join(filter(None, (sample.label, picture.caption))))
        for row in zip(*(sample.pictures[1:] for sample in samples)) for sample, picture in zip(samples, row)]
    return draw_pictures(
        [views[start:start + PICTURE_COLUMNS] for start in range(0, len(views), PICTURE_COLUMNS)], MAX_PICTURE_BYTES)


def dataset_card(
        manifest: Manifest,
        repo_id: str,
        size: int,
        sample: pa.Table,
        statistics: StoreStatistics | FeatureStatistics,
        data: LabelledViews | None = None,
        has_picture: bool = False,
        before: str = '',
        licence: str | None = None,
) -> str:
    """The card of a store.

    Args:
        manifest: The manifest that is published with it.
        repo_id: Where it is published, ORG/NAME.
        size: Bytes of all shards on the Hub.
        sample: The table that is published.
        statistics: Of `card_statistics`.
        data: The data set, for its name.
        has_picture: Whether there is a picture of views.
        before: The card that it replaces; what its owners say of licence and languages is kept.
        licence: Name of a licence, in place of the one before.
    """
    views = manifest.num_samples * manifest.epochs
    teacher = dict(name='unknown', weights='', dtype='', device='', input_size=[]) | manifest.teacher
    on_hub = data is not None and data.on_hub
    card_data = DatasetCardData(**{
        'pretty_name': f'{"Features" if manifest.features else "Logits"} of {teacher["name"]}',
        'task_categories': ['image-feature-extraction' if manifest.features else 'image-classification'],
        'size_categories': [_size_category(views)],
        'tags': ['knowledge-distillation', 'features' if manifest.features else 'logits', 'timm', 'timm_tinyvit'],
        'source_datasets': [re.split('[@:]', data.name)[0]] if on_hub else None,
        # Only these files are the data set that the Hub's viewer and `load_dataset` see.
        'configs': [{'config_name': 'sample', 'default': True, 'data_files': [{'split': 'train', 'path': SAMPLE}]}],
        **kept_metadata(before, licence)})
    source, columns = data.name if on_hub else 'DATA', data.columns if data else {}
    split = data.split if data else 'train'
    flags = ['--dataset', source, *(['--train-split', split] if split != 'train' else []),
             *(word for key, name in columns.items() for word in (COLUMN_FLAGS[key], name))]
    summary = statistics.summary()
    is_mixed = ViewConfig.from_dict(manifest.recipe).is_mixed
    if manifest.features:
        figures = {name.capitalize(): text for name, text in statistics.figures().items() if name != 'read'}
    else:
        shares = {
            'Top-1 accuracy': summary['accuracy'],
            'Top-1 accuracy of the majority vote of the epochs': summary['majority_accuracy'],
            'Mean confidence': summary['confidence'],
            'Probability mass of the stored classes': list(summary['mass'].values())[-1],
            'Agreement of the predictions in two epochs': None if is_mixed else summary['agreement'],
        }
        figures = {name: percent(share) for name, share in shares.items() if share is not None}
    return render_card(
        'store_card.md', card_data, manifest=manifest, teacher=teacher, teacher_repo=hub_repo_of(str(teacher['name'])),
        repo=repo_id, views=views, size=size, data=data, source=source, split=split,
        train_command=f'timm-tinyvit train {shlex.join(flags)} --model tiny_vit_21m_224 \\\n    --epochs '
                      f'{manifest.epochs} {"--num-classes 0 " if manifest.features else ""}--logits', columns=columns,
        is_mixed=is_mixed, summary=summary, figures=figures, targets=targets_of(manifest),
        picture=PICTURE if has_picture else '', num_rows=len(sample), columns_of_sample=[
            name for name in sample.column_names if sample[name].null_count < len(sample)],
        most_listed=min(manifest.k, SAMPLE_CLASSES),
        recipe=yaml.safe_dump(manifest.recipe, default_flow_style=None, sort_keys=False).strip(), citation=CITATION)


def with_license(card: str, licence: str) -> str:
    """A card with this licence in its head, and all else as it is.

    Raises:
        InputError: The head cannot be read.
    """
    if card_head(card, 'the published README.md').get('license') == licence:
        return card
    changed = DatasetCard(card, ignore_metadata_errors=True)
    for key in ('license_name', 'license_link'):
        changed.data.pop(key)
    changed.data['license'] = licence
    return str(changed)


def _size_category(count: int) -> str:
    """What the Hub calls a number of rows."""
    bounds = ['1K', '10K', '100K', '1M', '10M', '100M', '1B', '10B', '100B', '1T']
    place = sum(count >= 10 ** (3 + power) for power in range(len(bounds)))
    if place == 0:
        return 'n<1K'
    return f'{bounds[place - 1]}<n<{bounds[place]}' if place < len(bounds) else 'n>1T'
