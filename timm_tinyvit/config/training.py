"""The flags of train_distill, and everything that is refused about them, in one place."""

import argparse
import math
import os
from typing import TYPE_CHECKING, Any
from collections.abc import Sequence

from ..base.console import info, warning
from ..base.errors import InputError
from .arguments import (
    ArgumentParser, KeyValues, add_data_arguments, add_image_arguments, add_image_size, add_keep_arguments,
    add_push_arguments, add_quiet, add_store_arguments, add_teacher_arguments, add_view_arguments, add_workers,
    check_push_arguments, view_arguments,
)
from .timm_flags import REFUSED, REFUSED_BY_EVAL

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    'DEFAULT_MODEL', 'LAUNCH_DEFAULTS', 'add_arguments', 'add_eval_arguments', 'check_launch', 'create_parser',
    'settings', 'tell_launch',
]

DEFAULT_MODEL = 'tiny_vit_5m_224'
# Those of `targets.features`, which needs torch.
FEATURE_LOSSES = ('cosine', 'smooth-l1', 'mse')
PROJECTORS = ('linear', 'mlp')
PROBES = ('knn', 'linear')
TRACKERS = ('tensorboard', 'wandb', 'trackio')

# Flags that accelerate may be configured to, and what they are where neither says anything.
LAUNCH_DEFAULTS = dict(amp_dtype=None, grad_accum_steps=1)
PRECISIONS = {'bf16': 'bfloat16', 'fp16': 'float16'}


def create_parser() -> ArgumentParser:
    """The parser of train_distill: timm's names, with defaults near the paper's."""
    parser = ArgumentParser(prog='train_distill', description='Train a student from a store, or from labels.')
    add_arguments(parser)
    return parser


def settings(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags that were given, over those of a recipe and the defaults."""
    return create_parser().parse_args(argv)


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of a training."""
    parser.finish = _finish
    parser.refused = REFUSED
    parser.add_recipes()
    add_data_arguments(parser)
    add_validation_data(parser)
    add_view_arguments(parser)
    group = parser.add_argument_group('store to learn from')
    group.add_argument('--logits', metavar='DIR', nargs='+',
                       help='the store, a folder or hf://datasets/ORG/NAME; several, of different teachers, to learn '
                            'from their average; one of them may hold features')
    add_keep_arguments(group)
    add_teacher_arguments(parser)
    add_store_arguments(parser)
    group = parser.add_argument_group('distillation')
    group.add_argument('--store-epochs', type=int, metavar='E',
                       help='with --teacher: epochs that the store is to hold (default: its own, or --epochs)')
    group.add_argument('--alpha', type=float, metavar='A',
                       help='weight of the distillation loss on classes; that of the label loss is 1 - A (default: 1)')
    group.add_argument('--task-loss-weight', type=float, metavar='W', help='the same, as the weight of the label loss')
    group.add_argument('--distill-loss-weight', type=float, metavar='W',
                       help='the same, beside a --task-loss-weight that makes it 1')
    group.add_argument('--feature-loss', choices=FEATURE_LOSSES, default='cosine',
                       help='of a store of features: how far the student\'s are from the teacher\'s')
    group.add_argument('--feature-weight', type=float, default=1., metavar='W',
                       help='of a store of features: weight of that loss')
    group.add_argument('--projector', choices=PROJECTORS, default='linear',
                       help='of a store of features: from the student\'s features to the teacher\'s')
    group.add_argument('--temperature', '--kd-temperature', type=float, default=1., metavar='T',
                       help='temperature that softens teacher and student')
    group.add_argument('--distill-loss', default='cross-entropy',
                       choices=('cross-entropy', 'reverse-kl', 'dkd', 'dist'),
                       help='loss from the store; dkd also needs the labels')
    group.add_argument('--standardize', action='store_true',
                       help='divide the logits of teacher and student by their standard deviation over the classes')
    group.add_argument('--remainder', default='share', choices=('share', 'ghost'),
                       help='mass outside the stored classes: shared by all others, or compared as that of one class')
    group = _add_model(parser)
    group.add_argument('--initial-checkpoint', '--pretrained-path', metavar='FILE',
                       help='start from these weights, a file or a folder')
    group.add_argument('--drop', type=float, default=0., metavar='P', help='dropout')
    group.add_argument('--drop-path', type=float, metavar='P', help='stochastic depth (default: the model\'s)')
    group.add_argument('--freeze-bn', action='store_true', help='keep the running statistics of batch norms fixed')
    group.add_argument('--sync-bn', action='store_true', help='synchronise batch norms over all processes')
    group.add_argument('--model-ema', action='store_true', help='also average the weights; evaluate and export both')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, metavar='D', help='decay of the average')
    group.add_argument('--model-ema-warmup', action='store_true', help='start with a smaller decay')
    group.add_argument('--grad-checkpointing', action='store_true',
                       help='compute activations again in the backward pass: less memory, slower')
    group.add_argument('--compile', '--torchcompile', nargs='?', const='inductor', metavar='BACKEND',
                       help='torch.compile the student')
    group = parser.add_argument_group('optimisation')
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='views per process and step')
    group.add_argument('--grad-accum-steps', type=int, metavar='N',
                       help='batches per update (default: what accelerate is configured to, or 1)')
    group.add_argument('--views-per-image', type=int, default=1, metavar='N',
                       help='put N views of each image, of N epochs, in one batch and decode the image once')
    group.add_argument('--epochs', type=int, default=300, metavar='N', help='epochs to train')
    group.add_argument('--opt', default='adamw', metavar='NAME', help='timm optimiser')
    group.add_argument('--opt-eps', type=float, metavar='X', help='its epsilon')
    group.add_argument('--opt-betas', type=float, nargs='+', metavar='B', help='its betas')
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=KeyValues, metavar='NAME=VALUE',
                       help='further arguments of it')
    group.add_argument('--momentum', type=float, default=0.9, metavar='M', help='its momentum')
    group.add_argument('--weight-decay', type=float, default=0.05, metavar='W',
                       help='weight decay, but not of norms and biases')
    group.add_argument('--clip-grad', type=float, default=5., metavar='NORM', help='gradient clipping, 0 for none')
    group.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='how to clip')
    group.add_argument('--layer-decay', type=float, metavar='D', help='layer-wise learning-rate decay')
    group.add_argument('--sched', default='cosine', metavar='NAME', help='linear or a timm schedule, stepped by update')
    group.add_argument('--lr', type=float, metavar='LR', help='peak learning rate (default: from --lr-base)')
    group.add_argument('--lr-base', type=float, default=5e-4, metavar='LR',
                       help='without --lr: peak learning rate for --lr-base-size images per update; scaled to the '
                            'images of an update, as --warmup-lr and --min-lr are')
    group.add_argument('--lr-base-size', type=int, default=512, metavar='N', help='images per update of --lr-base')
    group.add_argument('--warmup-lr', type=float, default=5e-7, metavar='LR', help='learning rate of the first update')
    group.add_argument('--warmup-epochs', type=float, default=5, metavar='N', help='epochs of warm-up')
    group.add_argument('--min-lr', type=float, default=5e-6, metavar='LR', help='learning rate at the end')
    group.add_argument('--cooldown-epochs', type=int, default=0, metavar='N', help='additional epochs at --min-lr')
    group.add_argument('--decay-epochs', type=float, default=30, metavar='N', help='step schedule: epochs per decay')
    group.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N',
                       help='multistep schedule: epochs of the decays')
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1, metavar='R',
                       help='step schedule: factor per decay')
    group.add_argument('--smoothing', type=float, default=0.1, metavar='S', help='label smoothing of the label loss')
    group.add_argument('--bce-loss', action='store_true', help='binary cross-entropy of each class as the label loss')
    group.add_argument('--bce-sum', action='store_true', help='its sum over the classes instead of its mean')
    group.add_argument('--bce-target-thresh', type=float, metavar='P',
                       help='its targets, of smoothed or mixed labels, are 1 above P and else 0')
    group.add_argument('--mixup-mode', choices=('batch', 'pair', 'elem'),
                       help='pair: views mixed as in a store; batch, elem: timm\'s Mixup, one lambda per batch or view '
                            '(default: pair with --logits, else batch)')
    _add_precision(group)
    group.add_argument('--deterministic', action='store_true', help='bit-identical runs on GPUs too; slower')
    group.add_argument('--seed', type=int, default=42, metavar='S',
                       help='seed of weights, order and dropout; that of views is --store-seed')
    group = parser.add_argument_group('evaluation and output')
    group.add_argument('-vb', '--validation-batch-size', type=int, metavar='N',
                       help='images per process (default: --batch-size)')
    group.add_argument('--val-interval', type=int, default=1, metavar='N', help='epochs between evaluations')
    _add_crop(group)
    group.add_argument('--output', default='./output/train', metavar='DIR', help='folder of runs')
    group.add_argument('--experiment', metavar='NAME', help='folder of this run (default: the model\'s name)')
    group.add_argument('--checkpoint-hist', type=int, default=2, metavar='N', help='checkpoints to keep')
    group.add_argument('--recovery-interval', type=int, default=0, metavar='N',
                       help='updates between checkpoints within an epoch, 0 for none')
    group.add_argument('--log-interval', type=int, default=50, metavar='N', help='updates between logged losses')
    group.add_argument('--log', nargs='+', default=[], choices=TRACKERS, help='trackers to report to as well')
    add_quiet(group)
    add_push_arguments(
        parser, 'push the best model to this repo at the end', 'licence of the weights, as in apache-2.0')


def add_eval_arguments(parser: ArgumentParser) -> None:
    """The flags of an evaluation; its recipe may be that of the training."""
    parser.finish = _finish_evaluation
    parser.refused = REFUSED_BY_EVAL
    parser.add_recipes(lambda: create_parser().flags)
    either = parser.add_mutually_exclusive_group()
    either.add_argument('initial_checkpoint', nargs='?', default=argparse.SUPPRESS, metavar='CHECKPOINT',
                        help='weights, a file or a folder as RUN/best (default: those of --pretrained)')
    either.add_argument('--checkpoint', dest='initial_checkpoint', metavar='CHECKPOINT', help='the same')
    group = add_image_arguments(parser, required=True)
    add_validation_data(group, '--split')
    add_workers(group)
    group = _add_model(parser)
    _add_precision(group)
    group = parser.add_argument_group('evaluation')
    group.add_argument('--probe', choices=PROBES,
                       help='evaluate its features by those of --train-split: 20 nearest neighbours, or a linear '
                            'classifier')
    add_image_size(group, 'height and width of images (default: the model\'s)')
    group.add_argument('-b', '--batch-size', '-vb', '--validation-batch-size', type=int, default=128, metavar='N',
                       help='images per process')
    _add_crop(group)
    add_quiet(group)
    # What else makes a student.
    parser.set_defaults(drop=0., drop_path=None, grad_checkpointing=False, validation_batch_size=None)


def add_validation_data(group: argparse._ActionsContainer, *aliases: str) -> None:
    """What to evaluate on."""
    group.add_argument('--val-dataset', metavar='NAME', help='validation set, if not a split of --dataset')
    group.add_argument('--val-split', *aliases, metavar='NAME',
                       help='validation split (default: validation, val or test)')


def _add_model(parser: ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group('student')
    group.add_argument('-m', '--model', metavar='NAME',
                       help=f'timm name (default: that of the weights that are evaluated, or {DEFAULT_MODEL})')
    group.add_argument('--pretrained', action='store_true', help='start from pretrained weights')
    group.add_argument('--num-classes', type=int, metavar='N',
                       help='classes (default: those of the store, the data or the weights); 0 for a backbone')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='NAME=VALUE',
                       help='arguments of the model, as in depths=[2,2,2,2]')
    group.add_argument('--channels-last', action='store_true', help='channels-last memory format')
    return group


def _add_precision(group: argparse._ActionsContainer) -> None:
    group.add_argument('--amp', action='store_true', help='as --amp-dtype float16, unless that says otherwise')
    group.add_argument('--amp-dtype', choices=('bfloat16', 'float16'),
                       help='autocast the student (default: what accelerate is configured to, or none)')


def _add_crop(group: argparse._ActionsContainer) -> None:
    group.add_argument('--crop-pct', type=float, metavar='P', help='evaluation crop (default: the model\'s)')
    group.add_argument('--crop-mode', choices=('center', 'squash', 'border'),
                       help='kind of evaluation crop (default: the model\'s)')
    group.add_argument('--interpolation', metavar='NAME', help='evaluation resize (default: the model\'s)')


def _launch_settings() -> dict[str, Any]:
    """The flags that accelerate is configured to, by its launcher or the environment."""
    asked = {'amp_dtype': PRECISIONS.get(os.environ.get('ACCELERATE_MIXED_PRECISION', 'no'))}
    if (steps := os.environ.get('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '1')) != '1':
        if not steps.isdecimal() or not int(steps):
            raise InputError(f'ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {steps}; expected a number of batches')
        asked['grad_accum_steps'] = int(steps)
    return {name: value for name, value in asked.items() if value is not None}


def _finish_launch(args: argparse.Namespace) -> None:
    if args.amp and args.amp_dtype is None:
        args.amp_dtype = 'float16'
    del args.amp
    asked = LAUNCH_DEFAULTS | _launch_settings()
    for name in asked.keys() & vars(args).keys():
        if getattr(args, name) is None:
            setattr(args, name, asked[name])


def tell_launch(args: argparse.Namespace) -> None:
    """Say what accelerate is configured to where it is followed, and where a flag wins over it."""
    for name, value in _launch_settings().items():
        flag, given = f'--{name.replace("_", "-")}', getattr(args, name, None)
        if given == value:
            info(f'{flag} {value}, as accelerate is configured')
        elif given is not None:
            warning(f'{flag} {given} wins over {value}, which accelerate is configured to')


def _finish_loss(args: argparse.Namespace) -> None:
    """timm's two weights are alpha where they sum to one; with the first alone they do."""
    task, distill = args.task_loss_weight, args.distill_loss_weight
    del args.task_loss_weight, args.distill_loss_weight
    if task is not None or distill is not None:
        # As in timm: weights apart from each other where the second is given.
        task = 1. if task is None else task
        distill = 1 - task if distill is None else distill
        total = task + distill
        if not math.isclose(total, 1) or task > 1:
            alike = f'--alpha {distill / total:.4g} weighs them alike' if task <= total > 0 else 'see --alpha'
            raise InputError(f'the weights of the losses are {task:g} (--task-loss-weight) and {distill:g} '
                             f'(--distill-loss-weight); expected a sum of 1: {alike}')
        alpha = round(distill, 9)
        if args.alpha not in (None, alpha):
            raise InputError(f'--alpha is {args.alpha:g}, and timm\'s weights of the losses are --alpha {alpha:g}; '
                             f'leave one of them out')
        args.alpha = alpha
    args.alpha = 1. if args.alpha is None else args.alpha
    if (args.bce_sum or args.bce_target_thresh is not None) and not args.bce_loss:
        raise InputError('--bce-sum and --bce-target-thresh change the loss of --bce-loss; add it, or leave them out')
    if args.bce_loss and args.logits and args.alpha == 1:
        warning('--bce-loss changes nothing: with --alpha 1 labels have no weight')


def _finish_evaluation(args: argparse.Namespace) -> argparse.Namespace:
    if args.initial_checkpoint is None and not args.pretrained:
        raise InputError('there are no weights to evaluate; name a checkpoint, or add --pretrained')
    _finish_launch(args)
    if args.model is None and args.initial_checkpoint is not None:
        from ..models.loading import config_beside

        if config := config_beside(args.initial_checkpoint):
            args.model = f'local-dir:{config.parent}'
    args.model = args.model or DEFAULT_MODEL
    return args


def _finish(args: argparse.Namespace) -> argparse.Namespace:
    check_push_arguments(args)
    view_arguments(args)
    _finish_launch(args)
    _finish_loss(args)
    args.model = args.model or DEFAULT_MODEL
    if args.sched in ('none', 'plateau'):
        raise InputError(f'--sched {args.sched} is not a schedule here; use --sched constant, or another of timm')
    if args.compile not in (None, 'inductor'):
        import torch

        if args.compile not in torch.compiler.list_backends(exclude_tags=()):
            raise InputError(
                f'--compile {args.compile} is no backend of torch.compile; leave its name out for inductor')
    if args.teacher and not args.logits:
        raise InputError('--teacher without --logits: name the folder that keeps what the teacher predicts')
    if args.teacher and len(args.logits) > 1:
        raise InputError('--teacher with several stores in --logits: fill each with timm-tinyvit fill first')
    if args.teacher:
        from ..base.hub_client import is_hub_url

        if is_hub_url(args.logits[0]):
            raise InputError(f'--teacher fills a store in a folder, and {args.logits[0]} is on the Hub; leave '
                             f'--teacher out, or give --logits a folder')
    if args.streaming and not args.logits:
        raise InputError('--streaming needs a store with keys: give --logits')
    if (args.epochs + args.cooldown_epochs) % args.views_per_image:
        raise InputError(f'{args.epochs + args.cooldown_epochs} epochs are no multiple of --views-per-image '
                         f'{args.views_per_image}; without the last of them not every image is shown as often')
    if args.streaming and args.views_per_image > 1:
        raise InputError('--views-per-image wants the images in any order, which a stream does not give; leave it out')
    if args.mixup_mode is None:
        args.mixup_mode = 'pair' if args.logits else 'batch'
    if args.logits and args.mixup_mode != 'pair':
        raise InputError(f'--mixup-mode {args.mixup_mode} mixes views that the teacher of --logits has not seen; give '
                         f'--mixup-mode pair')
    if (args.mixup or args.cutmix or args.cutmix_minmax) and args.batch_size % 2:
        raise InputError(f'--batch-size is {args.batch_size}; --mixup and --cutmix need an even one')
    idle = [f'--{name.replace("_", "-")}' for name, usual in (
        ('alpha', 1), ('temperature', 1), ('distill_loss', 'cross-entropy'), ('standardize', False),
        ('remainder', 'share'), ('feature_loss', 'cosine'), ('feature_weight', 1), ('projector', 'linear'),
        ('teacher_checkpoint', None), ('store_epochs', None), ('keep_epochs', None), ('store_cache', None),
    ) if getattr(args, name) != usual]
    if idle and not args.logits:
        warning(f'without --logits the student learns from labels alone, and {", ".join(idle)} changes nothing')
    return args


def check_launch(args: argparse.Namespace, accelerator: 'Accelerator') -> None:
    """Say what the launch is configured to, and refuse flags that it or its devices have no way to do.

    Raises:
        InputError: They have none.
    """
    tell_launch(args)
    if args.sync_bn and accelerator.device.type == 'cpu':
        raise InputError('--sync-bn needs GPUs: torch has no synchronised batch norm on a CPU; leave it out')
    if args.clip_mode == 'agc' and accelerator.is_fsdp2:
        raise InputError('--clip-mode agc compares whole weights with their gradients, and the launch shards them; '
                         'choose --clip-mode norm or value, or launch it with --multi_gpu')
