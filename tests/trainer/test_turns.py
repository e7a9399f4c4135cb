"""Conversations as tokens: what is said stays as it is, of the templates people use; what these cannot do is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from srft.data.examples import Example, load_examples
from srft.data.messages import split_turns
from srft.data.prompts import Prompt, build_prompts
from srft.data.templates import PromptFormat
from srft.data.turns import heard, refuse_forgetful_template
from srft.dataset import make_prompts, read_problems
from srft.responses import Response
from srft.rewards.pool import RewardPool
from srft.rollout import demonstration
from tests.trainer.chat import CHATML, GEMMA, LLAMA3, MISTRAL, PLAIN, QWEN3, R1, char_tokenizer
from tests.trainer.runs import small_config
from tests.trainer.test_data import write_jsonl

ASSISTANT, TOOL = "assistant", "tool"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SUM = [said(ASSISTANT, "1+2"), said(TOOL, "3"), said(ASSISTANT, "3+4"), said(TOOL, "7"), said(ASSISTANT, "#7")]


def built(form: PromptFormat, demo: Any, prompt: Any = "1+2+4") -> Prompt:
    row = Example("t:0", prompt, "7", [demo], {})
    (prompts, _) = build_prompts([row], form, max_prompt_tokens=99, max_demo_tokens=400)
    return prompts[0]


def pieces(form: PromptFormat, s: Response) -> list[str]:
    """What each turn of a conversation is as text, end tokens and all."""
    texts, at = [], 0
    for tokens in s.spans:
        texts.append("".join(form.tokenizer.convert_ids_to_tokens(s.response_ids[at : at + tokens])))
        at += tokens
    assert at == len(s.response_ids)
    return texts


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
def test_a_demonstration_is_what_the_template_makes_of_the_whole(template: str) -> None:
    """Prompt and turns joined are the rendering of the conversation, and the assistant's own turns are what it said."""
    form = PromptFormat(char_tokenizer(template))
    prompt = built(form, SUM)
    s = demonstration(prompt, 0)
    whole = form.tokenizer.apply_chat_template([said("user", "1+2+4"), *SUM], tokenize=False)
    ids = form.tokenizer.encode(whole, add_special_tokens=False)
    joined = s.prompt_ids + s.response_ids
    assert joined == ids[: len(joined)]
    assert not form.tokenizer.decode(ids[len(joined) :]).strip()
    end = "<|im_end|>" if template is CHATML else "<|eot_id|>"
    assert pieces(form, s)[::2] == [f"1+2{end}", f"3+4{end}", f"#7{end}"]
    assert form.tokenizer.decode(s.own_ids, skip_special_tokens=True) == "1+23+4#7"
    assert s.text == "#7" and s.transcript == "1+2\n[tool] 3\n[assistant] 3+4\n[tool] 7\n[assistant] #7"


def test_plain_text_stands_as_it_is() -> None:
    """Without a template a turn ends with the tokenizer's own token, and what is said follows it."""
    form = PromptFormat(char_tokenizer())
    assert pieces(form, demonstration(built(form, SUM), 0)) == ["1+2<eos>", "3", "3+4<eos>", "7", "#7<eos>"]


@pytest.mark.parametrize(("template", "end"), [(None, "<eos>"), (CHATML, "<|im_end|>")])
def test_a_turn_that_is_not_closed_is_closed_by_what_follows(template: str | None, end: str) -> None:
    """A text of rollout.stop ended it: the end token is read, and not learned from."""
    form = PromptFormat(char_tokenizer(template))
    whole, rest = (heard(form, "?", [said("user", "3")], is_closed=closed) for closed in (False, True))
    assert whole.ids == [form.turn("?").end, *rest.ids]
    assert form.tokenizer.convert_ids_to_tokens(whole.ids)[0] == end


@pytest.mark.parametrize("template", [None, CHATML, LLAMA3])
@pytest.mark.parametrize("role", ["user", "tool"])
def test_templates_that_keep_every_turn_pass(template: str | None, role: str) -> None:
    """And plain text always does."""
    refuse_forgetful_template(PromptFormat(char_tokenizer(template)), role)


@pytest.mark.parametrize(
    ("template", "role", "options", "message"),
    [
        (R1, "user", {}, "does not leave earlier ones as they were.*<think>"),
        (QWEN3, "user", {"enable_thinking": False}, "does not leave earlier ones"),
        (PLAIN, "user", {}, "no token of its own ends"),
    ],
)
def test_templates_that_do_not_are_refused(template: str, role: str, options: dict[str, Any], message: str) -> None:
    """Those that leave thoughts out, and one in which no token ends a turn."""
    form = PromptFormat(char_tokenizer(template), template_kwargs=options)
    with pytest.raises(ValueError, match=message):
        refuse_forgetful_template(form, role)


def test_a_template_without_the_role_is_refused() -> None:
    """In one line with what it says."""
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages %}{% if m.role == 'tool' %}"
                              "{{ raise_exception('no tools') }}{% endif %}", 1)  # fmt: skip
    form = PromptFormat(char_tokenizer(template))
    refuse_forgetful_template(form, "user")
    with pytest.raises(ValueError, match="tool: no tools|no tools"):
        refuse_forgetful_template(form, "tool")


@pytest.mark.parametrize("template", [GEMMA, MISTRAL])
def test_tokens_go_on_whatever_the_template(template: str) -> None:
    """With turns of the user in place of a tool's: the assistant's own turns are learned from, its end tokens too."""
    form = PromptFormat(char_tokenizer(template))
    demo = [said("user" if turn["role"] == TOOL else ASSISTANT, turn["content"]) for turn in SUM]
    refuse_forgetful_template(form, "user")
    s = demonstration(built(form, demo), 0)
    assert form.tokenizer.decode(s.own_ids, skip_special_tokens=True).split() in (["1+23+4#7"], ["1+2", "3+4", "#7"])
    assert s.response_ids[-1] == form.turn("?").end


def test_rows_are_read_as_conversations(tmp_path: Path) -> None:
    """The prompt ends before the assistant's first turn; without ``turns`` before its last one, as ever."""
    messages = [said("system", "Add."), said("user", "1+2+4"), *SUM]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages, "answer": "7"}])
    (whole,) = load_examples(path, turns=True)
    assert whole.prompt == messages[:2] and whole.demos == [SUM]
    (last,) = load_examples(path)
    assert last.prompt == messages[:-1] and last.demos == ["#7"]
    beside = write_jsonl(tmp_path / "beside.jsonl", [{"prompt": "1+2+4", "demo": SUM, "answer": "7"}])
    (row,) = load_examples(beside, turns=True)
    assert (row.prompt, row.demos) == ("1+2+4", [SUM])
    with pytest.raises(ValueError, match="several turns of the assistant"):
        load_examples(beside)
    short = write_jsonl(tmp_path / "short.jsonl", [{"prompt": "1+2", "demo": "#3", "answer": "3"}])
    assert load_examples(short, turns=True)[0].demos == ["#3"]


@pytest.mark.parametrize(("turns", "own"), [("all", "1+2~3+4~#7~"), ("auto", "#7~"), ("last", "#7~")])
def test_supervised_runs_may_learn_from_all_turns(tmp_path: Path, turns: str, own: str) -> None:
    """Without an environment on request; the assistant's own tokens are all that counts."""
    rows = [{"messages": [said("user", f"{i}+2+4"), *SUM], "answer": "7"} for i in range(4)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = small_config(tmp_path, data__train=path, data__turns=turns, method__name="sft", train__prompts_per_step=2)
    tokenizer = char_tokenizer(CHATML)
    with RewardPool("exact", 1, 5.0) as pool:
        prompts = make_prompts(
            config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_new_tokens": 200}),
                                      "data": config.data.model_copy(update={"max_prompt_tokens": 200})}),
            read_problems(config), tokenizer, pool,
        ).train  # fmt: skip
    s = demonstration(prompts[0], 0)
    assert tokenizer.decode(s.own_ids).replace("<|im_end|>", "~").replace(" ", "") == own


def test_turns_keep_their_thoughts_and_two_in_a_row_are_refused() -> None:
    """Of every turn, as of the last one."""
    first = {**said(ASSISTANT, "1+2"), "reasoning_content": "add"}
    halves = split_turns([said("user", "?"), first, said(TOOL, "3"), said(ASSISTANT, "#3")], "here")
    assert halves is not None and halves[1][0]["content"] == "<think>\nadd\n</think>\n\n1+2"
    with pytest.raises(ValueError, match="here: the assistant has two turns in a row"):
        split_turns([said("user", "?"), said(ASSISTANT, "a"), said(ASSISTANT, "b"), said(TOOL, "c"), first], "here")
    assert split_turns("no conversation", "here") is None
