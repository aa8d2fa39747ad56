"""The untrained parts: tokenizer, chat template, processor and model."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from specvlm.demo.scenes import PICTURE_SIZE

PATCH_SIZE = 12
PATCHES = PICTURE_SIZE // PATCH_SIZE  # a side
IMAGE_TOKENS = PATCHES**2
CONTEXT = 2048
MEAN = STD = 0.5

_VOCABULARY = 1024
_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")

# LLaVA-1.5's: "USER: <image>\nquestion ASSISTANT: answer</s>".
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ':' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ ' <image>\\n' }}{% endfor %}"
    "{% set pictures = message['content'] | selectattr('type', 'equalto', 'image') | list %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ ('' if loop.first and pictures else ' ') + part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int = _VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE that has seen `texts`, of `vocabulary` tokens; it puts `<s>` before everything it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(_SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, picture_size: int = PICTURE_SIZE) -> LlavaProcessor:
    """A processor that resizes any picture to the vision tower's size, without torchvision."""
    image_processor = CLIPImageProcessorPil(
        size={"height": picture_size, "width": picture_size},
        do_center_crop=False,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, picture_size: int = PICTURE_SIZE, width: int = 256, layers: int = 8
) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights, of about 7.6M parameters by default.

    Args:
        width: of the language model, a multiple of its heads' 128.
    """
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=picture_size,
        patch_size=PATCH_SIZE,
    )
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
        head_dim=128,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(picture_size // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    for name, value in special.items():
        setattr(model.generation_config, name, value)
    return model
