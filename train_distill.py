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
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from collections.abc import Sequence

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.utils.data import DataLoader

import timm_tinyvit  # noqa: F401  registers the models
from timm_tinyvit.base.console import best_effort, colored, log, progress, result, speak, warn
from timm_tinyvit.base.errors import InputError, Terminated, reports_input_errors
from timm_tinyvit.base.files import remove_stale, write_aside
from timm_tinyvit.base.launch import (
    create_accelerator, make_deterministic, quiet_worker, stop_requests, stop_with_launcher,
    total,
)
from timm_tinyvit.config.arguments import (
    STORE_DEFAULTS, check_store_flags, view_arguments,
)
from timm_tinyvit.config.training import settings
from timm_tinyvit.data.classes import check_label_values, check_labels, class_mismatch, is_imagenet1k
from timm_tinyvit.data.dataset import EpochBatchSampler, SparseLogitDataset, collate
from timm_tinyvit.data.fingerprint import dataset_fingerprint
from timm_tinyvit.data.opening import open_stores
from timm_tinyvit.data.pairing import mixed_cross_entropy
from timm_tinyvit.data.sources import class_names, find_column, load_split
from timm_tinyvit.data.streaming import SparseLogitStream, StreamLoader
from timm_tinyvit.data.views import Replay, ViewRecipe
from timm_tinyvit.hub.push_model import prepare_push, push_finished_run
from timm_tinyvit.models.loading import ModelInput
from timm_tinyvit.models.saving import export_model
from timm_tinyvit.report.plots import plot_metrics
from timm_tinyvit.report.run import write_run_report
from timm_tinyvit.report.run_folder import PREDICTIONS, STORED_VIEWS
from timm_tinyvit.store.ensemble import Ensemble, ensemble_loss
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.store.remote import check_content, content_of, pin_stores
from timm_tinyvit.teacher.creating import create_store, create_teacher, views_to_fill
from timm_tinyvit.teacher.fill import fill_store
from timm_tinyvit.train.checkpoint import (
    is_finite, last_checkpoint, random_state, save_checkpoint, set_random_state, what_changes,
)
from timm_tinyvit.train.environment import record_environment
from timm_tinyvit.train.evaluate import eval_config, eval_loader, evaluate, evaluate_checkpoint
from timm_tinyvit.train.metrics import METRICS
from timm_tinyvit.train.optimization import (
    clip_gradients, create_optimizer, create_schedule, learning_rates, peak_rate,
)
from timm_tinyvit.train.predictions import Recorder, keep_evaluation
from timm_tinyvit.train.record import record_run
from timm_tinyvit.train.sharding import ModelEma, load_whole_state, prepare_student, whole_state
from timm_tinyvit.train.student import create_student, freeze_batch_norm
from timm_tinyvit.train.teacher_comparison import look_at_stored_views

# What may change between a run and its resumption: nothing of it has a hand in the weights. Data and store may move;
# it is their content that is compared.
FREE_SETTINGS = {
    'workers', 'log_interval', 'checkpoint_hist', 'recovery_interval', 'val_interval', 'validation_batch_size',
    'config', 'output', 'experiment', 'teacher', 'teacher_checkpoint', 'teacher_compile', 'quiet', 'dataset',
    'data_dir', 'val_dataset', 'val_split', 'logits', 'log', 'eval', 'keep_epochs',
    'store_cache', 'push_to_hub', 'hub_private', 'hub_license',
}

# Least seconds between two reports of a run that goes on: one that is killed leaves the last of them.
REPORT_SECONDS = 60.

# A gradient scaler halves its scale where gradients overflow; below this they would not fit at any.
MIN_SCALE = 1e-6


def prepare_store(
        args: argparse.Namespace,
        accelerator: Accelerator,
        dataset: Any,
        log: Any,
) -> tuple[LogitStore | Ensemble, Replay]:
    """The filled store or stores of `--logits`; with `--teacher`, epochs that it lacks are filled first."""
    num_epochs = args.epochs + args.cooldown_epochs
    if args.teacher:
        teacher = create_teacher(args, accelerator.device)
        with accelerator.main_process_first():
            known = num_epochs
            if LogitStore.exists(args.logits[0]):
                known = LogitStore.open(args.logits[0]).manifest.stored_epochs.stop
            store, replay = create_store(args.logits[0], args, teacher, dataset, args.store_epochs or known, log)
            if accelerator.is_main_process:
                store.remove_stale()
        needed = store.manifest.stored_epochs[:num_epochs]
        fill_store(
            store, teacher, views_to_fill(args, store, replay, dataset), needed, num_workers=args.workers)
        accelerator.wait_for_everyone()
    else:
        paths = pin_stores(args.logits, accelerator)
        store, replay = open_stores(paths, view_arguments(args), log, args.keep_epochs, args.store_cache)
        check_store_flags(store, args)
    missing = store.missing(store.manifest.stored_epochs[:num_epochs])
    if missing:
        raise InputError(
            f'the store {store.path} lacks {len(missing)} shards, the first of epoch {missing[0][0]}; give its '
            f'--teacher to fill them, or run the save_logits command that made it again, with --push-to-hub if it is '
            f'on the Hub')
    if store.manifest.epochs < num_epochs:
        log(f'the store has {store.manifest.epochs} epochs for {num_epochs}: epoch e uses e modulo '
            f'{store.manifest.epochs}')
    return store, replay


def write_metrics(folder: Path, history: list[dict[str, float]]) -> None:
    """All epochs so far as metrics.csv, and their plot."""
    columns = list({key: None for row in history for key in row})
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(history)
    write_aside(folder / METRICS, text.getvalue().encode())
    plot_metrics(folder / METRICS, folder / 'metrics.png')


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Train with these arguments, by default the command line's."""
    args = settings(argv)
    stop_with_launcher()
    if args.deterministic:
        make_deterministic()
    folder = Path(args.output) / (args.experiment or args.model.replace('/', '_').replace(':', '_'))
    accelerator = create_accelerator(args.amp_dtype, args.log, folder)
    # Depthwise weights have one stride too many to tell the layouts apart; DDP asks each time and copies nothing.
    warnings.filterwarnings('ignore', message='Grad strides do not match')
    # TinyViT's blocks return views, which nothing changes in place.
    warnings.filterwarnings('ignore', message=r'FSDP2-wrapped module \(FSDP(MBConv|TinyVitBlock)\) returned a view')
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    show = accelerator.is_main_process
    speak(show, args.quiet)
    if args.eval is not None:
        found = evaluate_checkpoint(args, accelerator)
        result(', '.join(f'{name} {value:.3f}' for name, value in found.items()))
        accelerator.end_training()
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'the folder {folder} cannot be made: {error.strerror}; choose another --output')
    if show:
        remove_stale(folder)

    # Data. Each rank loads the same rows; the samplers share them out.
    with accelerator.main_process_first():
        train_set = load_split(args.dataset, args.train_split, is_training=True, streaming=args.streaming)
        val_set = load_split(args.val_dataset or args.dataset, args.val_split, is_training=False)
    if args.push_to_hub and show:
        prepare_push(args)

    # Teacher and store. The store says how its views are made; without one the flags do.
    store = None
    if args.logits:
        store, replay = prepare_store(args, accelerator, train_set, log)
    else:
        recipe = ViewRecipe(**view_arguments(args))
        # In the other modes whole batches are mixed on the device, as in the paper's code, and not the views.
        unmixed = replace(recipe, mixup=0., cutmix=0., cutmix_minmax=None)
        replay = Replay(
            recipe if args.mixup_mode == 'pair' else unmixed, args.store_seed or STORE_DEFAULTS['store_seed'])
    columns = args.input_key, args.target_key, args.key
    if args.streaming:
        train_data = SparseLogitStream(
            train_set, replay, store, *columns, args.seed, rank=rank, world_size=world_size,
            store_epochs=store.manifest.stored_epochs, num_epochs=args.epochs + args.cooldown_epochs)
        num_samples = store.manifest.num_samples
    else:
        train_data = SparseLogitDataset(train_set, replay, store, *columns)
        num_samples = len(train_data)
    size = tuple(replay.recipe.input_size[-2:])

    # What decides the weights: these settings, and the content of data and store.
    decisive = {key: value for key, value in vars(args).items() if key not in FREE_SETTINGS}
    # A stream is looked at as it comes, sample by sample.
    decisive['data'] = None if args.streaming else dataset_fingerprint(train_set, args.input_key, args.target_key)
    decisive['store'] = store.manifest.identity if store else None
    state = last_checkpoint(folder, decisive, world_size)
    if store is not None and state is not None:
        check_content(store, state.get('store'), args.epochs + args.cooldown_epochs)
    positions = gather_object([state and (state['epoch'], state['samples'])])
    if len(set(positions)) > 1:
        raise InputError(f'the processes find different checkpoints in {folder}; --output must be a folder that all '
                         f'machines share')
    if args.log:
        plain = {key: value if isinstance(value, int | float) else str(value) for key, value in vars(args).items()}
        accelerator.init_trackers('timm_tinyvit', plain, {
            'wandb': dict(name=folder.name, dir=str(folder)), 'trackio': dict(name=folder.name)})
    if state is None and show:
        # As a recipe for --config.
        given = {key: value for key, value in vars(args).items() if key != 'config' and value not in (None, [], {})}
        write_aside(folder / 'args.yaml', yaml.safe_dump(given, default_flow_style=None).encode())

    # Student.
    label_key = find_column(train_set, args.target_key, is_image=False)
    label_names = class_names(train_set, label_key) if label_key else None
    num_classes = args.num_classes or (store.manifest.num_classes if store else len(label_names or ()))
    if not num_classes:
        raise InputError('the number of classes is not known from the data; give --num-classes, or put every image of '
                         'a folder into SPLIT/CLASS/')
    if store and num_classes != store.manifest.num_classes:
        raise InputError(f'the student has {num_classes} classes, the store {store.path} '
                         f'{store.manifest.num_classes}; leave --num-classes out, or use another store')
    if (store is None or args.alpha < 1) and not args.streaming:
        check_labels(train_set, label_key, num_classes, '--train-split')
    val_key = find_column(val_set, args.target_key, is_image=False)
    check_labels(val_set, val_key, num_classes, '--val-split')
    to_imagenet1k = is_imagenet1k(val_set, val_key)
    if store and (mismatch := class_mismatch(val_set, val_key, num_classes)):
        raise InputError(f'{mismatch}, as the teacher has, so that accuracies would say nothing; name data of its '
                         f'classes with --val-dataset')
    names = label_key and class_names(train_set, label_key, num_classes) or class_names(val_set, val_key, num_classes)
    set_seed(args.seed)
    student = create_student(args, num_classes, size, log)
    if args.sync_bn:
        if device.type == 'cpu':
            raise InputError('--sync-bn needs GPUs: torch has no synchronised batch norm on a CPU; leave it out')
        student = convert_sync_batchnorm(student)
    if args.clip_mode == 'agc' and accelerator.is_fsdp2:
        raise InputError('--clip-mode agc compares whole weights with their gradients, and the launch shards them; '
                         'choose --clip-mode norm or value, or launch it with --multi_gpu')
    config = eval_config(args, student, size)
    prepare = ModelInput(config['mean'], config['std']).to(device)
    val_loader = eval_loader(val_set, config, args, rank, world_size)

    # Loader of one batch per process; an update takes one batch or several.
    # A generator of its own: a loader draws a seed whenever it starts, and a resumed epoch starts once more.
    options = dict(
        num_workers=args.workers, collate_fn=collate, generator=torch.Generator(), persistent_workers=args.workers > 0,
        pin_memory=device.type == 'cuda', worker_init_fn=quiet_worker)
    if args.streaming:
        num_batches = num_samples // (args.batch_size * world_size)
        loader = sampler = StreamLoader(train_data, num_batches, batch_size=args.batch_size, **options)
    else:
        sampler = EpochBatchSampler(
            num_samples, args.batch_size, args.seed, rank, world_size, store.manifest.stored_epochs if store else None,
            args.views_per_image, train_data.pairing, store, args.epochs + args.cooldown_epochs)
        loader = DataLoader(train_data, batch_sampler=sampler, **options)
    num_parts = args.grad_accum_steps
    images_per_update = args.batch_size * world_size * num_parts
    num_updates = len(sampler) // num_parts
    if not num_updates:
        raise InputError(f'the data set has {num_samples} samples, fewer than one update of {images_per_update}; '
                         f'choose a smaller --batch-size or --grad-accum-steps')

    # Optimiser, schedule by update, and losses.
    rates = learning_rates(args, images_per_update)
    optimizer = create_optimizer(args, student, rates['lr'])
    scheduler, num_epochs = create_schedule(args, optimizer, rates, num_updates)
    for name in ('warmup_lr', 'min_lr'):
        if rates[name] > rates['lr']:
            warn(f'--{name.replace("_", "-")} is {rates[name]:g} and above the learning rate of {rates["lr"]:g}; lower '
                 f'it')
    if args.warmup_epochs >= args.epochs:
        warn(f'all of {args.epochs} epochs are warm-up: the learning rate never reaches its peak; lower '
             f'--warmup-epochs')
    alpha = args.alpha if store is not None else 0.
    mixup = None
    label_loss = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
    if args.mixup_mode != 'pair' and recipe.is_mixed:
        mixup = Mixup(
            recipe.mixup, recipe.cutmix, recipe.cutmix_minmax, recipe.mixup_prob, recipe.mixup_switch_prob,
            args.mixup_mode, label_smoothing=args.smoothing, num_classes=num_classes)
        label_loss = SoftTargetCrossEntropy()
    ema = ModelEma(student, args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
    wrapped, optimizer, whole_model = prepare_student(accelerator, student, optimizer, ema)
    model = torch.compile(wrapped, backend=args.compile) if args.compile else wrapped
    # What is evaluated and exported, by the ending of its name.
    results = {'': student} if ema is None else {'': student, '_ema': ema.module}

    # Resume, where there is something to resume.
    history: list[dict[str, float]] = []
    first_epoch, first_update, best = 0, 0, dict.fromkeys(results, -1.)
    sums = torch.zeros(4, device=device)  # loss, label loss, distillation loss and gradient norm of the epoch so far
    if state is not None:
        load_whole_state(student, state['model'])
        load_whole_state(optimizer, state['optimizer'])
        if ema is not None:
            load_whole_state(ema.module, state['ema'])
        if accelerator.scaler is not None and state['scaler'] is not None:
            accelerator.scaler.load_state_dict(state['scaler'])
        first_epoch, best, history = state['epoch'], state['best'], state['history']
        first_update = state['samples'] // images_per_update
        log(f'{folder} is finished: nothing is left to train' if first_epoch == num_epochs else
            f'resuming {folder} at epoch {first_epoch}, step {first_update}')
        changes = what_changes(state, world_size, images_per_update, accelerator.is_fsdp2)
        if changes:
            warn(changes)
        if args.streaming and (state['world_size'], state['workers']) != (world_size, args.workers):
            warn('a stream is shared out over another number of processes or --workers than before: the order of '
                 'images is another one, and some are seen twice or not at all in this epoch')
        if state['world_size'] == world_size:
            scheduler.load_state_dict(state['scheduler'])
            sums = state['sums'][rank].to(device)
            set_random_state(dict(enumerate(state['random'])).get(rank, {}), device)
        else:
            # Means over updates, of which there are others now.
            share = state['images_per_update'] / images_per_update
            sums = sum(state['sums']).to(device) / state['world_size'] * share
            set_seed(int(np.random.SeedSequence([args.seed, first_epoch, first_update, rank]).generate_state(1)[0]))
    else:
        # Ranks must not drop the same paths.
        set_seed(args.seed + rank)

    def checkpoint(epoch: int, update: int) -> None:
        randoms, all_sums = gather_object([random_state(device)]), gather_object([sums.cpu()])
        state = {
            'epoch': epoch, 'samples': update * images_per_update, 'best': best, 'history': history,
            'sums': all_sums, 'random': randoms, 'world_size': world_size, 'workers': args.workers,
            'images_per_update': images_per_update,
            'model': whole_state(student), 'ema': None if ema is None else whole_state(ema.module),
            'is_sharded': accelerator.is_fsdp2, 'optimizer': whole_state(optimizer),
            'scheduler': scheduler.state_dict(), 'settings': decisive,
            'scaler': None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            'store': None if store is None else content_of(store),
        }
        if show:
            save_checkpoint(folder, state, args.checkpoint_hist)
        accelerator.wait_for_everyone()

    def losses(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Loss, label loss and distillation loss of a batch, [3]."""
        views = prepare(batch['view'].to(device, non_blocking=True))
        labels = batch['label'].to(device, non_blocking=True)
        if mixup is not None:
            views, labels = mixup(views, labels)
        if args.channels_last:
            views = views.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            logits = model(views)
        label_part = distill_part = torch.zeros((), device=device)
        if alpha < 1 and 'lam' in batch:
            labels2, lam = (batch[name].to(device, non_blocking=True) for name in ('label2', 'lam'))
            label_part = mixed_cross_entropy(logits.float(), labels, labels2, lam, args.smoothing)
        elif alpha < 1:
            if args.streaming:  # where they could not be looked at before
                check_label_values(batch['label'].numpy(), num_classes, 'a batch of --train-split')
            label_part = label_loss(logits.float(), labels)
        if store is not None:
            targets = store.codec.decode(batch['record'].to(device, non_blocking=True))
            distill_part = ensemble_loss(logits, targets, args.temperature)
        # Temperature squared keeps the size of the gradients.
        loss = (1 - alpha) * label_part + alpha * args.temperature ** 2 * distill_part
        return torch.stack([loss, label_part, distill_part])

    if show:
        defaults = settings(['--dataset', args.dataset])
        record_run(
            folder, args, decisive, defaults, student, store, num_samples, val_set, to_imagenet1k, images_per_update,
            accelerator)
        record_environment(folder, args, defaults, accelerator, first_epoch)

    def report() -> None:
        if show and history:
            with best_effort('the report of the run'):
                write_run_report(folder)

    # The loop.
    num_params = sum(p.numel() for p in student.parameters())
    source = 'labels' if store is None else f'the store {store.path}' + (' and labels' if alpha < 1 else '')
    log(f'{args.model}: {num_params / 1e6:.1f} M parameters, views {size[0]}x{size[1]}, {num_samples:,} images, '
        f'{num_updates} steps of {images_per_update} an epoch, {world_size} process(es) on {device.type}, learning '
        f'from {source}')
    reported = time.time()
    with stop_requests() as stopped:
        for epoch in range(first_epoch, num_epochs):
            model.train()
            if args.freeze_bn:
                freeze_batch_norm(student)
            sampler.set_epoch(epoch, first_update * num_parts)
            if store is not None and not store.wait(lambda: stopped() is not None):
                raise stopped() or Terminated
            batches = iter(loader)
            start, waited = time.time(), 0.
            bar = progress(
                range(first_update, num_updates), total=num_updates, initial=first_update, leave=False, unit='step',
                desc=f'epoch {epoch + 1}/{num_epochs}')
            for update in bar:
                scheduler.step_update(epoch * num_updates + update)
                parts = torch.zeros(3, device=device)
                for part in range(num_parts):
                    tick = time.time()
                    batch = next(batches)
                    waited += time.time() - tick
                    # Gradients are summed up here, and over processes with the last part.
                    with accelerator.no_sync(wrapped) if part + 1 < num_parts else nullcontext():
                        batch_parts = losses(batch) / num_parts
                        accelerator.backward(batch_parts[0])
                    parts += batch_parts.detach()
                accelerator.unscale_gradients(optimizer)
                norm = clip_gradients(student.parameters(), args.clip_grad, args.clip_mode)
                # Where gradients overflow, a scaler leaves the update out by itself.
                finite = math.isfinite(parts[0].item() if accelerator.scaler else (parts[0] + norm).item())
                finite = finite and (accelerator.scaler is None or accelerator.scaler.get_scale() >= MIN_SCALE)
                lost, stopping = total(accelerator, not finite, stopped() is not None)
                if lost:
                    # The weights are still those of the update before; running means may have gone with the batch.
                    if not total(accelerator, not is_finite(student))[0]:
                        checkpoint(epoch, update)
                    report()
                    # Who ends first ends the others.
                    accelerator.wait_for_everyone()
                    kept = 'keeps the checkpoint before it' if any(folder.glob('checkpoint-*.pt')) else \
                        'has no checkpoint, as the weights are not finite either'
                    raise InputError(
                        f'the loss or the gradient of step {update} in epoch {epoch} is not finite; {folder} {kept}; '
                        f'lower --lr or leave --amp-dtype out, under another --experiment')
                optimizer.step()
                optimizer.zero_grad()
                if ema is not None:
                    ema.update(student, step=epoch * num_updates + update + 1)
                sums += torch.cat([parts, norm.nan_to_num(0., 0., 0.).reshape(1)])
                if update % args.log_interval == 0:
                    shown = dict(loss=parts[0].item(), lr=peak_rate(optimizer), grad_norm=norm.item())
                    bar.set_postfix({name: f'{value:.3g}' for name, value in shown.items()})
                    # Beside the means of the epoch, which have the plain names.
                    accelerator.log(
                        {f'update/{name}': value for name, value in shown.items()}, step=epoch * num_updates + update)
                is_due = args.recovery_interval and (update + 1) % args.recovery_interval == 0
                if stopping or is_due and update + 1 < num_updates:
                    checkpoint(epoch, update + 1)
                if stopping:
                    report()
                    raise stopped() or Terminated
            bar.close()

            seconds = time.time() - start
            means = accelerator.reduce(sums / num_updates, 'mean').tolist()
            row = {
                'epoch': epoch, 'lr': peak_rate(optimizer), 'loss': means[0], 'label_loss': means[1],
                'distill_loss': means[2], 'grad_norm': means[3], 'seconds': seconds, 'data_wait': waited / seconds,
                'images_per_second': (num_updates - first_update) * images_per_update / seconds,
            }
            improved = []
            for ending in results:
                # Of a sharded model a whole copy, one at a time and gone before the next epoch.
                net = whole_model(results[ending])
                if (epoch + 1) % args.val_interval == 0 or epoch + 1 == num_epochs:
                    recorder = Recorder()
                    found = evaluate(
                        net, prepare, val_loader, accelerator, to_imagenet1k, lambda: bool(stopped()), recorder)
                    if found is None:
                        checkpoint(epoch, num_updates)
                        report()
                        raise stopped() or Terminated
                    row.update({f'eval_{name}{ending}': value for name, value in found.items()})
                    predictions = recorder.gather()
                    if show:
                        with best_effort('the predictions for the report'):
                            keep_evaluation(
                                folder / PREDICTIONS.format(ending=ending), predictions, val_loader,
                                recorder.num_classes, epoch)
                    if found['top1'] > best[ending]:
                        improved.append(ending)
                if show:
                    export_model(folder / f'last{ending}', net, names, config)
                    if ending in improved:
                        export_model(folder / f'best{ending}', net, names, config)
                del net
            best.update({ending: row[f'eval_top1{ending}'] for ending in improved})
            history.append(row)
            first_update = 0
            sums.zero_()
            if show:
                write_metrics(folder, history)
            accelerator.log(row, step=(epoch + 1) * num_updates)
            best_said = f'best {best[""]:.2f}%'
            best_said = colored(best_said, 'green') if '' in improved else best_said
            log(f'epoch {epoch + 1}/{num_epochs}: loss {row["loss"]:.3f}'
                + (f', top-1 {row["eval_top1"]:.2f}% ({best_said})' if 'eval_top1' in row else '')
                + (f', averaged {row["eval_top1_ema"]:.2f}%' if 'eval_top1_ema' in row else '')
                + f', {row["images_per_second"]:.0f} images/s, {100 * row["data_wait"]:.0f}% waiting for data')
            checkpoint(epoch + 1, 0)
            if 'eval_top1' in row and time.time() - reported >= REPORT_SECONDS:
                report()
                reported = time.time()
            if total(accelerator, stopped() is not None)[0]:
                report()
                raise stopped() or Terminated
        if store is not None and (first_epoch < num_epochs or not (folder / STORED_VIEWS).is_file()):
            ending = max(results, key=lambda ending: history[-1].get(f'eval_top1{ending}', -1.))
            sampler.set_epoch(num_epochs - 1)
            net = whole_model(results[ending])
            if show:
                with best_effort('the comparison with the teacher'):
                    views = look_at_stored_views(
                        net, prepare, loader, store, accelerator, num_epochs - 1,
                        label_names and len(label_names),
                        lambda: bool(stopped()), ending, args.views_per_image)
                    if views is not None:
                        views.write(folder / STORED_VIEWS)
            accelerator.wait_for_everyone()
        report()
    result(f'{colored("finished:", "bold")} {folder}, best top-1 {best[""]:.2f}%')
    accelerator.end_training()
    if args.push_to_hub and show:
        push_finished_run(folder, args)


if __name__ == '__main__':
    main()
