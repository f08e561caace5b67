"""The commands that fill, check and describe a store, with a real timm model over real images."""

import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch

from support import programs
from support.flags import DATA, SMALL_VIEWS
from support.files import flip_bit, tree
from timm_tinyvit import cli, save_logits
from timm_tinyvit.base import console
from timm_tinyvit.data.dataset import SparseLogitDataset, collate
from timm_tinyvit.data.opening import open_store
from timm_tinyvit.data.sources import load_split
from timm_tinyvit.models.saving import export_model
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.targets.sparse import SparseTargets
from timm_tinyvit.teacher.creating import stored_names
from timm_tinyvit.teacher.teacher import Teacher

VIEWS = [*SMALL_VIEWS, '--aa', 'rand-m9-mstd0.5-inc1']
DATA_FLAGS = ['--dataset', DATA, '--train-split', 'train[:100]']
COMMON = [*DATA_FLAGS, *VIEWS, '-j', '0', '--shard-size', '32', '--topk', '3', '--codec', 'float16']


def refusal(argv, capsys, command='fill') -> str:
    return programs.refusal(cli.main, [*command.split(), *argv], capsys)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('teacher')
    export_model(folder, timm.create_model('test_resnet', num_classes=10), data_config={'input_size': (3, 64, 64)})
    return str(folder)


@pytest.fixture(scope='module')
def store(tmp_path_factory, teacher) -> Path:
    path = tmp_path_factory.mktemp('stores') / 'logits'
    save_logits.main([*COMMON, '--teacher', teacher, '--logits', str(path), '--epochs', '2'])
    return path


def test_what_is_stored_is_what_the_teacher_says_of_the_replayed_view(store, teacher):
    opened, replay = open_store(store, {})
    model = timm.create_model(f'local-dir:{teacher}', pretrained=True).eval()
    data = SparseLogitDataset(load_split(DATA, 'train[:100]', True), replay, opened)
    batch = collate(data.__getitems__([(1, index) for index in (3, 99, 40)]))
    # The teacher takes 64 pixels and sees the 32-pixel view resized.
    views = torch.nn.functional.interpolate(batch['view'].float(), (64, 64), mode='bicubic', antialias=True) / 255
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    with torch.no_grad():
        expected = SparseTargets.from_logits(model((views - mean) / std), 3)
    stored = opened.codec.decode(batch['record'])
    assert torch.equal(stored.ids, expected.ids)
    assert torch.allclose(stored.log_probs, expected.log_probs, atol=2e-3)
    assert torch.allclose(stored.log_rest, expected.log_rest, atol=1e-4)


def test_the_manifest_says_how_everything_was_made(store):
    manifest = json.loads((store / 'store.json').read_text())
    assert (manifest['num_samples'], manifest['num_classes'], manifest['k'], manifest['epochs']) == (100, 10, 3, 2)
    assert set(manifest['teacher']) >= {
        'name', 'weights', 'mean', 'std', 'input_size', 'dtype', 'batch_size', 'device'}
    assert manifest['recipe']['auto_augment'] == 'rand-m9-mstd0.5-inc1'
    assert set(manifest['versions']) == {
        'timm', 'torchvision', 'torch', 'pillow', 'libjpeg', 'numpy', 'datasets', 'python'}
    assert str(Path.home()) not in json.dumps(manifest) and '/' not in manifest['teacher']['name']


def test_the_same_command_fills_just_what_is_missing(store, teacher, tmp_path):
    path = tmp_path / 'logits'
    shutil.copytree(store, path)
    kept = path / 'epoch-00000' / 'shard-00001.arrow'
    before = kept.stat().st_mtime_ns
    (path / 'epoch-00001' / 'shard-00003.arrow').unlink()
    save_logits.main([*COMMON, '--teacher', teacher, '--logits', str(path), '--epochs', '2'])
    assert tree(path) == tree(store) and kept.stat().st_mtime_ns == before


def test_epochs_can_be_filled_in_pieces_and_the_store_grows(store, teacher, tmp_path):
    path = tmp_path / 'logits'
    for epochs in ('0:1', '1:2'):
        save_logits.main([*COMMON, '--teacher', teacher, '--logits', str(path), '--epochs', epochs])
    assert tree(path) == tree(store)


def test_shards_can_be_filled_in_pieces(store, teacher, tmp_path, capsys):
    path = tmp_path / 'logits'
    for shards in ('0:1', '3:9', '1:3'):
        fill = [*COMMON, '--teacher', teacher, '--logits', str(path), '--epochs', '2', '--shards', shards]
        save_logits.main(fill)
    assert tree(path) == tree(store)
    assert 'the store' not in refusal([*fill, '--shards', '4:5'], capsys)


def test_progress_counts_what_is_on_disk_already_and_ends_with_all(store, teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, 'LINE_SECONDS', 0.)
    path = tmp_path / 'logits'
    shutil.copytree(store, path)
    (path / 'epoch-00001' / 'shard-00003.arrow').unlink()
    capsys.readouterr()
    save_logits.main([*COMMON, '--teacher', teacher, '--logits', str(path), '--epochs', '2'])
    said = capsys.readouterr()
    bars = re.findall(r'(\d+) of (\d+)', said.err)
    # The last shard has the rest, four views.
    assert bars[0] == ('196', '200') and bars[-1] == ('200', '200') and 'kB' in said.err
    assert '8 of 8 (up to 32 samples each), 2 of 2 epochs complete' in said.out


def test_verify_finds_every_damage_without_data_or_teacher(store, tmp_path, capsys):
    cli.main(['store', 'verify', str(store)])
    assert '8 shards, every byte as it was written' in capsys.readouterr().out
    path = tmp_path / 'logits'
    shutil.copytree(store, path)
    (path / 'epoch-00001' / 'shard-00003.arrow').unlink()
    damaged = path / 'epoch-00001' / 'shard-00001.arrow'
    flip_bit(damaged)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        cli.main(['store', 'verify', str(path)])
    said = capsys.readouterr()
    problems = said.out.strip().splitlines()
    assert exit.value.code == 2 and '2 problem(s)' in said.err.strip().splitlines()[-1]
    assert len(problems) == 2 and 'lacks 1 of the 4 shards of epoch 1' in problems[0] and str(damaged) in problems[1]
    cli.main(['store', 'verify', str(path), '--epochs', '1'])
    assert '4 shards, every byte' in capsys.readouterr().out
    assert 'the store' in refusal([path, '--epochs', '1:3'], capsys, 'store verify')


def test_a_moved_teacher_is_still_the_same_teacher(store, teacher, tmp_path):
    path = tmp_path / 'logits'
    shutil.copytree(store, path)
    shutil.copytree(teacher, tmp_path / 'elsewhere')
    (path / 'epoch-00000' / 'shard-00000.arrow').unlink()
    save_logits.main([*COMMON, '--teacher', str(tmp_path / 'elsewhere'), '--logits', str(path), '--epochs', '2'])
    assert tree(path) == tree(store)


def test_a_checkpoint_of_a_named_model_is_a_teacher_too(store, teacher, tmp_path):
    path = tmp_path / 'logits'
    save_logits.main([
        *COMMON, '--teacher', 'test_resnet', '--teacher-checkpoint', f'{teacher}/model.safetensors',
        '--teacher-num-classes', '10', '--logits', str(path), '--epochs', '1'])
    manifests = [LogitStore.open(folder).manifest for folder in (path, store)]
    assert manifests[0].teacher['weights'] == manifests[1].teacher['weights']


def test_check_finds_the_stored_targets_again(store, teacher, capsys):
    cli.main(['store', 'check', str(store), *DATA_FLAGS, '--teacher', teacher])
    said = capsys.readouterr().out
    found = re.search(
        r'(\d+) views: (\d+) records .*, ([\d.]+)% of the classes differ, .* by (\S+) on average, (\S+) at most, ',
        said)
    # Alone in its batch a view may be rounded in another way.
    assert int(found[1]) == 200 and int(found[2]) > 190 and float(found[3]) == 0 and float(found[5]) < 5e-3
    assert found.string.strip().endswith('of the codec float16')


@pytest.mark.parametrize('there, kept, said', [
    ('bca', 'bca', ('3 classes have other numbers for the teacher than in the data, as a: 2 and 0;', 'by name')),
    ('dcb', 'dcb', ('2 classes have other numbers for the teacher than in the data, as b: 2 and 1;', 'not compared')),
    ('ab', 'abc', ()), ('xyz', 'xyz', ()), ('abc', 'abc', ()), ('', 'abc', ()), ('a\nb', 'abc', ()),
    ('abcd', '', ('predicts 4 classes, the data have labels of 3', '--val-dataset')),
])
def test_a_store_names_the_classes_of_its_teacher_and_tells_where_data_number_them_otherwise(there, kept, said, capsys):
    model = timm.create_model('test_resnet', num_classes=4 if there == 'abcd' else 3)
    model.pretrained_cfg['label_names'] = list(there[:3])
    features = datasets.Features({'label': datasets.ClassLabel(names=list('abc'))})
    data = datasets.Dataset.from_dict({'label': [0]}, features=features)
    assert stored_names(Teacher(model, 'teacher', torch.device('cpu')), data, None) == list(kept)
    printed = capsys.readouterr().err
    assert all(word in printed for word in said) if said else not printed


def test_describe_prints_completeness_size_and_accuracy(store, capsys):
    cli.main(['store', 'describe', str(store), *DATA_FLAGS])
    said = capsys.readouterr().out
    assert '8 of 8 (up to 32 samples each), 2 of 2 epochs complete' in said
    assert '18 bytes per view' in said and 'the 3 most probable classes, and the mass of the others' in said
    labels = np.array(load_split(DATA, 'train[:100]', True)['label'])
    opened = LogitStore.open(store)
    accuracy = []
    for epoch in range(2):
        first = opened.codec.decode(torch.from_numpy(opened.read(epoch, np.arange(100)))).ids[:, 0]
        accuracy.append(100 * (first.numpy() == labels).mean())
    assert f'{np.mean(accuracy):.2f}% top-1' in said


def test_bad_input_gets_one_clear_sentence(store, teacher, tmp_path, capsys):
    fill = [*COMMON, '--teacher', teacher, '--epochs', '1', '--logits']
    cases = [
        (['--teacher', teacher, '--epochs', '1', '--logits', store], 'one of the arguments --dataset --data-dir is'),
        ([*COMMON, '--logits', store, '--epochs', '1'],
         'arguments are required: --teacher/--kd-model-name; see timm-tinyvit fill'),
        ([*COMMON, '--teacher', teacher], 'arguments are required: --logits, --epochs'),
        ([*fill, store, '--data-dir', DATA], '--data-dir: not allowed with argument --dataset'),
        ([*fill, store, '--epochs', '5:2'], "'5:2' is no range"),
        ([*fill, tmp_path / 'new', '--topk', '11'], 'k = 11 does not fit 10 classes'),
        ([*fill, tmp_path / 'new', '--codec', 'zip'], "there is no codec 'zip'"),
        ([*fill, tmp_path / 'new', '--teacher', tmp_path], 'cannot be loaded'),
        ([*fill, tmp_path / 'new', '--aa', 'rand-q1-m9'], 'timm cannot make the transform'),
        ([*fill, tmp_path / 'new', '--aa', 'rand-m9-foo'], "has a part 'foo' without a number"),
        ([*fill, tmp_path / 'new', '--remode', 'none'], '--remode none; expected const, rand or pixel'),
        ([*fill, store, '--store-seed', '1'], 'seed: 0, not 1'),
        ([*fill, store, '--train-split', 'train[:99]'], 'num_samples: 100, not 99'),
        ([*fill, store, '--hflip', '0'], '--hflip 0.0 instead of 0.5'),
        ([*fill, tmp_path / 'new', '-j', '-1'], '--workers is -1'),
        ([*fill, tmp_path / 'new', '--shards', '4:9'], 'only shards 0:4'),
        ([*fill, store, '--samples', '0:5'], 'unknown argument --samples'),
        ([*fill, teacher], 'is not a logit store; name a new folder'),
    ]
    for argv, expected in cases:
        assert expected in refusal(argv, capsys)
    assert not (tmp_path / 'new').exists()
    assert 'there is no logit store at' in refusal([tmp_path], capsys, 'store describe')


def test_a_teacher_that_says_nan_is_refused(teacher, tmp_path, capsys):
    model = timm.create_model(f'local-dir:{teacher}', pretrained=True)
    torch.nn.init.constant_(model.get_classifier().bias, float('nan'))
    export_model(tmp_path / 'broken', model)
    said = refusal([*COMMON, '--teacher', tmp_path / 'broken', '--logits', tmp_path / 'new', '--epochs', '1'], capsys)
    assert 'epoch 0, shard 0: 32 of 32 rows of teacher logits hold NaN or infinity' in said


def test_check_refuses_another_teacher(store, tmp_path, capsys):
    torch.manual_seed(1)
    export_model(tmp_path / 'other', timm.create_model('test_resnet', num_classes=10))
    said = refusal([store, *DATA_FLAGS, '--teacher', tmp_path / 'other'], capsys, 'store check')
    assert 'is not the teacher of the store' in said


def test_a_recipe_of_the_trainer_says_how_to_fill_and_its_other_keys_are_passed_over(teacher, tmp_path, capsys):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('epochs: 2\nlr: 0.001\nmodel: tiny_vit_5m_224\ntopk: 3\nlog: [tensorboard]\n')
    fill = [*DATA_FLAGS, '--teacher', teacher, '--logits', str(tmp_path / 'logits'), '-j', '0', '--img-size', '32']
    cli.main(['fill', *fill, '--config', str(recipe)])
    assert LogitStore.open(tmp_path / 'logits').manifest.k == 3
    cli.main(['store', 'describe', str(tmp_path / 'logits')])
    # A store of some kilobytes is not one of 0.0 MB.
    assert re.search(r'size +[1-9][0-9.]* kB on disk', capsys.readouterr().out)
    recipe.write_text('lr: 0.001\nlearning: 2\n')
    assert "unknown key 'learning'" in refusal([*fill, '--config', recipe], capsys)


def test_a_file_in_the_place_of_an_epoch_is_called_one(store, tmp_path, capsys):
    copy = shutil.copytree(store, tmp_path / 'copy')
    shutil.rmtree(copy / 'epoch-00001')
    (copy / 'epoch-00001').write_text('not a folder')
    said = refusal([copy], capsys, 'store describe')
    assert 'epoch-00001 is a file where the folder of epoch 1 should be' in said
