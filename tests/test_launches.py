"""What a layer of the own decoder costs: how often something is launched, and that nothing runs between."""

import contextlib
import functools
import importlib
import pkgutil
from collections import Counter
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import specvlm_kernels
from specvlm.targets.hf_attention import AttentionStep
from specvlm.targets.llama import LlamaDecoder
from tests.fakes import tiny_llava

#: What a layer may launch, by kernel.
LAYER = {
    "_add_rms_norm_kernel": 2,
    "_rotary_linear_kernel": 1,
    "_tree_attention_kernel": 1,
    "_tree_attention_merge_kernel": 1,
    "_linear_kernel": 2,
    "_gated_linear_kernel": 1,
}
#: What allocates, or looks at a tensor in another way, and launches nothing on a GPU.
FREE = {
    "empty",
    "view",
    "_unsafe_view",
    "unbind",
    "select",
    "slice",
    "detach",
    "alias",
    "expand",
    "t",
    "transpose",
    "promote_types",
}


class Running(TorchDispatchMode):
    """Counts torch's own operations that run something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def launches(layers: int, nodes: int) -> Counter[str]:
    """Everything that one forward of a tree starts."""
    language = tiny_llava(num_hidden_layers=layers, num_key_value_heads=2).model.language_model
    decoder = LlamaDecoder(language)
    names = [f"specvlm_kernels.{module.name}" for module in pkgutil.iter_modules(specvlm_kernels.__path__)]
    kernels = {
        kernel
        for name in names
        for member, kernel in vars(importlib.import_module(name)).items()
        if member.endswith("_kernel") and hasattr(kernel, "run")
    }
    started: Counter[str] = Counter()
    slab = torch.zeros(layers, 2, 1, 2, 512, 32)
    step = AttentionStep(torch.tensor([300], dtype=torch.int32), torch.ones(1, nodes, 1, dtype=torch.int64))
    embeds, positions = torch.zeros(1, nodes, 128), torch.full((1, nodes), 300, dtype=torch.int32)
    with contextlib.ExitStack() as stack:
        for kernel in kernels:
            count = functools.partial(lambda name, *args, **options: started.update([name]), kernel.fn.__name__)
            stack.enter_context(mock.patch.object(kernel, "run", count))
        for module in ("decoder_ops", "tree_attention"):  # a GPU's values are not looked at
            stack.enter_context(mock.patch(f"specvlm_kernels.{module}.check_range"))
        stack.enter_context(torch.no_grad())
        running = stack.enter_context(Running())
        decoder(embeds, positions, slab, step, None)
    return started + running.counts


@pytest.mark.interpreter
@pytest.mark.parametrize("nodes", [1, 64])
def test_a_layer_is_eight_launches(nodes):
    few, more = launches(1, nodes), launches(3, nodes)
    assert more - few == Counter({name: 2 * count for name, count in LAYER.items()})
    assert sum(LAYER.values()) == 8
    assert few - Counter(LAYER) == Counter({"_add_rms_norm_kernel": 1}), "the last norm"
