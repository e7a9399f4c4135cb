"""Texts that end a completion: the token that completes one is the last, whatever pieces the tokens are."""

from __future__ import annotations

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from srft.engine.base import Completion, Sampling
from srft.engine.hf import HfEngine
from srft.engine.stops import StopTexts
from srft.policy.model import byte_tokenizer
from tests.trainer.chat import char_tokenizer
from tests.trainer.tiny import plain_model

PIECES = ["a", "</", "ans", "wer>", "wer> and", "b", "<pad>"]


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens of several characters, one that goes on after the stop text, and a special one."""
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken("<pad>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="a")


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("a </ ans wer>", 4),
        ("a </ ans wer> b b", 4),
        ("a </ ans wer>_and b", 4),
        ("</ ans", None),
        ("</ ans b wer>", None),
        ("</ <pad> ans <pad> wer>", 5),
        ("</ " + "<pad> " * 40 + "ans wer> a", 43),
        ("a " * 300 + "</ ans wer> </ ans wer>", 303),
    ],
    ids=["last", "followed", "longer-token", "begun", "interrupted", "special-between", "many-special", "late"],
)
def test_completion_is_cut_after_the_token_that_completes_the_text(words: str, count: int | None) -> None:
    """Step by step and as a whole the same token is found; special tokens are no part of the text."""
    stops = StopTexts(pieces_tokenizer(), ["</answer>", "never"])
    ids = [PIECES.index(word.replace("_", " ")) for word in words.split()]
    found = next((n for n in range(1, len(ids) + 1) if stops.completed(ids[:n])), None)
    assert (found, stops.cut(ids)) == (count, count)


def test_characters_of_several_tokens() -> None:
    """A stop text whose characters take several tokens each is found with its last byte, behind others of the kind."""
    tokenizer = byte_tokenizer()
    stops = StopTexts(tokenizer, ["→é"])
    ids = tokenizer.encode("ééé→→é→", add_special_tokens=False)
    count = len(tokenizer.encode("ééé→→é", add_special_tokens=False))
    assert [n for n in range(1, count + 1) if stops.completed(ids[:n])] == [count] == [stops.cut(ids)]


@pytest.mark.parametrize(("least", "count"), [(0, 3), (2, 3), (3, 7), (6, 7), (7, None), (9, None)])
def test_a_text_that_may_not_end_yet(least: int, count: int | None) -> None:
    """Of two the first ends a completion whose last token comes after the least number of them, begun before or not."""
    stops = StopTexts(pieces_tokenizer(), ["</answer>"], least)
    ids = [PIECES.index(word) for word in "</ ans wer> a </ ans wer>".split()]
    found = next((n for n in range(1, len(ids) + 1) if stops.completed(ids[:n])), None)
    assert (found, stops.cut(ids)) == (count, count)


def test_the_least_number_may_end_within_a_character() -> None:
    """Its last byte completes it."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("aé", add_special_tokens=False)
    assert len(ids) == 3
    for least, count in ((2, 3), (3, None)):
        stops = StopTexts(tokenizer, ["é"], least)
        found = next((n for n in range(1, 4) if stops.completed(ids[:n])), None)
        assert (found, stops.cut(ids)) == (count, count)


def test_engine_without_a_tokenizer_refuses_stop_texts() -> None:
    """Nothing could read the text."""
    engine = HfEngine(plain_model(), dtype=torch.float32, pad_token_id=0, max_batch=4)
    with pytest.raises(ValueError, match="stop texts need the engine's tokenizer"):
        engine.generate([[1]], Sampling(1.0, 4, (), ("x",)), [[0]])


def flat(drawn: list[list[Completion]]) -> list[Completion]:
    return [completion for row in drawn for completion in row]


@pytest.mark.parametrize("max_batch", [64, 3])
def test_engine_stops_at_a_text(max_batch: int) -> None:
    """Each completion is the free one up to the token that completes a stop text or is a stop token, if it has one."""
    tokenizer = char_tokenizer()
    model = plain_model(vocab=len(tokenizer))
    engine = HfEngine(model, dtype=torch.float32, pad_token_id=2, max_batch=max_batch, tokenizer=tokenizer)
    prompts, seeds = [[5, 6, 7], [9], [3, 4]], [list(range(8))] * 3
    free = flat(engine.generate(prompts, Sampling(1.0, 24, ()), seeds))
    text = tokenizer.decode(free[0].token_ids, skip_special_tokens=True)
    stops = (text[4:6], text[9:11])
    once = Sampling(1.0, 24, (free[1].token_ids[12],), stops)
    finishes = set()
    for whole, cut in zip(free, flat(engine.generate(prompts, once, seeds)), strict=True):
        texts = [tokenizer.decode(whole.token_ids[: n + 1], skip_special_tokens=True) for n in range(24)]
        by_text = next((n + 1 for n, text in enumerate(texts) if any(stop in text for stop in stops)), 25)
        by_token = next((n + 1 for n, token in enumerate(whole.token_ids) if token in once.stop_token_ids), 25)
        count = min(by_text, by_token)
        assert cut.finish == ("stop" if count < 25 else "length")
        assert cut.token_ids == whole.token_ids[:count]
        torch.testing.assert_close(torch.tensor(cut.logprobs), torch.tensor(whole.logprobs[:count]), rtol=0, atol=1e-5)
        finishes.add("length" if count == 25 else "text" if by_text < by_token else "token")
    assert finishes == {"length", "text", "token"}


def test_engine_passes_texts_by_until_it_may_end() -> None:
    """Each completion is the free one up to the first token after these that completes a stop text."""
    tokenizer = char_tokenizer()
    engine = HfEngine(
        plain_model(vocab=len(tokenizer)), dtype=torch.float32, pad_token_id=2, max_batch=64, tokenizer=tokenizer
    )
    (free,) = engine.generate([[5, 6, 7]], Sampling(1.0, 24, ()), [list(range(16))])
    texts = [[tokenizer.decode(c.token_ids[:n], skip_special_tokens=True) for n in range(25)] for c in free]
    stops = tuple({text[-1][i] for text in texts[:3] for i in (2, 9, 14)})
    (found,) = engine.generate([[5, 6, 7]], Sampling(1.0, 24, (), stops, 8), [list(range(16))])
    early = 0
    for whole, text, cut in zip(free, texts, found, strict=True):
        count = next((n for n in range(9, 25) if set(text[n][len(text[8]) :]) & set(stops)), 24)
        assert cut.token_ids == whole.token_ids[:count]
        early += bool(set(text[8]) & set(stops))
    assert early
