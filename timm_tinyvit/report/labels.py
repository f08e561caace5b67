"""The data set of a store: views and records, labels, and what they and the classes of the teacher are called."""

from dataclasses import dataclass, field
from functools import cached_property
from collections.abc import Mapping, Sequence

import numpy as np
from timm.data import ImageNetInfo

from ..data.dataset import SparseLogitDataset
from ..data.fingerprint import iterate_keys
from ..data.sources import class_names, data_name, load_split, read_labels
from ..data.view_config import ViewConfig
from ..data.views import Replay
from ..models.imagenet22k import NUM_CLASSES_22K
from ..store.base import StoreReader
from ..store.manifest import Manifest

__all__ = ['LabelledViews', 'label_mismatch', 'labelled_views', 'teacher_classes']

# The two ImageNets, by the last words of a timm tag and the number of classes.
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
        columns: Its columns by `image_column` and `label_column`, where they are not found by their names.
    """
    name: str
    on_hub: bool
    split: str
    views: SparseLogitDataset
    labels: np.ndarray
    class_names: list[str] | None
    columns: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def rows(self) -> np.ndarray:
        """The row in the store of each sample, int64 [len(views)]."""
        return _rows(self.views)

    @property
    def has_labels(self) -> bool:
        """Whether any row has a label."""
        return bool((self.labels >= 0).any())

    @property
    def mismatch(self) -> str | None:
        """Why the labels are not the classes of the teacher, in words; None where they can be."""
        return label_mismatch(self.labels, self.class_names, self.views.store.manifest.num_classes)

    @property
    def teacher_labels(self) -> np.ndarray | None:
        """The labels, where there are any and they are classes of the teacher."""
        return self.labels if self.has_labels and self.mismatch is None else None

    @property
    def label_names(self) -> list[str] | None:
        """What the labels are called, where that is known."""
        return self.class_names or (None if self.mismatch else teacher_classes(self.views.store.manifest, self))


def labelled_views(
        store: StoreReader,
        dataset: str | None,
        train_split: str | None = None,
        input_key: str | None = None,
        target_key: str | None = None,
        key_column: str | None = None,
) -> LabelledViews | None:
    """The data set of a store.

    Args:
        store: The store.
        dataset: A folder, or a name on the Hub; with None there is none.
        train_split: Its split, `train` by default.
        input_key: Its image column.
        target_key: Its label column.
        key_column: Its column of keys; that of the store by default.

    Raises:
        InputError: It cannot be loaded, or is not the one that the store was made from.
    """
    if not dataset:
        return None
    images = load_split(dataset, train_split, is_training=True, label_column=target_key)
    replay = Replay(ViewConfig.from_dict(store.manifest.recipe), store.manifest.seed)
    views = SparseLogitDataset(images, replay, store, input_key, target_key, key_column)
    labels, names = np.full(store.manifest.num_samples, -1), None
    if views.label_column is not None:
        labels[_rows(views)] = read_labels(views.dataset, views.label_column)
        names = class_names(views.dataset, views.label_column)
    columns = {name: column for name, column in (('image_column', input_key), ('label_column', target_key)) if column}
    return LabelledViews(*data_name(dataset), train_split or 'train', views, labels, names, columns)


def _rows(views: SparseLogitDataset) -> np.ndarray:
    if views.key_index is None:
        return np.arange(len(views))
    return views.key_index.find(np.concatenate([hashes for hashes, _ in iterate_keys(views.dataset, views.key_column)]))


def label_mismatch(labels: np.ndarray, names: Sequence[str] | None, num_classes: int) -> str | None:
    """Why labels are not the classes of a teacher, in words; None where they can be.

    Args:
        labels: The labels, int64 [N]; -1 where there is none.
        names: Names of their classes, where they are known.
        num_classes: Classes of the teacher.
    """
    num_labels = len(names) if names else int(labels.max(initial=-1)) + 1
    if num_labels > num_classes or (names and num_labels != num_classes):
        return f'the data have labels of {num_labels:,} classes, the teacher predicts {num_classes:,}'
    return None


def teacher_classes(manifest: Manifest, data: LabelledViews | None = None) -> list[str] | None:
    """What the classes of a store's teacher are called, None where nobody knows.

    They are those that the store names; or the classes of the labels, where these are as many; or those of the ImageNet
    that the teacher's name, or the number of its classes, tells.
    """
    if manifest.class_names:
        return manifest.class_names
    if data is not None and data.class_names and not data.mismatch:
        return data.class_names
    name, dot, tag = str(manifest.teacher.get('name', '')).rpartition('.')
    subset = IMAGENETS.get((tag.rpartition('_')[2] if dot else 'in22k', manifest.num_classes))
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(index) for index in range(manifest.num_classes)]
