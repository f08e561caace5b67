"""Train a timm model on images, with or without the stored targets of a teacher.

    accelerate launch train_distill.py --dataset DATA --model tiny_vit_5m_224 --logits STORE

One story from top to bottom: settings, data, teacher and store, student, optimiser, resume, loop. With `--logits` the
student learns from the store at the cost of plain training; without, this is a plain trainer in the way of timm's
train.py. Stopped at any moment, the same command goes on from the last checkpoint. Method: TinyViT (ECCV 2022,
arXiv 2207.10666).
"""

import argparse
import csv
import io
import math
import operator
import random
import time
import warnings
from pathlib import Path
from typing import Any
from collections.abc import Sequence

import numpy as np
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from timm.data import create_transform, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ParseKwargs, dispatch_clip_grad
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import timm_tinyvit  # noqa: F401  registers the models
from timm_tinyvit.arguments import (
    STORE_DEFAULTS, ArgumentParser, add_data_arguments, add_store_arguments, add_view_arguments, parse_arguments,
    view_arguments,
)
from timm_tinyvit.dataset import (
    EpochBatchSampler, ImageDataset, SparseLogitDataset, class_names, collate, dataset_fingerprint, find_column,
    load_split,
)
from timm_tinyvit.errors import InputError, reports_input_errors
from timm_tinyvit.fill import fill_store
from timm_tinyvit.hub import export_model
from timm_tinyvit.launch import create_accelerator, progress_seconds
from timm_tinyvit.replay import Replay, ViewRecipe
from timm_tinyvit.report import plot_metrics
from timm_tinyvit.save_logits import create_store, create_teacher, open_store, read_labels
from timm_tinyvit.sparse import sparse_soft_target_cross_entropy
from timm_tinyvit.store import LogitStore, write_aside
from timm_tinyvit.teacher import ModelInput

# What may change between a run and its resumption: nothing of it has a hand in the weights. Data and store may move;
# it is their content that is compared.
FREE_SETTINGS = {
    'workers', 'log_interval', 'checkpoint_hist', 'recovery_interval', 'val_interval', 'validation_batch_size',
    'config', 'output', 'experiment', 'teacher', 'teacher_checkpoint', 'teacher_compile', 'quiet', 'dataset',
    'data_dir', 'val_split', 'logits',
}


def settings(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of this script: timm's names, with defaults near the paper's."""
    parser = ArgumentParser(prog='train_distill', description=__doc__.split('\n')[0])
    add_data_arguments(parser)
    parser.add_argument('--val-split', metavar='NAME', help='evaluation split, validation or test by default')
    add_view_arguments(parser)
    add_store_arguments(parser)
    group = parser.add_argument_group('distillation')
    group.add_argument('--store-epochs', type=int, metavar='E',
                       help='epochs that the store is meant to hold (default: its own, or --epochs)')
    group.add_argument('--alpha', type=float, default=1., metavar='A',
                       help='weight of the distillation loss; the label loss has 1 - A')
    group.add_argument('--temperature', '--kd-temperature', type=float, default=1., metavar='T',
                       help='softens teacher and student')
    group = parser.add_argument_group('student')
    group.add_argument('--model', default='tiny_vit_5m_224', metavar='NAME', help='timm name of the student')
    group.add_argument('--pretrained', action='store_true', help='start from pretrained weights')
    group.add_argument('--initial-checkpoint', metavar='FILE', help='start from these weights')
    group.add_argument('--num-classes', type=int, metavar='N', help='classes (default: the store\'s or the data\'s)')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, help='as in depths=[2,2,2,2]')
    group.add_argument('--drop', type=float, default=0., metavar='P', help='dropout')
    group.add_argument('--drop-path', type=float, metavar='P', help='stochastic depth')
    group = parser.add_argument_group('optimisation')
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='per process')
    group.add_argument('--epochs', type=int, default=300, metavar='N', help='epochs to train')
    group.add_argument('--opt', default='adamw', metavar='NAME', help='timm optimiser')
    group.add_argument('--opt-eps', type=float, metavar='X', help='its epsilon')
    group.add_argument('--opt-betas', type=float, nargs='+', metavar='B', help='its betas')
    group.add_argument('--momentum', type=float, default=0.9, metavar='M', help='its momentum')
    group.add_argument('--weight-decay', type=float, default=0.05, metavar='W', help='not on norms and biases')
    group.add_argument('--clip-grad', type=float, default=5., metavar='NORM', help='gradient clipping, 0 for none')
    group.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='how to clip')
    group.add_argument('--layer-decay', type=float, metavar='D', help='layer-wise learning-rate decay')
    group.add_argument('--sched', default='cosine', metavar='NAME', help='timm schedule, stepped by update')
    group.add_argument('--lr', type=float, metavar='LR', help='peak learning rate (default: from --lr-base)')
    group.add_argument('--lr-base', type=float, default=5e-4, metavar='LR', help='learning rate per --lr-base-size')
    group.add_argument('--lr-base-size', type=int, default=512, metavar='N', help='images per step of --lr-base')
    group.add_argument('--warmup-lr', type=float, default=5e-7, metavar='LR', help='learning rate of the first step')
    group.add_argument('--warmup-epochs', type=float, default=5, metavar='N', help='epochs of warm-up')
    group.add_argument('--min-lr', type=float, default=5e-6, metavar='LR', help='learning rate at the end')
    group.add_argument('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs more at --min-lr')
    group.add_argument('--decay-epochs', type=float, default=30, metavar='N', help='of the step schedule')
    group.add_argument('--decay-rate', type=float, default=0.1, metavar='R', help='of the step schedule')
    group.add_argument('--smoothing', type=float, default=0.1, metavar='S', help='label smoothing of the label loss')
    group.add_argument('--amp-dtype', choices=('bfloat16', 'float16'), help='autocast the student')
    group.add_argument('--channels-last', action='store_true', help='channels-last memory format')
    group.add_argument('--seed', type=int, default=42, metavar='S', help='weights, order and dropout')
    group = parser.add_argument_group('evaluation and output')
    group.add_argument('-vb', '--validation-batch-size', type=int, metavar='N', help='(default: --batch-size)')
    group.add_argument('--val-interval', type=int, default=1, metavar='N', help='epochs between evaluations')
    group.add_argument('--crop-pct', type=float, metavar='P', help='evaluation crop (default: the model\'s)')
    group.add_argument('--interpolation', metavar='NAME', help='evaluation resize (default: the model\'s)')
    group.add_argument('--output', default='./output/train', metavar='DIR', help='folder of runs')
    group.add_argument('--experiment', metavar='NAME', help='folder of this run (default: the model\'s name)')
    group.add_argument('--checkpoint-hist', type=int, default=2, metavar='N', help='checkpoints to keep')
    group.add_argument('--recovery-interval', type=int, default=0, metavar='N', help='steps between checkpoints')
    group.add_argument('--log-interval', type=int, default=50, metavar='N', help='steps between looks at the loss')
    group.add_argument('--quiet', action='store_true', help='no progress bars')
    args = parse_arguments(parser, argv)
    args.dataset = args.dataset or args.data_dir
    if not args.dataset:
        raise InputError('--dataset is missing: a Hub name, or a folder of parquet files or images')
    at_least = dict(
        batch_size=1, validation_batch_size=1, epochs=1, store_epochs=1, val_interval=1, checkpoint_hist=1,
        log_interval=1, num_classes=1, lr_base_size=1, workers=0, recovery_interval=0, warmup_epochs=0,
        cooldown_epochs=0, seed=0, alpha=0, smoothing=0, drop=0, drop_path=0, weight_decay=0, clip_grad=0, momentum=0)
    at_most = dict(alpha=1, smoothing=1, drop=1, drop_path=1, crop_pct=1, seed=2**32 - 1)
    above = dict(temperature=0, crop_pct=0, lr=0, lr_base=0, layer_decay=0)
    for limits, holds, words in (
        (at_least, operator.ge, 'at least'), (at_most, operator.le, 'at most'), (above, operator.gt, 'more than'),
    ):
        for name, limit in limits.items():
            value = getattr(args, name)
            if value is not None and not holds(value, limit):
                raise InputError(f'--{name.replace("_", "-")} is {value}; expected {words} {limit}')
    if args.sched == 'none':
        raise InputError('--sched none is not a schedule here; use --sched constant')
    if args.teacher and not args.logits:
        raise InputError('--teacher without --logits: name the folder that keeps what the teacher says')
    return args


def prepare_store(
        args: argparse.Namespace,
        accelerator: Accelerator,
        dataset: Any,
        log: Any,
) -> tuple[LogitStore, Replay]:
    """The filled store of `--logits`; with `--teacher`, epochs that it lacks are filled first."""
    num_epochs = args.epochs + args.cooldown_epochs
    if args.teacher:
        fingerprint = dataset_fingerprint(dataset, args.input_key, args.target_key)
        teacher = create_teacher(args, accelerator.device)
        with accelerator.main_process_first():
            known = LogitStore.open(args.logits).manifest.epochs if LogitStore.exists(args.logits) else num_epochs
            store, replay = create_store(args, teacher, fingerprint, args.store_epochs or known, log)
            if accelerator.is_main_process:
                store.remove_stale()
        needed = store.manifest.stored_epochs[:num_epochs]
        data = SparseLogitDataset(dataset, replay, None, args.input_key, args.target_key)
        fill_store(
            store, teacher, data, needed, accelerator.process_index, accelerator.num_processes, args.workers,
            show_progress=accelerator.is_main_process and not args.quiet)
        accelerator.wait_for_everyone()
    else:
        store, replay = open_store(args.logits, view_arguments(args), log)
    missing = store.missing(store.manifest.stored_epochs[:num_epochs])
    if missing:
        raise InputError(
            f'the store {args.logits} lacks {len(missing)} shards, the first of epoch {missing[0][0]}; give its '
            f'--teacher to fill them, or run the save_logits command that made it again')
    if store.manifest.epochs < num_epochs:
        log(f'the store has {store.manifest.epochs} epochs for {num_epochs}: epoch e uses e modulo '
            f'{store.manifest.epochs}')
    return store, replay


def check_labels(dataset: Any, label_key: str | None, num_classes: int, flag: str) -> None:
    """Refuse a split whose labels the student cannot have."""
    if label_key is None:
        raise InputError(f'the data of {flag} have no label column, only {", ".join(dataset.column_names)}; '
                         f'name it with --target-key')
    if not len(dataset):
        raise InputError(f'the data of {flag} are empty; name another split')
    labels = read_labels(dataset, label_key)
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        raise InputError(f'sample {bad[0]} of {flag} has label {labels[bad[0]]} (-1 stands for none), the student has '
                         f'{num_classes} classes; check --target-key, --num-classes and {flag}')


def create_student(args: argparse.Namespace, num_classes: int, size: tuple[int, int]) -> nn.Module:
    """The student for views of this size."""
    rates = {'drop_rate': args.drop, **({} if args.drop_path is None else {'drop_path_rate': args.drop_path})}
    try:
        model = timm.create_model(
            args.model, pretrained=args.pretrained, num_classes=num_classes,
            checkpoint_path=args.initial_checkpoint or '', **rates, **args.model_kwargs)
        if hasattr(model, 'set_input_size'):
            model.set_input_size(img_size=size)
        # Models of a fixed size say so only when they see another one.
        model.eval()(torch.zeros(1, 3, *size))
    except Exception as error:
        # Unknown names, arguments, files and Hub failures each raise their own kind.
        reason = f'{type(error).__name__} {error}'.splitlines()[0]
        raise InputError(f'the student {args.model} cannot be made for {size[0]}x{size[1]} pixels: {reason}; check '
                         f'--model, --model-kwargs, --img-size and --initial-checkpoint')
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


@torch.inference_mode()
def evaluate(model: nn.Module, prepare: ModelInput, loader: DataLoader, accelerator: Accelerator) -> dict[str, float]:
    """Loss, top-1 and top-5 accuracy in percent over the samples of all ranks.

    The model is the bare one: ranks may have different numbers of batches, and DDP's forward would wait for all.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # loss, top-1, top-5, samples
    for batch in loader:
        labels = batch['label'].to(accelerator.device)
        with accelerator.autocast():
            logits = model(prepare(batch['view'].to(accelerator.device)))
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [B, 5]
        loss = nn.functional.cross_entropy(logits, labels, reduction='sum')
        sums += torch.stack([loss, best[:, 0].sum(), best.sum(), loss.new_tensor(len(labels))]).double().cpu()
    loss, top1, top5, count = accelerator.reduce(sums.to(accelerator.device, torch.float32), 'sum').tolist()
    return {'eval_loss': loss / count, 'eval_top1': 100 * top1 / count, 'eval_top5': 100 * top5 / count}


def eval_config(args: argparse.Namespace, model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """How images are prepared for evaluation: the model's configuration, changed by the flags, at this size."""
    flags = {'crop_pct': args.crop_pct, 'interpolation': args.interpolation or '', 'input_size': (3, *size)}
    return resolve_data_config(flags, model=model)


def eval_loader(
        dataset: Any,
        config: dict[str, Any],
        args: argparse.Namespace,
        rank: int,
        world_size: int,
) -> DataLoader:
    """This rank's part of an evaluation split, as uint8 batches."""
    try:
        transform = create_transform(
            config['input_size'], crop_pct=config['crop_pct'], crop_mode=config['crop_mode'],
            interpolation=config['interpolation'], normalize=False)
    except (KeyError, ValueError) as error:
        raise InputError(f'timm cannot make the evaluation transform: {error!r}; check --interpolation')
    data = ImageDataset(dataset, transform, args.input_key, args.target_key)
    return DataLoader(
        Subset(data, range(rank, len(data), world_size)), batch_size=args.validation_batch_size or args.batch_size,
        num_workers=args.workers, collate_fn=collate, generator=torch.Generator())


def random_state() -> dict[str, Any]:
    """State of this rank's generators, of types that load with `weights_only`."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        'python': random.getstate(),
        'numpy': (kind, keys.tolist(), position, has_gauss, gauss),
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put this rank's generators back."""
    random.setstate(state['python'])
    np.random.set_state((state['numpy'][0], np.array(state['numpy'][1], dtype=np.uint32), *state['numpy'][2:]))
    torch.set_rng_state(state['torch'])
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


def save_checkpoint(folder: Path, state: dict[str, Any], keep: int) -> None:
    """Write a checkpoint aside, rename it, and remove all but the last ones."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_aside(folder / f'checkpoint-{state["epoch"]:04d}-{state["step"]:06d}.pt', buffer.getbuffer())
    for old in sorted(folder.glob('checkpoint-*.pt'))[:-keep]:
        old.unlink()


def load_last_checkpoint(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The last checkpoint of this run, or None; refuses one of other settings."""
    files = sorted(folder.glob('checkpoint-*.pt'))
    if not files:
        return None
    try:
        state = torch.load(files[-1], map_location='cpu', weights_only=True)
    except Exception as error:
        raise InputError(f'the checkpoint {files[-1]} cannot be read ({type(error).__name__}); delete it to go on '
                         f'from the one before')
    there = state['settings']
    other = [f'{key} {there.get(key)!r} there and {settings.get(key)!r} here' for key in {**there, **settings}
             if there.get(key) != settings.get(key)]
    if other:
        raise InputError(f'the run in {folder} was started with other settings ({", ".join(other[:4])}); give the '
                         f'same ones to resume it, or another --experiment')
    return state


def write_metrics(folder: Path, history: list[dict[str, float]]) -> None:
    """All epochs so far as metrics.csv, and their plot."""
    columns = list({key: None for row in history for key in row})
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(history)
    write_aside(folder / 'metrics.csv', text.getvalue().encode())
    plot_metrics(folder / 'metrics.csv', folder / 'metrics.png')


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Train with these arguments, by default the command line's."""
    args = settings(argv)
    accelerator = create_accelerator(args.amp_dtype)
    # Depthwise weights have one stride too many to tell the layouts apart; DDP asks each time and copies nothing.
    warnings.filterwarnings('ignore', message='Grad strides do not match')
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    show = accelerator.is_main_process

    def log(line: str) -> None:
        if show:
            tqdm.write(line)

    folder = Path(args.output) / (args.experiment or args.model.replace('/', '_').replace(':', '_'))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'the folder {folder} cannot be made: {error.strerror}; choose another --output')

    # Data. Each rank loads the same rows; the samplers share them out.
    with accelerator.main_process_first():
        train_set = load_split(args.dataset, args.train_split, is_training=True)
        val_set = load_split(args.dataset, args.val_split, is_training=False)

    # Teacher and store. The store says how its views are made; without one the flags do.
    store = None
    if args.logits:
        store, replay = prepare_store(args, accelerator, train_set, log)
    else:
        replay = Replay(ViewRecipe(**view_arguments(args)), args.store_seed or STORE_DEFAULTS['store_seed'])
    train_data = SparseLogitDataset(train_set, replay, store, args.input_key, args.target_key)
    size = tuple(replay.recipe.input_size[-2:])

    # What decides the weights: these settings, and the content of data and store.
    decisive = {key: value for key, value in vars(args).items() if key not in FREE_SETTINGS}
    decisive['data'] = dataset_fingerprint(train_set, args.input_key, args.target_key)
    decisive['store'] = store.manifest.identity if store else None
    state = load_last_checkpoint(folder, decisive)
    if state is not None and len(state['random']) != world_size:
        raise InputError(f'the run in {folder} was started with {len(state["random"])} process(es), not {world_size}; '
                         f'launch as many to resume it, or give another --experiment')
    if state is None and show:
        write_aside(folder / 'args.yaml', yaml.safe_dump(vars(args), default_flow_style=None).encode())

    # Student.
    label_key = find_column(train_set, args.target_key, is_image=False)
    names = class_names(train_set, label_key) if label_key else None
    num_classes = args.num_classes or (store.manifest.num_classes if store else len(names) if names else 0)
    if not num_classes:
        raise InputError('the number of classes is not known from the data; give --num-classes')
    if store and num_classes != store.manifest.num_classes:
        raise InputError(f'the student has {num_classes} classes, the store {args.logits} '
                         f'{store.manifest.num_classes}; leave --num-classes out, or use another store')
    if store is None or args.alpha < 1:
        check_labels(train_set, label_key, num_classes, '--train-split')
    check_labels(val_set, find_column(val_set, args.target_key, is_image=False), num_classes, '--val-split')
    set_seed(args.seed)
    student = create_student(args, num_classes, size)
    config = eval_config(args, student, size)
    prepare = ModelInput(config['mean'], config['std']).to(device)
    val_loader = eval_loader(val_set, config, args, rank, world_size)

    # Optimiser and schedule, by update.
    sampler = EpochBatchSampler(
        len(train_data), args.batch_size, args.seed, rank, world_size, store.manifest.stored_epochs if store else None)
    # A generator of its own: a loader draws a seed whenever it starts, and a resumed epoch starts once more.
    loader = DataLoader(
        train_data, batch_sampler=sampler, num_workers=args.workers, collate_fn=collate, generator=torch.Generator(),
        persistent_workers=args.workers > 0, pin_memory=device.type == 'cuda')
    lr = args.lr or args.lr_base * args.batch_size * world_size / args.lr_base_size
    try:
        optimizer = create_optimizer_v2(student, **{**optimizer_kwargs(args), 'lr': lr})
        scheduler, num_epochs = create_scheduler_v2(
            optimizer, **{**scheduler_kwargs(args), 'step_on_epochs': False}, updates_per_epoch=len(sampler))
    except (AssertionError, IndexError, TypeError, ValueError) as error:
        raise InputError(f'timm cannot make the optimiser {args.opt} or the schedule {args.sched}: {error}')
    alpha = args.alpha if store is not None else 0.
    label_loss = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
    model, optimizer = accelerator.prepare(student, optimizer)

    # Resume, where there is something to resume.
    history: list[dict[str, float]] = []
    first_epoch, first_step, best = 0, 0, -1.
    sums = torch.zeros(3, device=device)  # loss, label loss, distillation loss of the epoch so far
    if state is not None:
        student.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        scheduler.load_state_dict(state['scheduler'])
        first_epoch, first_step, best, history = (state[key] for key in ('epoch', 'step', 'best', 'history'))
        sums = state['sums'][rank].to(device)
        set_random_state(state['random'][rank])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state['scaler'])
        log(f'resuming {folder} at epoch {first_epoch}, step {first_step}')
    else:
        # Ranks must not drop the same paths.
        set_seed(args.seed + rank)

    def checkpoint(epoch: int, step: int) -> None:
        randoms, all_sums = gather_object([random_state()]), gather_object([sums.cpu()])
        if show:
            save_checkpoint(folder, {
                'epoch': epoch, 'step': step, 'best': best, 'history': history, 'sums': all_sums, 'random': randoms,
                'model': student.state_dict(), 'optimizer': optimizer.state_dict(),
                'scheduler': scheduler.state_dict(), 'settings': decisive,
                'scaler': None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            }, args.checkpoint_hist)

    # The loop.
    num_params = sum(p.numel() for p in student.parameters())
    log(f'{args.model}: {num_params / 1e6:.1f} M parameters, views {size[0]}x{size[1]}, {len(train_data):,} images, '
        f'{len(sampler)} steps of {args.batch_size * world_size} an epoch, {world_size} process(es) on {device.type}')
    for epoch in range(first_epoch, num_epochs):
        model.train()
        sampler.set_epoch(epoch, first_step)
        start, waited = time.time(), 0.
        bar = tqdm(
            loader, total=len(sampler), initial=first_step, desc=f'epoch {epoch + 1}/{num_epochs}', unit='step',
            leave=False, disable=not show or args.quiet, mininterval=progress_seconds())
        tick = time.time()
        for step, batch in enumerate(bar, start=first_step):
            waited += time.time() - tick
            scheduler.step_update(epoch * len(sampler) + step)
            views = prepare(batch['view'].to(device, non_blocking=True))
            labels = batch['label'].to(device, non_blocking=True)
            if args.channels_last:
                views = views.contiguous(memory_format=torch.channels_last)
            with accelerator.autocast():
                logits = model(views)
            label_part = distill_part = torch.zeros((), device=device)
            if alpha < 1:
                label_part = label_loss(logits.float(), labels)
            if store is not None:
                targets = store.codec.decode(batch['record'].to(device, non_blocking=True))
                distill_part = sparse_soft_target_cross_entropy(logits, targets, args.temperature)
            # Temperature squared keeps the size of the gradients.
            loss = (1 - alpha) * label_part + alpha * args.temperature ** 2 * distill_part
            optimizer.zero_grad()
            accelerator.backward(loss)
            if args.clip_grad:
                accelerator.unscale_gradients(optimizer)
                dispatch_clip_grad(student.parameters(), args.clip_grad, mode=args.clip_mode)
            optimizer.step()
            sums += torch.stack([loss, label_part, distill_part]).detach()
            if step % args.log_interval == 0:
                bar.set_postfix(loss=f'{loss.item():.3f}', lr=f'{optimizer.param_groups[0]["lr"]:.1e}')
            if args.recovery_interval and (step + 1) % args.recovery_interval == 0 and step + 1 < len(sampler):
                checkpoint(epoch, step + 1)
            tick = time.time()
        bar.close()

        seconds = time.time() - start
        means = accelerator.reduce(sums / len(sampler), 'mean').tolist()
        row = {
            'epoch': epoch, 'lr': optimizer.param_groups[0]['lr'], 'loss': means[0], 'label_loss': means[1],
            'distill_loss': means[2], 'seconds': seconds, 'data_wait': waited / seconds,
            'images_per_second': (len(sampler) - first_step) * args.batch_size * world_size / seconds,
        }
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == num_epochs:
            row.update(evaluate(student, prepare, val_loader, accelerator))
        if not math.isfinite(row['loss']):
            raise InputError(f'the loss of epoch {epoch + 1} is {row["loss"]}; lower --lr, or leave --amp-dtype out')
        history.append(row)
        first_step = 0
        sums.zero_()
        is_best = row.get('eval_top1', -1.) > best
        best = max(best, row.get('eval_top1', -1.))
        if show:
            write_metrics(folder, history)
            export_model(folder / 'last', student, names, config)
            if is_best:
                export_model(folder / 'best', student, names, config)
        log(f'epoch {epoch + 1}/{num_epochs}: loss {row["loss"]:.3f}'
            + (f', top-1 {row["eval_top1"]:.2f}% (best {best:.2f}%)' if 'eval_top1' in row else '')
            + f', {row["images_per_second"]:.0f} images/s, {100 * row["data_wait"]:.0f}% waiting for data')
        checkpoint(epoch + 1, 0)
    log(f'finished: {folder}, best top-1 {best:.2f}%')
    accelerator.end_training()


if __name__ == '__main__':
    main()
