"""Writes a model back in the public layout that it came in."""
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from formats.files import InputError, guard
from formats.weights import Checkpoint, Family, find_tensors

# Besides the weights: configs, tokenizers, chat templates, licences
SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".md", "")


def export(target: Path, name: str, parts: list[tuple[Family, str, dict[str, torch.Tensor]]]) -> None:
    """Writes the public checkpoint `name` anew to the folder `target`, with the tensors of these parts in the
    place of its own, in its dtypes; all other files are copied.

    parts: (family, a regular expression of how the part's names on disk begin, {our name: tensor}) each.
    Raises InputError where a tensor has no place in that layout, or `target` is there already.
    """
    if target.exists():
        raise InputError(f"{target}: there is something already")
    checkpoint = Checkpoint(name)
    tensors = {theirs: checkpoint.tensor(theirs).clone() for theirs in checkpoint.where}
    for family, prefixes, ours in parts:
        places, _ = find_tensors(ours, family, checkpoint.part(prefixes, {}).where)
        for parameter, (function, disk) in places.items():
            if not all(theirs in tensors for theirs in disk):
                raise InputError(f"{target}: {checkpoint.folder} has no place for {parameter}")
            put(ours[parameter], function, [tensors[theirs] for theirs in disk], f"{target}: {parameter}")

    # The folder is whole or not there
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with guard(target, "can't be written"):
        try:
            temporary.mkdir(parents=True)
            for path in sorted(checkpoint.folder.iterdir()):
                if path.is_file() and path.suffix in SMALL_FILES:
                    shutil.copyfile(path, temporary / path.name)
            for path in set(checkpoint.where.values()):
                of_file = {theirs: x for theirs, x in tensors.items() if checkpoint.where[theirs] == path}
                save_file(of_file, temporary / path.name, {"format": "pt"})
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def put(tensor: torch.Tensor, function, theirs: list[torch.Tensor], name: str) -> None:
    """Changes tensors of a file so that `function` makes `tensor` of them. Most functions return a view of
    what they read, a part of it or its transpose, so that what is written to the view is written there."""
    view = function(*theirs)
    tensor = tensor.detach().cpu().to(view.dtype)
    if not torch.equal(view, tensor):
        view.copy_(tensor)
        if not torch.equal(function(*theirs), tensor):
            raise InputError(f"{name} was trained, and can't be written in that layout")
