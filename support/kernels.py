"""Fast attention and products: fused kernels, packed weights, recorded graphs."""
import contextlib
import functools
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.layers import FeedForward, gelu_tanh

# ---------------------------------------------------------------------------------------------------------
# Attention

# Off until a GPU has measured it: cuDNN's kernel is reported to plan anew for each length of a text, which
# takes half a second, and to make NaN gradients with a mask
torch.backends.cuda.enable_cudnn_sdp(False)
AMX = torch.cpu._is_amx_tile_supported()


def probabilities(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """softmax(q kᵀ / √hd) (B,H,T,S); the arguments are those of `attend`. If it is causal, the queries are
    those of the last T of S tokens."""
    B, H, T, size = q.shape
    K, S = k.shape[1:3]
    scores = (q * size ** -0.5).reshape(B, K, -1, size) @ k.transpose(-1, -2)
    scores = scores.reshape(B, H, T, S)
    if causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if mask is not None and mask.dtype == torch.bool:  # as a sum it leaves the backward pass nothing to keep
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None,
           causal: bool = False) -> torch.Tensor:
    """softmax(q kᵀ / √hd) v: q (B,H,T,hd), k and v (B,K,S,hd) to (B,H,T,hd).

    H is a multiple of K: each head of k and v serves H/K heads of q in turn (grouped-query attention: Ainslie
    et al., 2023, arXiv:2305.13245). `mask`, to be broadcast to (B,H,T,S), is true where a query sees a key,
    or is added to the scores.
    """
    B, H, T, size = q.shape
    K, S = k.shape[1:3]

    # One token: heads that share keys are queries of one head, so that the cache is not copied
    if T == 1:
        q = q.reshape(B, K, -1, size)
        return F.scaled_dot_product_attention(q, k, v, mask).reshape(B, H, T, size)

    # A CPU's fused kernel in bfloat16 takes 4 to 8 times as long as plain products in its backward pass and,
    # without AMX, 1.6 times forward
    if q.is_cpu and q.dtype == torch.bfloat16:
        if torch.is_grad_enabled() or B * H * T * S < 1 << 28 and not AMX:
            # 128 queries at a time, with the keys up to the last of them: half of attention's time at 512
            # tokens. A compiled block would be compiled anew for each number of parts
            if causal and T > 128 and not torch.compiler.is_compiling():
                ends = range(128, T + 128, 128)
                parts = [attend(q[:, :, n - 128:n], k[:, :, :n], v[:, :, :n], causal=True) for n in ends]
                return torch.cat(parts, 2)
            weights = probabilities(q, k, mask, causal)
            return (weights.reshape(B, K, -1, S) @ v).reshape(B, H, T, size)

    if H > K:
        k = k.repeat_interleave(H // K, 1)
        v = v.repeat_interleave(H // K, 1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


@contextlib.contextmanager
def watch(modules: list[nn.Module]):
    """Collects the attention of `modules`: {module: probabilities (B,T,S) of its last run, mean over heads}.
    Meanwhile, each module's `attend` is swapped for one that records."""
    seen = {}

    def watching(module: nn.Module) -> Callable:
        def watched(q, k, v, mask=None, causal=False):
            with torch.autocast(q.device.type, enabled=False):
                seen[module] = probabilities(q.float(), k.float(), mask, causal).mean(1)
            return attend(q, k, v, mask, causal)
        return watched

    for module in modules:
        module.attend = watching(module)
    try:
        yield seen
    finally:
        for module in modules:
            del module.attend


# ---------------------------------------------------------------------------------------------------------
# Packed weights

class PackedLinear(nn.Module):
    """Computes nn.Linear layers that read the same x as one product in `dtype`, for inference only.

    The weight is stored in the layout of oneDNN's CPU kernels. nn.Linear makes this layout anew in every
    call, which takes as long as the product with one token.
    """
    then = "none", ""  # the operation that follows in the same kernel, in oneDNN's words

    def __init__(self, layers: list[nn.Linear], dtype: torch.dtype):
        super().__init__()
        weight = torch.cat([layer.weight.detach().to(dtype) for layer in layers])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        biases = [layer.bias.detach().to(dtype) for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.dtype = dtype
        self.sizes = [len(layer.weight) for layer in layers]

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…,in) to (…,out)
        then, how = self.then
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, then, [], how)

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns each layer's product with x."""
        return self(x).split(self.sizes, -1)


def pack(model: nn.Module, dtype: torch.dtype) -> None:
    """Packs the nn.Linear layers of a model on a CPU, which computes in `dtype`.

    Decoding takes half the time in bfloat16; the results are the same. Call it last: no gradients pass,
    nothing is saved, and the model can't be moved. A module names in `joined` its methods that give one x to
    several layers, {method: layers}: each such method is swapped for one product.
    """
    mkldnn = torch.backends.mkldnn.is_available()
    bfloat16 = dtype == torch.bfloat16 and mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not mkldnn or not (dtype == torch.float32 or bfloat16):
        return

    def plain(layer: nn.Module) -> bool:
        return type(layer) is nn.Linear and layer.weight.is_cpu

    for module in list(model.modules()):
        # Several layers at once
        for method, names in getattr(module, "joined", {}).items():
            layers = [getattr(module, name, None) for name in names]
            if all(plain(layer) for layer in layers):
                setattr(module, method, PackedLinear(layers, dtype).parts)
                for name in names:
                    delattr(module, name)

        # Those that are left, one by one
        for name, layer in list(module.named_children()):
            if plain(layer):
                setattr(module, name, PackedLinear([layer], dtype))

        # GELU in the kernel of the product before it: alone it takes a fifth of an encoder's time
        if isinstance(module, FeedForward) and not module.gated and module.activation is gelu_tanh:
            if isinstance(module.up, PackedLinear):
                module.up.then = "gelu", "tanh"
                module.activation = nn.Identity()


# ---------------------------------------------------------------------------------------------------------
# Recorded graphs

@functools.cache
def recording_stream(device: int) -> "torch.cuda.Stream":
    """The stream on which graphs are recorded: the usual one can't be, and each new one takes memory."""
    return torch.cuda.Stream(device)


class Recorded:
    """Wraps a function of tensors that does the same work on a GPU in every call. Records the second call as
    a CUDA graph; from then on launches this as a whole, not kernel by kernel. Each call overwrites the last
    result."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        self.function = function
        self.inputs = None
        self.graph = None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        # The first call loads kernels and makes workspaces, which can't be recorded
        if self.inputs is None:
            self.inputs = [x.clone() for x in inputs]
            return self.function(*inputs)

        torch._foreach_copy_(self.inputs, inputs)
        if self.graph is None:
            with torch.cuda.device(inputs[0].device):
                self.record()
        self.graph.replay()
        return self.output

    def record(self) -> None:
        """Records the kernels of a call, computing nothing. `torch.cuda.graph` does so too, but waits for the
        GPU, gives back all cached memory, and hides an error inside it."""
        self.graph = torch.cuda.CUDAGraph()
        stream = recording_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # another thread may be pinning the next pictures meanwhile
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.output = self.function(*self.inputs)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # that the recording isn't whole
                    self.graph.capture_end()
                raise
            self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
