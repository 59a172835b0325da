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
from conftest import ROOT
from adapters import VLM
from data import Encoded
from fixtures.pictures import picture
from formats.files import InputError, write_tensors
from formats.peft import WEIGHTS
from llm import LLM
from lora import add_lora, load_lora, save_lora
from support import journal
from support.runs import RESUME_STATE
from test_vlm import command, interrupt

DATA = ["--adapter", "linear", "--val-size", "4", "--steps", "4", "--batch", "4", "--workers", "0",
        "--warmup", "1", "--save-every", "2", "--log-every", "1", "--max-tokens", "8"]
TINY = [*DATA, "--scenes", "12"]


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


# ---------------------------------------------------------------------------------------------------------
# Other people's files

def test_a_folder_of_ones_own_may_be_named_assets(tmp_path, monkeypatch, capsys):
    """`assets/vit` is the built-in encoder, wherever one is; another name there is the user's."""
    (tmp_path / "mine" / "assets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    shutil.copytree(ROOT / "assets" / "vit", "assets/other")
    Path("assets/vit").mkdir()  # no encoder
    assert command(monkeypatch, train, *TINY, "--vit", "assets/other", "--out", "run") == 0
    picture(20, 20).save("a.png")
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, sample, "mine/a.png", "--model", "mine/run") == 0
    monkeypatch.chdir("mine")
    assert command(monkeypatch, train, *TINY, "--out", "another") == 0
    saved = [json.loads(Path(f"{run}/config.json").read_text())["vit"] for run in ("run", "another")]
    assert saved == [str(tmp_path / "mine" / "assets" / "other"), "assets/vit"]


def test_other_files_in_a_runs_folder_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = [Path(name) for name in ("run/notes.txt", "run/.draft.tmp", "run/deep/.vim.tmp.swp",
                                      "run/lora.txt", "run/.checkpoint.safetensors.7.tmp")]
    Path("run/deep").mkdir(parents=True)
    for path in others:
        path.write_text("mine")
        os.utime(path, (0, 0))
    assert command(monkeypatch, train, *TINY, "--out", "run") == 0
    Path("run/.curves.png.7.vlm-tmp").write_text("a killed process left it")
    assert command(monkeypatch, train, "--resume", "run") == 0
    assert all(path.read_text() == "mine" for path in others)
    assert not any(Path("run").glob(".*.vlm-tmp"))


@pytest.mark.parametrize("name", ("metrics.jsonl", "config.json", "samples.png", "captions-me.jsonl", "lora"))
def test_a_folder_with_a_file_that_a_run_writes_is_refused_first(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "build", lambda *_: 1 / 0)
    Path("mine").mkdir()
    Path("mine", name).write_text("{}")
    Path("mine/.a.tmp").touch()
    line = refusal(monkeypatch, capsys, train, *TINY, "--out", "mine")
    assert f"mine: there is a {name} already" in line
    assert {path.name for path in Path("mine").iterdir()} == {name, ".a.tmp"}
    assert Path("mine", name).read_text() == "{}"


# ---------------------------------------------------------------------------------------------------------
# What is read again

def changed(state: dict):
    """The name of a tensor, what the error says, and a checkpoint's tensors, where it isn't as the run wrote
    it."""
    weight = next(name for name in state if name.startswith("weight.adapter.") and state[name].dim() == 2)
    name = weight.removeprefix("weight.")
    lora = next(name for name in state if name.startswith("weight.llm.") and name.endswith(".A"))
    for key in (weight, lora, f"exp_avg.{name}", f"exp_avg_sq.{name}", f"step.{name}"):
        tensor = state[key]
        yield key, f"'{key}' is missing", {k: v for k, v in state.items() if k != key}
        yield key, f"'{key}' is {tuple(tensor.shape)} float64", state | {key: tensor.double()}
        other = tensor[..., :1].clone() if tensor.dim() else torch.ones(3)
        yield key, key.removeprefix("weight.").removesuffix(".A"), state | {key: other}
    yield "losses", "'losses' is (1, 1) float32", state | {"losses": torch.ones(1, 1)}
    for key in ("weight.llm.norm.weight", f"exp_avg.x{name}", "scaler.scale", "other"):
        yield key, f"'{key}' is ", state | {key: torch.ones(64)}
    scale = lora.replace("weight.", "scale.").removesuffix(".A")
    yield scale, f"'{scale}' is () int64", state | {scale: torch.tensor(2)}


@pytest.mark.slow
def test_a_checkpoint_that_the_run_would_not_write_is_refused(run, monkeypatch, capsys):
    (run / "best.safetensors").unlink(missing_ok=True)  # which would be taken
    path = run / "checkpoint.safetensors"
    state = load_file(path)
    for key, said, tensors in changed(state):
        write_tensors(path, tensors, {"step": "2"})
        line = refusal(monkeypatch, capsys, train, "--resume", "run")
        assert "run/checkpoint.safetensors: " in line and said in line, (said, line)
        if not key.startswith(RESUME_STATE):  # which --resume alone looks at
            with pytest.raises(InputError, match="run/checkpoint.safetensors: "):
                VLM.from_pretrained("run")
    for step in ("-1", "5", "1.5", "x", "", "9" * 5000):
        write_tensors(path, state, {"step": step})
        line = refusal(monkeypatch, capsys, train, "--resume", "run")
        assert "run/checkpoint.safetensors: its step is " in line
    write_tensors(path, state, {"step": "2"})
    assert command(monkeypatch, train, "--resume", "run") == 0


@pytest.mark.parametrize("line", ("[]", "7", "no", '{"loss": 1}', '{"step": 1.5}', '{"step": true}',
                                  '{"step": -1}', '{"step": 1, "loss": "low"}',
                                  '{"step": 1, "scores": [1]}', '{"step": 1, "scores": {"val": {"x": "y"}}}'))
def test_a_line_that_is_not_a_runs_is_named_and_kept(line, tmp_path):
    file = tmp_path / "metrics.jsonl"
    content = f'{{"step": 1, "loss": 2.5}}\n{line}\n{{"step": 2}}\n{{"st'
    file.write_text(content)
    log = journal.Log(tmp_path)
    with pytest.raises(InputError, match="metrics.jsonl: line 2: not a line of a run"):
        log.begin(1)
    assert file.read_text() == content
    file.write_text(content.replace(line, '{"step": 1, "val": null}'))
    log.begin(1)
    log.close()
    assert file.read_text().count("\n") == 2  # neither the second step nor what was cut short


def test_kept_features_are_compared_with_what_the_run_would_keep(begun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vlm = VLM.from_pretrained(str(begun))
    args = train.make_parser().parse_args([*TINY, "--features", "kept", "--quiet"])
    captions = train.Shapes(12)
    whole = Encoded(vlm, captions, args).kept
    file, = Path("kept").iterdir()
    state = load_file(file)
    for key, value in (("rows", state["rows"][:5].clone()), ("rows", state["rows"].double()),
                       ("rows", state["rows"][..., :9].clone()), ("marks", state["marks"][:3].clone()),
                       ("marks", state["marks"].float()), ("other", torch.ones(3))):
        save_file(state | {key: value}, file)
        with pytest.raises(InputError, match=f"kept/.*: tensor '{key}' is "):
            Encoded(vlm, captions, args)
    save_file({"rows": state["rows"], "marks": torch.zeros(12, dtype=torch.bool)}, file)
    with pytest.raises(InputError, match="12 of 12 pictures can't be read"):
        Encoded(vlm, captions, args)
    save_file(state, file)
    assert torch.equal(Encoded(vlm, captions, args).kept, whole)


def test_a_lora_in_parts_or_without_measure_is_refused(fixtures, tmp_path):
    llm = LLM.from_pretrained(str(fixtures / "llama"))
    add_lora(llm, 2, 4)
    save_lora(llm, tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / WEIGHTS
    options, state = json.loads(config.read_text()), load_file(weights)
    part = next(iter(state)).removesuffix("lora_A.weight")
    for changed, tensors, said in (
            ({"lora_alpha": float("inf")}, state, "lora_alpha is inf"),
            ({}, {k: v for k, v in state.items() if not k.startswith(part)},
             "5 layers have an update, target_modules names 6"),
            ({}, state | {f"{part}lora_A.weight": state[f"{part}lora_A.weight"].to(torch.float8_e4m3fn)},
             "is not the low-rank update")):
        config.write_text(json.dumps(options | changed))
        save_file(tensors, weights)
        with pytest.raises(InputError, match=said):
            load_lora(LLM.from_pretrained(str(fixtures / "llama")), tmp_path)


# ---------------------------------------------------------------------------------------------------------
# What can be missed stops nothing

def test_a_run_whose_name_has_two_lines_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, train, *TINY, "--out", "two\nlines") == 0
    assert {"curves.png", "samples.png", "checkpoint.safetensors"} <= {*os.listdir("two\nlines")}
    assert "warning" not in capsys.readouterr().err


def test_what_cannot_be_drawn_costs_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("curves", "contact_sheet"):
        monkeypatch.setattr(train, name, lambda *_: {}["no such font"])
    assert command(monkeypatch, train, *TINY, "--out", "run") == 0
    captured = capsys.readouterr()
    assert captured.err.count("warning: run/curves.png: can't be drawn (KeyError: 'no such font')") == 2
    assert captured.err.count("warning: run/samples.png: can't be drawn") == 1
    assert "| test (4) " in captured.out and Path("run/checkpoint.safetensors").exists()


@pytest.mark.parametrize("options", ((), ("--lora", "2", "--train", "adapter"), ("--train", "adapter,llm")))
def test_the_best_weights_are_kept_and_taken(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = [*TINY, *options, "--steps", "6", "--save-every", "2"]

    def weights(file: str) -> dict:
        return {name: x for name, x in load_file(file).items() if name.startswith(("weight.", "scale."))}

    def same(vlm: VLM, kept: dict) -> bool:
        state = vlm.state()
        return state.keys() == kept.keys() and all(torch.equal(state[name], x) for name, x in kept.items())

    def validated(*losses: float | None):
        said = iter(losses)
        monkeypatch.setattr(train.Run, "validate", lambda this: {"val": next(said)})

    # As good as never again after step 2: its weights are kept, scored, and taken
    validated(0.5, 0.9, 0.7)
    assert command(monkeypatch, train, *common, "--out", "run") == 0
    assert "the lowest validation loss was that of step 2" in capsys.readouterr().out
    best, last = weights("run/best.safetensors"), weights("run/checkpoint.safetensors")
    assert best.keys() == last.keys() and not all(torch.equal(best[name], last[name]) for name in best)
    assert same(VLM.from_pretrained("run"), best) and not same(VLM.from_pretrained("run"), last)

    # Its scores are those of a run that ends there, and asked for again they are the same
    scored = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])["scores"]
    assert command(monkeypatch, train, "--resume", "run") == 0
    assert json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])["scores"] == scored

    # Killed between, it ends with the same best
    validated(0.5, 0.9, 0.7)
    save = train.Run.save_checkpoint

    def saved(folder, step, *rest):
        save(folder, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as once:
        once.setattr(train.Run, "save_checkpoint", saved)
        assert command(once, train, *common, "--out", "parts") == 130
    assert command(monkeypatch, train, "--resume", "parts") == 0
    again = weights("parts/best.safetensors")
    assert all(torch.equal(best[name], again[name]) for name in best)

    # Where the last are the best there is one file; a loss that is no number is no best
    validated(0.5, float("nan"), 0.4)
    assert command(monkeypatch, train, *common, "--out", "last") == 0
    assert not Path("last/best.safetensors").exists()


def caption_file(count: int = 24) -> None:
    Path("photos").mkdir()
    for i in range(count):
        picture(20 + i, 30).save(f"photos/{i}.png")
    rows = [f"{i}.png,a picture {i} of many\n" for i in range(count)]
    Path("c.csv").write_text("image,caption\n" + "".join(rows))


def test_a_picture_that_is_gone_costs_its_sample_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    caption_file()
    learn = train.Run.learn

    def learned(self, signals):
        learn(self, signals)
        self.val.captions.paths[0].unlink()

    monkeypatch.setattr(train.Run, "learn", learned)
    assert command(monkeypatch, train, *DATA, "--data", "c.csv", "--images", "photos", "--val", "c.csv",
                   "--out", "run") == 0
    captured = capsys.readouterr()
    assert "| val (4) " in captured.out and Path("run/samples.png").exists()
    assert captured.err.count("warning: not drawn among the samples: ") == 1


# ---------------------------------------------------------------------------------------------------------
# When a run is saved, and how

class Clock:
    """In place of the module `time`: four minutes pass between two looks of Signals."""

    def __init__(self):
        self.seconds = 0.0

    def monotonic(self) -> float:
        self.seconds += 240
        return self.seconds

    def time(self) -> float:
        self.seconds += 0.1
        return self.seconds


def test_ten_minutes_of_work_are_lost_at_most(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*TINY, "--steps", "8", "--save-every", "100", "--log-every", "3", "--lr", "1e-2"]
    assert command(monkeypatch, train, *options, "--out", "whole") == 0
    steps, save = [], train.Run.save_checkpoint

    def saved(folder, step, *rest):
        save(folder, step, *rest)
        steps.append(step)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Run, "save_checkpoint", saved)
    monkeypatch.setattr(journal, "time", Clock())
    assert command(monkeypatch, train, *options, "--out", "parts") == 130
    assert command(monkeypatch, train, "--resume", "parts") == 0
    assert steps == [2, 4, 6, 8]
    whole, parts = (load_file(f"{run}/checkpoint.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    whole, parts = ([json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
                    for run in ("whole", "parts"))
    assert [(line["step"], line.get("loss")) for line in whole] == [
        (line["step"], line.get("loss")) for line in parts]


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


def test_a_resumed_run_names_its_pictures_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    caption_file()
    Path("link").mkdir()
    Path("link/c.csv").symlink_to(tmp_path / "c.csv")
    for i in range(24):
        Path(f"link/{i}.png").symlink_to(tmp_path / f"photos/{i}.png")
    Path("shapes").mkdir()  # is not the data of a run of the shapes world
    options = [*DATA, "--data", "link/c.csv", "--val", "link/c.csv"]
    assert command(monkeypatch, train, *options, "--out", "whole") == 0
    interrupt(monkeypatch, *options, "--out", "parts")
    interrupt(monkeypatch, *TINY, "--out", "world")
    monkeypatch.chdir("photos")
    assert command(monkeypatch, train, "--resume", "../parts") == 0
    whole, parts = ([json.loads(line)["image"] for line in Path(f"../{run}/captions-val.jsonl").open()]
                    for run in ("whole", "parts"))
    assert whole == parts and all(Path(name).parent == tmp_path / "link" for name in whole)
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, train, "--resume", "world") == 0


# ---------------------------------------------------------------------------------------------------------
# Progress

class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_fits_the_terminal_and_leaves_nothing(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(journal.os, "get_terminal_size", lambda *_: os.terminal_size((24, 9)))
    monkeypatch.setattr(terminal, "fileno", lambda: 1)
    now = iter(range(100))
    monkeypatch.setattr(journal.time, "time", lambda: next(now))
    batches = [(range(4), None), (range(4), None), (range(2), None)]
    assert [*journal.counted(batches, "encoded", 10, "captions.val.txt", stream=terminal)] == batches
    drawn = [line for line in terminal.getvalue().split("\r") if line]
    assert drawn == ["encoded 4/10 pictures  ", "encoded 8/10 pictures  ", "encoded 10/10 pictures ",
                     " " * 23]
    quiet = Terminal()
    [*journal.counted(batches, "encoded", 10, "c", True, quiet)]
    assert quiet.getvalue() == ""


def test_long_work_tells_how_long_and_of_what(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal.Line, "due", lambda line: line.shown)
    terminal = Terminal()
    terminal.reconfigure = lambda **_: None
    monkeypatch.setattr(train.sys, "stdout", terminal)
    assert command(monkeypatch, train, *TINY, "--out", "run") == 0
    said = terminal.getvalue()
    assert "\rencoded 4/4 pictures  0:00 left  shapes (test) " in said
    assert re.search(r"\rencoded 4 pictures of shapes \(test\) in \d+ s\n", said)  # where that line was
    assert "\r4/4 pictures  0:00 left  shapes (unseen) " in said  # while it is scored
