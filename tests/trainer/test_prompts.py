"""Prompts and demonstrations as a policy sees them: chat templates, thoughts, end tokens, what a verifier is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from srft.data.examples import Example
from srft.data.prompts import Prompt, build_prompts
from srft.data.templates import PromptFormat, completion_text, continue_prompt, opening, stop_token_ids
from tests.trainer.chat import CHATML, GEMMA, LLAMA3, MISTRAL, PLAIN, QWEN3, R1, char_tokenizer, text_of

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the data files at ../shared/data")
QUESTION = [{"role": "user", "content": "1+1?"}]
THOUGHT = "<think>\nEasy.\n</think>\n\n2"
OFF = {"enable_thinking": False}


def example(prompt: Any = "2+3=", *demos: str) -> Example:
    """A small example."""
    return Example("t:0", prompt, "5", list(demos), {})


def built(tokenizer: PreTrainedTokenizerFast, row: Example, **options: Any) -> Prompt:
    """The one prompt that an example makes."""
    prompts = PromptFormat(tokenizer, **options)
    ((prompt,), _) = build_prompts([row], prompts, max_prompt_tokens=200, max_demo_tokens=200)
    return prompt


def rendered(tokenizer: PreTrainedTokenizerFast, prompt: Any = "2+3=", **options: Any) -> str:
    return PromptFormat(tokenizer, **options).render("t:0", prompt)


# templates


def test_plain_prompt_is_taken_as_it_is() -> None:
    """Without a template the prompt's own characters are the prompt; a system text goes in front."""
    tokenizer = char_tokenizer()
    assert text_of(tokenizer, built(tokenizer, example()).prompt_ids) == "2+3="
    assert rendered(tokenizer, system="Add.") == "Add.\n\n2+3="


def test_chat_falls_back_to_plain_text_only_without_a_template() -> None:
    """chat=True uses the template where there is one."""
    assert rendered(char_tokenizer()) == "2+3="
    assert rendered(char_tokenizer(CHATML), "2+3?\n", system="Add.") == (
        "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered(char_tokenizer(CHATML), "2+3?\n", chat=False) == "2+3?\n"


def test_messages_always_use_the_template() -> None:
    """Message prompts are templated whatever ``chat`` says, a given system text replaces theirs."""
    turns = [{"role": "system", "content": "Old."}, {"role": "user", "content": "2+3?"}]
    tokenizer = char_tokenizer(CHATML)
    for chat in (True, False):
        assert rendered(tokenizer, turns, chat=chat).startswith(
            "<|im_start|>system\nOld.<|im_end|>\n<|im_start|>user\n2+3?"
        )
    new = rendered(tokenizer, turns, system="New.", chat=False)
    assert "New." in new and "Old." not in new


def test_one_user_turn_without_a_template_is_plain_text() -> None:
    """Messages of one user turn need no template, a system turn stands before them; a conversation does."""
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+3?"}]
    tokenizer = char_tokenizer()
    assert rendered(tokenizer, turns) == "Add.\n\n2+3?\n"
    assert rendered(tokenizer, turns, system="New.") == "New.\n\n2+3?\n"
    _, counts = build_prompts(
        [example(turns), example()], PromptFormat(tokenizer), max_prompt_tokens=99, max_demo_tokens=9
    )
    assert counts["plain_messages"] == 1
    with pytest.raises(ValueError, match="t:0 is a conversation of several turns.*no chat template"):
        rendered(tokenizer, [*QUESTION, {"role": "assistant", "content": "2"}, *QUESTION])


def test_template_that_refuses_is_one_line_with_the_example() -> None:
    """What a template raises, such as Gemma's on a system turn, names the example and the roles."""
    with pytest.raises(ValueError, match=r"t:0: the chat template refuses turns of system, user: System role not"):
        rendered(char_tokenizer(GEMMA), QUESTION, system="Add.")


@pytest.mark.parametrize("template", ["<bos>" + CHATML, GEMMA, LLAMA3, R1], ids=["chatml", "gemma", "llama3", "r1"])
def test_encoded_chat_prompt_is_what_the_tokenizer_itself_makes(template: str) -> None:
    """Ids equal apply_chat_template(tokenize=True), with no second start token."""
    tokenizer = char_tokenizer(template, frame="<bos> $A")
    ids = built(tokenizer, example(QUESTION)).prompt_ids
    assert ids == tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("frame", ["$A", "<bos> $A", "<bos> $A <eos>"], ids=["bare", "bos", "bos-eos"])
def test_plain_prompt_stays_open_and_demo_is_closed_once(frame: str) -> None:
    """A start token leads the prompt, an end token never closes it; the demonstration ends in one EOS."""
    tokenizer = char_tokenizer(frame=frame)
    prompt = built(tokenizer, example("2+3=", "#5", "#5<eos>"))
    assert text_of(tokenizer, prompt.prompt_ids) == ("<bos>2+3=" if "bos" in frame else "2+3=")
    assert [text_of(tokenizer, ids) for ids in prompt.demo_ids] == ["#5<eos>", "#5<eos>"]


@pytest.mark.parametrize(
    ("template", "closing"),
    [
        (CHATML, "#5<|im_end|>"),
        (GEMMA, "#5<end_of_turn>"),
        (LLAMA3, "#5<|eot_id|>"),
        (MISTRAL, " #5 <eos>"),
        (QWEN3, "#5<|im_end|>"),
        (PLAIN, "#5<eos>"),
        (None, "#5<eos>"),
    ],
    ids=["chatml", "gemma", "llama3", "mistral", "qwen3", "plain", "none"],
)
def test_demonstration_ends_as_the_template_ends_a_turn(template: str | None, closing: str) -> None:
    """Prompt and demonstration together are the conversation as the template writes it, up to its end token."""
    tokenizer = char_tokenizer(template)
    prompt = built(tokenizer, example(QUESTION, "#5"))
    assert [text_of(tokenizer, ids) for ids in prompt.demo_ids] == [closing]
    if template not in (None, PLAIN, QWEN3):
        whole = tokenizer.apply_chat_template([*QUESTION, {"role": "assistant", "content": "#5"}], tokenize=False)
        assert whole.rstrip("\n") == text_of(tokenizer, prompt.prompt_ids + prompt.demo_ids[0])


def test_plain_text_beside_a_template_ends_in_the_tokenizers_token() -> None:
    """With chat=False text prompts are no turns, so that the template does not end their demonstrations."""
    tokenizer = char_tokenizer(CHATML)
    assert text_of(tokenizer, built(tokenizer, example("1+1=", "#2"), chat=False).demo_ids[0]) == "#2<eos>"


def test_stop_tokens_are_those_of_tokenizer_model_and_template() -> None:
    """One id, a list or none from generation_config, the template's end, and a stop text that is itself a token."""
    tokenizer = char_tokenizer(CHATML)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<eos>", "<|im_end|>", "<|eot_id|>")}
    prompts = PromptFormat(tokenizer)
    assert stop_token_ids(prompts, None, []) == tuple(sorted([ids["<eos>"], ids["<|im_end|>"]]))
    assert stop_token_ids(prompts, 7, []) == tuple(sorted([7, ids["<eos>"], ids["<|im_end|>"]]))
    assert stop_token_ids(prompts, [7, ids["<eos>"]], ["<|eot_id|>", "x"]) == tuple(sorted({7, *ids.values()}))
    assert stop_token_ids(PromptFormat(char_tokenizer()), [7, 8], []) == (1, 7, 8)


def test_template_options_reach_the_template() -> None:
    """enable_thinking=false closes the thought in the prompt; a name that the template does not use is refused."""
    tokenizer = char_tokenizer(QWEN3)
    assert rendered(tokenizer, QUESTION).endswith("<|im_start|>assistant\n")
    assert rendered(tokenizer, QUESTION, template_kwargs=OFF).endswith("assistant\n<think>\n\n</think>\n\n")
    with pytest.raises(ValueError, match="does not use data.chat_template_kwargs.enable_thinkin;"):
        PromptFormat(tokenizer, template_kwargs={"enable_thinkin": False})
    with pytest.raises(ValueError, match="data.chat_template_kwargs.add_generation_prompt is set by the trainer"):
        PromptFormat(tokenizer, template_kwargs={"add_generation_prompt": False})
    with pytest.raises(ValueError, match="no chat template"):
        PromptFormat(char_tokenizer(), template_kwargs=OFF)


@needs_data
def test_real_chat_template() -> None:
    """A published tokenizer's template gives the ids that it gives by itself, and ends a turn in its end token."""
    folder = DATA / "tokenizers"
    config = json.loads((folder / "minimind_tokenizer_config.json").read_text())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "minimind_tokenizer.json"),
        chat_template=config["chat_template"],
        eos_token="<|endoftext|>",
    )
    prompt = built(tokenizer, example("2+3?", "5"), system="Add.")
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+3?"}]
    assert prompt.prompt_ids == tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert text_of(tokenizer, prompt.demo_ids[0]) == "5<|im_end|>"


# thoughts


@pytest.mark.parametrize("thoughts", ["text", "token", "special"])
@pytest.mark.parametrize(
    ("template", "options", "demo", "continued"),
    [
        # the prompt opens the thought: it is not opened again, and closed where there is none
        (R1, {}, THOUGHT, "Easy.\n</think>\n\n2<eos>"),
        (R1, {}, "<think>Easy.</think>2", "Easy.</think>2<eos>"),
        (R1, {}, "\n<think>\nEasy.\n</think>2", "Easy.\n</think>2<eos>"),
        (R1, {}, "Easy.\n</think>\n\n2", "Easy.\n</think>\n\n2<eos>"),
        (R1, {}, "2", "\n</think>\n\n2<eos>"),
        # the prompt closes it: the demonstration's is left out
        (QWEN3, OFF, THOUGHT, "2<|im_end|>"),
        (QWEN3, OFF, "2", "2<|im_end|>"),
        # the prompt leaves it open to think
        (QWEN3, {}, THOUGHT, f"{THOUGHT}<|im_end|>"),
        (CHATML, {}, THOUGHT, f"{THOUGHT}<|im_end|>"),
    ],
    ids=["opened", "opened-no-newline", "opened-newline-first", "opened-already", "opened-no-thought", "closed",
         "closed-no-thought", "free", "chatml"],
)  # fmt: skip
def test_demonstration_goes_on_where_the_prompt_ends(
    template: str, options: dict[str, Any], demo: str, continued: str, thoughts: str
) -> None:
    """A thought is opened once and closed once over prompt and demonstration, however the template treats it."""
    tokenizer = char_tokenizer(template, thoughts=thoughts)
    prompt = built(tokenizer, example(QUESTION, demo), template_kwargs=options)
    assert text_of(tokenizer, prompt.demo_ids[0]) == continued
    whole = text_of(tokenizer, prompt.prompt_ids + prompt.demo_ids[0])
    assert whole.count("<think>") == whole.count("</think>") <= 1


def test_changed_thoughts_are_counted() -> None:
    """How many demonstrations were given an empty thought, and how many lost theirs."""
    rows = [example(QUESTION, THOUGHT, "2"), example(QUESTION, "3")]
    for template, options, counted in ((R1, {}, (2, 0)), (QWEN3, OFF, (0, 1))):
        prompts = PromptFormat(char_tokenizer(template), template_kwargs=options)
        _, counts = build_prompts(rows, prompts, max_prompt_tokens=200, max_demo_tokens=200)
        assert (counts["closed_thoughts"], counts["dropped_thoughts"]) == counted


def test_a_prompt_that_ends_in_a_bare_think_is_closed_alike() -> None:
    """Without a line end after it, the empty thought brings its own."""
    assert continue_prompt("Q<think>", "2") == ("\n\n</think>\n\n2", "closed")
    assert continue_prompt("Q<think>", "<think>\nx</think>2") == ("\nx</think>2", "")
    assert (opening("Q<think>"), opening("Q<think>\n")) == ("<think>", "<think>\n")
    assert opening("Q<think>\n\n</think>\n\n") == opening("<think>Q") == ""


@pytest.mark.parametrize("thoughts", ["text", "token", "special"])
def test_verifier_sees_the_thought_that_the_prompt_opened(thoughts: str) -> None:
    """What is judged starts with the prompt's "<think>", so that a completion that never closes it is known."""
    tokenizer = char_tokenizer(R1, thoughts=thoughts)
    prompt = built(tokenizer, example(QUESTION))
    assert prompt.opened == "<think>\n"
    ids = tokenizer.encode("so #2</think>#3<eos>", add_special_tokens=False)
    assert completion_text(tokenizer, ids, prompt.opened, ()) == "<think>\nso #2</think>#3"
    assert built(char_tokenizer(QWEN3), example(QUESTION), template_kwargs=OFF).opened == ""


def test_nothing_after_a_stop_text_is_judged() -> None:
    """The text ends with the first stop text, which stays."""
    tokenizer = char_tokenizer()
    ids = tokenizer.encode("a</answer>b</answer>c", add_special_tokens=False)
    assert completion_text(tokenizer, ids, "", ("</answer>", "c")) == "a</answer>"


# limits


def test_build_prompts_skips_and_counts_overlong_examples() -> None:
    """What is exactly at a limit stays whole; one token more and the example goes, and is counted."""
    rows = [example("1234"), example("12345"), example("1", "12"), example("1", "123"), example("1")]
    prompts, counts = build_prompts(
        rows, PromptFormat(char_tokenizer()), max_prompt_tokens=4, max_demo_tokens=3, overlong="skip"
    )
    assert [p.example for p in prompts] == [rows[0], rows[2], rows[4]]
    assert (counts["overlong_prompts"], counts["overlong_demos"]) == (1, 1)
    assert [len(p.prompt_ids) for p in prompts] == [4, 1, 1]
    assert [[len(ids) for ids in p.demo_ids] for p in prompts] == [[], [3], []]


def test_overlong_demonstrations_go_one_by_one() -> None:
    """Of several demonstrations those that fit stay, beside their texts."""
    rows = [example("1", "123", "45", "6"), example("2", "123", "456")]
    (prompt,), counts = build_prompts(
        rows, PromptFormat(char_tokenizer()), max_prompt_tokens=4, max_demo_tokens=3, overlong="skip"
    )
    assert prompt.example.demos == ["45", "6"] and [len(ids) for ids in prompt.demo_ids] == [3, 2]
    assert counts["overlong_demos"] == 3


def test_build_prompts_error_names_numbers_and_options() -> None:
    """The default refuses overlong examples with how many, the longest, and what to set."""
    rows = [example("1234567"), example("1", "12345678"), example("1", "1")]
    prompts = PromptFormat(char_tokenizer())
    with pytest.raises(ValueError) as caught:
        build_prompts(rows, prompts, max_prompt_tokens=4, max_demo_tokens=5)
    message = str(caught.value)
    for part in (
        "1 of 3 examples have a prompt over 4", "longest 7", "1 a demonstration over 5", "longest 9",
        "data.max_prompt_tokens", "rollout.max_new_tokens", "data.overlong=skip",
    ):  # fmt: skip
        assert part in message
    with pytest.raises(ValueError, match="2 of 2 examples"):
        build_prompts([rows[0]] * 2, prompts, max_prompt_tokens=4, max_demo_tokens=5, overlong="skip")


def test_build_prompts_without_demos() -> None:
    """max_demo_tokens=None leaves demonstrations out, however long."""
    ((prompt,), counts) = build_prompts(
        [example("1", "x" * 999)], PromptFormat(char_tokenizer()), max_prompt_tokens=9, max_demo_tokens=None
    )
    assert prompt.demo_ids == prompt.example.demos == [] and not counts.total()


def test_build_prompts_needs_an_end_token() -> None:
    """A tokenizer without EOS is refused unless the template ends a turn with a token."""
    tokenizer = char_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        built(tokenizer, example("1", "2"))
    tokenizer = char_tokenizer(CHATML)
    tokenizer.eos_token = None
    assert text_of(tokenizer, built(tokenizer, example("1", "2")).demo_ids[0]) == "2<|im_end|>"
