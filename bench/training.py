"""What training and draft-side vision bring: ``python -m bench.training`` on the demo's model and its scenes;
``--target DIR --data FILE`` on one of `bench.captions` and its photos.

Every variant of an EAGLE head learns the same examples for the same steps, several epochs of them; tau is measured by
decoding after each. What a training came to is kept in `--work`, so that a run that was stopped goes on. At the end all
heads decode in turn, and a table, plots and JSON lines go to `--out`; the last line is JSON.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any, cast

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from bench.corpora import Captions, Corpus, Scenes
from bench.machine import machine
from specvlm import SpecVLM
from specvlm.compressors import (
    CompressorConfig,
    ConcatConfig,
    DecoupledConfig,
    SelectConfig,
    TextOnlyConfig,
    ViSpecConfig,
    WeightConfig,
)
from specvlm.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES
from specvlm.demo.train_head import BATCH, INTERMEDIATE_SIZE
from specvlm.drafts import EagleConfig, EagleDraft, EagleHead
from specvlm.files import whole
from specvlm.measuring import Row, measure
from specvlm.targets.hf import HFTarget
from specvlm.training import Batch, DistillConfig, distill

EPOCHS = 5
#: What the options of an elastic compressor are: the paper's primitives at its ratios, and a ladder of ratios.
PRIMITIVES = (("prune_random", 20), ("pool", 20), ("convolve", 3), ("resample", 2))
SELECT = (("prune", 20), ("pool", 20), ("convolve", 3), ("resample", 2), ("none", 1))
LADDER = (*((name, ratio) for name in ("pool", "prune") for ratio in (3, 5, 20)), ("all", 1), ("none", 1))


@dataclass(frozen=True, slots=True)
class Variant:
    """A head to be trained.

    Attributes:
        compressor: what it reads of a picture.
        repeated: trained with several seeds.
        rows_weight: of the rows that a gate lets through, in the loss.
    """

    compressor: CompressorConfig | None
    repeated: bool = False
    rows_weight: float = 0.0


VARIANTS: dict[str, Variant] = {
    "EagleVLM": Variant(None, repeated=True),
    "text only": Variant(TextOnlyConfig(), repeated=True),
    "Select": Variant(SelectConfig(SELECT), repeated=True),
    "ratio-elastic": Variant(SelectConfig(LADDER), rows_weight=0.05),
    "all, decoupled": Variant(DecoupledConfig()),
    **{f"{name} {amount}": Variant(SelectConfig(((name, amount),))) for name, amount in (*PRIMITIVES, ("prune", 20))},
    "Weight": Variant(WeightConfig((("pool", 4), ("convolve", 4), ("prune", 4)))),
    "Concat": Variant(ConcatConfig((("pool", 20), ("resample", 2)))),
    "ViSpec": Variant(ViSpecConfig(queries=2, heads=2)),
}
#: Words that say what is in a picture.
SEEN = {*COLOURS, *BACKGROUNDS, *SHAPES, *(f"{shape}s" for shape in SHAPES), "crosses", *SIZES, "big", "little", "tiny"}
SEEN |= {"huge", "no", "one", "two", "three", "four", "five", "top", "bottom", "left", "right", "middle", "center"}


def fresh(target: HFTarget, variant: Variant, seed: int) -> EagleDraft:
    """The variant's head before it learned anything, bound to the target."""
    torch.manual_seed(seed)
    config = EagleConfig.for_target(target.spec, INTERMEDIATE_SIZE, input_layernorm=True)
    draft = EagleDraft(EagleHead(replace(config, compressor=variant.compressor)))
    draft.bind(target)
    return draft


def folder_of(corpus: Corpus, name: str, seed: int, batches: int, work: Path) -> Path:
    """Where a training keeps what it came to."""
    return work / corpus.name / f"{name.replace(' ', '_').replace(',', '')}-{seed}-{batches}"


def trained(corpus: Corpus, name: str, seed: int, batches: int, work: Path, threads: int) -> dict[str, Any]:
    """Trains a variant, or finds it trained: tau and what the training told after every epoch."""
    folder = folder_of(corpus, name, seed, batches, work)
    if (folder / "epochs.json").exists():
        kept = json.loads((folder / "epochs.json").read_text())
        return {part: kept[part] for part in ("variant", "seed", "epochs")}
    torch.set_num_threads(threads)
    model, variant = corpus.model(), VARIANTS[name]
    target = cast(HFTarget, model.target)
    examples = corpus.batches(model, batches)
    prompts = [inputs for _, inputs in corpus.prompts(model, 2, seed=100)]
    draft = fresh(target, variant, seed)

    def shuffled(number: int) -> Batch:
        epoch, place = divmod(number, batches)
        return examples[Random(f"{seed} {epoch}").sample(range(batches), batches)[place]]

    def tau() -> float:
        return tau_of(model, draft, prompts)

    config = DistillConfig(
        steps=EPOCHS * batches,
        learning_rate=2e-3,
        warm_up=20,
        feature_noise=0.1,
        rows_weight=variant.rows_weight,
        checkpoint_every=batches,
        seed=seed,
    )
    epochs: list[dict[str, Any]] = []
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "so_far.json"
    for at in distill(target, draft, shuffled, config, checkpoint=folder / "checkpoint.pt", measure_tau=tau):
        if at.step % batches == 0:
            if log.exists() and not epochs:
                epochs = json.loads(log.read_text())[: at.step // batches - 1]
            numbers = {"loss": at.loss, "agreement": at.agreement, **at.parts}
            epochs.append({"epoch": at.step // batches, "tau": at.tau} | numbers)
            with whole(log) as part:
                part.write_text(json.dumps(epochs))
    draft.save_pretrained(folder)
    found = {"variant": name, "seed": seed, "epochs": epochs}
    with whole(folder / "epochs.json") as part:
        part.write_text(json.dumps(found))
    return found


def tau_of(model: SpecVLM, draft: EagleDraft, prompts: Sequence[Mapping[str, Any]], **options: Any) -> float:
    """Tokens a round over all answers."""
    stats = [model.generate(**prompt, **options, max_new_tokens=96, draft=draft).stats for prompt in prompts]
    return sum(one.tau * one.rounds for one in stats) / sum(one.rounds for one in stats)


def by_class(
    model: SpecVLM, drafts: Sequence[EagleDraft], asked: Sequence[tuple[str, Mapping[str, Any]]]
) -> dict[str, float]:
    """Tau of the tokens that name what is seen, and of the rest, in answers about scenes that need the picture.

    A class's tau is its tokens over those of them that the target had to say itself.
    """
    said = {"seen": [0, 0], "rest": [0, 0]}  # tokens, and such that the draft had not proposed
    for draft, (kind, inputs) in product(drafts, asked):
        if kind not in ("colour", "where", "count"):
            continue
        for emitted in list(model.stream(**inputs, max_new_tokens=96, draft=draft))[1:]:
            for place, token in enumerate(emitted.tokens[0]):
                word = model.processor.tokenizer.decode([token]).strip().lower()
                counts = said["seen" if word in SEEN else "rest"]
                counts[0] += 1
                counts[1] += place >= emitted.from_draft[0]
    return {name: tokens / max(own, 1) for name, (tokens, own) in said.items()}


def all_trained(corpus: Corpus, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every variant with its seeds, `args.workers` at a time."""
    wanted = [
        (name, seed)
        for name, variant in VARIANTS.items()
        if not args.variants or name in args.variants
        for seed in range(args.seeds if variant.repeated else 1)
    ]
    threads = max(1, torch.get_num_threads() // args.workers)
    done: dict[tuple[str, int], dict[str, Any]] = {}
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(trained, corpus, *each, args.batches, args.work, threads): each for each in wanted}
        for job in as_completed(jobs):
            found = done[jobs[job]] = job.result()
            taus = " ".join(f"{epoch['tau']:.2f}" for epoch in found["epochs"])
            print(f"{len(done)} of {len(wanted)}: {found['variant']}, seed {found['seed']}: tau {taus}", flush=True)
    return [done[each] for each in wanted]


def rows_of(corpus: Corpus, args: argparse.Namespace, runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a variant: tau at temperatures 0 and 1 over its seeds, tokens a second of its first, tau by class."""
    model = corpus.model()
    heads = {
        (run["variant"], run["seed"]): EagleDraft.from_pretrained(
            folder_of(corpus, run["variant"], run["seed"], args.batches, args.work)
        )
        for run in runs
    }
    prompts = [inputs for _, inputs in corpus.prompts(model, args.per_type, seed=102)]
    seeing = corpus.prompts(model, args.seeing, seed=101) if isinstance(corpus, Scenes) else []
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(run["variant"] for run in runs):
        mine = [head for (variant, _), head in heads.items() if variant == name]
        taus = {t: [tau_of(model, head, prompts, temperature=t, seed=0) for head in mine] for t in (0.0, 1.0)}
        last = next(run["epochs"][-1] for run in runs if run["variant"] == name)
        chosen = {part: share for part, share in last.items() if part.startswith("chose ") or part == "rows left"}
        rows.append({"variant": name, "tau": taus} | chosen)
        if seeing:
            rows[-1]["by class"] = by_class(model, mine, seeing)
        print(f"{name}: tau {mean(taus[0.0]):.2f} at 0, {mean(taus[1.0]):.2f} at 1", flush=True)
    firsts: dict[str | None, Any] = {None: None} | {name: head for (name, seed), head in heads.items() if seed == 0}
    latest: list[Row] = []
    for measured in measure(
        model, prompts[:: args.per_type], firsts, temperatures=(0.0, 1.0), repeats=args.repeats, max_new_tokens=96
    ):
        latest = measured
        print(".", end="", flush=True)
    plain = {row.temperature: row.decode.median for row in latest if row.draft is None}
    for row in rows:
        speeds = {one.temperature: one for one in latest if one.draft == row["variant"]}
        row["tokens/s"] = {t: asdict(one.decode) for t, one in speeds.items()}
        row["x AR"] = {t: one.decode.median / plain[t] for t, one in speeds.items()}
        row["identical"] = all(one.identical for one in speeds.values())
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    columns = ["draft head", "tau, T = 0", "tau, T = 1", "tokens/s (x AR), T = 0", "tokens/s (x AR), T = 1"]
    columns += ["tau of what is seen", "of the rest"] if "by class" in rows[0] else []
    columns += ["picture rows", "equal"]
    lines = [_line(columns), _line(["---", *["---:"] * (len(columns) - 2), "---"])]
    for row in rows:
        cells = [
            row["variant"],
            *(_spread(row["tau"][t]) for t in (0.0, 1.0)),
            *(f"{row['tokens/s'][t]['median']:.0f} ({row['x AR'][t]:.2f})" for t in (0.0, 1.0)),
        ]
        cells += [f"{tau:.2f}" for tau in row.get("by class", {}).values()]
        cells += [f"{row['rows left']:.0%}" if "rows left" in row else "", "yes" if row["identical"] else "NO"]
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def by_epoch(runs: Sequence[Mapping[str, Any]]) -> str:
    """Tau after every epoch as Markdown, and by how much the last one still raised it."""
    lines = [f"| draft head |{''.join(f' {epoch} |' for epoch in range(1, EPOCHS + 1))} last rise |"]
    lines.append("|---|" + "---:|" * (EPOCHS + 1))
    for name in dict.fromkeys(run["variant"] for run in runs):
        curves = [[epoch["tau"] for epoch in run["epochs"]] for run in runs if run["variant"] == name]
        means = [mean(at) for at in zip(*curves, strict=True)]
        lines.append(f"| {name} |{''.join(f' {tau:.2f} |' for tau in means)} {means[-1] - means[-2]:+.2f} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.2f}" + (f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else "")


def plots(runs: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Tau by epoch, and tau at the end: of what is seen against the rest, or by temperature."""
    figure, (epochs, bars) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    names = list(dict.fromkeys(run["variant"] for run in runs))
    for number, name in enumerate(names):
        curves = [[epoch["tau"] for epoch in run["epochs"]] for run in runs if run["variant"] == name]
        means = [mean(at) for at in zip(*curves, strict=True)]
        style = "-" if number < 10 else "--"  # there are ten colours
        line = epochs.plot(range(1, len(means) + 1), means, style, marker="o", label=name)[0]
        if len(curves) > 1:
            low, high = zip(*((min(at), max(at)) for at in zip(*curves, strict=True)), strict=True)
            epochs.fill_between(range(1, len(means) + 1), low, high, alpha=0.15, color=line.get_color())
    epochs.set(xlabel="epoch", ylabel="tokens a round (tau), greedy")
    epochs.legend(fontsize=8)
    for place, row in enumerate(rows):
        told = row.get("by class") or {f"temperature {t:g}": mean(taus) for t, taus in row["tau"].items()}
        for number, (what, value) in enumerate(told.items()):
            bars.barh(place + 0.4 * number, value, 0.4, color=f"C{number}", label=None if place else what)
    bars.set_yticks([place + 0.2 for place in range(len(rows))], [row["variant"] for row in rows])
    bars.invert_yaxis()
    of = "by class: words that name what is seen, and the rest" if "by class" in rows[0] else "at the end"
    bars.set(xlabel=f"tau {of}")
    bars.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, help="a model that bench.captions trained (the demo's)")
    parser.add_argument("--data", type=Path, help="the photos that it knows")
    parser.add_argument("--work", type=Path, default=Path("build/training"), help="for trainings (build/training)")
    parser.add_argument("--batches", type=int, default=100, help="batches of 12 examples an epoch (100)")
    parser.add_argument("--seeds", type=int, default=3, help="of the variants that are compared most (3)")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time (2)")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of the timing (5)")
    parser.add_argument("--per-type", type=int, default=4, help="questions of each type to decode (4)")
    parser.add_argument("--seeing", type=int, default=16, help="of each type for tau by class (16)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="these alone")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="where to write (bench/results)")
    args = parser.parse_args()
    if (args.target is None) != (args.data is None):
        parser.error("--target, --data: expected both or none")
    corpus: Corpus = Scenes() if args.target is None else Captions(args.target, args.data)
    runs = all_trained(corpus, args)
    rows = rows_of(corpus, args, runs)
    if different := [row["variant"] for row in rows if not row["identical"]]:
        sys.exit(f"answers that are not AR's: {', '.join(different)}")
    about = machine() | {
        "corpus": corpus.name,
        "examples an epoch": BATCH * args.batches,
        "epochs": EPOCHS,
        "workers": args.workers,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    name = "training" if args.target is None else f"training-{corpus.name}"
    given = [Path(each).name if each == str(args.data) else each for each in sys.argv[1:]]
    command = shlex.join(["python", "-m", "bench.training", *given])
    told = "the shipped model" if args.target is None else "a small model of photos and human captions"
    text = f"# Draft heads on {told}, by what they read of a picture\n\n"
    text += "".join(f"- {name}: {value}\n" for name, value in about.items())
    text += f"\nMeans with least and most over seeds; repeat with `{command}`.\n\n{table(rows)}\n"
    text += f"\nGreedy tau on other prompts, after every epoch, mean over seeds:\n\n{by_epoch(runs)}\n"
    (args.out / f"{name}.md").write_text(text + f"\n![tau by epoch and at the end]({name}.png)\n")
    plots(runs, rows, args.out / f"{name}.png")
    lines = [{"kind": "training", **run} for run in runs] + [{"kind": "row", **row} for row in rows]
    (args.out / f"{name}.jsonl").write_text("".join(json.dumps(about | line) + "\n" for line in lines))
    print(json.dumps(about | {"rows": rows}))


if __name__ == "__main__":
    main()
