"""Decoding: from an encoded image to upright RGB of 8 bits, the same for teacher, student and evaluation.

docs/data.md has the policy on one page: the kinds of files that are read, how each mode becomes RGB, what is refused.
With the decoder `torch` of a view config, crops are resized as tensors by torch: a view of a large JPEG in two
thirds of the time. Its pixels differ from Pillow's by 2 of 255 at most, because torch's filters round their weights
otherwise. JPEGs are then decoded by simplejpeg where it is installed, with the pixels that Pillow gives them.
"""

import functools
import io
import os
import random
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from collections.abc import Iterator

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms.v2 import functional as F

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

__all__ = [
    'FORMATS', 'TensorCrop', 'as_tensor', 'decode_image', 'decode_jpeg', 'identify', 'image_endings', 'keep_a_pixel',
]

# Those of Pillow's formats whose decoders are made for pictures and run in this process: EPS would start Ghostscript.
FORMATS = (
    'JPEG', 'PNG', 'WEBP', 'AVIF', 'BMP', 'DIB', 'GIF', 'ICO', 'JPEG2000', 'PCX', 'PPM', 'PSD', 'QOI', 'SGI', 'SUN',
    'TIFF', 'TGA')
MAX_PIXELS = 'TIMM_TINYVIT_MAX_PIXELS'

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TIFF_BITS, TIFF_PHOTOMETRIC = 258, 262

# Text beside the pixels may be longer than Pillow's 1 MB a piece; all of it together is bounded by 64 MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def identify(source: bytes | str | Path) -> Image.Image:
    """An encoded image, or the file of one, whose header alone is read.

    Raises:
        OSError: It is of none of `FORMATS`, or has too many pixels.
    """
    if limit := os.environ.get(MAX_PIXELS):
        if not limit.isdecimal():
            raise OSError(f'the environment variable {MAX_PIXELS} is {limit!r}, expected a number')
        # Pillow refuses twice as many as this, and warns from here on.
        Image.MAX_IMAGE_PIXELS = int(limit) / 2
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())
    except UnidentifiedImageError:
        raise OSError(f'it is no image of a kind that is read ({", ".join(_formats())})')
    except Image.DecompressionBombError as error:
        raise OSError(f'{str(error).rstrip(".")}; set the environment variable {MAX_PIXELS} to more to read it')


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    # A Pillow of one's own making may lack some.
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def image_endings() -> frozenset[str]:
    """The endings of files of `FORMATS`, in lower case with their dot."""
    names = (*_formats(), 'MPO')  # of several JPEGs, read as the first
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in names)


def decode_image(data: bytes | str | Path) -> Image.Image:
    """An encoded image, or the file of one, as the RGB image that the transforms see, turned upright by its EXIF tag.

    Raises:
        OSError: Pillow cannot decode it, or its pixels have no known range.
    """
    with _decoding():
        image = identify(data)
        image.load()
        turn, image = _turn(image), _to_rgb(image)
        return image if turn is None else image.transpose(turn)


@contextmanager
def _decoding() -> Iterator[None]:
    """Without warnings, and with one kind of error."""
    with warnings.catch_warnings():
        # Files with odd EXIF blocks or palettes are decoded all the same.
        warnings.simplefilter('ignore')
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            # Pillow's readers of damaged files raise what happens to them: RuntimeError, struct.error, TypeError.
            raise OSError(error)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns an image upright, None where it is; an EXIF block that cannot be read says nothing."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB; of more than 8 bits the highest 8, as Pillow itself takes them of 16-bit RGB.

    Raises:
        ValueError: Its pixels are of no known range.
    """
    tags: dict[int, Any] = getattr(image, 'tag_v2', {})
    if image.mode.startswith('I;16') or image.mode == 'I' and image.format == 'PPM':
        # Pillow would clip each value to 255. A TIFF may have fewer bits, and may count from white.
        bits = tags.get(TIFF_BITS, (16,))[0]
        values = (np.asarray(image) >> bits - 8).astype(np.uint8)
        image = Image.fromarray(255 - values if tags.get(TIFF_PHOTOMETRIC) == 0 else values)
    elif image.mode in ('I', 'F'):
        kind = '32-bit integers' if image.mode == 'I' else 'real numbers'
        raise ValueError(f'its pixels are {kind} (mode {image.mode}), whose range is not known; save it with 8 or 16 '
                         f'bits')
    return image if image.mode == 'RGB' else image.convert('RGB')


def as_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as uint8 [3, H, W], channels last in memory, as torch resizes them fastest."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode_jpeg(data: bytes | str | Path) -> torch.Tensor | None:
    """An upright RGB JPEG, or the file of one, as uint8 [3, H, W]; None for whatever else it is."""
    if simplejpeg is None:
        return None
    if not isinstance(data, bytes):
        data = Path(data).read_bytes()
    if not data.startswith(b'\xff\xd8'):
        return None
    with _decoding():
        image = identify(data)
        if image.mode != 'RGB' or _turn(image) is not None:
            return None
    try:
        return torch.from_numpy(simplejpeg.decode_jpeg(data, 'RGB')).permute(2, 0, 1)
    except ValueError:  # damaged; Pillow says how
        return None


def keep_a_pixel(crop: RandomResizedCropAndInterpolation) -> RandomResizedCropAndInterpolation:
    """Have timm's random resized crop keep a pixel at least: of one or two it may keep none, which gives a black view.
    """
    crop.get_params = _crop_of_a_pixel
    return crop


def _crop_of_a_pixel(
        image: Image.Image | torch.Tensor,
        scale: tuple[float, float],
        ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, scale, ratio)
    image_width, image_height = F.get_size(image)[::-1]
    height, width = max(height, 1), max(width, 1)
    return min(top, image_height - height), min(left, image_width - width), height, width


class TensorCrop:
    """timm's random resized crop, with its draws, for uint8 tensors [3, H, W]; gives the PIL image of what is left."""

    def __init__(self, crop: RandomResizedCropAndInterpolation):
        self.crop = crop

    def __call__(self, image: torch.Tensor) -> Image.Image:
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        interpolation = self.crop.interpolation
        if isinstance(interpolation, (tuple, list)):
            interpolation = random.choice(interpolation)
        # Torch keeps the memory format only of what is whole in it; pixel after pixel it is faster, and as Pillow's.
        part = image.permute(1, 2, 0)[top:top + height, left:left + width].contiguous().permute(2, 0, 1)
        view = F.resize(part, self.crop.size, interpolation, antialias=True)
        return Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())
