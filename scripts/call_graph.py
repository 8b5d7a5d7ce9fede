"""Read the structure of a Python package from its source, without importing it.

`scripts/architecture` uses it: for the imports between modules, and for the journey of one argument
through the functions that it is passed to.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


@dataclass(frozen=True)
class Module:
    """A file of the package."""

    name: str
    """Dotted, from the package on."""
    path: Path
    tree: ast.Module
    is_package: bool

    def __hash__(self) -> int:
        return hash(self.name)

    @functools.cached_property
    def imports(self) -> dict[str, str]:
        """Return the dotted name behind each name that an import binds, wherever it stands."""
        return {
            local: target
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for local, target in self.targets(node)
        }

    def targets(self, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
        """Yield the local and the dotted name of what a statement imports."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], alias.name
            return
        base = node.module or ""
        if node.level:
            parts = self.name.split(".")
            parts = parts[: len(parts) - node.level + self.is_package]
            base = ".".join([*parts, base] if base else parts)
        for alias in node.names:
            yield alias.asname or alias.name, f"{base}.{alias.name}"

    @functools.cached_property
    def definitions(self) -> dict[str, Function | ast.ClassDef]:
        """Return functions, classes and methods (`Class.method`) by name."""
        named: dict[str, Function | ast.ClassDef] = {}
        for node in self.tree.body:
            if isinstance(node, Function | ast.ClassDef):
                named[node.name] = node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, Function):
                        named[f"{node.name}.{inner.name}"] = inner
        return named


@dataclass(frozen=True)
class Definition:
    """A function, a method or a class of the package."""

    module: Module
    name: str

    @property
    def node(self) -> Function | ast.ClassDef:
        """Its syntax tree."""
        return self.module.definitions[self.name]


class Package:
    """All modules below a folder."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.modules: dict[str, Module] = {}
        for path in sorted(folder.rglob("*.py")):
            parts = [folder.name, *path.relative_to(folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            self.modules[name] = Module(name, path, ast.parse(path.read_text()), is_package)

    def imported_modules(self, module: Module) -> set[str]:
        """Return the modules that a module imports as it is loaded itself.

        Imports inside functions and for type checkers alone don't count.
        """
        targets = [
            target for node in _loaded(module.tree.body) for _, target in module.targets(node)
        ]
        return {name for name in map(self._module_of, targets) if name} - {module.name}

    def _module_of(self, target: str) -> str | None:
        """Return the longest beginning of a dotted name that is a module of the package."""
        while target:
            if target in self.modules:
                return target
            target = target.rpartition(".")[0]
        return None

    def entry(self, name: str) -> str:
        """Return the file or folder directly in the package that a module is in."""
        return ".".join(name.split(".")[:2])

    @functools.cached_property
    def module_imports(self) -> dict[str, set[str]]:
        """Return the modules that each module imports as it is loaded."""
        return {name: self.imported_modules(module) for name, module in self.modules.items()}

    @functools.cached_property
    def entry_imports(self) -> dict[str, set[str]]:
        """Return the same between the files and folders directly in the package."""
        imports: dict[str, set[str]] = {}
        for name, imported in self.module_imports.items():
            imports.setdefault(self.entry(name), set()).update(map(self.entry, imported))
        return {name: imported - {name} for name, imported in imports.items()}

    @functools.cached_property
    def levels(self) -> dict[str, int]:
        """Return the level of each file and folder directly in the package: see `levels_of`."""
        return levels_of(self.entry_imports)

    def find(self, target: str) -> Definition | None:
        """Return the definition behind a dotted name, through the modules that hand it on."""
        for _ in range(10):
            name = self._module_of(target)
            if name is None or name == target:
                return None
            module, local = self.modules[name], target.removeprefix(f"{name}.")
            if local in module.definitions:
                return Definition(module, local)
            first, dot, rest = local.partition(".")
            if first not in module.imports:
                return None
            target = f"{module.imports[first]}{dot}{rest}"
        return None

    def method(self, owner: Definition, name: str) -> Definition | None:
        """Return a method of a class, or of the classes of the package that it inherits from."""
        found = f"{owner.name}.{name}"
        if found in owner.module.definitions:
            return Definition(owner.module, found)
        node = owner.node
        for base in node.bases if isinstance(node, ast.ClassDef) else ():
            parent = self.class_in(base, owner.module)
            inherited = None if parent is None else self.method(parent, name)
            if inherited is not None:
                return inherited
        return None

    def class_in(self, annotation: ast.expr | None, module: Module) -> Definition | None:
        """Return the first class of the package that an annotation names."""
        if annotation is None:
            return None
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        for node in ast.walk(annotation):
            if isinstance(node, ast.Name | ast.Attribute):
                found = self.resolve(node, module)
                if found is not None and isinstance(found.node, ast.ClassDef):
                    return found
        return None

    def resolve(self, node: ast.expr, module: Module) -> Definition | None:
        """Return what a name or `module.name` in a module stands for, if the package defines it."""
        dotted = _dotted(node)
        if dotted is None:
            return None
        first, dot, rest = dotted.partition(".")
        if dotted in module.definitions:
            return Definition(module, dotted)
        if first in module.imports:
            return self.find(f"{module.imports[first]}{dot}{rest}")
        return None


def levels_of(imports: dict[str, set[str]]) -> dict[str, int]:
    """Return how many names the longest chain of imports from each name has, itself included.

    Names that import each other in a circle are on one level.
    """
    levels: dict[str, int] = {}
    for members in _circles(imports):
        imported = {other for name in members for other in imports[name]} - members
        below = max((levels[name] for name in imported), default=0)
        levels.update(dict.fromkeys(members, below + 1))
    return levels


def longest_chain(imports: dict[str, set[str]]) -> list[str]:
    """Return the names of a longest chain of imports, the importing one first."""
    levels = levels_of(imports)
    chain = [max(sorted(levels), key=lambda name: levels[name])]
    while levels[chain[-1]] > 1:
        below = levels[chain[-1]] - 1
        chain.append(min(name for name in imports[chain[-1]] if levels[name] == below))
    return chain


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return None if base is None else f"{base}.{node.attr}"
    return None


def _loaded(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that run when a module is loaded."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            for name in ("body", "orelse", "handlers", "finalbody"):
                for inner in getattr(node, name, []):
                    yield from _loaded(inner.body if hasattr(inner, "type") else [inner])


def _circles(imported: dict[str, set[str]]) -> list[set[str]]:
    """Return the strongly connected sets of modules, what is imported first (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles: list[set[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(imported[name]):
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            members = set(stack[stack.index(name) :])
            del stack[stack.index(name) :]
            circles.append(members)

    for name in sorted(imported):
        if name not in order:
            visit(name)
    return circles


class Journey:
    """Follow an argument of a function, and what is made of it, through the calls of a package.

    Functions are read in the order of their lines, branches one after the other and loops once. A
    call is followed where an argument holds the value, or something computed from it; each function
    is read at its first call. Calls of values (callbacks) are not followed, and calls of methods
    are where annotations tell the class.
    """

    def __init__(self, package: Package, function: Definition, argument: str) -> None:
        self.package = package
        self.stops: list[Definition] = []
        """The functions that the value came to, in the order of their first calls."""
        self.calls: list[Definition] = []
        """The same for all calls."""
        self._read: set[tuple[str, str]] = set()
        self.enter(function, {argument})

    def climbs(self) -> list[tuple[str, str]]:
        """Return the steps between `stops` that lead to a module on a higher level."""
        return self._climbs(self.stops)

    def climbs_of_calls(self) -> list[tuple[str, str]]:
        """Return the steps between `calls` that lead to a module on a higher level."""
        return self._climbs(self.calls)

    def _climbs(self, stops: list[Definition]) -> list[tuple[str, str]]:
        names = [stop.module.name for stop in stops]
        levels = [self.package.levels[self.package.entry(name)] for name in names]
        return [(names[n - 1], names[n]) for n in range(1, len(names)) if levels[n] > levels[n - 1]]

    def enter(self, called: Definition, arguments: set[str]) -> None:
        """Note a call that has the value in these arguments, and read the function."""
        self.calls.append(called)
        key = (called.module.name, called.name)
        if key not in self._read:
            self._read.add(key)
            self.stops.append(called)
            _Reading(self, called, arguments).read()


class _Reading:
    """One function, read once."""

    def __init__(self, journey: Journey, function: Definition, arguments: set[str]) -> None:
        self._journey, self._package = journey, journey.package
        self._module = function.module
        assert isinstance(function.node, Function)
        self._function = function.node
        self._names = set(arguments)
        """Names that hold the value or something made of it."""
        self._classes: dict[str, Definition] = {}
        """Classes of names, where they are known."""
        owner, dot, _ = function.name.partition(".")
        parameters = parameters_of(self._function)
        if dot and parameters:
            self._classes[parameters[0].arg] = Definition(self._module, owner)
        for parameter in parameters:
            self._note_class(parameter.arg, parameter.annotation)

    def _note_class(self, name: str, annotation: ast.expr | None) -> None:
        found = self._package.class_in(annotation, self._module)
        if found is not None:
            self._classes[name] = found

    def read(self) -> None:
        """Follow the calls of the function's body."""
        for statement in self._function.body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, Function | ast.ClassDef):
            for inner in node.body:  # of a closure, as if it ran where it stands
                self._statement(inner)
            return
        if isinstance(node, ast.For | ast.AsyncFor):
            self._expression(node.iter)
            self._assign(node.target, node.iter)
        elif isinstance(node, ast.With | ast.AsyncWith):
            for item in node.items:
                self._expression(item.context_expr)
                if item.optional_vars is not None:
                    self._assign(item.optional_vars, item.context_expr)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            if node.value is not None:
                self._expression(node.value)
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    self._assign(target, node.value)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                self._note_class(node.target.id, node.annotation)
            return
        for _, value in ast.iter_fields(node):
            for inner in value if isinstance(value, list) else [value]:
                if isinstance(inner, ast.stmt):
                    self._statement(inner)
                elif isinstance(inner, ast.ExceptHandler | ast.match_case):
                    for statement in inner.body:
                        self._statement(statement)
                elif isinstance(inner, ast.expr) and not isinstance(node, ast.For | ast.AsyncFor):
                    self._expression(inner)

    def _expression(self, node: ast.expr) -> None:
        """Follow the calls in an expression, those in arguments first."""
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            for generator in node.generators:
                self._expression(generator.iter)
                self._assign(generator.target, generator.iter)
                for test in generator.ifs:
                    self._expression(test)
            elements = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
            for element in elements:
                self._expression(element)
            return
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.expr):
                self._expression(inner)
            elif isinstance(inner, ast.keyword):
                self._expression(inner.value)
        if isinstance(node, ast.NamedExpr):
            self._assign(node.target, node.value)
        if isinstance(node, ast.Call):
            self._call(node)

    def _call(self, node: ast.Call) -> None:
        called = self._called(node.func)
        if called is None:
            return
        skipped, bound = 0, None
        if isinstance(called.node, ast.ClassDef):
            initialiser = self._package.method(called, "__init__")
            if initialiser is None:
                return
            called, skipped = initialiser, 1
        elif "." in called.name and isinstance(node.func, ast.Attribute):
            is_static = any(_dotted(d) == "staticmethod" for d in called.node.decorator_list)
            skipped, bound = 0 if is_static else 1, node.func.value
        assert isinstance(called.node, Function)
        parameters = [parameter.arg for parameter in parameters_of(called.node)]
        passed: set[str] = set()
        if bound is not None and skipped and self._holds(bound) and parameters:
            passed.add(parameters[0])
        for number, argument in enumerate(node.args):
            if self._holds(argument):
                place = number + skipped
                passed.add(parameters[min(place, len(parameters) - 1)] if parameters else "")
        for keyword in node.keywords:
            if self._holds(keyword.value):
                passed.add(keyword.arg or "")
        if passed:
            self._journey.enter(called, passed)

    def _called(self, function: ast.expr) -> Definition | None:
        found = self._package.resolve(function, self._module)
        if found is not None or not isinstance(function, ast.Attribute):
            return found
        owner = self._class_of(function.value)
        return None if owner is None else self._package.method(owner, function.attr)

    def _class_of(self, node: ast.expr) -> Definition | None:
        """Return the class of a value, or of its elements, where annotations tell it."""
        if isinstance(node, ast.Name):
            return self._classes.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._class_of(node.value)
            return None if owner is None else self._field_class(owner, node.attr)
        if isinstance(node, ast.Call):
            called = self._called(node.func)
            if called is not None and isinstance(called.node, ast.ClassDef):
                return called
            if called is not None and isinstance(called.node, Function):
                return self._package.class_in(called.node.returns, called.module)
            if isinstance(node.func, ast.Attribute):
                return self._class_of(node.func.value)
            return self._class_of(node.args[0]) if node.args else None
        if isinstance(node, ast.Subscript | ast.Await | ast.Starred):
            return self._class_of(node.value)
        return None

    def _field_class(self, owner: Definition, field: str) -> Definition | None:
        assert isinstance(owner.node, ast.ClassDef)
        for node in owner.node.body:
            if isinstance(node, ast.AnnAssign) and _dotted(node.target) == field:
                return self._package.class_in(node.annotation, owner.module)
            if isinstance(node, Function) and node.name == field:
                return self._package.class_in(node.returns, owner.module)
        return None

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        holds, found = self._holds(value), self._class_of(value)
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                if holds:
                    self._names.add(node.id)
                if found is not None and isinstance(target, ast.Name):
                    self._classes[node.id] = found

    def _holds(self, node: ast.expr) -> bool:
        """Whether an expression has the value, or something made of it, in it."""
        return any(
            isinstance(inner, ast.Name) and inner.id in self._names for inner in ast.walk(node)
        )


def parameters_of(function: Function) -> list[ast.arg]:
    """Return all parameters of a function."""
    arguments = function.args
    rest = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *rest]
