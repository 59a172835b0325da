"""What breaks on a GPU: on a CPU with stand-ins, and, marked `cuda`, on a GPU. See gpu.py for figures."""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sample
import train
from adapters import ADAPTERS, VLM
from conftest import ROOT
from support import console, kernels
from support.machine import pick_device
from support.shapes import Shapes
from data import ANSWERS, WORD, Batch, Spelling
from formats.files import InputError
from llm import LLM
from test_vlm import QUICK, SMALL, command, small
from vit import ViT

PLACES = {adapter: position for adapter, position in zip(ADAPTERS, ("sequence", "rope-xy", "xy"))}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_step_never_looks_at_what_a_gpu_computes(adapter, fixtures):
    """Fake tensors have shapes and no values: whoever looks at a value fails."""
    sizes = {"qformer": dict(text=4), "twoway": dict(text=4), "pixelshuffle": dict(scale=5)}.get(adapter, {})
    vlm = small(fixtures, adapter, image_position=PLACES.get(adapter, "shared"), **sizes)
    images = 1 if vlm.processor.queries == 25 else 2  # of 25 patches each, in 40 positions
    examples, captions = [[("a<image>b" * images, "cc")], [("", "ab")]], [["ab", "c"][:images], [""]]
    batch = vlm.processor.batch(examples, learned=(WORD, *ANSWERS), spelled=captions, queries=3)
    features = vlm.features(torch.randn(images + 1, 3, 30, 30))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tokens, positions, targets = map(mode.from_tensor, batch[:3])
        spelling = Spelling(*map(mode.from_tensor, batch.spelling))
        prompts = batch.prompts if batch.prompts is None else mode.from_tensor(batch.prompts)
        fake = Batch(tokens, positions, targets, prompts, batch.most_images, batch.shown, spelling)
        losses, spelled = vlm(fake, mode.from_tensor(features))
    assert losses.shape == targets.shape and spelled.shape == spelling.targets.shape


@pytest.mark.parametrize("name", ("vit", "deit", "clip", "dinov2_registers", "sam"))
@pytest.mark.parametrize("layer", (None, 1))
@torch.no_grad()
def test_the_shape_of_features_is_known_before_a_picture_is_read(name, layer, fixtures):
    vit = ViT.from_pretrained(str(fixtures / name))
    vlm = VLM(
        vit,
        LLM.from_pretrained(str(fixtures / "llama")),
        small(fixtures).processor.tokenizer,
        dict(adapter="linear", adapter_sizes={}, layer=layer),
    )
    side = vit.config.image_size
    assert vlm.features(torch.zeros(1, 3, side, side)).shape[1:] == vit.feature_shape(layer)


def test_an_encoder_meets_no_batch_of_one(tmp_path, monkeypatch):
    """torch.compile makes another graph of it."""
    monkeypatch.chdir(tmp_path)
    seen, forward = set(), ViT.forward
    monkeypatch.setattr(ViT, "forward", lambda vit, x, *rest: seen.add(len(x)) or forward(vit, x, *rest))
    assert command(monkeypatch, train, *SMALL, *QUICK, "--device", "cpu", "--features", "kept") == 0
    assert seen and 1 not in seen


class Graph:
    """As torch.cuda.CUDAGraph: the end of a recording that failed is an error of its own."""

    failed = False

    def capture_begin(self, capture_error_mode):
        assert capture_error_mode == "thread_local"

    def capture_end(self):
        if Graph.failed:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self):
        pass


def test_a_recording_that_fails_tells_why(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in dict(
        CUDAGraph=Graph,
        Stream=lambda *_: stream,
        current_stream=lambda: stream,
        current_device=lambda: 0,
        device=contextlib.nullcontext,
        stream=contextlib.nullcontext,
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    kernels.recording_stream.cache_clear()
    calls = []

    def function(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        if Graph.failed:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x + 1

    recorded = kernels.Recorded(function)
    assert recorded(torch.ones(1)) == 2 and recorded(torch.ones(1) * 2) == 3
    assert recorded(torch.ones(1) * 5) is recorded.output and len(calls) == 2  # launched, not called
    assert recorded.inputs == [torch.ones(1) * 5]
    monkeypatch.setattr(Graph, "failed", True)
    recorded.graph = None
    with pytest.raises(torch.OutOfMemoryError):
        recorded(torch.ones(1))


@pytest.mark.parametrize(
    "error",
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand so on"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you …"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "another error while that one was dealt with",
    ),
    ids=("torch", "driver", "CPU", "Python", "cublas", "behind another"),
)
def test_out_of_memory_is_one_line(error, monkeypatch, capsys):
    def main():
        if isinstance(error, str):
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            except torch.OutOfMemoryError:
                raise RuntimeError(error)
        raise error

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        console.run(main, "--batch")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "train.py: error: out of memory: try --batch\n"


def test_any_other_error_of_torch_is_not_hidden():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        console.run(lambda: torch.ones(2) @ torch.ones(3, 1))


def test_a_number_makes_that_gpu_the_current_one(monkeypatch):
    current, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *_, device: SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("cuda:1") == torch.device("cuda:1") and current == [torch.device("cuda:1")]
    monkeypatch.setattr(torch, "zeros", zeros)
    assert pick_device("cpu") == torch.device("cpu") and len(current) == 1


def test_compiled_where_it_pays():
    def pays(device: str, parameters: float, steps: int) -> bool:
        vlm = SimpleNamespace(
            device=torch.device(device), parameters=lambda: [torch.empty(int(parameters), device="meta")]
        )
        return train.compiling_pays(vlm, SimpleNamespace(steps=steps, batch=64))

    assert pays("cuda", 1.8e9, 1000) and pays("cuda", 2.2e8, 8000)
    assert not pays("cuda", 5e6, 700) and not pays("cuda", 2.2e8, 700)  # the built-in world; a short run
    assert not pays("cpu", 1.8e9, 1000)


@pytest.mark.slow
def test_without_a_compiler_nothing_is_compiled(tmp_path, monkeypatch, capsys):
    code = "import torch; from sample import can_compile; print(can_compile(torch.device('cpu')))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=os.environ | dict(CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path)),
    )
    assert done.stdout == "False\n" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("warning: nothing is compiled, which is slower: ")
    # then the run goes on without
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", lambda function: 1 / 0)
    monkeypatch.setattr(VLM, "compile_blocks", lambda vlm: pytest.fail("compiled"))
    assert command(monkeypatch, train, *SMALL, *QUICK, "--device", "cpu", "--compile", "--out", "run") == 0
    assert "slower: division by zero\n" in capsys.readouterr().err


@torch.no_grad()
def test_scores_past_float16_are_named(fixtures):
    small = LLM.from_pretrained(str(fixtures / "gemma3"), torch.float16)
    prompt = torch.arange(1, 9)[None]
    assert len(small.generate(prompt, max_tokens=3, end_tokens=())[0]) == 3
    small.blocks[1].mlp.down.weight.fill_(6e4)
    with pytest.raises(InputError, match="scores are not finite in float16: take another --precision"):
        small.generate(prompt, max_tokens=3)


@pytest.mark.slow
def test_the_script_for_a_gpu_runs(tmp_path):
    """All parts at toy sizes: no section fails, none is left out for want of time."""
    done = subprocess.run(
        [sys.executable, "tests/gpu.py", "check", "train", "bench", "profile", "--dry"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=os.environ | dict(OUT=str(tmp_path)),
    )
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout + done.stderr
    assert "no time was left" not in done.stdout
    for part, title in (
        ("check", "resumed"),
        ("train", "lora"),
        ("bench", "bench toy"),
        ("profile", "where a token goes"),
    ):
        assert f"## {title}\n" in (tmp_path / f"{part}.md").read_text()
    assert "exact" in (tmp_path / "train.md").read_text()


# ---------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("adapter", ("qformer", "flamingo"))
def test_a_recorded_step_decodes_what_a_launched_one_does(adapter, fixtures):
    for name in ("gpt2_wide", "llama3", "gemma3"):
        vlm = small(fixtures, adapter, llm=name).cuda()
        pictures = [Shapes(9).picture(i) for i in range(3)]
        for how in (dict(), dict(temperature=0.7), dict(beams=2)):
            said = []
            for vlm.llm.static in (False, True):
                generator = torch.Generator("cuda").manual_seed(0)
                said += [
                    vlm.caption(group, "ab", max_tokens=20, generator=generator, **how)
                    for group in (pictures[:1], pictures, [pictures[:2], pictures[2]])
                ]
            assert said[:3] == said[3:], (name, how)


@pytest.mark.cuda
def test_a_step_never_waits_for_the_gpu(tmp_path, monkeypatch):
    """Whether features are kept or not: what is sent to it is pinned, and nothing of its is looked at."""
    step, steps = train.Run.step, []

    def watched(run, n, indices, inputs):
        torch.cuda.set_sync_debug_mode("error" if n else "default")  # the first may load and measure
        try:
            if run.kept:
                inputs = run.kept.of(indices)
            return step(run, n, indices, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            steps.append(n)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.Run, "step", watched)
    for options in (["--cache-features"], ["--features", "kept"], ["--no-cache-features"]):
        assert (
            command(
                monkeypatch,
                train,
                "--adapter",
                "qformer",
                *SMALL,
                *QUICK,
                *options,
                "--device",
                "cuda",
                "--no-compile",
                "--precision",
                "bfloat16",
                "--out",
                options[0],
            )
            == 0
        )
    assert len(steps) == 24


@pytest.mark.cuda
def test_train_on_cuda(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for precision in ("bfloat16", "float16", "float32"):
        assert (
            command(
                monkeypatch,
                train,
                *SMALL,
                *QUICK,
                "--precision",
                precision,
                "--device",
                "cuda",
                "--out",
                precision,
            )
            == 0
        )
        assert (
            command(
                monkeypatch,
                sample,
                "--model",
                precision,
                "--data",
                "shapes",
                "--workers",
                "0",
                "--precision",
                precision,
            )
            == 0
        )
