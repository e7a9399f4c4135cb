"""Training runs of TRL's GRPOTrainer on a tiny model, for the tests of its patched loss head."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
import transformers
import trl
import trl.trainer.utils
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

# two iterations, so that in every other step the ratios are not 1; a narrow clip, so that some are clipped
OFF_POLICY = {"num_iterations": 2, "epsilon": 0.1}
CASES = {
    "grpo-kl": {"loss_type": "grpo", "beta": 1.0},
    "grpo-delta": {"loss_type": "grpo", "delta": 1.2, **OFF_POLICY},
    "bnpo": {"loss_type": "bnpo", **OFF_POLICY},
    "dr_grpo-kl": {"loss_type": "dr_grpo", "beta": 0.1, "use_bias_correction_kl": False, **OFF_POLICY},
    "dapo-accumulated": {"loss_type": "dapo", "gradient_accumulation_steps": 2, **OFF_POLICY},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.5, **OFF_POLICY},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", **OFF_POLICY},
    "high-entropy-tokens": {"loss_type": "dapo", "top_entropy_quantile": 0.4, **OFF_POLICY},
    "entropy-bonus": {"loss_type": "dapo", "entropy_coef": 0.5, **OFF_POLICY},
    "truncated-masked": {"loss_type": "bnpo", "mask_truncated_completions": True},
    "lora-kl": {
        "loss_type": "bnpo",
        "beta": 0.1,
        "use_bias_correction_kl": False,
        "peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    },
}
VOCAB, STEPS, BATCH, LENGTH = 211, 5, 8, 10
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a word: <pad> 0, <eos> 1, and the words w2, w3, …"""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{index}": index for index in range(2, VOCAB)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Share of even tokens, less a little for length, so that it varies within every group."""
    return [sum(t % 2 == 0 for t in ids) / len(ids) - 0.02 * len(ids) for ids in completion_ids]


def save_model(folder: Path) -> Path:
    """Save a two-layer Qwen2 of random weights that ends a completion now and then."""
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, tie_word_embeddings=False))
    model.lm_head.weight.data[1] += 0.3
    model.save_pretrained(folder)
    return folder


def make_trainer(folder: Path, model: torch.nn.Module | None = None, **options: object) -> trl.GRPOTrainer:
    """A trainer of ``model``, or of the saved one, on five prompts, which samples and logs at every step."""
    peft_config = options.pop("peft_config", None)
    config = trl.GRPOConfig(
        output_dir=str(folder / "run"),
        **{
            "per_device_train_batch_size": BATCH,
            "num_generations": 4,
            "max_completion_length": LENGTH,
            "max_steps": STEPS,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "temperature": 0.7,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            **options,
        },
    )
    prompts = ["w5 w9 w13", "w40 w2", "w77", "w9 w9 w8 w7", "w101 w3 w150"]
    return trl.GRPOTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) if model is None else model,
        reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


class Run(NamedTuple):
    """What a training run leaves behind."""

    logs: list[dict[str, float]]  # one dictionary a step
    start: torch.Tensor  # every parameter
    end: torch.Tensor

    def series(self, key: str) -> torch.Tensor:
        """The values of ``key`` at every step."""
        return torch.tensor([entry[key] for entry in self.logs], dtype=torch.float64)


def flat(trainer: trl.GRPOTrainer) -> torch.Tensor:
    """A copy of every parameter, in one vector."""
    return torch.cat([p.detach().double().flatten() for p in trainer.model.parameters()])


def train(folder: Path, **options: object) -> Run:
    """Train and keep the logs of every step and the parameters before and after."""
    trainer = make_trainer(folder, **options)
    start = flat(trainer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == STEPS
    return Run(logs, start, flat(trainer))


def drop_masked_positions(patch: pytest.MonkeyPatch) -> None:
    """Let TRL hand over rows as it does on a GPU, without those whose label is masked."""
    patch.setattr(trl.trainer.utils, "_use_triton", lambda device: True)


def assert_training_agrees(
    folder: Path, options: dict, patched: Callable[[], AbstractContextManager], compact: bool
) -> None:
    """Five steps log the same losses, gradient norms and entropies with the patch, and end at the same parameters."""
    expected = train(folder, **options)
    assert expected.series("loss").abs().max() > 1e-3
    assert expected.series("grad_norm").min() > 0.1
    if "clip_ratio/region_mean" in expected.logs[0] and "num_iterations" in options:
        assert 0.05 < expected.series("clip_ratio/region_mean")[1] < 0.95
    with pytest.MonkeyPatch.context() as patch, patched():
        if compact:
            drop_masked_positions(patch)
        actual = train(folder, **options)
    for key in {"loss", "grad_norm", "entropy", "kl"} & set(expected.logs[0]):
        torch.testing.assert_close(actual.series(key), expected.series(key), rtol=1e-5, atol=1e-5)
    assert (actual.end - expected.end).norm() < 1e-3 * (expected.end - expected.start).norm()
