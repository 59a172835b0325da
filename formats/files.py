"""Reads and writes JSON and safetensors. Errors name their file; a file is written whole or not at all."""
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Callable, Iterable

import torch
from safetensors import SafetensorError, safe_open

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = ".vlm-tmp"  # ends the name of a file that is being written: no other program's does


class InputError(Exception):
    """The user's input can't be used. The message names the file and the reason in one printable line."""

    def __init__(self, message: str):
        line = " ".join(message.split())
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        super().__init__(line if len(line) < 1000 else f"{line[:500]} … {line[-300:]}")


def warn(text: str) -> None:
    """Prints a warning as one line on stderr."""
    print(f"warning: {InputError(text)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def guard(path: str | Path, problem: str = "can't be read"):
    """Turns any exception inside into an InputError that names `path`: readers of untrusted files can raise
    anything."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        reason = error.strerror or (f"{problem} ({error})" if str(error) else problem)
        raise InputError(f"{path}: {reason}") from None
    except Exception as error:
        name = "" if isinstance(error, SafetensorError) else f"{type(error).__name__}: "
        raise InputError(f"{path}: {problem} ({name}{error})") from None


@contextlib.contextmanager
def only_warn(path: str | Path, problem: str = "can't be drawn"):
    """Turns any exception inside into a warning that names `path`: what can be missed stops nothing."""
    try:
        with guard(path, problem):
            yield
    except InputError as error:
        warn(str(error))


@contextlib.contextmanager
def named(path: str | Path):
    """Puts a file's name before the message of an InputError inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def whole(text: str) -> str:
    """Replaces each half of a surrogate pair, which JSON can spell and UTF-8 can't, with U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def remove_leftovers(folder: Path, all_of_them: bool = False) -> None:
    """Removes the temporary files that processes of this program left in a folder when they were killed; all
    of them where no other process can be writing there."""
    for left in folder.glob(f".*{TEMPORARY}"):
        with contextlib.suppress(OSError):  # another process removes it too or, on Windows, has it open
            if all_of_them or abandoned(left):
                left.unlink()


@contextlib.contextmanager
def temporary_for(path: Path):
    """Makes an empty temporary file beside `path` or, if that is a link, beside the file that it leads to.
    Yields this file's name and the temporary one's, which it removes in the end. Raises InputError where
    `path` can't be written."""
    with guard(path, "can't be written"):
        if path.is_symlink():
            path = path.resolve()
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a file that can be replaced")
        temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}{TEMPORARY}")
        try:
            temporary.write_bytes(b"")
            yield path, temporary
        finally:
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises InputError where `write_file` couldn't write to `path`. Leaves nothing behind."""
    with temporary_for(path):
        pass


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Has `write` fill a temporary file, then moves it to `path`. The file is whole or not there, whenever
    the process or the power ends. A link stays, and leads to the new file. Raises InputError."""
    with temporary_for(path) as (path, temporary):
        remove_leftovers(path.parent)
        with locked(temporary):
            write(temporary)

            # Get it on the disk, rename
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        if os.name == "posix":  # here the folder's entries must be synchronised too
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)


@contextlib.contextmanager
def locked(path: Path):
    """Locks a file as long as this process lives and is inside. On Windows does nothing."""
    if not fcntl:
        yield
        return
    with path.open("rb+") as file:
        with contextlib.suppress(OSError):  # we have locked it already, or this drive has no locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def abandoned(path: Path) -> bool:
    """Whether no process writes a temporary file any more. It isn't locked then; where there are no locks,
    nobody wrote to it for a day."""
    stat = path.stat()
    if time.time() - stat.st_mtime > 86_400:
        return True
    if not fcntl or not stat.st_size:  # an empty one may not be locked yet
        return False
    with path.open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            return False


# ---------------------------------------------------------------------------------------------------------
# Safetensors. The package's own writer makes temporary files of another name, which only their owner may read

KINDS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
         torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
         torch.bool: "BOOL"}  # dtypes, as safetensors calls them


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str],
                      chunks: Iterable[torch.Tensor]) -> None:
    """Writes a file of `tensors`, which may be on the meta device: `chunks` are their values, one after the
    other, and needn't fit in memory together."""
    header = {"__metadata__": metadata} if metadata else {}
    at = 0  # bytes
    for name, tensor in tensors.items():
        end = at + tensor.nbytes
        header[name] = dict(dtype=KINDS[tensor.dtype], shape=list(tensor.shape), data_offsets=(at, end))
        at = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # to a multiple of 8 bytes

    # The header's length, the header, the data
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for chunk in chunks:
            file.write(chunk.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    # The widest numbers first, so that each begins at a multiple of its size
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    tensors = {name: tensors[name] for name in names}
    write_file(path, lambda file: write_safetensors(file, tensors, metadata, tensors.values()))


def kind_of(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def compare(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor], path: Path) -> None:
    """Raises InputError where the tensors found in a file differ from those that should be there, in name,
    shape or dtype. Reads no values."""
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise InputError(f"{path}: tensor '{name}' is missing")
        if name not in wanted:
            raise InputError(f"{path}: tensor '{name}' is left over")
        if kind_of(found[name]) != kind_of(wanted[name]):
            raise InputError(f"{path}: tensor '{name}' is {kind_of(found[name])}, "
                             f"not {kind_of(wanted[name])}")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8. The name of a file may have other bytes: as "\\udce9", which JSON reads back."""
    write_file(path, lambda file: file.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict:
    with guard(path, "not valid JSON"):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def read_tensors(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Reads the tensors whose names begin with `prefix`: {name without it: tensor}. Raises InputError."""
    with guard(path, "not a whole safetensors file"), safe_open(path, framework="pt") as file:
        return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys()
                if name.startswith(prefix)}


def read_metadata(path: Path) -> dict[str, str]:
    """Reads the metadata of a safetensors file. Raises InputError."""
    with guard(path, "not a whole safetensors file"), safe_open(path, framework="pt") as file:
        return file.metadata() or {}
