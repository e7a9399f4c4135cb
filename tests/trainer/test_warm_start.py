"""The supervised start: what it trains, and the name that its model is kept under."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from srft import warm_start as module
from srft.config import Config
from srft.data.prompts import Prompt
from srft.data.sampler import PromptSampler
from srft.dataset import Prompts
from srft.options import load_config
from srft.warm_start import cached_start, warm_start
from tests.trainer.tiny import FakePool, example, learner_of, plain_model, policy, random_groups, relative_error

# each of the run's own that the start must not take: method, rate, its warm-up, decay, temperature
WORDS = [
    "method.name=grpo", "train.lr=1", "train.lr_warmup_steps=9", "train.weight_decay=0.5", "rollout.temperature=2",
    "train.grad_clip=0.5", "data.max_prompt_tokens=8", "rollout.max_new_tokens=12", "train.tokens_per_microbatch=40",
    "model.warm_start.max_steps=3", "model.warm_start.batch_size=4", "model.warm_start.lr=0.2",
]  # fmt: skip


def shown(count: int = 6) -> Prompts:
    """Prompts of random tokens, each with its demonstration; one of them is held out."""
    groups = random_groups(count)
    prompts = [Prompt(example(i), g.prompt.prompt_ids, [g.demos[0].response_ids]) for i, g in enumerate(groups)]
    prompts = [replace(p, example=replace(p.example, demos=["a demonstration"])) for p in prompts]
    return Prompts([], prompts, [Prompt(example(count), [5, 6], [])], "")


def test_start_is_plain_cross_entropy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Three steps over several micro-batches end where gradient descent on the mean of -log p in float64 ends."""
    config, prompts, plain = load_config(WORDS), shown(), plain_model(vocab=258)

    def descent(model: torch.nn.Module, of: Config) -> torch.optim.Optimizer:
        assert of.train.weight_decay == 0
        return torch.optim.SGD(model.parameters(), lr=1.0)

    monkeypatch.setattr(module, "make_optimizer", descent)
    trained = policy(plain)
    unused = torch.optim.SGD(trained.parameters(), lr=1.0)
    unused.register_step_pre_hook(lambda *_: pytest.fail("the run's own optimizer moved the weights"))
    warm_start(learner_of(config, trained, unused), prompts, FakePool(), None)

    expected = copy.deepcopy(plain).double()
    sampler = PromptSampler(len(prompts.start), config.train.seed + 1)
    for _ in range(3):
        expected.zero_grad()
        chosen = [prompts.start[i] for i in sampler.next(4)]
        losses = []
        for p in chosen:
            logits = expected(torch.tensor([p.prompt_ids + p.demo_ids[0]])).logits[0, len(p.prompt_ids) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(p.demo_ids[0]), reduction="none"))
        loss = torch.cat(losses).mean()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.5) > 0.5
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter -= 0.2 * parameter.grad
    for one, other, before in zip(trained.parameters(), expected.parameters(), plain.parameters(), strict=True):
        moved = (other - before).norm()
        assert (one - other).norm() <= 1e-4 * moved + 1e-6
    assert relative_error(*(torch.cat([p.double().flatten() for p in m.parameters()]) for m in (trained, plain))) > 1e-3
    assert f"step 3, loss {loss.item():.3f} nats, held-out accuracy 0.000" in capsys.readouterr().err


def test_start_without_a_demonstration_says_so() -> None:
    """Before a step, with the two options that help."""
    prompts = Prompts([], [Prompt(example(0), [5], [])], [Prompt(example(1), [6], [])], "")
    model = policy(plain_model(vocab=258))
    learner = learner_of(load_config(WORDS), model, torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(ValueError, match=r"model.warm_start.max_steps=0 or give data.columns.demo"):
        warm_start(learner, prompts, FakePool(), None)


@pytest.mark.parametrize(
    "word",
    [
        "train.seed=1", "train.betas=[0.8, 0.99]", "train.grad_clip=2", "train.tokens_per_microbatch=50",
        "model.warm_start.lr=0.1", "model.warm_start.until_accuracy=0.5", "model.tiny.hidden_size=64",
        "model.compute_dtype=bfloat16", "data.max_prompt_tokens=9", "rollout.max_new_tokens=13", "rollout.stop=;",
    ],
)  # fmt: skip
def test_name_changes_with_what_the_model_depends_on(word: str) -> None:
    """Every option that the start reads."""
    assert cached_start(load_config([*WORDS, word]), shown(), "exact") != cached_start(
        load_config(WORDS), shown(), "exact"
    )


def test_name_stays_with_what_it_does_not_depend_on() -> None:
    """The run's method, rates and length, its name, and where the cache lies."""
    words = ["method.name=sft", "train.lr=2", "train.steps=3", "train.prompts_per_step=5", "rollout.temperature=1",
             "name=other", "runs_dir=elsewhere", "train.eval_every=7"]  # fmt: skip
    one = cached_start(load_config(WORDS), shown(), "exact")
    assert cached_start(load_config([*WORDS, *words]), shown(), "exact") == one
    assert cached_start(load_config([*WORDS, "cache_dir=/x"]), shown(), "exact").name == one.name


def test_name_changes_with_the_data_and_the_verifier(tmp_path: Path) -> None:
    """Other prompts, demonstrations, held-out answers, another verifier, and another version of the user's own."""
    config, prompts, reward = load_config(WORDS), shown(), tmp_path / "mine.py"
    reward.write_text("def judge(completion, answer, row):\n    return 1.0\n")
    first, held_out = prompts.start[0], prompts.held_out[0]
    names = [cached_start(config, prompts, kind).name for kind in ("exact", "math", f"{reward}:judge")]
    reward.write_text("def judge(completion, answer, row):\n    return 0.0\n")
    names.append(cached_start(config, prompts, f"{reward}:judge").name)
    for changed in (
        replace(prompts, start=prompts.start[1:]),
        replace(prompts, start=[replace(first, prompt_ids=[9]), *prompts.start[1:]]),
        replace(prompts, start=[replace(first, demo_ids=[[9]]), *prompts.start[1:]]),
        replace(prompts, held_out=[replace(held_out, example=example(99, "8"))]),
    ):
        names.append(cached_start(config, changed, "exact").name)
    assert len(set(names)) == len(names) == 8
