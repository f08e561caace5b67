"""Leases: who works on which file, among any number of processes and machines that share a folder.

A lease is a small file beside the one that is to be made. It holds its owner and a heartbeat, a number that the owner
raises every few seconds. An owner of this machine is dead when its process is; any other one when its lease has not
changed for `expire` seconds of the observer's own monotonic clock. No clock of another machine and no time of a file
is ever looked at.

Where two who make the same file make the same bytes, a lease saves work and nothing else depends on it: one that was
taken over by mistake costs one file's work, and its owner need not notice. Where a file is changed, whoever holds its
lease looks whether it is still held just before the new file takes the old one's place: a process that was suspended
for longer than its lease must not undo what others have done since.
"""

import hashlib
import json
import os
import secrets
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from collections.abc import Callable, Iterator

from .errors import InputError
from .files import cannot_write
from .machine import is_dead, machine_name, start_time

__all__ = ['Leases', 'exclusive']

SUFFIX = '.lease'
# More than any lease holds.
MAX_BYTES = 4096


@dataclass
class _Lease:
    """A lease of this process: its open file and its content."""
    path: Path
    file: BinaryIO
    content: dict[str, str | int]

    def renew(self) -> None:
        """Write it again with the next heartbeat, in place; the content never gets shorter."""
        self.content['heartbeat'] += 1
        self.file.seek(0)
        self.file.write(json.dumps(self.content).encode())
        # Closing a copy sends it to the server of a network file system, and spares a local disk the wait of fsync.
        os.close(os.dup(self.file.fileno()))


class Leases:
    """The leases of this process; a context manager that releases them all.

    Args:
        expire: Seconds without a heartbeat after which a lease of another machine has expired.
        heartbeat: Seconds between two heartbeats of this process; several must fit into everybody's `expire`.
    """

    def __init__(self, expire: float = 60., heartbeat: float = 5.):
        self.expire = expire
        self.heartbeat = heartbeat
        self._held: dict[Path, _Lease] = {}
        # Leases of others: their content, and when it was first seen.
        self._seen: dict[Path, tuple[bytes, float]] = {}
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> 'Leases':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release all of them; a fork of this process releases none, and waits for no lock that it cannot get."""
        if os.getpid() == self._owner:
            self._done.set()
            for file in list(self._held):
                self.release(file)

    @staticmethod
    def path(file: Path) -> Path:
        """Where the lease on a file lies."""
        return file.with_name(f'.{file.name}{SUFFIX}')

    def acquire(self, file: Path) -> bool:
        """Lease a file, if nobody who lives has leased it.

        Returns:
            Whether it is this process's now, and was not before.

        Raises:
            InputError: The disk is full or may not be written.
        """
        path = self.path(file)
        if file in self._held:
            return False
        try:
            path.parent.mkdir(exist_ok=True)
            if not self._create(file, path):
                content = self._expired_content(path)
                if content is None or not self._take_over(path, content) or not self._create(file, path):
                    return False
        except OSError as error:
            raise cannot_write(file, error)
        self._seen.pop(path, None)
        return True

    def release(self, file: Path) -> None:
        """Release a file, made or not; a lease that another process has taken over stays with that one."""
        with self._lock:
            lease = self._held.pop(file, None)
        if lease is None:
            return
        lease.file.close()
        content = _read(lease.path)
        if content and lease.content['token'].encode() in content:
            _remove(lease.path, content)

    def check(self, file: Path) -> None:
        """Find out that a lease is still this process's own.

        Raises:
            InputError: It was taken over: no heartbeat came while this process was suspended.
        """
        with self._lock:
            lease = self._held.get(file)
        content = lease and _read(lease.path)
        if not content or lease.content['token'].encode() not in content:
            raise InputError(f'another process has taken over {file} while this one was suspended; it stays as that '
                             f'one leaves it, and the same command goes on from there')

    def expire_in(self, folder: Path, part: str = '') -> bool:
        """Remove the leases in a folder that have expired, or whose owners are dead.

        The time until one expires is counted from the first look at it.

        Args:
            folder: The folder.
            part: Of the names of the files that are leased; all by default.

        Returns:
            Whether none is left.
        """
        is_free = True
        # And those on the taking over of such a lease.
        for lease in folder.glob(f'.*{SUFFIX}'):
            if part not in lease.name:
                continue
            file = folder / lease.name[1:].removesuffix(SUFFIX)
            if self.acquire(file):
                self.release(file)
            else:
                is_free = False
        return is_free

    def owner(self, file: Path) -> str:
        """Who has leased a file, for messages: a process of this machine, or of a host."""
        try:
            owner = json.loads(_read(self.path(file)) or b'')
            pid, machine, host = int(owner['pid']), owner['machine'], ascii(str(owner['host'])[:64])[1:-1]
        except (KeyError, RecursionError, TypeError, ValueError):
            return 'another process'
        return f'process {pid}' + ('' if machine == machine_name() else f' of {host}')

    def clear(self, folder: Path) -> None:
        """Remove the leases on files of a folder that are there: their owners died between making and releasing."""
        self._seen = {path: seen for path, seen in self._seen.items() if path.parent != folder}
        for path in folder.glob(f'.*{SUFFIX}'):
            # Of a lease on the removal of a lease, too.
            if path.with_name(path.name.lstrip('.').partition(SUFFIX)[0]).exists():
                with suppress(OSError):
                    path.unlink()

    def _create(self, file: Path, path: Path) -> bool:
        try:
            opened = open(path, 'xb', buffering=0)
        except FileExistsError:
            return False
        try:
            lease = _Lease(path, opened, dict(
                host=socket.gethostname(), machine=machine_name(), pid=os.getpid(), started=start_time(os.getpid()),
                token=secrets.token_hex(8), heartbeat=0))
            lease.renew()
            with self._lock:
                self._held[file] = lease
        except BaseException:
            opened.close()
            path.unlink(missing_ok=True)
            raise
        # Not earlier: loader workers are forked before their first shard is leased, and want no thread beside them.
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep_alive, name='leases', daemon=True)
            self._thread.start()
        return True

    def _take_over(self, path: Path, content: bytes) -> bool:
        """Remove an expired lease of this content; of several processes that try, one succeeds."""
        # A lease on the removal: who comes late must not remove what the one before has put in its place.
        removal = path.with_name(f'{path.name}.{hashlib.blake2b(content, digest_size=8).hexdigest()}')
        if not self.acquire(removal):
            return False
        try:
            return _read(path) == content and _remove(path, content)
        finally:
            self.release(removal)

    def _keep_alive(self) -> None:
        while not self._done.wait(self.heartbeat):
            with self._lock:
                for lease in self._held.values():
                    # Taken over and removed, or a disk in trouble: making the file will show which.
                    with suppress(OSError):
                        lease.renew()

    def _expired_content(self, path: Path) -> bytes | None:
        """The content of a lease that has expired, or whose owner is dead."""
        content = _read(path)
        if content is None:
            return None
        now = time.monotonic()
        before, since = self._seen.get(path, (None, now))
        if content != before:
            self._seen[path] = (content, now)
        elif now - since >= self.expire:
            return content
        return content if _is_of_a_dead_process(content) else None


@contextmanager
def exclusive(file: Path) -> Iterator[Callable[[Path], None]]:
    """A lock between processes; for reading, changing and writing a file.

    Yields:
        What `write_atomic` is to check before the file takes its place: that the lock is still held.

    Raises:
        InputError: The disk is full or may not be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(file, error)
    with Leases() as leases:
        while not leases.acquire(file):
            time.sleep(0.05)
        yield lambda temporary: leases.check(file)


def _read(path: Path) -> bytes | None:
    """The content of a lease; empty where it cannot be read, None where there is no lease."""
    try:
        # Opened anew every time, since that is when a network file system looks; and never waiting, as for a pipe.
        number = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0))
        try:
            return os.read(number, MAX_BYTES)
        finally:
            os.close(number)
    except FileNotFoundError:
        return None
    except OSError:
        return b''


def _is_of_a_dead_process(content: bytes) -> bool:
    """Whether a lease names a process of this very machine that has ended."""
    try:
        owner = json.loads(content)
        machine, pid, started = owner['machine'], owner['pid'], owner['started']
    except (KeyError, RecursionError, TypeError, ValueError):
        # Written half, or by something else: it will not change any more, and so expires.
        return False
    if not machine or machine != machine_name() or type(pid) is not int or pid < 1 or type(started) is not str:
        return False
    return is_dead(pid, started)


def _remove(path: Path, content: bytes) -> bool:
    """Remove the lease of this content; if it has another one by now, leave it."""
    temporary = path.with_name(f'{path.name}.{secrets.token_hex(8)}.{machine_name()}.{os.getpid()}.tmp')
    try:
        os.rename(path, temporary)
        is_same = _read(temporary) == content
        if not is_same:
            with suppress(OSError):
                os.link(temporary, path)
        return is_same
    except OSError:
        return False
    finally:  # also where a signal ends the process just now
        with suppress(OSError):
            os.unlink(temporary)
