"""A vLLM that is spread over several processes: the answers of one, weights renewed in all, and none left behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from srft.engine.base import EngineLost, Sampling
from tests.trainer.many_syncs import many_syncs
from tests.trainer.tiny_vllm import VOCAB, assert_gone, live_members, save_model, start, tiny_model

pytestmark = pytest.mark.vllm

SEQUENCES = [[(7 * i * k + i) % VOCAB for i in range(1, 60)] for k in (1, 2)]


def test_two_processes_serve_every_update_and_end_together(tmp_path: Path) -> None:
    """Scores are the model's own after twenty unlike updates; when one of the two is killed, the engine is lost."""
    model = tiny_model(tied=True, seed=0)
    engine = start(save_model(model, tmp_path), tensor_parallel=2)
    assert len(live_members(engine.pid)) > 3, "worker, its guard, and the two"
    seen = many_syncs(20, model, engine, "float32")
    assert seen.worst <= 1e-4 and engine.version == 20
    model = tiny_model(tied=True, seed=1)
    engine.update_weights(model.named_parameters(), 21)
    with torch.no_grad():
        for sequence, scores in zip(SEQUENCES, engine.score(SEQUENCES), strict=True):
            logprobs = model(torch.tensor([sequence])).logits[0, :-1].log_softmax(-1)
            expected = logprobs.gather(-1, torch.tensor(sequence[1:])[:, None])[:, 0]
            assert (expected - torch.tensor(scores)).abs().max() < 1e-4
    assert not [path for folder in engine.folders for path in folder.iterdir()]
    assert len(engine.generate(SEQUENCES, Sampling(1.0, 8, ()), [[1, 2], [3]])[0]) == 2

    lines = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in live_members(engine.pid)}
    shared = engine._child._shared
    assert shared and all(path.exists() for path in shared)
    one, _other = [pid for pid, line in lines.items() if "spawn_main" in line]
    os.kill(one, signal.SIGKILL)
    with pytest.raises(EngineLost, match="its process died"):
        engine.generate(SEQUENCES, Sampling(1.0, 8, ()), [[1, 2], [3]])
    assert_gone(engine.pid)
    assert not any(path.exists() for path in shared), "hundreds of MiB, and nobody else's"
