"""Brings models and stores to the Hub with their cards, and models to other formats: nothing is trained here."""

from importlib import import_module
from typing import Any

_PUBLIC = {
    'convert_checkpoint': 'convert', 'dataset_card': 'store_card', 'export_pretrained': 'export',
    'publish': 'push_model', 'publish_store': 'push_store', 'run_card': 'model_card',
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_PUBLIC[name]}', __name__), name)
