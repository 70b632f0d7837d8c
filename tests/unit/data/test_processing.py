# SPDX-License-Identifier: Apache-2.0
"""The processor's output: the right tokens, the right pixels, and nothing smuggled in through a text."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    Qwen3VLForConditionalGeneration,
)

from megatron_g2rpo.data import images
from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.images import EncodedImages
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.tasks import response_formats
from megatron_g2rpo.types import Sample
from tests.unit.data.conftest import ask, encoded, make_image


def test_the_chat_is_qwen_s_with_one_placeholder_per_merged_patch(processor):
    inputs = processor.encode(ask(None, None, "What?"), [make_image(64, 64), make_image(96, 32)])
    # 64x64 pixels are 8x8 patches of 8, merged 2x2: 16 tokens; 96x32 are 12x4: 12 tokens.
    pads = ["<|vision_start|>" + "<|image_pad|>" * n + "<|vision_end|>" for n in (16, 12)]
    text = f"<|im_start|>user\n{pads[0]}{pads[1]}What?<|im_end|>\n<|im_start|>assistant\n"
    expected = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert inputs.token_ids.tolist() == expected
    assert inputs.token_ids.dtype == torch.int64
    assert inputs.image_grid_thw.tolist() == [[1, 8, 8], [1, 4, 12]]
    assert inputs.pixel_values.shape == (64 + 48, 3 * 2 * 8 * 8)
    assert inputs.pixel_values.dtype == torch.float32
    assert (inputs.token_ids == processor.image_token_id).sum() == 28


def test_pixel_values_are_the_pixels_in_merge_order(processor):
    image = make_image(64, 32)
    patches = processor.encode(ask(None, "?"), [image]).pixel_values
    # rows: (merged row, merged column, row in 2x2, column in 2x2); columns: (channel, time, y, x)
    blocks = patches.reshape(2, 4, 2, 2, 3, 2, 8, 8)
    pixels = blocks.permute(5, 4, 0, 2, 6, 1, 3, 7).reshape(2, 3, 32, 64)
    expected = torch.from_numpy(np.asarray(image).transpose(2, 0, 1) / 255.0 * 2 - 1)
    # 8-bit values scaled in float32: 1e-6 is some ten units in the last place.
    for frame in pixels:
        torch.testing.assert_close(frame.double(), expected, atol=1e-6, rtol=0)


def test_without_an_image_there_are_no_pixels_and_no_placeholders(processor):
    inputs = processor.encode([{"role": "user", "content": "What?"}], [])
    assert inputs.pixel_values.shape == (0, 384)
    assert inputs.image_grid_thw.shape == (0, 3)
    assert processor.image_token_id not in inputs.token_ids.tolist()


def test_pixel_bounds_of_the_recipe_replace_the_directory_s(model_dir):
    image = make_image(64, 64)
    small = ChatProcessor(model_dir, max_pixels=32 * 32).encode(ask(None), [image])
    large = ChatProcessor(model_dir, min_pixels=96 * 96).encode(ask(None), [image])
    assert small.image_grid_thw.tolist() == [[1, 4, 4]]
    assert large.image_grid_thw.tolist() == [[1, 12, 12]]


def test_a_sample_becomes_a_prompt_with_the_system_prompt_first(model_dir):
    sample = Sample(
        key="s/1", task="vqa", question="What?", answer="blue", answer_format="exact", images=(make_image(32, 32),)
    )
    processor = ChatProcessor(model_dir, system_prompt="Be brief.")
    prompt = processor.encode_sample(sample, 0)
    assert prompt.sample == dataclasses.replace(sample, resized_sizes=((32, 32),))
    text = processor.tokenizer.decode(prompt.inputs.token_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|>")


def test_a_prompt_carries_the_instruction_of_its_task_s_format(model_dir):
    formats = {name: response_formats.get(name) for name in ("thinking_answer", "boxed")}
    tasks = {"vqa": formats["thinking_answer"], "math": formats["boxed"]}
    processor = ChatProcessor(model_dir, system_prompt="Be brief.", instructed=tasks)
    for task, instruction in [*((task, f"\n\n{tasks[task].instruction}") for task in tasks), ("ocr", "")]:
        sample = Sample(key="s/1", task=task, question="What?", answer="blue", answer_format="exact")
        expected = f"<|im_start|>user\nWhat?{instruction}<|im_end|>\n<|im_start|>assistant\n"
        text = processor.tokenizer.decode(processor.encode_sample(sample, 0).inputs.token_ids)
        assert text == f"<|im_start|>system\nBe brief.<|im_end|>\n{expected}"


# What templates write after the question, and in the place of an earlier answer: Qwen3's, its thinking models', the one
# of DeepSeek-R1's distilled models, Mistral's, and one that is for prompts alone.
LOOP = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' + (message.content if message.content is "
    "string else message.content[0].text) + '<|im_end|>\n' -}}{%- endfor -%}"
)
R1 = (
    "{%- for message in messages -%}{%- if message.role == 'user' -%}{{- '<|User|>' -}}{%- else -%}"
    "{{- '<|Assistant|>' -}}{%- endif -%}{{- message.content -}}{%- endfor -%}"
)
MISTRAL = (
    "{%- for message in messages -%}{%- if message.role == 'user' -%}{{- '[INST] ' + message.content + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + message.content + '</s>' -}}{%- endif -%}{%- endfor -%}"
)
HEADER = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "prefix"),
    [
        (LOOP + "{%- if add_generation_prompt -%}{{- '" + HEADER + "' -}}{%- endif -%}", ""),
        (LOOP + "{%- if add_generation_prompt -%}{{- '" + HEADER + "<think>\n' -}}{%- endif -%}", "<think>\n"),
        (
            LOOP + "{%- if add_generation_prompt -%}{{- '" + HEADER + "<think>\n\n</think>\n\n' -}}{%- endif -%}",
            "<think>\n\n</think>\n\n",
        ),
        (R1 + "{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\n' -}}{%- endif -%}", "<think>\n"),
        (MISTRAL, ""),
        (LOOP + "{{- '" + HEADER + "' -}}", ""),
    ],
    ids=["plain", "thinking", "thought", "r1", "mistral", "prompts alone"],
)
def test_what_the_template_says_of_the_response_travels_with_the_prompt(copied, template, prefix):
    (copied / "chat_template.jinja").write_text(template)
    processor = ChatProcessor(copied)
    assert processor.response_prefix == prefix
    if template.startswith(LOOP):
        sample = Sample(key="s/1", task="vqa", question="What?", answer="blue", answer_format="exact")
        prompt = processor.encode_sample(sample, 0)
        assert prompt.response_prefix == prefix
        assert processor.tokenizer.decode(prompt.inputs.token_ids).endswith(HEADER + prefix)


def test_the_quickstart_s_template_says_nothing_of_the_response(processor):
    assert processor.response_prefix == ""


@pytest.mark.parametrize("text", ["blue", "<thinking>7 + 5</thinking><answer>12</answer>", "ünï 漢字 [1, 2]\n", ""])
def test_a_response_survives_encoding_and_decoding_and_ends_the_turn(processor, text):
    ids = processor.encode_response(text)
    assert ids.dtype == torch.int64
    assert ids[-1] == processor.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert processor.decode(ids) == text


def test_markup_tags_are_single_tokens(processor):
    assert len(processor.encode_response("<thinking></thinking><answer></answer>")) == 5


def test_digits_are_single_tokens(processor):
    assert len(processor.encode_response("1234567890")) == 11


def test_images_stand_where_the_question_has_their_tags(processor):
    def sample(question, *images):
        return Sample(key="s/1", task="vqa", question=question, answer="", answer_format="exact", images=images)

    wide, square = make_image(96, 32), make_image(32, 32)
    prompt = processor.encode_sample(sample("First <image>, second:\n<image>", wide, square), 0)
    expected = processor.encode(ask("First ", None, ", second:\n", None), [wide, square])
    assert torch.equal(prompt.inputs.token_ids, expected.token_ids)
    assert torch.equal(prompt.inputs.pixel_values, expected.pixel_values)
    for question, count, tags in [("<image>?", 0, 1), ("<image><image><image>", 2, 3), ("<image>", 2, 1)]:
        with pytest.raises(SampleError) as caught:
            processor.encode_sample(sample(question, *[square] * count), 0)
        expected = f"sample s/1: the question has {tags} <image> tags, but the sample {count} images"
        assert str(caught.value) == expected


def test_a_prompt_s_sample_has_its_images_sizes_as_the_model_sees_them(model_dir):
    processor = ChatProcessor(model_dir, max_pixels=64 * 64)
    images = (make_image(128, 32), make_image(44, 33))
    sample = Sample(key="s/1", task="vqa", question="?", answer="", answer_format="exact", images=images)
    assert sample.resized_sizes == ()
    prompt = processor.encode_sample(sample, 0)
    assert prompt.sample.image_sizes == ((128, 32), (44, 33))
    assert prompt.sample.resized_sizes == ((128, 32), (48, 32))
    assert [(w // 8, h // 8) for w, h in prompt.sample.resized_sizes] == [
        (w, h) for _, h, w in prompt.inputs.image_grid_thw.tolist()
    ]


def test_a_prompt_keeps_no_decoded_image(processor, monkeypatch):
    files = [encoded(make_image(64, 32)), encoded(make_image(32, 32))]
    sample = Sample(
        key="s/1", task="vqa", question="?", answer="", answer_format="exact", images=EncodedImages(files, ["a", "b"])
    )
    decoded = []
    read = images.read_image
    monkeypatch.setattr(images, "read_image", lambda data, name: decoded.append(name) or read(data, name))
    prompt = processor.encode_sample(sample, 0)
    assert decoded == ["a", "b"]
    kept = pickle.dumps(prompt.sample)
    assert len(kept) < sum(map(len, files)) + 1000
    assert prompt.sample.images[0].size == (64, 32)
    monkeypatch.setattr(images, "read_image", lambda *_: pytest.fail("decoded for a size that is known"))
    assert pickle.loads(kept).image_sizes == ((64, 32), (32, 32))


def test_an_image_of_a_shard_that_cannot_be_decoded_is_named_when_its_sample_is_encoded(processor):
    broken = EncodedImages([b"nothing"], ["shard s.tar, sample 'a': image '0.png'"])
    sample = Sample(key="s/1", task="vqa", question="?", answer="", answer_format="exact", images=broken)
    with pytest.raises(SampleError, match=r"^shard s\.tar, sample 'a': image '0\.png' is no image"):
        processor.encode_sample(sample, 0)


@pytest.mark.parametrize(("parts", "images"), [((None, "?"), 0), (("?",), 1), ((None, None), 1), ((None,), 2)])
def test_more_or_fewer_image_parts_than_images_are_an_error(processor, parts, images):
    with pytest.raises(
        SampleError, match=f"sample s/1: {parts.count(None)} image parts in the chat, but {images} images"
    ):
        processor.encode(ask(*parts), [make_image(32, 32)] * images, name="sample s/1")


def test_a_video_part_is_refused(processor):
    with pytest.raises(SampleError, match="contains a video part"):
        processor.encode([{"role": "user", "content": [{"type": "video"}]}], [])


def test_an_image_of_impossible_shape_is_named(processor):
    for width, height in ((900, 4), (1, 300)):
        message = f"sample s/1: the image processor refuses an image of {width}x{height} pixels"
        with pytest.raises(SampleError, match=message):
            processor.encode(ask(None), [make_image(width, height)], name="sample s/1")


@pytest.mark.parametrize("size", [(1, 1), (1, 150), (3, 3)])
def test_the_smallest_images_are_encoded(processor, size):
    """Whose shape a processor could take for channels first."""
    inputs = processor.encode(ask(None), [make_image(*size)])
    assert inputs.pixel_values.shape == (int(inputs.image_grid_thw.prod()), 384)
    assert inputs.pixel_values.isfinite().all()


def test_the_directory_loads_with_transformers_and_the_model_reads_the_inputs(model_dir, processor):
    tokenizer, config = AutoTokenizer.from_pretrained(model_dir), AutoConfig.from_pretrained(model_dir)
    assert len(tokenizer) == config.text_config.vocab_size <= 512
    assert AutoImageProcessor.from_pretrained(model_dir).patch_size == config.vision_config.patch_size
    assert sum(config.text_config.rope_parameters["mrope_section"]) == config.text_config.head_dim // 2
    assert GenerationConfig.from_pretrained(model_dir).eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model = Qwen3VLForConditionalGeneration.from_pretrained(model_dir).eval()
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 2e6

    def logits(image):
        inputs = processor.encode(ask(None, "What?"), [image])
        ids = inputs.token_ids[None]
        with torch.no_grad():
            return model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=inputs.pixel_values,
                image_grid_thw=inputs.image_grid_thw,
                mm_token_type_ids=(ids == processor.image_token_id).int(),
            ).logits[0, -1]

    one, two = logits(make_image(64, 64, seed=1)), logits(make_image(64, 64, seed=2))
    assert one.isfinite().all()
    assert (one - two).abs().max() > 1e-4  # the pixels reach the last token, even at random weights


def test_the_template_may_lie_in_json_as_in_the_first_qwen3_vl_releases(copied, processor):
    template = (copied / "chat_template.jinja").read_text()
    (copied / "chat_template.jinja").unlink()
    (copied / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    messages = ask(None, "What?")
    images = [make_image(32, 32)]
    assert torch.equal(
        ChatProcessor(copied).encode(messages, images).token_ids, processor.encode(messages, images).token_ids
    )


def test_a_directory_without_template_is_an_error(copied):
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="has no chat template"):
        ChatProcessor(copied)


@pytest.mark.parametrize("name", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast"])
def test_either_spelling_of_the_image_processor_is_read_with_pil(copied, name):
    change_preprocessor(copied, image_processor_type=name)
    assert type(ChatProcessor(copied).image_processor).__name__ == "Qwen2VLImageProcessorPil"


def test_another_family_s_image_processor_is_refused(copied):
    change_preprocessor(copied, image_processor_type="CLIPImageProcessor")
    with pytest.raises(DataError, match=r"preprocessor_config\.json: image_processor_type is 'CLIPImageProcessor'"):
        ChatProcessor(copied)


def test_a_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"nowhere/config\.json does not exist"):
        ChatProcessor(tmp_path / "nowhere")


def test_a_model_that_sees_needs_its_image_processor(copied):
    (copied / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match=r"has neither preprocessor_config\.json nor a processor_config\.json"):
        ChatProcessor(copied)


def test_a_model_of_text_alone_refuses_images(text_alone):
    processor = ChatProcessor(text_alone)
    messages = [{"role": "user", "content": "what is 1 + 2?"}]
    inputs = processor.encode(messages, [])
    assert "what is 1 + 2?" in processor.decode(inputs.token_ids)
    assert inputs.image_grid_thw.shape == (0, 3)
    assert processor.vision_token_ids == []
    with pytest.raises(SampleError, match="has 1 images, but the model reads text alone"):
        processor.encode(messages, [Image.new("RGB", (32, 32))], name="sample 7")
    with pytest.raises(SampleError, match="sample 7: contains image parts, but the model reads text alone"):
        processor.encode(ask("what?", None), [], name="sample 7")


# What SmolLM2's template does with a message, and what Qwen3's does: one fails at a list of parts, the other drops it.
JOINS = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
DROPS = (
    "{% set content = message.content if message.content is string else '' %}"
    "{{ '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}"
)


@pytest.mark.parametrize("turn", [JOINS, DROPS], ids=["joins", "drops"])
def test_templates_of_models_of_text_receive_strings(text_alone, turn):
    loop = "{% for message in messages %}" + turn + "{% endfor %}"
    (text_alone / "chat_template.jinja").write_text(loop + "{{ '<|im_start|>assistant\n' }}")
    processor = ChatProcessor(text_alone, system_prompt="Be brief.")
    sample = Sample(key="s/1", task="sum", question="1 + 2?", answer="3", answer_format="numeric", images=())
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.tokenizer.decode(processor.encode_sample(sample, 0).inputs.token_ids) == expected
    parts = processor.encode(ask("1 +", " 2?"), [])
    assert torch.equal(parts.token_ids, processor.encode([{"role": "user", "content": "1 + 2?"}], []).token_ids)


def test_pixel_bounds_out_of_order_are_an_error(model_dir):
    with pytest.raises(DataError, match="pixel bounds 99999 to 16384 are not in order"):
        ChatProcessor(model_dir, min_pixels=99999)


def change_preprocessor(directory, **changes):
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
