"""One HTML page that holds all it shows: text, tables, plots and pictures.

No script, nothing from a network, no second file: the page can be mailed, printed and kept. It is light or dark as the
reader's system is, and fits a phone. All text is escaped, so that names from a data set may hold any character.
"""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..base.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['Bar', 'Page', 'Picture']

# Above, pixels are fewer bytes than lines, or than lossless pixels.
MAX_SVG = 200_000
MAX_PNG = 20_000

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1d2126; --soft: #667079; --line: #d9dde1; --box: #f4f5f7;
  --accent: #2f6fb7; --bar: #c9def5; --label: #bfe5c3; --warn: #fff0d6; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e3e6e9; --soft: #98a1aa; --line: #343a41;
  --box: #1e2226; --accent: #7db4f0; --bar: #274b73; --label: #28592f; --warn: #4d3a14; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { margin: .5rem 0; max-width: 50rem; }
a { color: var(--accent); }
nav { margin: .8rem 0 0; } nav a { margin-right: 1rem; white-space: nowrap; }
.subtitle, figcaption, caption, .soft { color: var(--soft); }
.warning { background: var(--warn); padding: .5rem .8rem; border-radius: 6px; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } .facts th { font-weight: 400; color: var(--soft); white-space: nowrap; }
.facts td { overflow-wrap: anywhere; min-width: 9rem; }
td.number, th.number { text-align: right; white-space: nowrap; }
figure { margin: .6rem 0; } figure.plot { display: inline-block; vertical-align: top; max-width: 100%;
  margin-right: .8rem; }
figure.plot svg, figure.plot img { display: block; max-width: 100%; height: auto; }
figure.plot figcaption { width: 0; min-width: 100%; }
figure.plot img { background: #ffffff; border-radius: 6px; }
svg text { font-family: inherit !important; }
figcaption { font-size: .87rem; max-width: 50rem; }
.pictures { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(var(--width), 1fr));
  margin-top: .4rem; }
.picture { font-size: .78rem; line-height: 1.35; break-inside: avoid; min-width: 0; }
.picture img { display: block; width: 100%; max-width: calc(1.35 * var(--width)); border-radius: 4px;
  background: var(--box); aspect-ratio: 1; object-fit: contain; }
.picture img.small { image-rendering: pixelated; }
.picture ul { list-style: none; margin: .2rem 0 0; padding: 0; max-width: calc(1.35 * var(--width)); }
.picture li { display: flex; justify-content: space-between; gap: .3rem; padding: 0 .3rem; margin-bottom: 1px;
  border-radius: 2px;
  background: linear-gradient(to right, var(--fill, var(--bar)) var(--share), var(--box) var(--share)); }
.picture li.label { --fill: var(--label); font-weight: 600; } .picture li.rest { --fill: var(--line); }
.picture li span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--accent); }
pre { background: var(--box); padding: .8rem; border-radius: 6px; overflow-x: auto; font-size: .8rem;
  line-height: 1.4; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 600px) { figure.plot, figure.plot svg, figure.plot img { width: 100%; }
  .facts th, th.number { white-space: normal; } }
@media print { html { font-size: 11px; } body { max-width: none; padding: 0; font-size: 11px; } nav { display: none; }
  h2, h3, figcaption { break-after: avoid; } figure, tr { break-inside: avoid; }
  .pictures { grid-template-columns: repeat(auto-fill, minmax(68px, 1fr)); gap: .3rem; }
  figure.plot { max-width: 31%; } }
"""


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


class Page:
    """A page that is built from its top to its bottom.

    Args:
        title: Its title.
        subtitle: A line beneath it.
    """

    def __init__(self, title: str, subtitle: str = ''):
        self.title = title
        self.subtitle = subtitle
        self._parts: list[str] = []
        self._contents: list[str] = []
        self._num_plots = 0

    def heading(self, text: str, level: int = 2) -> None:
        """A heading of level 2 or 3; those of level 2 stand in the list of contents too."""
        name = ''
        if level == 2:
            name = f' id="part-{len(self._contents)}"'
            self._contents.append(text)
        self._parts.append(f'<h{level}{name}>{_escape(text)}</h{level}>')

    def paragraph(self, text: str) -> None:
        self._parts.append(f'<p>{_escape(text)}</p>')

    def warning(self, text: str) -> None:
        """A sentence that must not be overlooked."""
        self._parts.append(f'<p class="warning">{_escape(text)}</p>')

    def facts(self, facts: Mapping[str, Any]) -> None:
        """A table of names and what they are."""
        rows = ''.join(f'<tr><th scope="row">{_escape(name)}</th><td>{_escape(value)}</td></tr>'
                       for name, value in facts.items())
        self._parts.append(f'<div class="scroll"><table class="facts">{rows}</table></div>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = '') -> None:
        """A table; a column of numbers, as such or as text such as `81.3%`, stands right-aligned.

        Args:
            header: Names of the columns [N].
            rows: Rows of as many cells.
            caption: A line above it.
        """
        numeric = [all(_is_number(row[place]) for row in rows) for place in range(len(header))]

        def line(tag: str, cells: Sequence[Any]) -> str:
            return '<tr>' + ''.join(
                f'<{tag}{" class=number" if right else ""}>{_escape(cell)}</{tag}>'
                for cell, right in zip(cells, numeric, strict=True)) + '</tr>'

        caption = f'<caption>{_escape(caption)}</caption>' if caption else ''
        body = ''.join(line('td', row) for row in rows)
        self._parts.append(f'<div class="scroll"><table>{caption}<thead>{line("th", header)}</thead>'
                           f'<tbody>{body}</tbody></table></div>')

    def figure(self, figure: 'Figure', alt: str, caption: str = '') -> None:
        """A matplotlib figure; figures that follow each other stand side by side where there is room.

        Black, white and the background become those of the page, light or dark; other colours must suit both. A
        figure of very many marks becomes pixels on white.

        Args:
            figure: It; 72 units of its size are an inch, so that (6, 3.4) is 432 x 245 pixels of the page.
            alt: What it shows, for those who do not see it.
            caption: A line beneath it.
        """
        self._num_plots += 1
        content = _inline_svg(figure, alt, self._num_plots)
        if len(content) > MAX_SVG:
            buffer = io.BytesIO()
            figure.savefig(buffer, format='png', dpi=160, facecolor='white')
            width = round(72 * figure.get_size_inches()[0])
            content = f'<img width="{width}" alt="{_escape(alt)}" src="{_data_uri(buffer.getvalue(), "png")}">'
        self._parts.append(f'<figure class="plot">{content}{_figcaption(caption)}</figure>')

    def pictures(self, pictures: Sequence[Picture], caption: str = '', width: int = 120) -> None:
        """Pictures in rows of as many as there is room for.

        Args:
            pictures: They; the small ones are enlarged with their pixels visible.
            caption: A line above them.
            width: Width of each, in pixels of the page, at least.
        """
        content = ''.join(_picture(picture, width) for picture in pictures)
        self._parts.append(f'<figure>{_figcaption(caption)}'
                           f'<div class="pictures" style="--width:{width}px">{content}</div></figure>')

    def details(self, summary: str, text: str) -> None:
        """Text as it is, such as a file, behind a line that opens it."""
        self._parts.append(f'<details><summary>{_escape(summary)}</summary><pre>{_escape(text)}</pre></details>')

    def footer(self, text: str) -> None:
        """A small line at the end."""
        self._parts.append(f'<footer>{_escape(text)}</footer>')

    def html(self) -> str:
        """The page."""
        title = _escape(self.title)
        subtitle = f'<p class="subtitle">{_escape(self.subtitle)}</p>' if self.subtitle else ''
        links = ''.join(f'<a href="#part-{number}">{_escape(text)}</a> ' for number, text in enumerate(self._contents))
        nav = f'<nav>{links}</nav>' if len(self._contents) > 2 else ''
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            # An empty icon, which a browser would ask a server for.
            f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
            f'<header><h1>{title}</h1>{subtitle}{nav}</header>\n' + '\n'.join(self._parts) + '\n</body>\n</html>\n')

    def write(self, path: str | Path) -> None:
        """Write the page; it is there whole or not at all.

        Raises:
            InputError: The disk is full, or may not be written.
        """
        write_atomic(Path(path), self.html().encode())


def _escape(value: Any) -> str:
    return html.escape(str(value))


def _figcaption(text: str) -> str:
    return f'<figcaption>{_escape(text)}</figcaption>' if text else ''


def _is_number(value: Any) -> bool:
    """Whether a cell is empty or begins as a number does."""
    return not isinstance(value, str) or re.match(r'[-+−]?[\d.,]+( ?[%a-zA-Zµ/]{0,3}\d?)$|[-–]?$', value) is not None


def _data_uri(content: bytes, kind: str) -> str:
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


def _picture(picture: Picture, width: int) -> str:
    pixels = Image.fromarray(np.ascontiguousarray(np.asarray(picture.view).transpose(1, 2, 0)))
    buffer, kind = io.BytesIO(), 'png'
    pixels.save(buffer, 'png', optimize=True)
    if buffer.tell() > MAX_PNG:
        buffer, kind = io.BytesIO(), 'jpeg'
        pixels.save(buffer, 'jpeg', quality=90)
    small = ' class="small"' if pixels.width < width else ''
    bars = ''.join(
        f'<li class="{_escape(bar.kind)}" style="--share:{100 * bar.share:.1f}%" title="{_escape(bar.name)}">'
        f'<span>{_escape(bar.name)}</span><b>{_percent(bar.share)}</b></li>' for bar in picture.bars)
    bars = f'<ul>{bars}</ul>' if bars else ''
    return (f'<div class="picture"><img{small} alt="{_escape(picture.alt or picture.caption)}" '
            f'src="{_data_uri(buffer.getvalue(), kind)}">{_escape(picture.caption)}{bars}</div>')


def _percent(share: float) -> str:
    """A probability in percent, as short as it can be told from none and from all."""
    percent = 100 * share
    if 0 < percent < 1 or 99 < percent < 100:
        return f'{percent:.1f}' if 0.05 <= percent < 99.95 else '<0.1' if percent < 1 else '>99.9'
    return f'{percent:.0f}'


def _inline_svg(figure: 'Figure', alt: str, number: int) -> str:
    """A figure as SVG in the colours of the page."""
    import matplotlib

    buffer = io.StringIO()
    # Names within it must differ from those of the page's other figures; text stays text.
    with matplotlib.rc_context({'svg.hashsalt': f'figure {number}', 'svg.fonttype': 'none'}):
        figure.savefig(buffer, format='svg', transparent=True, metadata={'Date': None})
    svg = buffer.getvalue()
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg[svg.index('<svg'):], flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]*_\d+"', '', svg)  # names such as axes_1, which nothing refers to
    svg = svg.replace('#000000', 'currentColor').replace('#ffffff', 'var(--page)')
    width, height = (round(72 * side) for side in figure.get_size_inches())
    svg = re.sub(r'^<svg [^>]*>', (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" fill="currentColor" role="img" '
        f'aria-label="{_escape(alt)}">').replace('\\', '\\\\'), svg)
    return re.sub(r'\n\s*', '\n', svg)
