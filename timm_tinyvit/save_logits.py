"""`accelerate launch -m timm_tinyvit.save_logits`: fill a logit store; `timm-tinyvit fill` in one process.

The teacher is run once on every view of every epoch; its most probable classes go to disk. Every process takes the next
missing shard until none is left, and so does every further launch of the same command, on any machine that has the
folder. Stopped at any moment, the same command fills just what is still missing.
"""

import argparse
from typing import TYPE_CHECKING
from collections.abc import Sequence

from . import register_models
from .base.console import info, print_result, setup_console
from .base.errors import reports_input_errors
from .config.arguments import ArgumentParser, given_settings, new_store_arguments
from .config.commands import add_fill_arguments

if TYPE_CHECKING:
    from .store.base import StoreReader

__all__ = ['fill', 'main', 'print_filled']


def fill(args: argparse.Namespace) -> None:
    """Fill a store: run the teacher on every view of the epochs, and publish the store if asked to."""
    # Not before the arguments are parsed.
    from .base.hub_client import check_license
    from .base.launch import create_accelerator, stop_with_launcher
    from .data.sources import load_split
    from .hub.push_store import PublishedStore, publish_store
    from .report.labels import labelled_views
    from .teacher.creating import create_store, create_teacher, grid_of, views_to_fill
    from .teacher.fill import fill_epochs

    stop_with_launcher()
    accelerator = create_accelerator()
    setup_console(accelerator.is_main_process, args.quiet)
    with accelerator.main_process_first():
        dataset = load_split(args.dataset, args.train_split, True, args.streaming, label_column=args.target_key)
    teacher = create_teacher(args, accelerator.device, grid_of(args.logits, given_settings(args)))
    with accelerator.main_process_first():
        store, replay = create_store(
            args.logits, teacher, dataset, args.epochs.stop, shards=args.shards, **new_store_arguments(args))
        if accelerator.is_main_process and args.push_to_hub:
            # What the Hub would refuse in the end, it refuses before the teacher works for days.
            check_license(args.hub_license, 'dataset')
            PublishedStore(args.push_to_hub, args.hub_private).joined(store.manifest, store.manifest.stored_epochs)
    # A copy may begin later, and has no place for the epochs before.
    epochs = range(max(args.epochs.start, store.manifest.first_epoch), args.epochs.stop)
    views = views_to_fill(store, replay, dataset, args.input_key, args.target_key)
    fill_epochs(store, teacher, views, epochs, args.shards, args.workers)
    if accelerator.is_main_process:
        print_filled(store)
        if args.push_to_hub:
            data = None
            if args.streaming:
                info(f'the card has no picture and no accuracy, for which samples from anywhere in the data are '
                     f'needed; for them: timm-tinyvit store push {args.logits} --repo {args.push_to_hub} --dataset '
                     f'{args.dataset}')
            else:
                data = labelled_views(
                    store, args.dataset, args.train_split, args.input_key, args.target_key, args.key)
            publish_store(store, PublishedStore(args.push_to_hub, args.hub_private), None, data, args.hub_license)
    accelerator.end_training()


def print_filled(store: 'StoreReader') -> None:
    """Print which part of a store is on disk."""
    from .report.store import shards_on_disk

    print_result(f'shards           {shards_on_disk(store)}')


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the program with these arguments, by default the command line's."""
    parser = ArgumentParser(prog='save_logits', description='Fill a logit store.')
    add_fill_arguments(parser)
    args = parser.parse_args(argv)
    register_models()
    fill(args)


if __name__ == '__main__':
    main()
