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
        least: Tokens of a completion that complete no text: one counts if a later token is its last.

    Raises:
        ValueError: Without a tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str], least: int = 0) -> None:
        if tokenizer is None:
            raise ValueError("stop texts need the engine's tokenizer; give it to the engine, or use stop_token_ids")
        self._tokenizer = tokenizer
        self._texts = texts
        self._least = least
        self._hidden, _ = hidden_ids(tokenizer)
        # every other token holds a byte at least, so that a text ends within so many
        self._window = max(len(text.encode()) for text in texts) + _SLACK

    def completed(self, token_ids: list[int]) -> bool:
        """Whether a stop text ends in the last token.

        Args:
            token_ids: A completion that held none before its last token, but for those that do not count.
        """
        if len(token_ids) <= self._least:
            return False
        tail: list[int] = []
        for token in reversed(token_ids):
            if token not in self._hidden:
                tail.append(token)
            if len(tail) == self._window:
                break
        said = decode(self._tokenizer, tail[::-1])
        return any(words in said for words in self._texts) and self._held_by(token_ids)

    def cut(self, token_ids: list[int]) -> int | None:
        """Return how many tokens it takes to complete a stop text, or None where there is none.

        Args:
            token_ids: A completion.
        """
        if not self._held_by(token_ids):
            return None
        count = len(token_ids)
        while count > self._least + 1 and self._held_by(token_ids[: count - 1]):
            count -= 1
        return count

    def _held_by(self, token_ids: list[int]) -> bool:
        text, first = decode(self._tokenizer, token_ids), 0
        if self._least:
            # a character that is not whole yet is of the token that completes it
            first = len(decode(self._tokenizer, token_ids[: self._least]).rstrip("\ufffd"))
        return any(text.find(words, max(0, first - len(words) + 1)) >= 0 for words in self._texts)
