"""`python -m timm_tinyvit.report STORE`: what a store says of its teacher, and what a run says of its student.

Prints the facts of a store, on disk or on the Hub; `--html` writes them as one page, with plots and, where the data set
is named, with pictures. Of a run, and with `--compare` of several, it writes the page anew that a training leaves.
"""

import argparse
import io
import json
import os
from pathlib import Path
from collections.abc import Sequence

import numpy as np

from ..base.console import progress, result, speak
from ..base.errors import InputError, reports_input_errors
from ..base.files import write_atomic
from ..base.hub_client import is_hub_url
from ..config.arguments import ArgumentParser, parse_range
from ..data.dataset import SparseLogitDataset
from ..data.sources import class_names, load_split, read_labels
from ..data.views import Replay, ViewRecipe, check_probe
from ..store.base import StoreReader
from ..store.remote import open_reader
from ..train.metrics import METRICS
from .pictures import choose_samples, draw_gallery, name_classes, show_samples
from .statistics import (
    MAX_EPOCHS, MAX_SAMPLES, StoreStatistics, label_mismatch, rows_of, store_statistics,
)
from .store import plain_report, store_page, text_report

__all__ = ['main', 'report_store']

# Each is downloaded.
MAX_HUB_EPOCHS = 3
NUM_GALLERY_ROWS = 5
NUM_GALLERY_EPOCHS = 6
STORE_FLAGS = (
    'gallery', 'json', 'epochs', 'max_samples', 'dataset', 'train_split', 'input_key', 'target_key', 'key')


def report_store(args: argparse.Namespace) -> None:
    """Print what there is to know of a store, and write the page and the gallery that are asked for.

    Raises:
        InputError: There is no store, it is damaged, the data set is not its own, or a file cannot be written.
    """
    max_epochs = MAX_HUB_EPOCHS if is_hub_url(args.path) and args.epochs is None else MAX_EPOCHS
    store = open_reader(args.path, keep_epochs=max_epochs)
    stored = store.manifest.stored_epochs
    epochs = stored if args.epochs is None else args.epochs
    if not set(epochs) <= set(stored):
        raise InputError(f'the store {store.path} is meant to hold epochs {stored.start}:{stored.stop}, but '
                         f'{epochs.start}:{epochs.stop} are asked for; mend --epochs')
    data, rows, labels, notes = None, None, None, []
    if args.dataset:
        data = SparseLogitDataset(
            load_split(args.dataset, args.train_split, is_training=True),
            Replay(ViewRecipe.from_dict(store.manifest.recipe), store.manifest.seed), store, args.input_key,
            args.target_key, args.key)
        rows = rows_of(data)
        labels = teacher_labels(data, rows, notes)
    else:
        notes.append('teacher accuracy and pictures of the views need the images; give --dataset')
    max_samples = args.max_samples or MAX_SAMPLES
    num_samples = min(max_samples, store.manifest.num_samples if rows is None else len(rows))
    with progress(total=num_samples * min(max_epochs, len(epochs)), desc='report', unit='view', leave=False) as bar:
        statistics = store_statistics(
            store, labels, None if rows is None else np.sort(rows), epochs, max_samples, max_epochs, bar.update)
    if statistics is None:
        notes.append('none of it is filled yet')
    result(json.dumps(plain_report(store, statistics, notes), indent=2) if args.json else
           text_report(store, statistics, notes))
    if not (args.html or args.gallery):
        return
    if statistics is None:
        raise InputError(f'the store {store.path} holds nothing to show yet; fill it first')
    names = name_classes(data, store.manifest.num_classes)
    if args.gallery:
        write_gallery(args.gallery, data, statistics, rows, names)
    if args.html:
        write_page(args.html, store, data, statistics, rows, names, notes)


def teacher_labels(data: SparseLogitDataset, rows: np.ndarray, notes: list[str]) -> np.ndarray | None:
    """Labels of the rows of a store, int64 [num_samples], where they are classes of its teacher; or a note why not."""
    if data.label_key is None:
        notes.append('teacher accuracy unknown: the data set has no labels')
        return None
    found = read_labels(data.dataset, data.label_key)
    mismatch = label_mismatch(found, class_names(data.dataset, data.label_key), data.store.manifest.num_classes)
    if mismatch:
        notes.append(f'teacher accuracy unknown: {mismatch}')
        return None
    labels = np.full(data.store.manifest.num_samples, -1)
    labels[rows] = found
    return labels


def write_gallery(
        path: str,
        data: SparseLogitDataset | None,
        statistics: StoreStatistics,
        rows: np.ndarray,
        names: Sequence[str],
) -> None:
    """Write a picture of some samples under several epochs side by side."""
    if data is None:
        raise InputError('--gallery shows views, which are made from the images; give --dataset')
    manifest = data.store.manifest
    check_probe(data.replay, manifest.probe, manifest.versions)
    chosen = {'varied': choose_samples(statistics)['varied'][:NUM_GALLERY_ROWS]}
    samples = show_samples(data, statistics, chosen, rows, names, NUM_GALLERY_EPOCHS)['varied']
    buffer = io.BytesIO()
    draw_gallery(samples).save(buffer, 'png', optimize=True)
    write_atomic(Path(path), buffer.getbuffer())


def write_page(
        path: str,
        store: StoreReader,
        data: SparseLogitDataset | None,
        statistics: StoreStatistics,
        rows: np.ndarray | None,
        names: Sequence[str],
        notes: list[str],
) -> None:
    """Write the page on a store; without pictures where there is no data set or this machine makes other views."""
    shown = {}
    if data is not None:
        try:
            check_probe(data.replay, store.manifest.probe, store.manifest.versions)
            shown = show_samples(data, statistics, choose_samples(statistics), rows, names)
        except InputError as error:
            notes = [*notes, f'there are no pictures: {error}']
    store_page(store, statistics, names, shown, notes).write(path)


def _check_output(path: str | None, flag: str) -> None:
    """Refuse a file that cannot be written, before the work is done."""
    if path is None:
        return
    folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f'{flag} {path} cannot be written: it is a folder, or in one that may not be written; name '
                         f'a file')


def _check_of_runs(args: argparse.Namespace, what: str) -> None:
    """Refuse flags that runs have no use for, rather than leave their answer out in silence."""
    given = [f'--{name.replace("_", "-")}' for name in STORE_FLAGS if getattr(args, name) not in (None, False)]
    if given:
        raise InputError(f'{what} has no use for what is for stores alone; leave {" and ".join(given)} out')


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog='report', description=__doc__.split('\n')[0])
    parser.add_argument('path', nargs='?', metavar='STORE', help='a store, hf://datasets/ORG/NAME, or folder of a run')
    parser.add_argument('--compare', nargs='+', metavar='RUN', help='folders of runs to show side by side')
    parser.add_argument('--html', metavar='FILE', help='write the HTML page to this file')
    parser.add_argument('--gallery', metavar='FILE', help='write a PNG of some views of several epochs to this file')
    parser.add_argument('--json', action='store_true', help='print the facts of a store as JSON')
    parser.add_argument('--epochs', type=parse_range, metavar='A:B', help='epochs of the store to look at, as in 10:30')
    parser.add_argument('--max-samples', type=int, metavar='N', help=f'samples to look at, {MAX_SAMPLES:,} by default')
    parser.add_argument('--quiet', action='store_true', help='say nothing but results, warnings and errors')
    group = parser.add_argument_group('data')
    group.add_argument('--dataset', metavar='NAME', help='the data set of the store')
    group.add_argument('--train-split', metavar='NAME', help='its split, train by default')
    group.add_argument('--input-key', metavar='NAME', help='image column')
    group.add_argument('--target-key', metavar='NAME', help='label column')
    group.add_argument('--key', metavar='NAME', help='column of keys, the store\'s by default')
    return parser


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the program with these arguments, by default the command line's."""
    parser = _parser()
    args, others = parser.parse_known_args(argv)
    if others and args.path is not None and not others[0].startswith('-'):
        raise InputError(f'{args.path} and {others[0]} are two; give one, or put runs side by side with --compare '
                         f'{args.path} {others[0]}')
    if others:
        parser.error(f'unrecognized arguments: {" ".join(others)}')
    speak(is_first=True, quiet=args.quiet)
    _check_output(args.html, '--html')
    _check_output(args.gallery, '--gallery')
    if args.max_samples is not None and args.max_samples < 1:
        raise InputError(f'--max-samples is {args.max_samples}; expected 1 or more')
    if args.compare:
        _check_of_runs(args, '--compare')
        if args.path is not None:
            raise InputError(f'{args.path} stands beside --compare; name all runs behind --compare, the first of them '
                             f'the one that the others are compared with')
        from .compare import compare_runs

        result(str(compare_runs(args.compare, args.html)))
    elif args.path is None:
        raise InputError('a store or the folder of a run is missing; see --help')
    elif not is_hub_url(args.path) and (Path(args.path) / METRICS).is_file():
        from .run import write_run_report

        _check_of_runs(args, f'the run {args.path}')
        result(str(write_run_report(args.path, args.html)))
    else:
        report_store(args)


if __name__ == '__main__':
    main()
