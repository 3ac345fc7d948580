"""What the processes of ``test_processes.py`` run; importable by name, as spawned processes need it."""

from __future__ import annotations

import os
from typing import Any

import torch
from tests.memory.layers import rand
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import invlayer_core as inv

SAMPLES, UNKNOWNS = 6, 2


class Conditions(torch.nn.Module):
    """A small network in the conditions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(rand(UNKNOWNS, UNKNOWNS).detach())

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return y + 0.2 * torch.tanh(y @ self.weight) + 0.1 * y**3 - x


class Model(torch.nn.Module):
    """A layer with a linear map before and after it."""

    def __init__(self, solver: Any = "torch.newton") -> None:
        super().__init__()
        self.before = torch.nn.Linear(UNKNOWNS, UNKNOWNS, dtype=torch.float64)
        self.layer = inv.RootLayer(Conditions(), solver=solver)
        self.after = torch.nn.Linear(UNKNOWNS, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        z = self.before(x)
        return self.after(self.layer(z, y0=torch.zeros_like(z)))


def model(solver: Any = "torch.newton") -> Model:
    torch.manual_seed(3)
    return Model(solver)


def data() -> Tensor:
    return rand(SAMPLES, UNKNOWNS).detach()


def loss(output: Tensor) -> Tensor:
    return output.square().mean()


def value_and_gradients(module: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """The loss and its gradient with respect to every parameter."""
    value = loss(module(x))
    return [value.detach(), *torch.autograd.grad(value, list(module.parameters()))]


def compute(module: torch.nn.Module, answers: Any) -> None:
    """In a spawned process: what the parent computes, too."""
    torch.set_num_threads(1)
    answers.put([tensor.tolist() for tensor in value_and_gradients(module, data())])


def train_a_share(rank: int, world: int, rendezvous: str, answers: Any) -> None:
    """One of ``world`` processes, with its share of the samples, under DistributedDataParallel."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world
    )
    parallel = DistributedDataParallel(model())
    loss(parallel(data()[rank::world])).backward()
    answers.put((rank, [parameter.grad.tolist() for parameter in parallel.parameters()]))
    torch.distributed.barrier()  # nobody leaves while another still listens
    # Without the interpreter's own end: a thread of gloo that then asks for the GIL aborts the process (seen
    # in 1 run of 25 on a loaded machine, torch 2.13). An exception above still ends with status 1.
    os._exit(0)
