"""Models for other runtimes: ONNX, a `torch.export` program, or a library compiled by AOTInductor.

    timm-tinyvit export --model tiny_vit_21m_224 --format onnx --output tiny_vit_21m.onnx
    timm-tinyvit export --model local-dir:my_run --format torch --output my_run.pt2
    timm-tinyvit export --model tiny_vit_5m_224 --format aotinductor --output tiny_vit_5m.pt2

The model is put in eval mode and its batch norms are folded first. Images go in as float [batch, channels, H, W],
normalised as the model's config says, logits come out, and the batch may be of any size. What was written is loaded
again and run on another batch size; the command fails if its logits are not the model's.
"""

import copy
import importlib.util
import io
import os
from pathlib import Path
from collections.abc import Callable, Sequence

import torch
from timm.utils import reparameterize_model
from torch import nn

from ..base.errors import InputError
from ..base.files import remove_leftovers, temporary_beside
from ..models.config_file import image_config
from ..models.loading import create_pretrained, look_at_zeros, set_image_size

__all__ = ['FORMATS', 'export', 'export_pretrained']

# Any, but torch 2.7 takes an unbounded size for none where a model's own reshaping asks whether it is the largest.
BATCH = torch.export.Dim('batch', max=(1 << 31) - 1)
# float32 rounding in another order of summation
TOLERANCE = 1e-4

Runner = Callable[[torch.Tensor], torch.Tensor]


def _export_program(model: nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (images,), dynamic_shapes=({0: BATCH},))


def export_torch(model: nn.Module, images: torch.Tensor, path: Path) -> Runner:
    # torch's writer of files aborts the process on a full disk.
    buffer = io.BytesIO()
    torch.export.save(_export_program(model, images), buffer)
    path.write_bytes(buffer.getbuffer())
    return torch.export.load(path).module()


def export_aotinductor(model: nn.Module, images: torch.Tensor, path: Path) -> Runner:
    if torch.__version__ < '2.9':  # the library that 2.7 makes writes beyond its memory
        raise InputError(f'aotinductor needs torch 2.9 or newer, but this is {torch.__version__}: pip install -U torch')
    torch._inductor.aoti_compile_and_package(_export_program(model, images), package_path=str(path))
    return torch._inductor.aoti_load_package(str(path))


def export_onnx(model: nn.Module, images: torch.Tensor, path: Path) -> Runner:
    missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'ONNX needs {", ".join(missing)}: pip install "timm_tinyvit[export]"')
    import onnxruntime

    torch.onnx.export(
        model, (images,), path, dynamo=True, external_data=False, verbose=False, input_names=['images'],
        output_names=['logits'], dynamic_shapes=({0: BATCH},))
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])


FORMATS = {
    'onnx': (export_onnx, '.onnx'),
    'torch': (export_torch, '.pt2'),
    'aotinductor': (export_aotinductor, '.pt2'),
}


def export(model: nn.Module, format: str, path: Path) -> float:
    """Write a model for another runtime, and check that it computes the same there.

    Args:
        model: A timm model on the CPU; it is left as it is.
        format: `onnx`, `torch` or `aotinductor`.
        path: File to write, with the format's ending.

    Returns:
        Largest difference between the logits of the two, over the largest logit.

    Raises:
        InputError: The ending is another format's, a package is missing, or the logits differ.
    """
    write, suffix = FORMATS[format]
    if path.suffix != suffix:
        raise InputError(f'{path} ends in {path.suffix or "nothing"}, but {format} files end in {suffix}')
    input_size = image_config(model, path.stem)['input_size']
    model = reparameterize_model(copy.deepcopy(model).eval().requires_grad_(False), inplace=True)
    generator = torch.Generator().manual_seed(0)
    remove_leftovers(path.parent, path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # AOTInductor looks at the ending.
        with temporary_beside(path, suffix) as temporary, torch.no_grad():
            run = write(model, torch.randn(2, *input_size, generator=generator), temporary)
            images = torch.randn(3, *input_size, generator=generator)
            expected = model(images)
            difference = ((run(images) - expected).abs().max() / expected.abs().max()).item()
            if not difference <= TOLERANCE:
                raise InputError(
                    f'the {format} model differs from the original by {difference:.1e} of its largest logit')
            os.replace(temporary, path)
    except OSError as error:
        raise InputError(f'{path} cannot be written: {error.strerror or error}')
    return difference


def export_pretrained(
        name: str,
        format: str,
        path: Path,
        checkpoint: str | None = None,
        num_classes: int | None = None,
        img_size: Sequence[int] | None = None,
) -> str:
    """Write a model that is named, for another runtime.

    Args:
        name: timm's name, hf-hub:ORG/NAME, local-dir:PATH or a folder.
        format: As in `export`, like the next one.
        path: The file.
        checkpoint: Weights, instead of the pretrained ones of that name.
        num_classes: Classes of the checkpoint's head.
        img_size: Another image size, [N] or [H, W].

    Returns:
        Lines for the user: the images that the file takes, and how far it was checked.

    Raises:
        InputError: As `export`, or there is no such model, or none of that size.
    """
    model = create_pretrained(name, checkpoint, num_classes, needs_classifier=False)
    if img_size is not None:
        _set_size(model, name, img_size)
    difference = export(model, format, path)
    config = image_config(model, name)
    return (f'{path}: input float32 [batch, {", ".join(map(str, config["input_size"]))}], mean {config["mean"]}, '
            f'std {config["std"]}\n'
            f'checked against the original: largest difference {difference:.1e} of the largest logit')


def _set_size(model: nn.Module, name: str, img_size: Sequence[int]) -> None:
    """Have a model take images of another size, [N] or [H, W]."""
    size = (*img_size, *img_size)[-2:]
    try:
        set_image_size(model, size)
        model.pretrained_cfg['input_size'] = (model.pretrained_cfg['input_size'][0], *size)
        look_at_zeros(model, model.pretrained_cfg['input_size'])
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = f'{type(error).__name__} {error}'.splitlines()[0]
        raise InputError(f'{name} cannot take --img-size {" ".join(map(str, img_size))}: {reason}')
