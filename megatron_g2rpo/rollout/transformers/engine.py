# SPDX-License-Identifier: Apache-2.0
"""The embedded default engine: Hugging Face transformers in the trainer's own process.

Each distinct prompt of a call is prefilled once, and each distinct image encoded once. The responses to a prompt share
its keys and values (``prefix_cache``); they are decoded together with those to other prompts, and as some finish others
enter (``batch``). Prefill and decoding take the model's parameters directly where the architecture is known
(``dense_forward``), else the model's forward pass (``model_forward``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from os import PathLike

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from megatron_g2rpo import models, progress
from megatron_g2rpo.models.directory import load_config
from megatron_g2rpo.models.images import Image
from megatron_g2rpo.models.vision_cache import VisionCache
from megatron_g2rpo.rollout import base
from megatron_g2rpo.rollout.stop_strings import Tail, read_response
from megatron_g2rpo.rollout.transformers.batch import Batch, Finished, Wanted
from megatron_g2rpo.rollout.transformers.call import Call, Response
from megatron_g2rpo.rollout.transformers.dense_forward import DenseForward
from megatron_g2rpo.rollout.transformers.features import Features
from megatron_g2rpo.rollout.transformers.model_forward import ATTENTION, ModelForward
from megatron_g2rpo.rollout.transformers.prefill import Prefill
from megatron_g2rpo.rollout.transformers.sampling import Draw, Drawing, uniforms
from megatron_g2rpo.types import Prompt, Rollout
from megatron_g2rpo.weights.hf_model import model_class


@base.register("transformers")
class TransformersEngine:
    """A transformers model, Qwen-VL or text-only, that samples groups of responses.

    Args:
        model: Hugging Face directory or configuration. Only the configuration is read: weights come by
            ``load_weights``.
        device: the device that holds the model.
        dtype: data type of the parameters; rotary tables stay float32.
        eos_token_ids: tokens that end a response.
        pad_token_id: token that pads the prompts of a batch to equal length; nothing attends to it.
        banned_token_ids: tokens that are never sampled: image and video placeholders, and the tokens around them.
        decode: function from token ids to text.
        max_new_tokens: number of response tokens after which a response is truncated.
        batch_size: largest number of responses that are decoded together.
        vision_cache: features of images under the weights that ``load_weights`` brings; None: there is none.

    Attributes:
        work: what the last call of ``generate`` computed, and saved.
    """

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedConfig,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        banned_token_ids: Sequence[int],
        decode: Callable[[Sequence[int]], str],
        max_new_tokens: int,
        batch_size: int,
        vision_cache: VisionCache | None = None,
    ) -> None:
        if max_new_tokens < 1 or batch_size < 1:
            raise ValueError(f"max_new_tokens ({max_new_tokens}) and batch_size ({batch_size}) must be at least 1")
        if not eos_token_ids or set(eos_token_ids) & set(banned_token_ids):
            raise ValueError(
                f"responses could not end: eos_token_ids {list(eos_token_ids)} must be non-empty and disjoint from "
                f"banned_token_ids {list(banned_token_ids)}"
            )
        self._device = torch.device(device)
        self._model = _empty_model(model, self._device, dtype)
        self._config = self._model.config
        vocab = self._config.get_text_config().vocab_size
        self._vision = getattr(self._config, "vision_config", None)
        outside = [i for i in (*eos_token_ids, pad_token_id, *banned_token_ids) if not 0 <= i < vocab]
        if outside:
            raise ValueError(f"special token ids {outside} lie outside the model's vocabulary of {vocab}")
        self._eos_ids = frozenset(eos_token_ids)
        self._eos = torch.tensor(list(eos_token_ids), device=self._device)
        banned = set(banned_token_ids)
        self._drawing = Drawing([i for i in range(vocab) if i in banned], vocab, self._device)
        self._decode_text = decode
        self._max_new_tokens = max_new_tokens
        self._batch_size = batch_size
        self._loaded = False
        axes = 1 if self._vision is None else 3
        suits = DenseForward.suits(self._model)
        self._forward = DenseForward(self._model) if suits else ModelForward(self._model, axes)
        self._prefill = Prefill(self._model, self._forward, self._device, pad_token_id)
        self._vision_cache, self._tower_version = vision_cache, -1
        self._encoded_patches = 0  # by the model's tower, or the policy's
        self.work = base.GenerationWork()

    @classmethod
    def build(cls, context: base.Context) -> TransformersEngine:
        generation = context.policy.generation
        return cls(
            context.policy.model_name,
            device=context.device,
            dtype=context.dtype,
            eos_token_ids=context.eos_token_ids,
            pad_token_id=context.pad_token_id,
            banned_token_ids=context.banned_token_ids,
            decode=context.decode,
            max_new_tokens=generation.max_new_tokens,
            batch_size=generation.batch_size,
            vision_cache=context.vision_cache,
        )

    def release(self) -> None:
        """Do nothing: the model is small beside the policy's optimizer, and a cache is freed with its batch."""

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy a stream of ``(Hugging Face checkpoint name, full tensor)`` into the model, in place.

        A tied output head may be left out, as checkpoints do; if it comes, it must equal the embedding.

        Raises:
            ValueError: a name is unknown, missing or given twice, or a shape differs. The engine then refuses to
                generate until a load succeeds, because its weights may be a mixture.
        """
        self._loaded = False
        slots = dict(self._model.named_parameters(remove_duplicate=False))
        received: set[str] = set()
        filled: dict[int, str] = {}
        for name, tensor in weights:
            slot = slots.get(name)
            if slot is None:
                raise ValueError(f"weight stream: {type(self._model).__name__} has no parameter {name!r}")
            if name in received:
                raise ValueError(f"weight stream: {name!r} was given twice")
            if tensor.shape != slot.shape:
                raise ValueError(
                    f"weight stream: {name!r} has shape {tuple(tensor.shape)}, the model expects {tuple(slot.shape)}"
                )
            twin = filled.setdefault(id(slot), name)
            if twin != name and not torch.equal(slot, tensor.to(slot)):
                raise ValueError(f"weight stream: {name!r} differs from {twin!r}, but this model ties the two")
            slot.copy_(tensor)
            received.add(name)
        missing = [name for name, _ in self._model.named_parameters() if name not in received]
        if missing:
            shown = ", ".join(missing[:5])
            raise ValueError(f"weight stream: {len(missing)} parameters were not given, among them {shown}")
        if self._vision_cache is not None:
            self._tower_version = self._vision_cache.version
        self._loaded = True

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        sampling: base.Sampling,
        seed: int,
        group_ids: Sequence[int],
        on_finished: base.OnFinished | None = None,
        and_greedily: bool = False,
    ) -> list[Rollout]:
        """Sample ``n`` responses to each prompt; see ``base.Engine.generate``.

        The random draws are named by ``(seed, prompt.key, sample_index, position)``: a prompt that occurs twice under
        one key gets the same responses twice. Greedy responses report log-probabilities at temperature 1.

        Raises:
            RuntimeError: no weights were loaded, or the model's logits are not finite (the prompt is named).
            ValueError: arguments out of range, or a prompt's placeholders do not match its images (it is named).
        """
        if not self._loaded:
            raise RuntimeError("the rollout engine has no complete set of weights: call load_weights first")
        base.check_request(prompts, n, group_ids)
        for prompt in prompts:
            self._check_prompt(prompt)
        call = Call(prompts, n, and_greedily=and_greedily)
        self._encoded_patches = 0
        batch = Batch(
            call.distinct,
            [self._wanted(call, number, sampling, seed) for number in call.order],
            self._prefill,
            Features(call.entering, self._encode),
            batch_size=self._batch_size,
            limit=self._max_new_tokens,
            device=self._device,
        )
        self._forward.refresh()
        rollouts: dict[Response, Rollout] = {}
        for finished in self._respond(batch, call, sampling):
            together = {call.responses[each.name]: self._rollout(each, call, sampling, group_ids) for each in finished}
            rollouts.update(together)
            if on_finished is not None:
                on_finished(list(together.values()))
        decoded = sum(len(rollout.response_ids) for rollout in rollouts.values())
        self.work = call.work(batch.prefilled_tokens, self._encoded_patches, decoded)
        return [rollouts[response] for response in call.responses]

    def _encode(self, images: Sequence[Image]) -> list[Tensor]:
        """Return the features of distinct images, ``[F, L, H]`` each, from the cache where it has them."""
        cache = self._vision_cache
        if cache is None:
            self._encoded_patches += sum(image.num_patches for image in images)
            return self._prefill.encode(images)
        before = cache.patches
        features = cache.features(
            images,
            self._prefill.encode,
            version=self._tower_version,
            dtype=self._model.dtype,
            device=self._device,
            keep_graphs=True,
        )
        self._encoded_patches += cache.patches - before
        return features

    def _check_prompt(self, prompt: Prompt) -> None:
        inputs = prompt.inputs
        patches = int(inputs.image_grid_thw.prod(-1).sum())
        if self._vision is None:
            if patches:
                raise ValueError(f"prompt {prompt.key!r} has images, but {type(self._model).__name__} reads text alone")
            return
        expected = patches // self._vision.spatial_merge_size**2
        placeholders = int((inputs.token_ids == self._config.image_token_id).sum())
        if len(inputs.token_ids) == 0 or placeholders != expected or len(inputs.pixel_values) != patches:
            raise ValueError(
                f"prompt {prompt.key!r}: its {len(inputs.token_ids)} tokens hold {placeholders} image placeholders "
                f"where its image grids ask for {expected}, and it has {len(inputs.pixel_values)} of {patches} patches"
            )

    def _wanted(self, call: Call, number: int, sampling: base.Sampling, seed: int) -> Wanted:
        response = call.responses[number]
        greedy = response.greedy or sampling.temperature == 0
        key = call.prompts[response.prompt].key
        uniform = None if greedy else partial(uniforms, seed, key, response.sample, self._max_new_tokens)
        return Wanted(call.place[response.prompt], number, uniform)

    def _rollout(self, finished: Finished, call: Call, sampling: base.Sampling, group_ids: Sequence[int]) -> Rollout:
        response = call.responses[finished.name]
        text, truncated = read_response(
            finished.tokens.tolist(),
            eos_token_ids=self._eos_ids,
            stop_strings=sampling.stop_strings,
            decode=self._decode_text,
        )
        return Rollout(
            prompt=call.prompts[response.prompt],
            group_id=group_ids[response.prompt],
            sample_index=response.sample,
            response_ids=finished.tokens,
            logprobs=finished.logprobs,
            text=text,
            truncated=truncated,
            kept_ids=pad_sequence(finished.kept, batch_first=True, padding_value=-1) if finished.kept else None,
        )

    def _respond(self, batch: Batch, call: Call, sampling: base.Sampling) -> Iterator[list[Finished]]:
        """Decode all responses; yield those that finished, as they leave the batch."""
        stops = sampling.stop_strings
        choice: list[Tensor | None] = []
        tails = {number: Tail(stops, self._decode_text) for number in call.order} if stops else {}
        while True:
            if batch.is_exchange_due:
                finished = batch.exchange()
                if finished:
                    yield finished
                if not len(batch):
                    return
                choice = [batch.indices(greedy=greedy) for greedy in (False, True)]
            logits = self._model.lm_head(batch.state.hidden)
            self._check_finite(logits, batch, call)
            drawn = self._draw(logits, batch, sampling, choice)
            ended = torch.isin(drawn.tokens, self._eos)
            if tails:
                ended |= self._stopped(batch, drawn.tokens, ended, tails)
            batch.record(drawn, ended)
            progress.advance()
            if batch.num_running:
                batch.follow(self._forward.step(drawn.tokens, batch.state.positions, batch.cache))

    def _draw(self, logits: Tensor, batch: Batch, sampling: base.Sampling, choice: Sequence[Tensor | None]) -> Draw:
        """Draw the next token of each response from ``logits [B, V]``.

        Args:
            logits: of what each may say next.
            batch: the responses.
            sampling: how the responses are sampled that are not greedy.
            choice: the rows of the sampled ones, and of the greedy ones; None for all rows.
        """
        sampled, greedy = choice
        if sampled is None:
            return self._drawing(logits, batch.numbers(), sampling)
        if greedy is None:
            return self._drawing(logits, None, sampling.greedily)
        parts = (
            self._drawing(logits[sampled], batch.numbers()[sampled], sampling),
            self._drawing(logits[greedy], None, sampling.greedily),
        )
        order = torch.cat([sampled, greedy]).argsort()
        tokens = torch.cat([part.tokens for part in parts])[order]
        return Draw(tokens, torch.cat([part.logprobs for part in parts])[order], None)

    def _stopped(self, batch: Batch, tokens: Tensor, ended: Tensor, tails: dict[int, Tail]) -> Tensor:
        """Return bool ``[B]``: which of the drawn ``tokens [B]``, no end tokens, complete a stop string."""
        going = (batch.state.running & ~ended).tolist()
        rows = zip(going, batch.wanted, tokens.tolist(), strict=True)
        return torch.tensor([on and tails[each.name].completes(token) for on, each, token in rows], device=self._device)

    def _check_finite(self, logits: Tensor, batch: Batch, call: Call) -> None:
        # A sum is finite if all its terms are, and one pass over them.
        finite = logits.sum(-1, dtype=torch.float32).isfinite()
        if not finite.all():
            row = int((~finite).nonzero()[0])
            response = call.responses[batch.wanted[row].name]
            raise RuntimeError(
                f"prompt {call.prompts[response.prompt].key!r}, sample {response.sample}, response token "
                f"{int(batch.state.ages[row])}: the model's logits are not finite; the weights have diverged or "
                "overflow in this dtype"
            )


def _empty_model(model: str | PathLike[str] | PreTrainedConfig, device: torch.device, dtype: torch.dtype):
    """Build the model with uninitialised parameters, in eval mode; buffers are computed, not read."""
    config = copy.deepcopy(model) if isinstance(model, PreTrainedConfig) else load_config(model)
    # Not `.to(dtype)`: that would also round the rotary tables, which the constructor keeps in fp32.
    with device, no_init_weights():
        built = model_class(config).from_config(
            config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=False
        )
        if getattr(built.config, "vision_config", None) is not None:
            # As the policy builds it: one tower, and one way to run it.
            vision = models.family(built.config.model_type).vision
            if vision is not None:
                built.model.visual = vision.tower(built.config, dtype)
    built.tie_weights()
    return built.eval().requires_grad_(False)
