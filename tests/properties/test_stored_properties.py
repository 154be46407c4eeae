"""Files that somebody damaged or made up are refused in a sentence, or mean what they meant.

Each example is one file that the library wrote, with any value in it replaced, removed, doubled or
nested, or any of its bytes changed. `LAYERRL_FILES=10000` tries as many instead of 500, in all.
"""

import copy
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerrl import LayerSelection, load_delta, merge_delta, save_delta, select_layers
from layerrl.delta import DeltaBase
from layerrl.digests import json_digest
from layerrl.errors import LayerRLError
from layerrl.frozen import fingerprints
from layerrl.journal import Journal
from layerrl.report import ContributionReport, Cost, Score
from layerrl.sweep import Entry, Sweep
from layerrl.trainer.checkpoints import is_complete
from layerrl.trainer.resuming import CheckpointReader, _reference_in
from tests.grpo import make
from tests.models import tiny

FILES = int(os.environ.get("LAYERRL_FILES", "500"))
OLD = Path(__file__).parents[1] / "unit/data/delta-v1"
# Marks that a text gets in place of what no value is.
RAW = {
    "@deep": "[" * 3000 + "]" * 3000, "@objects": '{"a":' * 99 + "1" + "}" * 99,
    "@digits": "9" * 5000, "@infinite": "1e999", "@nan": "NaN", "@negative": "-Infinity",
    "@half": '"\\ud800"', "@nul": '"a\\u0000b"', "@lone": "-0.0", "@cut": '"',
}  # fmt: skip
ODD = [
    *(None, True, False, 0, 1, -1, 2, 7, 1.0, 0.5, -2.5, 1e308, 5e-324, 2**31, 2**63, 2**70),
    *("", "a", "load", "float32", "float", "int4", "full", "vision", "0" * 16, "f" * 64, "../x"),
    *("new_tokens:0-99999999999", "new_tokens:5-5,5", "*", [], {}, [1], [None], {"a": 1}, [[1]]),
    *([0, 1, 2], ["mlp"], 10**12, "9" * 5000, [0.5, "a"], [[0.5, 0.5]], {"seeds": 3}, *RAW),
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value, and a key in it."""
    found, waiting = [], [value]
    while waiting:
        part = waiting.pop()
        keys = (
            part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
        )
        found += [(part, key) for key in keys]
        waiting += [part[key] for key in keys]
    return found


def changed(data: Any, draw: Callable[..., Any], reseal: Callable[[Any], Any] | None) -> str:
    """JSON of a value with one to three changes."""
    data = json.loads(json.dumps(data))
    for _ in range(draw(st.integers(1, 3))):
        spots = places(data)
        if not spots:
            break
        # Few places are high up, where a change is coarse, and many deep down.
        upper = spots[: draw(st.sampled_from([12, len(spots)]))]
        part, key = draw(st.sampled_from(upper))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "double", "swap", "nest"]))
        odd = copy.deepcopy(draw(st.sampled_from(ODD)))  # it may be changed in its turn
        if kind == "replace":
            part[key] = odd
        elif kind == "remove":
            del part[key]
        elif kind == "double" and isinstance(part, list):
            part.insert(key, part[key])
        elif kind == "double":
            part[draw(st.sampled_from(["x", key + ".x", "a\0b", "\ud800", ""]))] = part[key]
        elif kind == "swap":
            other, there = draw(st.sampled_from(spots))
            if isinstance(other, list) and there >= len(other):
                continue
            part[key] = json.loads(
                json.dumps(other.get(there) if isinstance(other, dict) else other[there])
            )
        else:
            part[key] = {"a": part[key]} if draw(st.booleans()) else [part[key]]
    if reseal is not None and draw(st.booleans()):
        reseal(data)
    text = json.dumps(data)
    for mark, raw in RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text


def damaged(content: bytes, draw: Callable[..., Any]) -> bytes:
    """Bytes with some of them changed, or others around them."""
    kind = draw(
        st.sampled_from(["flip", "flip", "cut", "insert", "bom", "utf16", "empty", "twice"])
    )
    place = draw(st.integers(0, len(content)))
    if kind == "flip":
        made = bytearray(content)
        for _ in range(draw(st.integers(1, 3))):
            made[draw(st.integers(0, len(made) - 1))] ^= draw(st.integers(1, 255))
        return bytes(made)
    if kind == "insert":
        return content[:place] + draw(st.binary(min_size=1, max_size=9)) + content[place:]
    return {
        "cut": content[:place], "bom": b"\xef\xbb\xbf" + content, "empty": b"",
        "utf16": content.decode("latin-1").encode("utf-16"), "twice": content * 2,
    }[kind]  # fmt: skip


def seal(meta: Any) -> None:
    """Give a changed description the digests of what it says now, as far as it says it."""
    if not isinstance(meta, dict):
        return
    try:
        tensors, base = meta["tensors"], meta["base"]
        marks = {n: v["base_fingerprint"] for n, v in tensors.items()}
        marks |= {n: v["fingerprint"] for n, v in base["frozen"].items()}
        base["digest"] = json_digest(marks)
        meta["result"] = json_digest(marks | {n: v["fingerprint"] for n, v in tensors.items()})
    except (KeyError, TypeError, AttributeError):
        pass
    meta.pop("sha256", None)
    # A mark is another value where it is read.
    text = json.dumps(meta)
    for mark, raw in RAW.items():
        text = text.replace(json.dumps(mark), raw)
    try:
        meta["sha256"] = json_digest(json.loads(text))
    except (ValueError, RecursionError):
        meta["sha256"] = "0" * 64


def header_of(content: bytes) -> tuple[Any, bytes]:
    """The JSON at the head of a safetensors file, and the values."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


@dataclass(frozen=True)
class Kind:
    """A kind of file: what the library wrote, and what it does with another."""

    content: bytes
    use: Callable[[bytes], None]
    lines: bool = False
    tensors: bool = False
    reseal: Callable[[Any], Any] | None = None

    def mutated(self, draw: Callable[..., Any]) -> bytes:
        if draw(st.integers(0, 3)) == 0:
            return damaged(self.content, draw)
        if self.tensors:
            header, values = header_of(self.content)
            text = changed(header, draw, None).encode(errors="surrogatepass")
            return len(text).to_bytes(8, "little") + text + values
        if self.lines:
            lines = self.content.splitlines(keepends=True)
            place = draw(st.integers(0, len(lines) - 1))
            lines[place] = changed(json.loads(lines[place]), draw, None).encode() + b"\n"
            return b"".join(lines)
        text = changed(json.loads(self.content), draw, self.reseal)
        if draw(st.integers(0, 9)) == 0:  # a second value of one name
            text = text.replace("{", '{"format_version": 1, ', 1)
        return text.encode(errors="surrogatepass")


def delta_kind(folder: Path, name: str, model: Any, original: dict[str, Any]) -> Kind:
    """One of the files of a delta, to be loaded into its base."""
    content, marks = (folder / name).read_bytes(), fingerprints(model.state_dict())
    load_delta(model, folder)
    expected = fingerprints(model.state_dict())
    model.load_state_dict(original)

    def use(changed: bytes) -> None:
        (folder / name).write_bytes(changed)
        try:
            selection = load_delta(model, folder)
        except LayerRLError:
            assert fingerprints(model.state_dict()) == marks  # nothing of it is in the model
            raise
        finally:
            (folder / name).write_bytes(content)
            after = fingerprints(model.state_dict())
            model.load_state_dict(original)
        assert after == expected
        assert {*selection.parameters(model)} == {n for n in after if after[n] != marks[n]}

    return Kind(content, use, tensors=name.endswith(".safetensors"), reseal=seal)


@cache
def kinds() -> dict[str, Kind]:
    folder = Path(TEMPORARY.name)
    model = tiny("llama")
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    selection = select_layers(model, 1, modules="mlp")
    base = DeltaBase.of(model, selection)
    with torch.no_grad():
        for parameter in selection.parameters(model).values():
            parameter.add_(1)
    save_delta(model, folder / "delta", selection=selection, base=base)
    model.load_state_dict(original)
    model.save_pretrained(folder / "base")
    found = {
        name: delta_kind(folder / "delta", name, model, original)
        for name in ("delta.json", "delta.safetensors")
    }
    return found | texts(folder) | of_a_checkpoint(folder) | of_a_base(folder)


def texts(folder: Path) -> dict[str, Kind]:
    rows = lambda value: tuple(tuple(value + p / 9 for p in range(3)) for _ in range(2))  # noqa: E731
    report = ContributionReport(
        method="train",
        layers=tuple(Score(scores=rows(k), curve=((2, rows(k)),), steps=3) for k in range(3)),
        base=Score(scores=rows(0)[:1]),
        full=Score(scores=rows(2), seconds=2.0),
        settings={"seeds": [0, 1], "layers": [0, 1, 2], "modules": ["mlp"], "args": {"a": 1.0}},
        cost=Cost(seconds=3.0),
    )

    def use_report(content: bytes) -> None:
        read = ContributionReport.from_json(content)
        assert ContributionReport.from_json(read.to_json()) == read or "NaN" in read.to_json()
        assert str(read)
        assert read._repr_html_()
        with warnings.catch_warnings(action="ignore"):
            read.top(1)
        read.compare(report)

    chosen = select_layers(
        tiny("llama").config, [0, 2], also="new_tokens:3-5", boost={0: 2.0, "mlp": 0.5}
    )

    def use_selection(content: bytes) -> None:
        read = LayerSelection.from_json(content)
        assert LayerSelection.from_json(read.to_json()) == read
        assert str(read)
        read.parameters(tiny("llama"))

    entry = {"steps": 4, "seconds": 1.5, "harness_seconds": 0.1, "curve": [[2, [0.1, 0.2]]]}
    sweep = Sweep(
        None, num_layers=3, layers=(0, 1), seeds=(0,), settings={"steps": 4},
        args=make(tiny("llama"), folder / "none", max_steps=8).args, halving=True, folder=folder,
    )  # fmt: skip
    file = folder / "journal.jsonl"
    with Journal(folder, {"steps": 4}, Entry) as journal:
        for name in ("base", "full", "0", "1"):
            seed = None if name == "base" else 0
            journal.append({**entry, "name": name, "seed": seed, "stop": None, "scores": [1, 0.5]})

    def use_journal(content: bytes) -> None:
        file.write_bytes(content)
        with Journal(folder, {"steps": 4}, Entry) as journal:
            sweep._check_prompts(journal)
            sweep._check_runs(journal)
            sweep._standing(_records(journal))
            sweep._progress(journal.entries)
            made = sweep.report(journal.entries)
        assert ContributionReport.from_json(made.to_json()) == made

    return {
        "report": Kind(report.to_json().encode(), use_report),
        "selection": Kind(chosen.to_json().encode(), use_selection),
        "journal": Kind(file.read_bytes(), use_journal, lines=True),
    }


def _records(journal: Journal) -> Any:
    from layerrl.sweep import _Records

    return _Records(journal.entries)


def of_a_checkpoint(folder: Path) -> dict[str, Kind]:
    trainer = make(
        tiny("llama", 4), folder / "run", selection=1, beta=0.04,
        max_steps=1, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    [checkpoint] = (folder / "run").glob("checkpoint-*")
    reference = trainer.masked_run.reference

    def placed(name: str, read: Callable[[], Any], **kind: Any) -> Kind:
        content = (checkpoint / name).read_bytes()

        def use(changed: bytes) -> None:
            (checkpoint / name).write_bytes(changed)
            try:
                read()
            finally:
                (checkpoint / name).write_bytes(content)

        return Kind(content, use, **kind)

    def read_reference() -> None:
        with warnings.catch_warnings(action="ignore"):  # without fingerprints
            read = _reference_in(checkpoint, reference, 0.04)
        assert {*read} == {*reference.tensors}

    def read_state() -> None:
        is_complete(checkpoint)
        CheckpointReader(trainer)._check_state(checkpoint, of_delta=True)

    return {
        "reference.safetensors": placed("reference.safetensors", read_reference, tensors=True),
        "trainer_state.json": placed("trainer_state.json", read_state),
    }


def of_a_base(folder: Path) -> dict[str, Kind]:
    def placed(name: str) -> Kind:
        content = (folder / "base" / name).read_bytes()

        def use(changed: bytes) -> None:
            (folder / "base" / name).write_bytes(changed)
            try:
                with TemporaryDirectory() as out:
                    merge_delta(folder / "base", folder / "delta", Path(out) / "merged")
            finally:
                (folder / "base" / name).write_bytes(content)

        return Kind(content, use, tensors=name.endswith(".safetensors"))

    return {name: placed(name) for name in ("config.json", "model.safetensors")}


TEMPORARY = TemporaryDirectory()
NAMES = [
    "delta.json", "delta.safetensors", "report", "selection", "journal",
    "reference.safetensors", "trainer_state.json",
    "config.json", "model.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_mutated_file_is_a_sentence_or_means_the_same(name):
    kind, counts = kinds()[name], [0, 0]

    @settings(max_examples=FILES // len(NAMES), suppress_health_check=list(HealthCheck))
    @given(st.data())
    def mutate(data: st.DataObject) -> None:
        content = kind.mutated(data.draw)
        counts[0] += 1
        try:
            kind.use(content)
        except LayerRLError:
            counts[1] += 1

    mutate()
    print(f"{name}: {counts[0]} files, {counts[1]} refused")
    # Most of a trainer's state is a log, in which any number will do.
    least = 10 if name == "trainer_state.json" else 5
    assert counts[0] / least < counts[1] < counts[0]
