# SPDX-License-Identifier: Apache-2.0
"""What vLLM answers greedily from an exported directory that it has read itself.

    exported_worker.py RECIPE DIRECTORY OUT.json [key=value ...]

The weights come by vLLM's own loader; no stream, no reload. Prompts are those of the recipe's validation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.data.stream import validation_prompts
from megatron_g2rpo.rollout.vllm.engine import LLM, VllmEngine
from tests.vllm import common


class Reader(VllmEngine):
    """The engine, with the weights of its directory."""

    def __init__(self, context) -> None:
        original = LLM.__init__

        def read(llm, **arguments) -> None:
            original(llm, **{**arguments, "load_format": "auto"})

        LLM.__init__ = read
        super().__init__(context)
        LLM.__init__ = original
        self._loaded = True


def main() -> None:
    recipe, directory, out = map(Path, sys.argv[1:4])
    settings = recipes.load(recipe, [*sys.argv[4:], f"policy.model_name={directory}"], "train")
    processor = ChatProcessor(directory)
    index = ShardIndex(settings.data.validation.path, known_tasks=set(settings.env.tasks))
    prompts = validation_prompts(index, settings.grpo.max_val_samples, processor)
    vocabulary = json.loads((directory / "config.json").read_text())["text_config"]["vocab_size"]
    context = common.context(
        settings, eos_token_ids=[processor.eos_token_id], banned_token_ids=processor.banned_token_ids(vocabulary)
    )
    rollouts = common.generate(Reader(context), prompts, 1, temperature=0.0)
    out.write_text(json.dumps({r.prompt.key: r.response_ids.tolist() for r in rollouts}))


if __name__ == "__main__":
    main()
