"""Global-norm clipping and AdamW as an optimizer object: it owns the moments and changes the parameters in place.

Any module can be trained with them, and `torch.optim.AdamW` can take their place in a training loop.
"""

import itertools
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from llm_common.config import OptimizerConfig
from llm_common.schedule import bias_corrections, check_adamw
from llm_common.tensors import decays
from torch_llm.layers import upcast


def wide_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """float32, or float64 if one of the tensors is."""
    return reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)


def sums_of_squares(grads: list[Tensor]) -> Tensor:
    """The sum of the squares of each tensor, in float32 (float64 for float64): (number of tensors,)."""
    return torch.stack([torch.sum(torch.square(upcast(g))) for g in grads])


def global_norm(grads: list[Tensor], sums_of_squares: Callable[[list[Tensor]], Tensor] = sums_of_squares) -> Tensor:
    """Euclidean norm over all tensors; 0 if there is none."""
    return torch.sqrt(sums_of_squares(grads).sum()) if grads else torch.zeros(())


def clip_factor(norm: Tensor, max_norm: float | None) -> Tensor:
    """What gradients of that global norm are multiplied by: min(1, max_norm / norm). None: 1.

    No epsilon is added to the norm: `torch.nn.utils.clip_grad_norm_` adds 1e-6, which costs five digits of float64
    parity.
    """
    return torch.ones_like(norm) if max_norm is None else torch.clamp(max_norm / norm, max=1.0)  # norm 0: min(inf, 1)


def adamw_update(
    p: Tensor,
    mu: Tensor,
    nu: Tensor,
    g: Tensor,
    scalars: tuple[float, float, float] | list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """The update of a parameter and its moments, in place. scalars: learning rate and the two bias corrections."""
    lr, correction1, correction2 = scalars
    mu.mul_(beta1).add_((1.0 - beta1) * g)
    nu.mul_(beta2).add_((1.0 - beta2) * g * g)
    direction = (mu / correction1) / (torch.sqrt(nu / correction2) + eps)
    p.sub_(lr * (direction + weight_decay * p))


def gradient(p: Tensor) -> Tensor:
    """`main_grad`, the float32 sum of a parameter's micro-batches; without one `grad`, and without that zero."""
    for g in (getattr(p, "main_grad", None), p.grad):
        if g is not None:
            return g
    return torch.zeros_like(p)


class AdamW(torch.optim.Optimizer):
    """p <- p - lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), the decay on the old p.

    The arithmetic is float32 (float64 for float64). A parameter of a narrower dtype has a float32 master, which is
    state like the moments: the update changes the master, and the parameter is the master rounded.

    `group["lr"]` is set from outside before each step. `count` is the number of updates made, one for all parameters.
    A parameter without a gradient counts as one with zero gradient, as it does in JAX.
    Source: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        check_adamw(lr, betas, eps, weight_decay)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "count": 0}
        super().__init__(params, defaults)  # the groups are what `state_dict`, pickle and deepcopy keep

    @property
    def count(self) -> int:
        return self.param_groups[0]["count"]

    @count.setter
    def count(self, value: int) -> None:
        for group in self.param_groups:
            group["count"] = value

    @torch.no_grad()
    def step(self, closure=None, **how: Tensor) -> None:
        """An update of all parameters. how: as `update_group` takes it."""
        assert closure is None, "AdamW needs no closure"
        self.count += 1
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            scalars = (group["lr"], *bias_corrections(beta1, beta2, self.count))
            self.update_group(group, scalars, (beta1, beta2, group["eps"], group["weight_decay"]), **how)

    def update_group(
        self,
        group: dict[str, Any],
        scalars: tuple[float, float, float],
        settings: tuple[float, float, float, float],
        factor: Tensor | float = 1.0,
    ) -> None:
        """An update with the gradients times `factor`. scalars, settings: of `adamw_update`."""
        for p in group["params"]:
            master, (mu, nu) = self.master(p), self.moments(p)
            adamw_update(master, mu, nu, gradient(p).to(master.dtype) * factor, scalars, *settings)
            self.round_master(p)

    def master(self, p: nn.Parameter) -> Tensor:
        """What an update changes: the parameter itself, or its float32 master, at the start the parameter's value."""
        return self._state(p).get("master", p)

    def moments(self, p: nn.Parameter) -> tuple[Tensor, Tensor]:
        """Running means of a parameter's gradients and of their squares, zero at the start."""
        state = self._state(p)
        return state["mu"], state["nu"]

    def _state(self, p: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            wide = wide_dtype([p])
            state["mu"], state["nu"] = (torch.zeros_like(p, dtype=wide) for _ in range(2))
            if p.dtype != wide:
                state["master"] = p.detach().to(wide)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer. torch rounds what it loads to the parameter's dtype; masters and moments keep theirs."""
        super().load_state_dict(state_dict)
        numbers = itertools.chain(*(group["params"] for group in state_dict["param_groups"]))
        for number, p in zip(numbers, itertools.chain(*(g["params"] for g in self.param_groups)), strict=True):
            for key, x in state_dict["state"].get(number, {}).items():
                self.state[p][key] = x.detach().clone().to(p.device)

    @torch.no_grad()
    def set_master(self, p: nn.Parameter, value: Tensor) -> None:
        """Write a value into a parameter's master, and rounded into the parameter."""
        self.master(p).copy_(value)
        self.round_master(p)

    def round_master(self, p: nn.Parameter) -> None:
        """Write a parameter's master, rounded, into the parameter. One that is its own master stays."""
        p.copy_(self.master(p))


def make_optimizer(cfg: OptimizerConfig, module: nn.Module, kind: type[AdamW] = AdamW) -> AdamW:
    """AdamW over a module's parameters: matrices decay, gains do not."""
    groups = [{"params": [], "weight_decay": cfg.weight_decay}, {"params": [], "weight_decay": 0.0}]
    for p in module.parameters():
        groups[not decays(p.shape)]["params"].append(p)
    return kind([g for g in groups if g["params"]], cfg.lr_max, (cfg.beta1, cfg.beta2), cfg.eps, cfg.weight_decay)
