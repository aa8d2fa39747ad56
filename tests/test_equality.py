"""What `specvlm check` finds."""

import pytest
import torch

from specvlm import Answer, GenerateConfig, SpecVLM
from specvlm.equality import compare
from tests.fakes import VOCAB, prompt_for, tiny_llava

INDEX = 5


class Faulty(SpecVLM):
    """Says another token than it should when a draft helps; `wrong` of the right one, from `INDEX` on nothing."""

    def generate(self, **kwargs) -> Answer:
        answer = super().generate(**kwargs)
        if "draft" in kwargs:
            return answer
        wrong = [] if self.ends_early else [(answer.tokens[INDEX] + 1) % VOCAB]
        return Answer(answer.sequences, [*answer.tokens[:INDEX], *wrong], answer.stats)

    ends_early = False


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@pytest.fixture(scope="module")
def prompt(model):
    return prompt_for(model)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_equal_answers(model, prompt, temperature):
    found = compare(SpecVLM(model, draft="ngram"), prompt, GenerateConfig(max_new_tokens=20, temperature=temperature))
    assert found.divergence is None
    assert found.tokens == 20
    assert found.tau >= 1


def test_a_divergence_comes_with_the_gap_that_the_target_saw(model, prompt):
    faulty = Faulty(model, draft="ngram")
    found = compare(faulty, prompt, GenerateConfig(max_new_tokens=20)).divergence
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=20)
    length = prompt["input_ids"].shape[1]
    right = int(answer[0, length + INDEX])
    assert (found.index, found.expected, found.got) == (INDEX, right, (right + 1) % VOCAB)
    seen = prompt | {"input_ids": answer[:, : length + INDEX]}
    seen.pop("attention_mask")
    with torch.no_grad():
        logits = model(**seen).logits[0, -1]
    assert found.gap == pytest.approx(float(logits[right] - logits[found.got]), abs=1e-4)


def test_the_gap_of_sampled_answers_is_that_of_the_perturbed_logits(model, prompt):
    faulty = Faulty(model, draft="ngram")
    found = [
        compare(faulty, prompt, GenerateConfig(max_new_tokens=20, temperature=1.0, seed=seed, **filters)).divergence
        for seed in range(4)
        for filters in ({}, {"top_k": 1})
    ]
    assert all(one.gap > 0 for one in found[::2]), "the token drawn has the largest perturbed logit"
    assert all(one.gap is None for one in found[1::2]), "a token that top-k left out is infinitely far"


def test_the_last_position_of_the_context_can_be_looked_at(model, prompt):
    faulty = Faulty(model, draft="ngram")
    left = faulty.target.spec.context - prompt["input_ids"].shape[1]
    text = torch.randint(5, VOCAB, (1, left - INDEX - 1), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([prompt["input_ids"], text], dim=1)
    full = prompt | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = compare(faulty, full, GenerateConfig(max_new_tokens=INDEX + 1))
    assert found.divergence.index == INDEX
    assert found.divergence.gap > 0


def test_an_answer_that_ends_early_differs_where_it_ends(model, prompt):
    faulty = Faulty(model, draft="ngram")
    faulty.ends_early = True
    found = compare(faulty, prompt, GenerateConfig(max_new_tokens=20)).divergence
    assert (found.index, found.got, found.gap) == (INDEX, None, None)


def test_there_is_nothing_to_compare_without_a_draft(model, prompt):
    with pytest.raises(ValueError, match="draft: expected one to check, got none"):
        compare(SpecVLM(model), prompt, GenerateConfig())
