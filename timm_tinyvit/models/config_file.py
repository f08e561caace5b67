"""The config.json of a timm model, whoever wrote it: read and checked in one place."""

from pathlib import Path
from typing import Any

from timm.data import resolve_data_config
from torch import nn

from ..base.errors import InputError
from ..base.files import read_bounded
from ..base.types import Number, mismatch, read_json

__all__ = ['CONFIG', 'image_config', 'read_config']

CONFIG = 'config.json'
# ImageNet-22k's names and what they mean are 2 MB.
MAX_BYTES = 1 << 25
MAX_CLASSES = 1 << 20
SIDE, SHARE = Number(1, 1 << 14, is_whole=True), Number(1e-3, 100)
CLASSES = Number(0, MAX_CLASSES, is_whole=True)
# How images are prepared, see `mismatch`.
IMAGES = {
    'input_size?': [SIDE], 'test_input_size?': ([SIDE], None), 'crop_pct?': (SHARE, None),
    'test_crop_pct?': (SHARE, None), 'interpolation?': (str, None), 'crop_mode?': (str, None),
    'mean?': ([Number(-1e6, 1e6)], None), 'std?': ([Number(1e-6, 1e6)], None)}
MODES = {
    'interpolation': ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos', 'random'),
    'crop_mode': ('center', 'squash', 'border')}


def read_config(folder: Path) -> dict[str, Any]:
    """What the config.json of a folder says.

    Raises:
        InputError: There is none, or it is none of a timm model.
    """
    file = folder / CONFIG
    try:
        config = read_json(read_bounded(file, MAX_BYTES))
    except OSError as error:
        raise InputError(f'{file} cannot be read: {error.strerror}; name the folder of a timm model')
    except ValueError as error:
        raise InputError(f'{file} is no JSON ({" ".join(str(error).split())}); fix it, or export the model again')
    why = mismatch(config, {
        'architecture': str, 'num_classes?': CLASSES, 'label_names?': ([str], None),
        'label_descriptions?': (dict, [str], None), 'model_args?': (dict, None),
        'pretrained_cfg?': {**IMAGES, 'num_classes?': CLASSES}, **IMAGES}, '')
    descriptions = None if why else config.get('label_descriptions')
    if isinstance(descriptions, dict) and not all(type(text) is str for text in descriptions.values()):
        why = 'label_descriptions has what is no text'
    why = why or _bad_numbers(config.get('model_args'))
    for images in () if why else (config, config.get('pretrained_cfg', {})):
        why = why or _bad_images(images)
    if why:
        raise InputError(f'{file} is not that of a timm model: {why}; fix it, or export the model again')
    return config


def image_config(model: nn.Module, name: str = '', **options: Any) -> dict[str, Any]:
    """timm's data configuration of a model, with the right types and sizes.

    Args:
        model: The model; one that has no configuration gets timm's usual one.
        name: What it is called; by default as its configuration says.
        options: Of timm's `resolve_data_config`, `args` among them.

    Raises:
        InputError: Its configuration is none.
    """
    args = options.pop('args', {})
    try:
        # Of a module that has none, timm's usual one; an empty one would be looked for in the module again.
        known = getattr(model, 'pretrained_cfg', None) or {'crop_pct': None}
        name = name or known.get('architecture') or type(model).__name__
        config = resolve_data_config(args, pretrained_cfg=known, **options)
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f'the configuration of the model {name} is none: {error}')
    why = mismatch(plain, IMAGES, '') or _bad_images(plain)
    if why and (flag := why.split()[0]) in args and args[flag] == config.get(flag):
        raise InputError(f'{why}; check --{flag.replace("_", "-")}')
    if why is None and len(plain['input_size']) != 3:
        why = f'input_size is {plain["input_size"]}, expected 3 numbers'
    if why:
        raise InputError(f'the configuration of the model {name} cannot be: {why}; fix its config.json, or name '
                         f'another model')
    return config


def _bad_images(config: dict[str, Any]) -> str | None:
    for name, length in (('input_size', 3), ('test_input_size', 3)):
        if config.get(name) is not None and len(config[name]) != length:
            return f'{name} is {config[name]}, expected {length} numbers'
    for name, modes in MODES.items():
        if config.get(name) and config[name] not in modes:
            return f'{name} is {config[name]!r}, expected {", ".join(modes)}'
    size = (config.get('input_size') or [3])[0]
    for name in ('mean', 'std'):
        if config.get(name) and len(config[name]) not in (1, size):
            return f'{name} has {len(config[name])} numbers, expected {size}'
    return None


def _bad_numbers(values: Any) -> str | None:
    """Why arguments of a model would make one without end; None where they do not."""
    for name, value in (values or {}).items():
        for number in value if isinstance(value, list) else [value]:
            most = 1000 if 'depth' in name or 'layers' in name or 'blocks' in name else MAX_CLASSES
            if isinstance(number, (int, float)) and not -most <= number <= most:
                return f'model_args.{name} is {number:g}, expected {most:,} at most'
    return None
