"""Models on the Hub: weights, configuration and card in one commit, or nothing at all.

    timm-tinyvit publish output/train/tiny_vit_5m_224 --repo ORG/NAME

takes the folder of a training, or one that `timm-tinyvit convert` made, and `timm.create_model('hf-hub:ORG/NAME',
pretrained=True)` makes the model anywhere. Pushed again unchanged it makes no second commit: nothing of what is pushed
depends on when and where that happens. The card is written anew each time; `--notes` adds words of your own.
"""

import json
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from timm.models._hub import HF_SAFE_WEIGHTS_NAME

from ..base.console import print_result
from ..base.errors import InputError
from ..base.files import read_bounded, write_atomic
from ..base.hub_client import check_license, check_repo_id, create_repo, push_files, retried
from ..base.launch import device_name
from ..base.types import COUNT, Number, mismatch, read_json
from ..models.loading import check_weights, create_model
from ..train.metrics import METRICS
from ..train.record import read_run
from .model_card import (
    CARD, NO_REPO, PICTURE, TAG, card_metadata, has_text, read_weights, recipe_yaml, run_card,
)

__all__ = ['model_files', 'prepare_push', 'publish', 'push_finished_run']

SPEED = 'speed.json'
SPEED_SECONDS = 2.
SPEED_KINDS = {
    'images_per_second': Number(0, 1e15), 'batch_size': COUNT, 'device': str, 'threads': COUNT, 'torch': str}
MAX_CARD_BYTES = 1 << 22
MODEL = ('config.json', HF_SAFE_WEIGHTS_NAME)
# Endings of files with weights, of whatever library.
WEIGHTS = (
    '.bin', '.ckpt', '.gguf', '.h5', '.keras', '.msgpack', '.onnx', '.ot', '.pkl', '.pt', '.pth', '.safetensors',
    '.tflite')
# What a push may write; of these the repo keeps none that the newest push has not.
FILES = (CARD, *MODEL, METRICS, PICTURE, 'recipe.yaml')


def prepare_push(repo: str, private: bool = False, license: str | None = None) -> None:
    """Make the repo before a long run, and know that its model can be pushed.

    Raises:
        InputError: It cannot.
    """
    try:
        check_license(license)
        _open_repo(repo, private)
    except InputError as error:
        raise InputError(f'{error}; or leave --push-to-hub out, and push the run later with timm-tinyvit publish')


def push_finished_run(folder: Path, repo: str, private: bool = False, license: str | None = None) -> None:
    """Push the best model of a run that has ended.

    Raises:
        InputError: It did not work out; the message says how to do it again.
    """
    try:
        print_result(publish(folder, repo, private=private, license=license))
    except InputError as error:
        again = f'timm-tinyvit publish {folder} --repo {repo}' + (f' --license {license}' if license else '')
        raise InputError(f'the run is finished and its models are in {folder}, but nothing was pushed: {error}; to '
                         f'push them: {again}{" --private" if private else ""}')


def publish(
        folder: Path,
        repo: str,
        which: str | None = None,
        private: bool = False,
        license: str | None = None,
        notes: str | Path = '',
        dry_run: str | Path | None = None,
) -> str:
    """Push a model in one commit.

    Args:
        folder: What to push, as in `model_files`.
        repo: ORG/NAME; made unless it exists.
        which: The weights of a run.
        private: Make a new repo a private one.
        license: The licence of the weights, as the Hub spells it.
        notes: Markdown of the publisher's for the card, or its file.
        dry_run: A folder that takes the files instead of the Hub.

    Returns:
        A line for the user: what was pushed, and where it is.

    Raises:
        InputError: Something is missing in the folder, or the push did not work out; the repo is as it was.
    """
    if isinstance(notes, Path):
        try:
            notes = notes.read_text(encoding='utf-8')
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f'{notes} cannot be read ({error}); give --notes a text file')
    if dry_run is not None:
        files = model_files(folder, repo, which, license, notes)
        for name, content in files.items():
            write_atomic(Path(dry_run) / name, content if isinstance(content, bytes) else content.read_bytes())
        return f'{dry_run}: {", ".join(files)}, as they would be pushed to {repo}'
    model, kind = _find_model(Path(folder), which)
    if kind is None:
        _own_card(model, repo, license, notes)
    check_license(license)
    files = model_files(folder, repo, which, license, notes, _open_repo(repo, private))
    commit = push_files(
        repo, files, f'Push {Path(folder).resolve().name} with timm_tinyvit',
        delete=[name for name in FILES if name not in files])
    url = f'{constants.ENDPOINT}/{repo}'
    return f'published: {url} (commit {commit})' if commit else f'published: {url} had all of it already'


def model_files(
        folder: Path,
        repo: str,
        which: str | None = None,
        license: str | None = None,
        notes: str = '',
        before: str = '',
) -> dict[str, bytes | Path]:
    """What a push brings to a repo, by path there.

    Args:
        folder: A run, one of the model folders in it, or a folder that `convert` made.
        repo: ORG/NAME.
        which: The weights of a run: `best`, `last`, `best_ema` or `last_ema`; by default the most accurate ones.
        license: The licence of the weights.
        notes: Markdown for the card.
        before: The card that is replaced.

    Raises:
        InputError: The folder is no such folder, or lacks something.
    """
    check_repo_id(repo)
    folder, which = _find_model(Path(folder), which)
    check_weights(folder / (which or '') / HF_SAFE_WEIGHTS_NAME)
    if which is None:
        return {CARD: _own_card(folder, repo, license, notes), **{name: folder / name for name in MODEL}}
    card = str(run_card(folder, which, repo, license, notes, _speed(folder, folder / which), before))
    files: dict[str, bytes | Path] = {
        CARD: card.encode(), **{name: folder / which / name for name in MODEL}, METRICS: folder / METRICS,
        'recipe.yaml': recipe_yaml(read_run(folder)).encode()}
    if missing := next((path for path in files.values() if isinstance(path, Path) and not path.is_file()), None):
        raise InputError(f'there is no file {missing}, or it is none; let the run write it again, or choose other '
                         f'weights with --which')
    return {**files, PICTURE: folder / PICTURE} if (folder / PICTURE).is_file() else files


def _find_model(folder: Path, which: str | None) -> tuple[Path, str | None]:
    """The folder of a run and the name of its weights, or a folder of a model with a card and None.

    Raises:
        InputError: It is neither.
    """
    if (folder / 'config.json').is_file() and (folder.parent / METRICS).is_file() and which in (None, folder.name):
        folder, which = folder.parent, folder.name
    if (folder / METRICS).is_file():
        read_run(folder, is_whole=True)
        names = [weights.name for weights in read_weights(folder)]
        if not names or which not in (None, *names):
            raise InputError(f'{folder} has no weights {which or "yet"}, only {", ".join(names) or METRICS}; choose '
                             f'others with --which, or let the run end an epoch')
        return folder, which or names[0]
    if which is not None or not all((folder / name).is_file() for name in (CARD, *MODEL)):
        raise InputError(
            f'{folder} is neither a run of timm-tinyvit train, with {METRICS}, nor a model with a card, {CARD} beside '
            f'{" and ".join(MODEL)}, as timm-tinyvit convert makes them; name a folder that is')
    return folder, None


def _own_card(folder: Path, repo: str, license: str | None, notes: str) -> bytes:
    """The card of a folder that `convert` made.

    Raises:
        InputError: It cannot have that licence or those notes, or lacks the tag of this package.
    """
    if license or notes:
        raise InputError(f'{folder} has a card of its own; edit its {CARD} instead of giving --license or --notes')
    try:
        card = read_bounded(folder / CARD, MAX_CARD_BYTES).decode().replace(NO_REPO, repo)
    except (OSError, ValueError) as error:
        raise InputError(f'{folder / CARD} cannot be read ({error}); fix it')
    if not _is_ours(card):
        raise InputError(f'{folder / CARD} has no tag {TAG}, by which the next push knows the repo as its own; add it '
                         f'to the tags in its head')
    return card.encode()


def _is_ours(card: str) -> bool:
    tags = card_metadata(card).get('tags')
    return TAG in (tags if isinstance(tags, list) else [tags])


def _open_repo(repo: str, private: bool) -> str:
    """Make a repo unless it exists, and read its card; empty where it has none.

    Raises:
        InputError: It cannot be written to, or holds a model of somebody else.
    """
    create_repo(repo, private=private or None)

    def download() -> str:
        with TemporaryDirectory() as folder:
            try:
                return Path(hf_hub_download(repo, CARD, local_dir=folder)).read_text(encoding='utf-8', errors='replace')
            except RemoteEntryNotFoundError:
                return ''

    card = retried(f'read the card of {repo}', download)
    if not _is_ours(card):
        names = retried(f'list the files of {repo}', lambda: HfApi().list_repo_files(repo))
        foreign = [name for name in names if name != CARD and (name in FILES or name.endswith(WEIGHTS))]
        foreign += [CARD] if has_text(card) else []
        if foreign:
            raise InputError(f'the model repo {repo} holds something else, {foreign[0]}; name another repo, or where '
                             f'it may be replaced, give its {CARD} the tag {TAG}')
    return card


def _speed(run: Path, model: Path) -> dict[str, Any] | None:
    """Speed of inference on this machine, measured once and kept, so that the same run has the same card again."""
    file = run / SPEED
    try:
        speed = read_json(read_bounded(file, MAX_CARD_BYTES))
        if mismatch(speed, SPEED_KINDS, '') is None:
            return speed
    except (OSError, ValueError):
        pass
    try:
        speed = _measure_speed(model)
        write_atomic(file, json.dumps(speed, indent=2).encode())
        return speed
    except (InputError, RuntimeError):
        # No room for the model beside others, or for the file: a card without it.
        return None


@torch.inference_mode()
def _measure_speed(folder: Path) -> dict[str, Any]:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device('cpu')
    model = create_model(f'local-dir:{folder}', pretrained=True).to(device).eval()
    batch_size = 16 if device.type == 'cpu' else 128
    images = torch.zeros(batch_size, *timm.data.resolve_model_data_config(model)['input_size'], device=device)
    seconds: list[float] = []
    start = time.perf_counter()
    # The first pass warms up.
    while len(seconds) < 2 or time.perf_counter() - start < SPEED_SECONDS:
        tick = time.perf_counter()
        model(images)
        if device.type != 'cpu':
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - tick)
    return {
        'images_per_second': batch_size / median(seconds[1:]), 'batch_size': batch_size,
        'device': device_name(device), 'threads': torch.get_num_threads() if device.type == 'cpu' else 0,
        'torch': torch.__version__}
