"""The page of what `gpu.py` measured, with two pictures."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from step_report import METHODS, by_setting, plot, spread, tables, tabulate

from layerrl.files import written_whole

Entries = list[dict[str, Any]]
HEAD = """# On a GPU

Written by `benchmarks/gpu.py`. Models have the shapes that their names say, with random bfloat16
weights and made-up prompts: speed and memory do not depend on the values of weights.

```console
$ make gpu
```

The command runs the tests that need a GPU, for at most 400 seconds. Then it measures stage by
stage, for at most 1300 seconds (`ARGS="--budget 600"`: 600). It needs a Python with torch for the
GPU (`PYTHON=path`). Other packages come from the network, or from a folder. Make the folder on a
machine with a network, for the GPU machine's version of Python, without the packages that it has:

```console
$ make bundle PYTHON=3.12 WITHOUT="torch transformers accelerate" EXTRA=gpu
```

| file in `runs/gpu` | content |
|---|---|
| `tests.txt` | the output of the tests |
| `gpu.md` and pictures | this page; pictures need matplotlib |
| `journal.jsonl` | every measurement |
| `worker.log` | what libraries printed |

The same command continues where the time was up, unless the machine, a library or layerrl has
changed.
`python benchmarks/gpu.py --report --page docs/gpu.md` writes the page from the journal.

Bit-for-bit tests use `torch.use_deterministic_algorithms(True)`. Without it, two runs of plain TRL
on a GPU may differ.
"""
NOT_YET = "Not measured."
KINDS = {"selection": "layerrl, the middle layer", "LoRA r16": "LoRA, merged", "full": "full"}
SERVED = {
    "masked": "merged weights, as layerrl leaves them",
    "lora-all": "LoRA adapter apart, all layers",
    "lora": "LoRA adapter apart, the middle layer",
}


def write_page(journal: Path, page: Path) -> None:
    """Write the page of a journal, of none as well, and the pictures beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    text = journal.read_text(encoding="utf-8") if journal.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # a kill may have cut off the last line
    head, *entries = [json.loads(line) for line in whole.splitlines()] or [{}]
    # Of what was tried again, the last.
    latest = {json.dumps([entry["stage"], entry["case"]]): entry for entry in entries}
    entries = [{**e, **(e["case"] or {}), **e["found"]} for e in latest.values()]
    parts = [HEAD, described(head.get("settings"), entries)]
    for title, about, section in SECTIONS:
        parts += [f"## {title}", about]
        try:
            parts += [block for block in section(entries) if block] or [NOT_YET]
        except Exception as error:  # one part less
            parts.append(f"This part could not be written: {error!r}.")
    for name, draw, after in PICTURES:
        file = page.with_name(f"{page.stem}_{name}.png")
        try:
            drawn = draw(entries, file)
        except Exception as error:  # the page is worth more than its pictures
            parts.append(f"No picture of {after.lower()}: {error!r}.")
            continue
        if drawn:
            at = next(i for i, part in enumerate(parts) if part == f"## {after}") + 2
            parts.insert(at, f"![{after}]({file.name})")
    with written_whole(page) as file:
        file.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")


def described(settings: dict[str, Any] | None, entries: Entries) -> str:
    """What was measured, on what, and how long it took."""
    if settings is None:
        return "**This has not been run yet.** The sections below are what the page will hold."
    machine, minutes = settings["machine"], sum(entry.get("seconds", 0) for entry in entries) / 60
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    text = (
        f"{machine['name']}, {machine['bytes'] / 1e9:.0f} GB; {len(entries)} measurements in "
        f"{minutes:.0f} minutes; {versions}."
    )
    if settings["tiny"]:
        text += "\n\n**With `--tiny`**: the figures say nothing but that every stage runs."
    ended = [f"The stage `{e['stage']}` {why_not(e)}." for e in entries if not e["case"]]
    return "\n\n".join([text, *ended])


def steps(entries: Entries) -> Iterator[str]:
    """Tables of training steps by model, then what did not run."""
    rows = step_rows(entries)
    if rows:
        for e in {e["shape"]: e for e in entries if e["stage"] == "step"}.values():
            yield f"{e['shape']}: {e['rows']} completions of {e['prompt']} + {e['length']} tokens."
        yield tables(rows)
        if not any(e.get("method") == "masked-4bit" for e in entries):
            yield "Frozen layers in 4 bits: not measured, which needs bitsandbytes."
    failed = [
        f"- {METHODS[e['method']]}, {setting_of(e)}: {why_not(e)}"
        for e in entries
        if e["stage"] in ("step", "grid") and e["case"] and not fits(e)
    ]
    if failed:
        yield "Without figures:"
        yield "\n".join(failed)


def step_rows(entries: Entries) -> list[dict[str, Any]]:
    """Rows as `step_report` has them; a cycle is a round."""
    models: dict[str, Entries] = {}
    for entry in entries:
        if entry["stage"] in ("step", "grid"):
            for number, seconds in enumerate(entry.get("cycle_seconds", ())):
                one = {**entry, "round": number, "seconds": seconds}
                models.setdefault(model_of(entry), []).append(one)
    return [{**row, "of": of} for of, group in models.items() for row in tabulate(group)]


def model_of(entry: dict[str, Any]) -> str:
    """The model, and where activations are kept."""
    return entry["shape"] + ("" if entry["checkpointing"] else " without checkpointing")


def setting_of(entry: dict[str, Any]) -> str:
    """The setting as tables are headed."""
    [title] = by_setting([{**entry, "of": model_of(entry)}])
    return title


def why_not(entry: dict[str, Any]) -> str:
    """Why there are no figures."""
    if "failed" in entry:
        return f"failed: `{entry['failed']}`"
    if entry.get("refused"):
        return f"refused: {entry['refused']}"
    size = f"{entry['planned_bytes'] / 1e9:.1f} GB by `plan()`, without activations"
    if "skipped" in entry:
        return f"skipped, the device is too small: {size}"
    return f"does not fit: out of memory with {size}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Markdown; nothing of no rows."""
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_stage(entries: Entries, stage: str, *kinds: str) -> Entries:
    """A stage's entries of some kinds."""
    return [e for e in entries if e["stage"] == stage and e.get("kind") in kinds]


def reasons(entries: Entries) -> str:
    """Measurements of stages that failed."""
    failed = [e for e in entries if e["case"] and ("failed" in e or e.get("refused"))]
    names = ("kind", "probe", "method", "shape")
    told = [" ".join(str(e[name]) for name in names if name in e) or e["stage"] for e in failed]
    return "\n".join(f"- {t}: {why_not(e)}" for t, e in zip(told, failed, strict=True))


def whole_steps(entries: Entries) -> Iterator[str]:
    """Seconds of a step by part."""
    rows, ends = [], of_stage(entries, "whole", "step")
    full = {e["continuous"]: e["step_seconds"] for e in ends if e["method"] == "full" and fits(e)}
    for e in ends:
        name = METHODS[e["method"]] + (", continuous batching" if e["continuous"] else "")
        if not fits(e):
            rows.append([name, *["-"] * 5, why_not(e)])
            continue
        whole, generation = e["step_seconds"], e["generation_seconds"]
        parts = (generation, e["rollout_seconds"] - generation, whole - e["rollout_seconds"])
        shares = [f"{part:.2f} ({part / whole:.0%})" for part in parts]
        ratio = f"{whole / full[e['continuous']]:.2f}" if e["continuous"] in full else "-"
        rows.append([name, f"{whole:.2f}", *shares, ratio, f"{e['step_peak_bytes'] / 1e9:.1f}"])
    heads = ["method", "step, s", "generation", "scoring", "training", "to full", "peak, GB"]
    if ends:
        tokens = ends[0]["rows"] * ends[0]["accumulate"], ends[0]["prompt"], ends[0]["length"]
        yield "{} completions of {} + {} tokens a step, {shape}.".format(*tokens, **ends[0])
    yield table(heads, rows)


def fits(entry: dict[str, Any]) -> bool:
    """Whether it has figures of memory."""
    return "peak_bytes" in entry


def largest(entries: Entries) -> Iterator[str]:
    """The largest batch of each method, and the largest model."""
    found = of_stage(entries, "largest", "step")
    groups: dict[tuple[str, str], Entries] = {}
    for e in found:
        if "layers" not in e:
            groups.setdefault((e["shape"], e["method"]), []).append(e)
    rows = []
    for (shape, method), group in groups.items():
        fitting = [e for e in group if fits(e)]
        best = max(fitting, key=lambda e: e["rows"], default=None)
        most = str(best["rows"]) if best else f"none: {why_not(group[0])}"
        peak = f"{best['peak_bytes'] / 1e9:.1f}" if best else "-"
        rows.append([shape, METHODS[method], most, peak, above(group, best, "rows")])
    yield table(["model", "method", "largest micro-batch", "peak, GB", "too much"], rows)
    models = [e for e in found if "layers" in e]
    best = max((e for e in models if fits(e)), key=lambda e: e["layers"], default=None)
    if best:
        yield (
            f"Largest model whose middle layer trains, of Qwen3-32B's width: **{best['layers']} "
            f"layers**, {best['planned_bytes'] / 1e9:.1f} GB by `plan()`, peak "
            f"{best['peak_bytes'] / 1e9:.1f} GB. Too much: {above(models, best, 'layers')}."
        )
    yield reasons(entries_of("largest", entries))


def entries_of(stage: str, entries: Entries) -> Entries:
    """All of a stage."""
    return [e for e in entries if e["stage"] == stage]


def above(group: Entries, best: dict[str, Any] | None, key: str) -> str:
    """The smallest that was tried and did not fit."""
    tried = [e[key] for e in group if not fits(e) and (best is None or e[key] > best[key])]
    return str(min(tried)) if tried else "not reached"


def serving(entries: Entries) -> Iterator[str]:
    """Tokens per second, then bytes."""
    rows = []
    for e in of_stage(entries, "serving", "generate", "generate_vllm"):
        engine = "transformers" if e["kind"] == "generate" else "vLLM"
        rate = ranged(e["tokens_per_second"], ".0f") if "tokens_per_second" in e else why_not(e)
        rows.append([engine, e["shape"], SERVED[e["method"]], rate])
    yield table(["engine", "model", "served", "tokens per second"], rows)
    synced = of_stage(entries, "serving", "sync")
    sizes = [e for e in synced if "synced_bytes" in e]
    rows = [[e["shape"], *(f"{e['synced_bytes'][k] / 1e9:.3f}" for k in KINDS)] for e in sizes]
    yield table(["synced per step, GB", *KINDS.values()], rows)
    yield reasons(synced)


def ranged(values: list[float], spec: str) -> str:
    """Median and range."""
    median, low, high = (f"{value:{spec}}" for value in spread(values).values())
    return median if low == high else f"{median} [{low}, {high}]"


def evidence(entries: Entries) -> Iterator[str]:
    """The suite, then every probe, against the sweep that has most seeds."""
    exact = swept(entries)
    if exact:
        yield (
            f"Base: {exact['known']:.0%} right, sampled; evaluation score {exact['base']:.3f}, "
            f"after full training {exact['full']:.3f}. Seeds: {len(exact['seeds'])}; noise ceiling "
            f"of the sweep: {exact['noise_ceiling']:.2f}."
        )
    rows = []
    for e in probes_of(entries, exact):
        figures = (e["spearman"], e["beyond_depth"], e["regret"], e["probe_seconds"])
        share = "-" if e["fraction"] is None else f"{e['fraction']:.1%}"
        rows.append([e["probe"], *(f"{value:.2f}" for value in figures), share])
    heads = ["probe", "Spearman", "beyond depth", "regret", "seconds", "of a full run"]
    yield table(heads, rows)
    yield reasons(entries_of("evidence", entries))


def swept(entries: Entries) -> dict[str, Any] | None:
    """The last sweep that was finished."""
    truths = [e for e in of_stage(entries, "evidence", "truth") if "failed" not in e]
    return truths[-1] if truths else None


def probes_of(entries: Entries, exact: dict[str, Any] | None) -> Entries:
    """Probes that were held against it."""
    probes = [e for e in of_stage(entries, "evidence", "probe") if "spearman" in e]
    return [e for e in probes if exact and e["seeds"] == exact["seeds"]]


def probe_cost(entries: Entries) -> Iterator[str]:
    """Seconds and peak beside those of a whole step."""
    for e in of_stage(entries, "probe", "probe_cost"):
        if not fits(e):
            yield f"- {why_not(e)}"
            continue
        rows = [[f'`"gradient"` on {e["budget"]} prompts', *cost(e, "probe_seconds", "peak_bytes")]]
        rows += [
            [f"a whole step, {METHODS[w['method']]}", *cost(w, "step_seconds", "step_peak_bytes")]
            for w in of_stage(entries, "whole", "step")
            if fits(w) and not w["continuous"]
        ]
        yield table(["", "seconds", "peak, GB"], rows)
        yield reasons([e])


def cost(entry: dict[str, Any], seconds: str, peak: str) -> list[str]:
    """Two cells."""
    return [f"{entry[seconds]:.1f}", f"{entry[peak] / 1e9:.1f}"]


def picture_of_steps(entries: Entries, file: Path) -> bool:
    """TRL's default setting, a panel for each model and depth."""
    rows = [
        row
        for row in step_rows(entries)
        if (row["beta"], row["num_iterations"]) == (0, 1) and "without" not in row["of"]
    ]
    if rows:
        plot(rows, file)
    return bool(rows) and file.exists()


def picture_of_evidence(entries: Entries, file: Path) -> bool:
    """What layers contribute, and what the probes make of it."""
    exact = swept(entries)
    if exact is None:
        return False
    from matplotlib.figure import Figure

    scores = {"exact sweep": exact["scores"]}
    scores |= {
        e["probe"]: e["scores"]
        for e in probes_of(entries, exact)
        if e["probe"] in ("gradient", "published", "position")
    }
    figure = Figure(figsize=(7, 1.6 * len(scores) + 0.6), layout="constrained")
    panels = figure.subplots(len(scores), sharex=True, squeeze=False)[:, 0]
    for axes, (name, values) in zip(panels, scores.items(), strict=True):
        axes.plot(values, "o-", color="tab:blue" if name == "exact sweep" else "tab:orange")
        axes.set_title(name, fontsize=9)
    panels[-1].set_xlabel("layer")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(file, dpi=150)
    return True


SECTIONS: list[tuple[str, str, Callable[[Entries], Iterator[str]]]] = [
    (
        "Training step",
        "All methods train on the same completions. The time is that of the reference and old "
        "log-probability passes, the policy passes and the optimizer steps. Median [range] of "
        "repeats in one process; ratios are within one run. *To the cost model* is the time "
        "relative to full training, divided by the `step` of `plan()`.",
        steps,
    ),
    (
        "Whole step",
        "The share of each part, with generation by transformers, with and without continuous "
        "batching. With a faster engine, training has a larger share.",
        whole_steps,
    ),
    (
        "Largest batch and model",
        "What fits in memory, tried with one step each: micro-batches with `beta` 0, prompts and "
        "completions as above, the middle layer.",
        largest,
    ),
    (
        "Serving",
        "The time that an adapter which is not merged adds to each token, and the bytes that an "
        "engine is sent after a step, by `plan()`.",
        serving,
    ),
    (
        "Evidence",
        "A model of 24 layers and 48 million parameters is pre-trained until it half-knows a "
        "mixture of two tasks. Every layer is then trained alone with two seeds, and every probe "
        "is compared with that. *Regret*: the contribution of the best layer minus that of the "
        "probe's choice.",
        evidence,
    ),
    (
        "Cost of a probe",
        'Seconds and peak memory of `contribution_probe(method="gradient")` on Qwen3-1.7B, and of '
        "a training step on as many completions.",
        probe_cost,
    ),
]
PICTURES = [
    ("step", picture_of_steps, "Training step"),
    ("evidence", picture_of_evidence, "Evidence"),
]
