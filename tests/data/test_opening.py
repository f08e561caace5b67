"""Stores that a training opens: the same ones in all of its processes."""

from types import SimpleNamespace

from huggingface_hub import HfApi

from timm_tinyvit.base.errors import InputError
from timm_tinyvit.data import opening

URL = 'hf://datasets/org/logits'


def test_all_processes_of_a_launch_read_the_commit_that_the_first_one_found(monkeypatch, refused):
    """Two ranks in one process; what is sent from the first to the second is what accelerate would send."""
    asked, sent, opened, ranks = [], [], [], []

    def dataset_info(api, repo_id, **options):
        asked.append(repo_id)
        if repo_id == 'org/none':
            raise InputError('there is no such repo')
        return SimpleNamespace(sha=f'{len(asked):040x}')

    def broadcast(objects):
        if ranks[-1]:
            objects[:] = sent
        else:
            sent[:] = objects

    def open_store(location, *options):
        opened.append(location)
        return f'store {location}', 'replay'

    monkeypatch.setattr(HfApi, 'dataset_info', dataset_info)
    monkeypatch.setattr(opening, 'broadcast_object_list', broadcast)
    monkeypatch.setattr(opening, 'open_store', open_store)
    monkeypatch.setattr(opening, 'Ensemble', list)

    def open_stores(rank, *locations):
        ranks.append(rank)
        return opening.open_stores(locations, {}, SimpleNamespace(is_main_process=not rank))[0]

    for rank in (0, 1):
        assert len(open_stores(rank, 'stores/a', URL, f'{URL}@v1')) == 3
    assert opened == 2 * ['stores/a', f'{URL}@{1:040x}', f'{URL}@{2:040x}'] and len(asked) == 2
    for place, words in (('hf://datasets/org/none', 'no such repo'), ('hf://org/logits', 'is no store on the Hub')):
        for rank in (0, 1):
            with refused(words):
                open_stores(rank, place)
    assert asked[2:] == ['org/none'] and len(opened) == 6
    assert open_stores(0, 'stores/a') == 'store stores/a'
    with refused('stores/a twice'):
        open_stores(0, 'stores/a', 'stores/a')
