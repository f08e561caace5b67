"""Speed and memory of the store beside the reader and the writer of the paper's code.

    python benchmarks/store.py --cream PATH/TO/Cream
    python benchmarks/store.py --samples 1000000 --json

Makes a store of the size of ImageNet-22k in a temporary folder, which is removed: real shards with checksums, filled
with the records of 4,096 targets over and over (4 GB for two epochs at k = 100), and with `--cream` (a checkout of
microsoft/Cream) one of 500,000 samples with the paper's writer. Everything is then measured in processes of their own.

Reading is of random batches of 256 from the page cache, in turns with the paper's reader; rates are records per second
of CPU time, user and system, of all processes involved, the median of the turns. `decoded` is reading, checking and
decoding in numpy, against the paper's reader as it is, and again with what its data set does to the bytes. Writing is
from top-k tensors in batches of 1,024 to synced files with a checksum, against the paper's writer fed with ready bytes.
Memory is RssAnon, which leaves out the page cache that maps show, above what the imports take; that of the paper's keys
is extrapolated to all samples.

On two cores the default takes 4 minutes.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Any
from collections.abc import Callable

import numpy as np
import torch

from timm_tinyvit.base.launch import device_name
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.store.manifest import Manifest
from timm_tinyvit.targets.codecs import create_codec
from timm_tinyvit.targets.sparse import SparseTargets

BATCH = 256
WRITE_BATCH = 1024
SHARD_SIZE = 16384
EPOCHS = 2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--cream', metavar='PATH', help='checkout of microsoft/Cream, to measure its reader and writer')
    parser.add_argument('--samples', type=int, default=14_200_000)
    parser.add_argument('--official-keys', type=int, default=500_000, help='samples in the store of the paper\'s code')
    parser.add_argument('--classes', type=int, default=1000)
    parser.add_argument('--k', type=int, default=100)
    parser.add_argument('--codec', default='compact')
    parser.add_argument('--turns', type=int, default=7)
    parser.add_argument('--folder', help='where the temporary folder is made')
    parser.add_argument('--json', action='store_true', help='one JSON line per figure')
    return parser.parse_args()


def make_targets(args: argparse.Namespace) -> SparseTargets:
    """Targets of made logits, some sure of a class and some not."""
    generator = torch.Generator().manual_seed(0)
    scale = 0.5 + 3 * torch.rand(4096, 1, generator=generator)
    return SparseTargets.from_logits(scale * torch.randn(4096, args.classes, generator=generator), args.k)


def part_of(targets: SparseTargets, start: int) -> SparseTargets:
    rows = slice(start, start + WRITE_BATCH)
    return SparseTargets(
        targets.ids[rows], targets.log_probs[rows], targets.log_rest[rows], targets.num_classes)


def make_store(args: argparse.Namespace, path: Path, num_samples: int, epochs: int) -> LogitStore:
    codec = create_codec(args.codec, args.classes, args.k)
    return LogitStore.create(path, Manifest(
        num_samples=num_samples, num_classes=args.classes, k=args.k, record_width=codec.width, epochs=epochs, seed=0,
        shard_size=SHARD_SIZE, codec=codec.name))


def fill(args: argparse.Namespace, path: Path) -> None:
    store = make_store(args, path, args.samples, EPOCHS)
    records = np.tile(store.codec.encode(make_targets(args)), (SHARD_SIZE // 4096, 1))
    for epoch, shard in store.missing(range(EPOCHS)):
        store.write_shard(epoch, shard, records[:store.manifest.shard_rows(shard)])


def official_manager(args: argparse.Namespace, path: Path) -> Any:
    """The paper's reader and writer, loaded from their file alone."""
    places = ['data/augmentation/manager.py', 'TinyViT/data/augmentation/manager.py']
    file = next((Path(args.cream, place) for place in places if Path(args.cream, place).is_file()), None)
    if file is None:
        raise SystemExit(f'error: there is no {places[1]} in {args.cream}; give --cream a checkout of microsoft/Cream')
    spec = importlib.util.spec_from_file_location('manager', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TxtManager(str(path), official_width(args), 0)


def official_width(args: argparse.Namespace) -> int:
    return 4 * args.k + 4


def official_key(sample: int) -> str:
    """A key like those of ImageNet-22k."""
    return f'n{10_000_000 + sample // 1000}/n{10_000_000 + sample // 1000}_{sample}.JPEG'


def write_official(args: argparse.Namespace, path: Path, num_samples: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, (4096, official_width(args)), dtype=np.uint8)
    values = [value.tobytes() for value in values]
    # Its writing process finds the paper's module only where it is a copy of this one.
    set_start_method('fork', force=True)
    manager = official_manager(args, path)
    for sample in range(num_samples):
        manager.write(official_key(sample), values[sample % len(values)])
    # Waits for the writing process.
    manager.writer.__del__()
    manager.writer.worker = None


def private_bytes() -> int:
    """Memory of this process that is no file's; by the resident size where the system does not tell."""
    status = Path('/proc/self/status')
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith('RssAnon'))


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def rate(function: Callable[[], int]) -> float:
    """Records per CPU second."""
    start = cpu_seconds()
    records = function()
    return records / (cpu_seconds() - start)


def measure_open(args: argparse.Namespace, path: Path) -> dict[str, float]:
    """Seconds to open the store, to see that its first epoch is complete, and to check its files."""
    start = time.perf_counter()
    store = LogitStore.open(path)
    assert not store.missing([0])
    opened = time.perf_counter()
    store.check_files([0])
    return dict(open_seconds=opened - start, check_files_seconds=time.perf_counter() - opened)


def measure_memory(args: argparse.Namespace, path: Path) -> dict[str, float]:
    """Private memory after reading from all shards of one epoch, and of another, in MB above the imports."""
    picks = np.random.default_rng(0)
    before = private_bytes()
    store = LogitStore.open(path)
    store.missing(range(EPOCHS))
    store.check_files(range(EPOCHS))
    megabytes, seconds = [], []
    for epoch in range(EPOCHS):
        start = cpu_seconds()
        store.read(epoch, range(0, args.samples, SHARD_SIZE))
        seconds.append(cpu_seconds() - start)
        for _ in range(4000):
            store.read(epoch, picks.integers(args.samples, size=BATCH))
        megabytes.append((private_bytes() - before) / 1e6)
    return dict(private_mb=megabytes, checksum_seconds_per_epoch=statistics.median(seconds))


def measure_official_memory(args: argparse.Namespace, path: Path) -> dict[str, float]:
    before = private_bytes()
    manager = official_manager(args, path)
    manager.read(official_key(args.official_keys - 1))
    megabytes = (private_bytes() - before) / 1e6
    return dict(private_mb=megabytes, extrapolated_mb=megabytes * args.samples / args.official_keys)


def measure_reading(args: argparse.Namespace, path: Path, official: Path | None) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    picks = np.random.default_rng(0)
    store = LogitStore.open(path)
    store.read(0, range(0, args.samples, SHARD_SIZE))
    manager = official and official_manager(args, official)

    def encoded() -> int:
        for _ in range(4000):
            store.read(0, picks.integers(args.samples, size=BATCH))
        return 4000 * BATCH

    def decoded() -> int:
        for _ in range(1000):
            store.codec.decode(torch.from_numpy(store.read(0, picks.integers(args.samples, size=BATCH))), check=True)
        return 1000 * BATCH

    def official_rate(unpack: bool) -> float:
        # Its data set knows the keys before.
        keys = [official_key(sample) for sample in picks.integers(args.official_keys, size=400 * BATCH).tolist()]
        seconds = cpu_seconds()
        for key in keys:
            record = manager.read(key)
            if unpack:
                np.frombuffer(record[:4], dtype=np.int32)
                np.frombuffer(record[4:4 + 2 * args.k], dtype=np.int16).copy()
                np.frombuffer(record[4 + 2 * args.k:], dtype=np.float16).copy()
        return len(keys) / (cpu_seconds() - seconds)

    rates: dict[str, list[float]] = dict(encoded=[], decoded=[], official_encoded=[], official_decoded=[])
    for turn in range(-1, args.turns):
        figures = dict(encoded=rate(encoded), decoded=rate(decoded))
        if manager:
            figures.update(official_encoded=official_rate(unpack=False), official_decoded=official_rate(unpack=True))
        # The first turn maps the shards and loads the keys.
        for name, figure in figures.items() if turn >= 0 else ():
            rates[name].append(figure)
    return rates


def measure_writing(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    targets = make_targets(args)
    batches = [part_of(targets, start) for start in range(0, len(targets), WRITE_BATCH)]
    num_samples = 8 * SHARD_SIZE

    def write(path: Path) -> int:
        store = make_store(args, path, num_samples, 1)
        for _, shard in store.missing([0]):
            records = [store.codec.encode(batches[n % len(batches)]) for n in range(SHARD_SIZE // WRITE_BATCH)]
            store.write_shard(0, shard, np.concatenate(records))
        return num_samples

    def write_officially(path: Path) -> int:
        write_official(args, path, num_samples)
        return num_samples

    rates: dict[str, list[float]] = dict(ours=[], official=[])
    for turn in range(args.turns):
        rates['ours'].append(rate(partial(write, folder / f'written-{turn}')))
        if args.cream:
            rates['official'].append(rate(partial(write_officially, folder / f'official-{turn}')))
    return rates


def run(function: Callable, *args: Any) -> Any:
    """The result of a function in a new process, which says nothing on stdout."""
    with ProcessPoolExecutor(1, mp_context=get_context('spawn'), initializer=os.dup2, initargs=(2, 1)) as process:
        return process.submit(function, *args).result()


def machine() -> str:
    return (
        f'{device_name("cpu")}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python '
        f'{platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}')


def main() -> None:
    args = parse_args()

    def report(line: str, **figure: object) -> None:
        print(json.dumps({'benchmark': 'store', **figure}) if args.json else line, flush=True)

    def compare(what: str, rates: list[float], official: list[float]) -> None:
        here, there = statistics.median(rates), statistics.median(official) if official else None
        times = here / there if there else None
        line = f'{what:34}{here:12,.0f} a CPU second'
        report(
            line + (f'{there:12,.0f} the paper\'s code {times:6.1f} times' if there else ''),
            figure=what, per_cpu_second=here, official_per_cpu_second=there, times=times, turns=rates,
            official_turns=official)

    report(machine(), machine=machine())
    with tempfile.TemporaryDirectory(dir=args.folder, prefix='timm_tinyvit_') as temporary:
        folder = Path(temporary)
        official = folder / 'official' if args.cream else None
        # First, while nothing else waits to be written to the disk.
        writing = run(measure_writing, args, folder)
        run(fill, args, folder / 'store')
        if official:
            run(write_official, args, official, args.official_keys)
        width = LogitStore.open(folder / 'store').manifest.record_width
        shards = -(-args.samples // SHARD_SIZE)
        report(
            f'{args.samples:,} samples, k = {args.k} of {args.classes:,} classes, {shards} shards an epoch; {width} '
            f'bytes a view, the paper\'s code {official_width(args)}',
            samples=args.samples, k=args.k, classes=args.classes, shards=shards, bytes_per_view=width,
            official_bytes_per_view=official_width(args))
        reading = run(measure_reading, args, folder / 'store', official)
        compare('read, encoded', reading['encoded'], reading['official_encoded'])
        compare('read and decoded', reading['decoded'], reading['official_encoded'])
        if official:
            compare('read and decoded, theirs too', reading['decoded'], reading['official_decoded'])
        compare('encode and write', writing['ours'], writing['official'])
        opening = run(measure_open, args, folder / 'store')
        report(
            f'open {opening["open_seconds"]:.3f} s, lengths and headers of an epoch '
            f'{opening["check_files_seconds"]:.3f} s', figure='open', **opening)
        memory = run(measure_memory, args, folder / 'store')
        report(
            f'private memory {", ".join(f"{value:.1f}" for value in memory["private_mb"])} MB after each epoch; '
            f'checksums of an epoch {memory["checksum_seconds_per_epoch"]:.2f} CPU seconds', figure='memory', **memory)
        if official:
            memory = run(measure_official_memory, args, official)
            report(
                f'private memory of the paper\'s reader {memory["private_mb"]:.1f} MB for {args.official_keys:,} keys, '
                f'{memory["extrapolated_mb"]:,.0f} MB for {args.samples:,}', figure='official memory', **memory)


if __name__ == '__main__':
    main()
