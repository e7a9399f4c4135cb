"""A whole run with rollouts by a real vLLM server, over the loopback device."""

from __future__ import annotations

import http.client
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from srft.engine.child import child_environment
from srft.policy.export import export_model
from srft.policy.model import build_tiny, byte_tokenizer
from tests.trainer.runs import ROOT, read_lines, small_config, train
from tests.trainer.tiny_vllm import assert_gone, live_members

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

NEEDED = ("uvicorn", "watchfiles", "jmespath", "model_hosting_container_standards", "prometheus_fastapi_instrumentator")
START_S = 900
# vLLM's attention on CPU takes heads of 32 and more
RUN = {
    "train__lr": 0.01, "train__eval_every": 2, "train__rollouts_per_prompt": 2, "model__tiny__hidden_size": 64,
    "model__tiny__num_layers": 2, "model__tiny__tie_embeddings": True,
}  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server of another start of the model that the run builds, as the README says without a GPU."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"vLLM's server needs {', '.join(missing)}, which `make test` installs")
    config, tokenizer = small_config(tmp_path, **RUN), byte_tokenizer()
    export_model(tmp_path / "served", build_tiny(config.model, tokenizer, config.longest_sequence, 5), tokenizer)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path / "served"),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--logprobs-mode", "processed_logprobs",
        "--generation-config", "vllm", "--worker-extension-cls", "srft.engine.vllm_extension.Weights",
        "--max-model-len", str(config.longest_sequence), "--enforce-eager", "--no-enable-chunked-prefill",
        "--max-num-batched-tokens", "4096",
    ]  # fmt: skip
    own = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=child_environment(1, None) | own | {"PYTHONPATH": path}, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        until = time.monotonic() + START_S
        while not healthy(port):
            said = (tmp_path / "server.log").read_text(errors="replace")[-3000:]
            assert process.poll() is None and time.monotonic() < until, said
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        # SIGKILL of the first alone would leave its engine and that one's worker
        for pid in live_members(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        assert_gone(process.pid)


def healthy(port: int) -> bool:
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        line.request("GET", "/health")
        return line.getresponse().status == 200
    except OSError:
        return False
    finally:
        line.close()


def test_every_step_samples_from_its_own_weights(server: str, tmp_path: Path) -> None:
    """Two steps at a learning rate that moves the weights: server and trainer agree to 1e-4 nats after each.

    First the server reads weights in a folder, then it fetches them; both runs have the same rows.
    """
    shared = tmp_path / "shared"
    rows = [
        read_lines(train(tmp_path, **RUN, engine__kind="http", engine__urls=server, **more) / "metrics.jsonl")
        for more in ({"engine__weights_dir": shared}, {"name": "fetched"})
    ]
    for each in rows:
        assert [row["step"] for row in each] == [0, 1, 2]
        assert all(row["canary/max_abs_diff"] <= 1e-4 for row in each)
        assert all(row["mismatch/max"] <= 1e-3 and row["engine/restarts"] == 0 for row in each[1:])
        assert each[2]["loss/total"] != each[1]["loss/total"]
    assert [row["loss/total"] for row in rows[0][1:]] == [row["loss/total"] for row in rows[1][1:]]
    assert not list(shared.iterdir())
