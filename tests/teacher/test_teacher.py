"""Any timm model as a teacher."""

import argparse
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.activations import QuickGELU

from support.files import tree
from support.flags import DATA
from support.programs import refusal
from timm_tinyvit import cli, save_logits
from timm_tinyvit.base.errors import InputError
from timm_tinyvit.models.loading import Normalize, create_pretrained
from timm_tinyvit.models.saving import export_model
from timm_tinyvit.store.manifest import PROBE_TOLERANCE, output_distance
from timm_tinyvit.teacher import creating
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
        (dict(name='no_such_model'), 'cannot be loaded'),
        (dict(name=str(tmp_path / 'nowhere')), 'cannot be loaded'),
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
        'teacher_compile': False, 'class_embeddings': None, **changes})


@pytest.mark.parametrize('channels, word', [(1, '1 channel,'), (4, '4 channels,')])
def test_a_teacher_of_other_channels_is_refused_before_it_sees_a_view(channels, word, tmp_path, refused):
    export_model(tmp_path / 'odd', timm.create_model('test_resnet', num_classes=3, in_chans=channels), None, dict(
        input_size=(channels, 32, 32), mean=(0.5,) * channels, std=(0.5,) * channels))
    with refused('the teacher test_resnet (odd)', word, 'red, green and blue'):
        create_teacher(flags(tmp_path / 'odd'), torch.device('cpu'))


def test_a_teacher_whose_output_is_no_logit_for_each_class_is_refused(tmp_path, refused, monkeypatch):
    export_model(tmp_path / 'odd', timm.create_model('test_resnet', num_classes=3), None, dict(input_size=(3, 32, 32)))
    monkeypatch.setattr(timm.models.ResNet, 'forward', timm.models.ResNet.forward_features)
    with refused('the teacher test_resnet (odd)', 'shape', '[1, 3]'):
        create_teacher(flags(tmp_path / 'odd'), torch.device('cpu'))


def with_weights(name):
    """A model with the weights of one seed, at the size that the tests use."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, img_size=32)
    for parameter in model.parameters():
        # What a training makes larger than an initialisation.
        parameter.data *= 2
    return model


def swapped(model, other):
    """The model with another activation, pooling or constant, and the same weights."""
    if other == 'pooling':
        model.global_pool = 'avg'
    for module in model.modules():
        if other == 'activation' and hasattr(module, 'act'):
            module.act = QuickGELU()
        if other == 'constant of a norm' and isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-2
    return model


@pytest.mark.parametrize('other', ['activation', 'pooling', 'constant of a norm'])
def test_another_model_with_the_same_weights_does_not_fill_a_store_further(other, tmp_path, capsys, monkeypatch):
    export_model(tmp_path / 'model', with_weights('test_vit'), data_config={'input_size': (3, 32, 32)})
    data = ['--dataset', DATA, '--train-split', 'train[:40]', '--teacher', tmp_path / 'model', '-j', '0']
    fill = [*data, '--logits', tmp_path / 'store', '--img-size', '32', '--topk', '3', '--shard-size', '20', '--epochs']
    save_logits.main([str(word) for word in (*fill, '1')])
    before = tree(tmp_path / 'store')
    # The same one goes on, whatever its computation is rounded to.
    save_logits.main([str(word) for word in (*fill, '2')])
    check = [str(word) for word in ('store', 'check', tmp_path / 'store', *data[:-2])]
    cli.main(check)
    assert 'records are identical' in capsys.readouterr().out
    real = creating.create_pretrained
    monkeypatch.setattr(creating, 'create_pretrained', lambda *args: swapped(real(*args), other))
    after = tree(tmp_path / 'store')
    assert 'teacher outputs' in refusal(save_logits.main, [*fill, '3'], capsys)
    assert 'the same weights and other outputs' in refusal(cli.main, check, capsys)
    assert tree(tmp_path / 'store') == after and set(before) < set(after)


def test_outputs_are_the_same_in_other_orders_of_summation_and_in_every_precision():
    """Batches, memory formats and threads differ from machine to machine; the precision of the filling has no part."""
    model = with_weights('test_vit')
    known = Teacher(model, 'one', torch.device('cpu')).probe
    assert len(known) == 4 and len(known[0]) == 10 and json.loads(json.dumps(known)) == known
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = Teacher(with_weights('test_vit').to(memory_format=torch.channels_last), 'again',
                            torch.device('cpu'), torch.bfloat16)
            assert output_distance(known, again.probe) < PROBE_TOLERANCE / 4
    finally:
        torch.set_num_threads(threads)
    for other in ('activation', 'pooling', 'constant of a norm'):
        distance = output_distance(known, Teacher(swapped(with_weights('test_vit'), other), 'x', 'cpu').probe)
        assert distance > 4 * PROBE_TOLERANCE, (other, distance)


def test_outputs_that_are_none_or_others_are_infinitely_far():
    assert output_distance(None, None) == output_distance([], None) == 0
    assert output_distance([[1., 2.]], None) == output_distance([[1.]], [[1., 2.]]) == float('inf')
    assert output_distance([[1., 2.], [3., 4.]], [[1., 2.], [3., 4.5]]) == pytest.approx(0.5 / 1.3, rel=0.1)
