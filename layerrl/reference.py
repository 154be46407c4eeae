"""The reference policy without a second model: only what trains differs from it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from layerrl.errors import ModelError
from layerrl.seams import imported
from layerrl.shards import is_sharded, parts, sharded_like
from layerrl.swapping import swapped_in

with imported():
    from torch.nn.modules.module import _IncompatibleKeys


# How the names of methods begin that change a model; a reference has none of its own to change.
_CHANGES = (
    "activation_checkpointing_",
    "add_",
    "delete_",
    "disable_",
    "enable_",
    "gradient_checkpointing_",
    "init_",
    "load_",
    "post_init",
    "resize_",
    "set_",
    "tie_",
    "initialize_",
)


class ReferenceModel(nn.Module):
    """A policy with the values that its trained tensors had when this was made.

    Calling it runs the policy itself, in evaluation mode, with those values swapped in: no weight
    is copied, and the values (one layer's bytes for one layer) are all it keeps and all that
    `parameters` gives.

    Otherwise it is used as the model that it stands for: `generate`, `save_pretrained` and its
    other methods run with the values swapped in, `named_parameters`, `get_parameter` and
    `state_dict` have the policy's names, submodules are such views too, settings are copies. It
    cannot be trained, moved or cast apart from the policy, and refuses what would change the
    policy.

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
        self._settings: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_policy" or (name.startswith("__") and name.endswith("__")):
                raise
        [policy] = self._policy
        if name in ("config", "generation_config") and hasattr(policy, name):
            return self._settings.setdefault(name, copy.deepcopy(getattr(policy, name)))
        return self._seen(policy, name)

    def _seen(self, module: nn.Module, name: str) -> Any:
        """An attribute of the policy, or of a part of it, as the reference's."""
        found = getattr(module, name)
        if not callable(found) or isinstance(found, nn.Module | type):
            return self._as_own(found)
        if name.startswith(_CHANGES):
            raise ModelError(
                f"{name} of the reference would change the model that trains, of which the "
                "reference is a view with other values. Call it on the model before the trainer is "
                "made."
            )

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad(), self.swapped_in():
                return self._as_own(getattr(module, name)(*args, **kwargs))

        return run

    def _as_own(self, value: Any) -> Any:
        [policy] = self._policy
        if value is policy:
            return self
        if isinstance(value, nn.Parameter):
            return self._own_values().get(id(value), _frozen_view(value))
        if isinstance(value, nn.Module) and any(value is module for module in policy.modules()):
            return _Part(self, value)
        return value

    def _own_values(self) -> dict[int, nn.Parameter]:
        """The reference's values, by the identity of the policy's parameters."""
        own = zip(self._trained.values(), self.initial, strict=True)
        return {id(parameter): value for parameter, value in own}

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The policy's names; frozen tensors come as copies, so that writing is harmless."""
        [policy] = self._policy
        own = self._own_values()
        for name, parameter in policy.named_parameters(prefix, recurse, remove_duplicate):
            value = own.get(id(parameter))
            yield name, _frozen_view(parameter, copied=True) if value is None else value

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The values that the reference keeps: those of the trained tensors."""
        yield from self.initial

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The reference's values of all that is saved with the policy, by the policy's names."""
        return self._state_of(self._policy[0], *args, **kwargs)

    def _state_of(self, module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        kwargs["keep_vars"] = False  # or they would have the policy's values afterwards
        with self.swapped_in():
            state = module.state_dict(*args, **kwargs)
            if any(map(is_sharded, self._trained.values())):  # whose values are written in place
                for name, value in state.items():
                    state[name] = value.clone() if isinstance(value, Tensor) else value
        return state

    @torch.no_grad()
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take other values for the trained tensors.

        Args:
            state_dict: Name to value, as `state_dict` gives them.
            strict: Whether all names have to be there, and no others.
            assign: Not used: values are copied.

        Returns:
            Missing and unexpected keys, as of any module.

        Raises:
            ModelError: If a frozen tensor has another value, which would change the policy; nothing
                has been changed then.
            RuntimeError: If names are missing or unexpected where `strict`.
        """
        [policy] = self._policy
        now = policy.state_dict()
        missing = [name for name in now if name not in state_dict]
        unexpected = [name for name in state_dict if name not in now]
        if strict and (missing or unexpected):
            raise RuntimeError(
                f"the reference of a {type(policy).__name__} cannot load this: missing {missing}, "
                f"unexpected {unexpected}"
            )
        kept = self._own_values()
        named = policy.named_parameters(remove_duplicate=False)
        own = {name: kept[id(parameter)] for name, parameter in named if id(parameter) in kept}
        for name, value in state_dict.items():
            if name in now and name not in own and not _same(now[name], value):
                raise ModelError(
                    f"{name} is frozen: the reference shares it with the model that trains, and "
                    "was to be given another value of it. Only trained tensors can differ."
                )
        for name in own.keys() & state_dict.keys():
            own[name].copy_(sharded_like(state_dict[name], own[name]))
        return _IncompatibleKeys(missing, unexpected)

    def requires_grad_(self, requires_grad: bool = True) -> ReferenceModel:
        """Stay frozen."""
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> ReferenceModel:
        """Stay: the values are where, and in the dtype that, the policy's are."""
        return self

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The policy's own tensors that train, by name."""
        return dict(self._trained)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The reference's values by name."""
        return dict(zip(self._trained, self.initial, strict=True))

    def follow(self, policy: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        """Take over the policy, and the parameters it has now, as after it has been sharded."""
        self._policy = (policy,)
        self._trained = {name: trained[name] for name in self._trained}
        for index, parameter in enumerate(self._trained.values()):
            value = sharded_like(self.initial[index], parameter)
            self.initial[index] = nn.Parameter(value, requires_grad=False)

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take values that `tensors` gave, of the same selection."""
        for name, initial in self.tensors.items():
            initial.copy_(sharded_like(tensors[name], initial))

    def swapped_in(self) -> AbstractContextManager[nn.Module]:
        """Give the policy the reference's values; afterwards it has its own again."""
        values = zip(self._trained.values(), self.initial, strict=True)
        return swapped_in(self._policy[0], dict(values))

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # the policy's own
        """The policy's output with its initial weights, without gradients."""
        with self.swapped_in() as policy:
            return policy(*args, **kwargs)


class _Part(nn.Module):
    """A part of the policy, with the reference's values."""

    def __init__(self, reference: ReferenceModel, part: nn.Module) -> None:
        super().__init__()
        self._of = (reference, part)
        self.training = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_of" or (name.startswith("__") and name.endswith("__")):
                raise
        reference, part = self._of
        return reference._seen(part, name)

    def __getitem__(self, index: Any) -> Any:  # of a list of layers
        reference, part = self._of
        return reference._as_own(part[index])  # pyright: ignore[reportIndexIssue]

    def __len__(self) -> int:
        return len(self._of[1])  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[Any]:
        reference, part = self._of
        return map(reference._as_own, part)  # pyright: ignore[reportArgumentType]

    def __bool__(self) -> bool:
        return True

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        reference, part = self._of
        for name, parameter in part.named_parameters(prefix, recurse, remove_duplicate):
            yield name, reference._as_own(parameter)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        reference, part = self._of
        return reference._state_of(part, *args, **kwargs)

    def requires_grad_(self, requires_grad: bool = True) -> _Part:
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> _Part:
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reference, part = self._of
        with reference.swapped_in():
            return part(*args, **kwargs)


def _frozen_view(parameter: nn.Parameter, *, copied: bool = False) -> nn.Parameter:
    value = parts(parameter).detach()
    return nn.Parameter(value.clone() if copied else value, requires_grad=False)


def _same(present: Any, value: Any) -> bool:
    if not isinstance(present, Tensor) or not isinstance(value, Tensor):
        return present is value
    return torch.equal(parts(present), sharded_like(value.to(present), present))
