"""The command line, on a tiny model that is saved to disk: as a process, and word by word."""

import errno
import io
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import load_dataset
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM
from trl import GRPOConfig, SFTConfig

import layerrl
from layerrl import (
    ContributionReport,
    LayerSelection,
    contribution_probe,
    merge_delta,
    select_layers,
)
from layerrl.cli import COMMANDS, main
from layerrl.cli.options import selection_of
from layerrl.cli.scripts import METHODS
from layerrl.report import Score
from layerrl.scores import position
from layerrl.scores.method import Method, Request
from layerrl.trainer import LayerMaskedGRPOTrainer, LayerMaskedSFTTrainer
from tests import processes
from tests.grpo import PROMPTS, tokenizer
from tests.models import tiny
from tests.trainers import JUDGED, PREFERENCES

ROOT = Path(layerrl.__file__).parents[1]
REWARDS = """
def letters(completions, **_):
    return [float(sum(letter < "P" for letter in text)) for text in completions]
"""
QUIETLY = {
    "learning_rate": "1e-2",  # YAML has no 1e-2: it is a text
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "per_device_train_batch_size": 8,
}
GENERATING = {"num_generations": 4, "max_completion_length": 6}


def rows(values: dict[str, list[Any]]) -> str:
    lines = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data, rewards, and a YAML file a method."""
    folder = tmp_path_factory.mktemp("cli")
    tiny("llama", 4).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "prompts").mkdir()
    (folder / "prompts" / "train.jsonl").write_text(rows({"prompt": PROMPTS * 16}))
    (folder / "text.jsonl").write_text(rows({"text": [prompt + "kl" for prompt in PROMPTS * 4]}))
    (folder / "preferences.jsonl").write_text(rows(PREFERENCES))
    (folder / "judged.jsonl").write_text(rows(JUDGED))
    data = {"grpo": "prompts", "rloo": "prompts", "sft": "text.jsonl"}
    data |= {"dpo": "preferences.jsonl", "kto": "judged.jsonl"}
    for method, name in data.items():
        online = {"reward_funcs": ["rewards.letters"], **GENERATING}
        options = {"model_name_or_path": str(folder / "base"), "dataset_name": name, **QUIETLY}
        options |= online if method in ("grpo", "rloo") else {}
        text = yaml.safe_dump({**options, "output_dir": f"out-{method}", "layers": [1, -1]})
        (folder / f"{method}.yaml").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def inside(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setenv("COLUMNS", "80")


def done(*words: object, via: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own; in a new interpreter where something starts it."""
    if via:
        ended = subprocess.run(
            [sys.executable, *via, "layerrl", *map(str, words)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    else:
        ended = processes.run("-m", "layerrl", *words)
    assert ended.returncode == 0, ended.stderr
    return ended


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What is said by a command that fails: one line, without a traceback, and with code 1."""
    capsys.readouterr()
    assert main([*map(str, words)]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("layerrl ")]
    assert len(said) == 1
    return said[0]


def misused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The last line of a command whose words make no sense: code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def same_delta(found: Path, expected: Path) -> None:
    for name in ("selection", "result"):
        values = [json.loads((path / "delta.json").read_text())[name] for path in (found, expected)]
        assert values[0] == values[1]
    tensors, others = (load_file(path / "delta.safetensors") for path in (found, expected))
    assert_close(tensors, others, rtol=0, atol=0)


class TestHelp:
    def test_loads_nothing_heavy(self) -> None:
        for words in (["--help"], ["train", "--help"], ["train", "sft", "--help"], ["probe", "-h"]):
            code = (
                "import sys, layerrl.cli as cli\n"
                f"try: cli.main({words})\n"
                "except SystemExit as end: assert end.code == 0\n"
                "print(*sys.modules)"
            )
            ended = subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            loaded = {*ended.stdout.splitlines()[-1].split()}
            assert "layerrl.cli" in loaded
            assert loaded.isdisjoint({"torch", "transformers", "trl", "datasets"})

    @pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS), ["train", "sft"]])
    def test_fits_a_screen(self, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main([*words, "--help"])
        assert ended.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        assert 5 < len(lines) <= 40
        assert max(map(len, lines)) <= 90

    def test_names_every_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["--help"])
        printed = capsys.readouterr().out
        assert all(f"\n  {name:7}{does}" in printed for name, does in COMMANDS.items())

    def test_of_all_has_the_options_of_trl(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["train", "kto", "--help-all"])
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        assert {"--desirable_weight", "--dataset_train_split", "--layers"} <= {*printed.split()}

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["--version"])
        assert ended.value.code == 0
        assert capsys.readouterr().out == f"layerrl {layerrl.__version__}\n"

    def test_a_command_that_does_not_exist(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "invalid choice: 'plna'" in misused(capsys, "plna")
        assert "required: COMMAND" in misused(capsys)


class TestPlan:
    def test_as_a_process(self) -> None:
        words = ["plan", "base", "--layers", "-1,2", "--beta", "0.1", "--dtype", "bfloat16"]
        ended = done(*words, via=("-m",))
        config = AutoConfig.from_pretrained("base")
        plan = select_layers(config, [-1, 2]).plan(config, beta=0.1, dtype=torch.bfloat16)
        assert ended.stdout == f"{plan}\n"
        assert ended.stderr.splitlines()[-1] == "base: layers 2-3 of 4"

    def test_of_a_config_file_as_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["--layers", "middle", "--modules", "mlp.*", "--also", "final_norm", "--json"]
        assert main(["plan", "base/config.json", *words, "--num_iterations", "2"]) == 0
        config = AutoConfig.from_pretrained("base")
        selection = select_layers(config, "middle", modules="mlp.*", also="final_norm")
        printed = capsys.readouterr()
        assert json.loads(printed.out)["step"] == selection.plan(config, num_iterations=2).step
        assert printed.err == f"base/config.json: {selection}\n"

    def test_boosts(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["plan", "base", "--layers", "0,1", "--boost", "1=2", "mlp.*=0.5"])
        assert "{1: 2.0, 'mlp.*': 0.5}" in capsys.readouterr().err
        main(["plan", "base", "--layers", "0,1", "--boost", "decay:0.5"])
        assert "{0: 0.5}" in capsys.readouterr().err
        main(["plan", "base", "--layers", "-1,0", "--boost", "-1=2", "0=3"])
        assert "{0: 3.0, 3: 2.0}" in capsys.readouterr().err

    @pytest.mark.parametrize("boost", [{1: 2}, {"1": "2e0"}, {"1": 2.0}, "1=2", ["1=2"]])
    def test_boosts_of_a_file(self, boost: object) -> None:
        options = Namespace(layers="0,1", modules=None, also=None, boost=boost, stack=None)
        found = selection_of(AutoConfig.from_pretrained("base"), options)
        assert found == select_layers(AutoConfig.from_pretrained("base"), [0, 1], boost={1: 2})

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["nosuch", "--layers", 1], "no model 'nosuch': it is no folder here"),
            (["prompts", "--layers", 1], "no model 'prompts'"),
            (["base"], "no layers given"),
            (["base", "--layers", 4], "layer 4 does not exist: LlamaConfig has 4 decoder layers"),
            (["base", "--layers", "-1,-5"], "-5"),
            (["base", "--layers", "most"], "'most' does not name layers"),
            (["base", "--layers", "{}"], "not the JSON of a LayerSelection"),
            (["base", "--layers", "auto"], "'auto' is chosen by a trainer"),
            (["base", "--layers", "auto:2:step"], "'auto:2:step' is chosen by a trainer"),
            (["base", "--layers", 1, "--modules", "nope"], "nope"),
            (["base", "--layers", 1, "--also", "nope"], "nope"),
            (["base", "--layers", 1, "--boost", "2=2"], "2"),
            (["base", "--layers", 1, "--boost", "1"], "boost"),
            (["base", "--layers", 1, "--boost", "1=much"], "--boost '1=much': expected KEY=FACTOR"),
            (["base", "--layers", 1, "--boost", "1=2", "1=3"], "--boost has '1' twice"),
            (["base", "--layers", 1, "--boost", "=2", "1=3"], "--boost '=2': expected KEY=FACTOR"),
            (["base", "--layers", 1, "--stack", "vision"], "vision"),
            (["base", "--layers", 1, "--stack", "audio"], "stack is 'audio'"),
            (["base", "--layers", 1, "--dtype", "int8"], "dtype is torch.int8"),
            (["base", "--layers", 1, "--dtype", "bfloat17"], "dtype is 'bfloat17'"),
            (["base", "--layers", 1, "--dtype", "nn"], "dtype is 'nn'"),
            (["base", "--layers", 1, "--beta", -1], "beta is -1.0"),
            (["base", "--layers", 1, "--num_iterations", 0], "num_iterations is 0"),
        ],
    )
    def test_refuses(
        self, capsys: pytest.CaptureFixture[str], words: list[object], message: str
    ) -> None:
        assert message in refused(capsys, "plan", *words)

    def test_nobody_reads_what_is_printed(self) -> None:
        with subprocess.Popen(
            [sys.executable, "-m", "layerrl", "plan", "base", "--layers", "1"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as ended:  # fmt: skip
            assert ended.stdout is not None
            assert ended.stderr is not None
            ended.stdout.close()
            said = ended.stderr.read()
        assert ended.returncode == 1
        assert "Traceback" not in said
        assert "BrokenPipe" not in said

    @pytest.mark.parametrize("unbuffered", [{}, {"PYTHONUNBUFFERED": "1"}])
    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
    def test_stdout_is_full(self, unbuffered: dict[str, str]) -> None:
        with open("/dev/full", "w") as full:
            ended = subprocess.run(
                [sys.executable, "-m", "layerrl", "plan", "base", "--layers", "1"],
                env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **unbuffered},
                stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
        assert ended.returncode == 1
        assert "Traceback" not in ended.stderr
        assert ended.stderr.splitlines()[-1] == (
            f"layerrl plan: cannot print to stdout: {os.strerror(errno.ENOSPC)}"
        )

    def test_stdout_is_closed(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sys.stdout", None)
        said = refused(capsys, "plan", "base", "--layers", "1")
        assert said == "layerrl plan: nothing can be printed: stdout is closed"

    def test_interrupted(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(_: list[str]) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("layerrl.cli.plan.run", interrupted)
        assert main(["plan", "base"]) == 130
        assert capsys.readouterr().err == "layerrl plan: interrupted\n"

    def test_usage(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "required: MODEL" in misused(capsys, "plan")
        assert "invalid float value: 'x'" in misused(capsys, "plan", "base", "--beta", "x")
        assert "unrecognized arguments: 2" in misused(capsys, "plan", "base", "--layers", "1", "2")


@pytest.fixture(scope="module")
def sft(here: Path) -> subprocess.CompletedProcess[str]:
    folder = os.getcwd()
    os.chdir(here)
    try:
        return done("train", "sft", "--config", "sft.yaml", "--seed", 3, "--layers", 2)
    finally:
        os.chdir(folder)


class TestTrain:
    def test_sft_is_the_trainers_run(
        self, here: Path, sft: subprocess.CompletedProcess[str], tmp_path: Path
    ) -> None:
        values = {**QUIETLY, "learning_rate": 1e-2, "seed": 3}
        trainer = LayerMaskedSFTTrainer(
            model=str(here / "base"),
            args=SFTConfig(output_dir=str(tmp_path), **values),
            train_dataset=load_dataset("json", data_files="text.jsonl", split="train"),
            selection=2,  # the command line's, before the file's
        )
        trainer.train()
        same_delta(here / "out-sft" / "delta", trainer.save_delta(tmp_path / "delta"))
        assert (
            f"Saved layer 2 of 4 to {Path('out-sft', 'delta')}. layerrl merge {here / 'base'} "
            f"{Path('out-sft', 'delta')} OUT writes a whole model."
        ) in sft.stderr.splitlines()

    def test_grpo_is_the_trainers_run(
        self, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done("train", "grpo", "--config", "grpo.yaml", "--output_dir", tmp_path / "out")
        monkeypatch.syspath_prepend(here)
        from rewards import letters

        trainer = LayerMaskedGRPOTrainer(
            model=str(here / "base"),
            reward_funcs=[letters],
            args=GRPOConfig(
                output_dir=str(tmp_path), **QUIETLY | {"learning_rate": 1e-2}, **GENERATING
            ),
            train_dataset=load_dataset("prompts", split="train"),
            selection=[1, -1],
        )
        trainer.train()
        same_delta(tmp_path / "out" / "delta", trainer.save_delta(tmp_path / "delta"))

    @pytest.mark.parametrize(
        "method",
        [pytest.param(m, marks=pytest.mark.slow if m in ("rloo", "kto") else ()) for m in METHODS],
    )
    def test_every_method(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, method: str
    ) -> None:
        out = ["--output_dir", str(tmp_path), "--max_steps", "1"]
        if method == "dpo":
            out += ["--no_master_weights", "--checkpoint_format", "full"]
            out += ["--save_strategy", "steps"]
        assert main(["train", method, "--config", f"{method}.yaml", *out]) == 0
        assert f"Saved layers 1, 3 of 4 to {tmp_path / 'delta'}" in capsys.readouterr().err
        whole = (tmp_path / "checkpoint-1" / "model.safetensors").exists()
        assert whole == (method == "dpo")

    @pytest.mark.parametrize("layers", ["auto:2", "auto:2:step"])
    def test_layers_that_the_trainer_chooses(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, layers: str
    ) -> None:
        words = ["train", "grpo", "--config", "grpo.yaml", "--output_dir", str(tmp_path)]
        assert main([*words, "--layers", layers, "--learning_rate", "1e-3"]) == 0
        assert " of 4 to " in capsys.readouterr().err
        saved = json.loads((tmp_path / "delta" / "delta.json").read_text())
        assert len(saved["selection"]["layers"]) == 2

    def test_adapters(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        words = ["--use_peft", "--lora_target_modules", "all-linear", "--output_dir", str(tmp_path)]
        assert main(["train", "sft", "--config", "sft.yaml", *words]) == 0
        assert "PeftModel.from_pretrained loads" in capsys.readouterr().err
        names = {*load_file(tmp_path / "adapter_model.safetensors")}
        assert names
        assert all(".layers.1." in name or ".layers.3." in name for name in names)

    def test_goes_on_from_a_checkpoint(
        self, here: Path, tmp_path: Path, sft: subprocess.CompletedProcess[str]
    ) -> None:
        words = ["train", "sft", "--config", "sft.yaml", "--seed", "3", "--layers", "2"]
        words += ["--output_dir", str(tmp_path), "--save_strategy", "steps", "--save_steps", "1"]
        assert main(words) == 0
        (tmp_path / "delta").rename(tmp_path / "first")
        assert main([*words, "--resume_from_checkpoint", str(tmp_path / "checkpoint-1")]) == 0
        same_delta(tmp_path / "delta", here / "out-sft" / "delta")

    @pytest.mark.slow
    def test_under_accelerate_launch(self, tmp_path: Path) -> None:
        launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m")
        words = ["--config", "sft.yaml", "--output_dir", tmp_path, "--ddp_backend", "gloo"]
        ended = done("train", "sft", *words, via=launch)
        assert ended.stderr.count("Saved layers 1, 3 of 4") == 1
        assert (tmp_path / "delta" / "delta.json").is_file()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--layers", 9], "layer 9 does not exist"),
            (["--model_name_or_path", "nosuch"], "no model 'nosuch'"),
            (["--dataset_name", "nosuch"], "nosuch"),
            (["--dataset_name", "base/config.jsn"], "config.jsn"),
            (["--dataset_train_split", "tst"], "has no split 'tst'"),
            (["--eval_strategy", "epoch"], "has no split 'test'"),
            (["--reward_funcs", "rewards.nope"], "module 'rewards' has no attribute 'nope'"),
            (["--reward_funcs", "nosuch.nope"], "No module named 'nosuch'"),
            (["--reward_funcs", "nope"], "Could not load reward function 'nope'"),
            (["--layers", "auto", "--also", "head"], "--layers auto chooses whole layers"),
            (["--layers", "auto:step:2"], "selection='auto:step:2' does not say how many layers"),
            (["--prefix_cache_bytes", "-1"], "prefix_cache_bytes is -1"),
            (["--ignore_bias_buffers"], "--ignore_bias_buffers has no effect"),
        ],
    )
    def test_refuses(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[object], message: str
    ) -> None:
        shared = ["--config", "grpo.yaml", "--output_dir", tmp_path]
        assert message in refused(capsys, "train", "grpo", *shared, *words)

    def test_refuses_what_is_not_given(
        self, here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        options = yaml.safe_load((here / "grpo.yaml").read_text()) | {"output_dir": str(tmp_path)}
        for name, message in (
            ("model_name_or_path", "no model is named: give --model_name_or_path"),
            ("layers", "no layers given"),
            ("dataset_name", "Either `datasets` or `dataset_name` must be provided"),
            ("reward_funcs", "reward"),
        ):
            left = {key: value for key, value in options.items() if key != name}
            (tmp_path / "less.yaml").write_text(yaml.safe_dump(left))
            said = refused(capsys, "train", "grpo", "--config", tmp_path / "less.yaml")
            assert message in said

    def test_refuses_a_delta_that_is_there_before_it_trains(
        self, capsys: pytest.CaptureFixture[str], sft: object
    ) -> None:
        said = refused(capsys, "train", "sft", "--config", "sft.yaml", "--dataset_name", "nosuch")
        assert said.endswith("delta exists already: choose another folder or remove it")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "layers: 1\nreward_funcs: [./rewards.py]",
                "has './rewards.py', expected a function's",
            ),
            ("layers: 1\nreward_funcs: [3]", "reward_funcs has 3, expected"),
            ("layers: 1\nreward_funcs: rewards.nope", "module 'rewards' has no attribute 'nope'"),
            ("layers: 1\ndataset_name: grpo.yaml", "expected a file that ends in .json, .jsonl"),
            ("layers: 1\ndataset_name: base", "cannot read base: DatasetGenerationError: "),
            ("layers: [1]\nboost: {1: true}", "--boost '1=True': expected KEY=FACTOR"),
        ],
    )
    def test_refuses_what_a_file_names(
        self, here: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
    ) -> None:
        options = yaml.safe_load((here / "grpo.yaml").read_text()) | yaml.safe_load(text)
        Path("bad.yaml").write_text(yaml.safe_dump(options | {"output_dir": "out-bad"}))
        assert message in refused(capsys, "train", "grpo", "--config", "bad.yaml")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("learning_rte: 1", "learning_rte (nearest: learning_rate"),
            ("layer: 1", "layer (nearest: layers"),
            ("reward_funcs: [x.y]", "SFTConfig, ModelConfig and script have: reward_funcs ("),
            ("qqq: 1", "qqq (nothing is like it)"),
            ("10: 1", "10 (nothing is like it)"),
            ("- 1", "expected a mapping of options to values, got [1]"),
            ("", "expected a mapping of options to values, got None"),
            ("a: [", "--config bad.yaml: while parsing a flow node"),
            ("layers: 1:2", 'layers: 1:2 is the number 62 in YAML. Write "1:2" in quotes'),
            ("layers: [3, 010]", "layers: 010 is the number 8 in YAML"),
            ("layers: 1\nmax_steps: 3\nlayers: 2", "layers is there twice, in lines 3 and 5"),
            ("layers: 1\nboost: {1: 2, 1: 3}", "1 is there twice, in lines 4 and 4"),
            ("layers: [1, 2]\nboost: {010: 2}", "boost: 010 is the number 8 in YAML"),
            ("max_steps: 1:30", "max_steps: 1:30 is the number 90 in YAML"),
            ("a: " + "[" * 3000, "it is nested too deep"),
            ("max_steps: two", "invalid int value: 'two'"),
            ("learning_rate: fast", "invalid float value: 'fast'"),
        ],
    )
    def test_refuses_a_file(
        self, capsys: pytest.CaptureFixture[str], text: str, message: str
    ) -> None:
        on_a_cpu = "use_cpu: true\nbf16: false\n" if ": " in text else ""
        Path("bad.yaml").write_text(f"{on_a_cpu}{text}\n")
        assert message in misused(capsys, "train", "sft", "--config", "bad.yaml")

    def test_usage(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "No such file" in misused(capsys, "train", "sft", "--config", "nosuch.yaml")
        assert "expected one argument" in misused(capsys, "train", "sft", "--config")
        said = misused(capsys, "train", "sft", "--outptdir=x")
        assert "--outptdir=x (nearest: output_dir" in said
        assert "mymodel (nothing" in misused(capsys, "train", "sft", "mymodel", "--layers", 1)
        assert "invalid choice: 'ppo'" in misused(capsys, "train", "ppo")
        assert "required: METHOD" in misused(capsys, "train")
        assert "METHOD comes first" in misused(capsys, "train", "--layers", 1, "sft")
        assert "--layer (nearest" in misused(capsys, "train", "sft", "--layer", 1)


class TestProbe:
    def test_gradient(self, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = tmp_path / "report.json"
        words = ["--config", "probe.yaml", "--budget", 32, "--modules", "mlp.*", "--out", out]
        options = yaml.safe_load((here / "grpo.yaml").read_text())
        del options["layers"]
        (here / "probe.yaml").write_text(yaml.safe_dump(options))
        ended = done("probe", "base", *words)
        report = ContributionReport.from_json(out.read_text())
        assert ended.stdout.endswith(f"{report}\n")
        assert f"Wrote {out}" in ended.stderr

        monkeypatch.syspath_prepend(here)
        from rewards import letters

        expected = contribution_probe(
            AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32),
            reward_funcs=[letters],
            train_dataset=load_dataset("prompts", split="train"),
            args=GRPOConfig(**QUIETLY | {"learning_rate": 1e-2}, **GENERATING),
            budget=32,
            modules=["mlp.*"],
        )
        assert report.layers == expected.layers
        assert main(["show", str(out), "--plot", str(tmp_path / "report.png")]) == 0
        assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"

    def test_position_needs_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["probe", "base", "--method", "position", "--layers", "1,2"]) == 0
        printed = capsys.readouterr().out
        assert "method 'position'" in printed
        assert [line.split()[-1] for line in printed.splitlines()[2:6]] == [
            "missing", "done", "done", "missing",
        ]  # fmt: skip

    def test_the_report_is_written_though_it_cannot_be_printed(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        out = tmp_path / "report.json"
        monkeypatch.setattr("sys.stdout", None)
        said = refused(capsys, "probe", "base", "--method", "position", "--out", out)
        assert "stdout is closed" in said
        assert ContributionReport.from_json(out.read_text()).method == "position"

    @pytest.mark.parametrize("reads_weights", [True, False])
    def test_loads_the_model_of_a_method_that_reads_weights(
        self, monkeypatch: pytest.MonkeyPatch, reads_weights: bool
    ) -> None:
        models = []

        def score(selection: LayerSelection, request: Request) -> layerrl.ContributionReport:
            models.append(request.model)
            return middle.score(selection, request)

        middle, method = position.METHOD, Method(score=score, reads_weights=reads_weights)
        monkeypatch.setattr(position, "METHOD", method)
        assert main(["probe", "base", "--method", "position"]) == 0
        [model] = models
        assert {p.is_meta for p in model.parameters()} == {not reads_weights}

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "method='gradient' needs reward_funcs, train_dataset, args"),
            (["--method", "random"], "method is 'random'"),
            (["--method", "position", "--layers", 8], "layer 8 does not exist"),
            (["--out", "base"], "--out base: it exists already"),
            (["--out", "nosuch/report.json"], "there is no folder nosuch"),
            (["--config", "grpo.yaml", "--budget", 3], "budget is 3 prompts"),
            (["--config", "grpo.yaml", "--use_peft"], "--use_peft: a probe scores the layers"),
            (["--config", "grpo.yaml", "--seeds", 1, 1], "seeds is [1, 1]"),
        ],
    )
    def test_refuses(
        self, capsys: pytest.CaptureFixture[str], words: list[object], message: str
    ) -> None:
        assert message in refused(capsys, "probe", "base", *words)

    def test_usage(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "no model 'nosuch'" in refused(capsys, "probe", "nosuch", "--method", "position")
        assert "required: MODEL" in misused(capsys, "probe")
        said = misused(capsys, "probe", "base", "--use_cpu", "--bf16", "false", "--bugdet", 1)
        assert "--bugdet (nearest: budget" in said
        assert "MODEL comes first" in misused(capsys, "probe", "--reward_funcs", "a.b", "base")


class TestMergeAndShow:
    def test_a_merged_model_is_loaded_by_transformers(
        self, here: Path, sft: object, tmp_path: Path
    ) -> None:
        ended = done("merge", "base", "out-sft/delta", tmp_path / "merged")
        assert f"Wrote {tmp_path / 'merged'}" in ended.stderr
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
        before = AutoModelForCausalLM.from_pretrained("base").state_dict()
        trained = load_file("out-sft/delta/delta.safetensors")
        assert_close({n: t for n, t in merged.items() if n in trained}, trained, rtol=0, atol=0)
        changed = {name for name in merged if not torch.equal(merged[name], before[name])}
        assert changed == {*trained}

    def test_several_deltas(self, sft: object, tmp_path: Path) -> None:
        words = ["train", "sft", "--config", "sft.yaml", "--layers", "0"]
        assert main([*words, "--output_dir", str(tmp_path)]) == 0
        deltas = ["out-sft/delta", str(tmp_path / "delta")]
        assert main(["merge", "base", *deltas, str(tmp_path / "both"), "--union"]) == 0
        merge_delta("base", deltas, tmp_path / "expected", union=True)
        files = [tmp_path / name / "model.safetensors" for name in ("both", "expected")]
        assert files[0].read_bytes() == files[1].read_bytes()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["base", "nosuch", "new"], "no delta at nosuch"),
            (["base", "base", "new"], "no delta at base"),
            (["nosuch", "out-sft/delta", "new"], "'nosuch'"),
            (["base", "out-sft/delta", "base"], "base exists already"),
            (["base", "out-sft/delta", "out-sft/delta", "new"], "out-sft/delta"),
        ],
    )
    def test_merge_refuses(
        self, capsys: pytest.CaptureFixture[str], sft: object, words: list[str], message: str
    ) -> None:
        assert message in refused(capsys, "merge", *words)
        assert not Path("new").exists()

    def test_usage_of_merge(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "required: OUT" in misused(capsys, "merge", "base", "out-sft/delta")

    @pytest.mark.skipif(sys.platform == "win32", reason="has no terminals of this kind")
    def test_a_merge_shows_its_progress_on_a_terminal(self, sft: object, tmp_path: Path) -> None:
        import pty
        import termios

        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        words = ["merge", "base", "out-sft/delta", str(tmp_path / "new")]
        code = f"from layerrl.cli import main; main({words})"
        merging = processes.start("-c", code, stderr=os.ttyname(theirs))
        merging.join()
        assert merging.exitcode == 0
        shown = os.read(ours, 10_000).decode()
        os.close(ours)
        os.close(theirs)
        assert "comparing the base:" in shown
        assert "copying the base:" in shown

    def test_show_a_delta(self, here: Path, sft: object) -> None:
        lines = done("show", "out-sft/delta").stdout.splitlines()
        assert "trained   layer 2 of 4" in lines
        assert f"base      {here / 'base'}" in lines
        assert "tensors   9 in float32" in lines

    def test_show_draws_in_the_place_of_a_whole_file(self, tmp_path: Path) -> None:
        (tmp_path / "report.json").write_text(
            layerrl.published_contributions("Qwen3-1.7B-Base").to_json()
        )
        picture, same_file = tmp_path / "x.svg", tmp_path / "same"
        picture.write_text("before")
        same_file.hardlink_to(picture)
        assert main(["show", str(tmp_path / "report.json"), "--plot", str(picture)]) == 0
        assert "<svg" in picture.read_text()
        assert same_file.read_text() == "before"  # not written into: a reader sees one or the other

    @pytest.mark.parametrize("backend", ["nosuch", "module://nosuch.module"])
    def test_show_and_a_missing_backend_of_the_environment(
        self, tmp_path: Path, backend: str
    ) -> None:
        """In a new interpreter: matplotlib refuses the first name itself, when it is imported."""
        (tmp_path / "report.json").write_text(
            layerrl.published_contributions("Qwen3-1.7B-Base").to_json()
        )
        plot = "import layerrl; layerrl.published_contributions('Qwen3-1.7B-Base').plot()"
        drawn, plotted = (
            subprocess.run(
                [sys.executable, *words],
                cwd=tmp_path,
                env={**os.environ, "MPLBACKEND": backend, "PYTHONPATH": str(processes.ROOT)},
                capture_output=True,
                text=True,
            )
            for words in (["-m", "layerrl", "show", "report.json", "--plot", "x.png"], ["-c", plot])
        )
        if backend == "nosuch":
            assert drawn.stderr.splitlines()[-1].endswith("or pass axes as ax=")
            assert "Traceback" not in drawn.stderr
            assert not (tmp_path / "x.png").exists()
        else:
            assert drawn.returncode == 0, drawn.stderr
            assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        last = plotted.stderr.splitlines()[-1]
        assert last.startswith("layerrl.errors.ReportError: matplotlib makes no figure here: ")

    def test_show_json(self, capsys: pytest.CaptureFixture[str], sft: object) -> None:
        assert main(["show", "out-sft/delta", "--json"]) == 0
        expected = json.loads(Path("out-sft/delta/delta.json").read_text())
        assert json.loads(capsys.readouterr().out) == expected
        Path("report.json").write_text(layerrl.published_contributions("Qwen3-1.7B-Base").to_json())
        assert main(["show", ".", "--json"]) == 0
        assert capsys.readouterr().out.strip() == Path("report.json").read_text()
        selection = select_layers(AutoConfig.from_pretrained("base"), "last:2")
        Path("selection.json").write_text(selection.to_json())
        assert main(["show", "selection.json"]) == 0
        assert capsys.readouterr().out == "layers 2-3 of 4\n"

    @pytest.mark.parametrize("words", [[], ["--json"]])
    def test_show_on_a_terminal_without_the_characters(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str]
    ) -> None:
        report = ContributionReport(
            method="position", layers=(Score(score=1.0),), source="Zhäng, 日本 \N{GRINNING FACE}"
        )
        file, printed = tmp_path / "report.json", io.BytesIO()
        raw = json.dumps(json.loads(report.to_json()), ensure_ascii=False)
        file.write_text(raw, encoding="utf-8")
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="latin-1"))
        assert main(["show", str(file), *words]) == 0
        text = printed.getvalue().decode("latin-1")
        assert "Zhäng, \\u65e5\\u672c \\ud83d\\ude00" in text
        if words:
            assert ContributionReport.from_json(text) == report

    def test_show_refuses(
        self, capsys: pytest.CaptureFixture[str], here: Path, tmp_path: Path, sft: object
    ) -> None:
        assert "cannot read nosuch" in refused(capsys, "show", "nosuch")
        assert "no delta at base" in refused(capsys, "show", "base")
        assert "is no JSON" in refused(capsys, "show", "rewards.py")
        assert "cannot read" in refused(capsys, "show", "base/model.safetensors")
        assert "neither a report nor a selection" in refused(capsys, "show", "base/config.json")
        said = refused(capsys, "show", "out-sft/delta", "--plot", "x.png")
        assert said == "layerrl show: --plot x.png: only a report is drawn, and this is none"
        report = tmp_path / "report.json"
        report.write_text(layerrl.published_contributions("Qwen3-1.7B-Base").to_json())
        assert "cannot write" in refused(capsys, "show", report, "--plot", tmp_path / "x.docx")
        assert "cannot write" in refused(capsys, "show", report, "--plot", tmp_path / "no/x.png")
        assert "required: PATH" in misused(capsys, "show")
