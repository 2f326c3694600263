"""Names that are imported on first use, so that a package brings in nothing by itself."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any


def names(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], Any], list[str]]:
    """A `__getattr__` and an `__all__` for a package.

    Args:
        package: Its name.
        places: Name -> `module`, or `module:name` of what it stands for.
    """

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = places[name].partition(":")
        found = importlib.import_module(module)
        return getattr(found, attribute) if attribute else found

    return find, sorted(places)


def submodules(package: str, path: list[str]) -> tuple[Callable[[str], Any], list[str]]:
    """The same, for all modules of a package.

    Args:
        package: Its `__name__`.
        path: Its `__path__`.
    """
    found = [module.name for module in pkgutil.iter_modules(path)]
    return names(package, {name: f"{package}.{name}" for name in found})
