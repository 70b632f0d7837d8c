# SPDX-License-Identifier: Apache-2.0
"""Claim: what the documentation points at is there: files, headings, verbs; and its examples of extensions run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from megatron_g2rpo.cli import app

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
# Words after the program's name, as far as a line of code or prose spells a verb.
VERB = re.compile(r"(?:megatron-g2rpo|megatron_g2rpo\.cli)((?: [a-z]+)+)")


def markdown_files() -> list[Path]:
    """Those that the repository holds or would hold: not what is ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split() if listed.returncode == 0 else [p.name for p in ROOT.glob("*.md")]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def broken_links(file: Path) -> Iterator[str]:
    """Relative links of a file to what is not there."""
    for link in LINK.findall(CODE_BLOCK.sub("", file.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


def anchors(file: Path) -> set[str]:
    """GitHub's anchors of a file's headings."""
    headings = HEADING.findall(CODE_BLOCK.sub("", file.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def unknown_verbs(text: str) -> Iterator[str]:
    """Verbs that a text gives to the command line and that it does not have."""
    program = get_command(app)
    assert isinstance(program, TyperGroup)
    for words in VERB.findall(text):
        verb, *rest = words.split()
        command = program.commands.get(verb)
        if command is None:
            yield verb
        elif rest and isinstance(command, TyperGroup) and rest[0] not in command.commands:
            yield f"{verb} {rest[0]}"


def test_there_is_documentation_to_check() -> None:
    names = {str(file.relative_to(ROOT)) for file in markdown_files()}
    assert {"README.md", "CONTRIBUTING.md", "docs/extending.md", "tests/README.md"} <= names


@pytest.mark.parametrize("file", markdown_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_relative_links_lead_somewhere(file: Path) -> None:
    assert list(broken_links(file)) == []


@pytest.mark.parametrize("file", markdown_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_verbs_exist(file: Path) -> None:
    assert list(unknown_verbs(file.read_text())) == []


def verbs() -> Iterator[str]:
    """All verbs of the command line, ``data check`` among them."""
    program = get_command(app)
    assert isinstance(program, TyperGroup)
    for name, command in program.commands.items():
        yield from [f"{name} {each}" for each in command.commands] if isinstance(command, TyperGroup) else [name]


@pytest.mark.parametrize("verb", list(verbs()))
def test_every_verb_is_in_the_list_of_verbs(verb: str) -> None:
    assert f"\n    megatron-g2rpo {verb} " in (ROOT / "docs" / "recipes.md").read_text()


def test_the_blocks_of_python_run() -> None:
    """In a process of their own: what they register must not be there for other tests."""
    pages = ("extending.md", "add_a_model.md", "answers.md")
    blocks = [block for page in pages for block in PYTHON_BLOCK.findall((ROOT / "docs" / page).read_text())]
    assert len(blocks) >= 10
    # Every block stands for a file: it imports what it needs.
    program = "import sys\nfor block in sys.argv[1:]: exec(block, {'__name__': 'block'})"
    run = subprocess.run(
        [sys.executable, "-c", program, *blocks], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A heading, here\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](there.md#a-heading-here) [c](gone.md) [d](there.md#gone) [e](https://gone.example)"
    )
    assert list(broken_links(page)) == ["gone.md", "there.md#gone"]


def test_an_unknown_verb_is_noticed() -> None:
    right = "`megatron-g2rpo train R`, megatron-g2rpo convert import A B, `megatron-g2rpo convert`"
    wrong = "megatron-g2rpo convert imports A, python -m megatron_g2rpo.cli trian R"
    assert list(unknown_verbs(f"{right}, {wrong}")) == ["convert imports", "trian"]


@pytest.mark.parametrize(("codes", "ends"), [("0", 0), ("75 0", 0), ("75 75 1 0", 1)])
def test_the_loop_around_torchrun_goes_on_when_stopped_and_ends_as_the_run_does(codes: str, ends: int) -> None:
    """With a command in torchrun's place that ends with one code after the other."""
    page = (ROOT / "docs" / "torchrun.md").read_text()
    (loop,) = re.findall(r"^    while :; do\n(?:    .*\n)+", page, re.MULTILINE)
    run = "python -m megatron_g2rpo.commands.torchrun ..."
    assert loop.count(run) == 1
    start = f"codes=({codes}) starts=0\nrun() {{ return ${{codes[starts++]}}; }}\ntrap 'echo $starts' EXIT\n"
    done = subprocess.run(["bash", "-c", start + loop.replace(run, "run")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (ends, "")
    assert int(done.stdout) == codes.split().index(str(ends)) + 1
