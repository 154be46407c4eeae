"""OpenRLHF trains the layers of a selection: a strategy in place of its own.

`LAYERRL_SELECTION=10 python -m layerrl.integrations.openrlhf train_ppo_ray ...` runs OpenRLHF's own
command with it.
"""

from __future__ import annotations

import runpy
import sys
from contextlib import ExitStack
from typing import Any

from layerrl.errors import LauncherError, SelectionError
from layerrl.integrations import given, mask, read_selection, require

TESTED = "0.11.2"
require("openrlhf", TESTED)

import openrlhf.utils.deepspeed as upstream  # noqa: E402  # pyright: ignore[reportMissingImports]
from openrlhf.models import Actor  # noqa: E402  # pyright: ignore[reportMissingImports]

COMMANDS = ("train_ppo_ray", "train_sft", "train_dpo")


class LayerMaskedStrategy(upstream.DeepspeedStrategy):
    """OpenRLHF's strategy; of each `Actor` that it prepares for training, a selection trains.

    `LAYERRL_SELECTION` says which layers, read where the strategy is made: OpenRLHF sends it to its
    workers, so that they need no variable. The actor is frozen before DeepSpeed makes the
    optimizer, which OpenRLHF gives only what requires a gradient, and its backward ends at the
    first trained layer. References, reward models and critics are OpenRLHF's own.

    Raises:
        SelectionError: If `LAYERRL_SELECTION` says nothing.
        LauncherError: If the settings are ZeRO-3, tensor parallelism, LoRA or 4 bits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given = given()
        self._masks: list[ExitStack] = []
        self._refuse()

    def _refuse(self) -> None:
        settings = self.args.ds
        problem = None
        if self.stage == 3:
            problem = (
                "--ds.zero_stage 3 keeps every tensor in parts of its own kind. Use 2, or the verl "
                "integration, where FSDP2 shards the same"
            )
        elif self.ds_tensor_parallel_size > 1:
            problem = (
                f"--ds.tensor_parallel_size {self.ds_tensor_parallel_size} replaces the modules "
                "that would train. Use 1"
            )
        elif getattr(getattr(settings, "lora", None), "rank", 0):
            problem = (
                f"--ds.lora.rank {settings.lora.rank} freezes the model and trains adapters. Use 0"
            )
        elif getattr(settings, "load_in_4bit", False):
            problem = "--ds.load_in_4bit quantises the layers that would train. Leave it out"
        if problem:
            raise LauncherError(f"OpenRLHF cannot train chosen layers here: {problem}.")

    def prepare(self, *args: Any) -> Any:  # what OpenRLHF gives
        """Prepare models as OpenRLHF does; each actor that is to train is masked before.

        Args:
            *args: OpenRLHF's: a model, or a model and its settings for training.

        Returns:
            What OpenRLHF returns.

        Raises:
            SelectionError: If the selection does not fit, or scales learning rates.
        """
        for arg in args:
            if isinstance(arg, tuple) and isinstance(arg[0], Actor):
                self._mask(arg[0].model)
        return super().prepare(*args)

    def _mask(self, model: Any) -> None:  # a transformers model
        selection = read_selection(model, self._given)
        if selection.is_boosted:
            raise SelectionError(
                f"OpenRLHF cannot be told to train {selection}: DeepSpeed gives all groups one "
                "learning rate. Select without boost."
            )
        self._masks.append(mask(model, selection))
        self.print(f"layerrl trains {selection}")


def main() -> None:
    """Run one of OpenRLHF's commands with `LayerMaskedStrategy`: the first argument is its name."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        raise LauncherError(
            f"python -m layerrl.integrations.openrlhf {command or '(nothing)'}: expected one of "
            f"{', '.join(COMMANDS)}, followed by the arguments of `python -m openrlhf.cli.COMMAND`."
        )
    del sys.argv[1]
    upstream.DeepspeedStrategy = LayerMaskedStrategy  # what openrlhf.utils.get_strategy makes
    runpy.run_module(f"openrlhf.cli.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # By its name, so that Ray's workers can import the class of the strategy that they are sent.
    from layerrl.integrations.openrlhf import main as run

    run()
