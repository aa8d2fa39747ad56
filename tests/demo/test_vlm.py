"""The training of the demo's small model: what it begins as, what it writes, how it goes on after a kill."""

import pytest
import torch

from specvlm import SpecVLM, load
from specvlm.demo import HEAD_DIR, MODEL_DIR, train_head, train_vlm
from specvlm.demo.run import tasks
from specvlm.drafts import VLMDraft, load_draft
from specvlm.training import DistillConfig
from specvlm.training.students import shallow_model


@pytest.fixture(scope="module")
def model() -> SpecVLM:
    return load("demo", draft="ngram")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(train_vlm, "batch_of", lambda step, encoder: train_head.batch_of(step, encoder, size=2))
    monkeypatch.setattr(train_vlm, "measured_tau", lambda model, draft: 1.0)


def test_it_begins_as_the_target_without_most_of_its_layers(model):
    target = model.target.model
    small = shallow_model(target).state_dict()
    for name, weight in target.state_dict().items():
        layer = name.split("language_model.layers.")[1:]
        if not layer or layer[0].startswith("0."):
            assert torch.equal(small.pop(name), weight)
        elif layer[0].startswith("7."):
            assert torch.equal(small.pop(name.replace(".layers.7.", ".layers.1.")), weight)
    assert not small


def test_a_run_writes_a_draft_and_leaves_nothing_else(model, tmp_path):
    out = tmp_path / "vlm"
    config = DistillConfig(steps=4, learning_rate=1e-3, cross_entropy_weight=1.0, checkpoint_every=2)
    train_vlm.train(out, config)
    assert [path.name for path in tmp_path.iterdir()] == ["vlm"]
    draft = load_draft(out)
    assert isinstance(draft, VLMDraft)
    draft.bind(model.target)
    assert draft.shares_tower
    assert len((out / train_head.LOG_NAME).read_text().splitlines()) == 2
    own = sum(file.stat().st_size for file in out.iterdir())
    assert own <= 7.5e6
    assert own + sum(file.stat().st_size for folder in (MODEL_DIR, HEAD_DIR) for file in folder.iterdir()) <= 25e6
    prompt = model.prepare(tasks(1)[0].picture, tasks(1)[0].question)
    for temperature in (0.0, 1.0):
        plain = model.generate(**prompt, temperature=temperature, max_new_tokens=48, draft=None)
        assert model.generate(**prompt, temperature=temperature, max_new_tokens=48, draft=draft).tokens == plain.tokens


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    config = DistillConfig(steps=3, learning_rate=1e-3, cross_entropy_weight=1.0, checkpoint_every=1)
    train_vlm.train(tmp_path / "whole", config)
    batch_of = train_vlm.batch_of

    def killed(step, encoder):
        if step == 2:
            raise KeyboardInterrupt
        return batch_of(step, encoder)

    monkeypatch.setattr(train_vlm, "batch_of", killed)
    with pytest.raises(KeyboardInterrupt):
        train_vlm.train(tmp_path / "resumed", config)
    assert [path.name for path in tmp_path.glob("resumed*")] == ["resumed.training"]
    monkeypatch.setattr(train_vlm, "batch_of", batch_of)
    train_vlm.train(tmp_path / "resumed", config)
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()
