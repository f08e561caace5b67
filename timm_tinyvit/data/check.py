"""What a run would trip over in a data set, found in one pass over all of its images by `timm-tinyvit data check`.

Every image is read and decoded as a run does it (docs/data.md has the policy), in loader workers, and its encoded bytes
are hashed: so that what is in training and validation twice is found, and what changed since a store was filled.
"""

import hashlib
import json
import unicodedata
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from collections.abc import Callable, Sequence

import datasets
import numpy as np
from torch.utils.data import DataLoader, Dataset

from ..base.console import progress
from ..base.errors import InputError
from ..base.launch import init_worker
from ..base.text import counted
from ..store.digests import image_digest
from ..store.local import LogitStore
from ..store.reader import ShardStore
from .classes import class_names, match_classes
from .decoding import identify, orientation, upright_rgb
from .fingerprint import check_fingerprint, check_keys, dataset_fingerprint, iterate_keys
from .sources import (
    column, encoded_image, find_column, image_root, load_split, no_labels, read_labels, sample_files, select_columns,
)

__all__ = ['DataCheck', 'check_dataset']

# Images that a worker looks at before it tells.
CHUNK_SIZE = 64
# Samples of a finding that are listed for people; of images that cannot be read, all are.
MAX_LISTED = 10
# Sides of fewer pixels are what is left of thumbnails and tracking pixels.
MIN_SIDE = 8
MAX_ASPECT = 10
# What becomes of images without a word in a training.
NOTES = {
    'deep': 'of more than 8 bits a channel, of which the highest 8 are kept',
    'turned': 'turned upright by their EXIF tag',
    'frames': 'of several frames or pages, of which the first is read',
}


class _Image(NamedTuple):
    """What one image is."""
    digest: int = 0
    kind: str = ''
    width: int = 0
    height: int = 0
    notes: tuple[str, ...] = ()
    is_transparent: bool = False
    error: str | None = None


@dataclass
class Finding:
    """One kind of thing that was found.

    Attributes:
        what: In words.
        rows: What it was found in: rows of a split, mostly.
        name: From some of these to what people call them.
        is_refused: Whether a run would refuse it.
        lists_all: Whether people see each of them, too.
    """
    what: str
    rows: Sequence[Any] = ()
    name: Callable[[Sequence[Any]], list[str]] = list
    is_refused: bool = False
    lists_all: bool = False

    def __str__(self) -> str:
        listed = self.rows if self.lists_all else self.rows[:MAX_LISTED]
        more = len(self.rows) - len(listed)
        return '\n'.join([f'{"refused" if self.is_refused else "found":16} {self.what}', *(
            f'{"":18}{name}' for name in [*self.name(listed), *([f'... and {more:,} more (--json)'] if more else [])])])


class _Split:
    """A split, and what its images are.

    Attributes:
        name: `train` or whatever it is called.
        rows: Its rows.
        digests: Of the encoded images, int64 [N].
        labels: Their labels, int64 [N], -1 where there is none; None without a label column.
        names: Names of the classes, where the data know them.
    """

    def __init__(self, name: str, rows: datasets.Dataset, image_column: str | None, label_column: str | None):
        self.name = name
        self.rows = rows
        self.image_column = find_column(rows, image_column, is_image=True)
        self.label_column = find_column(rows, label_column, is_image=False)
        self.labels = read_labels(rows, self.label_column) if self.label_column else None
        self.names = class_names(rows, self.label_column) if self.label_column else None
        self.root = image_root(rows)
        self.digests = np.zeros(len(rows), dtype=np.int64)
        self.sizes = np.zeros((len(rows), 2), dtype=np.int32)
        self.kinds: Counter[str] = Counter()
        self.notes: dict[str, list[int]] = defaultdict(list)
        self.errors: dict[int, str] = {}
        self.transparent: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def look(self, first: int, images: Sequence[_Image]) -> None:
        """Take down what a chunk of images is."""
        for row, image in enumerate(images, first):
            self.digests[row] = image.digest
            self.sizes[row] = image.width, image.height
            if image.error is not None:
                self.errors[row] = image.error
                continue
            self.kinds[image.kind] += 1
            for note in image.notes:
                self.notes[note].append(row)
            if image.is_transparent:
                self.transparent.append(row)

    def samples(self, rows: Sequence[int], more: Callable[[int], Any] | None = None) -> list[str]:
        """What to call samples: their rows, the paths of their images where they have some, and what else is said."""
        rows, called = [int(row) for row in rows], []
        for start in range(0, len(rows), CHUNK_SIZE):
            part = rows[start:start + CHUNK_SIZE]
            for row, file in zip(part, sample_files(self.rows, self.image_column, part)):
                where, said = f' ({file})' if file else '', f': {more(row)}' if more else ''
                called.append(f'{self.name} {row}{where}{said}')
        return called

    def classes(self) -> set[str]:
        """The classes that have an image, by their names or else their numbers."""
        numbers = [] if self.labels is None else np.unique(self.labels[self.labels >= 0]).tolist()
        names = self.names or []
        return {names[number] if number < len(names) else f'class {number}' for number in numbers}


class _Images(Dataset):
    """What the images of a split are, in chunks."""

    def __init__(self, split: _Split):
        self.rows = select_columns(split.rows, split.image_column)
        self.image_column = split.image_column
        self.root = split.root

    def __len__(self) -> int:
        return -(-len(self.rows) // CHUNK_SIZE)

    def __getitem__(self, number: int) -> list[_Image]:
        start = number * CHUNK_SIZE
        table = self.rows[start:min(start + CHUNK_SIZE, len(self.rows))]
        return [_look(source, self.root) for source in column(table, self.image_column).to_pylist()]


def _look(source: dict[str, Any] | bytes | None, root: str | None) -> _Image:
    """What an image is, read and decoded as in a run."""
    digest = 0
    try:
        content = encoded_image(source, root)
        digest = image_digest(content)
        if not content:
            raise OSError('it is empty')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            image = identify(content)
            is_deep = ';16' in str(image.tile) or image.mode.startswith('I')  # loading takes the high bytes
            image.load()
            notes = {
                'deep': is_deep, 'turned': orientation(image) is not None,
                'frames': getattr(image, 'is_animated', False)}
            kind, size, is_transparent = f'{image.format} {image.mode}', image.size, _is_transparent(image)
            upright_rgb(image)
    except Exception as error:
        return _Image(digest, error=' '.join(str(error).split()) or type(error).__name__)
    return _Image(digest, kind, *size, tuple(note for note, holds in notes.items() if holds), is_transparent)


def _is_transparent(image: Any) -> bool:
    """Whether a loaded image has pixels that are not opaque."""
    if image.getbands()[-1] in ('A', 'a'):
        return image.getchannel(len(image.getbands()) - 1).getextrema()[0] < 255
    # A colour of a palette, or one colour of all.
    has_one = 'transparency' in image.info and image.mode in ('1', 'L', 'P', 'RGB')
    return has_one and image.convert('RGBA').getchannel('A').getextrema()[0] < 255


@dataclass
class DataCheck:
    """What was found in a data set.

    Attributes:
        facts: Lines on the data as they are.
        findings: What a run would trip over.
        hashes: Of each split, a hash of the encoded bytes of all images: in their order, or with keys in that of the
            hashes of the keys.
    """
    facts: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> int:
        """0 where nothing was found, 1 where a run goes on all the same, 2 where it refuses something."""
        return max((2 if finding.is_refused else 1 for finding in self.findings), default=0)

    def add(
            self,
            rows: Sequence[Any],
            what: str,
            name: Callable[[Sequence[Any]], list[str]] = list,
            **options: bool,
    ) -> None:
        """Add a finding of these rows, if there are some."""
        if len(rows):
            self.findings.append(Finding(f'{what}: {len(rows):,}', rows, name, **options))

    def __str__(self) -> str:
        return '\n'.join([*self.facts, *map(str, self.findings)])

    def to_json(self) -> str:
        """All of it, with every sample, as JSON."""
        return json.dumps(dict(
            facts=self.facts, content=self.hashes, status=self.status,
            findings=[dict(what=finding.what, refused=finding.is_refused, samples=finding.name(finding.rows))
                      for finding in self.findings]), indent=2)


def check_dataset(
        name: str,
        train_split: str | None = None,
        val_split: str | None = None,
        val_dataset: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        key_column: str | None = None,
        store: ShardStore | None = None,
        num_workers: int = 0,
) -> DataCheck:
    """Look at every image of the training and the validation split of a data set.

    Args:
        name: The data set, see `load_split`.
        train_split: Its training split.
        val_split: Its validation split; where none is asked for, there need be none.
        val_dataset: Where the validation split is another data set.
        image_column: The image column.
        label_column: The label column.
        key_column: The column of keys; by default the store's.
        store: A store whose images are compared with those of the training split. One in a folder that does not
            remember some remembers them from now on.
        num_workers: Loader processes.

    Raises:
        InputError: The data cannot be loaded, have no image column, or a key is missing.
    """
    found = DataCheck()
    left_out: list[str] = []
    rows = load_split(name, train_split, True, False, left_out.append, label_column)
    train = _Split('train', rows, image_column, label_column)
    splits = [train]
    try:
        rows = load_split(val_dataset or name, val_split, False, False, left_out.append, label_column)
        splits.append(_Split(str(rows.split), rows, image_column, label_column))
    except InputError as error:
        if val_split or val_dataset:
            raise
        found.findings.append(Finding(f'nothing to evaluate on: {error}'))
    train.name = str(train.rows.split)
    key_column = key_column or (store.manifest.key if store else None)
    keys = np.concatenate([hashes for hashes, _ in iterate_keys(train.rows, key_column)]) if key_column else None
    for split in splits:
        _look_at_all(split, num_workers)
    for split in splits:
        found.facts.append(_describe(split))
    found.facts += _kinds(splits)
    found.findings += [Finding(line) for line in dict.fromkeys(left_out)]
    for split in splits:
        _check_images(split, found)
        _check_labels(split, found, is_training=split is train)
        _check_repeated(split, found)
    if len(splits) == 2:
        _check_classes(*splits, found)
        _check_twice(*splits, found)
    for split in splits:
        digests = split.digests
        if split is train and keys is not None:
            order = np.argsort(keys, kind='stable')
            digests = np.stack([keys[order].view(np.int64), digests[order]])
        found.hashes[split.name] = hashlib.blake2b(digests.astype('<i8').tobytes(), digest_size=16).hexdigest()
        found.facts.append(f'{"content":16} {found.hashes[split.name]} ({split.name})')
    if keys is not None:
        order = np.argsort(keys, kind='stable')
        same = order[1:][keys[order[1:]] == keys[order[:-1]]]
        found.add(same, 'samples that have the key of another one', train.samples, is_refused=True)
    if store is not None:
        _compare_with_store(store, splits, keys, key_column, found)
    return found


def _look_at_all(split: _Split, num_workers: int) -> None:
    loader = DataLoader(
        _Images(split), batch_size=None, num_workers=num_workers, worker_init_fn=init_worker, prefetch_factor=4
        if num_workers else None)
    with progress(total=len(split), desc=f'check {split.name}', unit='image', leave=False) as bar:
        first = 0
        for images in loader:
            split.look(first, images)
            first += len(images)
            bar.update(len(images))


def _describe(split: _Split) -> str:
    sizes = split.sizes[split.sizes[:, 0] > 0]
    words = [f'{counted(len(split), "image")}']
    if split.labels is not None:
        words.append(f'{len(split.classes()):,} classes')
    if len(sizes):
        order = np.argsort(sizes.prod(axis=1), kind='stable')
        small, middle, large = ('x'.join(map(str, sizes[order[place]])) for place in (0, len(order) // 2, -1))
        words.append(f'{small} pixels' if small == large else f'{small} to {large} pixels, half of them above {middle}')
    return f'{split.name:16} {", ".join(words)}'


def _kinds(splits: Sequence[_Split]) -> list[str]:
    """Lines on the formats and modes of the images, and on what becomes of them."""
    kinds: Counter[str] = sum((split.kinds for split in splits), Counter())
    lines = [f'{"formats":16} {", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())}'] if kinds else []
    for note, words in NOTES.items():
        rows = [(split, row) for split in splits for row in split.notes.get(note, ())]
        if rows:
            split, row = rows[0]
            lines.append(f'{"":16} {len(rows):,} {words}, as {split.samples([row])[0]}')
    return lines


def _check_images(split: _Split, found: DataCheck) -> None:
    if not len(split):
        found.findings.append(Finding(f'{split.name} is empty', is_refused=True))
    found.add(list(split.errors), f'images of {split.name} that cannot be read', partial(
        split.samples, more=split.errors.get), is_refused=True, lists_all=True)
    found.add(split.transparent, f'images of {split.name} with transparent pixels, which get the colour below them',
              split.samples)
    long, short = split.sizes.max(axis=1), split.sizes.min(axis=1)
    odd = np.flatnonzero((long > 0) & ((short < MIN_SIDE) | (long > MAX_ASPECT * short)))
    found.add(odd, f'images of {split.name} with a side of less than {MIN_SIDE} pixels, or more than {MAX_ASPECT} '
              f'times as long as the other', partial(
                  split.samples, more=lambda row: 'x'.join(map(str, split.sizes[row]))))


def _check_labels(split: _Split, found: DataCheck, is_training: bool) -> None:
    if split.labels is None:
        found.findings.append(Finding(
            f'{split.name} has no labels: {no_labels(split.rows)}', is_refused=not is_training))
        return
    outside = np.flatnonzero((split.labels < -1) | (split.labels >= len(split.names) if split.names else False))
    found.add(outside, f'labels of {split.name} that are none of its classes', partial(
        split.samples, more=split.labels.__getitem__), is_refused=True)
    absent = np.flatnonzero(split.labels == -1)
    found.add(absent, f'images of {split.name} without a label', split.samples, is_refused=not is_training)
    groups = defaultdict(list)
    for name in split.names or ():
        groups[unicodedata.normalize('NFKC', name).strip().casefold()].append(name)
    alike = [' and '.join(map(repr, names)) for names in groups.values() if len(names) > 1]
    if is_training:
        found.add(alike, 'names of classes that differ in case, spaces or Unicode form alone')


def _check_classes(train: _Split, val: _Split, found: DataCheck) -> None:
    if train.labels is None or val.labels is None:
        return
    for here, there in ((train, val), (val, train)):
        alone = sorted(here.classes() - there.classes())
        found.add(alone, f'classes with images in {here.name} and none in {there.name}')


def _check_twice(train: _Split, val: _Split, found: DataCheck) -> None:
    both = np.intersect1d(_known(train), _known(val))
    found.add(_first_rows(train, both), f'images that are in {train.name} and in {val.name}, byte for byte', partial(
        _equal, train, val))


def _check_repeated(split: _Split, found: DataCheck) -> None:
    digests, counts = np.unique(_known(split), return_counts=True)
    repeated = np.flatnonzero(np.isin(split.digests, digests[counts > 1]))
    first = _first_rows(split, split.digests[repeated])
    if split.labels is not None:
        found.add(repeated[split.labels[repeated] != split.labels[first]],
                  f'images of {split.name} that are there with another label too', partial(_equal, split, split))
    found.add(repeated[repeated != first], f'images of {split.name} that are there before, byte for byte',
              partial(_equal, split, split))


def _equal(split: _Split, other: _Split, rows: np.ndarray) -> list[str]:
    """What to call the samples of these rows, [n], and the first ones of the same bytes in another split."""
    return [f'{one} = {same}' for one, same in zip(
        split.samples(rows), other.samples(_first_rows(other, split.digests[rows])))]


def _known(split: _Split) -> np.ndarray:
    """Digests of the images that can be read."""
    kept = np.ones(len(split), dtype=bool)
    kept[list(split.errors)] = False
    return split.digests[kept]


def _first_rows(split: _Split, digests: np.ndarray) -> np.ndarray:
    """The first row, int64 [n], of each of these digests, int64 [n]."""
    known, first = np.unique(split.digests, return_index=True)
    return first[np.searchsorted(known, digests)]


def _compare_with_store(
        store: ShardStore,
        splits: Sequence[_Split],
        keys: np.ndarray | None,
        key_column: str | None,
        found: DataCheck,
) -> None:
    """Compare the training split with the images that a store was filled from, and have the store remember them."""
    train, manifest, problems = splits[0], store.manifest, len(found.findings)

    def attempt(check: Any, *args: Any) -> Any:
        try:
            return check(*args)
        except InputError as error:
            found.findings.append(Finding(str(error), is_refused=True))
            return None

    for split, flag in zip(splits, ('--train-split', '--val-split')):
        attempt(match_classes, split.rows, split.label_column, manifest.class_names, flag, f'the store {store.path}')
    if manifest.key:
        index = attempt(store.open_keys)
        if index is None:
            return
        attempt(check_keys, store, index, train.rows, key_column, train.image_column)
        places = index.find(keys)
    else:
        attempt(check_fingerprint, store, dataset_fingerprint(train.rows, train.image_column, train.label_column))
        places = np.arange(len(train)) if len(train) == manifest.num_samples else np.full(len(train), -1)
    shards = np.where(places >= 0, places // manifest.shard_size, -1)
    changed, compared, lacking = [], 0, {}
    order = np.argsort(shards, kind='stable')
    for shard in np.unique(shards[shards >= 0]).tolist():
        rows = order[slice(*np.searchsorted(shards[order], [shard, shard + 1]))]
        inside = places[rows] - shard * manifest.shard_size
        before = attempt(store.read_digests, shard)
        if before is not None:
            compared += len(rows)
            changed += rows[train.digests[rows] != before[inside]].tolist()
        elif len(rows) == manifest.shard_rows(shard):
            lacking[shard] = np.empty(len(rows), dtype=np.int64)
            lacking[shard][inside] = train.digests[rows]
    found.add(sorted(changed), f'images of {train.name} that are others than the store {store.path} was filled from',
              train.samples, is_refused=True, lists_all=True)
    line = f'{"store":16} {store.path}: {compared:,} of {len(train):,} images compared'
    if lacking and isinstance(store, LogitStore) and len(found.findings) == problems and not train.errors:
        for shard, digests in lacking.items():
            store.write_digests(shard, digests)
        line += f', {sum(map(len, lacking.values())):,} remembered from now on'
    found.facts.append(line)
