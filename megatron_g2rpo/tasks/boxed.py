# SPDX-License-Identifier: Apache-2.0
r"""The text inside of ``\boxed{}``: response formats find an answer by it, and readers of answers take it off."""

from __future__ import annotations

import re

_BRACES = re.compile(r"\\boxed\{|\\.|\{|\}", re.DOTALL)


def find_boxed(text: str) -> str | None:
    r"""Return the text in the last complete ``\boxed{...}``, stripped; None if there is none.

    Braces inside it are matched, and escaped ones (``\{``) are not counted.
    """
    box = last_box(text)
    return text[box[0] + len("\\boxed{") : box[1]].strip() if box else None


def last_box(text: str) -> tuple[int, int] | None:
    """Return where the last complete box begins, and where its closing brace is; None if there is none.

    It makes one pass over the braces, because a degenerate text may repeat boxes many times.
    """
    last: tuple[int, int] | None = None
    unclosed: list[tuple[int, bool]] = []
    for token in _BRACES.finditer(text):
        if token[0].endswith("{") and not token[0].startswith("\\{"):
            unclosed.append((token.start(), token[0] != "{"))
        elif token[0] == "}" and unclosed:
            start, is_box = unclosed.pop()
            if is_box and (last is None or start > last[0]):
                last = (start, token.start())
    return last
