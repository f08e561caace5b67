"""Image classifiers of `transformers` as modules from normalised images to logits, named `hf:ORG/NAME` or `hf:FOLDER`.

Mean, std and size are those of its image processor; no code of a repo is run.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.errors import InputError
from ..base.hub_client import reason_of

__all__ = ['PREFIX', 'HFClassifier', 'load_classifier']

PREFIX = 'hf:'


class HFClassifier(nn.Module):
    """An image classifier with timm's words for what it is, `num_classes` and `pretrained_cfg`.

    Args:
        model: From images [B, 3, H, W] to an output with `logits` [B, C].
        processor: Its image processor.
    """

    def __init__(self, model: nn.Module, processor: Any):
        super().__init__()
        self.model = model
        self.num_classes = model.config.num_labels
        names = [str(model.config.id2label.get(number, '')) for number in range(self.num_classes)]
        # What transformers calls classes that nobody has named.
        known = names != [f'LABEL_{number}' for number in range(self.num_classes)]
        self.pretrained_cfg = {
            'architecture': type(model).__name__, 'num_classes': self.num_classes, **_images_of(processor),
            'label_names': names if known and all(names) else None}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=x).logits


def _images_of(processor: Any) -> dict[str, Any]:
    """How images are prepared, in timm's words: for pixels from 0 to 1."""
    if getattr(processor, 'rescale_offset', None):
        raise ValueError('its image processor shifts pixels, which mean and std do not say')
    crop = getattr(processor, 'crop_size', None) if getattr(processor, 'do_center_crop', None) else None
    size = dict(crop or processor.size)
    side = size.get('shortest_edge') or size.get('longest_edge')
    height, width = size.get('height') or side, size.get('width') or side
    scale = 255 * (processor.rescale_factor if processor.do_rescale else 1.)
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.,) * 3, (1.,) * 3)
    return {'input_size': (3, int(height), int(width)), 'mean': tuple(float(value) / scale for value in mean),
            'std': tuple(float(value) / scale for value in std)}


def load_classifier(name: str) -> HFClassifier:
    """The classifier of a name that begins with `hf:`, in float32.

    Raises:
        InputError: `transformers` is not installed, there is no such model, or it is no whole image classifier.
    """
    try:
        import transformers
    except ImportError:
        raise InputError(f'the model {name} needs transformers; pip install timm_tinyvit[transformers]')
    place = name.removeprefix(PREFIX)
    folder = Path(place).expanduser()
    if not folder.is_dir() and place.startswith(('/', '.', '~')):
        raise InputError(f'there is no folder {place}; give hf:ORG/NAME, or hf:FOLDER with what save_pretrained wrote')
    place, _, revision = (str(folder), '', '') if folder.is_dir() else place.partition('@')
    options = dict(revision=revision or 'main', trust_remote_code=False)
    said = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(place, **options)
        model, loaded = transformers.AutoModelForImageClassification.from_pretrained(
            place, dtype=torch.float32, output_loading_info=True, **options)
        if lacking := sorted(loaded['missing_keys']) + sorted(map(str, loaded['mismatched_keys'])):
            raise InputError(f'the weights of the model {name} lack {lacking[0]}, and it would be drawn at random; '
                             f'fine-tune it for classification first')
        return HFClassifier(model, processor)
    except InputError:
        raise
    except Exception as error:
        # Folders, configurations and the Hub fail in as many ways as there are models.
        if reason := reason_of(error):
            raise InputError(f'the model {name} cannot be had from the Hub: {reason}')
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f'the model {name} cannot be loaded as an image classifier of transformers: {reason}; give '
                         f'hf:ORG/NAME or hf:FOLDER of one, with its image processor')
    finally:
        transformers.logging.set_verbosity(said)
