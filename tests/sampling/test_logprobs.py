"""Log-probabilities are those of the raw logits, with ranks, in plain and lazy mappings."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from dpn_rt.device.transfer import to_host
from dpn_rt.sampling import logprobs, sampler
from dpn_rt.sampling.logprobs import Logprob, VocabularyLogprobs
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.sampling.sampler import Sampler, SamplingState

VOCAB_SIZE = 40


def sample(logits: torch.Tensor, *params: SamplingParams) -> tuple[list[int], list]:
    states = [SamplingState(p, np.array([3, 4]), VOCAB_SIZE) for p in params]
    result = Sampler(lambda token_id: f"<{token_id}>").sample(logits, states)
    assert result.logprobs is not None
    return result.token_ids, result.logprobs


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(4, VOCAB_SIZE) * 2


def test_top_k_and_the_sampled_token_from_unmodified_logits(logits: torch.Tensor) -> None:
    params = SamplingParams(temperature=5.0, seed=4, logprobs=3, repetition_penalty=1.5, top_k=30)
    token_ids, rows = sample(logits, params, SamplingParams(temperature=0), params, SamplingParams(logprobs=0, seed=1))
    assert rows[1] is None
    expected = torch.log_softmax(logits.double(), dim=1)
    for row in (0, 2):
        order = expected[row].argsort(descending=True).tolist()
        assert set(rows[row]) == {token_ids[row], *order[:3]}
        for token_id, entry in rows[row].items():
            assert entry == pytest.approx(float(expected[row, token_id]), abs=1e-5)
            assert entry.logprob == float(entry)
            assert entry.rank == order.index(token_id) + 1
            assert entry.decoded_token == f"<{token_id}>"
    assert list(rows[3]) == [token_ids[3]]


def test_the_whole_vocabulary_is_a_mapping(logits: torch.Tensor) -> None:
    _, rows = sample(logits[:2].bfloat16(), SamplingParams(temperature=0, logprobs=-1), SamplingParams(logprobs=2))
    entries = rows[0]
    expected = torch.log_softmax(logits[0].bfloat16().float(), dim=0)
    assert isinstance(entries, VocabularyLogprobs)
    assert len(entries) == VOCAB_SIZE and list(entries) == list(range(VOCAB_SIZE))
    assert [float(entry) for _, entry in entries.items()] == pytest.approx(expected.tolist(), abs=1e-6)
    assert sorted(entry.rank for entry in entries.values()) == list(range(1, VOCAB_SIZE + 1))
    assert entries[int(expected.argmax())].rank == 1
    assert (
        0 in entries
        and np.int64(3) in entries
        and VOCAB_SIZE not in entries
        and -1 not in entries
        and "0" not in entries
    )
    with pytest.raises(KeyError):
        entries[-1]
    assert len(rows[1]) in (2, 3)


def test_more_than_the_vocabulary_is_the_vocabulary(logits: torch.Tensor) -> None:
    _, rows = sample(logits[:1], SamplingParams(temperature=0, logprobs=1000))
    assert len(rows[0]) == VOCAB_SIZE


def test_they_travel_without_the_tokenizer() -> None:
    entry = pickle.loads(pickle.dumps(Logprob(-1.5, 2, 7, lambda token_id: "seven")))
    assert (entry, entry.rank, entry.decoded_token) == (-1.5, 2, "seven")
    assert Logprob(-1.0, 1, 3).decoded_token is None
    values = np.array([-1.0, -0.5], dtype=np.float32)
    with_text = pickle.loads(pickle.dumps(VocabularyLogprobs(values, lambda token_id: f"t{token_id}")))
    assert [with_text[token_id].decoded_token for token_id in with_text] == ["t0", "t1"]
    mapping = pickle.loads(pickle.dumps(VocabularyLogprobs(values)))
    assert mapping[0].decoded_token is None
    assert mapping[1].rank == 1


@pytest.mark.parametrize(
    ("counts", "transfers"), [((None, None), 1), ((3, None), 1), ((2, 0), 1), ((-1, 5), 2), ((-1, -1), 2)], ids=str
)
def test_tokens_and_their_log_probabilities_are_one_transfer(
    logits: torch.Tensor, monkeypatch: pytest.MonkeyPatch, counts: tuple[int | None, ...], transfers: int
) -> None:
    """And one for whole vocabularies."""
    shapes: list[torch.Size] = []
    for module in (sampler, logprobs):
        monkeypatch.setattr(module, "to_host", lambda tensor: shapes.append(tensor.shape) or to_host(tensor))
    states = [SamplingState(SamplingParams(temperature=0, logprobs=c), np.array([3]), VOCAB_SIZE) for c in counts]
    result = Sampler().sample(logits[:2], states)
    assert len(shapes) == transfers
    assert result.token_ids == logits[:2].argmax(dim=1).tolist() and result.finite == [True, True]
    assert [entry is None for entry in result.logprobs or (None, None)] == [count is None for count in counts]


def test_rows_without_a_softmax_are_told_with_log_probabilities(logits: torch.Tensor) -> None:
    logits[1, 3] = torch.nan
    states = [SamplingState(SamplingParams(temperature=0, logprobs=2), np.array([3]), VOCAB_SIZE) for _ in range(3)]
    assert Sampler().sample(logits[:3], states).finite == [True, False, True]
