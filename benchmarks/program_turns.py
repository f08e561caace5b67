"""Training programs in turns: the processor time of each of their epochs, where other work disturbs all of them alike.

All programs are started and stopped; then each goes on for a few seconds of the clock at a time, alone, until all have
ended. Needs Linux's /proc.
"""

import os
import re
import signal
import subprocess
import threading
from contextlib import suppress
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

TURN_SECONDS = 4.


def tree_seconds(pid: int) -> float:
    """Processor seconds of a process, its children that have ended and those that live."""
    try:
        stat = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
        children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except (FileNotFoundError, ProcessLookupError):  # it has ended between two looks, and counts in its parent
        return 0.
    return sum(map(int, stat[11:15])) / os.sysconf('SC_CLK_TCK') + sum(tree_seconds(int(child)) for child in children)


def epoch_seconds(commands: Mapping[str, Sequence[str]], threads: int) -> dict[str, np.ndarray]:
    """Processor seconds of the epochs of programs that print a line for each, as train_distill.py does.

    Args:
        commands: The programs by name.
        threads: Threads of each of their processes.

    Returns:
        Of each program, float [epochs - 2]: the first epoch is left out, as programs start with it, and so is the last.
    """
    programs: dict[str, subprocess.Popen] = {}
    ends: dict[str, list[float]] = {}

    def watch(process: subprocess.Popen, found: list[float]) -> None:
        for line in process.stdout:
            if re.match(r'epoch \d+/', line):
                found.append(tree_seconds(process.pid))

    environment = {**os.environ, 'OMP_NUM_THREADS': str(threads)}
    try:
        for name, command in commands.items():
            programs[name] = subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
            os.killpg(programs[name].pid, signal.SIGSTOP)
            ends[name] = []
        watchers = [threading.Thread(target=watch, args=(programs[name], ends[name])) for name in programs]
        for watcher in watchers:
            watcher.start()
        while running := [process for process in programs.values() if process.poll() is None]:
            for process in running:
                # Its loader workers as well.
                os.killpg(process.pid, signal.SIGCONT)
                try:
                    process.wait(TURN_SECONDS)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGSTOP)
    finally:
        for process in programs.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for watcher in watchers:
        watcher.join()
    if any(process.returncode for process in programs.values()):
        raise SystemExit('error: a program failed, as it says above')
    return {name: np.diff(seconds)[:-1] for name, seconds in ends.items()}
