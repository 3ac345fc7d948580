"""The implied volatilities of many options by one layer: on one core, on a pool of processes, on a cluster.

    python examples/implied_volatility/study.py [--options 100000] [--ways core pool cluster vectorised]

Each way solves the same equations by SciPy's brentq, and takes the gradient of all volatilities with respect
to the prices; ``vectorised`` uses SciPy's ``find_root``, which takes all equations at once, for comparison.
It ends with a message and a non-zero exit status if a volatility or a gradient is not as it must be.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

import invlayer_core as inv
import quotes

WAYS = ("core", "pool", "cluster", "vectorised")


def make_layer(executor: Executor | None = None, solver: str = "scipy.brentq") -> inv.RootLayer:
    """The layer; only where it runs differs."""
    return inv.RootLayer(
        quotes.overprice,
        solver=solver,
        options={"bracket": (1e-3, 3.0)},
        event_dims=0,
        atol=1e-10,
        executor=executor,
        return_info=True,
    )


@contextmanager
def workers(way: str) -> Iterator[Executor | None]:
    """Nobody, the processes of a pool, or those of a cluster on this machine."""
    if way == "pool":
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool
    elif way == "cluster":
        distributed = import_module("distributed")
        with (
            distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
            distributed.Client(cluster) as client,  # Client("tcp://scheduler:8786") where a cluster runs
        ):
            client.upload_file(str(Path(quotes.__file__)))  # the workers import the conditions
            yield client.get_executor()
    else:
        yield None


def solve(layer: inv.RootLayer, market: Sequence[Tensor]) -> tuple[Tensor, Tensor, str, float]:
    """Volatilities, ∂volatility/∂price, how the batch was run, and seconds for both."""
    price, strike, maturity = market
    price = price.clone().requires_grad_()
    began = time.perf_counter()
    volatility, info = layer(price, strike, maturity, y0=torch.full_like(price, 0.3))
    (gradient,) = torch.autograd.grad(volatility.sum(), price)
    return volatility.detach(), gradient, info.batch, time.perf_counter() - began


def errors(
    volatility: Tensor, gradient: Tensor, known: Tensor, market: Sequence[Tensor]
) -> tuple[float, float]:
    """The largest error of a volatility, and the largest relative one of a gradient."""
    exact = 1 / quotes.vega(known, *market[1:])
    return float((volatility - known).abs().max()), float((gradient / exact - 1).abs().max())


def study(count: int, ways: Sequence[str]) -> None:
    """Solve in each way, check, and print a line."""
    known, *market = quotes.market(count)
    print(f"{count} implied volatilities with gradients")
    for way in ways:
        solver = "scipy.find_root" if way == "vectorised" else "scipy.brentq"
        with workers(way) as executor:
            if executor is not None:  # the first job waits for the workers to start
                solve(make_layer(executor, solver), [tensor[:8] for tensor in market])
            volatility, gradient, how, seconds = solve(make_layer(executor, solver), market)
        value_error, gradient_error = errors(volatility, gradient, known, market)
        print(
            f"  {way:10s} {how:9s} {seconds:8.2f} s {1e6 * seconds / count:8.1f} µs each, errors: "
            f"volatility {value_error:.1e}, gradient {gradient_error:.1e}"
        )
        if not (value_error < 1e-8 and gradient_error < 1e-6):
            sys.exit(f"{way}: a volatility or a gradient is wrong")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--options", type=int, default=100_000)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=("core", "pool", "vectorised"))
    given = parser.parse_args(arguments)
    study(given.options, given.ways)


if __name__ == "__main__":
    torch.set_num_threads(1)  # one core is one core
    main()
