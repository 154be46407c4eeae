"""A trainer that makes its own models: each one is masked, and has a record of its own."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments
from transformers import trainer as transformers_trainer
from transformers.hyperparameter_search import HyperParamSearchBackendBase
from transformers.trainer_utils import BestRun, HPSearchBackend

from layerrl import LayerMaskedMixin, load_delta
from layerrl.errors import DeltaError, FrozenTensorError, SelectionError
from tests.grpo import QUIETLY
from tests.models import tiny
from tests.runs import bits, freeze_by_hand, in_layers, moved

ROWS = [{"input_ids": [4, 5, 6, 7], "labels": [4, 5, 6, 7]}] * 16


class Masked(LayerMaskedMixin, Trainer):
    pass


class Made(list):
    """A `model_init` that keeps its models, their first bits, and the trials it was asked with."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.changes, self.before, self.trials = changes, [], []

    def __call__(self, trial: Any = None) -> Any:
        depth = trial["depth"] if trial and "depth" in trial else 4
        self.append(tiny("llama", depth, seed=len(self), **self.changes))
        self.before.append(bits(self[-1]))
        self.trials.append(trial)
        return self[-1]


def make(made: Any, folder: Any, cls: type = Masked, **arguments: Any) -> Any:
    values = {"max_steps": 2, **QUIETLY, "per_device_train_batch_size": 4}
    args = TrainingArguments(output_dir=str(folder), **(values | arguments.pop("args", {})))
    if issubclass(cls, LayerMaskedMixin):
        arguments = {"selection": 2, **arguments}
    return cls(model_init=made, args=args, train_dataset=ROWS, eval_dataset=ROWS[:4], **arguments)


def layer(model: Any, *layers: int) -> set[str]:
    return {name for name, _ in model.named_parameters() if in_layers(name, layers)}


def test_each_training_masks_the_model_it_makes(tmp_path):
    made = Made()
    trainer = make(made, tmp_path)
    for times in (1, 2):
        trainer.train()
        assert trainer.model is made[times]
        assert moved(trainer, made.before[times]) == layer(made[times], 2)
        assert all(p.requires_grad for model in made for p in model.parameters())


def test_trains_as_the_plain_trainer_does_with_layers_frozen_by_hand(tmp_path):
    def by_hand() -> Any:
        model = tiny("llama", 4)
        freeze_by_hand(model, [2])
        return model

    plain = make(by_hand, tmp_path / "plain", Trainer)
    masked = make(lambda: tiny("llama", 4), tmp_path / "masked")
    plain.train()
    masked.train()
    assert_close(bits(masked.model), bits(plain.model), rtol=0, atol=0)


def test_a_delta_is_on_the_model_that_was_made_last(tmp_path):
    made = Made()
    trainer = make(made, tmp_path)
    trainer.train()
    trainer.save_delta(tmp_path / "delta")
    base = tiny("llama", 4, seed=1)
    load_delta(base, tmp_path / "delta")
    assert_close(bits(base), bits(trainer.model), rtol=0, atol=0)
    with pytest.raises(DeltaError):
        load_delta(tiny("llama", 4, seed=0), tmp_path / "delta")


def test_a_frozen_tensor_of_the_new_model_is_watched(tmp_path):
    trainer = make(Made(), tmp_path)
    trainer.train()
    trainer.check_frozen()
    with torch.no_grad():
        trainer.model.lm_head.weight.add_(1)
    with pytest.raises(FrozenTensorError, match=r"lm_head\.weight"):
        trainer.save_model(str(tmp_path / "whole"))


def test_a_checkpoint_resumes_on_a_model_made_anew(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 1}
    whole = make(lambda: tiny("llama", 4), tmp_path / "run", args=args)
    whole.train()
    again = make(lambda: tiny("llama", 4), tmp_path / "again", args=args)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert_close(bits(again.model), bits(whole.model), rtol=0, atol=0)


def test_layers_are_chosen_anew_of_a_model_of_another_depth(tmp_path):
    made = Made()
    trainer = make(made, tmp_path, selection="last:1")
    trainer.train(trial={"depth": 3})
    assert moved(trainer, made.before[1]) == layer(made[1], 2)
    assert trainer.selection.num_layers == 3
    with pytest.raises(SelectionError, match="layer 3 does not exist"):
        make(Made(), tmp_path, selection=3).train(trial={"depth": 2})


def test_layers_from_an_iterator_are_those_of_every_model(tmp_path):
    made = Made()
    trainer = make(made, tmp_path, selection=iter([1, 3]))
    trainer.train()
    assert moved(trainer, made.before[1]) == layer(made[1], 1, 3)


def test_models_with_adapters_are_refused(tmp_path):
    from peft import LoraConfig

    def adapted() -> Any:
        model = tiny("llama", 4)
        if made:
            model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
        made.append(model)
        return model

    made: list[Any] = []
    trainer = make(adapted, tmp_path)
    with pytest.raises(SelectionError, match="with adapters"):
        trainer.train()


class Search(HyperParamSearchBackendBase):
    """Two trials, as a backend runs them."""

    name = "ray"

    @staticmethod
    def is_available() -> bool:
        return True

    def default_hp_space(self, trial: Any) -> Any:
        return trial

    def run(self, trainer: Any, n_trials: int, direction: str, **_: Any) -> BestRun:
        found = []
        for index in range(n_trials):
            trainer.objective = None
            trainer.train(resume_from_checkpoint=None, trial={"learning_rate": 0.01 * (index + 1)})
            found.append(trainer.compute_objective(trainer.evaluate()))
        best = min(range(n_trials), key=found.__getitem__)
        return BestRun(str(best), found[best], {})


def test_a_hyperparameter_search_trains_the_layers_in_each_trial(tmp_path, monkeypatch):
    backends = {HPSearchBackend.RAY: Search}
    monkeypatch.setattr(transformers_trainer, "ALL_HYPERPARAMETER_SEARCH_BACKENDS", backends)
    made = Made()
    trainer = make(made, tmp_path)
    best = trainer.hyperparameter_search(backend="ray", n_trials=2)
    assert best.objective > 0
    assert made.trials[1:] == [{"learning_rate": 0.01}, {"learning_rate": 0.02}]
    for model, before in zip(made[1:], made.before[1:], strict=True):
        now = bits(model)
        assert {n for n in now if not torch.equal(now[n], before[n])} == layer(model, 2)
        assert all(p.requires_grad for p in model.parameters())
