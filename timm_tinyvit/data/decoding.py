"""Decoding: from an encoded image to upright RGB of 8 bits, the same for teacher, student and evaluation.

docs/data.md has the policy on one page: the kinds of files that are read, how each mode becomes RGB, what is refused.
With the decoder `torch` of a view config, a view gets what its crop needs: where the crop of a JPEG is large, it is
decoded at a half, a quarter or an eighth of its size, which the format makes cheap, and all other crops are resized as
tensors by torch. Pixels differ from Pillow's by 2 of 255 at most where the whole image is decoded, because torch's
filters round their weights otherwise, and by about 1 in the mean where it is not. Whole JPEGs are then decoded by
simplejpeg where it is installed, with the pixels that Pillow gives them.
"""

import functools
import io
import math
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
from torchvision.transforms.functional import pil_modes_mapping
from torchvision.transforms.v2 import functional as F

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

__all__ = [
    'FORMATS', 'JpegImage', 'TensorCrop', 'as_tensor', 'decode_image', 'identify', 'image_endings', 'keep_a_pixel',
    'orientation', 'upright_rgb',
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
TURNS_OF_A_SIDE = [TURNS[orientation] for orientation in (5, 6, 7, 8)]
# Those that make the last column the first, or the last row.
FROM_THE_RIGHT = [TURNS[orientation] for orientation in (2, 3, 6, 7)]
FROM_BELOW = [TURNS[orientation] for orientation in (3, 4, 7, 8)]
# A JPEG is decoded at one of these scales if the sides of the crop still have this many times the pixels of the view's.
# The views of sharp photographs then differ from those of the whole image by 0.5 to 1.1 levels of 255 in the mean. With
# no more pixels than the view has it would be 1.3 to 3, and a view of 12 megapixels a fifth cheaper.
DENOMINATORS = (8, 4, 2)
SPARE = 2
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339
SIGNED = 2  # as sample format

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
        if kind := _begins_as(source):
            raise OSError(f'it begins as a {kind} file, but its header is damaged or its pixels are of a layout that '
                          f'Pillow does not read; save it with 8 or 16 bits, grey or RGB')
        raise OSError(f'it is no image of a kind that is read ({", ".join(_formats())})')
    except Image.DecompressionBombError as error:
        raise OSError(f'{str(error).rstrip(".")}; set the environment variable {MAX_PIXELS} to more to read it')


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    # A Pillow of one's own making may lack some.
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _begins_as(source: bytes | str | Path) -> str | None:
    """Which of the kinds that are read an image says to be, by its first bytes."""
    if isinstance(source, bytes):
        head = source[:16]
    else:
        with open(source, 'rb') as file:
            head = file.read(16)
    head = head.ljust(16, b'\0')
    accepts = ((name, Image.OPEN[name][1]) for name in _formats())
    return next((name for name, accept in accepts if accept is not None and accept(head) is True), None)


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
        return upright_rgb(image)


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


def upright_rgb(image: Image.Image) -> Image.Image:
    """A loaded image in RGB, turned upright by its EXIF tag.

    Raises:
        ValueError: Its pixels are of no known range.
    """
    turn, image = orientation(image), _to_rgb(image)
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> Image.Transpose | None:
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
    if SIGNED in tags.get(TIFF_SAMPLE_FORMAT, ()) and tags.get(TIFF_BITS, (1,))[0] <= 16:
        raise ValueError('its pixels are signed integers, whose range is not known; save it with 8 or 16 bits')
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


class JpegImage:
    """A JPEG whose header alone is read; its pixels are decoded when a view needs them, at the scale that it needs.

    Args:
        data: Its bytes.

    Attributes:
        size: Width and height once it is upright.

    Raises:
        OSError: Its header is damaged, or has too many pixels.
    """

    def __init__(self, data: bytes):
        with _decoding():
            image = identify(data)
            self._turn = orientation(image)
        self._data = data
        self._is_rgb = image.mode == 'RGB'
        self._reduced: dict[int, Image.Image] = {}
        self.size = image.size[::-1] if self._turn in TURNS_OF_A_SIDE else image.size

    @functools.cached_property
    def pixels(self) -> torch.Tensor:
        """All pixels, uint8 [3, H, W].

        Raises:
            OSError: It cannot be decoded.
        """
        if simplejpeg is not None and self._is_rgb and self._turn is None:
            try:
                return torch.from_numpy(simplejpeg.decode_jpeg(self._data, 'RGB')).permute(2, 0, 1)
            except ValueError:  # damaged; Pillow says how
                pass
        return as_tensor(decode_image(self._data))

    def crop(self, box: tuple[int, int, int, int], denominator: int) -> tuple[Image.Image, tuple[float, ...]]:
        """A part of the image, decoded at one scale.

        Args:
            box: Left, top, right and bottom of the part, in pixels of the whole image.
            denominator: 2, 4 or 8: how many pixels of a side become one.

        Returns:
            A piece of the image at this scale, and where in it the part lies, in fractions of its pixels.

        Raises:
            OSError: It cannot be decoded.
        """
        if denominator not in self._reduced:
            with _decoding():
                image = identify(self._data)
                image.draft(None, (image.width // denominator, image.height // denominator))
                image.load()
                image = _to_rgb(image)
                self._reduced[denominator] = image if self._turn is None else image.transpose(self._turn)
        image = self._reduced[denominator]
        # The last column and row stand for fewer pixels than the others; a turn may have made them the first.
        before = [
            (length - whole / denominator) * (self._turn in turns)
            for length, whole, turns in zip(image.size, self.size, (FROM_THE_RIGHT, FROM_BELOW))]
        left, top, right, bottom = (edge / denominator + before[number % 2] for number, edge in enumerate(box))
        piece = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
        return image.crop(piece), (left - piece[0], top - piece[1], right - piece[0], bottom - piece[1])


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
    """timm's random resized crop, with its draws, for uint8 tensors [3, H, W] and JPEGs; gives a PIL image."""

    def __init__(self, crop: RandomResizedCropAndInterpolation):
        self.crop = crop

    def __call__(self, image: torch.Tensor | JpegImage) -> Image.Image:
        whole = image
        if isinstance(image, JpegImage):
            # What timm draws from: an image that has a size and no pixels.
            whole = torch.empty((3, *image.size[::-1]), device='meta')
        top, left, height, width = self.crop.get_params(whole, self.crop.scale, self.crop.ratio)
        interpolation = self.crop.interpolation
        if isinstance(interpolation, (tuple, list)):
            interpolation = random.choice(interpolation)
        if isinstance(image, JpegImage):
            shrinking = min(height / self.crop.size[0], width / self.crop.size[1])
            denominator = next((number for number in DENOMINATORS if shrinking >= number * SPARE), 1)
            if denominator > 1:
                part, box = image.crop((left, top, left + width, top + height), denominator)
                return part.resize(self.crop.size[::-1], pil_modes_mapping[interpolation], box)
            image = image.pixels
        # Torch keeps the memory format only of what is whole in it; pixel after pixel it is faster, and as Pillow's.
        part = image.permute(1, 2, 0)[top:top + height, left:left + width].contiguous().permute(2, 0, 1)
        view = F.resize(part, self.crop.size, interpolation, antialias=True)
        return Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())
