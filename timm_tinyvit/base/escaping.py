"""What leaves: text that holds names from outside, made harmless for where it goes, without secrets and home folders.

Names of classes, columns, files and runs are written by anybody. None of them may move a cursor, turn the order of
letters, load a picture or end a block of code, and none may fill a screen. There is one function for each target: the
console and the decorator of the programs call `for_terminal`, the template of pages `for_page`, and the templates of
cards `for_markdown` and its siblings. Whoever writes a sentence or a table writes names as they are.
"""

import getpass
import os
import re
from pathlib import Path
from typing import Any

__all__ = [
    'Markdown', 'code_block', 'code_span', 'for_markdown', 'for_page', 'for_terminal', 'printable', 'sentence', 'shown',
    'without_home', 'without_secrets', 'without_user',
]

# Of a sentence, and of a name within a table or a picture.
MAX_SENTENCE, MAX_NAME = 2000, 200
# Joins letters of Persian and Hindi, and parts of emoji: invisible, and part of the spelling.
JOINERS = '\u200c\u200d'
SECRET_VARIABLES = (
    'HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'WANDB_API_KEY', 'AWS_SECRET_ACCESS_KEY', 'AWS_SESSION_TOKEN')
SECRETS = [(re.compile(pattern), instead) for pattern, instead in (
    # Tokens that are known by how they begin; a name as hf_datasets is none.
    (r'(?<![A-Za-z0-9])(hf|api_org)_(?=[a-z]{0,99}[A-Z0-9])[A-Za-z0-9]{8,}', r'\1_...'),
    (r'(?<![A-Za-z0-9])(gh[oprsu]_|github_pat_|glpat-|sk-|AKIA)(?=[\w-]{0,99}[A-Z0-9])[\w-]{16,}', r'\1...'),
    (r'(?<![\w.])eyJ[\w-]{8,999}\.[\w-]{1,9999}\.[\w-]+', '...'),
    # Who asks, in an address: `https://user:password@host`; a revision in `hf://` begins with the same sign.
    (r'(?i)\b(?!hf:)([a-z][a-z0-9+.-]{0,20}://)[^/\s?#]{1,999}@', r'\1***@'),
    # What is asked with: in the query of an address of any length, elsewhere no words as in class_token=False.
    (r'(?i)([?&][\w.%-]{0,60}(?:token|secret|passw(?:or)?d|pwd|signature|credential|sig|key)=)[^&\s\'"#]+', r'\1***'),
    (r'(?i)\b([\w-]{0,40}(?:token|secret|passw(?:or)?d|pwd|signature|credential|(?:api|access|private)[_-]?key)'
     r'[\'"]?\s?[=:]\s?[\'"]?)(?!\*\*\*|hf_\.\.\.)[^&\s\'",;)}\]]{6,}', r'\1***'),
    (r'(?i)\b(authorization[\'"]?\s*[=:]\s*[\'"]?)(?:(?:bearer|basic|token)\s+)?[^\s\'",]+', r'\1***'),
    (r'(?i)\b(bearer\s+)[\w.~+/=-]{8,}', r'\1***'),
)]
# Where a path of a folder begins, and where its first name ends: in a sentence, behind `local-dir:` or `name=`.
BEGIN, END = r'(?<![\w.~-])', r'(?=[/\\\s\'"`:,;)\]}>]|$)'
OTHERS = re.compile(BEGIN + r'(/(?:home|Users)/|[A-Za-z]:\\Users\\)[^/\\\s\'"`:,;)\]}>]+')
PATH = re.compile(r'(?:(?<=^)|(?<=[\s\'"`=(,\[])|(?<=\w:))/(?!/)[^\s\'"`:,;)\]}>]+')
# A folder or a file, and not a name on the Hub or a relative path; a scheme such as `local-dir:` may stand before it.
PLACE = re.compile(r'([\w-]+:(?!//))?(?:/|~|\.\.?/).*?([^/]+)/*')

# What means something within a line of Markdown, and at its beginning; an address that would become a link.
SIGNS = re.compile(
    r'[\\`*\[\]<>|~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|:(?=//)|(?<=\bwww)\.|^(?:[#+=]|-(?!\d))')


def printable(text: str, limit: int | None = None, lines: bool = False) -> str:
    """A text of what can be seen alone: all else as Python writes it, such as `\\x1b` and `\\u202e`.

    Args:
        text: It.
        limit: Characters that it may have; of a longer one the middle is left out.
        lines: Whether it may have several lines.
    """
    if limit is not None and len(text) > limit:
        text = f'{text[:limit * 2 // 3]}...{text[len(text) - limit // 3 + 3:]}'
    if text.isprintable():
        return text
    return ''.join(_visible(letter, lines) for letter in text)


def _visible(letter: str, lines: bool) -> str:
    if letter.isprintable() or letter in JOINERS or lines and letter == '\n':
        return letter
    if letter.isspace() and letter not in '\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\u2028\u2029':
        return ' '
    return letter.encode('unicode_escape').decode()


def without_secrets(text: str) -> str:
    """A text without tokens, passwords and signatures of whatever kind they can be told by."""
    for name in SECRET_VARIABLES:
        if len(value := os.environ.get(name, '').strip()) >= 8:
            text = text.replace(value, '***')
    for pattern, instead in SECRETS:
        text = pattern.sub(instead, text)
    return text


def without_home(text: str) -> str:
    """A text whose user's home folder is `~`."""
    try:
        home = str(Path.home())
    except RuntimeError:
        return text
    return re.sub(BEGIN + re.escape(home) + END, '~', text) if len(home) > 1 else text


def without_user(text: str) -> str:
    """A text that can be shown to others: without secrets, home folders, and the user's name in a path."""
    text = OTHERS.sub(r'\1...', without_home(without_secrets(text)))
    try:
        user = getpass.getuser()
    except (ImportError, KeyError, OSError):
        return text
    return PATH.sub(lambda found: '/'.join('$USER' if part == user else part for part in found[0].split('/')), text)


def shown(value: Any) -> str:
    """A setting as text for others; of a path the name, as a path names people and machines."""
    if isinstance(value, (list, tuple)):
        return ' '.join(map(shown, value))
    if isinstance(value, dict):
        return ' '.join(f'{key}={shown(item)}' for key, item in value.items())
    text = '' if value is None else without_user(str(value))
    place = PLACE.fullmatch(text)
    return f'{place[1] or ""}{place[2]}' if place else text


def for_terminal(text: str, encoding: str | None = None) -> str:
    """Lines for a terminal or a log, whose paths are to be copied.

    Args:
        text: The lines.
        encoding: Of the stream, which may lack letters.
    """
    text = printable(without_secrets(text), lines=True)
    return text.encode(encoding, 'backslashreplace').decode(encoding) if encoding else text


def sentence(text: str, encoding: str | None = None) -> str:
    """A warning or an error for a terminal or a log, in one line of bounded length; see `for_terminal`."""
    return for_terminal(printable(without_home(without_secrets(text)), MAX_SENTENCE), encoding)


def for_page(value: Any) -> Any:
    """A value for an HTML page that others may see; what has been made for HTML, and a number, stays."""
    if isinstance(value, (int, float)) or value is None or hasattr(value, '__html__'):
        return value
    return printable(without_user(str(value)), MAX_SENTENCE, lines=True)


class Markdown(str):
    """Text that is Markdown already, and is put into a card as it is."""


def for_markdown(value: Any) -> Any:
    """A value within a paragraph, heading or table of Markdown; what is Markdown already, and a number, stays."""
    if isinstance(value, (Markdown, int, float)) or value is None:
        return value
    text = printable(without_user(str(value)), MAX_NAME)
    return Markdown(SIGNS.sub(r'\\\g<0>', text))


def code_span(value: Any) -> Markdown:
    """A value as code within a paragraph or table of Markdown."""
    text = printable(without_user(str(value)), MAX_NAME)
    if not re.search('[`|]', text):
        return Markdown(f'`{text}`')
    # In a table, a bar would end the cell within backticks too.
    return Markdown(f'<code>{re.sub(r"[^0-9A-Za-z ]", lambda found: f"&#{ord(found[0])};", text)}</code>')


def code_block(text: str, language: str = '') -> Markdown:
    """Lines as a block of code of Markdown, which nothing in them ends."""
    text = printable(without_user(text), lines=True)
    fence = '`' * max(3, *(len(run) + 1 for run in re.findall('`+', text)), 3)
    return Markdown(f'{fence}{language}\n{text}\n{fence}')
