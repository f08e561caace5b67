"""The surroundings of a run, launch by launch: versions, machine, processes.

`environment.json` tells which settings of the run are not the defaults, and where its launches differ: a run that goes
on after an update, or on another machine, has several. It names no host, user or folder.
"""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..base.files import write_aside
from ..base.launch import device_name
from ..version import __version__

__all__ = ['read_environment', 'record_environment']

FILE = 'environment.json'
LIBRARIES = ('torchvision', 'timm', 'accelerate', 'datasets', 'numpy')


def record_environment(
        folder: Path,
        args: argparse.Namespace,
        defaults: argparse.Namespace,
        accelerator: Accelerator,
        epoch: int,
) -> None:
    """Write what a launch runs in, where it is not what the launch before it ran in.

    Args:
        folder: Folder of the run.
        args: All settings.
        defaults: The settings of a run without flags.
        accelerator: Knows the processes and the device.
        epoch: Where the launch begins, from 0.

    Raises:
        InputError: The disk is full, or may not be written.
    """
    device = accelerator.device
    here = {
        'timm_tinyvit': __version__,
        'torch': str(torch.__version__),
        **{name: version(name) for name in LIBRARIES},
        'python': platform.python_version(),
        'cuda': torch.version.cuda if device.type == 'cuda' else None,
        'system': f'{platform.system()} {platform.machine()}',
        'device': device_name(device),
        'processes': accelerator.num_processes,
        'threads per process': torch.get_num_threads(),
    }
    here = {name: value for name, value in here.items() if value is not None}
    launches = [launch for launch in read_environment(folder).get('launches', []) if launch['epoch'] <= epoch]
    if not launches or launches[-1]['environment'] != here:
        launches.append({'epoch': epoch, 'environment': here})
    changed = [name for name, value in vars(args).items() if value != getattr(defaults, name)]
    text = json.dumps({'changed_settings': changed, 'launches': launches}, indent=2)
    write_aside(folder / FILE, text.encode())


def read_environment(folder: Path) -> dict[str, Any]:
    """What `record_environment` wrote; empty where there is nothing that can be read."""
    try:
        found = json.loads((folder / FILE).read_text(encoding='utf-8'))
        return found if all({'epoch', 'environment'} <= set(launch) for launch in found['launches']) else {}
    except (KeyError, OSError, TypeError, ValueError):
        return {}
