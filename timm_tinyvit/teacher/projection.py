"""Fit the projection of a store of features: the principal components of its teacher's vectors."""

import torch
from torch.utils.data import DataLoader

from ..base.console import progress
from ..base.errors import InputError
from ..base.launch import init_worker
from ..data.dataset import SparseLogitDataset, collate
from ..store.projection import Projection
from .teacher import Teacher

__all__ = ['NUM_FITTED', 'fit_projection']

NUM_FITTED = 8192


def fit_projection(
        teacher: Teacher,
        data: SparseLogitDataset,
        epoch: int,
        dim: int,
        batch_size: int,
        num_workers: int = 0,
) -> tuple[Projection, float]:
    """Fit on up to 8,192 views of an epoch, evenly spaced in the data set; of a grid on all cells.

    Args:
        teacher: A teacher of features, without a projection.
        data: The views.
        epoch: Which epoch of them.
        dim: Numbers to keep of a vector.
        batch_size: Views per teacher batch.
        num_workers: Loader processes.

    Returns:
        The projection, and the share of the variance that it keeps.

    Raises:
        InputError: The teacher's vectors have fewer numbers, or hold NaN or infinity.
    """
    if dim > teacher.num_features:
        raise InputError(f'--feature-dim is {dim}, but the vectors of the teacher {teacher.name} have '
                         f'{teacher.num_features} numbers; choose fewer, or leave it out to keep them all')
    count = min(NUM_FITTED, len(data))
    rows = [(epoch, number * len(data) // count) for number in range(count)]
    loader = DataLoader(
        data, sampler=rows, batch_size=batch_size, num_workers=num_workers, collate_fn=collate,
        worker_init_fn=init_worker)
    shift, num_vectors = None, 0
    for batch in progress(loader, desc='projection', unit='batch', leave=False):
        vectors = teacher(batch['view']).flatten(0, 1)  # [B * cells, E]
        if shift is None:
            # A rough mean, so that what is summed up in float32 loses no digits.
            shift, total = vectors.mean(dim=0), torch.zeros(vectors.shape[1], dtype=torch.float64)
            products = torch.zeros(vectors.shape[1], vectors.shape[1], dtype=torch.float64)
        vectors = vectors - shift
        total += vectors.sum(dim=0).double().cpu()
        products += (vectors.T @ vectors).double().cpu()
        num_vectors += len(vectors)
    mean = total / num_vectors
    covariance = products / num_vectors - mean[:, None] * mean
    if not covariance.isfinite().all():
        raise InputError(f'the features of the teacher {teacher.name} hold NaN or infinity; check the teacher, or run '
                         f'it in float32')
    variances, components = torch.linalg.eigh(covariance)  # ascending, [E] and [E, E] in columns
    components = components.T.flip(0)[:dim]
    # Components have no sign of their own: the largest number of each is positive.
    signs = components.gather(1, components.abs().argmax(dim=1, keepdim=True)).sign()
    variances = variances.clamp(min=0).flip(0)
    share = (variances[:dim].sum() / variances.sum()).nan_to_num(1.).item()
    projection = Projection(shift.cpu() + mean.float(), (components * signs).float().contiguous())
    return projection, round(share, 6)
