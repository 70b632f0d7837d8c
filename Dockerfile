# SPDX-License-Identifier: Apache-2.0
#
# Two images on NVIDIA's PyTorch image. NEITHER WAS BUILT by the authors, who had no GPU: docs/install-gpu.md.
#
#   docker build -t g2rpo .                               # the lock, with vLLM
#   docker build -t g2rpo:image --target image .          # NVIDIA's own builds, without vLLM
#   docker run --rm --gpus all --ipc host g2rpo megatron-g2rpo doctor
#
# 26.07 is Ubuntu 24.04, Python 3.12, CUDA 13.3, torch 2.13.0a0, Transformer Engine 2.17, NVIDIA apex and flash-attn,
# compiled against each other. Rollouts need vLLM 0.32, whose wheel needs torch 2.13.0 itself. So the first image takes
# the compilers, CUDA's headers and the network libraries of 26.07 and installs constraints/gpu.txt beside its Python, in
# an environment that sees none of its packages; the second keeps 26.07's torch and has no vLLM.
FROM nvcr.io/nvidia/pytorch:26.07-py3 AS base

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# The constraints of 26.07 pin all of its packages, pydantic and rich among them; ours are named in each command.
ENV PIP_CONSTRAINT="" PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 MEGATRON_G2RPO_BUILD_EXT=1
WORKDIR /opt/megatron-g2rpo


# What was compiled stays: it becomes the constraints of what is added. torch 2.13.0a0 comes before 2.13.0, which this
# package's requirement would not take, so the package is installed without its requirements, and these by name.
FROM base AS image

RUN pip list --format=freeze \
    | grep -iE '^(torch|triton|pytorch-triton|numpy|scipy|transformer[_-]engine|apex|flash[_-]attn|nvidia-)' \
    > /tmp/held.txt; grep -iE '^(torch|transformer[_-]engine|apex)==' /tmp/held.txt
COPY pyproject.toml ./
COPY docker ./docker
COPY constraints ./constraints
RUN python docker/requirements.py /tmp/held.txt > /tmp/requirements.txt \
    && pip install -c /tmp/held.txt -r /tmp/requirements.txt
COPY . .
RUN pip install --no-deps --no-build-isolation -e . \
    && pip list --format=freeze | grep -Fxf /tmp/held.txt | sort | diff - <(sort /tmp/held.txt)


FROM base AS locked

ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN python -m venv /opt/venv
COPY constraints/gpu.txt ./constraints/gpu.txt
# The large wheels in a layer of their own, which a change of this package leaves as it is. Transformer Engine's PyTorch
# part is compiled against the torch before it: 33 C++ files, no kernels.
RUN pip install -c constraints/gpu.txt torch==2.13.0 vllm==0.32.0 "transformer-engine[core_cu13]==2.20.2" \
    einops ninja nvdlfw-inspect nvidia-cudnn-frontend onnx onnxscript pybind11 setuptools wheel
RUN NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_WITH_NCCL_EP=0 CPATH=/usr/local/cuda/include \
    pip install -c constraints/gpu.txt --no-build-isolation --no-deps transformer-engine-torch==2.20.2
COPY . .
RUN pip install -c constraints/gpu.txt --no-build-isolation -e '.[vllm,te,report]' \
    && python -c "import torch; assert torch.__version__.split('+')[0] == '2.13.0', torch.__version__"
