# SPDX-License-Identifier: Apache-2.0
"""What the batch scripts need to know of a recipe, printed as assignments of a shell.

    python - RECIPE STAGE_DIR [key=value ...] < slurm/recipe_facts.py

STAGE_DIR is the node-local folder that the data is copied to; empty: it is read where it is. Printed are ``verb``
(train or sft), ``num_nodes``, ``gpus_per_node``, ``engine_size`` (GPUs of one rollout engine), ``finished`` (1 if a run
has taken its last step and written what it writes), and, with STAGE_DIR, the arrays ``staged`` (source, target, source,
target ...) and ``stage_overrides``.

Exit code 1, and a message, if the recipe cannot be used.
"""

import json
import re
import shlex
import sys
from pathlib import Path

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.recipe.layers import load_layers


def verb_of(path: Path, overrides: list[str]) -> str:
    """Return which loop a recipe is for, by its sections."""
    tree = load_layers(path, overrides).tree
    return "sft" if "sft" in tree and "grpo" not in tree else "train"


def is_finished(recipe: recipes.Recipe) -> bool:
    """Return whether the run has saved its last step and, if it exports its policy, has done that."""
    loop = recipe.grpo if isinstance(recipe, recipes.TrainRecipe) else recipe.sft
    steps = [
        int(path.name.removeprefix("step_"))
        for path in Path(recipe.checkpointing.checkpoint_dir).glob("step_*")
        if re.fullmatch(r"step_\d+", path.name)
    ]
    exported = not recipe.checkpointing.export_hf or (Path(recipe.logger.log_dir) / "hf").is_dir()
    return bool(steps) and max(steps) >= loop.max_num_steps and exported


def staged(recipe: recipes.Recipe, folder: Path) -> tuple[list[str], list[str]]:
    """Return what is copied where, as a flat list, and the overrides that make the copies the recipe's data."""
    copies: list[str] = []
    overrides: list[str] = []
    for name, source in (("train", recipe.data.train), ("validation", recipe.data.validation)):
        if source is None:
            continue
        entries = []
        for number, part in enumerate(source.parts):
            path = Path(part.path)
            # A glob names some shards of a folder; the index that lies beside them belongs to all of them.
            pattern = "" if path.is_dir() else path.name
            target = folder / name / str(number)
            copies += [str(path if path.is_dir() else path.parent), str(target)]
            entries.append({"path": str(target / pattern), "weight": part.weight})
        value = json.dumps(entries[0]["path"] if isinstance(source.path, str) else entries)
        overrides.append(f"data.{name}.path={value}")
    return copies, overrides


def main() -> None:
    """Print the facts."""
    path, stage_dir, *overrides = sys.argv[1:]
    try:
        verb = verb_of(Path(path), overrides)
        recipe = recipes.load(path, overrides, verb)  # type: ignore[call-overload]
    except recipes.RecipeError as error:
        sys.exit(str(error))
    facts = {
        "verb": verb,
        "num_nodes": recipe.cluster.num_nodes,
        "gpus_per_node": recipe.cluster.gpus_per_node,
        "engine_size": recipe.policy.generation.vllm_cfg.tensor_parallel_size,
        "finished": int(is_finished(recipe)),
    }
    for name, value in facts.items():
        print(f"{name}={shlex.quote(str(value))}")
    if stage_dir:
        for name, values in zip(("staged", "stage_overrides"), staged(recipe, Path(stage_dir)), strict=True):
            print(f"{name}=({shlex.join(values)})")


main()
