"""Caption files: pictures on disk with the captions, or questions and answers, that belong to them.

    image,caption                                     a table: CSV, TSV, semicolons or bars, with a header
    1000268201.jpg#0<tab>A child in a pink dress .    Flickr8k's and Flickr30k's own
    {"image": "a.jpg", "caption": "a dog"}            JSON lines, or a JSON list of these
    {"images": […], "annotations": […]}               COCO's captions; VQAv2's, with its questions file
    {"images": [{"filename": …, "sentences": […]}]}   Karpathy's splits
    [{"image": "a.jpg", "conversations": […]}]        LLaVA's, or "messages" with "role" and "content"

Columns and keys may have any of the names in COLUMNS.
"""
import copy
import csv
import hashlib
import json
import os
import random
import re
import zlib
from pathlib import Path
from typing import Iterator, NamedTuple

import torch
from PIL import Image

from formats.files import InputError, guard, named, warn, whole
from formats.pictures import open_picture

IMAGE = "<image>"  # where a picture stands in a text
COLUMNS = {  # what a column of a table, or a key in JSON, may be called
    "image": ("image", "images", "file_name", "filename", "filepath", "image_name", "image_path", "img",
              "path"),
    "caption": ("caption", "captions", "text", "answer", "answers", "title", "comment", "sentence",
                "sentences"),
    "question": ("question", "prompt"),
    "split": ("split",),
}
READ = ("a table whose header names a picture and a caption (such as image,caption), JSON lines, and the "
        "JSON of COCO, VQAv2, Karpathy and LLaVA")
ANSWERS = ("gpt", "assistant", "model")  # who answers in a conversation
QUESTIONS = ("human", "user")


def keep(text: str) -> str:
    """A text with its lines, without IMAGE: data places no picture."""
    return whole(text).replace(IMAGE, " ").strip()  # not nothing: what stood around it could make another


def flat(text: str) -> str:
    """A text in one line, single spaces, without the ' .' that Flickr8k's tokenised captions end in."""
    return join_lines(keep(text))


def join_lines(kept: str) -> str:
    """As `flat`, of a text that `keep` has seen."""
    return (" " + " ".join(kept.split())).removesuffix(" .").lstrip()


def in_one_line(said: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(question, caption) pairs that were kept, in one line each. Each step of a training asks for some."""
    return [(join_lines(question), join_lines(caption)) for question, caption in said]


class Row(NamedTuple):
    """A row of a caption file."""
    place: str  # such as "line 3" or "entry 2"
    images: list[str]
    question: str
    captions: list[str]
    split: str = ""


class Captions(torch.utils.data.Dataset):
    """Pictures with one or more captions each, from a file as above, or VQAv2's two, parted by a comma.

    Relative names of pictures are looked up in `images`, or beside the file. `split`: only the rows of that
    split. Rows that can't be used are counted by reason, and told in a line. Raises InputError.
    """

    note = ""  # which part of its file it is

    def __init__(self, file: str | Path, images: str | Path | None = None, split: str | None = None):
        self.keep_lines = False  # whether texts keep their lines
        self.file = str(file)
        first = Path(self.file.split(",")[0])
        folder = Path(images or first.parent)
        if images and not folder.is_dir():
            raise InputError(f"{folder}: no such folder of pictures")
        rows = read_file(self.file)
        if split is not None:
            splits = {row.split for row in rows}
            if split not in splits:
                raise InputError(f"{self.file}: no row of split {split!r}: there are "
                                 f"{', '.join(sorted(splits - {''})) or 'no splits'}")
            rows = [row for row in rows if row.split == split]
        self.collect(rows, folder)

    @property
    def label(self) -> str:
        """What a line of progress calls it."""
        return Path(self.file.split(",")[0]).name + self.note

    def make_absolute(self) -> None:
        """Gives pictures that are files a name that is the same in any working directory."""
        self.paths = [path if isinstance(path, str) else Path(os.path.abspath(path)) for path in self.paths]

    def check_pictures(self) -> None:
        """Raises InputError where none of the first pictures is there."""
        if not any(path.exists() for path in self.paths[:10]):
            raise InputError(f"{self.paths[0]}: no such picture, nor others of {self.file}: --images says "
                             "where they lie")

    def collect(self, rows: list[Row], folder: Path) -> None:
        """Sorts rows by picture. Tells how many are left out, and why."""
        found: dict[str, list[tuple[str, str]]] = {}
        left_out: dict[str, list[str]] = {}  # reason -> places
        for row in rows:
            captions = [caption for caption in row.captions if flat(caption)]
            if not row.images:
                left_out.setdefault("without a picture", []).append(row.place)
            elif len(row.images) > 1:
                left_out.setdefault("with several pictures", []).append(row.place)
            elif not captions:
                left_out.setdefault("without a caption", []).append(row.place)
            else:
                pairs = found.setdefault(whole(row.images[0]), [])
                pairs += [(keep(row.question), keep(caption)) for caption in captions]
        reasons = [f"{len(places)} {reason} (first: {places[0]})" for reason, places in left_out.items()]
        if not found:
            raise InputError(f"{self.file}: no usable pair of picture and caption"
                             + (f": {', '.join(reasons)}" if reasons else "") + f"; what is read: {READ}")
        if left_out:
            count = sum(map(len, left_out.values()))
            warn(f"{self.file}: {count} of {len(rows)} rows left out: {', '.join(reasons)}")
        self.paths = [folder / image for image in found]
        self.said = list(found.values())

    def __len__(self) -> int:
        return len(self.paths)

    def picture(self, i: int) -> Image.Image:
        path = self.paths[i]
        return open_picture(path, getattr(path, "file", None))  # of a shard's pair it is in memory

    def pairs(self, i: int) -> list[tuple[str, str]]:
        """(question, caption) of picture i, "" for no question."""
        return self.said[i] if self.keep_lines else in_one_line(self.said[i])

    def name(self, i: int) -> str:
        return str(self.paths[i])

    def contents(self) -> str:
        """A stamp of which pictures, by name, have which captions: the same wherever the files lie."""
        entries = [(Path(path).name, pairs) for path, pairs in zip(self.paths, self.said)]
        return hashlib.sha256(repr(entries).encode()).hexdigest()[:32]

    def stamp(self) -> str:
        """Differs from that of another set, and of this one after a picture in it was changed."""
        files = []
        for path in self.paths:
            if content := getattr(path, "file", None):
                files.append((str(path), zlib.crc32(content)))
            else:
                stat = path.stat() if path.exists() else None
                files.append((str(path.absolute()), stat and (stat.st_size, stat.st_mtime_ns)))
        return hashlib.sha256(repr(files).encode()).hexdigest()

    def subset(self, indices: list[int]) -> "Captions":
        part = copy.copy(self)
        part.paths = [self.paths[i] for i in indices]
        part.said = [self.said[i] for i in indices]
        return part

    def by_question(self) -> "Captions":
        """The same set with an entry for each question of a picture: to score all of them."""
        part = copy.copy(self)
        part.paths, part.said = [], []
        for path, pairs in zip(self.paths, self.said):
            asked: dict[str, list[tuple[str, str]]] = {}
            for question, caption in pairs:
                asked.setdefault(question, []).append((question, caption))
            part.paths += [path] * len(asked)
            part.said += asked.values()
        return part

    def held_out(self, size: int, seed: int, parts: int = 1) -> "tuple[Captions, Captions]":
        """Parts the set in two: the rest, and `size` pictures drawn from the seed, at most one in `parts`."""
        size = min(size, max(1, len(self) // parts))
        out = set(random.Random(f"{seed} held out").sample(range(len(self)), size))
        rest = [i for i in range(len(self)) if i not in out]
        return self.subset(rest), self.subset(sorted(out))


# ---------------------------------------------------------------------------------------------------------
# Files to rows

def read_file(file: str) -> list[Row]:
    """The rows of a caption file, or of VQAv2's two. Raises InputError."""
    paths = [Path(file)] if Path(file).exists() else [Path(part) for part in file.split(",")]
    texts = []
    for path in paths:
        with guard(path, "not UTF-8 text"):
            content = path.read_bytes()
            utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
            texts.append(content.decode("utf-16" if utf16 else "utf-8-sig"))
    with guard(file, "not a caption file that can be read"), named(file):
        if len(texts) > 1:
            return list(vqa_rows(*map(json.loads, texts)))
        if texts[0].lstrip()[:1] in ("{", "["):
            return list(json_rows(read_json_text(texts[0])))
        return list(table_rows(texts[0]))


def find(row: dict, what: str):
    """The value in a row under any of the names for `what`; None where there is none."""
    for name in COLUMNS[what]:
        if row.get(name) not in (None, "", []):
            return row[name]
    return None


def strings(value) -> list[str]:
    """A string, a list of strings or of objects that hold one, as a list of strings."""
    found = []
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, dict):
            entry = entry.get("raw") or entry.get("answer") or entry.get("text") or entry.get("path")
        if isinstance(entry, str):
            found.append(entry)
        elif isinstance(entry, (int, float)) and not isinstance(entry, bool):
            found.append(str(entry))
    return found


# ---------------------------------------------------------------------------------------------------------
# Tables

def table_rows(text: str) -> Iterator[Row]:
    """Rows of a table with a header, in any order and with further columns; or Flickr8k's, without one."""
    lines = re.split(r"\r\n|\n|\r", text)
    if re.match(r"\S.*#\d+\t", lines[0]):
        yield from flickr_rows(lines)
        return

    # The header tells what parts the columns
    names = {name: what for what, names in COLUMNS.items() for name in names}
    for delimiter in ",\t;|":
        columns = [names.get(name.strip().strip('"').lower()) for name in lines[0].split(delimiter)]
        if "image" in columns and "caption" in columns:
            break
    else:
        raise InputError(f"line 1 names no picture and caption, but {lines[0][:80]!r}; what is read: {READ}")

    # A caption in the last column may hold the delimiter
    at = {what: columns.index(what) for what in COLUMNS if what in columns}
    for number, fields in records(lines, delimiter, len(columns)):
        if len(fields) > len(columns) and at["caption"] == len(columns) - 1:
            fields[at["caption"]:] = [delimiter.join(fields[at["caption"]:])]
        row = {what: fields[i].strip() for what, i in at.items() if i < len(fields)}
        yield Row(f"line {number}", [row["image"]] if row.get("image") else [], row.get("question", ""),
                  [row["caption"]] if row.get("caption") else [], row.get("split", ""))


def records(lines: list[str], delimiter: str, width: int) -> Iterator[tuple[int, list[str]]]:
    """Yields the number of the line and the fields of each record behind the header. A field in quotes may go
    over several lines. A quote that is never closed, or closed in mid-field, is a letter like any other: it
    doesn't take in the lines that follow."""
    at = 1
    while at < len(lines):
        line, taken = lines[at], 1
        fields = quoted(line, delimiter)
        if fields is None and line.count('"') % 2:
            fields, taken = over_lines(lines[at:at + 50], delimiter, width)
        if line.strip():
            yield at + 1, fields or line.split(delimiter)
        at += taken


def over_lines(lines: list[str], delimiter: str, width: int) -> tuple[list[str] | None, int]:
    """The fields of a record that begins with the first line and goes over several, and how many these are;
    None and 1 where its quote isn't closed before the next record, which begins with the name of a
    picture."""
    parted = re.escape(delimiter)
    begin = re.compile(rf"[^{parted}]*\.(jpe?g|png|webp|gif|bmp|tiff?|avif)\s*{parted}", re.I)
    for taken in range(2, len(lines) + 1):
        if begin.match(lines[taken - 1]):
            break
        fields = quoted("\n".join(lines[:taken]), delimiter)
        if fields is not None and len(fields) == width:
            return fields, taken
    return None, 1


def quoted(text: str, delimiter: str) -> list[str] | None:
    """The fields of one record as the CSV rules have it; None where its quotes break them."""
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True))
    except (csv.Error, StopIteration):
        return None


def flickr_rows(lines: list[str]) -> Iterator[Row]:
    """Flickr8k.token.txt: NAME#NUMBER, a tab, the caption."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            name, _, caption = line.partition("\t")
            yield Row(f"line {number}", [name.rpartition("#")[0] or name], "", [caption])


# ---------------------------------------------------------------------------------------------------------
# JSON

def read_json_text(text: str):
    """A JSON value, or the list of those in its lines. Raises InputError, which names the line."""
    try:
        return json.loads(text)
    except ValueError as error:
        values = []
        for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
            if line.strip():
                try:
                    values.append(json.loads(line))
                except ValueError:
                    where = f"line {number}" if values else f"line {error.lineno}"
                    raise InputError(f"{where}: not valid JSON") from None
        return values


def json_rows(data) -> Iterator[Row]:
    """Rows of any of the JSON layouts."""
    if isinstance(data, dict) and "annotations" in data:
        yield from coco_rows(data)
        return
    entries = data
    if isinstance(data, dict):
        images = data.get("images")  # Karpathy's
        entries = images if images and isinstance(images[0], dict) and "sentences" in images[0] else [data]
    for number, entry in enumerate(entries, 1):
        place = f"entry {number}"
        if not isinstance(entry, dict):
            raise InputError(f"{place} is no object; what is read: {READ}")
        turns = entry.get("conversations") or entry.get("messages")
        if turns:
            yield from conversation_rows(place, entry, turns)
            continue
        images = strings(find(entry, "image"))
        if "filename" in entry and isinstance(entry.get("filepath"), str):  # Karpathy's of COCO
            images = [f"{entry['filepath']}/{entry['filename']}"]
        questions = strings(find(entry, "question"))
        split = entry.get("split")
        yield Row(place, images, questions[0] if questions else "", strings(find(entry, "caption")),
                  split if isinstance(split, str) else "")


def coco_rows(data: dict) -> Iterator[Row]:
    """COCO's: the pictures by number, then an annotation for each caption."""
    files = {image["id"]: image["file_name"] for image in data.get("images", [])}
    for number, note in enumerate(data["annotations"], 1):
        name = files.get(note.get("image_id"))
        yield Row(f"annotation {number}", strings(name), "", strings(find(note, "caption")))


def vqa_rows(one: dict, other: dict) -> Iterator[Row]:
    """VQAv2's questions and annotations, in either order: each of the ten answers is a caption."""
    questions, notes = (one, other) if "questions" in one else (other, one)
    asked = {entry["question_id"]: entry for entry in questions["questions"]}
    part = questions.get("data_subtype") or notes.get("data_subtype")
    for number, note in enumerate(notes["annotations"], 1):
        entry = asked.get(note["question_id"], {})
        image = f"COCO_{part}_{int(note['image_id']):012}.jpg"
        answers = strings(note.get("answers")) or strings(note.get("multiple_choice_answer"))
        yield Row(f"annotation {number}", [image] if entry else [], entry.get("question", ""), answers)


def conversation_rows(place: str, entry: dict, turns: list) -> Iterator[Row]:
    """A row for each answer of a conversation, with the question before it. What was said earlier isn't
    read."""
    images = strings(find(entry, "image"))
    question = ""
    answered = False
    for turn in turns:
        speaker = turn.get("from") or turn.get("role")
        text = turn.get("value", turn.get("content"))
        if isinstance(text, list):  # parts of text and pictures
            images += [part["image"] for part in text if isinstance(part.get("image"), str)]
            text = "\n".join(part["text"] for part in text if isinstance(part.get("text"), str))
        if speaker in ANSWERS:
            yield Row(place, images, question, strings(text))
            answered = True
        elif speaker in QUESTIONS and isinstance(text, str):
            question = text
    if not answered:
        yield Row(place, images, question, [])
