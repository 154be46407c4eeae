"""What each launched process runs: GRPO whose completions do not depend on how many processes ask.

Started by `tests.launchers.launch`.
"""

import faulthandler
import os
import traceback
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from layerrl import LayerMaskedGRPOTrainer, contribution_probe, load_delta
from layerrl.blocks import is_peft, unwrap
from layerrl.delta import Deltas, disabled, unload_delta
from layerrl.errors import LayerRLError
from tests.grpo import PROMPTS, config, make, tokenizer

COMPLETION = 5
FROZEN = "model.layers.0.mlp.up_proj.weight"
SETTINGS: dict[str, Any] = {
    "max_steps": 5,
    "beta": 0.04,
    "num_generations": 8,
    "learning_rate": 1e-3,
}


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions by prompt, row of the global batch and step, of different lengths."""
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    first_row = trainer.accelerator.process_index * len(prompts)
    completions = []
    for row, prompt in enumerate(ids, start=first_row):
        seed = sum(prompt) + 7 * row + 31 * trainer.state.global_step
        length = 2 + seed % (COMPLETION - 1)
        completions.append([4 + (seed * (k + 3) + k * k) % 60 for k in range(length)])
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def letters(completions: list[str], **_: Any) -> list[float]:
    """A reward for which the gradients of different prompts agree."""
    return [float(sum(letter < "P" for letter in text)) for text in completions]


class Traffic(TorchDispatchMode):
    """Bytes that enter the collectives of this process, by the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            # These also take what they write to: a reduction's whole input is the larger one.
            self.num_bytes[name] += max(sizes) if "_base_" in name else sum(sizes)
        return func(*args, **(kwargs or {}))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded, on every process."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().clone()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, ZeRO-3's parameters hold what they stand for, as DeepSpeed itself gathers it."""
    parameters = [p for p in model.parameters() if hasattr(p, "ds_tensor")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


def held(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter between two passes."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)


def run(
    base: str,
    output: str,
    *,
    selection: Any = None,
    dtype: str = "float64",
    loads: bool = True,
    arguments: dict[str, Any] | None = None,
    resume: str | None = None,
    evaluates: bool = False,
    evaluates_changed: bool = False,
    case: str | None = None,
    calls: str | None = "train",
    probes: int = 0,
    method: str = "gradient",
    rewards: Any = None,
    buffer: list[float] | None = None,
    **changes: Any,
) -> Any:
    """One training, and all that the other processes are asked to agree with.

    `loads`: the model is loaded here; otherwise the trainer does, from its path.
    `calls`: the trainer's method, or none, to call with a folder in place of training.
    `case`: one of `tests.trainers`, in place of GRPO.
    `probes`: prompts of `contribution_probe`, in place of training; `rewards`: its function;
    `method`: its method.
    `buffer`: values of one more, in eight bits.
    `evaluates`: an evaluation comes before the training.
    `evaluates_changed`: a frozen tensor changes, and an evaluation comes before the training.
    """
    unset_hf_deepspeed_config()  # the job before's, for which models would be loaded in parts
    torch.manual_seed(0)  # of the adapters, where a job has some
    configured = {"use_configured_state": "ACCELERATE_USE_FSDP" in os.environ}
    if case is not None:
        from tests.trainers import CASES

        changes |= {"dtype": getattr(torch, dtype), "accelerator_config": configured}
        trainer: Any = CASES[case].make(Path(base), Path(output), selection, **changes)
        return trained(trainer, output, resume)
    settings = {**SETTINGS, **changes}
    if loads:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    else:
        model, settings["model_init_kwargs"] = base, {"dtype": dtype}
    if buffer is not None:
        values = torch.tensor(buffer).to(torch.float8_e4m3fn)
        model.get_submodule("model.layers.0").register_buffer("scales", values)
    settings["accelerator_config"] = configured
    if probes:
        return contribution_probe(
            model,
            method=method,
            reward_funcs=rewards or letters,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4}),
            processing_class=tokenizer(),
            args=config(output, **settings),
            budget=probes,
            trainer_class=partial(LayerMaskedGRPOTrainer, rollout_func=rollout),
        )
    trainer = make(
        model,
        output,
        selection=selection,
        arguments={"rollout_func": rollout, **(arguments or {})},
        **settings,
    )
    if evaluates_changed:
        trainer.model.get_parameter(FROZEN).data.view(-1)[0] += 1
    if evaluates or evaluates_changed:
        trainer.evaluate()
    if calls != "train":
        return calls and getattr(trainer, calls)(str(Path(output) / "called"))
    return trained(trainer, output, resume)


def trained(trainer: Any, output: str, resume: str | None) -> dict[str, Any]:
    """Train, save, and show what came of it."""
    made_in_parts = any(hasattr(p, "ds_tensor") for p in trainer.model.parameters())
    with Traffic() as traffic:
        trainer.train(resume_from_checkpoint=resume)
    if not is_peft(trainer.model):
        trainer.save_delta(Path(output) / "delta")
    trainer.save_model(str(Path(output) / "model"))
    model = unwrap(trainer.model)
    names = {id(p): name for name, p in model.named_parameters()}
    states = list(trainer.optimizer.state.values())
    local_bytes = sum(held(p).nbytes for p in model.parameters())
    with gathered(model):
        weights = {name: whole(tensor) for name, tensor in model.state_dict().items()}
        trained_bytes = sum(p.nbytes for p in trainer.selection.parameters(model).values())
    return {
        "weights": weights,
        "optimizer": {
            f"{names[id(p)]}: {key}": whole(value)
            for p, state in trainer.optimizer.state.items()
            if id(p) in names
            for key, value in state.items()
            if isinstance(value, Tensor)
        },
        "log": trainer.state.log_history,
        "traffic": dict(traffic.num_bytes),
        "optimizer_bytes": sum(held(value).nbytes for value in tree_leaves(states) if value.dim()),
        "local_bytes": local_bytes,
        "trained_bytes": trained_bytes,
        "made_in_parts": made_in_parts,
        "report": trainer.masked_run.auto and trainer.masked_run.auto.report,
        "replays": bool(trainer.masked_run.replay.num_replayed),
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def run_asynchronous(base: str, output: str, *, selection: Any, **_: Any) -> dict[str, Any]:
    """One training of AsyncGRPO, whose main process alone sends what all of them gather."""
    from tests.asynchronous import Server, in_place_of_a_gpu
    from tests.asynchronous import make as make_asynchronous

    # The engine takes the launcher's variables away, which the jobs to come need.
    with (
        mock.patch.dict(os.environ),
        pytest.MonkeyPatch.context() as patch,
        in_place_of_a_gpu(patch),
    ):
        trainer = make_asynchronous(
            Path(base),
            Path(output),
            selection,
            per_device_train_batch_size=2,
            max_steps=2,
            accelerator_config={"use_configured_state": "ACCELERATE_USE_FSDP" in os.environ},
        )
        trainer.train()
    found = {
        "weights": {
            name: whole(tensor) for name, tensor in unwrap(trainer.model).named_parameters()
        },
        "wrapper": type(trainer.model_wrapped).__name__,
    }
    if trainer.accelerator.is_main_process:
        engine = Server.latest.engine
        found |= {"sent": engine.syncs, "served": engine.model.state_dict()}
    return found


def no_reward_for_k(completions: list[str], prompts: list[str], **_: Any) -> list[float | None]:
    """Of rows in one process, while another has none of them."""
    return [None if "k" in prompt else 1.0 for prompt in prompts]


def run_with_deltas(base: str, *, deltas: list[str], **_: Any) -> dict[str, dict[str, Tensor]]:
    """Weights of a model that is sharded while deltas can be switched in it, or is one."""
    found: dict[str, dict[str, Tensor]] = {}

    def note(name: str) -> None:
        with torch.no_grad():  # gathers what the next write must not leave gathered
            logits = model(torch.arange(4, 12)[None]).logits
        weights = {name: whole(tensor) for name, tensor in model.state_dict().items()}
        found[name] = {"logits": whole(logits), **weights}

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    switch = Deltas(model, {"first": deltas[0], "second": deltas[1]})
    for part in (*model.model.layers, model):
        fully_shard(part)
    for name in ("first", "second", None, "first"):
        switch.use(name)
        note(f"use {name}")
    unload_delta(model)
    note("after Deltas")
    load_delta(model, deltas[0])
    note("loaded")
    with disabled(model):
        note("disabled")
    note("after disabled")
    unload_delta(model)
    note("unloaded")
    return found


def let_accelerate_shard_on_a_cpu() -> None:
    """It takes FSDP's settings for any device but this, where it would quietly use DDP."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Llama's norm, in float64 where the model is.

    Its own rounds to float32. A value that other rows in the batch change in its last bit may go
    the other way there: on one machine, and not on the next.
    """
    if hidden_states.dtype != torch.float64:
        return _norm_in_float32(self, hidden_states)
    shape = hidden_states.shape[-1:]
    return nn.functional.rms_norm(hidden_states, shape, self.weight, self.variance_epsilon)


_norm_in_float32 = LlamaRMSNorm.forward


def let_deepspeed_compile_nothing() -> None:
    """It would compile communication through shared memory, which gloo does without."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main(
    folder: Path, jobs: dict[str, dict[str, Any]], environment: dict[str, str], patience: float
) -> None:
    """Do jobs one after the other, and leave what each found in the folder.

    After the seconds of `patience` the stack is logged: of a rank that waits for another one, the
    collective that it waits in.
    """
    os.environ.update(environment)
    rank = environment.get("RANK", "0")
    with (folder / f"log-{rank}.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        faulthandler.dump_traceback_later(patience, file=log)
        LlamaRMSNorm.forward = norm
        if "ACCELERATE_USE_FSDP" in environment:
            let_accelerate_shard_on_a_cpu()
        if "DS_ACCELERATOR" in environment:
            let_deepspeed_compile_nothing()
        for name, job in jobs.items():
            try:
                asynchronous = job.pop("asynchronous", False)
                do = (
                    run_asynchronous
                    if asynchronous
                    else run_with_deltas
                    if "deltas" in job
                    else run
                )
                found: Any = do(**job)
            except (ImportError, LayerRLError, RuntimeError, ValueError) as error:
                traceback.print_exc()
                found = f"{type(error).__name__}: {error}"
            torch.save(found, folder / f"{name}-{rank}.pt")
        faulthandler.cancel_dump_traceback_later()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
