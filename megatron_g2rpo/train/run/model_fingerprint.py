# SPDX-License-Identifier: Apache-2.0
"""What tells one model directory from another, wherever it lies: a job that is queued again may have staged it anew."""

from __future__ import annotations

import hashlib
from pathlib import Path

# What the tokens and the shape of the model depend on, whole.
WHOLE = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")
# Of the weights, of which there may be hundreds of GB: names, sizes, and pieces of this many bytes at the beginning,
# in the middle and at the end. Training moves every tensor, and hence some byte of every piece.
PIECE = 65536


def model_fingerprint(name: str) -> str | None:
    """Return 16 hex digits that are equal for copies of one model directory; None if ``name`` is no directory."""
    directory = Path(name)
    if not directory.is_dir():
        return None
    digest = hashlib.sha256()
    for path in (directory / each for each in WHOLE):
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in (0, size // 2, max(size - PIECE, 0)):
                file.seek(place)
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]
