"""An independent small model as a draft: a LLaVA that sees the picture too, or a language model that reads text alone.

It needs the target's vocabulary, or the first part of it, and nothing else of it; a token that it has no row for it
reads as its last one and never proposes. The token at position p stands in slot p of the draft's own KV: a round first
appends what the target emitted, then grows a tree behind it and drops it.

Source: Spec-LLaVA, whose drafts are LLaVA-68M and 160M with the target's vision tower. Where the towers' weights are
equal, the target's output is projected by the draft, and a picture is encoded once.
"""

import copy
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    LlavaNextConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from specvlm.drafts.growing import TreeGrower, check_policy, draft_slab, rows_of
from specvlm.policies import Eagle2, TreePolicy, checked_policy
from specvlm.state import DecodeState, Step
from specvlm.targets.base import Prompt, Target
from specvlm.targets.hf import FAMILIES, picture_tensors
from specvlm.targets.hf_attention import AttentionStep, head_size, refuse_unsupported, run_language
from specvlm.targets.hf_loading import load_whole, reading
from specvlm.targets.llama import LlamaDecoder, why_not
from specvlm.targets.llama_layers import hooks_why_not, through
from specvlm.tree import Beam, DraftTree, Plan, chain_ancestors

TEXT_FAMILIES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)
MODEL_TYPES = tuple(family.config_class.model_type for family in (*FAMILIES, *TEXT_FAMILIES))

#: What a vision tower's config may differ in without changing its output.
_NOT_COMPARED = frozenset({"_name_or_path", "architectures", "dtype", "transformers_version"})
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_NAMED_IDS = 3


class VLMDraft:
    """A small model as a draft.

    Args:
        model: a `LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration`, or, of text alone, a
            `LlamaForCausalLM`, `MistralForCausalLM` or `Qwen2ForCausalLM`; it is switched to evaluation.
        policy: the trees' shape; None: EAGLE-2's, of 8 nodes and depth 5 on a CPU, 64 and 6 on a GPU.
        shared_noise: choose candidates under the target's own sampling noise; False is the usual tree, whose
            candidates are the likeliest tokens whatever the target is about to draw.
        tokenizer: the model's, to be compared with the target's; None: it is taken to be the same.

    Raises:
        ValueError: the model is of another kind, or needs what our attention lacks, by name.
        TypeError: the policy is none.

    Example:
        >>> draft = VLMDraft.from_pretrained("folder")
        >>> model = specvlm.SpecVLM(hf_model, draft=draft)
    """

    taps: tuple[int, ...] | None = None

    #: What `bind` bound it to, and the ids that it never proposes there.
    target: Target
    exclude: Tensor
    #: [r] int64 the target's tokens that it can propose, its first ones; None: all.
    vocabulary: Tensor | None

    def __init__(
        self,
        model: PreTrainedModel,
        policy: TreePolicy | None = None,
        shared_noise: bool = True,
        *,
        tokenizer: Any | None = None,
    ) -> None:
        if not isinstance(model, (*FAMILIES, *TEXT_FAMILIES)):
            names = ", ".join(family.__name__ for family in (*FAMILIES, *TEXT_FAMILIES))
            raise ValueError(f"vlm: expected one of {names}, got {type(model).__name__}")
        self.sees = isinstance(model, FAMILIES)
        self.model = model.eval()
        self.policy = Eagle2() if policy is None else checked_policy(policy)
        self.shared_noise = shared_noise
        self.tokenizer = tokenizer
        self.shares_tower = False
        self._language = model.model.language_model if self.sees else model.model
        self._decoder: LlamaDecoder | None = None
        self._laid: tuple[Any, ...] | None = None
        self._compared: PreTrainedModel | None = None
        self._place: tuple[torch.device, torch.dtype] | None = None
        try:
            refuse_unsupported(self._text)
        except ValueError as error:
            raise ValueError(f"vlm {error}") from error

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, policy: TreePolicy | None = None, shared_noise: bool = True
    ) -> "VLMDraft":
        """Reads a model, and its tokenizer if there is one, from a folder in transformers' format.

        Raises:
            ValueError: no whole model of a kind that we know is there, or its tokenizer is broken.
        """
        model = load_whole("draft", folder, (*FAMILIES, *TEXT_FAMILIES))
        return cls(model, policy, shared_noise, tokenizer=_tokenizer(Path(folder)))

    def bind(self, target: Target) -> None:
        """Fits the model to the target, on its device and in its dtype; it serves one target at a time.

        Pictures and tokenizers are compared, and vision towers to the last weight, when the target is another than
        before.

        Raises:
            ValueError: naming what does not fit: more rows than the target's vocabulary has, other ids in those that
                both have, how a picture is read, or a target of another device or dtype than the one it was bound to
                before.
        """
        spec = target.spec
        if (size := self.model.lm_head.out_features) > spec.vocab_size:
            raise ValueError(f"vlm vocab_size: expected at most the target's {spec.vocab_size}, got {size}")
        check_policy(self.policy, spec.device, size, f"{size} tokens of the vocabulary")
        place = spec.device, spec.dtype
        if self._place not in (None, place):
            raise ValueError(f"vlm: expected a target on {self._place}, where the draft is, got one on {place}")
        if target.model is not self._compared:
            if self.tokenizer is not None and spec.tokenizer is not None:
                _check_tokenizer(self.tokenizer, spec.tokenizer, size)
            if self.sees:
                _check_pictures(self.model, target.model)
            self._move(*place)
            self.shares_tower = self.sees and _same_tower(self.model, target.model)
            self._compared = target.model
        if self._laid != _laid(self._language):  # its weights have moved, or are no longer all that it is
            self._decoder = _decoder(self._language)
            self._laid = _laid(self._language)
        self.target = target
        self.vocabulary = None if size == spec.vocab_size else torch.arange(size, device=spec.device)
        self.exclude = torch.tensor(sorted(spec.media_ids), dtype=torch.int64, device=spec.device)

    @property
    def sizes(self) -> dict[str, Any]:
        """What its speed hangs on."""
        names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        text = self._text
        return {name: getattr(text, name) for name in (*names, "num_key_value_heads", "vocab_size")}

    @property
    def recording(self) -> Hashable:
        """What a recording of its forwards depends on; None: transformers' modeling code may look at the host."""
        head = self.model.lm_head
        if self._decoder is None or type(head) is not nn.Linear or hooks_why_not(head, "lm_head"):
            return None
        held = (*self.model.parameters(), *self._decoder.tables, self.exclude)
        vocabulary = None if self.vocabulary is None else self.vocabulary.data_ptr()
        return "vlm", repr(self.sizes), vocabulary, *(tensor.data_ptr() for tensor in held)

    def start(self, prompt: Prompt, state: DecodeState) -> "VLMSession":
        """A session that has read the prompt.

        Raises:
            ValueError: the draft's KV does not fit the device's free memory.
        """
        return VLMSession(copy.copy(self), prompt, state)  # it keeps this target

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [..., H] of the target's token ids; one that the model lacks is taken for its last."""
        table = self.model.get_input_embeddings()
        return table(tokens.clamp(max=table.num_embeddings - 1))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., r] of `forward`'s outputs, over what it can propose."""
        return through(self.model.lm_head, hidden)

    def forward(self, embeds: Tensor, positions: Tensor, slab: Tensor | None, step: AttentionStep) -> Tensor:
        """Post-final-norm hidden states [B, T, H] for embeddings [B, T, H].

        Args:
            positions: [B, T] int32; those past the model's context are taken for its last.
            slab: [L, 2, B, Hkv, S, D], to which the tokens' KV is written; None: nothing is kept, as in training.
            step: where the tokens go in it, and what they see.
        """
        clamped = positions.clamp(max=self._text.max_position_embeddings - 1)
        if self._decoder is not None and slab is not None and not torch.is_grad_enabled():
            return self._decoder(embeds, clamped, slab, step, None)[0]
        return run_language(self._language, embeds, clamped, slab, step).last_hidden_state

    def read(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """What the draft reads of a prompt: embeddings [B, R, H], and how many tokens a row leaves out, [B] int32.

        A language model reads the text alone, as if there were no picture; behind a row's text stands what nobody sees.
        """
        if self.sees:
            embeds = self.embed(prompt.input_ids)
            if prompt.inputs.get("pixel_values") is not None:
                embeds = embeds.masked_scatter(prompt.image_mask[..., None], self._picture_rows(prompt))
            return embeds, torch.zeros_like(prompt.positions[:, 0])
        left_out = prompt.image_mask.sum(dim=1, dtype=torch.int32)
        longest = prompt.input_ids.shape[1] - int(left_out.min())
        text_first = prompt.image_mask.int().sort(dim=1, stable=True).indices[:, :longest]
        return self.embed(prompt.input_ids.gather(1, text_first)), left_out

    def slab(self, state: DecodeState) -> Tensor:
        """Room [L, 2, B, Hkv, S, D] for the KV of an answer."""
        text = self._text
        return draft_slab(state, text.num_hidden_layers, text.num_key_value_heads, head_size(text))

    @property
    def _text(self) -> PreTrainedConfig:
        return self._language.config

    def _move(self, device: torch.device, dtype: torch.dtype) -> None:
        self.model.to(device)
        for parameter in self.model.parameters():  # and no buffers: the rotary frequencies stay in fp32
            parameter.data = parameter.data.to(dtype)
        self._place = device, dtype

    def _picture_rows(self, prompt: Prompt) -> Tensor:
        """What stands for all of the prompt's pictures [rows, H]."""
        model, config = self.model.model, self.model.config
        pictures = picture_tensors(prompt.inputs, self.target.spec)
        if not self.shares_tower:
            return torch.cat(tuple(model.get_image_features(**pictures, return_dict=True).pooler_output))
        layers, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        vision: Any = prompt.vision
        states = [vision.hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        first = 1 if strategy == "default" else 0  # without the class token
        rows = model.multi_modal_projector(torch.cat(states, dim=-1)[:, first:])
        if isinstance(config, LlavaNextConfig):
            sizes, side = pictures["image_sizes"], config.vision_config.image_size
            patches = [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in sizes]
            rows, _ = model.pack_image_features(rows.split(patches), sizes, strategy, model.image_newline)
        return torch.cat(tuple(rows))


class VLMSession:
    """A small model at work on one answer: its KV of what was said, on which each round's tree grows and falls."""

    def __init__(self, draft: VLMDraft, prompt: Prompt, state: DecodeState) -> None:
        self._draft = draft
        self._trees = TreeGrower(draft.policy, draft.exclude, draft.shared_noise, draft.vocabulary)
        embeds, left_out = draft.read(prompt)
        self.recording: Hashable = draft.recording
        self.reads: tuple[Tensor, ...] = state.desk.keep("rows left out", left_out)
        (self._left_out,) = self.reads
        batch, length, _ = embeds.shape
        self._slab = draft.slab(state)
        if length:
            positions = torch.arange(length, dtype=torch.int32, device=embeds.device).expand(batch, -1)
            empty = torch.zeros_like(self._left_out)
            draft.forward(embeds, positions, self._slab, AttentionStep(empty, None))

    def propose(self, state: DecodeState) -> DraftTree:
        """A tree by the draft's policy, below what was emitted."""
        return self._trees.grow(self, state)

    def append(self, step: Step, first: Tensor) -> Tensor:
        """Adds emitted tokens to the lasting KV; the output [B, 1, H] at the last of them."""
        before = first - self._left_out
        count = step.tokens.shape[1]
        positions = before[:, None] + torch.arange(count, dtype=torch.int32, device=before.device)
        chain = chain_ancestors(count, before.device).expand(before.shape[0], -1, -1)
        embeds = self._draft.embed(step.tokens)
        hidden = self._draft.forward(embeds, positions, self._slab, AttentionStep(before, chain))
        return rows_of(hidden, step.count[:, None].long() - 1)

    def expand(self, beam: Beam, above: Tensor, depth: int, plan: Plan, state: DecodeState) -> Tensor:
        """Outputs [B, k, H] for the beam's nodes, which stand one below `depth`; `above` is in the KV already."""
        behind_root = state.kv_len - self._left_out + 1
        positions = (behind_root + depth)[:, None].expand(beam.tokens.shape)
        step = AttentionStep(behind_root, beam.ancestors, first_slot=behind_root + depth * plan.width)
        return self._draft.forward(self._draft.embed(beam.tokens), positions, self._slab, step)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, R, r] over what the draft can propose."""
        return self._draft.logits(hidden)


def _decoder(language: PreTrainedModel) -> LlamaDecoder | None:
    """The own decoder for a language model; None: that does not serve it."""
    if why_not(language):
        return None
    try:
        return LlamaDecoder(language)
    except ValueError:  # rotations that are no table's
        return None


def _laid(language: PreTrainedModel) -> tuple[Any, ...]:
    """What keeps the own decoder from a language model, and where its weights lie: what a decoder was made of."""
    return why_not(language), *(parameter.data_ptr() for parameter in language.parameters())


def _tokenizer(folder: Path) -> Any | None:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    with reading("draft", "a tokenizer", folder):
        return AutoTokenizer.from_pretrained(folder)


def _check_tokenizer(mine: Any, theirs: Any, size: int) -> None:
    """Checks that both have the same tokens at the ids below `size`."""
    ids = sorted({id_ for _, id_ in mine.get_vocab().items() ^ theirs.get_vocab().items() if id_ < size})
    if not ids:
        return
    told = ", ".join(
        f"{id_} ({mine.convert_ids_to_tokens([id_])[0]!r}, the target's {theirs.convert_ids_to_tokens([id_])[0]!r})"
        for id_ in ids[:_NAMED_IDS]
    )
    more = f" and {len(ids) - _NAMED_IDS} more" if len(ids) > _NAMED_IDS else ""
    raise ValueError(f"vlm tokenizer: expected the target's tokens, got others at ids {told}{more}")


def _check_pictures(mine: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """Checks that a picture for the target is one for the draft, and has as many rows there."""
    for name, of in (
        ("model_type", lambda model: model.config.model_type),
        ("image_token_id", lambda model: model.config.image_token_id),
        ("image_size", lambda model: model.config.vision_config.image_size),
        ("image_grid_pinpoints", lambda model: getattr(model.config, "image_grid_pinpoints", None)),
        ("image tokens a picture", _rows_a_picture),
    ):
        wanted, got = of(theirs), of(mine)
        if wanted != got:
            raise ValueError(f"vlm {name}: expected the target's {wanted}, got {got}")


@torch.no_grad()
def _rows_a_picture(model: PreTrainedModel) -> int:
    """How many rows a vision tower has for a picture of its size: only a forward tells of class tokens."""
    tower, side = model.model.vision_tower, model.config.vision_config.image_size
    weight = next(tower.parameters())
    rows = tower(weight.new_zeros(1, 3, side, side)).last_hidden_state.shape[1]
    return rows - (model.config.vision_feature_select_strategy == "default")


def _same_tower(mine: PreTrainedModel, theirs: PreTrainedModel) -> bool:
    """Whether both vision towers give the same output, and the draft projects what the target's keeps of it."""
    told = [
        {name: value for name, value in model.config.vision_config.to_dict().items() if name not in _NOT_COMPARED}
        | {"layers": model.config.vision_feature_layer}
        for model in (mine, theirs)
    ]
    if told[0] != told[1]:
        return False
    ours, other = mine.model.vision_tower.state_dict(), theirs.model.vision_tower.state_dict()
    return ours.keys() == other.keys() and all(torch.equal(ours[name], other[name].to(ours[name])) for name in ours)
