"""Figures of a GPU, in parts that run alone; each figure is one JSON line, written at once.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --part models compiled --models tiny_vit_5m_224 --output runs/gpu
    python benchmarks/gpu.py --toy --device cpu --output runs/toy

Parts, in the order in which they run without `--part`:
- `models`: 5M, 11M and 21M in eager mode beside timm's class: images/s and peak memory, inference and training.
- `step`: a training step with and without the guard against losses that are not finite, by `step_flags.py`.
- `loss`: the loss on sparse targets beside the dense one, by `loss.py`.
- `profile`: the most expensive kernels of TinyViT-5M and its time on host and device, ours and timm's, as text.
- `compiled`: TinyViT-5M under `torch.compile`, inference and training.

Models run in bfloat16 under autocast at 224 pixels, inference with 256 images and training with 128. The results go to
`benchmarks/results/<device>/<part>.jsonl`, which a new run overwrites. `--toy` makes everything so small that a CPU
runs it in a test; its figures mean nothing.
"""

import argparse
import json
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from gpu_models import MODELS, Write, compiled, models, profile

from timm_tinyvit.base.launch import device_name

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


def step(args: argparse.Namespace, write: Write) -> None:
    """Training steps without a guard against losses that are not finite, with it, and with one that waits."""
    sizes = ['--turns', '1', '--steps', '1', '--batch-size', '2', '--img-size', '32'] if args.toy else \
        ['--turns', '5', '--steps', '10']
    run_script(write, 'step_flags.py', '--device', args.device, '--dtype', 'bfloat16', *sizes)


PARTS = {'models': models, 'step': step, 'loss': loss, 'profile': profile, 'compiled': compiled}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--part', nargs='+', default=list(PARTS), choices=PARTS, metavar='PART', dest='parts')
    parser.add_argument('--models', nargs='+', default=MODELS, choices=MODELS, metavar='MODEL', help='of `models`')
    parser.add_argument('--output', type=Path, help='folder of the results; benchmarks/results/<device> by default')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--compile-seconds', type=float, default=240, help='most that a compiled case waits for the others')
    parser.add_argument('--toy', action='store_true', help='tiny batches and images, to test the benchmark itself')
    args = parser.parse_args(argv)
    if args.output is None:
        args.output = FOLDER / 'results' / re.sub(r'\W+', '-', device_name(torch.device(args.device)).lower())
    return args


@contextmanager
def writer(path: Path, **constants: Any) -> Iterator[Write]:
    """A function that writes and prints one figure, given by name, as one JSON line."""
    with path.open('w') as file:
        def write(**figure: Any) -> None:
            line = json.dumps({**figure, **constants})
            print(line, flush=True)
            file.write(line + '\n')
            file.flush()

        yield write


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    where = dict(device=device_name(torch.device(args.device)), torch=torch.__version__, timm=timm.__version__)
    failed = []
    for name in args.parts:
        start = time.perf_counter()
        with writer(args.output / f'{name}.jsonl', part=name, **where) as write:
            try:
                PARTS[name](args, write)
            except Exception:  # a part that fails must not cost the others
                traceback.print_exc()
                failed.append(name)
        print(f'{name}: {time.perf_counter() - start:.0f} s', flush=True)
    if failed:
        raise SystemExit(f'Failed: {", ".join(failed)}.')


if __name__ == '__main__':
    main()
