# SPDX-License-Identifier: Apache-2.0
"""The fields of a release's dataclasses, with their types and defaults, read from its wheel without importing it.

What nemo-toolkit's exp_manager needs cannot be installed beside this package: an older omegaconf. What is read is kept
in ``nemo_toolkit_<version>.json``; to write it again, or for another release:

    pip download --no-deps nemo-toolkit==3.0.0 --dest DIRECTORY
    python -m tests.contract.dataclass_fields DIRECTORY/nemo_toolkit-3.0.0-*.whl

and in the same way for nemo-run, whose interface ``examples/nemo_run`` uses:

    pip download --no-deps nemo-run==0.11.1 --dest DIRECTORY
    python -m tests.contract.dataclass_fields DIRECTORY/nemo_run-0.11.1-*.whl
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path

from tests.contract.signatures import vendored

# Library -> file -> its classes that are of interest.
CLASSES = {
    "nemo_toolkit": {
        "nemo/utils/exp_manager.py": ("ExpManagerConfig", "CallbackParams", "StepTimingParams", "EMAParams"),
    },
    "nemo_run": {
        "nemo_run/config.py": ("Script",),
        "nemo_run/core/execution/base.py": ("Executor",),
        "nemo_run/core/execution/slurm.py": ("SlurmExecutor",),
        "nemo_run/core/tunnel/client.py": ("LocalTunnel", "Tunnel"),
    },
}
REQUIRED = ""  # in the place of a default

# Field -> (type, default), both as they are written there.
Fields = dict[str, tuple[str, str]]


def fields_of(wheel: Path, library: str) -> dict[str, Fields]:
    """Class -> its own fields, without inherited ones.

    Raises:
        LookupError: the release has no such class.
    """
    found: dict[str, Fields] = {}
    for file, names in CLASSES[library].items():
        tree = ast.parse(zipfile.Path(wheel, file).read_text(encoding="utf-8"))
        classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        for name in names:
            if name not in classes:
                raise LookupError(f"{wheel.name}: {file} has no class {name}")
            found[name] = {
                node.target.id: (ast.unparse(node.annotation), ast.unparse(node.value) if node.value else REQUIRED)
                for node in classes[name].body
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            }
    return found


def read(library: str, version: str) -> dict[str, Fields]:
    """Class -> field -> (type, default), as kept."""
    kept = json.loads(vendored(library, version).read_text())
    return {name: {field: (each[0], each[1]) for field, each in fields.items()} for name, fields in kept.items()}


def main() -> None:
    """Write the fields of the wheel named on the command line."""
    wheel = Path(sys.argv[1])
    library, version, *_ = wheel.name.split("-")
    lines = []
    for name, fields in fields_of(wheel, library).items():
        inner = ",\n".join(f"  {json.dumps(field)}: {json.dumps(each)}" for field, each in fields.items())
        lines.append(f"{json.dumps(name)}: {{\n{inner}\n}}")
    target = vendored(library, version)
    target.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # a line a field, so that two releases compare well
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
