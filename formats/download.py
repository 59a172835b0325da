"""Downloads from the hub: the user's settings and token, and files that come whole or not at all."""
import contextlib
import hashlib
import json
import os
import queue
import re
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Iterator
from urllib.parse import quote, urlsplit

from formats.files import InputError, guard, write_file

SECONDS = 20  # the longest wait for a reply to begin or go on
LEAST = 1024  # the slowest reply, bytes a second
MOST_LISTED = 1 << 25  # bytes of the hub's list of a model's files
MOST_SMALL = 1 << 27  # bytes of a file without weights, and of the header of one with them
COMMIT = re.compile("[0-9a-f]{6,64}")


# ---------------------------------------------------------------------------------------------------------
# Settings: environment variables, which mean what they mean to the hub's own client

def is_on(value: str | None) -> bool:
    return (value or "").upper() in ("1", "TRUE", "YES", "ON")


def path_in(*variables: str) -> Path | None:
    """Returns the path in the first of these variables that is set; None if none is."""
    for variable in variables:
        if value := os.environ.get(variable):
            return Path(os.path.expandvars(os.path.expanduser(value)))
    return None


def home() -> Path:
    caches = path_in("XDG_CACHE_HOME") or Path(os.path.expanduser("~/.cache"))
    return path_in("HF_HOME") or caches / "huggingface"


def endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def offline() -> str:
    """Returns the variable that forbids the network, "" if none does. The first that is set decides."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if value := os.environ.get(variable):
            return variable if is_on(value) else ""
    return ""


def token() -> str:
    """Returns the user's token, "" if there is none: from the environment, else from the login's file."""
    if is_on(os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN")):
        return ""
    secret = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or ""
    if not secret.strip():
        with contextlib.suppress(OSError):
            secret = (path_in("HF_TOKEN_PATH") or home() / "token").read_text(errors="replace")
    return "".join(secret.split())


# ---------------------------------------------------------------------------------------------------------
# Requests

class Login(urllib.request.BaseHandler):
    """Adds the token to https requests to the endpoint's own host. A redirect is a new request: it comes here
    again, without the token."""

    def https_request(self, request: urllib.request.Request) -> urllib.request.Request:
        if request.host.lower() == urlsplit(endpoint()).netloc.lower() and (secret := token()):
            request.add_unredirected_header("Authorization", f"Bearer {secret}")
        return request


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects without reading their own bodies, which may have no end."""

    def redirect_request(self, request, reply, *arguments):
        reply.close()
        return super().redirect_request(request, reply, *arguments)


def explain(name: str, error: Exception) -> str:
    """Says why a request for the model `name` failed, and how the user can help it."""
    if not isinstance(error, urllib.error.HTTPError):
        return f"{endpoint()}: {getattr(error, 'reason', error) or type(error).__name__}"
    host = urlsplit(error.url).netloc
    page = f"{endpoint()}/{name}"
    hint = error.reason
    if error.code == 404:
        hint = "no such model, or no such revision or file of it"
    elif error.code in (401, 403) and host == urlsplit(page).netloc:
        hint = f"no such model, or a private or gated one: accept its terms on {page} and set HF_TOKEN"
        if not page.startswith("https:"):
            hint += ", which is sent over https alone"
        elif token():
            hint = f"the token (HF_TOKEN, or the login's) was refused: may its account read {page}?"
    return f"{host} answered {error.code}: {hint}"


def stream(name: str, path: str) -> Iterator:
    """Requests `path` of the endpoint, for the model `name`. Yields the length in bytes that the server
    states, or None; then the bytes in chunks, as they come. Raises InputError if the server refuses, breaks
    off, stalls or is too slow.

    A thread reads, and this function limits the wait for it: looking up a host's name has no time-out, and
    headers that come byte by byte restart theirs with each byte.
    """
    opener = urllib.request.build_opener(Login, Redirects)
    opener.addheaders = [("User-Agent", "pytorch")]  # some servers refuse urllib's own name
    arrived = queue.Queue(8)
    stopped = threading.Event()

    def read() -> None:
        try:
            with opener.open(f"{endpoint()}/{path}", timeout=2 * SECONDS) as reply:  # nobody waits that long
                length = reply.headers.get("Content-Length")
                arrived.put(None if length is None else int(length))
                while not stopped.is_set() and (chunk := reply.read1(1 << 20)):
                    arrived.put(chunk)
                arrived.put(b"")
        except Exception as error:
            arrived.put(error)

    threading.Thread(target=read, daemon=True).start()
    patience = SECONDS
    try:
        while True:
            # Waiting costs patience, each byte restores a little
            start = time.monotonic()
            try:
                item = arrived.get(timeout=max(0, patience))
            except queue.Empty:
                raise InputError(f"{endpoint()} sends nothing, or too slowly") from None
            patience -= time.monotonic() - start
            patience += len(item) / LEAST if isinstance(item, bytes) else SECONDS
            patience = min(patience, SECONDS)

            if isinstance(item, Exception):
                raise InputError(explain(name, item))
            if item == b"":
                return
            yield item
    finally:
        stopped.set()
        while not arrived.empty():  # the thread may be waiting for room
            arrived.get()


def listing(name: str, revision: str) -> tuple[str, dict[str, tuple]]:
    """Returns the commit of a model's revision, and its files {name: (bytes, SHA-256)}, with None for what
    the hub doesn't tell. Raises InputError."""
    body = bytearray()
    end = time.monotonic() + SECONDS
    path = f"api/models/{name}/revision/{quote(revision, safe='')}?blobs=true"
    with contextlib.closing(stream(name, path)) as reply:
        next(reply)
        for chunk in reply:
            body += chunk
            if len(body) > MOST_LISTED or time.monotonic() > end:
                raise InputError(f"{endpoint()}: the list of the model's files doesn't end")

    with guard(endpoint(), "no list of a model's files"):
        info = json.loads(body)
        commit = info["sha"]
        another = re.fullmatch("[0-9a-f]{40}", revision) and commit != revision
        if not COMMIT.fullmatch(commit) or another:
            raise ValueError(f"commit {commit}")
        files = {}
        for file in info["siblings"]:
            size = file.get("size")
            if size is not None and type(size) is not int:
                raise ValueError(f"size {size}")
            sha256 = (file.get("lfs") or {}).get("sha256")
            files[file["rfilename"]] = (size, sha256)
        return commit, files


# ---------------------------------------------------------------------------------------------------------
# Files

def save(name: str, snapshot: Path, file: str, size: int | None, sha256: str | None) -> None:
    """Downloads a model's file into its commit's folder `snapshot`, if it isn't there. `size` (bytes) and
    `sha256` are the hub's. Raises InputError."""
    path = snapshot / file
    with guard(path, "can't be written"):
        if path.is_file():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(stream(name, f"{name}/resolve/{snapshot.name}/{file}")) as reply:
        try:
            # The hub's size and the server's must agree
            stated = next(reply)
            if size is not None and stated not in (None, size):
                raise InputError(f"the server states {stated} bytes, the hub lists {size}")

            # A mirror that lists no sizes may have a part of a file, and states its size: what comes tells
            # whether it is whole, except of files of other kinds
            if size is None and path.suffix not in (".json", ".safetensors"):
                size = stated
                if size is None:
                    raise InputError("its size isn't told")
            if size is not None and size > MOST_SMALL and path.suffix != ".safetensors":
                raise InputError(f"{size} bytes are too many")

            chunks = shown(f"{name}/{file}", reply, stated if size is None else size)
            write_file(path, lambda temporary: receive(temporary, path.suffix, chunks, size, sha256))
        except InputError as error:
            raise InputError(f"{file}: {error}") from None


def receive(target: Path, kind: str, chunks: Iterator[bytes], size: int | None, sha256: str | None) -> None:
    """Writes a file of a `kind` (".json", …) as its chunks come. Raises InputError if it isn't whole.

    If `size` is None: a safetensors file's header tells it, and JSON is whole if it is valid.
    """
    head = bytearray()
    received = 0
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for chunk in chunks:
            if size is None and kind == ".safetensors":
                head += chunk
                size = safetensors_size(head)
            received += len(chunk)
            if received > (MOST_SMALL if size is None else size):
                raise InputError("it is longer than it should be")
            out.write(chunk)
            digest.update(chunk)
    if size is None and kind == ".json":
        with guard("its size isn't told, and it", "not valid JSON"):
            json.loads(target.read_bytes())
    elif received != size:
        raise InputError(f"just {received} bytes came: run the command again")
    if sha256 and digest.hexdigest() != sha256:
        raise InputError("not the file that the hub lists, by its SHA-256: run the command again")


def safetensors_size(head: bytes) -> int | None:
    """Returns the size in bytes of a safetensors file that begins with `head`; None if the header is longer
    than `head`. Raises InputError."""
    with guard("its size isn't told, and its header", "not a safetensors file's"):
        start = 8 + int.from_bytes(head[:8], "little")
        if start > MOST_SMALL:
            raise ValueError(f"{start} bytes")
        if len(head) < max(start, 9):
            return None
        tensors = json.loads(head[8:start])
        tensors.pop("__metadata__", None)
        return start + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)


def shown(label: str, chunks: Iterator[bytes], size: int | None) -> Iterator[bytes]:
    """Yields the chunks. Names the download on stderr and, on a terminal, shows how much has come."""
    if not sys.stderr.isatty():
        print(f"downloading {label}", file=sys.stderr)
        yield from chunks
        return
    received = 0
    last = 0.0  # time of the last line
    whole = "" if size is None else f" of {size / 1e6:.1f}"
    try:
        for chunk in chunks:
            yield chunk
            received += len(chunk)
            if received == size or time.monotonic() - last > 0.2:
                last = time.monotonic()
                line = f"downloading {label}  {received / 1e6:.1f}{whole} MB"
                width = shutil.get_terminal_size().columns - 1
                print("\r" + line[-width:], end="", file=sys.stderr, flush=True)
    finally:
        print(file=sys.stderr)
