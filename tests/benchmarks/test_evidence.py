"""The evidence of docs/results.md: its tables are those of the committed runs, and the grid runs, stops and goes on."""

import argparse
import io
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import train_distill
from support.programs import refusal
from support.runs import write_record

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'benchmarks' / 'evidence.py'
sys.path.insert(0, str(SCRIPT.parent))

import evidence  # noqa: E402  a script, not a part of the package
import evidence_table  # noqa: E402

from timm_tinyvit.base.errors import InputError  # noqa: E402

COMMITTED = SCRIPT.parent / 'evidence'


def write_run(folder: Path, row: str, seed: int, top1: float) -> None:
    """A finished run of the reduced grid with another result, made from a committed one."""
    committed = json.loads(next((COMMITTED / 'reduced').glob('tiny_vit_5m-plain-*.json')).read_text())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{row}-{seed}.json').write_text(json.dumps(committed | {'row': row, 'seed': seed, 'top1': top1}))


def students(grid: str) -> list[tuple[evidence.Row, argparse.Namespace]]:
    """The rows of a grid, and their flags as the trainer reads them."""
    experiment = evidence.Experiment(grid, evidence.GRIDS[grid], Path('runs/evidence'), COMMITTED)
    return [(row, train_distill.settings(shlex.split(experiment.program(row, 0))[1:]))
            for row in evidence.GRIDS[grid].rows]


@pytest.mark.parametrize('grid, first', [
    ('reduced', '| TinyViT-5M |'), ('whole', '| TinyViT-5M |'), ('features', '| random weights |'),
    ('repeated', '| TinyViT-5M |')])
def test_the_tables_of_the_results_are_those_of_the_committed_runs(capsys, grid, first):
    evidence.main(['--grid', grid, '--table'])
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert any(line.startswith(first) for line in lines)
    results = (ROOT / 'docs' / 'results.md').read_text(encoding='utf-8').splitlines()
    assert [line for line in lines if line not in results] == []


def test_every_committed_run_is_of_a_command_of_its_grid():
    for name, grid in evidence.GRIDS.items():
        experiment = evidence.Experiment(name, grid, Path('runs/evidence'), COMMITTED)
        commands = {f'{row.name}-{seed}': experiment.program(row, seed) for row, seed in grid.plan}
        for file in (COMMITTED / name).glob('*.json'):
            record = json.loads(file.read_text())
            assert {'command', 'machine', 'versions', 'wall_seconds'} <= record.keys(), file
            if 'row' in record:
                assert record['command'] == f'accelerate launch {commands[file.stem]}', file
                assert len(record['weights_sha256']) == 64 and (record['top1_by_epoch'] or record['probes']), file
                assert (record['store'] is None) == ('--logits' not in record['command']), file
    assert sum(file.stat().st_size for file in COMMITTED.rglob('*.json')) < 300_000


@pytest.mark.parametrize('grid', ['full', 'reduced', 'whole'])
def test_all_students_of_a_grid_have_the_same_budget(grid):
    """And differ from the row that they are compared to in what their group says alone."""
    found = {row.name: (row, vars(args)) for row, args in students(grid)}
    free = {'logits', 'experiment', 'model', 'channels_last'}
    views = {'img_size', 'scale', 'color_jitter', 'reprob'}  # which a store says
    loss = {'alpha', 'temperature', 'views_per_image', 'mixup_mode'}
    _, base = found['tiny_vit_5m-plain']
    for name, (row, args) in found.items():
        other = {key for key in base if args[key] != base[key]}
        assert other <= free | loss | (views if row.store else set()), name
        _, reference = found[row.against or name]
        assert reference['model'] == args['model'], name
        if row.group == 'student' and row.store:
            assert not other & {'alpha', 'temperature', 'views_per_image'}
            assert not reference['logits']
        changed = {key for key in loss if args[key] != reference[key]}
        assert bool(changed - {'mixup_mode'}) == (row.group in ('loss', 'views per image')), name


def test_every_store_of_a_grid_is_asked_for_and_its_flags_are_known():
    for grid in evidence.GRIDS.values():
        assert {row.store for row in grid.rows if row.store} == set(grid.stores)


def test_means_spreads_and_differences_are_over_seeds(tmp_path, capsys):
    for seed, plain, distilled in ((0, 70., 71.), (1, 71., 73.), (2, 72., 75.)):
        write_run(tmp_path / 'reduced', 'tiny_vit_5m-plain', seed, plain)
        write_run(tmp_path / 'reduced', 'tiny_vit_5m-distilled', seed, distilled)
    write_run(tmp_path / 'reduced', 'k1', 1, 72.5)
    evidence.main(['--grid', 'reduced', '--table', '--metrics', str(tmp_path)])
    out = capsys.readouterr().out
    assert '| TinyViT-5M | 71.00 ± 1.00 | 73.00 ± 2.00 | +2.00 ± 1.00 | 3 |' in out
    assert '| nothing | TinyViT-5M, as above | 73.00 ± 2.00 | \N{EN DASH} | 3 |' in out
    # Against the same seed of the unchanged row, and no spread of a single run.
    assert '| classes kept | k = 1 | 72.50 | \N{MINUS SIGN}0.50 | 1 |' in out
    assert out.count('| TinyViT-5M |') == 1 and '| TinyViT-11M |' not in out
    assert 'Not run yet: TinyViT-11M; ResNet-10-T; k = 3; ' in out
    evidence.main(['--grid', 'reduced', '--json', '--metrics', str(tmp_path)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line['row'] for line in lines] == ['tiny_vit_5m-plain', 'tiny_vit_5m-distilled', 'k1']
    assert lines[1]['top1'] == {'0': 71., '1': 73., '2': 75.} and lines[1]['differences'] == [1., 2., 3.]


def test_the_plot_is_drawn_from_the_committed_runs(tmp_path):
    evidence.main(['--grid', 'reduced', '--plot', str(tmp_path / 'plot.png')])
    assert (tmp_path / 'plot.png').read_bytes().startswith(b'\x89PNG')


def test_the_committed_plot_is_of_the_committed_runs():
    """`--plot docs/evidence.png` writes which records it shows."""
    shown = Image.open(ROOT / 'docs' / 'evidence.png').text.get('records')
    assert shown == evidence_table.digest(evidence_table.read_records(COMMITTED / 'reduced'))


def test_a_plot_says_which_records_it_shows(tmp_path):
    """In other files they are the same, and another accuracy is not."""
    rows = evidence.GRIDS['reduced'].rows
    for row, top1 in (('tiny_vit_5m-plain', 70.), ('tiny_vit_5m-distilled', 71.)):
        write_run(tmp_path / 'one', row, 0, top1)
        write_run(tmp_path / 'two', row, 0, top1 + 1)
    shown = []
    for name in ('one', 'one', 'two'):
        records = evidence_table.read_records(tmp_path / name)
        shown.append(Image.open(io.BytesIO(evidence_table.plot(rows, records))).text['records'])
        assert shown[-1] == evidence_table.digest(dict(reversed(records.items())))
    assert shown[0] == shown[1] != shown[2] and len(shown[0]) == 64


@pytest.mark.parametrize('loads, busy', [
    ((0.4, 2.), ''), ((0.4, 2.6), ', with other work on the machine (load 0 to 3)')])
def test_machines_are_all_named_and_other_work_where_there_was_some(tmp_path, loads, busy):
    for seed, (load, device) in enumerate(zip(loads, ('One CPU', 'Other CPU'))):
        write_run(tmp_path, 'k1', seed, 70.)
        file = tmp_path / f'k1-{seed}.json'
        record = json.loads(file.read_text())
        record['machine'] = {'device': device, 'cores': 2, 'load': load}
        file.write_text(json.dumps(record))
    records = evidence_table.read_records(tmp_path)
    said = evidence_table.setting(list(records.values()), records)
    version = records['k1-0']['versions']['torch']
    assert said.endswith(f'One CPU, 2 cores and Other CPU, 2 cores, torch {version}{busy}.')


def test_nothing_is_reported_without_a_run(tmp_path, refused):
    with refused('no finished run', 'without --table'):
        evidence_table.read_records(tmp_path / 'reduced')


def test_a_run_of_another_command_is_not_taken_for_one_of_the_grid(tmp_path, refused):
    grid = evidence.GRIDS['reduced']
    experiment = evidence.Experiment('reduced', grid, Path('runs/evidence'), tmp_path)
    row, _ = grid.plan[0]
    write_run(tmp_path / 'reduced', row.name, 0, 70.)
    file = tmp_path / 'reduced' / f'{row.name}-0.json'
    program = json.loads(file.read_text())['command'].removeprefix('accelerate launch ')
    assert experiment.finished(file, program)['top1'] == 70.
    with refused('another command', 'remove the file'):
        experiment.finished(file, f'{program} --lr 1')


def test_the_first_seed_of_all_rows_comes_before_the_next():
    rows = evidence.SMOKE
    assert evidence.plan(rows, (0, 1)) == ((rows[0], 0), (rows[1], 0), (rows[0], 1), (rows[1], 1))


def test_a_run_that_fails_leaves_the_others_and_a_failure(tmp_path, refused, capsys, monkeypatch):
    experiment = evidence.Experiment('smoke', evidence.GRIDS['smoke'], tmp_path, tmp_path)
    made = []

    def make_run(row, seed):
        made.append(f'{row.name}-{seed}')
        if row.name == 'plain':
            raise InputError('no room')
        return {'run': made[-1], 'top1': 71.236, 'best_top1': 80., 'wall_seconds': 5.6}

    monkeypatch.setattr(experiment, 'make_run', make_run)
    with refused('1 of 2 runs failed', 'tries them again'):
        evidence.run_grid(experiment, '*', 1)
    said = capsys.readouterr()
    assert made == ['plain-0', 'distilled-0'] and said.err == 'error: no room\n'
    assert '/2 distilled-0: top-1 71.24, 6 s' in said.out and 'plain' not in said.out
    made.clear()
    evidence.run_grid(experiment, 'dist*-0', 2)
    assert made == ['distilled-0']
    with refused('no run of the grid smoke', 'fits --only *-1', 'plain-0'):
        evidence.run_grid(experiment, '*-1', 2)


def test_no_job_at_a_time_is_refused(capsys, one_sentence):
    one_sentence(refusal(evidence.main, ['--grid', 'smoke', '--jobs', '0'], capsys), '--jobs is 0')


def test_a_run_is_measured_by_its_last_epoch(tmp_path):
    (tmp_path / 'last').mkdir()
    (tmp_path / 'last' / 'model.safetensors').write_bytes(b'weights')
    write_record(tmp_path, {'lr': 0.1, 'quiet': False})
    (tmp_path / 'metrics.csv').write_text(
        'epoch,loss,eval_top1,seconds,images_per_second\n0,2,80,10,100\n1,1.5,,20,200\n2,1.25,70,40,600\n')
    experiment = evidence.Experiment('smoke', evidence.GRIDS['smoke'], tmp_path, tmp_path)
    found = experiment.measured('plain-0', 'train_distill.py', tmp_path, 71.26)
    assert found.items() >= {
        'run': 'plain-0', 'command': 'accelerate launch train_distill.py', 'wall_seconds': 71.3, 'top1': 70.,
        'best_top1': 80., 'top1_by_epoch': {1: 80., 3: 70.}, 'loss_by_epoch': [2., 1.5, 1.25], 'train_seconds': 70.,
        'images_per_second': 300., 'settings': {'lr': 0.1}}.items()


def test_a_stopped_grid_goes_on_and_does_not_run_again_what_is_finished(
        hub_children, tmp_path, capsys, monkeypatch):
    """Two real runs and a real store; SIGTERM comes when the first run is finished."""
    output, metrics = tmp_path / 'runs', tmp_path / 'metrics'
    flags = ['--grid', 'smoke', '--only', '*-0', '--output', str(output), '--metrics', str(metrics)]
    first = metrics / 'smoke' / 'plain-0.json'
    process = subprocess.Popen(
        [hub_children.python, str(SCRIPT), *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not first.exists() and process.poll() is None:
            time.sleep(0.1)
    finally:
        process.terminate()
        out, err = process.communicate()
    assert process.returncode == 143, out + err
    assert 'the same command goes on' in err and 'Traceback' not in err
    assert [file.name for file in (metrics / 'smoke').iterdir() if file.suffix == '.json'] == ['plain-0.json']
    before = os.stat(first).st_mtime_ns, os.stat(output / 'smoke' / 'plain-0' / 'metrics.csv').st_mtime_ns

    monkeypatch.setattr(sys, 'executable', hub_children.python)
    evidence.main(flags)
    said = capsys.readouterr().out
    assert '1/2 plain-0' in said and '2/2 distilled-0' in said
    assert before == (os.stat(first).st_mtime_ns, os.stat(output / 'smoke' / 'plain-0' / 'metrics.csv').st_mtime_ns)
    plain, distilled, store = (
        json.loads((metrics / 'smoke' / f'{name}.json').read_text()) for name in ('plain-0', 'distilled-0', 'store-k3'))
    assert plain['store'] is None and distilled['store']['identity'] == store['store']['identity']
    assert store['store']['views'] == 80 and store['store']['k'] == 3 and store['store']['bytes_per_view'] > 0
    assert plain['weights_sha256'] != distilled['weights_sha256']
    assert set(plain['top1_by_epoch']) == {'1', '2'} and plain['top1'] == plain['top1_by_epoch']['2']
