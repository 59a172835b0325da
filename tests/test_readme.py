"""What README.md and RESULTS.md show is run as it stands there, on small stand-ins for what they name, with
no network."""
import ast
import itertools
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image

import experiments
import sample
import train
from adapters import VLM
from support.console import flag
from support.shapes import Shapes
from fixtures import start
from formats.shards import read_shard
from llm import LLM
from lora import lora_layers, save_lora
from test_scale import write_tar
from test_vlm import SMALL, command, interrupt

README = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "RESULTS.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
# With --data; after two steps at a lower rate it still says something
TINY_SET = "--steps 2 --val-size 4 --batch 4 --warmup 1 --lr 1e-3 --workers 0 --device cpu".split()
TINY = ["--scenes", "8", *TINY_SET]
REFERENCE = "needs transformers, peft or tokenizers"
ELSEWHERE = {  # where a command is run instead, or why it isn't
    "pip install -r requirements.txt": ".ci/run", "pytest": "this is it",
    "python tests/experiments.py": "test_a_comparison", "python tests/fixtures/make.py": REFERENCE,
    "python tests/fixtures/exports.py": REFERENCE, "python tests/real_sizes.py": REFERENCE,
    "python tests/compare_tokenizers.py": REFERENCE}
LONG = ("python tests/bench.py", "python tests/gpu.py")  # take minutes: their arguments are read, no more
HUB = {"google/siglip-base-patch16-224": "assets/vit", "HuggingFaceTB/SmolLM2-135M": "assets/llm",
       "HuggingFaceTB/SmolVLM-256M-Instruct": "tests/fixtures/smolvlm",
       "vit-tiny": "assets/vit", "caption-lm-llama": "assets/llm", "SmolLM2-135M-Instruct": "assets/llm"}


def commands() -> list[str]:
    """Those in fenced blocks, and those in the text that begin with python."""
    blocks = "".join(text.replace("\\\n", "") for language, text in FENCE.findall(README) if not language)
    lines = re.findall(r"^(?:pip|python|torchrun) .*", blocks, re.M)
    lines += re.findall(r"`(python [^`]+)`", FENCE.sub("", README))
    parts = [part for line in lines for part in re.sub(" +# .*", "", line).split("&&")]
    return [*dict.fromkeys(" ".join(part.split()) for part in parts)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all that the commands name, and in kept/ what they find in out/."""
    place = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(place)
        for path in (*ROOT.glob("*.py"), ROOT / "assets", ROOT / "tests"):
            Path(path.name).symlink_to(path)
        for name, folder in HUB.items():
            repository = Path(f"hub/models--{name.replace('/', '--')}")
            (repository / "snapshots").mkdir(parents=True)
            (repository / "snapshots" / "0123456").symlink_to(ROOT / folder)
            (repository / "refs").mkdir()
            (repository / "refs" / "main").write_text("0123456")
        scenes, names = Shapes(6), [f"{i}.jpg" for i in range(6)]
        for folder in ("photos", "shards"):
            Path(folder).mkdir()
        Path("Images").symlink_to("photos")
        for i, name in enumerate(names):
            scenes.picture(i).save(f"photos/{name}")
        for name in "photo.jpg holiday.jpg cat.png query.jpg a.jpg b.jpg one.jpg two.jpg".split():
            scenes.picture(0).save(name)
        for name in "captions.csv test.csv captions.train.txt captions.dev.txt val.csv".split():
            folder = "photos/" * (name == "val.csv")  # the one without --images
            Path(name).write_text("image,caption\n" + "".join(
                f'{folder}{name},"{said}"\n' for i, name in enumerate(names)
                for said in scenes.scene(i).captions()))
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a star"}]
        Path("questions.json").write_text(json.dumps([dict(image=n, conversations=turns) for n in names]))
        pair = [("a.jpg", Path("a.jpg").read_bytes()), ("a.txt", b"a star")]
        for i in range(100):
            write_tar(Path(f"shards/{i:03}.tar"), pair)
        options = ["--from", ROOT / "tests/fixtures/smolvlm", "--data", "questions.json", *TINY_SET]
        assert command(monkeypatch, train, *options, "--images", "photos", "--out", "kept/my-vlm") == 0
        interrupt(monkeypatch, "--adapter", "qformer", *SMALL, *TINY, "--lora", "2", "--save-every", "1",
                  "--out", "kept/my-run")
        save_lora(VLM.from_pretrained("kept/my-run").llm, "kept/my-run/lora/llm")  # as at a run's end
        start.make(Path("kept/public"))
    yield place
    shutil.rmtree(place)


@pytest.fixture
def here(place, monkeypatch):
    """That folder, as a user would find it, to run commands in."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_CACHE", "hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.rmtree("out", ignore_errors=True)
    Path("captions.jsonl").unlink(missing_ok=True)  # two commands write it
    shutil.copytree("kept", "out")
    return place


@pytest.fixture
def run(here, monkeypatch, capsys):
    """Runs the words of a command; returns what it prints. A script runs in this process if it can."""
    def run(words: list[str]) -> str:
        *words, redirected, file = words if ">" in words else [*words, "", ""]
        if words[0] == "torchrun":
            words[words.index("--nproc_per_node") + 1] = "2"
            words = ["python", "-m", "torch.distributed.run", "--standalone", *words[1:]]
        if redirected or "-m" in words:
            done = subprocess.run([sys.executable, *words[1:]], text=True, capture_output=True)
            code, out, err = done.returncode, done.stdout, done.stderr
            Path(file or "said").write_text(out)
        else:
            monkeypatch.setattr(sys, "argv", words[1:])
            monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n"))
            code = 0
            try:
                runpy.run_path(words[1], run_name="__main__")
            except SystemExit as stop:
                code = stop.code
            out, err = capsys.readouterr()
        assert not code, err
        return out
    return run


def check_training(words: list[str], said: str, run) -> None:
    folder = Path(sample.newest_run())
    promised = re.search(r"`out/<run>/` holds (.*?)\n\n", README, re.S)[1]
    files = {*re.findall(r"`([\w./]+)`", promised)}
    if not {"--lora", "--lora-from", "--resume"} & {*words} or ("--lora", "0") in zip(words, words[1:]):
        files.remove("lora/")
    assert len(files) > 4 and all((folder / name).exists() for name in files)
    for name in ("curves.png", "samples.png"):
        Image.open(folder / name).verify()
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and last["scores"] and all(f"| {label}" in said for label in last["scores"])
    assert run(re.search("try it: (.*)", said)[1].split()).strip()


def check_sample(words: list[str], said: str) -> None:
    options = dict(zip(words, words[1:]))
    leading = itertools.takewhile(lambda word: word[0] != "-", words[2:])
    pictures = [path for name in leading for path in sample.pictures_of(name)]
    lines = Path(options.get(">") or options.get("--save") or "/dev/null").read_text().splitlines()
    if "--export" in words:
        assert VLM.from_pretrained(options["--export"]).config["adapter"] == "pixelshuffle"
    elif "--data" in words:
        assert "BLEU-4" in said and "CIDEr-D" in said and len(lines) == 6
    elif "--json" in words:
        assert [json.loads(line)["image"] for line in lines] == pictures and len(pictures) == 6
    elif len(pictures) > max(1, options.get("--prompt", "").count("<image>")):
        lines = said.splitlines()
        assert len(lines) == len(pictures)
        assert all(line.startswith(f"{name}: ") for line, name in zip(lines, pictures))
    else:
        assert pictures and said.strip()
    if "--attention" in words:
        Image.open(options["--attention"]).verify()


@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith(tuple(ELSEWHERE))])
def test_command(command, run):
    words = shlex.split(command.replace("12,10,7", "6,4,2").replace(" --compile", ""))  # six layers; no wait
    if "train.py" in words:
        check_training(words, run([*words, *(TINY_SET if "--data" in words else TINY)]), run)
    elif command.startswith(LONG):
        assert "usage: " in run([*words, "--help"])  # which comes after the arguments before it are read
    else:
        said = run(words)
        if "sample.py" in words:
            check_sample(words, said)


def test_a_comparison(here, monkeypatch, capfd):
    command = next(command for command in commands() if "COMPARISON" in command)
    (label, options), *_ = experiments.COMPARISONS["layouts"].items()
    monkeypatch.setitem(experiments.COMPARISONS, "layouts", {label: options})
    monkeypatch.setattr(experiments, "ROOT", here)
    words = command.replace("COMPARISON", "layouts").split()
    monkeypatch.setattr(sys, "argv", [*words[1:], *TINY, "--seeds", "1"])
    experiments.main()
    assert f"| {label} | " in capfd.readouterr().out


@pytest.mark.parametrize("option", ("--seed", "--out=x", "--features"))
def test_a_comparison_sets_some_options_itself(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiments.py", "layouts", option, "1"])
    monkeypatch.setattr(experiments, "compare", lambda *_: pytest.fail("begun"))
    with pytest.raises(SystemExit, match="2"):
        experiments.main()
    assert f"{option} is set for each run" in capsys.readouterr().err


def test_names_in_the_text():
    """Options, comparisons of experiments.py, rows of real_sizes.py; and commands to be run elsewhere."""
    known = "".join((ROOT / f"{name}.py").read_text(encoding="utf-8") for name in (
        "train", "sample", "tests/experiments", "tests/bench", "tests/real_sizes", "tests/layers"))
    known += "".join(f'"{flag(name)}"' for name in train.ADAPTER_SIZES)
    found = [{*re.findall(pattern, README, re.M)} for pattern in (
        r"(?<![\w-])--[a-z][\w-]*", r"experiments\.py ([a-z-]+)",
        r"^\| ([\w.-]+(?: --no-split)?)[^|]*\| [\d,]+ M \|")]
    assert min(map(len, found)) > 4
    assert {name for name in set().union(*found) if f'"{name}"' not in known} == {"--nproc_per_node"}
    assert all(any(c.startswith(start) for c in commands()) for start in ELSEWHERE)


@pytest.mark.parametrize("block", [text for language, text in FENCE.findall(README) if language == "python"])
def test_python(block, here, monkeypatch):
    picture = Image.open("photo.jpg")
    names = dict(picture=picture, one=picture, two=picture,
                 llm=LLM.from_pretrained("assets/llm"), another=LLM.from_pretrained("assets/llm"))
    if "load_dataset" in block:
        rows = [dict(image=picture, caption=f"picture {i}") for i in range(1003)]
        hub = types.SimpleNamespace(load_dataset=lambda *_, **how: rows)
        monkeypatch.setitem(sys.modules, "datasets", hub)
    values = [(eval if isinstance(node, ast.Expr) else exec)(ast.unparse(node), names)
              for node in ast.parse(block).body]
    if "load_dataset" in block:
        found = [pair for path in sorted(Path("shards").glob("hub-*.tar")) for pair in read_shard(path)]
        assert [pair.said for pair in found] == [[[("", row["caption"])]] for row in rows]
        assert found[0] == "hub-00000.tar/0000" and found[-1] == "hub-00001.tar/0002"
        assert Image.open(io.BytesIO(found[-1].file)).size == picture.size
    elif "vlm" in names:
        assert all(len(said) == 1 and isinstance(said[0], str) for said in values[-2:])
    else:
        names["restore"]()
        layers, others = (lora_layers(names[name]) for name in ("llm", "another"))
        assert layers and all(torch.equal(layer.A, others[name].A) for name, layer in layers.items())
