"""Pairs of short GRPO runs that must agree: TRL with layers frozen by hand, and layerrl."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed

from layerrl import LayerMaskedGRPOTrainer, LayerSelection
from layerrl.delta import DeltaBase, put_tensors, tensors_of_run
from tests.devices import on_cpu
from tests.grpo import PROMPTS, make
from tests.models import tiny
from tests.replays import noting_hook

REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
NO_CHECKPOINTING = {"gradient_checkpointing": False}

_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")
# What no two runs of the same thing share.
_CLOCKS = ("step_time", "runtime", "per_second", "preparation_time", "perf/", "time_s", "tok/s")


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Inside, a disk fills whenever a file has as many bytes, whoever writes it."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def saved(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """A folder with a model in it, a tiny Llama of four layers by default.

    Plain TRL can read its reference only from there.
    """
    (model or tiny("llama", 4)).save_pretrained(folder)
    return folder


def restore_delta(
    model: PreTrainedModel, path: Path, *, selection: LayerSelection, base: DeltaBase
) -> None:
    """Put a delta back as a trainer does that resumes, whatever the model holds now."""
    put_tensors(model, selection.parameters(model), tensors_of_run(path, selection, base, model))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """What `saved` wrote."""
    [architecture] = AutoConfig.from_pretrained(folder).architectures
    return getattr(transformers, architecture).from_pretrained(folder, dtype=dtype)


def shares_keys_and_values() -> PreTrainedModel:
    """A tiny Gemma 4: its two upper layers attend to keys and values that the lower ones made."""
    config = AutoConfig.for_model(
        "gemma4_text",
        vocab_size=64,
        vocab_size_per_layer_input=64,
        hidden_size=16,
        hidden_size_per_layer_input=4,
        intermediate_size=32,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        global_head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def in_layers(name: str, layers: Iterable[int]) -> bool:
    """Whether a tensor belongs to one of these decoder layers of a text stack."""
    match = _LAYER.search(name)
    return bool(match) and "vis" not in name and int(match[1]) in layers


def freeze_by_hand(model: nn.Module, layers: Iterable[int]) -> None:
    """All that a user of plain TRL can do to train a few layers alone."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(in_layers(name, layers))


def pair(folder: Path, *, layers: Iterable[int] = (2,), **changes: Any) -> tuple[Any, Any]:
    """Two trainers on the model in the folder, three steps each: by hand, and with a selection.

    `masked` holds arguments of the second one alone, `dtype` is the weights', other keywords go to
    both as to `make`.
    """
    changes = {"max_steps": 3, **changes}
    dtype = changes.pop("dtype", torch.float32)
    only_masked = changes.pop("masked", {})
    arguments = changes.pop("arguments", {})
    by_hand = load(folder, dtype)
    freeze_by_hand(by_hand, layers)
    plain = make(by_hand, folder.parent / "plain", arguments=arguments, **changes)
    masked = make(
        load(folder, dtype),
        folder.parent / "masked",
        arguments={"selection": layers, **arguments, **only_masked},
        trainer=LayerMaskedGRPOTrainer,
        **changes,
    )
    return plain, masked


def train(*trainers: Any, **arguments: Any) -> None:
    """Train each from the same random state, as if each had a process of its own."""
    for trainer in trainers:
        set_seed(trainer.args.seed)
        trainer.train(**arguments)


def trained_pair(folder: Path, **changes: Any) -> tuple[Any, Any]:
    """As `pair`, and trained."""
    plain, masked = pair(folder, **changes)
    train(plain, masked)
    return plain, masked


def evaluation(every: int = 1, num_prompts: int = 2, **changes: Any) -> dict[str, Any]:
    """Keywords for `make` that evaluate during training, two prompts to a batch."""
    return {
        "eval_strategy": "steps",
        "eval_steps": every,
        "arguments": {"eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:num_prompts]})},
        **changes,
    }


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that is saved with a model."""
    return {name: on_cpu(tensor) for name, tensor in model.state_dict().items()}


def optimizer_state(trainer: Any) -> dict[str, Tensor]:
    """The optimizer's tensors, by the name of the parameter and what they are of it."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    return {
        f"{names[id(parameter)]}: {key}": on_cpu(value)
        for parameter, state in trainer.optimizer.state.items()
        for key, value in state.items()
    }


def logged(trainer: Any) -> list[dict[str, str]]:
    """Everything a run logged but the time it took and what only layerrl logs."""
    return [
        {
            key: repr(value)
            for key, value in entry.items()
            if not key.startswith("layerrl/") and not any(clock in key for clock in _CLOCKS)
        }
        for entry in trainer.state.log_history
    ]


def metric(trainer: Any, name: str) -> list[float]:
    """What a run logged under a name, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_same_run(found: Any, expected: Any) -> None:
    """Two trainers agree bit for bit: parameters, optimizer state, everything logged."""
    assert logged(found) == logged(expected)
    assert_close(bits(found.model), bits(expected.model), rtol=0, atol=0)
    assert_close(optimizer_state(found), optimizer_state(expected), rtol=0, atol=0)


def moved(trainer: Any, before: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are not what they were."""
    return {name for name, now in bits(trainer.model).items() if not torch.equal(now, before[name])}


def assert_trained(trainer: Any, before: dict[str, Tensor], layers: Iterable[int]) -> None:
    """Every step had a gradient, every tensor of the layers moved, and nothing else did."""
    norms = metric(trainer, "grad_norm")
    assert norms
    assert all(norm > 0 for norm in norms)
    assert moved(trainer, before) == {name for name in before if in_layers(name, layers)}


class Passes:
    """How often anything inside a layer ran, for each pass that scored completions.

    A replayed layer's own `forward` does not run, so nothing inside it does.
    """

    def __init__(self, trainer: Any, layer: nn.Module) -> None:
        self.calls: list[int] = []
        self._total = 0
        for module in list(layer.modules())[1:]:
            noting_hook(module, self._count)
        score = trainer._get_per_token_logps_and_entropies

        def counting(*args: Any, **kwargs: Any) -> Any:
            before = self._total
            result = score(*args, **kwargs)
            self.calls.append(self._total - before)
            return result

        trainer._get_per_token_logps_and_entropies = counting

    def _count(self) -> None:
        self._total += 1

    @property
    def ran(self) -> list[bool]:
        """For each pass, whether the layer ran."""
        return [calls > 0 for calls in self.calls]
