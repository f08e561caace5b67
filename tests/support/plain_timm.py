"""What children do with timm as people have it who know nothing of this package: load a model, and run it."""

import importlib
import json
import sys

import timm
import torch
from safetensors.torch import save_file


def block() -> None:
    """Let this package be as if it were not installed: to import it raises."""
    sys.modules.update(timm_tinyvit=None, train_distill=None)


def save_logits(folder: str, images: str, logits: str) -> None:
    """Run the model in a folder on the images in a file, and write its logits to another."""
    block()
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert type(model).__module__.startswith('timm.models.')
    with torch.inference_mode():
        torch.save(model(torch.load(images)), logits)


def pull(package: str) -> None:
    """Load a model from the Hub with timm, or after an import of timm_tinyvit.

    Writes its tensors, images, their logits and, with `features_only`, their last map to `pulled.safetensors`, and
    prints what it says of itself.
    """
    block() if package == 'timm' else importlib.import_module(package)
    model = timm.create_model('hf-hub:org/student', pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    images = torch.linspace(-1, 1, 2 * data['input_size'][1] ** 2 * 3).view(2, *data['input_size'])
    with torch.inference_mode():
        logits = model(images)
        backbone = timm.create_model('hf-hub:org/student', pretrained=True, num_classes=0, features_only=True).eval()
        last = backbone(images)[-1].contiguous()
    save_file({**model.state_dict(), 'images': images, 'logits': logits, 'map': last}, 'pulled.safetensors')
    print(json.dumps(dict(module=type(model).__module__, data=data, names=model.pretrained_cfg.get('label_names'))))


def run_example(code: str) -> None:
    """Run the code of a card."""
    block()
    exec(code, {'__name__': '__main__'})
