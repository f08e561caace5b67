"""Brings models and stores to the Hub with their cards, and models to other formats: nothing is trained here."""

from ..base.lazy import lazy_names

_PUBLIC = {
    'convert_checkpoint': 'convert', 'dataset_card': 'store_card', 'export_pretrained': 'export',
    'publish': 'push_model', 'publish_store': 'push_store', 'run_card': 'model_card',
}
__all__ = list(_PUBLIC)
__getattr__ = lazy_names(__name__, _PUBLIC)
