# SPDX-License-Identifier: Apache-2.0
"""What this package passes to megatron-core, and what a release of megatron-core takes: both read from source.

A release is read without being imported: newer ones need another Python than the tests' own. Its answer is kept in
``megatron_core_<version>.json``; to write it again, or for another release:

    pip download --no-deps megatron-core==0.19.2 --python-version 3.12 --only-binary=:all: --dest DIRECTORY
    python -m tests.contract.signatures DIRECTORY/megatron_core-0.19.2-*.whl
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "megatron_g2rpo"
LIBRARY = "megatron.core"
ANY = "**"  # a signature with **kwargs takes every keyword

# Methods of objects that megatron-core gives us, and what we pass; calls by an imported name are found by `our_calls`.
_OPTIMIZERS = {
    f"{LIBRARY}.optimizer.optimizer.ChainedOptimizer.{method}": keywords
    for method, keywords in {
        "get_grad_norm": set(),
        "load_state_dict": {"state_dict"},
        "prepare_grads": set(),
        "reload_model_params": set(),
        "sharded_state_dict": {"model_sharded_state_dict", "is_loading"},
        "step": set(),
        "zero_grad": set(),
    }.items()
}
METHODS: dict[str, set[str]] = {
    **_OPTIMIZERS,
    f"{LIBRARY}.optimizer_param_scheduler.OptimizerParamScheduler.load_state_dict": {"state_dict"},
    f"{LIBRARY}.optimizer_param_scheduler.OptimizerParamScheduler.state_dict": set(),
    f"{LIBRARY}.optimizer_param_scheduler.OptimizerParamScheduler.step": {"increment"},
    f"{LIBRARY}.distributed.DistributedDataParallel.no_sync": set(),
    f"{LIBRARY}.distributed.DistributedDataParallel.zero_grad_buffer": set(),
    f"{LIBRARY}.transformer.MegatronModule": {"config"},
    f"{LIBRARY}.transformer.MegatronModule.sharded_state_dict": set(),
    f"{LIBRARY}.packed_seq_params.PackedSeqParams": {
        "qkv_format",
        "cu_seqlens_q",
        "cu_seqlens_kv",
        "max_seqlen_q",
        "max_seqlen_kv",
    },
    f"{LIBRARY}.models.common.embeddings.language_model_embedding.LanguageModelEmbedding.forward": {
        "input_ids",
        "position_ids",
    },
    f"{LIBRARY}.models.gpt.GPTModel.forward": {
        "input_ids",
        "position_ids",
        "attention_mask",
        "decoder_input",
        "packed_seq_params",
        "extra_block_kwargs",
    },
    f"{LIBRARY}.models.gpt.GPTModel.set_input_tensor": {"input_tensor"},
    f"{LIBRARY}.models.gpt.GPTModel.shared_embedding_or_output_weight": set(),
    f"{LIBRARY}.transformer.transformer_layer.TransformerLayer.forward": {"context"},
}
# What a call returns, where we call the result at once.
_RESULTS = {
    f"{LIBRARY}.pipeline_parallel.get_forward_backward_func": (
        f"{LIBRARY}.pipeline_parallel.schedules.forward_backward_no_pipelining"
    )
}


@dataclass
class Call:
    """How this package calls one name of megatron-core.

    Attributes:
        keywords: over all places.
        positional: places ``file:line`` that pass an argument by position.
    """

    keywords: set[str] = field(default_factory=set)
    positional: list[str] = field(default_factory=list)


def our_calls(package: Path = PACKAGE) -> dict[str, Call]:
    """Dotted name in megatron-core -> how it is called, over all files of the package."""
    calls: dict[str, Call] = {}
    for file in sorted(package.rglob("*.py")):
        tree = ast.parse(file.read_text())
        names = dict(_imports(tree))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            target = _target(node.func, names)
            if target is None:
                continue
            call = calls.setdefault(target, Call())
            call.keywords |= {keyword.arg for keyword in node.keywords if keyword.arg is not None}
            if node.args:
                call.positional.append(f"{file.relative_to(package.parent)}:{node.lineno}")
    return calls


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(LIBRARY):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _target(function: ast.expr, names: dict[str, str]) -> str | None:
    if isinstance(function, ast.Name):
        return names.get(function.id)
    if isinstance(function, ast.Attribute):
        owner = _target(function.value, names) if not isinstance(function.value, ast.Call) else None
        return f"{owner}.{function.attr}" if owner else None
    if isinstance(function, ast.Call):
        return _RESULTS.get(_target(function.func, names) or "")
    return None


class Release:
    """One release of megatron-core, as source.

    Args:
        root: the folder that holds ``megatron``, or a wheel.
    """

    def __init__(self, root: Path) -> None:
        self._root: Path | zipfile.Path = root if root.is_dir() else zipfile.Path(root)
        self._trees: dict[str, ast.Module] = {}

    @cached_property
    def version(self) -> str:
        """As ``megatron.core.package_info`` has it."""
        names = ("MAJOR", "MINOR", "PATCH")
        values = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in self._tree(f"{LIBRARY}.package_info").body
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
        _, init = self._method(module, node, "__init__") or (module, None)
        return {} if init is None else _function_parameters(init, is_method=True)

    def _find(self, name: str) -> tuple[str, ast.FunctionDef | ast.ClassDef, bool]:
        """(module, definition, whether it is a method) of a dotted name, re-exports followed."""
        parts = name.split(".")
        cut = next((n for n in range(len(parts), 0, -1) if self._file(".".join(parts[:n]))), 0)
        if cut in (0, len(parts)):
            raise LookupError(f"megatron-core {self.version} has no {name}")
        module, (first, *rest) = ".".join(parts[:cut]), parts[cut:]
        node, where = self._definition(module, first)
        if not rest:
            return where, node, False
        found = self._method(where, node, rest[0]) if isinstance(node, ast.ClassDef) else None
        if found is None:
            raise LookupError(f"megatron-core {self.version} has no {name}")
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
        raise LookupError(f"megatron-core {self.version}: {module} defines no {name}")

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


def wanted() -> dict[str, set[str]]:
    """Dotted name -> keywords that this package passes to it."""
    return {**{name: call.keywords for name, call in our_calls().items()}, **METHODS}


def main() -> None:
    """Write the signatures of the wheel named on the command line."""
    release = Release(Path(sys.argv[1]))
    lines = [f"{json.dumps(name)}: {json.dumps(release.parameters(name))}" for name in sorted(wanted())]
    target = HERE / f"megatron_core_{release.version.replace('.', '_')}.json"
    target.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # a line a name, so that two releases compare well
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
