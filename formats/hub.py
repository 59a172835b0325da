"""Finds a model by its name: a folder, the Hugging Face cache, or a download into it.

In the cache, models--OWNER--MODEL/refs/REVISION names a commit. Its files lie in snapshots/COMMIT/. An empty
file in .no_exist/COMMIT/ says that the commit has no file of that name.
"""
import contextlib
import re
from pathlib import Path

from formats.download import COMMIT, home, listing, offline, path_in, save
from formats.files import InputError, guard, read_json, warn, write_text

HERE = Path(__file__).resolve().parent.parent
NAME = re.compile(r"(?!.*(--|\.\.))(?P<model>(\w[\w.-]*/)?\w[\w.-]*)"
                  r"(@(?P<revision>[\w+#=-][\w.+#=-]*(/[\w+#=-][\w.+#=-]*)*))?", re.ASCII)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SMALL_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
               "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
               "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json")

incomplete: set[Path] = set()  # snapshots whose missing files this process couldn't fetch


def shards(folder: Path) -> list[Path]:
    """Lists the safetensors files of a checkpoint's folder: one, or those in its index. Raises InputError."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [folder / WEIGHTS]
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / INDEX}: no weight_map")
    for file in weight_map.values():  # a shard's name comes from outside: it may not lead out of the folder
        if not isinstance(file, str) or not re.fullmatch(r"[\w][\w.-]*\.safetensors", file):
            raise InputError(f"{folder / INDEX}: {file!r} is not a plain safetensors file name")
    return [folder / file for file in sorted(set(weight_map.values()))]


def built_in(name: str) -> Path | None:
    """The folder of this project that `assets/…` names, if there is one."""
    folder = HERE / name
    return folder if name.startswith("assets/") and folder.is_dir() else None


def find_checkpoint(name: str, weights: bool = True) -> Path:
    """Finds a model's folder: 1. on disk, `assets/…` in this project first, from any working directory; 2. in
    the Hugging Face cache; 3. by a download of the files needed into that cache.

    OWNER/MODEL@REVISION names a branch, a tag, a commit or a pull request ("refs/pr/1") instead of the main
    branch. `weights=False` is for a tokenizer alone, without the tensors. Raises InputError.
    """
    with guard(name, "no name of a model"):
        folder = built_in(name) or Path(name).expanduser()
        if folder.is_dir():
            return folder
        match = NAME.fullmatch(name)
    if not match:
        raise InputError(f"{name}: no such folder, nor a hub name such as 'google/siglip-base-patch16-224'")
    model = match["model"]
    revision = match["revision"] or "main"

    # Where the cache has it
    cache = path_in("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") or home() / "hub"
    repository = cache / f"models--{model.replace('/', '--')}"
    reference = repository / "refs" / revision

    # A snapshot in the cache
    with guard(reference):
        commit = reference.read_text(errors="replace").strip() if reference.is_file() else revision
        snapshot = repository / "snapshots" / commit
        cached = COMMIT.fullmatch(commit) and snapshot.is_dir()
        if cached and weights:
            if (snapshot / "config.json").is_file() and all(file.is_file() for file in shards(snapshot)):
                return snapshot
        elif cached:  # `find_file` gets what else a tokenizer needs
            if any((snapshot / file).is_file() for file in ("tokenizer.json", "vocab.json", "config.json")):
                return snapshot

    # A download; if the snapshot lacks files, they are fetched from the same commit
    if offline():
        raise InputError(f"{name}: no such folder, not in {cache}, and {offline()} forbids a download")
    try:
        snapshot = download(model, repository, commit if cached else revision, weights)
        if revision != snapshot.name:
            with guard(reference, "can't be written"):
                reference.parent.mkdir(parents=True, exist_ok=True)
            write_text(reference, snapshot.name)  # last: a download cut short is never taken for a whole one
        return snapshot
    except InputError as error:
        raise InputError(f"{name}: no such folder, and the download failed: {error}") from None


def download(model: str, repository: Path, revision: str, weights: bool) -> Path:
    """Downloads the files needed of a model; returns the snapshot's folder. Raises InputError."""
    commit, files = listing(model, revision)
    snapshot = repository / "snapshots" / commit

    # Only safetensors are read
    if weights and not {WEIGHTS, INDEX} & files.keys():
        problem = f"the repository has no {WEIGHTS}"
        if pickled := [file for file in files if re.fullmatch(r"pytorch_model.*\.bin", file)]:
            problem += (f", just {pickled[0]}, which isn't read, for it may hold code; a revision that has "
                        f"safetensors can be named, such as a pull request: {model}@refs/pr/1")
        raise InputError(problem)

    # The small files first, then the index, then the shards that it lists
    save_small(model, snapshot, files)
    if weights and WEIGHTS not in files:
        save(model, snapshot, INDEX, *files[INDEX])
    for shard in shards(snapshot) if weights else ():
        if shard.name not in files:
            raise InputError(f"the repository has no {shard.name}")
        save(model, snapshot, shard.name, *files[shard.name])
    return snapshot


def save_small(model: str, snapshot: Path, files: dict[str, tuple]) -> None:
    """Downloads the small files that a snapshot lacks. Marks those that the model doesn't have, so that they
    aren't looked for again. Raises InputError."""
    for file in SMALL_FILES:
        if file in files:
            save(model, snapshot, file, *files[file])
            continue
        with contextlib.suppress(OSError):  # in a read-only cache there is no mark: it is looked for again
            marker(snapshot, file).parent.mkdir(parents=True, exist_ok=True)
            marker(snapshot, file).touch()


def marker(snapshot: Path, file: str) -> Path:
    """Returns the path of the mark that says that a snapshot's commit has no `file`."""
    return snapshot.parent.parent / ".no_exist" / snapshot.name / file


def find_file(folder: Path, name: str) -> Path | None:
    """Returns the path of an optional file of a checkpoint; None if there is none. Raises InputError.

    A snapshot in the cache may hold only the files that another program needed. If its commit may have the
    file, the hub is asked, once, for all small files that the snapshot lacks. If that fails, a warning names
    them.
    """
    path = folder / name
    with guard(path):
        for snapshot in path.absolute().parents:
            if snapshot.parent.name == "snapshots" and snapshot.parent.parent.name.startswith("models--"):
                if path.absolute().relative_to(snapshot).as_posix() in unknown_files(snapshot):
                    complete(snapshot)
        return path if path.is_file() else None


def unknown_files(snapshot: Path) -> list[str]:
    """Lists the small files that a snapshot lacks although its commit may have them."""
    return [file for file in SMALL_FILES
            if not (snapshot / file).is_file() and not marker(snapshot, file).is_file()]


def complete(snapshot: Path) -> None:
    """Fetches the small files that a snapshot lacks; warns, once, if that fails."""
    # .gitattributes comes only with a whole repository: offline, such a snapshot counts as whole
    if snapshot in incomplete or offline() and (snapshot / ".gitattributes").is_file():
        return
    model = snapshot.parent.parent.name.removeprefix("models--").replace("--", "/")
    try:
        if offline():
            raise InputError(f"{offline()} is set")
        save_small(model, snapshot, listing(model, snapshot.name)[1])
    except InputError as error:
        incomplete.add(snapshot)
        warn(f"{model}: the cache lacks {', '.join(unknown_files(snapshot))}, which the model may have and "
             f"which can't be fetched: {error}")
