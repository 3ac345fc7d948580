"""Implied volatilities: one scalar equation per option, all in one call, beside loops of SciPy's brentq.

The price of a European call is that of Black and Scholes (J. Political Economy 81 (1973) 637). The loop has
the same torch f; a second one has a NumPy f, which is what one would write without gradients in mind.
"""

from __future__ import annotations

import gc
import math
import resource
import time
from pathlib import Path

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


def resident() -> float:
    """MiB of memory that the process holds at this moment."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def study(count: int, solver: str, turns: int = 6) -> None:
    """Forward and backward of many options in one call; how much memory is held after each of some calls."""
    price, strike, maturity = market(count)
    price.requires_grad_()
    print(f"\n{solver}: {count} options, forward + backward in one call")
    for turn in range(turns):
        began = time.perf_counter()
        volatility = layer(price, strike, maturity, solver)
        (gradient,) = torch.autograd.grad(volatility.sum(), price)
        seconds, steepest = time.perf_counter() - began, float(gradient.max())
        del volatility, gradient
        tensors = sum(type(thing) is Tensor for thing in gc.get_objects())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"  call {turn + 1}: {seconds:.2f} s; afterwards {resident():.0f} MiB resident, "
            f"{tensors} tensors alive; peak so far {peak:.0f} MiB; largest ∂σ/∂p {steepest:.3g}"
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
    study(1000 if quick else 100_000, "scipy.find_root")
    study(100 if quick else 10_000, "scipy.brentq")
