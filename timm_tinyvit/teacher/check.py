"""Check a store: read every byte of it, or run the teacher again on a sample of its views."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from ..base.console import print_result, progress
from ..base.errors import InputError
from ..data.dataset import SparseLogitDataset, collate
from ..store.base import StoreReader
from ..store.manifest import PROBE_TOLERANCE, output_distance
from ..targets.features import FeatureTargets
from .teacher import Teacher

__all__ = ['NUM_CHECKED', 'check_store', 'check_teacher', 'verify_store']

NUM_CHECKED = 512


def check_teacher(store: StoreReader, teacher: Teacher) -> None:
    """Find out that a teacher is the one of a store: by its weights, and by what it makes of them.

    Raises:
        InputError: It is another one.
    """
    known, reason = store.manifest.teacher, None
    if teacher.weights != known['weights']:
        reason = 'other weights'
    elif (distance := output_distance(teacher.probe, known.get('probe'))) > PROBE_TOLERANCE:
        reason = (f'the same weights and other outputs, {distance:.1e} of their spread apart, as another activation or '
                  f'pooling makes them')
    if reason:
        raise InputError(f'{teacher.name} is not the teacher of the store {store.path}: it was made with '
                         f'{known["name"]} of {reason}; give --teacher that one')


def check_store(store: StoreReader, teacher: Teacher, data: SparseLogitDataset) -> dict[str, float]:
    """Run the teacher again on a sample of stored views.

    Returns:
        `views` looked at, and `same_records` that come out bit for bit; `share_of_other_ids`, `mean_error` and
        `largest_error` of the log-probabilities of ids that are in both; or of features, `mean_cosine` and
        `least_cosine` of stored and new vectors.

    Raises:
        InputError: The store holds no complete epoch.
    """
    manifest = store.manifest
    epochs = [epoch for epoch in manifest.stored_epochs if not store.missing([epoch])]
    if not epochs:
        raise InputError(f'the store {store.path} holds no complete epoch yet; fill it first')
    picks = np.random.Generator(np.random.PCG64(0))
    count = min(NUM_CHECKED, len(epochs) * len(data))
    keys = [
        (int(epoch), int(index)) for epoch, index in
        zip(picks.choice(epochs, count), picks.integers(len(data), size=count))
    ]
    same_records, other, errors, cosines = 0, 0, [], []
    batch_size = manifest.teacher['batch_size']
    for start in range(0, count, batch_size):
        part = keys[start:start + batch_size]
        batch = collate(data.__getitems__(part))
        stored = store.codec.decode(batch['record'])
        fresh = store.codec.keep(teacher(batch['view'])).to('cpu')
        same_records += int((store.codec.encode(fresh) == batch['record'].numpy()).all(axis=1).sum())
        if isinstance(stored, FeatureTargets):
            cosines.append(cosine_similarity(stored.vectors, fresh.vectors, dim=-1).flatten())
            continue
        same = stored.ids[:, :, None] == fresh.ids[:, None, :]  # [B, k, k]
        other += int((~same.any(dim=2)).sum())
        rows, here, there = same.nonzero(as_tuple=True)
        errors.append((stored.log_probs[rows, here] - fresh.log_probs[rows, there]).abs())
    if cosines:
        cosine = torch.cat(cosines)
        return {'views': count, 'same_records': same_records, 'mean_cosine': cosine.mean().item(),
                'least_cosine': cosine.min().item()}
    error = torch.cat(errors)
    return {
        'views': count,
        'same_records': same_records,
        'share_of_other_ids': other / (count * manifest.k),
        'mean_error': error.mean().item(),
        'largest_error': error.max().item(),
    }


def verify_store(store: StoreReader, epochs: Sequence[int] | None = None) -> None:
    """Read every byte of a store and print what is wrong, one line each, or that all is well.

    Args:
        store: The store.
        epochs: Which epochs of it; all by default.

    Raises:
        InputError: Something is wrong, or the store is not meant to hold these epochs.
    """
    stored = store.manifest.stored_epochs
    epochs = stored if epochs is None else epochs
    if len(epochs) and not (epochs[0] in stored and epochs[-1] in stored):
        raise InputError(
            f'epochs {epochs[0]}:{epochs[-1] + 1} are to be verified, but the store {store.path} has '
            f'{stored.start}:{stored.stop}; fix --epochs')
    num_problems = 0
    for problem in store.verify(progress(epochs, desc='verify', unit='epoch', leave=False)):
        print_result(problem)
        num_problems += 1
    if num_problems:
        raise InputError(f'{store.path} has {num_problems} problem(s), one on each line above')
    print_result(f'{store.path}: {len(epochs) * store.manifest.num_shards} shards, every byte as it was written')
