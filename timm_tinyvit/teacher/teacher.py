"""Any timm model as a teacher: from its name to logits or features of views, and what a store says about it."""

import hashlib
from contextlib import nullcontext
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import nn

from ..base.errors import InputError
from ..data.classes import valid_names
from ..models.features import feature_vectors
from ..models.loading import Normalize
from ..store.projection import Projection

__all__ = ['Teacher']


class Teacher:
    """A frozen timm model that looks at views.

    Args:
        model: A timm model; with a classifier, unless it gives features.
        name: What the store calls it.
        device: Where it runs.
        amp_dtype: Autocast to this type; None for float32.
        compile: Compile the model.
        size: Height and width of its input; by default those of its pretrained configuration.
        grid: Give features instead of logits: the map as a grid of so many cells a side, or with 0 the pooled vector.

    Attributes:
        projection: Makes of the features what a store keeps; None for the features themselves.

    Raises:
        InputError: It takes images of another number of channels than views have.
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
    ):
        config = resolve_data_config({}, model=model)
        if (channels := config['input_size'][0]) != 3:
            raise InputError(f'the teacher {name} takes {channels} channel{"s" * (channels != 1)}, views have 3, red, '
                             f'green and blue; choose one that takes 3')
        self.name = name
        self.device = torch.device(device)
        self.amp_dtype = amp_dtype
        self.grid = grid
        self.num_classes = model.num_classes if grid is None else 0
        self.projection: Projection | None = None
        self.class_names = valid_names((model.pretrained_cfg or {}).get('label_names'), self.num_classes)
        self.mean, self.std = tuple(config['mean']), tuple(config['std'])
        self.size = tuple(size or config['input_size'][-2:])
        self.weights = _hash_weights(model)
        self._input = Normalize(self.mean, self.std, self.size).to(self.device)
        self._model = model.to(self.device).eval().requires_grad_(False)
        if grid is not None:
            self._model = _Features(self._model, grid)
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

    def describe(self, batch_size: int) -> dict[str, Any]:
        """What a store's manifest says of its teacher."""
        return {
            'name': self.name,
            'weights': self.weights,
            'mean': list(self.mean),
            'std': list(self.std),
            'input_size': [3, *self.size],
            'resize': 'bicubic, antialiased, where a view has another size',
            'dtype': str(self.amp_dtype or torch.float32).removeprefix('torch.'),
            'batch_size': batch_size,
            'device': self.device.type,
        }


class _Features(nn.Module):
    """The features of a model, [B, cells, C], see `feature_vectors`."""

    def __init__(self, model: nn.Module, grid: int):
        super().__init__()
        self.model = model
        self.grid = grid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return feature_vectors(self.model, self.model.forward_features(x), x.shape[-2:], self.grid)


def _hash_weights(model: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {list(tensor.shape)}'.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
