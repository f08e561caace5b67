"""Which machine this is, and whether a process of it still lives.

Where a system does not say enough, as outside Linux, a machine has no name and nobody is called dead.
"""

import hashlib
import json
import os
import socket
import subprocess
from functools import lru_cache
from importlib.metadata import distributions
from pathlib import Path


__all__ = ['is_dead', 'machine_name', 'source_commit', 'start_time']


@lru_cache
def machine_name() -> str:
    """Hash of all within which a process id means one process: host, boot and namespace; empty if unknown.

    The name of the host alone does not do: containers and freshly installed machines share theirs.
    """
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        namespace = os.readlink('/proc/self/ns/pid')
    except OSError:
        return ''
    return hashlib.blake2b(f'{socket.gethostname()}\n{boot}\n{namespace}'.encode(), digest_size=8).hexdigest()


def start_time(pid: int) -> str:
    """When a process of this machine began, in ticks after the boot; empty if unknown, or if it has ended."""
    try:
        # The name of the program, in brackets, may hold anything.
        fields = Path(f'/proc/{pid}/stat').read_text(errors='replace').rpartition(')')[2].split()
        return '' if fields[0] in 'ZX' else fields[19]
    except (OSError, IndexError):
        return ''


def is_dead(pid: int, started: str = '') -> bool:
    """Whether a process of this machine is no more.

    Args:
        pid: Its id.
        started: Its `start_time`, which tells it from a later process of the same id.
    """
    if not Path('/proc/self/stat').exists():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    actual = start_time(pid)
    if not actual:
        # Ended and not yet waited for; or another user's, which may be hidden.
        return os.path.exists(f'/proc/{pid}')
    return started not in ('', actual)


def source_commit(package: Path = Path(__file__).parents[1]) -> str | None:
    """The commit of the checkout that this package runs from, with `-dirty` where files of it are changed.

    Returns:
        Where it is installed, the commit that pip got from a git repository; None where it came from elsewhere, or git
        is not there.
    """
    root = package.parent
    if not (root / '.git').exists():
        return _installed_commit(package)
    outputs = []
    for command in (['rev-parse', 'HEAD'], ['status', '--porcelain', '--untracked-files=no']):
        try:
            # Without locks, since somebody may be at work in the checkout.
            done = subprocess.run(
                ['git', '--no-optional-locks', '-C', str(root), *command], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        outputs.append(done.stdout.strip())
    return outputs[0] + ('-dirty' if outputs[1] else '')


def _installed_commit(package: Path) -> str | None:
    """The commit that pip noted when it installed the package."""
    for installed in distributions(name=package.name, path=[str(package.parent)]):
        try:
            return json.loads(installed.read_text('direct_url.json') or '{}')['vcs_info']['commit_id']
        except (KeyError, TypeError, ValueError):
            continue
    return None
