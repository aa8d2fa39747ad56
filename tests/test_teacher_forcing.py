"""The own decoder in bf16, told what to say: no further from float32 than Hugging Face's forward in bf16."""

import copy
import functools

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
#: What makes the tiny model as wide as LLaVA-1.5-7B, with whose widths kernels choose their tiles.
WIDE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "head_dim": 128,
    "vocab_size": 32064,
}
#: family, language model, changes
MODELS = {
    "llava-llama": ("llava", "llama", {"num_hidden_layers": 4}),
    "llava-qwen2": ("llava", "qwen2", {"num_hidden_layers": 4, "num_key_value_heads": 1}),
    "llava_next-mistral": ("llava_next", "mistral", {"num_hidden_layers": 4, "num_key_value_heads": 2}),
    "wide": ("llava", "llama", WIDE | {"num_key_value_heads": 32}),
    "wide, grouped": ("llava", "llama", WIDE | {"num_key_value_heads": 8}),
}
ON_GPU = [pytest.param(name, "cuda", marks=pytest.mark.gpu, id=f"{name} on cuda") for name in MODELS]
ON_CPU = [pytest.param(name, "cpu", id=f"{name} on cpu") for name in MODELS if "wide" not in name]


class Case:
    """A model in float32 and in bf16, what the first says to a prompt, and its logits for each token of that.

    Attributes:
        target: of the bf16 model.
        answer: TOKENS ids.
        exact, theirs: [TOKENS, V] float64, by Hugging Face's forward over the whole sequence: in float32, in bf16.
    """

    def __init__(self, name: str, device: str) -> None:
        family, language, changes = MODELS[name]
        model = tiny_llava(family, language, **changes).to(device)
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


@functools.lru_cache(maxsize=1)  # a wide one is large, and its tests follow one another
def case_of(name: str, device: str) -> Case:
    return Case(name, device)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(("name", "device"), ON_CPU + ON_GPU)
def test_logits_are_within_twice_hugging_faces_own_error(name, device, chain):
    case = case_of(name, device)
    ours, theirs = case.ours(chain) - case.exact, case.theirs - case.exact
    assert case.exact.std() > 0.1, "logits that say nothing have no error"
    assert theirs.norm() > 0
    assert ours.norm() <= 2 * theirs.norm()
    assert ours.abs().max() <= 2 * theirs.abs().max()


@pytest.mark.parametrize(("name", "device"), ON_GPU)
def test_a_row_is_computed_alike_alone_and_among_others(name, device):
    alone, few, many = (case_of(name, device).ours(chain) for chain in CHAINS)
    assert torch.equal(alone, few)
    assert torch.equal(alone, many)
