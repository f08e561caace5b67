"""Does distillation from disk make better students for the same budget? Grids of runs on Fashion-MNIST.

    python benchmarks/evidence.py --grid reduced                         # run it, or go on where it was stopped
    python benchmarks/evidence.py --grid reduced --table                 # the tables of docs/results.md
    python benchmarks/evidence.py --grid reduced --plot docs/evidence.png

full      all 60,000 images, 30 epochs, three seeds of everything: for a GPU
reduced   2,500 images, 6 epochs, one seed where --table does not say otherwise: hours of two CPU cores
whole     all 60,000 images, 3 epochs, TinyViT-5M: an hour of two CPU cores
probes    how the setting of `reduced` was chosen, on held-out training images and with the demo's teacher
smoke     seconds, to see that all runs

All students of a grid see equally many training views, the same ones plain and distilled, and are scored after their
last epoch on all test images. A seed decides weights, order and dropout, and not the views. Teacher, stores and runs
lie in runs/evidence; what a finished one has measured is a small file in benchmarks/evidence, and tables and plots are
made of these files alone. What has its file is not run again; what was killed goes on from its last checkpoint.
"""

import argparse
import fnmatch
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from evidence_runs import ROOT, Experiment
from evidence_table import plot, read_records, summaries, table
from timm_tinyvit.base.errors import InputError, reports_input_errors
from timm_tinyvit.base.files import write_atomic

# Grey images of clothes: no colours to jitter, and crops that keep most of the object.
VIEWS = '--img-size 32 --scale 0.6 1.0 --color-jitter 0 --reprob 0.25'
SCORE = '--crop-pct 1.0 --validation-batch-size 500'
TEACHER = (
    '--val-split test --model convnext_atto --model-kwargs patch_size=2 dims=[64,128,256,384] depths=[2,2,4,2] '
    f'{VIEWS} --batch-size 128 --epochs 14 --lr 0.002 --warmup-epochs 1 --smoothing 0 --drop-path 0.1 '
    f'--channels-last {SCORE} --val-interval 2 --workers 1 --recovery-interval 200')
STUDENT = f'{SCORE} --batch-size 50 --weight-decay 0.05 --min-lr 1e-5 --smoothing 0.1 --recovery-interval 200'


@dataclass(frozen=True)
class Row:
    """One setting; `store` names what it learns from, none for labels only, and `against` the row to compare it to."""
    name: str
    group: str
    title: str
    flags: str
    store: str | None = None
    against: str | None = 'tiny_vit_5m-distilled'


@dataclass(frozen=True)
class Grid:
    """Rows with their seeds in the order in which they are run.

    Attributes:
        data: Flags of students and stores: the images and the epochs.
        flags: Flags of all students.
        stores: Flags of each store.
        plan: Rows and seeds, the most important first.
        note: A sentence for the head of the table.
        dataset: Folder of the images; drawn where it is not there.
        teacher: The teacher's folder; without one the grid trains it with the flags `teacher_flags`.
        views: Flags of what teacher and students see.
    """
    data: str
    flags: str
    stores: dict[str, str]
    plan: tuple[tuple[Row, int], ...]
    note: str
    dataset: str = 'runs/fashion_mnist'
    teacher: str | None = None
    teacher_flags: str = TEACHER
    views: str = VIEWS

    @property
    def rows(self) -> list[Row]:
        """Each row once."""
        return list(dict.fromkeys(row for row, _ in self.plan))


TINY_5M, TINY_11M, RESNET = '--model tiny_vit_5m_224', '--model tiny_vit_11m_224', '--model resnet10t --channels-last'
MAIN = tuple(
    Row(f'{name}-{kind}', 'student', title, flags, store, f'{name}-plain' if store else None)
    for name, title, flags in (
        ('tiny_vit_5m', 'TinyViT-5M', TINY_5M), ('tiny_vit_11m', 'TinyViT-11M', TINY_11M),
        ('resnet10t', 'ResNet-10-T', RESNET))
    for kind, store in (('plain', None), ('distilled', 'k10')))
NUM_CLASSES = (
    Row('k1', 'classes kept', 'k = 1', TINY_5M, 'k1'),
    Row('k3', 'classes kept', 'k = 3', TINY_5M, 'k3'))
TWO_VIEWS = f'{TINY_5M} --views-per-image 2'


def others(few: int) -> tuple[Row, ...]:
    """What else is changed of TinyViT-5M distilled from the store k10; `few` epochs are stored at one time."""
    return (
        Row('temperature2', 'loss', 'temperature 2', f'{TINY_5M} --temperature 2', 'k10'),
        Row('alpha0.5', 'loss', 'alpha 0.5', f'{TINY_5M} --alpha 0.5', 'k10'),
        Row('few-epochs', 'stored epochs', f'{few} epochs stored', TINY_5M, 'few-epochs'),
        Row('float16', 'codec', 'float16', TINY_5M, 'float16'),
        Row('views2', 'views per image', '2 views per image', TWO_VIEWS, 'k10'),
        Row('views2-plain', 'views per image', '2 views, labels only', TWO_VIEWS, None, 'tiny_vit_5m-plain'),
        Row('temperature4', 'loss', 'temperature 4', f'{TINY_5M} --temperature 4', 'k10'),
        Row('alpha0.9', 'loss', 'alpha 0.9', f'{TINY_5M} --alpha 0.9', 'k10'),
        Row('alpha0.5-temperature4', 'loss', 'alpha 0.5, temperature 4',
            f'{TINY_5M} --alpha 0.5 --temperature 4', 'k10'),
        Row('one-epoch', 'stored epochs', '1 epoch stored', TINY_5M, 'one-epoch'))


LOSSES = (
    Row('reverse-kl', 'loss', 'reverse KL', f'{TINY_5M} --distill-loss reverse-kl', 'k10'),
    Row('dkd', 'loss', 'DKD', f'{TINY_5M} --distill-loss dkd', 'k10'),
    Row('dist', 'loss', 'DIST', f'{TINY_5M} --distill-loss dist', 'k10'),
    Row('standardize', 'loss', 'standardised logits', f'{TINY_5M} --standardize', 'k10'),
    Row('ghost', 'loss', 'k = 3, ghost class', f'{TINY_5M} --remainder ghost', 'k3', 'k3'))


def stores(few: int) -> dict[str, str]:
    """The flags of each store of a grid, beside the data's and the views'."""
    return {
        'k10': '--topk 10', 'k3': '--topk 3', 'k1': '--topk 1', 'one-epoch': '--topk 10 --epochs 1',
        'few-epochs': f'--topk 10 --epochs {few}', 'float16': '--topk 10 --codec float16'}


def plan(rows: Sequence[Row], seeds: Sequence[int]) -> tuple[tuple[Row, int], ...]:
    """All rows with the first seed, then all with the next."""
    return tuple((row, seed) for seed in seeds for row in rows)


# `reduced` has the first learning rate and smoothing; what else was tried, and other numbers of images.
THOUSAND = f'{TINY_5M} --epochs 10 --warmup-epochs 2 --train-split train[:1000]'
PROBES = (
    Row('plain-5000', 'student', '5,000 images, 2 epochs', TINY_5M, None, None),
    Row('distilled-5000', 'student', '5,000 images, 2 epochs', TINY_5M, '5000', 'plain-5000'),
    Row('plain-1000', 'student', '1,000 images, 10 epochs', THOUSAND, None, None),
    Row('distilled-1000', 'student', '1,000 images, 10 epochs', THOUSAND, '1000', 'plain-1000'),
    Row('plain-5000-lr2e-3', 'labels only', 'lr 0.002', f'{TINY_5M} --lr 0.002', None, 'plain-5000'),
    Row('plain-5000-lr5e-4', 'labels only', 'lr 0.0005', f'{TINY_5M} --lr 0.0005', None, 'plain-5000'),
    Row('plain-5000-smooth0', 'labels only', 'no label smoothing', f'{TINY_5M} --smoothing 0', None, 'plain-5000'))
SMOKE = (
    Row('plain', 'student', 'ResNet of the tests', '--model test_resnet', None, None),
    Row('distilled', 'student', 'ResNet of the tests', '--model test_resnet', 'k3', 'plain'))

UNLESS_CHANGED = 'Stores keep all epochs, k = 10, codec compact; alpha and temperature are 1.'
GRIDS = {
    'full': Grid(
        '--train-split train --epochs 30', f'{STUDENT} --val-split test --val-interval 5 --lr 0.001 --warmup-epochs 3 '
        '--workers 8', stores(few=10), plan((*MAIN, *NUM_CLASSES, *others(10)), (0, 1, 2)),
        f'The full grid: all training images, for the teacher and for the students. {UNLESS_CHANGED}'),
    'reduced': Grid(
        '--train-split train[:2500] --epochs 6', f'{STUDENT} --val-split test --val-interval 6 --lr 0.001 '
        '--warmup-epochs 1 --workers 1', stores(few=2),
        plan(MAIN, (0,)) + plan(NUM_CLASSES, (0,)) + plan(MAIN, (1, 2)) + plan(others(2), (0,))
        + plan((*NUM_CLASSES, *others(2)), (1, 2)) + plan(LOSSES, (0, 1, 2)),
        'A reduced grid for a CPU: students see 2,500 of the 60,000 training images, their teacher has learned from '
        f'all of them. {UNLESS_CHANGED}', teacher='examples/fashion_mnist/teacher'),
    'whole': Grid(
        '--train-split train --epochs 3', f'{STUDENT} --val-split test --val-interval 3 --lr 0.001 --warmup-epochs 0.5 '
        '--workers 1', {'k10': '--topk 10'},
        plan(MAIN[:2], (0, 1, 2)),
        'All 60,000 training images, for a short time: the teacher has learned from the same images. The store keeps '
        'all epochs, k = 10, codec compact; alpha and temperature are 1.',
        teacher='examples/fashion_mnist/teacher'),
    'probes': Grid(
        '--train-split train[:5000] --epochs 2', f'{STUDENT} --val-split train[55000:] --val-interval 100 --lr 0.001 '
        '--warmup-epochs 0.4 --workers 1', {'5000': '', '1000': '--train-split train[:1000] --epochs 10'},
        plan(PROBES, (0,)), 'How the reduced grid was chosen: 10,000 views a run, and training images to score them.',
        teacher='examples/fashion_mnist/teacher'),
    'smoke': Grid(
        '--train-split train[:40] --epochs 2', f'{SCORE} --val-split test[:20] --batch-size 10 --warmup-epochs 0 '
        '--workers 0', {'k3': '--topk 3'}, plan(SMOKE, (0,)), 'To see that all runs.', 'examples/fashion_mnist',
        'examples/fashion_mnist/teacher'),
}


def run_grid(experiment: Experiment, only: str, jobs: int) -> None:
    """Make all runs of a grid whose name fits, the most important first, `jobs` at a time.

    Raises:
        InputError: No name fits, or runs have failed; the others are done.
    """
    plan = [(row, seed) for row, seed in experiment.grid.plan if fnmatch.fnmatch(f'{row.name}-{seed}', only)]
    if not plan:
        row, seed = experiment.grid.plan[0]
        raise InputError(f'no run of the grid {experiment.name} fits --only {only}; a name is a row and its seed, as '
                         f'in {row.name}-{seed}')
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(experiment.make_run, row, seed) for row, seed in plan]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                try:
                    record = future.result()
                except InputError as error:
                    failed.append(str(error))
                    print(f'error: {error}', file=sys.stderr, flush=True)
                else:
                    print(f'{number}/{len(plan)} {record["run"]}: {record["top1"]:.2f}%, '
                          f'{record["wall_seconds"]:.0f} s', flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            experiment.stop()
            raise
    if failed:
        raise InputError(f'{len(failed)} of {len(plan)} runs failed, as said above; the same command tries them again')


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--grid', choices=GRIDS, default='reduced')
    parser.add_argument('--only', default='*', metavar='PATTERN', help='runs of these names, as in "tiny_vit_5m-*-0"')
    parser.add_argument('--jobs', type=int, default=1, metavar='N', help='runs at a time, of one thread each on a CPU')
    parser.add_argument('--output', type=Path, default=Path('runs/evidence'), help='teacher, stores and runs')
    parser.add_argument('--metrics', type=Path, default=ROOT / 'benchmarks' / 'evidence', help='what they measured')
    parser.add_argument('--table', action='store_true', help='run nothing, print the table of what is finished')
    parser.add_argument('--json', action='store_true', help='run nothing, print a JSON line for each row of the table')
    parser.add_argument('--plot', type=Path, metavar='PNG', help='run nothing, draw what is finished')
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise InputError(f'--jobs is {args.jobs}; expected at least 1')
    grid = GRIDS[args.grid]
    if not (args.table or args.json or args.plot):
        run_grid(Experiment(args.grid, grid, args.output, args.metrics), args.only, args.jobs)
        return
    records = read_records(args.metrics / args.grid)
    if args.table:
        print(table(grid.note, grid.rows, records))
    if args.json:
        for row in summaries(grid.rows, records):
            print(json.dumps({'benchmark': 'evidence', 'grid': args.grid, **row}))
    if args.plot:
        write_atomic(args.plot, plot(grid.rows, records))


if __name__ == '__main__':
    main()
