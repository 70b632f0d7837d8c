# SPDX-License-Identifier: Apache-2.0
"""Claims: `megatron-g2rpo logprobs` gives transformers' numbers at any layout, and names the line that it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from megatron_g2rpo.data.processing import ChatProcessor
from tests.common.tiny_model import hf_logits
from tests.e2e.toy import ON_DEVICE, Toy, call, error_of, png, succeed

# fp32 over a few layers, summed in another order.
TOLERANCE = 1e-5

TENSOR = "policy.megatron_cfg.tensor_model_parallel_size=2"
SEQUENCE = "policy.megatron_cfg.sequence_parallel=true"
PIPELINE = "policy.megatron_cfg.pipeline_model_parallel_size=2"
CONTEXT = "policy.megatron_cfg.context_parallel_size=2"

Lines = list[dict[str, Any]]


def line(text: str, images: list[str], response: str) -> dict[str, Any]:
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return {"prompt": [{"role": "user", "content": parts}], "images": images, "response": response}


# Seven lines, so that two data-parallel ranks have different numbers of them; longest first and shortest last, so that
# packing reorders them.
LINES: Lines = [
    line("Which colours, in order?", ["red.png", "wide.png"], "<thinking>a look at it</thinking><answer>red</answer>"),
    line("What colour?", ["red.png"], "<thinking>a look at it</thinking><answer>red</answer>"),
    line("1 + 1 = ?", [], "<thinking>1 + 1</thinking><answer>2</answer>"),
    line("What colour?", ["wide.png"], "nothing of the kind: 3.14"),
    line("Which colours, in order?", ["wide.png", "red.png"], ""),
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1?"}], "response": "1"},
    line("1 + 1 = ?", [], ""),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("logprobs")
    (root / "red.png").write_bytes(png("red"))
    (root / "wide.png").write_bytes(png("blue", 64, 32))
    return write(root / "in.jsonl", LINES)


def write(path: Path, lines: Lines) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in lines))
    return path


def read(path: Path) -> Lines:
    return [json.loads(item) for item in path.read_text().splitlines()]


@torch.no_grad()
def reference(model_dir: Path, source: Path, temperature: float) -> Lines:
    """One unpadded transformers forward per line."""
    model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()
    processor = ChatProcessor(model_dir)
    results = []
    for item in LINES:
        images = [Image.open(source.parent / path).convert("RGB") for path in item.get("images", [])]
        inputs = processor.encode(item["prompt"], images)
        end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        ids = [*processor.tokenizer(item["response"], add_special_tokens=False)["input_ids"], end]
        logits = hf_logits(model, inputs, torch.tensor(ids))[len(inputs.token_ids) - 1 : -1]
        table = (logits.double() / temperature).log_softmax(-1)
        results.append(
            {
                "token_ids": ids,
                "logprobs": table.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist(),
                "entropies": (-(table.exp() * table).sum(-1)).tolist(),
            }
        )
    return results


def assert_same(actual: Lines, expected: Lines) -> None:
    assert len(actual) == len(expected)
    for number, (one, other) in enumerate(zip(actual, expected, strict=True), start=1):
        assert one["token_ids"] == other["token_ids"], f"line {number}"
        for name in ("logprobs", "entropies"):
            difference = (torch.tensor(one[name]) - torch.tensor(other[name])).abs().max()
            assert difference <= TOLERANCE, f"line {number}: {name} differ by {difference}"


def test_replicas_and_tensor_shards_give_the_numbers_of_transformers(toy: Toy, source: Path, tmp_path: Path) -> None:
    expected = reference(toy.model, source, 1.0)
    assert [len(item["token_ids"]) for item in expected][4::2] == [1, 1], "an empty response is its end token"
    arguments = ("logprobs", "--model", toy.model, "--input", source, *ON_DEVICE, "--output")
    result = call(*arguments, tmp_path / "tp1.jsonl")
    assert result.exit_code == 0, result.output
    assert f"wrote 7 lines to {tmp_path / 'tp1.jsonl'}" in result.stdout
    assert_same(read(tmp_path / "tp1.jsonl"), expected)
    for name, keys in {"dp2": (), "tp2-sp": (TENSOR, SEQUENCE)}.items():
        succeed(*arguments, tmp_path / f"{name}.jsonl", *keys, nproc=2)
        assert_same(read(tmp_path / f"{name}.jsonl"), expected)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.full
@pytest.mark.parametrize(
    ("nproc", "keys"),
    [
        (2, (PIPELINE,)),
        (2, (CONTEXT,)),
        (4, (TENSOR, SEQUENCE, PIPELINE)),
        (4, (TENSOR, SEQUENCE, CONTEXT)),
        (4, (PIPELINE, CONTEXT)),
        (4, (TENSOR,)),
        (8, (TENSOR, SEQUENCE, PIPELINE, CONTEXT)),
    ],
    ids=["pp2", "cp2", "tp2-sp-pp2", "tp2-sp-cp2", "pp2-cp2", "tp2-dp2", "tp2-sp-pp2-cp2"],
)
def test_other_layouts_give_the_numbers_of_transformers(
    toy: Toy, source: Path, tmp_path: Path, nproc: int, keys: tuple[str, ...]
) -> None:
    target = tmp_path / "out.jsonl"
    arguments = ("--model", toy.model, "--input", source, "--output", target, *ON_DEVICE)
    succeed("logprobs", *arguments, *keys, nproc=nproc)
    assert_same(read(target), reference(toy.model, source, 1.0))


def test_the_temperature_is_that_of_the_policy_section(toy: Toy, source: Path, tmp_path: Path) -> None:
    arguments = ("--model", toy.model, "--input", source, "--output", tmp_path / "out.jsonl", *ON_DEVICE)
    result = call("logprobs", *arguments, "policy.generation.temperature=0.7")
    assert result.exit_code == 0, result.output
    assert_same(read(tmp_path / "out.jsonl"), reference(toy.model, source, 0.7))


def _missing(lines: Lines) -> None:
    lines[1]["images"] = ["nowhere.png"]


def _broken(lines: Lines) -> None:
    lines[1]["images"] = ["broken.png"]


def _one_image_short(lines: Lines) -> None:
    lines[1]["images"] = []


def _no_response(lines: Lines) -> None:
    del lines[1]["response"]


def _text_for_chat(lines: Lines) -> None:
    lines[1]["prompt"] = "What colour?"


def _null_content(lines: Lines) -> None:
    lines[1]["prompt"][0]["content"] = None


def _part_without_text(lines: Lines) -> None:
    lines[1]["prompt"][0]["content"] = [{"type": "text"}]


def _half_a_character(lines: Lines) -> None:
    lines[1]["response"] = "red \ud800"


def _long(lines: Lines) -> None:
    lines[1]["response"] = "red " * 2000


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_missing, "nowhere.png cannot be read"),
        (_broken, "broken.png is no image of a format that is read"),
        (_one_image_short, "1 image parts in the chat, but 0 images"),
        (_no_response, 'expected {"prompt": [chat messages]'),
        (_text_for_chat, 'expected {"prompt": [chat messages]'),
        (_null_content, "message 1: its content is null or missing"),
        (_part_without_text, "message 1: a text part lacks its text"),
        (_half_a_character, "its text is no valid Unicode"),
        (_long, "more than policy.sequence_packing.train_mb_tokens"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(
    toy: Toy, source: Path, change: Callable[[Lines], None], expected: str
) -> None:
    lines = json.loads(json.dumps(LINES))
    change(lines)
    (source.parent / "broken.png").write_bytes(b"\0" * 50)
    bad, target = write(source.parent / "bad.jsonl", lines), source.parent / "out" / "bad.jsonl"
    message = error_of(
        "logprobs", "--model", toy.model, "--input", bad, "--output", target, *ON_DEVICE,
        "policy.max_total_sequence_length=1024", "policy.generation.max_new_tokens=1000",
        "policy.sequence_packing.train_mb_tokens=1024",
    )  # fmt: skip
    assert message.startswith(f"{bad}:2: ")
    assert expected in message
    assert not target.exists()


def test_a_line_that_is_not_json_and_a_file_that_is_not_there(toy: Toy, tmp_path: Path) -> None:
    broken = tmp_path / "in.jsonl"
    broken.write_text('{"prompt": [], "response": ""}\n\n{"prompt": [\n')
    arguments = ("logprobs", "--model", toy.model, "--output", tmp_path / "out.jsonl", *ON_DEVICE, "--input")
    assert error_of(*arguments, broken).startswith(f"{broken}:3: not JSON")
    assert error_of(*arguments, tmp_path / "none.jsonl") == f"{tmp_path / 'none.jsonl'} does not exist"
