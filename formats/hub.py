"""Where a name of a model leads: a folder, the Hugging Face cache, or a download into it."""
import json
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

import torch

from formats.files import InputError, guard, read_json, write_text

HERE = Path(__file__).resolve().parent.parent
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
               "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
               "merges.txt", "qformer_tokenizer/tokenizer.json")


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: one, or those its index lists."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [folder / WEIGHTS]
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / INDEX}: no weight_map")
    for file in weight_map.values():  # a shard's name comes from outside: it may not lead out of the folder
        if not isinstance(file, str) or not re.fullmatch(r"[\w][\w.-]*\.safetensors", file):
            raise InputError(f"{folder / INDEX}: {file!r} is not a plain safetensors file name")
    return [folder / file for file in sorted(set(weight_map.values()))]


def find_checkpoint(name: str, weights: bool = True) -> Path:
    """The folder a name leads to: 1. a folder on disk (also `assets/…` beside this file); 2. the Hugging Face
    cache; 3. a download of just the files needed, into that cache. `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HOME`
    and `HF_HUB_CACHE` mean what they mean to the hub's own client. `weights`: with its tensors, not for its
    tokenizer alone. Raises InputError."""
    with guard(name, "no name of a model"):
        for folder in (Path(name).expanduser(), HERE / name):
            if folder.is_dir():
                return folder
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name):
        raise InputError(f"{name}: no such folder, nor a hub name such as 'google/siglip-base-patch16-224'")
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    repository = cache / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / "main"
    if reference.is_file():
        with guard(reference):
            snapshot = repository / "snapshots" / Path(reference.read_text().strip()).name
            if weights:
                found = all(file.is_file() for file in (snapshot / "config.json", *shards(snapshot)))
            else:
                found = any((snapshot / file).is_file() for file in ("tokenizer.json", "vocab.json"))
        if found:
            return snapshot
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise InputError(f"{name}: no such folder, not in {cache}, and HF_HUB_OFFLINE forbids a download")
    return download(name, repository, weights)


def download(name: str, repository: Path, weights: bool) -> Path:
    """Fetches a checkpoint's files into `repository`, in the cache's own layout; returns the snapshot folder.
    `refs/main` is written last, so that a download cut short is never taken for a whole one."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

    def fetch(file: str) -> None:
        if (snapshot / file).is_file():
            return
        if file not in files:
            raise InputError(f"{name}: the repository holds no {file}")
        print(f"downloading {name}/{file}", file=sys.stderr)
        digest = (files[file].get("lfs") or {}).get("sha256")  # which torch.hub compares
        part = (snapshot / file).with_name(f".{Path(file).name}.part")
        part.parent.mkdir(exist_ok=True)
        torch.hub.download_url_to_file(f"{endpoint}/{name}/resolve/{revision}/{file}", str(part), digest,
                                       progress=sys.stderr.isatty())
        if part.stat().st_size != files[file].get("size", part.stat().st_size):
            part.unlink()
            raise ValueError(f"{file} came incomplete: run the command again")
        os.replace(part, snapshot / file)

    with guard(name, "no such folder, and the download failed"):
        try:
            about = f"{endpoint}/api/models/{name}/revision/main?blobs=true"
            with urllib.request.urlopen(about, timeout=30) as reply:
                info = json.load(reply)
            revision, files = info["sha"], {file["rfilename"]: file for file in info["siblings"]}
            if not re.fullmatch(r"[0-9a-f]{6,64}", revision):
                raise ValueError(f"revision {revision!r}")
            snapshot, reference = repository / "snapshots" / revision, repository / "refs" / "main"
            snapshot.mkdir(parents=True, exist_ok=True)
            for file in SMALL_FILES + (INDEX,) * (weights and WEIGHTS not in files):
                if file in files:
                    fetch(file)
            for shard in shards(snapshot) if weights else ():
                fetch(shard.name)
            reference.parent.mkdir(exist_ok=True)
            write_text(reference, revision)
            return snapshot
        except urllib.error.HTTPError as error:
            hint = {401: "no such model, or it needs a login: download it with the hub's own client, "
                         "then try again",
                    403: "access is restricted: ask for it on the model's page",
                    404: "no such model, or a file is gone"}.get(error.code, error.reason)
            raise InputError(f"{name}: {endpoint} answered {error.code}: {hint}") from None
