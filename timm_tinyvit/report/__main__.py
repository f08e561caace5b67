"""`python -m timm_tinyvit.report STORE`: what a store says of its teacher, and what a run says of its student.

Prints the facts of a store, on disk or on the Hub; `--html` writes them as one page, with plots and, where the data set
is named, with pictures. Of a run, and with `--compare` of several, it writes the page anew that a training leaves.
"""

import argparse
from pathlib import Path
from collections.abc import Sequence

from ..base.console import result, speak
from ..base.errors import InputError, reports_input_errors
from ..base.hub_client import is_hub_url
from ..config.arguments import ArgumentParser, parse_range
from ..train.metrics import METRICS
from .statistics import MAX_SAMPLES
from .store import report_store

__all__ = ['main']

STORE_FLAGS = (
    'gallery', 'json', 'epochs', 'max_samples', 'dataset', 'train_split', 'input_key', 'target_key', 'key')


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
        result(report_store(
            args.path, args.html, args.gallery, args.json, args.epochs, args.max_samples, args.dataset,
            args.train_split, args.input_key, args.target_key, args.key))


if __name__ == '__main__':
    main()
