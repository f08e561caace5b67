"""Statistics of a store: confidence, accuracy and calibration of its teacher, and their agreement between epochs.

One pass reads the same samples in some of the epochs, so that what it takes is bounded for stores of any size. It goes
epoch after epoch, as a store on the Hub wants to be read. Probabilities are those that a student learns from: the mass
that is not listed is spread evenly over the other classes.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Any
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..data.dataset import read_records
from ..data.pairing import Pairing
from ..data.view_config import ViewConfig
from ..store.base import StoreReader
from ..targets.sparse import SparseTargets
from ..train.predictions import Predictions

__all__ = [
    'StoreStatistics', 'disagreement', 'evenly', 'filled_shards', 'label_probability', 'store_statistics',
]

MAX_SAMPLES = 100_000
MAX_EPOCHS = 10
READ_SAMPLES = 4096
READ_ENTRIES = 1 << 19
# What is held to compare the targets of a sample in all epochs, 100 MB; of these targets in all, and at a time, dense.
KEPT_ENTRIES = 1 << 23
COMPARED_ENTRIES = 1 << 28
DENSE_ENTRIES = 1 << 22
MASS_SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class StoreStatistics:
    """Statistics of E epochs of N samples; in every array [E, N] NaN, or -1, stands for a view that is not stored.

    Attributes:
        epochs: The epochs [E].
        rows: Rows of the samples in the store, int64 [N].
        labels: Their labels, int64 [N]; -1 where there is none.
        is_mixed: Whether views are mixed: each then has two labels, and its own partners in every epoch.
        top: The most probable class, int64 [E, N].
        confidence: Its probability [E, N].
        entropy: Entropy of the target in nats [E, N].
        label_prob: Probability of the label, of both labels where views are mixed, [E, N]; NaN without a label.
        right: 1 where the most probable class is the label, or one of the two, 0 where not, [E, N]; NaN without a
            label.
        mass_sizes: How many most probable classes [M] the mass is given of.
        mass: Mean mass that they cover in each epoch [E, M].
        compared: Which of the N samples are compared between epochs, int64 [P].
        disagreement: Of those, the mean KL divergence in nats from their mean target to that of an epoch [P]; NaN where
            a sample has fewer than two views.
    """
    epochs: list[int]
    rows: np.ndarray
    labels: np.ndarray
    is_mixed: bool
    top: np.ndarray
    confidence: np.ndarray
    entropy: np.ndarray
    label_prob: np.ndarray
    right: np.ndarray
    mass_sizes: list[int]
    mass: np.ndarray
    compared: np.ndarray
    disagreement: np.ndarray

    @property
    def num_views(self) -> np.ndarray:
        """Views that were read in each epoch [E]."""
        return (self.top >= 0).sum(axis=1)

    @property
    def has_labels(self) -> bool:
        return bool((self.labels >= 0).any())

    def by_epoch(self, name: str) -> np.ndarray:
        """Means of one of the arrays [E, N] in each epoch [E]; NaN where there is nothing to take the mean of."""
        return _mean(getattr(self, name), axis=1)

    def by_sample(self, name: str) -> np.ndarray:
        """Means of one of the arrays [E, N] over the epochs [N]; NaN where there is nothing to take the mean of."""
        return _mean(getattr(self, name), axis=0)

    def agreement(self) -> np.ndarray:
        """Share of samples with the same most probable class in two epochs, [E, E]; NaN where none is in both."""
        shares = np.full((len(self.epochs),) * 2, np.nan)
        for first, second in combinations(range(len(self.epochs)), 2):
            both = (self.top[first] >= 0) & (self.top[second] >= 0)
            if both.any():
                same = self.top[first, both] == self.top[second, both]
                shares[first, second] = shares[second, first] = same.mean()
        return shares

    def majority(self) -> tuple[np.ndarray, np.ndarray]:
        """What most of a sample's views say.

        Returns:
            The class that is most often the most probable one, int64 [N], the lowest of several; and the share of the
            epochs that say so [N], NaN where a sample has fewer than two views.
        """
        counts = np.stack([(self.top == classes).sum(axis=0) * (classes >= 0) for classes in self.top])  # [E, N]
        best = counts.max(axis=0)
        winner = np.where(counts == best, self.top, np.iinfo(np.int64).max).min(axis=0)
        views = (self.top >= 0).sum(axis=0)
        return winner, np.where(views > 1, best / np.maximum(views, 1), np.nan)

    @property
    def predictions(self) -> Predictions | None:
        """The teacher's on the views with a label; None without labels, and for mixed views, which have no one."""
        scored = np.isfinite(self.right)
        if self.is_mixed or not scored.any():
            return None
        labels = np.broadcast_to(self.labels, self.top.shape)[scored]
        with np.errstate(divide='ignore'):
            return Predictions(
                self.top[scored][:, None], self.confidence[scored][:, None], labels, np.log(self.label_prob[scored]))

    def summary(self) -> dict[str, Any]:
        """The figures as plain JSON values; None for those that are not known."""
        winner, share = self.majority()
        predictions = self.predictions
        scored = (self.labels >= 0) & (winner >= 0)
        by_epoch = {name: self.by_epoch(array) for name, array in (
            ('accuracy', 'right'), ('confidence', 'confidence'), ('label_probability', 'label_prob'),
            ('entropy', 'entropy'))}
        return {
            'samples': len(self.rows),
            'views': int(self.num_views.sum()),
            'compared_samples': len(self.compared),
            'accuracy': _plain(_mean(self.right)),
            'majority_accuracy': _plain(_mean((winner == self.labels)[scored])) if not self.is_mixed else None,
            'confidence': _plain(_mean(self.confidence)),
            'label_probability': _plain(_mean(self.label_prob)),
            'entropy': _plain(_mean(self.entropy)),
            'mass': {str(size): _plain(_mean(column)) for size, column in zip(self.mass_sizes, self.mass.T)},
            'agreement': _plain(_mean(self.agreement())),
            'majority': _plain(_mean(share)),
            'unanimous': _plain(_mean((share == 1)[np.isfinite(share)])),
            'disagreement': _plain(_mean(self.disagreement)),
            'calibration_error': None if predictions is None else predictions.reliability().error,
            'epochs': [
                {'epoch': epoch, 'views': int(views),
                 **{name: _plain(values[place]) for name, values in by_epoch.items()},
                 'mass': {str(size): _plain(share) for size, share in zip(self.mass_sizes, self.mass[place])}}
                for place, (epoch, views) in enumerate(zip(self.epochs, self.num_views))],
        }


def filled_shards(store: StoreReader, epochs: Sequence[int]) -> dict[int, np.ndarray]:
    """The shards, int64 [n] in ascending order, that are filled of each of these epochs that has any."""
    missing: dict[int, list[int]] = {epoch: [] for epoch in epochs}
    for epoch, shard in store.missing(epochs):
        missing[epoch].append(shard)
    filled = {epoch: np.setdiff1d(np.arange(store.manifest.num_shards), shards) for epoch, shards in missing.items()}
    return {epoch: shards for epoch, shards in filled.items() if len(shards)}


def store_statistics(
        store: StoreReader,
        labels: np.ndarray | None = None,
        rows: np.ndarray | None = None,
        epochs: Sequence[int] | None = None,
        max_samples: int = MAX_SAMPLES,
        max_epochs: int = MAX_EPOCHS,
        advance: Callable[[int, int], None] = lambda views, total: None,
) -> StoreStatistics | None:
    """The statistics of the same samples, evenly spaced, in epochs that are evenly spaced.

    Args:
        store: The store; what is not filled yet is left out.
        labels: Labels of all its rows, int64 [num_samples]; -1 where there is none.
        rows: The rows to choose samples from, int64 in ascending order; all by default.
        epochs: The epochs to choose from; all by default.
        max_samples: Samples to read, at most.
        max_epochs: Epochs to read, at most.
        advance: Is told of views that were read, and how many are read in all.

    Returns:
        The statistics, or None where no shard of these epochs and rows is filled.

    Raises:
        InputError: A shard or a record is damaged.
    """
    manifest = store.manifest
    filled = filled_shards(store, manifest.stored_epochs if epochs is None else epochs)
    if not filled:
        return None
    chosen = [list(filled)[place] for place in evenly(len(filled), max_epochs)]
    shards = np.unique(np.concatenate([filled[epoch] for epoch in chosen]))
    rows = _sample_rows(store, shards, rows, max_samples)
    if not len(rows):
        return None
    is_mixed = ViewConfig.from_dict(manifest.recipe).is_mixed
    pairing = Pairing(manifest.seed, manifest.num_samples) if is_mixed else None
    k = store.codec.k
    sizes = sorted({size for size in MASS_SIZES if size < k} | {k})
    shape = (len(chosen), len(rows))
    top = np.full(shape, -1)
    confidence, entropy, label_prob, right = (np.full(shape, np.nan, dtype=np.float32) for _ in range(4))
    mass = np.full((len(chosen), len(sizes)), np.nan)
    num_compared = min(KEPT_ENTRIES // k, COMPARED_ENTRIES // manifest.num_classes) // len(chosen)
    compared = evenly(len(rows), num_compared) if len(chosen) > 1 else np.arange(0)
    kept_ids = np.full((len(chosen), len(compared), k), -1, dtype=np.int32)
    kept_probs = np.zeros(kept_ids.shape, dtype=np.float32)
    kept_shares = np.full(kept_ids.shape[:2], np.nan, dtype=np.float32)

    columns_of = [np.flatnonzero(np.isin(rows // manifest.shard_size, filled[epoch])) for epoch in chosen]
    num_views = sum(map(len, columns_of))
    for place, (epoch, columns) in enumerate(zip(chosen, columns_of)):
        sums = np.zeros(len(sizes))
        for part in _parts(columns, max(1, min(READ_SAMPLES, READ_ENTRIES // k))):
            targets = store.codec.decode(read_records(store, np.full(len(part), epoch), rows[part]))
            probs, share = _probabilities(targets)
            ordered, order = probs.sort(dim=1, descending=True)
            top[place, part] = targets.ids.gather(1, order[:, :1])[:, 0]
            confidence[place, part] = ordered[:, 0]
            entr = torch.special.entr
            entropy[place, part] = entr(probs).sum(dim=1) + (manifest.num_classes - k) * entr(share)
            sums += ordered.cumsum(dim=1)[:, [size - 1 for size in sizes]].sum(dim=0).numpy()
            if labels is not None:
                names = [labels[rows[part]]]
                if pairing is not None:
                    members = pairing.members(epoch, pairing.pairs_of(epoch, rows[part]))
                    names.append(labels[members.sum(axis=1) - rows[part]])
                label_prob[place, part] = _label_probability(targets, names)
                right[place, part] = np.where(
                    np.min(names, axis=0) >= 0, np.any(names == top[place, part], axis=0), np.nan)
            held, slots = np.isin(part, compared), np.searchsorted(compared, part)
            slots = slots[held]
            kept_ids[place, slots] = targets.ids[held]
            kept_probs[place, slots] = probs[held]
            kept_shares[place, slots] = share[held]
            advance(len(part), num_views)
        mass[place] = sums / max(len(columns), 1) if len(columns) else np.nan
    return StoreStatistics(
        chosen, rows, np.full(len(rows), -1) if labels is None else labels[rows], is_mixed, top, confidence, entropy,
        label_prob, right, sizes, mass, compared,
        disagreement(kept_ids, kept_probs, kept_shares, manifest.num_classes))


def label_probability(targets: SparseTargets, labels: np.ndarray) -> np.ndarray:
    """What targets give to the class of the label, float64 [B], for labels, int64 [B]; NaN for label -1."""
    probs, share = _probabilities(targets)
    match = targets.ids == torch.from_numpy(labels)[:, None]
    label_probs = torch.where(match.any(dim=1), (probs * match).sum(dim=1), share)
    return np.where(labels >= 0, label_probs.numpy(), np.nan)


def disagreement(ids: np.ndarray, probs: np.ndarray, shares: np.ndarray, num_classes: int) -> np.ndarray:
    """Mean KL divergence, in nats, from the mean target of each sample to its targets.

    It is the entropy of the mean less the mean entropy, the Jensen-Shannon divergence of E targets.

    Args:
        ids: Class ids that E targets list of each of P samples, [E, P, K]; -1 where there is no target.
        probs: Their probabilities [E, P, K]; 0 where there is no target.
        shares: What each class has that is not listed [E, P]; NaN where there is no target.
        num_classes: C.

    Returns:
        The divergence [P]; NaN where there are fewer than two targets.
    """
    num_targets, num_samples, _ = ids.shape
    divergence = np.full(num_samples, np.nan)
    for part in _parts(np.arange(num_samples), max(1, DENSE_ENTRIES // max(1, num_targets * num_classes))):
        count = torch.from_numpy(np.isfinite(shares[:, part]).sum(axis=0))
        share = torch.from_numpy(np.nan_to_num(shares[:, part]))[..., None].expand(-1, -1, num_classes)
        dense = share.scatter(2, torch.from_numpy(ids[:, part]).long().clamp(min=0), torch.from_numpy(probs[:, part]))
        mean = dense.sum(dim=0) / count.clamp(min=1)[:, None]  # [p, C]
        entropies = [torch.special.entr(part).sum(dim=-1, dtype=torch.float64) for part in (mean, dense)]
        gap = (entropies[0] - entropies[1].sum(dim=0) / count.clamp(min=1)).clamp(min=0)
        divergence[part] = torch.where(count > 1, gap, torch.nan).numpy()
    return divergence


def _probabilities(targets: SparseTargets) -> tuple[torch.Tensor, torch.Tensor]:
    """Of listed classes, float64 [B, k], and of each other class [B]."""
    probs = targets.log_probs.double().exp()
    if targets.log_rest is None:
        return probs, torch.zeros(len(targets), dtype=torch.float64)
    return probs, targets.log_rest.double().exp() / (targets.num_classes - targets.k)


def _label_probability(targets: SparseTargets, names: list[np.ndarray]) -> np.ndarray:
    """Probability of one label, or of two that may be the same, [B]."""
    first, *others = names
    return label_probability(targets, first) + sum(
        np.where(other == first, 0, label_probability(targets, other)) for other in others)


def _sample_rows(store: StoreReader, shards: np.ndarray, rows: np.ndarray | None, count: int) -> np.ndarray:
    """Up to so many rows, evenly spaced, int64 in ascending order, of those that these shards hold."""
    size = store.manifest.shard_size
    if rows is not None:
        rows = rows[np.isin(rows // size, shards)]
        return rows[evenly(len(rows), count)]
    ends = np.cumsum([store.manifest.shard_rows(shard) for shard in shards.tolist()])
    places = evenly(int(ends[-1]), count)
    which = np.searchsorted(ends, places, side='right')
    return shards[which] * size + places - np.concatenate([[0], ends])[which]


def evenly(total: int, count: int) -> np.ndarray:
    """Up to so many numbers, int64 in ascending order and at least one, evenly spaced from 0 to below the total."""
    return np.linspace(0, total - 1, max(1, min(count, total))).astype(np.int64) if total else np.arange(0)


def _parts(numbers: np.ndarray, size: int) -> list[np.ndarray]:
    return [numbers[start:start + size] for start in range(0, len(numbers), size)]


def _mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The mean of what is no NaN, in float64; NaN where all is."""
    finite = np.isfinite(values)
    with np.errstate(invalid='ignore'):
        return np.where(finite, values, 0).sum(axis=axis, dtype=np.float64) / finite.sum(axis=axis)


def _plain(value: np.ndarray) -> float | None:
    return float(value) if np.isfinite(value) else None
