"""The classes of ImageNet-1k among those of ImageNet-22k."""

import zlib

import pytest
import timm
import torch

from timm_tinyvit.models.imagenet22k import classifier_22k_to_1k, imagenet1k_in_22k, logits_22k_to_1k


def create_small(num_classes=21841, **kwargs):
    return timm.create_model('tiny_vit_5m_224', img_size=32, num_classes=num_classes, **kwargs)


def test_the_map_is_the_official_one():
    indices = imagenet1k_in_22k()
    assert len(indices) == 1000
    assert indices[:5] == (359, 368, 460, 475, 486) and indices[-2:] == (21367, 21815)
    assert [i for i, index in enumerate(indices) if index < 0] == [850]
    # of the numbers in the official imagenet_1kto22k.txt
    assert zlib.crc32(','.join(map(str, indices)).encode()) == 3608199224


def test_logits_keep_their_class_and_absent_classes_score_zero():
    logits = torch.arange(2 * 21841, dtype=torch.float32).view(2, 21841) + 1
    small = logits_22k_to_1k(logits)
    assert small.shape == (2, 1000)
    assert small[0, :5].tolist() == [360, 369, 461, 476, 487]
    assert small[1, 999] == 21841 + 21815 + 1
    assert small[:, 850].tolist() == [0, 0]
    assert torch.equal(logits_22k_to_1k(logits[0]), small[0])


def test_a_converted_classifier_gives_the_same_logits():
    model = create_small().eval()
    with torch.no_grad():
        model.get_classifier().bias.normal_()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = logits_22k_to_1k(model(x))
        mean = model(x)[:, [index for index in imagenet1k_in_22k() if index >= 0]].mean(1)
        assert classifier_22k_to_1k(model) is model
        logits = model(x)
    assert model.num_classes == 1000 and logits.shape == (2, 1000)
    present = [i for i in range(1000) if i != 850]
    assert torch.allclose(logits[:, present], expected[:, present], atol=1e-5)
    assert torch.allclose(logits[:, 850], mean, atol=1e-5)


def test_a_converted_classifier_keeps_device_dtype_and_gradient():
    model = classifier_22k_to_1k(create_small(device='meta', dtype=torch.float16))
    weight = model.get_classifier().weight
    assert weight.device.type == 'meta' and weight.dtype == torch.float16 and weight.requires_grad
    other = classifier_22k_to_1k(timm.create_model('resnet10t', num_classes=21841, device='meta'))
    assert other.get_classifier().out_features == 1000


def test_other_classifiers_are_refused_in_one_sentence(one_sentence):
    for call in (lambda: logits_22k_to_1k(torch.zeros(2, 1000)), lambda: classifier_22k_to_1k(create_small(1000))):
        with pytest.raises(ValueError) as caught:
            call()
        one_sentence(str(caught.value), '1000', '21841')
    with pytest.raises(ValueError, match='Identity'):
        classifier_22k_to_1k(create_small(0))
