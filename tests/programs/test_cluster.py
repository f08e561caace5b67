"""The Slurm scripts of docs/cluster.md, run by bash: a training that is signalled before the end of its job goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.launches import checkpoints

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / 'examples' / 'fashion_mnist'
# What stands for the training of the script, and its launcher: one small run on this machine.
TRAINING = f"""#!/bin/sh
exec {sys.executable} {ROOT / 'train_distill.py'} --dataset {DATA} --train-split 'train[:400]' --val-split 'test[:8]' \\
    --model test_resnet --img-size 32 -b 4 --epochs $EPOCHS --val-interval 1000 --warmup-epochs 0 -j 1 --lr 0.001 \\
    --recovery-interval 40 --output $RUNS --experiment run
"""
# Slurm signals the tasks of a step, and with `B:` the batch script.
STANDINS = {
    'srun': '#!/bin/sh\necho $$ > $RUNS/task\nexec "$@"\n', 'timm-tinyvit': TRAINING, 'accelerate': TRAINING,
    'scontrol': '#!/bin/sh\necho "$@" >> $RUNS/scontrol\n'}
SCRIPTS = [script for script in re.findall(
    r'^```bash\n(.*?)^```', (ROOT / 'docs' / 'cluster.md').read_text(), re.M | re.S) if '#SBATCH' in script]


def start(script, folder, epochs):
    for name, content in STANDINS.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    (folder / 'job.sh').write_text(script)
    environment = {
        **os.environ, 'PATH': f'{folder}:{os.environ["PATH"]}', 'RUNS': str(folder), 'EPOCHS': str(epochs),
        'SLURM_JOB_ID': '17', 'SLURM_NNODES': '1', 'SLURM_NODEID': '0', 'SLURM_JOB_NODELIST': 'here',
        'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    with open(folder / 'out.txt', 'a') as out:
        return subprocess.Popen(['bash', folder / 'job.sh'], env=environment, stdout=out, stderr=out)


@pytest.mark.launches
@pytest.mark.parametrize('number', range(len(SCRIPTS)))
def test_a_job_that_is_signalled_before_its_end_is_requeued_with_a_checkpoint(number, tmp_path):
    script = SCRIPTS[number]
    is_of_script, name = re.search(r'--signal=(B:)?(\w+)@', script).groups()
    job = start(script, tmp_path, epochs=1000)
    try:
        deadline = time.monotonic() + 120
        while not checkpoints(tmp_path / 'run'):
            assert job.poll() is None and time.monotonic() < deadline, (tmp_path / 'out.txt').read_text()
            time.sleep(0.05)
        asked = job.pid if is_of_script else int((tmp_path / 'task').read_text())
        os.kill(asked, getattr(signal, f'SIG{name}'))
        job.wait(120)
    finally:
        job.kill()
    said = (tmp_path / 'out.txt').read_text()
    assert 'stopped: the same command goes on' in said and 'Traceback' not in said, said
    assert (tmp_path / 'scontrol').read_text().splitlines()[-1] == 'requeue 17'
    last = torch.load(tmp_path / 'run' / checkpoints(tmp_path / 'run')[-1], weights_only=True)
    (tmp_path / 'scontrol').unlink()
    # The job again, which goes on from there; one that dies is not requeued.
    job = start(script, tmp_path, epochs=1000)
    try:
        deadline = time.monotonic() + 120
        where = f'resuming {tmp_path / "run"} at epoch {last["epoch"]}, step {last["samples"] // 4}'
        while where not in (tmp_path / 'out.txt').read_text():
            assert job.poll() is None and time.monotonic() < deadline, (tmp_path / 'out.txt').read_text()
            time.sleep(0.05)
    finally:
        os.kill(int((tmp_path / 'task').read_text()), signal.SIGKILL)
        job.wait(60)
    noted = tmp_path / 'scontrol'
    assert not noted.exists() or 'requeue' not in noted.read_text()
