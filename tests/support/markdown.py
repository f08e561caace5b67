"""What Markdown makes of a line: a small reader of its inline signs, as GitHub's dialect has them."""

import re

ESCAPED = re.compile(r'\\[!-/:-@\[-`{-~]')
CODE = re.compile(r'(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)')
HTML_CODE = re.compile(r'<code>([0-9A-Za-z ]|&#\d+;)*</code>')
MARKUP = {
    'picture or link': re.compile(r'\]\s?[(\[]|\[[^\]]*\]'), 'tag': re.compile(r'<[A-Za-z/!?]'),
    'address': re.compile(r'https?://|ftp://|www\.'), 'strong': re.compile(r'\*\S|\S\*|(?<![^\W_])_\S|\S_(?![^\W_])'),
    'struck': re.compile('~'), 'formula': re.compile(r'\$'), 'entity': re.compile(r'&(#\d+|#[xX][0-9a-fA-F]+|\w+);'),
    'lone backtick': re.compile('`'),
}


def inline_markup(line: str, is_table: bool = False) -> set[str]:
    """The kinds of markup in a line; `cells` where a row of a table has other cells than two."""
    found = set()
    if is_table:
        # Cells are cut before code is looked for.
        if len(re.findall(r'(?<!\\)\|', line.replace('\\\\', ''))) != 3:
            found.add('cells')
        line = line.replace(r'\|', ' ')
    kept, rest = '', line
    while rest:
        # From left to right: a backslash takes a sign its meaning, but within code.
        if match := ESCAPED.match(rest):
            kept += ' '
        elif match := CODE.match(rest) or HTML_CODE.match(rest):
            found.add('code')
            kept += ' '
        else:
            match = re.match('.', rest, re.DOTALL)
            kept += match[0]
        rest = rest[match.end():]
    return found | {kind for kind, sign in MARKUP.items() if sign.search(kept)}
