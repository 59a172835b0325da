"""What is trained (--train), and on what sequences of pictures and text."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import sample
import train
from adapters import VLM
from data import stack
from fixtures.pictures import picture
from llm import LLM
from test_vlm import QUICK, SMALL, command, small
from vit import ViT

# ---------------------------------------------------------------------------------------------------------
# Parts that are trained whole


def interrupt(monkeypatch, *options) -> None:
    """Runs train.py up to its first checkpoint."""
    checkpoint = train.save_checkpoint

    def stop(*arguments):
        checkpoint(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_checkpoint", stop)
    assert command(monkeypatch, train, *options) == 130
    monkeypatch.setattr(train, "save_checkpoint", checkpoint)


@pytest.mark.parametrize("precision", ("bfloat16", "float32"))
def test_backbones_trained_whole_are_saved_and_resumed(precision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*SMALL, *QUICK, "--train", "adapter,llm,vit", "--precision", precision, "--layer", "-2"]
    assert command(monkeypatch, train, *options, "--out", "whole") == 0
    interrupt(monkeypatch, *options, "--out", "parts")
    assert command(monkeypatch, train, "--resume", "parts") == 0
    for part, untouched in (("llm", LLM.from_pretrained("assets/llm")), ("vit", ViT.from_pretrained("assets/vit")),
                            ("adapter", None)):
        whole, parts = (load_file(f"{run}/{part}.safetensors") for run in ("whole", "parts"))
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
        if untouched:
            moved = {name for name, p in untouched.named_parameters() if not torch.equal(p, whole[name])}
            unread = {name for name in whole if part == "vit" and name.startswith(("blocks.5.", "norm."))}
            assert moved == whole.keys() - unread and all(t.dtype == torch.float32 for t in whole.values())
    vlm = VLM.from_pretrained("whole", getattr(torch, precision))
    assert vlm.llm.dtype == vlm.vit.positions.dtype == getattr(torch, precision)
    assert torch.equal(vlm.llm.embedding.weight, load_file("whole/llm.safetensors")["embedding.weight"].to(vlm.llm.dtype))
    lines = [json.loads(line) for line in Path("whole/captions-test.jsonl").read_text().splitlines()]
    features = vlm.features(torch.stack([vlm.vit.preprocess(train.Shapes(8, "test").picture(i)) for i in range(8)]))
    assert [line["caption"] for line in lines] == vlm.caption(features=features)
    Path("whole/llm.safetensors").unlink()
    picture(90, 90).save("a.png")
    assert command(monkeypatch, sample, "a.png", "--model", "whole") == 2


def test_each_part_has_its_own_learning_rate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--adapter", "linear", *QUICK, "--steps", "1", "--warmup", "0", "--weight-decay", "0", "--precision", "float32"]
    rates = ["--lr", "1e-3", "--lr-llm", "1e-5", "--lr-vit", "0"]
    assert command(monkeypatch, train, *options, *rates, "--train", "adapter,llm,vit", "--out", "run") == 0
    for part, before, rate in (("llm", LLM.from_pretrained("assets/llm"), 1e-5), ("vit", ViT.from_pretrained("assets/vit"), 0)):
        after = load_file(f"run/{part}.safetensors")
        moved = max((after[name] - p).abs().max().item() for name, p in before.named_parameters())
        assert moved == pytest.approx(rate, rel=0.05)  # AdamW's first step is as long as its rate


def test_frozen_parts_have_no_gradient_and_no_state(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [*SMALL, *QUICK, "--steps", "1", "--out", "run"]
    assert command(monkeypatch, train, *options, "--train", "adapter,llm") == 0
    state = load_file("run/state.safetensors")
    assert any(name.startswith("exp_avg.llm.") for name in state) and not any("vit." in name for name in state)
    assert not Path("run/vit.safetensors").exists()
    capsys.readouterr()
    for arguments, message in (
            (["--train", "adapter,eyes"], "--train adapter,eyes: a list of adapter, llm and vit"),
            (["--train", "llm"], "a new adapter must be trained too"),
            (["--train", "adapter,llm", "--lora", "2"], "llm can't be trained whole and get a LoRA"),
            (["--train", "adapter,vit", "--cache-features"], "its features change")):
        assert command(monkeypatch, train, *SMALL, *QUICK, *arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1, captured.err


def test_what_is_held_in_float32_computes_in_the_runs_precision(fixtures):
    vlm = small(fixtures).train()
    vlm.dtype = torch.bfloat16
    vlm.llm.requires_grad_()
    tokens, where, targets = stack([vlm.encode("", "abc")])
    logits = vlm(tokens, vlm.features(torch.randn(1, 3, 30, 30)), where)
    F.cross_entropy(logits.float(), targets).backward()
    assert logits.dtype == torch.bfloat16 and vlm.llm.embedding.weight.grad.dtype == torch.float32
    assert all(p.grad is None for p in vlm.vit.parameters())
