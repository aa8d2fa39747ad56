"""What the decoding loop asks of a target, and what a target tells of itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specvlm.state import DecodeState, Limits, Sampling, Scores
from specvlm.tree import DraftTree


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """Sizes and ids of a target.

    Attributes:
        hidden_size: width H of embeddings and features.
        vocab_size: rows of the output head V; every token id is below it.
        num_layers, num_heads, num_kv_heads, head_dim: the language model's attention.
        context: the most positions, prompt and answer together.
        eos_ids: ids that end an answer.
        pad_id: what fills a prompt up that came without a mask; None: nothing does.
        media_ids: image and video placeholder ids, which no draft may propose.
        max_new_tokens: what the model's generation config says; None: nothing.
        max_length: likewise, prompt included.
        dtype, device: of weights, features and KV.
        tokenizer: None when the model came without its processor.
    """

    hidden_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    eos_ids: frozenset[int]
    pad_id: int | None
    media_ids: frozenset[int]
    max_new_tokens: int | None
    max_length: int | None
    dtype: torch.dtype
    device: torch.device
    tokenizer: Any | None


@dataclass(frozen=True, slots=True)
class Choice:
    """What a compressor that has options decided for each prompt.

    Attributes:
        options: their names.
        probabilities: [B, O], with a gradient in training.
        picked: [B] int64.
        rows: [O] the share of a prompt's picture rows that each would leave; of many prompts their mean.
    """

    options: tuple[str, ...]
    probabilities: Tensor
    picked: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prefilled prompt, as a draft sees it.

    Attributes:
        input_ids: [B, T] int64, image tokens expanded, padding taken out.
        positions: [B, T] int32.
        embeds: [B, T, H]; rows of image tokens hold the projector's output.
        image_mask: [B, T] bool.
        features: [B, T, F], what the draft's taps asked for.
        vision: the vision tower's output as transformers gives it; None without a picture.
        inputs: what the processor gave.
        lengths: [B] int32 rows that count; a compressor may leave garbage behind them.
        asked: [B] int32 rows before the answer, where one stands behind, as in training; None: all of them.
        guide: [B, H] what a compressor keeps of the latest picture beside its rows; None: nothing.
        choice: what a compressor chose; None: it had no options.
    """

    input_ids: Tensor
    positions: Tensor
    embeds: Tensor
    image_mask: Tensor
    features: Tensor
    vision: Any | None
    inputs: Mapping[str, Any]
    lengths: Tensor
    asked: Tensor | None = None
    guide: Tensor | None = None
    choice: Choice | None = None


class Target(Protocol):
    """The frozen model whose answer is wanted.

    Attributes:
        model: as transformers has it; a draft that sees pictures compares its vision tower with this one's.
    """

    spec: TargetSpec
    model: PreTrainedModel
    input_names: frozenset[str]

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [..., H] of token ids."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of post-final-norm hidden states [..., H]."""
        ...

    def head_rows(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows [r, H] of the output head and their bias [r], or None, for the ids [r] that a reduced draft head may
        propose."""
        ...

    def prefill(
        self, inputs: Mapping[str, Any], *, sampling: Sampling, limits: Limits, taps: tuple[int, ...] | None
    ) -> tuple[DecodeState, Prompt]:
        """Checks the inputs, runs the prompt, draws the first token at position T - 1.

        Raises:
            ValueError: what is wrong with the inputs, before any work.
        """
        ...

    def verify(self, tree: DraftTree, state: DecodeState) -> Scores:
        """One forward of the tree. KV of node i goes to slot kv_len + i; kv_len stays."""
        ...
