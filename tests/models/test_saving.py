"""Exported models, read back by timm."""

import json

import pytest
import timm
import torch

from timm_tinyvit.models.saving import export_model


def test_a_channels_last_model_is_exported_as_it_is(tmp_path):
    model = timm.create_model('test_resnet', num_classes=5).to(memory_format=torch.channels_last)
    export_model(tmp_path, model, ['a', 'b', 'c', 'd', 'e'], {'input_size': (3, 48, 48), 'crop_pct': 1.0})
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert again.pretrained_cfg['input_size'] == (3, 48, 48) and again.pretrained_cfg['crop_pct'] == 1.0
    assert again.pretrained_cfg['label_names'] == ['a', 'b', 'c', 'd', 'e']


def test_a_tiny_vit_says_its_windows_and_not_its_image_size(tmp_path):
    model = timm.create_model('tiny_vit_5m_224', num_classes=5, img_size=64)
    export_model(tmp_path, model)
    arguments = json.loads((tmp_path / 'config.json').read_text())['model_args']
    assert arguments['window_sizes'] == [2, 2, 4, 2] and 'img_size' not in arguments
    model.set_input_size(img_size=96)
    export_model(tmp_path, model)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert tuple(again.window_sizes) == (3, 3, 6, 3)
    assert {file.name for file in tmp_path.iterdir()} == {'config.json', 'model.safetensors'}


@pytest.mark.parametrize('name', ['coat_lite_tiny', 'test_resnet'])
def test_weights_under_several_names_are_exported_under_each(name, tmp_path):
    model = timm.create_model(name, num_classes=5)
    if name == 'test_resnet':
        model.layer1[0].bn2.bias = model.layer1[0].bn1.bias
        # A part of a larger tensor too.
        model.fc.weight.data = torch.randn(9, model.fc.in_features)[2:7]
    places = [tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()]
    assert len(places) > len(set(places))
    export_model(tmp_path, model)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
