"""What several test files share: real images, a warm parent of real processes, and what a refusal must look like."""

import gc
import multiprocessing
import multiprocessing.spawn  # which notes `sys.executable`, before a test puts another one there
import os
import signal
import traceback
from contextlib import contextmanager
from pathlib import Path

# Tests start many processes. With a thread each for every core, their threads wait for each other's processors, and two
# ranks on two cores take minutes for seconds; and rounding depends on the number of threads. Before torch is imported.
os.environ.setdefault('OMP_NUM_THREADS', '1')
# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import datasets
import pytest
import timm
import torch
from accelerate.state import AcceleratorState

from support import plain_timm
from support.flags import DATA, SMALL_VIEWS, small_data
from support.hub_child import Children
from support.hub_server import HubServer
from support.runs import leave_plots_out

from timm_tinyvit import save_logits
from timm_tinyvit.base import console
from timm_tinyvit.base.errors import InputError
from timm_tinyvit.models.saving import export_model


# Fixtures that start processes, servers or trainings, and files whose tests do by themselves.
LAUNCHING = {'warm_processes', 'hub_children', 'start', 'hub', 'runs', 's3_server'}
LAUNCHING_FILES = {
    'test_checkpoint', 'test_cli', 'test_convert', 'test_docs', 'test_evidence', 'test_export', 'test_feature_students',
    'test_fill', 'test_distilling', 'test_gpu', 'test_loops', 'test_model_card', 'test_package', 'test_recipes',
    'test_run_report', 'test_sharding', 'test_sparse_triton', 'test_train_distill'}
# Files that look at the plots of runs; in the others there are none.
PLOTTING_FILES = {
    'test_feature_stores', 'test_feature_students', 'test_figures', 'test_hostile_names', 'test_model_card',
    'test_page', 'test_push_model', 'test_run_report', 'test_store_report', 'test_strangers', 'test_train_distill'}


def pytest_collection_modifyitems(items):
    """Mark the tests that launch processes or train, which `make test-fast` leaves out, and begin with their files.

    The other files are short; they fill the time in which one of two cores would be idle at the end.
    """
    for item in items:
        if LAUNCHING & set(item.fixturenames) or item.path.stem in LAUNCHING_FILES:
            item.add_marker('launches')
    launching = {item.path for item in items if item.get_closest_marker('launches')}
    items.sort(key=lambda item: item.path not in launching)


def pytest_collection_finish():
    """What has been imported by now stays: no collection need look at it again, nor in children."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope='module', autouse=True)
def plots_where_they_are_looked_at(request):
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.path.stem not in PLOTTING_FILES:
            leave_plots_out(monkeypatch.setattr)
        yield


@pytest.fixture(autouse=True)
def speaking_console(monkeypatch):
    """Programs that a test calls in this process settle what it says, `--quiet` for one; the next begins as new."""
    monkeypatch.setattr(console, '_is_quiet', False)
    monkeypatch.setattr(console, '_speaks', True)


@pytest.fixture(scope='session')
def fashion(tmp_path_factory):
    """The 1,000 committed training images of Fashion-MNIST: grey PNGs of 28x28 with a label."""
    return datasets.load_dataset(
        'parquet', data_files=f'{DATA}/train.parquet', split='train',
        cache_dir=str(tmp_path_factory.mktemp('cache')))


@pytest.fixture(scope='session')
def refused():
    """`with refused('some', 'words'):` expects one sentence for the user, with these words in it."""

    @contextmanager
    def expect(*words, error=InputError):
        with pytest.raises(error) as caught:
            yield
        # A loader that they hold would end its workers when some later test collects garbage, which takes 5 s.
        traceback.clear_frames(caught.tb)
        check_sentence(str(caught.value), *words)

    return expect


def check_sentence(message, *words):
    assert message.strip() and '\n' not in message and 'Traceback' not in message
    assert len(message) < 700, message
    for word in words:
        assert word in message, message


@pytest.fixture(scope='session')
def one_sentence():
    """Check that a message is one sentence with these words in it."""
    return check_sentence


@pytest.fixture
def one_launch_each():
    """accelerate keeps the settings of a process's first run; each run of such a test is a launch of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """What the library datasets makes of files goes with the tests."""
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path_factory.getbasetemp() / 'datasets')


@pytest.fixture(scope='session')
def warm_processes():
    """Real processes that need not import torch and timm: they are forked from a parent that did nothing else."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['pytest', 'timm_tinyvit.teacher.creating', 'timm_tinyvit.hub.push_store'])
    return context


@pytest.fixture(scope='session')
def hub_children():
    """Real processes with an environment of their own that need not import torch: `hub_children.run(function, env)`."""
    with Children() as children:
        yield children


@pytest.fixture
def logits_in_plain_timm(hub_children, tmp_path):
    """`logits_in_plain_timm(folder, images)` runs the model in a folder in a process without this package."""

    def run(folder, images):
        torch.save(images, tmp_path / 'images.pth')
        hub_children.run(
            plain_timm.save_logits, os.environ, folder, tmp_path / 'images.pth', tmp_path / 'logits.pth')
        return torch.load(tmp_path / 'logits.pth')

    return run


@pytest.fixture
def hub():
    """A server of the Hub's interface; the test fails if a client sent what it must not."""
    with HubServer() as server:
        yield server
    assert not server.violations


@pytest.fixture(scope='session')
def s3_server():
    """A server of S3's interface, for all tests."""
    from support.s3_server import S3Server  # slow to import

    with S3Server() as server:
        yield server


@pytest.fixture(scope='session')
def teacher(tmp_path_factory) -> str:
    """A small timm model with the weights of one seed, as a folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('teacher')
    export_model(folder, timm.create_model('test_resnet', num_classes=10), data_config={'input_size': (3, 32, 32)})
    return str(folder)


@pytest.fixture(scope='session')
def filled_store(tmp_path_factory, teacher) -> Path:
    """A store of 4 epochs of 120 images, in 6 shards each; not to be written to."""
    path = tmp_path_factory.mktemp('stores') / 'logits'
    save_logits.main([
        *small_data(120), *SMALL_VIEWS, '--teacher', teacher, '--logits', str(path), '--epochs', '4', '--topk', '3',
        '--shard-size', '20', '--quiet'])
    return path


@pytest.fixture(scope='session')
def keyed_store(tmp_path_factory, teacher, fashion) -> tuple[Path, Path]:
    """A data set of 40 images with a column `name`, and a store of 3 epochs that knows them by it."""
    folder = tmp_path_factory.mktemp('keyed')
    rows = fashion.select(range(40))
    rows.add_column('name', [f'image {row}' for row in range(40)]).save_to_disk(folder / 'data')
    save_logits.main([
        '--dataset', str(folder / 'data'), '--key', 'name', '--teacher', teacher, '--logits', str(folder / 'logits'),
        '--epochs', '3', '--img-size', '32', '--shard-size', '10', '--workers', '0', '--quiet'])
    return folder / 'data', folder / 'logits'
