"""timm's training transforms as a pure function of (seed, epoch, index).

The same (seed, epoch, index, image, view config) gives the same bytes of the view: in any process, worker, order or
rank.
timm's factory makes the transform, timm's `RandomErasing` erases and timm's `FastCollateMixup` mixes the views of a
pair; nothing is augmented here. All random generators that timm draws from are seeded per view and put back as they
were found. `probe` hashes the views of made images, so that a machine whose libraries make other views is found out
before it trains on wrong targets.
"""

import hashlib
import platform
import random
import struct
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import PIL
import torch
from PIL import Image
from PIL import features as pillow_features
from timm.data import FastCollateMixup, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import Compose

from ..base.errors import InputError
from .decoding import JpegImage, TensorCrop, as_tensor, decode_image, keep_a_pixel
from .pairing import Pairing
from .view_config import ViewConfig

__all__ = [
    'Replay', 'check_probe', 'decode_image', 'library_versions', 'preserve_random_state', 'seed_view',
]

# What a decoder gives and views are made of.
DecodedImage = Image.Image | torch.Tensor | JpegImage

NUM_PROBE_VIEWS = 64
PROBE_JPEG = Path(__file__).with_name('probe.jpg')


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Leave the global generators of Python, numpy and torch (CPU) as they were found."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_view(seed: int, epoch: int, index: int) -> None:
    """Seed the global generators of Python, numpy and torch (CPU) for one view."""
    digest = hashlib.blake2b(struct.pack('<qqq', seed, epoch, index), digest_size=32).digest()
    random.seed(int.from_bytes(digest[:8], 'little'))
    np.random.seed(np.frombuffer(digest[8:24], dtype='<u4'))
    # torch.manual_seed would visit the accelerators too.
    torch.default_generator.manual_seed(int.from_bytes(digest[24:], 'little') >> 1)


class _NormalizedView:
    """A uint8 view as timm's `RandomErasing` knows images: normalised floats, of which it asks the size and sets some.

    What is set is brought back to the scale of pixels; the others need no conversion there and back.
    """
    dtype = torch.float32

    def __init__(self, view: torch.Tensor, mean: torch.Tensor, std: torch.Tensor):
        self.view, self.mean, self.std = view, mean, std
        self.size = view.size

    def __setitem__(self, region: tuple[slice, ...], values: torch.Tensor) -> None:
        self.view[region] = ((values * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)


class Replay:
    """The views of one seed and view config.

    timm applies random erasing to the normalised float image; a view is uint8. The draws are timm's own, and what was
    drawn is brought back to the pixel scale: values beyond it, 3.3% in mode `pixel`, are clipped, and all are rounded.
    Everything else equals timm's pipeline for the same draws, up to its normalisation.

    Args:
        config: How a view is made.
        seed: The store's seed.

    Raises:
        InputError: timm's factory refuses the view config.
    """

    def __init__(self, config: ViewConfig, seed: int):
        self.config = config
        self.seed = seed
        arguments = {
            key: value for key, value in asdict(config).items()
            if not key.startswith(('mixup', 'cutmix')) and key not in (
                'decoder', 'exif', 're_prob', 're_mode', 're_count')
        }
        # timm passes over what it does not know by its letters, and a store would have other views for good.
        odd = [part for part in (config.auto_augment or '').split('-')[1:] if not part.startswith('t')
               and not any(letter.isdigit() for letter in part)]
        if odd:
            raise InputError(f'the policy --aa {config.auto_augment} has a part {odd[0]!r} without a number; expected '
                             f'parts as in rand-m9-mstd0.5-inc1')
        try:
            # The factory leaves erasing out where it does not normalise.
            self._transform = create_transform(**arguments, is_training=True, normalize=False)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise InputError(f'timm cannot make the transform of this view config: {error!r}; check --aa, --scale, '
                             f'--ratio, --train-interpolation and the like')
        first, *others = self._transform.transforms
        if isinstance(first, RandomResizedCropAndInterpolation):
            first = keep_a_pixel(first)
            self._transform = Compose([TensorCrop(first) if config.decoder == 'torch' else first, *others])
        self._erase: Callable | None = None
        if config.re_prob > 0 and not config.no_aug:
            self._erase = RandomErasing(
                config.re_prob, mode=config.re_mode, max_count=config.re_count, num_splits=0, device='cpu')
            self._mean = torch.tensor(config.mean).view(3, 1, 1)
            self._std = torch.tensor(config.std).view(3, 1, 1)
        self._mixup: FastCollateMixup | None = None
        if config.is_mixed:
            # With the labels 0 and 1 of two classes, the mixed target is lambda.
            self._mixup = FastCollateMixup(
                config.mixup, config.cutmix, config.cutmix_minmax, config.mixup_prob, config.mixup_switch_prob,
                mode='pair', label_smoothing=0., num_classes=2)

    def decode(self, data: bytes | str | Path) -> DecodedImage:
        """An encoded image, or the file of one, as the view config's decoder gives it.

        With the decoder `torch` the pixels of a JPEG are decoded when views are made of them.

        Raises:
            OSError: It cannot be decoded.
        """
        if self.config.decoder == 'pillow':
            return decode_image(data)
        if not isinstance(data, bytes):
            data = Path(data).read_bytes()
        return JpegImage(data) if data.startswith(b'\xff\xd8') else as_tensor(decode_image(data))

    def __call__(self, image: DecodedImage, epoch: int, index: int) -> torch.Tensor:
        """The view of a sample in an epoch, uint8 [3, H, W], of an image that `decode` made.

        Raises:
            OSError: The image cannot be decoded.
        """
        with preserve_random_state():
            return self._view(image, epoch, index)

    def views(
            self,
            images: Sequence[DecodedImage],
            keys: Sequence[tuple[int, int]],
    ) -> list[torch.Tensor]:
        """The views, each uint8 [3, H, W], of images with their (epoch, index): cheaper than one by one."""
        with preserve_random_state():
            return [self._view(image, *key) for image, key in zip(images, keys, strict=True)]

    def views_of(self, data: bytes | str | Path, keys: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """The views, each uint8 [3, H, W], of one encoded image, or the file of one, for each (epoch, index).

        It leaves the global generators seeded: call it inside of `preserve_random_state`, once for many images.

        Raises:
            OSError: The image cannot be decoded.
        """
        image = self.decode(data)
        return [self._view(image, *key) for key in keys]

    def mix(
            self,
            pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
            keys: Sequence[tuple[int, int]],
    ) -> list[tuple[torch.Tensor, float]]:
        """Mixup or CutMix of the views of pairs, as the view config says; what is drawn goes for both sides of a pair.

        Args:
            pairs: Two views each, both uint8 [3, H, W], which may be overwritten.
            keys: The (epoch, number of the pair) of each, see `Pairing`.

        Returns:
            Of each pair, both mixed views, uint8 [2, 3, H, W], and lambda: the share of either in its own mixed view.
        """
        mixed = []
        with preserve_random_state():
            for (first, second), (epoch, pair) in zip(pairs, keys, strict=True):
                # Samples have no negative position, so that no view has the same draws.
                seed_view(self.seed, epoch, -1 - pair)
                views, targets = self._mixup([(first, 0), (second, 1)])
                mixed.append((views, targets[0, 0].item()))
        return mixed

    def _view(self, image: DecodedImage, epoch: int, index: int) -> torch.Tensor:
        seed_view(self.seed, epoch, index)
        view = self._transform(image).contiguous()
        if self._erase is not None:
            self._erase(_NormalizedView(view, self._mean, self._std))
        return view

    def probe(self) -> str:
        """Hash of 64 views of made images, one of them a JPEG: equal where the libraries make equal views."""
        images = [self.decode(PROBE_JPEG), *_probe_images()]
        if self.config.decoder == 'torch':
            images[1:] = map(as_tensor, images[1:])
        digest = hashlib.blake2b(digest_size=16)
        keys = [(number // len(images), number) for number in range(NUM_PROBE_VIEWS)]
        views = self.views([images[index % len(images)] for _, index in keys], keys)
        small_views = []
        if self.config.decoder == 'torch':
            # Small enough that the JPEG is decoded at every scale.
            small = replace(self.config, input_size=(3, 6, 6), mixup=0., cutmix=0., cutmix_minmax=None)
            small_views = Replay(small, self.seed).views(images[:1] * NUM_PROBE_VIEWS, keys)
        for view in [*views, *small_views]:
            digest.update(view.numpy())
        if self.config.is_mixed:
            numbers = np.arange(NUM_PROBE_VIEWS // 2)
            pairs = Pairing(self.seed, NUM_PROBE_VIEWS).members(0, numbers).tolist()
            mixed = self.mix([(views[a], views[b]) for a, b in pairs], [(0, number) for number in numbers.tolist()])
            for both, lam in mixed:
                digest.update(both.numpy())
                digest.update(struct.pack('<d', lam))
        return digest.hexdigest()


def _probe_images() -> list[Image.Image]:
    """Images from integer arithmetic, the same on every machine."""
    images = []
    for width, height in ((500, 375), (320, 333), (97, 64), (28, 28)):
        y, x = np.mgrid[:height, :width]
        planes = [(x * a + y * b + (x * y) // c) % 256 for a, b, c in ((1, 2, 7), (3, 1, 11), (5, 7, 3))]
        images.append(Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8)))
    return images


def library_versions() -> dict[str, str]:
    """Versions of everything that has a hand in the bytes of a view."""
    names = ('timm', 'torchvision', 'torch', 'numpy', 'datasets')
    turbo = pillow_features.version_feature('libjpeg_turbo')
    return {
        **{name: version(name) for name in names},
        'pillow': PIL.__version__,
        'libjpeg': f'turbo {turbo}' if turbo else str(pillow_features.version_codec('jpg')),
        'python': platform.python_version(),
    }


def check_probe(replay: Replay, probe: str, versions: dict[str, str]) -> str | None:
    """Compare this machine's views with those that a store was made from.

    Args:
        replay: The store's view config and seed.
        probe: The store's probe.
        versions: The versions that the store was made with.

    Returns:
        A line for the log where versions differ and the views do not, or None.

    Raises:
        InputError: The views differ: teacher and student would not see the same.
    """
    here = library_versions()
    changed = [
        f'{name} {versions.get(name, "unknown")} -> {here.get(name, "none")}'
        for name in {**versions, **here} if versions.get(name) != here.get(name)
    ]
    if replay.probe() != probe:
        raise InputError(
            f'this machine makes other views than the store was made from ('
            f'{", ".join(changed) or "with the same versions, so the hardware or a patched library"}); '
            f'install the store\'s versions, or make a new store here')
    return f'other versions, same views: {", ".join(changed)}' if changed else None
