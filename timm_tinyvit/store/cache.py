"""HubCache: shards of a store on the Hub, in a folder that processes share, there when they are read and gone after.

A shard is fetched to a temporary file, checked whole and renamed: one that is in the folder is complete. Any number of
ranks, loader workers and trainings use one folder. Each shard is fetched by one of them, who has a lease on it, and an
epoch stays on disk as long as a process that lives has a lease on it; one that was removed nevertheless is fetched
again by whoever reads it.

A connection that is lost, or a Hub in trouble, is tried again with growing pauses for a day: a training outlives it as
long as the epoch in use is on disk.
"""

import hashlib
import json
import os
import re
import secrets
import time
import weakref
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from huggingface_hub import HfApi, HfFileMetadata, constants, get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, httpx

from ..base.errors import InputError
from ..base.files import remove_leftovers, write_atomic
from ..base.hub_client import HubUrl, hub_errors, is_transient, reason_of, requested_wait, retried
from ..base.leases import Leases, exclusive
from ..version import __version__
from .manifest import MANIFEST_NAME
from .shard import SHARD_PATH, ShardFormat, epoch_name, shard_name

__all__ = ['HeldEpochs', 'HubCache', 'HubCommit']

# Seconds before each further attempt to open a store: five minutes, as somebody may be looking.
OPEN_PAUSES = (1., 2., 4., 8., 16., 30., 60., 60., 60., 60.)
# Seconds without anything fetched after which an epoch that is needed is given up.
PATIENCE = 24 * 3600.
MAX_PAUSE = 60.
# Downloads of a shard that does not come as it should be.
MAX_ATTEMPTS = 3
TIMEOUT = httpx.Timeout(30., connect=30.)
READER = 'reader-'
# The hash of a commit, and the name of its folder.
COMMIT = re.compile('[0-9a-f]{40}')


@dataclass(frozen=True)
class HubCommit:
    """A commit of a dataset repo: what it holds never changes.

    Args:
        repo_id: ORG/NAME.
        commit: Its hash, 40 hexadecimal digits.
    """
    repo_id: str
    commit: str

    def __str__(self) -> str:
        return f'hf://datasets/{self.repo_id}@{self.commit}'

    @classmethod
    def resolve(cls, url: HubUrl, file: str) -> 'HubCommit':
        """The commit that a revision stands for now.

        Args:
            url: A dataset repo.
            file: A file that it must have there.

        Raises:
            InputError: There is no such repo, revision or file, or the Hub cannot be reached.
        """
        commit = cls(url.repo_id, url.revision or 'main')
        if COMMIT.fullmatch(commit.commit):
            return commit
        return commit.at(commit.metadata(file).commit_hash)

    def at(self, commit: object) -> 'HubCommit':
        """The commit of this name, which the Hub has given, and which becomes the name of a folder.

        Raises:
            InputError: It is none.
        """
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
            raise InputError(f'the Hub at {constants.ENDPOINT} names no commit of {self}, but {ascii(commit)[:60]}; '
                             f'expected 40 hexadecimal digits, see what HF_ENDPOINT is and what stands between')
        return HubCommit(self.repo_id, commit)

    def metadata(self, path: str) -> HfFileMetadata:
        """Size and hash of a file.

        Raises:
            InputError: There is no such repo, revision or file, or the Hub cannot be reached.
        """

        def look() -> HfFileMetadata:
            try:
                return get_hf_file_metadata(self._address(path))
            except EntryNotFoundError:
                raise InputError(f'{self} has no {path}: it is no logit store, or was not pushed to its end; give '
                                 f'another name, or push it again')

        return retried(f'open {self}', look, OPEN_PAUSES)

    @contextmanager
    def stream(self, path: str) -> Iterator[Iterator[bytes]]:
        """The bytes of a file, as they come; whatever goes wrong is raised as huggingface_hub does."""
        headers = build_hf_headers(library_name='timm_tinyvit', library_version=__version__)
        # No copy of a proxy, and no compression: these are the bytes that were pushed.
        headers |= {'Accept-Encoding': 'identity', 'Cache-Control': 'no-cache'}
        with get_session().stream('GET', self._address(path), headers=headers, timeout=TIMEOUT) as response:
            hf_raise_for_status(response)
            yield response.iter_bytes(1 << 20)

    def download(self, path: str, file: Path, most: int | None = None) -> None:
        """Write a file of it to disk, whole and as it was pushed, or not at all.

        Args:
            path: The file in the repo.
            file: Where to.
            most: Bytes that it may have.

        Raises:
            InputError: There is no such file, it is too large or does not come as it was pushed, the Hub cannot be
                reached, or the disk is full.
        """
        metadata = self.metadata(path)
        if most is not None and (metadata.size or 0) > most:
            raise InputError(f'{path} of {self} has {metadata.size} bytes, expected {most} at most; it is none of a '
                             f'logit store')

        def check(temporary: Path) -> None:
            if not _has_hash(temporary, metadata.etag or ''):
                raise _Damaged

        def fetch() -> None:
            for _ in range(MAX_ATTEMPTS):
                with suppress(_Damaged), self.stream(path) as parts:
                    return write_atomic(file, parts, check)
            raise InputError(f'{path} of {self} was fetched {MAX_ATTEMPTS} times, and never as it was pushed; see what '
                             f'stands between this machine and the Hub')

        retried(f'fetch {path} of {self}', fetch, OPEN_PAUSES)

    def files(self) -> dict[str, RepoFile]:
        """All of its files by their paths.

        Raises:
            InputError: There is no such commit, or the Hub cannot be reached.
        """

        def fetch() -> dict[str, RepoFile]:
            tree = HfApi().list_repo_tree(self.repo_id, repo_type='dataset', revision=self.commit, recursive=True)
            return {item.path: item for item in tree if isinstance(item, RepoFile)}

        return retried(f'list the files of {self}', fetch, OPEN_PAUSES)

    def _address(self, path: str) -> str:
        return hf_hub_url(self.repo_id, path, repo_type='dataset', revision=self.commit)


class _Unavailable(Exception):
    """The Hub cannot be reached, which may pass, and wants to be left alone for some seconds."""

    def __init__(self, reason: str, pause: float):
        super().__init__(reason)
        self.pause = pause


class _Damaged(Exception):
    """What was fetched is not what it should be."""


class HubCache:
    """The shards of one commit of a store.

    Args:
        source: The commit.
        folder: Where its files go on this disk.
        shard_format: The format of its shards.

    Attributes:
        sizes: Bytes of each shard on the Hub by epoch, int64 [num_shards]; -1 for one that is not there.
    """

    def __init__(self, source: HubCommit, folder: Path, shard_format: ShardFormat):
        self.source = source
        self.folder = folder
        self.shard_format = shard_format
        self.sizes = self._list()

    def shard_path(self, epoch: int, shard: int) -> Path:
        return self.epoch_folder(epoch) / shard_name(shard)

    def on_hub(self, epoch: int) -> list[int]:
        """The shards of an epoch that the Hub has."""
        return np.flatnonzero(self.sizes.get(epoch, np.empty(0)) >= 0).tolist()

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
            count: Callable[[int], None] = lambda size: None,
    ) -> bool:
        """Bring shards of an epoch to disk, together with whoever else fetches them.

        Args:
            epoch: The epoch.
            shards: Which shards of it.
            threads: Downloads at a time.
            patience: Seconds without any shard after which it is given up, by default a day.
            stop: Is asked now and then whether to leave it.
            late: Is told why the Hub is tried again.
            count: Is told the bytes of each shard that has come.

        Returns:
            Whether all of them are on disk, which they are unless `stop` said otherwise.

        Raises:
            InputError: The Hub does not have a shard, or only a damaged one, or the disk is full; or the patience came
                to an end.
        """
        if absent := set(shards).difference(self.on_hub(epoch)):
            raise InputError(
                f'{self.source} has no epoch {epoch} yet: {len(absent)} of its shards are not there; push them '
                f'with timm-tinyvit store push, or train on fewer --epochs')
        patience = PATIENCE if patience is None else patience
        waiting, running = deque(shards), {}
        damaged: list[str] = []
        failures, last, resume = 0, time.monotonic(), 0.
        with Leases() as leases, ThreadPoolExecutor(threads) as pool:
            while waiting or running:
                if stop():
                    return False
                elsewhere = []
                while waiting and len(running) < threads and time.monotonic() >= resume:
                    shard = waiting.popleft()
                    path = self.shard_path(epoch, shard)
                    if path.exists():
                        count(int(self.sizes[epoch][shard]))
                        last = time.monotonic()
                    elif self._lease(leases, path):
                        running[pool.submit(self._download, epoch, shard)] = shard
                    else:
                        elsewhere.append(shard)
                waiting.extend(elsewhere)
                if not running:
                    time.sleep(0.1)
                for future in wait(running, 0.2, FIRST_COMPLETED).done if running else ():
                    shard = running.pop(future)
                    leases.release(self.shard_path(epoch, shard))
                    error = future.exception()
                    now = time.monotonic()
                    if error is None:
                        failures, last = 0, now
                        count(int(self.sizes[epoch][shard]))
                    elif isinstance(error, _Damaged):
                        damaged.append(str(error))
                    elif not isinstance(error, _Unavailable):
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
        for shard in shards:
            path = self.shard_path(epoch, shard)
            if path.exists():
                try:
                    self.shard_format.map(path, epoch, shard)
                except InputError:
                    path.unlink(missing_ok=True)

    def epoch_folder(self, epoch: int) -> Path:
        return self.folder / epoch_name(epoch)

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
            _Unavailable: The Hub cannot be reached.
            _Damaged: It came, several times, but never as it should be.
            InputError: The Hub refuses, or the disk is full.
        """
        path = self.shard_path(epoch, shard)
        name = path.relative_to(self.folder).as_posix()

        def check(temporary: Path) -> None:
            try:
                self.shard_format.map(temporary, epoch, shard)
            except InputError:
                raise _Damaged

        for attempt in range(MAX_ATTEMPTS):
            try:
                with self.source.stream(name) as parts:
                    write_atomic(path, _bounded(parts, int(self.sizes[epoch][shard])), check)
                return
            except InputError:
                raise
            except _Damaged:
                time.sleep(attempt + 1)
            except Exception as error:
                if is_transient(error) or isinstance(error, httpx.ProxyError):
                    # Without what the user is to do: it is tried again here.
                    reason = (reason_of(error) or type(error).__name__).partition(';')[0]
                    raise _Unavailable(reason, requested_wait(error)) from None
                with hub_errors(f'fetch {name} of {self.source}'):
                    raise
        raise _Damaged(f'{name} of {self.source} was fetched {MAX_ATTEMPTS} times and never was the shard that it '
                       f'should be; tell those who pushed it, or use another store')

    def _list(self) -> dict[int, np.ndarray]:
        """The shards that are on the Hub, from a list in the folder if one of the processes has made it."""
        path = self.folder / 'shards.json'
        if (sizes := _read_json(path)) is None:
            with exclusive(path):
                if (sizes := _read_json(path)) is None:
                    sizes = self._list_hub()
                    write_atomic(path, json.dumps(sizes).encode())
        return {int(epoch): np.array(row) for epoch, row in sizes.items()}

    def _list_hub(self) -> dict[int, list[int]]:
        manifest = self.shard_format.manifest
        sizes = {epoch: [-1] * manifest.num_shards for epoch in manifest.stored_epochs}
        for name, file in self.source.files().items():
            match = SHARD_PATH.fullmatch(name)
            epoch, shard = map(int, match.groups()) if match else (-1, -1)
            if epoch in sizes and 0 <= shard < manifest.num_shards:
                sizes[epoch][shard] = file.size
        return sizes


class HeldEpochs:
    """Epochs that this process keeps on disk by leases; those that no process keeps are removed.

    Args:
        cache: Where they are.
    """

    def __init__(self, cache: HubCache):
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
            if COMMIT.fullmatch(other.name) and not other.is_symlink() and (other / MANIFEST_NAME).is_file():
                self._remove_commit(other)

    def release(self) -> None:
        """Keep none of them any more, and leave them where they are."""
        self._leases.close()
        self.epochs = []

    def _remove_commit(self, folder: Path) -> None:
        """Remove what is left of another commit of the repo, where nobody keeps an epoch of it."""
        with exclusive(folder / 'epochs'):
            if all([_remove_unless_kept(self._leases, epoch) for epoch in folder.glob('epoch-*')]):
                for file in folder.iterdir():
                    if file.is_file() and not file.name.startswith('.'):
                        file.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def _bounded(parts: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The parts of a file of this size, which must not fill the disk if it is another one."""
    for part in parts:
        size -= len(part)
        if size < 0:
            raise _Damaged
        yield part


def _read_json(path: Path) -> dict[str, list[int]] | None:
    """What a file holds; None where there is none, or a damaged one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _has_hash(file: Path, expected: str) -> bool:
    """Whether a file has the hash by which the Hub knows it, one of git or SHA-256; true for any other kind."""
    if re.fullmatch('[0-9a-f]{64}', expected):
        state = hashlib.sha256()
    elif re.fullmatch('[0-9a-f]{40}', expected):
        state = hashlib.sha1(f'blob {file.stat().st_size}\0'.encode(), usedforsecurity=False)
    else:
        return True
    with open(file, 'rb') as stream:
        while part := stream.read(1 << 20):
            state.update(part)
    return state.hexdigest() == expected


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
