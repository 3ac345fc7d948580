"""European calls by Black and Scholes, and a market of them whose volatilities are known.

Prices are per unit of the forward price, without interest (Black & Scholes, J. Political Economy 81 (1973)
637). Everything that worker processes are sent stands in this module, so that they can import it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["call_price", "market", "overprice", "vega"]


def call_price(volatility: Tensor, strike: Tensor, maturity: Tensor) -> Tensor:
    """The price of each call."""
    spread = volatility * maturity.sqrt()
    d = -strike.log() / spread + spread / 2
    return torch.special.ndtr(d) - strike * torch.special.ndtr(d - spread)


def overprice(volatility: Tensor, price: Tensor, strike: Tensor, maturity: Tensor) -> Tensor:
    """What the implied volatility satisfies: zero where the model has the price of the market."""
    return call_price(volatility, strike, maturity) - price


def vega(volatility: Tensor, strike: Tensor, maturity: Tensor) -> Tensor:
    """∂price/∂volatility in closed form: the gradients are checked against its inverse."""
    spread = volatility * maturity.sqrt()
    d = -strike.log() / spread + spread / 2
    return maturity.sqrt() * (-(d**2) / 2).exp() / math.sqrt(2 * math.pi)


def market(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Volatilities that are to be found again, then prices, strikes and maturities, each ``(count,)``."""
    uniform = torch.rand(3, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    volatility, strike, maturity = 0.1 + 0.5 * uniform[0], 0.8 + 0.4 * uniform[1], 0.25 + 2 * uniform[2]
    return volatility, call_price(volatility, strike, maturity), strike, maturity
