"""RemoteStore: a logit store on the Hub that is read without being downloaded first.

`open_reader('hf://datasets/ORG/NAME')` pins the commit that is the newest now. Reading fetches what is not on disk.
Who trains calls `prefetch` with the epochs that it reads and with the next ones, and then `wait`: a process beside this
one fetches the former, then the latter, and removes from disk what was used. Nobody has to: whatever a reader lacks, it
fetches by itself.
"""

import os
from functools import cached_property
from pathlib import Path
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from huggingface_hub import constants

from ..base.errors import InputError
from ..base.files import check_no_link, remove_leftovers
from ..base.hub_client import is_hub_url, parse_hub_url
from ..base.leases import Leases
from .base import StoreReader
from .cache import HeldEpochs, HubCache, HubCommit
from .digests import digests_name
from .fetcher import NUM_DOWNLOADS, Fetcher
from .keys import FILE_NAME, KeyIndex
from .local import LogitStore
from .manifest import MANIFEST_NAME, MAX_MANIFEST_SIZE, Manifest, stored_epoch
from .projection import PROJECTION_NAME, Projection
from .reader import ShardStore
from .shard import epoch_name

__all__ = ['RemoteStore', 'check_content', 'content_of', 'open_reader', 'resolve_commit']

# Epochs on disk of a reader that does not say which come next.
NUM_KEPT = 2


def open_reader(
        location: str | Path,
        keep_epochs: int | None = None,
        cache_dir: str | Path | None = None,
) -> ShardStore:
    """Open a store for reading, on disk or on the Hub, without a look at its views.

    Args:
        location: A folder, or `hf://datasets/ORG/NAME[@REVISION]`.
        keep_epochs: Epochs of a store on the Hub that stay on disk, at least those in use; by default those in use
            and as many to come.
        cache_dir: Where they go; by default huggingface_hub's folder for assets, in HF_HOME.

    Raises:
        InputError: There is no store, or its manifest is damaged, or the Hub cannot be reached, or a folder of the
            cache is a link.
    """
    if not is_hub_url(str(location)):
        return LogitStore.open(location)
    source = resolve_commit(str(location))
    root = constants.HF_ASSETS_CACHE if cache_dir is None else cache_dir
    folder = Path(root).expanduser().absolute() / 'timm_tinyvit' / source.repo_id.replace('/', '--') / source.commit
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'the folder {folder} cannot be made: {error.strerror}; choose another --store-cache')
    # Leftovers of killed processes: temporary files, and leases on shards that are there.
    leases = Leases()
    for each in (folder, *folder.glob('epoch-*')):
        check_no_link(each)
        remove_leftovers(each)
        leases.clear(each)
    return RemoteStore(source, folder, _manifest(source, folder / MANIFEST_NAME), keep_epochs)


def resolve_commit(location: str) -> HubCommit:
    """The commit of a store on the Hub, the newest one where its URL names none.

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


class RemoteStore(ShardStore):
    """A commit of a store on the Hub, to read.

    Args:
        source: The commit.
        folder: The folder of its shards on this disk.
        manifest: Its manifest.
        keep_epochs: Epochs that stay on disk, see `open_reader`.
        prefetches: Whether `prefetch` says which epochs stay there; else they are those that were read last.
    """

    def __init__(
            self,
            source: HubCommit,
            folder: Path,
            manifest: Manifest,
            keep_epochs: int | None = None,
            prefetches: bool = False,
    ):
        super().__init__(str(source), folder, manifest)
        self.source = source
        self.keep_epochs = keep_epochs
        self._cache = HubCache(source, folder, self._format)
        self._prefetches = prefetches
        self._kept: list[int] = []  # epochs on disk; the one that was used last stands last
        self._held: HeldEpochs | None = None
        self._fetcher: Fetcher | None = None
        self._owner = os.getpid()

    def __reduce__(self) -> tuple:
        return RemoteStore, (self.source, self.folder, self.manifest, self.keep_epochs, self._prefetches)

    def prefetch(self, epochs: Sequence[int], then: Sequence[int] = ()) -> None:
        self._notice_fork()
        epochs = list(dict.fromkeys(epochs))
        then = [epoch for epoch in dict.fromkeys(then) if epoch not in epochs]
        num_kept = max(len(epochs), self.keep_epochs or len(epochs) + len(then))
        then = then[:num_kept - len(epochs)]
        before = [epoch for epoch in self._kept if epoch not in (*epochs, *then)]
        self._kept = [*before, *then, *epochs][-num_kept:]
        self.forget(*self._maps.keys() - set(self._kept))
        if self._held is not None:
            self._held.release()
            self._held = None
        self._prefetches = True
        if self._fetcher is None:
            self._fetcher = Fetcher(self._cache)
        self._fetcher.order(epochs, then, self._kept)

    def wait(self, stop: Callable[[], bool] = bool) -> bool:
        self._notice_fork()
        return self._fetcher is None or self._fetcher.wait(stop)

    def read(self, epoch: int, rows: Sequence[int]) -> np.ndarray:
        self.forget_changed(or_removed=True)
        self._bring(epoch, self.unmapped(epoch, rows))
        try:
            return super().read(epoch, rows)
        except InputError:
            # Somebody removed the epoch between two looks, or the disk has damaged a shard.
            shards = self.unmapped(epoch, rows)
            self._cache.discard_damaged(epoch, shards)
            if not self._cache.lacking(epoch, shards):
                raise
            self._bring(epoch, shards)
            return super().read(epoch, rows)

    def open_keys(self) -> KeyIndex:
        if not KeyIndex.exists(self.folder):
            self.source.download(FILE_NAME, self.folder / FILE_NAME)
        return super().open_keys()

    def open_projection(self) -> Projection | None:
        if self.manifest.features.get('projection') and not (self.folder / PROJECTION_NAME).exists():
            self.source.download(PROJECTION_NAME, self.folder / PROJECTION_NAME)
        return super().open_projection()

    def read_digests(self, shard: int) -> np.ndarray | None:
        name = digests_name(shard)
        if not (self.folder / name).exists() and name in self._files_on_hub:
            self.source.download(name, self.folder / name)
        return super().read_digests(shard)

    @cached_property
    def _files_on_hub(self) -> set[str]:
        return set(self.source.files())

    def size(self) -> int:
        """Bytes of all shards on the Hub."""
        return sum(int(sizes[sizes > 0].sum()) for sizes in self._cache.sizes.values())

    def _stored(self, epoch: int) -> list[int]:
        return self._cache.on_hub(epoch)

    def _verify_shard(self, epoch: int, shard: int) -> Iterator[str]:
        try:
            self._keep(epoch)
            if self._cache.lacking(epoch, [shard]):
                self._bring(epoch, self._stored(epoch))
        except InputError as error:
            if self._cache.lacking(epoch, [shard]):
                yield str(error)
                return
        yield from super()._verify_shard(epoch, shard)

    def _bring(self, epoch: int, shards: list[int]) -> None:
        """Have these shards of an epoch on disk."""
        self._keep(epoch)
        if shards and (lacking := self._cache.lacking(epoch, shards)):
            self._cache.fetch(epoch, lacking, NUM_DOWNLOADS)

    def _keep(self, epoch: int) -> None:
        """Hold an epoch that is read on disk, in place of the one that was not read for longest."""
        if self._prefetches:
            return
        self._notice_fork()
        if self._held is None:
            self._held = HeldEpochs(self._cache)
        self._kept = [*(other for other in self._kept if other != epoch), epoch][-(self.keep_epochs or NUM_KEPT):]
        if epoch not in self._held.epochs:
            self._held.set(self._kept)
            self.forget_changed(or_removed=True, at_once=True)

    def _notice_fork(self) -> None:
        """Leave leases and fetcher to the process that this one was forked from."""
        if self._owner != os.getpid():
            self._owner, self._kept, self._held, self._fetcher = os.getpid(), [], None, None


def content_of(store: StoreReader) -> dict[str, list]:
    """What a store holds now, its epochs and commits on the Hub, to be compared with when a run is resumed."""
    stored = store.manifest.stored_epochs
    commits = [part.path if isinstance(part, RemoteStore) else '' for part in store.stores]
    return {'epochs': [stored.start, len(stored)], 'commits': commits}


def check_content(store: StoreReader, before: dict[str, list] | None, num_epochs: int) -> None:
    """Refuse a store on the Hub that has changed in what a run learns from.

    Args:
        store: The store.
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
    for part, commit in zip(store.stores, before['commits']):
        if reason is None and isinstance(part, RemoteStore) and commit not in ('', part.path):
            folders = {epoch_name(epoch) for epoch in epochs}
            hashes = [
                {(path, file.lfs.sha256 if file.lfs else file.blob_id) for path, file in source.files().items()
                 if path.partition('/')[0] in folders}
                for source in (resolve_commit(commit), part.source)]
            if changed := sorted({path for path, _ in hashes[0] ^ hashes[1]}):
                reason = f'{len(changed)} of its shards are others, first {changed[0]}'
    if reason:
        raise InputError(
            f'the store {store.path} has changed since this run began: {reason}; give --logits '
            f'{" ".join(commit or str(part.path) for part, commit in zip(store.stores, before["commits"]))} to go on '
            f'with what it was, or start another --experiment')
