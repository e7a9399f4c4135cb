"""Small tokenizers with chat templates in the manner of published models, one token a character."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# the roles user and model in turn, no system turn, text stripped
GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "<bos>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# a space before the answer and one before the end token
MISTRAL = (
    "<bos>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
# opens the thought in the prompt, and leaves earlier thoughts out
R1 = (
    "<bos>{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<eos>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# closes an empty thought in the prompt where thinking is off, and shows one in the last answer
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# no tokens of its own: what ends a turn is plain text
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TOKENS = (
    "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|User|>", "<|Assistant|>",
)  # fmt: skip


def char_tokenizer(
    template: str | None = None, *, frame: str = "$A", thoughts: str = "text"
) -> PreTrainedTokenizerFast:
    """One token a character and the tokens of the templates; <bos> 0 and <eos> 1, ``frame`` says which surround a text.

    ``thoughts`` makes <think> and </think> characters ("text"), tokens ("token") or special tokens ("special").
    """
    characters = [chr(code) for code in range(32, 127)] + ["\n", "é", "√"]
    vocabulary = {token: index for index, token in enumerate(["<bos>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in TOKENS])
    if thoughts != "text":
        special = thoughts == "special"
        words = [AddedToken(token, normalized=False, special=special) for token in ("<think>", "</think>")]
        (tokenizer.add_special_tokens if thoughts == "special" else tokenizer.add_tokens)(words)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    extra = [*TOKENS, *(("<think>", "</think>") if thoughts == "special" else ())]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<unk>",
        extra_special_tokens=extra, chat_template=template,
    )  # fmt: skip


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The characters behind ids, special tokens included."""
    return "".join(tokenizer.convert_ids_to_tokens(ids))
