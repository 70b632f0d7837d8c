# SPDX-License-Identifier: Apache-2.0
"""Stop strings: text that ends a response, wherever tokens begin and end in it.

One rule for all engines, when a response ends that of vLLM's detokenizer: with the token that completes a stop string.
Its tokens, that one included, are what is trained on. Its text, which rewards read, ends with the stop string as well:
where that is ``</answer>``, a response format needs it. What the last token says beyond it is no part of the text.

Text that ends in U+FFFD is not looked at: its last character may lack bytes, which the next token brings.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

_UNFINISHED = "\ufffd"
# Characters that the end of a response keeps beside those of a stop string: bytes and spaces that decoding alters where
# a text begins are then never part of one.
_MARGIN = 16


def until_stop(text: str, stop_strings: Collection[str]) -> str | None:
    """Return the text up to the end of the stop string that is completed first in it; None if it contains none."""
    if text.endswith(_UNFINISHED):
        return None
    ends = [start + len(stop) for stop in stop_strings if (start := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else None


def read_response(
    token_ids: Sequence[int],
    *,
    eos_token_ids: Collection[int],
    stop_strings: Collection[str],
    decode: Callable[[Sequence[int]], str],
) -> tuple[str, bool]:
    """Return the text of a response, and whether the token limit ended it.

    Args:
        token_ids: all tokens of the response, at least one.
        eos_token_ids: tokens that end a response; one in last place is no part of the text.
        stop_strings: text that ends a response.
        decode: function from token ids to text.
    """
    if token_ids[-1] in eos_token_ids:
        return decode(token_ids[:-1]), False
    text = decode(token_ids)
    stopped = until_stop(text, stop_strings)
    return (text, True) if stopped is None else (stopped, False)


class Tail:
    """The end of a response that is being decoded, long enough for a stop string that several tokens make up.

    Args:
        stop_strings: text that ends a response, at least one.
        decode: function from token ids to text.
    """

    def __init__(self, stop_strings: Collection[str], decode: Callable[[Sequence[int]], str]) -> None:
        self._stop_strings = stop_strings
        self._decode = decode
        self._kept = max(map(len, stop_strings)) + _MARGIN
        self._token_ids: list[int] = []

    def completes(self, token_id: int) -> bool:
        """Append a token; return whether it completes a stop string."""
        self._token_ids.append(token_id)
        text = self._decode(self._token_ids)
        if until_stop(text, self._stop_strings) is not None:
            return True
        half = self._token_ids[len(self._token_ids) // 2 :]
        if len(text) > 2 * self._kept and len(self._decode(half)) >= self._kept:
            self._token_ids = half
        return False
