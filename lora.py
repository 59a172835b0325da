"""Low-rank updates of any nn.Linear or nn.Embedding, and the files that PEFT keeps them in.

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
        self.weight, self.bias, self.scale = linear.weight, getattr(linear, "bias", None), scale
        self.A, self.B, self.m = A, nn.Parameter(B), None if m is None else nn.Parameter(m)
        self.dropout = nn.Dropout(dropout)
        self.replaced = False  # whether W₀ came with the LoRA, so that it has to be saved with it
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


def put(module: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Puts layers in their places, and leaves gradients to A, B and m alone."""
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
# what follows "lora_" in a tensor's name
KINDS = {"A.weight": "A", "B.weight": "B", "embedding_A": "A", "embedding_B": "B", "magnitude_vector": "m"}
# adapter_config.json: what may have these values alone (other ways to begin change W₀); what is read below;
# what says only how PEFT chose or runs. Anything else that is set is refused.
CHOICES = {"peft_type": ("LORA",), "bias": ("none", "lora_only"),
           "init_lora_weights": (True, "gaussian", "orthogonal", "eva")}
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout",
        "modules_to_save"}
IDLE = {"task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
        "eva_config", "runtime_config", "megatron_core", "qalora_group_size"}
TIED = {"embedding.weight", "head.weight"}  # one matrix in a tied model, which only a LoRA tells apart


def is_tied(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "tied", False)


def in_class(module: nn.Module) -> dict[str, dict[str, tuple]]:
    """{name in the reference's class: {our parameter: (function, rows)}}: what makes our tensor of theirs,
    and which of its rows ours are. What isn't some rows of one tensor is left out. A name that only files
    have stands before the class's. A module that isn't of a family keeps its own names."""
    family, functions, found = getattr(module, "family", None), defaultdict(dict), defaultdict(dict)
    low_rank = {f"{name}.{leaf}" for name in lora_layers(module) for leaf in "ABm"}
    sizes = {name: len(p) for name, p in module.named_parameters() if name not in low_rank}
    if is_tied(module):
        sizes["head.weight"] = sizes["embedding.weight"]
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


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """Our layers by name. The head of a tied LLM is a layer too, which shares the embedding's weight."""
    layers = dict(module.named_modules())
    if is_tied(module) and "head" not in layers:
        weight = module.embedding.weight  # (V,D)
        layers["head"] = nn.Linear(*weight.T.shape, bias=False, device="meta").train(module.training)
        layers["head"].weight = weight
    return layers


def read_peft(folder: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The options and the tensors in a folder of PEFT's, that is adapter_config.json and
    adapter_model.safetensors. Raises InputError where an option is one that isn't supported."""
    path = Path(folder) / CONFIG
    config = read_json(path)
    with guard(path):
        for key, value in config.items():
            if value and not (value in CHOICES[key] if key in CHOICES else key in READ | IDLE):
                raise InputError(f"{path}: {key} {value!r} is not supported")
        tensors = read_tensors(path.with_name(WEIGHTS))
        for saved in config.get("modules_to_save") or ():
            if not any(f".{saved}." in name for name in tensors):
                raise InputError(f"{path.with_name(WEIGHTS)}: the tensors of '{saved}', one of "
                                 "modules_to_save, are missing")
    return config, tensors


def load_lora(module: nn.Module, folder: str | Path, peft: tuple[dict, dict] | None = None) -> None:
    """Freezes `module` (a ViT, an LLM, an adapter) and gives it the LoRA in a folder of PEFT's. What was
    trained besides (modules_to_save, biases) replaces ours and gets gradients. `peft`: what `read_peft` read
    there, or some of its tensors, where the file is of a larger model.

    Which layers change is read off the tensors' names, so that it doesn't matter how target_modules chose
    them. Raises InputError, before anything changes, where an option, a tensor or a shape has no place here.
    """
    layers, trained, bases = read_lora(module, folder, peft)
    if not layers:
        raise InputError(f"{Path(folder) / WEIGHTS}: no low-rank update in it is of this "
                         f"{type(module).__name__}")
    put(module, layers)
    for name, tensor in bases.items():
        layer = module.get_submodule(name.removesuffix(".weight"))
        layer.replaced = not torch.equal(layer.weight, tensor.to(layer.weight))
    replace(module, bases)
    replace(module, trained)
    for name in trained:
        module.get_parameter(name).requires_grad_()


def fold_lora(module: nn.Module, folder: str | Path, peft: tuple[dict, dict] | None = None) -> None:
    """As `load_lora`, but the weights take the LoRA in: no layer is added, and none is frozen."""
    layers, trained, bases = read_lora(module, folder, peft)
    replace(module, bases)
    replace(module, trained)
    replace(module, {f"{name}.weight": layer.merged().weight for name, layer in layers.items()})


def replace(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Gives parameters of these names other values, in the dtype that they have."""
    for name, tensor in tensors.items():
        p = module.get_parameter(name)
        p.data = tensor.detach().to(p)


def read_lora(module: nn.Module, folder: str | Path, peft: tuple[dict, dict] | None) -> tuple:
    """PEFT's tensors as three tables: {our layer: LoRALinear}; {our parameter: tensor} of what was trained
    whole; the same of the weights under an update, where the file has them. Raises InputError."""
    config, tensors = peft or read_peft(folder)
    with guard(Path(folder) / CONFIG), named(Path(folder) / WEIGHTS):
        return match_lora(module, config, tensors)


def match_lora(module: nn.Module, config: dict, tensors: dict[str, torch.Tensor]) -> tuple:
    """See `read_lora`, which names the files."""
    known, modules, family = in_class(module), layers_of(module), getattr(module, "family", None)
    unused, device = family.unused if family else "", next(module.parameters()).device
    parts = defaultdict(dict)  # name in the class -> {"A": …, "B": …}, {None: …} of a whole tensor, or both
    for key, tensor in tensors.items():
        name, lora, kind = key.removeprefix(ROOT).replace(".base_layer.", ".").rpartition(".lora_")
        if lora and kind not in KINDS or not tensor.is_floating_point():
            raise InputError(f"tensor '{key}' is not the low-rank update of a linear layer or an embedding")
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

    # The blocks lie in one place. What is outside them may lie elsewhere: a head, a projection
    ends = {name: end_of(name) for name in parts if not re.fullmatch(unused, name)}
    paths = {name.removesuffix(end) for name, end in ends.items() if re.search(r"\.\d+\.", end)}
    twice = [end for end, count in Counter(ends.values()).items() if end and count > 1]
    if len(paths) > 1 or twice:
        places = sorted(paths) if len(paths) > 1 else twice
        raise InputError(f"it changes more than one model: {', '.join(places)}")
    layers, trained, bases = {}, {}, {}
    for name, end in ends.items():
        if not end and any(re.fullmatch(unused, name.removeprefix(path)) for path in paths):
            continue
        part, group = parts[name], known.get(end, {})
        low_rank = part.keys() - {None}
        if not group or not low_rank and is_tied(module) and not TIED.isdisjoint(group):
            raise InputError(f"'{name}' is not a tensor of this model that can be changed here")
        size = sum(len(rows) for _, rows in group.values())

        # The tensor itself: trained whole or, under an update, perhaps not what ours is
        for ours, (function, rows) in group.items() if None in part else ():
            owner, _, leaf = ours.rpartition(".")
            value, shape = part[None], getattr(modules[owner], leaf).shape
            if value.shape != (size, *shape[1:]) or not torch.equal(function(value), value[rows]):
                raise InputError(f"'{name}' is {tuple(value.shape)}; {ours} wants {tuple(shape)}")
            (bases if low_rank else trained)[ours] = value[rows]
        if not low_rank:
            continue
        if low_rank != {"A", "B", *("m" if config.get("use_dora") else "")}:
            raise InputError(f"'{name}' has a low-rank update in parts: {', '.join(sorted(low_rank))}")

        # Its update: each of our layers takes its rows of B
        theirs = name.removesuffix(".weight")
        rank, alpha = pattern("rank_pattern", "r", theirs), pattern("alpha_pattern", "lora_alpha", theirs)
        scale, A = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), nn.Parameter(part["A"])
        for ours, (_, rows) in group.items():
            ours = ours.removesuffix(".weight")
            layer = modules.get(ours, nn.Parameter())  # which positions may be
            if isinstance(layer, nn.Embedding):
                kind, (inputs, size) = LoRAEmbedding, layer.weight.shape
                rows = torch.arange(size)
            elif isinstance(layer, nn.Linear):
                kind, inputs = LoRALinear, layer.in_features
            else:
                raise InputError(f"'{theirs}' can't change {ours}, which is a {type(layer).__name__}")
            shapes = {"A": (rank, inputs), "B": (size, rank), "m": (size,)}
            for letter in sorted(low_rank):
                if part[letter].shape != shapes[letter]:
                    raise InputError(f"{letter} of '{theirs}' is {tuple(part[letter].shape)}, "
                                     f"not {shapes[letter]}")
            layers[ours] = kind(layer, A, part["B"][rows], scale, config.get("lora_dropout") or 0.0,
                                part["m"][rows] if "m" in part else None)
    for ours, layer in layers.items() if config.get("bias") == "lora_only" else ():
        if layer.bias is not None and f"{ours}.bias" not in trained:
            raise InputError(f"the trained bias of {ours} is missing")
    if is_tied(module) and not layers.keys().isdisjoint({"embedding", "head"}):
        layers.setdefault("head", modules["head"])  # so that only one of the two changes
        if TIED <= bases.keys() and not torch.equal(*(bases[name] for name in TIED)):
            raise InputError("the embedding and the head under the updates differ, but are one in this model")
    return layers, trained, bases


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
    path = family.path if family else ""
    outside = re.sub(r"\b(model|transformer|gpt_neox)\..*", "", path)  # what has the body and the head
    tensors, ranks, alphas, saved, turned, bias = {}, {}, {}, set(), False, "none"
    for theirs in dict.fromkeys(own.values()):
        group = {ours: rows for ours, (_, rows) in known[theirs].items()}
        low = {ours: layers[ours] for ours in group if ours in layers}
        if left.isdisjoint(group) or not low and is_tied(module) and not TIED.isdisjoint(group):
            continue
        left -= group.keys()
        name, leaf = f"{outside if 'head.weight' in group else path}{theirs}".rsplit(".", 1)

        # A tensor of the model itself: of ours back to where their rows belong
        if not low or any(layer.replaced for layer in low.values()):
            value = torch.cat([module.get_parameter(ours) for ours in group])
            value[torch.cat(list(group.values()))] = value.clone()
            if low:
                tensors[f"{name}.base_layer.{leaf}"] = value
            elif name in ranks:
                tensors[f"{name}.base_layer.{leaf}"], bias = value, "lora_only"
            else:
                tensors[f"{name}.{leaf}"] = value
                saved.add(name)
        if not low:
            continue

        # A low-rank update
        As = {id(layer.A): layer.A for layer in low.values()}
        starts = dict(zip(As, itertools.accumulate(map(len, As.values()), initial=0)))
        A, scale = torch.cat(list(As.values())), next(iter(low.values())).scale
        lora_A, lora_B = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        for ours, layer in low.items():
            if isinstance(layer, LoRAEmbedding):
                lora_A, lora_B = f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
                group[ours] = torch.arange(len(layer.B))
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
        tensors |= {lora_A: A, lora_B: B}
        if dora:
            tensors[f"{name}.lora_magnitude_vector"] = m
        ranks[name], alphas[name] = len(A), scale * len(A)
        turned |= any(input_first(function, size) for function, _ in known[theirs].values())
    if left or not layers:
        what = min(left) if layers else "a model without a LoRA"
        raise InputError(f"{folder}: {what} has no place in PEFT's files")
    (rank, _), = Counter(ranks.values()).most_common(1)
    (alpha, _), = Counter(alphas.values()).most_common(1)
    base, revision = getattr(module, "name", None), None
    if base and not Path(base).exists() and "@" in base:  # a hub name
        base, revision = base.split("@")
    with guard(folder):
        folder.mkdir(parents=True, exist_ok=True)
    tensors = {ROOT + name: tensor for name, tensor in tensors.items()}
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, dict(
        peft_type="LORA", task_type="CAUSAL_LM" if hasattr(module, "generate") else None,
        base_model_name_or_path=base, revision=revision, inference_mode=True,
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
