"""What importing this package, twice too, changes in timm's registry of models and in the warnings of a process."""

import importlib
import json
import warnings

import timm
from timm.models import _registry


def registry() -> tuple:
    entries = {name: (entry.__module__, entry.__name__) for name, entry in _registry._model_entrypoints.items()}
    return (entries, sorted(_registry._model_pretrained_cfgs), sorted(timm.list_models(include_tags=True)),
            sorted(timm.list_models(pretrained=True)), sorted(timm.list_models(module='tiny_vit')))


def print_changes() -> None:
    """Print the models that changed and came, whether the rest stayed, the warnings, and whether filters stayed."""
    before, filters = registry(), list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        import timm_tinyvit
        once = registry()
        importlib.reload(timm_tinyvit.models.tiny_vit)
        importlib.reload(timm_tinyvit)
    assert once == registry()
    changed = [name for name in before[0] if before[0][name] != once[0][name]]
    print(json.dumps([sorted(changed), sorted(set(once[0]) - set(before[0])), before[1:] == once[1:],
                      [str(warning.message) for warning in caught], filters == list(warnings.filters)]))
