"""What the programs say: lines, progress bars and colours, for a terminal, a notebook or the log file of a cluster job.

Only the first process of a launch speaks, for libraries too. On a terminal a bar is drawn over itself; in a file it is
a line now and then, with no control characters. Colours are for terminals, and none with NO_COLOR (no-color.org).
`--quiet` leaves results, warnings and errors. Names from outside are written into lines as they are, and made harmless
here, at the door (`escaping`).
"""

import logging
import os
import sys
import warnings
from contextlib import contextmanager
from time import monotonic
from typing import Any, TextIO
from collections.abc import Iterable, Iterator

from tqdm import auto, std

from .escaping import for_terminal, sentence, without_home

__all__ = ['best_effort', 'colored', 'info', 'print_result', 'progress', 'setup_console', 'warning']

LINE_SECONDS = 30.
LINE_FORMAT = (
    '{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left, {rate_fmt}{postfix}')
COLORS = {'bold': 1, 'green': 32, 'yellow': 33}

_speaks = os.environ.get('RANK', '0') == '0'
_is_quiet = False


def setup_console(is_first: bool, quiet: bool = False) -> None:
    """Settle who speaks, at the start of a program, as soon as it knows its rank.

    Args:
        is_first: Whether this is the first process of its launch. The others say nothing but how they fail.
        quiet: No bars, and no lines but results and warnings.
    """
    global _speaks, _is_quiet
    _speaks, _is_quiet = is_first, quiet
    if not is_first:
        warnings.simplefilter('ignore')
        logging.disable(logging.WARNING)
    if not is_first or quiet or not _is_drawn(sys.stderr):
        # Those of libraries know no log files. Imported here, and not for a program that only answers --help.
        import datasets
        from huggingface_hub.utils import disable_progress_bars

        datasets.disable_progress_bars()
        disable_progress_bars()


def info(line: str, **colors: str) -> None:
    """A line of information.

    Args:
        line: The line.
        colors: By their names in `COLORS`, the parts of it that have them on a terminal.
    """
    if not _is_quiet:
        print_result(without_home(line), **colors)


def print_result(line: str, **colors: str) -> None:
    """A line, or several, that `--quiet` leaves too; see `info`."""
    if _speaks:
        line = for_terminal(line, getattr(sys.stdout, 'encoding', None))
        for color, part in colors.items():
            line = line.replace(part, colored(part, color), 1) if part else line
        auto.tqdm.write(line)
        # A file would get it with the next few thousand characters.
        sys.stdout.flush()


def warning(line: str) -> None:
    """A line on what goes wrong without ending the program, on stderr."""
    if _speaks:
        line = sentence(line, getattr(sys.stderr, 'encoding', None))
        auto.tqdm.write(f'{colored("warning:", "yellow", sys.stderr)} {line}', file=sys.stderr)
        sys.stderr.flush()


def progress(iterable: Iterable[Any] | None = None, show: bool = True, **options: Any) -> std.tqdm:
    """A progress bar on stderr, where this process speaks.

    Args:
        iterable: What to go through; without one the bar is updated by hand.
        show: Whether there is one at all.
        options: Those of tqdm.
    """
    options['disable'] = not show or not _speaks or _is_quiet
    return auto.tqdm(iterable, **options) if _is_drawn(sys.stderr) else _LineBar(iterable, **options)


def colored(text: str, color: str, stream: TextIO | None = None) -> str:
    """A text in one of `COLORS`, where the stream, by default stdout, is a terminal that shows them."""
    stream = stream or sys.stdout
    if os.environ.get('NO_COLOR') or os.environ.get('TERM') == 'dumb' or not stream.isatty():
        return text
    return f'\x1b[{COLORS[color]}m{text}\x1b[0m'


def _is_drawn(stream: TextIO) -> bool:
    """Whether a line can be drawn over: on a terminal, and in a notebook, whose streams are none."""
    shell = sys.modules['IPython'].get_ipython() if 'IPython' in sys.modules else None
    return stream.isatty() or hasattr(shell, 'kernel')


class _LineBar(std.tqdm):
    """A bar for a file: a line every half a minute, and a last one where the bar is to stay.

    What takes less time says nothing, so that short epochs leave one line each: the program's own.
    """

    def __init__(self, *args: Any, **options: Any):
        self._due = monotonic() + LINE_SECONDS
        # tqdm looks at the clock no more often than this.
        options |= dict(bar_format=LINE_FORMAT, mininterval=1., maxinterval=LINE_SECONDS)
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None and monotonic() >= self._due:
            self._due = monotonic() + LINE_SECONDS
            self.fp.write(f'{self}\n')
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """There is nothing to draw over."""

    def close(self) -> None:
        if not getattr(self, 'disable', True) and self.leave and self.n > self.initial:
            self._due = 0.
            self.display()
        self.leave = False
        super().close()


@contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Inside, what goes wrong is a warning: no training ends for want of a report.

    Args:
        what: What cannot be made then.
    """
    try:
        yield
    except Exception as error:
        # From full disks to whatever a plotting library makes of odd figures.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warning(f'{what} cannot be made: {reason}; the training goes on')
