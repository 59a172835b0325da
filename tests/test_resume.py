"""Nothing is lost: runs that end at any moment, by any cause, and go on as if nothing had been."""
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train
from formats import files
from support import console, journal
from adapters import VLM
from formats.files import write_file
from fixtures.pictures import picture
from test_vlm import QFORMER, QUICK_SET, command, interrupt

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded torch")

RUN = [*QFORMER, "--adapter-dropout", "0.1", "--lora", "2", "--lora-dropout", "0.1",
       "--scenes", "24",
       "--val-size", "4", "--steps", "10", "--batch", "6", "--save-every", "2", "--log-every", "1",
       "--warmup", "2",
       "--workers", "0", "--layout", "image-text:0.6,text-image:0.4", "--precision", "float32",
       "--max-tokens", "20",
       "--cache-features"]


def start(*options, before=lambda: None) -> int:
    """Runs train.py in a forked process, after `before`; returns its id. It prints to the file `said`."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        torch.set_num_threads(1)  # the threads of a pool don't come along
        sys.stdout = sys.stderr = open("said", "w", buffering=1)
        before()
        with pytest.MonkeyPatch.context() as monkeypatch:
            code = command(monkeypatch, train, *options)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end(pid: int) -> int:
    """The exit code of a forked process; minus the signal, if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish(*options, **kwargs) -> int:
    return end(start(*options, **kwargs))


def moments(act) -> None:
    """Has `act` called before and after each step of the optimizer and each change of a file, and when
    tensors are half written."""
    def hook(owner, name, half=False):
        function = getattr(owner, name)

        def hooked(*args, **kwargs):
            act()
            if half:
                result = function(*args, **kwargs)
                whole = Path(args[0]).read_bytes()
                Path(args[0]).write_bytes(whole[:len(whole) // 2])
                act()
                Path(args[0]).write_bytes(whole)
            else:
                result = function(*args, **kwargs)
            act()
            return result
        setattr(owner, name, hooked)

    for owner, name in ((os, "replace"), (os, "fsync"), (torch.optim.AdamW, "step"),
                        (train.Log, "add"), (train.Log, "begin")):
        hook(owner, name)
    hook(files, "write_safetensors", half=True)


def kill_at(moment: int):
    """Makes the process kill itself at one of its `moments`, counted from 1."""
    def before():
        count = iter(range(1, moment))
        moments(lambda: next(count, None) or os.kill(os.getpid(), signal.SIGKILL))
    return before


def lines(run: str) -> list[dict]:
    """metrics.jsonl, but for times."""
    timed = ("images_per_s", "tokens_per_s", "s_left")
    return [{key: value for key, value in json.loads(line).items() if key not in timed}
            for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def same(run: str, other: str) -> bool:
    """Whether two runs ended with the same bits, in all files."""
    files = [sorted(path.relative_to(r) for path in Path(r).rglob("*") if path.is_file())
             for r in (run, other)]
    if files[0] != files[1] or lines(run) != lines(other):
        return False
    for file in files[0]:
        if file.suffix == ".safetensors":
            one, two = (load_file(Path(r, file)) for r in (run, other))
            if one.keys() != two.keys() or not all(torch.equal(one[name], two[name]) for name in one):
                return False
    return True


@pytest.fixture
def unbroken(tmp_path, monkeypatch):
    """The run `whole`; also the weights that it had at each of its checkpoints."""
    monkeypatch.chdir(tmp_path)
    torch.optim.AdamW([torch.zeros(1)])  # imports a thousand modules, which each process had to import anew

    def keep():
        save = train.Run.save_checkpoint

        def kept(run, step, *rest):
            save(run, step, *rest)
            write_file(Path(f"weights-{step}"), lambda path: save_file(
                {name: p.detach().clone() for name, p in run.vlm.trained.items()}, path))
        train.Run.save_checkpoint = kept

    assert finish(*RUN, "--out", "whole", before=keep) == 0, Path("said").read_text()
    return {step: load_file(f"weights-{step}") for step in (2, 4, 6, 8, 10)}


@pytest.mark.slow
def test_a_run_that_is_killed_loses_nothing(unbroken):
    rng, kills, run = random.Random(0), 0, 0
    while kills < 12:
        run += 1
        options = [*RUN, "--out", f"run{run}"]
        while True:
            if kills % 5 == 4:  # from outside, at any moment whatever
                pid = start(*options)
                time.sleep(rng.uniform(0.3, 2.0))
                os.kill(pid, signal.SIGKILL)
                code = end(pid)
            else:
                code = finish(*options, before=kill_at(rng.randint(1, 60)))
            assert code in (0, -signal.SIGKILL), Path("said").read_text()
            if code == 0:
                break
            kills += 1
            if Path(f"run{run}/config.json").exists():  # before, there is nothing to go on with
                options = ["--resume", f"run{run}"]
            if Path(f"run{run}/checkpoint.safetensors").exists():  # what anyone reads is of one step
                vlm = VLM.from_pretrained(f"run{run}")
                found = {name: p for name, p in vlm.named_parameters() if name in unbroken[2]}
                assert found.keys() == unbroken[2].keys()
                assert any(all(torch.equal(weights[name], p) for name, p in found.items())
                           for weights in unbroken.values()), f"after {kills} kills"
        assert same("whole", f"run{run}")


@pytest.mark.slow
@pytest.mark.parametrize("number, cache", (
    (signal.SIGINT, ["--cache-features", "--layer", "6,2"]),
    (signal.SIGTERM, ["--no-cache-features", "--workers", "2"])))
def test_signals_save_first(number, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*RUN, *cache, "--log-every", "5", "--save-every", "5"]
    assert finish(*options, "--out", "whole") == 0

    def before():  # in the third step
        count, step = iter(range(2)), torch.optim.AdamW.step

        def stepped(*args, **kwargs):
            next(count, None) is None and os.kill(os.getpid(), number)
            return step(*args, **kwargs)
        torch.optim.AdamW.step = stepped

    assert finish(*options, "--out", "parts", before=before) == 128 + number
    *_, last = Path("said").read_text().splitlines()
    assert last == "stopped after step 3: python train.py --resume parts goes on"
    with safe_open("parts/checkpoint.safetensors", "pt") as state:
        assert state.metadata()["step"] == "3"
    assert lines("parts") == []  # step 5 is the first to have a line, of the losses of five steps
    assert finish("--resume", "parts") == 0, Path("said").read_text()
    assert same("whole", "parts")


def test_a_batch_that_can_not_be_read_is_a_step_all_the_same(tmp_path, monkeypatch, capsys):
    """Or the steps after it had other pictures in a resumed run."""
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        picture(20 + i, 30).save(f"{i}.png")
    Path("7.png").write_bytes(b"no picture")
    Path("c.csv").write_text("image,caption\n" + "".join(f"{i}.png,It is {i}\n" for i in range(12)))
    Path("val.csv").write_text("image,caption\n1.png,It is 1\n")
    options = [*QFORMER, *QUICK_SET, "--data", "c.csv", "--val", "val.csv", "--batch", "1", "--steps", "8",
               "--warmup", "0", "--no-cache-features", "--save-every", "1", "--log-every", "1"]
    assert command(monkeypatch, train, *options, "--out", "whole") == 0
    assert [line["loss"] is None for line in lines("whole")[:8]] == [False] * 3 + [True] + [False] * 4
    interrupt(monkeypatch, *options, "--out", "parts", at=5)
    assert command(monkeypatch, train, "--resume", "parts") == 0
    assert same("whole", "parts")
    assert "7.png" in Path("parts/unreadable.txt").read_text()  # met before the stop, not after


@pytest.mark.slow
def test_a_killed_reader_of_pictures_ends_the_run_in_one_line(tmp_path, monkeypatch):
    """As a system out of memory does. The other reader ignores SIGTERM, and ends all the same."""
    monkeypatch.chdir(tmp_path)

    def before():  # in the fifth step
        count, step = iter(range(4)), torch.optim.AdamW.step

        def stepped(*args, **kwargs):
            if next(count, None) is None:
                multiprocessing.active_children()[0].kill()
                time.sleep(1)
            return step(*args, **kwargs)
        torch.optim.AdamW.step = stepped

    options = [*RUN, "--no-cache-features", "--workers", "2", "--steps", "1000"]
    pid = start(*options, "--out", "run", before=before)
    for _ in range(300):
        if (ended := os.waitpid(pid, os.WNOHANG))[0]:
            break
        time.sleep(0.1)
    else:
        os.kill(pid, signal.SIGKILL)
        pytest.fail("it hangs: " + Path("said").read_text())
    assert os.waitstatus_to_exitcode(ended[1]) == 2
    *_, last = Path("said").read_text().splitlines()
    assert "a process that reads pictures was killed, perhaps for want of memory" in last
    with safe_open("run/checkpoint.safetensors", "pt") as state:
        assert state.metadata()["step"] in ("2", "4")


@pytest.mark.slow
def test_a_signal_ends_what_has_nothing_to_save(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def before():
        train.shuffled = lambda *_: os.kill(os.getpid(), signal.SIGTERM)

    assert finish(*RUN, "--out", "run", before=before) == 143
    assert not Path("run/checkpoint.safetensors").exists()
    assert finish("--resume", "run") == 0, Path("said").read_text()  # from the beginning


@pytest.mark.slow
def test_a_checkpoint_too_many_for_the_disk(unbroken):
    def full(size):
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def fill():
        full(1000)()
        log = journal.Log(Path("other"))
        for step in range(100):
            log.add({"step": step})

    assert finish(*RUN, "--out", "run", before=kill_at(60)) == -signal.SIGKILL
    files = {path: path.read_bytes() for path in Path("run").rglob("*.safetensors")}
    assert finish("--resume", "run", before=full(100_000)) == 2
    said = Path("said").read_text().splitlines()[-1]
    assert re.fullmatch("train.py: error: run/(checkpoint|best).safetensors: File too large", said)
    assert {path: path.read_bytes() for path in Path("run").rglob("*.safetensors")} == files
    assert finish("--resume", "run") == 0 and same("whole", "run")
    assert finish(before=lambda: console.run(fill)) == 2
    assert "other/metrics.jsonl: no space left for a line" in Path("said").read_text()


def test_folders_that_take_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert command(monkeypatch, train, *RUN, "--out", "file/run") == 2
    assert "file/run: Not a directory" in capsys.readouterr().err
    if os.getuid():
        Path("closed").mkdir(0o555)
        assert command(monkeypatch, train, *RUN, "--out", "closed") == 2
        assert "closed: Permission denied" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pid = start(*RUN, "--out", "run", before=lambda: setattr(
        torch.optim.AdamW, "step", lambda *_: os.kill(os.getpid(), signal.SIGSTOP)))
    os.waitpid(pid, os.WUNTRACED)
    for options, said in ((["--resume", "run"], "run: another process is training in it"),
                          ([*RUN, "--out", "run"], "run: there is a run already")):
        assert command(monkeypatch, train, *options) == 2
        assert said in capsys.readouterr().err
    os.kill(pid, signal.SIGKILL)
    end(pid)
    assert finish("--resume", "run") == 0  # what it held went with it


def break_gradients(monkeypatch, steps) -> None:
    """Puts NaN among the gradients of these steps, counted from 0."""
    clip, count = torch.nn.utils.clip_grad_norm_, iter(range(1000))

    def clipped(parameters, *args):
        parameters = [*parameters]
        if next(count) in steps:
            parameters[3].grad.view(-1)[0] = torch.nan
        return clip(parameters, *args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)


def test_a_step_that_is_not_finite_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [*RUN, "--log-every", "5", "--save-every", "5"]
    break_gradients(monkeypatch, (1, 2, 6))
    before, step = [], torch.optim.AdamW.step

    def stepped(self, *args):
        values = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        before.append(values + [value.clone() for state in self.state.values() for value in state.values()])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    assert command(monkeypatch, train, *options, "--out", "run") == 0
    same = [all(map(torch.equal, *pair)) for pair in zip(before, before[1:])]
    assert same == [i in (1, 2, 6) for i in range(9)]
    assert [line.get("skipped") for line in lines("run")[:2]] == [2, 1]
    assert all(line["loss"] > 0 for line in lines("run")[:2])
    assert "2 steps skipped: gradients not finite" in capsys.readouterr().out


def test_a_run_that_is_killed_before_its_first_checkpoint_begins_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, train, *RUN, "--layer", "2,1", "--out", "whole") == 0
    Path("killed").mkdir()
    shutil.copy("whole/config.json", "killed")
    assert command(monkeypatch, train, "--resume", "killed") == 0
    whole, again = (load_file(f"{run}/checkpoint.safetensors") for run in ("whole", "killed"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_that_can_only_skip_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [*RUN[:-1], "--steps", "40", "--log-every", "4", "--save-every", "4"]
    break_gradients(monkeypatch, range(4, 1000))
    assert command(monkeypatch, train, *options, "--out", "run") == 2
    assert "run: the last 12 steps changed nothing: their gradients" in capsys.readouterr().err
    losses = [line["loss"] for line in lines("run")]
    assert losses[0] > 0 and losses[1:] == [None, None]
    assert all(tensor.isfinite().all() for tensor in load_file("run/checkpoint.safetensors").values()
               if len(tensor.shape))
    VLM.from_pretrained("run")


@pytest.mark.slow
def test_no_option_that_changes_the_run_changes_on_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert finish(*RUN, "--out", "run", before=kill_at(60)) == -signal.SIGKILL
    saved, refused = json.loads(Path("run/config.json").read_text())["training"], 0
    for option in train.make_parser()._actions:
        if option.dest in {"help", *train.FREE}:
            continue
        value, flag = saved[option.dest], option.option_strings[0]
        if other := {"image_position": "shared", "precision": "bfloat16", "layer": "3,1"}.get(option.dest):
            given = [flag, other]
        elif option.nargs == 0:  # a switch, or one with --no-
            given = [option.option_strings[-1] if value else flag]
        elif option.choices:
            given = [flag, next(choice for choice in option.choices if choice != value)]
        else:
            steps = {int: 1, float: 0.5}
            kind = getattr(option.type, "kind", str)
            given = [flag, str((value or 0) + steps[kind]) if kind in steps else f"other{value}"]
        assert command(monkeypatch, train, "--resume", "run", *given) == 2, given
        assert f"{flag} can't change on --resume: the run has {value}".rstrip() in capsys.readouterr().err
        refused += 1
    assert refused > 40

    # A run of before the option was made
    config = json.loads(Path("run/config.json").read_text())
    del config["training"]["lora_vit_blocks"]
    Path("run/config.json").write_text(json.dumps(config))
    assert command(monkeypatch, train, "--resume", "run", "--lora-vit-blocks", "3") == 2
    assert "--lora-vit-blocks can't change on --resume: the run has None" in capsys.readouterr().err
    monkeypatch.chdir("run")  # what stays the same may be said again, from anywhere
    monkeypatch.setattr(train, "build", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command(monkeypatch, train, "--resume", ".", "--lr", "0.002", "--batch", "6")


@pytest.mark.parametrize("name, value", (("steps", "x"), ("steps", None), ("batch", 1.5), ("lr", [1]),
                                         ("data", 7), ("seed", {}),
                                         ("prefix_loss", "no"),
                                         ("colour", "red"), ("layer", "1"), ("steps", True),
                                         ("batch", 10 ** 12), ("lr", float("nan")), ("adapter_width", -1),
                                         ("image_position", "z")))
def test_options_of_a_run_are_not_trusted(name, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved = {key: value for key, value in vars(train.make_parser().parse_args([])).items()}
    Path("config.json").write_text(json.dumps({"training": saved | {name: value}}))
    assert command(monkeypatch, train, "--resume", ".") == 2
    error = capsys.readouterr().err
    assert f"config.json: {name}" in error and str(value) in error and error.count("\n") == 1
