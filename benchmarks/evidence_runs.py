"""The runs of evidence.py: what each needs is made first, and what each has measured is kept as one small file."""

import csv
import hashlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from timm_tinyvit.base.errors import InputError
from timm_tinyvit.base.files import write_atomic
from timm_tinyvit.base.launch import device_name
from timm_tinyvit.base.leases import exclusive
from timm_tinyvit.data.views import library_versions
from timm_tinyvit.store.local import LogitStore

__all__ = ['ROOT', 'Experiment']

ROOT = Path(__file__).resolve().parents[1]


class Experiment:
    """A grid on disk: makes runs with all that they need, and keeps what they measured.

    Args:
        name: The grid's name.
        grid: A `Grid` of evidence.py.
        output: Folder for teacher, stores and runs, relative to the root of this project.
        metrics: Folder for what finished ones have measured.
    """

    def __init__(self, name: str, grid: Any, output: Path, metrics: Path):
        self.name, self.grid = name, grid
        self.output, self.folder, self.metrics = output, output / name, metrics / name
        self.locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self.children: set[subprocess.Popen] = set()
        self.stopping = False

    def program(self, row: Any, seed: int) -> str:
        """The trainer's command of one student, without the launcher; a store says itself what its views are."""
        source = f'--logits {self.folder}/store-{row.store}' if row.store else self.grid.views
        if row.start:
            source += f' --initial-checkpoint {self.folder}/{row.start}-{seed}/last'
        return (
            f'train_distill.py --dataset {self.grid.dataset} {self.grid.data} {self.grid.flags} {row.flags} {source} '
            f'--seed {seed} --quiet --output {self.folder} --experiment {row.name}-{seed}')

    def make_run(self, row: Any, seed: int) -> dict[str, Any]:
        """Train one student, after its store is filled and the store's teacher trained, and what it starts from."""
        name, program = f'{row.name}-{seed}', self.program(row, seed)
        if row.start:
            self.make_run(next(start for start in self.grid.rows if start.name == row.start), seed)
        file = self.metrics / f'{name}.json'
        # Two launches of evidence.py may share a grid.
        with exclusive(ROOT / self.folder / name):
            record = self.finished(file, program)
            if record is None:
                store = self.make_store(row.store) if row.store else None
                self.make_data()
                resumed = (ROOT / self.folder / name).exists()
                seconds = self.launch(name, program)
                record = self.measured(name, program, self.folder / name, seconds) | {
                    'resumed': resumed, 'row': row.name, 'seed': seed,
                    'store': store and {'name': row.store, **store['store']}}
                if row.is_probed:
                    record['probes'] = self.probe(name)
                self.keep(file, record)
        return record

    def probe(self, name: str) -> dict[str, float]:
        """Accuracies of the nearest neighbours and of a linear classifier on the features of a finished run."""
        log = ROOT / self.folder / f'{name}-probes.log'
        log.unlink(missing_ok=True)
        self.call(log.stem, [sys.executable, '-m', 'timm_tinyvit', 'eval', f'{self.folder}/{name}/last', *shlex.split(
            f'--dataset {self.grid.dataset} {self.grid.probed} --probe knn --probe linear')])
        found = dict(pair.split() for pair in log.read_text().strip().splitlines()[-1].split(', '))
        return {probe: float(found[probe]) for probe in ('knn', 'linear')}

    def make_store(self, name: str) -> dict[str, Any]:
        """Fill a store, after its teacher is trained."""
        path = self.folder / f'store-{name}'
        file = self.metrics / f'store-{name}.json'
        with self.locks[path.name]:
            teacher = self.make_teacher()
            program = (
                f'-m timm_tinyvit.save_logits --dataset {self.grid.dataset} {self.grid.data} {self.grid.views} '
                f'--teacher {teacher} --logits {path} {self.grid.stores[name]} --workers 1')
            record = self.finished(file, program)
            if record is None or not LogitStore.exists(ROOT / path):
                self.make_data()
                resumed = LogitStore.exists(ROOT / path)
                seconds = self.launch(path.name, program)
                store = LogitStore.open(ROOT / path)
                manifest = store.manifest
                views = manifest.epochs * manifest.num_samples
                record = self.described(path.name, program, seconds) | {'resumed': resumed, 'store': {
                    'identity': manifest.identity, 'codec': manifest.codec, 'k': manifest.k,
                    'epochs': manifest.epochs, 'views': views, 'bytes_per_view': round(store.size() / views, 2),
                    'teacher': manifest.teacher['name'], 'teacher_weights': manifest.teacher['weights']}}
                self.keep(file, record)
        return record

    def make_teacher(self) -> str:
        """Train the grid's teacher, where it has none; returns the teacher's folder."""
        if self.grid.teacher:
            return self.grid.teacher
        program = f'train_distill.py --dataset {self.grid.dataset} {self.grid.teacher_flags} --output {self.output} ' \
                  '--experiment teacher --quiet'
        file = self.metrics / 'teacher.json'
        with self.locks['teacher']:
            if self.finished(file, program) is None or not (ROOT / self.output / 'teacher' / 'last').exists():
                self.make_data()
                seconds = self.launch('teacher', program, threads=os.cpu_count() or 1)
                self.keep(file, self.measured('teacher', program, self.output / 'teacher', seconds))
        return f'{self.output}/teacher/last'

    def make_data(self) -> None:
        """Draw all images of Fashion-MNIST, where the grid's folder is not there."""
        with self.locks['data']:
            if not (ROOT / self.grid.dataset).exists():
                self.call('data', [
                    sys.executable, 'examples/fashion_mnist/draw.py', '--output', self.grid.dataset, '--train', '60000',
                    '--test', '10000'])

    def launch(self, name: str, program: str, threads: int = 1) -> float:
        """Run a program of this project through `accelerate launch`; returns its seconds."""
        return self.call(name, [
            sys.executable, '-m', 'accelerate.commands.accelerate_cli', 'launch', '--num_processes', '1',
            '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--num_cpu_threads_per_process',
            str(threads), *shlex.split(program)])

    def call(self, name: str, command: Sequence[str]) -> float:
        log = ROOT / self.folder / f'{name}.log'
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with open(log, 'a') as file:
            child = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
            self.children.add(child)
            if self.stopping:  # since before the child was known
                child.terminate()
            try:
                status = child.wait()
            except BaseException:
                child.terminate()
                raise
            self.children.discard(child)
        if status:
            raise InputError(f'{name} ended with status {status}; its last words are in {log}; the same command of '
                             f'evidence.py goes on from there')
        return time.monotonic() - start

    def stop(self) -> None:
        """Stop what is running; it keeps a checkpoint."""
        self.stopping = True
        for child in list(self.children):
            child.terminate()

    def finished(self, file: Path, program: str) -> dict[str, Any] | None:
        """What a finished run has measured.

        Raises:
            InputError: The file is of another command.
        """
        if not file.exists():
            return None
        record = json.loads(file.read_text(encoding='utf-8'))
        if record['command'] != f'accelerate launch {program}':
            raise InputError(f'{file} is of another command than the grid {self.name} has now; remove the file and '
                             f'what it was made from, or give --metrics another folder')
        return record

    def keep(self, file: Path, record: dict[str, Any]) -> None:
        write_atomic(file, (json.dumps(record, indent=1) + '\n').encode())

    def described(self, name: str, program: str, seconds: float) -> dict[str, Any]:
        """What every file has: the command, the seconds of the launch that finished it, and what it ran on."""
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        return {
            'run': name, 'grid': self.name, 'command': f'accelerate launch {program}',
            'wall_seconds': round(seconds, 1),
            'machine': {'device': device_name(device), 'cores': os.cpu_count(), 'load': round(os.getloadavg()[0], 1)},
            'versions': library_versions()}

    def measured(self, name: str, program: str, folder: Path, seconds: float) -> dict[str, Any]:
        """What a run of the trainer has left in its folder."""
        with open(ROOT / folder / 'metrics.csv', newline='') as file:
            rows = list(csv.DictReader(file))
        settings = json.loads((ROOT / folder / 'run.json').read_text())['flags']
        accuracies = {int(row['epoch']) + 1: float(row['eval_top1']) for row in rows if row.get('eval_top1')}
        trained = sum(float(row['seconds']) for row in rows)
        speeds = [float(row['images_per_second']) for row in rows]
        return self.described(name, program, seconds) | {
            'top1': accuracies.get(len(rows)), 'best_top1': max(accuracies.values(), default=None),
            'top1_by_epoch': accuracies,
            'loss_by_epoch': [round(float(row['loss']), 4) for row in rows], 'train_seconds': round(trained, 1),
            'images_per_second': round(mean(speeds), 1),
            'weights_sha256': hashlib.sha256((ROOT / folder / 'last' / 'model.safetensors').read_bytes()).hexdigest(),
            'settings': {key: value for key, value in settings.items() if value is not None and value is not False}}
