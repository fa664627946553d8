"""torch.compile(model, backend="pyops") against eager stock torch and inductor: `python bench/compile.py --help`."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import FLOOR, Group, Work, main
from lenet import training_pass
from networks import NETWORKS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

SCALE, BATCH = 8, 16


@dataclass(frozen=True)
class Compiled:
    """A network of `networks`, compiled by pyops, and run by stock torch eagerly (rival None) or compiled."""

    network: str
    rival: str | None
    training: bool
    gate: float = FLOOR
    dtype: torch.dtype = torch.float32
    limit_gate: float = 0

    @property
    def name(self) -> str:
        return f"{self.network} {'training' if self.training else 'inference'}, against {self.rival or 'eager'}"

    def prepare(self) -> Work:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = NETWORKS[self.network](SCALE).eval()  # without dropout, so that results can be compared
        input = torch.randn(BATCH, *model.shape)
        stock, ours = (self._program(copy.deepcopy(model), backend, input) for backend in (self.rival, "pyops"))
        with FlopCounterMode(display=False) as counter:
            self._program(model, None, input)()
        return Work(stock, ours, flops=counter.get_total_flops(), bytes=0)

    def _program(self, model: torch.nn.Module, backend: str | None, input: Tensor) -> Callable[[], Tensor]:
        if backend is not None:
            model.compile(backend=backend)
        if self.training:
            torch.manual_seed(1)  # so that all have equal gradients of the output
            return training_pass(model, input)
        return torch.no_grad()(lambda: model(input))


GROUPS = [
    Group(
        f'backend="pyops" against {rival or "eager"}',
        [Compiled(network, rival, training) for network in NETWORKS for training in (True, False)],
    )
    for rival in (None, "inductor")
]

if __name__ == "__main__":
    main('Time torch.compile(model, backend="pyops") against eager stock torch and inductor.', GROUPS)
