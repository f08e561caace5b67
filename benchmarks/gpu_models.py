"""The parts of `gpu.py` that measure the models: TinyViT beside timm's class, and ways to make it faster."""

import argparse
import functools
import gc
import multiprocessing
import os
import queue
import re
import statistics
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_kernels
import timm
import torch
import torch.nn.functional as F
from timm.models import tiny_vit as timm_tiny_vit
from torch import nn

import timm_tinyvit  # noqa: F401  registers the models

MODELS = ('tiny_vit_5m_224', 'tiny_vit_11m_224', 'tiny_vit_21m_224')
PEERS = ('timm', 'timm channels-last', 'ours')
COMPILED_VARIANTS = (
    'folded once', 'channels-last, layer norm, pointwise', 'depthwise kernel', 'all kernels, folded once')
TOY = dict(
    embed_dims=(32, 32, 32, 64), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 2), window_sizes=(2, 2, 4, 2))
Run = Callable[[], torch.Tensor]


def batch_size(args: argparse.Namespace, mode: str) -> int:
    return 2 if args.toy else 256 if mode == 'inference' else 128


def image_size(args: argparse.Namespace) -> int:
    return 64 if args.toy else 224


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
    if peer.startswith('timm'):
        return theirs.to(args.device)
    ours = timm.create_model(name, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(args.device)


def create_run(args: argparse.Namespace, name: str, mode: str, peer: str, compiles: bool = False) -> Run:
    """One forward pass, or one training step with fused AdamW, in bfloat16 under autocast; returns the logits."""
    model = gpu_kernels.with_techniques(
        create(args, name, peer).train(mode == 'training'), gpu_kernels.VARIANTS.get(peer, ()))
    torch.manual_seed(0)
    x = torch.randn(batch_size(args, mode), 3, image_size(args), image_size(args), device=args.device)
    if peer == 'timm channels-last':
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    forward = torch.compile(model, backend='aot_eager' if args.toy else 'inductor') if compiles else model
    # Triton's interpreter multiplies bfloat16 as if it were integers
    autocast = functools.partial(torch.autocast, x.device.type, torch.float16 if args.toy else torch.bfloat16)
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


def seconds_of(args: argparse.Namespace, run: Run, seconds: float = 0.2) -> float:
    """Seconds of one call, by CUDA events around as many calls as fit into the time given."""
    synchronize(args)
    start = time.perf_counter()
    run()
    synchronize(args)
    calls = 1 if args.toy else max(3, int(seconds / (time.perf_counter() - start)))
    if not args.device.startswith('cuda'):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(calls):
        run()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3 / calls


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


def compare(
        args: argparse.Namespace, runs: dict[str, Run], write: Callable[..., None], mode: str, **names: Any) -> None:
    """Measure runs in turns, and write one figure for each, with its speed beside every other one's."""
    first: dict[str, torch.Tensor] = {}
    failed: dict[str, str] = {}
    for peer, run in runs.items():  # the first call warms up, and its logits come from the weights as they are created
        try:
            first[peer] = run().float()
            run()
        except Exception as error:  # a technique that this device does not take must not cost the other figures
            failed[peer] = f'{type(error).__name__}: {str(error)[:300]}'
    runs = {peer: run for peer, run in runs.items() if peer in first}
    memory = {peer: peak_memory(args, run) for peer, run in runs.items()}
    times = {peer: [] for peer in runs}
    for _ in range(1 if args.toy else 3):
        for peer, run in runs.items():
            times[peer].append(seconds_of(args, run))
    reference = next(iter(first.values()))
    median = {peer: statistics.median(seconds) for peer, seconds in times.items()}
    for peer in runs:
        write(
            mode=mode, peer=peer, **names, batch_size=batch_size(args, mode),
            images_per_second=round(batch_size(args, mode) / median[peer], 1),
            milliseconds=round(median[peer] * 1e3, 3),
            times_as_fast_as={other: round(median[other] / median[peer], 3) for other in median if other != peer},
            peak_memory=memory[peer],
            difference=((first[peer] - reference).abs().max() / reference.abs().max()).item())
    for peer, error in failed.items():
        write(mode=mode, peer=peer, **names, error=error)


def free(args: argparse.Namespace) -> None:
    gc.collect()
    if args.device.startswith('cuda'):
        torch.cuda.empty_cache()


def models(args: argparse.Namespace, write: Callable[..., None]) -> None:
    """Eager mode: inference and training of each size."""
    for name in MODELS[:1] if args.toy else MODELS:
        for mode in ('inference', 'training'):
            compare(args, {peer: create_run(args, name, mode, peer) for peer in PEERS}, write, mode, model=name)
            free(args)


def kernel_table(args: argparse.Namespace, run: Run, calls: int) -> tuple[str, dict[str, Any]]:
    """The most expensive kernels of a run, the operators by shape as text, and the times in all."""
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
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
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
    lines += ['', profiler.key_averages(group_by_input_shape=True).table(
        sort_by=time_name, row_limit=40, max_name_column_width=60, max_shapes_column_width=90)]
    return '\n'.join(lines) + '\n', figures


def write_profile(args: argparse.Namespace, run: Run, write: Callable[..., None], mode: str, peer: str) -> None:
    """Write the table of a run of TinyViT-5M beside the figures."""
    for _ in range(2):
        run()
    text, figures = kernel_table(args, run, 1 if args.toy else 3)
    Path(args.output, f'profile-{mode}-{re.sub("[^a-z]+", "-", peer)}.txt').write_text(f'{mode}, {peer}: {text}')
    write(model=MODELS[0], mode=mode, peer=peer, batch_size=batch_size(args, mode), **figures)
    free(args)


def profile(args: argparse.Namespace, write: Callable[..., None]) -> None:
    """Eager mode: the most expensive kernels of TinyViT-5M, ours and timm's, and the time on host and device."""
    for mode in ('inference', 'training'):
        for peer in ('ours', 'timm channels-last'):
            write_profile(args, create_run(args, MODELS[0], mode, peer), write, mode, peer)


def ablation(args: argparse.Namespace, write: Callable[..., None]) -> None:
    """Eager mode: TinyViT-5M with one technique after the other; those with kernels of their own come last."""
    variants = gpu_kernels.VARIANTS
    kernels = [variant for variant in variants if set(variants[variant]) & set(gpu_kernels.TRITON)]
    others = [variant for variant in variants if variant not in kernels]
    groups = [
        ('inference', others),
        ('training', [variant for variant in others if not set(variants[variant]) & set(gpu_kernels.INFERENCE_ONLY)]),
    ]
    has_triton = args.device.startswith('cuda') or os.environ.get('TRITON_INTERPRET') == '1'
    if has_triton:
        groups.append(('inference', kernels))
    for mode, group in groups:
        peers = ['timm channels-last', *group]
        compare(args, {peer: create_run(args, MODELS[0], mode, peer) for peer in peers}, write, mode, model=MODELS[0])
        free(args)
    if has_triton:
        write_profile(args, create_run(args, MODELS[0], 'inference', kernels[-1]), write, 'inference', kernels[-1])


def _compile_and_measure(args, case, barrier, lock, results) -> None:
    # a process for each case, so that all are compiled at the same time
    name, mode, peer = case
    run = None
    try:
        start = time.perf_counter()
        run = create_run(args, name, mode, peer, compiles=True)
        run()
        run()
        synchronize(args)
        compile_seconds = time.perf_counter() - start
    except Exception:
        results.put((case, {'error': traceback.format_exc()[-600:]}))
    free(args)
    try:
        barrier.wait(240)
    except threading.BrokenBarrierError:
        pass  # one of the processes died; the figures of the others stand
    if run is None:
        return
    times = []
    for _ in range(1 if args.toy else 3):
        with lock:
            times.append(seconds_of(args, run))
            free(args)
    with lock:
        memory = peak_memory(args, run)
        if name == MODELS[0] and peer in ('ours', PEERS[1]):
            label = f'profile-compiled-{mode}-{peer.replace(" ", "-")}.txt'
            Path(args.output, label).write_text(f'{case}: {kernel_table(args, run, 1 if args.toy else 3)[0]}')
        free(args)
    seconds = statistics.median(times)
    results.put((case, dict(
        batch_size=batch_size(args, mode), images_per_second=round(batch_size(args, mode) / seconds, 1),
        milliseconds=round(seconds * 1e3, 3), peak_memory=memory, compile_seconds=round(compile_seconds, 1))))


def compiled(args: argparse.Namespace, write: Callable[..., None]) -> None:
    """Compiled: every case is compiled at the same time, in a process each; then they take turns on the device."""
    cases = [(MODELS[0], 'inference', peer) for peer in ('ours', PEERS[1])]
    if not args.toy:
        cases += [
            (MODELS[0], 'inference', PEERS[0]),
            *((MODELS[0], 'inference', variant) for variant in COMPILED_VARIANTS),
            *((MODELS[2], 'inference', peer) for peer in (PEERS[1], 'ours')),
            *((MODELS[0], 'training', peer) for peer in (PEERS[1], 'ours', 'channels-last, layer norm, pointwise')),
        ]
    os.environ.setdefault('TORCHINDUCTOR_COMPILE_THREADS', '2')
    context = multiprocessing.get_context('spawn')
    barrier, lock, results = context.Barrier(len(cases)), context.Lock(), context.Queue()
    processes = [
        context.Process(target=_compile_and_measure, args=(args, case, barrier, lock, results)) for case in cases]
    for process in processes:
        process.start()
    figures = {}
    while len(figures) < len(cases):
        alive = any(process.is_alive() for process in processes)
        try:
            case, figure = results.get(timeout=2)
        except queue.Empty:
            if alive:
                continue
            break
        figures[case] = figure
        name, mode, peer = case
        write(model=name, mode=mode, peer=peer, compiled=True, **figure)
    for process in processes:
        process.join()
    for case in cases:
        figures.setdefault(case, {'error': 'the process died'})
    for (name, mode, peer), figure in figures.items():
        for (other_name, other_mode, other), theirs in figures.items():
            if (name, mode) == (other_name, other_mode) and peer != other and not {'error'} & {*figure, *theirs}:
                speed = theirs['milliseconds'] / figure['milliseconds']
                print(f'{name} {mode} compiled: {peer} is {speed:.3f} times as fast as {other}', flush=True)
