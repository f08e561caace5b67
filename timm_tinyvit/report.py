"""Pictures of a run."""

import csv
import io
from pathlib import Path

from .aside import write_aside

__all__ = ['plot_metrics']


def plot_metrics(metrics: Path, picture: Path) -> bool:
    """Plot the losses and the accuracy of a run's metrics.csv by epoch.

    Returns:
        Whether there is a picture: without matplotlib (the extra `plots`) there is none.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    with open(metrics, newline='') as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row['epoch']) + 1 for row in rows]
    figure = Figure(figsize=(9, 3.4), layout='constrained')
    FigureCanvasAgg(figure)
    losses, accuracy = figure.subplots(1, 2)
    for key, label in (('loss', 'loss'), ('label_loss', 'label loss'), ('distill_loss', 'distillation loss')):
        values = [float(row[key]) for row in rows]
        if any(values) and (key == 'loss' or values != [float(row['loss']) for row in rows]):
            losses.plot(epochs, values, label=label)
    losses.set(xlabel='epoch', ylabel='training loss')
    losses.legend()
    evaluated = [(int(row['epoch']) + 1, float(row['eval_top1'])) for row in rows if row.get('eval_top1')]
    accuracy.plot(*zip(*evaluated), marker='o', markersize=3) if evaluated else None
    accuracy.set(xlabel='epoch', ylabel='top-1 accuracy (%)')
    for axes in (losses, accuracy):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format='png')
    write_aside(picture, buffer.getbuffer())
    return True
