"""Drafts against each other on one model: ``python -m bench.compare``.

One process takes every draft in turn; speeds are medians over repeats with quartiles. Prints a table as it goes, writes
it with a plot and JSON lines to `--out`, and ends in one line of JSON.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from bench.machine import machine
from specvlm import load
from specvlm.demo.run import tasks
from specvlm.drafts import Draft, EagleDraft, NGramDraft
from specvlm.measuring import Row, measure

TEMPERATURES = (0.0, 0.5, 1.0, 1.5)
COLUMNS = (
    "| draft | temperature | tau | decode tokens/s | x AR | end to end tokens/s | draft | verify | host "
    "| host ms a round | equal |"
)


def demo_drafts(head: Path | None) -> dict[str | None, Draft | None]:
    """AR and n-gram; with a head, EAGLE with shared noise, and the same head growing the usual tree."""
    if head is None:
        return {None: None, "ngram": NGramDraft()}
    eagle = EagleDraft.from_pretrained(head)
    usual = EagleDraft(eagle.head, eagle.plan, shared_noise=False)
    return {None: None, "ngram": NGramDraft(), "eagle": eagle, "eagle, usual tree": usual}


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    plain = {row.temperature: row.decode.median for row in rows if row.draft is None}
    lines = [COLUMNS, "|---|" + "---:|" * 9 + "---|"]
    for row in rows:
        decode, end = row.decode, row.end_to_end
        lines.append(
            f"| {row.draft or 'AR'} | {row.temperature} | {row.tau:.2f} | {decode.median:.0f} "
            f"({decode.low:.0f}-{decode.high:.0f}) | {decode.median / plain[row.temperature]:.2f} | {end.median:.0f} "
            f"({end.low:.0f}-{end.high:.0f}) | {row.draft_share:.0%} | {row.verify_share:.0%} | {row.host_share:.0%} "
            f"| {row.host_ms:.2f} | {'yes' if row.identical else 'NO'} |"
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


def report(rows: Sequence[Row], about: dict[str, Any], out: Path) -> None:
    """Writes compare.md, compare.png and compare.jsonl to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    text = "# Drafts on the shipped model\n\n"
    text += "".join(f"- {name}: {value}\n" for name, value in about.items())
    command = shlex.join(["python", "-m", "bench.compare", *sys.argv[1:]])
    text += f"\nMedians with quartiles; repeat with `{command}`.\n\n" + table(rows) + "\n"
    (out / "compare.md").write_text(text + "\n![speed and tau against temperature](compare.png)\n")
    plot(rows, out / "compare.png")
    (out / "compare.jsonl").write_text("".join(json.dumps(about | asdict(row)) + "\n" for row in rows))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="repeats a condition (5)")
    parser.add_argument("--prompts", type=int, default=6, help="held-out scenes to describe (6)")
    parser.add_argument("--tokens", type=int, default=96, help="most tokens an answer (96)")
    parser.add_argument("--head", type=Path, help="an EAGLE head's folder, to be compared too")
    parser.add_argument("--nodes", type=int, help="nodes of the EAGLE trees")
    parser.add_argument("--depth", type=int, help="depth of the EAGLE trees")
    parser.add_argument("--width", type=int, help="width of the EAGLE trees")
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="where to write (bench/results)")
    args = parser.parse_args()
    drafts = demo_drafts(args.head)
    shape = {name: value for name in ("nodes", "depth", "width") if (value := getattr(args, name)) is not None}
    for draft in drafts.values():
        if isinstance(draft, EagleDraft) and shape:
            draft.plan = replace(draft.plan_on(torch.device("cpu")), **shape)
    model = load("demo")
    prompts = [model.prepare(task.picture, task.question) for task in tasks(args.prompts)]
    about = machine() | {"repeats": args.repeats, "prompts": args.prompts, "max_new_tokens": args.tokens}
    for done, rows in enumerate(
        measure(
            model,
            prompts,
            drafts,
            temperatures=args.temperatures,
            repeats=args.repeats,
            max_new_tokens=args.tokens,
        ),
        start=1,
    ):
        print(f"repeat {done} of {args.repeats}\n{table(rows)}\n", flush=True)
    report(rows, about, args.out)
    print(json.dumps(about | {"rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
