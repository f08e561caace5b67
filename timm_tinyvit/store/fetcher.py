"""Fetcher: a process beside a training that brings epochs of a remote store to disk before they are read.

It is a process and not a thread, as loader workers are forked all the time, and a lock that a thread holds at that
moment is never given back in the fork.
"""

import math
import multiprocessing
import os
import signal
import weakref
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NamedTuple
from collections.abc import Callable

from ..base.console import progress, warning
from ..base.errors import InputError
from ..base.launch import init_worker
from .cache import HeldEpochs, ShardCache

__all__ = ['NUM_DOWNLOADS', 'Fetcher']

# Downloads at a time on one machine, of all of its ranks together.
NUM_DOWNLOADS = 8
# Fetching processes of one training, one after the other.
MAX_STARTS = 5


class _Command(NamedTuple):
    """What a fetcher has to do: epochs to fetch first and then, and those to keep on disk."""
    epochs: list[int]
    then: list[int]
    kept: list[int]


class Fetcher:
    """A process that fetches the epochs that it is told of, and removes the others.

    Args:
        cache: Where they go.
    """

    def __init__(self, cache: ShardCache):
        self.cache = cache
        self.command: _Command | None = None
        self.is_ready, self.has_failed = True, False
        self.num_starts = 0
        self._start()

    def _start(self) -> None:
        self.num_starts += 1
        self.connection, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(
            target=_serve, args=(self.cache, self.connection, theirs), name='store fetcher', daemon=True)
        self.process.start()
        theirs.close()
        self.stop = weakref.finalize(self, _end, self.process, self.connection, os.getpid())

    def order(self, epochs: list[int], then: list[int], kept: list[int]) -> None:
        """Fetch some epochs and then others, and keep only some on disk."""
        self.command = _Command(epochs, then, kept)
        self.is_ready = self.has_failed = False
        with suppress(OSError, EOFError):  # where it has died, `wait` starts another one
            while self.connection.poll():
                self.connection.recv()
            self.connection.send(self.command)

    def wait(self, stop: Callable[[], bool]) -> bool:
        """Wait until the epochs that were ordered first are on disk.

        Returns:
            Whether they are; False if `stop` said so before.

        Raises:
            InputError: They cannot be fetched.
        """
        if self.has_failed:
            self.order(*self.command)
        epochs, size = self.command.epochs, self.cache.shard_format.file_size
        total = left = sum(size(shard) for epoch in epochs for shard in self.cache.lacking(epoch))
        with progress(
                total=total, desc=f'fetch epoch {epochs[0]}', unit='B', unit_scale=True, leave=False, delay=1) as bar:
            while not self.is_ready:
                if stop():
                    return False
                kind, reason = self._next()
                left = min(left, sum(size(shard) for epoch in epochs for shard in self.cache.lacking(epoch)))
                bar.update(total - left - bar.n)
                if kind == 'failed':
                    self.has_failed = True
                    raise InputError(reason)
                if kind == 'late':
                    warning(f'epoch {epochs[0]} of {self.cache.source} is late: {reason}; still trying')
                self.is_ready = kind == 'ready'
        return True

    def _next(self) -> tuple[str, str]:
        """What it has to say about the last command, after a moment."""
        try:
            if self.connection.poll(0.2):
                command, *message = self.connection.recv()
                return tuple(message) if command == self.command else ('', '')
            if self.process.is_alive():
                return '', ''
        except (EOFError, OSError):
            pass
        # Killed, as where memory runs out. What it has fetched is on disk.
        self.stop()
        if self.num_starts > MAX_STARTS:
            raise InputError(f'the process that fetches {self.cache.source} was ended {self.num_starts} times, the '
                             f'last time with status {self.process.exitcode}; see whether memory runs out')
        self._start()
        self.order(*self.command)
        return '', ''


def _end(process: multiprocessing.Process, connection: Connection, owner: int) -> None:
    """End a fetcher in peace; a fork of its owner leaves it alone."""
    if os.getpid() != owner:
        return
    with suppress(OSError):
        connection.send(None)
    process.join(2)
    process.terminate()
    process.join()


def _serve(cache: ShardCache, parents: Connection, connection: Connection) -> None:
    """What a fetcher does: carry out the last command until the next one comes."""
    init_worker(0)
    # What it leaves behind when it is stopped, others clear up.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parents.close()
    held = HeldEpochs(cache)
    with suppress(EOFError):
        while (command := connection.recv()) is not None:
            _carry_out(command, cache, held, connection)
    held.release()


def _carry_out(command: _Command, cache: ShardCache, held: HeldEpochs, connection: Connection) -> None:
    """Fetch what a command says, unless the next one comes before."""
    reasons: list[str] = []

    def late(reason: str) -> None:
        if not reasons:
            reasons.append(reason)
            connection.send((command, 'late', reason))

    # Ranks share out the connections of a machine.
    threads = max(1, NUM_DOWNLOADS // int(os.environ.get('LOCAL_WORLD_SIZE', '1')))
    try:
        held.set(command.kept)
        for epoch in command.epochs:
            if not cache.fetch(epoch, cache.lacking(epoch), threads, stop=connection.poll, late=late):
                return
    except InputError as error:
        connection.send((command, 'failed', str(error)))
        return
    connection.send((command, 'ready', ''))
    with suppress(InputError):  # tried again, and said, when the epoch is read
        for epoch in command.then:
            cache.fetch(epoch, cache.lacking(epoch), threads, patience=math.inf, stop=connection.poll)
