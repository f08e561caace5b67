"""`timm-tinyvit`: what is answered before torch is imported, and what importing the package does."""

import os
import subprocess
import sys

import pytest
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import timm_tinyvit
from support import fresh_programs
from support.flags import DATA
from timm_tinyvit import cli
from timm_tinyvit.config import commands
from timm_tinyvit.data.view_config import ViewConfig
from timm_tinyvit.hub.convert import TEACHER, TINY_VITS

FILL = ['fill', '--dataset', 'x', '--teacher', 't', '--logits', 'l', '--epochs', '1']


def run_light(*argv: str, module: str = 'timm_tinyvit') -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, fresh_programs.__file__, 'run_light', module, *argv], capture_output=True, text=True)


@pytest.mark.parametrize('argv, words', [
    (['--help'], 'store'), (['train', '--help'], '--logits'), (['store', 'merge', '--help'], '--output'),
    (['fill', '--config', 'demo', '--help'], '--push-to-hub'), (['--version'], timm_tinyvit.__version__),
    (['train', '--version'], timm_tinyvit.__version__),
])
def test_help_is_printed_before_torch_is_imported(argv, words):
    said = run_light(*argv)
    assert (said.returncode, said.stderr) == (0, '') and words in said.stdout


@pytest.mark.parametrize('argv, words', [
    ([], 'required: COMMAND; see timm-tinyvit --help'),
    (['fil'], "invalid choice: 'fil'"),
    (['store'], 'required: COMMAND; see timm-tinyvit store --help'),
    (['train', '--datset', 'x'], 'unknown argument --datset; did you mean --dataset?'),
    (['train', '--lr', '0.1'], 'one of the arguments --dataset --data-dir is required; see timm-tinyvit train --help'),
    (['train', '--config', 'demo', '--dataset', 'x', '--lr', 'fast'], "invalid float value: 'fast'"),
    (['train', '--config', 'demo', '--dataset', 'x', '--alpha', '2'], '--alpha is 2.0; expected at most 1'),
    (['train', '--dataset', 'x', '--model-kwargs', 'depths'], "has 'depths'; write pairs like name=value"),
    (['train', '--dataset', 'x', '--hflip', '2'], 'expected a probability, 0 to 1'),
    ([*FILL, '-j', '-1'], '--workers is -1; expected at least 0'),
    ([*FILL, 'more'], 'more is an argument too many: the data set is x'),
    (['store', 'verify', 'x', 'more'], 'unknown argument more; see timm-tinyvit store verify --help'),
    (['train', 'x', '--resume', 'y'], '--resume of timm is not taken here: the same command resumes a run'),
    (['fill', 'x', '--tta=2'], '--tta of timm is not taken here: '),
    (['eval', 'x', '--dataset', 'y', '--use-ema'], '--use-ema of timm is not taken here: name the averaged weights'),
    (['eval', '--dataset', 'x'], 'there are no weights to evaluate; name a checkpoint, or add --pretrained'),
    (['store', 'estimate', '--epochs', '2', '--teacher-num-classes', '9', '--num-samples', '3', '--dataset', 'x'],
     'argument --dataset: not allowed with argument --num-samples'),
    (['report', 'a', 'b'], 'a and b are two; give one, or put runs side by side with timm-tinyvit compare a b'),
    (['export', '--model', 'm', '--format', 'tflite', '--output', 'o'], "invalid choice: 'tflite'"),
])
def test_a_typing_error_is_one_sentence_before_torch_is_imported(argv, words, one_sentence):
    said = run_light(*argv)
    assert (said.returncode, said.stdout) == (2, ''), said.stderr
    assert said.stderr.startswith('error: ')
    one_sentence(said.stderr.strip(), words)


def test_a_launched_filling_parses_its_arguments_as_early():
    said = run_light(*FILL[1:], '--datset', 'x', module='timm_tinyvit.save_logits')
    assert (said.returncode, said.stderr) == (2, 'error: unknown argument --datset; did you mean --dataset?\n')


@pytest.mark.parametrize('run', [
    'import timm_tinyvit', 'import timm_tinyvit, importlib; importlib.reload(timm_tinyvit)',
    'from timm_tinyvit import TinyVit, open_store', 'import timm, timm_tinyvit',
    # A program of somebody else, run as a module that imports this one in its package.
    'import sys; sys.argv, sys.orig_argv = ["-m", "x"], ["python", "-m", "tool.main", "x"]; import timm_tinyvit',
])
def test_importing_the_package_registers_the_models(run, hub_children):
    """In a process that has imported neither this package nor timm, only torch."""
    code = f'{run}; import timm; print(type(timm.create_model("tiny_vit_5m_224", device="meta")).__module__)'
    said = hub_children.run(fresh_programs.run_code, os.environ, code)
    assert (said.stdout, said.stderr) == ('timm_tinyvit.models.tiny_vit\n', '')


def test_every_public_name_is_there():
    for name in timm_tinyvit.__all__:
        assert getattr(timm_tinyvit, name) is not None and name in dir(timm_tinyvit)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = timm_tinyvit.nothing


def test_what_is_known_without_timm_is_what_timm_says():
    assert (ViewConfig.mean, ViewConfig.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert commands.OFFICIAL_MODELS == (*TINY_VITS, TEACHER)


def test_the_program_trains_and_evaluates(tmp_path, capsys):
    data = ['--dataset', DATA, '--val-split', 'test[:16]', '-j', '0', '-b', '8', '--quiet']
    cli.main(['train', *data, '--train-split', 'train[:16]', '--img-size', '32', '--model', 'test_resnet', '--epochs',
              '1', '--warmup-epochs', '0', '--output', str(tmp_path), '--experiment', 'run'])
    assert 'finished:' in capsys.readouterr().out
    cli.main(['eval', str(tmp_path / 'run' / 'last'), *data])
    assert capsys.readouterr().out.startswith('loss ')
