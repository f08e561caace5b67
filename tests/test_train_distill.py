"""The training script on real images: what it leaves behind, that it resumes exactly, and what bad input gets."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

import train_distill
from timm_tinyvit.dataset import load_split
from timm_tinyvit.hub import export_model
from timm_tinyvit.store import LogitStore

ROOT = Path(__file__).resolve().parents[1]
DATA = str(ROOT / 'examples' / 'fashion_mnist')
VIEWS = ['--img-size', '32', '--scale', '0.6', '1', '--color-jitter', '0', '--reprob', '0.25']
SPLITS = ['--train-split', 'train[:96]', '--val-split', 'test[:64]']
SMALL = [
    '--dataset', DATA, *VIEWS, *SPLITS, '--model', 'tiny_vit_5m_224', '--epochs', '2', '-b', '16', '--lr', '1e-3',
    '--warmup-epochs', '1', '--drop-path', '0.2', '-j', '0', '--quiet', '--crop-pct', '1']


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """As many threads as the launched processes have: rounding depends on how a sum is split."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory) -> str:
    """A small timm model with the weights of one seed, as a folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('teacher')
    export_model(folder, timm.create_model('test_resnet', num_classes=10), data_config={'input_size': (3, 32, 32)})
    return str(folder)


@pytest.fixture(scope='module')
def distilled(tmp_path_factory, teacher):
    """A finished run that filled its own store: (folder of the run, folder of the store)."""
    output = tmp_path_factory.mktemp('distilled')
    store = output / 'logits'
    train_distill.main([
        *SMALL, '--teacher', teacher, '--logits', str(store), '--topk', '3', '--shard-size', '40',
        '--output', str(output), '--experiment', 'run', '--recovery-interval', '2'])
    return output / 'run', store


def message_of(argv, capsys) -> str:
    """What the script says as it refuses these arguments: one line, and no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        train_distill.main([str(argument) for argument in argv])
    assert exit.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith('error: ')]
    assert len(errors) == 1 and lines[-1] == errors[0]
    return errors[0]


def test_a_run_leaves_its_arguments_metrics_plot_and_models(distilled):
    run, _ = distilled
    assert yaml.safe_load((run / 'args.yaml').read_text())['lr'] == 1e-3
    rows = list(csv.DictReader(open(run / 'metrics.csv')))
    assert [row['epoch'] for row in rows] == ['0', '1']
    assert all(float(row['distill_loss']) > 0 and float(row['images_per_second']) > 0 for row in rows)
    assert all(0 <= float(row['eval_top1']) <= 100 for row in rows)
    assert (run / 'metrics.png').read_bytes().startswith(b'\x89PNG')
    for name in ('last', 'best'):
        assert {file.name for file in (run / name).iterdir()} == {'model.safetensors', 'config.json'}


def test_plain_timm_loads_what_a_run_exports_with_the_same_logits(distilled, tmp_path):
    run, _ = distilled
    code = f"""
import sys
sys.modules['timm_tinyvit'] = None  # importing it would raise
import timm, torch
model = timm.create_model('local-dir:{run}/last', pretrained=True).eval()
assert type(model).__module__ == 'timm.models.tiny_vit'
torch.save(model(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)), r'{tmp_path}/logits.pt')
"""
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tmp_path)
    model = timm.create_model(f'local-dir:{run}/last', pretrained=True).eval()
    assert type(model).__module__ == 'timm_tinyvit.tiny_vit'
    with torch.no_grad():
        here = model(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32))
    there = torch.load(tmp_path / 'logits.pt', weights_only=True)
    assert (here - there).abs().max() <= 1e-4 * here.abs().max()


def test_the_student_learns_from_the_records_and_not_from_the_labels(distilled, tmp_path, teacher):
    """With alpha 1 the labels have no hand in the weights; with alpha 0.5 they have."""
    run, store = distilled
    flags = [*SMALL, '--logits', str(store), '--output', str(tmp_path)]
    train_distill.main([*flags, '--smoothing', '0', '--experiment', 'other-smoothing'])
    train_distill.main([*flags, '--alpha', '0.5', '--temperature', '2', '--experiment', 'half'])
    weights = [load_file(folder / 'last' / 'model.safetensors')
               for folder in (run, tmp_path / 'other-smoothing', tmp_path / 'half')]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    row = next(csv.DictReader(open(tmp_path / 'half' / 'metrics.csv')))
    mixed = 0.5 * float(row['label_loss']) + 0.5 * 4 * float(row['distill_loss'])
    assert float(row['loss']) == pytest.approx(mixed, rel=1e-5)


def test_without_logits_it_is_a_plain_trainer(tmp_path):
    train_distill.main([*SMALL, '--epochs', '1', '--output', str(tmp_path), '--experiment', 'plain', '--model',
                        'test_vit', '--model-kwargs', 'img_size=32'])
    row = next(csv.DictReader(open(tmp_path / 'plain' / 'metrics.csv')))
    assert float(row['distill_loss']) == 0 and float(row['loss']) == float(row['label_loss']) > 0


def launch(*arguments: str, processes: int = 1, **kwargs) -> subprocess.Popen:
    """The script under accelerate's own launcher, on the CPU, in a process group of its own."""
    launcher = ['--multi_gpu' if processes > 1 else '--cpu', '--num_processes', str(processes)]
    port = str(29500 + os.getpid() % 2000)
    command = [
        sys.executable, '-m', 'accelerate.commands.accelerate_cli', 'launch', *launcher, '--num_machines', '1',
        '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', port,
        str(ROOT / 'train_distill.py'), *arguments]
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        **kwargs)


def test_two_processes_fill_the_same_store_and_train_together(distilled, teacher, tmp_path):
    process = launch(
        *SMALL, '--teacher', teacher, '--logits', str(tmp_path / 'logits'), '--topk', '3', '--shard-size', '40',
        '--output', str(tmp_path), '--experiment', 'run', '-b', '8', processes=2)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert '6 steps of 16 an epoch, 2 process(es) on cpu' in said
    assert said.count('finished:') == 1
    one, two = (sorted(file for file in folder.rglob('*') if file.is_file())
                for folder in (distilled[1], tmp_path / 'logits'))
    assert [file.name for file in one] == [file.name for file in two] and len(one) == 1 + 2 * 3
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two))


def test_a_killed_run_started_again_ends_with_the_same_weights(distilled, tmp_path):
    run, store = tmp_path / 'straight', distilled[1]
    straight = launch(*SMALL, '--logits', str(store), '--output', str(tmp_path), '--experiment', 'straight')
    said = straight.communicate()[0]
    assert straight.returncode == 0, said
    arguments = [*SMALL, '--logits', str(store), '--output', str(tmp_path), '--experiment', 'run',
                 '--recovery-interval', '1', '--checkpoint-hist', '1']
    first = launch(*arguments)
    deadline = time.time() + 300
    while not list((tmp_path / 'run').glob('checkpoint-0000-000003.pt')) and time.time() < deadline:
        time.sleep(0.01)
        assert first.poll() is None, first.communicate()[0]
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    left = sorted((tmp_path / 'run').glob('checkpoint-*.pt'))[-1].name
    assert left < 'checkpoint-0001-000005.pt'  # it was killed in the middle
    second = launch(*arguments)
    said = second.communicate()[0]
    assert second.returncode == 0, said
    assert re.search(r'resuming .* at epoch \d, step \d', said)
    straight, resumed = (load_file(folder / 'last' / 'model.safetensors') for folder in (run, tmp_path / 'run'))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    rows, again = (list(csv.DictReader(open(folder / 'metrics.csv'))) for folder in (run, tmp_path / 'run'))
    for key in ('loss', 'lr', 'eval_loss', 'eval_top1'):
        assert [row[key] for row in rows] == [row[key] for row in again]


def test_two_processes_killed_and_started_again_end_with_the_same_weights(distilled, tmp_path):
    """And with one evaluation sample, which leaves a rank without any."""
    arguments = [*SMALL, '--logits', str(distilled[1]), '--output', str(tmp_path), '--val-split', 'test[:1]', '-b', '8']
    straight = launch(*arguments, '--experiment', 'straight', processes=2)
    killed = [*arguments, '--experiment', 'killed', '--recovery-interval', '1', '--checkpoint-hist', '1']
    said = straight.communicate()[0]
    assert straight.returncode == 0, said
    first = launch(*killed, processes=2)
    while not list((tmp_path / 'killed').glob('checkpoint-0000-00000[3-5].pt')):
        time.sleep(0.01)
        assert first.poll() is None, first.communicate()[0]
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not list((tmp_path / 'killed').glob('checkpoint-0002-*.pt'))
    alone = launch(*killed)
    assert 'was started with 2 process(es), not 1' in alone.communicate()[0] and alone.returncode != 0
    second = launch(*killed, processes=2)
    said = second.communicate()[0]
    assert second.returncode == 0 and 'resuming' in said, said
    one, two = (load_file(tmp_path / name / 'last' / 'model.safetensors') for name in ('straight', 'killed'))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize('limit', [20_000, 1_000_000, 30_000_000], ids=['plot', 'model', 'checkpoint'])
def test_a_full_disk_stops_training_with_one_sentence(distilled, tmp_path, limit):
    """As a file-size limit, at which writing fails like on a full disk; once it is gone the same command finishes."""
    resource = pytest.importorskip('resource')
    arguments = [sys.executable, str(ROOT / 'train_distill.py'), *SMALL, '--logits', str(distilled[1]),
                 '--output', str(tmp_path), '--experiment', 'run', '--epochs', '1', '--store-epochs', '2']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    full = subprocess.run(
        arguments, env=environment, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert full.returncode == 2 and 'Traceback' not in full.stderr, full.stderr
    assert 'the file-size limit is reached' in full.stderr.splitlines()[-1]
    assert not [file for file in (tmp_path / 'run').rglob('*') if file.name.endswith('.tmp')]
    subprocess.run(arguments, env=environment, capture_output=True, check=True)
    assert (tmp_path / 'run' / 'best' / 'model.safetensors').stat().st_size > 1_000_000


def test_cooldown_epochs_are_filled_too(teacher, tmp_path):
    train_distill.main([
        *SMALL, '--model', 'test_resnet', '--epochs', '1', '--warmup-epochs', '0', '--cooldown-epochs', '1',
        '--teacher', teacher, '--logits', str(tmp_path / 'logits'), '--output', str(tmp_path)])
    assert LogitStore.open(tmp_path / 'logits').manifest.epochs == 2


def test_a_run_of_other_settings_is_not_resumed(distilled, capsys):
    run, store = distilled
    said = message_of(
        [*SMALL, '--logits', store, '--output', run.parent, '--experiment', 'run', '--lr', '0.5'], capsys)
    assert 'lr 0.001 there and 0.5 here' in said and '--experiment' in said


def test_a_damaged_checkpoint_is_named(distilled, tmp_path, capsys):
    run, store = distilled
    shutil.copytree(run, tmp_path / 'run')
    last = sorted((tmp_path / 'run').glob('checkpoint-*.pt'))[-1]
    last.write_bytes(last.read_bytes()[:1000])
    said = message_of([*SMALL, '--logits', store, '--output', tmp_path, '--experiment', 'run'], capsys)
    assert last.name in said and 'delete it' in said


def damaged(store: Path, to: Path, damage) -> Path:
    shutil.copytree(store, to / 'logits')
    damage(sorted((to / 'logits' / 'epoch-00001').iterdir())[1])
    return to / 'logits'


def flip(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize('damage, expected', [
    (lambda shard: shard.unlink(), 'lacks 1 shards, the first of epoch 1'),
    (lambda shard: shard.write_bytes(shard.read_bytes()[:-40]), 'is damaged: its checksum does not match'),
    (lambda shard: shard.write_bytes(b''), 'is cut short: 0 bytes for 40 records'),
    (flip, 'is damaged: its checksum does not match'),
    (lambda shard: shutil.copy(shard.with_name('shard-00000.arrow'), shard), 'a shard of another store, epoch or'),
], ids=['missing', 'truncated', 'empty', 'flipped bit', 'swapped'])
@pytest.mark.parametrize('workers', [0, 1])
def test_a_damaged_store_stops_the_run_with_one_sentence(distilled, tmp_path, capsys, damage, expected, workers):
    store = damaged(distilled[1], tmp_path, damage)
    said = message_of([*SMALL, '--logits', store, '--output', tmp_path, '-j', workers], capsys)
    assert expected in said


def test_bad_input_gets_one_clear_sentence(distilled, teacher, tmp_path, capsys):
    _, store = distilled
    here = [*SMALL, '--output', tmp_path]
    with_store = [*here, '--logits', store]
    cases = [
        ([*here, '--dataset', tmp_path / 'nowhere'], 'there is no folder'),
        ([*here, '--train-split', 'training'], 'no split training, only train, test'),
        ([*here, '--logits', tmp_path / 'none'], 'there is no logit store at'),
        ([*here, '--logits', tmp_path / 'new', '--teacher', 'no_such_model'], 'the model no_such_model'),
        ([*here, '--logits', tmp_path / 'new', '--teacher', teacher, '--topk', '11'], 'k = 11 does not fit 10 classes'),
        ([*with_store, '--num-classes', '12'], 'the student has 12 classes, the store'),
        ([*with_store, '--train-split', 'train[:95]'], '95 samples, the store has 96'),
        ([*with_store, '--train-split', 'train[1:97]'], '96 samples with other content'),
        ([*with_store, '--reprob', '0.5'], 're_prob 0.5 instead of 0.25'),
        ([*with_store, '--teacher', teacher, '--topk', '4'], 'k: 3, 4'),
        ([*here, '--no-such-flag', '1'], 'unknown argument --no-such-flag'),
        ([*here, '--epoch', '3'], 'did you mean --epochs?'),
        ([*here, '--epochs', 'many'], "argument --epochs: invalid int value: 'many'"),
        ([*here, '--config', 'no-such-recipe'], 'there is no recipe no-such-recipe'),
        ([*here, '--model', 'no_such_student'], 'the student no_such_student cannot be made'),
        ([*here, '--opt', 'no_such_optimiser'], 'no_such_optimiser'),
        ([*here, '-b', '97'], 'fewer than one batch of 97'),
        ([*here, '--alpha', '1.5'], '--alpha is 1.5'),
        ([*here, '--temperature', 'nan'], '--temperature is nan'),
        ([*here, '-vb', '-1'], '--validation-batch-size is -1'),
        ([*here, '--num-classes', '5'], 'sample 0 of --train-split has label 7'),
        ([*here, '--val-split', 'test[:0]'], 'the data of --val-split are empty'),
        ([*here, '--interpolation', 'cubist'], 'check --interpolation'),
        ([*here, '--model', 'mixer_s16_224'], 'cannot be made for 32x32 pixels'),
        ([*here, '--model-kwargs', 'depth'], 'write pairs like name=value'),
        ([*here, '--sched', 'none'], 'use --sched constant'),
        ([*here, '--output', Path(DATA) / 'draw.py'], 'choose another --output'),
        ([*here, '--logits', tmp_path / 'new', '--teacher', teacher, '--shard-size', '0'], '--shard-size is 0'),
        ([*here, '--target-key', 'name'], "no column 'name'"),
        ([*here, '--teacher', teacher], '--teacher without --logits'),
    ]
    for argv, expected in cases:
        assert expected in message_of(argv, capsys)
    assert not (tmp_path / 'new').exists()


def test_a_recipe_gives_the_flags_and_the_command_line_wins(tmp_path, capsys):
    recipe = tmp_path / 'mine.yaml'
    recipe.write_text('lr: 0.125\nscale: [0.5, 0.75]\nquiet: true\nepochs: 7\n')
    args = train_distill.settings(['--dataset', DATA, '--config', str(recipe), '--epochs', '9'])
    assert (args.lr, args.scale, args.quiet, args.epochs) == (0.125, [0.5, 0.75], True, 9)
    recipe.write_text('learning_rate: 0.1\n')
    assert "unknown key 'learning_rate'" in message_of(['--dataset', DATA, '--config', recipe], capsys)


def test_views_that_this_machine_makes_otherwise_stop_the_run(distilled, tmp_path, capsys):
    """The manifest of a store from a machine whose libraries made other views."""
    shutil.copytree(distilled[1], tmp_path / 'logits')
    manifest = tmp_path / 'logits' / 'store.json'
    store = LogitStore.open(tmp_path / 'logits')
    text = manifest.read_text().replace(store.manifest.probe, '0' * 32)
    manifest.write_text(text.replace(f'"pillow": "{store.manifest.versions["pillow"]}"', '"pillow": "9.0.0"'))
    said = message_of([*SMALL, '--logits', tmp_path / 'logits', '--output', tmp_path], capsys)
    assert 'this machine makes other views' in said and 'pillow 9.0.0 -> ' in said


def test_an_image_that_cannot_be_decoded_is_named(tmp_path, capsys):
    rows = load_split(DATA, 'train[:96]', is_training=True).cast_column('image', datasets.Image(decode=False))
    rows = rows.map(lambda row, index: {'image': {'bytes': b'no image', 'path': None}} if index == 41 else {},
                    with_indices=True)
    rows.cast_column('image', datasets.Image()).to_parquet(tmp_path / 'train.parquet')
    shutil.copy(f'{DATA}/test.parquet', tmp_path)
    said = message_of([*SMALL, '--dataset', tmp_path, '--train-split', 'train', '--output', tmp_path, '-j1'], capsys)
    assert 'the image of sample 41 cannot be decoded' in said
