"""The flags that the programs share, under the names of timm's train.py, and recipes: YAML files of flags.

A flag on the command line wins over the recipe, the recipe over the default. An unknown flag or key is an error. The
flags of a view have no defaults here, so that a program can tell what was asked for from what the store says.
"""

import argparse
import difflib
import sys
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn
from collections.abc import Callable, Container, Sequence

import torch
import yaml

from ..base.errors import InputError
from ..base.hub_client import check_repo_id
from ..data.views import ViewRecipe
from ..store.base import StoreReader
from ..store.manifest import Manifest

__all__ = [
    'STORE_DEFAULTS', 'VIEW_FLAGS', 'ArgumentParser', 'add_data_arguments', 'add_push_arguments', 'add_store_arguments',
    'add_view_arguments', 'amp_dtype', 'check_push_arguments', 'check_store_flags', 'parse_arguments', 'parse_range',
    'recipe_names', 'store_settings', 'view_arguments',
]

RECIPES = resources.files('timm_tinyvit.config') / 'recipes'

# What a new store gets where no flag says otherwise.
STORE_DEFAULTS = dict(
    topk=10, codec='compact', key='', shard_size=16384, store_seed=0, teacher_batch_size=256)

# Flag of timm's train.py -> entry of ViewRecipe.
VIEW_FLAGS = {
    'no_aug': 'no_aug', 'train_crop_mode': 'train_crop_mode', 'scale': 'scale', 'ratio': 'ratio', 'hflip': 'hflip',
    'vflip': 'vflip', 'color_jitter': 'color_jitter', 'color_jitter_prob': 'color_jitter_prob',
    'grayscale_prob': 'grayscale_prob', 'gaussian_blur_prob': 'gaussian_blur_prob', 'aa': 'auto_augment',
    'train_interpolation': 'interpolation', 'view_mean': 'mean', 'view_std': 'std', 'reprob': 're_prob',
    'remode': 're_mode', 'recount': 're_count', 'mixup': 'mixup', 'cutmix': 'cutmix',
    'cutmix_minmax': 'cutmix_minmax', 'mixup_prob': 'mixup_prob', 'mixup_switch_prob': 'mixup_switch_prob',
    'decoder': 'decoder',
}


def store_settings(manifest: Manifest) -> dict[str, Any]:
    """The settings of `STORE_DEFAULTS` as a store has them."""
    return dict(
        topk=manifest.k, codec=manifest.codec, key=manifest.key,
        shard_size=manifest.shard_size, store_seed=manifest.seed,
        teacher_batch_size=manifest.teacher.get('batch_size'))


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something: a switch is off, and what is not given is found elsewhere."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is False or action.default in (None, [], {})
        return action.help if says_nothing else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise InputError(f'{message}; see --help')


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Where images and labels come from."""
    group = parser.add_argument_group('data')
    group.add_argument('--dataset', metavar='NAME',
                       help='Hub name (hfds/NAME too), or a folder of parquet files, images, tars or save_to_disk')
    group.add_argument('--data-dir', metavar='DIR', help='a folder, if --dataset is not given')
    group.add_argument('--train-split', metavar='NAME', help='training split or a slice of it (default: train)')
    group.add_argument('--streaming', action='store_true',
                       help='stream the training data, without a copy on disk; needs a store with keys, see --key')
    group.add_argument('--input-key', metavar='NAME', help='image column (default: found by its usual names)')
    group.add_argument('--target-key', metavar='NAME', help='label column (default: found by its usual names)')
    group.add_argument('-j', '--workers', type=int, default=2, metavar='N', help='loader processes per rank')


def add_push_arguments(parser: argparse.ArgumentParser, what: str, licence: str) -> None:
    """The flags of a program that pushes what it has made, with the words for that and for its licence."""
    group = parser.add_argument_group('Hub')
    group.add_argument('--push-to-hub', metavar='ORG/NAME', help=what)
    group.add_argument('--hub-private', action='store_true', help='make a new repo a private one')
    group.add_argument('--hub-license', metavar='NAME', help=licence)


def add_view_arguments(parser: argparse.ArgumentParser) -> None:
    """How a training view is made; what is not given comes from the store, or else from `ViewRecipe`."""
    group = parser.add_argument_group('views (defaults: the store\'s, where there is one)')
    recipe = ViewRecipe()

    def add(flag: str, help: str, **options: Any) -> None:
        default = getattr(recipe, VIEW_FLAGS[flag.removeprefix('--').replace('-', '_')])
        if isinstance(default, tuple):
            default = ' '.join(f'{value:.4g}' for value in default)
        shown = '' if default is False else f' (default: {"none" if default is None else default})'
        group.add_argument(flag, help=help + shown, **options)

    group.add_argument('--img-size', type=int, metavar='N',
                       help=f'height and width of the views (default: {recipe.input_size[-1]})')
    add('--no-aug', 'resize and centre crop only', action='store_true', default=None)
    add('--train-crop-mode', 'rrc, rkrc or rkrr', metavar='NAME')
    add('--scale', 'random resized crop: range of area', type=float, nargs=2, metavar='PCT')
    add('--ratio', 'random resized crop: range of aspect', type=float, nargs=2, metavar='RATIO')
    add('--hflip', 'probability of a horizontal flip', type=float, metavar='P')
    add('--vflip', 'probability of a vertical flip', type=float, metavar='P')
    add('--color-jitter', 'colour jitter, off where --aa is on', type=float, metavar='PCT')
    add('--color-jitter-prob', 'probability of colour jitter', type=float, metavar='P')
    add('--grayscale-prob', 'probability of turning grey', type=float, metavar='P')
    add('--gaussian-blur-prob', 'probability of blur', type=float, metavar='P')
    add('--aa', 'timm\'s AutoAugment policy, as in rand-m9-mstd0.5-inc1', metavar='NAME')
    add('--train-interpolation', 'bilinear, bicubic or random', metavar='NAME')
    add('--view-mean', 'mean, as fill colour of RandAugment', type=float, nargs=3, metavar='X')
    add('--view-std', 'standard deviation, as scale of the noise of random erasing', type=float, nargs=3, metavar='X')
    add('--reprob', 'probability of random erasing', type=float, metavar='P')
    add('--remode', 'random erasing: const, rand or pixel', metavar='NAME')
    add('--recount', 'random erasing: rectangles at most', type=int, metavar='N')
    add('--mixup', 'Mixup alpha, 0 for none', type=float, metavar='A')
    add('--cutmix', 'CutMix alpha, 0 for none', type=float, metavar='A')
    add('--cutmix-minmax', 'CutMix: range of width and height', type=float, nargs=2, metavar='PCT')
    add('--mixup-prob', 'probability of Mixup or CutMix', type=float, metavar='P')
    add('--mixup-switch-prob', 'probability of CutMix rather than Mixup, if both are on', type=float, metavar='P')
    add('--decoder', 'pillow, or torch, which is faster and makes slightly other pixels', metavar='NAME')


def add_store_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The teacher, and the store that keeps what it says; with `several`, `--logits` takes a list of stores."""
    group = parser.add_argument_group('teacher and store')
    group.add_argument(
        '--logits', metavar='DIR', nargs='+' if several else None,
        help='the logit store, a folder or hf://datasets/ORG/NAME'
             + ('; several, of different teachers, to learn from their average' if several else ''))
    group.add_argument('--keep-epochs', type=int, metavar='N',
                       help='epochs of a store on the Hub to keep on disk (default: those in use and the next)')
    group.add_argument('--store-cache', metavar='DIR', help='where to keep these epochs (default: a folder in HF_HOME)')
    group.add_argument(
        '--teacher', metavar='NAME', help='timm name with pretrained weights, hf-hub:ORG/NAME, or a model folder')
    group.add_argument('--teacher-checkpoint', metavar='FILE', help='weights for the model of --teacher')
    group.add_argument('--teacher-num-classes', type=int, metavar='N', help='classes of --teacher-checkpoint')
    group.add_argument('--teacher-amp-dtype', choices=('bfloat16', 'float16'), help='autocast the teacher')
    group.add_argument('--teacher-compile', action='store_true', help='torch.compile the teacher')
    for name, kind, metavar, help in (
        ('topk', int, 'K', 'most probable classes that are kept of a view'),
        ('codec', str, 'NAME', 'format of the records, as in compact or float16'),
        ('key', str, 'NAME', 'column of strings or integers that identify samples; without one, their position does'),
        ('shard_size', int, 'N', 'samples per file of the store'),
        ('store_seed', int, 'S', 'seed of the views'),
        ('teacher_batch_size', int, 'N', 'views per teacher batch'),
    ):
        group.add_argument(
            f'--{name.replace("_", "-")}', type=kind, metavar=metavar,
            help=f'{help} (default: the store\'s, or {STORE_DEFAULTS[name] or "none"} for a new one)')


def view_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Entries of `ViewRecipe` that were asked for, on the command line or in a recipe."""
    given = {entry: getattr(args, flag) for flag, entry in VIEW_FLAGS.items() if getattr(args, flag) is not None}
    if args.img_size is not None:
        given['input_size'] = (3, args.img_size, args.img_size)
    recipe = ViewRecipe(**given).to_dict()
    return {entry: recipe[entry] for entry in given}


def amp_dtype(name: str | None) -> torch.dtype | None:
    """The torch type of an --amp-dtype flag."""
    return None if name is None else getattr(torch, name)


def recipe_names() -> list[str]:
    """Names of the recipes in this package."""
    return sorted(
        item.name.removesuffix('.yaml') for item in RECIPES.iterdir() if item.name.endswith('.yaml'))


def parse_arguments(
        parser: ArgumentParser,
        argv: Sequence[str] | None = None,
        other_flags: Callable[[], Container[str]] = tuple,
) -> argparse.Namespace:
    """Parse flags, over those of the recipe that `--config` names: a path, or the name of one in this package.

    Args:
        parser: Knows the flags.
        argv: The arguments; by default the command line's.
        other_flags: Flags of other programs, whose keys in a recipe are passed over.

    Raises:
        InputError: A flag or key is unknown or has a wrong value, or there is no such recipe.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser.add_argument('-c', '--config', metavar='FILE', help=f'recipe: a YAML file, or {", ".join(recipe_names())}')
    peek = ArgumentParser(add_help=False)
    peek.add_argument('-c', '--config')
    config = peek.parse_known_args(argv)[0].config
    recipe = [] if config is None else _recipe_flags(parser, config, other_flags)
    try:
        args, unknown = parser.parse_known_args(recipe + argv)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        # timm's ParseKwargs unpacks what it gets.
        raise InputError(f'the arguments cannot be read ({error}); write pairs like name=value after --model-kwargs')
    if unknown:
        raise InputError(f'unknown argument {unknown[0]}{_nearest(parser, unknown[0].partition("=")[0])}')
    return args


def _nearest(parser: argparse.ArgumentParser, name: str) -> str:
    near = difflib.get_close_matches(name, parser._option_string_actions, 1)
    return f'; did you mean {near[0]}?' if near else '; see --help'


def _recipe_flags(
        parser: argparse.ArgumentParser,
        config: str,
        other_flags: Callable[[], Container[str]],
) -> list[str]:
    """The flags of a recipe as they would stand on the command line."""
    file = Path(config)
    if not file.is_file() and config in recipe_names():
        file = RECIPES / f'{config}.yaml'
    try:
        recipe = yaml.safe_load(file.read_text(encoding='utf-8')) or {}
    except OSError:
        raise InputError(f'there is no recipe {config}; give a YAML file, or one of {", ".join(recipe_names())}')
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f'the recipe {config} is not readable as YAML: {" ".join(str(error).split())}')
    if isinstance(recipe, dict) and {'version', 'flags'} <= recipe.keys():
        recipe = recipe['flags']  # the run.json of a run
    if not isinstance(recipe, dict):
        raise InputError(f'the recipe {config} is a {type(recipe).__name__}; expected lines like `lr: 0.001`')
    flags = []
    for key, value in recipe.items():
        flag = '--' + str(key).replace('_', '-')
        action = parser._option_string_actions.get(flag)
        if action is None and flag in other_flags():
            continue
        if action is None or flag == '--config':
            raise InputError(f'the recipe {config} has an unknown key {key!r}{_nearest(parser, flag)}')
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise InputError(f'the recipe {config} has {key}: {value!r}; expected true or false')
            flags += [flag] if value else []
        elif value is not None and value != []:
            pairs = [f'{name}={item}' for name, item in value.items()] if isinstance(value, dict) else None
            flags += [flag, *map(str, pairs or (value if isinstance(value, list) else [value]))]
    return flags


def parse_range(text: str) -> range:
    """`30` as the numbers 0 to 29, `10:30` as 10 to 29."""
    start, colon, stop = text.partition(':')
    try:
        numbers = range(int(start or 0), int(stop)) if colon else range(int(start))
    except ValueError:
        numbers = range(0)
    if not numbers or numbers.start < 0:
        raise argparse.ArgumentTypeError(f'{text!r} is no range; write 30, or 10:30')
    return numbers


def check_store_flags(store: StoreReader, args: argparse.Namespace) -> None:
    """Refuse flags that ask for other targets than a store has.

    Raises:
        InputError: They do.
    """
    for part in store.stores:
        there = store_settings(part.manifest)
        for name in ('topk', 'codec', 'store_seed'):
            given, value = getattr(args, name), there[name]
            if given not in (None, value):
                flag = f'--{name.replace("_", "-")}'
                raise InputError(f'the store {part.path} has {flag} {value}, and {given} is asked for; leave {flag} '
                                 f'out, or where a recipe has it give {flag} {value}, or name another store')


def check_push_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that ask for no push that can be, without asking the Hub.

    Raises:
        InputError: The repo has no possible name, or there is none, or nothing is trained.
    """
    if args.push_to_hub is None:
        if args.hub_private or args.hub_license:
            raise InputError('--hub-private and --hub-license need a repo; name it with --push-to-hub ORG/NAME')
        return
    check_repo_id(args.push_to_hub)
    if args.eval is not None:
        raise InputError('--eval trains nothing that --push-to-hub could push; push a run with python -m '
                         'timm_tinyvit.hub.push_model')
