"""Implied volatilities: one scalar equation per option, all in one call, beside loops of SciPy's brentq.

The price of a European call is that of Black and Scholes (J. Political Economy 81 (1973) 637). The loop has
the same torch f; a second one has a NumPy f, which is what one would write without gradients in mind.
"""

from __future__ import annotations

import math
import resource
import time

import torch
from harness import compare, options
from scipy import optimize
from scipy.special import ndtr
from torch import Tensor

import invlayer_core as inv


def call_price(volatility: Tensor, strike: Tensor, maturity: Tensor) -> Tensor:
    """Per unit of the forward price, without interest."""
    spread = volatility * maturity.sqrt()
    d = -strike.log() / spread + spread / 2
    return torch.special.ndtr(d) - strike * torch.special.ndtr(d - spread)


def conditions(volatility: Tensor, price: Tensor, strike: Tensor, maturity: Tensor) -> Tensor:
    return call_price(volatility, strike, maturity) - price


def market(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(3, count, generator=generator)
    strike, maturity, volatility = 0.8 + 0.4 * uniform[0], 0.25 + 2 * uniform[1], 0.1 + 0.5 * uniform[2]
    return call_price(volatility, strike, maturity), strike, maturity


def layer(price: Tensor, strike: Tensor, maturity: Tensor, solver: str = "scipy.find_root") -> Tensor:
    result: Tensor = inv.root(
        conditions, torch.full_like(price, 0.3), (price, strike, maturity), solver=solver,
        options={"bracket": (1e-3, 3.0)}, event_dims=0, atol=1e-10,
    )  # fmt: skip
    return result


def loop_over_torch(price: Tensor, strike: Tensor, maturity: Tensor) -> list[float]:
    return [
        optimize.brentq(lambda v, q=q: float(conditions(torch.tensor(v), *q)), 1e-3, 3.0)
        for q in zip(price, strike, maturity, strict=True)
    ]


def loop_over_numpy(price: Tensor, strike: Tensor, maturity: Tensor) -> list[float]:
    def f(v: float, p: float, k: float, t: float) -> float:
        spread = v * math.sqrt(t)
        d = -math.log(k) / spread + spread / 2
        return float(ndtr(d) - k * ndtr(d - spread)) - p

    rows = zip(price.tolist(), strike.tolist(), maturity.tolist(), strict=True)
    return [optimize.brentq(f, 1e-3, 3.0, args=row) for row in rows]


def study(count: int) -> None:
    """Forward and backward of many options in one call, and the memory that three such calls take."""
    price, strike, maturity = market(count)
    price.requires_grad_()
    for turn in range(3):
        began = time.perf_counter()
        volatility = layer(price, strike, maturity)
        (gradient,) = torch.autograd.grad(volatility.sum(), price)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"  {count} options, forward + backward, turn {turn + 1}: {time.perf_counter() - began:.2f} s, "
            f"peak memory so far {peak:.0f} MiB, largest ∂σ/∂p {float(gradient.max()):.3g}"
        )


if __name__ == "__main__":
    quick = options().quick
    for count in (50,) if quick else (1000, 10_000):
        quotes = market(count)
        assert torch.allclose(layer(*quotes), torch.tensor(loop_over_torch(*quotes)), atol=1e-9)
        cases = {
            "loop of brentq, torch f": lambda quotes=quotes: loop_over_torch(*quotes),
            "loop of brentq, NumPy f": lambda quotes=quotes: loop_over_numpy(*quotes),
            "scipy.find_root, all at once": lambda quotes=quotes: layer(*quotes),
            "scipy.brentq, batch='auto'": lambda quotes=quotes: layer(*quotes, solver="scipy.brentq"),
        }
        compare(f"Implied volatilities, B = {count}, forward", cases, quick=quick)
    study(1000 if quick else 100_000)
