"""Optimiser, schedule and clipping of a training run: timm's, with the learning rates of the paper.

The paper gives all three learning rates for 512 images per update and scales them with the images that an update
really sees, over processes and accumulated batches. timm's factories make the rest: no weight decay for norms, biases
and what the model names, and a scale by layer from the model's `group_matcher`.
"""

import argparse
from collections.abc import Sequence

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.utils import dispatch_clip_grad
from torch import nn

from ..base.console import warning
from ..base.errors import InputError
from .sharding import whole

__all__ = ['clip_gradients', 'create_optimizer', 'create_schedule', 'learning_rates', 'peak_rate']


def learning_rates(args: argparse.Namespace, images_per_update: int) -> dict[str, float]:
    """The rates in effect: `lr`, `warmup_lr` and `min_lr`.

    Args:
        args: With `lr`, the three as they are; without, `lr_base` and the other two per `lr_base_size` images.
        images_per_update: Images of all processes and accumulated batches together.
    """
    rates = dict(lr=args.lr or args.lr_base, warmup_lr=args.warmup_lr, min_lr=args.min_lr)
    scale = 1. if args.lr else images_per_update / args.lr_base_size
    return {name: rate * scale for name, rate in rates.items()}


def create_optimizer(args: argparse.Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """timm's optimiser of the name `opt`, at this peak learning rate.

    Raises:
        InputError: timm does not make it.
    """
    try:
        optimizer = create_optimizer_v2(model, **{**optimizer_kwargs(args), 'lr': lr}, **args.opt_kwargs)
    except (AssertionError, IndexError, TypeError, ValueError) as error:
        raise InputError(f'timm cannot make the optimiser {args.opt}: {_reason(error)}; check --opt and its arguments, '
                         f'--opt-kwargs too')
    if getattr(optimizer, 'is_second_order', False):
        raise InputError(f'the optimiser {args.opt} needs second derivatives, which are not computed here; choose '
                         f'another --opt')
    return optimizer


def create_schedule(
        args: argparse.Namespace,
        optimizer: torch.optim.Optimizer,
        rates: dict[str, float],
        updates_per_epoch: int,
) -> Scheduler:
    """timm's schedule of the name `sched`, to be stepped by update.

    `linear` falls in a straight line to `min_lr`: timm's polynomial of power one.

    Raises:
        InputError: timm does not make it.
    """
    kwargs = {**scheduler_kwargs(args), 'step_on_epochs': False, **rates}
    del kwargs['lr']
    if args.sched == 'linear':
        kwargs.update(sched='poly', decay_rate=1.)
    try:
        schedule, epochs = create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=updates_per_epoch)
    except (AssertionError, IndexError, TypeError, ValueError) as error:
        raise InputError(f'timm cannot make the schedule {args.sched}: {_reason(error)}; check --sched and its '
                         f'arguments')
    if epochs != args.epochs + args.cooldown_epochs:
        raise InputError(f'the schedule {args.sched} has no cooldown; leave --cooldown-epochs out')
    for name in ('warmup_lr', 'min_lr'):
        if rates[name] > rates['lr']:
            warning(f'--{name.replace("_", "-")} is {rates[name]:g} and above the learning rate of {rates["lr"]:g}; '
                    f'lower it')
    if args.warmup_epochs >= args.epochs:
        warning(f'all of {args.epochs} epochs are warm-up: the learning rate never reaches its peak; lower '
                f'--warmup-epochs')
    return schedule


def peak_rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate without layer decay: the largest of all parameter groups."""
    return max(group['lr'] for group in optimizer.param_groups)


def _reason(error: Exception) -> str:
    return f'{type(error).__name__} {error}'.strip()


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float, mode: str) -> torch.Tensor:
    """Clip gradients in place.

    Args:
        parameters: The model's.
        limit: Norm, value or factor of `mode`; 0 to clip nothing.
        mode: `norm`, `value` or `agc`, as in timm.

    Returns:
        The norm of all gradients before clipping, a scalar tensor.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = whole(nn.utils.get_total_norm([parameter.grad for parameter in parameters]))
    if limit and mode == 'norm':
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    elif limit:
        dispatch_clip_grad(parameters, limit, mode=mode)
    return norm
