"""Bad input is refused before any decoding, by an error that names what was expected and what came."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import OPTConfig

from specvlm import SpecVLM, load
from specvlm.config import GenerateConfig
from specvlm.drafts import NGramDraft
from specvlm.state import SlabPool
from specvlm.targets.hf import HFTarget
from tests.fakes import IMAGE_SIDE, VOCAB, picture, prompt_for, tiny_llava, tiny_processor


@pytest.fixture(scope="module")
def specvlm() -> SpecVLM:
    return SpecVLM(tiny_llava(), processor=tiny_processor())


@pytest.fixture(scope="module")
def prompt(specvlm):
    return prompt_for(specvlm.target.model)


@pytest.fixture(autouse=True)
def no_forward(specvlm, monkeypatch):
    """Fails a test whose bad input reached the language model."""

    def forward(*args, **kwargs):
        raise AssertionError("the language model ran")

    monkeypatch.setattr(specvlm.target, "_forward", forward)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -0.5}, ValueError, r"temperature: expected a finite number >= 0, got -0.5"),
        ({"temperature": float("nan")}, ValueError, r"temperature: expected a finite number >= 0, got nan"),
        ({"temperature": float("inf")}, ValueError, r"temperature: .* got inf"),
        ({"temperature": "hot"}, TypeError, r"temperature: expected a number, got 'hot'"),
        ({"top_p": 0.0}, ValueError, r"top_p: expected a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, ValueError, r"top_p: .* got 1.5"),
        ({"top_p": float("nan")}, ValueError, r"top_p: .* got nan"),
        ({"top_k": -1}, ValueError, r"top_k: expected an integer from 0 to 2147483647, got -1"),
        ({"top_k": 2.5}, TypeError, r"top_k: expected an integer, got 2.5"),
        ({"max_new_tokens": 0}, ValueError, r"max_new_tokens: expected an integer >= 1, got 0"),
        ({"max_new_tokens": True}, TypeError, r"max_new_tokens: expected an integer, got True"),
        ({"seed": 2**64}, ValueError, r"seed: expected an integer from .* got 18446744073709551616"),
        ({"stop_strings": []}, ValueError, r"stop_strings: expected one or more strings .* got \[\]"),
        ({"stop_strings": ["a", ""]}, ValueError, r"stop_strings: .* got \['a', ''\]"),
        ({"num_beams": 4}, TypeError, r"num_beams: expected keywords among attention_mask, .*temperature"),
        ({"within": 9}, TypeError, r"within: expected none, for a text's ids stand in no order, got 9"),
        ({"ordinal": (0, 9)}, TypeError, r"ordinal: expected none, for a text's ids stand in no order, got \(0, 9\)"),
        ({"draft": NGramDraft}, TypeError, r"draft: expected a Draft, .* got the class NGramDraft"),
        ({"draft": "eagel-3000/x/y"}, ValueError, r"draft: expected 'ngram'.* got 'eagel-3000/x/y'"),
        ({"draft": 7}, TypeError, r"draft: expected a Draft, a name, a folder or None, got int"),
        ({"max_new_tokens": 600}, ValueError, r"max_new_tokens: expected at most 4\d\d, .* context of 512, got 600"),
    ],
    ids=str,
)
def test_options(specvlm, prompt, options, error, message):
    with pytest.raises(error, match=message):
        specvlm.generate(**prompt, **options)


def long_prompt(prompt):
    ids = torch.cat([prompt["input_ids"], torch.full((1, 512), 7)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: {"pixel_values": None},
            r"pixel_values: expected a picture for the prompt's 16 image tokens, got none",
        ),
        (
            lambda p: {"input_ids": torch.full_like(p["input_ids"], 9)},
            r"input_ids: expected image tokens for the picture",
        ),
        (lambda p: {"input_ids": p["input_ids"] - 5}, r"input_ids: expected ids in \[0, 320\), got -\d"),
        (lambda p: {"input_ids": p["input_ids"] + VOCAB}, r"input_ids: expected ids in \[0, 320\), got \d+"),
        (
            lambda p: {"input_ids": p["input_ids"].int()},
            r"input_ids: expected an int64 tensor \[1, T\], got torch.int32",
        ),
        (
            lambda p: {"input_ids": p["input_ids"][0]},
            r"input_ids: expected an int64 tensor \[1, T\], got torch.int64 \[",
        ),
        (lambda p: {"input_ids": p["input_ids"].tolist()}, r"input_ids: expected an int64 tensor \[1, T\], got list"),
        (lambda p: {k: v.repeat(2, 1) for k, v in p.items() if v.ndim == 2}, r"input_ids: expected one prompt, got 2"),
        (lambda p: {"attention_mask": p["attention_mask"][:, 1:]}, r"attention_mask: expected shape \[1, \d+\], got"),
        (lambda p: {"attention_mask": [[1, 1]]}, r"attention_mask: expected a tensor, got list"),
        (lambda p: {"attention_mask": p["attention_mask"] * 0}, r"input_ids: expected at least one token, got none"),
        (
            lambda p: {"pixel_values": p["pixel_values"][..., 1:]},
            r"pixel_values: expected shape .*32, 32\], got .* 31\]",
        ),
        (
            lambda p: {"pixel_values": p["pixel_values"].long()},
            r"pixel_values: expected a float tensor .* got torch.int64",
        ),
        (
            lambda p: {"pixel_values": p["pixel_values"].repeat(2, 1, 1, 1)},
            r"input_ids: expected 32 image tokens .* got 16",
        ),
        (long_prompt, r"input_ids: expected at most the context of 512 tokens, got 5\d\d"),
    ],
)
def test_prompts(specvlm, prompt, change, message):
    with pytest.raises(ValueError, match=message):
        specvlm.generate(**prompt | change(prompt))


def test_a_missing_prompt(specvlm):
    with pytest.raises(ValueError, match=r"input_ids: expected an int64 tensor \[1, T\], got NoneType"):
        specvlm.generate(max_new_tokens=4)


def test_a_refused_prompt_keeps_no_slab(prompt):
    specvlm = SpecVLM(tiny_llava())
    before = len(specvlm.target._pool._idle)
    with pytest.raises(ValueError, match="image tokens"):
        specvlm.generate(**prompt | {"pixel_values": prompt["pixel_values"].repeat(2, 1, 1, 1)})
    assert len(specvlm.target._pool._idle) == before + 1, "one of another size was borrowed"


def test_more_kv_than_there_is_memory():
    pool = SlabPool(layers=32, kv_heads=32, head_dim=128, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"KV cache: expected at most \d+\.\d\d GiB, .* got 1000\.00 GiB for 1 x 1024000"
    ):
        pool.borrow(1, 1024 * 1000)


def test_image_sizes_of_the_next_family():
    specvlm = SpecVLM(tiny_llava("llava_next"))
    prompt = prompt_for(specvlm.target.model)
    with pytest.raises(
        ValueError, match=r"image_sizes: expected a tensor \[1, 2\] of heights and widths, got NoneType"
    ):
        specvlm.generate(**prompt | {"image_sizes": None})


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("no/such/file.png", r"image: expected a whole picture file, got 'no/such/file.png': .*No such file"),
        (__file__, r"image: expected a whole picture file, got .*test_inputs.py': cannot identify"),
        (17, r"image: expected a PIL image or a path, got int"),
    ],
)
def test_pictures(specvlm, image, message):
    with pytest.raises(ValueError, match=message):
        specvlm.ask(image, "what is it")


def test_half_a_picture(specvlm, tmp_path):
    whole = tmp_path / "whole.png"
    picture().save(whole)
    half = tmp_path / "half.png"
    half.write_bytes(whole.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"image: expected a whole picture file, got .*half.png"):
        specvlm.ask(half, "what is it")
    with pytest.raises(ValueError, match=r"image: expected a whole picture file, got one that breaks off"):
        specvlm.ask(Image.open(half), "what is it")


def test_a_picture_with_a_broken_chunk(specvlm, tmp_path):
    whole = tmp_path / "whole.png"
    pixels = torch.randint(0, 256, (200, 200, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(whole)
    data = bytearray(whole.read_bytes())
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    data[second : second + 4] = b"\0\0\0\0"
    whole.write_bytes(data)
    with pytest.raises(ValueError, match=r"image: expected a whole picture file, got .*whole.png"):
        specvlm.ask(whole, "what is it")


def test_asking_and_stop_strings_need_a_processor():
    specvlm = SpecVLM(tiny_llava())
    with pytest.raises(ValueError, match="processor: expected one with a chat template, got none"):
        specvlm.ask(picture(), "what is it")
    with pytest.raises(ValueError, match="stop_strings: expected a model loaded with its processor, got none"):
        specvlm.generate(**prompt_for(specvlm.target.model), stop_strings=["."])


@pytest.mark.parametrize(
    ("language", "changes", "message"),
    [
        ("mistral", {"sliding_window": 128}, r"sliding_window: expected none, or at least the context of 512, got 128"),
        ("llama", {"head_dim": 16}, r"head_dim: expected 32 to 128, got 16 in llama"),
        ("llama", {"attn_logit_softcapping": 30.0}, r"attn_logit_softcapping: expected none, got 30.0 in llama"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            r"rope_type: expected one whose rotations .* got 'dynamic'",
        ),
    ],
)
def test_language_models_that_our_attention_cannot_serve(language, changes, message):
    with pytest.raises(ValueError, match=message):
        HFTarget(tiny_llava(language=language, **changes))


def test_a_window_no_shorter_than_the_context_is_served():
    model = tiny_llava(language="mistral", sliding_window=512)
    prompt = prompt_for(model)
    assert len(SpecVLM(model).generate(**prompt, max_new_tokens=400).tokens) == 400, "the slab outgrows the window"


def test_a_language_model_of_another_make():
    model = tiny_llava()
    text = OPTConfig(vocab_size=VOCAB)
    model.config.text_config = text
    with pytest.raises(ValueError, match=r"language model: expected a Llama-, .* got opt, whose config has no num_key"):
        HFTarget(model)


def test_a_generation_config_that_asks_for_a_least_length():
    model = tiny_llava()
    model.generation_config.min_new_tokens = 4
    with pytest.raises(ValueError, match="generation config: expected no min_new_tokens, got 4"):
        HFTarget(model)


def test_targets_of_another_family():
    with pytest.raises(ValueError, match=r"target: expected a LlavaFor.* or LlavaNextFor.*, got LlamaModel"):
        SpecVLM(tiny_llava().model.language_model)


def test_attention_refuses_keywords_that_it_does_not_know():
    target = HFTarget(tiny_llava())
    from specvlm.targets.hf_attention import _attention

    q = torch.zeros(1, 4, 1, 32)
    with pytest.raises(ValueError, match="our attention lacks s_aux, which this model needs"):
        _attention(target.model, q, q, q, None, scaling=1.0, s_aux=torch.zeros(4))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_llava().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def test_a_saved_model_loads_and_answers(saved, specvlm):
    loaded = load(saved, draft="ngram")
    assert loaded.ask(picture(), "what is it", max_new_tokens=8) is not None


def test_a_truncated_checkpoint(saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (saved / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"target: expected whole safetensors files in .*, got"):
        load(tmp_path)


def test_a_checkpoint_with_a_tensor_missing(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(saved / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("o_proj.weight"))]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"target: expected every tensor in .*missing_keys.*o_proj.weight"):
        load(tmp_path)


def test_a_checkpoint_with_a_misshapen_tensor(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(saved / "model.safetensors")
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    tensors[name] = tensors[name][:, 1:].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"target: expected every tensor in .*mismatched_keys.*o_proj.weight"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "mps"}, r"device: expected cuda or cpu, got 'mps'"),
        ({"device": "cuda:99"}, r"device: expected one that is there, got 'cuda:99', and torch finds \d+ GPUs"),
        (
            {"target": "no/such/folder/at/all"},
            r"target: expected a model folder or hub id, got 'no/such/folder/at/all'",
        ),
        ({"dtype": "float8"}, r"dtype: expected float32, float16, bfloat16, got 'float8'"),
    ],
)
def test_loading(saved, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**{"target": saved} | arguments)


def test_a_folder_that_is_no_draft(saved, specvlm, tmp_path):
    with pytest.raises(ValueError, match=r"draft: expected .*config.json to be a JSON object with a draft_type"):
        load(saved, draft=tmp_path)
    for settings, message in (
        ("{}", r"draft_type: expected 'eagle' or 'eagle3' or 'block', got None in .*config.json"),
        ('{"model_type": "opt"}', r"model_type: expected 'llava' or .*'qwen2' of a draft, got 'opt' in .*config.json"),
    ):
        (tmp_path / "config.json").write_text(settings)
        with pytest.raises(ValueError, match=message):
            load(saved, draft=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shortest": 0}, "shortest: expected an integer >= 1, got 0"),
        ({"longest": 0}, "longest: expected an integer >= 1, got 0"),
        ({"depth": 128}, "depth: expected an integer from 1 to 127, got 128"),
        ({"nodes": 129}, "nodes: expected an integer from 2 to 128, got 129"),
    ],
)
def test_ngram_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        NGramDraft(**settings)


def test_configs_refuse_unknown_fields():
    with pytest.raises(TypeError, match="top_q"):
        GenerateConfig(top_q=1)


def test_numbers_of_numpy_are_numbers():
    given = {"temperature": np.float32(0.5), "top_k": np.int64(5), "top_p": np.float64(0.5), "seed": np.int64(4)}
    plain = {"temperature": 0.5, "top_k": 5, "top_p": 0.5, "seed": 4}
    config = GenerateConfig(**given)
    assert config == GenerateConfig(**plain)
    assert {type(getattr(config, name)) for name in given} == {float, int}


@pytest.mark.parametrize(
    ("setting", "value"),
    [("repetition_penalty", 1.2), ("no_repeat_ngram_size", 3), ("suppress_tokens", [7]), ("num_beams", 4)],
)
def test_generation_configs_that_change_greedy_answers(setting, value):
    model = tiny_llava()
    setattr(model.generation_config, setting, value)
    with pytest.raises(ValueError, match=rf"generation config: expected no {setting}, got {re.escape(str(value))}"):
        SpecVLM(model)


def test_eos_ids_of_another_kind():
    model = tiny_llava()
    model.generation_config.eos_token_id = "x"
    with pytest.raises(TypeError, match="generation config: eos_token_id: expected an integer, got 'x'"):
        SpecVLM(model)


def test_lengths_of_a_generation_config_that_are_none():
    model = tiny_llava()
    model.generation_config.max_new_tokens = -3
    with pytest.raises(ValueError, match="generation config: max_new_tokens: expected an integer >= 1, got -3"):
        SpecVLM(model)


def test_targets_and_dtypes_of_another_kind():
    with pytest.raises(ValueError, match="target: expected a folder, a hub id or demo, got SpecVLM"):
        load(SpecVLM(tiny_llava()))
    with pytest.raises(ValueError, match=r"dtype: expected float32, float16, bfloat16, got torch\.float64"):
        load("demo", dtype=torch.float64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_sizes": torch.tensor([[4, 4]])},
            "image_sizes: expected none, for all pictures of this model have one",
        ),
        (
            {"pixel_values": torch.zeros(0, 3, IMAGE_SIDE, IMAGE_SIDE)},
            "pixel_values: expected at least one picture, got none",
        ),
        (
            {"pixel_values": torch.full((1, 3, IMAGE_SIDE, IMAGE_SIDE), torch.nan)},
            "pixel_values: expected finite numbers, got others",
        ),
    ],
)
def test_pictures_that_are_none(changes, message):
    model = tiny_llava()
    with pytest.raises(ValueError, match=message):
        SpecVLM(model).generate(**prompt_for(model) | changes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([[0, 40]], "image_sizes: expected whole heights and widths of at least 1, got"),
        ([[-5, 40]], "image_sizes: expected whole heights and widths of at least 1, got"),
        ([[4000, 40]], r"pixel_values: expected \d patches for pictures of"),
    ],
)
def test_sizes_that_pictures_cannot_have(sizes, message):
    model = tiny_llava("llava_next")
    prompt = prompt_for(model)
    prompt["image_sizes"] = torch.tensor(sizes)
    prompt["pixel_values"] = prompt["pixel_values"][:, :2]
    with pytest.raises(ValueError, match=message):
        SpecVLM(model).generate(**prompt)
