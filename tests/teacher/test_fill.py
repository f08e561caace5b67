"""Filling by many: real processes that come, go, die and sleep, and a store that is the same every time."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import connection, resource_sharer
from pathlib import Path

import datasets
import pytest
import timm
import torch

from support.files import tree
from support.launches import free_port
from support.waiting import wait_until
from timm_tinyvit import save_logits
from timm_tinyvit.base import files as aside_module
from timm_tinyvit.base.errors import reports_input_errors
from timm_tinyvit.base.launch import init_worker
from timm_tinyvit.base.leases import Leases
from timm_tinyvit.base.machine import is_dead
from timm_tinyvit.data.dataset import SparseLogitDataset
from timm_tinyvit.data.fingerprint import dataset_fingerprint
from timm_tinyvit.data.view_config import ViewConfig
from timm_tinyvit.data.views import Replay
from timm_tinyvit.models.saving import export_model
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.store.manifest import Manifest
from timm_tinyvit.targets.codecs import create_codec
from timm_tinyvit.teacher.fill import fill_epochs
from timm_tinyvit.teacher.teacher import Teacher

NUM_KILLS = 12
NUM_EPOCHS, NUM_SHARDS = 3, 7
PATIENCE = 120
RECIPE = dict(input_size=(3, 32, 32), auto_augment='rand-m9-mstd0.5-inc1', re_prob=0.25)


def hidden(path):
    """Leases, and temporary files."""
    return sorted(file.name for file in path.rglob('.*'))


def shards(path):
    return sorted(str(file.relative_to(path)) for file in path.glob('epoch-*/shard-*.arrow'))


def make_teacher():
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=10, pretrained_cfg_overlay=dict(input_size=(3, 32, 32)))
    # Not as sure of one class as a random model is.
    model.fc.weight.data *= 20
    return model


@pytest.fixture(scope='module')
def images(fashion, tmp_path_factory):
    """The 1,000 real images in a folder that opens at once."""
    path = tmp_path_factory.mktemp('images') / 'data'
    fashion.save_to_disk(str(path))
    return path


@pytest.fixture(scope='module')
def job(images):
    """What a writer needs to know: the images and the manifest."""
    dataset = datasets.load_from_disk(str(images))
    manifest = Manifest(
        num_samples=len(dataset), num_classes=10, k=3, epochs=NUM_EPOCHS, seed=7, shard_size=150,
        record_width=create_codec('float16', 10, 3).width, recipe=ViewConfig(**RECIPE).to_dict(),
        teacher=Teacher(make_teacher(), 'test_resnet', torch.device('cpu')).describe(batch_size=32),
        dataset=dataset_fingerprint(dataset))
    assert manifest.num_shards == NUM_SHARDS
    return str(images), manifest


class WatchedDataset(SparseLogitDataset):
    """Writes down which process makes which views."""

    def __getitems__(self, keys):
        with open(self.log, 'a') as log:
            log.writelines(f'{os.getpid()} {epoch} {index}\n' for epoch, index in keys)
        return super().__getitems__(keys)


def fill(path, job, pipe=None, before=None, **options):
    """A writer process: what save_logits does, with the same bytes on every run of one machine."""
    torch.set_num_threads(1)
    if before is not None:
        before(pipe)
    images, manifest = job
    store = LogitStore.create(path, manifest)
    store.remove_leftovers()
    teacher = Teacher(make_teacher(), 'test_resnet', torch.device('cpu'))
    data = WatchedDataset(
        datasets.load_from_disk(images), Replay(ViewConfig.from_dict(manifest.recipe), manifest.seed))
    data.log = log_of(path)
    if pipe is not None:
        pipe.send('ready')
        pipe.recv()
    fill_epochs(store, teacher, data, **{'epochs': range(manifest.epochs), 'show_progress': False, **options})


def log_of(path):
    return f'{path}.log'


def writers_of(path):
    """For every shard, how many views of it each process has made."""
    counts = defaultdict(lambda: defaultdict(int))
    with open(log_of(path)) as log:
        for line in log:
            pid, epoch, index = map(int, line.split())
            counts[epoch, index // 150][pid] += 1
    return counts


@pytest.fixture
def writers(warm_processes, job):
    """Start writer processes; each stands still before its first view until its pipe is told to go on."""
    started = []

    def start(path, **options):
        here, there = warm_processes.Pipe()
        process = warm_processes.Process(target=fill, args=(path, job, there), kwargs=options)
        process.start()
        there.close()
        started.append((process, here))
        return process, here

    yield start
    for process, _ in started:
        process.kill()
        process.join(PATIENCE)


def go(*writers):
    for _, pipe in writers:
        assert pipe.poll(PATIENCE) and pipe.recv() == 'ready'
    for _, pipe in writers:
        pipe.send('go')


def finish(*writers):
    for process, _ in writers:
        process.join(PATIENCE)
        assert process.exitcode == 0


@pytest.fixture(scope='module')
def reference(job, warm_processes, tmp_path_factory):
    """A store that one writer filled in peace, and the seconds that it took."""
    path = tmp_path_factory.mktemp('reference') / 'store'
    pipe, there = warm_processes.Pipe()
    process = warm_processes.Process(target=fill, args=(path, job, there))
    process.start()
    go((process, pipe))
    start = time.monotonic()
    finish((process, pipe))
    return tree(path), time.monotonic() - start


def test_the_filled_store_is_whole_and_its_records_are_the_teachers(reference, job, tmp_path):
    content, _ = reference
    for name, data in content.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.mkdir() if data is None else file.write_bytes(data)
    store = LogitStore.open(tmp_path)
    assert store.missing(range(3)) == [] and len(content) == 1 + NUM_EPOCHS + NUM_EPOCHS * NUM_SHARDS
    replay = Replay(ViewConfig(**RECIPE), store.manifest.seed)
    data = SparseLogitDataset(datasets.load_from_disk(job[0]), replay, store)
    teacher = Teacher(make_teacher(), 'test_resnet', torch.device('cpu'))
    keys = [(2, 999), (0, 0), (1, 150), (1, 149)]
    samples = data.__getitems__(keys)
    targets = store.codec.decode(torch.stack([sample['record'] for sample in samples]))
    probs = teacher(torch.stack([sample['view'] for sample in samples])).softmax(1)
    torch.testing.assert_close(targets.log_probs.exp(), probs.gather(1, targets.ids), rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(targets.densify().sum(1), torch.ones(4))


# Writers that work at the same time


def test_writers_that_know_nothing_of_each_other_do_nothing_twice(writers, reference, tmp_path):
    path = tmp_path / 'store'
    three = [writers(path, num_workers=workers) for workers in (0, 0, 2)]
    go(*three)
    finish(*three)
    assert tree(path) == reference[0]
    views = [sum(processes.values()) for processes in writers_of(path).values()]
    assert sorted(views) == [100] * NUM_EPOCHS + [150] * NUM_EPOCHS * (NUM_SHARDS - 1)


def test_a_writer_may_join_late(writers, reference, tmp_path):
    path = tmp_path / 'store'
    first, second = writers(path), writers(path)
    go(first)
    wait_until(lambda: shards(path))
    go(second)
    finish(first, second)
    assert tree(path) == reference[0]
    done = writers_of(path)
    # Unless the first was through before the second began.
    assert len({pid for processes in done.values() for pid in processes}) <= 2
    assert all(len(processes) == 1 for processes in done.values())


def test_each_writer_may_take_its_part(writers, reference, tmp_path):
    path = tmp_path / 'store'
    parts = [
        writers(path, shards=range(0, 3)), writers(path, shards=range(3, 99), epochs=range(1, 3)),
        writers(path, shards=range(3, 7), epochs=range(1))]
    go(*parts)
    finish(*parts)
    assert tree(path) == reference[0]


def test_shards_that_there_are_not_are_refused(job, tmp_path, refused):
    with refused('shards 7:9', 'only shards 0:7', '--shards'):
        fill(tmp_path / 'store', job, shards=range(7, 9))


def test_launches_that_start_together_agree_on_the_number_of_epochs(job, tmp_path):
    manifests = [replace(job[1], epochs=epochs) for epochs in (3, 8, 5, 1, 7, 2)]
    for make_first in (True, False):
        path = tmp_path / str(make_first)
        if make_first:
            LogitStore.create(path, manifests[-1])
        threads = [threading.Thread(target=LogitStore.create, args=(path, manifest)) for manifest in manifests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert LogitStore.open(path).manifest.epochs == 8 and list(tree(path)) == ['store.json']


# Writers that die


def test_a_store_whose_writers_were_killed_at_random_moments_equals_one_written_in_peace(
        writers, reference, tmp_path):
    expected, seconds = reference
    moments = random.Random(0)
    kills = 0
    for number in range(100):
        # Machines quick enough to finish a store before all the kills go on with another one.
        path = tmp_path / f'{number}'
        killed = set()
        crew = [writers(path) for _ in range(3)]
        go(*crew)
        while kills < NUM_KILLS and len(shards(path)) < NUM_EPOCHS * NUM_SHARDS:
            time.sleep(moments.uniform(0, seconds / 6))
            victim = moments.randrange(3)
            process, _ = crew[victim]
            process.kill()
            process.join(PATIENCE)
            if process.exitcode == -9:
                kills += 1
                killed.add(process.pid)
            crew[victim] = writers(path)
            go(crew[victim])
        finish(*crew)
        # Whatever was killed last has left no more than a file that the next one removes.
        last = writers(path)
        go(last)
        finish(last)
        assert tree(path) == expected
        done = writers_of(path)
        # Done by one that lives, at most once; and a killed one has lost no more than the shard that it had open.
        assert all(len(set(processes) - killed) <= 1 for processes in done.values())
        assert sum(len(processes) - 1 for processes in done.values()) <= len(killed)
        assert {pid for processes in done.values() for pid in processes} - killed
        if kills == NUM_KILLS:
            break
    assert kills == NUM_KILLS


class StopAt:
    """A hook for a writer: at the second shard it reports and stands still, `before` or `after` os.`name`."""

    def __init__(self, name, when):
        self.name, self.when = name, when

    def __call__(self, pipe):
        original = getattr(os, self.name)

        def stopping(*args):
            path = os.fspath(args[0]) if self.name == 'replace' else os.readlink(f'/proc/self/fd/{args[0]}')
            second = 'shard-00001' in path and path.endswith('.tmp')
            if second and self.when == 'before':
                self.stand_still(pipe)
            result = original(*args)
            if second and self.when == 'after':
                self.stand_still(pipe)
            return result

        setattr(aside_module.os, self.name, stopping)

    def stand_still(self, pipe):
        pipe.send('stopped')
        pipe.recv()


@pytest.mark.parametrize('name, when', [('fsync', 'before'), ('replace', 'before'), ('replace', 'after')])
def test_a_killed_writer_loses_only_its_open_shard(name, when, writers, reference, tmp_path):
    path = tmp_path / 'store'
    writer = process, pipe = writers(path, before=StopAt(name, when))
    go(writer)
    assert pipe.poll(PATIENCE) and pipe.recv() == 'stopped'
    process.kill()
    process.join(PATIENCE)
    left = tree(path)
    assert shards(path) == [f'epoch-00000/shard-0000{shard}.arrow' for shard in range(2 if when == 'after' else 1)]
    assert len([file for file in left if file.endswith('.tmp')]) == (0 if when == 'after' else 1)
    assert all(left[file] == reference[0][file] for file in shards(path))
    writer = writers(path)
    go(writer)
    finish(writer)
    assert tree(path) == reference[0]


def test_who_has_nothing_left_to_do_waits_for_the_others_and_takes_over_from_the_dead(writers, reference, tmp_path):
    path = tmp_path / 'store'
    slow = process, pipe = writers(path, before=StopAt('replace', 'before'))
    go(slow)
    assert pipe.poll(PATIENCE) and pipe.recv() == 'stopped'
    quick = writers(path, expire=1e9, heartbeat=0.05)
    go(quick)
    wait_until(lambda: len(shards(path)) == NUM_EPOCHS * NUM_SHARDS - 1)
    quick[0].join(0.5)
    assert quick[0].is_alive()
    process.kill()
    process.join(PATIENCE)
    finish(quick)
    assert tree(path) == reference[0]
    done = writers_of(path)
    assert set(done[0, 1]) == {process.pid, quick[0].pid} and sum(map(len, done.values())) == 21 + 1


def test_a_machine_that_went_away_is_waited_for_once(job, reference, tmp_path):
    path = tmp_path / 'store'
    LogitStore.create(path, job[1])
    lost = path / 'epoch-00000' / 'shard-00002.arrow'
    lost.parent.mkdir()
    Leases.path(lost).write_text(json.dumps(dict(
        host='elsewhere', machine='0123456789abcdef', pid=1, started='1', token='a', heartbeat=1)))
    os.utime(Leases.path(lost), (4e9, 4e9))
    start = time.monotonic()
    fill(path, job, epochs=range(1), expire=1.5, heartbeat=0.1)
    assert time.monotonic() - start > 1.5
    assert shards(path) == [f'epoch-00000/shard-0000{shard}.arrow' for shard in range(NUM_SHARDS)]
    assert hidden(path) == [] and lost.read_bytes() == reference[0]['epoch-00000/shard-00002.arrow']
    # The next one did not wait for it.
    with open(log_of(path)) as log:
        order = [int(line.split()[2]) // 150 for line in log]
    assert order.index(3) < order.index(2)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_what_goes_wrong_in_one_shard_leaves_the_others_and_no_lease(num_workers, job, tmp_path, capsys):
    rows = datasets.load_from_disk(job[0]).select(range(300))
    table = rows.with_format('arrow')[:]['image'].to_pylist()
    table[200]['bytes'] = table[200]['bytes'][:50]
    broken = datasets.Dataset.from_dict({'image': table, 'label': rows['label']}, features=rows.features)
    manifest = replace(job[1], num_samples=300, shard_size=50, dataset=dataset_fingerprint(broken), epochs=1)
    store = LogitStore.create(tmp_path / 'store', manifest)
    data = SparseLogitDataset(broken, Replay(ViewConfig(**RECIPE), 7))
    teacher = Teacher(make_teacher(), 'test_resnet', torch.device('cpu'))

    @reports_input_errors
    def program(argv):
        fill_epochs(store, teacher, data, range(1), num_workers=num_workers, show_progress=False)

    with pytest.raises(SystemExit) as status:
        program([])
    assert status.value.code == 2
    assert capsys.readouterr().err.startswith('error: the image of sample 200 cannot be decoded')
    assert shards(store.path) == [f'epoch-00000/shard-0000{shard}.arrow' for shard in range(4)]
    assert hidden(store.path) == []


# The program


@pytest.fixture(scope='module')
def teacher_folder(tmp_path_factory):
    """A teacher as a folder with config.json and safetensors."""
    path = tmp_path_factory.mktemp('teacher')
    export_model(path, make_teacher(), data_config={'input_size': (3, 32, 32)})
    return path


def run_save_logits(argv, output, file_size_limit=None):
    """A process, with a group of its own, that runs `save_logits`; what it prints goes to a file."""
    os.setpgid(0, 0)
    with open(output, 'wb') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if file_size_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, resource.RLIM_INFINITY))
    save_logits.main(argv)


@pytest.fixture
def arguments(images, teacher_folder):
    """The arguments of `save_logits` for so many epochs."""

    def make(store, epochs, shard_size=150, workers=0):
        return [
            '--dataset', str(images), '--teacher', str(teacher_folder), '--logits', str(store), '--topk', '3',
            '--epochs', str(epochs), '--img-size', '32', '--shard-size', str(shard_size), '--workers', str(workers),
            '--codec', 'float16']

    return make


@pytest.fixture
def start_program(warm_processes, arguments, tmp_path):
    """Start save_logits on the real images; returns the process, and the file that has what it prints."""
    started = []

    def start(store, epochs, shard_size=150, workers=0, **options):
        output = tmp_path / f'output-{len(started)}.txt'
        argv = arguments(store, epochs, shard_size, workers)
        process = warm_processes.Process(target=run_save_logits, args=(argv, output), kwargs=options)
        process.start()
        started.append(process)
        return process, output

    yield start
    for process in started:
        process.kill()
        process.join(PATIENCE)


@pytest.fixture
def program(start_program):
    """Run save_logits; returns its exit status and the last line of what it printed."""

    def run(store, epochs, **options):
        process, output = start_program(store, epochs, **options)
        process.join(PATIENCE)
        return process.exitcode, output.read_text().strip().splitlines()[-1]

    return run


def group(leader):
    """The processes of a group that have not ended."""
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        with suppress(OSError):
            state, _, number = stat.read_text().rpartition(')')[2].split()[:3]
            if int(number) == leader and state not in 'ZX':
                found.append(stat.parent.name)
    return found


@pytest.mark.parametrize('number, status', [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)])
def test_a_signal_to_the_program_and_its_loader_workers_ends_them_in_good_order(
        number, status, start_program, tmp_path):
    path = tmp_path / 'store'
    process, output = start_program(path, 1000, shard_size=50, workers=2)
    wait_until(lambda: len(shards(path)) > 3)
    assert len(group(process.pid)) >= 3
    os.killpg(process.pid, number)
    process.join(PATIENCE)
    assert process.exitcode == status
    assert hidden(path) == []
    printed = output.read_text()
    assert 'Traceback' not in printed and printed.strip().endswith('the same command goes on from what is on disk')
    wait_until(lambda: not group(process.pid))


def hand_over(output):
    """A loader worker with one file to hand over; those who ask for it go before they have it, or ask for another."""
    with open(output, 'wb') as file:
        os.dup2(file.fileno(), 2)
    init_worker(0)
    read, write = os.pipe()
    handle = resource_sharer.DupFd(read)
    address, key = handle._id
    stranger = socket.socket(socket.AF_UNIX)
    stranger.connect(address)
    stranger.close()
    connection.Client(address, authkey=multiprocessing.current_process().authkey).close()
    with connection.Client(address, authkey=multiprocessing.current_process().authkey) as other:
        other.send((key + 1, os.getpid()))
    # One thread serves them in turn, so what it says of those before has been said.
    os.write(write, b'kept')
    assert os.read(handle.detach(), 4) == b'kept'


def test_a_loader_worker_says_nothing_of_a_program_that_stops_while_it_takes_a_batch(warm_processes, tmp_path):
    process = warm_processes.Process(target=hand_over, args=(tmp_path / 'output.txt',))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0
    printed = (tmp_path / 'output.txt').read_text()
    # What is no such stop keeps its traceback.
    assert printed.count('Traceback') == 1 and printed.strip().splitlines()[-1].startswith('KeyError'), printed


def test_loader_workers_end_with_a_killed_program(start_program, tmp_path):
    process, _ = start_program(tmp_path / 'store', 1000, shard_size=50, workers=2)
    wait_until(lambda: len(shards(tmp_path / 'store')) > 3)
    process.kill()
    process.join(PATIENCE)
    wait_until(lambda: not group(process.pid))


def lessees(path):
    """The processes that have a shard leased."""
    found = set()
    for lease in path.glob('epoch-*/.*.lease'):
        try:
            found.add(json.loads(lease.read_bytes())['pid'])
        except (FileNotFoundError, ValueError):
            # Released, or not yet written.
            pass
    return found


def test_two_launches_share_a_store_and_end_with_their_launchers(arguments, job, tmp_path):
    path = tmp_path / 'store'
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    launches = []
    for number, flags in enumerate((['--num_processes', '1'], ['--multi_gpu', '--num_processes', '2'])):
        command = [
            sys.executable, '-m', 'accelerate.commands.accelerate_cli', 'launch', *flags, '--num_machines', '1',
            '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', str(free_port()),
            '-m', 'timm_tinyvit.save_logits', *arguments(path, 1000)]
        with open(tmp_path / f'{number}.txt', 'wb') as output:
            launches.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
    try:
        # All three have a shard in work at the same time.
        everyone = wait_until(lambda: len(found := lessees(path)) == 3 and found)
        alone, together = launches
        alone.send_signal(signal.SIGTERM)
        alone.wait(PATIENCE)
        ranks = wait_until(lambda: len(living := {pid for pid in everyone if not is_dead(pid)}) == 2 and living)
        before = len(shards(path))
        wait_until(lambda: len(shards(path)) > before + 2)
        assert lessees(path) <= ranks
        together.send_signal(signal.SIGTERM)
        together.wait(PATIENCE)
        wait_until(lambda: all(map(is_dead, everyone)))
    finally:
        for launch in launches:
            launch.kill()
            launch.wait(PATIENCE)
        # What a failure leaves without its launcher ends by itself.
        wait_until(lambda: all(map(is_dead, lessees(path))))
    assert hidden(path) == []
    for number in range(2):
        assert 'the same command goes on' in (tmp_path / f'{number}.txt').read_text()
    store = LogitStore.open(path)
    assert list(store.verify(range(1))) == []


# Full disks


def test_a_file_size_limit_stops_the_program_with_one_sentence_and_loses_nothing(
        program, one_sentence, tmp_path):
    path = tmp_path / 'store'
    assert program(path, 1)[0] == 0
    finished = tree(path)
    shard = max(len(data) for name, data in finished.items() if name.endswith('.arrow'))
    manifest = len(finished['store.json'])
    assert manifest + 100 < shard
    status, message = program(path, 2, file_size_limit=manifest + 50)
    assert status == 2 and message.startswith('error: cannot write ')
    one_sentence(message, 'shard-00000.arrow', 'ulimit -f')
    left = tree(path)
    assert {name for name in left if name.startswith('.') or '/.' in name} == set()
    assert {name: left[name] for name in finished if name != 'store.json'} == {
        name: data for name, data in finished.items() if name != 'store.json'}
    assert program(path, 2)[0] == 0
    assert LogitStore.open(path).missing(range(2)) == []


@contextmanager
def small_disk(path, size):
    """A tmpfs of so many KiB, and a function that enlarges it."""
    path.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}k', 'tmpfs', str(path)]
    if shutil.which('mount') is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('mounting a small tmpfs is not permitted here')
    try:
        yield lambda size: subprocess.run(['mount', '-o', f'remount,size={size}k', str(path)], check=True)
    finally:
        subprocess.run(['umount', str(path)], check=True)


def test_a_full_disk_stops_the_program_with_one_sentence_and_loses_nothing(program, one_sentence, tmp_path):
    assert program(tmp_path / 'peace', 2, shard_size=250)[0] == 0
    expected = tree(tmp_path / 'peace')
    # The manifest takes one page, a shard one or two, and a folder none.
    with small_disk(tmp_path / 'disk', 6 * resource.getpagesize() // 1024) as enlarge:
        path = tmp_path / 'disk' / 'store'
        status, message = program(path, 2, shard_size=250)
        assert status == 2 and message.startswith('error: cannot write ')
        one_sentence(message, str(path), 'the disk is full', 'goes on')
        left = tree(path)
        assert 0 < len([name for name in left if name.endswith('.arrow')]) < 8
        assert left.items() <= expected.items()
        # Still full: the same sentence again.
        status, again = program(path, 2, shard_size=250)
        assert (status, again) == (2, message) and tree(path) == left
        enlarge(1024)
        assert program(path, 2, shard_size=250)[0] == 0
        assert tree(path) == expected
