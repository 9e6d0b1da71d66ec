"""Old import paths. They work for one version, with a `DeprecationWarning` that names the new path.

`MOVED` gives, for each module that has moved, the modules that have its public names now. `install` is called once by
``bitneck/__init__.py``; the other packages import ``bitneck`` first. A package that has the name of a module that was
there before uses `names_of` for its ``__getattr__``.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "install", "names_of"]

MOVED: dict[str, tuple[str, ...]] = {}
"""Old module: the modules that define its public names now."""


def names_of(old: str, places: Sequence[str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that finds names of an old module in their new modules.

    Args:
        old: dotted name of the old module, for the warning.
        places: dotted names of the new modules; the first one that lists the name in ``__all__`` has it.
    """

    def find(name: str) -> Any:
        if not name.startswith("__"):
            for place in places:
                module = importlib.import_module(place)
                if name in module.__all__:
                    text = f"{old}.{name} has moved to {place}; the old path goes away in version 0.3"
                    warnings.warn(text, DeprecationWarning, stacklevel=2)
                    return getattr(module, name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return find


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `MOVED`, after all other finders have found nothing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of an old module; None for every other name."""
        del path, target
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Give the module a ``__getattr__`` for its old names."""
        vars(module)["__getattr__"] = names_of(module.__name__, MOVED[module.__name__])


def install() -> None:
    """Make the old paths importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
