"""A few hundred steps on the demo's target: what is learned shows in rounds saved on questions never seen."""

import json
from pathlib import Path
from random import Random

import pytest

from specvlm import load
from specvlm.config import Recipe, TrainConfig
from specvlm.demo.grammar import TYPES, ask
from specvlm.demo.scenes import render, split_scene
from specvlm.training import run as training
from specvlm.training.data import split
from specvlm.training.encoding import Encoder
from specvlm.training.records import read_examples
from specvlm.training.students import new_draft

#: By how many tokens a round a trained head beats itself untrained.
MARGIN = 1.0


def scenes(folder: Path, count: int) -> Path:
    """Questions with answers about scenes, each about one of its own."""
    rng, lines = Random("learning"), list[str]()
    while len(lines) < count:
        scene = split_scene(rng, for_evaluation=False)
        if (found := ask(scene, rng.choice(TYPES), rng)) is not None:
            render(scene).save(folder / f"{len(lines)}.png")
            lines.append(json.dumps({"image": f"{len(lines)}.png", "question": found[0], "answer": found[1]}) + "\n")
    (folder / "index.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draft", "options"),
    [("eagle", {"feature_noise": 0.1}), ("eagle3", {"unrolled": 3, "cross_entropy_weight": 1.0})],
)
def test_a_few_hundred_steps_save_rounds(tmp_path, draft, options):
    data = scenes(tmp_path, 420)
    config = TrainConfig(
        target="demo",
        data=str(data),
        out=str(tmp_path / "out"),
        draft=draft,
        steps=300,
        batch=8,
        micro_batch=8,
        tau_prompts=6,
        max_new_tokens=64,
        self_generate=True,
    )
    found = training.train(config, Recipe(learning_rate=2e-3, warm_up=20, **options))
    assert found is not None
    assert found.tau is not None
    model = load("demo")
    encoder = Encoder(model.processor, model.target)
    prompts = split(read_examples(data), config.held_out).held_out[: config.tau_prompts]
    untrained = training.measured_tau(model, new_draft(config, model.target, 0), encoder, prompts, 64)
    trained = training.measured_tau(model, config.out, encoder, prompts, 64)
    assert trained == pytest.approx(found.tau)
    assert trained > untrained + MARGIN
    for prompt in prompts:
        inputs = encoder.question(prompt, 0) | {"max_new_tokens": 40, "temperature": 1.0}
        assert model.generate(**inputs, draft=config.out).tokens == model.generate(**inputs, draft=None).tokens
