"""Distillation on the policy's own rollouts, by another model or by itself with a demonstration, and SRFT's terms."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from srft.batch import pack
from srft.config import Config
from srft.data.examples import Example
from srft.data.prompts import Prompt, with_demo
from srft.data.templates import PromptFormat
from srft.learning import update
from srft.methods import UpdateInfo
from srft.methods.opd import Method
from srft.methods.self_distill import Method as SelfDistillation
from srft.policy.frozen import Frozen
from srft.policy.model import byte_tokenizer, own_attention
from srft.responses import Group, count
from srft.rollout import refuse_long_lessons
from tests.trainer.chat import CHATML
from tests.trainer.plain_step import (
    Expected,
    Scored,
    assert_as_expected,
    divisor,
    expected_step,
    of_its_kind,
    statistics_of,
)
from tests.trainer.runs import read_lines, train
from tests.trainer.test_frozen import learner_beside, step
from tests.trainer.test_method_chord import compared
from tests.trainer.tiny import (
    CPU,
    budget_for,
    learner_of,
    members,
    plain_model,
    policy,
    random_groups,
    sequence,
    tiny_config,
)

OPD = ["method.name=opd", "method.teacher=somewhere"]
MIXED = ["rl_coef=0.4", "sft_coef=0.5", "demo_rl_coef=0.3", "teacher_coef=0.7", "bound=1.5"]
MIXED += ["aggregation=sequence-mean"]


def expected_of(
    config: Config, model: torch.nn.Module, teacher: torch.nn.Module, groups: Sequence[Group]
) -> Expected:
    """-A log p of rollouts, SRFT's weighted likelihood and -A p of demonstrations."""
    plain, other, method = copy.deepcopy(model).double(), copy.deepcopy(teacher).double(), config.method
    most, temperature = config.rollout.max_new_tokens, config.rollout.temperature

    def terms(one: Scored, everyone: Sequence[Scored]) -> Tensor:
        kind, response = of_its_kind(one, everyone), one.response
        if response.is_demo:
            weight = (method.sft_entropy_sign * one.entropy.mean()).exp().detach()
            sft, shaped = -method.sft_coef * weight * one.logp, -method.demo_rl_coef * one.advantage * one.logp.exp()
            return torch.cat([sft, shaped]) / divisor(method.demo_aggregation, one, kind, most)
        read = replace(response, prompt_ids=response.teacher_prompt_ids or response.prompt_ids)
        liking = statistics_of(other, read, temperature)[0].detach() - one.logp.detach()
        advantage = method.teacher_coef * liking.clamp(-method.bound, method.bound) + method.rewards * one.advantage
        return -advantage * one.logp / divisor(method.aggregation, one, kind, most)

    if method.demo_rl_coef:
        together = [Group(g.prompt, [*g.rollouts, *g.demos]) for g in groups]
        taught = compared(together, True)
    else:
        taught = [(s, a) for s, a in compared(groups, True) if not s.is_demo or method.sft_coef]
    return expected_step(plain, temperature, taught, terms)


@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize(
    "options", [[], MIXED, ["sft_coef=1", "sft_entropy_sign=0"]], ids=["pure", "mixed", "plain-sft"]
)
def test_step_equals_plain_float64(options: list[str], batches: int) -> None:
    """Loss and gradient at temperature 0.8, however the update is split."""
    model, other, groups = plain_model(), plain_model(seed=1), random_groups(4)
    taught = members(groups) if options else [s for s in members(groups) if not s.is_demo]
    budget = f"train.tokens_per_microbatch={budget_for(batches, taught)}"
    config = tiny_config(*OPD, "rollout.temperature=0.8", budget, *(f"method.{option}" for option in options))
    metrics, gradient = step(learner_beside(config, model, Frozen(teacher=policy(other))), groups)
    assert_as_expected(metrics, gradient, expected_of(config, model, other, groups))
    assert metrics["kl/teacher"] > 0


def test_a_step_of_self_distillation_equals_plain_float64() -> None:
    """The teacher is the same model, which reads another prompt; or it is the reference."""
    model, other, groups = plain_model(), plain_model(seed=1), random_groups(4)
    for s in (s for g in groups for s in g.rollouts):
        s.teacher_prompt_ids = [*groups[0].demos[0].response_ids, *s.prompt_ids]
    for weights, teacher, frozen in (("current", model, Frozen()), ("start", other, Frozen(policy(other)))):
        config = tiny_config("method.name=self_distill", f"method.teacher_weights={weights}")
        metrics, gradient = step(learner_beside(config, model, frozen), copy.deepcopy(groups))
        assert_as_expected(metrics, gradient, expected_of(config, model, teacher, groups))


def test_a_policy_has_nothing_to_learn_from_itself() -> None:
    """A teacher of the same weights: loss and gradient are exactly 0, whatever the rewards."""
    model, groups = plain_model(), random_groups(4)
    learner = learner_beside(tiny_config(*OPD), model, Frozen(teacher=policy(model)))
    metrics, gradient = step(learner, groups)
    assert metrics["loss/total"] == metrics["kl/teacher"] == 0
    assert not gradient.any()


@pytest.mark.parametrize(
    ("says", "advantage"), [(math.log(0.5), math.log(2)), (-1e4, -3.0), (0.0, math.log(4))], ids=["half", "never", "1"]
)
def test_a_token_by_hand(says: float, advantage: float) -> None:
    """Four words alike, p = 1/4: A is the log-ratio within the bound of 3, the loss -A log p = A log 4."""
    method = Method(name="opd", teacher="x", bound=3)
    rollout = sequence([1], [2])
    rollout.old_logprobs, rollout.teacher_logprobs = torch.tensor([-math.log(4)]), torch.tensor([says])
    (batch,) = pack(method.learn_from(Group(random_groups(1)[0].prompt, [rollout])), 10, CPU)
    loss = method.loss(batch, UpdateInfo(count([rollout]), step=1, max_new_tokens=8))
    out = loss(torch.zeros(1, 5).requires_grad_(), torch.zeros(4, 5), labels=batch.labels)
    assert out.loss.item() == pytest.approx(advantage * math.log(4), rel=1e-6)


def test_a_teacher_that_excludes_a_token_is_bounded() -> None:
    """Its probability of 0 is worth -bound, and the loss stays a number."""
    model, groups = plain_model(), random_groups(4)
    excluded = groups[0].rollouts[0].response_ids[0]
    teacher = policy(model)
    with torch.no_grad():
        teacher.lm_head.weight[excluded] *= 1e30
    config = tiny_config(*OPD, "method.bound=4")
    metrics, gradient = step(learner_beside(config, model, Frozen(teacher=teacher)), groups)
    assert math.isfinite(metrics["loss/total"]) and bool(gradient.isfinite().all())


def test_it_moves_towards_its_teacher() -> None:
    """Fifty updates on tokens it draws itself: a third of the KL to the teacher, over all words, is gone at least."""
    teacher, config = plain_model(seed=1), tiny_config(*OPD, "train.lr=0.01")
    trained = policy(plain_model())
    optimizer = torch.optim.Adam(trained.parameters())
    learner = replace(learner_of(config, trained, optimizer), frozen=Frozen(teacher=policy(teacher)))
    prompts = torch.arange(2, 34)[:, None]

    def drawn() -> tuple[Tensor, float]:
        ids, distances = prompts, []
        with torch.no_grad(), own_attention(trained):
            for _ in range(4):
                ours, theirs = (m(ids).logits[:, -1].log_softmax(-1) for m in (trained, teacher))
                distances.append((ours.exp() * (ours - theirs)).sum(-1).mean().item())
                ids = torch.cat([ids, torch.multinomial(ours.exp(), 1)], dim=1)
        return ids, sum(distances) / len(distances)

    _, before = drawn()
    for number in range(1, 51):
        ids, _ = drawn()
        update(learner, [sequence(row[:1], row[1:]) for row in ids.tolist()], number)
    assert drawn()[1] < 0.7 * before


def test_without_a_teacher_it_is_grpo_held_to_its_start() -> None:
    """Rewards alone make the gradient while the policy is still what it was."""
    model, groups = plain_model(), random_groups(4)
    metrics, gradient = step(learner_beside(tiny_config("method.name=opd"), model, Frozen()), groups)
    same, other = step(
        learner_beside(tiny_config("method.name=grpo", "method.loss_type=reinforce"), model, Frozen()), groups
    )
    assert metrics["loss/total"] == pytest.approx(same["loss/total"], rel=1e-5)
    assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-7)


def test_its_terms_of_demonstrations_are_those_of_srft() -> None:
    """With the teacher and the rewards left out, SRFT's two terms of demonstrations at the same factors are left."""
    model, groups = plain_model(), random_groups(4)
    out = ["train.term_scales.teacher=0", "train.term_scales.rewards=0"]
    config = tiny_config(*OPD, "method.sft_coef=0.5", "method.demo_rl_coef=1", *out)
    metrics, gradient = step(learner_beside(config, model, Frozen(teacher=policy(plain_model(seed=1)))), groups)
    out = ["train.term_scales.rollout_positive=0", "train.term_scales.rollout_negative=0"]
    aggregated = ["method.sft_aggregation=token-mean", "method.rl_aggregation=token-mean"]
    same, other = step(learner_beside(tiny_config(*out, *aggregated), model, Frozen()), copy.deepcopy(groups))
    assert metrics["loss/sft"] == pytest.approx(same["loss/demo_sft"], rel=1e-5)
    assert metrics["loss/shaped"] == pytest.approx(same["loss/demo_rl"], rel=1e-5)
    assert torch.allclose(gradient, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "demos", "fewest"),
    [
        ([], False, 2),
        (["method.teacher=x"], False, 1),
        (["method.teacher=x", "method.rl_coef=1"], False, 2),
        (["method.teacher=x", "method.sft_coef=1"], True, 1),
        (["method.teacher=x", "method.rl_coef=1", "method.demo_rl_coef=1"], True, 1),
        (["method.name=self_distill"], True, 1),
    ],
)
def test_what_it_needs_follows_from_its_factors(options: list[str], demos: bool, fewest: int) -> None:
    """Demonstrations for their terms and for the eyes of the teacher, a second rollout for rewards to be compared."""
    method = tiny_config("method.name=opd", *options).method
    assert (method.needs_demos, method.fewest_rollouts) == (demos, fewest)


def test_unjudged_rollouts_are_distilled() -> None:
    """A teacher needs no reward; a comparison does."""
    group = random_groups(1)[0]
    group.rollouts[0].status = "unjudged"
    assert len(Method(name="opd", teacher="x").learn_from(group)) == 3
    assert len(Method(name="opd", teacher="x", rl_coef=1).learn_from(group)) == 2


def prompt_of(words: Any) -> Prompt:
    return Prompt(Example("t:0", words, "7", ["first", "seven {prompt}"], {}), [1], [[2], [3]])


def test_what_the_teacher_reads() -> None:
    """Plain text goes on after the prompt, a chat model's stands in the user's turn; braces of a text stay."""
    tokenizer, method = byte_tokenizer(), SelfDistillation(name="self_distill")
    plain = with_demo(prompt_of("3+4="), 1, PromptFormat(tokenizer), method.show)
    assert tokenizer.decode(plain) == "3+4=seven {prompt}\n3+4="
    own = SelfDistillation(name="self_distill", teacher_prompt="{demo}|{prompt}")
    assert tokenizer.decode(with_demo(prompt_of("3+4="), 0, PromptFormat(tokenizer), own.show)) == "first|3+4="
    tokenizer.chat_template = CHATML
    for words in ("3+4?", [{"role": "user", "content": "3+4?"}]):
        text = tokenizer.decode(with_demo(prompt_of(words), 0, PromptFormat(tokenizer), method.show))
        assert text.startswith("<|im_start|>user\n3+4?\n\nHere is an example") and text.endswith("assistant\n")
        assert "\n\nfirst\n\n" in text
    turns = [{"role": r, "content": words} for r, words in (("user", "2?"), ("assistant", "2"), ("user", "3?"))]
    text = tokenizer.decode(with_demo(prompt_of(turns), 0, PromptFormat(tokenizer), own.show))
    assert "user\n2?<" in text and "user\nfirst|3?<" in text


def test_a_template_without_its_places_is_refused() -> None:
    """Before anything is read."""
    with pytest.raises(ValueError, match=r"method.teacher_prompt: .*put \{prompt\} and \{demo\} where"):
        tiny_config("method.name=self_distill", "method.teacher_prompt={demo}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["model.name=x"], "the teacher reads up to 112 tokens, .* positions for 64"),
        (["train.tokens_per_microbatch=60"], "at least that, got 60"),
    ],
    ids=["positions", "micro-batch"],
)
def test_lessons_that_are_too_long_are_refused(options: list[str], said: str) -> None:
    """A prompt of 20 bytes twice, a demonstration of 59, a line's end and 12 tokens of completion."""
    prompt = Prompt(Example("t:0", "x" * 20, "7", ["y" * 59], {}), [5] * 20, [[5] * 59])
    config = tiny_config("method.name=self_distill", *options)
    learner = learner_beside(config, plain_model(vocab=258), Frozen())
    with pytest.raises(ValueError, match=said):
        refuse_long_lessons(config, learner, [prompt])
    refuse_long_lessons(tiny_config("method.name=self_distill"), learner, [prompt])


def test_runs(tmp_path: Path) -> None:
    """Two steps without a teacher of one's own, and two with oneself: all numbers finite."""
    for name in ("opd", "self_distill"):
        run = train(tmp_path, name=name, method__name=name)
        rows = read_lines(run / "metrics.jsonl")[1:]
        assert all(math.isfinite(row["loss/total"]) and "kl/teacher" in row for row in rows)
    assert rows[0]["grad_norm"] > 0 and rows[0]["kl/teacher"] != 0

