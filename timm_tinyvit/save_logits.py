"""`accelerate launch -m timm_tinyvit.save_logits`: fill, verify, check, describe and publish a logit store.

The teacher looks once at every view of every epoch; its most probable classes go to disk. Every process takes the next
missing shard until none is left, and so does every further launch of the same command, on any machine that has the
folder. Stopped at any moment, the same command fills just what is still missing.
"""

import argparse
import math
from collections.abc import Container, Sequence

import numpy as np

from .base.console import log, result, speak
from .base.errors import InputError, reports_input_errors
from .base.hub_client import check_license, check_repo_id, is_hub_url
from .base.launch import create_accelerator, stop_with_launcher
from .config.arguments import (
    STORE_DEFAULTS, ArgumentParser, add_data_arguments, add_push_arguments, add_store_arguments, add_view_arguments,
    parse_arguments, parse_range, view_arguments,
)
from .data.dataset import SparseLogitDataset
from .data.opening import open_store
from .data.sources import class_names, load_split
from .data.views import Replay, ViewRecipe
from .hub.push_store import PublishedStore, check_complete, publish_store
from .hub.store_card import LabelledViews, data_name
from .report.statistics import row_labels
from .report.store import describe_store, shards_on_disk
from .store.base import StoreReader
from .store.local import LogitStore
from .store.reader import ShardStore
from .store.remote import open_reader
from .teacher.check import check_store, verify_store
from .teacher.copy import copy_epochs, copy_keys, copy_range, merge_stores
from .teacher.creating import create_store, create_teacher, views_to_fill
from .teacher.estimate import estimate_store
from .teacher.fill import fill_store

__all__ = []

def completeness(store: StoreReader) -> str:
    """One line: which part of the store is on disk."""
    return f'shards           {shards_on_disk(store)}'


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
    from .config.training import create_parser

    return create_parser()._option_string_actions


def _open_at(args: argparse.Namespace, location: str) -> ShardStore:
    return open_reader(location, args.keep_epochs, args.store_cache)


def _labelled_views(args: argparse.Namespace, store: StoreReader) -> LabelledViews | None:
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
        args.num_samples, args.teacher_num_classes, len(args.epochs), settings['topk'], settings['codec'],
        args.views_per_second, args.processes, args.keep_epochs or 2)


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
            store.remove_leftovers()
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
