"""The text of a token, for people to read."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from fp16_patch.plan.errors import Fp16PatchError
from fp16_patch.untrusted.text import quoted

CONTROL_PICTURES = 0x2400
SPACE = "␣"

TextOf = Callable[[int], str]


class TokenizerError(Fp16PatchError):
    """Says why there are no texts."""


@lru_cache(maxsize=8)
def tokenizer_of(path: str | Path) -> TextOf:
    """Return what decodes the ids of the tokenizer, or of the model, at ``path``.

    Nothing is fetched from anywhere, and no code of the folder is run.

    Raises:
        TokenizerError: transformers is not installed, or finds no tokenizer there.
    """
    # Not Path.exists, which raises for a name that is too long.
    if not os.path.exists(path):  # noqa: PTH110
        raise TokenizerError(f"{quoted(path)}: no such file or directory")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise TokenizerError("transformers is not installed") from None
    try:
        # Without the last, transformers asks at the terminal, and a yes runs code of a folder that a record names.
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as problem:
        raise TokenizerError(f"no tokenizer in {quoted(path)}: {type(problem).__name__}") from problem
    return lambda token_id: visible(_decoded(tokenizer, token_id))


def _decoded(tokenizer: Any, token_id: int) -> str:
    try:
        text = str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
        piece = str(tokenizer.convert_ids_to_tokens(token_id))
    except (IndexError, KeyError, OverflowError, TypeError, ValueError):
        return ""
    # SentencePiece's decoder drops the space that a word begins with.
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text


def visible(text: str) -> str:
    """Put a sign in the place of whatever leaves no mark, or moves what is around it."""
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character == " ":
        return SPACE
    if ord(character) < 0x20:
        return chr(CONTROL_PICTURES + ord(character))
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")
