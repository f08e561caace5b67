"""Fill a store from Python: any module as the teacher, any loaded data set, in one call.

The parts are those of `timm-tinyvit fill`, and so are the promises: the same call goes on where one was ended, and all
processes of a launch fill one store together.
"""

from pathlib import Path
from typing import Any
from collections.abc import Sequence

import torch
from accelerate import PartialState
from torch import nn

from ..base.errors import InputError
from ..config.arguments import STORE_DEFAULTS
from ..data.sources import Source, as_split
from ..data.view_config import ViewConfig
from ..store.local import LogitStore
from ..store.object_store import ObjectStore, store_class
from ..store.remote import open_reader
from .creating import create_store, grid_of, views_to_fill
from .fill import fill_epochs
from .teacher import Teacher

__all__ = ['fill_store']


def fill_store(
        teacher: nn.Module,
        dataset: Source | str | Path,
        path: str | Path,
        views: ViewConfig | None = None,
        epochs: int | range | None = None,
        *,
        split: str | None = None,
        name: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        amp_dtype: torch.dtype | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        num_workers: int = 0,
        show_progress: bool = True,
        **settings: Any,
) -> LogitStore | ObjectStore:
    """Run a teacher once on every view of a data set, and keep what it says of each in a store.

    Ended at any moment, the same call fills just what is missing; processes of `torchrun` or `accelerate launch`, and
    other machines that share the folder or URL, fill it together. When it returns, all of it is there. The method is
    that of TinyViT (ECCV 2022, arXiv 2207.10666).

    Args:
        teacher: Any module from normalised images [B, 3, H, W] to logits [B, C], or with `targets='features'` to
            vectors [B, D] or, with `feature_grid`, maps [B, D, H, W]; of a timm model its features are found. It is put
            in evaluation mode and frozen.
        dataset: The images: a `datasets.Dataset`, or its name or folder, see `load_split`.
        path: The folder or URL of the store, a new one or one that was made in the same way.
        views: How a view is made, of any size; by default as in the store that is there, or else `ViewConfig()`.
        epochs: How many epochs the store is to hold, or which of them to fill; by default those of the store that is
            there, or else 1.
        split: Where the data set is named, its split.
        name: What the store calls the teacher; by default its architecture.
        mean: Mean of the images that the teacher takes, on the scale from 0 to 1; timm models say it themselves.
        std: Their standard deviation, likewise.
        size: Height and width of these images, to which views are resized, likewise.
        device: Where the teacher runs; by default this process's accelerator, or the CPU.
        amp_dtype: Autocast the teacher to this type.
        image_column: The image column; found by its usual names by default.
        label_column: The label column, likewise; its names of the classes are kept.
        num_workers: Loader processes.
        show_progress: Show a bar of what everyone has done.
        settings: Of the store, under the names of the flags of `timm-tinyvit fill`: `targets`, `topk`, `codec`, `key`,
            `shard_size`, `store_seed`, `teacher_batch_size`, `feature_grid`, `feature_dim`.

    Returns:
        The store, filled.

    Raises:
        InputError: The teacher does not say its mean, std or size, or gives no logits or features; the store at `path`
            was made in another way; an image cannot be decoded; the teacher gives NaN; or the disk is full.
    """
    if odd := settings.keys() - STORE_DEFAULTS.keys():
        raise InputError(f'a store has no setting {min(odd)!r}, only {", ".join(STORE_DEFAULTS)}; fix it')
    if not isinstance(teacher, nn.Module):
        raise InputError(f'the teacher is a {type(teacher).__name__}; give a torch module, as timm.create_model(NAME, '
                         f'pretrained=True) makes it, or use timm-tinyvit fill --teacher NAME')
    config = getattr(teacher, 'pretrained_cfg', None) or {}
    name = name or config.get('architecture') or type(teacher).__name__
    unknown = [] if config else [
        word for word, value in (('mean', mean), ('std', std), ('size', size)) if value is None]
    if unknown:
        raise InputError(f'the teacher {name} does not say its {", ".join(unknown)}; give what it was trained with, as '
                         f'in mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=(224, 224)')
    there = open_reader(path).manifest.stored_epochs if store_class(path).exists(path) else range(1)
    epochs = there if epochs is None else range(epochs) if isinstance(epochs, int) else epochs
    if not epochs:
        raise InputError(f'epochs is {epochs}; expected a number of epochs from 1, or a range of them')
    # Without `cpu`, processes on a machine that has no accelerator would not know of each other.
    state = PartialState(cpu=not torch.accelerator.is_available())
    with state.main_process_first():
        dataset = as_split(dataset, split)
    model = Teacher(
        teacher, name, torch.device(device or state.device), amp_dtype, size=size, grid=grid_of(path, settings),
        mean=mean, std=std)
    columns = image_column, label_column
    with state.main_process_first():
        store, replay = create_store(
            path, model, dataset, epochs.stop, settings, {} if views is None else views.to_dict(), *columns,
            num_workers=num_workers)
    # A copy may begin later, and has no place for the epochs before.
    epochs = range(max(epochs.start, store.manifest.first_epoch), epochs.stop)
    fill_epochs(
        store, model, views_to_fill(store, replay, dataset, *columns), epochs, num_workers=num_workers,
        show_progress=show_progress)
    return store
