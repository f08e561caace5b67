"""What models are called: the repo of the Hub behind a name, and the part of a name that others may see."""

from pathlib import Path

import timm

__all__ = ['MODEL_FOLDERS', 'RUN_RECORD', 'folder_name', 'hub_repo_of', 'public_name']

# What each start of a run writes into its folder; the folders of its models, and their files, whose names say little.
RUN_RECORD = 'run.json'
WEIGHTS = 'model.safetensors'
MODEL_FOLDERS = ('best', 'last', 'best_ema', 'last_ema')


def folder_name(location: str | Path) -> str:
    """What a folder or file of weights is called in what others see; of a run's, the run too."""
    path = Path(location).expanduser().resolve()
    path = path.parent if path.name == WEIGHTS else path
    is_of_run = path.name in MODEL_FOLDERS and (path.parent / RUN_RECORD).is_file()
    return '/'.join(path.parts[-2:]) if is_of_run else path.name


def hub_repo_of(model: str) -> str | None:
    """The repo of the Hub with the weights of a model that is named in full: `hf-hub:ORG/NAME`, `hf:ORG/NAME`, or with
    timm's tag.

    A name without a tag may have gone with weights of a file.
    """
    kind, sign, repo = model.partition(':')
    if sign and kind in ('hf-hub', 'hf'):
        return repo.partition('@')[0] if ' ' not in repo else None
    if '.' in model and timm.is_model_pretrained(model):
        return timm.get_pretrained_cfg(model).hf_hub_id
    return None


def public_name(name: str) -> str:
    """What a model is called in what others see: of a folder only the last part."""
    path = name.removeprefix('local-dir:')
    return Path(path).name if path != name or path.startswith(('/', '~', '.')) else name
