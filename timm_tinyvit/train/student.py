"""The model that learns: any timm model, at the size of the views, from the weights that the flags name.

Weights come from timm, from a run of this project, or from the official code; a model with a `checkpoint_filter_fn`
in its module makes them fit, windows and names included. A classifier of ImageNet-22k becomes the one of ImageNet-1k
that the paper's fine-tuning starts from; one of any other classes starts from zero, as in the paper's code.
"""

import argparse
import sys
from pathlib import Path
from textwrap import shorten
from collections.abc import Callable, Sequence

import timm
import torch
from timm.models import load_state_dict
from timm.models._hub import HF_SAFE_WEIGHTS_NAME
from torch import nn

from ..base.errors import InputError
from ..models.imagenet22k import NUM_CLASSES_22K, classifier_22k_to_1k, imagenet1k_in_22k

__all__ = ['create_student', 'freeze_batch_norm', 'load_weights', 'look_at_zeros', 'set_image_size']


def create_student(
        args: argparse.Namespace,
        num_classes: int | None = None,
        size: tuple[int, int] | None = None,
        log: Callable[[str], None] | None = None,
) -> nn.Module:
    """The student that the flags describe.

    Args:
        args: The flags of the group `student`, and `channels_last`.
        num_classes: Classes of its head; by default those of its weights.
        size: Height and width of its input; by default its own.
        log: Told what becomes of a classifier of other classes; without it only ImageNet-22k's is taken.

    Raises:
        InputError: There is no such model, or its weights do not fit it.
    """
    kwargs = {'drop_rate': args.drop, **args.model_kwargs}
    if args.drop_path is not None:
        kwargs['drop_path_rate'] = args.drop_path
    try:
        if num_classes is None and args.initial_checkpoint:
            num_classes = _num_classes(timm.create_model(args.model, **kwargs), _read_weights(args.initial_checkpoint))
        head = {} if num_classes is None else {'num_classes': num_classes}
        model = timm.create_model(args.model, pretrained=args.pretrained, **head, **kwargs)
        if args.pretrained and _is_22k_to_1k(model.pretrained_cfg.get('num_classes'), num_classes):
            model = classifier_22k_to_1k(
                timm.create_model(args.model, pretrained=True, num_classes=NUM_CLASSES_22K, **kwargs))
        if size is not None:
            set_image_size(model, size)
        if args.initial_checkpoint:
            load_weights(model, args.initial_checkpoint, log)
        look_at_zeros(model, (3, *(size or model.pretrained_cfg['input_size'][-2:])))
    except InputError:
        raise
    except Exception as error:
        if args.drop_path is not None and "'drop_path_rate'" in str(error):
            raise InputError(f'the model {args.model} has no drop path; leave --drop-path out')
        # Unknown names, arguments, files and Hub failures each raise their own kind.
        reason = f'{type(error).__name__} {error}'.splitlines()[0]
        pixels = f' for {size[0]}x{size[1]} pixels' if size else ''
        raise InputError(f'the student {args.model} cannot be made{pixels}: {reason}; check --model, --model-kwargs, '
                         f'--img-size, --num-classes and --initial-checkpoint')
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def set_image_size(model: nn.Module, size: tuple[int, int]) -> None:
    """Have a model take images of this height and width; one without such a setting takes any, or refuses later."""
    if hasattr(model, 'set_input_size'):
        model.set_input_size(img_size=size)


def look_at_zeros(model: nn.Module, input_size: Sequence[int]) -> None:
    """Give an empty image, [C, H, W], to a model: one of a fixed size says so only when it sees another one."""
    with torch.no_grad():
        model.eval()(torch.zeros(1, *input_size))


def load_weights(model: nn.Module, path: str, log: Callable[[str], None] | None = None) -> None:
    """Load weights into a timm model; from a head of ImageNet-22k to one of ImageNet-1k as the paper does.

    Args:
        model: The model, at its final size.
        path: Safetensors, a checkpoint that loads with `weights_only`, or a folder with model.safetensors.
        log: Told what becomes of a classifier of other classes; without it only ImageNet-22k's is taken.

    Raises:
        InputError: The file holds no weights.
        ValueError: The weights are of another model.
        OSError: There is no such file.
    """
    weights = _read_weights(path)
    # timm's convention: the filter of an architecture stands in its module.
    fit = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
    if fit is not None:
        weights = fit(weights, model)
    there, classifier = _num_classes(model, weights), model.get_classifier()
    try:
        if _is_22k_to_1k(there, model.num_classes):
            model.reset_classifier(NUM_CLASSES_22K)
            model.load_state_dict(weights)
            classifier_22k_to_1k(model)
            if log:
                log(f'{path}: the classifier of ImageNet-22k gives the rows of the classes of ImageNet-1k')
        elif log and there not in (None, model.num_classes) and isinstance(classifier, nn.Linear):
            name = next(name for name, module in model.named_modules() if module is classifier)
            zeros = {f'{name}.{key}': torch.zeros_like(value) for key, value in classifier.state_dict().items()}
            model.load_state_dict({**weights, **zeros})
            log(f'{path}: its classifier has {there} classes, the student {model.num_classes}; it starts from zero')
        else:
            model.load_state_dict(weights)
    except RuntimeError as error:
        reason = shorten(' '.join(str(error).splitlines()[1:]), 100, placeholder=' ...')
        raise ValueError(f'the weights {path} are of another model ({reason})')


def _read_weights(path: str) -> dict[str, torch.Tensor]:
    file = Path(path).expanduser()
    file = file / HF_SAFE_WEIGHTS_NAME if file.is_dir() else file
    if not file.is_file():
        raise InputError(f'there is no file {file}; give a file of weights, or a folder with one such as RUN/last')
    try:
        weights = load_state_dict(str(file), weights_only=True)
    except Exception as error:
        # Damaged archives and foreign pickles fail in as many ways as there are bytes.
        raise InputError(f'the file {file} holds no weights that can be read ({type(error).__name__}); give '
                         f'safetensors, or a checkpoint of torch that loads with weights_only')
    if not any(isinstance(value, torch.Tensor) for value in weights.values()):
        raise InputError(f'the file {file} holds no weights; give a state dict')
    return weights


def _num_classes(model: nn.Module, weights: dict[str, torch.Tensor]) -> int | None:
    """Classes of the weights' classifier, under timm's or the official code's name."""
    classifier = model.get_classifier()
    names = [name for name, module in model.named_modules() if module is classifier]
    found = [weights[f'{name}.bias'].shape[0] for name in (*names, 'head') if f'{name}.bias' in weights]
    return found[0] if found else None


def _is_22k_to_1k(there: int | None, here: int | None) -> bool:
    return there == NUM_CLASSES_22K and here == len(imagenet1k_in_22k())


def freeze_batch_norm(model: nn.Module) -> None:
    """Put batch norms in evaluation mode, to be called after each `train()`: statistics stay, weights and biases learn.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
