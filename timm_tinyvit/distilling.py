"""Train from Python as train_distill.py does, in one call: for notebooks, and scripts that go on with the student."""

from pathlib import Path
from typing import Any

from torch import nn

from .base.errors import InputError
from .base.launch import caller_settings
from .config.arguments import flags_of
from .config.training import DEFAULT_MODEL, create_parser
from .models.loading import create_pretrained, set_image_size
from .store.base import StoreReader
from .train.metrics import read_metrics

__all__ = ['distill']


def distill(
        store: StoreReader | str | Path | None,
        dataset: str | Path,
        model: str = DEFAULT_MODEL,
        *,
        config: str | None = None,
        **flags: Any,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train a student from a store: `timm-tinyvit train` in one call, with all that a run of it leaves in its folder.

    Interrupted, the same call goes on from the last checkpoint; of a run that is finished it returns what there is. The
    method is that of TinyViT (ECCV 2022, arXiv 2207.10666).

    Args:
        store: The store, or where it is; None to train from labels.
        dataset: The name or folder of the data set that it was filled from; `train_split` and `val_split` name splits.
        model: The student's name in timm.
        config: A recipe, see `timm-tinyvit train --config`.
        flags: Those of `timm-tinyvit train`, with underscores, as in `epochs=10, batch_size=256, output='runs'`.

    Returns:
        The student with its most accurate weights (or its last, where nothing was there to compare by), in evaluation
        mode on the CPU; and the metrics of each epoch, as in `metrics.csv`: `epoch`, `lr`, `loss`, `eval_top1` in
        percent, `seconds` and more.

    Raises:
        InputError: A flag is unknown or has a wrong value, or what they ask for cannot be done.
    """
    import train_distill

    if not isinstance(dataset, str | Path):
        raise InputError(f'the data set of a run is known by its name or folder, and this is of type '
                         f'{type(dataset).__name__}; write it with dataset.save_to_disk(FOLDER), and give that folder')
    parser = create_parser()
    parts = [] if store is None else store.stores if isinstance(store, StoreReader) else [store]
    values = dict(
        logits=[str(getattr(part, 'path', part)) for part in parts], dataset=str(dataset), model=model) | flags
    recipe = [] if config is None else ['--config', config]
    args = parser.parse_args([*recipe, *flags_of(parser, values, 'distill was given')])
    with caller_settings():
        folder = train_distill.train(args)
    exported = next(folder / name for name in ('best', 'last') if (folder / name).is_dir())
    student = create_pretrained(str(exported), needs_classifier=False).eval()
    set_image_size(student, tuple(student.pretrained_cfg['input_size'][-2:]))
    return student, read_metrics(folder)
