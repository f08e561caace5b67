"""What made a run: its code, machine, data and teachers, kept as `run.json` beside `args.yaml`.

Data and stores move, packages are updated and checkouts go on; whoever describes the run later, as a model card does,
finds it here as it was. Nothing in it names a folder of the machine: of a path only the last part is kept.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import datasets
import timm
import torch
from accelerate import Accelerator
from torch import nn

from ..base.errors import InputError
from ..base.files import write_aside
from ..base.hub_client import is_hub_url
from ..base.launch import device_name
from ..base.machine import source_commit
from ..config.arguments import STORE_DEFAULTS, VIEW_FLAGS, store_settings
from ..data.views import ViewRecipe
from ..models.imagenet22k import NUM_CLASSES_22K
from ..models.names import hub_repo_of, public_name
from ..store.ensemble import Ensemble
from ..store.local import LogitStore
from ..store.manifest import Manifest
from ..targets.sparsifier import sparsifiers
from ..version import __version__

__all__ = ['PUBLISHED', 'RUN_RECORD', 'mark_published', 'read_run', 'record_run']

RUN_RECORD = 'run.json'
VERSION = 2
# In the folder of a store: where it was published.
PUBLISHED = '.published'
# Folders of a run's models, whose own names say little.
MODEL_FOLDERS = ('best', 'last', 'best_ema', 'last_ema')
# Settings of the run that are no part of a recipe: it would not find them on another machine.
NO_RECIPE = ('initial_checkpoint',)


def record_run(
        folder: Path,
        args: argparse.Namespace,
        decisive: dict[str, Any],
        defaults: argparse.Namespace,
        student: nn.Module,
        store: LogitStore | Ensemble | None,
        train_images: int,
        val_set: datasets.Dataset,
        to_imagenet1k: bool,
        images_per_update: int,
        accelerator: Accelerator,
) -> None:
    """Write `run.json`, at each start of the run.

    Args:
        folder: Folder of the run.
        args: All settings.
        decisive: Those that decide the weights.
        defaults: The settings of a run without flags.
        student: The model, at its final size.
        store: What it learns from.
        train_images: Images of the training split.
        val_set: The evaluation split.
        to_imagenet1k: Its labels are those of ImageNet-1k.
        images_per_update: Images of one update, over all processes.
        accelerator: Knows the processes.
    """
    recipe = {
        name: value for name, value in decisive.items()
        if name == 'model' or name not in NO_RECIPE and name in defaults and value != getattr(defaults, name)}
    if args.model.startswith('local-dir:'):
        recipe['model'] = f'local-dir:{_folder_name(args.model.removeprefix("local-dir:"))}'
    if store is not None:
        # The only mode that views of a store may be mixed in.
        recipe.pop('mixup_mode', None)
    stores = [] if store is None else getattr(store, 'stores', [store])
    stores = [_describe_store(location, store, args.teacher_checkpoint)
              for location, store in zip(args.logits or [], stores)]
    # What others do not see are the folders, by which stores of the same name differ.
    names = [described['name'] for described in stores]
    for number, described in enumerate(stores):
        if described['name'] in names[:number]:
            described['name'] += f'-{number + 1}'
    commit, before = source_commit(), _commits_before(folder)
    write_aside(folder / RUN_RECORD, json.dumps({
        'version': VERSION,
        'recipe': recipe,
        'train': {**_describe_data(args.dataset, args.train_split or 'train'), 'images': train_images},
        'val': {
            **_describe_data(args.val_dataset or args.dataset, args.val_split or str(val_set.split)),
            'images': len(val_set), 'flags': _evaluation_flags(args),
            'imagenet1k_of_22k': to_imagenet1k and student.num_classes == NUM_CLASSES_22K},
        'stores': stores,
        'base': _base(args, student),
        'epochs': args.epochs + args.cooldown_epochs,
        'images_per_update': images_per_update,
        'processes': accelerator.num_processes,
        'device': device_name(accelerator.device),
        'versions': {'timm_tinyvit': __version__, 'timm': timm.__version__, 'torch': torch.__version__},
        'commits': [*before, commit] if commit and commit not in before[-1:] else before,
    }, indent=2).encode())


def _commits_before(folder: Path) -> list[str]:
    """The commits that an earlier start of the run had, whatever version of this package wrote them."""
    try:
        return [str(commit) for commit in json.loads((folder / RUN_RECORD).read_text(encoding='utf-8'))['commits']]
    except (KeyError, OSError, TypeError, ValueError):
        return []


def read_run(folder: Path) -> dict[str, Any]:
    """What `run.json` of a run says.

    Raises:
        InputError: There is none, or none that this package reads.
    """
    file = folder / RUN_RECORD
    try:
        record = json.loads(file.read_text(encoding='utf-8'))
        if record['version'] == VERSION:
            return record
    except OSError:
        raise InputError(
            f'{folder} has no {RUN_RECORD}, which each start of a run writes; name the folder of a run of '
            f'train_distill, or start it again, which ends at once where it is finished')
    except (KeyError, TypeError, ValueError):
        pass
    raise InputError(f'{file} is not readable as the record of a run, or of another version of this package; start the '
                     f'run again, which writes it anew and ends at once where it is finished')


def mark_published(store: LogitStore, url: str, epochs: range) -> None:
    """Note in the folder of a store where it is on the Hub, and which epochs of it are.

    Raises:
        InputError: The disk is full or may not be written.
    """
    mark = {'url': url, 'identity': store.manifest.identity, 'epochs': [epochs.start, epochs.stop]}
    write_aside(store.path / PUBLISHED, f'{json.dumps(mark)}\n'.encode())


def _published_url(store: LogitStore) -> str | None:
    """Where a store in a folder is on the Hub with all of its epochs, as far as it is noted."""
    try:
        mark = json.loads((Path(store.path) / PUBLISHED).read_text(encoding='utf-8'))
        first, stop = mark['epochs']
        # The folder may have been filled anew, or further.
        stored = store.manifest.stored_epochs
        is_whole = mark['identity'] == store.manifest.identity and first <= stored.start and stored.stop <= stop
        return str(mark['url']) if is_whole else None
    except (KeyError, OSError, TypeError, ValueError):
        return None


def _describe_data(name: str, split: str) -> dict[str, Any]:
    name = name.removeprefix('hfds/')
    path = Path(name).expanduser()
    on_hub = not path.exists()
    return {'name': name if on_hub else path.resolve().name, 'on_hub': on_hub, 'split': split}


def _evaluation_flags(args: argparse.Namespace) -> list[str]:
    """What else an evaluation needs to give the same figure."""
    given = {'--input-key': args.input_key, '--target-key': args.target_key, '--amp-dtype': args.amp_dtype}
    return [part for flag, value in given.items() if value for part in (flag, value)]


def _describe_store(location: str, store: LogitStore, teacher_checkpoint: str | None) -> dict[str, Any]:
    manifest = store.manifest
    teacher = public_name(manifest.teacher.get('name', ''))
    # The store on the Hub knows its commit, the flag need not.
    url = str(store.path) if is_hub_url(location) else _published_url(store)
    return {
        'name': url or Path(location).expanduser().resolve().name, 'on_hub': url is not None,
        'identity': manifest.identity, 'teacher': {**manifest.teacher, 'name': teacher},
        'teacher_repo': None if teacher_checkpoint else hub_repo_of(teacher),
        'sparsifier': manifest.sparsifier, 'k': manifest.k, 'codec': manifest.codec,
        'record_width': manifest.record_width, 'epochs': manifest.epochs, 'num_samples': manifest.num_samples,
        'is_mixed': ViewRecipe.from_dict(manifest.recipe).is_mixed, 'flags': _store_flags(manifest),
    }


def _store_flags(manifest: Manifest) -> list[str] | None:
    """The flags of save_logits, but for teacher and data, that make a store with such records.

    Returns:
        None where no flags do: of a part of a larger store, of a sparsifier that this package does not know, and where
        the manifest, of another program, says less of the teacher.
    """
    if manifest.first_epoch or manifest.first_sample or manifest.sparsifier not in sparsifiers():
        return None
    if not {'batch_size', 'dtype'} <= manifest.teacher.keys():
        return None
    plain = ViewRecipe().to_dict()
    found: dict[str, Any] = {'epochs': manifest.epochs}
    if manifest.recipe['input_size'] != plain['input_size']:
        found['img_size'] = manifest.recipe['input_size'][-1]
    found |= {flag: manifest.recipe[entry] for flag, entry in VIEW_FLAGS.items()
              if manifest.recipe[entry] != plain[entry]}
    settings = store_settings(manifest)
    if manifest.sparsifier != 'nucleus':
        del settings['top_p']
    usual = {**STORE_DEFAULTS, 'codec': sparsifiers()[manifest.sparsifier].default_codec}
    found |= {flag: value for flag, value in settings.items() if value != usual[flag]}
    if manifest.teacher['dtype'] != 'float32':
        found['teacher_amp_dtype'] = manifest.teacher['dtype']
    words = []
    for flag, value in found.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f'--{flag.replace("_", "-")}', *map(str, values)]
    return words


def _base(args: argparse.Namespace, student: nn.Module) -> dict[str, Any] | None:
    """Whose weights the student starts from: a repo of the Hub, a name of timm's, or the last part of a path."""
    folder = args.model.removeprefix('local-dir:')
    path = args.initial_checkpoint or (folder if args.pretrained and folder != args.model else None)
    if path:
        return {'name': _folder_name(path), 'on_hub': False, 'is_local': True}
    if args.pretrained:
        # timm gets some from elsewhere.
        repo = student.pretrained_cfg.get('hf_hub_id')
        return {'name': repo or args.model, 'on_hub': bool(repo), 'is_local': False}
    return None


def _folder_name(location: str) -> str:
    """What a folder or file of weights is called in what others see; of a run's, the run too."""
    path = Path(location).expanduser().resolve()
    is_of_run = path.name in MODEL_FOLDERS and (path.parent / RUN_RECORD).is_file()
    return '/'.join(path.parts[-2:]) if is_of_run else path.name
