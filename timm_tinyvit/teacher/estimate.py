"""What a store will cost before it is made: bytes on disk, and hours of the teacher."""

from ..base.errors import InputError
from ..base.text import readable_bytes
from ..targets.codecs import create_codec
from ..targets.sparsifier import create_sparsifier

__all__ = ['estimate_store']


def estimate_store(
        num_samples: int,
        num_classes: int,
        epochs: int,
        sparsifier: str,
        k: int,
        top_p: float = 1.0,
        codec: str | None = None,
        views_per_second: float | None = None,
        num_processes: int = 1,
        keep_epochs: int = 2,
) -> str:
    """Bytes per view, per epoch and in all, beside the official format, and the time that filling takes.

    Args:
        num_samples: Rows of the data set.
        num_classes: Classes of the teacher.
        epochs: Epochs of the store.
        sparsifier: Name of the sparsifier.
        k: Most classes kept of a view, or the draws of `sample`.
        top_p: Mass that `nucleus` covers.
        codec: Name of the codec; the sparsifier's own by default.
        views_per_second: Views that one process's teacher looks at in a second; None to leave the time out.
        num_processes: Processes that fill the store.
        keep_epochs: Epochs that are on disk in a training from the Hub.

    Raises:
        InputError: The settings do not go together.
    """
    try:
        chosen = create_sparsifier(sparsifier, k, top_p)
        record = create_codec(codec or chosen.default_codec, num_classes, k, chosen.remainder)
        chosen.check_codec(record)
    except ValueError as error:
        raise InputError(f'{error} (--sparsifier, --topk, --top-p, --codec)')
    most = 'at most ' if record.is_variable else ''
    width = record.width + 3 if record.is_variable else record.width  # an offset of 4 bytes for the byte in memory
    views = num_samples * epochs
    official = f', {readable_bytes(views * (4 * k + 4))} in the official format' if num_classes <= 1 << 15 else ''
    lines = [
        f'views            {num_samples:,} samples x {epochs} epochs = {views:,}',
        f'record           {most}{width} bytes ({sparsifier}, k = {k} of {num_classes:,} classes, {record.name})',
        f'epoch            {most}{readable_bytes(num_samples * width)}',
        f'store            {most}{readable_bytes(views * width)}{official}',
    ]
    if epochs > keep_epochs:
        lines.append(f'from the Hub     {most}{readable_bytes(keep_epochs * num_samples * width)} on disk in training, '
                     f'with --keep-epochs {keep_epochs}')
    if views_per_second:
        hours = views / views_per_second / num_processes / 3600
        lines.append(
            f'teacher          {hours:,.1f} hours at {views_per_second:,.10g} views/s in '
            + (f'each of {num_processes} processes' if num_processes > 1 else 'one process'))
    return '\n'.join(lines)
