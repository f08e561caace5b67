"""Top-5 predictions of every sample of a split: the five most probable classes with their probabilities, kept small.

An evaluation has the logits at hand anyway, so that keeping this costs no forward pass; 50,000 samples take about
1.5 MB. From it come calibration, confusion and the agreement of two models, long after the evaluation. Pictures of the
samples that a report shows lie beside it, so that a report needs neither the data nor the model.
"""

import io
import json
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from ..base.errors import InputError
from ..base.escaping import shown as shown_text
from ..base.files import read_bounded, write_atomic
from ..base.types import COUNT, Number, mismatch, read_json
from ..data.fingerprint import dataset_fingerprint
from ..data.sources import class_names, sample_files
from .calibration import Reliability, calibration

__all__ = [
    'Evaluation', 'Predictions', 'Recorder', 'class_accuracy', 'confused_pairs', 'confusion', 'damaged',
    'keep_evaluation', 'read_arrays', 'round_robin', 'samples_to_show', 'worst_classes', 'write_arrays',
]

NUM_KEPT = 5
NUM_SHOWN = 12
MAX_SIDE = 128
# Of files that are read: what no evaluation has more of.
MAX_ARRAY_BYTES, MAX_CLASSES, MAX_STORED_SIDE = 1 << 30, 1 << 20, 4096
ABOUT = {
    'epoch': COUNT, 'num_classes': Number(1, MAX_CLASSES, is_whole=True), 'split': dict, 'names': ([str], None),
    'files?': [str]}


@dataclass(frozen=True)
class Predictions:
    """Top-5 predictions of N samples.

    Attributes:
        ids: The K most probable classes, best first, integers [N, K].
        probs: Their probabilities, float32 [N, K].
        labels: int64 [N]; -1 where there is none.
        label_log_probs: Log-probability of the label, float32 [N]; 0 where there is none.
    """
    ids: np.ndarray
    probs: np.ndarray
    labels: np.ndarray
    label_log_probs: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def best(self) -> np.ndarray:
        """The most probable class, integers [N]."""
        return self.ids[:, 0]

    @property
    def confidence(self) -> np.ndarray:
        """Its probability, float32 [N]."""
        return self.probs[:, 0]

    @property
    def right(self) -> np.ndarray:
        """Whether it is the label, bool [N]."""
        return self.best == self.labels

    def is_sound(self, num_classes: int, has_labels: bool = False) -> bool:
        """Whether arrays that were read from a file can be predictions of so many classes.

        Args:
            num_classes: C.
            has_labels: Whether each sample must have a label.
        """
        arrays, size = vars(self).values(), len(self.labels) if self.labels.ndim == 1 else -1
        return (
            [array.dtype.kind for array in arrays] == ['i', 'f', 'i', 'f'] and self.ids.ndim == 2
            and self.ids.shape == self.probs.shape and 0 < self.ids.shape[1] <= NUM_KEPT
            and len(self.ids) == size and self.label_log_probs.shape == (size,)
            and bool(((self.ids >= 0) & (self.ids < num_classes)).all())
            and bool(((self.probs >= 0) & (self.probs <= 1.001)).all())
            and bool(((self.labels >= -(not has_labels)) & (self.labels < num_classes)).all())
            and bool((self.label_log_probs <= 0.001).all()))

    def labelled(self) -> 'Predictions':
        """Those of samples with a label."""
        return Predictions(**{name: values[self.labels >= 0] for name, values in vars(self).items()})

    def top(self, k: int) -> float:
        """Share of samples whose label is among the k best classes; NaN of no sample."""
        return float((self.ids[:, :k] == self.labels[:, None]).any(axis=1).mean()) if len(self) else float('nan')

    def reliability(self) -> Reliability:
        """How far its probabilities can be trusted; of samples with a label."""
        return calibration(self.confidence, self.right)


class Recorder:
    """Takes the predictions of one process batch by batch, and puts those of all processes together.

    Attributes:
        num_classes: C, as of the last batch.
    """

    def __init__(self):
        self._parts: list[dict[str, torch.Tensor]] = []
        self.num_classes = 0

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Take a batch.

        Args:
            logits: Logits or log-probabilities, float [B, C].
            labels: int64 [B]; -1 where there is none.
        """
        self.num_classes = logits.shape[1]
        best, ids = logits.topk(min(NUM_KEPT, logits.shape[1]), dim=1)
        log_norm = logits.logsumexp(dim=1)  # [B]
        label_logits = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        part = {
            'ids': ids.to(torch.int16 if logits.shape[1] <= 1 << 15 else torch.int32),
            'probs': (best - log_norm[:, None]).exp().float(), 'labels': labels,
            'label_log_probs': (label_logits - log_norm).masked_fill(labels < 0, 0.).float()}
        self._parts.append({name: tensor.cpu() for name, tensor in part.items()})

    def own(self) -> Predictions:
        """What this process has taken."""
        return Predictions(**self._arrays())

    def _arrays(self) -> dict[str, np.ndarray]:
        names = self._parts[0] if self._parts else ()
        return {name: torch.cat([part[name] for part in self._parts]).numpy() for name in names}

    def gather(self) -> Predictions:
        """What all processes have taken, the same on each: sample i is one of process i modulo their number."""
        # With fewer samples than processes the last ones have none.
        parts = [part for part in gather_object([self._arrays()]) if part]
        whole = {}
        for name, first in parts[0].items():
            whole[name] = np.empty((sum(len(part[name]) for part in parts), *first.shape[1:]), first.dtype)
            for rank, part in enumerate(parts):
                whole[name][rank::len(parts)] = part[name]
        return Predictions(**whole)


@dataclass(frozen=True)
class Evaluation:
    """The predictions of an evaluation, and what it takes to show them.

    Attributes:
        predictions: Of the samples of the split, in its order.
        epoch: Epoch of the training, from 0.
        num_classes: C.
        split: Fingerprint of the split: two evaluations with the same one saw the same samples.
        names: Names of the classes, where the data know them.
        shown: Samples with a picture [M].
        views: Their pictures as the model saw them, or smaller, uint8 [M, 3, H, W].
        files: Their files [M], empty where there is none.
    """
    predictions: Predictions
    epoch: int
    num_classes: int
    split: dict[str, Any]
    names: list[str] | None
    shown: np.ndarray
    views: np.ndarray
    files: list[str]

    def name(self, label: int) -> str:
        """What a class is called."""
        known = self.names is not None and 0 <= label < len(self.names)
        return str(self.names[label]) if known else f'class {label}'

    @classmethod
    def read(cls, path: Path) -> 'Evaluation':
        """What `keep_evaluation` wrote.

        Raises:
            InputError: The file is damaged, or another one.
        """
        about, arrays = read_arrays(path, ABOUT, *Predictions.__dataclass_fields__, 'shown', 'views')
        shown, views = arrays.pop('shown'), arrays.pop('views')
        files = about.get('files', [''] * len(shown)) if shown.ndim else []
        predictions, num_classes = Predictions(**arrays), about['num_classes']
        if not (predictions.is_sound(num_classes, has_labels=True) and len(predictions)
                and shown.ndim == 1 and shown.dtype.kind == 'i' and ((shown >= 0) & (shown < len(predictions))).all()
                and views.dtype == np.uint8 and views.ndim == 4 and views.shape[:2] == (len(shown), 3)
                and 0 < min(views.shape[2:]) and max(views.shape[1:]) <= MAX_STORED_SIDE
                and len(files) == len(shown)):
            raise damaged(path, 'its arrays do not fit each other')
        return cls(predictions, about['epoch'], num_classes, about['split'], about['names'], shown, views, files)


def keep_evaluation(path: Path, predictions: Predictions, loader: DataLoader, num_classes: int, epoch: int) -> None:
    """Write the predictions of an evaluation with pictures of the samples that tell most.

    Args:
        path: The file.
        predictions: Of all samples.
        loader: What was evaluated, from `eval_loader`.
        num_classes: C.
        epoch: Epoch of the training, from 0.

    Raises:
        InputError: The disk is full, or may not be written.
    """
    data = loader.dataset.dataset
    shown = np.concatenate(samples_to_show(predictions))
    views = torch.stack([sample['view'] for sample in data.__getitems__(shown.tolist())])
    scale = MAX_SIDE / max(views.shape[-2:])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in views.shape[-2:]]
        views = F.interpolate(views, size, mode='bilinear', antialias=True)
    about = {
        'epoch': epoch, 'num_classes': num_classes,
        'names': class_names(data.dataset, data.label_column, num_classes),
        'split': dataset_fingerprint(data.dataset, data.image_column, data.label_column),
        'files': list(map(shown_text, sample_files(data.dataset, data.image_column, shown)))}
    write_arrays(path, about, shown=shown, views=views.numpy(), **vars(predictions))


def round_robin(places: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The same places, int64 [n]: first the first one of each class, in their order, then the second ones."""
    turns, seen = [], Counter()
    for name in classes[places].tolist():
        turns.append(seen[name])
        seen[name] += 1
    return places[np.argsort(turns, kind='stable')]


def samples_to_show(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """The samples whose pictures tell most: the most confident predictions, correct and wrong.

    Returns:
        Up to 12 correct ones, of different classes where possible, and up to 12 wrong ones; most confident first.
    """
    order = np.argsort(-predictions.confidence, kind='stable')
    right, wrong = order[predictions.right[order]], order[~predictions.right[order]]
    right = round_robin(right, predictions.labels)[:NUM_SHOWN]
    return right[np.argsort(-predictions.confidence[right], kind='stable')], wrong[:NUM_SHOWN]


def class_accuracy(predictions: Predictions, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples with each label, int64 [C], and the share of them that is right, float64 [C]; NaN of no sample."""
    counts = np.bincount(predictions.labels, minlength=num_classes)
    with np.errstate(invalid='ignore'):
        return counts, np.bincount(predictions.labels, predictions.right, num_classes) / counts


def worst_classes(predictions: Predictions, num_classes: int, count: int) -> np.ndarray:
    """Labels with the smallest share of right samples, worst first; of equal ones that with more samples."""
    counts, accuracy = class_accuracy(predictions, num_classes)
    order = np.lexsort((-counts, accuracy))
    return order[counts[order] > 0][:count]


def confused_pairs(predictions: Predictions, count: int) -> list[tuple[int, int, int]]:
    """The most frequent mistakes: label, what it is taken for, and how often."""
    wrong = ~predictions.right
    pairs, counts = np.unique(
        np.stack([predictions.labels[wrong], predictions.best[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind='stable')[:count]
    return [(*pairs[:, place].tolist(), int(counts[place])) for place in order]


def confusion(predictions: Predictions, classes: np.ndarray) -> np.ndarray:
    """How many samples of some labels are taken for each of them, and in a last column for another, int64 [R, R + 1].

    Args:
        predictions: Of samples with a label.
        classes: The labels [R].
    """
    places = np.full(max(predictions.labels.max(), predictions.best.max(), classes.max()) + 1, len(classes))
    places[classes] = np.arange(len(classes))
    rows, columns = places[predictions.labels], places[predictions.best]
    counts = np.zeros((len(classes) + 1, len(classes) + 1), dtype=np.int64)
    np.add.at(counts, (rows, columns), 1)
    return counts[:-1]


def write_arrays(path: Path, about: dict[str, Any], **arrays: np.ndarray) -> None:
    """Write arrays, and plain values about them, as a compressed npz file that is there whole or not at all.

    Raises:
        InputError: The disk is full, or may not be written.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
    write_atomic(path, buffer.getbuffer())


def damaged(path: Path, reason: str) -> InputError:
    """What to tell a user whose file of `write_arrays` is damaged."""
    return InputError(f'{path} cannot be read ({reason}); the next evaluation of the run writes it anew, or delete it '
                      f'to do without')


def read_arrays(path: Path, kind: Any, *names: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The plain values and the named arrays of a file of `write_arrays`.

    Args:
        path: The file.
        kind: Of the plain values, see `mismatch`.
        names: Of the arrays.

    Raises:
        InputError: The file is damaged, or another one.
    """
    try:
        content = io.BytesIO(read_bounded(path, MAX_ARRAY_BYTES))
        with zipfile.ZipFile(content) as entries:
            # As many zeros as anybody wants take no room in the file.
            if sum(entry.file_size for entry in entries.infolist()) > MAX_ARRAY_BYTES:
                raise ValueError(f'it unfolds to more than {MAX_ARRAY_BYTES:,} bytes')
        with np.load(content, allow_pickle=False) as file:
            about, arrays = read_json(file['about'].tobytes()), {name: file[name] for name in names}
    except Exception as error:
        # Damaged archives and headers of arrays fail in as many ways as there are bytes.
        raise damaged(path, type(error).__name__)
    if why := mismatch(about, kind, 'about'):
        raise damaged(path, why)
    return about, arrays
