# SPDX-License-Identifier: Apache-2.0
"""Claims about ``megatron-g2rpo doctor``: what is broken or missing is an error with advice, and nothing else is.

What Transformer Engine and a GPU say is in ``tests/gpu/test_doctor.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from typer.testing import CliRunner

from megatron_g2rpo import cli
from megatron_g2rpo.commands.doctor import environment, kernels, lock, requirements
from megatron_g2rpo.commands.doctor.findings import Finding, as_json, tables, usable
from megatron_g2rpo.policy.device import Device, select
from megatron_g2rpo.policy.machine import OPTIONAL, Machine
from megatron_g2rpo.policy.transformer_engine_probe import Answer
from megatron_g2rpo.recipe import load
from tests.common.recipes import G2RPO, SFT

ROOT = Path(__file__).parents[3]
NONE = dict.fromkeys(OPTIONAL, False)
CPU = Machine(device="cpu", capability=None, cuda_version=None, packages=NONE)
QUICKSTART = ROOT / "examples" / "recipes" / "vlm_g2rpo-quickstart-1n1g-megatron-tp1.yaml"


@pytest.fixture
def imports_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying the imports takes seconds; ``test_machine.py`` tests it."""
    monkeypatch.setattr(environment, "broken_imports", lambda names: {})


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["doctor", *arguments])
    return result.exit_code, result.output


def report(*arguments: str) -> tuple[int, dict[str, Any]]:
    code, output = invoke("--json", *arguments)
    return code, json.loads(output)


def by_name(found: list[Finding]) -> dict[str, Finding]:
    return {each.what: each for each in found}


# -- this machine ----------------------------------------------------------------------------------------------------


def test_this_environment_is_usable() -> None:
    """The one test that tries the real imports."""
    code, said = report()
    errors = [each for each in said["findings"] if each["status"] == "error"]
    assert (code, said["usable"], errors) == (0, True, [])
    assert {each["group"] for each in said["findings"]} >= {"hardware", "packages", "lock"}


@pytest.mark.usefixtures("imports_work")
def test_tables_say_the_same_as_json() -> None:
    code, text = invoke()
    _, said = report()
    assert code == 0
    assert text.rstrip().endswith("Usable.")
    for each in said["findings"]:
        assert each["what"] in text


def test_an_error_is_the_exit_status_and_a_warning_is_not() -> None:
    warning, error = Finding("packages", "torch", "2.12", "warning"), Finding("packages", "apex", "0.9", "error", "why")
    assert usable([warning])
    assert not usable([warning, error])
    assert json.loads(as_json([warning, error], None))["usable"] is False
    assert tables([warning, error]) is not None


def package_findings(
    monkeypatch: pytest.MonkeyPatch,
    *installed: str,
    broken: dict[str, str] | None = None,
    answer: Answer | None = None,
    needed: dict[str, str] | None = None,
) -> dict[str, Finding]:
    monkeypatch.setattr(environment, "broken_imports", lambda names: broken or {})
    machine = Machine(
        device="gpu", capability=(9, 0), cuda_version=(13, 0), packages={**NONE, **dict.fromkeys(installed, True)}
    )
    return by_name(list(environment.package_findings(machine, answer, needed or {})))


def test_half_a_transformer_engine_is_an_error_that_says_which_half(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Answer(core_error="RuntimeError: Found empty meta package.")
    found = package_findings(
        monkeypatch, "transformer_engine", broken={"megatron-core": "RuntimeError: Found empty"}, answer=core
    )
    assert found["TE: core library"].status == "error"
    assert "docs/install-gpu.md" in found["TE: core library"].why
    assert found["TE: PyTorch part"].status == "absent"
    assert found["megatron-core"].status == "error"
    assert "dies of Transformer Engine" in found["megatron-core"].why

    torch_part = Answer(torch_error="FileNotFoundError: Could not find shared object file")
    found = package_findings(monkeypatch, "transformer_engine", answer=torch_part)
    assert (found["TE: core library"].status, found["TE: PyTorch part"].status) == ("ok", "error")


def test_parts_of_transformer_engine_of_two_versions_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {
        "transformer_engine": "2.20.2",
        "transformer_engine_core": "2.20.2",
        "transformer_engine_torch": "2.19.0",
    }
    monkeypatch.setattr(
        environment, "distribution_of", lambda name: (name, versions[name]) if name in versions else None
    )
    found = package_findings(monkeypatch, "transformer_engine", answer=Answer())
    assert found["TE: versions"].status == "error"
    versions["transformer_engine_torch"] = "2.20.2"
    assert "TE: versions" not in package_findings(monkeypatch, "transformer_engine", answer=Answer())


def test_the_apex_of_pypi_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "foreign_apex", lambda: "pip uninstall apex")
    found = package_findings(monkeypatch)
    assert (found["apex"].status, found["apex"].why) == ("error", "pip uninstall apex")
    assert found["NVIDIA apex"].status == "absent"


def test_what_is_broken_is_an_error_and_what_is_absent_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = package_findings(
        monkeypatch,
        "flash_attn",
        broken={"flash_attn": "ImportError: undefined symbol"},
        needed={"vllm": "backend=vllm"},
    )
    assert (found["flash-attn 2"].status, found["vLLM"].status, found["nemo-toolkit"].status) == (
        "error",
        "error",
        "absent",
    )
    assert "undefined symbol" in found["flash-attn 2"].why


# -- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "status"),
    [
        ("2.13.0+cpu", None),
        ("2.14.1", None),
        ("2.12.9", "error"),
        ("2.15.0", "error"),
        # NVIDIA's image: before 2.13.0 in pip's order.
        ("2.13.0a0+9186a08b2c.nv26.07", "warning"),
        ("2.12.0a0+9186a08b2c.nv26.05", "error"),
    ],
)
def test_requirements_are_compared_as_pip_does_but_for_builds_of_nvidia(installed: str, status: str | None) -> None:
    found = requirements._compare(Requirement("torch>=2.13,<2.15"), Version(installed))
    assert (found and found.status) == status


def test_all_requirements_of_this_package_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(requirements.violated()) == []
    monkeypatch.setattr(requirements, "installed_version", lambda name: None)
    missing = list(requirements.violated())
    assert len(missing) >= 20
    assert {each.status for each in missing} == {"error"}


def test_a_version_that_is_not_the_locks_is_a_warning_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    pins = lock.read_lock(lock.lock_file("cpu"))
    monkeypatch.setattr(lock, "all_installed", lambda: {**pins, "torch": "2.13.0+cpu", "rich": "1.0", "own": "3"})
    found = by_name(list(lock.findings(CPU)))
    assert found.keys() == {"constraints", "rich"}
    assert (found["rich"].status, found["rich"].value) == ("warning", "1.0")
    assert pins["rich"] in found["rich"].why
    assert f"{len(pins) - 1} of {len(pins)}" in found["constraints"].value


def test_a_gpu_is_held_against_the_lock_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "all_installed", lambda: {"transformer-engine": "2.20.1"})
    gpu = Machine(device="gpu", capability=(9, 0), cuda_version=(13, 0), packages=NONE)
    assert by_name(list(lock.findings(gpu)))["transformer-engine"].why == "the lock has 2.20.2"


def test_without_the_repository_there_is_no_lock_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lock, "REPOSITORY", tmp_path)
    (found,) = lock.findings(CPU)
    assert (found.value, found.status) == ("none", "absent")


# -- a recipe --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("imports_work")
@pytest.mark.parametrize("path", [QUICKSTART, SFT])
def test_a_recipe_that_runs_here_is_usable_and_its_kernels_have_reasons(path: Path) -> None:
    overrides = [] if path == QUICKSTART else ["policy.generation.backend=transformers"]
    code, said = report(str(path), *overrides)
    assert code == 0, said
    mine = {each["what"]: each for each in said["findings"] if each["group"] == "recipe"}
    assert mine["layers"]["value"] == "local"
    assert mine["layers"]["why"] == "Transformer Engine needs a GPU"
    assert mine.keys() >= {"attention", "fp8", "optimizer", "collectives", "padding", "rollouts", "rope"}
    assert all(mine[what]["why"] for what in ("layers", "attention", "fp8", "optimizer"))
    assert said["recipe"] == str(path)


@pytest.mark.usefixtures("imports_work")
@pytest.mark.parametrize(
    ("override", "what", "reason"),
    [
        ("cluster.device=gpu", "cluster.device", "torch sees no GPU"),
        ("policy.megatron_cfg.transformer_impl=transformer_engine", "kernels", "needs a GPU"),
        ("policy.megatron_cfg.fp8_cfg.enabled=true", "kernels", "fp8_cfg.enabled"),
        ("policy.megatron_cfg.gradient_accumulation_fusion=true", "kernels", "gradient_accumulation_fusion"),
        ("policy.megatron_cfg.tensor_model_parallel_size=3 cluster.gpus_per_node=3", "layout", "=3 does not divide"),
        (
            "policy.megatron_cfg.recompute_granularity=full policy.megatron_cfg.recompute_num_layers=3",
            "layout",
            "recompute_num_layers=3",
        ),
        ("policy.generation.backend=vllm", "vLLM", "policy.generation.backend=vllm needs it"),
    ],
)
def test_what_a_recipe_cannot_have_here_is_an_error_with_the_key(override: str, what: str, reason: str) -> None:
    code, said = report(str(QUICKSTART), *override.split())
    assert code == 1
    (error,) = [each for each in said["findings"] if each["status"] == "error"]
    assert error["what"] == what
    assert reason in error["why"]


def test_an_override_without_a_recipe_and_a_recipe_that_is_none_are_errors(tmp_path: Path) -> None:
    code, text = invoke("policy.precision=float32")
    assert code == 1
    assert "no recipe to override" in text
    assert invoke(str(tmp_path / "gone.yaml"))[0] == 1


def test_no_attention_backend_is_an_error_and_its_reasons_are_told() -> None:
    policy_recipe = load(G2RPO, [], "train")
    engine = Machine("gpu", (9, 0), (13, 0), {**NONE, "transformer_engine": True, "vllm": True})
    asked = kernels.wanted(policy_recipe, select("cpu"), engine)
    assert asked.kernels is not None
    shape = kernels.AttentionShape(
        dtype="float32",
        heads=8,
        groups=2,
        head_dim=128,
        sequences=1,
        longest=64,
        tokens=64,
        padded=True,
        context=1,
        cp_comm_type="p2p",
        shared_prefix=True,
    )
    asked = kernels.Wanted(policy_recipe, Device("gpu", select("cpu").torch_device, ""), asked.kernels, shape, ())
    none = by_name(list(kernels.findings(asked, None, Answer(attention="", excluded=("Disabling FusedAttention",)))))
    assert none["attention backend"].status == "error"
    assert "Disabling FusedAttention" in none["attention backend"].why
    some = by_name(list(kernels.findings(asked, None, Answer(attention="FusedAttention"))))
    assert (some["attention backend"].value, some["attention backend"].status) == ("FusedAttention", "ok")
    assert "shared prompts" not in some, "it was not asked"
    apart = Answer(attention="FusedAttention", shared_attention="", shared_excluded=("Disabling FlashAttention",))
    shared = by_name(list(kernels.findings(asked, None, apart)))
    assert shared["attention backend"].status == "ok"
    assert shared["shared prompts"].status == "error"
    assert "Disabling FlashAttention" in shared["shared prompts"].why
    unasked = by_name(list(kernels.findings(asked, None, None)))
    assert unasked["attention backend"].status == "error"


def test_an_fp8_recipe_that_transformer_engine_does_not_have_is_an_error() -> None:
    fp8 = "policy.megatron_cfg.fp8_cfg={enabled: true, fp8: e4m3, fp8_recipe: blockwise}"
    asked = kernels.Wanted(load(G2RPO, [fp8], "train"), select("cpu"), None, None, ())
    reason = "FP8 block scaled GEMM requires compute capability 9.0 or higher and CUDA >= 12.9."
    found = by_name(list(kernels.findings(asked, None, Answer(fp8={"blockwise": reason, "delayed": ""}))))
    assert (found["FP8 blockwise"].status, found["FP8 blockwise"].why) == ("error", reason)
    able = list(kernels.findings(asked, None, Answer(fp8={"blockwise": "", "delayed": ""})))
    assert "FP8 blockwise" not in by_name(able)
