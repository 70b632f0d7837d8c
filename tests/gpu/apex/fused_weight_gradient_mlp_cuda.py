# SPDX-License-Identifier: Apache-2.0
"""The module of NVIDIA apex that ``gradient_accumulation_fusion`` needs, for processes with this folder on their path.

megatron-core's own column-parallel linear, the output layer under Transformer Engine's layers too, refuses the fusion
where the module cannot be imported.
"""

from tests.gpu.te_emulation.apex_wgrad import wgrad_gemm_accum

wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp16 = wgrad_gemm_accum
