"""Atomic writes: a file is there whole or not at all. It is written under a temporary name, synced and renamed.

What is temporary lies beside what it becomes, on the disk that has room for it. A leftover of a killed writer is told
from what a living one is writing by the process, on this machine, and by a day, on another; the file system's own clock
counts it, whatever the machines' clocks say.
"""

import errno
import glob
import os
import re
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from collections.abc import Callable, Iterable, Iterator

from .errors import InputError
from .machine import is_dead, machine_name

__all__ = ['cannot_write', 'check_no_link', 'read_bounded', 'remove_leftovers', 'temporary_beside', 'write_atomic']

LEFTOVER_SECONDS = 24 * 3600
# Name of what it becomes, machine, process, and the ending that some library insists on.
TEMPORARY = re.compile(r'\..+\.([^.]*)\.(\d+)\.tmp(\.\w+)?', re.DOTALL)


@contextmanager
def temporary_beside(path: Path, ending: str = '') -> Iterator[Path]:
    """Gives a name for what is to become a file or a folder, beside it; what has that name in the end is removed.

    Args:
        path: The file or folder.
        ending: What the name is to end with.
    """
    temporary = path.with_name(f'.{path.name}.{machine_name()}.{os.getpid()}.tmp{ending}')
    _remove(temporary)
    try:
        yield temporary
    finally:
        with suppress(OSError):
            _remove(temporary)


def write_atomic(
        path: Path,
        data: bytes | memoryview | Iterable[bytes] | Callable[[Path], None],
        check: Callable[[Path], None] = lambda temporary: None,
) -> None:
    """Write a file so that it is there whole or not at all, also after a kill or a power cut.

    Args:
        path: The file.
        data: Its content, or the parts of it, or what writes it to the temporary file.
        check: Looks at the temporary file before it is renamed, and raises if that is not good.

    Raises:
        InputError: The disk is full, or may not be written; nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(path) as temporary:
            if is_written := callable(data):
                data(temporary)
            # Made anew: a link of that name would lead elsewhere.
            with open(temporary, 'r+b' if is_written else 'xb') as file:
                for part in () if is_written else [data] if isinstance(data, (bytes, memoryview)) else data:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            check(temporary)
            os.replace(temporary, path)
        if os.name == 'posix':  # elsewhere a folder cannot be opened
            # The new name must be on disk too.
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise cannot_write(path, error)


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a file that anybody may have made; no pipe or device is waited for.

    Args:
        path: The file.
        limit: Bytes that it may have.

    Raises:
        OSError: There is no such file, or it cannot be read or is none.
        ValueError: It is larger.
    """
    number = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0))
    with open(number, 'rb') as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, 'it is no regular file', str(path))
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f'it has more than {limit:,} bytes')
    return content


def cannot_write(path: Path, error: OSError) -> InputError:
    """What to tell a user whose disk does not take a file."""
    hint = {
        errno.ENOSPC: 'the disk is full, make room',
        errno.EDQUOT: 'the disk quota is used up, make room',
        errno.EFBIG: 'the file-size limit is reached, raise it (ulimit -f)',
        errno.EROFS: 'the disk is read-only, choose another folder',
        errno.EACCES: 'permission denied, choose another folder',
    }.get(error.errno, error.strerror)
    return InputError(
        f'cannot write {path}: {hint}; what was complete is kept, and the same command goes on from there')


def check_no_link(folder: Path) -> None:
    """Refuse a folder inside a store, a cache or a run that is a link.

    Raises:
        InputError: It is one: what is written and removed in it would be elsewhere.
    """
    if folder.is_symlink():
        raise InputError(f'{folder} is a link to {os.readlink(folder)}, and nothing is written or removed there; put '
                         f'the folder itself in the place of the link')


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left in a folder: of a dead process of this machine, or a day old.

    Args:
        folder: The folder.
        name: Only what was to become the file or folder of this name.
    """
    now = None
    for temporary in folder.glob('.*.tmp*' if name is None else f'.{glob.escape(name)}.*.tmp*'):
        match = TEMPORARY.fullmatch(temporary.name)
        if match is None:
            continue
        try:
            if machine_name() and match[1] == machine_name():
                is_leftover = is_dead(int(match[2]))
            else:
                now = now or _file_system_time(folder)
                is_leftover = now - temporary.lstat().st_mtime > LEFTOVER_SECONDS
            if is_leftover:
                _remove(temporary)
        except OSError:
            # Another process has removed it, or nobody may.
            continue


def _remove(path: Path) -> None:
    """Remove a file, a folder or a link, and not what it leads to; or nothing, where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _file_system_time(folder: Path) -> float:
    """The time of a file that was made in this folder just now."""
    with temporary_beside(folder / 'now') as probe:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime
