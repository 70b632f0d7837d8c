# SPDX-License-Identifier: Apache-2.0
"""The Megatron policy: device, process groups, model, layer spec, log-probabilities, update step.

Importing it silences a few warnings that say nothing about a user's run, each by its message and by the module that
emits it: packages that megatron-core would use if they were installed (``megatron-g2rpo doctor`` reports them better),
and deprecations inside megatron-core and torch that only those projects can fix. pyproject.toml lists the same for
pytest.
"""

from __future__ import annotations

import warnings

# Start of the message, category, module that warns.
_OF_OTHERS = (
    ("Transformer Engine and Apex are not installed", UserWarning, "megatron.core"),
    ("Apex is not installed", UserWarning, "megatron.core.models"),
    ("full scope is deprecated", UserWarning, "megatron.core.transformer"),  # the default of its own config
    # Selective recomputation of attention is right for our own core attention; it warns whichever is used.
    ("If you are using transformer_engine as the transformer implementation", UserWarning, "megatron.core.transformer"),
    ("MLP requires ffn_hidden_size", DeprecationWarning, "megatron.core.transformer"),  # its layer leaves it out
    ("Warning: tp_group is None", DeprecationWarning, "megatron.core.tensor_parallel"),  # its row-parallel linear
    ("The following imports from `dynamic_context.py`", DeprecationWarning, "megatron.core.inference"),
    # Reading a distributed checkpoint. The second is attributed to the caller: on a CPU, to the device seam.
    ("`load_state_dict` is deprecated", FutureWarning, "megatron.core.dist_checkpointing"),
    ("Please use DTensor instead", FutureWarning, "(torch|megatron_g2rpo.policy.device)"),
    # Its distributed optimizer: names of collectives that torch 2.13 renamed, and a look at gradients of views.
    ("`torch.distributed.reduce_scatter_tensor` is deprecated", FutureWarning, "torch.distributed"),
    ("`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning, "torch.distributed"),
    ("The .grad attribute of a Tensor that is not a leaf", UserWarning, "megatron_g2rpo.policy.device"),
)

for _message, _category, _module in _OF_OTHERS:
    warnings.filterwarnings("ignore", message=_message, category=_category, module=_module)
