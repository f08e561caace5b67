"""One HTML page that holds all it shows: text, tables, plots and pictures.

No script, nothing from a network, no second file: the page can be mailed, printed and kept. It is light or dark as the
reader's system is, and fits a phone. What it looks like stands in `page.html.j2`, which escapes all text and leaves out
what names the user (`escaping.for_page`), so that names from a data set may hold any character.
"""

import base64
import functools
import io
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from ..base.errors import InputError
from ..base.escaping import for_page, printable, without_user
from ..base.files import write_atomic
from ..base.text import short_percent
from ..version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['Bar', 'Page', 'Picture', 'check_output']

# Above, pixels are fewer bytes than lines, or than lossless pixels.
MAX_SVG = 200_000
MAX_PNG = 20_000


@dataclass(frozen=True)
class Bar:
    """A probability beneath a picture.

    Attributes:
        name: What has it.
        share: The probability, 0 to 1.
        kind: `label` for the class of the label, `rest` for all other classes together, empty otherwise.
    """
    name: str
    share: float
    kind: str = ''


@dataclass(frozen=True)
class Picture:
    """A picture among others.

    Attributes:
        view: Its pixels, uint8 [3, H, W], an array or a tensor in main memory.
        caption: A line beneath it.
        bars: Probabilities beneath that.
        alt: What to say in place of the picture; the caption by default.
    """
    view: Any
    caption: str = ''
    bars: Sequence[Bar] = ()
    alt: str = ''

    @property
    def image(self) -> Image.Image:
        """The same for Pillow."""
        return Image.fromarray(np.ascontiguousarray(np.asarray(self.view).transpose(1, 2, 0)))


class Page:
    """A page that is built from its top to its bottom.

    Args:
        title: Its title.
        subtitle: A line beneath it.
    """

    def __init__(self, title: str, subtitle: str = ''):
        self.title = title
        self.subtitle = subtitle
        self._parts: list[tuple[str, dict[str, Any]]] = []
        self._contents: list[str] = []

    def heading(self, text: str, level: int = 2) -> None:
        """A heading of level 2 or 3; those of level 2 stand in the list of contents too."""
        self._add('heading', text=text, level=level, number=len(self._contents))
        self._contents += [text] if level == 2 else []

    def paragraph(self, text: str) -> None:
        self._add('paragraph', text=text, is_warning=False)

    def warning(self, text: str) -> None:
        """A sentence that must not be overlooked."""
        self._add('paragraph', text=text, is_warning=True)

    def facts(self, facts: Mapping[str, Any]) -> None:
        """A table of names and what they are."""
        self._add('facts', facts=facts)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = '') -> None:
        """A table; a column of numbers, as such or as text such as `81.3%`, stands right-aligned.

        Args:
            header: Names of the columns [N].
            rows: Rows of as many cells.
            caption: A line above it.
        """
        numeric = [all(map(_is_number, column)) for column in zip(*rows, strict=True)] or [False] * len(header)
        self._add('table', header=header, rows=rows, caption=caption, numeric=numeric)

    def figure(self, figure: 'Figure', alt: str, caption: str = '') -> None:
        """A matplotlib figure; figures that follow each other stand side by side where there is room.

        Black, white and the background become those of the page, light or dark; other colours must suit both. A
        figure of very many marks becomes pixels on white.

        Args:
            figure: It; 72 units of its size are an inch, so that (6, 3.4) is 432 x 245 pixels of the page.
            alt: What it shows, for those who do not see it.
            caption: A line beneath it.
        """
        width, height = (round(72 * side) for side in figure.get_size_inches())
        with warnings.catch_warnings():
            # Class names may have letters that matplotlib's font lacks; the reader's fonts show them.
            warnings.filterwarnings('ignore', message='Glyph')
            svg, png = _svg(figure, len(self._parts)), ''
            if len(svg) > MAX_SVG:
                buffer = io.BytesIO()
                figure.savefig(buffer, format='png', dpi=160, facecolor='white')
                png = _data_uri(buffer.getvalue(), 'png')
        self._add('plot', svg=svg, png=png, width=width, height=height, alt=alt, caption=caption)

    def pictures(self, pictures: Sequence[Picture], caption: str = '', width: int = 120) -> None:
        """Pictures in rows of as many as there is room for.

        Args:
            pictures: They; the small ones are enlarged with their pixels visible.
            caption: A line above them.
            width: Width of each, in pixels of the page, at least.
        """
        pictures = [(picture, _encoded(picture.image)) for picture in pictures]
        self._add('pictures', pictures=pictures, caption=caption, width=width)

    def details(self, summary: str, text: str) -> None:
        """Text as it is, such as a file, behind a line that opens it."""
        self._add('details', summary=summary, text=text)

    def _add(self, kind: str, **part: Any) -> None:
        self._parts.append((kind, part))

    def html(self) -> str:
        """The page."""
        return _template().render(
            title=self.title, subtitle=self.subtitle, contents=self._contents, parts=self._parts,
            version=__version__)

    def write(self, path: str | Path) -> None:
        """Write the page; it is there whole or not at all.

        Raises:
            InputError: The disk is full, or may not be written.
        """
        write_atomic(Path(path), self.html().encode())


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('timm_tinyvit.report', ''), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, finalize=for_page)
    environment.filters.update(short_percent=short_percent, whole=_whole)
    return environment.get_template('page.html.j2')


def check_output(path: str | Path | None) -> None:
    """Refuse a file that cannot be written, before the work is done.

    Raises:
        InputError: It cannot.
    """
    if path is None:
        return
    folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f'{path} cannot be written: it is a folder, or in one that may not be written; name a file')


def _is_number(value: Any) -> bool:
    """Whether a cell is empty or begins as a number does."""
    return not isinstance(value, str) or bool(re.match(r'<?[-+−]?[\d.,]+( ?[%a-zA-Zµ/]{0,3}\d?)$|[-–]?$', value))


def _whole(text: str) -> Markup:
    """A text for the page that is not shortened, as a file."""
    return Markup.escape(printable(without_user(text), lines=True))


def _data_uri(content: bytes, kind: str) -> Markup:
    return Markup(f'data:image/{kind};base64,{base64.b64encode(content).decode()}')


def _encoded(image: Image.Image) -> str:
    """An image as a data URI: lossless, but for large photographs."""
    buffer = io.BytesIO()
    image.save(buffer, 'png', optimize=True)
    if buffer.tell() <= MAX_PNG:
        return _data_uri(buffer.getvalue(), 'png')
    buffer = io.BytesIO()
    image.save(buffer, 'jpeg', quality=90)
    return _data_uri(buffer.getvalue(), 'jpeg')


def _svg(figure: 'Figure', number: int) -> str:
    """What stands within the svg element of a figure, in the colours of the page."""
    import matplotlib

    buffer = io.StringIO()
    # Names within it must differ from those of the page's other figures; text stays text.
    with matplotlib.rc_context({'svg.hashsalt': f'figure {number}', 'svg.fonttype': 'none'}):
        figure.savefig(buffer, format='svg', transparent=True, metadata={'Date': None})
    svg = re.search(r'<svg [^>]*>(.*)</svg>', buffer.getvalue(), re.DOTALL)[1]
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]*_\d+"', '', svg)  # names such as axes_1, which nothing refers to
    svg = svg.replace('#000000', 'currentColor').replace('#ffffff', 'var(--page)')
    return re.sub(r'\n\s*', '\n', svg)
