"""The student before its training begins."""

import argparse

import pytest
import timm
import torch

from timm_tinyvit.train.student import check_batch_norms


def flags(**changes):
    return argparse.Namespace(**{'model': 'm', 'batch_size': 1, 'freeze_bn': False, 'sync_bn': False, **changes})


@pytest.mark.parametrize('name, size, is_refused', [
    ('tiny_vit_5m_224', 32, True), ('tiny_vit_5m_224', 64, False), ('test_resnet', 32, True),
    ('test_resnet', 64, False), ('test_vit', 32, False)])
def test_a_batch_of_one_image_is_refused_where_a_batch_norm_sees_one_value(name, size, is_refused, refused):
    kwargs = {} if name == 'test_resnet' else {'img_size': size}
    model = timm.create_model(name, num_classes=3, **kwargs).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(7)
    if is_refused:
        with refused('one value per channel', '--batch-size', '--img-size', '--freeze-bn', f'{size}x{size}'):
            check_batch_norms(model, flags(), (size, size), 1)
        for allowed, processes in ((flags(batch_size=2), 1), (flags(freeze_bn=True), 1), (flags(sync_bn=True), 2)):
            check_batch_norms(model, allowed, (size, size), processes)
        with refused('one value per channel'):
            check_batch_norms(model, flags(sync_bn=True), (size, size), 1)
    else:
        check_batch_norms(model, flags(), (size, size), 1)
    # Neither statistics nor draws have changed.
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    found = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(found, torch.rand(1))
