"""Compares settings of train.py at one budget: trains each from several seeds and prints mean ± spread.

    python tests/experiments.py adapters [--seeds 3] [options of train.py for every run, such as --steps 400]
    python tests/experiments.py all      the tables of RESULTS.md that need no files

Runs are kept in out/experiments/, so that a comparison that was stopped goes on where it stood, and one
that others share isn't trained twice; so are the pictures' features, 0.5 GB a seed. With two jobs a run has
half of the cores: that is faster in all.
"""
import argparse
import hashlib
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from adapters import ADAPTERS, IMAGE_POSITIONS, VLM  # noqa: E402
from data import chunks  # noqa: E402
from fixtures import start  # noqa: E402
from formats.captions import IMAGE  # noqa: E402
from sample import Shots, caption_set, see_whole  # noqa: E402
from support.processes import CORES  # noqa: E402
from assets.sayings import RULES, by_rule, questions  # noqa: E402
from support.shapes import Shapes, judge  # noqa: E402

LORA = ["--lora", "16", "--lora-targets", "all", "--lora-on", "llm"]
VICUNA = "USER: <image>\nDescribe this image. ASSISTANT:"
PUBLIC = "out/public"  # where fixtures/start.py's models go
USUAL = "layout_image-text|image-position_sequence|shots_0"  # what train.py does unasked
COUNTS = ("trained parameters", "embeddings a picture", "ms a step")
FINE = ("val loss", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "CIDEr-D")  # three digits after the point
COMPARISONS = {
    "adapters": {adapter: ["--adapter", adapter] for adapter in ADAPTERS},
    "text": {f"{adapter}, {'reads the prompt' if text else 'blind'}": [
        "--adapter", adapter, "--prompt", "A picture:", *["--adapter-text"] * text]
        for adapter in ("qformer", "twoway") for text in (0, 1)},
    "layouts": {mix: ["--layout", mix] for mix in (
        "image-text", "image-text:0.6,text-image-text:0.4", "image-text:0.6,text-image:0.4",
        "image-text:0.6,text-image-text:0.2,text-image:0.2")},
    "positions": {position: ["--adapter", "mlp", "--image-position", position]
                  for position in IMAGE_POSITIONS},
    "layers": {f"layer {layer}": ["--adapter", "mlp", "--layer", layer] for layer in "6420"},
    "shots": {adapter: ["--adapter", adapter] for adapter in ("qformer", "pixelshuffle", "mlp")},
    "questions": {adapter: ["--adapter", adapter] for adapter in ADAPTERS},
    "queries": {f"{n} queries": ["--adapter", "qformer", "--queries", str(n)] for n in (24, 32, 48, 64)},
    "spell": {f"--spell {weight}": ["--adapter", "qformer", "--spell", weight]
              for weight in ("0", "0.3", "1", "3")},
    "lora": {f"{adapter}, {label}": ["--adapter", adapter, *options]
             for adapter in ("qformer", "mlp") for label, options in {
                 "adapter alone": ["--lora", "0"], "LoRA 4": ["--lora", "4", *LORA[2:]],
                 "LoRA 16": LORA,
                 "whole LLM": ["--train", "adapter,llm"]}.items()},
    "from": {"Q-Former, from the parts": ["--adapter", "qformer"],
             "Q-Former, from BLIP-2's layout": ["--from", f"{PUBLIC}/blip2", "--spell", "1"],
             "MLP and LoRA, from the parts": ["--adapter", "mlp", "--layer", "-1", *LORA],
             "MLP and LoRA, from the parts, LLaVA's prompt": [  # which the built-in LLM has never read
                 "--adapter", "mlp", "--layer", "-1", *LORA, "--prompt", VICUNA],
             "MLP and LoRA, from LLaVA's layout": ["--from", f"{PUBLIC}/llava", *LORA]},
}

ALL = ("adapters", "questions", "shots", "layouts", "positions", "layers")


# ---------------------------------------------------------------------------------------------------------
# What a run can do that it wasn't trained to

class Asked:
    """A caption set of questions and answers, one an entry."""

    def __init__(self, turns: list[tuple[str, str]]):
        self.turns = turns

    def conversations(self, i: int) -> list[list[tuple[str, str]]]:
        return [[self.turns[i]]]


def kind_of(question: str) -> str:
    first, second = question.split()[:2]
    return {"how": "how many", "what": f"what {second}", "is": "is there any"}[first] if second in (
        "many", "colour", "shape", "size", "there") else "left of, above, …"


def ask_questions(vlm: VLM) -> dict[str, float]:
    """How many in a hundred of its answers, of each kind of question, are the right word."""
    scenes = [Shapes(250, "test").scene(i) for i in range(250)]
    views = see_whole(vlm, [scene.picture() for scene in scenes])
    asked = [(at, turn) for at, scene in enumerate(scenes) for turn in questions(scene)]
    batches = ((part, views.pick([asked[k][0] for k in part])) for part in chunks(range(len(asked)), 256))
    said = caption_set(vlm, Asked([turn for _, turn in asked]), batches, max_tokens=8)
    right = {}
    for k, (_, (question, answer)) in enumerate(asked):
        right.setdefault(kind_of(question), []).append(str(said[k]) == answer)
    every = [found for kind in right.values() for found in kind]
    return {kind: 100 * statistics.mean(found) for kind, found in {**right, "all": every}.items()}


def ask_by_rule(vlm: VLM, draws: int = 16, scenes: int = 25) -> dict[str, float]:
    """How many in a hundred of its answers say what a rule asks for, which only K solved pictures before
    tell: the colours, the shapes, the sizes or the count. `draws` sets of pictures are shown."""
    data, found = Shapes(1000, "test"), {}
    for K in (0, 1, 2, 4):
        right = []
        for draw in range(draws):
            rule = RULES[4:][draw % 4]
            rng = random.Random(draw)
            drawn = [data.scene(i) for i in rng.sample(range(1000), scenes + 4)]
            views = see_whole(vlm, [scene.picture() for scene in drawn])
            told = [by_rule(scene, rule) for scene in drawn]
            shots = Shots([[("", said)] for said in told[:K]], views.pick([*range(K)]) if K else None)
            entries = [*range(scenes)]
            batches = [(entries, views.pick([4 + i for i in entries]))]
            asked = Asked([("", answer) for answer in told[4:]])
            said = caption_set(vlm, asked, batches, shots, max_tokens=40)
            right += [str(said[i]) == told[4 + i] for i in entries]
        found["1 shot" if K == 1 else f"{K} shots"] = 100 * statistics.mean(right)
    return found


def finish_captions(vlm: VLM) -> dict[str, float]:
    """How many in a hundred captions it ends without an error, whose first half came before the picture."""
    data = Shapes(500, "test")
    scenes = [data.scene(i) for i in range(500)]
    views = see_whole(vlm, [scene.picture() for scene in scenes])
    halves = []
    for i in range(500):
        words = data.conversations(i)[0][0][1].split(" ")
        halves.append((" ".join(words[:len(words) // 2]), " ".join(words[len(words) // 2:])))
    batches = ((part, views.pick(part)) for part in chunks(range(500), 125))
    said = caption_set(vlm, Asked([(first + IMAGE, rest) for first, rest in halves]), batches)
    right = [judge(f"{first} {said[i]}", scenes[i])["exact"] for i, (first, _) in enumerate(halves)]
    return {"rest exact": 100 * statistics.mean(right)}


PROBES = {"questions": ask_questions, "shots": ask_by_rule, "layouts": finish_captions}


def probe(name: str, folder: Path, threads: int) -> dict[str, float]:
    """What a probe finds of a run, once."""
    kept = folder / f"{name}.json"
    if not kept.exists():
        torch.set_num_threads(threads)
        kept.write_text(json.dumps(PROBES[name](VLM.from_pretrained(str(folder)))))
    return json.loads(kept.read_text())


# ---------------------------------------------------------------------------------------------------------
# Runs

def train(options: list[str], folder: Path, threads: int) -> dict[str, float]:
    """Trains a run in `folder`, unless it is there; its scores, and the size, speed and peak memory (of the
    process, features kept included) of its training."""
    if not (folder / "usage.json").exists():
        if (folder / "checkpoint.safetensors").exists():
            options = ["--resume", folder]
        else:
            shutil.rmtree(folder, ignore_errors=True)  # stopped before its first checkpoint
            options = [*options, "--out", folder]
        process = subprocess.Popen([sys.executable, ROOT / "train.py", *options], cwd=ROOT, stdout=sys.stderr,
                                   env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(map(str, process.args))} failed")
        (folder / "usage.json").write_text(json.dumps({"peak_kib": usage.ru_maxrss}))
    config = json.loads((folder / "config.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (label, scores), *others = lines[-1]["scores"].items()
    row = {name: 100 * value if label.startswith("test") else value for name, value in scores.items()}
    for label, scores in others:
        label = label.split(" (")[0]
        if "exact" in scores:
            row[f"{label} exact"] = 100 * scores["exact"]
        else:
            row |= {f"{label} {name}": scores[name] for name in scores}
    row |= {f"exact at {line['step']}": 100 * line["exact"] for line in lines if "exact" in line}
    row["val loss"] = [line["val"] for line in lines if "val" in line][-1]
    row["trained parameters"] = 0
    with safe_open(folder / "checkpoint.safetensors", framework="pt") as file:
        for name in file.keys():
            if name.startswith("exp_avg."):
                row["trained parameters"] += math.prod(file.get_slice(name).get_shape())
    row["embeddings a picture"] = lines[-1]["embeddings"]
    row["ms a step"] = 1000 * config["training"]["batch"] / statistics.median(
        line["images_per_s"] for line in lines if "images_per_s" in line)
    return row | {"peak GiB": json.loads((folder / "usage.json").read_text())["peak_kib"] / 2 ** 20}


def compare(name: str, seeds: int, jobs: int, common: list[str]) -> None:
    """Trains the runs of a comparison, and prints its table."""
    if name == "from":
        start.make(ROOT / PUBLIC)
    threads = max(1, CORES // jobs)

    def run(options: list[str], seed: int) -> dict[str, float]:
        options = [*options, *common, "--seed", str(seed)]
        kept = ["--features", "out/experiments/features"]
        label = "_".join(option.removeprefix("--") for option in options)
        label = re.sub(rf"(?<![^_])({USUAL})(_|$)", "", label)
        digest = hashlib.sha256(label.encode()).hexdigest()[:8]
        folder = ROOT / "out" / "experiments" / f"{re.sub(r'[^a-z0-9_.,-]+', '-', label)[:60]}-{digest}"
        row = train([*options, *kept], folder, threads)
        found = probe(name, folder, threads) if name in PROBES else {}
        return found if name in ("questions", "shots") else row | found

    with ThreadPoolExecutor(jobs) as pool:
        started = {label: [pool.submit(run, options, seed) for seed in range(seeds)]
                   for label, options in COMPARISONS[name].items()}
        rows = {label: [future.result() for future in runs] for label, runs in started.items()}
    columns = [*dict.fromkeys(column for runs in rows.values() for run in runs for column in run)]
    print(f"\n{name}\n\n| |", " | ".join(columns), "|\n|---|" + "---:|" * len(columns))
    for label, runs in rows.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs if column in run]
            digits = 0 if column in COUNTS else 3 if column.endswith(FINE) else 1
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len({*values}) > 1 else ""
            cells.append(f"{statistics.mean(values):,.{digits}f}{spread}" if values else "")
        print(f"| {label} |", " | ".join(cells), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=[*COMPARISONS, "all"])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting (default: 3)")
    parser.add_argument("--jobs", type=int, default=1,
                        help="runs at a time, which share the cores (default: 1)")
    args, common = parser.parse_known_args()
    if min(args.seeds, args.jobs) < 1:
        parser.error("--seeds and --jobs are 1 or more")
    for option in common:
        if option.split("=")[0] in ("--seed", "--out", "--resume", "--features"):
            parser.error(f"{option} is set for each run: leave it out")
    for name in ALL if args.comparison == "all" else [args.comparison]:
        compare(name, args.seeds, args.jobs, common)


if __name__ == "__main__":
    main()
