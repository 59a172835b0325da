"""Reads and writes JSON and safetensors. Errors name their file; a file is written whole or not at all."""
import contextlib
import glob
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Callable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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
def named(path: str | Path):
    """Puts a file's name before the message of an InputError inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def whole(text: str) -> str:
    """Replaces each half of a surrogate pair, which JSON can spell and UTF-8 can't, with U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Has `write` fill a temporary file, then moves it to `path`. The file is whole or not there, whenever
    the process or the power ends. Raises InputError."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    with guard(path, "can't be written"):
        # Remove what killed processes left
        for left in path.parent.glob(f".*{glob.escape(path.suffix)}.{'[0-9a-f]' * 8}.tmp"):
            with contextlib.suppress(OSError):  # another process removes it too or, on Windows, has it open
                if abandoned(left):
                    left.unlink()

        # Write, get it on the disk, rename
        try:
            temporary.write_bytes(b"")
            with locked(temporary):
                write(temporary)
                with locked(temporary):  # again: safetensors puts a file of its own there
                    with temporary.open("rb+") as file:
                        os.fsync(file.fileno())
                    os.replace(temporary, path)
            if os.name == "posix":  # here the folder's entries must be synchronised too
                folder = os.open(path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)


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


def write_rows(path: Path, shape: tuple, dtype: torch.dtype, chunks, marks: Callable[[], list[bool]]) -> None:
    """Writes a safetensors file of two tensors: "rows" of this shape, and "marks", a bool for each row.

    Writes the rows chunk by chunk as they come: they needn't fit in memory. Then calls `marks`.
    """
    kind = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    size = dtype.itemsize * math.prod(shape)  # bytes
    header = json.dumps({
        "rows": dict(dtype=kind, shape=shape, data_offsets=(0, size)),
        "marks": dict(dtype="BOOL", shape=shape[:1], data_offsets=(size, size + shape[0]))}).encode()
    header += b" " * (-len(header) % 8)  # to a multiple of 8 bytes

    # The header's length, the header, the data
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for chunk in chunks:
            file.write(chunk.cpu().contiguous().view(torch.uint8).numpy())
        file.write(bytes(marks()))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, lambda file: save_file(tensors, file, metadata))


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda file: file.write_text(text, encoding="utf-8"))


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
