"""What is published beside the shards of a store: its card, a sample that can be read without this package, a picture.

Nothing here depends on the time, on the machine or on who publishes: the same store gives the same bytes, so that
publishing it again changes nothing.
"""

import io
import shlex
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image, ImageDraw, ImageFont
from timm.data import ImageNetInfo

from ..base.text import counted, readable_bytes
from ..data.dataset import SparseLogitDataset, read_records
from ..data.views import ViewRecipe
from ..models.imagenet22k import NUM_CLASSES_22K
from ..models.names import hub_repo_of
from ..report.statistics import label_mismatch, store_statistics
from ..store.base import StoreReader
from ..store.manifest import Manifest
from ..targets.sparse import SparseTargets
from ..train.predictions import in_turn
from .model_card import CITATION, card_metadata, kept_metadata

__all__ = [
    'CARD', 'PICTURE', 'SAMPLE', 'LabelledViews', 'data_name', 'draw_views', 'most_probable',
    'parquet_bytes', 'render_card', 'sample_table', 'teacher_classes', 'with_license',
]

TEMPLATE = resources.files('timm_tinyvit.hub') / 'cards' / 'store_card.md'
CARD, SAMPLE, PICTURE = 'README.md', 'sample.parquet', 'views.png'
HUB = 'https://huggingface.co'

SAMPLE_ROWS = 1000
SAMPLE_EPOCHS = 10
SAMPLE_CLASSES = 10
STATISTICS_SAMPLES = 10_000

# Arguments of SparseLogitDataset, and the programs' flags for them.
COLUMN_FLAGS = {'image_key': '--input-key', 'label_key': '--target-key'}

PICTURE_COLUMNS, PICTURE_ROWS, PICTURE_CLASSES = 4, 3, 3
PICTURE_CANDIDATES = 1000
MAX_PICTURE_BYTES = 300_000
TILE_SIZES = (176, 144, 112, 80, 56)
# Names of the classes of the two ImageNets, by the last words of a timm tag and the number of classes.
IMAGENETS = {('in1k', 1000): 'imagenet-1k', ('in22k', NUM_CLASSES_22K): 'imagenet-22k'}


@dataclass(frozen=True)
class LabelledViews:
    """The data set of a store, for what only it can tell.

    Attributes:
        name: What it is called, no path.
        on_hub: Whether this is its name on the Hub.
        split: Which part of it.
        views: Its views and records.
        labels: Labels of the rows of the store, int64 [num_samples]; -1 where there is none.
        class_names: Names of its classes, where it knows them.
        columns: Its columns by `image_key` and `label_key`, where they are not found by their names.
    """
    name: str
    on_hub: bool
    split: str
    views: SparseLogitDataset
    labels: np.ndarray
    class_names: list[str] | None
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_labels(self) -> bool:
        """Whether any row has a label."""
        return bool((self.labels >= 0).any())


@dataclass(frozen=True)
class _Names:
    """What the numbers of a store and of its data set are called, None where nobody knows."""
    classes: Sequence[str] | None
    labels: Sequence[str] | None
    # Whether a label is the number of a class of the teacher.
    labels_are_classes: bool

    @classmethod
    def of(cls, manifest: Manifest, data: LabelledViews | None) -> '_Names':
        classes = teacher_classes(manifest)
        if data is None:
            return cls(classes, None, False)
        fits = label_mismatch(data.labels, data.class_names, manifest.num_classes) is None
        if fits and data.class_names:
            classes = data.class_names
        return cls(classes, data.class_names or (classes if fits else None), fits)


def teacher_classes(manifest: Manifest) -> list[str] | None:
    """Names of the classes of a teacher whose name, or number of classes, tells which ImageNet it knows."""
    name, dot, tag = str(manifest.teacher.get('name', '')).rpartition('.')
    subset = IMAGENETS.get((tag.rpartition('_')[2] if dot else 'in22k', manifest.num_classes))
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(index) for index in range(manifest.num_classes)]


def sample_table(store: StoreReader, epochs: Sequence[int], data: LabelledViews | None = None) -> pa.Table:
    """About 1,000 views in plain columns: the same samples, evenly spaced, in up to 10 epochs.

    Args:
        store: The store.
        epochs: Complete epochs of it.
        data: Its data set, for labels and names.
    """
    names = _Names.of(store.manifest, data)
    chosen = [epochs[place] for place in _evenly(len(epochs), SAMPLE_EPOCHS)]
    rows = _evenly(store.manifest.num_samples, SAMPLE_ROWS // len(chosen))
    columns: dict[str, list] = {name: [] for name in ('epoch', 'index', 'label', 'classes', 'probabilities', 'rest')}
    for epoch in chosen:
        targets = store.codec.decode(read_records(store, np.full(len(rows), epoch), rows))
        for row, (classes, probs) in zip(rows.tolist(), most_probable(targets, SAMPLE_CLASSES)):
            columns['epoch'].append(epoch)
            columns['index'].append(row)
            label = -1 if data is None else int(data.labels[row])
            columns['label'].append(None if label < 0 else label)
            columns['classes'].append(classes)
            columns['probabilities'].append(probs)
            columns['rest'].append(max(0., 1. - sum(probs)))
    types = dict(epoch=pa.int32(), index=pa.int64(), label=pa.int64(), classes=pa.list_(pa.int32()),
                 probabilities=pa.list_(pa.float32()), rest=pa.float32())
    arrays = {name: pa.array(columns[name], kind) for name, kind in types.items()}
    if data is None:
        del arrays['label']
    if names.labels:
        arrays['label_name'] = pa.array(
            [None if label is None else names.labels[label] for label in columns['label']], pa.string())
    if names.classes:
        arrays['names'] = pa.array(
            [[names.classes[index] for index in row] for row in columns['classes']], pa.list_(pa.string()))
    order = ('epoch', 'index', 'label', 'label_name', 'classes', 'names', 'probabilities', 'rest')
    return pa.table({name: arrays[name] for name in order if name in arrays})


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression='zstd')
    return sink.getvalue().to_pybytes()


def most_probable(targets: SparseTargets, count: int) -> list[tuple[list[int], list[float]]]:
    """Of each of B targets the most probable listed classes, up to so many, and their probabilities."""
    probs, order = targets.log_probs.double().exp().topk(min(count, targets.k), dim=1)
    return list(zip(targets.ids.gather(1, order).tolist(), probs.tolist()))


def draw_views(store: StoreReader, epochs: Sequence[int], data: LabelledViews) -> bytes:
    """A PNG of some views, each with what the teacher says of it: in a column an image, in a row an epoch.

    Args:
        store: The store.
        epochs: Complete epochs of it.
        data: Its data set.
    """
    dataset = data.views
    count = PICTURE_COLUMNS if len(epochs) > 1 else PICTURE_COLUMNS * PICTURE_ROWS
    # Of other classes, as far as there are labels.
    positions = _evenly(len(dataset), PICTURE_CANDIDATES)
    positions = np.sort(in_turn(positions, data.labels)[:count]).tolist()
    shown = [epochs[place] for place in _evenly(len(epochs), PICTURE_ROWS)]
    # Sorted by epoch, as a store reads best.
    samples = dataset.__getitems__([(epoch, position) for epoch in shown for position in positions])
    targets = store.codec.decode(torch.stack([sample['record'] for sample in samples]))
    names = _Names.of(store.manifest, data)

    def name_of(index: int, known: Sequence[str] | None) -> str:
        return known[index] if known else f'class {index}'

    captions = []
    for sample, (classes, probs) in zip(samples, most_probable(targets, PICTURE_CLASSES)):
        labels = [index for index in (sample['label'], sample.get('label2', -1)) if index >= 0]
        label = ' + '.join(name_of(index, names.labels) for index in dict.fromkeys(labels))
        captions.append((label, [
            (name_of(index, names.classes), prob, names.labels_are_classes and index in labels)
            for index, prob in zip(classes, probs)]))
    views = [Image.fromarray(sample['view'].permute(1, 2, 0).numpy()) for sample in samples]
    for tile in TILE_SIZES:
        content = _draw_tiles(views, captions, min(PICTURE_COLUMNS, len(positions)), tile)
        if len(content) <= MAX_PICTURE_BYTES:
            break
    return content


def _draw_tiles(
        views: Sequence[Image.Image],
        captions: Sequence[tuple[str, list[tuple[str, float, bool]]]],
        num_columns: int,
        size: int,
) -> bytes:
    """Views with label and bars beneath them, as a PNG."""
    font_size = 13 if size > 100 else 10
    font, bold = ImageFont.load_default(font_size), ImageFont.load_default(font_size + 1)
    line, gap, width = font_size + 7, 12, max(size, 132)
    height = size + line * (1 + PICTURE_CLASSES) + gap
    num_rows = -(-len(views) // num_columns)
    page = Image.new('RGB', (num_columns * (width + gap) + gap, num_rows * height + gap), 'white')
    draw = ImageDraw.Draw(page)
    for place, (view, (label, bars)) in enumerate(zip(views, captions)):
        left, top = gap + place % num_columns * (width + gap), gap + place // num_columns * height
        # Pixels of small views stay visible.
        filter = Image.Resampling.NEAREST if max(view.size) < size else Image.Resampling.LANCZOS
        scale = size / max(view.size)
        page.paste(view.resize([max(1, round(scale * side)) for side in view.size], filter), (left, top))
        top += size + 2
        draw.text((left, top), _shortened(label, bold, width), '#111111', bold)
        for name, prob, is_label in bars:
            top += line
            draw.rectangle((left, top + 1, left + width - 1, top + line - 3), '#eeeeee')
            draw.rectangle((left, top + 1, left + round(prob * (width - 1)), top + line - 3),
                           '#a8dcb5' if is_label else '#bcd2f0')
            share = f'{100 * prob:.0f}%' if 0.005 <= prob < 0.995 else '<1%' if prob < 0.5 else '>99%'
            end = left + width - 3 - font.getlength(share)
            draw.text((end, top + 1), share, '#111111', font)
            draw.text((left + 3, top + 1), _shortened(name, font, end - left - 7), '#111111', font)
    buffer = io.BytesIO()
    # 256 colours: a third of the bytes.
    page.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(buffer, 'PNG', optimize=True)
    return buffer.getvalue()


def _shortened(text: str, font: Any, width: float) -> str:
    """A text that fits into so many pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f'{text}...') > width:
        text = text[:-1]
    return f'{text.rstrip()}...'


def render_card(
        store: StoreReader,
        manifest: Manifest,
        epochs: Sequence[int],
        repo_id: str,
        size: int,
        sample: pa.Table,
        data: LabelledViews | None = None,
        has_picture: bool = False,
        before: str = '',
        licence: str | None = None,
) -> str:
    """The card of a store.

    Args:
        store: The store.
        manifest: The manifest that is published with it.
        epochs: Complete epochs of the store.
        repo_id: Where it is published, ORG/NAME.
        size: Bytes of all shards there.
        sample: The table that is published.
        data: The data set, for the accuracy and the name.
        has_picture: Whether there is a picture of views.
        before: The card that is there; what its owners say of licence and languages is kept.
        licence: Name of a licence, in place of the one there.
    """
    views = manifest.num_samples * manifest.epochs
    teacher = dict(name='unknown', weights='', dtype='', device='', input_size=[]) | manifest.teacher
    repo = hub_repo_of(str(teacher['name']))
    kept = f'{manifest.k} of {manifest.num_classes:,} classes'
    facts = {
        'Teacher': (f'[`{teacher["name"]}`]({HUB}/{repo})' if repo else f'`{teacher["name"]}`')
        + f', weights `{str(teacher["weights"])[:16]}`, {teacher["dtype"]} on {teacher["device"]}, '
        f'input {"x".join(map(str, teacher["input_size"][-2:]))}',
        'Samples': f'{manifest.num_samples:,}' + (
            f', known by the column `{manifest.key}`' if manifest.key else ', known by their position'),
        'Epochs': f'{manifest.epochs}, ' + (
            f'numbers {manifest.stored_epochs.start} to {manifest.stored_epochs.stop - 1}' if manifest.epochs > 1 else
            f'number {manifest.stored_epochs.start}'),
        'Views': f'{views:,}, {"x".join(map(str, manifest.recipe.get("input_size", [])[-2:]))} pixels, '
                 f'seed {manifest.seed}',
        'Targets': kept,
        'Codec': f'`{manifest.codec}`, {manifest.record_width} bytes per view',
        'Size': f'{readable_bytes(size)} in {counted(manifest.num_shards * manifest.epochs, "shard")}, '
                f'{readable_bytes(size / manifest.epochs)} an epoch',
        'Identity': f'`{manifest.identity}`',
    }
    card_data = DatasetCardData(**{
        'pretty_name': f'Logits of {teacher["name"]}',
        'task_categories': ['image-classification'],
        'size_categories': [_size_category(views)],
        'tags': ['knowledge-distillation', 'logits', 'timm', 'timm_tinyvit'],
        'source_datasets': [data.name] if data is not None and data.on_hub else None,
        # Only these files are the data set that the Hub's viewer and `load_dataset` see.
        'configs': [{'config_name': 'sample', 'default': True, 'data_files': [{'split': 'train', 'path': SAMPLE}]}],
        **kept_metadata(before, licence)})
    words, statistics = _statistics(store, epochs, data)
    is_mixed = ViewRecipe.from_dict(manifest.recipe).is_mixed
    source = data.name if data is not None and data.on_hub else 'DATA'
    flags = f'--dataset {source}'
    if data is not None and data.split != 'train':
        flags += f' --train-split {shlex.quote(data.split)}'
    columns = data.columns if data is not None else {}
    for key, name in columns.items():
        flags += f' {COLUMN_FLAGS[key]} {shlex.quote(name)}'
    title = f'Logits of {teacher["name"]}' + (f' on {data.name}' if data is not None else '')
    card = DatasetCard.from_template(
        card_data, template_str=TEMPLATE.read_text(encoding='utf-8'), title=title, views=f'{views:,}', kept=kept,
        bytes_per_view=f'{size / views:.3g}', facts=facts, repo=repo_id, name=repo_id.partition('/')[2],
        data_flags=flags, data_name=source, columns=''.join(f', {key}={name!r}' for key, name in columns.items()),
        epochs=manifest.epochs, is_mixed=is_mixed,
        data_words=_data_words(manifest, data),
        kept_size=readable_bytes(min(2, manifest.epochs) * size / manifest.epochs),
        size=readable_bytes(size), first_epoch=manifest.first_epoch, statistics=statistics, statistics_words=words,
        picture=PICTURE if has_picture else '',
        picture_words=(
            'Some views, each with its label and the most probable classes; the label\'s is green.'
            if data is None or data.has_labels else 'Some views, each with the most probable classes.')
        + (' A column is an image, a row an epoch.' if manifest.epochs > 1 else ''),
        split=data.split if data is not None else 'train',
        sample_rows=f'{len(sample):,}', sample_labels=_label_columns(sample),
        keeps_all=manifest.k >= manifest.num_classes,
        sample_names='names' in sample.column_names,
        most_listed=min(manifest.k, SAMPLE_CLASSES), is_on_hub=data is not None and data.on_hub,
        recipe=yaml.safe_dump(manifest.recipe, default_flow_style=None, sort_keys=False).strip(),
        versions=', '.join(f'{name} {version}' for name, version in manifest.versions.items()), k=manifest.k,
        citation=CITATION)
    return str(card)


def _label_columns(sample: pa.Table) -> str:
    """The columns of labels of a sample, in words; empty where there are no labels."""
    columns = [name for name in ('label', 'label_name')
               if name in sample.column_names and sample[name].null_count < len(sample)]
    return ' and '.join(f'`{name}`' for name in columns)


def with_license(card: str, licence: str) -> str:
    """A card with this licence in its head, and all else as it is."""
    if card_metadata(card).get('license') == licence:
        return card
    found = DatasetCard(card, ignore_metadata_errors=True)
    for key in ('license_name', 'license_link'):
        found.data.pop(key)
    found.data['license'] = licence
    return str(found)


def _statistics(
        store: StoreReader,
        epochs: Sequence[int],
        data: LabelledViews | None,
) -> tuple[str, dict[str, str]]:
    """What the teacher is like: how it was found out, and the figures by what they are called."""
    mismatch = data and label_mismatch(data.labels, data.class_names, store.manifest.num_classes)
    labels = data.labels if data is not None and not mismatch else None
    found = store_statistics(store, labels, epochs=epochs, max_samples=STATISTICS_SAMPLES).summary()
    figures = {
        'Top-1 accuracy': _percent(found['accuracy']),
        'Accuracy of the class that most of its views have': _percent(found['majority_accuracy']),
        'Probability of its first choice': _percent(found['confidence']),
        'Mass of the classes that are kept': _percent(list(found['mass'].values())[-1]),
    }
    is_mixed = ViewRecipe.from_dict(store.manifest.recipe).is_mixed
    if not is_mixed:
        figures['Same first choice in two epochs'] = _percent(found['agreement'])
    words = f'Means over {found["views"]:,} views, those of {found["samples"]:,} samples in ' + counted(
        len(found['epochs']), 'epoch')
    if mismatch:
        words += f'; no accuracy, as {mismatch}.'
    else:
        words += '; a mixed view has two labels, and either is right.' if is_mixed and data is not None else '.'
    return words, {name: value for name, value in figures.items() if value}


def _data_words(manifest: Manifest, data: LabelledViews | None) -> str:
    rows = f'{manifest.num_samples:,} samples'
    if data is None:
        return rows + (' with the same keys' if manifest.key else ' in the same order')
    name = f'[{data.name}]({HUB}/datasets/{data.name})' if data.on_hub else f'`{data.name}`'
    return f'{name}, split `{data.split}`, {rows}'


def _percent(share: float | None) -> str:
    return '' if share is None else f'{100 * share:.2f}%'


def _size_category(count: int) -> str:
    """What the Hub calls a number of rows."""
    bounds = ['1K', '10K', '100K', '1M', '10M', '100M', '1B', '10B', '100B', '1T']
    place = sum(count >= 10 ** (3 + power) for power in range(len(bounds)))
    if place == 0:
        return 'n<1K'
    return f'{bounds[place - 1]}<n<{bounds[place]}' if place < len(bounds) else 'n>1T'


def _evenly(count: int, most: int) -> np.ndarray:
    """Up to so many of the numbers below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def data_name(dataset: str) -> tuple[str, bool]:
    """What a data set is called that `--dataset` names, without the path of a folder; and whether it is on the Hub."""
    folder = Path(dataset).expanduser()
    if folder.exists():
        return folder.resolve().name, False
    return dataset.removeprefix('hfds/'), True
