"""A small server of the Hub's HTTP interface on this machine, for the real clients of the tests.

    with HubServer() as hub:
        hub_children.run([...], hub.environment(tmp_path))     # see hub_child.py
        assert hub.files('org/name')['config.json'] == ...

Repos live in memory. As with the real Hub, large files go to and come from another server, the storage, by signed
addresses, and tokens must not get there. What a client does against the protocol (an upload that is not what its name
says, a commit that names what was not uploaded, a token where it does not belong) is refused and noted in
`violations`, which a test wants empty at its end. `fail` breaks chosen requests in chosen ways.
"""

import base64
import fnmatch
import hashlib
import hmac
import json
import os
import re
import secrets
import threading
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

TOKEN = 'hf_TheTokenOfTheTests0123456789abcd'
READ_TOKEN = 'hf_TheReadOnlyTokenOfTheTests012345'
LFS_SUFFIXES = ('.arrow', '.bin', '.gz', '.jpg', '.npz', '.parquet', '.png', '.pt', '.pth', '.safetensors', '.tar',
                '.webp', '.zip')
GITATTRIBUTES = ''.join(f'*{suffix} filter=lfs diff=lfs merge=lfs -text\n' for suffix in LFS_SUFFIXES).encode()
DATE = '2026-01-01T00:00:00.000Z'
PREFIXES = {'model': '', 'dataset': 'datasets/'}
TRUE_NAME = 'as it is called'


@dataclass(frozen=True)
class Entry:
    """A file at a commit."""
    data: bytes = field(repr=False)
    is_lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blob_id(self) -> str:
        """What git calls it: the hash of the file, or of the pointer that stands for a large one."""
        data = self.data
        if self.is_lfs:
            data = f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n'.encode()
        return hashlib.sha1(f'blob {len(data)}\0'.encode() + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id

    def info(self, path: str) -> dict:
        found = {'type': 'file', 'path': path, 'size': len(self.data), 'oid': self.blob_id}
        if self.is_lfs:
            found['lfs'] = {'oid': self.sha256, 'size': len(self.data), 'pointerSize': 134}
        return found


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    message: str
    entries: dict[str, Entry]

    @property
    def files(self) -> dict[str, bytes]:
        return {path: entry.data for path, entry in self.entries.items()}


@dataclass
class Repo:
    repo_type: str
    repo_id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    uploaded: dict[str, bytes] = field(default_factory=dict)

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def commit(self, entries: dict[str, Entry], message: str) -> Commit:
        parent = self.commits[-1].oid if self.commits else None
        oid = hashlib.sha1(f'{self.repo_id} {parent} {message} {secrets.token_hex(8)}'.encode()).hexdigest()
        self.commits.append(Commit(oid, parent, message, dict(sorted(entries.items()))))
        return self.head

    def at(self, revision: str) -> Commit:
        revision = self.refs.get(revision, revision)
        if revision in ('main', 'refs/heads/main'):
            return self.head
        for commit in self.commits:
            if len(revision) >= 7 and commit.oid.startswith(revision):
                return commit
        raise Refused(404, f'Invalid rev id: {revision}', code='RevisionNotFound')


@dataclass
class Request:
    """What a client has sent, and what it got."""
    server: str
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    length: int
    body: bytes
    status: int | None = None

    @property
    def line(self) -> str:
        return f'{self.method} {self.path}'

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def token(self) -> str | None:
        return self.headers.get('authorization', '').removeprefix('Bearer ') or None


@dataclass
class Response:
    status: int = 200
    body: bytes = b''
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: object, **headers: str) -> 'Response':
        return cls(200, json.dumps(value).encode(), {'Content-Type': 'application/json', **headers})


class Refused(Exception):
    """An answer that is an error, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        headers = {'Content-Type': 'application/json', 'X-Error-Message': message, **headers}
        if code:
            headers['X-Error-Code'] = code
        self.response = Response(status, json.dumps({'error': message}).encode(), headers)


@dataclass
class Fault:
    """Requests to break: those whose `METHOD /path` matches."""
    match: re.Pattern
    how: str
    times: int
    skip: int
    options: dict

    def applies(self, line: str) -> bool:
        if self.times < 1 or not self.match.search(line):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class HubServer:
    """The Hub and its storage, each at a name of its own; a context manager.

    Args:
        token: May read and write everything.
        namespaces: Users and organisations in which it may make repos; None for all.
        require_parent: Refuse commits that do not name their parent.
        lfs_bytes: Larger files are large files whatever they are called.
        page_size: Entries of one page of a listing.
    """

    def __init__(
            self,
            token: str = TOKEN,
            namespaces: set[str] | None = None,
            require_parent: bool = False,
            lfs_bytes: int = 10 << 20,
            page_size: int = 1000,
    ):
        self.token = token
        self.namespaces = namespaces
        self.require_parent = require_parent
        self.lfs_bytes = lfs_bytes
        self.page_size = page_size
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.violations: list[str] = []
        self.faults: list[Fault] = []
        # What every answer about a repo or a file calls its commit; None for nothing, by default what it is called.
        self.named_commit: str | None = TRUE_NAME
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self.key = secrets.token_bytes(16)
        # Two names, not only two ports: huggingface_hub 1 takes one host for one server, and goes there with the token.
        self.servers = [_Server(self, name) for name in ('hub', 'storage')]
        self.endpoint, self.storage = (
            f'http://{host}:{server.server_port}' for host, server in zip(('127.0.0.1', 'localhost'), self.servers))
        self.threads = [
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in self.servers]

    def __enter__(self) -> 'HubServer':
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        for server, thread in zip(self.servers, self.threads):
            server.shutdown()
            server.server_close()
            thread.join()

    # What tests ask and tell.

    def environment(self, folder: Path, token: str | None = '', **more: str) -> dict[str, str]:
        """The environment of a process whose Hub this is, and whose caches and stored tokens lie in a folder.

        Args:
            folder: Is the process's HF_HOME.
            token: For HF_TOKEN; the right one by default, None for none.
            more: Further variables.
        """
        kept = {
            name: value for name, value in os.environ.items()
            if not name.startswith(('HF_', 'HUGGING')) and not name.lower().endswith('_proxy')}
        found = kept | {
            'HF_ENDPOINT': self.endpoint, 'HF_HOME': str(folder), 'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_UPDATE_DOWNLOAD_COUNTS': '0', 'HF_HUB_ETAG_TIMEOUT': '5',
            'HF_HUB_DOWNLOAD_TIMEOUT': '5', 'OMP_NUM_THREADS': '1'}
        if token is not None:
            found['HF_TOKEN'] = token or self.token
        return found | more

    def add_repo(self, repo_id: str, repo_type: str = 'model', private: bool = False) -> Repo:
        """Make a repo as the Hub does, with a first commit of its `.gitattributes`."""
        with self.lock:
            repo = self.repos[repo_type, repo_id] = Repo(repo_type, repo_id, private)
            repo.commit({'.gitattributes': Entry(GITATTRIBUTES)}, 'initial commit')
            return repo

    def add_commit(
            self,
            repo_id: str,
            files: dict[str, bytes],
            message: str = 'a commit of somebody else',
            repo_type: str = 'model',
            delete: tuple[str, ...] = (),
    ) -> str:
        """Commit as somebody else, to a new repo if it is not there; returns the commit."""
        with self.lock:
            repo = self.repos.get((repo_type, repo_id)) or self.add_repo(repo_id, repo_type)
            entries = {path: entry for path, entry in repo.head.entries.items() if path not in delete}
            for path, data in files.items():
                entries[path] = Entry(data, self.is_lfs(path, data))
                repo.uploaded[entries[path].sha256] = data
            return repo.commit(entries, message).oid

    def files(self, repo_id: str, repo_type: str = 'model', revision: str = 'main') -> dict[str, bytes]:
        """All files of a repo but `.gitattributes`, with their content, by path."""
        with self.lock:
            found = dict(self.repos[repo_type, repo_id].at(revision).files)
        found.pop('.gitattributes', None)
        return found

    def commits(self, repo_id: str, repo_type: str = 'model') -> list[Commit]:
        """The commits of a repo, the Hub's own first one included, oldest first."""
        with self.lock:
            return list(self.repos[repo_type, repo_id].commits)

    def fail(self, match: str, how: str, times: int = 1, skip: int = 0, **options) -> None:
        """Break requests; of several calls that match one, the earliest that has not been used up.

        Args:
            match: A regular expression that is found in `METHOD /path`; the storage's paths begin with `/storage/`.
            how: A status such as `500` or `429` with a page of a gateway instead of the Hub's words; `cut`, the
                connection ends in the middle of what is sent, or for a GET of what is answered; `lost`, it is done
                and the connection ends before the answer; `wrong-bytes`, right length and wrong content; `short`, a
                shorter answer that says so; `commit-between`, somebody else commits just before; `hang`, no answer.
            times: How many.
            skip: How many to let pass before.
            options: `retry_after` of 429 in seconds, `files` of a commit in between by path, `seconds` of hanging,
                `message` that the answer carries.
        """
        with self.lock:
            self.faults.append(Fault(re.compile(match), how, times, skip, options))

    def seen(self, match: str) -> list[Request]:
        """The requests so far whose `METHOD /path` matches, in their order."""
        with self.lock:
            return [request for request in self.requests if re.search(match, request.line)]

    def forget(self) -> None:
        """Forget the requests so far, and the faults that did not come to pass."""
        with self.lock:
            self.requests.clear()
            self.faults.clear()

    def is_lfs(self, path: str, data: bytes, size: int | None = None) -> bool:
        size = len(data) if size is None else size
        return size > 0 and (path.endswith(LFS_SUFFIXES) or size > self.lfs_bytes or b'\0' in data[:512])

    # What clients ask.

    def answer(self, server: str, request: Request) -> Response:
        """The answer to a request that reached one of the two servers."""
        try:
            for method, pattern, function in ROUTES[server]:
                found = re.fullmatch(pattern, request.path)
                if found and request.method in method:
                    parts = {name: value and unquote(value) for name, value in found.groupdict().items()}
                    with self.lock:
                        self.check_token_use(server, request)
                        return function(self, request, **parts)
            raise Refused(404, 'Sorry, we can\'t find the page you are looking for.')
        except Refused as refused:
            return refused.response

    def check_token_use(self, server: str, request: Request) -> None:
        """Tokens belong into one header of requests to the Hub, and nowhere else."""
        others = {name: value for name, value in request.headers.items() if name != 'authorization'}
        said = f'{request.path} {request.query} {others}'.encode() + request.body
        if self.token.encode() in said:
            self.violation(f'the token is in the address, a header or the body of {request.line}')
        if server == 'storage' and 'authorization' in request.headers:
            self.violation(f'the token went to the storage: {request.line}')

    def violation(self, what: str) -> None:
        self.violations.append(what)
        raise Refused(400, what)

    def role(self, request: Request) -> str | None:
        """What the token may do: `write` or `read`; None without one."""
        if request.token is None:
            return None
        if not request.headers['authorization'].startswith('Bearer '):
            self.violation(f'not a bearer token: {request.line}')
        for role, token in (('write', self.token), ('read', READ_TOKEN)):
            if hmac.compare_digest(token, request.token):
                return role
        raise Refused(401, 'Invalid credentials in Authorization header')

    def repo(self, request: Request, kind: str | None, repo_id: str, write: bool = False) -> Repo:
        role = self.role(request)
        repo = self.repos.get(((kind or 'models').rstrip('/').removesuffix('s'), repo_id))
        if repo is None or (repo.private and role is None):
            # Who is not known does not learn which repos there are.
            raise Refused(404 if role else 401, 'Repository not found' if role else 'Invalid username or password.',
                          code='RepoNotFound')
        if write and role is None:
            raise Refused(401, 'Invalid username or password.')
        if write and role != 'write':
            raise Refused(403, 'You need to be authorized with a token that has write access to this repo')
        return repo

    def url(self, repo: Repo) -> str:
        return f'{self.endpoint}/{PREFIXES[repo.repo_type]}{repo.repo_id}'

    def sign(self, path: str) -> str:
        """An address of the storage that only the Hub can give."""
        signature = hmac.new(self.key, path.encode(), 'sha256').hexdigest()
        return f'{self.storage}{quote(path)}?X-Signature={signature}'

    def check_signature(self, request: Request) -> None:
        expected = self.sign(unquote(request.path)).rpartition('=')[2]
        if request.query.get('X-Signature') != [expected]:
            raise Refused(403, 'SignatureDoesNotMatch')

    def whoami(self, request: Request) -> Response:
        role = self.role(request)
        if role is None:
            raise Refused(401, 'Invalid username or password.')
        return Response.of({
            'type': 'user', 'id': '0', 'name': 'tester', 'fullname': 'Tester', 'orgs': [],
            'auth': {'type': 'access_token', 'accessToken': {'displayName': 'tests', 'role': role}}})

    def create(self, request: Request) -> Response:
        role, wanted = self.role(request), request.json
        if role is None:
            raise Refused(401, 'Invalid username or password.')
        namespace, kind = wanted.get('organization') or 'tester', wanted.get('type') or 'model'
        repo_id = f'{namespace}/{wanted["name"]}'
        if role != 'write' or (self.namespaces is not None and namespace not in self.namespaces):
            raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        if repo := self.repos.get((kind, repo_id)):
            body = {'error': f'You already created this {kind} repo', 'url': self.url(repo)}
            return replace(Response.of(body), status=409)
        repo = self.add_repo(repo_id, kind, wanted.get('visibility') == 'private' or bool(wanted.get('private')))
        return Response.of({'url': self.url(repo), 'name': repo_id, 'id': '0'})

    def auth_check(self, request: Request, kind: str, repo_id: str, write: str | None) -> Response:
        self.repo(request, kind, repo_id, write=bool(write))
        return Response.of({})

    def repo_info(self, request: Request, kind: str, repo_id: str, revision: str | None = None) -> Response:
        repo = self.repo(request, kind, repo_id)
        commit = repo.at(revision or 'main')
        siblings = [{'rfilename': path} for path in commit.entries]
        if request.query.get('blobs'):
            siblings = [
                {'rfilename': path, 'size': len(entry.data), 'blobId': entry.blob_id}
                | ({'lfs': {'sha256': entry.sha256, 'size': len(entry.data), 'pointerSize': 134}}
                   if entry.is_lfs else {})
                for path, entry in commit.entries.items()]
        return Response.of({
            '_id': '0', 'id': repo_id, 'modelId': repo_id, 'author': repo_id.partition('/')[0],
            'sha': commit.oid if self.named_commit is TRUE_NAME else self.named_commit,
            'lastModified': DATE, 'createdAt': DATE, 'private': repo.private, 'gated': False, 'disabled': False,
            'tags': [], 'downloads': 0, 'likes': 0, 'siblings': siblings})

    def refs(self, request: Request, kind: str, repo_id: str) -> Response:
        repo = self.repo(request, kind, repo_id)
        return Response.of({
            'branches': [{'name': 'main', 'ref': 'refs/heads/main', 'targetCommit': repo.head.oid}],
            'tags': [{'name': name, 'ref': f'refs/tags/{name}', 'targetCommit': oid}
                     for name, oid in repo.refs.items()],
            'converts': [], 'pullRequests': []})

    def history(self, request: Request, kind: str, repo_id: str, revision: str) -> Response:
        repo = self.repo(request, kind, repo_id)
        until = repo.commits.index(repo.at(revision)) + 1
        return Response.of([
            {'id': commit.oid, 'title': commit.message, 'message': '', 'date': DATE, 'authors': [{'user': 'tester'}]}
            for commit in reversed(repo.commits[:until])])

    def tree(self, request: Request, kind: str, repo_id: str, revision: str, path: str | None) -> Response:
        infos = self.infos(self.repo(request, kind, repo_id).at(revision))
        path = (path or '').strip('/')
        if path and path not in infos:
            raise Refused(404, f'{path} does not exist on "{revision}"', code='EntryNotFound')
        if path and infos[path]['type'] == 'file':
            return Response.of([infos[path]])
        inside = [info for name, info in infos.items() if name.startswith(f'{path}/' if path else '')]
        if request.query.get('recursive', ['false'])[0].lower() != 'true':
            inside = [info for info in inside if '/' not in info['path'][len(path):].lstrip('/')]
        start = int(request.query.get('cursor', ['0'])[0])
        headers = {}
        if start + self.page_size < len(inside):
            query = f'recursive={request.query.get("recursive", ["false"])[0]}&cursor={start + self.page_size}'
            headers['Link'] = f'<{self.endpoint}{quote(request.path)}?{query}>; rel="next"'
        return Response.of(inside[start:start + self.page_size], **headers)

    def paths_info(self, request: Request, kind: str, repo_id: str, revision: str) -> Response:
        infos = self.infos(self.repo(request, kind, repo_id).at(revision))
        paths = parse_qs(request.body.decode()).get('paths', [])
        return Response.of([infos[path.strip('/')] for path in paths if path.strip('/') in infos])

    @staticmethod
    def infos(commit: Commit) -> dict[str, dict]:
        """What listings say of all files and folders of a commit, by path."""
        infos = {}
        for path, entry in commit.entries.items():
            for folder in reversed(Path(path).parents[:-1]):
                oid = hashlib.sha1(f'{commit.oid} {folder}'.encode()).hexdigest()
                infos.setdefault(str(folder), {'type': 'directory', 'path': str(folder), 'size': 0, 'oid': oid})
            infos[path] = entry.info(path)
        return infos

    def preupload(self, request: Request, kind: str, repo_id: str, revision: str) -> Response:
        repo = self.repo(request, kind, repo_id, write=True)
        entries = repo.at(revision).entries
        ignored = request.json.get('gitIgnore')
        if ignored is None and '.gitignore' in entries:
            ignored = entries['.gitignore'].data.decode()
        found = []
        for file in request.json['files']:
            path, sample = file['path'], base64.b64decode(file['sample'])
            is_lfs = self.is_lfs(path, sample, file['size'])
            entry = entries.get(path)
            found.append({
                'path': path, 'uploadMode': 'lfs' if is_lfs else 'regular',
                'shouldIgnore': any(fnmatch.fnmatch(path, line) for line in (ignored or '').split()),
                'oid': entry.etag if entry else None})
        return Response.of({'files': found})

    def lfs_batch(self, request: Request, kind: str | None, repo_id: str) -> Response:
        repo = self.repo(request, kind, repo_id, write=True)
        objects = []
        for item in request.json['objects']:
            item = {'oid': item['oid'], 'size': item['size']}
            if item['oid'] not in repo.uploaded:
                path = f'/storage/upload/{repo.repo_type}/{repo_id}/{item["size"]}/{item["oid"]}'
                item['actions'] = {
                    'upload': {'href': self.sign(path)},
                    'verify': {'href': f'{self.url(repo)}.git/info/lfs/objects/verify'}}
            objects.append(item)
        return Response.of({'transfer': 'basic', 'objects': objects})

    def upload(self, request: Request, repo_type: str, repo_id: str, size: str, oid: str) -> Response:
        self.check_signature(request)
        if request.length != int(size) or hashlib.sha256(request.body).hexdigest() != oid:
            self.violation(f'what was uploaded is not {oid} of {size} bytes')
        self.repos[repo_type, repo_id].uploaded[f'unverified {oid}'] = request.body
        return Response(headers={'ETag': f'"{oid}"'})

    def verify(self, request: Request, kind: str | None, repo_id: str) -> Response:
        repo = self.repo(request, kind, repo_id, write=True)
        oid, size = request.json['oid'], request.json['size']
        data = repo.uploaded.pop(f'unverified {oid}', repo.uploaded.get(oid))
        if data is None or len(data) != size:
            self.violation(f'{oid} of {size} bytes was not uploaded')
        repo.uploaded[oid] = data
        return Response.of({})

    def commit(self, request: Request, kind: str, repo_id: str, revision: str) -> Response:
        repo = self.repo(request, kind, repo_id, write=True)
        header, *lines = (json.loads(line) for line in request.body.splitlines())
        if header['key'] != 'header' or not lines:
            self.violation('a commit without a header, or without a change')
        parent, head = header['value'].get('parentCommit'), repo.at(revision)
        if self.require_parent and parent is None:
            self.violation('a commit that does not name its parent')
        if parent not in (None, head.oid):
            raise Refused(412, 'A commit has happened since. Please refresh and try again.')
        entries = dict(head.entries)
        for line in lines:
            self.apply(repo, entries, line['key'], line['value'])
        made = repo.commit(entries, header['value']['summary'])
        return Response.of({
            'success': True, 'commitOid': made.oid, 'commitUrl': f'{self.url(repo)}/commit/{made.oid}',
            'hookOutput': ''})

    def apply(self, repo: Repo, entries: dict[str, Entry], key: str, value: dict) -> None:
        """Make one change of a commit."""
        path = value['path']
        if key == 'file':
            data = base64.b64decode(value['content'], validate=True)
            if self.is_lfs(path, data):
                self.violation(f'{path} should have been uploaded as a large file')
            if self.token.encode() in data:
                self.violation(f'the token is in {path}')
            if path == 'README.md' and (errors := card_problems(data.decode())[0]):
                raise Refused(400, errors[0])
            entries[path] = Entry(data)
        elif key == 'lfsFile':
            data = repo.uploaded.get(value['oid'])
            if data is None or len(data) != value.get('size', len(data)):
                self.violation(f'the commit names {path}, which was not uploaded')
            entries[path] = Entry(data, is_lfs=True)
        elif key in ('deletedFile', 'deletedFolder'):
            gone = [name for name in entries if name == path or
                    (key == 'deletedFolder' and name.startswith(path.rstrip('/') + '/'))]
            if not gone:
                raise Refused(404, 'A file with this name doesn\'t exist', code='EntryNotFound')
            for name in gone:
                del entries[name]
        else:
            self.violation(f'a commit cannot {key}')

    def validate_yaml(self, request: Request) -> Response:
        errors, warnings = card_problems(request.json['content'])
        body = {key: [{'message': text} for text in texts] for key, texts in
                (('errors', errors), ('warnings', warnings))}
        return replace(Response.of(body), status=400 if errors else 200)

    def resolve(
            self,
            request: Request,
            kind: str | None,
            repo_id: str,
            revision: str,
            path: str,
    ) -> Response:
        commit = self.repo(request, kind, repo_id).at(revision)
        named = commit.oid if self.named_commit is TRUE_NAME else self.named_commit
        headers = {'Accept-Ranges': 'bytes'} | ({} if named is None else {'X-Repo-Commit': named})
        if path not in commit.entries:
            raise Refused(404, 'Entry not found', code='EntryNotFound', **headers)
        entry = commit.entries[path]
        headers['ETag'] = f'"{entry.etag}"'
        if not entry.is_lfs:
            return part_of(entry.data, request, headers)
        address = self.sign(f'/storage/{(kind or "models").strip("/")}/{repo_id}/{commit.oid}/{path}')
        return Response(302, b'', headers | {
            'Location': address, 'X-Linked-ETag': f'"{entry.sha256}"', 'X-Linked-Size': str(len(entry.data))})

    def download(self, request: Request, kind: str, repo_id: str, revision: str, path: str) -> Response:
        self.check_signature(request)
        entry = self.repos[kind.removesuffix('s'), repo_id].at(revision).entries[path]
        return part_of(entry.data, request, {'ETag': f'"{entry.sha256}"', 'Accept-Ranges': 'bytes'})


REPO = r'/api/(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)'
GIT = r'/(?P<kind>datasets/)?(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects'
REVISION = r'(?P<revision>[^/]+)'
# Methods, paths as they are sent, and what answers.
ROUTES = {
    'hub': [
        (('GET',), '/api/whoami-v2', HubServer.whoami),
        (('POST',), '/api/repos/create', HubServer.create),
        (('POST',), '/api/validate-yaml', HubServer.validate_yaml),
        (('GET',), REPO + r'/auth-check(?P<write>/write)?', HubServer.auth_check),
        (('GET', 'HEAD'), REPO, HubServer.repo_info),
        (('GET', 'HEAD'), f'{REPO}/revision/{REVISION}', HubServer.repo_info),
        (('GET',), f'{REPO}/refs', HubServer.refs),
        (('GET',), f'{REPO}/commits/{REVISION}', HubServer.history),
        (('GET',), f'{REPO}/tree/{REVISION}' + r'(?P<path>/.*)?', HubServer.tree),
        (('POST',), f'{REPO}/paths-info/{REVISION}', HubServer.paths_info),
        (('POST',), f'{REPO}/preupload/{REVISION}', HubServer.preupload),
        (('POST',), f'{REPO}/commit/{REVISION}', HubServer.commit),
        (('POST',), f'{GIT}/batch', HubServer.lfs_batch),
        (('POST',), f'{GIT}/verify', HubServer.verify),
        (('GET', 'HEAD'), rf'/(?P<kind>datasets/)?(?P<repo_id>[^/]+/[^/]+)/resolve/{REVISION}/(?P<path>.+)',
         HubServer.resolve),
    ],
    'storage': [
        (('PUT',), r'/storage/upload/(?P<repo_type>[^/]+)/(?P<repo_id>[^/]+/[^/]+)/(?P<size>\d+)/(?P<oid>[0-9a-f]{64})',
         HubServer.upload),
        (('GET', 'HEAD'), rf'/storage/(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)/{REVISION}/(?P<path>.+)',
         HubServer.download),
    ],
}


# Some of those that the Hub knows.
LICENSES = ('apache-2.0', 'cc-by-4.0', 'cc-by-nc-4.0', 'cc0-1.0', 'mit', 'openrail', 'other')


def card_problems(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the metadata of a card, as far as the Hub's rules are known."""
    front = re.match(r'---\r?\n(.*?)\r?\n---\s*?(\r?\n|$)', text, re.DOTALL)
    if not front:
        return [], ['empty or missing yaml metadata in repo card']
    try:
        data = yaml.safe_load(front[1])
    except yaml.YAMLError as error:
        return [f'bad YAML: {error}'], []
    if not isinstance(data, dict):
        return ['the metadata must be a mapping'], []
    errors = []
    for key in ('tags', 'datasets', 'metrics', 'language'):
        values = data.get(key, [])
        values = [values] if isinstance(values, str) else values
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f'"{key}" must be an array of strings')
    if not isinstance(data.get('license', ''), str):
        errors.append('"license" must be a string')
    elif data.get('license', 'other') not in LICENSES:
        errors.append(f'"license" must be one of [{", ".join(LICENSES)}]')
    for config in data.get('configs', []):
        if not isinstance(config, dict) or not isinstance(config.get('config_name'), str):
            errors.append('"configs" must have a "config_name" each')
    for model in data.get('model-index', []):
        if not model.get('name'):
            errors.append('"model-index[0].name" is required')
        for result in model.get('results', []):
            if 'type' not in result.get('task', {}) or not {'type', 'name'} <= set(result.get('dataset', {})):
                errors.append('"model-index[0].results" need a task and a data set')
            for metric in result.get('metrics', [{}]):
                if 'type' not in metric or not isinstance(metric.get('value'), (int, float)):
                    errors.append('"model-index[0].results.metrics" need a type and a number')
    return errors, []


def part_of(data: bytes, request: Request, headers: dict[str, str]) -> Response:
    """All of a file, or the range that is asked for."""
    headers = headers | {'Content-Type': 'application/octet-stream'}
    asked = re.fullmatch(r'bytes=(\d*)-(\d*)', request.headers.get('range', ''))
    if not asked or asked[0] == 'bytes=-':
        return Response(200, data, headers)
    first, last = asked[1], asked[2]
    if not first:
        start, end = max(len(data) - int(last), 0), len(data)
    else:
        start, end = int(first), min(int(last) + 1 if last else len(data), len(data))
    if start >= end:
        return Response(416, b'', headers | {'Content-Range': f'bytes */{len(data)}'})
    return Response(206, data[start:end], headers | {'Content-Range': f'bytes {start}-{end - 1}/{len(data)}'})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Several ranks may come at once.
    request_queue_size = 64

    def __init__(self, hub: HubServer, name: str):
        super().__init__(('127.0.0.1', 0), _Handler)
        self.hub, self.name = hub, name

    def handle_error(self, request, client_address) -> None:
        """Clients may be killed while they talk."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    # Head and body of an answer in one packet: the second one would wait for the client's word on the first.
    wbufsize = -1
    server: _Server

    def log_message(self, *_) -> None:
        """Tests look at `requests` instead."""

    def do_GET(self) -> None:
        hub, address = self.server.hub, urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = int(headers.get('content-length', 0))
        request = Request(
            self.server.name, self.command, address.path, parse_qs(address.query), headers, length, b'')
        with hub.lock:
            fault = next((fault for fault in hub.faults if fault.applies(request.line)), None)
            hub.requests.append(request)
        how, options = (fault.how, fault.options) if fault else ('', {})
        is_cut = how == 'cut' and self.command in ('POST', 'PUT')
        request.body = self.rfile.read(length // 2 if is_cut else length)
        if 'chunked' in headers.get('transfer-encoding', ''):
            # As the storage of the Hub, which wants to know the length before.
            self.close_connection = True
            self.send(request, Refused(411, 'MissingContentLength').response)
            return
        if is_cut or how == 'hang':
            hub.closing.wait(options.get('seconds', 60) if how == 'hang' else 0)
            self.close_connection = True
            return
        if how == 'commit-between':
            found = re.search(REPO, request.path)
            hub.add_commit(found['repo_id'], options.get('files', {'theirs.txt': b'theirs'}),
                           repo_type=found['kind'].removesuffix('s'))
        if how.isdigit():
            text = options.get('message', 'Something went wrong')
            response = Response(int(how), f'<html><h1>{how}</h1>{text}</html>'.encode(), {'Content-Type': 'text/html'})
            if how == '429' or 'retry_after' in options:
                response.headers['Retry-After'] = str(options.get('retry_after', 1))
            if 'message' in options:
                response.headers['X-Error-Message'] = text
        else:
            response = hub.answer(self.server.name, request)
        if how == 'lost':
            request.status = response.status
            self.close_connection = True
            return
        if how == 'wrong-bytes':
            middle = len(response.body) // 2
            response.body = response.body[:middle] + bytes(
                byte ^ 0x55 for byte in response.body[middle:middle + 8]) + response.body[middle + 8:]
        if how == 'short':
            response.body = response.body[:len(response.body) // 2]
        self.send(request, response, is_cut=how == 'cut')

    def send(self, request: Request, response: Response, is_cut: bool = False) -> None:
        request.status = response.status
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(response.body)))
        self.end_headers()
        if is_cut:
            self.wfile.write(response.body[:len(response.body) // 2])
            self.close_connection = True
        elif self.command != 'HEAD':
            self.wfile.write(response.body)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET
