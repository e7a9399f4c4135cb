"""The recipe of the paper from end to end on a tiny model of its architecture: prompts, a step, the evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from srft import evaluate, train
from srft.evaluation.answering import as_prompts
from srft.evaluation.sets import SETS, read_set
from srft.evaluation.subject import find_subject
from srft.options import load_config
from srft.policy.model import load_tokenizer
from srft.responses import Group
from tests.trainer.runs import ROOT, read_lines

RECIPE = str(ROOT / "recipes" / "qwen2.5-math-7b.toml")
END = "<|endoftext|>"
SYSTEM = (
    "Your task is to follow a systematic, thorough reasoning process before providing the final solution. This "
    "involves analyzing, summarizing, exploring, reassessing, and refining your thought process through multiple "
    "iterations. Structure your response into two sections: Thought and Solution. In the Thought section, present your "
    'reasoning using the format: "<think>\n {thoughts} </think>\n". Each thought should include detailed analysis, '
    'brainstorming, verification, and refinement of ideas. After "</think>\n," in the Solution section, provide the '
    "final, logical, and accurate answer, clearly derived from the exploration in the Thought section. If applicable, "
    "include the answer in \\boxed{} for closed-form results like multiple choices or mathematical solutions."
)
# what the published checkpoint comes with, in its shape: a system turn of its own, and turns that end in <|im_end|>
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nPlease reason step by step, and put your final answer "
    "within \\boxed{}.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROBLEMS = {"What is $1+1$?": "2", "What is $2\\cdot 3$?": "6", "Solve $x-4=0$ for $x$.": "4", "Find $9-8$.": "1"}
# rows as each set is passed on, by name
ROWS = {
    "aime24": {"problem": "How many?", "answer": "025"},
    "aime25": {"problem": "How many more?", "answer": "70"},
    "amc": {"problem": "What is $m+n$?", "answer": "142.0"},
    "math500": {"problem": "Compute $\\frac12+\\frac12$.", "answer": "1"},
    "minerva": {"problem": "How heavy is it, in kg?", "answer": "5"},
    "olympiadbench": {"question": "Find all $x$.", "final_answer": ["$1$"], "context": None},
    "arc_c": {"question": "Which is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"},
    "gpqa_d": {
        "Question": "Which spin?", "Correct Answer": "1/2", "Incorrect Answer 1": "1", "Incorrect Answer 2": "2",
        "Incorrect Answer 3": "3",
    },
    "mmlu_pro": {"question": "Which law?", "options": ["Ohm's", "Hooke's"], "answer_index": 1},
}  # fmt: skip


def rendered(question: str) -> str:
    """A prompt as LUFFY puts it."""
    return f"{SYSTEM}\nUser: This is the problem:\n{question}\nAssistant: <think>\n"


def solution(answer: str) -> str:
    return f"We look at it closely.\n</think>\n\nThe answer is $\\boxed{{{answer}}}$."


def checkpoint(folder: Path) -> Path:
    """A Qwen2 of one block with the published positions, and a byte-level tokenizer of the prompts' words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [rendered(question) + solution(answer) for question, answer in PROBLEMS.items()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in (END, "<|im_start|>", "<|im_end|>")])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, chat_template=CHATML,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    ).save_pretrained(folder)  # fmt: skip
    end = tokenizer.token_to_id(END)
    shape = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size() + 5, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    return folder


def openr1_rows() -> list[dict[str, Any]]:
    """The training set's schema."""
    return [
        {
            "data_source": "math", "ability": "math",
            "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
            "target": [{"role": "assistant", "content": f"<think>\n{solution(answer)}"}],
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"index": index, "split": "train"},
        }
        for index, (question, answer) in enumerate(PROBLEMS.items())
    ]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the checkpoint, the training set, the held-out set and those of the evaluation."""
    folder = tmp_path_factory.mktemp("paper")
    checkpoint(folder / "Qwen2.5-Math")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(openr1_rows()), folder / "openr1.parquet")
    for name, row in ROWS.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ran(place: Path) -> tuple[Path, list[Group]]:
    """The run that the recipe makes with other paths and sizes, and the groups it learned from."""
    words = [
        f"runs_dir={place / 'runs'}", f"model.name={place / 'Qwen2.5-Math'}", f"data.train={place / 'openr1.parquet'}",
        f"data.eval={place / 'math500.jsonl'}", "engine.kind=hf", "train.device=cpu", "reward.workers=1",
        "train.steps=1", "train.prompts_per_step=2", "rollout.max_new_tokens=48", "train.page=false",
    ]  # fmt: skip
    seen: list[Group] = []
    learn = train.learn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learn", lambda learner, groups, step: seen.extend(groups) or learn(learner, groups, step))
        train.fit(load_config([RECIPE, *words]))
    return place / "runs" / "qwen2.5-math-7b", seen


def test_prompts_are_those_of_luffy(ran: tuple[Path, list[Group]]) -> None:
    """Byte by byte, whichever turn of the row the system prompt came in; nothing of the checkpoint's own template."""
    run, groups = ran
    tokenizer = load_tokenizer(load_config([str(run / "config.toml"), f"model.name={run / 'model'}"]).model)
    assert len(groups) == 2
    for group in groups:
        (question,) = [turn["content"] for turn in group.prompt.example.prompt if turn["role"] == "user"]
        assert tokenizer.decode(group.prompt.prompt_ids) == rendered(question)


def test_responses_go_on_inside_the_thought(ran: tuple[Path, list[Group]]) -> None:
    """Seven rollouts and a demonstration; that ends with the end token, and is right."""
    run, groups = ran
    tokenizer = load_tokenizer(load_config([f"model.name={run / 'model'}"]).model)
    for group in groups:
        assert (len(group.rollouts), len(group.demos)) == (7, 1) and group.prompt.opened == "<think>\n"
        assert all(rollout.text.startswith("<think>\n") for rollout in group.rollouts)
        (demo,) = group.demos
        assert tokenizer.decode(demo.response_ids) == solution(group.prompt.example.answer) + END
        assert demo.response_ids.count(tokenizer.eos_token_id) == 1 and demo.reward == 1
        assert all(i < len(tokenizer) for i in demo.response_ids)


def test_the_step_is_one_of_srft(ran: tuple[Path, list[Group]]) -> None:
    """Every figure of its row is finite, and the weights have moved."""
    run, groups = ran
    row = read_lines(run / "metrics.jsonl")[-1]
    assert row["step"] == 1 and all(math.isfinite(v) for v in row.values() if isinstance(v, float))
    assert row["loss/demo_sft"] > 0 and row["grad_norm"] > 0
    assert any(demo.advantage > 0 for group in groups for demo in group.demos)


def test_what_the_run_saves_has_the_window_and_the_template(ran: tuple[Path, list[Group]], place: Path) -> None:
    """Whoever loads model/ without the recipe gets what was trained."""
    run, _ = ran
    saved = json.loads((run / "model" / "config.json").read_text())
    assert (saved["rope_parameters"]["rope_theta"], saved["max_position_embeddings"]) == (40000, 16384)
    before = json.loads((place / "Qwen2.5-Math" / "config.json").read_text())
    assert (before["rope_parameters"]["rope_theta"], before["max_position_embeddings"]) == (10000, 4096)
    template = load_config([RECIPE]).model.chat_template
    assert load_tokenizer(load_config([f"model.name={run / 'model'}"]).model).chat_template == template


def test_the_evaluation_stands_beside_the_papers_row(
    ran: tuple[Path, list[Group]], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documented command over the nine sets, with less room for answers."""
    run, _ = ran
    monkeypatch.chdir(place)
    evaluate.main([str(run), *(f"{name}={name}.jsonl" for name in SETS), "--max-new-tokens", "4"])
    table = (run / "evaluation" / "table.md").read_text()
    for name, known in SETS.items():
        title, metric = known.title, "avg@32" if name in ("aime24", "aime25", "amc") else "pass@1"
        assert f"| {title} | 1 of 1 | {metric} |" in table
        assert f"{title} is not as in the paper: 4 for 8192 of max_new_tokens." in table
    srft = "| SRFT | 35.3 | 74.3 | 89.8 | 39.7 | 58.3 | 85.3 | 46.4 | 55.9 | 59.5 | 62.5 |"
    assert srft in table and "| qwen2.5-math-7b | " in table
    page = (run / "evaluation" / "report.html").read_text()
    assert "Beside the paper" in page and "SRFT" in page and "62.5" in page


@pytest.mark.parametrize("what", ["run", "checkpoint"])
def test_the_sets_are_put_as_the_training_set_is(ran: tuple[Path, list[Group]], place: Path, what: str) -> None:
    """Of a run by its own options, of any other model by the recipe: the same bytes, and room for 8,192 tokens."""
    run, _ = ran
    subject = find_subject(str(run), []) if what == "run" else find_subject(str(place / "Qwen2.5-Math"), [RECIPE])
    assert subject.positions == 16384
    tokenizer = load_tokenizer(subject.config.model)
    for name in ("math500", "olympiadbench"):
        (prompt,) = as_prompts(read_set(f"{name}={place / name}.jsonl", subject.config), subject.config, tokenizer)
        assert tokenizer.decode(prompt.prompt_ids) == rendered(ROWS[name].get("problem") or ROWS[name]["question"])
    (choice,) = as_prompts(read_set(f"arc_c={place / 'arc_c'}.jsonl", subject.config), subject.config, tokenizer)
    right, other = ("A", "B") if choice.example.answer == "A" else ("B", "A")
    lines = sorted([f"({right}) fire", f"({other}) ice"])
    assert tokenizer.decode(choice.prompt_ids) == rendered("\n".join(["Which is hot?", "", *lines]))
