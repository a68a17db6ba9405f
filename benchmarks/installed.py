"""One module out of an installed package, without all that the package needs for its other work.

A peer's attention layer is a page of torch, but ``import`` runs its package's ``__init__`` first, and with it tokenizers, audio and data
sets. Here no ``__init__`` of the package runs, and of other packages those that are named have a stand-in where they are absent: a
module whose every name is an empty class. A layer that used one would fail at once.
"""

import importlib
import logging
import sys
import warnings
from collections.abc import Collection, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def module(name: str, without: Collection[str] = ()) -> ModuleType:
    """The module, as installed. ModuleNotFoundError: its package is not, or lacks it."""
    package, absent = _Bare(name.partition(".")[0]), _Absent(without)
    sys.meta_path.insert(0, package)
    sys.meta_path.append(absent)
    logging.disable(logging.WARNING)  # of other versions of what the package uses elsewhere
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    finally:
        logging.disable(logging.NOTSET)
        sys.meta_path.remove(package)
        sys.meta_path.remove(absent)
        for stood_in in [key for key, value in sys.modules.items() if isinstance(value, _StandIn)]:
            del sys.modules[stood_in]


class _Bare(MetaPathFinder):
    """Finds the modules of one package; its folders are packages without an ``__init__``."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != self.package:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.submodule_search_locations is None:
            return spec
        folder = ModuleSpec(name, None, is_package=True)
        folder.submodule_search_locations = list(spec.submodule_search_locations)
        return folder


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Absent(MetaPathFinder, Loader):
    """Finds, after all others have not, the packages that are stood in for."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""
