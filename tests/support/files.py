"""What lies in a folder, to be compared before and after, what damages it, and images as files."""

import io
from pathlib import Path

from PIL import Image


def tree(path: str | Path, hidden: bool = True) -> dict[str, bytes | None]:
    """Names and contents of everything in a folder, None of folders; without `hidden`, of files without a dot."""
    path = Path(path)
    return {
        item.relative_to(path).as_posix(): item.read_bytes() if item.is_file() else None
        for item in sorted(path.rglob('*' if hidden else '[!.]*')) if hidden or item.is_file()}


def flip_bit(file: Path, at: int = -100) -> None:
    """Put another file in its place that differs in a bit of the byte at a position."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.unlink()
    file.write_bytes(content)


def encode_image(image: Image.Image, file_format: str = 'PNG', **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()
