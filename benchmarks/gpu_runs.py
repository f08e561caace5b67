"""Whole runs on a GPU, as parts of gpu.py: killed and resumed, sharded, and the evidence that there is time for."""

import argparse
import csv
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from evidence_table import read_records
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / 'examples' / 'fashion_mnist'
STUDENT = (
    '--model tiny_vit_5m_224 --batch-size 50 --drop-path 0.1 --model-ema --lr 0.001 --warmup-epochs 1 '
    '--val-interval 10 --crop-pct 1.0 --workers 2 --deterministic --quiet')
TOY_STUDENT = (
    '--model test_efficientnet --batch-size 20 --drop-path 0.1 --model-ema --lr 0.001 --warmup-epochs 1 '
    '--val-interval 10 --val-split test[:20] --workers 0 --deterministic --quiet')
FSDP = {'fsdp_version': 2, 'fsdp_auto_wrap_policy': 'TRANSFORMER_BASED_WRAP'}
Write = Callable[..., None]


def environment(args: argparse.Namespace) -> dict[str, str]:
    """Of programs that are to run on the device of this benchmark."""
    return {**os.environ, **({} if args.device.startswith('cuda') else {'CUDA_VISIBLE_DEVICES': ''})}


def call(args: argparse.Namespace, command: list[str]) -> float:
    """Run a program to its end; returns its seconds."""
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env=environment(args), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f'{" ".join(command)} failed with exit status {done.returncode}: {done.stdout[-600:]}')
    return time.perf_counter() - start


def fill_store(args: argparse.Namespace) -> int:
    """The predictions of the demo's teacher on all views of a few epochs, once for all parts; returns their number."""
    store, epochs = args.scratch / 'store', 2 if args.toy else 4
    if not store.exists():
        call(args, [
            sys.executable, '-m', 'timm_tinyvit.save_logits', '--dataset', str(DATA), '--teacher',
            str(DATA / 'teacher'), '--train-split', 'train[:40]' if args.toy else 'train', '--logits', str(store),
            '--epochs', str(epochs), '--img-size', '32', '--workers', '0' if args.toy else '2', '--quiet'])
    return epochs


def student(args: argparse.Namespace, epochs: int, name: str, *flags: str) -> list[str]:
    """The arguments of a run of the trainer beside the store."""
    return [
        str(ROOT / 'train_distill.py'), '--dataset', str(DATA), '--train-split', 'train[:40]' if args.toy else 'train',
        '--logits', str(args.scratch / 'store'), '--epochs', str(epochs), '--output', str(args.scratch),
        '--experiment', name, *(TOY_STUDENT if args.toy else STUDENT).split(), *flags]


def kill_in_an_epoch(args: argparse.Namespace, command: list[str], run: Path) -> None:
    """Start a run, and kill it as soon as it has a checkpoint from within an epoch."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True)
    try:
        while not any(int(file.stem.rpartition('-')[2]) for file in run.glob('checkpoint-*.pt')):
            if process.poll() is not None:
                raise RuntimeError(f'{" ".join(command)} ended before it could be killed')
            time.sleep(0.02)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def digest(run: Path) -> str:
    """Of a run's last weights and those that were averaged, and of its losses."""
    digest = hashlib.sha256()
    for name in ('last', 'last_ema'):
        digest.update((run / name / 'model.safetensors').read_bytes())
    for row in csv.DictReader((run / 'metrics.csv').open()):
        digest.update(f'{row["loss"]} {row["grad_norm"]}'.encode())
    return digest.hexdigest()


def resume(args: argparse.Namespace, write: Write) -> None:
    """A run with `--deterministic` that was killed and resumed beside one in peace: weights and losses to the bit."""
    epochs = fill_store(args)
    # Half precision needs a gradient scaler, and that a GPU.
    for dtype in ('bfloat16', 'float16') if args.device.startswith('cuda') else ('bfloat16',):
        runs = {name: args.scratch / f'{name}-{dtype}' for name in ('peace', 'killed')}
        peace, killed = (
            [sys.executable, *student(args, epochs, run.name, '--amp-dtype', dtype, '--recovery-interval', '1')]
            for run in runs.values())
        seconds = call(args, peace)
        kill_in_an_epoch(args, killed, runs['killed'])
        call(args, killed)
        identical = digest(runs['peace']) == digest(runs['killed'])
        write(dtype=dtype, epochs=epochs, seconds=round(seconds, 1), identical=identical)
        if not identical:
            raise RuntimeError(f'the run in {dtype} that was killed and resumed has other weights or losses')


def fsdp(args: argparse.Namespace, write: Write) -> None:
    """A run that FSDP2 shards over one process beside one with the whole model: speed and weights."""
    epochs = fill_store(args)
    config = args.scratch / 'fsdp.yaml'
    config.write_text(yaml.safe_dump({
        'compute_environment': 'LOCAL_MACHINE', 'distributed_type': 'FSDP', 'mixed_precision': 'no', 'num_machines': 1,
        'num_processes': 1, 'machine_rank': 0, 'main_process_port': 29577, 'fsdp_config': FSDP}))
    launcher = {'whole': [], 'sharded': [
        '-m', 'accelerate.commands.accelerate_cli', 'launch', '--config_file', str(config)]}
    weights = {}
    for name, launch in launcher.items():
        call(args, [sys.executable, *launch, *student(args, epochs, name)])
        rows = list(csv.DictReader((args.scratch / name / 'metrics.csv').open()))
        weights[name] = load_file(args.scratch / name / 'last' / 'model.safetensors')
        apart = max(
            ((weights[name][key] - value).float().abs().max() / value.float().abs().max().clamp(min=1e-6)).item()
            for key, value in weights['whole'].items() if value.is_floating_point())
        write(
            peer=name, epochs=epochs, images_per_second=round(float(rows[-1]['images_per_second']), 1),
            loss=float(rows[-1]['loss']), largest_relative_difference=apart)


def evidence(args: argparse.Namespace, write: Write) -> None:
    """The full grid of evidence.py for some seconds: what was finished before stays, and the rest goes on next time."""
    grid, metrics = 'smoke' if args.toy else 'full', args.output / 'evidence'
    command = [
        sys.executable, str(ROOT / 'benchmarks' / 'evidence.py'), '--grid', grid, '--metrics', str(metrics.resolve()),
        *(['--output', str(args.scratch / 'evidence'), '--only', 'plain-0'] if args.toy else ['--jobs', '4'])]
    with subprocess.Popen(command, cwd=ROOT, env=environment(args), start_new_session=True) as process:
        # What is stopped keeps a checkpoint.
        try:
            status = process.wait(args.evidence_seconds)
        except subprocess.TimeoutExpired:
            status = 0
            os.killpg(process.pid, signal.SIGTERM)
    if status:
        raise RuntimeError(f'{" ".join(command)} failed with exit status {status}')
    for record in read_records(metrics / grid).values():
        write(**{name: record.get(name) for name in ('grid', 'run', 'seed', 'top1', 'train_seconds')})
