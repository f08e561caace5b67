"""Views of a store as pictures: which samples tell most, what was seen of them, and what the teacher said.

Views are replayed from the images of the data set, as in training. They are read epoch after epoch, as a store on the
Hub wants it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from timm.data import ImageNetInfo, infer_imagenet_subset

from ..base.text import percent
from ..data.dataset import SparseLogitDataset, decode_source
from ..data.sources import class_names, column, labels_of
from ..targets.sparse import SparseTargets
from ..train.predictions import in_turn
from .page import Bar, Picture
from .statistics import StoreStatistics, label_probability

__all__ = ['ShownSample', 'choose_samples', 'draw_gallery', 'name_classes', 'pictures_of', 'show_samples']

NUM_CHOSEN = 4
NUM_VARIED = 8
NUM_EPOCHS = 8
NUM_BARS = 3
CELL = 120
GAP = 8
LINE = 18
GREEN, ORANGE, BLUE, INK = '#bfe5c3', '#f8d7b0', '#c9def5', '#1d2126'


@dataclass(frozen=True)
class ShownView:
    """A view, and what the teacher said of it.

    Attributes:
        epoch: Its epoch.
        view: uint8 [3, H, W].
        bars: The most probable classes, the label, and all others.
        mixture: What was mixed, where it was.
    """
    epoch: int
    view: torch.Tensor
    bars: list[Bar]
    mixture: str = ''


@dataclass(frozen=True)
class ShownSample:
    """A sample of the data set with some of its views.

    Attributes:
        name: Its position, or its key.
        label: Name of its class, empty without a label.
        note: What it was chosen for.
        image: The whole image before any augmentation, uint8 [3, h, w].
        views: Some of its views.
    """
    name: str
    label: str
    note: str
    image: np.ndarray
    views: list[ShownView] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Name, label and note in one line."""
        return ', '.join(filter(None, (self.name, self.label, self.note)))


def name_classes(data: SparseLogitDataset | None, num_classes: int) -> list[str]:
    """Names of a teacher's classes: those of the labels where there are as many, or of the ImageNet of that size."""
    names = class_names(data.dataset, data.label_key, num_classes) if data is not None and data.label_key else None
    if names:
        return names
    subset = infer_imagenet_subset({'num_classes': num_classes})
    if subset is None:
        return [f'class {number}' for number in range(num_classes)]
    # Of the words for a class, the first.
    return [name.split(',')[0] for name in ImageNetInfo(subset).label_descriptions()]


def choose_samples(statistics: StoreStatistics) -> dict[str, np.ndarray]:
    """Which samples tell most about a store, as places among those of the statistics.

    Returns:
        `varied`: of different classes; `easiest`, of different classes too, and `hardest`: by the mean probability of
        the label, or of both labels where views are mixed, or without labels by the mean entropy of the targets;
        `disputed`: by the disagreement between epochs, empty where there is one epoch, and where views are mixed: it is
        the partner that changes there.
    """
    hardness = -statistics.by_sample('label_prob') if statistics.has_labels else statistics.by_sample('entropy')
    order = np.argsort(hardness, kind='stable')
    order = order[np.isfinite(hardness[order])]
    disputed = np.argsort(-statistics.disagreement, kind='stable')
    disputed = disputed[np.isfinite(statistics.disagreement[disputed]) & (not statistics.is_mixed)]
    classes = statistics.labels if statistics.has_labels else statistics.majority()[0]
    mixed = np.random.Generator(np.random.PCG64(0)).permutation(len(classes))
    return {
        'varied': in_turn(mixed, classes)[:NUM_VARIED], 'easiest': in_turn(order, classes)[:NUM_CHOSEN],
        'hardest': order[::-1][:NUM_CHOSEN], 'disputed': statistics.compared[disputed[:NUM_CHOSEN]]}


def show_samples(
        data: SparseLogitDataset,
        statistics: StoreStatistics,
        chosen: Mapping[str, np.ndarray],
        rows: np.ndarray,
        names: Sequence[str],
        max_epochs: int = NUM_EPOCHS,
) -> dict[str, list[ShownSample]]:
    """Replay views of chosen samples, and read what the teacher said of them.

    Args:
        data: The data set with its store.
        statistics: What was found in the store.
        chosen: Places of samples among those of the statistics, by kind.
        rows: Row in the store of each sample of the data set, int64 [len(data)].
        names: Names of the classes.
        max_epochs: Views of each sample at most, of the first of the epochs.

    Raises:
        InputError: An image or a record is damaged or missing.
    """
    shown = {kind: [] for kind in chosen}
    waiting = []
    order = np.argsort(rows)
    for kind, places in chosen.items():
        positions = order[np.searchsorted(rows, statistics.rows[places], sorter=order)]
        for place, position in zip(places.tolist(), positions.tolist()):
            sample = _sample(data, position, names, statistics.has_labels, _note(kind, statistics, place))
            shown[kind].append(sample)
            waiting.append((place, position, sample))
    for number, epoch in enumerate(statistics.epochs):
        wanted = [(position, sample) for place, position, sample in waiting
                  if statistics.top[number, place] >= 0 and len(sample.views) < max_epochs]
        if wanted:
            _add_views(data, epoch, wanted, names, statistics.has_labels)
    return shown


def pictures_of(sample: ShownSample) -> list[Picture]:
    """The image and the views of a sample for a page."""
    views = [
        Picture(
            view.view, f'epoch {view.epoch}' + (f': {view.mixture}' if view.mixture else ''), view.bars,
            f'{sample.name}, view of epoch {view.epoch}') for view in sample.views]
    return [Picture(sample.image, sample.label or 'the image', alt=f'{sample.name}, the whole image'), *views]


def draw_gallery(samples: Sequence[ShownSample]) -> Image.Image:
    """One picture of all: a row for each sample, its image first and then its views, with what the teacher said.

    The line beneath a view is filled as far as its class is probable: green for that of the label, orange for another.
    """
    epochs = sorted({view.epoch for sample in samples for view in sample.views})
    font = ImageFont.load_default(13)
    width = GAP + (1 + len(epochs)) * (CELL + GAP)
    height = LINE + GAP + len(samples) * (CELL + LINE + GAP)
    canvas = Image.new('RGB', (width, height), 'white')
    pen = ImageDraw.Draw(canvas)

    def write(text: str, left: int, top: int, center: bool = True) -> None:
        while text and pen.textlength(text, font) > CELL - 6:
            text = text.rstrip('…')[:-1] + '…' if len(text) > 1 else ''
        pen.text((left + CELL // 2 if center else left + 3, top + LINE // 2), text, INK, font, 'mm' if center else 'lm')

    for place, title in enumerate(['image', *(f'epoch {epoch}' for epoch in epochs)]):
        write(title, GAP + place * (CELL + GAP), GAP // 2)
    for row, sample in enumerate(samples):
        top = LINE + GAP + row * (CELL + LINE + GAP)
        _paste(canvas, sample.image, GAP, top)
        write(sample.label, GAP, top + CELL)
        for view in sample.views:
            left = GAP + (1 + epochs.index(view.epoch)) * (CELL + GAP)
            _paste(canvas, view.view.numpy(), left, top)
            best = max((bar for bar in view.bars if bar.kind != 'rest'), key=lambda bar: bar.share)
            color = GREEN if best.kind == 'label' else ORANGE if sample.label else BLUE
            box = (left, top + CELL + 2, left + CELL - 1, top + CELL + LINE - 1)
            pen.rectangle(box, '#f4f5f7')
            pen.rectangle((*box[:2], left + round(best.share * (CELL - 1)), box[3]), color)
            write(f'{best.name} {percent(best.share, 0)}', left, top + CELL + 1, center=False)
    return canvas


def _sample(
        data: SparseLogitDataset, position: int, names: Sequence[str], has_labels: bool, note: str) -> ShownSample:
    """A sample without views."""
    table = data.dataset[[position]]
    image = decode_source(column(table, data.image_key)[0].as_py(), position)
    image.thumbnail((max(data.replay.recipe.input_size),) * 2)
    label = int(labels_of(table, data.label_key)[0])
    name = f'sample {position}'
    if data.key:
        name = f'{data.key} {column(table, data.key)[0].as_py()}'
    return ShownSample(
        name, names[label] if has_labels and label >= 0 else '', note, np.asarray(image).transpose(2, 0, 1))


def _add_views(
        data: SparseLogitDataset,
        epoch: int,
        wanted: Sequence[tuple[int, ShownSample]],
        names: Sequence[str],
        has_labels: bool,
) -> None:
    """Add the views of an epoch to samples, which stand beside their positions."""
    views = data.__getitems__([(epoch, position) for position, _ in wanted])
    targets = data.store.codec.decode(torch.stack([view['record'] for view in views]))
    for row, (view, (_, sample)) in enumerate(zip(views, wanted)):
        labels = [view[name] for name in ('label', 'label2') if has_labels and name in view]
        mixture = ''
        share = round(100 * view.get('lam', 1.))
        if share < 100 and len(labels) == 2 and min(labels) >= 0:
            mixture = f'{share}% {names[labels[0]]}, {100 - share}% {names[labels[1]]}'
        bars = _bars(targets, row, sorted({label for label in labels if label >= 0}), names)
        sample.views.append(ShownView(epoch, view['view'], bars, mixture))


def _note(kind: str, statistics: StoreStatistics, place: int) -> str:
    """What a sample was chosen for."""
    if kind == 'disputed':
        return f'{statistics.disagreement[np.searchsorted(statistics.compared, place)]:.2f} nats'
    if kind not in ('easiest', 'hardest'):
        return ''
    if statistics.has_labels:
        whose = 'both labels' if statistics.is_mixed else 'the label'
        return f'{percent(statistics.by_sample("label_prob")[place], 1)} for {whose}'
    return f'entropy {statistics.by_sample("entropy")[place]:.3f} nats'


def _bars(targets: SparseTargets, row: int, labels: list[int], names: Sequence[str]) -> list[Bar]:
    """The most probable classes of a row, the labels, and what is left."""
    found = sorted(zip(targets.log_probs[row].exp().tolist(), targets.ids[row].tolist()), reverse=True)
    shown = {number: share for share, number in found[:NUM_BARS]}
    for label in labels:
        shown.setdefault(label, float(label_probability(targets, np.full(len(targets), label))[row]))
    bars = [Bar(names[number], share, 'label' if number in labels else '') for number, share in shown.items()]
    rest = 1 - sum(bar.share for bar in bars)
    # What is left of shares that add up to 1 is their rounding.
    return [*bars, Bar('all others', rest if rest > 1e-6 else 0., 'rest')]


def _paste(canvas: Image.Image, pixels: np.ndarray, left: int, top: int) -> None:
    """Put pixels, uint8 [3, H, W], into the middle of a cell; small ones are enlarged with their pixels visible."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    scale = CELL / max(image.size)
    size = tuple(max(1, round(scale * side)) for side in image.size)
    image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    canvas.paste(image, (left + (CELL - size[0]) // 2, top + (CELL - size[1]) // 2))
