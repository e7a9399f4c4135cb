"""The options of engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from srft.section import Section, one_or_more

_URL = r"^http://[^/?#@\s]+(/[^?#\s]*)?$"


class EngineConfig(Section):
    """What samples the rollouts."""

    kind: Literal["auto", "hf", "vllm", "http"] = "auto"
    """"hf" samples in this process, "vllm" in a process of its own, "http" on servers that run already; "auto" is vllm
    on a GPU where it is installed, else hf."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the engine's weights; "auto" follows model.compute_dtype."""
    max_batch: int = Field(512, gt=0)
    """hf: sequences sampled at once."""
    python: str | None = None
    """vllm: interpreter that runs the engine, for an environment of its own; unset: this one."""
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    """vllm: share of the GPU's memory the engine may take."""
    ranks_per_engine: int | None = Field(None, gt=0)
    """vllm: neighbouring ranks that share an engine; unset: one each on GPUs, one for all of a machine without."""
    devices: list[Annotated[int, Field(ge=0)]] = []
    """vllm: GPUs of this machine for engines alone, by torch's numbers, such as [6, 7]; unset: training's own."""
    tensor_parallel: int = Field(1, gt=0)
    """vllm: GPUs that one engine is spread over, or processes on a CPU; engine.devices have an engine for each so many,
    and without these the ranks that have so many GPUs share one."""
    sleep: bool | None = None
    """vllm: give the GPU's memory back while training goes on; unset: where training computes on the same GPU, unless
    rollout.max_lag has both at once."""
    urls: Annotated[list[Annotated[str, Field(pattern=_URL)]], BeforeValidator(one_or_more)] = []
    """http: the servers, such as ["http://gpu1:8000", "http://gpu2:8000"], each a `vllm serve` for this run alone."""
    weights_dir: Path | None = None
    """http: folder that the trainer writes and every server reads, under the same path: one or two copies of the
    policy; unset: they fetch it from the trainer, which keeps a copy in memory."""
    deadline_s: float = Field(600.0, gt=0)
    """vllm: seconds without a new token, in which nothing is heard of the engine, before it is ended as hung; http:
    seconds in which a server answers no question to its end, before the others are asked."""
    restarts: int = Field(3, ge=0)
    """vllm: how often engines that died or hung are started again, given the weights and asked again, before the run is
    ended; http: how often all servers may be lost, for at most deadline_s."""

    @model_validator(mode="after")
    def _servers_fit_the_kind(self) -> EngineConfig:
        given = {"urls": self.urls, "weights_dir": self.weights_dir}
        if self.kind == "http":
            if not self.urls:
                raise ValueError("engine.kind=http wants engine.urls, too")
            for url in self.urls:
                try:
                    urlsplit(url).port  # noqa: B018
                except ValueError as error:
                    raise ValueError(f"engine.urls: {url} has no port: {error}; write http://host:8000") from None
            if len(set(self.urls)) < len(self.urls):
                raise ValueError(f"engine.urls={self.urls} names a server twice; name each once")
            if self.ranks_per_engine is not None:
                raise ValueError(
                    f"engine.ranks_per_engine={self.ranks_per_engine}, but with engine.kind=http all ranks share the "
                    "servers; leave it unset"
                )
            self.refuse_unless_vllm("http")
        elif useless := [f"engine.{name}={value}" for name, value in given.items() if value]:
            raise ValueError(f"{' and '.join(useless)} is for engine.kind=http, got engine.kind={self.kind}; unset it")
        if self.kind == "hf":
            self.refuse_unless_vllm("hf")
        self._refuse_unfit_devices()
        return self

    def refuse_unless_vllm(self, kind: str) -> None:
        """Check that nothing is asked for that engines of this kind do not have.

        Args:
            kind: Not "vllm".

        Raises:
            ValueError: When something is.
        """
        spread = self.tensor_parallel if self.tensor_parallel > 1 else None
        asked = {"devices": self.devices, "tensor_parallel": spread, "sleep": "true" if self.sleep else None}
        if given := [f"engine.{name}={value}" for name, value in asked.items() if value]:
            raise ValueError(f"{' and '.join(given)} is for engine.kind=vllm, got {kind}; set that, or unset it")

    def _refuse_unfit_devices(self) -> None:
        named = f"engine.devices={self.devices}"
        if len(set(self.devices)) < len(self.devices):
            raise ValueError(f"{named} names a GPU twice; name each once")
        if len(self.devices) % self.tensor_parallel:
            raise ValueError(
                f"{named} are {len(self.devices)} GPUs, which engine.tensor_parallel={self.tensor_parallel} does not "
                "divide; name as many for each engine"
            )
        if self.devices and self.ranks_per_engine is not None:
            raise ValueError(
                f"engine.ranks_per_engine={self.ranks_per_engine}, but {named} says how many engines there are; leave "
                "it unset"
            )
