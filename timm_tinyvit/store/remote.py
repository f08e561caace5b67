"""RemoteStore: a logit store behind a URL that is read without being downloaded first.

`open_reader('hf://datasets/ORG/NAME')` pins the commit that is the newest now; `s3://BUCKET/NAME` and the like need no
commit, as a shard has the identity of its store in it. Reading fetches what is not on disk. Who trains calls
`prefetch` with the epochs that it reads and with the next ones, and then `wait`: a process beside this one fetches the
former, then the latter, and removes from disk what was used. Nobody has to: whatever a reader lacks, it fetches by
itself.
"""

import os
from contextlib import suppress
from pathlib import Path
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from huggingface_hub import constants

from ..base.errors import InputError
from ..base.files import check_no_link, remove_leftovers, write_atomic
from ..base.leases import Leases
from ..base.remote_folder import RemoteFolder, is_remote
from .base import StoreReader
from .cache import LISTING_NAME, HeldEpochs, ShardCache
from .fetcher import NUM_DOWNLOADS, Fetcher
from .local import LogitStore
from .manifest import MANIFEST_NAME, MAX_MANIFEST_SIZE, Manifest, stored_epoch
from .reader import ShardStore
from .shard import epoch_name

__all__ = ['RemoteStore', 'check_content', 'content_of', 'open_reader']

# Epochs on disk of a reader that does not say which come next.
NUM_KEPT = 2


def open_reader(
        location: str | Path,
        keep_epochs: int | None = None,
        cache_dir: str | Path | None = None,
        kind: 'type[RemoteStore] | None' = None,
) -> ShardStore:
    """Open a store for reading, on disk or behind a URL, without a look at its views.

    Args:
        location: A folder, `hf://datasets/ORG/NAME[@REVISION]`, or a URL of any file system that fsspec knows.
        keep_epochs: Epochs of a store behind a URL that stay on disk, at least those in use; by default those in use
            and as many to come.
        cache_dir: Where they go; by default huggingface_hub's folder for assets, in HF_HOME.
        kind: What to make of one behind a URL; by default a reader.

    Raises:
        InputError: There is no store, or its manifest is damaged, or it cannot be reached, or a folder of the cache is
            a link.
    """
    if not is_remote(location):
        return LogitStore.open(location)
    source = RemoteFolder.resolve(str(location))
    places = Path(constants.HF_ASSETS_CACHE if cache_dir is None else cache_dir).expanduser().absolute()
    places = places / 'timm_tinyvit' / source.name
    known = None
    if source.commit is not None:
        # What a commit holds stays as it is.
        with suppress(InputError, OSError):
            text = (places / source.commit / MANIFEST_NAME).read_text(errors='replace')
            known = Manifest.from_json(text, f'{MANIFEST_NAME} of {source}')
    manifest = known or read_manifest(source)
    folder = places / (source.commit or manifest.identity)
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
    if known is None:
        write_atomic(folder / MANIFEST_NAME, manifest.to_json().encode())
    if source.commit is None:
        (folder / LISTING_NAME).unlink(missing_ok=True)
    return (kind or RemoteStore)(source, folder, manifest, keep_epochs)


def read_manifest(source: RemoteFolder) -> Manifest:
    """The manifest of a store behind a URL.

    Raises:
        InputError: There is none, it is damaged, or it cannot be reached.
    """
    content = source.read(MANIFEST_NAME, MAX_MANIFEST_SIZE)
    if content is None:
        raise InputError(f'{source} has no {MANIFEST_NAME}: it is no logit store, or was not pushed to its end; give '
                         f'another name, or push it again')
    return Manifest.from_json(content.decode(errors='replace'), f'{MANIFEST_NAME} of {source}')


class RemoteStore(ShardStore):
    """A store behind a URL, to read.

    Args:
        source: Where it is.
        folder: The folder of its shards on this disk.
        manifest: Its manifest.
        keep_epochs: Epochs that stay on disk, see `open_reader`.
        prefetches: Whether `prefetch` says which epochs stay there; else they are those that were read last.
    """

    def __init__(
            self,
            source: RemoteFolder,
            folder: Path,
            manifest: Manifest,
            keep_epochs: int | None = None,
            prefetches: bool = False,
    ):
        super().__init__(str(source), folder, manifest)
        self.source = source
        self.keep_epochs = keep_epochs
        self._cache = ShardCache(source, folder, self._format)
        self._prefetches = prefetches
        self._kept: list[int] = []  # epochs on disk; the one that was used last stands last
        self._held: HeldEpochs | None = None
        self._fetcher: Fetcher | None = None
        self._owner = os.getpid()

    def __reduce__(self) -> tuple:
        return type(self), (self.source, self.folder, self.manifest, self.keep_epochs, self._prefetches)

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

    def size(self) -> int:
        """Bytes of all shards that the remote store has."""
        return self._cache.size

    def _stored(self, epoch: int) -> list[int]:
        return self._cache.shards.get(epoch, [])

    def _have(self, name: str) -> None:
        if name in self._cache.others and not (self.folder / name).exists():
            write_atomic(self.folder / name, self.source.read(name) or b'')

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
    commits = [part.path if _is_pinned(part) else '' for part in store.stores]
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
        if reason is None and _is_pinned(part) and commit not in ('', part.path):
            folders = {epoch_name(epoch) for epoch in epochs}
            hashes = [
                {(path, file['blob_id']) for path, file in source.files().items() if path.partition('/')[0] in folders}
                for source in (RemoteFolder.resolve(commit), part.source)]
            if changed := sorted({path for path, _ in hashes[0] ^ hashes[1]}):
                reason = f'{len(changed)} of its shards are others, first {changed[0]}'
    if reason:
        raise InputError(
            f'the store {store.path} has changed since this run began: {reason}; give --logits '
            f'{" ".join(commit or str(part.path) for part, commit in zip(store.stores, before["commits"]))} to go on '
            f'with what it was, or start another --experiment')


def _is_pinned(store: StoreReader) -> bool:
    """Whether a store is a commit on the Hub; elsewhere a shard is the same as long as its identity is."""
    return isinstance(store, RemoteStore) and store.source.is_on_hub
