"""A Hugging Face vision-language model as a target: its own modeling code, our attention, our KV slab."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten  # where transformers registers its outputs
from transformers import (
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from specvlm.checks import check_int
from specvlm.graphs import PLAIN_DESK, Desk
from specvlm.state import DecodeState, Limits, Sampling, Scores, SlabPool, Step, capacity
from specvlm.targets.base import Prompt, TargetSpec
from specvlm.targets.hf_attention import AttentionStep, head_size, refuse_unsupported, run_language
from specvlm.tree import DraftTree
from specvlm_kernels import pack_ancestors

FAMILIES = (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration)


#: Settings of a generation config that change even a greedy answer, and what leaves it alone besides None.
_NEUTRAL: dict[str, Any] = {
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": [],
    "force_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "sequence_bias": {},
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "stop_strings": None,
    "max_time": None,
}


class HFTarget:
    """A LLaVA-1.5 or LLaVA-NeXT from transformers, with any Llama-, Mistral- or Qwen2-like language model.

    Args:
        model: in memory, on its device, in its dtype; it is switched to evaluation.
        tokenizer: for stop strings; None: there is none.

    Attributes:
        why: what spoke for this kind of target, for whoever prints it.

    Raises:
        ValueError: the model needs what our attention lacks, by name.
    """

    why: str = "as asked for"

    def __init__(self, model: PreTrainedModel, tokenizer: Any | None = None) -> None:
        if not isinstance(model, FAMILIES):
            names = " or ".join(family.__name__ for family in FAMILIES)
            raise ValueError(f"target: expected a {names}, got {type(model).__name__}")
        refuse_unsupported(model.config.text_config)
        self.model = model.eval()
        embedding = model.get_input_embeddings().weight
        self.spec = spec = spec_of(
            model.config, model.generation_config, tokenizer, dtype=embedding.dtype, device=embedding.device
        )
        self.input_names = frozenset({"input_ids", "attention_mask", "pixel_values", "image_sizes"})
        self._language = model.model.language_model
        self._pool = SlabPool(spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.dtype, spec.device)
        self._probe()

    def __repr__(self) -> str:
        kinds = f"{self.model.config.model_type} of {self.model.config.text_config.model_type}"
        return f"{type(self).__name__}({kinds}, {self.spec.dtype} on {self.spec.device}; {self.why})"

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [..., H] of token ids."""
        return self.model.get_input_embeddings()(tokens)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of post-final-norm hidden states [..., H]."""
        return self.model.lm_head(hidden)

    def head_rows(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows [r, H] of the output head and their bias [r], or None, for the ids [r]."""
        weight, bias = self.model.lm_head.weight, self.model.lm_head.bias
        return weight[ids], None if bias is None else bias[ids]

    def prefill(
        self, inputs: Mapping[str, Any], *, sampling: Sampling, limits: Limits, taps: tuple[int, ...] | None
    ) -> tuple[DecodeState, Prompt]:
        """Checks the inputs, runs the prompt through the model, draws the first token.

        The state borrows a slab [L, 2, 1, Hkv, S, D], whose first T slots hold the prompt's KV; `close()` it.

        Raises:
            ValueError: what is wrong with the inputs: before any work, but for a number of image tokens that is not
                the pictures', which shows when the vision tower has run.
        """
        input_ids = self._checked_ids(inputs, limits.max_new_tokens)
        batch, length = input_ids.shape
        token_ids = input_ids.tolist()  # now, for later it would wait for the prompt's forward
        slab = self._pool.borrow(batch, capacity(length + limits.max_new_tokens))
        try:
            desk = self._desk(slab)
            embeds, image_mask, vision = self._merge(input_ids, inputs, desk)
            positions = torch.arange(length, dtype=torch.int32, device=input_ids.device).expand(batch, -1)
            kv_len = torch.zeros(batch, dtype=torch.int32, device=input_ids.device)
            hidden, features = self._forward(embeds, positions, slab, AttentionStep(kv_len, None), taps)
            sampling = sampling.on(desk)
            first = sampling.draw(self.head(hidden[:, -1:]), positions[:, -1:])
            step = Step(*desk.keep("step", first, features[:, -1:], torch.ones_like(kv_len)))
            (stored,) = desk.keep("kv_len", kv_len + length)
            state = DecodeState(slab, stored, sampling, limits, step, taps, token_ids, self._pool, desk)
        except BaseException:
            self._pool.give_back(slab)
            raise
        return state, Prompt(input_ids, positions, embeds, image_mask, features, vision, inputs, kv_len + length)

    def verify(self, tree: DraftTree, state: DecodeState) -> Scores:
        """One forward of the tree [B, N]: logits [B, N, V] and features [B, N, F]; KV of node i goes to slot
        kv_len + i of the state's slab."""
        tree, kv_len = state.laid(tree), state.kv_len

        def forward() -> tuple[Tensor, Tensor]:
            positions = (kv_len[:, None] + tree.depths).clamp(max=self.spec.context - 1)
            step = AttentionStep(kv_len, pack_ancestors(tree.parents))
            hidden, features = self._forward(self.embed(tree.tokens), positions, state.slab, step, state.taps)
            return self.head(hidden), features

        reads = tree.tokens, tree.parents, tree.depths, kv_len
        return Scores(*state.desk.run(("verify", state.taps), forward, reads, into="scores"))

    def _desk(self, slab: Tensor) -> Desk:
        """Where the rounds of an answer in that slab are run."""
        return PLAIN_DESK

    @torch.no_grad()
    def teach(self, inputs: Mapping[str, Any], taps: tuple[int, ...] | None = None) -> tuple[Prompt, Tensor]:
        """Whole sequences, padded at their ends, for a draft to learn from.

        Args:
            inputs: input_ids [B, T], and pixel_values (and image_sizes) of all the batch's pictures, or picture_rows,
                what `picture_rows` gave for each of them.
            taps: which features the draft reads.

        Returns:
            the sequences as the draft sees a prompt, and post-final-norm states [B, T, H], of which `head` makes the
            target's logits.
        """
        input_ids = inputs["input_ids"].to(self.spec.device)
        embeds, image_mask, vision = self._merge(input_ids, inputs, PLAIN_DESK)
        step = AttentionStep(torch.zeros(len(input_ids), dtype=torch.int32, device=input_ids.device), None)
        positions = torch.arange(input_ids.shape[1], dtype=torch.int32, device=input_ids.device).expand_as(input_ids)
        hidden, features = self._forward(embeds, positions, None, step, taps)
        lengths = torch.full_like(step.kv_len, input_ids.shape[1])
        return Prompt(input_ids, positions, embeds, image_mask, features, vision, inputs, lengths), hidden

    @torch.no_grad()
    def picture_rows(self, pictures: Mapping[str, Tensor]) -> Tensor:
        """What stands in the prompt for all of some pictures [rows, H].

        Args:
            pictures: pixel_values, and image_sizes where the model takes them.
        """
        return self._look(pictures, PLAIN_DESK)[0]

    def _look(self, inputs: Mapping[str, Any], desk: Desk) -> tuple[Tensor, Any]:
        """The rows of all pictures, and the tower's output."""
        pictures = picture_tensors(inputs, self.spec)
        if "image_sizes" in pictures:  # whose numbers the model reads on the host, to cut patches by
            return self._see(**pictures)
        (pixels,) = desk.keep("pixels", pictures["pixel_values"])

        def see() -> tuple[Any, ...]:
            leaves, layout = tree_flatten(self._see(pixel_values=pixels))
            return layout, *leaves

        layout, *leaves = desk.run("see", see, (pixels,), into="vision")
        return tree_unflatten(leaves, layout)

    def _see(self, **pictures: Tensor) -> tuple[Tensor, Any]:
        vision = self.model.model.get_image_features(**pictures, return_dict=True)
        return torch.cat(tuple(vision.pooler_output)).to(self.spec.dtype), vision

    def _forward(
        self, embeds: Tensor, positions: Tensor, slab: Tensor | None, step: AttentionStep, taps: tuple[int, ...] | None
    ) -> tuple[Tensor, Tensor]:
        """Post-final-norm hidden states, and the features that `taps` ask for."""
        out = run_language(self._language, embeds, positions, slab, step, output_hidden_states=taps is not None)
        hidden = out.last_hidden_state
        return hidden, hidden if taps is None else torch.cat([out.hidden_states[tap] for tap in taps], dim=-1)

    def _checked_ids(self, inputs: Mapping[str, Any], max_new_tokens: int) -> Tensor:
        """The prompt's ids [1, T] without padding, when everything about the inputs fits."""
        input_ids = _single_prompt(inputs, self.spec)
        spec = self.spec
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= spec.vocab_size:
            raise ValueError(f"input_ids: expected ids in [0, {spec.vocab_size}), got {low if low < 0 else high}")
        length = input_ids.shape[1]
        if length > spec.context:
            raise ValueError(f"input_ids: expected at most the context of {spec.context} tokens, got {length}")
        if length + max_new_tokens > spec.context:
            raise ValueError(
                f"max_new_tokens: expected at most {spec.context - length}, what a prompt of {length} tokens leaves "
                f"of the context of {spec.context}, got {max_new_tokens}"
            )
        image_tokens = int((input_ids == self.model.config.image_token_id).sum())
        pixels = inputs.get("pixel_values")
        if image_tokens and pixels is None:
            raise ValueError(f"pixel_values: expected a picture for the prompt's {image_tokens} image tokens, got none")
        if pixels is not None:
            if not image_tokens:
                raise ValueError("input_ids: expected image tokens for the picture in pixel_values, got none")
            _check_pixels(pixels, inputs.get("image_sizes"), self.model.config)
        return input_ids.to(spec.device)

    def _merge(self, input_ids: Tensor, inputs: Mapping[str, Any], desk: Desk) -> tuple[Tensor, Tensor, Any | None]:
        """Embeddings with the picture's in their places, which places those are, and the tower's output."""
        embeds, image_mask = self.embed(input_ids), input_ids == self.model.config.image_token_id
        image_tokens = int(image_mask.sum())  # now, for later it would wait for the tower
        if inputs.get("picture_rows") is not None:
            rows, vision = inputs["picture_rows"].to(embeds), None
        elif inputs.get("pixel_values") is not None:
            rows, vision = self._look(inputs, desk)
        else:
            return embeds, torch.zeros_like(image_mask), None
        if image_tokens != len(rows):
            raise ValueError(f"input_ids: expected {len(rows)} image tokens for the pictures given, got {image_tokens}")
        return embeds.masked_scatter(image_mask[..., None], rows), image_mask, vision

    @torch.no_grad()
    def _probe(self) -> None:
        """Two tokens through the model, so that what our attention lacks is refused now and not in an answer."""
        slab = self._pool.borrow(1, capacity(2))
        try:
            ids = torch.zeros(1, 2, dtype=torch.long, device=self.spec.device)
            kv_len = torch.zeros(1, dtype=torch.int32, device=self.spec.device)
            positions = torch.arange(2, dtype=torch.int32, device=self.spec.device)[None]
            self._forward(self.embed(ids), positions, slab, AttentionStep(kv_len, None), None)
        finally:
            self._pool.give_back(slab)


def picture_tensors(inputs: Mapping[str, Any], spec: TargetSpec) -> dict[str, Tensor]:
    """What `get_image_features` takes of a processor's output with pictures, where and as the target computes."""
    given = (name for name in ("pixel_values", "image_sizes") if inputs.get(name) is not None)
    pictures = {name: inputs[name].to(spec.device) for name in given}
    pictures["pixel_values"] = pictures["pixel_values"].to(spec.dtype)
    return pictures


def _single_prompt(inputs: Mapping[str, Any], spec: TargetSpec) -> Tensor:
    """input_ids [1, T] with the padding taken out that attention_mask marks, or, without one, the pad id."""
    input_ids = inputs.get("input_ids")
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.dtype != torch.int64:
        got = (
            f"{input_ids.dtype} {list(input_ids.shape)}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
        )
        raise ValueError(f"input_ids: expected an int64 tensor [1, T], got {got}")
    if input_ids.shape[0] != 1:
        raise ValueError(f"input_ids: expected one prompt, got {input_ids.shape[0]}: call once a prompt")
    mask = inputs.get("attention_mask")
    if mask is None and spec.pad_id is not None and spec.pad_id not in spec.eos_ids:
        mask = input_ids != spec.pad_id  # as transformers infers it
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise ValueError(f"attention_mask: expected a tensor, got {type(mask).__name__}")
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask: expected shape {list(input_ids.shape)}, got {list(mask.shape)}")
        input_ids = input_ids[mask.bool()][None]
    if not input_ids.shape[1]:
        raise ValueError("input_ids: expected at least one token, got none")
    return input_ids


def _check_pixels(pixels: Any, image_sizes: Any, config: Any) -> None:
    """Checks that `pixels` hold pictures of the vision tower's size."""
    side = config.vision_config.image_size
    needs_sizes = isinstance(config, LlavaNextConfig)
    leading = "[images, patches," if needs_sizes else "[images,"
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        came = str(pixels.dtype) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ValueError(f"pixel_values: expected a float tensor {leading} 3, {side}, {side}], got {came}")
    if pixels.ndim != (5 if needs_sizes else 4) or tuple(pixels.shape[-3:]) != (3, side, side):
        raise ValueError(f"pixel_values: expected shape {leading} 3, {side}, {side}], got {list(pixels.shape)}")
    if not len(pixels):
        raise ValueError("pixel_values: expected at least one picture, got none")
    if not pixels.isfinite().all():
        raise ValueError("pixel_values: expected finite numbers, got others")
    if not needs_sizes:
        if image_sizes is not None:
            raise ValueError("image_sizes: expected none, for all pictures of this model have one size, got some")
        return
    if not isinstance(image_sizes, Tensor) or tuple(image_sizes.shape) != (len(pixels), 2):
        came = str(list(image_sizes.shape)) if isinstance(image_sizes, Tensor) else type(image_sizes).__name__
        raise ValueError(f"image_sizes: expected a tensor [{len(pixels)}, 2] of heights and widths, got {came}")
    sizes = image_sizes.tolist()
    if image_sizes.is_floating_point() or min(map(min, sizes)) < 1:
        raise ValueError(f"image_sizes: expected whole heights and widths of at least 1, got {sizes}")
    needed = max(image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in sizes)
    if pixels.shape[1] < needed:
        raise ValueError(f"pixel_values: expected {needed} patches for pictures of {sizes}, got {pixels.shape[1]}")


def spec_of(
    config: PreTrainedConfig,
    generation: GenerationConfig,
    tokenizer: Any | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> TargetSpec:
    """What a model tells of itself, weights apart.

    Raises:
        ValueError: its generation config wants what decoding here does not do.
    """
    text = config.text_config
    for name, neutral in _NEUTRAL.items():
        if (got := getattr(generation, name, None)) not in (None, neutral):
            raise ValueError(f"generation config: expected no {name}, got {got}")
    for name in ("max_new_tokens", "max_length"):
        if (length := getattr(generation, name)) is not None:
            check_int(f"generation config: {name}", length, low=1)
    media = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return TargetSpec(
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=head_size(text),
        context=text.max_position_embeddings,
        eos_ids=_eos_ids(generation.eos_token_id, text.vocab_size),
        pad_id=generation.pad_token_id,
        media_ids=frozenset(id_ for id_ in media if id_ is not None),
        max_new_tokens=generation.max_new_tokens,
        max_length=generation.max_length,
        dtype=dtype,
        device=device,
        tokenizer=tokenizer,
    )


def _eos_ids(told: Any, vocab_size: int) -> frozenset[int]:
    """An id or several, as a generation config has them, checked; None: none."""
    ids = told.flatten().tolist() if isinstance(told, Tensor) else told
    ids = [] if ids is None else ids if isinstance(ids, list | tuple) else [ids]
    for token in ids:
        check_int("generation config: eos_token_id", token, low=0, high=vocab_size - 1)
    return frozenset(ids)
