"""Numbers in words, for people: bytes, counts, percents, and tables of them."""

import math
from collections.abc import Mapping, Sequence

from .escaping import MAX_NAME, MAX_SENTENCE, printable

__all__ = ['counted', 'decimal', 'percent', 'readable_bytes', 'short_percent', 'text_facts', 'text_table']


def readable_bytes(count: float) -> str:
    """A number of bytes for people: `2.8 GB`."""
    units = ['TB', 'GB', 'MB', 'kB', 'bytes']
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop()
    return f'{count:,.{0 if units[-1] == "bytes" else 1}f} {units[-1]}'


def counted(number: int, noun: str) -> str:
    """A number of things in words, as in `1 epoch` and `2 epochs`."""
    return f'{number:,} {noun}' + ('' if number == 1 else 's')


def decimal(value: float | None, digits: int) -> str:
    """A number with so many digits; `-` for None and NaN, which stand for an unknown one."""
    return '-' if value is None or math.isnan(value) else f'{value:,.{digits}f}'


def percent(share: float | None, digits: int = 2) -> str:
    """A share of one in percent, as in `81.30%`; `-` for an unknown one."""
    return '-' if share is None or math.isnan(share) else f'{100 * share:.{digits}f}%'


def short_percent(share: float) -> str:
    """A share of one in percent, as short as it can be told from none and from all: `43%`, `0.6%`, `>99.9%`."""
    value = 100 * share
    if 0 < value < 1 or 99 < value < 100:
        return f'{value:.1f}%' if 0.05 <= value < 99.95 else '<0.1%' if value < 1 else '>99.9%'
    return f'{value:.0f}%'


def text_table(rows: Sequence[Sequence[object]]) -> str:
    """A table for a terminal: the first column to the left, the others to the right."""
    lines = [[printable(str(cell), MAX_NAME) for cell in row] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    return '\n'.join('  '.join(
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]).rstrip()
        for line in lines)


def text_facts(facts: Mapping[str, object]) -> str:
    """Names and what they are for a terminal, a line each."""
    return '\n'.join(f'{name:<17}{printable(str(value), MAX_SENTENCE)}' for name, value in facts.items())
