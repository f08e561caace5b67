"""Loaders for other people's loops: epochs go on by themselves, and ranks share them once, whoever wraps the loader."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from support.flags import DATA
from timm_tinyvit import LogitStore, ViewConfig, create_loader, load_split, open_store
from timm_tinyvit.data.dataset import SparseLogitDataset
from timm_tinyvit.data.sampler import EpochBatchSampler
from timm_tinyvit.data.views import Replay


@pytest.fixture(scope='module')
def images():
    return load_split(DATA, 'train[:120]', is_training=True)


@pytest.fixture(scope='module')
def store(filled_store):
    return LogitStore.open(filled_store)


def content(loader):
    return [(batch['index'].tolist(), batch['record'].numpy().tobytes()) for batch in loader]


def test_epochs_go_on_by_themselves_until_somebody_says_which_is_next():
    sampler = EpochBatchSampler(100, 10, seed=0, store_epochs=range(4))

    def epochs(passes):
        return [{epoch for batch in sampler for epoch, _ in batch} for _ in range(passes)]

    # After the last epoch of the store comes its first, in another order.
    assert epochs(6) == [{0}, {1}, {2}, {3}, {0}, {1}]
    sampler.set_epoch(2)
    assert sampler.next_epoch == 2 and epochs(2) == [{2}, {3}] and sampler.next_epoch == 4
    sampler.set_epoch(1, start=9)
    assert [len(list(sampler)) for _ in range(2)] == [1, 10]
    # A pass that is left in the middle is one; an iterator that nobody uses is none, as torch makes with workers.
    sampler.set_epoch(0)
    iter(sampler)
    next(iter(sampler))
    assert epochs(1) == [{1}]
    orders = [list(sampler) for _ in range(8)]
    assert orders[0] != orders[4]


@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_loader_gives_the_views_and_records_of_one_epoch_after_another(store, filled_store, images, num_workers):
    loader = create_loader(filled_store, DATA, 30, split='train[:120]', num_workers=num_workers)
    data = SparseLogitDataset(images, store=store)
    for epoch in (0, 1):
        shown = {}
        for batch in loader:
            shown |= zip(batch['index'].tolist(), zip(batch['view'], batch['record'], batch['label'].tolist()))
        assert len(shown) == 120
        for row in (0, 57, 119):
            sample, (view, record, label) = data[epoch, row], shown[row]
            assert torch.equal(sample['view'], view) and torch.equal(sample['record'], record)
            assert sample['label'] == label
    loader.set_epoch(0)
    assert content(loader) == content(create_loader(store, images, 30))


def test_ranks_of_torch_distributed_are_found_when_an_epoch_begins_and_share_it_once(store, images):
    loader = create_loader(store, images, 20)
    whole = content(create_loader(store, images, 60))
    try:
        shares = []
        for rank in range(3):
            # The real interface, without anybody at the other end.
            distributed.init_process_group('fake', rank=rank, world_size=3, store=FakeStore())
            loader.set_epoch(0)
            assert len(loader) == 2 and f'rank {rank} of 3' in repr(loader)
            shares.append([indices for indices, _ in content(loader)])
            distributed.destroy_process_group()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    assert [sum(step, []) for step in zip(*shares)] == [indices for indices, _ in whole]


def test_a_loader_that_is_prepared_and_skipped_in_stays_the_one_it_was(store, images, one_launch_each):
    loader = create_loader(store, images, 20)
    assert Accelerator(cpu=True).prepare(loader) is loader
    # What the Trainer of transformers does where it resumes within an epoch.
    rest = skip_first_batches(loader, 4)
    rest.batch_sampler.batch_sampler.set_epoch(2)
    loader = create_loader(store, images, 20)
    loader.set_epoch(2)
    whole = content(loader)
    assert content(rest) == whole[4:]
    # What Lightning looks at.
    assert isinstance(loader.sampler, torch.utils.data.DistributedSampler) and len(loader.sampler) == 120
    loader.sampler.set_epoch(2)
    assert content(loader) == whole
    loader.set_epoch(2)
    assert [row for _, row in loader.sampler] == sum((indices for indices, _ in whole), [])


def test_what_a_store_a_data_set_and_a_loader_are_is_what_they_say(store, images):
    loader = create_loader(store, images, 20)
    assert 'epochs 0 to 3 of 120 samples, 3 of 10 classes from' in repr(store) and str(store.path) in repr(store)
    assert repr(store) in repr(loader.dataset) and '120 images' in repr(loader.dataset)
    assert '6 batches of 20 for rank 0 of 1, next is epoch 0' in repr(loader)
    next(iter(loader))
    assert 'next is epoch 1' in repr(loader) and repr(loader.dataset) in repr(loader)
    plain = SparseLogitDataset(images, Replay(ViewConfig(input_size=(3, 24, 32)), 0))
    assert '24x32' in repr(plain) and 'no records' in repr(plain)


def test_what_is_missing_or_another_thing_is_a_sentence(store, filled_store, images, refused, tmp_path):
    data = SparseLogitDataset(images, store=store)
    for index in (0, -1, slice(3), [1]):
        with refused('(epoch, row)', 'data[0, 5]', repr(index)):
            data[index]
    with refused('(epoch, row)', 'create_loader'):
        next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
    with refused('neither a replay nor a store', 'open_store'):
        SparseLogitDataset(images)
    with refused('a LogitStore as its replay', 'store='):
        SparseLogitDataset(images, store)
    with refused('a tuple as its store', 'open_store'):
        create_loader(open_store(filled_store), images, 20)
    with refused('type int', 'datasets.Dataset'):
        create_loader(store, 5, 20)
    with refused('splits train', 'dataset["train"]'):
        create_loader(store, {'train': images}, 20)
    with refused('a stream', 'without streaming'):
        create_loader(store, images.to_iterable_dataset(), 20)
    with refused('split=', 'leave it out'):
        create_loader(store, images, 20, split='train')
    with refused('121', '120'):
        create_loader(store, load_split(DATA, 'train[:121]', is_training=True), 20)
    with refused('lacks 6 shards', 'fill_store'):
        create_loader(LogitStore.create(tmp_path / 'more', replace(store.manifest, epochs=1)), images, 20)
