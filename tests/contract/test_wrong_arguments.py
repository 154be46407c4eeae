"""Whatever a caller passes is checked at the door: every argument with values of every wrong kind.

Each is refused in a sentence that names the argument, before a model runs, a file appears or a
flag changes. Arguments are found by `inspect.signature`: a new one without a kind fails.
"""

import inspect
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from importlib import import_module
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, GRPOConfig, GRPOTrainer, RLOOConfig, SFTConfig

from layerrl import (
    ContributionReport,
    LayerMaskedGRPOTrainer,
    LayerMaskedMixin,
    LayerRLError,
    LayerSelection,
    contribution_probe,
    integrations,
    load_delta,
    merge_delta,
    published_contributions,
    save_delta,
    select_layers,
    trainer,
)
from layerrl import delta as layerrl_delta
from layerrl.cli import main
from layerrl.delta import DeltaBase, Deltas, disabled, push_delta, unload_delta
from layerrl.errors import ProbeError, TrainerError
from layerrl.quantisation import keep_layout
from layerrl.report import Cost, Score
from layerrl.trainer import GiGPOConfig, LayerSchedule, TextRollout
from tests.grpo import PROMPTS, QUIETLY, config, make, reward, tokenizer
from tests.models import tiny
from tests.signatures import masked_trainers


class Odd:
    """A value that raises whatever it is asked."""

    def _refuse(self, *_: object) -> Any:
        raise RuntimeError("asked")

    __repr__ = __str__ = __eq__ = __bool__ = __len__ = __hash__ = __format__ = _refuse


class OddPath:
    """A path that cannot be asked for its text."""

    def __fspath__(self) -> str:
        raise RuntimeError("asked")


class Scalar:
    """What libraries with numbers of their own have."""

    def tolist(self) -> str:
        return "5"


JUNK: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "numpy's True": lambda: np.True_,
    "0": lambda: 0,
    "-1": lambda: -1,
    "1": lambda: 1,
    "numpy's 1": lambda: np.int64(1),
    "torch's 1": lambda: torch.tensor(1),
    "10**30": lambda: 10**30,
    "10**400": lambda: 10**400,
    "10**5000": lambda: 10**5000,
    "2.5": lambda: 2.5,
    "numpy's 0.5": lambda: np.float32(0.5),
    "1e308": lambda: 1e308,
    "NaN": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: float("-inf"),
    "numpy's NaN": lambda: np.float64("nan"),
    "1j": lambda: 1j,
    "Decimal": lambda: Decimal("NaN"),
    "Fraction": lambda: Fraction(1, 2),
    "empty text": lambda: "",
    "spaces": lambda: "  ",
    "text": lambda: "no",
    "long text": lambda: "x" * 5000,
    "NUL": lambda: "a\0b",
    "surrogate": lambda: "\ud800",
    "middle of 5000 digits": lambda: "middle:" + "9" * 5000,
    "bytes": lambda: b"x",
    "empty list": list,
    "[1]": lambda: [1],
    "[[1]]": lambda: [[1]],
    "[None]": lambda: [None],
    "(0, -1)": lambda: (0, -1),
    "(0, 0)": lambda: (0, 0),
    "list of NUL": lambda: ["a\0b"],
    "empty dict": dict,
    "dict": lambda: {"x": 1},
    "dict of None": lambda: {None: None},
    "set": lambda: {"x"},
    "generator": lambda: (each for each in ("x",)),
    "slice": lambda: slice("a", None),
    "slice of 0": lambda: slice(0, 1, 0),
    "range": lambda: range(0),
    "object": object,
    "class": lambda: int,
    "function": lambda: lambda: None,
    "Ellipsis": lambda: ...,
    "array": lambda: np.array([1, 2]),
    "empty array": lambda: np.array([]),
    "tensor": lambda: torch.ones(2),
    "meta tensor": lambda: torch.ones(2, device="meta"),
    "error": lambda: ValueError("x"),
    "path of NUL": lambda: Path("a\0b"),
    "OddPath": OddPath,
    "model class": lambda: nn.Linear,
    "Scalar": Scalar,
    "Odd": Odd,
}


def own(value: Any) -> Any:
    """Python's number for one of numpy or torch."""
    tensor = isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_meta
    return value.item() if tensor or isinstance(value, np.generic) else value


def is_int(value: Any, least: float = -np.inf) -> bool:
    value = own(value)
    return type(value) is int and least <= value < 2**64


def is_float(value: Any, least: float = -np.inf, most: float = np.inf) -> bool:
    value = own(value)
    if type(value) not in (int, float, Fraction):
        return False
    try:
        return np.isfinite(float(value)) and least <= value <= most
    except OverflowError:
        return False


def is_path(value: Any) -> bool:
    is_path = isinstance(value, str | PathLike) and not isinstance(value, OddPath)
    return is_path and "\0" not in str(value) and str(value).strip() != ""


@dataclass(frozen=True, slots=True)
class Kind:
    """What an argument takes."""

    right: Callable[[Any], bool] = lambda _: False
    """Whether one of `JUNK` is none for it."""
    more: tuple[Any, ...] = ()
    """Wrong values of its own."""


def optional(kind: Kind) -> Kind:
    return Kind(lambda value: value is None or kind.right(value), kind.more)


SWITCH = Kind(lambda value: isinstance(value, bool | np.bool_), (2, "yes"))
COUNT = Kind(lambda value: is_int(value, 1), (-3, "3"))
NATURAL = Kind(lambda value: is_int(value, 0))
INTEGER = Kind(is_int)
NUMBER = Kind(is_float)
MEAN = Kind(lambda value: is_float(value, -1e149, 1e149), (1e150, -1e308))
AMOUNT = Kind(lambda value: is_float(value, 0))
TEXT = Kind(lambda value: isinstance(value, str) and value != "\ud800")
PATH = Kind(is_path, (5,))
OPAQUE = Kind(lambda value: True)
"""What is handed on as it is: its owner says what is wrong with it."""
NEVER = Kind()


@dataclass
class World:
    """What right calls take, made once: a base, a trained copy, a delta, data; and a folder."""

    folder: Path
    num_outs: int = 0
    base: Any = field(default_factory=lambda: tiny("llama", 4))
    model: Any = field(default_factory=lambda: tiny("llama", 4))
    loaded: Any = field(default_factory=lambda: tiny("llama", 4))

    def __post_init__(self) -> None:
        self.selection = select_layers(self.base, 1)
        self.base.save_pretrained(self.folder / "base")
        with torch.no_grad():
            for parameter in self.selection.parameters(self.model).values():
                parameter.add_(1)
        self.delta = save_delta(
            self.model, self.folder / "delta", selection=self.selection, base=self.base
        )
        load_delta(self.loaded, self.delta, keep_base=True)
        self.deltas = Deltas(tiny("llama", 4), {"a": self.delta})
        self.args = config(self.folder / "unused", eval_strategy="no", max_steps=1)
        self.data = Dataset.from_dict({"prompt": PROMPTS})
        self.eval_data = Dataset.from_dict({"prompt": ["no", "pq"]})
        self.report = report(4)
        self.trainer = make(tiny("llama", 4), self.folder / "unused", selection=1)

    @property
    def out(self) -> Path:
        """A folder that is not there yet, another one each time."""
        self.num_outs += 1
        return self.folder / f"out-{self.num_outs}"

    def state(self) -> dict[str, Any]:
        """What no refused call may change."""
        models = (self.base, self.model, self.loaded)
        modules = [module for model in models for module in model.modules()]
        return {
            "files": sorted(str(file) for file in self.folder.rglob("*")),
            "flags": [p.requires_grad for model in models for p in model.parameters()],
            "versions": [p._version for model in models for p in model.parameters()],
            "gradients": [p.grad is None for model in models for p in model.parameters()],
            "hooks": sum(
                len(getattr(module, name))
                for module in modules
                for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            ),
            "training": [module.training for module in modules],
            "random": torch.get_rng_state().tolist(),
            "args": self.args.to_json_string(),
        }


def report(num_layers: int) -> ContributionReport:
    return ContributionReport(
        method="gradient",
        layers=tuple(Score(scores=((float(k), k + 0.5),)) for k in range(num_layers)),
    )


@dataclass(frozen=True)
class Door:
    """A callable of the public interface."""

    call: Callable[..., Any]
    right: Callable[[World], dict[str, Any]]
    """Arguments that it takes."""
    kinds: dict[str, Kind]
    """What each of its arguments takes."""
    left_out: Collection[str] = ()
    """Arguments that another door has, or that are TRL's."""
    called: dict[str, str] = field(default_factory=dict)
    """Argument to a pattern of what else messages call it."""

    @property
    def arguments(self) -> list[str]:
        named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        parameters = inspect.signature(self.call).parameters.values()
        names = [p.name for p in parameters if p.kind in named]
        return [name for name in names if name not in ("self", *self.left_out)]

    def named(self, argument: str) -> str:
        """A pattern of what a message calls an argument."""
        return "|".join([rf"\b{argument}\b", *filter(None, [self.called.get(argument)])])


MODEL = Kind(more=(tokenizer,))
SELECTION = Kind()


def is_layer(value: Any) -> bool:
    return is_int(value, -4) and not is_int(value, 4)


def are_layers(value: Any) -> bool:
    """Those of `JUNK` that name layers."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return is_layer(value) or (isinstance(value, list | tuple) and value in ([1], (0, -1), [1, 2]))


def is_empty(value: Any) -> bool:
    listed = isinstance(value, list | tuple | set | dict | range | np.ndarray)
    return listed and len(value) == 0


LAYERS = Kind(
    are_layers,
    ("auto", "middle:0", "40%:30%", "10", [0, 0], [9], 2.0),
)
GLOBS = Kind(lambda v: v is None, ("nothing.*", ["self_attn.*", 5], [""], "a\ud83d"))
BOOST = Kind(
    lambda v: v is None or (isinstance(v, dict) and not v),
    ({1: 0}, {1: -1}, {9: 2.0}, {1: "2"}, {1: True}, "decay:2", "decay:nan", {(1,): 2.0}),
)
STACK = Kind(lambda v: v is None, ("vision", "audio"))
REVISION = Kind(
    lambda v: v is None or (isinstance(v, list) and v == [None]), (["main", "main"], "main", 5)
)
TOKEN = Kind(lambda v: v is None or isinstance(v, bool) or (isinstance(v, str) and v.isprintable()))
DELTA = Kind(lambda v: False, ("no/such/folder", "/", ["/nowhere"], []))
NEW_PATH = Kind(is_path, ("/dev/null/x",))


def probing(w: World) -> dict[str, Any]:
    return {
        "model": w.base,
        "method": "train",
        "reward_funcs": reward,
        "train_dataset": w.data,
        "processing_class": tokenizer(),
        "args": w.args,
        "eval_dataset": w.eval_data,
        "output_dir": w.out,
    }


def masked_arguments(w: World) -> dict[str, Any]:
    return {
        "model": w.base,
        "reward_funcs": reward,
        "args": w.args,
        "train_dataset": w.data,
        "processing_class": tokenizer(),
        "selection": 1,
    }


def made(cls: type, **kwargs: Any) -> Any:
    return cls(**kwargs)


ARGS = Kind(
    lambda v: v is None,
    (
        SFTConfig,
        DPOConfig("x", **QUIETLY),
        config("x", kind=RLOOConfig),
    ),
)
DATA = Kind(more=(["a"], Dataset.from_dict({"text": ["a"]}), Dataset.from_dict({"prompt": []})))
SCORES_ROWS = Kind(
    lambda v: v is None or (isinstance(v, list) and v == [[1]]),
    ([[]], [["a"]], [[1.0], [1.0, 2.0]], [[float("nan")]]),
)

EMPTY_TUPLE = Kind(lambda v: isinstance(v, tuple) and not v)

DOORS: dict[str, Door] = {
    "select_layers": Door(
        select_layers,
        lambda w: {"model": w.base, "layers": 1},
        {
            "model": MODEL,
            "layers": LAYERS,
            "modules": GLOBS,
            "also": Kind(lambda v: v is None or is_empty(v), ("nothing.*", [5])),
            "boost": BOOST,
            "stack": STACK,
        },
        called={"layers": r"layers?\b|slice|auto|depth"},
    ),
    "LayerSelection": Door(
        LayerSelection,
        lambda w: {"num_layers": 4, "layers": (1,)},
        {
            "num_layers": COUNT,
            "layers": NEVER,
            "learning_rate_scale": EMPTY_TUPLE,
            "modules": Kind(lambda v: v is None),
            "full": Kind(lambda v: isinstance(v, bool)),
            "also": EMPTY_TUPLE,
            "boosts": EMPTY_TUPLE,
            "stack": Kind(),
        },
        called={"layers": r"layers?\b"},
    ),
}
for name in ("blocks", "parameters", "masked", "plan", "quantization_skip_modules"):
    DOORS[f"LayerSelection.{name}"] = Door(
        getattr(LayerSelection, name),
        lambda w: {"self": w.selection, "model": w.base},
        {
            "model": MODEL,
            "dtype": Kind(lambda v: v is None, (torch.int8, "float32")),
            "beta": AMOUNT,
            "num_iterations": COUNT,
            "quantization_config": Kind(lambda v: v is None),
        },
    )

DOORS |= {
    "LayerSelection.to_config": Door(
        LayerSelection.to_config,
        lambda w: {"self": w.selection, "tool": "peft", "model": w.base},
        {"tool": Kind(), "model": MODEL},
    ),
    "LayerSelection.from_json": Door(
        LayerSelection.from_json,
        lambda w: {"text": "{}"},
        {"text": Kind()},
        called={"text": "JSON"},
    ),
    "contribution_probe": Door(
        contribution_probe,
        probing,
        {
            "model": MODEL,
            "method": Kind(
                more=("train:x", "race:x", "race:1", "position:nan", "position:2", "published:x")
            ),
            "reward_funcs": Kind(
                lambda v: is_path(v) or (callable(v) and not isinstance(v, type)), ([reward, 5], [])
            ),
            "train_dataset": DATA,
            "processing_class": Kind(lambda v: v is None),
            "args": Kind(more=ARGS.more),
            "layers": LAYERS,
            "modules": GLOBS,
            "budget": OPAQUE,
            "seeds": Kind(
                lambda v: isinstance(v, np.ndarray | list) and len(v) > 0 and [*v] in ([1], [1, 2]),
                (3, "12", [1, 1], [1.0], [True], [-1], [2**32], {"x": 1}, {1, 2}),
            ),
            "trainer_class": Kind(
                lambda v: not isinstance(v, type) and callable(v),
                (GRPOTrainer, trainer.LayerMaskedDPOTrainer, nn.Linear),
            ),
            "eval_dataset": Kind(
                more=(
                    *DATA.more,
                    Dataset.from_dict({"prompt": ["z"]}),
                    Dataset.from_dict({"prompt": PROMPTS}),
                )
            ),
            "full_args": ARGS,
            "greedy": SWITCH,
            "halving": SWITCH,
            "output_dir": NEW_PATH,
            "executor": Kind(more=("Serial",)),
            "resources": Kind(
                lambda v: v is None or (isinstance(v, dict) and not v),
                (
                    "x",
                    {"num_cpus": -1},
                    {"num_cpus": "1"},
                    {"num_gpus": float("nan")},
                    ["num_cpus"],
                ),
            ),
        },
        called={
            "layers": r"layers?\b|slice|auto|depth",
            "method": "published for",
            "eval_dataset": "evaluation prompts",
            "output_dir": "/dev/null",
        },
    ),
    "contribution_probe, gradient": Door(
        contribution_probe,
        lambda w: (
            {k: v for k, v in probing(w).items() if k not in ("output_dir", "eval_dataset")}
            | {"method": "gradient"}
        ),
        {"budget": Kind(lambda v: is_int(v, 8))},
        left_out={*inspect.signature(contribution_probe).parameters} - {"budget"},
    ),
    "published_contributions": Door(
        published_contributions,
        lambda w: {"name": "Qwen3-1.7B-Base"},
        {"name": Kind()},
        called={"name": "published for"},
    ),
    "Score": Door(
        Score,
        lambda w: {"score": 1.0},
        {
            "score": optional(MEAN),
            "scores": SCORES_ROWS,
            "curve": Kind(lambda v: is_empty(v) or v == ""),
            "contribution": optional(MEAN),
            "seconds": AMOUNT,
            "steps": NATURAL,
            "status": Kind(),
            "note": TEXT,
        },
    ),
    "Cost": Door(
        Cost,
        lambda w: {},
        {
            "seconds": AMOUNT,
            "tokens": optional(NATURAL),
            "forwards": optional(NATURAL),
            "backwards": optional(NATURAL),
            "fraction": optional(AMOUNT),
        },
    ),
    "ContributionReport": Door(
        ContributionReport,
        lambda w: {"method": "train", "layers": w.report.layers},
        {
            "method": TEXT,
            "layers": Kind(lambda v: isinstance(v, list) and not v, ((Score(), None),)),
            "base": Kind(lambda v: v is None),
            "full": Kind(lambda v: v is None),
            "settings": Kind(lambda v: isinstance(v, dict)),
            "source": TEXT,
            "cost": Kind(lambda v: v is None),
        },
    ),
}
for name, kinds in {
    "interval": {"layer": Kind(lambda v: is_int(v, 0) and not is_int(v, 4), (4, -5))},
    "contribution_interval": {"layer": Kind(lambda v: is_int(v, 0) and not is_int(v, 4), (4, -5))},
    "top": {"k": Kind(lambda v: is_int(v, 1) and not is_int(v, 5), (5,))},
    "spearman": {"other": Kind()},
    "compare": {"other": Kind()},
    "at_depth": {"depth": Kind(lambda v: is_float(v, 0, 1), (-0.1, 1.1))},
    "plot": {"ax": Kind(lambda v: v is None)},
}.items():
    DOORS[f"ContributionReport.{name}"] = Door(
        getattr(ContributionReport, name),
        lambda w: {"self": w.report},
        kinds,
        called={"k": "top"},
    )
DOORS |= {
    "ContributionReport.from_json": Door(
        ContributionReport.from_json,
        lambda w: {"text": "{}"},
        {"text": Kind()},
        called={"text": "JSON"},
    ),
    "save_delta": Door(
        save_delta,
        lambda w: {"model": w.model, "path": w.out, "selection": w.selection, "base": w.base},
        {
            "model": MODEL,
            "path": NEW_PATH,
            "selection": SELECTION,
            "base": Kind(),
            "processing_class": Kind(lambda v: v is None),
            "is_main_process": SWITCH,
            "check_frozen": SWITCH,
        },
        called={"path": "/dev/null"},
    ),
    "LayerMaskedMixin.save_delta": Door(
        LayerMaskedMixin.save_delta,
        lambda w: {"self": w.trainer},
        {"path": NEW_PATH},
        called={"path": "/dev/null"},
    ),
    "DeltaBase.of": Door(
        DeltaBase.of,
        lambda w: {"model": w.base, "selection": w.selection},
        {
            "model": MODEL,
            "selection": SELECTION,
            "frozen": Kind(lambda v: v is None or isinstance(v, dict)),
            "device": Kind(lambda v: v is None),
        },
    ),
    "load_delta": Door(
        load_delta,
        lambda w: {"model": w.base, "path": w.delta},
        {
            "model": MODEL,
            "path": DELTA,
            "union": SWITCH,
            "keep_base": Kind(lambda v: v is None or SWITCH.right(v)),
            "revision": REVISION,
            "token": TOKEN,
        },
        called={"path": "delta"},
    ),
    "merge_delta": Door(
        merge_delta,
        lambda w: {"base": w.folder / "base", "path": w.delta, "out": w.out},
        {
            "base": Kind(more=("/nowhere",)),
            "path": DELTA,
            "out": NEW_PATH,
            "union": SWITCH,
            "revision": REVISION,
            "token": TOKEN,
        },
        called={"path": "delta", "out": "/dev/null"},
    ),
    "push_delta": Door(
        push_delta,
        lambda w: {"folder": w.delta, "repo_id": "me/x"},
        {
            "folder": DELTA,
            "repo_id": Kind(lambda v: isinstance(v, str) and v == "no", ("a/b/c", "-x", "a b")),
            "private": Kind(lambda v: v is None or SWITCH.right(v)),
            "token": TOKEN,
            "revision": optional(TEXT),
            "commit_message": optional(TEXT),
        },
        called={"folder": "delta", "repo_id": "name of a repository"},
    ),
    "disabled": Door(
        lambda model: disabled(model).__enter__(), lambda w: {"model": w.loaded}, {"model": MODEL}
    ),
    "unload_delta": Door(unload_delta, lambda w: {"model": w.loaded}, {"model": MODEL}),
    "Deltas": Door(
        Deltas,
        lambda w: {"model": w.base, "paths": {"a": w.delta}},
        {"model": MODEL, "paths": Kind(more=({"a": 5}, {5: "x"}, {"a": []}, {"a": "no/such"}))},
        called={"paths": "delta|no such folder"},
    ),
    "Deltas.use": Door(
        Deltas.use,
        lambda w: {"self": w.deltas},
        {"name": Kind(lambda v: v is None)},
        called={"name": "delta"},
    ),
    "keep_layout": Door(keep_layout, lambda w: {"model": w.base}, {"model": MODEL}),
    "LayerSchedule": Door(
        LayerSchedule,
        lambda w: {"layers": [1, 2], "every": 1, "order": "random"},
        {
            "layers": Kind(
                lambda v: (
                    (isinstance(v, torch.Tensor) and is_int(v, 0))
                    or (isinstance(v, list) and v in ([1], [[1]]))
                    or (isinstance(v, tuple) and v == (0, 0))
                    or (isinstance(v, np.ndarray) and v.size > 0)
                ),
                ([-1], [1.0], "12", {"x"}, [[]], [True]),
            ),
            "every": COUNT,
            "order": Kind(),
            "weights": Kind(
                lambda v: (
                    v is None
                    or (
                        isinstance(v, np.ndarray | torch.Tensor)
                        and len(v) == 2
                        and not getattr(v, "is_meta", False)
                    )
                ),
                (
                    *([1], [1, 0], [1, "2"], [1, True], {1: 1}, {1: 1, 2: 0}),
                    *((1, 10**400), [1e308, 1e308]),
                ),
            ),
            "seed": INTEGER,
        },
    ),
    "TextRollout": Door(
        TextRollout,
        lambda w: {"environment": dict, "max_turns": 1},
        {
            "environment": Kind(callable, (None,)),
            "max_turns": COUNT,
            "max_turn_tokens": optional(COUNT),
        },
    ),
    "read_selection": Door(
        integrations.read_selection,
        lambda w: {"model": w.base, "text": "1"},
        {"model": MODEL, "text": Kind(more=("9", "{}", "{", "auto", "1," + "9" * 5000))},
        called={"text": "layer|selection|LayerSelection"},
    ),
    "mask": Door(
        integrations.mask,
        lambda w: {"model": w.base, "selection": w.selection},
        {"model": MODEL, "selection": SELECTION},
    ),
    "GiGPOConfig": Door(
        GiGPOConfig,
        lambda w: {"output_dir": str(w.out), **QUIETLY},
        {
            "omega": AMOUNT,
            "gamma": Kind(lambda v: is_float(v, 0, 1)),
            "invalid_action_penalty": AMOUNT,
        },
        left_out={*inspect.signature(GRPOConfig).parameters},
    ),
    "the mixin": Door(
        LayerMaskedGRPOTrainer,
        masked_arguments,
        {
            "model": Kind(lambda v: isinstance(v, str | Path)),
            "args": ARGS,
            "selection": Kind(
                are_layers,
                (
                    *("auto:0", "auto:9", "auto:" + "9" * 5000, "auto:stp", "auto:0:step"),
                    *LAYERS.more[1:],
                ),
            ),
            "prefix_cache_bytes": NATURAL,
            "master_weights": SWITCH,
            "checkpoint_format": Kind(),
            "peft_config": Kind(lambda v: v is None),
        },
        left_out={*inspect.signature(GRPOTrainer).parameters} - {"model", "args", "peft_config"},
        called={"selection": r"layers?\b|slice|depth|auto:"},
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


CASES = [
    pytest.param(door, argument, id=f"{name}-{argument}")
    for name, door in DOORS.items()
    for argument in door.arguments
]


def wrong(kind: Kind) -> Iterator[tuple[str, Any]]:
    for name, new in JUNK.items():
        value = new()
        if not _is(kind.right, value):
            yield name, value
    for value in kind.more:
        yield f"{value!r:.40}", value


def _is(right: Callable[[Any], bool], value: Any) -> bool:
    try:
        return bool(right(value))
    except Exception:  # what `Odd` and arrays raise
        return False


def complaint(call: Callable[..., Any], arguments: Mapping[str, Any], named: str) -> str:
    """What is wrong with how a call was refused; empty where nothing is."""
    try:
        call(**arguments)
    except (LayerRLError, TypeError) as error:
        text = str(error)
        return "" if re.search(named, text) else f"{type(error).__name__} without the name: {text}"
    except BaseException as error:
        return f"{type(error).__name__}: {error!s:.300}"
    return "accepted"


@pytest.mark.parametrize(("door", "argument"), CASES)
def test_wrong_values_are_refused_by_name_and_change_nothing(
    world: World, door: Door, argument: str
) -> None:
    assert argument in door.kinds, f"say in DOORS above which values {argument!r} takes: a Kind"
    before, wrongs = world.state(), {}
    for name, value in wrong(door.kinds[argument]):
        arguments = {**door.right(world), argument: value}
        if said := complaint(door.call, arguments, door.named(argument)):
            wrongs[name] = said
    assert not wrongs, "\n" + "\n".join(f"{name}: {said[:400]}" for name, said in wrongs.items())
    assert world.state() == before


@pytest.mark.parametrize("cls", masked_trainers(), ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("args", [{}, TrainingArguments, Odd()], ids=["dict", "class", "odd"])
def test_no_masked_trainer_takes_other_args(cls: type, args: Any, world: World) -> None:
    before = world.state()
    with pytest.raises(TrainerError, match=r"^args is .*, an instance of .* takes a"):
        cls(model=world.base, args=args, selection=1)
    assert world.state() == before


@pytest.mark.parametrize(
    "argument",
    [
        {"seeds": np.array([0, 1])},
        {"seeds": dict.fromkeys([4, 5]).keys()},
        {"seeds": [np.int64(3)], "greedy": np.True_, "halving": np.False_},
        {"resources": {"num_cpus": np.float64(1)}},
    ],
    ids=str,
)
def test_numbers_of_any_kind_pass_the_probes_checks(argument: dict[str, Any], world: World) -> None:
    # What comes after all checks of values is refused: prompts that are trained on.
    arguments: Any = probing(world) | argument | {"eval_dataset": world.data}
    with pytest.raises(ProbeError, match="evaluation prompts are trained on"):
        contribution_probe(**arguments)


def factory(selection: Any, **arguments: Any) -> GRPOTrainer:
    return GRPOTrainer(**arguments)


def test_a_factory_of_plain_trainers_is_found_before_anything_is_measured(world: World) -> None:
    asked: list[str] = []

    def noted(completions: list[str], **_: Any) -> list[float]:
        asked.extend(completions)
        return [0.0] * len(completions)

    for method in ("train", "gradient"):
        arguments: Any = probing(world) | {"reward_funcs": noted, "trainer_class": factory}
        with pytest.raises(ProbeError, match=r"trainer_class made <trl.*GRPOTrainer"):
            contribution_probe(**arguments | {"method": method})
    assert asked == []


WORDS = ["", "no", "a\0b", "-1", "nan", "1e400", "9" * 5000, "[1]", "{", "/dev/null/x"]
OF_SELECTION = ("--layers", "--modules", "--also", "--boost", "--stack")
OPTIONS = {
    "plan": ("MODEL", *OF_SELECTION, "--dtype", "--beta", "--num_iterations"),
    "probe": ("MODEL", *OF_SELECTION[:2], "--method", "--budget", "--seeds", "--out", "--config"),
    "merge": ("BASE", "DELTA", "OUT", "--revision"),
    "show": ("PATH", "--revision", "--plot"),
    "train": (
        *OF_SELECTION,
        *("--prefix_cache_bytes", "--checkpoint_format", "--model_name_or_path", "--config"),
    ),
}
NAMES = ("no", "-1", "nan", "1e400", "[1]", "{")
RIGHT_WORDS = {
    "--layers": ("-1",),
    "--seeds": ("-1",),  # "position" has no use for them
    "--budget": ("-1",),
    "--out": NAMES,
    "OUT": NAMES,
    "--revision": ("",),
}


@pytest.mark.parametrize(
    ("command", "option"), [(command, o) for command, options in OPTIONS.items() for o in options]
)
def test_wrong_words_on_the_command_line_are_a_sentence(
    world: World, command: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    right = {
        "plan": {"MODEL": world.folder / "base", "--layers": 1},
        "probe": {"MODEL": world.folder / "base", "--method": "position"},
        "merge": {"BASE": world.folder / "base", "DELTA": world.delta, "OUT": world.out},
        "show": {"PATH": world.delta},
        "train": {
            "METHOD": "grpo",
            "--model_name_or_path": world.folder / "base",
            "--layers": 1,
            "--output_dir": world.out,
        },
    }[command]
    before = world.state()
    for word in WORDS:
        if word in RIGHT_WORDS.get(option, ()):
            continue
        pairs = {**right, option: word}.items()
        words = [[name, str(v)] if name.startswith("-") else [str(v)] for name, v in pairs]
        try:
            code = main([command, *chain.from_iterable(words)])
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr().err.strip()
        assert code in (1, 2), f"{word:.20}: {said}"
        assert said, word[:20]
    assert world.state() == before


def documented() -> Iterator[tuple[str, Any]]:
    """What `docs/reference.md` lists, and what classes of it have methods for."""
    page = (Path(__file__).parents[2] / "docs" / "reference.md").read_text(encoding="utf-8")
    for path in re.findall(r"^::: (layerrl\S+)", page, re.M):
        module, _, name = path.rpartition(".")
        if "integrations." in path and name != "read_selection":
            continue  # classes of frameworks that are not installed, with their arguments
        found = getattr(import_module(module), name)
        if inspect.ismodule(found):
            continue
        yield name, found
        for method, value in vars(found).items() if isinstance(found, type) else ():
            function = getattr(value, "__func__", value)
            if inspect.isfunction(function) and not method.startswith("_"):
                yield f"{name}.{method}", function


OF_OTHERS = {
    "Plan": "made by `LayerSelection.plan`",
    "Comparison": "made by `ContributionReport.compare`",
    "DeltaBase": "made by `DeltaBase.of`",
    "Step": "checked when a rollout function returns it",
    "LayerSelection.check_num_layers": "called by layerrl",
    "DeltaBase.digest": "called by layerrl",
}


def test_every_argument_that_is_documented_has_wrong_values() -> None:
    known = {name.partition(",")[0] for name in DOORS} | {*OF_OTHERS}
    missing = []
    for name, found in documented():
        trains = isinstance(found, type) and issubclass(found, Trainer | LayerMaskedMixin)
        of_trl = name.partition(".")[0] in ("LayerMaskedMixin", "GiGPOTrainer", "TextEnvironment")
        of_trl |= isinstance(found, types.FunctionType) and name.startswith("LayerSchedule.")
        takes = {*inspect.signature(found).parameters} - {"self", "cls"}
        if takes and name not in known and not trains and not of_trl:
            missing.append(name)
    assert missing == []
    assert {*layerrl_delta.__all__} - known == {"checkpoint_form", "put_tensors", "tensors_of_run"}
    for name, door in DOORS.items():
        assert {*door.arguments} <= {*door.kinds}, name
    assert (
        sum(len([*wrong(door.kinds[a])]) for door in DOORS.values() for a in door.arguments) > 400
    )
