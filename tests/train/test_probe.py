"""Features compared by neighbours and by a linear classifier, against figures made another way."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from support.flags import DATA
from support.programs import refusal
from timm_tinyvit import cli
from timm_tinyvit.models.saving import export_model
from timm_tinyvit.train import probe
from timm_tinyvit.train.probe import knn_accuracy, linear_accuracy

EVAL = ['--dataset', DATA, '--train-split', 'train[:300]', '--val-split', 'test[:150]', '-j', '0', '--quiet',
        '--validation-batch-size', '50']


def clouds(rows, classes=7, dim=12, seed=0):
    """Vectors around a centre for each class, near enough to be mistaken."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    return centres[labels] + torch.randn(rows, dim, generator=generator), labels


@pytest.mark.parametrize('block', [1 << 25, 500])
def test_the_vote_is_that_of_dino(monkeypatch, block):
    monkeypatch.setattr(probe, 'SIMILARITIES', block)
    (known, classes), (vectors, labels) = clouds(200), clouds(90, seed=1)
    right = right5 = 0
    unit = [part.double().numpy() / np.linalg.norm(part.double().numpy(), axis=1)[:, None] for part in (known, vectors)]
    for vector, label in zip(unit[1], labels.tolist()):
        cosine = unit[0] @ vector
        near = np.argsort(-cosine)[:20]
        votes = np.bincount(classes.numpy()[near], np.exp(cosine[near] / 0.07), minlength=7)
        order = np.argsort(-votes)
        right, right5 = right + (order[0] == label), right5 + (label in order[:5])
    found = knn_accuracy((known, classes), (vectors, labels))
    assert 30 < found['knn'] < 95
    assert found == pytest.approx({'knn': 100 * right / 90, 'knn_top5': 100 * right5 / 90})


def test_neighbours_fewer_than_twenty_all_vote():
    known = torch.eye(3)
    assert knn_accuracy((known, torch.arange(3)), (known, torch.arange(3)))['knn'] == 100


def test_a_linear_classifier_is_as_good_as_the_best_there_is():
    """Gaussian clouds of one covariance: the best classifier is linear, and known."""
    train, val = clouds(1500), clouds(1500, seed=1)
    centres = torch.randn(7, 12, generator=torch.Generator().manual_seed(99))
    best = 100 * (torch.cdist(val[0], centres).argmin(dim=1) == val[1]).float().mean().item()
    found = linear_accuracy(train, val)
    assert found['linear_lr'] in probe.LINEAR_RATES and best - 3 < found['linear'] < best + 1
    assert linear_accuracy(train, val) == found


@pytest.mark.launches
def test_the_program_probes_a_trained_model_and_a_backbone(tmp_path, capsys):
    teacher, figures = Path(DATA) / 'teacher', {}
    torch.manual_seed(0)
    export_model(tmp_path / 'random', timm.create_model('test_convnext', num_classes=0),
                 data_config={'input_size': (3, 32, 32)})
    for folder in (teacher, tmp_path / 'random'):
        for name in ('knn', 'linear'):
            capsys.readouterr()
            cli.main(['eval', str(folder), *EVAL, '--probe', name])
            words = capsys.readouterr().out.split()
            figures[folder.name, name] = float(words[words.index(name) + 1].rstrip(','))
    for name in ('knn', 'linear'):
        assert figures['teacher', name] > 75 > figures['random', name] > 20


def test_what_cannot_be_probed_is_one_sentence(tmp_path, capsys, one_sentence, fashion):
    backbone = tmp_path / 'backbone'
    export_model(backbone, timm.create_model('test_convnext', num_classes=0), data_config={'input_size': (3, 32, 32)})
    one_sentence(refusal(cli.main, ['eval', backbone, *EVAL], capsys), 'no classifier', '--probe')
    one_sentence(refusal(cli.main, ['eval', backbone, *EVAL, '--probe', 'best'], capsys), '--probe', 'knn', 'linear')
    rows = fashion.select(range(20)).remove_columns('label')
    rows.save_to_disk(tmp_path / 'unlabelled')
    argv = ['eval', backbone, '--dataset', tmp_path / 'unlabelled', '--val-dataset', DATA, '--val-split', 'test',
            '-j', '0', '--probe', 'knn']
    one_sentence(refusal(cli.main, argv, capsys), '--train-split', 'no labels')
