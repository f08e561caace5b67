"""Training batches whose store changes under the loader's workers."""

import os
import shutil

import pytest
import torch
from torch.utils.data import DataLoader

from timm_tinyvit.base.errors import InputError
from timm_tinyvit.base.launch import init_worker
from timm_tinyvit.data.dataset import SparseLogitDataset, collate
from timm_tinyvit.data.opening import open_store
from timm_tinyvit.store.reader import ShardStore
from timm_tinyvit.train.batches import worker_errors


@pytest.mark.parametrize('looks', [True, False], ids=['before it is read', 'while it is read'])
@pytest.mark.parametrize('workers', [1, 2])
@pytest.mark.launches
def test_a_shard_cut_short_under_a_worker_is_one_sentence(
        looks, workers, filled_store, fashion, tmp_path, monkeypatch, one_sentence):
    """Where a worker cannot see it coming, SIGBUS ends it, and the main process finds out which shard it was."""
    shutil.copytree(filled_store, tmp_path / 'store')
    store, replay = open_store(tmp_path / 'store', {}, lambda line: None)
    if not looks:
        monkeypatch.setattr(ShardStore, 'forget_changed', lambda *args, **kwargs: None)
    data = SparseLogitDataset(fashion.select(range(120)), replay, store)
    batches = [[(0, row) for row in range(start, start + 10)] for start in range(0, 120, 10)] * 50
    loader = DataLoader(
        data, batch_sampler=batches, num_workers=workers, collate_fn=collate, worker_init_fn=init_worker)
    path = store.shard_path(0, 3)
    with pytest.raises(InputError) as error, worker_errors(store):
        for number, _ in enumerate(loader):
            if number == 30:
                os.truncate(path, 0)
    # As where the programs print it: what a worker has raised has a traceback of text.
    one_sentence(str(error.value), str(path), 'cut short')


def test_a_worker_without_memory_is_one_sentence_and_other_errors_stay(refused):
    with refused('shared memory', '--workers'), worker_errors(None):
        raise RuntimeError('DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that ...')
    for error in (RuntimeError('DataLoader worker (pid 5) is killed by signal: Killed.'), torch.OutOfMemoryError('no')):
        with pytest.raises(type(error)) as raised, worker_errors(None):
            raise error
        assert raised.value is error
