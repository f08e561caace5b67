"""Models with their weights, and their input: from a name, a folder or a file to a timm model."""

import sys
from pathlib import Path
from textwrap import shorten
from typing import Any
from collections.abc import Callable, Sequence

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from timm.models import load_state_dict
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, hf_split
from torch import nn

from ..base.checksum import check_checksum
from ..base.errors import InputError
from ..base.hub_client import reason_of
from .config_file import CONFIG, image_config, read_config
from .hf_classifier import PREFIX, load_classifier
from .imagenet22k import NUM_CLASSES_22K, classifier_22k_to_1k, imagenet1k_in_22k

__all__ = [
    'Normalize', 'check_folder', 'check_weights', 'config_beside', 'create_model', 'create_pretrained', 'is_22k_to_1k',
    'load_weights', 'look_at_zeros', 'num_classes_of', 'read_weights', 'set_image_size',
]


class Normalize(nn.Module):
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


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, where weights that this package has written are as they were written, or are refused.

    Raises:
        InputError: They are not.
        Exception: Whatever timm raises.
    """
    if name.startswith('hf-hub:'):
        check_hub_config(name)
    if pretrained and name.startswith('local-dir:'):
        check_weights(Path(name.removeprefix('local-dir:')) / HF_SAFE_WEIGHTS_NAME)
    model = timm.create_model(name, pretrained=pretrained, **kwargs)
    if pretrained and (location := model.pretrained_cfg.get('hf_hub_id')):
        repo, revision = hf_split(location)
        cached = try_to_load_from_cache(repo, HF_SAFE_WEIGHTS_NAME, revision=revision)
        if isinstance(cached, str):
            check_weights(Path(cached))
    return model


def check_weights(file: Path) -> None:
    """Compare a file of weights with its checksum, where it has one, as what this package writes does.

    Raises:
        InputError: It is not as it was written.
    """
    if file.is_file():
        try:
            check_checksum(file)
        except InputError as error:
            raise InputError(f'{error}; copy or download it again, or take another checkpoint')


def create_pretrained(
        name: str,
        checkpoint: str | None = None,
        num_classes: int | None = None,
        needs_classifier: bool = True,
) -> nn.Module:
    """A timm model with its weights.

    Args:
        name: A timm name (`resnet50.a1_in1k`), `hf-hub:ORG/NAME`, `local-dir:PATH`, the path of a folder with a timm
            `config.json`, or of an image classifier of transformers `hf:ORG/NAME` or `hf:FOLDER`.
        checkpoint: A file of weights for the model of that name; its own pretrained weights by default.
        num_classes: Classes of the checkpoint's head.
        needs_classifier: Refuse a model without a classifier.

    Raises:
        InputError: There is no such model, or its weights cannot be loaded.
    """
    if name.startswith(PREFIX):
        if checkpoint or num_classes or not needs_classifier:
            raise InputError(f'the model {name} comes with its own weights and classes, and gives no features; leave '
                             f'--teacher-checkpoint, --teacher-num-classes and --targets out')
        model = load_classifier(name)
        image_config(model, name)
        return model
    folder = Path(name).expanduser()
    if (folder / CONFIG).is_file():
        name = f'local-dir:{folder}'
    elif (folder / 'best' / CONFIG).is_file():
        raise InputError(f'{name} is the folder of a run; give {name}/best, its most accurate model')
    check_folder(name)
    kwargs = {} if num_classes is None else dict(num_classes=num_classes)
    try:
        model = create_model(name, checkpoint is None, **kwargs)
    except InputError:
        raise
    except Exception as error:
        # Names, folders and the Hub fail in as many ways as there are libraries behind them.
        weights = '' if checkpoint else ' with its pretrained weights'
        if hub_reason := reason_of(error):
            raise InputError(f'the model {name}{weights} cannot be had from the Hub: {hub_reason}')
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f'the model {name}{weights} cannot be loaded: {reason}; give a timm name, hf-hub:ORG/NAME, or a folder '
            f'with config.json and model.safetensors')
    if checkpoint is not None:
        try:
            load_weights(model, checkpoint)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f'{error}; give the model {name} and the number of classes ({model.num_classes} here) '
                             f'that they were trained with')
    if needs_classifier and not getattr(model, 'num_classes', 1):
        raise InputError(f'the model {name} has no classifier; a teacher needs one, or fills a store of features with '
                         f'--targets features')
    image_config(model, name)
    return model


def check_folder(name: str) -> None:
    """Refuse `local-dir:PATH` of a folder whose config.json no model can be made of; other names are left to timm.

    Raises:
        InputError: It is such a folder.
    """
    if name.startswith('local-dir:'):
        read_config(Path(name.removeprefix('local-dir:')))


def check_hub_config(name: str) -> None:
    """Refuse `hf-hub:ORG/NAME` of a repo whose config.json no model can be made of, before timm makes one of it.

    Raises:
        InputError: It is such a repo.
        Exception: Whatever the Hub's client raises.
    """
    repo, revision = hf_split(name.removeprefix('hf-hub:'))
    file = Path(hf_hub_download(repo, CONFIG, revision=revision))
    try:
        read_config(file.parent)
    except InputError as error:
        raise InputError(str(error).replace(str(file), f'{CONFIG} of {name}'))


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
    return next((file for file in (folder / CONFIG, folder / 'last' / CONFIG) if file.is_file()), None)


def set_image_size(model: nn.Module, size: tuple[int, int]) -> None:
    """Have a model take images of this height and width; one without such a setting takes any, or refuses later."""
    if hasattr(model, 'set_input_size'):
        model.set_input_size(img_size=size)


def look_at_zeros(model: nn.Module, input_size: Sequence[int]) -> torch.Tensor:
    """The output of a model on an empty image, [C, H, W]: a model of a fixed size refuses another one only then."""
    with torch.no_grad():
        return model.eval()(torch.zeros(1, *input_size))


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
    weights = read_weights(path)
    # timm's convention: the filter of an architecture stands in its module.
    fit = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
    if fit is not None:
        weights = fit(weights, model)
    num_classes, classifier = num_classes_of(model, weights), _classifier(model)
    try:
        if is_22k_to_1k(num_classes, model.num_classes):
            model.reset_classifier(NUM_CLASSES_22K)
            model.load_state_dict(weights)
            classifier_22k_to_1k(model)
            if log:
                log(f'{path}: the classifier of ImageNet-22k gives the rows of the classes of ImageNet-1k')
        elif log and isinstance(classifier, nn.Linear) and (
                num_classes not in (None, model.num_classes) or f'{_name_of(model, classifier)}.weight' not in weights):
            name = _name_of(model, classifier)
            zeros = {f'{name}.{key}': torch.zeros_like(value) for key, value in classifier.state_dict().items()}
            model.load_state_dict({**weights, **zeros})
            has = f'its classifier has {num_classes} classes' if num_classes else 'it has no classifier'
            log(f'{path}: {has}, the student {model.num_classes}; it starts from zero')
        elif log and not model.num_classes:
            # timm says where the classifier would be.
            name = (model.pretrained_cfg or {}).get('classifier')
            names = tuple(f'{name}.' for name in ([name] if isinstance(name, str) else name or ()))
            model.load_state_dict({key: value for key, value in weights.items() if not key.startswith(names)})
        else:
            model.load_state_dict(weights)
    except RuntimeError as error:
        reason = shorten(' '.join(str(error).splitlines()[1:]), 100, placeholder=' ...')
        raise ValueError(f'the weights {path} are of another model ({reason})')


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a file of weights, or of a folder with model.safetensors.

    Raises:
        InputError: There is no such file, it holds no weights, or is not as it was written.
    """
    file = Path(path).expanduser()
    file = file / HF_SAFE_WEIGHTS_NAME if file.is_dir() else file
    if not file.is_file():
        raise InputError(f'there is no file {file}; give a file of weights, or a folder with one such as RUN/last')
    check_weights(file)
    try:
        weights = load_state_dict(str(file), weights_only=True)
    except Exception as error:
        # Damaged archives and foreign pickles fail in as many ways as there are bytes.
        raise InputError(f'the file {file} holds no weights that can be read ({type(error).__name__}); give '
                         f'safetensors, or a checkpoint of torch that loads with weights_only')
    if not any(isinstance(value, torch.Tensor) for value in weights.values()):
        raise InputError(f'the file {file} holds no weights; give a state dict')
    return weights


def num_classes_of(model: nn.Module, weights: dict[str, torch.Tensor]) -> int | None:
    """Classes of the weights' classifier, under timm's or the official code's name."""
    classifier = _classifier(model)
    names = [name for name, module in model.named_modules() if module is classifier]
    sizes = [weights[f'{name}.bias'].shape[0] for name in (*names, 'head') if f'{name}.bias' in weights]
    return sizes[0] if sizes else None


def _classifier(model: nn.Module) -> nn.Module | None:
    """The classifier of a timm model; None of one that does not say."""
    return model.get_classifier() if hasattr(model, 'get_classifier') else None


def _name_of(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def is_22k_to_1k(num_classes: int | None, wanted: int | None) -> bool:
    """Whether a classifier of so many classes is that of ImageNet-22k, and the one wanted that of ImageNet-1k."""
    return num_classes == NUM_CLASSES_22K and wanted == len(imagenet1k_in_22k())
