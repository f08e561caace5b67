"""What a store will cost before it is made: bytes on disk, and hours of the teacher."""

from ..base.errors import InputError
from ..base.text import readable_bytes
from ..targets.codecs import create_codec, create_feature_codec

__all__ = ['estimate_store']


def estimate_store(
        num_samples: int,
        num_classes: int,
        epochs: int,
        k: int,
        codec: str = 'compact',
        views_per_second: float | None = None,
        num_processes: int = 1,
        keep_epochs: int = 2,
        feature_dim: int = 0,
        feature_grid: int = 0,
) -> str:
    """Bytes per view, per epoch and in all, beside the official format, and the time that filling takes.

    Args:
        num_samples: Rows of the data set.
        num_classes: Classes of the teacher.
        epochs: Epochs of the store.
        k: Classes kept of a view.
        codec: Name of the codec.
        views_per_second: Views that one process's teacher looks at in a second; None to leave the time out.
        num_processes: Processes that fill the store.
        keep_epochs: Epochs that are on disk in a training from the Hub.
        feature_dim: Numbers of a vector of a store of features; 0 for one of classes.
        feature_grid: Cells of one side of its grid; 0 for one pooled vector.

    Raises:
        InputError: The settings do not go together.
    """
    try:
        record = create_feature_codec(codec, feature_dim, feature_grid) if feature_dim else \
            create_codec(codec, num_classes, k)
    except ValueError as error:
        raise InputError(f'{error} ({"--codec" if feature_dim else "--topk, --codec"})')
    views = num_samples * epochs
    cells = f'{feature_grid}x{feature_grid} vectors' if feature_grid else 'a vector'
    official, what = '', f'{cells} of {feature_dim:,} numbers, {record.name}'
    if not feature_dim:
        what = f'k = {k} of {num_classes:,} classes, {record.name}'
        official = f', {readable_bytes(views * (4 * k + 4))} in the official format' if num_classes <= 1 << 15 else ''
    lines = [
        f'views            {num_samples:,} samples x {epochs} epochs = {views:,}',
        f'record           {record.width} bytes ({what})',
        f'epoch            {readable_bytes(num_samples * record.width)}',
        f'store            {readable_bytes(views * record.width)}{official}',
    ]
    if epochs > keep_epochs:
        kept = readable_bytes(keep_epochs * num_samples * record.width)
        lines.append(f'from the Hub     {kept} on disk in training, with --keep-epochs {keep_epochs}')
    if views_per_second:
        hours = views / views_per_second / num_processes / 3600
        lines.append(
            f'teacher          {hours:,.1f} hours at {views_per_second:,.10g} views/s in '
            + (f'each of {num_processes} processes' if num_processes > 1 else 'one process'))
    return '\n'.join(lines)
