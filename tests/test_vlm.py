"""The VLM, the scores, and the two command lines from picture and caption to text."""
import inspect
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import layers
import sample
import train
from adapters import ADAPTERS, VLM
from data import ANSWERS, IMAGE_PART, LAST, WORD, stack
from support.console import run
from support import scores
from support.shapes import Shapes
from support.words import words
from formats.files import InputError
from fixtures.pictures import picture
from llm import LLM, token_losses
from vit import ViT


def small(fixtures, adapter: str = "qformer", llm: str = "llama", image_position: str = "sequence",
          **sizes) -> VLM:
    """CLIP and an LLM's fixtures joined by a random adapter that says something about the picture."""
    torch.manual_seed(0)
    if "queries" in inspect.signature(ADAPTERS[adapter]).parameters:
        sizes |= dict(queries=5, layers=3, width=16, heads=2)
    vlm = VLM(ViT.from_pretrained(str(fixtures / "clip")), LLM.from_pretrained(str(fixtures / llm)),
              Letters(), dict(adapter=adapter, adapter_sizes=sizes, image_position=image_position))
    for p in vlm.trained.values():
        torch.nn.init.normal_(p, std=0.5)
    return vlm.eval()


class Letters:
    """A tokenizer of letters to ids below 53, the fixture's vocabulary."""
    prefix, strip = [], ""

    def __init__(self):
        self.bytes = {i: b"\n" if i == 52 else bytes([97 + i % 26]) for i in range(53)}
        self.added = {}

    def add(self, token, id, special=False):
        self.added[token] = id

    def encode(self, text, special=True, plain=range(0)):
        return [self.added.get(c, 52 if c == "\n" else ord(c[0]) % 26 + 1)
                for c in re.findall(r"(?s)<[^<>]*>|.", text)]

    def decode(self, ids, special=True):
        return b"".join(self.bytes[i] for i in ids).decode()


# ---------------------------------------------------------------------------------------------------------
# The VLM

@torch.no_grad()
def test_images_stand_where_the_text_says(fixtures):
    vlm = small(fixtures)
    V, Q = vlm.llm.config.vocabulary, 5
    image = [V, *[V + 2] * Q, V + 1]
    assert vlm.processor.encode("")[0] == [0, *image]
    assert vlm.processor.encode("ab")[0] == [0, *image, 20, 21]
    ids, kinds = vlm.processor.encode("a<image>b<image>", "cd")
    assert ids == [0, 20, *image, 21, *image, 22, 23, 52]
    parts = [IMAGE_PART] * len(image)
    assert kinds == [WORD, WORD, *parts, WORD, *parts, LAST, LAST, LAST]
    # a space parts prompt and caption
    assert vlm.processor.encode("ab", "c")[0][-3:] == vlm.processor.encode("", " c")[0][-3:]
    assert len(vlm.processor.encode("", "c" * 500)[0]) == 1 + len(image) + 128
    features = vlm.features(torch.randn(3, 3, 30, 30, generator=torch.Generator().manual_seed(1)))
    texts = "a<image>b<image>", "aaaaaaaaa<image>"
    rows = torch.tensor([vlm.processor.encode(text)[0] for text in texts])
    x = vlm.embed(rows, vlm.embed_images(features))
    images = vlm.adapter(features)
    assert torch.allclose(x[0, 3:3 + Q], images[0], atol=1e-5)
    assert torch.allclose(x[0, 6 + Q:6 + 2 * Q], images[1], atol=1e-5)
    assert torch.allclose(x[1, 11:11 + Q], images[2], atol=1e-5)
    assert torch.equal(x[0, 2], vlm.markers[0]) and torch.equal(x[0, 3 + Q], vlm.markers[1])
    assert torch.equal(x[1, :10], vlm.llm.embed(rows[1, :10]))


@torch.no_grad()
def test_forward_scores_the_targets_alone(fixtures):
    vlm = small(fixtures)
    features = vlm.features(torch.randn(2, 3, 30, 30))
    tokens, where, targets = stack([vlm.processor.encode("", "abc"), vlm.processor.encode("a", "b")])
    logits = vlm.logits(tokens, features, where)
    whole = vlm.llm(embeddings=vlm.embed(tokens, vlm.embed_images(features)))
    expected = torch.cat([whole[0, 7:11], whole[1, 8:11]])
    assert targets.tolist() == [20, 21, 22, 52, *vlm.processor.encode("a", "b")[0][-3:]]
    assert torch.allclose(logits, expected, atol=1e-5)


@torch.no_grad()
def test_images_are_to_spell_captions(fixtures):
    vlm = small(fixtures)
    examples, captions = [[("a<image>b<image>", None)], [("", "cc")]], [["ab", "abcabcabc"], ["c"]]
    batch = vlm.processor.batch(examples, spelled=captions, queries=5)
    words = batch.spelling.targets
    features = vlm.features(torch.randn(3, 3, 30, 30))
    images = vlm.adapter(features)
    assert words.tolist() == [20, 21, 20, 21, 22, 20, 21, 22]  # no more than the five queries
    expected = torch.cat([images[0, :2], images[1, :5], images[2, :1]]) @ vlm.llm.embedding.weight.T
    lost, letters = vlm(batch, features)
    assert torch.allclose(letters, F.cross_entropy(expected, words, reduction="none"), atol=1e-5)
    assert torch.equal(lost, vlm(batch._replace(spelling=None), features)[0])


@pytest.mark.slow
@pytest.mark.parametrize("adapter, kinds", (("qformer", 2), ("resampler", 2), ("flamingo", 1)))
def test_blocks_of_a_kind_are_one_graph_for_all_lengths(adapter, kinds, fixtures, monkeypatch):
    """As torch.compile sees it: nothing breaks a graph, and no layer or length needs another. A Q-Former has
    two kinds, with a picture to read and without; a resampler's first reads one row of queries for all."""
    vlm, graphs = small(fixtures, adapter).train(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def compiled(module, **options):
        compile(module, backend=backend, fullgraph=True, **options)

    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    torch._dynamo.reset()
    batches = []
    for texts in (["abc", "ab", "a", "b"], ["abcabca", "c", "ab"], ["cab", "abcba", "b", "c", "a", "b"]):
        examples, spelled = [[("", text)] for text in texts], [[text] for text in texts]
        batch = vlm.processor.batch(examples, spelled=spelled, queries=5)
        batches.append((batch, torch.randn(len(texts), 3, 30, 30)))

    def losses():
        return [loss for batch, pixels in batches for loss in vlm(batch, vlm.features(pixels))]

    expected = losses()
    pictures = [Shapes(9).picture(i) for i in range(4)]
    said = vlm.eval().caption(pictures, max_tokens=20)
    vlm.train().compile_blocks()
    for ours, theirs in zip(expected, losses()):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert len(graphs) == 2 + kinds  # of encoder and LLM too
    for vlm.llm.static in (False, True):
        assert vlm.eval().caption(pictures, max_tokens=20) == said


def test_what_is_computed_again_is_the_same(fixtures):
    """With `recomputes` a block runs again in the backward pass, on what it ran on first."""
    vlm, runs = small(fixtures).train(), []
    vlm.llm.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    batch = vlm.processor.batch([[("", "abc")], [("a", "b")]])
    features = vlm.features(torch.randn(2, 3, 30, 30))
    found = []
    for vlm.llm.recomputes in (False, True):
        vlm.zero_grad()
        vlm(batch, features)[0].mean().backward()
        found.append({name: p.grad.clone() for name, p in vlm.trained.items()})
    assert len(runs) == 3 and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_loss_in_parts_is_the_same():
    """However few scores exist at a time, the losses and their gradients are those of all at once."""
    torch.manual_seed(0)
    states, head = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    targets, most_seen = torch.randint(11, (7,)), []

    def logits(x):
        most_seen.append(len(x) * 11)
        return x @ head.T

    expected = F.cross_entropy(logits(states), targets, reduction="none")
    wanted = torch.autograd.grad(expected.square().sum(), (states, head))
    most_seen.clear()
    lost = token_losses(states, targets, logits, 11, rows=3)
    found = torch.autograd.grad(lost.square().sum(), (states, head))
    assert torch.allclose(lost, expected) and max(most_seen) == 33
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted))


def test_captions_do_not_depend_on_the_batch(fixtures):
    vlm = small(fixtures)
    pictures = [picture(40, 40), picture(31, 50), Image.new("RGB", (9, 9), "red")]
    together = vlm.caption(pictures, max_tokens=12)
    assert together == [vlm.caption([p], max_tokens=12)[0] for p in pictures] and len(set(together)) > 1
    pair = vlm.caption([pictures[:2], pictures[1:]], prompt="<image>a<image>b", max_tokens=12)
    assert pair == [vlm.caption([pictures[i:i + 2]], prompt="<image>a<image>b", max_tokens=12)[0]
                    for i in (0, 1)]
    for entries, count in ((pictures, 1), ([pictures[:2], pictures[2:]], 1), ([pictures[:2], pictures], 3)):
        with pytest.raises(InputError, match=f"room for 2 pictures, not {count}"):
            vlm.caption(entries, prompt="<image><image>")
    assert vlm.caption([]) == [] and vlm.llm.generate([]) == []
    with pytest.raises(InputError, match=r"for one text, \[ids\]"):
        vlm.llm.generate([1, 2, 3])
    with pytest.raises(InputError, match=r"for one, \[picture\]"):
        vlm.caption(pictures[0])


@torch.no_grad()
def test_an_answer_has_the_mean_log_probability_of_its_tokens(fixtures):
    vlm = small(fixtures, text=4)
    rows = [vlm.processor.encode("a"), vlm.processor.encode("bcb", earlier=[("a", "cc")])]
    features = vlm.features(torch.randn(2, 3, 30, 30))
    answers = vlm.answer(rows, features, max_tokens=6, score=True)
    assert answers == vlm.answer(rows, features, max_tokens=6) and len({*answers}) == 2
    silent = vlm.answer(rows, features, max_tokens=0, score=True)
    assert [answer.log_probability for answer in silent] == [0, 0]
    rows = [row.ids for row in rows]
    for i, answer in enumerate(answers):
        words = torch.tensor([[0, 20, -1, -1]])  # what the adapter reads: the start, "a", no answer
        images = vlm.embed_images(features[i:i + 1], words)
        [ids] = vlm.llm.generate(embeddings=vlm.embed(torch.tensor([rows[i]]), images),
                                 max_tokens=6, end_tokens=vlm.processor.ends, keep_end=True)
        tokens, where, targets = stack([(rows[i] + ids, [WORD] * len(rows[i]) + [LAST] * len(ids))])
        logits = vlm.llm.logits(vlm.states(tokens, images, where))
        assert answer.log_probability == pytest.approx(-F.cross_entropy(logits, targets).item(), abs=1e-4)


@pytest.mark.parametrize("adapter", ("linear", "qformer", "flamingo"))
@torch.no_grad()
def test_a_long_prompt_costs_the_others_no_words(adapter, fixtures):
    vlm = small(fixtures, adapter)
    room = vlm.processor.max_positions - len(vlm.processor.encode("")[0])
    texts = ["<image>a", "b<image>" + "b" * (room - 4), "c", "d<image>"]
    rows = [vlm.processor.encode(text, images=0) for text in texts]
    shown = [text.count("<image>") for text in texts]
    features = vlm.features(torch.randn(sum(shown), 3, 30, 30)).split(shown)
    together = vlm.answer(rows, torch.cat(features), max_tokens=8, score=True)
    for row, seen, answer in zip(rows, features, together):
        [alone] = vlm.answer([row], seen if len(seen) else None, max_tokens=8, score=True)
        assert answer == alone
        assert answer.log_probability == pytest.approx(alone.log_probability, abs=1e-4)


@pytest.mark.parametrize("options", (dict(learned=(WORD, *ANSWERS)), dict(learned=(LAST,))))
def test_what_the_adapter_reads_of_a_prompt_is_what_it_will_be_asked(options, fixtures):
    vlm = small(fixtures, text=8)
    batch = vlm.processor.batch([[("<image>abc", "de"), ("fg", "h")]], **options)
    asked = vlm.processor.prompts([vlm.processor.encode("<image>abc")])
    assert batch.prompts.tolist() == asked.tolist()


def test_only_the_adapter_is_trained(fixtures):
    vlm = small(fixtures).train()
    assert not vlm.vit.training and not vlm.llm.training and vlm.adapter.training
    batch = vlm.processor.batch([[("", "abc")]])
    vlm(batch, vlm.features(torch.randn(1, 3, 30, 30)))[0].mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in vlm.trained.items()
               if not name.endswith("k.bias"))
    assert all(p.grad is None and not p.requires_grad for part in (vlm.vit, vlm.llm)
               for p in part.parameters())
    assert set(vlm.trained) == {name for name, p in vlm.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------------------------------------------------
# Scores

def test_scores_equal_pycocoevalcap(fixtures):
    golden = json.loads((fixtures / "scores.json").read_text())
    candidates = [text.split() for text in golden["candidates"]]
    references = [[text.split() for text in texts] for texts in golden["references"]]
    assert scores.bleu(candidates, references) == pytest.approx(golden["bleu"], abs=1e-3)
    each = scores.cider(candidates, references)
    assert sum(each) / len(each) == pytest.approx(golden["cider"], abs=1e-3)
    assert golden["cider"] > 0.3 and golden["bleu"][3] > 0.05


def test_words_of_a_caption_are_those_of_coco_caption(fixtures):
    wrong = []
    for line in (fixtures / "words.jsonl").read_text(encoding="utf-8").splitlines():
        golden = json.loads(line)
        if words(golden["caption"]) != golden["words"]:
            wrong.append((golden["caption"], words(golden["caption"])))
    assert not wrong


def test_shapes_are_judged():
    captions = Shapes(40, "test")
    perfect = scores.rate(captions, {i: captions.scene(i).captions()[i % 4] for i in range(40)})[0]
    assert perfect == dict(exact=1, shape=1, colour=1, size=1, count=1, relation=1)
    others = {i: captions.scene((i + 1) % 40).captions()[0] for i in range(40)}
    assert scores.rate(captions, others)[0]["exact"] < 0.1
    text = scores.table({"test": perfect, "val": {"BLEU-4": 0.1234}})
    assert "100.0 %" in text and "0.123" in text and len(set(map(len, text.splitlines()))) == 1


# ---------------------------------------------------------------------------------------------------------
# Command lines

QUICK_SET = ["--val-size", "8", "--steps", "8", "--batch", "16", "--workers", "0", "--save-every", "4",
             "--log-every", "2", "--warmup", "2"]  # with --data
QUICK = ["--scenes", "48", *QUICK_SET]
SMALL = ["--queries", "4", "--adapter-layers", "2", "--adapter-width", "32", "--adapter-heads", "2"]
QFORMER = ["--adapter", "qformer", *SMALL]


def command(monkeypatch, module, *arguments) -> int:
    """Runs a command line in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    try:
        run(module.main)
        return 0
    except SystemExit as stop:
        return stop.code or 0


def interrupt(monkeypatch, *options, at: int = 1) -> None:
    """Runs train.py up to its first checkpoint, or a later one."""
    checkpoint = train.Run.save_checkpoint
    left = iter(range(at - 1))

    def stop(*arguments):
        checkpoint(*arguments)
        if next(left, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Run, "save_checkpoint", stop)
    assert command(monkeypatch, train, *options) == 130
    monkeypatch.setattr(train.Run, "save_checkpoint", checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_train_then_sample(adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = inspect.signature(ADAPTERS[adapter]).parameters
    sizes = SMALL * ("queries" in options)
    sizes += ["--adapter-text", "--prompt", "What is it?"] * ("text" in options)
    assert command(monkeypatch, train, "--adapter", adapter, *sizes, *QUICK) == 0
    out = capsys.readouterr().out
    assert "step 8/8" in out and "val " in out and "| unseen (8) |" in out
    folder, = Path("out").iterdir()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 8]
    assert [i for i, line in enumerate(lines) if "val" in line] == [1, 3]
    assert lines[3]["exact"] == lines[4]["scores"]["test (8)"]["exact"] and "exact" not in lines[2]
    assert lines[3]["val"] != lines[1]["val"] and lines[4]["scores"]["test (8)"]["exact"] <= 1
    assert {path.name for path in folder.iterdir()} - {"best.safetensors"} == {
        "config.json", "checkpoint.safetensors", "metrics.jsonl", "captions-test.jsonl",
        "captions-unseen.jsonl", "curves.png", "samples.png"}
    picture(120, 80).save("a.png")
    picture(30, 90).convert("L").save("b.jpg")
    # in bfloat16 the batch decides which way a sum is rounded
    exact = "--max-tokens", "5", "--precision", "float32"
    assert command(monkeypatch, sample, "a.png", "b.jpg", *exact) == 0
    both = capsys.readouterr().out.splitlines()
    assert command(monkeypatch, sample, "a.png", *exact, "--model", folder) == 0
    assert both[0] == "a.png: " + capsys.readouterr().out.strip() and both[1].startswith("b.jpg: ")


def test_encoder_options_reach_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, train, "--adapter", "linear", *QUICK, "--image-size", "48", "--layer", "-2",
                   "--out", "run") == 0
    assert "16 embeddings a picture" in capsys.readouterr().out
    vlm = VLM.from_pretrained("run")
    assert vlm.vit.preprocess(picture(90, 60)).shape == (3, 48, 48)
    pixels = torch.randn(1, 3, 48, 48)
    assert torch.equal(vlm.features(pixels), vlm.vit(pixels, layer=-2))


def test_layers_are_ranked(tmp_path, monkeypatch, capsys):
    """The built-in encoder's last layers tell a scene's words, its patches hardly; joining is no loss."""
    monkeypatch.chdir(tmp_path)
    scenes = Shapes(200)
    for i in range(200):
        scenes.picture(i).save(f"{i}.png")
    rows = (f'{i}.png,"{scenes.scene(i).captions()[0]}"\n' for i in range(200))
    Path("c.csv").write_text("image,caption\n" + "".join(rows))
    Path("7.png").write_text("no picture")
    vit = str(Path(__file__).resolve().parents[1] / "assets" / "vit")
    assert command(monkeypatch, layers, "--vit", vit, "--data", "c.csv") == 0
    out = capsys.readouterr().out
    assert out.startswith("199 pictures, 1 that can't be read\n")
    found = [(row[0], float(row[1])) for row in re.findall(r"^([\d,]+) +(-?[\d.]+) %$", out, re.M)]
    alone, joined = found[:7], found[7:]
    assert sorted(layer for layer, _ in alone) == [*"0123456"]
    assert [share for _, share in alone] == sorted((share for _, share in alone), reverse=True)
    assert alone[0][1] > 30 and dict(alone)["0"] < alone[0][1] / 2
    assert [layer.count(",") for layer, _ in joined] == [1, 2, 3]
    assert command(monkeypatch, layers, "--vit", vit, "--data", "c.csv", "--pictures", "1") == 2

    # The same scenes without files: each has captions in four wordings
    capsys.readouterr()
    assert command(monkeypatch, layers, "--vit", vit, "--data", "shapes", "--pictures", "200") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "200 pictures, 0 that can't be read"
    assert lines[2].split()[0] == alone[0][0]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_another_dtype_is_computed_in(adapter, fixtures):
    vlm = small(fixtures, adapter)
    [text] = vlm.caption([picture(40, 40)], max_tokens=8, score=True)
    for dtype, apart in ((torch.float64, 1e-5), (torch.bfloat16, 0.1)):
        [said] = vlm.to(dtype).caption([picture(40, 40)], max_tokens=8, score=True)
        assert abs(said.log_probability - text.log_probability) < apart
        assert vlm.dtype == dtype


def test_layers_that_tell_nothing_are_not_ranked(tmp_path, monkeypatch, capsys):
    noise = torch.Generator().manual_seed(0)
    features = torch.randn(40, 60, generator=noise)
    said = torch.randint(2, (40, 9), generator=noise).float()
    both = torch.cat([features, 9 * said], 1)
    assert layers.explained(features, said, 10) < 0 < layers.explained(both, said, 10)
    monkeypatch.setattr(layers, "explained", lambda *_: -0.1)
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        picture(20, 20 + i).save(f"{i}.png")
    Path("c.csv").write_text("image,caption\n0.png,a dog\n1.png,a dog\n2.png,a cat\n3.png,a cow\n")
    options = ("--vit", "assets/vit", "--data", "c.csv")
    assert command(monkeypatch, layers, *options) == 2
    assert "pictures are too few: of no layer" in capsys.readouterr().err


@pytest.mark.parametrize("adapter", ("qformer", "flamingo", "pixelshuffle"))
def test_several_layers_reach_the_run(adapter, tmp_path, monkeypatch, capsys):
    """Each channel comes to the adapter standardised, whatever its layer's size."""
    monkeypatch.chdir(tmp_path)
    sizes = SMALL if adapter != "pixelshuffle" else ()
    if adapter == "flamingo":
        sizes = ["--queries", "4", "--adapter-layers", "1"]
    options = ["--adapter", adapter, *sizes, *QUICK, "--layer", "6,-3,1"]
    assert command(monkeypatch, train, *options, "--out", "new", "--lr", "1e-9") == 0
    vlm = VLM.from_pretrained("new")
    seen = []
    monkeypatch.setattr(vlm.adapter, "forward", lambda features, *_: seen.append(features) or features)
    pixels = torch.stack([vlm.vit.preprocess(Shapes(8, "test").picture(i)) for i in range(8)])
    vlm.embed_images(vlm.features(pixels))
    std, mean = torch.std_mean(seen[0], (0, 1))
    assert seen[0].shape[2] == 3 * 128 and (std - 1).abs().max() < 0.1 and mean.abs().max() < 0.1


@pytest.mark.slow
def test_scoring_a_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        picture(20 + i, 30).save(f"{i}.png")
    rows = (f"{i}.png,a picture {i % 3} of many things\n" for i in range(12))
    Path("c.csv").write_text("image,caption\n" + "".join(rows))
    Path("5.png").write_text("no picture")
    common = ["--data", "c.csv", "--workers", "0"]
    assert command(monkeypatch, train, "--adapter", "mlp", *common, *QUICK_SET, "--val", "c.csv",
                   "--val-size", "12", "--out", "run",
                   "--no-cache-features") == 0
    assert "5.png: not a picture" in Path("run/unreadable.txt").read_text()
    capsys.readouterr()
    assert command(monkeypatch, sample, "--model", "run", *common, "--save", "captions.jsonl",
                   "--max-tokens", "8") == 0
    captured = capsys.readouterr()
    assert "c.csv (11)" in captured.out and "CIDEr-D" in captured.out and "skipped: 5.png" in captured.err
    lines = [json.loads(line) for line in Path("captions.jsonl").read_text().splitlines()]
    assert len(lines) == 11 and lines[1]["references"] == ["a picture 1 of many things"]
    Path("6.png").unlink()
    assert command(monkeypatch, train, "--adapter", "mlp", *common, *QUICK_SET, "--val", "c.csv",
                   "--val-size", "12", "--out", "other") == 2
    assert "2 of 12 pictures can't be read" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("cache", ("--cache-features", "--no-cache-features"))
def test_resumed_run_equals_an_unbroken_one(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--adapter", "qformer", *SMALL, "--adapter-dropout", "0.2", *QUICK, cache]
    assert command(monkeypatch, train, *options, "--out", "whole") == 0
    interrupt(monkeypatch, *options, "--out", "parts")
    assert command(monkeypatch, train, "--resume", "parts", "--lr", "0.5") == 2
    assert "--lr can't change on --resume: the run has 0.002" in capsys.readouterr().err
    assert command(monkeypatch, train, "--resume", "parts") == 0
    whole, parts = (load_file(f"{run}/checkpoint.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
def test_accumulation_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for parts in ("1", "4"):
        assert command(monkeypatch, train, "--adapter", "linear", *QUICK, "--accumulate", parts,
                       "--precision", "float32",
                       "--out", parts) == 0
    one, four = (load_file(f"{parts}/checkpoint.safetensors") for parts in ("1", "4"))
    assert all(torch.allclose(one[name], four[name], atol=1e-4) for name in one)


@pytest.mark.slow
def test_bad_input_is_one_clear_line(fixtures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, train, "--adapter", "linear", *QUICK, "--out", "run") == 0
    picture(90, 90).save("whole.jpg")
    Path("cut.jpg").write_bytes(Path("whole.jpg").read_bytes()[:900])
    Path("text.jpg").write_text("hello")
    Path("empty.csv").write_text("image,caption\n")
    Path("one.csv").write_text("image,caption\nwhole.jpg,a picture\n")
    shutil.copytree("run", "cut")
    Path("cut/checkpoint.safetensors").write_bytes(Path("run/checkpoint.safetensors").read_bytes()[:300])
    shutil.copytree("run", "other")
    config = json.loads(Path("run/config.json").read_text())
    Path("other/config.json").write_text(json.dumps({**config, "adapter": "mlp"}))
    shutil.copytree("run", "empty")
    Path("empty/checkpoint.safetensors").unlink()
    capsys.readouterr()
    for module, arguments, part in (
            (sample, ("none.jpg", "--model", "run"), "none.jpg: no such picture"),
            (sample, ("text.jpg", "--model", "run"), "text.jpg: not a picture"),
            (sample, ("cut.jpg", "--model", "run"), "cut.jpg: broken picture"),
            (sample, ("whole.jpg", "--model", "nowhere/at/all"), "nowhere/at/all: no such folder"),
            (sample, ("whole.jpg", "--model", "cut"),
             "cut/checkpoint.safetensors: not a whole safetensors file"),
            (sample, ("whole.jpg", "--model", "other"), "other/checkpoint.safetensors: tensor '"),
            (sample, ("whole.jpg", "--model", "empty"), "empty/checkpoint.safetensors: no such file"),
            (sample, ("whole.jpg", "--model", fixtures / "vit"), "config.json: not the folder of a run"),
            (sample, ("whole.jpg",), "no trained run in out/"),
            (sample, ("whole.jpg", "--model", "run", "--device", "cuda:77"), "--device cuda:77"),
            (sample, ("--data", "empty.csv", "--model", "run"), "empty.csv: no usable pair"),
            (train, ("--adapter", "transformer"), "unknown adapter 'transformer': choose from linear, "),
            (train, ("--adapter", "linear", "--queries", "3"),
             "--queries means nothing to the linear adapter"),
            (train, ("--adapter", "pixelshuffle", "--adapter-scale", "9"), "have no square of 9 × 9"),
            (train, ("--adapter", "flamingo", "--adapter-every", "0"), "--adapter-every: '0' is not"),
            (train, ("--adapter-text", "-1"), "--adapter-text: '-1' is not"),
            (train, ("--image-position", "rope-xy"), "keeps the grid of patches, which qformer doesn't"),
            (train, ("--adapter-width", "30"), "width 30 is not a multiple"),
            (train, ("--vit", "no/such/encoder"), "no/such/encoder: no such folder"),
            (train, ("--llm", fixtures / "vit"), "model_type 'vit' is not one of gpt2, opt"),
            (train, ("--data", "empty.csv"), "empty.csv: no usable pair"),
            (train, ("--data", "one.csv"), "one.csv: there is one picture alone"),
            (train, ("--data", "none.csv"), "none.csv: No such file"),
            (train, ("--data", "one.csv", "--images", "none"), "none: no such folder of pictures"),
            (train, ("--layer", "9"), "layer 9"),
            (train, ("--steps", "0"), "--steps: '0' is not"),
            (train, ("--batch", "10", "--accumulate", "3"), "is no multiple of --accumulate 3"),
            (train, ("--out", "run"), "run: there is a run already"),
            (train, ("--resume", "nowhere/at/all"), "nowhere/at/all: no such folder"),
            (train, ("--resume", "cut"), "cut/checkpoint.safetensors: not a whole safetensors file")):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        code, captured = command(monkeypatch, module, *arguments), capsys.readouterr()
        assert code == 2, arguments
        assert part in captured.err and captured.err.count("\n") == 1, captured.err


@pytest.mark.slow
def test_blocks_are_compiled_when_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(90, 90).save("a.jpg")
    asked = []
    monkeypatch.setattr(VLM, "compile_blocks", lambda vlm: asked.append(vlm))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert command(monkeypatch, train, "--adapter", "linear", *QUICK, "--device", "cpu", "--out", "run") == 0
    assert command(monkeypatch, sample, "a.jpg", "--model", "run") == 0 and not asked
    assert command(monkeypatch, train, "--adapter", "linear", *QUICK, "--compile") == 0
    assert command(monkeypatch, sample, "a.jpg", "--model", "run", "--compile") == 0
    assert len(asked) == 2 and all(isinstance(vlm, VLM) for vlm in asked)


@pytest.mark.slow
def test_a_bad_picture_costs_the_others_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, train, "--adapter", "linear", *QUICK) == 0
    picture(90, 90).save("a.jpg")
    capsys.readouterr()
    assert command(monkeypatch, sample, "a.jpg", "none.jpg", "a.jpg") == 2
    captured = capsys.readouterr()
    assert captured.out.count("a.jpg: ") == 2 and captured.err.count("none.jpg: no such picture") == 1
