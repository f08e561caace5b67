"""The one kind of error that a user can fix.

Whatever comes from outside (a flag, a file, a data set, a store of another machine) and is wrong raises `InputError`
with one sentence: what was found, what was expected, what to do. The programs print that sentence and exit with a
non-zero status; every other exception is a bug and keeps its traceback.
"""

import functools
import os
import signal
import sys
import threading
from contextlib import contextmanager
from types import FrameType
from collections.abc import Callable, Iterator, Sequence

__all__ = ['Diverged', 'InputError', 'Terminated', 'reports_input_errors']


class InputError(ValueError):
    """Something given by the user is wrong; the message is the one sentence that the user needs."""

    def __init__(self, message: str):
        # torch's DataLoader raises a worker's exception again with the worker's traceback as its message; the sentence
        # is what stands behind the name of this class on its last lines.
        name = f'{InputError.__module__}.{InputError.__qualname__}: '
        if message.startswith('Caught ') and name in message:
            message = message.rsplit(name, 1)[1].strip()
        super().__init__(message)


class Diverged(InputError):
    """The loss or a gradient of a training is not finite; all processes of the launch raise it together."""


class Terminated(KeyboardInterrupt):
    """SIGTERM has come; like Ctrl-C it unwinds the stack, so that everything is left in order."""


@contextmanager
def _stopping_in_order() -> Iterator[None]:
    """Inside, Ctrl-C raises `KeyboardInterrupt` and SIGTERM `Terminated`, once."""

    def stop(number: int, frame: FrameType | None) -> None:
        # Launchers repeat themselves; a second signal must not break into what the first one has set off.
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        # A shell lets its background jobs ignore Ctrl-C.
        before = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def reports_input_errors(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], None]:
    """Decorate a program's `main`: what ends it early becomes one line on stderr and an exit status.

    2 for an `InputError`, 130 for Ctrl-C, 143 for SIGTERM, 141 where the reader of the output has left.
    """

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> None:
        try:
            with _stopping_in_order():
                main(argv)
        except InputError as error:
            # torch ties what a worker has raised to its loader in a cycle, and a loader that the garbage collector
            # finds waits 5 seconds and more for each of its workers.
            error.__traceback__ = None
            print(f'error: {error}', file=sys.stderr, flush=True)
            status = 2
        except KeyboardInterrupt as stop:
            print('stopped: the same command goes on from what is on disk', file=sys.stderr, flush=True)
            status = 143 if isinstance(stop, Terminated) else 130
        except BrokenPipeError:
            # Who reads the output, as `head` does, has left. What is buffered must not fail again at the exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 128 + signal.SIGPIPE
        except RuntimeError as error:
            if os.environ.get('RANK', '0') == '0' or 'onnection' not in str(error):
                raise
            # Another rank has said what is wrong and left.
            status = 1
        else:
            return
        if int(os.environ.get('WORLD_SIZE', '1')) > 1:
            # The other ranks may wait in a collective; a normal exit would wait for them in turn.
            os._exit(status)
        sys.exit(status)

    return wrapper
