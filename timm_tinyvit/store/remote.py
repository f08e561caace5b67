"""HubStore: a logit store on the Hub that is read without being downloaded first.

`open_store_at('hf://datasets/ORG/NAME')` pins the commit that is the newest now. Reading fetches what is not on disk.
Who trains calls `prefetch` with the epochs that it reads and with the next ones, and then `wait`: a process beside this
one fetches the former, then the latter, and removes from disk what was used. Nobody has to: whatever a reader lacks, it
fetches by itself.
"""

import os
from pathlib import Path
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import constants

from ..base.errors import InputError
from ..base.files import remove_stale
from ..base.hub_client import is_hub_url, parse_hub_url
from ..base.leases import Claims
from .cache import HeldEpochs, HubCache, HubCommit
from .ensemble import Ensemble
from .fetcher import NUM_DOWNLOADS, Fetcher
from .keys import FILE_NAME, KeyIndex
from .local import MANIFEST_NAME, MAX_MANIFEST_SIZE, LogitStore
from .manifest import Manifest, stored_epoch

__all__ = ['HubStore', 'check_content', 'content_of', 'open_store_at', 'pin_stores']

# Epochs that a reader keeps who does not say which come next.
NUM_KEPT = 2


def open_store_at(
        location: str | Path,
        keep_epochs: int | None = None,
        cache_dir: str | Path | None = None,
) -> LogitStore:
    """Open a store for reading, on disk or on the Hub.

    Args:
        location: A folder, or `hf://datasets/ORG/NAME[@REVISION]`.
        keep_epochs: Epochs of a store on the Hub that stay on disk, at least those in use; by default those in use
            and as many to come.
        cache_dir: Where they go; by default huggingface_hub's folder for assets, in HF_HOME.

    Raises:
        InputError: There is no store, or its manifest is damaged, or the Hub cannot be reached.
    """
    if not is_hub_url(str(location)):
        return LogitStore.open(location)
    source = _commit_of(str(location))
    root = constants.HF_ASSETS_CACHE if cache_dir is None else cache_dir
    folder = Path(root).expanduser().absolute() / 'timm_tinyvit' / source.repo_id.replace('/', '--') / source.commit
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'the folder {folder} cannot be made: {error.strerror}; choose another --store-cache')
    # What killed processes left: files written half, and claims on whole ones.
    claims = Claims()
    for place in (folder, *folder.glob('epoch-*')):
        remove_stale(place)
        claims.clear(place)
    return HubStore(source, folder, _manifest(source, folder / MANIFEST_NAME), keep_epochs)


def pin_stores(locations: Sequence[str], accelerator: Accelerator) -> list[str]:
    """The same stores for all processes of a launch, those on the Hub with the commit that is the newest now.

    Each process by itself would find another one where somebody pushes meanwhile.

    Args:
        locations: Folders, or `hf://datasets/ORG/NAME[@REVISION]`.
        accelerator: Knows the processes, all of which call this.

    Raises:
        InputError: There is no such repo or revision, or the Hub cannot be reached; on all of them.
    """
    found: list[list[str] | InputError] = [list(locations)]
    if accelerator.is_main_process:
        try:
            found = [[str(_commit_of(place)) if is_hub_url(place) else place for place in locations]]
        except InputError as error:
            found = [InputError(str(error))]
    broadcast_object_list(found)
    if isinstance(found[0], InputError):
        raise found[0]
    return found[0]


def _commit_of(location: str) -> HubCommit:
    """The commit of a store on the Hub.

    Raises:
        InputError: It names no store, or there is none, or the Hub cannot be reached.
    """
    url = parse_hub_url(location)
    if url.repo_type != 'dataset' or url.path:
        raise InputError(f'{location} is no store on the Hub; expected hf://datasets/ORG/NAME, or with @REVISION')
    return HubCommit.resolve(url, MANIFEST_NAME)


def _manifest(source: HubCommit, file: Path) -> Manifest:
    """The manifest of a store on the Hub, from this file if it is there and not damaged."""
    for is_last in (False, True):
        if is_last or not file.exists():
            source.download(MANIFEST_NAME, file, MAX_MANIFEST_SIZE)
        try:
            return Manifest.from_json(file.read_text(errors='replace'), f'{MANIFEST_NAME} of {source}')
        except (InputError, OSError):
            if is_last:
                raise


class HubStore(LogitStore):
    """A commit of a store on the Hub with the reading side of a `LogitStore`.

    Args:
        source: The commit.
        folder: The folder of its shards on this disk.
        manifest: Its manifest.
        keep_epochs: Epochs that stay on disk, see `open_store_at`.

    Attributes:
        path: Where it is, as text.
        source: The commit.
    """

    def __init__(
            self,
            source: HubCommit,
            folder: Path,
            manifest: Manifest,
            keep_epochs: int | None = None,
            is_told: bool = False,
    ):
        super().__init__(str(source), manifest)
        self.source = source
        self.keep_epochs = keep_epochs
        self._cache = HubCache(source, folder, self._format)
        # Whether `prefetch` was called; else a reader keeps on disk what it has read last.
        self._is_told = is_told
        self._used: list[int] = []  # the one that was used last stands last
        self._held: HeldEpochs | None = None
        self._owner = os.getpid()
        self._fetcher: Fetcher | None = None
        # Of each mapped epoch the shards that were seen on disk, and one of them with its inode.
        self._there: dict[int, np.ndarray] = {}
        self._sample: dict[int, tuple[Path, int]] = {}

    def __getstate__(self) -> tuple:
        return self.source, self._cache.folder, self.manifest, self.keep_epochs, self._is_told

    def shard_path(self, epoch: int, shard: int) -> Path:
        return self._cache.shard_path(epoch, shard)

    def prefetch(self, epochs: Sequence[int], then: Sequence[int] = ()) -> None:
        self._notice_fork()
        epochs = list(dict.fromkeys(epochs))
        then = [epoch for epoch in dict.fromkeys(then) if epoch not in epochs]
        keep = max(len(epochs), self.keep_epochs or len(epochs) + len(then))
        then = then[:keep - len(epochs)]
        before = [epoch for epoch in self._used if epoch not in (*epochs, *then)]
        self._used = [*before[max(0, len(before) + len(epochs) + len(then) - keep):], *then, *epochs]
        for epoch in set(self._mapped) - set(self._used):
            self._forget(epoch)
        if self._held is not None:
            self._held.release()
            self._held = None
        self._is_told = True
        if self._fetcher is None:
            self._fetcher = Fetcher(self._cache)
        self._fetcher.order(epochs, then, self._used)

    def wait(self, stop: Callable[[], bool] = bool) -> bool:
        self._notice_fork()
        return self._fetcher is None or self._fetcher.wait(stop)

    def missing(self, epochs: Iterable[int]) -> list[tuple[int, int]]:
        """The (epoch, shard) pairs of these epochs that are not on the Hub."""
        absent = np.full(self.manifest.num_shards, -1)
        return [
            (epoch, shard) for epoch in epochs
            for shard in np.flatnonzero(self._cache.sizes.get(epoch, absent) < 0).tolist()]

    def check_files(self, epochs: Iterable[int]) -> None:
        """Does nothing: shards are checked whole when they are fetched."""

    def size(self) -> int:
        """Bytes of all shards on the Hub."""
        return sum(int(sizes[sizes > 0].sum()) for sizes in self._cache.sizes.values())

    def open_keys(self) -> KeyIndex:
        if not KeyIndex.exists(self._cache.folder):
            self.source.download(FILE_NAME, self._cache.folder / FILE_NAME)
        return KeyIndex.open(self._cache.folder, self.manifest)

    def extend(self, epochs: int) -> None:
        raise self._read_only()

    def write_shard(self, epoch: int, shard: int, records: np.ndarray) -> None:
        raise self._read_only()

    def remove_stale(self) -> None:
        """Does nothing: what killed processes left aside is removed when a store is opened."""

    def read(self, epoch: int, indices: Sequence[int]) -> np.ndarray:
        indices = np.asarray(indices, dtype=np.int64)
        self._let_go()
        inside = indices[(0 <= indices) & (indices < self.manifest.num_samples)]
        shards = np.unique(inside // self.manifest.shard_size)
        self._bring(epoch, shards)
        try:
            return super().read(epoch, indices)
        except InputError:
            # Somebody removed the epoch between two looks, or the disk has damaged a shard.
            self._cache.discard_damaged(epoch, shards.tolist())
            if not self._cache.lacking(epoch, shards.tolist()):
                raise
            self._forget(epoch)
            self._bring(epoch, shards)
            return super().read(epoch, indices)
        finally:
            if epoch not in self._sample and len(shards):
                path = self.shard_path(epoch, int(shards[0]))
                self._sample[epoch] = path, _inode(path)

    def _bring(self, epoch: int, shards: np.ndarray) -> None:
        """Have these shards of an epoch on disk."""
        self._use(epoch)
        there = self._there.setdefault(epoch, np.zeros(self.manifest.num_shards, dtype=bool))
        unseen = shards[~there[shards]].tolist()
        if unseen:
            lacking = self._cache.lacking(epoch, unseen)
            if lacking:
                self._cache.fetch(epoch, lacking, NUM_DOWNLOADS)
            there[unseen] = True

    def _use(self, epoch: int) -> None:
        """Keep an epoch on disk where nobody says which ones are in use, and give up what was used before."""
        if self._is_told:
            return
        self._notice_fork()
        if self._held is None:
            self._held = HeldEpochs(self._cache)
        is_new = epoch not in self._held.epochs
        before = [other for other in self._held.epochs if other != epoch]
        self._held.epochs = [*before, epoch]
        if is_new:
            self._held.set([*before, epoch][-(self.keep_epochs or NUM_KEPT):])
            self._let_go()

    def _notice_fork(self) -> None:
        """Leave claims and fetcher to the process that this one was forked from."""
        if self._owner != os.getpid():
            self._owner, self._held, self._fetcher = os.getpid(), None, None

    def _let_go(self) -> None:
        """Unmap the epochs that were removed from disk: as long as they are mapped, the disk is not free."""
        for epoch, (path, inode) in list(self._sample.items()):
            if inode is None or _inode(path) != inode:
                self._forget(epoch)

    def _forget(self, epoch: int) -> None:
        for entries in (self._mapped, self._there, self._sample):
            entries.pop(epoch, None)

    def _verify_shard(self, epoch: int, shard: int) -> Iterator[str]:
        try:
            self._use(epoch)
            if self._cache.lacking(epoch, [shard]):
                lacking = self._cache.lacking(epoch)
                self._cache.fetch(epoch, [other for other in lacking if self._cache.sizes[epoch][other] >= 0],
                                  NUM_DOWNLOADS)
        except InputError as error:
            if self._cache.lacking(epoch, [shard]):
                yield str(error)
                return
        yield from super()._verify_shard(epoch, shard)

    def _files(self, epoch: int) -> set[str]:
        sizes = self._cache.sizes.get(epoch)
        return set() if sizes is None else {self.shard_path(epoch, shard).name for shard in np.flatnonzero(sizes >= 0)}

    def _read_only(self) -> InputError:
        return InputError(f'{self.path} is on the Hub and can only be read; fill a store in a folder, and push that '
                          f'with save_logits --push-to-hub')


def _inode(path: Path) -> int | None:
    """Number of a file, None where there is none."""
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


def content_of(store: LogitStore | Ensemble) -> dict[str, list]:
    """What a store, or several of them, hold now, to be compared with what they hold when a run is resumed."""
    stored = store.manifest.stored_epochs
    commits = [part.path if isinstance(part, HubStore) else '' for part in _parts(store)]
    return {'epochs': [stored.start, len(stored)], 'commits': commits}


def check_content(store: LogitStore | Ensemble, before: dict[str, list] | None, num_epochs: int) -> None:
    """Refuse a store on the Hub that has changed in what a run learns from.

    Args:
        store: The store, or several.
        before: Its `content_of` when the run left off; None where there was none.
        num_epochs: Epochs of the run.

    Raises:
        InputError: Some epoch of the run would be another one, or other shards.
    """
    now = content_of(store)
    if before in (None, now) or not any(before['commits']) or not any(now['commits']):
        return
    first, count = before['epochs']
    stored = store.manifest.stored_epochs
    epochs = [stored_epoch(stored, epoch) for epoch in range(num_epochs)]
    reason = None
    if epochs != [first + epoch % count for epoch in range(num_epochs)]:
        reason = f'it had epochs {first}:{first + count} and has {stored.start}:{stored.stop}'
    for part, commit in zip(_parts(store), before['commits']):
        if reason is None and isinstance(part, HubStore) and commit not in ('', part.path):
            source = HubCommit.resolve(parse_hub_url(commit), MANIFEST_NAME)
            folders = {part.shard_path(epoch, 0).parent.name for epoch in epochs}
            there, here = (
                {path: file.lfs.sha256 if file.lfs else file.blob_id for path, file in files.items()
                 if path.partition('/')[0] in folders}
                for files in (source.files(), part.source.files()))
            other = [path for path in {**there, **here} if there.get(path) != here.get(path)]
            if other:
                reason = f'{len(other)} of its shards are others, first {other[0]}'
    if reason:
        raise InputError(
            f'the store {store.path} has changed since this run began: {reason}; give --logits '
            f'{" ".join(commit or str(part.path) for part, commit in zip(_parts(store), before["commits"]))} to go on '
            f'with what it was, or start another --experiment')


def _parts(store: LogitStore | Ensemble) -> list[LogitStore]:
    return store.stores if isinstance(store, Ensemble) else [store]
