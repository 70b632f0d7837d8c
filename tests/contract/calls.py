# SPDX-License-Identifier: Apache-2.0
"""What this package passes to megatron-core, by name, and what megatron-core hands on; read from our own source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "megatron_g2rpo"
LIBRARY = "megatron.core"

# Methods of objects that megatron-core gives us, and what we pass; calls by an imported name are found by `our_calls`.
_OPTIMIZERS = {
    f"{LIBRARY}.optimizer.optimizer.ChainedOptimizer.{method}": keywords
    for method, keywords in {
        "get_grad_norm": set(),
        "prepare_grads": set(),
        "reload_model_params": set(),
        "scale_loss": {"loss"},
        "step": set(),
        "zero_grad": set(),
    }.items()
}
TE_ATTENTION = f"{LIBRARY}.extensions.transformer_engine.TEDotProductAttention"
METHODS: dict[str, set[str]] = {
    **_OPTIMIZERS,
    f"{LIBRARY}.optimizer_param_scheduler.OptimizerParamScheduler.load_state_dict": {"state_dict"},
    f"{LIBRARY}.optimizer_param_scheduler.OptimizerParamScheduler.state_dict": set(),
    f"{LIBRARY}.optimizer_param_scheduler.OptimizerParamScheduler.step": {"increment"},
    # Without its decorator, in a thread: ``train.run.checkpoint_writing``.
    f"{LIBRARY}.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync.write_preloaded_data": {
        "transform_list",
        "local_proc_idx",
        "write_bucket",
        "results_queue",
        "count_queue",
        "use_fsync",
    },
    f"{LIBRARY}.distributed.DistributedDataParallel.no_sync": set(),
    f"{LIBRARY}.distributed.DistributedDataParallel.start_grad_sync": set(),
    f"{LIBRARY}.distributed.DistributedDataParallel.start_param_sync": {"force_sync"},
    f"{LIBRARY}.distributed.DistributedDataParallel.zero_grad_buffer": set(),
    f"{LIBRARY}.transformer.MegatronModule": {"config"},
    f"{LIBRARY}.transformer.MegatronModule.sharded_state_dict": set(),
    f"{LIBRARY}.models.common.embeddings.language_model_embedding.LanguageModelEmbedding.forward": {
        "input_ids",
        "position_ids",
    },
    f"{LIBRARY}.models.gpt.GPTModel.set_input_tensor": {"input_tensor"},
    f"{LIBRARY}.models.gpt.GPTModel.shared_embedding_or_output_weight": set(),
    f"{LIBRARY}.transformer.transformer_block.TransformerBlock.forward": {
        "hidden_states",
        "attention_mask",
        "context",
        "rotary_pos_emb",
        "packed_seq_params",
    },
    f"{LIBRARY}.transformer.transformer_layer.TransformerLayer.forward": {"context"},
    # By its subclass, ``LogprobOutputLayer``.
    f"{LIBRARY}.tensor_parallel.ColumnParallelLinear": {
        "input_size",
        "output_size",
        "config",
        "init_method",
        "bias",
        "skip_weight_param_allocation",
        "tp_group",
    },
    # What megatron-core's attention passes to its core attention, handed on by ours.
    TE_ATTENTION: {
        "config",
        "layer_number",
        "attn_mask_type",
        "attention_type",
        "cp_comm_type",
        "softmax_scale",
        "pg_collection",
    },
    f"{TE_ATTENTION}.forward": {"query", "key", "value", "attention_mask", "attn_mask_type", "packed_seq_params"},
}
# What a call returns, where we call the result at once: whichever schedule it is.
_RESULTS = {
    f"{LIBRARY}.pipeline_parallel.get_forward_backward_func": tuple(
        f"{LIBRARY}.pipeline_parallel.schedules.{schedule}"
        for schedule in ("forward_backward_no_pipelining", "forward_backward_pipelining_without_interleaving")
    )
}
# Where megatron-core calls something of ours, or hands on what is ours: (its function, what it calls there).
CORE_ATTENTION_BUILT = (f"{LIBRARY}.transformer.attention.Attention.__init__", "submodules.core_attention")
CORE_ATTENTION_CALLED = (f"{LIBRARY}.transformer.attention.Attention.forward", "apply_module(self.core_attention)")
TE_ATTENTION_BUILT = (f"{TE_ATTENTION}.__init__", "super().__init__")
TE_ATTENTION_CALLED = (f"{TE_ATTENTION}.forward", "super().forward")
# The chain's step asks the object itself for the norm that it clips by: ``policy.optimizer.step_by_norm``.
GRAD_NORM_ASKED = (f"{LIBRARY}.optimizer.optimizer.ChainedOptimizer.step", "self.get_grad_norm")
CLIPPED_BY = (f"{LIBRARY}.optimizer.optimizer.ChainedOptimizer.step", "clip_grad_by_total_norm_fp32")
THEIR_CALLS = (
    CORE_ATTENTION_BUILT,
    CORE_ATTENTION_CALLED,
    TE_ATTENTION_BUILT,
    TE_ATTENTION_CALLED,
    GRAD_NORM_ASKED,
    CLIPPED_BY,
)
PACKED = f"{LIBRARY}.packed_seq_params.PackedSeqParams"
# What a layer's spec puts where: (megatron-core's function that builds it, the place, the class of Transformer Engine's
# layers), see ``policy.layer_spec``.
_EXTENSIONS = f"{LIBRARY}.extensions.transformer_engine"
TE_COLUMN, TE_ROW, TE_NORM = (
    f"{_EXTENSIONS}.{name}" for name in ("TELayerNormColumnParallelLinear", "TERowParallelLinear", "TENorm")
)
_SELF_ATTENTION = f"{LIBRARY}.transformer.attention.SelfAttention.__init__"
SPEC_PLACES = (
    (_SELF_ATTENTION, "submodules.linear_qkv", TE_COLUMN),
    (_SELF_ATTENTION, "submodules.q_layernorm", TE_NORM),
    (_SELF_ATTENTION, "submodules.k_layernorm", TE_NORM),
    (f"{LIBRARY}.transformer.attention.Attention.__init__", "submodules.linear_proj", TE_ROW),
    (f"{LIBRARY}.transformer.mlp.MLP.__init__", "submodules.linear_fc1", TE_COLUMN),
    (f"{LIBRARY}.transformer.mlp.MLP.__init__", "submodules.linear_fc2", TE_ROW),
    (f"{LIBRARY}.transformer.transformer_block.TransformerBlock._build_layers", "self.submodules.layer_norm", TE_NORM),
)
# Of Transformer Engine.
DOT_PRODUCT_ATTENTION = (
    "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention.DotProductAttention"
)
# Classes of megatron-core that hand on to one of its: what, and to which.
TE_LAYERS = {
    TE_COLUMN: "transformer_engine.pytorch.module.layernorm_linear.LayerNormLinear",
    f"{_EXTENSIONS}.TELinear": "transformer_engine.pytorch.module.linear.Linear",
}


@dataclass
class Call:
    """How this package calls one name of megatron-core.

    Attributes:
        keywords: over all places.
        positional: places ``file:line`` that pass an argument by position.
    """

    keywords: set[str] = field(default_factory=set)
    positional: list[str] = field(default_factory=list)


def our_calls(package: Path = PACKAGE) -> dict[str, Call]:
    """Dotted name in megatron-core -> how it is called, over all files of the package."""
    calls: dict[str, Call] = {}
    for file in sorted(package.rglob("*.py")):
        tree = ast.parse(file.read_text())
        names = dict(_imports(tree))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            for target in _targets(node.func, names):
                call = calls.setdefault(target, Call())
                call.keywords |= keywords_of(node)
                if node.args:
                    call.positional.append(f"{file.relative_to(package.parent)}:{node.lineno}")
    return calls


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(LIBRARY):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _targets(function: ast.expr, names: dict[str, str]) -> tuple[str, ...]:
    if isinstance(function, ast.Name):
        return (names[function.id],) if function.id in names else ()
    if isinstance(function, ast.Attribute) and not isinstance(function.value, ast.Call):
        return tuple(f"{owner}.{function.attr}" for owner in _targets(function.value, names))
    if isinstance(function, ast.Call):
        return tuple(result for of in _targets(function.func, names) for result in _RESULTS.get(of, ()))
    return ()


def keywords_of(call: ast.Call) -> set[str]:
    """Return the keywords that a call spells out."""
    return {keyword.arg for keyword in call.keywords if keyword.arg is not None}
