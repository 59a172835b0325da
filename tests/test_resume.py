"""Nothing is lost: runs that end at any moment, by any cause, and go on as if nothing had been."""
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import adapters
import data
import lora
import train
from adapters import VLM
from data import InputError, write_file
from test_vlm import SMALL, command

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded torch")

RUN = ["--adapter", "qformer", *SMALL, "--adapter-dropout", "0.1", "--lora", "2", "--lora-dropout", "0.1", "--scenes", "24",
       "--val-size", "4", "--steps", "10", "--batch", "6", "--save-every", "2", "--log-every", "1", "--warmup", "2",
       "--workers", "0", "--layout", "image-text:0.6,text-image:0.4", "--precision", "float32", "--max-tokens", "20",
       "--cache-features"]


def start(*options, before=lambda: None) -> int:
    """Runs train.py in a forked process, after `before`; returns its id. What it prints goes to the file `said`."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        torch.set_num_threads(1)  # the threads of a pool don't come along
        sys.stdout = sys.stderr = open("said", "w", buffering=1)
        before()
        with pytest.MonkeyPatch.context() as monkeypatch:
            code = command(monkeypatch, train, *options)
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
    """Has `act` called before and after each step of the optimizer and each change of a file, and when tensors are
    half written."""
    def hook(owner, name, half=False):
        function = getattr(owner, name)

        def hooked(*args, **kwargs):
            act()
            if half:
                result = function(*args, **kwargs)
                whole = Path(args[1]).read_bytes()
                Path(args[1]).write_bytes(whole[:len(whole) // 2])
                act()
                Path(args[1]).write_bytes(whole)
            else:
                result = function(*args, **kwargs)
            act()
            return result
        setattr(owner, name, hooked)

    for owner, name in ((os, "replace"), (os, "fsync"), (torch.optim.AdamW, "step"), (train, "log"), (train, "cut_metrics")):
        hook(owner, name)
    for module in (train, adapters, lora):
        hook(module, "save_file", half=True)


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
    files = [sorted(path.relative_to(r) for path in Path(r).rglob("*") if path.is_file()) for r in (run, other)]
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
        save = VLM.save

        def kept(self, folder, step):
            save(self, folder, step)
            write_file(Path(f"weights-{step}"), lambda path: train.save_file(
                {name: p.detach().clone() for name, p in self.trained.items()}, path))
        VLM.save = kept

    assert finish(*RUN, "--out", "whole", before=keep) == 0, Path("said").read_text()
    return {step: load_file(f"weights-{step}") for step in (2, 4, 6, 8, 10)}


def test_a_run_that_is_killed_loses_nothing(unbroken):
    rng, kills, run = random.Random(0), 0, 0
    while kills < 50:
        run += 1
        options = [*RUN, "--out", f"run{run}"]
        while True:
            if kills % 10 == 9:  # from outside, at any moment whatever
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
            if Path(f"run{run}/adapter.safetensors").exists():  # what anyone reads is of one step
                vlm = VLM.from_pretrained(f"run{run}")
                found = {name: p for name, p in vlm.named_parameters() if name in unbroken[2]}
                assert found.keys() == unbroken[2].keys()
                assert any(all(torch.equal(weights[name], p) for name, p in found.items())
                           for weights in unbroken.values()), f"after {kills} kills"
        assert same("whole", f"run{run}")
