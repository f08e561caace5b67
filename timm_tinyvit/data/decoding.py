"""Images cropped and resized as tensors by torch: a view of a large JPEG in two thirds of the time.

The resized pixels differ from Pillow's by 2 of 255 at most, because torch's filters round their weights otherwise. So
this is part of a store's view config, as decoder `torch`. JPEGs are decoded by simplejpeg where it is installed, with
the pixels that Pillow gives them.
"""

import io
import random
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms.v2 import functional as F

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

__all__ = ['TensorCrop', 'as_tensor', 'decode_jpeg']


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
    with Image.open(io.BytesIO(data)) as image:
        if image.mode != 'RGB' or image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return None
    try:
        return torch.from_numpy(simplejpeg.decode_jpeg(data, 'RGB')).permute(2, 0, 1)
    except ValueError:  # damaged; Pillow says how
        return None


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
