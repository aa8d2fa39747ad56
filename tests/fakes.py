"""Tiny random models with their processors, and drafts that always know or always lie."""

import string
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from specvlm.drafts import DraftSession
from specvlm.state import DecodeState
from specvlm.targets.base import Prompt, Target
from specvlm.tree import DraftTree, tree_from_lists

VOCAB, IMAGE_TOKEN, IMAGE_SIDE = 320, 4, 32
#: Ways to draw tokens that answers have to be equal in.
SAMPLING = [
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 1.0},
    {"temperature": 1.5},
    {"temperature": 0.3, "top_k": 20},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.9},
]
LANGUAGES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def text_config(language: str = "llama", **changes: object) -> PreTrainedConfig:
    """A language model of 2 layers and 4 heads of 32."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LANGUAGES[language](**settings | changes)


def tiny_llava(
    family: str = "llava", language: str = "llama", seed: int = 0, **text_changes: object
) -> PreTrainedModel:
    """A random LLaVA ("llava") or LLaVA-NeXT ("llava_next") whose answers do not repeat themselves.

    Its weights are wide enough that the next token hangs on everything before it; nothing ends its answers.
    """
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIDE,
        patch_size=8,
    )
    settings = {
        "vision_config": vision,
        "text_config": text_config(language, **text_changes),
        "image_token_id": IMAGE_TOKEN,
        "vision_feature_layer": -1,
        "image_seq_length": 16,
    }
    if family == "llava_next":
        pinpoints = [[IMAGE_SIDE, 2 * IMAGE_SIDE], [2 * IMAGE_SIDE, IMAGE_SIDE], [2 * IMAGE_SIDE, 2 * IMAGE_SIDE]]
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=pinpoints, **settings))
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**settings))
    return _widened(model)


def tiny_lm(language: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random language model that reads text alone, with the vocabulary of `tiny_llava`."""
    torch.manual_seed(seed)
    return _widened(AutoModelForCausalLM.from_config(text_config(language, **changes)))


def _widened(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.5 * module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    model.generation_config.eos_token_id = None
    return model.eval()


def prompt_for(model: PreTrainedModel, images: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Random text around `images` random pictures, as a processor would give it, on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(5, VOCAB, (2, 6), generator=generator).tolist()
    inputs: dict[str, Tensor] = {}
    rows: list[int] = []
    if images:
        if isinstance(model, LlavaNextForConditionalGeneration):
            inputs["pixel_values"] = torch.randn(images, 5, 3, IMAGE_SIDE, IMAGE_SIDE, generator=generator)
            inputs["image_sizes"] = torch.tensor([[50, 60], [40, 64]][:images])
        else:
            inputs["pixel_values"] = torch.randn(images, 3, IMAGE_SIDE, IMAGE_SIDE, generator=generator)
        inputs = {name: one.to(model.device) for name, one in inputs.items()}
        with torch.no_grad():
            features = model.model.get_image_features(**inputs, return_dict=True).pooler_output
        rows = [len(one) for one in features]
    ids = [1, *text[0]]
    for count in rows:
        ids += [IMAGE_TOKEN] * count + [5]
    inputs["input_ids"] = torch.tensor([ids + text[1]], device=model.device)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def tiny_processor() -> LlavaProcessor:
    """A processor for `tiny_llava`: byte-level pairs trained on the spot, and a chat template."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([string.printable, "USER: what is it ASSISTANT: a red circle"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    template = (
        "{% for message in messages %}{{ ' ASSISTANT: ' if message['role'] == 'assistant' else 'USER: ' }}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer=fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def picture(seed: int = 0) -> Image.Image:
    """A picture of noise."""
    pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@dataclass(slots=True)
class ScriptedDraft:
    """Proposes, below the root, a chain that follows `answer`, and beside each of its nodes `decoys` others.

    Attributes:
        answer: the tokens that the target will say, and some more.
        depth: length of the chain.
        lies: propose every token but the right one.
        decoys: wrong siblings of every right node.
    """

    answer: Sequence[int]
    depth: int
    lies: bool = False
    decoys: int = 0
    taps: tuple[int, ...] | None = None
    rounds: list[DraftTree] = field(default_factory=list)

    def bind(self, target: Target) -> None:
        """Fits every target."""

    def start(self, prompt: Prompt, state: DecodeState) -> DraftSession:
        return self

    def propose(self, state: DecodeState) -> DraftTree:
        said = len(state.tokens[0])
        tokens, parents, node = [state.tokens[0][-1]], [-1], 0
        for right in self.answer[said : said + self.depth]:
            for wrong in range(1, self.decoys + 1):
                tokens.append((right + wrong) % VOCAB)
                parents.append(node)
            tokens.append((right + 17) % VOCAB if self.lies else right)
            parents.append(node)
            node = len(tokens) - 1
        self.rounds.append(tree_from_lists(tokens, parents, device=state.kv_len.device))
        return self.rounds[-1]
