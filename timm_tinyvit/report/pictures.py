"""Views of a store as pictures: which samples tell most, what was seen of them, and what the teacher predicted.

Views are replayed from the images of the data set, as in training. They are read epoch after epoch, as a store on the
Hub wants it. The same pictures stand on a page and, drawn by Pillow, in a PNG.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..base.escaping import MAX_NAME, printable, shown, without_user
from ..base.text import percent, short_percent
from ..data.dataset import decode_source
from ..data.sources import column, labels_of, sample_files
from ..train.predictions import round_robin
from .features import FeatureStatistics
from .labels import LabelledViews
from .page import Bar, Picture
from .statistics import StoreStatistics, label_probability

__all__ = [
    'ShownSample', 'choose_samples', 'draw_pictures', 'neighbour_rows', 'probability_bars', 'show_samples',
]

NUM_CHOSEN = 4
NUM_VARIED = 8
NUM_EPOCHS = 8
NUM_BARS = 3
NUM_NEAREST = 5
# Of a drawn picture, in pixels; the first that keeps within the bytes is taken.
SIZES = (144, 112, 80, 56)
GAP, LINE, MIN_WIDTH = 10, 18, 116
COLORS = {'label': '#bfe5c3', 'rest': '#d9dde1', '': '#c9def5'}
INK, PAPER, BOX = '#1d2126', '#ffffff', '#f4f5f7'


@dataclass(frozen=True)
class ShownSample:
    """A sample of the data set with some of its views.

    Attributes:
        name: Its position with its file, if any, or its key.
        label: Name of its class, empty without a label.
        note: What it was chosen for.
        pictures: The whole image before any augmentation, and some of its views with what the teacher predicted.
    """
    name: str
    label: str
    note: str
    pictures: list[Picture] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Name, label and note in one line."""
        return ', '.join(filter(None, (self.name, self.label, self.note)))


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
    return {
        'varied': _varied(classes, NUM_VARIED), 'easiest': round_robin(order, classes)[:NUM_CHOSEN],
        'hardest': order[::-1][:NUM_CHOSEN], 'disputed': statistics.compared[disputed[:NUM_CHOSEN]]}


def _varied(classes: np.ndarray, count: int) -> np.ndarray:
    """Places of random samples, of different classes where possible."""
    return round_robin(np.random.Generator(np.random.PCG64(0)).permutation(len(classes)), classes)[:count]


def neighbour_rows(data: LabelledViews, statistics: FeatureStatistics, count: int) -> list[list[Picture]]:
    """Views of the first epoch of the statistics, each before the five others that its teacher's vector is nearest to.

    Args:
        data: The data set of the store.
        statistics: Of its features, with the rows of this data set.
        count: Views at most, of different classes where they are known.

    Raises:
        InputError: An image is damaged or missing.
    """
    places = _varied(data.labels[statistics.rows], count)
    nearest, cosines = statistics.nearest(places, NUM_NEAREST)
    order = np.argsort(data.rows)
    wanted = np.concatenate([places[:, None], nearest], axis=1)  # [P, 1 + k]
    positions = order[np.searchsorted(data.rows, statistics.rows[wanted], sorter=order)]
    epoch, names = statistics.epochs[0], data.label_names
    views = iter(data.views.__getitems__([(epoch, position) for position in positions.ravel().tolist()]))
    rows = []
    for row, near in zip(positions.tolist(), cosines.tolist()):
        rows.append([])
        for position, cosine in zip(row, [None, *near]):
            view = next(views)
            label = names[view['label']] if names and view['label'] >= 0 else f'sample {position}'
            rows[-1].append(Picture(
                view['view'], label if cosine is None else f'{cosine:.3f} {label}',
                alt=f'{label}, view of epoch {epoch}' + ('' if cosine is None else f', a cosine of {cosine:.3f}')))
    return rows


def show_samples(
        data: LabelledViews,
        statistics: StoreStatistics,
        chosen: Mapping[str, np.ndarray],
        names: Sequence[str],
        max_epochs: int = NUM_EPOCHS,
) -> dict[str, list[ShownSample]]:
    """Replay views of chosen samples, and read what the teacher predicted.

    Args:
        data: The data set of the store.
        statistics: Of the store.
        chosen: Places of samples among those of the statistics, by kind.
        names: Names of the classes of the teacher.
        max_epochs: Views of each sample at most, of the first of the epochs.

    Raises:
        InputError: An image or a record is damaged or missing.
    """
    shown = {kind: [] for kind in chosen}
    waiting = []
    order = np.argsort(data.rows)
    for kind, places in chosen.items():
        positions = order[np.searchsorted(data.rows, statistics.rows[places], sorter=order)]
        for place, position in zip(places.tolist(), positions.tolist()):
            sample = _sample(data, position, _note(kind, statistics, place))
            shown[kind].append(sample)
            waiting.append((place, position, sample))
    for number, epoch in enumerate(statistics.epochs):
        wanted = [(position, sample) for place, position, sample in waiting
                  if statistics.top[number, place] >= 0 and len(sample.pictures) <= max_epochs]
        if wanted:
            _add_views(data, epoch, wanted, names, statistics.has_labels)
    return shown


def draw_pictures(rows: Sequence[Sequence[Picture]], max_bytes: int | None = None) -> bytes:
    """Rows of pictures as one PNG, each with its caption and its bars beneath it.

    Args:
        rows: They.
        max_bytes: What it may take, but for pictures that are the smallest already; it has 256 colours then.
    """
    for size in SIZES:
        page = _draw(rows, size)
        if max_bytes is not None:
            # 256 colours: a third of the bytes.
            page = page.quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
        buffer = io.BytesIO()
        page.save(buffer, 'PNG', optimize=True)
        if max_bytes is None or buffer.tell() <= max_bytes:
            break
    return buffer.getvalue()


def _draw(rows: Sequence[Sequence[Picture]], size: int) -> Image.Image:
    font = ImageFont.load_default(12)
    width = max(size, MIN_WIDTH)
    heights = [size + LINE * (1 + max(len(picture.bars) for picture in row)) + GAP for row in rows]
    page = Image.new('RGB', (GAP + max(map(len, rows)) * (width + GAP), GAP + sum(heights)), PAPER)
    pen = ImageDraw.Draw(page)

    def write(text: str, left: float, top: int, width: float) -> None:
        text = printable(without_user(text), MAX_NAME)
        while text and font.getlength(text) > width:
            text = text.rstrip('…')[:-1] + '…' if len(text) > 1 else ''
        pen.text((left, top + LINE // 2), text, INK, font, 'lm')

    for row, start in zip(rows, np.cumsum([GAP, *heights]).tolist()):
        for place, picture in enumerate(row):
            left, top = GAP + place * (width + GAP), start
            image = picture.image
            scale = size / max(image.size)
            # Pixels of small pictures stay visible.
            resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            image = image.resize([max(1, round(scale * side)) for side in image.size], resample)
            page.paste(image, (left, top))
            pen.rectangle((left, top, left + image.width - 1, top + image.height - 1), outline=COLORS['rest'])
            top += size
            write(picture.caption, left, top, width)
            for bar in picture.bars:
                top += LINE
                pen.rectangle((left, top + 1, left + width - 1, top + LINE - 2), BOX)
                pen.rectangle((left, top + 1, left + round(bar.share * (width - 1)), top + LINE - 2), COLORS[bar.kind])
                share = short_percent(bar.share)
                end = left + width - 3 - font.getlength(share)
                write(share, end, top, width)
                write(bar.name, left + 3, top, end - left - 7)
    return page


def probability_bars(
        top: Iterable[tuple[int, float]],
        labels: Mapping[int, float],
        names: Sequence[str],
) -> list[Bar]:
    """The most probable classes, the labels, and what is left.

    Args:
        top: Classes and their probabilities, the most probable first.
        labels: The labels and their probabilities.
        names: Names of the classes.
    """
    shares = dict(list(top)[:NUM_BARS])
    shares |= {label: share for label, share in labels.items() if label not in shares}
    bars = [Bar(names[number], share, 'label' if number in labels else '') for number, share in shares.items()]
    rest = 1 - sum(shares.values())
    # What is left of shares that add up to 1 is their rounding.
    return [*bars, Bar('all others', rest if rest > 1e-6 else 0., 'rest')]


def _sample(data: LabelledViews, position: int, note: str) -> ShownSample:
    """A sample with its image alone."""
    views = data.views
    table = views.dataset[[position]]
    image = decode_source(column(table, views.image_column)[0].as_py(), position)
    image.thumbnail((max(views.replay.config.input_size),) * 2)
    label, names = int(labels_of(table, views.label_column)[0]), data.label_names
    label = names[label] if names and label >= 0 else ''
    file, = sample_files(views.dataset, views.image_column, [position])
    name = f'sample {position}' + (f' ({shown(file)})' if file else '')
    if views.key_column:
        name = f'{views.key_column} {column(table, views.key_column)[0].as_py()}'
    whole = Picture(np.asarray(image).transpose(2, 0, 1), label or 'the image', alt=f'{name}, the whole image')
    return ShownSample(name, label, note, [whole])


def _add_views(
        data: LabelledViews,
        epoch: int,
        wanted: Sequence[tuple[int, ShownSample]],
        names: Sequence[str],
        has_labels: bool,
) -> None:
    """Add the views of an epoch to samples, which stand beside their positions."""
    views = data.views.__getitems__([(epoch, position) for position, _ in wanted])
    targets = data.views.store.codec.decode(torch.stack([view['record'] for view in views]))
    probs, order = targets.log_probs.exp().sort(dim=1, descending=True)
    ids = targets.ids.gather(1, order)
    for row, (view, (_, sample)) in enumerate(zip(views, wanted)):
        labels = [view[name] for name in ('label', 'label2') if view.get(name, -1) >= 0]
        caption, share = f'epoch {epoch}', round(100 * view.get('lam', 1.))
        if share < 100 and len(labels) == 2 and data.label_names:
            first, second = (data.label_names[label] for label in labels)
            caption += f': {share}% {first}, {100 - share}% {second}'
        shares = {
            label: float(label_probability(targets, np.full(len(targets), label))[row])
            for label in sorted(set(labels)) if has_labels}
        bars = probability_bars(zip(ids[row].tolist(), probs[row].tolist()), shares, names)
        sample.pictures.append(Picture(view['view'], caption, bars, f'{sample.name}, view of epoch {epoch}'))


def _note(kind: str, statistics: StoreStatistics, place: int) -> str:
    """What a sample was chosen for."""
    if kind == 'disputed':
        return f'{statistics.disagreement[np.searchsorted(statistics.compared, place)]:.2f} nats'
    if kind not in ('easiest', 'hardest'):
        return ''
    if statistics.has_labels:
        labels = 'both labels' if statistics.is_mixed else 'the label'
        return f'{percent(statistics.by_sample("label_prob")[place], 1)} for {labels}'
    return f'entropy {statistics.by_sample("entropy")[place]:.3f} nats'
