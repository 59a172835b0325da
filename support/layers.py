"""The feed-forward layer that all models share, and its activations."""
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

gelu_tanh = functools.partial(F.gelu, approximate="tanh")


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's approximation of GELU by a sigmoid."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {  # by config.json's names
    "gelu": F.gelu, "gelu_new": gelu_tanh, "gelu_fast": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu, "relu": F.relu, "silu": F.silu}


class FeedForward(nn.Module):
    """down(activation(up(x))); gated: down(activation(gate(x)) · up(x)) (Shazeer, 2020, arXiv:2002.05202)."""
    joined = {"gate_and_up": ("gate", "up")}  # see kernels.pack

    def __init__(self, width: int, hidden: int, activation: str, bias: bool = True, gated: bool = False):
        super().__init__()
        self.gated = gated
        if gated:
            self.gate = nn.Linear(width, hidden, bias)
        self.up = nn.Linear(width, hidden, bias)
        self.down = nn.Linear(hidden, width, bias)
        self.activation = ACTIVATIONS[activation]

    def gate_and_up(self, x):
        return self.gate(x), self.up(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…,width)
        if not self.gated:
            return self.down(self.activation(self.up(x)))
        gate, up = self.gate_and_up(x)
        return self.down(self.activation(gate) * up)
