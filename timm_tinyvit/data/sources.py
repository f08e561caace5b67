"""Where images come from: splits of Hugging Face data sets, on disk or streamed, and what their columns hold.

A source is a Hub name, a folder of parquet files, of images or of webdataset's tar files, or a folder of
`save_to_disk`. Columns are found by their usual names or named by flags; a dot names an entry of a column of
structures, as in `json.label`.
"""

import re
from pathlib import Path
from typing import Any
from collections.abc import Container

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..base.errors import InputError

__all__ = [
    'class_names', 'column', 'find_column', 'find_key', 'labels_of', 'load_split', 'read_labels', 'select_columns',
]

IMAGE_KEYS = ('image', 'img', 'jpg', 'png', 'webp', 'jpeg')
LABEL_KEYS = ('label', 'labels', 'cls', 'fine_label', 'target', 'json.label', 'json.cls')

# Kinds of files whose splits do not depend on each other, as the numbers of classes do in folders of images.
FILE_KINDS = ('arrow', 'parquet', 'webdataset')
# The splits that `train[:10%]+validation` is made of.
SPLIT_NAMES = re.compile(r'(?:^|\+)\s*(\w[\w.-]*)')

Source = datasets.Dataset | datasets.IterableDataset


def load_split(name: str, split: str | None, is_training: bool, streaming: bool = False) -> Source:
    """Load one split of a data set.

    Args:
        name: A Hub name, with or without timm's `hfds/` before it; a folder of parquet files, of webdataset's tar
            files, or of images in one folder per class, with splits by file or folder name; or a folder written by
            `save_to_disk`.
        split: Name of the split, slices as in `train[:1000]` included; by default `train` in training, and otherwise
            the first of `validation` and `test` that is there.
        is_training: Which default.
        streaming: Read the files from front to back and keep no copy of them; a split has no slices then.

    Returns:
        A map-style data set, whose `split` is this one, or with `streaming` an iterable one.

    Raises:
        InputError: There is no such data set or split.
    """
    local = Path(name).expanduser()
    where = f'the data set {name}'
    name = name.removeprefix('hfds/')
    try:
        if (local / 'dataset_dict.json').is_file() or (local / 'state.json').is_file():
            found = datasets.load_from_disk(str(local))
            splits = dict(found) if isinstance(found, datasets.DatasetDict) else {'train': found}
            if streaming:
                splits = {key: rows.to_iterable_dataset() for key, rows in splits.items()}
        elif local.is_dir():
            splits = _load(str(local), split, is_training, streaming)
        elif local.exists():
            raise InputError(f'{name} is a file; give a folder of parquet files or images, or a Hub name')
        elif name.startswith(('.', '/', '~')):
            raise InputError(f'there is no folder {name}; give a folder of parquet files or images, or a Hub name')
        else:
            where = f'there is no folder {name} here, and the data set of that name on the Hub'
            splits = _load(name, split, is_training, streaming)
    except InputError:
        raise
    except Exception as error:
        # The loaders raise whatever their backend raises; all of it is about the name that was given.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f'{where} cannot be loaded: {reason}')
    split = _usual_split(splits, is_training) if split is None else split
    flag = f'--{"train" if is_training else "val"}-split'
    if streaming:
        if split not in splits:
            raise InputError(f'the data set {name} has no split {split} to stream, only {", ".join(splits)}; name one '
                             f'of them with {flag}, without a slice')
        return splits[split]
    try:
        # The library's own reading of `train[:10%]`, `train[100:]+validation` and the like.
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({key: len(rows) for key, rows in splits.items()})
    except (AssertionError, ValueError):
        raise InputError(f'the data set {name} has no split {split}, only {", ".join(splits)}; name one with {flag}')
    chosen = [
        rows if (part.from_, part.to) == (0, len(rows)) else rows.select(range(part.from_, part.to))
        for part in parts for rows in [splits[part.splitname]]
    ]
    # Tables know the split that they once were, or none.
    return datasets.concatenate_datasets(chosen, split=datasets.NamedSplit(split))


def _usual_split(names: Container[str], is_training: bool) -> str:
    usual = ('train',) if is_training else ('validation', 'val', 'test')
    return next((name for name in usual if name in names), usual[0])


def _load(path: str, split: str | None, is_training: bool, streaming: bool) -> dict[str, Source]:
    """The splits of a data set; of one that nothing is prepared of yet, for evaluation, those alone that are asked for.

    The library prepares all splits at once: of ImageNet-1k 150 GB, for the 7 of its validation.
    """
    if not (is_training or streaming):
        builder = datasets.load_dataset_builder(path)
        kind, files = type(builder).__module__.rpartition('.')[2], builder.config.data_files
        if kind in FILE_KINDS and files and not Path(builder.cache_dir).exists():
            wanted = SPLIT_NAMES.findall(_usual_split(files, is_training) if split is None else split)
            if wanted and set(wanted) < set(files):
                chosen = {name: list(files[name]) for name in wanted}
                return datasets.load_dataset(kind, data_files=chosen, features=builder.info.features)
    # One call knows the splits and keeps the cache of the files.
    return datasets.load_dataset(path, streaming=streaming)


def find_column(dataset: Source, key: str | None, is_image: bool) -> str | None:
    """The name of the image or label column: the given one, or the one that is there under a usual name.

    Raises:
        InputError: The column is not there, or it holds something else.
    """
    flag, usual = ('--input-key', IMAGE_KEYS) if is_image else ('--target-key', LABEL_KEYS)
    features = _features(dataset)
    if key is not None and key not in features:
        raise InputError(f'the data set has no column {key!r}, only {", ".join(dataset.column_names)}; mend {flag}')
    if not is_image:
        if key is not None and not _holds_labels(features[key]):
            raise InputError(f'column {key!r} holds {features[key]}, not class numbers; name another with {flag}')
        # A usual name for text or for several labels is no label column.
        labels = [name for name in usual if name in features and _holds_labels(features[name])]
        return key or next(iter(labels), None)
    key = key or next((name for name in usual if name in features), None)
    if key is None:
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        if len(images) != 1:
            raise InputError(
                f'the data set has no image column under a usual name, only {", ".join(dataset.column_names)}; '
                f'name it with --input-key')
        key = images[0]
    if not isinstance(features[key], datasets.Image):
        raise InputError(f'column {key!r} holds {features[key]}, not images; name another with --input-key')
    return key


def find_key(dataset: Source, key: str) -> str:
    """The column of strings or integers that names the samples.

    Raises:
        InputError: No column is named, or it is not there, or it holds something else.
    """
    if not key:
        raise InputError('the samples of a stream have no position; name the column of keys with --key, as in '
                         '--key __key__ for webdataset')
    features = _features(dataset)
    if key not in features:
        raise InputError(f'the data set has no column {key!r}, only {", ".join(dataset.column_names)}; name the column '
                         f'of keys with --key')
    kind = features[key].dtype if isinstance(features[key], datasets.Value) else ''
    if not kind.removeprefix('u').removeprefix('large_').startswith(('int', 'string', 'binary')):
        raise InputError(f'column {key!r} holds {features[key]}, not strings or integers; name another with --key')
    return key


def class_names(dataset: Source, label_key: str, num_classes: int | None = None) -> list[str] | None:
    """Names of the classes, where the label column knows them; with a number of classes, only those of as many."""
    names = getattr(_features(dataset)[label_key], 'names', None)
    return names if num_classes is None or names and len(names) == num_classes else None


def select_columns(dataset: Source, *names: str) -> Source:
    """A data set of these columns alone, whose batches are Arrow tables of what is stored, images not decoded."""
    there = [name if name in dataset.features else name.partition('.')[0] for name in names]
    if isinstance(dataset, datasets.IterableDataset):
        # Where a stream decodes in threads, the format alone would not stop it.
        dataset = dataset.decode(False)
    return dataset.with_format('arrow').select_columns(list(dict.fromkeys(there)))


def column(table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column of a table, or by `json.label` the entry `label` of its column `json`."""
    if name in table.column_names:
        return table[name]
    outer, _, inner = name.partition('.')
    return pc.struct_field(table[outer], inner.split('.'))


def labels_of(table: pa.Table, name: str | None) -> np.ndarray:
    """Labels of the rows of a table, int64 [N]; -1 where there is none, or no column of them."""
    if name is None:
        return np.full(len(table), -1, dtype=np.int64)
    labels = column(table, name).combine_chunks()
    return np.asarray(labels.cast(pa.int64()).fill_null(-1)).astype('<i8')


def _features(dataset: Source) -> dict[str, Any]:
    """What the columns hold, entries of structures under their dotted names too."""
    if dataset.features is None:
        raise InputError('the stream does not say what its columns hold; give it features with `cast`')
    found = dict(dataset.features)
    for name, feature in dataset.features.items():
        if isinstance(feature, dict):
            found |= {key: value for key, value in datasets.Features({name: feature}).flatten().items()}
    return found


def _holds_labels(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.Value) and feature.dtype.removeprefix('u').startswith('int'))


def read_labels(dataset: datasets.Dataset, label_key: str) -> np.ndarray:
    """All labels of a data set, int64 [N]; -1 where there is none."""
    return labels_of(select_columns(dataset, label_key)[:], label_key)
