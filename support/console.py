"""The command line: options, help, errors in one line."""
import argparse
import contextlib
import difflib
import errno
import functools
import gc
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from formats.files import InputError, named
from support.processes import RANK, WORLD


def nearest(word: str, known) -> str:
    """Asks whether the user meant the one of `known` that is most like `word`; "" if none is like it."""
    matches = difflib.get_close_matches(word, known, 1, 0.7)
    return f"; did you mean {matches[0]}?" if matches else ""


def one_of(known, what: str, word: str) -> str:
    """Returns `word`, if it is one of `known`. Raises InputError."""
    if word not in known:
        raise InputError(f"unknown {what} '{word}': choose from {', '.join(known)}{nearest(word, known)}")
    return word


def complain(error: Exception | str) -> None:
    """Prints an error as one line on stderr, in colour on a terminal. NO_COLOR (no-color.org) turns this
    off."""
    can_colour = "WT_SESSION" in os.environ if os.name == "nt" else os.environ.get("TERM") != "dumb"
    colour = can_colour and sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    label = "\33[31merror:\33[0m" if colour else "error:"
    print(f"{Path(sys.argv[0]).name}: {label} {error}", file=sys.stderr)


def run(main: Callable[[], None], memory: str = "a smaller --batch") -> None:
    """Runs a command line's `main`, with output in UTF-8. An InputError becomes a line on stderr and exit
    code 2; so do the errors of `reason`: `memory` names the remedies where there is too little."""
    # Prepare the interpreter
    if sys.stdout is None:  # its reader closed it
        sys.stdout = open(os.devnull, "w")
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        with contextlib.suppress(AttributeError):  # it is closed, or a caller's own
            stream.reconfigure(encoding="utf-8", errors=errors)
    leave_imports_alone()

    # Run, and turn each expected end into a line and an exit code
    try:
        try:
            main()
        finally:  # here too the reader of our output may be gone
            sys.stdout.flush()
    except (InputError, RuntimeError, MemoryError) as error:
        line = reason(error, memory)
        if line is None:
            raise
        if WORLD > 1 and (RANK or line == ALONE):
            # It may be another process's error too: that one prints it, and the launcher ends the others
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        complain(line)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # the output's reader went away, as in `sample.py … | head`, or its disk is full
        gone = isinstance(error, BrokenPipeError)
        if error.filename or not gone and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if gone:
            sys.exit(141)
        complain(f"the output can't be written: {error.strerror}")
        sys.exit(2)
    finally:
        for child in multiprocessing.active_children():  # that read pictures, and ignore SIGTERM
            child.kill()


@functools.cache  # once for a process: what a caller made since may become garbage
def leave_imports_alone() -> None:
    """Looking for garbage in all imported modules takes longer than loading a small model."""
    gc.freeze()


ALONE = "another process of this run has ended"


def reason(error: Exception, memory: str) -> Exception | str | None:
    """What to say of an error that can be expected; None of others."""
    if isinstance(error, InputError):
        return error
    if out_of_memory(error):
        return f"out of memory: try {memory}"
    if str(error).startswith("DataLoader worker"):
        return "a process that reads pictures was killed, perhaps for want of memory: try fewer --workers"
    if WORLD > 1 and re.search("closed by peer|reset by peer|Broken pipe|NCCL|ncclUnhandled", str(error)):
        return ALONE
    return None


def out_of_memory(error: BaseException | None) -> bool:
    """Whether no memory was left: torch says so in several ways, some in the error's cause."""
    if error is None:
        return False
    said = ("out of memory", "_ALLOC_FAILED", "can't allocate memory")  # of a GPU, of cuBLAS, of a CPU
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in said):
        return True
    return out_of_memory(error.__cause__ or error.__context__)


EXIT_CODES = ("exit codes: 0 done; 2 bad input, or too little memory (a line on stderr tells);\n"
              "130 Ctrl-C, 143 SIGTERM, 141 broken pipe")


class Help(argparse.RawDescriptionHelpFormatter):
    """As wide as the terminal, 100 columns at most; tells the default of every option whose text doesn't."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=min(100, shutil.get_terminal_size().columns - 2))

    def _get_help_string(self, action):
        told = "(default" in action.help or action.default in ("", argparse.SUPPRESS)
        known = type(action.default) in (int, float, str)
        return action.help + " (default: %(default)s)" if known and not told else action.help

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(getattr(action.type, "kind", str), "TEXT")


class Parser(argparse.ArgumentParser):
    """The parser of both command lines. Raises InputError instead of printing the usage."""

    def __init__(self, description: str):
        super().__init__(usage="%(prog)s [options]", description=description, epilog=EXIT_CODES,
                         formatter_class=Help)
        self._negative_number_matcher = re.compile(r"-\d+(,-?\d+)*$|-\d*\.\d+$")  # -2,-5 too is a value

    def _get_value(self, action, text: str):
        with named(flag(action.dest)):  # its type doesn't know the option's name
            return super()._get_value(action, text)

    def check(self, name: str, value) -> None:
        """Raises InputError where the command line couldn't give the option `name` this value."""
        option = next((action for action in self._actions if action.dest == name), None)
        if option is None:
            raise InputError(f"{name} can't be {value!r}")
        if value is option.default is None:
            return
        kinds = getattr(option.type, "kinds", bool if option.nargs == 0 else str)
        if not isinstance(value, kinds) or isinstance(value, bool) and kinds is not bool:
            raise InputError(f"{name} can't be {value!r}")
        if option.type:
            with named(name):
                option.type(str(value).strip("[]"))

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments:.*? (--?[\w-]+)", message)
        raise InputError(message + (nearest(unknown[1], self._option_string_actions) if unknown else ""))


class Number(NamedTuple):
    """The type of an option: a number of a `kind`, int or float, from `least` to `most`."""
    kind: type
    least: float
    most: float
    kinds = (int, float)  # of its values

    def __call__(self, text: str) -> int | float:
        """Reads a number. Raises InputError."""
        with contextlib.suppress(ValueError):
            value = self.kind(text)
            if self.least <= value <= self.most:  # NaN isn't
                return value
        kind = "a whole number" if self.kind is int else "a number"
        raise InputError(f"{text!r} is not {kind} from {self.least:,} to {self.most:,}")


class Numbers(NamedTuple):
    """The type of an option: a `number`, or a list of several, with commas between."""
    number: Number
    kinds = (int, float, list)

    def __call__(self, text: str) -> int | float | list:
        """Reads the numbers. Raises InputError."""
        found = [self.number(one) for one in text.split(",")]
        return found if len(found) > 1 else found[0]


# Ranges of options of both command lines
SEED = Number(int, 0, 2 ** 32 - 1)
PROCESSES = Number(int, 0, 256)
MANY = Number(int, 1, 10 ** 7)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_meaning(args: argparse.Namespace, parser: argparse.ArgumentParser, rules) -> None:
    """Refuses options that mean nothing beside the others: who gives them expects an effect.

    rules: (names of options, whether they mean something, why not) each. An option counts as given where its
        value differs from its default; with --resume, from the run's own. --no-… asks for nothing.
    Raises InputError.
    """
    for names, meant, why in rules:
        for name in names.split():
            value = getattr(args, name)
            if value is not False and value != parser.get_default(name) and not meant:
                raise InputError(f"{flag(name)} means nothing {why}")


def machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", metavar="NAME",
                        help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--precision", default="auto", metavar="TYPE",
                        help="bfloat16, float16 or float32, of weights and arithmetic (default: bfloat16 "
                             "where the hardware is fast at it, float16 on older GPUs, else float32)")
