"""A student of some of its teacher's classes: what it learns, how it is validated, and what is said of it."""

import csv
import json

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_distill
from support.programs import refusal
from timm_tinyvit import cli
from timm_tinyvit.hub.model_card import run_card
from timm_tinyvit.report.compare import compare_runs
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.train.teacher_comparison import StoredViews


@pytest.fixture(scope='module')
def part(tmp_path_factory, keyed_store):
    """The samples of three classes of ten, with labels in an order of their own: the folder, and the classes' names."""
    rows = datasets.load_from_disk(keyed_store[0])
    names, labels = rows.features['label'].names, np.array(rows['label'])
    chosen = np.argsort(-np.bincount(labels, minlength=10), kind='stable')[:3].tolist()
    kept = rows.select(np.flatnonzero(np.isin(labels, chosen)))
    kept = kept.remove_columns('label').add_column(
        'label', [chosen.index(label) for label in kept['label']],
        feature=datasets.ClassLabel(names=[names[label] for label in chosen]))
    folder = tmp_path_factory.mktemp('part') / 'photos'
    datasets.DatasetDict({'train': kept, 'test': kept}).save_to_disk(folder)
    return folder, [names[label] for label in chosen]


@pytest.mark.launches
def test_a_student_of_some_classes_learns_these_and_is_resumed_with_the_same(keyed_store, part, tmp_path, capsys):
    folder, names = part
    argv = ['--dataset', str(folder), '--logits', str(keyed_store[1]), '--model', 'test_resnet', '--epochs', '2', '-b',
            '4', '--alpha', '0.5', '--warmup-epochs', '0', '-j', '0', '--output', str(tmp_path)]
    (tmp_path / 'classes.txt').write_text('\n'.join(names))
    (tmp_path / 'turned.txt').write_text('\n'.join(names[::-1]))
    train_distill.main([*argv, '--num-classes', '3', '--experiment', 'names'])
    train_distill.main([*argv, '--class-map', str(tmp_path / 'classes.txt'), '--experiment', 'file'])
    run = tmp_path / 'file'
    one, two = (load_file(tmp_path / name / 'last' / 'model.safetensors') for name in ('names', 'file'))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert json.loads((run / 'last' / 'config.json').read_text())['label_names'] == names
    # The accuracy is that of the right classes.
    capsys.readouterr()
    cli.main(['eval', str(run / 'last'), '--dataset', str(folder), '-j', '0', '--quiet'])
    *_, row = csv.DictReader(open(run / 'metrics.csv'))
    assert f'top1 {float(row["eval_top1"]):.3f}' in capsys.readouterr().out
    views = StoredViews.read(run / 'stored_views.npz')
    assert views.teacher.ids.max() < 3 and views.teacher.ids.shape[1] == 3
    np.testing.assert_allclose(views.teacher.probs.sum(axis=1), 1, rtol=1e-5)
    assert 'setting ' not in compare_runs([tmp_path / 'names', run])
    assert 'renormalised to these' in run_card(run, 'last', 'org/student').text
    recipe = run_card(run, 'last', 'org/student').text
    assert str(tmp_path) not in recipe and 'class_map: classes.txt' in recipe
    assert LogitStore.open(keyed_store[1]).manifest.num_classes == 10
    for other in (['--class-map', str(tmp_path / 'turned.txt')], ['--num-classes', '3']):
        assert 'started with other settings' in refusal(
            train_distill.main, [*argv, *other, '--experiment', 'file'], capsys)
