"""What lies in a folder, to be compared before and after, and what damages it."""

from pathlib import Path


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
