"""What the vLLM tests share: a tiny model in a folder, an engine on it, and a look at its processes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import tokenizers
import torch
import transformers

from srft.engine.vllm import VllmEngine

# not a multiple of the 64 rows that vLLM pads the vocabulary to
VOCAB = 117
EOS = 5
# vLLM on CPU caches prefixes in blocks of 128 tokens; a longer prompt fills one
MAX_LEN = 192


def tiny_model(*, tied: bool, seed: int) -> transformers.PreTrainedModel:
    """A two-layer Qwen2 with weights large enough that its distributions are far from flat."""
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LEN,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    model = transformers.Qwen2ForCausalLM(config).float().eval()
    for name, parameter in model.named_parameters():
        # Qwen2 starts its biases at 0, which would hide one that is not updated
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def save_model(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """Write the folder an engine is started from, with a generation config that would spoil the sampling."""
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCAB)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=f"w{EOS}")
    tokenizer.save_pretrained(folder)
    spoiler = {"do_sample": True, "temperature": 0.1, "top_k": 1, "repetition_penalty": 2.0}
    (folder / "generation_config.json").write_text(json.dumps(spoiler))
    return folder


def start(folder: Path, **overrides: object) -> VllmEngine:
    """A one-thread engine whose log is in its model's folder."""
    settings = {"dtype": "float32", "max_model_len": MAX_LEN, "num_threads": 1, **overrides}
    return VllmEngine(folder, log_path=folder / "engine.log", **settings)


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def live_members(session: int) -> list[int]:
    """Processes of a session that are not zombies."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # the name may hold spaces; after it: state, parent, group, session
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_session) == session and state != "Z":
            members.append(int(path.parent.name))
    return members


def assert_gone(session: int) -> None:
    """Nothing of the session is left within 10 seconds."""
    deadline = time.monotonic() + 10
    while (left := live_members(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
