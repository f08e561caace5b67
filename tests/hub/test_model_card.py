"""Cards: every figure is that of the run or of the paper, and the Hub's own classes read them."""

import argparse
import csv
import json
import math
import re
import runpy
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from datasets import load_dataset
from huggingface_hub import ModelCard
from support.flags import DATA, ROOT, SMALL_VIT, small_data
from support.golden_weights import official_state_dict

from timm_tinyvit import cli, save_logits
from timm_tinyvit.base.machine import source_commit
from timm_tinyvit.hub import convert
from timm_tinyvit.hub.model_card import PACKAGE, model_facts, read_weights, recipe_yaml, run_card
from timm_tinyvit.hub.official import OFFICIAL_CHECKPOINTS
from timm_tinyvit.models import clip_teacher, tiny_vit
from timm_tinyvit.models.saving import export_model
from timm_tinyvit.store.ensemble import Ensemble
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.train import record as provenance
from timm_tinyvit.train.checkpoint import FREE_FLAGS
from timm_tinyvit.train.record import read_run
import train_distill

RECIPES = ROOT / 'timm_tinyvit' / 'config' / 'recipes'


@pytest.fixture(scope='module')
def run(tmp_path_factory, teacher):
    """A run of a small student, distilled, with averaged weights."""
    output = tmp_path_factory.mktemp('run')
    train_distill.main([
        *small_data(48, 40), *SMALL_VIT, '--epochs', '3', '-b', '16', '--lr', '1e-3', '--warmup-epochs', '0',
        '--model-ema', '--model-ema-decay', '0.5', '--alpha', '0.75', '--teacher', teacher, '--logits',
        str(output / 'logits'), '--topk', '3', '--shard-size', '48', '--quiet', '--output', str(output),
        '--experiment', 'run'])
    return output / 'run'


def copy_of(run, tmp_path):
    return shutil.copytree(run, tmp_path / 'copy', ignore=shutil.ignore_patterns('*.pt'))


def write_recipe(run, tmp_path):
    (tmp_path / 'recipe.yaml').write_text(recipe_yaml(read_run(run)))
    return str(tmp_path / 'recipe.yaml')


def section(card, title):
    return card.text.partition(f'\n## {title}\n')[2].partition('\n## ')[0]


def test_the_results_of_a_card_are_those_of_the_run(run):
    rows = list(csv.DictReader(open(run / 'metrics.csv')))
    for which, ending in (('best', ''), ('best_ema', '_ema'), ('last', '')):
        row = rows[-1] if which == 'last' else max(rows, key=lambda row: float(row[f'eval_top1{ending}']))
        card = ModelCard(str(run_card(run, which, 'org/student')))
        top1, top5 = card.data.eval_results
        assert card.data.model_name == 'student'
        assert (top1.task_type, top1.dataset_name, top1.dataset_split) == (
            'image-classification', 'fashion_mnist', 'test[:40]')
        assert top1.dataset_type == 'local-folder'
        assert (top1.metric_type, top1.metric_name) == ('accuracy', 'Top-1 accuracy')
        assert 100 * top1.metric_value == pytest.approx(float(row[f'eval_top1{ending}']), abs=1e-3)
        assert 100 * top5.metric_value == pytest.approx(float(row[f'eval_top5{ending}']), abs=1e-3)
        published = next(line for line in section(card, 'Accuracy').splitlines() if 'published here' in line)
        share = float(row[f'eval_top1{ending}']) / 100
        error = 100 * math.sqrt(share * (1 - share) / 40)
        assert f'`{which}`' in published and f'{100 * share:.2f}% ± {error:.2f}' in published
        assert f'| {int(row["epoch"]) + 1} |' in published


def test_the_metadata_say_library_task_and_method(run):
    data = ModelCard(str(run_card(run, 'best', 'org/student', 'apache-2.0'))).data
    assert (data.library_name, data.pipeline_tag, data.license) == ('timm', 'image-classification', 'apache-2.0')
    assert {'image-classification', 'timm', 'knowledge-distillation'} <= set(data.tags)
    assert data.datasets is None and data.base_model is None  # a local folder, and from scratch


def test_the_card_says_what_the_run_was(run):
    card = run_card(run, 'best', 'org/student')
    training = section(card, 'Training')
    model = timm.create_model('test_vit', num_classes=10, img_size=32)
    assert f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters' in card.text
    assert '48 images of the split `train[:48]`' in training and 'in updates of\n16 images' in training
    assert '144 augmented views' in training and 'Its 3 most probable classes' in training
    assert read_run(run)['stores'][0]['identity'] in training
    recipe = yaml.safe_load(training.partition('```yaml\n')[2].partition('```')[0])
    assert recipe['model'] == 'test_vit' and recipe['alpha'] == 0.75 and recipe['model_kwargs'] == ['img_size=32']
    assert '![Losses and accuracy by epoch](metrics.png)' in training
    teacher = Path(json.loads((run / 'run.json').read_text())['flags']['teacher']).name
    assert f' of a teacher called `test_resnet ({teacher})`, stored in\n`logits`, and from their labels' in card.text
    assert 'and, with weight 0.25, from the labels.' in training
    assert 'Not published: `logits`.\n' in training and 'Folders stand for data' in training
    assert 'The run was stopped' not in card.text
    assert 'the kind of the 48 images of `fashion_mnist`' in section(card, 'Limits')
    assert 'the median of 3 epochs;' in section(card, 'Speed')
    assert 'with `./fashion_mnist` the folder of that name' in section(card, 'Accuracy')
    assert 'T-shirt/top, Trouser' in card.text
    assert 'hf-hub:org/student' in section(card, 'Use')


def test_the_recipe_of_a_card_gives_the_settings_of_the_run(run, tmp_path):
    recipe = write_recipe(run, tmp_path)
    again = vars(train_distill.settings(['--config', recipe, '--dataset', DATA, '--logits', 'x']))
    for name, value in json.loads((run / 'run.json').read_text())['flags'].items():
        if name not in FREE_FLAGS:
            assert again[name] == value, name


def test_the_training_command_of_a_card_asks_for_the_same_run(run, tmp_path):
    training = section(run_card(run, 'best', 'org/student'), 'Training')
    command = training.split('```\ntimm-tinyvit train ')[1].split('```')[0]
    argv = shlex.split(command.replace('\\\n', ''))
    assert argv[-2:] == ['--logits', 'logits'] and argv[argv.index('--dataset') + 1] == './fashion_mnist'
    argv[argv.index('recipe.yaml')] = write_recipe(run, tmp_path)
    again, before = vars(train_distill.settings(argv)), json.loads((run / 'run.json').read_text())['flags']
    assert again['val_split'] == before['val_split'] == 'test[:40]' and again['train_split'] == before['train_split']
    # Weights that the run started from, and are not published.
    copy = copy_of(run, tmp_path)
    record = read_run(copy)
    record['base'] = {'name': 'first/last', 'on_hub': False, 'is_local': True}
    (copy / 'run.json').write_text(json.dumps(record))
    training = section(run_card(copy, 'best', 'org/student'), 'Training')
    assert '--initial-checkpoint first/last\n' in training
    assert 'Not published: `logits` and the weights `first/last`.' in training
    record['recipe']['model'] = 'local-dir:first/last'
    (copy / 'run.json').write_text(json.dumps(record))
    assert '--initial-checkpoint' not in section(run_card(copy, 'best', 'org/student'), 'Training')
    # Weights that timm has from elsewhere than the Hub; `pretrained` is in the recipe.
    record['recipe']['model'] = 'legacy_seresnet18'
    record['base'] = {'name': 'legacy_seresnet18.in1k', 'on_hub': False, 'is_local': False}
    (copy / 'run.json').write_text(json.dumps(record))
    card = run_card(copy, 'best', 'org/student')
    assert '--initial-checkpoint' not in card.text and 'Not published: `logits`.\n' in card.text
    assert 'starting from the weights `legacy_seresnet18.in1k`' in card.text


def filling_commands(card):
    block = section(card, 'Training').partition('fills the store:\n\n```\n')[2] or section(
        card, 'Training').partition('each teacher fills its store:\n\n```\n')[2]
    commands = block.partition('\n```')[0].replace('\\\n', '').splitlines()
    return [shlex.split(command.partition('timm-tinyvit fill ')[2]) for command in commands]


@pytest.mark.parametrize('flags', [
    [],
    ['--topk', '4', '--shard-size', '20', '--store-seed', '3', '--teacher-batch-size', '12',
     '--epochs', '3', '--teacher-amp-dtype', 'bfloat16', '--mixup', '0.8',
     '--cutmix', '1', '--aa', 'rand-m9-mstd0.5-inc1', '--scale', '0.5', '1', '--decoder', 'torch', '--img-size', '40'],
    ['--codec', 'float16', '--no-aug', '--target-key', 'label', '--input-key', 'image', '--key', 'name'],
], ids=['of the run', 'much', 'other'])
def test_the_filling_command_of_a_card_makes_the_same_store(run, teacher, tmp_path, flags):
    copy, data = copy_of(run, tmp_path), DATA
    record = read_run(copy)
    if flags:
        if '--key' in flags:
            rows = load_dataset(DATA, split='train[:48]')
            data = str(tmp_path / 'named')
            (tmp_path / 'named').mkdir()
            rows.add_column('name', [f'image {row}' for row in range(len(rows))]).to_parquet(f'{data}/train.parquet')
        save_logits.main(['--dataset', data, '--train-split', 'train[:48]', '--logits', str(tmp_path / 'first'),
                          '--teacher', teacher, '-j', '0', *([] if '--epochs' in flags else ['--epochs', '2']), *flags])
        record['stores'] = [provenance._describe_store(
            str(tmp_path / 'first'), LogitStore.open(tmp_path / 'first'), None)]
        if '--key' in flags:
            record['recipe'].update(input_key='image', target_key='label')
    record['train']['split'] = 'train[:48]'
    (copy / 'run.json').write_text(json.dumps(record))
    (argv,) = filling_commands(run_card(copy, 'best', 'org/student'))
    assert argv[:4] == ['--dataset', './fashion_mnist', '--train-split', 'train[:48]']
    name = argv[argv.index('--logits') + 1]
    for word, path in (('./fashion_mnist', data), (name, str(tmp_path / 'again')), ('TEACHER', teacher)):
        argv[argv.index(word)] = path
    save_logits.main([*argv, '-j', '0'])
    again = LogitStore.open(tmp_path / 'again')
    before = LogitStore.open(tmp_path / 'first' if flags else run.parent / 'logits')
    assert name == before.path.name and again.manifest.identity == before.manifest.identity
    assert again.manifest.stored_epochs == before.manifest.stored_epochs
    assert again.manifest.recipe == before.manifest.recipe and again.manifest.teacher == before.manifest.teacher


def test_a_teacher_that_anybody_can_have_is_named_and_each_store_has_its_own(run, tmp_path):
    copy = copy_of(run, tmp_path)
    record = read_run(copy)
    record['stores'][0]['teacher_repo'], record['stores'][0]['teacher']['name'] = 'timm/a.in1k', 'a.in1k'
    (copy / 'run.json').write_text(json.dumps(record))
    card = run_card(copy, 'best', 'org/student')
    (argv,) = filling_commands(card)
    assert argv[argv.index('--teacher') + 1] == 'a.in1k'
    assert 'from the predictions of [a.in1k](https://huggingface.co/timm/a.in1k), stored in\n`logits`' in card.text
    record['stores'].append({**record['stores'][0], 'name': 'logits-2'})
    record['recipe'].pop('alpha')
    (copy / 'run.json').write_text(json.dumps(record))
    card = run_card(copy, 'best', 'org/student')
    assert '--logits logits logits-2\n' in card.text and len(filling_commands(card)) == 2
    assert 'labels' not in section(card, 'Training') and 'from their labels' not in card.text
    # No command makes a part of a larger store.
    record['stores'][1]['flags'] = None
    (copy / 'run.json').write_text(json.dumps(record))
    card = run_card(copy, 'best', 'org/student')
    assert len(filling_commands(card)) == 1 and 'Not published: `logits` and `logits-2`.' in card.text


def test_no_command_is_told_of_a_store_that_none_makes(filled_store):
    store = LogitStore.open(filled_store)
    assert provenance._store_flags(store.manifest)
    for change in (dict(first_epoch=1), dict(first_sample=10), dict(teacher={'name': 'x'})):
        assert provenance._store_flags(replace(store.manifest, **change)) is None


def test_stores_in_folders_of_one_name_are_told_apart(run, filled_store, tmp_path, monkeypatch):
    places = [shutil.copytree(filled_store, tmp_path / part / 'logits', ignore=shutil.ignore_patterns('.published'))
              for part in ('a', 'b')]
    args = train_distill.settings(['--config', str(run / 'run.json'), '--logits', *map(str, places), '--teacher', ''])
    state = SimpleNamespace(
        folder=tmp_path, settings={'model': 'test_vit'}, epoch=0,
        store=Ensemble([LogitStore.open(place) for place in places]),
        task=SimpleNamespace(student=timm.create_model('test_vit')),
        accelerator=SimpleNamespace(num_processes=1, device=torch.device('cpu')))
    provenance.record_run(
        args, state, SimpleNamespace(num_samples=120, images_per_update=16), load_dataset(DATA, split='test[:4]'),
        SimpleNamespace(to_imagenet1k=False))
    assert [store['name'] for store in read_run(tmp_path)['stores']] == ['logits', 'logits-2']


def test_the_same_run_has_the_same_card_and_no_path_of_the_machine_is_in_it(run, tmp_path, monkeypatch):
    card = str(run_card(run, 'best', 'org/student'))
    copy = copy_of(run, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert str(run_card(copy, 'best', 'org/student')) == card
    record = read_run(run)
    del record['flags']
    for text in (card, json.dumps(record)):
        assert str(run.parent) not in text and str(ROOT) not in text


def test_a_card_links_what_is_on_the_hub(run, tmp_path):
    copy = copy_of(run, tmp_path)
    record = read_run(copy)
    record['train'].update(name='ILSVRC/imagenet-1k', on_hub=True)
    record['base'] = {'name': 'timm/test_vit.r160_in1k', 'on_hub': True, 'is_local': False}
    record['stores'][0].update(name='hf://datasets/org/store@0123abcd', on_hub=True, teacher_repo='timm/teacher.in1k')
    record['stores'][0]['teacher']['name'] = 'teacher.in1k'
    launch = record['launches'][0]
    record['launches'] = [launch | {'commit': commit} for commit in ('4f2c', '77aa-dirty')]
    (copy / 'run.json').write_text(json.dumps(record))
    card = run_card(copy, 'best', 'org/student')
    assert card.data.datasets == ['ILSVRC/imagenet-1k', 'org/store']
    assert card.data.base_model == 'timm/test_vit.r160_in1k'
    for link in ('[ILSVRC/imagenet-1k](https://huggingface.co/datasets/ILSVRC/imagenet-1k)',
                 '[timm/test_vit.r160_in1k](https://huggingface.co/timm/test_vit.r160_in1k)',
                 '[org/store](https://huggingface.co/datasets/org/store/tree/0123abcd)',
                 '[teacher.in1k](https://huggingface.co/timm/teacher.in1k)', 'commit `4f2c` and `77aa-dirty`'):
        assert link in card.text
    assert '--logits hf://datasets/org/store@0123abcd\n' in card.text and 'Not published' not in card.text
    assert 'stored in\n[org/store](https://huggingface.co/datasets/org/store/tree/0123abcd)' in card.text
    assert 'on the 1,000 of ImageNet-1k' not in section(card, 'Accuracy')
    record['val'].update(name='ILSVRC/imagenet-1k', on_hub=True, imagenet1k_of_22k=True)
    (copy / 'run.json').write_text(json.dumps(record))
    rows = (copy / 'metrics.csv').read_text().splitlines()
    (copy / 'metrics.csv').write_text('\n'.join(rows[:2]) + '\n')
    card = run_card(copy, 'best', 'org/student')
    assert 'is evaluated on the 1,000 of ImageNet-1k' in section(card, 'Accuracy')
    assert card.data.eval_results[0].dataset_type == 'ILSVRC/imagenet-1k'
    assert '--dataset ILSVRC/imagenet-1k' in section(card, 'Accuracy') and 'not on the Hub' not in card.text
    assert 'the median of 1 epoch;' in section(card, 'Speed')
    assert 'The run was stopped after 1 of 3 epochs.' in card.text


def test_what_the_owners_wrote_about_the_licence_is_kept(run):
    before = str(run_card(run, 'best', 'org/student', 'cc-by-4.0'))
    assert run_card(run, 'best', 'org/student', before=before).data.license == 'cc-by-4.0'
    assert run_card(run, 'best', 'org/student', 'mit', before=before).data.license == 'mit'
    assert run_card(run, 'best', 'org/student', before='---\nlicense: [}\n---\n').data.license is None
    assert 'named no licence' in section(run_card(run, 'best', 'org/student'), 'Licence')
    assert '\nsome *words*\n' in run_card(run, 'best', 'org/student', notes='some *words*\n').text


def test_the_terms_of_a_gated_repo_are_kept(run):
    before = '---\nextra_gated_prompt: Be good.\nextra_gated_fields:\n  Name: text\nother: 1\n---\n'
    card = run_card(run, 'best', 'org/student', 'mit', before=before)
    assert card.data.get('extra_gated_prompt') == 'Be good.' and card.data.get('extra_gated_fields') == {'Name': 'text'}
    assert card.data.get('other') is None
    assert str(run_card(run, 'best', 'org/student', before=str(card))) == str(card)


def test_a_local_store_that_was_published_is_linked(filled_store, tmp_path):
    path = shutil.copytree(filled_store, tmp_path / 'logits', ignore=shutil.ignore_patterns('.published'))
    store = LogitStore.open(path)

    def described():
        found = provenance._describe_store(str(path), store, None)
        return found['name'], found['on_hub']

    assert described() == ('logits', False)
    provenance.mark_published(store, 'hf://datasets/org/logits', range(4))
    assert described() == ('hf://datasets/org/logits', True)
    # A store that was filled before its teacher was called by the folder's name alone.
    teacher = {**store.manifest.teacher, 'name': 'local-dir:/secret/teacher'}
    old = SimpleNamespace(path=path, manifest=replace(store.manifest, teacher=teacher))
    assert provenance._describe_store(str(path), old, None)['teacher']['name'] == 'teacher'
    # Another store in the same folder, and one that has grown since.
    provenance.mark_published(store, 'hf://datasets/org/logits', range(3))
    assert described() == ('logits', False)
    mark = {'url': 'hf://datasets/org/logits', 'identity': '0' * 32, 'epochs': [0, 4]}
    for text in (json.dumps(mark), 'hf://datasets/org/logits', '[]', '{"epochs": 3}', ''):
        (path / '.published').write_text(text)
        assert described() == ('logits', False)


def test_weights_are_named_without_the_path_to_them(run, tmp_path, monkeypatch):
    model = timm.create_model('test_vit')
    model.pretrained_cfg = {}

    def base(**given):
        args = argparse.Namespace(**dict(model='test_vit', initial_checkpoint=None, pretrained=False) | given)
        return provenance._base(args, model)

    home = tmp_path / 'alice'
    for folder in ('last', 'weights'):
        (home / folder).mkdir(parents=True)
    (home / 'file.pth').touch()
    monkeypatch.setenv('HOME', str(home))
    assert base() is None
    for path, name in ((home / 'last', 'last'), (home / 'weights', 'weights'), (home / 'file.pth', 'file.pth'),
                       ('~/weights', 'weights'), (run / 'last', 'run/last')):
        expected = {'name': name, 'on_hub': False, 'is_local': True}
        assert base(initial_checkpoint=str(path)) == expected
        assert base(model=f'local-dir:{path}', pretrained=True) == expected
    assert base(model='test_vit', pretrained=True) == {'name': 'test_vit', 'on_hub': False, 'is_local': False}


def test_a_run_that_was_started_again_knows_all_its_commits(run, tmp_path, monkeypatch):
    """The finished run, started again, ends at once and writes the record anew."""
    copy = copy_of(run, tmp_path)
    shutil.copy(sorted(run.glob('*.pt'))[-1], copy)
    shutil.copytree(run.parent / 'logits', tmp_path / 'logits')
    args = json.loads((run / 'run.json').read_text())['flags']
    (copy / 'run.json').unlink()
    for commit, expected in (('aaaa', ['aaaa']), ('bbbb', ['aaaa', 'bbbb']), ('bbbb', ['aaaa', 'bbbb'])):
        monkeypatch.setattr('timm_tinyvit.train.record.source_commit', lambda commit=commit: commit)
        train_distill.main([
            '--config', write_recipe(run, tmp_path), '--dataset', args['dataset'], '--val-split', 'test[:40]',
            '--logits', str(tmp_path / 'logits'), '--output', str(tmp_path), '--experiment', 'copy', '-j', '0',
            '--quiet'])
        assert read_run(copy)['commits'] == expected


@pytest.mark.skipif(shutil.which('git') is None, reason='needs git')
def test_the_commit_is_that_of_the_checkout_and_marked_where_files_are_changed(tmp_path):
    package = tmp_path / 'package'
    package.mkdir()
    (package / 'module.py').write_text('one\n')
    assert source_commit(package) is None
    git = ['git', '-C', str(tmp_path), '-c', 'user.name=n', '-c', 'user.email=e@x']
    for command in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'one']):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, 'rev-parse', 'HEAD'], check=True, capture_output=True, text=True).stdout.strip()
    assert source_commit(package) == commit
    (package / 'module.py').write_text('two\n')
    assert source_commit(package) == f'{commit}-dirty'


def test_the_commit_of_a_package_that_pip_got_from_git_is_the_one_that_pip_noted(tmp_path):
    package, note = tmp_path / 'timm_tinyvit', tmp_path / 'timm_tinyvit-0.1.dist-info' / 'direct_url.json'
    note.parent.mkdir()
    (note.parent / 'METADATA').write_text('Metadata-Version: 2.1\nName: timm_tinyvit\nVersion: 0.1\n')
    assert source_commit(package) is None
    for text, commit in (
        ('{"url": "https://x", "vcs_info": {"vcs": "git", "commit_id": "4f2c"}}', '4f2c'),
        ('{"url": "file:///x", "dir_info": {}}', None), ('half', None), ('[]', None),
    ):
        note.write_text(text)
        assert source_commit(package) == commit


@pytest.mark.parametrize('name, damage, words', [
    ('run.json', lambda file: file.unlink(), 'has no run.json'),
    ('run.json', lambda file: file.write_text('{'), 'is not readable as the record of a run'),
    ('metrics.csv', lambda file: file.unlink(), 'has no metrics.csv'),
    ('metrics.csv', lambda file: file.write_text('epoch,loss\nx,1\n'), 'is not readable as the metrics'),
    ('best/config.json', lambda file: file.write_text('{}'), 'is not that of a timm model: it lacks architecture'),
], ids=['no record', 'damaged record', 'no metrics', 'damaged metrics', 'no config'])
def test_what_is_missing_in_a_run_is_one_sentence(run, tmp_path, refused, name, damage, words):
    copy = copy_of(run, tmp_path)
    damage(copy / name)
    with refused(words):
        run_card(copy, 'best', 'org/student')


def test_weights_are_ranked_by_accuracy_and_the_smaller_loss_is_the_best_of_equals(run, tmp_path):
    copy = copy_of(run, tmp_path)
    (copy / 'metrics.csv').write_text(
        'epoch,images_per_second,data_wait,eval_top1,eval_top5,eval_loss,eval_top1_ema,eval_top5_ema,eval_loss_ema\n'
        '0,1,0,50,90,1,60,90,1\n1,1,0,70,90,1,70,90,1\n2,1,0,70,90,.9,70,90,1\n3,1,0,,,,,,\n')
    ranked = [(weights.name, weights.epoch, weights.top1) for weights in read_weights(copy)]
    assert ranked[:2] == [('best', 3, 70.), ('best_ema', 2, 70.)]
    assert set(ranked[2:]) == {('last', 4, None), ('last_ema', 4, None)}
    card = run_card(copy, 'last', 'org/student')
    assert card.data.eval_results is None and 'These weights were not evaluated.' in card.text


@pytest.mark.parametrize('settings, words', [
    (dict(input_size=(3, 224, 224), crop_pct=0.875),
     'the shorter side resized to 256 with bilinear interpolation, then the middle 224x224'),
    (dict(input_size=(3, 384, 384), crop_pct=1., crop_mode='squash'), 'the whole image squashed to 384x384'),
    (dict(input_size=(3, 96, 96), crop_pct=0.75, crop_mode='squash', interpolation='bilinear'),
     'squashed to 128x128 with bilinear interpolation, then the middle 96x96'),
    (dict(input_size=(3, 96, 96), crop_pct=1., crop_mode='border'), 'the longer side resized to 96'),
])
def test_the_crop_in_words(tmp_path, settings, words):
    export_model(tmp_path, timm.create_model('test_resnet', num_classes=3), data_config=settings)
    assert words in model_facts(tmp_path).crop


def test_the_cards_in_hub_are_those_that_the_script_renders(tmp_path, monkeypatch):
    monkeypatch.setattr('sys.argv', ['render.py', '--output', str(tmp_path)])
    runpy.run_path(str(ROOT / 'hub' / 'render.py'), run_name='__main__')
    rendered = {file.relative_to(tmp_path) for file in tmp_path.rglob('*') if file.is_file()}
    assert rendered == {file.relative_to(ROOT / 'hub') for pattern in ('cards/*.md', 'demo/README.md', 'demo/*.yaml')
                        for file in (ROOT / 'hub').glob(pattern)}
    for name in rendered:
        assert (tmp_path / name).read_text() == (ROOT / 'hub' / name).read_text(), f'{name}: python hub/render.py'


def test_every_card_links_this_package_and_says_how_to_install_it():
    cards = [*(ROOT / 'hub').glob('cards/*.md'), ROOT / 'hub' / 'demo' / 'README.md']
    for card in cards:
        assert f'[timm_tinyvit]({PACKAGE})\n(`pip install timm_tinyvit`, ' in card.read_text(), card


def test_the_demo_has_a_small_picture():
    assert 5_000 < (ROOT / 'hub' / 'demo' / 'metrics.png').stat().st_size < 100_000


def card_of(tag):
    return ModelCard.load(ROOT / 'hub' / 'cards' / f'{tag}.md')


def test_every_official_checkpoint_has_a_card():
    tags = {f'{name}.{tag}' for name, config in {**tiny_vit.default_cfgs, **clip_teacher.default_cfgs}.items()
            for tag in config.tags}
    assert len(tags) == 11 + 1
    assert {checkpoint.tag for checkpoint in OFFICIAL_CHECKPOINTS} == tags
    assert {file.stem for file in (ROOT / 'hub' / 'cards').glob('*.md')} == tags


@pytest.mark.parametrize('checkpoint', OFFICIAL_CHECKPOINTS, ids=lambda checkpoint: checkpoint.tag)
def test_a_card_has_the_published_accuracy_and_its_source(checkpoint):
    card = card_of(checkpoint.tag)
    assert card.data.license == 'mit' and card.data.library_name == 'timm'
    if checkpoint.top1 is None:
        assert card.data.eval_results is None and 'None is published' in card.text
    else:
        top1, top5 = card.data.eval_results
        assert 100 * top1.metric_value == pytest.approx(checkpoint.top1)
        assert 100 * top5.metric_value == pytest.approx(checkpoint.top5)
        assert (top1.dataset_type, top1.dataset_split) == ('ILSVRC/imagenet-1k', 'validation')
        assert 'microsoft/Cream' in top1.source_url and 'not measured again' in card.text
    # The heads of the recipes name the published results too, and their flags what the steps say.
    for recipe, words in checkpoint.steps:
        text = (RECIPES / f'{recipe}.yaml').read_text()
        assert f'{yaml.safe_load(text)["epochs"]} epochs' in words
        assert f'`{recipe}`: {words}' in card.text
    assert set(card.data.datasets) <= {'ILSVRC/imagenet-1k', 'timm/imagenet-22k-wds'}
    size = re.fullmatch(r'tiny_vit_(\d+m)_224', checkpoint.name)
    if size:
        # What the table of docs/results.md says of this size.
        row = re.search(rf'^\| TinyViT-{size[1].upper()} \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \|',
                        (ROOT / 'docs' / 'results.md').read_text(), re.M)
        assert f'{row[2]} images per second with timm_tinyvit, {row[1]} with' in section(card, 'Speed')
    else:
        assert 'with timm_tinyvit, ' not in section(card, 'Speed')
    published = {'tiny_vit_5m_224': '3,060', 'tiny_vit_11m_224': '2,468', 'tiny_vit_21m_224': '1,571',
                 'tiny_vit_21m_384': '394', 'tiny_vit_21m_512': '167'}.get(checkpoint.name)
    assert (f'Published: {published} images per second' in section(card, 'Speed')) == (published is not None)
    if checkpoint.steps and checkpoint.top1:
        assert f'Published: {checkpoint.top1}% top-1' in text
    crop = {'224': 'shorter side resized to 256', '384': 'squashed to 384x384', '512': 'squashed to 512x512'}
    assert crop[re.search(r'\d{3}', checkpoint.name)[0]] in card.text


def test_a_converted_checkpoint_has_its_card_beside_it(tmp_path):
    torch.save({'model': official_state_dict('tiny_vit_5m_224')}, tmp_path / 'tiny_vit_5m_1k.pth')
    convert.convert_checkpoint(tmp_path / 'tiny_vit_5m_1k.pth', 'tiny_vit_5m_224', tmp_path / 'official')
    assert (tmp_path / 'official' / 'README.md').read_text() == str(card_of('tiny_vit_5m_224.in1k'))
    config = timm.create_model(f'local-dir:{tmp_path / "official"}', device='meta').pretrained_cfg
    assert config['label_descriptions'][config['label_names'][0]] == 'tench, Tinca tinca'

    (tmp_path / 'tiny_vit_5m_1k.pth').rename(tmp_path / 'mine.pth')
    convert.convert_checkpoint(tmp_path / 'mine.pth', 'tiny_vit_5m_224', tmp_path / 'other')
    card = ModelCard.load(tmp_path / 'other' / 'README.md')
    assert card.data.eval_results is None and card.data.license is None
    assert 'none of the official ones' in card.text and '79.1' not in card.text


def test_the_command_of_a_card_measures_its_accuracy(run, capsys):
    """With the folder in place of the repo; the tests of publishing pull it."""
    card = run_card(run, 'best', 'org/student')
    argv = shlex.split(section(card, 'Accuracy').split('```')[1].replace('\\\n', ''))[1:]
    argv[argv.index('hf-hub:org/student')] = f'local-dir:{run / "best"}'
    argv[argv.index('./fashion_mnist')] = DATA
    capsys.readouterr()
    cli.main([*argv, '-j', '0'])
    said = capsys.readouterr().out
    assert f'top1 {100 * card.data.eval_results[0].metric_value:.3f}' in said
