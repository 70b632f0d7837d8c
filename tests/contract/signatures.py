# SPDX-License-Identifier: Apache-2.0
"""What this package passes to megatron-core, and what a release of megatron-core takes: both read from source.

A release is read without being imported: newer ones need another Python than the tests' own. Its answer is kept in
``megatron_core_<version>.json``; to write it again, or for another release:

    pip download --no-deps megatron-core==0.19.2 --python-version 3.12 --only-binary=:all: --dest DIRECTORY
    python -m tests.contract.signatures DIRECTORY/megatron_core-0.19.2-*.whl

Transformer Engine's attention, which megatron-core calls for us, is read in the same way, from the wheel that has its
Python sources:

    pip download --no-deps transformer-engine==2.20.2 --only-binary=:all: --dest DIRECTORY
    python -m tests.contract.signatures DIRECTORY/transformer_engine-2.20.2-*.whl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.contract.calls import (
    DOT_PRODUCT_ATTENTION,
    METHODS,
    PACKED,
    SPEC_PLACES,
    TE_ATTENTION,
    TE_COLUMN,
    TE_LAYERS,
    TE_NORM,
    TE_ROW,
    THEIR_CALLS,
    our_calls,
)
from tests.contract.release import Release

HERE = Path(__file__).parent


def wanted() -> dict[str, set[str]]:
    """Dotted name -> keywords that this package passes to it."""
    return {**{name: call.keywords for name, call in our_calls().items()}, **METHODS}


def megatron_core(release: Release) -> dict[str, dict[str, bool]]:
    """What we want to know of a release of megatron-core."""
    return {
        **{name: release.parameters(name) for name in wanted()},
        **{f"{function} > {callee}": release.passed(function, callee) for function, callee in THEIR_CALLS},
        f"{PACKED} > {TE_ATTENTION}": release.packed_fields_for_transformer_engine(),
        **{f"{function} > {place}": release.built(function, place) for function, place, _ in SPEC_PLACES},
        **{name: release.parameters(name) for name in (TE_COLUMN, TE_ROW, TE_NORM, f"{TE_COLUMN}.forward")},
        **{
            f"{name}.__init__ > super().__init__": release.passed(f"{name}.__init__", "super().__init__")
            for name in TE_LAYERS
        },
    }


def transformer_engine(release: Release) -> dict[str, dict[str, bool]]:
    """What we want to know of a release of Transformer Engine."""
    names = (DOT_PRODUCT_ATTENTION, f"{DOT_PRODUCT_ATTENTION}.forward", *TE_LAYERS.values())
    return {name: release.parameters(name) for name in names}


def vendored(library: str, version: str) -> Path:
    """Where the signatures of a release are kept."""
    return HERE / f"{library}_{version.replace('.', '_')}.json"


def main() -> None:
    """Write the signatures of the wheel named on the command line."""
    wheel = Path(sys.argv[1])
    library, version, *_ = wheel.name.split("-")
    release = Release(wheel, library, version)
    signatures = {"megatron_core": megatron_core, "transformer_engine": transformer_engine}[library](release)
    lines = [f"{json.dumps(name)}: {json.dumps(signatures[name])}" for name in sorted(signatures)]
    target = vendored(library, version)
    target.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # a line a name, so that two releases compare well
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
