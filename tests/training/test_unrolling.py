"""A head's unrolled steps are those it takes in decoding; what is learned of them reaches every answer by itself."""

from dataclasses import replace

import pytest
import torch

from specvlm import SpecVLM
from specvlm.compressors import CompressorConfig, TextOnlyConfig, ViSpecConfig
from specvlm.drafts import Eagle3Config, Eagle3Draft, Eagle3Head, EagleConfig, EagleDraft, EagleHead
from specvlm.drafts.pairs import PairDraft
from specvlm.state import Limits, Sampling
from specvlm.training import Batch, DistillConfig, distill, objective_of
from specvlm.training.objectives import HeadObjective
from specvlm.training.unrolling import levels
from specvlm.tree import Beam, Plan
from tests.drafts.formula import spread
from tests.fakes import IMAGE_TOKEN, VOCAB, prompt_for, tiny_llava

LEVELS = 5
MOST = [token for token in range(VOCAB) if token != IMAGE_TOKEN]


@pytest.fixture(scope="module")
def specvlm() -> SpecVLM:
    return SpecVLM(tiny_llava(num_hidden_layers=4, num_key_value_heads=2))


def head_of(specvlm: SpecVLM, kind: str, compressor: CompressorConfig | None = None) -> PairDraft:
    torch.manual_seed(1)
    spec, sizes = specvlm.target.spec, {"intermediate_size": 96}
    draft: PairDraft
    if kind == "eagle3":
        head = Eagle3Head(replace(Eagle3Config.for_target(spec, 96, len(MOST)), compressor=compressor))
        head.set_vocabulary(torch.tensor(MOST))
        draft = Eagle3Draft(head)
    else:
        draft = EagleDraft(EagleHead(replace(EagleConfig.for_target(spec, **sizes), compressor=compressor)))
        draft = draft.with_vocabulary(MOST) if kind == "reduced" else draft
    draft.bind(specvlm.target)
    return draft


def answered(specvlm: SpecVLM, new_tokens: int = 12, seed: int = 0) -> Batch:
    prompt = prompt_for(specvlm.target.model, seed=seed)
    sequences = specvlm.generate(**prompt, max_new_tokens=new_tokens).sequences
    answers = torch.arange(sequences.shape[1])[None] >= prompt["input_ids"].shape[1]
    return Batch({"input_ids": sequences, "pixel_values": prompt["pixel_values"]}, answers)


def joined(one: Batch, other: Batch) -> Batch:
    """Both as one batch, padded at their ends."""
    longest = max(one.answers.shape[1], other.answers.shape[1])
    ids, answers = (
        torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts])
        for parts in ((one.inputs["input_ids"], other.inputs["input_ids"]), (one.answers, other.answers))
    )
    pixels = torch.cat([one.inputs["pixel_values"], other.inputs["pixel_values"]])
    return Batch({"input_ids": ids, "pixel_values": pixels}, answers)


def unrolled(specvlm: SpecVLM, draft: PairDraft, batch: Batch) -> list[dict[tuple[int, int], torch.Tensor]]:
    """Every level's logits, by row and by how far from the sequence's end the pair is."""
    objective = objective_of(specvlm.target, draft, DistillConfig(steps=1, unrolled=LEVELS))
    assert isinstance(objective, HeadObjective)
    taught, hidden = specvlm.target.teach(batch.inputs, draft.taps)
    read = objective._read(taught, hidden, batch.answers, 0)
    found = []
    for level in levels(draft.head, read, LEVELS):
        lengths = [int(row.nonzero().max()) + 1 for row in batch.answers]
        starts = [int(read.counts[row].nonzero().max()) for row in range(len(lengths))]  # the last pair that counts
        keys = [(row, starts[row] - place) for row, place in zip(level.row.tolist(), level.place.tolist(), strict=True)]
        found.append(dict(zip(keys, spread(draft, draft.logits(level.hidden)), strict=True)))
    return found


@pytest.mark.parametrize("compressor", [None, TextOnlyConfig(), ViSpecConfig(heads=4)], ids=str)
@pytest.mark.parametrize("kind", ["eagle", "reduced", "eagle3"])
@torch.no_grad()
def test_unrolled_logits_are_those_of_a_chain_in_decoding(specvlm, kind, compressor):
    draft, batch = head_of(specvlm, kind, compressor), answered(specvlm)
    target, ids = specvlm.target, batch.inputs["input_ids"]
    length, said = ids.shape[1], int(batch.answers.sum())
    by_level = unrolled(specvlm, draft, joined(batch, answered(specvlm, 9, seed=1)))
    assert [len([key for key in level if key[0] == 0]) for level in by_level] == list(
        range(said - 1, said - 1 - LEVELS, -1)
    )
    for root in range(length - said, length - LEVELS):
        inputs = {"input_ids": ids[:, :root], "pixel_values": batch.inputs["pixel_values"]}
        greedy = Sampling(0.0, 0, 1.0, torch.tensor([0]))
        state, prompt = target.prefill(inputs, sampling=greedy, limits=Limits(12), taps=draft.taps)
        state.first()
        assert state.step.tokens.item() == ids[0, root]
        session = draft.start(prompt, state)
        hidden = session.append(state.step, state.kv_len)
        for depth in range(LEVELS):
            from_end = length - 2 - root - depth
            logits = spread(draft, draft.logits(hidden))[0, 0]
            torch.testing.assert_close(logits, by_level[depth][0, from_end], atol=1e-5, rtol=1e-5)
            seen = torch.tensor([[[(2 << depth) - 1]]])
            beam = Beam(ids[:, root + depth + 1, None], torch.zeros(1, 1, dtype=torch.int64), seen)
            hidden = session.expand(beam, hidden, depth, Plan(LEVELS + 1, LEVELS, 1), state)
        state.close()


def test_a_chain_ends_with_its_answer(specvlm):
    """Two answers in one conversation: no chain goes from one into the other."""
    batch = answered(specvlm, 12)
    first, last = batch.answers.nonzero()[0, 1], batch.answers.nonzero()[-1, 1]
    answers = batch.answers.clone()
    answers[0, first + 5 : first + 7] = False
    assert int(last - first) == 11
    found = unrolled(specvlm, head_of(specvlm, "eagle"), Batch(batch.inputs, answers))
    assert [len(level) for level in found] == [8, 6, 4, 2, 0]  # answers of 5 tokens each


@torch.no_grad()
def test_levels_weigh_less_and_less(specvlm):
    """The loss is the levels' sums, weighed, over the rows of the first."""
    batch, draft = answered(specvlm), head_of(specvlm, "eagle3")
    rows = int(batch.answers.sum()) - 1
    target = specvlm.target

    def loss(unrolled: int) -> float:
        config = DistillConfig(steps=1, unrolled=unrolled, cross_entropy_weight=1.0)
        return float(objective_of(target, draft, config).lesson(batch, 0).loss)

    by_level = unrolled(specvlm, draft, batch)
    _, hidden = target.teach(batch.inputs)
    expected = 0.0
    for level in range(3):
        total = 0.0
        for (_, from_end), logits in by_level[level].items():
            p = target.head(hidden[0, -2 - from_end])[MOST].softmax(-1)
            total -= float((p * logits[MOST].log_softmax(-1)).sum())
        expected += 0.8**level * total / rows
        assert loss(level + 1) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["reduced", "eagle3"])
def test_heads_of_their_own_vocabulary_learn(specvlm, kind):
    batch, draft = answered(specvlm, 30, seed=28), head_of(specvlm, kind)
    config = DistillConfig(steps=120, learning_rate=3e-3, unrolled=2, cross_entropy_weight=1.0)
    first, *_, last = distill(specvlm.target, draft, lambda number: batch, config)
    assert first.agreement < 0.1
    assert last.agreement > 0.8
    assert ("feature" in last.parts) == (kind == "reduced")
