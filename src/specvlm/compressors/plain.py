"""Compressors without weights: no picture at all, and pictures beside the text rather than in it."""

from dataclasses import dataclass

from specvlm.compressors.base import Compressor, CompressorConfig, keep_rows
from specvlm.targets.base import Prompt


class TextOnly(Compressor):
    """The draft reads the text alone, with the target's features there, which have seen the pictures. Source: HiViS."""

    def forward(self, prompt: Prompt) -> Prompt:
        """The text's rows."""
        return keep_rows(prompt, ~prompt.image_mask)


class Decoupled(Compressor):
    """Every row stays, but those of pictures enter the draft's layer as they are. Source: MSD."""

    direct = True


@dataclass(frozen=True, slots=True)
class TextOnlyConfig(CompressorConfig):
    """No visual token."""

    kind = "text_only"

    def build(self, hidden_size: int) -> TextOnly:
        return TextOnly()


@dataclass(frozen=True, slots=True)
class DecoupledConfig(CompressorConfig):
    """Every visual token, apart from the text."""

    kind = "decoupled"

    def build(self, hidden_size: int) -> Decoupled:
        return Decoupled()
