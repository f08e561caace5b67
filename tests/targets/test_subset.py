"""Targets of a part of a teacher's classes, against the dense formula."""

import pytest
import torch

from timm_tinyvit.targets.codecs import create_codec
from timm_tinyvit.targets.features import FeatureTargets
from timm_tinyvit.targets.sparse import SparseTargets, sparse_soft_target_cross_entropy
from timm_tinyvit.targets.subset import SubsetCodec, restrict


@pytest.mark.parametrize('num_classes, k, size', [
    (50, 10, 30), (50, 10, 12), (50, 10, 10), (50, 10, 3), (50, 10, 1), (50, 10, 50), (50, 1, 7), (6, 6, 4), (6, 6, 6),
    (1000, 7, 400)])
def test_a_part_of_the_classes_is_the_dense_target_of_these_divided_by_its_sum(num_classes, k, size):
    draw = torch.Generator().manual_seed(num_classes + k + size)
    targets = SparseTargets.from_logits(3 * torch.randn(64, num_classes, generator=draw), k)
    classes = torch.randperm(num_classes, generator=draw)[:size].tolist()
    if k > size > 1:
        classes[-1] = targets.ids[0, -1].item() if targets.ids[0, -1] not in classes else classes[-1]
    places = torch.full((num_classes,), -1)
    places[classes] = torch.arange(size)
    found = restrict(targets, places, size)
    assert (found.k, found.num_classes) == (min(k, size), size)
    assert all(len(set(row)) == len(row) and 0 <= min(row) and max(row) < size for row in found.ids.tolist())
    dense = targets.densify()[:, classes].double()
    dense = dense / dense.sum(dim=1, keepdim=True)
    assert (found.densify() - dense).abs().max() < 1e-6
    for temperature in (0.5, 4.):
        softened = (dense.log() / temperature).softmax(dim=1)
        assert (found.densify(temperature) - softened).abs().max() < 2e-6
    logits = torch.randn(64, size, generator=draw)
    loss = -(dense * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert sparse_soft_target_cross_entropy(logits, found).item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_codec_of_a_part_decodes_each_teacher_and_leaves_features_alone():
    codec, targets = create_codec('compact', 20, 3), SparseTargets.from_logits(torch.randn(4, 20), 3)
    records, features = torch.from_numpy(codec.encode(targets)), FeatureTargets(torch.ones(4, 1, 2))

    class Both:
        width = codec.width

        def decode(self, records):
            return [codec.decode(records), features]

    found, same = SubsetCodec(Both(), [7, 3, 11], 20).decode(records)
    expected = SubsetCodec(codec, [7, 3, 11], 20).decode(records)
    assert same is features and torch.equal(found.densify(), expected.densify())
    dense = codec.decode(records).densify()[:, [7, 3, 11]]
    torch.testing.assert_close(expected.densify(), dense / dense.sum(dim=1, keepdim=True))
