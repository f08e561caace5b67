"""ShardCache: shards of a remote store, in a folder that processes share, there when they are read and gone after.

A shard is fetched to a temporary file, checked whole and renamed: one that is in the folder is complete. Any number of
ranks, loader workers and trainings use one folder. Each shard is fetched by one of them, who has a lease on it, and an
epoch stays on disk as long as a process that lives has a lease on it; one that was removed nevertheless is fetched
again by whoever reads it.

A connection that is lost, or a service in trouble, is tried again with growing pauses for a day: a training outlives
it as long as the epoch in use is on disk.
"""

import json
import os
import re
import secrets
import time
import weakref
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..base.errors import InputError
from ..base.files import remove_leftovers, write_atomic
from ..base.hub_client import Unavailable
from ..base.leases import Leases, exclusive
from ..base.remote_folder import MAX_ATTEMPTS, Damaged, RemoteFolder
from .manifest import MANIFEST_NAME
from .shard import SHARD_PATH, ShardFormat, epoch_name, shard_name

__all__ = ['HeldEpochs', 'ShardCache']

# Seconds without anything fetched after which an epoch that is needed is given up.
PATIENCE = 24 * 3600.
MAX_PAUSE = 60.
READER = 'reader-'
# A version of a store, and the name of its folder: the hash of a commit, or the identity of a manifest.
VERSION = re.compile('[0-9a-f]{40}|[0-9a-f]{32}')
LISTING_NAME = 'listing.json'


class ShardCache:
    """The shards of one version of a store.

    Args:
        source: Where the store is.
        folder: Where its files go on this disk.
        shard_format: The format of its shards.

    Attributes:
        shards: The shards of each epoch that the store has.
        others: Its other files.
        size: Bytes of all of its shards.
    """

    def __init__(self, source: RemoteFolder, folder: Path, shard_format: ShardFormat):
        self.source = source
        self.folder = folder
        self.shard_format = shard_format
        self.look()

    def shard_path(self, epoch: int, shard: int) -> Path:
        return self.epoch_folder(epoch) / shard_name(shard)

    def epoch_folder(self, epoch: int) -> Path:
        return self.folder / epoch_name(epoch)

    def look(self, anew: bool = False) -> None:
        """Find out what the store has, from a list in the folder if one of the processes has made it."""
        path = self.folder / LISTING_NAME
        if anew or (listing := _read_json(path)) is None:
            with exclusive(path):
                if anew or (listing := _read_json(path)) is None:
                    listing = self._list()
                    write_atomic(path, json.dumps(listing).encode())
        self.shards = {int(epoch): shards for epoch, shards in listing['epochs'].items()}
        self.others, self.size = set(listing['others']), listing['size']

    def _list(self) -> dict[str, Any]:
        manifest = self.shard_format.manifest
        listing = {'epochs': {epoch: [] for epoch in manifest.stored_epochs}, 'others': [], 'size': 0}
        for name, file in sorted(self.source.files().items()):
            match = SHARD_PATH.fullmatch(name)
            epoch, shard = map(int, match.groups()) if match else (-1, -1)
            if not match:
                listing['others'].append(name)
            elif epoch in listing['epochs'] and shard < manifest.num_shards:
                listing['epochs'][epoch].append(shard)
                listing['size'] += file['size']
        return listing

    def lacking(self, epoch: int, shards: Iterable[int] | None = None) -> list[int]:
        """Those of these shards, by default of all, that are not on disk."""
        try:
            names = set(os.listdir(self.epoch_folder(epoch)))
        except FileNotFoundError:
            names = set()
        shards = range(self.shard_format.manifest.num_shards) if shards is None else shards
        return [shard for shard in shards if shard_name(shard) not in names]

    def fetch(
            self,
            epoch: int,
            shards: Sequence[int],
            threads: int = 1,
            patience: float | None = None,
            stop: Callable[[], bool] = bool,
            late: Callable[[str], None] = lambda reason: None,
    ) -> bool:
        """Bring shards of an epoch to disk, together with whoever else fetches them.

        Args:
            epoch: The epoch.
            shards: Which shards of it.
            threads: Downloads at a time.
            patience: Seconds without any shard after which it is given up, by default a day.
            stop: Is asked now and then whether to leave it.
            late: Is told why they are tried again.

        Returns:
            Whether all of them are on disk, which they are unless `stop` said otherwise.

        Raises:
            InputError: The store does not have a shard, or only a damaged one, or the disk is full; or the patience
                came to an end.
        """
        self._check_stored(epoch, shards)
        patience = PATIENCE if patience is None else patience
        waiting, running, damaged = deque(shards), {}, []
        failures, last, resume = 0, time.monotonic(), 0.
        with Leases() as leases, ThreadPoolExecutor(threads) as pool:
            while waiting or running:
                if stop():
                    return False
                for _ in range(len(waiting) if time.monotonic() >= resume else 0):
                    if len(running) == threads:
                        break
                    path = self.shard_path(epoch, shard := waiting.popleft())
                    if path.exists():
                        last = time.monotonic()
                    elif self._lease(leases, path):
                        running[pool.submit(self._download, epoch, shard)] = shard
                    else:
                        waiting.append(shard)
                if not running:
                    time.sleep(0.1)
                for future in wait(running, 0.2, FIRST_COMPLETED).done if running else ():
                    shard, error, now = running.pop(future), future.exception(), time.monotonic()
                    leases.release(self.shard_path(epoch, shard))
                    if error is None:
                        failures, last = 0, now
                    elif isinstance(error, Damaged):
                        damaged.append(str(error))
                    elif not isinstance(error, Unavailable):
                        raise error
                    else:
                        waiting.append(shard)
                        if now - last > patience:
                            raise InputError(
                                f'cannot fetch epoch {epoch} of {self.source}: {error}; nothing has come for '
                                f'{patience / 3600:.2g} hours')
                        if now >= resume:
                            # Of all that fail at a time, one counts.
                            failures += 1
                            resume = now + max(error.pause, min(2. ** min(failures, 10), MAX_PAUSE))
                        late(str(error))
        if damaged:
            raise InputError(damaged[0])
        return True

    def discard_damaged(self, epoch: int, shards: Iterable[int]) -> None:
        """Remove those of these shards that are on disk and not what they should be."""
        for path, shard in ((self.shard_path(epoch, shard), shard) for shard in shards):
            if path.exists():
                try:
                    self.shard_format.map(path, epoch, shard)
                except InputError:
                    path.unlink(missing_ok=True)

    def _check_stored(self, epoch: int, shards: Sequence[int]) -> None:
        absent = set(shards).difference(self.shards.get(epoch, ()))
        if absent and self.source.commit is None:
            self.look(anew=True)  # somebody may fill it
            absent.difference_update(self.shards.get(epoch, ()))
        if absent:
            how = 'push them with timm-tinyvit store push' if self.source.is_on_hub else \
                f'fill it to the end with timm-tinyvit fill --logits {self.source}'
            raise InputError(f'{self.source} has no epoch {epoch} yet: {len(absent)} of its shards are not there; '
                             f'{how}, or train on fewer --epochs')

    @staticmethod
    def _lease(leases: Leases, path: Path) -> bool:
        """Take the lease on a shard that is to be fetched, unless somebody else fetches it or has done so."""
        try:
            path.parent.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f'the folder {path.parent.parent} cannot be made: {error.strerror}; choose another '
                             f'--store-cache')
        if not leases.acquire(path):
            return False
        if path.exists():
            leases.release(path)
            return False
        return True

    def _download(self, epoch: int, shard: int) -> None:
        """Fetch one shard, check it, and put it into its place.

        Raises:
            Unavailable: It cannot be reached.
            Damaged: It came, several times, but never as it should be.
            InputError: It is refused, or the disk is full.
        """
        path = self.shard_path(epoch, shard)
        name = path.relative_to(self.folder).as_posix()

        def check(temporary: Path) -> None:
            try:
                self.shard_format.map(temporary, epoch, shard)
            except InputError:
                raise Damaged

        for attempt in range(MAX_ATTEMPTS):
            try:
                return self.source.download(name, path, self.shard_format.file_size(shard), check)
            except Damaged:
                time.sleep(min(attempt + 1, MAX_PAUSE))
        raise Damaged(f'{name} of {self.source} was fetched {MAX_ATTEMPTS} times and never was the shard that it '
                      f'should be; tell those who put it there, or use another store')


class HeldEpochs:
    """Epochs that this process keeps on disk by leases; those that no process keeps are removed.

    Args:
        cache: Where they are.
    """

    def __init__(self, cache: ShardCache):
        self.cache = cache
        self.epochs: list[int] = []
        self._leases = Leases()
        self._name = f'{READER}{secrets.token_hex(8)}'
        # A reader that is no more keeps nothing, also where its process goes on.
        weakref.finalize(self, self._leases.close)

    def set(self, epochs: Sequence[int]) -> None:
        """Keep these epochs from now on, and no other.

        Raises:
            InputError: The disk is full or may not be written.
        """
        folder = self.cache.folder
        # Nobody removes an epoch while another process takes its lease on it.
        with exclusive(folder / 'epochs'):
            for epoch in set(epochs) - set(self.epochs):
                self._leases.acquire(self.cache.epoch_folder(epoch) / self._name)
            for epoch in set(self.epochs) - set(epochs):
                self._leases.release(self.cache.epoch_folder(epoch) / self._name)
            self.epochs = list(epochs)
            kept = {self.cache.epoch_folder(epoch) for epoch in epochs}
            for epoch_folder in folder.glob('epoch-*'):
                if epoch_folder in kept:
                    self._leases.expire_in(epoch_folder, READER)
                else:
                    _remove_unless_kept(self._leases, epoch_folder)
        for other in set(folder.parent.iterdir()) - {folder}:
            # Nothing but what this package has put there: a link leads to what is somebody's own.
            if VERSION.fullmatch(other.name) and not other.is_symlink() and (other / MANIFEST_NAME).is_file():
                self._remove_version(other)

    def release(self) -> None:
        """Keep none of them any more, and leave them where they are."""
        self._leases.close()
        self.epochs = []

    def _remove_version(self, folder: Path) -> None:
        """Remove what is left of another version of the store, where nobody keeps an epoch of it."""
        with exclusive(folder / 'epochs'):
            if all([_remove_unless_kept(self._leases, epoch) for epoch in folder.glob('epoch-*')]):
                for file in folder.iterdir():
                    if file.is_file() and not file.name.startswith('.'):
                        file.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def _read_json(path: Path) -> dict[str, Any] | None:
    """What a file holds; None where there is none, or a damaged one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _remove_unless_kept(leases: Leases, folder: Path) -> bool:
    """Remove the shards of an epoch, unless a process that lives keeps them.

    Returns:
        Whether they are gone.
    """
    if folder.is_symlink() or not leases.expire_in(folder, READER):
        return False
    for file in folder.glob('shard-*.arrow'):
        file.unlink(missing_ok=True)
    remove_leftovers(folder)
    leases.expire_in(folder, 'shard-')
    # A reader without a lease on the epoch may be fetching into it just now.
    with suppress(OSError):
        folder.rmdir()
    return True
