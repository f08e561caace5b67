"""The one kind of error that a user can fix.

Whatever comes from outside (a flag, a file, a data set, a store of another machine) and is wrong raises `InputError`
with one sentence: what was found, what was expected, what to do. The programs print that sentence and exit with a
non-zero status; every other exception is a bug and keeps its traceback.
"""

import errno
import functools
import os
import signal
import sys
import threading
from contextlib import contextmanager
from types import FrameType
from collections.abc import Callable, Iterator, Sequence

from .escaping import sentence

__all__ = [
    'Diverged', 'InputError', 'STARTED_BY', 'STOP_SIGNALS', 'Terminated', 'reports_input_errors', 'stop_by',
    'stop_signals_to',
]

# What asks a program to stop: Ctrl-C, whoever ends it, a terminal that closes, and a scheduler some time before the end
# of a job. Not every system has all of them.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2') if hasattr(signal, name))
# This process and who started it, looked at before the slow imports: a launcher may be gone when they are done.
STARTED_BY = os.getpid(), os.getppid()
# Of paths that no system takes.
BAD_PATHS = (errno.ENAMETOOLONG, errno.ELOOP)


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
    """A signal to stop has come; like Ctrl-C it unwinds the stack, so that everything is left in order.

    What it says, if anything, is what the same command goes on from.

    Args:
        number: The signal.
    """

    def __init__(self, number: int = signal.SIGTERM):
        super().__init__()
        self.number = number


def stop_by(number: int) -> KeyboardInterrupt:
    """What to raise for one of `STOP_SIGNALS`."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)


@contextmanager
def stop_signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, a function handles those of `STOP_SIGNALS` that are not ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        # A shell lets its background jobs ignore Ctrl-C, and nohup what a closing terminal sends.
        before = {number: known for number, known in before.items() if known not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)


def _report(error: str) -> None:
    print(f'error: {sentence(error, getattr(sys.stderr, "encoding", None))}', file=sys.stderr, flush=True)


def _bad_path(error: Exception) -> str | None:
    """What is wrong with a path that no system takes, in words; None for another error."""
    if isinstance(error, OSError) and error.errno in BAD_PATHS:
        return f'the path {error.filename} cannot be: {error.strerror}; name another'
    if isinstance(error, ValueError) and 'embedded null' in str(error):
        return 'a path holds a NUL character; name another'
    return None


def reports_input_errors(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], None]:
    """Decorate a program's `main`: what ends it early becomes one line on stderr and an exit status.

    2 for an `InputError`, 128 and its number for a signal to stop (130 for Ctrl-C, 143 for SIGTERM), 141 where the
    reader of the output has left.
    """

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> None:

        def stop(number: int, frame: FrameType | None) -> None:
            # Launchers repeat themselves; a second signal must not break into what the first one has set off. It is not
            # SIG_IGN, which programs that are started meanwhile would inherit.
            for other in STOP_SIGNALS:
                signal.signal(other, lambda *_: None)
            raise stop_by(number)

        try:
            with stop_signals_to(stop):
                main(argv)
        except InputError as error:
            # torch ties what a worker has raised to its loader in a cycle, and a loader that the garbage collector
            # finds waits 5 seconds and more for each of its workers.
            error.__traceback__ = None
            _report(str(error))
            status = 2
        except KeyboardInterrupt as interrupt:
            place = str(interrupt) or 'what is on disk'
            print(f'stopped: the same command goes on from {sentence(place, getattr(sys.stderr, "encoding", None))}',
                  file=sys.stderr, flush=True)
            status = 128 + getattr(interrupt, 'number', signal.SIGINT)
        except BrokenPipeError:
            # Who reads the output, as `head` does, has left. What is buffered must not fail again at the exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 128 + signal.SIGPIPE
        except (OSError, ValueError) as error:
            if (reason := _bad_path(error)) is None:
                raise
            _report(reason)
            status = 2
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
