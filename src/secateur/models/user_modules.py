"""Import a user's file together with the files around it, without touching `sys.path`.

A file may import its neighbours in any of Python's three ways: `from .blocks` (as part of a
package), `from blocks` (beside it) and `from nets.blocks` (from the package's root or the working
folder). Its modules get names below a package of their own, `secateur_user_1.nets.small`. So they
can't collide with installed packages or with the modules of another file, and stay importable, as
pickles and dataclasses need them, for as long as the process lives.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import itertools
import sys
import types
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any

PREFIX = "secateur_user_"
_numbers = itertools.count(1)


class UserModules(MetaPathFinder):
    """The modules that a user's file consists of."""

    def __init__(self, path: Path) -> None:
        self._file = path.resolve()
        self.root: str = f"{PREFIX}{next(_numbers)}"
        """Name of the package that holds the modules."""
        self._base, self._packages = _package_of(self._file)
        folders = dict.fromkeys([self._file.parent, self._base, Path.cwd()])
        self._is_local: dict[str, bool] = {}
        package = types.ModuleType(self.root)
        package.__path__ = [str(folder) for folder in folders]
        sys.modules[self.root] = package
        sys.meta_path.insert(0, self)

    def run(self) -> types.ModuleType:
        """Run the file, after the `__init__.py` of its packages, and return its module."""
        parent, folder = self.root, self._base
        for package in self._packages:
            parent, folder = f"{parent}.{package}", folder / package
            try:
                importlib.import_module(parent)
            except Exception:  # the file may not need what fails there; if it does, it says so
                sys.modules[parent] = types.ModuleType(parent)
                sys.modules[parent].__path__ = [str(folder)]
        name = f"{parent}.{self._file.stem.replace('.', '_')}"
        if name in sys.modules:  # a package's `__init__.py` has imported it
            return sys.modules[name]
        spec = importlib.util.spec_from_loader(name, _UserLoader(self, name, str(self._file)))
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses, among others, look up their module there
        assert spec.loader is not None
        spec.loader.exec_module(module)
        return module

    def remove(self) -> None:
        """Forget all modules, of a file that can't be run."""
        sys.meta_path.remove(self)
        for name in list(sys.modules):
            if name == self.root or name.startswith(f"{self.root}."):
                del sys.modules[name]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module of this package, as Python's import system asks for it."""
        if not fullname.startswith(f"{self.root}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _UserLoader(self, fullname, spec.loader.path)
        return spec

    def import_from(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> types.ModuleType:
        """Import what an `import` statement in one of the modules names, as `__import__` does."""
        top = name.partition(".")[0]
        if level or not self._has(top):
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        importlib.import_module(f"{self.root}.{name}")
        if fromlist:
            return builtins.__import__(f"{self.root}.{name}", globals, locals, fromlist)
        return sys.modules[f"{self.root}.{top}"]

    def _has(self, top: str) -> bool:
        """Return whether a name without dots is that of a file or folder of the user's."""
        if top not in self._is_local:
            self._is_local[top] = top not in sys.stdlib_module_names and self._finds(top)
        return self._is_local[top]

    def _finds(self, top: str) -> bool:
        spec = PathFinder.find_spec(f"{self.root}.{top}", sys.modules[self.root].__path__)
        if spec is None:
            return False
        # A folder without `__init__.py`, or the file itself, gives way to an installed package.
        is_weak = spec.origin is None or Path(spec.origin).resolve() == self._file
        return not is_weak or not _is_installed(top)


class _UserLoader(SourceFileLoader):
    """Runs a file whose `import` statements look for the user's files first."""

    def __init__(self, modules: UserModules, name: str, path: str) -> None:
        super().__init__(name, path)
        self._modules = modules

    def exec_module(self, module: types.ModuleType) -> None:
        """Run the file in its module."""
        names: dict[str, Any] = {**vars(builtins), "__import__": self._modules.import_from}
        vars(module)["__builtins__"] = names
        super().exec_module(module)


def _package_of(file: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the folder that a file's packages lie in, and their names, the outermost first.

    Packages are the folders with `__init__.py` around the file, or else those between the working
    folder and the file.
    """
    base = file.parent
    while (base / "__init__.py").is_file():
        base = base.parent
    if base == file.parent and file.is_relative_to(Path.cwd()):
        base = Path.cwd()
    names = file.parent.relative_to(base).parts
    return (file.parent, ()) if any("." in name for name in names) else (base, names)


def _is_installed(top: str) -> bool:
    if top in sys.modules:
        return True
    try:
        return importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        return False
