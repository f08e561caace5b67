"""Run the code of a page of the documentation, in the folder that this program is started in.

    python docs_program.py PAGE.md

Python blocks share one namespace. Shell blocks are run by bash; programs of this package that they call are then run
here, with the arguments that bash made of them. What takes a cluster is made small: each command is parsed as it
stands, and run on few images, with small views and teachers. `text` right after a shell block is what it prints.
"""

import contextlib
import importlib.metadata
import io
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from flags import SMALL_TINY_VIT  # beside this program

from timm_tinyvit import cli
from timm_tinyvit.config.training import settings

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```', re.M | re.S)
PROGRAMS = ('timm-tinyvit', 'accelerate', 'python', 'pip', 'make')
# The programs that a launcher starts, as commands of timm-tinyvit.
LAUNCHED = {'train_distill': 'train', 'timm_tinyvit.save_logits': 'fill'}
# A program that a shell block calls notes its arguments; what only a batch system has is imitated.
NOTE = '#!/bin/sh\n{ printf "%s\\0" "${0##*/}" "$@"; printf "\\n"; } >> "$NOTES"\n'
BATCH_SYSTEM = {'srun': '#!/bin/sh\nexec "$@"\n', 'scontrol': '#!/bin/sh\necho first-machine\n'}
BATCH_VARIABLES = dict(SLURM_NNODES='2', SLURM_NODEID='0', SLURM_JOB_NODELIST='first-machine', SLURM_JOB_ID='1')

SMALL_DATA = ('ILSVRC/imagenet-1k', 'timm/imagenet-22k-wds')
SMALL_WORDS = {
    'convnext_large.fb_in22k_ft_in1k': 'hf-hub:tests/teacher-1k',
    'clip_vit_large_patch14_224.in22k': 'hf-hub:tests/teacher-22k',
    'vit_base_patch16_dinov3.lvd1689m': 'hf-hub:tests/teacher-1k',
    'samvit_base_patch16.sa1b': 'hf-hub:tests/teacher-1k',
    '/shared/runs': 'output',
}
SMALL_EXPORTS = {'tiny_vit_21m_224': 'hf-hub:tests/teacher-1k'}
SMALL_VALUES = {'--epochs': '2', '--samples': '0:8', '--shards': '0:1', '--img-size': '32', '--feature-dim': '8'}
# What a recipe says of features, for maps of 32 pixels and few of them.
SMALL_FEATURES = {'sam_encoder': '--feature-grid 1', 'backbone': '--feature-dim 8'}
SMALL_STORE = '--img-size 32 --workers 0 --teacher-batch-size 8 --shard-size 32'
SMALL_RUN = (
    f'--model tiny_vit_5m_224 --model-kwargs {" ".join(SMALL_TINY_VIT)} '
    '--img-size 32 --epochs 2 --warmup-epochs 0 --batch-size 8 --workers 0 --crop-pct 1 --validation-batch-size 100')


def main(page: str) -> None:
    text = Path(page).read_text(encoding='utf-8')
    namespace = {'__name__': '__main__'}
    printed = ''
    for found in BLOCK.finditer(text):
        language, code = found.groups()
        where = f'{page}, line {text.count(chr(10), 0, found.start()) + 1}'
        print(f'--- {where}', file=sys.stderr)
        if language == 'python':
            exec(compile('\n' * text.count('\n', 0, found.start(2)) + code, page, 'exec'), namespace)
        elif language == 'bash':
            with contextlib.redirect_stdout(io.StringIO()) as out:
                for words in called(code):
                    run(words)
            printed = out.getvalue()
        elif language == 'text':
            assert printed.strip() == code.strip(), f'{where}: it prints\n{printed}'
        else:
            hidden = [line for line in code.splitlines() if line.startswith(tuple(f'{name} ' for name in PROGRAMS))]
            assert not hidden, f'{where}: a command in a block that nobody runs: {hidden[0]}'


def called(code: str) -> list[list[str]]:
    """The calls of programs in shell code, as bash makes them."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {**dict.fromkeys(PROGRAMS, NOTE), **BATCH_SYSTEM}.items():
            file = Path(folder, name)
            file.write_text(content)
            file.chmod(0o755)
        notes = Path(folder, 'notes')
        notes.touch()
        subprocess.run(
            ['bash', '-euc', code], check=True,
            env={**os.environ, **BATCH_VARIABLES, 'PATH': f'{folder}:{os.environ["PATH"]}', 'NOTES': str(notes)})
        return [line.split('\0')[:-1] for line in notes.read_text().splitlines()]


def run(words: list[str]) -> None:
    """Run a call of a program."""
    program, *words = words
    if program == 'make':
        assert re.search(rf'^{words[0]}:', (ROOT / 'Makefile').read_text(), re.M), f'no target {words[0]}'
        return
    if program == 'pip':
        asked = {extra for word in words for extra in ''.join(re.findall(r'\[(.*)\]', word)).split(',') if extra}
        there = importlib.metadata.metadata('timm_tinyvit').get_all('Provides-Extra')
        assert asked <= set(there), f'no extra {asked - set(there)}'
        return
    if program == 'python':
        sys.argv = words
        runpy.run_path(words[0], run_name='__main__')
        return
    if program == 'accelerate':
        assert words[0] == 'launch'
        launch = launch_command_parser().parse_args(words[1:])
        words = [LAUNCHED[launch.training_script.removesuffix('.py')], *launch.training_script_args]
    AcceleratorState._reset_state(True)  # as in a process of its own
    words = small(words)
    print('    timm-tinyvit', *words, file=sys.stderr)
    cli.main(words)


def small(words: list[str]) -> list[str]:
    """The arguments of a command as few images and seconds want them."""
    command = words[0]
    if 'estimate' in words:
        return words
    if command == 'export':
        return [SMALL_EXPORTS.get(word, word) for word in words] + ['--img-size', '224', '224']
    if command == 'train':
        wanted = settings(words[1:])
        words = [*words, '--experiment', wanted.experiment or wanted.model]
    if '--dataset' in words and not set(words) & set(SMALL_DATA):
        return words
    words = [SMALL_WORDS.get(word, word) for word in words]
    words = [SMALL_VALUES.get(before, word) for before, word in zip(['', *words], words)]
    if command == 'train':
        words += SMALL_RUN.split()
    elif command == 'fill':
        words += SMALL_STORE.split()
    words += next((flags.split() for recipe, flags in SMALL_FEATURES.items() if recipe in words), [])
    return words


if __name__ == '__main__':
    main(sys.argv[1])
