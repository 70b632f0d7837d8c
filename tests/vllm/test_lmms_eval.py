# SPDX-License-Identifier: Apache-2.0
"""lmms-eval, unmodified, on a server of our export, says what ``eval`` says of the same forty samples.

``make test-vllm-full`` sets its environment up.
"""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.e2e.toy import succeed
from tests.vllm.common import POLICY, ROOT
from tests.vllm.servers import free_port

HARNESS = ROOT / ".venv-lmms" / "bin" / "python"
DATA = ROOT / "data" / "quickstart" / "val"
COUNT = 40


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_harness_and_eval_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert HARNESS.exists(), "make lmms-eval sets it up"
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    evaluation, task, out = ROOT / "examples" / "evaluation", tmp_path / "tasks" / "ours", tmp_path / "out"
    _run(evaluation / "local_task.py", DATA, task, "--limit", COUNT, "--max-new-tokens", 48)
    _run(
        evaluation / "benchmarks.py", POLICY, "--out", out, "--tasks", "ours", "--include-path", task,
        "--harness", HARNESS, "--no-instruction", "--max-new-tokens", 48, "--concurrency", 8, "--port", free_port(),
        "--server-options", "--dtype", "float32", "--max-model-len", 512, "--enforce-eager",
        "--limit-mm-per-prompt", '{"image": 2, "video": 0}',
    )  # fmt: skip
    theirs = _lines(max(out.rglob("*_samples_ours.jsonl")))
    keys = pyarrow.parquet.read_table(task / "samples.parquet")["key"].to_pylist()

    recipe = ROOT / "examples" / "recipes" / "vlm_g2rpo-quickstart-1n1g-megatron-tp1.yaml"
    per_task = ["--limit", "7"]  # forty of six tasks, in turn
    data = f"data.validation.path={DATA}"
    succeed("eval", recipe, f"policy.model_name={POLICY}", data, "--out", tmp_path / "eval", *per_task)
    ours = {
        line["key"]: (line["answer"] or "", line["parts"]["accuracy"])
        for line in _lines(tmp_path / "eval" / "answers.jsonl")
    }
    judged = {keys[line["doc_id"]]: (line["filtered_resps"], line["accuracy"]) for line in theirs}
    assert len(judged) == COUNT
    assert judged == {key: ours[key] for key in judged}
    accuracy = sum(score for _, score in judged.values()) / COUNT
    print(f"accuracy: {accuracy:.4f}, of the harness and of eval")
    assert 0.3 < accuracy < 1.0  # some right, some wrong


def _run(script: Path, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
