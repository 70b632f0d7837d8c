# SPDX-License-Identifier: Apache-2.0
"""Reads the tokenizer and the chat template of a model directory, and which tokens end a response.

A directory's code (``auto_map``) is never run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.weights.model_files import GENERATION, PROCESSOR, TOKENIZERS, has_tokenizer, read_json


def load_tokenizer(model_dir: Path) -> Any:
    """Return the directory's tokenizer.

    Raises:
        DataError: the directory has no tokenizer, or one that cannot be read.
    """
    if not has_tokenizer(model_dir):  # transformers would make an empty one for some families
        raise DataError(
            f"{model_dir} has no tokenizer (none of {', '.join(TOKENIZERS)}): copy tokenizer.json, "
            "tokenizer_config.json and chat_template.jinja from the model that this one was made of"
        )
    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise DataError(f"{model_dir}: the tokenizer cannot be read ({error})") from error


def load_chat_template(model_dir: Path, tokenizer: Any) -> str:
    """Return the chat template, the one named ``default`` where there are several.

    It is looked for in ``chat_template.jinja``, ``chat_template.json``, ``processor_config.json``, and in the
    tokenizer, whose template may lie in ``tokenizer_config.json`` as text or as a list of named ones.

    Raises:
        DataError: there is no template, or there are several and none is the default.
    """
    jinja, as_json, processor = (model_dir / f for f in ("chat_template.jinja", "chat_template.json", PROCESSOR))
    found: list[Any] = []
    if jinja.is_file():
        found.append(jinja.read_text())
    try:
        found += [read_json(file).get("chat_template") for file in (as_json, processor) if file.is_file()]
    except ValueError as error:
        raise DataError(str(error)) from error
    template = next((each for each in [*found, tokenizer.chat_template] if each), None)
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(sorted(template))
            raise DataError(f"{model_dir}: none of its chat templates ({names}) is named default; name one so")
        template = template["default"]
    if isinstance(template, str):
        return template
    raise DataError(
        f"{model_dir} has no chat template (chat_template.jinja): copy one from the model's chat version; a base model "
        "has none of its own"
    )


def named_eos_tokens(model_dir: Path) -> list[int]:
    """Return the ids that ``generation_config.json`` names as ends of a response; none if there is no such file.

    Raises:
        DataError: the file is not JSON, or names something else than ids.
    """
    path = model_dir / GENERATION
    try:
        named = read_json(path).get("eos_token_id") if path.is_file() else None
    except ValueError as error:
        raise DataError(str(error)) from error
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in ids):
        raise DataError(f"{path}: eos_token_id is {json.dumps(named)}, not a token's id or a list of them")
    return ids


def turn_end(tokenizer: Any, answered: str, answer: str, header: str) -> int | None:
    """Return the special token with which a chat template ends an assistant's turn; None if it writes none.

    Args:
        tokenizer: the tokenizer.
        answered: what the template makes of a chat whose last turn is the assistant's.
        answer: that turn's text.
        header: what the template writes before an answer; its tokens begin a turn and cannot end one.
    """
    _, _, after = answered.rpartition(answer)
    ids: Sequence[int] = tokenizer(after, add_special_tokens=False)["input_ids"]
    if not ids or not tokenizer.added_tokens_decoder.get(ids[0], None):
        return None
    special = tokenizer.added_tokens_decoder[ids[0]].special
    return ids[0] if special and ids[0] not in tokenizer(header, add_special_tokens=False)["input_ids"] else None
