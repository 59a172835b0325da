"""Names of models: folders, the cache, and downloads, from servers that answer as a hub does, or badly."""
import hashlib
import http.server
import json
import os
import shutil
import socket
import ssl
import threading
import time
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

from adapters import VLM
from formats import download, hub
from formats.files import InputError
from formats.hub import SMALL_FILES, find_checkpoint, find_file
from formats.tokenizer import Tokenizer
from formats.weights import Checkpoint
from llm import LLM
from vit import ViT

COMMIT, OLDER = "0123456789abcdef" * 2 + "01234567", "f" * 40
SHARD = "model-00003-of-00007.safetensors"
VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HF_ENDPOINT", "HF_TOKEN",
             "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_OFFLINE",
             "TRANSFORMERS_OFFLINE")
CERTIFICATE = Path(__file__).resolve().parent / "fixtures" / "localhost.pem"


class Server:
    """A hub at `address`, with one model, someone/tiny, whose files lie in `folder`.

    `asked` are the requests so far: (path, Authorization header). `faults` say how a file (or the "listing")
    is answered. `large`: the address that requests for files are redirected to.
    """

    def __init__(self, folder: Path, certificate: Path | None = None):
        self.folder, self.asked, self.faults, self.large = folder, [], {}, None
        self.revisions = {"main": COMMIT, COMMIT: COMMIT}
        self.sizes = True  # whether the listing tells sizes and hashes
        self.over = threading.Event()
        served = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                try:
                    served.answer(self)
                except OSError:  # the client left
                    pass

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port, scheme = self.server.server_port, "http"
        if certificate:
            context, scheme = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "https"
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.address = f"{scheme}://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.01),
                         daemon=True).start()

    def close(self):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request) -> None:
        self.asked.append((request.path, request.headers.get("Authorization")))
        path = request.path.split("?")[0]
        if path.startswith("/api/models/someone/tiny/revision/"):
            revision = path.rsplit("/", 1)[1]  # one part of the address, whatever it is called
            commit = self.revisions.get(unquote(revision))
            answer = self.faults.get("listing", self.send)
            return answer(request, self.listing(commit)) if commit else request.send_error(404)

        prefix = "/someone/tiny/resolve/"
        if path.startswith(prefix) and self.large is not None:
            request.send_response(302)
            request.send_header("Location", self.large + path.replace(prefix, "/large/"))
            return request.end_headers()
        file = path.removeprefix(prefix).removeprefix("/large/").split("/", 1)[1]
        fault = self.faults.get(file, self.send)
        fault(request, (self.folder / file).read_bytes())

    def listing(self, commit: str) -> bytes:
        files = []
        for file in self.folder.rglob("*"):
            if file.is_file():
                files.append(dict(rfilename=file.relative_to(self.folder).as_posix()))
                if self.sizes:
                    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
                    files[-1] |= dict(size=file.stat().st_size, lfs=dict(sha256=sha256))
        return json.dumps(dict(sha=commit, siblings=files)).encode()

    def send(self, request, content: bytes, length: int | None = None) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(content) if length is None else length))
        request.end_headers()
        request.wfile.write(content)

    # faults

    def refuse(self, status: int):
        return lambda request, content: request.send_error(status)

    def cut(self, request, content: bytes) -> None:
        self.send(request, content[:len(content) // 2], len(content))

    def corrupt(self, request, content: bytes) -> None:
        self.send(request, content[:-1] + b"x")

    def longer(self, request, content: bytes) -> None:
        self.send(request, content + b" ")

    def no_length(self, request, content: bytes) -> None:
        request.send_response(200)
        request.end_headers()
        request.wfile.write(content)

    def no_length_and_cut(self, request, content: bytes) -> None:
        self.no_length(request, content[:-9])

    def endless(self, request, content: bytes) -> None:
        request.send_response(200)
        request.end_headers()
        end = time.monotonic() + 3  # or a test that fails would never end
        while time.monotonic() < end:
            request.wfile.write(b" " * 10_000)

    def stall(self, request, content: bytes) -> None:
        self.over.wait(10)

    def stall_in_the_middle(self, request, content: bytes) -> None:
        self.cut(request, content)
        self.over.wait(10)

    def drip(self, request, content: bytes) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        for byte in content:
            self.over.wait(0.02)
            request.wfile.write(bytes([byte]))

    def drip_headers(self, request, content: bytes) -> None:
        while not self.over.wait(0.02):
            request.wfile.write(b"H")


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    """Nobody's settings but the test's."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "MOST_LISTED", 1 << 20)
    monkeypatch.setattr(download, "MOST_SMALL", 1 << 20)
    monkeypatch.setattr(hub, "incomplete", set())


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(download, "SECONDS", 0.15)


@pytest.fixture
def server(fixtures, monkeypatch):
    server = Server(fixtures / "llama_sharded")
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    yield server
    server.close()


@pytest.fixture
def repository(tmp_path) -> Path:
    return tmp_path / "cache" / "models--someone--tiny"


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------------
# Downloads

def test_download_fills_the_cache(server, fixtures, repository, monkeypatch):
    server.large = ""  # large files are kept elsewhere
    llm = LLM.from_pretrained("someone/tiny")
    reference = LLM.from_pretrained(str(fixtures / "llama_wide"))
    assert all(torch.equal(a, b) for a, b in zip(llm.parameters(), reference.parameters()))
    snapshot = repository / "snapshots" / COMMIT
    assert find_checkpoint("someone/tiny") == snapshot
    assert "golden.safetensors" not in {path.name for path in snapshot.iterdir()}  # just the files needed
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    LLM.from_pretrained("someone/tiny")  # from the cache


def test_a_tokenizer_comes_without_the_weights(server, fixtures, repository, monkeypatch):
    server.folder = fixtures / "blip2_opt"
    assert Tokenizer.from_pretrained("someone/tiny").special["<image>"]
    snapshot = repository / "snapshots" / COMMIT
    assert (snapshot / "config.json").is_file() and not (snapshot / "model.safetensors").exists()
    VLM.from_pretrained("someone/tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    VLM.from_pretrained("someone/tiny")


BROKEN = {"cut": "just", "corrupt": "SHA-256", "longer": "the server states", "no_length_and_cut": "just",
          "endless": "longer than it should be"}
SLOW = dict.fromkeys(("drip", "drip_headers", "stall", "stall_in_the_middle"), "sends nothing, or too slowly")


@pytest.mark.parametrize("file", ("config.json", SHARD))
@pytest.mark.parametrize("fault, problem", (BROKEN | SLOW).items())
def test_broken_download_is_never_taken_for_whole(fault, problem, file, server, repository, monkeypatch):
    server.faults[file] = getattr(server, fault)
    with monkeypatch.context() as patch:
        patch.setattr(download, "SECONDS", 0.15 if fault in SLOW else 20)
        for _ in range(1 if fault in SLOW else 2):
            start = time.monotonic()
            with pytest.raises(InputError, match=f"someone/tiny: .*download failed: .*{problem}"):
                find_checkpoint("someone/tiny")
            assert time.monotonic() - start < 10
            left = files_in(repository)
            assert not any(name.endswith((file, "tmp", ".part")) or "refs" in name for name in left)
    server.faults.clear()
    find_checkpoint("someone/tiny")
    assert len(files_in(repository / "snapshots")) == 10 and (repository / "refs" / "main").is_file()


@pytest.mark.parametrize("fault, most, seconds, problem", (
    ("cut", 1 << 20, 20, "no list of a model's files"), ("endless", 1 << 20, 20, "doesn't end"),
    ("endless", 1 << 40, 0.3, "doesn't end"),  # however fast it comes
    *((fault, 1 << 20, 0.15, problem) for fault, problem in SLOW.items())))
def test_a_list_of_files_that_never_comes(fault, most, seconds, problem, server, repository, monkeypatch):
    monkeypatch.setattr(download, "MOST_LISTED", most)
    monkeypatch.setattr(download, "SECONDS", seconds)
    server.faults["listing"] = getattr(server, fault)
    start = time.monotonic()
    # a drip ends by its speed or by the whole time, whichever is noticed first
    with pytest.raises(InputError, match=f"download failed: http://127.0.0.1.*({problem}|doesn't end)"):
        find_checkpoint("someone/tiny")
    assert time.monotonic() - start < 10 and not repository.exists()


def test_a_name_server_that_hangs(server, impatient, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: server.over.wait(10))
    with pytest.raises(InputError, match="sends nothing"):
        find_checkpoint("someone/tiny")


def test_lists_of_no_use(server, repository):
    for reply in (b"", b"[]", b"{}", b"[" * 100_000, b'{"sha": "../x", "siblings": []}', b'{"sha": 7}',
                  b'{"sha": "%s", "siblings": [7]}' % COMMIT.encode(),
                  b'{"sha": "%s", "siblings": [{"rfilename": "a", "size": "9"}]}' % COMMIT.encode()):
        server.faults["listing"] = lambda request, _: server.send(request, reply)
        with pytest.raises(InputError, match="no list of a model's files"):
            find_checkpoint("someone/tiny")
    assert not repository.exists()


def test_sizes_that_nobody_tells(server, repository, tmp_path):
    """Tensors are checked by their header, JSON by being valid, and nothing else can be."""
    server.sizes = False
    server.folder = tmp_path / "model"
    shutil.copytree(Path(__file__).parent / "fixtures" / "llama_sharded", server.folder)
    for name in ("listing", *files_in(server.folder)):
        server.faults[name] = server.no_length
    LLM.from_pretrained("someone/tiny")
    for edit in (lambda raw: raw[:7], lambda raw: raw[:-1], lambda raw: raw + b"x", lambda raw: b"\xff" * 99,
                 lambda raw: raw[:8] + b"x" * 99, lambda raw: b""):
        shutil.rmtree(repository)
        server.faults[SHARD] = lambda request, content: server.no_length(request, edit(content))
        with pytest.raises(InputError, match=f"download failed: {SHARD}: "):
            find_checkpoint("someone/tiny")
        assert not (repository / "snapshots" / COMMIT / SHARD).exists()
    for fault, problem in ((server.endless, "longer than"), (server.no_length_and_cut, "not valid JSON")):
        shutil.rmtree(repository)
        server.faults["config.json"] = fault
        with pytest.raises(InputError, match=f"config.json: .*{problem}"):
            find_checkpoint("someone/tiny")
    server.faults["config.json"] = server.no_length
    (server.folder / "merges.txt").write_text("a b")
    server.faults["merges.txt"] = server.no_length
    with pytest.raises(InputError, match="merges.txt: its size isn't told"):
        find_checkpoint("someone/tiny")


def test_a_mirror_that_has_a_part_of_a_file(server, repository, tmp_path):
    """It states the part's length: the next run would take the part for whole, and so would each after it."""
    server.sizes = False
    server.folder = tmp_path / "model"
    shutil.copytree(Path(__file__).parent / "fixtures" / "llama_sharded", server.folder)
    for file, problem in (("config.json", "not valid JSON"), (SHARD, "just")):
        whole = (server.folder / file).read_bytes()
        (server.folder / file).write_bytes(whole[:len(whole) // 2])
        with pytest.raises(InputError, match=f"download failed: {file}: .*{problem}"):
            find_checkpoint("someone/tiny")
        assert not (repository / "snapshots" / COMMIT / file).exists()
        (server.folder / file).write_bytes(whole)
    LLM.from_pretrained("someone/tiny")


def test_a_redirect_without_an_end(server):
    sent = []

    def redirect(request, content):
        if "/large/" in request.path:
            return server.send(request, content)
        request.send_response(302)
        request.send_header("Location", request.path.replace("/someone/tiny/resolve/", "/large/"))
        request.end_headers()
        while len(sent) < 1000:
            request.wfile.write(b" " * 100_000)
            sent.append(100_000)

    server.faults["config.json"] = redirect
    find_checkpoint("someone/tiny", weights=False)
    assert len(sent) < 1000


def test_a_small_file_is_small(server, monkeypatch):
    monkeypatch.setattr(download, "MOST_SMALL", 100)
    with pytest.raises(InputError, match=r"config.json: \d+ bytes are too many"):
        find_checkpoint("someone/tiny")


def test_no_room_on_the_disk(server, repository, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="config.json: No space left on device"):
        find_checkpoint("someone/tiny")
    assert files_in(repository) == []


def test_only_pickled_weights(server, tmp_path):
    server.folder = tmp_path / "model"
    server.folder.mkdir()
    (server.folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="has no model.safetensors$"):
        find_checkpoint("someone/tiny")
    (server.folder / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match=r"just pytorch_model.bin.*someone/tiny@refs/pr/1$"):
        find_checkpoint("someone/tiny")


@pytest.mark.parametrize("terminal", (False, True))
def test_progress(terminal, server, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((200, 24)))
    find_checkpoint("someone/tiny")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 10 or terminal
    size = (server.folder / SHARD).stat().st_size / 1e6
    line = f"downloading someone/tiny/{SHARD}" + f"  {size:.1f} of {size:.1f} MB" * terminal
    assert line in said


# ---------------------------------------------------------------------------------------------------------
# The token

@pytest.fixture
def secure(fixtures, monkeypatch):
    """Two hubs that are asked over https. The user has a token."""
    servers = [Server(fixtures / "llama_sharded", CERTIFICATE) for _ in range(2)]
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    monkeypatch.setenv("HF_ENDPOINT", servers[0].address)
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    yield servers
    for server in servers:
        server.close()


def tokens(server: Server, part: str = "") -> set:
    return {secret for path, secret in server.asked if part in path}


def test_the_token_goes_to_the_endpoint_over_https(secure):
    find_checkpoint("someone/tiny", weights=False)
    assert tokens(secure[0]) == {"Bearer hf_secret"} and len(secure[0].asked) > 2


def test_a_redirect_within_the_host_keeps_the_token(secure):
    secure[0].large = ""
    find_checkpoint("someone/tiny", weights=False)
    assert tokens(secure[0], "/large/") == {"Bearer hf_secret"}


@pytest.mark.parametrize("other", ("port", "host", "http"))
def test_the_token_goes_to_nobody_else(other, server, secure):
    target = {"port": secure[1], "host": secure[0], "http": server}[other]
    secure[0].large = {"host": f"https://localhost:{secure[0].port}"}.get(other, target.address)
    find_checkpoint("someone/tiny", weights=False)
    assert tokens(secure[0], "/resolve/") == {"Bearer hf_secret"}
    assert tokens(target, "/large/") == {None}


def test_the_token_is_never_sent_over_http(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    find_checkpoint("someone/tiny", weights=False)
    assert tokens(server) == {None}


def test_an_unknown_certificate_gets_no_token(secure, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(InputError, match="CERTIFICATE_VERIFY_FAILED"):
        find_checkpoint("someone/tiny")
    assert not secure[0].asked


def test_where_the_token_comes_from(tmp_path, monkeypatch):
    assert download.token() == ""
    for folder in (tmp_path / "home" / ".cache" / "huggingface", tmp_path / "hf"):
        folder.mkdir(parents=True)
        (folder / "token").write_text(f"{folder.name}\n")
    (tmp_path / "file").write_text("file")
    assert download.token() == "huggingface"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert download.token() == "hf"
    monkeypatch.setenv("HF_TOKEN_PATH", "~/../file")
    assert download.token() == "file"
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "legacy")
    assert download.token() == "legacy"
    monkeypatch.setenv("HF_TOKEN", " token\r\n")
    assert download.token() == "token"
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    assert download.token() == ""


def test_refusals_say_what_to_do(server, secure, monkeypatch):
    def refused(status: int, hint: str, endpoint: Server) -> None:
        endpoint.faults["listing"] = endpoint.refuse(status)
        with pytest.raises(InputError, match=f"someone/tiny: .* answered {status}: {hint}") as error:
            find_checkpoint("someone/tiny")
        assert "secret" not in str(error.value)

    page = f"{secure[0].address}/someone/tiny"
    for status in (401, 403):
        refused(status, f"the token .* was refused: may its account read {page}", secure[0])
    monkeypatch.delenv("HF_TOKEN")
    for status in (401, 403):
        refused(status, f"no such model, or .* gated.* its terms on {page} and set HF_TOKEN$", secure[0])
    refused(404, "no such model, or no such revision", secure[0])
    refused(500, "Internal Server Error", secure[0])
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    refused(401, ".*HF_TOKEN, which is sent over https alone", server)


def test_a_refusal_elsewhere_is_not_about_the_terms(secure):
    secure[0].large = secure[1].address
    secure[1].faults["config.json"] = secure[1].refuse(403)
    with pytest.raises(InputError, match=f"127.0.0.1:{secure[1].port} answered 403: Forbidden"):
        find_checkpoint("someone/tiny")


def test_offline(server, monkeypatch):
    for variable, others in (("HF_HUB_OFFLINE", {}), ("TRANSFORMERS_OFFLINE", {"HF_HUB_OFFLINE": ""})):
        monkeypatch.setenv(variable, "1")
        for other, value in others.items():
            monkeypatch.setenv(other, value)
        with pytest.raises(InputError, match=f"{variable} forbids a download"):
            find_checkpoint("someone/tiny")
    assert not server.asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # which the other doesn't overrule
    find_checkpoint("someone/tiny", weights=False)


# ---------------------------------------------------------------------------------------------------------
# Names and the cache

@pytest.mark.parametrize("revision, address, reference", (
    ("v1.0", "v1.0", "v1.0"), ("refs/pr/1", "refs%2Fpr%2F1", "refs/pr/1"), ("a+b#c", "a%2Bb%23c", "a+b#c"),
    (OLDER, OLDER, None)))
def test_revisions(revision, address, reference, server, repository, monkeypatch):
    server.revisions[revision] = OLDER
    find_checkpoint("someone/tiny")
    snapshot = repository / "snapshots" / OLDER
    assert find_checkpoint(f"someone/tiny@{revision}") == snapshot
    assert server.asked[-1][0].startswith(f"/someone/tiny/resolve/{OLDER}/")
    assert any(path == f"/api/models/someone/tiny/revision/{address}?blobs=true" for path, _ in server.asked)
    assert files_in(repository / "refs") == sorted({"main", reference} - {None})
    assert reference is None or (repository / "refs" / reference).read_text() == OLDER
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_checkpoint(f"someone/tiny@{revision}") == snapshot
    assert find_checkpoint("someone/tiny") == repository / "snapshots" / COMMIT


def test_a_commit_is_the_one_that_was_named(server, repository):
    server.revisions[OLDER] = COMMIT
    with pytest.raises(InputError, match=f"commit {COMMIT}"):
        find_checkpoint(f"someone/tiny@{OLDER}")
    assert not repository.exists()


def test_a_folder_comes_before_a_revision(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("someone/tiny@main")
    folder.mkdir(parents=True)
    assert find_checkpoint("someone/tiny@main") == folder and not server.asked


@pytest.mark.parametrize("name", (
    "a/b@", "a/b@..", "a/b@../x", "a/b@x/../y", "a/b@/x", "a/b@x/", "a/b@.x", "a/b@x//y", "a/b@x\n",
    "a/b@x y", "a/b@x@y", "a/b@x\\y", "a/b@\0", "a/b@%2e%2e", "a/b@~", "a/b@" + "x" * 5000, "a--b", "a/b--c",
    "a..b/c"))
def test_names_that_lead_nowhere(name, server):
    with pytest.raises(InputError):
        find_checkpoint(name)
    assert not server.asked


@pytest.mark.parametrize("variables, place", (
    (dict(HF_HUB_CACHE="$BASE/a", HUGGINGFACE_HUB_CACHE="$BASE/b", HF_HOME="$BASE/c"), "base/a"),
    (dict(HUGGINGFACE_HUB_CACHE="~/b", HF_HOME="$BASE/c"), "home/b"),
    (dict(HF_HOME="${BASE}/c", XDG_CACHE_HOME="$BASE/d"), "base/c/hub"),
    (dict(XDG_CACHE_HOME="~/d"), "home/d/huggingface/hub"),
    (dict(HF_HUB_CACHE=""), "home/.cache/huggingface/hub")))
def test_places_of_the_cache(variables, place, fixtures, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("BASE", str(tmp_path / "base"))
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    snapshot = tmp_path / place / "models--someone--tiny" / "snapshots" / OLDER
    shutil.copytree(fixtures / "llama", snapshot)
    reference = snapshot.parent.parent / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text(OLDER)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_checkpoint("someone/tiny") == snapshot


@pytest.fixture
def snapshot(server, fixtures, repository) -> Path:
    """One that a program left which needed an encoder's weights alone."""
    server.folder = fixtures / "clip"
    server.revisions[OLDER] = OLDER  # since then, the main branch has gone on
    snapshot = repository / "snapshots" / OLDER
    snapshot.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(fixtures / "clip" / file, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(OLDER)
    return snapshot


MISSING = ", ".join(file for file in SMALL_FILES if file != "config.json")


def test_what_a_snapshot_lacks_is_fetched(server, snapshot, repository, monkeypatch, capsys):
    expected = json.loads((server.folder / "preprocessor_config.json").read_text())["image_mean"]
    vit = ViT.from_pretrained("someone/tiny")
    assert torch.allclose(vit.preprocess.mean.flatten(), torch.tensor(expected))
    # of the same commit, each once
    assert [path for path, _ in server.asked] == [f"/api/models/someone/tiny/revision/{OLDER}?blobs=true",
                                                  f"/someone/tiny/resolve/{OLDER}/preprocessor_config.json"]
    assert files_in(snapshot) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    # what the model doesn't have is marked, for the hub's own client too
    absent = {*SMALL_FILES} - {"config.json", "preprocessor_config.json"}
    assert files_in(repository / ".no_exist" / OLDER) == sorted(absent)
    hub.incomplete.clear()
    assert Checkpoint("someone/tiny").json("processor_config.json") == {}
    with pytest.raises(InputError):
        Tokenizer.from_pretrained("someone/tiny")
    assert len(server.asked) == 2 and "warning" not in capsys.readouterr().err


def test_what_an_export_hands_on_is_downloaded(server, fixtures):
    server.folder = fixtures / "llava"
    template = find_checkpoint("someone/tiny") / "chat_template.jinja"
    assert template.read_bytes() == (fixtures / "llava" / template.name).read_bytes()


def test_a_fresh_download_asks_once(server, fixtures):
    server.folder = fixtures / "clip"
    ViT.from_pretrained("someone/tiny")
    asked = len(server.asked)
    hub.incomplete.clear()
    ViT.from_pretrained("someone/tiny")
    assert Checkpoint("someone/tiny").json("generation_config.json") == {} and len(server.asked) == asked


def test_weights_that_a_snapshot_lacks_are_of_its_commit(server, snapshot):
    (snapshot / "model.safetensors").unlink()
    assert find_checkpoint("someone/tiny") == snapshot and (snapshot / "model.safetensors").is_file()


@pytest.mark.parametrize("why", ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "127.0.0.1"))
def test_what_can_not_be_fetched_is_said_once(why, server, snapshot, monkeypatch, capsys):
    if why == "127.0.0.1":
        server.close()
    else:
        monkeypatch.setenv(why, "1")
    ViT.from_pretrained("someone/tiny")
    ViT.from_pretrained("someone/tiny")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and said[1] == said[2]
    assert said[0].startswith(f"warning: someone/tiny: the cache lacks {MISSING}, which") and why in said[0]
    assert f"{snapshot}: no preprocessor_config.json" in said[1]
    assert not server.asked


def test_a_whole_repository_lacks_nothing(server, snapshot, monkeypatch, capsys):
    (snapshot / ".gitattributes").touch()  # the hub's own client fetched everything
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert Checkpoint("someone/tiny").json("generation_config.json") == {}
    assert capsys.readouterr().err == ""


def test_a_tokenizer_of_a_snapshot_is_fetched(server, fixtures, snapshot):
    server.folder = fixtures / "tokenizer_opt"
    tokenizer = Tokenizer.from_pretrained("someone/tiny")
    expected = Tokenizer.from_pretrained(str(server.folder))
    assert tokenizer.encode("a picture</s>") == expected.encode("a picture</s>")


def test_a_hub_that_hangs_costs_one_wait(server, snapshot, impatient, capsys):
    server.faults["listing"] = server.stall
    checkpoint = Checkpoint("someone/tiny")
    for file in SMALL_FILES:
        checkpoint.json(file)
    assert len(server.asked) == 1 and capsys.readouterr().err.count("warning: ") == 1


def test_a_cache_that_is_read_only(server, snapshot, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        assert find_file(snapshot, "preprocessor_config.json") is None
        assert "preprocessor_config.json: Read-only file system" in capsys.readouterr().err
    hub.incomplete.clear()
    monkeypatch.setattr(Path, "touch", fail)  # a mark that can't be made is made next time
    assert find_file(snapshot, "preprocessor_config.json").is_file()
    assert "warning" not in capsys.readouterr().err


def test_a_folder_of_the_users_own_is_complete(server, fixtures, tmp_path, capsys):
    shutil.copytree(fixtures / "clip", tmp_path / "clip")
    ViT.from_pretrained(str(tmp_path / "clip"))
    assert capsys.readouterr().err == ""
    (tmp_path / "clip" / "preprocessor_config.json").unlink()
    ViT.from_pretrained(str(tmp_path / "clip"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"warning: {tmp_path / 'clip'}: ")
    assert "mean [0.481, 0.458, 0.408], std [0.269, 0.261, 0.276], size 30 px" in said
    assert not server.asked
