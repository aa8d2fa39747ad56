"""Training a draft: it learns one batch by heart, and a killed run resumes to the same weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specvlm import SpecVLM
from specvlm.compressors import CompressorConfig, DecoupledConfig, SelectConfig, TextOnlyConfig, ViSpecConfig
from specvlm.drafts import EagleConfig, EagleDraft, EagleHead, VLMDraft
from specvlm.policies import Eagle2
from specvlm.training import Batch, DistillConfig, distill
from specvlm.tree import Plan
from tests.fakes import IMAGE_TOKEN, prompt_for, tiny_llava, tiny_lm


@pytest.fixture(scope="module")
def specvlm() -> SpecVLM:
    return SpecVLM(tiny_llava())


COMPRESSORS = [None, TextOnlyConfig(), DecoupledConfig(), ViSpecConfig(heads=4)]


def fresh_draft(specvlm: SpecVLM, plan: Plan | None = None, compressor: CompressorConfig | None = None) -> EagleDraft:
    torch.manual_seed(0)
    config = EagleConfig.for_target(specvlm.target.spec, intermediate_size=160)
    draft = EagleDraft(EagleHead(replace(config, compressor=compressor)), Eagle2(plan))
    draft.bind(specvlm.target)
    return draft


def batch_of(specvlm: SpecVLM, new_tokens: int, seed: int = 0) -> Batch:
    """The target's own answer to one prompt."""
    prompt = prompt_for(specvlm.target.model, seed=seed)
    sequences = specvlm.generate(**prompt, max_new_tokens=new_tokens).sequences
    answers = torch.arange(sequences.shape[1])[None] >= prompt["input_ids"].shape[1]
    return Batch({"input_ids": sequences, "pixel_values": prompt["pixel_values"]}, answers)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_a_head_that_knows_its_batch_accepts_every_level(specvlm, compressor):
    seed, depth = 28, 4  # a prompt in whose answer the target's best two tokens are nowhere nearly equal
    batch = batch_of(specvlm, 40, seed)
    draft = fresh_draft(specvlm, Plan(nodes=depth + 1, depth=depth, width=1), compressor)
    config = DistillConfig(steps=300, learning_rate=3e-3, feature_noise=0.05)
    first, *_, last = distill(specvlm.target, draft, lambda step: batch, config)
    assert last.loss < first.loss
    prompt = prompt_for(specvlm.target.model, seed=seed)
    answer = specvlm.generate(**prompt, max_new_tokens=31, draft=draft)
    assert answer.stats.tau == depth + 1
    assert answer.tokens == specvlm.generate(**prompt, max_new_tokens=31).tokens
    sampled = prompt | {"max_new_tokens": 64, "temperature": 0.3, "seed": 3}
    drafted = specvlm.generate(**sampled, draft=draft)
    assert drafted.tokens == specvlm.generate(**sampled).tokens
    assert drafted.stats.from_draft


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_padding_and_company_change_nothing(specvlm, compressor):
    short, long = batch_of(specvlm, 6), batch_of(specvlm, 20)
    pad = long.answers.shape[1] - short.answers.shape[1]
    padded = {"input_ids": torch.nn.functional.pad(short.inputs["input_ids"], (0, pad))}
    answers = torch.nn.functional.pad(short.answers, (0, pad))
    pixels = {"pixel_values": short.inputs["pixel_values"].repeat(2, 1, 1, 1)}
    both = Batch(
        {"input_ids": torch.cat([padded["input_ids"], long.inputs["input_ids"]])} | pixels,
        torch.cat([answers, long.answers]),
    )
    config = DistillConfig(steps=1)
    alone = [
        next(distill(specvlm.target, fresh_draft(specvlm, None, compressor), lambda step, one=one: one, config))
        for one in (short, long)
    ]
    together = next(distill(specvlm.target, fresh_draft(specvlm, None, compressor), lambda step: both, config))
    rows = [int(one.answers.sum()) - 1 for one in (short, long)]
    mean = sum(n * one.parts["cross_entropy"] for n, one in zip(rows, alone, strict=True)) / sum(rows)
    assert together.parts["cross_entropy"] == pytest.approx(mean, rel=1e-4)


def test_tau_is_measured_when_a_checkpoint_is_due(specvlm):
    batch, taus = batch_of(specvlm, 8), iter((1.5, 2.5))
    run = distill(
        specvlm.target,
        fresh_draft(specvlm),
        lambda step: batch,
        DistillConfig(steps=5, checkpoint_every=3),
        measure_tau=lambda: next(taus),
    )
    seen = list(run)
    assert [at.tau for at in seen] == [None, None, 1.5, 1.5, 2.5]
    assert [at.step for at in seen] == [1, 2, 3, 4, 5]
    assert seen[0].seconds_left > 0
    assert seen[-1].seconds_left == 0


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
    with pytest.raises(
        ValueError, match=r"checkpoint: expected this run's own .* got one with config.steps 1 instead of 2$"
    ):
        next(other)
    elsewhere = SpecVLM(tiny_llava(seed=1))
    moved = distill(
        elsewhere.target, fresh_draft(elsewhere), lambda step: batch, DistillConfig(steps=1), checkpoint=checkpoint
    )
    with pytest.raises(
        ValueError, match=r"checkpoint: expected this run's own .* got one with target.head \[.*\] instead of \["
    ):
        next(moved)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    broken = distill(
        specvlm.target, fresh_draft(specvlm), lambda step: batch, DistillConfig(steps=1), checkpoint=checkpoint
    )
    with pytest.raises(ValueError, match="checkpoint: expected a whole one"):
        next(broken)


def small_draft(specvlm: SpecVLM, kind: str, plan: Plan | None = None) -> VLMDraft:
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = tiny_llava(seed=6, **sizes) if kind == "llava" else tiny_lm(kind, seed=6, **sizes)
    if kind == "llava":
        model.model.vision_tower.load_state_dict(specvlm.target.model.model.vision_tower.state_dict())
    draft = VLMDraft(model, Eagle2(plan))
    draft.bind(specvlm.target)
    return draft


@pytest.mark.parametrize("kind", ["llava", "qwen2"])
def test_a_small_model_that_knows_its_batch_accepts_nearly_every_level(specvlm, kind):
    batch, depth = batch_of(specvlm, 40), 4
    draft = small_draft(specvlm, kind, Plan(nodes=depth + 1, depth=depth, width=1))
    config = DistillConfig(steps=150, learning_rate=3e-3, cross_entropy_weight=1.0)
    first, *_, last = distill(specvlm.target, draft, lambda step: batch, config)
    assert last.loss == last.parts["cross_entropy"] < first.parts["cross_entropy"]
    assert "feature" not in last.parts
    assert last.agreement > 0.95  # the target's best two are nearly equal somewhere
    assert draft.shares_tower is (kind == "llava")
    answer = specvlm.generate(**prompt_for(specvlm.target.model), max_new_tokens=31, draft=draft)
    assert answer.stats.tau > depth


def test_a_small_model_of_fewer_rows_learns_what_the_target_says_of_these(specvlm):
    batch, rows = batch_of(specvlm, 40), 200
    draft = VLMDraft(tiny_lm(seed=5, vocab_size=rows))
    draft.bind(specvlm.target)
    ids, given = batch.inputs["input_ids"], int(batch.answers.sum()) - 1
    assert ids[batch.answers].max() >= rows
    with torch.no_grad():
        teacher = specvlm.target.model(**batch.inputs).logits[0, -given - 1 : -1, :rows]
        text = ids[ids != IMAGE_TOKEN].clamp(max=rows - 1)[None]
        logits = draft.model(input_ids=text).logits[0, -given - 1 : -1]
    expected = -(teacher.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    config = DistillConfig(steps=30, learning_rate=3e-3, cross_entropy_weight=1.0)
    first, *_, last = distill(specvlm.target, draft, lambda step: batch, config)
    assert first.parts["cross_entropy"] == pytest.approx(float(expected), rel=1e-4)
    assert last.loss < first.loss


def test_a_small_models_tower_stays_as_it_is_and_its_run_resumes(specvlm, tmp_path: Path):
    batches = [batch_of(specvlm, n) for n in (8, 9, 10)]
    config = DistillConfig(steps=6, checkpoint_every=2)

    def run(checkpoint: Path | None, steps: int = 6) -> VLMDraft:
        draft = small_draft(specvlm, "llava")
        going = distill(specvlm.target, draft, lambda step: batches[step % 3], config, checkpoint=checkpoint)
        for _ in range(steps):
            next(going)
        going.close()
        return draft

    whole = run(None)
    run(tmp_path / "run.pt", steps=3)
    resumed = run(tmp_path / "run.pt", steps=4)
    weights, again = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    tower = specvlm.target.model.model.vision_tower.state_dict()
    assert all(torch.equal(weight, weights[f"model.vision_tower.{name}"]) for name, weight in tower.items())
    assert all(parameter.requires_grad for parameter in whole.model.parameters())
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert not any("vision_tower" in name for name in saved["weights"])


def test_batches_of_a_step_weigh_by_their_rows(specvlm):
    short, long = batch_of(specvlm, 4), batch_of(specvlm, 12)
    pad = long.answers.shape[1] - short.answers.shape[1]
    both = Batch(
        {
            "input_ids": torch.cat(
                [torch.nn.functional.pad(short.inputs["input_ids"], (0, pad)), long.inputs["input_ids"]]
            ),
            "pixel_values": short.inputs["pixel_values"].repeat(2, 1, 1, 1),
        },
        torch.cat([torch.nn.functional.pad(short.answers, (0, pad)), long.answers]),
    )

    def trained(accumulate: int, *batches: Batch) -> list[float]:
        draft = fresh_draft(specvlm)
        config = DistillConfig(steps=3, learning_rate=1e-2, accumulate=accumulate, clip=1e3)
        seen = list(distill(specvlm.target, draft, lambda number: batches[number % accumulate], config))
        weights = torch.cat([p.detach().flatten() for p in draft.head.parameters()])
        return [*weights[::97].tolist(), *(at.loss for at in seen), *(at.agreement for at in seen)]

    assert trained(2, short, long) == pytest.approx(trained(1, both), rel=1e-4, abs=1e-5)


def test_a_loss_that_is_no_number_names_its_batch_and_leaves_the_checkpoint(specvlm, tmp_path: Path):
    batch = replace(batch_of(specvlm, 8), ids=("photo 7", "photo 9"))
    spoiled = replace(batch, inputs=batch.inputs | {"pixel_values": batch.inputs["pixel_values"] * torch.nan})
    checkpoint, draft = tmp_path / "run.pt", fresh_draft(specvlm)
    config = DistillConfig(steps=9, checkpoint_every=2, accumulate=2)
    run = distill(
        specvlm.target,
        draft,
        lambda number: spoiled if number == 11 else replace(batch, ids=("fine",)),
        config,
        checkpoint=checkpoint,
    )
    for _ in range(5):
        next(run)
    before = [weight.clone() for weight in draft.head.parameters()]
    expected = r"loss: expected a finite number, got a loss of nan in step 6, of photo 7, photo 9; .*run.pt stays"
    with pytest.raises(ValueError, match=expected):
        next(run)
    assert torch.load(checkpoint, weights_only=True)["step"] == 4
    assert all(torch.equal(a, b) for a, b in zip(before, draft.head.parameters(), strict=True))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write failed")], ids=str)
def test_a_full_disk_leaves_the_last_whole_checkpoint(specvlm, tmp_path: Path, monkeypatch, error):
    batch, checkpoint = batch_of(specvlm, 8), tmp_path / "run.pt"
    config = DistillConfig(steps=4, checkpoint_every=1)

    def trained() -> EagleDraft:
        draft = fresh_draft(specvlm)
        list(distill(specvlm.target, draft, lambda number: batch, config, checkpoint=checkpoint))
        return draft

    whole = trained()
    checkpoint.unlink()
    written = torch.save

    def full(state: dict, file) -> None:
        if state["step"] == 3:
            file.write(b"half of it")
            raise error
        written(state, file)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(
            OSError, match=r"checkpoint: expected room to write .*run.pt, got .*; the one before is whole"
        ):
            trained()
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    assert torch.load(checkpoint, weights_only=True)["step"] == 2
    resumed = trained()
    assert all(torch.equal(a, b) for a, b in zip(whole.head.parameters(), resumed.head.parameters(), strict=True))


def test_small_updates_are_not_lost_in_half_precision():
    half = SpecVLM(tiny_llava().bfloat16())
    batch, draft = batch_of(half, 8), fresh_draft(half)
    before = draft.head.fc.weight.detach().clone()
    config = DistillConfig(steps=20, learning_rate=2e-5, unrolled=2, accumulate=2)
    list(distill(half.target, draft, lambda number: batch, config))
    moved = (draft.head.fc.weight.detach() != before).float().mean()
    assert draft.head.fc.weight.dtype == torch.bfloat16
    assert moved > 0.5


def test_a_draft_that_is_not_the_targets_does_not_learn_from_it(specvlm):
    spec = specvlm.target.spec
    loose = EagleDraft(EagleHead(EagleConfig.for_target(spec, intermediate_size=64)))
    config = DistillConfig(steps=1)
    with pytest.raises(ValueError, match="draft: expected one that is bound to the target, got one that is bound to n"):
        next(distill(specvlm.target, loose, lambda step: batch_of(specvlm, 8), config))
    loose.bind(SpecVLM(tiny_llava()).target)
    with pytest.raises(ValueError, match="draft: expected one that is bound to the target, got one that is bound to a"):
        next(distill(specvlm.target, loose, lambda step: batch_of(specvlm, 8), config))


def test_noise_for_a_draft_that_reads_no_features(specvlm):
    config = DistillConfig(steps=1, feature_noise=0.1)
    run = distill(specvlm.target, small_draft(specvlm, "llama"), lambda step: batch_of(specvlm, 8), config)
    with pytest.raises(ValueError, match=r"feature_noise: expected 0, for a small model reads no features, got 0.1"):
        next(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number >= 0, got nan"),
        ({"feature_noise": -1.0}, "feature_noise: expected a finite number >= 0, got -1.0"),
        ({"unrolled": 0}, "unrolled: expected an integer >= 1, got 0"),
        ({"accumulate": 0}, "accumulate: expected an integer >= 1, got 0"),
        ({"schedule": "linear"}, "schedule: expected cosine or constant, got 'linear'"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\), got \(0.9, 1.0\)"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**{"steps": 1} | settings)


def test_a_gate_learns_to_let_fewer_rows_through_and_its_run_resumes(specvlm, tmp_path: Path):
    batches = [batch_of(specvlm, n) for n in (8, 9, 10)]
    options = SelectConfig((("all", 1), ("pool", 4), ("none", 1)))

    def run(rows_weight: float, checkpoint: Path | None = None, steps: int = 40) -> tuple[EagleDraft, dict[str, float]]:
        config = DistillConfig(steps=40, learning_rate=1e-2, rows_weight=rows_weight, checkpoint_every=7)
        draft = fresh_draft(specvlm, None, options)
        going = distill(specvlm.target, draft, lambda step: batches[step % 3], config, checkpoint=checkpoint)
        for _ in range(steps):
            parts = dict(next(going).parts)
        going.close()
        return draft, parts

    free, told = run(0.0)
    assert {"balance", "rows", "rows left", "chose all", "chose pool 4", "chose none"} <= told.keys()
    assert sum(share for name, share in told.items() if name.startswith("chose ")) == pytest.approx(1)
    config, pictures = free.head.config, int((batches[0].inputs["input_ids"] == IMAGE_TOKEN).sum(dim=1).float().mean())
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    products = config.hidden_size * (2 * config.hidden_size + heads + 3 * config.intermediate_size)
    assert told["GFLOPs saved"] == pytest.approx((1 - told["rows left"]) * pictures * 2 * products / 1e9, rel=1e-4)
    _, pressed = run(1.0)
    assert pressed["rows"] < 0.3 * told["rows"]
    run(0.0, tmp_path / "run.pt", steps=20)
    resumed, _ = run(0.0, tmp_path / "run.pt", steps=26)  # what came after the last checkpoint is done again
    again = resumed.head.state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in free.head.state_dict().items())
