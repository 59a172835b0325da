"""What a person sees: pictures of results, where words looked, and the manners of the command lines."""
import ast
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageFont

import sample
import train
from adapters import ADAPTERS, VLM, Attention, build
from data import Pixels
from formats.files import InputError
from support import console, drawing, scores
from support.kernels import attend, watch
from support.shapes import Shapes
from fixtures.pictures import picture
from llm import LLM
from test_vlm import QUICK, SMALL, command, small

FILES = ("data", "lora", "vit", "llm", "adapters", "sample", "train")


# ---------------------------------------------------------------------------------------------------------
# Attention

@torch.no_grad()
def test_watched_attention_is_softmax_and_changes_nothing(fixtures):
    torch.manual_seed(0)
    attention, q, k = Attention(16, 12, 2), torch.randn(2, 5, 16), torch.randn(2, 7, 12)
    mask = torch.rand(2, 1, 5, 7) < 0.7
    plain = attention(q, k, k, mask)
    with watch([attention]) as seen:
        assert torch.equal(attention(q, k, k, mask), plain)
    heads = [attention.q(q)[..., h] @ attention.k(k)[..., h].mT / 8 ** 0.5 for h in (slice(8), slice(8, 16))]
    expected = sum(scores.masked_fill(~mask[:, 0], -math.inf).softmax(-1) for scores in heads) / 2
    assert torch.allclose(seen[attention], expected, atol=1e-6)
    attention(q, k, k)  # unwatched
    assert torch.allclose(seen[attention], expected, atol=1e-6) and "attend" not in vars(attention)

    llm = LLM.from_pretrained(str(fixtures / "llama"))  # grouped heads, rotary
    tokens, (first, *_) = torch.randint(50, (2, 9)), [block.attention for block in llm.blocks]
    inputs = {}
    hook = first.v.register_forward_hook(lambda module, _, out: inputs.update(v=out))
    plain = llm(tokens)
    with watch([first]) as seen:
        assert torch.equal(llm(tokens), plain)
    hook.remove()
    weights = seen[first]
    assert weights.shape == (2, 9, 9) and torch.allclose(weights.sum(-1), torch.ones(2, 9), atol=1e-6)
    assert weights.triu(1).abs().max() == 0 and weights.tril().gt(0).sum() == 2 * 45


class Planted(torch.nn.Module):
    """An attention in which query i looks at key `target(i, number of keys)` alone."""
    attend = staticmethod(attend)

    def __init__(self, target):
        super().__init__()
        self.target = target

    def keys_and_values(self, k, v):
        return k, v

    def read(self, q, keys_and_values, mask):
        return self(q, keys_and_values[0])

    def forward(self, q, k=None, *_):
        S = (k if isinstance(k, torch.Tensor) and k.dim() == 3 else q).shape[1]
        keys, at = torch.eye(S), [self.target(i, S) for i in range(q.shape[1])]
        keys = keys.expand(len(q), 1, S, S)
        self.attend(1000 * keys[:, :, at], keys, keys)
        return torch.zeros_like(q)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_words_look_where_attention_is_planted(adapter):
    sizes = dict(queries=5, layers=2, width=16, heads=2) if adapter in (
        "qformer", "resampler", "twoway", "flamingo") else {}
    vlm = build(dict(vit="assets/vit", llm="assets/llm", adapter=adapter, adapter_sizes=sizes)).eval()
    prompt, text, grid, P = "a<image>b<image>", "a large red circle", 8, 2
    ids, Q = vlm.processor.encode(prompt)[0], vlm.adapter.queries
    places = [i for i, id in enumerate(ids) if id == vlm.processor.placeholder]
    side = vlm.adapter.side or grid

    def patch(query):
        return (7 * query + 3) % grid ** 2 if sizes else query

    def query(t):  # of both pictures', in turns
        return t % P * Q + (3 * t + 1) % Q

    readers = {"qformer": "cross", "resampler": "attention", "twoway": "to_image", "flamingo": "attention"}
    for name, module in list(vlm.adapter.named_modules()):
        for child, attention in list(module.named_children()):
            if adapter == "flamingo" and name.startswith("blocks.") and child == "attention":
                module.attention = Planted(lambda t, S: query(t))
            elif isinstance(attention, Attention):  # other attentions, to queries, tell nothing of patches
                setattr(module, child, Planted((lambda i, S: S - grid ** 2 + patch(i))
                                               if child == readers[adapter] else lambda i, S: 0))
    for block in vlm.llm.blocks:
        block.attention = Planted(lambda t, S: 0 if adapter == "flamingo" else places[query(t)])
    found = sample.look(vlm, torch.randn(P, 64, 128), prompt, text)
    assert [word for word, _ in found] == text.split()
    tokens = vlm.processor.encode(prompt, text)[0]
    assert len(tokens) == len(ids) + len(text.split()) + 1, "a token a word"
    for t, (word, at) in enumerate(found, len(ids) - 1):
        expected = torch.zeros(P, side ** 2)
        expected[query(t) // Q, patch(query(t) % Q)] = 1
        assert at.shape == (P, side, side) and torch.allclose(at.flatten(1), expected, atol=1e-6), word


@torch.no_grad()
def test_a_short_word_looks_too():
    """The space before it and the line's end behind it are tokens of their own."""
    vlm = build(dict(vit="assets/vit", llm="assets/llm", adapter="linear", adapter_sizes={})).eval()
    [(word, _)] = sample.look(vlm, torch.randn(1, 64, 128), "how many?", "2")
    assert word == "2" and not vlm.processor.lost()


def test_a_square_beyond_the_grid_looks_at_its_patches():
    """Of 8 × 8 patches in squares of 3 × 3, the last square has the last 2 × 2 patches."""
    vlm = build(dict(vit="assets/vit", llm="assets/llm", adapter="pixelshuffle", adapter_sizes=dict(scale=3)))
    last = vlm.processor.encode("")[0].index(vlm.processor.placeholder) + 8
    for block in vlm.llm.blocks:
        block.attention = Planted(lambda t, S: last)
    [(_, seen), *_] = sample.look(vlm.eval(), torch.randn(1, 64, 128), "", "a circle")
    assert seen.shape == (1, 8, 8) and seen[0, 6:, 6:].min() == 1 and seen.sum() == 4


def test_spotlights_show_what_the_encoder_sees():
    vlm = build(dict(vit="assets/vit", llm="assets/llm", adapter="linear", adapter_sizes={}))
    shown = picture(96, 96)
    usual = torch.full((1, 8, 8), 0.01)
    usual[0, 7, 7] = 1  # where all words look
    at, less = usual.clone(), usual.clone()
    at[0, 2, 5] = 0.05
    less[0, 5, 1] = 0.03
    pixels = vlm.vit.preprocess(shown)[None]
    looks = [("a", usual), ("circle", at), ("of", usual), ("star", less)]
    (whole, _), *cells = drawing.spotlights(vlm.vit.preprocess.visible(pixels), looks, 96)
    assert [lines[0][0] for _, lines in cells] == ["circle", "star", "a", "of"]  # what names something first
    assert cells[0][1] == [("circle", drawing.INK)]
    assert np.abs(np.array(whole).astype(int) - np.array(shown)).max() <= 1

    # Grey, and warm where it looked: of all words' scale
    warmth = [np.array(lit).astype(int)[..., 0] - np.array(lit)[..., 2] for lit, _ in cells]
    assert warmth[0][24:36, 60:72].mean() > 100 and abs(warmth[0][:, :34]).max() < 2
    assert abs(warmth[0][84:, 84:]).max() < 40  # all words look there
    assert 30 < warmth[1][60:72, 12:24].mean() < 0.9 * warmth[0][24:36, 60:72].mean()
    grey = np.array(cells[0][0])[:, :48, 0] / np.maximum(1, np.array(shown)[:, :48].mean(-1))
    assert 0.7 < grey.mean() < 0.9  # the picture is seen
    drawing.spotlights(vlm.vit.preprocess.visible(pixels), [("one", at)])  # of one word, where it looked


# ---------------------------------------------------------------------------------------------------------
# Pictures of results

def near(image: Image.Image, colour: str) -> np.ndarray:
    """(y, x) of the pixels of a colour, "#rrggbb"."""
    wanted = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
    return np.argwhere(np.abs(np.array(image).astype(int) - wanted).max(-1) < 24)


def test_curves_lie_where_the_metrics_say():
    lines = [dict(step=10 * i, loss=4 - 0.4 * i) for i in range(11)]  # 4 to 0, a straight line
    lines[5]["val"], lines[10]["val"], lines[3]["loss"] = 3.0, 1.0, math.nan
    image = drawing.curves(lines + [{"step": 100, "scores": {}}], "a run")
    blue, orange = "#0072b2", "#d55e00"
    curve = np.array([(y, x) for y, x in near(image, blue) if y > 70])
    (top, left), (bottom, right) = curve.min(0), curve.max(0)
    assert right - left > 700 and bottom - top > 200
    assert right < image.width - 20 and bottom < image.height - 30
    expected = top + (curve[:, 1] - left) / (right - left) * (bottom - top)
    assert np.abs(curve[:, 0] - expected).max() < 4 and len({*curve[:, 1].tolist()}) > 0.98 * (right - left)
    dots = np.array([(y, x) for y, x in near(image, orange) if y > 70])
    xs = dots[:, 1]
    first, last = dots[xs < xs.min() + 6].mean(0), dots[xs > xs.max() - 6].mean(0)
    for (y, x), (step, value) in ((first, (50, 3)), (last, (100, 1))):
        assert abs(x - (left + (right - left) * step / 100)) < 5
        assert abs(y - (bottom + (top - bottom) * value / 4)) < 5
    labels = np.array(image.crop((0, 70, left - 4, image.height)).convert("L"))
    assert (labels < 160).sum() > 100, "tick labels stand left of the axis"

    lines[10]["matching"] = 0.9
    both = drawing.curves(lines, "a run")
    assert both.height == 2 * image.height and (near(both, "#009e73")[:, 0] > image.height).all()
    assert near(both, "#009e73").size and not near(image, "#009e73").size


def test_curves_of_little():
    assert drawing.curves([dict(step=2, loss=1.0)], "one").size == (960, 420)
    assert drawing.curves([dict(step=2, loss=math.nan), dict(step=4, loss=None)], "none").size == (960, 420)


@pytest.mark.parametrize("low, high, expected", (
    (0, 4, [0, 1, 2, 3, 4]), (0.25, 1.36, [0.2, 0.4, 0.6, 0.8, 1, 1.2, 1.4]), (1, 1, [1, 1.2]),
    (0, 700, [0, 200, 400, 600, 800])))
def test_ticks(low, high, expected):
    assert drawing.ticks(low, high) == expected


def test_contact_sheet_cuts_no_text():
    long = "a very long caption, with_a_word_that_is_much_too_long_for_its_column, that goes on and on and on"
    cells = [(picture(300, 200), [(long, "#d62828")]), (picture(20, 60), [("short", "#d62828")])]
    sheet = drawing.contact_sheet([("heading " * 20, cells), ("other", cells[:1])], columns=2, side=120)
    red = near(sheet, "#d62828")
    margin = 12
    assert sheet.width == 2 * 140 + 20 and red.min() >= margin and red[:, 1].max() < sheet.width - margin
    assert red[:, 0].max() < sheet.height - margin
    font = ImageFont.load_default(15)
    lines = drawing.wrap(long, font, 120).split("\n")
    assert max(map(font.getlength, lines)) <= 120 and "".join(lines).replace(" ", "") == long.replace(" ", "")
    assert drawing.wrap("of two\n lines", font, 120) == "of two lines" and drawing.wrap("", font, 9) == ""


def test_best_and_worst_are_by_score():
    captions = Shapes(9, "test")
    texts = {i: captions.scene(i).captions()[0] for i in range(9)}
    texts[4] = "a large red cow"
    rated = scores.rate(captions, texts)[1]
    assert rated[0] == (1, "exact") and rated[4][1].startswith("wrong: shape, colour")
    (best, first), (worst, last) = drawing.best_and_worst("test", captions, texts, rated, 2)
    assert (best, worst) == ("test: the best of 9", "test: the worst of 9")
    said, reference, _ = last[0][1]
    assert said == ("a large red cow", drawing.INK)
    assert reference[0] == f"reference: {captions.scene(4).captions()[0]}"
    assert [len(first), len(last)] == [2, 2] and first[0][0] == captions.picture(0)
    assert len(drawing.best_and_worst("test", captions, {0: "a"}, {0: (0, "")})) == 1


# ---------------------------------------------------------------------------------------------------------
# Question after question

CHATS = ("smolvlm", "llava", "nanovlm", "qformer", "flamingo", "pixelshuffle")


@pytest.mark.parametrize("static", (False, True))
@pytest.mark.parametrize("name", CHATS)
def test_a_chat_reads_what_is_new_and_says_what_it_would_anew(name, static, fixtures):
    """As if each question came with all turns before it, but only what is new is read."""
    if name in ADAPTERS:
        position = "rope-xy" if name == "pixelshuffle" else "sequence"
        sizes = {"qformer": dict(text=4), "pixelshuffle": dict(scale=5)}.get(name, {})
        vlm = small(fixtures, name, image_position=position, **sizes)
    else:
        vlm = VLM.from_pretrained(str(fixtures / name))
    vlm.llm.static = static
    lengths, hidden = [], vlm.llm.hidden
    vlm.llm.hidden = lambda x, *rest: lengths.append(x.shape[1]) or hidden(x, *rest)
    decoding = dict(max_tokens=5, temperature=0.0)
    vlm.processor.split = False
    chat, pictures = sample.Chat(vlm, decoding), [picture(40, 30), picture(30, 40)]
    shown = [vlm.vit.preprocess(one) for one in pictures]
    asked = (("ab", pictures[:1], 1), ("c", [], 1), ("ba", pictures[1:], 2), ("c", [], 2))
    for question, new, count in asked:
        lengths.clear()
        typed = []
        answer = chat.ask(question, new, typed.append)
        read = lengths[0]
        text, _ = chat.turns[-1]
        example = vlm.processor.encode(text, images=0, earlier=chat.turns[:-1])
        ids = example.ids
        features = vlm.features(torch.stack(shown[:count]))
        assert vlm.answer([example], features, **decoding) == [answer]
        assert read == len(ids) if len(chat.turns) == 1 else read < len(ids)
        assert vlm.processor.text(typed).strip() == answer


def test_a_chat_goes_on_when_its_first_turns_do_not_fit(fixtures):
    vlm = small(fixtures)
    chat = sample.Chat(vlm, dict(max_tokens=4, temperature=0.0))
    for turn in range(12):
        assert isinstance(chat.ask("abc", [picture(30, 30)][turn:]), str)
    assert vlm.processor.cut and len(chat.read) <= vlm.processor.max_positions
    with pytest.raises(InputError, match="don't fit the language model's 40 positions"):
        chat.ask("a", [picture(30, 30)] * 9)
    assert isinstance(chat.ask("abc", []), str)  # as if it had not been asked


def test_a_chat_on_the_command_line(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    ask = ("--model", "run", "--max-tokens", "6")
    typed = "What?\n\n/image nowhere.png\n/image b.png\n/image -\nAnd this?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    picture(50, 40).save("b.png")
    assert command(monkeypatch, sample, "a.png", "--chat", *ask) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 2 and captured.err.count("\n") == 2
    assert "error: nowhere.png: no such picture" in captured.err
    assert "error: -: with --chat, standard input has the questions" in captured.err
    assert command(monkeypatch, sample, "a.png", "--chat", "--json", *ask) == 2
    assert "--json means nothing with --chat" in capsys.readouterr().err


def test_a_chat_goes_on_after_a_line_in_another_encoding(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9?\nAnd this?\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    assert command(monkeypatch, sample, "a.png", "--chat", "--model", "run", "--max-tokens", "6") == 0
    assert capsys.readouterr().out.count("\n") == 2


@pytest.mark.parametrize("data, more, beams", (
    ("shapes", (), 1), ("/photos/captions.csv", (), 3), ("/photos/captions.csv", ("--beams", "1"), 1),
    ("/photos/captions.csv", ("--prompt", "What is it?"), 1),
    ("/photos/captions.csv", ("--temperature", "0.5"), 1)))
def test_captions_of_photographs_are_searched_with_beams(data, more, beams, trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["training"]["data"] = data
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    used = []
    monkeypatch.setattr(sample, "caption_files", lambda *args: used.append(args[3]))
    assert command(monkeypatch, sample, str(trained / "a.png"), "--model", tmp_path / "run", *more) == 0
    assert used[0]["beams"] == beams


def test_words_appear_as_they_come_on_a_terminal(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    ask = ("a.png", "--model", "run", "--max-tokens", "9")
    assert command(monkeypatch, sample, *ask) == 0
    whole = capsys.readouterr().out
    for more, pieces in ((), 3), (("--quiet",), 1), (("--beams", "2"), 1), (("a.png",), 2):
        written = []
        with monkeypatch.context() as patch:
            patch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
            write = sys.stdout.write
            patch.setattr(sys.stdout, "write", lambda text: written.append(text) or write(text))
            assert command(patch, sample, *ask, *more) == 0
        said = capsys.readouterr().out
        if pieces == 3:
            assert said == whole and len([text for text in written if text.strip()]) > 3
        else:
            assert len([text for text in written if text.strip()]) == pieces


# ---------------------------------------------------------------------------------------------------------
# Manners

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run, and a picture beside it."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command(patch, train, "--adapter", "qformer", *SMALL, *QUICK, "--out", "run", "--quiet") == 0
    picture(120, 80).save(folder / "a.png")
    return folder


def test_pictures_come_as_folders_patterns_and_from_stdin(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("some photos").mkdir()
    for name in ("b.jpg", "a.png", "[1].PNG"):
        picture(40, 40).save(f"some photos/{name}")
    Path("some photos/notes.txt").write_text("no picture")
    ask = ("--model", trained / "run", "--max-tokens", "4")
    folder = [str(Path("some photos") / name) for name in ("[1].PNG", "a.png", "b.jpg")]
    for arguments, expected in ((["some photos"], folder), (["some photos/*.png"], folder[1:2]),
                                (["some photos/[1].PNG", "**/*.jpg"], [folder[0], folder[2]])):
        assert command(monkeypatch, sample, "--json", *arguments, *ask) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [Path(line["image"]) for line in lines] == [Path(name) for name in expected]
        assert all(line.keys() == {"image", "caption", "log_probability"} for line in lines)
    stdin = types.SimpleNamespace(buffer=io.BytesIO((trained / "a.png").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert command(monkeypatch, sample, "-", *ask) == 0
    piped = capsys.readouterr().out
    assert command(monkeypatch, sample, trained / "a.png", *ask, "What is it?") == 0
    assert capsys.readouterr().out and piped.strip()
    assert command(monkeypatch, sample, "-", *ask) == 2
    assert "sample.py: error: -: not a picture" in capsys.readouterr().err
    Path("empty").mkdir()
    assert command(monkeypatch, sample, "empty", *ask) == 2
    assert "empty: no pictures in this folder" in capsys.readouterr().err


def test_what_does_not_fit_is_told(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    ask = ("--model", "run", "--max-tokens", "4", "--prompt", "In French. " + "a red circle " * 400)
    told = "texts too long for the language model's 512 positions lost their first turns or words: 1\n"
    assert command(monkeypatch, sample, "a.png", *ask) == 0
    assert capsys.readouterr().err == told
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert command(monkeypatch, sample, "a.png", "--chat", *ask) == 0
    assert capsys.readouterr().err == told


def test_what_is_read_is_not_written_over(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(40, 30).save("a.png")
    Path("c.csv").write_text("image,caption\na.png,a thing\n")
    picture(40, 30).save("b.png")
    with tarfile.open("0.tar", "w") as tar:
        tar.add("a.png")
        tar.add("c.csv", "a.txt")
    Path("link.png").symlink_to("a.png")
    for arguments in (["a.png", "--attention", "link.png"], [".", "--attention", "a.png"],
                      ["--data", "c.csv", "--save", "c.csv"],
                      ["--data", "c.csv", "--save", "a.png"],
                      ["--data", "{0..0}.tar", "--save", "0.tar"],
                      ["--data", "c.csv", "--save", "b.png", "--shot", "b.png", "a thing"]):
        before = {path: path.read_bytes() for path in Path().iterdir()}
        assert command(monkeypatch, sample, "--model", trained / "run", *arguments) == 2
        assert "it is read too: write to another file" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in Path().iterdir()} == before


@pytest.mark.slow
def test_json_of_a_set_and_quiet(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    Path("c.csv").write_text("image,caption\n" + "a.png,a thing\n" * 3)
    assert command(monkeypatch, sample, "--model", "run", "--data", "c.csv", "--json", "--workers", "0") == 0
    captured = capsys.readouterr()
    line, = map(json.loads, captured.out.splitlines())
    assert line["image"] == "a.png" and line["references"] == ["a thing"] * 3 and "CIDEr-D" in captured.err
    assert command(monkeypatch, train, "--adapter", "linear", *QUICK, "--out", "quiet", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("| ") and captured.out.count("\n") == 4 and not captured.err


def test_attention_is_drawn(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    options = ("--model", "run", "--attention", "seen.png", "--max-tokens", "6")
    encoded, features = [], VLM.features
    monkeypatch.setattr(VLM, "features", lambda *inputs: encoded.append(1) or features(*inputs))
    assert command(monkeypatch, sample, "a.png", *options) == 0
    words, sheet = capsys.readouterr().out.split(), Image.open("seen.png")
    assert len(encoded) == 1
    assert command(monkeypatch, sample, "a.png", *options[:2], *options[4:]) == 0
    assert capsys.readouterr().out.split() == words
    assert words and sheet.width == 7 * 170 + 20 and sheet.height > 200
    cells = [np.array(sheet.crop((x, 60, x + 150, 190)).convert("L")).mean() for x in (20, 190)]
    assert cells[1] < 0.9 * cells[0], "the first is as it is, the others are dark somewhere"
    assert command(monkeypatch, sample, "--data", "shapes", "--model", "run", "--attention", "x.png") == 2


@pytest.mark.parametrize("module, arguments, hint", (
    (train, ["--adaptr", "mlp"], "unrecognized arguments: --adaptr mlp; did you mean --adapter?"),
    (train, ["--adapter", "qfromer"], "did you mean qformer?"),
    (train, ["--image-position", "rope-yx"], "did you mean rope-xy?"),
    (train, ["--layout", "imagetext:1"], "did you mean image-text?"),
    (train, ["--train", "adapter,lm"], "did you mean llm?"),
    (train, ["--lora-on", "vitt"], "did you mean vit?"),
    (train, ["--precision", "bloat16"], "did you mean bfloat16?"),
    (train, ["--steps", "many"], "--steps: 'many' is not a whole number"),
    (sample, ["a.png", "--modle", "run"], "did you mean --model?"),
    (sample, ["a.png", "--zzz"], "unrecognized arguments: --zzz\n")))
def test_errors_name_the_nearest(module, arguments, hint, monkeypatch, capsys):
    assert command(monkeypatch, module, *arguments) == 2
    error = capsys.readouterr().err
    assert hint in error and error.count("\n") == 1 and "\33" not in error


@pytest.mark.parametrize("no_colour, coloured", (("", True), ("1", False)))
def test_colours_are_for_terminals(no_colour, coloured, monkeypatch, capsys):
    for name, value in dict(TERM="xterm", WT_SESSION="1", NO_COLOR=no_colour).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert command(monkeypatch, train, "--steps", "0") == 2
    assert ("\33[31m" in capsys.readouterr().err) == coloured


@pytest.mark.parametrize("module", (train, sample))
def test_help_is_readable(module, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert command(monkeypatch, module, "--help") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100 and "130 Ctrl-C, 143 SIGTERM, 141 broken pipe" in text
    groups = text.split("\n\n")
    assert max(group.count("\n") for group in groups) < 30
    if module is train:
        assert "default: 400" in text and "default: 0.05" in text


@pytest.mark.slow
def test_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    options = ["--adapter", "linear", *QUICK, "--tensorboard", "--out", "run"]
    assert command(monkeypatch, train, *options) == 2
    assert "--tensorboard needs its package: pip install tensorboard" in capsys.readouterr().err
    assert not Path("run").exists()
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            assert Path(folder).is_dir() and purge_step == 0

        def add_scalar(self, *scalar):
            written.append(scalar)

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    assert command(monkeypatch, train, *options) == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "val", "lr"):
        logged = [(line[name], line["step"]) for line in lines if name in line]
        assert [scalar[1:] for scalar in written if scalar[0] == name] == logged
    assert ("test (8)/exact", lines[-1]["scores"]["test (8)"]["exact"], 8) in written
    assert written[-1] == "closed"


# ---------------------------------------------------------------------------------------------------------
# Elsewhere

@pytest.mark.slow
def test_workers_may_be_spawned():
    """As on macOS and Windows, where a worker gets the pictures by pickle."""
    vlm = build(dict(vit="assets/vit", llm="assets/llm", adapter="linear", adapter_sizes={}))
    captions = Shapes(3, "test")
    pixels = Pixels(captions, vlm.vit.preprocess)
    loader = torch.utils.data.DataLoader(pixels, batch_sampler=[[(i, (i,)) for i in range(3)]], num_workers=1,
                                         collate_fn=pixels.collate, multiprocessing_context="spawn")
    (indices, views, bad), = loader
    assert indices == [0, 1, 2] and not bad
    assert torch.equal(views.x[2], vlm.vit.preprocess(captions.picture(2)))


@pytest.mark.parametrize("name", FILES)
def test_syntax_is_that_of_python_3_10(name):
    ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"), feature_version=(3, 10))


@pytest.mark.slow
def test_a_closed_output_is_no_error():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from support.console import run; "
            "run(lambda: print(sys.stdout.isatty()))")
    done = subprocess.run(["sh", "-c", '"$0" -c "$1" "$2" >&-', sys.executable, code, str(ROOT)],
                          stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a system without a file that is always full")
def test_a_full_disk_is_one_line(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as end:
            console.run(lambda: print("a line"))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.endswith("the output can't be written: No space left on device\n")


@pytest.mark.slow
def test_file_names_of_any_bytes_are_printed(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from support.console import run; "
            "run(lambda: print('\\udcff: …'))")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, cwd=tmp_path,
                          env={"PYTHONIOENCODING": "ascii", "PATH": ""})
    assert done.stdout.decode().strip() == "\\udcff: …" and not done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("said, end, code", ((9, "", 141), (99_999, "", 141), (9, "sys.exit(2)", 141),
                                             (0, "sys.exit(2)", 2), (0, "raise KeyboardInterrupt", 130)))
def test_exit_codes(said, end, code, tmp_path):
    """Where no one reads the output: what little is said is found unread at the end."""
    program = f"""import sys; sys.path.insert(0, sys.argv[1]); from support.console import run
def main():
    print('x' * {said}, end='')
    {end or 'pass'}
run(main)"""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", program, str(ROOT)], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == code and not done.stderr, done.stderr
