"""Where images come from: splits of Hugging Face data sets, on disk or streamed, and what their columns hold.

A source is a Hub name, a folder of images in one folder per class, of parquet files or of webdataset's tar files, such
files at an address as s3://BUCKET/photos, or a folder of `save_to_disk`. docs/data.md has on one page what is read of
each, and what is refused or left out. Columns are found by their usual names or named by flags; a dot names an entry of
a column of structures, as in `json.label`.
"""

import glob
import os
import re
import stat
from collections import Counter
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.request import url2pathname
from collections.abc import Callable, Container, Sequence

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from datasets.table import CastError
from huggingface_hub.constants import HF_HUB_CACHE

from ..base.console import warning
from ..base.errors import InputError
from .folders import FILE_KINDS, check_saved, load_builder, open_address, open_folder
from .tars import TarSamples

__all__ = [
    'as_split', 'class_names', 'column', 'data_name', 'encoded_image', 'find_column', 'find_key_column', 'hold_out',
    'image_root', 'labels_of', 'load_split', 'no_labels', 'read_labels', 'sample_files', 'sample_name',
    'select_columns',
]

IMAGE_KEYS = ('image', 'img', 'jpg', 'png', 'webp', 'jpeg')
LABEL_KEYS = ('label', 'labels', 'cls', 'fine_label', 'target', 'json.label', 'json.cls')

# The splits that `train[:10%]+validation` is made of.
SPLIT_NAMES = re.compile(r'(?:^|\+)\s*(\w[\w.-]*)')
# A share of a split that `--val-fraction` takes out of it for validation, and the rest of it.
HELD_OUT = re.compile(r'(?P<split>.+) (?P<part>without|held-out) (?P<share>[01]?\.\d+)')
# What `datasets` says before it says what is wrong.
NO_REASON = 'An error occurred while generating the dataset'
KIND_WORDS = {'string': 'words', 'bool': 'truth values', 'float': 'real numbers', 'list': 'lists', 'null': 'nothing'}
# A whole repo by its address, for `datasets` to read with its card.
HUB_REPO = re.compile(r'hf://datasets/([^/@:]+/[^/@:]+(?:@refs/\w+/[^/:]+|@[^/:]+)?(?::.+)?)')
# Addresses that the rows of a data set may name, whoever made it.
REMOTE = ('hf://', 'https://')

Source = datasets.Dataset | datasets.IterableDataset


def load_split(
        name: str,
        split: str | None,
        is_training: bool,
        streaming: bool = False,
        log: Callable[[str], None] = warning,
        label_column: str | None = None,
) -> Source:
    """Load one split of a data set.

    Args:
        name: A Hub name, with or without timm's `hfds/` before it; a folder of images in one folder per class, of
            parquet files or of webdataset's tar files; such files at an address of fsspec's, as s3://BUCKET/photos; or
            a folder written by `save_to_disk`. Where a data set has several configurations, the name of one after a
            colon, and on the Hub a revision before it: `ORG/NAME@REVISION:CONFIGURATION`.
        split: Name of the split, slices as in `train[:1000]` included, or `train held-out 0.2` for a share of each
            class and `train without 0.2` for the rest; by default `train` in training, and otherwise the first of
            `validation` and `test` that is there.
        is_training: Which default.
        streaming: Read the files from front to back and keep no copy of them; a split has no slices then.
        log: Takes a line on what is left out.
        label_column: The label column, by whose classes a share is held out.

    Returns:
        A map-style data set, whose `split` is this one, or with `streaming` an iterable one.

    Raises:
        InputError: There is no such data set or split, a file of it is cut short, or splits cannot be told from
            classes.
    """
    if found := HELD_OUT.fullmatch(split or ''):
        if streaming:
            raise InputError('--val-fraction takes samples from all over the data, which a stream does not give; name '
                             'a --val-split, or leave --streaming out')
        rows = load_split(name, found['split'], True, log=log)
        labels = labels_of(select_columns(rows, label)[:], label) if (
            label := find_column(rows, label_column, is_image=False)) else np.zeros(len(rows), dtype=np.int64)
        is_held_out = hold_out(labels, float(found['share']))
        return rows.select(np.flatnonzero(is_held_out == (found['part'] == 'held-out')))
    given, config = name, None
    if repo := HUB_REPO.fullmatch(name):
        name = repo[1]
    if ':' in name and '://' not in name and not Path(name).expanduser().exists():
        name, _, config = name.rpartition(':')
    local = Path(name).expanduser()
    name = name.removeprefix('hfds/')
    splits, notes = _open_splits(given, name, local, config, split, is_training, streaming)
    split = _usual_split(splits, is_training) if split is None else split
    flag = f'--{"train" if is_training else "val"}-split'
    if streaming and split not in splits:
        raise InputError(f'the data set {name} has no split {split} to stream, only {", ".join(splits)}; name one of '
                         f'them with {flag}, without a slice')
    try:
        # The library's own reading of `train[:10%]`, `train[100:]+validation` and the like.
        parts = [] if split in splits else datasets.ReadInstruction.from_spec(split).to_absolute(
            {key: len(rows) for key, rows in splits.items()})
    except (AssertionError, ValueError):
        raise InputError(f'the data set {name} has no split {split}, only {", ".join(splits)}; name one with {flag}')
    for key in {part.splitname: None for part in parts} or [split]:
        for line in notes.get(key, ()):
            log(line)
    chosen = [
        rows if (part.from_, part.to) == (0, len(rows)) else rows.select(range(part.from_, part.to))
        for part in parts for rows in [splits[part.splitname]]
    ] or [splits[split]]
    # Tables know the split that they once were, or none; and of the names that they have, not all are taken.
    called = datasets.NamedSplit(split if parts else re.sub(r'\W+', '_', split))
    rows = splits[split] if streaming else datasets.concatenate_datasets(chosen, split=called)
    # Whatever is derived from the rows keeps where they are at home, below which alone they may name files.
    rows.info.homepage = (local.resolve() if local.is_dir() else Path(HF_HUB_CACHE)).as_uri()
    return rows


def _open_splits(
        given: str,
        name: str,
        local: Path,
        config: str | None,
        split: str | None,
        is_training: bool,
        streaming: bool,
) -> tuple[dict[str, Source], dict[str, list[str]]]:
    """The splits of a data set by their names, and lines on what is left out of each.

    Args:
        given: The whole name, for messages; `name`, `local` and `config` are what it says.

    Raises:
        InputError: They cannot be loaded.
    """
    where, notes = f'the data set {given}', {}
    try:
        if (local / 'dataset_dict.json').is_file() or (local / 'state.json').is_file():
            check_saved(local)
            found = datasets.load_from_disk(str(local))
            splits = dict(found) if isinstance(found, datasets.DatasetDict) else {'train': found}
            if streaming:
                splits = {key: rows.to_iterable_dataset() for key, rows in splits.items()}
        elif local.is_dir():
            folder = open_folder(local.resolve(), config)
            splits, notes = folder.splits or _load(folder.builder, split, is_training, streaming), folder.notes
        elif '://' in name:
            folder = open_address(name)
            splits, notes = _load(folder.builder, split, is_training, streaming), folder.notes
        elif local.exists():
            raise InputError(f'{name} is a file; give a folder of parquet files or images, or a Hub name')
        elif name.startswith(('.', '/', '~')):
            raise InputError(f'there is no folder {name}; give a folder of parquet files or images, or a Hub name')
        else:
            where = f'there is no folder {name} here, and the data set of that name on the Hub'
            name, _, revision = name.partition('@')
            splits = _load(load_builder(name, config, revision=revision or None), split, is_training, streaming)
    except Exception as error:
        # The loaders raise whatever their backend raises; all of it is about the name that was given.
        reason = _reason(error)
        if 'onfig name' in reason or 'BuilderConfig' in reason:
            reason += f'; name one after a colon, as in {name}:CONFIGURATION'
        if 'Invalid string class label' in reason:
            reason += ': the classes of images are lost in a zip file; unpack it'
        raise InputError(f'{where} cannot be loaded: {reason}')
    return splits, notes


def hold_out(labels: np.ndarray, share: float) -> np.ndarray:
    """Which samples are held out for validation, bool [N]: the same share of each class, drawn by a fixed seed.

    Args:
        labels: int64 [N].
        share: Of the samples; of a class at least one is left.
    """
    drawn = np.random.Generator(np.random.PCG64(0)).random(len(labels))
    order = np.lexsort((drawn, labels))
    counts = np.unique(labels, return_counts=True)[1]
    # In whole numbers that add up as the share of all: the largest remainders are rounded up.
    wanted = np.minimum(np.floor(share * counts).astype(np.int64), counts - 1)
    lacking = round(share * len(labels)) - wanted.sum()
    by_remainder = np.argsort(wanted - share * counts, kind='stable')
    wanted[[place for place in by_remainder if wanted[place] + 1 < counts[place]][:max(lacking, 0)]] += 1
    ranks = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # within the class
    is_held_out = np.empty(len(labels), dtype=bool)
    is_held_out[order] = ranks < np.repeat(wanted, counts)
    return is_held_out


def as_split(dataset: Source | str | Path, split: str | None = None, is_training: bool = True) -> Source:
    """A split that is loaded already, or else the one of this name, see `load_split`.

    Raises:
        InputError: It is no data set of Hugging Face, or several splits, or cannot be loaded.
    """
    if isinstance(dataset, str | Path):
        return load_split(str(dataset), split, is_training)
    if isinstance(dataset, dict):
        raise InputError(f'the data set is a {type(dataset).__name__} of the splits {", ".join(dataset)}; give one of '
                         f'them, as in dataset["{_usual_split(dataset, is_training)}"]')
    if not isinstance(dataset, Source):
        raise InputError(f'the data set is of type {type(dataset).__name__}; give a datasets.Dataset, as load_split '
                         f'and datasets.load_dataset return it, or the name or folder of one')
    if split is not None:
        raise InputError(f'split={split!r} is of a data set that is named; this one is loaded already, leave it out')
    return dataset


def data_name(dataset: str) -> tuple[str, bool]:
    """What a data set is called that `--dataset` names, without the path of a folder; and whether it is on the Hub."""
    folder = Path(dataset).expanduser()
    if folder.exists():
        return folder.resolve().name, False
    if '://' in dataset and not HUB_REPO.fullmatch(dataset):
        return dataset.rstrip('/').rpartition('/')[2], False
    return dataset.removeprefix('hfds/').removeprefix('hf://datasets/'), True


def _reason(error: BaseException) -> str:
    """What a loader says is wrong, in one line; what it hides behind a general line, its cause says."""
    if isinstance(error, InputError):
        raise error
    if isinstance(error, CastError) and set(error.table_column_names) != set(error.requested_column_names):
        return f'its files must have the same columns, but {error.details()}'
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = lines[1:] if lines[:1] == [NO_REASON] else lines
    if not lines and error.__cause__ is not None or isinstance(error.__cause__, InputError):
        return _reason(error.__cause__)
    return shorten(' '.join(lines), 350) or type(error).__name__


def _usual_split(names: Container[str], is_training: bool) -> str:
    usual = ('train',) if is_training else ('validation', 'val', 'test')
    return next((name for name in usual if name in names), usual[0])


def _load(
        builder: datasets.DatasetBuilder,
        split: str | None,
        is_training: bool,
        streaming: bool,
) -> dict[str, Source]:
    """The splits of a data set; of one that nothing is prepared of yet, for evaluation, those alone that are asked for.

    The library prepares all splits at once: of ImageNet-1k 150 GB, for the 7 of its validation.
    """
    kind, files = type(builder).__module__.rpartition('.')[2], builder.config.data_files or {}
    counts = Counter(path for paths in files.values() for path in paths)
    if twice := next((path for path, count in counts.items() if count > 1), None):
        # A folder `train` of class `test tube` would be both.
        raise InputError(f'the file {twice} is in several splits by its name and folders; let one word of train, '
                         f'validation and test be in them')
    if not (is_training or streaming) and kind in FILE_KINDS and files and not Path(builder.cache_dir).exists():
        wanted = SPLIT_NAMES.findall(_usual_split(files, is_training) if split is None else split)
        if wanted and set(wanted) < set(files):
            chosen = {name: list(map(glob.escape, files[name])) for name in wanted}
            builder = load_builder(kind, data_files=chosen, features=builder.info.features)
    if isinstance(builder, WebDataset):
        builder = TarSamples.of(builder)
    if streaming:
        return builder.as_streaming_dataset()
    builder.download_and_prepare()
    return builder.as_dataset()


def find_column(dataset: Source, name: str | None, is_image: bool) -> str | None:
    """The name of the image or label column: the given one, or the one that is there under a usual name.

    Raises:
        InputError: The column is not there, or it holds something else.
    """
    flag, usual = ('--input-key', IMAGE_KEYS) if is_image else ('--target-key', LABEL_KEYS)
    features = _features(dataset)
    names = shorten(', '.join(dataset.column_names), 200)
    if name is not None and name not in features:
        raise InputError(f'the data set has no column {name!r}, only {names}; fix {flag}')
    if not is_image:
        if name is not None and not _holds_labels(features[name]):
            raise InputError(f'{_describe(name, features[name])}, not class numbers; {_remedy(name, features[name])}, '
                             f'or name another with {flag}')
        # A usual name for text or for several labels is no label column.
        labels = [column for column in usual if column in features and _holds_labels(features[column])]
        return name or next(iter(labels), None)
    name = name or next((column for column in usual if column in features), None)
    if name is None:
        # Bytes alone may be anything.
        images = [column for column in dataset.column_names if _holds_images(features[column])
                  and not isinstance(features[column], datasets.Value)]
        if len(images) != 1:
            raise InputError(f'the data set has no image column under a usual name, only {names}; name it with '
                             f'--input-key')
        name = images[0]
    if not _holds_images(features[name]):
        raise InputError(f'{_describe(name, features[name])}, not images; make images of it with `dataset.cast_column('
                         f'{name!r}, datasets.Image())` (docs/data.md), or name another with --input-key')
    return name


def no_labels(dataset: Source) -> str:
    """Why a data set has no label column, and what to do, in words."""
    features = _features(dataset)
    there = next((name for name in LABEL_KEYS if name in features), None)
    if there is not None:
        return f'{_describe(there, features[there])}, not class numbers; {_remedy(there, features[there])}'
    return (f'there is no label column, only {shorten(", ".join(dataset.column_names), 200)}; name it with '
            f'--target-key; in a folder of images every file must lie in SPLIT/CLASS/, of two classes or more')


def find_key_column(dataset: Source, name: str) -> str:
    """The column of strings or integers that names the samples.

    Raises:
        InputError: No column is named, or it is not there, or it holds something else.
    """
    if not name:
        raise InputError('the samples of a stream have no position; name the column of keys with --key, as in '
                         '--key __key__ for webdataset')
    features = _features(dataset)
    if name not in features:
        raise InputError(f'the data set has no column {name!r}, only {", ".join(dataset.column_names)}; name the '
                         f'column of keys with --key')
    kind = features[name].dtype if isinstance(features[name], datasets.Value) else ''
    if not kind.removeprefix('u').removeprefix('large_').startswith(('int', 'string', 'binary')):
        raise InputError(f'column {name!r} holds {features[name]}, not strings or integers; name another with --key')
    return name


def class_names(dataset: Source, label_column: str, num_classes: int | None = None) -> list[str] | None:
    """Names of the classes, where the label column knows them; with a number of classes, only those of as many."""
    names = getattr(_features(dataset)[label_column], 'names', None)
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
    try:
        return np.asarray(labels.cast(pa.int64()).fill_null(-1)).astype('<i8')
    except pa.ArrowInvalid as error:
        raise InputError(f'column {name!r} does not hold class numbers: {error}; name another with --target-key')


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


def _holds_images(feature: Any) -> bool:
    """Whether it is made for images, or holds their bytes as pandas and polars write them."""
    if isinstance(feature, dict):
        return set(feature) in ({'bytes'}, {'bytes', 'path'}) and _holds_images(feature['bytes'])
    return isinstance(feature, datasets.Image) or (
        isinstance(feature, datasets.Value) and feature.dtype in ('binary', 'large_binary', 'binary_view'))


def _describe(name: str, feature: Any) -> str:
    kind = feature.dtype if isinstance(feature, datasets.Value) else 'list' if isinstance(
        feature, (list, datasets.List)) else ''
    plain = next((words for start, words in KIND_WORDS.items() if kind.removeprefix('large_').startswith(start)), None)
    return f'column {name!r} holds {f"{plain} ({kind})" if plain else shorten(str(feature), 100)}'


def _remedy(name: str, feature: Any) -> str:
    """How labels of another kind become class numbers."""
    kind = feature.dtype if isinstance(feature, datasets.Value) else ''
    if kind.startswith('float'):
        return f'cast it with `dataset.cast_column({name!r}, datasets.Value("int64"))` (docs/data.md)'
    if kind == 'bool' or 'string' in kind:
        return (f'number it with `dataset.class_encode_column({name!r})`, or digits with `cast_column({name!r}, '
                f'datasets.Value("int64"))` (docs/data.md)')
    return 'every image needs one class number'


def read_labels(dataset: datasets.Dataset, label_column: str) -> np.ndarray:
    """All labels of a data set, int64 [N]; -1 where there is none."""
    return labels_of(select_columns(dataset, label_column)[:], label_column)


def sample_files(dataset: datasets.Dataset, image_column: str, rows: Sequence[int]) -> list[str]:
    """The file of the image of each of these rows, as seen from the folder of the data; empty where there is none."""
    root, files = image_root(dataset), []
    for source in column(select_columns(dataset, image_column)[list(map(int, rows))], image_column).to_pylist():
        path = source.get('path') if isinstance(source, dict) else None
        files.append(os.path.relpath(path, root) if path and root and os.path.isabs(path) else path or '')
    return files


def sample_name(dataset: datasets.Dataset, image_column: str | None, row: int) -> str:
    """What to call a row in a sentence: its number, and its file where it has one.

    Args:
        dataset: The data set.
        image_column: Its image column; None for the one under a usual name, if any.
        row: The row.
    """
    try:
        file, = sample_files(dataset, find_column(dataset, image_column, is_image=True), [row])
    except InputError:
        file = ''
    return f'{row} ({file})' if file else str(row)


def image_root(dataset: Source) -> str | None:
    """The folder below which alone the rows of a data set may name files; None for one that `load_split` did not load.
    """
    home = dataset.info.homepage
    return url2pathname(home.removeprefix('file://')) if home.startswith('file://') else None


def encoded_image(source: dict[str, Any] | bytes | None, root: str | None = None) -> bytes:
    """The encoded bytes of a stored image, empty where there is none.

    Args:
        source: A value of an image column.
        root: The folder below which its path must be; None for anywhere.

    Raises:
        OSError: Its file cannot be read, is none (but a pipe or device, say), or lies elsewhere.
    """
    if not isinstance(source, dict):
        return source or b''
    data, path = source.get('bytes'), source.get('path')
    if data is not None or path is None:
        return data or b''
    # Of a chain as zip://1.png::/data/1.zip, the last link is where it comes from.
    is_address = '://' in path
    place = path.rpartition('::')[2] if is_address else path
    if '://' in place:
        if root is not None and not place.startswith(REMOTE):
            raise OSError(f'its address does not begin with {" or ".join(REMOTE)}')
    else:
        roots = (root, HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
        if root is not None and not any(Path(os.path.abspath(place)).is_relative_to(folder) for folder in roots):
            raise OSError('it lies outside the folder of the data set; put its bytes into the data (docs/data.md)')
        if not stat.S_ISREG(os.stat(place).st_mode):
            raise OSError('it is no regular file')
    with fsspec.open(path, 'rb') if is_address else open(path, 'rb') as file:
        return file.read()
