# SPDX-License-Identifier: Apache-2.0
"""Claims: an image is encoded once under one version of the weights, never mixed up, and no more is kept than allowed.

What policy and engine do with the cache: ``tests/unit/policy/test_vision_cache.py``.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_g2rpo.models import images as image_names
from megatron_g2rpo.models.images import Image, images_of
from megatron_g2rpo.models.vision_cache import VisionCache

CPU = torch.device("cpu")
LEVELS, HIDDEN, MERGE = 2, 3, 4
FEATURE_BYTES = LEVELS * HIDDEN * 4


@dataclass
class Tower:
    """Features that say which patches they are of, and under which weights; it notes what it is asked for."""

    weight: float = 1.0
    calls: list[int] = field(default_factory=list)

    def __call__(self, images: Sequence[Image]) -> Sequence[Tensor]:
        assert all(int(image.grid.prod()) == image.num_patches for image in images)
        self.calls.append(sum(image.num_patches for image in images))
        pixels = torch.cat([image.pixels for image in images])
        merged = pixels.unflatten(0, (-1, MERGE)).sum(dim=(1, 2))
        features = self.weight * merged[:, None, None].expand(-1, LEVELS, HIDDEN)
        return features.clone().split([image.num_patches // MERGE for image in images])


def images(*grids: tuple[int, int], seed: int = 0) -> list[Image]:
    generator = torch.Generator().manual_seed(seed)
    table = torch.tensor([(1, height, width) for height, width in grids])
    return images_of(torch.randn(int(table.prod(dim=1).sum()), 5, generator=generator), table)


def ask(cache: VisionCache, tower: Tower, of: Sequence[Image], **changes: Any) -> Tensor:
    given = {"version": cache.version, "dtype": torch.float32, "device": CPU, **changes}
    return torch.cat(cache.features(of, tower, **given))


def expected(tower: Tower, of: Sequence[Image]) -> Tensor:
    return torch.cat([features for image in of for features in Tower(tower.weight)([image])])


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_known_is_not_encoded_again(frozen: bool) -> None:
    cache, tower = VisionCache(10_000, frozen=frozen), Tower()
    one, two, three = images((2, 4), (4, 4), (2, 2))
    assert torch.allclose(ask(cache, tower, [one, two]), expected(tower, [one, two]))
    assert tower.calls == ([8, 16] if frozen else [24]), "a tower that does not learn sees images one by one"
    # In another order, beside one that is new, and twice.
    again = [three, two, one, two]
    assert torch.allclose(ask(cache, tower, again), expected(tower, again))
    assert tower.calls[-1] == 4
    assert sum(tower.calls) == cache.patches == 28
    assert cache.saved_patches == 16 + 8 + 16


def test_equal_images_are_encoded_once_in_a_call() -> None:
    cache, tower = VisionCache(10_000, frozen=False), Tower()
    (one,), (twin,) = images((2, 4)), images((2, 4))
    assert one.pixels is not twin.pixels
    both = ask(cache, tower, [one, twin])
    assert tower.calls == [8]
    assert torch.equal(both[:2], both[2:])


def test_another_image_of_the_same_grid_is_not_taken_for_it() -> None:
    cache, tower = VisionCache(10_000, frozen=False), Tower()
    (one,), (other,) = images((2, 4)), images((2, 4), seed=1)
    features = torch.cat([ask(cache, tower, [one]), ask(cache, tower, [other])])
    assert tower.calls == [8, 8]
    assert torch.allclose(features, expected(tower, [one, other]))
    assert not torch.allclose(features[:2], features[2:])


def test_the_same_patches_in_another_grid_are_another_image() -> None:
    """Rotary and position embeddings differ."""
    pixels = torch.arange(40.0).reshape(8, 5)
    wide, tall = images_of(pixels, torch.tensor([[1, 2, 4]])), images_of(pixels.clone(), torch.tensor([[1, 4, 2]]))
    assert wide[0].name != tall[0].name


def test_other_weights_encode_anew() -> None:
    cache, tower = VisionCache(10_000, frozen=False), Tower()
    (one,) = images((2, 4))
    ask(cache, tower, [one])
    tower.weight = 2.0
    assert not torch.allclose(ask(cache, tower, [one]), expected(tower, [one])), "nobody said that they changed"
    cache.weights_changed()
    assert cache.num_bytes == 0
    assert torch.allclose(ask(cache, tower, [one]), expected(tower, [one]))
    assert tower.calls == [8, 8]


def test_who_has_former_weights_neither_reads_nor_writes() -> None:
    """An engine that was not given the new weights yet."""
    cache, old, new = VisionCache(10_000, frozen=False), Tower(1.0), Tower(2.0)
    version = cache.version
    (one,) = images((2, 4))
    cache.weights_changed()
    assert torch.allclose(ask(cache, old, [one], version=version), expected(old, [one]))
    assert torch.allclose(ask(cache, new, [one]), expected(new, [one]))
    assert torch.allclose(ask(cache, old, [one], version=version), expected(old, [one]))
    assert (old.calls, new.calls) == ([8, 8], [8])


@pytest.mark.parametrize(("frozen", "calls"), [(False, [8, 8]), (True, [8])])
def test_a_step_begins_with_what_a_resumed_run_would_compute_too(frozen: bool, calls: list[int]) -> None:
    cache, tower = VisionCache(10_000, frozen=frozen), Tower()
    (one,) = images((2, 4))
    ask(cache, tower, [one])
    cache.begin_step()
    ask(cache, tower, [one])
    assert tower.calls == calls
    assert cache.version == 0, "the weights are the same: whoever has them may ask"


def test_another_dtype_is_another_feature() -> None:
    cache, tower = VisionCache(10_000, frozen=False), Tower()
    (one,) = images((2, 4))
    ask(cache, tower, [one])
    ask(cache, tower, [one], dtype=torch.bfloat16)
    assert tower.calls == [8, 8]


def test_the_least_recently_used_leave() -> None:
    one, two, three = images((2, 4), (2, 4), (2, 4))  # two features each
    cache, tower = VisionCache(2 * 2 * FEATURE_BYTES, frozen=True), Tower()
    ask(cache, tower, [one, two])
    ask(cache, tower, [one])  # now two is the oldest
    ask(cache, tower, [three])
    assert cache.num_bytes == 2 * 2 * FEATURE_BYTES
    tower.calls.clear()
    ask(cache, tower, [one, three])
    assert tower.calls == []
    ask(cache, tower, [two])
    assert tower.calls == [8]


def test_an_image_above_the_bound_is_encoded_and_not_kept() -> None:
    (small,), (large,) = images((2, 2)), images((4, 8))
    cache, tower = VisionCache(FEATURE_BYTES, frozen=False), Tower()
    ask(cache, tower, [small])
    assert torch.allclose(ask(cache, tower, [large]), expected(tower, [large]))
    assert cache.num_bytes == FEATURE_BYTES, "what was there stays"


def test_what_is_kept_is_a_copy() -> None:
    """A view would keep all that was encoded with it, and change with what it is a view of."""
    cache, tower = VisionCache(10_000, frozen=False), Tower()
    one, two = images((2, 4), (2, 4))
    encoded = cache.features([one, two], tower, version=0, dtype=torch.float32, device=CPU)
    encoded[0].zero_()
    (kept,) = cache.features([one], tower, version=0, dtype=torch.float32, device=CPU)
    assert torch.allclose(kept, expected(tower, [one]))
    assert kept.untyped_storage().nbytes() == 2 * FEATURE_BYTES


def test_an_image_is_digested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    digested: list[None] = []

    def sha256(*arguments: Any) -> Any:
        digested.append(None)
        return hashlib.sha256(*arguments)

    monkeypatch.setattr(image_names, "hashlib", type("H", (), {"sha256": staticmethod(sha256)}))
    pixels, grids = torch.randn(16, 5), torch.tensor([[1, 2, 4], [1, 4, 2]])
    first, second = images_of(pixels, grids), images_of(pixels, grids)
    assert [image.name for image in first] == [image.name for image in second]
    assert len(digested) == 2
    known = len(image_names._names)
    del pixels, first, second
    gc.collect()
    assert len(image_names._names) == known - 1, "they are forgotten with the image"
