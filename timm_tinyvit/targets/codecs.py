"""The codecs there are, by name."""

from .codec import Codec
from .compact import CompactCodec
from .float16 import Float16Codec

__all__ = ['codecs', 'create_codec']


def codecs() -> dict[str, type[Codec]]:
    """The codecs by name."""
    return {codec.name: codec for codec in (CompactCodec, Float16Codec)}


def create_codec(name: str, num_classes: int, k: int) -> Codec:
    """The codec of a name, for records of k of num_classes classes.

    Raises:
        ValueError: No codec has this name, or k does not fit.
    """
    known = codecs()
    if name not in known:
        raise ValueError(f'there is no codec {name!r}; use one of {", ".join(sorted(known))}')
    return known[name](num_classes, k)
