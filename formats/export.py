"""Writes a model back in the public layout that it came in."""
import os
import shutil
from pathlib import Path

import torch

from formats.files import InputError, guard, write_tensors
from formats.weights import Checkpoint, Family, find_tensors

# Besides the weights: configs, tokenizers, chat templates, licences
SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".md", "")


def export(target: Path, name: str, parts: list[tuple[Family, str, dict[str, torch.Tensor]]]) -> None:
    """Writes the public checkpoint `name` anew to the folder `target`, with the tensors of these parts in the
    place of its own, in its dtypes; all other files are copied.

    parts: (family, a regular expression of how the part's names on disk begin, {our name: tensor}) each.
    Raises InputError where a tensor has no place in that layout, or `target` is there already.
    """
    with guard(target, "can't be written"):
        if target.exists():
            raise InputError(f"{target}: there is something already")
    checkpoint = Checkpoint(name)
    tensors = {theirs: checkpoint.tensor(theirs).clone() for theirs in checkpoint.where}
    for family, prefixes, ours in parts:
        known = checkpoint.part(prefixes, {}).where
        places, left = find_tensors(ours, family._replace(unused=""), known)
        for parameter, (function, disk) in places.items():
            if not all(theirs in tensors for theirs in disk):
                raise InputError(f"{target}: {checkpoint.folder} has no place for {parameter}")
            first = tensors[disk[0]]
            copies = [tensors[theirs] for theirs in left if same(tensors[theirs], first)]  # of a tied pair
            put(ours[parameter], function, [tensors[theirs] for theirs in disk], f"{target}: {parameter}")
            for copy in copies:
                copy.copy_(first)

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
                write_tensors(temporary / path.name, of_file, {"format": "pt"})
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def put(tensor: torch.Tensor, function, theirs: list[torch.Tensor], name: str) -> None:
    """Changes tensors of a file so that `function` makes `tensor` of them. Most functions return a view of
    what they read, a part of it or its transpose, so that what is written to the view is written there.
    Others add something to the last: a class token, its position."""
    view = function(*theirs)
    tensor = tensor.detach().cpu().to(view.dtype)
    if torch.equal(view, tensor):
        return
    view.copy_(tensor)
    last = theirs[-1]
    left = tensor - function(*theirs)
    if left.any() and left.numel() == last.numel():
        last += left.view_as(last)
    if not torch.allclose(function(*theirs), tensor, rtol=2 ** -7, atol=2 ** -7 * tensor.abs().max().item()):
        raise InputError(f"{name} was trained, and can't be written in that layout")
