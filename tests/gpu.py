"""Meets a GPU: is everything right on it, how fast is it, and where does the time go?

    python tests/gpu.py check                     # right numbers, kernels, memory, waits, resume
    python tests/gpu.py train --smollm2 FOLDER    # the main job, every adapter, LoRA, SmolLM2-135M
    python tests/gpu.py bench                     # against transformers, four sizes
    python tests/gpu.py profile                   # products, the rest, and waiting

Prints Markdown as it goes; where $OUT is set, also writes it there, with the logs. A part takes less than
eight minutes. A section that fails shows its error, and the next one runs. `--dry` runs all of it on a CPU at
toy sizes. `bench` and `profile` need transformers beside our own packages.
"""

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.chdir(ROOT)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn as nn
import torch.nn.functional as F

import bench
import data
import train
from adapters import ADAPTERS, VLM, build
from support import kernels
from support.kernels import Recorded
from support.shapes import Shapes
from llm import LLM, LLMConfig, Rope
from support.scores import rate

PART_SECONDS = 440  # a section that would begin later is left out
KERNELS = {0: "products", 1: "flash", 2: "efficient", 3: "cuDNN", -1: "error"}
HALF = (torch.bfloat16, torch.float16)
OUT = Path(os.environ.get("OUT") or tempfile.mkdtemp())
options: argparse.Namespace  # the command line


# ---------------------------------------------------------------------------------------------------------
# What all parts use


def say(line: str = "") -> None:
    print(line, flush=True)
    with (OUT / f"{options.part}.md").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def table(*names: str) -> None:
    say("| " + " | ".join(names) + " |")
    say("|" + " --- |" * len(names))


def row(*cells) -> None:
    say("| " + " | ".join(map(str, cells)) + " |")


def finish() -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def milliseconds(function) -> float:
    finish()
    start = time.perf_counter()
    function()
    finish()
    return (time.perf_counter() - start) * 1e3


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def peak() -> int:
    return torch.cuda.max_memory_allocated() if options.device == "cuda" else 0


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def cudnn(on: bool):
    """Lets cuDNN's attention kernel take part, or not."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def smollm2(dtype: torch.dtype = torch.bfloat16) -> LLM:
    """A language model of SmolLM2-135M's sizes with random weights; in --dry a small one."""
    layers, vocabulary = (2, 500) if options.dry else (30, 49152)
    rope = Rope(64, 10000.0, "default", 1.0, 8192, (1.0, 4.0))
    config = LLMConfig(
        vocabulary, 576, layers, 9, 3, 64, 1536, 8192, "silu", 1e-5, ropes=(rope,) * layers, tied=True
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = LLM(config)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02)
    return model.to(dtype).eval().requires_grad_(False)


def built_in(adapter: str, dtype: torch.dtype, device: str):
    """The built-in encoder and language model, joined by an untrained adapter."""
    torch.manual_seed(0)
    config = dict(vit="assets/vit", llm="assets/llm", adapter=adapter, adapter_sizes={})
    vlm = build(config, dtype).to(device).eval()
    for name, p in vlm.trained.items():
        if "alpha" in name:  # Flamingo's gates, which start shut
            nn.init.constant_(p, 0.5)
    return vlm


def training_run(*arguments: str, out: Path | None = None) -> train.Run:
    """A run of train.py with these options, before its first step."""
    given = ["train.py", "--device", options.device, "--out", str(out or Path(tempfile.mkdtemp(), "run"))]
    if options.dry:
        given += ["--scenes", "64", "--val-size", "16", "--workers", "0"]
    sys.argv = [*given, *arguments]
    return train.Run(train.read_options())


def job(label: str, *arguments: str) -> Path:
    """Runs train.py to its end, prints a row of its scores, time and memory, and returns its folder."""
    out = Path(tempfile.mkdtemp(), "run")
    sys.argv = ["train.py", "--device", options.device, "--out", str(out), *arguments]
    if options.dry:
        sys.argv += [
            "--scenes",
            "64",
            "--val-size",
            "16",
            "--steps",
            "3",
            "--batch",
            "16",
            "--workers",
            "0",
            "--lora-dropout",
            "0",
        ]
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    log, start = io.StringIO(), time.time()
    try:
        with contextlib.redirect_stdout(log):
            train.main()
    finally:
        (OUT / f"{re.sub('[^a-z0-9]+', '-', label.lower())}.log").write_text(log.getvalue(), encoding="utf-8")
    lines = log.getvalue().splitlines()
    speeds = [found[1] for line in lines if (found := re.search(r"(\S+ images/s)", line))]
    first = [
        re.split(r" *\| *", line)[1:3] for line in lines if line.startswith("|")
    ]  # of each row of scores
    scores = [f"{label}: {first[0][1]} {score}" for label, score in first[2:]]
    row(label, f"{time.time() - start:.0f} s", speeds[-1], mebibytes(peak()), "; ".join(scores))
    return out


# ---------------------------------------------------------------------------------------------------------
# check


def machine() -> None:
    if options.device == "cuda":
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            text=True,
            capture_output=True,
        ).stdout.strip()
        major, minor = torch.cuda.get_device_capability()
        say(f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, driver {driver}; ")
    say(f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, {time.strftime('%Y-%m-%d')}")


def attention_kernels() -> None:
    """Which of its kernels torch chooses for the attentions of a run."""
    cases = {  # name -> B, H, K, T, S, head size, mask, causal
        "training": (64, 9, 9, 97, 97, 64, False, True),
        "a prompt, padded": (16, 9, 9, 97, 97, 64, True, False),
        "a token, shared keys": (16, 3, 3, 3, 192, 64, True, False),
        "a token": (16, 12, 12, 1, 192, 64, True, False),
        "ViT-B": (64, 12, 12, 196, 196, 64, False, False),
        "built-in": (64, 4, 4, 62, 62, 32, False, True),
    }
    table("attention", "cuDNN", *map(name_of, (*HALF, torch.float32)))
    for on in (False, True):
        with cudnn(on):
            for name, (B, H, K, T, S, size, masked, causal) in cases.items():
                chosen = []
                for dtype in (*HALF, torch.float32):
                    q = torch.randn(B, H, T, size, device=options.device, dtype=dtype)
                    k = torch.randn(B, K, S, size, device=options.device, dtype=dtype)
                    rows = 1 if "token" in name else T
                    mask = torch.ones(B, 1, rows, S, dtype=torch.bool, device=options.device)
                    choice = torch._fused_sdp_choice(q, k, k, mask if masked else None, 0.0, causal)
                    chosen.append(KERNELS[choice])
                row(name, "on" if on else "off", *chosen)


def attention_is_right() -> None:
    """`attend` for one token with a mask, which took another layout and broke, against float64."""
    table("cuDNN", "type", "largest error of five shapes, of the norm")
    for on in (False, True):
        for dtype in (*HALF, torch.float32):
            errors = []
            for B, H, K, S, size in (
                (4, 9, 3, 192, 64),
                (1, 9, 3, 64, 64),
                (64, 4, 2, 128, 32),
                (2, 12, 12, 128, 64),
                (3, 14, 2, 640, 64),
            ):
                torch.manual_seed(0)
                q = torch.randn(B, H, 1, size, device=options.device, dtype=dtype)
                k, v = torch.randn(2, B, K, S, size, device=options.device, dtype=dtype)
                mask = torch.rand(B, 1, 1, S, device=options.device) < 0.3
                mask[..., -1] = True
                with cudnn(on), torch.inference_mode():
                    y = kernels.attend(q, k, v, mask).double()
                weights = kernels.probabilities(q.double(), k.double(), mask, False)
                right = (weights.view(B, K, -1, S) @ v.double()).view(q.shape)
                errors.append(((y - right).norm() / right.norm()).item())
            row("on" if on else "off", name_of(dtype), f"{max(errors):.1e}")


def a_new_length() -> None:
    """What attention costs when a length is met for the first time: a kernel may be planned anew."""
    table("cuDNN", "training, first", "training, again", "a token, first")
    lengths = range(81, 84 if options.dry else 93)
    for on in (False, True):
        first, again, token = [], [], []
        with cudnn(on):
            for T in lengths:
                shape = 8, 9, T, 64
                q, k, v = (
                    torch.randn(shape, device=options.device, dtype=torch.bfloat16, requires_grad=True)
                    for _ in range(3)
                )

                def backward():
                    F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

                first.append(milliseconds(backward))
                again.append(milliseconds(backward))
                one = torch.randn(8, 9, 1, 64, device=options.device, dtype=torch.bfloat16)
                with torch.inference_mode():
                    token.append(milliseconds(lambda: kernels.attend(one, k[:, :3], v[:, :3])))
        row("on" if on else "off", *(f"{statistics.median(x):.2f} ms" for x in (first, again, token)))


def marked_tests() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/test_gpu.py"],
        text=True,
        capture_output=True,
        timeout=300,
    )
    (OUT / "pytest.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    say("`pytest -m cuda`: " + (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1])


@torch.no_grad()
def same_numbers() -> None:
    """The models here against the CPU in float32: how far apart, as a share of the norm."""
    table("model", *map(name_of, (torch.float32, *HALF)))
    pixels = torch.stack(
        [torch.randn(3, 96, 96, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    )
    kinds = ["encoder", "language model", *ADAPTERS][: 3 if options.dry else None]
    found = {kind: [] for kind in kinds}
    for kind in kinds:
        adapter = kind if kind in ADAPTERS else "linear"
        for device, dtype in (("cpu", torch.float32), *((options.device, t) for t in (torch.float32, *HALF))):
            if device == "cpu" and dtype == torch.float16:
                continue  # too slow there
            vlm = built_in(adapter, dtype, device)
            side = vlm.vit.config.image_size
            picture = F.interpolate(pixels, side).to(device)
            examples = [[("", f"a red circle and {i} squares")] for i in range(4)]
            batch = vlm.processor.batch(examples).to(vlm.device)
            if kind == "encoder":
                y = vlm.features(picture)
            elif kind == "language model":
                y = vlm.llm(batch.tokens.clamp(max=vlm.llm.config.vocabulary - 1))
            else:
                y = vlm.logits(batch.tokens, vlm.features(picture), batch.target_positions)
            found[kind].append(y.double().cpu())
        right, *others = found[kind]
        row(kind, *(f"{((y - right).norm() / right.norm()).item():.1e}" for y in others))


def recorded_decoding() -> None:
    """Greedy text by launches, and by a recording of them. Goal: three times as fast at batch 1."""
    model, new = smollm2(), 4 if options.dry else 60
    table("batch", "launched, tokens/s", "recorded, tokens/s", "ratio", "same texts")
    for B in (1, 16, 64)[: 1 if options.dry else 3]:
        tokens, speeds, said = torch.randint(500, (B, 90), device=options.device), [], []
        for model.static in (False, True):

            def decode():
                said.append(model.generate(tokens, max_tokens=new, end_tokens=()))

            milliseconds(decode)
            speeds.append(B * new / min(milliseconds(decode) for _ in range(3)) * 1e3)
        same = sum(a == b for a, b in zip(said[0], said[-1]))
        row(B, f"{speeds[0]:,.0f}", f"{speeds[1]:,.0f}", f"{speeds[1] / speeds[0]:.2f}", f"{same} of {B}")


def memory_of_calls() -> None:
    """Does the memory of recordings come back? 40 calls of differing shapes; and what a recording costs."""
    model, spent, record = smollm2(), [], Recorded.record

    def timed(self):
        start = time.perf_counter()
        record(self)
        spent.append((time.perf_counter() - start) * 1e3)

    Recorded.record = timed
    try:
        call_and_report(model)
    finally:
        Recorded.record = record
    if spent:
        say(f"\nrecording takes {statistics.median(spent):.0f} ms, at most {max(spent):.0f} ms")


def call_and_report(model: LLM) -> None:
    table("calls", "allocated", "reserved")
    for n in range(4 if options.dry else 40):
        tokens = torch.randint(500, (1 + 7 * n % 40, 40 + 13 * n % 90), device=options.device)
        model.generate(tokens, max_tokens=4 if options.dry else 20, end_tokens=())
        if n % 10 == 9:
            row(n + 1, mebibytes(torch.cuda.memory_allocated()), mebibytes(torch.cuda.memory_reserved()))


def waits_in_a_step() -> None:
    """Who waits for the GPU in a step, and for how long the CPU is busy with launching it. Goal: nobody."""
    table("run", "launched after", "done after further", "of the first, text", "waits")
    runs = {
        "qformer": [],
        "qformer, features not kept": ["--no-cache-features"],
        "flamingo": ["--adapter", "flamingo"],
        "qformer, --compile": ["--compile"],
        "flamingo, two layouts, shots": [
            "--adapter",
            "flamingo",
            "--shots",
            "2",
            "--layout",
            "image-text,text-image-text",
        ],
    }
    for label, extra in list(runs.items())[: 1 if options.dry else None]:
        run = training_run(
            "--quiet",
            "--scenes",
            "1000",
            "--val-size",
            "16",
            "--steps",
            "60",
            "--batch",
            "8" if options.dry else "64",
            "--no-compile",
            *extra,
        )
        source, times, seen = run.pictures(), [], []
        steps = 3 if options.dry else 20
        for n in range(steps):
            indices, inputs = next(source)
            watch = options.device == "cuda" and n == steps - 3
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                finish()
                if watch:
                    torch.cuda.set_sync_debug_mode("warn")
                start = time.perf_counter()
                run.step(n, indices, inputs)
                launched = time.perf_counter()
                if watch:
                    torch.cuda.set_sync_debug_mode("default")
            finish()
            done = time.perf_counter()
            run.draw(indices, 0)
            times.append((launched - start, done - launched, time.perf_counter() - done))
            seen += [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchron" in str(w.message)]
        medians = [f"{statistics.median(x) * 1e3:.1f} ms" for x in zip(*times[len(times) // 2 :])]
        row(label, *medians, ", ".join(seen) or "none")
        source.close()
        run.log.close()


def graphs_of_a_step() -> None:
    """How many graphs torch.compile makes of captioning, and whether they say the same. Goal: no break."""
    from torch._dynamo.utils import counters

    pictures = [Shapes(70).picture(i) for i in range(70)]
    groups = [pictures[:64], pictures[:5], pictures[:1], pictures[10:17], pictures[:64]]
    if options.dry:
        groups = [pictures[:2]]
    table("adapter", "pictures", "time", "new graphs", "breaks", "same captions")
    for adapter in ("qformer", "flamingo")[: 1 if options.dry else 2]:
        torch._dynamo.reset()
        counters.clear()
        vlm = built_in(adapter, torch.float32 if options.dry else torch.bfloat16, options.device)
        plain = [vlm.caption(group, max_tokens=20) for group in groups]
        vlm.compile_blocks()
        for group, wanted in zip(groups, plain):
            before, start = counters["stats"]["unique_graphs"], time.time()
            said = vlm.caption(group, max_tokens=20)
            same = sum(a == b for a, b in zip(said, wanted))
            row(
                adapter,
                len(group),
                f"{time.time() - start:.1f} s",
                counters["stats"]["unique_graphs"] - before,
                sum(counters["graph_break"].values()),
                f"{same} of {len(group)}",
            )


def skipped_steps() -> None:
    """A step without finite gradients must leave weights, moments and their count as they were."""
    for scaled in (False, True):
        p = nn.Parameter(torch.ones(1000, device=options.device))
        optimizer = torch.optim.AdamW([p], fused=True)
        scaler = torch.amp.GradScaler(options.device, enabled=scaled)

        def step(factor: float) -> None:
            scaler.scale((p * factor).sum()).backward()
            scaler.unscale_(optimizer)
            optimizer.found_inf = (~nn.utils.clip_grad_norm_([p], 1.0).isfinite()).float()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        step(1.0)
        before = [t.clone() for t in (p.detach(), *optimizer.state[p].values())]
        step(float("inf"))
        kept = [torch.equal(a, b) for a, b in zip(before, (p.detach(), *optimizer.state[p].values()))]
        say(f"- {'with' if scaled else 'without'} a scaler: {'left as it was' if all(kept) else kept}")


def losses_of(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def resumed() -> None:
    """Losses of a run, and of one that was stopped half-way and resumed; in bfloat16 and float16."""
    steps = 4 if options.dry else 50
    for precision in ("bfloat16",) if options.dry else ("bfloat16", "float16"):
        common = [
            "--precision",
            precision,
            "--steps",
            str(steps),
            "--save-every",
            str(steps // 2),
            "--log-every",
            "1",
            "--quiet",
            "--no-compile",
            "--scenes",
            "24" if options.dry else "2000",
            "--val-size",
            "8" if options.dry else "64",
            *(("--batch", "8") if options.dry else ()),
        ]
        runs = []
        for parted in (False, True):
            out = Path(tempfile.mkdtemp(), "run")
            run = training_run(*common, out=out)
            with train.Signals() as signals:
                if parted:
                    learn_half(run, signals, steps // 2)
                    run.log.close()
                    sys.argv = ["train.py", "--resume", str(out)]
                    run = train.Run(train.read_options())
                run.learn(signals)
            run.log.close()
            runs.append(losses_of(out))
        apart = max(abs(a - b) for a, b in zip(*runs))
        whole, again = runs
        say(f"- {precision}: loss from {whole[0]:.2f} to {whole[-1]:.2f} in {len(whole)} lines; stopped and "
            f"resumed, {len(again)} lines, at most {apart:.1e} apart")


def learn_half(run: train.Run, signals: train.Signals, steps: int) -> None:
    """Stops a run after `steps`, as Ctrl-C does."""
    step = run.step

    def stopping(n: int, *inputs):
        if n + 1 == steps:
            signals.asked = 2
        return step(n, *inputs)

    run.step = stopping
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        run.learn(signals)
    signals.asked = 0


# ---------------------------------------------------------------------------------------------------------
# train


def job_table() -> None:
    table("run", "wall time, all of it", "last speed", "peak memory", "scores")


def main_job() -> None:
    """Goal: under a minute."""
    job_table()
    folder = job("qformer: the main job", "--no-compile")
    greedy_and_beams(folder)


def main_job_compiled() -> None:
    job_table()
    job("the main job, --compile", "--compile")


def other_adapters() -> None:
    job_table()
    for adapter in [name for name in ADAPTERS if name != "qformer"][: 1 if options.dry else None]:
        job(f"{adapter}, 200 steps", "--adapter", adapter, "--steps", "200", "--no-compile")


def lora() -> None:
    job_table()
    for extra in ([], ["--recompute"]):
        job(
            " ".join(["qformer, LoRA 16, 200 steps", *extra]),
            "--lora",
            "16",
            "--lora-targets",
            "all",
            "--steps",
            "200",
            "--no-compile",
            *extra,
        )


def real_smollm2() -> None:
    if not options.smollm2:
        say("Left out: no --smollm2 FOLDER.")
        return
    job_table()
    for extra in (["--no-compile"], ["--compile"]):
        job(
            f"mlp, SmolLM2-135M, LoRA 16, 200 steps {extra[0]}",
            "--adapter",
            "mlp",
            "--llm",
            options.smollm2,
            "--lora",
            "16",
            "--steps",
            "200",
            *extra,
        )


def greedy_and_beams(folder: Path) -> None:
    """Captions of the main job by greedy search and by three beams."""
    vlm = VLM.from_pretrained(str(folder), torch.float32 if options.dry else torch.bfloat16).to(
        options.device
    )
    scenes = Shapes(8 if options.dry else 512, "test")
    pictures = [scenes.picture(i) for i in range(len(scenes))]
    for beams in (1, 3):
        start, texts = time.time(), []
        for part in data.chunks(pictures, 64):
            texts += vlm.caption(part, beams=beams)
        seconds, (scores, _) = time.time() - start, rate(scenes, dict(enumerate(texts)))
        row(
            f"its captions, beams: {beams}",
            f"{seconds:.1f} s",
            f"{len(scenes) / seconds:,.0f} captions/s",
            "",
            f"exact {scores['exact']:.1%}",
        )


# ---------------------------------------------------------------------------------------------------------
# bench and profile


def against_transformers(size: str) -> None:
    """Goals: 45 % of the products in training for 1.5b, 70 % of the bandwidth in decoding."""
    if not importlib.util.find_spec("transformers"):
        say("Left out: no transformers.")
        return
    command = [
        sys.executable,
        "tests/bench.py",
        "encode",
        "train",
        "prefill",
        "decode",
        "caption",
        "--sizes",
        size,
        "--device",
        options.device,
        "--repeats",
        "1" if options.dry else "3",
        "--batches",
        "2" if options.dry else "8" if size == "7b" else "64",
    ]
    with (OUT / f"bench-{size}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=log)
        for line in process.stdout:
            say(line.rstrip())
    if process.wait():
        say(f"**failed**: {(OUT / f'bench-{size}.log').read_text().strip().splitlines()[-1]}")


PRODUCTS = re.compile(r"gemm|cutlass|xmma|nvjet|cublas|mm_|::mm|::bmm|addmm|linear|gemv", re.I)
ATTENTION = re.compile(r"flash|fmha|attention|sdpa", re.I)


def shares(label: str, function, calls: int) -> None:
    """Prints how the time of `calls` calls divides: products, attention, other kernels, waiting."""
    from torch.profiler import ProfilerActivity, profile

    cuda = options.device == "cuda"
    for _ in range(1 if options.dry else 3):
        function()
    calls = 1 if options.dry else calls
    wall = statistics.median(milliseconds(function) for _ in range(calls))
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        for _ in range(calls):
            function()
        finish()
    spent = {
        event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3 / calls
        for event in seen.key_averages()
    }
    attention = sum(t for name, t in spent.items() if ATTENTION.search(name))
    products = sum(t for name, t in spent.items() if PRODUCTS.search(name) and not ATTENTION.search(name))
    busy = sum(spent.values())
    row(
        label,
        f"{wall:.1f} ms",
        *(
            f"{t / wall:.0%}"
            for t in (products, attention, busy - products - attention, max(0.0, wall - busy))
        ),
    )
    largest = sorted(spent.items(), key=lambda item: -item[1])[:12]
    lines = [f"{t:9.3f} ms  {name[:110]}" for name, t in largest]
    (OUT / f"profile-{re.sub('[^a-z0-9]+', '-', label.lower())}.log").write_text("\n".join(lines) + "\n")


def share_table() -> None:
    table("what", "time", "products", "attention", "other kernels", "waiting")


def profiled(size: str):
    """Our model of a size, as tests/bench.py builds it; in --dry the built-in one."""
    settings = SimpleNamespace(folder=OUT / "checkpoints", device=options.device, dtype=torch.bfloat16)
    if options.dry:
        return bench.Ours(ROOT / "assets", settings)
    settings.folder.mkdir(exist_ok=True)
    bench.prepare(size, settings)
    return bench.Ours(settings.folder / size, settings)


def where_a_step_goes() -> None:
    share_table()
    for size in ("small", "1.5b")[: 1 if options.dry else 2]:
        model, B = profiled(size), 2 if options.dry else 64
        optimizer = torch.optim.AdamW(model.trained, fused=True)
        side = model.vlm.vit.config.image_size
        pixels = torch.randn(B, 3, side, side, device=options.device)
        tokens = torch.randint(9, 300, (B, bench.TEXT), device=options.device)
        shares(
            f"{size}: a training step, batch {B}",
            lambda: bench.step(model, optimizer, tokens=tokens, pixels=pixels),
            3,
        )


def where_a_token_goes() -> None:
    share_table()
    for size in ("small", "1.5b")[: 1 if options.dry else 2]:
        model = profiled(size)
        for B in (1, 16)[: 1 if options.dry else 2]:
            tokens = torch.randint(9, 300, (B, 16), device=options.device)
            shares(f"{size}: {bench.NEW} tokens, batch {B}", lambda: model.decode(tokens), 3)


PARTS = {
    "check": [
        machine,
        attention_kernels,
        attention_is_right,
        a_new_length,
        same_numbers,
        recorded_decoding,
        memory_of_calls,
        waits_in_a_step,
        graphs_of_a_step,
        skipped_steps,
        resumed,
        marked_tests,
    ],
    "train": [machine, main_job, real_smollm2, other_adapters, lora, main_job_compiled],
    "bench": [
        machine,
        *(functools.partial(against_transformers, size) for size in ("small", "medium", "1.5b", "7b")),
    ],
    "profile": [machine, where_a_step_goes, where_a_token_goes],
}


def main() -> None:
    global options
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--smollm2", metavar="FOLDER", help="SmolLM2-135M, for the part train")
    parser.add_argument("--dry", action="store_true", help="on a CPU, at toy sizes: does it run?")
    options = parser.parse_args()
    options.device = "cpu" if options.dry else "cuda"
    if options.dry:  # real compilers take minutes
        nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="eager")
        torch.compile = lambda function, **_: function
    OUT.mkdir(parents=True, exist_ok=True)
    failed = 0
    for options.part in options.parts:
        start = time.time()
        sections = PARTS[options.part]
        if options.dry and options.part == "bench":
            sections = [machine, functools.partial(against_transformers, "toy")]
        for section in sections:
            title = getattr(section, "__name__", None) or f"{options.part} {section.args[0]}"
            say(f"\n## {title.replace('_', ' ')}\n")
            if time.time() - start > PART_SECONDS:
                say("Left out: no time was left.")
                continue
            began = time.time()
            try:
                section()
            except (Exception, SystemExit):
                failed += 1
                say("\n```\n" + traceback.format_exc(limit=-6).strip() + "\n```")
            say(f"\n({time.time() - began:.0f} s)")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
