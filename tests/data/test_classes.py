"""What the classes of data, stores, teachers and checkpoints are: matched by name, or refused before work begins."""

import argparse
import json
import pickle
from dataclasses import replace
from datetime import date, datetime
from decimal import Decimal
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch

from support.flags import DATA
from timm_tinyvit.config.arguments import ArgumentParser
from timm_tinyvit.config.commands import add_fill_arguments
from timm_tinyvit.config.training import settings
from timm_tinyvit.data.classes import (
    check_labels, checkpoint_names, class_numbers, match_classes, match_names, new_labels, renumbered, resolve_classes,
    valid_names,
)
from timm_tinyvit.data.dataset import SparseLogitDataset
from timm_tinyvit.data.fingerprint import dataset_fingerprint
from timm_tinyvit.data.sources import class_names, find_column, hold_out, load_split, read_labels
from timm_tinyvit.data.streaming import SparseLogitStream
from timm_tinyvit.data.view_config import ViewConfig
from timm_tinyvit.data.views import Replay
from timm_tinyvit.models.imagenet22k import NUM_CLASSES_22K
from timm_tinyvit.models.saving import export_model
from timm_tinyvit.store.ensemble import Ensemble
from timm_tinyvit.store.keys import KeyIndex, hash_keys
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.store.manifest import Manifest
from timm_tinyvit.targets.codecs import create_codec
from timm_tinyvit.targets.sparse import SparseTargets


def split(names, labels):
    feature = datasets.ClassLabel(names=list(names)) if names else datasets.Value('int64')
    return datasets.Dataset.from_dict({'label': labels}, features=datasets.Features({'label': feature}))


def flags(**changes):
    return argparse.Namespace(**{'target_key': None, 'num_classes': None, 'alpha': 1., 'streaming': False,
                                 'initial_checkpoint': None, 'class_map': None, **changes})


@pytest.mark.parametrize('here, there, expected', [
    ('abc', 'abc', [0, 1, 2]), ('cab', 'abc', [2, 0, 1]), ('bc', 'abc', [1, 2]), ('a', 'abc', [0]),
    ('xyz', 'abc', None), ('axc', 'abc', None), ('aac', 'aac', None), (['crane', 'crane'], ['crane', 'crane'], None),
    ('axb', 'abc', ('1 classes have other numbers', "'b' 2 instead of 1", "'x'")),
    ('abcd', 'abc', ('4 classes instead of 3', "'d'")), ('xy', 'abc', ('2 classes instead of 3', "'x'")),
    ('caa', 'aac', ('other numbers',)), ('aab', 'abc', ('other numbers',)),
])
def test_names_match_classes_whose_order_differs(here, there, expected):
    if isinstance(expected, tuple):
        with pytest.raises(ValueError) as caught:
            match_names(list(here), list(there))
        assert all(word in str(caught.value) for word in expected)
    else:
        found = match_names(list(here), list(there))
        assert (found if found is None else found.tolist()) == expected


def test_labels_get_the_numbers_of_other_classes_and_the_rest_of_the_rows_stays():
    rows = split('cab', [0, 1, 2, 0, -1, None]).add_column('image', list('uvwxyz'))
    found = match_classes(rows, 'label', list('abc'), '--val-split', 'the store s')
    assert read_labels(found, 'label').tolist() == [2, 0, 1, 2, -1, -1] and found['image'][:] == list('uvwxyz')
    assert class_names(found, 'label') == list('abc') and found.split == rows.split
    nested = datasets.Dataset.from_dict({'json': [{'label': 0}, {'label': 1}]}, features=datasets.Features(
        {'json': {'label': datasets.ClassLabel(names=['b', 'a'])}}))
    nested = match_classes(nested, 'json.label', ['a', 'b'], '--val-split', 'the store s')
    assert read_labels(nested, 'json.label').tolist() == [1, 0] and find_column(nested, None, False) == 'json.label'


def test_classes_that_are_the_same_leave_the_split_as_it_is(capsys):
    rows = split('abc', [0, 2])
    for names in (list('abc'), None):
        assert match_classes(rows, 'label', names, '--val-split', 'the store s') is rows
    assert match_classes(split(None, [0]), 'label', list('abc'), '--val-split', 's')['label'][:] == [0]
    assert not capsys.readouterr().err
    # Names that nobody can compare are told.
    assert match_classes(rows, 'label', list('xbc'), '--val-split', 'the store s') is rows
    said = capsys.readouterr().err
    assert '--val-split' in said and "'a' for 'x'" in said and 'by number' in said
    # The paper's classifier of ImageNet-22k is evaluated on the labels of ImageNet-1k.
    imagenet = split([f'n{number}' for number in range(1000)], [0, 999])
    names = [f'n{number + 5}' for number in range(NUM_CLASSES_22K)]
    assert match_classes(imagenet, 'label', names, '--val-split', 's') is imagenet


def test_labels_that_are_no_class_stay_what_they_are():
    assert new_labels(np.array([0, 1, 2, -1, 7]), np.array([2, 0])).tolist() == [2, 0, 2, -1, 7]


# A training


@pytest.mark.parametrize('order', ['cab', 'bc', 'c'])
@pytest.mark.parametrize('by', ['data', 'store', 'teacher'])
def test_evaluation_data_in_another_order_or_without_a_class_are_matched_by_name(order, by):
    train, val = split('abc', [0, 1, 2]), split(order, list(range(len(order))))
    taught = {'data': None, 'store': SimpleNamespace(path='s', manifest=SimpleNamespace(
        num_classes=3, class_names=list('bca'))), 'teacher': SimpleNamespace(
            name='t', num_classes=3, class_names=list('bca'))}[by]
    expected = 'abc' if by == 'data' else 'bca'
    classes, val = resolve_classes(flags(), train, val, taught)
    assert classes.names == list(expected) and classes.num == 3
    assert val['label'][:] == [expected.index(name) for name in order]


@pytest.mark.parametrize('teacher, data, val, alpha, words', [
    ('abc', 'abc', 'xy', 1., ('--val-split', 'the teacher t', "'x'")),
    ('abc', 'abc', 'axb', 1., ('--val-split', 'other numbers')),
    ('abc', 'abcd', 'abc', 0.5, ('--train-split', "'d'")), ('abc', 'bax', 'abc', 0.5, ('--train-split', "'x'")),
    (3, 'ab', 'ab', 1., ('2 classes', 'predicts 3', '--val-dataset')),
    (512, 'abc', 'abc', 1., ('3 classes', 'predicts 512')),
])
def test_a_teacher_of_other_classes_is_refused_before_it_sees_a_view(teacher, data, val, alpha, words, refused):
    num, names = (teacher, []) if isinstance(teacher, int) else (len(teacher), list(teacher))
    taught = SimpleNamespace(name='t', num_classes=num, class_names=names)
    with refused(*words):
        resolve_classes(flags(alpha=alpha), split(data, [0, 1]), split(val, [0, 1]), taught)


def test_training_labels_of_other_classes_are_told_where_nothing_is_learned_from_them(capsys):
    taught = SimpleNamespace(name='t', num_classes=3, class_names=list('abc'))
    classes, _ = resolve_classes(flags(), split('xbca', [0, 3]), split('abc', [0]), taught)
    assert classes.num_labels == 0
    said = capsys.readouterr().err
    assert '--train-split' in said and "'x'" in said and 'goes on without them' in said


def test_a_checkpoint_whose_classifier_has_another_order_is_told(tmp_path, capsys):
    model = timm.create_model('test_resnet', num_classes=3)
    export_model(tmp_path, model, list('cab'))
    assert checkpoint_names(str(tmp_path)) == list('cab') and checkpoint_names(None) is None
    resolve_classes(flags(initial_checkpoint=str(tmp_path)), split('abc', [0]), split('abc', [0]), None)
    assert 'another order' in capsys.readouterr().err
    (tmp_path / 'config.json').write_text('{')
    assert checkpoint_names(str(tmp_path)) is None


@pytest.mark.parametrize('names, expected', [
    (list('abc'), True), (('a', 'b', 'c'), True), (list('ab'), False), (None, False), ('abc', False),
    ([1, 2, 3], False), (['a', 'b', 'c\n'], False), (['a', 'b', '\x1b[31m'], False),
    (['a', 'b', 'c' * (1 << 20)], False)])
def test_names_that_a_manifest_cannot_hold_are_left_out(names, expected):
    assert valid_names(names, 3) == (list(names) if expected else [])


# Label columns


@pytest.mark.parametrize('values, kind, words', [
    (['ant', 'bee'], 'string', ('words', "class_encode_column('label')")), (['0', '1'], 'string', ('cast_column',)),
    (['0', '1'], 'large_string', ('words', 'class_encode_column')),
    (['0', '1'], 'string_view', ('words', 'class_encode_column')),
    ([True, False], 'bool', ('truth values', 'class_encode_column')),
    ([0., 1.], 'float32', ('real numbers', 'cast_column', 'int64')), ([None, None], 'null', ('nothing',)),
    ([[0, 1], [1, 0]], datasets.List(datasets.Value('int64')), ('lists', 'one class number')),
    ([{'id': 1}, {'id': 2}], {'id': datasets.Value('int64')}, ('id', 'one class number'))])
def test_a_label_column_of_another_kind_is_told_with_what_to_do(values, kind, words, refused):
    feature = kind if isinstance(kind, (dict, datasets.List)) else datasets.Value(kind)
    rows = datasets.Dataset.from_dict({'label': values}, features=datasets.Features({'label': feature}))
    assert find_column(rows, None, is_image=False) is None
    with refused("'label'", 'not class numbers', *words):
        resolve_classes(flags(), rows, rows, None)
    with refused('--val-split', "'label'", *words):
        check_labels(rows, None, 3, '--val-split')
    with refused("'label'", *words, '--target-key'):
        find_column(rows, 'label', is_image=False)


@pytest.mark.parametrize('kind', ['decimal128(3, 0)', 'timestamp[us]', 'date32', 'binary'])
def test_labels_of_kinds_that_are_no_numbers_are_told(kind, refused):
    values = {'decimal128(3, 0)': [Decimal(1)], 'timestamp[us]': [datetime(2026, 1, 1)],
              'date32': [date(2026, 1, 1)], 'binary': [pickle.dumps(3)]}[kind]
    rows = datasets.Dataset.from_dict({'label': values}, features=datasets.Features({'label': datasets.Value(kind)}))
    with refused("'label'", kind, 'not class numbers'):
        check_labels(rows, None, 3, '--val-split')


@pytest.mark.parametrize('values, expected', [
    (pa.array([5, 6, 5]).dictionary_encode(), [5, 6, 5]), (pa.array([0, 255], pa.uint8()), [0, 255]),
    (pa.array([3, None]), [3, -1]), (pa.array([1, 1 << 63], pa.uint64()), None),
    (pa.array(['b', 'a'], pa.large_string()).dictionary_encode(), 'words')], ids=[
        'dictionary of numbers', 'uint8', 'null', 'beyond 64 bits', 'dictionary of words'])
def test_labels_in_parquet_of_others_are_their_numbers_or_told(values, expected, tmp_path, refused):
    pq.write_table(pa.table({'label': values}), tmp_path / 'train.parquet')
    rows = load_split(str(tmp_path), None, True)
    if isinstance(expected, list):
        assert read_labels(rows, find_column(rows, None, is_image=False)).tolist() == expected
    else:
        with refused("'label'", 'class numbers', expected or '9223372036854775808'):
            check_labels(rows, find_column(rows, None, is_image=False), 9, '--val-split')


def test_a_share_of_each_class_is_held_out_the_same_in_every_command(refused):
    labels = np.repeat([0, 1, 2, 3], [40, 20, 9, 1])
    held_out = hold_out(labels, 0.2)
    # 8, 4, 1.8 and 0.2 of them.
    assert np.bincount(labels[held_out]).tolist() == [8, 4, 2] and (held_out == hold_out(labels, 0.2)).all()
    assert not np.diff(np.flatnonzero(held_out)[:8]).tolist() == [1] * 7 and hold_out(labels[-1:], 0.9).sum() == 0
    argv = ['--dataset', DATA, '--train-split', 'train[:200]', '--val-fraction', '0.25']
    training, filling = settings(argv), ArgumentParser()
    add_fill_arguments(filling)
    filled = filling.parse_args([*argv, '--teacher', 'x', '--logits', 'y', '--epochs', '1'])
    assert filled.train_split == training.train_split == 'train[:200] without 0.25'
    whole, train, val = (load_split(DATA, split, True, label_column='label') for split in (
        'train[:200]', training.train_split, training.val_split))
    assert len(val) == 50 and sorted(train['label'][:] + val['label'][:]) == sorted(whole['label'][:])
    counts = [np.bincount(rows['label'], minlength=10) for rows in (whole, val)]
    assert np.abs(counts[0] * 0.25 - counts[1]).max() < 1
    for others, words in (
            (['--val-split', 'test'], ('--val-split', 'leave one')), (['--val-fraction', '1'], ('less',))):
        with refused('--val-fraction', *words):
            settings([*argv, *others])


def class_file(tmp_path, *lines):
    (tmp_path / 'classes.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return str(tmp_path / 'classes.txt')


@pytest.mark.parametrize('lines, train, known, expected, names', [
    ('ca', 'ca', 'abc', [2, 0], 'ca'), ('ca', 'ac', 'abc', [2, 0], 'ca'), (['2', '0'], 'xy', 'abc', [2, 0], 'xy'),
    (['2', '0'], None, 'abc', [2, 0], 'ca'), (['1', '2', '0'], 'xyz', '', [1, 2, 0], 'xyz'),
    ('abc', 'abc', 'abc', None, 'abc'), (None, 'cb', 'abc', [2, 1], 'cb')])
def test_a_student_has_the_classes_of_its_map(tmp_path, lines, train, known, expected, names):
    teacher = SimpleNamespace(name='t', num_classes=3, class_names=list(known))
    given = dict(class_map=class_file(tmp_path, *lines)) if lines else dict(num_classes=2)
    data = split(train, [1, 0])
    classes, val = resolve_classes(flags(alpha=0.5, **given), data, data, teacher)
    assert (classes.of_teacher, ''.join(classes.names), classes.num) == (expected, names, len(names))
    labels = [names.index(train[label]) if train and set(train) == set(names) else label for label in (1, 0)]
    assert read_labels(val, 'label').tolist() == labels


@pytest.mark.parametrize('lines, changes, words', [
    ('cax', {}, ("'x'", 'fine-tune the teacher')), ('caa', {}, ("'a' twice",)), (['0', '3'], {}, ("'3'",)),
    (['0', '00'], {}, ('same number twice',)), ('ca', {'num_classes': 3}, ('--num-classes is 3',)),
    ([''], {}, ('a class in each line',)), (['a', '', 'b'], {}, ('a class in each line',)),
    (None, {'class_map': 'no such file'}, ('cannot be read',)),
    (None, {'num_classes': 2}, ('2 of 2 classes', 'fine-tune the teacher on these classes (docs/teacher.md)'))])
def test_a_map_that_names_no_classes_of_the_teacher_is_one_sentence(tmp_path, refused, lines, changes, words):
    given = dict(class_map=class_file(tmp_path, *lines)) if lines else {}
    teacher, data = SimpleNamespace(name='t', num_classes=3, class_names=list('abc')), split('xy', [0, 1])
    with refused(*words):
        resolve_classes(flags(**given, **changes), data, data, teacher)


def test_without_a_teacher_a_class_map_numbers_the_labels_as_timm_does(tmp_path):
    classes, val = resolve_classes(
        flags(class_map=class_file(tmp_path, *'cab')), split('abc', [0, 1, 2]), split('bc', [0, 1]), None)
    assert (classes.names, classes.num, classes.of_teacher) == (list('cab'), 3, None)
    assert read_labels(val, 'label').tolist() == [2, 0]


def test_classes_that_only_validation_has_are_told(capsys):
    sliced, val = split('abc', [0, 0, 1]), split('abc', [2, 1, 2])
    resolve_classes(flags(), sliced, val, None)
    assert "1 classes that no image of --train-split has, as 'c'" in capsys.readouterr().err
    resolve_classes(flags(), sliced, split('cba', [2, 1]), None)  # 'a' and 'b' by other numbers
    assert not capsys.readouterr().err


# Stores


def make_store(path, rows, class_names, key=''):
    codec = create_codec('float16', 3, 1)
    hashes = hash_keys(rows.with_format('arrow')[:]['name']) if key else None
    fingerprint = dataset_fingerprint(rows) if not key else {
        'num_samples': len(rows), 'keys': '', 'samples': {}}
    manifest = Manifest(
        num_samples=len(rows), num_classes=3, k=1, record_width=codec.width, epochs=1, seed=9, shard_size=64,
        class_names=class_names, dataset=fingerprint, key=key, recipe=ViewConfig(input_size=(3, 8, 8)).to_dict())
    store = LogitStore.create(path, manifest)
    if key:
        KeyIndex.write(store.path, store.manifest, hashes)
    ids, log_probs = torch.zeros(len(rows), 1, dtype=torch.int64), torch.full((len(rows), 1), -0.1)
    targets = SparseTargets(ids, log_probs, torch.full((len(rows),), -2.4), 3)
    store.write_shard(0, 0, codec.encode(targets))
    return store


@pytest.fixture
def images(fashion):
    rows = fashion.select(range(6))
    labels = datasets.ClassLabel(names=['c', 'a', 'b'])
    rows = rows.remove_columns('label').add_column('label', [0, 1, 2, 0, 1, 2], feature=labels)
    return rows.add_column('name', list('uvwxyz'))


def test_training_labels_get_the_numbers_of_the_stores_classes_and_the_fingerprint_stays(images, tmp_path):
    replay = Replay(ViewConfig(input_size=(3, 8, 8)), 9)
    for names, expected in (('abc', [2, 0, 1, 2, 0, 1]), ('', [0, 1, 2, 0, 1, 2]), ('xyz', [0, 1, 2, 0, 1, 2])):
        store = make_store(tmp_path / f'of {names}', images, list(names))
        data = SparseLogitDataset(images, replay, store)
        assert [sample['label'] for sample in data.__getitems__([(0, row) for row in range(6)])] == expected
        assert read_labels(data.dataset, data.label_column).tolist() == expected
    assert renumbered(images, 'label', list('xbc')) is images and class_numbers(images, 'label', list('xyz')) is None


def test_labels_of_a_stream_get_the_numbers_of_the_stores_classes(images, tmp_path):
    store = make_store(tmp_path / 'store', images, list('abc'), key='name')
    stream = SparseLogitStream(
        images.to_iterable_dataset(), Replay(ViewConfig(input_size=(3, 8, 8)), 9), store, buffer_size=0)
    stream.set_epoch(0)
    assert [sample['label'] for sample in stream] == [2, 0, 1, 2, 0, 1]


def test_a_manifest_names_as_many_classes_as_there_are(images, tmp_path, refused):
    manifest = make_store(tmp_path / 'store', images, list('abc')).manifest
    assert Manifest.from_json(manifest.to_json(), 's') == manifest
    # Names decide no shard.
    assert replace(manifest, class_names=[]).identity == manifest.identity
    values = json.loads(manifest.to_json())
    for names in (['a', 'b'], ['a', 'b', 3], ['a', 'b', None]):
        with refused('s is damaged', 'class_names'):
            Manifest.from_json(json.dumps({**values, 'class_names': names}), 's')


def test_the_teachers_of_an_ensemble_agree_on_their_classes(images, tmp_path, refused):
    stores = {names: make_store(tmp_path / f'of {names}', images, list(names)) for names in ('abc', 'bca', '')}
    assert Ensemble([stores[''], stores['abc']]).manifest.class_names == list('abc')
    with refused('class_names', 'of abc', 'of bca'):
        Ensemble([stores['abc'], stores['bca']])
