"""Where code may live: imports run one way, from the rooms to read down to the cellars to trust."""
import ast
from pathlib import Path

import pytest

from conftest import ROOT

ORDER = ("train", "sample", "adapters", "llm", "vit", "data", "lora", "support", "formats")  # top to bottom
SIDE_BY_SIDE = {("llm", "vit"), ("data", "lora"), ("support", "lora")}  # know nothing of each other
FILES = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("formats/*.py")]


def place(path: Path) -> str:
    return path.stem if path.parent == ROOT else path.parent.name


def imported(path: Path) -> set[str]:
    """The rooms and cellars that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.partition(".")[0] for name in names} & {*ORDER}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    here = place(path)
    for there in imported(path):
        assert ORDER.index(here) <= ORDER.index(there), f"{path} imports {there}"
        assert (here, there) not in SIDE_BY_SIDE and (there, here) not in SIDE_BY_SIDE
        assert here != there or here in ("support", "formats")


def test_every_room_is_there():
    assert {place(path) for path in FILES} == {*ORDER}
