"""The process that holds vLLM: a script that answers length-prefixed JSON on two pipes.

``srft.engine.vllm`` starts it by path, with any Python that has vLLM and maybe without this package, of which it takes
``guarded`` alone; before vLLM itself it imports nothing else but the standard library.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# for this import alone: beside this package may lie others, of another Python
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from srft.engine.guarded import (  # noqa: E402
    die_with_parent,
    fork_guard,
    leave_signals_to_the_trainer,
    read_message,
    write_message,
)

del sys.path[0]

if TYPE_CHECKING:
    import torch
    from vllm import LLM
    from vllm.logprobs import FlatLogprobs

# at most so often does a call say that it gets on, where nothing has ended
_PROGRESS_S = 0.5
# prompt tokens that one step on CPU may take; vLLM's own default there
_CPU_TOKENS_PER_STEP = 4096
# the first warns that there is no chat template without a tokenizer, the second that tied heads and rotary
# tables are not part of an update; ``replace_weights`` checks that every weight came
_FALSE_ALARMS = ("vllm.renderers.base", "vllm.model_executor.model_loader.reload.layerwise")


def _start(config: dict[str, Any]) -> LLM:
    # one process holds everything: one process to guard, and no serializer between us and the model
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch._dynamo
    from vllm import LLM
    from vllm.platforms import current_platform

    for source in _FALSE_ALARMS:
        logging.getLogger(source).setLevel(logging.ERROR)
    on_cpu = current_platform.is_cpu()
    if on_cpu:
        # vLLM compiles a helper or two even when eager, which costs seconds and needs a C++ compiler
        torch._dynamo.config.disable = True
    kv_cache_gib = config["kv_cache_gib"]
    if kv_cache_gib is None and on_cpu:
        # a share of the memory, as on a GPU, would be far too much beside a trainer
        kv_cache_gib = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", 1))
    return LLM(
        model=config["model_dir"],
        # token ids in, token ids out; the text only tells where a stop text ends
        skip_tokenizer_init=not config["reads_text"],
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        dtype=config["dtype"],
        max_model_len=config["max_model_len"],
        seed=config["seed"],
        trust_remote_code=config["trust_remote_code"],
        gpu_memory_utilization=config["gpu_memory_utilization"],
        kv_cache_memory_bytes=int(kv_cache_gib * 2**30) if kv_cache_gib else None,
        enforce_eager=on_cpu or config["enforce_eager"],
        enable_prefix_caching=True,
        tensor_parallel_size=config["tensor_parallel"],
        enable_sleep_mode=config["sleeps"],
        **(_whole_prompts(config["max_model_len"]) if on_cpu else {}),
    )


def _whole_prompts(max_model_len: int) -> dict[str, Any]:
    """Settings under which no prompt is computed in pieces.

    After a piece, vLLM rewinds the request's random generator, which a CPU generator cannot do: it fails with
    "CPU Generator does not use offset" on a batch with more prompt tokens than one step takes (vLLM 0.32).
    """
    tokens_per_step = max(max_model_len, _CPU_TOKENS_PER_STEP)
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": tokens_per_step}


def _logprobs_of(token_ids: list[int], flat: FlatLogprobs, first: int = 0) -> list[float]:
    """The log-probability of each of these tokens, which vLLM puts first at its position."""
    starts = flat.start_indices[first:]
    assert token_ids == [flat.token_ids[i] for i in starts]
    return [flat.logprobs[i] for i in starts]


def _generate(llm: LLM, request: dict[str, Any], call: dict[str, int]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    prompts, params = [], []
    for prompt, seeds in zip(request["prompts"], request["seeds"], strict=True):
        for seed in seeds:
            prompts.append({"prompt_token_ids": prompt})
            params.append(
                SamplingParams(
                    temperature=request["temperature"],
                    max_tokens=request["max_new_tokens"],
                    # beside the stop tokens, vLLM keeps the end token of the model from being drawn until then
                    min_tokens=request["min_new_tokens"],
                    stop_token_ids=request["stop_token_ids"],
                    # only the caller's stop tokens stop
                    ignore_eos=True,
                    seed=seed,
                    logprobs=0,
                    flat_logprobs=True,
                    stop=request["stop"],
                    include_stop_str_in_output=True,
                    detokenize=bool(request["stop"]),
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
            )
    if request["tells"]:
        call["first"] = llm.request_counter.counter
    completions = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        best = output.outputs[0]
        if best.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a completion with {best.finish_reason!r}")
        token_ids = list(best.token_ids)
        completions.append((token_ids, _logprobs_of(token_ids, best.logprobs), best.finish_reason))
    return {"completions": completions}


def _score(llm: LLM, request: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    # prompt_logprobs makes vLLM skip reading the prefix cache, so no token is hidden by it
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
    prompts = [{"prompt_token_ids": sequence} for sequence in request["sequences"]]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    # position 0 has no log-probability
    return {"scores": [_logprobs_of(list(o.prompt_token_ids[1:]), o.prompt_logprobs, first=1) for o in outputs]}


def _incoming_tensors(request_fd: int, reply_fd: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of one file after another, asking for the next when the last is used up."""
    from safetensors import safe_open

    while True:
        write_message(reply_fd, {"ok": True})
        request = read_message(request_fd)
        if request["op"] == "update_end":
            return
        assert request["op"] == "update_file"
        with safe_open(request["path"], framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def _renew(llm: LLM, request: dict[str, Any], request_fd: int, reply_fd: int) -> dict[str, Any]:
    """Take new weights, or do what comes before and after them where the engine sleeps."""
    op = request["op"]
    if op == "sleep":
        # level 2 drops the weights, too: others come before anything is asked
        llm.sleep(level=2)
        return {}
    if op == "wake":
        llm.wake_up(tags=[request["what"]])
        return {}
    if op == "update":
        llm.collective_rpc(replace_weights, args=(_incoming_tensors(request_fd, reply_fd),))
    else:
        assert op == "load"
        llm.collective_rpc(load_files, args=(request["paths"],))
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM could not drop its prefix cache after the update")
    return {}


def load_files(worker: Any, paths: list[str]) -> None:
    """Give the model of a worker the weights of safetensors files, as ``replace_weights`` does.

    Args:
        worker: vLLM's, with the model or a part of it.
        paths: Files with every weight, whole.
    """
    from safetensors import safe_open

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)

    replace_weights(worker, tensors())


def replace_weights(worker: Any, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Give the model of a worker new weights, all of them; keys and values made with the old ones stay in the cache.

    Args:
        worker: vLLM's, with the model or a part of it.
        tensors: Every weight, whole, named as in the checkpoint.

    Raises:
        ValueError: When some are missing; the model then is a mix of old and new ones.
    """
    model = worker.get_model()
    load_weights, loaded = model.load_weights, set()

    def load_and_note(weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        names = load_weights(weights)
        loaded.update(names)
        return names

    model.load_weights = load_and_note
    try:
        worker.reload_weights(weights_iterator=tensors)
    finally:
        del model.load_weights
    _repack_heads(model)
    if missing := sorted({name for name, _ in model.named_parameters()} - loaded):
        # vLLM itself only logs this and serves a mix of old and new weights
        raise ValueError(f"the update lacks {', '.join(missing)}; send every weight of the checkpoint")


def _repack_heads(model: torch.nn.Module) -> None:
    """Pack the output head again from its present weight.

    On CPU, vLLM multiplies by a packed copy of lm_head.weight that it makes when the head is loaded. A head
    tied to the embedding is not loaded a second time, so the copy keeps the old weights (seen in vLLM 0.32).
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


def _show_progress(llm: LLM, reply_fd: int, call: dict[str, int]) -> None:
    """Let every call say that the engine makes steps, and which requests from its "first" on end with one of them."""
    step, last = llm.llm_engine.step, time.monotonic()

    def step_and_say() -> Any:
        nonlocal last
        outputs = step()
        finished = [output for output in outputs if output.finished] if call else []
        ended = [(int(one.request_id) - call["first"], list(one.outputs[0].token_ids)) for one in finished]
        if ended or time.monotonic() - last >= _PROGRESS_S:
            last = time.monotonic()
            write_message(reply_fd, {"progress": ended})
        return outputs

    llm.llm_engine.step = step_and_say


def _executor(llm: LLM) -> Any:
    """What holds the processes of an engine that has several."""
    return llm.llm_engine.engine_core.engine_core.model_executor


def _serve(request_fd: int, reply_fd: int, guard_fd: int) -> None:
    llm: LLM | None = None
    call: dict[str, int] = {}
    while True:
        call.clear()
        request = read_message(request_fd)
        if request["op"] == "close":
            return
        try:
            if request["op"] == "start":
                llm = _start(request)
                _show_progress(llm, reply_fd, call)
                if request["tensor_parallel"] > 1:
                    _executor(llm).register_failure_callback(lambda: os._exit(1))
                    os.write(guard_fd, b"!")
                reply: dict[str, Any] = {"vocab_size": llm.model_config.get_vocab_size()}
            elif request["op"] == "generate":
                reply = _generate(llm, request, call)
            elif request["op"] == "score":
                reply = _score(llm, request)
            else:
                reply = _renew(llm, request, request_fd, reply_fd)
        # whatever vLLM raises belongs to the caller, who closes this process if it cannot go on
        except Exception as error:
            traceback.print_exc()
            if llm is not None and getattr(_executor(llm), "is_failed", False):
                os._exit(1)  # one of its processes died: it is lost, which is mended, and has not merely failed
            reply = {"error": f"{type(error).__name__}: {error}"}
        write_message(reply_fd, reply)


def main(argv: list[str]) -> None:
    """Serve one trainer until it closes, or is gone.

    Args:
        argv: Request pipe; reply pipe; pid of the trainer, or 0 when the thread that started this process may
            end before the trainer does; then the folders to remove when it is gone.
    """
    request_fd, reply_fd, parent_pid = (int(word) for word in argv[:3])
    for fd in (request_fd, reply_fd):
        os.set_inheritable(fd, False)
    if parent_pid:
        die_with_parent(parent_pid)
    leave_signals_to_the_trainer()
    guard_fd = fork_guard(request_fd, reply_fd, argv[3:])
    write_message(reply_fd, {"vllm": importlib.util.find_spec("vllm") is not None})
    try:
        _serve(request_fd, reply_fd, guard_fd)
    except (EOFError, BrokenPipeError):
        sys.exit("the trainer is gone")


if __name__ == "__main__":
    main(sys.argv[1:])
