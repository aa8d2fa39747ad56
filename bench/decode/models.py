"""LLaVA-1.5 in full size with random weights: the time of a step does not hang on their values.

They are made on the device in the dtype they stay in, and are the same for the same seed.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from bench.floors import MODELS, Sizes
from specvlm import SpecVLM
from specvlm.drafts import EagleConfig, EagleDraft, EagleHead
from specvlm.graphs import CudaRecorder, Recorder
from specvlm.policies import Eagle2
from specvlm.targets.llama import LlamaTarget
from specvlm.tree import Plan

#: Most positions of a prompt and its answer.
CONTEXT = 4096

_CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_TINY_CLIP = _CLIP | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
}


@dataclass(frozen=True, slots=True)
class Size:
    """A model, and what it is asked.

    Attributes:
        language: the language model's sizes.
        widened: what the demo is widened to.
        vision: the vision tower's, as `CLIPVisionConfig` takes them.
        plan: the tree of a round.
        text: the prompt's tokens besides the picture's.
        tokens: of an answer of ours.
        hf_tokens: of an answer of transformers', whose tokens take longer.
        proposable: ids that the reduced output head of a draft has.
        repeats, answers: of what takes milliseconds, and of whole answers; of the demo's questions as well.
        judged: whether it has targets.
    """

    language: Sizes
    widened: Sizes
    vision: Mapping[str, int]
    plan: Plan
    text: int
    tokens: int
    hf_tokens: int
    proposable: int
    repeats: int
    answers: int
    judged: bool

    @property
    def name(self) -> str:
        return self.language.name

    @property
    def image_tokens(self) -> int:
        """Of one picture."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2

    @property
    def prompt_tokens(self) -> int:
        """Of the whole prompt."""
        return self.text + self.image_tokens


def _full(language: Sizes) -> Size:
    """Prompt, answer and a tree fit a slab of 1024 slots."""
    tree = Plan(nodes=64, depth=6, width=10)
    return Size(
        language,
        language,
        _CLIP,
        tree,
        75,
        tokens=240,
        hf_tokens=65,
        proposable=8192,
        repeats=40,
        answers=5,
        judged=True,
    )


#: By the name that the command line has for it.
SIZES = {
    "7b": _full(MODELS[0]),
    "13b": _full(MODELS[1]),
    "tiny": Size(
        language=Sizes("tiny", hidden=64, inner=96, layers=2, heads=2, kv_heads=2, vocabulary=256, head_dim=32),
        widened=Sizes("tiny", hidden=288, inner=704, layers=8, heads=3, kv_heads=3, vocabulary=768),
        vision=_TINY_CLIP,
        plan=Plan(nodes=16, depth=4, width=3),
        text=9,
        tokens=16,
        hf_tokens=5,
        proposable=100,
        repeats=2,
        answers=1,
        judged=False,
    ),
}


@dataclass(frozen=True, slots=True)
class Subject:
    """A model under measurement.

    Attributes:
        size: its size.
        model: with the own decoder, and no draft.
        recorder: what records its rounds; None: nothing does, on a CPU.
        prompt: what it is asked.
        drafts: EAGLE heads by name, all of one set of weights.
    """

    size: Size
    model: SpecVLM
    recorder: Recorder | None
    prompt: dict[str, Tensor]
    drafts: dict[str, EagleDraft]

    @property
    def device(self) -> torch.device:
        return self.model.target.spec.device

    @property
    def asked(self) -> dict[str, Tensor | int]:
        """What `generate` takes for an answer of the usual length."""
        return self.prompt | {"max_new_tokens": self.size.tokens}


@dataclass(frozen=True, slots=True)
class Variant:
    """What is measured of a head.

    Attributes:
        make: of a draft with the target's whole output head, and the ids that a reduced one has.
        itemsize: bytes of a weight that it reads; None: as the target's.
    """

    make: Callable[[EagleDraft, list[int]], EagleDraft]
    itemsize: int | None = None


FULL_HEAD, REDUCED_HEAD = "full head", "reduced head"
FP8_HEAD, FP8_REDUCED_HEAD = "fp8 head", "reduced fp8 head"

#: By the name that they are measured under; the last is what a curve is of.
HEADS = {
    FULL_HEAD: Variant(lambda draft, ids: draft),
    REDUCED_HEAD: Variant(lambda draft, ids: draft.with_vocabulary(ids)),
    FP8_HEAD: Variant(lambda draft, ids: draft.quantized(), itemsize=1),
    FP8_REDUCED_HEAD: Variant(lambda draft, ids: draft.with_vocabulary(ids).quantized(), itemsize=1),
}


def random_subject(size: Size, device: torch.device, recorder: Recorder | None = None) -> Subject:
    """A model of random weights with its drafts, in bf16 on a GPU and in fp32 on a CPU."""
    dtype = dtype_on(device)
    model = random_llava(size, device, dtype)
    specvlm, recorder = recorded(model, recorder)
    config = EagleConfig.for_target(specvlm.target.spec, intermediate_size=size.language.inner)
    with made_on(device, dtype):
        head = EagleHead(config)
    return Subject(
        size, specvlm, recorder, prompt_for(model, size), drafts_of(specvlm, head, size.plan, size.proposable)
    )


def recorded(model: LlavaForConditionalGeneration, recorder: Recorder | None = None) -> tuple[SpecVLM, Recorder | None]:
    """A model behind the own decoder, and what records its rounds: without a `recorder` CUDA graphs, on a GPU."""
    if recorder is None and model.device.type == "cuda":
        recorder = CudaRecorder(model.device)
    return SpecVLM.from_target(LlamaTarget(model, recorder=recorder)), recorder


def drafts_of(specvlm: SpecVLM, head: EagleHead, plan: Plan, proposable: int) -> dict[str, EagleDraft]:
    """What is measured of a head, bound to its target; a reduced output head has that many of the first ids."""
    spec, full = specvlm.target.spec, EagleDraft(head, Eagle2(plan))
    ids = [token for token in range(proposable + 1) if token not in spec.media_ids][:proposable]
    with made_on(spec.device, spec.dtype):
        drafts = {name: variant.make(full, ids) for name, variant in HEADS.items()}
    for draft in drafts.values():
        draft.bind(specvlm.target)
    return drafts


def dtype_on(device: torch.device) -> torch.dtype:
    """What is measured on a device: bf16, and on a CPU fp32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_llava(size: Size, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LlavaForConditionalGeneration:
    """A LLaVA of random weights; nothing ends its answers."""
    language = size.language
    text = LlamaConfig(
        vocab_size=language.vocabulary,
        hidden_size=language.hidden,
        intermediate_size=language.inner,
        num_hidden_layers=language.layers,
        num_attention_heads=language.heads,
        num_key_value_heads=language.kv_heads,
        head_dim=language.head_dim,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        # 0.016 at 4096, near the usual 0.02; as much at any width, so that answers hang on what was said before.
        initializer_range=language.hidden**-0.5,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size.vision),
        text_config=text,
        image_token_id=language.vocabulary - 64,
        image_seq_length=size.image_tokens,
    )
    torch.manual_seed(seed)
    with made_on(device, dtype):
        model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
        for layer in model.model.language_model.layers:  # each adds little, or 32 layers of noise blow up roundings
            for product in (layer.self_attn.o_proj, layer.mlp.down_proj):
                product.weight.mul_((2 * language.layers) ** -0.5)
    model.generation_config.eos_token_id = None
    return model.eval()


@contextlib.contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules that are made inside are made on the device, in the dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def prompt_for(model: LlavaForConditionalGeneration, size: Size, seed: int = 0) -> dict[str, Tensor]:
    """A picture of noise between random words, as a processor would give it."""
    generator = torch.Generator().manual_seed(seed)
    image, side = model.config.image_token_id, size.vision["image_size"]
    words = torch.randint(3, image, (size.text,), generator=generator)
    before = size.text // 2
    ids = torch.cat([words[:before], torch.full((size.image_tokens,), image), words[before:]])[None]
    pixels = torch.randn(1, 3, side, side, generator=generator)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }
