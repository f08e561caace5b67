"""Flags and recipes."""

import pytest

from timm_tinyvit.base.errors import InputError
from timm_tinyvit.config.arguments import ArgumentParser, add_view_arguments, recipe_names, view_arguments


def parser() -> ArgumentParser:
    made = ArgumentParser()
    made.add_recipes()
    add_view_arguments(made)
    made.add_argument('--lr', type=float, default=0.5)
    made.add_argument('--fast', action='store_true')
    return made


def test_only_what_was_asked_for_of_a_view_is_given():
    args = parser().parse_args(['--img-size', '64', '--aa', 'v0', '--scale', '0.5', '1'])
    assert view_arguments(args) == {'auto_augment': 'v0', 'input_size': [3, 64, 64], 'scale': [0.5, 1.0]}
    assert view_arguments(parser().parse_args([])) == {}


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_default(tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('lr: 0.25\nhflip: 0\nfast: true\nscale: [0.1, 1]\n')
    args = parser().parse_args(['--config', str(recipe), '--hflip', '1'])
    assert (args.lr, args.hflip, args.fast, args.scale) == (0.25, 1.0, True, [0.1, 1.0])
    assert parser().parse_args([]).lr == 0.5


@pytest.mark.parametrize('text, expected', [
    ('learning-rate: 1', "unknown key 'learning-rate'"),
    ('hflipp: 1', 'did you mean --hflip?'),
    ('fast: 3', 'fast: 3; expected true or false'),
    ('lr: fast', "invalid float value: 'fast'"),
    ('- lr', 'is a list; expected lines like'),
    ('lr: [1', 'is not readable as YAML'),
    ('config: other', "unknown key 'config'"),
])
def test_a_wrong_recipe_is_one_sentence(tmp_path, text, expected):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(text)
    with pytest.raises(InputError) as error:
        parser().parse_args(['--config', str(recipe)])
    assert expected in str(error.value) and '\n' not in str(error.value)


def test_recipes_of_the_package_are_found_by_name():
    assert 'demo' in recipe_names()
    with pytest.raises(InputError, match='there is no recipe nothing; give a YAML file, or one of .*demo'):
        parser().parse_args(['--config', 'nothing'])


def test_help_shows_the_defaults_that_say_something():
    made = parser()
    made.add_argument('--seed', type=int, default=0, help='of all draws')
    made.add_argument('--quiet', action='store_true', help='say nothing')
    text = ' '.join(made.format_help().split())
    assert 'of all draws (default: 0)' in text and 'say nothing' in text
    assert 'default: None' not in text and 'default: False' not in text
