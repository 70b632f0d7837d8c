# SPDX-License-Identifier: Apache-2.0
"""Claim: on the first screen of docs/slurm.md the recipe reads what is imported, and has the cluster that is asked for.

What it starts is run by ``on_cluster``.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from megatron_g2rpo import recipe
from tests.slurm.conftest import ROOT

BLOCK = (ROOT / "docs" / "slurm.md").read_text().split("```bash\n", 1)[1].split("```", 1)[0]
NAME = "mine.yaml"


def words(containing: str) -> list[str]:
    """Return the words of the one command that has this in it."""
    (line,) = [line for line in BLOCK.splitlines() if containing in line]
    return shlex.split(re.sub(r"^JOB=\$\((.*)\)$", r"\1", line), comments=True)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_recipe_of_the_page_reads_what_the_page_has_written(tmp_path: Path) -> None:
    assert len(BLOCK.splitlines()) <= 40  # a screen
    imported, downloaded, job = words(" data import "), words("hf download"), words("$(sbatch ")
    (text,) = re.findall(rf"^cat > {NAME} <<'END'\n(.*?)^END$", BLOCK, re.MULTILINE | re.DOTALL)
    path = tmp_path / NAME
    path.write_text(text.replace("defaults: ", f"defaults: {ROOT}/"))
    loaded = recipe.load(path, [], "train")
    out = imported[imported.index("import") + 2]
    assert loaded.data.validation is not None
    assert (loaded.data.train.path, loaded.data.validation.path) == (f"{out}/train", f"{out}/val")
    assert "--split" in imported
    assert list(loaded.env.tasks) == [option(imported, "--task")]
    assert loaded.policy.model_name == option(downloaded, "--local-dir")
    asked = (f"--nodes={loaded.cluster.num_nodes}", f"--gres=gpu:{loaded.cluster.gpus_per_node}")
    assert set(asked) <= set(job)


def test_every_command_of_the_page_is_given_that_recipe() -> None:
    """Without overrides, which another of them could lack."""
    for part in (" plan ", " --dry-run", "DRYRUN=1", "$(sbatch "):
        given = [word for word in words(part) if word.endswith(".yaml") or "=" in word.lstrip("-")]
        assert [word for word in given if not word.startswith(("--", "DRYRUN"))] == [NAME]
