"""Models as the Hub and timm take them: safetensors and timm's config.json."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, save_config_for_hf
from torch import nn

from ..base.checksum import with_checksum
from ..base.files import cannot_write, temporary_beside, write_atomic

__all__ = ['export_config', 'export_model']


def export_model(
        folder: Path,
        model: nn.Module,
        label_names: list[str] | None = None,
        data_config: dict[str, Any] | None = None,
        label_descriptions: dict[str, str] | None = None,
) -> None:
    """Write a model so that plain timm loads it: `timm.create_model('local-dir:FOLDER', pretrained=True)`.

    Args:
        folder: Takes model.safetensors and config.json, each replaced as a whole.
        model: A timm model.
        label_names: Names of its classes.
        data_config: How images were prepared when it was evaluated: `input_size`, `crop_pct`, `interpolation` and the
            like, as in timm; by default what its configuration says.
        label_descriptions: What the names mean, where they are such as the synsets of ImageNet.
    """
    # safetensors takes contiguous tensors only, and timm's save_for_hf passes on channels-last weights as they are.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    known: set[int] = set()
    for name, tensor in tensors.items():
        # Nor does it take tied weights, whose names share their memory; timm wants each under each of its names.
        if (place := tensor.untyped_storage().data_ptr()) in known:
            tensors[name] = tensor.clone()
        known.add(place)
    write_atomic(folder / HF_SAFE_WEIGHTS_NAME, with_checksum(save(tensors, metadata={'format': 'pt'})))
    export_config(folder, model, label_names, data_config, label_descriptions)


def export_config(
        folder: Path,
        model: nn.Module,
        label_names: list[str] | None = None,
        data_config: dict[str, Any] | None = None,
        label_descriptions: dict[str, str] | None = None,
) -> None:
    """Write the config.json of `export_model` alone; the model needs no weights."""
    labels = {'label_names': label_names and list(label_names), 'label_descriptions': label_descriptions}
    file = folder / 'config.json'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # timm writes to a file alone.
        with temporary_beside(file) as temporary:
            save_config_for_hf(
                model, str(temporary), model_config={name: value for name, value in labels.items() if value},
                data_config=data_config)
            settings = json.loads(temporary.read_text())
    except OSError as error:
        raise cannot_write(file, error)
    # These describe the pretrained weights of that name, not the ones written here.
    for key in ('tag', 'license', 'origin_url', 'paper_ids', 'paper_name'):
        settings['pretrained_cfg'].pop(key, None)
    write_atomic(file, json.dumps(settings, indent=2).encode())
