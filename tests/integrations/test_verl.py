"""verl's own engine on a CPU: one process, gloo, FSDP2 (`make test-integrations`)."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from layerrl import select_layers
from layerrl.blocks import with_fused_siblings
from layerrl.errors import FrozenTensorError, LauncherError, SelectionError
from tests.models import tiny

pytest.importorskip(
    "verl", reason="verl is not installed here: `make test-integrations` tests it where it is"
)

from verl.plugin.platform import platform_manager
from verl.plugin.platform.platform_base import PlatformBase

ROOT = Path(__file__).parents[2]
LAYERS = 4


class Cpu(PlatformBase):
    """A platform as verl's plugins bring one: verl has none for a CPU."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = torch.cpu

    def is_available(self):
        return True

    def current_device(self):
        return "cpu"

    def device_count(self):
        return 1

    def communication_backend_name(self):
        return "gloo"

    def ray_resource_name(self):
        return "CPU"

    def _none(self, *args, **kwargs):
        return None

    set_device = synchronize = manual_seed = manual_seed_all = empty_cache = _none
    set_allocator_settings = get_device_capability = visible_devices_envvar = _none
    nvtx_range = profiler_start = profiler_stop = ray_noset_envvars = _none
    is_ipc_supported = cudart = _none


platform_manager.set_platform(Cpu())

from hydra import compose, initialize_config_module
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.utils.losses import sft_loss

from layerrl.integrations.verl import LayerMaskedFSDPEngine


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny("llama", LAYERS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    store = distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "layerrl")
    monkeypatch.setenv("LAYERRL_SELECTION", "1")
    monkeypatch.delenv("LAYERRL_SYNC", raising=False)


def engine_for(base, *, initialize=True, checkpointing=True, lora_rank=0, **changes):
    engine_config = {
        "strategy": "fsdp2",
        "mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "fp32"},
        "use_torch_compile": False,
        "use_remove_padding": False,
        **changes,
    }
    engine = EngineRegistry.new(
        "language_model",
        engine_config["strategy"],
        model_config=HFModelConfig(
            path=str(base),
            load_tokenizer=False,
            use_remove_padding=False,
            enable_gradient_checkpointing=checkpointing,
            lora_rank=lora_rank,
            override_config={"attn_implementation": "eager"},
        ),
        engine_config=FSDPEngineConfig(**engine_config),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    if initialize:
        engine.initialize()
    return engine


class ByHand(FSDPEngineWithLMHead):
    """verl's engine with `requires_grad` set by hand and nothing else."""

    def _build_module(self):
        module = super()._build_module()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.startswith("model.layers.1."))
        return module


def batch():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 64, (length,), generator=generator) for length in (5, 8, 6, 7)]
    masks = [torch.ones_like(row, dtype=torch.float32) for row in rows]
    nested = partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    return tensordict_utils.get_tensordict(
        {
            "input_ids": nested(rows),
            "position_ids": nested([torch.arange(len(row)) for row in rows]),
            "loss_mask": nested(masks),
        },
        {
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": 2,
            "use_remove_padding": False,
            "temperature": 1.0,
        },
    )


def steps(engine, count=2):
    """Losses and gradient norms of a few of verl's own steps."""
    found = []
    for _ in range(count):
        with engine.train_mode():
            output = engine.train_batch(batch(), partial(sft_loss, None))
        found.append((output["loss"], output["metrics"]["grad_norm"]))
        engine.lr_scheduler_step()
    return found


def weights(engine):
    return {name: p.full_tensor().clone() for name, p in engine.module.named_parameters()}


def trained_names(base, text="1"):
    model = tiny("llama", LAYERS)
    return [*select_layers(model, int(text)).parameters(model)]


def sync(engine):
    tensors, adapter = engine.get_per_tensor_param(base_sync_done=True)
    assert adapter is None
    return {name: tensor.clone() for name, tensor in tensors}  # of one process it is the weight


def test_verl_takes_the_engine_from_its_environment_variables():
    code = (
        "import verl; from verl.workers.engine import EngineRegistry as R; "
        "print(*[R.get_engine_cls('language_model', b).__name__ for b in ('fsdp2', 'megatron')], "
        "R.get_engine_cls('value_model', 'fsdp2').__name__)"
    )
    variables = {
        "VERL_USE_EXTERNAL_MODULES": "layerrl.integrations.verl",
        "VERL_ENGINE_VENDOR": "layerrl",
        "VERL_ENGINE_DEVICE": "cuda",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    engines = ["LayerMaskedFSDPEngine"] * 2 + ["FSDPEngineWithValueHead"]
    assert done.stdout.split() == engines


def test_documented_overrides_are_in_verls_config():
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            [
                "actor_rollout_ref.actor.strategy=fsdp2",
                "actor_rollout_ref.rollout.free_cache_engine=False",
                "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_ENGINE_VENDOR=layerrl",
            ],
        )
    roles = config.actor_rollout_ref
    assert (roles.actor.strategy, roles.ref.strategy) == ("fsdp2", "fsdp2")
    assert (roles.actor.fsdp_config.forward_only, roles.ref.fsdp_config.forward_only) == (
        False,
        True,
    )
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.VERL_ENGINE_VENDOR == "layerrl"


def test_only_the_selected_layer_trains_and_reaches_the_optimizer(base):
    engine = engine_for(base)
    assert type(engine) is LayerMaskedFSDPEngine
    named = dict(engine.module.named_parameters())
    assert [name for name, p in named.items() if p.requires_grad] == trained_names(base)
    assert all(isinstance(p, DTensor) for p in named.values())
    before = weights(engine)
    steps(engine)
    after = weights(engine)
    assert {n for n in after if not torch.equal(after[n], before[n])} == {*trained_names(base)}
    [group] = engine.optimizer.param_groups
    held = [name for p in group["params"] for name in named if named[name] is p]
    assert held == trained_names(base)
    assert {*engine.optimizer.state} == {*group["params"]}
    assert all(named[name].grad is None for name in named if name not in held)


@pytest.mark.parametrize(
    "changes",
    [{"checkpointing": True}, {"checkpointing": False}, {"mixed_precision": None}],
    ids=["checkpointing", "no checkpointing", "verl's default precision, bfloat16"],
)
def test_steps_are_those_of_verl_with_flags_set_by_hand(base, changes, monkeypatch):
    engine = engine_for(base, **changes)
    monkeypatch.setitem(
        EngineRegistry._engines["language_model"]["fsdp2"], ("cpu", "layerrl"), ByHand
    )
    by_hand = engine_for(base, **changes)
    assert type(by_hand) is ByHand
    assert steps(engine) == steps(by_hand)
    expected = weights(by_hand)
    for name, value in weights(engine).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_backward_ends_at_the_first_trained_layer(base, monkeypatch):
    monkeypatch.setenv("LAYERRL_SELECTION", "2")
    engine = engine_for(base)
    runs = [0] * LAYERS
    for index, layer in enumerate(engine.module.model.layers):

        def count(*_, index=index):
            runs[index] += 1

        layer.self_attn.register_forward_pre_hook(count)
    steps(engine, 1)
    # Two micro-batches; from layer 2 up each is recomputed once.
    assert runs == [2, 2, 4, 4]


def test_boosts_scale_learning_rates(base, monkeypatch):
    selection = select_layers(tiny("llama", LAYERS), [0, 3], boost={3: 4.0})
    monkeypatch.setenv("LAYERRL_SELECTION", selection.to_json())
    engine = engine_for(base)
    assert [group["initial_lr"] for group in engine.optimizer.param_groups] == [1e-2, 4e-2]
    held = [{*group["params"]} for group in engine.optimizer.param_groups]
    layers = engine.module.model.layers
    assert held == [{*layers[0].parameters()}, {*layers[3].parameters()}]


def test_fingerprints_are_taken_on_verls_device_whatever_lies_on_the_cpu(base, monkeypatch):
    monkeypatch.setattr(Cpu, "current_device", lambda _: "cpu:0")  # no tensor's own
    engine = engine_for(base, param_offload=True)
    assert str(engine._frozen._device) == "cpu:0"
    assert str(next(engine.module.parameters()).device) == "cpu"
    engine._check()


def test_a_reference_is_not_masked(base, monkeypatch):
    monkeypatch.delenv("LAYERRL_SELECTION")
    # CPUOffloadPolicy, which verl gives engines that only go forward, wants pinned memory.
    engine = engine_for(base, initialize=False, forward_only=True)
    assert all(p.requires_grad for p in engine._build_module().parameters())


def test_full_trains_every_parameter(base, monkeypatch):
    monkeypatch.setenv("LAYERRL_SELECTION", "full")
    engine = engine_for(base)
    before = weights(engine)
    steps(engine, 1)
    assert all(not torch.equal(value, before[name]) for name, value in weights(engine).items())


def test_everything_is_sent_unless_told_otherwise(base):
    engine = engine_for(base)
    assert {*sync(engine)} == {*sync(engine)} == {*engine.module.state_dict()}


@pytest.mark.parametrize("modules", [None, "mlp.down_proj"], ids=["layer", "part"])
def test_after_a_first_time_only_what_was_trained_is_sent(base, modules, monkeypatch):
    monkeypatch.setenv("LAYERRL_SYNC", "trained")
    model = tiny("llama", LAYERS)
    selection = select_layers(model, 1, modules=modules)
    monkeypatch.setenv("LAYERRL_SELECTION", selection.to_json())
    engine = engine_for(base)
    names = [name for name, _ in engine.module.named_parameters()]
    served = sync(engine)
    assert {*served} == {*names}
    steps(engine)
    narrow = sync(engine)
    assert [*narrow] == with_fused_siblings(names, selection.parameters(model))
    assert len(narrow) < len(names)
    # What an engine that keeps its weights would serve is the trained model.
    served |= narrow
    for name, value in weights(engine).items():
        torch.testing.assert_close(served[name], value, rtol=0, atol=0)


def test_everything_is_sent_again_after_a_sync_that_was_not_taken(base, monkeypatch):
    monkeypatch.setenv("LAYERRL_SYNC", "trained")
    engine = engine_for(base)
    everything = {*sync(engine)}
    assert {*sync(engine)} == {*trained_names(base)}
    tensors, _ = engine.get_per_tensor_param()
    next(iter(tensors))
    assert {*sync(engine)} == everything


def test_a_checkpoint_resumes_the_run(base, tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERRL_SYNC", "trained")
    # verl restores the state of the device's generator, which a CPU keeps in another module.
    monkeypatch.setattr(torch.cpu, "set_rng_state", torch.set_rng_state, raising=False)
    whole = engine_for(base)
    steps(whole, 2)
    expected = steps(whole, 2)
    engine = engine_for(base)
    steps(engine, 2)
    engine.save_checkpoint(str(tmp_path / "step"))
    resumed = engine_for(base)
    sync(resumed)
    resumed.load_checkpoint(str(tmp_path / "step"), del_local_after_load=False)
    assert {*sync(resumed)} == {*resumed.module.state_dict()}
    assert steps(resumed, 2) == expected
    for name, value in weights(resumed).items():
        torch.testing.assert_close(value, weights(whole)[name], rtol=0, atol=0)


def test_a_frozen_tensor_that_moved_is_an_error_at_the_next_save(base, tmp_path):
    engine = engine_for(base)
    with torch.no_grad():
        engine.module.lm_head.weight.to_local()[0, 0] += 1
    with pytest.raises(FrozenTensorError, match="lm_head"):
        engine.save_checkpoint(str(tmp_path))


def test_two_processes_take_the_steps_of_one(base, tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERRL_SYNC", "trained")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    worker = [Path(__file__).with_name("verl_processes.py"), base, tmp_path]
    subprocess.run([*launch, "--nproc-per-node=2", *worker], check=True, timeout=300)
    one = engine_for(base)
    everything = sync(one)
    expected = steps(one)  # both processes have the same rows: the mean is that of one
    trained = sync(one)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    elements = {name: p.numel() for name, p in one.module.named_parameters()}
    for found, first, second, _, _ in results:
        torch.testing.assert_close(
            [norm for _, norm in found], [norm for _, norm in expected], rtol=1e-5, atol=0
        )
        assert [*first] == [*everything]
        assert [*second] == [*trained] == trained_names(base)
        torch.testing.assert_close(first, everything, rtol=0, atol=0)
        torch.testing.assert_close(second, trained, rtol=1e-4, atol=1e-6)
    parts = [part for *_, part, _ in results]
    assert {name: parts[0][name] + parts[1][name] for name in elements} == elements
    assert parts[0]["lm_head.weight"] < elements["lm_head.weight"]
    states = sum(state for *_, state in results)
    assert states == sum(elements[name] for name in trained_names(base))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strategy": "fsdp"}, "strategy 'fsdp'.*strategy=fsdp2"),
        ({"strategy": "fsdp_turbo"}, "strategy 'fsdp_turbo'"),
        ({"lora_rank": 8}, "lora_rank=8"),
    ],
)
def test_settings_that_freeze_or_flatten_otherwise_are_refused(base, changes, said):
    with pytest.raises(LauncherError, match=said):
        engine_for(base, **changes)


def test_unknown_sync_is_refused(base, monkeypatch):
    monkeypatch.setenv("LAYERRL_SYNC", "some")
    with pytest.raises(LauncherError, match="'some'"):
        engine_for(base)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "LAYERRL_SELECTION is not set"),
        ("7", "layer 7 does not exist.*4 decoder layers"),
        ("midle", "'midle' does not name layers"),
        ("{}", "not the JSON of a LayerSelection"),
    ],
)
def test_bad_selections_are_refused(base, text, said, monkeypatch):
    monkeypatch.setenv("LAYERRL_SELECTION", text)
    with pytest.raises(SelectionError, match=said):
        engine_for(base)
