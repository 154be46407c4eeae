"""OpenRLHF's own actor and strategy on a CPU: one process, gloo (`make test-integrations`)."""

import importlib.machinery
import importlib.util
import os
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from layerrl import select_layers
from layerrl.errors import LauncherError, SelectionError
from tests.models import tiny

if importlib.util.find_spec("openrlhf") is None:
    pytest.skip(
        "openrlhf is not installed here: `make test-integrations` tests it where it is",
        allow_module_level=True,
    )

os.environ["DS_ACCELERATOR"] = "cpu"
LAYERS = 4
_FUNCTIONS = {
    "flash_attn": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils": (),
    "flash_attn.utils.distributed": ("all_gather",),
}


def stub_flash_attn():
    """flash_attn has no build for a CPU. OpenRLHF imports this much of it, and calls none here."""
    for name, functions in _FUNCTIONS.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        for function in functions:
            setattr(module, function, None)
        sys.modules[name] = module


stub_flash_attn()


import deepspeed
from openrlhf.models import Actor, PolicyLoss
from openrlhf.utils import deepspeed as upstream
from openrlhf.utils import get_strategy
from ray import cloudpickle

from layerrl.integrations.openrlhf import LayerMaskedStrategy, main

OpenRLHFStrategy = upstream.DeepspeedStrategy
TRAINING = {
    "optim": "adam",
    "adam": {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01},
    "lr_scheduler": "constant",
    "lr_warmup_ratio": 0.0,
    "max_norm": 1.0,
    "scheduler_steps": 10,
}


@pytest.fixture(scope="module", autouse=True)
def group():
    with pytest.MonkeyPatch.context() as patch:
        # Without DeepSpeed's collective in shared memory, which would be compiled for a minute.
        patch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}.items():
            patch.setenv(name, str(value))
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", "0")
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        yield
        deepspeed.comm.destroy_process_group()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny("llama", LAYERS).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("LAYERRL_SELECTION", "1")


def settings(**ds):
    ds = {"param_dtype": "bf16", "zero_stage": 2, **ds}
    train = SimpleNamespace(batch_size=4, micro_batch_size=4)
    return SimpleNamespace(ds=SimpleNamespace(**ds), train=train, local_rank=-1)


def strategy_of(kind, **ds):
    """A strategy whose AdamW is torch's: DeepSpeed's would be compiled for minutes."""

    class WithTorchAdam(kind):
        def get_ds_train_config(self, *args, **kwargs):
            config = super().get_ds_train_config(*args, **kwargs)
            if "optimizer" in config:
                config["optimizer"]["params"]["torch_adam"] = True
            return config

    return WithTorchAdam(
        args=settings(**ds),
        micro_train_batch_size=4,
        train_batch_size=4,
        zero_stage=ds.get("zero_stage", 2),
    )


def actor_of(base, **checkpointing):
    actor = Actor(base, attn_implementation="eager")
    if checkpointing:
        actor.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    return actor


def steps(strategy, actor, optimizer, count=2):
    """Losses and gradient norms of a few policy steps as OpenRLHF's PPO takes them."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(3, 64, (4, 8), generator=generator)
    advantages = torch.randn(4, 4, generator=generator)
    action_mask = torch.ones(4, 4)
    policy_loss = PolicyLoss()
    found, old = [], None
    actor.train()
    for _ in range(count):
        log_probs, _ = actor(
            sequences, action_mask, attention_mask=torch.ones_like(sequences), return_output=True
        )
        old = log_probs.detach() if old is None else old
        loss, *_ = policy_loss(log_probs, old, advantages, action_mask=action_mask)
        strategy.backward(loss, actor, optimizer)
        strategy.optimizer_step(optimizer, actor, None)
        found.append((loss.item(), strategy.get_grad_norm(actor)))
    return found


def named(actor):
    return dict(actor.model.module.named_parameters())


def weights(actor):
    return {name: parameter.detach().clone() for name, parameter in named(actor).items()}


def trained(text="1"):
    return select_layers(tiny("llama", LAYERS), int(text)).parameters(tiny("llama", LAYERS))


@pytest.mark.parametrize("stage", [1, 2])
def test_only_the_selected_layer_trains_and_reaches_the_optimizer(base, stage):
    strategy = strategy_of(LayerMaskedStrategy, zero_stage=stage)
    actor, optimizer, _ = strategy.prepare((actor_of(base), TRAINING))
    before = weights(actor)
    steps(strategy, actor, optimizer)
    after = weights(actor)
    expected = trained()
    assert [name for name, p in named(actor).items() if p.requires_grad] == [*expected]
    assert {name for name in after if not torch.equal(after[name], before[name])} == {*expected}
    names = {id(p): name for name, p in named(actor).items()}
    held = [names[id(p)] for params in optimizer.bit16_groups for p in params]
    assert sorted(held) == sorted(expected)
    # Both moments, in float32, of what trains and nothing else.
    states = optimizer.optimizer.state.values()
    elements = sum(p.numel() for p in expected.values())
    assert sum(state["exp_avg"].numel() for state in states) == elements


def test_a_backward_gives_gradients_to_the_selected_layer_only(base):
    actor = actor_of(base)
    strategy_of(LayerMaskedStrategy)._mask(actor.model)  # as prepare does, without DeepSpeed
    sequences = torch.arange(3, 11).reshape(1, 8)
    log_probs = actor(sequences, torch.ones(1, 4), attention_mask=torch.ones_like(sequences))
    log_probs.sum().backward()
    with_gradient = {n for n, p in actor.model.named_parameters() if p.grad is not None}
    assert with_gradient == {*trained()}
    assert all(actor.model.get_parameter(name).grad.abs().sum() > 0 for name in with_gradient)


@pytest.mark.parametrize("checkpointing", [{}, {"use_reentrant": False}, {"use_reentrant": True}])
def test_steps_are_those_of_openrlhf_with_flags_set_by_hand(base, checkpointing):
    ours = strategy_of(LayerMaskedStrategy)
    actor, optimizer, _ = ours.prepare((actor_of(base, **checkpointing), TRAINING))
    theirs = strategy_of(OpenRLHFStrategy)
    by_hand = actor_of(base, **checkpointing)
    for name, parameter in by_hand.model.named_parameters():
        parameter.requires_grad_(name.startswith("model.layers.1."))
    by_hand, by_hand_optimizer, _ = theirs.prepare((by_hand, TRAINING))
    assert steps(ours, actor, optimizer) == steps(theirs, by_hand, by_hand_optimizer)
    expected = weights(by_hand)
    for name, value in weights(actor).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_ends_at_the_first_trained_layer(base, reentrant, monkeypatch):
    monkeypatch.setenv("LAYERRL_SELECTION", "2")
    strategy = strategy_of(LayerMaskedStrategy)
    actor, optimizer, _ = strategy.prepare((actor_of(base, use_reentrant=reentrant), TRAINING))
    runs = [0] * LAYERS
    for index, layer in enumerate(actor.model.module.model.layers):

        def count(*_, index=index):
            runs[index] += 1

        layer.self_attn.register_forward_pre_hook(count)
    steps(strategy, actor, optimizer, 1)
    assert runs == [1, 1, 2, 2]


def test_full_trains_every_parameter(base, monkeypatch):
    monkeypatch.setenv("LAYERRL_SELECTION", "full")
    strategy = strategy_of(LayerMaskedStrategy)
    actor, optimizer, _ = strategy.prepare((actor_of(base), TRAINING))
    before = weights(actor)
    steps(strategy, actor, optimizer)
    assert all(not torch.equal(value, before[name]) for name, value in weights(actor).items())


def test_a_reference_and_a_critic_are_not_masked(base):
    strategy = strategy_of(LayerMaskedStrategy)
    critic = tiny("llama", LAYERS).to(torch.bfloat16)
    (critic, _, _), reference = strategy.prepare((critic, TRAINING), actor_of(base))
    assert all(p.requires_grad for p in critic.module.parameters())
    assert all(p.requires_grad for p in reference.model.module.parameters())


def test_the_selection_travels_with_the_strategy_to_workers_without_the_variable(base, monkeypatch):
    monkeypatch.setattr(upstream, "DeepspeedStrategy", LayerMaskedStrategy)
    sent = cloudpickle.dumps(get_strategy(settings()))
    monkeypatch.delenv("LAYERRL_SELECTION")
    strategy = cloudpickle.loads(sent)
    assert type(strategy) is LayerMaskedStrategy
    actor = actor_of(base)
    strategy._mask(actor.model)
    assert [n for n, p in actor.model.named_parameters() if p.requires_grad] == [*trained()]


@pytest.mark.parametrize("command", ["train_sft", "train_dpo"])
def test_openrlhf_commands_make_the_strategy(command, monkeypatch, capsys):
    monkeypatch.setattr(upstream, "DeepspeedStrategy", OpenRLHFStrategy)
    monkeypatch.setattr(sys, "argv", ["openrlhf", command, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "--ds.zero_stage" in capsys.readouterr().out
    assert type(get_strategy(settings())) is LayerMaskedStrategy


@pytest.mark.parametrize("command", [[], ["train_rm"]])
def test_commands_that_train_no_policy_are_refused(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["openrlhf", *command])
    with pytest.raises(LauncherError, match="expected one of train_ppo_ray"):
        main()


@pytest.mark.parametrize(
    ("ds", "said"),
    [
        ({"zero_stage": 3}, "zero_stage 3"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size 2"),
        ({"lora": SimpleNamespace(rank=8)}, "lora.rank 8"),
        ({"load_in_4bit": True}, "load_in_4bit"),
    ],
)
def test_settings_that_freeze_or_shard_otherwise_are_refused(ds, said):
    with pytest.raises(LauncherError, match=said):
        strategy_of(LayerMaskedStrategy, **ds)


def test_a_missing_selection_is_refused(monkeypatch):
    monkeypatch.delenv("LAYERRL_SELECTION")
    with pytest.raises(SelectionError, match="LAYERRL_SELECTION is not set"):
        strategy_of(LayerMaskedStrategy)


def test_boosts_are_refused(base, monkeypatch):
    boosted = select_layers(tiny("llama", LAYERS), [0, 1], boost={1: 2.0})
    monkeypatch.setenv("LAYERRL_SELECTION", boosted.to_json())
    with pytest.raises(SelectionError, match=r"scaled by \{1: 2.0\}.*without boost"):
        strategy_of(LayerMaskedStrategy).prepare((actor_of(base), TRAINING))
