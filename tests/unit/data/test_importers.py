# SPDX-License-Identifier: Apache-2.0
"""Each importer makes of its own rows the samples that they are, and says why of those that it cannot."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.data.importers.detect import detect
from megatron_g2rpo.data.importers.values import images_of, lookup
from tests.common.openvlthinker import ROWS
from tests.unit.data.import_sources import picture, run, samples_of, write_json, write_lines

OWN = {"task": "colour", "question": "Which?", "answer": "red", "answer_format": "exact"}
EASYR1 = {"problem": "<image>Find x.", "answer": "3", "images": ["a.png"], "level": 2}
VERL = {
    "data_source": "hiyouga/geometry3k",
    "prompt": [{"role": "user", "content": "<image>Find x."}],
    "images": ["a.png"],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "extra_info": {"index": 0, "split": "train"},
}
LLAVA = {
    "id": "1",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "red"}],
}
SHAREGPT = {
    "messages": [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "red"}],
    "images": ["a.png"],
}
PARTS = {
    "task_name": "colour",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "See "},
                {"type": "image", "image": "a.png"},
                {"type": "text", "text": "."},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ],
}
GIVEN = {"task": "t", "answer_format": "exact"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(picture())
    return tmp_path


def reasons(name: str, folder: Path, row: Any, options: dict[str, Any] | None = None, **settings: Any) -> list[str]:
    """Why a row is not imported, beside one that is."""
    good = {"jsonl": OWN, "verl": VERL, "llava": LLAVA, "sharegpt": SHAREGPT, "fields": OWN, "easyr1": EASYR1}[name]
    source = write_json(folder / "rows.json", [good, row])
    result = run(name, source, folder / "out", options, **GIVEN | settings)
    assert sum(result.samples.values()) == 1
    assert result.rejected_file is not None
    return [json.loads(line)["message"] for line in result.rejected_file.read_text().splitlines()]


def test_own_field_names_with_their_images_and_further_fields(folder: Path) -> None:
    for form in ("jpeg", "webp", "gif"):
        (folder / f"picture.{form}").write_bytes(picture(form=form))
    rows = [
        {**OWN, "images": ["a.png", "picture.jpeg", "picture.webp", "picture.gif"], "source": "mine"},
        {**OWN, "image": "a.png", "answer": 3},
        {**OWN, "images": None, "response": "It is red."},
    ]
    run("jsonl", write_lines(folder / "rows.jsonl", rows), folder / "out")
    one, two, three = samples_of(folder / "out")
    assert [image.size for image in one.images] == [(8, 8)] * 4
    assert one.extra == {"source": "mine"}
    assert (len(two.images), two.answer, two.extra) == (1, "3", {})
    assert (len(three.images), three.response, three.extra) == (0, "It is red.", {})


def test_the_field_of_the_images_is_an_option(folder: Path) -> None:
    source = write_lines(folder / "rows.jsonl", [{**OWN, "pictures": ["a.png"], "image": "a remark"}])
    run("jsonl", source, folder / "out", {"images": "pictures"})
    (sample,) = samples_of(folder / "out")
    assert (len(sample.images), sample.extra) == (1, {"image": "a remark"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "rows.json:2: a row must be a JSON object: list"),
        ({**OWN, "answer": True}, "field 'answer' is true"),
        ({**OWN, "question": None}, "field 'question' is null"),
        ({**OWN, "images": ["a.png"], "image": "b.png"}, "the fields 'images' and 'image' both hold images; name one"),
        ({**OWN, "images": ["none.png"]}, "an image file cannot be read"),
        ({**OWN, "images": ["rows.json"]}, "no image of a format that is read"),
        ({**OWN, "images": ["/dev/zero"]}, "an image file cannot be read: /dev/zero is no file"),
        ({**OWN, "images": ["a.png", None]}, "an image among others is null: number 2 of 2"),
        ({**OWN, "images": [7]}, "images are neither paths nor encoded files: 7"),
        ({**OWN, "images": "https://example.org/a.png"}, "images by address are not downloaded"),
        ({**OWN, "videos": ["a.mp4"]}, "video is not supported"),
        ({**OWN, "more": json.loads("[" * 600 + "]" * 600)}, "rows.json:2: values are nested too deep"),
        ({**OWN, "question": "<image><image>?", "images": ["a.png"]}, "tags <image> are not as many as its images: 2"),
    ],
)
def test_a_row_that_cannot_be_a_sample_is_named_with_the_reason(folder: Path, row: Any, message: str) -> None:
    (said,) = reasons("jsonl", folder, row)
    assert "rows.json:2: " in said
    assert message in said


def test_the_papers_rows_become_samples_by_its_own_names(tmp_path: Path) -> None:
    rows = json.loads(ROWS.read_text())
    assert len(rows) == 60
    for shade, row in enumerate(rows):
        path = tmp_path / "images" / row["images"][0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(shade))
    video = {**rows[0], "data_type": "video", "images": None, "videos": ["a.mp4"]}
    # What the validation files and OneThinker's have: NaN, and neither options nor a task type.
    bare = {key: value for key, value in rows[0].items() if key not in ("options", "task_type")}
    bare |= {"problem_reserved_text": float("nan")}
    source = write_json(tmp_path / "rows.json", [*rows, video, bare])
    assert detect(source) == "openvlthinker"
    result = run("openvlthinker", source, tmp_path / "out", image_dir=tmp_path / "images")
    assert result.rejected == {"video is not supported": 1}
    samples = samples_of(tmp_path / "out")
    assert len(samples) == len(rows) + 1
    for sample in samples:
        original = next(row for row in rows if row["problem_id"] == sample.extra["problem_id"])
        assert sample.answer_format == original["problem_type"]
        assert sample.extra["data_source"] == original["data_source"]
        assert f"<answer>{sample.answer}</answer>" == original["answer"]
        assert ("box_frame" in sample.extra) == (sample.answer_format == "spatial grounding")
        options = original["options"]
        assert sample.question.startswith(original["problem"])
        asked, _, form = sample.question.rpartition("\n")
        assert form.startswith("Answer ")
        assert asked.endswith("\n".join(["", "Options:", *options]) if options else original["problem"])
        assert sample.extra.get("options", []) == options
        assert sample.images[0].size == (8, 8)
    onethinker = [sample for sample in samples if sample.task == "spatial grounding"]
    assert [sample.extra["box_frame"] for sample in onethinker] == ["relative"]
    assert {sample.task for sample in samples} == {row["task_type"] for row in rows} | {"spatial grounding"}


@pytest.mark.parametrize("kind", [["math"], {"a": 1}, 5])
def test_a_problem_type_that_is_no_text_rejects_its_row(tmp_path: Path, kind: Any) -> None:
    rows = [{"problem": "Which?", "answer": "1", "problem_type": each} for each in ("math", kind)]
    result = run("openvlthinker", write_json(tmp_path / "rows.json", rows), tmp_path / "out")
    assert (sum(result.samples.values()), dict(result.rejected)) == (1, {"field 'problem_type' is no text": 1})


def test_options_that_the_question_has_already_are_not_repeated(tmp_path: Path) -> None:
    row = {"problem": "Which? A. red B. blue", "options": ["A. red", "B. blue"], "answer": "<answer>A</answer>"}
    source = write_json(tmp_path / "rows.json", [{**row, "problem_type": "multiple choice"}])
    run("openvlthinker", source, tmp_path / "out", {"form": False})
    assert [sample.question for sample in samples_of(tmp_path / "out")] == [row["problem"]]


@pytest.mark.parametrize("answer", ["<answer>A", "<answer>A</answer><answer>B</answer>", "It is <answer>A</answer>"])
def test_an_answer_whose_tags_are_no_pair_is_rejected(tmp_path: Path, answer: str) -> None:
    rows = [{"problem": "?", "answer": answer, "problem_type": "math"} for answer in ("<answer>A</answer>", answer)]
    result = run("openvlthinker", write_json(tmp_path / "rows.json", rows), tmp_path / "out")
    assert result.rejected == {"the tags <answer> and </answer> are not one pair around the reference": 1}


def test_easyr1(folder: Path) -> None:
    run("easyr1", write_json(folder / "rows.json", [EASYR1]), folder / "out", **GIVEN)
    (sample,) = samples_of(folder / "out")
    assert (sample.task, sample.question, sample.answer) == ("t", "<image>Find x.", "3")
    assert (len(sample.images), sample.extra) == (1, {"level": 2})


def test_verl(folder: Path) -> None:
    run("verl", write_json(folder / "rows.json", [VERL]), folder / "out", answer_format="exact")
    (sample,) = samples_of(folder / "out")
    assert (sample.task, sample.question, sample.answer) == ("hiyouga/geometry3k", "<image>Find x.", "3")
    assert len(sample.images) == 1
    assert sample.extra == {"data_source": VERL["data_source"], "ability": "math", "extra_info": VERL["extra_info"]}


@pytest.mark.parametrize(("name", "row"), [("llava", LLAVA), ("sharegpt", SHAREGPT), ("sharegpt", PARTS)])
def test_a_conversation_becomes_question_response_and_reference(folder: Path, name: str, row: dict[str, Any]) -> None:
    settings = {"answer_format": "exact"} if "task_name" in row else GIVEN
    run(name, write_json(folder / "rows.json", [row]), folder / "out", **settings)
    (sample,) = samples_of(folder / "out")
    questions = {"llava": "<image>\nWhich?", "sharegpt": "<image>Which?"}
    assert sample.question == ("See <image>." if row is PARTS else questions[name])
    assert sample.task == ("colour" if row is PARTS else "t")
    assert sample.response == sample.answer == "red"
    assert len(sample.images) == 1


SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "red"}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("verl", {**VERL, "prompt": [SYSTEM, *VERL["prompt"]]}, "a system message; set data.system_prompt"),
        ("verl", {**VERL, "prompt": [*VERL["prompt"], ANSWER, *VERL["prompt"]]}, "several turns"),
        ("verl", {**VERL, "reward_model": {}}, "no field 'reward_model.ground_truth'"),
        ("sharegpt", {"messages": [SYSTEM, *SHAREGPT["messages"]]}, "a system message; set data.system_prompt"),
        ("sharegpt", {"messages": SHAREGPT["messages"] * 2}, "not one question and one answer"),
        ("sharegpt", {"messages": [ANSWER]}, "not one question and one answer"),
        ("sharegpt", {"messages": [{"role": "tool", "content": "x"}]}, "a turn of the role 'tool'"),
        ("sharegpt", {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "neither text nor image"),
        ("sharegpt", {"messages": [{"role": "user", "content": 3}]}, "neither text nor a list of parts"),
        ("sharegpt", {**PARTS, "images": ["a.png"]}, "images both in the messages and beside them"),
        ("sharegpt", {"messages": "hello"}, "the conversation is no list of messages"),
        ("llava", {**LLAVA, "images": ["a.png"]}, "the fields 'image' and 'images' both hold images"),
        ("llava", {**LLAVA, "image": None}, "tags <image> are not as many as its images: 1 and 0"),
    ],
)
def test_a_conversation_that_is_no_sample_is_rejected(folder: Path, name: str, row: dict, message: str) -> None:
    (said,) = reasons(name, folder, row)
    assert message in said


def test_system_messages_may_be_dropped(folder: Path) -> None:
    row = {**VERL, "prompt": [SYSTEM, *VERL["prompt"]]}
    run("verl", write_json(folder / "rows.json", [row]), folder / "out", {"system": "drop"}, answer_format="exact")
    assert [sample.question for sample in samples_of(folder / "out")] == ["<image>Find x."]


def test_fields_are_mapped_by_dotted_names_and_the_rest_is_kept(folder: Path) -> None:
    row = {"id": 7, "problem": {"text": "Which?"}, "truth": ["red"], "picture": "a.png", "a.b": "dotted", "kind": "c"}
    mapped = ("question=problem.text", "answer=truth.0", "images=picture", "note=a.b")
    run(
        *("fields", write_json(folder / "rows.json", [row]), folder / "out"),
        {"map": mapped},
        answer_format="exact",
        task_field="kind",
    )
    (sample,) = samples_of(folder / "out")
    assert (sample.task, sample.question, sample.answer, len(sample.images)) == ("c", "Which?", "red", 1)
    assert sample.extra == {
        "id": 7, "problem": row["problem"], "truth": ["red"], "kind": "c", "note": "dotted",
    }  # fmt: skip


def test_a_mapped_field_that_a_row_lacks_rejects_it_and_wrong_maps_are_errors(folder: Path) -> None:
    (said,) = reasons("fields", folder, {"question": "?"})
    assert said.endswith("rows.json:2: no field 'answer': it has question")
    source = folder / "rows.json"
    for entries, message in ((("question",), "write FIELD=PATH"), (("a=b", "a=c"), "'a' is already 'b'")):
        with pytest.raises(DataError, match=message):
            run("fields", source, folder / "out2", {"map": entries})


@pytest.mark.parametrize(
    ("row", "name"),
    [
        *((OWN, "jsonl"), (EASYR1, "easyr1"), ({**EASYR1, "problem_type": "math"}, "openvlthinker")),
        *((VERL, "verl"), (LLAVA, "llava"), (SHAREGPT, "sharegpt"), (PARTS, "sharegpt")),
    ],
)
def test_the_importer_is_told_from_the_first_row(folder: Path, row: dict[str, Any], name: str) -> None:
    assert detect(write_json(folder / "rows.json", [row])) == name


def test_rows_of_two_formats_or_none_ask_for_a_choice(folder: Path) -> None:
    with pytest.raises(DataError, match=r"which jsonl and sharegpt read: choose with --importer jsonl"):
        detect(write_json(folder / "rows.json", [{**OWN, **SHAREGPT}]))
    with pytest.raises(DataError, match=r"has the fields 'foo', which no importer knows .*--map question=FIELD"):
        detect(write_json(folder / "rows.json", [{"foo": 1}]))
    with pytest.raises(DataError, match=r"rows\.json holds no row$"):
        detect(write_json(folder / "rows.json", []))


def test_images_are_read_from_paths_bytes_structs_and_data_uris() -> None:
    data = picture()
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    assert images_of([data, {"bytes": data, "path": "x.png"}, uri], "row") == [data] * 3
    assert images_of({"bytes": None, "path": "x.png"}, "row") == [Path("x.png")]
    assert images_of("file:///tmp/a%20b.png", "row") == [Path("/tmp/a b.png")]
    assert images_of(None, "row") == images_of(float("nan"), "row") == images_of([None], "row") == []


def test_a_path_of_dots_reaches_into_objects_and_lists() -> None:
    record = {"a": {"b": [1, {"c": 2}]}, "a.b": 3, "n": float("nan")}
    assert lookup(record, "a.b") == 3
    assert lookup(record, "a.b.1.c") == 2
    assert lookup(record, "n") is None
    assert lookup(record, "a.b.9") is lookup(record, "x.y") is None
