"""What the trainer asks of a rollout engine: sample, take new weights, score a fixed probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        temperature: Divides the logits before softmax; 0 takes the most likely token. >= 0.
        max_new_tokens: Tokens after which a completion is cut, > 0.
        stop_token_ids: Any of these ends a completion and stays in it as its last token.
        stop: A completion ends with the token that completes any of these in its text, which stays in it whole, with
            whatever else that token holds. Special tokens are no part of the text.
        min_new_tokens: Tokens that a completion has before one of the above may end it, at most ``max_new_tokens``:
            so many are drawn from all tokens but ``stop_token_ids``, and a text that these complete ends nothing.
    """

    temperature: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt.

    Args:
        token_ids: Sampled tokens, the one that ended it included when ``finish`` is "stop".
        logprobs: Natural-log probability of each token under the distribution it was drawn from, i.e.
            softmax(logits / temperature); for greedy sampling, of softmax(logits). Among the first
            ``Sampling.min_new_tokens`` the end tokens have no part in the softmax, so that the policy's own
            log-probability is lower by -log(1 - p(end)) and a ratio of the two smaller than 1.
        finish: "stop" when a stop token was drawn or a stop text completed, "length" when the limit cut it.
        version: The weight version that produced it.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]
    version: int


Ended = Callable[[int, int, list[int]], None]
"""Told, while others are sampled, of a completion that has ended: sample k of prompt p, its tokens. From any thread; of
some perhaps never, or again with other tokens where an engine was lost: what ``generate`` returns is what counts."""


class EngineError(RuntimeError):
    """The engine's process failed; the message quotes the end of its log."""


class EngineLost(EngineError):
    """The engine's process died, or hung and was killed: another one can be started and do what it did not."""


class Engine(Protocol):
    """A source of completions that can be given new weights; ``version`` counts them."""

    version: int
    restarts: int
    """How often it was started again since the run began or was resumed, on all ranks together."""

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[list[int]], ended: Ended | None = None
    ) -> list[list[Completion]]:
        """Draw completions, ``len(seeds[p])`` of prompt ``p``, sample ``k`` from ``seeds[p][k]`` alone.

        Args:
            prompts: Token ids, at least one each.
            sampling: How to draw.
            seeds: In [0, 2**63).
            ended: Told of completions as they end; None: nobody is.
        """

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights and drop every cache made with the old ones.

        Args:
            named_tensors: Every weight, named as in the checkpoint.
            version: Carried by every later completion.
        """

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return log p(token t | tokens before t) for t = 1 .. len-1, at temperature 1.

        Args:
            sequences: At least two tokens each.
        """

    def sleep(self) -> None:
        """Give back the memory of training's GPU until the next update, where the engine can and is to."""

    def close(self) -> None:
        """Release the engine; safe to call twice."""
