"""Any timm model as a teacher: from its name to log-probabilities of views, and what a store says about it."""

import hashlib
from contextlib import nullcontext
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from timm.models import load_checkpoint
from torch import nn

from ..base.errors import InputError

__all__ = ['ModelInput', 'Teacher', 'create_pretrained']


class ModelInput(nn.Module):
    """Views, uint8 [B, 3, H, W], as a model wants them, made on its device: resized if need be, and normalised.

    Args:
        mean: The model's mean, in units of the 0 to 1 pixel scale.
        std: The model's standard deviation.
        size: Height and width that the model takes; None to leave the views' own.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], size: tuple[int, int] | None = None):
        super().__init__()
        self.size = size
        self.register_buffer('scale', 1 / (255 * torch.tensor(std)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer('shift', -(torch.tensor(mean) / torch.tensor(std)).view(1, -1, 1, 1), persistent=False)

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        x = views.to(self.scale.dtype)
        if self.size is not None and x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode='bicubic', antialias=True)
        return (x * self.scale).add_(self.shift)


def create_pretrained(name: str, checkpoint: str | None = None, num_classes: int | None = None) -> nn.Module:
    """A timm model with its weights.

    Args:
        name: A timm name (`resnet50.a1_in1k`), `hf-hub:ORG/NAME`, `local-dir:PATH`, or the path of a folder with a
            timm `config.json`.
        checkpoint: A file of weights for the model of that name; its own pretrained weights by default.
        num_classes: Classes of the checkpoint's head.

    Raises:
        InputError: There is no such model, or its weights cannot be had.
    """
    folder = Path(name).expanduser()
    if (folder / 'config.json').is_file():
        name = f'local-dir:{folder}'
    elif (folder / 'best' / 'config.json').is_file():
        raise InputError(f'{name} is the folder of a run; give {name}/best, its most accurate model')
    kwargs = {} if num_classes is None else dict(num_classes=num_classes)
    model = None
    try:
        model = timm.create_model(name, pretrained=checkpoint is None, **kwargs)
        if checkpoint is not None:
            load_checkpoint(model, checkpoint, weights_only=True)
    except Exception as error:
        # Names, folders, Hub and checkpoints fail in as many ways as there are libraries behind them.
        lines = str(error).splitlines()
        if model is not None and isinstance(error, RuntimeError) and len(lines) > 1:
            raise InputError(
                f'the weights {checkpoint} are not those of {name} with {model.num_classes} classes '
                f'({shorten(" ".join(lines[1:]), 100, placeholder=" ...")}); give the model and the number of classes '
                f'that they were trained with')
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        weights = f'the weights {checkpoint}' if checkpoint else 'its pretrained weights'
        raise InputError(
            f'the model {name} with {weights} cannot be had: {reason}; give a timm name, hf-hub:ORG/NAME, or a folder '
            f'with config.json and model.safetensors')
    if not getattr(model, 'num_classes', 0):
        raise InputError(f'the model {name} has no classifier; a teacher needs one')
    return model


class Teacher:
    """A frozen timm model that looks at views.

    Args:
        model: A timm model with a classifier.
        name: What the store calls it.
        device: Where it runs.
        amp_dtype: Autocast to this type; None for float32.
        compile: Compile the model.
        size: Height and width of its input; by default those of its pretrained configuration.
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
        config = resolve_data_config({}, model=model)
        self.name = name
        self.device = torch.device(device)
        self.amp_dtype = amp_dtype
        self.num_classes = model.num_classes
        self.class_names = (model.pretrained_cfg or {}).get('label_names')
        self.mean, self.std = tuple(config['mean']), tuple(config['std'])
        self.size = tuple(size or config['input_size'][-2:])
        self.weights = _hash_weights(model)
        self._input = ModelInput(self.mean, self.std, self.size).to(self.device)
        self._model = model.to(self.device).eval().requires_grad_(False)
        if compile:
            self._model = torch.compile(self._model)

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
