"""Global-norm clipping and AdamW as an optimizer object: it owns the moments and changes the parameters in place.

Any module can be trained with them, and `torch.optim.AdamW` can take their place in a training loop.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from llm_common.config import OptimizerConfig
from llm_common.schedule import bias_corrections
from llm_common.tensors import decays
from torch_llm.layers import upcast


def global_norm(grads: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all tensors, summed in float32 (float64 for float64); 0 if there is none."""
    squares = [torch.sum(torch.square(upcast(g))) for g in grads]
    return torch.sqrt(torch.stack(squares).sum()) if squares else torch.zeros(())


@torch.no_grad()
def clip_by_global_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Multiply the gradients in place by min(1, max_norm / norm); returns the norm before. None: no clipping.

    No epsilon is added to the norm: `torch.nn.utils.clip_grad_norm_` adds 1e-6, which costs five digits of float64
    parity.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = global_norm(grads)
    if max_norm is not None:
        factor = torch.clamp(max_norm / norm, max=1.0)  # norm 0: min(inf, 1)
        for g in grads:
            g.mul_(factor)
    return norm


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


class AdamW(torch.optim.Optimizer):
    """p <- p - lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), the decay on the old p.

    `group["lr"]` is set from outside before each step. `count` is the number of updates made, one for all parameters.
    A parameter without a gradient counts as one with zero gradient, as it does in JAX.
    Source: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101.
    """

    def __init__(self, params, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
        defaults = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay, "count": 0}
        super().__init__(params, defaults)  # the groups are what `state_dict`, pickle and deepcopy keep

    @property
    def count(self) -> int:
        return self.param_groups[0]["count"]

    @count.setter
    def count(self, value: int) -> None:
        for group in self.param_groups:
            group["count"] = value

    _compiled = None  # set by `compile_update`; not part of the state

    def compile_update(self) -> None:
        """Let torch.compile fuse the update: worth it on a GPU.

        One program for tensors of any size, the scalars its values: all tensors in one program would take minutes to compile.
        """
        self._compiled = torch.compile(adamw_update, dynamic=True)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None, "AdamW needs no closure"
        self.count += 1
        for group in self.param_groups:
            beta1, beta2 = group["beta1"], group["beta2"]
            settings = (beta1, beta2, group["eps"], group["weight_decay"])
            scalars = (group["lr"], *bias_corrections(beta1, beta2, self.count))
            device = group["params"][0].device
            on_device = (
                [torch.tensor(x, dtype=torch.float64, device=device) for x in scalars] if self._compiled else None
            )
            for p in group["params"]:
                g = torch.zeros_like(p) if p.grad is None else p.grad
                mu, nu = self.moments(p)
                tensors = (p, mu, nu, g)
                if self._compiled is None:
                    adamw_update(*tensors, scalars, *settings)
                else:
                    flat = [x.detach().reshape(-1) for x in tensors]  # views: one shape for the program to know
                    self._compiled(*flat, on_device, *settings)  # pyright: ignore[reportCallIssue]

    def moments(self, p: nn.Parameter) -> tuple[Tensor, Tensor]:
        """Running means of a parameter's gradients and of their squares, zero at the start."""
        state = self.state[p]
        if not state:
            state["mu"], state["nu"] = torch.zeros_like(p), torch.zeros_like(p)
        return state["mu"], state["nu"]


def make_optimizer(cfg: OptimizerConfig, module: nn.Module) -> AdamW:
    """AdamW over a module's parameters: matrices decay, gains do not."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if decays(p.shape)], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if not decays(p.shape)], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], cfg.lr_max, cfg.beta1, cfg.beta2, cfg.eps, cfg.weight_decay)
