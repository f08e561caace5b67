"""What this package asks of huggingface_hub: commits that land whole or not at all, and errors as sentences.

Tokens are huggingface_hub's own affair (`hf auth login`, or HF_TOKEN): none is stored here, and none gets into a
message. Whatever the Hub, its storage or the network answers, an action either ends as asked or raises `InputError`,
with the repo as it was; what may pass by itself is tried again first.
"""

import hashlib
import json
import logging
import re
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import yaml
from huggingface_hub import (
    CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, parse_hf_uri,
)
from huggingface_hub.errors import (
    EntryNotFoundError, GatedRepoError, HfHubHTTPError, HfUriError, HFValidationError, LocalEntryNotFoundError,
    OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder
from huggingface_hub.utils import (
    get_session, hf_raise_for_status, httpx, parse_ratelimit_headers, validate_repo_id,
)

from ..version import __version__
from .errors import InputError
from .escaping import printable, sentence, without_secrets

__all__ = [
    'TRANSIENT_STATUS', 'HubUrl', 'Unavailable', 'check_license', 'check_repo_id', 'content_hash', 'create_repo',
    'hub_errors', 'is_hub_url', 'is_transient', 'parse_hub_url', 'push_files', 'reason_of', 'requested_wait', 'retried',
]

# Seconds before each further attempt. Most calls of huggingface_hub make five of their own within each of these.
PAUSES = (1., 2., 4., 8., 16.)
# A longer wait than this, asked for by the Hub, is left to the user.
MAX_WAIT = 600.
# Attempts at a commit while others commit to the same repo.
MAX_CONFLICTS = 8
# huggingface_hub sets no time limit of its own on uploads and commits.
TIMEOUT = httpx.Timeout(300., connect=30.)
# Paths in one question to the Hub.
PATHS_PER_REQUEST = 500

TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
# The query of an address.
QUERY = re.compile(r'(?<=\w)\?\S+=\S+')

LOG_IN = 'log in with `hf auth login`, or set HF_TOKEN'
REPO_TYPES = ('model', 'dataset')

Result = TypeVar('Result')


class Unavailable(Exception):
    """A service cannot be reached, which may pass.

    Args:
        reason: Why.
        pause: Seconds that it wants to be left alone.
    """

    def __init__(self, reason: str, pause: float = 0.):
        super().__init__(reason)
        self.pause = pause


@dataclass(frozen=True)
class HubUrl:
    """A place on the Hub.

    Args:
        repo_id: Organisation or user, and name: `ORG/NAME`.
        repo_type: `model` or `dataset`.
        revision: A branch, tag or commit; None for the main branch.
        path: A file or folder in the repo, empty for all of it.
    """
    repo_id: str
    repo_type: str
    revision: str | None = None
    path: str = ''


def is_hub_url(text: str) -> bool:
    """Whether a text means to name a place on the Hub: `hf://...`, or a page of the Hub's own site."""
    return text.startswith(('hf://', *(f'{site}/' for site in (constants.ENDPOINT, 'https://huggingface.co',
                                                             'https://hf.co'))))


def parse_hub_url(text: str) -> HubUrl:
    """Read `hf://datasets/ORG/NAME[@REVISION][/PATH]`, `hf://ORG/NAME...` for a model, or the address of a page.

    Raises:
        InputError: It names no model or data set.
    """
    expected = 'expected hf://datasets/ORG/NAME for a data set or hf://ORG/NAME for a model, with or without ' \
               '@REVISION and /PATH'
    try:
        uri = parse_hf_uri(text, endpoint=constants.ENDPOINT)
    except HfUriError:
        raise InputError(f'{text} names no repo of the Hub; {expected}')
    if uri.type not in REPO_TYPES:
        raise InputError(f'{text} names a {uri.type}; {expected}')
    return HubUrl(uri.id, uri.type, uri.revision, uri.path_in_repo)


def check_repo_id(repo_id: str) -> None:
    """Check the name of a repo without asking the Hub.

    Raises:
        InputError: It is not ORG/NAME.
    """
    try:
        validate_repo_id(repo_id)
        is_valid = repo_id.count('/') == 1
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise InputError(
            f'{repo_id!r} is no name of a repo on the Hub; expected ORG/NAME with one slash, each of letters, digits, '
            f'-, _ and .')


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Inside, whatever huggingface_hub raises becomes an `InputError` of one sentence, without a token.

    Args:
        what: What is done, as in `push to ORG/NAME`; follows `cannot`.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = reason_of(error)
        if reason is None:
            raise
        # The chain would show addresses and headers that the sentence leaves out on purpose.
        raise InputError(f'cannot {what}: {reason}') from None


def retried(what: str, action: Callable[[], Result], pauses: Sequence[float] = PAUSES) -> Result:
    """Do something with the Hub that may be done twice; try again what may pass by itself.

    Args:
        what: What is done, for messages, as in `hub_errors`.
        action: Is called until it returns.
        pauses: Seconds before each further attempt, or longer where the Hub asks for it.

    Returns:
        What `action` returns.

    Raises:
        InputError: It did not work out, or cannot.
    """
    with hub_errors(what):
        for pause in (*pauses, None):
            try:
                _limit_waiting()
                return action()
            except Exception as error:
                if pause is None or not is_transient(error):
                    raise
                wait = max(pause, requested_wait(error))
                if wait > MAX_WAIT:
                    raise
                # Without what the user is to do about it.
                reason = reason_of(error).partition(';')[0]
            line = sentence(f'cannot {what} yet: {reason}; trying again in {wait:g} s')
            print(line, file=sys.stderr, flush=True)
            time.sleep(wait)


def create_repo(
        repo_id: str,
        repo_type: str = 'model',
        private: bool | None = None,
        pauses: Sequence[float] = PAUSES,
) -> None:
    """Make a repo unless it is there, and know that it may be written to; one small request where it is there.

    Args:
        repo_id: ORG/NAME.
        repo_type: `model` or `dataset`.
        private: Whether only its owners see a new one; None is as the organisation has it. One that is there stays
            as it is.
        pauses: As in `retried`.

    Raises:
        InputError: The name is wrong, the token may not write, or the Hub cannot be reached.
    """
    check_repo_id(repo_id)
    api = _api()

    def create() -> None:
        try:
            api.auth_check(repo_id, repo_type=repo_type, write=True)
        except RepositoryNotFoundError:
            api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)

    retried(f'write to the {repo_type} repo {repo_id}', create, pauses)


def check_license(name: str | None, repo_type: str = 'model') -> None:
    """Ask the Hub whether it knows a licence, which it would refuse in a card.

    Args:
        name: As in `apache-2.0`; None is none.
        repo_type: `model` or `dataset`.

    Raises:
        InputError: It does not, or cannot be reached.
    """
    if name is None:
        return
    card = f'---\n{yaml.safe_dump({"license": name})}---\n'

    def is_known() -> bool:
        # `RepoCard.validate`, which asks the public Hub before huggingface_hub 2 whatever HF_ENDPOINT says.
        answer = get_session().post(
            f'{constants.ENDPOINT}/api/validate-yaml', json={'repoType': repo_type, 'content': card})
        if answer.status_code != 400:
            hf_raise_for_status(answer)
        return answer.status_code != 400

    if not retried('ask the Hub for its licences', is_known):
        raise InputError(f'{name!r} is no licence that the Hub knows; see https://huggingface.co/docs/hub/'
                         f'repositories-licenses for their names, or write other for a licence of your own')


def push_files(
        repo_id: str,
        files: Mapping[str, bytes | Path],
        message: str,
        repo_type: str = 'model',
        delete: Sequence[str] = (),
        parent: str | None = None,
        pauses: Sequence[float] = PAUSES,
) -> str | None:
    """Bring files to a repo's main branch in one commit, or none where nothing changes.

    The commit names its parent, so that it lands on what was looked at or not at all. Where somebody else commits in
    between, it is made again on top of that, unless the other commit touched the same files. Files that are there with
    the same content are not sent again.

    Args:
        repo_id: ORG/NAME of a repo that is there.
        files: Content, or a local file, by path in the repo.
        message: First line of the commit.
        repo_type: `model` or `dataset`.
        delete: Files to remove, and folders with a slash at the end, whose other files than these go; what is not
            there is ignored.
        parent: The commit to build on; by default the newest one.
        pauses: As in `retried`.

    Returns:
        The commit that brought the files; None if they were there.

    Raises:
        InputError: It did not work out, and the repo is as it was; or the repo's own .gitignore kept a file out.
    """
    check_repo_id(repo_id)
    for path, content in files.items():
        if isinstance(content, Path) and not content.is_file():
            raise InputError(f'cannot push {path} to {repo_id}: there is no file {content}')
    push = _Push(_api(), repo_id, repo_type, files, delete, message, parent)
    return retried(f'push to the {repo_type} repo {repo_id}', push.attempt, pauses)


class _Push:
    """One push over all its attempts. What an attempt left behind, the next one finds by looking at the repo."""

    def __init__(
            self,
            api: HfApi,
            repo_id: str,
            repo_type: str,
            files: Mapping[str, bytes | Path],
            delete: Sequence[str],
            message: str,
            parent: str | None,
    ):
        self.api = api
        self.repo = dict(repo_id=repo_id, repo_type=repo_type)
        self.files = {path: _Content(content) for path, content in files.items()}
        self.delete = delete
        self.message = message
        self.parent = parent
        # What was at the paths when they were first looked at.
        self.first_oids: dict[str, str] | None = None
        self.sent = False

    def attempt(self) -> str | None:
        for _ in range(MAX_CONFLICTS):
            head = self.api.repo_info(**self.repo, timeout=30.).sha
            add, remove = self.missing(head)
            if not add and not remove:
                return head if self.sent else None
            if self.parent not in (None, head):
                raise self.conflict(f'its newest commit is {head}, not {self.parent}')
            self.sent = True
            try:
                # huggingface_hub's operations serve once.
                commit = self.api.create_commit(
                    **self.repo, commit_message=self.message, parent_commit=head, operations=[
                        *(CommitOperationAdd(path, self.files[path].content) for path in add),
                        *(CommitOperationDelete(path) for path in remove)])
            except HfHubHTTPError as error:
                if error.response.status_code not in (409, 412):
                    raise
                continue
            add, _ = self.missing(commit.oid)
            if add:
                raise InputError(
                    f'the Hub made the commit {commit.oid} without {_listed(add)}; the .gitignore of '
                    f'{self.repo["repo_id"]} seems to name them, fix it and push again')
            return commit.oid
        raise self.conflict('others commit to it all the time')

    def missing(self, revision: str | None) -> tuple[list[str], list[str]]:
        """The paths to write, and those to remove, at a commit."""
        entries = self.look(revision) if revision else {}
        add = [path for path, content in self.files.items() if not content.equals(entries.get(path))]
        remove = [path for path, info in entries.items() if path not in self.files and isinstance(info, RepoFile)]
        oids = {path: _oid(info) for path, info in entries.items()}
        if self.first_oids is None:
            self.first_oids = oids
        theirs = [path for path in (*add, *remove) if oids.get(path) != self.first_oids.get(path)]
        if theirs:
            raise self.conflict(f'somebody else has just changed {_listed(theirs)} there')
        return add, remove

    def look(self, revision: str) -> dict[str, RepoFile | RepoFolder]:
        """What is at a commit of all that is to be written or removed, by path."""
        entries = []
        paths = [*self.files, *(path for path in self.delete if not path.endswith('/'))]
        for start in range(0, len(paths), PATHS_PER_REQUEST):
            entries += self.api.get_paths_info(
                **self.repo, paths=paths[start:start + PATHS_PER_REQUEST], revision=revision)
        for folder in self.delete:
            if folder.endswith('/'):
                with suppress(EntryNotFoundError):
                    entries += self.api.list_repo_tree(
                        **self.repo, path_in_repo=folder.rstrip('/'), recursive=True, revision=revision)
        return {info.path: info for info in entries}

    def conflict(self, reason: str) -> InputError:
        return InputError(
            f'cannot push to the {self.repo["repo_type"]} repo {self.repo["repo_id"]}: {reason}; look at it, and run '
            f'the same command again if your files are to replace what is there')


class _Content:
    """The content of one file, and whether a file of the Hub has the same."""

    def __init__(self, content: bytes | Path):
        self.content = content
        self.size = len(content) if isinstance(content, bytes) else content.stat().st_size
        self.hashes: dict[str, str] = {}

    def equals(self, info: RepoFile | RepoFolder | None) -> bool:
        """Whether it is the file that is there: by git's hash of a blob, or by the SHA-256 of a large file."""
        if not isinstance(info, RepoFile) or info.size != self.size:
            return False
        if info.lfs is not None:
            return self.hash_of(True) == info.lfs.sha256
        return self.hash_of(False) == info.blob_id

    def hash_of(self, is_large: bool) -> str:
        """What the Hub calls it: by its SHA-256 as a large file, else by git's hash of a blob."""
        return self.hash('sha256') if is_large else self.hash('sha1', f'blob {self.size}\0'.encode())

    def hash(self, algorithm: str, head: bytes = b'') -> str:
        if algorithm not in self.hashes:
            state = hashlib.new(algorithm, head, usedforsecurity=False)
            for part in self.parts():
                state.update(part)
            self.hashes[algorithm] = state.hexdigest()
        return self.hashes[algorithm]

    def parts(self) -> Iterable[bytes]:
        if isinstance(self.content, bytes):
            yield self.content
            return
        with open(self.content, 'rb') as file:
            while part := file.read(1 << 20):
                yield part


def content_hash(content: bytes | Path, is_large: bool) -> str:
    """The hash by which the Hub knows a file, given by its content or on this disk."""
    return _Content(content).hash_of(is_large)


def _api() -> HfApi:
    return HfApi(library_name='timm_tinyvit', library_version=__version__)


def _oid(info: RepoFile | RepoFolder) -> str:
    return info.blob_id if isinstance(info, RepoFile) else info.tree_id


def _listed(paths: Sequence[str]) -> str:
    return ', '.join(paths[:3]) + (f' and {len(paths) - 3} more' if len(paths) > 3 else '')


class _WithoutSignatures(logging.Filter):
    """Takes the queries out of the addresses in a library's warnings: those of uploads and downloads are signed."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = QUERY.sub('', record.getMessage()), ()
        return True


for _name in ('huggingface_hub.utils._http', 'huggingface_hub.file_download'):
    logging.getLogger(_name).addFilter(_WithoutSignatures())


def _limit_waiting() -> None:
    """Give the client of huggingface_hub a time limit, unless somebody has."""
    if get_session().timeout == httpx.Timeout(None):
        get_session().timeout = TIMEOUT


def _cause(error: BaseException) -> BaseException:
    """What stands behind an error that huggingface_hub has wrapped: of one file of many, a path, or its cache."""
    while isinstance(error, (FileNotFoundError, RuntimeError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _has_expired(error: HfHubHTTPError) -> bool:
    """Whether the storage refuses an address that the Hub gave for a large file; tokens never go there."""
    return _status(error) == 403 and 'authorization' not in error.response.request.headers


def is_transient(error: BaseException) -> bool:
    """Whether what huggingface_hub raised may pass by itself, so that another attempt makes sense."""
    error = _cause(error)
    if isinstance(error, Unavailable):
        return True
    if isinstance(error, (OfflineModeIsEnabled, httpx.ProxyError, httpx.UnsupportedProtocol)):
        return False
    if isinstance(error, HfHubHTTPError):
        # The next attempt gets new addresses.
        return _status(error) in TRANSIENT_STATUS or _has_expired(error)
    if isinstance(error, httpx.TransportError):
        return True
    return _came_from_hub(error) and (
        isinstance(error, (ConnectionError, TimeoutError, json.JSONDecodeError))
        # What arrived is not as long as was announced.
        or (isinstance(error, OSError) and 'Consistency check failed' in str(error)))


def requested_wait(error: BaseException) -> float:
    """The seconds that the Hub wants to be left alone, 0 if it does not say."""
    error = _cause(error)
    if isinstance(error, Unavailable):
        return error.pause
    if _status(error) not in (429, 503):
        return 0.
    limit = parse_ratelimit_headers(error.response.headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    seconds = error.response.headers.get('Retry-After', '')
    return float(seconds) if seconds.isdigit() else 0.


def reason_of(error: BaseException) -> str | None:
    """Why it did not work, and what to do; None for what did not come from huggingface_hub."""
    error = _cause(error)
    if isinstance(error, Unavailable):
        return str(error)
    if isinstance(error, OfflineModeIsEnabled):
        return 'HF_HUB_OFFLINE is set; unset it to reach the Hub'
    if isinstance(error, HFValidationError):
        return f'{_line(error)}; expected ORG/NAME'
    if isinstance(error, HfHubHTTPError):
        return _reason_of_status(error)
    if isinstance(error, LocalEntryNotFoundError):
        return 'it is not in the cache, and the Hub cannot be reached; check the network'
    if isinstance(error, httpx.TimeoutException):
        return f'{constants.ENDPOINT} does not answer in time; check the network, and run the same command again'
    if isinstance(error, (httpx.ConnectError, httpx.ProxyError, httpx.UnsupportedProtocol)):
        return f'there is no connection to {constants.ENDPOINT} ({_line(error)}); check the network and HF_ENDPOINT'
    if isinstance(error, httpx.HTTPError):
        return f'the connection to {constants.ENDPOINT} broke ({_line(error)}); run the same command again'
    if not _came_from_hub(error):
        return None
    if isinstance(error, json.JSONDecodeError):
        return f'{constants.ENDPOINT} does not answer as a Hub does; check HF_ENDPOINT, or run the same command again'
    if isinstance(error, OSError) and error.strerror:
        return f'{error.strerror}: {error.filename}; fix that, and run the same command again'
    if isinstance(error, (EntryNotFoundError, OSError, RuntimeError, ValueError)):
        return f'{_line(error)}; fix that, and run the same command again'
    return None


def _reason_of_status(error: HfHubHTTPError) -> str:
    status, detail = error.response.status_code, _in_brackets(_line(error.server_message or ''))
    if _has_expired(error):
        return 'the address that the Hub gave for a large file has expired (HTTP 403); run the same command again'
    if isinstance(error, GatedRepoError):
        return f'the repo is gated; ask for access on its page, and {LOG_IN}'
    if isinstance(error, RepositoryNotFoundError):
        return f'there is no such repo, or it is private and you may not see it; check the name, and {LOG_IN}'
    if isinstance(error, RevisionNotFoundError):
        return 'there is no such revision; name a branch, tag or commit that is there'
    if isinstance(error, EntryNotFoundError):
        name = unquote(str(error.response.url).partition('?')[0]).partition('/resolve/')[2].partition('/')[2]
        return f'there is no file {name or "of that name"} in the repo'
    if status == 401:
        return f'the Hub does not know you, or your token is wrong or expired; {LOG_IN}'
    if status == 403:
        return f'your token may not do that{detail}; take one with write access to this repo, and {LOG_IN}'
    if status in (409, 412):
        return f'somebody else committed in between{detail}; look at the repo, and run the same command again'
    if status == 429:
        wait = requested_wait(error)
        return f'the Hub limits how often you may ask; run the same command again in {max(wait, 60):g} seconds'
    if status >= 500:
        return f'the Hub is in trouble (HTTP {status}); run the same command again later'
    return f'the Hub refuses it with HTTP {status}{detail}; fix that, and run the same command again'


def _in_brackets(message: str) -> str:
    return f' ({message})' if message else ''


def _line(message: object) -> str:
    """A message of somebody else in one line of bounded length, without the token that it might repeat."""
    text = ' '.join(str(message).split())
    token = get_token()
    if token:
        text = text.replace(token, '***')
    return printable(without_secrets(text), 300)


def _came_from_hub(error: BaseException) -> bool:
    """Whether a call of huggingface_hub raised an error of a common kind."""
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_globals.get('__name__', '').partition('.')[0] == 'huggingface_hub':
            return True
        step = step.tb_next
    return False
