"""Commands of docs/recipes.md, read by the frameworks' own parsers (`make test-integrations`)."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STANDARD = {"import argparse", "import os", "from datetime import datetime"}


def needs(package):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None,
        reason=f"{package} is not installed here: `make test-integrations` tests it where it is",
    )


def command(heading):
    """The words of the last command below a heading of the page."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    block = re.search(rf"^## {heading}\n\n```console\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return shlex.split(block[1].replace("\\\n", " ").rpartition("\n$ ")[2])


@needs("verl")
def test_verl_knows_every_setting():
    from hydra import compose, initialize_config_dir

    *_, module, first = (words := command("verl"))[:4]
    assert module == "verl.trainer.main_ppo"
    config = Path(importlib.util.find_spec("verl").origin).parent / "trainer" / "config"
    settings = words[words.index(first) :]
    with initialize_config_dir(str(config), version_base=None):
        read = compose("ppo_trainer", settings)
    assert read.actor_rollout_ref.actor.strategy == "fsdp2"
    assert read.actor_rollout_ref.actor.optim.lr == 7e-6


@needs("openrlhf")
def test_openrlhf_knows_every_option():
    words = command("OpenRLHF")
    assert words[1:5] == ["python", "-m", "layerrl.integrations.openrlhf", "train_ppo_ray"]
    package = Path(importlib.util.find_spec("openrlhf").origin).parent
    # The module makes its parser where it is run as a command, and imports vLLM before that: run
    # what makes it, with the imports from the standard library.
    source = ast.parse((package / "cli" / "train_ppo_ray.py").read_text(encoding="utf-8"))
    [main] = [node for node in source.body if isinstance(node, ast.If)]
    ends = [ast.unparse(node) for node in main.body].index("args = parser.parse_args()")
    imports = [node for node in source.body if ast.unparse(node) in STANDARD]
    names = {}
    exec(compile(ast.Module([*imports, *main.body[:ends]], []), "train_ppo_ray", "exec"), names)
    read = vars(names["parser"].parse_args(words[5:]))
    assert read["actor.adam.lr"] == 7e-6
    assert read["ds.zero_stage"] == 2
