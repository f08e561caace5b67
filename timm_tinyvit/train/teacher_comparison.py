"""A student beside its teacher on views of the store: where they agree, and how sure each is rightly.

The teacher need not be at hand: what it said of a view is in the store. A bounded number of views is looked at once,
at the end of a training.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from collections.abc import Callable, Iterable

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from ..base.console import best_effort, progress
from ..base.errors import InputError
from ..base.types import COUNT
from ..data.classes import Classes
from ..models.loading import Normalize
from ..store.base import StoreReader
from ..store.manifest import stored_epoch
from .batches import TrainBatches
from .checkpoint import TrainState
from .metrics import suffixed
from .predictions import Predictions, Recorder, damaged, read_arrays, write_arrays
from .task import SparseLogitTask, split_targets

__all__ = ['StoredViews', 'compare_views', 'compare_with_teacher']

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
        if set(about) != set(ABOUT) or about['weights'] not in ('student', 'ema'):
            raise InputError(f'{path} is not of this version; the next training writes it anew, or delete it to do '
                             f'without')
        if not (student.is_sound(1 << 31) and teacher.is_sound(1 << 31) and len(student) == len(teacher) > 0
                and divergence.dtype.kind == 'f' and divergence.shape == (len(student),)
                and np.isfinite(divergence).all()):
            raise damaged(path, 'its arrays do not fit each other')
        return cls(student, teacher, divergence, **about)


def compare_with_teacher(
        args: argparse.Namespace,
        task: SparseLogitTask,
        data: TrainBatches,
        state: TrainState,
        classes: Classes,
        path: Path,
        stop: Callable[[], BaseException | None],
) -> None:
    """Compare the most accurate weights of a finished training with the teacher; all processes together.

    Args:
        args: The flags of the trainer.
        task: With the student.
        data: Training batches.
        state: Of the training.
        classes: Of the student.
        path: The file that takes the comparison.
        stop: What to raise where the program is to stop; it breaks off then, and leaves no file.
    """
    if not state.store.manifest.num_classes:
        return  # features are compared in every step, by their loss
    weights = max(task.models(), key=lambda name: state.history[-1].get(suffixed('eval_top1', name), -1.))
    model, epoch = task.whole_model(task.models()[weights]), state.epoch - 1
    batches = data.epoch(epoch, stop=stop)
    if state.accelerator.is_main_process:
        with best_effort('the comparison with the teacher'):
            views = compare_views(
                model, task.normalize, batches, state.store, state.accelerator, epoch, classes.num_labels,
                lambda: bool(stop()), weights, args.views_per_image, len(data.sampler))
            if views is not None:
                views.write(path)
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
    device, start, seen = accelerator.device, time.monotonic(), 0
    student, teacher, divergence = Recorder(), Recorder(), []
    bar = progress(total=NUM_VIEWS, desc='student and teacher', unit='view', leave=False)
    for batch in batches:
        labels = batch['label'].to(device)
        # Whole batches, and no more than there are.
        bar.total = len(labels) * min(-(-NUM_VIEWS // len(labels)), num_batches or NUM_VIEWS)
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
        bar.update(len(labels))
        seen += len(labels)
        if seen >= NUM_VIEWS or time.monotonic() - start > SECONDS:
            break
    bar.close()
    first_epoch, stored = epoch - epoch % views_per_image, store.manifest.stored_epochs
    stored_epochs = [stored_epoch(stored, number) for number in range(first_epoch, first_epoch + views_per_image)]
    return StoredViews(student.own(), teacher.own(), torch.cat(divergence).numpy(), epoch, stored_epochs, weights)
