"""AdamW for weights that are held in bfloat16 alone, with stochastic rounding.

A bfloat16 number has an eight-bit significand, so the usual rounding to the nearest loses every step below a 512th of a
weight, and AdamW's steps are far below that at the learning rates of alignment. The second moment stalls, too: with β₂
= 0.999 it changes by a thousandth a step, and would only ever rise. Stochastic rounding goes up or down with the
probabilities that make the expected value exact (Zamirai et al. 2020, "Revisiting BFloat16 Training", section 3; Ozkara
et al. 2025, "Stochastic Rounding for LLM Training"). Here weights and both moments are rounded so: 6 bytes for each
parameter, and 2 for its gradient, instead of 12 and 4.

The random bits depend on the seed, the step and the parameter's place, not on a stream. So a resumed run, and every
process of a data-parallel one, rounds in the same way.
"""

from collections.abc import Iterable
from typing import Any

import torch

from data.sampling import uniform

_AT_ONCE = 2**22
"""Numbers of a parameter that are computed at once, since they take some 30 bytes each meanwhile."""


def round_stochastically(values: torch.Tensor, drawn: torch.Generator) -> torch.Tensor:
    """Float32 `values` in bfloat16: each goes to one of its two neighbours, on average to itself.

    A bfloat16 number is the upper half of a float32 one. A random number that is added to the lower half carries over
    with a probability that is the lower half's share of a step. Numbers that bfloat16 has stay as they are.
    """
    half = 2**15
    bits = torch.empty(values.shape, dtype=torch.int16, device=values.device).random_(-half, half, generator=drawn)
    return ((values.view(torch.int32) + bits + half) & -(2**16)).view(torch.float32).bfloat16()


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) on bfloat16 parameters, computed in float32.

    State of a parameter, with the names of `torch.optim.AdamW`: `step`, and in bfloat16 `exp_avg` and `exp_avg_sq`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        seed: int,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """`params`: parameters or groups of them, all bfloat16. `seed`: of the random bits."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._seed = seed
        wrong = {p.dtype for group in self.param_groups for p in group["params"]} - {torch.bfloat16}
        assert not wrong, f"parameters in {wrong}"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        """One step; closures are not supported."""
        assert closure is None
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group, place)
                place += 1

    def _step(self, parameter: torch.Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        state["step"] += 1
        step = int(state["step"])
        drawn = torch.Generator(parameter.device)
        drawn.manual_seed(int(uniform(1, self._seed, "rounding", step, place)[0] * 2**53))
        assert parameter.is_contiguous() and parameter.grad is not None
        whole = (
            parameter.view(-1),
            parameter.grad.reshape(-1),
            state["exp_avg"].view(-1),
            state["exp_avg_sq"].view(-1),
        )
        for parts in zip(*(tensor.split(_AT_ONCE) for tensor in whole), strict=True):
            _adamw(*parts, step=step, group=group, drawn=drawn)


def _adamw(
    weight: torch.Tensor,
    grad: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    step: int,
    group: dict[str, Any],
    drawn: torch.Generator,
) -> None:
    """Updates `weight` and its moments in place. All (N,), bfloat16."""
    beta1, beta2 = group["betas"]
    g = grad.float()
    m = torch.lerp(first.float(), g, 1 - beta1)
    v = second.float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
    size = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
    new = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
    new.addcdiv_(m, size, value=-group["lr"] / (1 - beta1**step))
    for target, value in ((weight, new), (first, m), (second, v)):
        target.copy_(round_stochastically(value, drawn))
