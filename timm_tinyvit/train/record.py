"""The record of a run, `run.json`: its flags, code, machines, data and teachers, launch by launch.

Data and stores move, packages are updated and checkouts go on; whoever describes the run later, as a model card does,
finds it here as it was. Under `flags` are the flags as they were given, as a recipe for `--config`; under `decided`
what became of those on views and store. What is shown to others, all but the flags, names no folder, host or user: of a
path only the last part is kept.
"""

import argparse
import json
import platform
import time
from contextlib import contextmanager
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any
from collections.abc import Callable, Iterator

import datasets
import torch
from torch import nn

from ..base.console import info
from ..base.errors import InputError
from ..base.files import check_no_link, read_bounded, remove_leftovers, write_atomic
from ..base.hub_client import is_hub_url
from ..base.launch import device_name
from ..base.leases import Leases
from ..base.machine import source_commit
from ..base.types import COUNT, Number, mismatch, read_json
from ..config.arguments import STORE_DEFAULTS, VIEW_FLAGS, store_settings, view_arguments
from ..config.training import LAUNCH_DEFAULTS, settings
from ..data.classes import Classes
from ..data.sources import data_name
from ..data.view_config import ViewConfig
from ..models.imagenet22k import NUM_CLASSES_22K
from ..models.names import MODEL_FOLDERS, RUN_RECORD, folder_name, hub_repo_of, public_name
from ..store.base import StoreReader
from ..store.local import LogitStore
from ..store.manifest import Manifest
from ..version import __version__
from .batches import TrainBatches
from .checkpoint import TrainState

__all__ = ['PUBLISHED', 'RUN_RECORD', 'launches_of', 'mark_published', 'own_run_folder', 'read_run', 'record_run']

VERSION = 3
LIBRARIES = ('timm', 'torchvision', 'accelerate', 'datasets', 'numpy')
# In the folder of a store: where it was published.
PUBLISHED = '.published'
MAX_BYTES = 1 << 22
POSITIVE = Number(1, 1 << 53, is_whole=True)
DATA = {'name': str, 'on_hub': bool, 'split': str, 'images': POSITIVE}
# What a record holds, see `mismatch`; a stranger may have written it.
RECORD = {
    'version': COUNT,
    # Those that a report reads.
    'flags': {'epochs?': COUNT, 'cooldown_epochs?': COUNT, 'logits?': [str], 'dataset?': str, 'model?': str},
    'decided?': {}, 'changed': [str],
    'recipe': {'model': str, 'alpha?': Number(0, 1), 'input_key?': str, 'target_key?': str},
    'train': DATA,
    'val': {**DATA, 'images': COUNT, 'flags': [str], 'imagenet1k_of_22k': bool},
    'stores': [{
        'name': str, 'on_hub': bool, 'identity': str, 'teacher_repo': (str, None), 'k': COUNT, 'codec': str,
        'features?': dict, 'record_width': POSITIVE, 'epochs': COUNT, 'num_samples': POSITIVE, 'is_mixed': bool,
        'flags': ([str], None), 'teacher': {'name?': str, 'dtype?': str, 'input_size?': [POSITIVE]}}],
    'base': ({'name': str, 'on_hub': bool, 'is_local': bool}, None),
    'epochs': COUNT,
    'images_per_update': POSITIVE,
    'launches': [{
        'epoch': COUNT, 'commit': (str, None), 'environment': {}}],
}
# Of the last launch, for a card.
ENVIRONMENT = {'processes': POSITIVE, 'device': str, 'timm_tinyvit': str, 'timm': str, 'torch': str}
# Flags on how a store is filled, once it is.
TEACHER_FLAGS = (
    'teacher_checkpoint', 'teacher_num_classes', 'class_embeddings', 'teacher_amp_dtype', 'teacher_compile',
    'store_epochs')
# Flags that are no part of a recipe: it would not find what they name on another machine.
NO_RECIPE = ('initial_checkpoint',)


@contextmanager
def own_run_folder(folder: Path, is_main_process: bool) -> Iterator[Callable[[], None]]:
    """Make the folder of a run, or take the one that is there, for one launch at a time; all processes call this.

    The main process holds a lease on it. Another launch waits for as long as it takes to see that its owner is no more,
    and is refused then. What killed processes left half-written in the folder goes.

    Args:
        folder: The folder.
        is_main_process: Whether this is the main process.

    Yields:
        A function that raises an `InputError` in the main process where another launch has taken the folder over.

    Raises:
        InputError: It cannot be made, is in use, or a folder of it is a link.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'the folder {folder} cannot be made: {error.strerror}; choose another --output')
    if not is_main_process:
        yield lambda: None
        return
    models = [folder / name for name in MODEL_FOLDERS]
    for model in models:
        check_no_link(model)
    file = folder / 'run'
    with Leases() as leases:
        deadline, is_told = time.monotonic() + leases.expire + leases.heartbeat, False
        while not leases.acquire(file):
            if time.monotonic() > deadline:
                raise InputError(f'the run in {folder} is in use by {leases.owner(file)}; wait for its end, stop it, '
                                 f'or start another --experiment')
            if not is_told:
                info(f'waiting for {leases.owner(file)}, which has the run in {folder}')
                is_told = True
            time.sleep(0.2)
        leases.expire_in(folder)
        for each in (folder, *models):
            remove_leftovers(each)
        yield lambda: leases.check(file)


def record_run(
        args: argparse.Namespace,
        state: TrainState,
        data: TrainBatches,
        val_set: datasets.Dataset | None,
        classes: Classes,
) -> None:
    """Write `run.json`, at each start of the run.

    Args:
        args: The flags of the trainer.
        state: Where the run is, with its student and its store.
        data: The training batches.
        val_set: The validation split; None where nothing is evaluated.
        classes: Of the student.

    Raises:
        InputError: The disk is full, or may not be written.
    """
    folder, accelerator, student = state.folder, state.accelerator, state.task.student
    # What accelerate is configured to is no default: elsewhere it may not be.
    defaults = vars(settings(['--dataset', args.dataset])) | LAUNCH_DEFAULTS
    decided, plain = _decided(args, state.store), STORE_DEFAULTS | _view_settings(ViewConfig())
    changed = [name for name, value in vars(args).items() if value != defaults[name]]
    recipe = {name: value for name, value in state.settings.items()
              if name == 'model' or name in changed and name not in NO_RECIPE}
    if args.model.startswith('local-dir:'):
        recipe['model'] = f'local-dir:{folder_name(args.model.removeprefix("local-dir:"))}'
    if 'class_map' in recipe:
        recipe['class_map'] = folder_name(args.class_map)
    if state.store is not None:
        # The only mode that views of a store may be mixed in.
        recipe.pop('mixup_mode', None)
    stores = [] if state.store is None else state.store.stores
    stores = [_describe_store(location, store, args.teacher_checkpoint)
              for location, store in zip(args.logits or [], stores)]
    # What others do not see are the folders, by which stores of the same name differ.
    names = [described['name'] for described in stores]
    for number, described in enumerate(stores):
        if described['name'] in names[:number]:
            described['name'] += f'-{number + 1}'
    launch = {'commit': source_commit(), 'environment': _environment(accelerator.device, accelerator.num_processes)}
    write_atomic(folder / RUN_RECORD, json.dumps({
        'version': VERSION,
        'flags': {
            name: value for name, value in vars(args).items() if name != 'config' and value not in (None, [], {})},
        'decided': decided,
        'changed': [*changed, *(name for name, value in decided.items() if value not in (None, plain.get(name)))],
        'recipe': recipe,
        'train': {**_describe_data(args.dataset, args.train_split or 'train'), 'images': data.num_samples},
        'val': {
            **_describe_data(args.val_dataset or args.dataset,
                             args.val_split or (str(val_set.split) if val_set else 'validation')),
            'images': len(val_set or ()), 'flags': _evaluation_flags(args),
            'imagenet1k_of_22k': classes.to_imagenet1k and student.num_classes == NUM_CLASSES_22K},
        'stores': stores,
        'base': _base(args, student),
        'epochs': args.epochs + args.cooldown_epochs,
        'images_per_update': data.images_per_update,
        'launches': launches_of(folder, state.epoch, launch),
    }, indent=2).encode())


def read_run(folder: Path, is_whole: bool = False) -> dict[str, Any]:
    """What `run.json` of a run says; with the surroundings of the last launch as
    `environment`, and as `commits` those of all launches, one after the other.

    Args:
        folder: Folder of the run.
        is_whole: Whether all must be there that a launch writes, as for a card; a report takes what there is.

    Raises:
        InputError: There is none, or none that this package reads.
    """
    file = folder / RUN_RECORD
    try:
        record = read_json(read_bounded(file, MAX_BYTES))
        version = record['version']
    except OSError:
        raise InputError(
            f'{folder} has no {RUN_RECORD}, which each start of a run writes; name the folder of a run of '
            f'timm-tinyvit train, or start the run again; a finished one ends at once')
    except (KeyError, TypeError, ValueError):
        version = None
    why = 'another version of this package wrote it' if version != VERSION else mismatch(
        record, RECORD if is_whole else {f'{name}?': kind for name, kind in RECORD.items()}, '')
    if why is None and not record.get('launches'):
        why = 'it has no launches'
    if why is None and is_whole:
        why = mismatch(record['launches'][-1]['environment'], ENVIRONMENT, 'environment')
    if why:
        raise InputError(f'{file} is not readable as the record of a run, or of another version of this package '
                         f'({why}); start the run again, which writes it anew and ends at once where it is finished')
    for store in record.get('stores', ()):
        # A manifest that another program wrote may say less.
        store['teacher'] = {'name': 'unknown', 'dtype': 'unknown', 'input_size': []} | store['teacher']
    commits = [launch['commit'] for launch in record['launches'] if launch['commit']]
    return record | {
        'environment': record['launches'][-1]['environment'],
        'commits': [commit for number, commit in enumerate(commits) if commit not in commits[:number][-1:]]}


def launches_of(folder: Path, epoch: int, launch: dict[str, Any]) -> list[dict[str, Any]]:
    """The launches of a run, this one included where its surroundings are not those of the one before it.

    Args:
        folder: Folder of the run; its record may be damaged, or missing.
        epoch: Where the launch begins, from 0; those that began later are forgotten.
        launch: Its `commit` and `environment`.
    """
    try:
        found = read_json(read_bounded(folder / RUN_RECORD, MAX_BYTES))
        launches = [] if mismatch(found, {'launches': RECORD['launches']}, '') else [
            {name: before[name] for name in ('epoch', *launch)} for before in found['launches']
            if before['epoch'] <= epoch]
    except (OSError, ValueError):
        launches = []
    is_new = not launches or any(launches[-1][name] != value for name, value in launch.items())
    return [*launches, {'epoch': epoch, **launch}] if is_new else launches


def _environment(device: torch.device, num_processes: int) -> dict[str, Any]:
    """What a launch runs in, as names and versions."""
    environment = {
        'timm_tinyvit': __version__,
        'torch': str(torch.__version__),
        **{name: version(name) for name in LIBRARIES},
        'python': platform.python_version(),
        'cuda': torch.version.cuda if device.type == 'cuda' else None,
        'system': f'{platform.system()} {platform.machine()}',
        'device': device_name(device),
        'processes': num_processes,
        'threads per process': torch.get_num_threads(),
    }
    return {name: value for name, value in environment.items() if value is not None}


def mark_published(store: LogitStore, url: str, epochs: range) -> None:
    """Note in the folder of a store where it is on the Hub, and which epochs of it are.

    Raises:
        InputError: The disk is full or may not be written.
    """
    mark = {'url': url, 'identity': store.manifest.identity, 'epochs': [epochs.start, epochs.stop]}
    write_atomic(store.path / PUBLISHED, f'{json.dumps(mark)}\n'.encode())


def _published_url(store: StoreReader) -> str | None:
    """Where a store in a folder is on the Hub with all of its epochs, as far as it is noted."""
    try:
        mark = read_json(read_bounded(Path(store.path) / PUBLISHED, MAX_BYTES))
        first, stop = mark['epochs']
        # The folder may have been filled anew, or further.
        stored = store.manifest.stored_epochs
        is_whole = mark['identity'] == store.manifest.identity and first <= stored.start and stored.stop <= stop
        return mark['url'] if is_whole and is_hub_url(mark['url']) else None
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        return None


def _describe_data(name: str, split: str) -> dict[str, Any]:
    name, on_hub = data_name(name)
    return {'name': name, 'on_hub': on_hub, 'split': split}


def _evaluation_flags(args: argparse.Namespace) -> list[str]:
    """What else an evaluation needs to give the same figure."""
    given = {'--input-key': args.input_key, '--target-key': args.target_key, '--amp-dtype': args.amp_dtype}
    return [part for flag, value in given.items() if value for part in (flag, value)]


def _decided(args: argparse.Namespace, store: StoreReader | None) -> dict[str, Any]:
    """Settings of views and stores as they turned out, whoever decided them; None for what others of them tell."""
    if store is None:
        return _view_settings(ViewConfig(**view_arguments(args))) | {
            'store_seed': args.store_seed or STORE_DEFAULTS['store_seed']}
    parts = []
    for manifest in (part.manifest for part in store.stores):
        names = ('targets', 'feature_grid', 'feature_dim') if manifest.features else ('topk',)
        there = store_settings(manifest)
        parts.append({name: there[name] for name in (*names, 'codec', 'store_seed')} | {
            'teacher': public_name(manifest.teacher.get('name', '')),
            'teacher_dtype': manifest.teacher.get('dtype'), 'store_hash': manifest.identity})
    told = dict.fromkeys((*STORE_DEFAULTS, *TEACHER_FLAGS))
    if chosen := store.manifest.teacher.get('class_map'):
        # A file is known by its content, and names of the data may do without one.
        digest = blake2b(str(chosen).encode(), digest_size=4).hexdigest()
        told |= {'num_classes': None, 'class_map': f'{len(chosen):,} classes, {digest}'}
    return told | _view_settings(ViewConfig.from_dict(store.stores[0].manifest.recipe)) | {
        name: parts[0].get(name) if len(parts) == 1 else [part.get(name) for part in parts]
        for name in dict.fromkeys(name for part in parts for name in part)}


def _view_settings(views: ViewConfig) -> dict[str, Any]:
    """A view config by its flags."""
    entries = views.to_dict()
    height, width = entries['input_size'][1:]
    return {'img_size': height if height == width else [height, width]} | {
        flag: entries[entry] for flag, entry in VIEW_FLAGS.items()}


def _describe_store(location: str, store: StoreReader, teacher_checkpoint: str | None) -> dict[str, Any]:
    manifest = store.manifest
    teacher = {name: value for name, value in manifest.teacher.items() if name != 'probe'}
    teacher['name'] = public_name(teacher.get('name', ''))
    # The store on the Hub knows its commit, the flag need not.
    url = str(store.path) if is_hub_url(location) else _published_url(store)
    return {
        'name': url or Path(location).expanduser().resolve().name, 'on_hub': url is not None,
        'identity': manifest.identity, 'teacher': teacher,
        'teacher_repo': None if teacher_checkpoint else hub_repo_of(teacher['name']),
        'k': manifest.k, 'features': manifest.features, 'codec': manifest.codec,
        'record_width': manifest.record_width, 'epochs': manifest.epochs, 'num_samples': manifest.num_samples,
        'is_mixed': ViewConfig.from_dict(manifest.recipe).is_mixed, 'flags': _store_flags(manifest),
    }


def _store_flags(manifest: Manifest) -> list[str] | None:
    """The flags of `timm-tinyvit fill`, but for teacher and data, that make a store with such records.

    Returns:
        None where no flags do: of a part of a larger store, and where the manifest, of another program, says less of
        the teacher.
    """
    if manifest.first_epoch or manifest.first_sample:
        return None
    if not {'batch_size', 'dtype'} <= manifest.teacher.keys():
        return None
    plain = ViewConfig().to_dict()
    flags: dict[str, Any] = {'epochs': manifest.epochs}
    if manifest.recipe['input_size'] != plain['input_size']:
        flags['img_size'] = manifest.recipe['input_size'][-1]
    flags |= {flag: manifest.recipe[entry] for flag, entry in VIEW_FLAGS.items()
              if manifest.recipe[entry] != plain[entry]}
    settings = store_settings(manifest)
    defaults = STORE_DEFAULTS | ({'topk': 0, 'codec': 'int8'} if manifest.features else {})
    flags |= {flag: value for flag, value in settings.items() if value != defaults[flag]}
    if manifest.teacher['dtype'] != 'float32':
        flags['teacher_amp_dtype'] = manifest.teacher['dtype']
    words = []
    for flag, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f'--{flag.replace("_", "-")}', *map(str, values)]
    return words


def _base(args: argparse.Namespace, student: nn.Module) -> dict[str, Any] | None:
    """Whose weights the student starts from: a repo of the Hub, a name of timm's, or the last part of a path."""
    folder = args.model.removeprefix('local-dir:')
    path = args.initial_checkpoint or (folder if args.pretrained and folder != args.model else None)
    if path:
        return {'name': folder_name(path), 'on_hub': False, 'is_local': True}
    if args.pretrained:
        # timm gets some from elsewhere.
        repo = student.pretrained_cfg.get('hf_hub_id')
        return {'name': repo or args.model, 'on_hub': bool(repo), 'is_local': False}
    return None
