"""A student beside its teacher on views of the store: where they agree, and how sure each is rightly; of features,
whether the same views are near each other.

The teacher need not be at hand: what it said of a view is in the store. A bounded number of views is looked at once,
at the end of a training.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from ..base.console import best_effort, progress
from ..base.errors import InputError
from ..base.types import COUNT, Number
from ..data.classes import Classes
from ..models.features import feature_vectors
from ..models.loading import Normalize
from ..store.base import StoreReader
from ..store.manifest import stored_epoch
from .batches import TrainBatches
from .checkpoint import TrainState
from .metrics import accuracy_of
from .predictions import Predictions, Recorder, damaged, read_arrays, write_arrays
from .probe import NUM_NEIGHBOURS
from .task import SparseLogitTask, split_targets

__all__ = [
    'STORED_FEATURES', 'STORED_VIEWS', 'StoredFeatures', 'StoredViews', 'compare_features', 'compare_views',
    'compare_with_teacher',
]

STORED_VIEWS, STORED_FEATURES = 'stored_views.npz', 'stored_features.npz'
ABOUT = {'epoch': COUNT, 'stored_epochs': [COUNT], 'weights': str}
NUM_VIEWS = 1000
SECONDS = 60.


@dataclass(frozen=True)
class StoredViews:
    """Predictions of a student and its teacher for the same N views.

    Attributes:
        student: Those of the student.
        teacher: Those of the teacher, from the stored targets; the average of several teachers.
        divergence: KL divergence of the student from the teacher at temperature 1, in nats, float32 [N].
        epoch: Epoch of the training, from 0, whose views they are.
        stored_epochs: The epochs of the store that it takes.
        weights: Which weights the student has: its own, `student`, or the averaged ones, `ema`.
    """
    student: Predictions
    teacher: Predictions
    divergence: np.ndarray
    epoch: int
    stored_epochs: list[int]
    weights: str = 'student'

    def write(self, path: Path) -> None:
        """Write them to a file.

        Raises:
            InputError: The disk is full, or may not be written.
        """
        write_arrays(
            path, {'epoch': self.epoch, 'stored_epochs': self.stored_epochs, 'weights': self.weights},
            divergence=self.divergence,
            **{f'{who}_{name}': values for who in ('student', 'teacher')
               for name, values in vars(getattr(self, who)).items()})

    @classmethod
    def read(cls, path: Path) -> 'StoredViews':
        """What `write` wrote.

        Raises:
            InputError: The file is damaged, or another one.
        """
        fields = list(Predictions.__dataclass_fields__)
        about, arrays = read_arrays(
            path, ABOUT, 'divergence', *(f'{who}_{name}' for who in ('student', 'teacher') for name in fields))
        student, teacher = (
            Predictions(**{name: arrays[f'{who}_{name}'] for name in fields}) for who in ('student', 'teacher'))
        divergence = arrays['divergence']
        _check_about(path, about, ABOUT)
        if not (student.is_sound(1 << 31) and teacher.is_sound(1 << 31) and len(student) == len(teacher) > 0
                and divergence.dtype.kind == 'f' and divergence.shape == (len(student),)
                and np.isfinite(divergence).all()):
            raise damaged(path, 'its arrays do not fit each other')
        return cls(student, teacher, divergence, **about)


@dataclass(frozen=True)
class StoredFeatures:
    """How alike the neighbours of N views are by the features of a student and by those of its teacher.

    Attributes:
        shared: Of the views that are nearest by the teacher's vectors, the share that is nearest by the student's own
            features too, float32 [N].
        num_nearest: How many are nearest.
        epoch: As of `StoredViews`, and so are the next two.
        stored_epochs: The epochs of the store.
        weights: Which weights the student has.
    """
    shared: np.ndarray
    num_nearest: int
    epoch: int
    stored_epochs: list[int]
    weights: str = 'student'

    def write(self, path: Path) -> None:
        """Write them to a file.

        Raises:
            InputError: The disk is full, or may not be written.
        """
        about = dict(vars(self))
        write_arrays(path, about, shared=about.pop('shared'))

    @classmethod
    def read(cls, path: Path) -> 'StoredFeatures':
        """What `write` wrote.

        Raises:
            InputError: The file is damaged, or another one.
        """
        kind = ABOUT | {'num_nearest': Number(1, NUM_NEIGHBOURS, is_whole=True)}
        about, arrays = read_arrays(path, kind, 'shared')
        _check_about(path, about, kind)
        shared = arrays['shared']
        if not (shared.dtype.kind == 'f' and shared.ndim == 1 and len(shared) > about['num_nearest']
                and ((shared >= 0) & (shared <= 1)).all()):
            raise damaged(path, 'its array does not fit')
        return cls(shared, **about)


def _check_about(path: Path, about: dict[str, Any], kind: dict[str, Any]) -> None:
    if set(about) != set(kind) or about['weights'] not in ('student', 'ema'):
        raise InputError(f'{path} is not of this version; the next training writes it anew, or delete it to do without')


def compare_with_teacher(
        args: argparse.Namespace,
        task: SparseLogitTask,
        data: TrainBatches,
        state: TrainState,
        classes: Classes,
        stop: Callable[[], BaseException | None],
        is_new: bool = True,
) -> None:
    """Compare the most accurate weights of a finished training with the teacher; all processes together.

    `stored_views.npz` in the folder of the run takes the predictions, `stored_features.npz` the features.

    Args:
        args: The flags of the trainer.
        task: With the student.
        data: Training batches.
        state: Of the training.
        classes: Of the student.
        stop: What to raise where the program is to stop; it breaks off then, and leaves no file.
        is_new: Whether the training went on since there were files; else those that are there stay.
    """
    kinds = {STORED_VIEWS: state.store.manifest.num_classes, STORED_FEATURES: task.has_features}
    wanted = [name for name, is_there in kinds.items() if is_there and (is_new or not (state.folder / name).is_file())]
    if not wanted:
        return
    weights = max(task.models(), key=lambda name: accuracy_of(state.history[-1], name))
    model, epoch = task.whole_model(task.models()[weights]), state.epoch - 1
    about = dict(
        weights=weights, views_per_image=args.views_per_image, stopped=lambda: bool(stop()),
        num_batches=len(data.sampler))
    for name in wanted:
        batches = data.epoch(epoch, stop=stop)
        if state.accelerator.is_main_process:
            with best_effort('the comparison with the teacher'):
                common = model, task.normalize, batches, state.store, state.accelerator, epoch
                found = compare_views(*common, classes.num_labels, **about) if name == STORED_VIEWS else \
                    compare_features(*common, grid=task.trained.grid, **about)
                if found is not None:
                    found.write(state.folder / name)
    state.accelerator.wait_for_everyone()


@torch.inference_mode()
def compare_views(
        model: nn.Module,
        normalize: Normalize,
        batches: Iterable[dict[str, torch.Tensor]],
        store: StoreReader,
        accelerator: Accelerator,
        epoch: int,
        label_classes: int | None = None,
        stopped: Callable[[], bool] = bool,
        weights: str = 'student',
        views_per_image: int = 1,
        num_batches: int | None = None,
) -> StoredViews | None:
    """Run a student on up to 1,000 views of the store, or as many as it can in a minute; in one process.

    Args:
        model: The bare student.
        normalize: Normalises uint8 views on the device.
        batches: Training batches with records; as many are taken as are compared.
        store: Decodes the records.
        accelerator: Knows the device and the precision.
        epoch: Epoch of the training, from 0, whose batches they are.
        label_classes: Classes of the labels, where that is known: a teacher of other classes is not scored by them.
        stopped: Whether to break off.
        weights: Which weights the student has, see `StoredViews`.
        views_per_image: Views of an image in a batch, each of an epoch of its own.
        num_batches: How many batches there are, for the bar.

    Returns:
        None where it was broken off.
    """
    model.eval()
    device = accelerator.device
    student, teacher, divergence = Recorder(), Recorder(), []
    for batch in _batches_to_compare(batches, num_batches, stopped):
        labels = batch['label'].to(device)
        if 'label2' in batch:
            # A mixed view has no one label.
            labels = labels.masked_fill(labels != batch['label2'].to(device), -1)
        if label_classes not in (None, store.manifest.num_classes):
            labels = torch.full_like(labels, -1)
        labels = labels.masked_fill(labels >= store.manifest.num_classes, -1)
        with accelerator.autocast():
            logits = model(normalize(batch['view'].to(device)))
        targets, _ = split_targets(store.codec.decode(batch['record'].to(device)))
        probs = sum(part.densify() for part in targets) / len(targets)  # [B, C]
        teacher_log_probs, student_log_probs = probs.log(), logits.float().log_softmax(dim=1)  # [B, C] each
        student.add(student_log_probs, labels)
        teacher.add(teacher_log_probs, labels)
        # A class without probability has no part in the sum.
        products = torch.where(probs > 0, probs * (teacher_log_probs - student_log_probs), 0.)
        divergence.append(products.sum(dim=1).float().cpu())
    if stopped():
        return None
    return StoredViews(
        student.own(), teacher.own(), torch.cat(divergence).numpy(), epoch,
        _stored_epochs(store, epoch, views_per_image), weights)


@torch.inference_mode()
def compare_features(
        model: nn.Module,
        normalize: Normalize,
        batches: Iterable[dict[str, torch.Tensor]],
        store: StoreReader,
        accelerator: Accelerator,
        epoch: int,
        stopped: Callable[[], bool] = bool,
        weights: str = 'student',
        views_per_image: int = 1,
        num_batches: int | None = None,
        grid: int = 0,
) -> StoredFeatures | None:
    """As `compare_views`, by the own features of the student: those that are exported, before the projector.

    Args:
        model: The bare student; the other arguments are those of `compare_views`.
        grid: Cells of one side of the stored grid, of which means are compared; 0 for pooled vectors.

    Returns:
        None where it was broken off, or the views are too few to have neighbours.
    """
    model.eval()
    found = {'student': [], 'teacher': []}
    for batch in _batches_to_compare(batches, num_batches, stopped):
        views = normalize(batch['view'].to(accelerator.device))
        with accelerator.autocast():
            features = model.forward_features(views)
            own = feature_vectors(model, features, tuple(views.shape[-2:]), grid)
        _, stored = split_targets(store.codec.decode(batch['record'].to(accelerator.device)))
        for name, vectors in (('student', own), ('teacher', stored.vectors)):
            found[name].append(nn.functional.normalize(vectors.float().mean(dim=1), dim=1))
    if stopped():
        return None
    near = {}
    for name, parts in found.items():
        vectors = torch.cat(parts)
        cosines = (vectors @ vectors.T).fill_diagonal_(-torch.inf)  # [N, N]
        near[name] = cosines.topk(min(NUM_NEIGHBOURS, len(vectors) - 1), dim=1).indices
    num_nearest = near['teacher'].shape[1]
    if not num_nearest:
        return None
    shared = (near['teacher'][:, :, None] == near['student'][:, None]).any(dim=2).float().mean(dim=1)
    return StoredFeatures(
        shared.cpu().numpy(), num_nearest, epoch, _stored_epochs(store, epoch, views_per_image), weights)


def _batches_to_compare(
        batches: Iterable[dict[str, torch.Tensor]],
        num_batches: int | None,
        stopped: Callable[[], bool],
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches, with a bar, until their views or the time are enough, or the program is to stop."""
    start, seen = time.monotonic(), 0
    bar = progress(total=NUM_VIEWS, desc='student and teacher', unit='view', leave=False)
    for batch in batches:
        size = len(batch['view'])
        # Whole batches, and no more than there are.
        bar.total = size * min(-(-NUM_VIEWS // size), num_batches or NUM_VIEWS)
        yield batch
        bar.update(size)
        seen += size
        if stopped() or seen >= NUM_VIEWS or time.monotonic() - start > SECONDS:
            break
    bar.close()


def _stored_epochs(store: StoreReader, epoch: int, views_per_image: int) -> list[int]:
    """The epochs of the store that an epoch of the training takes."""
    first_epoch, stored = epoch - epoch % views_per_image, store.manifest.stored_epochs
    return [stored_epoch(stored, number) for number in range(first_epoch, first_epoch + views_per_image)]
