"""A run's log, its progress on the terminal, and the signals that stop it."""
import argparse
import contextlib
import json
import os
import signal
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Iterable, Iterator, TextIO

import torch
import torch.distributed as dist

from formats.files import InputError, guard, remove_leftovers
from support.processes import RANK, WORLD

# What a run writes to its folder, beside TensorBoard's files, which get a new name each time
WRITTEN = ("config.json", "checkpoint.safetensors", "best.safetensors", "metrics.jsonl", "curves.png",
           "samples.png", "captions-*.jsonl", "unreadable.txt", "lora")
MOST_LOST = 600  # seconds of steps, when a run is killed


def check_new(folder: Path) -> None:
    """Raises InputError where a new run in `folder` would write over what is there. An empty metrics.jsonl,
    which a run leaves that was killed at its start, is nothing."""
    with guard(folder):
        there = sorted(os.listdir(folder)) if folder.exists() else []
        if {"config.json", "metrics.jsonl"} <= {*there}:
            raise InputError(f"{folder}: there is a run already: --resume it, or give another --out")
        if "metrics.jsonl" in there and not (folder / "metrics.jsonl").stat().st_size:
            there.remove("metrics.jsonl")
    for name in there:
        if any(fnmatch(name, pattern) for pattern in WRITTEN):
            raise InputError(f"{folder}: there is a {name} already, which a run writes: give another --out")


def check_line(entry) -> None:
    """Raises an exception where a JSON value is no line of metrics.jsonl, which has a step, other numbers,
    and scores by row."""
    if type(entry["step"]) is not int or entry["step"] < 0:
        raise ValueError(f"step {entry['step']!r}")
    for row in (entry | {"scores": None}, *entry.get("scores", {}).values()):
        for name, value in row.items():
            if value is not None and type(value) not in (int, float):
                raise ValueError(f"{name} {value!r}")


class Log:
    """A run's metrics.jsonl, and TensorBoard's files if asked for. Makes the folder, and keeps others from
    training in it until closed. Of torchrun's processes, only the first writes. Raises InputError."""

    def __init__(self, folder: Path, tensorboard: bool = False):
        self.folder = folder
        self.tensorboard = tensorboard and not RANK
        if tensorboard:
            board_writer()  # is it installed?
        if RANK:
            return
        with guard(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Open it once: closing another handle of it would give up the lock
            self.file = (folder / "metrics.jsonl").open("ab+", buffering=0)
            if not lock(self.file):
                raise InputError(f"{folder}: another process is training in it")

    def begin(self, step: int) -> None:
        """Removes the lines after `step`, the scores, and what a killed process left. Raises InputError where
        a line isn't a run's."""
        if RANK:
            return
        for place in (self.folder, self.folder / "lora" / "llm", self.folder / "lora" / "vit"):
            remove_leftovers(place, True)

        # Keep the lines up to the first that doesn't stay. What has no end was cut short
        with guard(self.file.name):
            self.file.seek(0)
            *lines, _ = self.file.read().split(b"\n")
            entries = []
            for number, line in enumerate(lines, 1):
                with guard(f"{self.file.name}: line {number}", "not a line of a run"):
                    entries.append(json.loads(line))
                    check_line(entries[-1])
            kept = 0  # bytes
            for line, entry in zip(lines, entries):
                if entry["step"] > step or "scores" in entry:
                    break
                kept += len(line) + 1
            self.file.truncate(kept)
        if self.tensorboard:
            self.board = board_writer()(self.folder, purge_step=step)

    def add(self, entry: dict) -> None:
        """Adds a line, which is on the disk when this returns. NaN becomes null."""
        if RANK:
            return
        entry = {key: None if value != value else value for key, value in entry.items()}
        line = json.dumps(entry).encode() + b"\n"
        with guard(self.file.name):
            if self.file.write(line) != len(line):
                raise InputError(f"{self.file.name}: no space left for a line")
            os.fsync(self.file.fileno())

        # The same for TensorBoard, scores under the name of their row
        if self.tensorboard:
            for label, row in {"": entry, **entry.get("scores", {})}.items():
                for name, value in row.items():
                    if isinstance(value, (int, float)):
                        self.board.add_scalar(f"{label}/{name}".lstrip("/"), value, entry["step"])

    def entries(self) -> list[dict]:
        self.file.seek(0)
        return [json.loads(line) for line in self.file.read().splitlines()]

    def close(self) -> None:
        if not RANK:
            self.file.close()
        if self.tensorboard:
            self.board.close()


def board_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs its package: pip install tensorboard") from None


def lock(file) -> bool:
    """Locks an open file for this process until it is closed. Returns False if another process has it."""
    try:
        if os.name == "nt":
            import msvcrt
            file.seek(1 << 30)  # where no one reads
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: worker processes would inherit it
        return True
    except (BlockingIOError, PermissionError):
        return False


class Signals:
    """Handles Ctrl-C and a cluster's SIGTERM. Ends the process at once if no step would be lost, or the
    second time. Otherwise stores the signal in `asked`: the loop sees it after the step. Tells, too, when a
    checkpoint is due."""

    def __init__(self):
        self.asked = 0
        self.saved()

    def saved(self) -> None:
        """Takes note that no step would be lost now."""
        self.unsaved = False
        self.last_saved = self.last_looked = time.monotonic()

    def __call__(self, number: int, frame) -> None:
        if self.asked or not self.unsaved:
            raise SystemExit(128 + number)
        self.asked = number

    def agreed(self, step: int, device: torch.device) -> tuple[int, bool]:
        """Returns the signal that any of torchrun's processes got, or 0; and whether more than MOST_LOST
        seconds of steps would be unsaved when it looks again. Several processes look only in every tenth
        step, so that they don't wait for each other in each."""
        if WORLD > 1 and step % 10 < 9:
            return 0, False
        now = time.monotonic()
        next_look = now + (now - self.last_looked)  # about as long after this one
        due = next_look - self.last_saved > MOST_LOST
        self.last_looked = now
        if WORLD == 1:
            return self.asked, due
        found = torch.tensor([self.asked, due], device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        asked, due = found.tolist()
        return asked, bool(due)

    def __enter__(self) -> "Signals":
        self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, error, _) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.asked and WORLD > 1 and isinstance(error, RuntimeError):  # others have ended before it could
            raise SystemExit(128 + self.asked)


class Line:
    """A line on a terminal, cut to its width, that is drawn over twice a second at most. Shows nothing
    elsewhere."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None):
        self.stream = stream or sys.stdout
        self.shown = self.stream.isatty() and not quiet
        self.width = 0
        self.drawn = time.time()

    def due(self) -> bool:
        return self.shown and time.time() - self.drawn > 0.5

    def draw(self, text: str) -> None:
        """Draws over what stands there; "" removes it."""
        if self.shown:
            with contextlib.suppress(OSError, ValueError):  # a terminal that doesn't tell
                self.width = os.get_terminal_size(self.stream.fileno()).columns
            width = (self.width or 80) - 1
            print("\r" + text[:width].ljust(width), end="\r", file=self.stream, flush=True)
            self.drawn = time.time()


def time_left(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d} left"


def counted(batches: Iterable[tuple], doing: str, size: int, label: str, quiet: bool = False,
            stream: TextIO | None = None) -> Iterator[tuple]:
    """Yields the batches, which begin with the indices of pictures; tells on a terminal how many of the
    `size` pictures of the set `label` are done, as "encoded", and the time left."""
    line = Line(quiet, stream)
    start = time.time()
    done = 0
    try:
        for batch in batches:
            yield batch
            done += len(batch[0])
            if done and line.due():
                left = (size - done) * (time.time() - start) / done
                line.draw(f"{doing} {done}/{size} pictures  {time_left(left)}  {label}".lstrip())
    finally:
        line.draw("")


class Progress:
    """Mean loss, speed and time left since the last line; on a terminal, shown twice a second."""

    def __init__(self, args: argparse.Namespace):
        self.steps = args.steps
        self.quiet = args.quiet
        self.bar = Line(args.quiet)
        self.begin()

    def begin(self, losses: list[torch.Tensor] = ()) -> None:
        self.start = time.time()
        self.losses = list(losses)
        self.images = 0
        self.tokens = 0

    def add(self, step: int, loss: torch.Tensor, images: int, tokens: int) -> None:
        self.losses.append(loss)
        self.images += images
        self.tokens += tokens
        if self.bar.due():
            self.bar.draw(self.text(self.line(step)))

    def line(self, step: int) -> dict:
        seconds = time.time() - self.start
        losses = torch.stack(self.losses)
        skipped = losses.isnan().sum().item()
        line = {"step": step + 1, "loss": losses.nanmean().item()}
        if skipped:
            line["skipped"] = skipped
        line["images_per_s"] = self.images / seconds
        line["tokens_per_s"] = self.tokens / seconds
        line["s_left"] = (self.steps - step - 1) * seconds / len(self.losses)
        return line

    def show(self, line: dict) -> None:
        if not self.quiet:
            self.bar.draw("")
            print(self.text(line), flush=True)

    def text(self, line: dict) -> str:
        parts = [f"step {line['step']}/{self.steps}", f"loss {line['loss']:.4f}"]
        parts += [f"{name} {line[name]:.4f}" for name in ("val", "exact", "matching") if name in line]
        if "skipped" in line:
            parts.append(f"{line['skipped']} steps skipped: gradients not finite, or no word to learn")
        parts += [f"{line['images_per_s']:.0f} images/s", f"{line['tokens_per_s']:.0f} tokens/s",
                  time_left(line["s_left"])]
        return "  ".join(parts)
