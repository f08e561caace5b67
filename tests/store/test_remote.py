"""Stores that are read from the Hub: the real client against a server of its interface, in processes of their own."""

import io
import json
import math
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

import train_distill
from support import hub_programs, remote_programs
from support.flags import DATA
from support.files import tree
from support.hub_server import TOKEN
from support.programs import refusal
from support.remote_programs import URL
from support.waiting import wait_until
from timm_tinyvit import cli
from timm_tinyvit.base.hub_client import Unavailable
from timm_tinyvit.base.leases import Leases
from timm_tinyvit.base.machine import machine_name
from timm_tinyvit.base.remote_folder import Damaged, RemoteFolder
from timm_tinyvit.store import cache as hub_cache
from timm_tinyvit.store import fetcher
from timm_tinyvit.store import remote as hub_store
from timm_tinyvit.store.cache import HeldEpochs, ShardCache
from timm_tinyvit.store.local import LogitStore

@pytest.fixture
def run(hub, hub_children, filled_store, tmp_path):
    """`run(function, ...)` calls it in a process whose Hub is the server, and returns what it printed."""

    def run(function, *arguments, start=False, **environment):
        environment = hub.environment(tmp_path / 'home', **{'LOCAL': str(filled_store), **environment})
        if start:
            return hub_children.start(function, environment, *arguments)
        return hub_children.run(function, environment, *arguments).stdout

    return run


@pytest.fixture
def pushed(hub, filled_store) -> str:
    """The store on the Hub; the commit that brought it."""
    hub.add_repo('org/logits', 'dataset', private=True)
    return hub.add_commit('org/logits', tree(filled_store, hidden=False), repo_type='dataset')


def shards_fetched(hub) -> list[str]:
    return [request.path.partition('/epoch-')[2] for request in hub.seen(r'^GET /storage/.*arrow') if
            request.status == 200]


def test_a_student_learns_the_same_from_the_hub_with_two_epochs_on_disk(
        hub, hub_children, pushed, filled_store, tmp_path):
    flags = [
        '--dataset', DATA, '--train-split', 'train[:120]', '--val-split', 'test[:20]', '--model', 'test_resnet',
        '--epochs', '4', '--val-interval', '4', '--batch-size', '30', '--workers', '1', '--warmup-epochs', '0',
        '--output', tmp_path / 'runs', '--experiment']
    train_distill.main([str(word) for word in (*flags, 'local', '--logits', filled_store)])
    hub_children.run(
        ['-m', 'train_distill', *flags, 'hub', '--logits', URL], hub.environment(tmp_path / 'home'))
    weights = [(tmp_path / 'runs' / name / 'last' / 'model.safetensors').read_bytes() for name in ('hub', 'local')]
    assert weights[0] == weights[1]
    # Every shard came once, and no epoch for what would follow the last one.
    fetched = shards_fetched(hub)
    assert len(fetched) == len(set(fetched)) == 24
    folder, = (tmp_path / 'home' / 'assets' / 'timm_tinyvit' / 'org--logits').glob('*')
    assert folder.name == pushed
    assert {path.name for path in folder.iterdir()} <= {'store.json', 'listing.json', 'epoch-00003'}
    secrets = [path for path in tmp_path.rglob('*') if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not secrets


def test_any_epoch_is_read_and_two_are_kept_without_being_told(run, pushed):
    assert run(remote_programs.read_any_epoch, pushed) == ''


def test_what_a_reader_keeps_without_being_told_stays_as_long_as_the_reader(run, pushed):
    assert run(remote_programs.read_while_another_trains) == ''


def test_told_epochs_come_in_time_and_the_disk_of_used_ones_is_free_in_every_process(run, hub, pushed):
    assert run(remote_programs.read_as_a_training_does) == ''
    # Seven epochs began or were about to: nothing was fetched twice while it was there.
    assert len(shards_fetched(hub)) == 7 * 6


def test_views_of_several_epochs_are_kept_together(run, pushed):
    assert run(remote_programs.read_several_epochs_together) == ''


def test_samples_are_found_by_key_and_streamed(run, hub, keyed_store):
    data, path = keyed_store
    hub.add_commit('org/keyed', tree(path, hidden=False), repo_type='dataset')
    hub.fail('GET /storage/.*keys.arrow', 'wrong-bytes', times=2)
    assert run(remote_programs.stream_by_key, 'hf://datasets/org/keyed', data, LOCAL=str(path)) == ''


def test_what_goes_wrong_on_the_way_is_tried_again(run, hub, pushed):
    hub.fail('GET .*/resolve/.*store.json', '503')
    hub.fail('GET .*/resolve/.*store.json', 'wrong-bytes', times=2)
    hub.fail('GET .*/tree/', '500')
    hub.fail('GET /storage/.*epoch-00000/shard-00001', 'cut', times=2)
    hub.fail('GET /storage/.*epoch-00000/shard-00003', 'wrong-bytes')
    hub.fail('GET /datasets/.*epoch-00000/shard-00002', '500', times=2)
    hub.fail('GET /datasets/.*epoch-00000/shard-00005', '429', retry_after=0)
    hub.fail('GET /storage/.*epoch-00001/shard-00000', 'short')
    hub.fail('GET /storage/.*epoch-00001/shard-00004', '503', times=3)
    hub.fail('GET /storage/.*epoch-00001/shard-00005', 'wrong-bytes')
    assert run(remote_programs.read_what_comes_broken_at_first) == ''
    assert not hub.faults or all(fault.times == 0 for fault in hub.faults)


def test_what_stays_wrong_is_one_sentence(run, hub, pushed, filled_store, one_sentence, tmp_path):
    files = tree(filled_store, hidden=False)
    partial = {path: data for path, data in files.items() if not path.startswith('epoch-00002')}
    hub.add_commit('org/partial', partial, repo_type='dataset')
    hub.add_commit('org/shards', {path: data for path, data in files.items() if path != 'store.json'},
                   repo_type='dataset')
    hub.add_commit('org/damaged', files | {'store.json': files['store.json'][:200]}, repo_type='dataset')
    hub.add_repo('org/private', 'dataset', private=True)
    hub.fail('GET /storage/.*epoch-00003/shard-00002', 'wrong-bytes', times=99)
    said = run(remote_programs.print_refusals_of_what_stays_broken).splitlines()
    words = [
        ['epoch-00003/shard-00002', 'fetched 3 times'], ['fetched 3 times'], ['fetched 3 times'],
        ['no epoch 2 yet', 'timm-tinyvit store push'], ['no epoch 2 yet'], ['no store.json', 'not pushed to its end'],
        ['not readable as JSON'], ['no such revision'], ['no such revision'], ['no such repo'], ['hf://datasets/ORG/NAME'],
        ['hf://datasets/ORG/NAME'], ['120']]
    assert len(said) == len(words)
    for sentence, expected in zip(said, words):
        one_sentence(sentence, *expected)
    said = run(remote_programs.print_refusal, 'hf://datasets/org/private', HF_TOKEN='hf_another0123456789')
    one_sentence(said.strip(), 'private')
    assert 'hf_another' not in said
    said = run(remote_programs.print_refusal, URL, HF_HUB_OFFLINE='1')
    one_sentence(said.strip(), 'HF_HUB_OFFLINE')
    (tmp_path / 'file').touch()
    said = run(remote_programs.print_refusal, URL, tmp_path / 'file')
    one_sentence(said.strip(), '--store-cache')


def test_a_lost_connection_is_outlived_and_said_once(run, hub, pushed, tmp_path):
    child = run(remote_programs.wait_for_a_lost_connection, tmp_path, start=True)
    wait_until(lambda: len(shards_fetched(hub)) == 12)
    hub.fail('GET', '503', times=10 ** 6)
    (tmp_path / 'lost').touch()
    wait_until(lambda: 'is late' in child.read('stderr'))
    (tmp_path / 'stop').touch()
    wait_until(lambda: 'stopped' in child.read('stdout'))
    hub.forget()
    result = child.wait()
    assert result.returncode == 0 and result.stdout == 'stopped\n', result.stderr
    assert result.stderr.count('is late') == 1 and 'trouble (HTTP 503' in result.stderr
    assert 'Traceback' not in result.stderr


def test_a_connection_that_stays_lost_is_one_sentence_in_the_end(run, hub, pushed, one_sentence):
    said = run(remote_programs.print_refusal_without_connection)
    one_sentence(said.strip(), 'cannot fetch epoch 0', 'no connection')


def test_a_killed_training_leaves_no_half_file_and_no_process(run, hub, pushed, tmp_path):
    hub.fail('GET /storage/.*epoch-00000/shard-00002', 'hang', seconds=60)
    child = run(remote_programs.print_the_fetcher_and_wait, start=True)
    cache = tmp_path / 'home' / 'assets' / 'timm_tinyvit'
    wait_until(lambda: hub.seen('GET /storage/.*epoch-00000/shard-00002') and child.read('stdout').endswith('\n')
             and list(cache.rglob('shard-00000.arrow')))
    fetcher = Path('/proc', child.read('stdout').strip())
    assert fetcher.exists()
    child.kill(signal.SIGKILL)
    assert child.wait().returncode == -signal.SIGKILL
    wait_until(lambda: not fetcher.exists())
    assert not list(cache.rglob('epoch-00000/shard-00002*'))
    # As if it had been killed a moment later, or between a shard and the lease on it.
    epoch = next(cache.rglob('epoch-00000'))
    (epoch / f'.shard-00002.arrow.{machine_name()}.{fetcher.name}.tmp').write_bytes(b'half a file')
    Leases.path(epoch / 'shard-00000.arrow').write_bytes(b'')
    hub.forget()
    # Temporary files go, what was leased is free, what is there is not fetched again.
    there = len(list(cache.rglob('shard-*')))
    assert run(remote_programs.read_two_epochs) == ''
    assert len(shards_fetched(hub)) == 12 - there
    assert not [path for path in cache.rglob('.*') if 'reader' not in path.name]


def test_processes_share_out_the_fetching_and_nobody_loses_an_epoch_that_it_reads(run, hub, pushed, tmp_path):
    ranks = [run(remote_programs.read_beside_another, tmp_path, *names, start=True,
                 LOCAL_WORLD_SIZE='2', LOCAL_RANK=str(rank))
             for rank, names in enumerate([('one', 'two'), ('two', 'one')])]
    for rank in ranks:
        result = rank.wait()
        assert result.returncode == 0 and result.stdout == '', result.stderr
    # Both ranks needed all of it, and every shard came once.
    assert len(shards_fetched(hub)) == len(set(shards_fetched(hub))) == 24


def test_trainings_that_are_at_different_epochs_leave_each_other_theirs(run, hub, pushed):
    assert run(remote_programs.read_at_different_epochs) == ''


def test_an_epoch_that_another_training_removed_or_the_disk_damaged_is_fetched_again(run, hub, pushed):
    assert run(remote_programs.read_what_was_removed_or_damaged) == ''


def test_a_store_that_has_changed_is_noticed_when_a_run_is_resumed(run, hub, pushed, filled_store, one_sentence):
    files = tree(filled_store, hidden=False)
    card = hub.add_commit('org/logits', {'README.md': b'words'}, repo_type='dataset')
    shorter = files['store.json'].replace(b'"epochs": 4', b'"epochs": 3')
    fewer = hub.add_commit('org/logits', {'store.json': shorter}, repo_type='dataset')
    other = hub.add_commit('org/logits', {'store.json': files['store.json'], 'epoch-00001/shard-00002.arrow':
                                          files['epoch-00001/shard-00003.arrow']}, repo_type='dataset')
    fine = [(pushed, 9), (card, 9), (fewer, 3), (other, 1)]
    said = run(remote_programs.print_refusals_of_other_content, pushed, fine, fewer).splitlines()
    one_sentence(said[0], '0:4', '0:3', f'--logits {URL}@{pushed}')
    one_sentence(said[1], '1 of its shards', 'epoch-00001/shard-00002.arrow', f'--logits {URL}@{pushed}')


def test_the_programs_take_a_store_on_the_hub(hub, run, pushed, filled_store, tmp_path):
    ends = json.loads(run(hub_programs.run_commands, *(['store', *words.split()] for words in (
        f'describe {URL}', f'verify {URL}', f'verify {URL} --epochs 1:3 --store-cache {tmp_path}/cache',
        f'copy {URL} --output {tmp_path}/copy --epochs 1:3'))))
    *_, (_, checked, _) = json.loads(run(hub_programs.run_commands, [
        'data', 'check', DATA, '--train-split', 'train[:120]', '--logits', URL, '-j', '0']))
    assert f'{URL}@{pushed}: 120 of 120 images compared' in checked and 'others than the store' not in checked
    assert not any(status for status, _, _ in ends), ends
    said = ''.join(out for _, out, _ in ends)
    assert f'{URL}@{pushed}' in said and '24 of 24' in said and 'on the Hub' in said
    assert '24 shards, every byte' in said and '12 shards, every byte' in said
    copied, there = tree(tmp_path / 'copy', hidden=False), tree(filled_store, hidden=False)
    assert len(copied) == 13 + 6 and all(copied[name] == there[name] for name in copied if name != 'store.json')
    assert list((tmp_path / 'cache' / 'timm_tinyvit' / 'org--logits').iterdir())


def test_an_evaluation_fetches_its_own_split_alone(hub, hub_children, fashion, tmp_path):
    files = {}
    for split, rows in (('train', range(40)), ('test', range(40, 60))):
        buffer = io.BytesIO()
        fashion.select(rows).to_parquet(buffer)
        files[f'data/{split}-00000-of-00001.parquet'] = buffer.getvalue()
    hub.add_commit('org/images', files, repo_type='dataset')
    ended = hub_children.run(hub_programs.load_validation_split, hub.environment(tmp_path / 'home'))
    assert ended.stdout == f'20 test T-shirt/top {sum(fashion[40:60]["label"])}\n'
    assert hub.seen('GET .*test-00000') and not hub.seen('GET .*train-00000')


@pytest.mark.parametrize('argv, words', [
    (['fill', '--dataset', 'x', '--teacher', 't', '--epochs', '1', '--logits', URL], ['only read', 'store push']),
    (['store', 'copy', 'here', '--output', URL], ['only read']),
    (['store', 'describe', 'here', '--keep-epochs', '0'], ['--keep-epochs']),
    (['train', '--dataset', 'x', '--teacher', 't', '--logits', URL], ['--teacher', 'folder']),
])
def test_what_cannot_be_done_with_one_is_refused_before_anything_is_loaded(argv, words, capsys, one_sentence):
    one_sentence(refusal(cli.main, argv, capsys), *words)


def held_epochs(folder, expire=0.05):
    """`HeldEpochs` of a folder whose leases expire soon; those of other machines alone wait for that."""
    held = HeldEpochs(SimpleNamespace(folder=folder, epoch_folder=lambda epoch: folder / f'epoch-{epoch:05d}'))
    held._leases = Leases(expire)
    return held


def leave_epoch(folder, epoch, readers):
    """An epoch on disk with leases of readers on machines that are no more, or were started anew."""
    place = folder / f'epoch-{epoch:05d}'
    place.mkdir(parents=True)
    (place / 'shard-00000.arrow').write_bytes(b'records')
    for reader in range(readers):
        Leases.path(place / f'reader-{reader}').write_text('{"machine": "another", "pid": 5, "started": "1"}')
    return place


def test_readers_that_died_on_another_boot_keep_nothing_after_the_first_boundary(tmp_path):
    kept, other = (leave_epoch(tmp_path / 'commit', epoch, readers=8) for epoch in (0, 1))
    held = held_epochs(tmp_path / 'commit')
    held.set([0])
    assert kept.exists() and other.exists()
    time.sleep(0.1)
    # All of them were looked at, those on the epoch that this one keeps too, and its own was left alone.
    assert Leases.path(kept / held._name).exists()
    held.set([2])
    assert not kept.exists() and not other.exists()
    held.release()


def test_what_a_dead_fetcher_had_leased_does_not_keep_the_folder_of_a_used_epoch(tmp_path):
    place = leave_epoch(tmp_path / 'commit', 0, readers=0)
    ended = subprocess.Popen(['true'])
    ended.wait()
    lease = {'machine': machine_name(), 'pid': ended.pid, 'started': '1'}
    for shard in (0, 1):  # one that was there already, and one that was on its way
        Leases.path(place / f'shard-0000{shard}.arrow').write_text(json.dumps(lease))
    held = held_epochs(tmp_path / 'commit')
    held.set([1])
    assert not place.exists()
    # One who lives goes on.
    place = leave_epoch(tmp_path / 'commit', 0, readers=0)
    with Leases() as leases:
        leases.acquire(place / 'shard-00001.arrow')
        held.set([2])
        assert [path.name for path in place.iterdir()] == ['.shard-00001.arrow.lease']
    held.release()


def test_other_commits_of_the_repo_go_when_nobody_reads_them(tmp_path):
    folder, old, read = (tmp_path / (40 * letter) for letter in 'abc')  # named by their commits
    for place in (old, read):
        leave_epoch(place, 3, readers=0)
        (place / 'store.json').write_text('{}')
    (tmp_path / 'notes').mkdir()
    folder.mkdir()
    reader, held = held_epochs(read), held_epochs(folder)
    reader._leases.acquire(read / 'epoch-00003' / 'reader-x')
    held.set([0])
    assert not old.exists() and (tmp_path / 'notes').exists()
    assert (read / 'epoch-00003' / 'shard-00000.arrow').exists() and (read / 'store.json').exists()
    for each in (reader, held):
        each.release()


@pytest.fixture
def cache(filled_store, tmp_path) -> ShardCache:
    """A cache of the store behind a URL."""
    return ShardCache(
        RemoteFolder.resolve(f'file://{filled_store}'), tmp_path / 'cache', LogitStore.open(filled_store)._format)


def test_a_shard_that_does_not_end_is_not_taken_in(cache, monkeypatch):
    taken = []

    class Endless(fsspec.get_filesystem_class('memory')):
        def get_file(self, path, file, callback):
            while True:
                taken.append(callback.relative_update(1 << 20))

    monkeypatch.setattr(RemoteFolder, '_open', lambda self: (Endless(), ''))
    monkeypatch.setattr(hub_cache, 'time', SimpleNamespace(sleep=lambda seconds: None))
    with pytest.raises(Damaged):
        cache._download(0, 0)
    assert not taken and not list(cache.folder.rglob('*shard-*'))


def test_the_wait_that_the_hub_asks_for_is_kept_between_shards(cache, monkeypatch):
    clock, calls = [0.], []

    def sleep(seconds):
        clock[0] += seconds

    def download(epoch, shard):
        calls.append(clock[0])
        if len(calls) == 1:
            raise Unavailable('the Hub limits how often you may ask', 7.)
        path = cache.shard_path(epoch, shard)
        path.write_bytes(b'shard')

    monkeypatch.setattr(hub_cache, 'time', SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
    monkeypatch.setattr(cache, '_download', download)
    assert cache.fetch(0, [0])
    assert len(calls) == 2 and calls[1] - calls[0] >= 7


def test_a_manifest_that_is_too_large_is_not_fetched(tmp_path, refused):
    file, size = tmp_path / 'store.json', hub_store.MAX_MANIFEST_SIZE + 1
    source = RemoteFolder.resolve(f'file://{tmp_path}')
    file.write_bytes(bytes(size))
    with refused('store.json', f'{size} bytes', 'at most'):
        hub_store.read_manifest(source)
    file.write_bytes(bytes(size - 1))
    with refused('store.json', 'not readable as JSON'):
        hub_store.read_manifest(source)


@pytest.mark.parametrize('ranks, threads', [(1, 8), (4, 2), (16, 1)])
def test_ranks_of_a_machine_share_out_its_downloads(ranks, threads, monkeypatch):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(ranks))
    used, said = [], []
    cache = SimpleNamespace(
        lacking=lambda epoch: [0], fetch=lambda epoch, shards, threads, **options: used.append(
            (epoch, threads, options.get('patience'))) or True)
    fetcher._carry_out(
        fetcher._Command([1], [2], [1, 2]), cache, SimpleNamespace(set=lambda epochs: None),
        SimpleNamespace(send=said.append, poll=bool))
    assert used == [(1, threads, None), (2, threads, math.inf)] and said[0][1] == 'ready'


def test_a_fetcher_that_is_killed_again_and_again_is_given_up(monkeypatch, refused):
    def start(self):
        self.num_starts += 1
        self.process = SimpleNamespace(is_alive=bool, exitcode=-9)
        self.connection = SimpleNamespace(poll=lambda seconds=0: False, send=lambda command: None)
        self.stop = lambda: None

    monkeypatch.setattr(fetcher.Fetcher, '_start', start)
    fetching = fetcher.Fetcher(SimpleNamespace(source='hf://datasets/org/logits', sizes={}))
    fetching.order([0], [], [0])
    with refused('was ended 6 times', 'status -9', 'memory'):
        while fetching.num_starts < 50:
            fetching._next()


@pytest.mark.parametrize('name', ['../../../outside', '', None, 'main', 'A' * 40, 'a' * 41, f'{"a" * 39}/', '/etc'])
def test_a_commit_that_the_hub_names_is_forty_digits_or_one_sentence(name, run, hub, pushed, tmp_path, one_sentence):
    hub.named_commit = name
    before = set(tree(tmp_path))
    said = run(remote_programs.print_refusal, URL)
    one_sentence(said.strip(), '40 hexadecimal digits', hub.endpoint)
    made = {path for path in set(tree(tmp_path)) - before if not path.startswith('home')}
    assert not made and not list((tmp_path / 'home').rglob('store.json'))


def test_links_in_the_cache_lead_nowhere(run, hub, pushed, tmp_path, one_sentence):
    """An epoch of the store, and what looks like another commit of it, are links to somebody's own store."""
    cache = tmp_path / 'home' / 'assets' / 'timm_tinyvit' / 'org--logits'
    run(remote_programs.read_epochs, 0)
    for name in ('a' * 40, 'own'):
        (tmp_path / name / 'epoch-00000').mkdir(parents=True)
        for file in ('store.json', 'notes', 'epoch-00000/shard-00000.arrow'):
            (tmp_path / name / file).write_bytes(b'precious')
    before = tree(tmp_path / 'own')
    (cache / ('a' * 40)).symlink_to(tmp_path / 'own')
    (tmp_path / ('a' * 40)).rename(cache / 'mine')
    run(remote_programs.read_epochs, 0, 1, 2, 3)
    assert tree(tmp_path / 'own') == before == tree(cache / 'mine')
    (cache / pushed / 'epoch-00001').symlink_to(tmp_path / 'own' / 'epoch-00000')
    said = run(remote_programs.print_refusal, URL)
    one_sentence(said.strip(), str(cache / pushed / 'epoch-00001'), 'is a link')
    assert tree(tmp_path / 'own') == before
