"""What reaches the Hub: the real client in its own processes, against a server that checks it and fails on demand."""

import http.client
import json
import re
from base64 import b64encode
from urllib.parse import urlsplit

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from support import hub_programs
from support.hub_server import READ_TOKEN, TOKEN
from timm_tinyvit.base import hub_client
from timm_tinyvit.base.hub_client import HubUrl, check_repo_id, hub_errors, is_hub_url, parse_hub_url, retried

CARD = b'---\nlicense: mit\n---\n# A model\n'
WEIGHTS = bytes(range(256)) * 40
FILES = {'README.md': CARD, 'config.json': b'{"a": 1}', 'model.safetensors': WEIGHTS, 'plots/curve.png': b'\x89PNG' * 9}

# The steps of a push, in their order.
STEPS = {
    'auth-check': r'GET /api/models/{}/auth-check/write',
    'create': r'POST /api/repos/create',
    'info': r'GET /api/models/{}$',
    'paths-info': r'POST /api/models/{}/paths-info',
    'validate-yaml': r'POST /api/validate-yaml',
    'preupload': r'POST /api/models/{}/preupload',
    'batch': r'POST /{}.git/info/lfs/objects/batch',
    'upload': r'PUT /storage/upload/model/{}/',
    'verify': r'POST /{}.git/info/lfs/objects/verify',
    'commit': r'POST /api/models/{}/commit/',
}


@pytest.fixture
def push(hub, hub_children, tmp_path):
    """`push(job, ...)` does the jobs in one process, and returns how each of them ended."""

    def run(*jobs, **environment):
        jobs = [job | {'files': {path: b64encode(data).decode() for path, data in job.get('files', FILES).items()}}
                for job in jobs]
        result = hub_children.run(
            hub_programs.push_each, hub.environment(tmp_path, **environment), jobs, max_sleep=0.005)
        assert TOKEN not in result.stdout + result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    return run


def changes(request):
    """The paths that a commit names."""
    return [line['value']['path'] for line in map(json.loads, request.body.splitlines()) if line['key'] != 'header']


def raw(address, method='GET', body=None, **headers):
    """An HTTP request as it is, and the answer with its body."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    connection.request(method, f'{parts.path}?{parts.query}', body, headers)
    answer = connection.getresponse()
    answer.content = answer.read()
    connection.close()
    return answer


def test_a_push_is_one_commit_and_the_same_push_again_none(hub, push):
    hub.require_parent = True
    partly = FILES | {'config.json': b'{"a": 2}'}
    first, again, second, third = push(
        {'repo': 'org/name'}, {'repo': 'org/name'}, {'repo': 'org/name', 'files': partly},
        {'repo': 'org/name', 'files': FILES, 'options': {'delete': ['plots/', 'never-there', 'plots/curve.png']}})
    root, *commits = hub.commits('org/name')
    assert [commit.oid for commit in commits] == [first['oid'], second['oid'], third['oid']] and again == {'oid': None}
    assert [commit.parent for commit in commits] == [root.oid, first['oid'], second['oid']]
    assert hub.files('org/name', revision=first['oid']) == FILES
    assert hub.files('org/name', revision=second['oid']) == partly
    assert [changes(request) for request in hub.seen('/commit/')] == [list(FILES), ['config.json'], ['config.json']]
    assert len(hub.seen('PUT')) == 2 and len(hub.seen('/create')) == 1


def test_the_large_file_that_changed_is_sent_alone_and_what_is_not_wanted_goes(hub, push):
    hub.add_commit('org/name', FILES | {'old/a.png': b'old', 'old/b.txt': b'old', 'older.txt': b'older'})
    push({'repo': 'org/name', 'files': FILES | {'model.safetensors': WEIGHTS[::-1]},
          'options': {'delete': ['old/', 'older.txt']}})
    assert hub.files('org/name') == FILES | {'model.safetensors': WEIGHTS[::-1]}
    assert [request.body for request in hub.seen('PUT')] == [WEIGHTS[::-1]]
    assert changes(hub.seen('/commit/')[0]) == ['model.safetensors', 'older.txt', 'old/a.png', 'old/b.txt']


def test_files_on_disk_are_sent_and_known_again(hub, hub_children, tmp_path):
    (tmp_path / 'model.safetensors').write_bytes(WEIGHTS)
    (tmp_path / 'notes.txt').write_bytes(b'notes')
    result = hub_children.run(
        hub_programs.push_twice_from_disk, hub.environment(tmp_path / 'home'), 'model.safetensors', 'notes.txt',
        folder=tmp_path)
    oid = hub.commits('org/name', 'dataset')[-1].oid
    assert result.stdout.split() == [oid, 'None'], result.stderr
    assert hub.files('org/name', 'dataset') == {'model.safetensors': WEIGHTS, 'notes.txt': b'notes'}
    assert hub.repos['dataset', 'org/name'].private


def test_steps_that_fail_once_are_done_again(hub, push):
    jobs = []
    for index, how in enumerate(('500', '429', 'cut', 'lost')):
        repo = f'org/{how}'
        for pattern in STEPS.values():
            # Where the repo is not in the address, the first request of each job comes after those of the jobs before.
            hub.fail(pattern.format(repo), how, skip=0 if '{}' in pattern else index)
        jobs.append({'repo': repo, 'pauses': [.001] * len(STEPS)})
    for job, end in zip(jobs, push(*jobs)):
        assert [commit.oid for commit in hub.commits(job['repo'])][1:] == [end.get('oid')], (job, end)
        assert hub.files(job['repo']) == FILES, job
    assert not [fault for fault in hub.faults if fault.times]


def test_a_step_that_fails_for_good_leaves_the_repo_as_it_was(hub, push, one_sentence):
    jobs, expected = [], []
    for step, pattern in STEPS.items():
        for how, word in (('503', 'HTTP 503'), ('429', 'limits'), ('cut', 'connection')):
            if '{}' not in pattern:
                continue
            repo = f'org/{step}-{how}'
            hub.add_commit(repo, {'config.json': b'before'})
            hub.fail(pattern.format(repo), how, times=99)
            jobs.append({'repo': repo, 'pauses': [.001] if step == 'commit' else []})
            expected.append(word)
    for job, end, word in zip(jobs, push(*jobs), expected):
        one_sentence(end['error'], word, job['repo'])
        assert len(hub.commits(job['repo'])) == 2 and hub.files(job['repo']) == {'config.json': b'before'}, job
    assert [len(hub.seen(f'commit-{how}/commit')) for how in ('503', '429', 'cut')] == [2, 2, 2]


def test_an_address_of_the_storage_that_has_expired_is_asked_for_anew(hub, push, one_sentence):
    hub.fail('PUT /storage/upload/model/org/once', '403', times=2)
    hub.fail('PUT /storage/upload/model/org/always', '403', times=99)
    _, always = push({'repo': 'org/once'}, {'repo': 'org/always'})
    assert len(hub.seen('org/once.git.*batch')) == 2 and hub.files('org/once') == FILES
    one_sentence(always['error'], 'org/always', 'expired')
    assert not hub.files('org/always')


def test_a_card_that_the_hub_refuses_stops_the_push_before_anything_is_sent(hub, push, one_sentence):
    end, = push({'repo': 'org/name', 'files': FILES | {'README.md': b'---\ntags: 3\n---\n'}})
    one_sentence(end['error'], 'org/name', '"tags" must be an array')
    assert not hub.seen('PUT|preupload|/commit/')


def test_a_commit_of_somebody_else_in_between_is_kept(hub, push, one_sentence):
    hub.fail('org/other/commit/', 'commit-between', times=2)
    hub.fail('org/same/commit/', 'commit-between', files={'config.json': b'theirs'})
    hub.fail('org/equal/commit/', 'commit-between', files=FILES)
    hub.fail('org/busy/commit/', 'commit-between', times=99)
    other, same, equal, busy = push(*({'repo': f'org/{name}'} for name in ('other', 'same', 'equal', 'busy')))
    # Theirs is another file: the same push goes on top of it.
    assert hub.files('org/other') == FILES | {'theirs.txt': b'theirs'}
    assert [commit.message for commit in hub.commits('org/other')][1:] == ['a commit of somebody else'] * 2 + ['a push']
    assert hub.commits('org/other')[-1].oid == other['oid'] and len(hub.seen('PUT .*org/other')) == 2
    one_sentence(same['error'], 'org/same', 'config.json', 'somebody else')
    assert hub.files('org/same') == {'config.json': b'theirs'}
    # Two that push the same need not notice each other.
    assert hub.files('org/equal') == FILES and equal['oid'] == hub.commits('org/equal')[-1].oid
    assert len(hub.commits('org/equal')) == 2
    one_sentence(busy['error'], 'org/busy', 'all the time')
    assert hub.files('org/busy') == {'theirs.txt': b'theirs'}


def test_a_push_onto_a_commit_that_is_not_the_newest_is_refused(hub, push, one_sentence):
    old = hub.add_commit('org/name', {'config.json': b'old'})
    new = hub.add_commit('org/name', {'config.json': b'new'})
    late, same, onto = push(
        {'repo': 'org/name', 'options': {'parent': old}},
        {'repo': 'org/name', 'files': {'config.json': b'new'}, 'options': {'parent': old}},
        {'repo': 'org/name', 'options': {'parent': new}})
    one_sentence(late['error'], 'org/name', new, old)
    assert same == {'oid': None}
    assert hub.commits('org/name')[-1].oid == onto['oid'] and hub.commits('org/name')[-1].parent == new


def test_files_that_a_gitignore_of_the_repo_drops_are_missed(hub, push, one_sentence):
    hub.add_commit('org/name', {'.gitignore': b'*.safetensors\n'})
    end, = push({'repo': 'org/name'})
    one_sentence(end['error'], 'model.safetensors', '.gitignore')


@pytest.mark.parametrize('token, words', [
    ('hf_wrongTokenOfSomebodyElse', ['org/name', 'token is wrong', 'hf auth login']),
    (READ_TOKEN, ['org/name', 'may not do that', 'write access']),
    (None, ['org/name', 'log in with `hf auth login`, or set HF_TOKEN']),
])
def test_a_token_that_may_not_write_is_one_sentence_without_it(hub, hub_children, tmp_path, one_sentence, token, words):
    hub.add_repo('org/name')
    result = hub_children.run(hub_programs.push, hub.environment(tmp_path, token), status=2)
    one_sentence(result.stderr.strip(), 'error: ', *words)
    assert 'hf_' not in result.stdout + result.stderr
    assert len(hub.commits('org/name')) == 1 and not hub.seen('PUT|preupload')


def test_a_repo_in_a_foreign_place_cannot_be_made(hub, hub_children, tmp_path, one_sentence):
    hub.namespaces = {'another'}
    result = hub_children.run(hub_programs.push, hub.environment(tmp_path), status=2)
    one_sentence(result.stderr.strip(), 'org/name', 'under the namespace "org"')
    assert not hub.repos


def test_a_token_that_the_hub_repeats_is_left_out(hub, hub_children, tmp_path, one_sentence):
    hub.fail('POST /api/repos/create', '400', message=f'{TOKEN} cannot do this')
    result = hub_children.run(hub_programs.push, hub.environment(tmp_path), status=2)
    one_sentence(result.stderr.strip(), 'HTTP 400', '*** cannot do this')
    assert TOKEN not in result.stdout + result.stderr


def test_a_stored_token_serves_as_well_and_is_not_in_the_repo(hub, hub_children, tmp_path):
    (tmp_path / 'token').write_text(TOKEN)
    hub_children.run(hub_programs.push, hub.environment(tmp_path, token=None))
    assert set(hub.files('org/name')) == {'config.json', 'model.safetensors'}
    assert {request.token for request in hub.requests if request.server == 'hub'} == {TOKEN}


@pytest.mark.parametrize('changes, words', [
    ({'HF_HUB_OFFLINE': '1'}, ['HF_HUB_OFFLINE is set']),
    ({'HF_ENDPOINT': 'http://127.0.0.1:9'}, ['no connection to http://127.0.0.1:9', 'check the network']),
    ({'HTTP_PROXY': 'http://127.0.0.1:9'}, ['no connection', 'check the network']),
])
def test_without_a_way_to_the_hub_there_is_one_sentence(hub, hub_children, tmp_path, one_sentence, changes, words):
    result = hub_children.run(hub_programs.push, hub.environment(tmp_path) | changes, status=2)
    one_sentence(result.stderr.strip().splitlines()[-1], 'error: cannot write to the model repo org/name', *words)
    assert 'Traceback' not in result.stderr and not hub.requests


def test_a_hub_that_does_not_answer_is_given_up(hub, hub_children, tmp_path, one_sentence):
    hub.fail('/commit/', 'hang', times=9)
    result = hub_children.run(hub_programs.push_without_patience, hub.environment(tmp_path), status=2)
    one_sentence(result.stderr.strip().splitlines()[-1], 'org/name', 'does not answer in time')
    assert len(hub.commits('org/name')) == 1


def test_the_wait_that_the_hub_asks_for_is_kept(hub, monkeypatch, capsys, refused):
    hub.add_repo('org/name')
    slept = []
    monkeypatch.setattr(hub_client.time, 'sleep', slept.append)
    api = HfApi(endpoint=hub.endpoint, token=TOKEN)
    hub.fail('GET', '429', retry_after=7)
    hub.fail('GET', '503')
    assert retried('look', lambda: api.model_info('org/name'), [1, 2]).id == 'org/name'
    assert slept == [7, 2]
    assert 'cannot look yet: the Hub limits' in capsys.readouterr().err
    # Too long to wait for it here.
    hub.fail('GET', '429', retry_after=3600)
    with refused('cannot look', '3600 seconds'):
        retried('look', lambda: api.model_info('org/name'), [1, 2])
    assert slept == [7, 2]


def test_what_the_hub_does_not_have_is_named(hub, refused):
    hub.add_commit('org/name', {'config.json': b'{}'})
    hub.add_repo('org/secret', private=True)
    api, nobody = HfApi(endpoint=hub.endpoint, token=TOKEN), HfApi(endpoint=hub.endpoint, token=False)
    with refused('cannot look: there is no such repo'), hub_errors('look'):
        api.model_info('org/absent')
    with refused('cannot look: there is no such repo', 'hf auth login'), hub_errors('look'):
        nobody.model_info('org/secret')
    with refused('no such revision'), hub_errors('look'):
        api.model_info('org/name', revision='v2')
    with refused('there is no file weights/a b.bin in the repo'), hub_errors('look'):
        api.hf_hub_download('org/name', 'weights/a b.bin')
    with refused('expected ORG/NAME'), hub_errors('look'):
        api.model_info('org/name/more')


def test_a_cache_that_cannot_be_written_is_named(hub, tmp_path, refused):
    hub.add_commit('org/name', {'config.json': b'{}'})
    (tmp_path / 'cache').touch()
    with refused('cannot fetch it: Not a directory', str(tmp_path)), hub_errors('fetch it'):
        HfApi(endpoint=hub.endpoint, token=TOKEN).hf_hub_download(
            'org/name', 'config.json', cache_dir=tmp_path / 'cache')


def test_errors_that_are_no_fault_of_the_hub_stay_what_they_are():
    with pytest.raises(ValueError, match='of our own'), hub_errors('look'):
        raise ValueError('of our own')
    with pytest.raises(json.JSONDecodeError):
        retried('look', lambda: json.loads('{'), [0])
    with pytest.raises(TypeError), hub_errors('look'):
        HfApi().model_info()


def test_names_of_repos_are_checked_without_the_hub(refused):
    check_repo_id('org/my-model_1.5')
    for name in ('name', 'org/name/more', 'org/', '/name', 'org/na me', 'org/a--b', 'org/name.git', ''):
        with refused('is no name of a repo', repr(name), 'ORG/NAME'):
            check_repo_id(name)


@pytest.mark.parametrize('text, url', [
    ('hf://datasets/org/name', HubUrl('org/name', 'dataset')),
    ('hf://datasets/org/name/', HubUrl('org/name', 'dataset')),
    ('hf://datasets/org/name@v1.0/stores/a/', HubUrl('org/name', 'dataset', 'v1.0', 'stores/a')),
    ('hf://datasets/org/name@refs/pr/3/a', HubUrl('org/name', 'dataset', 'refs/pr/3', 'a')),
    ('hf://org/name', HubUrl('org/name', 'model')),
    ('hf://models/org/name@main', HubUrl('org/name', 'model', 'main')),
    ('https://huggingface.co/datasets/org/name/tree/main/a', HubUrl('org/name', 'dataset', 'main', 'a')),
])
def test_places_on_the_hub_are_read(text, url):
    assert is_hub_url(text) and parse_hub_url(text) == url


@pytest.mark.parametrize('text', [
    'hf://', 'hf://datasets/name', 'hf://datasets/org/name@', 'hf://datasets/org/na me', 'hf://spaces/org/name',
    'hf://buckets/org/name', 'https://huggingface.co/datasets/org/name/discussions'])
def test_what_is_no_place_on_the_hub_is_refused(text, refused):
    assert is_hub_url(text)
    with refused(text, 'hf://datasets/ORG/NAME'):
        parse_hub_url(text)


def test_folders_are_no_places_on_the_hub():
    assert not any(map(is_hub_url, ['stores/in1k', '/data/hf', 'C:/stores', 'hf', './hf://', 's3://bucket/store']))


def test_the_server_serves_files_whole_in_parts_and_with_their_hashes(hub):
    oid = hub.add_commit('org/name', {'notes.txt': b'0123456789', 'model.safetensors': WEIGHTS})
    base = f'{hub.endpoint}/org/name/resolve/main'
    answer = raw(f'{base}/notes.txt', Range='bytes=2-5')
    assert (answer.status, answer.content, answer.headers['Content-Range']) == (206, b'2345', 'bytes 2-5/10')
    # What git calls a file of these ten bytes.
    assert answer.headers['ETag'] == '"ad471007bd7f5983d273b9584e5629230150fd54"'
    assert answer.headers['X-Repo-Commit'] == oid
    assert raw(f'{base}/notes.txt', Range='bytes=-3').content == b'789'
    assert raw(f'{base}/notes.txt', Range='bytes=8-').content == b'89'
    assert raw(f'{base}/notes.txt', Range='bytes=10-').status == 416
    assert raw(f'{base}/notes.txt', 'HEAD').headers['Content-Length'] == '10'
    answer = raw(f'{base}/model.safetensors', 'HEAD')
    assert answer.status == 302 and answer.headers['X-Linked-Size'] == str(len(WEIGHTS))
    storage = answer.headers['Location']
    assert storage.startswith(hub.storage) and raw(storage).content == WEIGHTS
    assert raw(storage[:-1] + '#').status == 403
    assert raw(f'{base}/absent').headers['X-Error-Code'] == 'EntryNotFound'
    assert raw(f'{hub.endpoint}/org/name/resolve/v9/notes.txt').headers['X-Error-Code'] == 'RevisionNotFound'


def test_the_server_lists_trees_in_pages(hub):
    hub.page_size = 2
    hub.add_commit('org/name', {f'folder/{number}/a.txt': b'a' for number in range(3)})
    api = HfApi(endpoint=hub.endpoint, token=TOKEN)
    found = [item.path for item in api.list_repo_tree('org/name', recursive=True)]
    assert sorted(found) == [
        '.gitattributes', 'folder', 'folder/0', 'folder/0/a.txt', 'folder/1', 'folder/1/a.txt', 'folder/2',
        'folder/2/a.txt']
    assert [item.path for item in api.list_repo_tree('org/name', 'folder')] == ['folder/0', 'folder/1', 'folder/2']
    assert len(hub.seen('/tree/')) == 6


def test_the_server_sees_what_a_client_must_not_do(hub):
    repo = hub.add_repo('org/name')
    write = {'Authorization': f'Bearer {TOKEN}'}
    commit = f'{hub.endpoint}/api/models/org/name/commit/main'
    header = {'key': 'header', 'value': {'summary': 'a'}}

    def lines(*items):
        return b''.join(json.dumps(item).encode() + b'\n' for item in items)

    def expect(status, word, *request, **headers):
        assert raw(*request, **headers).status == status
        assert re.search(word, hub.violations.pop()) and not hub.violations

    oid = '0' * 64
    expect(400, 'not uploaded', commit, 'POST', lines(header, {'key': 'lfsFile', 'value': {
        'path': 'a.bin', 'oid': oid, 'size': 3}}), **write)
    expect(400, 'large file', commit, 'POST', lines(header, {'key': 'file', 'value': {
        'path': 'a.bin', 'content': 'YWJj'}}), **write)
    expect(400, 'without a change', commit, 'POST', lines(header), **write)
    hub.require_parent = True
    expect(400, 'parent', commit, 'POST', lines(header, {'key': 'file', 'value': {
        'path': 'a.txt', 'content': 'YWJj'}}), **write)
    upload = hub.sign(f'/storage/upload/model/org/name/3/{oid}')
    expect(400, 'not 000', upload, 'PUT', b'abc')
    expect(400, 'token', upload, 'PUT', b'abc', **write)
    expect(400, 'token', f'{hub.endpoint}/api/models/org/name?token={TOKEN}')
    assert raw(commit, 'POST', lines(header)).status == 401 and len(repo.commits) == 1
    with pytest.raises(HfHubHTTPError):
        HfApi(endpoint=hub.endpoint, token='hf_wrong').model_info('org/name')


def test_a_download_that_is_cut_is_done_again_and_wrong_bytes_are_not_noticed(hub, hub_children, tmp_path):
    hub.add_commit('org/name', {f'{name}.arrow': name.encode() * 1000 for name in ('cut', 'wrong', 'short')})
    hub.fail('GET /storage/.*cut', 'cut')
    hub.fail('GET /storage/.*wrong', 'wrong-bytes')
    hub.fail('GET /storage/.*short', 'short')
    result = hub_children.run(hub_programs.download, hub.environment(tmp_path), 'cut', 'wrong', 'short')
    # The client compares sizes alone: who needs the right bytes checks them.
    assert result.stdout.split() == ['cut', 'True', '3000', 'wrong', 'False', '5000', 'short', 'True', '5000']
    assert len(hub.seen('GET /storage/.*cut')) == len(hub.seen('GET /storage/.*short')) == 2
