"""The input pipeline beside its peers: views per second of processor time, from JPEG files to batches for the device.

    python benchmarks/pipeline.py --images FOLDER
    python benchmarks/pipeline.py --images FOLDER --turns 9 --json

FOLDER holds photographs; each gives a few crops, saved as JPEGs of 500x375 with quality 93. Everything sees the same
files with the paper's recipe (224 pixels, bicubic, RandAugment, erasing) in one loader process:

official   what the paper's code does: timm's `create_transform` with the random states saved, seeded and restored
           around every image, float32 views, torch's default collation
timm       timm's `create_loader` in prefetcher mode: uint8 views, to be normalised and erased on the device
pillow     `SparseLogitDataset` and `Replay`: uint8 views, erased in the loader, to be normalised on the device
torch      the same with the decoder `torch`: cropped and resized as tensors, decoded by simplejpeg if it is installed
pillow 4   four views of each decoded image, of four epochs of a store (`--views-per-image 4`); `torch 4` likewise

They run in turns. A figure is views per second of the processor time of the loader process and the main process
together, without the work that is left to the device; a ratio is the median over the turns.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import datasets
import numpy as np
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_loader, create_transform
from torch.utils.data import DataLoader, Dataset

from timm_tinyvit.data.dataset import SparseLogitDataset, collate
from timm_tinyvit.data.sampler import EpochBatchSampler
from timm_tinyvit.data.view_config import ViewConfig
from timm_tinyvit.data.views import Replay

RECIPE = dict(auto_augment='rand-m9-mstd0.5-inc1', interpolation='bicubic', re_prob=0.25, re_mode='pixel', re_count=1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--images', required=True, metavar='FOLDER', help='photographs of 500x375 pixels or more')
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--views', type=int, default=1920, help='views in each turn')
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--json', action='store_true', help='one JSON line per figure')
    return parser.parse_args()


def make_images(source: Path, folder: Path, count: int) -> None:
    """Crops of photographs as JPEG files of 500x375, about as large as those of ImageNet."""
    files = sorted(file for file in source.iterdir() if file.suffix.lower() in ('.jpg', '.jpeg', '.png', '.webp'))
    if not files:
        raise SystemExit(f'error: there is no photograph in {source}; give --images a folder of JPEGs or PNGs')
    draws = random.Random(0)
    for number in range(count):
        image = Image.open(files[number % len(files)]).convert('RGB')
        width = min(image.width, image.height * 4 / 3) * draws.uniform(0.75, 1)
        left, top = draws.uniform(0, image.width - width), draws.uniform(0, image.height - width * 3 / 4)
        crop = image.resize((500, 375), Image.LANCZOS, box=(left, top, left + width, top + width * 3 / 4))
        place = folder / f'{number % 2}' / f'{number:05d}.jpg'
        place.parent.mkdir(parents=True, exist_ok=True)
        crop.save(place, 'JPEG', quality=93)


@contextmanager
def official_random_state(seed: int) -> Iterable[None]:
    """Python's, numpy's and torch's generators seeded inside and restored outside, for every image, as in the paper."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class OfficialDataset(Dataset):
    """timm's image folder and transform, with a seed of its own for every view."""

    def __init__(self, folder: Path):
        self.dataset = create_dataset('', root=str(folder))
        self.dataset.transform = create_transform(
            224, is_training=True, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, **RECIPE)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[tuple[torch.Tensor, int], int]:
        seed = int(np.random.randint(0, 1 << 31))
        with official_random_state(seed):
            return self.dataset[index], seed


@cache
def load_images(folder: Path) -> datasets.Dataset:
    return datasets.load_dataset(str(folder), split='train', cache_dir=str(folder.parent / 'cache'))


def official(folder: Path, batch_size: int) -> Iterable[torch.Tensor]:
    loader = DataLoader(OfficialDataset(folder), batch_size, shuffle=True, num_workers=1, drop_last=True)
    return (views for (views, _), _ in loader)


def timm_loader(folder: Path, batch_size: int) -> Iterable[torch.Tensor]:
    loader = create_loader(
        create_dataset('', root=str(folder)), (3, 224, 224), batch_size, is_training=True, use_prefetcher=True,
        num_workers=1, device=torch.device('cpu'), pin_memory=False, persistent_workers=False,
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, **RECIPE)
    return (views for views, _ in loader.loader)  # what is inside the prefetcher, which does the device's part


def replayed(decoder: str, views_per_image: int, folder: Path, batch_size: int) -> Iterable[torch.Tensor]:
    data = SparseLogitDataset(load_images(folder), Replay(ViewConfig(decoder=decoder, **RECIPE), seed=0))
    sampler = EpochBatchSampler(len(data), batch_size, seed=0, views_per_image=views_per_image)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=1, collate_fn=collate)
    return (batch['view'] for batch in loader)


def processor_seconds() -> float:
    """Of this process and the loader processes that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def rate(make: Callable[[Path, int], Iterable[torch.Tensor]], folder: Path, batch_size: int) -> float:
    """Views per second of processor time over the images of a folder."""
    start, views = processor_seconds(), 0
    for batch in make(folder, batch_size):
        assert batch.shape[1:] == (3, 224, 224)
        views += len(batch)
    return views / (processor_seconds() - start)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / 'images'
        make_images(Path(args.images), folder, args.views)
        sizes = [file.stat().st_size for file in folder.rglob('*.jpg')]
        loaders = {
            'official': official, 'timm': timm_loader,
            **{f'{decoder}{" 4" if views == 4 else ""}': partial(replayed, decoder, views)
               for views in (1, 4) for decoder in ('pillow', 'torch')}}
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for turn in range(args.turns + 1):
            for name, make in loaders.items():
                found = rate(make, folder, args.batch_size)
                if turn:  # the first one warms the caches
                    rates[name].append(found)
    figure = dict(
        benchmark='pipeline', machine=platform.machine(), cores=os.cpu_count(), load=os.getloadavg()[0],
        torch=torch.__version__, timm=timm.__version__, mean_kilobytes=statistics.mean(sizes) / 1e3,
        views_per_cpu_second={name: statistics.median(values) for name, values in rates.items()},
        times={
            f'{name} of {peer}': statistics.median(a / b for a, b in zip(rates[name], rates[peer]))
            for name in list(loaders)[2:] for peer in ('official', 'timm')})
    if args.json:
        print(json.dumps(figure))
        return
    print(f'{figure["machine"]}, load {figure["load"]:.1f}; JPEGs of 500x375, {figure["mean_kilobytes"]:.0f} kB')
    for name, value in figure['views_per_cpu_second'].items():
        print(f'{name:10} {value:7.1f} views/s of processor time')
    for name, value in figure['times'].items():
        print(f'{name:20} {value:.2f} times as many')


if __name__ == '__main__':
    main()
