"""What `train_step.py` measured, as ratios: Markdown tables, JSON and a picture."""

import argparse
import itertools
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

METHODS = {
    "full": "TRL, full parameters",
    "masked-full": 'layerrl, selection="full"',
    "by-hand": "TRL, requires_grad by hand",
    "lora": "PEFT LoRA r16 on the layer",
    "lora-all": "PEFT LoRA r16 on all layers",
    "modules-to-save": "PEFT modules_to_save",
    "masked": "layerrl",
    "masked-lora": "layerrl, LoRA r16 on the layer",
    "masked-4bit": "layerrl, frozen layers in 4 bits",
}
BENCH = [method for method in METHODS if method != "masked-4bit"]  # slow on a CPU
MODEL = "SmolLM2-135M-Instruct"
GAP = ("<!-- train_step: written by make bench -->", "<!-- train_step: end -->")


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """The table as JSON and as a picture."""
    (folder / "train_step.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    plot(rows, folder / "train_step.png")


def fill(page: Path, text: str) -> None:
    """Put the text and the picture into the gap that the page keeps for them."""
    before, _, rest = page.read_text(encoding="utf-8").partition(GAP[0])
    after = rest.partition(GAP[1])[2]
    picture = "![Time of a training pass and peak memory by method and setting](train_step.png)"
    page.write_text("\n\n".join([before + GAP[0], text, picture, GAP[1]]) + after, encoding="utf-8")


def tabulate(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method in each setting, over its rounds."""
    table = []
    depths = sorted({entry["depth"] for entry in entries} - {None}) or [None]
    pairs = sorted({(entry["beta"], entry["num_iterations"]) for entry in entries})
    for (beta, num_iterations), depth in itertools.product(pairs, depths):
        rounds: dict[int, dict[str, Any]] = {}
        for entry in entries:
            same = (entry["beta"], entry["num_iterations"]) == (beta, num_iterations)
            if same and entry["depth"] in (None, depth):
                rounds.setdefault(entry["round"], {})[entry["method"]] = entry
        setting = {"depth": depth, "beta": beta, "num_iterations": num_iterations}
        for method in METHODS:
            having = [found for found in rounds.values() if method in found]
            if having:
                table.append(setting | summarize(method, having))
    return table


def summarize(method: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """What a method took and the ratios to others, each as median, lowest and highest round."""
    own = [found[method] for found in rounds]

    def ratio(key: str, to: str, expected: str | None = None) -> dict[str, float] | None:
        pairs = [(found[method], found[to]) for found in rounds if to in found]
        return spread(
            mine[key] / theirs[key] / (mine[expected] if expected else 1)
            for mine, theirs in pairs
            if mine[key] is not None
        )

    last = own[-1]
    return {
        "method": method,
        "rounds": len(own),
        "seconds": spread(entry["seconds"] for entry in own),
        "seconds_to_layerrl": ratio("seconds", "masked"),
        "seconds_to_full": ratio("seconds", "full"),
        "seconds_to_lora": ratio("seconds", "lora"),
        "seconds_to_lora_all": ratio("seconds", "lora-all"),
        "model_step": last["model_step"],
        "seconds_to_model": ratio("seconds", "full", "model_step"),
        "step_seconds": spread(e["step_seconds"] for e in own if e["step_seconds"] is not None),
        "step_seconds_to_full": ratio("step_seconds", "full"),
        "peak_bytes": spread(entry["peak_bytes"] for entry in own),
        "peak_to_full": ratio("peak_bytes", "full"),
        "peak_to_layerrl": ratio("peak_bytes", "masked"),
        "peak_to_lora": ratio("peak_bytes", "lora"),
        "peak_to_lora_all": ratio("peak_bytes", "lora-all"),
        "held_bytes": spread(entry["held_bytes"] for entry in own),
        "loading_peak_bytes": spread(entry["loading_peak_bytes"] for entry in own),
        "checkpoint_bytes": last["checkpoint_bytes"],
        "synced_bytes": last["synced_bytes"],
        "trained_bytes": last["trained_bytes"],
    }


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Median, lowest and highest; None of nothing."""
    found = list(values)
    if not found:
        return None
    return {"median": statistics.median(found), "lowest": min(found), "highest": max(found)}


def describe(options: argparse.Namespace, entries: list[dict[str, Any]]) -> str:
    """The command, what it ran on and how long it took."""
    given = [] if options.methods == BENCH else [f"--methods {' '.join(options.methods)}"]
    if options.model != MODEL:
        given.append(f"--model {options.model}")
    for name in ("depth", "beta", "num_iterations", "rounds", "cycles", "rows", "length"):
        value = getattr(options, name)
        shown = " ".join(f"{v:g}" for v in (value if isinstance(value, list) else [value]))
        given.append(f"--{name.replace('_', '-')} {shown}")
    given += ["--generate"] * options.generate + [f"--device {options.device}"]
    hardware = ", ".join(sorted({entry["hardware"] for entry in entries}))
    minutes = sum(entry["process_seconds"] for entry in entries) / 60
    return (
        f'```console\n$ make bench ARGS="{" ".join(given)}"\n```\n\n'
        f"{Path(options.model).name} on {hardware}: {len(entries)} processes, {minutes:.0f} "
        f"minutes; {entries[0]['versions']}. Median [lowest, highest] of {options.rounds} rounds."
    )


def tables(rows: list[dict[str, Any]]) -> str:
    """Two Markdown tables a setting: time, and memory and bytes."""
    times = {
        "seconds": "training pass, s",
        "seconds_to_layerrl": "to layerrl",
        "seconds_to_full": "to full",
        "seconds_to_lora": "to LoRA",
        "seconds_to_lora_all": "to LoRA on all",
        "seconds_to_model": "to the cost model",
        "step_seconds": "with generation, s",
        "step_seconds_to_full": "to full",
    }
    sizes = {
        "held_bytes": "held, GB",
        "peak_bytes": "peak, GB",
        "peak_to_full": "to full",
        "peak_to_lora": "to LoRA",
        "peak_to_lora_all": "to LoRA on all",
        "checkpoint_bytes": "checkpoint, GB",
        "synced_bytes": "synced, GB",
    }
    blocks = []
    for title, group in by_setting(rows).items():
        blocks.append(f"**{title}**")
        for columns in (times, sizes):
            shown = {key: head for key, head in columns.items() if any(row[key] for row in group)}
            lines = [["method", *shown.values()], ["---"] * (1 + len(shown))]
            lines += [[METHODS[r["method"]], *(cell(r, key) for key in shown)] for r in group]
            blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(blocks)


def by_setting(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The table's rows under the name of their setting."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        depth = "" if row["depth"] is None else f"depth {row['depth']:g}, "
        title = f"{depth}beta {row['beta']:g}, num_iterations {row['num_iterations']}"
        title = f"{row['of']}, {title}" if "of" in row else title
        groups.setdefault(title, []).append(row)
    return groups


def cell(row: dict[str, Any], key: str) -> str:
    """A value for reading: bytes in GB, a spread with its range."""
    value, unit = row[key], 1e9 if key.endswith("bytes") else 1
    if value is None:
        return "-"
    if not isinstance(value, dict):
        return f"{value / unit:.3f}"
    median, lowest, highest = (f"{v / unit:.2f}" for v in value.values())
    return median if lowest == highest else f"{median} [{lowest}, {highest}]"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and peak memory by method, relative to full parameters, a panel a setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    to = "full" if all(row["seconds_to_full"] for row in rows) else "layerrl"
    rows = [row for row in rows if row[f"seconds_to_{to}"]]
    groups = by_setting(rows)
    if not groups:
        return
    depths = len({row["depth"] for row in rows})
    across = depths if depths > 1 else min(2, len(groups))
    down = -(-len(groups) // across)
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    figure, panels = plt.subplots(
        down, across, figsize=(8, 0.8 + down * (0.7 + 0.42 * len(methods))), layout="constrained",
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    for axes in panels.flat[len(groups) :]:
        axes.remove()
    for axes, (title, group) in zip(panels.flat, groups.items(), strict=False):
        height = {row["method"]: methods.index(row["method"]) for row in group}
        for name, color, shift, label in (
            ("seconds", "tab:blue", -0.2, "training pass"),
            ("peak", "tab:orange", 0.2, "peak memory"),
        ):
            ratios = [row[f"{name}_to_{to}"] for row in group]
            middle = [r["median"] for r in ratios]
            error = [
                [r["median"] - r["lowest"] for r in ratios],
                [r["highest"] - r["median"] for r in ratios],
            ]
            places = [y + shift for y in height.values()]
            bars = axes.barh(places, middle, 0.38, xerr=error, color=color, label=label)
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        if to == "full":
            expected = [row["model_step"] for row in group]
            places = [y - 0.2 for y in height.values()]
            axes.plot(expected, places, "|k", markersize=12, label="cost model")
        axes.set_title(title.replace(", num", ",\nnum"), fontsize=9)
        axes.axvline(1, color="grey", linewidth=0.8, zorder=0)
        axes.margins(x=0.18)
        axes.tick_params(labelsize=9)
    panels[0, 0].set_yticks(range(len(methods)), [METHODS[m] for m in methods])
    panels[0, 0].invert_yaxis()
    reference = "full parameters" if to == "full" else "layerrl"
    figure.supxlabel(f"relative to {reference}", fontsize=9)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    figure.savefig(path, dpi=200)
    plt.close(figure)
