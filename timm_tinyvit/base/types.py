"""Types of plain values that come from outside, as JSON or as a user's arguments."""

import json
import math
from dataclasses import dataclass
from typing import Any

from .escaping import printable

__all__ = ['COUNT', 'FINITE', 'Number', 'is_like', 'mismatch', 'read_json']

MAX_EXCERPT = 60
MAX_DEPTH = 16


def is_like(value: Any, example: Any) -> bool:
    """Whether a value has the type of an example, as a list or tuple its length and types; integers count as floats."""
    if isinstance(example, (list, tuple)):
        return type(value) is type(example) and len(value) == len(example) and all(map(is_like, value, example))
    return type(value) is type(example) or isinstance(example, float) and type(value) is int


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`, as a kind of `mismatch`."""
    low: float
    high: float
    is_whole: bool = False

    def holds(self, value: Any) -> bool:
        return type(value) in ((int,) if self.is_whole else (int, float)) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f'{"an integer" if self.is_whole else "a number"} from {self.low:g} to {self.high:g}'


COUNT, FINITE = Number(0, 1 << 53, is_whole=True), Number(-1e15, 1e15)
WORDS = {str: 'text', bool: 'true or false', dict: 'an object', list: 'a list', None: 'null'}


def mismatch(value: Any, kind: Any, where: str) -> str | None:
    """Why a plain value is not of a kind, in words; None where it is.

    Args:
        value: It.
        kind: `str`, `bool`, a `Number` or None; `dict` and `list` of any plain values; a list of one kind, for a list
            of such values; a dict of kinds by name, for an object that has them and may have others, those whose names
            end in a question mark only perhaps; or a tuple, of which one must hold.
        where: What the value is called.
    """
    if isinstance(kind, tuple):
        found = [mismatch(value, each, where) for each in kind]
        return None if None in found else found[0]
    if isinstance(kind, list):
        if type(value) is not list:
            return _expected(value, list, where)
        return next(filter(None, (mismatch(item, kind[0], f'{where}[{place}]') for place, item in enumerate(value))),
                    None)
    if isinstance(kind, dict):
        if type(value) is not dict:
            return _expected(value, dict, where)
        for name, each in kind.items():
            plain = name.removesuffix('?')
            if plain not in value:
                if plain == name:
                    return f'{where or "it"} lacks {plain}'
            elif why := mismatch(value[plain], each, f'{where}.{plain}' if where else plain):
                return why
        return None if _is_plain(value) else f'{where or "it"} has too many levels, or what is no number'
    if isinstance(kind, Number):
        return None if kind.holds(value) else _expected(value, kind, where)
    if kind is None:
        return None if value is None else _expected(value, kind, where)
    if type(value) is not kind:
        return _expected(value, kind, where)
    if kind in (dict, list) and not _is_plain(value):
        return f'{where} has too many levels, or what is no number'
    return None


def _expected(value: Any, kind: Any, where: str) -> str:
    words = WORDS.get(kind) if isinstance(kind, type) or kind is None else str(kind)
    return f'{where or "it"} is {printable(ascii(value)[:1000], MAX_EXCERPT)}, expected {words}'


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (dict, list)):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return depth < MAX_DEPTH and all(_is_plain(item, depth + 1) for item in items)
    return not isinstance(value, float) or math.isfinite(value)


def read_json(content: bytes | str) -> Any:
    """A JSON value, whatever is in the text.

    Raises:
        ValueError: It is no JSON, or holds what is no number.
    """
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError('it has too many levels')


def _refuse_constant(text: str) -> None:
    raise ValueError(f'{text} is no number')
