"""Options of TRL's configs, many at a time: each training is TRL's with the rest frozen by hand."""

from typing import Any

import pytest
from datasets import Dataset
from trl.trainer.callbacks import SyncRefModelCallback

from tests.devices import on_any_device
from tests.grpo import reward
from tests.runs import assert_same_run, assert_trained, train
from tests.trainers import CASES, LAYER, Runs

pytestmark = on_any_device


def brevity(completions: list[str], **_: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


TWO_REWARDS = {"arguments": {"reward_funcs": [reward, brevity]}, "reward_weights": [1.0, 0.3]}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
BEST = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, **EVALUATED}

# A row has as many as go together.
OPTIONS = [
    (
        "GRPO",
        {"loss_type": "cispo", "scale_rewards": "batch", "num_generations": 2, "temperature": 0.5}
        | {"repetition_penalty": 1.3, "top_k": 30, "warmup_steps": 1, "optim": "adagrad"}
        | {"lr_scheduler_type": "cosine", "shuffle_dataset": False, "logging_steps": 2},
    ),
    (
        "GRPO",
        {"loss_type": "vespo", "use_bias_correction_kl": False, "off_policy_mask_threshold": 0.5}
        | {"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
        | {"adam_beta2": 0.7, "data_seed": 3, "include_num_input_tokens_seen": "all"},
    ),
    (
        "GRPO",
        {"loss_type": "sapo", "importance_sampling_level": "sequence", "entropy_coef": 0.01}
        | {"multi_objective_aggregation": "normalize_then_sum", "top_entropy_quantile": 0.8}
        | {"cast_lm_head_to_fp32": True, "beta": 0.0, "min_p": 0.01, **TWO_REWARDS},
    ),
    (
        "GRPO",
        {"loss_type": "luspo", "use_adaptive_entropy": True, "entropy_target": 5.0, "seed": 7}
        | {"entropy_coef_min": 0.001, "num_generations_eval": 2, "eval_on_start": True, **BEST},
    ),
    (
        "GRPO",
        {"loss_type": "bnpo", "delta": 1.5, "epsilon": 0.01, "epsilon_high": 0.5}
        | {"num_iterations": 2, "generation_kwargs": {"min_new_tokens": 3}, "max_grad_norm": 0.0}
        | {"cache_implementation": "static", "pad_to_multiple_of": 8, "disable_dropout": True},
    ),
    (
        "RLOO",
        {"normalize_advantages": True, "reward_clip_range": (0.0, 9.0), "optim": "rmsprop"}
        | {"steps_per_generation": 2, **TWO_REWARDS},
    ),
    (
        "DPO",
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
        | {"pad_to_multiple_of": 8, "optim": "sgd", **BEST},
    ),
    (
        "DPO",
        {"loss_type": ["exo_pair"], "label_smoothing": 0.1, "max_length": 6, "beta": 1.0}
        | {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.9}
        | {"truncation_mode": "keep_end", "precompute_ref_log_probs": True}
        | {"precompute_ref_batch_size": 2, "dataloader_drop_last": True},
    ),
    (
        "KTO",
        {"loss_type": "apo_zero_unpaired", "desirable_weight": 0.5, "undesirable_weight": 2.0}
        | {"precompute_ref_log_probs": True, "gradient_accumulation_steps": 2},
    ),
    (
        "SFT",
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 12, "eval_packing": False}
        | {"loss_type": "dft", "neftune_noise_alpha": 5.0, "shuffle_dataset": True, **BEST},
    ),
    (
        "SFT",
        {"loss_type": "chunked_nll", "max_length": 6, "truncation_mode": "keep_end"}
        | {"train_sampling_strategy": "group_by_length", "optim": "adafactor"},
    ),
    ("Reward", {"center_rewards_coefficient": 0.1, "lr_scheduler_type": "inverse_sqrt"}),
]


def both(case: str, folder: Any, **changes: Any) -> Runs:
    """Train a case both ways, and compare all that came out."""
    runs = Runs(CASES[case], folder)
    changes = {"max_steps": 2, **changes}
    if changes.get("eval_strategy"):
        evaluated = Dataset.from_dict(runs.case.rows).select(range(4))
        changes["arguments"] = {**changes.get("arguments", {}), "eval_dataset": evaluated}
    made = [runs.make(name, which, **changes) for name, which in (("a", "by hand"), ("b", LAYER))]
    train(*made)
    assert_same_run(made[1], made[0])
    assert_trained(made[1], runs.base, [LAYER])
    return runs


@pytest.mark.parametrize(
    ("case", "changes"),
    OPTIONS,
    ids=[f"{case}-{next(iter(changes.values()))}" for case, changes in OPTIONS],
)
def test_options_train_to_the_bits_of_trl(tmp_path, case, changes):
    both(case, tmp_path, **changes)


@pytest.mark.parametrize("case", ["GRPO", "DPO"])
def test_a_reference_that_follows_leaves_frozen_tensors_exact(tmp_path, monkeypatch, case):
    # TRL's own adds 0.4 and 0.6 of a frozen tensor up, which is not that tensor any more.
    def of_what_trains(model: Any, reference: Any, alpha: float) -> None:
        for value, parameter in zip(reference.parameters(), model.parameters(), strict=True):
            if parameter.requires_grad:
                value.data.mul_(1.0 - alpha).add_(parameter.data, alpha=alpha)

    monkeypatch.setattr(SyncRefModelCallback, "_sync_target_model", staticmethod(of_what_trains))
    following = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.6}
    both(case, tmp_path, **following)
