"""Open stores whose views this machine can replay."""

from pathlib import Path
from typing import Any
from collections.abc import Callable, Mapping, Sequence

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..base.console import info
from ..base.errors import InputError
from ..base.remote_folder import RemoteFolder, is_remote
from ..store.base import StoreReader
from ..store.ensemble import Ensemble
from ..store.remote import open_reader
from .view_config import ViewConfig, view_flag
from .views import Replay, check_probe

__all__ = ['open_store', 'open_stores', 'replay_of']


def open_store(
        location: str | Path,
        given_view: Mapping[str, Any] | None = None,
        log: Callable[[str], None] = info,
        keep_epochs: int | None = None,
        cache_dir: str | None = None,
) -> tuple[StoreReader, Replay]:
    """Open a store whose views this machine can replay.

    Args:
        location: A folder or a URL, see `open_reader`.
        given_view: Entries of the view config that the user asked for.
        log: Takes the line that says which versions differ while the views do not.
        keep_epochs: Of a store behind a URL, see `open_reader`.
        cache_dir: Likewise.

    Raises:
        InputError: There is no store, a shard of it is cut short or another one, or its views are not those asked for
            or not those that this machine makes.
    """
    store = open_reader(location, keep_epochs, cache_dir)
    teacher = store.manifest.teacher
    batch_size = teacher.get('batch_size')
    if not {'name', 'weights', 'dtype', 'device', 'input_size'} <= set(teacher) or type(batch_size) is not int or \
            batch_size < 1:
        raise InputError(
            f'the manifest of {location} lacks entries on its teacher that filling needs; copy the store again')
    config = ViewConfig.from_dict(store.manifest.recipe)
    stored = config.to_dict()
    differing = [
        f'{view_flag(name)} {value!r} instead of {stored[name]!r}' for name, value in (given_view or {}).items()
        if stored[name] != value]
    if differing:
        raise InputError(
            f'these flags ask for other views than the store {location} was made from ({", ".join(differing)}); leave '
            f'them out to use the store\'s, or give --logits a new folder')
    replay = replay_of(store, log)
    store.check_files(store.manifest.stored_epochs)
    return store, replay


def replay_of(store: StoreReader, log: Callable[[str], None] = info) -> Replay:
    """The views of a store, which are compared with those that this machine makes.

    Raises:
        InputError: This machine makes others.
    """
    replay = Replay(ViewConfig.from_dict(store.manifest.recipe), store.manifest.seed)
    if line := check_probe(replay, store.manifest.probe, store.manifest.versions):
        log(line)
    return replay


def open_stores(
        locations: Sequence[str],
        given_view: Mapping[str, Any],
        accelerator: Accelerator,
        log: Callable[[str], None] = info,
        keep_epochs: int | None = None,
        cache_dir: str | None = None,
) -> tuple[StoreReader, Replay]:
    """Open what a training learns from: one store, or several of different teachers as an ensemble.

    All processes of a launch call this, and read the same commit of a store on the Hub. See `open_store`.
    """
    locations = pin_commits(locations, accelerator)
    if twice := [location for location in locations if locations.count(location) > 1]:
        raise InputError(f'--logits names {twice[0]} twice; an average is of different stores')
    opened = [open_store(location, given_view, log, keep_epochs, cache_dir) for location in locations]
    stores = [store for store, _ in opened]
    return stores[0] if len(stores) == 1 else Ensemble(stores), opened[0][1]


def pin_commits(locations: Sequence[str], accelerator: Accelerator) -> list[str]:
    """The locations of stores, those on the Hub with the commit that is the newest for the first process now.

    Each process by itself would find another one where somebody pushes meanwhile.

    Raises:
        InputError: There is no such repo or revision, or the Hub cannot be reached; in all processes.
    """
    pinned: list[list[str] | InputError] = [list(locations)]
    if accelerator.is_main_process:
        try:
            pinned = [[str(RemoteFolder.resolve(place)) if is_remote(place) else place for place in locations]]
        except InputError as error:
            pinned = [InputError(str(error))]
    broadcast_object_list(pinned)
    if isinstance(pinned[0], InputError):
        raise pinned[0]
    return pinned[0]
