"""Pictures in, words out; and the scores of captions.

    python sample.py photo.jpg                         # a caption, by the newest run in out/
    python sample.py photo.jpg "What is on the table?" # an answer
    python sample.py photo.jpg --model NAME            # by another run, or a public VLM (LLaVA, SmolVLM, …)
    python sample.py photo.jpg --shot a.jpg "a cat"    # after examples, solved
    python sample.py --data captions.csv --images DIR  # caption a whole set and score it
"""
import argparse
import collections
import json
import math
import re
import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from adapters import VLM
from data import (IMAGE, SKILLS, Captions, InputError, Shapes, clean, few_shot, in_order, judge, open_picture,
                  run, skip, write_file)
from lora import merge_lora

# ---------------------------------------------------------------------------------------------------------
# Scores


SHARES = ("exact", *SKILLS, "matching")


def words(caption: str) -> list[str]:
    """A caption's words as caption scores count them: lower case, no punctuation, clitics apart ("man 's")."""
    text = re.sub(r"n't\b", " n't", caption.lower().replace("cannot", "can not"))
    return re.findall(r"n't|[^\W_]+(?:[-.,/][^\W_]+)*|'(?:s|re|ve|ll|d|m)\b", text)


def ngrams(tokens: list[str], n: int) -> collections.Counter:
    return collections.Counter(zip(*(tokens[i:] for i in range(n))))


def bleu(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """BLEU-1 to -4 of a corpus (Papineni et al., 2002): one list of words a picture, and several to compare it with.
    The brevity penalty takes the reference length closest to each candidate's."""
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


def cider(candidates: list[list[str]], references: list[list[list[str]]]) -> float:
    """CIDEr-D of a corpus (Vedantam et al., 2015, arXiv:1411.5726), document frequencies from the references."""
    frequency = collections.Counter()
    for refs in references:
        frequency.update({gram for ref in refs for n in range(1, 5) for gram in ngrams(ref, n)})
    pictures = math.log(len(references))

    def vector(tokens):
        weights = [{gram: count * (pictures - math.log(max(1, frequency[gram]))) for gram, count in ngrams(tokens, n).items()}
                   for n in range(1, 5)]
        return weights, [math.sqrt(sum(w * w for w in ws.values())) for ws in weights], max(0, len(tokens) - 1)

    score = 0.0
    for candidate, refs in zip(candidates, references):
        mine, my_norms, my_length = vector(candidate)
        for ref in refs:
            theirs, norms, length = vector(ref)
            penalty = math.exp(-(my_length - length) ** 2 / (2 * 6.0 ** 2))
            for n in range(4):
                dot = sum(min(w, theirs[n].get(gram, 0.0)) * theirs[n].get(gram, 0.0) for gram, w in mine[n].items())
                score += penalty * dot / ((my_norms[n] * norms[n]) or 1.0) / 4 / len(refs) * 10
    return score / len(candidates)


def score(captions, texts: dict[int, str]) -> dict[str, float]:
    """Scores generated captions {index: text} of a set: exact scenes and skills for shapes, else BLEU and CIDEr-D."""
    if isinstance(captions, Shapes):
        judged = [judge(text, captions.scene(i)) for i, text in texts.items()]
        kept = {skill: [j[skill] for j in judged if skill in j] for skill in ("exact", *SKILLS)}
        return {skill: sum(right) / len(right) for skill, right in kept.items() if right}
    candidates = [words(text) for text in texts.values()]
    references = [[words(caption) for caption in captions.captions(i)] for i in texts]
    return {**{f"BLEU-{n + 1}": value for n, value in enumerate(bleu(candidates, references))},
            "CIDEr-D": cider(candidates, references)}


def table(rows: dict[str, dict[str, float]]) -> str:
    """Scores by row, as a Markdown table; shares of 1 as they are, those of SHARES in percent."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["", *names], ["---", *["---:"] * len(names)]]
    for label, row in rows.items():
        lines.append([label, *("" if n not in row else f"{100 * row[n]:.1f} %" if n in SHARES else
                               f"{row[n]:.3f}" for n in names)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(names) + 1)]
    return "\n".join("| " + " | ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]) + " |"
                     for line in lines)


# ---------------------------------------------------------------------------------------------------------
# Command line

def pick_device(name: str) -> torch.device:
    """"auto" takes CUDA, then Apple's MPS, then the CPU. Raises InputError for what isn't there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """"auto" takes bfloat16 where the hardware multiplies it fast, float16 on older GPUs, else float32."""
    if name != "auto":
        if name == "float16" and device.type == "cpu":
            raise InputError("--precision float16 needs a GPU: on a CPU take bfloat16 or float32")
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    fast = any(getattr(torch.cpu, f"_is_{feature}_supported", bool)() for feature in ("amx_tile", "avx512_bf16"))
    return torch.bfloat16 if device.type == "cpu" and fast else torch.float32


def machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--precision", default="auto", choices=("auto", "bfloat16", "float16", "float32"),
                        help="what the backbones are held in and the adapter computes in (default: bfloat16 where the "
                             "hardware is fast at it, CPUs with AMX or AVX512-BF16 included; float16 on older GPUs; else float32)")


def newest_run() -> str:
    runs = [path.parent for path in Path("out").glob("*/adapter.safetensors")]
    if not runs:
        raise InputError("no trained run in out/: train one with `python train.py --adapter qformer`, or give --model FOLDER")
    return str(max(runs, key=lambda run: (run / "adapter.safetensors").stat().st_mtime))


def caption_set(vlm: VLM, captions, batches, decoding: dict) -> dict[int, str]:
    """Captions what `batches` of a set yields, (indices, features) pairs: {index: caption}."""
    texts = {}
    for indices, features in batches:
        prompt = decoding.get("prompt")
        if prompt is None:
            prompt = [vlm.prompt_for(captions.questions(i)[0]) for i in indices]
        texts.update(zip(indices, vlm.caption(features=features, **decoding | {"prompt": prompt})))
    return texts


def as_read(vlm: VLM, ids: list[int]) -> str:
    """A prompt as the language model reads it, special tokens and all; an image's embeddings as <image>×their
    number."""
    text = vlm.tokenizer.decode(ids)
    return re.sub(f"(?:{IMAGE})+", lambda run: f"{IMAGE}×{len(run[0]) // len(IMAGE)}", text)


def as_lines(captions, texts: dict[int, str]) -> str:
    """Generated captions and the human ones, one JSON object a line."""
    return "".join(json.dumps(dict(image=captions.name(i), caption=text, references=captions.captions(i)),
                              ensure_ascii=False) + "\n" for i, text in texts.items())


def contact_sheet(captions, texts: dict[int, str], columns: int = 4, rows: int = 3, side: int = 240) -> Image.Image:
    """The first pictures of a set with their generated captions, as one picture."""
    line, lines = 16, 5  # pixels, lines of text under each picture
    sheet = Image.new("RGB", (columns * side, rows * (side + lines * line)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (i, text) in enumerate(list(texts.items())[:columns * rows]):
        x, y = place % columns * side, place // columns * (side + lines * line)
        sheet.paste(ImageOps.contain(captions.picture(i), (side - 8, side - 8)), (x + 4, y + 4))
        wrapped = textwrap.wrap(text, 36)[:lines]
        draw.multiline_text((x + 4, y + side), "\n".join(wrapped), "black", ImageFont.load_default(12))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pictures", nargs="*", metavar="PICTURE",
        help="picture files; a last argument with a space in it that is no file is the prompt, as in "
             "photo.jpg \"What is this?\"")
    add("--model", metavar="NAME", help="a run's folder, or a public VLM: a folder or a hub name (default: "
                                        "the newest run in out/)")
    add("--merge-lora", action="store_true", help="fold the run's LoRA into the weights: faster, but rounded as "
                                                  "they are (default: it is applied beside them)")
    add("--prompt", help="text before the caption; the picture stands where it says <image>, or before it all; with "
                         "several <image>s, as many pictures go into each caption (default: the run's own "
                         "prompt). A public VLM gets it as a question, in its own prompt format")
    add("--shot", nargs=2, action="append", default=[], metavar=("PICTURE", "CAPTION"),
        help="a picture with its caption, to come before each of the others; may be given several times")
    add("--raw-prompt", action="store_true",
        help="take the prompt as it is: no format around it, special tokens are read")
    add("--show-prompt", action="store_true",
        help="print what the language model reads of each prompt, on stderr")
    add("--no-split", action="store_true",
        help="see each picture as a whole, where the model would see it in tiles too")
    add("--data", metavar="FILE", help="caption and score a set instead: a captions file, as for train.py, or 'shapes'")
    add("--images", metavar="FOLDER", help="where the pictures of --data lie (default: beside the file)")
    add("--save", metavar="FILE", help="with --data: write the captions, one JSON object a line")
    add("--max-tokens", type=int, default=60, help="longest caption, tokens (default: 60)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token, 1 draws as trained (default: 0)")
    add("--top-k", type=int, default=0, help="draw among the k likeliest tokens (default: 0, all)")
    add("--top-p", type=float, default=1.0, help="draw among the fewest tokens that make up this probability (default: 1)")
    add("--beams", type=int, default=1, help="search for the likeliest text with so many beams, at temperature 0 (default: 1, off)")
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    add("--batch", type=int, default=64, help="pictures at a time, with --data (default: 64)")
    add("--workers", type=int, default=2, help="processes that read pictures, with --data (default: 2)")
    machine_options(parser)
    args = parser.parse_args()
    if args.pictures and re.search(r"\s", args.pictures[-1]) and not Path(args.pictures[-1]).exists():
        if args.prompt is not None:
            parser.error(f"{args.pictures[-1]!r} is no file, and there is a --prompt already")
        args.prompt = args.pictures.pop()
    if bool(args.pictures) == bool(args.data):
        parser.error("give one or more pictures, or --data")
    if args.max_tokens < 1 or args.temperature < 0 or args.top_k < 0 or not 0 < args.top_p <= 1 or min(args.batch, args.beams) < 1:
        parser.error("--max-tokens, --batch and --beams are at least 1, --temperature and --top-k at least 0, --top-p within (0, 1]")

    if (args.data or args.shot) and (args.prompt or "").count(IMAGE) > 1:
        parser.error("with --data or --shot, --prompt takes one <image>")
    if args.data and args.shot:
        parser.error("--shot goes with pictures, not with --data")

    device = pick_device(args.device)
    sets = {}
    if args.data:
        sets = ({"test": Shapes(500, "test"), "unseen": Shapes(500, "unseen")} if args.data == "shapes" else
                {Path(args.data).name: Captions(args.data, args.images)})
    vlm = VLM.from_pretrained(args.model or newest_run(), pick_precision(args.precision, device)).to(device)
    if args.merge_lora:
        merge_lora(vlm)
    vlm.pack()
    asking = dict(prompt=args.prompt, raw=args.raw_prompt, split=not args.no_split)
    decoding = dict(**asking, max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k,
                    top_p=args.top_p, beams=args.beams, generator=torch.Generator(device).manual_seed(args.seed))
    if args.data:
        score_sets(vlm, sets, decoding, args)
        return
    prompt = vlm.config.get("prompt", "") if args.prompt is None else args.prompt
    group = max(1, prompt.count(IMAGE))
    if len(args.pictures) % group:
        raise InputError(f"the prompt takes {group} pictures at a time: {len(args.pictures)} can't be shared out")
    shots = [open_picture(name) for name, _ in args.shot]
    asking["prompt"], _ = few_shot([*((prompt, clean(caption)) for _, caption in args.shot), (prompt, "")])
    failed = False
    for i in range(0, len(args.pictures), group):
        names = args.pictures[i:i + group]
        try:
            pictures = [[*shots, *map(open_picture, names)]]
            if args.show_prompt:
                (ids,), _ = vlm.ask(pictures, **asking)
                print(as_read(vlm, ids), file=sys.stderr)
            text, = vlm.caption(pictures, **decoding | asking)
            print(text if len(args.pictures) == group else f"{' '.join(names)}: {text}", flush=True)
        except InputError as error:  # one bad picture doesn't cost the others their captions
            print(f"sample.py: error: {error}", file=sys.stderr)
            failed = True
    sys.exit(2 if failed else 0)


def score_sets(vlm: VLM, sets: dict, decoding: dict, args: argparse.Namespace) -> None:
    """Captions whole sets, prints their scores, and writes the captions to --save."""
    scores, lines = {}, ""
    for label, captions in sets.items():
        bad = {}

        def read():
            for indices, features, found in vlm.encode_pictures(captions, in_order(len(captions), args.batch), args.workers):
                skip(bad, found, captions)
                if indices:
                    yield indices, features

        texts = caption_set(vlm, captions, read(), decoding)
        scores[f"{label} ({len(texts)})"] = score(captions, texts)
        lines += as_lines(captions, texts)
        for reason in bad.values():
            print(f"skipped: {reason}", file=sys.stderr)
    print(table(scores))
    if args.save:
        write_file(Path(args.save), lambda path: path.write_text(lines, encoding="utf-8"))


if __name__ == "__main__":
    run(main)
