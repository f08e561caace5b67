"""What the classes of a data set, a store, a teacher and a checkpoint are, and whether they agree.

Here alone this is decided: by name where both sides have names, and else by number. The order is that of the store,
which is its teacher's, or without one that of the training data; labels of data in another order get its numbers.
"""

import argparse
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from collections.abc import Callable, Sequence

import datasets
import numpy as np

from ..base.console import warning
from ..base.errors import InputError
from ..base.files import read_bounded
from ..models.config_file import read_config
from ..models.imagenet22k import NUM_CLASSES_22K, imagenet1k_in_22k
from ..models.loading import config_beside
from ..store.base import StoreReader
from ..store.subset import SubsetStore
from .sources import Source, class_names, find_column, no_labels, read_labels, sample_name

__all__ = [
    'REMEDY', 'Classes', 'check_label_values', 'check_labels', 'checkpoint_names', 'class_mismatch', 'class_numbers',
    'is_imagenet1k', 'match_classes', 'match_names', 'matched_split', 'new_labels', 'renumbered', 'resolve_classes',
    'valid_names',
]

# A manifest is a text of bounded length.
MAX_NAMES_LENGTH = 1 << 19
MAX_MAP_BYTES = 1 << 22
# What to do about a teacher of other classes, the best first.
REMEDY = 'fine-tune the teacher on these classes (docs/teacher.md), choose some of its own with --class-map'


@dataclass(frozen=True)
class Classes:
    """The classes that a student learns.

    Attributes:
        num: How many.
        names: Their names, where the store or the data know them.
        num_labels: Classes of the training labels, where the data name them; 0 if these are others.
        to_imagenet1k: The validation labels are those of ImageNet-1k, whatever the classifier.
        of_teacher: The teacher's number of each class, where they are not all of its classes in its order.
    """
    num: int
    names: list[str] | None
    num_labels: int | None
    to_imagenet1k: bool
    of_teacher: list[int] | None = None

    def of(self, store: StoreReader | None) -> StoreReader | None:
        """What a student of these classes learns from, of a store."""
        return store if self.of_teacher is None else SubsetStore(store, self.of_teacher, self.names or ())


def resolve_classes(
        args: argparse.Namespace,
        train_set: Source,
        val_set: datasets.Dataset,
        taught_by: StoreReader | Any | None,
) -> tuple[Classes, datasets.Dataset | None]:
    """The classes of a training: those of `--num-classes`, or the store's, or the data's.

    Args:
        args: The flags of the trainer.
        train_set: The training split.
        val_set: The validation split.
        taught_by: The store that the student learns from, or the teacher that is about to fill it; None for labels
            alone.

    Returns:
        The classes, and the validation split with their numbers; None where nothing can be evaluated.

    Raises:
        InputError: They are not known, or store, training and validation labels do not agree with them.
    """
    label_column = find_column(train_set, args.target_key, is_image=False)
    label_names = class_names(train_set, label_column) if label_column else None
    taught, source = getattr(taught_by, 'manifest', taught_by), '--train-split'
    is_teacher = taught is not None and taught is taught_by
    if taught is not None and not taught.num_classes:
        # Features say nothing of classes: only labels do.
        if args.alpha == 1:
            return _without_classes(args, train_set, val_set, taught_by)
        taught = None
    if args.num_classes == 0:
        raise InputError('--num-classes 0 leaves nothing that labels or the classes of a store could train; give '
                         '--logits a store of features alone, without --alpha, or leave it out')
    if taught is not None:
        source = f'the teacher {taught.name}' if is_teacher else f'the store {taught_by.path}'
    of_teacher, mapped = _class_map(args, label_names, taught, source)
    if mapped is not None:
        taught = taught and SimpleNamespace(num_classes=len(mapped), class_names=mapped)
        label_names, source = None if taught is None else label_names, '--class-map' if args.class_map else source
    num = args.num_classes or (taught.num_classes if taught is not None else len(mapped or label_names or ()))
    if not num:
        raise InputError(f'the number of classes is not known from the data; '
                         f'{"give --num-classes" if label_column else no_labels(train_set)}')
    if taught is not None and num != taught.num_classes:
        raise InputError(f'the student has {num} classes, {source} {taught.num_classes}; fine-tune the teacher on '
                         f'these classes (docs/teacher.md), say which of its classes they are with --class-map, or '
                         f'leave --num-classes out')
    names = next((list(names) for names in (taught.class_names if taught else mapped, label_names)
                  if names and len(names) == num), None)
    learns_labels, num_labels = taught is None or args.alpha < 1, label_names and len(label_names)
    numbers = None
    try:
        numbers = _numbers_of(train_set, label_column, names, '--train-split', source)
    except InputError as error:
        if learns_labels:
            raise
        warning(f'{error}; the training goes on without them')
        num_labels = 0
    if learns_labels and not args.streaming:
        checked = train_set if numbers is None else _renumber(train_set, label_column, numbers, names)
        check_labels(checked, label_column, num, '--train-split')
    val_key = find_column(val_set, args.target_key, is_image=False)
    val_set = match_classes(val_set, val_key, names, '--val-split', source)
    check_labels(val_set, val_key, num, '--val-split')
    if taught is not None and (mismatch := class_mismatch(val_set, val_key, num)):
        raise InputError(f'{mismatch}, those of its teacher, so that its accuracy cannot be measured; {REMEDY}, or '
                         f'give --val-dataset with the classes of the teacher')
    is_1k = is_imagenet1k(val_set, val_key)
    if not is_teacher:
        # Of a teacher that is about to fill a store, its store will be asked.
        _tell_unseen(train_set, label_column, numbers, val_set, val_key, num_labels != 0 and not (
            is_1k and num == NUM_CLASSES_22K))
    names = names or class_names(val_set, val_key, num)
    started_with = checkpoint_names(args.initial_checkpoint)
    if started_with and names and started_with != names and set(started_with) == set(names):
        warning(f'the classifier of {args.initial_checkpoint} has the classes in another order than {source}: its '
                f'weights start at other classes than they were trained for')
    return Classes(num, names, num_labels, is_1k, of_teacher), val_set


def _class_map(
        args: argparse.Namespace,
        label_names: Sequence[str] | None,
        taught: Any | None,
        source: str,
) -> tuple[list[int] | None, list[str] | None]:
    """Which classes of its teacher a student has: those of `--class-map`, or else, if it is to have as many as the data
    and not as many as the teacher, those of the data by their names.

    Args:
        args: The flags of the trainer.
        label_names: Names of the training labels.
        taught: Has `num_classes` and `class_names` of the teacher; None where there is none.
        source: The teacher, in words.

    Returns:
        The teacher's number of each class, None where they are all of its classes in its order; and their names, empty
        where only numbers are known, None where there is no map.

    Raises:
        InputError: The file is none, or names what is no class of the teacher.
    """
    if args.class_map:
        lines, where = _read_class_map(args.class_map), f'--class-map {args.class_map}'
        if args.num_classes not in (None, len(lines)):
            raise InputError(f'{where} has {len(lines):,} classes, and --num-classes is {args.num_classes}; leave '
                             f'--num-classes out')
    elif taught and label_names and args.num_classes == len(label_names) != taught.num_classes and taught.class_names:
        lines, where = list(label_names), '--train-split'
    else:
        return None, None
    if len(twice := [line for line, times in Counter(lines).items() if times > 1]):
        raise InputError(f'{where} has the class {twice[0]!r} twice; name each class once')
    if taught is None:
        return None, lines
    known = [unicodedata.normalize('NFC', name) for name in taught.class_names]
    places = {name: number for number, name in enumerate(known)}
    numbers = [places.get(line, -1) for line in lines]
    are_numbers = not set(numbers) - {-1} and all(line.isdecimal() for line in lines)
    if are_numbers:
        numbers = [int(line) if len(line) < 10 and int(line) < taught.num_classes else -1 for line in lines]
    bad = [line for line, number in zip(lines, numbers) if number < 0 or known.count(line) > 1]
    if bad:
        one = 'the name' if known else f'the number, 0 to {taught.num_classes - 1:,},'
        raise InputError(f'{len(bad):,} of {len(lines):,} classes of {where} are not those of {source}, as {bad[0]!r}; '
                         f'fine-tune the teacher on these classes (docs/teacher.md), or name with --class-map a file '
                         f'with {one} of one of its classes in each line')
    if len(set(numbers)) < len(numbers):
        raise InputError(f'{where} has the same number twice; name each class once')
    if are_numbers:
        has_names = label_names and len(label_names) == len(lines)
        lines = list(label_names) if has_names else [known[number] for number in numbers] if known else []
    return (None if numbers == list(range(taught.num_classes)) else numbers), lines


def _read_class_map(path: str) -> list[str]:
    """The classes of a file in timm's format: one in each line, in their order.

    Raises:
        InputError: It is no such file.
    """
    try:
        text = read_bounded(Path(path).expanduser(), MAX_MAP_BYTES).decode('utf-8-sig')
    except OSError as error:
        raise InputError(f'--class-map {path} cannot be read: {error.strerror}; name a text file with a class in each '
                         f'line')
    except ValueError:
        text = ''  # a pickle, which timm reads, runs whatever is in it
    lines = [unicodedata.normalize('NFC', line.strip()) for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if not lines or not all(line and line.isprintable() for line in lines):
        raise InputError(f'--class-map {path} is no text file with a class in each line; write one')
    return lines


def _tell_unseen(
        train_set: Source,
        train_key: str | None,
        numbers: np.ndarray | None,
        val_set: datasets.Dataset,
        val_key: str,
        are_alike: bool,
) -> None:
    """Say which classes are validated and have no image to train with, as of data sorted by class that were sliced.

    Args:
        train_set: The training split.
        train_key: Its label column.
        numbers: New numbers of its classes; None where they keep those that they have.
        val_set: The validation split.
        val_key: Its label column.
        are_alike: Whether labels of both are numbers of the same classes.
    """
    if train_key is None or not are_alike or isinstance(train_set, datasets.IterableDataset):
        return
    seen = read_labels(train_set, train_key)
    seen = seen if numbers is None else new_labels(seen, numbers)
    if len(unseen := np.setdiff1d(read_labels(val_set, val_key), seen)):
        names = class_names(val_set, val_key)
        example = repr(names[unseen[0]]) if names else f'number {unseen[0]}'
        warning(f'--val-split has {len(unseen):,} classes that no image of --train-split has, as {example}; where the '
                f'data are sorted by class, take --val-fraction 0.2 instead of slices')


def _without_classes(
        args: argparse.Namespace,
        train_set: Source,
        val_set: datasets.Dataset | None,
        taught_by: StoreReader | Any,
) -> tuple[Classes, datasets.Dataset | None]:
    """What a student of features alone learns: no class; and the split whose labels its features are compared by."""
    if args.num_classes:
        what = getattr(taught_by, 'path', None)
        source = f'the store {what} holds' if what else f'the teacher {taught_by.name} gives'
        raise InputError(f'{source} features, which train no classifier of --num-classes {args.num_classes}; give 0 or '
                         f'leave it out for a backbone, or add labels with --alpha 0.5, or a store of classes to '
                         f'--logits')
    classes = Classes(0, None, None, False)
    if val_set is None or isinstance(train_set, datasets.IterableDataset):
        return classes, None
    columns = [find_column(split, args.target_key, is_image=False) for split in (train_set, val_set)]
    return classes, matched_split(train_set, val_set, args.target_key) if all(columns) else None


def matched_split(train_set: datasets.Dataset, val_set: datasets.Dataset, target_key: str | None) -> datasets.Dataset:
    """A validation split whose labels have the numbers of the training split's.

    Raises:
        InputError: One of them has no labels, or they are other classes.
    """
    columns = []
    for split, flag in ((train_set, '--train-split'), (val_set, '--val-split')):
        columns.append(find_column(split, target_key, is_image=False))
        if columns[-1] is None:
            raise InputError(f'the data of {flag} have no labels: {no_labels(split)}')
    names = class_names(train_set, columns[0])
    return match_classes(val_set, columns[1], names, '--val-split', '--train-split')


def match_names(here: Sequence[str], there: Sequence[str]) -> np.ndarray | None:
    """The number that each class has there, by its name, int64 [C]; None where only the numbers tell.

    Raises:
        ValueError: These are other classes; the message says how.
    """
    # The same letters with their accents put together or apart are the same name.
    here, there = ([unicodedata.normalize('NFC', name) for name in names] for names in (here, there))
    places: dict[str, list[int]] = {}
    for place, name in enumerate(there):
        places.setdefault(name, []).append(place)
    if len(set(here)) == len(here) and all(len(places.get(name, ())) == 1 for name in here):
        return np.array([places[name][0] for name in here], dtype=np.int64)
    unknown = [name for name in here if name not in places]
    example = f', as {unknown[0]!r}' if unknown else ''
    if len(here) != len(there):
        raise ValueError(f'{len(here):,} classes instead of {len(there):,}, {len(unknown):,} of them unknown{example}')
    moved = [(name, place) for place, name in enumerate(here) if name in places and place not in places[name]]
    if moved:
        name, place = moved[0]
        raise ValueError(f'{len(moved):,} classes have other numbers, as {name!r} {place} instead of '
                         f'{places[name][0]}, and {len(unknown):,} are unknown{example}')
    return None


def match_classes(
        dataset: datasets.Dataset,
        label_column: str | None,
        names: Sequence[str] | None,
        flag: str,
        source: str,
) -> datasets.Dataset:
    """A split with the numbers of other classes, matched by name.

    Args:
        dataset: The split.
        label_column: Its label column; None leaves it as it is.
        names: Names of the classes, in their order; None where they are not known. For those of ImageNet-22k, the
            labels of ImageNet-1k are left as they are.
        flag: The flag that named the split.
        source: Whose classes they are, in words.

    Raises:
        InputError: The split has other classes.
    """
    numbers = _numbers_of(dataset, label_column, names, flag, source)
    return dataset if numbers is None else _renumber(dataset, label_column, numbers, names)


def _numbers_of(
        dataset: Source,
        label_column: str | None,
        names: Sequence[str] | None,
        flag: str,
        source: str,
) -> np.ndarray | None:
    """The new number of each class of a split, None where it keeps those that it has; see `match_classes`."""
    here = class_names(dataset, label_column) if label_column else None
    if not here or not names or len(names) == NUM_CLASSES_22K and len(here) == len(imagenet1k_in_22k()):
        return None
    try:
        numbers = match_names(here, names)
    except ValueError as error:
        raise InputError(f'the labels of {flag} are not the classes of {source}: {error}; '
                         f'{"" if source.startswith("--") else f"{REMEDY}, or "}give data of these classes')
    if numbers is None:
        first = next(place for place, name in enumerate(here) if name != names[place])
        warning(f'the labels of {flag} have other names than the classes of {source}, as {here[first]!r} for '
                f'{names[first]!r}: they are matched by number')
    return numbers


def renumbered(dataset: datasets.Dataset, label_column: str | None, names: Sequence[str]) -> datasets.Dataset:
    """A split with the numbers of other classes where all of its own are among them by name; else as it is."""
    numbers = class_numbers(dataset, label_column, names)
    return dataset if numbers is None else _renumber(dataset, label_column, numbers, names)


def class_numbers(dataset: Source, label_column: str | None, names: Sequence[str]) -> np.ndarray | None:
    """The number that each class of a split has among others, by its name; None where not all of them are there."""
    here = class_names(dataset, label_column) if label_column and names else None
    try:
        return match_names(here, names) if here else None
    except ValueError:
        return None


def new_labels(labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Labels, int64 [N], with other numbers of their classes, int64 [C]; what is no class of them stays what it is."""
    known = (labels >= 0) & (labels < len(numbers))
    return np.where(known, numbers[np.where(known, labels, 0)], labels)


def _renumber(
        dataset: datasets.Dataset,
        label_column: str,
        numbers: np.ndarray,
        names: Sequence[str],
) -> datasets.Dataset:
    if len(numbers) == len(names) and np.array_equal(numbers, np.arange(len(names))):
        return dataset
    labels = new_labels(read_labels(dataset, label_column), numbers)
    if label_column not in dataset.column_names:
        dataset = dataset.flatten()  # an entry of a structure
    # A table of no column would have no rows.
    return dataset.rename_column(label_column, f'old {label_column}').add_column(
        label_column, labels, feature=datasets.ClassLabel(names=list(names))).remove_columns(f'old {label_column}')


def valid_names(names: Any, num_classes: int) -> list[str]:
    """Class names as a manifest can hold them; empty where they are not one printable text for each class."""
    if not isinstance(names, (list, tuple)) or len(names) != num_classes or not all(
            isinstance(name, str) and name.isprintable() for name in names) or sum(map(len, names)) > MAX_NAMES_LENGTH:
        return []
    return list(names)


def checkpoint_names(weights: str | None) -> list[str] | None:
    """Names of the classes of a checkpoint, by the config.json beside it; None where nobody says them."""
    file = config_beside(weights)
    try:
        return file and read_config(file.parent).get('label_names')
    except InputError:
        return None  # whoever needs the file says so


def check_labels(dataset: datasets.Dataset, label_column: str | None, num_classes: int, flag: str) -> None:
    """Refuse a split whose labels the model cannot have.

    Args:
        dataset: The split.
        label_column: Its label column.
        num_classes: Classes of the model.
        flag: The flag that named the split.

    Raises:
        InputError: There is no label column, no sample, or a label out of range.
    """
    if label_column is None:
        raise InputError(f'the data of {flag} have no labels: {no_labels(dataset)}')
    if not len(dataset):
        raise InputError(f'the data of {flag} are empty; name another split')
    check_label_values(
        read_labels(dataset, label_column), num_classes, flag, lambda row: sample_name(dataset, None, row))


def check_label_values(
        labels: np.ndarray,
        num_classes: int,
        flag: str,
        name_of: Callable[[int], str] = str,
) -> None:
    """Refuse labels, integer [N], that the model cannot have.

    Args:
        labels: The labels.
        num_classes: Classes of the model.
        flag: The flag that named the data.
        name_of: What to call a sample, by its place.

    Raises:
        InputError: A label is out of range; the first one is named.
    """
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        raise InputError(
            f'sample {name_of(int(bad[0]))} of {flag} has label {labels[bad[0]]} (-1 stands for none), the student has '
            f'{num_classes} classes; check --target-key, --num-classes and {flag}')


def class_mismatch(dataset: datasets.Dataset, label_column: str, num_classes: int) -> str | None:
    """Why the labels of a validation split are not the classes of a model, in words; None where they can be.

    Args:
        dataset: The split.
        label_column: Its label column.
        num_classes: Classes of the model. One of ImageNet-22k is looked at on the labels of ImageNet-1k.
    """
    names = class_names(dataset, label_column)
    if not names or len(names) == num_classes:
        return None
    if num_classes == NUM_CLASSES_22K and is_imagenet1k(dataset, label_column):
        return None
    return f'--val-split has labels of {len(names):,} classes, the model predicts {num_classes:,}'


def is_imagenet1k(dataset: datasets.Dataset, label_column: str) -> bool:
    """Whether labels are those of ImageNet-1k, by their number: class names, or else the largest label."""
    names = class_names(dataset, label_column)
    return (len(names) if names else int(read_labels(dataset, label_column).max()) + 1) == len(imagenet1k_in_22k())
