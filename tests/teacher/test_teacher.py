"""Any timm model as a teacher."""

import argparse

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_tinyvit.base.errors import InputError
from timm_tinyvit.models.loading import Normalize, create_pretrained
from timm_tinyvit.models.saving import export_model
from timm_tinyvit.teacher.creating import create_teacher
from timm_tinyvit.teacher.teacher import Teacher


def test_views_are_normalised_as_timm_normalises():
    views = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    expected = (views / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(Normalize(mean, std)(views), expected, atol=1e-6)


def test_views_of_another_size_are_resized_and_others_are_not():
    views = torch.full((1, 3, 8, 8), 51, dtype=torch.uint8)
    resized = Normalize((0., 0., 0.), (1., 1., 1.), (12, 16))(views)
    assert resized.shape == (1, 3, 12, 16) and torch.allclose(resized, torch.tensor(0.2))
    assert Normalize((0., 0., 0.), (1., 1., 1.), (8, 8))(views).shape == (1, 3, 8, 8)


def test_the_weights_hash_tells_weights_apart_and_nothing_else(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('test_vit', num_classes=7)
    export_model(tmp_path, model)
    again = Teacher(create_pretrained(str(tmp_path)), 'again', torch.device('cpu'))
    first = Teacher(model, 'first', torch.device('cpu'), size=(32, 32))
    assert first.weights == again.weights
    with torch.no_grad():
        model.head.bias[0] += 1
    assert Teacher(model, 'first', torch.device('cpu')).weights != first.weights


def test_a_teacher_gives_float_logits_under_autocast():
    model = timm.create_model('test_vit', num_classes=7, img_size=32)
    views = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    plain, half = (
        Teacher(model, 'teacher', torch.device('cpu'), amp_dtype=dtype, size=(32, 32)) for dtype in
        (None, torch.bfloat16))
    logits = half(views)
    assert logits.dtype == torch.float32 and logits.shape == (2, 7)
    assert not torch.equal(logits, plain(views)) and torch.allclose(logits, plain(views), atol=0.1)
    assert half.describe(4)['dtype'] == 'bfloat16' and plain.describe(4)['dtype'] == 'float32'


def test_a_teacher_that_cannot_be_had_is_one_sentence(tmp_path):
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'config.json').write_text('{')
    save_file({'other': torch.zeros(1)}, tmp_path / 'other.safetensors')
    save_file(timm.create_model('test_vit', num_classes=9).state_dict(), tmp_path / 'nine.safetensors')
    (tmp_path / 'run' / 'best').mkdir(parents=True)
    (tmp_path / 'run' / 'best' / 'config.json').write_text('{}')
    cases = [
        (dict(name='no_such_model'), 'cannot be had'),
        (dict(name=str(tmp_path / 'nowhere')), 'cannot be had'),
        (dict(name=str(tmp_path / 'broken')), 'config.json is no JSON'),
        (dict(name='test_vit', checkpoint=str(tmp_path / 'none.pth')), 'there is no file'),
        (dict(name='test_vit', checkpoint=str(tmp_path / 'other.safetensors')),
         r'are of another model \(Missing key.*give the model test_vit and the number of classes \(1000 here\)'),
        (dict(name='test_vit', checkpoint=str(tmp_path / 'nine.safetensors'), num_classes=10),
         r'are of another model \(size mismatch for head.*\(10 here\)'),
        (dict(name=str(tmp_path / 'run')), 'is the folder of a run; give .*/best'),
    ]
    for case, words in cases:
        with pytest.raises(InputError, match=words) as error:
            create_pretrained(**case)
        assert '\n' not in str(error.value)


def flags(teacher, **changes):
    return argparse.Namespace(**{
        'teacher': str(teacher), 'teacher_checkpoint': None, 'teacher_num_classes': None, 'teacher_amp_dtype': None,
        'teacher_compile': False, **changes})


@pytest.mark.parametrize('channels, word', [(1, '1 channel,'), (4, '4 channels,')])
def test_a_teacher_of_other_channels_is_refused_before_it_sees_a_view(channels, word, tmp_path, refused):
    export_model(tmp_path / 'odd', timm.create_model('test_resnet', num_classes=3, in_chans=channels), None, dict(
        input_size=(channels, 32, 32), mean=(0.5,) * channels, std=(0.5,) * channels))
    with refused('the teacher odd', word, 'red, green and blue'):
        create_teacher(flags(tmp_path / 'odd'), torch.device('cpu'))


def test_a_teacher_whose_output_is_no_logit_for_each_class_is_refused(tmp_path, refused, monkeypatch):
    export_model(tmp_path / 'odd', timm.create_model('test_resnet', num_classes=3), None, dict(input_size=(3, 32, 32)))
    monkeypatch.setattr(timm.models.ResNet, 'forward', timm.models.ResNet.forward_features)
    with refused('the teacher odd', 'shape', '[1, 3]'):
        create_teacher(flags(tmp_path / 'odd'), torch.device('cpu'))
