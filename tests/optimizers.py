"""Optimizers of the shapes that people pass to a trainer, as small as they can be."""

from typing import Any

import torch
from torch.optim import SGD, AdamW, Muon, Optimizer


class Both(Optimizer):
    """Muon for matrices, AdamW for the rest, behind one interface."""

    def __init__(self, params, lr=1e-2, *, shared=True, keep: Any = list):
        params = list(params)
        inner = [
            Muon([p for p in params if p.ndim == 2], lr=lr),
            AdamW([p for p in params if p.ndim != 2], lr=lr),
        ]
        self.inner = keep(inner)
        groups = [group for one in inner for group in one.param_groups]
        if not shared:
            groups = [{**group, "params": list(group["params"])} for group in groups]
        super().__init__(groups, {})

    def all(self):
        return list(self.inner.values() if isinstance(self.inner, dict) else self.inner)

    def step(self, closure=None):
        for one in self.all():
            one.step()


class Nested(Both):
    """The same, one level further down."""

    def __init__(self, params, lr=1e-2):
        params = list(params)
        self.deep = Both(params, lr, shared=False)
        Optimizer.__init__(self, params, {"lr": lr})

    def all(self):
        return self.deep.all()


class Saved(Both):
    """Its state dict is those of the optimizers inside, under names of its own."""

    def state_dict(self) -> Any:
        return {"inner": [one.state_dict() for one in self.all()]}

    def load_state_dict(self, state_dict):
        for one, state in zip(self.all(), state_dict["inner"], strict=True):
            one.load_state_dict(state)


class Delegating(Optimizer):
    """Everything of it is another one's."""

    def __init__(self, params, lr=1e-2):
        self.base = AdamW(params, lr=lr)
        super().__init__(self.base.param_groups, self.base.defaults)
        self.state = self.base.state
        self.param_groups = self.base.param_groups

    def step(self, closure=None):
        return self.base.step(closure)


class Merged:
    """Not even an `Optimizer`; what it shows of the state is made anew each time."""

    def __init__(self, params, lr=1e-2):
        params = list(params)
        self.parts = {p.ndim: SGD([p], lr=lr, momentum=0.9) for p in params[1:]}
        self.first = AdamW(params[:1], lr=lr)

    @property
    def inner(self):
        return [self.first, *self.parts.values()]

    @property
    def state(self):
        return {p: state for one in self.inner for p, state in one.state.items()}

    @property
    def param_groups(self):
        return [group for one in self.inner for group in one.param_groups]

    def step(self, closure=None):
        for one in self.inner:
            one.step()

    def state_dict(self):
        return [one.state_dict() for one in self.inner]

    def load_state_dict(self, state_dict):
        for one, state in zip(self.inner, state_dict, strict=True):
            one.load_state_dict(state)


class Lookahead(Optimizer):
    """Every second step, back to half of the way (arXiv:1907.08610)."""

    def __init__(self, params, lr=1e-2, *, eager=True):
        self.base = AdamW(params, lr=lr)
        super().__init__(self.base.param_groups, {})
        held = [p for group in self.base.param_groups for p in group["params"]]
        self.slow = [p.detach().clone() for p in held] if eager else None
        self.steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        held = [p for group in self.base.param_groups for p in group["params"]]
        if self.slow is None:
            self.slow = [p.detach().clone() for p in held]
        self.base.step()
        self.steps += 1
        if self.steps % 2 == 0:
            for p, slow in zip(held, self.slow, strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)


class Perturbing(Optimizer):
    """Steps with the gradient at a point nearby (SAM, arXiv:2010.01412)."""

    def __init__(self, params, lr=1e-2):
        self.base = SGD(params, lr=lr, momentum=0.9)
        super().__init__(self.base.param_groups, {})

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.data.clone()
                p.add_(p.grad, alpha=1e-3)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base.step()

    def step(self, closure=None):
        assert closure is not None
        closure = torch.enable_grad()(closure)
        closure()
        self.first_step()
        loss = closure()
        self.second_step()
        return loss


class Averaging(Optimizer):
    """Evaluates at an average, which it writes to the weights in `eval` (schedule-free ones do)."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr, "train_mode": True})

    def _move(self, weight: float, mode: bool):
        for group in self.param_groups:
            if group["train_mode"] != mode:
                group["train_mode"] = mode
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], weight)

    def train(self):
        self._move(0.5, True)

    def eval(self):
        self._move(-1.0, False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"]
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.detach().clone())
                    z.add_(p.grad, alpha=-group["lr"])
                    p.lerp_(z, 0.3).add_(p.grad, alpha=-0.1 * group["lr"])


class OnCopies(Both):
    """Its inner optimizers step copies of what they were given."""

    def __init__(self, params, lr=1e-2):
        params = list(params)
        super().__init__([p.detach().clone() for p in params], lr)
        for one in self.inner:
            for group in one.param_groups:
                for p in group["params"]:
                    p.grad = torch.ones_like(p)
        self.param_groups = []
        self.add_param_group({"params": params, "lr": lr})


class Flat(Optimizer):
    """Steps one buffer, which the parameters were views of when it was made."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})
        held = [p for group in self.param_groups for p in group["params"]]
        self.flat = torch.cat([p.detach().flatten() for p in held])
        for p, part in zip(held, self.flat.split([p.numel() for p in held]), strict=True):
            p.data = part.view_as(p)

    @torch.no_grad()
    def step(self, closure=None):
        held = [p for group in self.param_groups for p in group["params"]]
        gradient = torch.cat([p.grad.flatten() for p in held]).to(self.flat.dtype)
        self.flat.add_(gradient, alpha=-self.param_groups[0]["lr"])
