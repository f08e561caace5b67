"""Train a timm model on images, with or without the stored targets of a teacher.

    accelerate launch train_distill.py --dataset DATA --model tiny_vit_5m_224 --logits STORE

One story from top to bottom: flags, data, teacher and store, student, optimiser, resume, loop. With `--logits` the
student learns from the store at the cost of plain training; without, this is a plain trainer in the way of timm's
train.py. Stopped at any moment, the same command goes on from the last checkpoint. Method: TinyViT (ECCV 2022,
arXiv 2207.10666).
"""

import argparse
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

import timm_tinyvit  # noqa: F401  registers the models
from timm_tinyvit.base.console import best_effort, info, print_result, progress, setup_console
from timm_tinyvit.base.errors import Diverged, InputError, reports_input_errors
from timm_tinyvit.base.launch import (
    StepFlags, all_reduce_sum, catch_stop_signals, create_accelerator, end_training, make_deterministic, start_trackers,
    stop_with_launcher,
)
from timm_tinyvit.config.arguments import (
    STORE_DEFAULTS, check_store_flags, given_settings, new_store_arguments, view_arguments,
)
from timm_tinyvit.config.training import check_launch, settings
from timm_tinyvit.data.classes import Classes, resolve_classes
from timm_tinyvit.data.opening import open_stores
from timm_tinyvit.data.sources import load_split
from timm_tinyvit.data.view_config import ViewConfig
from timm_tinyvit.data.views import Replay
from timm_tinyvit.hub.push_model import prepare_push, push_finished_run
from timm_tinyvit.report.plots import plot_metrics
from timm_tinyvit.report.run import REPORT, write_run_report
from timm_tinyvit.store.base import StoreReader
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.teacher.creating import create_store, create_teacher, grid_of, views_to_fill
from timm_tinyvit.teacher.fill import fill_epochs
from timm_tinyvit.train.batches import TrainBatches, worker_errors
from timm_tinyvit.train.checkpoint import TrainState, checkpoints_of, fixed_settings, is_finite
from timm_tinyvit.train.evaluate import Evaluator, load_validation
from timm_tinyvit.train.features import FeatureStudent
from timm_tinyvit.train.metrics import METRICS, epoch_line, write_metrics
from timm_tinyvit.train.optimization import (
    clip_gradients, create_optimizer, create_schedule, learning_rates, peak_rate,
)
from timm_tinyvit.train.record import own_run_folder, record_run
from timm_tinyvit.train.student import check_batch_norms, create_student, fixed_statistics
from timm_tinyvit.train.task import SparseLogitTask
from timm_tinyvit.train.teacher_comparison import compare_with_teacher

# Least seconds between two reports of a run that goes on: one that is killed leaves the last of them.
REPORT_SECONDS = 60.

# A gradient scaler halves its scale where gradients overflow; below this they would not fit at any.
MIN_SCALE = 1e-6


def open_or_fill(
        args: argparse.Namespace,
        accelerator: Accelerator,
        train_set: Any,
        val_set: Any,
) -> tuple[StoreReader | None, Replay]:
    """The filled store or stores of `--logits`, and how views are made: the store says so, without one the flags do.

    With `--teacher`, epochs that the store lacks are filled first.
    """
    if not args.logits:
        config = ViewConfig(**view_arguments(args))
        # In the other modes whole batches are mixed on the device, as in the paper's code, and not the views.
        unmixed = replace(config, mixup=0., cutmix=0., cutmix_minmax=None)
        return None, Replay(
            config if args.mixup_mode == 'pair' else unmixed, args.store_seed or STORE_DEFAULTS['store_seed'])
    num_epochs = args.epochs + args.cooldown_epochs
    if args.teacher:
        path = args.logits[0]
        teacher = create_teacher(args, accelerator.device, grid_of(path, given_settings(args)))
        # A teacher of other classes is refused before it works for days.
        resolve_classes(args, train_set, val_set, teacher)
        with accelerator.main_process_first():
            known = LogitStore.open(path).manifest.stored_epochs.stop if LogitStore.exists(path) else num_epochs
            store, replay = create_store(
                path, teacher, train_set, args.store_epochs or known, **new_store_arguments(args))
        needed = store.manifest.stored_epochs[:num_epochs]
        views = views_to_fill(store, replay, train_set, args.input_key, args.target_key)
        fill_epochs(store, teacher, views, needed, num_workers=args.workers)
        accelerator.wait_for_everyone()
    else:
        store, replay = open_stores(
            args.logits, view_arguments(args), accelerator, info, args.keep_epochs, args.store_cache)
        check_store_flags(store, args)
    missing = store.missing(store.manifest.stored_epochs[:num_epochs])
    if missing:
        raise InputError(
            f'the store {store.path} lacks {len(missing)} shards, the first of epoch {missing[0][0]}; give its '
            f'--teacher to fill them, or fill it to the end with timm-tinyvit fill, and where it is on the Hub push it '
            f'with timm-tinyvit store push')
    if store.manifest.epochs < num_epochs:
        info(f'the store has {store.manifest.epochs} epochs for {num_epochs}: epoch e uses e modulo '
             f'{store.manifest.epochs}')
    return store, replay


def create_task(
        args: argparse.Namespace,
        student: nn.Module,
        store: StoreReader | None,
        evaluator: Evaluator,
        classes: Classes,
        accelerator: Accelerator,
) -> SparseLogitTask:
    """What the student learns from, and the average of its weights where it is asked for."""
    for part in store.stores if store else ():
        if features := part.manifest.features:
            size = tuple(evaluator.config['input_size'][-2:])
            student = FeatureStudent(student, features['dim'], features['grid'], size, args.projector)
    mixup, views = None, ViewConfig(**view_arguments(args))
    label_loss = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
    if args.mixup_mode != 'pair' and views.is_mixed:
        mixup = Mixup(
            views.mixup, views.cutmix, views.cutmix_minmax, views.mixup_prob, views.mixup_switch_prob, args.mixup_mode,
            label_smoothing=args.smoothing, num_classes=classes.num)
        label_loss = SoftTargetCrossEntropy()
    if args.bce_loss:
        label_loss = BinaryCrossEntropy(args.smoothing, args.bce_target_thresh, sum_classes=args.bce_sum)
    task = SparseLogitTask(
        student, store and store.codec, evaluator.normalize, args.alpha, args.temperature, label_loss, args.smoothing,
        mixup, args.channels_last, args.freeze_bn, accelerator.autocast, accelerator.device, args.feature_loss,
        args.feature_weight)
    if args.model_ema:
        task.setup_ema(args.model_ema_decay, args.model_ema_warmup)
    return task


@contextmanager
def reporting(folder: Path, accelerator: Accelerator) -> Iterator[Callable[[], None]]:
    """Gives a function that writes the report of the run now and then; however the run ends, one is written then."""
    reported = time.monotonic()

    def report(is_last: bool = False) -> None:
        nonlocal reported
        show = accelerator.is_main_process
        if show and (folder / METRICS).is_file() and (is_last or time.monotonic() - reported >= REPORT_SECONDS):
            with best_effort('the report of the run'):
                write_run_report(folder)
            reported = time.monotonic()

    try:
        try:
            yield report
        finally:
            report(is_last=True)
    except Diverged:
        # Wait, so that no rank is killed before it printed its error.
        accelerator.wait_for_everyone()
        raise


def train_epoch(
        args: argparse.Namespace,
        task: SparseLogitTask,
        data: TrainBatches,
        state: TrainState,
        stop: Callable[[], BaseException | None],
) -> dict[str, float]:
    """Train one epoch, or what is left of it, and return its metrics."""
    accelerator, optimizer, first_update = state.accelerator, state.optimizer, state.update
    num_updates, num_parts, flags = data.updates_per_epoch, args.grad_accum_steps, StepFlags(accelerator)
    task.train()
    batches = data.epoch(state.epoch, first_update, stop)
    start, waited = time.monotonic(), 0.
    bar = progress(
        range(first_update, num_updates), total=num_updates, initial=first_update, leave=False, unit='step',
        desc=f'epoch {state.epoch + 1}/{args.epochs + args.cooldown_epochs}')
    for update in bar:
        step, is_shown = state.epoch * num_updates + update, update % args.log_interval == 0
        state.scheduler.step_update(step)
        losses = torch.zeros(len(task.losses), device=accelerator.device)
        for part in range(num_parts):
            tick = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - tick
            # Gradients are summed up here, and over processes with the last part.
            with accelerator.no_sync(task.trainable_module) if part + 1 < num_parts else nullcontext():
                output = task(batch['view'], batch)
                with fixed_statistics(task.student) if args.grad_checkpointing else nullcontext():
                    accelerator.backward(output['loss'] / num_parts)
            losses += torch.stack([output[name].detach() for name in task.losses]) / num_parts
        accelerator.unscale_gradients(optimizer)
        norm = clip_gradients(task.trained.parameters(), args.clip_grad, args.clip_mode)
        # On overflow GradScaler skips the step by itself, until no scale is small enough.
        is_scaled = accelerator.scaler is not None
        is_stuck = is_scaled and is_shown and accelerator.scaler.get_scale() < MIN_SCALE
        flags.push(update, ~torch.isfinite(losses[0] if is_scaled else losses[0] + norm), is_stuck, stop() is not None)
        is_stopping = check_flags(flags, state)
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step + 1)
        state.step(losses, norm)
        if is_shown:
            shown = dict(loss=losses[0].item(), lr=peak_rate(optimizer), grad_norm=norm.item())
            bar.set_postfix({name: f'{value:.3g}' for name, value in shown.items()})
            # Beside the means of the epoch, which have the plain names.
            accelerator.log({f'update/{name}': value for name, value in shown.items()}, step=step)
        if is_stopping:
            state.save()
            raise state.stopped(stop())
        if args.recovery_interval and (update + 1) % args.recovery_interval == 0 and update + 1 < num_updates:
            check_flags(flags, state, is_last=True)
            state.save()
    check_flags(flags, state, is_last=True)
    bar.close()
    seconds = time.monotonic() - start
    return {
        'epoch': state.epoch, 'lr': peak_rate(optimizer), **state.means(), 'seconds': seconds,
        'data_wait': waited / seconds,
        'images_per_second': (num_updates - first_update) * data.images_per_update / seconds,
    }


def check_flags(flags: StepFlags, state: TrainState, is_last: bool = False) -> bool:
    """Whether a process was asked to stop; raises `Diverged` where the loss or a gradient of a step is not finite."""
    is_stopping = False
    for update, (not_finite, is_stuck, stopping) in flags.due(is_last):
        is_stopping |= stopping > 0
        if not_finite or is_stuck:
            # On a CPU the weights are still those before this step; running means may have gone with the batch.
            if not all_reduce_sum(state.accelerator, not is_finite(state.task.trained))[0]:
                state.save()
            kept = 'keeps the checkpoint before it' if checkpoints_of(state.folder) else \
                'has no checkpoint, as the weights are not finite either'
            raise Diverged(
                f'the loss or the gradient of step {update} in epoch {state.epoch} is not finite; {state.folder} '
                f'{kept}; lower --lr or leave --amp-dtype out, under another --experiment')
    return is_stopping


def train(args: argparse.Namespace) -> Path:
    """Train as the flags say, and return the folder of the run."""
    stop_with_launcher()
    if args.deterministic:
        make_deterministic()
    folder = Path(args.output) / (args.experiment or args.model.replace('/', '_').replace(':', '_'))
    accelerator = create_accelerator(args.amp_dtype, args.log, folder)
    setup_console(accelerator.is_main_process, args.quiet)
    check_launch(args, accelerator)
    with own_run_folder(folder, accelerator.is_main_process) as check_owner:
        train_in(folder, args, accelerator, check_owner)
        end_training(accelerator)
        if args.push_to_hub and accelerator.is_main_process:
            push_finished_run(folder, args.push_to_hub, args.hub_private, args.hub_license)
    return folder


def train_in(folder: Path, args: argparse.Namespace, accelerator: Accelerator, check_owner: Callable[[], None]) -> None:
    """Train in the folder of a run that this launch owns."""
    show, num_epochs = accelerator.is_main_process, args.epochs + args.cooldown_epochs

    # Data. Each rank loads the same rows; the samplers share them out.
    with accelerator.main_process_first():
        train_set = load_split(args.dataset, args.train_split, True, args.streaming, label_column=args.target_key)
        val_set = load_validation(args)
    if args.push_to_hub and show:
        prepare_push(args.push_to_hub, args.hub_private, args.hub_license)

    # Teacher and store.
    store, replay = open_or_fill(args, accelerator, train_set, val_set)
    classes, val_set = resolve_classes(args, train_set, val_set, store)
    store = classes.of(store)
    state = TrainState(folder, args, fixed_settings(args, train_set, store), store, accelerator, check_owner)
    data = TrainBatches(args, train_set, replay, store, classes.num, accelerator)
    start_trackers(accelerator, args, folder)

    # Student, and what it learns from.
    set_seed(args.seed)
    student = create_student(args, classes.num, data.size, info)
    check_batch_norms(student, args, data.size, accelerator.num_processes)
    student = convert_sync_batchnorm(student) if args.sync_bn else student
    evaluator = Evaluator(args, student, data.size, val_set, classes, accelerator, folder, train_set)
    task = create_task(args, student, store, evaluator, classes, accelerator)

    # Optimiser, and schedule by update.
    rates = learning_rates(args, data.images_per_update)
    optimizer = create_optimizer(args, task.trained, rates['lr'])
    scheduler = create_schedule(args, optimizer, rates, data.updates_per_epoch)
    optimizer = task.prepare(accelerator, optimizer, args.compile)

    # Resume, where there is something to resume.
    state.resume(task, optimizer, scheduler, data.images_per_update)
    first_epoch = state.epoch
    if show:
        record_run(args, state, data, val_set, classes)
    info(f'{args.model}: {sum(p.numel() for p in student.parameters()) / 1e6:.1f} M parameters, views '
         f'{data.size[0]}x{data.size[1]}, {data.num_samples:,} images, {data.updates_per_epoch} steps of '
         f'{data.images_per_update} an epoch, learning rate {rates["lr"]:.3g}, {accelerator.num_processes} process(es) '
         f'on {accelerator.device.type}, learning from {"labels" if store is None else f"the store {store.path}"}'
         f'{" and labels" if store is not None and args.alpha < 1 else ""}')

    with catch_stop_signals() as stop, worker_errors(store), reporting(folder, accelerator) as report:
        for epoch in range(first_epoch, num_epochs):
            row = train_epoch(args, task, data, state, stop)
            check_owner()
            is_due = (epoch + 1) % args.val_interval == 0 or epoch + 1 == num_epochs
            for weights, model in task.models().items():
                # Of a sharded model a whole copy, one at a time and gone before the next epoch.
                metrics = evaluator(task.whole_model(model), weights, epoch, state.best(weights), is_due, stop)
                if metrics is None:
                    state.save()
                    raise state.stopped(stop())
                row |= metrics
            state.end_epoch(row)
            if show:
                write_metrics(folder, state.history)
                plot_metrics(folder / METRICS, folder / 'metrics.png')
            accelerator.log(row, step=state.epoch * data.updates_per_epoch)
            state.save()
            best, _ = state.best('student')
            info(epoch_line(row, best, num_epochs), green=f'best {best:.2f}%' if row.get('eval_top1') == best else '')
            if is_due:
                report()
            if all_reduce_sum(accelerator, stop() is not None)[0]:
                raise state.stopped(stop())
        if store is not None:
            compare_with_teacher(args, task, data, state, classes, stop, is_new=first_epoch < num_epochs)
    (best, _), what = state.best('student'), 'top-1' if classes.num else 'nearest neighbours'
    print_result(f'finished: {folder}' + (f', best {what} {best:.2f}%' if best >= 0 else '') + (
        f'; see {folder / REPORT}' if (folder / REPORT).is_file() else ''), bold='finished:')


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Train with these arguments, by default the command line's."""
    train(settings(argv))


if __name__ == '__main__':
    main()
