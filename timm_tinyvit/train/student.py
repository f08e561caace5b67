"""The model that learns: any timm model, at the size of the views, from the weights that the flags name.

Weights come from timm, from a run of this project, or from the official code; a model with a `checkpoint_filter_fn`
in its module makes them fit, windows and names included. A classifier of ImageNet-22k becomes the one of ImageNet-1k
that the paper's fine-tuning starts from; one of any other classes starts from zero, as in the paper's code.
"""

import argparse
import copy
from contextlib import contextmanager
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..base.errors import InputError
from ..base.hub_client import reason_of
from ..models.imagenet22k import NUM_CLASSES_22K, classifier_22k_to_1k
from ..models.loading import (
    check_folder, create_model, is_22k_to_1k, load_weights, look_at_zeros, num_classes_of, read_weights,
    set_image_size,
)

__all__ = ['check_batch_norms', 'create_student', 'fixed_statistics', 'freeze_batch_norm']


def create_student(
        args: argparse.Namespace,
        num_classes: int | None = None,
        size: tuple[int, int] | None = None,
        log: Callable[[str], None] | None = None,
) -> nn.Module:
    """The student that the flags describe.

    Args:
        args: The flags of the group `student`.
        num_classes: Classes of its head; by default those of its weights.
        size: Height and width of its input; by default its own.
        log: Told what becomes of a classifier of other classes; without it only ImageNet-22k's is taken.

    Raises:
        InputError: There is no such model, its weights do not fit it, or it has no gradient checkpointing.
    """
    kwargs = {'drop_rate': args.drop, **args.model_kwargs}
    if args.drop_path is not None:
        kwargs['drop_path_rate'] = args.drop_path
    check_folder(args.model)
    # Other weights take the place of all of them.
    pretrained = args.pretrained and not args.initial_checkpoint
    try:
        if num_classes is None and args.initial_checkpoint:
            num_classes = num_classes_of(create_model(args.model, **kwargs), read_weights(args.initial_checkpoint))
        head = {} if num_classes is None else {'num_classes': num_classes}
        model = create_model(args.model, pretrained, **head, **kwargs)
        if pretrained and is_22k_to_1k(model.pretrained_cfg.get('num_classes'), num_classes):
            model = classifier_22k_to_1k(create_model(args.model, True, num_classes=NUM_CLASSES_22K, **kwargs))
        if size is not None:
            set_image_size(model, size)
        if args.initial_checkpoint:
            load_weights(model, args.initial_checkpoint, log)
        look_at_zeros(model, (3, *(size or model.pretrained_cfg['input_size'][-2:])))
    except InputError:
        raise
    except Exception as error:
        if args.drop_path is not None and "'drop_path_rate'" in str(error):
            raise InputError(f'the model {args.model} has no drop path; leave --drop-path out')
        if reason := reason_of(error):
            raise InputError(f'the pretrained weights of the student {args.model} cannot be had from the Hub: {reason}'
                             f'; or leave --pretrained out, or name weights on disk with --initial-checkpoint')
        # Unknown names, arguments and files each raise their own kind.
        reason = f'{type(error).__name__} {error}'.splitlines()[0]
        pixels = f' for {size[0]}x{size[1]} pixels' if size else ''
        raise InputError(f'the student {args.model} cannot be made{pixels}: {reason}; check --model, --model-kwargs, '
                         f'{"--pretrained, " if pretrained else ""}--img-size, --num-classes and '
                         f'--initial-checkpoint')
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AssertionError, AttributeError, NotImplementedError):
            raise InputError(f'the model {args.model} has no gradient checkpointing; leave --grad-checkpointing out')
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def check_batch_norms(model: nn.Module, args: argparse.Namespace, size: tuple[int, int], num_processes: int) -> None:
    """Refuse batches of one image where a batch norm would have one value of each channel to take statistics of.

    Raises:
        InputError: It has.
    """
    if args.batch_size > 1 or args.freeze_bn or args.sync_bn and num_processes > 1:
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(model).train()(torch.zeros(1, 3, *size))
    except ValueError as error:
        if 'more than 1 value per channel' not in str(error):
            raise
        raise InputError(f'a batch of one image of {size[0]}x{size[1]} pixels leaves a batch norm of {args.model} one '
                         f'value per channel, of which there are no statistics; choose a larger --batch-size or '
                         f'--img-size, or --freeze-bn')


@contextmanager
def fixed_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, forward passes leave the running statistics of batch norms alone: where activations are checkpointed, the
    backward pass has another one, and would count each batch twice.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # Not without statistics: the second pass must save as many tensors as the first.
        norm.momentum, norm.num_batches_tracked = 0., None
    try:
        yield
    finally:
        for norm, (momentum, num_batches) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches


def freeze_batch_norm(model: nn.Module) -> None:
    """Put batch norms in evaluation mode, to be called after each `train()`: statistics stay, weights and biases learn.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
