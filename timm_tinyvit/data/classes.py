"""What the classes of a data set, a store and a model are, and whether they agree."""

import argparse
from dataclasses import dataclass

import datasets
import numpy as np

from ..base.errors import InputError
from ..models.imagenet22k import NUM_CLASSES_22K, imagenet1k_in_22k
from ..store.base import StoreReader
from .sources import class_names, find_column, read_labels

__all__ = [
    'Classes', 'check_label_values', 'check_labels', 'class_mismatch', 'is_imagenet1k', 'resolve_classes',
]


@dataclass(frozen=True)
class Classes:
    """The classes that a student learns.

    Attributes:
        num: How many.
        names: Their names, where the data know them.
        num_labels: Classes of the training labels, where the data name them.
        to_imagenet1k: The validation labels are those of ImageNet-1k, whatever the classifier.
    """
    num: int
    names: list[str] | None
    num_labels: int | None
    to_imagenet1k: bool


def resolve_classes(
        args: argparse.Namespace,
        train_set: datasets.Dataset | datasets.IterableDataset,
        val_set: datasets.Dataset,
        store: StoreReader | None,
) -> Classes:
    """The classes of a training: those of `--num-classes`, or the store's, or the data's.

    Args:
        args: The flags of the trainer.
        train_set: The training split.
        val_set: The validation split.
        store: What the student learns from, None for labels alone.

    Raises:
        InputError: They are not known, or store, training and validation labels do not agree with them.
    """
    label_key = find_column(train_set, args.target_key, is_image=False)
    label_names = class_names(train_set, label_key) if label_key else None
    num = args.num_classes or (store.manifest.num_classes if store else len(label_names or ()))
    if not num:
        raise InputError('the number of classes is not known from the data; give --num-classes, or put every image of '
                         'a folder into SPLIT/CLASS/')
    if store and num != store.manifest.num_classes:
        raise InputError(f'the student has {num} classes, the store {store.path} {store.manifest.num_classes}; leave '
                         f'--num-classes out, or use another store')
    if (store is None or args.alpha < 1) and not args.streaming:
        check_labels(train_set, label_key, num, '--train-split')
    val_key = find_column(val_set, args.target_key, is_image=False)
    check_labels(val_set, val_key, num, '--val-split')
    if store and (mismatch := class_mismatch(val_set, val_key, num)):
        raise InputError(f'{mismatch}, as the teacher has, so that accuracies would say nothing; name data of its '
                         f'classes with --val-dataset')
    names = label_key and class_names(train_set, label_key, num) or class_names(val_set, val_key, num)
    return Classes(num, names, label_names and len(label_names), is_imagenet1k(val_set, val_key))


def check_labels(dataset: datasets.Dataset, label_key: str | None, num_classes: int, flag: str) -> None:
    """Refuse a split whose labels the model cannot have.

    Args:
        dataset: The split.
        label_key: Its label column.
        num_classes: Classes of the model.
        flag: The flag that named the split.

    Raises:
        InputError: There is no label column, no sample, or a label out of range.
    """
    if label_key is None:
        raise InputError(f'the data of {flag} have no label column, only {", ".join(dataset.column_names)}; '
                         f'name it with --target-key; in a folder of images every file must lie in SPLIT/CLASS/')
    if not len(dataset):
        raise InputError(f'the data of {flag} are empty; name another split')
    check_label_values(read_labels(dataset, label_key), num_classes, flag)


def check_label_values(labels: np.ndarray, num_classes: int, flag: str) -> None:
    """Refuse labels, integer [N], that the model cannot have.

    Raises:
        InputError: A label is out of range; the first one is named.
    """
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        raise InputError(f'sample {bad[0]} of {flag} has label {labels[bad[0]]} (-1 stands for none), the student has '
                         f'{num_classes} classes; check --target-key, --num-classes and {flag}')


def class_mismatch(dataset: datasets.Dataset, label_key: str, num_classes: int) -> str | None:
    """Why the labels of an evaluation split are not the classes of a model, in words; None where they can be.

    Args:
        dataset: The split.
        label_key: Its label column.
        num_classes: Classes of the model. One of ImageNet-22k is looked at on the labels of ImageNet-1k.
    """
    names = class_names(dataset, label_key)
    if not names or len(names) == num_classes or num_classes == NUM_CLASSES_22K and is_imagenet1k(dataset, label_key):
        return None
    return f'the labels of --val-split are {len(names):,} classes, the model has {num_classes:,}'


def is_imagenet1k(dataset: datasets.Dataset, label_key: str) -> bool:
    """Whether labels are those of ImageNet-1k, by their number: class names, or else the largest label."""
    names = class_names(dataset, label_key)
    return (len(names) if names else int(read_labels(dataset, label_key).max()) + 1) == len(imagenet1k_in_22k())
