"""What the classes of a data set, a store and a model are, and whether they agree."""

import datasets
import numpy as np

from ..base.errors import InputError
from ..models.imagenet22k import NUM_CLASSES_22K, imagenet1k_in_22k
from .sources import class_names, read_labels

__all__ = ['check_label_values', 'check_labels', 'class_mismatch', 'is_imagenet1k']


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
