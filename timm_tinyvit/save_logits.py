"""`accelerate launch -m timm_tinyvit.save_logits`: fill, check and describe a logit store.

The teacher looks once at every view of every epoch; its most probable classes go to disk. Every process takes its
share of the missing shards. Stopped at any moment, the same command fills just what is still missing.
"""

import argparse
from pathlib import Path
from typing import Any
from collections.abc import Callable, Sequence

import datasets
import numpy as np
import torch

from .arguments import (
    STORE_DEFAULTS, ArgumentParser, add_data_arguments, add_store_arguments, add_view_arguments, amp_dtype,
    parse_arguments, view_arguments,
)
from .codec import create_codec
from .dataset import SparseLogitDataset, collate, dataset_fingerprint, load_split
from .errors import InputError, reports_input_errors
from .fill import fill_store
from .launch import create_accelerator
from .replay import Replay, ViewRecipe, check_probe, library_versions
from .sparse import SparseTargets
from .sparsifier import create_sparsifier
from .store import LogitStore, Manifest
from .teacher import Teacher, create_pretrained

__all__ = ['check_store', 'create_store', 'create_teacher', 'describe_store', 'open_store', 'top1']

NUM_CHECKED = 512
NUM_SCORED = 100_000


def create_teacher(args: argparse.Namespace, device: torch.device) -> Teacher:
    """The teacher that the flags name."""
    model = create_pretrained(args.teacher, args.teacher_checkpoint, args.teacher_num_classes)
    # A folder's own name, so that a store says nothing of the machine that made it.
    name = Path(args.teacher).name if Path(args.teacher).exists() else args.teacher
    return Teacher(model, name, device, amp_dtype(args.teacher_amp_dtype), args.teacher_compile)


def open_store(
        path: str,
        given_view: dict[str, Any],
        log: Callable[[str], None] = print,
) -> tuple[LogitStore, Replay]:
    """Open a store whose views this machine can replay.

    Args:
        path: The store.
        given_view: Entries of the view recipe that the user asked for.
        log: Takes the line that says which versions differ while the views do not.

    Raises:
        InputError: There is no store, or its views are not those asked for or not those that this machine makes.
    """
    store = LogitStore.open(path)
    teacher = store.manifest.teacher
    batch_size = teacher.get('batch_size')
    if not {'name', 'weights', 'dtype', 'device', 'input_size'} <= set(teacher) or type(batch_size) is not int or \
            batch_size < 1:
        raise InputError(f'the manifest of {path} says too little of its teacher to go on from; copy the store again')
    recipe = ViewRecipe.from_dict(store.manifest.recipe)
    stored = recipe.to_dict()
    other = [
        f'{key} {value!r} instead of {stored[key]!r}' for key, value in given_view.items() if stored[key] != value]
    if other:
        raise InputError(
            f'these flags ask for other views than the store {path} was made from ({", ".join(other)}); leave them '
            f'out to use the store\'s, or give --logits a new folder')
    replay = Replay(recipe, store.manifest.seed)
    line = check_probe(replay, store.manifest.probe, store.manifest.versions)
    if line:
        log(line)
    return store, replay


def create_store(
        args: argparse.Namespace,
        teacher: Teacher,
        fingerprint: dict[str, Any],
        epochs: int,
        log: Callable[[str], None] = print,
) -> tuple[LogitStore, Replay]:
    """Make the store that the flags describe, or open the one that is there if it is made the same way.

    Settings without a flag come from the store that is there, or else from `STORE_DEFAULTS`.

    Raises:
        InputError: The store that is there was made another way.
    """
    there = None
    settings = dict(STORE_DEFAULTS)
    if LogitStore.exists(args.logits):
        there, replay = open_store(args.logits, view_arguments(args), log)
        manifest = there.manifest
        settings = dict(
            sparsifier=manifest.sparsifier, topk=manifest.k, top_p=manifest.top_p, codec=manifest.codec,
            key=manifest.key, shard_size=manifest.shard_size, store_seed=manifest.seed,
            teacher_batch_size=manifest.teacher['batch_size'])
    settings.update({key: getattr(args, key) for key in settings if getattr(args, key) is not None})
    if there is None:
        replay = Replay(ViewRecipe(**view_arguments(args)), settings['store_seed'])
    try:
        top_p = settings['top_p'] if settings['sparsifier'] == 'nucleus' else 1.0
        sparsifier = create_sparsifier(settings['sparsifier'], settings['topk'], top_p)
        name = settings['codec'] or sparsifier.default_codec
        codec = create_codec(name, teacher.num_classes, settings['topk'], sparsifier.remainder)
    except ValueError as error:
        raise InputError(
            f'{error} (--sparsifier, --topk, --top-p, --codec; the teacher {teacher.name} has '
            f'{teacher.num_classes} classes)')
    for name, low, high in (('shard_size', 1, 1 << 32), ('teacher_batch_size', 1, 1 << 32),
                            ('store_seed', -1 << 63, (1 << 63) - 1)):
        if not low <= settings[name] <= high:
            raise InputError(f'--{name.replace("_", "-")} is {settings[name]}; expected {low} to {high}')
    if not fingerprint['num_samples']:
        raise InputError('the training data are empty; name another --train-split')
    manifest = Manifest(
        num_samples=fingerprint['num_samples'],
        num_classes=teacher.num_classes,
        k=settings['topk'],
        record_width=codec.width,
        epochs=epochs,
        seed=settings['store_seed'],
        shard_size=settings['shard_size'],
        sparsifier=sparsifier.name,
        top_p=top_p,
        remainder=sparsifier.remainder,
        codec=codec.name,
        key=settings['key'],
        teacher=teacher.describe(settings['teacher_batch_size']),
        recipe=replay.recipe.to_dict(),
        versions=library_versions(),
        probe=replay.probe() if there is None else there.manifest.probe,
        dataset=fingerprint,
    )
    return LogitStore.create(args.logits, manifest), replay


def check_store(store: LogitStore, teacher: Teacher, data: SparseLogitDataset) -> dict[str, float]:
    """Run the teacher again on a sample of stored views.

    Returns:
        `views` looked at, `share_of_other_ids`, `mean_error` and `largest_error` of the log-probabilities of ids
        that are in both.

    Raises:
        InputError: The store holds no complete epoch.
    """
    manifest = store.manifest
    epochs = [epoch for epoch in manifest.stored_epochs if not store.missing([epoch])]
    if not epochs:
        raise InputError(f'the store {store.path} holds no complete epoch yet; fill it first')
    picks = np.random.Generator(np.random.PCG64(0))
    count = min(NUM_CHECKED, len(epochs) * store.manifest.num_samples)
    keys = [
        (int(epoch), int(index)) for epoch, index in
        zip(picks.choice(epochs, count), picks.integers(store.manifest.num_samples, size=count))
    ]
    other, errors = 0, []
    batch_size = manifest.teacher['batch_size']
    for start in range(0, count, batch_size):
        batch = collate(data.__getitems__(keys[start:start + batch_size]))
        stored = store.codec.decode(batch['record'])
        fresh = SparseTargets.from_logits(teacher(batch['view']).cpu(), manifest.k)
        same = stored.ids[:, :, None] == fresh.ids[:, None, :]  # [B, k, k]
        other += int((stored.valid & ~same.any(dim=2)).sum())
        rows, here, there = same.nonzero(as_tuple=True)
        errors.append((stored.log_probs[rows, here] - fresh.log_probs[rows, there]).abs())
    error = torch.cat(errors)
    return {
        'views': count,
        'share_of_other_ids': other / (count * store.manifest.k),
        'mean_error': error.mean().item(),
        'largest_error': error.max().item(),
    }


def top1(store: LogitStore, epoch: int, labels: np.ndarray) -> float:
    """Share of views whose most probable stored class is the label, over up to 100,000 samples of a complete epoch.

    Args:
        store: The store.
        epoch: A complete epoch of it.
        labels: Labels of all samples [num_samples].
    """
    indices = np.linspace(0, len(labels) - 1, min(NUM_SCORED, len(labels))).astype(np.int64)
    right = 0
    for part in np.array_split(indices, -(-len(indices) // 4096)):
        records = store.read(epoch, part)
        store.codec.check(records)
        targets = store.codec.decode(torch.from_numpy(records))
        best = targets.log_probs.masked_fill(~targets.valid, -torch.inf).argmax(dim=1, keepdim=True)
        right += int((targets.ids.gather(1, best)[:, 0].numpy() == labels[part]).sum())
    return right / len(indices)


def describe_store(store: LogitStore, labels: np.ndarray | None = None) -> str:
    """The manifest, what is on disk, and with labels the teacher's accuracy, as text."""
    manifest = store.manifest
    missing = store.missing(manifest.stored_epochs)
    incomplete = {epoch for epoch, _ in missing}
    total = manifest.epochs * manifest.num_shards
    views = manifest.epochs * manifest.num_samples
    teacher = manifest.teacher
    lines = [
        f'store            {store.path}',
        f'teacher          {teacher["name"]} (weights {teacher["weights"][:8]}, {teacher["dtype"]}, '
        f'{teacher["device"]}, input {teacher["input_size"][-2]}x{teacher["input_size"][-1]})',
        f'samples          {manifest.num_samples:,} of {manifest.num_classes:,} classes, {manifest.epochs} epochs, '
        f'seed {manifest.seed}',
        f'targets          {manifest.sparsifier}, k = {manifest.k}, remainder {manifest.remainder}',
        f'codec            {manifest.codec}, {manifest.record_width} bytes per view',
        f'shards           {total - len(missing)} of {total} ({manifest.shard_size:,} samples each), '
        f'{manifest.epochs - len(incomplete)} of {manifest.epochs} epochs complete',
        f'size             {store.size() / 1e6:,.1f} MB on disk, {views * manifest.record_width / 1e6:,.1f} MB '
        f'when complete',
        f'views            {", ".join(f"{key}={value}" for key, value in manifest.recipe.items())}',
        f'made with        {", ".join(f"{key} {value}" for key, value in manifest.versions.items())}',
    ]
    complete = [epoch for epoch in manifest.stored_epochs if epoch not in incomplete]
    if labels is None:
        lines.append('teacher accuracy unknown; give --dataset to compare with the labels')
    elif complete:
        scores = [top1(store, epoch, labels) for epoch in complete[:10]]
        lines.append(
            f'teacher accuracy {100 * np.mean(scores):.2f}% top-1 on the views of {len(scores)} epoch(s), '
            f'{100 * min(scores):.2f} to {100 * max(scores):.2f}')
    return '\n'.join(lines)


def read_labels(dataset: datasets.Dataset, label_key: str) -> np.ndarray:
    """All labels of a data set, int64 [N]; -1 where there is none."""
    column = dataset.with_format('arrow').select_columns([label_key])[:][label_key]
    return np.asarray(column.fill_null(-1)).astype(np.int64)


def parse_epochs(text: str) -> range:
    """`30` as epochs 0 to 29, `10:30` as 10 to 29."""
    start, colon, stop = text.partition(':')
    try:
        epochs = range(int(start or 0), int(stop)) if colon else range(int(start))
    except ValueError:
        epochs = range(0)
    if not epochs or epochs.start < 0:
        raise argparse.ArgumentTypeError(f'epochs {text!r} are none; write 30, or 10:30')
    return epochs


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog='save_logits', description=__doc__.split('\n')[0])
    add_data_arguments(parser)
    add_view_arguments(parser)
    add_store_arguments(parser)
    parser.add_argument('--epochs', type=parse_epochs, metavar='A:B', help='epochs to fill, as in 30 or 0:30')
    parser.add_argument('--check', action='store_true', help='run the teacher again on a sample of stored views')
    parser.add_argument('--describe', action='store_true', help='print the manifest, completeness, size and accuracy')
    return parser


def _require(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) is None:
            raise InputError(f'--{name.replace("_", "-")} is missing; see --help')


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the program with these arguments, by default the command line's."""
    args = parse_arguments(_parser(), argv)
    args.dataset = args.dataset or args.data_dir
    _require(args, 'logits')
    accelerator = create_accelerator()
    if args.describe:
        if not accelerator.is_main_process:
            return
        store = LogitStore.open(args.logits)
        labels = None
        if args.dataset:
            dataset = load_split(args.dataset, args.train_split, is_training=True)
            data = SparseLogitDataset(
                dataset, Replay(ViewRecipe.from_dict(store.manifest.recipe), store.manifest.seed), store,
                args.input_key, args.target_key)
            labels = None if data.label_key is None else read_labels(dataset, data.label_key)
        print(describe_store(store, labels))
        return

    _require(args, 'dataset', 'teacher')
    with accelerator.main_process_first():
        dataset = load_split(args.dataset, args.train_split, is_training=True)
    if args.check and not accelerator.is_main_process:
        return
    teacher = create_teacher(args, accelerator.device)
    if args.check:
        store, replay = open_store(args.logits, view_arguments(args))
        data = SparseLogitDataset(dataset, replay, store, args.input_key, args.target_key)
        if teacher.weights != store.manifest.teacher['weights']:
            raise InputError(
                f'{args.teacher} is not the teacher of the store {args.logits}: it was made with '
                f'{store.manifest.teacher["name"]} of other weights; give --teacher that one')
        found = check_store(store, teacher, data)
        print(
            f'{found["views"]} views: {100 * found["share_of_other_ids"]:.3f}% other ids, log-probabilities differ by '
            f'{found["mean_error"]:.2e} in the mean, {found["largest_error"]:.2e} at most')
        return

    _require(args, 'epochs')
    fingerprint = dataset_fingerprint(dataset, args.input_key, args.target_key)
    with accelerator.main_process_first():
        log = print if accelerator.is_main_process else lambda line: None
        store, replay = create_store(args, teacher, fingerprint, args.epochs.stop, log)
        if accelerator.is_main_process:
            store.remove_stale()
    data = SparseLogitDataset(dataset, replay, None, args.input_key, args.target_key)
    fill_store(
        store, teacher, data, args.epochs, accelerator.process_index, accelerator.num_processes, args.workers,
        show_progress=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(describe_store(store).splitlines()[5])
    accelerator.end_training()


if __name__ == '__main__':
    main()
