"""docs/kernels.md has a section a public name, with a formula, shapes, costs and an example; every example runs."""

import inspect
import re
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch

import specvlm_kernels

TEXT = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
SECTIONS = {part.split("\n", 1)[0]: part for part in re.split(r"^## ", TEXT, flags=re.M)[1:]}
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def test_every_public_name_has_its_section():
    assert sorted(SECTIONS) == sorted(specvlm_kernels.__all__)
    for name in specvlm_kernels.__all__:
        assert f"[`{name}`](#{name.lower()})" in TEXT.split("\n## ", 1)[0], f"{name} is not in the list at the top"


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_is_whole(name):
    section, thing = SECTIONS[name], getattr(specvlm_kernels, name)
    assert len(section.splitlines()) <= 60, "longer than a screen"
    assert EXAMPLE.findall(section)
    if not is_dataclass(thing):
        arguments = inspect.signature(thing).parameters
        assert re.search(r"^    \S", section, re.M), "a formula"
        assert "| returns |" in section or "changed in place" in section
        assert "| costs |" in section
        said = re.search(rf"`{name}\((.*?)\)`:", section, re.S)
        assert said, "the signature, as the section's first words"
        for argument in arguments:
            assert re.search(rf"\b{argument}\b", said[1]), f"{argument} is not in the signature"
        defaults = {a.name: a.default for a in arguments.values() if a.default is not inspect.Parameter.empty}
        for argument, default in defaults.items():
            assert f"{argument}={default!r}" in said[1]


@pytest.mark.parametrize("name", SECTIONS)
def test_an_example_runs(name):
    torch.manual_seed(0)
    for example in EXAMPLE.findall(SECTIONS[name]):
        assert f"{name}(" in example
        assert "assert" in example, "an example has to show something"
        exec(compile(example, f"docs/kernels.md, {name}", "exec"), {})


def test_there_is_no_example_outside_a_section():
    assert len(EXAMPLE.findall(TEXT)) == sum(len(EXAMPLE.findall(part)) for part in SECTIONS.values())
