"""Whole runs on the data sets a user brings: files, reasoning-gym, chat messages, and a vocabulary of 100,000."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from srft import learning
from srft.data.examples import Example
from srft.data.prompts import Prompt
from srft.dataset import read_problems
from srft.engine.hf import HfEngine
from srft.policy.model import byte_tokenizer
from srft.record.metrics import group_metrics
from srft.responses import Group, Response
from srft.rewards.pool import RewardPool
from srft.rollout import judge
from srft_kernels.head import chunks as chunked_head
from tests.trainer.runs import DATA, read_lines, small_config, train

POISON = r"so it is \boxed{9^{9^{9^{9}}}}"


def data_file(name: str) -> Path:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"needs {path.name} in {DATA.parent.name}/{DATA.name} beside the repository")
    return path


def test_reasoning_gym(tmp_path: Path) -> None:
    """A reasoning-gym task trains GRPO with its own verifier and is evaluated on problems it does not train on."""
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym, the extra srft[gym]")
    run = train(
        tmp_path, data__train="reasoning_gym:chain_sum", method__name="grpo", data__max_prompt_tokens=160,
        **{"data.task.max_terms": 3, "data.task.max_digits": 2},
    )  # fmt: skip
    rows = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert not any(row.get("reward/errors") for row in rows)
    assert {s["id"].rpartition(":")[0] for s in read_lines(run / "samples.jsonl")} == {"reasoning_gym:chain_sum"}


def test_countdown(tmp_path: Path) -> None:
    """Countdown trains on its worked solutions, all of them right, and is evaluated on its own test file."""
    run = train(
        tmp_path, data__train=data_file("train/countdown_train.jsonl"),
        data__eval=data_file("eval/countdown_test.jsonl"), data__max_prompt_tokens=320,
        rollout__max_new_tokens=160, train__tokens_per_microbatch=1024,
    )  # fmt: skip
    rows = read_lines(run / "metrics.jsonl")
    assert [row["reward/demo"] for row in rows[1:]] == [1.0, 1.0]
    assert all("eval/accuracy" in row for row in rows)
    demos = [s for s in read_lines(run / "samples.jsonl") if s["demo"]]
    assert demos and all(s["completion"].endswith("</answer>") for s in demos)


def test_countdown_test_problems_seen_in_training_are_dropped(tmp_path: Path) -> None:
    """Five problems of Countdown's test file stand in its training file; none of them is evaluated."""
    config = small_config(
        tmp_path, data__train=data_file("train/countdown_train.jsonl"),
        data__eval=data_file("eval/countdown_test.jsonl"), data__limit=20000, data__eval_limit=5000,
    )  # fmt: skip
    problems = read_problems(config)
    assert (len(problems.train), len(problems.held_out)) == (10240, 1024 - 5)
    seen = {(tuple(sorted(e.row["nums"])), e.row["target"]) for e in problems.train}
    assert not [e for e in problems.held_out if (tuple(sorted(e.row["nums"])), e.row["target"]) in seen]


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that the memory behind the result of any operation holds; an expanded view has none."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, stored)
        return out


def test_recorder_sees_the_backward_pass() -> None:
    """What the next test relies on: a tensor that exists in backward alone is seen."""

    class Wasteful(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return torch.zeros(1000, 10).sum(0) + grad

    x = torch.ones(10, requires_grad=True)
    with LargestTensor() as seen:
        loss = Wasteful.apply(x)
        assert seen.elements < 100
        loss.backward()
    assert seen.elements == 10_000


@pytest.fixture(scope="module")
def cl100k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder with the 100,256 ranks of cl100k_base and an end token."""
    pytest.importorskip("tiktoken", reason="needs tiktoken to read the ranks")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = data_file("tokenizers/cl100k_base.tiktoken")
    folder = tmp_path_factory.mktemp("cl100k")
    converter = TikTokenConverter(vocab_file=str(ranks), extra_special_tokens=["<|endoftext|>"])
    PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


def test_large_vocabulary_without_logits_of_all_tokens(
    cl100k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SRFT on GSM8K: neither update nor sampling ever holds as many elements as [tokens, vocabulary] has."""
    vocab = len(AutoTokenizer.from_pretrained(cl100k))
    assert vocab > 100_000
    updating, sampling = LargestTensor(), LargestTensor()
    counted: list[int] = []
    prompt_tokens: list[int] = []

    def watched(function: Callable[..., Any], mode: LargestTensor, *args: Any, **kwargs: Any) -> Any:
        with mode:
            return function(*args, **kwargs)

    def counting_pack(*args: Any, **kwargs: Any) -> Any:
        batches = original_pack(*args, **kwargs)
        counted.extend(len(batch.labels) for batch in batches)
        return batches

    def counting_generate(self: HfEngine, prompts: list[list[int]], *args: Any) -> Any:
        prompt_tokens.append(sum(map(len, prompts)))
        return watched(original_generate, sampling, self, prompts, *args)

    original_pack, original_generate = learning.pack, HfEngine.generate
    monkeypatch.setattr(learning, "pack", counting_pack)
    monkeypatch.setattr(learning, "update", partial(watched, learning.update, updating))
    monkeypatch.setattr(HfEngine, "generate", counting_generate)
    run = train(
        tmp_path, data__train=data_file("train/gsm8k_train.jsonl"), data__eval=data_file("eval/gsm8k_test.jsonl"),
        data__eval_limit=4, data__max_prompt_tokens=256, data__overlong="skip", model__tokenizer=cl100k,
        rollout__max_new_tokens=160, train__steps=3, train__eval_every=3, train__save_every=3,
        train__rollouts_per_prompt=2, train__tokens_per_microbatch=16384,
    )  # fmt: skip

    rows = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["reward/demo"] for row in rows[1:]] == [1.0, 1.0, 1.0]
    # one that is tried before the first step, then one a step, of so many tokens that its logits would fill the
    # workspace more than twice; evaluations before and after them have one of held-out demonstrations
    assert len(counted) == 1 + 1 + 3 + 1
    assert min(counted[2:5]) * vocab * 4 > 2 * chunked_head.CPU_WORKSPACE_BYTES
    assert 0 < updating.elements * 4 <= chunked_head.CPU_WORKSPACE_BYTES
    # sampling takes one position of each sequence, and there are more prompt tokens than the model is wide
    sequences = 4 * 2
    assert 0 < sampling.elements <= max(sequences, 32) * vocab < min(prompt_tokens) * vocab


def sums(count: int = 20) -> list[dict[str, Any]]:
    """Rows of one sum each."""
    return [{"prompt": f"{a}+1=", "answer": str(a + 1), "demo": f"#{a + 1}"} for a in range(count)]


def test_conversations_train_on_their_last_turn(tmp_path: Path) -> None:
    """Messages without a template: the prompt ends before the answer, the demonstration is it, and the log says how."""
    turns = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["demo"]}],
         "answer": r["answer"]}
        for r in sums()
    ]  # fmt: skip
    run = train(tmp_path, data__train=write_rows(turns, tmp_path / "turns.jsonl"), train__steps=1)
    demos = [s for s in read_lines(run / "samples.jsonl") if s["demo"]]
    assert demos and all(len(s["prompt"]) == 1 and "#" not in s["prompt"][0]["content"] for s in demos)
    assert read_lines(run / "metrics.jsonl")[1]["reward/demo"] == 1.0
    said = " ".join(json.loads((run / "run.json").read_text())["said"])
    assert "18 prompts of messages as plain text" in said and "A completion ends with <eos>." in said


@pytest.mark.parametrize("max_steps", [0, 2])
def test_demonstration_that_grpo_does_not_use(max_steps: int, tmp_path: Path) -> None:
    """A row without one, or with one that is no text, is no error; a supervised start takes the others."""
    rows = sums()
    rows[3]["demo"] = float("nan") if max_steps else {"no": "text"}
    run = train(
        tmp_path, data__train=write_rows(rows, tmp_path / "rows.jsonl"), method__name="grpo", train__steps=1,
        model__warm_start__max_steps=max_steps,
    )  # fmt: skip
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [0, 1]
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 4: (no|the) demonstration"):
        train(tmp_path, data__train=tmp_path / "rows.jsonl")


def test_folder_with_a_test_split_is_evaluated_on_it(tmp_path: Path) -> None:
    """A folder in the hub's layout is one data set: its test files are the held-out problems."""
    (tmp_path / "data").mkdir()
    write_rows(sums(20)[:12], tmp_path / "data" / "train.jsonl")
    write_rows(sums(20)[12:], tmp_path / "data" / "test.jsonl")
    problems = read_problems(small_config(tmp_path, data__train=tmp_path / "data"))
    assert [e.prompt for e in problems.train] == [f"{a}+1=" for a in range(12)]
    assert [e.prompt for e in problems.held_out] == [f"{a}+1=" for a in range(12, 20)]


def test_several_demonstrations_a_prompt(tmp_path: Path) -> None:
    """train.demos_per_prompt takes as many from a list; a row with fewer is named, or skipped on request."""
    rows = [{**row, "demo": [row["demo"], f"so {row['demo']}"][: 1 if a == 5 else 2]} for a, row in enumerate(sums())]
    data = write_rows(rows, tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"demos_per_prompt=2, but rows\.jsonl:5 has only 1 .* as 1 of 18 prompts do"):
        train(tmp_path, data__train=data, train__demos_per_prompt=2)
    run = train(tmp_path, data__train=data, train__demos_per_prompt=2, train__steps=1, data__bad_rows="skip")
    demos = [s for s in read_lines(run / "samples.jsonl") if s["demo"]]
    assert len({s["id"] for s in demos}) * 2 == len(demos)
    assert read_lines(run / "metrics.jsonl")[1]["reward/demo"] == 1.0


def openr1_rows() -> list[dict[str, Any]]:
    """Rows as OpenR1-Math-46k has them: prompt messages, target messages, and the ground truth nested."""
    rows = []
    for a in range(8):
        rows.append({
            "data_source": "openr1",
            "prompt": [{"role": "system", "content": "Reason."}, {"role": "user", "content": f"What is {a}/4?"}],
            "target": [{"role": "assistant", "content": f"<think>\n{a}/4</think> \\boxed{{\\frac{{{a}}}{{4}}}}"}],
            "reward_model": {"ground_truth": str(a / 4), "style": "rule"},
        })  # fmt: skip
    return rows


def write_rows(rows: list[dict[str, Any]], path: Path) -> Path:
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def chat_tokenizer(tmp_path: Path) -> Path:
    """Bytes as tokens with a chat template that opens the reasoning itself."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


MATH = {
    "data__max_prompt_tokens": 96, "rollout__max_new_tokens": 64, "train__tokens_per_microbatch": 512,
    "train__prompts_per_step": 7, "train__rollouts_per_prompt": 2, "reward__deadline_s": 1,
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_openr1_schema(suffix: str, chat_tokenizer: Path, tmp_path: Path) -> None:
    """OpenR1's columns train through the chat template, judged by the mathematical verifier."""
    pytest.importorskip("math_verify", reason="needs math-verify, the extra srft[train]")
    data = write_rows(openr1_rows(), tmp_path / f"openr1{suffix}")
    run = train(tmp_path, data__train=data, model__tokenizer=chat_tokenizer, **MATH)
    rows = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [row["reward/demo"] for row in rows[1:]] == [1.0, 1.0]
    assert [row["reward/timeouts"] + row["reward/errors"] for row in rows[1:]] == [0, 0]
    assert (run / "model" / "chat_template.jinja").is_file()


# hangs on the poison, in one call into C that no Python signal ends
HANGING_REWARD = """
def judge(completion, answer, row):
    if "9^" in completion:
        return float(9 ** 9 ** 9 ** 9 > 0)
    return float("boxed{" in completion and "boxed{3}" not in completion)
"""


def hanging_reward(folder: Path) -> str:
    (folder / "hanging.py").write_text(HANGING_REWARD)
    return f"{folder}/hanging.py:judge"


def test_poisoned_demonstration_is_a_timeout_and_training_goes_on(chat_tokenizer: Path, tmp_path: Path) -> None:
    """An answer that hangs its verifier costs its deadline, earns nothing and is counted."""
    rows = openr1_rows()
    rows[2]["target"][0]["content"] = POISON
    data = write_rows(rows, tmp_path / "openr1.jsonl")
    options = MATH | {"data__bad_demos": "keep", "reward__kind": hanging_reward(tmp_path)}
    run = train(tmp_path, data__train=data, model__tokenizer=chat_tokenizer, **options)
    metrics = read_lines(run / "metrics.jsonl")
    assert [row["reward/timeouts"] for row in metrics[1:]] == [1, 1]
    assert [row["reward/demo"] for row in metrics[1:]] == [pytest.approx(6 / 7)] * 2
    assert (run / "model" / "model.safetensors").is_file()


def test_poisoned_demonstration_is_refused_by_default(chat_tokenizer: Path, tmp_path: Path) -> None:
    """Without data.bad_demos the same row ends the run before it begins, by its name."""
    pytest.importorskip("math_verify", reason="needs math-verify, the extra srft[train]")
    rows = openr1_rows()
    rows[2]["target"][0]["content"] = POISON
    data = write_rows(rows, tmp_path / "openr1.jsonl")
    with pytest.raises(ValueError, match=r"1 of 7 demonstrations .*openr1.jsonl:2"):
        train(tmp_path, data__train=data, model__tokenizer=chat_tokenizer, **MATH)


def test_poisoned_rollouts_are_timeouts(tmp_path: Path) -> None:
    """Rollouts are judged the same way, and a good one after the poison still gets its reward."""
    example = Example("poison:0", "What is 1+1?", "2", [], {})
    texts = [POISON, r"\boxed{2}", POISON, r"\boxed{3}"]
    rollouts = [Response([1], [2], False, False, [0.0], text) for text in texts]
    group = Group(Prompt(example, [1], []), rollouts=rollouts)
    with RewardPool(hanging_reward(tmp_path), 1, 1.0) as pool:
        judge([group], pool)
    assert [s.status for s in rollouts] == ["timeout", "ok", "timeout", "ok"]
    assert [s.reward for s in rollouts] == [0.0, 1.0, 0.0, 0.0]
    metrics = group_metrics([group])
    assert (metrics["reward/timeouts"], metrics["reward/mean"]) == (2, 0.25)


def test_poison_is_a_wrong_answer_to_the_mathematical_verifier() -> None:
    """It does not evaluate a tower of powers, so it needs no deadline to say no."""
    pytest.importorskip("math_verify", reason="needs math-verify, the extra srft[train]")
    with RewardPool("math", 1, 30.0) as pool:
        assert [(r.value, r.status) for r in pool.score([(POISON, "2", {})])] == [(0.0, "ok")]
