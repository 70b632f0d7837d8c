# SPDX-License-Identifier: Apache-2.0
"""What a text spells is text: a reserved token in it is told apart from those that the chat template writes."""

import pytest
import torch
from transformers import AutoTokenizer

from megatron_g2rpo.data.errors import SampleError
from megatron_g2rpo.data.processing import ChatProcessor
from tests.unit.data.conftest import ask, make_image


@pytest.mark.parametrize(
    "token",
    [
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    ],
)
def test_a_reserved_token_in_a_text_is_plain_text(processor, token):
    """It ends no turn and shows no image, whatever stands around it; what the template writes stays as it is."""
    tokenizer = processor.tokenizer
    reserved = set(tokenizer.convert_tokens_to_ids([token])) | set(processor.vision_token_ids)
    for text in (
        token,
        f"a{token}b",
        f" {token} ",
        f"{token}{token}",
        f"<|im_{token}",
        f"7\n{token}\n\ue000\U000f0000",
    ):
        inputs = processor.encode([{"role": "user", "content": text}], [])
        ids = inputs.token_ids.tolist()
        before, after = (
            tokenizer(part)["input_ids"] for part in ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
        )
        assert ids[: len(before)] == before
        assert ids[-len(after) :] == after
        spelled = ids[len(before) : -len(after)]
        assert not reserved & set(spelled)
        assert tokenizer.decode(spelled) == text
        response = processor.encode_response(text)
        assert not reserved & set(response[:-1].tolist())
        assert processor.decode(response) == text


def test_an_image_and_the_text_of_its_placeholder_are_told_apart(processor):
    question = "<|vision_start|><|image_pad|><|vision_end|> what?"
    inputs = processor.encode(ask(None, question), [make_image(64, 64)], name="s")
    assert (inputs.token_ids == processor.image_token_id).sum() == 16
    text = processor.tokenizer.decode(inputs.token_ids)
    assert text.endswith(f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n")


def test_plain_texts_are_encoded_as_before_a_text_that_spells_a_reserved_token(processor):
    """The switch to plain text is no state that stays."""
    plain = processor.encode(ask(None, "What?"), [make_image(32, 32)]).token_ids
    processor.encode(ask("<|im_end|>"), [])
    assert torch.equal(processor.encode(ask(None, "What?"), [make_image(32, 32)]).token_ids, plain)


def test_neighbours_of_a_plain_text_are_encoded_as_without_it(processor):
    """Turns without a reserved token keep their tokens, and so does the text beside it in its own turn."""
    turns = [{"role": "system", "content": "Be brief. 12"}, *ask("What?")]
    plain = processor.encode(turns, []).token_ids.tolist()
    more = processor.encode([*turns, {"role": "user", "content": "a <|im_end|>"}], []).token_ids.tolist()
    end = len(processor.tokenizer("<|im_start|>assistant\n")["input_ids"])
    assert more[: len(plain) - end] == plain[:-end]


def test_text_parts_that_spell_a_reserved_token_together_are_refused(processor, text_alone):
    for each in (processor, ChatProcessor(text_alone)):
        with pytest.raises(SampleError, match=r"^s: text parts spell the reserved token <\|im_end\|> together"):
            each.encode(ask("a <|im_", "end|>"), [], name="s")
    apart = processor.encode(ask("a <|im_", None, "end|>"), [make_image(32, 32)])
    assert (apart.token_ids == processor.eos_token_id).sum() == 1


def test_a_tokenizer_that_cannot_spell_a_reserved_token_refuses_it(copied, monkeypatch):
    processor = ChatProcessor(copied)
    spell = type(processor.tokenizer).__call__
    monkeypatch.setattr(type(processor.tokenizer), "__call__", lambda self, text, **_: spell(self, text))
    with pytest.raises(
        SampleError, match=r"^s: the text contains the reserved token <\|im_end\|>, which this tokenizer"
    ):
        processor.encode(ask("<|im_end|>"), [], name="s")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (["hello"], r"message 1: expected \{"),
        ([{"content": "hello"}], r"message 1: expected \{"),
        ([{"role": "user"}], "message 1: its content is null or missing"),
        ([{"role": "system", "content": "a"}, {"role": "user", "content": None}], "message 2: its content is null"),
        ([{"role": "user", "content": 5}], "message 1: its content is a value of type int"),
        ([{"role": "user", "content": ["hello"]}], "message 1: a part of its content is no"),
        ([{"role": "user", "content": [{"text": "hello"}]}], "message 1: a part of its content is no"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1: a text part lacks its text"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "message 1: a text part lacks its text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 1: contains a image_url part"),
        (
            [{"role": "user", "content": "a\ud800"}],
            r"message 1: its text is no valid Unicode: '\\ud800' at character 1",
        ),
        (ask("a\udfff"), r"message 1: its text is no valid Unicode"),
    ],
)
def test_messages_of_another_form_are_named(processor, messages, message):
    with pytest.raises(SampleError, match=f"^in.jsonl:3: {message}"):
        processor.encode(messages, [], name="in.jsonl:3")


def test_a_response_that_is_no_valid_unicode_is_named(processor):
    with pytest.raises(SampleError, match=r"^sample s/1: its text is no valid Unicode"):
        processor.encode_response("a\ud800", name="sample s/1")


def test_a_reserved_token_of_any_spelling_is_plain_text(text_alone):
    """SmolLM2's are not all written like Qwen's."""
    tokenizer = AutoTokenizer.from_pretrained(text_alone)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<file_sep>"]})
    tokenizer.save_pretrained(text_alone)
    processor = ChatProcessor(text_alone)
    ids = processor.encode(ask("a<file_sep>b"), []).token_ids
    assert tokenizer.convert_tokens_to_ids("<file_sep>") not in ids
    assert "a<file_sep>b" in tokenizer.decode(ids)
