"""The student before its training begins."""

import argparse

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx

from timm_tinyvit.base.errors import InputError
from timm_tinyvit.config.training import settings
from timm_tinyvit.models.loading import create_pretrained
from timm_tinyvit.train.student import check_batch_norms, create_student


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


OFFLINE = [
    LocalEntryNotFoundError('not in the cache'), OfflineModeIsEnabled('offline'), httpx.ConnectError('no route'),
    httpx.ConnectTimeout('late')]


@pytest.mark.parametrize('error', OFFLINE, ids=lambda error: type(error).__name__)
def test_weights_that_the_network_does_not_bring_name_it_and_the_flag(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr('timm.create_model', fail)
    args = settings(['--dataset', 'x', '--model', 'resnet18', '--pretrained'])
    with pytest.raises(InputError) as refused:
        create_student(args, 10, (64, 64))
    said = str(refused.value)
    assert 'Hub' in said and 'leave --pretrained out' in said and '--img-size' not in said
    assert 'network' in said or 'HF_HUB_OFFLINE' in said
    with pytest.raises(InputError, match='cannot be had from the Hub: .*(network|HF_HUB_OFFLINE)'):
        create_pretrained('resnet18')


def test_weights_of_another_model_name_the_flag_too(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError('size mismatch for conv1.weight')

    monkeypatch.setattr('timm.create_model', fail)
    args = settings(['--dataset', 'x', '--model', 'resnet18', '--pretrained'])
    with pytest.raises(InputError, match='size mismatch.*--pretrained'):
        create_student(args, 10, (64, 64))
