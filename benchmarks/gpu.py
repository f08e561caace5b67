"""Figures of a GPU, in parts that run alone; each figure is one JSON line, written at once.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --part models compiled --models tiny_vit_5m_224 --output runs/gpu
    python benchmarks/gpu.py --toy --device cpu --output runs/toy
    python benchmarks/gpu.py --table --output benchmarks/results/nvidia-h200

Parts, in the order in which they run without `--part`:
- `models`: the models in eager mode beside timm's class: images/s and peak memory, inference and training.
- `compiled`: the same under `torch.compile`; TinyViT-5M alone unless `--models` names others.
- `loss`: the loss on sparse targets beside the dense one, by `loss.py`.
- `decode`: records of each codec decoded on the device, and on the host.
- `guard`: a training step with and without the guard against losses that are not finite, by `step_flags.py`.
- `step`: a training step from a store beside labels only and beside timm's `LogitDistillationTask`, by `epoch_cost.py`.
- `resume`: a run that is killed and resumed beside one in peace, with `--deterministic`, to the bit.
- `fsdp`: a run that FSDP2 shards over one process beside one with the whole model.
- `loader`: views/s of the loader with all cores of the machine, on JPEGs of 500x375.
- `profile`: the most expensive kernels of TinyViT-5M and its time on host and device, ours and timm's, as text.
- `evidence`: the full grid of `evidence.py`, as far as it comes in `--evidence-seconds`.

Models run in bfloat16 under autocast. The results go to `benchmarks/results/<device>/<part>.jsonl`, which a new run of
the part overwrites; `--skip-finished` leaves parts alone that have ended there, so that a run that was cut short goes
on. `--table` runs nothing and prints the tables of docs/results.md. `--toy` makes everything so small that a CPU runs
it in a test; its figures mean nothing.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from gpu_models import MODELS, Write, compiled, models, profile, seconds_of
from gpu_runs import DATA, evidence, fsdp, resume
from gpu_table import tables
from pipeline import make_small_images, replayed
from PIL import Image

from timm_tinyvit.base.launch import device_name
from timm_tinyvit.targets import FeatureTargets, SparseTargets
from timm_tinyvit.targets.codecs import codecs, create_codec, create_feature_codec, feature_codecs

FOLDER = Path(__file__).parent
LOSS_SHAPES = ('1024x1000x10', '1024x1000x100', '128x21841x100', '512x21841x100')  # views x classes x k


def run_script(write: Write, name: str, *flags: str) -> None:
    """Run another benchmark and take over the figures that it prints, each as soon as it is there."""
    command = [sys.executable, str(FOLDER / name), '--json', *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            write(**json.loads(line))
    if process.returncode:
        raise RuntimeError(f'{" ".join(command)} failed with exit status {process.returncode}.')


def loss(args: argparse.Namespace, write: Write) -> None:
    """The loss on sparse targets beside the dense one, in bfloat16 and float32."""
    sizes = ['--turns', '1'] if args.toy else []
    run_script(
        write, 'loss.py', '--device', args.device, '--dtypes', 'bfloat16', 'float32',
        '--shapes', *(['4x50x5'] if args.toy else LOSS_SHAPES), *sizes)


def guard(args: argparse.Namespace, write: Write) -> None:
    """Training steps without a guard against losses that are not finite, with it, and with one that waits."""
    sizes = ['--turns', '1', '--steps', '1', '--batch-size', '2', '--img-size', '32'] if args.toy else \
        ['--turns', '5', '--steps', '10']
    run_script(write, 'step_flags.py', '--device', args.device, '--dtype', 'bfloat16', *sizes)


def step(args: argparse.Namespace, write: Write) -> None:
    """Training steps from a store, from labels, and with a teacher in the loop, with the loader beside them."""
    sizes = [
        '--turns', '2', '--steps', '1', '--batch-size', '2', '--img-size', '32', '--workers', '1', '--teachers',
        'test_convnext', '--online-turns', '1',
    ] if args.toy else [
        '--turns', '12', '--steps', '10', '--batch-size', '128', '--workers', str(os.cpu_count()), '--teachers',
        'convnext_large', '--online-turns', '4', '--control']
    run_script(write, 'epoch_cost.py', '--dataset', str(DATA), '--device', args.device, '--amp', *sizes)


def decode(args: argparse.Namespace, write: Write) -> None:
    """Records decoded where the student is, and on the host."""
    size = 8 if args.toy else 1024
    generator = torch.Generator().manual_seed(0)
    targets = {
        (name, f'k = {k} of {num_classes:,}'): (create_codec(name, num_classes, k), SparseTargets.from_logits(
            4 * torch.randn(size, num_classes, generator=generator), k))
        for name in codecs() for num_classes, k in ((1000, 10), (1000, 100), (21841, 100))}
    targets |= {
        (name, f'D = {dim}, {cells} cell(s)'): (create_feature_codec(name, dim, grid), FeatureTargets(
            torch.randn(size, cells, dim, generator=generator)))
        for name in feature_codecs() for dim, grid, cells in ((768, 0, 1), (256, 7, 49))}
    for (name, shape), (codec, of_views) in targets.items():
        records = torch.from_numpy(np.ascontiguousarray(codec.encode(of_views)))
        on_device = seconds_of(args, partial(codec.decode, records.to(args.device)))
        on_host = seconds_of(args, partial(codec.decode, records))
        write(
            codec=name, shape=shape, batch_size=size, bytes_per_view=records.shape[1],
            milliseconds=round(1e3 * on_device, 3), milliseconds_on_host=round(1e3 * on_host, 3),
            views_per_second=round(size / on_device))


def loader(args: argparse.Namespace, write: Write) -> None:
    """Views per second of the clock with a process on each core, of JPEGs drawn for the purpose."""
    workers, count, turns = (1, 16, 1) if args.toy else (os.cpu_count(), 1024, 3)
    source, folder, draws = args.scratch / 'drawn', args.scratch / 'jpegs', np.random.default_rng(0)
    source.mkdir()
    for number in range(8):
        smooth = Image.fromarray(draws.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((1200, 900), Image.BICUBIC)
        pixels = np.asarray(smooth) + draws.normal(0, 8, (900, 1200, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(source / f'{number}.png')
    make_small_images(source, folder, count)
    for file in [] if args.toy else list(folder.rglob('*.jpg')):
        for copy in range(7):
            file.with_stem(f'{file.stem}-{copy}').hardlink_to(file)
    kilobytes = np.mean([file.stat().st_size for file in folder.rglob('*.jpg')]) / 1e3
    for decoder in ('pillow', 'torch'):
        for views_per_image in (1, 4):
            rates = []
            for _ in range(turns):
                start, views = time.perf_counter(), 0
                for batch in replayed(decoder, views_per_image, folder, 16 if args.toy else 128, workers):
                    views += len(batch)
                rates.append(views / (time.perf_counter() - start))
            write(
                decoder=decoder, views_per_image=views_per_image, workers=workers, mean_kilobytes=round(kilobytes, 1),
                views_per_second=round(max(rates), 1))


PARTS = {
    'models': models, 'compiled': compiled, 'loss': loss, 'decode': decode, 'guard': guard, 'step': step,
    'resume': resume, 'fsdp': fsdp, 'loader': loader, 'profile': profile, 'evidence': evidence}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--part', nargs='+', default=list(PARTS), choices=PARTS, metavar='PART', dest='parts')
    parser.add_argument('--models', nargs='+', choices=MODELS, metavar='MODEL', help='of `models`, `compiled`')
    parser.add_argument('--output', type=Path, help='folder of the results; benchmarks/results/<device> by default')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--compile-seconds', type=float, default=240, help='most that a compiled case waits for the others')
    parser.add_argument(
        '--evidence-seconds', type=float, default=60, help='for the full grid of evidence.py, which goes on from there')
    parser.add_argument('--skip-finished', action='store_true', help='leave parts alone whose figures are all there')
    parser.add_argument('--table', action='store_true', help='run nothing, print the tables of what is in --output')
    parser.add_argument('--toy', action='store_true', help='tiny batches and images, to test the benchmark itself')
    args = parser.parse_args(argv)
    if args.output is None:
        args.output = FOLDER / 'results' / re.sub(r'\W+', '-', device_name(args.device).lower())
    return args


@contextmanager
def writer(path: Path, **constants: Any) -> Iterator[Write]:
    """A function that writes and prints one figure, given by name, as one JSON line; a last line ends what is whole."""
    with path.open('w') as file:
        def write(**figure: Any) -> None:
            line = json.dumps({**figure, **constants})
            print(line, flush=True)
            file.write(line + '\n')
            file.flush()

        start = time.perf_counter()
        yield write
        write(seconds=round(time.perf_counter() - start, 1), finished=True)


def is_finished(path: Path) -> bool:
    return path.exists() and '"finished": true' in path.read_text()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.table:
        print(tables(args.output))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    where = dict(device=device_name(args.device), torch=torch.__version__, timm=timm.__version__)
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        args.scratch = Path(scratch)
        for name in args.parts:
            path = args.output / f'{name}.jsonl'
            if args.skip_finished and is_finished(path):
                continue
            try:
                with writer(path, part=name, **where) as write:
                    PARTS[name](args, write)
            except Exception:  # a part that fails must not cost the others
                traceback.print_exc()
                failed.append(name)
    if failed:
        raise SystemExit(f'error: these parts failed, as said above: {", ".join(failed)}')


if __name__ == '__main__':
    main()
