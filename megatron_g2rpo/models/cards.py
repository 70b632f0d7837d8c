# SPDX-License-Identifier: Apache-2.0
"""GPUs by name: memory, arithmetic and links, from NVIDIA's data sheets; dense figures, of one GPU.

A data sheet's FLOP/s "with sparsity" are twice these, and its NVLink bandwidth counts both directions.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Card:
    """One kind of GPU.

    Attributes:
        memory: bytes; the nominal 10^9 ones, of which a card has some more.
        bf16: floating-point operations a second of bfloat16 matrix products.
        fp8: ... of FP8 matrix products; None for a card without.
        bandwidth: bytes a second that it reads from its memory.
        nvlink: bytes a second that it sends to the GPUs of its node.
    """

    memory: float
    bf16: float
    fp8: float | None
    bandwidth: float
    nvlink: float

    @property
    def fp32(self) -> float:
        """Floating-point operations a second of float32 products without TF32: a sixteenth of bfloat16's, or so."""
        return self.bf16 / 16


CARDS = {
    # A100 data sheet (June 2021), SXM: 312 TFLOPS BF16; 40 GB at 1,555 GB/s, 80 GB at 2,039 GB/s; NVLink 600 GB/s.
    "a100-40": Card(memory=40e9, bf16=312e12, fp8=None, bandwidth=1.555e12, nvlink=300e9),
    "a100": Card(memory=80e9, bf16=312e12, fp8=None, bandwidth=2.039e12, nvlink=300e9),
    # H100 data sheet: SXM 1,979 / 3,958 TFLOPS with sparsity, 80 GB at 3.35 TB/s, NVLink 900 GB/s; NVL 1,671 / 3,341
    # TFLOPS with sparsity, 94 GB at 3.9 TB/s, NVLink 600 GB/s (between the two of a pair).
    "h100": Card(memory=80e9, bf16=989.5e12, fp8=1979e12, bandwidth=3.35e12, nvlink=450e9),
    "h100-nvl": Card(memory=94e9, bf16=835.5e12, fp8=1670.5e12, bandwidth=3.9e12, nvlink=300e9),
    # H200 data sheet: the arithmetic of the H100 SXM; 141 GB at 4.8 TB/s; NVLink 900 GB/s.
    "h200": Card(memory=141e9, bf16=989.5e12, fp8=1979e12, bandwidth=4.8e12, nvlink=450e9),
    # DGX B200 data sheet, of eight: 36 / 72 PFLOPS with sparsity (BF16 / FP8), 1,440 GB at 64 TB/s, NVLink 1.8 TB/s.
    "b200": Card(memory=180e9, bf16=2250e12, fp8=4500e12, bandwidth=8e12, nvlink=900e9),
}

# Bytes a second that a GPU sends to other nodes: a 400 Gb/s adapter each, as in DGX H100 (eight ConnectX-7).
NETWORK = 50e9

# What CUDA calls a card -> its name above. Cards with another power limit or memory, such as PCI Express ones, are not
# among them: their arithmetic is another.
_PRODUCTS = {
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}


def card_of(product: str | None) -> Card | None:
    """Return the card that CUDA calls by this name; None where its figures are not known, or for no name."""
    return CARDS.get(_PRODUCTS.get(product or "", ""))
