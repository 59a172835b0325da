"""Checkpoints: which tensor on disk is which parameter of ours, and how it is read."""
import contextlib
import copy
import gc
import re
from pathlib import Path
from typing import Callable, Collection, Iterable, NamedTuple

import torch
from safetensors import safe_open

from formats.files import InputError, guard, kind_of, read_json
from formats.hub import find_checkpoint, find_file, shards


@contextlib.contextmanager
def collection_paused():
    """Pauses Python's garbage collector, which looks through all that torch imported and finds nothing: half
    of the time that loading a small model takes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Checkpoint:
    """A checkpoint: `folder`, `config` (config.json), and tensors, read by name from mapped safetensors
    files. Raises InputError."""

    def __init__(self, name: str):
        self.name = name
        self.folder = find_checkpoint(name)
        self.config = read_json(self.folder / "config.json")
        self.where: dict[str, Path] = {}  # tensor name -> its file
        self.mapped_path = None  # the file being read
        self.mapped_file = None  # its open handle
        self.mapped_bytes = 0  # how many were read through the handle

        # List the tensors of each file
        for path in shards(self.folder):
            if not path.is_file():
                raise InputError(f"{path}: no such file")
            with guard(path, "not a whole safetensors file"), safe_open(path, framework="pt") as file:
                self.where.update((name, path) for name in file.keys())

    def tensor(self, name: str) -> torch.Tensor:
        """Reads a tensor as it lies in the file.

        Maps the file anew every 128 MiB. This frees the pages read so far if converted copies replace their
        tensors: the weights are never held twice.
        """
        path = self.where[name]
        if path != self.mapped_path or self.mapped_bytes > 1 << 27:
            self.mapped_path = path
            self.mapped_file = safe_open(path, framework="pt")
            self.mapped_bytes = 0
        tensor = self.mapped_file.get_tensor(name)
        self.mapped_bytes += tensor.nbytes
        return tensor

    def part(self, prefixes: str, config: dict) -> "Checkpoint":
        """Returns the checkpoint of one part of a model: its own config, and the tensors whose names begin
        with the regular expression `prefixes`."""
        part = copy.copy(self)
        part.config = config
        part.where = {name: path for name, path in self.where.items() if re.match(prefixes, name)}
        return part

    def json(self, file: str) -> dict:
        """Reads a JSON file of the folder; {} if there is none."""
        path = find_file(self.folder, file)
        return read_json(path) if path else {}

    def row(self, families: dict) -> tuple:
        """Returns the row of `families` that config.json's `model_type` names, and config.json as it reads
        it. Raises InputError."""
        path = self.folder / "config.json"
        kind = self.config.get("model_type")
        with guard(path, f"can't be read as a {kind} config"):
            if kind not in families:
                raise InputError(f"{path}: model_type {kind!r} is not one of {', '.join(families)}")
            return families[kind], families[kind].config(self.config)

    def family(self, families: "dict[str, Family]", config_class: type) -> "tuple[Family, object]":
        """Returns the family that config.json's `model_type` names, with its table of names, and the config
        as our dataclass `config_class`. Raises InputError if a value has another type than its field."""
        family, fields = self.row(families)
        path = self.folder / "config.json"
        kind = self.config["model_type"]
        with guard(path, f"can't be read as a {kind} config"):
            config = config_class(**fields)
            # Check each field's type
            for name, type_ in config_class.__annotations__.items():
                setattr(config, name, checked(name, type_, getattr(config, name)))
            names = family.names if isinstance(family.names, dict) else family.names(fields)
            return family._replace(names=names), config


def checked(name: str, type_: type, value):
    """Returns a field's value; False for a bool that is None. Raises ValueError if it is of another type, or
    negative."""
    if type_ is bool and value in (True, False, None):
        return bool(value)
    if type_ in (bool, int, float, str):
        right = isinstance(value, (int, float) if type_ is float else type_)
        if not right or type_ is not str and value < 0:
            raise ValueError(f"{name} is {value!r}")
    return value


def depth(layers: int) -> int:
    """Returns config.json's number of blocks. Raises ValueError above 1000: a model is built before its
    shapes are compared with the file's, and each block costs time and memory, while its width costs none."""
    if not 0 < layers <= 1000:
        raise ValueError(f"{layers} layers")
    return layers


class Family(NamedTuple):
    """One family of checkpoints.

    `config` turns config.json into the fields of our config. `names` maps our modules and parameters to names
    on disk, where "{}" stands for the block's number. A value is one of:

    - the name on disk;
    - "a|b": some files have a, others b. b is the name in the reference's class, if that differs;
    - (function, name, …): the function makes our tensor of theirs.

    If the table depends on the config, `names` is a function of its fields. `unused` is a regular expression
    of the tensors on disk that we leave unread, without the prefix that all names share. `path` is that
    prefix in the reference's class, as AutoModelForCausalLM or AutoModel choose it.
    """
    config: Callable[[dict], dict]
    names: dict | Callable[[dict], dict]
    unused: str
    path: str = ""

    def source(self, name: str) -> tuple:
        """Returns (function, names on disk) of our parameter `name`."""
        number = re.search(r"\.(\d+)\.", name)
        block = number[1] if number else ""
        if number:
            name = name.replace(number[0], ".{}.", 1)

        # The table names the parameter, or the module that it is a "weight" or a "bias" of
        if name in self.names:
            entry = self.names[name]
            leaf = ""
        else:
            module, _, leaf = name.rpartition(".")
            entry = self.names[module]
            leaf = "." + leaf

        if isinstance(entry, str):
            entry = (lambda tensor: tensor, entry)
        function, *names = entry
        disk = []
        for name in names:
            alternatives = [one + leaf for one in name.replace("{}", block).split("|")]
            disk.append("|".join(alternatives))
        return function, disk


def find_tensors(parameters: Iterable[str], family: Family,
                 known: Collection[str]) -> tuple[dict, list[str]]:
    """Finds our `parameters` among the names `known` on disk.

    Returns {parameter: (function, names on disk)}, see `Family.source`; a parameter that isn't there gets the
    name that it should have. Returns also the names left over: no parameter claims them, and the family
    doesn't list them as unused.
    """
    # All names that may be on disk
    sources = {parameter: family.source(parameter) for parameter in parameters}
    names = []
    for _, disk in sources.values():
        for alternatives in disk:
            names += alternatives.split("|")
    prefix = find_prefix(names, known)
    # A language model's head lies further out: its name has a shorter prefix
    shorter = [prefix[:end.end()] for end in re.finditer(r"\.|^", prefix)][::-1]

    def place(alternatives: str) -> str:
        """The first of the possible names that is known."""
        tried = []
        for name in alternatives.split("|"):
            tried += [start + name for start in shorter]
        return next((name for name in tried if name in known), tried[0])

    # Where each parameter lies
    places = {}
    claimed = set()
    for parameter, (function, disk) in sources.items():
        found = [place(alternatives) for alternatives in disk]
        places[parameter] = (function, found)
        claimed.update(found)

    # The names left over
    left = []
    for name in sorted(set(known) - claimed):
        short = name.removeprefix(prefix)
        if not re.fullmatch(family.unused, name) and not re.fullmatch(family.unused, short):
            left.append(name)
    return places, left


def find_prefix(names: list[str], known: Collection[str]) -> str:
    """Finds the prefix, such as "model.", with which most of the `names` are known on disk."""
    # Candidates: what stands on disk before the names outside the blocks
    prefixes = set()
    for name in names:
        if re.search(r"\.\d+\.", name):
            continue
        for there in known:
            if f".{there}".endswith(f".{name}"):
                prefixes.add(there[:-len(name)])

    def count_found(prefix: str) -> tuple[int, int]:
        return sum(prefix + name in known for name in names), len(prefix)

    return max(sorted(prefixes), key=count_found, default="")


def load_weights(module: torch.nn.Module, checkpoint: Checkpoint, family: Family, dtype: torch.dtype) -> None:
    """Gives every parameter of `module` (built on the meta device) its tensor from the file, cast to `dtype`.

    Strict: a tensor missing, of another shape, or left over is an InputError that names it and the file.
    """
    parameters = dict(module.named_parameters())
    places, left = find_tensors(parameters, family, checkpoint.where)

    # Read each tensor and check its shape
    state = {}
    for name, (function, disk) in places.items():
        shape = tuple(parameters[name].shape)
        tensors = [read_tensor(checkpoint, theirs, name, shape) for theirs in disk]
        try:
            tensor = function(*tensors)
        except (RuntimeError, IndexError, TypeError):  # it doesn't fit the function: then report its shape
            tensor = tensors[0]
        if tensor.shape != shape or not tensor.is_floating_point():
            found = ", ".join(map(kind_of, tensors))
            made = f" of {tuple(tensor.shape)}" if tensor.shape != tensors[0].shape else ""
            raise InputError(f"{checkpoint.where[disk[-1]]}: tensor '{disk[0]}' is {found}; "
                             f"{name} wants {shape}{made}")
        state[name] = tensor.to(dtype).contiguous()

    # Nothing may be left over
    if left:
        kind = checkpoint.config.get("model_type")
        raise InputError(f"{checkpoint.where[left[0]]}: tensor '{left[0]}' is not part of a {kind} model")
    module.load_state_dict(state, strict=False, assign=True)  # a tied head is filled by the caller


def read_tensor(checkpoint: Checkpoint, theirs: str, ours: str, shape: tuple) -> torch.Tensor:
    """Reads the tensor `theirs` for our parameter. Raises InputError that names the file."""
    if theirs not in checkpoint.where:
        files = set(checkpoint.where.values())
        where = files.pop() if len(files) == 1 else checkpoint.folder
        raise InputError(f"{where}: tensor '{theirs}' is missing (for {ours}, {shape})")
    with guard(checkpoint.where[theirs], f"tensor '{theirs}' can't be read"):
        return checkpoint.tensor(theirs)


def projection_names(path: str, out: str) -> dict:
    """Names an attention's q, k, v and out where they lie beside each other at `path`."""
    names = {f"attention.{name}": f"{path}.{name}_proj" for name in ("q", "k", "v")}
    return names | {"attention.out": f"{path}.{out}"}


def fused_names(take: Callable[[int], Callable], disk: str,
                names=("attention.q", "attention.k", "attention.v")) -> dict:
    """Names what a file keeps in the one tensor `disk`: take(i) makes the i-th of the `names` of it."""
    return {name: (take(i), disk) for i, name in enumerate(names)}


def name_table(outside: dict, blocks: dict, block: str) -> dict:
    """Makes a table of names (see `Family`): those `outside` the blocks, and those of every block.

    Puts "blocks.{}." before our names, and `block`, such as "layers.{}.", before theirs; of "a|b" before a.
    """
    table = dict(outside)
    for ours, theirs in blocks.items():
        if isinstance(theirs, str):
            table[f"blocks.{{}}.{ours}"] = block + theirs
        else:
            function, name = theirs
            table[f"blocks.{{}}.{ours}"] = (function, block + name)
    return table
