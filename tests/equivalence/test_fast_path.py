"""The fast path changes no result: bit for bit what plain TRL does with layers frozen by hand."""

import functools
from collections import deque
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from layerrl import LayerMaskedMixin
from layerrl.blocks import find_blocks, unwrap
from layerrl.reference import ReferenceModel
from tests.devices import on_any_device
from tests.grpo import QUIETLY, make
from tests.models import tiny
from tests.replays import eager
from tests.runs import (
    NO_CHECKPOINTING,
    REENTRANT,
    Passes,
    assert_same_run,
    assert_trained,
    bits,
    evaluation,
    freeze_by_hand,
    load,
    metric,
    pair,
    saved,
    shares_keys_and_values,
    train,
    trained_pair,
)

pytestmark = on_any_device

CHECKPOINTING = {"default": {}, "off": NO_CHECKPOINTING, "reentrant": REENTRANT}
REUSED = {"beta": 0.04, "num_iterations": 2}
# Halves add up to the very same frozen tensor, which plain TRL mixes with itself as well.
SYNCED = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}

HALF = [{"bf16": True}, {"dtype": torch.bfloat16, "masked": {"master_weights": False}}]

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SLIDING = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"] * 2}
# Family to what its config needs; a window of 3 is shorter than every sequence.
REPLAYED: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 3},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "phi3": {},
    "gpt2": NO_DROPOUT,
    "gpt_neox": {},
    "olmo2": {},
    "falcon": {},
    "gpt_oss": SLIDING | {"router_aux_loss_coef": 0.0},
    "qwen3_moe": {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0},
    "mixtral": {"router_aux_loss_coef": 0.0},
    "qwen2_5_vl": {},
    "qwen3_vl": {},
    "gemma3": SLIDING,
    "llava": {},
}


# As other families, layer for layer.
REDUNDANT = {"qwen2", "mistral", "phi3", "olmo2", "llava", "qwen2_5_vl"}


class MaskedRLOOTrainer(LayerMaskedMixin, RLOOTrainer):
    pass


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory):
    """Folder of the tiny Llama that most runs start from."""
    return saved(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture
def base(llama, tmp_path):
    """A folder of the same content, with room beside it for what runs write."""
    (tmp_path / "base").symlink_to(llama)
    return tmp_path / "base"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the replay said aloud."""
    return [r.getMessage() for r in caplog.records if r.name == "layerrl.replay"]


def lowest_layer(trainer: Any) -> torch.nn.Module:
    return find_blocks(trainer.model).modules[0]


def batches(trainer: Any) -> list[dict[str, Any]]:
    """The batches that the trainer computes a loss of, as they come."""
    seen: list[dict[str, Any]] = []
    compute = trainer._compute_loss

    def noting(model: Any, inputs: dict[str, Any]) -> Any:
        seen.append(inputs)
        return compute(model, inputs)

    trainer._compute_loss = noting
    return seen


class TestEqualsFreezingByHand:
    @pytest.mark.parametrize("checkpointing", CHECKPOINTING)
    @pytest.mark.parametrize("num_iterations", [1, 2])
    @pytest.mark.parametrize("beta", [0.0, 0.04])
    def test_with_and_without_reference_reuse_and_checkpointing(
        self, base, caplog, beta, num_iterations, checkpointing
    ):
        plain, masked = pair(
            base, beta=beta, num_iterations=num_iterations, **CHECKPOINTING[checkpointing]
        )
        before = bits(masked.model)
        train(plain, masked)
        assert_same_run(masked, plain)
        assert_trained(masked, before, [2])
        assert bool(masked.masked_run.replay.num_replayed) == (beta > 0 or num_iterations > 1)
        assert masked.masked_run.replay.enabled
        assert warnings(caplog) == []

    @pytest.mark.parametrize("way", ["args", "launcher", "by hand"])
    @pytest.mark.parametrize(("changes", "spares"), [({}, False), (REUSED, True)])
    def test_compiled(self, base, caplog, monkeypatch, way, changes, spares):
        """It is said where passes would have been spared."""
        if way == "args":
            changes = {**changes, "torch_compile": True, "torch_compile_backend": "eager"}
        elif way == "launcher":
            monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
        plain, masked = pair(base, **changes)
        if way == "by hand":
            compiled = torch.compile(load(base), backend="eager")
            masked = make(compiled, base.parent / "masked", selection=2, max_steps=3, **changes)
        train(plain, masked)
        masked.model = unwrap(masked.model)  # by the same names
        assert_same_run(masked, plain)
        # TRL compiles the passes of the loss alone.
        replays = spares and way != "by hand"
        assert bool(masked.masked_run.replay.num_replayed) == replays
        said = warnings(caplog)
        assert len(said) == spares
        assert all("is compiled around its layers" in line for line in said)

    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param({"gradient_accumulation_steps": 2}, id="accumulation"),
            pytest.param(
                {"gradient_accumulation_steps": 2, "num_iterations": 2}, id="accumulation-reuse"
            ),
            pytest.param(
                {"steps_per_generation": 4, "max_steps": 5}, id="more-steps-than-accumulation"
            ),
            pytest.param(
                {
                    "steps_per_generation": 4,
                    "gradient_accumulation_steps": 2,
                    "num_iterations": 3,
                    "per_device_train_batch_size": 4,
                    "max_steps": 5,
                },
                id="everything-at-once",
            ),
            pytest.param(SYNCED, id="reference-follows"),
            pytest.param(
                {**SYNCED, "ref_model_sync_steps": 1, "num_iterations": 2},
                id="reference-follows-reuse",
            ),
            pytest.param({"num_iterations": 2, "bf16": True}, id="autocast"),
            pytest.param(
                {"num_iterations": 2, "top_entropy_quantile": 0.5, "loss_type": "grpo"},
                id="high-entropy-tokens",
            ),
            pytest.param({"num_iterations": 2, "disable_dropout": True}, id="dropout-disabled"),
            pytest.param({"num_iterations": 2, "cast_lm_head_to_fp32": True}, id="fp32-head"),
        ],
    )
    def test_under_other_settings(self, base, caplog, changes):
        plain, masked = pair(base, beta=0.04, **changes)
        before = bits(masked.model)
        train(plain, masked)
        assert_same_run(masked, plain)
        assert_trained(masked, before, [2])
        assert masked.masked_run.replay.num_replayed
        assert masked.masked_run.replay.enabled
        # Micro-batches without padding have no mask: rows scored beside padded ones run again.
        assert [w for w in warnings(caplog) if "masks" not in w] == []

    def test_keeps_frozen_tensors_of_a_following_reference_out_of_its_rounding(self, base):
        plain, masked = trained_pair(
            base, beta=0.04, **{**SYNCED, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.6}
        )
        # TRL computes 0.4 w + 0.6 w of every frozen tensor w, which is w only up to rounding.
        reference = plain.ref_model.state_dict()
        drifted = {name for name, w in bits(plain.model).items() if not w.equal(reference[name])}
        assert any(".0." in name for name in drifted)
        assert_close(bits(masked.model), bits(plain.model), rtol=0, atol=1e-6)
        for name, value in masked.ref_model.tensors.items():
            assert_close(value, reference[name], rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param({"beta": 0.0}, id="nothing-reused"),
            pytest.param({"beta": 0.04}, id="reference"),
            pytest.param({"beta": 0.04, "num_iterations": 2}, id="between-iterations"),
            pytest.param(
                {"beta": 0.04, "steps_per_generation": 4, "max_steps": 5}, id="between-slices"
            ),
            pytest.param({"beta": 0.04, "eval_on_start": True}, id="before-the-first-step"),
        ],
    )
    def test_with_evaluation_between_the_steps(self, base, changes):
        plain, masked = trained_pair(base, **evaluation(), **changes)
        assert len(metric(plain, "eval_loss")) >= 3
        assert_same_run(masked, plain)

    def test_with_an_evaluation_while_a_batch_is_half_used(self, base):
        plain, masked = pair(base, max_steps=3, beta=0.04, num_iterations=2, **evaluation(100))
        for trainer in (plain, masked):
            train(trainer)
            trainer.evaluate()
            train(trainer)
        assert_same_run(masked, plain)

    @pytest.mark.parametrize("layers", [(0,), (3,), (1, 3), (0, 1, 2, 3)], ids=str)
    def test_whatever_layers_train(self, base, layers):
        plain, masked = pair(base, layers=layers, **REUSED)
        before = bits(masked.model)
        train(plain, masked)
        assert_same_run(masked, plain)
        assert_trained(masked, before, layers)
        assert bool(masked.masked_run.replay.num_replayed) == (0 not in layers)

    def test_in_rloo(self, base, tmp_path):
        arguments = {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "max_steps": 3,
            **QUIETLY,
            **REUSED,
        }
        trainers = []
        for trainer, selection in ((RLOOTrainer, None), (MaskedRLOOTrainer, 2)):
            model = load(base)
            if selection is None:
                freeze_by_hand(model, [2])
            made = make(
                model,
                tmp_path,
                selection=selection,
                trainer=trainer,
                arguments={"args": RLOOConfig(output_dir=str(tmp_path), **arguments)},
            )
            train(made)
            trainers.append(made)
        plain, masked = trainers
        assert_same_run(masked, plain)
        assert isinstance(masked.ref_model, ReferenceModel)
        assert masked.masked_run.replay.num_replayed

    @pytest.mark.parametrize("fails", ["reward", "backward"])
    def test_after_an_exception_in_the_middle_of_a_step(self, base, fails):
        plain, masked = pair(base, **REUSED, **REENTRANT)
        before = bits(masked.model)
        for trainer in (plain, masked):
            owner, name = {
                "reward": (trainer, "_calculate_rewards"),
                "backward": (trainer.accelerator, "backward"),
            }[fails]
            function, calls = getattr(owner, name), []

            def failing(*args, function=function, calls=calls, **kwargs):
                calls.append(args)
                if len(calls) == 2:
                    raise OSError("the disk is full")
                return function(*args, **kwargs)

            setattr(owner, name, failing)
            with pytest.raises(OSError, match="the disk is full"):
                train(trainer)
            assert not torch.equal(
                trainer.model.model.layers[2].mlp.up_proj.weight,
                before["model.layers.2.mlp.up_proj.weight"],
            )
        assert_close(bits(masked.model), bits(plain.model), rtol=0, atol=0)
        layers = masked.model.model.layers
        assert not any("forward" in vars(layer) for layer in layers)
        assert not any(layer._forward_pre_hooks for layer in layers)
        # Both trainers go on from where they are, with what a failed run leaves in them.
        train(plain, masked)
        assert_same_run(masked, plain)


class TestOptimisationsOnAndOff:
    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param(REUSED, id="reference-reuse"),
            pytest.param({"beta": 0.04}, id="reference"),
            pytest.param({"num_iterations": 2}, id="reuse"),
        ],
    )
    def test_nothing_changes_without_replay(self, base, tmp_path, changes):
        runs = []
        for prefix_cache_bytes in (0, 2**30):
            trainer = make(
                load(base),
                tmp_path / "out",
                selection=2,
                max_steps=3,
                arguments={"prefix_cache_bytes": prefix_cache_bytes},
                **changes,
            )
            passes = Passes(trainer, lowest_layer(trainer))
            train(trainer)
            runs.append(trainer)
            assert all(passes.ran) == (prefix_cache_bytes == 0)
        off, on = runs
        assert_same_run(on, off)

    def test_nothing_changes_where_a_batch_exceeds_the_budget(self, base, caplog):
        plain, masked = pair(base, masked={"prefix_cache_bytes": 100}, **REUSED)
        passes = Passes(masked, lowest_layer(masked))
        train(plain, masked)
        assert_same_run(masked, plain)
        assert all(passes.ran)
        assert any("prefix_cache_bytes" in line for line in warnings(caplog))

    @pytest.mark.parametrize("sync", [{}, {"sync_ref_model": True, "ref_model_sync_steps": 2}])
    def test_full_is_the_plain_trainer(self, base, tmp_path, sync):
        changes = {"max_steps": 3, **REUSED, **sync}
        plain = make(load(base), tmp_path / "plain", **changes)
        masked = make(load(base), tmp_path / "masked", selection="full", **changes)
        train(plain, masked)
        assert_same_run(masked, plain)
        assert all(norm > 0 for norm in metric(masked, "grad_norm"))
        assert not masked.masked_run.replay.enabled


class TestReplay:
    def test_runs_the_prefix_once_per_batch_of_completions(self, base, tmp_path):
        trainer = make(load(base), tmp_path, selection=2, max_steps=6, **REUSED)
        passes = Passes(trainer, lowest_layer(trainer))
        train(trainer)
        # Three batches, each scored by the old policy, the reference and the policy twice.
        assert len(passes.ran) == 3 * 4
        assert passes.ran[4:] == [True, False, False, False] * 2

    def test_runs_the_prefix_once_for_reference_and_policy(self, base, tmp_path):
        trainer = make(load(base), tmp_path, selection=2, max_steps=4, beta=0.04)
        passes = Passes(trainer, lowest_layer(trainer))
        train(trainer)
        # The first policy pass also ran plainly, to be compared.
        assert passes.ran == [True, True, *[True, False] * 3]

    def test_is_off_where_a_batch_is_scored_once(self, base, tmp_path, caplog):
        trainer = make(load(base), tmp_path, selection=2, max_steps=3)
        passes = Passes(trainer, lowest_layer(trainer))
        train(trainer)
        assert passes.ran == [True] * 3
        assert warnings(caplog) == []

    @pytest.mark.parametrize("num_iterations", [1, 2])
    def test_an_evaluation_leaves_no_recordings(self, base, tmp_path, num_iterations):
        held = []

        class Look(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                held.append(False in trainer.masked_run.replay._batches)

        how = evaluation(num_prompts=4, eval_on_start=True)
        how["arguments"]["callbacks"] = [Look()]
        trainer = make(
            load(base), tmp_path, selection=2, beta=0.04, num_iterations=num_iterations, **how
        )
        train(trainer)
        assert held == [False] * 3
        trainer.evaluate()
        assert trainer.masked_run.replay.num_bytes == 0

    def test_serves_the_evaluation_of_the_loss(self, base, tmp_path):
        trainer = make(load(base), tmp_path, selection=2, beta=0.04, **evaluation(num_prompts=4))
        train(trainer)
        passes = Passes(trainer, lowest_layer(trainer))
        trainer.evaluate()
        # Two batches of completions, each scored by the reference and for the loss.
        assert len(passes.ran) == 4
        assert passes.ran[2:] == [True, False]

    def test_follows_rows_through_padding_shuffling_and_slicing(self, base):
        plain, masked = pair(base, beta=0.04, steps_per_generation=4, num_iterations=2, max_steps=8)
        seen, passes = batches(masked), Passes(masked, lowest_layer(masked))
        train(plain, masked)
        assert_same_run(masked, plain)
        first, again = seen[:4], seen[4:]
        for batch, later in zip(first, again, strict=True):
            assert torch.equal(batch["completion_ids"], later["completion_ids"])
        padding = [(batch["prompt_mask"] == 0).sum(dim=1) for batch in seen]
        assert len({int(count) for counts in padding for count in counts}) >= 3
        # The old policy, and the first replays of the reference and of the policy, to be compared.
        assert passes.ran == [True] * 3 + [False] * 7

    @pytest.mark.parametrize("precision", HALF, ids=["autocast", "bfloat16"])
    def test_stays_where_padding_has_a_kernel_of_its_own(self, base, monkeypatch, precision):
        """As on GPUs, where flash attention takes no mask, and none is given without padding."""
        fused, unmasked = torch.nn.functional.scaled_dot_product_attention, set()

        def chosen(*args: Any, attn_mask: Any = None, **kwargs: Any) -> Any:
            unmasked.add(attn_mask is None)
            kernel = fused if attn_mask is None else eager
            return kernel(*args, attn_mask=attn_mask, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", chosen)
        few = {"per_device_train_batch_size": 2, "num_generations": 2, "steps_per_generation": 4}
        prompts = {"train_dataset": Dataset.from_dict({"prompt": ["abc", "def", "ghi", "j"] * 4})}
        plain, masked = pair(base, **REUSED, **few, **precision, max_steps=16, arguments=prompts)
        seen = batches(masked)
        train(plain, masked)
        assert_same_run(masked, plain)
        parts = [[batch["prompt_mask"], batch["completion_mask"]] for batch in seen]
        padded = {bool((torch.cat(masks, dim=1) == 0).any()) for masks in parts}
        assert padded == unmasked == {True, False}
        replay = masked.masked_run.replay
        assert replay.enabled
        assert replay.num_replayed > len(seen) // 2

    def test_forgets_the_recording_when_training_ends(self, base, tmp_path):
        trainer = make(load(base), tmp_path, selection=2, **REUSED)
        train(trainer)
        assert trainer.masked_run.replay.num_replayed
        assert not trainer.masked_run.replay._batches


class TestFamilies:
    @pytest.mark.parametrize(
        "family",
        [pytest.param(f, marks=[pytest.mark.slow] if f in REDUNDANT else []) for f in REPLAYED],
    )
    def test_is_replayed_with_the_same_result(self, tmp_path, caplog, family):
        folder = saved(tmp_path / "base", tiny(family, 4, **REPLAYED[family]))
        plain, masked = pair(folder, router_aux_loss_coef=0.0, max_steps=4, **REUSED)
        before = bits(masked.model)
        passes = Passes(masked, lowest_layer(masked))
        train(plain, masked)
        assert_same_run(masked, plain)
        assert_trained(masked, before, [2])
        assert warnings(caplog) == []
        assert masked.masked_run.replay.num_replayed
        assert masked.masked_run.replay.enabled
        # The second batch of completions, four passes as well.
        assert passes.ran[4:] == [True, False, False, False]

    @pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
    def test_keeps_the_router_loss_of_frozen_layers(self, tmp_path, caplog, family):
        experts = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
        folder = saved(tmp_path / "base", tiny(family, 4, **experts))
        plain, masked = trained_pair(folder, **REUSED)
        assert all(metric(plain, "aux_loss"))
        assert_same_run(masked, plain)
        # The policy's passes return router logits; the reference's do not and are replayed.
        [warning] = warnings(caplog)
        assert "asks for more than its output (output_router_logits)" in warning
        assert masked.masked_run.replay.num_replayed

    @pytest.mark.parametrize("num_iterations", [1, 2])
    @pytest.mark.parametrize("layer", [2, 3])
    def test_with_shared_keys_and_values_falls_back(self, tmp_path, caplog, layer, num_iterations):
        folder = saved(tmp_path / "base", shares_keys_and_values())
        plain, masked = pair(folder, layers=(layer,), beta=0.04, num_iterations=num_iterations)
        train(plain, masked)
        assert_same_run(masked, plain)
        assert all(norm > 0 for norm in metric(masked, "grad_norm"))
        assert not masked.masked_run.replay.num_replayed
        assert "layers are called with shared_kv_states, a " in warnings(caplog)[0]

    @pytest.mark.parametrize("num_iterations", [1, 2])
    def test_with_dropout_falls_back(self, tmp_path, caplog, num_iterations):
        folder = saved(tmp_path / "base", tiny("gpt2", 4))
        plain, masked = trained_pair(folder, beta=0.04, num_iterations=num_iterations)
        assert_same_run(masked, plain)
        assert not masked.masked_run.replay.num_replayed
        [warning] = warnings(caplog)
        assert "2 layers" in warning
        assert "dropout is active" in warning
        assert "attn.attn_dropout of layer 0" in warning

    @pytest.mark.parametrize("when", ["eval_on_start", "evaluate"])
    def test_with_dropout_is_not_fooled_by_an_evaluation(self, tmp_path, caplog, when):
        folder = saved(tmp_path / "base", tiny("gpt2", 4))
        changes = evaluation(every=100, eval_on_start=when == "eval_on_start")
        plain, masked = pair(folder, beta=0.04, **changes)
        for trainer in (plain, masked):
            if when == "evaluate":
                trainer.evaluate()
            train(trainer)
        assert_same_run(masked, plain)
        assert len(warnings(caplog)) == 1


class TestForwardsThatOthersWrap:
    """As profilers and some libraries do, between an evaluation and the training, or in it."""

    @staticmethod
    def wrap(model: Any, where: str) -> None:
        module = model.get_submodule(where)
        forward = module.forward

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            return 1.5 * output if isinstance(output, torch.Tensor) else output

        module.forward = run

    @pytest.mark.parametrize("where", ["", "model", "model.layers.0", "model.layers.2"])
    @pytest.mark.parametrize("when", ["evaluated", "on_step_begin"])
    def test_compute_what_they_say(self, tmp_path, where, when):
        changes = evaluation(beta=0.0, num_iterations=2, max_steps=2, eval_strategy="no")
        plain, masked = pair(saved(tmp_path / "base"), bf16=True, **changes)
        for trainer in (plain, masked):
            if when == "evaluated":
                torch.manual_seed(0)
                trainer.evaluate()
                self.wrap(trainer.model, where)
            else:
                trainer.add_callback(InSecondStep(functools.partial(self.wrap, where=where)))
        train(plain, masked)
        assert_same_run(masked, plain)


@dataclass
class Setting:
    scale: Any


class Counting(torch.nn.Module):
    """Multiplies with what it has counted in its own way, in passes of the loss."""

    WAYS: ClassVar[dict[str, Any]] = {
        "int": lambda: 0,
        "tensor": lambda: torch.zeros(()),
        "buffer": lambda: torch.zeros(()),
        "list": list,
        "deque": deque,
        "set": set,
        "dict": dict,
        "nested": lambda: {"all": [[]]},
        "dataclass": lambda: Setting(0),
    }

    def __init__(self, inside: Any, way: str) -> None:
        super().__init__()
        self.inside, held = inside, self.WAYS[way]()
        if way == "buffer":
            self.register_buffer("held", held, persistent=False)
        else:
            self.held = held

    def forward(self, x: Any) -> Any:
        y, held = self.inside(x), self.held
        if not (self.training and torch.is_grad_enabled()):
            return y
        if isinstance(held, int | torch.Tensor):
            self.held = held + 1
            return y * self.held
        if isinstance(held, Setting):
            held.scale += 1
            return y * held.scale
        held = held["all"][0] if isinstance(held, dict) and held.get("all") else held
        if isinstance(held, list | deque):
            held.append(y.detach().mean())
        elif isinstance(held, set):
            held.add(len(held))
        else:
            held[len(held)] = True
        return y * len(held)


class Steered(torch.nn.Module):
    """A frozen layer's module with a setting that a callback anneals."""

    WAYS: ClassVar[dict[str, Any]] = {
        "float": (float, float),
        "object": (Setting, lambda value: value.scale),
        "array": (np.array, float),
        "number of numpy's": (np.float32, float),
        "function": (lambda value: lambda: value, lambda value: value()),
    }

    def __init__(self, inside: Any, way: str) -> None:
        super().__init__()
        self.inside = inside
        self.make, self.read = self.WAYS[way]
        self.anneal(1.0)

    def anneal(self, value: float) -> None:
        self.applied_scale = self.make(value)

    def forward(self, x: Any) -> Any:
        return self.inside(x) * self.read(self.applied_scale)


class InEachStep(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        given["model"].model.layers[0].mlp.anneal(0.3**state.global_step)


class TestModulesOfTheUsers:
    def pair(self, folder: Any, layer: int, wrap: Any, callbacks: Any = ()) -> tuple[Any, Any]:
        """Trained: one by hand, and one with a selection."""
        made, base = [], saved(folder / "base")
        for selection in (None, 2):
            model = load(base)
            block = model.model.layers[layer]
            block.mlp = wrap(block.mlp)
            if selection is None:
                freeze_by_hand(model, [2])
            changes = {"num_iterations": 2, "beta": 0.0, "max_steps": 4, **NO_CHECKPOINTING}
            arguments = {"callbacks": [*callbacks]}
            made.append(make(model, folder, selection=selection, arguments=arguments, **changes))
        train(*made)
        return made[0], made[1]

    @pytest.mark.parametrize("way", Counting.WAYS)
    def test_count_in_a_trained_layer(self, tmp_path, way):
        plain, masked = self.pair(tmp_path, 2, lambda mlp: Counting(mlp, way))
        assert_same_run(masked, plain)
        assert masked.masked_run.replay.num_replayed

    @pytest.mark.parametrize("way", Steered.WAYS)
    def test_have_settings_in_a_frozen_layer(self, tmp_path, way):
        plain, masked = self.pair(tmp_path, 0, lambda mlp: Steered(mlp, way), [InEachStep()])
        assert_same_run(masked, plain)


class InSecondStep(TrainerCallback):
    def __init__(self, do: Any) -> None:
        self.do = do

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == 1:
            self.do(given["model"])
