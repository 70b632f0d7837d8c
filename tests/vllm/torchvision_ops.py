# SPDX-License-Identifier: Apache-2.0
"""Lets PyPI's torchvision import beside a CPU build of torch. For test environments alone; not part of the product.

PyPI's torchvision is built for CUDA. Beside a CPU torch its compiled operators do not load, and its Python part fails
with ``operator torchvision::nms does not exist`` when it registers shapes for them. vLLM and transformers' video
processors import it, and need none of these operators. So they are declared, without an implementation, just before
torchvision asks for them.

The Makefile copies this file into the site-packages of the vLLM test environment, with a ``.pth`` file that imports it
in every process: vLLM inspects models in a subprocess.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys

_ASKS = "torchvision._meta_registrations"
_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_SCHEMAS = ("nms" + _BOXES, "qnms" + _BOXES)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing; it declares the operators when the one module that asks for them is looked up."""

    declared = None

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == _ASKS and self.declared is None:
            from torch import library
            from torchvision.extension import _has_ops

            if not _has_ops():
                self.declared = library.Library("torchvision", "DEF")
                for schema in _SCHEMAS:
                    self.declared.define(schema)
        return None


sys.meta_path.insert(0, _Finder())
