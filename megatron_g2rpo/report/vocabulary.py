# SPDX-License-Identifier: Apache-2.0
"""The text of each token of recorded responses, by the tokenizer of the run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from megatron_g2rpo.report.run_directory import RunDirectory

TOKENIZER_FILE = "tokenizer.json"


class Vocabulary:
    """Token ids to text. A token that is no whole character by itself is shown with U+FFFD in the place of its bytes.

    Args:
        run: the run; its tokenizer is looked for in its export, ``hf/``, and where ``policy.model_name`` says.

    Attributes:
        fault: why there is no tokenizer; empty where there is one.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.fault = ""
        self._tokenizer: Tokenizer | None = None
        path = _tokenizer_file(run)
        if path is None:
            self.fault = (
                f"no {TOKENIZER_FILE} in {run.path / 'hf'} or at policy.model_name "
                f"({run.setting('policy.model_name', 'not named')}): responses are shown as text, not token by token"
            )
            return
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 (tokenizers raises plain Exception)
            self.fault = f"{path} cannot be read ({error}): responses are shown as text, not token by token"

    def texts(self, ids: Iterable[int]) -> dict[int, str]:
        """Return the text of each of some token ids, special tokens included; empty where there is no tokenizer."""
        if self._tokenizer is None:
            return {}
        return {each: self._text(each) for each in sorted(set(ids))}

    def _text(self, token: int) -> str:
        assert self._tokenizer is not None
        # Alone, a token may lose its leading blank: it is decoded behind itself, and the first taken away.
        alone = self._tokenizer.decode([token], skip_special_tokens=False)
        doubled = self._tokenizer.decode([token, token], skip_special_tokens=False)
        text = doubled[len(alone) :] if doubled.startswith(alone) else alone
        return text or self._tokenizer.id_to_token(token) or f"[{token}]"


def _tokenizer_file(run: RunDirectory) -> Path | None:
    named = run.setting("policy.model_name")
    places = [run.path / "hf"]
    if isinstance(named, str):
        places += [Path(named), *(parent / named for parent in run.path.resolve().parents)]
    found = next((place / TOKENIZER_FILE for place in places if (place / TOKENIZER_FILE).is_file()), None)
    if found is None and isinstance(named, str):
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(named, TOKENIZER_FILE)
        except HFValidationError:
            return None
        found = Path(cached) if isinstance(cached, str) else None
    return found
