"""The flags of all programs, under timm's names, and recipes: YAML files of flags.

Needs neither torch nor timm, so that a program answers `--help` and a typing error at once.
"""

from .arguments import STORE_DEFAULTS, ArgumentParser, recipe_names
from .training import create_parser, settings

__all__ = ['STORE_DEFAULTS', 'ArgumentParser', 'create_parser', 'recipe_names', 'settings']
