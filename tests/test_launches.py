"""What a layer of the own decoder and a level of a draft cost: launches, that nothing runs between them, and bytes."""

import contextlib
import functools
import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import specvlm_kernels
from bench.floors import LAUNCHES, LEVEL_LAUNCHES, MODELS, Sizes, floor_of, layer_weights, level_of, levels_of
from specvlm.drafts import EagleConfig, EagleDraft, EagleHead
from specvlm.drafts.pairs import Pairs
from specvlm.targets.hf_attention import AttentionStep
from specvlm.targets.llama import LlamaDecoder, LlamaTarget
from specvlm.targets.llama_layers import Weight
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


def started(forward: Callable[[], object]) -> Counter[str]:
    """Everything that a forward starts."""
    names = [f"specvlm_kernels.{module.name}" for module in pkgutil.iter_modules(specvlm_kernels.__path__)]
    kernels = {
        kernel
        for name in names
        for member, kernel in vars(importlib.import_module(name)).items()
        if member.endswith("_kernel") and hasattr(kernel, "run")
    }
    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        for kernel in kernels:
            count = functools.partial(lambda name, *args, **options: counts.update([name]), kernel.fn.__name__)
            stack.enter_context(mock.patch.object(kernel, "run", count))
        for module in ("rotary", "tree_attention"):  # a GPU's values are not looked at
            stack.enter_context(mock.patch(f"specvlm_kernels.{module}.check_range"))
        stack.enter_context(torch.no_grad())
        running = stack.enter_context(Running())
        forward()
    return counts + running.counts


def tree_of(nodes: int) -> tuple[torch.Tensor, AttentionStep]:
    """Positions of a tree's nodes behind 300 stored tokens, and what they see."""
    step = AttentionStep(torch.tensor([300], dtype=torch.int32), torch.ones(1, nodes, 1, dtype=torch.int64))
    return torch.full((1, nodes), 300, dtype=torch.int32), step


def launches(layers: int, nodes: int) -> Counter[str]:
    """Everything that one forward of a tree starts."""
    decoder = LlamaDecoder(tiny_llava(num_hidden_layers=layers, num_key_value_heads=2).model.language_model)
    embeds, slab, (positions, step) = torch.zeros(1, nodes, 128), torch.zeros(layers, 2, 1, 2, 512, 32), tree_of(nodes)
    return started(lambda: decoder(embeds, positions, slab, step, None))


@pytest.mark.interpreter
@pytest.mark.parametrize("nodes", [1, 64])
def test_a_layer_is_eight_launches(nodes):
    few, more = launches(1, nodes), launches(3, nodes)
    layer = Counter(kernel for kernel, _ in LAUNCHES)
    assert more - few == layer + layer
    assert layer.total() == 8
    assert few - layer == Counter({"_add_rms_norm_kernel": 1}), "the last norm"


@pytest.mark.interpreter
@pytest.mark.parametrize("e4m3", [False, True])
def test_an_eagle_level_is_eleven_launches(e4m3):
    draft = eagle(LlamaTarget(tiny_llava(num_key_value_heads=2)), vocabulary=None, e4m3=e4m3)
    slab, (positions, step) = torch.zeros(1, 2, 1, 2, 512, 32), tree_of(10)
    embeds, hidden = torch.zeros(2, 1, 10, 128).unbind()
    decoder = draft.decoder()
    level = started(lambda: draft.logits(decoder(Pairs(embeds, hidden, positions), slab, step)))
    assert level == Counter(kernel for kernel, _ in LEVEL_LAUNCHES)
    assert level.total() == 11


@pytest.mark.parametrize("vocabulary", [None, list(range(100, 180, 2))])
@pytest.mark.parametrize("e4m3", [False, True])
def test_the_table_counts_the_bytes_that_an_eagle_level_reads(vocabulary, e4m3):
    target = LlamaTarget(tiny_llava(num_key_value_heads=2))
    draft = eagle(target, vocabulary=vocabulary, e4m3=e4m3)
    decoder, sizes = draft.decoder(), Sizes("tiny", 128, 96, 1, heads=4, kv_heads=2, vocabulary=320, head_dim=32)
    floor = level_of(sizes, vocabulary and len(vocabulary), e4m3=e4m3, itemsize=4, context=512)
    output = draft._output[0] if draft._output else Weight(target.model.lm_head.weight)
    slab = torch.zeros(1, 2, 1, 2, 512, 32)
    assert floor.fc == read(decoder.fc) + decoder.bias.nbytes
    assert floor.layer == sum(read(weight) for weight in decoder.layer.weights()) + decoder.layer.norm.nbytes
    assert floor.head == read(output)
    assert floor.kv == slab.nbytes


def eagle(target: LlamaTarget, *, vocabulary: list[int] | None, e4m3: bool) -> EagleDraft:
    """A head of random weights, bound to the target."""
    draft = EagleDraft(EagleHead(EagleConfig.for_target(target.spec, intermediate_size=96)))
    draft = draft if vocabulary is None else draft.with_vocabulary(vocabulary)
    draft = draft.quantized() if e4m3 else draft
    draft.bind(target)
    return draft


def read(weight: Weight) -> int:
    """Bytes that a product reads of it."""
    return weight.values.nbytes + (0 if weight.scale is None else weight.scale.nbytes)


def test_a_level_at_7b_is_what_its_weights_take():
    """0.73 GB in bf16, of which a reduced head and 8 bits leave 0.27."""
    whole, reduced, small, both = levels_of(MODELS[0])
    read = [one.fc + one.layer + one.head for one in (whole, reduced, small, both)]
    assert read[0] == pytest.approx(0.735e9, rel=1e-2)
    assert whole.milliseconds == pytest.approx(0.17, abs=0.01)
    assert read[1] == read[0] - 2 * 4096 * (32064 - 8192)
    assert read[2] == pytest.approx(read[0] / 2, rel=2e-3)
    assert read[3] == pytest.approx(0.27e9, rel=1e-2)


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
