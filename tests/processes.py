"""Runs Python as `python words` would, in a process forked from one that has imported once what
most need: to import torch, transformers and TRL takes longer than most programs of tests run.

What is claimed of a fresh interpreter, as what it imports, has to start one.
"""

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

_LONGEST = 1800  # seconds, on a machine that does much else
ROOT = Path(__file__).parents[1]
_IMPORTED = [
    "tests.launchers.worker",
    "layerrl.trainer.ready",
    "layerrl.cli",
    "trl.trainer.grpo_trainer",
    "transformers.models.llama.modeling_llama",
    "matplotlib.pyplot",
]
"""One that is missing is left out: without it the first process that needs it imports it itself."""


def start(*words: object, stdout: str = os.devnull, stderr: str = os.devnull) -> BaseProcess:
    """Start `python words`: a file, `-m` and a module or `-c` and code, then arguments.

    Args:
        words: What follows `python`.
        stdout: File for what is printed.
        stderr: File for what is printed there.

    Returns:
        The process, which is running in this one's folder, with its environment: but what is read
        from that on import was read before.
    """
    arguments = [*map(str, words)], os.getcwd(), {**os.environ}, stdout, stderr
    process = forking().Process(target=_main, args=arguments)
    process.start()
    return process


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """As `start`, to its end, with what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("stdout", "stderr")]
        process = start(*words, stdout=files[0], stderr=files[1])
        process.join(_LONGEST)
        process.kill()
        process.join()
        printed = [Path(file).read_text(encoding="utf-8") for file in files]
    assert process.exitcode is not None
    return subprocess.CompletedProcess([*map(str, words)], process.exitcode, *printed)


def forking() -> multiprocessing.context.ForkServerContext:
    """Where processes come from that have imported what most need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with contextlib.chdir(ROOT):  # elsewhere, `tests` may be that of an installed package
        forkserver.ensure_running()
    return context


def _main(words: list[str], folder: str, env: dict[str, str], stdout: str, stderr: str) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    match words:
        case ["-m", module, *arguments]:
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *arguments]:
            sys.argv = ["-c", *arguments]
            exec(code, {"__name__": "__main__"})
        case [script, *_]:
            sys.argv = words
            sys.path.insert(0, str(Path(script).resolve().parent))
            runpy.run_path(script, run_name="__main__")
