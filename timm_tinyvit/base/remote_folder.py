"""RemoteFolder: a folder behind a URL: a dataset repo of the Hub, or a place of any file system that fsspec knows.

Transfers, listings and credentials are those of huggingface_hub and of fsspec's file systems (s3fs, gcsfs, adlfs and
the like), configured as their users do; no secret is stored here or gets into a message. Whatever a service or the
network answers, an action ends as asked, or raises `Unavailable` where that may pass by itself, or else `InputError`.
"""

import errno
import functools
import os
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from collections.abc import Callable, Iterator, Sequence

import fsspec
from fsspec.asyn import sync
from fsspec.callbacks import TqdmCallback
from fsspec.core import url_to_fs
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import httpx

from .errors import InputError
from .escaping import printable, without_secrets
from .files import write_atomic
from .hub_client import (
    TRANSIENT_STATUS, Unavailable, content_hash, is_hub_url, is_transient, parse_hub_url, reason_of, requested_wait,
    retried,
)

__all__ = ['Damaged', 'RemoteFolder', 'is_remote']

# Seconds before each further attempt to open a folder: five minutes, as somebody may be looking.
OPEN_PAUSES = (1., 2., 4., 8., 16., 30., 60., 60., 60., 60.)
# Of a writer, whose teacher must not end with a night of the service: a day.
WRITE_PAUSES = (*OPEN_PAUSES, *[60.] * 1440)
# Transfers of a file that does not come as it should be.
MAX_ATTEMPTS = 3
# Seconds until an answer is given up whose connection is dead, of which aiohttp's own timeouts miss some; and bytes a
# second of a slow connection.
ANSWER_SECONDS, LISTING_SECONDS, SLOW_RATE = 300., 3600., 1e5
COMMIT = re.compile('[0-9a-f]{40}')
# What file systems raise for good.
LASTING = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, errno.EMSGSIZE, getattr(errno, 'EREMCHG', -1))
# Of this machine's disk.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

Result = TypeVar('Result')


class Damaged(Exception):
    """What was fetched is not what it should be."""


def is_remote(location: str | Path) -> bool:
    """Whether a location is behind a URL, and not a folder of this machine."""
    return '://' in str(location)


@dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URL; use `resolve`.

    Args:
        url: Its URL without a slash at its end; of the Hub with the commit, of which nothing ever changes.
    """
    url: str

    def __str__(self) -> str:
        return self.url

    @classmethod
    def resolve(cls, location: str) -> 'RemoteFolder':
        """The folder of a URL; of the Hub the commit that its revision stands for now.

        Raises:
            InputError: It names none, nothing here opens it, there is a secret in it, or there is no such repo or
                revision, or the Hub cannot be reached.
        """
        if is_hub_url(location):
            place = parse_hub_url(location)
            if place.repo_type != 'dataset' or place.path:
                raise InputError(
                    f'{location} is no store on the Hub; expected hf://datasets/ORG/NAME, or with @REVISION')
            commit = place.revision or 'main'
            if not COMMIT.fullmatch(commit):
                commit = retried(f'open {location}', lambda: HfApi().dataset_info(
                    place.repo_id, revision=place.revision, expand=['sha'], timeout=30.).sha, OPEN_PAUSES)
            return cls.at_commit(place.repo_id, commit)
        protocol, _, path = location.partition('://')
        if '@' in path.partition('/')[0] or '?' in path:
            raise InputError(f'a {protocol}:// URL has a name, password or query in it; credentials go into the '
                             f'environment or the configuration files of its file system, leave them out of the URL')
        try:
            fsspec.get_filesystem_class(protocol)
        except ValueError:
            raise InputError(f'{location} has the unknown protocol {protocol}; expected a folder, hf://, s3://, gs://, '
                             f'az://, or another of fsspec')
        except ImportError as error:
            raise InputError(f'{location} needs a package that is not installed: {_line(error)}')
        if not path.strip('/'):
            raise InputError(f'{location} names no folder; expected {protocol}://BUCKET/NAME')
        return cls(location.rstrip('/'))

    @classmethod
    def at_commit(cls, repo_id: str, commit: object) -> 'RemoteFolder':
        """A dataset repo at the commit of this name, which the Hub has given, and which names a folder on this disk.

        Raises:
            InputError: It is none.
        """
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
            raise InputError(f'the Hub at {constants.ENDPOINT} names no commit of hf://datasets/{repo_id}, but '
                             f'{ascii(commit)[:60]}; expected 40 hexadecimal digits, see what HF_ENDPOINT is and what '
                             f'stands between')
        return cls(f'hf://datasets/{repo_id}@{commit}')

    @property
    def is_on_hub(self) -> bool:
        return self.protocol == 'hf'

    @property
    def protocol(self) -> str:
        return self.url.partition('://')[0]

    @property
    def commit(self) -> str | None:
        """Of the Hub; None elsewhere, where files may come and go."""
        return self.url.rpartition('@')[2] if self.is_on_hub else None

    @property
    def name(self) -> str:
        """A name for it as a folder on this disk; of the Hub without the commit."""
        place = self.url.removeprefix('hf://datasets/').removesuffix(f'@{self.commit}')
        return re.sub(r'[^\w.-]+', '--', place, flags=re.ASCII)[-200:]

    def files(self) -> dict[str, dict[str, Any]]:
        """What its file system knows of each file, such as `size`, by its path within the folder.

        Raises:
            InputError: There is no such place, or it cannot be reached.
        """

        def find() -> dict[str, dict[str, Any]]:
            system, root = self._open()
            try:
                found = _ask(system, 'find', root, detail=True, seconds=LISTING_SECONDS)
            finally:
                # Entries of a million files, each of them known by its name alone from now on.
                system.invalidate_cache()
            # s3fs answers with the folder itself where the first file came just after the listing.
            return {name[len(root):].lstrip('/'): info for name, info in found.items() if info['type'] == 'file'}

        return self._patiently(f'list the files of {self}', find)

    def has(self, path: str) -> bool:
        """Whether a file is there now: one request.

        Raises:
            InputError: It cannot be found out.
        """

        def look() -> bool:
            system, root = self._open()
            with suppress(FileNotFoundError):
                return bool(_ask(system, 'info', f'{root}/{path}'))
            return False

        return self._patiently(f'look at {path} of {self}', look, WRITE_PAUSES)

    def read(self, path: str, most: int | None = None) -> bytes | None:
        """The content of a file; None where there is none.

        Args:
            path: The file.
            most: Bytes that it may have.

        Raises:
            InputError: It is too large or does not come as it was put there, or cannot be reached.
        """

        def read() -> bytes | None:
            system, root = self._open()
            try:
                info = _ask(system, 'info', f'{root}/{path}')
            except FileNotFoundError as error:
                if error.__cause__ is not None:
                    raise  # there is no repo, or no bucket
                return None
            if most is not None and info['size'] > most:
                raise InputError(f'{path} of {self} has {info["size"]} bytes, expected {most} at most; it is none of a '
                                 f'logit store')
            # Elsewhere than on the Hub, which says what hash it has, its own content must tell.
            is_large, blob = bool(info.get('lfs')), info.get('blob_id')
            expected = info['lfs'].sha256 if is_large else blob
            for _ in range(MAX_ATTEMPTS):
                content = _ask(
                    system, 'cat_file', f'{root}/{path}', start=0, end=info['size'], seconds=_seconds(info['size']))
                if expected in (None, content_hash(content, is_large)):
                    return content
            raise InputError(f'{path} of {self} was fetched {MAX_ATTEMPTS} times, and never as it was pushed; see what '
                             f'stands between this machine and the Hub')

        return self._patiently(f'fetch {path} of {self}', read)

    def write(self, path: str, content: bytes, is_new: bool = False) -> None:
        """Put a file there, whole or not at all.

        Args:
            path: The file.
            content: Its content.
            is_new: Leave one that is there as it is: surely where the service has conditional puts, else as far as a
                look can tell.

        Raises:
            InputError: It may not be written, or cannot be reached for a day.
        """

        def put() -> None:
            system, root = self._open()
            request = functools.partial(
                _ask, system, 'pipe_file', f'{root}/{path}', content, seconds=_seconds(len(content)))
            if is_new:
                with suppress(FileExistsError):
                    try:
                        return request(mode='create')
                    except (NotImplementedError, OSError, TypeError) as error:
                        if getattr(error, 'errno', errno.ENOSYS) not in (errno.ENOSYS, errno.EINVAL):
                            raise
                if self.has(path):
                    return
            request()

        self._patiently(f'write {path} to {self}', put, WRITE_PAUSES)

    def download(self, path: str, file: Path, size: int, check: Callable[[Path], None]) -> None:
        """Fetch a file once.

        Args:
            path: The file.
            file: Where to.
            size: Bytes that it has at most.
            check: Looks at what has come before it is put into its place, and raises `Damaged`.

        Raises:
            Damaged: It is not what it should be, or longer.
            Unavailable: It cannot be reached now.
            InputError: It is refused, or the disk is full.
        """

        def get(temporary: Path) -> None:
            with self._errors(f'fetch {path} of {self}'):
                system, root = self._open()
                _ask(system, 'get_file', f'{root}/{path}', str(temporary), seconds=_seconds(size),
                     callback=TqdmCallback({'most': size}, tqdm_cls=_Meter))

        write_atomic(file, get, check)

    def _patiently(
            self, what: str, action: Callable[[], Result], pauses: Sequence[float] | None = None) -> Result:
        def attempt() -> Result:
            with self._errors(what):
                return action()

        return retried(what, attempt, OPEN_PAUSES if pauses is None else pauses)

    def _open(self) -> tuple[fsspec.AbstractFileSystem, str]:
        return _open(self.url, os.getpid())

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Inside, whatever a file system raises becomes `Unavailable` or `InputError`, without a secret."""
        try:
            yield
        except (Damaged, InputError, Unavailable):
            raise
        except Exception as error:
            if self.is_on_hub:
                # A training outlives a proxy that is gone.
                reason, passes = reason_of(error), is_transient(error) or isinstance(error, httpx.ProxyError)
            else:
                reason, passes = _judge(error)
            if reason is None or isinstance(error, OSError) and error.errno in DISK:
                raise  # a bug, or this machine's own disk
            # The chain would show addresses and headers that the sentence leaves out on purpose.
            if passes:
                raise Unavailable(reason.partition(';')[0], requested_wait(error)) from None
            raise InputError(f'cannot {what}: {reason}') from None


@functools.lru_cache(maxsize=16)
def _open(url: str, process: int) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the path in it; its connections and threads are of this process alone."""
    return url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)


def _ask(
        system: fsspec.AbstractFileSystem, method: str, *args: Any, seconds: float | None = None, **options: Any,
) -> Any:
    """What a method of a file system gives, within so many seconds."""
    if not system.async_impl:
        return getattr(system, method)(*args, **options)
    return sync(system.loop, getattr(system, f'_{method}'), *args, timeout=seconds or ANSWER_SECONDS, **options)


def _seconds(size: int) -> float:
    return ANSWER_SECONDS + size / SLOW_RATE


class _Meter:
    """What fsspec and huggingface_hub show the progress of a transfer by; it ends one that is longer than it should be.
    """

    def __init__(self, total: int | None = None, most: int = 0):
        self.n, self.total, self.most = 0, total, most

    def update(self, size: int) -> None:
        self.n += size
        if self.n > self.most:
            raise Damaged

    def close(self) -> None:
        """Nothing is shown."""


def _judge(error: Exception) -> tuple[str | None, bool]:
    """Why a file system of fsspec did not do it, None for a bug, and whether it may pass."""
    name, line = type(error).__name__, _line(error)
    status = next((value for name in ('status', 'status_code', 'code')
                   if isinstance(value := getattr(error, name, None), int)), 500)
    if isinstance(error, FileNotFoundError) or status == 404:
        return f'there is no such place ({line}); check the URL', False
    if isinstance(error, PermissionError) or status in (401, 403):
        return f'access is denied ({line}); check your credentials, and what they allow', False
    if 'Credential' in name:
        return f'there are no credentials ({line}); give them as its file system expects them', False
    if isinstance(error, ValueError) or 'Validation' in name or getattr(error, 'errno', None) in LASTING or \
            status < 500 and status not in TRANSIENT_STATUS:
        return f'{line}; fix that, and run the same command again', False
    if type(error).__module__ == 'builtins' and not isinstance(error, (OSError, RuntimeError)):
        return None, False
    return f'the service, or the connection to it, is in trouble ({line}); run the same command again', True


def _line(error: BaseException) -> str:
    """What somebody else says, in one line of bounded length."""
    return printable(without_secrets(' '.join(str(error).split())), 300) or type(error).__name__
