"""The notebook's cells run in their order: on a CPU, for a few steps, without the two lines that fetch."""
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from conftest import ROOT


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, capfd):
    book = json.loads((ROOT / "examples/colab.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 4
    shown = []
    display = types.ModuleType("IPython.display")
    display.Image, display.display = Path, lambda path: shown.append(path.stat().st_size)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(tmp_path)
    work = tmp_path / "multimodal"  # what a clone would be
    work.mkdir()
    for path in ROOT.iterdir():
        if path.name != "out":
            (work / path.name).symlink_to(path)
    names = {}
    small = "--val-size 4 --batch 4 --warmup 1 --workers 0 --device cpu"
    for cell in cells:
        cell = re.sub(r"STEPS, SCENES = .*", "STEPS, SCENES = 2, 8", cell)
        cell = cell.replace("python train.py", f"python train.py {small}")
        for part in re.split(r"^([!%].*)\n?", cell, flags=re.M):
            if part.startswith(("!git", "!pip")):
                continue
            if part.startswith("%cd "):
                monkeypatch.chdir(part[4:])
            elif part.startswith("!"):
                line = part[1:].format(**names).replace("python ", f"{sys.executable} ", 1)
                subprocess.run(line, shell=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            else:
                exec(part, names)
    assert len(shown) == 3 and min(shown) > 1000
    assert (work / "out/notebook/config.json").is_file() and capfd.readouterr().out.strip()
