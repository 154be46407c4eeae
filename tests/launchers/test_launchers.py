"""Several processes that train together end where one process does, on the same global batch.

Every run is in float64, where little but the order of additions can tell them apart.
"""

import json
import re
import shutil
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from layerrl import LayerMaskedGRPOTrainer, LayerSelection, load_delta, select_layers
from layerrl.blocks import unwrap
from layerrl.delta import unload_delta
from layerrl.errors import DeltaError, LauncherError, SelectionError
from layerrl.trainer import LayerSchedule
from layerrl.trainer.agreement import dataset_sizes
from layerrl.trainer.arguments import refuse_cast
from layerrl.trainer.launchers import casts_model, forget_evaluation, refuse_launcher
from tests import processes
from tests.grpo import PROMPTS, config, make
from tests.launchers.launch import launch
from tests.launchers.worker import FROZEN, held, letters, no_reward_for_k, norm
from tests.models import tiny, tiny_config
from tests.runs import bits, in_layers, load, saved

CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"
SAVING = {"save_strategy": "steps", "save_steps": 3}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2}
LAYER = 2
TRAINED = f"model.layers.{LAYER}.mlp.up_proj.weight"
BOOSTED = {
    "selection": select_layers(
        tiny_config("llama", 4), [1, 2], boost={2: 2.0, "mlp": 0.5, (1, "self_attn"): 4.0}
    ),
    "max_steps": 2,
}
# Any rows will do for new ones.
ROWS = {"selection": LayerSelection(num_layers=4, layers=(LAYER,), also=("new_tokens:8-15",))}
ROWS |= {"weight_decay": 0.1}
# Three prompts a batch, the second of which lies in both processes.
AUTO = {"selection": "auto", "num_generations": 2, "max_steps": 3}
AUTO |= {"per_device_train_batch_size": 6}
AUTO2 = {**AUTO, "per_device_train_batch_size": 3}
BY_STEP: Any = {"selection": "auto:step", "max_steps": 4, "arguments": {"reward_funcs": letters}}
BY_STEP, BY_STEP2 = ({**auto, **BY_STEP} for auto in (AUTO, AUTO2))
# Four batches, each as above.
PROBE = {**AUTO, "probes": 12}
PROBE2 = {**AUTO2, "probes": 12}
STEP, STEP2 = ({**probe, "method": "step"} for probe in (PROBE, PROBE2))
HALF = {"dtype": "bfloat16", "max_steps": 2}
MIXED = {"dtype": "float32", "bf16": True, "max_steps": 3}
# Two prompts of six completions, in any number of processes that divides twelve.
MANY = {"num_generations": 6, "max_steps": 2}
DPO, SFT = ({"case": case, "max_steps": 3} for case in ("DPO", "SFT"))
LORA = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "down_proj"])}
LORA = {"arguments": LORA, **SAVING}


def environment(name: str) -> dict[str, str]:
    """What `accelerate launch` sets for one of the examples' configs."""
    arguments = ["--config_file", str(CONFIGS / name), "--main_process_port", "0", "train.py"]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    found = prepare_multi_gpu_env(parsed)
    return {k: v for k, v in found.items() if k.startswith(("FSDP_", "ACCELERATE_"))}


FSDP2 = environment("fsdp2.yaml")
UNEVEN = [{"arguments": {"prefix_cache_bytes": size}} for size in (2**30, 64)]


def schedule() -> dict[str, Any]:
    return {"callbacks": [LayerSchedule([1, 2], every=2)]}


class OtherArguments(TrainerCallback):
    """From a step on, a layer is called with other positions than when it was recorded."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def move(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            if torch.is_grad_enabled():  # this attention asks for the angles, not for these
                kwargs["position_ids"] = kwargs["position_ids"] + 1
            return args, kwargs

        move.__module__ = "accelerate.hooks"  # a launcher's are known to change no results
        if state.global_step == self.step:
            layer = unwrap(kwargs["model"]).get_submodule("model.layers.1")
            layer.register_forward_pre_hook(move, with_kwargs=True)


class FrozenChanges(TrainerCallback):
    """Writes to what this process holds of a frozen tensor, after the first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            held(unwrap(kwargs["model"]).get_parameter(FROZEN)).data.view(-1)[0] += 1


# In place of a training.
ELSEWHERE = [{"calls": name} for name in ("save_delta", "save_model")]
LEFT = [{"calls": name} for name in ("save_delta", None)]
# In the second of two processes alone, and while all save a checkpoint.
CHANGED = [{}, {"arguments": {"callbacks": [FrozenChanges()]}}]
CHANGED = [{"max_steps": 2, "save_strategy": "steps", "save_steps": 2, **c} for c in CHANGED]


class WritesAlone(TrainerCallback):
    """Writes to a trained tensor of this process, after the last step but one."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps - 1:
            unwrap(kwargs["model"]).get_parameter(TRAINED).data.view(-1)[0] += 1


class Asks(TrainerCallback):
    """Asks for something after a step, in the process that it is given to."""

    def __init__(self, **steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, step in self.steps.items():
            if state.global_step == step:
                setattr(control, name, True)


class AsksIn(TrainerCallback):
    """Asks for something in another event."""

    def __init__(self, event: str, name: str, step: int) -> None:
        self.name, self.step = name, step
        setattr(self, event, self.ask)

    def ask(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            setattr(control, self.name, True)


class OwnLoss(LayerMaskedGRPOTrainer):
    """A loss that asks for no log-probabilities."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        logits = model(torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)).logits
        return (logits[:, -1, 0] * inputs["advantages"]).mean()


class LogsAlone(LayerMaskedGRPOTrainer):
    """Logs in the main process, as many scripts do."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        if self.is_world_process_zero():
            super().log(*args, **kwargs)


def texts(number: int, **changes: Any) -> dict[str, Any]:
    rows = {"text": [f"{letter}A" * 3 for letter in "BCDEFGHIJKLMNOPQRSTU"[:number]]}
    return {"case": "SFT", "rows": rows, "per_device_train_batch_size": 1, **changes}


# Evaluations between the steps, before training, and in a run that saves after each.
QUESTIONS: Any = Dataset.from_dict({"prompt": PROMPTS})
EVALUATED = {"arguments": {"eval_dataset": QUESTIONS}}
EVALUATES = {**EVALUATED, **SAVING, "eval_strategy": "steps", "eval_steps": 3}
# In the second of two processes another than in the first.
TURNS: Any = [
    {"selection": [1, 2], "arguments": {"callbacks": [LayerSchedule([1, 2], every=1, seed=seed)]}}
    for seed in (0, 1)
]
ASKS = [Asks(should_evaluate=1, should_training_stop=3), Asks(should_save=2)]
ASKS = [{"arguments": {"callbacks": [asks], "eval_dataset": QUESTIONS}} for asks in ASKS]
ASKS_LATER = [
    Asks(should_evaluate=1), AsksIn("on_evaluate", "should_save", 1),
    Asks(should_save=3), AsksIn("on_save", "should_training_stop", 3),
]  # fmt: skip
ASKS_LATER = [
    {"arguments": {"callbacks": asks, "eval_dataset": QUESTIONS}} for asks in (ASKS_LATER, [])
]
ASKS_AT_THE_END = [
    {"arguments": {"callbacks": callbacks}}
    for callbacks in ([AsksIn("on_epoch_end", "should_save", 5)], [])
]
MORE_QUESTIONS = [
    {"arguments": {"eval_dataset": {"sums": Dataset.from_dict({"prompt": PROMPTS * n})}}}
    for n in (1, 2)
]
# An epoch has ten steps in one process, eight in the other.
OTHER_EPOCHS = [texts(number, max_steps=12) for number in (20, 16)]
OTHER_STEPS = [texts(number, max_steps=-1, num_train_epochs=1) for number in (20, 16)]
# As many batches of both.
SHARDS = [
    texts(number, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=4)
    for number in (17, 18)
]
MORE_ROWS = [
    {"arguments": {"train_dataset": Dataset.from_dict({"prompt": PROMPTS * n})}} for n in (4, 5)
]
TURNS = [{**turns, "ddp_find_unused_parameters": True} for turns in TURNS]


def straying(step: int) -> list[dict[str, Any]]:
    """One of two processes."""
    return [{}, {"arguments": {"callbacks": [OtherArguments(step)]}}]


class Runs:
    """Launches, each with all of its jobs, done when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._failed: dict[str, AssertionError] = {}
        saved(folder / "base", tiny("llama", 4).double())

    @cached_property
    def one(self) -> dict[str, list[Any]]:
        return self._launch(
            "one", 1, layer=SAVING, full={"selection": "full"}, compiled=COMPILED,
            schedule={"selection": [1, 2], "arguments": schedule()}, boosted=BOOSTED, rows=ROWS,
            lora=LORA, auto=AUTO, auto_by_step=BY_STEP, probe=PROBE, step=STEP, dpo=DPO, sft=SFT,
            mixed=MIXED, half=HALF,
        )  # fmt: skip

    @cached_property
    def ddp(self) -> dict[str, list[Any]]:
        assert self.one
        return self._launch(
            "ddp", 2, layer=SAVING, full={"selection": "full"}, compiled=COMPILED, uneven=UNEVEN,
            resumed={"resume": self.checkpoint("one")}, boosted=BOOSTED, rows=ROWS,
            lora=LORA, lora_resumed={**LORA, "resume": self.checkpoint("one", "lora")},
            schedule={
                "selection": [1, 2], "arguments": schedule(), "ddp_find_unused_parameters": True,
            },
            schedule_unset={"selection": [1, 2], "arguments": schedule()},
            asynchronous={"asynchronous": True}, strays=straying(0), strays_later=straying(2),
            auto=AUTO2, auto_by_step=BY_STEP2, probe=PROBE2, step=STEP2, dpo=DPO, sft=SFT,
            mixed=MIXED, half=HALF, changed=CHANGED,
            unrewarded={**PROBE2, "rewards": no_reward_for_k},
            disagree=[{"selection": layer} for layer in (1, 2)],
            disagree_auto=[{"selection": name} for name in ("auto", "all")],
            disagree_by=[{"selection": name} for name in ("auto", "auto:step")],
            disagree_format=[
                {"arguments": {"checkpoint_format": name}} for name in ("delta", "full")
            ],
            damaged={"resume": self.damaged},
            left=LEFT,  # the last, as the second process has ended then
        )  # fmt: skip

    @cached_property
    def apart(self) -> dict[str, list[Any]]:
        """What a script gives to one of two processes alone."""
        assert self.one
        (self.folder / "apart" / "taken" / "called").mkdir(parents=True)
        return self._launch(
            "apart", 2, evaluated={**EVALUATED, "evaluates": True}, evaluates=EVALUATES,
            other_weights=[{}, {"base": str(self.other_base)}],
            other_dtype=[{}, {"dtype": "float32"}],
            other_buffers=[{"buffer": [1.0] * length} for length in (3, 4)],
            own_loss={**BY_STEP2, "trainer": OwnLoss, "beta": 0.0},
            writes=[{}, {"arguments": {"callbacks": [WritesAlone()]}}],
            turns=TURNS, turns_in_one=[TURNS[0], {**TURNS[0], "arguments": {}}],
            resumed_in_one=[{"resume": self.checkpoint("one")}, {}],
            taken={"calls": "save_delta"}, asks=ASKS, more_rows=MORE_ROWS,
            other_epochs=OTHER_EPOCHS, other_steps=OTHER_STEPS, shards=SHARDS,
            logs_alone={"trainer": LogsAlone}, asks_later=ASKS_LATER,
            asks_at_the_end=ASKS_AT_THE_END, more_questions=MORE_QUESTIONS,
        )  # fmt: skip

    @cached_property
    def apart_fsdp2(self) -> dict[str, list[Any]]:
        return self._launch(
            "apart-fsdp2", 2, FSDP2, evaluates=EVALUATES, asks=ASKS,
            other_float8=[{"buffer": [value]} for value in (1.0, 2.0)],
            other_weights=[{}, {"base": str(self.other_base)}],
        )  # fmt: skip

    @cached_property
    def fsdp2(self) -> dict[str, list[Any]]:
        assert self.ddp
        return self._launch(
            "fsdp2", 2, FSDP2, layer=SAVING, full={"selection": "full"}, compiled=COMPILED,
            uneven=UNEVEN, resumed={"resume": self.checkpoint("ddp")}, boosted=BOOSTED,
            generated={"arguments": {"rollout_func": None}, "max_steps": 2},
            schedule={"selection": [1, 2], "arguments": schedule()},
            half=HALF, asynchronous={"asynchronous": True},
            strays=straying(0), strays_later=straying(2),
            rows=ROWS, changed=CHANGED, auto=AUTO2, auto_by_step=BY_STEP2, probe=PROBE2,
            step=STEP2, dpo=DPO, sft=SFT,
            elsewhere=ELSEWHERE,
            lora=LORA, lora_resumed={**LORA, "resume": self.checkpoint("fsdp2", "lora")},
            lora_of_ddp={**LORA, "resume": self.checkpoint("ddp", "lora")},
            deltas={"deltas": self.deltas},
        )  # fmt: skip

    @cached_property
    def mixed(self) -> dict[str, list[Any]]:
        return self._launch(
            "mixed", 2, {**FSDP2, "ACCELERATE_MIXED_PRECISION": "bf16"}, mixed=MIXED
        )

    def many(self, num_processes: int, variables: Any = None) -> dict[str, list[Any]]:
        size = {**MANY, "per_device_train_batch_size": 12 // num_processes}
        jobs = {"layer": size, "auto": {**size, "selection": "auto"}}
        return self._launch(f"many-{num_processes}", num_processes, variables, **jobs)

    @cached_property
    def efficient(self) -> dict[str, list[Any]]:
        variables = {**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
        return self._launch("efficient", 2, variables, layer={})

    @cached_property
    def fsdp1(self) -> dict[str, list[Any]]:
        variables = {
            **FSDP2,
            "FSDP_VERSION": "1",
            "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD",
            "FSDP_SYNC_MODULE_STATES": "false",  # which would look for a GPU
        }
        return self._launch("fsdp1", 2, variables, layer={})

    @cached_property
    def again(self) -> dict[str, list[Any]]:
        assert self.fsdp2
        return self._launch("again", 1, resumed={"resume": self.checkpoint("fsdp2")})

    @property
    def deltas(self) -> list[str]:
        """Of one layer, and of two."""
        return [str(self.folder / "one" / job / "delta") for job in ("layer", "boosted")]

    @property
    def other_base(self) -> Path:
        """One that was made from another seed: a frozen and a trained tensor differ."""
        folder = self.folder / "other"
        if not folder.exists():
            model = tiny("llama", 4).double()
            for name in (FROZEN, TRAINED):
                model.get_parameter(name).data.normal_(std=0.02)
            saved(folder, model)
        return folder

    @property
    def damaged(self) -> str:
        """A checkpoint in which only a file has changed that nothing but its checksum tells of."""
        folder = self.folder / "damaged"
        if not folder.exists():
            shutil.copytree(self.checkpoint("one"), folder)
            with (folder / "config.json").open("a") as file:
                file.write("\n")
        return str(folder)

    def checkpoint(self, launched: str, job: str = "layer") -> str:
        return str(self.folder / launched / job / "checkpoint-3")

    def _launch(
        self, name: str, num_processes: int, variables: Any = None, **jobs: Any
    ) -> dict[str, list[Any]]:
        def job(of: str, changes: dict[str, Any]) -> dict[str, Any]:
            return {
                "base": str(self.folder / "base"),
                "output": str(self.folder / name / of),
                "selection": LAYER,
                "per_device_train_batch_size": 8 // num_processes,
                **changes,
            }

        whole = {
            of: [job(of, c) for c in changes] if isinstance(changes, list) else job(of, changes)
            for of, changes in jobs.items()
        }
        if name in self._failed:  # not another one for each test, onto what the first left
            raise self._failed[name]
        try:
            return launch(
                self.folder / name, whole, num_processes=num_processes, environment=variables
            )
        except AssertionError as error:
            self._failed[name] = error
            raise


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("launchers"))


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative distance of any tensor."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - value).norm() / value.norm().clamp(min=1e-300))
        for name, value in expected.items()
    )


def assert_same(found: list[Any], expected: list[Any], tolerance: float) -> None:
    """Weights, optimizer state and what was logged, in every process."""
    [expected] = expected
    for process in found:
        assert not isinstance(process, str), process
        assert distance(process["weights"], expected["weights"]) <= tolerance
        assert distance(process["optimizer"], expected["optimizer"]) <= tolerance
    logs = zip(found[0]["log"], expected["log"], strict=True)
    for now, before in logs:
        for key in ("grad_norm", "kl", "reward", *(k for k in before if "layerrl/" in k)):
            if key in before:
                assert now[key] == pytest.approx(before[key], rel=1e-6, abs=1e-9), key


LAUNCHED = pytest.mark.parametrize("launched", ["ddp", "fsdp2"])
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPLlamaForCausalLM"}


@LAUNCHED
@pytest.mark.parametrize(("job", "tolerance"), [("layer", 1e-12), ("full", 1e-6)])
def test_two_processes_end_where_one_does(runs, launched, job, tolerance):
    found = getattr(runs, launched)[job]
    assert_same(found, runs.one[job], tolerance)
    assert [process["wrapper"] for process in found] == [WRAPPERS[launched]] * 2
    assert [process["replays"] for process in found] == [job == "layer"] * 2


@LAUNCHED
def test_boosts_scale_the_same_rates_as_in_one_process(runs, launched):
    assert_same(getattr(runs, launched)["boosted"], runs.one["boosted"], 1e-12)


@LAUNCHED
def test_adapters_of_chosen_layers_train_and_resume(runs, launched):
    found = getattr(runs, launched)
    assert_same(found["lora"], runs.one["lora"], 1e-12)
    assert [process["replays"] for process in found["lora"]] == [True] * 2
    stored = [
        load_file(Path(runs.checkpoint(name, "lora")) / "adapter_model.safetensors")
        for name in (launched, "one")
    ]
    assert distance(*stored) <= 1e-12
    for error in runs.fsdp2["lora_of_ddp"]:
        assert "adapters, written without FSDP, and this run is with it" in error
    for process in found["lora_resumed"]:
        assert not isinstance(process, str), process
        assert distance(process["weights"], runs.one["lora"][0]["weights"]) <= 1e-12
        assert distance(process["optimizer"], runs.one["lora"][0]["optimizer"]) <= 1e-12


@LAUNCHED
@pytest.mark.parametrize("job", ["layer", "full"])
def test_only_gradients_of_trained_tensors_travel(runs, launched, job):
    """TRL adds a few numbers of its own to each step, for its metrics."""
    [steps] = {found["log"][-2]["step"] for found in getattr(runs, launched)[job]}
    for found in getattr(runs, launched)[job]:
        traffic = found["traffic"]
        reduced = traffic["allreduce_"] + traffic.get("_reduce_scatter_base_", 0)
        assert steps * found["trained_bytes"] <= reduced <= 1.05 * steps * found["trained_bytes"]


@LAUNCHED
@pytest.mark.parametrize("job", ["auto", "auto_by_step"])
def test_layers_are_chosen_as_in_one_process(runs, launched, job):
    """A middle prompt's completions lie in both: three a process, two a prompt."""
    found, [expected] = getattr(runs, launched)[job], runs.one[job]
    assert_same(found, [expected], 1e-6)
    assert [process["wrapper"] for process in found] == [WRAPPERS[launched]] * 2
    assert_same_report([process["report"] for process in found], expected["report"])


@LAUNCHED
@pytest.mark.parametrize("job", ["probe", "step"])
def test_a_probe_from_rollouts_is_that_of_one_process(runs, launched, job):
    assert_same_report(getattr(runs, launched)[job], *runs.one[job])


def assert_same_report(found: list[Any], expected: Any) -> None:
    """The same in every process, and that of one but for the order of additions."""
    rounding = {"gradient": 1e-6, "step": 1e-4}[expected.method]  # a step is measured in float32
    largest = max(abs(score) for layer in expected.layers for score in layer.scores[0])
    for report in found:
        assert not isinstance(report, str), report
        for now, before in zip(report.layers, expected.layers, strict=True):
            assert now.scores[0] == pytest.approx(before.scores[0], rel=0, abs=rounding * largest)
        of_batch: Any = {"args": None}  # a process's size of a batch and its rank
        assert {**report.settings, **of_batch} == {**expected.settings, **of_batch}
        assert report.layers == found[0].layers


def test_a_completion_without_reward_is_told_in_every_process(runs):
    for error in runs.ddp["unrewarded"]:
        assert "completions got no reward" in error
    with_prompt = ["for the prompt" in error for error in runs.ddp["unrewarded"]]
    assert any(with_prompt)


@pytest.mark.slow
def test_more_processes_end_where_one_does(runs):
    """Three cannot share sixteen rows of a weight evenly."""
    expected = runs.many(1)
    scores = expected["auto"][0]["report"].scores
    for found in (runs.many(3, FSDP2), runs.many(4)):
        assert_same(found["layer"], expected["layer"], 1e-6)
        assert_same(found["auto"], expected["auto"], 1e-6)
        for process in found["auto"]:
            assert process["report"].scores == pytest.approx(scores)


@pytest.mark.parametrize("launched", ["ddp", pytest.param("mixed", marks=pytest.mark.slow)])
def test_mixed_precision_trains_as_in_one_process_but_for_rounding(runs, launched):
    """A step of 1e-3 that bfloat16 gives another sign changes an element by 2e-3."""
    base = AutoModelForCausalLM.from_pretrained(runs.folder / "base", dtype=torch.float32)
    before, [expected] = base.state_dict(), runs.one["mixed"]
    for process in getattr(runs, launched)["mixed"]:
        assert not isinstance(process, str), process
        assert process["replays"]
        weights = process["weights"]
        changed = {name for name, value in weights.items() if not value.equal(before[name])}
        assert changed == {name for name in before if in_layers(name, [LAYER])}
        assert {value.dtype for value in weights.values()} == {torch.float32}
        moved = distance(before, expected["weights"])
        assert distance(weights, expected["weights"]) < 0.2 * moved


@LAUNCHED
def test_half_precision_is_stepped_in_float32(runs, launched):
    """Gradients are rounded once more on their way: the masters agree as far as those do."""
    [expected] = runs.one["half"]
    for process in getattr(runs, launched)["half"]:
        assert not isinstance(process, str), process
        masters = {k for k in process["optimizer"] if k.endswith(": master")}
        assert masters
        assert {process["optimizer"][name].dtype for name in masters} == {torch.float32}
        assert distance(process["weights"], expected["weights"]) < 1e-2


@LAUNCHED
@pytest.mark.parametrize(("job", "tolerance"), [("dpo", 1e-6), ("sft", 1e-12)])
def test_trainers_that_do_not_generate_end_where_one_process_does(runs, launched, job, tolerance):
    """DPO pads a batch's pairs, and angles of positions are in float32."""
    found = getattr(runs, launched)[job]
    assert_same(found, runs.one[job], tolerance)
    assert [process["replays"] for process in found] == [job == "dpo"] * 2


def test_new_tokens_alone_move_in_two_processes(runs):
    # The head's own gradient agrees as float32 does: what TRL sums it over, two processes share.
    assert_same(runs.ddp["rows"], runs.one["rows"], 1e-6)
    name, [one] = "model.embed_tokens.weight", runs.one["rows"]
    for process in runs.ddp["rows"]:
        assert distance({name: process["weights"][name]}, {name: one["weights"][name]}) <= 1e-12
    base = AutoModelForCausalLM.from_pretrained(runs.folder / "base", dtype=torch.float64)
    before = base.get_input_embeddings().weight
    moved = {*range(8, 16)}
    for process in runs.ddp["rows"]:
        now = process["weights"]["model.embed_tokens.weight"]
        assert {*(now != before).any(dim=1).nonzero().flatten().tolist()} == moved
    for error in runs.fsdp2["rows"]:
        assert "LauncherError" in error
        assert "also new_tokens:8-15 under FSDP or DeepSpeed" in error


def test_deltas_are_switched_in_a_model_that_fsdp2_shards(runs, monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    for found in runs.fsdp2["deltas"]:
        assert not isinstance(found, str), found
        model = load(runs.folder / "base", torch.float64)
        for delta, names in (
            (None, ["use None", "after Deltas", "disabled", "unloaded"]),
            (runs.deltas[0], ["use first", "loaded", "after disabled"]),
            (runs.deltas[1], ["use second"]),
        ):
            if delta is not None:
                load_delta(model, delta)
            with torch.no_grad():
                logits = model(torch.arange(4, 12)[None]).logits
            for name in names:
                assert_close(found[name], {"logits": logits, **bits(model)}, rtol=0, atol=0)
            if delta is not None:
                unload_delta(model)


def test_fsdp2_leaves_each_process_half_of_the_model(runs):
    for found, expected in ((runs.fsdp2, 0.5), (runs.ddp, 1.0)):
        for process in found["layer"]:
            assert process["local_bytes"] == expected * runs.one["layer"][0]["local_bytes"]


@LAUNCHED
def test_processes_that_could_not_all_replay_agree_not_to(runs, launched):
    """One more pass in one of them would leave both waiting for each other."""
    found = getattr(runs, launched)["uneven"]
    assert [process["replays"] for process in found] == [False, False]
    assert_same(found, runs.one["layer"], 1e-12)


@LAUNCHED
@pytest.mark.parametrize(("job", "replays"), [("strays", False), ("strays_later", True)])
def test_processes_of_which_one_has_to_start_a_pass_again_all_do(runs, launched, job, replays):
    """It runs the layers that the others skip, and would gather them alone."""
    found = getattr(runs, launched)[job]
    assert_same(found, runs.one["layer"], 1e-12)
    assert [process["replays"] for process in found] == [replays] * 2


@LAUNCHED
def test_a_frozen_tensor_that_changes_in_one_process_is_an_error_in_all(runs, launched):
    """The others would wait for it in the next collective."""
    errors = getattr(runs, launched)["changed"]
    for error in errors:
        assert "frozen tensors are not what they were" in error
        assert FROZEN in error
    assert errors[0].startswith("FrozenTensorError: process 1 found: 1 of")


def test_an_evaluation_before_training_leaves_processes_together(runs):
    """Accelerate would take a model that was evaluated for one that DDP has wrapped."""
    found = runs.apart["evaluated"]
    assert [process["wrapper"] for process in found] == [WRAPPERS["ddp"]] * 2
    for process in found:
        assert distance(process["weights"], runs.one["layer"][0]["weights"]) <= 1e-12


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_wrapper_that_was_put_around_an_evaluated_model_stays(wrapped):
    """Of the autocast that accelerate puts around a forward, in a stand-in for two processes."""
    model = tiny("llama", 2)
    accelerator = Accelerator()
    accelerator.native_amp = True  # its state may be another test's, and cannot have it anew
    prepared: Any = accelerator.prepare_model(model, evaluation_mode=True)
    prepared._is_accelerate_prepared = True
    forward, own = model.forward, model._original_forward
    if wrapped:
        model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    now = model.forward
    two: Any = SimpleNamespace(num_processes=2, state=SimpleNamespace())
    trainer = SimpleNamespace(model=model, model_wrapped=model, accelerator=two)
    forget_evaluation(trainer)
    assert not hasattr(model, "_is_accelerate_prepared")
    assert model.forward == (now if wrapped else own)


@pytest.mark.parametrize("launched", ["apart", "apart_fsdp2"])
def test_an_evaluation_changes_nothing_that_is_frozen(runs, launched):
    """FSDP2 leaves some tensors gathered after a pass without a backward."""
    for process in getattr(runs, launched)["evaluates"]:
        assert not isinstance(process, str), process
        assert distance(process["weights"], runs.one["layer"][0]["weights"]) <= 1e-12


@pytest.mark.parametrize("launched", ["apart", "apart_fsdp2"])
def test_processes_that_were_given_other_weights_train_the_first_ones(runs, launched):
    """The reference and what is frozen included, of which each process keeps a record."""
    assert_same(getattr(runs, launched)["other_weights"], runs.one["layer"], 1e-12)
    log = (runs.folder / launched.replace("_", "-") / "log-0.txt").read_text()
    assert f"other weights than process 0 (in 2 of 39 tensors: {FROZEN}, {TRAINED})" in log


def test_processes_that_were_given_another_model_are_told(runs):
    for error in (*runs.apart["other_dtype"], *runs.apart["other_buffers"]):
        assert "LauncherError: process 1 was given another model than process 0" in error


def test_processes_share_numbers_that_few_backends_send(runs):
    for process in runs.apart_fsdp2["other_float8"]:
        assert not isinstance(process, str), process
        weights = process["weights"]
        assert weights.pop("model.layers.0.scales").float().tolist() == [1]
        assert distance(weights, runs.one["layer"][0]["weights"]) <= 1e-12


def test_processes_fall_back_together_where_a_loss_cannot_be_scored(runs):
    reports = [process["report"] for process in runs.apart["own_loss"]]
    assert [report.method for report in reports] == ["position"] * 2
    assert reports[0].layers == reports[1].layers


def test_processes_that_part_are_warned_of(runs):
    assert not isinstance(runs.apart["writes"][0], str), runs.apart["writes"][0]
    log = (runs.folder / "apart" / "log-0.txt").read_text()
    assert "processes 0 and 1 no longer train the same model: 1 of 9 trained tensors" in log


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ("turns", r"different callbacks=: .*'seed': 0}\], process 1 .*'seed': 1}\]"),
        ("turns_in_one", r"different callbacks=: .*'seed': 0}\], process 1 \[\]"),
        ("more_rows", r"different train_dataset=: process 0 of 16 rows, process 1 of 20 rows"),
        (
            "more_questions",
            r"different eval_dataset=: process 0 sums of 4 rows, process 1 sums of 8",
        ),
        ("other_steps", r"different train_dataset=: process 0 for 10 steps, process 1 for 8 steps"),
        ("resumed_in_one", r"different resume_from_checkpoint=: process 0 checkpoint-3, .* None"),
    ],
)
def test_processes_that_would_train_differently_are_told(runs, job, said):
    for error in runs.apart[job]:
        assert re.search("LauncherError: 2 processes were given " + said, error)


@pytest.mark.parametrize("launched", ["apart", "apart_fsdp2"])
def test_what_a_callback_of_one_process_asks_for_all_do(runs, launched):
    assert runs.one
    for process in getattr(runs, launched)["asks"]:
        assert not isinstance(process, str), process
        assert [row["step"] for row in process["log"] if "eval_loss" in row] == [1]
        assert max(row["step"] for row in process["log"]) == 3
    folder = runs.folder / launched.replace("_", "-") / "asks"
    assert (folder / "checkpoint-2" / "delta.safetensors").exists()
    ends = (folder / "delta", Path(runs.checkpoint("one")))
    found, expected = (load_file(end / "delta.safetensors") for end in ends)
    assert distance(found, expected) <= 1e-12


@pytest.mark.parametrize(("job", "steps"), [("other_epochs", 12), ("shards", 6), ("logs_alone", 5)])
def test_processes_may_differ_in_what_no_other_waits_for(runs, job, steps):
    for process in runs.apart[job]:
        assert not isinstance(process, str), process
    assert runs.apart[job][0]["log"][-1]["step"] == steps


def test_processes_ask_together_whenever_one_asks(runs):
    """After what another callback has asked for."""
    for process in runs.apart["asks_later"]:
        assert not isinstance(process, str), process
        assert [row["step"] for row in process["log"] if "eval_loss" in row] == [1]
        assert max(row["step"] for row in process["log"]) == 3
    folder = runs.folder / "apart" / "asks_later"
    assert sorted(path.name for path in folder.glob("check*")) == ["checkpoint-1", "checkpoint-3"]
    ends = (folder / "checkpoint-3", Path(runs.checkpoint("one")))
    found, expected = (load_file(end / "delta.safetensors") for end in ends)
    assert distance(found, expected) <= 1e-12


def test_processes_save_together_at_the_end_of_an_epoch(runs):
    for process in runs.apart["asks_at_the_end"]:
        assert not isinstance(process, str), process
    folder = runs.folder / "apart" / "asks_at_the_end"
    assert [path.name for path in folder.glob("check*")] == ["checkpoint-5"]


def test_rows_that_a_loader_of_the_user_may_ignore_are_not_compared(tmp_path):
    class OwnLoader(LayerMaskedGRPOTrainer):
        def get_train_dataloader(self) -> Any:
            return super().get_train_dataloader()

    trainer = make(tiny("llama", 3), tmp_path, selection=1, arguments={"eval_dataset": QUESTIONS})
    assert dataset_sizes(trainer) == {
        "train_dataset": "of 16 rows", "eval_dataset": "of 4 rows",
    }  # fmt: skip
    trainer = make(tiny("llama", 3), tmp_path, selection=1, trainer=OwnLoader)
    assert dataset_sizes(trainer) == dict.fromkeys(("train_dataset", "eval_dataset"), "of any size")


def test_a_delta_that_cannot_be_written_is_an_error_in_all(runs):
    """The others would wait for the one that writes."""
    folder = runs.folder / "apart" / "taken" / "called"
    first, second = runs.apart["taken"]
    assert first.startswith(f"DeltaError: {folder} exists already")
    assert second.startswith(f"DeltaError: process 0 found: {folder} exists already")


def test_processes_that_wait_in_different_places_are_told_where(runs):
    for error in runs.fsdp2["elsewhere"]:
        assert "LauncherError: processes wait for each other in different places" in error
        assert "process 0 in save_delta(), process 1 in save_model()" in error


def test_a_process_that_waits_for_one_that_has_ended_is_told_where(runs):
    error, _ = runs.ddp["left"]
    assert "LauncherError: process 0 waited in save_delta(), where another did not come" in error


@LAUNCHED
def test_a_compiled_model_ends_where_it_would_uncompiled(runs, launched):
    assert_same(getattr(runs, launched)["compiled"], runs.one["compiled"], 1e-12)


def test_compiling_changes_nothing_in_one_process(runs):
    [compiled], [plain] = runs.one["compiled"], runs.one["layer"]
    assert compiled["wrapper"] == "OptimizedModule"
    assert compiled["replays"]
    for step in (0, 1):
        for key in ("grad_norm", "kl", "loss"):
            assert compiled["log"][step][key] == pytest.approx(plain["log"][step][key], rel=1e-12)


@LAUNCHED
def test_asynchronous_trainers_send_everything_once_and_then_the_layer(runs, launched):
    pytest.importorskip(
        "trl.experimental.async_grpo", reason="it needs aiohttp", exc_type=ImportError
    )
    found = getattr(runs, launched)["asynchronous"]
    for process in found:
        assert not isinstance(process, str), process
        assert process["wrapper"] == WRAPPERS[launched]
        assert distance(process["weights"], found[0]["served"]) == 0
    everything = list(found[0]["weights"])
    layer = [name for name in everything if in_layers(name, [LAYER])]
    assert found[0]["sent"] == [everything, layer, layer]


class TestCheckpoints:
    """Of any number of processes, sharded or not, are those of one process."""

    @pytest.mark.parametrize("launched", ["ddp", "fsdp2", "again"])
    def test_resume_under_another_launcher(self, runs, launched):
        found = getattr(runs, launched)["resumed"]
        expected = runs.one["layer"]
        [whole] = expected
        for process in found:
            if isinstance(process, str) and "tagged with cpu:0" in process:
                pytest.skip(
                    "this accelerate numbers CPUs, and torch loads nothing to a numbered one"
                )
            assert distance(process["weights"], whole["weights"]) <= 1e-12
            assert distance(process["optimizer"], whole["optimizer"]) <= 1e-12
            assert process["log"][4]["grad_norm"] == pytest.approx(whole["log"][4]["grad_norm"])

    def test_are_read_for_damage_by_one_process(self, runs):
        errors = runs.ddp["damaged"]
        assert "config.json is damaged or was changed" in errors[0]
        assert errors[1] == errors[0].replace("Error: ", "Error: process 0 found: ", 1)

    @LAUNCHED
    def test_hold_the_same_files_and_tensors(self, runs, launched):
        found, expected = (Path(runs.checkpoint(name)) for name in (launched, "one"))
        files = [
            {
                str(file.relative_to(folder))
                for file in folder.rglob("*")
                if file.is_file() and not file.name.startswith("rng_state")
            }
            for folder in (found, expected)
        ]
        assert files[0] == files[1]
        for name in ("delta.safetensors", "reference.safetensors"):
            assert distance(load_file(found / name), load_file(expected / name)) <= 1e-12
        assert json.loads((found / "config.json").read_text())["architectures"] == [
            "LlamaForCausalLM"
        ]

    @LAUNCHED
    @pytest.mark.parametrize("job", ["layer", "full"])
    def test_so_are_models_and_deltas(self, runs, launched, job):
        folder = runs.folder / launched / job
        expected = runs.one[job][0]["weights"]
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
        assert distance(model.state_dict(), expected) <= 1e-6
        base = AutoModelForCausalLM.from_pretrained(runs.folder / "base", dtype=torch.float64)
        load_delta(base, folder / "delta")
        assert distance(base.state_dict(), expected) <= 1e-6

    def test_of_deepspeed_are_refused_without_it(self, runs, tmp_path):
        shutil.copytree(runs.checkpoint("one"), tmp_path / "checkpoint-3")
        (tmp_path / "checkpoint-3" / "latest").write_text("global_step3")
        model = AutoModelForCausalLM.from_pretrained(runs.folder / "base", dtype=torch.float64)
        trainer = make(model, tmp_path, selection=LAYER, beta=0.04)
        with pytest.raises(DeltaError, match=r"written with DeepSpeed and this run is without it"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    def test_with_a_whole_model_of_fsdp_are_refused_without_it(self, tmp_path):
        trainer = make(tiny("llama", 3), tmp_path, selection="full", max_steps=1)
        (tmp_path / "checkpoint-1").mkdir()
        (tmp_path / "checkpoint-1" / "pytorch_model_fsdp.bin").touch()
        with pytest.raises(DeltaError, match=r"whole model, .* written with FSDP, .* without it"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


class TestFSDP2:
    def test_generates_with_the_sharded_model(self, runs):
        base = AutoModelForCausalLM.from_pretrained(runs.folder / "base", dtype=torch.float64)
        before = base.state_dict()
        for process in runs.fsdp2["generated"]:
            assert not isinstance(process, str), process
            changed = {n for n, t in process["weights"].items() if not t.equal(before[n])}
            assert changed == {name for name in before if in_layers(name, [LAYER])}

    def test_may_load_the_weights_in_one_process(self, runs):
        assert_same(runs.efficient["layer"], runs.one["layer"], 1e-12)


class TestRefused:
    def test_fsdp1(self, runs):
        for error in runs.fsdp1["layer"]:
            assert "LauncherError: FSDP1 was given for layer 2 of 4" in error
            assert "fsdp_version: 2" in error

    @pytest.mark.parametrize("plugin", ["fsdp_plugin", "deepspeed_plugin"])
    def test_a_quantised_base_in_parts(self, plugin):
        launcher: Any = SimpleNamespace(state=SimpleNamespace(**{plugin: object()}))
        selection = select_layers(tiny("llama", 3), 1)
        with pytest.raises(LauncherError, match="a quantised base was given for layer 1 of 3"):
            refuse_launcher(selection, launcher, quantised=True)

    @pytest.mark.parametrize(
        ("settings", "shown"),
        [
            ({"offload_param": {"device": "cpu"}}, "offload_param: cpu"),
            ({"zero_hpz_partition_size": 2}, "zero_hpz_partition_size: 2"),
            ({"zero_quantized_weights": True}, "zero_quantized_weights: True"),
            ({"offload_param": {"device": "none"}, "mics_shard_size": 2}, "mics_shard_size: 2"),
        ],
    )
    def test_zero3_with_parts_elsewhere(self, settings, shown):
        plugin = SimpleNamespace(zero_stage=3, deepspeed_config={"zero_optimization": settings})
        launcher: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
        selection = select_layers(tiny("llama", 3), 1)
        with pytest.raises(LauncherError, match=f"for layer 1 of 3 with {shown}, which"):
            refuse_launcher(selection, launcher, quantised=False)

    def test_deepspeed_that_rounds_what_is_frozen(self, tmp_path):
        plugin = SimpleNamespace(zero_stage=1, deepspeed_config={})
        launcher: Any = SimpleNamespace(
            state=SimpleNamespace(deepspeed_plugin=plugin), mixed_precision="bf16"
        )
        model, args = tiny("llama", 3), config(tmp_path, bf16=True)
        with pytest.raises(SelectionError, match=r"DeepSpeed would cast .* torch.float32 to torch"):
            refuse_cast(args, model, casts_model(launcher))
        refuse_cast(args, model.to(torch.bfloat16), casts_model(launcher))
        launcher.mixed_precision = "no"
        refuse_cast(args, model.float(), casts_model(launcher))

    @pytest.mark.parametrize("stage", [1, 3])
    def test_an_optimizer_of_deepspeed_s_own(self, stage):
        config = {"zero_optimization": {}, "optimizer": {"type": "AdamW"}}
        plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=config)
        launcher: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
        selection = select_layers(tiny("llama", 3), 1)
        with pytest.raises(LauncherError, match='config has an "optimizer" for layer 1 of 3'):
            refuse_launcher(selection, launcher, quantised=False)

    def test_processes_that_disagree(self, runs):
        for error in runs.ddp["disagree"]:
            assert "different selection=: process 0 layer 1 of 4, process 1 layer 2 of 4" in error
        for error in runs.ddp["disagree_auto"]:
            assert "process 0 auto:1, process 1 layers 0-3 of 4" in error
        for error in runs.ddp["disagree_by"]:
            assert "process 0 auto:1, process 1 auto:1:step" in error
        for error in runs.ddp["disagree_format"]:
            assert "different checkpoint_format=: process 0 delta, process 1 full" in error

    def test_several_devices_in_one_process(self, tmp_path):
        args = config(tmp_path)
        assert args.device.type == "cpu"
        args._n_gpu = 2
        with pytest.raises((ValueError, LauncherError), match="DataParallel"):  # TRL's own, or ours
            make(tiny("llama", 3), tmp_path, selection=1, arguments={"args": args})

    def test_layers_that_take_turns_unless_ddp_looks_for_unused_parameters(self, runs):
        for error in runs.ddp["schedule_unset"]:
            assert "set ddp_find_unused_parameters=True" in error
        for error in runs.fsdp2["schedule"]:
            assert "LayerSchedule was given under FSDP" in error
        assert_same(runs.ddp["schedule"], runs.one["schedule"], 1e-12)


def test_a_rank_that_waits_for_another_is_shown_where(tmp_path, monkeypatch):
    assert processes.run("-c", "").returncode == 0  # from now on, starting takes no time
    monkeypatch.setattr("tests.launchers.launch.PATIENCE", 8.0)
    job = {"base": str(saved(tmp_path / "base")), "output": str(tmp_path / "out"), "selection": 2}
    two = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    variables = {**two, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with pytest.raises(AssertionError) as raised:
        launch(tmp_path / "launched", {"waits": job}, num_processes=1, environment=variables)
    said = str(raised.value)
    assert "rank 0: waits after 8 s; the end of" in said
    assert re.search(r'worker\.py", line \d+ in (main|run)', said)


class TestConfigs:
    @pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
    def test_are_read_by_accelerate(self, file):
        arguments = ["--config_file", str(file), "train.py"]
        parsed, defaults, _ = _validate_launch_command(
            launch_command_parser().parse_args(arguments)
        )
        assert parsed.num_processes == (1 if file.stem == "one_gpu" else 8)
        assert defaults.use_cpu is False

    def test_of_fsdp2_is_what_these_tests_launch_with(self):
        found = environment("fsdp2.yaml")
        assert found["ACCELERATE_USE_FSDP"] == "true"
        assert found["FSDP_VERSION"] == "2"
        assert found["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
