"""Editors and type checkers see the arguments that the trainers take."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import jedi
import pytest
from trl import GRPOTrainer
from trl.experimental.cpo import CPOTrainer

from layerrl.seams import TESTED, installed_version
from layerrl.trainer import GiGPOTrainer
from layerrl.trainer import ready as module
from tests.signatures import masked_trainers, origins_of, stub

ROOT = Path(__file__).parents[2]
STUB = Path(module.__file__ or "").with_suffix(".pyi")
TRL = installed_version("trl") or ""
NEWEST = TRL.split(".")[:2] == TESTED["trl"][1].split(".")
only_with_newest = pytest.mark.skipif(not NEWEST, reason=f"TRL {TRL} takes other arguments")


def typed(name: str) -> inspect.Signature:
    """The signature of a class's constructor in the stub."""
    tree = ast.parse(STUB.read_text(encoding="utf-8"))
    found = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    (init,) = found.body
    assert isinstance(init, ast.FunctionDef)
    assert init.name == "__init__"
    # Of the stub only names, kinds and defaults are run: no annotations.
    for argument in (*init.args.args, *init.args.kwonlyargs):
        argument.annotation = None
    scope = {}
    exec(ast.unparse(init), scope)
    signature = inspect.signature(scope["__init__"])
    _, *parameters = signature.parameters.values()
    return signature.replace(parameters=parameters)


@pytest.mark.parametrize("cls", masked_trainers(), ids=lambda cls: cls.__name__)
def test_typed_signatures_are_those_at_runtime(cls: type) -> None:
    def shape(signature: inspect.Signature) -> list[tuple[object, ...]]:
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    here, there = typed(cls.__name__), inspect.signature(cls)
    if NEWEST:
        assert shape(here) == shape(there), "run: make signatures"
    else:  # an older TRL may take less
        assert {*there.parameters} <= {*here.parameters}
    assert {"model", "args", "selection", "master_weights"} <= {*here.parameters}


@only_with_newest
def test_names_of_an_import_with_as_are_found() -> None:
    """TRL's CPO has `import torch.nn as nn`."""
    assert origins_of(sys.modules[CPOTrainer.__module__], {"nn"}) == {"nn": "torch"}


@only_with_newest
def test_the_stub_is_what_make_signatures_writes() -> None:
    text = STUB.read_text(encoding="utf-8")
    written, again = (
        {ast.unparse(node) for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
        for source in (text, stub())
    )
    assert written == again, "run: make signatures"


@only_with_newest
def test_gigpo_takes_all_arguments_of_grpo() -> None:
    ours, theirs = (inspect.signature(cls).parameters for cls in (GiGPOTrainer, GRPOTrainer))
    assert {*ours} == {*theirs}


IMPORTS = """from layerrl import LayerMaskedGRPOTrainer, LayerMaskedMixin, contribution_probe
from layerrl import load_delta, select_layers
from layerrl.trainer import GiGPOTrainer, LayerMaskedDPOTrainer, LayerMaskedSFTTrainer
from trl import GRPOTrainer
class Mine(LayerMaskedMixin, GRPOTrainer): ...
"""


@pytest.mark.parametrize(
    ("typed_so_far", "offered"),
    [
        ("LayerMaskedGRPOTrainer(rew", "reward_funcs="),
        ("LayerMaskedGRPOTrainer(sel", "selection="),
        ("LayerMaskedDPOTrainer(ref", "ref_model="),
        ("LayerMaskedSFTTrainer(mast", "master_weights="),
        ("GiGPOTrainer(call", "callbacks="),
        ("Mine(sel", "selection="),
        ("contribution_probe(rew", "reward_funcs="),
        ("load_delta(", "path="),
        ("select_layers(model, 1).pl", "plan"),
        ("select_layers(model, 1).plan(be", "beta="),
    ],
)
def test_jedi_completes(typed_so_far: str, offered: str) -> None:
    script = jedi.Script(IMPORTS + typed_so_far, project=jedi.Project(ROOT))
    assert offered in [completion.name for completion in script.complete()]


CHECKED = """
from typing import Any

from transformers import PreTrainedModel
from trl.trainer.grpo_config import GRPOConfig

from layerrl import LayerMaskedGRPOTrainer, LayerMaskedMixin, contribution_probe
from layerrl import load_delta, select_layers
from layerrl.trainer import GiGPOConfig, LayerMaskedDPOTrainer, LayerMaskedGiGPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

def reward(completions: list[str], **_: object) -> list[float]: ...
async def later(completions: list[str], **_: object) -> list[float]: ...
def play(prompts: list[str], trainer: object) -> dict[str, Any]: ...

def right(model: PreTrainedModel, data: Any) -> None:
    trainer = LayerMaskedGRPOTrainer(
        model, reward, args=GRPOConfig(), train_dataset=data, selection=select_layers(model, 10)
    )
    trainer.train()
    trainer.save_delta("out")
    trainer.selection.plan(model, beta=0.1).total
    LayerMaskedGRPOTrainer("a/model", [reward, later], selection=[1, 2], master_weights=False)
    LayerMaskedDPOTrainer(model, None, train_dataset=data, selection="middle:5")
    LayerMaskedGiGPOTrainer(model, args=GiGPOConfig(), rollout_func=play, selection=slice(2))
    select_layers(model, "full", boost={10: 2.0})
    contribution_probe(model, reward_funcs=reward, train_dataset=data, args=GRPOConfig())
    load_delta(model, "out")

    class Mine(LayerMaskedMixin, GRPOTrainer): ...
    Mine(model, reward, selection=10).train()

def wrong(model: PreTrainedModel, data: Any) -> None:
    LayerMaskedGRPOTrainer(model, reward_fucs=1, selection=10)  # error
    LayerMaskedGRPOTrainer(model, reward)  # error
    LayerMaskedGRPOTrainer(model, reward, selection=0.5)  # error
    LayerMaskedGRPOTrainer(model, reward, args=3, selection=10)  # error
    LayerMaskedGRPOTrainer(model, 3, selection=10)  # error
    LayerMaskedGRPOTrainer(model, reward, selection=10, checkpoint_format="whole")  # error
    LayerMaskedDPOTrainer(model, reward_funcs=reward, selection=10)  # error
    LayerMaskedGiGPOTrainer(model, rollout_func=play, selection=1, tools=[play])  # error
    LayerMaskedGiGPOTrainer(model, rolout_func=play, selection=1)  # error
    select_layers(model, 10, bost={10: 2.0})  # error
    select_layers(model, 10).plan(model, bta=0.1)  # error
    contribution_probe(model, reward_fucs=reward)  # error
    load_delta("out", model)  # error
"""


def test_pyright_rejects_what_the_trainers_reject(tmp_path: Path) -> None:
    pytest.importorskip("pyright")
    (tmp_path / "checked.py").write_text(CHECKED, encoding="utf-8")
    settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--outputjson", "-p", str(tmp_path)]
    done = subprocess.run(
        [*command, "--pythonpath", sys.executable], capture_output=True, text=True, check=False
    )
    told = json.loads(done.stdout)["generalDiagnostics"]
    lines = CHECKED.splitlines()
    found = {lines[one["range"]["start"]["line"]]: one["message"] for one in told}
    assert {*found} == {line for line in lines if line.endswith("# error")}, found
