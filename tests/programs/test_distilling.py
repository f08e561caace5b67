"""Training and evaluating from Python in one call each: the runs, figures and sentences of the programs."""

from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from torch import nn

from support.flags import DATA
from timm_tinyvit import LogitStore, distill, evaluate, load_split
from timm_tinyvit.cli import main

SMALL = dict(
    model='test_vit', model_kwargs={'img_size': 32}, train_split='train[:120]', val_split='test[:60]', epochs=2,
    batch_size=20, warmup_epochs=0, lr=1e-3, workers=0, crop_pct=1., quiet=True)


@pytest.fixture(scope='module')
def run(filled_store, tmp_path_factory):
    """What `distill` returns, and the folder of its run."""
    output = tmp_path_factory.mktemp('runs')
    AcceleratorState._reset_state(reset_partial_state=True)
    return *distill(LogitStore.open(filled_store), DATA, output=output, experiment='one', **SMALL), output / 'one'


def test_one_call_trains_as_the_program_does_and_returns_the_student_and_its_history(
        run, filled_store, tmp_path, one_launch_each):
    student, history, folder = run
    # Nothing of it stays for who creates an accelerator next.
    assert not AcceleratorState._shared_state
    flags = [item for name, value in SMALL.items() if name not in ('quiet', 'model_kwargs')
             for item in (f'--{name.replace("_", "-")}', str(value))]
    main(['train', '--dataset', DATA, '--logits', str(filled_store), '--output', str(tmp_path), '--experiment', 'two',
          '--model-kwargs', 'img_size=32', '--quiet', *flags])
    assert (folder / 'last' / 'model.safetensors').read_bytes() == (
        tmp_path / 'two' / 'last' / 'model.safetensors').read_bytes()
    assert [row['epoch'] for row in history] == [0, 1] and {'loss', 'lr', 'seconds', 'eval_top1'} <= history[0].keys()
    assert (folder / 'report.html').is_file() and not student.training
    best = max(row['eval_top1'] for row in history)
    found = evaluate(student, DATA, split='test[:60]', size=(32, 32))
    assert found['top1'] == pytest.approx(best) and found.keys() == {'loss', 'top1', 'top5'}
    # A run that is finished is not trained again.
    before = (folder / 'metrics.csv').stat().st_mtime_ns
    again, same = distill(filled_store, DATA, output=folder.parent, experiment='one', **SMALL)
    assert same == history and (folder / 'metrics.csv').stat().st_mtime_ns == before
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), student.parameters()))


def test_what_cannot_be_asked_of_a_run_is_a_sentence(filled_store, tmp_path, refused):
    images = load_split(DATA, 'train[:120]', is_training=True)
    for words, flags in (
            (("'epoch'", 'did you mean --epochs'), {'epoch': 3}), (('quiet', 'true or false'), {'quiet': 'yes'}),
            (('--batch-size is 0',), {'batch_size': 0})):
        with refused(*words):
            distill(filled_store, DATA, output=tmp_path, **SMALL | flags)
    with refused('of type Dataset', 'save_to_disk'):
        distill(filled_store, images, output=tmp_path)
    assert not list(Path(tmp_path).iterdir())


def test_any_classifier_is_evaluated_as_it_was_left(refused):
    images = load_split(DATA, 'test[:50]', is_training=False)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)).train()
    metrics = evaluate(model, images, size=(28, 28), batch_size=20, label_column='label')
    assert 0 <= metrics['top1'] <= metrics['top5'] <= 100 and model.training
    with refused('label', 'classes'):
        evaluate(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)), images, size=(28, 28))
    with refused('Vision', 'no classifier'):
        evaluate(timm.create_model('test_vit', num_classes=0), images)
