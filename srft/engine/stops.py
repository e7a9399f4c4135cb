"""Which token of a completion completes a text that ends it; the same for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from srft.data.templates import decode, hidden_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SLACK = 8  # tokens that may be pieces of one character at the start of a window


class StopTexts:
    """Looks for stop texts in the text of a completion, in which special tokens have no part.

    Args:
        tokenizer: The policy's; None if the engine has none.
        texts: At least one, none empty.

    Raises:
        ValueError: Without a tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str]) -> None:
        if tokenizer is None:
            raise ValueError("stop texts need the engine's tokenizer; give it to the engine, or use stop_token_ids")
        self._tokenizer = tokenizer
        self._texts = texts
        self._hidden, _ = hidden_ids(tokenizer)
        # every other token holds a byte at least, so that a text ends within so many
        self._window = max(len(text.encode()) for text in texts) + _SLACK

    def completed(self, token_ids: list[int]) -> bool:
        """Whether a stop text ends in the last token.

        Args:
            token_ids: A completion that held none before its last token.
        """
        tail: list[int] = []
        for token in reversed(token_ids):
            if token not in self._hidden:
                tail.append(token)
            if len(tail) == self._window:
                break
        return self._held_by(tail[::-1]) and self._held_by(token_ids)

    def cut(self, token_ids: list[int]) -> int | None:
        """Return how many tokens it takes to complete a stop text, or None where there is none.

        Args:
            token_ids: A completion.
        """
        if not self._held_by(token_ids):
            return None
        count = len(token_ids)
        while count > 1 and self._held_by(token_ids[: count - 1]):
            count -= 1
        return count

    def _held_by(self, token_ids: list[int]) -> bool:
        text = decode(self._tokenizer, token_ids)
        return any(words in text for words in self._texts)
