"""What a GPU asks for, as far as a CPU can show it."""

import pickle
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing import assert_close

from layerrl.errors import ProbeError
from layerrl.replay.arguments import RowKeys
from layerrl.shards import sharded_like, with_parameter
from layerrl.sweep.harness import Harness, _tensors, model_on_cpu
from layerrl.trainer.metrics import norm
from tests.devices import on_any_device
from tests.grpo import config, make, reward
from tests.models import tiny
from tests.runs import bits, evaluation


def on(device: str, *shape: int) -> torch.Tensor:
    return torch.empty(shape, device=device)


def test_a_norm_over_tensors_on_two_devices():
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = norm([on("cuda:1", 3), on("cuda:0", 2, 2)])
    assert str(found.device) == "cuda:1"


def test_a_row_has_one_key_of_arguments_on_two_devices(monkeypatch):
    def keys(rows: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(rows), dtype=torch.int64, device=rows.device)

    monkeypatch.setattr("layerrl.replay.arguments.row_keys", keys)
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):  # once they are added up
        RowKeys(2).of([("mask", on("cuda:0", 2, 3)), ("positions", on("cuda:1", 2, 3))])


def test_a_kept_value_follows_its_parameter():
    # In place of a tensor, whose data can move to a GPU and not to `meta`.
    value = SimpleNamespace(device=torch.device("cpu"), data=torch.ones(3))
    assert with_parameter(value, on("meta", 3)) is value
    assert value.data.is_meta


def test_a_sharded_value_lies_where_its_parameter_does(tmp_path, monkeypatch):
    """FSDP2 can offload what it shards, and torch would leave the value on the mesh's device."""

    def on_the_mesh(value: torch.Tensor, mesh: Any, placements: Any) -> DTensor:
        # In place of a CPU and a GPU, `meta` and a CPU: off `meta` torch moves nothing itself.
        assert value.is_meta
        return distribute_tensor(torch.empty(value.shape), mesh, placements)

    monkeypatch.setattr("layerrl.shards.distribute_tensor", on_the_mesh)
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.ones(4, 3), DeviceMesh("cpu", [0]), [Shard(0)])
        parameter = nn.Parameter(sharded.to("meta"))
        value = sharded_like(torch.ones(4, 3), parameter)
    finally:
        distributed.destroy_process_group()
    assert isinstance(value, DTensor)
    assert value.to_local().is_meta


@on_any_device
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_a_full_evaluation_in_bfloat16(tmp_path, beta):
    settings = evaluation(bf16_full_eval=True, beta=beta, max_steps=1)
    trainer = make(tiny("llama", 2), tmp_path, selection=1, **settings)
    trainer.train()
    assert trainer.state.log_history[0]["layerrl/relative_update/layer_1"] > 0


@on_any_device
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("setting", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_outside_of_training_casts_for_itself_alone(tmp_path, beta, setting):
    """transformers casts the model in place, for good."""
    seen = []

    def noted(completions: list[str], **_: Any) -> list[float]:
        seen.append({parameter.dtype for parameter in trainer.model.parameters()})
        return reward(completions)

    settings = evaluation(beta=beta, max_steps=2, eval_strategy="no", **{setting: True})
    settings["arguments"]["reward_funcs"] = noted
    model = tiny("gemma3_text", 3)  # which has buffers
    trainer = make(model, tmp_path, selection=1, **settings)
    for train in (lambda: None, trainer.train):
        train()
        before = bits(model)
        trainer.evaluate()
        assert_close(bits(model), before, rtol=0, atol=0)
    half = {"bf16_full_eval": torch.bfloat16, "fp16_full_eval": torch.float16}[setting]
    assert seen[0] == seen[-1] == {half}
    assert trainer.state.global_step == 2
    trainer.save_delta(tmp_path / "delta")
    trainer.save_model(str(tmp_path / "whole"))


def test_float16_gradients_are_not_scored(tmp_path):
    args = config(tmp_path)
    args.fp16 = True  # which transformers refuses on a CPU
    with pytest.raises(ProbeError, match=r'selection="auto" with fp16=True: its backward'):
        make(tiny("llama", 2), tmp_path, selection="auto", arguments={"args": args})


class Tied(nn.Module):
    """A parameter under two names, and a buffer, on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = self.head = nn.Parameter(on("cuda:0", 4, 2))
        self.register_buffer("counts", on("cuda:0", 3))


def test_a_copy_on_the_cpu_shares_what_the_model_does_and_leaves_it_alone():
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Tied()
        copied = model_on_cpu(model)
    assert {t.device.type for t in (*copied.parameters(), *copied.buffers())} == {"cpu"}
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
    assert copied.head is copied.embedding


def harness(tmp_path, **settings):
    model, judge = tiny("llama", 2), tiny("llama", 2)
    args = config(tmp_path, **settings)
    prompts = make(model, tmp_path).train_dataset
    return Harness(
        [model, judge],
        partial(dict, reward_funcs=[reward, judge]),
        args=args, full_args=args, eval_dataset=prompts, greedy=True, modules=None, folder=tmp_path,
    )  # fmt: skip


def test_a_worker_gets_models_on_the_cpu_and_rewards_with_them(tmp_path, monkeypatch):
    given = harness(tmp_path)
    copies = {id(model): tiny("llama", 2) for model in (given._model, *given._reward_models)}
    monkeypatch.setattr("layerrl.sweep.harness.model_on_cpu", lambda model: copies[id(model)])
    state = given.__getstate__()
    [judge] = state["_reward_models"]
    assert [state["_model"], judge] == [*copies.values()]
    assert state["_make_trainer"].keywords["reward_funcs"] == [reward, judge]
    assert given._make_trainer.keywords["reward_funcs"][1] is given._reward_models[0]


def test_the_model_may_reward_as_well(tmp_path):
    given = harness(tmp_path)
    given._reward_models = [given._model]
    state = given.__getstate__()
    assert state["_reward_models"] == [state["_model"]]


def test_the_copy_of_the_base_lies_on_the_cpu(tmp_path):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Tied()
        copied, own = _tensors(model), _tensors(model, copy_them=False)
    assert {tensor.device.type for tensor in copied.values()} == {"cpu"}
    assert {tensor.device.type for tensor in own.values()} == {"cuda"}
    received = pickle.loads(pickle.dumps(harness(tmp_path)))
    assert_close(received._base, harness(tmp_path)._base, rtol=0, atol=0)


def test_a_worker_multiplies_as_the_args_say(tmp_path, monkeypatch):
    given = harness(tmp_path)
    before = torch.backends.fp32_precision
    try:
        for tf32, precision in ((True, "tf32"), (False, "ieee")):
            given._args.tf32 = tf32
            pickle.loads(pickle.dumps(given))
            assert torch.backends.cuda.matmul.fp32_precision == precision
    finally:
        torch.backends.fp32_precision = before
