"""Atomic writes: a file is there whole or not at all. It is written under a temporary name, synced and renamed.

A leftover of a killed writer is told from what a living one is writing by the process, on this machine, and by a day,
on another; the file system's own clock counts it, whatever the machines' clocks say.
"""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from collections.abc import Callable, Iterable

from .errors import InputError
from .machine import is_dead, machine_name

__all__ = ['cannot_write', 'read_bounded', 'remove_leftovers', 'write_atomic']

LEFTOVER_SECONDS = 24 * 3600


def write_atomic(
        path: Path,
        data: bytes | memoryview | Iterable[bytes],
        check: Callable[[Path], None] = lambda temporary: None,
) -> None:
    """Write a file so that it is there whole or not at all, also after a kill or a power cut.

    Args:
        path: The file.
        data: Its content, or the parts of it.
        check: Looks at the temporary file before it is renamed, and raises if that is not good.

    Raises:
        InputError: The disk is full, or may not be written; nothing is left behind.
    """
    temporary = path.with_name(f'.{path.name}.{machine_name()}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'wb') as file:
            for part in [data] if isinstance(data, (bytes, memoryview)) else data:
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
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
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


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed writers in a folder: of a dead process of this machine, or a day old."""
    now = None
    for temporary in folder.glob('.*.tmp'):
        machine, _, pid = temporary.name.removesuffix('.tmp').rpartition('.')
        try:
            if machine_name() and machine.endswith('.' + machine_name()) and pid.isdigit():
                is_leftover = is_dead(int(pid))
            else:
                now = now or _file_system_time(folder)
                is_leftover = now - temporary.stat().st_mtime > LEFTOVER_SECONDS
            if is_leftover:
                temporary.unlink()
        except OSError:
            # Another process has removed it, or nobody may.
            continue


def _file_system_time(folder: Path) -> float:
    """The time of a file that was made in this folder just now."""
    probe = folder / f'.now.{machine_name()}.{os.getpid()}.tmp'
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
