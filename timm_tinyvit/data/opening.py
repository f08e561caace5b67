"""Open stores whose views this machine can replay."""

from typing import Any
from collections.abc import Callable, Sequence

from ..base.console import log
from ..base.errors import InputError
from ..store.ensemble import Ensemble
from ..store.local import LogitStore
from ..store.remote import open_store_at
from .views import Replay, ViewRecipe, check_probe

__all__ = ['open_store', 'open_stores']


def open_store(
        path: str,
        given_view: dict[str, Any],
        log: Callable[[str], None] = log,
        keep_epochs: int | None = None,
        cache_dir: str | None = None,
) -> tuple[LogitStore, Replay]:
    """Open a store whose views this machine can replay.

    Args:
        path: The store, a folder or `hf://datasets/ORG/NAME`.
        given_view: Entries of the view recipe that the user asked for.
        log: Takes the line that says which versions differ while the views do not.
        keep_epochs: Of a store on the Hub, see `open_store_at`.
        cache_dir: Likewise.

    Raises:
        InputError: There is no store, a shard of it is cut short or another one, or its views are not those asked for
            or not those that this machine makes.
    """
    store = open_store_at(path, keep_epochs, cache_dir)
    teacher = store.manifest.teacher
    batch_size = teacher.get('batch_size')
    if not {'name', 'weights', 'dtype', 'device', 'input_size'} <= set(teacher) or type(batch_size) is not int or \
            batch_size < 1:
        raise InputError(f'the manifest of {path} says too little of its teacher to go on from; copy the store again')
    recipe = ViewRecipe.from_dict(store.manifest.recipe)
    stored = recipe.to_dict()
    other = [
        f'{key} {value!r} instead of {stored[key]!r}' for key, value in given_view.items() if stored[key] != value]
    if other:
        raise InputError(
            f'these flags ask for other views than the store {path} was made from ({", ".join(other)}); leave them '
            f'out to use the store\'s, or give --logits a new folder')
    replay = Replay(recipe, store.manifest.seed)
    line = check_probe(replay, store.manifest.probe, store.manifest.versions)
    if line:
        log(line)
    store.check_files(store.manifest.stored_epochs)
    return store, replay


def open_stores(
        paths: Sequence[str],
        given_view: dict[str, Any],
        log: Callable[[str], None] = log,
        keep_epochs: int | None = None,
        cache_dir: str | None = None,
) -> tuple[LogitStore | Ensemble, Replay]:
    """Open one store, or several of different teachers as an ensemble; see `open_store`."""
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise InputError(f'--logits names {twice[0]} twice; an average is of different stores')
    opened = [open_store(path, given_view, log, keep_epochs, cache_dir) for path in paths]
    stores = [store for store, _ in opened]
    return stores[0] if len(stores) == 1 else Ensemble(stores), opened[0][1]
