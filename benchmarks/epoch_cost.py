"""What distillation costs: training steps from labels, from a store, and with the teacher beside the student.

    python benchmarks/epoch_cost.py --dataset FOLDER
    python benchmarks/epoch_cost.py --dataset FOLDER --turns 8 --teachers convnext_large --amp
    python benchmarks/epoch_cost.py --dataset FOLDER --teachers vit_base_patch16_224 --targets features
    python benchmarks/epoch_cost.py --dataset FOLDER --teachers --views-per-image 4 --model test_vit --batch-size 64
    python benchmarks/epoch_cost.py --dataset FOLDER --script --epochs 8 --train-split train[:256]
    python benchmarks/epoch_cost.py --dataset imagenet-1k --device cuda --batch-size 256 --amp --workers 16 --steps 20

All see the same views and end with an optimiser step of one and the same student:

labels     cross-entropy to the labels
control    the same once more, with `--control`: how far the figures can be trusted
store      the sparse loss to records of a store, read and checked in the loader, decoded on the device
repeated   the store with `--views-per-image` views of each decoded image in a batch, if it is more than 1
online     timm's `LogitDistillationTask` with a teacher that looks at every batch, for each of `--teachers`

With `--targets features` the store holds the pooled vectors of the one teacher, as int8; the student learns them with
its logits computed and not used, as in timm's `FeatureDistillationTask`, which is the peer then.

Each has a loader of its own with persistent workers, as in the trainer. They take turns of `--steps` steps, in the
opposite order every other time, and a ratio is the median over the turns, with the 95% interval of this median. Time is
that of the processor, in the trainer and in the loader's workers, with that of the clock beside it; on an accelerator
the trainer's is that of the clock, and the loader's does not count. What a worker or a run spends once is printed
apart, and so is what distillation does and labels do not, timed alone. The store is made for the occasion from random
logits or vectors, and the models' weights are random: neither changes the cost.

With `--script`, train_distill.py itself runs without and with `--logits`, both in turns of a few seconds of the clock.
A ratio is that of the processor time of two epochs with the same views; the first and the last epoch do not count.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from collections.abc import Callable, Iterator, Sequence

import datasets
import numpy as np
import timm
import torch
import torch.nn.functional as F
from program_turns import epoch_seconds
from timm.optim import create_optimizer_v2
from timm.task import FeatureDistillationTask, LogitDistillationTask
from torch import nn
from torch.utils.data import DataLoader, get_worker_info

import timm_tinyvit  # noqa: F401  registers the models
from timm_tinyvit.base.errors import reports_input_errors
from timm_tinyvit.base.launch import device_name
from timm_tinyvit.data.dataset import SparseLogitDataset, collate, read_records
from timm_tinyvit.data.fingerprint import dataset_fingerprint
from timm_tinyvit.data.sampler import EpochBatchSampler
from timm_tinyvit.data.sources import load_split
from timm_tinyvit.data.view_config import ViewConfig
from timm_tinyvit.data.views import Replay, library_versions
from timm_tinyvit.models.loading import Normalize, set_image_size
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.store.manifest import Manifest
from timm_tinyvit.targets.codecs import create_codec, create_feature_codec
from timm_tinyvit.targets.features import FeatureTargets, feature_loss
from timm_tinyvit.targets.sparse import SparseTargets, sparse_soft_target_cross_entropy
from timm_tinyvit.train.features import FeatureStudent

SCRIPT = Path(__file__).resolve().parents[1] / 'train_distill.py'
RAND_AUGMENT, ERASING = 'rand-m9-mstd0.5-inc1', 0.25
SHARD_SIZE = 16384  # a store's by default


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--dataset', required=True, metavar='NAME', help='Hub name, or a folder of parquet or images')
    parser.add_argument('--train-split', metavar='NAME', help='training split, train by default')
    parser.add_argument('--val-split', default='validation[:16]', metavar='NAME', help='evaluated by --script at last')
    parser.add_argument('--model', default='tiny_vit_5m_224', metavar='NAME', help='the student')
    parser.add_argument('--teachers', nargs='*', default=['resnet50', 'convnext_large'], metavar='NAME')
    parser.add_argument('--targets', choices=('classes', 'features'), default='classes', help='what the store holds')
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--classes', type=int, default=1000)
    parser.add_argument('--k', type=int, default=10)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--views-per-image', type=int, default=1, metavar='N', help='measure this, too')
    parser.add_argument('--steps', type=int, default=1, help='steps of a turn')
    parser.add_argument('--turns', type=int, default=40, help='turns of labels and store')
    parser.add_argument('--online-turns', type=int, default=4, help='turns of store and teachers')
    parser.add_argument('--control', action='store_true', help='labels a second time')
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--threads', type=int, default=1, help='CPU threads; those that wait count as if they worked')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--amp', action='store_true', help='autocast to bfloat16')
    parser.add_argument('--script', action='store_true', help='run train_distill.py without and with --logits instead')
    parser.add_argument('--epochs', type=int, default=8, help='epochs of the store, and of a run of the script')
    parser.add_argument('--json', action='store_true', help='one JSON line')
    args = parser.parse_args(argv)
    if min(args.workers, args.batch_size, args.steps, args.turns) < 1 or args.epochs < 3:
        parser.error('--workers, --batch-size, --steps and --turns are 1 at least, --epochs 3')
    if args.targets == 'features' and (len(args.teachers) != 1 or args.script):
        parser.error('--targets features needs one of --teachers, whose vectors it stores, and no --script')
    return args


def make_store(folder: Path, dataset: datasets.Dataset, args: argparse.Namespace) -> tuple[LogitStore, Replay]:
    """A store of random logits, or features, for these images."""
    replay = Replay(ViewConfig(
        input_size=(3, args.img_size, args.img_size), auto_augment=RAND_AUGMENT, re_prob=ERASING), seed=0)
    random = torch.Generator().manual_seed(0)
    if args.targets == 'features':
        dim = timm.create_model(args.teachers[0], num_classes=0).num_features
        codec, kind = create_feature_codec('int8', dim), dict(num_classes=0, k=0, features=dict(
            dim=dim, grid=0, projection='', variance=1.))
        targets = FeatureTargets(torch.randn(1024, 1, dim, generator=random))
    else:
        codec, kind = create_codec('compact', args.classes, args.k), dict(num_classes=args.classes, k=args.k)
        targets = SparseTargets.from_logits(3 * torch.randn(1024, args.classes, generator=random), args.k)
    store = LogitStore.create(folder, Manifest(
        num_samples=len(dataset), **kind, record_width=codec.width, epochs=args.epochs, seed=0,
        shard_size=SHARD_SIZE, codec=codec.name, recipe=replay.config.to_dict(), versions=library_versions(),
        probe=replay.probe(), dataset=dataset_fingerprint(dataset), teacher=dict(
            name='random', weights='', dtype='float32', device='cpu', batch_size=1, input_size=[3, 224, 224])))
    records = codec.encode(targets)
    for epoch, shard in store.missing(store.manifest.stored_epochs):
        store.write_shard(epoch, shard, records[np.arange(store.manifest.shard_rows(shard)) % len(records)])
    return store, replay


def timed_collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch, and the processor seconds of its worker so far."""
    return {**collate(samples), 'worker': (get_worker_info().id, time.process_time())}


class Feed:
    """The endless batches of a loader, each with the processor seconds that it took.

    Attributes:
        start: Seconds until the first batch of each worker, which is not handed out.
    """

    def __init__(self, data: SparseLogitDataset, args: argparse.Namespace, views_per_image: int):
        self.start: list[float] = []
        self._sampler = EpochBatchSampler(
            len(data), args.batch_size, seed=0, store_epochs=range(args.epochs), views_per_image=views_per_image)
        self._loader = DataLoader(
            data, batch_sampler=self._sampler, num_workers=args.workers, collate_fn=timed_collate,
            persistent_workers=True, pin_memory=args.device.startswith('cuda'))

    def __iter__(self) -> Iterator[tuple[dict[str, Any], float]]:
        seconds: dict[int, float] = {}
        for epoch in count():
            self._sampler.set_epoch(epoch)
            for batch in self._loader:
                worker, now = batch.pop('worker')
                before, seconds[worker] = seconds.get(worker), now
                if before is None:
                    self.start.append(now)
                else:
                    yield batch, now - before


class Bench:
    """One student with its optimiser, the losses that it learns from, and a loader for each of them."""

    def __init__(self, dataset: datasets.Dataset, store: LogitStore, replay: Replay, args: argparse.Namespace):
        self.args, self.store = args, store
        self.device = torch.device(args.device)
        self.data = {'labels': SparseLogitDataset(dataset, replay), 'store': SparseLogitDataset(dataset, replay, store)}
        torch.manual_seed(0)
        self.student = timm.create_model(args.model, num_classes=args.classes)
        set_image_size(self.student, (args.img_size, args.img_size))
        self.student.to(self.device)
        config = self.student.pretrained_cfg
        self.normalize = Normalize(config['mean'], config['std']).to(self.device)
        self.losses = {'labels': self.from_labels, 'store': self.from_store}
        if args.control:
            self.losses['control'] = self.from_labels
        trained, Task = [self.student], LogitDistillationTask
        if features := store.manifest.features:
            size, Task = (args.img_size, args.img_size), FeatureDistillationTask
            self.feature_student = FeatureStudent(self.student.cpu(), features['dim'], 0, size).to(self.device)
            self.losses['store'] = self.from_features
            trained.append(self.feature_student.projection)
        for name in args.teachers:
            teacher = timm.create_model(name, num_classes=args.classes).to(self.device).eval()
            task = Task(
                self.student, teacher, nn.CrossEntropyLoss(), distill_loss_weight=1., task_loss_weight=0.,
                device=self.device, verbose=False)
            trained += [task.trainable_module.projection] if features else []
            self.losses[f'online {name}'] = self.online(task)
        # What a loss does not reach has no gradient, and is left as it is.
        self.optimizer = create_optimizer_v2(nn.ModuleList(trained), 'adamw', lr=1e-4, weight_decay=0.05)
        if args.views_per_image > 1:
            self.losses['repeated'] = self.losses['store']
        self.feeds = {
            name: Feed(self.data['store' if name in ('store', 'repeated') else 'labels'], args,
                       args.views_per_image if name == 'repeated' else 1) for name in self.losses}
        self.batches = {name: iter(feed) for name, feed in self.feeds.items()}

    def from_labels(self, views: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        return F.cross_entropy(self.student(views).float(), batch['label'].to(self.device, non_blocking=True))

    def from_store(self, views: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        targets = self.store.codec.decode(batch['record'].to(self.device, non_blocking=True))
        return sparse_soft_target_cross_entropy(self.student(views), targets)

    def from_features(self, views: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        targets = self.store.codec.decode(batch['record'].to(self.device, non_blocking=True))
        return feature_loss(self.feature_student(views)[1], targets, 'mse')

    def online(self, task: nn.Module) -> Callable:
        return lambda views, batch: task(views, batch['label'].to(self.device, non_blocking=True))['loss']

    def clock(self) -> float:
        if self.device.type == 'cpu':
            return time.process_time()
        torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def turn(self, name: str) -> tuple[float, float, float]:
        """Seconds of a step in the trainer, in the loader, and by the clock."""
        begin, start, loading = time.perf_counter(), self.clock(), 0.
        for _ in range(self.args.steps):
            batch, spent = next(self.batches[name])
            loading += spent
            views = self.normalize(batch['view'].to(self.device, non_blocking=True))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
                loss = self.losses[name](views, batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        spent = self.clock() - start, loading, time.perf_counter() - begin
        return tuple(seconds / self.args.steps for seconds in spent)

    def turns(self, names: Sequence[str], number: int) -> dict[str, np.ndarray]:
        """Seconds of a step as of `turn`, float [number, 3], of each; one more turn before warms up."""
        found = {name: [] for name in names}
        for turn in range(number + 1):
            for name in names[::1 if turn % 2 else -1]:
                found[name].append(self.turn(name))
        return {name: np.array(values[1:]) for name, values in found.items()}

    def parts(self) -> dict[str, Callable[[], Any]]:
        """What distillation does in a step, and the last one what labels do instead."""
        size = self.args.batch_size
        rows, epochs = np.random.default_rng(0).permutation(len(self.data['store']))[:size], np.zeros(size, np.int64)
        records = read_records(self.store, epochs, rows)
        there = records.to(self.device)
        targets = self.store.codec.decode(there)
        logits = torch.randn(size, self.args.classes, device=self.device, requires_grad=True)
        vectors = torch.zeros(size, 1, self.store.manifest.features.get('dim', 1), device=self.device).requires_grad_()
        labels = torch.zeros(size, dtype=torch.int64, device=self.device)
        return {
            'read and check': lambda: read_records(self.store, epochs, rows),
            'collate': lambda: torch.stack(list(records)),
            'decode': lambda: self.store.codec.decode(there),
            **({'feature loss': lambda: torch.autograd.grad(feature_loss(vectors, targets, 'mse'), vectors)}
               if self.args.targets == 'features' else
               {'sparse loss': lambda: torch.autograd.grad(sparse_soft_target_cross_entropy(logits, targets), logits)}),
            'cross-entropy': lambda: torch.autograd.grad(F.cross_entropy(logits.float(), labels), logits),
        }


def timed(parts: dict[str, Callable[[], Any]], turns: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each part, all in turns."""
    found = {name: [] for name in parts}
    for _ in range(turns):
        for name, part in parts.items():
            start = clock()
            part()
            found[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in found.items()}


def ratio(values: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """The median of the ratios of pairs, and its 95% interval by rank, which asks nothing of how they are spread."""
    ratios = np.sort(values / others)
    middle, half = (len(ratios) - 1) / 2, 0.98 * math.sqrt(len(ratios))
    low, high = max(math.floor(middle - half), 0), min(math.ceil(middle + half), len(ratios) - 1)
    return dict(times=float(np.median(ratios)), low=float(ratios[low]), high=float(ratios[high]), pairs=len(ratios))


def of_turns(bench: Bench, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of all ways to train, step by step."""
    online = [name for name in bench.losses if name.startswith('online')]
    spent = bench.turns(
        ['labels', 'store', *(name for name in ('control', 'repeated') if name in bench.feeds)], args.turns)
    beside = bench.turns(['store', *online], args.online_turns) if online else {}
    # An accelerator does not wait for a loader that keeps up.
    columns = slice(0, 2 if bench.device.type == 'cpu' else 1)

    def times(name: str, peer: str, found: dict[str, np.ndarray]) -> dict[str, float]:
        return ratio(found[name][:, columns].sum(1), found[peer][:, columns].sum(1)) | {
            'loader': float(np.median(found[name][:, 1] / found[peer][:, 1])),
            'clock': float(np.median(found[name][:, 2] / found[peer][:, 2]))}

    step = np.median(spent['labels'][:, columns].sum(1))
    extras = timed(bench.parts(), 200, bench.clock)
    store = bench.store
    whole = LogitStore.create(folder / 'whole', replace(store.manifest, num_samples=SHARD_SIZE, epochs=1))
    whole.write_shard(0, 0, store.read(0, np.arange(SHARD_SIZE) % store.manifest.num_samples))
    once = timed({
        'shard': lambda: LogitStore.open(whole.path).read(0, [0]), 'open': lambda: LogitStore.open(whole.path),
        'probe': bench.data['store'].replay.probe}, 15, time.process_time)
    mapping = once['shard'] - once['open']
    return dict(
        seconds={name: dict(zip(('trainer', 'loader', 'clock'), np.median(values, axis=0).tolist()))
                 for name, values in {**beside, **spent}.items()},
        times_labels={name: times(name, 'labels', spent) for name in spent if name != 'labels'},
        times_store={name: times(name, 'store', beside) for name in online},
        milliseconds_of_batch={name: 1e3 * value for name, value in extras.items()},
        share=(sum(extras.values()) - 2 * extras['cross-entropy']) / step,
        first_batch={name: statistics.median(bench.feeds[name].start) for name in ('labels', 'store')},
        seconds_of_shard=mapping, share_of_shards=args.workers * mapping / SHARD_SIZE * args.batch_size / step,
        seconds_of_run=once['open'] + once['probe'])


def of_script(store: LogitStore, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of train_distill.py without and with the store, epoch by epoch."""
    command = [
        sys.executable, SCRIPT, '--dataset', args.dataset, '--val-split', args.val_split, '--model', args.model,
        '--num-classes', args.classes, '--batch-size', args.batch_size, '--epochs', args.epochs, '--workers',
        args.workers, '--val-interval', args.epochs, '--output', folder,
        *(['--train-split', args.train_split] if args.train_split else []),
        *(['--amp-dtype', 'bfloat16'] if args.amp else [])]
    views = ['--img-size', args.img_size, '--aa', RAND_AUGMENT, '--reprob', ERASING]
    commands = {'labels': [*command, *views], 'store': [*command, '--logits', store.path]}
    found = epoch_seconds(
        {name: [*map(str, command), '--experiment', name] for name, command in commands.items()}, args.threads)
    return dict(
        seconds_of_epoch={name: statistics.median(values) for name, values in found.items()},
        times_labels=dict(store=ratio(found['store'], found['labels'])))


def report(figure: dict[str, Any]) -> str:
    """The figures as text."""
    lines = ['{machine}, {threads} CPU threads, load {load:.1f}, torch {torch}; {model}, {img_size} pixels, batches of '
             '{batch_size}, {classes:,} classes, {0}{1}'.format(
                 'k = {k}'.format(**figure) if figure['targets'] == 'classes' else 'stored features',
                 ', bfloat16' if figure['amp'] else '', **figure)]
    for name, value in (figure.get('seconds') or figure['seconds_of_epoch']).items():
        line = f'{name:22} {value:8.2f} s an epoch' if figure['script'] else \
            f'{name:22} {value["trainer"]:7.3f} s a step in the trainer, {value["loader"]:.3f} s in the loader, ' \
            f'{value["clock"]:.3f} s by the clock'
        for peer in ('labels', 'store'):
            if found := figure.get(f'times_{peer}', {}).get(name):
                line += ', {times:.3f} times {0} ({low:.3f} to {high:.3f}, {pairs} pairs)'.format(peer, **found)
                line += ', {loader:.3f} in the loader, {clock:.3f} by the clock'.format(**found) if 'clock' in found \
                    else ''
        lines.append(line)
    if not figure['script']:
        parts = ', '.join(f'{name} {value:.2f}' for name, value in figure['milliseconds_of_batch'].items())
        lines += [
            f'ms of a batch alone: {parts}; {100 * figure["share"]:.3f}% of the step more than with labels',
            f'once in each worker and epoch, map and check a shard of {SHARD_SIZE:,} samples: '
            f'{1e3 * figure["seconds_of_shard"]:.2f} ms, {100 * figure["share_of_shards"]:.4f}% of the step',
            'a worker up to its first batch: {labels:.3f} s with labels, {store:.3f} s with the store'.format(
                **figure['first_batch']),
            f'once in each run, open the store and make the probe views: {figure["seconds_of_run"]:.2f} s']
    return '\n'.join(lines)


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    datasets.disable_progress_bars()
    dataset = load_split(args.dataset, args.train_split, is_training=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store, replay = make_store(folder / 'store', dataset, args)
        found = of_script(store, args, folder) if args.script else \
            of_turns(Bench(dataset, store, replay, args), args, folder)
    settings = {name: getattr(args, name) for name in (
        'threads', 'model', 'img_size', 'batch_size', 'views_per_image', 'classes', 'k', 'targets', 'workers', 'amp',
        'script')}
    figure = dict(
        benchmark='epoch_cost', machine=device_name(args.device), load=os.getloadavg()[0], torch=torch.__version__,
        timm=timm.__version__, **settings, **found)
    print(json.dumps(figure) if args.json else report(figure))


if __name__ == '__main__':
    main()
