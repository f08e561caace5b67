"""How far a classifier's probabilities can be trusted (Guo et al., ICML 2017, arXiv 1706.04599); knows numpy alone."""

from dataclasses import dataclass

import numpy as np

__all__ = ['NUM_BINS', 'Reliability', 'calibration']

NUM_BINS = 15
Z = 1.96


@dataclass(frozen=True)
class Reliability:
    """How often a classifier is right, by the probability that it gives to its first choice.

    Attributes:
        count: Views in each of B bins of that probability, of equal width from 0 to 1, [B].
        confidence: Mean probability in each [B]; NaN where it is empty.
        accuracy: Share of them that are right [B]; NaN where it is empty.
        error: Expected calibration error: the mean distance of the two, weighted by the views.
    """
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float

    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the 95% interval of each accuracy, [B] and [B]; NaN where a bin is empty (Wilson)."""
        with np.errstate(divide='ignore', invalid='ignore'):
            weight = Z ** 2 / self.count
            center = (self.accuracy + weight / 2) / (1 + weight)
            half = Z / (1 + weight) * np.sqrt(
                self.accuracy * (1 - self.accuracy) / self.count + weight / (4 * self.count))
        return center - half, center + half


def calibration(confidence: np.ndarray, right: np.ndarray, num_bins: int = NUM_BINS) -> Reliability:
    """Compare how sure a classifier is with how often it is right.

    Args:
        confidence: Probability of its first choice for each of N views, 0 to 1, [N].
        right: Whether that is the label, [N].
        num_bins: Bins of equal width; what lies on a border belongs to the bin below it.
    """
    confidence = confidence.astype(np.float64)
    bins = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid='ignore'):
        mean, accuracy = (np.bincount(bins, values, num_bins) / count for values in (confidence, right))
    gaps = np.nan_to_num(np.abs(mean - accuracy))
    return Reliability(count, mean, accuracy, float((gaps * count).sum() / max(1, len(confidence))))
