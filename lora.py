"""LoRA: low-rank updates of any nn.Linear or nn.Embedding (Hu et al., 2021, arXiv:2106.09685).

    h = W₀x + s·BAx

W₀ (out,in) stays frozen, A (r,in) and B (out,r) are trained, s = α/r. B is zero at first, so that nothing
changes before the first step. formats/peft.py reads and writes the files of PEFT.
"""
import math
from pathlib import Path
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from formats.files import InputError
from formats.peft import WEIGHTS, Model, Tensors, Update, read_updates, write_updates


def row_norms(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(weight.float(), dim=1)


class LoRALinear(nn.Module):
    """h = W₀x + s·BAx + b in place of an nn.Linear, with its `weight` W₀ (out,in) and `bias` b (out,).

    A (r,in) and B (out,r) are float32, whatever W₀ is; products are computed in x's dtype. `dropout` falls on
    the x that A reads. m (out,) makes it DoRA (Liu et al., 2024, arXiv:2402.09353): h = m / ‖W₀ + s·BA‖ ·
    (W₀x + s·BAx) + b, with the norm of each row, which gets no gradient.
    """

    def __init__(self, linear: nn.Module, A: nn.Parameter, B: torch.Tensor, scale: float,
                 dropout: float = 0.0, m: torch.Tensor | None = None):
        super().__init__()
        self.weight = linear.weight
        self.bias = getattr(linear, "bias", None)
        self.scale = scale
        self.A = A
        self.B = nn.Parameter(B)
        self.m = None if m is None else nn.Parameter(m)
        self.dropout = nn.Dropout(dropout)
        self.replaced = False  # whether W₀ came with the LoRA, so that it has to be saved with it
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…,in) to (…,out)
        # W₀x + B(s·Ax): s scales r numbers, not all of the output
        down = self.scale * F.linear(self.dropout(x), self.A.to(x.dtype))  # (…,r)
        h = F.linear(x, self.weight, self.bias if self.m is None else None)
        h = h + F.linear(down, self.B.to(x.dtype))
        if self.m is None:
            return h

        # DoRA: rescale each output to the length that m says
        h = (self.m / row_norms(self.sum()).detach()).to(x.dtype) * h
        return h if self.bias is None else h + self.bias

    def sum(self) -> torch.Tensor:
        """W₀ + s·BA, float32."""
        return self.weight.float() + self.scale * (self.B @ self.A)

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """What it multiplies with (out,in), float32."""
        weight = self.sum()
        return weight if self.m is None else weight * (self.m / row_norms(weight))[:, None]

    def merged(self) -> nn.Module:
        """The same as one layer without a LoRA, in W₀'s dtype."""
        weight = self.merged_weight().to(self.weight.dtype)
        linear = nn.Linear(*weight.T.shape, bias=False, device="meta").train(self.training)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = self.bias
        return linear


class LoRAEmbedding(LoRALinear):
    """The same in place of an nn.Embedding, which is a linear layer of one-hot vectors: token i becomes
    E[i] + s·B·A[:,i]. `weight` E is (V,D), the transpose of W₀; A is (r,V), B (D,r), DoRA's m (D,). Nothing
    is dropped out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # ids (…) to (…,D)
        update = F.linear(F.embedding(x, self.A.T), self.B)
        h = F.embedding(x, self.weight) + self.scale * update
        if self.m is not None:
            h = h * self.m / row_norms(self.sum()).detach()
        return h.to(self.weight.dtype)

    def sum(self) -> torch.Tensor:
        return self.weight.float().T + self.scale * (self.B @ self.A)

    def merged(self) -> nn.Module:
        weight = self.merged_weight().T.to(self.weight.dtype).contiguous()
        return nn.Embedding.from_pretrained(weight).train(self.training)


def lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}


def replace_layers(module: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Puts layers in their places, freezes `module`, and leaves gradients to A, B and m."""
    for name, layer in layers.items():
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, layer)
    module.requires_grad_(False)
    for layer in lora_layers(module).values():
        for p in (layer.A, layer.B, layer.m):
            if p is not None:
                p.requires_grad_()


def add_lora(module: nn.Module, rank: int, alpha: float, targets=("q", "v"), dropout: float = 0.0,
             rslora: bool = False, dora: bool = False) -> None:
    """Freezes `module` and gives nn.Linear layers in it a LoRA of `rank`, which changes nothing yet.

    `targets`: names of layers, or their ends ("q", "attention.out"), or "all". `rslora` (Kalajdzievski, 2023,
    arXiv:2312.03732): s = α/√r, so that a higher rank doesn't learn more slowly. `dora`: see LoRALinear.
    Raises InputError where a target is no layer's name.
    """
    if rank < 1:
        raise InputError(f"the rank of a LoRA must be at least 1, not {rank}")
    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    linears = {name: layer for name, layer in module.named_modules()
               if isinstance(layer, nn.Linear) and id(layer.weight) not in embeddings}  # a tied head is none
    scale = alpha / (math.sqrt(rank) if rslora else rank)

    # The layers that each target names
    layers = {}
    for target in linears if targets == "all" else targets:
        names = [name for name in linears if f".{name}".endswith(f".{target}")]
        if not names:
            leaves = sorted({name.rpartition(".")[2] for name in linears})
            raise InputError(f"no linear layer is called {target!r}: there are {', '.join(leaves)}")
        for name in names:
            # A is drawn as nn.Linear draws its weight, B is zero
            weight = linears[name].weight.detach()
            A = torch.empty(rank, weight.shape[1], device=weight.device)
            B = torch.zeros(len(weight), rank, device=weight.device)
            nn.init.kaiming_uniform_(A, math.sqrt(5))
            m = row_norms(weight) if dora else None
            layers[name] = LoRALinear(linears[name], nn.Parameter(A), B, scale, dropout, m)
    replace_layers(module, layers)


def merge_lora(module: nn.Module) -> Callable[[], None]:
    """Folds W₀ + s·BA into one weight, in W₀'s dtype. Returns what brings the same layers back."""
    layers = lora_layers(module)
    for name, layer in layers.items():
        module.set_submodule(name, layer.merged())

    def restore() -> None:
        for name, layer in layers.items():
            module.set_submodule(name, layer)
    return restore


# ---------------------------------------------------------------------------------------------------------
# PEFT's files

def describe(module: nn.Module) -> Model:
    """What formats/peft.py has to know of a ViT, an LLM or an adapter."""
    low_rank = {f"{name}.{leaf}" for name in lora_layers(module) for leaf in "ABm"}
    tensors = {name: p for name, p in module.named_parameters(remove_duplicate=False) if name not in low_rank}
    kinds = {name: type(layer).__name__ for name, layer in module.named_modules(remove_duplicate=False)}
    tied = getattr(getattr(module, "config", None), "tied", False)
    return Model(getattr(module, "family", None), getattr(module, "name", None), tensors, kinds, tied,
                 hasattr(module, "generate"))


def make_layers(module: nn.Module, updates: dict[str, Update]) -> dict[str, LoRALinear]:
    """A layer with its LoRA for each update, by name. Those that share an A go on sharing it."""
    shared_A = {id(update.A): nn.Parameter(update.A) for update in updates.values()}
    layers = {}
    for name, update in updates.items():
        layer = module.get_submodule(name)
        kind = LoRAEmbedding if isinstance(layer, nn.Embedding) else LoRALinear
        outputs, inputs = layer.weight.shape
        if kind is LoRAEmbedding:
            inputs, outputs = layer.weight.shape
        rank = update.A.shape[0] if update.A.dim() == 2 else 0
        wrong_m = update.m is not None and update.m.shape != (outputs,)
        if update.A.shape != (rank, inputs) or update.B.shape != (outputs, rank) or wrong_m:
            raise InputError(f"{name}: A {tuple(update.A.shape)} and B {tuple(update.B.shape)} don't change "
                             f"a layer of {inputs} inputs and {outputs} outputs")
        layers[name] = kind(layer, shared_A[id(update.A)], update.B, update.scale, update.dropout, update.m)
    return layers


@torch.no_grad()
def set_parameters(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Gives parameters of these names other values, in the dtype that they have."""
    for name, tensor in tensors.items():
        p = module.get_parameter(name)
        p.data = tensor.detach().to(p)


def load_lora(module: nn.Module, folder: str | Path, peft: Tensors | None = None) -> None:
    """Freezes `module` (a ViT, an LLM, an adapter) and gives it the LoRA in a folder of PEFT's. What was
    trained besides (modules_to_save, biases) replaces ours and gets gradients. `peft`: see `read_updates`.
    Raises InputError before anything changes."""
    # Read all of it first, so that nothing is done by halves
    found = read_updates(describe(module), folder, peft)
    if not found.updates:
        raise InputError(f"{Path(folder) / WEIGHTS}: no low-rank update in it is of this "
                         f"{type(module).__name__}")
    replace_layers(module, make_layers(module, found.updates))

    # Weights under an update, where the file has its own; then what was trained whole
    for name, tensor in found.bases.items():
        layer = module.get_submodule(name.removesuffix(".weight"))
        layer.replaced = not torch.equal(layer.weight, tensor.to(layer.weight))
    set_parameters(module, found.bases)
    set_parameters(module, found.trained)
    for name in found.trained:
        module.get_parameter(name).requires_grad_()


def fold_lora(module: nn.Module, folder: str | Path, peft: Tensors | None = None) -> None:
    """As `load_lora`, but the weights take the LoRA in: no layer is added, and none is frozen."""
    found = read_updates(describe(module), folder, peft)
    set_parameters(module, found.bases)
    set_parameters(module, found.trained)
    layers = make_layers(module, found.updates)
    set_parameters(module, {f"{name}.weight": layer.merged().weight for name, layer in layers.items()})


@torch.no_grad()
def save_lora(module: nn.Module, folder: str | Path) -> None:
    """Writes the LoRA of `module`, and what else in it gets gradients (as `load_lora` left it), to a folder
    that `peft.PeftModel.from_pretrained` opens on the reference's class. Raises InputError where that class
    has no place for it."""
    # The updates, and what else was trained
    layers = lora_layers(module)
    updates = {name: Update(layer.A, layer.B, layer.scale, layer.dropout.p, layer.m)
               for name, layer in layers.items()}
    low_rank = {id(p) for layer in layers.values() for p in (layer.A, layer.B, layer.m)}
    trained = {name for name, p in module.named_parameters() if p.requires_grad and id(p) not in low_rank}
    biases = {f"{name}.bias" for name, layer in layers.items() if layer.bias is not None}
    if biases & trained:  # PEFT saves all of them or none, those of unread layers too, which are frozen
        trained |= biases
    replaced = {name for name, layer in layers.items() if layer.replaced}
    write_updates(describe(module), folder, updates, trained, replaced)
