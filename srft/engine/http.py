"""Rollouts by servers that somebody else started: `vllm serve` on this machine or on others, one or several.

The trainer puts weights where all of them find them, and asks each to load them from there. A server says which
weights it has before and after it is asked for completions, so that one which was started again in between, with the
weights of its model's folder, is found out and given the present ones.
"""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from srft.engine.asking import check_request, check_tokens, completed
from srft.engine.base import Completion, Ended, EngineError, EngineLost, Sampling
from srft.engine.http_server import START, Server
from srft.engine.stops import StopTexts
from srft.engine.weight_store import InFolder, InMemory

_Tell = Callable[[int, Any], None]
# questions that a server has at once; vLLM computes so many sequences in a step, and keeps the others waiting
_LINES = 256
_RETRY_S = 1.0
_INTERRUPT_S = 0.05
# what a generation_config beside the served model may have changed
_PLAIN = {
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True,
}  # fmt: skip


class HttpEngine:
    """Servers of one model, of which each answers its share, and those that are left the share of one that is lost."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        weights_dir: Path | None,
        owner: str,
        model: dict[str, Any],
        dtype: str,
        max_model_len: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        deadline_s: float = 600.0,
        patience_s: float = 0.0,
    ) -> None:
        """Meet the servers and see that they serve what is to be trained, in the way that it needs.

        Args:
            urls: Of the servers, such as "http://host:8000".
            weights_dir: Folder that this process writes and every server reads, under the same path; None: they fetch
                weights from this process, which keeps a copy in memory.
            owner: Name of a folder in it for this engine alone; emptied now, and removed by ``close``.
            model: What ``vllm_extension.Weights.srft_about`` must say of the model.
            dtype: "float32", "bfloat16" or "float16": what they compute in.
            max_model_len: Most tokens of a prompt and its completion together, > 0.
            tokenizer: That of the model, for ``Sampling.stop``; None does without.
            deadline_s: Seconds in which a server answers no question to its end, after which it counts as lost, > 0.
            patience_s: Seconds to wait for one of them where none can be reached; 0 wants all of them at once.

        Raises:
            ValueError: When one serves something else, or otherwise than it must.
            EngineError: When one cannot be reached, or lacks what it must be started with.
            WriteError: When the folder cannot be written.
        """
        self.version = self.restarts = 0
        self.max_model_len = max_model_len
        self._vocab_size = int(model["vocab_size"])
        self._tokenizer = tokenizer
        self._expected = {"dtype": dtype, "logprobs_mode": "processed_logprobs", **model}
        self._servers = [Server(url, deadline_s) for url in urls]
        self._in_turn, self._lock = 0, threading.Lock()
        self._run, self._count, self._label = uuid.uuid4().hex, 0, ""
        self._weights = InFolder(weights_dir.expanduser().resolve() / owner) if weights_dir else InMemory()
        try:
            self._meet(patience_s)
        except BaseException:
            self.close()
            raise

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[list[int]], ended: Ended | None = None
    ) -> list[list[Completion]]:
        """Draw ``len(seeds[p])`` completions of prompt ``p``, sample ``k`` from ``seeds[p][k]`` alone.

        Args:
            prompts: Token ids, none empty. Where a prompt leaves less room than ``sampling.max_new_tokens``, its
                completions are cut at ``max_model_len`` in all.
            sampling: How to draw; the temperature is 0 or in [0.01, 2], which is what vLLM can do.
            seeds: One list per prompt, each seed in [0, 2**63).
            ended: As ``Engine.generate`` has it; what a server answered with other weights is told, and asked again.

        Raises:
            ValueError: On an argument out of its range, a prompt that leaves no room for a token, or stop
                texts without a tokenizer.
            EngineLost: When no server is left.
            EngineError: When one refuses, or has weights that somebody else gave it.
        """
        texts = StopTexts(self._tokenizer, sampling.stop, sampling.min_new_tokens) if sampling.stop else None
        check_request(prompts, sampling, seeds, self.max_model_len, self._vocab_size)
        asked = [
            # the samples of a prompt share what a server has computed of it
            (p, self._question(prompt, sampling, seed))
            for p, (prompt, row) in enumerate(zip(prompts, seeds, strict=True))
            for seed in row
        ]
        places = [(p, k) for p, row in enumerate(seeds) for k in range(len(row))]

        def tell(i: int, answer: Any) -> None:
            if ended is not None:
                ended(*places[i], completed(*_drawn(answer, sampling), texts, self.version).token_ids)

        answers = self._answers(asked, tell)
        drawn = iter([completed(*_drawn(answer, sampling), texts, self.version) for answer in answers])
        return [[next(drawn) for _ in row] for row in seeds]

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give every server that can be reached these weights and let it drop every cache made with others.

        Args:
            named_tensors: All weights, whole, named as in the checkpoint, on any device. A head tied to the embedding
                may be left out.
            version: Goes into every ``Completion`` from here on.

        Raises:
            EngineLost: When no server is left.
            EngineError: When one cannot load them.
            WriteError: When the folder cannot be written, or is full.
        """
        self._count += 1
        self._weights.put(named_tensors)
        self._label = f"{self._run}.{self._count}"
        self._all_at_once(self._give, self._servers)
        self._left()
        self._weights.drop_older()
        self.version = version

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return log p(token t | tokens before t) for t = 1 .. len-1 of each sequence, at temperature 1.

        Each is scored by one server, in turn, and from call to call by another.

        Args:
            sequences: Token ids, each of 1 to ``max_model_len - 1`` tokens.

        Raises:
            ValueError: On an empty or too long sequence, or a token outside the vocabulary.
            EngineError: As ``generate``.
        """
        check_tokens("sequence", sequences, self.max_model_len, self._vocab_size)
        self._in_turn += 1
        question = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, **_PLAIN}
        asked = [
            (i + self._in_turn, {"prompt": sequence, **question})
            for i, sequence in enumerate(sequences)
            if len(sequence) > 1
        ]
        answers = iter(self._answers(asked))
        return [_scores(next(answers), sequence) if len(sequence) > 1 else [] for sequence in sequences]

    def sleep(self) -> None:
        """Nothing to give back: servers have devices of their own."""

    def close(self) -> None:
        """Take the weights away; the servers go on. Safe to call twice."""
        self._weights.close()

    def _question(self, prompt: list[int], sampling: Sampling, seed: int) -> dict[str, Any]:
        most = min(sampling.max_new_tokens, self.max_model_len - len(prompt))
        return {
            "prompt": prompt,
            "max_tokens": most,
            "min_tokens": min(sampling.min_new_tokens, most),
            "temperature": sampling.temperature,
            "seed": seed,
            "logprobs": 0,
            "stop_token_ids": list(sampling.stop_token_ids),
            "stop": list(sampling.stop),
            "include_stop_str_in_output": True,
            **_PLAIN,
        }

    def _meet(self, patience_s: float) -> None:
        until = time.monotonic() + patience_s
        while True:
            self._all_at_once(self._look_at, self._servers)
            lost = [server.lost for server in self._servers if server.lost]
            if not lost or (patience_s and len(lost) < len(self._servers)):
                return
            if time.monotonic() >= until:
                missed = f"no other answer in {patience_s:g} s" if patience_s else f"is vLLM there? If not, {START}"
                raise EngineLost(f"{'; '.join(lost)}; {missed}")
            time.sleep(_RETRY_S)

    def _look_at(self, server: Server) -> None:
        """See whether a server is what it must be."""
        about = server.about()
        found = about | about["model"]
        wrong = [f"{name} {found[name]}, not {value}" for name, value in self._expected.items() if found[name] != value]
        if found["max_model_len"] < self.max_model_len:
            wrong.append(f"max_model_len {found['max_model_len']}, less than {self.max_model_len}")
        if wrong:
            raise ValueError(
                f"{server.url} has {'; '.join(wrong)}; start it with the model of this run, --dtype "
                f"{self._expected['dtype']}, --logprobs-mode processed_logprobs and --max-model-len "
                f"{self.max_model_len} or more"
            )
        server.lost = ""

    def _give(self, server: Server) -> None:
        """Give a server the present weights; one that was lost is looked at first."""
        assert self._label, "a server is given weights before it is asked for anything"
        again = server.lost
        if again:
            self._look_at(server)
        try:
            place = self._weights.place(server.own_address)
        except OSError as error:
            raise EngineLost(f"{server.url}: {error.strerror or error}") from error
        server.take(place, self._label)
        if again:
            _say(f"{server.url} answers again and has the weights")

    def _make_ready(self, server: Server) -> None:
        """Give the present weights to a server that does not have them, because it was lost or started again."""
        if server.lost or not self._has_weights(server):
            self._give(server)

    def _has_weights(self, server: Server) -> bool:
        label = server.about()["label"]
        if label and label != self._label:
            raise EngineError(
                f"{server.url} has weights of another run ({label}): a server samples for one run at a time"
            )
        if not label:
            _say(f"{server.url} was started again; it is given the weights")
        return label == self._label

    def _answers(self, asked: list[tuple[int, dict[str, Any]]], tell: _Tell = lambda _i, _answer: None) -> list[Any]:
        """Return what the servers answer, each question asked until one with the present weights has answered it.

        Args:
            asked: (number, question): those with the same number go to the same server.
            tell: Told of the place of a question and of its answer, which may be asked for again.
        """
        answers: dict[int, Any] = {}
        self._all_at_once(self._make_ready, self._servers)
        while open_ones := [i for i in range(len(asked)) if i not in answers]:
            answers |= self._asked_once(asked, open_ones, tell)
        return [answers[i] for i in range(len(asked))]

    def _asked_once(
        self, asked: list[tuple[int, dict[str, Any]]], open_ones: list[int], tell: _Tell
    ) -> dict[int, Any]:
        """Put these questions to the servers that are left; return what those answer that have the present weights."""
        servers = self._left()
        queues: dict[str, deque[int]] = {server.url: deque() for server in servers}
        for i in open_ones:
            queues[servers[asked[i][0] % len(servers)].url].append(i)
        new: dict[str, dict[int, Any]] = {server.url: {} for server in servers}
        proven: dict[int, Any] = {}

        def work(server: Server) -> None:
            _ask_all(server, queues[server.url], asked, new[server.url], tell)

        def look(server: Server) -> None:
            if self._has_weights(server):
                proven.update(new[server.url])
            else:
                self._give(server)

        lines = [server for server in servers for _ in range(min(_LINES, len(queues[server.url])))]
        self._all_at_once(work, lines, queues)
        self._all_at_once(look, [server for server in servers if new[server.url] and not server.lost])
        return proven

    def _all_at_once(
        self, work: Callable[[Server], None], servers: list[Server], queues: dict[str, deque[int]] | None = None
    ) -> None:
        """Work with servers in a thread each; one that is lost in it is marked so, anything else ends all of it."""
        if not servers:
            return

        over = False

        def guarded(server: Server) -> None:
            try:
                work(server)
            except EngineLost as error:
                # many threads find out at once
                with self._lock:
                    known, server.lost = server.lost, str(error)
                # before the first update, whoever waits for the servers says so
                if self._label and not known and not over:
                    _say(f"lost {error}")

        with ThreadPoolExecutor(len(servers)) as pool:
            futures: list[Future[None]] = [pool.submit(guarded, server) for server in servers]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                for future in futures:
                    if future.done():
                        future.result()
            except BaseException:
                over = True
                for queue in (queues or {}).values():
                    queue.clear()
                while wait(futures, timeout=_INTERRUPT_S).not_done:
                    for server in self._servers:
                        server.interrupt()
                raise

    def _left(self) -> list[Server]:
        """The servers that can be asked."""
        if left := [server for server in self._servers if not server.lost]:
            return left
        raise EngineLost("; ".join(server.lost for server in self._servers))


def _ask_all(
    server: Server, queue: deque[int], asked: list[tuple[int, dict[str, Any]]], answers: dict[int, Any], tell: _Tell
) -> None:
    """Ask questions one after another, until none is left or the server is lost."""
    line = server.line()
    try:
        while queue and not server.lost:
            try:
                i = queue.popleft()
            except IndexError:  # another thread took it
                return
            answers[i] = server.ask("/v1/completions", asked[i][1], line)
            tell(i, answers[i])
    finally:
        server.hang_up(line)


def _drawn(answer: dict[str, Any], sampling: Sampling) -> tuple[list[int], list[float], str]:
    (choice,) = answer["choices"]
    token_ids, finish = choice.get("token_ids"), choice["finish_reason"]
    if token_ids is None:
        raise EngineError("the server gives no token_ids; its vLLM is too old")
    logprobs = choice["logprobs"]["token_logprobs"]
    assert len(token_ids) == len(logprobs)
    if finish not in ("stop", "length"):
        raise EngineError(f"vLLM ended a completion with {finish!r}")
    if finish == "stop" and not sampling.stop and token_ids[-1] not in sampling.stop_token_ids:
        raise EngineError(
            f"vLLM ended a completion with token {token_ids[-1]} by itself; start it with --generation-config vllm"
        )
    return token_ids, logprobs, finish


def _scores(answer: dict[str, Any], sequence: list[int]) -> list[float]:
    (choice,) = answer["choices"]
    rows = zip(sequence[1:], choice["prompt_logprobs"][1:], strict=True)
    return [row[str(token)]["logprob"] for token, row in rows]


def _say(text: str) -> None:
    sys.stderr.write(f"engine: {text}\n")
