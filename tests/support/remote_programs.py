"""What children do with a store on the Hub: they read it, and compare it with the same store in the folder $LOCAL."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from timm_tinyvit.base.errors import InputError
from timm_tinyvit.store import cache as hub_cache
from timm_tinyvit.store import remote as hub_store
from timm_tinyvit.store.base import StoreReader
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.store.remote import RemoteStore, open_reader

from support.files import flip_bit
from support.waiting import wait_until

URL = 'hf://datasets/org/logits'


@functools.cache
def local() -> LogitStore:
    return LogitStore.open(os.environ['LOCAL'])


def remote(url: str = URL, **options) -> RemoteStore:
    """The store on the Hub; what fails is tried again at once."""
    hub_cache.MAX_PAUSE = 0.1
    return open_reader(url, **options)


def same(store: StoreReader, *epochs: int) -> bool:
    samples = range(local().manifest.num_samples)
    return all((store.read(epoch, samples) == local().read(epoch, samples)).all() for epoch in epochs)


def refusal(action: Callable, *arguments) -> str:
    try:
        action(*arguments)
    except InputError as error:
        return str(error)
    raise AssertionError('nothing was refused')


def on_disk(store: RemoteStore) -> dict[int, int]:
    """How many shards of which epoch are there."""
    folder = store.shard_path(0, 0).parents[1]
    return {int(path.name[6:]): len(list(path.glob('shard-*'))) for path in folder.glob('epoch-*')}


def wait_for_disk(store: RemoteStore, expected: dict[int, int]) -> None:
    wait_until(lambda: on_disk(store) == expected)


def deleted_maps(process: int | str) -> int:
    """How many shards a process has mapped that are no longer on disk."""
    return sum('.arrow' in line and line.rstrip().endswith('(deleted)') for line in open(f'/proc/{process}/maps'))


def read_any_epoch(commit):
    store = remote()
    assert store.manifest == local().manifest and store.path == f'{URL}@{commit}'
    assert store.missing(range(5)) == [(4, shard) for shard in range(6)] and store.size() == local().size()
    for epoch in (2, 0, 3, 1, 0):
        assert same(store, epoch)
        assert len(on_disk(store)) <= 2 and on_disk(store)[epoch] == 6
        # Whole epochs were read, so that their maps would keep the disk from being free.
        assert deleted_maps('self') == 0
    assert list(store.verify(range(4))) == [] and len(on_disk(store)) == 2
    store = remote(keep_epochs=1)
    assert same(store, 3, 2) and list(on_disk(store)) == [2]


def read_while_another_trains():
    reader, training = remote(), remote()
    assert same(reader, 0)
    if not os.fork():
        # A fork, as of a loader worker, leaves its epochs to the reader.
        reader.read(1, [0])
        del reader
        os._exit(0)
    os.wait()
    training.prefetch([2])
    assert training.wait() and on_disk(training) == {0: 6, 2: 6}
    del reader
    training.prefetch([3])
    assert training.wait() and on_disk(training) == {3: 6}


class Records:
    """A data set of the records of views, each batch with the process that read it."""

    def __init__(self, store):
        self.store = store

    def __getitems__(self, keys):
        return [self.store.read(epoch, [row])[0] for epoch, row in keys] + [os.getpid()]


def read_as_a_training_does():
    from torch.utils.data import DataLoader

    from timm_tinyvit.data.sampler import EpochBatchSampler
    store = remote()
    sampler = EpochBatchSampler(120, 20, 0, store_epochs=store.manifest.stored_epochs)
    loader = DataLoader(Records(store), batch_sampler=sampler, num_workers=2, collate_fn=list, persistent_workers=True,
                        prefetch_factor=1)
    for epoch in range(6):
        sampler.set_epoch(epoch)
        store.prefetch(*sampler.epochs_to_read(epoch))
        assert store.wait()
        assert on_disk(store)[epoch % 4] == 6
        workers = set()
        for count, batch in enumerate(loader):
            workers.add(batch.pop())
            if count == 0:
                # The next one comes meanwhile, and nothing else is left.
                wait_for_disk(store, {epoch % 4: 6, (epoch + 1) % 4: 6})
        assert len(workers) == 2
        for process in [*workers, os.getpid()]:
            assert deleted_maps(process) == 0


def read_several_epochs_together():
    from timm_tinyvit.data.sampler import EpochBatchSampler
    from timm_tinyvit.store.ensemble import Ensemble
    store = remote(keep_epochs=3)
    sampler = EpochBatchSampler(120, 20, 0, store_epochs=range(4), views_per_image=2)
    sampler.set_epoch(3)
    store.prefetch(*sampler.epochs_to_read(3))
    assert store.wait()
    keys = next(iter(sampler))
    assert {epoch for epoch, _ in keys} == {2, 3}
    wait_for_disk(store, {2: 6, 3: 6, 0: 6})
    for epoch in (2, 3):
        assert same(store, epoch)
    # And of several teachers.
    both = Ensemble([local(), store])
    both.prefetch([1], [2])
    assert both.wait() and on_disk(store)[1] == 6
    assert (both.read(1, [7])[0] == np.tile(local().read(1, [7])[0], 2)).all()


def stream_by_key(url, data):
    from timm_tinyvit.data.opening import open_store
    from timm_tinyvit.data.sources import load_split
    from timm_tinyvit.data.streaming import SparseLogitStream, StreamLoader
    hub_cache.MAX_PAUSE = 0.1
    store, replay = open_store(url, {})
    assert (store.open_keys().hashes == local().open_keys().hashes).all()
    stream = SparseLogitStream(
        load_split(data, None, True, streaming=True), replay, store, store_epochs=store.manifest.stored_epochs)
    loader = StreamLoader(stream, 4, batch_size=10)
    loader.set_epoch(4)
    store.prefetch(*loader.epochs_to_read(4))
    assert store.wait() and on_disk(store)[1] == 4
    for batch in loader:
        rows = store.open_keys().find(batch['index'].numpy().astype('uint64'))
        assert (batch['record'].numpy() == local().read(1, rows)).all()
    wait_for_disk(store, {1: 4, 2: 4})


def read_what_comes_broken_at_first():
    store = remote()
    assert same(store, 0)
    store.prefetch([1])
    assert store.wait()
    # Nothing wrong was there, not for a moment.
    for shard in range(6):
        assert store.shard_path(1, shard).read_bytes() == local().shard_path(1, shard).read_bytes()


def print_refusals_of_what_stays_broken():
    hub_cache.PATIENCE = 1.
    store = remote()
    print(refusal(same, store, 3))
    assert on_disk(store)[3] == 5
    print(list(store.verify([3]))[0])
    store.prefetch([3])
    print(refusal(store.wait))
    assert store.read(3, [0, 119]).shape == (2, 5)
    partial = remote('hf://datasets/org/partial')
    assert partial.missing(range(4)) == [(2, shard) for shard in range(6)]
    print(refusal(partial.read, 2, [0]))
    partial.prefetch([2])
    print(refusal(partial.wait))
    for url in ('hf://datasets/org/shards', 'hf://datasets/org/damaged', f'{URL}@v9', f'{URL}@{40 * "a"}',
                'hf://datasets/org/nothing', 'hf://org/logits', f'{URL}/below'):
        print(refusal(remote, url))
    # It is read, and nothing else.
    assert not hasattr(store, 'write_shard') and not hasattr(store, 'extend')
    print(refusal(store.read, 1, [120]))


def print_refusal(url, cache_dir=None):
    print(refusal(lambda: remote(url, cache_dir=cache_dir)))


def wait_for_a_lost_connection(folder):
    """Go on after `lost` lies in the folder, and give up the first waiting when `stop` does."""
    store = remote()
    store.prefetch([0], [1])
    assert store.wait()
    wait_until(Path(folder, 'lost').exists)
    assert same(store, 0, 1)
    store.prefetch([2], [3])
    # A signal would end the waiting.
    assert not store.wait(Path(folder, 'stop').exists)
    print('stopped', flush=True)
    assert store.wait() and same(store, 2)


def print_refusal_without_connection():
    from huggingface_hub import close_session
    store = remote()
    hub_cache.PATIENCE = 0.5
    os.environ['HTTP_PROXY'] = 'http://127.0.0.1:1'
    close_session()
    print(refusal(store.read, 0, [0]))


def print_the_fetcher_and_wait():
    store = remote()
    store.prefetch([0], [1])
    print(store._fetcher.process.pid, flush=True)
    store.wait()


def read_two_epochs():
    store = remote()
    store.prefetch([0], [1])
    assert store.wait() and same(store, 0, 1)


def read_beside_another(folder, name, other):
    """Three epochs, in step with the other process."""
    store = remote()
    for epoch in range(3):
        store.prefetch([epoch], [epoch + 1])
        assert store.wait()
        # Records that were never read before come from disk, whatever the others did meanwhile.
        assert same(store, epoch)
        Path(folder, f'{name}-{epoch}').touch()
        wait_until(Path(folder, f'{other}-{epoch}').exists)
        store.forget(epoch)
        assert on_disk(store)[epoch] == 6 and same(store, epoch)
    # The last one that was asked for would end with its fetcher.
    wait_until(lambda: on_disk(store).get(3) == 6)


def read_at_different_epochs():
    first, second = remote(), remote()
    first.prefetch([0])
    assert first.wait()
    second.prefetch([2], [3])
    assert second.wait()
    wait_for_disk(second, {0: 6, 2: 6, 3: 6})
    first.prefetch([1])
    assert first.wait()
    assert set(on_disk(first)) == {1, 2, 3}
    # Who has ended holds nothing, however it ended.
    os.kill(second._fetcher.process.pid, 9)
    second._fetcher.process.join()
    first.prefetch([0])
    assert first.wait()
    assert set(on_disk(first)) == {0}


def read_what_was_removed_or_damaged():
    store = remote()
    store.prefetch([0])
    assert store.wait() and same(store, 0)
    path = store.shard_path(0, 3)
    flip_bit(path)
    store.forget(0)
    assert same(store, 0)
    for shard in path.parent.glob('shard-*'):
        shard.unlink()
    assert same(store, 0)
    # What this process knows of the Hub is damaged on disk.
    for name in ('store.json', 'listing.json'):
        (path.parents[1] / name).write_text('half of')
    store = remote()
    store.prefetch([0])
    assert store.wait() and same(store, 0)
    # A fetcher that is killed, as where memory runs out, is replaced.
    os.kill(store._fetcher.process.pid, 9)
    store.prefetch([1])
    assert store.wait() and same(store, 1)


def print_refusals_of_other_content(before, fine, fewer):
    """`before` is the commit that a run began with; of those in `fine` enough epochs are as they were then."""
    content = hub_store.content_of(remote(f'{URL}@{before}'))
    for commit, epochs in fine:
        hub_store.check_content(remote(f'{URL}@{commit}'), content, epochs)
    hub_store.check_content(local(), content, 9)
    hub_store.check_content(remote(), hub_store.content_of(local()), 9)
    print(refusal(hub_store.check_content, remote(f'{URL}@{fewer}'), content, 4))
    print(refusal(hub_store.check_content, remote(), content, 2))


def read_epochs(*epochs):
    assert same(remote(), *map(int, epochs))
