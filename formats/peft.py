"""LoRA in the files of PEFT, as arrays: adapter_config.json and adapter_model.safetensors.

PEFT names a module as the reference's class does. That class may hold several of our matrices in one: GPT-2's
c_attn is our q, k and v. In an update of such a matrix, each of ours takes its rows of B, and they share A.
The functions in `Family.names` tell which rows: they take the same ones of the matrix itself.
"""
import itertools
import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Callable, NamedTuple

import regex
import torch

from formats.files import InputError, guard, named, read_json, read_tensors, write_json, write_tensors
from formats.weights import Family

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ROOT = "base_model.model."  # before each tensor's name
LETTERS = {  # what follows "lora_" in a tensor's name
    "A.weight": "A", "B.weight": "B", "embedding_A": "A", "embedding_B": "B", "magnitude_vector": "m"}

# Options in adapter_config.json. CHOICES may have only these values: other initialisations change the weight.
# READ are used below. IDLE say only how PEFT chose or runs. Any other option that is set is refused.
CHOICES = {"peft_type": ("LORA",), "bias": ("none", "lora_only"),
           "init_lora_weights": (True, "gaussian", "orthogonal", "eva")}
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout",
        "modules_to_save"}
IDLE = {"task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
        "eva_config", "runtime_config", "megatron_core", "qalora_group_size"}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # dtypes that PEFT writes
TIED = {"embedding.weight", "head.weight"}  # one matrix in a tied model, which only an update tells apart


class Update(NamedTuple):
    """A low-rank update of a layer's weight W₀ (out,in), which becomes W₀ + scale · B A. An embedding counts
    as the linear layer of one-hot vectors: its (out,in) is (D,V)."""
    A: torch.Tensor  # (r,in)
    B: torch.Tensor  # (out,r)
    scale: float
    dropout: float = 0.0
    m: torch.Tensor | None = None  # (out,): DoRA's length of each row, if it is one


class Model(NamedTuple):
    """Describes a model to the functions below."""
    family: Family | None  # None: the files have our own names
    name: str | None  # of its checkpoint
    tensors: dict[str, torch.Tensor]  # its parameters, without updates
    kinds: dict[str, str]  # layer -> its class: "Linear", "Embedding", …
    tied: bool  # embedding and head are one matrix
    writes_text: bool


class Tensors(NamedTuple):
    """A folder of PEFT's, as it is."""
    config: dict
    tensors: dict[str, torch.Tensor]


class Found(NamedTuple):
    """A folder of PEFT's, in our names."""
    updates: dict[str, Update]  # by layer
    trained: dict[str, torch.Tensor]  # parameters that were trained whole
    bases: dict[str, torch.Tensor]  # weights under an update, if the file has them


def in_class(model: Model) -> dict[str, dict[str, tuple]]:
    """Maps names in the reference's class to ours: {theirs: {our parameter: (function, rows)}}.

    The function makes our tensor of theirs, and `rows` are its rows of theirs. Leaves out parameters that
    aren't rows of one tensor. Of a name "a|b" (see Family), a, which only files have, comes first.
    """
    functions = defaultdict(dict)
    for name in model.tensors:
        function, disk = model.family.source(name) if model.family else (lambda tensor: tensor, [name])
        if len(disk) == 1:
            for theirs in disk[0].split("|"):
                functions[theirs][name] = function

    found = defaultdict(dict)
    for theirs, group in functions.items():
        at = torch.arange(sum(len(model.tensors[name]) for name in group))
        for name, function in group.items():
            try:
                rows = function(at)
            except IndexError:  # not a matrix there: SAM's 1 × 1 convolution
                continue
            if rows.shape == (len(model.tensors[name]),) and not rows.is_floating_point():
                found[theirs][name] = function, rows
    return found


# ---------------------------------------------------------------------------------------------------------
# Reading

def read_folder(folder: str | Path) -> Tensors:
    """Reads the options and the tensors of a folder of PEFT's. Raises InputError if an option isn't
    supported."""
    path = Path(folder) / CONFIG
    config = read_json(path)
    with guard(path):
        for key, value in config.items():
            known = value in CHOICES[key] if key in CHOICES else key in READ | IDLE
            if value and not known:
                raise InputError(f"{path}: {key} {value!r} is not supported")
        tensors = read_tensors(path.with_name(WEIGHTS))
        for saved in config.get("modules_to_save") or ():
            if not any(f".{saved}." in name for name in tensors):
                raise InputError(f"{path.with_name(WEIGHTS)}: the tensors of '{saved}', one of "
                                 "modules_to_save, are missing")

        # A name with a block's number is that of one layer, which may have another name in the file
        layers = {name.partition(".lora_")[0] for name in tensors if ".lora_" in name}
        targets = [name for name in config.get("target_modules") or () if re.search(r"\.\d+\.", name)]
        if len(targets) > len(layers):
            raise InputError(f"{path.with_name(WEIGHTS)}: {len(layers)} layers have an update, "
                             f"target_modules names {len(targets)}")
    return Tensors(config, tensors)


def read_updates(model: Model, folder: str | Path, peft: Tensors | None = None) -> Found:
    """Reads the changes that a folder of PEFT's makes to `model`. `peft` is the result of `read_folder`, with
    some of its tensors if the file is a larger model's.

    The tensors' names tell which layers change, however target_modules chose them. Raises InputError if an
    option, a tensor or a shape doesn't fit.
    """
    config, tensors = peft or read_folder(folder)
    with guard(Path(folder) / CONFIG), named(Path(folder) / WEIGHTS):
        return match(model, config, tensors)


def match(model: Model, config: dict, tensors: dict[str, torch.Tensor]) -> Found:
    """See `read_updates`, which names the files."""
    known = in_class(model)
    unused = model.family.unused if model.family else ""
    parts = by_tensor(tensors, next(iter(model.tensors.values())).device)

    # Split each name into a path, which leads to our module in a larger one, and the name in the class. All
    # blocks have the same path. A head or a projection, outside the blocks, may have another
    ends = {name: known_end(name, known) for name in parts if not re.fullmatch(unused, name)}
    paths = {name.removesuffix(end) for name, end in ends.items() if re.search(r"\.\d+\.", end)}
    twice = [end for end, count in Counter(ends.values()).items() if end and count > 1]
    if len(paths) > 1 or twice:
        places = sorted(paths) if len(paths) > 1 else twice
        raise InputError(f"it changes more than one model: {', '.join(places)}")

    found = Found({}, {}, {})
    for name, end in ends.items():
        if not end and any(re.fullmatch(unused, name.removeprefix(path)) for path in paths):
            continue
        part = parts[name]
        group = known.get(end, {})
        letters = part.keys() - {"whole"}
        if not group or not letters and model.tied and not TIED.isdisjoint(group):
            raise InputError(f"'{name}' is not a tensor of this model that can be changed here")
        if "whole" in part:
            tensors = whole_tensors(model, name, part["whole"], group)
            (found.bases if letters else found.trained).update(tensors)
        if letters:
            wanted = {"A", "B", "m"} if config.get("use_dora") else {"A", "B"}
            if letters != wanted:
                raise InputError(f"'{name}' has a low-rank update in parts: {', '.join(sorted(letters))}")
            found.updates.update(updates_of(model, config, name.removesuffix(".weight"), part, group))

    if config.get("bias") == "lora_only":
        for layer in found.updates:
            if f"{layer}.bias" in model.tensors and f"{layer}.bias" not in found.trained:
                raise InputError(f"the trained bias of {layer} is missing")
    if model.tied and TIED <= found.bases.keys() and not torch.equal(*(found.bases[name] for name in TIED)):
        raise InputError("the embedding and the head under the updates differ, but are one in this model")
    return found


def by_tensor(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, dict[str, torch.Tensor]]:
    """Groups the tensors: {name in the class: {"A", "B", "m": of its update, "whole": the tensor itself}}."""
    parts = defaultdict(dict)
    for key, tensor in tensors.items():
        plain = key.removeprefix(ROOT).replace(".base_layer.", ".")
        name, lora, letter = plain.rpartition(".lora_")
        if lora and letter not in LETTERS or tensor.dtype not in FLOATS:
            raise InputError(f"tensor '{key}' is not the low-rank update of a linear layer or an embedding")
        tensor = tensor.to(device, torch.float32)
        if lora:
            parts[f"{name}.weight"][LETTERS[letter]] = tensor
        else:
            parts[plain]["whole"] = tensor
    return parts


def known_end(name: str, known: dict) -> str:
    """Removes the path that leads to our module in a larger one; returns "" if no end of `name` is known."""
    for i in range(name.count(".") + 1):
        end = name.split(".", i)[-1]
        if end in known:
            return end
    return ""


def whole_tensors(model: Model, name: str, value: torch.Tensor, group: dict) -> dict[str, torch.Tensor]:
    """Returns our parameters, a `group` whose rows the class's tensor `value` holds."""
    size = sum(len(rows) for _, rows in group.values())
    found = {}
    for ours, (function, rows) in group.items():
        shape = tuple(model.tensors[ours].shape)
        if value.shape != (size, *shape[1:]) or not torch.equal(function(value), value[rows]):
            raise InputError(f"'{name}' is {tuple(value.shape)}; {ours} wants {shape}")
        found[ours] = value[rows]
    return found


def updates_of(model: Model, config: dict, name: str, part: dict, group: dict) -> dict[str, Update]:
    """Returns the updates of our layers, a `group` whose rows the class's module `name` holds: each takes its
    rows of B."""
    rank = pattern(config, "rank_pattern", "r", name)
    alpha = pattern(config, "alpha_pattern", "lora_alpha", name)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not math.isfinite(scale):
        raise ValueError(f"lora_alpha is {alpha!r}")
    dropout = config.get("lora_dropout") or 0.0
    if not 0 <= dropout <= 1:
        raise ValueError(f"lora_dropout is {dropout!r}")
    found = {}
    for ours, (_, rows) in group.items():
        layer = ours.removesuffix(".weight")
        weight = model.tensors[ours]
        size = sum(len(rows) for _, rows in group.values())
        kind = model.kinds.get(layer, "Parameter")
        if kind == "Embedding":
            inputs, size = weight.shape
            rows = torch.arange(size)
        elif kind == "Linear":
            inputs = weight.shape[1]
        else:
            raise InputError(f"'{name}' can't change {layer}, which is a {kind}")
        shapes = {"A": (rank, inputs), "B": (size, rank), "m": (size,)}
        for letter in sorted(part.keys() - {"whole"}):
            if part[letter].shape != shapes[letter]:
                raise InputError(f"{letter} of '{name}' is {tuple(part[letter].shape)}, not {shapes[letter]}")
        m = part["m"][rows] if "m" in part else None
        found[layer] = Update(part["A"], part["B"][rows], scale, dropout, m)
    return found


def pattern(config: dict, patterns: str, default: str, name: str) -> float:
    """Returns the rank or alpha of a module: the first whose pattern fits its name, else the default."""
    values = config.get(patterns) or {}
    # A regular expression from outside may take for ever or, if it counts with braces, all memory
    if any("{" in key for key in values):
        raise ValueError(f"{patterns} with a brace is not supported")
    for key, value in values.items():
        if regex.match(rf"(.*\.)?({key})$", name, timeout=1):
            return value
    return config[default]


# ---------------------------------------------------------------------------------------------------------
# Writing

def write_updates(model: Model, folder: str | Path, updates: dict[str, Update], trained: set[str],
                  replaced: set[str]) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` opens on the reference's class.

    It holds the updates by layer, the parameters that were `trained` whole, and the weights under an update
    that were `replaced`. Layers that are one matrix in the class, but have an A each here, become one update
    of higher rank. Raises InputError if the class lacks a tensor.
    """
    folder = Path(folder)
    known = in_class(model)
    low_rank = {f"{layer}.weight": update for layer, update in updates.items()}
    dora = any(update.m is not None for update in updates.values())
    # The class's name of each of our parameters: the last one, as names that only files have come before it
    of_class = {}
    for theirs, group in known.items():
        of_class.update(dict.fromkeys(group, theirs))
    left = set(low_rank) | trained
    path = model.family.path if model.family else ""
    outside = re.sub(r"\b(model|transformer|gpt_neox)\..*", "", path)  # path of the module with body and head

    tensors = {}
    ranks = {}
    alphas = {}
    saved = set()
    input_first = False
    bias = "none"
    for theirs in dict.fromkeys(of_class.values()):
        group = {ours: rows for ours, (_, rows) in known[theirs].items()}
        low = {ours: low_rank[ours] for ours in group if ours in low_rank}
        if left.isdisjoint(group) or not low and model.tied and not TIED.isdisjoint(group):
            continue
        left -= group.keys()
        name, leaf = f"{outside if 'head.weight' in group else path}{theirs}".rsplit(".", 1)

        # A tensor of the model itself: put our rows back where they belong
        if not low or any(ours.removesuffix(".weight") in replaced for ours in low):
            value = torch.cat([model.tensors[ours] for ours in group])
            value[torch.cat(list(group.values()))] = value.clone()
            if low:
                tensors[f"{name}.base_layer.{leaf}"] = value
            elif name in ranks:
                tensors[f"{name}.base_layer.{leaf}"] = value
                bias = "lora_only"
            else:
                tensors[f"{name}.{leaf}"] = value
                saved.add(name)

        # Its low-rank update
        if low:
            update, names = joined(model, group, low, dora)
            tensors[f"{name}.lora_{names[0]}"] = update.A
            tensors[f"{name}.lora_{names[1]}"] = update.B
            if dora:
                tensors[f"{name}.lora_magnitude_vector"] = update.m
            ranks[name] = len(update.A)
            alphas[name] = update.scale * len(update.A)
            size = len(update.B)
            input_first |= any(turns(function, size) for function, _ in known[theirs].values())
    if left or not updates:
        what = min(left) if updates else "a model without a LoRA"
        raise InputError(f"{folder}: {what} has no place in PEFT's files")

    # The most common rank and alpha are the defaults
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    base = model.name
    revision = None
    if base and not Path(base).exists() and "@" in base:  # a hub name
        base, revision = base.split("@")
    with guard(folder):
        folder.mkdir(parents=True, exist_ok=True)
    tensors = {ROOT + name: tensor for name, tensor in tensors.items()}
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, dict(
        peft_type="LORA", task_type="CAUSAL_LM" if model.writes_text else None,
        base_model_name_or_path=base, revision=revision, inference_mode=True, target_modules=list(ranks),
        r=rank, rank_pattern={name: value for name, value in ranks.items() if value != rank},
        lora_alpha=alpha, alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        use_dora=dora, bias=bias, modules_to_save=sorted(saved) or None, fan_in_fan_out=input_first,
        lora_dropout=next(iter(updates.values())).dropout))


def joined(model: Model, group: dict[str, torch.Tensor], low: dict[str, Update],
           dora: bool) -> tuple[Update, tuple[str, str]]:
    """Joins our updates to one of a matrix in the class, whose rows the `group` of our parameters has. Each
    different A gets its own columns of B. Returns the update, and the files' names of A and B."""
    As = {id(update.A): update.A for update in low.values()}
    starts = dict(zip(As, itertools.accumulate(map(len, As.values()), initial=0)))
    A = torch.cat(list(As.values()))
    scale = next(iter(low.values())).scale
    names = "A.weight", "B.weight"
    for ours, update in low.items():
        if is_embedding(model, ours):
            names = "embedding_A", "embedding_B"
            group[ours] = torch.arange(len(update.B))

    size = sum(map(len, group.values()))
    B = A.new_zeros(size, len(A))
    m = A.new_zeros(size)
    for ours, rows in group.items():
        update = low.get(ours)
        if update:
            start = starts[id(update.A)]
            B[rows, start:start + len(update.A)] = update.B * (update.scale / scale)
        if dora:
            m[rows] = lengths(model, ours, update)
    return Update(A, B, scale, m=m), names


def is_embedding(model: Model, parameter: str) -> bool:
    return model.kinds.get(parameter.removesuffix(".weight"), "").endswith("Embedding")


def lengths(model: Model, parameter: str, update: Update | None) -> torch.Tensor:
    """Returns DoRA's m (out,) of a weight: the update's own, else the lengths of its rows."""
    if update and update.m is not None:
        return update.m
    weight = model.tensors[parameter].float()
    if is_embedding(model, parameter):
        weight = weight.T
    if update:
        weight = weight + update.scale * (update.B @ update.A)
    return torch.linalg.vector_norm(weight, dim=1)


def turns(function: Callable, out: int) -> bool:
    """Whether `function` turns weights that are stored (in,out)."""
    try:
        return function(torch.empty(1, out)).shape[-1] == 1
    except (IndexError, RuntimeError):
        return False
