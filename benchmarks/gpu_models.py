"""Models on a GPU, as parts of gpu.py: eager and compiled, inference and training, timm's class and this package's."""

import argparse
import functools
import gc
import multiprocessing
import os
import queue
import statistics
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import tiny_vit as timm_tiny_vit
from timm.utils import reparameterize_model
from torch import nn

import timm_tinyvit  # noqa: F401  registers the models

# With their pixels and how many images are looked at, and learned from, at a time.
MODELS = {
    'tiny_vit_5m_224': (224, 256, 128), 'tiny_vit_11m_224': (224, 256, 128), 'tiny_vit_21m_224': (224, 256, 128),
    'tiny_vit_21m_384': (384, 128, 48), 'tiny_vit_21m_512': (512, 64, 24)}
SMALLEST = 'tiny_vit_5m_224'
PEERS = ('timm', 'timm channels-last', 'ours')
COMPILED = (
    ('inference', 'timm channels-last'), ('inference', 'ours'), ('inference', 'ours folded'),
    ('training', 'timm channels-last'), ('training', 'ours'))
TOY = dict(embed_dims=(32, 32, 32, 64), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 2), window_sizes=(2, 2, 4, 2))
Run = Callable[[], torch.Tensor]
Write = Callable[..., None]


def batch_size(args: argparse.Namespace, name: str, mode: str) -> int:
    return 2 if args.toy else MODELS[name][1 if mode == 'inference' else 2]


def create(args: argparse.Namespace, name: str, peer: str) -> nn.Module:
    """A model with random weights in which every batch norm has something to do: the same for each peer."""
    torch.manual_seed(0)
    kwargs = dict(drop_path_rate=0., **(TOY if args.toy else {}))
    theirs = getattr(timm_tiny_vit, name)(pretrained_cfg_overlay=dict(num_classes=1000), **kwargs)
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
    if peer == 'timm':
        return theirs.to(args.device)
    if peer == 'timm channels-last':
        return theirs.to(args.device, memory_format=torch.channels_last)
    ours = timm.create_model(name, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return (reparameterize_model(ours.eval()) if peer == 'ours folded' else ours).to(args.device)


def create_run(args: argparse.Namespace, name: str, mode: str, peer: str, compiles: bool = False) -> Run:
    """One forward pass, or one training step with fused AdamW, in bfloat16 under autocast; returns the logits."""
    model = create(args, name, peer).train(mode == 'training')
    torch.manual_seed(0)
    size = 64 if args.toy else MODELS[name][0]
    x = torch.randn(batch_size(args, name, mode), 3, size, size, device=args.device)
    if peer == 'timm channels-last':
        x = x.contiguous(memory_format=torch.channels_last)
    forward = torch.compile(model, backend='aot_eager' if args.toy else 'inductor') if compiles else model
    autocast = functools.partial(torch.autocast, x.device.type, torch.bfloat16)
    if mode == 'inference':
        def infer() -> torch.Tensor:
            with torch.inference_mode(), autocast():
                return forward(x)

        return infer

    target = torch.randint(0, 1000, (x.shape[0],), device=args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with autocast():
            logits = forward(x)
        F.cross_entropy(logits.float(), target).backward()
        optimizer.step()
        return logits.detach()

    return step


def synchronize(args: argparse.Namespace) -> None:
    if args.device.startswith('cuda'):
        torch.cuda.synchronize()


def free(args: argparse.Namespace) -> None:
    gc.collect()
    if args.device.startswith('cuda'):
        torch.cuda.empty_cache()


def seconds_of(args: argparse.Namespace, run: Run, seconds: float = 0.2) -> float:
    """Seconds of one call, with as many calls in a row as fit into the time given."""
    synchronize(args)
    start = time.perf_counter()
    run()
    synchronize(args)
    calls = 1 if args.toy else max(3, int(seconds / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(args)
    return (time.perf_counter() - start) / calls


def peak_memory(args: argparse.Namespace, run: Run) -> int | None:
    """Bytes that one call takes on the device beyond what lay there before it."""
    if not args.device.startswith('cuda'):
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def figure_of(
        args: argparse.Namespace,
        name: str,
        mode: str,
        seconds: list[float],
        memory: int | None,
) -> dict[str, Any]:
    """The figure of one peer, from its turns."""
    median, size = statistics.median(seconds), batch_size(args, name, mode)
    return dict(
        batch_size=size, images_per_second=round(size / median, 1), milliseconds=round(median * 1e3, 3),
        peak_memory=memory)


def models(args: argparse.Namespace, write: Write) -> None:
    """Eager mode: the peers take turns; the difference is that of the first logits from timm's."""
    for name in args.models or ([SMALLEST] if args.toy else MODELS):
        for mode in ('inference', 'training'):
            runs = {peer: create_run(args, name, mode, peer) for peer in PEERS}
            first = {peer: run().float() for peer, run in runs.items()}
            memory = {peer: peak_memory(args, run) for peer, run in runs.items()}
            times = {peer: [] for peer in PEERS}
            for _ in range(1 if args.toy else 3):
                for peer, run in runs.items():
                    times[peer].append(seconds_of(args, run))
            speed = {peer: 1 / statistics.median(seconds) for peer, seconds in times.items()}
            theirs = first['timm']
            for peer in PEERS:
                write(
                    model=name, mode=mode, peer=peer, **figure_of(args, name, mode, times[peer], memory[peer]),
                    times_timm=round(speed[peer] / speed['timm'], 3),
                    times_timm_channels_last=round(speed[peer] / speed['timm channels-last'], 3),
                    difference=((first[peer] - theirs).abs().max() / theirs.abs().max()).item())
            del runs, run
            free(args)


def kernel_table(args: argparse.Namespace, run: Run, calls: int) -> tuple[str, dict[str, Any]]:
    """The most expensive kernels of a run as text, and the times in all."""
    synchronize(args)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    host = time.perf_counter() - start  # until the last kernel is queued
    synchronize(args)
    wall = time.perf_counter() - start
    on_device = args.device.startswith('cuda')
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_device else []
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(calls):
            run()
        synchronize(args)
    time_name = 'self_device_time_total' if on_device else 'self_cpu_time_total'
    kernels = sorted(
        (
            (getattr(event, time_name) / 1e3 / calls, event.count // calls, event.key)
            for event in profiler.key_averages()
            if event.device_type.name == ('CUDA' if on_device else 'CPU') and not event.is_user_annotation
        ),
        reverse=True)
    total = sum(milliseconds for milliseconds, _, _ in kernels)
    figures = dict(
        host_milliseconds=round(host / calls * 1e3, 2), milliseconds=round(wall / calls * 1e3, 2),
        kernel_milliseconds=round(total, 2), num_kernels=sum(count for _, count, _ in kernels))
    lines = [', '.join(f'{name} {value}' for name, value in figures.items()), '', '      ms   share  calls  kernel']
    lines += [
        f'{milliseconds:8.3f}  {milliseconds / total:6.1%}  {count:5}  {name[:150]}'
        for milliseconds, count, name in kernels[:25]
    ]
    return '\n'.join(lines) + '\n', figures


def profile(args: argparse.Namespace, write: Write) -> None:
    """Eager mode: the most expensive kernels of TinyViT-5M, ours and timm's, and the time on host and device."""
    for mode in ('inference', 'training'):
        for peer in PEERS[1:]:
            run = create_run(args, SMALLEST, mode, peer)
            for _ in range(2):
                run()
            text, figures = kernel_table(args, run, 1 if args.toy else 3)
            file = args.output / f'profile-{mode}-{peer.replace(" ", "-")}.txt'
            file.write_text(f'{mode}, {peer}: {text}')
            write(model=SMALLEST, mode=mode, peer=peer, batch_size=batch_size(args, SMALLEST, mode), **figures)
            del run
            free(args)


def _compile_and_measure(args, case, barrier, lock, results) -> None:
    # a process for each case, so that all are compiled at the same time
    name, mode, peer = case
    run = None
    try:
        start = time.perf_counter()
        run = create_run(args, name, mode, peer, compiles=True)
        for _ in range(2):
            run()
        synchronize(args)
        compile_seconds = time.perf_counter() - start
    except Exception:
        results.put((case, {'error': traceback.format_exc()[-600:]}))
    free(args)
    try:
        barrier.wait(args.compile_seconds)  # measure when nobody compiles any more
    except threading.BrokenBarrierError:
        pass  # one of the processes died or took too long; the figures of the others stand
    if run is None:
        return
    times = []
    for _ in range(1 if args.toy else 3):
        with lock:
            times.append(seconds_of(args, run))
    with lock:
        memory = peak_memory(args, run)
    results.put((case, {**figure_of(args, name, mode, times, memory), 'compile_seconds': round(compile_seconds, 1)}))


def compiled(args: argparse.Namespace, write: Write) -> None:
    """Every case is compiled at the same time, in a process each; then they take turns on the device."""
    os.environ.setdefault('TORCHINDUCTOR_COMPILE_THREADS', '2')
    cases = [
        (name, *case) for name in args.models or [SMALLEST] for case in (COMPILED[1:2] if args.toy else COMPILED)]
    context = multiprocessing.get_context('spawn')
    barrier, lock, results = context.Barrier(len(cases)), context.Lock(), context.Queue()
    processes = [
        context.Process(target=_compile_and_measure, args=(args, case, barrier, lock, results), daemon=True)
        for case in cases
    ]
    for process in processes:
        process.start()
    left = set(cases)
    while left:
        alive = any(process.is_alive() for process in processes)
        try:
            case, figure = results.get(timeout=2)
        except queue.Empty:
            if alive:
                continue
            break
        left.remove(case)
        write(model=case[0], mode=case[1], peer=case[2], compiled=True, **figure)
    for name, mode, peer in left:
        write(model=name, mode=mode, peer=peer, compiled=True, error='the process died')
    for process in processes:
        process.join()
