"""Weights of a checkpoint: which tensor on disk is which parameter of ours, and how it is read."""
import copy
import re
from pathlib import Path
from typing import Callable, Collection, Iterable, NamedTuple

import torch
from safetensors import safe_open

from formats.files import InputError, guard, read_json
from formats.hub import find_checkpoint, find_file, shards


class Checkpoint:
    """A checkpoint's folder: `config` (config.json), and tensors read by name from the mapped files."""

    def __init__(self, name: str):
        self.name, self.folder = name, find_checkpoint(name)
        self.config = read_json(self.folder / "config.json")
        self.where: dict[str, Path] = {}  # tensor name -> its file
        self.mapped = [None, None, 0]  # the file being read, its open handle, the bytes read through it
        for path in shards(self.folder):
            if not path.is_file():
                raise InputError(f"{path}: no such file")
            with guard(path, "not a whole safetensors file"), safe_open(path, framework="pt") as file:
                self.where.update((name, path) for name in file.keys())

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it lies in the file, which is mapped anew every 128 MiB: where converted copies replace
        the tensors, the pages read so far are let go, so that the weights are never held twice."""
        path = self.where[name]
        if path != self.mapped[0] or self.mapped[2] > 1 << 27:
            self.mapped = [path, safe_open(path, framework="pt"), 0]
        tensor = self.mapped[1].get_tensor(name)
        self.mapped[2] += tensor.nbytes
        return tensor

    def part(self, prefixes: str, config: dict) -> "Checkpoint":
        """A part of a model of several: its own config, and the tensors whose names `prefixes`, a regular
        expression, begins."""
        part = copy.copy(self)
        part.config = config
        part.where = {name: path for name, path in self.where.items() if re.match(prefixes, name)}
        return part

    def json(self, file: str) -> dict:
        """A JSON file of the folder; empty where there is none."""
        path = find_file(self.folder, file)
        return read_json(path) if path else {}

    def row(self, families: dict) -> tuple:
        """The row of `families` that config.json's `model_type` names, and what it makes of config.json."""
        path, kind = self.folder / "config.json", self.config.get("model_type")
        with guard(path, f"can't be read as a {kind} config"):
            if kind not in families:
                raise InputError(f"{path}: model_type {kind!r} is not one of {', '.join(families)}")
            return families[kind], families[kind].config(self.config)

    def family(self, families: "dict[str, Family]", config_class: type) -> "tuple[Family, object]":
        """The family that config.json's `model_type` names, its names a table, and its config, a dataclass of
        ours. Raises InputError where a field has a value of another type."""
        family, fields = self.row(families)
        path, kind = self.folder / "config.json", self.config["model_type"]
        with guard(path, f"can't be read as a {kind} config"):
            config = config_class(**fields)
            for name, type_ in config_class.__annotations__.items():
                setattr(config, name, checked(name, type_, getattr(config, name)))
            names = family.names if isinstance(family.names, dict) else family.names(fields)
            return family._replace(names=names), config


def checked(name: str, type_: type, value):
    """A field's value, if it is of its type and not negative. Raises ValueError. None is a false bool."""
    if type_ is bool and value in (True, False, None):
        return bool(value)
    if type_ in (bool, int, float, str):
        right = isinstance(value, (int, float) if type_ is float else type_)
        if not right or type_ is not str and value < 0:
            raise ValueError(f"{name} is {value!r}")
    return value


def depth(layers: int) -> int:
    """The number of a model's blocks, as config.json says. ValueError above 1000: a model is built before its
    sizes are compared with the file's, which costs time and memory for each block, though none for width."""
    if not 0 < layers <= 1000:
        raise ValueError(f"{layers} layers")
    return layers


class Family(NamedTuple):
    """One family of checkpoints. `config` turns config.json into the fields of our config. `names` leads from
    our modules and parameters to those on disk, "{}" standing for the block's number; a value is the name on
    disk ("a|b" where some files have a, others b; b is the name in the reference's class, where that differs)
    or (function, name, …), the function making our tensor of theirs; where the table itself depends on the
    config, a function of these fields makes it. `unused` is a regular expression of the tensors on disk that
    we leave unread, without the prefix that all names share; `path` is that prefix in the reference's class,
    as AutoModelForCausalLM or AutoModel choose it."""
    config: Callable[[dict], dict]
    names: dict | Callable[[dict], dict]
    unused: str
    path: str = ""

    def source(self, name: str) -> tuple:
        """(function, names on disk) of our parameter `name`."""
        number = re.search(r"\.(\d+)\.", name)
        name = name.replace(number[0], ".{}.", 1) if number else name
        module, _, leaf = name.rpartition(".")
        entry, leaf = (self.names[name], "") if name in self.names else (self.names[module], "." + leaf)
        function, *disk = (lambda t: t, entry) if isinstance(entry, str) else entry
        block = number[1] if number else ""
        return function, [d.replace("{}", block).replace("|", leaf + "|") + leaf for d in disk]


def find_tensors(parameters: Iterable[str], family: Family,
                 known: Collection[str]) -> tuple[dict, list[str]]:
    """Where `parameters` of ours lie among the names `known` on disk: {parameter: (function, names on disk)},
    see `Family.source`; one that isn't there gets the name that it should have. And the names that are left
    over: no parameter claims them, and the family doesn't leave them unread."""
    sources = {parameter: family.source(parameter) for parameter in parameters}
    names = [name for _, disk in sources.values() for one in disk for name in one.split("|")]

    # All names begin with the same prefix, such as "model.": the one under which most of them are known. The
    # names outside the blocks tell which there are.
    outside = [name for name in names if not re.search(r"\.\d+\.", name)]
    prefixes = {it[:-len(name)] for name in outside for it in known if f".{it}".endswith(f".{name}")}
    def found(prefix: str) -> tuple[int, int]:
        return sum(prefix + name in known for name in names), len(prefix)

    prefix = max(sorted(prefixes), key=found, default="")
    # A language model's head lies further out.
    shorter = [prefix[:end.end()] for end in re.finditer(r"\.|^", prefix)][::-1]

    def place(alternatives: str) -> str:
        tried = [p + name for name in alternatives.split("|") for p in shorter]
        return next((name for name in tried if name in known), tried[0])

    places = {parameter: (function, [place(alternatives) for alternatives in disk])
              for parameter, (function, disk) in sources.items()}
    claimed = {name for _, disk in places.values() for name in disk}
    left = [name for name in sorted({*known} - claimed) if not any(
        re.fullmatch(family.unused, unread) for unread in (name, name.removeprefix(prefix)))]
    return places, left


def load_weights(module: torch.nn.Module, checkpoint: Checkpoint, family: Family, dtype: torch.dtype) -> None:
    """Gives every parameter of `module` (built on the meta device) its tensor from the file, cast to `dtype`.
    Strict: a tensor missing, of another shape, or left over is an InputError that names it and the file."""
    parameters, state = dict(module.named_parameters()), {}
    places, left = find_tensors(parameters, family, checkpoint.where)
    for name, (function, disk) in places.items():
        shape, tensors = tuple(parameters[name].shape), []
        for theirs in disk:
            if theirs not in checkpoint.where:
                files = set(checkpoint.where.values())
                where = files.pop() if len(files) == 1 else checkpoint.folder
                raise InputError(f"{where}: tensor '{theirs}' is missing (for {name}, {shape})")
            with guard(checkpoint.where[theirs], f"tensor '{theirs}' can't be read"):
                tensors.append(checkpoint.tensor(theirs))
        try:
            tensor = function(*tensors)
        except (RuntimeError, IndexError, TypeError):  # cut to no avail: the shapes below tell the story
            tensor = tensors[0]
        if tensor.shape != shape or not tensor.is_floating_point():
            found = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)
            made = f" of {tuple(tensor.shape)}" if tensor.shape != tensors[0].shape else ""
            raise InputError(f"{checkpoint.where[disk[-1]]}: tensor '{disk[0]}' is {found}; "
                             f"{name} wants {shape}{made}")
        state[name] = tensor.to(dtype).contiguous()
    if left:
        kind = checkpoint.config.get("model_type")
        raise InputError(f"{checkpoint.where[left[0]]}: tensor '{left[0]}' is not part of a {kind} model")
    module.load_state_dict(state, strict=False, assign=True)  # a tied head is filled by who ties it


def name_table(outside: dict, blocks: dict, block: str) -> dict:
    """A table of names (see `Family`): those `outside` the blocks, and for every block those of `blocks`,
    ours behind "blocks.{}.", the first or only one on disk behind `block`, such as "layers.{}."."""
    return outside | {
        f"blocks.{{}}.{ours}": block + disk if isinstance(disk, str) else (disk[0], block + disk[1])
        for ours, disk in blocks.items()}
