"""Training with one model shared out over the processes: FSDP2, by accelerate's own configuration.

Where a launch asks for it, each process keeps its part of every weight, gradient and moment of the optimiser, and of
the averaged weights. Whatever leaves the training loop is whole: checkpoints, which any other kind of launch can go on
from, and the models that are evaluated and exported. Without FSDP2 every function here leaves things as they are.
"""

import warnings
from copy import copy, deepcopy
from typing import Any
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ..base.console import info
from ..base.errors import InputError

__all__ = [
    'SHARDED_OPTIMIZERS', 'ModelEma', 'block_classes', 'load_whole_state', 'local', 'prepare_student', 'whole',
    'whole_state',
]


# Classes of timm's optimisers that train the parts of weights as they train whole ones. Others take matrices as a whole
# (Muon, Adafactor, Kron), or decide by what they find: they fail on parts, hang, or quietly train in another way.
SHARDED_OPTIMIZERS = frozenset((
    'AdaBelief', 'Adadelta', 'Adagrad', 'Adam', 'AdamW', 'AdamWLegacy', 'Adamax', 'Adan', 'Adopt', 'LaProp', 'Lamb',
    'Lars', 'Lion', 'MADGRAD', 'NAdam', 'NAdamLegacy', 'NAdamW', 'RAdam', 'RAdamLegacy', 'RMSprop', 'RMSpropTF', 'SGD',
    'SGDW'))


class ModelEma(ModelEmaV3):
    """timm's average of a model; of a sharded one, each process averages its own parts."""

    def _foreach_lerp_(
            self,
            ema_values: list[torch.Tensor],
            model_values: list[torch.Tensor],
            weight: float,
    ) -> None:
        # Buffers are not sharded, and torch does not take both kinds together.
        super()._foreach_lerp_([*map(local, ema_values)], [*map(local, model_values)], weight)


def prepare_student(
        accelerator: Accelerator,
        student: nn.Module,
        optimizer: Optimizer,
        ema: ModelEmaV3 | None = None,
        exported: nn.Module | None = None,
) -> tuple[nn.Module, Optimizer, Callable[[nn.Module], nn.Module]]:
    """Set a student up for the processes of the launch: sharded, under DDP, or as it is.

    Args:
        accelerator: Of all processes.
        student: A timm model on the CPU; changed in place.
        optimizer: Of its parameters; their groups stay, and refer to the parts of this process.
        ema: Its average, to be sharded like it.
        exported: The part of the student that is evaluated and exported; all of it by default.

    Returns:
        The student as it is called in training, the optimiser, and a function that gives a model as it is evaluated
        and exported: the student or its average itself, or a whole copy of it, made by all processes together.

    Raises:
        InputError: The student cannot be sharded in this way.
    """
    # Depthwise weights have one stride too many to tell the layouts apart; DDP asks each time and copies nothing.
    warnings.filterwarnings('ignore', message='Grad strides do not match')
    # TinyViT's blocks return views, which nothing changes in place.
    warnings.filterwarnings('ignore', message=r'FSDP2-wrapped module \(FSDP(MBConv|TinyVitBlock)\) returned a view')
    if not accelerator.is_fsdp2:
        if ema is not None:
            ema.to(accelerator.device)
        return *accelerator.prepare(student, optimizer), lambda model: model
    kind = type(optimizer).__name__
    if kind not in SHARDED_OPTIMIZERS or any(group.get('caution') for group in optimizer.param_groups):
        raise InputError(f'the optimiser {kind} does not train a sharded model as it trains a whole one; choose --opt '
                         f'adamw, lamb or sgd, or launch it with --multi_gpu')
    template = deepcopy(exported or student)
    # Parts are rows of contiguous tensors. Where the views are channels-last, so are the activations.
    student.to(memory_format=torch.contiguous_format)
    # Under this name models of transformers tell accelerate what makes a unit, where the launch does not name it.
    student._no_split_modules = blocks = block_classes(student)
    try:
        wrapped, optimizer = accelerator.prepare(student, optimizer)
        if ema is not None:
            fsdp2_prepare_model(accelerator, ema.module.to(memory_format=torch.contiguous_format))
    except (NotImplementedError, ValueError) as error:
        raise InputError(f'the student cannot be sharded ({str(error).rstrip(".")}); correct the settings of FSDP (the '
                         f'classes of its blocks: {", ".join(blocks) or "none"}), or launch it with --multi_gpu')
    units = sum(isinstance(module, FSDPModule) for module in student.modules())
    info(f'the student is sharded over {accelerator.num_processes} process(es), in {units} unit(s)')

    def whole_model(model: nn.Module) -> nn.Module:
        result = deepcopy(template).to(accelerator.device)
        result.load_state_dict({name: whole(tensor) for name, tensor in model.state_dict().items()})
        return result

    return wrapped, optimizer, whole_model


def block_classes(model: nn.Module) -> list[str]:
    """Names of the classes in the sequences that timm calls `blocks`."""
    blocks = [module for name, module in model.named_modules() if name.rpartition('.')[2] == 'blocks']
    names = set()
    for module in blocks:
        if isinstance(module, nn.Sequential | nn.ModuleList):
            blocks.extend(module)
        else:
            names.add(type(module).__name__)
    return sorted(names)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, by all processes together where each has a part of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_state(owner: nn.Module | Optimizer) -> dict[str, Any]:
    """The state dict of a model or an optimiser as of one process, by all processes together.

    Returns:
        Tensors that were in parts are whole and on the CPU of the first process, on the others None.
    """

    def collect(value: Any) -> Any:
        if isinstance(value, dict):
            # A copy, since a module's state dict knows the versions of its layers as well.
            collected = copy(value)
            collected.update({key: collect(item) for key, item in value.items()})
            return collected
        if not isinstance(value, DTensor):
            return value
        # One after the other, so that no device holds more than one of them.
        tensor = whole(value)
        return tensor.cpu() if value.device_mesh.get_rank() == 0 else None

    return collect(owner.state_dict())


def load_whole_state(owner: nn.Module | Optimizer, state: dict[str, Any]) -> None:
    """Load what `whole_state` gave, from any number of processes; each takes its part.

    Args:
        owner: A model or an optimiser, sharded or not.
        state: Whole on every process.
    """

    def part(value: Any, like: Any) -> Any:
        if not isinstance(like, DTensor) or not isinstance(value, torch.Tensor) or value.shape != like.shape:
            return value
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    if isinstance(owner, nn.Module):
        current = owner.state_dict()
        parts = {name: part(value, current.get(name)) for name, value in state.items()}
    else:
        # An optimiser numbers its weights through all groups; what it keeps of one has mostly the same shape.
        weights = [weight for group in owner.param_groups for weight in group['params']]
        parts = {'state': {index: {name: part(value, weights[index]) for name, value in entry.items()}
                           for index, entry in state['state'].items()}}
    state = copy(state)
    state.update(parts)
    owner.load_state_dict(state)
