"""Types of plain values that come from outside, as JSON or as a user's arguments."""

from typing import Any

__all__ = ['is_like']


def is_like(value: Any, example: Any) -> bool:
    """Whether a value has the type of an example, as a list or tuple its length and types; integers count as floats."""
    if isinstance(example, (list, tuple)):
        return type(value) is type(example) and len(value) == len(example) and all(map(is_like, value, example))
    return type(value) is type(example) or isinstance(example, float) and type(value) is int
