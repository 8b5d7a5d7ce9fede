"""Find the interfaces that PyTorch doesn't document, in the source of a package.

`scripts/architecture` uses it. All that is found may change with the next release of torch, so
only one module may name it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from call_graph import Module, Package

UNDOCUMENTED = ("torch.cpu.get_capabilities", "torch.fx.experimental", "torch.fx.traceback")
"""Names without an underscore that releases added, moved or changed without a word."""
READERS = ("getattr", "hasattr", "setattr")
NAMED_TUPLES = ("_asdict", "_fields", "_make", "_replace")
OF_OTHERS = ("_paramsEval",)
"""Attributes of other libraries: the settings of pycocotools' `COCOeval`."""
PRIVATE = re.compile(r"_(?!_)\w+")
PRIVATE_OF_TORCH = re.compile(r"torch(\.\w+)*?\._(?!_)[\w.]+")


def private_names_of_torch(package: Package) -> Iterator[tuple[Module, int, str]]:
    """Yield each use of an undocumented interface with its module and line.

    That is what lies under a name with an underscore in torch, what `UNDOCUMENTED` lists, and any
    attribute with an underscore that no module of the package defines, such as `_schema`.
    """
    ours = {name for module in package.modules.values() for name in _defined(module.tree)}
    for module in package.modules.values():
        aliases = _aliases(module)
        for node in ast.walk(module.tree):
            for name in _names(module, aliases, node):
                if _is_undocumented(name, ours):
                    yield module, getattr(node, "lineno", 0), name


def _aliases(module: Module) -> dict[str, str]:
    """Return the dotted name behind each imported name, and behind `alias = imported.name`."""
    aliases = dict(module.imports)
    for node in module.tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=alias)], value=ast.Attribute() as value):
                if name := _dotted(aliases, value):
                    aliases[alias] = name
    return aliases


def _names(module: Module, aliases: dict[str, str], node: ast.AST) -> Iterator[str]:
    """Yield what a node names: dotted from the import on, or `.attribute` of a value."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from (target for _, target in module.targets(node))
    elif isinstance(node, ast.Attribute):
        yield _dotted(aliases, node) or f".{node.attr}"
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        if PRIVATE_OF_TORCH.fullmatch(node.value):  # a logger's, or what import_module gets
            yield node.value
    elif isinstance(node, ast.Call):
        function = node.func.id if isinstance(node.func, ast.Name) else ""
        match node.args:
            case [_, ast.Constant(value=str(name)), *_] if function in READERS:
                yield f".{name}"


def _dotted(aliases: dict[str, str], node: ast.expr) -> str | None:
    """Return the dotted name of `alias.attribute`, None if it doesn't start with an import."""
    if isinstance(node, ast.Attribute):
        before = _dotted(aliases, node.value)
        return before and f"{before}.{node.attr}"
    return aliases.get(node.id) if isinstance(node, ast.Name) else None


def _is_undocumented(name: str, ours: set[str]) -> bool:
    if name.startswith("."):
        return bool(PRIVATE.fullmatch(name[1:])) and name[1:] not in (
            *NAMED_TUPLES,
            *OF_OTHERS,
            *ours,
        )
    if name.startswith("torch.ops."):  # operations, as they stand in every graph
        return False
    if name.startswith(UNDOCUMENTED):
        return True
    return name.startswith("torch.") and any(map(PRIVATE.fullmatch, name.split(".")))


def _defined(tree: ast.Module) -> Iterator[str]:
    """Yield the names of all functions, classes, variables and attributes that are assigned."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                yield name
