"""Stores in object stores: read by fsspec, from the memory of this process and from a real server of S3's interface."""

import os
import re
import signal
import time

import fsspec
import pytest
import s3fs

from support.files import tree
from support.flags import ROOT, SMALL_VIEWS, small_data
from support.programs import refusal
from support.s3_server import SECRET
from support.waiting import wait_until
from timm_tinyvit import cli
from timm_tinyvit.base import remote_folder
from timm_tinyvit.base.errors import InputError
from timm_tinyvit.base.remote_folder import RemoteFolder
from timm_tinyvit.store import cache
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.store.object_store import ObjectStore
from timm_tinyvit.store.remote import RemoteStore, check_content, content_of, open_reader
from timm_tinyvit.teacher.progress import StoreProgress

ROWS = range(120)
# Of all files, and not to find out whether one is a folder.
LISTING = 'GET .*list-type.*delimiter=&'


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The server, which S3's own variables lead to; what fails is tried again at once."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote_folder, 'OPEN_PAUSES', (0.,) * 10)
    monkeypatch.setattr(remote_folder, 'WRITE_PAUSES', (0.,) * 10)
    monkeypatch.setattr(cache, 'MAX_PAUSE', 0.1)
    yield s3_server
    s3_server.forget()


@pytest.fixture(scope='module')
def local(filled_store) -> LogitStore:
    return LogitStore.open(filled_store)


def on_disk(store: RemoteStore) -> dict[int, int]:
    return {int(path.name[6:]): len(list(path.glob('shard-*'))) for path in store.folder.glob('epoch-*')}


@pytest.mark.parametrize('protocol', ['memory', pytest.param('s3', marks=pytest.mark.launches), 'file'])
def test_a_store_behind_a_url_is_read_with_the_epochs_in_use_on_disk(
        protocol, request, filled_store, local, tmp_path, refused):
    url = f'{protocol}://bucket/in1k'
    if protocol == 's3':
        s3 = request.getfixturevalue('s3')
        s3.put_tree('in1k', filled_store, leave_out='epoch-00003')
        # Whatever goes wrong on the way is tried again.
        for pattern, how, times in (
                ('HEAD .*store.json', '503', 2), ('GET .*store.json', '503', 7), ('GET .*store.json', 'cut', 1),
                ('GET /bucket.*list-type', '500', 1), ('GET .*00000/shard-00001', 'cut', 2),
                ('GET .*00000/shard-00002', '503', 7), ('GET .*00000/shard-00003', 'wrong-bytes', 2),
                ('GET .*00001/shard-00004', '500', 3), ('GET .*00001/shard-00005', 'wrong-bytes', 1)):
            s3.fail(pattern, how, times)
    elif protocol == 'memory':
        for path, data in tree(filled_store, hidden=False).items():
            if not path.startswith('epoch-00003'):
                fsspec.filesystem('memory').pipe_file(f'/bucket/in1k/{path}', data)
    else:
        LogitStore.create(tmp_path / 'copy', local.manifest)
        for path, data in tree(filled_store, hidden=False).items():
            (tmp_path / 'copy' / path).parent.mkdir(exist_ok=True)
            (tmp_path / 'copy' / path).write_bytes(data)
        for file in (tmp_path / 'copy' / 'epoch-00003').iterdir():
            file.unlink()
        url = f'file://{tmp_path}/copy'
    store = open_reader(url, cache_dir=tmp_path / 'cache')
    assert store.path == url and store.manifest == local.manifest
    assert store.missing(range(4)) == [(3, shard) for shard in range(6)]
    assert store.size() == sum(path.stat().st_size for path in filled_store.glob('epoch-0000[012]/*'))
    assert (store.read_digests(2) == local.read_digests(2)).all()
    # A training, whose epochs a process beside it brings and removes.
    for epoch in (0, 1):
        store.prefetch([epoch], [epoch + 1])
        assert store.wait() and (store.read(epoch, ROWS) == local.read(epoch, ROWS)).all()
        for shard in range(6):
            assert store.shard_path(epoch, shard).read_bytes() == local.shard_path(epoch, shard).read_bytes()
    store.prefetch([2])
    assert store.wait() and on_disk(store)[2] == 6 and 0 not in on_disk(store)
    del store
    # Who does not say what comes next keeps what was read last.
    store = open_reader(f'{url}/', keep_epochs=1, cache_dir=tmp_path / 'cache')
    assert list(store.verify(range(3))) == [] and list(on_disk(store)) == [2]
    with refused(url, 'no epoch 3 yet', f'timm-tinyvit fill --logits {url}'):
        store.read(3, [0])
    check_content(store, content_of(local), 4)
    if protocol == 's3':
        assert not [fault for fault in s3.faults if fault.times]
        assert not [path for path in tmp_path.rglob('*') if path.is_file() and SECRET.encode() in path.read_bytes()]
        # Somebody has filled it meanwhile.
        s3.put_tree('in1k', filled_store, leave_out='(?!epoch-00003)')
        assert (store.read(3, ROWS) == local.read(3, ROWS)).all()


@pytest.mark.parametrize('url, words', [
    ('s3://nowhere/in1k', ['no such place', 'check the URL']),
    ('s3://bucket/nothing', ['no store.json']),
    ('s3://bucket/denied', ['denied', 'credentials']),
    ('s3://bucket/anonymous', ['credentials']),
    ('s3://Not_A_Bucket!/in1k', ['ucket']),
    ('s3://', ['s3://BUCKET/NAME']),
    (f's3://KEY:{SECRET}@bucket/in1k', ['credentials', 'leave them out']),
    (f's3://bucket/in1k?secret={SECRET}', ['credentials', 'leave them out']),
    ('s4://bucket/in1k', ['unknown protocol s4', 's3://']),
    ('simplecache::s3://bucket/in1k', ['unknown protocol']),
    ('gs://bucket/in1k', ['not installed', 'gcsfs']),
    ('s3://bucket/broken', ['fetched 3 times', 'epoch-00000/shard-00000']),
])
def test_what_cannot_be_read_is_one_sentence_without_a_secret(
        url, words, s3, filled_store, monkeypatch, tmp_path, one_sentence, capsys):
    s3.fail('(HEAD|GET) /bucket/denied', '403', 99)
    if 'broken' in url:
        s3.put_tree('broken', filled_store)
        s3.fail('GET /bucket/broken/epoch-00000/shard-00000', 'wrong-bytes', 99)
    if 'anonymous' in url:
        monkeypatch.delenv('AWS_ACCESS_KEY_ID')
        monkeypatch.delenv('AWS_SECRET_ACCESS_KEY')
    with pytest.raises(InputError) as caught:
        open_reader(url, cache_dir=tmp_path).read(0, ROWS)
    one_sentence(str(caught.value), *words)
    assert SECRET not in str(caught.value)
    # What does not pass is not tried again.
    assert not re.search('trying again', capsys.readouterr().err)


# Filling


def fill(teacher, url, *more):
    """The command that has made the store of the tests in a folder."""
    return ['fill', *small_data(120), *SMALL_VIEWS, '--teacher', teacher, '--logits', url, '--epochs', '4', '--topk',
            '3', '--shard-size', '20', '--quiet', *more]


@pytest.fixture
def own_disk(monkeypatch, tmp_path):
    """A cache of this test alone."""
    monkeypatch.setattr('timm_tinyvit.store.remote.constants.HF_ASSETS_CACHE', str(tmp_path / 'cache'))


@pytest.mark.usefixtures('own_disk', 'one_launch_each')
def test_a_store_that_is_filled_behind_a_url_is_the_one_in_a_folder(
        s3, teacher, filled_store, keyed_store, tmp_path, capsys):
    url = 's3://bucket/filled'
    for pattern, how, times, seconds in (
            ('PUT .*store.json', '501', 1, 0.), ('PUT .*00001/shard-00001', '503', 7, 0.),
            ('PUT .*00001/shard-00002', 'cut', 1, 0.), ('PUT .*images/', '500', 1, 0.),
            ('PUT .*00002/shard', '500', 2, 0.), ('HEAD .*00003/shard', '503', 2, 0.),
            (LISTING, 'slow', 99, 0.3)):
        s3.fail(pattern, how, times, seconds)
    cli.main(fill(teacher, url, '--shards', '0:4'))
    store = ObjectStore.open(url)
    with StoreProgress(store, range(4), range(6)) as progress:
        # Others, too, put theirs.
        assert progress._views == 4 * 80
        s3.put_tree('filled', filled_store, leave_out='(?!epoch-00003/shard-00004)')
        store._next_look = 0.
        progress._due = 0.
        progress.refresh()
        assert progress._grown == (20, (filled_store / 'epoch-00003' / 'shard-00004.arrow').stat().st_size)
    cli.main(fill(teacher, url))
    assert s3.tree('filled') == tree(filled_store, hidden=False)
    # Each shard was put once, but for the one whose answer was lost, and a look came before.
    put = s3.seen('PUT .*/epoch', '200')
    looked = {line.partition(' ')[2] for line in s3.seen('HEAD .*/epoch')}
    assert len(put) == 25 and len({line.partition(' ')[2] for line in put} - looked) == 1
    assert 4 < len(s3.seen(LISTING)) < 20
    assert [fault.times for fault in s3.faults if fault.times] == [99 - len(s3.seen(LISTING))]
    capsys.readouterr()
    # A further launch has nothing to do, and none that wants another store.
    cli.main(fill(teacher, url))
    assert len(s3.seen('PUT .*/epoch', '200')) == 25
    assert 'k: 3, not 4' in refusal(cli.main, fill(teacher, url, '--topk', '4'), capsys)
    for words in (f'describe {url}', f'verify {url}', f'copy {url} --output {tmp_path}/copy'):
        cli.main(['store', *words.split()])
    said = capsys.readouterr().out
    assert '24 of 24' in said and 'on s3://' in said and '24 shards, every byte' in said
    assert tree(tmp_path / 'copy', hidden=False) == tree(filled_store, hidden=False)
    # One that knows its samples by key.
    data, keyed = keyed_store
    cli.main(['fill', '--dataset', str(data), '--key', 'name', '--teacher', teacher, '--logits', 's3://bucket/keyed',
              '--epochs', '3', '--img-size', '32', '--shard-size', '10', '--workers', '0', '--quiet'])
    assert s3.tree('keyed') == tree(keyed, hidden=False)


@pytest.mark.launches
def test_writers_who_share_nothing_fill_one_store_and_a_killed_one_loses_its_open_shard(
        s3, teacher, filled_store, hub_children, tmp_path):
    url = 's3://bucket/shared'
    # A machine of its own each, and time between a shard and the next.
    s3.fail('PUT .*/epoch', 'slow', 999, 0.1)
    command = ['-m', 'timm_tinyvit', *fill(teacher, url, '--epochs', '8')]
    first, second = (hub_children.start(
        command, {**os.environ, 'HF_HOME': str(tmp_path / name), 'PYTHONPATH': str(ROOT)}) for name in ('one', 'two'))
    wait_until(lambda: len(s3.seen('PUT .*/epoch')) > 6)
    second.kill(signal.SIGKILL)
    assert second.wait().returncode == -signal.SIGKILL
    ended = first.wait()
    assert ended.returncode == 0, ended.stderr
    there = s3.tree('shared')
    expected = tree(filled_store, hidden=False)
    assert all(there[name] == data for name, data in expected.items() if name != 'store.json')
    assert len(there) == 1 + 6 + 8 * 6
    # Done twice: what the killed one had open, and seldom what both took at a time.
    assert 48 <= len(s3.seen('PUT .*/epoch')) < 48 + 8
    # As both began at once, and one put the manifest.
    assert len(s3.seen('PUT .*store.json')) >= 1 and len(s3.seen('PUT .*store.json', '200')) == 1


def test_a_store_that_another_creates_while_a_writer_looks_whether_the_place_is_empty_is_joined(
        s3, filled_store, local, monkeypatch):
    listed = s3fs.S3FileSystem._lsdir

    async def put_just_after(*args, **options):
        there = await listed(*args, **options)
        s3.client.put_object(Bucket='bucket', Key='both/store.json', Body=(filled_store / 'store.json').read_bytes())
        return there

    monkeypatch.setattr(s3fs.S3FileSystem, '_lsdir', put_just_after)
    assert ObjectStore.create('s3://bucket/both', local.manifest).manifest == local.manifest


def test_an_answer_that_never_comes_is_not_waited_for(s3, monkeypatch):
    monkeypatch.setattr(remote_folder, 'ANSWER_SECONDS', 0.5)
    folder = RemoteFolder.resolve('s3://bucket/silent')
    for method in ('PUT', 'HEAD', 'GET'):
        s3.fail(f'{method} /bucket/silent/notes', 'silent', 2)
    start = time.monotonic()
    folder.write('notes.txt', b'words')
    assert folder.has('notes.txt') and folder.read('notes.txt') == b'words'
    # Sooner than by the 15 s that s3fs waits for an answer.
    assert time.monotonic() - start < 10 and all(fault.times == 0 for fault in s3.faults)


@pytest.mark.parametrize('url, denied, words', [
    ('s3://bucket/readonly', 'PUT', ['denied', 'credentials', 'write store.json']),
    ('s3://nowhere/in1k', 'nothing', ['no such place', 'bucket']),
    ('s3://bucket/full', 'nothing', ['holds something else']),
    ('file:///tmp/in1k', 'nothing', ['only read']),
])
@pytest.mark.usefixtures('own_disk', 'one_launch_each')
def test_what_cannot_be_filled_is_one_sentence(url, denied, words, s3, teacher, capsys, one_sentence):
    s3.client.put_object(Bucket='bucket', Key='full/notes.txt', Body=b'words')
    s3.fail(denied, '403', 99)
    message = refusal(cli.main, fill(teacher, url), capsys)
    one_sentence(message, *words)
    assert 'trying again' not in message and SECRET not in message
