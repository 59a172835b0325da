"""Pictures in, words out; and the scores of captions.

    python sample.py photo.jpg                          # a caption, by the newest run in out/
    python sample.py photo.jpg "What is on the table?"  # an answer
    python sample.py photo.jpg --model NAME             # by another run, or a public VLM
    python sample.py photo.jpg --shot a.jpg "a cat"     # after examples, solved
    python sample.py photo.jpg --attention seen.png     # and where each of its words looked
    python sample.py photos/ "*.png" --json             # a line of JSON for each picture
    python sample.py --data captions.csv --images DIR   # caption a whole set and score it
"""
import argparse
import bisect
import collections
import glob
import itertools
import json
import math
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from adapters import VLM
from data import (FORMATS, IMAGE, SKILLS, Captions, Shapes, Views, clean, complain, cut, few_shot, judge,
                  nearest, one_of, open_picture, references, run, stack, watch, write_picture)
from formats.files import InputError, warn, write_text
from lora import merge_lora

# ---------------------------------------------------------------------------------------------------------
# Scores

SHARES = ("exact", *SKILLS, "matching")


def words(caption: str) -> list[str]:
    """A caption's words as scores count them: lower case, no punctuation, clitics apart ("man 's")."""
    text = re.sub(r"n't\b", " n't", caption.lower().replace("cannot", "can not"))
    return re.findall(r"n't|[^\W_]+(?:[-.,/][^\W_]+)*|'(?:s|re|ve|ll|d|m)\b", text)


def ngrams(tokens: list[str], n: int) -> collections.Counter:
    return collections.Counter(zip(*(tokens[i:] for i in range(n))))


def bleu(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """BLEU-1 to -4 of a corpus (Papineni et al., 2002): a list of words a picture, and several to compare it
    with. The brevity penalty takes the reference length closest to each candidate's."""
    right, total, length, wanted = [0] * 4, [0] * 4, 0, 0
    for candidate, refs in zip(candidates, references):
        length += len(candidate)
        wanted += min((abs(len(ref) - len(candidate)), len(ref)) for ref in refs)[1]
        for n in range(4):
            most = collections.Counter()
            for ref in refs:
                most |= ngrams(ref, n + 1)
            found = ngrams(candidate, n + 1)
            right[n] += (found & most).total()
            total[n] += found.total()
    penalty = 1.0 if length >= wanted else math.exp(1 - wanted / max(length, 1e-9))
    # the tiny numbers keep an empty count from being 0/0, as in the reference implementation
    logs = [math.log((r + 1e-15) / (t + 1e-9)) for r, t in zip(right, total)]
    return [penalty * math.exp(sum(logs[:n]) / n) for n in range(1, 5)]


def cider(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """CIDEr-D of each picture of a corpus (Vedantam et al., 2015, arXiv:1411.5726), document frequencies from
    the references."""
    scores = [0.0] * len(candidates)
    for n in range(1, 5):
        frequency = collections.Counter(
            gram for refs in references for gram in {gram for ref in refs for gram in ngrams(ref, n)})

        def vector(tokens):
            weights = {gram: count * math.log(len(references) / max(1, frequency[gram]))
                       for gram, count in ngrams(tokens, n).items()}
            return weights, math.hypot(*weights.values())

        for i, (candidate, refs) in enumerate(zip(candidates, references)):
            mine, norm = vector(candidate)
            for ref in refs:
                theirs, their_norm = vector(ref)
                dot = sum(min(w, theirs[gram]) * theirs[gram] for gram, w in mine.items() if gram in theirs)
                penalty = math.exp(-(len(candidate) - len(ref)) ** 2 / (2 * 6.0 ** 2))
                scores[i] += 10 * penalty * dot / (norm * their_norm or 1.0) / 4 / len(refs)
    return scores


def rate(captions, texts: dict[int, str]) -> tuple[dict[str, float], dict[int, tuple[float, str]]]:
    """Scores of generated captions {index: text} of a set, exact scenes and skills for shapes, else BLEU and
    CIDEr-D; and how good each is, in a number and in words."""
    if isinstance(captions, Shapes):
        judged = {i: judge(text, captions.scene(i)) for i, text in texts.items()}
        kept = {skill: [j[skill] for j in judged.values() if skill in j] for skill in ("exact", *SKILLS)}
        wrong = {i: [skill for skill in SKILLS if not j.get(skill, True)] for i, j in judged.items()}
        return ({skill: sum(right) / len(right) for skill, right in kept.items() if right},
                {i: (j["exact"] - len(wrong[i]), "exact" if j["exact"] else
                     f"wrong: {', '.join(wrong[i]) or 'which is which'}") for i, j in judged.items()})
    candidates = [words(text) for text in texts.values()]
    wanted = [[words(caption) for caption in references(captions, i)] for i in texts]
    each = cider(candidates, wanted)
    return ({**{f"BLEU-{n + 1}": value for n, value in enumerate(bleu(candidates, wanted))},
             "CIDEr-D": sum(each) / len(each)},
            {i: (value, f"CIDEr-D {value:.2f}") for i, value in zip(texts, each)})


def table(rows: dict[str, dict[str, float]]) -> str:
    """Scores by row, as a Markdown table; shares of 1 as they are, those of SHARES in percent."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["", *names], ["---", *["---:"] * len(names)]]
    for label, row in rows.items():
        shown = {name: f"{100 * x:.1f} %" if name in SHARES else f"{x:.3f}" for name, x in row.items()}
        lines.append([label, *(shown.get(name, "") for name in names)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("| " + " | ".join([label.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) + " |"
                     for label, *cells in lines)


# ---------------------------------------------------------------------------------------------------------
# Pictures of results

INK, GREY, BLUE = "#1a1a1a", "#6b6b6b", "#0072b2"


def wrap(text: str, font, width: int) -> str:
    """Breaks a text in lines of at most `width` pixels, each of about as many letters as fit."""
    text = " ".join(text.split())
    most = int(2 * width * len(text) / max(1, font.getlength(text)))  # twice what fits on average
    fit = bisect.bisect_left(range(1, most + 1), True, key=lambda letters: any(
        font.getlength(line) > width for line in textwrap.wrap(text, letters)))
    return "\n".join(textwrap.wrap(text, fit)) if fit else text


def label(text: str, size: int, colour: str, width: int) -> Image.Image:
    """A text in lines of at most `width` pixels."""
    font = ImageFont.load_default(size)
    text, draw = wrap(text, font, width), ImageDraw.Draw(Image.new("L", (1, 1)))
    bottom = draw.multiline_textbbox((0, 0), text + "g", font)[3]  # as deep, whatever its letters
    image = Image.new("RGB", (width, math.ceil(bottom)), "white")
    ImageDraw.Draw(image).multiline_text((0, 0), text, colour, font)
    return image


def join(images: list[Image.Image], gap: int, down: bool = False) -> Image.Image:
    """Images side by side, or one under the other, `gap` pixels apart."""
    places = [0, *itertools.accumulate(image.size[down] + gap for image in images)]
    size = places[-1] - gap, max(image.size[not down] for image in images)
    sheet = Image.new("RGB", size[::-1] if down else size, "white")
    for image, place in zip(images, places):
        sheet.paste(image, (0, place) if down else (place, 0))
    return sheet


def contact_sheet(sections: list[tuple[str, list]], columns: int = 4, side: int = 240) -> Image.Image:
    """Pictures, `side` pixels wide, in rows under the headings of their sections, (heading, pictures); each
    picture is (Image, lines of text), the lines (text, colour)."""
    rows, gap = [], 20
    for heading, cells in sections:
        rows.append(label(heading, 20, INK, columns * (side + gap) - gap))
        cells = [join([ImageOps.contain(picture, (side, side)),
                       *(label(text, 15, colour, side) for text, colour in lines)], 7, down=True)
                 for picture, lines in cells]
        rows += [join(row, gap) for row in cut(cells, columns)]
    return ImageOps.expand(join(rows, gap, down=True), gap, "white")


# Okabe and Ito's colours, which colour-blind readers tell apart
PANELS = ({"loss": ("training loss, nats per token", BLUE),
           "val": ("validation loss, nats per token", "#d55e00")},
          {"matching": ("image-text matching, share that is right", "#009e73")})


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, evenly spaced, from `low` or below to `high` or above; about `most`."""
    rough = (high - low or abs(high) or 1) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{step * i:.9g}") for i in range(first, max(last, first + 1) + 1)]


def curves(lines: list[dict], title: str, width: int = 960, height: int = 420) -> Image.Image:
    """What metrics.jsonl says over the steps: the losses in a panel, and accuracy in another if there is any.
    The training loss is a line, what is measured now and then has dots too."""
    series = {name: [*{line["step"]: line[name] for line in lines
                       if line.get(name) is not None and math.isfinite(line[name])}.items()]
              for panel in PANELS for name in panel}
    panels = [panel for panel in PANELS if any(series[name] for name in panel)] or [PANELS[0]]
    last, drawn = max((step for points in series.values() for step, _ in points), default=1), []
    px = 4  # drawn so large, then reduced: edges are smooth
    left, top, right, bottom = 76 * px, 84 * px, (width - 32) * px, (height - 60) * px
    for panel in panels:
        image = Image.new("RGB", (width * px, height * px), "white")
        draw = ImageDraw.Draw(image)
        values = [value for name in panel for _, value in series[name]] or [0, 1]
        scale = ticks(min(values), max(values))
        digits = max(len(f"{value:g}".partition(".")[2]) for value in scale)

        def place(step, value):
            return (left + (right - left) * step / last,
                    bottom - (bottom - top) * (value - scale[0]) / (scale[-1] - scale[0]))

        def write(x, y, text, anchor, colour=GREY, size=15):
            draw.text((x, y), text, colour, font := ImageFont.load_default(size * px), anchor)
            return font.getlength(text)

        write(left, 18 * px, title * (panel is panels[0]), "lt", INK, 19)
        for value in scale:
            _, y = place(0, value)
            draw.line((left, y, right, y), GREY if value == scale[0] else "#dddddd", px)
            write(left - 10 * px, y, f"{value:.{digits}f}", "rm")
        for step in ticks(0, last, 8):
            if step <= last:
                write(place(step, 0)[0], bottom + 10 * px, f"{step:g}", "mt")
        write(right, bottom + 34 * px, "steps", "rt")
        x, y = left, 60 * px  # of the legend
        for name, (label, colour) in panel.items():
            if points := [place(*point) for point in series[name]]:
                draw.line(points, colour, (3 if name == "loss" else 2) * px, "curve")
                draw.line((x, y, x + 28 * px, y), colour, 3 * px)
                for dot in [*points, (x + 14 * px, y)] if name != "loss" or len(points) == 1 else ():
                    draw.circle(dot, 4.5 * px, colour, "white", px)
                x += 76 * px + write(x + 36 * px, y, label, "lm", INK)
        drawn.append(image.reduce(px))
    return join(drawn, 0, down=True)


def best_and_worst(name: str, captions, texts: dict[int, str], ratings: dict,
                   most: int = 4) -> list[tuple[str, list]]:
    """Sections for `contact_sheet`: the best and the worst of a set's generated captions, with references."""
    order = sorted(texts, key=lambda i: -ratings[i][0])
    return [(f"{name}: the {which} of {len(order)}", [
        (captions.picture(i), [(texts[i], INK), (f"reference: {references(captions, i)[0]}", BLUE),
                               (ratings[i][1], GREY)]) for i in some])
            for which, some in (("best", order[:most]), ("worst", order[most:][:-most - 1:-1])) if some]


@torch.inference_mode()
def look(vlm: VLM, features: torch.Tensor, prompt: str, text: str,
         raw: bool = False) -> list[tuple[str, torch.Tensor]]:
    """Where the LLM looked for each word of a `text` that it gave, from features (P,N,Dv) of the prompt's
    pictures: the word, and what it paid to their patches (P,G,G). That is the attention from the position
    that predicts a token to the image's embeddings, mean over heads and layers (of `flamingo`: the gated
    blocks); where an adapter has queries, times that of each query to the patches, mean over heads and the
    layers that read them. A word of several tokens is their mean."""
    adapter, P = vlm.adapter, len(features)
    ids, wanted = vlm.encode(prompt, text, max_tokens=len(text.encode()), images=P, raw=raw)
    tokens, where, targets = stack([(ids, wanted)])
    readers = [module for name, module in adapter.named_modules() if re.fullmatch(adapter.readers, name)]
    writers = [block.attention for block in (vlm.llm if vlm.slots else adapter).blocks]
    with watch([*readers, *writers]) as seen:
        vlm(tokens.to(vlm.device), features, where.to(vlm.device))
    maps = torch.stack([seen[module] for module in writers]).mean(0)[0, where]  # (M,T), or (M,P·Q)
    if vlm.slots:
        maps = maps[:, tokens[0] == vlm.placeholder]
    maps, grid = maps.unflatten(1, (P, adapter.queries)), adapter.side or vlm.vit.config.grid
    if readers:
        reads = torch.stack([seen[module] for module in readers]).mean(0)  # (P,Q…,N)
        maps = torch.einsum("mpq,pqn->mpn", maps, reads[:, :adapter.queries])
    maps = maps[..., -grid ** 2:].unflatten(2, (grid, grid)).cpu()
    found, space = [], True
    for id, at in zip(targets.tolist(), maps):
        piece = b"" if id in vlm.end_tokens else vlm.tokenizer.bytes.get(id, b"")
        if piece.strip() and (space or piece[:1].isspace()):
            found.append((b"", []))
        if piece.strip():
            word, looks = found[-1]
            read = not word or any(map(str.isalnum, piece.decode(errors="ignore")))  # not the comma behind it
            found[-1] = word + piece, looks + [at] * read
        space = piece[-1:].isspace()
    return [(word.decode(errors="replace").strip(), torch.stack(at).mean(0)) for word, at in found]


def spotlights(vlm: VLM, pixels: torch.Tensor, looks: list[tuple[str, torch.Tensor]],
               side: int = 150) -> list[tuple[Image.Image, list]]:
    """Pictures for `contact_sheet`: what the encoder sees (P,3,S,S), first as it is, then bright where a word
    of `looks` paid a larger share than words do on average: all pay the most to the same few patches."""
    black, white = (vlm.vit.preprocess.pixels(Image.new("RGB", (1, 1), c)) for c in ("black", "white"))
    views = F.interpolate((pixels - black) / (white - black), (side, side), mode="bilinear", antialias=True)
    cells = [(views, [("the picture", INK), ("bright: where a word looked more than the others", GREY)])]
    shares = [at / at.sum() for _, at in looks]
    usual = torch.stack(shares).mean(0) if len(shares) > 1 else torch.tensor(0.0)
    for (word, _), share in zip(looks, shares):
        light = (share / usual.clamp(min=1e-9) - 1).clamp(min=0)
        light = F.interpolate((light / light.max().clamp(min=1e-9))[:, None], (side, side), mode="bicubic")
        cells.append((views * (0.15 + 0.85 * light.clamp(0, 1)), [(word, INK)]))
    arrays = [(torch.cat([*view], 2).clamp(0, 1) * 255).round().byte().permute(1, 2, 0) for view, _ in cells]
    return [(Image.fromarray(array.numpy()), lines) for array, (_, lines) in zip(arrays, cells)]


# ---------------------------------------------------------------------------------------------------------
# Command line

EXIT_CODES = ("exit codes: 0 done; 2 bad input, or too little GPU memory (a line on stderr tells);\n"
              "130 Ctrl-C, 143 SIGTERM, 141 broken pipe")


class Help(argparse.RawDescriptionHelpFormatter):
    """As wide as the terminal, 100 columns at most; tells the default of every option whose text doesn't."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=min(100, shutil.get_terminal_size().columns - 2))

    def _get_help_string(self, action):
        told = "(default" in action.help or action.default in ("", argparse.SUPPRESS)
        known = type(action.default) in (int, float, str)
        return action.help + " (default: %(default)s)" * (known and not told)

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(action.type, "TEXT")


class Parser(argparse.ArgumentParser):
    """Of both command lines. Raises InputError where argparse would print its usage."""

    def __init__(self, description: str):
        super().__init__(usage="%(prog)s [options]", description=description, epilog=EXIT_CODES,
                         formatter_class=Help)

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments:.*? (--?[\w-]+)", message)
        raise InputError(message + (nearest(unknown[1], self._option_string_actions) if unknown else ""))


def pick_device(name: str) -> torch.device:
    """"auto" takes CUDA, then Apple's MPS, then the CPU. Raises InputError for what isn't there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
        if device.type == "cuda":  # for whatever asks for no device by name
            torch.cuda.set_device(device)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None


def can_compile(device: torch.device) -> bool:
    """Tries torch.compile on something small: it needs a C++ compiler and, on a GPU, Triton and a GPU that
    Triton knows. Says why where it fails."""
    try:
        torch.compile(lambda x: x.sin() + x)(torch.ones(8, device=device))
        return True
    except Exception as error:  # whatever a compiler may raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warn(f"nothing is compiled, which is slower: {reason}")
        return False


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """"auto" takes bfloat16 where the hardware multiplies it fast, float16 on older GPUs, else float32."""
    if one_of(("auto", "bfloat16", "float16", "float32"), "precision", name) != "auto":
        if name == "float16" and device.type == "cpu":
            raise InputError("--precision float16 needs a GPU: on a CPU take bfloat16 or float32")
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    fast = any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("amx_tile", "avx512_bf16"))
    return torch.bfloat16 if device.type == "cpu" and fast else torch.float32


def machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", metavar="NAME",
                        help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--precision", default="auto", metavar="TYPE",
                        help="bfloat16, float16 or float32, of weights and arithmetic (default: bfloat16 "
                             "where the hardware is fast at it, float16 on older GPUs, else float32)")


def newest_run() -> str:
    runs = sorted(Path("out").glob("*/adapter.safetensors"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError("no trained run in out/: train one with `python train.py --adapter qformer`, "
                         "or give --model FOLDER")
    return str(runs[-1].parent)


def pictures_of(name: str) -> list[str]:
    """The picture files of a folder, the files that match a pattern, or the file `name`, if there are any.
    Raises InputError for a folder without pictures."""
    if os.path.isdir(name):
        kinds = {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
        found = sorted(str(path) for path in Path(name).iterdir() if path.suffix.lower() in kinds)
        if not found:
            raise InputError(f"{name}: no pictures in this folder")
        return found
    return [name] if name == "-" or os.path.exists(name) else sorted(glob.glob(name, recursive=True))


def caption_set(vlm: VLM, captions, batches, shots: list[tuple[torch.Tensor, str]] = (),
                prompt: str | None = None, raw: bool = False, **decoding) -> dict[int, str]:
    """Captions what `batches` of a set yields, (indices, features as Views), each after the same `shots`:
    features (N,Dv) of a picture, seen as a whole, and its caption. Returns {index: caption}."""
    texts, K = {}, len(shots)
    for indices, features in batches:
        asked = [vlm.prompt_for(captions.pairs(i)[0][0]) if prompt is None else prompt for i in indices]
        asked = [few_shot([*((text, said) for _, said in shots), (text, "")])[0] for text in asked]
        shown = Views(torch.cat([*(shot[None] for shot, _ in shots), features.x]),
                      [1] * K + features.counts, [(0, 0)] * K + features.tiles)
        shown = shown.pick([p for i in range(len(indices)) for p in (*range(K), K + i)])
        tiles = iter(shown.tiles)
        rows = [vlm.encode(text, raw=raw, tiles=tiles)[0] for text in asked]
        texts.update(zip(indices, vlm.answer(rows, shown.x, **decoding)))
    return texts


def as_read(vlm: VLM, ids: list[int]) -> str:
    """A prompt as the LLM reads it, special tokens and all; an image as <image>×number of embeddings."""
    text = vlm.tokenizer.decode(ids)
    return re.sub(f"(?:{IMAGE})+", lambda run: f"{IMAGE}×{len(run[0]) // len(IMAGE)}", text)


def as_lines(captions, texts: dict[int, str]) -> str:
    """Generated captions and the references, one JSON object a line."""
    return "".join(json.dumps(dict(image=captions.name(i), caption=text, references=references(captions, i)),
                              ensure_ascii=False) + "\n" for i, text in texts.items())


def read_options() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("pictures", nargs="*", metavar="PICTURE",
        help="files, folders, patterns (\"*.jpg\"), or - for standard input; a last one with a space in it "
             "that is no file is the prompt: photo.jpg \"What is this?\"")
    add("--model", metavar="NAME",
        help="a run's folder, or a public VLM: a folder or a hub name (default: the newest run in out/)")
    add("--merge-lora", action="store_true",
        help="fold the LoRA into the weights: faster, rounded as they are")
    add("--prompt",
        help="text before the caption; the picture stands where it says <image>, or before it all; with "
             "several <image>s, as many pictures go into each caption (default: the run's own prompt). A "
             "public VLM gets it as a question, in its own prompt format")
    add("--shot", nargs=2, action="append", default=[], metavar=("PICTURE", "CAPTION"),
        help="a solved example, to come before each picture; may be given several times")
    add("--raw-prompt", action="store_true", help="take the prompt as it is, special tokens and all")
    add("--show-prompt", action="store_true", help="print each prompt as the LLM reads it, on stderr")
    add("--batch", type=int, metavar="N", help="pictures at a time (default: 16, of a set 64; in tiles 4)")
    add("--split", action=argparse.BooleanOptionalAction,
        help="see a picture in tiles too, where the model can (default: as it was trained)")
    add("--attention", metavar="FILE", help="draw where each word looked, as a PNG; implies --no-split")

    add = parser.add_argument_group("caption sets").add_argument
    add("--data", metavar="FILE", help="caption and score this set: captions as for train.py, or 'shapes'")
    add("--images", metavar="FOLDER", help="where its pictures lie (default: beside the file)")
    add("--save", metavar="FILE", help="write the captions, one JSON object a line")
    add("--workers", type=int, default=2, help="processes that read pictures")

    add = parser.add_argument_group("decoding").add_argument
    add("--max-tokens", type=int, default=60, help="longest caption, tokens")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token, 1 draws as trained")
    add("--top-k", type=int, default=0, help="draw among the N likeliest tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="draw among the fewest tokens of this probability together")
    add("--beams", type=int, default=1, help="search for the likeliest text with N beams; 1: off")
    add("--seed", type=int, default=0, help="of the draws")

    group = parser.add_argument_group("output and machine")
    add = group.add_argument
    add("--json", action="store_true", help="print JSON lines: image, caption and, of a set, references")
    add("--quiet", action="store_true", help="print captions, scores and errors alone")
    machine_options(group)
    add("--compile", action="store_true",
        help="torch.compile the models' blocks: slower to start, and for many pictures on a GPU faster")
    args = parser.parse_intermixed_args()
    if args.pictures and re.search(r"\s", args.pictures[-1]) and not pictures_of(args.pictures[-1]):
        if args.prompt is not None:
            parser.error(f"{args.pictures[-1]!r} is no file, and there is a --prompt already")
        args.prompt = args.pictures.pop()
    if bool(args.pictures) == bool(args.data):
        parser.error("give one or more pictures, or --data")
    if (min(args.max_tokens, args.batch or 1, args.beams) < 1 or args.temperature < 0 or args.top_k < 0
            or not 0 < args.top_p <= 1):
        parser.error("--max-tokens, --batch and --beams are at least 1, --temperature and --top-k at least "
                     "0, --top-p within (0, 1]")
    if (args.data or args.shot) and (args.prompt or "").count(IMAGE) > 1:
        parser.error("with --data or --shot, --prompt takes one <image>")
    if args.data and args.attention:
        parser.error("--attention goes with pictures, not with --data")
    return args


def main() -> None:
    args = read_options()
    device = pick_device(args.device)
    if args.data == "shapes":
        given = {"test": Shapes(500, "test"), "unseen": Shapes(500, "unseen")}
    elif args.data:
        given = {Path(args.data).name: Captions(args.data, args.images)}
    else:
        given = [file for name in args.pictures for file in pictures_of(name) or [name]]
    vlm = VLM.from_pretrained(args.model or newest_run(), pick_precision(args.precision, device)).to(device)
    if args.merge_lora:
        merge_lora(vlm)
    if args.compile and can_compile(vlm.device):
        vlm.compile_blocks()
    else:
        vlm.pack()
    args.split = not args.attention and (vlm.split if args.split is None else args.split)
    args.split = args.split and "max_image_size" in vlm.vit.preprocess.settings
    args.batch = args.batch or (4 if args.split else 64 if args.data else 16)
    decoding = {name: getattr(args, name) for name in (
        "max_tokens", "temperature", "top_k", "top_p", "beams")}
    decoding["generator"] = torch.Generator(device).manual_seed(args.seed)
    shots = [(open_picture(name), clean(caption)) for name, caption in args.shot]
    (score_sets if args.data else caption_files)(vlm, given, shots, decoding, args)


@torch.inference_mode()
def caption_files(vlm: VLM, files: list[str], shots: list, decoding: dict, args: argparse.Namespace) -> None:
    """Prints a caption of each picture, or of each few, if the prompt takes several, after `shots`; draws
    --attention."""
    prompt = vlm.config.get("prompt", "") if args.prompt is None else args.prompt
    size = max(1, prompt.count(IMAGE))
    if len(files) % size:
        raise InputError(f"the prompt takes {size} pictures at a time: {len(files)} can't be shared out")
    prompt, _ = few_shot([*((prompt, caption) for _, caption in shots), (prompt, "")])
    batches = cut(cut(files, size), args.batch)
    failed, sections = False, []
    while batches:
        batch = batches.pop(0)
        try:
            pictures = [[*(shot for shot, _ in shots), *map(open_picture, names)] for names in batch]
            rows, pixels = vlm.ask(pictures, prompt, args.raw_prompt, args.split)
            features = vlm.features(pixels)
            texts = vlm.answer(rows, features, **decoding)
        except InputError as error:
            if len(batch) > 1:  # one bad picture doesn't cost the others their captions
                batches = [[names] for names in batch] + batches
            else:
                complain(error)
                failed = True
            continue
        views = len(pixels) // len(batch)
        for i, (names, ids, text) in enumerate(zip(batch, rows, texts)):
            if args.show_prompt:
                print(as_read(vlm, ids), file=sys.stderr)
            if args.json:
                line = dict(image=names if size > 1 else names[0], caption=text)
                print(json.dumps(line, ensure_ascii=False), flush=True)
            else:
                print(text if len(files) == size else f"{' '.join(names)}: {text}", flush=True)
            if args.attention:
                mine = slice(i * views, (i + 1) * views)
                looks = look(vlm, features[mine], prompt, text, args.raw_prompt)
                sections.append((text, spotlights(vlm, pixels[mine].cpu(), looks)))
    if sections:
        write_picture(Path(args.attention), contact_sheet(sections, 7, 150))
    sys.exit(2 if failed else 0)


def score_sets(vlm: VLM, sets: dict, shots: list, decoding: dict, args: argparse.Namespace) -> None:
    """Captions whole sets, each picture after `shots`, prints scores, and writes the captions to --save."""
    scores, lines = {}, ""
    shots = [(vlm.features(vlm.vit.preprocess(picture)[None].to(vlm.device))[0], said)
             for picture, said in shots]
    for label, captions in sets.items():
        bad = {}

        def read():
            batches = cut(range(len(captions)), args.batch)
            for indices, features in vlm.encode_pictures(captions, batches, bad, args.workers, args.split):
                if indices:
                    yield indices, features
                    if sys.stderr.isatty() and not args.quiet:
                        print(f"captioned {indices[-1] + 1}/{len(captions)}", end="\r", file=sys.stderr)

        texts = caption_set(vlm, captions, read(), shots, args.prompt, args.raw_prompt, **decoding)
        scores[f"{label} ({len(texts)})"], _ = rate(captions, texts)
        lines += as_lines(captions, texts)
        for reason in bad.values() if not args.quiet else ():
            print(f"skipped: {reason}", file=sys.stderr)
    print(lines * args.json, end="")
    print(table(scores), file=sys.stderr if args.json else sys.stdout)
    if args.save:
        write_text(Path(args.save), lines)


if __name__ == "__main__":
    run(main)
