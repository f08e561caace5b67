"""What the programs say on a real terminal, in a file, to a quiet user, and on a process that is not the first."""

import fcntl
import io
import logging
import os
import select
import struct
import subprocess
import sys
import termios
import types
import warnings
from contextlib import contextmanager

import datasets
import pytest

import train_distill
from support import fresh_programs
from support.flags import DATA, small_data
from timm_tinyvit import cli, save_logits
from timm_tinyvit.base import console


@pytest.fixture(autouse=True)
def speaking():
    """Each test begins as a program that speaks, and leaves nothing behind."""
    console.setup_console(is_first=True)
    with warnings.catch_warnings():
        yield
    logging.disable(logging.NOTSET)
    console.setup_console(is_first=True)


@pytest.mark.launches
def test_who_stops_reading_ends_a_program_in_peace(tmp_path):
    """As `head` does."""
    ended = subprocess.run(
        ['bash', '-c', '"$@" | true; exit ${PIPESTATUS[0]}', 'bash', sys.executable, fresh_programs.__file__,
         'print_lines'], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (141, '')


@contextmanager
def screen():
    """Inside, stdout and stderr are a real terminal; gives a function for what came since."""
    keyboard, display = os.openpty()
    fcntl.ioctl(display, termios.TIOCSWINSZ, struct.pack('4H', 24, 80, 0, 0))

    def read() -> str:
        stream.flush()
        came = b''
        while select.select([keyboard], [], [], 0.1)[0]:
            came += os.read(keyboard, 1 << 16)
        return came.decode()

    with open(display, 'w') as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'stdout', stream)
        patch.setattr(sys, 'stderr', stream)
        patch.setenv('TERM', 'xterm')
        patch.delenv('NO_COLOR', raising=False)
        yield read
    os.close(keyboard)


@pytest.fixture
def now(monkeypatch):
    """A clock that is set by hand."""
    clock = types.SimpleNamespace(seconds=1000.)
    monkeypatch.setattr(console, 'monotonic', lambda: clock.seconds)
    return clock


def test_in_a_file_a_bar_is_a_line_every_half_a_minute(capsys, now):
    bar = console.progress(range(1200), desc='epoch 1/2', unit='step', leave=False)
    bar._time = lambda: now.seconds
    bar.start_t = bar.last_print_t = now.seconds
    for step in bar:
        now.seconds += 0.1
        if step % 10 == 0:
            bar.set_postfix(loss=step)  # which draws a bar on a terminal
            console.info(f'step {step}') if step == 500 else None
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == 'step 500\n' and 3 <= len(lines) <= 4
    assert '\r' not in said.err and '\x1b' not in said.err and '█' not in said.err
    assert lines[0].startswith('epoch 1/2: 25%, ') and 'of 1200, 00:3' in lines[0] and '01:3' in lines[0]
    assert '10.0' in lines[0].split(', ')[4] and lines[0].endswith('loss=300')


def test_in_a_file_short_loops_say_nothing_and_a_bar_that_stays_its_end(capsys, now):
    for leave in (False, True):
        with console.progress(total=50, desc='teacher', unit='view', leave=leave) as bar:
            bar.update(50)
    assert [line.split(',')[:2] for line in capsys.readouterr().err.splitlines()] == [['teacher: 100%', ' 50 of 50']]
    console.progress(total=50, initial=50, desc='teacher').close()
    assert capsys.readouterr().err == ''


def test_on_a_terminal_a_bar_is_drawn_over_itself_and_lines_stand_above_it():
    with screen() as read:
        for number in console.progress(range(3), desc='epoch', mininterval=0):
            console.info('a line') if number == 1 else None
        said = read()
    assert said.count('\r') > 3 and '100%' in said and '█' in said and 'a line\r\n' in said


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    with screen() as read:
        assert console.colored('best', 'green') == '\x1b[32mbest\x1b[0m'
        console.warning('hot')
        assert '\x1b[33mwarning:\x1b[0m hot' in read()
        assert console.colored('best', 'green', io.StringIO()) == 'best'
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'stderr', io.StringIO())
            console.warning('hot')
            assert sys.stderr.getvalue() == 'warning: hot\n'
        for name, value in (('NO_COLOR', '1'), ('TERM', 'dumb')):
            with monkeypatch.context() as patch:
                patch.setenv(name, value)
                assert console.colored('best', 'green') == 'best'


def test_a_process_that_is_not_the_first_says_nothing():
    with screen() as read:
        for is_first in (True, False):
            console.setup_console(is_first)
            for say in (console.info, console.print_result, console.warning, logging.getLogger('timm').warning):
                say('something')
            for _ in console.progress(range(3)):
                pass
            assert bool(read()) == is_first
    assert datasets.are_progress_bars_disabled()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        console.setup_console(is_first=False)
        warnings.warn('of a library', stacklevel=1)
    assert not caught


def test_a_notebook_draws_though_its_streams_are_no_terminal(monkeypatch, capsys):
    kernel = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, 'IPython', types.SimpleNamespace(get_ipython=lambda: kernel))
    for _ in console.progress(range(3), desc='epoch'):
        pass
    assert '\r' in capsys.readouterr().err
    # IPython in a console, or imported by a script, is none.
    for shell in (None, types.SimpleNamespace()):
        monkeypatch.setitem(sys.modules, 'IPython', types.SimpleNamespace(get_ipython=lambda: shell))  # noqa: B023
        for _ in console.progress(range(3), desc='epoch'):
            pass
    assert capsys.readouterr().err.count('\r') == 0


SMALL = [*small_data(32), '--quiet']


def test_quiet_programs_say_their_results(tmp_path, teacher, capsys):
    store = ['--logits', str(tmp_path / 'logits'), '--teacher', teacher]
    save_logits.main([*SMALL, *store, '--epochs', '1'])
    said = capsys.readouterr()
    assert said.out.startswith('shards           1 of 1') and said.out.count('\n') == 1 and said.err == ''
    save_logits.main([*SMALL[:-1], *store, '--epochs', '2'])
    assert 'teacher: 100%, 64 of 64, ' in capsys.readouterr().err
    with screen() as read:
        for quiet in ([], ['--quiet']):
            cli.main(['report', store[1], '--dataset', DATA, '--train-split', 'train[:32]', *quiet])
            said = read()
            assert 'teacher accuracy' in said and ('\r' in said.replace('\r\n', '')) == (not quiet)
    capsys.readouterr()
    train = [*SMALL, '--logits', str(tmp_path / 'logits'), '--val-split', 'test[:16]', '--model', 'test_resnet',
             '--epochs', '1', '--warmup-epochs', '0', '-b', '8', '--output', str(tmp_path), '--experiment', 'run']
    train_distill.main(train)
    said = capsys.readouterr()
    assert said.out.startswith(f'finished: {tmp_path / "run"}, best top-1') and said.out.count('\n') == 1
    assert said.out.endswith(f'; see {tmp_path / "run" / "report.html"}\n') and said.err == ''
    cli.main(['eval', str(tmp_path / 'run' / 'last'), *SMALL[:2], *SMALL[4:], '--val-split', 'test[:16]'])
    assert capsys.readouterr().out.startswith('loss ')


@pytest.mark.parametrize('command', ['train', 'fill', 'report', 'store verify'])
def test_help_says_what_quiet_leaves(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command.split(), '--help'])
    assert '--quiet say nothing but results, warnings and errors' in ' '.join(capsys.readouterr().out.split())
