"""Drafts against each other on one model: ``python -m bench.compare``.

One process takes every draft in turn; speeds are medians over repeats with quartiles. Prints a table as it goes, writes
it with a plot and JSON lines to `--out`, and ends in one line of JSON. The table's shares are of the time after the
first token: the draft's forwards, the target's, and the host's rest, of which growing trees is a part.

``--heads DIR`` compares EAGLE heads with the shipped one on questions of every type about held-out scenes.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from bench.corpora import Scenes
from bench.machine import machine
from specvlm import SpecVLM, load
from specvlm.cost_aware import CostAware, costs_of
from specvlm.demo import HEAD_DIR, SMALL_DIR
from specvlm.demo.run import tasks
from specvlm.drafts import Draft, EagleDraft, EagleHead, NGramDraft, VLMDraft
from specvlm.measuring import Row, measure
from specvlm.policies import Confidence, Eagle2, FixedShape, OptTree, Sage, TreePolicy, default_plan

TEMPERATURES = (0.0, 0.5, 1.0, 1.5)
COLUMNS = (
    "| draft | temperature | tau | decode tokens/s | x AR | end to end tokens/s | draft forwards | target forwards "
    "| host | growing trees, of host | host ms a round | equal |"
)


def drafts_with(head: Path, shape: Mapping[str, int]) -> dict[str | None, Draft | None]:
    """AR, n-gram, EAGLE with shared noise, and the same head growing the usual tree.

    Args:
        shape: fields of the trees' plan, where they are not the CPU's or GPU's own.
    """
    eagle = EagleDraft.from_pretrained(head, _eagle2(shape))
    usual = EagleDraft(eagle.head, eagle.policy, shared_noise=False)
    return {None: None, "ngram": NGramDraft(), "eagle": eagle, "eagle, usual tree": usual}


def heads_of(folders: Sequence[Path], shape: Mapping[str, int]) -> dict[str | None, Draft | None]:
    """AR, the shipped head, and those in `folders` by their paths, all growing trees of one shape."""
    named = {"the shipped head": HEAD_DIR} | {str(folder): folder for folder in folders}
    found: dict[str | None, Draft | None] = {None: None}
    return found | {name: EagleDraft.from_pretrained(folder, _eagle2(shape)) for name, folder in named.items()}


def _eagle2(shape: Mapping[str, int]) -> Eagle2:
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Eagle2(replace(default_plan(place), **shape))


def policies_of(head: Path, model: SpecVLM) -> dict[str | None, Draft | None]:
    """AR, and the head and the small model under every tree policy, as those that know nothing yet; and a head that
    never learned anything under the one that is to notice."""
    eagle, small = EagleDraft.from_pretrained(head), VLMDraft.from_pretrained(SMALL_DIR)
    plan = default_plan(model.target.spec.device)
    policies: dict[str, Callable[[Any], TreePolicy]] = {
        "EAGLE-2": lambda draft: Eagle2(),
        "fixed": lambda draft: FixedShape((2, 2, 1, 1, 1)),
        "confidence": lambda draft: Confidence(),
        "SAGE": lambda draft: Sage(widths=(2, max(4, plan.width)), nodes=max(16, plan.nodes)),
        "OPT-Tree": lambda draft: OptTree(nodes=plan.nodes, width=plan.width),
        "cost-aware": lambda draft: CostAware(costs_of(model.target, draft, width=plan.width), width=plan.width),
    }
    found: dict[str | None, Draft | None] = {None: None}
    found |= {f"eagle, {name}": EagleDraft(eagle.head, policy(eagle)) for name, policy in policies.items()}
    found |= {f"vlm, {name}": VLMDraft(small.model, policy(small)) for name, policy in policies.items()}
    torch.manual_seed(0)
    useless = EagleDraft(EagleHead(eagle.head.config))
    found["untrained eagle, cost-aware"] = EagleDraft(useless.head, policies["cost-aware"](useless))
    return found


def against_hf(
    model: SpecVLM, prompts: Sequence[Mapping[str, Any]], repeats: int, max_new_tokens: int
) -> dict[str, float]:
    """Greedy tokens a second, end to end, of AR by this engine and of `generate` of transformers, in turn.

    Raises:
        RuntimeError: their answers differ.
    """
    hf = model.target.model
    for prompt in prompts:
        expected = hf.generate(**prompt, do_sample=False, max_new_tokens=max_new_tokens)
        if not torch.equal(model.generate(**prompt, max_new_tokens=max_new_tokens, draft=None).sequences, expected):
            raise RuntimeError("transformers and AR answer differently")

    def ours() -> int:
        return sum(
            len(model.generate(**prompt, max_new_tokens=max_new_tokens, draft=None).tokens) for prompt in prompts
        )

    def theirs() -> int:
        answers = (hf.generate(**prompt, do_sample=False, max_new_tokens=max_new_tokens) for prompt in prompts)
        return sum(
            answer.shape[1] - prompt["input_ids"].shape[1] for answer, prompt in zip(answers, prompts, strict=True)
        )

    def speed(answer_all: Any) -> float:
        began = time.perf_counter()
        return answer_all() / (time.perf_counter() - began)

    pairs: list[tuple[float, float]] = []
    for repeat in range(repeats):
        if repeat % 2:
            plain = speed(theirs)
            pairs.append((speed(ours), plain))
        else:
            pairs.append((speed(ours), speed(theirs)))
    ratios = sorted(a / b for a, b in pairs)
    return {
        "ar": round(median(a for a, _ in pairs), 1),
        "transformers": round(median(b for _, b in pairs), 1),
        "ratio": round(median(ratios), 3),
        "least": round(ratios[0], 3),
        "most": round(ratios[-1], 3),
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    plain = {row.temperature: row.decode.median for row in rows if row.draft is None}
    lines = [COLUMNS, "|---|" + "---:|" * 10 + "---|"]
    for row in rows:
        decode, end = row.decode, row.end_to_end
        growing = row.growth_share / row.host_share
        lines.append(
            f"| {row.draft or 'AR'} | {row.temperature} | {row.tau:.2f} | {decode.median:.0f} "
            f"({decode.low:.0f}-{decode.high:.0f}) | {decode.median / plain[row.temperature]:.2f} | {end.median:.0f} "
            f"({end.low:.0f}-{end.high:.0f}) | {row.draft_share:.0%} | {row.verify_share:.0%} | {row.host_share:.0%} "
            f"| {growing:.0%} | {row.host_ms:.2f} | {'yes' if row.identical else 'NO'} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Decode-only speedup over AR, and tau, against temperature."""
    plain = {row.temperature: row.decode.median for row in rows if row.draft is None}
    figure, (speed, tau) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in dict.fromkeys(row.draft for row in rows):
        mine = [row for row in rows if row.draft == name]
        at = [row.temperature for row in mine]
        ratios = [row.decode.median / plain[row.temperature] for row in mine]
        spread = [
            [(row.decode.median - row.decode.low) / plain[row.temperature] for row in mine],
            [(row.decode.high - row.decode.median) / plain[row.temperature] for row in mine],
        ]
        speed.errorbar(at, ratios, yerr=spread, marker="o", capsize=3, label=name or "AR")
        tau.plot(at, [row.tau for row in mine], marker="o", label=name or "AR")
    speed.set(xlabel="temperature", ylabel="decode-only speed, AR = 1")
    tau.set(xlabel="temperature", ylabel="tokens a round (tau)")
    for axes in (speed, tau):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    speed.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bars(rows: Sequence[Row], path: Path) -> None:
    """Decode-only speedup over AR, and tau, a bar a draft and temperature, those of one draft together."""
    plain = {row.temperature: row.decode.median for row in rows if row.draft is None}
    names = list(dict.fromkeys(row.draft for row in rows))
    figure, (speed, tau) = plt.subplots(1, 2, figsize=(11, 1 + 0.35 * len(names)), layout="constrained", sharey=True)
    height = 0.8 / len(plain)
    for number, (temperature, ar) in enumerate(plain.items()):
        mine = {row.draft: row for row in rows if row.temperature == temperature}
        at = [place + number * height for place in range(len(names))]
        decode = [mine[name].decode for name in names]
        spread = [[(d.median - d.low) / ar for d in decode], [(d.high - d.median) / ar for d in decode]]
        label = f"temperature {temperature:g}"
        speed.barh(at, [d.median / ar for d in decode], height, xerr=spread, capsize=2, label=label)
        tau.barh(at, [mine[name].tau for name in names], height, label=label)
    speed.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], [name or "AR" for name in names])
    speed.invert_yaxis()
    speed.axvline(1, color="black", linewidth=0.8)
    speed.set(xlabel="decode-only speed, AR = 1 (bars: quartiles)")
    tau.set(xlabel="tokens a round (tau)")
    for axes in (speed, tau):
        axes.grid(axis="x", alpha=0.3)
    tau.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(rows: Sequence[Row], about: dict[str, Any], out: Path, name: str, draw: Callable[..., None]) -> None:
    """Writes a table, what `draw` makes of the rows, and JSON lines called `name` to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    text = "# Drafts on the shipped model\n\n"
    text += "".join(f"- {name}: {value}\n" for name, value in about.items())
    command = shlex.join(["python", "-m", "bench.compare", *sys.argv[1:]])
    text += f"\nMedians with quartiles; repeat with `{command}`.\n\n" + table(rows) + "\n"
    (out / f"{name}.md").write_text(text + f"\n![speed and tau]({name}.png)\n")
    draw(rows, out / f"{name}.png")
    (out / f"{name}.jsonl").write_text("".join(json.dumps(about | asdict(row)) + "\n" for row in rows))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="repeats a condition (5)")
    parser.add_argument(
        "--prompts", type=int, default=6, help="held-out scenes to describe, or questions of each type (6)"
    )
    parser.add_argument("--tokens", type=int, default=96, help="most tokens an answer (96)")
    parser.add_argument("--head", type=Path, default=HEAD_DIR, help="an EAGLE head's folder (the shipped one)")
    parser.add_argument("--heads", type=Path, nargs="+", help="compare the heads in these folders with the shipped one")
    parser.add_argument("--nodes", type=int, help="nodes of the EAGLE trees")
    parser.add_argument("--depth", type=int, help="depth of the EAGLE trees")
    parser.add_argument("--width", type=int, help="width of the EAGLE trees")
    parser.add_argument("--policies", action="store_true", help="compare tree policies, each of its own shape")
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="where to write (bench/results)")
    args = parser.parse_args()
    for name in ("repeats", "prompts", "tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected an integer >= 1, got {getattr(args, name)}")
    shape = {name: value for name in ("nodes", "depth", "width") if (value := getattr(args, name)) is not None}
    if args.policies and (shape or args.heads):
        parser.error(f"--policies: expected no {', '.join(shape or ['heads'])} besides")
    model = load("demo")
    device = model.target.spec.device
    if args.heads:
        asked = [
            inputs for _, inputs in Scenes().prompts(model, args.prompts, seed=103)
        ]  # a seed of no other benchmark
    else:
        asked = [model.prepare(task.picture, task.question) for task in tasks(args.prompts)]
    prompts = [{name: given.to(device) for name, given in inputs.items()} for inputs in asked]
    about = machine() | {"repeats": args.repeats, "prompts": len(prompts), "max_new_tokens": args.tokens}
    about["greedy tokens/s end to end"] = against_hf(model, prompts, args.repeats, args.tokens)
    rows: list[Row] = []
    for temperature in args.temperatures:  # each with fresh drafts: some policies learn from what they see
        if args.policies:
            drafts = policies_of(args.head, model)
        else:
            drafts = heads_of(args.heads, shape) if args.heads else drafts_with(args.head, shape)
        repeats = measure(
            model,
            prompts,
            drafts,
            temperatures=[temperature],
            repeats=args.repeats,
            max_new_tokens=args.tokens,
        )
        for done, latest in enumerate(repeats, start=1):
            print(f"temperature {temperature}, repeat {done} of {args.repeats}\n{table(latest)}\n", flush=True)
        rows += latest
    if different := [f"{row.draft} at {row.temperature}" for row in rows if not row.identical]:
        sys.exit(f"answers that are not AR's: {', '.join(different)}")
    name = "policies" if args.policies else "heads" if args.heads else "compare"
    report(rows, about, args.out, name, plot if name == "compare" else bars)
    print(json.dumps(about | {"rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
