"""The arguments of `timm-tinyvit fill`, `store`, `report`, `compare`, `publish`, `convert` and `export`."""

import argparse
from pathlib import Path

from ..base.errors import InputError
from .arguments import (
    FEATURE_DEFAULTS, STORE_DEFAULTS, ArgumentParser, add_data_arguments, add_image_arguments, add_keep_arguments,
    add_push_arguments, add_quiet, add_split_arguments, add_store_arguments, add_teacher_arguments, add_view_arguments,
    add_workers,
    check_push_arguments, folder, folder_or_bucket, parse_range, view_arguments,
)
from .timm_flags import REFUSED
from .training import add_validation_data, create_parser

OFFICIAL_MODELS = (
    'tiny_vit_5m_224', 'tiny_vit_11m_224', 'tiny_vit_21m_224', 'tiny_vit_21m_384', 'tiny_vit_21m_512',
    'clip_vit_large_patch14_224')
# Of `STORE_DEFAULTS`, those that the size of a record depends on.
RECORD_SETTINGS = ('targets', 'topk', 'feature_grid', 'feature_dim', 'codec')
FORMATS = ('onnx', 'torch', 'aotinductor')


def add_fill_arguments(parser: ArgumentParser) -> None:
    """The flags of a filling; its recipe may be that of the training."""
    parser.finish = _finish_filling
    parser.refused = REFUSED
    parser.add_recipes(lambda: create_parser().flags)
    add_data_arguments(parser)
    add_view_arguments(parser)
    add_teacher_arguments(parser, required=True)
    group = add_store_arguments(parser)
    group.add_argument('--logits', required=True, type=folder_or_bucket, metavar='STORE',
                       help='the store, a folder or a URL such as s3://BUCKET/NAME')
    group.add_argument('--epochs', required=True, type=parse_range, metavar='A:B',
                       help='epochs to fill: 10:30 for 10 to 29, 30 for 0 to 29')
    group.add_argument('--shards', type=parse_range, metavar='A:B', help='shards of each epoch to fill (default: all)')
    add_push_arguments(
        parser, 'publish the filled store as a dataset repo', 'licence that its card names, as in cc-by-nc-4.0')
    add_quiet(parser)


def _finish_filling(args: argparse.Namespace) -> argparse.Namespace:
    check_push_arguments(args)
    view_arguments(args)
    if args.push_to_hub and '://' in args.logits:
        raise InputError(f'--push-to-hub publishes a store in a folder, and {args.logits} is none; leave it out, and '
                         f'publish a copy with timm-tinyvit store push')
    if args.push_to_hub and args.shards:
        raise InputError('--push-to-hub publishes whole epochs, and --shards fills parts of them; fill the others too, '
                         'and publish the store with timm-tinyvit store push')
    return args


def add_data_check_arguments(parser: ArgumentParser) -> None:
    """Of `data check`."""
    parser.add_argument('dataset', metavar='DATASET',
                        help='Hub name, or a folder of parquet files, images, tars or save_to_disk')
    add_split_arguments(parser)
    add_validation_data(parser)
    parser.add_argument('--key', metavar='NAME', help='column of keys (default: the store\'s)')
    parser.add_argument('--logits', metavar='STORE', help='a store whose images are compared with these')
    parser.add_argument('--json', action='store_true', help='print all of it as JSON, with every sample')
    add_keep_arguments(parser)
    add_workers(parser)
    add_quiet(parser)


def _add_store(parser: ArgumentParser) -> None:
    parser.add_argument('store', metavar='STORE',
                        help='a store, as a folder or URL (hf://datasets/ORG/NAME, s3://BUCKET/NAME)')
    add_keep_arguments(parser)


def _add_its_images(parser: ArgumentParser, required: bool = False) -> None:
    group = add_image_arguments(parser, required)
    group.add_argument('--key', metavar='NAME', help='column of keys (default: the store\'s)')


def add_describe_arguments(parser: ArgumentParser) -> None:
    """Of `store describe`."""
    _add_store(parser)
    _add_its_images(parser)
    add_quiet(parser)


def add_verify_arguments(parser: ArgumentParser) -> None:
    """Of `store verify`."""
    _add_store(parser)
    parser.add_argument('--epochs', type=parse_range, metavar='A:B', help='epochs to read (default: all)')
    add_quiet(parser)


def add_check_arguments(parser: ArgumentParser) -> None:
    """Of `store check`."""
    _add_store(parser)
    _add_its_images(parser, required=True)
    add_teacher_arguments(parser, required=True)
    add_quiet(parser)


def add_copy_arguments(parser: ArgumentParser) -> None:
    """Of `store copy`."""
    _add_store(parser)
    parser.add_argument('--output', required=True, type=folder, metavar='DIR', help='folder of the copy')
    parser.add_argument('--epochs', type=parse_range, metavar='A:B', help='epochs to copy (default: all)')
    parser.add_argument('--samples', type=parse_range, metavar='A:B',
                        help='rows to copy of a store without keys; needs --dataset')
    _add_its_images(parser)
    add_quiet(parser)


def add_merge_arguments(parser: ArgumentParser) -> None:
    """Of `store merge`."""
    parser.add_argument('stores', nargs='+', metavar='STORE', help='stores, as folders or URLs')
    parser.add_argument('--output', required=True, type=folder, metavar='DIR', help='folder of the merged store')
    add_keep_arguments(parser)
    add_quiet(parser)


def add_estimate_arguments(parser: ArgumentParser) -> None:
    """Of `store estimate`."""
    parser.finish = _finish_estimate
    parser.add_argument('--epochs', required=True, type=parse_range, metavar='A:B', help='epochs of the store')
    parser.add_argument('--teacher-num-classes', type=int, metavar='N', help='classes of the teacher')
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument('--num-samples', type=int, metavar='N', help='rows of the data set')
    rows.add_argument('--dataset', metavar='NAME', help='the data set, whose rows are counted')
    parser.add_argument('--train-split', metavar='NAME', help='its split, or a slice of it (default: train)')
    add_store_arguments(parser, RECORD_SETTINGS)
    parser.add_argument('--views-per-second', type=float, metavar='X', help='speed of one process that fills')
    parser.add_argument('--processes', type=int, default=1, metavar='N', help='processes that fill')
    parser.add_argument('--keep-epochs', type=int, default=2, metavar='N', help='epochs on disk in a training '
                        'from the Hub')


def _finish_estimate(args: argparse.Namespace) -> argparse.Namespace:
    defaults = FEATURE_DEFAULTS if args.targets == 'features' else STORE_DEFAULTS
    for name in RECORD_SETTINGS:
        if getattr(args, name) is None:
            setattr(args, name, defaults[name])
    if args.targets == 'features' and not args.feature_dim:
        raise InputError('the bytes of features depend on the numbers of a vector; give --feature-dim, those of the '
                         'teacher or those that they are projected to')
    if args.targets == 'classes' and args.teacher_num_classes is None:
        raise InputError('the bytes of classes depend on the classes of the teacher; give --teacher-num-classes')
    return args


def add_push_store_arguments(parser: ArgumentParser) -> None:
    """Of `store push`."""
    parser.add_argument('store', type=folder, metavar='STORE', help='folder of a store')
    _add_repo(parser, 'dataset', 'licence that the card names, as in cc-by-nc-4.0')
    parser.add_argument('--epochs', type=parse_range, metavar='A:B', help='epochs to push (default: all)')
    _add_its_images(parser)
    add_quiet(parser)


def _add_repo(parser: ArgumentParser, kind: str, licence: str) -> None:
    parser.add_argument('--repo', required=True, metavar='ORG/NAME',
                        help=f'{kind} repo on the Hub, created if it is not there')
    parser.add_argument('--private', action='store_true', help='make a new repo a private one')
    parser.add_argument('--license', metavar='NAME', help=licence)


def add_report_arguments(parser: ArgumentParser) -> None:
    """Of `report`."""
    parser.finish = _finish_report
    parser.add_argument('path', metavar='STORE|RUN', help='a store, as a folder or URL, or the folder of a run')
    parser.add_argument('others', nargs='*', default=[], help=argparse.SUPPRESS)
    _add_html(parser)
    add_quiet(parser)
    group = parser.add_argument_group('of a store')
    group.add_argument('--gallery', metavar='FILE', help='write a PNG of some views of several epochs to this file')
    group.add_argument('--json', action='store_true', help='print the facts as JSON')
    group.add_argument('--epochs', type=parse_range, metavar='A:B', help='epochs to look at, as in 10:30')
    group.add_argument('--max-samples', type=int, metavar='N', help='samples to look at (default: 100,000)')
    _add_its_images(parser)


def _finish_report(args: argparse.Namespace) -> argparse.Namespace:
    if args.others:
        raise InputError(f'{args.path} and {args.others[0]} are two; give one, or put runs side by side with '
                         f'timm-tinyvit compare {args.path} {args.others[0]}')
    return args


def add_compare_arguments(parser: ArgumentParser) -> None:
    """Of `compare`."""
    parser.add_argument('runs', nargs='+', metavar='RUN',
                        help='folders of runs; the others are compared with the first')
    _add_html(parser)
    add_quiet(parser)


def _add_html(parser: ArgumentParser) -> None:
    parser.add_argument('--html', metavar='FILE', help='write the HTML page to this file')


def add_publish_arguments(parser: ArgumentParser) -> None:
    """Of `publish`."""
    parser.add_argument('folder', type=Path, metavar='FOLDER',
                        help='a run, or a folder that timm-tinyvit convert made')
    _add_repo(parser, 'model', 'licence of the weights, as in apache-2.0')
    parser.add_argument('--which', choices=('best', 'last', 'best_ema', 'last_ema'),
                        help='weights of the run (default: the most accurate)')
    parser.add_argument('--notes', type=Path, metavar='FILE', help='Markdown that goes near the top of the card')
    parser.add_argument('--dry-run', type=Path, metavar='DIR', help='write the files to this folder and push nothing')
    add_quiet(parser)


def add_convert_arguments(parser: ArgumentParser) -> None:
    """Of `convert`."""
    parser.add_argument('checkpoint', type=Path, metavar='CHECKPOINT', help='an official .pth file')
    parser.add_argument('--model', required=True, choices=OFFICIAL_MODELS, help='model of the checkpoint')
    parser.add_argument('--output', required=True, type=Path, metavar='DIR', help='folder to write')


def add_export_arguments(parser: ArgumentParser) -> None:
    """Of `export`."""
    parser.add_argument('--model', required=True, metavar='NAME',
                        help='timm name, hf-hub:ORG/NAME, local-dir:PATH or folder')
    parser.add_argument('--checkpoint', metavar='FILE', help='weights, instead of the pretrained ones of that name')
    parser.add_argument('--num-classes', type=int, metavar='N', help='classes of the checkpoint\'s head')
    parser.add_argument('--img-size', type=int, nargs='+', metavar='N', help='another image size')
    parser.add_argument('--format', required=True, choices=FORMATS, help='format of the file')
    parser.add_argument('--output', required=True, type=Path, metavar='FILE', help='file to write')
