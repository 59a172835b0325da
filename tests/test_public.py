"""Whole public VLMs equal the reference: pixels, prompts, logits, greedy answers (see fixtures/public.py)."""
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import VLM
from data import InputError
from fixtures.compare import close
from fixtures.pictures import ASKED, ASKED_OF_ONE, picture

FAMILIES = ("llava", "llava_qwen", "llava_llama3", "blip2_opt", "idefics3", "smolvlm", "nanovlm",
            "nanovlm_first")


def answers_equal_the_reference(folder, golden: dict) -> None:
    vlm = VLM.from_pretrained(str(folder))
    asked = ASKED_OF_ONE if "blip" in vlm.config["from"] else ASKED
    for i, (sizes, text) in enumerate(asked[:sum(key.startswith("ids") for key in golden)]):
        cut = [vlm.vit.preprocess.tiles(picture(*size)) for size in sizes]
        ids, before = vlm.encode(text, tiles=[tiles for _, *tiles in cut])
        assert before == len(ids) and ids == golden[f"ids{i}"].tolist()
        features = None
        if cut:
            pixels = torch.cat([pixels for pixels, *_ in cut])
            close(pixels[..., ::5, ::3], golden[f"pixels{i}"])
            features = vlm.features(pixels)
        inputs = vlm.read(torch.tensor([ids]), features)
        logits = vlm.llm.logits(vlm.llm.hidden(**inputs)[:, -3:])
        close(logits[0], golden[f"logits{i}"], 1e-3)
        if f"greedy{i}" in golden:
            assert vlm.llm.generate(**inputs, max_tokens=10) == [golden[f"greedy{i}"].tolist()]
            answer = vlm.tokenizer.decode(golden[f"greedy{i}"].tolist(), special=False).strip()
            assert vlm.caption([[picture(*size) for size in sizes]], text, max_tokens=10) == [answer]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_answers_equal_the_reference(name, fixtures):
    answers_equal_the_reference(fixtures / name, load_file(fixtures / name / "golden.safetensors"))


# How names in other files differ: as the first public ones were written, and as newer ones are
LAYOUTS = {
    "llava old": ("llava", r"^vision_tower\.", "vision_tower.vision_model."),
    "llava new": ("llava", r"^language_model\.model\.|^language_model\.(?=lm_head)|^(?=vision|multi)",
                  lambda match: {"": "model.", "language_model.": ""}.get(match[0], "model.language_model.")),
    "llava_qwen old": ("llava_qwen", r"^vision_tower\.", "vision_tower.vision_model."),
}


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_other_layouts(name, fixtures, tmp_path):
    fixture, old, new = LAYOUTS[name]
    for path in (fixtures / fixture).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    renamed = {re.sub(old, new, key): tensor for key, tensor in state.items()}
    assert renamed.keys() != state.keys()
    save_file(renamed, tmp_path / "model.safetensors")
    answers_equal_the_reference(tmp_path, load_file(tmp_path / "golden.safetensors"))
    save_file(renamed | {"visual.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="model.safetensors: tensor 'visual.norm.weight' is not part of a llava model"):
        VLM.from_pretrained(str(tmp_path))
