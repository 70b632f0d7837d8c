# SPDX-License-Identifier: Apache-2.0
"""G2RPO's advantages in TRL's ``GRPOTrainer``: the objective as a library, in a trainer that is not ours.

What it replaces: the advantages. TRL centres the rewards of a group and divides them by their standard deviation; here
they are mapped to N(0, 1) by rank, within every group and then within every task, over all processes
(``gaussian_advantages``). What it does not replace: generation, the loss (``loss_type``, clipping, KL), its
normalisation and the optimizer are TRL's; there is no entropy shaping, and no length reward.

Use ``G2RPOTrainer`` where you used ``GRPOTrainer``, with a column ``task`` in the dataset; the rewards of a task may
then have any scale. The demonstration trains a random policy of 19,104 parameters on two tasks of unlike scales:

    pip install -c constraints/cpu.txt torch==2.13.0 -e '.[library]'
    python examples/library/trl_g2rpo.py [--steps 60]
    torchrun --nproc-per-node 2 examples/library/trl_g2rpo.py
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object  # pyright: ignore[reportMissingImports]  # of the extra `library`
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

from megatron_g2rpo.objective import gaussian_advantages
from megatron_g2rpo.tasks.answers.numbers import parse_number


class G2RPOTrainer(GRPOTrainer):
    """TRL's trainer with Gaussian advantages within every group and then within every task.

    ``scale_rewards`` has no effect. A row's task is what the dataset's column ``task`` says; without that column all
    rows are of one task.

    Raises:
        ValueError: ``multi_objective_aggregation`` is not the weighted sum of the rewards.
        ValueError: at a completion that every reward function returned None for.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "G2RPOTrainer ranks the weighted sum of the rewards: multi_objective_aggregation must be "
                f"'sum_then_normalize', got {self.multi_objective_aggregation!r}"
            )

    def _calculate_rewards(self, *args: Any, **keywords: Any) -> Tensor:
        """Keeps the rewards of all processes, ``[N, functions]``, for the advantages."""
        self._rewards = super()._calculate_rewards(*args, **keywords)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollouts of this process, with advantages of ours; called before they are shuffled and divided."""
        rollouts = super()._generate_and_score_completions(inputs)
        tasks = gather_object([str(row.get("task", "")) for row in inputs])
        advantages = self._advantages(tasks).to(rollouts["advantages"])
        start = self.accelerator.process_index * len(inputs)
        rollouts["advantages"] = advantages[start : start + len(inputs)]
        self._correct_log(advantages.tolist())
        return rollouts

    def _advantages(self, tasks: list[str]) -> Tensor:
        """Advantages of the rollouts of all processes, float64 ``[N]`` in TRL's order: the groups one after another."""
        rewards = self._rewards.double().cpu()
        weighted = (rewards * self.reward_weights.double().cpu()).nansum(dim=1)
        weighted[rewards.isnan().all(dim=1)] = torch.nan  # refused by name: it is no reward of 0
        size = self.num_generations if self.model.training else self.num_generations_eval
        ids = {task: index for index, task in enumerate(sorted(set(tasks)))}
        return gaussian_advantages(
            weighted,
            torch.arange(len(weighted)) // size,
            torch.tensor([ids[task] for task in tasks]),
        )

    def _correct_log(self, advantages: list[float]) -> None:
        """The table of completions shows the advantages that are used."""
        log = self._logs["advantages"]
        for _ in range(min(len(advantages), len(log))):
            log.pop()
        log.extend(advantages)


CHARACTERS = "0123456789+="


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, after padding (0) and end (1)."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<end>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def make_policy(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A random Qwen3 of two layers, float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def make_prompts() -> Dataset:
    """Sums of two digits as two tasks, in turn: ``near`` wants their value, ``even`` any even number."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    rows = [{"prompt": f"{a}+{b}=", "answer": a + b, "task": "even" if (a + b) % 2 else "near"} for a, b in pairs]
    return Dataset.from_list(rows)


def reward(completions: list[str], answer: list[int], task: list[str], **_: Any) -> list[float]:
    """0 or 1 for ``even``; minus the distance, from -99 to 0, for ``near``."""
    rewards = []
    for text, wanted, name in zip(completions, answer, task, strict=True):
        number = parse_number(text)
        if name == "even":
            rewards.append(float(number is not None and number % 2 == 0))
        else:
            rewards.append(-99.0 if number is None else -min(abs(number - wanted), 99.0))
    return rewards


def make_trainer(
    output: str,
    *,
    steps: int,
    seed: int = 0,
    kind: type[GRPOTrainer] = G2RPOTrainer,
    reward_function: Callable[..., list[Any]] = reward,
    **options: Any,
) -> GRPOTrainer:
    """The demonstration's trainer: 32 rollouts a step and process, eight to a prompt.

    Args:
        output: TRL's output directory; nothing is saved to it.
        steps: updates to make.
        seed: of the policy, the order of the prompts and the samples.
        kind: the trainer's class.
        reward_function: as TRL calls it.
        options: of ``GRPOConfig``.
    """
    tokenizer = make_tokenizer()
    config = GRPOConfig(
        output_dir=output, max_steps=steps, seed=seed, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        logging_steps=10, disable_tqdm=True, per_device_train_batch_size=16, gradient_accumulation_steps=2,
        num_generations=8, max_completion_length=3, learning_rate=1e-2, gradient_checkpointing=False,
        **options,
    )  # fmt: skip
    return kind(
        model=make_policy(tokenizer, seed), reward_funcs=reward_function, args=config, train_dataset=make_prompts(),
        processing_class=tokenizer,
    )  # fmt: skip


def main() -> None:
    """Train, printing TRL's log every ten steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as output:
        make_trainer(output, steps=arguments.steps).train()


if __name__ == "__main__":
    main()
