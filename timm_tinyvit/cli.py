"""`timm-tinyvit COMMAND`, also `python -m timm_tinyvit COMMAND`: all that this package does, in one process.

Nothing heavy is imported before the arguments are parsed, so that `--help` and a typing error are answered at once:
each command imports what it needs. Filling and training with several processes have launchers of their own:
`accelerate launch -m timm_tinyvit.save_logits` and `accelerate launch train_distill.py`.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from collections.abc import Sequence

from . import register_models
from .base.console import info, print_result, setup_console
from .base.errors import InputError, reports_input_errors
from .config import commands, training
from .config.arguments import ArgumentParser
from .save_logits import fill, print_filled

if TYPE_CHECKING:
    from .report.labels import LabelledViews
    from .store.local import LogitStore

__all__ = ['main']


def train(args: argparse.Namespace) -> None:
    """Train a student from a store, or from labels."""
    import train_distill

    train_distill.train(args)


def evaluate(args: argparse.Namespace) -> None:
    """Print the accuracy of a model on a validation set."""
    from .base.launch import create_accelerator, stop_with_launcher
    from .train.evaluate import evaluate_checkpoint

    stop_with_launcher()
    accelerator = create_accelerator(args.amp_dtype)
    setup_console(accelerator.is_main_process, args.quiet)
    training.tell_launch(args)
    print_result(', '.join(f'{name} {value:.3f}' for name, value in evaluate_checkpoint(args, accelerator).items()))
    accelerator.end_training()


def check_data(args: argparse.Namespace) -> None:
    """Look at every image of a data set and list what a run would trip over; the exit status is 0 where nothing is
    found, 1 where a run goes on all the same, and 2 where it refuses something."""
    from .data.check import check_dataset
    from .store.remote import open_reader

    store = open_reader(args.logits, args.keep_epochs, args.store_cache) if args.logits else None
    found = check_dataset(
        args.dataset, args.train_split, args.val_split, args.val_dataset, args.input_key, args.target_key, args.key,
        store, args.workers)
    print_result(found.to_json() if args.json else str(found))
    if found.status:
        sys.exit(found.status)


def describe(args: argparse.Namespace) -> None:
    """Print the manifest of a store and how much of it is on disk; with --dataset also the teacher's accuracy."""
    from .report.store import describe_store

    store = _open(args)
    print_result(describe_store(store, _labelled_views(args, store)))


def verify(args: argparse.Namespace) -> None:
    """Read every byte of a store and name every damaged file."""
    from .teacher.check import verify_store

    verify_store(_open(args), args.epochs)


def check(args: argparse.Namespace) -> None:
    """Run the teacher again on a sample of stored views and compare its predictions with the store."""
    from .base.launch import create_accelerator
    from .data.dataset import SparseLogitDataset
    from .data.opening import open_store
    from .data.sources import load_split
    from .teacher.check import check_store, check_teacher
    from .teacher.creating import create_teacher

    dataset = load_split(args.dataset, args.train_split, is_training=True, label_column=args.target_key)
    store, replay = open_store(args.store, {}, info, args.keep_epochs, args.store_cache)
    teacher = create_teacher(args, create_accelerator().device, store.manifest.features.get('grid'))
    teacher.project(store.open_projection())
    data = SparseLogitDataset(dataset, replay, store, args.input_key, args.target_key, args.key)
    check_teacher(store, teacher)
    found = check_store(store, teacher, data)
    same = f'{found["views"]} views: {found["same_records"]} records are identical, '
    if 'mean_cosine' in found:
        print_result(f'{same}vectors have a cosine of {found["mean_cosine"]:.6f} in the mean, '
                     f'{found["least_cosine"]:.6f} at least, with the rounding of the codec {store.manifest.codec}')
        return
    print_result(
        f'{same}{100 * found["share_of_other_ids"]:.3f}% of the classes differ, log-probabilities differ by '
        f'{found["mean_error"]:.2e} on average, {found["largest_error"]:.2e} at most, which includes the rounding of '
        f'the codec {store.manifest.codec}')


def copy(args: argparse.Namespace) -> None:
    """Copy epochs of a store, rows of it, or the samples of a data set with keys."""
    from .data.sources import load_split
    from .teacher.copy import copy_epochs, copy_keys, copy_range

    store = _open(args)
    if not args.dataset:
        if args.samples:
            raise InputError('--samples needs --dataset: the copy keeps a hash of its own images; name the data set')
        print_filled(copy_epochs(store, args.output, args.epochs or store.manifest.stored_epochs))
        return
    dataset = load_split(args.dataset, args.train_split, is_training=True, label_column=args.target_key)
    print_filled(
        copy_range(store, args.output, args.samples, dataset, args.epochs, args.input_key, args.target_key)
        if args.samples else copy_keys(store, args.output, dataset, args.epochs, args.input_key, args.key))


def merge(args: argparse.Namespace) -> None:
    """Merge stores of the same views, whichever epochs, rows or samples each of them has."""
    from .store.remote import open_reader
    from .teacher.copy import merge_stores

    stores = [open_reader(path, args.keep_epochs, args.store_cache) for path in args.stores]
    print_filled(merge_stores(args.output, stores))


def estimate(args: argparse.Namespace) -> None:
    """Print the bytes and hours that a store would take."""
    from .data.sources import load_split
    from .teacher.estimate import estimate_store

    num_samples = args.num_samples or len(load_split(args.dataset, args.train_split, is_training=True))
    print_result(estimate_store(
        num_samples, args.teacher_num_classes, len(args.epochs), args.topk, args.codec, args.views_per_second,
        args.processes, args.keep_epochs, args.feature_dim, args.feature_grid))


def push(args: argparse.Namespace) -> None:
    """Publish a store as a dataset repo of the Hub."""
    from .base.hub_client import check_license, check_repo_id
    from .hub.push_store import PublishedStore, check_complete, publish_store
    from .store.local import LogitStore

    check_repo_id(args.repo)
    store = LogitStore.open(args.store)
    check_complete(store, args.epochs)
    check_license(args.license, 'dataset')
    published = PublishedStore(args.repo, args.private)
    publish_store(store, published, args.epochs, _labelled_views(args, store), args.license)


def report(args: argparse.Namespace) -> None:
    """Report on a store (its teacher's accuracy, confidence and agreement), or write the page of a run again."""
    from .train.metrics import METRICS

    if '://' not in args.path and (Path(args.path) / METRICS).is_file():
        from .report.run import write_run_report

        of_store = ('gallery', 'json', 'epochs', 'max_samples', 'dataset', 'train_split', 'input_key', 'target_key',
                    'key')
        if given := [f'--{name.replace("_", "-")}' for name in of_store if getattr(args, name) not in (None, False)]:
            raise InputError(f'{args.path} is a run; leave out {" and ".join(given)}, which a report on a store takes')
        print_result(str(write_run_report(args.path, args.html)))
    else:
        from .report.store import report_store

        print_result(report_store(
            args.path, args.html, args.gallery, args.json, args.epochs, args.max_samples, args.dataset,
            args.train_split, args.input_key, args.target_key, args.key))


def compare(args: argparse.Namespace) -> None:
    """Compare runs: metrics, settings that differ, and predictions sample by sample."""
    from .report.compare import compare_runs

    print_result(str(compare_runs(args.runs, args.html)))


def publish_model(args: argparse.Namespace) -> None:
    """Publish the model of a run, or a converted checkpoint, with its card on the Hub."""
    from .hub.push_model import publish

    print_result(publish(
        args.folder, args.repo, args.which, args.private, args.license, args.notes or '', args.dry_run))


def convert_model(args: argparse.Namespace) -> None:
    """Convert an official checkpoint into a folder that timm loads."""
    from .hub.convert import convert_checkpoint

    print_result(convert_checkpoint(args.checkpoint, args.model, args.output))


def export(args: argparse.Namespace) -> None:
    """Export a model to ONNX, torch.export or AOTInductor."""
    from .hub.export import export_pretrained

    print_result(export_pretrained(
        args.model, args.format, args.output, args.checkpoint, args.num_classes, args.img_size))


# Name of a command -> what it does, and what adds its arguments; in the order of --help.
COMMANDS = {
    'fill': (fill, commands.add_fill_arguments),
    'train': (train, training.add_arguments),
    'eval': (evaluate, training.add_eval_arguments),
    'data check': (check_data, commands.add_data_check_arguments),
    'store describe': (describe, commands.add_describe_arguments),
    'store verify': (verify, commands.add_verify_arguments),
    'store check': (check, commands.add_check_arguments),
    'store copy': (copy, commands.add_copy_arguments),
    'store merge': (merge, commands.add_merge_arguments),
    'store estimate': (estimate, commands.add_estimate_arguments),
    'store push': (push, commands.add_push_store_arguments),
    'report': (report, commands.add_report_arguments),
    'compare': (compare, commands.add_compare_arguments),
    'publish': (publish_model, commands.add_publish_arguments),
    'convert': (convert_model, commands.add_convert_arguments),
    'export': (export, commands.add_export_arguments),
}
GROUPS = {
    'data': 'check a data set',
    'store': 'describe, verify, check, copy, merge, estimate or push a store',
}


def create_parser() -> ArgumentParser:
    """The parser of all commands; in what it parses, `run` is the function of the command."""
    parser = ArgumentParser(prog='timm-tinyvit', description='TinyViT and fast pretraining distillation for timm.')
    groups = {'': parser.add_subparsers(required=True, metavar='COMMAND')}
    for command, (run, add_arguments) in COMMANDS.items():
        group, _, name = command.rpartition(' ')
        if group not in groups:
            child = groups[''].add_parser(group, help=GROUPS[group])
            groups[group] = child.add_subparsers(required=True, metavar='COMMAND')
        what = ' '.join(run.__doc__.split())
        child = groups[group].add_parser(name, help=what[0].lower() + what[1:].removesuffix('.'), description=what)
        add_arguments(child)
        child.set_defaults(run=run)
    return parser


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run a command with these arguments, by default the command line's."""
    parser = create_parser()
    if '_ARGCOMPLETE' in os.environ:  # a shell wants completions
        import argcomplete

        argcomplete.autocomplete(parser)
    args = parser.parse_args(argv)
    # What is left are flags, which a run records.
    run = vars(args).pop('run')
    if hasattr(args, 'quiet'):
        setup_console(os.environ.get('RANK', '0') == '0', args.quiet)
    register_models()
    run(args)


def _open(args: argparse.Namespace) -> 'LogitStore':
    from .store.remote import open_reader

    return open_reader(args.store, args.keep_epochs, args.store_cache)


def _labelled_views(args: argparse.Namespace, store: 'LogitStore') -> 'LabelledViews | None':
    from .report.labels import labelled_views

    return labelled_views(store, args.dataset, args.train_split, args.input_key, args.target_key, args.key)
