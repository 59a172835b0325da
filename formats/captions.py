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
        "JSON of COCO, VQAv2, Karpathy and LLaVA; a picture is called "
        f"{', '.join(COLUMNS['image'])}, and a caption {', '.join(COLUMNS['caption'])}")
ANSWERS = ("gpt", "assistant", "model")  # who answers in a conversation
QUESTIONS = ("human", "user", "system")

# What is asked and answered in turns: (question, answer), "" for no question. A caption is one turn
Conversation = list[tuple[str, str]]


def listed(names: str) -> list[str]:
    """What commas separate, but not those within braces; a name of something that exists is one."""
    return [names] if os.path.exists(names) else re.split(r",(?![^{}]*\})", names)


def keep(text: str) -> str:
    """An answer with its lines, without IMAGE, which it can't show."""
    return whole(text).replace(IMAGE, " ").strip()  # not nothing: what stood around it could make another


def flat(text: str) -> str:
    """A text in one line, single spaces, without the ' .' that Flickr8k's tokenised captions end in."""
    return join_lines(keep(text))


def join_lines(kept: str) -> str:
    """As `flat`, of a text that `keep` has seen."""
    return (" " + " ".join(kept.split())).removesuffix(" .").lstrip()


def in_one_line(said: list[Conversation]) -> list[Conversation]:
    """Conversations that were kept, each text in one line. Each step of a training asks for some."""
    found = []
    for turns in said:
        found.append([(join_lines(question), join_lines(answer)) for question, answer in turns])
    return found


def keep_question(text: str) -> str:
    """A question with its lines, and with IMAGE where it shows a picture: nothing stands around the first."""
    text = whole(text).strip()
    first = re.match(rf"(?:{IMAGE}\s*)*", text)[0]
    return IMAGE * first.count(IMAGE) + text[len(first):]


class Row(NamedTuple):
    """A row of a caption file."""
    place: str  # such as "line 3" or "entry 2"
    images: list[str]
    conversations: list[Conversation]  # of which one is learned at a time, such as five captions
    split: str = ""
    fault: str = ""  # why it can't be used


def usable(row: Row, text_only: bool = False) -> tuple[list[Conversation], str]:
    """The conversations of a row as they are kept, and "", or why the row can't be used. Questions say IMAGE
    where a picture stands; those of a row that say none, or all at the head, or a single one at the end of
    the first, have their pictures first."""
    kept, shown = [], 0
    for turns in row.conversations:
        answered = []
        for question, answer in turns:
            question, answer = keep_question(question), keep(answer)
            if join_lines(answer):
                answered.append((question, answer))
            else:
                shown += question.count(IMAGE)
        if answered:
            kept.append(answered)
    asked = bool(kept) and bool(kept[0][0][0])
    if row.fault:
        return [], row.fault
    if not row.images and not (text_only and asked):
        return [], "without a picture"
    if not kept:
        return [], "without a caption"
    if shown:
        return [], "with a picture in a turn without an answer"

    # As many pictures as places for them
    for turns in kept:
        question, answer = turns[0]
        places = sum(question.count(IMAGE) for question, _ in turns)
        if places not in (0, len(row.images)):
            return [], f"whose number of {IMAGE}s is not that of its pictures"
        if question.startswith(IMAGE * max(1, places)):
            turns[0] = question[places * len(IMAGE):], answer
        elif places == 1 and question.endswith(IMAGE):  # as LLaVA has it, which learns it as if it came first
            turns[0] = question.removesuffix(IMAGE).rstrip(), answer
    return kept, ""


class Captions(torch.utils.data.Dataset):
    """Pictures with what is said of them, from a file as above, or VQAv2's two, parted by a comma.

    An entry of the set has the same pictures, one as a rule, in all of its conversations. Relative names of
    pictures are looked up in `images`, or beside the file. `split`: only the rows of that split. `text_only`:
    with the rows that have a question and no picture. Rows that can't be used are counted by reason, and told
    in a line. Raises InputError.
    """

    note = ""  # which part of its file it is

    def __init__(self, file: str | Path, images: str | Path | None = None, split: str | None = None,
                 text_only: bool = False):
        self.keep_lines = False  # whether texts keep their lines
        self.file = str(file)
        folder = Path(images or Path(listed(self.file)[0]).parent)
        if images and not folder.is_dir():
            raise InputError(f"{folder}: no such folder of pictures")
        rows = read_file(self.file)
        if split is not None:
            splits = {row.split for row in rows}
            if split not in splits:
                raise InputError(f"{self.file}: no row of split {split!r}: there are "
                                 f"{', '.join(sorted(splits - {''})) or 'no splits'}")
            rows = [row for row in rows if row.split == split or row.fault and not row.split]
        self.collect(rows, folder, text_only)

    @property
    def label(self) -> str:
        """What a line of progress calls it."""
        return Path(listed(self.file)[0]).name + self.note

    def make_absolute(self) -> None:
        """Gives pictures that are files a name that is the same in any working directory."""
        self.paths = [path if isinstance(path, str) else Path(os.path.abspath(path)) for path in self.paths]

    def check_pictures(self) -> None:
        """Raises InputError where none of the pictures is there, or none of a thousand throughout the set."""
        some = self.paths[::max(1, len(self.paths) // 1000)]
        if not any(map(os.path.exists, some)):
            raise InputError(f"{self.paths[0]}: no such picture, nor others of {self.file}: --images says "
                             "where they lie")

    def collect(self, rows: list[Row], folder: Path, text_only: bool) -> None:
        """Makes entries of rows: those with the same pictures are one. Tells how many are left out, and
        why."""
        self.shown: list[tuple[int, ...]] = []  # of each entry, its pictures' places in `paths`
        self.said: list[list[Conversation]] = []
        self.paths: list[Path] = []
        known: dict[str, int] = {}  # absolute path -> place in `paths`
        places: dict[str, int] = {}  # a row's name of a picture -> the same; a picture may have several
        entries: dict[tuple[int, ...], int] = {}
        left_out: dict[str, list[str]] = {}  # reason -> places
        for row in rows:
            conversations, fault = usable(row, text_only)
            if fault:
                left_out.setdefault(fault, []).append(row.place)
                continue
            for image in row.images:
                if image not in places:
                    path = folder / whole(image)
                    places[image] = known.setdefault(os.path.abspath(path), len(self.paths))
                    if places[image] == len(self.paths):
                        self.paths.append(path)
            shown = tuple(places[image] for image in row.images)
            at = entries.setdefault(shown, len(self.said)) if shown else len(self.said)
            if at == len(self.said):
                self.shown.append(shown)
                self.said.append([])
            self.said[at] += conversations
        if not self.paths and text_only:  # then to be without a picture is a fault
            return self.collect(rows, folder, False)

        reasons = [f"{len(places)} {reason} (first: {places[0]})" for reason, places in left_out.items()]
        if not self.paths:
            raise InputError(f"{self.file}: no usable pair of picture and caption"
                             + (f": {', '.join(reasons)}" if reasons else "") + f"; what is read: {READ}")
        if left_out:
            count = sum(map(len, left_out.values()))
            warn(f"{self.file}: {count} of {len(rows)} rows left out: {', '.join(reasons)}")

    def __len__(self) -> int:
        return len(self.said)

    @property
    def count(self) -> int:
        """How many pictures there are."""
        return len(self.paths)

    def pictures(self, i: int) -> tuple[int, ...]:
        """The pictures of entry i, none of a text alone."""
        return self.shown[i]

    def conversations(self, i: int) -> list[Conversation]:
        """What is said of entry i, of which one is learned at a time."""
        return self.said[i] if self.keep_lines else in_one_line(self.said[i])

    def picture(self, p: int) -> Image.Image:
        path = self.paths[p]
        return open_picture(path, getattr(path, "file", None))  # of a shard's pair it is in memory

    def name(self, p: int) -> str:
        return str(self.paths[p])

    def contents(self) -> str:
        """A stamp of which pictures, by name, have which captions: the same wherever the files lie."""
        entries = []
        for shown, conversations in zip(self.shown, self.said):
            entries.append(([Path(self.paths[p]).name for p in shown], conversations))
        return hashlib.sha256(repr(entries).encode()).hexdigest()[:32]

    def stamp(self) -> str:
        """Differs from that of another set, and of this one after a picture in it was changed."""
        files = []
        for path in self.paths:
            if content := getattr(path, "file", None):
                files.append((str(path), zlib.crc32(content)))
            else:
                stat = path.stat() if os.path.exists(path) else None
                files.append((str(path.absolute()), stat and (stat.st_size, stat.st_mtime_ns)))
        return hashlib.sha256(repr(files).encode()).hexdigest()

    def subset(self, indices: list[int]) -> "Captions":
        """These entries, with their pictures alone."""
        part = copy.copy(self)
        used = sorted({p for i in indices for p in self.shown[i]})
        place = {p: at for at, p in enumerate(used)}
        part.paths = [self.paths[p] for p in used]
        part.shown = [tuple(place[p] for p in self.shown[i]) for i in indices]
        part.said = [self.said[i] for i in indices]
        return part

    def by_question(self) -> "Captions":
        """The same set with an entry for each question that comes after a picture: to score all of them. In a
        conversation it is asked after the turns before it, which are answered."""
        part = copy.copy(self)
        part.shown, part.said = [], []
        for shown, conversations in zip(self.shown, self.said):
            asked: dict[tuple, list[Conversation]] = {}
            for turns in conversations:
                places = [question.count(IMAGE) for question, _ in turns]
                for n, (question, _) in enumerate(turns):
                    # Pictures that a later question shows aren't seen yet
                    seen = shown[:sum(places[:n + 1])] if any(places) else shown
                    if seen:
                        asked.setdefault((seen, *turns[:n], question), []).append(turns[:n + 1])
            part.shown += [seen for seen, *_ in asked]
            part.said += asked.values()
        return part

    def take(self, size: int, seed: int) -> "Captions":
        """At most `size` entries with pictures, drawn from the seed."""
        return self.held_out(size, seed)[1]

    def held_out(self, size: int, seed: int, parts: int = 1) -> "tuple[Captions, Captions]":
        """Parts the set in two: the rest, and `size` entries drawn from the seed, at most one in `parts`.
        Those without a picture stay in the rest."""
        seen = [i for i, shown in enumerate(self.shown) if shown]
        size = min(size, max(1, len(seen) // parts))
        out = set(random.Random(f"{seed} held out").sample(seen, size))
        rest = [i for i in range(len(self)) if i not in out]
        return self.subset(rest), self.subset(sorted(out))


# ---------------------------------------------------------------------------------------------------------
# Files to rows

def read_file(file: str) -> list[Row]:
    """The rows of a caption file, or of VQAv2's two. Raises InputError."""
    texts = []
    for path in map(Path, listed(file)):
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


def one_turn(question: str, answers: list[str]) -> list[Conversation]:
    """Conversations of one turn, one for each answer to the same question."""
    return [[(question, answer)] for answer in answers]


def strings(value) -> list[str]:
    """A string, a list of strings or of objects that hold one, as a list of strings."""
    found = []
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, dict):
            names = ("raw", "answer", "text", "path", "url")
            entry = next((entry[name] for name in names if entry.get(name)), None)
        if isinstance(entry, bool):
            entry = "yes" if entry else "no"
        if isinstance(entry, (str, int, float)):
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
    head = next((i for i, line in enumerate(lines) if line.strip()), 0)
    for delimiter in ",\t;|":
        header = quoted(lines[head], delimiter) or lines[head].split(delimiter)
        header = [name.strip().strip('"').lower() for name in header]
        at = {what: columns_of(what, header) for what in COLUMNS}
        if at["image"] and at["caption"]:
            break
    else:
        raise InputError(f"line {head + 1} names no picture and caption, but {lines[head][:80]!r}; what is "
                         f"read: {READ}")

    # A caption in the last column may hold the delimiter. Elsewhere none can tell which column it is in
    width = len(header)
    for number, fields in records(lines, head + 1, delimiter, width):
        fault = ""
        if len(fields) > width and at["caption"] == [width - 1]:
            fields[width - 1:] = [delimiter.join(fields[width - 1:])]
        elif len(fields) > width:
            fault = f"with more fields than line {head + 1} names"
        found = {}
        for what, columns in at.items():
            found[what] = [fields[i].strip() for i in columns if i < len(fields) and fields[i].strip()]
        question = "".join(found["question"][:1])
        split = "" if fault else "".join(found["split"][:1])
        yield Row(f"line {number}", found["image"][:1], one_turn(question, found["caption"]), split, fault)


def columns_of(what: str, header: list[str]) -> list[int]:
    """Which columns have the first of the names for `what` that the header has: several captions may."""
    for name in COLUMNS[what]:
        if name in header:
            return [i for i, other in enumerate(header) if other == name]
    return []


def records(lines: list[str], first: int, delimiter: str, width: int) -> Iterator[tuple[int, list[str]]]:
    """Yields the number of the line and the fields of each record from line `first` on. A field in quotes may
    go over several lines. A quote that is never closed, or closed in mid-field, is a letter like any other:
    it doesn't take in the lines that follow."""
    at = first
    while at < len(lines):
        line, taken = lines[at], 1
        fields = quoted(line, delimiter, width)
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
        fields = quoted("\n".join(lines[:taken]), delimiter, width)
        if fields is not None and len(fields) == width:
            return fields, taken
    return None, 1


def quoted(text: str, delimiter: str, width: int = 0) -> list[str] | None:
    """The fields of one record as the CSV rules have it; None where its quotes break them. Spaces before a
    quote don't count where there are `width` fields then."""
    found = None
    for spaces in (False, True):
        try:
            fields = next(csv.reader([text], delimiter=delimiter, skipinitialspace=spaces, strict=True))
        except (csv.Error, StopIteration):
            continue
        if not spaces or len(fields) == width:
            found = fields
    return found


def flickr_rows(lines: list[str]) -> Iterator[Row]:
    """Flickr8k.token.txt: NAME#NUMBER, a tab, the caption."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            name, _, caption = line.partition("\t")
            yield Row(f"line {number}", [name.rpartition("#")[0] or name], one_turn("", [caption]))


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
        if not isinstance(entry, dict):
            raise InputError(f"entry {number} is no object; what is read: {READ}")
        yield read_entry(f"entry {number}", entry)


def read_entry(place: str, entry: dict) -> Row:
    """The row that a JSON object tells of: pictures, with captions, a question and its answers, or a
    conversation."""
    images = strings(find(entry, "image"))
    if "filename" in entry and isinstance(entry.get("filepath"), str):  # Karpathy's of COCO
        images = [f"{entry['filepath']}/{entry['filename']}"]
    split = entry.get("split")
    split = split if isinstance(split, str) else ""
    if turns := entry.get("conversations") or entry.get("messages"):
        return conversation_row(place, images, turns, split)
    questions = strings(find(entry, "question"))
    answers = strings(find(entry, "caption")) or [""]
    return Row(place, images, one_turn(questions[0] if questions else "", answers), split)


def coco_rows(data: dict) -> Iterator[Row]:
    """COCO's: the pictures by number, then an annotation for each caption."""
    files = {str(image["id"]): image["file_name"] for image in data.get("images", [])}
    for number, note in enumerate(data["annotations"], 1):
        name = files.get(str(note.get("image_id")))
        question = "".join(strings(find(note, "question"))[:1])
        yield Row(f"annotation {number}", strings(name), one_turn(question, strings(find(note, "caption"))))


def vqa_rows(one: dict, other: dict) -> Iterator[Row]:
    """VQAv2's questions and annotations, in either order: each of the ten answers is a caption."""
    questions, notes = (one, other) if "questions" in one else (other, one)
    asked = {entry["question_id"]: entry for entry in questions["questions"]}
    part = questions.get("data_subtype") or notes.get("data_subtype")
    for number, note in enumerate(notes["annotations"], 1):
        entry = asked.get(note["question_id"], {})
        image = f"COCO_{part}_{int(note['image_id']):012}.jpg"
        answers = strings(note.get("answers")) or strings(note.get("multiple_choice_answer"))
        yield Row(f"annotation {number}", [image] if entry else [],
                  one_turn(entry.get("question", ""), answers))


def conversation_row(place: str, images: list[str], turns: list, split: str) -> Row:
    """A conversation, as one row. What is said in several turns of one speaker, or of a system before the
    first question, is joined."""
    found, asked, named_there = [], [], []
    for turn in turns:
        speaker = turn.get("from") or turn.get("role")
        text = turn.get("value", turn.get("content"))
        if isinstance(text, list):
            text, named_in_parts = joined_parts(text)
            named_there += named_in_parts
        text = text if isinstance(text, str) else ""
        if speaker in QUESTIONS:
            asked.append(text)
        elif speaker not in ANSWERS:
            return Row(place, images, [], split, f"with turns of {speaker!r}")
        elif asked or not found:
            found.append(("\n".join(asked), text))
            asked = []
        else:
            question, said = found[-1]
            found[-1] = question, f"{said}\n{text}"
    return Row(place, named_there or images, [found], split)


def joined_parts(parts: list[dict]) -> tuple[str, list[str]]:
    """The text of a turn that comes in parts, IMAGE where one shows a picture; and the pictures they name."""
    text, images = "", []
    for part in parts:
        if isinstance(said := part.get("text"), str):
            text += "\n" + said if text and not text.endswith(IMAGE) else said
        else:
            text += IMAGE
            images += strings(part.get("image_url") or find(part, "image"))
    return text, images
