"""Filling a store: the teacher looks once at every view of the shards that are missing.

Any number of processes and machines fill a store at the same time, and may join and leave: each leases the next missing
shard when its loader asks for one. Those who share no folder go through a store behind a URL in orders of their own,
with leases among the processes of each machine. Teacher batches never cross a shard, so that a shard's bytes do not
depend on who writes it.
"""

import time
from collections import deque
from itertools import chain, islice
from pathlib import Path
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..base.errors import InputError
from ..base.files import remove_leftovers
from ..base.launch import init_worker
from ..base.leases import Leases
from ..data.dataset import EpochRow, SparseLogitDataset, collate
from ..data.streaming import StreamedRows
from ..store.local import LogitStore
from ..store.manifest import Manifest
from ..store.object_store import ObjectStore
from .progress import StoreProgress
from .teacher import Teacher

__all__ = ['choose_shards', 'fill_shard', 'fill_epochs']


class _LeasedBatches:
    """Teacher batches of (epoch, row) pairs, shard by shard, each shard leased when its first batch is asked for.

    Where nothing can be leased, an iteration waits for the other processes before its first batch, and ends after a
    later one: then shards of this very process may be among those that it would wait for.

    Attributes:
        leased: The shards whose batches were handed out, in this order; who takes a shard's batches takes it away.
        unfinished: Epochs that had missing shards at the last look.
    """

    def __init__(
            self,
            store: LogitStore | ObjectStore,
            epochs: Sequence[int],
            shards: range,
            leases: Leases,
            waiting: Callable[[], None],
            is_stream: bool = False,
    ):
        self.store = store
        self.shards = shards
        self.leases = leases
        self.waiting = waiting
        self.batch_size = store.manifest.teacher['batch_size']
        self.leased: deque[tuple[int, int]] = deque()
        self.in_order = list if is_stream else store.in_own_order
        self.unfinished = store.in_own_order(epochs)

    def __iter__(self) -> Iterator[list[EpochRow]]:
        found = self._acquire()
        while found is None and self.unfinished:
            self.waiting()
            found = self._acquire()
        while found is not None:
            self.leased.append(found)
            epoch, shard = found
            first = shard * self.store.manifest.shard_size
            stop = first + self.store.manifest.shard_rows(shard)
            for start in range(first, stop, self.batch_size):
                yield [(epoch, row) for row in range(start, min(start + self.batch_size, stop))]
            found = self._acquire()

    def num_batches(self, shard: int) -> int:
        """Batches of a shard."""
        return -(-self.store.manifest.shard_rows(shard) // self.batch_size)

    def _acquire(self) -> tuple[int, int] | None:
        """The next shard that is neither there nor leased by a living process, now leased by this one."""
        for epoch in list(self.unfinished):
            missing = [shard for _, shard in self.store.missing([epoch]) if shard in self.shards]
            if not missing:
                self.unfinished.remove(epoch)
                folder = self.store.shard_path(epoch, 0).parent
                self.leases.clear(folder)
                remove_leftovers(folder)
            for shard in self.in_order(missing):
                file = self.store.shard_path(epoch, shard)
                if not self.leases.acquire(file):
                    continue
                # Its writer may have finished it between the two looks.
                if not self.store.has_shard(epoch, shard):
                    return epoch, shard
                self.leases.release(file)
        return None


def fill_shard(
        store: LogitStore | ObjectStore,
        teacher: Teacher,
        epoch: int,
        shard: int,
        batches: Iterable[dict[str, torch.Tensor]],
        count: Callable[[int], None] = lambda views: None,
        name_of: Callable[[int], str] = str,
) -> None:
    """Write one shard.

    Args:
        store: The store.
        teacher: Its teacher.
        epoch: The shard's epoch.
        shard: Its number.
        batches: All of its views in order: `view` uint8 [B, 3, H, W], `index` int64 [B], and `digest` int64 [B] where
            the images are to be remembered.
        count: Is told the views of each batch that the teacher has looked at.
        name_of: What to call a row of the store.

    Raises:
        InputError: The teacher says NaN, the disk is full, or an image is not the one of the epochs before.
    """
    records: list[np.ndarray] = []
    digests: list[torch.Tensor] = []
    for batch in batches:
        try:
            records.append(store.codec.encode(store.codec.keep(teacher(batch['view']))))
        except ValueError as error:
            raise InputError(f'epoch {epoch}, shard {shard}: {error}')
        digests += [batch['digest']] if 'digest' in batch else []
        count(len(batch['view']))
    if digests:
        _remember_images(store, shard, torch.cat(digests).numpy(), name_of)
    store.write_shard(epoch, shard, np.concatenate(records))


def _remember_images(
        store: LogitStore | ObjectStore,
        shard: int,
        digests: np.ndarray,
        name_of: Callable[[int], str],
) -> None:
    """Write the digests of a shard's images, int64 [rows], or compare them with those of the epochs before.

    Raises:
        InputError: An image is another one.
    """
    before = store.read_digests(shard)
    if before is None:
        store.write_digests(shard, digests)
    elif len(other := np.flatnonzero(digests != before)):
        raise InputError(
            f'{len(other)} images of shard {shard} are not those that the store {store.path} was filled from so far, '
            f'the first is sample {name_of(shard * store.manifest.shard_size + int(other[0]))}; timm-tinyvit data '
            f'check DATASET --logits {store.path} names them all; bring them back, or make a new store')


def choose_shards(manifest: Manifest, shards: range | None, path: str | Path) -> range:
    """The shards of an epoch that are asked for, all by default.

    Raises:
        InputError: The epochs of this store, at `path`, have none of them.
    """
    chosen = range(manifest.num_shards) if shards is None else shards[:max(0, manifest.num_shards - shards.start)]
    if not chosen:
        raise InputError(
            f'shards {shards.start}:{shards.stop} were asked for, but an epoch of {path} has only shards '
            f'0:{manifest.num_shards}; fix --shards')
    return chosen


def fill_epochs(
        store: LogitStore | ObjectStore,
        teacher: Teacher,
        data: SparseLogitDataset | StreamedRows,
        epochs: Sequence[int],
        shards: range | None = None,
        num_workers: int = 0,
        show_progress: bool = True,
        expire: float = 60.,
        heartbeat: float = 5.,
) -> int:
    """Fill the shards that these epochs lack, together with whoever else fills this store.

    When it returns, all of them are there.

    Args:
        store: The store.
        teacher: Its teacher.
        data: The data set with the store's replay, and no store; or a stream.
        epochs: Which epochs of the store.
        shards: Which shards of each epoch; all by default.
        num_workers: Loader processes.
        show_progress: Show a bar of what everyone has done.
        expire: Seconds without a heartbeat after which another machine's process is taken for dead.
        heartbeat: Seconds between two heartbeats of this process.

    Returns:
        How many views this process has looked at.

    Raises:
        InputError: There are no such shards, an image cannot be decoded, the teacher says NaN, or the disk is full;
            finished shards stay, and the others are free for other processes.
    """
    manifest = store.manifest
    chosen = choose_shards(manifest, shards, store.path)
    num_views = 0
    with Leases(expire, heartbeat) as leases, StoreProgress(store, epochs, chosen, show_progress) as progress:

        def wait() -> None:
            progress.refresh()
            time.sleep(min(1., heartbeat))

        batches = _LeasedBatches(store, epochs, chosen, leases, wait, isinstance(data, StreamedRows))
        sampler = data.sampler(batches) if isinstance(data, StreamedRows) else batches
        loader = DataLoader(
            data, batch_sampler=sampler, num_workers=num_workers, collate_fn=collate, worker_init_fn=init_worker,
            persistent_workers=num_workers > 0, pin_memory=teacher.device.type == 'cuda')
        name_of = str if isinstance(data, StreamedRows) else data.name_of
        while batches.unfinished:
            stream = iter(loader)
            for batch in stream:
                epoch, shard = batches.leased.popleft()
                others = islice(stream, batches.num_batches(shard) - 1)
                fill_shard(store, teacher, epoch, shard, chain([batch], others), progress.add, name_of)
                progress.finish()
                leases.release(store.shard_path(epoch, shard))
                num_views += manifest.shard_rows(shard)
        if isinstance(store, ObjectStore):
            # A launch that wanted fewer epochs may have had the last word on their number.
            store.extend(manifest.epochs)
    return num_views
