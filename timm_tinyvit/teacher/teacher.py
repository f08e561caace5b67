"""Any timm model as a teacher: from its name to log-probabilities of views, and what a store says about it."""

import hashlib
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..base.errors import InputError
from ..data.classes import valid_names
from ..models.config_file import image_config
from ..models.loading import Normalize, look_at_zeros

__all__ = ['Teacher']


class Teacher:
    """A frozen timm model that looks at views.

    Args:
        model: A timm model with a classifier, or any module from images to logits.
        name: What the store calls it.
        device: Where it runs.
        amp_dtype: Autocast to this type; None for float32.
        compile: Compile the model.
        size: Height and width of its input; by default those of its pretrained configuration.

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
    ):
        config = image_config(model, name)
        if (channels := config['input_size'][0]) != 3:
            raise InputError(f'the teacher {name} takes {channels} channel{"s" * (channels != 1)}, views have 3, red, '
                             f'green and blue; choose one that takes 3')
        self.name = name
        self.device = torch.device(device)
        self.amp_dtype = amp_dtype
        self.mean, self.std = tuple(config['mean']), tuple(config['std'])
        self.size = tuple(size or config['input_size'][-2:])
        # A module that is none of timm's says neither.
        self.num_classes = getattr(model, 'num_classes', None) or self._count_classes(model)
        names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
        self.class_names = valid_names(names, self.num_classes)
        self.weights = _hash_weights(model)
        self._input = Normalize(self.mean, self.std, self.size).to(self.device)
        self._model = model.to(self.device).eval().requires_grad_(False)
        if compile:
            self._model = torch.compile(self._model)

    def _count_classes(self, model: nn.Module) -> int:
        """The logits of an empty image, where a model does not say how many classes it has."""
        try:
            logits = look_at_zeros(model, (3, *self.size))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f'the teacher {self.name} takes no image of {self.size[0]}x{self.size[1]} pixels: {error}')
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
            raise InputError(f'the teacher {self.name} gives no logits of [batch, classes] for an image; it needs a '
                             f'classifier')
        return logits.shape[1]

    @torch.inference_mode()
    def __call__(self, views: torch.Tensor) -> torch.Tensor:
        """Logits, float [B, C], of views, uint8 [B, 3, H, W], on the teacher's device."""
        autocast = nullcontext() if self.amp_dtype is None else torch.autocast(self.device.type, self.amp_dtype)
        with autocast:
            logits = self._model(self._input(views.to(self.device, non_blocking=True)))
        return logits.float()

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


def _hash_weights(model: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {list(tensor.shape)}'.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
