"""What children do with the Hub: push files, run commands of the package, and load what was published."""

import contextlib
import functools
import io
import json
from base64 import b64decode
from collections.abc import Sequence
from pathlib import Path

from timm_tinyvit.base import hub_client
from timm_tinyvit.base.errors import InputError, reports_input_errors


def push_each(jobs: list[dict]) -> None:
    """Push files to repos one after the other; print how each of them ended, a line of JSON for each."""
    for job in jobs:
        files = {path: b64decode(data) for path, data in job['files'].items()}
        pauses = job.get('pauses', [.01] * 4)
        try:
            if job.get('create', True):
                hub_client.create_repo(job['repo'], pauses=pauses)
            oid = hub_client.push_files(job['repo'], files, 'a push', pauses=pauses, **job.get('options', {}))
            print(json.dumps({'oid': oid}), flush=True)
        except InputError as error:
            print(json.dumps({'error': str(error)}), flush=True)


@reports_input_errors
def push(pauses: Sequence[float] | None) -> None:
    """Push two files as a program of the package does."""
    pauses = [.01] if pauses is None else pauses
    hub_client.create_repo('org/name', pauses=pauses)
    hub_client.push_files('org/name', {'config.json': b'{}', 'model.safetensors': b'weights'}, 'a push', pauses=pauses)


def push_without_patience() -> None:
    hub_client.TIMEOUT = hub_client.httpx.Timeout(3.)
    push([])


def push_twice_from_disk(*names: str) -> None:
    hub_client.create_repo('org/name', 'dataset', private=True)
    for _ in range(2):
        print(hub_client.push_files('org/name', {name: Path(name) for name in names}, 'files', 'dataset'))


def download(*names: str) -> None:
    """Print of each file whether it is what was pushed, its name 1000 times, and its size."""
    from huggingface_hub import hf_hub_download
    for name in names:
        fetch = functools.partial(hf_hub_download, 'org/name', f'{name}.arrow')
        path = Path(hub_client.retried(f'fetch {name}', fetch))
        print(name, path.read_bytes() == name.encode() * 1000, path.stat().st_size)


def run_commands(*commands: list[str]) -> None:
    """Run commands of timm-tinyvit one after the other; print the status, stdout and stderr of each as JSON."""
    from timm_tinyvit import cli
    ends = []
    for words in commands:
        status, out, err = 0, io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main(words)
            except SystemExit as end:
                status = end.code
        ends.append([status, out.getvalue(), err.getvalue()])
    print(json.dumps(ends))


def push_stores(*commands: list[str]) -> None:
    """Run commands that push stores, in commits of 10 files and with leases that soon expire."""
    from timm_tinyvit.hub import push_store
    push_store.MAX_FILES = 10
    push_store.Leases = functools.partial(push_store.Leases, expire=0.5)
    run_commands(*commands)


def load_validation_split() -> None:
    from timm_tinyvit.data.sources import load_split
    rows = load_split('org/images', None, is_training=False)
    print(len(rows), rows.split, rows.features['label'].names[0], sum(rows['label']))


def load_training_splits(*names: str) -> None:
    from timm_tinyvit.data.sources import load_split
    print([load_split(name, None, is_training=True)['label'][:] for name in names])


def load_sample() -> None:
    import datasets
    splits = datasets.load_dataset('org/logits')
    print(list(splits), len(splits['train']), datasets.get_dataset_config_names('org/logits'))
    print(sorted(splits['train'][0]))


def publish_features(store, data, teacher):
    """Push a store of features, read it from the Hub, check it with its teacher, and push it again."""
    from timm_tinyvit import cli
    from timm_tinyvit.store.remote import open_reader

    data = ['--dataset', data, '--train-split', 'train[:100]']
    cli.main(['store', 'push', store, '--repo', 'org/features', *data])
    remote = open_reader('hf://datasets/org/features')
    assert (remote.read(1, range(100)) == open_reader(store).read(1, range(100))).all()
    cli.main(['store', 'check', 'hf://datasets/org/features', *data, '--teacher', teacher])
    cli.main(['store', 'push', store, '--repo', 'org/features'])
