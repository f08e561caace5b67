"""What models are called: the repo of the Hub behind a name, and the part of a name that others may see."""

from pathlib import Path

import timm

__all__ = ['hub_repo_of', 'public_name']


def hub_repo_of(model: str) -> str | None:
    """The repo of the Hub with the weights of a model that is named in full: `hf-hub:ORG/NAME`, or with timm's tag.

    A name without a tag may have gone with weights of a file.
    """
    if model.startswith('hf-hub:'):
        return model.removeprefix('hf-hub:').partition('@')[0]
    if '.' in model and timm.is_model_pretrained(model):
        return timm.get_pretrained_cfg(model).hf_hub_id
    return None


def public_name(name: str) -> str:
    """What a model is called in what others see: of a folder only the last part."""
    path = name.removeprefix('local-dir:')
    return Path(path).name if path != name or path.startswith(('/', '~', '.')) else name
