"""A small model and its head in the shape of a large one, computing what they computed: real answers, a real acceptance
rate and a large model's bytes and launches, without a checkpoint of that size.

The small block [h, h'] stands in the first rows and columns of every large matrix [H, H'], and the state of a token
keeps its last H - h elements zero, for nothing writes to them: those rows are zero in the embedding, in o, in down, in
the projector's second matrix and in the head's fc. Around that, what is added is random, finite, and not seen:

- columns that read the zero elements, in q, k, v, gate, up, fc and the output head;
- heads and neurons: rows of q, k, v, gate, up and the projector's first matrix, whose columns in o, down and the
  projector's second matrix are zero;
- layers, whose o and down are zero;
- tokens, whose rows in embedding and output head are zero. Their logits have a bias of -inf, the one thing that the
  small model has no place for: they are never drawn, and no draft proposes them. Noise is keyed by a token's id, so
  sampled answers stay as well.

A norm divides by the root of the mean square, over H elements where h count. With s = sum(x^2):

    w' x / sqrt(s / H + eps') = w x / sqrt(s / h + eps)    for w' = w sqrt(h / H), eps' = eps h / H

From 256 to 4096 the factor is 1/4, exact in every dtype; where h / H is no power of 4, the norms' weights are rounded
anew. The products' sums are those of the small model with zeros between, in another order: answers are equal in fp32 up
to near-ties of rounding, while in bf16 a near-tie may well flip.

The vision tower stays the small one, and so do its rows in the prompt: what a widened model says of prefill is not what
a large model would. Rotations and the context stay the small model's as well.
"""

import copy
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaModel

from bench.floors import Sizes
from specvlm.drafts import EagleHead

#: Standard deviation of what is added, as of a Llama's weights before training.
STD: Final = 0.02


@torch.no_grad()
def widened(
    model: LlavaForConditionalGeneration,
    sizes: Sizes,
    *,
    seed: int = 0,
    device: torch.device | str,
    dtype: torch.dtype,
) -> LlavaForConditionalGeneration:
    """A model of the given sizes that answers as `model` does; its processor serves both.

    It is made where it shall be and as it shall be: elsewhere nothing of its size is held.

    Args:
        model: over a Llama; it is read only.
        sizes: none below the model's; of its head size, and of its query heads a KV head.
        seed: of what is added.
        device, dtype: of the weights.

    Raises:
        ValueError: the model is another, or a size does not fit, by name.
    """
    if not isinstance(model, LlavaForConditionalGeneration) or type(model.model.language_model) is not LlamaModel:
        raise ValueError(f"model: expected a LLaVA over a Llama, got {_made_of(model)}")
    text = model.config.text_config
    small = Sizes(
        "the model",
        text.hidden_size,
        text.intermediate_size,
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.vocab_size,
        model.model.language_model.layers[0].self_attn.head_dim,
    )
    _check(sizes, small)
    config = copy.deepcopy(model.config)
    changes = {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocabulary,
        "rms_norm_eps": text.rms_norm_eps * small.hidden / sizes.hidden,
    }
    for name, value in changes.items():
        setattr(config.text_config, name, value)
    with torch.device("meta"):
        wide = LlavaForConditionalGeneration(config)
        wide.lm_head = nn.Linear(sizes.hidden, sizes.vocabulary)
    wide = wide.to(dtype).to_empty(device=device)
    body, own = wide.model, model.model
    body.vision_tower = copy.deepcopy(own.vision_tower).to(device, dtype)
    body.language_model.rotary_emb = copy.deepcopy(own.language_model.rotary_emb).to(device)
    wide.generation_config = copy.deepcopy(model.generation_config)

    generator = torch.Generator(device).manual_seed(seed)
    _surround(body.multi_modal_projector.linear_1, own.multi_modal_projector.linear_1, generator)
    _pad(body.multi_modal_projector.linear_2, own.multi_modal_projector.linear_2)
    _put(body.language_model.embed_tokens.weight.zero_(), own.language_model.embed_tokens.weight)
    layers = list(own.language_model.layers)
    for index, layer in enumerate(body.language_model.layers):
        _widen_layer(layer, layers[index] if index < len(layers) else None, small.hidden / sizes.hidden, generator)
    _widen_norm(body.language_model.norm, own.language_model.norm, small.hidden / sizes.hidden)
    _surround(wide.lm_head, model.lm_head, generator)
    wide.lm_head.weight[small.vocabulary :] = 0
    wide.lm_head.bias[small.vocabulary :] = -torch.inf
    return wide.eval()


@torch.no_grad()
def widened_head(
    head: EagleHead, sizes: Sizes, *, seed: int = 0, device: torch.device | str, dtype: torch.dtype
) -> EagleHead:
    """A head for a widened model, which proposes to it what `head` proposes to the small one.

    Args:
        head: without a compressor; it is read only.
        sizes: the model's; its layers are not the head's.
        seed, device, dtype: as in `widened`.

    Raises:
        ValueError: the head compresses, or a size does not fit, by name.
    """
    config = head.config
    if config.compressor is not None:
        raise ValueError(f"compressor: expected none, got {config.compressor}")
    small = Sizes(
        "the head",
        config.hidden_size,
        config.intermediate_size,
        1,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size,
        config.head_dim,
    )
    _check(sizes, small)
    changed = replace(
        config,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocabulary,
        rms_norm_eps=config.rms_norm_eps * small.hidden / sizes.hidden,
    )
    with torch.device("meta"):
        wide = EagleHead(changed)
    wide = wide.to(dtype).to_empty(device=device)
    wide.rotary = copy.deepcopy(head.rotary).to(device)
    if config.draft_vocab_size is not None:
        wide.vocabulary.copy_(head.vocabulary)

    generator = torch.Generator(device).manual_seed(seed)
    _surround(wide.fc, None, generator)
    for wide_part, own_part in zip(wide.fc.weight.chunk(2, dim=1), head.fc.weight.chunk(2, dim=1), strict=True):
        _put(wide_part, own_part)  # of the embedding, of the feature
    wide.fc.weight[small.hidden :] = 0
    if config.bias:
        _put(wide.fc.bias, head.fc.bias)
    _widen_layer(wide.layers[0], head.layers[0], small.hidden / sizes.hidden, generator)
    return wide.eval()


def _made_of(model: object) -> str:
    language = getattr(getattr(model, "model", None), "language_model", None)
    return type(model).__name__ + ("" if language is None else f" over {type(language).__name__}")


def _check(sizes: Sizes, small: Sizes) -> None:
    for name in ("hidden", "inner", "layers", "heads", "kv_heads", "vocabulary"):
        if (wide := getattr(sizes, name)) < (least := getattr(small, name)):
            raise ValueError(f"{name}: expected at least the {least} of {small.name}, got {wide}")
    if sizes.head_dim != small.head_dim:
        raise ValueError(f"head_dim: expected the {small.head_dim} of {small.name}, got {sizes.head_dim}")
    if sizes.heads * small.kv_heads != sizes.kv_heads * small.heads:
        raise ValueError(
            f"kv_heads: expected one for each {small.heads // small.kv_heads} heads, as {small.name} has, got "
            f"{sizes.kv_heads} for {sizes.heads}"
        )
    if sizes.hidden % sizes.heads:  # transformers wants it so, whatever a head's size
        raise ValueError(f"heads: expected a divisor of the hidden {sizes.hidden}, got {sizes.heads}")


def _widen_layer(wide: nn.Module, own: nn.Module | None, share: float, generator: torch.Generator) -> None:
    """Makes a decoder layer of another one, or, of None, one that adds nothing; `share` is h / H."""
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        _surround(wide.get_submodule(name), None if own is None else own.get_submodule(name), generator)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        _pad(wide.get_submodule(name), None if own is None else own.get_submodule(name))
    for name in ("input_layernorm", "post_attention_layernorm"):
        _widen_norm(wide.get_submodule(name), None if own is None else own.get_submodule(name), share)


def _surround(wide: nn.Linear, own: nn.Linear | None, generator: torch.Generator) -> None:
    """Random weights around the small block."""
    wide.weight.normal_(std=STD, generator=generator)
    _put_both(wide, own)


def _pad(wide: nn.Linear, own: nn.Linear | None) -> None:
    """Zeros around the small block."""
    wide.weight.zero_()
    _put_both(wide, own)


def _put_both(wide: nn.Linear, own: nn.Linear | None) -> None:
    if own is not None:
        _put(wide.weight, own.weight)
    if wide.bias is not None:
        wide.bias.zero_()
        if own is not None and own.bias is not None:
            _put(wide.bias, own.bias)


def _widen_norm(wide: nn.Module, own: nn.Module | None, share: float) -> None:
    if isinstance(wide, nn.Identity):  # a head without its first norm
        return
    wide.weight.fill_(share**0.5)
    if own is not None:
        _put(wide.weight, own.weight.double() * share**0.5)


def _put(wide: Tensor, own: Tensor) -> None:
    """Copies a small tensor to the start of a large one, in every dimension."""
    wide[tuple(slice(size) for size in own.shape)].copy_(own)
