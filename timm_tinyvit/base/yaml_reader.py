"""The one reader of YAML that others wrote: recipes, and the heads of cards.

YAML can say much that is no list of settings: objects of Python, links to itself, aliases that unfold to more than any
memory holds, an entry twice. Here it is a mapping of plain values of a bounded size, or an `InputError`.
"""

import re
from typing import Any

import yaml

from .errors import InputError
from .escaping import printable

__all__ = ['MAX_BYTES', 'card_head', 'read_yaml']

MAX_BYTES = 1 << 20
# Values of all levels, each as often as an alias names it.
MAX_VALUES = 100_000
MAX_REASON = 200
# The metadata of a card, as YAML.
HEAD = re.compile(r'\ufeff?\s*---[ \t]*\r?\n(.*?)^---', re.DOTALL | re.MULTILINE)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, that refuses an entry that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != 'tag:yaml.org,2002:merge':
                if key.value in keys:
                    raise yaml.constructor.ConstructorError(None, None, f'{key.value!r} is there twice', key.start_mark)
                keys.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(content: bytes | str, what: str) -> dict[str, Any]:
    """The settings that a YAML text holds; none of an empty one.

    Args:
        content: The text, as UTF-8 where it is bytes.
        what: What it is, for messages, as in `the recipe r.yaml`.

    Raises:
        InputError: It is no YAML, no mapping, or larger than settings are.
    """
    try:
        text = content.decode('utf-8-sig') if isinstance(content, bytes) else content
        if len(text) > MAX_BYTES:
            raise InputError(f'{what} has more than {MAX_BYTES:,} characters; leave out what is no setting')
        values = yaml.load(text, _Loader)
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
            yaml.YAMLError) as error:
        # Impossible dates and numbers, lists as names, levels without end: each has an error of its own.
        reason = printable(' '.join(str(error).split()), MAX_REASON) or type(error).__name__
        raise InputError(f'{what} is not readable as YAML: {reason}')
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise InputError(f'{what} is a {type(values).__name__}; expected lines like `lr: 0.001`')
    if odd := next((name for name in values if not isinstance(name, str)), None):
        raise InputError(f'{what} has the name {odd!r}, which is no text; put it into quotes')
    _check_size(values, what)
    return values


def card_head(card: str, what: str) -> dict[str, Any]:
    """The metadata in the head of a card; none of a card without one.

    Raises:
        InputError: The head cannot be read; see `read_yaml`.
    """
    head = HEAD.match(card)
    return read_yaml(head[1], f'the head of {what}') if head else {}


def _check_size(values: dict[str, Any], what: str) -> None:
    count, waiting = 0, [iter(values.values())]
    # Depth first, so that of what unfolds without end only a branch is held.
    while waiting:
        value = next(waiting[-1], waiting)
        if value is waiting:
            waiting.pop()
            continue
        count += 1
        if count > MAX_VALUES:
            raise InputError(f'{what} unfolds to more than {MAX_VALUES:,} values; write them out without aliases')
        if isinstance(value, (dict, list, set, tuple)):
            waiting.append(iter(value.values() if isinstance(value, dict) else value))
