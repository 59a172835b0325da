"""Compares settings of train.py at one budget: trains each from several seeds and prints mean ± spread.

    python tests/experiments.py adapters [--seeds 3] [options of train.py for every run, such as --steps 400]

Runs are kept in out/experiments/, so that a comparison that was stopped goes on where it stood, and one
that others share isn't trained twice; so are the pictures' features, 0.5 GB a seed. With two jobs a run has
half of the cores: that is faster in all.
"""
import argparse
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from adapters import ADAPTERS, IMAGE_POSITIONS  # noqa: E402
from fixtures import start  # noqa: E402

LORA = ["--lora", "16", "--lora-targets", "all"]
VICUNA = "USER: <image>\nDescribe this image. ASSISTANT:"
PUBLIC = "out/public"  # where fixtures/start.py's models go
USUAL = "adapter_qformer|layout_image-text|image-position_sequence|shots_0"  # what train.py does unasked
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
    "positions": {position: ["--image-position", position] for position in IMAGE_POSITIONS
                  if position != "rope-xy"},
    "grid-positions": {position: ["--adapter", "mlp", *LORA, "--image-position", position]
                       for position in IMAGE_POSITIONS},
    "shots": {f"--shots {shots}": ["--shots", shots] for shots in "0124"},
    "queries": {f"{n} queries": ["--queries", str(n)] for n in (24, 32, 48, 64)},
    "spell": {f"--spell {weight}": ["--spell", weight] for weight in ("0", "0.3", "1", "3")},
    "lora": {f"{adapter}, {label}": ["--adapter", adapter, *options]
             for adapter in ("qformer", "mlp") for label, options in {
                 "adapter alone": [], "LoRA 4": ["--lora", "4", "--lora-targets", "all"],
                 "LoRA 16": LORA,
                 "whole LLM": ["--train", "adapter,llm"]}.items()},
    "from": {"Q-Former, from the parts": [],
             "Q-Former, from BLIP-2's layout": ["--from", f"{PUBLIC}/blip2", "--spell", "1"],
             "MLP and LoRA, from the parts": ["--adapter", "mlp", "--layer", "-1", *LORA],
             "MLP and LoRA, from the parts, LLaVA's prompt": [  # which the built-in LLM has never read
                 "--adapter", "mlp", "--layer", "-1", *LORA, "--prompt", VICUNA],
             "MLP and LoRA, from LLaVA's layout": ["--from", f"{PUBLIC}/llava", *LORA]},
}


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
    row |= {f"{label.split(' (')[0]} exact": 100 * scores["exact"] for label, scores in others}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting (default: 3)")
    parser.add_argument("--jobs", type=int, default=1,
                        help="runs at a time, which share the cores (default: 1)")
    args, common = parser.parse_known_args()
    if args.comparison == "from":
        start.make(ROOT / PUBLIC)
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)

    def run(options: list[str], seed: int) -> dict[str, float]:
        options = [*options, *common, "--seed", str(seed)]
        kept = ["--features", "out/experiments/features"]
        name = re.sub(rf"\b({USUAL})(_|$)", "", "_".join(option.removeprefix("--") for option in options))
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{re.sub(r'[^a-z0-9_.,-]+', '-', name)[:60]}-{digest}"
        return train([*options, *kept], ROOT / "out" / "experiments" / name, threads)

    with ThreadPoolExecutor(args.jobs) as pool:
        started = {label: [pool.submit(run, options, seed) for seed in range(args.seeds)]
                   for label, options in COMPARISONS[args.comparison].items()}
        rows = {label: [future.result() for future in runs] for label, runs in started.items()}
    names = [*dict.fromkeys(name for runs in rows.values() for run in runs for name in run)]
    print("| |", " | ".join(names), "|\n|---|" + "---:|" * len(names))
    for label, runs in rows.items():
        cells = []
        for name in names:
            values = [run[name] for run in runs if name in run]
            digits = 0 if name in COUNTS else 3 if name in FINE else 1
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len({*values}) > 1 else ""
            cells.append(f"{statistics.mean(values):,.{digits}f}{spread}" if values else "")
        print(f"| {label} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
