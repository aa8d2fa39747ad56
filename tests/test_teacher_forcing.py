"""The own decoder in bf16, told what to say: no further from float32 than Hugging Face's forward in bf16."""

import copy

import pytest
import torch
from torch import Tensor

from specvlm.config import GenerateConfig
from specvlm.state import Limits, Sampling
from specvlm.targets.llama import LlamaTarget
from specvlm.tree import tree_from_lists
from tests.fakes import prompt_for, tiny_llava

TOKENS = 64
#: Lengths of the chains that the answer is verified in.
CHAINS = (1, 8, 64)
MODELS = [("llava", "llama", 4), ("llava", "qwen2", 1), ("llava_next", "mistral", 2)]
CASES = [(*model, "cpu") for model in MODELS]
CASES += [pytest.param((*model, "cuda"), marks=pytest.mark.gpu) for model in MODELS]


class Case:
    """A model in float32 and in bf16, what the first says to a prompt, and its logits for each token of that.

    Attributes:
        target: of the bf16 model.
        answer: TOKENS ids.
        exact, theirs: [TOKENS, V] float64, by Hugging Face's forward over the whole sequence: in float32, in bf16.
    """

    def __init__(self, family: str, language: str, kv_heads: int, device: str) -> None:
        model = tiny_llava(family, language, num_hidden_layers=4, num_key_value_heads=kv_heads).to(device)
        self.prompt = prompt_for(model)
        said = model.generate(**self.prompt, do_sample=False, max_new_tokens=TOKENS)
        self.answer = said[0, -TOKENS:].tolist()
        whole = self.prompt | {"input_ids": said, "attention_mask": torch.ones_like(said)}
        half = copy.deepcopy(model).to(torch.bfloat16)
        with torch.no_grad():
            self.exact, self.theirs = (one(**whole).logits[0, -TOKENS:].double() for one in (model, half))
        self.target = LlamaTarget(half)

    @torch.inference_mode()
    def ours(self, chain: int) -> Tensor:
        """Logits [TOKENS, V] float64 for each token of the answer, `chain` of them a forward."""
        spec = self.target.spec
        sampling = Sampling.of(GenerateConfig(), 0, batch=1, device=spec.device)
        state, _ = self.target.prefill(self.prompt, sampling=sampling, limits=Limits(TOKENS), taps=None)
        found = []
        for first in range(0, TOKENS, chain):
            tree = tree_from_lists(self.answer[first : first + chain], range(-1, chain - 1), device=spec.device)
            found.append(self.target.verify(tree, state).logits[0].double())
            state.kv_len.add_(chain)  # a chain's keys and values stand where they belong
        state.close()
        return torch.cat(found)


@pytest.fixture(scope="module", params=CASES, ids=lambda params: "-".join(map(str, params)))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


@pytest.mark.parametrize("chain", CHAINS)
def test_logits_are_within_twice_hugging_faces_own_error(case, chain):
    ours, theirs = case.ours(chain) - case.exact, case.theirs - case.exact
    assert case.theirs.std() > 0.1, "logits that say nothing have no error"
    assert theirs.norm() > 0
    assert ours.norm() <= 2 * theirs.norm()
    assert ours.abs().max() <= 2 * theirs.abs().max()


@pytest.mark.parametrize("case", CASES[len(MODELS) :], indirect=True, ids=lambda params: "-".join(map(str, params)))
def test_a_row_is_computed_alike_alone_and_among_others(case):
    alone, few, many = (case.ours(chain) for chain in CHAINS)
    assert torch.equal(alone, few)
    assert torch.equal(alone, many)
