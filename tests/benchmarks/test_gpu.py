"""The benchmarks of a GPU run at toy size on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / 'benchmarks' / 'gpu.py'
PARTS = {'models': 6, 'step': 3, 'loss': 4, 'profile': 4, 'compiled': 1}  # and how many figures each has


def test_every_part_runs_at_toy_size(tmp_path):
    command = [sys.executable, SCRIPT, '--toy', '--device', 'cpu', '--output', tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for part, count in PARTS.items():
        figures = [json.loads(line) for line in (tmp_path / f'{part}.jsonl').read_text().splitlines()]
        assert len(figures) == count
        for figure in figures:
            assert 'error' not in figure and figure['part'] == part and figure.get('difference', 0) < 0.1, figure
