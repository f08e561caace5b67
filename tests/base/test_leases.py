"""Leases: real processes that share a folder, die, sleep and come back."""

import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from support.waiting import wait_until
from timm_tinyvit.base import leases as leases_module
from timm_tinyvit.base.leases import Leases, exclusive

NEVER = 1e9
PATIENCE = 60


@pytest.fixture
def file(tmp_path):
    """A file that is to be made, in a folder that a lease makes."""
    return tmp_path / 'epoch-00000' / 'shard-00012.arrow'


@pytest.fixture
def owner(warm_processes, file):
    """Start a process that leases the file; returns it, and the pipe that tells it to release the lease."""
    started = []

    def start(heartbeat=0.02):
        here, there = warm_processes.Pipe()
        process = warm_processes.Process(target=own, args=(file, heartbeat, there))
        process.start()
        there.close()
        started.append((process, here))
        assert here.poll(PATIENCE) and here.recv() == 'leased'
        return process, here

    yield start
    for process, _ in started:
        process.kill()
        process.join(PATIENCE)


def own(file, heartbeat, pipe):
    with Leases(NEVER, heartbeat) as leases:
        assert leases.acquire(file)
        pipe.send('leased')
        pipe.recv()
    pipe.send('released')


def names(file):
    return sorted(os.listdir(file.parent))


def write_lease(file, content):
    file.parent.mkdir(exist_ok=True)
    Leases.path(file).write_bytes(content)


def elsewhere(heartbeat=1):
    """What a process of another machine says."""
    return json.dumps(dict(
        host='elsewhere', machine='0123456789abcdef', pid=os.getpid(), started='1', token='a',
        heartbeat=heartbeat)).encode()


def wait_for_a_heartbeat(file):
    before = Leases.path(file).read_bytes()
    wait_until(lambda: Leases.path(file).read_bytes() not in (before, b''))


def test_a_lease_is_one_small_file_that_goes_with_its_owner(file):
    with Leases() as leases:
        assert leases.acquire(file) and not leases.acquire(file)
        assert names(file) == ['.shard-00012.arrow.lease']
        owner = json.loads(Leases.path(file).read_text())
        assert owner['pid'] == os.getpid() and set(owner) == {'host', 'machine', 'pid', 'started', 'token', 'heartbeat'}
        leases.release(file)
        assert names(file) == []
        assert leases.acquire(file)
    assert names(file) == []


def test_leases_are_given_back_when_something_goes_wrong(file):
    with pytest.raises(ZeroDivisionError), Leases() as leases:
        assert leases.acquire(file) and leases.acquire(file.with_name('shard-00013.arrow'))
        raise ZeroDivisionError
    assert names(file) == []


def test_a_living_owner_keeps_its_lease_whatever_the_clocks_say(owner, file, monkeypatch):
    owner()
    observer = Leases(expire=60)
    # However long the observer was away by its clock: what it finds is not what it saw.
    hours = iter(range(0, 100))
    monkeypatch.setattr(leases_module, 'time', SimpleNamespace(monotonic=lambda: 3600 * next(hours)))
    for times in ((0, 0), (0, 0), (4e9, 4e9), (4e9, 4e9)):
        assert not observer.acquire(file)
        os.utime(Leases.path(file), times)
        wait_for_a_heartbeat(file)
    assert next(hours) == 4


def test_a_lease_of_another_machine_expires_by_the_clock_of_the_observer_alone(file):
    for times in (None, (1, 1), (4e9, 4e9)):
        write_lease(file, elsewhere())
        if times:
            os.utime(Leases.path(file), times)
        with Leases(expire=NEVER) as patient:
            assert not patient.acquire(file) and not patient.acquire(file)
        with Leases(expire=0.2) as observer:
            # However old the file says it is, this observer has seen it just now.
            assert not observer.acquire(file)
            time.sleep(0.3)
            assert observer.acquire(file)
            assert json.loads(Leases.path(file).read_text())['pid'] == os.getpid()


def test_every_heartbeat_starts_the_observers_clock_again(file):
    with Leases(expire=0.2) as observer:
        for heartbeat in range(3):
            write_lease(file, elsewhere(heartbeat))
            assert not observer.acquire(file)
            time.sleep(0.3)
        assert observer.acquire(file)


@pytest.mark.parametrize('is_waited_for', [True, False])
def test_a_lease_of_a_dead_process_of_this_machine_is_taken_at_once(is_waited_for, owner, file):
    process, _ = owner()
    with Leases(expire=NEVER) as observer:
        assert not observer.acquire(file)
        process.kill()
        if is_waited_for:
            process.join(PATIENCE)
        # A killed process takes a moment to end.
        wait_until(lambda: observer.acquire(file), alive=lambda: not is_waited_for)
        assert names(file) == ['.shard-00012.arrow.lease']
    assert names(file) == []


def test_a_later_process_of_the_same_id_is_not_the_owner(owner, file):
    process, _ = owner()
    content = json.loads(Leases.path(file).read_text())
    process.kill()
    process.join(PATIENCE)
    for owner, is_taken in ((dict(pid=os.getpid()), True), (dict(pid=os.getpid(), machine='another'), False)):
        write_lease(file, json.dumps({**content, **owner}).encode())
        with Leases(expire=NEVER) as observer:
            assert observer.acquire(file) == is_taken


@pytest.mark.parametrize('content', [
    b'', b'\0' * 100, b'\xff\xfe', b'{}', b'null', b'[1]', b'[' * 4000, b'{"machine": "', b'9' * 10_000,
    *(json.dumps(dict(json.loads(elsewhere()), machine=machine, pid=pid)).encode()
      for machine, pid in (('HERE', -1), ('HERE', 0), ('HERE', 1.5), ('HERE', '1'), ('HERE', None), ('', 1), ([], 1))),
])
def test_a_lease_that_says_nothing_expires_like_any_other(content, file):
    write_lease(file, content.replace(b'HERE', leases_module.machine_name().encode()))
    with Leases(expire=NEVER) as patient:
        assert not patient.acquire(file) and not patient.acquire(file)
    with Leases(expire=0.01) as observer:
        assert not observer.acquire(file)
        time.sleep(0.02)
        assert observer.acquire(file)
    assert names(file) == []


def test_a_pipe_in_place_of_a_lease_stops_nobody(file):
    file.parent.mkdir()
    os.mkfifo(Leases.path(file))
    with Leases(expire=0.01) as observer:
        assert not observer.acquire(file)
        time.sleep(0.02)
        assert observer.acquire(file)
    assert names(file) == []


def test_an_owner_that_slept_too_long_leaves_the_lease_to_its_successor(owner, file):
    process, pipe = owner()
    os.kill(process.pid, signal.SIGSTOP)
    with Leases(expire=0.1, heartbeat=NEVER) as successor:
        wait_until(lambda: successor.acquire(file))
        content = Leases.path(file).read_bytes()
        os.kill(process.pid, signal.SIGCONT)
        pipe.send('release')
        assert pipe.poll(PATIENCE) and pipe.recv() == 'released'
        assert Leases.path(file).read_bytes() == content
    assert names(file) == []


def race(file, rounds, barrier, results):
    """Take over one dead lease after the other, at the same moments as the other processes."""
    wins = []
    with Leases(expire=NEVER) as observer:
        for number in range(rounds):
            target = file.with_name(f'shard-{number:05d}.arrow')
            barrier.wait(PATIENCE)
            wins.append(observer.acquire(target))
        barrier.wait(PATIENCE)
    results.put(wins)


def test_of_many_observers_of_a_dead_lease_one_wins(owner, warm_processes, file):
    process, _ = owner()
    process.kill()
    process.join(PATIENCE)
    content = Leases.path(file).read_bytes()
    rounds, racers = 100, 5
    for number in range(rounds):
        write_lease(file.with_name(f'shard-{number:05d}.arrow'), content)
    barrier, results = warm_processes.Barrier(racers), warm_processes.Queue()
    racing = [
        warm_processes.Process(target=race, args=(file, rounds, barrier, results)) for _ in range(racers)]
    try:
        for process in racing:
            process.start()
        wins = [results.get(timeout=PATIENCE) for _ in racing]
    finally:
        for process in racing:
            process.join(PATIENCE)
            process.kill()
    assert [sum(winners) for winners in zip(*wins)] == [1] * rounds
    assert names(file) == []


def test_who_comes_late_to_a_dead_lease_leaves_it_to_who_was_quicker(owner, file, monkeypatch):
    process, _ = owner()
    process.kill()
    process.join(PATIENCE)
    with Leases(expire=NEVER) as late, Leases(expire=NEVER) as quick:
        take_over = late._take_over

        def be_overtaken(path, content):
            assert quick.acquire(file)
            return take_over(path, content)

        monkeypatch.setattr(late, '_take_over', be_overtaken)
        assert not late.acquire(file)
        assert names(file) == ['.shard-00012.arrow.lease']
        assert not Leases(expire=NEVER).acquire(file)
    assert names(file) == []


def test_leases_on_finished_files_are_cleared_away(file):
    other = file.with_name('shard-00013.arrow')
    write_lease(file, elsewhere())
    write_lease(other, elsewhere())
    file.write_text('finished')
    Leases().clear(file.parent)
    assert names(file) == ['.shard-00013.arrow.lease', 'shard-00012.arrow']


def test_a_folder_that_cannot_be_written_is_one_sentence(file, refused):
    file.parent.write_text('no folder')
    with refused('cannot write', str(file)), Leases() as leases:
        leases.acquire(file)


def test_one_at_a_time_is_inside(file):
    inside, counts = [], []

    def count():
        for _ in range(5):
            with exclusive(file):
                inside.append(1)
                counts.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert counts == [1] * 20 and names(file) == []


def test_who_was_suspended_for_longer_than_its_lease_finds_out(file, refused):
    with Leases(heartbeat=NEVER) as asleep, Leases(expire=0) as other:
        assert asleep.acquire(file)
        asleep.check(file)
        assert not other.acquire(file)
        assert other.acquire(file)
        with refused(str(file), 'taken over'):
            asleep.check(file)
        other.check(file)
        other.release(file)
        with refused(str(file), 'taken over'):
            asleep.check(file)


def test_leases_of_the_dead_go_and_those_of_the_living_stay(owner, file):
    process, _ = owner()
    Leases.path(file.with_name('shard-00013.arrow')).write_bytes(Leases.path(file).read_bytes())
    with Leases() as other:
        assert not other.expire_in(file.parent) and len(names(file)) == 2
        process.kill()
        process.join(PATIENCE)
        assert other.expire_in(file.parent, 'shard-00013') and names(file) == ['.shard-00012.arrow.lease']
        assert other.expire_in(file.parent) and names(file) == []
