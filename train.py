"""Captions in, trained adapter out: the ViT and the LLM stay frozen, get a LoRA, or are trained whole.

    python train.py --adapter qformer
    python train.py --vit google/siglip-base-patch16-224 --llm HuggingFaceTB/SmolLM2-135M \\
        --data captions.csv --images photos/
    python train.py --from HuggingFaceTB/SmolVLM-256M-Instruct --data questions.json --images photos

Without --data it learns to caption the built-in shapes world: three minutes on two CPU cores.
Several GPUs share each batch: torchrun --nproc_per_node 8 train.py …
"""
import argparse
import collections
import contextlib
import functools
import importlib.metadata
import itertools
import math
import os
import platform
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

from adapters import ADAPTERS, IMAGE_POSITIONS, VLM, build, default_sizes
from data import (ANSWERS, LAST, WORD, Batch, Encoded, Views, arrange, chunks, draw_conversation, draw_layout,
                  draw_shots, few_shot, is_caption, layout_weights, prompted, read_pictures, shuffled)
from formats.captions import IMAGE, Captions, Conversation, listed
from formats.files import (InputError, compare, named, only_warn, read_json, read_metadata,
                           warn, write_json, write_tensors, write_text)
from formats.hub import built_in
from formats.shards import Shards, caption_data, is_shards
from lora import add_lora, lora_layers, save_lora
from sample import Shots, as_lines, caption_set
from support.console import (MANY, PROCESSES, SEED, Number, Numbers, Parser, check_meaning, flag,
                             machine_options, one_of, run)
from support.drawing import best_and_worst, contact_sheet, curves, write_picture
from support.journal import Log, Progress, Signals, check_new
from support.machine import can_compile, free_memory, pick_precision, to_device, start_processes
from support.processes import CORES, RANK, WORLD, merge_over_processes, sum_over_processes
from support.runs import BEST, CHECKPOINT, read_run, resume_state
from support.scores import rate, table
from support.shapes import Shapes

MOVED = ("data", "images", "val")  # options that may change on --resume where the contents are the same
FREE = ("resume", "out", "device", "workers", "log_every", "save_every", "features", "shard", "tensorboard",
        "quiet")  # options that may change on --resume
PATIENCE = 10  # as many steps that change nothing, one after the other, end a run: see `learn`

# Pictures × parameters from which on a run takes ten minutes of an H100 or more. Compiling takes one or two,
# and saves a fifth.
LONG_RUN = 1e14


# ---------------------------------------------------------------------------------------------------------
# Options

# Ranges of several options
COUNT = Number(int, 1, 10 ** 9)
SIZE = Number(int, 1, 1000)
RATE = Number(float, 0, 100)
DROPOUT = Number(float, 0, 0.99)
ADAPTER_SIZES = {  # option -> type, help; "adapter_NAME" or "NAME" is the adapter's argument
    "queries": (Number(int, 1, 4096), "embeddings of a picture, of an adapter with queries (default: 32)"),
    "adapter_scale": (SIZE, "pixelshuffle: N × N patches become one embedding (default: 2)"),
    "adapter_layers": (SIZE, "blocks of an adapter with queries (default: 4; twoway: 2)"),
    "adapter_width": (Number(int, 1, 65_536), "its hidden size (default: 256)"),
    "adapter_heads": (SIZE, "its attention heads (default: 8)"),
    "adapter_every": (SIZE, "qformer: every N-th block reads the picture; flamingo: a gated block stands "
                            "before every N-th block of the LLM (default: 2)"),
    "adapter_dropout": (DROPOUT, "qformer: dropout after every sublayer (default: 0)"),
    "adapter_text": (Number(int, 0, 10_000),
                     "qformer, twoway: read N tokens of the prompt too (default: 0; 32, if N is left out)"),
}


def without_spaces(text: str) -> str:
    """The type of options that are lists: "adapter, llm" is "adapter,llm"."""
    return text.replace(" ", "")


def make_parser() -> Parser:
    parser = Parser(__doc__)

    add = parser.add_argument_group("model").add_argument
    add("--from", dest="origin", metavar="NAME", help="start from a public VLM: a folder or a hub name")
    add("--vit", default="assets/vit", metavar="NAME", help="image encoder: a folder or a hub name")
    add("--llm", default="assets/llm", metavar="NAME", help="language model: a folder or a hub name")
    add("--split", action="store_true",
        help="cut each picture in tiles too, as the model of --from does: more time and memory")
    add("--image-size", type=Number(int, 1, 4096), metavar="PX",
        help="side of the squares the encoder sees (default: its own)")
    add("--layer", type=Numbers(Number(int, -1000, 1000)), metavar="I",
        help="encoder's layer to read: hidden_states[I] (default: its output); of several, as in 12,10,7, "
             "each patch's features are joined")
    add("--adapter", default="qformer", metavar="KIND",
        help=", ".join(ADAPTERS) + " (default: qformer; with --data, pixelshuffle)")
    for name, (type_, text) in ADAPTER_SIZES.items():
        optional = dict(nargs="?", const=32, metavar="N") if name == "adapter_text" else {}
        add(flag(name), type=type_, help=text, **optional)
    add("--image-position", default="sequence", metavar="KIND",
        type=functools.partial(one_of, IMAGE_POSITIONS, "image position"),
        help="positions of an image's embeddings in the LLM: sequence, one after the other, as words; "
             "shared, all the same; xy, shared, with learned embeddings of row and column; sequence+xy; "
             "rope-xy, rotary by row and column, for an adapter that keeps the grid of patches")
    add("--train", default="adapter", metavar="PARTS", type=without_spaces,
        help="trained whole, in float32: a list of adapter, llm, vit")
    add("--prompt", default="", metavar="TEXT",
        help="text before the caption, where the data asks no question; the picture stands where it says "
             "<image>, or first (default: none)")

    add = parser.add_argument_group("LoRA").add_argument
    add("--lora", type=Number(int, 0, 10_000), metavar="R",
        help="train a new LoRA of rank R too; 0: none (default: 0; with --data 16, unless --train names the "
             "LLM or --from or --lora-from is given)")
    add("--lora-alpha", type=Number(float, 1e-6, 10 ** 6), metavar="A",
        help="its updates are scaled by A / R (default: 2 R)")
    add("--lora-targets", default="q,v", metavar="NAMES", type=without_spaces,
        help="layers with it: q, k, v, out, gate, up, down; or all (default: q,v; of a new adapter with "
             "--data, all)")
    add("--lora-on", default="llm", metavar="PARTS", type=without_spaces,
        help="llm, vit, or llm,vit (default: llm; of a new adapter with --data, the encoder's last blocks "
             "too)")
    add("--lora-vit-blocks", type=SIZE, metavar="N",
        help="of the encoder's blocks, the last N that are read get it: what comes before them is computed "
             "once a picture (default: all; of a new adapter with --data and no --lora-on, 6)")
    add("--lora-dropout", type=DROPOUT, default=0.0, help="dropout of its input")
    add("--lora-from", metavar="FOLDER", help="begin with the LoRA in this folder: PEFT's, or a run's lora/")

    add = parser.add_argument_group("data").add_argument
    add("--data", default="shapes", metavar="FILE",
        help="captions: a table with a header such as image,caption; JSON lines; the JSON of COCO, VQAv2 "
             "(two files, a comma between), Karpathy or LLaVA; tar shards, as \"shards/{000..099}.tar\", of "
             "NAME.jpg and NAME.txt; or shapes, the built-in world")
    add("--images", metavar="FOLDER", help="where the pictures lie (default: beside the captions)")
    add("--val", metavar="FILE",
        help="captions to validate on, with pictures in --images, or shards (default: at most a twentieth of "
             "--data; of shards, the first)")
    add("--split-name", metavar="NAME", help="the rows of this split of --data alone, where it has splits")
    add("--val-split", metavar="NAME", help="the same of --val")
    add("--val-size", type=MANY, default=500, help="pictures to validate on, at most")
    add("--scenes", type=MANY, default=20_000, help="with the shapes world: scenes to train on")
    add("--buffer", type=COUNT, default=1000, metavar="PAIRS",
        help="with shards: pairs in memory, of which the next is drawn; 1 GB at most")
    add("--layout", default="image-text", metavar="MIX", type=without_spaces,
        help="what is learned: image-text, the caption after its picture; text-image-text, the end of a "
             "caption, after its beginning and the picture; text-image, whether a caption and the picture "
             "after it match; or a mix with weights, as in image-text:3,text-image:1")
    add("--shots", type=Number(int, 0, 1000), default=0, metavar="K",
        help="before each pair, show 0 to K others of the batch with their answers")
    add("--prefix-loss", action="store_true", help="learn the words of the prompt too, with those of --shots")
    add("--max-tokens", type=MANY, default=128, help="longest caption, tokens; longer ones are cut")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=COUNT, default=400, help="optimizer steps")
    add("--batch", type=MANY, default=64, help="pictures a step, of all processes together")
    add("--accumulate", type=COUNT,
        help="equal parts a step is computed in, to save memory (default: 1; with --data on a CPU, parts "
             "of 16)")
    add("--lr", type=RATE, default=2e-3,
        help="peak learning rate of adapter and LoRA (default: 2e-3; of a new adapter with --data, 1e-3 "
             "if it has queries, else 3e-3)")
    add("--lr-llm", type=RATE, default=1e-4, help="peak learning rate of the LLM, if --train names it")
    add("--lr-vit", type=RATE, default=1e-4, help="peak learning rate of the encoder, if --train names it")
    add("--warmup", type=Number(int, 0, 10 ** 9), default=100,
        help="steps of linear warm-up before the cosine to zero")
    add("--weight-decay", type=RATE, default=0.05, help="AdamW's, of matrices")
    add("--clip", type=Number(float, 1e-6, 10 ** 9), default=1.0, help="clip the gradient to this norm")
    add("--spell", type=Number(float, 0, 1000), metavar="W",
        help="weight of a second loss in the first 60 %% of the steps: an image's embeddings spell its first "
             "caption, a token each; for adapters with queries (default: 1 in the shapes world, else 0)")
    add("--seed", type=SEED, default=0, help="random seed of weights, order, captions drawn and scenes")

    speed = parser.add_argument_group("speed")
    add = speed.add_argument
    machine_options(speed)
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile the models' blocks (default: on a CUDA GPU, in a run of ten minutes or more)")
    add("--recompute", action="store_true",
        help="keep little of what the LLM computes for the backward pass, and compute it again: a half to a "
             "third of the memory, up to a third more time")
    add("--cache-features", action=argparse.BooleanOptionalAction,
        help="encode every picture once, up to the first block that is trained, and keep the features "
             "(default: when they take less than half of the free memory, and the steps see each picture at "
             "least once)")
    add("--features", metavar="FOLDER",
        help="keep them in a file there, to be read the next time that this encoder sees these pictures "
             "(default: in memory)")
    add("--shard", action="store_true",
        help="with torchrun: each process holds a part of the frozen LLM (FSDP2; torch 2.7 or later)")
    add("--workers", type=PROCESSES, default=min(8, CORES),
        help="processes that read pictures, for each GPU (default: one a core, at most 8)")

    add = parser.add_argument_group("files").add_argument
    add("--out", metavar="FOLDER",
        help="where the run goes (default: out/<time>-<adapter>); other files may be there, if none has the "
             "name of one that a run writes")
    add("--resume", metavar="FOLDER", help="continue the run in this folder, with its own options")
    add("--log-every", type=COUNT, default=50, help="steps between lines of progress and of metrics.jsonl")
    add("--save-every", type=COUNT,
        help="steps between validations and checkpoints (default: about a fifth of the run, at most 500); "
             "checkpoints come every ten minutes too")
    add("--tensorboard", action="store_true", help="log to the run's folder for TensorBoard too")
    add("--quiet", action="store_true", help="print the scores and errors alone")
    return parser


def read_options() -> argparse.Namespace:
    """Reads the command line. With --resume the options are the run's own; the command line may change only
    those in FREE and, without the shapes world, in MOVED. Raises InputError if options don't fit together."""
    parser = make_parser()
    args = parser.parse_args()
    if args.resume:
        args = resumed_options(args.resume, parser)
    elif args.data != "shapes" and not args.origin:
        args = options_for_captions(parser)

    # What each may say
    one_of(ADAPTERS, "adapter", args.adapter)
    layouts = layout_weights(args.layout)
    whole = [one_of(("adapter", "llm", "vit"), "part", part) for part in args.train.split(",")]
    with_lora = [one_of(("llm", "vit"), "part", part) for part in args.lora_on.split(",")]
    if args.prompt.count(IMAGE) > 1:
        raise InputError(f"--prompt takes one {IMAGE}: a caption has one picture")

    # What they mean together
    check_meaning(args, parser, meanings(args, whole, with_lora))
    args.out = args.resume or args.out
    if args.save_every is None:
        args.save_every = min(500, 50 * math.ceil(args.steps / 250))
    if args.spell is None:
        args.spell = float(args.data == "shapes" and not args.origin)
    if "adapter" not in whole and not args.origin:
        raise InputError(f"--train {args.train}: a new adapter must be trained too")
    if args.lora or args.lora_from:
        for part in with_lora:
            if part in whole:
                raise InputError(f"--train {args.train}: {part} can't be trained whole and get a LoRA")
    if args.lora and args.lora_from:
        raise InputError("--lora-from brings its own rank: leave --lora out")
    if args.shard and "llm" in whole:
        raise InputError(f"--train {args.train}: an LLM that is trained whole can't be sharded")

    # A batch
    parts = args.accumulate or 1
    if args.batch % (WORLD * parts):
        processes = f" times {WORLD} processes" if WORLD > 1 else ""
        raise InputError(f"--batch {args.batch} is no multiple of --accumulate {parts}" + processes)
    pairs = args.batch // WORLD // parts
    if pairs == 1 and is_shards(args.data) and "text-image" in layouts:
        raise InputError("--layout text-image: captions that don't match come from the pairs of shards that "
                         "are computed together, here one: take a larger --batch or a smaller --accumulate")
    if args.shots >= pairs:
        raise InputError(f"--shots {args.shots}: at most {pairs - 1}, for they come from the {pairs} pairs "
                         "that are computed together")
    return args


def meanings(args: argparse.Namespace, whole: list[str], with_lora: list[str]) -> tuple:
    """Returns the rules for `check_meaning`: names of options, whether they have an effect beside the other
    options, and what to say if not. whole, with_lora: the parts that --train and --lora-on name."""
    sizes = default_sizes(args.adapter)
    foreign = [option for option in ADAPTER_SIZES if option.removeprefix("adapter_") not in sizes]
    own = f"with --from: {args.origin} has its own"
    to = f"to the {args.adapter} adapter"
    if args.adapter == "pixelshuffle" and args.data != "shapes":
        to += " (the default with --data)"
    lora = args.lora or args.lora_from
    shapes = args.data == "shapes"
    shards = is_shards(args.data)
    kept = "features cache_features"
    return (
        ("vit llm image_size layer adapter image_position layout shots prefix_loss", not args.origin, own),
        (" ".join(ADAPTER_SIZES), not args.origin, own),
        (" ".join(foreign), False, to),
        ("spell", not args.spell or args.origin or "queries" in sizes, f"{to}, which has no queries"),
        ("split", args.origin, "without --from"),
        ("lora_alpha lora_targets lora_dropout", args.lora, "without --lora"),
        ("lora_on", lora, "without --lora or --lora-from"),
        ("lora_vit_blocks", args.lora and "vit" in with_lora, "without --lora and --lora-on vit"),
        ("lr", lora or "adapter" in whole, "where neither the adapter nor a LoRA is trained"),
        ("lr_llm", "llm" in whole, "where the LLM isn't trained whole"),
        ("lr_vit", "vit" in whole, "where the encoder isn't trained whole"),
        ("scenes", shapes, "with --data"),
        ("images val split_name", not shapes, "without --data"),
        ("images", not shards or args.val and not is_shards(args.val), "with shards, which hold their own"),
        ("val_split", args.val, "without --val"),
        ("buffer", shards, "without shards"),
        (kept, not shards, "with shards: they are more than can be kept"),
        (kept, not args.split, "with --split: a picture has more than can be kept"),
        (kept, "vit" not in whole, "where the whole encoder is trained: its features change"),
        ("features", args.cache_features is not False, "with --no-cache-features"),
        ("shard", WORLD > 1, "without torchrun"),
        ("out", not args.resume or Path(args.out or "") == Path(args.resume), "with --resume"),
    )


def options_for_captions(parser: Parser) -> argparse.Namespace:
    """The options of a run on captions of one's own, by defaults that suit them (RESULTS.md, "On
    photographs"): their LLM, unlike the built-in one, was never taught to read pictures."""
    parser.set_defaults(adapter="pixelshuffle", lora_targets="all", lora_on="")  # "": it isn't given
    args = parser.parse_args()
    whole = args.train.split(",")
    kind = one_of(ADAPTERS, "adapter", args.adapter)
    parser.set_defaults(lr=1e-3 if "queries" in default_sizes(kind) else 3e-3, lora_on="llm")

    # A new LoRA goes on the LLM and, if no option speaks against it, on the encoder's last blocks
    if "llm" not in whole and not args.lora_from:
        parser.set_defaults(lora=16)
        if "vit" not in whole and args.layer != 0 and args.lora_targets == "all" and not args.lora_on:
            parser.set_defaults(lora_on="llm,vit", lora_vit_blocks=6)
    return parser.parse_args()


def resumed_options(folder: str, parser: Parser) -> argparse.Namespace:
    """The options of the run in a folder, with those of the command line that may change. Raises
    InputError."""
    saved = saved_options(Path(folder), parser)
    parser.set_defaults(**saved)
    args = parser.parse_args()
    make_absolute(args)
    processes = read_json(Path(folder, "config.json")).get("processes", WORLD)
    if processes != WORLD:
        raise InputError(f"{folder}: a run of {processes} processes can't go on with {WORLD}: start as many")
    free = FREE if saved.get("data") == "shapes" else FREE + MOVED
    for option in parser._actions:
        name = option.dest
        begun = option.default  # as saved, or as it is by default, if an older run doesn't know it
        if name in vars(args) and name not in free and getattr(args, name) != begun:
            spelled = option.option_strings[0]
            raise InputError(f"{spelled} can't change on --resume: the run has {begun}")
    return args


def saved_options(folder: Path, parser: Parser) -> dict:
    """The options of the run in a folder, as config.json holds them. Raises InputError where it isn't one, or
    an option there has a value that the command line couldn't give it."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    path = folder / "config.json"
    saved = read_json(path).get("training")
    if not isinstance(saved, dict):
        raise InputError(f"{path}: not the folder of a run")
    with named(path):
        for name, value in saved.items():
            parser.check(name, value)
    return saved


def make_absolute(args: argparse.Namespace) -> None:
    """Has the run's files found again from any working directory."""
    for name in ("origin", "vit", "llm", "lora_from"):
        value = getattr(args, name)
        if value and os.path.exists(value) and not built_in(value):
            setattr(args, name, str(Path(value).resolve()))

    # Pictures lie beside the captions' file, not beside what a link to it means
    for name in ("data", "images", "val"):
        value = getattr(args, name)
        if not value or name == "data" and value == "shapes":
            continue
        setattr(args, name, ",".join(map(os.path.abspath, listed(value))))


# ---------------------------------------------------------------------------------------------------------
# Data and model

def caption_sets(args: argparse.Namespace) -> tuple:
    """What to train on, to validate on and, of the shapes world, the scenes with unseen pairs; None of
    others. Raises InputError."""
    if args.data == "shapes":
        return (Shapes(args.scenes, "train", args.seed), Shapes(args.val_size, "test"),
                Shapes(args.val_size, "unseen"))
    whole = args.train.split(",")
    learns = "llm" in whole or bool(args.lora or args.lora_from) and "llm" in args.lora_on.split(",")
    train = caption_data(args.data, args.images, args.buffer, args.split_name, text_only=learns)
    if args.val:
        val = caption_data(args.val, args.images, split=args.val_split).take(args.val_size, args.seed)
        return train, val.by_question(), None
    train, val = train.held_out(args.val_size, args.seed, 20)
    val.note = " (held out)"
    if not train.paths:
        one = "shard" if is_shards(args.data) else "picture"
        raise InputError(f"{args.data}: there is one {one} alone, none to validate on: give --val")
    return train, val.by_question(), None


def make_vlm(args: argparse.Namespace, device: torch.device) -> VLM:
    """The VLM that the options describe, with gradients where they ask for them."""
    # What the config of the run says: enough to build it again, and all options
    dtype = pick_precision(args.precision, device)
    args.precision = str(dtype).removeprefix("torch.")  # wherever it is resumed
    make_absolute(args)
    if args.origin:
        parts = {"from": args.origin}
    else:
        parts = dict(vit=args.vit, llm=args.llm, image_size=args.image_size, layer=args.layer,
                     adapter=args.adapter, adapter_sizes=adapter_sizes(args),
                     image_position=args.image_position)
    packages = ("torch", "numpy", "tiktoken", "safetensors", "pillow")
    versions = {name: importlib.metadata.version(name) for name in packages}
    config = dict(**parts, prompt=args.prompt, split=args.split, train=args.train.split(","),
                  layout=args.layout, processes=WORLD, training=vars(args),
                  versions=dict(python=platform.python_version(), **versions))

    # The model, and what of it learns
    vlm = build(config, dtype, config["train"])
    if args.split and not vlm.vit.preprocess.has_tiles:
        raise InputError("--split: this model has no tiles")
    if args.spell and args.origin and vlm.adapter.side is not None:
        raise InputError(f"--spell means nothing with --from {args.origin}: its adapter has no queries")
    choose_trained(vlm, args)

    # A PEFT folder may train whole parameters beside its LoRA: then that part is held in float32 too
    rounded = {name.partition(".")[0] for name, p in vlm.trained.items() if p.dtype != torch.float32}
    if rounded:
        vlm = build(config, dtype, [*config["train"], *rounded])
        choose_trained(vlm, args)
    vlm.llm.recomputes = args.recompute
    if args.shard and WORLD > 1:
        shard(vlm, device)
    return vlm.to(device).train()


def adapter_sizes(args: argparse.Namespace) -> dict:
    """All sizes of the chosen adapter: those on the command line, else its defaults."""
    sizes = default_sizes(args.adapter)
    for option in ADAPTER_SIZES:
        value, size = getattr(args, option), option.removeprefix("adapter_")
        if value is not None and size in sizes:
            sizes[size] = value
    return sizes


def choose_trained(vlm: VLM, args: argparse.Namespace) -> None:
    """Leaves gradients to the parts that --train names, and gives the backbones the LoRA that the command
    line asks for, if any."""
    # Parts that are trained whole
    for part in ("adapter", "llm", "vit"):
        for p in vlm.weights(part).values():
            p.requires_grad_(part in args.train.split(","))

    # A LoRA of PEFT's or of a run, or a new one
    parts = list(dict.fromkeys(args.lora_on.split(",")))
    read = max(vlm.vit.states_of(vlm.layer))  # how many blocks of the encoder
    if (args.lora or args.lora_from) and "vit" in parts and not read:
        raise InputError("--lora-on vit means nothing with --layer 0: no block is read")
    if args.lora_from:
        vlm.load_lora(Path(args.lora_from), parts)
    if args.lora:
        targets = "all" if args.lora_targets == "all" else args.lora_targets.split(",")
        alpha = args.lora_alpha or 2 * args.lora
        for part in parts:
            blocks = getattr(vlm, part).blocks
            if part == "vit" and args.lora_vit_blocks:  # each keeps its number, which a target may name
                last = range(max(0, read - args.lora_vit_blocks), read)
                blocks = nn.ModuleDict({str(i): blocks[i] for i in last})
            add_lora(blocks, args.lora, alpha, targets, args.lora_dropout)

    if vlm.layer is not None:  # no gradient reaches what isn't read
        for unread in (vlm.vit.blocks[read:], vlm.vit.norm, vlm.vit.neck):
            unread.requires_grad_(False)


def shard(vlm: VLM, device: torch.device) -> None:
    """Parts each block of the LLM among the processes (fully sharded data parallelism, FSDP: Zhao et al.,
    2023, arXiv:2304.11277): its frozen weights come together only while it computes. What is trained, and
    what is outside the blocks, stays whole in each."""
    from torch.distributed.fsdp import fully_shard
    mesh = dist.init_device_mesh(device.type, (WORLD,))
    parted = {p for p in vlm.llm.blocks.parameters() if not p.requires_grad}
    whole = {*vlm.parameters()} - parted
    for module in (*vlm.llm.blocks, vlm):
        fully_shard(module, mesh=mesh, ignored_params=whole)
    vlm.llm.static = False  # what the processes say to each other is no part of a CUDA graph


def check_tokens(vlm: VLM, captions) -> None:
    """Raises InputError where a text of a caption set has a token without an embedding: before the first
    step, not when its turn comes. Shards are not read through."""
    processor = vlm.processor
    if processor.no_embedding and isinstance(captions, Captions):
        for i in range(len(captions)):
            with named(captions.name(captions.pictures(i)[0]) if captions.pictures(i) else captions.file):
                for turns in captions.conversations(i):
                    for text, answer in prompted(turns, processor.prompt):
                        processor.encode(text.replace(IMAGE, ""), answer, images=0)


def compiling_pays(vlm: VLM, args: argparse.Namespace) -> bool:
    work = sum(p.numel() for p in vlm.parameters()) * args.steps * args.batch / WORLD
    return vlm.device.type == "cuda" and work >= LONG_RUN


def parts_of_a_step(args: argparse.Namespace, device: torch.device) -> int:
    """The default of --accumulate. A CPU computes captions of one's own 16 at a time: a step takes as long as
    one of 64 at once, and less than half of its memory. Shots are drawn from the same part: with shots, the
    batch stays in one part."""
    share = args.batch // WORLD
    small = device.type == "cpu" and args.data != "shapes" and not args.shots and share % 16 == 0
    return share // 16 if small else 1


# ---------------------------------------------------------------------------------------------------------
# Optimizer

def parameter_groups(vlm: VLM, args: argparse.Namespace) -> list[dict]:
    """AdamW's groups: each part's peak learning rate, and weight decay for its matrices."""
    # Parameters that agree in learning rate and weight decay are a group
    groups = collections.defaultdict(list)
    whole = args.train.split(",")
    for name, p in vlm.trained.items():
        part = name.partition(".")[0]
        peak = getattr(args, f"lr_{part}") if part in ("llm", "vit") and part in whole else args.lr
        if p.numel() == 1:  # a gate that starts shut: Adam would take 1 / lr steps to open it
            peak *= 10
        decay = args.weight_decay if p.dim() > 1 else 0.0
        groups[peak, decay].append(p)
    return [dict(params=params, peak=peak, weight_decay=decay) for (peak, decay), params in groups.items()]


def schedule(step: int, args: argparse.Namespace) -> float:
    """The learning rate as a share of its peak: linear warm-up, then a cosine to zero."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


# ---------------------------------------------------------------------------------------------------------
# A run

class Run:
    """A training run: what learns, from what, and the folder where it is kept."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        if args.out and not args.resume and not RANK:
            check_new(Path(args.out))

        # What is learned and what it is validated on
        self.train, val, self.unseen = caption_sets(args)
        self.streamed = isinstance(self.train, Shards)
        self.layouts = layout_weights(args.layout)
        self.local_batch = args.batch // WORLD  # entries of this process's share

        # The model, and whether it can read what is to be learned
        self.device = start_processes(args.device)
        if args.accumulate is None:
            args.accumulate = parts_of_a_step(args, self.device)
        torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
        torch.manual_seed(args.seed)
        self.vlm = make_vlm(args, self.device)
        for captions in (self.train, val):
            if isinstance(captions, Captions):
                captions.make_absolute()  # as they are named when the run is resumed
            captions.keep_lines = self.vlm.processor.keeps_lines
            check_tokens(self.vlm, captions)
        self.check_contents(val)

        # All that is slow, after all that may be refused
        frozen = self.vlm.frozen_blocks
        self.can_keep_features = frozen != -1 and not args.split
        if frozen == -1 and (args.features or args.cache_features):  # a LoRA of PEFT's may do that
            raise InputError(f"--lora-from {args.lora_from}: it trains what comes before the encoder's first "
                             "block: no features can be kept")
        self.make_optimizer()
        self.open_folder()
        self.encode(val)

        self.advise(val)

    def advise(self, val) -> None:
        """Tells what is likely not meant."""
        args = self.args
        if args.warmup >= args.steps:
            self.say(f"the warm-up of {args.warmup} steps doesn't end within {args.steps}: give a shorter "
                     "--warmup")
        if args.data != "shapes" and not args.val:
            if val.count < args.val_size:
                most = "the first shard has no more" if self.streamed else "a twentieth of --data at most"
                self.say(f"validates on {val.count} pictures, not on --val-size {args.val_size}: {most}")
        both = {*getattr(self.train, "paths", ())} & {*getattr(val, "paths", ())}
        if both:
            warn(f"{len(both)} pictures are in the training and in the validation set, such as {min(both)}")
        if args.data != "shapes" and not args.origin:
            for part in ("vit", "llm"):
                if getattr(args, part) == f"assets/{part}":
                    warn(f"the built-in {part} knows the shapes world alone: give --{part} another")

    def check_contents(self, val) -> None:
        """Raises InputError where a resumed run doesn't find the captions that it began with. Stamps tell, so
        that they may have moved."""
        args, config = self.args, self.vlm.config
        if args.data == "shapes":
            return
        config["contents"] = [self.train.contents(), val.contents()]
        if args.resume:
            begun = read_json(Path(args.resume, "config.json")).get("contents")
            if begun != config["contents"]:
                raise InputError(f"--data {args.data}: these are not the pictures and captions that "
                                 f"{args.resume} began with")

    def make_optimizer(self) -> None:
        """Makes the optimizer and what the steps run through: compiled blocks, several processes."""
        args, vlm = self.args, self.vlm
        if vlm.dtype == torch.float16 and self.device.type == "mps":
            raise InputError("--precision float16: on MPS train in bfloat16 or float32")
        self.fused = self.device.type != "mps"
        self.optimizer = torch.optim.AdamW(parameter_groups(vlm, args), betas=(0.9, 0.98), fused=self.fused)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=vlm.dtype == torch.float16)
        counter = self.device if self.fused else "cpu"  # who counts the steps
        for p in vlm.trained.values():  # what a checkpoint holds is known before the first step
            step = torch.zeros((), device=counter)
            self.optimizer.state[p] = dict(step=step, exp_avg=torch.zeros_like(p),
                                           exp_avg_sq=torch.zeros_like(p))
        if not args.features:  # their file is known by the encoder's weights
            vlm.pack_frozen()
        compiles = compiling_pays(vlm, args) if args.compile is None else args.compile
        if compiles and can_compile(self.device):
            vlm.compile_blocks()
        self.forward = vlm
        if WORLD > 1:  # all begin with the same weights, read or drawn from the seed
            self.forward = nn.parallel.DistributedDataParallel(vlm, init_sync=False)
        self.trained = list(vlm.trained.values())

    def open_folder(self) -> None:
        """Opens the run's folder, and takes up the run that is there, if it is resumed."""
        args, vlm = self.args, self.vlm
        adapter = vlm.config["adapter"]
        self.folder = Path(args.out or f"out/{time.strftime('%Y%m%d-%H%M%S')}-{adapter}")
        self.log = Log(self.folder, args.tensorboard)
        self.first_step, self.losses = 0, []
        if args.resume:
            self.load_checkpoint()
        elif not RANK:
            check_new(self.folder)  # again: it is this process's alone only now
        self.log.begin(self.first_step)
        count = sum(p.numel() for p in self.trained)
        self.say(f"{self.folder}: {adapter} adapter, {count:,} trained parameters, "
                 f"{vlm.adapter.queries} embeddings a picture; {self.device}, {args.precision}")

    # -----------------------------------------------------------------------------------------------------
    # The checkpoint

    def save_checkpoint(self, step: int, losses: list[torch.Tensor]) -> None:
        """Writes the one file of a run: what `VLM.from_pretrained` reads, and what --resume needs, with the
        `losses` since the last line of metrics.jsonl."""
        state = self.state(torch.tensor([loss.item() for loss in losses]))
        write_tensors(self.folder / CHECKPOINT, state, {"step": str(step)})

    def state(self, losses: torch.Tensor) -> dict[str, torch.Tensor]:
        moments = {name: self.optimizer.state[p] for name, p in self.vlm.trained.items()}
        return self.vlm.state() | resume_state(moments, self.scaler, losses)

    @torch.no_grad()
    def load_checkpoint(self) -> None:
        """Takes up what `save_checkpoint` left. A run that came to no checkpoint starts anew. Raises
        InputError where a tensor there isn't one that `save_checkpoint` would write now."""
        path = self.folder / CHECKPOINT
        if not path.is_file():
            if (self.folder / "adapter.safetensors").is_file():
                raise InputError(f"{self.folder}: a run of an older version of train.py, which can't go on")
            return
        found = read_run(path)
        said = read_metadata(path).get("step", "none")
        if not re.fullmatch("[0-9]{1,18}", said) or int(said) > self.args.steps:
            raise InputError(f"{path}: its step is {said}, not a number up to {self.args.steps}")
        self.first_step = int(said)
        losses = found.get("losses", torch.zeros(0))
        expected = torch.zeros(min(losses.numel(), self.first_step))  # so many at most since the last line
        compare(self.state(expected), found, path)
        self.losses = list(losses)

        # The weights, with those under a LoRA and its scales: --lora-from may hold others by now
        self.vlm.take(found)

        # What AdamW keeps of each, and what the scaler keeps
        for name, p in self.vlm.trained.items():
            for key, value in self.optimizer.state[p].items():
                value.copy_(found[f"{key}.{name}"])
        scaler = {key: found[f"scaler.{key}"].item() for key in self.scaler.state_dict()}
        self.scaler.load_state_dict(scaler)

    def encode(self, val) -> None:
        """Encodes the pictures whose features are kept, as far as the encoder is frozen: those to validate
        on and those to train on, if they fit. Writes config.json, which says whether the latter are kept."""
        args, vlm = self.args, self.vlm
        self.val = Encoded(vlm, val, args, self.can_keep_features and self.fit(val.count))
        keep = self.can_keep_features and not self.streamed and self.keeps_features()

        # A resumed run does the same: kept features differ in the last bits from those of a step's batch
        if not args.resume:
            args.cache_features = keep
        if not RANK and (not args.resume or args.data != "shapes"):  # --data may have moved
            write_json(self.folder / "config.json", vlm.config)

        # Pictures to train on
        self.kept_features = None
        self.unreadable = {}  # {picture: reason}
        self.entries = range(len(self.train))
        if keep:
            self.kept_features = Encoded(vlm, self.train, args)
            self.unreadable = self.kept_features.bad
            self.entries = self.kept_features.readable

        # Several layers: scale their channels by pictures to validate on, which all processes have alike
        if not self.first_step and vlm.channel_scale is not None:
            _, views = next(self.val.batches(256))
            vlm.standardise(views.x)

    def keeps_features(self) -> bool:
        """Whether the features of the pictures to train on are kept: in all processes, or in none."""
        args = self.args
        if args.cache_features is not None:
            return args.cache_features
        seen = args.steps * args.batch >= len(self.train)
        return bool(args.features) or seen and self.fit(self.train.count)

    def fit(self, pictures: int) -> bool:
        """Whether the features of so many pictures take less than half of the free memory of each process, or
        are kept in a file."""
        numbers = pictures * math.prod(self.vlm.begun_shape)
        size = numbers * self.vlm.vit.positions.dtype.itemsize
        fits = bool(self.args.features) or size < free_memory(self.device) / 2
        return bool(sum_over_processes(torch.tensor(int(fits), device=self.device)) == WORLD)

    def say(self, text: str) -> None:
        if not self.args.quiet:
            print(text, flush=True)

    # -----------------------------------------------------------------------------------------------------
    # A step

    def pictures(self):
        """Yields this process's share of each step's batch, from the first step on: indices, and features or,
        where these aren't kept, pixels, as Views."""
        # Endless batches of this process's entries
        args, size = self.args, self.local_batch
        if self.streamed:
            batches = self.train.batches(size, args.seed, self.first_step, RANK, WORLD)
        else:
            mine = slice(RANK * size, (RANK + 1) * size)
            order = shuffled(len(self.entries), args.batch, args.seed, self.first_step)
            batches = ([self.entries[i] for i in batch[mine]] for batch in order)

        # Their kept features, or their pictures, which are read as they are needed
        if self.kept_features:
            for indices in batches:
                yield indices, self.kept_features.of(indices)
        else:
            yield from read_pictures(self.vlm, self.train, batches, self.unreadable, args.workers)

    def draw(self, indices: list[int], epoch: int) -> tuple[list[Conversation], list[list[int]]]:
        """Draws a layout and shots for each entry. Returns for each its example, with the shots before it,
        and the places in `indices` of the shots and, last, of the entry itself."""
        args = self.args
        examples, orders = [], []
        for at, i in enumerate(indices):
            # Where captions that don't match come from: of shards only the batch is at hand
            others = None
            if self.streamed:
                others = indices[:at] + indices[at + 1:] or [i]

            # The shots, then the entry itself
            layout = draw_layout(self.layouts, args.seed, epoch, i)
            shown = [*draw_shots(indices, at, args.shots, args.seed, epoch), at]
            conversations = [self.arrange(layout, self.train, indices[j], epoch, others) for j in shown]
            examples.append(few_shot(conversations))
            orders.append(shown)
        return examples, orders

    def arrange(self, layout: str, captions, i: int, epoch: int = 0, others=None) -> Conversation:
        return arrange(layout, captions, i, self.args.seed, epoch, self.vlm.processor.prompt, others)

    def micro_batch(self, indices: list[int], views: Views, epoch: int, spell: float) -> Batch:
        """The texts of some entries, whose pictures have these `views`, on the device."""
        args, adapter = self.args, self.vlm.adapter
        examples, orders = self.draw(indices, epoch)
        spelled = [self.spelled(i) for i in indices] if spell else None
        queries = adapter.queries if adapter.side is None else 0  # a grid can't be put in a caption's order
        learned = (WORD, *ANSWERS) if args.prefix_loss else ANSWERS
        texts = self.vlm.processor.batch(examples, args.max_tokens, views.tiles, learned, spelled, queries,
                                         orders)
        return texts.to(self.device)

    def spelled(self, i: int) -> list[str]:
        """What the embeddings of each picture of an entry should spell: its caption, of several nothing."""
        pictures = self.train.pictures(i)
        return [self.train.conversations(i)[0][0][1]] if len(pictures) == 1 else [""] * len(pictures)

    def step(self, step: int, indices: list[int], inputs: Views) -> tuple[torch.Tensor, int]:
        """Trains on this process's share of a batch. Returns the loss of the whole batch, NaN where nothing
        changed (its gradients weren't finite, or it had no target), and how many tokens were read here."""
        args, vlm = self.args, self.vlm

        # Learning rates of this step; dropout as an unbroken run draws it
        torch.manual_seed((args.seed * 1_000_003 + step) * WORLD + RANK)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, args)

        # Texts for the pictures, in equal parts
        epoch = step if self.streamed else step * args.batch // len(self.entries)
        spell = args.spell if step < 0.6 * args.steps else 0.0
        parts = []
        for places in chunks(range(len(indices)), self.local_batch // args.accumulate) or [[]]:
            entries = [indices[i] for i in places]
            views = inputs.pick(places)
            parts.append((self.micro_batch(entries, views, epoch, spell), views))

        # Divide by the targets of the whole batch: --accumulate and more GPUs don't change the loss
        targets = sum(len(texts.targets) for texts, _ in parts)
        spell_count = sum(len(texts.spelling.targets) for texts, _ in parts if texts.spelling)
        counts = sum_over_processes(to_device(torch.tensor([targets, spell_count]), self.device))
        targets, spell_count = counts.clamp(min=1)

        # Forward and backward, part by part
        loss = torch.zeros((), device=self.device)
        for texts, views in parts:
            if WORLD > 1:  # gradients meet in the last part alone, as in DDP's no_sync
                self.forward.require_backward_grad_sync = texts is parts[-1][0]
            begun = views.x if self.kept_features else vlm.begin(views.x)
            views = views._replace(x=vlm.finish(begun))
            losses, spelling = self.forward(texts, views.pick(texts.shown).x)
            mean = losses.sum() / targets
            loss += mean.detach()
            # DDP averages the gradients of the processes: times their number they are the sum
            self.scaler.scale(WORLD * (mean + spell / spell_count * spelling.sum())).backward()

        # Update, unless a gradient isn't finite or there was nothing to learn
        self.scaler.unscale_(self.optimizer)
        broken = ~nn.utils.clip_grad_norm_(self.trained, args.clip).isfinite() | (counts[0] == 0)
        self.optimizer.found_inf = broken.float()  # the fused kernel looks, so that the CPU need not wait
        if self.fused or not broken:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(texts.tokens.numel() for texts, _ in parts)
        return sum_over_processes(loss).masked_fill(broken, torch.nan), tokens

    # -----------------------------------------------------------------------------------------------------
    # Validation. All processes validate alike: for one of them the others would have to wait

    def validate(self) -> dict[str, float]:
        """The loss of a token on the validation set, one caption a picture, whatever layouts are trained; of
        the first 100 scenes of the shapes world, the share that is captioned without an error; and how often
        it is right about which captions match, where it learns that."""
        self.vlm.eval()
        found = {"val": self.loss(self.val)}
        if self.unseen is not None:
            first = itertools.islice(self.val.batches(100), 1)
            texts = caption_set(self.vlm, self.val.captions, first)
            found["exact"] = rate(self.val.captions, texts)[0]["exact"]
        found |= self.matching(self.val)
        self.vlm.train()
        return found

    def losses_of(self, examples: list[Conversation], features: Views,
                  max_tokens: int) -> tuple[Batch, torch.Tensor]:
        """A batch of examples, a text for each entry of `features`, and the loss of each target."""
        batch = self.vlm.processor.batch(examples, max_tokens, features.tiles, (LAST,))
        losses, _ = self.forward(batch.to(self.device), features.pick(batch.shown).x)
        return batch, losses

    @torch.no_grad()
    def loss(self, data: Encoded) -> float:
        loss = count = 0
        for indices, features in data.batches(self.local_batch):
            examples = [self.arrange("image-text", data.captions, i) for i in indices]
            _, losses = self.losses_of(examples, features, self.args.max_tokens)
            loss += losses.sum().item()
            count += len(losses)
        return loss / max(1, count)

    @torch.no_grad()
    def matching(self, data: Encoded) -> dict[str, float]:
        """Returns {"matching": share}: how often the right answer to "match?" is likelier than the wrong one.
        Returns {} if no layout asks it, or if no entry is a caption."""
        if "text-image" not in self.layouts:
            return {}
        right = count = 0
        for indices, features in data.batches(self.local_batch):
            kept = [at for at, i in enumerate(indices) if is_caption(data.captions, i)]
            if not kept:
                continue
            features = features.pick(kept)
            asked = [self.arrange("text-image", data.captions, indices[at]) for at in kept]
            sums = []  # for "yes" and "no": (B,), the loss of all its tokens, for it may have several
            for answer in ("yes", "no"):
                examples = [[(text, answer)] for [(text, _)] in asked]
                batch, losses = self.losses_of(examples, features, 128)
                row = batch.target_positions.to(self.device) // batch.tokens.shape[1]
                sums.append(losses.new_zeros(len(asked)).index_add(0, row, losses))
            for says_yes, [(_, answer)] in zip((sums[0] < sums[1]).tolist(), asked):
                right += says_yes == (answer == "yes")
            count += len(kept)
        return {"matching": right / count} if count else {}

    # -----------------------------------------------------------------------------------------------------
    # The loop

    def learn(self, signals: Signals) -> None:
        """The steps that are left, with lines of progress, validations and checkpoints."""
        args = self.args
        source = self.pictures()
        progress = Progress(args)
        in_a_row = torch.zeros((), device=self.device)  # steps that changed nothing
        for step in range(self.first_step, args.steps):
            indices, inputs = next(source)
            if step == self.first_step:
                progress.begin([loss.to(self.device) for loss in self.losses])
            loss, tokens = self.step(step, indices, inputs)
            in_a_row = torch.where(loss.isnan(), in_a_row + 1, 0)  # on the device: no step waits for it
            progress.add(step, loss, WORLD * len(indices), WORLD * tokens)
            signals.unsaved = True

            # A line of progress
            save = (step + 1) % args.save_every == 0 or step + 1 == args.steps
            if save or (step + 1) % args.log_every == 0:
                line = {**progress.line(step), "lr": args.lr * schedule(step, args)}
                if in_a_row >= PATIENCE:
                    raise InputError(
                        f"{self.folder}: the last {int(in_a_row)} steps changed nothing: their gradients "
                        "were not finite (start anew with a lower --lr, a longer --warmup or --precision "
                        "float32) or there was no word to learn (look at the data and --max-tokens). The "
                        "last checkpoint, if there is one, is as it was")
                if save:
                    line |= self.validate()
                    bad = [merge_over_processes(self.unreadable), self.val.bad]
                progress.show(line)
                self.log.add(line)
                progress.begin()

            # A checkpoint
            asked, due = signals.agreed(step, self.device)
            if asked or save or due:
                if not RANK:
                    if save:
                        self.keep_best(step + 1, line["val"])
                    self.save_checkpoint(step + 1, progress.losses)
                signals.saved()
            if save and not RANK:
                self.report(bad)
            if asked:
                print(f"stopped after step {step + 1}: python train.py --resume {self.folder} goes on",
                      flush=True)
                sys.exit(128 + asked)
        source.close()
        if self.first_step == args.steps and not RANK:  # it was killed before it could
            self.report([])

    def keep_best(self, step: int, loss: float) -> None:
        """Writes the weights to best.safetensors, if no earlier validation gave so low a loss. After the last
        step it removes the file instead: the checkpoint has these weights. Call it before `save_checkpoint`:
        a run that is killed between the two repeats the steps since its last checkpoint, and this."""
        earlier = [entry["val"] for entry in self.log.entries() if entry["step"] < step and entry.get("val")]
        if loss < min(earlier, default=math.inf):
            if step < self.args.steps:
                write_tensors(self.folder / BEST, self.vlm.state(), {"step": str(step)})
            else:
                (self.folder / BEST).unlink(missing_ok=True)

    @torch.no_grad()
    def take_best(self) -> None:
        """Takes up the weights with the lowest validation loss, if they aren't the last."""
        path = self.folder / BEST
        there = torch.tensor(int(not RANK and path.is_file()), device=self.device)
        if not sum_over_processes(there):
            return
        if not RANK:
            found = read_run(path)
            compare(self.vlm.state(), found, path)
            self.say(f"{self.folder}: the lowest validation loss was that of step "
                     f"{read_metadata(path).get('step')}: scores and sample.py take its weights")
            self.vlm.take(found)
        if WORLD > 1:
            for p in self.trained:
                dist.broadcast(p, 0)

    def report(self, bad: list[dict[int, str]]) -> None:
        """Draws the curves, and lists the pictures that couldn't be read."""
        with only_warn(self.folder / "curves.png"):
            write_picture(self.folder / "curves.png", curves(self.log.entries(), self.folder.name))
        reasons = [reason for found in bad for reason in found.values()]
        if reasons:
            path = self.folder / "unreadable.txt"
            with only_warn(path, "can't be written"):
                if path.exists():  # a resumed run adds to it
                    known = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
                    reasons = [*dict.fromkeys(known + reasons)]
                write_text(path, "\n".join(reasons) + "\n")

    def score(self) -> dict[str, dict[str, float]]:
        """What it learned, as sample.py will read it: scores of its captions, which the folder keeps."""
        args, vlm, val = self.args, self.vlm, self.val.captions
        self.take_best()
        vlm.eval()
        for part in {"llm", "vit"} & {*args.train.split(",")}:
            getattr(vlm, part).to(vlm.dtype)
        sets = {"val": self.val}
        if self.unseen is not None:
            keep = self.val.kept is not None
            sets = {"test": self.val, "unseen": Encoded(vlm, self.unseen, args, keep)}

        # Examples for few-shot captions: the first entries of the validation set
        shots = Shots()
        if args.shots:
            indices, views = next(self.val.batches(args.shots))
            shots = Shots([draw_conversation(val, i, args.seed, 0) for i in indices], views)

        # Captions of each set, their scores, and the best and worst for samples.png
        scores, sections = {}, []
        for label, data in sets.items():
            texts = caption_set(vlm, data.captions, data.batches(64))
            row, ratings = rate(data.captions, texts)
            scores[f"{label} ({len(texts)})"] = row
            first = len(shots.said) if data is self.val else 0  # no entry comes before itself
            if shots.said and first < len(data.readable):
                after = caption_set(vlm, data.captions, data.batches(64, first), shots)
                scores[f"{label}, {len(shots.said)} shots ({len(after)})"] = rate(data.captions, after)[0]
            row |= self.matching(data)
            if not RANK:
                write_text(self.folder / f"captions-{label}.jsonl", as_lines(data.captions, texts))
                sections += best_and_worst(label, data.captions, texts, ratings)
        self.log.add({"step": args.steps, "embeddings": vlm.adapter.queries, "scores": scores})
        if not RANK:
            with only_warn(self.folder / "samples.png"):
                write_picture(self.folder / "samples.png", contact_sheet(sections))
            self.export_lora()
        if lost := vlm.processor.lost():
            self.say(lost)
        return scores

    def export_lora(self) -> None:
        """Writes each backbone's LoRA, if it has one, to lora/llm/ and lora/vit/ in PEFT's format, for
        others."""
        for part in ("llm", "vit"):
            module = getattr(self.vlm, part)
            if lora_layers(module):
                save_lora(module, self.folder / "lora" / part)


def main() -> None:
    training = Run(read_options())
    with contextlib.closing(training.log), Signals() as signals:
        training.learn(signals)
        scores = training.score()
    training.say(f"{training.folder}: see curves.png and samples.png; "
                 f"try it: python sample.py photo.jpg --model {training.folder}")
    print(table(scores))
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main, "--recompute, a higher --accumulate, or a smaller adapter, --batch, --max-tokens or "
              "--precision")
