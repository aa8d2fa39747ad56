"""Training a head: it learns one batch by heart, and a killed run resumes to the same weights."""

from pathlib import Path

import pytest
import torch

from specvlm import SpecVLM
from specvlm.drafts import EagleConfig, EagleDraft, EagleHead
from specvlm.training import Batch, DistillConfig, distill
from specvlm.tree import Plan
from tests.fakes import prompt_for, tiny_llava


@pytest.fixture(scope="module")
def specvlm() -> SpecVLM:
    return SpecVLM(tiny_llava())


def fresh_draft(specvlm: SpecVLM, plan: Plan | None = None) -> EagleDraft:
    torch.manual_seed(0)
    draft = EagleDraft(EagleHead(EagleConfig.for_target(specvlm.target.spec, intermediate_size=160)), plan)
    draft.bind(specvlm.target)
    return draft


def batch_of(specvlm: SpecVLM, new_tokens: int) -> Batch:
    """The target's own answer to one prompt."""
    prompt = prompt_for(specvlm.target.model)
    sequences = specvlm.generate(**prompt, max_new_tokens=new_tokens).sequences
    answers = torch.arange(sequences.shape[1])[None] >= prompt["input_ids"].shape[1]
    return Batch({"input_ids": sequences, "pixel_values": prompt["pixel_values"]}, answers)


def test_a_head_that_knows_its_batch_accepts_every_level(specvlm):
    batch, depth = batch_of(specvlm, 40), 4
    draft = fresh_draft(specvlm, Plan(nodes=depth + 1, depth=depth, width=1))
    config = DistillConfig(steps=400, learning_rate=3e-3, feature_noise=0.05)
    first, *_, last = distill(specvlm.target, draft, lambda step: batch, config)
    assert last.loss < first.loss
    answer = specvlm.generate(**prompt_for(specvlm.target.model), max_new_tokens=31, draft=draft)
    assert answer.stats.tau == depth + 1


def test_the_target_stays_frozen(specvlm):
    before = {name: value.clone() for name, value in specvlm.target.model.state_dict().items()}
    list(distill(specvlm.target, fresh_draft(specvlm), lambda step: batch_of(specvlm, 8), DistillConfig(steps=2)))
    assert all(torch.equal(value, before[name]) for name, value in specvlm.target.model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in specvlm.target.model.parameters())


def test_a_run_that_stops_resumes_to_the_same_weights(specvlm, tmp_path: Path):
    batches = [batch_of(specvlm, n) for n in (8, 9, 10, 11)]
    config = DistillConfig(steps=8, checkpoint_every=3, feature_noise=0.1)

    def weights(draft: EagleDraft) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in draft.head.parameters()])

    whole = fresh_draft(specvlm)
    list(distill(specvlm.target, whole, lambda step: batches[step % 4], config))
    for stop_at in (1, 3, 5, 7):
        checkpoint = tmp_path / f"{stop_at}.pt"
        run = distill(
            specvlm.target, fresh_draft(specvlm), lambda step: batches[step % 4], config, checkpoint=checkpoint
        )
        for _ in range(stop_at):
            next(run)
        run.close()
        resumed = fresh_draft(specvlm)
        list(distill(specvlm.target, resumed, lambda step: batches[step % 4], config, checkpoint=checkpoint))
        assert torch.equal(weights(resumed), weights(whole))
        assert [path.name for path in tmp_path.glob(f"{stop_at}*")] == [checkpoint.name]


def test_a_checkpoint_of_another_run_is_refused(specvlm, tmp_path: Path):
    batch = batch_of(specvlm, 8)
    checkpoint = tmp_path / "run.pt"
    list(
        distill(specvlm.target, fresh_draft(specvlm), lambda step: batch, DistillConfig(steps=1), checkpoint=checkpoint)
    )
    other = distill(
        specvlm.target, fresh_draft(specvlm), lambda step: batch, DistillConfig(steps=2), checkpoint=checkpoint
    )
    with pytest.raises(ValueError, match="checkpoint: expected the run's own configuration"):
        next(other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number >= 0, got nan"),
        ({"feature_noise": -1.0}, "feature_noise: expected a finite number >= 0, got -1.0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**{"steps": 1} | settings)
