"""The flags that the programs share, under the names of timm's train.py, and recipes: YAML files of flags.

A flag on the command line wins over the recipe, the recipe over the default. An unknown flag or key is an error. The
flags of a view have no defaults here, so that a program can tell what was asked for from what the store says.
"""

import argparse
import ast
import difflib
import operator
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from collections.abc import Callable, Collection, Mapping, Sequence

from ..base.errors import InputError
from ..base.yaml_reader import MAX_BYTES, read_yaml
from ..data.view_config import VIEW_FLAGS, ViewConfig
from ..version import __version__
from .timm_flags import refusal

if TYPE_CHECKING:
    import torch

    from ..store.base import StoreReader
    from ..store.manifest import Manifest

__all__ = [
    'FEATURE_DEFAULTS', 'FEATURE_SHARD_BYTES',
    'STORE_DEFAULTS', 'VIEW_FLAGS', 'ArgumentParser', 'KeyValues', 'add_data_arguments', 'add_image_arguments',
    'add_image_size', 'add_keep_arguments', 'add_push_arguments', 'add_quiet', 'add_split_arguments',
    'add_store_arguments',
    'add_teacher_arguments', 'add_view_arguments', 'add_workers', 'amp_dtype', 'check_push_arguments',
    'check_store_flags', 'flags_of', 'folder', 'given_settings', 'new_store_arguments', 'parse_range', 'recipe_names',
    'store_settings', 'view_arguments',
]

RECIPES = resources.files('timm_tinyvit.config') / 'recipes'

# What a new store gets where no flag says otherwise.
STORE_DEFAULTS = dict(
    targets='classes', topk=10, feature_grid=0, feature_dim=0, codec='compact', key='', shard_size=16384, store_seed=0,
    teacher_batch_size=256)
# The same for features. A grid of vectors may be large, and whoever fills has a shard in memory.
FEATURE_DEFAULTS = STORE_DEFAULTS | dict(targets='features', topk=0, codec='int8')
FEATURE_SHARD_BYTES = 1 << 28

def store_settings(manifest: 'Manifest') -> dict[str, Any]:
    """The settings of `STORE_DEFAULTS` as a store has them."""
    features = manifest.features
    return dict(
        targets=manifest.targets, topk=manifest.k, feature_grid=features.get('grid', 0),
        feature_dim=features['dim'] if features.get('projection') else 0, codec=manifest.codec, key=manifest.key,
        shard_size=manifest.shard_size, store_seed=manifest.seed,
        teacher_batch_size=manifest.teacher.get('batch_size'))


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something: a switch is off, and what is not given is found elsewhere."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is False or action.default in (None, [], {})
        return action.help if says_nothing else super()._get_help_string(action)


class KeyValues(argparse.Action):
    """Pairs like `depths=[2,2,2,2]` as a dict, of Python values where they are some, as in timm."""

    def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Sequence[str],
            option_string: str | None = None,
    ) -> None:
        pairs = {}
        for text in values:
            name, sign, value = text.partition('=')
            if not sign:
                parser.error(f'{option_string} has {text!r}; write pairs like name=value')
            try:
                pairs[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                pairs[name] = value
        setattr(namespace, self.dest, pairs)


class _InputSize(argparse.Action):
    """timm's channels, height and width as `--img-size`."""

    def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Sequence[int],
            option_string: str | None = None,
    ) -> None:
        channels, height, width = values
        if channels != 3 or height != width:
            raise InputError(f'{option_string} is {channels} {height} {width}; expected 3 channels and a square, as in '
                             f'3 224 224, or --img-size 224')
        setattr(namespace, self.dest, height)


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence.

    Attributes:
        finish: Completes and checks what was parsed, for what argparse has no words.
        refused: Groups of `timm_flags`: flags that are answered with the reason why there are none.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        if self.add_help:
            self.add_argument('--version', action='version', version=f'timm-tinyvit {__version__}',
                              help='show the version and exit')
        self.finish: Callable[[argparse.Namespace], argparse.Namespace] = lambda args: args
        self.refused: tuple[tuple[str, str], ...] = ()
        self._other_flags: Callable[[], Collection[str]] = tuple

    @property
    def flags(self) -> Collection[str]:
        """All flags, as in `--lr`."""
        return self._option_string_actions.keys()

    def add_recipes(self, other_flags: Callable[[], Collection[str]] = tuple) -> None:
        """Add `--config`, which names a recipe, by its path or as one of this package.

        Args:
            other_flags: Flags of other programs, whose keys in a recipe are passed over.
        """
        self.add_argument('-c', '--config', metavar='FILE', help=f'recipe: a YAML file, or {", ".join(recipe_names())}')
        self._other_flags = other_flags

    def parse_known_args(
            self,
            args: Sequence[str] | None = None,
            namespace: argparse.Namespace | None = None,
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse flags over those of the recipe; whatever is unknown or has a wrong value is an error.

        Raises:
            InputError: There is such a flag or key, or no such recipe.
        """
        args = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:
            # Before argparse, which would miss what is required and only misspelt.
            for flag in (word.partition('=')[0] for word in args if word.startswith('--')):
                if flag not in ('--', *self.flags):
                    raise InputError(
                        refusal(self.refused, flag) or f'unknown argument {flag}{_nearest(self, flag)}')
        if '--config' in self.flags:
            args = [*_recipe_flags(self, args, self._other_flags), *args]
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            raise InputError(f'unknown argument {unknown[0]}; see {self.prog} --help')
        if 'data' in parsed:
            _settle_data(self, parsed)
        if 'dataset_revision' in parsed:
            _settle_revision(parsed)
        _check_limits(parsed)
        if 'val_fraction' in parsed:
            _settle_fraction(parsed)
        return self.finish(parsed), []

    def error(self, message: str) -> NoReturn:
        raise InputError(f'{message}; see {self.prog} --help')


def _settle_data(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Take the data set as it stands alone for that of `--dataset`."""
    alone = args.data
    del args.data
    if None not in (alone, args.dataset):
        raise InputError(f'{alone} is an argument too many: the data set is {args.dataset}; name one of them')
    args.dataset = args.dataset or alone
    if args.dataset is None:
        parser.error('one of the arguments --dataset --data-dir is required')


def _settle_fraction(args: argparse.Namespace) -> None:
    """Name the two parts of the training split, see `data.sources.load_split`."""
    share = args.val_fraction
    del args.val_fraction
    if share is None:
        return
    given = [f'--{name.replace("_", "-")}' for name in ('val_split', 'val_dataset') if getattr(args, name, None)]
    if given:
        raise InputError(f'--val-fraction makes a validation split of the training split, and {given[0]} names '
                         f'another; leave one of them out')
    split = args.train_split or 'train'
    args.train_split = f'{split} without {share:.6f}'.rstrip('0')
    if 'val_split' in args:
        args.val_split = f'{split} held-out {share:.6f}'.rstrip('0')


def _settle_revision(args: argparse.Namespace) -> None:
    """Put revision and configuration of a data set behind its name, which `load_split` reads."""
    name, revision, config = args.dataset, args.dataset_revision, args.dataset_config
    del args.dataset_revision, args.dataset_config
    if (revision or config) and name is None:
        raise InputError('--dataset-revision and --dataset-config are of a data set; name it with --dataset')
    if revision and (Path(name).expanduser().exists() or '://' in name and not name.startswith('hf://')):
        raise InputError(f'--dataset-revision is {revision}, but {name} is not on the Hub, and has no revisions; leave '
                         f'it out')
    if revision or config:
        args.dataset += (f'@{revision}' if revision else '') + (f':{config}' if config else '')


# Smallest and largest values of flags, of whatever program.
AT_LEAST = dict(
    batch_size=1, grad_accum_steps=1, validation_batch_size=1, epochs=1, views_per_image=1, store_epochs=1,
    val_interval=1, checkpoint_hist=1, log_interval=1, num_classes=0, lr_base_size=1, workers=0, recovery_interval=0,
    warmup_epochs=0, cooldown_epochs=0, seed=0, alpha=0, smoothing=0, drop=0, drop_path=0, weight_decay=0, clip_grad=0,
    momentum=0, model_ema_decay=0, keep_epochs=1, warmup_lr=0, min_lr=0, num_samples=1, max_samples=1, processes=1,
    teacher_num_classes=1, task_loss_weight=0, distill_loss_weight=0, feature_grid=0, feature_dim=0, feature_weight=0)
AT_MOST = dict(alpha=1, drop=1, drop_path=1, crop_pct=1, seed=2**32 - 1, model_ema_decay=1)
ABOVE = dict(
    temperature=0, crop_pct=0, lr=0, lr_base=0, layer_decay=0, decay_epochs=0, decay_rate=0, views_per_second=0,
    val_fraction=1e-6)
BELOW = dict(smoothing=1, views_per_second=float('inf'), val_fraction=1)


def _check_limits(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        if '\0' in (str(value) if not isinstance(value, (list, tuple)) else ''.join(map(str, value))):
            raise InputError(f'--{name.replace("_", "-")} holds a NUL character; leave it out')
    for limits, holds, words in ((AT_LEAST, operator.ge, 'at least'), (AT_MOST, operator.le, 'at most'),
                                 (ABOVE, operator.gt, 'more than'), (BELOW, operator.lt, 'less than')):
        for name, value in vars(args).items():
            if name in limits and isinstance(value, (int, float)) and not holds(value, limits[name]):
                raise InputError(f'--{name.replace("_", "-")} is {value}; expected {words} {limits[name]}')


def add_image_arguments(
        parser: argparse.ArgumentParser,
        required: bool = False,
        positional: bool = False,
) -> argparse._ArgumentGroup:
    """Where training images and labels come from; returns the group of these flags, for further ones."""
    group = parser.add_argument_group('data')
    if positional:
        # Required or not, argparse would not name a word too many.
        group.add_argument('data', nargs='?', metavar='DATA', help='the training data, in place of --dataset')
    either = group.add_mutually_exclusive_group(required=required and not positional)
    either.add_argument('--dataset', metavar='NAME',
                        help='Hub name (hfds/NAME too), a folder of parquet files, images, tars or save_to_disk, or '
                             'the address of such a folder, as s3://BUCKET/NAME')
    either.add_argument('--data-dir', dest='dataset', metavar='DIR', help='a folder, in place of --dataset')
    group.add_argument('--dataset-config', metavar='NAME', help='one of its configurations (--dataset NAME:CONFIG too)')
    group.add_argument('--dataset-revision', metavar='NAME',
                       help='branch, tag or commit on the Hub (--dataset NAME@REVISION too)')
    add_split_arguments(group)
    return group


def add_split_arguments(group: argparse._ActionsContainer) -> None:
    """Which split and which columns of a data set."""
    group.add_argument('--train-split', metavar='NAME', help='training split or a slice of it (default: train)')
    group.add_argument('--val-fraction', type=float, metavar='P',
                       help='take this share of each class out of the training split, as the validation split; the '
                            'same samples in every command')
    group.add_argument('--input-key', metavar='NAME', help='image column (default: found by its usual names)')
    group.add_argument('--target-key', metavar='NAME', help='label column (default: found by its usual names)')


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the images of a whole training or filling come from, and how they are loaded."""
    group = add_image_arguments(parser, required=True, positional=True)
    group.add_argument('--streaming', action='store_true',
                       help='stream the training data, without a copy on disk; needs a store with keys, see --key')
    add_workers(group)


def add_image_size(group: argparse._ActionsContainer, help: str) -> None:
    """The size of images, in one number or in timm's three."""
    group.add_argument('--img-size', type=int, metavar='N', help=help)
    group.add_argument('--input-size', dest='img_size', nargs=3, type=int, action=_InputSize, metavar=('C', 'H', 'W'),
                       help='the same, in three numbers: 3 N N')


def add_workers(group: argparse._ActionsContainer) -> None:
    """The flag of whatever loads images."""
    group.add_argument('-j', '--workers', type=int, default=2, metavar='N', help='loader processes per rank')


def add_quiet(group: argparse._ActionsContainer) -> None:
    """The flag of whatever takes a while."""
    group.add_argument('--quiet', action='store_true', help='say nothing but results, warnings and errors')


def add_push_arguments(parser: argparse.ArgumentParser, what: str, licence: str) -> None:
    """The flags of a program that pushes what it has made, with the words for that and for its licence."""
    group = parser.add_argument_group('Hub')
    group.add_argument('--push-to-hub', metavar='ORG/NAME', help=what)
    group.add_argument('--hub-private', action='store_true', help='make a new repo a private one')
    group.add_argument('--hub-license', metavar='NAME', help=licence)


def add_view_arguments(parser: argparse.ArgumentParser) -> None:
    """How a training view is made; what is not given comes from the store, or else from `ViewConfig`."""
    group = parser.add_argument_group('views (defaults: the store\'s, where there is one)')
    plain = ViewConfig()

    def add(flag: str, help: str, **options: Any) -> None:
        default = getattr(plain, VIEW_FLAGS[flag.removeprefix('--').replace('-', '_')])
        if isinstance(default, tuple):
            default = ' '.join(f'{value:.4g}' for value in default)
        shown = '' if default is False else f' (default: {"none" if default is None else default})'
        group.add_argument(flag, help=help + shown, **options)

    add_image_size(group, f'height and width of the views (default: {plain.input_size[-1]})')
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


def add_keep_arguments(parser: argparse._ActionsContainer) -> None:
    """What to keep on disk of a store behind a URL."""
    parser.add_argument('--keep-epochs', type=int, metavar='N',
                        help='epochs of a store behind a URL to keep on disk (default: those in use and the next)')
    parser.add_argument('--store-cache', metavar='DIR',
                        help='where to keep these epochs (default: a folder in HF_HOME)')


def add_teacher_arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """The teacher."""
    group = parser.add_argument_group('teacher')
    group.add_argument('--teacher', '--kd-model-name', metavar='NAME', required=required,
                       help='timm name with pretrained weights, hf-hub:ORG/NAME, or a model folder; hf:ORG/NAME or '
                            'hf:FOLDER of transformers')
    group.add_argument('--teacher-checkpoint', metavar='FILE', help='weights for the model of --teacher')
    group.add_argument('--teacher-num-classes', type=int, metavar='N', help='classes of --teacher-checkpoint')
    group.add_argument('--class-embeddings', metavar='FILE',
                       help='text vectors of the classes, for a --teacher that is the image tower of CLIP or SigLIP')
    group.add_argument('--teacher-amp-dtype', choices=('bfloat16', 'float16'), help='autocast the teacher')
    group.add_argument('--teacher-compile', action='store_true', help='torch.compile the teacher')


def add_store_arguments(
        parser: argparse.ArgumentParser,
        names: Collection[str] = STORE_DEFAULTS.keys(),
) -> argparse._ArgumentGroup:
    """How a new store keeps what the teacher predicts: settings of `STORE_DEFAULTS`; returns their group."""
    group = parser.add_argument_group('store')
    for name, kind, metavar, help in (
        ('targets', str, 'KIND', 'what is kept of the teacher: its most probable classes, or its features'),
        ('topk', int, 'K', 'most probable classes that are kept of a view'),
        ('feature_grid', int, 'G', 'features: G x G cells of the map of the teacher; 0 for its pooled vector'),
        ('feature_dim', int, 'D', 'features: project vectors to D numbers, by their principal components; 0 for none'),
        ('codec', str, 'NAME', 'format of the records: compact or float16, of features int8 or float16'),
        ('key', str, 'NAME', 'column of strings or integers that identify samples; without one, their position does'),
        ('shard_size', int, 'N', 'samples per file of the store'),
        ('store_seed', int, 'S', 'seed of the views'),
        ('teacher_batch_size', int, 'N', 'views per teacher batch'),
    ):
        if name in names:
            new = 'none' if STORE_DEFAULTS[name] == '' else STORE_DEFAULTS[name]
            group.add_argument(
                f'--{name.replace("_", "-")}', type=kind, metavar=metavar,
                choices=('classes', 'features') if name == 'targets' else None,
                help=f'{help} (default: the store\'s, or {new} for a new one)')
    return group


def folder(text: str) -> str:
    """The type of an argument that names a store to write."""
    if '://' in text:
        raise argparse.ArgumentTypeError(f'a store behind a URL, {text}, is only read; give a folder, and publish it '
                                         f'with timm-tinyvit store push')
    return text


def folder_or_bucket(text: str) -> str:
    """The type of an argument that names a store to fill."""
    return folder(text) if text.startswith(('http', 'hf:', 'file:')) else text


def view_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Entries of `ViewConfig` that were asked for, on the command line or in a recipe."""
    given = {entry: getattr(args, flag) for flag, entry in VIEW_FLAGS.items() if getattr(args, flag) is not None}
    if args.img_size is not None:
        given['input_size'] = (3, args.img_size, args.img_size)
    config = ViewConfig(**given).to_dict()
    return {entry: config[entry] for entry in given}


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of `STORE_DEFAULTS` that were asked for."""
    return {name: getattr(args, name) for name in STORE_DEFAULTS if getattr(args, name) is not None}


def new_store_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of a store that is to be made, as arguments of `teacher.create_store`."""
    return dict(
        given=given_settings(args), view=view_arguments(args), image_column=args.input_key,
        label_column=args.target_key, num_workers=args.workers)


def amp_dtype(name: str | None) -> 'torch.dtype | None':
    """The torch type of an --amp-dtype flag."""
    import torch

    return None if name is None else getattr(torch, name)


def recipe_names() -> list[str]:
    """Names of the recipes in this package."""
    return sorted(
        item.name.removesuffix('.yaml') for item in RECIPES.iterdir() if item.name.endswith('.yaml'))


def _nearest(parser: ArgumentParser, name: str) -> str:
    near = difflib.get_close_matches(name, parser.flags, 1)
    return f'; did you mean {near[0]}?' if near else f'; see {parser.prog} --help'


def _recipe_flags(
        parser: ArgumentParser,
        args: Sequence[str],
        other_flags: Callable[[], Collection[str]],
) -> list[str]:
    """The flags of the recipe that arguments name, as they would stand on the command line."""
    peek = ArgumentParser(prog=parser.prog, add_help=False)
    peek.add_argument('-c', '--config')
    config = argparse.ArgumentParser.parse_known_args(peek, args)[0].config
    if config is None:
        return []
    file = Path(config)
    if not file.is_file() and config in recipe_names():
        file = RECIPES / f'{config}.yaml'
    try:
        with file.open('rb') as stream:
            recipe = read_yaml(stream.read(MAX_BYTES + 1), f'the recipe {config}')
    except OSError:
        raise InputError(f'there is no recipe {config}; give a YAML file, or one of {", ".join(recipe_names())}')
    if {'version', 'flags'} <= recipe.keys():
        recipe = recipe['flags']  # the run.json of a run
    if not isinstance(recipe, dict):
        raise InputError(f'the recipe {config} has flags that are a {type(recipe).__name__}; expected lines like '
                         f'`lr: 0.001`')
    # --config takes one value: what follows is none of the recipe's.
    return [*flags_of(parser, recipe, f'the recipe {config} has', other_flags), '--config', config]


def flags_of(
        parser: ArgumentParser,
        values: Mapping[str, Any],
        who: str,
        other_flags: Callable[[], Collection[str]] = tuple,
) -> list[str]:
    """Values by the names of flags, as they would stand on the command line.

    Args:
        parser: Knows the flags.
        values: The values: true or false of a switch, lists, dicts of pairs; None leaves a flag out.
        who: Who has them, as in `the recipe NAME has`, for the sentence on an error.
        other_flags: Flags of other programs, which are passed over.

    Raises:
        InputError: There is no such flag, or a switch is neither on nor off.
    """
    flags = []
    for key, value in values.items():
        flag = '--' + str(key).replace('_', '-')
        action = parser._option_string_actions.get(flag)
        if action is None and flag in other_flags():
            continue
        if action is None or flag == '--config':
            refused = refusal(parser.refused, flag)
            raise InputError(f'{who} {key!r}: {refused}' if refused else
                             f'{who} an unknown key {key!r}{_nearest(parser, flag)}')
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise InputError(f'{who} {key}: {value!r}; expected true or false')
            flags += [flag] if value else []
        elif value is not None and value != []:
            pairs = [f'{name}={item}' for name, item in value.items()] if isinstance(value, dict) else None
            flags += [flag, *map(str, pairs or (value if isinstance(value, list | tuple) else [value]))]
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


def check_store_flags(store: 'StoreReader', args: argparse.Namespace) -> None:
    """Refuse flags that ask for other targets than a store has.

    Raises:
        InputError: They do.
    """
    for part in store.stores:
        there = store_settings(part.manifest)
        # A recipe for classes says how many of them.
        names = ('targets', 'topk', 'codec', 'store_seed') if part.manifest.targets == 'classes' else (
            'targets', 'feature_grid', 'feature_dim', 'store_seed')
        for name in names:
            given, value = getattr(args, name), there[name]
            if given not in (None, value):
                flag = f'--{name.replace("_", "-")}'
                raise InputError(f'the store {part.path} has {flag} {value}, and {given} is asked for; leave {flag} '
                                 f'out, or where a recipe has it give {flag} {value}, or name another store')


def check_push_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that ask for no push that can be, without asking the Hub.

    Raises:
        InputError: The repo has no possible name, or there is none.
    """
    if args.push_to_hub is not None:
        from ..base.hub_client import check_repo_id

        check_repo_id(args.push_to_hub)
    elif args.hub_private or args.hub_license:
        raise InputError('--hub-private and --hub-license need a repo; name it with --push-to-hub ORG/NAME')
