"""The loss on sparse targets beside the dense one of the paper's code: time and memory of a forward and backward pass.

    python benchmarks/loss.py
    python benchmarks/loss.py --device cuda --dtype bfloat16 --json

Both begin with student logits [B, C] and the k stored classes of each view, and end with the gradient of the logits.
The peer does what the paper's trainer does: a dense target of the stored probabilities, the rest of the mass spread
over the other classes, and timm's `SoftTargetCrossEntropy`. They run in turns in the same process; a ratio is the
median over the turns of the peer's time divided by ours. Memory is what a pass allocates at its peak beyond its inputs,
as torch's allocator (on an accelerator) or torch's profiler (on a CPU) counts it. `difference` is the largest
difference of the two gradients over the largest gradient.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from torch.profiler import ProfilerActivity, profile

from timm_tinyvit.targets.sparse import SparseTargets, sparse_soft_target_cross_entropy

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', default='float32', choices=DTYPES, help='of the student logits')
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--classes', type=int, default=21841)
    parser.add_argument('--k', type=int, default=100)
    parser.add_argument('--turns', type=int, default=15)
    parser.add_argument('--passes', type=int, default=3, help='passes in each turn')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='CPU threads')
    parser.add_argument('--json', action='store_true', help='one JSON line per figure')
    return parser.parse_args()


def official_loss(logits: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """The paper's loss: a dense target of k stored probabilities [B, k], then timm's cross-entropy."""
    num_classes = logits.shape[1]
    rest = (1 - probs.sum(dim=1, keepdim=True)) / (num_classes - ids.shape[1])
    target = rest.repeat(1, num_classes).scatter_(1, ids, probs)
    return SoftTargetCrossEntropy()(logits, target)


def synchronise(device: torch.device) -> None:
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def seconds(step: Callable[[], torch.Tensor], passes: int, device: torch.device) -> float:
    """Seconds of one pass: of the clock on an accelerator, of the processor, all threads together, on a CPU."""
    clock = time.process_time if device.type == 'cpu' else time.perf_counter
    synchronise(device)
    start = clock()
    for _ in range(passes):
        step()
    synchronise(device)
    return (clock() - start) / passes


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


def machine(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    cpuinfo = Path('/proc/cpuinfo')
    names = [line.split(':')[1].strip() for line in cpuinfo.read_text().splitlines() if 'model name' in line] \
        if cpuinfo.exists() else []
    return names[0] if names else platform.machine()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(args.batch_size, args.classes, generator=generator) * 3
    targets = SparseTargets.from_logits(teacher, args.k).to(device)
    ids, probs = targets.ids, targets.log_probs.exp()
    student = torch.randn(args.batch_size, args.classes, generator=generator).to(device, DTYPES[args.dtype])
    student.requires_grad_()

    def dense() -> torch.Tensor:
        return torch.autograd.grad(official_loss(student, ids, probs), student)[0]

    def sparse() -> torch.Tensor:
        loss = sparse_soft_target_cross_entropy(student, targets)
        return torch.autograd.grad(loss, student)[0]

    there, here = dense().float(), sparse().float()
    difference = ((there - here).abs().max() / there.abs().max()).item()
    memory = {name: peak_bytes(step, device) for name, step in (('dense', dense), ('sparse', sparse))}
    times: dict[str, list[float]] = {'dense': [], 'sparse': []}
    for _ in range(args.turns):
        for name, step in (('dense', dense), ('sparse', sparse)):
            times[name].append(seconds(step, args.passes, device))
    ratio = statistics.median(a / b for a, b in zip(times['dense'], times['sparse']))
    figure = dict(
        benchmark='loss', machine=machine(device), threads=args.threads, torch=torch.__version__, timm=timm.__version__,
        dtype=args.dtype, batch_size=args.batch_size, classes=args.classes, k=args.k,
        dense_ms=1e3 * statistics.median(times['dense']), sparse_ms=1e3 * statistics.median(times['sparse']),
        times_as_fast=ratio, dense_bytes=memory['dense'], sparse_bytes=memory['sparse'],
        share_of_memory=memory['sparse'] / memory['dense'], difference=difference)
    if args.json:
        print(json.dumps(figure))
        return
    print(
        f'{figure["machine"]}, {args.threads} CPU threads, torch {torch.__version__}; {args.dtype}, batch '
        f'{args.batch_size}, {args.classes:,} classes, k = {args.k}\n'
        f'dense   {figure["dense_ms"]:8.2f} ms  {memory["dense"] / 2**20:7.1f} MiB\n'
        f'sparse  {figure["sparse_ms"]:8.2f} ms  {memory["sparse"] / 2**20:7.1f} MiB\n'
        f'{ratio:.2f} times as fast with {figure["share_of_memory"]:.2f} of the memory; gradients differ by '
        f'{difference:.1e} of the largest')


if __name__ == '__main__':
    main()
