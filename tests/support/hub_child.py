"""Processes with an environment of their own that need not import torch: forked from a parent that did nothing else.

huggingface_hub reads its environment when it is imported, so the parent has everything slow in it but that. `Children`
is the tests' side, this file run as a program the parent's. `Children.python` is for what starts programs by
`sys.executable`, as launchers do.
"""

import gc
import importlib.util
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from collections.abc import Callable, Mapping, Sequence
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
# huggingface_hub 2 comes with an httpx of its own.
HTTPX = '2' if importlib.util.find_spec('httpx2') else ''
SLOW_MODULES = ('torch', 'torch._dynamo', 'torchvision.transforms', 'numpy', 'pandas', 'pyarrow.parquet', 'PIL.Image',
                'yaml', f'httpx{HTTPX}', f'httpcore{HTTPX}', 'filelock', 'safetensors.torch', 'tqdm.auto',
                'matplotlib.figure', 'matplotlib.backends.backend_agg', 'multiprocessing.spawn')


# A signal is handed on; a child whose command is killed is killed by its parent.
PYTHON = """
import json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(os.path.join(os.path.dirname(__file__), 'socket'))
lines = connection.makefile('rw')
json.dump(dict(
    words=[word for word in sys.argv[1:] if word != '-u'], arguments=None, environment=dict(os.environ),
    folder=os.getcwd(), out=[f'/proc/{os.getpid()}/fd/{number}' for number in (1, 2)], max_sleep=None,
    python=os.path.abspath(__file__)), lines)
lines.write('\\n')
lines.flush()
child = int(lines.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: os.kill(child, number))
status = int(lines.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@dataclass
class Result:
    """How a child ended, and what it said."""
    returncode: int
    stdout: str
    stderr: str


class Children:
    """Starts children; a context manager that ends their parent."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(prefix='hub-child-')
        self.address = f'{self.folder.name}/socket'
        # Its own group: a Ctrl-C is for pytest alone. It ends when its standard input does.
        self.parent = subprocess.Popen(
            [sys.executable, __file__, self.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})

    def __enter__(self) -> 'Children':
        return self

    @property
    def python(self) -> str:
        """A command that takes what Python's command line takes, a module or a file, and runs it in a child."""
        file = Path(self.folder.name, 'python')
        if not file.exists():
            self.parent.stdout.readline()  # it is ready
            file.write_text(f'#!{sys.executable} -IS\n{PYTHON}')
            file.chmod(0o755)
        return str(file)

    def __exit__(self, *_) -> None:
        self.parent.stdin.close()
        self.parent.wait(60)
        self.parent.stdout.close()
        self.folder.cleanup()

    def start(
            self,
            program: Callable[..., None] | Sequence[str],
            environment: Mapping[str, str],
            *arguments: Any,
            folder: str | Path | None = None,
            max_sleep: float | None = 0.05,
    ) -> 'Child':
        """Start a child.

        Args:
            program: A function of a module in tests/support, which the child imports, or a command line without the
                interpreter: `['-m', 'MODULE', ...]` or `['FILE.py', ...]`.
            environment: All of its environment.
            arguments: Those of the function, as JSON brings them; paths arrive as text.
            folder: Its working directory; the tests' by default.
            max_sleep: Its longest sleep in seconds, so that pauses before further attempts take no time; None for
                sleeps as they are.
        """
        out = Path(tempfile.mkdtemp(dir=self.folder.name))
        is_function = callable(program)
        words = [program.__module__, program.__name__] if is_function else [str(word) for word in program]
        request = dict(words=words, arguments=arguments if is_function else None, environment=dict(environment),
                       folder=folder or os.getcwd(), out=[out / 'stdout', out / 'stderr'], max_sleep=max_sleep,
                       python=self.python)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.address)
        connection.sendall(json.dumps(request, default=str).encode() + b'\n')
        return Child(connection, out)

    def run(self, *program: Any, status: int = 0, timeout: float = 120., **options: Any) -> Result:
        """Start a child and wait for its end with this exit status; arguments as of `start`."""
        result = self.start(*program, **options).wait(timeout)
        assert result.returncode == status, result.stdout + result.stderr
        return result


class Child:
    """A process that was started."""

    def __init__(self, connection: socket.socket, out: Path):
        self.connection, self.out = connection, out
        self.lines = connection.makefile('r')
        self.pid = int(self.lines.readline())

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 120.) -> Result:
        self.connection.settimeout(timeout)
        try:
            returncode = int(self.lines.readline())
        except TimeoutError:
            self.kill()
            raise AssertionError(f'the child did not end within {timeout} s; it said:\n{self.read("stderr")}')
        finally:
            self.lines.close()
            self.connection.close()
        return Result(returncode, self.read('stdout'), self.read('stderr'))

    def read(self, name: str) -> str:
        """What it has said so far on `stdout` or `stderr`."""
        return (self.out / name).read_text(errors='replace')


def serve(address: str) -> None:
    """Be the parent: fork for every connection, until standard input ends."""
    for module in SLOW_MODULES:
        __import__(module)
    assert 'huggingface_hub' not in sys.modules
    # Collections in the children pass over what they share with their parent.
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f'{address}.new')
        listener.listen(16)
        os.rename(f'{address}.new', address)
        print('ready', flush=True)
        while sys.stdin not in select.select([sys.stdin, listener], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                attend(connection)
            connection.close()
    # What torch would tidy up at its end takes seconds.
    os._exit(0)


def attend(connection: socket.socket) -> None:
    """Fork the child and say how it ended; the parent is free for others meanwhile."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with connection.makefile('rw') as stream:
        request = json.loads(stream.readline())
        pid = os.fork()
        if pid == 0:
            connection.detach()
            be_child(**request)
        stream.write(f'{pid}\n')
        stream.flush()
        # Who asked for the child has gone, or it has ended.
        ended = os.pidfd_open(pid)
        if ended not in select.select([connection, ended], [], [])[0]:
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        try:
            stream.write(f'{status}\n')
            stream.flush()
        except OSError:
            pass
    os._exit(0)


def be_child(
        words: list[str], arguments: list | None, environment: dict, folder: str, out: list[str],
        max_sleep: float | None, python: str,
) -> None:
    """Become the process that was asked for; never returns."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(out, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = '' if words[0] == '-m' or arguments is not None else os.path.dirname(os.path.abspath(words[0]))
    sys.executable = python
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # As in a process that was started anew.
    random.seed()
    sys.modules['numpy'].random.seed()
    if max_sleep is not None:
        sleep = time.sleep
        time.sleep = lambda seconds: sleep(min(seconds, max_sleep))
    status = 0
    try:
        if arguments is not None:
            sys.path.append(str(TESTS))
            module, name = words
            getattr(importlib.import_module(module), name)(*arguments)
        elif words[0] == '-m':
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name='__main__', alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name='__main__')
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        import atexit
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == '__main__':
    serve(sys.argv[1])
