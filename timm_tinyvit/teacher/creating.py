"""Make a store as it is asked for, or open the one that is there; and the teacher that fills it."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any
from collections.abc import Callable, Mapping

import datasets
import numpy as np
import torch

from ..base.console import info, warning
from ..base.errors import InputError
from ..base.leases import exclusive
from ..base.remote_folder import is_remote
from ..base.text import percent
from ..config.arguments import FEATURE_DEFAULTS, FEATURE_SHARD_BYTES, STORE_DEFAULTS, amp_dtype, store_settings
from ..data.classes import REMEDY, valid_names
from ..data.dataset import SparseLogitDataset, check_no_mixing_with_keys
from ..data.fingerprint import dataset_fingerprint, keyed_fingerprint
from ..data.opening import open_store
from ..data.sources import Source, class_names, find_column
from ..data.streaming import StreamedRows
from ..data.view_config import ViewConfig
from ..data.views import Replay, library_versions
from ..models.loading import create_pretrained
from ..models.names import folder_name
from ..store.local import LogitStore
from ..store.manifest import Manifest
from ..store.object_store import ObjectStore, store_class
from ..store.projection import PROJECTION_NAME
from ..store.remote import open_reader
from ..targets.codec import Codec
from ..targets.codecs import create_codec, create_feature_codec
from .fill import choose_shards
from .projection import NUM_FITTED, fit_projection
from .teacher import Teacher, architecture_of
from .zero_shot import ZeroShotClassifier

__all__ = ['create_store', 'create_teacher', 'grid_of', 'stored_names', 'views_to_fill']


def create_teacher(args: argparse.Namespace, device: torch.device, grid: int | None = None) -> Teacher:
    """The teacher that the flags name.

    Args:
        args: The flags.
        device: Where it runs.
        grid: What it gives, see `Teacher`.

    Raises:
        InputError: There is no such model, or it has no logits or no features of that kind.
    """
    if args.class_embeddings and grid is not None:
        raise InputError('--class-embeddings make classes of a tower, and --targets features asks for its features; '
                         'leave one of them out')
    model = create_pretrained(
        args.teacher, args.teacher_checkpoint, args.teacher_num_classes, grid is None and not args.class_embeddings)
    path, name = Path(args.teacher.removeprefix('local-dir:').removeprefix('hf:')).expanduser(), args.teacher
    if args.teacher_checkpoint or path.exists():
        # A folder's own name, so that a store says nothing of the machine that made it.
        name = f'{architecture_of(model)} ({folder_name(args.teacher_checkpoint or path)})'
    if args.class_embeddings:
        model = ZeroShotClassifier(model, args.class_embeddings)
        name += f' with {folder_name(args.class_embeddings)}'
    return Teacher(model, name, device, amp_dtype(args.teacher_amp_dtype), args.teacher_compile, grid=grid)


def stored_names(teacher: Teacher, dataset: Source, target_key: str | None) -> list[str]:
    """Names of a store's classes: the teacher's, or else those of the data, if as many; with a warning if they differ.
    """
    key = find_column(dataset, target_key, is_image=False)
    names = list(key and class_names(dataset, key) or ())
    if len(names) not in (0, teacher.num_classes):
        warning(f'the teacher {teacher.name} predicts {teacher.num_classes:,} classes, the data have labels of '
                f'{len(names):,}: neither its accuracy nor that of its students can be measured with them; {REMEDY} in '
                f'training, or give --val-dataset with its classes')
        return teacher.class_names
    if not names or not teacher.class_names:
        return teacher.class_names or valid_names(names, teacher.num_classes)
    moved = [(name, place) for place, name in enumerate(names)
             if name in teacher.class_names and teacher.class_names[place] != name]
    if moved:
        name, place = moved[0]
        can_match = set(names) == set(teacher.class_names)
        warning(f'{len(moved)} classes have other numbers for the teacher than in the data, as {name}: '
                f'{teacher.class_names.index(name)} and {place}; ' + (
                    'labels get the teacher\'s by name' if can_match else
                    'as not all names are the same, labels are not compared with its predictions'))
    return teacher.class_names


def target_settings(path: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `STORE_DEFAULTS`: those given, or else of the store at a path, or else the defaults.

    Raises:
        InputError: The store there holds the other kind of targets, or settings are of the other kind.
    """
    there = store_settings(open_reader(path).manifest) if store_class(path).exists(path) else {}
    given, kind = dict(given), given.get('targets', there.get('targets', 'classes'))
    if there and kind != there['targets']:
        raise InputError(f'the store {path} holds {there["targets"]}, and --targets {kind} asks for {kind}; give '
                         f'--logits a new folder, or leave --targets out')
    if kind == 'features':
        given.pop('topk', None)  # of a recipe for classes
    elif given.keys() & {'feature_grid', 'feature_dim'}:
        raise InputError('--feature-grid and --feature-dim are of features; add --targets features')
    return (FEATURE_DEFAULTS if kind == 'features' else STORE_DEFAULTS) | there | given


def grid_of(path: str | Path, given: Mapping[str, Any]) -> int | None:
    """What the teacher of a store gives, see `Teacher`; of a store as `target_settings` finds it."""
    settings = target_settings(path, given)
    return settings['feature_grid'] if settings['targets'] == 'features' else None


def create_store(
        path: str | Path,
        teacher: Teacher,
        dataset: Source,
        epochs: int,
        given: Mapping[str, Any],
        view: Mapping[str, Any],
        image_column: str | None = None,
        label_column: str | None = None,
        shards: range | None = None,
        num_workers: int = 0,
        log: Callable[[str], None] = info,
) -> tuple[LogitStore | ObjectStore, Replay]:
    """Make the store that is asked for, or open the one that is there if it is made the same way.

    Args:
        path: The store.
        teacher: The teacher.
        dataset: What the teacher looks at. A stream is gone through once for its keys, where the store has none yet.
        epochs: The store is meant to hold the epochs before this one.
        given: Settings of `STORE_DEFAULTS` that are asked for; the others are those of the store that is there.
        view: Entries of `ViewConfig` that are asked for; the others likewise.
        image_column: The image column; found by its usual names by default.
        label_column: The label column, likewise.
        shards: The shards of an epoch that will be filled, which must be there.
        num_workers: Loader processes, where the projection of features is fitted.
        log: Takes a line about other versions that make the same views.

    Raises:
        InputError: The store that is there was made another way, or the data set does not fit.
    """
    there, first_epoch, first_sample = None, 0, 0
    settings = target_settings(path, given)
    if store_class(path).exists(path):
        there, replay = open_store(path, view, log)
        manifest = there.manifest
        first_epoch, first_sample = manifest.first_epoch, manifest.first_sample
    if there is None:
        replay = Replay(ViewConfig(**view), settings['store_seed'])
    check_no_mixing_with_keys(replay, settings['key'])
    codec, features = _codec_and_features(settings, teacher, there)
    if features and there is None and 'shard_size' not in given:
        settings['shard_size'] = _fitting_shard_size(codec.width)
    for name, low, high in (('shard_size', 1, 1 << 32), ('teacher_batch_size', 1, 1 << 32),
                            ('store_seed', -1 << 63, (1 << 63) - 1)):
        if not low <= settings[name] <= high:
            raise InputError(f'--{name.replace("_", "-")} is {settings[name]}; expected {low} to {high}')
    if epochs <= first_epoch:
        raise InputError(f'the store {path} begins at epoch {first_epoch}: there is nothing to fill before '
                         f'epoch {epochs}')
    fingerprint, hashes = _fingerprint(path, dataset, settings['key'], there, image_column, label_column)
    if not fingerprint['num_samples']:
        raise InputError('the training data are empty; name another --train-split')
    names = [] if features else stored_names(teacher, dataset, label_column)
    manifest = Manifest(
        num_samples=fingerprint['num_samples'],
        num_classes=teacher.num_classes,
        k=0 if features else settings['topk'],
        record_width=codec.width,
        epochs=epochs - first_epoch,
        seed=settings['store_seed'],
        shard_size=settings['shard_size'],
        first_epoch=first_epoch,
        first_sample=first_sample,
        codec=codec.name,
        class_names=names if there is None else there.manifest.class_names,
        key=settings['key'],
        teacher=teacher.describe(settings['teacher_batch_size']),
        recipe=replay.config.to_dict(),
        versions=library_versions(),
        probe=replay.probe() if there is None else there.manifest.probe,
        dataset=fingerprint,
        features=features,
    )
    choose_shards(manifest, shards, path)
    if there is None and settings['feature_dim']:
        manifest = _with_projection(
            path, manifest, replay, teacher, dataset, image_column, label_column, num_workers, log)
    store = store_class(path).create(path, manifest)
    teacher.project(store.open_projection())
    if hashes is not None and not store.has_keys():
        store.write_keys(hashes)
    return store, replay


def _fitting_shard_size(width: int) -> int:
    """Samples of a shard of features that whoever fills has in memory."""
    return min(FEATURE_DEFAULTS['shard_size'], 1 << max(1, FEATURE_SHARD_BYTES // width).bit_length() - 1)


def _codec_and_features(
        settings: Mapping[str, Any],
        teacher: Teacher,
        there: LogitStore | ObjectStore | None,
) -> tuple[Codec, dict[str, Any]]:
    """The codec of a store, and what its manifest says of features: nothing where it holds classes.

    Raises:
        InputError: The codec cannot hold what is asked for.
    """
    features = {}
    if settings['targets'] == 'features':
        fitted = {'projection': '', 'variance': 1.0} if there is None else {
            name: there.manifest.features[name] for name in ('projection', 'variance')}
        features = {'dim': settings['feature_dim'] or teacher.num_features, 'grid': settings['feature_grid']} | fitted
    try:
        if features:
            return create_feature_codec(settings['codec'], features['dim'], features['grid']), features
        return create_codec(settings['codec'], teacher.num_classes, settings['topk']), features
    except ValueError as error:
        flags = '--codec' if features else \
            f'--topk, --codec; the teacher {teacher.name} has {teacher.num_classes} classes'
        raise InputError(f'{error} ({flags})')


def _fingerprint(
        path: str | Path,
        dataset: Source,
        key: str,
        there: LogitStore | ObjectStore | None,
        image_column: str | None,
        label_column: str | None,
) -> tuple[dict[str, Any], np.ndarray | None]:
    """The fingerprint of a data set, and the hashes of its keys where samples are known by them and all were read.

    Raises:
        InputError: The store that is there was made from other samples.
    """
    is_stream = isinstance(dataset, datasets.IterableDataset)
    if not key and not is_stream:
        return dataset_fingerprint(dataset, image_column, label_column), None
    if there is not None and is_stream and there.has_keys():
        return there.manifest.dataset, None
    fingerprint, hashes = keyed_fingerprint(dataset, key, image_column)
    if there is not None and there.manifest.key and fingerprint != there.manifest.dataset:
        raise InputError(
            f'the store {path} was made from other samples ({len(hashes)} here, {there.manifest.num_samples} '
            f'there) or from the same in another order; fill it from the data set that it was begun with')
    return fingerprint, hashes


def _with_projection(
        path: str | Path,
        manifest: Manifest,
        replay: Replay,
        teacher: Teacher,
        dataset: Source,
        image_column: str | None,
        label_column: str | None,
        num_workers: int,
        log: Callable[[str], None],
) -> Manifest:
    """The manifest of a new store whose features are projected: with the projection that is fitted and written here, or
    by another launch meanwhile, on another device.

    Raises:
        InputError: There is nothing to fit it on, or no place where all launches find it.
    """
    if isinstance(dataset, datasets.IterableDataset):
        raise InputError('--feature-dim is fitted on views from all over the data, which a stream does not give; '
                         'leave --streaming or --feature-dim out')
    if is_remote(path):
        raise InputError(f'--feature-dim is fitted once for all launches, who have no folder in common at {path}; '
                         f'leave it out, or fill a store in a folder')
    dim, num = manifest.features['dim'], teacher.num_features
    with exclusive(Path(path) / PROJECTION_NAME):
        if not LogitStore.exists(path):
            data = SparseLogitDataset(
                dataset, replay, None, image_column, label_column, manifest.key, manifest.first_sample)
            projection, share = fit_projection(
                teacher, data, manifest.first_epoch, dim, manifest.teacher['batch_size'], num_workers)
            log(f'the projection of {num:,} numbers to {dim:,} keeps {percent(share)} of their variance, on '
                f'{min(NUM_FITTED, len(data)):,} views')
            projection.write(Path(path))
            fitted = {'projection': projection.hash, 'variance': share}
            LogitStore.create(path, replace(manifest, features=manifest.features | fitted))
    return replace(manifest, features=LogitStore.open(path).manifest.features)


def views_to_fill(
        store: LogitStore | ObjectStore,
        replay: Replay,
        dataset: Source,
        image_column: str | None = None,
        label_column: str | None = None,
) -> SparseLogitDataset | StreamedRows:
    """What the teacher of a store looks at: the views of its rows."""
    if isinstance(dataset, datasets.IterableDataset):
        return StreamedRows(dataset, replay, store, image_column)
    manifest = store.manifest
    return SparseLogitDataset(
        dataset, replay, None, image_column, label_column, manifest.key, manifest.first_sample, with_digests=True)
