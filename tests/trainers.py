"""TRL's trainers behind the mixin, each small enough for a test, and what a run of each shows.

    python -m tests.trainers

prints the table of docs/trainers.md. Nothing is downloaded.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from transformers import LlamaForSequenceClassification, PreTrainedModel

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import trl
from trl.experimental import cpo, gkd, gmpo, online_dpo, orpo, tpo

from layerrl import LayerMaskedMixin, trainer
from layerrl.reference import ReferenceModel
from tests.engines import Engine, in_place_of_vllm
from tests.grpo import PROMPTS, QUIETLY, reward, tokenizer
from tests.models import tiny, tiny_config
from tests.runs import assert_same_run, bits, freeze_by_hand, in_layers, load, moved, saved, train

LAYER, STEPS, SAVED_AT = 2, 5, 3

_PROMPTS = PROMPTS * 4
_ANSWERS = ["ab", "cde", "f", "ghij", "kl"] * 4
_OTHERS = ["mn", "o", "pqr", "st"] * 5
PREFERENCES = {
    "prompt": _PROMPTS,
    "chosen": _ANSWERS[: len(_PROMPTS)],
    "rejected": _OTHERS[: len(_PROMPTS)],
}
JUDGED = {
    "prompt": _PROMPTS,
    "completion": _ANSWERS[: len(_PROMPTS)],
    "label": [True, False, False, True] * 4,
}
CHAT = {
    "messages": [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in zip(_PROMPTS, _ANSWERS, strict=False)
    ]
}


def classifier() -> PreTrainedModel:
    """A tiny Llama of four layers with a score head."""
    config = tiny_config("llama", 4)
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(config)


def teacher() -> dict[str, Any]:
    return {"teacher_model": tiny("llama", 4, seed=1)}


def rewarded() -> dict[str, Any]:
    return {"reward_funcs": reward}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One of TRL's trainers, and what it needs."""

    plain: type
    masked: type
    config: type
    rows: dict[str, list[Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    """For its config."""
    arguments: Callable[[], dict[str, Any]] = dict
    """Its own, made anew for each trainer."""
    model: Callable[[], PreTrainedModel] = lambda: tiny("llama", 4)
    reference: bool = False
    """Whether it has one, with these settings."""
    repeats: bool = False
    """Whether it passes over the same rows more than once, with these settings."""
    vllm: bool = False
    """Whether TRL's `VLLMGeneration` generates for it."""
    experimental: bool = False

    def make(self, folder: Path, output_dir: Path, selection: Any = None, **changes: Any) -> Any:
        """A trainer on the model in the folder, layerrl's if there is a selection."""
        arguments = self.arguments() | changes.pop("arguments", {})
        rows = changes.pop("rows", self.rows)
        values = {
            "output_dir": str(output_dir),
            "per_device_train_batch_size": 4,
            "max_steps": STEPS,
            **QUIETLY,
        }
        processing_class = tokenizer()
        processing_class.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        model = load(folder, changes.pop("dtype", torch.float32))
        if selection == "by hand":
            freeze_by_hand(model, [LAYER])
            selection = None
        if selection is not None:
            arguments["selection"] = selection
        return (self.plain if selection is None else self.masked)(
            model=model,
            args=self.config(**(values | self.settings | changes)),
            train_dataset=Dataset.from_dict(rows),
            processing_class=processing_class,
            **arguments,
        )


class MaskedOnlineDPOTrainer(LayerMaskedMixin, online_dpo.OnlineDPOTrainer):
    pass


class MaskedGKDTrainer(LayerMaskedMixin, gkd.GKDTrainer):
    pass


class MaskedCPOTrainer(LayerMaskedMixin, cpo.CPOTrainer):
    pass


class MaskedORPOTrainer(LayerMaskedMixin, orpo.ORPOTrainer):
    pass


class MaskedGMPOTrainer(LayerMaskedMixin, gmpo.GMPOTrainer):
    pass


class MaskedTPOTrainer(LayerMaskedMixin, tpo.TPOTrainer):
    pass


_GENERATED = {"max_completion_length": 6}
_GROUPS = {"per_device_train_batch_size": 8, "num_generations": 4, "beta": 0.04} | _GENERATED
_MORE_THAN_ONCE = {"reference": True, "repeats": True}
_ONLINE = {"rows": {"prompt": _PROMPTS}, "arguments": rewarded, "settings": _GROUPS, "vllm": True}

# The oldest TRL has none.
_DISTILLATION = {}
if hasattr(trl, "DistillationTrainer"):
    _DISTILLATION["Distillation"] = Case(
        plain=trl.DistillationTrainer,
        masked=trainer.LayerMaskedDistillationTrainer,
        config=trl.DistillationConfig,
        rows={"prompt": _PROMPTS},
        settings=_GENERATED,
        arguments=teacher,
        vllm=True,
    )

CASES = {
    "GRPO": Case(
        plain=trl.GRPOTrainer,
        masked=trainer.LayerMaskedGRPOTrainer,
        config=trl.GRPOConfig,
        **_ONLINE,
        **_MORE_THAN_ONCE,
    ),
    "RLOO": Case(
        plain=trl.RLOOTrainer,
        masked=trainer.LayerMaskedRLOOTrainer,
        config=trl.RLOOConfig,
        **_ONLINE,
        **_MORE_THAN_ONCE,
    ),
    "DPO": Case(
        plain=trl.DPOTrainer,
        masked=trainer.LayerMaskedDPOTrainer,
        config=trl.DPOConfig,
        rows=PREFERENCES,
        **_MORE_THAN_ONCE,
    ),
    "KTO": Case(
        plain=trl.KTOTrainer,
        masked=trainer.LayerMaskedKTOTrainer,
        config=trl.KTOConfig,
        rows=JUDGED,
        **_MORE_THAN_ONCE,
    ),
    "SFT": Case(
        plain=trl.SFTTrainer,
        masked=trainer.LayerMaskedSFTTrainer,
        config=trl.SFTConfig,
        rows={"text": [a + b for a, b in zip(_PROMPTS, _ANSWERS, strict=False)]},
    ),
    "Reward": Case(
        plain=trl.RewardTrainer,
        masked=trainer.LayerMaskedRewardTrainer,
        config=trl.RewardConfig,
        rows={"chosen": PREFERENCES["chosen"], "rejected": PREFERENCES["rejected"]},
        model=classifier,
    ),
    **_DISTILLATION,
    "Online DPO": Case(
        plain=online_dpo.OnlineDPOTrainer,
        masked=MaskedOnlineDPOTrainer,
        config=online_dpo.OnlineDPOConfig,
        rows={"prompt": _PROMPTS},
        settings={"max_new_tokens": 6, "max_length": 32},
        arguments=rewarded,
        reference=True,
        repeats=True,
        experimental=True,
    ),
    "GKD": Case(
        plain=gkd.GKDTrainer,
        masked=MaskedGKDTrainer,
        config=gkd.GKDConfig,
        rows=CHAT,
        settings={"max_new_tokens": 6, "max_length": 32},
        arguments=teacher,
        experimental=True,
    ),
    "CPO": Case(
        plain=cpo.CPOTrainer,
        masked=MaskedCPOTrainer,
        config=cpo.CPOConfig,
        rows=PREFERENCES,
        settings={"max_length": 32},
        experimental=True,
    ),
    "ORPO": Case(
        plain=orpo.ORPOTrainer,
        masked=MaskedORPOTrainer,
        config=orpo.ORPOConfig,
        rows=PREFERENCES,
        settings={"max_length": 32},
        experimental=True,
    ),
    "GMPO": Case(
        plain=gmpo.GMPOTrainer,
        masked=MaskedGMPOTrainer,
        config=gmpo.GMPOConfig,
        experimental=True,
        **_ONLINE,
        **_MORE_THAN_ONCE,
    ),
    "TPO": Case(
        plain=tpo.TPOTrainer,
        masked=MaskedTPOTrainer,
        config=tpo.TPOConfig,
        rows={**PREFERENCES, "reference": _ANSWERS[: len(_PROMPTS)]},
        experimental=True,
    ),
}


class Runs:
    """A case's trainings, each done when it is first asked for."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        saved(folder / "base", case.model())

    def make(self, name: str, selection: Any, **changes: Any) -> Any:
        """A trainer of this case."""
        return self.case.make(self.folder / "base", self.folder / name, selection, **changes)

    def _trained(self, name: str, selection: Any, **changes: Any) -> Any:
        made = self.make(name, selection, **changes)
        train(made)
        return made

    @cached_property
    def plain(self) -> Any:
        """TRL's own."""
        return self._trained("plain", None)

    @cached_property
    def full(self) -> Any:
        """Masked, training everything."""
        return self._trained("full", "full")

    @cached_property
    def by_hand(self) -> Any:
        """TRL's own, with all but one layer frozen."""
        return self._trained("by-hand", "by hand")

    @cached_property
    def masked(self) -> Any:
        """Masked, training one layer, with a checkpoint on the way."""
        return self._trained("masked", LAYER, save_strategy="steps", save_steps=SAVED_AT)

    @cached_property
    def resumed(self) -> Any:
        """Another one that goes on from that checkpoint."""
        assert self.masked.state.global_step == STEPS
        made = self.make("resumed", LAYER)
        train(made, resume_from_checkpoint=str(self.checkpoint))
        return made

    @property
    def checkpoint(self) -> Path:
        """Where `masked` saved."""
        return self.folder / "masked" / f"checkpoint-{SAVED_AT}"

    @property
    def base(self) -> dict[str, torch.Tensor]:
        """All that is saved with the model before any training."""
        return bits(load(self.folder / "base"))

    @cached_property
    def syncs(self) -> list[list[str]]:
        """What a masked trainer has sent to what stands in for vLLM, in two steps."""
        with pytest.MonkeyPatch.context() as patch, in_place_of_vllm(patch):
            module = sys.modules[self.case.plain.__module__]  # some ask again
            patch.setattr(module, "is_vllm_available", lambda: True, raising=False)
            self._trained("vllm", LAYER, use_vllm=True, vllm_mode="colocate", max_steps=2)
        return Engine.latest.syncs


YES, NO, NOTHING = "yes", "no", "-"


def trains_the_layer_alone(runs: Runs) -> str:
    """Exactly as TRL does with the rest frozen by hand."""
    assert_same_run(runs.masked, runs.by_hand)
    expected = {name for name in runs.base if in_layers(name, [LAYER])}
    return YES if moved(runs.masked, runs.base) == expected else NO


def needs_no_second_model(runs: Runs) -> str:
    if not runs.case.reference:
        return NOTHING
    return YES if isinstance(runs.masked.ref_model, ReferenceModel) else NO


def replays(runs: Runs) -> str:
    if not runs.case.repeats:
        return NOTHING
    replay = runs.masked.masked_run.replay
    return YES if replay.enabled and replay.num_replayed else NO


def saves_a_delta(runs: Runs) -> str:
    """And a run that goes on from it ends where the other one did."""
    files = {path.name for path in runs.checkpoint.rglob("*.safetensors")}
    expected = {"delta.safetensors"} | ({"reference.safetensors"} if runs.case.reference else set())
    ends_alike = all(
        value.equal(bits(runs.masked.model)[name])
        for name, value in bits(runs.resumed.model).items()
    )
    return YES if files == expected and ends_alike else NO


def sends_what_was_trained(runs: Runs) -> str:
    if not runs.case.vllm:
        return NO if hasattr(runs.masked.args, "use_vllm") else NOTHING
    everything = [name for name, _ in runs.masked.model.named_parameters()]
    trained = [name for name in everything if in_layers(name, [LAYER])]
    return YES if runs.syncs == [everything, trained] else NO


COLUMNS = {
    "trains only the selection": trains_the_layer_alone,
    "reference without a second model": needs_no_second_model,
    "prefix replay": replays,
    "delta checkpoints": saves_a_delta,
    "vLLM gets only what was trained": sends_what_was_trained,
}
HEADING = (
    " | ".join(("| trainer", *COLUMNS)) + " |",
    "|---" * (1 + len(COLUMNS)) + "|",
)


def row(name: str, runs: Runs) -> str:
    """One line of the table in docs/trainers.md, from what the runs show."""
    title = f"{name} (`trl.experimental`)" if runs.case.experimental else name
    return " | ".join((f"| {title}", *(observe(runs) for observe in COLUMNS.values()))) + " |"


def main() -> None:
    """Print the table."""
    disable_progress_bars()
    lines = list(HEADING)
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row(name, Runs(case, Path(folder))))
            print(lines[-1], file=sys.stderr)
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
