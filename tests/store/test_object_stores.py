"""Stores in object stores: read by fsspec, from the memory of this process and from a real server of S3's interface."""

import re

import fsspec
import pytest

from support.files import tree
from support.s3_server import SECRET
from timm_tinyvit.base import remote_folder
from timm_tinyvit.base.errors import InputError
from timm_tinyvit.store import cache
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.store.remote import RemoteStore, check_content, content_of, open_reader

ROWS = range(120)


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The server, which S3's own variables lead to; what fails is tried again at once."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote_folder, 'OPEN_PAUSES', (0.,) * 10)
    monkeypatch.setattr(cache, 'MAX_PAUSE', 0.1)
    yield s3_server
    s3_server.forget()


@pytest.fixture(scope='module')
def local(filled_store) -> LogitStore:
    return LogitStore.open(filled_store)


def on_disk(store: RemoteStore) -> dict[int, int]:
    return {int(path.name[6:]): len(list(path.glob('shard-*'))) for path in store.folder.glob('epoch-*')}


@pytest.mark.parametrize('protocol', ['memory', 's3', 'file'])
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
