"""Names from outside in a terminal, a page and a card: harmless, bounded, and without secrets and home folders."""

import random
import re

import jinja2
import pytest

from timm_tinyvit.base import console
from timm_tinyvit.base.escaping import (
    MAX_NAME, MAX_SENTENCE, Markdown, code_block, code_span, for_markdown, for_page, for_terminal, printable, sentence,
    shown, without_secrets, without_user,
)
from timm_tinyvit.base.text import text_facts, text_table
from support.markdown import inline_markup

# What terminals, browsers and Markdown act on, and what only looks dangerous.
HOSTILE = {
    'escape': 'a\x1b[2J\x1b]0;title\x07b', 'C1': 'a\x9b2Jb', 'reversed': 'a\u202etxt.exe', 'isolate': 'a\u2066b\u2069',
    'marks': 'a\u200eb\u200fc\u061c', 'lines': 'a\nb\r\nc\u2028d\u2029e\x85f\x0bg\x0ch', 'return': 'good\rbad',
    'NUL': 'a\0b', 'surrogate': 'a\udcffb', 'tags': 'a\U000e0041b', 'BOM': '\ufeffa', 'backspace': 'a\b\bb',
    'long': 'a' * 200_000, 'long words': 'a b ' * 50_000, 'long of signs': '`|*_' * 50_000,
    'picture': '![x](https://evil.example/p.png)', 'reference': '![x][y]', 'link': '[x](javascript:alert)',
    'html': '<img src=https://evil.example/p.png onerror=alert(1)>', 'entity': '&lt;img&gt;', 'comment': '<!-- x',
    'code': 'a` ![x](https://evil.example/p.png) `b', 'codes': '``` a ``', 'fence': '```\n# b', 'tilde': '~~~\n# b',
    'bar': 'a | b | c', 'emphasis': '**a** _b_ ~~c~~', 'heading': '# a', 'list': '- a', 'under': '=====',
    'table': '|---|', 'quote': '> a', 'formula': '$$x$$', 'address': 'https://evil.example www.evil.example',
    'backslash': 'a\\![x](https://evil.example)\\', 'jinja': '{{ 7 * 7 }}{% raw %}',
    'script': '</script><script>x</script>',
    'style': '"><style>*{background:url(https://evil.example)}</style>', 'ANSI green': '\x1b[32mgreen\x1b[0m',
}
UNSEEN = re.compile('[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff'
                    '\ud800-\udfff\U000e0000-\U000e007f]')
HOMES = ['/home/alice/data/x', 'local-dir:/home/alice/x', 'k=/home/alice/x', "{'k': '/home/alice/x'}",
         'cannot read /home/alice/x, or "/home/alice"', 'file:///home/alice/x', '/home/bob/x', 'k=/Users/bob/x',
         r'C:\Users\bob\x', '/scratch/alice/data', 'k=/scratch/alice/x and local-dir:/mnt/alice']
SECRETS = [
    'hf_abcDEF123456', 'x_hf_abcDEF123456', 'https://alice:pa55word@host/x', 'https://tok3n@host/x',
    'https://host/x?token=abc', 'https://host/x?a=1&X-Amz-Signature=0a1b2c3d', 'https://host?sig=a%2Fb',
    'Authorization: Bearer 0123456789', "{'Authorization': 'Bearer 0123456789'}", 'authorization=Basic abcdefgh',
    'api_key=0123456789', '"token": "0123456789"', 'HF_TOKEN=0123456789', 'ghp_0123456789abcdefABCDEF',
    'git+https://x-access-token:0123456789@host/r', 's3://key:secret@bucket/x', 'password=hunter22',
    'Bearer 0123456789abc', 'eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc-_123']
PLAIN = [
    'hf://datasets/ORG/NAME@main', 'hf://gpt2@main', 'ORG/alice', 'train[:10%]', 'class_token=False', 'hf_datasets',
    'hf_hub_download', '--key name', 'key=name', 'rand-m9-mstd0.5-inc1', 'https://huggingface.co/alice/x', '/data/x',
    'tokens=4', 'reg_tokens=4', '/homely/alicedata', 'tench, Tinca tinca', 'T-shirt/top', 'naïve 猫 🐈 n° 1 ½', 'x@y',
    'می\u200cخواهم', '👩\u200d🔬']


@pytest.fixture(autouse=True)
def alice(monkeypatch):
    monkeypatch.setenv('HOME', '/home/alice')
    monkeypatch.setenv('LOGNAME', 'alice')


def page_of(text):
    """A text where the template of a page has one: between tags, and in an attribute."""
    environment = jinja2.Environment(autoescape=True, finalize=for_page)
    return environment.from_string('<p title="{{ text }}">{{ text }}</p>').render(text=text)


@pytest.mark.parametrize('kind', HOSTILE)
def test_a_hostile_name_is_harmless_wherever_it_goes(kind, capsys):
    name = HOSTILE[kind]
    console.warning(f'the class {name} is odd')
    console.info(f'the class {name[:1000]} is odd')
    console.print_result(text_table([['class', 'n'], [name, 1]]))
    console.print_result(text_facts({'class': name}))
    said = capsys.readouterr()
    for text in (said.err, said.out, page_of(name), for_markdown(name), code_span(name), code_block(name)):
        assert not UNSEEN.search(text)
    assert said.err.count('\n') == 1 and said.out.count('\n') == 4 + name[:1000].count('\n')
    assert len(said.err) < MAX_SENTENCE + 200 and len(page_of(name)) < 20 * MAX_SENTENCE
    assert page_of(name).count('<') == 2 and page_of(name).count('"') == 2
    for text in (for_markdown(name), code_span(name)):
        assert '\n' not in text and len(text) < 10 * MAX_NAME
        assert inline_markup(f'a {text} b') - {'code'} == set(), text
        assert inline_markup(f'| a {text} | b |', is_table=True) - {'code'} == set(), text
    assert not re.match(r'(#|=|-\s|---|>|\||~~~|```)', for_markdown(name))
    fence = re.match('`+', code_block(name))[0]
    assert not any(line.strip().startswith(fence) for line in code_block(name).splitlines()[1:-1])
    assert for_markdown(for_markdown(name)) == for_markdown(name)


def test_letters_of_all_of_unicode_are_harmless_in_any_order():
    draw, tried = random.Random(0), 0
    signs = list('\x1b\x9b\u202e\n\r`|*_[]()<>!&~$\\#-=:/;"\'') + ['![', '](', '<img src=x>', '```', 'https://', '&lt;']
    for _ in range(3000):
        name = ''.join(draw.choice(signs) if draw.random() < 0.7 else chr(draw.randrange(0x110000))
                       for _ in range(draw.randrange(1, 24)))
        for text in (sentence(name), for_terminal(name), page_of(name), for_markdown(name), code_span(name),
                     code_block(name)):
            assert not UNSEEN.search(text)
            text.encode()
        for text in (for_markdown(name), code_span(name)):
            assert inline_markup(f'a {text} b') - {'code'} == set(), (name, text)
            assert inline_markup(f'| a {text} | b |', is_table=True) - {'code'} == set(), (name, text)
        assert page_of(name).count('<') == 2
        tried += 1
    assert tried == 3000


@pytest.mark.parametrize('text', HOMES)
def test_no_home_folder_is_shown_to_others(text):
    for seen in (without_user(text), for_page(text), for_markdown(text), code_span(text), code_block(text), shown(text),
                 shown({'k': [text]})):
        assert 'alice' not in seen and 'bob' not in seen, seen
    assert '/home/alice' not in sentence(text)


@pytest.mark.parametrize('text', SECRETS)
def test_no_secret_is_shown_to_anybody(text, capsys):
    console.warning(f'the data set {text} is odd')
    console.info(f'the data set {text} is odd')
    console.print_result(f'the data set {text} is odd')
    said = capsys.readouterr()
    for seen in (said.out, said.err, sentence(text), for_page(text), for_markdown(text), code_span(text),
                 code_block(text), shown({'k': text})):
        for secret in ('DEF123456', 'pa55', 'tok3n', 'token=abc', '0a1b', 'a%2Fb', '456789', 'abcdefgh', 'key:secret',
                       'hunter22', 'eyJ'):
            assert secret not in seen, seen


@pytest.mark.parametrize('name', ['HF_TOKEN', 'WANDB_API_KEY'])
def test_the_secrets_of_the_environment_are_known_whatever_they_look_like(name, monkeypatch):
    monkeypatch.setenv(name, 'plain words')
    assert without_secrets('say plain words here') == 'say *** here'


@pytest.mark.parametrize('text', PLAIN)
def test_what_only_looks_alike_stays(text):
    assert without_user(text) == text and sentence(text) == text
    assert for_page(text) == text and printable(text) == text


def test_paths_are_shown_by_their_names():
    assert shown('/data/in1k') == 'in1k' and shown('local-dir:/home/alice/teacher') == 'local-dir:teacher'
    assert shown({'depths': [2, 2], 'k': '/a/b'}) == 'depths=2 2 k=b' and shown(None) == ''
    assert without_user('/home/alice/data/x') == '~/data/x' and without_user('/home/bob/x') == '/home/.../x'
    assert without_user('k=/home/alice/x') == 'k=~/x' and without_user('/scratch/alice/x') == '/scratch/$USER/x'
    assert without_user('https://x?token=hf_abcDEF123456') == 'https://x?token=***'


def test_a_stream_that_lacks_letters_gets_their_numbers():
    assert for_terminal('naïve 猫', 'latin-1') == 'naïve \\u732b' and for_terminal('naïve 猫', 'utf-8') == 'naïve 猫'


def test_what_is_made_for_its_target_stays():
    assert for_markdown(Markdown('**a**')) == '**a**' and for_markdown(3) == 3 and for_markdown(['*']) == r"\['\*'\]"
    assert for_markdown('fashion_mnist') == 'fashion_mnist' and code_span('fashion_mnist') == '`fashion_mnist`'
    assert code_block('a ``` b', 'bash') == '````bash\na ``` b\n````'
