"""A run's folder: nothing of anyone's is lost there, and nothing in it is trusted."""
import io
import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
import train
from adapters import VLM
from data import Encoded
from fixtures.pictures import picture
from formats.files import InputError, write_tensors
from formats.peft import WEIGHTS
from llm import LLM
from lora import add_lora, load_lora, save_lora
from support import journal
from test_vlm import command, interrupt

TINY = ["--adapter", "linear", "--scenes", "12", "--val-size", "4", "--steps", "4", "--batch", "4",
        "--workers", "0", "--warmup", "1", "--save-every", "2", "--log-every", "1", "--max-tokens", "8"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run after two of its four steps."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        interrupt(monkeypatch, *TINY, "--lora", "2", "--out", "run")
    return folder / "run"


@pytest.fixture
def run(begun, tmp_path, monkeypatch):
    """A copy of it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(begun, "run")
    return Path("run")


def refusal(monkeypatch, capsys, module, *arguments) -> str:
    """The one line with which a command line ends."""
    capsys.readouterr()
    assert command(monkeypatch, module, *arguments) == 2, arguments
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    return line


@pytest.mark.skipif(os.name != "posix", reason="no modes")
def test_files_of_a_run_have_the_modes_that_the_user_asks_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o027)
    try:
        assert command(monkeypatch, train, *TINY, "--lora", "2", "--features", "kept", "--out", "run") == 0
    finally:
        os.umask(before)
    files = [path for folder in ("run", "kept") for path in Path(folder).rglob("*") if path.is_file()]
    assert len(files) > 8 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_where_captions_go_is_tried_first(run, monkeypatch, capsys):
    monkeypatch.setattr(sample.VLM, "from_pretrained", lambda *_: 1 / 0)
    picture(30, 30).save("a.png")
    Path("folder").mkdir()
    for file, said in (("no/where.txt", "no/where.txt: No such file or directory"),
                       ("folder", "folder: not a file that can be replaced"), ("", "not a file"),
                       (os.devnull, f"{os.devnull}: not a file that can be replaced")):
        for arguments in (["--data", "shapes", "--save", file], ["a.png", "--attention", file]):
            assert said in refusal(monkeypatch, capsys, sample, *arguments, "--model", "run")
    with pytest.raises(ZeroDivisionError):
        command(monkeypatch, sample, "a.png", "--attention", "new.png", "--model", "run")
    assert {path.name for path in Path().iterdir()} == {"a.png", "folder", "run"}
