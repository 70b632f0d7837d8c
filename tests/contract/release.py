# SPDX-License-Identifier: Apache-2.0
"""A release of a library, read from its source: signatures, and what its functions pass on."""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tests.contract.calls import LIBRARY, PACKED, TE_ATTENTION, keywords_of

ANY = "**"  # a signature with **kwargs takes every keyword


class Release:
    """One release of a library, as source.

    Args:
        root: the folder that holds its package, or a wheel.
        library: its name, for messages.
        version: None for megatron-core, which says it itself.
    """

    def __init__(self, root: Path, library: str = "megatron-core", version: str | None = None) -> None:
        self._root: Path | zipfile.Path = root if root.is_dir() else zipfile.Path(root)
        self._library = library
        self.version = version or self._version()
        self._trees: dict[str, ast.Module] = {}

    def _version(self) -> str:
        """As ``megatron.core.package_info`` has it."""
        names = ("MAJOR", "MINOR", "PATCH")
        values = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse(self._file(f"{LIBRARY}.package_info").read_text()).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names
        }
        return ".".join(str(values[name]) for name in names)

    def parameters(self, name: str) -> dict[str, bool]:
        """Parameters that a function, method or class takes by keyword -> whether it must be given them, sorted.

        ``**`` is among them if it takes any.

        Raises:
            LookupError: there is no such name.
        """
        module, node, owner = self._find(name)
        if isinstance(node, ast.FunctionDef):
            return _function_parameters(node, is_method=owner)
        fields = self._dataclass_fields(module, node)
        if fields is not None:
            return dict(sorted(fields.items()))
        # A class whose ``__new__`` gives an object of another one has no ``__init__`` of its own.
        _, init = self._method(module, node, "__init__") or self._method(module, node, "__new__") or (module, None)
        return {} if init is None else _function_parameters(init, is_method=True)

    def passed(self, function: str, callee: str) -> dict[str, bool]:
        """What a function passes to something that it calls: argument -> whether by keyword, sorted.

        Positional arguments are named by the variable that is passed. Of a mapping that is unpacked, the keys that the
        function spells out are among them, and ``**`` if there can be others.

        Raises:
            LookupError: there is no such function, or no such call in it.
        """
        _, node, _ = self._find(function)
        calls = [call for call in ast.walk(node) if isinstance(call, ast.Call) and ast.unparse(call.func) == callee]
        if not calls:
            raise LookupError(f"{self._library} {self.version}: {function} does not call {callee}")
        passed = {ast.unparse(argument): False for call in calls for argument in call.args}
        for call in calls:
            passed |= dict.fromkeys(keywords_of(call) | _unpacked(node, call), True)
        return dict(sorted(passed.items()))

    def built(self, function: str, place: str) -> dict[str, bool]:
        """What a function builds a place of a spec with, in the form of ``passed``.

        By calling what is there (as it is, or through a variable or another expression of it), or by ``build_module``.

        Raises:
            LookupError: there is no such function, or it builds no such place.
        """
        _, node, _ = self._find(function)
        passed: dict[str, bool] = {}
        for call in [item for item in ast.walk(node) if isinstance(item, ast.Call)]:
            through = ast.unparse(call.func) == "build_module"
            what, arguments = (call.args[0], call.args[1:]) if through else (call.func, call.args)
            if _mentions(what, place) or (isinstance(what, ast.Name) and _holds(node, what.id, place)):
                passed |= {ast.unparse(argument): False for argument in arguments}
                passed |= dict.fromkeys(keywords_of(call), True)
        if not passed:
            raise LookupError(f"{self._library} {self.version}: {function} does not build {place}")
        return dict(sorted(passed.items()))

    def packed_fields_for_transformer_engine(self) -> dict[str, bool]:
        """Fields of ``PackedSeqParams`` that megatron-core passes on to a recent Transformer Engine; all False."""
        module, node, _ = self._find(TE_ATTENTION)
        assert isinstance(node, ast.ClassDef), module
        dropped = {
            ast.literal_eval(item.args[0])
            for item in _walk_recent(node)
            if isinstance(item, ast.Call) and ast.unparse(item.func) == "self.kept_packed_seq_params.discard"
        }
        return {field: False for field in self.parameters(PACKED) if field not in dropped}

    def _find(self, name: str) -> tuple[str, ast.FunctionDef | ast.ClassDef, bool]:
        """(module, definition, whether it is a method) of a dotted name, re-exports followed."""
        parts = name.split(".")
        cut = next((n for n in range(len(parts), 0, -1) if self._file(".".join(parts[:n]))), 0)
        if cut in (0, len(parts)):
            raise LookupError(f"{self._library} {self.version} has no {name}")
        module, (first, *rest) = ".".join(parts[:cut]), parts[cut:]
        node, where = self._definition(module, first)
        if not rest:
            return where, node, False
        found = self._method(where, node, rest[0]) if isinstance(node, ast.ClassDef) else None
        if found is None:
            raise LookupError(f"{self._library} {self.version} has no {name}")
        return found[0], found[1], True

    def _definition(self, module: str, name: str) -> tuple[ast.FunctionDef | ast.ClassDef, str]:
        for node in _statements(self._tree(module)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                return node, module
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        source = self._absolute(module, node)
                        if self._file(source):
                            return self._definition(source, alias.name)
        raise LookupError(f"{self._library} {self.version}: {module} defines no {name}")

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self._file(module).name == "__init__.py"
        base = module.split(".")[: -(node.level - is_package) or None]
        return ".".join([*base, *([node.module] if node.module else [])])

    def _bases(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        for base in node.bases:
            if isinstance(base, ast.Name):
                try:
                    found, where = self._definition(module, base.id)
                except LookupError:
                    continue  # a base of another library has none of the names that are asked for
                if isinstance(found, ast.ClassDef):
                    yield where, found

    def _method(self, module: str, node: ast.ClassDef, name: str) -> tuple[str, ast.FunctionDef] | None:
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == name:
                return module, item
        for where, base in self._bases(module, node):
            found = self._method(where, base, name)
            if found is not None:
                return found
        return None

    def _dataclass_fields(self, module: str, node: ast.ClassDef) -> dict[str, bool] | None:
        if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            return None
        fields: dict[str, bool] = {}
        for where, base in self._bases(module, node):
            fields |= self._dataclass_fields(where, base) or {}
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                hidden = "ClassVar" in ast.unparse(item.annotation) or (
                    item.value is not None and "init=False" in ast.unparse(item.value)
                )
                fields |= {} if hidden else {item.target.id: item.value is None}
        return fields

    def _file(self, module: str) -> Path | zipfile.Path | None:
        base = self._root
        *folders, last = module.split(".")
        for folder in folders:
            base = base / folder
        for candidate in (base / f"{last}.py", base / last / "__init__.py"):
            if candidate.is_file():
                return candidate
        return None

    def _tree(self, module: str) -> ast.Module:
        if module not in self._trees:
            self._trees[module] = ast.parse(self._file(module).read_text())
        return self._trees[module]


def _mentions(expression: ast.expr, place: str) -> bool:
    return any(ast.unparse(part) == place for part in ast.walk(expression))


def _holds(function: ast.AST, variable: str, place: str) -> bool:
    """Whether a function assigns an expression of the place to the variable."""
    return any(
        isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == variable and _mentions(item.value, place)
        for item in ast.walk(function)
    )


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements of a module, those inside of its ``if`` and ``try`` blocks included."""
    pending = list(tree.body)
    while pending:
        node = pending.pop(0)
        yield node
        if isinstance(node, ast.If | ast.Try):
            pending[:0] = [*node.body, *node.orelse, *getattr(node, "finalbody", [])]


def _function_parameters(node: ast.FunctionDef, *, is_method: bool) -> dict[str, bool]:
    arguments = node.args
    required = len(arguments.args) - len(arguments.defaults)
    names = [(argument.arg, index < required) for index, argument in enumerate(arguments.args)]
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
    names = names[1:] if is_method and not static else names
    names += [(a.arg, default is None) for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return dict(sorted([*names, *([(ANY, False)] if arguments.kwarg else [])]))


def _unpacked(function: ast.AST, call: ast.Call) -> set[str]:
    """Keys of the mappings that a call unpacks, as far as the function that it is in spells them out."""
    keys: set[str] = set()
    for mapping in [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None]:
        for item in ast.walk(function):
            if isinstance(item, ast.Assign | ast.AnnAssign):
                target = item.targets[0] if isinstance(item, ast.Assign) else item.target
                if isinstance(target, ast.Subscript) and ast.unparse(target.value) == mapping:
                    keys.add(ast.literal_eval(target.slice))
                elif ast.unparse(target) == mapping:
                    keys |= _spelled_out(function, item.value)
    return keys


def _spelled_out(function: ast.AST, mapping: ast.expr | None) -> set[str]:
    if isinstance(mapping, ast.Dict) and not mapping.keys:
        return set()
    if isinstance(mapping, ast.Call) and ast.unparse(mapping.func) == "dict":
        return keywords_of(mapping) | _unpacked(function, mapping)
    return {ANY}


def _walk_recent(node: ast.AST) -> Iterator[ast.AST]:
    """``ast.walk`` but for what only old releases of Transformer Engine need."""
    yield node
    if not (isinstance(node, ast.If) and ast.unparse(node.test).startswith("get_te_version() <")):
        for child in ast.iter_child_nodes(node):
            yield from _walk_recent(child)
