"""Weights that anyone can make again from the names of the tensors, and the image that the golden figures belong to."""

import functools
import json
import zlib
from typing import Any

import numpy as np
import torch

from support.flags import ROOT


@functools.cache
def golden(name: str) -> dict[str, Any]:
    """The figures of a file in tests/golden."""
    return json.loads((ROOT / 'tests' / 'golden' / f'{name}.json').read_text())


def official_state_dict(build: str) -> dict[str, torch.Tensor]:
    """The golden weights of a model of the official code, by its names."""
    names, shapes = golden('tinyvit')['names'], golden('tinyvit')['builds'][build]['shapes']
    return {name: golden_tensor(name, shape) for name, shape in zip(names, shapes)}


def golden_tensor(name, shape):
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith('num_batches_tracked'):
        return torch.zeros(shape, dtype=torch.int64)
    if name.endswith('running_var'):
        value = 0.5 + np.abs(normal)
    elif name.endswith('running_mean'):
        value = 0.1 * normal
    elif name.endswith('attention_biases'):
        value = 0.5 * normal
    elif len(shape) == 1 and name.endswith('weight'):
        value = 1 + 0.1 * normal
    elif len(shape) == 1:
        value = 0.1 * normal
    else:
        value = normal / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def golden_image(size):
    return torch.from_numpy(np.random.RandomState(0).standard_normal((1, 3, size, size)).astype(np.float32))


def relative_difference(result, reference):
    return ((result - reference).abs().max() / reference.abs().max()).item()
