"""What distillation costs: training steps from labels, from a store, and with the teacher beside the student.

    python benchmarks/epoch_cost.py --dataset FOLDER
    python benchmarks/epoch_cost.py --dataset imagenet-1k --device cuda --batch-size 256 --amp --workers 16 --json

All see the same views through the same loader, and end with an optimiser step of the same student:

labels     cross-entropy to the labels
store      the sparse loss to records of a store, read and checked in the loader, decoded on the device
online     timm's `LogitDistillationTask` with a teacher that looks at every batch, for each of `--teachers`

The store is made for the occasion from random logits, and the models' weights are random too: neither changes the cost.
Passes of `--steps` steps run in turns. A figure is seconds per pass: of the clock on an accelerator, of the processor,
loader processes included, on a CPU. A ratio is the median over the turns.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask
from torch import nn
from torch.utils.data import DataLoader

import timm_tinyvit  # noqa: F401  registers the models
from timm_tinyvit.codec import create_codec
from timm_tinyvit.dataset import EpochBatchSampler, SparseLogitDataset, collate
from timm_tinyvit.fingerprint import dataset_fingerprint
from timm_tinyvit.replay import Replay, ViewRecipe
from timm_tinyvit.sources import load_split
from timm_tinyvit.sparse import SparseTargets, sparse_soft_target_cross_entropy
from timm_tinyvit.store import LogitStore, Manifest
from timm_tinyvit.teacher import ModelInput


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--dataset', required=True, metavar='NAME', help='Hub name, or a folder of parquet or images')
    parser.add_argument('--model', default='tiny_vit_5m_224', metavar='NAME', help='the student')
    parser.add_argument('--teachers', nargs='*', default=['resnet50', 'convnext_large'], metavar='NAME')
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--classes', type=int, default=1000)
    parser.add_argument('--k', type=int, default=10)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--steps', type=int, default=4, help='steps of a pass')
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='CPU threads')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--amp', action='store_true', help='autocast to bfloat16')
    parser.add_argument('--json', action='store_true', help='one JSON line per figure')
    return parser.parse_args()


def make_store(folder: Path, dataset: datasets.Dataset, replay: Replay, num_classes: int, k: int) -> LogitStore:
    """A store of one epoch for these images, of random logits."""
    codec = create_codec('compact', num_classes, k)
    store = LogitStore.create(folder, Manifest(
        num_samples=len(dataset), num_classes=num_classes, k=k, record_width=codec.width, epochs=1, seed=replay.seed,
        shard_size=16384, codec=codec.name, recipe=replay.recipe.to_dict(), dataset=dataset_fingerprint(dataset)))
    generator = torch.Generator().manual_seed(0)
    for shard in range(store.manifest.num_shards):
        parts = [
            codec.encode(SparseTargets.from_logits(3 * torch.randn(len(rows), num_classes, generator=generator), k))
            for rows in torch.arange(store.manifest.shard_rows(shard)).split(1024)]
        store.write_shard(0, shard, np.concatenate(parts))
    return store


def seconds(device: torch.device) -> float:
    """The clock, or the processor time of this process and the loader processes that have ended."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
        return time.perf_counter()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


class Training:
    """One student with its optimiser, loader and loss."""

    def __init__(self, args: argparse.Namespace, data: SparseLogitDataset, loss: Callable):
        self.args, self.data, self.loss = args, data, loss
        self.device = torch.device(args.device)
        torch.manual_seed(0)
        self.student = timm.create_model(args.model, num_classes=args.classes).to(self.device)
        config = self.student.pretrained_cfg
        self.prepare = ModelInput(config['mean'], config['std']).to(self.device)
        self.optimizer = create_optimizer_v2(self.student, 'adamw', lr=1e-4, weight_decay=0.05)

    def run(self) -> float:
        """Seconds of one pass."""
        sampler = EpochBatchSampler(len(self.data), self.args.batch_size, seed=0)
        loader = DataLoader(
            self.data, batch_sampler=sampler, num_workers=self.args.workers, collate_fn=collate,
            pin_memory=self.device.type == 'cuda')
        start = seconds(self.device)
        for batch in loader:
            views = self.prepare(batch['view'].to(self.device, non_blocking=True))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
                loss = self.loss(self.student, views, batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return seconds(self.device) - start


def trainings(args: argparse.Namespace, folder: Path) -> dict[str, Training]:
    dataset = load_split(args.dataset, None, is_training=True)
    dataset = dataset.select(range(min(len(dataset), args.steps * args.batch_size)))
    replay = Replay(ViewRecipe(
        input_size=(3, args.img_size, args.img_size), auto_augment='rand-m9-mstd0.5-inc1', re_prob=0.25), seed=0)
    store = make_store(folder, dataset, replay, args.classes, args.k)
    plain, distilled = SparseLogitDataset(dataset, replay), SparseLogitDataset(dataset, replay, store)
    device = torch.device(args.device)

    def from_labels(student: nn.Module, views: torch.Tensor, batch: dict) -> torch.Tensor:
        return F.cross_entropy(student(views).float(), batch['label'].to(device, non_blocking=True))

    def from_store(student: nn.Module, views: torch.Tensor, batch: dict) -> torch.Tensor:
        targets = store.codec.decode(batch['record'].to(device, non_blocking=True))
        return sparse_soft_target_cross_entropy(student(views), targets)

    found = {'labels': Training(args, plain, from_labels), 'store': Training(args, distilled, from_store)}
    for name in args.teachers:
        training = Training(args, plain, None)
        teacher = timm.create_model(name, num_classes=args.classes).to(device).eval()
        task = LogitDistillationTask(
            training.student, teacher, nn.CrossEntropyLoss(), distill_loss_weight=1., task_loss_weight=0.,
            device=device, verbose=False)

        def online(student: nn.Module, views: torch.Tensor, batch: dict, task: nn.Module = task) -> torch.Tensor:
            return task(views, batch['label'].to(device, non_blocking=True))['loss']

        training.loss = online
        found[f'online {name}'] = training
    return found


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        found = trainings(args, Path(folder) / 'store')
        times: dict[str, list[float]] = {name: [] for name in found}
        for turn in range(args.turns + 1):
            for name, training in found.items():
                spent = training.run()
                if turn:  # the first one warms up
                    times[name].append(spent)
    device = torch.cuda.get_device_name(args.device) if args.device.startswith('cuda') else 'CPU'
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times['labels'])) for name in times}
    against_store = {
        name: statistics.median(a / b for a, b in zip(times[name], times['store']))
        for name in times if name.startswith('online')}
    figure = dict(
        benchmark='epoch_cost', device=device, threads=args.threads, load=os.getloadavg()[0], torch=torch.__version__,
        timm=timm.__version__, model=args.model, batch_size=args.batch_size, classes=args.classes, k=args.k,
        seconds={name: statistics.median(values) for name, values in times.items()}, times_labels=ratios,
        times_store=against_store)
    if args.json:
        print(json.dumps(figure))
        return
    print(
        f'{device}, {args.threads} CPU threads, load {figure["load"]:.1f}; {args.model}, {args.steps} steps of '
        f'{args.batch_size}, {args.classes:,} classes, k = {args.k}')
    for name, value in figure['seconds'].items():
        also = f', {against_store[name]:.2f} times the store' if name in against_store else ''
        print(f'{name:24} {value:7.2f} s  {ratios[name]:.3f} times labels{also}')


if __name__ == '__main__':
    main()
