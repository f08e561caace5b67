"""The main job on the images and the teacher in this folder: fill a store, train a student with it and one without.

    python examples/demo.py [--quick] [--output runs/demo]

The two students train side by side. Prints every command that it runs, and a table at the end. Stopped, it goes on
where it was.
"""

import argparse
import csv
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from timm_tinyvit.data.dataset import ImageDataset, collate
from timm_tinyvit.data.sources import load_split
from timm_tinyvit.models.loading import create_pretrained
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.teacher.teacher import Teacher

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / 'examples' / 'fashion_mnist'


def run_together(commands: dict[str, list[str]]) -> dict[str, float]:
    """Run commands of this project, print them as a user would type them, and return the seconds of each."""
    processes: dict[str, subprocess.Popen] = {}
    seconds: dict[str, float] = {}
    start = time.monotonic()
    # Half of the cores for each.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    threads = str(max(1, cores // len(commands)))

    def follow(name: str) -> None:
        process = processes[name]
        for line in process.stdout:
            print(f'{name:9} | {line}', end='', flush=True)
        seconds[name] = time.monotonic() - start
        if process.wait():
            for other in processes.values():
                other.terminate()

    for name, command in commands.items():
        print('$ timm-tinyvit ' + ' '.join(command).replace(f'{ROOT}/', ''), flush=True)
        processes[name] = subprocess.Popen(
            [sys.executable, '-m', 'timm_tinyvit', *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': threads})
    followers = [threading.Thread(target=follow, args=(name,)) for name in processes]
    for follower in followers:
        follower.start()
    stopped = False
    for follower in followers:
        try:
            follower.join()
        except KeyboardInterrupt:
            # They have heard of it too, and end in good order.
            stopped = True
            follower.join()
    failed = [process.returncode for process in processes.values() if process.returncode]
    if stopped or failed:
        sys.exit(130 if stopped else failed[0])
    return seconds


def teacher_accuracy(split: str) -> float:
    """Top-1 accuracy in percent of the demo's teacher on test images."""
    from timm.data import create_transform

    teacher = Teacher(create_pretrained(str(DATA / 'teacher')), 'teacher', torch.device('cpu'))
    data = ImageDataset(
        load_split(str(DATA), split, is_training=False),
        create_transform(32, crop_pct=1., interpolation='bicubic', normalize=False))
    right = 0
    for start in range(0, len(data), 500):
        batch = collate(data.__getitems__(list(range(start, min(start + 500, len(data))))))
        right += int((teacher(batch['view']).argmax(dim=1) == batch['label']).sum())
    return 100 * right / len(data)


def read_metrics(folder: Path) -> list[dict[str, str]]:
    with open(folder / 'metrics.csv', newline='') as file:
        return [row for row in csv.DictReader(file) if row['eval_top1']]


def plot(runs: dict[str, list[dict[str, str]]], teacher: float, picture: Path) -> None:
    """Accuracy by epoch of the students, and the teacher's as a line."""
    figure = Figure(figsize=(6, 3.6), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (label, rows), color in zip(runs.items(), ('tab:gray', 'tab:orange')):
        axes.plot(
            [int(row['epoch']) + 1 for row in rows], [float(row['eval_top1']) for row in rows], marker='o',
            label=label, color=color)
    axes.axhline(teacher, color='tab:blue', linestyle='--', linewidth=1, label='teacher')
    axes.set(xlabel='epoch', ylabel='top-1 accuracy (%)', title='TinyViT-5M, 300 images of Fashion-MNIST, 32 px')
    axes.grid(alpha=0.3)
    axes.legend(loc='lower right')
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help='4 epochs of 200 images, to see that all runs')
    parser.add_argument('--output', type=Path, default=Path('runs/demo'), help='folder for the store and the runs')
    args = parser.parse_args()
    output = (ROOT / args.output if not args.output.is_absolute() else args.output)
    output = output.with_name(output.name + '-quick') if args.quick else output
    flags = ['--config', 'demo', '--dataset', str(DATA), '--output', str(output)]
    test_split = 'test'
    if args.quick:
        test_split = 'test[:200]'
        flags += [
            '--epochs', '4', '--warmup-epochs', '1', '--train-split', 'train[:200]', '--val-split', test_split,
            '--shard-size', '100']
    store_flags = ['--teacher', str(DATA / 'teacher'), '--logits', str(output / 'logits')]

    fresh = not output.exists()
    seconds = run_together({
        'plain': ['train', *flags, '--experiment', 'plain'],
        'distilled': ['train', *flags, *store_flags, '--experiment', 'distilled']})

    store = LogitStore.open(output / 'logits')
    teacher = teacher_accuracy(test_split)
    runs = {name: read_metrics(output / name) for name in ('plain', 'distilled')}
    plain, distilled = (float(rows[-1]['eval_top1']) for rows in runs.values())
    plot(runs, teacher, output / 'demo.png')
    resumed = ' (of this start; the run goes on from an earlier one)' if not fresh else ''
    print(f"""
                         top-1   seconds{resumed}
  teacher               {teacher:5.2f}%         -   sees the same {store.manifest.recipe["input_size"][1]}-pixel images
  student, labels only  {plain:5.2f}%    {seconds['plain']:6.0f}
  student, distilled    {distilled:5.2f}%    {seconds['distilled']:6.0f}   filling the store included

  gain {distilled - plain:+.2f} points; {store.manifest.record_width} bytes per view, \
{store.manifest.epochs} epochs of {store.manifest.num_samples} views in {store.size() / 1e3:.0f} kB
  plot: {(output / 'demo.png')}""".replace(f'{ROOT}/', ''))


if __name__ == '__main__':
    main()
