"""From pictures and captions to what the model reads: layouts, the processor, batches, kept features.

A *caption set* is anything with `len(s)`, `s.name(i)`, `s.picture(i)` and `s.pairs(i)`, which are (question,
caption), "" for no question. i is a number below its length or, in `Shards`, a `Pair`; `s.label` is what
progress calls the set, which `Shards` needn't have. There are three kinds: `Captions` in formats/captions.py,
`Shards` in formats/shards.py and `Shapes`, the built-in world, in support/shapes.py.
"""
import collections
import hashlib
import itertools
import random
import re
import signal
import time
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from formats.captions import IMAGE
from formats.files import InputError, compare, guard, named, read_tensors, write_file, write_rows
from formats.tokenizer import Tokenizer
from formats.vlms import Format
from support.console import one_of
from support.journal import counted
from support.machine import free_memory, send
from support.processes import LOCAL, RANK, WORLD, total, united

# ---------------------------------------------------------------------------------------------------------
# Layouts: how a picture and its caption become a text with an answer

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
    rng = random.Random(f"{seed} {epoch} {index} layout")
    return rng.choices(list(weights), weights.values())[0]


def draw_caption(captions, index: int, seed: int, epoch: int) -> tuple[str, str]:
    """The (question, caption) that picture `index` of a set shows in `epoch`: a pure function of its
    arguments."""
    return random.Random(f"{seed} {epoch} {index}").choice(captions.pairs(index))


def arrange(layout: str, captions, index: int, seed: int, epoch: int,
            prompt_for: Callable[[str], str], others: list | None = None) -> tuple[str, str]:
    """Returns a text, with IMAGE where picture `index` stands (before it all, if nowhere), and the answer to
    learn: a pure function of its arguments.

    image-text: `prompt_for(question)`; the caption.
    text-image-text: the caption up to a word that is drawn, then the picture; the rest of the caption.
    text-image: a caption, half the time that of any picture (of `others` or, by default, of the whole set),
        the picture, and "match?", which tells this layout from the last; "yes" or "no". It is the image-text
        matching of BLIP (Li et al., 2022, arXiv:2201.12086), but by next token.
    """
    # Every draw has a generator of its own: a resumed run draws what an unbroken one draws
    question, caption = draw_caption(captions, index, seed, epoch)
    rng = random.Random(f"{seed} {epoch} {index} {layout}")
    if layout == "image-text":
        return prompt_for(question), caption
    if layout == "text-image-text":
        words = caption.split(" ")
        at = rng.randrange(len(words))
        return " ".join(words[:at]) + IMAGE, " ".join(words[at:])

    # text-image: half the time another picture's caption, which may be right all the same
    if rng.random() < 0.5:
        other = rng.choice(others or range(len(captions)))
        _, caption = rng.choice(captions.pairs(other))
    own = [said for _, said in captions.pairs(index)]
    return f"{caption}{IMAGE} match?", "yes" if caption in own else "no"


def gap(text: str) -> str:
    """The space between a text and the words after it; none behind a picture."""
    last = text.split(IMAGE)[-1]
    return " " if last and not last[-1].isspace() else ""


def few_shot(examples: list[tuple[str, str]]) -> tuple[str, str]:
    """Joins (text, answer) pairs in one: the last comes after the others, which are solved, a line each."""
    examples = [(text if IMAGE in text else IMAGE + text, answer) for text, answer in examples]
    last, answer = examples.pop()
    solved = [f"{text}{gap(text)}{said}\n" for text, said in examples]
    return "".join(solved) + last, answer


def draw_shots(indices: list[int], at: int, most: int, seed: int, epoch: int) -> list[int]:
    """Places in a batch of pictures, at most `most`, whose pairs are shown solved before the one `at`: a pure
    function of its arguments. They are of the batch, so that no more pictures need be read."""
    rng = random.Random(f"{seed} {epoch} {indices[at]} shots")
    others = [j for j, index in enumerate(indices) if index != indices[at]]
    return rng.sample(others, min(rng.randint(0, most), len(others)))


# ---------------------------------------------------------------------------------------------------------
# The processor: text and pictures to ids, targets and pixels

BEGIN, END = "<image begin>", "<image end>"
OURS = Format(lambda images, text: IMAGE * images + text,
              lambda queries, rows, columns: BEGIN + IMAGE * queries + END, question="")
WHOLE = itertools.repeat((0, 0))  # rows and columns of tiles, of pictures that are seen as a whole


class Spelling(NamedTuple):
    """Targets of the --spell loss: a picture's i-th embedding should predict its caption's i-th token."""
    positions: torch.Tensor  # (K,), among the embeddings of all pictures
    targets: torch.Tensor  # (K,): ids


class Batch(NamedTuple):
    """B texts to learn from."""
    tokens: torch.Tensor  # ids (B,T), padded on the right
    target_positions: torch.Tensor  # (M,): where, in the flattened ids, the next token is a target
    targets: torch.Tensor  # (M,): these targets
    most_images: int  # of one text
    spelling: Spelling | None = None

    def to(self, device: torch.device) -> "Batch":
        tensors = [send(x, device) for x in self[:3]]
        spelling = self.spelling and Spelling(*(send(x, device) for x in self.spelling))
        return Batch(*tensors, self.most_images, spelling)


class Processor:
    """Turns text and pictures into what a VLM reads, and its answer into text.

    In the ids, `placeholder` stands for each embedding of an image. The vocabulary of a run of ours grows by
    three ids that neither the LLM nor the tokenizer has: `marker` and the next one, learned embeddings that
    begin and end an image, and the placeholder. Public VLMs have these, if any, in their vocabulary.

    llm: the LLM's config. preprocess: makes the pixels. queries: embeddings of an image among the ids, 0 for
    an adapter that is read between the LLM's blocks. config: that of a run, see `adapters.VLM`.
    """

    def __init__(self, tokenizer: Tokenizer, llm, preprocess, queries: int, config: dict,
                 format: Format = OURS):
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.queries = queries
        self.config = config
        self.format = format
        self.split = config.get("split", True)  # whether pictures are seen in tiles too, if the family does
        self.vocabulary = llm.vocabulary
        self.positions = llm.max_positions
        self.keeps_lines = format is not OURS  # of questions and answers: in a run of ours a newline ends one
        self.cut = 0  # how many texts didn't fit, and lost their first words

        # Ids of ours: a tokenizer may have tokens for which the LLM has no embedding, so that they come
        # behind
        ids = set(tokenizer.bytes)
        self.marker = max(self.vocabulary, max(ids, default=-1) + 1)
        self.placeholder = config.get("placeholder", self.marker + 2)
        self.no_embedding = {id for id in ids if id >= self.vocabulary} - {self.placeholder}
        tokenizer.add(IMAGE, self.placeholder)

        # What begins a text, and what ends an answer. End tokens say nothing themselves
        self.start = tokenizer.prefix
        self.end_tokens = llm.end_tokens
        if format.end and not self.end_tokens:
            self.end_tokens = (tokenizer.special[format.end],)
        self.ends = self.end_tokens
        if format is OURS:  # a token with a newline ends a caption too
            self.start = [] if llm.start_token is None else [llm.start_token]
            self.ends += tuple(i for i, token in tokenizer.bytes.items() if b"\n" in token)
            tokenizer.add(BEGIN, self.marker, special=True)
            tokenizer.add(END, self.marker + 1, special=True)

    def prompt_for(self, question: str) -> str:
        """What is asked of a picture: the `question` of its caption set or, without one, the run's prompt."""
        return question or self.config.get("prompt", "")

    def image_tokens(self, rows: int = 0, columns: int = 0) -> list[int]:
        """Ids of a picture of so many tiles; 0 and 0: one that is seen as a whole."""
        return self.tokenizer.encode(self.format.image(self.queries, rows, columns))

    def encode(self, text: str, caption: str | None = None, max_tokens: int = 128, images: int = 1,
               tiles: Iterator[tuple[int, int]] = WHOLE, raw: bool = False,
               prefix: bool = False) -> tuple[list[int], list[bool]]:
        """Returns one example's ids, and which of them are targets: start token, `text` in the model's
        format, caption, end. `<image>` marks a picture's place; without one, `images` pictures come first.

        The caption has at most `max_tokens`. Its end is a newline in a run of ours (it may be one token with
        the sign before it); in a public VLM, or where the vocabulary has no newline, the end token. Targets
        are the caption's ids, with `prefix` those of the text's words too. `tiles` yields rows and columns of
        each picture. Text is data: a special token that it spells is read as plain text. With `raw` it is the
        whole prompt: special tokens are read, and there is no format. Raises InputError where a token has no
        embedding.
        """
        # The prompt in the model's format, then the caption
        head, text, tail = self.fill_format(text, images, raw)
        sizes = [next(tiles) for _ in range((head + text + tail).count(IMAGE))]
        target = [] if caption is None else self.caption_ids(head + text + tail, caption, max_tokens)
        ids = self.prompt_ids(head, text, tail, sizes, raw)

        # A text that is too long loses its first words, unless pictures stand among them
        answer = min(max_tokens, self.positions // 4) if caption is None else len(target)
        whole = text
        while text and IMAGE not in text and (over := len(ids) + answer - self.positions) > 0:
            text = text[over:].partition(" ")[2]
            ids = self.prompt_ids(head, text, tail, sizes, raw)
        self.cut += text != whole

        # An extended tokenizer may have tokens that the LLM doesn't know
        for id in self.no_embedding.intersection(ids + target):
            token = self.tokenizer.bytes[id].decode(errors="replace")
            raise InputError(f"token {token!r} ({id}) has no embedding: the tokenizer was extended, the "
                             f"language model wasn't (it has {self.vocabulary})")
        words = [prefix and id < self.vocabulary and id != self.placeholder for id in ids]
        return ids + target, words + [True] * len(target)

    def fill_format(self, text: str, images: int, raw: bool) -> tuple[str, str, str]:
        """What the model's format puts before a text, the text, and what it puts behind; see `encode`."""
        format = OURS if raw else self.format
        if IMAGE in text:
            images = re.match(f"(?:{IMAGE})*", text).end() // len(IMAGE)
            text = text[images * len(IMAGE):]
        text = text or format.question
        head, _, tail = format.chat(images, "\0" if text else "").partition("\0")
        return head, text, tail

    def prompt_ids(self, head: str, text: str, tail: str, sizes: list[tuple[int, int]],
                   raw: bool) -> list[int]:
        """The ids before the caption, with rows and columns of each picture; see `encode`."""
        # What the format spells may be special tokens, what the text spells is plain
        prompt = head + text + tail
        plain = range(0) if raw else range(len(head), len(head + text))
        ids = self.tokenizer.encode(prompt, plain=plain)
        if ids.count(self.placeholder) != prompt.count(IMAGE):
            raise InputError(f"token {self.placeholder} stands for a picture, and for a word of the prompt "
                             "too")

        # The start token comes first, in some families behind the pictures at the head
        first = 0
        if self.format.images_first:
            while first < len(ids) and ids[first] == self.placeholder:
                first += 1
        ids = ids[:first] + self.start + ids[first:]

        # Each picture takes as many ids as it has embeddings
        found, tiles = [], iter(sizes)
        for id in ids:
            found += self.image_tokens(*next(tiles)) if id == self.placeholder else [id]
        return found

    def caption_ids(self, prompt: str, caption: str, max_tokens: int) -> list[int]:
        """The ids of a caption behind a `prompt`, and of its end; see `encode`."""
        space = "" if self.tokenizer.strip else gap(prompt)  # SentencePiece's kind puts it itself
        newline = "\n" if self.format is OURS else ""
        ids = self.tokenizer.encode(space + caption.replace(IMAGE, " ") + newline, special=False)
        if len(ids) > max_tokens:
            return ids[:max_tokens]
        ended = newline and ids and ids[-1] in self.ends
        return ids if ended else ids + list(self.end_tokens[:1])

    def batch(self, examples: list[tuple[str, str]], max_tokens: int = 128,
              tiles: Iterator[tuple[int, int]] = WHOLE, prefix: bool = False,
              spelled: list[str] | None = None, queries: int = 0) -> Batch:
        """(text, answer) pairs, with pictures of these `tiles`, to a Batch on the CPU: see `encode`.
        `spelled`: the captions, one a picture, that its `queries` embeddings should spell."""
        rows = [self.encode(*pair, max_tokens, tiles=tiles, prefix=prefix) for pair in examples]
        most = max(ids.count(self.marker) for ids, _ in rows)
        spelling = None if spelled is None else self.spelling(spelled, queries)
        return Batch(*stack(rows), most, spelling)

    def spelling(self, captions: list[str], queries: int) -> Spelling:
        """Targets of the --spell loss, for pictures of `queries` embeddings each."""
        # The i-th picture's embeddings stand at i · queries and behind
        positions, targets = [], []
        for i, caption in enumerate(captions):
            ids = self.tokenizer.encode(caption, special=False)[:queries]
            positions += range(i * queries, i * queries + len(ids))
            targets += ids
        return Spelling(torch.tensor(positions, dtype=torch.long), torch.tensor(targets, dtype=torch.long))

    def ask(self, pictures: list, prompt: str | None = None, raw: bool = False,
            split: bool | None = None) -> tuple[list[list[int]], torch.Tensor | None]:
        """Ids of a prompt for each entry of `pictures`, and the pixels (V,3,S,S) of all views (None if V is
        0).

        An entry is a PIL.Image, or a list of any number of them, as many as `prompt` (by default the run's
        own) says `<image>`, or, where it says none, all before it. raw: see `encode`. split: in tiles, where
        the family does so (by default as the run was trained). Raises InputError.
        """
        prompt = self.prompt_for("") if prompt is None else prompt
        split = self.split if split is None else split
        groups = [entry if isinstance(entry, (list, tuple)) else [entry] for entry in pictures]
        if IMAGE in prompt:
            wanted = prompt.count(IMAGE)
            if any(len(group) != wanted for group in groups):
                raise InputError(f"the prompt has room for {wanted} pictures, not {max(map(len, groups))}")

        # Each entry: its views, and a prompt with as many image tokens as they take
        rows, pixels = [], []
        for group in groups:
            views = [self.preprocess.tiles(picture, split) for picture in group]
            pixels += [x for x, _, _ in views]
            tiles = iter([(rows_, columns) for _, rows_, columns in views])
            rows.append(self.encode(prompt, images=len(group), tiles=tiles, raw=raw)[0])
        return rows, torch.cat(pixels) if pixels else None

    def text(self, ids: list[int]) -> str:
        """What the ids of a caption spell, up to what ends it: in a run of ours the first newline."""
        text = self.tokenizer.decode([id for id in ids if id not in self.end_tokens], special=False)
        return text.partition("\n")[0] if self.format is OURS else text


def stack(sequences: list[tuple[list[int], list[bool]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Joins sequences of (ids, which of them are targets) into a batch: ids (B,T), padded on the right; the
    positions (M,) in the flattened ids whose next token is a target; and these targets (M,). Nothing predicts
    the first id of a sequence, so that it is never a target."""
    tokens = pad_sequence([torch.tensor(ids, dtype=torch.long) for ids, _ in sequences], True)
    wanted = pad_sequence([torch.tensor(targets, dtype=torch.bool) for _, targets in sequences], True)
    wanted[:, 0] = False
    positions = wanted.flatten().nonzero()[:, 0]
    return tokens, positions - 1, tokens.flatten()[positions]


# ---------------------------------------------------------------------------------------------------------
# Batches of pictures

class Views(NamedTuple):
    """What is seen of P pictures, V views in all, one picture's after the other's."""
    x: torch.Tensor  # pixels (V,3,S,S) or features (V,N,Dv)
    counts: list[int]  # how many views each picture has
    tiles: list[tuple[int, int]]  # rows and columns of tiles among them; 0 and 0: seen as a whole alone

    def pick(self, order: list[int]) -> "Views":
        """The views of these of the pictures, of which one may come twice."""
        views = self.x.split(self.counts)
        return Views(torch.cat([views[p] for p in order]), [self.counts[p] for p in order],
                     [self.tiles[p] for p in order])


class Pixels(torch.utils.data.Dataset):
    """The pictures of a caption set, preprocessed: item i is (i, what `preprocess.tiles` makes of it), or
    (i, the reason why it can't be read)."""

    def __init__(self, captions, preprocess, split: bool = False):
        self.captions = captions
        self.preprocess = preprocess
        self.split = split

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
        indices = [i for i, _, _, _ in good]
        pixels = [x for _, x, _, _ in good]
        tiles = [(rows, columns) for _, _, rows, columns in good]
        return indices, Views(torch.cat(pixels), [len(x) for x in pixels], tiles), bad


def ignore_signals(worker: int) -> None:
    """In a process that reads pictures: Ctrl-C and SIGTERM, which reach it too, are the main one's affair."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def count_bad(bad: dict[int, str], found: dict[int, str], captions) -> None:
    """Counts unreadable pictures {index: reason} in `bad`. InputError above a tenth of the set."""
    bad.update(found)
    if len(bad) > len(captions) / 10:
        *_, last = bad.values()
        raise InputError(f"{len(bad)} of {len(captions)} pictures can't be read; the last: {last}")


def read_pictures(vlm, captions, batches, bad: dict[int, str], workers: int = 0, split: bool | None = None):
    """Reads the pictures of a caption set, batch by batch of indices. Yields the indices of those that can be
    read, and their pixels on the VLM's device (None if there are none). Counts the others in `bad`, {index:
    reason}. split: in tiles, where the family does so (by default as the run was trained). Raises InputError
    as `count_bad` does."""
    split = vlm.processor.split if split is None else split
    loader = torch.utils.data.DataLoader(
        Pixels(captions, vlm.vit.preprocess, split), batch_sampler=batches, collate_fn=Pixels.collate,
        num_workers=workers, pin_memory=vlm.device.type == "cuda", worker_init_fn=ignore_signals)
    for indices, views, found in loader:
        count_bad(bad, found, captions)
        yield indices, views and views._replace(x=send(views.x, vlm.device))


def encode_pictures(vlm, captions, batches, bad: dict[int, str], workers: int = 0, split: bool | None = None):
    """As `read_pictures`, but yields features, without gradients, in place of the pixels."""
    for indices, views in read_pictures(vlm, captions, batches, bad, workers, split):
        with torch.no_grad():
            views = views and views._replace(x=vlm.features(views.x))
        yield indices, views


def chunks(sequence, size: int) -> list:
    """A sequence in pieces of `size`, the last of what is left."""
    return [sequence[i:i + size] for i in range(0, len(sequence), size)]


def shuffled(size: int, batch: int, seed: int, step: int = 0):
    """Yields endless batches (lists of indices below `size`) from `step` on: one shuffled epoch after the
    other, a pure function of the seed. Batch `step` begins in epoch `step * batch // size`."""
    epoch, done = divmod(step * batch, size)
    epochs = (random.Random(f"{seed} {e}").sample(range(size), size) for e in itertools.count(epoch))
    indices = itertools.islice(itertools.chain.from_iterable(epochs), done, None)
    while True:
        yield list(itertools.islice(indices, batch))


# ---------------------------------------------------------------------------------------------------------
# Kept features

class Encoded:
    """A caption set whose pictures are encoded. Those in `bad` {index: reason} can't be read.

    With `keep` it is done once, each process its share, and `features` (P,N,Dv) are those of all pictures,
    zeros of the bad ones. Without, it is done whenever they are asked for.
    """

    def __init__(self, vlm, captions, args, keep: bool = True):
        self.vlm = vlm
        self.captions = captions
        self.args = args
        self.bad: dict[int, str] = {}
        self.features = None
        self.shape = vlm.vit.feature_shape(vlm.config.get("layer"))  # (N,Dv)
        self.dtype = vlm.vit.positions.dtype
        if keep and args.features:
            self.features = self.encode_to_file()
        elif keep:
            self.features = self.zeros(len(captions))
            for chunk, rows in self.encode():
                self.features[chunk[0]:chunk[-1] + 1] = rows

    def zeros(self, pictures: int) -> torch.Tensor:
        return torch.zeros(pictures, *self.shape, dtype=self.dtype, device=self.vlm.device)

    def encode(self):
        """Yields indices and their features, chunk by chunk. Each process encodes its share of a chunk."""
        start = time.time()
        parts = chunks(range(len(self.captions)), 64 * WORLD)
        shares = [chunk[RANK::WORLD] for chunk in parts]
        encoded = encode_pictures(self.vlm, self.captions, shares, self.bad, self.args.workers)
        shown = counted(zip(parts, encoded), "encoded", len(self.captions), self.captions.label,
                        self.args.quiet)
        for chunk, (indices, features) in shown:
            # This process's rows, zeros of the others'; their sum has all
            rows = self.zeros(len(chunk))
            if indices:
                rows[[i - chunk[0] for i in indices]] = features.x
            total(rows.view(torch.uint8))  # of zeros and one process's bytes: exact in any dtype
            yield chunk, rows
        self.bad.update(united(self.bad))
        if not self.args.quiet:
            count = len(self.captions) - len(self.bad)
            print(f"encoded {count} pictures of {self.captions.label} in {time.time() - start:.0f} s",
                  flush=True)

    def encode_to_file(self) -> torch.Tensor:
        """The features from the file in --features, which is written first where it isn't there."""
        path = Path(self.args.features, f"{self.key()}.safetensors")
        device = self.vlm.device
        shape = (len(self.captions), *self.shape)

        def write(file: Path) -> None:
            rows = (rows for _, rows in self.encode())
            write_rows(file, shape, self.dtype, rows,
                       lambda: [i not in self.bad for i in range(len(self.captions))])

        there = torch.tensor(path.is_file(), device=device, dtype=torch.int)
        if total(there) < WORLD:
            if LOCAL:  # one process on each machine writes, the others encode their share
                collections.deque(self.encode(), 0)
            else:
                with guard(path.parent, "can't be written"):
                    path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, write)
            total(torch.zeros(1, device=device))  # wait until the file is there

        found = read_tensors(path)
        compare({"rows": torch.empty(shape, dtype=self.dtype, device="meta"),
                 "marks": torch.empty(shape[:1], dtype=torch.bool, device="meta")}, found, path)
        unread = (~found["marks"]).nonzero().flatten().tolist()
        reasons = {i: f"{self.captions.name(i)}: couldn't be read" for i in unread}
        count_bad(self.bad, reasons | self.bad, self.captions)
        rows = found["rows"]  # read from the disk when they are asked for, unless a GPU has room for all
        return rows.to(device) if rows.nbytes < free_memory(device) / 2 else rows

    def key(self) -> str:
        """A digest of what the features depend on: the encoder, weights and all, how it sees, and what."""
        vit = self.vlm.vit
        settings = (vit.config, vars(vit.preprocess), self.vlm.config.get("layer"), self.vlm.dtype,
                    self.captions.stamp())
        digest = hashlib.sha256(repr(settings).encode())
        for p in vit.parameters():
            digest.update(p.detach().cpu().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:32]

    @property
    def readable(self) -> list[int]:
        return [i for i in range(len(self.captions)) if i not in self.bad]

    def of(self, indices: list[int]) -> Views:
        """The kept features of these pictures, which are seen as a whole."""
        rows = self.features[send(torch.tensor(indices), self.features.device)]
        return Views(send(rows, self.vlm.device), [1] * len(indices), [(0, 0)] * len(indices))

    def batches(self, size: int, first: int = 0):
        """Yields the indices of the pictures that can be read, from the `first` on, and their features."""
        places = self.readable[first:]
        batches = chunks(places, size)
        if self.features is not None:
            encoded = ((indices, self.of(indices)) for indices in batches)
        else:
            encoded = encode_pictures(self.vlm, self.captions, batches, self.bad, self.args.workers)
        readable = ((indices, features) for indices, features in encoded if indices)
        yield from counted(readable, "", len(places), self.captions.label, self.args.quiet)
