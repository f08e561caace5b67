"""Flags of timm's train.py and validate.py: each means what docs/timm_flags.md says, or is refused with a reason.

`golden/timm_flags.json` has their names and defaults.
"""

import json
import re
from pathlib import Path

import pytest

from timm_tinyvit.base.errors import InputError
from timm_tinyvit.config.arguments import VIEW_FLAGS, ArgumentParser
from timm_tinyvit.config.timm_flags import REFUSED, REFUSED_BY_EVAL
from timm_tinyvit.config.training import add_arguments, add_eval_arguments
from timm_tinyvit.data.view_config import ViewConfig

TESTS = Path(__file__).parents[1]
TIMM = json.loads((TESTS / 'golden' / 'timm_flags.json').read_text())
PAGE = (TESTS.parent / 'docs' / 'timm_flags.md').read_text()
# Program of timm -> what adds the arguments of ours, the least that they take, and what it refuses.
PROGRAMS = {
    'train.py': (add_arguments, ['x'], REFUSED),
    'validate.py': (add_eval_arguments, ['x', '--dataset', 'x'], REFUSED_BY_EVAL),
}
# What becomes of a default later: of timm's in train.py itself, of ours where the data are loaded; and what is given.
MADE_BY_TIMM = {'train_crop_mode': 'rrc', 'output': './output/train'}
FOUND_LATER = {'train_split': 'train', 'val_split': 'validation'}
GIVEN = {'dataset': None, 'initial_checkpoint': None}
# What stands here for another flag, or without one.
IN_WORDS = {'amp': '--amp-dtype', 'task_loss_weight': '--alpha', 'distill_loss_weight': '--alpha',
            'initial_checkpoint': 'CHECKPOINT'}


def parser_of(program):
    parser = ArgumentParser(prog='timm-tinyvit')
    PROGRAMS[program][0](parser)
    return parser


def is_same(one, two):
    """Whether two defaults are: nothing, zero and off are one."""
    one, two = (list(value) if isinstance(value, tuple) else value for value in (one, two))
    return (one or None) == (two or None)


def shown(value):
    if isinstance(value, (list, tuple)):
        return ' '.join(map(shown, value))
    if isinstance(value, float):
        return f'{value:.4g}'
    return 'none' if value is None or value is False or value == '' else str(value)


def tables(program):
    """The four kinds of flags: the same ones, those with another default (both), with another name (ours), and absent.
    """
    flags = parser_of(program)._option_string_actions
    ours = vars(parser_of(program).parse_args(PROGRAMS[program][1]))
    ours |= {flag: getattr(ViewConfig(), entry) for flag, entry in VIEW_FLAGS.items() if ours.get(flag, 0) is None}
    ours |= FOUND_LATER | GIVEN
    same, default, other, absent = set(), {}, {}, set()
    for names, theirs in TIMM[program].items():
        name = next((name for name in names.split() if name.startswith('--')), names)
        if name not in flags:
            assert not set(names.split()) & set(flags)
            absent |= set(names.split())
            continue
        assert set(names.split()) <= set(flags)
        dest = flags[name].dest
        theirs = MADE_BY_TIMM.get(dest, theirs)
        here = f'--{dest.replace("_", "-")}'
        if here != name or dest not in ours:
            differs = dest in ours and not is_same(theirs, ours[dest])
            other[name] = (here if here in flags and dest in ours else IN_WORDS[dest],
                           f'{shown(theirs)} in timm, {shown(ours[dest])} here' if differs else '')
        elif is_same(theirs, ours[dest]):
            same.add(name)
        else:
            default[name] = shown(theirs), shown(ours[dest])
    # The positional folder is taken by train alone.
    absent.remove('data')
    other['DIR'] = 'DATA' if program == 'train.py' else '--data-dir', ''
    return same, default, other, absent


def section(heading):
    """What stands under a heading of the page, without the marks of code."""
    return re.split(r'\n##+ ', PAGE.split(f'# {heading}\n')[1])[0].replace('`', '')


def rows(heading):
    """The rows of the tables under a heading."""
    lines = [[cell.strip() for cell in line.strip('|').split('|')] for line in section(heading).splitlines()
             if line.startswith('|')]
    rules = [number for number, cells in enumerate(lines) if set(cells[0]) <= set(':-')]
    return [cells for number, cells in enumerate(lines) if not {number, number + 1} & set(rules)]


@pytest.mark.parametrize('program', PROGRAMS)
def test_the_page_has_each_flag_of_timm_where_it_belongs(program):
    same, default, other, _ = tables(program)
    assert set(re.findall(r'--[a-z-]+', section(f'{program}: the same').split('\n\n')[0])) == same
    assert {row[0]: (row[1], row[2]) for row in rows(f'{program}: another default')} == default
    found = {row[0]: (row[1], row[2]) for row in rows(f'{program}: another name')}
    assert {name: here for name, (here, _) in found.items()} == {name: here for name, (here, _) in other.items()}
    assert all(other[name][1] in remark for name, (_, remark) in found.items())


def test_the_page_gives_the_reasons_of_the_errors():
    assert rows('Absent') == [[' '.join(f'--{name}' for name in names.split()), why] for names, why in REFUSED_BY_EVAL]


def test_what_is_refused_is_what_timm_has_and_we_have_not():
    absent, by_eval = (tables(program)[-1] for program in PROGRAMS)
    assert {f'--{name}' for names, _ in REFUSED_BY_EVAL for name in names.split()} == absent | by_eval


@pytest.mark.parametrize('program', PROGRAMS)
def test_an_absent_flag_is_refused_with_its_reason_in_a_recipe_too(program, tmp_path, one_sentence):
    absent, recipe = tables(program)[-1], tmp_path / 'recipe.yaml'
    reasons = {f'--{name}': why for names, why in PROGRAMS[program][2] for name in names.split()}

    def message(*argv):
        with pytest.raises(InputError) as error:
            parser_of(program).parse_args([*PROGRAMS[program][1], *argv])
        return str(error.value)

    for name in absent:
        one_sentence(message(name, '1'), f'{name} of timm is not taken here: {reasons[name]}')
    # An evaluation passes over what a recipe says of the training.
    for name in absent - parser_of('train.py').flags:
        recipe.write_text(f'{name[2:].replace("-", "_")}: 1\n')
        one_sentence(message('--config', str(recipe)), reasons[name], 'the recipe')


@pytest.mark.parametrize('program, timms, ours', [
    ('train.py', 'DATA', '--dataset DATA'), ('train.py', '--opt sgd DATA --lr 1', '--opt sgd --dataset DATA --lr 1'),
    ('train.py', '--data-dir DATA', '--dataset DATA'), ('train.py', 'x --input-size 3 64 64', 'x --img-size 64'),
    ('train.py', 'x --kd-model-name t --logits l', 'x --teacher t --logits l'),
    ('train.py', 'x --kd-temperature 4 -m m', 'x --temperature 4 --model m'),
    ('train.py', 'x --pretrained-path w --dr 0.5', 'x --initial-checkpoint w --decay-rate 0.5'),
    ('train.py', 'x --task-loss-weight 0.3', 'x --alpha 0.7'),
    ('train.py', 'x --task-loss-weight 0.9 --alpha 0.1', 'x --alpha 0.1'),
    ('train.py', 'x --distill-loss-weight 0.2 --task-loss-weight 0.8', 'x --alpha 0.2'),
    ('train.py', 'x --amp --torchcompile', 'x --amp-dtype float16 --compile inductor'),
    ('validate.py', '--checkpoint c --dataset x --split s -m m', 'c --dataset x --val-split s --model m'),
    ('validate.py', 'c --data-dir x --input-size 3 64 64', 'c --dataset x --img-size 64'),
])
def test_a_name_of_timm_leaves_ours_in_the_record(program, timms, ours):
    one, two = (vars(parser_of(program).parse_args(argv.split())) for argv in (timms, ours))
    assert one == two


def test_names_of_timm_are_keys_of_a_recipe_and_the_command_line_wins(tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('data_dir: here\nkd-model-name: t\nlogits: l\ninput_size: [3, 64, 64]\ntask_loss_weight: 0.5\n'
                      'opt_kwargs: {amsgrad: true}\n')
    args = parser_of('train.py').parse_args(['--config', str(recipe), '--teacher', 'u', '--img-size', '32'])
    assert (args.dataset, args.teacher, args.img_size, args.alpha) == ('here', 'u', 32, 0.5)
    assert args.opt_kwargs == {'amsgrad': True} and 'task_loss_weight' not in args and 'data' not in args


@pytest.mark.parametrize('argv, words', [
    ('x --dataset y', 'x is an argument too many: the data set is y'),
    ('--data-dir x --dataset y', 'argument --dataset: not allowed with argument --data-dir'),
    ('x --input-size 1 28 28', '--input-size is 1 28 28; expected 3 channels and a square, as in 3 224 224'),
    ('x --input-size 3 224 192', 'expected 3 channels and a square'),
    ('x --distill-loss-weight 1', '1 (--task-loss-weight) and 1 (--distill-loss-weight); expected a sum of 1: --alpha '
                                  '0.5 weighs them alike'),
    ('x --distill-loss-weight 0 --task-loss-weight 0', 'expected a sum of 1'),
    ('x --task-loss-weight 1.5', 'the weights of the losses are 1.5'),
    ('x --task-loss-weight -1', '--task-loss-weight is -1.0; expected at least 0'),
    ('x --task-loss-weight 0.3 --alpha 0.5', "--alpha is 0.5, and timm's weights of the losses are --alpha 0.7"),
    ('x --bce-sum', 'change the loss of --bce-loss; add it'),
    ('x --sched plateau', '--sched plateau is not a schedule here'),
])
def test_what_means_something_else_is_one_sentence(argv, words, one_sentence):
    with pytest.raises(InputError) as error:
        parser_of('train.py').parse_args(argv.split())
    one_sentence(str(error.value), words)


def test_a_number_of_batches_that_is_none_is_refused(monkeypatch, one_sentence):
    for steps in ('auto', '0'):
        monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', steps)
        with pytest.raises(InputError) as error:
            parser_of('train.py').parse_args(['x'])
        one_sentence(str(error.value), f'ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {steps}; expected a number')
