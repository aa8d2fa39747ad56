"""What a block draft learns: the target's distribution at every slot behind random tokens of its answers.

With q_k the draft's distribution at slot k of a block, p_k the target's for the same token and B the block's size, a
slot's loss is the cross-entropy of q_k under p_k, weighed by exp(-(k - 1) / gamma): a slot is of use only where those
before it were right. Slot 0, the root, has none.

Source: DFlash (Chen et al., 2026), whose published weights decay by gamma = 7, 5, 4 for blocks of 16, 10, 8.
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from specvlm.checks import check_int, check_number
from specvlm.drafts.block import BlockDraft
from specvlm.targets.hf import HFTarget
from specvlm.targets.hf_attention import AttentionStep
from specvlm.training.losses import logit_losses
from specvlm.training.objectives import OBJECTIVES, Batch, DistillConfig, Lesson


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDistillConfig(DistillConfig):
    """How a block draft is trained, besides what every draft's training has; without it, with these defaults.

    Attributes:
        anchors: the most blocks a sequence, each behind a token of the answer that is drawn anew every time.
        gamma: slots over which a slot's weight falls by e; None: by the block's size.
    """

    anchors: int = 512
    gamma: float | None = None

    def __post_init__(self) -> None:
        DistillConfig.__post_init__(self)  # super() does not know a slotted dataclass
        check_int("anchors", self.anchors, low=1)
        if self.gamma is not None:
            check_number("gamma", self.gamma)
            if not (math.isfinite(self.gamma) and self.gamma > 0):
                raise ValueError(f"gamma: expected a finite number > 0, got {self.gamma}")


def usual_gamma(block_size: int) -> float:
    """The gamma of a block's size: through the published ones, and half the block below them."""
    return min(block_size / 2, (block_size + 5) / 3)


class BlockObjective:
    """A block draft's: the target's distribution at the slots of random blocks.

    Raises:
        ValueError: features are to have noise, or steps to be unrolled, and it reads none but the target's own.
    """

    student: nn.Module
    still: nn.Module

    def __init__(self, target: HFTarget, draft: BlockDraft, config: DistillConfig) -> None:
        for name, none in (("feature_noise", 0), ("unrolled", 1)):
            if (got := getattr(config, name)) != none:
                raise ValueError(f"{name}: expected {none}, for a block draft reads no output of its own, got {got}")
        if not isinstance(config, BlockDistillConfig):
            config = BlockDistillConfig(**asdict(config))
        self.student, self.still = draft.head, nn.Module()
        self._target, self._draft, self._config = target, draft, config
        self._gamma = config.gamma or usual_gamma(draft.head.config.block_size)

    def lesson(self, batch: Batch, number: int) -> Lesson:
        """Slot k of the block at token a is to say what the target says behind token a + k - 1."""
        taught, hidden = self._target.teach(batch.inputs, self._draft.taps)
        answers = batch.answers.to(hidden.device)
        anchors, counts = self._anchors(answers, number)
        outputs = block_outputs(self._draft, taught.features, taught.embeds, anchors)
        row, block, before = counts.nonzero(as_tuple=True)  # slot k = before + 1
        with torch.no_grad():
            teacher_logits = self._target.head(hidden[row, anchors[row, block] + before])
        weights = torch.exp(-before / self._gamma)
        logits = self._draft.logits(outputs[row, block, before + 1])
        losses = logit_losses(logits, teacher_logits, self._config, weights=weights)
        return Lesson(losses.weighed(self._config), losses.told(), losses.agreement)

    def _anchors(self, answers: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Random tokens [B, A] of the answers [B, T], and the slots [B, A, block_size - 1] behind them that count:
        those of the same answer."""
        follow = self._draft.head.config.block_size - 1
        begins = answers & pad(answers[:, 1:], (0, 1))  # a block of the root alone teaches nothing
        generator = torch.Generator(answers.device).manual_seed(self._config.seed * 1_000_003 + number)
        drawn = torch.rand(answers.shape, generator=generator, device=answers.device)
        most = min(self._config.anchors, max(int(begins.sum(dim=1).max()), 1))
        order, anchors = drawn.masked_fill(~begins, -1).topk(most)
        behind = pad(answers, (0, follow)).unfold(1, follow, 1)[:, 1:]  # [B, T, follow] the answer's tokens behind each
        behind = behind.cumprod(dim=2).bool().gather(1, anchors[..., None].expand(-1, -1, follow))
        return anchors, behind & (order >= 0)[..., None]


def block_outputs(draft: BlockDraft, features: Tensor, embeds: Tensor, anchors: Tensor) -> Tensor:
    """Outputs [B, A, block_size, H] of blocks at `anchors` [B, A], as in decoding, all in one forward.

    A block sees the features before its anchor and itself.

    Args:
        features: [B, T, F] the target's.
        embeds: [B, T, H] of the tokens.
    """
    length, size = features.shape[1], draft.head.config.block_size
    blocks = torch.arange(anchors.shape[1], device=anchors.device)
    before = torch.arange(length, device=anchors.device) < anchors[..., None]  # [B, A, T]
    itself = (blocks[:, None] == blocks).repeat_interleave(size, dim=1).expand(len(anchors), -1, -1)
    visible = torch.cat([before, itself], dim=2).repeat_interleave(size, dim=1)
    roots = embeds.gather(1, anchors[..., None].expand(-1, -1, embeds.shape[2]))
    empty = torch.zeros(len(anchors), dtype=torch.int32, device=anchors.device)
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(draft.context(features, empty)):
        cache.update(keys, values, layer)
    return draft.forward(roots, anchors, cache, AttentionStep(empty, None, visible=visible)).unflatten(1, (-1, size))


OBJECTIVES[BlockDraft] = BlockObjective
