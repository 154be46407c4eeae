"""The benchmark for a GPU: every stage runs, and nothing that goes wrong loses figures."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from layerrl.errors import JournalError
from layerrl.journal import Journal
from tests.runs import no_file_above

ROOT = Path(__file__).parents[2]
SECTIONS = [
    "Training step", "Whole step", "Largest batch and model", "Serving", "Evidence",
    "Cost of a probe",
]  # fmt: skip


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


@pytest.fixture
def worker(gpu: Any, tmp_path: Path) -> Iterator[Any]:
    started = gpu.Worker(tmp_path)
    yield started
    started.stop()


def command(output: Path, *more: str) -> list[str]:
    options = ["--device", "cpu", "--tiny", "--budget", "3000", "--output", str(output), *more]
    return [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *options]


def entries_of(output: Path) -> list[dict[str, Any]]:
    journal = output / "journal.jsonl"
    text = journal.read_text() if journal.exists() else ""
    return [json.loads(line) for line in text.splitlines()[1:] if line.endswith("}")]


def cuts(page: str) -> list[str]:
    """The text of each section."""
    places = [page.index(f"\n## {title}\n") for title in SECTIONS]
    assert places == sorted(places)
    return [page[a:b] for a, b in zip(places, [*places[1:], None], strict=True)]


@pytest.mark.slow
def test_every_stage_runs_and_a_killed_run_continues(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command(tmp_path), cwd=ROOT, env=environment)
    while len(entries_of(tmp_path)) < 3:
        assert first.poll() is None
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) != 0
    before = entries_of(tmp_path)
    training, *others = cuts((tmp_path / "gpu.md").read_text())
    assert "| layerrl |" in training
    assert all("Not measured." in text for text in others)

    page = tmp_path / "docs" / "page.md"
    for _ in range(2):  # the second has nothing left to do
        ended = subprocess.run(
            command(tmp_path, "--page", str(page)), cwd=ROOT, env=environment, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
    assert ended.stdout == ""
    after = entries_of(tmp_path)
    assert after[: len(before)] == before
    cases = [json.dumps(entry["case"]) for entry in after]
    assert len({*cases}) == len(cases)
    assert {entry["stage"] for entry in after} == {
        "step", "whole", "largest", "serving", "evidence", "probe", "grid"
    }  # fmt: skip
    assert not [entry for entry in after if "failed" in entry["found"]]
    text = page.read_text()
    assert "Not measured." not in text
    assert not [part for part in cuts(text) if "|" not in part]
    for name in ("step", "evidence"):
        assert f"](page_{name}.png)" in text
        assert (page.parent / f"page_{name}.png").stat().st_size > 0

    refused = subprocess.run(
        [part for part in command(tmp_path) if part != "--tiny"], cwd=ROOT, env=environment,
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode != 0
    assert "holds runs of other settings. tiny: True there, False here" in refused.stderr
    assert entries_of(tmp_path) == after


def test_what_goes_wrong_in_a_measurement_is_its_result(worker: Any, tmp_path: Path) -> None:
    found = worker.measure({"kind": "no such thing"}, 1000)
    assert found["failed"].startswith("KeyError: 'no such thing' (gpu_measure.py:")
    assert worker.process is None  # the next begins afresh
    assert "Traceback" in (tmp_path / "worker.log").read_text()
    assert worker.measure({"kind": "machine", "device": "cpu"}, 0.01) is None
    assert worker.process is None
    found = worker.measure({"kind": "machine", "device": "cpu"}, 1000)
    assert found["bytes"] > 0
    os.kill(worker.process.pid, signal.SIGKILL)
    found = worker.measure({"kind": "machine", "device": "cpu"}, 1000)
    assert found == {"failed": "the process ended, exit status -9"}


@pytest.mark.parametrize("too_much", [False, True])
def test_a_process_that_keeps_memory_is_replaced(gpu: Any, tmp_path: Path, too_much: bool) -> None:
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    worker, found = gpu.Worker(tmp_path), {"left_bytes": gpu.LEFT + too_much, "seconds": 1}
    worker.process = Namespace(pid=child.pid, join=lambda *_: child.poll())
    worker.pipe = Namespace(
        send=lambda _: None, poll=lambda _: True, recv=lambda: found, close=lambda: None
    )
    try:
        assert worker.measure({}, 1) == {"seconds": 1}
        assert (worker.process is None) == too_much
    finally:
        worker.stop()
    assert child.wait(10) == -signal.SIGKILL


class Stub:
    """In place of the process: what each case is to find."""

    def __init__(self, found: dict[str, Any] | None) -> None:
        self.found, self.cases = found, []

    def measure(self, case: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        self.cases.append(case)
        return self.found


def stage(gpu: Any, monkeypatch: pytest.MonkeyPatch, *cases: Any) -> Any:
    def made(options: Namespace) -> Iterator[dict[str, Any]]:
        for case in cases:
            if isinstance(case, Exception):
                raise case
            yield case

    monkeypatch.setitem(gpu.STAGES, "step", (made, 1))

    def run(found: dict[str, Any] | None, journal: Journal, seconds: float = 1000) -> Stub:
        stub = Stub(found)
        options = Namespace(device="cpu", tiny=True, old=len(journal.entries))
        gpu.run("step", options, stub, journal, time.monotonic() + seconds)
        return stub

    return run


def test_what_failed_is_tried_again_by_the_next_call(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = stage(gpu, monkeypatch, {"kind": "a"}, {"kind": "a"}, {"kind": "b"})
    with Journal(tmp_path, {}) as journal:
        assert [case["kind"] for case in run({"failed": "why"}, journal).cases] == ["a", "b"]
        assert [case["kind"] for case in run({"seconds": 1}, journal).cases] == ["a", "b"]
        assert run({"seconds": 2}, journal).cases == []
        assert [entry["found"] for entry in journal.entries[2:]] == [{"seconds": 1}] * 2


def test_a_stage_out_of_time_leaves_no_line(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = stage(gpu, monkeypatch, {"kind": "a"}, {"kind": "b"})
    with Journal(tmp_path, {}) as journal:
        assert run({"seconds": 1}, journal, seconds=-1).cases == []
        assert len(run(None, journal, seconds=10).cases) == 1  # cut off by the end of the stage
        assert journal.entries == []
    run = stage(gpu, monkeypatch, {"kind": "truth"})  # which may take all of the stage's time
    with Journal(tmp_path, {}) as journal:
        run(None, journal, seconds=2 * gpu.LONGEST)
        assert journal.entries == []
    run = stage(gpu, monkeypatch, {"kind": "a"})  # one that does not end has had its chance
    with Journal(tmp_path, {}) as journal:
        run(None, journal)
        assert journal.entries[0]["found"] == {"failed": f"took more than {gpu.LONGEST} s"}


def test_a_mistake_in_a_stage_ends_no_other(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = stage(gpu, monkeypatch, {"kind": "a"}, ZeroDivisionError("oh"))
    with Journal(tmp_path, {}) as journal:
        run({"seconds": 1}, journal)
        assert [entry["found"] for entry in journal.entries] == [
            {"seconds": 1},
            {"failed": "ZeroDivisionError('oh')"},
        ]


def test_a_mistake_in_a_stage_is_on_its_page(gpu: Any, tmp_path: Path) -> None:
    machine = {"name": "a GPU", "bytes": 1e9}
    settings = {"machine": machine, "tiny": False, "versions": {"torch": "1"}}
    with Journal(tmp_path, settings) as journal:
        for name in gpu.STAGES:
            found = {"failed": f"ZeroDivisionError('{name}')"}
            journal.append({"stage": name, "case": None, "found": found})
        failed = {"stage": "serving", "case": {"kind": "sync"}, "found": {"failed": "no tensor"}}
        journal.append(failed)
    importlib.import_module("gpu_report").write_page(journal.path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert all(f"ZeroDivisionError('{name}')" in text for name in gpu.STAGES)
    assert "failed: `no tensor`" in text
    assert "could not be written" not in text


@pytest.mark.parametrize("limit", [5, 37, 64, 200, 1000])
@pytest.mark.parametrize("guess", [6, 60, 900])
def test_the_largest_is_found_from_any_guess(gpu: Any, limit: int, guess: int) -> None:
    search = gpu.bisected(lambda number: {"rows": number}, 4, guess, 2, 512)
    tried, found = [4], None
    while True:
        try:
            number = search.send(found)["rows"]
        except StopIteration:
            break
        assert number % 2 == 0
        assert number not in tried
        tried.append(number)
        found = {"peak_bytes": 1} if number <= limit else {"out_of_memory": True}
    best = max(number for number in tried if number <= limit)
    assert min(512, limit) * 15 // 16 - 2 <= best <= 512
    assert len(tried) < 16


def test_the_largest_model_is_looked_for_before_the_batches_of_a_small_one(gpu: Any) -> None:
    search, shapes, found = gpu.largest(Namespace(tiny=False, room=85e9)), [], None
    with suppress(StopIteration):
        while True:
            case = search.send(found)
            shapes.append(case["shape"])
            found = {"planned_bytes": 1e9 * case.get("layers", 0)}  # and no peak: it does not fit
    assert list(dict.fromkeys(shapes)) == ["Qwen3-8B", "Qwen3-32B", "Qwen3-1.7B"]


def test_what_has_changed_since_is_named(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = gpu.parse(["--device", "cpu", "--stages", "serving", "--output", str(tmp_path)])
    worker = Stub({"name": "a CPU", "bytes": 1e9})
    monkeypatch.setattr(gpu, "versions", lambda: "torch 2.11.0+cu130, layerrl sources a")
    gpu.measure(options, worker)
    before = (tmp_path / "journal.jsonl").read_bytes()
    monkeypatch.setattr(gpu, "versions", lambda: "torch 2.11.0+cu130, layerrl sources b")
    with pytest.raises(JournalError, match=r"\. versions\.layerrl sources: 'a' there, 'b'"):
        gpu.measure(options, worker)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


def test_a_page_that_cannot_be_written_is_told_and_leaves_the_one_before(
    gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = {"name": "a GPU", "bytes": 1e9}
    with Journal(tmp_path, {"machine": machine, "tiny": False, "versions": {}}):
        pass
    page = tmp_path / "page.md"
    page.write_text("before")
    with no_file_above(64), pytest.raises(SystemExit, match="1"):
        gpu.main(["--report", "--output", str(tmp_path), "--page", str(page)])
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{page} was not written: [Errno 27] File too large")
    assert page.read_text() == "before"
    assert {file.name for file in tmp_path.iterdir()} == {"journal.jsonl", "page.md"}


def test_a_line_that_a_kill_cut_off_is_not_on_the_page(gpu: Any, tmp_path: Path) -> None:
    machine = {"name": "a GPU", "bytes": 1e9}
    with Journal(tmp_path, {"machine": machine, "tiny": False, "versions": {}}) as journal:
        journal.append({"stage": "serving", "case": {"kind": "sync"}, "found": {"failed": "oh"}})
    with journal.path.open("a") as file:
        file.write('{"stage": "serving", "ca')
    gpu.main(["--report", "--output", str(tmp_path), "--page", str(tmp_path / "page.md")])
    assert "1 measurements" in (tmp_path / "page.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_make_gpu_says_at_once_what_it_lacks() -> None:
    for python, sentence in (
        (sys.executable, f"make gpu needs a GPU, and torch {torch.__version__} of"),
        (f"{sys.executable} -S", f"and {sys.executable} has no torch: give another"),
    ):
        # Not the variables of the make that these tests may run under: it would say so.
        alone = {name: value for name, value in os.environ.items() if "MAKE" not in name}
        ended = subprocess.run(
            ["make", "gpu", f"PYTHON={python}"], cwd=ROOT, env=alone, check=False,
            capture_output=True, text=True,
        )  # fmt: skip
        assert ended.returncode != 0
        assert ended.stdout == ""
        [line] = [line for line in ended.stderr.splitlines() if not line.startswith("make: ")]
        assert sentence in line


SMALL = {"device": "cpu", "tiny": True, "folder": "unused"}


def test_too_small_a_device_and_out_of_memory_are_told_with_the_plan(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measures = importlib.import_module("gpu_measure")
    case = gpu.step(Namespace(tiny=True), "full") | SMALL
    plan = measures.planned(case)
    monkeypatch.setattr(measures, "train", lambda *_, **__: throw(torch.OutOfMemoryError("no")))
    too_much = measures.step(case)
    monkeypatch.setattr(measures, "memory", lambda device: plan["planned_bytes"] - 1)
    too_small = measures.step(case)
    assert too_much["planned_bytes"] == too_small["planned_bytes"] == plan["planned_bytes"] > 0
    machine = {"name": "a GPU", "bytes": 1e9}
    settings = {"machine": machine, "tiny": False, "versions": {"torch": "1"}}
    with Journal(tmp_path, settings) as journal:
        for found, shape in ((too_much, "Qwen3-8B"), (too_small, "Qwen3-1.7B")):
            entry = {"stage": "step", "case": case | {"shape": shape}, "seconds": 1.0}
            journal.append(entry | {"found": found})
    importlib.import_module("gpu_report").write_page(journal.path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "Qwen3-8B, beta 0, num_iterations 1: does not fit: out of memory with 0.0 GB" in text
    assert "Qwen3-1.7B, beta 0, num_iterations 1: skipped, the device is too small: 0.0 GB" in text


def throw(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("method", ["full", "by-hand", "masked", "lora", "lora-all"])
def test_the_plan_holds_what_the_method_holds(gpu: Any, method: str) -> None:
    measures = importlib.import_module("gpu_measure")
    case = gpu.step(Namespace(tiny=True), method, beta=0.04) | SMALL
    model = measures.made(case)
    whole = sum(p.nbytes for p in model.parameters())
    layer = sum(p.nbytes for p in model.model.layers[2].parameters())
    total = measures.planned(case)["planned_bytes"]
    expected = {
        "full": 5 * whole,  # weights, gradients, two moments, a second model
        "by-hand": 2 * whole + 3 * layer,
        "masked": whole + 4 * layer,  # weights, gradient, two moments, the values at the start
    }
    if method in expected:
        assert total == expected[method]
    else:  # four float32 values of each adapter weight
        assert whole < total < whole + 4 * 4 * 16 * 3 * 7 * 64 * 4


def test_the_page_of_the_documentation_is_what_the_command_writes(gpu: Any, tmp_path: Path) -> None:
    gpu.main(["--report", "--output", str(tmp_path), "--page", str(tmp_path / "gpu.md")])
    empty, page = (tmp_path / "gpu.md").read_text(), (ROOT / "docs" / "gpu.md").read_text()
    assert all("Not measured." in text for text in cuts(empty))
    assert cuts(page)
    if "has not been run" in page:
        assert page == empty


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--device", "cuda"], "--device is cuda, but torch finds no GPU on this machine"),
        (["--budget", "60"], "--budget is 60, expected a number of seconds, at least 120: no"),
        (
            ["--tiny", "--budget", "nan"],
            "--budget is nan, expected a number of seconds, at",
        ),
        (
            ["--device", "cpu", "--budget", "inf"],
            "--budget is inf, expected a number of seconds, at",
        ),
        (
            ["--tiny", "--budget", "3"],
            "--budget is 3, expected a number of seconds, at least 30:",
        ),
        (["--budget", "0"], "--budget is 0, expected a number of seconds, at least 120: no"),
        (["--budget", "-5"], "--budget is -5, expected a number of seconds, at least 120: no"),
        (["--budget", "soon"], "argument --budget: invalid float value: 'soon'"),
        (["--stages", "magic"], "invalid choice: 'magic'"),
        (["--device", "cpu", "--output", f"{__file__}/out"], "cannot use"),
        (["--device", "cpu", "--page", f"{__file__}/page.md"], "cannot use"),
        (["--report", "--page", str(Path(__file__).parent)], "a folder: expected a file"),
    ],
)
def test_bad_input_is_one_sentence(
    gpu: Any,
    options: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.parse(options)
    assert sentence in capsys.readouterr().err.splitlines()[-1]
