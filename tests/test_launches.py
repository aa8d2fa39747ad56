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
from bench.floors import LAUNCHES, MODELS, Sizes, floor_of, layer_weights
from specvlm.targets.hf_attention import AttentionStep
from specvlm.targets.llama import LlamaDecoder
from tests.fakes import tiny_llava

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
        for module in ("rotary", "tree_attention"):  # a GPU's values are not looked at
            stack.enter_context(mock.patch(f"specvlm_kernels.{module}.check_range"))
        stack.enter_context(torch.no_grad())
        running = stack.enter_context(Running())
        decoder(embeds, positions, slab, step, None)
    return started + running.counts


@pytest.mark.interpreter
@pytest.mark.parametrize("nodes", [1, 64])
def test_a_layer_is_eight_launches(nodes):
    few, more = launches(1, nodes), launches(3, nodes)
    layer = Counter(kernel for kernel, _ in LAUNCHES)
    assert more - few == layer + layer
    assert layer.total() == 8
    assert few - layer == Counter({"_add_rms_norm_kernel": 1}), "the last norm"


def test_the_table_counts_the_bytes_that_the_decoder_holds():
    decoder = LlamaDecoder(tiny_llava(num_key_value_heads=2).model.language_model)
    layer = decoder._layers[0]
    held = (decoder._entering[0], layer.norm, *(weight.values for weight in layer.weights()))
    sizes = Sizes("tiny", hidden=128, inner=160, layers=2, heads=4, kv_heads=2, vocabulary=320, head_dim=32)
    assert layer_weights(sizes, itemsize=4) == sum(one.nbytes for one in held)


def test_a_step_at_7b_is_what_its_weights_take():
    """6.74e9 parameters of Llama-2-7B, less the embedding, whose rows are looked up."""
    floor = floor_of(MODELS[0], context=0)
    assert (32 * floor.weights + floor.head) / 2 == pytest.approx(6.74e9 - 32000 * 4096, rel=1e-3)
    assert floor.milliseconds == pytest.approx(3.1, abs=0.05)
