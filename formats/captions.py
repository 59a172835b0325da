"""Pictures with captions, as others keep them: caption files and tar shards."""
import copy
import csv
import glob
import hashlib
import io
import itertools
import json
import random
import re
import sys
import tarfile
import warnings
import zlib
from pathlib import Path

import torch
from PIL import Image, ImageOps

from formats.files import InputError, guard, whole


IMAGE = "<image>"  # where a picture stands in a text


def rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB, white behind what is transparent. 16- and 32-bit greys, which Pillow would clip
    at 255, are scaled instead. Raises InputError where the file, which Pillow reads no sooner, is broken."""
    with guard(getattr(picture, "filename", "") or "picture", "broken picture"):
        if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
            picture = picture.convert("F")
            top = picture.getextrema()[1]
            scale = 1 / 257 if top > 255 else 255 if top <= 1 else 1
            picture = picture.point(lambda v: v * scale).convert("L")
        elif "A" in picture.getbands() or picture.info.get("transparency") is not None:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


# What is taken for a picture: of Pillow's other formats some call programs (EPS), most hold no photographs
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def open_picture(path: "str | Path | Pair") -> Image.Image:
    """Reads a picture file ("-": standard input): upright as its EXIF says, in RGB. Raises InputError, also
    above `PIL.Image.MAX_IMAGE_PIXELS` (89 million)."""
    with guard(path, "broken picture"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of faults that Pillow reads past
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        inside = path.file if isinstance(path, Pair) else sys.stdin.buffer.read() if path == "-" else None
        try:
            picture = Image.open(path if inside is None else io.BytesIO(inside), formats=FORMATS)
        except FileNotFoundError:
            raise InputError(f"{path}: no such picture") from None
        except Image.UnidentifiedImageError:
            raise InputError(f"{path}: not a picture") from None
        with picture:
            return rgb(ImageOps.exif_transpose(picture))


def clean(caption: str) -> str:
    """One line of text, single spaces, without the ' .' that Flickr8k's tokenised captions end in, and
    without IMAGE: a caption is data and places no picture."""
    text = whole(caption).replace(IMAGE, " ")  # not nothing: what stood around it could make another
    return " ".join(text.split()).removesuffix(" .")


class Captions(torch.utils.data.Dataset):
    """Pictures on disk with one or more captions each. `file` is one of: Flickr8k-style CSV with the header
    `image,caption`; JSON lines with `image` and `caption` (a string or a list); COCO's captions_*.json;
    LLaVA's conversations (each answer is a caption, with the question before it; what was said earlier isn't
    read). Relative picture names are looked up in `images`, or beside the file. Raises InputError."""

    def __init__(self, file: str | Path, images: str | Path | None = None):
        self.file, folder = Path(file), Path(images or Path(file).parent)
        if images and not folder.is_dir():
            raise InputError(f"{folder}: no such folder of pictures")
        with guard(self.file, "not UTF-8 text"):
            text = self.file.read_text(encoding="utf-8-sig")
        found: dict[str, list[tuple[str, str]]] = {}
        with guard(self.file, "not a caption file that can be read"):
            for image, question, caption in read_pairs(text):
                caption = clean(caption) if isinstance(caption, str) else ""
                if isinstance(image, str) and image and any(map(str.isalnum, caption)):
                    found.setdefault(whole(image), []).append((clean(question), caption))
        if not found:
            raise InputError(f"{self.file}: no usable pair of picture and caption")
        self.paths, self.said = [folder / image for image in found], [*found.values()]

    def __len__(self) -> int:
        return len(self.paths)

    def picture(self, i: int) -> Image.Image:
        return open_picture(self.paths[i])

    def pairs(self, i: int) -> list[tuple[str, str]]:
        return self.said[i]

    def name(self, i: int) -> str:
        return str(self.paths[i])

    def stamp(self) -> str:
        """Differs from that of another set, and of this one after a picture in it was changed."""
        def file(path: "Path | Pair"):
            if isinstance(path, Pair):
                return path, zlib.crc32(path.file)
            stat = path.stat() if path.exists() else None
            return str(path.absolute()), stat and (stat.st_size, stat.st_mtime_ns)

        return hashlib.sha256(repr([*map(file, self.paths)]).encode()).hexdigest()

    def subset(self, indices: list[int]) -> "Captions":
        part = copy.copy(self)
        part.paths, part.said = ([of[i] for i in indices] for of in (self.paths, self.said))
        return part

    def held_out(self, size: int, seed: int, parts: int = 1) -> "tuple[Captions, Captions]":
        """Parts the set in two: the rest, and `size` pictures drawn from the seed, at most one in `parts`."""
        size = min(size, max(1, len(self) // parts))
        out = sorted(random.Random(f"{seed} held out").sample(range(len(self)), size))
        return self.subset(sorted({*range(len(self))} - {*out})), self.subset(out)


def read_pairs(text: str):
    """Yields (image, question, caption) from the text of any of the formats that `Captions` lists."""
    if text.lstrip()[:1] not in ("{", "["):
        rows = csv.DictReader(io.StringIO(text, newline=""))
        names = [name.strip() for name in rows.fieldnames or []]
        if names[:2] != ["image", "caption"]:
            raise ValueError("the first line must be 'image,caption'")
        rows.fieldnames = names
        for row in rows:
            # an unquoted comma splits a caption: what csv puts under None is the rest of it
            yield row["image"], "", ",".join([row["caption"] or "", *(row.get(None) or [])])
        return
    try:
        data = json.loads(text)
    except ValueError:
        data = [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(data, dict) and "annotations" in data:  # COCO
        files = {image["id"]: image["file_name"] for image in data["images"]}
        for note in data["annotations"]:
            yield files[note["image_id"]], "", note["caption"]
        return
    for item in data if isinstance(data, list) else [data]:
        if "conversations" in item:  # LLaVA; text-only conversations have no image
            question = ""
            for turn in item["conversations"]:
                if turn["from"] in ("gpt", "assistant"):
                    yield item.get("image"), question, turn["value"]
                else:
                    question = turn["value"]
        else:
            captions = item["caption"]
            for caption in captions if isinstance(captions, list) else [captions]:
                yield item["image"], "", caption


KINDS = ("jpg", "jpeg", "png", "webp")  # of pictures


class Pair(str):
    """One pair of a shard: its name, which carries its captions and the picture's file, or what is wrong."""

    def __new__(cls, name: str, captions: list[str] = (), file: bytes = b"", fault: str = "") -> "Pair":
        pair = super().__new__(cls, name)
        pair.captions, pair.file, pair.fault = captions, file, fault and f"{name}: {fault}"
        return pair


class StrictHeader(tarfile.TarInfo):
    """tarfile takes a broken header behind the first for the end of the archive: this one doesn't."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(str(error)) from None


def read_shard(path: Path):
    """Yields the pairs of a tar in WebDataset's layout, one at a time: members that stand together and are
    called the same up to the first dot, NAME.jpg (jpeg, png, webp) and NAME.txt, or NAME.json with "caption"
    (a string or a list). Nothing is extracted, and a member's name is but a label. What is broken, a pair or
    the rest of the shard, comes as a pair with a `fault`. A pair's name begins with the shard's, without its
    folder, so that a seed draws the same wherever the shards lie."""
    def members():
        try:
            mode = "r|gz" if path.suffix.endswith("gz") else "r|"  # one pass from front to end
            with tarfile.open(path, mode, tarinfo=StrictHeader) as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # tarfile would keep all it met
                    stem, kind = re.fullmatch(r"(?s)((?:.*/)?[^/.]*)\.?(.*)", member.name).groups()
                    if member.isfile() and kind.lower() in (*KINDS, "txt", "json"):
                        if member.size > 1 << 28:
                            raise tarfile.ReadError(f"{member.name} says that it has {member.size:,} bytes")
                        yield f"{path.name}/{stem}", kind.lower(), tar.extractfile(member).read()
        except Exception as error:  # whatever bytes from outside make tarfile raise
            yield str(path), "fault", f"broken shard ({error})"

    for name, group in itertools.groupby(members(), lambda member: member[0]):
        found = {kind: content for _, kind, content in group}
        file = next((found[kind] for kind in KINDS if kind in found), b"")
        try:
            said = json.loads(found["json"])["caption"] if "json" in found else found.get("txt", b"").decode()
            texts = map(clean, [said] if isinstance(said, str) else said)
            texts = [text for text in texts if any(map(str.isalnum, text))]
            fault = found.get("fault") or "no caption" * (not texts) or "no picture" * (not file)
        except Exception as error:  # whatever stands there
            texts, fault = [], f"its caption can't be read ({type(error).__name__}: {error})"
        yield Pair(name, texts, file, fault)


class Shards:
    """Pairs streamed from tar shards (see `read_shard`), in memory that doesn't depend on their number. The
    set's indices are the pairs themselves; its length is that of an epoch in this process, as far as known.
    `names`: files, patterns as "{000..099}" or "{a,b}", and globs, parted by commas. Raises InputError."""

    def __init__(self, names: str, buffer: int = 1000):
        self.buffer, self.size = buffer, 1000
        names = [name for part in listed(names) for name in braces(part)]
        self.paths = [Path(path) for name in names for path in (sorted(glob.glob(name)) or [name])]
        for path in self.paths:
            if not path.is_file():
                raise InputError(f"{path}: no such shard")

    def __len__(self) -> int:
        return self.size

    def name(self, pair: Pair) -> str:
        return pair

    def picture(self, pair: Pair) -> Image.Image:
        """Decodes the picture, and lets its file go."""
        if pair.fault:
            raise InputError(pair.fault)
        try:
            return open_picture(pair)
        finally:
            pair.file = b""

    def pairs(self, pair: Pair) -> list[tuple[str, str]]:
        return [("", caption) for caption in pair.captions]

    def held_out(self, size: int, seed: int, parts: int = 1) -> "tuple[Shards, Captions]":
        """The other shards, and the first `size` whole pairs of the first shard, kept in memory."""
        rest, out = copy.copy(self), Captions.__new__(Captions)
        rest.paths = self.paths[1:]
        out.paths = [*itertools.islice((pair for pair in read_shard(self.paths[0]) if not pair.fault), size)]
        out.said = [*map(self.pairs, out.paths)]
        if not out.paths:
            raise InputError(f"{self.paths[0]}: no usable pair of picture and caption")
        return rest, out

    def batches(self, batch: int, seed: int, step: int = 0, rank: int = 0, world: int = 1):
        """Yields endless batches (lists of pairs) from `step` on, a pure function of the arguments. In an
        epoch a shard is one process's; pairs are drawn from a buffer it runs through. Raises InputError."""
        if len(self.paths) < world:
            raise InputError(f"{len(self.paths)} shards are too few for {world} processes: cut them smaller")

        def pairs():
            for epoch in itertools.count():
                count, held, rng = 0, [], random.Random(f"{seed} {epoch}")
                order = rng.sample(self.paths, len(self.paths))[rank::world]
                for count, pair in enumerate(itertools.chain.from_iterable(map(read_shard, order)), 1):
                    held.append(pair)
                    if len(held) > self.buffer:
                        at = rng.randrange(len(held))
                        held[at], held[-1] = held[-1], held[at]
                        yield held.pop()
                    self.size = max(self.size, count)
                if not count:
                    raise InputError(f"{order[0]}: no pair of picture and caption, nor in the other shards")
                self.size = count
                rng.shuffle(held)
                yield from held

        source = itertools.islice(pairs(), step * batch, None)
        while True:
            yield [*itertools.islice(source, batch)]


def is_shards(names: str) -> bool:
    return re.search(r"\.(tar|tgz|tar\.gz)$", names) is not None


def listed(names: str) -> list[str]:
    """What commas separate; those within braces don't."""
    return re.split(r",(?![^{}]*\})", names)


def braces(text: str) -> list[str]:
    """What a shell makes of "{000..099}" and "{a,b}"."""
    if not (found := re.search(r"\{([^{}]*)\}", text)):
        return [text]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    values = ([str(i).zfill(len(numbers[1])) for i in range(int(numbers[1]), int(numbers[2]) + 1)] if numbers
              else found[1].split(","))
    return [whole for value in values for whole in braces(text[:found.start()] + value + text[found.end():])]


def caption_data(names: str, images: str | None = None, buffer: int = 1000) -> Captions | Shards:
    """The caption set that --data names: tar shards, or a file as for `Captions`. Raises InputError."""
    return Shards(names, buffer) if is_shards(names) else Captions(names, images)
