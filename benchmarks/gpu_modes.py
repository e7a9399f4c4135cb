"""Steps of gpu_sweep on ways to run the ops: many times, in a graph, compiled, and in a training step."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

import srft_kernels
from benchmarks.gpu_job import Job
from benchmarks.heads import HEADS, HeadShape, make_inputs
from benchmarks.measure import errors
from benchmarks.variants import variants


def repeat(job: Job) -> None:
    """The whole call at a real vocabulary, 20 times: the same bits each time, or some thread reads too late."""
    x = job.inputs(HEADS[job.names[0]])
    times = 20 if job.device.type == "cuda" else 2
    parts = []
    for own in job.own_names():
        run = job.ours(own)
        expected = [tensor.clone() for tensor in run(x)]
        assert all(bool(tensor.isfinite().all()) for tensor in expected), f"{own}: not all is finite"
        differing = sum(not all(map(torch.equal, run(x), expected)) for _ in range(times))
        parts.append(f"{own}: {differing} of {times} differ")
        job.save(**{own: differing}, headline="; ".join(parts))
        assert differing == 0, parts[-1]


def small(job: Job) -> None:
    """One call of every op at a small vocabulary, for tools that watch every access."""
    x = make_inputs(HeadShape(64, 4100), job.dtype, 4 * job.sequence, job.sequence, job.device)
    for case in ("grpo", "srft", "cross_entropy"):
        run = variants(case, job.dtype, job.device, frozenset(["ours"]))["ours"].run
        assert run is not None
        loss = run(x)[0]
        print(case, float(loss), flush=True)
    job.save(headline="ran")


def graph(job: Job) -> None:
    """Forward and backward captured in a CUDA graph: a replay gives what the plain call does."""
    x = job.inputs(HEADS[job.names[0]])
    run = job.ours("ours")
    expected = [tensor.clone() for tensor in run(x)]
    if job.device.type != "cuda":
        job.save(headline="no graphs on a CPU: the plain call alone")
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(x)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        actual = run(x)
    for tensor in actual:
        tensor.zero_()
    captured.replay()
    torch.cuda.synchronize()
    found = [errors(a, e)[0] for a, e in zip(actual, expected, strict=True)]
    plain, replayed = job.median(lambda: run(x)), job.median(captured.replay)
    text = f"plain {1000 * plain:.2f} ms, replayed {1000 * replayed:.2f} ms; differences {max(found):.0e}"
    job.save(errors=found, plain_s=plain, replayed_s=replayed, headline=text)
    assert max(found) <= 2 * torch.finfo(job.dtype).eps, f"a replay differs from the plain call: {found}"


def compiled(job: Job) -> None:
    """torch.compile(fullgraph=True) of a loss around the op: what the plain call gives, and its time."""
    x = job.inputs(HEADS[job.names[0]])

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, advantages: Tensor, old: Tensor) -> Tensor:
        return 2 * srft_kernels.linear_grpo_loss(1 * hidden, weight, labels, advantages, old).loss

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x.hidden_states.grad = x.lm_head_weight.grad = None
        value = function(*x[:5])
        value.backward()
        return value.detach(), x.hidden_states.grad, x.lm_head_weight.grad

    backend = "inductor" if job.device.type == "cuda" else "aot_eager"
    fast = torch.compile(loss, fullgraph=True, backend=backend)
    found = [errors(a, e)[0] for a, e in zip(run(fast), run(loss), strict=True)]
    plain, quick = job.median(lambda: run(loss)), job.median(lambda: run(fast))
    text = f"plain {1000 * plain:.2f} ms, compiled {1000 * quick:.2f} ms; differences {max(found):.0e}"
    job.save(errors=found, plain_s=plain, compiled_s=quick, headline=text)
    bound = 0 if job.device.type == "cpu" else 2 * torch.finfo(job.dtype).eps
    assert max(found) <= bound, f"the compiled call differs from the plain one: {found}"


def train_step(job: Job) -> None:
    """A step of AdamW on a Qwen2 of the shape of the head, random weights: with our loss, and with plain torch's."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    head = HEADS[job.names[0]]
    big = head.width >= 1024
    config = Qwen2Config(
        vocab_size=head.vocab, hidden_size=head.width, intermediate_size=(35 * head.width // 6) if big else 128,
        num_hidden_layers=28 if big else 2, num_attention_heads=head.width // 128 if big else 2, num_key_value_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    # on a CPU first, 1.8B random numbers would take half of this step's time
    with job.device:
        model = Qwen2ForCausalLM(config).to(job.dtype)
    if big:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    count = job.tokens // job.sequence
    ids = torch.randint(head.vocab, (count, job.sequence), device=job.device)
    labels = ids.roll(-1, 1).flatten()

    def ours(hidden: Tensor) -> Tensor:
        return srft_kernels.linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, labels)

    def plain(hidden: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), labels)

    def step(loss: Callable[[Tensor], Tensor]) -> None:
        optimizer.zero_grad()
        loss(model.model(ids).last_hidden_state).backward()
        optimizer.step()

    parts = []
    for name, loss in (("ours", ours), ("plain torch", plain)):
        if job.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds = job.median(lambda loss=loss: step(loss))
        except torch.cuda.OutOfMemoryError:
            parts.append(f"{name} does not fit")
            continue
        peak = torch.cuda.max_memory_allocated() / 1e9 if job.device.type == "cuda" else 0.0
        parts.append(f"{name} {seconds:.3f} s a step, {peak:.1f} GB")
        job.save(**{name: {"median_s": seconds, "peak_gb": peak}}, headline="; ".join(parts))
    job.save(headline=f"{job.tokens} tokens: " + "; ".join(parts))


def fail(job: Job) -> None:
    """Fail, for a dry run to see that the sweep goes on."""
    raise RuntimeError("this step is made to fail")


def hang(job: Job) -> None:
    """Take longer than any limit, for a dry run to see that the sweep goes on."""
    print("this step is made to hang", flush=True)
    time.sleep(3600)
