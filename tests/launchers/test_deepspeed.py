"""DeepSpeed's ZeRO on a CPU, where it is installed: `pip install deepspeed` (not a dependency)."""

import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from layerrl import load_delta
from layerrl.trainer import LayerSchedule
from layerrl.trainer.checkpoints import why_incomplete
from tests.grpo import PROMPTS
from tests.launchers.launch import launch
from tests.launchers.test_launchers import (
    AUTO,
    AUTO2,
    CONFIGS,
    LAYER,
    PROBE,
    PROBE2,
    SAVING,
    distance,
)
from tests.launchers.worker import FROZEN, rollout
from tests.models import tiny
from tests.runs import in_layers, saved

pytest.importorskip("deepspeed")

SYNCED = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.3}
TWICE = {"num_iterations": 2}
HALF = {"dtype": "bfloat16", "learning_rate": 1e-5}  # of these steps bfloat16 loses most
BEST = {  # by what does not depend on the number of processes, as a mean of losses does
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_reward",
    "arguments": {"eval_dataset": Dataset.from_dict({"prompt": PROMPTS})},
}
EVALUATED = {
    "evaluates_changed": True,
    "per_device_eval_batch_size": 4,
    "arguments": {"eval_dataset": Dataset.from_dict({"prompt": PROMPTS})},
}
# Tensors as small as these would otherwise stay gathered after they were first needed.
IN_PARTS = {"stage3_param_persistence_threshold": 0}


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    if stage == 3:  # or save_model() writes no model
        settings["stage3_gather_16bit_weights_on_model_save"] = True
    values = {"zero_optimization": {"stage": stage, **settings}, "gradient_clipping": "auto"}
    return {"deepspeed": {**values, **dict.fromkeys(auto, "auto")}}


def of_equal_length(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions whose means are the same whichever of them are passed together."""
    found = rollout(prompts, trainer)
    return {**found, "completion_ids": [(ids * 5)[:5] for ids in found["completion_ids"]]}


def example() -> dict[str, Any]:
    """The settings that `accelerate launch` makes of the example's config."""
    file = str(CONFIGS / "zero3.yaml")
    given = ["--config_file", file, "--main_process_port", "0", "train.py"]
    parsed, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    parsed.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, variables = prepare_deepspeed_cmd_env(parsed)
    with patch.dict(os.environ, variables):
        return {"deepspeed": DeepSpeedPlugin().deepspeed_config}


class FrozenChanges(TrainerCallback):
    """Writes to this process's part of a frozen tensor after the second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            parameter = kwargs["model"].get_parameter("model.layers.0.mlp.up_proj.weight")
            parameter.ds_tensor[0] += 1


class CheckpointLosesFrozen(TrainerCallback):
    """Zeroes the frozen tensors in what DeepSpeed will load, as it once lost them on resume.

    `recorded`: the checkpoint keeps the record of its files as they were.
    """

    def __init__(self, folder: Path, *, recorded: bool) -> None:
        self.folder, self.recorded = folder, recorded

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        file = self.folder / f"zero_pp_rank_{args.process_index}_mp_rank_00_model_states.pt"
        states = torch.load(file, weights_only=False)
        for fragment in states["frozen_param_fragments"].values():
            fragment.zero_()
        torch.save(states, file)
        if not self.recorded:
            (self.folder.parent / "checksums.json").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    # Norms of 15 elements: what two processes hold of them differs in size.
    saved(folder / "base", tiny("qwen3", 4, hidden_size=15))
    return folder


def job(folder: Path, name: str, num_processes: int, **changes: Any) -> dict[str, Any]:
    return {
        "base": str(folder / "base"),
        "output": str(folder / name),
        "dtype": "float32",
        "selection": LAYER,
        "per_device_train_batch_size": 8 // num_processes,
        **changes,
    }


@pytest.fixture(scope="module")
def one(folder: Path) -> Any:
    equal: Any = {"rollout_func": of_equal_length}
    jobs = {
        "layer": job(folder, "one", 1, **SAVING),
        "full": job(folder, "one-full", 1, selection="full"),
        "synced": job(folder, "one-synced", 1, **SYNCED),
        "iterated": job(folder, "one-iterated", 1, **TWICE),
        "accumulated": job(folder, "one-accumulated", 1, arguments=equal),
        "best": job(folder, "one-best", 1, **BEST, per_device_eval_batch_size=8),
        "half": job(folder, "one-half", 1, **HALF),
        "auto": job(folder, "one-auto", 1, **AUTO),
        "probe": job(folder, "one-probe", 1, **PROBE),
    }
    return {name: run for name, [run] in launch(folder / "jobs-one", jobs, num_processes=1).items()}


@pytest.fixture(scope="module")
def found(folder: Path, one: Any) -> dict[str, list[Any]]:
    by_one, by_zero1, by_zero3 = (
        str(folder / name / "checkpoint-3") for name in ("one", "zero1", "zero3")
    )
    three = zero(3, **IN_PARTS)
    changed: Any = {"callbacks": [FrozenChanges()]}
    equal: Any = {"rollout_func": of_equal_length}
    turns: Any = {"callbacks": [LayerSchedule([1, 2], every=2)]}
    damaged: Any = {
        recorded: {
            "callbacks": [CheckpointLosesFrozen(Path(by_zero3) / "global_step3", recorded=recorded)]
        }
        for recorded in (True, False)
    }
    changes = {
        "zero1": {**zero(1), **SAVING},
        "zero2": zero(2),
        "zero1-auto": {**zero(1), **AUTO2},
        "zero1-probe": {**zero(1), **PROBE2},
        "zero1-half": {**zero(1), **HALF, "bf16": True},
        "resumed": {**zero(1), "resume": by_zero1},
        "foreign": {**zero(1), "resume": by_one},
        "zero3": {**three, **SAVING},
        "zero3-gathered": example(),
        "zero3-path": {**three, "loads": False},
        "zero3-resumed": {**three, "resume": by_zero3},
        "zero3-path-resumed": {**three, "loads": False, "resume": by_zero3},
        "zero3-full": {**three, "selection": "full"},
        "zero3-synced": {**three, **SYNCED},
        "zero3-iterated": {**three, **TWICE},
        "zero3-accumulated": {
            **three,
            "arguments": equal,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
        },
        "zero3-best": {**three, **BEST, "per_device_eval_batch_size": 4},
        "zero3-half": {**three, **HALF, "bf16": True},
        "zero3-schedule": {**three, "selection": [1, 2], "arguments": turns},
        "zero3-auto": {**three, "selection": "auto"},
        "zero3-generated": {**three, "arguments": {"rollout_func": None}, "max_steps": 2},
        "zero3-changed": {**three, "arguments": changed},
        "zero3-evaluated": {**three, **EVALUATED},
        "zero3-to-zero1": {**zero(1), "resume": by_zero3},
        "zero1-bf16": {**zero(1), "bf16": True},
        "zero3-bf16": {**three, "bf16": True},
        "zero3-path-bf16": {**three, "loads": False, "bf16": True},
        "zero3-optimizer": {"deepspeed": {**three["deepspeed"], "optimizer": {"type": "AdamW"}}},
        "zero1-to-zero3": {**three, "resume": by_zero1},
        "zero3-damaged": {**three, "arguments": damaged[True], "resume": by_zero3},
        "zero3-lost": {**three, "arguments": damaged[False], "resume": by_zero3},
    }
    jobs = {name: job(folder, name, 2, **changed) for name, changed in changes.items()}
    variables = {"DS_ACCELERATOR": "cpu"}
    return launch(folder / "jobs", jobs, num_processes=2, environment=variables)


LIKE_ONE = ["zero1", "zero2", "resumed", "zero3", "zero3-gathered", "zero3-path", "zero3-resumed"]
LIKE_ONE += ["zero3-path-resumed", "zero3-synced", "zero3-iterated", "zero3-accumulated"]


@pytest.mark.parametrize("name", [*LIKE_ONE, "zero3-best"])
def test_trains_the_layer_as_one_process_does(folder, found, one, name):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    expected = one.get(name.removeprefix("zero3-"), one["layer"])
    before = base.state_dict()
    layer = {name for name in before if in_layers(name, [LAYER])}
    for process in found[name]:
        assert not isinstance(process, str), process
        assert process["wrapper"] == "DeepSpeedEngine"
        assert process["replays"]
        weights = process["weights"]
        assert {n for n in before if not weights[n].equal(before[n])} == layer
        assert distance(weights, expected["weights"]) <= 1e-5
        for now, then in zip(process["log"], expected["log"], strict=True):
            for key in ("kl", "grad_norm", f"layerrl/relative_update/layer_{LAYER}"):
                if key in then and key in now:  # ZeRO has no gradients left for some
                    assert now[key] == pytest.approx(then[key], rel=1e-3, abs=1e-9), key
    load_delta(base, folder / name / "delta")
    assert distance(base.state_dict(), expected["weights"]) <= 1e-5
    model = AutoModelForCausalLM.from_pretrained(folder / name / "model", dtype=torch.float32)
    assert distance(model.state_dict(), expected["weights"]) <= 1e-5


def test_a_checkpoint_whose_deletion_was_cut_off_in_a_file_of_deepspeed_s_is_incomplete(
    folder, found, tmp_path
):
    assert found
    checkpoint = Path(shutil.copytree(folder / "zero1" / "checkpoint-3", tmp_path / "checkpoint-3"))
    assert not why_incomplete(checkpoint)
    names = [f"global_step3/{path.name}" for path in (checkpoint / "global_step3").iterdir()]
    assert names
    for name in names:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).unlink()
        assert f"it lacks {name};" in why_incomplete(checkpoint)
        (checkpoint / name).write_bytes(content)


def test_does_not_take_a_checkpoint_written_without_it(found):
    for error in found["foreign"]:
        assert "was written without DeepSpeed and this run is with it" in error


def test_layers_are_chosen_as_in_one_process(found, one):
    for process in found["zero1-auto"]:
        assert not isinstance(process, str), process
        assert process["report"].scores == pytest.approx(one["auto"]["report"].scores, rel=1e-3)
        assert distance(process["weights"], one["auto"]["weights"]) <= 1e-5


def test_a_probe_by_gradients_is_that_of_one_process(found, one):
    for report in found["zero1-probe"]:
        assert not isinstance(report, str), report
        assert report.scores == pytest.approx(one["probe"].scores, rel=1e-3)


@pytest.mark.parametrize("name", ["zero1-half", "zero3-half"])
def test_loses_no_small_steps_of_a_model_in_half_precision(folder, found, one, name):
    """But for elements next to where one rounds up and another down."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    before, expected = base.state_dict(), one["half"]["weights"]
    for process in found[name]:
        assert not isinstance(process, str), process
        weights = process["weights"]
        moved = {n: (weights[n] != before[n]).sum().item() for n in before}
        assert {n for n, count in moved.items() if count} <= {
            n for n in before if in_layers(n, [LAYER])
        }
        assert sum(moved.values()) > 400
        assert sum((weights[n] != expected[n]).sum().item() for n in before) < 20


@pytest.mark.parametrize("name", ["zero1-bf16", "zero3-bf16", "zero3-path-bf16"])
def test_does_not_let_deepspeed_round_what_is_frozen(found, name):
    for error in found[name]:
        assert "DeepSpeed would cast the model from torch.float32 to torch.bfloat16" in error


def test_an_evaluation_that_shards_the_model_looks_at_it_before(found):
    for error in found["zero3-evaluated"]:
        assert "frozen tensors are not what they were" in error
        assert FROZEN in error


def test_an_optimizer_of_deepspeed_s_own_is_refused(found):
    for error in found["zero3-optimizer"]:
        assert 'LauncherError: DeepSpeed\'s config has an "optimizer" for layer 2 of 4' in error


class TestZero3:
    """Each process holds a part of every tensor, frozen or trained."""

    def test_trains_the_full_model_as_one_process_does(self, found, one):
        for process in found["zero3-full"]:
            assert not isinstance(process, str), process
            assert distance(process["weights"], one["full"]["weights"]) <= 1e-5

    @pytest.mark.parametrize(("name", "in_parts"), [("zero3", False), ("zero3-path", True)])
    def test_takes_a_model_or_a_path(self, found, name, in_parts):
        """A model is taken apart when training starts, one from a path while it is loaded."""
        for process in found[name]:
            assert process["made_in_parts"] is in_parts

    def test_halves_the_model_and_what_the_optimizer_keeps_of_the_layer(self, found, one):
        for process in found["zero3"]:
            for of, whole in (("local_bytes", 1), ("optimizer_bytes", 2)):  # two moments
                half = whole * one["layer"][of if whole == 1 else "trained_bytes"] / 2
                assert half <= process[of] < 1.01 * half

    def test_checkpoints_hold_the_whole_delta(self, folder, one):
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        expected = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        load_delta(base, folder / "zero3" / "checkpoint-3")
        load_delta(expected, folder / "one" / "checkpoint-3")
        assert distance(base.state_dict(), expected.state_dict()) <= 1e-5

    def test_generates(self, folder, found):
        before = AutoModelForCausalLM.from_pretrained(folder / "base").state_dict()
        for process in found["zero3-generated"]:
            assert not isinstance(process, str), process
            changed = {n for n, t in process["weights"].items() if not t.equal(before[n])}
            assert changed == {name for name in before if in_layers(name, [LAYER])}

    def test_a_change_of_a_frozen_part_is_an_error(self, found):
        for error in found["zero3-changed"]:
            assert "1 of 36 frozen tensors are not what they were" in error
            assert "model.layers.0.mlp.up_proj.weight" in error

    def test_so_is_a_checkpoint_that_lost_the_frozen_tensors(self, found):
        for error in found["zero3-lost"]:
            assert "FrozenTensorError" in error

    def test_a_file_that_is_not_what_was_written_is_named_before(self, found):
        for error in found["zero3-damaged"]:
            assert "global_step3/zero_pp_rank_0_mp_rank_00_model_states.pt is damaged" in error
            assert "its SHA-256 is another (2 of" in error

    def test_ends_with_its_best_checkpoint(self, folder, found):
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        load_delta(base, folder / "zero3-best" / "checkpoint-2")
        for process in found["zero3-best"]:
            assert distance(process["weights"], base.state_dict()) == 0

    def test_layers_that_take_turns_are_refused(self, found):
        for error in found["zero3-schedule"]:
            assert "LayerSchedule was given under DEEPSPEED" in error

    def test_so_is_a_choice_by_gradients(self, found):
        for error in found["zero3-auto"]:
            assert "needs the whole model in each process, and DeepSpeed's ZeRO-3 shards" in error

    def test_does_not_take_a_checkpoint_of_another_stage(self, found):
        for error in found["zero1-to-zero3"]:
            assert "was written without DeepSpeed's ZeRO-3 and this run is with it" in error
        for error in found["zero3-to-zero1"]:
            assert "was written with DeepSpeed's ZeRO-3 and this run is without it" in error
