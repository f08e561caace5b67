"""Models with their weights, and their input: from a name, a folder or a file to a timm model."""

from pathlib import Path
from textwrap import shorten

import timm
import torch
import torch.nn.functional as F
from timm.models import load_checkpoint
from torch import nn

from ..base.errors import InputError

__all__ = ['ModelInput', 'config_beside', 'create_pretrained']


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


def config_beside(weights: str | None) -> Path | None:
    """The config.json that describes the model of these weights, None where there is none.

    Args:
        weights: A file of weights, or its folder.
    """
    if not weights:
        return None
    path = Path(weights).expanduser()
    folder = path if path.is_dir() else path.parent
    # A run's checkpoints lie beside the folder of what it exported last.
    return next((file for file in (folder / 'config.json', folder / 'last' / 'config.json') if file.is_file()), None)
