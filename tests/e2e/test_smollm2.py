# SPDX-License-Identifier: Apache-2.0
"""Claim: a real pretrained model goes through, from its Hugging Face directory to a trained one, on a real tokenizer.

SmolLM2-135M-Instruct: nine heads in three groups, which no power of two can share, tied embeddings, 49,152 tokens.
Everything runs through the command line, at one process and at three. It needs what `make test-full` installs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_g2rpo import registry
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.tasks import response_formats
from tests.e2e.toy import ROOT, command, metrics

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]

# fp32 over 30 layers, summed in another order.
TOLERANCE = 1e-4
SFT_STEPS, STEPS, LEARNING_RATE = 12, 10, 1e-5
RECIPES = ROOT / "examples" / "recipes"
CPU = "cluster.device=cpu"
LAYOUTS = {"tp1": (), "tp3": ("policy.megatron_cfg.tensor_model_parallel_size=3", "--nproc", "3")}

Tensors = dict[str, torch.Tensor]


def run(*arguments: str | Path) -> None:
    done = command(*arguments, CPU, timeout=1800)
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}:\n{(done.stdout + done.stderr)[-6000:]}"


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """Gigabytes, which pytest's own temporary directories would keep."""
    with tempfile.TemporaryDirectory(prefix="smollm2-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def model(root: Path) -> Path:
    script = ROOT / "examples" / "smollm2" / "build_model.py"
    subprocess.run([sys.executable, str(script), "--out", str(root / "model")], check=True, timeout=600)
    return root / "model"


@pytest.fixture(scope="module")
def checkpoints(model: Path, root: Path) -> dict[str, Path]:
    """A Megatron checkpoint imported at each layout."""
    for name, layout in LAYOUTS.items():
        run("convert", "import", model, root / name, *layout)
    return {name: root / name for name in LAYOUTS}


@pytest.fixture(scope="module")
def data(root: Path) -> Path:
    script = ROOT / "examples" / "smollm2" / "build_data.py"
    subprocess.run([sys.executable, str(script), "--out", str(root / "data")], check=True, timeout=600)
    return root / "data"


def assert_equal(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    assert not different, f"{len(different)} of {len(ours)} tensors differ: {different[:5]}"


def passages() -> list[dict[str, Any]]:
    """Real text as a model may have read it, in lengths from one line to a page; and a chat with a system turn."""
    text = (ROOT / "LICENSE").read_text()
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if len(part) > 60]
    ask = [{"role": "user", "content": "Quote a licence."}]
    lines = [{"prompt": ask, "response": part} for part in [*paragraphs[:9], text[:3000]]]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 17 + 25?"}]
    return [*lines, {"prompt": turns, "response": "17 + 25 = 42, naïvely: 十七 and 二十五."}]


@torch.no_grad()
def oracle(directory: Path, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """transformers and nothing else: one unpadded forward a line."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    results = []
    for line in lines:
        chat = tokenizer.apply_chat_template(line["prompt"], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(chat, add_special_tokens=False)["input_ids"]
        ids = tokenizer(line["response"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        table = logits.double().log_softmax(-1)
        logprobs = table.gather(1, torch.tensor(ids)[:, None])[:, 0]
        results.append({"token_ids": ids, "logprobs": logprobs, "entropies": -(table.exp() * table).sum(-1)})
    return results


@pytest.fixture(scope="module")
def expected(model: Path) -> list[dict[str, Any]]:
    return oracle(model, passages())


def test_the_weights_are_those_of_a_trained_model(model: Path, expected: list[dict[str, Any]]) -> None:
    """Less than 4.5 nats a token; a model that knows nothing needs 10.8, the logarithm of its vocabulary."""
    logprobs = torch.cat([line["logprobs"] for line in expected])
    assert len(logprobs) > 300
    assert -logprobs.mean() < 4.5
    published = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    assert greedy(published, model, ask) == "The capital of France is Paris."


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_imported_checkpoint_has_transformers_log_probabilities(
    checkpoints: dict[str, Path], expected: list[dict[str, Any]], root: Path, name: str
) -> None:
    source, target = root / "in.jsonl", root / f"{name}.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in passages()))
    checkpoint = checkpoints[name]
    named = (f"policy.pretrained_checkpoint={checkpoint}", f"policy.model_name={checkpoint}/huggingface")
    companions = checkpoint / "huggingface"
    run("logprobs", "--model", companions, "--input", source, "--output", target, *LAYOUTS[name], *named)
    actual = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(actual) == len(expected)
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True), start=1):
        assert ours["token_ids"] == theirs["token_ids"], f"line {number}"
        for kind in ("logprobs", "entropies"):
            difference = (torch.tensor(ours[kind], dtype=torch.float64) - theirs[kind]).abs().max()
            assert difference <= TOLERANCE, f"line {number}: {kind} differ by {difference}"


@pytest.mark.parametrize(("imported", "exported"), [("tp3", "tp1"), ("tp1", "tp3")])
def test_a_model_comes_back_at_another_layout(
    checkpoints: dict[str, Path], model: Path, tmp_path: Path, imported: str, exported: str
) -> None:
    """Every tensor, bit for bit, and the files beside the weights."""
    run("convert", "export", checkpoints[imported], tmp_path / "hf", *LAYOUTS[exported])
    source = load_file(model / "model.safetensors")
    assert len(source) == 1 + 30 * 9 + 1
    assert_equal(load_file(tmp_path / "hf" / "model.safetensors"), source)
    (tmp_path / "hf" / "model.safetensors").unlink()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (model / name).read_bytes()


def test_the_tasks_share_no_question_and_a_reference_response_earns_everything(data: Path) -> None:
    indices = {name: ShardIndex(data / name) for name in ("train", "val")}
    splits = {
        name: [index.read(entry) for task in index.tasks for entry in index.entries(task)]
        for name, index in indices.items()
    }
    asked = {name: {sample.question for sample in samples} for name, samples in splits.items()}
    shape = response_formats.get("thinking_answer")
    assert [len(asked["train"]), len(asked["val"])] == [len(splits["train"]), len(splits["val"])] == [240, 48]
    assert not asked["train"] & asked["val"]
    for sample in splits["train"] + splits["val"]:
        assert sample.response is not None
        assert shape.is_well_formed(sample.response)
        answer = shape.find_answer(sample.response)
        assert answer is not None
        assert registry.answer_formats.get(sample.answer_format)(answer, sample) == 1.0


def test_ten_steps_of_g2rpo_change_every_tensor_and_nothing_else(
    checkpoints: dict[str, Path], model: Path, data: Path, root: Path
) -> None:
    """From the checkpoint of three ranks over one process's training to an export of three ranks again.

    Supervised steps come first: a group in which no response has the answer format has no reward to rank.
    """
    shards = (f"data.train.path={data / 'train'}", f"data.validation.path={data / 'val'}")
    sft, g2rpo, exported = root / "sft", root / "g2rpo", root / "exported"
    start = (checkpoints["tp3"], sft / "checkpoints" / f"step_{SFT_STEPS}")
    for kind, log_dir, weights in zip(("sft", "g2rpo"), (sft, g2rpo), start, strict=True):
        recipe = RECIPES / f"{kind}-smollm2-1n1g-megatron-tp1.yaml"
        named = (f"policy.pretrained_checkpoint={weights}", f"policy.model_name={weights}/huggingface")
        run("sft" if kind == "sft" else "train", recipe, *named, *shards, f"logger.log_dir={log_dir}")

    lines = metrics(g2rpo)
    assert list(lines) == list(range(STEPS + 1))  # 0: validation before the first
    for step in range(1, STEPS + 1):
        line = lines[step]
        assert line["train/grad_norm"] > 0, f"step {step}"
        assert line["train/rollout_gap_max"] < 1e-3, f"step {step}"  # nats, fp32: the engine runs these weights
    assert all(torch.tensor(list(line.values())).isfinite().all() for line in lines.values())
    assert any(line["train/zero_variance_groups"] < 1 for line in list(lines.values())[1:])

    before, after = load_file(sft / "hf" / "model.safetensors"), load_file(g2rpo / "hf" / "model.safetensors")
    run("convert", "export", g2rpo / "checkpoints" / f"step_{STEPS}", exported, *LAYOUTS["tp3"])
    assert_equal(load_file(exported / "model.safetensors"), after)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in load_file(model / "model.safetensors").items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in after.items()} == shapes
    # A step of Adam moves a weight by at most (1 - beta1) / sqrt(1 - beta2) = 3.2 learning rates. Rows of a matrix are
    # hundreds of times that apart: one in a wrong place would be seen.
    farthest = 3.2 * LEARNING_RATE * STEPS + 1e-5
    for name, tensor in after.items():
        moved = (tensor - before[name]).abs().max()
        assert 0 < moved < farthest, f"{name} moved by {moved}"

    trained, report = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    problem = "State the final answer to the following arithmetic problem: 3 + 4 ="
    turns = [{"role": "system", "content": "Think, then answer."}, {"role": "user", "content": problem}]
    assert greedy(trained, exported, turns).startswith("<thinking>3 + 4</thinking><answer>")


@torch.no_grad()
def greedy(model: Any, directory: Path, chat: list[dict[str, str]]) -> str:
    """The most likely response, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
