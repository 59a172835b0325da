"""Low-rank updates of any nn.Linear, and the files that PEFT keeps them in.

LoRA (Hu et al., 2021, arXiv:2106.09685): h = W₀x + s·BAx. W₀ (out,in) stays frozen, A (r,in) and B
(out,r) are trained, s = α/r. B is zero at first, so that nothing changes before the first step.

PEFT names modules as the reference's class does, and that class may hold in one matrix what we hold in
several: GPT-2's c_attn is our q, k and v. Of such a matrix each of ours takes its rows of B, and A
is shared. Which rows these are is what `Family`'s table does to the rows of the matrix itself.
"""
import itertools
import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Callable

import regex
import torch
import torch.nn as nn
import torch.nn.functional as F

from formats.files import InputError, guard, named, read_json, read_tensors, write_json, write_tensors


def row_norms(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(weight.float(), dim=1)


class LoRALinear(nn.Module):
    """h = W₀x + s·BAx + b in place of an nn.Linear, with its `weight` W₀ (out,in) and `bias` b (out,).
    A (r,in) and B (out,r) are float32, whatever W₀ is; products are computed in x's dtype. `dropout` falls
    on the x that A reads. m (out,), if any, makes it DoRA (Liu et al., 2024, arXiv:2402.09353):
    h = m / ‖W₀ + s·BA‖ · (W₀x + s·BAx) + b, with the norm of each row, which gets no gradient."""

    def __init__(self, linear: nn.Linear, A: nn.Parameter, B: torch.Tensor, scale: float,
                 dropout: float = 0.0, m: torch.Tensor | None = None):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        self.A, self.B, self.m = A, nn.Parameter(B), None if m is None else nn.Parameter(m)
        self.dropout = nn.Dropout(dropout)
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…,in) to (…,out)
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        update = self.scale * F.linear(F.linear(self.dropout(x), A), B)
        if self.m is None:
            return F.linear(x, self.weight, self.bias) + update
        h = (self.m / row_norms(self.sum()).detach()).to(x.dtype) * (F.linear(x, self.weight) + update)
        return h if self.bias is None else h + self.bias

    def sum(self) -> torch.Tensor:
        """W₀ + s·BA, float32."""
        return self.weight.float() + self.scale * (self.B @ self.A)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        weight = self.sum()
        if self.m is not None:
            weight *= (self.m / row_norms(weight))[:, None]
        linear = nn.Linear(*weight.T.shape, bias=False, device="meta").train(self.training)
        linear.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        linear.bias = self.bias
        return linear


def lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}


def put(module: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Puts layers in their places, and leaves gradients to A, B and m alone."""
    for name, layer in layers.items():
        module.set_submodule(name, layer)
    module.requires_grad_(False)
    for layer in lora_layers(module).values():
        for p in (layer.A, layer.B, layer.m):
            if p is not None:
                p.requires_grad_()


def add_lora(module: nn.Module, rank: int, alpha: float, targets=("q", "v"), dropout: float = 0.0,
             rslora: bool = False, dora: bool = False) -> None:
    """Freezes `module` and gives the nn.Linear layers in it a LoRA of `rank` each, which changes nothing yet.
    `targets`: our names, or their ends ("q", "attention.out"), or "all". `rslora` (Kalajdzievski, 2023,
    arXiv:2312.03732): s = α/√r, so that a higher rank doesn't learn more slowly. `dora`: see LoRALinear.
    Raises InputError where a target is no layer's name."""
    if rank < 1:
        raise InputError(f"the rank of a LoRA must be at least 1, not {rank}")
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    scale, layers = alpha / (math.sqrt(rank) if rslora else rank), {}
    for target in linears if targets == "all" else targets:
        names = [name for name in linears if f".{name}".endswith(f".{target}")]
        if not names:
            leaves = sorted({name.rpartition(".")[2] for name in linears})
            raise InputError(f"no linear layer is called {target!r}: there are {', '.join(leaves)}")
        for name in names:
            weight = linears[name].weight.detach()
            A = torch.empty(rank, weight.shape[1], device=weight.device)
            B = torch.zeros(len(weight), rank, device=weight.device)
            nn.init.kaiming_uniform_(A, math.sqrt(5))
            layers[name] = LoRALinear(linears[name], nn.Parameter(A), B, scale, dropout,
                                      row_norms(weight) if dora else None)
    put(module, layers)


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

CONFIG, WEIGHTS, ROOT = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
KINDS = {"A.weight": "A", "B.weight": "B", "magnitude_vector": "m"}  # what follows "lora_" in a tensor's name
# adapter_config.json: what may have these values alone (other ways to begin change W₀); what is read below;
# what says only how PEFT chose or runs. Anything else that is set is refused.
CHOICES = {"peft_type": ("LORA",), "bias": ("none", "lora_only"),
           "init_lora_weights": (True, "gaussian", "orthogonal", "eva")}
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout",
        "modules_to_save"}
IDLE = {"task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
        "eva_config", "runtime_config", "megatron_core", "qalora_group_size"}


def in_class(module: nn.Module) -> dict[str, dict[str, tuple]]:
    """{name in the reference's class: {our parameter: (function, rows)}}: what makes our tensor of theirs,
    and which of its rows ours are. What isn't some rows of one tensor is left out. A name that only files
    have stands before the class's. A module that isn't of a family keeps its own names."""
    family, functions, found = getattr(module, "family", None), defaultdict(dict), defaultdict(dict)
    out = {f"{name}.{leaf}" for name in lora_layers(module) for leaf in "ABm"}
    if family and getattr(module.config, "tied", False):  # to PEFT the embedding and the head are two
        out.add("embedding.weight")
    sizes = {name: len(p) for name, p in module.named_parameters() if name not in out}
    for name in sizes:
        function, disk = family.source(name) if family else (lambda tensor: tensor, [name])
        for theirs in disk[0].split("|") if len(disk) == 1 else ():
            functions[theirs][name] = function
    for theirs, group in functions.items():
        at = torch.arange(sum(map(sizes.get, group)))
        for name, function in group.items():
            try:
                rows = function(at)
            except IndexError:  # not a matrix there: SAM's 1 × 1 convolution
                continue
            if rows.shape == (sizes[name],) and not rows.is_floating_point():
                found[theirs][name] = function, rows
    return found


def load_lora(module: nn.Module, folder: str | Path) -> None:
    """Freezes `module` (a ViT, an LLM, an adapter) and gives it the LoRA in a folder of PEFT's, that is
    adapter_config.json and adapter_model.safetensors. What was trained besides (modules_to_save, biases)
    replaces ours and gets gradients.

    Which layers change is read off the tensors' names, so that it doesn't matter how target_modules chose
    them. Raises InputError, before anything changes, where an option, a tensor or a shape has no place here.
    """
    path, config = Path(folder) / WEIGHTS, read_json(Path(folder) / CONFIG)
    for key, value in config.items():
        if value and not (value in CHOICES[key] if key in CHOICES else key in READ | IDLE):
            raise InputError(f"{path.with_name(CONFIG)}: {key} {value!r} is not supported")
    tensors = read_tensors(path)
    with guard(path.with_name(CONFIG)), named(path):
        layers, values = read_lora(module, config, tensors)
    put(module, layers)
    for name, value in values.items():
        p = module.get_parameter(name)
        p.data = value.to(p)
        p.requires_grad_()


def read_lora(module: nn.Module, config: dict, tensors: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """PEFT's tensors to {our layer: LoRALinear} and {our parameter: tensor}. Raises InputError."""
    known, family = in_class(module), getattr(module, "family", None)
    unused, device = family.unused if family else "", next(module.parameters()).device
    parts = defaultdict(dict)  # name in the class -> {"A": …, "B": …}, or {None: …} of a whole tensor
    for key, tensor in tensors.items():
        name, lora, kind = key.removeprefix(ROOT).replace(".base_layer.", ".").rpartition(".lora_")
        if lora and kind not in KINDS or not tensor.is_floating_point():
            raise InputError(f"tensor '{key}' is not the low-rank update of a linear layer")
        parts[f"{name}.weight" if lora else kind][KINDS.get(kind)] = tensor.to(device, torch.float32)

    def end_of(name: str) -> str:
        """`name` without the path that leads to our module in a larger one; "" where it isn't known."""
        ends = (name.split(".", i)[-1] for i in range(name.count(".") + 1))
        return next((end for end in ends if end in known), "")

    def pattern(patterns: str, default: str, name: str) -> float:
        values = (config.get(patterns) or {}).items()
        # a regular expression from outside may take for ever or, where it counts, all memory
        if any("{" in key for key, _ in values):
            raise ValueError(f"{patterns} with a brace is not supported")
        return next((value for key, value in values if regex.match(rf"(.*\.)?({key})$", name, timeout=1)),
                    config[default])

    ends = {name: end_of(name) for name in parts if not re.fullmatch(unused, name)}
    paths = {name.removesuffix(end) for name, end in ends.items() if end and "head.weight" not in known[end]}
    if len(paths) > 1:
        raise InputError(f"it changes more than one model: {', '.join(sorted(paths))}")
    layers, values = {}, {}
    for name, end in ends.items():
        if not end and re.fullmatch(unused, name.removeprefix(min(paths, default=""))):
            continue
        if not end:
            raise InputError(f"'{name}' is not a tensor of this model that can be changed here")
        part, size = parts[name], sum(len(rows) for _, rows in known[end].values())
        if part.keys() == {None}:
            for ours, (function, rows) in known[end].items():
                value, shape = part[None], module.get_parameter(ours).shape
                if value.shape != (size, *shape[1:]) or not torch.equal(function(value), value[rows]):
                    raise InputError(f"'{name}' is {tuple(value.shape)}; {ours} wants {tuple(shape)}")
                values[ours] = value[rows]
            continue
        if part.keys() != {"A", "B", *("m" if config.get("use_dora") else "")}:
            raise InputError(f"'{name}' has a low-rank update in parts: {', '.join(sorted(map(str, part)))}")
        theirs = name.removesuffix(".weight")
        rank, alpha = pattern("rank_pattern", "r", theirs), pattern("alpha_pattern", "lora_alpha", theirs)
        scale, A = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), nn.Parameter(part["A"])
        for ours, (_, rows) in known[end].items():
            ours = ours.removesuffix(".weight")
            linear = module.get_submodule(ours)
            if not isinstance(linear, nn.Linear):
                raise InputError(f"'{theirs}' can't change {ours}, which is a {type(linear).__name__}")
            shapes = {"A": (rank, linear.in_features), "B": (size, rank), "m": (size,)}
            for kind, tensor in part.items():
                if tensor.shape != shapes[kind]:
                    raise InputError(f"{kind} of '{theirs}' is {tuple(tensor.shape)}, not {shapes[kind]}")
            layers[ours] = LoRALinear(linear, A, part["B"][rows], scale, config.get("lora_dropout") or 0.0,
                                      part["m"][rows] if "m" in part else None)
    for saved in config.get("modules_to_save") or ():
        if not any(f".{saved}." in f".{name}" for name in parts):
            raise InputError(f"the tensors of '{saved}', one of modules_to_save, are missing")
    for ours, layer in layers.items() if config.get("bias") == "lora_only" else ():
        if layer.bias is not None and f"{ours}.bias" not in values:
            raise InputError(f"the trained bias of {ours} is missing")
    if not layers:
        raise InputError("no low-rank update in it is of this model")
    return layers, values


@torch.no_grad()
def save_lora(module: nn.Module, folder: str | Path) -> None:
    """Writes the LoRA of `module`, and what else in it gets gradients (as `load_lora` left it), to a folder
    that `peft.PeftModel.from_pretrained` opens on the reference's class. Layers that are one matrix there,
    but have an A each here, become one update of higher rank. Raises InputError where that class has no place
    for it.
    """
    folder, family, known = Path(folder), getattr(module, "family", None), in_class(module)
    layers = {f"{name}.weight": layer for name, layer in lora_layers(module).items()}
    dora = any(layer.m is not None for layer in layers.values())
    own = {ours: theirs for theirs, group in known.items() for ours in group}  # the class's name, as the last
    low_rank = {id(p) for layer in layers.values() for p in (layer.A, layer.B, layer.m)}
    left = set(layers) | {name for name, p in module.named_parameters()
                          if p.requires_grad and id(p) not in low_rank}
    tensors, ranks, alphas, saved, turned, bias = {}, {}, {}, set(), False, "none"
    for theirs in dict.fromkeys(own.values()):
        group = {ours: rows for ours, (_, rows) in known[theirs].items()}
        if left.isdisjoint(group):
            continue
        left -= group.keys()
        path = family.path if family and "head.weight" not in group else ""
        name, leaf = f"{path}{theirs}".rsplit(".", 1)
        low = {ours: layers[ours] for ours in group if ours in layers}
        if not low:  # a tensor of the model itself: of ours back to where their rows belong
            value = torch.cat([module.get_parameter(ours) for ours in group])
            value[torch.cat(list(group.values()))] = value.clone()
            if name in ranks:
                name, bias = f"{name}.base_layer", "lora_only"
            else:
                saved.add(name)
            tensors[f"{name}.{leaf}"] = value
            continue
        As = {id(layer.A): layer.A for layer in low.values()}
        starts = dict(zip(As, itertools.accumulate(map(len, As.values()), initial=0)))
        A, scale = torch.cat(list(As.values())), next(iter(low.values())).scale
        size = sum(map(len, group.values()))
        B, m = A.new_zeros(size, len(A)), A.new_zeros(size)
        for ours, rows in group.items():
            layer = low.get(ours)
            if layer is not None:
                start = starts[id(layer.A)]
                B[rows, start:start + len(layer.A)] = layer.B * (layer.scale / scale)
            if dora:
                m[rows] = (row_norms(module.get_parameter(ours)) if layer is None else
                           row_norms(layer.sum()) if layer.m is None else layer.m)
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        if dora:
            tensors[f"{name}.lora_magnitude_vector"] = m
        ranks[name], alphas[name] = len(A), scale * len(A)
        turned |= any(input_first(function, size) for function, _ in known[theirs].values())
    if left or not layers:
        what = min(left) if layers else "a model without a LoRA"
        raise InputError(f"{folder}: {what} has no place in PEFT's files")
    (rank, _), = Counter(ranks.values()).most_common(1)
    (alpha, _), = Counter(alphas.values()).most_common(1)
    with guard(folder):
        folder.mkdir(parents=True, exist_ok=True)
    tensors = {ROOT + name: tensor for name, tensor in tensors.items()}
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, dict(
        peft_type="LORA", task_type="CAUSAL_LM" if hasattr(module, "generate") else None,
        base_model_name_or_path=getattr(module, "name", None), inference_mode=True,
        target_modules=list(ranks),
        r=rank, rank_pattern={name: value for name, value in ranks.items() if value != rank},
        lora_alpha=alpha, alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        use_dora=dora, bias=bias, modules_to_save=sorted(saved) or None, fan_in_fan_out=turned,
        lora_dropout=next(iter(layers.values())).dropout.p))


def input_first(function: Callable, out: int) -> bool:
    """Whether `function` makes our weights of some that are stored input first, (in,out)."""
    try:
        return function(torch.empty(1, out)).shape[-1] == 1
    except (IndexError, RuntimeError):
        return False
