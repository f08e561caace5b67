"""How much the demo's student gains from the stored teacher: plain and distilled runs of equal budget, three seeds.

    python benchmarks/demo_gain.py [--seeds 0 1 2] [--output runs/demo_gain] [--json]

The recipe is `make demo`'s (timm_tinyvit/config/recipes/demo.yaml), the training images are the demo's, and
accuracy is that of the last epoch on all 10,000 test images of Fashion-MNIST, read from the Hub or from the folder of
the Debian package. The runs are resumed where they stopped.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import torch

from timm_tinyvit.base.launch import device_name

ROOT = Path(__file__).resolve().parents[1]
TEACHER = ROOT / 'examples' / 'fashion_mnist' / 'teacher'


def train(data: Path, output: Path, seed: int, distilled: bool, flags: list[str]) -> dict[str, float]:
    """Train one student and return the last line of its metrics."""
    name = f'{"distilled" if distilled else "plain"}-{seed}'
    command = [
        sys.executable, '-m', 'timm_tinyvit', 'train', '--config', 'demo', '--dataset', str(data), '--output',
        str(output), '--experiment', name, '--seed', str(seed), '--quiet', *flags]
    if distilled:
        command += ['--teacher', str(TEACHER), '--logits', str(output / 'logits')]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    with open(output / name / 'metrics.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    return {'top1': float(rows[-1]['eval_top1']), 'seconds': sum(float(row['seconds']) for row in rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--source', help='folder with the IDX files, or Hub name (default: what draw.py finds)')
    parser.add_argument('--output', type=Path, default=ROOT / 'runs' / 'demo_gain')
    parser.add_argument('--json', action='store_true', help='one JSON line per run and one for the mean')
    parser.add_argument('flags', nargs='*', help='after --, more flags for both runs, as in -- --epochs 20')
    args = parser.parse_args()

    data = args.output / 'fashion_mnist'
    if not (data / 'test.parquet').exists():
        draw = [sys.executable, str(ROOT / 'examples' / 'fashion_mnist' / 'draw.py'), '--output', str(data)]
        source = ['--source', args.source] if args.source else []
        subprocess.run([*draw, '--test', '10000', *source], check=True, stdout=sys.stderr)

    results: dict[str, list[dict[str, float]]] = {'plain': [], 'distilled': []}
    for seed in args.seeds:
        for name, found in results.items():
            found.append(train(data, args.output, seed, name == 'distilled', args.flags))
            if args.json:
                print(json.dumps({'benchmark': 'demo_gain', 'run': name, 'seed': seed, **found[-1]}), flush=True)
    gains = [b['top1'] - a['top1'] for a, b in zip(*results.values())]
    machine = f'{device_name("cpu")}, {os.cpu_count()} cores, torch {torch.__version__}'
    if args.json:
        print(json.dumps({
            'benchmark': 'demo_gain', 'mean_gain': mean(gains), 'gains': gains, 'machine': machine,
            **{f'mean_{name}': mean(run['top1'] for run in found) for name, found in results.items()}}))
        return
    print(f'top-1 on 10,000 test images, {machine}')
    print('seed      plain  distilled    gain')
    for seed, plain, distilled, gain in zip(args.seeds, *results.values(), gains):
        print(f'{seed:<6} {plain["top1"]:7.2f}% {distilled["top1"]:8.2f}% {gain:+7.2f}')
    spread = f' (standard deviation {stdev(gains):.2f})' if len(gains) > 1 else ''
    print(f'mean   {mean(run["top1"] for run in results["plain"]):7.2f}% '
          f'{mean(run["top1"] for run in results["distilled"]):8.2f}% {mean(gains):+7.2f}{spread}')


if __name__ == '__main__':
    main()
