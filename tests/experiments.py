"""Compares settings of train.py at one budget: trains each from several seeds and prints a table, mean ± spread.

    python tests/experiments.py adapters [--seeds 3] [options of train.py for every run, such as --steps 400]

Runs are kept in out/experiments/, so that a comparison that was stopped goes on where it stood.
"""
import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from adapters import ADAPTERS, IMAGE_POSITIONS  # noqa: E402

COMPARISONS = {
    "adapters": {adapter: ["--adapter", adapter] for adapter in ADAPTERS},
    "text": {f"{adapter}, {'reads the prompt' if text else 'blind'}": [
        "--adapter", adapter, "--prompt", "A picture:", *["--adapter-text"] * text]
        for adapter in ("qformer", "twoway") for text in (0, 1)},
    "positions": {f"{adapter}, {position}": ["--adapter", adapter, "--image-position", position]
                  for adapter in ("qformer", "pixelshuffle") for position in IMAGE_POSITIONS
                  if adapter == "pixelshuffle" or position != "rope-xy"},
    "queries": {f"{n} queries": ["--queries", str(n)] for n in (24, 32, 48, 64)},
    "spell": {f"--spell {weight}": ["--spell", weight] for weight in ("0", "0.3", "1", "3")},
    "lora": {"adapter alone": [], **{
        f"LoRA, rank {rank}, on {targets}": ["--lora", rank, "--lora-targets", targets]
        for rank in ("4", "16") for targets in ("q,v", "all")}},
}


def train(options: list[str], folder: Path) -> dict[str, float]:
    """Trains a run in `folder`, unless it is there; its scores, and size and speed of what was trained."""
    if not (folder / "metrics.jsonl").exists() or "scores" not in (folder / "metrics.jsonl").read_text():
        if (folder / "state.safetensors").exists():
            options = ["--resume", folder]
        else:
            shutil.rmtree(folder, ignore_errors=True)  # stopped before its first checkpoint
            options = [*options, "--out", folder]
        subprocess.run([sys.executable, ROOT / "train.py", *options], cwd=ROOT, check=True, stdout=sys.stderr)
    config = json.loads((folder / "config.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (label, scores), *others = lines[-1]["scores"].items()
    row = {name: 100 * value if label.startswith("test") else value for name, value in scores.items()}
    row |= {f"{label.split()[0]} exact": 100 * scores["exact"] for label, scores in others}
    with safe_open(folder / "adapter.safetensors", framework="pt") as file:
        row["parameters"] = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    speeds = [line["images_per_s"] for line in lines if "images_per_s" in line]
    row["val loss"] = [line["val"] for line in lines if "val" in line][-1]
    return row | {"ms a step": 1000 * config["training"]["batch"] / statistics.median(speeds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting (default: 3)")
    args, common = parser.parse_known_args()
    rows = {}
    for label, options in COMPARISONS[args.comparison].items():
        name = "".join(c if c.isalnum() else "-" for c in label)
        folder = ROOT / "out" / "experiments" / args.comparison
        runs = [train([*options, *common, "--seed", str(seed)], folder / f"{name}-{seed}")
                for seed in range(args.seeds)]
        rows[label] = {key: [run[key] for run in runs] for key in runs[0]}
    names = list(next(iter(rows.values())))
    print("| |", " | ".join(names), "|\n|---|" + "---:|" * len(names))
    for label, row in rows.items():
        cells = []
        for name in names:
            digits = 0 if name in ("parameters", "ms a step") else 1 if "exact" in row and name != "val loss" else 3
            spread = f" ± {statistics.stdev(row[name]):.{digits}f}" if args.seeds > 1 and name != "parameters" else ""
            cells.append(f"{statistics.mean(row[name]):,.{digits}f}{spread}")
        print(f"| {label} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
