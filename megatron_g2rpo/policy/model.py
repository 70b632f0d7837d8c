# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL (dense) as a megatron-core model: transformers' vision tower before a ``GPTModel``.

The tower is replicated over tensor-parallel ranks. Its features replace the placeholder embeddings and, deepstack, are
added after the first language layers. Features are merged on the whole row first; a split of the row (sequence or
context parallelism) comes after.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from megatron_g2rpo.nouns import PackedBatch
from megatron_g2rpo.policy.attention import packed_row_params
from megatron_g2rpo.policy.precision import local_block_spec
from megatron_g2rpo.policy.rope import InterleavedMRoPE
from megatron_g2rpo.weights.rules import padded_rows


class Qwen3VLPolicy(MegatronModule):
    """One pipeline stage of the policy.

    Args:
        config: the language model's configuration.
        hf_config: the ``Qwen3VLConfig`` it was made from.
        pg_collection: megatron-core's process groups.
        pre_process: this stage holds the embedding and the vision tower.
        post_process: this stage holds the output layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hf_config: Any,
        pg_collection: ProcessGroupCollection,
        pre_process: bool = True,
        post_process: bool = True,
    ) -> None:
        super().__init__(config=config)
        text = hf_config.text_config
        self.hf_config = hf_config
        self.pre_process, self.post_process = pre_process, post_process
        self.model_type = ModelType.encoder_or_decoder  # megatron-core's schedules ask for it
        self.share_embeddings_and_output_weights = bool(hf_config.tie_word_embeddings)
        self.vocab_size = text.vocab_size
        self.vision_model = self._vision_tower(hf_config.vision_config) if pre_process else None
        layers = get_num_layers_to_build(config=config, vp_stage=None, pp_rank=pg_collection.pp.rank())
        self.language_model = GPTModel(
            config=config,
            # Annotated as the spec of one layer; the block takes its submodules as well.
            transformer_layer_spec=local_block_spec(layers),  # pyright: ignore[reportArgumentType]
            vocab_size=padded_rows(text.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=text.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type="mrope",
            rotary_base=int(text.rope_parameters["rope_theta"]),
            scatter_embedding_sequence_parallel=False,
            pg_collection=pg_collection,
        )
        rope = text.rope_parameters
        self.language_model.rotary_pos_emb = InterleavedMRoPE(  # pyright: ignore[reportAttributeAccessIssue]
            text.head_dim, rope["rope_theta"], rope["mrope_section"]
        )

    def _vision_tower(self, vision_config: Any) -> nn.Module:
        # The dtype goes to the constructor: `.to(bfloat16)` would round the rotary frequencies as well, and turn by
        # 0.1 rad at position 60.
        tower = Qwen3VLVisionModel._from_config(
            vision_config, dtype=self.config.params_dtype, attn_implementation="sdpa"
        )
        for parameter in tower.parameters():
            # Replicas compute the same gradient; averaging keeps them equal bit for bit where kernels are not
            # deterministic.
            parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]
        return tower

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight, which megatron-core keeps in step over pipeline stages."""
        return self.language_model.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: list[Tensor]) -> None:
        """Receive the previous stage's output; megatron-core passes a list of one."""
        self.language_model.set_input_tensor(input_tensor=input_tensor[0])

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits of one packed row.

        Args:
            batch: the row, on this rank's device.

        Returns:
            ``[S, padded vocabulary / tensor parallel]`` in the model's dtype, this rank's share of the vocabulary
            (on a stage without output layer: hidden states ``[S, 1, h]``).
        """
        embeddings, context = self._embed(batch) if self.pre_process else (None, None)
        output = self.language_model(
            input_ids=batch.tokens[None],
            position_ids=batch.position_ids[:, None],
            attention_mask=None,
            decoder_input=embeddings,
            packed_seq_params=packed_row_params(batch.cu_seqlens),
            extra_block_kwargs={"context": context},
        )
        return output.squeeze(0) if self.post_process else output

    def _embed(self, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """Token embeddings with image features in place ``[S, 1, h]``, and deepstack features ``[K, S, 1, h]``."""
        embeddings = self.language_model.embedding(input_ids=batch.tokens[None], position_ids=None).squeeze(1)
        if batch.image_grid_thw.shape[0] == 0:
            return embeddings.unsqueeze(1), None
        assert self.vision_model is not None
        features = self.vision_model(
            batch.pixel_values.to(self.config.params_dtype), grid_thw=batch.image_grid_thw, return_dict=True
        )
        where = (batch.tokens == self.hf_config.image_token_id).nonzero().squeeze(1)
        available = features.pooler_output.shape[0]
        if where.numel() != batch.vision_index.numel() or int(batch.vision_index.max()) >= available:
            raise ValueError(
                f"the row has {where.numel()} image placeholders and {batch.vision_index.numel()} feature indices up "
                f"to {int(batch.vision_index.max())}, but its images give {available} features"
            )
        merged = embeddings.index_copy(0, where, features.pooler_output[batch.vision_index].to(embeddings.dtype))
        deepstack = [
            torch.zeros_like(embeddings).index_copy(0, where, level[batch.vision_index].to(embeddings.dtype))
            for level in features.deepstack_features
        ]
        return merged.unsqueeze(1), torch.stack(deepstack).unsqueeze(2) if deepstack else None
