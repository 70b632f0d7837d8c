# SPDX-License-Identifier: Apache-2.0
"""Claim: the plotly.js that the package carries is the published file that its README names, with its licence."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

import megatron_g2rpo.report
from megatron_g2rpo.report import page as pages

FOLDER = Path(megatron_g2rpo.report.__file__).parent / "assets" / "plotly"
BUNDLE = FOLDER / "plotly-basic.min.js"


@pytest.fixture(scope="module")
def named() -> dict[str, str]:
    """The rows of the README's table."""
    rows = re.findall(r"^\| ([\w -]+) \| (.+) \|$", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)
    return {name: value.replace("`", "") for name, value in rows}


def test_it_is_the_file_that_the_readme_names(named: dict[str, str]) -> None:
    data = BUNDLE.read_bytes()
    assert hashlib.sha256(data).hexdigest() == named["SHA-256"]
    assert named["file"] == f"{BUNDLE.name}, {len(data):,} bytes"


def test_its_version_is_the_readme_s_in_the_table_and_in_the_commands(named: dict[str, str]) -> None:
    said = re.search(r"plotly\.js \(basic - minified\) v(\d+\.\d+\.\d+)\n", BUNDLE.read_text("utf-8")[:200])
    assert said is not None
    assert named["version"] == said[1]
    commands = re.findall(r"^    .*$", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)
    assert set(re.findall(r"\d+\.\d+\.\d+", "\n".join(commands))) == {said[1]}


def test_its_licence_is_beside_it() -> None:
    text = (FOLDER / "LICENSE").read_text("utf-8")
    assert text.startswith("MIT License\n\nCopyright (c) ")
    assert "Plotly Technologies Inc." in text


def test_it_can_stand_in_a_script_element() -> None:
    """Neither of these occurs in it: the one would end the element, the other would make a browser overlook its end."""
    text = BUNDLE.read_text("utf-8").lower()
    assert "</script" not in text
    assert "<!--" not in text


def test_it_is_parsed_at_once_and_else_what_it_was() -> None:
    script = BUNDLE.read_text("utf-8")
    found = pages._parsed_at_once(script)
    assert len(found) == len(script) + 2
    assert found.replace("this, (() => {", "this, () => {").removesuffix("})));") + "}));" == script
    with pytest.raises(AssertionError, match="another form"):
        pages._parsed_at_once("another()")
