"""What is in a user's file is what is learned: layouts, text, pictures, and what is left out aloud."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import sample
import train
from adapters import ADAPTERS, VLM, build
from data import ANSWERS, EARLIER, LAST, Views, arrange, place_images, stack
from fixtures.pictures import picture
from formats.captions import Captions
from formats.files import InputError
from formats.pictures import FORMATS, open_picture
from formats.shards import caption_data, read_shard
from sample import caption_set
from support.answers import exact_match, vqa_accuracy
from test_scale import write_tar
from test_vlm import QFORMER, QUICK_SET, SMALL, command, interrupt, small

KARPATHY = {
    "dataset": "flickr8k",
    "images": [
        {
            "filename": "a.jpg",
            "split": "train",
            "sentences": [{"raw": "A dog ."}, {"raw": "A pup", "tokens": ["a"]}],
        },
        {"filename": "b.jpg", "split": "test", "sentences": [{"raw": "A cat"}]},
    ],
}


def turns(*texts: str, names=("from", "value", "human", "gpt")) -> list[dict]:
    speaker, text, asks, answers = names
    return [{speaker: (asks, answers)[i % 2], text: said} for i, said in enumerate(texts)]


ROLES = "role", "content", "user", "assistant"
TWO = {"a.jpg": [[("", "A dog")], [("", "A pup")]], "b.jpg": [[("", "A cat")]]}
ASKED = {"a.jpg": [[("What is it?", "A dog")]]}
LAYOUTS = {  # name -> text, what is read
    "tabs": ("file_name\tcaption\na.jpg\tA dog\na.jpg\tA pup .\nb.jpg\tA cat\n", TWO),
    "semicolons, other order": ("title;image\nA dog;a.jpg\nA pup;a.jpg\nA cat;b.jpg\n", TWO),
    "an index and a split": (
        ",filepath,text,split\n0,a.jpg,A dog,train\n1,a.jpg,A pup,train\n2,b.jpg,A cat,test\n",
        TWO,
    ),
    "Flickr30k's results.csv": (
        "image_name| comment_number| comment\na.jpg| 0| A dog .\na.jpg| 1| A pup .\nb.jpg| 0| A cat .\n",
        TWO,
    ),
    "Flickr8k.token.txt": ("a.jpg#0\tA dog .\na.jpg#1\tA pup .\nb.jpg#0\tA cat .\n", TWO),
    "questions": ("image,question,answer\na.jpg,What is it?,A dog\n", ASKED),
    "old Mac's line ends": ("image,caption\ra.jpg,A dog\ra.jpg,A pup\rb.jpg,A cat", TWO),
    "a caption beside a title, in any order": ("title,image,caption\nPhoto 1,a.jpg,A dog\n",
                                               {"a.jpg": [[("", "A dog")]]}),
    "several columns of captions": ("image,caption,caption\na.jpg,A dog,A pup\nb.jpg,A cat,\n", TWO),
    "an empty line before the header, and commas in it": (
        '\n"a, b",image,caption\n1,a.jpg,A dog\n2,a.jpg,A pup\n3,b.jpg,A cat\n', TWO),
    "spaces before quotes": (
        'image, caption\na.jpg, "A dog"\na.jpg, "A ""dog"", wet"\n'
        'b.jpg, "Rex" runs\nb.jpg, A dog, "Rex", runs\n',
        {"a.jpg": [[("", "A dog")], [("", 'A "dog", wet')]],
         "b.jpg": [[("", '"Rex" runs')], [("", 'A dog, "Rex", runs')]]}),
    "commas in another column": ("image,caption,split\na.jpg,A dog,x\nb.jpg,A cat, wet,x\n",
                                 {"a.jpg": [[("", "A dog")]]}),
    "commas in the last column": ("image,caption\na.jpg,A dog, a cat\n", {"a.jpg": [[("", "A dog, a cat")]]}),
    "quotes": ('image,caption\na.jpg,"A ""big"" dog, wet"\n', {"a.jpg": [[("", 'A "big" dog, wet')]]}),
    "a caption over lines": (
        'image,caption\na.jpg,"A dog\nand a pup"\nb.jpg,A cat\n',
        {"a.jpg": [[("", "A dog and a pup")]], "b.jpg": [[("", "A cat")]]},
    ),
    "quotes never closed": (
        'image,caption\na.jpg,"A dog\nb.jpg,"A cat\nc.jpg,A 5" nail\nd.jpg,he said "\n',
        {
            "a.jpg": [[("", '"A dog')]],
            "b.jpg": [[("", '"A cat')]],
            "c.jpg": [[("", 'A 5" nail')]],
            "d.jpg": [[("", 'he said "')]],
        },
    ),
    "JSON lines, questions": ('{"image": "a.jpg", "question": "What is it?", "answer": "A dog"}\r\n', ASKED),
    "JSON lines, odd signs in a text": (
        '{"image": "a.jpg", "text": "A\u2028dog"}\n',
        {"a.jpg": [[("", "A dog")]]},
    ),
    "ImageFolder's metadata.jsonl": (
        '{"file_name": "a.jpg", "text": "A dog"}\n',
        {"a.jpg": [[("", "A dog")]]},
    ),
    "Karpathy's": (json.dumps(KARPATHY), TWO),
    "Karpathy's of COCO": (
        json.dumps(
            {"images": [{"filepath": "val2014", "filename": "a.jpg", "sentences": [{"raw": "A dog"}]}]}
        ),
        {"val2014/a.jpg": [[("", "A dog")]]},
    ),
    "COCO, ids of two kinds": (
        json.dumps({"images": [{"id": "1", "file_name": "a.jpg"}],
                    "annotations": [{"image_id": 1, "caption": "A dog"}]}),
        {"a.jpg": [[("", "A dog")]]},
    ),
    "COCO's, with questions": (
        json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}],
                    "annotations": [{"image_id": 1, "question": "What is it?", "answer": "A dog"}]}),
        ASKED,
    ),
    "COCO without one image": (
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.jpg"}],
                "annotations": [{"image_id": 1, "caption": "A dog"}, {"image_id": 2, "caption": "A cat"}],
            }
        ),
        {"a.jpg": [[("", "A dog")]]},
    ),
    "LLaVA, an image in a list": (
        json.dumps([{"image": ["a.jpg"], "conversations": turns("<image>\nWhat is it?", "A dog")}]),
        ASKED,
    ),
    "LLaVA, roles": (
        json.dumps(
            [{"images": ["a.jpg"], "conversations": turns("<image>What is it?", "A dog", names=ROLES)}]
        ),
        ASKED,
    ),
    "messages": (
        json.dumps([{"image": "a.jpg", "messages": turns("What is it?", "A dog", names=ROLES)}]),
        ASKED,
    ),
    "messages in parts": (
        json.dumps(
            [
                {
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "image", "image": "a.jpg"},
                                {"type": "text", "text": "What is it?"},
                            ],
                        },
                        {"role": "assistant", "content": [{"type": "text", "text": "A dog"}]},
                    ]
                }
            ]
        ),
        ASKED,
    ),
    "signs are answers": (
        '[{"image": "a.jpg", "question": "?", "answer": "+"}, {"image": "b.jpg", "caption": "🐶"}]',
        {"a.jpg": [[("?", "+")]], "b.jpg": [[("", "🐶")]]},
    ),
    "numbers, true and false are answers": (
        '[{"image": "a.jpg", "question": "How many?", "answer": 3},'
        ' {"image": "a.jpg", "question": "A dog?", "answer": true},'
        ' {"image": "a.jpg", "question": "Wet?", "answer": false}]',
        {"a.jpg": [[("How many?", "3")], [("A dog?", "yes")], [("Wet?", "no")]]},
    ),
}


def read(file: Path, **how) -> dict:
    captions = Captions(file, **how)
    paths = enumerate(captions.paths)
    return {str(path.relative_to(file.parent)): captions.conversations(i) for i, path in paths}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_that_people_have(name, tmp_path):
    text, wanted = LAYOUTS[name]
    file = tmp_path / "captions"
    file.write_bytes(text.encode())
    assert read(file) == wanted
    file.write_bytes(text.encode("utf-16"))
    assert read(file) == wanted


def test_one_split_of_a_file(tmp_path):
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps(KARPATHY))
    assert read(file, split="test") == {"b.jpg": [[("", "A cat")]]}
    with pytest.raises(InputError, match="no row of split 'val': there are test, train"):
        read(file, split="val")


def test_two_files_of_vqa(tmp_path):
    questions, notes = tmp_path / "questions.json", tmp_path / "annotations.json"
    questions.write_text(
        json.dumps(
            {
                "data_subtype": "val2014",
                "questions": [{"question_id": 10, "image_id": 42, "question": "What is it?"}],
            }
        )
    )
    notes.write_text(
        json.dumps(
            {
                "data_subtype": "val2014",
                "annotations": [
                    {"question_id": 10, "image_id": 42, "answers": [{"answer": "dog"}, {"answer": "pup"}]},
                    {"question_id": 11, "image_id": 42, "answers": [{"answer": "no"}]},
                ],
            }
        )
    )
    for pair in (questions, notes), (notes, questions):
        captions = Captions(",".join(map(str, pair)))
        assert [path.name for path in captions.paths] == ["COCO_val2014_000000000042.jpg"]
        assert captions.conversations(0) == [[("What is it?", "dog")], [("What is it?", "pup")]]


def test_every_row_is_accounted_for(tmp_path, capsys):
    """280 rows as LLaVA's files have them: 40 of each kind."""
    entries = []
    for i in range(40):
        entries += [
            {"image": f"{i}.jpg", "conversations": turns("<image>\nWhat is it?", "A dog")},
            {"image": [f"{i}.jpg"], "conversations": turns("And?", "A cat")},
            {"image": [f"{i}.jpg", "b.jpg"], "conversations": turns("<image><image>Same?", "No")},
            {"image": f"{i}.jpg", "conversations": turns("<image> or <image>?", "No")},
            {"conversations": turns("hi", "hello")},
            {"image": f"{i}.jpg", "conversations": turns("What?", " ")},
            {"image": f"{i}.jpg", "conversations": turns("And?", "A cat", "Big?", "No")},
        ]
    file = tmp_path / "llava.json"
    file.write_text(json.dumps(entries))
    captions = Captions(file)
    assert len(captions) == 80 and captions.count == 41
    assert [len(captions.conversations(i)) for i in range(80)] == [3, 1] * 40
    assert capsys.readouterr().err == (
        f"warning: {file}: 120 of 280 rows left out: 40 whose number of <image>s is not that of its pictures "
        "(first: entry 4), 40 without a picture (first: entry 5), 40 without a caption (first: entry 6)\n"
    )
    assert len(Captions(file, text_only=True)) == 120  # each text is an entry of its own
    file = tmp_path / "text.jsonl"
    file.write_text('{"question": "What?", "answer": "a dog"}\n')
    with pytest.raises(InputError, match="no usable pair of picture and caption: 1 without a picture"):
        Captions(file, text_only=True)
    assert "80 of 280 rows left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, reason",
    (
        (
            "name,words\na.jpg,A dog\n",
            "line 1 names no picture and caption, but 'name,words'; what is read: a table",
        ),
        (
            '[{"pic": "a.jpg", "words": "A dog"}]',
            "no usable pair of picture and caption: 1 without a picture",
        ),
        ('{"image": "a.jpg", "caption": "A dog"}\n{"image": }\n', "line 2: not valid JSON"),
        ('["a.jpg"]', "entry 1 is no object"),
        ("image,caption\na.jpg,\n", "1 without a caption .first: line 2.; what is read: a table"),
    ),
)
def test_a_file_of_no_use_says_what_is_wrong(text, reason, tmp_path):
    (tmp_path / "file").write_text(text)
    with pytest.raises(InputError, match=f"file: .*{reason}"):
        Captions(tmp_path / "file")


def test_hints_where_people_trip(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{i}.png,a picture\n" for i in range(8))
    for i in range(8):
        picture(20 + i, 30).save(f"{i}.png")
    Path("c.csv").write_text("image,caption\n" + rows)
    options = [*QFORMER, *QUICK_SET, "--data", "c.csv", "--batch", "4", "--warmup", "8"]
    assert command(monkeypatch, train, *options, "--out", "run") == 0
    out = capsys.readouterr().out
    assert "the warm-up of 8 steps doesn't end within 8: give a shorter --warmup" in out
    assert "validates on 1 pictures, not on --val-size 8: a twentieth of --data at most" in out
    assert command(monkeypatch, sample, "0.png", "Colour?", "--model", "run") == 2
    assert "Colour?: no such picture (if it is a question, say --prompt)" in capsys.readouterr().err


def test_pictures_that_lie_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("c.csv").write_text("image,caption\na.jpg,A dog\nb.jpg,A cat\n")
    assert command(monkeypatch, train, *QFORMER, *QUICK_SET, "--data", "c.csv") == 2
    assert (
        "a.jpg: no such picture, nor others of c.csv: --images says where they lie" in capsys.readouterr().err
    )

    # It is enough that the last is there
    picture(20, 30).save("last.jpg")
    rows = "".join(f"{i}.jpg,A dog\n" for i in range(100))
    Path("c.csv").write_text(f"image,caption\n{rows}last.jpg,A cat\n")
    assert len(caption_data("c.csv")) == 101


# ---------------------------------------------------------------------------------------------------------
# Text


def test_lines_are_kept_where_a_newline_ends_nothing(fixtures, tmp_path, monkeypatch):
    """With a public model; a run of ours ends a caption at a newline, so that its texts have one line."""
    monkeypatch.chdir(tmp_path)
    question = "Which animal is this?\nA. cat\nB. dog"
    answer = "total: 3\nitems:\n  - tea"
    picture(30, 30).save("a.jpg")
    Path("qa.json").write_text(
        json.dumps([{"image": "a.jpg", "conversations": turns(f"<image>\n{question}", answer)}])
    )
    captions = Captions("qa.json")
    assert captions.conversations(0) == [[("Which animal is this? A. cat B. dog", "total: 3 items: - tea")]]
    vlm = VLM.from_pretrained(str(fixtures / "smolvlm"))
    captions.keep_lines = vlm.processor.keeps_lines
    assert captions.conversations(0) == [[(question, answer)]]
    options = ["--from", fixtures / "smolvlm", "--data", "qa.json", "--val", "qa.json", *QUICK_SET]
    seen, encode = [], vlm.processor.__class__.encode
    monkeypatch.setattr(
        vlm.processor.__class__,
        "encode",
        lambda self, text, *rest, **how: (
            seen.append((text.removeprefix("<image>"), *rest[:1])) or encode(self, text, *rest, **how)
        ),
    )
    assert command(monkeypatch, train, *options, "--steps", "2", "--save-every", "2", "--out", "run") == 0
    assert (question, answer) in seen
    seen.clear()
    assert command(monkeypatch, sample, "--model", "run", "--data", "qa.json", "--workers", "0") == 0
    assert seen and all(text.endswith(question) for text, *_ in seen)


def test_a_text_that_does_not_fit_loses_its_first_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(8):
        picture(20 + i, 30).save(f"{i}.png")
    asked = [f"{'no more of this ' * (300 if i == 3 else 1)}what is it" for i in range(8)]
    rows = [
        {"image": f"{i}.png", "question": question, "answer": "A dog"} for i, question in enumerate(asked)
    ]
    Path("qa.json").write_text(json.dumps(rows))
    options = [*QFORMER, *QUICK_SET, "--data", "qa.json", "--val", "qa.json", "--batch", "4"]
    assert command(monkeypatch, train, *options, "--out", "run") == 0
    captured = capsys.readouterr()
    assert "512 positions lost their first turns or words: 1" in captured.out
    assert "the built-in llm knows the shapes world alone: give --llm another" in captured.err
    processor = VLM.from_pretrained("run").processor
    ids, kinds = processor.encode(asked[3], "A dog")
    short = processor.encode(asked[0], "A dog")
    assert 480 < len(ids) <= 512 and kinds.count(LAST) == short.kinds.count(LAST)
    assert processor.tokenizer.decode(ids).endswith("this what is it A dog\n")


# ---------------------------------------------------------------------------------------------------------
# Several turns, several pictures


def test_a_conversation_is_one_sequence_and_all_its_answers_are_learned(fixtures):
    for name, text in (
        (
            "smolvlm",
            "User:<image>One?<end_of_utterance>\nAssistant: A dog<end_of_utterance>\n"
            "User: Two<image>?<end_of_utterance>\nAssistant: no<end_of_utterance>",
        ),
        ("nanovlm", None),
        ("llava", None),
    ):
        processor = VLM.from_pretrained(str(fixtures / name)).processor
        ids, targets = processor.encode("Two<image>?", "no", earlier=[("<image>One?", "A dog")])
        first, learned = processor.encode("<image>One?", "A dog")
        assert ids[: len(first)] == first and [min(kind, EARLIER) for kind in targets[: len(first)]] == [
            min(kind, EARLIER) for kind in learned]
        spelled = processor.tokenizer.decode([id for id, kind in zip(ids, targets) if kind in ANSWERS])
        end = processor.tokenizer.decode(processor.end_tokens[:1])
        assert spelled.replace(" ", "") == f"Adog{end}no{end}"
        assert EARLIER in targets and targets[-1] == LAST
        if text:
            Q = processor.queries
            spelled = processor.tokenizer.decode([*processor.start, *ids][len(processor.start) :])
            picture = processor.format.image(Q, 0, 0)
            assert spelled.replace(picture, "<image>").removeprefix(processor.format.begin) == text


@pytest.mark.parametrize("name", ("smolvlm", "llava", "ours"))
def test_an_answer_that_is_cut_ends_all_the_same_before_the_next_turn(name, fixtures):
    vlm = small(fixtures) if name == "ours" else VLM.from_pretrained(str(fixtures / name))
    processor = vlm.processor
    turns = [("a", "bcabcabcabcabc"), ("c", "a")]
    whole, _ = processor.encode(*turns[1], earlier=turns[:1])
    ids, targets = processor.encode(*turns[1], max_tokens=4, earlier=turns[:1])
    first, _ = processor.encode(*turns[0], max_tokens=4)
    assert ids[: len(first)] == first and first[-1] not in processor.ends
    assert ids[len(first)] in processor.ends and targets[len(first)] not in ANSWERS  # which isn't learned
    assert ids[len(first) :] == whole[len(first) - len(ids) :]


def test_what_does_not_fit_is_cut_from_the_front_but_keeps_its_pictures(fixtures):
    processor = VLM.from_pretrained(str(fixtures / "smolvlm")).processor
    Q = processor.queries
    turns = [(f"{'<image>' * (i == 1)}word {i}?", "yes") for i in range(90)]
    ids, targets = processor.encode(*turns[-1], earlier=turns[:-1])
    kept = processor.tokenizer.decode(ids).count("?")
    assert processor.max_positions - 30 < len(ids) <= processor.max_positions and 2 < kept < 89
    assert ids.count(processor.placeholder) == Q and len(processor.cut) == 1
    first, *later = turns[-kept:-1]
    again, _ = processor.encode(*turns[-1], earlier=[("<image>" + first[0], "yes"), *later])
    assert ids == again and len(processor.cut) == 1  # as if it had begun there

    # Without a space between words it loses its first characters
    ids, _ = processor.encode("<image>" + "字" * 9 * processor.max_positions, "yes")
    assert processor.max_positions - 30 < len(ids) <= processor.max_positions

    # Pictures can't be cut: nothing stands for such a text, whose pictures are left out
    many = [[("<image>" * (processor.max_positions // Q + 1) + "a?", "b")], [("<image>a?", "b")]]
    sizes = [[(0, 0)] * turns[0][0].count("<image>") for turns in many]
    batch = processor.batch(many, tiles=sizes)
    assert batch.shown == [1] and len(processor.skipped) == 1
    assert batch.tokens[0].unique().tolist() == [0] and batch.most_images == 1


def test_a_question_is_asked_of_the_pictures_seen_so_far(tmp_path):
    entries = [
        {"images": ["a.jpg", "b.jpg"], "conversations": turns("<image>One?", "dog", "<image>Two?", "cat")},
        {"images": ["a.jpg", "b.jpg"], "conversations": turns("Both?", "yes")},
        {"images": ["a.jpg"], "conversations": turns("Hello", "hi", "<image> What?", "dog")},
        {"image": "c.jpg", "conversations": turns("What?\n<image>", "cow")},
    ]
    (tmp_path / "qa.json").write_text(json.dumps(entries))
    each = Captions(tmp_path / "qa.json").by_question()
    asked = [(each.pictures(i), each.conversations(i)[0][-1]) for i in range(len(each))]
    assert asked == [
        ((0,), ("<image>One?", "dog")),
        ((0, 1), ("<image>Two?", "cat")),
        ((0, 1), ("Both?", "yes")),
        ((0,), ("<image>What?", "dog")),
        ((2,), ("What?", "cow")),  # as LLaVA learns it, whose single picture comes first
    ]


@pytest.mark.parametrize(
    "parts, images, wanted",
    (
        (["image", "a"], ["x.jpg"], ("x.jpg",)),
        (["image:y.jpg", "a"], [], ("y.jpg",)),
        (["image:x.jpg", "a"], ["x.jpg"], ("x.jpg",)),  # named twice
        (["a", "url:z.jpg", "b", "image:x.jpg"], [], ("z.jpg", "x.jpg")),
    ),
)
def test_messages_name_their_pictures_in_parts_or_beside_them(parts, images, wanted, tmp_path):
    content = []
    for part in parts:
        kind, _, name = part.partition(":")
        if kind == "url":
            content.append({"type": "image_url", "image_url": {"url": name}})
        elif kind == "image":
            content.append({"type": "image"} | ({"image": name} if name else {}))
        else:
            content.append({"type": "text", "text": part})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "qa.json").write_text(json.dumps([{"images": images, "messages": messages}]))
    captions = Captions(tmp_path / "qa.json")
    assert tuple(path.name for path in captions.paths) == wanted
    question = "a" if len(wanted) == 1 else "a<image>b<image>"
    assert captions.conversations(0) == [[(question, "yes")]]


def test_each_picture_has_a_place_and_each_place_a_picture():
    assert place_images([("see <image>:", "x")], 2) == [("<image>see <image>:", "x")]
    assert place_images([("a", "x"), ("<image>b", "y")], 1) == [("a", "x"), ("<image>b", "y")]
    assert place_images([("a", "x")], 0) == [("a", "x")]
    with pytest.raises(InputError, match="room for 2 pictures, not 1"):
        place_images([("<image>a", "x"), ("<image>b", "y")], 1)


def test_sets_that_share_pictures_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        picture(20 + i, 30).save(f"{i}.png")
    Path("c.csv").write_text("image,caption\n" + "".join(f"{i}.png,It is {i}\n" for i in range(4)))
    Path("val.csv").write_text("image,caption\n3.png,It is 3\n")
    options = [*QFORMER, *QUICK_SET, "--data", "c.csv", "--val", "val.csv", "--batch", "4", "--steps", "1"]
    mix = "image-text:0.5,text-image:0.5"
    assert command(monkeypatch, train, *options, "--warmup", "0", "--layout", mix, "--out", "run") == 0
    assert "1 pictures are in the training and in the validation set, such as " in capsys.readouterr().err


def test_a_row_of_no_split_is_told(tmp_path, capsys):
    """A comma in its caption shifts the others."""
    rows = "a.jpg,A dog,x\nb.jpg,A cat, wet,x\nb.jpg,A cow,y\n"
    (tmp_path / "c.csv").write_text("image,caption,split\n" + rows)
    captions = Captions(tmp_path / "c.csv", split="x")
    assert len(captions) == 1 and "1 with more fields than line 1 names" in capsys.readouterr().err


@pytest.mark.parametrize("name", ("a, b/c.csv", "c.csv", "a, b/x.tar"))
def test_a_name_may_have_commas(name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".tar":
        write_tar(file, [("1.png", b"-"), ("1.txt", b"A dog")])
        assert caption_data(str(file)).take(9).conversations(0) == [[("", "A dog")]]
        with pytest.raises(InputError, match="x.tar: shards have no split 'test'"):
            caption_data(str(file), split="test")
        return
    file.write_text("image,caption\na.png,A dog\n")
    assert Captions(file).paths == [file.parent / "a.png"] and Captions(file).label == "c.csv"


def test_a_picture_by_several_names_is_one(tmp_path):
    names = ("a.png", "./a.png", "b/../a.png", tmp_path / "a.png", "b.png")
    (tmp_path / "c.csv").write_text("image,caption\n" + "".join(f"{name},A dog\n" for name in names))
    captions = Captions(tmp_path / "c.csv")
    assert captions.paths == [tmp_path / "a.png", tmp_path / "b.png"]
    assert [len(captions.conversations(i)) for i in range(len(captions))] == [4, 1]


def test_what_is_learned_first_is_asked_first():
    """The run's prompt stands where the data begins without a question; a later turn without one has none."""
    class Talk:
        def conversations(self, _):
            return [[("", "A dog runs."), ("Colour?", "brown"), ("", "And wet.")]]

        def pictures(self, _):
            return (0,)

    vlm = build(dict(vit="assets/vit", llm="assets/llm", adapter="linear", adapter_sizes={},
                     prompt="A photo of")).eval()
    asked = []
    encode = vlm.processor.encode
    vlm.processor.encode = lambda text, **rest: asked.append([*rest["earlier"], (text, "")]) or encode(
        text, **rest)
    caption_set(vlm, Talk(), [([0], Views(torch.randn(1, 64, 128), [1], [[(0, 0)]]))], max_tokens=2)
    learned = arrange("image-text", Talk(), 0, 0, 0, vlm.processor.prompt)
    assert asked == [[*learned[:-1], (learned[-1][0], "")]] and learned[0][0] == "<image>A photo of"


def test_what_is_no_name_of_a_file_is_no_picture(tmp_path, monkeypatch, capsys):
    """Such as a picture in base64."""
    monkeypatch.chdir(tmp_path)
    long = "data:image/jpeg;base64," + "A" * 9000
    Path("c.csv").write_text(f"image,caption\n{long},A dog\n")
    assert command(monkeypatch, sample, "--data", "c.csv", "--model", "assets/none") == 2
    line = capsys.readouterr().err
    assert "data:image/jpeg" in line and "no such picture" in line and len(line) < 2200
    assert len(Captions("c.csv").stamp()) == 64
    assert command(monkeypatch, train, "--data", "x" * 300) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_picture_that_is_shown_late_is_shown_once(tmp_path):
    """Whatever the prompt of a run says, where the data asks no question at first."""
    rows = [{"image": "a.png", "conversations": turns("", "hi", "<image>What?", "dog")}]
    rows[0]["conversations"] = rows[0]["conversations"][1:]  # the assistant begins
    (tmp_path / "c.json").write_text(json.dumps(rows))
    captions = Captions(tmp_path / "c.json")
    learned = arrange("image-text", captions, 0, 0, 0, "Look: <image>")
    assert "".join(text for text, _ in learned).count("<image>") == 1


@pytest.mark.parametrize("layout", data.LAYOUTS)
def test_a_question_keeps_its_layout(layout, tmp_path):
    picture(20, 30).save(tmp_path / "a.png")
    rows = "a.png,What colour?,red\na.png,What is it?,a car\n"
    (tmp_path / "c.csv").write_text("image,question,answer\n" + rows)
    captions = Captions(tmp_path / "c.csv")
    learned = {arrange(layout, captions, 0, 0, epoch)[0] for epoch in range(20)}
    assert learned == {("<image>What colour?", "red"), ("<image>What is it?", "a car")}


def test_layouts_of_captions_leave_conversations_as_they_are(tmp_path, monkeypatch, capsys):
    """Matching has nothing to score then."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for i in range(4):
        picture(20 + i, 30).save(f"{i}.png")
        rows.append({"image": f"{i}.png", "conversations": turns("A?", "a", "B?", "b")})
    Path("qa.json").write_text(json.dumps(rows))
    options = [*QFORMER, *QUICK_SET, "--data", "qa.json", "--val", "qa.json", "--batch", "4", "--steps", "2"]
    mix = "text-image-text:0.5,text-image:0.5"
    assert command(monkeypatch, train, *options, "--warmup", "0", "--layout", mix, "--out", "run") == 0
    assert "| val (8) " in capsys.readouterr().out
    ask = ("--model", "run", "--data", "qa.json", "--shot", "0.png", "x", "--prompt", "<image> is", "--json")
    assert command(monkeypatch, sample, *ask, "--workers", "0") == 0
    assert len(capsys.readouterr().out.splitlines()) == 8


@pytest.mark.parametrize("adapter", ("mlp", "qformer", "flamingo"))
def test_rows_of_all_kinds_train(adapter, tmp_path, monkeypatch, capsys):
    """One picture, two, none; one turn, three: with kept features and without."""
    monkeypatch.chdir(tmp_path)
    for i in range(8):
        picture(20 + i, 30).save(f"{i}.png")
    rows = []
    for i in range(8):
        rows += [
            {"image": f"{i}.png", "conversations": turns("What?", "a dog", "Big?", "no", "Sure?", "yes")},
            {"image": [f"{i}.png", "0.png"], "conversations": turns("<image>Same as <image>?", "no")},
            {"conversations": turns("Hello", "hi")},
        ]
    Path("qa.json").write_text(json.dumps(rows))
    Path("val.json").write_text(json.dumps(rows[:5]))
    sizes = [] if adapter == "mlp" else SMALL
    if adapter == "qformer":
        sizes = [*sizes, "--adapter-text", "4"]
    options = [*sizes, *QUICK_SET, "--adapter", adapter, "--data", "qa.json", "--val", "val.json"]
    options += ["--batch", "4", "--precision", "float32", "--shots", "1", "--lora", "2"]
    found = []
    for more in ([], ["--no-cache-features"]):
        assert command(monkeypatch, train, *options, *more, "--out", f"run{len(found)}") == 0
        captured = capsys.readouterr()
        assert "qa.json" not in captured.err and "1 of 5 rows left out: 1 without a picture" in captured.err
        assert "| val (8) " in captured.out
        lines = Path(f"run{len(found)}/metrics.jsonl").read_text().splitlines()[:-1]
        found.append([json.loads(line)["loss"] for line in lines])
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    scored = [json.loads(line) for line in Path("run0/captions-val.jsonl").read_text().splitlines()]
    before = [["What?", "a dog"], ["Big?", "no"]]
    assert [line.get("earlier") for line in scored[:3]] == [None, before[:1], before]
    assert [Path(name).name for name in scored[3]["image"]] == ["0.png", "0.png"]

    # Without a LoRA the texts teach nothing
    assert command(monkeypatch, train, *options[:-1], "0", "--out", "frozen") == 0
    assert "qa.json: 8 of 24 rows left out: 8 without a picture (first: entry 3)" in capsys.readouterr().err


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_step_without_a_picture_still_runs_through_all(adapter, fixtures):
    """So that the processes of several GPUs have the same gradients to share."""
    sizes = {"pixelshuffle": dict(scale=5), "qformer": dict(text=4)}.get(adapter, {})
    vlm = small(fixtures, adapter, **sizes).train()
    views = Views(torch.zeros(0, 3, 30, 30), [0, 0], [[], []])
    batch = vlm.processor.batch([[("ab", "c")], [("b", "ca")]], tiles=views.tiles)
    losses, _ = vlm(batch, vlm.features(views.pick([0, 1]).x))
    alone, where, targets = stack([vlm.processor.encode("ab", "c", images=0)])
    expected = F.cross_entropy(vlm.llm.logits(vlm.states(alone, None, where)), targets)
    assert torch.allclose(losses[: len(targets)].mean(), expected, atol=1e-5)
    losses.mean().backward()
    for name, p in vlm.weights("adapter").items():
        gated = adapter == "flamingo" and name.startswith("adapter.blocks")  # works on words too
        assert p.grad is not None and (gated or not p.grad.any()), name


# ---------------------------------------------------------------------------------------------------------
# Pictures


def test_broken_exif_costs_the_rotation_alone(tmp_path):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))
        )

    picture(40, 20).save(whole := io.BytesIO(), "PNG")
    png = whole.getvalue()
    profile = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n      8\n4578zz\n")
    for block in (chunk(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03"), chunk(b"zTXt", profile)):
        (tmp_path / "a.png").write_bytes(png[:33] + block + png[33:])
        assert open_picture(tmp_path / "a.png").size == (40, 20)
    (tmp_path / "a.png").write_bytes(png[: len(png) // 2])  # but a picture that is cut is broken
    with pytest.raises(InputError, match="broken picture"):
        open_picture(tmp_path / "a.png")


def test_too_large_is_not_broken(tmp_path, monkeypatch):
    picture(40, 30).save(tmp_path / "a.png")
    for limit, said in ((1100, r"too large: 0 megapixels"), (500, "too large: more than 0 megapixels")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match=f"a.png: {said}, the limit is 0"):
            open_picture(tmp_path / "a.png")


def test_a_jpeg_of_a_thousand_scans_is_refused(tmp_path):
    """Each goes over the whole picture, and costs 30 bytes. What stands behind the picture is no scan."""
    picture(40, 30).save(file := io.BytesIO(), "JPEG", progressive=True)
    jpeg = file.getvalue()
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    for content in (jpeg, jpeg[:-2] + last * 90 + jpeg[-2:], jpeg + last * 1000):
        (tmp_path / "a.jpg").write_bytes(content)
        assert open_picture(tmp_path / "a.jpg").size == (40, 30)
    slow = jpeg[:-2] + last * 1000 + jpeg[-2:]
    (tmp_path / "a.jpg").write_bytes(slow)
    for content in (None, slow):
        with pytest.raises(InputError, match="a.jpg: too slow to read: a JPEG of 1,010 scans, .* 100$"):
            open_picture(tmp_path / "a.jpg", content)


def test_a_tile_is_no_larger_than_a_picture(tmp_path):
    """A TIFF of 10 x 10 px in one tile of 2^28: zeros that would take gigabytes, and hardly a byte here."""
    content = zlib.compress(b"\0" * 1000)
    fields = dict.fromkeys((256, 257), 10) | {258: 8, 259: 8, 262: 1, 277: 1, 322: 1 << 14, 323: 1 << 14}
    fields |= {324: 8 + 2 + 12 * 10 + 4, 325: len(content)}  # where the tile lies
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    header = b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + b"\0" * 4
    (tmp_path / "a.tif").write_bytes(header + content)
    with pytest.raises(InputError, match="a.tif: too large: 268 megapixels, the limit is 89"):
        open_picture(tmp_path / "a.tif")


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow doesn't read AVIF")
def test_avif(tmp_path):
    picture(40, 30).save(tmp_path / "a.avif")
    assert open_picture(tmp_path / "a.avif").size == (40, 30)


# ---------------------------------------------------------------------------------------------------------
# Shards, and sets that moved


@pytest.mark.parametrize(
    "about, wanted",
    (
        ({"url": "u"}, [[("", "A dog runs")]]),
        ({"caption": None}, [[("", "A dog runs")]]),
        ({"caption": ""}, [[("", "A dog runs")]]),
        ({"question": "What does it do?"}, [[("What does it do?", "A dog runs")]]),
        ({"caption": "A cat"}, [[("", "A cat")]]),
        (
            {"question": "What is it?", "answers": ["A cat", "A pup"]},
            [[("What is it?", "A cat")], [("What is it?", "A pup")]],
        ),
        (
            {"conversations": turns("<image>\nWhat is it?", "A cat", "Big?", "No")},
            [[("What is it?", "A cat"), ("Big?", "No")]],
        ),
    ),
)
def test_a_shards_txt_beside_its_json(about, wanted, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind, content in (
            ("jpg", b"picture"),
            ("txt", b"A dog runs"),
            ("json", json.dumps(about).encode()),
        ):
            member = tarfile.TarInfo(f"0.{kind}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    [pair] = read_shard(tmp_path / "a.tar")
    assert pair.said == wanted and not pair.fault


@pytest.mark.slow
def test_a_run_goes_on_where_its_data_moved(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("old").mkdir()
    for i in range(8):
        picture(20 + i, 30).save(f"old/{i}.png")
    text = "image,caption\n" + "".join(f"{i}.png,A dog {i}\n" for i in range(8))
    Path("old/c.csv").write_text(text)
    options = [*QFORMER, *QUICK_SET, "--data", "old/c.csv", "--batch", "4"]
    interrupt(monkeypatch, *options, "--out", "run")
    Path("old").rename("new")
    capsys.readouterr()
    assert command(monkeypatch, train, "--resume", "run") == 2
    assert "old/c.csv: No such file" in capsys.readouterr().err
    Path("other.csv").write_text(text.replace("dog 3", "cat 3"))
    assert command(monkeypatch, train, "--resume", "run", "--data", "other.csv", "--images", "new") == 2
    assert "not the pictures and captions that run began with" in capsys.readouterr().err
    assert command(monkeypatch, train, "--resume", "run", "--data", "new/c.csv") == 0
    assert json.loads(Path("run/config.json").read_text())["training"]["data"] == str(tmp_path / "new/c.csv")


# ---------------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize(
    "answer, references, match, accuracy",
    (
        ("The two dogs.", ["2 dogs"] * 10, 1, 1),
        ("dog", ["dog"] * 2 + ["cat"] * 8, 1, (2 / 3 * 8 + 1 / 3 * 2) / 10),
        ("1,000", ["1000"] * 4 + ["many"] * 6, 1, 1),
        ("dont know", ["don't know"] * 10, 0, 1),
        ("cat", ["dog"] * 10, 0, 0),
        ("red/blue", ["red blue"] * 10, 1, 1),
    ),
)
def test_answers_are_scored_as_in_the_public_evaluation(answer, references, match, accuracy):
    """Compared with it on 20,000 random answers."""
    assert exact_match(answer, references) == match
    assert vqa_accuracy(answer, references) == pytest.approx(accuracy)


def test_every_question_of_a_picture_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"image": f"{i}.png", "question": f"is it {j}?", "answer": ["yes", "no"][j]}
        for i in range(6)
        for j in range(2)
    ]
    for i in range(6):
        picture(20 + i, 30).save(f"{i}.png")
    Path("qa.json").write_text(json.dumps(rows))
    options = [*QFORMER, *QUICK_SET, "--data", "qa.json", "--val", "qa.json", "--batch", "4"]
    assert command(monkeypatch, train, *options, "--out", "run") == 0
    assert "| exact match |" in (out := capsys.readouterr().out) and "| val (12) |" in out
    assert (
        command(monkeypatch, sample, "--model", "run", "--data", "qa.json", "--workers", "0", "--json") == 0
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["question"], line["references"]) for line in lines[:2]] == [
        ("is it 0?", ["yes"]),
        ("is it 1?", ["no"]),
    ]
    assert len(lines) == 12
