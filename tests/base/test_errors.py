"""How programs end: a signal to stop, a path that cannot be, and what their last line may hold."""

import os
import signal
import subprocess
import sys
import time

import pytest

from support import fresh_programs


@pytest.mark.launches
@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2'])
@pytest.mark.parametrize('is_ignored', [False, True])
def test_each_signal_to_stop_unwinds_a_program_and_is_its_exit_status(name, is_ignored):
    """But for one that was ignored from the start, as by nohup; all that came after the first are ignored too."""
    number = getattr(signal, name)

    def prepare():
        signal.signal(number, signal.SIG_IGN if is_ignored else signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, fresh_programs.__file__, 'wait_for_a_signal'], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=prepare)
    assert process.stdout.readline() == 'begun\n'
    process.send_signal(number)
    if is_ignored:
        time.sleep(0.2)
        assert process.poll() is None
        other = signal.SIGTERM if number != signal.SIGTERM else signal.SIGHUP
        process.send_signal(other)
        number = other
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, 'in order\n')
    assert err == 'stopped: the same command goes on from what is on disk\n'


@pytest.mark.parametrize('path', ['a' * 300, 'a/' * 3000, 'a\0b'], ids=['name', 'path', 'NUL'])
def test_a_path_that_no_system_takes_is_one_sentence(path, capsys):
    from timm_tinyvit.base.errors import reports_input_errors

    @reports_input_errors
    def main(argv):
        os.stat(path)

    with pytest.raises(SystemExit) as exit:
        main([])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.startswith('error: ') and said.count('\n') == 1 and len(said) < 2500
