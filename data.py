"""Pictures, captions, batches, and the built-in shapes world; and the layers that the models share.

Nothing here knows a model. A *caption set* is anything with `len(s)`, `s.name(i)`, `s.picture(i)` and
`s.pairs(i)`, which are (question, caption), "" for no question; i is a number below its length or, of
`Shards`, a `Pair`.
"""
import contextlib
import copy
import csv
import difflib
import functools
import gc
import glob
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

from formats.files import InputError, guard, named, whole, write_file


def nearest(word: str, known) -> str:
    """A question whether the one of `known` that is most like `word` was meant, if any is."""
    return "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(word, known, 1, 0.7))


def one_of(known, what: str, word: str) -> str:
    """`word`, if it is one of `known`. Raises InputError."""
    if word not in known:
        raise InputError(f"unknown {what} '{word}': choose from {', '.join(known)}{nearest(word, known)}")
    return word


def complain(error: Exception | str) -> None:
    """Tells the error in a line on stderr, on a terminal in colour unless NO_COLOR (no-color.org) is set."""
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and (
        "WT_SESSION" in os.environ if os.name == "nt" else os.environ.get("TERM") != "dumb")
    label = "\33[31merror:\33[0m" if colour else "error:"
    print(f"{Path(sys.argv[0]).name}: {label} {error}", file=sys.stderr)


def run(main: Callable[[], None], memory: str = "a smaller --batch") -> None:
    """Runs a command line's `main`, its output in UTF-8: an InputError is one line on stderr, exit code 2, as
    is a GPU's want of memory, for which `memory` names the remedies."""
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    if not gc.get_freeze_count():
        gc.freeze()  # to look for garbage in all that was imported takes longer than to load a small model
    try:
        try:
            main()
        finally:  # what is left of the output may find its reader gone
            sys.stdout.flush()
    except (InputError, RuntimeError) as error:
        if not isinstance(error, InputError) and not out_of_memory(error):
            raise
        complain(error if isinstance(error, InputError) else f"out of GPU memory: try {memory}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as in `sample.py … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether a GPU had no memory left: torch tells so in several ways, some of them the error behind one."""
    if error is None:
        return False
    said = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or (
        "_ALLOC_FAILED" in str(error))  # cuBLAS's and cuDNN's
    return said or out_of_memory(error.__cause__ or error.__context__)


def write_picture(path: Path, picture: Image.Image) -> None:
    write_file(path, lambda file: picture.save(file, "PNG"))


# ---------------------------------------------------------------------------------------------------------
# What the models share

# config.json's names for activations; quick_gelu is CLIP's sigmoid approximation
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu,
               "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}
gelu_tanh = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), gelu_tanh)


def probabilities(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """softmax(q kᵀ / √hd) (B,H,T,S) of what `attend` takes."""
    (B, H, T, size), (K, S) = q.shape, k.shape[1:3]
    scores = ((q * size ** -0.5).reshape(B, K, -1, size) @ k.transpose(-1, -2)).reshape(B, H, T, S)
    if causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:  # as a sum it leaves the backward pass nothing to keep
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None,
           causal: bool = False) -> torch.Tensor:
    """softmax(q kᵀ / √hd) v: q (B,H,T,hd); k and v (B,K,S,hd), each for H/K heads of q in turn (grouped-query
    attention: Ainslie et al., 2023, arXiv:2305.13245); mask true where a query sees a key, or added to the
    scores."""
    (B, H, T, size), (K, S) = q.shape, k.shape[1:3]
    if WATCHED is not None:
        with torch.autocast(q.device.type, enabled=False):
            WATCHED[:] = [probabilities(q.float(), k.float(), mask, causal).mean(1)]
    if T == 1:  # the heads that share keys read them as queries of one head: no copies where there is a cache
        return F.scaled_dot_product_attention(q.reshape(B, K, -1, size), k, v, mask).reshape(q.shape)
    if q.is_cpu and q.dtype == torch.bfloat16 and (
            torch.is_grad_enabled() or B * H * T * S < 1 << 28 and not AMX):
        # a CPU's fused kernel takes 4 to 8 times as long as these products in its backward pass and, without
        # AMX, 1.6 times forward
        return (probabilities(q, k, mask, causal).reshape(B, K, -1, S) @ v).reshape(q.shape)
    if H > K:
        k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


# Off until a GPU has measured it: cuDNN's kernel is reported to plan anew for each length of a text, which
# takes half a second, and to make NaN gradients with a mask
torch.backends.cuda.enable_cudnn_sdp(False)
AMX = torch.cpu._is_amx_tile_supported()
WATCHED: list | None = None  # where `attend` leaves its probabilities (B,T,S), if anyone watches


@contextlib.contextmanager
def watch(modules: list[torch.nn.Module]):
    """Collects what the queries of `modules`, which call `attend` once each time they run, pay to each key:
    {module: probabilities (B,T,S), mean over heads, of its last run}."""
    global WATCHED
    WATCHED, seen = [], {}
    hooks = [module.register_forward_hook(lambda module, *_: seen.update({module: WATCHED.pop()}))
             for module in modules]
    try:
        yield seen
    finally:
        WATCHED = None
        for hook in hooks:
            hook.remove()


class FeedForward(torch.nn.Module):
    """down(activation(up(x))); gated: down(activation(gate(x)) · up(x)) (Shazeer, 2020, arXiv:2002.05202)."""
    joined = ("gate", "up"),  # see `pack`

    def __init__(self, width: int, hidden: int, activation: str, bias: bool = True, gated: bool = False):
        super().__init__()
        self.gate = torch.nn.Linear(width, hidden, bias) if gated else None
        self.up, self.down = torch.nn.Linear(width, hidden, bias), torch.nn.Linear(hidden, width, bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…,width)
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        gate, up = project(x, self.gate, self.up)
        return self.down(self.activation(gate) * up)


class PackedLinear(torch.nn.Module):
    """nn.Linear layers that read the same x, as one for inference alone, computing in `dtype`. Its weight
    lies as oneDNN's kernels on a CPU read it; nn.Linear lays it out anew in every call, which takes as long
    as the product with one token."""
    then = "none", ""  # what follows in the same kernel, in oneDNN's words

    def __init__(self, layers: list[torch.nn.Linear], dtype: torch.dtype):
        super().__init__()
        weight = torch.cat([layer.weight.detach().to(dtype) for layer in layers])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        biases = [layer.bias.detach().to(dtype) for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.dtype, self.sizes = dtype, [len(layer.weight) for layer in layers]

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…,in) to (…,out)
        then, how = self.then
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, then, [], how)


def project(x: torch.Tensor, *layers: torch.nn.Module | None) -> list[torch.Tensor]:
    """What each of the layers makes of x (…,in). `pack` may have put all into the first: one product."""
    if layers[-1] is None:
        return layers[0](x).split(layers[0].sizes, -1)
    return [layer(x) for layer in layers]


def pack(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Packs the nn.Linear layers of a model on a CPU, which computes in `dtype`: to be called last, since no
    gradients pass, nothing is saved, and it can't be moved. Those that a part of it gives to `project`
    together it names in `joined`. Decoding takes half the time in bfloat16; the results are the same."""
    if not torch.backends.mkldnn.is_available() or not (
            dtype == torch.float32
            or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    for parent in list(module.modules()):
        children = [(name,) for name, _ in parent.named_children()]
        for names in (*getattr(parent, "joined", ()), *children):
            layers = [getattr(parent, name) for name in names]
            if all(type(layer) is torch.nn.Linear and layer.weight.is_cpu for layer in layers):
                setattr(parent, names[0], PackedLinear(layers, dtype))
                for name in names[1:]:
                    setattr(parent, name, None)
        if isinstance(parent, FeedForward) and parent.gate is None and parent.activation is gelu_tanh:
            if isinstance(parent.up, PackedLinear):  # alone the function takes a fifth of an encoder's time
                parent.up.then, parent.activation = ("gelu", "tanh"), torch.nn.Identity()


# ---------------------------------------------------------------------------------------------------------
# Pictures

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


# ---------------------------------------------------------------------------------------------------------
# Caption sets

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


# ---------------------------------------------------------------------------------------------------------
# Tar shards: more pairs than a list holds

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


def skip(bad: dict[int, str], found: dict[int, str], captions) -> None:
    """Counts unreadable pictures {index: reason} in `bad`. InputError above a tenth of the set."""
    bad.update(found)
    if len(bad) > len(captions) / 10:
        *_, last = bad.values()
        raise InputError(f"{len(bad)} of {len(captions)} pictures can't be read; the last: {last}")


def references(captions, i: int) -> list[str]:
    """What a caption of picture `i` is compared with: its captions that answer its first question."""
    pairs = captions.pairs(i)
    return [caption for question, caption in pairs if question == pairs[0][0]]


def draw_caption(captions, index: int, seed: int, epoch: int) -> tuple[str, str]:
    """The pair that picture `index` of a set shows in `epoch`: a pure function of its arguments."""
    return random.Random(f"{seed} {epoch} {index}").choice(captions.pairs(index))


# ---------------------------------------------------------------------------------------------------------
# Layouts: how a picture and its caption become a text with an answer

IMAGE = "<image>"  # where a picture stands in a text
LAYOUTS = ("image-text", "text-image-text", "text-image")


def layout_weights(mix: str) -> dict[str, float]:
    """Reads "image-text" or "image-text:3,text-image:2": how often each is drawn. Raises InputError."""
    weights = {}
    for entry in mix.split(","):
        name, _, weight = entry.partition(":")
        if not re.fullmatch(r"\d*\.?\d+", weight or "1") or not float(weight or 1):
            raise InputError(f"--layout {mix}: {entry!r} has no weight above 0 after its colon")
        weights[one_of(LAYOUTS, "layout", name)] = float(weight or 1)
    return weights


def draw_layout(weights: dict[str, float], seed: int, epoch: int, index: int) -> str:
    """The layout that picture `index` has in `epoch`."""
    return random.Random(f"{seed} {epoch} {index} layout").choices([*weights], weights.values())[0]


def arrange(layout: str, captions, index: int, seed: int, epoch: int,
            prompt_for: Callable[[str], str], others=None) -> tuple[str, str]:
    """The text, with IMAGE where picture `index` stands (before it all, if nowhere), and the answer to learn:
    a pure function of its arguments. image-text: `prompt_for(question)`; the caption. text-image-text: the
    caption up to a word that is drawn, the picture; the rest. text-image: a caption, half the time any
    picture's (of `others` or, unless given, of the whole set), the picture, "match?", which tells this layout
    from the last; "yes" or "no" (image-text matching as BLIP's: Li et al., 2022, arXiv:2201.12086, but by
    next token)."""
    question, caption = draw_caption(captions, index, seed, epoch)
    rng = random.Random(f"{seed} {epoch} {index} {layout}")
    if layout == "image-text":
        return prompt_for(question), caption
    if layout == "text-image-text":
        words = caption.split(" ")
        at = rng.randrange(len(words))
        return " ".join(words[:at]) + IMAGE, " ".join(words[at:])
    if rng.random() < 0.5:
        _, caption = rng.choice(captions.pairs(rng.choice(others or range(len(captions)))))
    own = [said for _, said in captions.pairs(index)]
    return f"{caption}{IMAGE} match?", "yes" if caption in own else "no"


def gap(text: str) -> str:
    """The space that parts a text from the words after it; none behind a picture."""
    last = text.split(IMAGE)[-1]
    return " " if last and not last[-1].isspace() else ""


def few_shot(examples: list[tuple[str, str]]) -> tuple[str, str]:
    """Joins (text, answer) pairs in one: the last comes after the others, which are solved, a line each."""
    *solved, (last, answer) = [(text if IMAGE in text else IMAGE + text, answer) for text, answer in examples]
    return "".join(f"{text}{gap(text)}{said}\n" for text, said in solved) + last, answer


def draw_shots(indices: list[int], at: int, most: int, seed: int, epoch: int) -> list[int]:
    """Places in a batch of pictures, at most `most`, whose pairs are shown solved before the one `at`: a pure
    function of its arguments. They are of the batch so that no more pictures need be read."""
    rng = random.Random(f"{seed} {epoch} {indices[at]} shots")
    others = [j for j, index in enumerate(indices) if index != indices[at]]
    return rng.sample(others, min(rng.randint(0, most), len(others)))


# ---------------------------------------------------------------------------------------------------------
# Batches

class Views(NamedTuple):
    """What is seen of P pictures, V views in all: `x`, their pixels (V,3,S,S) or features (V,N,Dv), one
    picture's after the other's; how many views each picture has; and what rows and columns of tiles are among
    them (0 and 0: it is seen as a whole alone)."""
    x: torch.Tensor
    counts: list[int]
    tiles: list[tuple[int, int]]

    def pick(self, order) -> "Views":
        """The views of these of the pictures."""
        views = self.x.split(self.counts)
        return Views(torch.cat([views[p] for p in order]), *([of[p] for p in order] for of in self[1:]))


class Pixels(torch.utils.data.Dataset):
    """The pictures of a caption set, preprocessed: item i is (i, what `preprocess.tiles` makes of it), or
    (i, the reason why it can't be read)."""

    def __init__(self, captions, preprocess, split: bool = False):
        self.captions, self.preprocess, self.split = captions, preprocess, split

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, i: int) -> tuple[int, tuple[torch.Tensor, int, int] | str]:
        try:
            picture = self.captions.picture(i)
            with named(self.captions.name(i)):
                return i, self.preprocess.tiles(picture, self.split)
        except InputError as error:
            return i, str(error)

    @staticmethod
    def collate(items: list) -> tuple[list[int], Views | None, dict[int, str]]:
        """Indices of the readable pictures, their pixels (None of none), and what's wrong with the others."""
        bad = {i: seen for i, seen in items if isinstance(seen, str)}
        good = [(i, *seen) for i, seen in items if i not in bad]
        if not good:
            return [], None, bad
        indices, pixels, rows, columns = map(list, zip(*good))
        return indices, Views(torch.cat(pixels), [*map(len, pixels)], [*zip(rows, columns)]), bad


def ignore_signals(worker: int) -> None:
    """In a process that reads pictures: Ctrl-C and SIGTERM, which reach it too, are the main one's affair."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def cut(sequence, size: int) -> list:
    """A sequence in pieces of `size`, the last of what is left."""
    return [sequence[i:i + size] for i in range(0, len(sequence), size)]


def shuffled(size: int, batch: int, seed: int, step: int = 0):
    """Yields endless batches (lists of indices below `size`) from `step` on: one shuffled epoch after the
    other, a pure function of the seed. Batch `step` begins in epoch `step * batch // size`."""
    epoch, done = divmod(step * batch, size)
    epochs = (random.Random(f"{seed} {e}").sample(range(size), size) for e in itertools.count(epoch))
    indices = itertools.islice(itertools.chain.from_iterable(epochs), done, None)
    while True:
        yield [*itertools.islice(indices, batch)]


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device: from memory that a GPU reads by itself, so that the CPU needn't wait for it."""
    if x.is_cpu and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class Batch(NamedTuple):
    """B texts to learn from, on the device."""
    tokens: torch.Tensor  # ids (B,T), padded on the right
    where: torch.Tensor  # (M,): places in the flattened ids whose next token is a target
    targets: torch.Tensor  # (M,): these targets
    pictures: int  # the most that one of the texts has


def stack(sequences: list[tuple[list[int], list[bool]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Joins sequences of (ids, which of them are targets) into a batch: ids (B,T), padded on the right; the
    places `where` (M,) in the flattened ids whose next token is a target; and these targets (M,). Nothing
    predicts the first id of a sequence, so that it is never a target."""
    tokens, wanted = (torch.nn.utils.rnn.pad_sequence([torch.tensor(x, dtype=kind) for x in rows], True)
                      for rows, kind in zip(zip(*sequences), (torch.long, torch.bool)))
    wanted[:, 0] = False
    places = wanted.flatten().nonzero()[:, 0]
    return tokens, places - 1, tokens.flatten()[places]


# ---------------------------------------------------------------------------------------------------------
# The shapes world: scenes whose truth is known, so that a caption can be judged

SIDE = 96  # pixels
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLOURS = {"red": (214, 40, 40), "orange": (247, 127, 0), "yellow": (250, 214, 40), "green": (40, 150, 60),
           "cyan": (50, 200, 215), "blue": (40, 80, 200), "purple": (120, 45, 160), "pink": (245, 130, 185)}
SIZES = {"large": (14.5, 17.0), "small": (7.5, 9.5)}  # radius, pixels
SIZE_WORDS = {"large": "large", "big": "large", "small": "small", "little": "small"}
RELATION_WORDS = {"to the left of": "left", "left of": "left", "to the right of": "right",
                  "right of": "right", "above": "above", "over": "above", "below": "below", "under": "below"}
# one colour of each shape that no training scene shows
UNSEEN = frozenset(zip(("green", "pink", "blue", "red", "cyan", "yellow"), SHAPES))


class Thing(NamedTuple):
    size: str
    colour: str
    shape: str
    x: float = 0.0  # centre and radius, pixels
    y: float = 0.0
    radius: float = 0.0


def relation(a: Thing, b: Thing) -> str:
    """Where a lies as seen from b: the longer of the two offsets decides (scenes keep them well apart)."""
    dx, dy = a.x - b.x, a.y - b.y
    return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")


class Scene(NamedTuple):
    """One to three things, all different, apart from each other, from left to right, on a background."""
    things: tuple[Thing, ...]
    seed: str

    @staticmethod
    def draw_from(seed: str, unseen: bool | None = False) -> "Scene":
        """A scene from a seed. `unseen`: False keeps UNSEEN pairs out, True puts one in, None is blind."""
        rng = random.Random(seed)
        count = rng.choices((1, 2, 3), (1, 2, 2))[0]
        while True:
            things: list[Thing] = []
            for _ in range(count):
                size = rng.choice(tuple(SIZES))
                radius = rng.uniform(*SIZES[size])
                x, y = (rng.uniform(radius + 2, SIDE - radius - 2) for _ in "xy")
                things.append(Thing(size, rng.choice(tuple(COLOURS)), rng.choice(SHAPES), x, y, radius))
            apart = all(a[:3] != b[:3] and math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 3
                        and abs(a.x - b.x) > 6 and abs(abs(a.x - b.x) - abs(a.y - b.y)) > 10
                        for a, b in itertools.combinations(things, 2))
            if apart and unseen in (None, any((t.colour, t.shape) in UNSEEN for t in things)):
                return Scene(tuple(sorted(things, key=lambda thing: thing.x)), seed)

    def picture(self) -> Image.Image:
        """The scene as a SIDE × SIDE RGB picture; edges are smooth, drawn at four times the size."""
        rng, scale = random.Random(self.seed + " picture"), 4
        image = background(rng).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        for thing in self.things:
            colour = tuple(byte(c + rng.randint(-14, 14)) for c in COLOURS[thing.colour])
            left, top = (int(centre - 1.5 * thing.radius) for centre in (thing.x, thing.y))
            x, y, r = (thing.x - left) * scale, (thing.y - top) * scale, thing.radius * scale
            mask = Image.new("L", (math.ceil(3 * thing.radius + 1) * scale,) * 2)
            draw = ImageDraw.Draw(mask)
            if thing.shape == "circle":
                draw.ellipse((x - r, y - r, x + r, y + r), 255)
            else:
                turn = rng.uniform(-0.15, 0.15)
                draw.polygon([(x + r * d * math.cos(a + turn), y + r * d * math.sin(a + turn))
                              for d, a in OUTLINES[thing.shape]], 255)
            image.paste(colour, (left, top), mask.reduce(scale))
        return image

    def captions(self) -> list[str]:
        """Four wordings; each names every thing from left to right and, of two or more, a relation."""
        rng = random.Random(self.seed + " captions")
        return [self.caption(rng, wording) for wording in range(4)]

    def caption(self, rng: random.Random, wording: int) -> str:
        def name(thing: Thing, article: str = "a") -> str:
            size = rng.choice([word for word, size in SIZE_WORDS.items() if size == thing.size])
            return f"{article} {size} {thing.colour} {thing.shape}"

        if len(self.things) == 1:
            return ("", "there is ", "one object: ", "a picture of ")[wording] + name(*self.things)
        a, b, *others = self.things
        where = rng.choice([word for word, r in RELATION_WORDS.items() if r == relation(a, b)])
        rest = "".join(f" and {name(c)}" for c in others)
        count = ("two", "three")[len(others)]
        return (f"{', '.join(map(name, self.things[:-1]))} and {name(self.things[-1])}; "
                f"{name(a, 'the')} is {where} {name(b, 'the')}",
                f"{name(a)} {where} {name(b)}{rest}",
                f"there is {name(a)} {where} {name(b)}{rest}",
                f"{count} objects: {name(a)} {where} {name(b)}{rest}")[wording]


def ring(corners: int, turn: float = -90, radii: tuple[float, ...] = (1.0,)) -> list[tuple[float, float]]:
    """A polygon's corners as (radius, angle), the radii taken in turn."""
    return [(radii[i % len(radii)], math.radians(turn + 360 / corners * i)) for i in range(corners)]


OUTLINES = {"square": ring(4, 45), "triangle": ring(3), "diamond": ring(4, -90, (1.1, 0.62)),
            "star": ring(10, -90, (1.05, 0.45)),
            "cross": [(math.hypot(x, y), math.atan2(y, x)) for x, y in
                      ((-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
                       (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3))]}


def byte(value: int) -> int:
    return max(0, min(255, value))


def background(rng: random.Random) -> Image.Image:
    """A muted plain, gradient, stripes, checks or blotches, as a small picture to be scaled up."""
    grey = rng.randint(30, 225)
    first = [byte(grey + rng.randint(-12, 12)) for _ in range(3)]
    second = [byte(c + rng.choice((-1, 1)) * rng.randint(8, 25)) for c in first]
    kind, n = rng.choice(("plain", "gradient", "stripes", "checks", "blotches")), rng.randint(4, 9)
    pattern = {"plain": lambda x, y: 0, "gradient": lambda x, y: (x + y) / (2 * n),
               "stripes": lambda x, y: y % 2, "checks": lambda x, y: (x + y) % 2,
               "blotches": lambda x, y: rng.random()}[kind]
    image = Image.new("RGB", (n, n))
    image.putdata([tuple(round(a + (b - a) * w) for a, b in zip(first, second))
                   for y in range(n) for x in range(n) for w in [pattern(x, y)]])
    return image


@functools.lru_cache(1 << 15)
def pairs_of(shapes: "Shapes", i: int) -> list[tuple[str, str]]:
    """The pairs of a scene. Drawing them takes an eighth of a millisecond, and each step asks twice."""
    return [("", caption) for caption in shapes.scene(i).captions()]


class Shapes(torch.utils.data.Dataset):
    """`size` scenes of one split: "train" and "test" without the UNSEEN pairs, "unseen" with at least one."""

    def __init__(self, size: int, split: str = "train", seed: int = 0):
        self.size, self.split, self.seed = size, split, seed

    def __len__(self) -> int:
        return self.size

    def scene(self, i: int) -> Scene:
        return Scene.draw_from(f"{self.split} {self.seed} {i}", unseen=self.split == "unseen")

    def name(self, i: int) -> str:
        return f"{self.split} scene {i} of seed {self.seed}"

    def picture(self, i: int) -> Image.Image:
        return self.scene(i).picture()

    def pairs(self, i: int) -> list[tuple[str, str]]:
        return pairs_of(self, i)

    def stamp(self) -> str:
        return f"{self.size} of {self.split} {self.seed}, drawn as {zlib.crc32(self.picture(0).tobytes())}"


THING = rf"(a|the) ({'|'.join(SIZE_WORDS)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b"
SKILLS = ("shape", "colour", "size", "count", "relation")


def judge(caption: str, scene: Scene) -> dict[str, bool]:
    """Parses a caption back and compares it with the truth: "exact", and each of SKILLS ("relation" only
    where there are two things or more). Exact: every thing named once and nothing else, any number right,
    and, of two things or more, at least one relation stated and all stated relations true."""
    truth = {thing[:3]: thing for thing in scene.things}
    said = [(SIZE_WORDS[size], colour, shape)
            for article, size, colour, shape in re.findall(THING, caption) if article == "a"]
    number = re.search(r"\b(one|two|three) objects?\b", caption)
    result = {skill: sorted(t[k] for t in said) == sorted(t[k] for t in truth)
              for k, skill in enumerate(("size", "colour", "shape"))}
    result["count"] = len(said) == len(truth) and (
        not number or number[1] == ("one", "two", "three")[len(truth) - 1])
    if len(truth) > 1:
        def thing(article, size, colour, shape):
            return truth.get((SIZE_WORDS[size], colour, shape))

        # looked for from every thing on, so that "a … and a … above a …" is read as it is meant
        found = re.findall(rf"(?={THING} (?:is )?({'|'.join(RELATION_WORDS)}) {THING})", caption)
        stated = [(thing(*groups[:4]), RELATION_WORDS[groups[4]], thing(*groups[5:])) for groups in found]
        result["relation"] = bool(stated) and all(
            a and b and a != b and relation(a, b) == where for a, where, b in stated)
    exact = sorted(said) == sorted(truth) and result["count"] and result.get("relation", True)
    return {"exact": exact, **result}
