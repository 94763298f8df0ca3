"""How networks are computed while images are drawn: their precision, and compiled or not.

Weights, x_t and what comes back are float32 whatever is asked for. bfloat16 is torch's autocast:
what goes into convolutions and matrix products is rounded to bfloat16, sums are float32. Compiling
(`torch.compile`) fuses what lies between them. Both change the last bits of an image, so both stand
in a record's sampling settings.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from membench.errors import MembenchError

Precision = Literal["float32", "bfloat16"]
SHAPES = 256
"""How many shapes of all networks torch keeps compiled; its own limit of 8 is met in a sweep."""


class Arithmetic(NamedTuple):
    """What is asked of networks; plain float32 is the default."""

    precision: Precision = "float32"
    compiled: bool = False

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which a network is called."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


class Compiled:
    """A function of a network and tensors, compiled for their shapes when these first come.

    Threads may call it: one compiles, the others wait. The first call raises a `MembenchError`
    where torch cannot compile.
    """

    def __init__(self, function: Callable[..., Any]):
        self.plain = function
        self.lock, self.seen = threading.Lock(), set[tuple[Any, ...]]()

    @cached_property
    def function(self) -> Callable[..., Any]:
        """Made when it is first called: torch's compiler takes a second to import."""
        return torch.compile(self.plain, dynamic=False, fullgraph=True)

    def __call__(
        self, network: Callable[..., Any] | None, *tensors: Tensor | None, **named: Any
    ) -> Any:
        key = (id(network), *(None if x is None else (x.shape, x.dtype) for x in tensors))
        if key in self.seen:
            return self.function(network, *tensors, **named)
        import torch._dynamo
        from torch._dynamo.exc import TorchDynamoException

        torch._dynamo.config.cache_size_limit = SHAPES
        with self.lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of what is harmless in diffusers' code
            try:
                result = self.function(network, *tensors, **named)
            except TorchDynamoException as error:
                reason = str(error).strip().partition("\n")[0]
                raise MembenchError(f"--compile: torch cannot compile here ({reason})") from None
            self.seen.add(key)
        return result


@cache
def check_compiler(device: str) -> None:
    """Compile something small: a `MembenchError` in time where that does not work."""
    Compiled(lambda network, x: x + 1)(None, torch.zeros(1, device=device))


@Compiled
def _call_compiled(network: nn.Module, x: Tensor, t: Tensor, **known: Any) -> Tensor:
    prediction: Tensor = network(x, t, **known)[0]
    return prediction


class ComputedNetwork(nn.Module):
    """A U-Net with the calling convention of diffusers' `UNet2DModel`, in another arithmetic."""

    def __init__(self, network: nn.Module, arithmetic: Arithmetic):
        super().__init__()
        self.network, self.arithmetic = network, arithmetic
        self.config = getattr(network, "config", {})

    def forward(self, x: Tensor, t: int | Tensor, **known: Any) -> tuple[Tensor]:
        """(prediction [B, C, H, W],) of x [B, C, H, W] at t, an integer or numbers [B]."""
        known["return_dict"] = False
        with self.arithmetic.autocast(x.device):
            if not self.arithmetic.compiled:
                return (self.network(x, t, **known)[0].to(x.dtype),)
            if not isinstance(t, Tensor):  # a number would be compiled in
                t = torch.full((len(x),), t, device=x.device)
            return (_call_compiled(self.network, x, t, **known).to(x.dtype),)
