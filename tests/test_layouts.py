"""What is trained (--train), and on what sequences of pictures and text."""
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import sample
import train
from adapters import VLM
from data import (ANSWERS, LAST, LAYOUTS, WORD, arrange, draw_layout, draw_shots, few_shot, layout_weights,
                  stack)
from formats.captions import IMAGE
from support.shapes import Shapes
from fixtures.pictures import picture
from llm import LLM
from formats.files import InputError, read_tensors
from formats.tokenizer import Tokenizer
from test_vlm import QUICK, QUICK_SET, SMALL, command, interrupt, small
from vit import ViT

# ---------------------------------------------------------------------------------------------------------
# Parts that are trained whole


@pytest.mark.slow
@pytest.mark.parametrize("precision", ("bfloat16", "float32"))
def test_backbones_trained_whole_are_saved_and_resumed(precision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*SMALL, *QUICK, "--train", "adapter,llm,vit", "--precision", precision, "--layer", "-2"]
    assert command(monkeypatch, train, *options, "--out", "whole") == 0
    interrupt(monkeypatch, *options, "--out", "parts")
    assert command(monkeypatch, train, "--resume", "parts") == 0
    for part, untouched in (("llm", LLM.from_pretrained("assets/llm")), ("adapter", None),
                            ("vit", ViT.from_pretrained("assets/vit"))):
        whole, parts = (read_tensors(Path(run, "checkpoint.safetensors"), f"weight.{part}.")
                        for run in ("whole", "parts"))
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
        if untouched:
            moved = {name for name, p in untouched.named_parameters() if not torch.equal(p, whole[name])}
            unread = {name for name in whole if part == "vit" and name.startswith(("blocks.5.", "norm."))}
            assert moved == whole.keys() - unread and all(t.dtype == torch.float32 for t in whole.values())
    vlm = VLM.from_pretrained("whole", getattr(torch, precision))
    assert vlm.llm.dtype == vlm.vit.positions.dtype == getattr(torch, precision)
    saved = load_file("whole/checkpoint.safetensors")["weight.llm.embedding.weight"]
    assert torch.equal(vlm.llm.embedding.weight, saved.to(vlm.llm.dtype))
    lines = [json.loads(line) for line in Path("whole/captions-test.jsonl").read_text().splitlines()]
    pixels = torch.stack([vlm.vit.preprocess(Shapes(8, "test").picture(i)) for i in range(8)])
    with torch.no_grad():  # as the run did: where a backward pass may follow, attention takes another kernel
        said = vlm.answer([vlm.processor.encode("")] * 8, vlm.features(pixels))
    assert [line["caption"] for line in lines] == said
    Path("whole/checkpoint.safetensors").unlink()
    picture(90, 90).save("a.png")
    assert command(monkeypatch, sample, "a.png", "--model", "whole") == 2


def test_each_part_has_its_own_learning_rate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--adapter", "linear", *QUICK, "--steps", "1", "--warmup", "0", "--weight-decay", "0",
               "--precision", "float32"]
    rates = ["--lr", "1e-3", "--lr-llm", "1e-5", "--lr-vit", "0"]
    assert command(monkeypatch, train, *options, *rates, "--train", "adapter,llm,vit", "--out", "run") == 0
    for part, before, rate in (("llm", LLM.from_pretrained("assets/llm"), 1e-5),
                               ("vit", ViT.from_pretrained("assets/vit"), 0)):
        after = read_tensors(Path("run/checkpoint.safetensors"), f"weight.{part}.")
        moved = max((after[name] - p).abs().max().item() for name, p in before.named_parameters())
        assert moved == pytest.approx(rate, rel=0.05)  # AdamW's first step is as long as its rate


def test_frozen_parts_have_no_gradient_and_no_state(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [*SMALL, *QUICK, "--steps", "1", "--out", "run"]
    assert command(monkeypatch, train, *options, "--train", "adapter,llm") == 0
    state = load_file("run/checkpoint.safetensors")
    assert any(name.startswith("exp_avg.llm.") for name in state)
    assert not any("vit." in name for name in state)
    capsys.readouterr()
    for arguments, message in (
            (["--train", "adapter,eyes"], "unknown part 'eyes': choose from adapter, llm, vit"),
            (["--train", "llm"], "a new adapter must be trained too"),
            (["--train", "adapter,llm", "--lora", "2"], "llm can't be trained whole and get a LoRA"),
            (["--train", "adapter,vit", "--cache-features"], "its features change")):
        assert command(monkeypatch, train, *SMALL, *QUICK, *arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1, captured.err


def test_the_language_model_of_a_public_vlm_is_trained_alone(fixtures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        picture(20 + i, 30).save(f"{i}.png")
    rows = "".join(f"{i}.png,It is {i % 3}.\n" for i in range(12))
    Path("c.csv").write_text("image,caption\n" + rows)
    options = ["--from", fixtures / "llava", "--data", "c.csv", "--train", "llm", *QUICK_SET]
    assert command(monkeypatch, train, *options, "--precision", "float32", "--out", "run") == 0
    before, after = VLM.from_pretrained(str(fixtures / "llava")), VLM.from_pretrained("run")
    changed = {key for key, p in after.named_parameters() if not torch.equal(p, before.get_parameter(key))}
    assert changed == before.weights("llm").keys()


def test_what_is_held_in_float32_computes_in_the_runs_precision(fixtures):
    vlm = small(fixtures).train()
    vlm.dtype = torch.bfloat16
    vlm.llm.requires_grad_()
    tokens, where, targets = stack([vlm.processor.encode("", "abc")])
    logits = vlm.logits(tokens, vlm.features(torch.randn(1, 3, 30, 30)), where)
    F.cross_entropy(logits.float(), targets).backward()
    assert logits.dtype == torch.bfloat16 and vlm.llm.embedding.weight.grad.dtype == torch.float32
    assert all(p.grad is None for p in vlm.vit.parameters())


# ---------------------------------------------------------------------------------------------------------
# Layouts

def test_a_layout_parts_a_caption_and_places_its_picture():
    scenes = Shapes(200, "train")
    drawn = {layout: [arrange(layout, scenes, i, 3, 1, "A photo of")[0] for i in range(200)]
             for layout in LAYOUTS}
    captions = [caption for _, caption in drawn["image-text"]]
    assert all(text == f"{IMAGE}A photo of" and caption in scenes.scene(i).captions()
               for i, (text, caption) in enumerate(drawn["image-text"]))
    cuts = set()
    for caption, (text, rest) in zip(captions, drawn["text-image-text"]):
        prefix, after = text.split(IMAGE)
        assert not after and rest and f"{prefix} {rest}".strip() == caption
        cuts.add(len(prefix.split()))
    assert {0, 1, 5, 9} < cuts
    for i, (text, answer) in enumerate(drawn["text-image"]):
        caption, question = text.split(IMAGE)
        assert question == " match?" and answer == ("yes" if caption in scenes.scene(i).captions() else "no")
    assert 80 < sum(answer == "no" for _, answer in drawn["text-image"]) < 120
    again, later = ([arrange("text-image", scenes, i, 3, epoch)[0] for i in range(200)]
                    for epoch in (1, 2))
    assert again == drawn["text-image"] != later


def test_layouts_are_drawn_by_weight():
    weights = layout_weights("image-text:3,text-image:.999")
    assert weights == {"image-text": 3, "text-image": 0.999}
    assert layout_weights("text-image") == {"text-image": 1}
    drawn = [draw_layout(weights, 0, epoch, i) for epoch in range(2) for i in range(2000)]
    assert 2900 < drawn.count("image-text") < 3100 and drawn[:2000] != drawn[2000:]
    for mix in ("", "text", "image-text:0", "image-text:-1", "image-text:nan", "image-text:1,text:1"):
        with pytest.raises(InputError, match="unknown layout|is not a number from"):
            layout_weights(mix)


def test_words_before_the_picture_are_targets_on_request(fixtures):
    vlm = small(fixtures)
    example = vlm.processor.encode("ab<image>", "c")
    assert example.ids == [0, 20, 21, *vlm.processor.image_tokens(), 22, 52]
    assert stack([example])[2].tolist() == [22, 52]
    tokens, where, targets = stack([example], (WORD, *ANSWERS))
    assert where.tolist() == [0, 1, len(example.ids) - 3, len(example.ids) - 2]
    assert targets.tolist() == [20, 21, 22, 52]  # neither the start token nor an image


@pytest.mark.slow
def test_a_mix_of_layouts_is_resumed_and_reports_matching(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mix = "image-text:0.4,text-image-text:0.3,text-image:0.3"
    options = [*SMALL, *QUICK, "--layout", mix, "--prefix-loss"]
    assert command(monkeypatch, train, *options, "--out", "whole") == 0
    out = capsys.readouterr().out
    assert "matching 0." in out and out.splitlines()[-4].rstrip().endswith("| matching |")
    assert json.loads(Path("whole/config.json").read_text())["layout"] == mix
    lines = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    assert [i for i, line in enumerate(lines) if "matching" in line] == [1, 3]
    assert all("matching" in row for row in lines[-1]["scores"].values())
    interrupt(monkeypatch, *options, "--out", "parts")
    assert command(monkeypatch, train, "--resume", "parts") == 0
    whole, parts = (load_file(f"{run}/checkpoint.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert command(monkeypatch, train, *SMALL, *QUICK, "--layout", "text", "--out", "other") == 2
    assert "unknown layout 'text': choose from image-text" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# Shots

def test_shots_come_solved_before_the_last():
    examples = [[(IMAGE, "a cat"), ("Big?", "no")], [(f"It is {IMAGE}:", "a dog")],
                [(f"of a{IMAGE}", "bird"), ("Big?", "yes")]]
    (text, answer), later = few_shot(examples)
    assert text == f"{IMAGE}a cat\nBig? no\nIt is {IMAGE}: a dog\nof a{IMAGE}" and answer == "bird"
    assert later == ("Big?", "yes")
    batch = [7, 5, 9, 5, 2]
    drawn = [draw_shots(batch, 1, 3, 0, epoch) for epoch in range(300)]
    assert {len(shots) for shots in drawn} == {0, 1, 2, 3} and {*sum(drawn, [])} == {0, 2, 4}  # never itself
    assert all(len({*shots}) == len(shots) for shots in drawn)
    assert drawn == [draw_shots(batch, 1, 3, 0, epoch) for epoch in range(300)]
    assert draw_shots([3, 3], 0, 1, 0, 0) == draw_shots(batch, 1, 0, 0, 0) == []


def test_a_shot_has_the_ids_of_a_caption_that_is_learned():
    tokenizer = Tokenizer.from_pretrained("assets/llm")
    vlm = VLM(ViT.from_pretrained("assets/vit"), LLM.from_pretrained("assets/llm"), tokenizer,
              dict(adapter="qformer", adapter_sizes=dict(queries=3)))
    one, two = "a large red circle", "there is a small blue star"
    alone, start = [vlm.processor.encode("", caption)[0] for caption in (one, two)], len(vlm.processor.start)
    [(text, answer)] = few_shot([[(IMAGE, one)], [(IMAGE, two)]])
    ids, kinds = vlm.processor.encode(text, answer)
    learned = [vlm.processor.encode("", caption).kinds.count(LAST) for caption in (one, two)]
    assert ids == alone[0] + alone[1][start:] and kinds.count(LAST) == learned[1]
    assert len(stack([(ids, kinds)], (WORD, *ANSWERS))[2]) == sum(learned)


@pytest.mark.slow
@pytest.mark.parametrize("adapter, cache", (
    ("qformer", "--cache-features"), ("flamingo", "--no-cache-features")))
def test_training_with_shots(adapter, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen, forward = [], VLM.forward

    def spy(vlm, batch, features):
        pictures = (batch.tokens == vlm.llm.config.vocabulary).sum(1).tolist()
        assert sum(pictures) == len(features) and max(pictures) == batch.most_images
        seen.append((pictures, batch, features.detach().clone()))
        return forward(vlm, batch, features)

    monkeypatch.setattr(VLM, "forward", spy)
    options = ["--adapter", adapter, *SMALL, *QUICK, "--shots", "3", cache]
    assert command(monkeypatch, train, *options, "--out", "whole") == 0
    steps = [pictures for pictures, *_ in seen if len(pictures) == 16]
    assert len(steps) == 8 and all({*pictures} <= {1, 2, 3, 4} and {*pictures} > {1, 4} for pictures in steps)
    pictures, _, features = seen[0]
    last = features[torch.tensor(pictures).cumsum(0) - 1]  # each row's own, all different
    assert len(last.unique(dim=0)) == len(features.unique(dim=0)) == 16
    interrupt(monkeypatch, *options, "--out", "parts")
    assert command(monkeypatch, train, "--resume", "parts") == 0
    whole, parts = (load_file(f"{run}/checkpoint.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    capsys.readouterr()
    assert command(monkeypatch, train, *SMALL, *QUICK, "--shots", "8", "--accumulate", "2") == 2
    assert "--shots 8: at most 7, for they come from" in capsys.readouterr().err


@pytest.mark.slow
def test_sampling_after_shots(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [*SMALL, *QUICK, "--shots", "2", "--prompt", "It shows"]
    assert command(monkeypatch, train, *options, "--out", "run") == 0
    pictures = [picture(90, 60 + i) for i in range(3)]
    for i, one in enumerate(pictures):
        one.save(f"{i}.png")
    capsys.readouterr()
    common = ["--model", "run", "--precision", "float32", "--max-tokens", "8"]
    shots = ["--shot", "0.png", " a large\ncat", "--shot", "1.png", "a dog"]
    assert command(monkeypatch, sample, "2.png", *shots, *common, "--show-prompt") == 0
    captured = capsys.readouterr()
    text = "<image>It shows a large cat\n<image>It shows a dog\n<image>It shows"
    expected, = VLM.from_pretrained("run").caption([pictures], text, max_tokens=8)
    assert captured.out.strip() == expected
    assert re.sub(r"<\|endoftext\|>|<image (begin|end)>|×4", "", captured.err).strip() == text
    assert command(monkeypatch, sample, "2.png", "--shot", "none.png", "a cat", *common) == 2
    assert "none.png: no such picture" in capsys.readouterr().err
    (tmp_path / "set.csv").write_text("image,caption\n2.png,a bird\n")
    assert command(monkeypatch, sample, "--data", "set.csv", "--save", "said", *shots, *common) == 0
    assert json.loads((tmp_path / "said").read_text())["caption"] == expected
    capsys.readouterr()
    assert command(monkeypatch, sample, "2.png", "--prompt", "<image><image>", *shots, *common) == 2
    assert "--prompt takes one <image>" in capsys.readouterr().err
    *_, last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    scored = {label.rpartition(" (")[0] for label in json.loads(last)["scores"]}
    assert scored == {"test", "unseen", "test, 2 shots", "unseen, 2 shots"}
