"""Pictures in, words out; and the scores of captions.

    python sample.py photo.jpg                          # a caption, by the newest run in out/
    python sample.py photo.jpg "What is on the table?"  # an answer
    python sample.py photo.jpg --model NAME             # by another run, or a public VLM
    python sample.py photo.jpg --chat                   # question after question
    python sample.py photo.jpg --shot a.jpg "a cat"     # after examples, solved
    python sample.py photo.jpg --attention seen.png     # and where each of its words looked
    python sample.py photos/ "*.png" --json             # a line of JSON for each picture
    python sample.py --data captions.csv --images DIR   # caption a whole set and score it
    python sample.py --model RUN --export FOLDER        # write a run in a public layout
"""
import argparse
import glob
import itertools
import json
import os
import re
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from PIL import Image

from adapters import VLM
from data import Processor, Views, chunks, encode_pictures, few_shot, place_images, prompted, stack
from formats.captions import IMAGE, Conversation, flat, listed
from formats.files import InputError, check_writable, write_text
from formats.pictures import FORMATS, open_picture
from formats.shards import Shards, caption_data, is_shards
from llm import KVCache
from lora import merge_lora
from support.console import (MANY, PROCESSES, SEED, Number, Parser, check_meaning, complain, machine_options,
                             run)
from support.drawing import contact_sheet, spotlights, write_picture
from support.journal import counted
from support.kernels import watch
from support.machine import can_compile, pick_device, pick_precision
from support.processes import CORES
from support.runs import CHECKPOINT
from support.scores import rate, references, table
from support.shapes import Shapes


# ---------------------------------------------------------------------------------------------------------
# Options

def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("pictures", nargs="*", metavar="PICTURE",
        help="files, folders, patterns (\"*.jpg\"), or - for standard input; a last one with a space in it "
             "that is no file is the prompt: photo.jpg \"What is this?\"")
    add("--model", metavar="NAME",
        help="a run's folder, or a public VLM: a folder or a hub name (default: the newest run in out/)")
    add("--export", metavar="FOLDER",
        help="write the run there in a public layout, LoRA merged, so that others open it: that of its "
             "--from; else LLaVA's (mlp), Idefics3's (pixelshuffle) or BLIP-2's (qformer), where it computes "
             "the same")
    add("--merge-lora", action="store_true",
        help="fold the LoRA into the weights: faster, rounded as they are")
    add("--prompt",
        help="text before the caption, or the question, where --data asks none; the picture stands where it "
             "says <image>, or before it all; with several <image>s, as many pictures go into each caption "
             "(default: the run's own prompt). A public VLM gets it as a question, in its own prompt format")
    add("--shot", nargs=2, action="append", default=[], metavar=("PICTURE", "CAPTION"),
        help="a solved example, to come before each picture; may be given several times")
    add("--chat", action="store_true",
        help="read questions about the pictures, a line each, until Ctrl-D; each is asked after those before "
             "it. A line `/image FILE` adds a picture")
    add("--raw-prompt", action="store_true", help="take the prompt as it is, special tokens and all")
    add("--show-prompt", action="store_true", help="print each prompt as the LLM reads it, on stderr")
    add("--batch", type=MANY, metavar="N", help="pictures at a time (default: 16, of a set 64; in tiles 4)")
    add("--split", action=argparse.BooleanOptionalAction,
        help="see a picture in tiles too, where the model can (default: as it was trained)")
    add("--attention", metavar="FILE", help="draw where each word looked, as a PNG; implies --no-split")

    add = parser.add_argument_group("caption sets").add_argument
    add("--data", metavar="FILE", help="caption and score this set: captions as for train.py, or 'shapes'")
    add("--images", metavar="FOLDER", help="where its pictures lie (default: beside the file)")
    add("--split-name", metavar="NAME", help="the rows of this split alone, where the file has splits")
    add("--save", metavar="FILE", help="write the captions, one JSON object a line")
    add("--workers", type=PROCESSES, default=min(2, CORES), help="processes that read pictures")

    add = parser.add_argument_group("decoding").add_argument
    add("--max-tokens", type=MANY, default=60, help="longest caption, tokens")
    add("--temperature", type=Number(float, 0, 100), default=0.0,
        help="0 takes the likeliest token, 1 draws as trained")
    add("--top-k", type=Number(int, 0, 10 ** 6), default=0, help="draw among the N likeliest tokens; 0: all")
    add("--top-p", type=Number(float, 1e-6, 1), default=1.0,
        help="draw among the fewest tokens of this probability together")
    add("--beams", type=Number(int, 1, 1000), metavar="N",
        help="search for the likeliest text with N beams; 1: off (default: 3 of a run that learned captions "
             "of your own, not --from a public VLM, without --prompt, --chat or --temperature; else 1)")
    add("--length-penalty", type=Number(float, 0, 10), metavar="P",
        help="with beams: the best text has the highest log-probability divided by its length to this power; "
             "1 favours long ones, 0 short ones (default: 0.5)")
    add("--seed", type=SEED, default=0, help="of the draws")

    group = parser.add_argument_group("output and machine")
    add = group.add_argument
    add("--json", action="store_true",
        help="print JSON lines: image, caption, the mean log-probability of its tokens, and references of a "
             "set")
    add("--quiet", action="store_true", help="print captions, scores and errors alone")
    machine_options(group)
    add("--compile", action="store_true",
        help="torch.compile the models' blocks: slower to start, and for many pictures on a GPU faster")
    return parser


def read_options() -> argparse.Namespace:
    parser = make_parser()

    # A last argument with a space in it is the prompt
    args = parser.parse_intermixed_args()
    last = args.pictures[-1] if args.pictures else ""
    if re.search(r"\s", last) and not pictures_of(last) and not is_picture(last):
        if args.prompt is not None:
            parser.error(f"{last!r} is no file, and there is a --prompt already")
        args.prompt = args.pictures.pop()

    # What can't be
    if sum(map(bool, (args.pictures, args.data, args.export))) != 1:
        parser.error("give one or more pictures, --data, or --export")
    if (args.data or args.shot) and (args.prompt or "").count(IMAGE) > 1:
        parser.error("with --data or --shot, --prompt takes one <image>")
    check_meaning(args, parser, (  # options, whether they mean something, why not
        ("images split_name save workers", args.data, "without --data"),
        ("images split_name", args.data != "shapes", "with the shapes world"),
        ("images", not is_shards(args.data or ""), "with shards, which hold their own"),
        ("attention show_prompt chat", not args.data, "with --data"),
        ("chat json quiet merge_lora split batch beams length_penalty max_tokens temperature shot compile "
         "prompt raw_prompt show_prompt attention device precision", not args.export, "with --export"),
        ("attention show_prompt raw_prompt shot beams length_penalty batch json", not args.chat,
         "with --chat"),
        ("split", not args.attention, "with --attention"),
        ("raw_prompt", args.prompt is not None, "without --prompt"),
        ("temperature", args.beams in (None, 1), "with --beams"),
        ("length_penalty", args.beams != 1 and not args.temperature, "without --beams"),
        ("top_k top_p seed", args.temperature, "without --temperature"),
    ))
    return args


def newest_run() -> str:
    runs = sorted(Path("out").glob(f"*/{CHECKPOINT}"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError("no trained run in out/: train one with `python train.py --adapter qformer`, "
                         "or give --model FOLDER")
    return str(runs[-1].parent)


def is_picture(name: str | Path) -> bool:
    """Whether a file is called like a picture."""
    return Image.registered_extensions().get(Path(name).suffix.lower()) in FORMATS


def pictures_of(name: str) -> list[str]:
    """The picture files of a folder, the files that match a pattern, or the file `name`, if there are any.
    Raises InputError for a folder without pictures."""
    if os.path.isdir(name):
        found = sorted(str(path) for path in Path(name).iterdir() if is_picture(path))
        if not found:
            raise InputError(f"{name}: no pictures in this folder")
        return found
    return [name] if name == "-" or os.path.exists(name) else sorted(glob.glob(name, recursive=True))


# ---------------------------------------------------------------------------------------------------------
# Single pictures

@torch.inference_mode()
def caption_files(vlm: VLM, files: list[str], shots: list, decoding: dict, args: argparse.Namespace) -> None:
    """Prints a caption of each picture, or of each few, if the prompt takes several, after `shots`; draws
    --attention."""
    prompt = vlm.config.get("prompt", "") if args.prompt is None else args.prompt
    size = max(1, prompt.count(IMAGE))  # pictures a caption
    if len(files) % size:
        raise InputError(f"the prompt takes {size} pictures at a time: {len(files)} can't be shared out")
    solved = [place_images([(prompt, caption)], 1) for _, caption in shots]
    [(prompt, _)] = few_shot([*solved, place_images([(prompt, "")], size)])
    examples = [picture for picture, _ in shots]

    as_it_comes = sys.stdout.isatty() and args.beams == 1 and not (args.json or args.quiet)
    failed, sections = False, []
    batches = chunks(chunks(files, size), args.batch)
    while batches:
        batch = batches.pop(0)
        try:
            pictures = [examples + [open_picture(name) for name in names] for names in batch]
            rows, pixels = vlm.processor.ask(pictures, prompt, args.raw_prompt)
            features = vlm.features(pixels.to(vlm.device))
            typed = Typed(vlm.processor) if as_it_comes and len(files) == size else None
            texts = vlm.answer(rows, features, score=args.json, on_token=typed, **decoding)
        except InputError as error:
            if len(batch) > 1:  # one bad picture doesn't cost the others their captions
                batches = [[names] for names in batch] + batches
            else:
                word = batch[0][0]
                question = " (if it is a question, say --prompt)" if re.fullmatch(r"[^./\\]+", word) else ""
                complain(f"{error}{question}")
                failed = True
            continue

        views = len(pixels) // len(batch)
        for i, (names, row, text) in enumerate(zip(batch, rows, texts)):
            if args.show_prompt:
                print(as_read(vlm, row.ids), file=sys.stderr)
            if args.json:
                line = dict(image=names if size > 1 else names[0], caption=text,
                            log_probability=round(text.log_probability, 4))
                print(json.dumps(line, ensure_ascii=False), flush=True)
            else:
                said = typed.rest(text) if typed else text
                print(said if len(files) == size else f"{' '.join(names)}: {said}", flush=True)
            if args.attention:
                mine = slice(i * views, (i + 1) * views)
                looks = look(vlm, features[mine], prompt, text, args.raw_prompt)
                sections.append((text, spotlights(vlm.vit.preprocess.visible(pixels[mine]), looks)))
    if sections:
        write_picture(Path(args.attention), contact_sheet(sections, 7, 150))
    tell_lost(vlm, args)
    sys.exit(2 if failed else 0)


def tell_lost(vlm: VLM, args: argparse.Namespace) -> None:
    if (lost := vlm.processor.lost()) and not args.quiet:
        print(lost, file=sys.stderr)


def as_read(vlm: VLM, ids: list[int]) -> str:
    """A prompt as the LLM reads it, special tokens and all; an image as <image>×number of embeddings."""
    text = vlm.processor.tokenizer.decode(ids)
    return re.sub(f"(?:{IMAGE})+", lambda run: f"{IMAGE}×{len(run[0]) // len(IMAGE)}", text)


class Typed:
    """Prints an answer while its tokens come: called with each id."""

    def __init__(self, processor):
        self.processor = processor
        self.ids = []
        self.shown = ""

    def __call__(self, id: int) -> None:
        if self.ids and self.ids[-1] in self.processor.ends:  # a GPU goes on for some tokens
            return
        self.ids.append(id)
        text = self.processor.text(self.ids).strip()
        if not text.endswith("\ufffd") and text.startswith(self.shown):  # else a letter isn't whole yet
            print(text[len(self.shown):], end="", flush=True)
            self.shown = text

    def rest(self, text: str) -> str:
        """What is left to print of an answer."""
        return text[len(self.shown):] if text.startswith(self.shown) else f"\n{text}"


# ---------------------------------------------------------------------------------------------------------
# Question after question

class Chat:
    """A conversation about pictures. What the LLM has read stays in its cache, so that it reads only what is
    new."""

    def __init__(self, vlm: VLM, decoding: dict):
        self.vlm = vlm
        self.decoding = decoding
        self.turns: Conversation = []
        self.tiles: list[tuple[int, int]] = []  # of each picture
        self.images: torch.Tensor | None = None  # embeddings of all their views
        self.cache = KVCache(vlm.llm.config, 1, 0, vlm.llm.embedding.weight)
        self.read: list[int] = []  # ids in the cache

    @torch.inference_mode()
    def ask(self, question: str, pictures: list[Image.Image], on_token: Callable | None = None) -> str:
        """The answer to a question, which comes with these pictures, new ones. Raises InputError."""
        vlm = self.vlm
        processor = vlm.processor
        views = [vlm.vit.preprocess.tiles(picture, processor.split) for picture in pictures]
        tiles = self.tiles + [(rows, columns) for _, rows, columns in views]
        text = IMAGE * len(views) + question.replace(IMAGE, " ")
        example = processor.encode(text, images=0, tiles=iter(tiles), earlier=self.turns)
        ids = example.ids
        room = processor.max_positions - len(ids)
        if room < 1:
            raise InputError("these pictures don't fit the language model's "
                             f"{processor.max_positions} positions")

        # The new pictures' embeddings, behind the others'
        images = self.images
        if views:
            pixels = torch.cat([x for x, _, _ in views]).to(vlm.device)
            prompts = processor.prompts([example])
            new = vlm.embed_images(vlm.features(pixels), None if prompts is None else prompts[-len(pixels):])
            images = new if images is None else torch.cat([images, new])

        # Read only what is new: the cache has the first `same` ids, few if the first turns were cut. At least
        # one id is read, for its logits
        same = 0
        while same < min(len(self.read), len(ids) - 1) and self.read[same] == ids[same]:
            same += 1
        self.cache.length = same
        self.read = self.read[:same]
        inputs = vlm.llm_inputs(torch.tensor([ids], device=vlm.device), images)
        for name in ("embeddings", "positions"):
            if inputs[name] is not None:
                inputs[name] = inputs[name][:, same:]
        decoding = self.decoding | dict(max_tokens=min(self.decoding["max_tokens"], room))
        [found] = vlm.llm.generate(**inputs, **decoding, end_tokens=processor.ends, keep_end=True,
                                   cache=self.cache, on_token=on_token)
        self.tiles, self.images = tiles, images
        self.read = ids + found[:-1]
        answer = processor.text(found).strip()
        self.turns.append((text, answer))
        return answer


def chat(vlm: VLM, files: list[str], decoding: dict, args: argparse.Namespace) -> None:
    """Answers line after line of standard input about the pictures in `files`; see --chat."""
    def read(name: str) -> Image.Image:
        if name == "-":
            raise InputError("-: with --chat, standard input has the questions")
        return open_picture(name)

    if sys.stdin is None:
        raise InputError("--chat: standard input is closed")
    talk = Chat(vlm, decoding)
    pictures = [read(name) for name in files]
    question = args.prompt
    while True:
        if question is None:
            try:
                question = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                print(end="\n" if sys.stdin.isatty() else "")
                return
        try:
            command, _, name = question.strip().partition(" ")
            if command == "/image":
                pictures.append(read(name.strip()))
            elif question.strip():
                typed = Typed(vlm.processor)
                answer = talk.ask(question.strip(), pictures, typed if sys.stdout.isatty() else None)
                print(typed.rest(answer), flush=True)
                tell_lost(vlm, args)
                vlm.processor.cut.clear()  # it may be one of its turns each time
                pictures = []
        except InputError as error:  # what came with the question is forgotten
            complain(error)
            pictures = pictures if command == "/image" else []
        question = None


# ---------------------------------------------------------------------------------------------------------
# Caption sets

class Shots(NamedTuple):
    """What comes solved before each entry of a set."""
    said: list[Conversation] = []  # a question "" is the entry's own
    views: Views | None = None  # features of their pictures


def see_whole(vlm: VLM, pictures: list[Image.Image]) -> Views:
    """The features of pictures, each seen as a whole."""
    pixels = torch.stack([vlm.vit.preprocess(picture) for picture in pictures]).to(vlm.device)
    return Views(vlm.features(pixels), [1] * len(pictures), [[(0, 0)]] * len(pictures))


def score_sets(vlm: VLM, sets: dict, shots: list, decoding: dict, args: argparse.Namespace) -> None:
    """Captions whole sets, each picture after `shots`, prints scores, and writes the captions to --save."""
    scores, lines = {}, ""
    solved = Shots()
    if shots:
        solved = Shots([[("", said)] for _, said in shots], see_whole(vlm, [picture for picture, _ in shots]))

    for label, captions in sets.items():
        bad = {}
        batches = chunks(range(len(captions)), args.batch)
        encoded = encode_pictures(vlm, captions, batches, bad, args.workers)
        readable = ((indices, features) for indices, features in encoded if indices)
        shown = counted(readable, "captioned", len(captions), label, args.quiet, sys.stderr)
        texts = caption_set(vlm, captions, shown, solved, args.prompt, args.raw_prompt,
                            score=bool(args.json or args.save), **decoding)
        scores[f"{label} ({len(texts)})"], _ = rate(captions, texts)
        lines += as_lines(captions, texts)
        if not args.quiet:
            for reason in bad.values():
                print(f"skipped: {reason}", file=sys.stderr)
    tell_lost(vlm, args)
    if args.json:
        print(lines, end="")
    print(table(scores), file=sys.stderr if args.json else sys.stdout)
    if args.save:
        write_text(Path(args.save), lines)


def caption_set(vlm: VLM, captions, batches, shots: Shots = Shots(), prompt: str | None = None,
                raw: bool = False, **decoding) -> dict[int, str]:
    """Answers the last question of each entry of a caption set, after the same `shots`. Returns {index:
    answer}, without the entries whose text doesn't fit the LLM.

    batches: yields (indices, Views of their features). prompt: what an entry is asked that begins without
        a question; by default the run's. raw: see `Processor.encode`. decoding: see `VLM.answer`.
    Raises InputError if no entry fits.
    """
    texts = {}
    processor = vlm.processor
    if prompt is None:
        prompt = processor.prompt
    K = len(shots.said)
    for indices, features in batches:
        # The features of the shots, then those of the entries
        if K:
            features = shots.views.join(features)

        # Each entry's conversation up to its last question, after the solved examples, and their views
        rows, order, answered = [], [], []
        for at, i in enumerate(indices, start=K):
            *earlier, (question, _) = prompted(captions.conversations(i)[0], prompt)
            examples = [as_example(shots.said[j], question or prompt, len(features.tiles[j]))
                        for j in range(K)]
            asked = place_images([*earlier, (question, "")], len(features.tiles[at]))
            *earlier, (text, _) = few_shot([*examples, asked])
            shown = [*range(K), at]  # places of the shots and of the entry in `features`
            tiles = itertools.chain.from_iterable(features.tiles[j] for j in shown)
            row = processor.encode(text, raw=raw and not earlier, tiles=tiles, earlier=earlier)
            if len(row.ids) < processor.max_positions:
                rows.append(row)
                order += shown
                answered.append(i)
            else:
                processor.skipped.add(hash(str(asked)))
        if rows:
            x = features.pick(order).x
            texts.update(zip(answered, vlm.answer(rows, x, **decoding)))
    if not texts:
        raise InputError(f"no text fits the language model's {processor.max_positions} positions")
    return texts


def as_example(turns: Conversation, prompt: str, pictures: int) -> Conversation:
    """An example that says where its pictures stand; it is asked the `prompt` if it has no question."""
    (question, answer), *later = prompted(turns, prompt)
    if question.count(IMAGE) > pictures:
        question = question.replace(IMAGE, "")
    return place_images([(question, answer), *later], pictures)


def as_lines(captions, texts: dict[int, str]) -> str:
    """Generated captions and the references, one JSON object a line."""
    lines = []
    for i, text in texts.items():
        names = [captions.name(p) for p in captions.pictures(i)]
        *earlier, (question, _) = captions.conversations(i)[0]
        entry = dict(image=names if len(names) > 1 else names[0])
        if earlier:
            entry["earlier"] = earlier
        if question:
            entry["question"] = question
        entry |= dict(caption=text, references=references(captions, i))
        if getattr(text, "log_probability", None) is not None:
            entry["log_probability"] = round(text.log_probability, 4)
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    return "".join(lines)


# ---------------------------------------------------------------------------------------------------------
# Where it looked

@torch.inference_mode()
def look(vlm: VLM, features: torch.Tensor, prompt: str, text: str,
         raw: bool = False) -> list[tuple[str, torch.Tensor]]:
    """Returns each word of an answer `text`, and the attention (P,G,G) that it paid to the patches of the
    prompt's pictures, of which these are the features (P,N,Dv).

    A token's attention to the image embeddings is taken at the position that predicts it, as the mean over
    heads and layers of the LLM (of `flamingo`: of the gated blocks). An adapter with queries hands it on to
    the patches: it is multiplied by each query's attention to them, the mean over heads and over the layers
    that read patches. A word of several tokens has their mean.
    """
    adapter, P = vlm.adapter, len(features)
    example = vlm.processor.encode(prompt, text, max_tokens=vlm.processor.max_positions, images=P, raw=raw)
    tokens, positions, targets = stack([example])

    # Run it once more, and watch who attends to images and who reads patches
    readers = [module for name, module in adapter.named_modules() if re.fullmatch(adapter.readers, name)]
    writers = [block.attention for block in (vlm.llm if vlm.in_text else adapter).blocks]
    with watch([*readers, *writers]) as seen:
        prompts = vlm.processor.prompts([example])
        vlm.logits(tokens.to(vlm.device), features, positions.to(vlm.device), prompts)

    # From each target to the embeddings of the images, then to the patches
    maps = torch.stack([seen[module] for module in writers]).mean(0)[0, positions]  # (M,T), or (M,P·Q)
    if vlm.in_text:
        maps = maps[:, tokens[0] == vlm.processor.placeholder]
    maps = maps.unflatten(1, (P, adapter.queries))
    if readers:
        reads = torch.stack([seen[module] for module in readers]).mean(0)  # (P,Q…,N)
        maps = torch.einsum("mpq,pqn->mpn", maps, reads[:, :adapter.queries])
    grid = vlm.vit.config.grid
    side = adapter.side or grid
    maps = maps[..., -side ** 2:].unflatten(2, (side, side)).cpu()

    # The last squares of a pixel shuffle may reach beyond the picture
    scale = getattr(adapter, "scale", 1)
    if side * scale > grid:
        maps = maps.repeat_interleave(scale, 2).repeat_interleave(scale, 3)[..., :grid, :grid]
    return words_of(vlm.processor, targets.tolist(), maps)


def words_of(processor: Processor, ids: list[int], maps: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Joins tokens to words: each word, and the mean of its tokens' maps (M,P,G,G); a comma behind a word
    belongs to it, but its map doesn't count."""
    found: list[tuple[bytes, list]] = []
    after_space = True
    for id, seen in zip(ids, maps):
        piece = b"" if id in processor.end_tokens else processor.tokenizer.bytes.get(id, b"")
        if piece.strip():
            if after_space or piece[:1].isspace():
                found.append((b"", []))
            word, word_maps = found.pop()
            if not word or any(map(str.isalnum, piece.decode(errors="ignore"))):
                word_maps.append(seen)
            found.append((word + piece, word_maps))
        after_space = piece[-1:].isspace()
    return [(word.decode(errors="replace").strip(), torch.stack(seen).mean(0)) for word, seen in found]


def usual_beams(vlm: VLM, args: argparse.Namespace) -> int:
    """Returns 3 for captions by a run that learned captions of its user's: they get better by beam search.
    Else 1: an answer is read while it comes."""
    learned = vlm.config.get("training", {}).get("data", "shapes")
    asked = args.prompt is not None or args.chat or args.temperature
    return 1 if learned == "shapes" or vlm.config.get("from") or asked else 3


def check_output(output: str, read: list) -> None:
    """Raises InputError where a file can't be written, or is one of the files that are `read`."""
    check_writable(Path(output))
    if os.path.exists(output):
        for name in read:
            if os.path.exists(name) and os.path.samefile(name, output):
                raise InputError(f"{output}: it is read too: write to another file")


def main() -> None:
    args = read_options()
    if args.export:  # in float32: rounded once, when it is written
        VLM.from_pretrained(args.model or newest_run()).export(Path(args.export))
        return
    device = pick_device(args.device)
    files = []
    for name in args.pictures:
        files += pictures_of(name) or [name]
    read = files + [name for name, _ in args.shot]
    if args.data == "shapes":
        sets = {"test": Shapes(500, "test"), "unseen": Shapes(500, "unseen")}
    elif args.data:
        captions = caption_data(args.data, args.images, split=args.split_name)
        read += listed(args.data) + list(captions.paths)
        if isinstance(captions, Shards):
            captions = captions.take(MANY.most)
        sets = {Path(args.data).name: captions.by_question()}
    for output in (args.save, args.attention):
        if output is not None:
            check_output(output, read)

    # The model, made fast
    vlm = VLM.from_pretrained(args.model or newest_run(), pick_precision(args.precision, device)).to(device)
    if args.data:
        for captions in sets.values():
            captions.keep_lines = vlm.processor.keeps_lines
    if args.merge_lora:
        merge_lora(vlm)
    if args.compile and can_compile(vlm.device):
        vlm.compile_blocks()
    else:
        vlm.pack()

    # What depends on it
    if args.split is not None or args.attention:
        vlm.processor.split = bool(args.split)
    tiled = vlm.processor.split and vlm.vit.preprocess.has_tiles
    args.batch = args.batch or (4 if tiled else 64 if args.data else 16)
    args.beams = args.beams or usual_beams(vlm, args)
    if args.length_penalty is None:
        args.length_penalty = 0.5
    elif args.beams == 1:
        raise InputError("--length-penalty means nothing without --beams")
    generator = torch.Generator(device).manual_seed(args.seed)
    decoding = dict(max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k,
                    top_p=args.top_p, beams=args.beams, length_penalty=args.length_penalty,
                    generator=generator)
    shots = [(open_picture(name), flat(caption)) for name, caption in args.shot]
    if args.chat:
        chat(vlm, files, decoding, args)
    elif args.data:
        score_sets(vlm, sets, shots, decoding, args)
    else:
        caption_files(vlm, files, shots, decoding, args)


if __name__ == "__main__":
    run(main)
