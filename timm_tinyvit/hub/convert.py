"""Official checkpoints of TinyViT and of its teacher, as the Hub and plain timm take them.

    timm-tinyvit convert tiny_vit_21m_22kto1k_384_distill.pth --model tiny_vit_21m_384 --output converted

The folder holds model.safetensors, config.json and a card; `timm.create_model('local-dir:FOLDER', pretrained=True)`
makes the model, with or without this package, and `timm-tinyvit publish FOLDER --repo ORG/NAME` pushes it. The config
asks for the test crop of the official evaluation, which the paper's accuracies belong to; timm's own tags ask for
another at 224 and 384. Nothing in a checkpoint is ever executed, and a checkpoint that does not fit leaves no folder
behind.
"""

import os
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo
from torch import nn

from ..base.errors import InputError
from ..base.files import remove_leftovers, temporary_beside, write_atomic
from ..models import clip_teacher, tiny_vit
from ..models.imagenet22k import NUM_CLASSES_22K
from ..models.loading import read_weights
from ..models.saving import export_model
from .model_card import CARD, NO_REPO
from .official import converted_card, find_checkpoint

__all__ = ['convert_checkpoint', 'official_config']

TINY_VITS = ('tiny_vit_5m_224', 'tiny_vit_11m_224', 'tiny_vit_21m_224', 'tiny_vit_21m_384', 'tiny_vit_21m_512')
TEACHER = 'clip_vit_large_patch14_224'
# the same model under the name by which plain timm knows it
TEACHER_IN_TIMM = 'vit_large_patch14_clip_quickgelu_224'
# by the number of classes
IMAGENETS = {1000: 'imagenet-1k', NUM_CLASSES_22K: 'imagenet-22k'}
# official evaluation: at 224 the middle of an image of 256, above it the whole image, squashed
CROPS = {
    224: (dict(crop_pct=224 / 256, crop_mode='center'), 'shorter side to 256, then the middle 224x224'),
    384: (dict(crop_pct=1.0, crop_mode='squash'), 'the whole image squashed to 384x384'),
    512: (dict(crop_pct=1.0, crop_mode='squash'), 'the whole image squashed to 512x512'),
}


def _first_difference(weights: dict[str, torch.Tensor], model: nn.Module) -> str | None:
    expected = model.state_dict()
    for name in expected:
        if name not in weights:
            return f'has no {name}'
        if weights[name].shape != expected[name].shape:
            return f'has {name} of shape {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}'
    for name in weights:
        if name not in expected:
            return f'has {name} besides'
    return None


def _fit_tiny_vit(weights: dict[str, torch.Tensor], name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    weights = tiny_vit.rename_official(weights)
    classifier = weights.get('head.fc.weight')
    num_classes = 1000 if classifier is None else len(classifier)
    differences = {}
    for variant in (name, *TINY_VITS):
        model = timm.create_model(variant, num_classes=num_classes, device='meta')
        differences[variant] = _first_difference(weights, model)
        if differences[variant] is None:
            if variant == name:
                return model, weights
            raise InputError(f'it holds the weights of {variant}, not of {name}; give it --model {variant}')
    raise InputError(f'it does not fit {name}: it {differences[name]}')


def _fit_teacher(weights: dict[str, torch.Tensor]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    if 'visual.proj' not in weights:
        raise InputError(f'it does not fit {TEACHER}: it has no visual.proj')
    classifier = weights.get('head.weight')
    num_classes = 21841 if classifier is None else len(classifier)
    model = timm.create_model(TEACHER_IN_TIMM, num_classes=num_classes, device='meta')
    weights = clip_teacher.checkpoint_filter_fn(weights, model)
    difference = _first_difference(weights, model)
    if difference is not None:
        raise InputError(f'it does not fit {TEACHER}: it {difference}')
    return model, weights


def official_config(name: str, num_classes: int) -> dict[str, Any]:
    """What the config of an official checkpoint says beside the model: `label_names` and `label_descriptions` of the
    ImageNet with so many classes, and the `data_config` of the official evaluation."""
    labels = {}
    if num_classes in IMAGENETS:
        info = ImageNetInfo(IMAGENETS[num_classes])
        labels = dict(label_names=info.label_names(), label_descriptions=info.label_descriptions(as_dict=True))
    return dict(labels, data_config=dict(_crop(name)[0], interpolation='bicubic'))


def _crop(name: str) -> tuple[dict[str, Any], str]:
    return CROPS[int(name.rsplit('_', 1)[1])]


def convert_checkpoint(checkpoint: Path, name: str, output: Path) -> str:
    """Convert an official checkpoint into a folder that plain timm loads.

    Args:
        checkpoint: An official .pth file.
        name: Name of the model whose weights it holds.
        output: Folder to make, with model.safetensors, config.json and a card, README.md.

    Returns:
        Lines for the user: what was converted, the test crop of its published accuracy, and how to load it.

    Raises:
        InputError: The checkpoint cannot be read or holds other weights, or the folder is there already.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f'{output} is there already; name a folder that is new or empty')
    # Checkpoints of a training run carry its settings in a class that is but a dict.
    with torch.serialization.safe_globals([(OrderedDict, 'yacs.config.CfgNode')]), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # on the pickle protocol of what is refused anyway
        weights = read_weights(str(checkpoint))
    try:
        model, weights = _fit_teacher(weights) if name == TEACHER else _fit_tiny_vit(weights, name)
    except InputError as error:
        raise InputError(f'{checkpoint} cannot be converted: {error}')
    broken = next((key for key, value in weights.items() if not torch.isfinite(value).all()), None)
    if broken is not None:
        raise InputError(f'{checkpoint} cannot be converted: its {broken} holds values that are not finite')
    model.load_state_dict(weights, assign=True)

    remove_leftovers(output.parent, output.name)
    try:
        with temporary_beside(output) as temporary:
            export_model(temporary, model, **official_config(name, model.num_classes))
            card = converted_card(temporary, checkpoint.name, find_checkpoint(checkpoint.name, name), NO_REPO)
            write_atomic(temporary / CARD, str(card).encode())
            os.replace(temporary, output)
    except OSError as error:
        raise InputError(f'{output} cannot be written: {error.strerror or error}')
    return '\n'.join([
        f'{output}: {name} with {model.num_classes} classes',
        f'test crop: {_crop(name)[1]}, as in the official evaluation; the accuracies of the paper belong to it',
        f"load it with: timm.create_model('local-dir:{output}', pretrained=True)"])
