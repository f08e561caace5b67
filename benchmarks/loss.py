"""The loss on sparse targets beside the dense one of the paper's code: time and memory of a forward and backward pass.

    python benchmarks/loss.py
    python benchmarks/loss.py --device cuda --dtypes bfloat16 float32 \\
        --shapes 1024x1000x10 1024x1000x100 128x21841x100 512x21841x100 --json

All begin with student logits [B, C] and the k stored classes of each view, and end with the gradient of the logits.
`dense` does what the paper's trainer does: a dense target of the stored probabilities, the rest of the mass spread over
the other classes, and timm's `SoftTargetCrossEntropy`. `torch` is this package's loss in plain torch, and `triton`, on
an accelerator, the same with its kernels. They run in turns in the same process; a ratio is the median over the turns
of the dense time divided by ours.

Time is that of the processor, all threads together, on a CPU. On an accelerator there are two: `wall`, of passes that
are issued one after the other, so that small ones wait for Python; and `device`, of passes that were all issued while
the device was still busy with something else, which is what the loss costs in a training step whose model keeps the
device behind. Memory is what a pass allocates at its peak beyond its inputs, as torch's allocator (on an accelerator)
or torch's profiler (on a CPU) counts it. `difference` is the largest difference of a gradient from the dense one over
the largest gradient.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from torch.profiler import ProfilerActivity, profile

from timm_tinyvit.base.launch import device_name
from timm_tinyvit.targets.sparse import SparseTargets, _SparseSoftTargetCrossEntropy, sparse_soft_target_cross_entropy

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
CYCLES_PER_SECOND = 2e9  # of an accelerator, about
MAX_QUEUED = 10  # passes; a queue takes some hundred kernels


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtypes', nargs='+', default=['float32'], choices=DTYPES, help='of the student logits')
    parser.add_argument('--shapes', nargs='+', default=['128x21841x100'], metavar='BxCxK', help='views x classes x k')
    parser.add_argument('--turns', type=int, default=15)
    parser.add_argument('--passes', type=int, help='passes in each turn (default: 3 on a CPU, else 50)')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='CPU threads')
    parser.add_argument('--json', action='store_true', help='one JSON line per figure')
    return parser.parse_args()


def dense_loss(logits: torch.Tensor, targets: SparseTargets) -> torch.Tensor:
    """The paper's loss: a dense target of k stored probabilities [B, k], then timm's cross-entropy."""
    num_classes, probs = logits.shape[1], targets.log_probs.exp()
    rest = (1 - probs.sum(dim=1, keepdim=True)) / (num_classes - targets.k)
    target = rest.repeat(1, num_classes).scatter_(1, targets.ids, probs)
    return SoftTargetCrossEntropy()(logits, target)


def torch_loss(logits: torch.Tensor, targets: SparseTargets) -> torch.Tensor:
    """This package's loss without its kernels."""
    return _SparseSoftTargetCrossEntropy.apply(
        logits, targets.ids, targets.log_probs, targets.log_rest, 1., 'mean')


def gradient(loss: Callable, logits: torch.Tensor, targets: SparseTargets) -> torch.Tensor:
    return torch.autograd.grad(loss(logits, targets), logits)[0]


def wall_seconds(step: Callable[[], torch.Tensor], passes: int, device: torch.device) -> float:
    """Seconds of one pass: of the clock on an accelerator, of the processor, all threads together, on a CPU."""
    clock, wait = time.process_time, lambda: None
    if device.type != 'cpu':
        clock, wait = time.perf_counter, partial(torch.accelerator.synchronize, device)
    wait()
    start = clock()
    for _ in range(passes):
        step()
    wait()
    return (clock() - start) / passes


def device_seconds(step: Callable[[], torch.Tensor], passes: int, wall: float) -> float:
    """Seconds of one pass on a CUDA device that never waits for the next kernel to be launched."""
    busy = 0.01 + 2 * passes * wall
    while True:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(busy * CYCLES_PER_SECOND))
        start.record()
        for _ in range(passes):
            step()
        stop.record()
        was_ahead = not start.query()  # all was launched while the device still slept
        torch.cuda.synchronize()
        if was_ahead:
            return start.elapsed_time(stop) / 1e3 / passes
        busy *= 2


def peak_bytes(step: Callable[[], torch.Tensor], device: torch.device) -> int:
    """Most bytes that a pass holds at once beyond what was there before it."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    held = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == '[memory]':
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def measure(args: argparse.Namespace, device: torch.device, shape: tuple[int, int, int], dtype: str) -> list[dict]:
    """The figures of every implementation at one shape and type, the dense one first."""
    batch_size, classes, k = shape
    generator = torch.Generator().manual_seed(0)
    targets = SparseTargets.from_logits(torch.randn(batch_size, classes, generator=generator) * 3, k).to(device)
    student = torch.randn(batch_size, classes, generator=generator).to(device, DTYPES[dtype]).requires_grad_()
    losses = {'dense': dense_loss, 'torch': torch_loss}
    if device.type == 'cuda':
        losses['triton'] = sparse_soft_target_cross_entropy
    steps = {name: partial(gradient, loss, student, targets) for name, loss in losses.items()}
    # These warm up, too: kernels are compiled and memory is allocated.
    gradients = {name: step().float() for name, step in steps.items()}
    largest = gradients['dense'].abs().max()
    differences = {name: ((grad - gradients['dense']).abs().max() / largest).item() for name, grad in gradients.items()}
    del gradients
    memory = {name: peak_bytes(step, device) for name, step in steps.items()}
    passes = args.passes or (3 if device.type == 'cpu' else 50)
    wall: dict[str, list[float]] = {name: [] for name in steps}
    busy: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.turns):
        for name, step in steps.items():
            wall[name].append(wall_seconds(step, passes, device))
            if device.type == 'cuda':
                busy[name].append(device_seconds(step, min(passes, MAX_QUEUED), wall[name][-1]))

    def milliseconds(seconds: list[float]) -> float | None:
        return 1e3 * statistics.median(seconds) if seconds else None

    def ratio(there: list[float], here: list[float]) -> float | None:
        return statistics.median(a / b for a, b in zip(there, here)) if here else None

    return [dict(
        loss=name, dtype=dtype, batch_size=batch_size, classes=classes, k=k,
        wall_ms=milliseconds(wall[name]), device_ms=milliseconds(busy[name]), peak_bytes=memory[name],
        times_as_fast=ratio(wall['dense'], wall[name]), times_as_fast_on_device=ratio(busy['dense'], busy[name]),
        share_of_memory=memory[name] / memory['dense'], difference=differences[name]) for name in steps]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    facts = dict(
        benchmark='loss', machine=device_name(device), threads=args.threads, torch=torch.__version__,
        timm=timm.__version__)
    if not args.json:
        print(f'{facts["machine"]}, {args.threads} CPU threads, torch {torch.__version__}')
    for shape in args.shapes:
        for dtype in args.dtypes:
            figures = measure(args, device, tuple(map(int, shape.split('x'))), dtype)
            if args.json:
                for figure in figures:
                    print(json.dumps(facts | figure), flush=True)
                continue
            print(f'\n{dtype}, {shape} (batch, classes, k)', flush=True)
            for figure in figures:
                line = f'{figure["loss"]:7}{figure["wall_ms"]:9.3f} ms'
                if figure['device_ms'] is not None:
                    line += f' ({figure["device_ms"]:.3f} on the device)'
                line += f'{figure["peak_bytes"] / 2**20:9.1f} MiB'
                if figure['loss'] != 'dense':
                    line += f', {figure["times_as_fast"]:.2f} times as fast'
                    if figure['device_ms'] is not None:
                        line += f' ({figure["times_as_fast_on_device"]:.2f} on the device)'
                    line += (f' with {figure["share_of_memory"]:.2f} of the memory; the gradient differs by '
                             f'{figure["difference"]:.1e} of the largest')
                print(line, flush=True)


if __name__ == '__main__':
    main()
