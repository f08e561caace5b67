"""What a run writes after each epoch: `metrics.csv`."""

import csv
import io
import math
from pathlib import Path

from ..base.errors import InputError
from ..base.files import read_bounded, write_atomic
from ..base.types import FINITE, Number

__all__ = ['METRICS', 'accuracy_of', 'epoch_line', 'rank_of', 'read_metrics', 'suffixed', 'write_metrics']

METRICS = 'metrics.csv'
MAX_BYTES = 1 << 26
EPOCH, PERCENT, POSITIVE = Number(0, 1e6), Number(0, 100.01), Number(0, 1e15)
VALUES = {
    'data_wait': Number(0, 1.01), 'seconds': POSITIVE, 'images_per_second': POSITIVE,
    **{f'eval_{name}{ending}': PERCENT for name in ('top1', 'top5') for ending in ('', '_ema')}}


def suffixed(name: str, weights: str) -> str:
    """The name of a column or folder that is there for each set of weights: of the averaged ones it ends in `_ema`."""
    return name if weights == 'student' else f'{name}_{weights}'


def accuracy_of(row: dict[str, float], weights: str) -> float:
    """Accuracy in percent by which weights are chosen: top-1, or of the nearest neighbours; -1 where there is none."""
    return row.get(suffixed('eval_top1', weights), row.get(suffixed('eval_knn', weights), -1.))


def rank_of(row: dict[str, float], weights: str) -> tuple[float, float]:
    """What is largest of the best weights: their accuracy, and of equal ones the validation loss, negated."""
    loss = row.get(suffixed('eval_loss', weights), 0.)
    return accuracy_of(row, weights), -loss if math.isfinite(loss) else -math.inf


def write_metrics(run: Path, history: list[dict[str, float]]) -> None:
    """Write the metrics of all epochs so far.

    Raises:
        InputError: The disk is full, or may not be written.
    """
    columns = list({name: None for row in history for name in row})
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(history)
    write_atomic(run / METRICS, text.getvalue().encode())


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The metrics of the epochs of a run, each with what it has: an epoch that was not evaluated has no accuracy.

    Raises:
        InputError: There is no `metrics.csv`, or it is not readable.
    """
    file = run / METRICS
    try:
        lines = io.StringIO(read_bounded(file, MAX_BYTES).decode('utf-8-sig'), newline='')
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]
    except OSError:
        raise InputError(f'{run} has no {METRICS}; name the folder of a run of timm-tinyvit train that has finished an '
                         f'epoch')
    except (TypeError, ValueError, csv.Error):
        rows = []
    epochs = [row.get('epoch') for row in rows]
    if not rows or not all(map(EPOCH.holds, epochs)) or epochs != sorted(set(epochs)) or not all(
            VALUES.get(name, FINITE).holds(value) for row in rows for name, value in row.items()
            if math.isfinite(value)):
        raise InputError(f'{file} is not readable as the metrics of a run; start the run again, which writes it anew')
    # What is no number, as the loss of weights that have gone, is as if it were not there.
    return [{name: value for name, value in row.items() if math.isfinite(value)} for row in rows]


def epoch_line(row: dict[str, float], best: float, num_epochs: int) -> str:
    """What is said of an epoch."""
    line = f'epoch {row["epoch"] + 1}/{num_epochs}: loss {row["loss"]:.3f}'
    if 'eval_top1' in row:
        line += f', top-1 {row["eval_top1"]:.2f}% (best {best:.2f}%)'
    line += f', nearest neighbours {row["eval_knn"]:.2f}%' if 'eval_knn' in row else ''
    if 'eval_top1_ema' in row:
        line += f', averaged {row["eval_top1_ema"]:.2f}%'
    return f'{line}, {row["images_per_second"]:.0f} images/s, {100 * row["data_wait"]:.0f}% waiting for data'
