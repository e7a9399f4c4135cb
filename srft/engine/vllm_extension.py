"""What ``vllm serve`` needs so that a trainer can give it weights.

Start it with ``--worker-extension-cls srft.engine.vllm_extension.Weights``, in an environment that has this package; of
what that needs itself, nothing is imported. ``srft.engine.http`` calls the methods through ``/collective_rpc``.
"""

from __future__ import annotations

import http.client
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from srft.engine.vllm_worker import load_files, replace_weights

if TYPE_CHECKING:
    import torch

# of a connection to the trainer
_TRIES, _RETRY_S, _STALLED_S = 3, 1.0, 60.0

PROTOCOL = 2
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

    def srft_load(self, place: str, label: str) -> dict[str, Any]:
        """Replace the weights by those of a folder or of an address; the prefix cache is the caller's to drop.

        Args:
            place: A folder of safetensors files with every weight, or where ``weight_store.InMemory`` has them.
            label: What ``srft_about`` calls them from now on.

        Returns:
            What went wrong under "error", or nothing.
        """
        self.srft_label = ""
        try:
            if place.startswith("http://"):
                replace_weights(self, fetched(place))
            else:
                load_files(self, _files_of(place))
        # an exception would come to the caller without its text
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}
        self.srft_label = label
        return {}


def fetched(place: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights that a trainer has in its memory, of which a part is here at a time.

    Args:
        place: Their address, from ``weight_store.InMemory``.

    Raises:
        OSError: When the trainer cannot be reached from here, or breaks off each time.
    """
    from safetensors.torch import load

    for number in range(int(_body(place))):
        yield from load(_body(f"{place}/{number}")).items()


def _body(address: str) -> bytes:
    """What an address has; a connection that fails is tried again."""
    parts = urlsplit(address)
    for left in reversed(range(_TRIES)):
        line = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_STALLED_S)
        try:
            line.request("GET", parts.path)
            answer = line.getresponse()
            found = answer.read()
        except (OSError, http.client.HTTPException) as error:
            if not left:
                reason = str(error) or type(error).__name__
                raise OSError(
                    f"the trainer at {parts.netloc} cannot be reached from the server: {reason}; "
                    "open the way, or set engine.weights_dir to a folder that both see"
                ) from error
            time.sleep(_RETRY_S)
            continue
        finally:
            line.close()
        if answer.status != 200:
            raise OSError(f"the trainer at {parts.netloc} has other weights by now (status {answer.status})")
        return found
    raise AssertionError("the last try returns or raises")


def _files_of(folder: str) -> list[str]:
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} is not there, or empty; engine.weights_dir must be seen by every server")
    return list(map(str, files))
