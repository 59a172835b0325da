"""From pictures and captions to what the model reads: layouts, the processor, batches, kept features.

A *caption set* `s` has entries, each of one picture as a rule:

    len(s), s.count       how many entries there are, and how many pictures
    s.pictures(i)         the pictures of entry i
    s.conversations(i)    what is said of them: conversations, of which one is learned at a time
    s.picture(p)          picture p, a PIL.Image
    s.name(p)             its name
    s.label               what a line of progress calls the set

A conversation is a list of turns (question, answer). A caption is one turn without a question. There are
three kinds of sets: `Captions` in formats/captions.py, `Shards` in formats/shards.py and `Shapes`, the
built-in world, in support/shapes.py. In `Shards`, i and p are not numbers but a `Pair`, and there is no
label.
"""
import hashlib
import itertools
import random
import re
import signal
import time
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from formats.captions import IMAGE, Conversation
from formats.files import InputError, compare, guard, named, read_tensors, write_file, write_safetensors
from formats.tokenizer import Tokenizer
from formats.vlms import OTHERS, Format, ours
from support.console import Number, one_of
from support.journal import counted
from support.machine import free_memory, to_device
from support.processes import LOCAL, RANK, WORLD, merge_over_processes, sum_over_processes

# ---------------------------------------------------------------------------------------------------------
# Layouts: how a picture and its caption become a text with an answer

LAYOUTS = ("image-text", "text-image-text", "text-image")
WEIGHT = Number(float, 1e-6, 10 ** 6)


def layout_weights(mix: str) -> dict[str, float]:
    """Reads "image-text" or "image-text:3,text-image:2": how often each is drawn. Raises InputError."""
    weights = {}
    for entry in mix.split(","):
        name, _, weight = entry.partition(":")
        with named(f"--layout {mix}"):
            if one_of(LAYOUTS, "layout", name) in weights:
                raise InputError(f"{name} is named twice")
            weights[name] = WEIGHT(weight or "1")
    return weights


def draw_layout(weights: dict[str, float], seed: int, epoch: int, index: int) -> str:
    """The layout that picture `index` has in `epoch`."""
    rng = random.Random(f"{seed} {epoch} {index} layout")
    return rng.choices(list(weights), weights.values())[0]


def draw_conversation(captions, index: int, seed: int, epoch: int) -> Conversation:
    """What entry `index` of a set says in `epoch`: a pure function of its arguments."""
    return random.Random(f"{seed} {epoch} {index}").choice(captions.conversations(index))


def prompted(turns: Conversation, prompt: str) -> Conversation:
    """A conversation whose first question, where it has none, is the `prompt`."""
    (question, answer), *later = turns
    if not question:
        question = prompt
        if any(IMAGE in text for text, _ in later):  # they show the picture
            question = prompt.replace(IMAGE, "")
    return [(question, answer), *later]


def place_images(turns: Conversation, pictures: int) -> Conversation:
    """Returns the conversation with an IMAGE for each of its `pictures`: those that its questions don't place
    come first. Raises InputError if the questions place more than there are."""
    placed = sum(question.count(IMAGE) for question, _ in turns)
    if placed > pictures:
        raise InputError(f"the prompt has room for {placed} pictures, not {pictures}")
    question, answer = turns[0]
    question = IMAGE * (pictures - placed) + question
    return [(question, answer), *turns[1:]]


def is_caption(captions, index: int) -> bool:
    """Whether an entry is one picture and its captions: only these can be learned in other layouts."""
    one = len(captions.pictures(index)) == 1
    return one and all(len(turns) == 1 and not turns[0][0] for turns in captions.conversations(index))


def arrange(layout: str, captions, index: int, seed: int, epoch: int, prompt: str = "",
            others: list | None = None) -> Conversation:
    """Returns the conversation that is learned of entry `index`, with IMAGE where a picture stands. A pure
    function of its arguments.

    image-text: the picture and the question, else the `prompt`; the caption is the answer. What isn't a
        caption always has this layout.
    text-image-text: the first words of a caption, as many as are drawn, and the picture; the other words are
        the answer.
    text-image: a caption, the picture, and "match?", which tells this layout from the last; "yes" or "no" is
        the answer. Half of the captions are drawn from the entries `others`, by default from all. It is the
        image-text matching of BLIP (Li et al., 2022, arXiv:2201.12086), but by next token.
    """
    # Every draw has a generator of its own: a resumed run draws what an unbroken one draws
    (question, caption), *later = draw_conversation(captions, index, seed, epoch)
    rng = random.Random(f"{seed} {epoch} {index} {layout}")
    if layout == "image-text" or not is_caption(captions, index):
        turns = prompted([(question, caption), *later], prompt)
        return place_images(turns, len(captions.pictures(index)))
    if layout == "text-image-text":
        words = caption.split(" ")
        at = rng.randrange(len(words))
        return [(" ".join(words[:at]) + IMAGE, " ".join(words[at:]))]

    # text-image: half the time another picture's caption, which may be right all the same
    if rng.random() < 0.5:
        other = rng.choice(others or range(len(captions)))
        _, caption = rng.choice(captions.conversations(other))[-1]
    own = [said for [(_, said)] in captions.conversations(index)]
    return [(f"{caption}{IMAGE} match?", "yes" if caption in own else "no")]


def gap(text: str) -> str:
    """The space between a text and the words after it; none behind a picture."""
    last = text.split(IMAGE)[-1]
    return " " if last and not last[-1].isspace() else ""


def few_shot(examples: list[Conversation]) -> Conversation:
    """Joins conversations into one. The last is the one to be answered. The others come before it, a line
    for each turn with its answer. Each says where its pictures stand: see `place_images`."""
    *solved, ((text, answer), *later) = examples
    lines = ""
    for turns in solved:
        for asked, said in turns:
            lines += f"{asked}{gap(asked)}{said}\n"
    return [(lines + text, answer), *later]


def draw_shots(indices: list[int], at: int, most: int, seed: int, epoch: int) -> list[int]:
    """Draws up to `most` other entries of a batch, which are shown with their answers before the one `at`.
    Returns where they are in the batch: no further pictures need be read. A pure function of its
    arguments."""
    rng = random.Random(f"{seed} {epoch} {indices[at]} shots")
    others = [j for j, index in enumerate(indices) if index != indices[at]]
    return rng.sample(others, min(rng.randint(0, most), len(others)))


# ---------------------------------------------------------------------------------------------------------
# The processor: text and pictures to ids, targets and pixels

BEGIN, END, _ = OTHERS
OURS = ours(BEGIN, END)
WHOLE = itertools.repeat((0, 0))  # rows and columns of tiles, of pictures that are seen as a whole


class Example(NamedTuple):
    """A text in ids, and what each of these is: one of the next four."""
    ids: list[int]
    kinds: list[int]


IMAGE_PART, WORD, EARLIER, LAST = range(4)  # an image's, a prompt's, an earlier answer's, the last answer's
ANSWERS = (EARLIER, LAST)
NOTHING = Example([0], [IMAGE_PART])  # to learn nothing from: every step takes part


class Spelling(NamedTuple):
    """Targets of the --spell loss: a picture's i-th embedding should predict its caption's i-th token."""
    positions: torch.Tensor  # (K,), among the embeddings of all pictures
    targets: torch.Tensor  # (K,): ids


class Turn(NamedTuple):
    """A turn of a conversation: what is asked, with IMAGE for each picture, and the answer, None if it is to
    come."""
    text: str
    answer: str | None
    tiles: list[tuple[int, int]]  # rows and columns of tiles of each picture; 0 and 0: seen as a whole


class Batch(NamedTuple):
    """B texts to learn from."""
    tokens: torch.Tensor  # ids (B,T), padded on the right
    target_positions: torch.Tensor  # (M,): where, in the flattened ids, the next token is a target
    targets: torch.Tensor  # (M,): these targets
    prompts: torch.Tensor | None  # (P,L): see `Processor.prompts`
    most_images: int  # of one text, at least 1
    shown: list[int]  # the entries whose pictures the texts show, in order
    spelling: Spelling | None = None

    def to(self, device: torch.device) -> "Batch":
        tensors = [x if x is None else to_device(x, device) for x in self[:4]]
        spelling = self.spelling and Spelling(*(to_device(x, device) for x in self.spelling))
        return Batch(*tensors, self.most_images, self.shown, spelling)


class Processor:
    """Turns text and pictures into what a VLM reads, and its answer into text.

    In the ids, `placeholder` stands for each embedding of an image. The vocabulary of a run of ours grows by
    three ids that neither the LLM nor the tokenizer has: `marker` and the next one, learned embeddings that
    begin and end an image, and the placeholder. Public VLMs have these, if any, in their vocabulary.

    llm: the LLM's config. preprocess: makes the pixels. queries: embeddings of an image among the ids, 0 for
    an adapter that is read between the LLM's blocks. prompt_length: tokens of a prompt that the adapter
    reads. config: that of a run, see `adapters.VLM`.
    """

    def __init__(self, tokenizer: Tokenizer, llm, preprocess, queries: int, prompt_length: int,
                 config: dict, format: Format = OURS):
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.queries = queries
        self.prompt_length = prompt_length
        self.config = config
        self.format = format
        self.split = config.get("split", True)  # whether pictures are seen in tiles too, if the family does
        self.vocabulary = llm.vocabulary
        self.max_positions = llm.max_positions
        self.keeps_lines = format is not OURS  # of questions and answers: in a run of ours a newline ends one

        # What didn't fit, by its hash
        self.cut: set[int] = set()  # texts that lost their first turns or words
        self.skipped: set[int] = set()  # texts that were left out
        self.shortened: set[int] = set()  # answers that lost their last words to --max-tokens

        # Ids of ours: a tokenizer may have tokens for which the LLM has no embedding, so that they come
        # behind
        ids = set(tokenizer.bytes)
        self.marker = max(self.vocabulary, max(ids, default=-1) + 1)
        self.placeholder = config.get("placeholder", self.marker + 2)
        self.no_embedding = {id for id in ids if id >= self.vocabulary} - {self.placeholder}
        tokenizer.add(IMAGE, self.placeholder)

        # What begins a text, and what ends an answer:
        # - end_tokens: the LLM's own end tokens; they spell nothing
        # - ends: every id at which an answer stops, in a run of ours those with a newline too
        # - end: what closes an answer that was cut, before the next turn: a newline, else an end token
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
        self.end = tokenizer.encode("\n", special=False) if format is OURS else []
        if len(self.end) != 1 or not self.ended(self.end):
            self.end = list(self.end_tokens[:1])

    def ended(self, ids: list[int]) -> bool:
        """Whether an answer's ids have its end."""
        return bool(ids) and ids[-1] in self.ends

    @property
    def prompt(self) -> str:
        """What is asked of a picture, where its caption set asks no question."""
        return self.config.get("prompt", "")

    def views(self, ids: list[int]) -> int:
        """How many views of pictures the ids show."""
        return ids.count(self.placeholder) // self.queries if self.queries else ids.count(self.marker)

    def image_tokens(self, rows: int = 0, columns: int = 0) -> list[int]:
        """Ids of a picture of so many tiles; 0 and 0: one that is seen as a whole."""
        return self.tokenizer.encode(self.format.image(self.queries, rows, columns))

    def encode(self, text: str, caption: str | None = None, max_tokens: int = 128, images: int = 1,
               tiles: Iterator[tuple[int, int]] = WHOLE, raw: bool = False,
               earlier: Conversation = ()) -> Example:
        """Returns one example: start token, the `earlier` turns, `text` in the model's format, caption, end.

        text: the question or prompt. `<image>` marks a picture's place; without one, `images` pictures come
            first. It is data: a special token that it spells is read as plain text.
        caption: the answer; None for a prompt that is to be continued.
        max_tokens: the most ids of an answer. If `caption` is None, room for as many is left, but for no more
            than a quarter of the LLM's positions.
        tiles: yields rows and columns of tiles of each picture.
        raw: `text` is the whole prompt: special tokens are read, and there is no format.
        earlier: turns before this one.
        An answer ends with a newline in a run of ours (it may be one token with the sign before it), and with
        the end token in a public VLM or if the vocabulary has no newline. An example that doesn't fit the LLM
        loses its first turns, then its first words; the result may still be too long. Raises InputError if a
        token has no embedding.
        """
        # The turns, with the tiles of their pictures
        said = [*earlier, (text, caption)]
        if not any(IMAGE in question for question, _ in said):
            said = place_images(said, images)
        turns = []
        for question, answer in said:
            turns.append(Turn(question, answer, [next(tiles) for _ in range(question.count(IMAGE))]))

        # A prompt leaves room for its answer; answers in earlier turns are then kept whole
        room = self.max_positions
        longest_answer = max_tokens
        if caption is None:
            room -= min(max_tokens, self.max_positions // 4)
            longest_answer = self.max_positions

        # The turns' ids. While there are too many, shorten the conversation
        whole = turns
        while True:
            pairs = self.encode_turns(turns, longest_answer, raw)
            excess = sum(len(prompt) + len(answer) for prompt, answer in pairs) - room
            shorter = shorten(turns, excess) if excess > 0 else None
            if shorter is None:
                break
            turns = shorter
        if turns != whole and excess <= 0:
            self.cut.add(hash(str([turn.text for turn in whole])))

        # All ids, and what they are
        ids, kinds = [], []
        for n, (prompt, answer) in enumerate(pairs, start=1):
            ids += prompt + answer
            for id in prompt:
                is_word = id < self.vocabulary and id != self.placeholder
                kinds.append(WORD if is_word else IMAGE_PART)
            kinds += [LAST if n == len(pairs) else EARLIER] * len(answer)

        # An extended tokenizer may have tokens that the LLM doesn't know
        for id in self.no_embedding.intersection(ids):
            token = self.tokenizer.bytes[id].decode(errors="replace")
            raise InputError(f"token {token!r} ({id}) has no embedding: the tokenizer was extended, the "
                             f"language model wasn't (it has {self.vocabulary})")
        return Example(ids, kinds)

    def encode_turns(self, turns: list[Turn], max_tokens: int,
                     raw: bool) -> list[tuple[list[int], list[int]]]:
        """The ids of each turn's prompt and of its answer. An answer that was cut ends before the next turn;
        this end isn't learned. See `encode`."""
        pairs = []
        for turn in turns:
            prompt, answer = self.encode_turn(turn, max_tokens, raw, first=not pairs)
            if pairs and not self.ended(pairs[-1][1]):
                prompt = self.end + prompt
            pairs.append((prompt, answer))
        return pairs

    def encode_turn(self, turn: Turn, max_tokens: int, raw: bool, first: bool) -> tuple[list[int], list[int]]:
        """The ids of a turn's prompt and of its answer. `first`: whether it begins the conversation."""
        # What the format puts before the text and behind it: it is spelled around a mark, and cut there
        format = OURS if raw else self.format
        images, text = split_images(turn.text)
        text = text or format.question
        mark = "\0" if text else ""
        head, _, tail = format.chat(len(images) // len(IMAGE), mark).partition("\0")
        head = (format.begin if first else format.between) + head

        # What the format spells may be special tokens, what the text spells is plain
        prompt = head + text + tail
        plain = range(0) if raw else range(len(head), len(head + text))
        ids = self.tokenizer.encode(prompt, plain=plain)
        if ids.count(self.placeholder) != prompt.count(IMAGE):
            raise InputError(f"token {self.placeholder} stands for a picture, and for a word of the prompt "
                             "too")

        # The start token comes first, in some families behind the pictures at the head
        if first:
            at = 0
            while self.format.images_first and at < len(ids) and ids[at] == self.placeholder:
                at += 1
            ids = ids[:at] + self.start + ids[at:]

        # Each picture takes as many ids as it has embeddings
        found = []
        tiles = iter(turn.tiles)
        for id in ids:
            found += self.image_tokens(*next(tiles)) if id == self.placeholder else [id]
        if turn.answer is None:
            return found, []
        return found, self.caption_ids(prompt, turn.answer, max_tokens)

    def caption_ids(self, prompt: str, caption: str, max_tokens: int) -> list[int]:
        """The ids of a caption behind a `prompt`, and of its end; see `encode`."""
        space = "" if self.tokenizer.strip else gap(prompt)  # SentencePiece's kind puts it itself
        newline = "\n" if self.format is OURS else ""
        ids = self.tokenizer.encode(space + caption.replace(IMAGE, " ") + newline, special=False)
        if len(ids) > max_tokens:
            self.shortened.add(hash(caption))
            return ids[:max_tokens]
        return ids if newline and self.ended(ids) else ids + list(self.end_tokens[:1])

    def batch(self, examples: list[Conversation], max_tokens: int = 128,
              tiles: list[list[tuple[int, int]]] | None = None, learned: tuple[int, ...] = ANSWERS,
              spelled: list[list[str]] | None = None, queries: int = 0,
              orders: list[list[int]] | None = None) -> Batch:
        """Turns conversations into a Batch on the CPU: see `encode`.

        tiles: of the pictures of each entry; by default it has one, seen as a whole.
        learned: what the targets are, of WORD, EARLIER and LAST.
        spelled: for each entry, the caption that each of its pictures should spell in its `queries`
            embeddings.
        orders: for each conversation, the entries that it shows; by default the n-th shows the n-th.
        """
        rows, shown = [], []
        for n, example in enumerate(examples):
            *earlier, (text, answer) = example
            order = [n] if orders is None else orders[n]
            images = 1 if tiles is None else sum(len(tiles[j]) for j in order)
            of_images = WHOLE if tiles is None else itertools.chain.from_iterable(tiles[j] for j in order)

            # Nothing is learned or shown of an example that doesn't fit
            row = self.encode(text, answer, max_tokens, images, iter(of_images), earlier=earlier)
            if len(row.ids) <= self.max_positions:
                rows.append(row)
                shown += order
            else:
                rows.append(NOTHING)
                self.skipped.add(hash(str(example)))
        rows = rows or [NOTHING]
        tokens, positions, targets = stack(rows, learned)
        most = max([1] + [self.views(row.ids) for row in rows])
        spelling = None
        if spelled is not None:
            captions = itertools.chain.from_iterable(spelled[j] for j in shown)
            spelling = self.spelling(captions, queries)
        return Batch(tokens, positions, targets, self.prompts(rows), most, shown, spelling)

    def prompts(self, examples: list[Example]) -> torch.Tensor | None:
        """The ids (P,L) that the adapter reads with each picture, padded on the right with -1: the words
        before the first answer of its example, at most `prompt_length`; one id where there is no picture,
        for a blank one is read. None if it reads no prompt."""
        if not self.prompt_length:
            return None
        found = []
        for ids, kinds in examples:
            begin = next((at for at, kind in enumerate(kinds) if kind in ANSWERS), len(ids))
            words = [id for id, kind in zip(ids[:begin], kinds) if kind == WORD]
            found += [torch.tensor(words[:self.prompt_length], dtype=torch.long)] * self.views(ids)
        return pad_sequence(found or [torch.zeros(1, dtype=torch.long)], True, -1)  # else of a blank picture

    def spelling(self, captions: Iterable[str], queries: int) -> Spelling:
        """Targets of the --spell loss, for pictures of `queries` embeddings each."""
        # The i-th picture's embeddings stand at i · queries and behind
        positions, targets = [], []
        for i, caption in enumerate(captions):
            ids = self.tokenizer.encode(caption, special=False)[:queries]
            positions += range(i * queries, i * queries + len(ids))
            targets += ids
        return Spelling(torch.tensor(positions, dtype=torch.long), torch.tensor(targets, dtype=torch.long))

    def ask(self, pictures: list, prompt: str | None = None,
            raw: bool = False) -> tuple[list[Example], torch.Tensor | None]:
        """A prompt for each entry of `pictures`, and the pixels (V,3,S,S) of all views (None if V is 0).

        pictures: an entry is a PIL.Image, or a list of any number of them.
        prompt: has an `<image>` for each picture of an entry, or none: then all come first. By default it is
            the run's own. raw: see `encode`.
        Raises InputError if an entry has another number of pictures than the prompt has `<image>`s.
        """
        if isinstance(pictures, Image.Image):
            raise InputError("pictures come in a list: for one, [picture]")
        prompt = self.prompt if prompt is None else prompt
        groups = [entry if isinstance(entry, (list, tuple)) else [entry] for entry in pictures]
        if IMAGE in prompt:
            wanted = prompt.count(IMAGE)
            for group in groups:
                if len(group) != wanted:
                    raise InputError(f"the prompt has room for {wanted} pictures, not {len(group)}")

        # Each entry: its views, and a prompt with as many image tokens as they take
        rows, pixels = [], []
        for group in groups:
            views = [self.preprocess.tiles(picture, self.split) for picture in group]
            pixels += [x for x, _, _ in views]
            tiles = iter([(rows_, columns) for _, rows_, columns in views])
            rows.append(self.encode(prompt, images=len(group), tiles=tiles, raw=raw))
        return rows, torch.cat(pixels) if pixels else None

    def lost(self) -> str:
        """Tells how many texts didn't fit; "" if all did."""
        positions = f"for the language model's {self.max_positions} positions"
        told = []
        if self.cut:
            told.append(f"texts too long {positions} lost their first turns or words: {len(self.cut)}")
        if self.skipped:
            told.append(f"texts too long {positions} were left out: {len(self.skipped)}")
        if self.shortened:
            told.append(f"answers too long for --max-tokens lost their last words: {len(self.shortened)}")
        return "; ".join(told)

    def text(self, ids: list[int]) -> str:
        """What the ids of a caption spell, up to what ends it: in a run of ours the first newline."""
        shown = []
        for id in ids:
            if id not in self.end_tokens or b"\n" in self.tokenizer.bytes.get(id, b""):  # it may be ".\n"
                shown.append(id)
        text = self.tokenizer.decode(shown, special=False)
        return text.partition("\n")[0] if self.format is OURS else text


def split_images(text: str) -> tuple[str, str]:
    """The IMAGEs that a text begins with, and the rest of it."""
    at = re.match(f"(?:{IMAGE})*", text).end()
    return text[:at], text[at:]


def shorten(turns: list[Turn], excess: int) -> list[Turn] | None:
    """A conversation that is too long, without its first turn, whose pictures the next one takes. A single
    turn loses its first words: `excess` bytes or more, for a token has at least one. None: nothing can go,
    for pictures stand among the words."""
    first, *later = turns
    if later:
        second, *later = later
        text = IMAGE * len(first.tiles) + second.text
        return [Turn(text, second.answer, first.tiles + second.tiles), *later]
    head, words = split_images(first.text)
    if not words or IMAGE in words:
        return None
    left = words.encode()[excess:].decode(errors="ignore")
    if " " in words:  # not in Chinese
        left = left.partition(" ")[2]
    return [first._replace(text=head + left)]


def stack(examples: list[Example],
          learned: tuple[int, ...] = ANSWERS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Joins examples into a batch: ids (B,T), padded on the right; the positions (M,) in the flattened ids
    whose next token is a target, one of a kind that is `learned`; and these targets (M,). Nothing predicts
    the first id of an example, so that it is never a target."""
    tokens = pad_sequence([torch.tensor(ids, dtype=torch.long) for ids, _ in examples], True)
    kinds = pad_sequence([torch.tensor(kinds, dtype=torch.long) for _, kinds in examples], True)
    wanted = torch.isin(kinds, torch.tensor(learned))
    wanted[:, :1] = False
    positions = wanted.flatten().nonzero()[:, 0]
    return tokens, positions - 1, tokens.flatten()[positions]


# ---------------------------------------------------------------------------------------------------------
# Batches of pictures

class Views(NamedTuple):
    """What is seen of the pictures of B entries, V views in all, one entry's after the other's."""
    x: torch.Tensor  # pixels (V,3,S,S) or features (V,N,Dv)
    counts: list[int]  # (B,): how many views each entry has
    tiles: list[list[tuple[int, int]]]  # of each of B entries, for each picture, as in Turn

    def join(self, other: "Views") -> "Views":
        """The views of these entries, then those of the others."""
        return Views(torch.cat([self.x, other.x]), self.counts + other.counts, self.tiles + other.tiles)

    def pick(self, order: list[int]) -> "Views":
        """The entries in this order; one may come twice. Where they have no picture at all, x is one blank
        view, which no entry has: the encoder and the adapter take part in every step."""
        views = self.x[:sum(self.counts)].split(self.counts)
        x = torch.cat([self.x[:0]] + [views[i] for i in order])
        if not len(x):
            x = self.x.new_zeros(1, *self.x.shape[1:])
        return Views(x, [self.counts[i] for i in order], [self.tiles[i] for i in order])


class Pixels(torch.utils.data.Dataset):
    """The pictures of a caption set, preprocessed: item (i, pictures) is i, what `preprocess.tiles` makes of
    each of these pictures, and {picture: why it can't be read}."""

    def __init__(self, captions, preprocess, split: bool = False):
        self.captions = captions
        self.preprocess = preprocess
        self.split = split

    def __getitem__(self, item: tuple) -> tuple[int, list[tuple[torch.Tensor, int, int]], dict[int, str]]:
        i, pictures = item
        seen, bad = [], {}
        for p in pictures:
            try:
                picture = self.captions.picture(p)
                with named(self.captions.name(p)):
                    seen.append(self.preprocess.tiles(picture, self.split))
            except InputError as error:
                bad[p] = str(error)
        return i, seen, bad

    def collate(self, items: list) -> tuple[list[int], Views, dict[int, str]]:
        """The i of items whose pictures can all be read, their pixels, and what's wrong with the pictures
        that can't."""
        indices, bad = [], {}
        pixels, counts, tiles = [], [], []
        for i, seen, found in items:
            bad |= found
            if not found:
                indices.append(i)
                pixels += [x for x, _, _ in seen]
                counts.append(sum(len(x) for x, _, _ in seen))
                tiles.append([(rows, columns) for _, rows, columns in seen])
        if not pixels:
            blank = self.preprocess(Image.new("RGB", (1, 1)))
            pixels = [blank[None][:0]]
        return indices, Views(torch.cat(pixels), counts, tiles), bad


def ignore_signals(worker: int) -> None:
    """In a process that reads pictures: Ctrl-C and SIGTERM, which reach it too, are the main one's affair."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def count_bad(bad: dict[int, str], found: dict[int, str], captions) -> None:
    """Counts unreadable pictures {picture: reason} in `bad`. InputError above a tenth of the set."""
    bad.update(found)
    if len(bad) > captions.count / 10:
        *_, last = bad.values()
        raise InputError(f"{len(bad)} of {captions.count} pictures can't be read; the last: {last}")


def read_pictures(vlm, captions, batches, bad: dict[int, str], workers: int = 0, alone: bool = False):
    """Reads the pictures of a caption set, batch by batch of entries (`alone`: of pictures). Yields the
    entries whose pictures can be read, and their pixels on the VLM's device. Counts the other pictures in
    `bad`, {picture: reason}. Raises InputError as `count_bad` does."""
    pixels = Pixels(captions, vlm.vit.preprocess, vlm.processor.split)

    def items_of(batch):
        return [(i, (i,) if alone else captions.pictures(i)) for i in batch]

    items = map(items_of, batches)
    loader = torch.utils.data.DataLoader(
        pixels, batch_sampler=items, collate_fn=pixels.collate, num_workers=workers,
        pin_memory=vlm.device.type == "cuda", worker_init_fn=ignore_signals)
    for indices, views, found in loader:
        count_bad(bad, found, captions)
        yield indices, views._replace(x=to_device(views.x, vlm.device))


def encode_pictures(vlm, captions, batches, bad: dict[int, str], workers: int = 0):
    """As `read_pictures`, but yields features, without gradients, in place of the pixels."""
    for indices, views in read_pictures(vlm, captions, batches, bad, workers):
        if indices:
            with torch.no_grad():
                views = views._replace(x=vlm.features(views.x))
        yield indices, views


def chunks(sequence, size: int) -> list:
    """A sequence in pieces of `size`, the last of what is left."""
    return [sequence[i:i + size] for i in range(0, len(sequence), size)]


def shuffled(size: int, batch: int, seed: int, step: int = 0):
    """Yields endless batches (lists of indices below `size`) from `step` on: one shuffled epoch after the
    other, a pure function of the seed. Batch `step` begins in epoch `step * batch // size`."""
    first_epoch, done = divmod(step * batch, size)

    def indices():
        for epoch in itertools.count(first_epoch):
            yield from random.Random(f"{seed} {epoch}").sample(range(size), size)

    left = itertools.islice(indices(), done, None)
    while True:
        yield list(itertools.islice(left, batch))


# ---------------------------------------------------------------------------------------------------------
# Kept features

class Encoded:
    """A caption set whose pictures are encoded. Those in `bad` {picture: reason} can't be read.

    With `keep` it is done once, each process its share, and `kept` (P,N,·) is what `VLM.begin` returns of all
    pictures, zeros of the bad ones. Without, it is done whenever they are asked for.
    """

    def __init__(self, vlm, captions, args, keep: bool = True):
        self.vlm = vlm
        self.captions = captions
        self.args = args
        self.bad: dict[int, str] = {}
        self.kept = None
        self.shape = vlm.begun_shape
        self.dtype = vlm.vit.positions.dtype
        if keep and args.features:
            self.kept = self.encode_to_file()
        elif keep:
            self.kept = self.zeros(captions.count)
            for chunk, rows in self.encode():
                self.kept[chunk[0]:chunk[-1] + 1] = rows

    def zeros(self, pictures: int) -> torch.Tensor:
        return torch.zeros(pictures, *self.shape, dtype=self.dtype, device=self.vlm.device)

    def encode(self):
        """Yields pictures and what is kept of each, chunk by chunk. Each process encodes its share of a
        chunk."""
        start = time.time()
        parts = chunks(range(self.captions.count), 64 * WORLD)
        shares = [chunk[RANK::WORLD] for chunk in parts]
        read = read_pictures(self.vlm, self.captions, shares, self.bad, self.args.workers, alone=True)
        shown = counted(zip(parts, read), "encoded", self.captions.count, self.captions.label,
                        self.args.quiet)
        for chunk, (indices, pixels) in shown:
            # This process's rows, zeros of the others'; their sum has all
            rows = self.zeros(len(chunk))
            if indices:
                rows[[i - chunk[0] for i in indices]] = self.vlm.begin(pixels.x)
            sum_over_processes(rows.view(torch.uint8))  # of zeros and one process's bytes: exact in any dtype
            yield chunk, rows
        self.bad.update(merge_over_processes(self.bad))
        if not self.args.quiet:
            count = self.captions.count - len(self.bad)
            print(f"encoded {count} pictures of {self.captions.label} in {time.time() - start:.0f} s",
                  flush=True)

    def encode_to_file(self) -> torch.Tensor:
        """What is kept, from the file in --features, which is written first where it isn't there."""
        path = Path(self.args.features, f"{self.key()}.safetensors")
        device = self.vlm.device
        count = self.captions.count
        tensors = {"rows": torch.empty(count, *self.shape, dtype=self.dtype, device="meta"),
                   "marks": torch.empty(count, dtype=torch.bool, device="meta")}  # whether it could be read

        def values():
            for _, rows in self.encode():
                yield rows
            yield torch.tensor([p not in self.bad for p in range(count)])

        there = torch.tensor(path.is_file(), device=device, dtype=torch.int)
        if sum_over_processes(there) < WORLD:
            if LOCAL:  # one process on each machine writes, the others encode their share
                for _ in self.encode():
                    pass
            else:
                with guard(path.parent, "can't be written"):
                    path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, lambda file: write_safetensors(file, tensors, {}, values()))
            sum_over_processes(torch.zeros(1, device=device))  # wait until the file is there

        found = read_tensors(path)
        compare(tensors, found, path)
        unread = (~found["marks"]).nonzero().flatten().tolist()
        reasons = {i: f"{self.captions.name(i)}: couldn't be read" for i in unread}
        count_bad(self.bad, reasons | self.bad, self.captions)
        rows = found["rows"]  # read from the disk when they are asked for, unless a GPU has room for all
        return rows.to(device) if rows.nbytes < free_memory(device) / 2 else rows

    def key(self) -> str:
        """A digest of what is kept: the encoder, as far as it is frozen, how it sees, and what."""
        vlm, vit = self.vlm, self.vlm.vit
        settings = (vit.config, vars(vit.preprocess), vlm.layer, vlm.dtype, self.captions.stamp())
        if vlm.frozen_blocks is not None:
            settings += (vlm.frozen_blocks,)
        digest = hashlib.sha256(repr(settings).encode())
        for name, p in vit.named_parameters():
            if not p.requires_grad and not name.endswith((".A", ".B", ".m")):  # of a LoRA on unread blocks
                digest.update(p.detach().cpu().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:32]

    @property
    def readable(self) -> list[int]:
        """The entries all of whose pictures can be read."""
        return [i for i in range(len(self.captions)) if self.bad.keys().isdisjoint(self.captions.pictures(i))]

    def of(self, indices: list[int]) -> Views:
        """What is kept of these entries, whose pictures are seen as a whole."""
        shown = [self.captions.pictures(i) for i in indices]
        pictures = torch.tensor([p for pictures in shown for p in pictures], dtype=torch.long)
        rows = self.kept[to_device(pictures, self.kept.device)]
        counts = [len(pictures) for pictures in shown]
        return Views(to_device(rows, self.vlm.device), counts, [[(0, 0)] * n for n in counts])

    def batches(self, size: int, first: int = 0):
        """Yields entries that can be read, from the `first` on, and the features of their pictures."""
        places = self.readable[first:]
        batches = chunks(places, size)
        if self.kept is not None:
            encoded = ((indices, self.finished(self.of(indices))) for indices in batches)
        else:
            encoded = encode_pictures(self.vlm, self.captions, batches, self.bad, self.args.workers)
        readable = ((indices, features) for indices, features in encoded if indices)
        yield from counted(readable, "", len(places), self.captions.label, self.args.quiet)

    @torch.no_grad()
    def finished(self, views: Views) -> Views:
        return views._replace(x=self.vlm.finish(views.x))
