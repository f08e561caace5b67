"""Any model as a teacher: logits or features of views, and what a store says about it."""

import hashlib
from contextlib import nullcontext
from textwrap import shorten
from typing import Any
from collections.abc import Sequence

import torch
from torch import nn

from ..base.errors import InputError
from ..data.classes import valid_names
from ..models.config_file import image_config
from ..models.features import feature_vectors
from ..models.loading import Normalize
from ..store.projection import Projection

__all__ = ['Teacher', 'architecture_of']

# Classes whose log-probabilities are kept of each image of the probe, evenly among all.
NUM_PROBE_CLASSES = 32


class Teacher:
    """A frozen model that looks at views.

    Args:
        model: A timm model, with a classifier unless it gives features; or any module from images to logits or, without
            `forward_features`, to features.
        name: What the store calls it.
        device: Where it runs.
        amp_dtype: Autocast to this type; None for float32.
        compile: Compile the model.
        size: Height and width of its input; by default those of its pretrained configuration.
        grid: Give features instead of logits: the map as a grid of so many cells a side, or with 0 the pooled vector.
        mean: Mean of the images that it takes, on the scale from 0 to 1; by default that of its configuration.
        std: Their standard deviation, likewise.

    Attributes:
        projection: Makes of the features what a store keeps; None for the features themselves.

    Raises:
        InputError: It takes images of another number of channels than views have, none of this size, or its outputs are
            not the logits of its classes.
    """

    def __init__(
            self,
            model: nn.Module,
            name: str,
            device: torch.device,
            amp_dtype: torch.dtype | None = None,
            compile: bool = False,
            size: tuple[int, int] | None = None,
            grid: int | None = None,
            mean: Sequence[float] | None = None,
            std: Sequence[float] | None = None,
    ):
        config = image_config(model, name)
        if (channels := config['input_size'][0]) != 3:
            raise InputError(f'the teacher {name} takes {channels} channel{"s" * (channels != 1)}, views have 3, red, '
                             f'green and blue; choose one that takes 3')
        self.name = name
        self.device = torch.device(device)
        self.amp_dtype = amp_dtype
        self.grid = grid
        self.projection: Projection | None = None
        self.mean = tuple(config['mean'] if mean is None else mean)
        self.std = tuple(config['std'] if std is None else std)
        self.size = tuple(size or config['input_size'][-2:])
        self.architecture = architecture_of(model)
        # A module that is none of timm's says neither classes nor names.
        self.num_classes = 0 if grid is not None else getattr(model, 'num_classes', None)
        self.weights = _hash_weights(model)
        self._input = Normalize(self.mean, self.std, self.size)
        self._model = model.cpu().eval().requires_grad_(False)
        if grid is not None:
            self._model = _Features(self._model, grid)
        self.probe = self._probe()
        names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
        self.class_names = valid_names(names, self.num_classes)
        self._input.to(self.device)
        self._model.to(self.device)
        if compile:
            self._model = torch.compile(self._model)

    @torch.inference_mode()
    def __call__(self, views: torch.Tensor) -> torch.Tensor:
        """Logits, float [B, C], or features, float [B, cells, D], of views, uint8 [B, 3, H, W], on its device."""
        autocast = nullcontext() if self.amp_dtype is None else torch.autocast(self.device.type, self.amp_dtype)
        with autocast:
            output = self._model(self._input(views.to(self.device, non_blocking=True)))
        return output.float() if self.projection is None else self.projection(output.float())

    def project(self, projection: Projection | None) -> None:
        """Give features as this projection makes them."""
        self.projection = projection and projection.to(self.device)

    @torch.inference_mode()
    def _probe(self) -> list[list[float]]:
        """Outputs for made images, which say what the weights do not: activation, pooling and so on.

        In float32 on the CPU, whatever the device: there rounding is 1,000 times below what QuickGELU makes of GELU. In
        bfloat16 it is above.
        """
        try:
            output = self._model(self._input(_probe_images(*self.size)))
            shape = [len(output) // 4, *output.shape[1:]]
        except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            if self.grid is not None and not isinstance(error, RuntimeError):
                raise InputError(f'the teacher {self.name} has no such features: {shorten(str(error), 300)}')
            raise InputError(
                f'the teacher {self.name} does not take an image of 3 channels and {self.size[0]}x{self.size[1]} '
                f'pixels: {shorten(str(error), 200)}; choose another, or export it with the input size that it takes')
        if self.grid is not None:
            self.num_features = shape[2]
            values = output.float().mean(dim=1)
        elif len(shape) == 2 and shape == [1, self.num_classes or shape[1]]:
            self.num_classes = shape[1]
            values = output.float().log_softmax(dim=1)
        else:
            raise InputError(
                f'the teacher {self.name} makes of one image an output of shape {shape}, expected '
                f'[1, {self.num_classes or "classes"}], one logit for each class; choose a classifier')
        picks = torch.linspace(0, values.shape[1] - 1, min(NUM_PROBE_CLASSES, values.shape[1])).round().long()
        # NaN is for the filling to find.
        return [[round(value, 5) for value in row]
                for row in values[:, picks].double().nan_to_num(0.).clamp(min=-50.).tolist()]

    def describe(self, batch_size: int) -> dict[str, Any]:
        """What a store's manifest says of its teacher."""
        return {
            'name': self.name,
            'architecture': self.architecture,
            'weights': self.weights,
            'mean': list(self.mean),
            'std': list(self.std),
            'input_size': [3, *self.size],
            'resize': 'bicubic, antialiased, where a view has another size',
            'dtype': str(self.amp_dtype or torch.float32).removeprefix('torch.'),
            'batch_size': batch_size,
            'device': self.device.type,
            'probe': self.probe,
        }


def architecture_of(model: nn.Module) -> str:
    """What kind of model it is: timm's name, or that of its class."""
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__


class _Features(nn.Module):
    """The features of a model, [B, cells, C], see `feature_vectors`."""

    def __init__(self, model: nn.Module, grid: int):
        super().__init__()
        self.model = model
        self.grid = grid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = getattr(self.model, 'forward_features', self.model)(x)
        return feature_vectors(self.model, features, x.shape[-2:], self.grid)


def _probe_images(height: int, width: int) -> torch.Tensor:
    """Images from integer arithmetic, uint8 [4, 3, H, W], the same on every machine."""
    y, x = torch.arange(height)[:, None], torch.arange(width)
    images = [[(x * (a + n) + y * (b + n) + (x * y) // (c + n)) % 256 for a, b, c in ((1, 2, 7), (3, 1, 11), (5, 7, 3))]
              for n in range(4)]
    return torch.stack([torch.stack(planes) for planes in images]).to(torch.uint8)


def _hash_weights(model: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {list(tensor.shape)}'.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
