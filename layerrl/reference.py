"""The reference policy without a second model: only what trains differs from it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerrl.shards import is_sharded, parts, sharded_like, write

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


class ReferenceModel(nn.Module):
    """A policy with the values that its trained tensors had when this was made.

    Calling it runs the policy itself, in evaluation mode, with those values swapped in: no weight
    is copied, and the values (one layer's bytes for one layer) are all it keeps.

    Args:
        policy: The model that trains. It is not registered as a submodule.
        trained: The tensors of it that train, by name. Their present values are copied.
    """

    def __init__(self, policy: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._policy = (policy,)
        self._trained = dict(trained)
        # A list in the order of `trained`: parameter names may not contain dots.
        self.initial = nn.ParameterList(
            nn.Parameter(parts(parameter).detach().clone(), requires_grad=False)
            for parameter in trained.values()
        )

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The policy's own tensors that train, by name."""
        return dict(self._trained)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The reference's values by name."""
        return dict(zip(self._trained, self.initial, strict=True))

    def follow(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Go on with a policy that has been sharded: its parameters are others, and so is this.

        Args:
            trained: The tensors that train, by the names they had.
        """
        for index, parameter in enumerate(trained.values()):
            value = sharded_like(self.initial[index], parameter)
            self.initial[index] = nn.Parameter(value, requires_grad=False)
        self._trained = dict(trained)

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take values that `tensors` gave, of the same selection.

        Args:
            tensors: Name to value, of the same shapes.
        """
        for name, initial in self.tensors.items():
            initial.copy_(sharded_like(tensors[name], initial))

    @contextmanager
    def swapped_in(self) -> Iterator[nn.Module]:
        """Give the policy the reference's values; afterwards it has its own again.

        Yields:
            The policy, in evaluation mode. Values and modes are restored also after an exception.
        """
        [policy] = self._policy
        training = [module for module in policy.modules() if module.training]
        own = [
            parts(parameter).detach().clone() if is_sharded(parameter) else parameter.data
            for parameter in self._trained.values()
        ]
        try:
            for module in training:
                module.training = False
            self._give(self.initial)
            yield policy
        finally:
            self._give(own)
            for module in training:
                module.training = True

    def _give(self, values: Iterable[Tensor]) -> None:
        """Put values into the policy: into parts, where it has some, which are known by storage."""
        given = dict(zip(self._trained.values(), values, strict=True))
        sharded = {parameter: value for parameter, value in given.items() if is_sharded(parameter)}
        if sharded:
            write(self._policy[0], sharded)
        # Inside a caller's autocast, casts of the values before would be used again.
        torch.clear_autocast_cache()
        for parameter in given.keys() - sharded.keys():
            parameter.data = given[parameter].data

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the policy's own
        """What the policy would have returned at the start.

        Args:
            *args: The policy's own arguments.
            **kwargs: The policy's own arguments.

        Returns:
            The policy's output, without gradients.
        """
        with self.swapped_in() as policy:
            return policy(*args, **kwargs)
