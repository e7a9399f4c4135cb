"""Conversations of a policy: what it reads at each turn, when they end, and runs that learn from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from srft import evaluate as evaluate_command
from srft.conversation import Environment, converse
from srft.data.examples import Example
from srft.data.prompts import build_prompts
from srft.data.templates import PromptFormat
from srft.data.turns import transcript
from srft.engine.base import Completion, Ended, Sampling
from srft.environments.pool import Asked, Reply
from srft.evaluation.answers import draw_answers
from srft.methods import StepInfo
from srft.policy.parallel import ALONE
from srft.responses import Response
from srft.rollout import Actor, judge, roll_out
from tests.trainer.chat import CHATML, char_tokenizer
from tests.trainer.runs import assert_same_run, read_lines, small_config, train
from tests.trainer.tiny import FakeEngine, FakePool


class Script(FakeEngine):
    """Says the next of some turns in each conversation, whatever it read, and remembers all that it was asked."""

    def __init__(self, tokenizer: Any, ends: tuple[str, ...], turns: list[str]) -> None:
        super().__init__({})
        self.tokenizer, self.ends, self.turns = tokenizer, ends, turns
        self.calls: list[tuple[list[list[int]], Sampling, list[list[int]]]] = []

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[list[int]], ended: Ended | None = None
    ) -> list[list[Completion]]:
        self.calls.append((prompts, sampling, seeds))
        said = self.turns[len(self.calls) - 1]
        ids = self.tokenizer.encode(said, add_special_tokens=False)
        ended = said.endswith(self.ends) and len(ids) <= sampling.max_new_tokens
        ids = ids[: sampling.max_new_tokens]
        logprobs = [-1.0 * len(self.calls)] * len(ids)
        return [[Completion(ids, logprobs, "stop" if ended else "length", 4)] for _ in prompts]


class Calls:
    """Answers by a function of the turns so far, in this process."""

    judges = False

    def __init__(self, step: object) -> None:
        self.step, self.asked = step, []

    def judge(self, asked: list[Asked]) -> list[Reply]:
        return [Reply(None, reward=0.25 * len(one.texts)) for one in asked]

    def begin(self) -> None:
        self.asked.append([])

    def answer(self, asked: list[Asked]) -> list[Reply]:
        self.asked[-1].append([one.texts for one in asked])
        return [said if isinstance(said := self.step(one.texts), Reply) else Reply(said) for one in asked]


def adds(texts: list[str]) -> str | None:
    return str(eval(texts[-1][:-1])) if texts[-1].endswith("=") else None


def talked(
    turns: list[str], *, template: str | None = None, limit: int = 200, max_turns: int = 8, step: object = adds,
    prompts: int = 1, samples: int = 1, stop: tuple[str, ...] = (),
) -> tuple[list[list[Response]], Script, Actor]:  # fmt: skip
    """Conversations in which the policy says these turns, each with its end token where that stands there."""
    tokenizer = char_tokenizer(template)
    form = PromptFormat(tokenizer)
    rows = [Example(f"t:{i}", "1+2+4", "7", [], {}) for i in range(prompts)]
    encoded, _ = build_prompts(rows, form, max_prompt_tokens=99, max_demo_tokens=None)
    engine = Script(tokenizer, ("<|im_end|>" if template else "<eos>", *stop), turns)
    environment = Environment(Calls(step), form, "user", max_turns)
    sampling = Sampling(1.0, limit, (form.turn("?").end,), stop)
    actor = Actor(engine, sampling, tokenizer, FakePool(), ALONE, environment)
    seeds = [[100 * i + k for k in range(samples)] for i in range(prompts)]
    return converse(environment, engine, sampling, ALONE, encoded, seeds), engine, actor


@pytest.mark.parametrize(("template", "end"), [(None, "<eos>"), (CHATML, "<|im_end|>")])
def test_each_turn_goes_on_after_the_tokens_of_all_before(template: str | None, end: str) -> None:
    """The prompt of a turn begins with that of the last and what was sampled then; only sampled tokens are its own."""
    turns = [f"1+2={end}", f"3+4={end}", f"7{end}"]
    (((s,)), engine, actor) = talked(turns, template=template)
    (s,) = s if isinstance(s, list) else [s]
    tokenizer = actor.tokenizer
    for (before,), (after,), said in zip(
        [c[0] for c in engine.calls], [c[0] for c in engine.calls[1:]], turns, strict=False
    ):
        assert after[: len(before)] == before
        sampled = tokenizer.encode(said, add_special_tokens=False)
        assert after[len(before) : len(before) + len(sampled)] == sampled
    last = tokenizer.encode(turns[-1], add_special_tokens=False)
    assert s.prompt_ids + s.response_ids == engine.calls[-1][0][0] + last
    assert tokenizer.decode(s.own_ids) == "".join(turns)
    assert s.rollout_logprobs == [-float(i + 1) for i, n in enumerate(s.spans[::2]) for _ in range(n)]
    assert (s.text, s.truncated, s.status, s.version) == ("7", False, "ok", 4)
    assert s.transcript == "1+2=\n[user] 3\n[assistant] 3+4=\n[user] 7\n[assistant] 7"
    if template:
        messages = [{"role": "user", "content": "1+2+4"}]
        for text, reply in (("1+2=", "3"), ("3+4=", "7"), ("7", "")):
            messages += [{"role": "assistant", "content": text}] + [{"role": "user", "content": reply}] * bool(reply)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(s.prompt_ids + s.response_ids) == whole.rstrip("\n")


def test_all_that_go_on_are_asked_at_once_with_seeds_of_their_own() -> None:
    """One call a turn; a conversation's seeds come from its own, whoever is beside it."""
    _, alone, _ = talked(["1+2=<eos>", "7<eos>"])
    talks, engine, actor = talked(["1+2=<eos>", "7<eos>"], prompts=2, samples=2)
    assert [len(of_prompt) for of_prompt in talks] == [2, 2]
    assert [len(call[0]) for call in engine.calls] == [4, 4]
    assert [row for (row,) in engine.calls[0][2]] == [0, 1, 100, 101]
    later = [seed for (seed,) in engine.calls[1][2]]
    assert len(set(later)) == 4 and later[0] == alone.calls[1][2][0][0]
    assert len(actor.environment.pool.asked) == 1


@pytest.mark.parametrize(
    ("turns", "options", "spans", "truncated"),
    [
        # no end token: the limit cut the first turn
        (["123456"], {"limit": 4}, [], True),
        # 4 + 1 tokens, then there is room for 3 of 4
        (["1+2=<eos>", "345<eos>"], {"limit": 9}, [5, 1, 3], True),
        # no room for a further turn after what would be said
        (["1+2=<eos>"], {"limit": 6}, [], True),
        (["1+2=<eos>", "3+4=<eos>"], {"max_turns": 2}, [5, 1, 5], True),
        (["1+2=<eos>", "#7<eos>"], {"max_turns": 2}, [5, 1, 3], False),
        (["#7<eos>"], {}, [], False),
    ],
)
def test_what_ends_a_conversation(turns: list[str], options: dict[str, int], spans: list[int], truncated: bool) -> None:
    """The limit of tokens, in a turn or before one, that of turns, or the environment."""
    (((s,),), engine, _) = talked(turns, **options)
    assert (s.spans, s.truncated) == (spans, truncated)
    assert len(engine.calls) == len(turns) and len(s.response_ids) <= options.get("limit", 200)
    assert len(s.rollout_logprobs) == s.num_own


def test_a_text_that_ends_a_turn_is_closed_for_the_next() -> None:
    """With rollout.stop="=" the end token is read by the policy and not its own."""
    (((s,),), _, actor) = talked(["1+2=", "#7<eos>"], stop=("=",))
    assert actor.tokenizer.convert_ids_to_tokens(s.response_ids) == [*"1+2=", "<eos>", "3", *"#7", "<eos>"]
    assert (s.spans, s.text, s.truncated) == ([4, 2, 3], "#7", False)


def test_a_conversation_whose_environment_hung_is_not_judged(tmp_path: Path) -> None:
    """It keeps the status with a reward of 0, in training and evaluation; others are judged by their last turn."""

    def hangs(texts: list[str]) -> object:
        return Reply(None, "timeout", "killed") if texts[-1].startswith("9") else adds(texts)

    _, _, actor = talked(["7<eos>"], step=hangs)
    row = Example("t:0", "1+2+4", "7", [], {})
    prompts, _ = build_prompts([row], actor.environment.form, max_prompt_tokens=9, max_demo_tokens=None)
    for turns, status, reward in ((["1+2=<eos>", "7<eos>"], "ok", 1.0), (["9<eos>"], "timeout", 0.0)):
        again = Actor(Script(actor.tokenizer, ("<eos>",), turns), actor.sampling, actor.tokenizer, FakePool(), ALONE,
                      actor.environment)  # fmt: skip
        config = small_config(tmp_path, method__name="grpo", train__rollouts_per_prompt=2)
        (group,) = roll_out(config, again, prompts, StepInfo(1, 1, 40, {}))
        judge([group], FakePool())
        assert [(s.status, s.reward) for s in group.rollouts] == [(status, reward)] * 2
        again.engine.calls.clear()
        ((answer,),) = draw_answers(again, prompts, 1, 0)
        assert (answer.result.status, answer.result.value) == (status, reward)


def test_the_reward_of_an_environment_is_kept(tmp_path: Path) -> None:
    """It counts the turns that it heard, a cut one aside; no verifier is asked, in training or evaluation."""
    _, _, actor = talked(["7<eos>"])
    actor.environment.pool.judges = True
    row = Example("t:0", "1+2+4", "7", [], {})
    prompts, _ = build_prompts([row], actor.environment.form, max_prompt_tokens=9, max_demo_tokens=None)
    for turns, reward in ((["1+2=<eos>", "#8<eos>"], 0.5), (["1+2=<eos>", "7"], 0.25), (["7"], 0.0)):
        engine = Script(actor.tokenizer, ("<eos>",), turns)
        again = Actor(engine, actor.sampling, actor.tokenizer, FakePool(), ALONE, actor.environment)
        config = small_config(tmp_path, method__name="grpo", train__rollouts_per_prompt=2)
        (group,) = roll_out(config, again, prompts, StepInfo(1, 1, 40, {}))
        judge([group], FakePool())
        assert [s.reward for s in group.rollouts] == [reward] * 2
        engine.calls.clear()
        ((answer,),) = draw_answers(again, prompts, 1, 0)
        assert answer.result.value == reward


def test_an_environment_without_an_answer_changes_nothing(tmp_path: Path) -> None:
    """A conversation of one turn is a rollout as ever: the same metrics, samples and weights to the last bit."""
    path = tmp_path / "silent.py"
    path.write_text("class Silent:\n    def __init__(self, answer, row): pass\n    def step(self, text): pass\n")
    alone = train(tmp_path / "alone", train__steps=1)
    assert_same_run(train(tmp_path / "beside", train__steps=1, env__name=f"{path}:Silent"), alone)


RUN = {
    "data__train": "calculator", "env__name": "calculator", "data__task__largest": 9, "rollout__max_new_tokens": 40,
    "env__workers": 1, "train__record_rollouts": True,
}  # fmt: skip


def test_a_run_of_conversations_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """With rollouts a step ahead, which wait in the checkpoint, and a warm start; evaluated and replayed afterwards."""
    options = RUN | {"rollout__max_lag": 1, "model__warm_start__max_steps": 10}
    whole = train(tmp_path / "whole", **options)
    train(tmp_path / "parts", **options | {"train__steps": 1})
    parts = train(tmp_path / "parts", **options, train__resume=True)
    assert_same_run(parts, whole)
    last = read_lines(whole / "metrics.jsonl")[-1]
    assert last["length/turns"] >= 1 and "eval/accuracy" in last
    shown = [row for row in read_lines(whole / "samples.jsonl") if row["demo"]]
    assert all("[user]" in row["completion"] for row in shown)
    words = [str(whole), "calculator", "--greedy", "--max-new-tokens", "40", "--limit", "8", "--out", f"{tmp_path}/e"]
    evaluate_command.main(words)
    cut = sum(row["tally"]["cut"] for row in read_lines(tmp_path / "e" / "calculator.jsonl")) / 8
    assert cut == last["eval/truncated"]
    replayed = train(tmp_path / "again", **options | {"train__record_rollouts": False, "train__replay": whole})
    again, first = (read_lines(run / "metrics.jsonl")[1] for run in (replayed, whole))
    assert again["length/mean"] == first["length/mean"] and again["length/turns"] == first["length/turns"]


def test_transcript() -> None:
    """Every turn but the first begins with whose it is."""
    assert transcript([{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]) == "a\n[tool] b"
