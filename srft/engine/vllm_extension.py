"""What ``vllm serve`` needs so that a trainer can give it weights.

Start it with ``--worker-extension-cls srft.engine.vllm_extension.Weights``, in an environment that has this package; of
what that needs itself, nothing is imported. ``srft.engine.http`` calls the methods through ``/collective_rpc``.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from srft.engine.vllm_worker import load_files

PROTOCOL = 1
"""Counts what trainer and server must agree on."""


class Weights:
    """Methods that vLLM adds to its workers."""

    srft_label = ""
    """Which weights the worker has; empty for those that it was started with, or a mix."""

    def srft_about(self) -> dict[str, Any]:
        """Say what is served, how, and with which weights."""
        config = self.model_config  # type: ignore[attr-defined]
        text = config.hf_text_config
        return {
            "protocol": PROTOCOL,
            "label": self.srft_label,
            "dtype": str(config.dtype).removeprefix("torch."),
            "logprobs_mode": str(config.logprobs_mode),
            "max_model_len": config.max_model_len,
            "model": {
                "architecture": config.architectures[0],
                "vocab_size": config.get_vocab_size(),
                "hidden_size": text.hidden_size,
                "num_hidden_layers": text.num_hidden_layers,
            },
        }

    def srft_load(self, folder: str, label: str) -> dict[str, Any]:
        """Replace the weights by those of a folder; the prefix cache is the caller's to drop.

        Args:
            folder: Holds safetensors files with every weight.
            label: What ``srft_about`` calls them from now on.

        Returns:
            What went wrong under "error", or nothing.
        """
        self.srft_label = ""
        try:
            files = sorted(Path(folder).glob("*.safetensors"))
            if not files:
                raise ValueError(f"{folder} is not there, or empty; engine.weights_dir must be seen by every server")
            load_files(self, list(map(str, files)))
        # an exception would come to the caller without its text
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}
        self.srft_label = label
        return {}
