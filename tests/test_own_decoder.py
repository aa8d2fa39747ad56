"""examples/own_decoder.py: token for token what `generate` of transformers says, by the kernels alone."""

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.fakes import VOCAB, tiny_lm, tiny_processor

PATH = Path(__file__).parents[1] / "examples" / "own_decoder.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_decoder", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(5, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def generated(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> list[int]:
    inputs = torch.tensor([prompt])
    found = model.generate(inputs, attention_mask=inputs > 0, do_sample=False, max_new_tokens=new_tokens)
    return found[0, len(prompt) :].tolist()


def test_it_imports_the_kernels_and_nothing_else_of_ours():
    imports = [node for node in ast.walk(ast.parse(PATH.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module.split(".")[0] for node in imports if isinstance(node, ast.ImportFrom)}
    assert names == {"sys", "torch", "transformers", "specvlm_kernels"}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 70])
def test_answers_are_those_of_generate(example, kv_heads, length):
    model = tiny_lm(num_key_value_heads=kv_heads)
    answer, _ = example.decode(model, prompt_of(length), 20)
    assert answer == generated(model, prompt_of(length), 20)


def test_what_was_said_before_comes_in_few_rounds(example):
    """The answer stands in the prompt, so the n-gram table has it."""
    model = tiny_lm()
    prompt = prompt_of(9)
    # A model that repeats itself: its answer is a loop sooner or later, whatever the prompt.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    answer, rounds = example.decode(model, prompt, 200)
    assert answer == generated(model, prompt, 200)
    assert rounds < 120


@pytest.mark.parametrize("place", [0, 1, 7])
def test_an_answer_ends_at_eos(example, place):
    model = tiny_lm()
    prompt = prompt_of(12)
    told = generated(model, prompt, 20)
    model.generation_config.eos_token_id = [told[place], VOCAB - 1]
    answer, _ = example.decode(model, prompt, 20)
    assert answer == generated(model, prompt, 20)
    assert answer[-1] == told[place]


def test_proposals_are_what_followed_before(example):
    nodes, parents = example.propose([1, 2, 3, 9, 1, 2, 4, 8, 1, 2])
    paths = {tuple(nodes[i] for i in path(parents, i)) for i in range(len(nodes))}
    assert {(2, 4, 8, 1, 2), (2, 3, 9, 1, 2, 4, 8)} <= paths
    assert example.propose([1, 2, 3]) == ([3], [-1])
    nodes, parents = example.propose([1, 1] * 40)
    assert len(nodes) <= example.NODES
    assert all(parent < node for node, parent in enumerate(parents))


def path(parents: list[int], node: int) -> list[int]:
    """From the root down to `node`."""
    return ([] if node == 0 else path(parents, parents[node])) + [node]


def test_the_command_makes_its_own_model(example, capsys):
    assert example.main([]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "equal to generate"
    tokens, rate = said[-2].split(" tokens, ")
    assert int(tokens) == example.NEW_TOKENS
    assert float(rate.removesuffix(" a round")) > 1.5


def test_the_command_takes_a_model_and_a_prompt(example, capsys, tmp_path):
    tiny_lm().save_pretrained(tmp_path)
    tiny_processor().tokenizer.save_pretrained(tmp_path)
    assert example.main([str(tmp_path), "what", "is", "it"]) == 0
    assert "equal to generate" in capsys.readouterr().out


def test_a_wrong_answer_is_told(example, capsys, monkeypatch):
    monkeypatch.setattr(example, "decode", lambda model, prompt, new_tokens: ([1, 2, 3], 2))
    assert example.main([]) == 1
    assert "NOT equal to generate" in capsys.readouterr().out


@pytest.mark.interpreter
def test_it_decodes_through_the_kernels(example):
    model = tiny_lm(num_key_value_heads=2)
    prompt = prompt_of(5) * 2
    assert example.decode(model, prompt, 4)[0] == generated(model, prompt, 4)
