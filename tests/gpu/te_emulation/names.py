# SPDX-License-Identifier: Apache-2.0
"""What the compiled extension of a release of Transformer Engine offers, read from the sources of its sdist.

``extension_<version>.json`` is what it wrote: functions with their arguments, enums with their values, classes and
submodules. To write it again, or for another release (pip builds the metadata only, for which torch has to claim a CUDA
version: a ``sitecustomize`` on PYTHONPATH that sets ``torch.version.cuda`` is enough):

    pip download --no-deps --no-binary :all: --no-build-isolation transformer_engine_torch==2.20.2 --dest DIRECTORY
    python -m tests.gpu.te_emulation.names DIRECTORY/transformer_engine_torch-2.20.2.tar.gz

A function registered with ``py::arg`` has those names, and takes them as keywords; one without takes its arguments by
position, and the names are those of its C++ declaration.
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

_BINDINGS = ("csrc/extensions/pybind.cpp", "common/util/pybind_helper.h")
_LAMBDA = re.compile(r"\[\]\s*\(([^)]*)\)")


def extension(sources: dict[str, str]) -> dict[str, Any]:
    """Return functions, enums, classes and submodules of the extension from its C++ sources, by path."""
    bindings = "\n".join(_plain(text) for path, text in sources.items() if path.endswith(_BINDINGS))
    everything = "\n".join(_plain(text) for path, text in sources.items() if path.endswith(".h"))
    functions = {}
    for call in _calls(bindings, r"\bm\s*\.def\s*\("):
        name, target, *rest = _split(call)
        functions[_string(name)] = _function(target, rest, everything)
    submodules: dict[str, list[str]] = {}
    for variable, name in re.findall(r"auto (\w+) = m\.def_submodule\(\s*\"(\w+)\"", bindings):
        submodules[name] = [_string(_split(call)[0]) for call in _calls(bindings, rf"\b{variable}\s*\.def\s*\(")]
    enums = {}
    for cpp, name, members in re.findall(
        r"enum_<([\w:]+)>\s*\(\s*m,\s*\"(\w+)\"[^;]*?\)((?:\s*\.\w+\([^;]*)?);", bindings
    ):
        values = _enum_values(cpp.split("::")[-1], everything)
        pairs = re.findall(r"\.value\(\s*\"(\w+)\",\s*([\w:]+)\s*\)", members)
        enums[name] = {python: values[target.split("::")[-1]] for python, target in pairs}
    classes = re.findall(r"py::class_<(?:[^()]|\(\))*?>\s*\(\s*m,\s*\"(\w+)\"", bindings)
    return {
        "functions": dict(sorted(functions.items())),
        "enums": dict(sorted(enums.items())),
        "classes": sorted(classes),
        "submodules": submodules,
    }


def _plain(text: str) -> str:
    """Return C++ without comments, continued lines and blocks that the wheels are not built with."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", " ", text)
    text = re.sub(r"#ifdef NVTE_WITH_NCCL_EP.*?#endif", " ", text, flags=re.DOTALL)
    return text.replace("\\\n", "\n")


def _calls(text: str, opening: str) -> list[str]:
    """Return what stands between the parentheses of each call whose beginning matches."""
    found = []
    for match in re.finditer(opening, text):
        depth, at = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[at], 0)
            at += 1
        found.append(text[match.end() : at - 1])
    return found


def _split(arguments: str) -> list[str]:
    """Split at commas outside of brackets and strings."""
    parts, depth, quoted, start = [], 0, False, 0
    for at, character in enumerate(arguments):
        if character == '"':
            quoted = not quoted
        elif not quoted and character in "([{<":
            depth += 1
        elif not quoted and character in ")]}>":
            depth -= 1
        elif not quoted and character == "," and depth == 0:
            parts.append(arguments[start:at])
            start = at + 1
    return [part.strip() for part in (*parts, arguments[start:]) if part.strip()]


def _string(literal: str) -> str:
    return literal.strip().strip('"')


def _function(target: str, rest: list[str], headers: str) -> dict[str, Any]:
    arguments, optional, keyword_only, only = [], [], [], False
    for part in rest:
        if part.startswith("py::kw_only"):
            only = True
        if match := re.match(r'py::arg\("(\w+)"\)\s*(=?)', part):
            arguments.append(match[1])
            optional += [match[1]] if match[2] else []
            keyword_only += [match[1]] if only else []
    by_keyword = bool(arguments)
    if not by_keyword:
        arguments = _declared(target.lstrip("&").split("::")[-1].strip(), target, headers)
    return {
        "arguments": arguments,
        "by_keyword": by_keyword,
        "keyword_only": keyword_only,
        "optional": optional,
    }


def _declared(name: str, target: str, headers: str) -> list[str]:
    """Return the names of the parameters of a C++ function, or of a lambda that is registered itself."""
    found = _LAMBDA.match(target)
    declared = found[1] if found else next(iter(_calls(headers, rf"[\w>&\*]\s+{name}\s*\(")))
    parameters = [part.split("=")[0].strip() for part in _split(declared)]
    return [re.split(r"[\s&\*]+", parameter)[-1] for parameter in parameters if parameter != "void"]


def _enum_values(name: str, headers: str) -> dict[str, int]:
    """Return the members of a C++ enum; one without a value follows the one before it."""
    named = re.search(rf"enum\s+(?:class\s+)?{name}\s*(?::\s*\w+\s*)?{{([^}}]*)}}", headers)
    body = named or re.search(rf"typedef enum\s*\w*\s*{{([^}}]*)}}\s*{name}\s*;", headers)
    if body is None:
        raise ValueError(f"no enum {name} in the headers")
    values: dict[str, int] = {}
    following = 0
    for member in _split(body[1]):
        key, _, value = (part.strip() for part in member.partition("="))
        values[key] = following = int(value, 0) if value else following
        following += 1
    return values


def main() -> None:
    """Read the sdist named on the command line; write the JSON beside this file."""
    archive = Path(sys.argv[1])
    with tarfile.open(archive) as sdist:
        members = [each for each in sdist.getmembers() if each.name.endswith((".h", ".cpp"))]
        sources = {each.name: sdist.extractfile(each).read().decode() for each in members}  # type: ignore[union-attr]
    offered = extension(sources)
    version = archive.name.removeprefix("transformer_engine_torch-").removesuffix(".tar.gz").replace(".", "_")
    lines = []
    for kind, entries in offered.items():
        if isinstance(entries, dict):
            inner = ",\n".join(f"{json.dumps(key)}: {json.dumps(entries[key], sort_keys=True)}" for key in entries)
            lines.append(f"{json.dumps(kind)}: {{\n{inner}\n}}")
        else:
            lines.append(f"{json.dumps(kind)}: {json.dumps(entries)}")
    Path(__file__).with_name(f"extension_{version}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
