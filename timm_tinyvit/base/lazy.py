"""Names of a package that are imported on first use (PEP 562), so that importing the package costs nothing."""

from importlib import import_module
from typing import Any
from collections.abc import Callable, Mapping

__all__ = ['lazy_names']


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package that hands out names of its modules.

    Args:
        package: The package's `__name__`.
        modules: Of each name its module, below the package.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        return getattr(import_module(f'.{modules[name]}', package), name)

    return get
