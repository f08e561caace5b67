"""The codecs there are, by name, for class targets and for feature targets."""

from .codec import ClassCodec
from .compact import CompactCodec
from .features import FeatureCodec, Float16FeatureCodec, Int8FeatureCodec
from .float16 import Float16Codec

__all__ = ['codecs', 'create_codec', 'create_feature_codec', 'feature_codecs']


def codecs() -> dict[str, type[ClassCodec]]:
    """The codecs of class targets by name."""
    return {codec.name: codec for codec in (CompactCodec, Float16Codec)}


def feature_codecs() -> dict[str, type[FeatureCodec]]:
    """The codecs of feature targets by name."""
    return {codec.name: codec for codec in (Int8FeatureCodec, Float16FeatureCodec)}


def create_codec(name: str, num_classes: int, k: int) -> ClassCodec:
    """The codec of a name, for records of k of num_classes classes.

    Raises:
        ValueError: No codec has this name, or k does not fit.
    """
    return _known(codecs(), name, 'class')(num_classes, k)


def create_feature_codec(name: str, dim: int, grid: int = 0) -> FeatureCodec:
    """The codec of a name, for vectors of dim numbers on a grid of grid x grid cells; 0 for one pooled vector.

    Raises:
        ValueError: No codec has this name, or the record would be empty or too large.
    """
    return _known(feature_codecs(), name, 'feature')(dim, grid)


def _known(known: dict[str, type], name: str, kind: str) -> type:
    if name not in known:
        raise ValueError(f'there is no codec {name!r} of {kind} targets; use one of {", ".join(sorted(known))}')
    return known[name]
