"""Tar shards in WebDataset's layout: more pairs than a list holds."""
import copy
import glob
import gzip
import hashlib
import itertools
import json
import random
import re
import tarfile
from pathlib import Path

from PIL import Image

from formats.captions import Captions, Conversation, Row, in_one_line, listed, one_turn, read_entry, usable
from formats.files import InputError, warn
from formats.pictures import open_picture

KINDS = ("jpg", "jpeg", "png", "webp")  # of pictures
TEXTS = ("txt", "json")

# Bounds, in bytes, on what a shard makes us read and keep; beyond them it is broken
MOST_PAIR = 1 << 28  # of a pair's members together
MOST_TEXT = 1 << 24  # of a member with text
MOST_HEADERS = 1 << 14  # of what stands between two members: tar headers, long names, pax records
MOST_UNPACKED = 100  # times its size, and MOST_PAIR more, that a compressed shard may unpack to
MOST_HELD = 1 << 30  # of pairs that wait in memory; beyond it fewer wait, and the shard is whole


class Pair(str):
    """One picture of a shard: its name, which carries what is said of it and the picture's file, or what is
    wrong with them. `size`: bytes of memory that it takes, roughly."""

    def __new__(cls, name: str, said: list[Conversation] = (), file: bytes = b"", fault: str = "") -> "Pair":
        pair = super().__new__(cls, name)
        pair.said = said
        pair.file = file
        pair.fault = fault and f"{name}: {fault}"
        texts = itertools.chain.from_iterable(said)
        pair.size = len(file) + sum(200 + 4 * (len(question) + len(answer)) for question, answer in texts)
        return pair


class Source:
    """A shard's bytes from front to end, unpacked, as tarfile reads them. Raises ReadError where it would
    read more than the bounds above: sizes in a tar are claims, and a few bytes unpack to many."""

    def __init__(self, path: Path):
        self.packed = path.suffix.endswith("gz")
        self.file = path.open("rb")
        self.stream = gzip.GzipFile(fileobj=self.file) if self.packed else self.file
        self.headers = 0  # bytes of headers since the last member

    def read(self, size: int) -> bytes:
        """Reads headers, for which alone tarfile calls it."""
        if not 0 <= size <= MOST_HEADERS - self.headers:
            raise tarfile.ReadError(f"headers of more than {MOST_HEADERS:,} bytes")
        self.headers += size
        return self.content(size)

    def content(self, size: int) -> bytes:
        content = self.stream.read(size)
        if self.tell() > MOST_PAIR + MOST_UNPACKED * self.file.tell():
            raise tarfile.ReadError(f"it unpacks to more than {MOST_UNPACKED} times its size")
        return content

    def tell(self) -> int:
        return self.stream.tell()

    def seek(self, position: int) -> None:
        if position < self.tell():  # a negative size, which would lead round in circles
            raise tarfile.ReadError("a member begins before the end of the last")
        if not self.packed:
            self.file.seek(position)
        while self.tell() < position and self.content(min(position - self.tell(), 1 << 16)):
            pass


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
    called the same up to the first dot, NAME.jpg (jpeg, png, webp) and NAME.txt, or NAME.json with what
    `read_entry` reads. Nothing is extracted, and a member's name is but a label. What is broken, a pair or
    the rest of the shard, comes as a pair with a `fault`; so does the rest of a shard beyond the bounds
    above. A pair's name begins with the shard's, without its folder, so that a seed draws the same wherever
    the shards lie."""
    def members():
        last, size = "", 0  # the pair that was met last, and its bytes
        try:
            source = Source(path)
            with source.file, tarfile.TarFile(fileobj=source, tarinfo=StrictHeader) as tar:
                while (member := tar.next()) is not None:
                    # tarfile would keep all it met
                    tar.members.clear()
                    tar.pax_headers.clear()
                    source.headers = 0
                    stem, kind = re.fullmatch(r"(?s)((?:.*/)?[^/.]*)\.?(.*)", member.name).groups()
                    kind = kind.lower()
                    if not member.isfile() or kind not in KINDS + TEXTS:
                        continue

                    # Read it, if it isn't too large
                    size = member.size + (size if stem == last else 0)
                    last = stem
                    if member.issparse():  # it may have any size, without a byte in the file
                        raise tarfile.ReadError(f"{member.name} is a sparse file")
                    if not 0 <= member.size <= (MOST_TEXT if kind in TEXTS else MOST_PAIR):
                        raise tarfile.ReadError(f"{member.name} says that it has {member.size:,} bytes")
                    if size > MOST_PAIR:
                        raise tarfile.ReadError(f"the members of {stem} say that they have {size:,} bytes")
                    content = source.content(member.size)
                    if len(content) < member.size:
                        raise tarfile.ReadError("unexpected end of data")
                    yield f"{path.name}/{stem}", kind, content
        except Exception as error:  # whatever bytes from outside make tarfile raise
            yield str(path), "fault", f"broken shard ({error})"

    for name, group in itertools.groupby(members(), lambda member: member[0]):
        members_of = {kind: content for _, kind, content in group}
        file = next((members_of[kind] for kind in KINDS if kind in members_of), b"")
        said = []
        try:
            said, fault = said_in(members_of)
            fault = members_of.get("fault") or fault or ("" if file else "without a picture")
        except Exception as error:  # whatever stands there
            fault = f"its caption can't be read ({type(error).__name__}: {error})"
        label = name.encode(errors="backslashreplace").decode()  # a tar's names are any bytes
        yield Pair(label, said, file, fault)


def said_in(members: dict[str, bytes]) -> tuple[list[Conversation], str]:
    """What is said of a picture in its .json or, where that can't be used, in its .txt; and why neither
    can."""
    question = ""
    try:
        row = read_entry("", json.loads(members.get("json", "{}")))._replace(images=[""])
        said, fault = usable(row)
        if row.conversations:
            question = row.conversations[0][0][0]
    except Exception as error:  # whatever stands there
        said, fault = [], f"its caption can't be read ({type(error).__name__}: {error})"
    if fault and "txt" in members:
        said, fault = usable(Row("", [""], one_turn(question, [members["txt"].decode("utf-8-sig")])))
    return said, fault


class Shards:
    """Pairs streamed from tar shards (see `read_shard`), in memory that doesn't depend on their number. The
    set's indices are the pairs themselves; its length is that of an epoch in this process, as far as known.
    `names`: files, patterns as "{000..099}" or "{a,b}", and globs, parted by commas. Raises InputError."""

    def __init__(self, names: str, buffer: int = 1000):
        self.keep_lines = False  # whether texts keep their lines
        self.buffer = buffer
        self.size = 1000
        names = [name for part in listed(names) for name in braces(part)]
        self.paths = [Path(path) for name in names for path in (sorted(glob.glob(name)) or [name])]
        for path in self.paths:
            if not path.is_file():
                raise InputError(f"{path}: no such shard")

    def __len__(self) -> int:
        return self.size

    @property
    def count(self) -> int:
        return self.size

    def name(self, pair: Pair) -> str:
        return pair

    def picture(self, pair: Pair) -> Image.Image:
        """Decodes the picture, and lets its file go."""
        if pair.fault:
            raise InputError(pair.fault)
        try:
            return open_picture(pair, pair.file)
        finally:
            pair.file = b""

    def pictures(self, pair: Pair) -> tuple[Pair]:
        return (pair,)

    def conversations(self, pair: Pair) -> list[Conversation]:
        return pair.said if self.keep_lines else in_one_line(pair.said)

    def contents(self) -> str:
        """A stamp of the shards' names: the same wherever they lie."""
        return hashlib.sha256(repr([path.name for path in self.paths]).encode()).hexdigest()[:32]

    def held_out(self, size: int, seed: int, parts: int = 1) -> "tuple[Shards, Captions]":
        """The other shards, and the first `size` whole pairs of the first shard: see `take`."""
        rest = copy.copy(self)
        rest.paths = self.paths[1:]
        first = copy.copy(self)
        first.paths = self.paths[:1]
        return rest, first.take(size)

    def take(self, size: int, seed: int = 0) -> Captions:
        """The first `size` whole pairs, kept in memory. Warns where these would take more than MOST_HELD:
        they are fewer. Raises InputError where there is none."""
        out = Captions.__new__(Captions)
        out.paths = []
        held = 0  # bytes
        pairs = itertools.chain.from_iterable(map(read_shard, self.paths))
        for pair in itertools.islice((pair for pair in pairs if not pair.fault), size):
            held += pair.size
            if held > MOST_HELD:
                warn(f"{self.paths[0]}: {len(out.paths)} pairs are read, no more: they would take more than "
                     f"{MOST_HELD / 1e9:.0f} GB of memory")
                break
            out.paths.append(pair)
        out.said = [pair.said for pair in out.paths]
        out.shown = [(p,) for p in range(len(out.paths))]
        out.file = str(self.paths[0])
        out.keep_lines = False
        if not out.paths:
            raise InputError(f"{self.paths[0]}: no usable pair of picture and caption")
        return out

    def batches(self, batch: int, seed: int, step: int = 0, rank: int = 0, world: int = 1):
        """Yields endless batches (lists of pairs) from `step` on, a pure function of the arguments. In an
        epoch a shard is one process's; pairs are drawn from a buffer it runs through, of `buffer` pairs or
        MOST_HELD bytes. Raises InputError."""
        if len(self.paths) < world:
            raise InputError(f"{len(self.paths)} shards are too few for {world} processes: cut them smaller")

        def pairs():
            for epoch in itertools.count():
                count, held, size = 0, [], 0  # bytes of what is held
                rng = random.Random(f"{seed} {epoch}")
                order = rng.sample(self.paths, len(self.paths))[rank::world]
                for count, pair in enumerate(itertools.chain.from_iterable(map(read_shard, order)), 1):
                    held.append(pair)
                    size += pair.size
                    while len(held) > self.buffer or size > MOST_HELD:
                        at = rng.randrange(len(held))
                        held[at], held[-1] = held[-1], held[at]
                        size -= held[-1].size
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


def braces(text: str) -> list[str]:
    """What a shell makes of "{000..099}" and "{a,b}"."""
    if not (found := re.search(r"\{([^{}]*)\}", text)):
        return [text]
    values = found[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        first, last = int(numbers[1]), int(numbers[2])
        step = 1 if first <= last else -1
        values = [str(i).zfill(len(numbers[1])) for i in range(first, last + step, step)]
    return [whole for value in values for whole in braces(text[:found.start()] + value + text[found.end():])]


def caption_data(names: str, images: str | None = None, buffer: int = 1000, split: str | None = None,
                 text_only: bool = False) -> Captions | Shards:
    """The caption set that --data names: tar shards, or a file as for `Captions`. Raises InputError."""
    if is_shards(names):
        if split:
            raise InputError(f"{names}: shards have no split '{split}': name those that are meant")
        return Shards(names, buffer)
    captions = Captions(names, images, split, text_only)
    captions.check_pictures()
    return captions
