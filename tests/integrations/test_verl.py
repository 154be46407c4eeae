"""verl's own engine on a CPU: one process, gloo, FSDP2 (`make test-integrations`)."""

import os
import subprocess
import sys
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
    "verl", reason="verl is not installed here: `make test-integrations` tests it in its own"
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

from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

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


def test_it(base):
    e = engine_for(base)
    print(type(e), e.optimizer, {n for n, p in e.module.named_parameters() if p.requires_grad})
    out, _ = e.get_per_tensor_param()
    print([n for n, _ in out])
