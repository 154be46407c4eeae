"""A model whose prefix is replayed beside a plain copy of it: whatever is called must agree."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from layerrl import select_layers
from layerrl.blocks import find_blocks
from layerrl.replay import PrefixReplay
from layerrl.replay.comparing import flat
from tests.devices import DEVICE, generator, random_state, set_random_state

# Legend: B rows, T tokens, H hidden size.
B, T, H = 6, 5, 16
BUDGET = 2**22
BYTES = B * T * H * 4
FIRST = 2

Call = Callable[[Any], Any]


def ids(seed: int = 0, rows: int = B, tokens: int = T) -> Tensor:
    """Random tokens."""
    shape = (rows, tokens)
    return torch.randint(3, 64, shape, generator=generator(seed), device=DEVICE)


def call(ids_BT: Tensor | None = None, **kwargs: Any) -> Any:
    """A pass over rows."""
    ids_BT = ids() if ids_BT is None else ids_BT
    return lambda model: model(input_ids=ids_BT, **{"use_cache": False, **kwargs})


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the replay said aloud."""
    return [r.getMessage() for r in caplog.records if r.name == "layerrl.replay"]


class Pair:
    """A model with replay and a plain copy, on which everything is done twice.

    Args:
        model: The model.
        layers: What trains.
        max_bytes: As of `PrefixReplay`.
        agree: As of `PrefixReplay`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Any = FIRST,
        max_bytes: int = BUDGET,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        selection = select_layers(model, layers)
        trained = set(map(id, selection.parameters(model).values()))
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self.model: Any = model.to(DEVICE)
        self.plain: Any = deepcopy(model)
        self.replay = PrefixReplay(model, selection, max_bytes, agree=agree)

    @contextmanager
    def batch(self, *, training: bool = True) -> Iterator[None]:
        """Calls inside are over a new batch."""
        with self.replay.batch(training=training), self.replay.passes(training=training):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Calls inside are those of one loss."""
        with self.replay.passes(training=True, alone=True):
            yield

    def both(self, act: Call) -> None:
        """Do something to either model."""
        for model in (self.model, self.plain):
            act(model)

    def same(self, run: Call, *, grad: bool = False, atol: float = 0.0) -> bool:
        """Whether a pass was replayed. What it gives must be equal, and the random state left."""
        before, results = self.replay.num_replayed, []
        state = random_state()
        for model in (self.plain, self.model):
            set_random_state(state)
            with torch.set_grad_enabled(grad):
                output = run(model)
            results.append(([*flat(output)], gradients(model, output), random_state()))
        assert_close(results[1], results[0], rtol=0, atol=atol, equal_nan=True)
        return self.replay.num_replayed > before

    def replays(self, *runs: Call, **how: Any) -> list[bool]:
        """Whether each was replayed."""
        return [self.same(run, **how) for run in runs]


def gradients(model: nn.Module, output: Any) -> dict[str, Tensor]:
    """Of the trained tensors, through all that was returned."""
    values = [v for v in flat(output) if isinstance(v, Tensor) and v.requires_grad]
    if not values:
        return {}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = torch.stack([value.float().pow(2).mean() for value in values]).sum()
    found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    return {name: g for name, g in zip(trained, found, strict=True) if g is not None}


@contextmanager
def layers_run(model: nn.Module) -> Iterator[list[int]]:
    """Lists the layers whose insides run, in order."""
    ran: list[int] = []
    inside = [next(layer.children()) for layer in find_blocks(model).modules]
    hooks = [
        noting_hook(module, lambda index=index: ran.append(index))
        for index, module in enumerate(inside)
    ]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def noting_hook(module: nn.Module, note: Callable[[], object]) -> Any:
    """Do something whenever a module runs, in a hook of a kind that keeps no layer from replay."""

    def noting(*_: Any) -> None:
        note()

    noting.__module__ = "accelerate.hooks"  # a launcher's are known to change no results
    return module.register_forward_pre_hook(noting)


def assert_unpatched(model: nn.Module) -> None:
    """Nothing is left on any module."""
    assert [name for name, m in model.named_modules() if "forward" in vars(m)] == []


def eager(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, scale: Any = None, **_: Any
) -> Tensor:
    """Attention whose weights are rounded before they are multiplied, as no fused kernel does."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.mT * scale
    if attn_mask is None:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
