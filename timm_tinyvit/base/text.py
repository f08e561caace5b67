"""Numbers in words, for people: bytes, counts, percents."""

__all__ = ['counted', 'readable_bytes']


def readable_bytes(count: float) -> str:
    """A number of bytes for people: `2.8 GB`."""
    units = ['TB', 'GB', 'MB', 'kB', 'bytes']
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop()
    return f'{count:,.{0 if units[-1] == "bytes" else 1}f} {units[-1]}'


def counted(number: int, noun: str) -> str:
    """A number of things in words, as in `1 epoch` and `2 epochs`."""
    return f'{number:,} {noun}' + ('' if number == 1 else 's')
