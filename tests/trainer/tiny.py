"""What the trainer's tests share: tiny models with far from flat distributions, groups, configurations, fakes."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterable

import torch
import transformers
from torch import Tensor

from srft.batch import Batch, pack
from srft.config import Config
from srft.data.examples import Example
from srft.data.prompts import Prompt
from srft.engine.base import Completion, Ended, Sampling
from srft.options import load_config
from srft.policy.learner import Learner
from srft.policy.model import byte_tokenizer, compute, prepare_policy
from srft.policy.parallel import ALONE
from srft.responses import Group, Response
from srft.rewards.pool import RewardResult

VOCAB = 37
CPU = torch.device("cpu")
SIZES = ["data.max_prompt_tokens=8", "rollout.max_new_tokens=12", "train.prompts_per_step=10"]


def tiny_config(*overrides: str) -> Config:
    """A configuration whose sequences are as short as those of ``random_groups``, with no gradient clipping."""
    return load_config([*SIZES, "train.grad_clip=1e9", *overrides])


def plain_model(
    *, tied: bool = False, kv_heads: int = 2, seed: int = 0, vocab: int = VOCAB
) -> transformers.PreTrainedModel:
    """A two-layer Qwen2 as transformers builds it, fp32, weights and biases large enough to tell apart."""
    config = transformers.Qwen2Config(
        vocab_size=vocab,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen2ForCausalLM(config).float().eval()
        for name, parameter in model.named_parameters():
            # Qwen2 starts its biases at 0 and its norms at 1, which would hide one that is ignored
            if name.endswith("bias") or "norm" in name:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def policy(
    model: transformers.PreTrainedModel, *overrides: str, max_tokens: int = 64
) -> transformers.PreTrainedModel:
    """A copy of ``model``, prepared as the trainer does it."""
    return prepare_policy(copy.deepcopy(model), tiny_config(*overrides).model, max_tokens, ALONE)


def hidden_states_of(model: transformers.PreTrainedModel, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """[N, D] hidden states of a policy at the rows that predict a counted token."""
    return compute(model, batch, dtype, lambda hidden_states, _weight, **_options: hidden_states)[0]


def learner_of(
    config: Config, model: transformers.PreTrainedModel, optimizer: torch.optim.Optimizer
) -> Learner:
    """What an update takes; its tokenizer, which only a checkpoint needs, is one of bytes."""
    return Learner(config, model, byte_tokenizer(), optimizer)


def sequence(
    prompt: list[int], response: list[int], *, is_demo: bool = False, reward: float = 0.0
) -> Response:
    """A sequence with a text that names its tokens."""
    logprobs = [] if is_demo else [-0.1 * (i + 1) for i in range(len(response))]
    return Response(prompt, response, is_demo, False, logprobs, text=str(response), reward=reward)


def example(number: int, answer: str = "7") -> Example:
    """Problem ``number``."""
    return Example(f"t:{number}", f"problem {number}", answer, [], {})


def random_groups(
    count: int = 10, rollouts: int = 3, demos: int = 1, seed: int = 0, vocab: int = VOCAB
) -> list[Group]:
    """Groups of random tokens and lengths with mixed rewards; the first is all wrong, the last all right."""
    rng = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [rng.randrange(2, vocab) for _ in range(rng.randint(1, most))]

    groups = []
    for number in range(count):
        prompt = tokens(6)
        group = Group(Prompt(example(number), prompt, []))
        for k in range(rollouts):
            right = number == count - 1 or (number > 0 and (k == 0 or rng.random() < 0.4))
            group.rollouts.append(sequence(prompt, tokens(11), reward=float(right)))
        group.demos = [sequence(prompt, [*tokens(11), 1], is_demo=True, reward=1.0) for _ in range(demos)]
        groups.append(group)
    return groups


def members(groups: list[Group]) -> list[Response]:
    """Every sequence of the groups, in order."""
    return [s for g in groups for s in (*g.rollouts, *g.demos)]


def budget_for(count: int, sequences: list[Response]) -> int:
    """A token budget under which the sequences fill exactly ``count`` micro-batches."""
    # a smaller one would need more of them
    least = max(20, math.ceil(sum(map(len, sequences)) / count))
    for budget in range(least, 20 * len(sequences) + 1):
        if len(pack(sequences, budget, CPU)) == count:
            return budget
    raise AssertionError(f"no budget gives {count} micro-batches")


def flat_gradient(model: torch.nn.Module) -> Tensor:
    """Every parameter's gradient in one float64 vector."""
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((actual - expected).detach().norm() / expected.detach().norm())


class FakeEngine:
    """Answers each prompt with the completion scripted for it and remembers what it was asked."""

    def __init__(self, answers: dict[tuple[int, ...], Completion]) -> None:
        self.version = self.restarts = 0
        self.answers = answers
        self.asked: list[tuple[Sampling, list[list[int]]]] = []

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[list[int]], ended: Ended | None = None
    ) -> list[list[Completion]]:
        self.asked.append((sampling, seeds))
        return [[self.answers[tuple(p)] for _ in s] for p, s in zip(prompts, seeds, strict=True)]

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.version = version

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        return [[0.0] * (len(s) - 1) for s in sequences]

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass


class FakePool:
    """Accepts a text that equals the answer; "slow" times out."""

    def score(self, items: list[tuple[str, object, dict]]) -> list[RewardResult]:
        return [
            RewardResult(0.0, "timeout") if text == "slow" else RewardResult(float(text == answer), "ok")
            for text, answer, _ in items
        ]
