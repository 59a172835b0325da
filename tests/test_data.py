"""Captions, pictures, batches, checkpoints and the shapes world."""
import importlib.util
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data import (EARLIER, IMAGE_PART, LAST, WORD, arrange, count_bad, draw_conversation, shuffled,
                  stack)
from formats.captions import Captions
from formats.pictures import open_picture, rgb
from support import kernels
from support.kernels import attend
from support.scores import references
from assets.sayings import RULES, by_rule, questions
from support.shapes import SHAPES, SIDE, SIZE_WORDS, SKILLS, THING, UNSEEN, Scene, Shapes, Thing, judge
from conftest import ROOT
from fixtures.pictures import picture
from llm import LLM
from formats.files import InputError, check_writable, read_json, write_file, write_text
from formats.hub import HERE
from formats.tokenizer import Tokenizer
from vit import ViT


# ---------------------------------------------------------------------------------------------------------
# Captions and pictures

EXPECTED = {"a.jpg": ['A dog, "Rex", runs', "a dog"], "b.jpg": ["naïve café"]}
FORMATS = {
    "flickr.csv": '\ufeffimage,caption\r\na.jpg,"A dog, ""Rex"", runs ."\r\nb.jpg,naïve  café\r\n'
                  'a.jpg,a dog .\r\nc.jpg,\r\n',
    "unquoted.csv": 'image, caption\na.jpg,A dog, "Rex", runs\na.jpg,a dog\nb.jpg,naïve café\n',
    "lines.jsonl": '{"image": "a.jpg", "caption": ["A dog, \\"Rex\\", runs .", "a dog"]}\n\n'
                   '{"image": "b.jpg", "caption": "naïve café"}\n',
    "one.jsonl": None,
    "coco.json": json.dumps({"images": [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}],
                             "annotations": [
        {"image_id": 7, "caption": 'A dog, "Rex", runs .\n'}, {"image_id": 9, "caption": "naïve café"},
        {"image_id": 7, "caption": "a dog"}]}),
    "llava.json": json.dumps([
        {"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                                        {"from": "gpt", "value": 'A dog, "Rex", runs'}]},
        {"id": "2", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"id": "3", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>"},
                                                        {"from": "gpt", "value": "a dog"}]},
        {"id": "4", "image": "b.jpg", "conversations": [{"from": "human", "value": "<image>"},
                                                        {"from": "gpt", "value": "naïve café"}]}]),
}


@pytest.mark.parametrize("name", [name for name, text in FORMATS.items() if text])
def test_caption_formats(name, tmp_path):
    (tmp_path / name).write_bytes(FORMATS[name].encode())
    captions = Captions(tmp_path / name)
    found = {path.name: [said for [(_, said)] in captions.conversations(i)]
             for i, path in enumerate(captions.paths)}
    assert found == EXPECTED
    assert captions.paths[0] == tmp_path / "a.jpg"


def test_each_turn_of_a_conversation_is_asked(tmp_path):
    turns = ["<image>\nWhat is it?", "A dog", "Is it\nbig?", "No", "What is it?", "A pup"]
    conversations = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    (tmp_path / "qa.json").write_text(json.dumps([dict(image="a.jpg", conversations=conversations)]))
    captions = Captions(tmp_path / "qa.json")
    asked = [("What is it?", "A dog"), ("Is it big?", "No"), ("What is it?", "A pup")]
    assert captions.conversations(0) == [asked]
    first = ("<image>What is it?", "A dog")
    assert arrange("image-text", captions, 0, 0, 0, "A photo of") == [first, *asked[1:]]
    each = captions.by_question()
    assert each.count == 1 and [each.conversations(i) for i in range(len(each))] == [
        [asked[:1]], [asked[:2]], [asked]]
    assert [references(each, i) for i in range(3)] == [["A dog"], ["No"], ["A pup"]]


def test_one_json_line(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"image": "a.jpg", "caption": "x"}\n')
    assert Captions(tmp_path / "one.jsonl").conversations(0) == [[("", "x")]]


@pytest.mark.parametrize("text", ("", "image,caption\n", "image,caption\na.jpg, . \n", "file,text\na.jpg,x\n",
                                  "[]", "[1]", "{", "{}", '[{"image": "a.jpg"}]',
                                  '{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}'))
def test_captions_of_no_use(text, tmp_path):
    (tmp_path / "file").write_text(text)
    with pytest.raises(InputError, match="file: "):
        Captions(tmp_path / "file")


def test_captions_not_text(tmp_path):
    (tmp_path / "file").write_bytes(b"image,caption\na.jpg,\xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        Captions(tmp_path / "file")
    with pytest.raises(InputError, match="No such file"):
        Captions(tmp_path / "none")


def test_picture_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    picture(40, 20).save(tmp_path / "a.jpg", exif=exif)
    assert open_picture(tmp_path / "a.jpg").size == (20, 40)
    assert rgb(Image.open(tmp_path / "a.jpg")).size == (20, 40)  # a caller's own


def test_broken_pictures(tmp_path):
    picture(200, 200).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    (tmp_path / "text.jpg").write_text("not a picture")
    for name, reason in (("none.jpg", "no such picture"), ("cut.jpg", "broken picture"),
                         ("text.jpg", "not a picture")):
        with pytest.raises(InputError, match=f"{name}: {reason}"):
            open_picture(tmp_path / name)


def test_too_many_unreadable_pictures():
    bad, captions = {}, Shapes(30)
    count_bad(bad, {1: "a", 2: "b", 3: "c"}, captions)
    with pytest.raises(InputError, match="4 of 30 pictures can't be read; the last: d"):
        count_bad(bad, {4: "d"}, captions)


def test_a_caption_a_picture_and_epoch():
    scenes = Shapes(9)
    drawn, again, other = ([draw_conversation(scenes, 5, seed, epoch) for epoch in range(200)]
                           for seed in (1, 1, 2))
    assert drawn == again != other and all(said in drawn for said in scenes.conversations(5))


# ---------------------------------------------------------------------------------------------------------
# Batches

def test_shuffled_covers_each_epoch_and_starts_anywhere():
    batches = shuffled(10, 4, seed=3)
    first = [next(batches) for _ in range(15)]
    flat = sum(first, [])
    epochs = [flat[i:i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 6
    later = shuffled(10, 4, seed=3, step=7)
    assert [next(later) for _ in range(8)] == first[7:]
    # a batch of several epochs
    assert next(shuffled(3, 8, seed=0)) and len(next(shuffled(3, 8, seed=0))) == 8


def test_stack_marks_targets():
    tokens, where, targets = stack([([5, 6, 7, 8], [IMAGE_PART, WORD, EARLIER, LAST]), ([9, 1], [LAST, LAST]),
                                    ([4, 3, 2], [WORD, LAST, LAST])])
    assert tokens.tolist() == [[5, 6, 7, 8], [9, 1, 0, 0], [4, 3, 2, 0]]
    assert targets.tolist() == [7, 8, 1, 3, 2]
    assert where.tolist() == [1, 2, 4, 8, 9]  # the places before the targets


def test_held_out_parts_the_set(tmp_path):
    (tmp_path / "c.csv").write_text("image,caption\n" + "".join(f"{i}.jpg,caption {i}\n" for i in range(20)))
    captions = Captions(tmp_path / "c.csv")
    rest, out = captions.held_out(5, seed=1)
    assert len(out) == 5 and len(rest) == 15 and {*rest.paths, *out.paths} == set(captions.paths)
    assert all(out.conversations(i) == [[("", f"caption {out.paths[i].stem}")]] for i in range(5))


# ---------------------------------------------------------------------------------------------------------
# Shapes

def test_scenes_and_their_captions():
    wordings, counts = set(), set()
    for i in range(300):
        scene = Shapes(300, "train").scene(i)
        assert not any((thing.colour, thing.shape) in UNSEEN for thing in scene.things)
        for caption in scene.captions():
            assert all(judge(caption, scene).values()), caption
        wordings.add(scene.captions()[i % 4].split()[0])
        counts.add(len(scene.things))
    assert counts == {1, 2, 3} and len(wordings) > 3
    assert all(any((t.colour, t.shape) in UNSEEN for t in Shapes(50, "unseen").scene(i).things)
               for i in range(50))
    a, b = (Shapes(9, "test").picture(4).tobytes() for _ in "ab")
    assert a == b != Shapes(9, "train").picture(4).tobytes()


def test_judge_finds_each_fault():
    things = Thing("large", "red", "circle", 20, 50, 15), Thing("small", "blue", "star", 70, 45, 8)
    scene = Scene(things, "")
    right = "a large red circle to the left of a small blue star"
    assert judge(right, scene) == dict.fromkeys(("exact", *SKILLS), True)
    assert judge("two objects: a little blue star right of a big red circle", scene)["exact"]
    other = "a small blue star and a large red circle; the small blue star is right of the large red circle"
    assert judge(other, scene)["exact"]
    for caption, faults in ((right.replace("red", "pink"), {"colour", "relation"}),
                            (right.replace("star", "cross"), {"shape", "relation"}),
                            (right.replace("small", "large"), {"size", "relation"}),
                            (right.replace("left", "right"), {"relation"}),
                            # each word right, bound wrong
                            ("a large blue circle to the left of a small red star", {"relation"}),
                            (right + " and a small red cross", {"shape", "colour", "size", "count"}),
                            ("three objects: " + right, {"count"}),
                            ("a large red circle and a small blue star", {"relation"}),
                            ("a large red circle", {"shape", "colour", "size", "count", "relation"}),
                            ("", {"shape", "colour", "size", "count", "relation"})):
        judged = judge(caption, scene)
        assert {skill for skill, good in judged.items() if not good} == faults | {"exact"}, caption


def test_questions_of_a_scene_are_answered_by_what_is_in_it():
    things = (Thing("large", "red", "circle", 20, 50, 15), Thing("small", "blue", "star", 50, 20, 8),
              Thing("small", "red", "star", 80, 80, 8))
    asked = dict(questions(Scene(things, "")))
    assert asked["how many objects?"] == "three"
    assert asked["what colour is the circle?"] == "red" and asked["what size is the circle?"] == "large"
    assert asked["what shape is the blue object?"] == "star"
    assert "what colour is the star?" not in asked and "what shape is the red object?" not in asked  # which?
    assert "is the circle below the star?" not in asked
    asked = dict(questions(Scene(things[:2], "")))
    assert asked["is the star below the circle?"] == asked["is the circle above the star?"] == "no"
    assert asked["is the circle below the star?"] == asked["is the star above the circle?"] == "yes"
    for i in range(50):
        scene = Shapes(50).scene(i)
        there = {(thing.colour, thing.shape) for thing in scene.things}
        for question, answer in questions(scene):
            if question.startswith("is there any"):
                assert (tuple(question[13:-1].split()) in there) == (answer == "yes")


def test_a_rule_says_one_thing_of_every_scene():
    things = Thing("large", "red", "circle", 20, 50, 15), Thing("small", "blue", "star", 70, 45, 8)
    scene = Scene(things, "")
    said = {rule: by_rule(scene, rule) for rule in RULES}
    assert all(judge(said[rule], scene)["exact"] for rule in RULES[:4])
    assert len(set(said.values())) == len(RULES)
    assert [said[rule] for rule in RULES[4:]] == ["red and blue", "circle and star", "large and small",
                                                  "two objects"]
    assert by_rule(Scene(things[:1], ""), "count") == "one object"


@pytest.fixture(scope="module")
def upbringing():
    """assets/make.py, which made the built-in LLM."""
    spec = importlib.util.spec_from_file_location("upbringing", ROOT / "assets" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw_texts(upbringing, llm, scenes: int = 20):
    tokenizer = Tokenizer.from_pretrained("assets/llm")
    return upbringing.Texts(tokenizer, llm.config.vocabulary, "test", scenes, noise=0)


def test_a_map_says_what_lies_where(upbringing):
    llm = LLM.from_pretrained("assets/llm")
    texts, table = draw_texts(upbringing, llm), llm.embedding.weight.detach()
    for scene in texts.scenes:
        for side in (8, 4):
            row = [0, *texts.add_map(scene, side ** 2)]
            places = texts.places()[2:2 + side ** 2]
            begin, *cells, end = texts.embed(torch.tensor([row]), texts.table(table))[0, 1:]
            assert len(cells) == len(places) == side ** 2 and not torch.equal(begin, end)
            for thing in scene.things:
                at = int(thing.y * side / SIDE) * side + int(thing.x * side / SIDE)
                centre = torch.tensor([thing.x, thing.y]) / SIDE * 2 - 1
                assert (places[at] - centre).abs().max() <= 1 / side + 1e-6
                if side == 8 and thing.size == "large":  # so that the middle's cell is its own
                    named = [sum(table[texts.word(f" {word}")] for word in (size, *thing[1:3]))
                             for size, meaning in SIZE_WORDS.items() if meaning == "large"]
                    assert min((cells[at] - words).abs().max() for words in named) < 1e-5
            if side == 8:
                empty = [torch.equal(cell, table[texts.dot]) for cell in cells]
                assert 10 < sum(empty) <= 64 - len(scene.things)


def test_what_is_learned_of_a_text_is_its_answer(upbringing):
    llm, tokenizer = LLM.from_pretrained("assets/llm"), Tokenizer.from_pretrained("assets/llm")
    texts = draw_texts(upbringing, llm)
    for kind in ("caption", "rest", "match", "ask") * 3:
        [row], [learned] = upbringing.padded([texts.about_a_map(kind, 16)], 200, texts.zero)
        said = tokenizer.decode(row[learned].tolist())
        asked = tokenizer.decode([id for id in row[1:][~learned[1:]].tolist() if 0 <= id < texts.zero])
        if kind == "match":
            assert asked.endswith(" match?") and said in (" yes\n", " no\n")
        elif kind == "ask":
            answers = {answer for scene in texts.scenes for _, answer in questions(scene)}
            assert asked.count("?") == said.count("\n") > 1 and {*said.split()} <= answers
        else:
            caption = f"{asked} {said}".strip()
            assert asked == "" or kind == "rest"
            assert any(judge(caption, scene)["exact"] for scene in texts.scenes), caption


def test_the_built_in_llm_reads_maps(upbringing):
    """As adapters that keep the grid give them. It has never seen a picture."""
    llm, tokenizer = LLM.from_pretrained("assets/llm"), Tokenizer.from_pretrained("assets/llm")
    texts = draw_texts(upbringing, llm, 80)
    rows = [[0, *texts.add_map(scene, 64)] for scene in texts.scenes]
    table = texts.table(llm.embedding.weight.detach())
    said = llm.generate(embeddings=[texts.embed(torch.tensor(row), table) for row in rows], max_tokens=40,
                        end_tokens=tuple(tokenizer.encode("\n")))
    right = [judge(tokenizer.decode(ids), scene)["exact"] for ids, scene in zip(said, texts.scenes)]
    assert sum(right) > 64, right  # before it read maps, none


# ---------------------------------------------------------------------------------------------------------
# Checkpoints

@pytest.fixture
def checkpoint(fixtures, tmp_path):
    shutil.copytree(fixtures / "llama", tmp_path / "llama")
    return tmp_path / "llama"


def change(folder, edit) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors")


NORM = "model.layers.1.input_layernorm.weight"


def test_loading_is_strict(checkpoint):
    def fails(*parts):
        with pytest.raises(InputError) as error:
            LLM.from_pretrained(str(checkpoint))
        assert all(part in str(error.value) for part in (str(checkpoint), *parts)), error.value

    change(checkpoint, lambda state: state.update({"model.layers.7.extra": torch.zeros(2)}))
    fails("model.layers.7.extra", "not part of a llama model")
    change(checkpoint, lambda state: state.pop("model.layers.7.extra"))
    change(checkpoint, lambda state: state.update({NORM: torch.ones(25)}))
    fails(NORM, "(25,)", "(24,)")
    change(checkpoint, lambda state: state.update({NORM: torch.ones(24, dtype=torch.int64)}))
    fails(NORM, "int64")
    change(checkpoint, lambda state: state.pop(NORM))
    fails(NORM, "missing")
    config = json.loads((checkpoint / "config.json").read_text())
    for edit, part in ((dict(model_type="mamba"), "'mamba' is not one of gpt2, opt"),
                       (dict(num_attention_heads=0), "llama config"),
                       (dict(rope_parameters=dict(rope_type="yarn")), "yarn"),
                       (dict(hidden_act="swish7"), "swish7"),
                       (dict(num_hidden_layers="x"), "llama config")):
        (checkpoint / "config.json").write_text(json.dumps({**config, **edit}))
        fails("config.json", part)
    (checkpoint / "config.json").write_text("{")
    fails("config.json", "not valid JSON")
    (checkpoint / "config.json").unlink()
    fails("config.json", "No such file")


def test_truncated_weights(checkpoint):
    whole = (checkpoint / "model.safetensors").read_bytes()
    for size in (0, 5, 200, len(whole) - 1):
        (checkpoint / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(InputError, match="model.safetensors: not a whole safetensors file"):
            LLM.from_pretrained(str(checkpoint))
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model.safetensors: no such file"):
        LLM.from_pretrained(str(checkpoint))


def test_shards_stay_in_their_folder(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    for name in ("../llama/model.safetensors", "/etc/model.safetensors", "sub/model.safetensors",
                 "model.bin", 7):
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(InputError, match="not a plain safetensors file name"):
            LLM.from_pretrained(str(checkpoint))


def test_dtype_and_no_sharing_with_gradients(fixtures):
    llm = LLM.from_pretrained(str(fixtures / "llama"), torch.bfloat16)
    assert {p.dtype for p in llm.parameters()} == {torch.bfloat16} and not llm.training


def test_built_in_backbones_load_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vit, llm = ViT.from_pretrained("assets/vit"), LLM.from_pretrained("assets/llm")
    tokenizer = Tokenizer.from_pretrained("assets/llm")
    assert vit(torch.zeros(1, 3, 96, 96)).shape == (1, 65, vit.config.hidden)
    stored = load_file(HERE / "assets" / "vit" / "model.safetensors")
    # as the reference's own class wants it
    assert stored["embeddings.cls_token"].shape == (1, 1, vit.config.hidden)
    ids = tokenizer.encode("a large red circle above a small blue star\n")
    assert len(ids) == 10 and tokenizer.decode(ids) == "a large red circle above a small blue star\n"
    text = tokenizer.decode(llm.generate(torch.tensor([[0]]), max_tokens=40, temperature=1.0,
                                         generator=torch.Generator().manual_seed(1))[0])
    caption = text.split("\n")[0]
    assert THING and any(shape in caption for shape in SHAPES), text


# ---------------------------------------------------------------------------------------------------------
# Files that are written, and attention

def test_files_are_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "file").write_text("old")

    def fail(path):
        path.write_text("half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="file: No space left"):
        write_file(tmp_path / "file", fail)
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    (tmp_path / "link").symlink_to("folder/file")
    write_file(tmp_path / "link", lambda path: path.write_text("new"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "file").read_text() == "new"
    (tmp_path / "nowhere").symlink_to("none/file")
    (tmp_path / "round").symlink_to("round")
    for name in ("nowhere", "round"):
        with pytest.raises(InputError):
            check_writable(tmp_path / name)


def test_a_name_of_any_bytes_is_written_as_json(tmp_path):
    write_text(tmp_path / "file", json.dumps({"image": "caf\udce9.png"}, ensure_ascii=False))
    assert read_json(tmp_path / "file") == {"image": "caf\udce9.png"}


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = tmp_path / ".old.pt.0123abcd.vlm-tmp"
    left.write_text("half")
    kept = [tmp_path / name for name in (".b.pt.00000002.tmp", ".c.pt", "d.pt.0000.vlm-tmp", ".e.pt.x.tmp")]
    for file in kept:
        file.write_text("not ours")
        os.utime(file, (0, time.time() - 90_000))

    def write(file):
        assert not left.exists()
        file.write_text("new")
        write_file(tmp_path / "other.pt", Path.touch)  # as another process may: what is written is locked

    write_file(tmp_path / "new.pt", write)
    assert {*tmp_path.iterdir()} == {*kept, tmp_path / "new.pt", tmp_path / "other.pt"}


@pytest.mark.parametrize("amx", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("T, S, mask", (
    (1, 7, None), (5, 5, None), (129, 129, None), (300, 300, None), (5, 7, "bool"), (1, 7, "bool"),
    (5, 7, "added")))
def test_attention_is_the_same_by_every_kernel(T, S, mask, dtype, amx, monkeypatch):
    """Of heads that share keys, with a backward pass to follow or without one, whatever the CPU can do."""
    monkeypatch.setattr(kernels, "AMX", amx)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 8, dtype=dtype) for heads, length in ((6, T), (3, S), (3, S)))
    seen = (torch.arange(S) + T - S <= torch.arange(T)[:, None]).repeat(2, 1, 1, 1)
    seen[1, ..., 0] &= mask is None
    added = torch.zeros(()).masked_fill(~seen, -torch.inf)
    if mask == "added":
        added = torch.randn(2, 6, T, S, dtype=dtype)
    keys, values = (x.double().repeat_interleave(2, 1) for x in (k, v))
    expected = (q.double() @ keys.mT / 8 ** 0.5 + added.double()).softmax(-1) @ values
    given = {"bool": seen, "added": added}.get(mask)
    for kept in (False, True):
        with torch.set_grad_enabled(kept):
            found = attend(q, k, v, given, causal=mask is None and T > 1)
        assert found.shape == q.shape and found.dtype == dtype
        assert (found - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.05)
