"""Manifest: how a store was made, the content of its `store.json`.

What is read from a file is checked whole before anything is made of it: a manifest may come from anywhere, and nothing
in it is a path, a size to allocate or a name to import until it has been found to be one that this package writes.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_origin
from collections.abc import Sequence

import numpy as np

from ..base.errors import InputError
from ..base.types import is_like
from ..targets.codec import Codec
from ..targets.codecs import create_codec, create_feature_codec

__all__ = [
    'FORMAT', 'FORMAT_VERSION', 'MANIFEST_NAME', 'MAX_MANIFEST_SIZE', 'PROBE_TOLERANCE', 'Manifest', 'output_distance',
    'stored_epoch',
]

MANIFEST_NAME = 'store.json'
FORMAT = 'timm_tinyvit.logits'
FORMAT_VERSION = 3
MAX_MANIFEST_SIZE = 1 << 20
MAX_SHARDS = 1 << 20
MAX_WIDTH = 1 << 24
MAX_DEPTH = 8
MAX_EXCERPT = 200
# How far a teacher's outputs may be from the store's, see `output_distance`. Measured in float32: other processors and
# orders of summation make 4e-6, tanh for GELU's erf 1e-3, QuickGELU 1e-2 and more.
PROBE_TOLERANCE = 5e-4
# Of outputs that are the same for all classes and images.
MIN_SPREAD = 0.1
# What others rely on in the entry `teacher`, where it is given.
TEACHER = dict(
    name='resnet50', weights='0', dtype='float32', device='cpu', batch_size=1, input_size=[3, 224, 224],
    mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])
# What the entry `features` holds in a store of features.
FEATURES = dict(dim=384, grid=0, projection='0', variance=0.9)


@dataclass(frozen=True)
class Manifest:
    """How a store was made.

    Attributes:
        num_samples: Rows of the data set.
        num_classes: Classes of the teacher; 0 in a store of features.
        k: Entries per record; 0 in a store of features.
        record_width: Bytes per record.
        epochs: How many passes over the data the store is meant to hold.
        seed: The store's seed; a view is a function of (seed, epoch, sample).
        shard_size: Samples per shard; the last shard of an epoch holds the rest.
        first_epoch: Number of its first epoch, above 0 where the earlier ones were left out when it was copied.
        first_sample: Sample of its first row, above 0 where the earlier ones were left out when it was copied.
        codec: Name of the codec of the records.
        class_names: Names of the classes in their order, the teacher's or those of the data; empty where nobody says.
        key: Column whose values name the samples, or empty where their position does.
        teacher: Name, architecture, weights' hash, mean, std, input size, dtype, batch size and device kind of the
            teacher, and as `probe` the log-probabilities of some classes for some made images.
        recipe: How a view is made: the arguments of timm's transform factory, the decoder, the EXIF rule.
        versions: Versions of everything that has a hand in the views.
        probe: Hash of probe views; where it differs, so do the views.
        dataset: Fingerprint of the data set.
        features: In a store of features alone: `dim`, numbers of a vector; `grid`, cells of one side, or 0 for one
            pooled vector; `projection`, the hash of the file that projects the teacher's vectors, or empty; and
            `variance`, the share of their variance that is kept.
        format: Always `timm_tinyvit.logits`.
        version: Version of the format.
    """
    num_samples: int
    num_classes: int
    k: int
    record_width: int
    epochs: int
    seed: int
    shard_size: int
    first_epoch: int = 0
    first_sample: int = 0
    codec: str = 'float16'
    class_names: list[str] = field(default_factory=list)
    key: str = ''
    teacher: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    probe: str = ''
    dataset: dict[str, Any] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT
    version: int = FORMAT_VERSION

    @property
    def num_shards(self) -> int:
        """Shards of one epoch."""
        return -(-self.num_samples // self.shard_size)

    @property
    def targets(self) -> str:
        """What is kept of the teacher: `classes` or `features`."""
        return 'features' if self.features else 'classes'

    def create_codec(self) -> Codec:
        """The codec of the records.

        Raises:
            ValueError: There is none of this name, or it does not fit.
        """
        if self.features:
            return create_feature_codec(self.codec, self.features['dim'], self.features['grid'])
        return create_codec(self.codec, self.num_classes, self.k)

    def to_dict(self) -> dict[str, Any]:
        """What stands in `store.json`: of a store of classes nothing about features."""
        return {name: value for name, value in asdict(self).items() if name != 'features' or value}

    def _decisive(self) -> dict[str, Any]:
        """All that decides a shard's bytes and is the same everywhere: not which epochs there are, no name or version
        behind the same hash, and no outputs, which are rounded otherwise on another machine.
        """
        free = ('epochs', 'first_epoch', 'versions', 'class_names')
        values = {key: value for key, value in self.to_dict().items() if key not in free}
        for name in ('name', 'probe'):
            values['teacher'].pop(name, None)
        return values

    @property
    def identity(self) -> str:
        """Hash that ties a shard to its store."""
        fixed = self._decisive()
        return hashlib.blake2b(json.dumps(fixed, sort_keys=True).encode(), digest_size=16).hexdigest()

    @property
    def stored_epochs(self) -> range:
        """Numbers of the epochs that the store is meant to hold."""
        return range(self.first_epoch, self.first_epoch + self.epochs)

    def shard_rows(self, shard: int) -> int:
        """Samples in a shard."""
        return min(self.shard_size, self.num_samples - shard * self.shard_size)

    def differences(self, other: 'Manifest') -> list[str]:
        """Which fields make another manifest's shards different ones, each as `name: here, not there`."""
        pairs = []
        others = {'features': {}} | other._decisive()
        for name, value in ({'features': {}} | self._decisive()).items():
            if isinstance(value, dict):
                entries = {**value, **others[name]}
                pairs += [(f'{name} {entry}', value.get(entry), others[name].get(entry)) for entry in entries]
            else:
                pairs.append((name, value, others[name]))
        differences = [
            f'{name}: {_excerpt(here)}, not {_excerpt(there)}' for name, here, there in pairs if here != there]
        if (distance := output_distance(self.teacher.get('probe'), other.teacher.get('probe'))) > PROBE_TOLERANCE:
            differences.append(f'teacher outputs: {distance:.1e} of their spread apart, {PROBE_TOLERANCE} allowed')
        return differences

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + '\n'

    def check(self, source: str) -> None:
        """Refuse what no store can be.

        Raises:
            InputError: A number is out of range, there is no such codec, or there would be more shards than any store
                needs; the message begins with `source`.
        """
        limits = dict(
            num_samples=(1, 1 << 40), num_classes=(1, 1 << 31), k=(1, 1 << 16), record_width=(1, MAX_WIDTH),
            shard_size=(1, 1 << 32), epochs=(0, 100_000), first_epoch=(0, 100_000), first_sample=(0, 1 << 40),
            seed=(-1 << 63, (1 << 63) - 1))
        if self.features:
            limits |= dict(num_classes=(0, 0), k=(0, 0))
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(
                    f'{source} cannot be: {name} is {_excerpt(getattr(self, name))}, expected {low} to {high}')
        shards = self.num_shards * max(1, self.epochs)
        if shards > MAX_SHARDS:
            raise InputError(
                f'{source} cannot be: {shards:,} shards of {self.shard_size:,} samples, expected {MAX_SHARDS:,} at '
                f'most; choose a larger --shard-size')
        try:
            width = self.create_codec().width
        except ValueError as error:
            raise InputError(f'{source} cannot be: {str(error)[:MAX_EXCERPT]}')
        if width != self.record_width:
            raise InputError(f'{source} cannot be: records of {self.record_width} bytes, {width} expected')

    @classmethod
    def from_json(cls, text: str, source: str) -> 'Manifest':
        """Read and check a manifest.

        Raises:
            InputError: The text is no manifest of this format, or what it says cannot be.
        """
        try:
            values = json.loads(
                text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_without_repetition)
        except (RecursionError, ValueError) as error:
            raise InputError(
                f'{source} is not readable as JSON ({str(error)[:MAX_EXCERPT]}); it is damaged, copy the store again')
        if not isinstance(values, dict) or values.get('format') != FORMAT:
            raise InputError(f'{source} is not the manifest of a logit store (no format {FORMAT!r} in it)')
        if values.get('version') != FORMAT_VERSION:
            raise InputError(
                f'{source} has format version {_excerpt(values.get("version"))}, this package reads {FORMAT_VERSION}; '
                f'fill the store again, or install the version of timm_tinyvit that wrote it')
        types = {item.name: item.type for item in fields(cls)}
        if odd := sorted(set(values | {'features': None}) ^ set(types)):
            raise InputError(f'{source} is damaged: unknown or missing entries {_excerpt(odd)}')
        for name, value in values.items():
            kind = get_origin(types[name]) or types[name]
            if type(value) is not kind:
                raise InputError(f'{source} is damaged: {name} is {_excerpt(value)}, expected {kind.__name__}')
            if not _is_plain(value):
                raise InputError(
                    f'{source} is damaged: {name} is {_excerpt(value)}, expected printable text, 64-bit integers '
                    f'and {MAX_DEPTH} levels of lists and objects at most')
        names = values['class_names']
        if names and not (len(names) == values['num_classes'] and all(type(name) is str for name in names)):
            raise InputError(f'{source} is damaged: class_names is {_excerpt(names)}, expected one name for each of '
                             f'{_excerpt(values["num_classes"])} classes')
        for name, example in TEACHER.items():
            value = values['teacher'].get(name, example)
            if not is_like(value, example):
                raise InputError(
                    f'{source} is damaged: the teacher has {name} {_excerpt(value)}, expected the like of {example!r}')
        features = values.get('features')
        if features and (set(features) != set(FEATURES) or not all(
                is_like(features[name], example) for name, example in FEATURES.items())):
            raise InputError(f'{source} is damaged: features is {_excerpt(features)}, expected the like of {FEATURES}')
        probe = values['teacher'].get('probe', [])
        if not (isinstance(probe, list) and all(
                isinstance(row, list) and is_like(row, [0.] * len(probe[0])) for row in probe)):
            raise InputError(f'{source} is damaged: the teacher has probe {_excerpt(probe)}, expected rows of numbers, '
                             f'all of one length')
        manifest = cls(**values)
        manifest.check(source)
        return manifest


def output_distance(here: Sequence[Sequence[float]] | None, there: Sequence[Sequence[float]] | None) -> float:
    """How far two teachers' outputs are apart: the largest difference over the standard deviation of all.

    Args:
        here: Log-probabilities for the images of the probe, [n, classes]; None where there are none.
        there: Those of the other, likewise.

    Returns:
        Infinity where only one has outputs, or others.
    """
    if not here and not there:
        return 0.
    here, there = np.array(here or []), np.array(there or [])
    if here.shape != there.shape:
        return math.inf
    difference = np.abs(here - there).max()
    return float(difference / max(here.std(), there.std(), MIN_SPREAD))


def stored_epoch(stored: Sequence[int] | None, epoch: int) -> int:
    """The epoch of a store that a training epoch uses: they start over where the store has fewer; None for itself."""
    return epoch if stored is None else stored[epoch % len(stored)]


def _excerpt(value: Any) -> str:
    """A value of any kind, in one line of bounded length."""
    text = ascii(value)
    return text if len(text) <= MAX_EXCERPT else text[:MAX_EXCERPT] + '...'


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a JSON value is shallow, its texts can be printed and its integers have 64 bits at most."""
    if isinstance(value, str):
        return value.isprintable()
    if isinstance(value, int):
        return -1 << 63 <= value < 1 << 64
    if not isinstance(value, (dict, list)):
        return True
    items = [*value, *value.values()] if isinstance(value, dict) else value
    return depth < MAX_DEPTH and all(_is_plain(item, depth + 1) for item in items)


def _refuse_constant(text: str) -> None:
    raise ValueError(f'{text} is no number')


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f'{_excerpt(text)} is too large')
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError('an object names an entry twice')
    return values
