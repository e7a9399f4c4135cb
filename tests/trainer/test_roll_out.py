"""A step's groups: which demonstrations join, what a verifier is shown, and what ends a completion."""

from __future__ import annotations

from pathlib import Path

import pytest

from srft.data.examples import Example
from srft.data.prompts import Prompt, build_prompts
from srft.data.templates import PromptFormat
from srft.engine.base import Completion, Sampling
from srft.engine.sampling import describe_ends, make_sampling
from srft.evaluate import evaluate
from srft.methods import StepInfo
from srft.rewards.pool import RewardPool
from srft.rollout import Actor, judge, roll_out
from tests.trainer.chat import CHATML, R1, char_tokenizer
from tests.trainer.runs import small_config
from tests.trainer.tiny import FakeEngine, FakePool, plain_model

QUESTION = [{"role": "user", "content": "2+3?"}]


def test_other_demonstrations_at_every_visit(tmp_path: Path) -> None:
    """Of more demonstrations than are joined each has its turn, by the seed alone; all of them keep their order."""
    example = Example("f:0", "2+3=", "5", ["#5", "so #5", "thus #5"], {})
    prompt = Prompt(example, [1], [[1, 2], [1, 3], [1, 4]])

    def chosen(step: int, demos: int) -> list[str]:
        config = small_config(tmp_path, method__name="sft", train__demos_per_prompt=demos)
        actor = Actor(FakeEngine({}), Sampling(1.0, 4, (1,)), char_tokenizer(), FakePool())
        (group,) = roll_out(config, actor, [prompt], StepInfo(step, 20, 4, {}))
        for demo in group.demos:
            assert demo.response_ids == prompt.demo_ids[example.demos.index(demo.text)]
        return [demo.text for demo in group.demos]

    once = [chosen(step, 1) for step in range(20)]
    assert {demo for demos in once for demo in demos} == set(example.demos)
    assert once == [chosen(step, 1) for step in range(20)]
    assert all(chosen(step, 3) == example.demos for step in range(3))


@pytest.mark.parametrize(
    ("said", "text", "reward"),
    [
        ("so #5", "<think>\nso #5", 0.0),
        ("so #4</think>#5", "<think>\nso #4</think>#5", 1.0),
        ("so #5</think>#4", "<think>\nso #5</think>#4", 0.0),
        ("x</think>#5;#6", "<think>\nx</think>#5;", 1.0),
    ],
    ids=["unclosed", "right", "wrong", "stopped"],
)
def test_thought_that_the_prompt_opened_is_judged_as_opened(
    tmp_path: Path, said: str, text: str, reward: float
) -> None:
    """In training and evaluation alike, a right answer inside a thought that is never closed earns nothing."""
    tokenizer = char_tokenizer(R1)
    config = small_config(tmp_path, method__name="grpo", train__rollouts_per_prompt=2)
    (prompt,), _ = build_prompts(
        [Example("f:0", QUESTION, "5;" if ";" in said else "5", [], {})], PromptFormat(tokenizer),
        max_prompt_tokens=99, max_demo_tokens=9,
    )  # fmt: skip
    ids = tokenizer.encode(said, add_special_tokens=False)
    engine = FakeEngine({tuple(prompt.prompt_ids): Completion(ids, [0.0] * len(ids), "stop", 0)})
    sampling = Sampling(1.0, 40, (1,), (";",))
    with RewardPool("exact", 1, 5.0) as pool:
        actor = Actor(engine, sampling, tokenizer, pool)
        (group,) = roll_out(config, actor, [prompt], StepInfo(1, 1, 40, {}))
        assert [s.text for s in group.rollouts] == [text] * 2
        judge([group], pool)
        assert [s.reward for s in group.rollouts] == [reward] * 2
        assert evaluate(actor, [prompt])["eval/accuracy"] == reward


def test_sampling_takes_end_tokens_from_tokenizer_model_and_template(tmp_path: Path) -> None:
    """Each of the three, an option's text, and the sentence that says so."""
    tokenizer = char_tokenizer(CHATML)
    model = plain_model(vocab=len(tokenizer))
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<eos>", "<|im_end|>", "<end_of_turn>")}
    model.generation_config.eos_token_id = [ids["<eos>"], ids["<end_of_turn>"]]
    sampling = make_sampling(small_config(tmp_path, rollout__stop="</answer>"), tokenizer, model)
    assert sampling == Sampling(1.0, 32, tuple(sorted(ids.values())), ("</answer>",))
    said = describe_ends(sampling, tokenizer)
    assert all(name in said for name in (*ids, "'</answer>'"))
    model.generation_config.eos_token_id = None
    plain = make_sampling(small_config(tmp_path), char_tokenizer(), model)
    assert plain.stop_token_ids == (1,)
