"""The order of training: seeded, shared out over ranks, and gone on with from any batch."""

import pytest

from timm_tinyvit.data.sampler import EpochBatchSampler


def batches(epoch=0, start=0, **options):
    sampler = EpochBatchSampler(**{'num_samples': 103, 'batch_size': 10, 'seed': 0, **options})
    sampler.set_epoch(epoch, start)
    return list(sampler)


def test_an_epoch_shows_whole_batches_of_different_samples():
    found = batches(epoch=3)
    assert len(found) == len(EpochBatchSampler(103, 10, 0)) == 10 and all(len(batch) == 10 for batch in found)
    keys = [key for batch in found for key in batch]
    assert {epoch for epoch, _ in keys} == {3} and len(set(keys)) == 100
    assert {index for _, index in keys} <= set(range(103)) and [index for _, index in keys] != sorted(
        index for _, index in keys)
    assert all(type(number) is int for key in keys for number in key)


def test_other_epochs_and_seeds_have_other_orders_and_the_same_ones_the_same():
    orders = {
        (seed, epoch): tuple(index for batch in batches(epoch, seed=seed) for _, index in batch)
        for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(set(orders.values())) == 6
    assert orders[1, 2] == tuple(index for batch in batches(2, seed=1) for _, index in batch)
    # What is left out at the end of an epoch is not always the same.
    assert len({frozenset(range(103)) - frozenset(order) for order in orders.values()}) > 1


@pytest.mark.parametrize('world_size', [2, 3])
def test_ranks_share_an_epoch_between_them(world_size):
    shares = [batches(5, rank=rank, world_size=world_size) for rank in range(world_size)]
    keys = [key for share in shares for batch in share for key in batch]
    assert len({len(share) for share in shares}) == 1 and len(shares[0]) == 103 // (10 * world_size)
    assert len(set(keys)) == len(keys) == len(shares[0]) * 10 * world_size
    # Together they see, step by step, what one process sees with batches as large as all of theirs.
    together = batches(5, batch_size=10 * world_size)
    assert [sum(step, []) for step in zip(*shares)] == together


def test_an_epoch_goes_on_in_the_same_order_from_any_batch():
    whole = batches(2, rank=1, world_size=2)
    for start in range(len(whole) + 1):
        assert batches(2, start, rank=1, world_size=2) == whole[start:]
    sampler = EpochBatchSampler(103, 10, 0)
    sampler.set_epoch(1, start=7)
    assert len(list(sampler)) == 3 and len(sampler) == 10
    # The next epoch begins at its beginning.
    sampler.set_epoch(2)
    assert len(list(sampler)) == 10


def test_a_training_epoch_uses_the_stores_epochs_in_turn_with_an_order_of_its_own():
    found = {epoch: batches(epoch, store_epochs=range(3)) for epoch in range(7)}
    assert [keys[0][0][0] for keys in found.values()] == [0, 1, 2, 0, 1, 2, 0]
    assert found[0] != found[3] != found[6]
    assert batches(7)[0][0][0] == 7


@pytest.mark.parametrize('world_size', [1, 2])
def test_several_views_of_an_image_share_a_batch_and_its_epochs_show_every_image_in_every_view(world_size):
    samplers = [
        EpochBatchSampler(
            100, 20, seed=3, rank=rank, world_size=world_size, store_epochs=range(5, 11), views_per_image=4)
        for rank in range(world_size)]
    shown = []
    for epoch in range(8, 12):
        for sampler in samplers:
            sampler.set_epoch(epoch)
            batches = list(sampler)
            assert len(batches) == len(sampler) == 100 // (20 * world_size)
            for batch in batches:
                for first in range(0, 20, 4):
                    assert len({index for _, index in batch[first:first + 4]}) == 1
                    # Training epochs 8 to 11 of a store of six epochs that begins at 5.
                    assert [view_epoch for view_epoch, _ in batch[first:first + 4]] == [7, 8, 9, 10]
            shown += [key for batch in batches for key in batch]
    assert len(shown) == len(set(shown)) and len(shown) == 4 * 20 * world_size * len(samplers[0])
    if world_size == 1:
        assert set(shown) == {(view_epoch, index) for view_epoch in range(7, 11) for index in range(100)}


def test_a_batch_that_does_not_divide_into_its_views_is_refused(refused):
    with refused('batch of 10', '4 views', '--views-per-image'):
        EpochBatchSampler(100, 10, seed=0, views_per_image=4)
    with refused('has 2 epochs', '4 views', '--views-per-image up to 2'):
        EpochBatchSampler(100, 20, seed=0, store_epochs=range(2), views_per_image=4)


def test_fewer_samples_than_one_batch_are_refused(refused):
    assert len(EpochBatchSampler(20, 10, 0, world_size=2)) == 1
    with refused('19 samples', 'batch of 10 on 2', '--batch-size'):
        EpochBatchSampler(19, 10, 0, world_size=2)


def test_the_epochs_that_are_read_come_with_those_that_are_read_next():
    options = dict(num_samples=100, batch_size=20, seed=0, store_epochs=range(5, 11), views_per_image=2)
    sampler = EpochBatchSampler(**options, num_epochs=8)
    # Training epochs in twos, of a store that begins at epoch 5, and none after the last one.
    read = [sampler.epochs_to_read(epoch) for epoch in range(8)]
    assert read[::2] == read[1::2] == [([5, 6], [7, 8]), ([7, 8], [9, 10]), ([9, 10], [5, 6]), ([5, 6], [])]
    assert EpochBatchSampler(**options).epochs_to_read(7) == ([5, 6], [7, 8])
    assert EpochBatchSampler(100, 20, 0).epochs_to_read(7) == ([7], [8])
