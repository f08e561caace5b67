"""`accelerate launch -m timm_tinyvit.save_logits`: fill, verify, check, describe and publish a logit store.

The teacher looks once at every view of every epoch; its most probable classes go to disk. Every process takes the next
missing shard until none is left, and so does every further launch of the same command, on any machine that has the
folder. Stopped at any moment, the same command fills just what is still missing.
"""

import argparse
import math
from pathlib import Path
from typing import Any
from collections.abc import Callable, Container, Sequence

import datasets
import numpy as np
import torch

from .base.console import log, progress, result, speak, warn
from .base.errors import InputError, reports_input_errors
from .base.hub_client import check_license, check_repo_id, is_hub_url
from .base.launch import create_accelerator, stop_with_launcher
from .config.arguments import (
    STORE_DEFAULTS, ArgumentParser, add_data_arguments, add_push_arguments, add_store_arguments, add_view_arguments,
    amp_dtype, parse_arguments, store_settings, view_arguments,
)
from .data.dataset import SparseLogitDataset, collate, refuse_keys
from .data.fingerprint import dataset_fingerprint, keyed_fingerprint
from .data.sources import Source, class_names, find_column, labels_of, load_split, select_columns
from .data.streaming import StreamedRows
from .data.views import Replay, ViewRecipe, check_probe, library_versions
from .hub.push_store import PublishedStore, check_complete, publish_store
from .hub.store_card import LabelledViews, data_name
from .report.statistics import label_mismatch, rows_of, store_statistics
from .report.store import figures_of, shards_on_disk, store_facts
from .store.ensemble import Ensemble
from .store.keys import KeyIndex
from .store.local import LogitStore, Manifest
from .store.remote import open_store_at
from .targets.codec import create_codec
from .targets.sparsifier import create_sparsifier
from .teacher.copy import copy_epochs, copy_keys, copy_range, merge_stores
from .teacher.estimate import estimate_store
from .teacher.fill import choose_shards, fill_store
from .teacher.teacher import Teacher, create_pretrained
from .train.record import hub_repo_of

__all__ = [
    'check_store', 'check_store_flags', 'create_store', 'create_teacher', 'describe_store', 'open_store', 'open_stores',
    'views_to_fill',
]

NUM_CHECKED = 512


def create_teacher(args: argparse.Namespace, device: torch.device) -> Teacher:
    """The teacher that the flags name."""
    model = create_pretrained(args.teacher, args.teacher_checkpoint, args.teacher_num_classes)
    path, name = Path(args.teacher.removeprefix('local-dir:')).expanduser(), args.teacher
    if path.exists():
        # A folder's own name, so that a store says nothing of the machine that made it.
        name = path.resolve().name
    if args.teacher_checkpoint and hub_repo_of(name):
        # The name with a tag, or of a repo, is that of other weights.
        name = model.pretrained_cfg['architecture']
    return Teacher(model, name, device, amp_dtype(args.teacher_amp_dtype), args.teacher_compile)


def warn_of_other_numbers(teacher: Teacher, dataset: Source, target_key: str | None) -> None:
    """Say so where a class has one number for the teacher and another one in the data."""
    key = find_column(dataset, target_key, is_image=False)
    here, there = class_names(dataset, key) if key else None, teacher.class_names
    if not here or not there:
        return
    # Of a name that several classes share, the first.
    numbers = {name: place for place, name in reversed(list(enumerate(there)))}
    moved = [(name, place) for place, name in enumerate(here)
             if name in numbers and (place >= len(there) or there[place] != name)]
    if moved:
        name, place = moved[0]
        warn(f'{len(moved)} classes have other numbers for the teacher than in the data, as {name}: '
             f'{numbers[name]} and {place}; accuracies and --alpha below 1 would compare different classes')


def open_store(
        path: str,
        given_view: dict[str, Any],
        log: Callable[[str], None] = log,
        keep_epochs: int | None = None,
        cache_dir: str | None = None,
) -> tuple[LogitStore, Replay]:
    """Open a store whose views this machine can replay.

    Args:
        path: The store, a folder or `hf://datasets/ORG/NAME`.
        given_view: Entries of the view recipe that the user asked for.
        log: Takes the line that says which versions differ while the views do not.
        keep_epochs: Of a store on the Hub, see `open_store_at`.
        cache_dir: Likewise.

    Raises:
        InputError: There is no store, a shard of it is cut short or another one, or its views are not those asked for
            or not those that this machine makes.
    """
    store = open_store_at(path, keep_epochs, cache_dir)
    teacher = store.manifest.teacher
    batch_size = teacher.get('batch_size')
    if not {'name', 'weights', 'dtype', 'device', 'input_size'} <= set(teacher) or type(batch_size) is not int or \
            batch_size < 1:
        raise InputError(f'the manifest of {path} says too little of its teacher to go on from; copy the store again')
    recipe = ViewRecipe.from_dict(store.manifest.recipe)
    stored = recipe.to_dict()
    other = [
        f'{key} {value!r} instead of {stored[key]!r}' for key, value in given_view.items() if stored[key] != value]
    if other:
        raise InputError(
            f'these flags ask for other views than the store {path} was made from ({", ".join(other)}); leave them '
            f'out to use the store\'s, or give --logits a new folder')
    replay = Replay(recipe, store.manifest.seed)
    line = check_probe(replay, store.manifest.probe, store.manifest.versions)
    if line:
        log(line)
    store.check_files(store.manifest.stored_epochs)
    return store, replay


def open_stores(
        paths: Sequence[str],
        given_view: dict[str, Any],
        log: Callable[[str], None] = log,
        keep_epochs: int | None = None,
        cache_dir: str | None = None,
) -> tuple[LogitStore | Ensemble, Replay]:
    """Open one store, or several of different teachers as an ensemble; see `open_store`."""
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise InputError(f'--logits names {twice[0]} twice; an average is of different stores')
    opened = [open_store(path, given_view, log, keep_epochs, cache_dir) for path in paths]
    stores = [store for store, _ in opened]
    return stores[0] if len(stores) == 1 else Ensemble(stores), opened[0][1]


def check_store_flags(store: LogitStore | Ensemble, args: argparse.Namespace) -> None:
    """Refuse flags that ask for other targets than a store has.

    Raises:
        InputError: They do.
    """
    for part in store.stores if isinstance(store, Ensemble) else [store]:
        there = store_settings(part.manifest)
        names = ['sparsifier', 'topk', 'codec', 'store_seed'] + ['top_p'] * (part.manifest.sparsifier == 'nucleus')
        for name in names:
            given, value = getattr(args, name), there[name]
            if given not in (None, value):
                flag = f'--{name.replace("_", "-")}'
                raise InputError(f'the store {part.path} has {flag} {value}, and {given} is asked for; leave {flag} '
                                 f'out, or where a recipe has it give {flag} {value}, or name another store')


def create_store(
        path: str,
        args: argparse.Namespace,
        teacher: Teacher,
        dataset: Source,
        epochs: int,
        log: Callable[[str], None] = log,
) -> tuple[LogitStore, Replay]:
    """Make the store that the flags describe, or open the one that is there if it is made the same way.

    Settings without a flag come from the store that is there, or else from `STORE_DEFAULTS`.

    Args:
        path: The store.
        args: The flags.
        teacher: The teacher.
        dataset: What the teacher looks at. A stream is gone through once for its keys, where the store has none yet.
        epochs: The store is meant to hold the epochs before this one.
        log: Takes a line about other versions that make the same views.

    Raises:
        InputError: The store that is there was made another way, or the data set does not fit.
    """
    there, first_epoch, first_sample = None, 0, 0
    settings = dict(STORE_DEFAULTS)
    if LogitStore.exists(path):
        there, replay = open_store(path, view_arguments(args), log)
        manifest = there.manifest
        first_epoch, first_sample = manifest.first_epoch, manifest.first_sample
        settings = store_settings(manifest)
    settings.update({key: getattr(args, key) for key in settings if getattr(args, key) is not None})
    if there is None:
        replay = Replay(ViewRecipe(**view_arguments(args)), settings['store_seed'])
    refuse_keys(replay, settings['key'])
    try:
        top_p = settings['top_p'] if settings['sparsifier'] == 'nucleus' else 1.0
        sparsifier = create_sparsifier(settings['sparsifier'], settings['topk'], top_p)
        name = settings['codec'] or sparsifier.default_codec
        codec = create_codec(name, teacher.num_classes, settings['topk'], sparsifier.remainder)
        sparsifier.check_codec(codec)
    except ValueError as error:
        raise InputError(
            f'{error} (--sparsifier, --topk, --top-p, --codec; the teacher {teacher.name} has '
            f'{teacher.num_classes} classes)')
    for name, low, high in (('shard_size', 1, 1 << 32), ('teacher_batch_size', 1, 1 << 32),
                            ('store_seed', -1 << 63, (1 << 63) - 1)):
        if not low <= settings[name] <= high:
            raise InputError(f'--{name.replace("_", "-")} is {settings[name]}; expected {low} to {high}')
    if epochs <= first_epoch:
        raise InputError(f'the store {path} begins at epoch {first_epoch}: there is nothing to fill before '
                         f'epoch {epochs}')
    hashes = None
    is_stream = isinstance(dataset, datasets.IterableDataset)
    if not settings['key'] and not is_stream:
        fingerprint = dataset_fingerprint(dataset, args.input_key, args.target_key)
    elif there is not None and is_stream and KeyIndex.exists(there.path):
        fingerprint = there.manifest.dataset
    else:
        fingerprint, hashes = keyed_fingerprint(dataset, settings['key'], args.input_key)
        if there is not None and there.manifest.key and fingerprint != there.manifest.dataset:
            raise InputError(
                f'the store {path} was made from other samples ({len(hashes)} here, {there.manifest.num_samples} '
                f'there) or from the same in another order; fill it from the data set that it was begun with')
    if not fingerprint['num_samples']:
        raise InputError('the training data are empty; name another --train-split')
    warn_of_other_numbers(teacher, dataset, args.target_key)
    manifest = Manifest(
        num_samples=fingerprint['num_samples'],
        num_classes=teacher.num_classes,
        k=settings['topk'],
        record_width=codec.width,
        epochs=epochs - first_epoch,
        seed=settings['store_seed'],
        shard_size=settings['shard_size'],
        first_epoch=first_epoch,
        first_sample=first_sample,
        sparsifier=sparsifier.name,
        top_p=top_p,
        remainder=sparsifier.remainder,
        codec=codec.name,
        key=settings['key'],
        teacher=teacher.describe(settings['teacher_batch_size']),
        recipe=replay.recipe.to_dict(),
        versions=library_versions(),
        probe=replay.probe() if there is None else there.manifest.probe,
        dataset=fingerprint,
    )
    choose_shards(manifest, getattr(args, 'shards', None), path)
    store = LogitStore.create(path, manifest)
    if hashes is not None and not KeyIndex.exists(store.path):
        KeyIndex.write(store.path, store.manifest, hashes)
    return store, replay


def views_to_fill(
        args: argparse.Namespace,
        store: LogitStore,
        replay: Replay,
        dataset: Source,
) -> SparseLogitDataset | StreamedRows:
    """What the teacher of a store looks at: the views of its rows."""
    if args.streaming:
        return StreamedRows(dataset, replay, store, args.input_key)
    manifest = store.manifest
    return SparseLogitDataset(
        dataset, replay, None, args.input_key, args.target_key, manifest.key, manifest.first_sample)


def check_store(store: LogitStore, teacher: Teacher, data: SparseLogitDataset) -> dict[str, float]:
    """Run the teacher again on a sample of stored views.

    Returns:
        `views` looked at, `same_records` that come out bit for bit, `share_of_other_ids`, `mean_error` and
        `largest_error` of the log-probabilities of ids that are in both.

    Raises:
        InputError: The store holds no complete epoch.
    """
    manifest = store.manifest
    epochs = [epoch for epoch in manifest.stored_epochs if not store.missing([epoch])]
    if not epochs:
        raise InputError(f'the store {store.path} holds no complete epoch yet; fill it first')
    picks = np.random.Generator(np.random.PCG64(0))
    count = min(NUM_CHECKED, len(epochs) * len(data))
    keys = [
        (int(epoch), int(index)) for epoch, index in
        zip(picks.choice(epochs, count), picks.integers(len(data), size=count))
    ]
    same_records, other, listed, errors = 0, 0, 0, []
    batch_size = manifest.teacher['batch_size']
    sparsifier = create_sparsifier(manifest.sparsifier, manifest.k, manifest.top_p, manifest.seed)
    for start in range(0, count, batch_size):
        part = keys[start:start + batch_size]
        batch = collate(data.__getitems__(part))
        stored = store.codec.decode(batch['record'])
        # By what the views were drawn by, as when the store was filled: with keys it is not the position.
        fresh = sparsifier(teacher(batch['view']), [epoch for epoch, _ in part], batch['index'].tolist()).to('cpu')
        same_records += int((store.codec.encode(fresh) == batch['record'].numpy()).all(axis=1).sum())
        same = (stored.ids[:, :, None] == fresh.ids[:, None, :]) & fresh.valid[:, None, :]  # [B, k, k]
        same &= stored.valid[:, :, None]
        other += int((stored.valid & ~same.any(dim=2)).sum())
        listed += int(stored.valid.sum())
        rows, here, there = same.nonzero(as_tuple=True)
        errors.append((stored.log_probs[rows, here] - fresh.log_probs[rows, there]).abs())
    error = torch.cat(errors)
    return {
        'views': count,
        'same_records': same_records,
        'share_of_other_ids': other / listed,
        'mean_error': error.mean().item(),
        'largest_error': error.max().item(),
    }


def completeness(store: LogitStore) -> str:
    """One line: which part of the store is on disk."""
    return f'shards           {shards_on_disk(store)}'


def verify_store(store: LogitStore, epochs: Sequence[int] | None = None) -> None:
    """Read every byte of a store and print what is wrong, one line each, or that all is well.

    Args:
        store: The store.
        epochs: Which epochs of it; all by default.

    Raises:
        InputError: Something is wrong, or the store is not meant to hold these epochs.
    """
    stored = store.manifest.stored_epochs
    epochs = stored if epochs is None else epochs
    if len(epochs) and not (epochs[0] in stored and epochs[-1] in stored):
        raise InputError(
            f'epochs {epochs[0]}:{epochs[-1] + 1} are to be verified, but the store {store.path} has '
            f'{stored.start}:{stored.stop}; mend --epochs')
    num_problems = 0
    for problem in store.verify(progress(epochs, desc='verify', unit='epoch', leave=False)):
        result(problem)
        num_problems += 1
    if num_problems:
        raise InputError(f'{store.path} has {num_problems} problem(s), one on each line above')
    result(f'{store.path}: {len(epochs) * store.manifest.num_shards} shards, every byte as it was written')


def describe_store(
        store: LogitStore,
        labels: np.ndarray | None = None,
        label_names: Sequence[str] | None = None,
) -> str:
    """The manifest, what is on disk, and with labels that are the teacher's classes its accuracy, as text."""
    facts = store_facts(store)
    if labels is None or labels.max() < 0:
        facts['teacher accuracy'] = 'unknown; give --dataset to compare with the labels'
    elif mismatch := label_mismatch(labels, label_names, store.manifest.num_classes):
        facts['teacher accuracy'] = f'unknown; {mismatch}'
    else:
        statistics = store_statistics(store, labels, np.flatnonzero(labels >= 0))
        facts |= {} if statistics is None else figures_of(statistics, store)
    return '\n'.join(f'{name:<17}{fact}' for name, fact in facts.items())


def read_labels(dataset: datasets.Dataset, label_key: str) -> np.ndarray:
    """All labels of a data set, int64 [N]; -1 where there is none."""
    return labels_of(select_columns(dataset, label_key)[:], label_key)


def row_labels(data: SparseLogitDataset) -> np.ndarray:
    """Labels of the rows of a store, int64 [num_samples]; -1 where the data set has no label, or no such sample."""
    labels = read_labels(data.dataset, data.label_key)
    if data.keys is None:
        return labels
    found = np.full(data.store.manifest.num_samples, -1)
    found[rows_of(data)] = labels
    return found


def reuse_stores(args: argparse.Namespace) -> LogitStore:
    """The store that `--copy-to` or `--merge-from` makes from others."""
    if args.merge_from:
        return merge_stores(args.logits, [_open_at(args, path) for path in args.merge_from])
    store = _open_at(args, args.logits)
    if not args.dataset:
        if args.samples:
            raise InputError('--samples without --dataset: the copy is told from others by its images; name the data')
        return copy_epochs(store, args.copy_to, args.epochs or store.manifest.stored_epochs)
    dataset = load_split(args.dataset, args.train_split, is_training=True)
    if args.samples:
        return copy_range(
            store, args.copy_to, args.samples, dataset, args.epochs, args.input_key, args.target_key)
    return copy_keys(store, args.copy_to, dataset, args.epochs, args.input_key, args.key)


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


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog='save_logits', description=__doc__.split('\n')[0])
    add_data_arguments(parser)
    add_view_arguments(parser)
    add_store_arguments(parser)
    parser.add_argument('--epochs', type=parse_range, metavar='A:B',
                        help='epochs to fill, verify, copy or push: 10:30 for 10 to 29, 30 for 0 to 29')
    parser.add_argument('--shards', type=parse_range, metavar='A:B', help='shards of each epoch to fill (default: all)')
    parser.add_argument('--copy-to', metavar='DIR', help='copy --epochs, --samples, or the keys of --dataset, there')
    parser.add_argument('--samples', type=parse_range, metavar='A:B', help='rows to copy of a store without keys')
    parser.add_argument('--merge-from', nargs='+', metavar='DIR', help='merge these stores into --logits')
    parser.add_argument('--estimate', action='store_true', help='print the bytes and hours that a store would take; '
                        'needs --epochs, --teacher-num-classes, and --num-samples or --dataset')
    parser.add_argument('--num-samples', type=int, metavar='N', help='for --estimate: rows, instead of --dataset')
    parser.add_argument('--views-per-second', type=float, metavar='X', help='for --estimate: speed of one process')
    parser.add_argument('--processes', type=int, default=1, metavar='N', help='for --estimate: processes that fill')
    parser.add_argument('--verify', action='store_true', help='read every byte of --epochs, or of all epochs')
    parser.add_argument('--check', action='store_true', help='run --teacher again on a sample of stored views')
    parser.add_argument('--describe', action='store_true',
                        help='print manifest, completeness and size; with --dataset also the teacher\'s accuracy')
    add_push_arguments(
        parser, 'publish the store as a dataset repo of the Hub', 'licence that its card names, as in cc-by-nc-4.0')
    parser.add_argument('--quiet', action='store_true', help='say nothing but results, warnings and errors')
    return parser


def _trainer_flags() -> Container[str]:
    """Flags of train_distill, with which a recipe may be shared."""
    from train_distill import create_parser  # it imports this module

    return create_parser()._option_string_actions


def _open_at(args: argparse.Namespace, location: str) -> LogitStore:
    return open_store_at(location, args.keep_epochs, args.store_cache)


def _labelled_views(args: argparse.Namespace, store: LogitStore) -> LabelledViews | None:
    """The data set that the flags name, as that of a store; None where they name none."""
    if not args.dataset:
        return None
    dataset = load_split(args.dataset, args.train_split, is_training=True)
    replay = Replay(ViewRecipe.from_dict(store.manifest.recipe), store.manifest.seed)
    data = SparseLogitDataset(dataset, replay, store, args.input_key, args.target_key, args.key)
    origin = *data_name(args.dataset), args.train_split or 'train'
    columns = {'image_key': args.input_key, 'label_key': args.target_key}
    columns = {key: name for key, name in columns.items() if name}
    if data.label_key is None:
        return LabelledViews(*origin, data, np.full(store.manifest.num_samples, -1), None, columns)
    return LabelledViews(*origin, data, row_labels(data), class_names(dataset, data.label_key), columns)


def _publish(args: argparse.Namespace, store: LogitStore, epochs: range | None) -> None:
    check_complete(store, epochs)
    check_license(args.hub_license, 'dataset')
    published = PublishedStore(args.push_to_hub, args.hub_private)
    data = None
    if args.streaming:
        log('the card has no picture and no accuracy, which want samples from anywhere in the data: push again with '
            '--dataset and without --streaming and --teacher for them')
    else:
        data = _labelled_views(args, store)
    publish_store(store, published, epochs, data, args.hub_license)


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse what does not go together.

    Raises:
        InputError: It does not.
    """
    if args.workers < 0:
        raise InputError(f'--workers is {args.workers}; expected 0 or more')
    if args.keep_epochs is not None and args.keep_epochs < 1:
        raise InputError(f'--keep-epochs is {args.keep_epochs}; expected at least 1')
    if args.samples and not args.copy_to:
        raise InputError('--samples names rows to copy; give --copy-to too, or leave it out')
    if args.merge_from and (args.copy_to or args.epochs):
        raise InputError('--merge-from takes all epochs of its stores; leave --copy-to and --epochs out, or copy them '
                         'out first')
    is_read = args.verify or args.describe or args.check or args.copy_to
    written = args.copy_to or (None if is_read else args.logits)
    if written and is_hub_url(written):
        raise InputError(f'{written} is on the Hub, where a store is only read; give a folder, and publish it with '
                         f'--push-to-hub')
    if (args.hub_private or args.hub_license) and not args.push_to_hub:
        raise InputError('--hub-private and --hub-license without --push-to-hub: name the repo that they are for')
    if args.push_to_hub:
        check_repo_id(args.push_to_hub)
        others = {'--shards': args.shards, '--merge-from': args.merge_from, '--copy-to': args.copy_to,
                  '--check': args.check, '--verify': args.verify, '--describe': args.describe}
        for flag, value in others.items():
            if value:
                raise InputError(f'--push-to-hub publishes a whole store, and {flag} does something else; run the one '
                                 f'after the other')


def _require(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) is None:
            raise InputError(f'--{name.replace("_", "-")} is missing; see --help')


def _estimate(args: argparse.Namespace) -> str:
    _require(args, 'epochs', 'teacher_num_classes')
    if args.num_samples is None:
        if args.dataset is None:
            raise InputError('--num-samples is missing, or --dataset to count them; see --help')
        args.num_samples = len(load_split(args.dataset, args.train_split, is_training=True))
    for name in ('num_samples', 'teacher_num_classes', 'processes', 'views_per_second'):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f'--{name.replace("_", "-")} is {value}; expected more than 0')
    settings = {key: default if getattr(args, key) is None else getattr(args, key)
                for key, default in STORE_DEFAULTS.items()}
    return estimate_store(
        args.num_samples, args.teacher_num_classes, len(args.epochs), settings['sparsifier'], settings['topk'],
        settings['top_p'], settings['codec'], args.views_per_second, args.processes, args.keep_epochs or 2)


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the program with these arguments, by default the command line's."""
    args = parse_arguments(_parser(), argv, _trainer_flags)
    args.dataset = args.dataset or args.data_dir
    if args.estimate:
        print(_estimate(args))
        return
    _require(args, 'logits')
    _check_flags(args)
    stop_with_launcher()
    accelerator = create_accelerator()
    speak(accelerator.is_main_process, args.quiet)
    if args.verify:
        if accelerator.is_main_process:
            verify_store(_open_at(args, args.logits), args.epochs)
        return
    if args.describe:
        if not accelerator.is_main_process:
            return
        store = _open_at(args, args.logits)
        data = _labelled_views(args, store)
        result(describe_store(store) if data is None else describe_store(store, data.labels, data.class_names))
        return
    if args.push_to_hub and not args.teacher:
        if accelerator.is_main_process:
            _publish(args, LogitStore.open(args.logits), args.epochs)
        return

    if args.copy_to or args.merge_from:
        if accelerator.is_main_process:
            result(completeness(reuse_stores(args)))
        return

    _require(args, 'dataset', 'teacher')
    if args.check and args.streaming:
        raise InputError('--check wants samples from anywhere in the data, which a stream does not give; leave '
                         '--streaming out')
    with accelerator.main_process_first():
        dataset = load_split(args.dataset, args.train_split, is_training=True, streaming=args.streaming)
    if args.check and not accelerator.is_main_process:
        return
    teacher = create_teacher(args, accelerator.device)
    if args.check:
        store, replay = open_store(args.logits, view_arguments(args), log, args.keep_epochs, args.store_cache)
        data = SparseLogitDataset(dataset, replay, store, args.input_key, args.target_key, args.key)
        if teacher.weights != store.manifest.teacher['weights']:
            raise InputError(
                f'{args.teacher} is not the teacher of the store {args.logits}: it was made with '
                f'{store.manifest.teacher["name"]} of other weights; give --teacher that one')
        found = check_store(store, teacher, data)
        result(
            f'{found["views"]} views: {found["same_records"]} come out bit for bit as they were stored, '
            f'{100 * found["share_of_other_ids"]:.3f}% other ids, log-probabilities differ by '
            f'{found["mean_error"]:.2e} in the mean, {found["largest_error"]:.2e} at most, with the rounding of the '
            f'codec {store.manifest.codec}')
        return

    _require(args, 'epochs')
    with accelerator.main_process_first():
        store, replay = create_store(args.logits, args, teacher, dataset, args.epochs.stop)
        if accelerator.is_main_process:
            store.remove_stale()
            if args.push_to_hub:
                # What the Hub would refuse in the end, it refuses before the teacher works for days.
                check_license(args.hub_license, 'dataset')
                PublishedStore(args.push_to_hub, args.hub_private).joined(store.manifest, store.manifest.stored_epochs)
    data = views_to_fill(args, store, replay, dataset)
    # A copy may begin later, and has no place for the epochs before.
    epochs = range(max(args.epochs.start, store.manifest.first_epoch), args.epochs.stop)
    fill_store(store, teacher, data, epochs, args.shards, args.workers)
    if accelerator.is_main_process:
        result(completeness(store))
        if args.push_to_hub:
            _publish(args, store, None)
    accelerator.end_training()


if __name__ == '__main__':
    main()
