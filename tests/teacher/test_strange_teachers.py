"""Teachers that somebody else made: a config.json of wrong types or sizes, a module that is none of timm's."""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from timm_tinyvit import cli
from timm_tinyvit.base.errors import InputError
from timm_tinyvit.models.config_file import read_config
from timm_tinyvit.models.loading import create_pretrained
from timm_tinyvit.teacher.teacher import Teacher
from support.programs import refusal

DATA = str(Path(__file__).resolve().parents[2] / 'examples' / 'fashion_mnist')
CPU = torch.device('cpu')
WRONG = [None, True, -1, 0, 1.5, 1e308, 1 << 70, '', 'x', 'x' * 200_000, [], {}, [0, 0, 0], [3, 1 << 40, 1 << 40],
         [3, 32], [float('nan')] * 3, ['a', 'b', 'c'], [[1], [2], [3]], {'a': 1}]
# Places in a config.json, and values that no teacher can have there.
REFUSED = [
    (('architecture',), 3), (('architecture',), 'no_such_model'), (('num_classes',), 'ten'),
    (('num_classes',), 1 << 60), (('num_classes',), -3), (('label_names',), 'a'), (('label_names',), [1, 2]),
    (('label_descriptions',), 3),
    (('label_descriptions',), {'a': 3}), (('model_args',), [1]), (('model_args',), {'depths': [1 << 30]}),
    (('pretrained_cfg',), []), (('pretrained_cfg', 'input_size'), 32), (('pretrained_cfg', 'input_size'), [3, 32]),
    (('pretrained_cfg', 'input_size'), [3, 0, 32]), (('pretrained_cfg', 'input_size'), [3, 1 << 40, 32]),
    (('pretrained_cfg', 'input_size'), ['3', '32', '32']), (('pretrained_cfg', 'mean'), 0.5),
    (('pretrained_cfg', 'mean'), [0.5, 0.5]), (('pretrained_cfg', 'mean'), ['a', 'b', 'c']),
    (('pretrained_cfg', 'std'), [0, 0, 0]), (('pretrained_cfg', 'std'), [float('nan')] * 3),
    (('pretrained_cfg', 'crop_pct'), 0), (('pretrained_cfg', 'crop_pct'), 'all'),
    (('pretrained_cfg', 'interpolation'), 'cubic'), (('pretrained_cfg', 'crop_mode'), 7),
    (('pretrained_cfg', 'num_classes'), 'ten')]


@pytest.fixture
def folder(teacher, tmp_path):
    return shutil.copytree(teacher, tmp_path / 'teacher')


def put(folder, path, value):
    config = json.loads((folder / 'config.json').read_text())
    place = config
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    (folder / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize('path, value', REFUSED, ids=[f'{".".join(path)} {number}' for number, (path, _) in enumerate(
    REFUSED)])
def test_a_config_of_wrong_types_or_sizes_is_one_sentence(folder, path, value):
    put(folder, path, value)
    with pytest.raises(InputError) as refused:
        create_pretrained(str(folder))
    assert str(folder) in str(refused.value) and '\n' not in str(refused.value)


@pytest.mark.parametrize('content', [b'', b'[]', b'3', b'{', b'\xff\xfe', b'[' * 100_000, b'{"architecture": NaN}',
                                     b'{"a": ' + b'9' * 5000 + b'}'])
def test_what_is_no_config_is_one_sentence_for_each_program(folder, content, tmp_path, capsys):
    (folder / 'config.json').write_bytes(content)
    for argv in (['fill', '--dataset', DATA, '--teacher', folder, '--logits', tmp_path / 'logits', '--epochs', '1'],
                 ['export', '--model', folder, '--format', 'torch', '--output', tmp_path / 'x.pt2'],
                 ['eval', folder, '--dataset', DATA, '--val-split', 'test[:8]']):
        assert 'config.json' in refusal(cli.main, [*argv], capsys)
    assert not (tmp_path / 'logits').exists()


def test_any_value_makes_a_teacher_or_one_sentence(folder):
    draw = random.Random(0)
    good = json.loads((folder / 'config.json').read_text())
    places = [(name,) for name in good] + [('pretrained_cfg', name) for name in good['pretrained_cfg']]
    for _ in range(120):
        config, path = copy.deepcopy(good), draw.choice(places)
        (config[path[0]] if len(path) > 1 else config)[path[-1]] = draw.choice(WRONG)
        (folder / 'config.json').write_text(json.dumps(config))
        try:
            teacher = Teacher(create_pretrained(str(folder)), 'x', CPU)
            assert teacher(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, teacher.num_classes)
        except InputError as error:
            assert '\n' not in str(error)


def test_what_timm_itself_exports_is_taken(folder):
    assert read_config(folder)['architecture'] == 'test_resnet'
    for name in timm.list_pretrained()[::80]:
        config = timm.get_pretrained_cfg(name).to_dict()
        config = {key: value for key, value in config.items() if value is not None}
        (folder / 'config.json').write_text(json.dumps({
            'architecture': name.partition('.')[0], 'num_classes': config['num_classes'], 'pretrained_cfg': config}))
        assert read_config(folder)


class Plain(nn.Module):
    """A classifier that says nothing of itself."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 7)

    def forward(self, images):
        return self.linear(images.mean(dim=(2, 3)))


def test_a_module_that_says_nothing_of_itself_is_a_teacher():
    teacher = Teacher(Plain(), 'plain', CPU, size=(32, 32))
    assert (teacher.num_classes, teacher.class_names, teacher.size) == (7, [], (32, 32))
    assert teacher.mean == pytest.approx((0.485, 0.456, 0.406))
    assert teacher(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 7)
    model = Plain()
    model.pretrained_cfg, model.num_classes = None, None
    assert Teacher(model, 'plain', CPU).num_classes == 7


@pytest.mark.parametrize('model, words', [
    (nn.Flatten(0), 'one logit for each class'), (nn.Conv2d(3, 4, 3), 'one logit for each class'),
    (nn.Linear(5, 3), 'does not take an image')])
def test_a_module_without_logits_is_refused_in_one_sentence(model, words):
    with pytest.raises(InputError, match=words):
        Teacher(model, 'odd', CPU)
