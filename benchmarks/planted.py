"""Suites whose best layer is known by construction, or lies elsewhere than in the others.

    python benchmarks/planted.py             # say what each base knows
    python benchmarks/planted.py --ground    # their exact sweeps, which continue where they stopped

Five bases were trained here until they knew a task well, one of them with layer dropout, one with
24 layers. They are kept in `benchmarks/bases`. The suites are these with one change, made anew by
each call and bit for bit the same everywhere, or with a kept layer (`drift-llama`). A suite without
a file in `benchmarks/ground_truth` has no sweep yet.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from probe_fidelity import ground
from safetensors.torch import load_file, save_file
from suites import BASES, TASKS, Suite
from torch import Tensor
from torch.nn.functional import cross_entropy

from layerrl.blocks import find_blocks

OUTPUTS = ("o_proj.weight", "down_proj.weight", "down_proj", "dense.weight", "4h_to_h.weight")
"""Matrices that write into the residual stream."""


@dataclass(frozen=True)
class Base(Suite):
    """A small model, trained to know its task; no suite by itself unless it says so."""

    greedy = True
    knows: float = 0.85
    num_layers: int = 6
    problems: int = 6000
    evaluated: int = 256
    rows: int = 64
    steps: int = 20
    learning_rate: float = 1e-3
    full_learning_rate: float = 5e-4
    layers: Any = "all"


@dataclass(frozen=True)
class Changed(Base):
    """A base with one part changed, so that what was lost is best learnt again there."""

    base: Base = Base("ordering-llama")
    change: Callable[[Any], None] = lambda model: None
    """Changes a model in place."""
    asks: str = "ordering"

    @property
    def task(self) -> Callable[[random.Random], tuple[str, str]]:
        """Draws a problem and its answer."""
        return TASKS[self.asks]

    def model(self) -> Any:
        """The base, changed."""
        model = self.base.model()
        with torch.no_grad():
            self.change(model)
        return model


def garbled(layer: int, times: float) -> Callable[[Any], None]:
    """Reverse and scale what a layer adds to the residual stream: exact for powers of two."""

    def change(model: Any) -> None:
        for name, parameter in find_blocks(model).modules[layer].named_parameters():
            if name.endswith(OUTPUTS):
                parameter.copy_(times * parameter.flip(-2))

    return change


def blurred(model: Any) -> None:
    """Average the embedding of each token with the next one's: an alphabet that is half known."""
    weight = model.get_input_embeddings().weight
    weight.copy_((weight + weight.roll(1, 0)) / 2)


def drifted(model: Any) -> None:
    """Put in a layer that was trained by itself on the digits in descending order."""
    file = BASES / "drift-llama" / "layer.safetensors"
    if not file.exists():
        file.parent.mkdir()
        save_file(drift(), file)
    find_blocks(model).modules[DRIFTED].load_state_dict(load_file(file))


def drift() -> dict[str, Tensor]:
    """The layer after 40 supervised steps: the model has lost the ascending order by then."""
    suite = Changed("drift", base=LLAMA, asks="descending")
    model = suite.model().requires_grad_(False)
    layer = find_blocks(model).modules[DRIFTED].requires_grad_(True)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    texts = [f"{row['prompt']}{row['answer']}<eos>" for row in suite.data[0]]
    tokens_BT = suite.tokenizer(texts, return_tensors="pt")["input_ids"]
    torch.manual_seed(0)
    for _ in range(40):
        batch_BT = tokens_BT[torch.randint(len(tokens_BT), (128,))]
        logits = model(input_ids=batch_BT).logits
        loss = cross_entropy(logits[:, 4:-1].mT, batch_BT[:, 5:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.to(torch.bfloat16) for name, value in layer.state_dict().items()}


LLAMA, NEOX, MIXTRAL = (Base(f"ordering-{name}") for name in ("llama", "gpt_neox", "mixtral"))
DROPOUT = Base("ordering-llama-dropout", layer_dropout=0.2)
DEEP = Base("ordering-llama-24", num_layers=24, hidden=32)
DRIFTED = 4
PLANTED: dict[str, Base] = {
    suite.name: suite
    for suite in (
        Changed("alphabet-llama", base=LLAMA, change=blurred),
        Changed("middle-llama", base=LLAMA, change=garbled(3, 8)),
        Changed("drift-llama", base=LLAMA, change=drifted),
        Changed("switch-llama", base=LLAMA, asks="descending"),
        Changed("late-llama", base=LLAMA, change=garbled(5, 4)),
        Changed("middle-gpt_neox", base=NEOX, change=garbled(2, 2)),
        Changed("late-mixtral", base=MIXTRAL, change=garbled(5, 2)),
        Changed("early-llama", base=LLAMA, change=garbled(1, 4)),
        Changed("middle-llama-dropout", base=DROPOUT, change=garbled(2, 8)),
        Changed("turned-mixtral", base=MIXTRAL, change=garbled(1, 1)),
        Changed("silent-gpt_neox", base=NEOX, change=garbled(2, 0)),
        Changed("turned-gpt_neox", base=NEOX, change=garbled(4, 1)),
        Changed("turned-llama", base=LLAMA, change=garbled(4, 1)),
        Changed("middle-llama-24", base=DEEP, change=garbled(14, 8), layers=[*range(2, 24, 4)]),
    )
}
HELD_OUT = [
    "switch-llama",
    "turned-mixtral",
    "silent-gpt_neox",
    "turned-gpt_neox",
    "turned-llama",
    "middle-llama-24",
]
"""Scored last, once. `late-llama`, `middle-gpt_neox` and `late-mixtral` were held out until the
score was chosen; a variant of it has been judged on them since, so that a new one needs others."""


def main() -> None:
    """Make bases and truths."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ground", action="store_true", help="make the truths")
    parser.add_argument("--suites", nargs="+", default=list(PLANTED), choices=list(PLANTED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the sweeps")
    options = parser.parse_args()
    for name in options.suites:
        suite = PLANTED[name]
        if options.ground:
            ground(suite, options.seeds)
        else:
            print(f"{name}: sampled accuracy {suite.accuracy(suite.model()):.3f}")


if __name__ == "__main__":
    main()
