"""YAML that others wrote: every broken kind is one sentence, in every place that reads some."""

import pytest

from timm_tinyvit import cli
from timm_tinyvit.base import yaml_reader
from timm_tinyvit.base.errors import InputError
from timm_tinyvit.base.yaml_reader import MAX_BYTES, card_head, read_yaml
from timm_tinyvit.hub.model_card import card_metadata, kept_metadata
from timm_tinyvit.hub.store_card import with_license
from support.programs import refusal

# As 100,000 take PyYAML seconds.
MAX_VALUES = 2000
BOMB = '\n'.join(['a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]'] + [
    f'{name}: &{name} [{", ".join(["*" + before] * 10)}]' for before, name in zip('abcdefghi', 'bcdefghij')])
BROKEN = {
    'python object': b'lr: !!python/object/apply:os.system ["true"]', 'unknown tag': b'lr: !thing 1',
    'bomb': BOMB.encode(),
    'circle': b'lr: &a [*a]', 'circle of mappings': b'a: &a {b: *a}', 'duplicate': b'lr: 1\nlr: 2',
    'duplicate below': b'a: {b: 1, b: 2}', 'list': b'- lr', 'text': b'lr', 'number': b'1', 'no UTF-8': b'lr: \xff\xfe',
    'UTF-16': 'lr: 1'.encode('utf-16'), 'control character': b'lr: "\x1b"', 'huge': b'a: ' + b'x' * MAX_BYTES,
    'deep': b'a: ' + b'[' * 5000, 'deep mappings': b'{a: ' * 5000, 'many': b'a: [' + b'1,' * (MAX_VALUES + 1) + b']',
    'open quote': b'lr: "1', 'tab': b'lr:\n\t- 1', 'unknown alias': b'lr: *a', 'impossible date': b'lr: 2024-13-45',
    'large number': b'lr: ' + b'1' * 5000, 'list as a name': b'[1, 2]: 3', 'number as a name': b'1: 2',
    'mapping as a name': b'{a: 1}: 3', 'bad binary': b'lr: !!binary "a"', 'two documents': b'lr: 1\n---\nlr: 2',
    'bad merge': b'<<: 3', 'bad base': b'lr: !!int "x"', 'bad float': b'lr: !!float "x"',
    'directive': b'%YAML 9.9\nlr: 1',
}


@pytest.fixture(autouse=True)
def few_values(monkeypatch):
    monkeypatch.setattr(yaml_reader, 'MAX_VALUES', MAX_VALUES)


@pytest.mark.parametrize('kind', BROKEN)
def test_a_broken_recipe_is_one_sentence(kind, tmp_path, capsys):
    (tmp_path / 'recipe.yaml').write_bytes(BROKEN[kind])
    said = refusal(cli.main, ['train', '--dataset', 'x', '--config', tmp_path / 'recipe.yaml'], capsys)
    assert said.startswith('error: the recipe ') and len(said) < 600


@pytest.mark.parametrize('kind', BROKEN)
def test_a_broken_head_of_a_card_is_no_head_or_one_sentence(kind, tmp_path, capsys):
    """Of the card that a new one replaces, of one whose licence changes, and of a data set's folder."""
    head = BROKEN[kind]
    card = f'---\n{head.decode(errors="replace")}\n---\n# Title\n'
    if kind not in ('no UTF-8', 'UTF-16', 'two documents'):  # other characters there; an end of the head
        assert card_metadata(card) == kept_metadata(card, None) == {}
        with pytest.raises(InputError, match='the head of'):
            with_license(card, 'mit')
    (tmp_path / 'README.md').write_bytes(b'---\n' + head + b'\n---\n# Title\n')
    (tmp_path / 'a').mkdir()
    said = refusal(cli.main, ['train', '--dataset', tmp_path], capsys)
    assert 'README.md' in said or kind == 'two documents'


def test_what_settings_hold_is_read():
    assert read_yaml(b'\xef\xbb\xbfa: 1\nb: [x, 2.5]\nc: {d: true}\n', 'it') == {
        'a': 1, 'b': ['x', 2.5], 'c': {'d': True}}
    assert read_yaml('', 'it') == read_yaml('# only words', 'it') == {}
    assert read_yaml('a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}, e: 2}', 'it') == {
        'a': [1, 2], 'b': [1, 2], 'c': {'d': 1, 'e': 2}}
    assert card_head('---\nlicense: mit\n---\n# Title', 'it') == {'license': 'mit'} and card_head('# Title', 'it') == {}
