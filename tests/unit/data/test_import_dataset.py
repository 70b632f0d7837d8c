# SPDX-License-Identifier: Apache-2.0
"""An import appears whole or not at all, whatever ends it; its bytes do not depend on how many processes read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import pytest

from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.importers.base import ImportedSample
from megatron_g2rpo.data.importers.guess import advice_for
from megatron_g2rpo.data.importers.split import validation_samples
from megatron_g2rpo.data.importers.write import ImportSettings, import_dataset
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.data.shard_writer import write_index
from tests.unit.data.import_sources import picture, run, samples_of, write_lines

OWN = {"task": "colour", "question": "Which?", "answer": "red", "answer_format": "exact"}


def rows_with_images(folder: Path, number: int, images: int = 7) -> list[dict[str, Any]]:
    for shade in range(images):
        (folder / f"{shade}.png").write_bytes(picture(shade))
    return [{**OWN, "question": f"Which {n}?", "images": [f"{n % images}.png"]} for n in range(number)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_one_process_and_three_write_the_same_bytes_and_list_the_same_rejections(tmp_path: Path) -> None:
    rows = rows_with_images(tmp_path, 120)
    rows[5]["images"], rows[50]["answer"] = ["none.png"], None
    source = write_lines(tmp_path / "rows.jsonl", [*rows, "{"])
    found = []
    for workers in (1, 3):
        target = tmp_path / f"out{workers}"
        result = run("jsonl", source, target, workers=workers, samples_per_shard=50, validation_share=0.3)
        assert result.rejected.total() == 3
        found.append((files_of(target), Path(f"{target}.rejected.jsonl").read_bytes(), result.samples, result.images))
    assert found[0] == found[1]


def test_the_index_is_what_a_scan_of_the_shards_finds(tmp_path: Path) -> None:
    run(
        "jsonl",
        write_lines(tmp_path / "rows.jsonl", rows_with_images(tmp_path, 5)),
        tmp_path / "o",
        samples_per_shard=2,
    )
    written = (tmp_path / "o" / "index.json").read_bytes()
    assert len(list((tmp_path / "o").glob("*.tar"))) == 3
    write_index(tmp_path / "o")
    assert (tmp_path / "o" / "index.json").read_bytes() == written


def test_rejections_are_counted_by_reason_and_listed(tmp_path: Path) -> None:
    lines = [OWN, "{", "[", {**OWN, "answer_format": "exat"}, {**OWN, "answer_format": "exakt"}, {**OWN, "task": ""}]
    no_png = {**OWN, "images": ["rows.jsonl"]}
    result = run("jsonl", write_lines(tmp_path / "rows.jsonl", [*lines, no_png]), tmp_path / "out")
    assert dict(result.samples) == {("", "colour", "exact"): 1}
    assert result.rejected == {
        "not valid JSON": 2,
        "unknown answer format 'exat' (did you mean 'exact'?)": 1,
        "unknown answer format 'exakt' (did you mean 'exact'?)": 1,
        "field 'task' is missing or cannot be used": 1,
        "an image cannot be decoded, or is of a format that is not read": 1,
    }
    assert result.rejected_file == tmp_path / "out.rejected.jsonl"
    listed = [json.loads(line) for line in result.rejected_file.read_text().splitlines()]
    assert [row["name"].rpartition(":")[2] for row in listed] == ["2", "3", "4", "5", "6", "7"]
    assert {row["reason"] for row in listed} == set(result.rejected)


def test_a_damaged_image_is_found_unless_decoding_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(picture()[:50])  # behind the header, within the pixels
    source = write_lines(tmp_path / "rows.jsonl", [OWN, {**OWN, "images": ["cut.png"]}])
    assert run("jsonl", source, tmp_path / "out").rejected.total() == 1
    assert run("jsonl", source, tmp_path / "out2", decode=False).rejected.total() == 0


def test_strict_ends_at_the_first_rejection_and_leaves_nothing(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [OWN, {**OWN, "answer": None}, "{"])
    before = set(tmp_path.iterdir())
    with pytest.raises(SampleError, match=r"rows\.jsonl:2: field 'answer' is null"):
        run("jsonl", source, tmp_path / "out", strict=True)
    assert set(tmp_path.iterdir()) == before


def test_an_import_of_nothing_is_an_error_that_counts_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl holds no samples"):
        run("jsonl", write_lines(tmp_path / "rows.jsonl", []), tmp_path / "out")
    source = write_lines(tmp_path / "rows.jsonl", ["{", {"question": "?", "answer": "!"}])
    with pytest.raises(
        DataError,
        match=r"(?s)nothing could be imported; .*1 x not valid JSON, the first: .*:1: .*\n  1 x no task; .*:2: no task",
    ):
        run("jsonl", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len((tmp_path / "out.rejected.jsonl").read_text().splitlines()) == 2
    # The next import does not leave the list of the one before.
    run("jsonl", source, tmp_path / "out", task="t", answer_format="exact", limit=2)
    write_lines(source, [OWN])
    run("jsonl", source, tmp_path / "all")
    assert not (tmp_path / "all.rejected.jsonl").exists()


def test_a_directory_of_images_that_no_row_names_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture())
    row = {"question": "?", "answer": "!", "picture": "0.png"}
    source = write_lines(tmp_path / "rows.jsonl", [row])
    names: dict[str, Any] = {"task": "t", "answer_format": "exact", "image_dir": tmp_path}
    with pytest.raises(DataError, match=r"no row of .* names an image; say where they do, with --map images=FIELD"):
        run("jsonl", source, tmp_path / "out", **names)
    assert not (tmp_path / "out").exists()
    assert run("fields", source, tmp_path / "out", {"map": ("images=picture",)}, **names).images == 1


def test_task_and_answer_format_of_the_command_line_go_before_those_of_the_data(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [{**OWN, "meta": {"kind": "shape", "how": "numeric"}}])
    run("jsonl", source, tmp_path / "one", task="other", answer_format="edit_distance")
    assert ShardIndex(tmp_path / "one").answer_formats == {"other": ("edit_distance",)}
    run("jsonl", source, tmp_path / "two", task_field="meta.kind", answer_format_field="meta.how")
    assert ShardIndex(tmp_path / "two").answer_formats == {"shape": ("numeric",)}
    with pytest.raises(DataError, match=r"no task in field 'meta\.none'; give --task NAME, or --task-field FIELD"):
        run("jsonl", source, tmp_path / "three", task_field="meta.none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "a", "task_field": "b"}, "--task and --task-field say the same"),
        ({"answer_format": "a", "answer_format_field": "b"}, "--answer-format and --answer-format-field say the same"),
        ({"answer_format": "exat"}, r"--answer-format: unknown answer format 'exat' \(did you mean 'exact'\?\)"),
        ({"image_dir": Path("nowhere")}, "--image-dir: nowhere is no directory"),
        ({"validation_share": 2.0}, r"--split must be between 0 and 1, such as 0\.02, not 2\.0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_anything_is_read(settings: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        import_dataset(lambda source: pytest.fail("it was read"), Path("x"), Path("y"), ImportSettings(**settings))


def test_a_target_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="exists already"):
        run("jsonl", write_lines(tmp_path / "rows.jsonl", [OWN]), tmp_path / "out")


def test_only_the_first_rows_are_read_under_a_limit(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", rows_with_images(tmp_path, 20))
    run("jsonl", source, tmp_path / "out", limit=3)
    assert [sample.question for sample in samples_of(tmp_path / "out")] == ["Which 0?", "Which 1?", "Which 2?"]


def test_an_importer_of_ones_own_yields_paths_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))

    def own(source: Path) -> Iterator[ImportedSample]:
        yield ImportedSample(name="row", fields=OWN, images=[Path("a.png"), picture(2)])

    import_dataset(own, tmp_path / "any", tmp_path / "out")
    (sample,) = samples_of(tmp_path / "out")
    assert [image.getpixel((0, 0))[0] for image in sample.images] == [1, 2]


# The command without the program's start, which takes seconds.
IMPORT = """
import sys
from pathlib import Path
from megatron_g2rpo.commands.data_import import run
from megatron_g2rpo.data.importers.write import ImportSettings
run(Path(sys.argv[1]), Path(sys.argv[2]), "jsonl", [], [], ImportSettings(workers=int(sys.argv[3])))
"""


def open_for(reader: subprocess.Popen[str], fifo: Path) -> TextIO:
    """Open a pipe's writing end as soon as a process reads it; an error if that ends first."""
    while reader.poll() is None:
        try:
            descriptor = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it yet
            time.sleep(0.05)
            continue
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "w")
    raise AssertionError(f"the import ended with {reader.returncode}: {reader.communicate()[1]}")


@pytest.mark.parametrize(("end", "workers"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_an_import_that_is_ended_leaves_nothing(tmp_path: Path, end: signal.Signals, workers: int) -> None:
    rows = rows_with_images(tmp_path, 400)  # more than are read ahead, and less than a pipe holds
    fifo, target = tmp_path / "rows.jsonl", tmp_path / "out"
    os.mkfifo(fifo)  # the import waits for rows that do not come
    before = set(tmp_path.iterdir())
    command = [sys.executable, "-c", IMPORT, fifo, target, str(workers)]
    # A shell has its background jobs ignore SIGINT, and what they start inherits that.
    before_start = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=before_start)
    try:
        with open_for(process, fifo) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            while not list(tmp_path.glob("out.partial/*.tar")):
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(end)
            assert process.wait(timeout=60) != 0
    finally:
        process.kill()
    assert set(tmp_path.iterdir()) == before


def test_what_a_killed_import_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "shard-000000.tar").write_bytes(b"half")
    run("jsonl", write_lines(tmp_path / "rows.jsonl", [OWN]), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    assert len(ShardIndex(tmp_path / "out")) == 1


def test_what_no_import_left_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "notes").mkdir(parents=True)
    (tmp_path / "out.partial" / "notes" / "f").write_text("mine")
    with pytest.raises(DataError, match=f"{tmp_path / 'out.partial'} is in the way"):
        run("jsonl", write_lines(tmp_path / "rows.jsonl", [OWN]), tmp_path / "out")
    assert (tmp_path / "out.partial" / "notes" / "f").read_text() == "mine"


def test_no_image_is_on_both_sides_of_a_split(tmp_path: Path) -> None:
    rows = rows_with_images(tmp_path, 60, images=30)
    for number in range(0, 60, 7):  # chains: a sample that shows two images ties them
        rows[number]["images"] += [f"{(number * 3 + 1) % 30}.png"]
    (tmp_path / "again.png").write_bytes(picture(3))  # the same content under another name
    rows.append({**OWN, "images": ["again.png"]})
    rows += [{**OWN, "question": f"{n % 4} and?", "answer": str(n)} for n in range(12)]
    result = run("jsonl", write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "out", validation_share=0.3)
    sides = [samples_of(tmp_path / "out" / part) for part in ("train", "val")]
    shown = [
        {image.getpixel((0, 0))[0] for sample in side for image in sample.images}
        | {sample.question for sample in side if not sample.images}
        for side in sides
    ]
    assert shown[0] & shown[1] == set()
    assert len(sides[0]) + len(sides[1]) == len(rows)
    counts = [sum(n for (part, _, _), n in result.samples.items() if part == side) for side in ("train", "val")]
    assert counts == [len(side) for side in sides]


def test_a_split_depends_on_contents_alone_and_takes_its_share() -> None:
    contents = [[f"{n:04d}"] for n in range(2000)]
    held = validation_samples(contents, 0.1)
    assert 150 < sum(held) < 250  # 200 expected, standard deviation 13
    assert validation_samples(contents[::-1], 0.1) == held[::-1]
    assert validation_samples(contents[:1000], 0.1) == held[:1000]


def test_a_split_of_few_has_both_parts_and_one_of_a_single_image_is_an_error() -> None:
    assert sorted(validation_samples([["a"], ["b"]], 0.001)) == [False, True]
    assert sorted(validation_samples([["a"], ["b"]], 0.999)) == [False, True]
    with pytest.raises(DataError, match="all samples share one image or question"):
        validation_samples([["a", "b"], ["b", "c"], ["c"]], 0.5)


def test_a_path_that_is_no_dataset_gets_the_command_that_makes_one_of_it(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.parquet", "rows.xlsx"):
        (tmp_path / name).write_text("x")
        assert f"data import {tmp_path / name} OUT" in advice_for(tmp_path / name)
        with pytest.raises(DataError, match=f"data import .*{name} OUT"):
            ShardIndex(tmp_path / name)
    assert advice_for(tmp_path / "rows.json").startswith(f"{tmp_path / 'rows.json'} does not exist; did you mean ")
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    (tmp_path / "pictures" / "deep" / "a.png").write_bytes(picture())
    assert "images without questions" in advice_for(tmp_path / "pictures")
    (tmp_path / "empty").mkdir()
    assert "data import SOURCE OUT" in advice_for(tmp_path / "empty")
    source = write_lines(tmp_path / "rows.jsonl", rows_with_images(tmp_path, 9))
    run("jsonl", source, tmp_path / "out", validation_share=0.3)
    with pytest.raises(DataError, match=r"but the datasets train, val; name one of them: .*out/train"):
        ShardIndex(tmp_path / "out")
