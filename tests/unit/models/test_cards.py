# SPDX-License-Identifier: Apache-2.0
"""Claim: a card is known by the name that CUDA gives it, and no other card is taken for it."""

from __future__ import annotations

import pytest

from megatron_g2rpo.models.cards import _PRODUCTS, CARDS, card_of


@pytest.mark.parametrize(
    ("product", "name"), [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 NVL", "h100-nvl")]
)
def test_products_are_found(product: str, name: str) -> None:
    assert card_of(product) is CARDS[name]


@pytest.mark.parametrize("product", [None, "", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA H200 (virtual)"])
def test_others_are_not_taken_for_them(product: str | None) -> None:
    assert card_of(product) is None


def test_every_card_has_a_product() -> None:
    assert set(_PRODUCTS.values()) == set(CARDS)
