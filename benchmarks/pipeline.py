"""The input pipeline beside its peers: views per second of processor time, from JPEG files to batches for the device.

    python benchmarks/pipeline.py --images FOLDER
    python benchmarks/pipeline.py --images FOLDER --sizes small --turns 9 --json

FOLDER holds photographs, of which JPEGs of two sizes are made. Small ones are crops of 500x375 with quality 93, as in
ImageNet. Large ones, as cameras make them, have 12 megapixels: twelve photographs side by side with the noise of a
sensor, without which a JPEG of enlarged pictures would be cheaper to decode, in about 2.7 MB. Everything sees the same
files with the paper's recipe (224 pixels, bicubic, RandAugment, erasing) in one loader process with one thread:

official   what the paper's code does: timm's `create_transform` with the random states saved, seeded and restored
           around every image, float32 views, torch's default collation
timm       timm's `create_loader` in prefetcher mode: uint8 views, to be normalised and erased on the device
pillow     `SparseLogitDataset` and `Replay`: uint8 views, erased in the loader, to be normalised on the device
torch      the same with the decoder `torch`: decoded at the scale of the crop, or wholly, by simplejpeg if it is
           installed, and resized as tensors
pillow 4   four views of each decoded image, of four epochs of a store (`--views-per-image 4`); `torch 4` likewise

They run in turns. A figure is views per second of the processor time of the loader process and the main process
together, without the work that is left to the device; a ratio is the median over the turns. Milliseconds of the clock
stand beside, and mean little if other work runs on the machine.
"""

import argparse
import json
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_loader, create_transform
from torch.utils.data import DataLoader, Dataset

from timm_tinyvit.base.launch import device_name
from timm_tinyvit.data.dataset import SparseLogitDataset, collate
from timm_tinyvit.data.sampler import EpochBatchSampler
from timm_tinyvit.data.view_config import ViewConfig
from timm_tinyvit.data.views import Replay

RECIPE = dict(auto_augment='rand-m9-mstd0.5-inc1', interpolation='bicubic', re_prob=0.25, re_mode='pixel', re_count=1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--images', required=True, metavar='FOLDER', help='photographs of 500x375 pixels or more')
    parser.add_argument('--sizes', nargs='+', default=['small', 'large'], choices=['small', 'large'])
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--views', type=int, default=1920, help='views of small images in each turn')
    parser.add_argument('--large-views', type=int, default=96, help='views of large images in each turn')
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--json', action='store_true', help='one JSON line per figure')
    return parser.parse_args()


def photographs(source: Path) -> list[Path]:
    """The image files of a folder."""
    files = sorted(file for file in source.iterdir() if file.suffix.lower() in ('.jpg', '.jpeg', '.png', '.webp'))
    if not files:
        raise SystemExit(f'error: there is no photograph in {source}; give --images a folder of JPEGs or PNGs')
    return files


def crop_at_random(file: Path, size: tuple[int, int], draws: random.Random) -> Image.Image:
    """Most of a photograph, in another size of the ratio 4:3."""
    image = Image.open(file).convert('RGB')
    width = min(image.width, image.height * 4 / 3) * draws.uniform(0.75, 1)
    left, top = draws.uniform(0, image.width - width), draws.uniform(0, image.height - width * 3 / 4)
    return image.resize(size, Image.LANCZOS, box=(left, top, left + width, top + width * 3 / 4))


def make_small_images(source: Path, folder: Path, count: int) -> None:
    """Crops of photographs as JPEG files of 500x375, about as large as those of ImageNet."""
    files = photographs(source)
    draws = random.Random(0)
    for number in range(count):
        place = folder / f'{number % 2}' / f'{number:05d}.jpg'
        place.parent.mkdir(parents=True, exist_ok=True)
        crop_at_random(files[number % len(files)], (500, 375), draws).save(place, 'JPEG', quality=93)


def make_large_images(source: Path, folder: Path, count: int) -> None:
    """JPEG files of 4000x3000, of which every eighth is another one."""
    files = photographs(source)
    draws, noise = random.Random(0), np.random.default_rng(0)
    for number in range(count):
        place = folder / f'{number % 2}' / f'{number:05d}.jpg'
        place.parent.mkdir(parents=True, exist_ok=True)
        if number >= 8:
            os.link(folder / f'{number % 2}' / f'{number % 8:05d}.jpg', place)
            continue
        image = Image.new('RGB', (4000, 3000))
        for left, top in product(range(0, 4000, 1000), range(0, 3000, 1000)):
            image.paste(crop_at_random(draws.choice(files), (1000, 1000), draws), (left, top))
        pixels = np.asarray(image) + noise.normal(0, 5, (3000, 4000, 1)).astype(np.float32)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place, 'JPEG', quality=90)


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
    return datasets.load_dataset(str(folder), split='train', cache_dir=f'{folder}-cache')


def official(folder: Path, batch_size: int) -> Iterable[torch.Tensor]:
    loader = DataLoader(OfficialDataset(folder), batch_size, shuffle=True, num_workers=1, drop_last=True)
    return (views for (views, _), _ in loader)


def timm_loader(folder: Path, batch_size: int) -> Iterable[torch.Tensor]:
    loader = create_loader(
        create_dataset('', root=str(folder)), (3, 224, 224), batch_size, is_training=True, use_prefetcher=True,
        num_workers=1, device=torch.device('cpu'), pin_memory=False, persistent_workers=False,
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, **RECIPE)
    return (views for views, _ in loader.loader)  # what is inside the prefetcher, which does the device's part


def replayed(
        decoder: str,
        views_per_image: int,
        folder: Path,
        batch_size: int,
        workers: int = 1,
) -> Iterable[torch.Tensor]:
    data = SparseLogitDataset(load_images(folder), Replay(ViewConfig(decoder=decoder, **RECIPE), seed=0))
    sampler = EpochBatchSampler(len(data), batch_size, seed=0, views_per_image=views_per_image)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers, collate_fn=collate)
    return (batch['view'] for batch in loader)


def processor_seconds() -> float:
    """Of this process and the loader processes that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def rate(make: Callable[[Path, int], Iterable[torch.Tensor]], folder: Path, batch_size: int) -> tuple[float, float]:
    """Views per second of processor time, and of the clock, over the images of a folder."""
    start, clock, views = processor_seconds(), time.perf_counter(), 0
    for batch in make(folder, batch_size):
        assert batch.shape[1:] == (3, 224, 224)
        views += len(batch)
    return views / (processor_seconds() - start), views / (time.perf_counter() - clock)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of all loaders, on the images of a folder."""
    loaders = {
        'official': official, 'timm': timm_loader,
        **{f'{decoder}{" 4" if views == 4 else ""}': partial(replayed, decoder, views)
           for views in (1, 4) for decoder in ('pillow', 'torch')}}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for turn in range(args.turns + 1):
        for name, make in loaders.items():
            found = rate(make, folder, args.batch_size)
            if turn:  # the first one warms the caches
                rates[name].append(found)
    per_cpu_second, per_second = ({name: [value[place] for value in values] for name, values in rates.items()}
                                  for place in (0, 1))
    return dict(
        views_per_cpu_second={name: statistics.median(values) for name, values in per_cpu_second.items()},
        milliseconds_of_the_clock={name: 1e3 / statistics.median(values) for name, values in per_second.items()},
        times={
            f'{name} of {peer}': statistics.median(
                a / b for a, b in zip(per_cpu_second[name], per_cpu_second[peer]))
            for name in list(loaders)[2:] for peer in ('official', 'timm')})


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / size
            if size == 'small':
                make_small_images(Path(args.images), folder, args.views)
            else:
                make_large_images(Path(args.images), folder, args.large_views)
            lengths = [file.stat().st_size for file in folder.rglob('*.jpg')]
            figure = dict(
                benchmark='pipeline', machine=device_name('cpu'), cores=os.cpu_count(), load=os.getloadavg()[0],
                torch=torch.__version__, timm=timm.__version__, images=size,
                mean_kilobytes=statistics.mean(lengths) / 1e3, **measure(folder, args))
        if args.json:
            print(json.dumps(figure))
            continue
        pixels = '500x375' if size == 'small' else '4000x3000'
        print(f'{figure["machine"]}, load {figure["load"]:.1f}; JPEGs of {pixels}, {figure["mean_kilobytes"]:.0f} kB')
        for name, value in figure['views_per_cpu_second'].items():
            clock = figure['milliseconds_of_the_clock'][name]
            print(f'{name:10} {value:7.1f} views/s of processor time, {clock:6.1f} ms of the clock each')
        for name, value in figure['times'].items():
            print(f'{name:20} {value:.2f} times as many')


if __name__ == '__main__':
    main()
