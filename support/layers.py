"""The layers that models share: the feed-forward layer with its activations, and the norm of Llama."""
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

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
        if spares(gate):
            return self.down(SparingGate.apply(self.activation, gate, up))
        return self.down(self.activation(gate) * up)


class RMSNorm(nn.RMSNorm):
    """x / √(mean(x²) + eps) · weight (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…,size)
        if spares(x) and not self.weight.requires_grad:
            return SparingNorm.apply(x, self.weight, self.eps)
        return super().forward(x)


# ---------------------------------------------------------------------------------------------------------
# Training on a CPU: less is kept for the backward pass. A step of SmolLM2 at batch 8 takes 0.92 to 0.98
# of the time and 0.85 of the memory. A compiler finds this by itself

def spares(x: torch.Tensor) -> bool:
    """Whether a layer keeps less of what it computes from x, and computes it again in the backward pass."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return x.is_cpu and x.requires_grad and x.dtype != torch.float64


class SparingGate(torch.autograd.Function):
    """activation(gate) · up. Keeps gate and up alone, and computes activation(gate) again."""

    @staticmethod
    def forward(ctx, activation, gate, up):
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return activation(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.activation(gate)
        [grad_gate] = torch.autograd.grad(activated, gate, grad * up)
        return None, grad_gate, activated.detach().mul_(grad)


class SparingNorm(torch.autograd.Function):
    """RMSNorm whose weight isn't trained. Keeps x alone, where torch keeps it in float32 too."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # y = r·x·w with r = 1/√(mean(x²) + eps), so that dx = r·(g·w − x·r²·mean(g·w·x)), all in float32
        x, weight = ctx.saved_tensors
        wide = x.float()
        r = (wide.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        gw = grad.float() * weight
        share = (gw * wide).mean(-1, keepdim=True) * r.square()
        return gw.addcmul_(wide, share, value=-1).mul_(r).to(x.dtype), None, None
