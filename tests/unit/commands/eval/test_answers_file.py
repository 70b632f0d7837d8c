# SPDX-License-Identifier: Apache-2.0
"""Claims: what is on file is not asked again, what was interrupted is cut off, and a damaged file is no basis."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_g2rpo.commands.eval.answers_file import ANSWERS, UNUSABLE, EvaluationError, append, finished, read


def lines(*names: str) -> list[dict[str, str | int]]:
    """One record a letter: `aab` is two responses to a and one to b."""
    return [{"key": key, "text": "λ\n", "sample_index": index} for name in names for index, key in enumerate(name)]


def test_answered_and_unusable_samples_are_finished(tmp_path: Path) -> None:
    append(tmp_path / ANSWERS, lines("aa", "bb"))
    append(tmp_path / UNUSABLE, [{"key": "c"}])
    append(tmp_path / ANSWERS, lines("dd"))
    assert finished(tmp_path, 2) == {"a", "b", "c", "d"}
    assert [record["key"] for record in read(tmp_path / ANSWERS)] == list("aabbdd")
    assert next(read(tmp_path / ANSWERS))["text"] == "λ\n"


def test_nothing_is_finished_before_the_first_batch(tmp_path: Path) -> None:
    assert finished(tmp_path, 1) == set()
    assert list(read(tmp_path / ANSWERS)) == []


@pytest.mark.parametrize("cut", [1, 20, 40])
def test_a_half_written_end_is_cut_off_with_its_sample(tmp_path: Path, cut: int) -> None:
    """Wherever within the two lines of the last sample the writer was stopped."""
    path = tmp_path / ANSWERS
    append(path, lines("aa"))
    whole = path.read_bytes()
    append(path, lines("bb"))
    path.write_bytes(path.read_bytes()[:-cut])
    assert finished(tmp_path, 2) == {"a"}
    assert path.read_bytes() == whole


def test_a_complete_file_is_left_as_it_is(tmp_path: Path) -> None:
    append(tmp_path / ANSWERS, lines("aaa", "bbb"))
    before = (tmp_path / ANSWERS).read_bytes()
    assert finished(tmp_path, 3) == {"a", "b"}
    assert (tmp_path / ANSWERS).read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"key": "a"}\n{"ke\n{"key": "b"}\n', ":2: not JSON"),
        (b'{"key": "a"}\n["b"]\n', ":2: no record of an evaluation"),
        (b'{"key": "a"}\n{"key": "b"}\n{"key": "b"}\n', "sample a has 1 lines, not 2"),
        (b'{"key": "a"}\n{"key": "a"}\n{"key": "b"}\n{"key": "b"}\n{"key": "a"}\n', "sample a do not stand together"),
        (b'{"key": "a"}\n{"key": "a"}\n{"key": "a"}\n', "sample a has 3 lines, not 2"),
    ],
)
def test_a_file_that_is_damaged_elsewhere_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / ANSWERS).write_bytes(content)
    with pytest.raises(EvaluationError, match="start anew with --fresh") as raised:
        finished(tmp_path, 2)
    assert message in str(raised.value)
    assert str(tmp_path / ANSWERS) in str(raised.value)
