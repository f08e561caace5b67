"""The one kind of error that a user can mend.

Whatever comes from outside (a flag, a file, a data set, a store of another machine) and is wrong raises `InputError`
with one sentence: what was found, what was expected, what to do. The programs print that sentence and exit with a
non-zero status; every other exception is a bug and keeps its traceback.
"""

import functools
import os
import sys
from collections.abc import Callable, Sequence

__all__ = ['InputError', 'reports_input_errors']


class InputError(ValueError):
    """Something given by the user is wrong; the message is the one sentence that the user needs."""

    def __init__(self, message: str):
        # torch's DataLoader raises a worker's exception again with the worker's traceback as its message; the sentence
        # is what stands behind the name of this class on its last lines.
        name = f'{InputError.__module__}.{InputError.__qualname__}: '
        if message.startswith('Caught ') and name in message:
            message = message.rsplit(name, 1)[1].strip()
        super().__init__(message)


def reports_input_errors(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], None]:
    """Decorate a program's `main`: an `InputError` becomes one line on stderr and exit status 2, Ctrl-C 130."""

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> None:
        try:
            main(argv)
        except InputError as error:
            print(f'error: {error}', file=sys.stderr, flush=True)
            status = 2
        except KeyboardInterrupt:
            print('stopped: the same command goes on from what is on disk', file=sys.stderr, flush=True)
            status = 130
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
