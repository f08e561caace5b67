"""Statistics of a store of features: lengths of the vectors, their variance by dimension, and how alike epochs are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.nn.functional import normalize

from ..base.text import percent
from ..data.dataset import read_records
from ..store.base import StoreReader
from .statistics import MAX_EPOCHS, evenly, filled_shards

__all__ = ['FeatureStatistics', 'feature_statistics']

MAX_SAMPLES = 2000
# Numbers that are decoded at a time.
READ_NUMBERS = 1 << 24


@dataclass(frozen=True)
class FeatureStatistics:
    """Of the same N samples in E epochs of a store of features.

    Attributes:
        epochs: Their numbers.
        rows: Rows of the samples in the store, int64 [N].
        num_cells: Vectors of a view.
        norms: Length of each view's vectors, the mean over its cells, float [E * N].
        variances: Variance of each number over all vectors, float64 [D], as the numbers stand in a vector.
        agreement: Mean cosine of a sample's views in two epochs, of the means over their cells; None of one epoch.
        likeness: The same of the views of two samples in one epoch, to compare it with; None of one sample.
        directions: The means over their cells of the views of the first epoch, of length 1, float32 [N, D].
    """
    epochs: list[int]
    rows: np.ndarray
    num_cells: int
    norms: np.ndarray
    variances: np.ndarray
    agreement: float | None
    likeness: float | None
    directions: np.ndarray

    def nearest(self, places: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The views of the first epoch that are most alike by the teacher's vectors.

        Args:
            places: Places of P of the samples.
            k: How many others; all where there are fewer.

        Returns:
            Their places, the nearest first, int64 [P, k], and their cosines, float32 [P, k].
        """
        cosines = self.directions[places] @ self.directions.T  # [P, N]
        cosines[np.arange(len(places)), places] = -np.inf
        found = np.argsort(-cosines, axis=1, kind='stable')[:, :min(k, len(self.rows) - 1)]
        return found, np.take_along_axis(cosines, found, axis=1)

    @property
    def num_dimensions(self) -> float:
        """Directions that the variance would fill evenly: the square of its sum over the sum of its squares."""
        return float(self.variances.sum() ** 2 / max((self.variances ** 2).sum(), 1e-30))

    def summary(self) -> dict[str, Any]:
        """The figures as plain JSON values; None for those that are not known."""
        order = np.sort(self.variances)[::-1]
        return {
            'samples': len(self.rows), 'views': len(self.norms), 'epochs': self.epochs, 'vectors': self.num_cells,
            'norm': float(self.norms.mean()), 'norm_std': float(self.norms.std()),
            'variance': float(self.variances.sum()), 'largest_share': float(order[0] / max(order.sum(), 1e-30)),
            'dimensions': self.num_dimensions, 'agreement': self.agreement, 'likeness': self.likeness}

    def figures(self) -> dict[str, str]:
        """The statistics in words."""
        values = self.summary()
        figures = {
            'read': f'{len(self.epochs)} epochs, {len(self.rows):,} samples, {len(self.norms):,} views',
            'norms': f'{values["norm"]:.4g} in the mean, standard deviation {values["norm_std"]:.3g}',
            'variance': f'{values["variance"]:.4g} in all, {percent(values["largest_share"])} of it in one number, as '
                        f'much as {values["dimensions"]:.0f} even ones of {len(self.variances):,}'}
        if self.likeness is not None:
            figures['likeness'] = f'a cosine of {self.likeness:.3f} between the views of two samples'
        if self.agreement is not None:
            figures['agreement'] = f'a cosine of {self.agreement:.3f} between two epochs of a sample'
        return figures


def feature_statistics(
        store: StoreReader,
        epochs: Sequence[int],
        max_samples: int = MAX_SAMPLES,
        max_epochs: int = MAX_EPOCHS,
        among: np.ndarray | None = None,
) -> FeatureStatistics | None:
    """The statistics of the same samples, evenly spaced, in epochs that are evenly spaced.

    Args:
        store: A store of features; what is not filled yet is left out.
        epochs: The epochs to choose from.
        max_samples: Samples to read, at most; never more than 2,000.
        max_epochs: Epochs to read, at most.
        among: Rows of the store that samples are taken from, sorted; all by default.

    Returns:
        The statistics, or None where no samples are there in all of these epochs.

    Raises:
        InputError: A shard or a record is damaged.
    """
    manifest, codec = store.manifest, store.codec
    filled = filled_shards(store, epochs)
    chosen = [list(filled)[place] for place in evenly(len(filled), max_epochs)]
    shards = set.intersection(*(set(filled[epoch].tolist()) for epoch in chosen)) if chosen else set()
    rows = np.concatenate([np.arange(manifest.shard_rows(shard)) + shard * manifest.shard_size
                           for shard in sorted(shards)]) if shards else np.arange(0)
    if among is not None:
        rows = np.intersect1d(rows, among)
    if not len(rows):
        return None
    rows = rows[evenly(len(rows), min(max_samples, MAX_SAMPLES))]
    norms, directions, total, squares = [], [], 0., 0.
    step = max(1, READ_NUMBERS // (codec.cells * codec.dim))
    for epoch in chosen:
        means = []
        for start in range(0, len(rows), step):
            part = rows[start:start + step]
            vectors = codec.decode(read_records(store, np.full(len(part), epoch), part)).vectors  # [b, cells, D]
            norms.append(vectors.norm(dim=2).mean(dim=1).numpy())
            means.append(normalize(vectors.mean(dim=1), dim=1).numpy())
            flat = vectors.flatten(0, 1).double().numpy()
            total, squares = total + flat.sum(axis=0), squares + (flat ** 2).sum(axis=0)
        directions.append(np.concatenate(means))
    num_vectors = len(chosen) * len(rows) * codec.cells
    first, directions = directions[0], np.stack(directions).astype(np.float64)  # [E, N, D], of length 1

    def mean_cosine(vectors: np.ndarray) -> float | None:
        """Of all pairs along the first axis of [n, m, D]: the square of a sum holds each pair twice."""
        n = len(vectors)
        if n < 2:
            return None
        pairs = (vectors.sum(axis=0) ** 2).sum(axis=1) - (vectors ** 2).sum(axis=(0, 2))
        return float(pairs.mean() / (n * (n - 1)))

    return FeatureStatistics(
        chosen, rows, codec.cells, np.concatenate(norms),
        np.maximum(squares / num_vectors - (total / num_vectors) ** 2, 0), mean_cosine(directions),
        mean_cosine(directions.transpose(1, 0, 2)), first)
