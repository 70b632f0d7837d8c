# SPDX-License-Identifier: Apache-2.0
"""A policy as a megatron-core model: a ``GPTModel``, in vision-language families with transformers' vision tower.

The features of the tower replace the placeholder embeddings and, deepstack, are added after the first language layers.
Which feature belongs at which token is known on the whole row before any split; embeddings are merged on this rank's
context-parallel share, and sequence parallelism scatters what has been merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch import Tensor, nn

from megatron_g2rpo import models
from megatron_g2rpo.models.images import Image
from megatron_g2rpo.models.vision_cache import VisionCache
from megatron_g2rpo.policy.kernels import Kernels
from megatron_g2rpo.policy.layer_spec import block_spec
from megatron_g2rpo.policy.output_layer import LogprobOutputLayer
from megatron_g2rpo.policy.packed_row import packed_row_params
from megatron_g2rpo.policy.rotary import Rotation
from megatron_g2rpo.policy.vision import ImageFeatures, VisionEncoder, VisionWork
from megatron_g2rpo.types import PackedBatch
from megatron_g2rpo.weights.rules import padded_rows


class PolicyModel(MegatronModule):
    """One pipeline stage of the policy: the first has the embedding and the vision tower, the last the output layer.

    Args:
        config: the language model's configuration.
        hf_config: transformers' configuration from which ``config`` was made.
        pg_collection: megatron-core's process groups.
        device: the device that the model will be moved to.
        kernels: the kernels of its layers, see ``kernels.choose``.
        banned_token_ids: ids that the policy never samples; they take no probability.
        chunk_size: number of tokens whose float32 logits are held at once; None for all.
        vision_every_row: run the vision tower on rows without images too; see ``VisionEncoder``.
        vision_cache: features of images that were encoded before; see ``VisionEncoder``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hf_config: Any,
        pg_collection: ProcessGroupCollection,
        *,
        device: torch.device,
        kernels: Kernels,
        banned_token_ids: Sequence[int] = (),
        chunk_size: int | None = None,
        vision_every_row: bool = False,
        vision_cache: VisionCache | None = None,
    ) -> None:
        super().__init__(config=config)
        text = hf_config.get_text_config()
        family = models.family(hf_config.model_type)
        stage, stages = pg_collection.pp.rank(), pg_collection.pp.size()
        self.pg_collection = pg_collection
        self.pre_process, self.post_process = stage == 0, stage == stages - 1
        self.model_type = ModelType.encoder_or_decoder  # megatron-core's schedules ask for it
        self.share_embeddings_and_output_weights = bool(hf_config.tie_word_embeddings)
        self.vocab_size = text.vocab_size
        self._local_attention = kernels.attention == "local"
        self._rotates_in_attention = self._local_attention and kernels.rope == "torch"
        vision = family.vision if self.pre_process else None
        self.vision_model = None if vision is None else self._prepared(vision.tower(hf_config, config.params_dtype))
        layers = get_num_layers_to_build(config=config, vp_stage=None, pp_rank=stage)
        self.language_model = GPTModel(
            config=config,
            # Annotated as the spec of one layer; the block takes its submodules as well.
            transformer_layer_spec=block_spec(layers, kernels, qk_norm=bool(config.qk_layernorm)),  # pyright: ignore[reportArgumentType]
            vocab_size=padded_rows(text.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=text.max_position_embeddings,
            pre_process=self.pre_process,
            post_process=self.post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type="none",  # the angles are made here
            scatter_embedding_sequence_parallel=False,
            pg_collection=pg_collection,
        )
        self.rotary_pos_emb = family.angles(hf_config)
        if self.post_process:
            self.language_model.output_layer = LogprobOutputLayer.adopt(
                self.language_model.output_layer,
                vocab_size=text.vocab_size,
                banned_token_ids=banned_token_ids,
                chunk_size=chunk_size,
                tp_group=pg_collection.tp,
            )
        self._encode_images: VisionEncoder | None = None
        if vision is not None and self.vision_model is not None:
            self._encode_images = VisionEncoder(
                vision,
                self.vision_model,
                vision.geometry(hf_config),
                config.params_dtype,
                device,
                pg_collection.tp_cp,
                cache=vision_cache,
                every_row=vision_every_row,
                graph_bytes=partial(
                    vision.tower_bytes,
                    hf_config,
                    nbytes=config.params_dtype.itemsize,
                    recompute=config.recompute_granularity == "full",
                ),
            )

    def _prepared(self, tower: Any) -> nn.Module:
        """Set the vision tower's recomputation as the recipe says, and mark its gradients to be averaged."""
        if self.config.recompute_granularity == "full":
            tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for parameter in tower.parameters():
            # See policy.vision for why the average is the whole gradient.
            parameter.average_gradients_across_tp_domain = True
        return tower

    @property
    def vision_work(self) -> VisionWork:
        """What this rank's vision tower did so far; nothing where this stage has none."""
        return VisionWork() if self._encode_images is None else self._encode_images.work

    def encode_ahead(self, images: Sequence[Image]) -> None:
        """See ``VisionEncoder.encode_ahead``; on a stage without images it does nothing."""
        if self._encode_images is not None:
            self._encode_images.encode_ahead(images)

    def finish_vision_backward(self) -> None:
        """Take the gradients of kept image features through the tower, after the backward passes of all rows."""
        if self._encode_images is not None:
            self._encode_images.finish_backward()

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Return the tied weight, which megatron-core keeps equal on all pipeline stages that hold it."""
        return self.language_model.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: list[Tensor]) -> None:
        """Receive the previous stage's output; megatron-core passes a list of one."""
        self.language_model.set_input_tensor(input_tensor=input_tensor[0])

    def forward(self, batch: PackedBatch, temperature: float = 1.0) -> Tensor:
        """Compute log-probabilities and entropies of this rank's share of a packed row.

        Args:
            batch: the share, S tokens, on this rank's device (its images may be elsewhere).
            temperature: temperature of the policy's distribution.

        Returns:
            On the last stage float32 ``[2, S]``, the log-probability of ``labels`` and the entropy, equal on
            tensor-parallel peers; on other stages hidden states ``[S (/ tensor parallel under SP), 1, h]``.
        """
        cp = self.pg_collection.cp
        embeddings, context = self._embed(batch) if self.pre_process else (None, None)
        angles = self.rotary_pos_emb(batch.position_ids[:, None])
        row = packed_row_params(batch, cp.size(), cp.rank(), buckets=self._local_attention)
        if self._rotates_in_attention:
            row.rotation = Rotation.of(angles, self.config.params_dtype)
        hidden = self.language_model.decoder(
            hidden_states=embeddings,
            attention_mask=None,
            context=context,
            rotary_pos_emb=None if self._rotates_in_attention else angles,
            packed_seq_params=row,
        )
        if not self.post_process:
            return hidden
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.language_model.output_layer(
            hidden, batch.labels, weight=weight, temperature=temperature, kept_ids=batch.kept_ids
        )

    def _embed(self, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """Return embeddings ``[S, 1, h]`` with image features in place, and deepstack ``[K, S, 1, h]`` or None.

        Under sequence parallelism S is this tensor-parallel rank's share of the tokens.
        """
        features = None
        if self._encode_images is not None:
            # The tower first, in the order of registration: that in which overlap_param_gather fetches weights.
            features = self._encode_images(batch.pixel_values, batch.image_grid_thw)
        embeddings = self.language_model.embedding(input_ids=batch.tokens[None], position_ids=None).squeeze(1)
        if features is None:
            return self._scatter(embeddings).unsqueeze(1), None
        return self._merge(embeddings, features, batch.vision_index)

    def _merge(self, embeddings: Tensor, features: ImageFeatures, vision_index: Tensor) -> tuple[Tensor, Tensor | None]:
        where = (vision_index >= 0).nonzero().squeeze(1)
        index = vision_index[where]
        if len(index) and int(index.max()) >= len(features.places):
            raise ValueError(
                f"the row has an image placeholder for feature {int(index.max())}, but its images give only "
                f"{len(features.places)}"
            )
        # Done without image tokens too: the rank must stay in the graph, because its peers wait in the backward pass.
        chosen = features[index].to(embeddings.dtype)
        merged = embeddings.index_copy(0, where, chosen[:, 0])
        if chosen.shape[1] == 1:
            return self._scatter(merged).unsqueeze(1), None
        deepstack = embeddings.new_zeros(len(embeddings), *chosen[:, 1:].shape[1:]).index_copy_(0, where, chosen[:, 1:])
        return self._scatter(merged).unsqueeze(1), self._scatter(deepstack).transpose(0, 1).unsqueeze(2)

    def _scatter(self, x: Tensor) -> Tensor:
        """Under sequence parallelism, return this tensor-parallel rank's share of the tokens, the first axis."""
        if not self.config.sequence_parallel:
            return x
        share = scatter_to_sequence_parallel_region(input_=x, group=self.pg_collection.tp)
        # A view of x: what recomputation keeps of it would keep the whole row alive.
        return share.clone() if self.config.recompute_granularity == "full" else share
