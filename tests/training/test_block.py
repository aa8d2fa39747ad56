"""Training a block draft: its blocks are those of decoding, its loss by hand, and it learns a batch by heart."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specvlm import SpecVLM
from specvlm.config import Recipe
from specvlm.drafts import BlockConfig, BlockDraft, BlockHead
from specvlm.policies import Eagle2
from specvlm.state import Limits, Sampling
from specvlm.training import Batch, BlockDistillConfig, BlockObjective, DistillConfig, distill, logit_losses
from specvlm.training.block import block_outputs, usual_gamma
from specvlm.tree import Plan, root_only
from tests.fakes import VOCAB, prompt_for, tiny_llava
from tests.training.test_distill import batch_of


@pytest.fixture(scope="module")
def specvlm() -> SpecVLM:
    return SpecVLM(tiny_llava(num_hidden_layers=3, num_key_value_heads=2))


def fresh_draft(specvlm: SpecVLM, **sizes: int) -> BlockDraft:
    torch.manual_seed(0)
    settings = {"intermediate_size": 160, "block_size": 5, "num_hidden_layers": 2} | sizes
    draft = BlockDraft(BlockHead(BlockConfig.for_target(specvlm.target.spec, **settings)))
    draft.bind(specvlm.target)
    return draft


def together(*batches: Batch) -> Batch:
    """The sequences as one batch, padded at their ends."""
    longest = max(batch.answers.shape[1] for batch in batches)

    def padded(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, longest - x.shape[1]))

    inputs = {
        "input_ids": torch.cat([padded(batch.inputs["input_ids"]) for batch in batches]),
        "pixel_values": torch.cat([batch.inputs["pixel_values"] for batch in batches]),
    }
    return Batch(inputs, torch.cat([padded(batch.answers) for batch in batches]))


@torch.no_grad()
def test_blocks_are_those_of_decoding(specvlm, monkeypatch):
    target, draft = specvlm.target, fresh_draft(specvlm)
    batches = [batch_of(specvlm, tokens, seed) for tokens, seed in ((12, 0), (7, 1))]
    both = together(*batches)
    taught, _ = target.teach(both.inputs, draft.taps)
    anchors = torch.stack([(batch.answers[0].nonzero()[0] + torch.arange(6)) for batch in batches])
    outputs = block_outputs(draft, taught.features, taught.embeds, anchors)
    trained = draft.logits(outputs)[:, :, 1:]
    seen: list[torch.Tensor] = []
    logits = draft.logits
    monkeypatch.setattr(draft, "logits", lambda hidden: seen.append(logits(hidden)) or seen[-1])
    for row, seed in enumerate((0, 1)):
        state, prompt = target.prefill(
            prompt_for(target.model, seed=seed),
            sampling=Sampling(0.0, 0, 1.0, torch.tensor([0])),
            limits=Limits(12),
            taps=draft.taps,
        )
        state.first()
        session = draft.start(prompt, state)
        for anchor in range(6):
            seen.clear()
            root = session.propose(state).tokens[:, :1]
            torch.testing.assert_close(trained[row, anchor], seen[0][0], atol=1e-5, rtol=1e-5)
            assert root == both.inputs["input_ids"][row, anchors[row, anchor]]
            tree = root_only(state.root)
            scores = target.verify(tree, state)
            state.commit(tree, scores, state.sampling.accept(tree, scores.logits, state.kv_len))
        state.close()


@torch.no_grad()
def test_the_loss_worked_out_by_hand(specvlm):
    """Two answers in one sequence, one of them longer than a block, and a shorter sequence beside it."""
    target, draft, gamma = specvlm.target, fresh_draft(specvlm, block_size=4), 1.5
    both = together(batch_of(specvlm, 9, 0), batch_of(specvlm, 3, 1))
    both.answers[0, -4] = False  # 5 tokens, then 3 of another answer
    objective = BlockObjective(target, draft, BlockDistillConfig(steps=1, gamma=gamma, cross_entropy_weight=0.25))
    lesson = objective.lesson(both, 0)
    taught, hidden = target.teach(both.inputs, draft.taps)
    total = weights = agrees = rows = 0.0
    for row, answers in enumerate(both.answers.tolist()):
        for anchor in range(len(answers) - 1):
            outputs = block_outputs(draft, taught.features, taught.embeds, torch.tensor([[anchor]] * 2))[row, 0]
            for slot in range(1, 4):
                if anchor + slot >= len(answers) or not all(answers[anchor : anchor + slot + 1]):
                    break
                p = target.head(hidden[row, anchor + slot - 1]).softmax(-1)
                q = target.head(outputs[slot]).softmax(-1)
                weight = math.exp(-(slot - 1) / gamma)
                total -= weight * float((p * q.log()).sum())
                weights += weight
                agrees += float(p.argmax() == q.argmax())
                rows += 1
    assert rows == (3 + 3 + 2 + 1) + (2 + 1) + (2 + 1)
    assert float(lesson.parts["cross_entropy"]) == pytest.approx(total / weights, rel=1e-5)
    assert float(lesson.loss) == pytest.approx(0.25 * total / weights, rel=1e-5)
    assert float(lesson.agreement) == pytest.approx(agrees / rows)


def test_anchors_are_drawn_anew_every_step(specvlm):
    both = together(batch_of(specvlm, 30, 0), batch_of(specvlm, 12, 1))

    def drawn(anchors: int, step: int, seed: int = 0) -> list[set[int]]:
        config = BlockDistillConfig(steps=1, anchors=anchors, seed=seed)
        found, counts = BlockObjective(specvlm.target, fresh_draft(specvlm), config)._anchors(both.answers, step)
        return [set(row[seen.any(-1)].tolist()) for row, seen in zip(found, counts, strict=True)]

    every = [set(row.nonzero()[:-1, 0].tolist()) for row in both.answers]
    assert drawn(512, 0) == every
    assert [len(row) for row in drawn(5, 0)] == [5, 5]
    assert [len(row) for row in drawn(20, 0)] == [20, 11]
    assert drawn(5, 3) == drawn(5, 3)
    assert drawn(5, 3) != drawn(5, 4)
    assert drawn(5, 3) != drawn(5, 3, seed=1)
    assert set.union(*(drawn(5, step)[0] for step in range(40))) == every[0]


def test_every_weight_learns(specvlm):
    draft = fresh_draft(specvlm)
    lesson = BlockObjective(specvlm.target, draft, DistillConfig(steps=1)).lesson(batch_of(specvlm, 12), 0)
    lesson.loss.backward()
    still = [name for name, weight in draft.head.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert still == []


def test_an_answer_with_nothing_to_guess(specvlm):
    batch, draft = batch_of(specvlm, 1), fresh_draft(specvlm)
    (only,) = distill(specvlm.target, draft, lambda step: batch, DistillConfig(steps=1))
    assert (only.loss, only.agreement) == (0, 0)
    assert all(weight.isfinite().all() for weight in draft.head.parameters())


def test_a_draft_that_knows_its_batch_has_the_whole_block_accepted(specvlm):
    seed, depth = 17, 4  # a prompt in whose answer the target's best two tokens are nowhere nearly equal
    batch = batch_of(specvlm, 31 + depth, seed)
    draft = fresh_draft(specvlm)
    config = BlockDistillConfig(steps=160, learning_rate=3e-3, cross_entropy_weight=1.0, anchors=16)
    first, *_, last = distill(specvlm.target, draft, lambda step: batch, config)
    assert last.loss == last.parts["cross_entropy"] < first.loss
    draft.policy = Eagle2(Plan(nodes=depth + 1, depth=depth, width=1))
    answer = specvlm.generate(**prompt_for(specvlm.target.model, seed=seed), max_new_tokens=31, draft=draft)
    assert answer.stats.tau == depth + 1
    assert answer.tokens == batch.inputs["input_ids"][0, -31 - depth : -depth].tolist()


def test_a_run_that_stops_resumes_to_the_same_weights(specvlm, tmp_path: Path):
    batches = [batch_of(specvlm, n) for n in (8, 9, 10)]
    config = BlockDistillConfig(steps=6, checkpoint_every=2, anchors=3)

    def run(steps: int, checkpoint: Path | None, config: BlockDistillConfig = config) -> torch.Tensor:
        draft = fresh_draft(specvlm)
        going = distill(specvlm.target, draft, lambda step: batches[step % 3], config, checkpoint=checkpoint)
        for _ in range(steps):
            next(going)
        going.close()
        return torch.cat([weight.detach().flatten() for weight in draft.head.parameters()])

    run(3, tmp_path / "run.pt")
    assert torch.equal(run(4, tmp_path / "run.pt"), run(6, None))
    with pytest.raises(
        ValueError, match=r"checkpoint: expected this run's own in .*, got one with config.anchors 3 instead of 4"
    ):
        run(1, tmp_path / "run.pt", replace(config, anchors=4))


def test_the_published_gammas():
    assert [usual_gamma(size) for size in (16, 10, 8, 2)] == [7, 5, 4, 1]


def test_weights_of_rows():
    logits, teacher = torch.randn(2, 3, VOCAB, generator=torch.Generator().manual_seed(0))
    rows = [
        float(logit_losses(logits[i : i + 1], teacher[i : i + 1], Recipe()).parts["cross_entropy"]) for i in range(3)
    ]
    found = logit_losses(logits, teacher, Recipe(), weights=torch.tensor([1.0, 0.5, 0.25])).parts["cross_entropy"]
    assert float(found) == pytest.approx((rows[0] + 0.5 * rows[1] + 0.25 * rows[2]) / 1.75)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"anchors": 0}, "anchors: expected an integer >= 1, got 0"),
        ({"gamma": 0.0}, "gamma: expected a finite number > 0, got 0.0"),
        ({"gamma": float("inf")}, "gamma: expected a finite number > 0, got inf"),
        ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"feature_noise": 0.1}, "feature_noise: expected 0, for a block draft reads no output of its own, got 0.1"),
        ({"unrolled": 2}, "unrolled: expected 1, for a block draft reads no output of its own, got 2"),
    ],
)
def test_settings_out_of_range(specvlm, settings, message):
    with pytest.raises(ValueError, match=message):
        BlockObjective(specvlm.target, fresh_draft(specvlm), BlockDistillConfig(**{"steps": 1} | settings))
