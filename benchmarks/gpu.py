"""Figures of a GPU, in parts that run alone; each figure is one JSON line, written at once.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --part ablation profile --output runs/gpu
    python benchmarks/gpu.py --part models --toy --device cpu --output runs/toy

Parts, in the order in which they run without `--part`:
- `profile`: the most expensive kernels of TinyViT-5M and its time on host and device, ours and timm's, as text.
- `models`: 5M, 11M and 21M in eager mode beside timm's class: images/s and peak memory, inference and training.
- `ablation`: TinyViT-5M in eager mode with each technique of `gpu_kernels.py`, inference and training.
- `compiled`: 5M and 21M in inference and 5M in training under `torch.compile`, with some of the techniques.

Models run in bfloat16 under autocast at 224 pixels, inference with 256 images and training with 128. The results go to
`benchmarks/results/<device>/<part>.jsonl`, which a new run overwrites. `--toy` makes everything so small that a CPU
runs it in a test; its figures mean nothing.
"""

import argparse
import json
import platform
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_models
import timm
import torch

PARTS = {
    'profile': gpu_models.profile,
    'models': gpu_models.models,
    'ablation': gpu_models.ablation,
    'compiled': gpu_models.compiled,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--part', nargs='+', default=list(PARTS), choices=PARTS, metavar='PART', dest='parts')
    parser.add_argument('--output', type=Path, help='folder of the results; benchmarks/results/<device> by default')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--toy', action='store_true', help='tiny batches and images, to test the benchmark itself')
    args = parser.parse_args(argv)
    if args.output is None:
        args.output = Path(__file__).parent / 'results' / re.sub(r'\W+', '-', device_name(args.device).lower())
    return args


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith('cuda') else platform.processor() or 'cpu'


@contextmanager
def writer(path: Path, **constants: Any) -> Iterator[Callable[..., None]]:
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
    where = dict(device=device_name(args.device), torch=torch.__version__, timm=timm.__version__)
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
