"""Folders of runs that somebody else wrote: report, comparison and card are made, or refused in one sentence."""

import copy
import io
import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from timm_tinyvit import cli
from timm_tinyvit.base.errors import InputError
from timm_tinyvit.hub import push_model
from timm_tinyvit.hub.push_model import model_files
from timm_tinyvit.report import compare as run_comparison, plots, run as run_report
from timm_tinyvit.report.compare import compare_runs
from timm_tinyvit.report.run import write_run_report
from timm_tinyvit.train import predictions
from timm_tinyvit.train.record import launches_of
from timm_tinyvit.train.teacher_comparison import StoredFeatures
import train_distill
from support.programs import refusal

DATA = str(Path(__file__).resolve().parents[2] / 'examples' / 'fashion_mnist')
FILES = ['run.json', 'metrics.csv', 'predictions.npz', 'stored_views.npz', 'stored_features.npz', 'best/config.json',
         'speed.json']
# What stands in place of a value; None, too, is one.
VALUES = [
    None, True, False, -1, 0, 1, 3.5, 1e308, -1e308, float('nan'), float('inf'), 1 << 70, -(1 << 70), '', 'x',
    'x' * 200_000, '../../x', '\x1b[2J', '\u202e', 'a\nb', '![x](https://evil.example)', '<script>', [], {}, [[]],
    [None], ['x'], [1] * 9, {'a': {}}, {'name': 1}, [{'epoch': 'x'}]]
# The rounds of each kind of file; more by hand: STRANGERS=20 pytest tests/report/test_strangers.py
ROUNDS = int(os.environ.get('STRANGERS', '1'))
COUNTS = Counter()


@pytest.fixture(scope='module')
def run(tmp_path_factory, teacher):
    """The folder of a short distilled run, with all that a card takes."""
    output = tmp_path_factory.mktemp('runs')
    train_distill.main([
        '--dataset', DATA, '--train-split', 'train[:48]', '--val-split', 'test[:40]', '--img-size', '32', '--crop-pct',
        '1', '--model', 'test_resnet', '--epochs', '2', '--warmup-epochs', '0', '-b', '16', '--lr', '3e-2', '-j', '0',
        '--teacher', teacher, '--logits', str(output / 'logits'), '--topk', '3', '--quiet', '--output', str(output),
        '--experiment', 'run'])
    (output / 'run' / 'speed.json').write_text(json.dumps(
        {'images_per_second': 9., 'batch_size': 16, 'device': 'cpu', 'threads': 1, 'torch': '2'}))
    StoredFeatures(np.linspace(0, 1, 48, dtype=np.float32), 5, 1, [1]).write(output / 'run' / 'stored_features.npz')
    for file in (output / 'run').glob('*.pt'):
        file.unlink()
    return output / 'run'


@pytest.fixture
def no_plots(monkeypatch):
    for module in (plots, run_report, run_comparison):
        monkeypatch.setattr(module, 'can_plot', lambda: False)
    # What is no speed is measured anew, for as short a time as there is.
    monkeypatch.setattr(push_model, 'SPEED_SECONDS', 0.)


def uses(name, folder, other):
    """What reads a file of a run: its report, a comparison, its card, and a training that is resumed."""
    if name in ('run.json', 'metrics.csv') or name.endswith('.npz'):
        yield lambda: write_run_report(folder).read_text()
        yield lambda: compare_runs([other, folder], folder / 'compared.html')
    if not name.endswith('.npz'):
        yield lambda: b''.join(
            content for content in model_files(folder, 'org/name').values() if isinstance(content, bytes)).decode()
    if name == 'run.json':
        yield lambda: launches_of(folder, 0, {'commit': None, 'environment': {'device': 'cpu'}})


def check(name, folder, other, what):
    """Use a folder in each way that reads a file of it; how often there is a sentence."""
    refused = 0
    for use in uses(name, folder, other):
        try:
            made = str(use())
            assert '\x1b' not in made and '\u202e' not in made and '![x](' not in made and '<script>' not in made, what
            assert len(made) < 4_000_000, what
        except InputError:
            refused += 1
    COUNTS[name] += 1
    return refused


def paths_of(value, path=()):
    """The places of all values within a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from paths_of(item, (*path, name))


def changed(value, path, new):
    """A JSON value with another one at a place, or with `...` nothing there."""
    if not path:
        return new
    value = copy.deepcopy(value)
    place = value
    for name in path[:-1]:
        place = place[name]
    if new is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return value


@pytest.mark.parametrize('name', ['run.json', 'best/config.json', 'speed.json'])
def test_any_value_of_another_type_or_size_is_a_sentence_or_left_out(name, run, tmp_path, no_plots):
    folder, draw = tmp_path / 'run', random.Random(name)
    shutil.copytree(run, folder)
    good = json.loads((folder / name).read_text())
    places = [path for path in paths_of(good) if path]
    for _ in range(20 * ROUNDS):
        path, new = draw.choice(places), draw.choice([*VALUES, ...])
        (folder / name).write_text(json.dumps(changed(good, path, new)))
        check(name, folder, run, (name, path, new))


def with_arrays(content, change):
    arrays = dict(np.load(io.BytesIO(content)))
    change(arrays)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize('name', ['predictions.npz', 'stored_views.npz', 'stored_features.npz'])
def test_arrays_of_another_kind_are_left_out_of_a_report(name, run, tmp_path, no_plots):
    folder, draw = tmp_path / 'run', random.Random(name)
    shutil.copytree(run, folder)
    good = (folder / name).read_bytes()
    names = [key for key in np.load(io.BytesIO(good)) if key != 'about']
    about = json.loads(np.load(io.BytesIO(good))['about'].tobytes())
    places = [path for path in paths_of(about) if path]

    def change(arrays):
        kind, key = draw.randrange(8), draw.choice(names)
        array = arrays[key]
        if kind == 0:
            del arrays[key]
        elif kind == 1:
            arrays[key] = array.astype(draw.choice(['f8', 'i8', 'S4', 'U3', 'c8', '?', 'u1']))
        elif kind == 2:
            arrays[key] = array[:draw.randrange(len(array))]
        elif kind == 3:
            arrays[key] = array.reshape(-1) if array.ndim > 1 else array[:, None]
        elif kind == 4:
            array = arrays[key] = array.copy()
            value = draw.choice([-5, 1 << 14, 200] if array.dtype.kind in 'iu' else [np.nan, np.inf, -1., 9e9])
            array.reshape(-1)[draw.randrange(array.size)] = min(value, 255) if array.dtype == np.uint8 else value
            if array.dtype == np.uint8:
                arrays[key] = array[:0]
        elif kind == 5:
            arrays[key] = np.zeros((0,) * array.ndim, array.dtype)
        else:
            text = json.dumps(changed(about, draw.choice(places), draw.choice([*VALUES, ...])))
            arrays['about'] = np.frombuffer(text.encode(), np.uint8)

    for number in range(15 * ROUNDS):
        try:
            (folder / name).write_bytes(with_arrays(good, change))
        except ValueError:
            continue  # no number of that type
        check(name, folder, run, (name, number))


BYTES = {
    'empty': b'', 'zeros': bytes(1000), 'text': b'words\n', 'binary': bytes(range(256)) * 9,
    'no UTF-8': b'\xff\xfe{}', 'list': b'[]', 'number': b'3', 'null': b'null', 'deep': b'[' * 100_000,
    'deep objects': b'{"a":' * 100_000, 'large number': b'{"version": ' + b'9' * 5000 + b'}',
    'header alone': b'epoch,loss\n', 'a zip': b'PK\x03\x04' + bytes(99),
    'long line': b'epoch,' + b'x' * 200_000 + b'\n0,1\n', 'long row': b'epoch\n0' + b',1' * 100_000 + b'\n',
    'NaN epoch': b'epoch,loss\nnan,1\n', 'epoch too large': b'epoch,loss\n1e300,1\n', 'epochs twice': b'epoch\n0\n0\n',
    'accuracy': b'epoch,eval_top1\n0,1e9\n', 'a minus': b'epoch,seconds,data_wait\n0,-5,2\n',
    'infinite': b'epoch,loss,eval_top1,seconds\n0,inf,nan,-inf\n', 'numbers of any size': b'epoch,loss\n0,1e308\n',
    'NUL': b'epoch,loss\n0,\x001\n', 'quotes': b'epoch,"loss\n0,1\n'}


@pytest.mark.parametrize('name', FILES)
def test_any_bytes_in_place_of_a_file_are_a_sentence_or_left_out(name, run, tmp_path, no_plots):
    shutil.copytree(run, tmp_path / 'run')
    for kind, content in BYTES.items():
        (tmp_path / 'run' / name).write_bytes(content)
        check(name, tmp_path / 'run', run, (name, kind))


@pytest.mark.parametrize('name', FILES)
def test_no_pipe_device_folder_or_lost_link_is_waited_for(name, run, tmp_path, no_plots):
    shutil.copytree(run, tmp_path / 'run')
    file = tmp_path / 'run' / name
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink('/dev/zero', path), lambda path: os.symlink('x', path)):
        file.unlink()
        make(file)
        check(name, tmp_path / 'run', run, (name, make))
        file.rmdir() if file.is_dir() else file.unlink()
        file.touch()


def test_what_unfolds_to_more_than_any_evaluation_has_is_left_out(run, tmp_path, no_plots, monkeypatch):
    """Zeros take no room in a file."""
    monkeypatch.setattr(predictions, 'MAX_ARRAY_BYTES', 1 << 20)
    shutil.copytree(run, tmp_path / 'run')
    file = tmp_path / 'run' / 'predictions.npz'
    arrays = dict(np.load(file))
    assert 'predictions.npz cannot be read' not in write_run_report(tmp_path / 'run').read_text()
    np.savez_compressed(file, **arrays, more=np.zeros(1 << 20))
    assert file.stat().st_size < 1 << 20
    assert 'predictions.npz cannot be read' in write_run_report(tmp_path / 'run').read_text()


def test_flipped_bits_are_a_sentence_or_left_out(run, tmp_path, no_plots):
    folder, draw = tmp_path / 'run', random.Random(0)
    shutil.copytree(run, folder)
    for name in FILES:
        good = (run / name).read_bytes()
        for _ in range(2 * ROUNDS):
            content = bytearray(good)
            for _ in range(draw.randrange(1, 6)):
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            (folder / name).write_bytes(content)
            check(name, folder, run, name)
        (folder / name).write_bytes(good)


@pytest.mark.parametrize('command', [['report'], ['compare'], ['publish', '--repo', 'org/name', '--dry-run', 'out']])
def test_a_program_says_one_sentence_of_a_damaged_run(command, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / 'run')
    (tmp_path / 'run' / 'metrics.csv').write_text('epoch,loss\nx,1\n')
    folders = [run, tmp_path / 'run'] if command == ['compare'] else [tmp_path / 'run']
    assert 'metrics.csv is not readable' in refusal(cli.main, [command[0], *folders, *command[1:]], capsys)


def test_what_a_run_itself_leaves_is_whole(run, tmp_path, no_plots):
    shutil.copytree(run, tmp_path / 'run')
    assert check('run.json', tmp_path / 'run', run, 'nothing') == 0
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert 'expected calibration error' in page and 'the teacher agree' in page and 'class="warning"' not in page
