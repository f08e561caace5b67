"""Folders of files: what lies in one, and which split each file is of.

Of images in one folder per class, the first level of folders decides the split, and nothing below it does; the folder
that holds an image is its class, and classes are numbered over all splits in timm's natural order: 2 before 10.

    photos/train/CLASS/1.jpg  photos/val/CLASS/2.jpg          or of one split, photos/CLASS/1.jpg

Of parquet, Arrow and tar files, here or at an address such as s3://BUCKET/photos, names decide as `datasets` reads
them. Links are followed; what is left out is told.
"""

import glob
import json
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from textwrap import shorten
from typing import Any

import datasets
from datasets.config import REPOYAML_FILENAME
from datasets.data_files import SPLIT_KEYWORDS, _get_data_files_patterns, get_data_patterns
from datasets.exceptions import DataFilesNotFoundError
from fsspec.core import url_to_fs
from fsspec.utils import glob_translate

from ..base.errors import InputError
from ..base.yaml_reader import card_head, read_yaml
from .decoding import identify, image_endings

__all__ = [
    'FILE_KINDS', 'Folder', 'check_saved', 'check_whole', 'list_files', 'load_builder', 'natural_order', 'open_address',
    'open_folder',
]

# Folders that programs leave behind.
UNSEEN = ('__MACOSX', '__pycache__')
# Kinds of files, by the loader of `datasets`, whose splits do not depend on each other.
FILE_KINDS = ('arrow', 'parquet', 'webdataset')
FILE_ENDINGS = {'.arrow': 'arrow', '.parquet': 'parquet', '.tar': 'webdataset'}
# With one of these beside images, labels are its columns, and `datasets` reads the folder.
METADATA = ('metadata.csv', 'metadata.jsonl', 'metadata.parquet')
SPLITS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
SEPARATORS = '[-._ 0-9]+'
# The last bytes of whole files: tar's two empty blocks; the end of a stream of Arrow, or of a file of it; of a plain
# parquet file, or of an encrypted one.
ENDS = {'.tar': (bytes(1024),), '.arrow': (b'\xff\xff\xff\xff\0\0\0\0', b'ARROW1'), '.parquet': (b'PAR1', b'PARE')}
ZSTANDARD = b'\x28\xb5\x2f\xfd'
COMPRESSED = (b'\x1f\x8b', b'BZh', b'\xfd7zXZ', ZSTANDARD)


@dataclass
class Folder:
    """A folder of data.

    Attributes:
        splits: Of images, the splits by their names; else empty.
        builder: Of other files, what loads them.
        notes: What is to be said of each split: files left out, and why it has no labels.
    """
    splits: dict[str, datasets.Dataset] = field(default_factory=dict)
    builder: datasets.DatasetBuilder | None = None
    notes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def open_folder(root: Path, config: str | None = None) -> Folder:
    """What lies in a folder, as splits of images or as what loads its files.

    Args:
        root: The folder.
        config: One of several configurations that its README.md names.

    Raises:
        InputError: Splits cannot be told from classes, or a file is cut short.
        Exception: `datasets` finds nothing to load.
    """
    if config or _card_of(root).get('configs'):
        return Folder(builder=load_builder(str(root), config))
    files = list_files(root)
    kinds = Counter(kind for kind in map(_kind, files) if kind)
    kind = max(kinds, key=lambda kind: (kind != 'unnamed', kinds[kind], kind in FILE_KINDS), default=None)
    if kind in ('images', 'unnamed') and not any(PurePath(path).name in METADATA for path in files):
        return _open_images(root, files)
    if '::' in str(root):
        raise InputError(f'the path {root} has "::" in it, which loaders take for a chain of addresses; rename it')
    files = [path for path in files if kind not in FILE_KINDS or _kind(path) == kind]
    if odd := next((path for path in files if not (root / path).is_file()), None):
        raise InputError(f'{root / odd} is no regular file, nor a link to one; remove it')
    if kind in FILE_KINDS:
        return _open_files(str(root), files, kind)
    base, data_files = glob.escape(str(root)), None
    if base != str(root):
        # Brackets and stars are no patterns.
        data_files = {split: [f'{base}/{pattern}' for pattern in patterns]
                      for split, patterns in get_data_patterns(base).items()}
    try:
        return Folder(builder=load_builder(str(root), data_files=data_files))
    except DataFilesNotFoundError:
        raise InputError(f'the folder {root} holds neither images nor files of parquet, Arrow or tar'
                         + (f', but {_endings(files)}' if files else ''))


def open_address(address: str) -> Folder:
    """What lies below an address of fsspec's, as what loads its files of parquet, Arrow or tar.

    Args:
        address: A folder or a file, as s3://BUCKET/photos; the environment says who asks, and whom.

    Raises:
        InputError: There are no such files.
        Exception: fsspec's: the service cannot be reached, or it refuses.
    """
    if '::' in address:
        raise InputError(f'the address {address} is a chain; give one of the files as they are')
    system, root = url_to_fs(address.rstrip('/'))
    paths = system.find(root)
    if paths == [root]:  # a file
        address, root = os.path.dirname(address), os.path.dirname(root)
    files = sorted(path.removeprefix(f'{root}/') for path in paths)
    files = [path for path in files if not any(part.startswith('.') or part in UNSEEN for part in path.split('/'))]
    kinds = Counter(kind for kind in map(_kind, files) if kind in FILE_KINDS)
    if not kinds:
        raise InputError(f'{address} holds no files of parquet, Arrow or tar' + (
            f', but {_endings(files)}' if files else ', nor any other'))
    kind = max(kinds, key=kinds.__getitem__)
    return _open_files(address.rstrip('/'), [path for path in files if _kind(path) == kind], kind)


def _card_of(root: Path) -> dict[str, Any]:
    """The head of a folder's README.md, which `datasets` reads too, by means that some heads hang.

    Raises:
        InputError: It cannot be read.
    """
    heads = [{}]
    for name, reader in (('README.md', card_head), (REPOYAML_FILENAME, read_yaml)):
        if (root / name).is_file():
            try:
                heads.append(reader((root / name).read_text(encoding='utf-8'), str(root / name)))
            except UnicodeDecodeError:
                raise InputError(f'{root / name} is no text in UTF-8; fix or remove it')
    return {name: value for head in heads for name, value in head.items()}


def load_builder(*args: Any, **options: Any) -> datasets.DatasetBuilder:
    """`datasets.load_dataset_builder` without its bars, of which each split of many files has several."""
    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset_builder(*args, **options)
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()


def natural_order(names: set[str]) -> list[str]:
    """Class names in the order in which timm numbers folders; of two that differ in case alone, by their letters."""
    # timm's `natural_key` takes a lone superscript for a number, and fails.
    return sorted(names, key=lambda name: ([
        int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', name.lower())], name))


def list_files(root: Path) -> list[str]:
    """Whatever is no folder below a folder, as sorted paths from it, hidden ones left out.

    Links are followed, but for those that lead back to a folder above.
    """
    found = []

    def visit(folder: str, above: frozenset[str]) -> None:
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith('.') or entry.name in UNSEEN:
                    continue
                if not _is_folder(entry):
                    found.append(folder + entry.name)
                elif (place := os.path.realpath(entry.path)) not in above:
                    visit(f'{folder}{entry.name}/', above | {place})

    visit('', frozenset({os.path.realpath(root)}))
    return sorted(found)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def check_saved(root: Path) -> None:
    """Refuse a folder of `save_to_disk` whose description names other files than whole ones beside it.

    Raises:
        InputError: It does.
    """
    for state in (root / 'state.json', *root.glob('*/state.json')):
        for item in json.loads(state.read_text(encoding='utf-8'))['_data_files'] if state.is_file() else ():
            path = state.parent / item['filename']
            if path.parent != state.parent or not path.is_file():
                raise InputError(f'{state} names {item["filename"]!r}, which is no file beside it; save the data again')
            check_whole(str(path))


def check_whole(path: str) -> None:
    """Refuse a file without its end: one of tar or Arrow readers take for a whole one of fewer samples, and of parquet
    they do not say which one it is.

    Raises:
        InputError: It has none.
    """
    name = os.path.basename(path)
    ends = next((ends for ending, ends in ENDS.items() if ending in name.lower()), ENDS['.tar'])
    with open(path, 'rb') as file:
        head = file.read(8)
        if head.startswith(ZSTANDARD) and sys.version_info < (3, 14):
            raise InputError(f'the file {path} is compressed with Zstandard, which is not read; decompress it, or use '
                             f'gzip')
        if head.startswith(COMPRESSED):
            return  # whoever reads them to their end sees whether it is there
        size = file.seek(0, os.SEEK_END)
        if not any(size >= len(end) and file.seek(size - len(end)) >= 0 and file.read() == end for end in ends):
            raise InputError(f'the file {path} is cut short: it has no end, so that samples are missing; copy or make '
                             f'it again')


def _kind(path: str) -> str | None:
    """What a file holds by its ending, None where that is no image and nothing of `FILE_KINDS`."""
    endings = [ending.lower() for ending in PurePath(path).suffixes]
    if not endings:
        return 'unnamed'
    if endings[-1] in image_endings():
        return 'images'
    return next((FILE_ENDINGS[ending] for ending in endings if ending in FILE_ENDINGS), None)


def _open_files(root: str, files: list[str], kind: str) -> Folder:
    """Files of one of `FILE_KINDS` below a folder or address, with the splits that `datasets` reads from names."""

    def matching(*patterns: str) -> list[str]:
        expressions = [re.compile(glob_translate(pattern)) for pattern in patterns]
        return [path for path in files if any(expression.match(path) for expression in expressions)]

    splits = {str(split): matching(*patterns) for split, patterns in _get_data_files_patterns(matching).items()}
    counts = Counter(path for paths in splits.values() for path in paths)
    is_address = '://' in root
    for path in counts:
        if kind != 'webdataset' and not is_address:
            check_whole(f'{root}/{path}')
    data_files = {split: [glob.escape(f'{root}/{path}') for path in paths] for split, paths in splits.items()}
    folder = Folder(builder=load_builder(kind if is_address else root, data_files=data_files))
    if left_out := [path for path in files if path not in counts]:
        for split in splits:
            folder.notes[split].append(f'{root}: {len(left_out)} of {len(files)} files are in no split and left out, '
                                       f'as {left_out[0]}')
    return folder


def _open_images(root: Path, files: list[str]) -> Folder:
    """A folder of images, with labels where every image of a split lies in the folder of its class."""
    images = [path for path in files if _is_image(root, path)]
    if not images:
        raise InputError(f'the folder {root} holds neither images nor files of parquet, Arrow or tar')
    if odd := next((path for path in images if not _is_utf8(path)), None):
        raise InputError(f'the name of the file {ascii(odd)} in {root} is not in UTF-8; rename it or its folder')
    start, split_of = _split_folders(root, images)
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)  # paths with their folders below that of the split
    left_out: dict[str, list[str]] = defaultdict(list)
    kept = set(images)
    for path in files:
        head, _, below = path.removeprefix(start).partition('/')
        split = split_of.get(head, 'train' if not split_of else None)
        if path in kept and split is not None:
            groups[split].append((path, os.path.dirname(below if split_of else path.removeprefix(start))))
        else:
            left_out[split or next(iter(split_of.values()))].append(path)
    folder = Folder()
    for split, items in groups.items():
        if why := _no_classes(items):
            folder.notes[split].append(f'{root} has no labels in split {split}: {why}; put every image into '
                                       f'{split}/CLASS/ to have some')
    labelled = [split for split, items in groups.items() if items[0][1] and split not in folder.notes]
    names = natural_order({_class_of(below) for split in labelled for _, below in groups[split]})
    for split, items in groups.items():
        columns, features = {'image': [f'{root}/{path}' for path, _ in items]}, {'image': datasets.Image()}
        if split in labelled and len(names) > 1:
            numbers = {name: number for number, name in enumerate(names)}
            columns['label'] = [numbers[_class_of(below)] for _, below in items]
            features['label'] = datasets.ClassLabel(names=names)
            if split == 'train' and (absent := set(range(len(names))) - set(columns['label'])):
                folder.notes[split].append(f'{root} has {len(absent)} classes without an image to train with, as '
                                           f'{names[min(absent)]}')
        folder.splits[split] = datasets.Dataset.from_dict(columns, datasets.Features(features), split=split)
    for split, paths in left_out.items():
        folder.notes[split].append(f'{root}: {len(paths)} files are left out, which are no images or lie in no split '
                                   f'({_endings(paths)}; the first is {paths[0]})')
    return folder


def _endings(paths: list[str]) -> str:
    """How many files there are of each ending, in words."""
    counts = Counter(os.path.splitext(path)[1].lower() or 'no ending' for path in paths)
    return ', '.join(f'{count} of {ending}' for ending, count in counts.most_common(5))


def _class_of(below: str) -> str:
    """The class of images in a folder; one whose letters and accents are put together as most systems write them."""
    return unicodedata.normalize('NFC', os.path.basename(below))


def _is_image(root: Path, path: str) -> bool:
    """Whether a file is an image: by its ending, and without one by its first bytes."""
    ending = os.path.splitext(path)[1].lower()
    if ending in image_endings():
        return (root / path).is_file()
    if ending or not (root / path).is_file():
        return False
    try:
        identify(root / path).close()
        return True
    except Exception:
        return False


def _is_utf8(path: str) -> bool:
    try:
        return bool(path.encode())
    except UnicodeEncodeError:
        return False


def _split_folders(root: Path, images: list[str]) -> tuple[str, dict[str, str]]:
    """Which folders of the first level are splits.

    Returns:
        What all paths begin with, lone folders around everything; and the split of each folder of the first level, none
        where these are classes.

    Raises:
        InputError: Some are splits by their names and some are not, or a name says more than one.
    """
    start = ''
    while True:
        below = [path.removeprefix(start).split('/') for path in images]
        said = {parts[0]: {SPLITS[word] for word in re.split(SEPARATORS, parts[0].lower()) if word in SPLITS}
                for parts in below if len(parts) > 1}
        if len(said) != 1 or any(said.values()) or any(len(parts) == 1 for parts in below):
            break
        start += f'{next(iter(said))}/'
    if not any(said.values()):
        return start, {}
    # A word alone is a split, with numbers as in train2017; in longer names, as imagenet_train, if it holds classes.
    are_words = all(re.sub(SEPARATORS, '', head.lower()) in SPLITS for head in said)
    hold_classes = all(len(parts) != 2 for parts in below)
    odd = next((head for head, splits in said.items() if len(splits) != 1), None)
    if odd is None and (are_words or hold_classes):
        return start, {head: splits.pop() for head, splits in said.items()}
    raise InputError(f'the folder {root} holds {shorten(", ".join(sorted(said)), 100)}, of which it is not clear '
                     f'whether they are splits or classes; put all images into train/CLASS/, validation/CLASS/ and '
                     f'test/CLASS/, and keep others elsewhere')


def _no_classes(items: list[tuple[str, str]]) -> str | None:
    """Why the folders of a split are no classes; None where they are, or where there are none."""
    depths = [below.count('/') + bool(below) for _, below in items]
    (usual, _), *others = Counter(depths).most_common()
    if others:
        odd = next(place for place, depth in enumerate(depths) if depth != usual)
        return f'{items[odd][0]} lies at another depth than {items[depths.index(usual)][0]}'
    known: dict[str, str] = {}
    for _, below in items:
        other = known.setdefault(_class_of(below), below)
        if unicodedata.normalize('NFC', other) != unicodedata.normalize('NFC', below):
            return f'the folders {other} and {below} have the same name'
    return None
