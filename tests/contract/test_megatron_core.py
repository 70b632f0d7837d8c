# SPDX-License-Identifier: Apache-2.0
"""Claim: what this package passes to megatron-core is taken, by the installed release and by the newest supported one.

Names and keywords only: that the numbers are right as well is for the parity tests, at the installed release.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path

import megatron.core
import pytest

from megatron_g2rpo.policy.attention import PackedCoreAttention, TransformerEngineCoreAttention
from tests.contract.calls import (
    CLIPPED_BY,
    CORE_ATTENTION_BUILT,
    CORE_ATTENTION_CALLED,
    GRAD_NORM_ASKED,
    TE_ATTENTION,
    our_calls,
)
from tests.contract.release import ANY, Release
from tests.contract.signatures import HERE, megatron_core, vendored, wanted

NEWEST = "0.19.2"  # of the range in pyproject.toml
CALLS = wanted()
# Cannot be imported where Transformer Engine is not installed: read from source.
SOURCE_ONLY = {name for name in CALLS if name.startswith(TE_ATTENTION)}
CORE_ATTENTIONS = (PackedCoreAttention, TransformerEngineCoreAttention)


def installed_release() -> Release:
    return Release(Path(megatron.core.__file__).parents[2])


def newest() -> dict[str, dict[str, bool]]:
    return json.loads(vendored("megatron_core", NEWEST).read_text())


def installed(name: str) -> dict[str, bool]:
    """Parameters of a name of the installed release -> whether they must be given, by ``inspect``."""
    if name in SOURCE_ONLY:
        return installed_release().parameters(name)
    module, attributes = name, []
    while not _imports(module):
        module, _, attribute = module.rpartition(".")
        attributes.insert(0, attribute)
    target = importlib.import_module(module)
    for attribute in attributes:
        owner, target = target, getattr(target, attribute)
    parameters = list(inspect.signature(target).parameters.values())
    is_static = attributes and isinstance(inspect.getattr_static(owner, attributes[-1]), staticmethod)
    if inspect.isfunction(target) and inspect.isclass(owner) and not is_static:
        parameters = parameters[1:]  # self
    kinds = {parameter.kind for parameter in parameters}
    named = {
        parameter.name: parameter.default is parameter.empty
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    return dict(sorted({**named, **({ANY: False} if inspect.Parameter.VAR_KEYWORD in kinds else {})}.items()))


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    return True


def misfits(keywords: set[str], parameters: Mapping[str, bool]) -> list[str]:
    """What is wrong with passing ``keywords`` to something with these parameters."""
    unknown = [] if ANY in parameters else [f"does not take {name}" for name in sorted(keywords - parameters.keys())]
    return unknown + [f"needs {name}" for name, must in parameters.items() if must and name not in keywords]


@pytest.mark.parametrize("name", CALLS)
def test_the_installed_release_takes_what_we_pass(name: str) -> None:
    assert not misfits(CALLS[name], installed(name))


@pytest.mark.parametrize("name", CALLS)
def test_the_newest_supported_release_takes_what_we_pass(name: str) -> None:
    signatures = newest()
    assert name in signatures, f"{name} is new: write the signatures again, see tests/contract/signatures.py"
    assert not misfits(CALLS[name], signatures[name])


def test_the_newest_supported_release_is_below_the_bound_of_pyproject() -> None:
    dependency = next(
        line for line in (HERE.parents[1] / "pyproject.toml").read_text().splitlines() if '"megatron-core>' in line
    )
    major, minor, _ = NEWEST.split(".")
    assert f"<{major}.{int(minor) + 1}" in dependency


def test_source_and_inspect_agree() -> None:
    """The reader of source, whose word on the newest release is taken, against Python's own on the installed one."""
    release = installed_release()
    assert release.version == megatron.core.__version__
    for name in CALLS.keys() - SOURCE_ONLY:
        assert release.parameters(name) == installed(name), name


def test_arguments_are_passed_by_keyword() -> None:
    """Positions move between releases, names less so."""
    positional = {name: call.positional for name, call in our_calls().items() if call.positional}
    assert not positional


@pytest.mark.parametrize("attention", CORE_ATTENTIONS, ids=lambda attention: attention.__name__)
@pytest.mark.parametrize("version", ["installed", NEWEST])
def test_core_attentions_take_what_attention_passes(version: str, attention: type) -> None:
    """The other way round: what megatron-core's attention builds and calls its core attention with."""
    signatures = newest() if version == NEWEST else megatron_core(installed_release())
    for (function, callee), target in (
        (CORE_ATTENTION_BUILT, attention.__init__),
        (CORE_ATTENTION_CALLED, attention.forward),
    ):
        passed = signatures[f"{function} > {callee}"]
        _, *parameters = inspect.signature(target).parameters.values()  # without self
        positional = [name for name, by_keyword in passed.items() if not by_keyword]
        assert set(positional) == {parameter.name for parameter in parameters[: len(positional)]}
        takes = {
            ANY if parameter.kind is parameter.VAR_KEYWORD else parameter.name: parameter.default is parameter.empty
            and parameter.kind is not parameter.VAR_KEYWORD
            for parameter in parameters
        }
        assert not misfits(set(passed), takes)


@pytest.mark.parametrize("version", ["installed", NEWEST])
def test_a_step_asks_the_chain_itself_for_the_norm_that_it_clips_by(version: str) -> None:
    """Else the norm that ``policy.optimizer.step_by_norm`` answers with would be computed again."""
    signatures = newest() if version == NEWEST else megatron_core(installed_release())
    assert signatures[" > ".join(GRAD_NORM_ASKED)] == {}
    assert signatures[" > ".join(CLIPPED_BY)]["total_norm"]  # passed, by keyword


def test_misfits_are_seen() -> None:
    """Negative: a keyword that is gone, one that became necessary, and a name that is no more."""
    assert misfits({"a", "b"}, {"a": True, "c": True, "d": False}) == ["does not take b", "needs c"]
    assert misfits({"a", "b"}, {"a": True, ANY: False}) == []
    release = installed_release()
    with pytest.raises(LookupError, match=r"has no megatron\.core\.optimizer\.optimizer\.ChainedOptimizer\.fly"):
        release.parameters("megatron.core.optimizer.optimizer.ChainedOptimizer.fly")
