"""The benchmarks of a GPU run at toy size on a CPU, and their tables are those of the documentation."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'benchmarks'))

import gpu  # noqa: E402  a script, not a part of the package

# And how many figures each has.
PARTS = {
    'models': 6, 'compiled': 1, 'loss': 4, 'decode': 10, 'guard': 3, 'step': 1, 'resume': 1, 'fsdp': 2, 'loader': 4,
    'profile': 4, 'evidence': 1}
if torch.__version__ < '2.11':  # FSDP is refused, and what 2.7 compiles for so small images damages the heap
    del PARTS['compiled'], PARTS['fsdp']


def printed(capsys, *flags):
    gpu.main([str(flag) for flag in flags])
    return capsys.readouterr().out


@pytest.mark.launches
def test_every_part_runs_at_toy_size_and_is_shown_and_not_run_again(hub_children, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'executable', hub_children.python)
    flags = ['--device', 'cpu', '--output', str(tmp_path), '--part', *PARTS]
    gpu.main(['--toy', *flags])
    for part, count in PARTS.items():
        *figures, end = [json.loads(line) for line in (tmp_path / f'{part}.jsonl').read_text().splitlines()]
        assert len(figures) == count and end['finished'], part
        for figure in figures:
            assert 'error' not in figure and figure['part'] == part and figure.get('difference', 0) < 0.1, figure
        assert all(figure.get('identical', True) for figure in figures)
        assert all(figure.get('largest_relative_difference', 0) < 1e-3 for figure in figures)
    capsys.readouterr()
    tables = printed(capsys, '--table', *flags)
    for part in PARTS.keys() - {'profile', 'evidence'}:
        assert f'gpu.py --part {part}`:\n\n|' in tables
    assert '| bfloat16 | yes |' in tables
    assert printed(capsys, '--toy', '--skip-finished', *flags) == ''


def test_the_documentation_has_the_tables_of_the_committed_figures(capsys):
    page = (ROOT / 'docs' / 'results.md').read_text()
    folders = [folder for folder in (ROOT / 'benchmarks' / 'results').iterdir() if folder.is_dir()]
    assert folders
    for folder in folders:
        blocks = printed(capsys, '--table', '--output', folder).split('\n\n')
        tables = [block for block in blocks if block.startswith('|')]
        assert len(tables) >= 3
        for table in tables:
            assert table.strip() in page, f'docs/results.md lacks this table of {folder.name}:\n{table}'
