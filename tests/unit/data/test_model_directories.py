# SPDX-License-Identifier: Apache-2.0
"""Claims: model directories as people have them are read as transformers reads them, or refused with what to do."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.models.directory import load_config
from megatron_g2rpo.weights import copy_model_files
from megatron_g2rpo.weights.model_files import read_json

ASK = [{"role": "user", "content": "What?"}]
SEE = [{"role": "user", "content": [{"type": "image"}]}]
TURN_END, TEXT_END = "<|im_end|>", "<|endoftext|>"


@pytest.fixture
def copied(model_dir: Path, tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(model_dir, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def as_transformers_5(directory: Path) -> None:
    """Move the image processor to where ``AutoProcessor.save_pretrained`` of transformers 5 writes it."""
    old = directory / "preprocessor_config.json"
    nested = {"processor_class": "Qwen3VLProcessor", "image_processor": json.loads(old.read_text())}
    (directory / "processor_config.json").write_text(json.dumps(nested))
    old.unlink()


def image(width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# -- image processors -------------------------------------------------------------------------------------------------


def test_a_directory_of_transformers_5_gives_the_pixels_of_the_older_form(copied, processor):
    as_transformers_5(copied)
    found, expected = (each.encode(SEE, [image()]) for each in (ChatProcessor(copied), processor))
    assert torch.equal(found.pixel_values, expected.pixel_values)
    assert torch.equal(found.token_ids, expected.token_ids)


def test_of_two_configurations_the_nested_one_counts_as_in_transformers(copied):
    old = (copied / "preprocessor_config.json").read_text()
    edit(copied / "preprocessor_config.json", size={"shortest_edge": 1024, "longest_edge": 2048})
    as_transformers_5(copied)
    (copied / "preprocessor_config.json").write_text(old)
    theirs = AutoImageProcessor.from_pretrained(copied).size
    ours = ChatProcessor(copied).image_processor.size
    assert (ours["shortest_edge"], ours["longest_edge"]) == (theirs["shortest_edge"], theirs["longest_edge"])
    assert ours["longest_edge"] == 2048


def test_a_processor_config_without_an_image_processor_leaves_the_other_file_to_say(copied):
    edit(copied / "processor_config.json", processor_class="Qwen3VLProcessor")
    assert ChatProcessor(copied).image_processor.patch_size == 8


@pytest.mark.parametrize("kind", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen3VLImageProcessor"])
def test_the_image_processor_s_names_are_one_processor(copied, kind):
    edit(copied / "preprocessor_config.json", image_processor_type=kind)
    assert type(ChatProcessor(copied).image_processor).__name__ == "Qwen2VLImageProcessorPil"


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "Qwen2VLImageProcessorOfMine", ""])
def test_another_processor_is_refused_in_either_file(copied, kind):
    edit(copied / "preprocessor_config.json", image_processor_type=kind)
    as_transformers_5(copied)
    with pytest.raises(DataError, match=rf"processor_config\.json: image_processor_type is '{kind}'"):
        ChatProcessor(copied)


@pytest.mark.parametrize("form", ["size", "old bounds", "nested"])
def test_an_export_carries_the_pixel_bounds_that_were_trained_with(copied, tmp_path, form):
    file = copied / "preprocessor_config.json"
    if form == "old bounds":
        edit(file, size=None, min_pixels=1024, max_pixels=16384)
    elif form == "nested":
        as_transformers_5(copied)
    trained = ChatProcessor(copied, min_pixels=2048, max_pixels=4096)
    (tmp_path / "hf").mkdir()
    copy_model_files(copied, tmp_path / "hf", trained.settings)
    exported = AutoImageProcessor.from_pretrained(tmp_path / "hf").size
    assert (exported["shortest_edge"], exported["longest_edge"]) == (2048, 4096)
    again = ChatProcessor(tmp_path / "hf").encode(SEE, [image(96, 80)])
    assert torch.equal(again.pixel_values, trained.encode(SEE, [image(96, 80)]).pixel_values)
    assert (tmp_path / "hf" / "preprocessor_config.json").exists() == (form != "nested")


def test_files_that_say_it_all_are_copied_as_they_are(copied, tmp_path):
    (tmp_path / "hf").mkdir()
    copy_model_files(copied, tmp_path / "hf", ChatProcessor(copied).settings)
    for path in copied.iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()


# -- chat templates ---------------------------------------------------------------------------------------------------


def in_tokenizer_config(directory: Path, template: Any) -> None:
    edit(directory / "tokenizer_config.json", chat_template=template)


def in_processor_config(directory: Path, template: Any) -> None:
    edit(directory / "processor_config.json", chat_template=template)


def in_json(directory: Path, template: Any) -> None:
    edit(directory / "chat_template.json", chat_template=template)


@pytest.mark.parametrize("place", [in_tokenizer_config, in_processor_config, in_json])
@pytest.mark.parametrize("named", [False, True], ids=["text", "list"])
def test_a_template_is_found_where_it_lies_and_of_several_the_default(copied, processor, place, named):
    jinja = copied / "chat_template.jinja"
    text = jinja.read_text()
    jinja.unlink()
    others = [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": text}]
    place(copied, others if named else text)
    found = ChatProcessor(copied).encode(ASK, []).token_ids
    assert torch.equal(found, processor.encode(ASK, []).token_ids)


def test_additional_templates_leave_the_default_and_are_exported(copied, tmp_path, processor):
    (copied / "additional_chat_templates").mkdir()
    (copied / "additional_chat_templates" / "tool_use.jinja").write_text("wrong")
    assert torch.equal(ChatProcessor(copied).encode(ASK, []).token_ids, processor.encode(ASK, []).token_ids)
    (tmp_path / "hf").mkdir()
    copy_model_files(copied, tmp_path / "hf")
    assert (tmp_path / "hf" / "additional_chat_templates" / "tool_use.jinja").read_text() == "wrong"


def test_several_templates_without_a_default_are_an_error(copied):
    (copied / "chat_template.jinja").unlink()
    in_tokenizer_config(copied, [{"name": "rag", "template": "a"}, {"name": "tool_use", "template": "b"}])
    with pytest.raises(DataError, match=r"none of its chat templates \(rag, tool_use\) is named default"):
        ChatProcessor(copied)


# -- tokens that end a response ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eos", "named", "expected"),
    [
        (TURN_END, [TURN_END, TEXT_END], [TURN_END, TEXT_END]),  # Qwen3's instruct models
        (TURN_END, TEXT_END, [TURN_END, TEXT_END]),
        (TURN_END, TURN_END, [TURN_END]),
        (TURN_END, None, [TURN_END]),
        (TEXT_END, TEXT_END, [TURN_END, TEXT_END]),  # base models, whose template ends turns otherwise
        (None, None, [TURN_END, TEXT_END]),  # what Qwen's tokenizer class has where nothing is said
    ],
)
def test_every_token_that_ends_a_response_counts_and_sft_ends_with_the_template_s(copied, eos, named, expected):
    edit(copied / "tokenizer_config.json", eos_token=eos)
    ids = AutoTokenizer.from_pretrained(copied).convert_tokens_to_ids
    (copied / "generation_config.json").unlink()
    if named is not None:
        edit(copied / "generation_config.json", eos_token_id=ids(named))
    processor = ChatProcessor(copied)
    assert processor.eos_token_ids == tuple(ids(expected))
    assert processor.eos_token_id == ids(TURN_END) == processor.encode_response("blue")[-1]


def test_a_template_that_ends_no_turn_leaves_the_tokenizer_s_end(copied):
    (copied / "chat_template.jinja").write_text("{%- for message in messages -%}{{- message.content -}}{%- endfor -%}")
    edit(copied / "generation_config.json", eos_token_id=None)
    processor = ChatProcessor(copied)
    assert processor.eos_token_ids == (processor.tokenizer.eos_token_id,)


def test_the_beginning_of_the_next_turn_is_no_end(copied):
    """A template that separates turns by their headers alone, and writes one at the end of its own accord."""
    turns = "{%- for m in messages -%}{{- '<|im_start|>' + m.role + m.content -}}{%- endfor -%}"
    (copied / "chat_template.jinja").write_text(
        turns + "{%- if add_generation_prompt -%}{{- '<|im_start|>' -}}{%- endif -%}"
    )
    start = AutoTokenizer.from_pretrained(copied).convert_tokens_to_ids("<|im_start|>")
    assert start not in ChatProcessor(copied).eos_token_ids


@pytest.mark.parametrize("named", ["<|im_end|>", [1.5], {"a": 1}, True, -1])
def test_what_is_no_id_is_named(copied, named):
    edit(copied / "generation_config.json", eos_token_id=named)
    with pytest.raises(DataError, match=r"generation_config\.json: eos_token_id is .*, not a token's id or a list"):
        ChatProcessor(copied)


@pytest.mark.parametrize("stated", [True, False], ids=["stated", "no file"])
def test_an_export_of_a_base_model_stops_where_its_policy_did(copied, tmp_path, stated):
    edit(copied / "tokenizer_config.json", eos_token=TEXT_END)
    generation = copied / "generation_config.json"
    edit(generation, eos_token_id=AutoTokenizer.from_pretrained(copied).eos_token_id)
    if not stated:
        generation.unlink()
    processor = ChatProcessor(copied)
    (tmp_path / "hf").mkdir()
    copy_model_files(copied, tmp_path / "hf", processor.settings)
    assert read_json(tmp_path / "hf" / "generation_config.json")["eos_token_id"] == list(processor.eos_token_ids)


# -- tokenizers and embeddings ----------------------------------------------------------------------------------------


def resize(directory: Path, rows: int) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["vocab_size"] = rows
    (directory / "config.json").write_text(json.dumps(config))


def test_a_token_that_the_embedding_has_no_row_for_is_named(copied, processor):
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(copied)
    larger = ChatProcessor(copied)
    rows = processor.vocab_size
    assert len(larger.tokenizer) == rows + 1
    message = rf"sample s/1: contains the token '<tool>' \(id {rows}\), but the model's embedding has {rows} rows"
    with pytest.raises(SampleError, match=message):
        larger.encode([{"role": "user", "content": "use <tool>"}], [], name="sample s/1")
    with pytest.raises(SampleError, match=message):
        larger.encode_response("<tool>", name="sample s/1")
    assert torch.equal(larger.encode(ASK, []).token_ids, processor.encode(ASK, []).token_ids)


def test_tokens_that_every_run_needs_must_have_rows(copied, processor):
    resize(copied, processor.image_token_id)
    token = rf"<\|image_pad\|> \({processor.image_token_id}\)"
    with pytest.raises(
        DataError, match=rf"embedding has {processor.image_token_id} rows, but .* tokens beyond: .*{token}"
    ):
        ChatProcessor(copied)


def test_rows_without_a_token_are_never_sampled(copied, processor):
    resize(copied, processor.vocab_size + 3)
    larger = ChatProcessor(copied)
    extra = list(range(processor.vocab_size, processor.vocab_size + 3))
    assert larger.banned_token_ids(larger.vocab_size) == processor.banned_token_ids(processor.vocab_size) + extra


@pytest.mark.parametrize(
    "left", [(), ("tokenizer_config.json", "chat_template.jinja")], ids=["nothing", "no vocabulary"]
)
def test_a_missing_tokenizer_is_named_with_what_to_copy(copied, left):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if name not in left:
            (copied / name).unlink()
    with pytest.raises(DataError, match=r"has no tokenizer \(none of tokenizer\.json, .*: copy tokenizer\.json"):
        ChatProcessor(copied)


def test_a_damaged_tokenizer_is_named(copied):
    (copied / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=f"{copied}: the tokenizer cannot be read"):
        ChatProcessor(copied)


# -- code in a directory ----------------------------------------------------------------------------------------------


@pytest.fixture
def evil(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with code that would leave a file, and a terminal at which no question may appear."""
    (copied / "evilmod.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")

    def asked(*_: object) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr(builtins, "input", asked)
    return copied


def test_an_unknown_model_s_own_code_is_refused_and_never_offered(evil, tmp_path):
    edit(evil / "config.json", model_type="evil", auto_map={"AutoConfig": "evilmod.C"})
    message = r"config\.json: unknown model family 'evil'.*own code \(auto_map\) is not run"
    with pytest.raises(DataError, match=message):
        ChatProcessor(evil)
    with pytest.raises(ValueError, match=message):
        load_config(evil)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_s_own_code_is_never_run_nor_offered(evil, tmp_path, processor):
    """The class that transformers has for the model reads it."""
    edit(evil / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evilmod.C", None]})
    edit(evil / "config.json", auto_map={"AutoConfig": "evilmod.C"})
    assert torch.equal(ChatProcessor(evil).encode(ASK, []).token_ids, processor.encode(ASK, []).token_ids)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["{", "[]", "version https://git-lfs.github.com/spec/v1\n"])
def test_a_broken_configuration_is_named(copied, content):
    (copied / "config.json").write_text(content)
    with pytest.raises(DataError, match=r"config\.json (is not JSON|holds no object)"):
        ChatProcessor(copied)


@pytest.mark.parametrize("template", ["{% for x in %}", "{{ raise_exception('no questions') }}"])
def test_a_template_that_renders_no_question_is_named(copied, template):
    (copied / "chat_template.jinja").write_text(template)
    with pytest.raises(DataError, match=rf"{copied}: a question: the model's chat template refuses it"):
        ChatProcessor(copied)
