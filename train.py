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
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

from adapters import ADAPTERS, IMAGE_POSITIONS, VLM, build, take_over
from data import (Captions, Shapes, Shards, Views, arrange, caption_data, cut, draw_caption, draw_layout,
                  draw_shots, few_shot, is_shards, layout_weights, listed, one_of, run, send, shuffled,
                  write_picture)
from formats.files import (InputError, guard, named, read_json, read_metadata, read_tensors, write_file,
                           write_json, write_rows, write_tensors, write_text)
from lora import add_lora
from sample import (Parser, as_lines, best_and_worst, can_compile, caption_set, contact_sheet, curves,
                    machine_options, pick_device, pick_precision, rate, table)

SIZES = {"queries": "queries", **{f"adapter_{size}": size for size in (  # option -> the adapter's argument
    "scale", "layers", "width", "heads", "every", "dropout", "text")}}
FREE = ("resume", "out", "device", "workers", "log_every", "save_every", "features", "shard", "tensorboard",
        "quiet")  # may change on --resume
PATIENCE = 10  # steps without finite gradients, one after the other, after which there is no hope
# torchrun's: which process this is of how many, and which GPU of its machine it has
RANK, WORLD, LOCAL = (int(os.environ.get(name, alone)) for name, alone in
                      (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)

    add = parser.add_argument_group("model").add_argument
    add("--from", dest="origin", metavar="NAME", help="start from a public VLM: a folder or a hub name")
    add("--vit", default="assets/vit", metavar="NAME", help="image encoder: a folder or a hub name")
    add("--llm", default="assets/llm", metavar="NAME", help="language model: a folder or a hub name")
    add("--split", action="store_true",
        help="see a picture in tiles too, as the family of --from does, which takes more time and memory")
    add("--image-size", type=int, metavar="PX",
        help="side of the squares the encoder sees (default: its own)")
    add("--layer", type=int, metavar="I",
        help="encoder's layer to read: hidden_states[I] (default: its output)")
    add("--adapter", default="qformer", metavar="KIND", help=", ".join(ADAPTERS))
    add("--queries", type=int, help="embeddings of a picture, of an adapter with queries (default: 32)")
    add("--adapter-scale", type=int, help="pixelshuffle: N × N patches become one embedding (default: 2)")
    add("--adapter-layers", type=int, help="blocks of an adapter with queries (default: 4; twoway: 2)")
    add("--adapter-width", type=int, help="its hidden size (default: 256)")
    add("--adapter-heads", type=int, help="its attention heads (default: 8)")
    add("--adapter-every", type=int,
        help="qformer: of N blocks one reads the picture; flamingo: one to N of the LLM's (default: 2)")
    add("--adapter-dropout", type=float, help="qformer: dropout after every sublayer (default: 0)")
    add("--adapter-text", type=int, nargs="?", const=32, metavar="N",
        help="qformer, twoway: read N tokens of the prompt too (default: 0; 32, if N is left out)")
    add("--image-position", default="sequence", metavar="KIND",
        type=functools.partial(one_of, IMAGE_POSITIONS, "image position"),
        help="of an image's embeddings in the LLM: sequence, as words; shared, one for all; xy, shared, plus "
             "learned row and column; sequence+xy; rope-xy, rotary row and column, where the grid is kept")
    add("--train", default="adapter", metavar="PARTS",
        help="trained whole, in float32: a list of adapter, llm, vit")
    add("--prompt", default="", metavar="TEXT",
        help="text before the caption, where the data asks no question; the picture stands where it says "
             "<image>, or first (default: none)")

    add = parser.add_argument_group("LoRA").add_argument
    add("--lora", type=int, metavar="R",
        help="train a LoRA of rank R too (default: the backbones stay frozen)")
    add("--lora-alpha", type=float, metavar="A", help="its updates are scaled by A / R (default: 2 R)")
    add("--lora-targets", default="q,v", metavar="NAMES",
        help="layers with it: q, k, v, out, gate, up, down; or all")
    add("--lora-on", default="llm", metavar="PARTS", help="llm, vit, or llm,vit")
    add("--lora-dropout", type=float, default=0.0, help="dropout of what it reads")
    add("--lora-from", metavar="FOLDER", help="begin with the LoRA in this folder: PEFT's, or a run's lora/")

    add = parser.add_argument_group("data").add_argument
    add("--data", default="shapes", metavar="FILE",
        help="captions: CSV with the header image,caption; JSON lines; COCO's or LLaVA's JSON; tar shards, "
             "as \"shards/{000..099}.tar\", of NAME.jpg and NAME.txt; or shapes, the built-in world")
    add("--images", metavar="FOLDER", help="where the pictures lie (default: beside the captions)")
    add("--val", metavar="FILE",
        help="captions to validate on, of --images too, or shards (default: a part of --data; the first "
             "shard)")
    add("--val-size", type=int, default=500, help="pictures to validate on, at most")
    add("--scenes", type=int, default=20_000, help="with the shapes world: scenes to train on")
    add("--buffer", type=int, default=1000, metavar="PAIRS",
        help="with shards: pairs in memory, of which the next is drawn")
    add("--layout", default="image-text", metavar="MIX",
        help="what is learned: image-text, the caption after its picture; text-image-text, the rest of a "
             "caption around it; text-image, whether the two match; a mix, as in image-text:3,text-image:1")
    add("--shots", type=int, default=0, metavar="K",
        help="0 to K other pairs of the batch come solved before each")
    add("--prefix-loss", action="store_true", help="learn the words before the picture, and shots, too")
    add("--max-tokens", type=int, default=128, help="longest caption, tokens; longer ones are cut")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, default=700, help="optimizer steps")
    add("--batch", type=int, default=64, help="pictures a step, of all processes together")
    add("--accumulate", type=int, default=1, help="equal parts a step is computed in, to save memory")
    add("--lr", type=float, default=1e-3, help="peak learning rate of adapter and LoRA")
    add("--lr-llm", type=float, default=1e-4, help="that of the LLM, if trained whole")
    add("--lr-vit", type=float, default=1e-4, help="that of the encoder, if trained whole")
    add("--warmup", type=int, default=100, help="steps of linear warm-up before the cosine to zero")
    add("--weight-decay", type=float, default=0.05, help="AdamW's, of matrices")
    add("--clip", type=float, default=1.0, help="longest gradient, Euclidean norm")
    add("--spell", type=float, metavar="W",
        help="weight of a second loss in the first 60 %% of the steps: an image's embeddings spell its first "
             "caption, a token each; for adapters with queries (default: 1 in the shapes world, else 0)")
    add("--seed", type=int, default=0, help="of weights, order, captions drawn, scenes")

    speed = parser.add_argument_group("speed")
    add = speed.add_argument
    machine_options(speed)
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile the models' blocks (default: on a CUDA GPU, in a run of ten minutes or more)")
    add("--recompute", action="store_true",
        help="keep little of what the LLM computes for the backward pass, and compute it again: a third more "
             "time for a fraction of the memory")
    add("--cache-features", action=argparse.BooleanOptionalAction,
        help="encode every picture once and keep the features (default: when they take less than half of the "
             "free memory, and the steps see each picture at least once)")
    add("--features", metavar="FOLDER",
        help="keep them in a file there, to be read the next time that this encoder sees these pictures "
             "(default: in memory)")
    add("--shard", action="store_true",
        help="with torchrun: each process holds a part of the frozen LLM (FSDP2; torch 2.7 or later)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="processes that read pictures, for each GPU (default: one a core, at most 8)")

    add = parser.add_argument_group("files").add_argument
    add("--out", metavar="FOLDER", help="where the run goes (default: out/<time>-<adapter>)")
    add("--resume", metavar="FOLDER", help="continue the run in this folder, with its own options")
    add("--log-every", type=int, default=50, help="steps between lines of progress and of metrics.jsonl")
    add("--save-every", type=int, default=500, help="steps between validations and checkpoints")
    add("--tensorboard", action="store_true", help="log to the run's folder for TensorBoard too")
    add("--quiet", action="store_true", help="print the scores and errors alone")
    return parser


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def saved_options(folder: Path, parser: argparse.ArgumentParser) -> dict:
    """The options of the run in a folder, as config.json holds them. Raises InputError where it isn't one,
    or an option there has a value that the command line couldn't give it."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    path = folder / "config.json"
    saved, options = read_json(path).get("training"), {action.dest: action for action in parser._actions}
    if not isinstance(saved, dict):
        raise InputError(f"{path}: not the folder of a run")
    for name, value in saved.items():
        if option := options.get(name):
            kinds = {int: int, float: (int, float)}.get(option.type, bool if option.nargs == 0 else str)
        if not option or not (isinstance(value, kinds) or value is option.default is None):
            raise InputError(f"{path}: {name} can't be {value!r}")
    return saved


def make_absolute(args: argparse.Namespace) -> None:
    """Has the run's files found again from any working directory."""
    for name in ("origin", "vit", "llm", "data", "images", "val", "lora_from"):
        if (value := getattr(args, name)) and Path(value).exists() and not value.startswith("assets/"):
            setattr(args, name, str(Path(value).resolve()))
        elif value and is_shards(value):
            setattr(args, name, ",".join(map(os.path.abspath, listed(value))))


def read_options() -> argparse.Namespace:
    """The command line; with --resume, the run's own options, which the command line may only repeat."""
    parser = make_parser()
    args = parser.parse_args()
    if args.resume:
        saved = saved_options(Path(args.resume), parser)
        parser.set_defaults(**saved)
        args = parser.parse_args()
        make_absolute(args)
        processes = read_json(Path(args.resume, "config.json")).get("processes", WORLD)
        if processes != WORLD:
            raise InputError(f"{args.resume}: a run of {processes} processes can't go on with {WORLD}: "
                             "start as many")
        for option in parser._actions:
            name, spelled = option.dest, option.option_strings[0]
            if name in saved.keys() - {*FREE} and getattr(args, name) != saved[name]:
                raise InputError(f"{spelled} can't change on --resume: the run has {saved[name]}")
        args.out = args.resume
    if args.origin:
        for name in ("vit", "llm", "image_size", "layer", "adapter", "image_position", "layout", "shots",
                     "prefix_loss", *SIZES):
            if getattr(args, name) != parser.get_default(name):
                raise InputError(f"{flag(name)} means nothing with --from: {args.origin} has its own")
    layout_weights(args.layout)
    whole = [one_of(("adapter", "llm", "vit"), "part", part) for part in args.train.split(",")]
    if "adapter" not in whole and not args.origin:
        raise InputError(f"--train {args.train}: a new adapter must be trained too")
    if args.spell is None:
        args.spell = float(args.data == "shapes" and not args.origin)
    for part in args.lora_on.split(","):
        one_of(("llm", "vit"), "part", part)
    if (args.lora or args.lora_from) and (both := {*whole} & {*args.lora_on.split(",")}):
        raise InputError(f"--train {args.train}: {both.pop()} can't be trained whole and get a LoRA")
    if args.shard and "llm" in whole:
        raise InputError(f"--train {args.train}: an LLM that is trained whole can't be parted by --shard")
    if args.lora and args.lora_from:
        raise InputError("--lora-from brings its own rank: leave --lora out")
    one_of(ADAPTERS, "adapter", args.adapter)
    for name in ("steps", "batch", "accumulate", "scenes", "val_size", "buffer", "max_tokens", "log_every",
                 "save_every"):
        if getattr(args, name) < 1:
            raise InputError(f"{flag(name)} must be at least 1, not {getattr(args, name)}")
    if args.batch % (WORLD * args.accumulate):
        raise InputError(f"--batch {args.batch} can't be cut in --accumulate {args.accumulate} equal parts"
                         + f" in each of {WORLD} processes" * (WORLD > 1))
    if not 0 <= args.shots < args.batch // WORLD // args.accumulate:
        raise InputError(f"--shots {args.shots}: from 0 to what a batch (or part of it) has beside each pair")
    return args


def caption_sets(args: argparse.Namespace) -> tuple:
    """What to train on, to validate on and, of the shapes world, the scenes with unseen pairs; None of
    others. Raises InputError."""
    if args.data == "shapes":
        return (Shapes(args.scenes, "train", args.seed), Shapes(args.val_size, "test"),
                Shapes(args.val_size, "unseen"))
    train = caption_data(args.data, args.images, args.buffer)
    if args.val:
        return train, caption_data(args.val, args.images).held_out(args.val_size, args.seed)[1], None
    train, val = train.held_out(args.val_size, args.seed, 20)
    if not train.paths:
        one = "shard" if is_shards(args.data) else "picture"
        raise InputError(f"{args.data}: one {one} can't be parted in training and validation: give --val")
    return train, val, None


def check_tokens(vlm: VLM, captions) -> None:
    """Raises InputError where a text of a caption set has a token without an embedding: before the first
    step, not when its turn comes. Shards are not read through."""
    if vlm.no_embedding and isinstance(captions, Captions):
        for i in range(len(captions)):
            with named(captions.name(i)):
                for question, caption in captions.pairs(i):
                    vlm.encode(vlm.prompt_for(question), caption)


def adapter_sizes(args: argparse.Namespace) -> dict:
    """All sizes of the chosen adapter: those on the command line, else its defaults."""
    sizes = dict(ADAPTERS[args.adapter].__init__.__kwdefaults__ or {})
    for option, size in SIZES.items():
        if (value := getattr(args, option)) is not None:
            if size not in sizes:
                raise InputError(f"{flag(option)} means nothing to the {args.adapter} adapter")
            if value < (least := 0 if size in ("dropout", "text") else 1):
                raise InputError(f"{flag(option)} must be at least {least}, not {value}")
            sizes[size] = value
    return sizes


def choose_trained(vlm: VLM, args: argparse.Namespace) -> None:
    """Leaves gradients to the parts that --train names, and gives the backbones the LoRA that the command
    line asks for, if any."""
    for part in ("adapter", "llm", "vit"):
        for p in vlm.weights(part).values():
            p.requires_grad_(part in args.train.split(","))
    parts = args.lora_on.split(",")
    if args.lora_from:
        vlm.load_lora(Path(args.lora_from), parts)
    for part in parts if args.lora is not None else ():
        targets = "all" if args.lora_targets == "all" else args.lora_targets.split(",")
        add_lora(getattr(vlm, part).blocks, args.lora, args.lora_alpha or 2 * args.lora, targets,
                 args.lora_dropout)
    if (layer := vlm.config.get("layer")) is not None:  # no gradient reaches what isn't read
        blocks = vlm.vit.blocks
        for unread in (blocks[layer % (len(blocks) + 1):], vlm.vit.norm, vlm.vit.neck):
            unread.requires_grad_(False)


def spread(vlm: VLM, device: torch.device) -> None:
    """Parts each block of the LLM among the processes (fully sharded data parallelism, FSDP: Zhao et al.,
    2023, arXiv:2304.11277): its frozen weights come together only while it computes. What is trained, and
    what is outside the blocks, stays whole in each."""
    from torch.distributed.fsdp import fully_shard
    mesh = dist.init_device_mesh(device.type, (WORLD,))
    whole = {*vlm.parameters()} - {p for p in vlm.llm.blocks.parameters() if not p.requires_grad}
    for module in (*vlm.llm.blocks, vlm):
        fully_shard(module, mesh=mesh, ignored_params=whole)
    vlm.llm.static = False  # what the processes say to each other is no part of a CUDA graph


def parameter_groups(vlm: VLM, args: argparse.Namespace) -> list[dict]:
    """AdamW's groups: each part's peak learning rate, and weight decay for its matrices."""
    groups = collections.defaultdict(list)
    for name, p in vlm.trained.items():
        part = name.partition(".")[0]
        peak = getattr(args, f"lr_{part}") if part in {"llm", "vit"} & {*args.train.split(",")} else args.lr
        if p.numel() == 1:  # a gate that starts shut: Adam would take 1 / lr steps to open it
            peak *= 10
        groups[peak, args.weight_decay if p.dim() > 1 else 0.0].append(p)
    return [dict(params=params, peak=peak, weight_decay=decay) for (peak, decay), params in groups.items()]


def schedule(step: int, args: argparse.Namespace) -> float:
    """The learning rate as a share of its peak."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


def free_memory(device: torch.device) -> int:
    """Bytes of memory that are free on the device; 4 GiB where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 4 << 30


# Pictures × parameters from which on a run takes ten minutes of an H100 or more. Compiling takes one or two,
# and saves a fifth.
LONG_RUN = 1e14


def compiling_pays(vlm: VLM, args: argparse.Namespace) -> bool:
    work = sum(p.numel() for p in vlm.parameters()) * args.steps * args.batch / WORLD
    return vlm.device.type == "cuda" and work >= LONG_RUN


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over the processes, in its place."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def united(bad: dict[int, str]) -> dict[int, str]:
    """The pictures that this and the other processes couldn't read."""
    found = [bad] * WORLD
    if WORLD > 1:
        dist.all_gather_object(found, bad)
    return {i: reason for part in found for i, reason in part.items()}


class Encoded:
    """A caption set whose pictures are encoded; those in `bad` {index: reason} can't be read. With `keep`
    that is done once, each process its share, and `features` (P,N,Dv) are those of all, zeros of the bad
    ones; else whenever they are asked for."""

    def __init__(self, vlm: VLM, captions, args: argparse.Namespace, keep: bool = True):
        self.vlm, self.captions, self.args, self.bad, self.features = vlm, captions, args, {}, None
        if keep:
            self.encode()

    def encode(self) -> None:
        """Computes the features, or with --features takes them from a file, which may be there already."""
        vlm, captions, args = self.vlm, self.captions, self.args
        shape = (len(captions), *vlm.feature_shape)
        if not args.features:
            self.features = torch.zeros(shape, dtype=vlm.vit.positions.dtype, device=vlm.device)
            for chunk, rows in self.encoded():
                self.features[chunk[0]:chunk[-1] + 1] = rows
        else:
            path = Path(args.features, f"{self.key()}.safetensors")
            if total(torch.tensor(path.is_file(), device=vlm.device, dtype=torch.int)) < WORLD:
                def write(file: Path) -> None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_rows(file, shape, vlm.vit.positions.dtype, (rows for _, rows in self.encoded()),
                               lambda: [i not in self.bad for i in range(len(captions))])

                if LOCAL:  # one process on each machine writes
                    collections.deque(self.encoded(), 0)
                else:
                    write_file(path, write)
                total(torch.zeros(1, device=vlm.device))  # the file is there
            found = read_tensors(path)
            rows = found["rows"]  # read from the disk when they are asked for, unless a GPU has room for all
            self.features = rows.to(vlm.device) if rows.nbytes < free_memory(vlm.device) / 2 else rows
            for i in (~found["marks"]).nonzero().flatten().tolist():
                self.bad.setdefault(i, f"{captions.name(i)}: couldn't be read")

    def encoded(self):
        """Yields indices and their features, chunk by chunk."""
        vlm, captions, args, start = self.vlm, self.captions, self.args, time.time()
        chunks = cut(range(len(captions)), 64 * WORLD)
        mine = vlm.encode_pictures(captions, [chunk[RANK::WORLD] for chunk in chunks], self.bad, args.workers)
        for chunk, (indices, features) in zip(chunks, mine):
            rows = torch.zeros(len(chunk), *vlm.feature_shape, dtype=vlm.vit.positions.dtype,
                               device=vlm.device)
            if indices:
                rows[[i - chunk[0] for i in indices]] = features.x
            total(rows.view(torch.uint8))  # of zeros and one process's bytes: exact in any dtype
            yield chunk, rows
        self.bad.update(united(self.bad))
        if not args.quiet:
            count, seconds = len(captions) - len(self.bad), time.time() - start
            print(f"encoded {count} pictures in {seconds:.0f} s", flush=True)

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
        batches, vlm = cut(self.readable[first:], size), self.vlm
        found = (vlm.encode_pictures(self.captions, batches, self.bad, self.args.workers)
                 if self.features is None else ((indices, self.of(indices)) for indices in batches))
        yield from (batch for batch in found if batch[0])


def save_checkpoint(folder: Path, step: int, vlm: VLM, optimizer, scaler, losses: list[torch.Tensor]) -> None:
    """Writes state.safetensors for --resume, complete in itself, with the `losses` since the last line of
    metrics.jsonl; then what `VLM.from_pretrained` reads, see `VLM.catch_up`."""
    state = {f"{key}.{name}": value for name, p in vlm.trained.items()
             for key, value in {"weight": p, **optimizer.state[p]}.items()}
    state |= {f"scaler.{key}": torch.tensor(value) for key, value in scaler.state_dict().items()}
    state["losses"] = torch.tensor([loss.item() for loss in losses])
    write_tensors(folder / "state.safetensors", state, {"step": str(step)})
    vlm.save(folder, step)


def load_checkpoint(folder: Path, vlm: VLM, optimizer, scaler) -> tuple[int, list[torch.Tensor]]:
    """Takes up what `save_checkpoint` left; returns the number of steps done, and the losses since the last
    line. A run that came to no checkpoint starts anew."""
    path = folder / "state.safetensors"
    if not path.is_file() and not (folder / "adapter.safetensors").is_file():
        return 0, []
    with guard(path, "not a whole checkpoint"):
        step, state = int(read_metadata(path)["step"]), read_tensors(path)
        take_over(vlm.trained, read_tensors(path, "weight."), path)
        for name, p in vlm.trained.items():
            optimizer.state[p] = {key: state[f"{key}.{name}"].to(p.device)
                                  for key in ("step", "exp_avg", "exp_avg_sq")}
            if not optimizer.defaults["fused"]:  # then the CPU counts, and would wait for each
                optimizer.state[p]["step"] = state[f"step.{name}"]
        scaler.load_state_dict({key: state[f"scaler.{key}"].item() for key in scaler.state_dict()})
        if not RANK:
            vlm.save(folder, step)  # which may be of an earlier one, see `VLM.catch_up`
        return step, list(state["losses"])


class Log:
    """A run's metrics.jsonl, and TensorBoard's if asked for. Makes the folder, and until it is closed keeps
    others from training in it. Of torchrun's processes the first alone writes. Raises InputError."""

    def __init__(self, folder: Path, tensorboard: bool = False):
        self.file = self.writer = self.board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.writer = SummaryWriter
            except ImportError:
                raise InputError("--tensorboard needs its package: pip install tensorboard") from None
        if RANK:
            return
        with guard(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # to close another handle of it would give up the lock
            self.file = (folder / "metrics.jsonl").open("ab+", buffering=0)
            try:
                if os.name == "nt":
                    import msvcrt
                    self.file.seek(1 << 30)  # where no one reads
                    msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    import fcntl
                    fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's a worker would inherit
            except (BlockingIOError, PermissionError):
                raise InputError(f"{folder}: another process is training in it") from None
            for left in folder.rglob(".*tmp*"):  # by a process that was killed
                left.unlink()

    def begin(self, step: int) -> None:
        """Takes off what came after `step`, and the scores."""
        if RANK:
            return

        def stays(line: bytes) -> bool:
            try:
                entry = json.loads(line)
                return entry["step"] <= step and "scores" not in entry
            except (ValueError, LookupError, TypeError):  # cut short, or no line of ours
                return False

        with guard(self.file.name):
            self.file.seek(0)
            lines = self.file.read().splitlines(keepends=True)
            self.file.truncate(sum(map(len, itertools.takewhile(stays, lines))))
        if self.writer:
            self.board = self.writer(Path(self.file.name).parent, purge_step=step)

    def add(self, entry: dict) -> None:
        """Adds a line, on the disk when this returns. What isn't finite becomes null."""
        if RANK:
            return
        entry = {key: None if value != value else value for key, value in entry.items()}
        line = json.dumps(entry).encode() + b"\n"
        with guard(self.file.name):
            if self.file.write(line) != len(line):
                raise InputError(f"{self.file.name}: no space left for a line")
            os.fsync(self.file.fileno())
        for label, row in {"": entry, **entry.get("scores", {})}.items() if self.board else ():
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(f"{label}/{name}".lstrip("/"), value, entry["step"])

    def entries(self) -> list[dict]:
        self.file.seek(0)
        return [json.loads(line) for line in self.file.read().splitlines()]

    def close(self) -> None:
        for one in filter(None, (self.file, self.board)):
            one.close()


class Signals:
    """Ctrl-C, or a cluster's SIGTERM: ends the process at once where no step would be lost, or the second
    time; else `asked` is the signal, for the loop to see once the step is done."""

    def __init__(self):
        self.unsaved, self.asked = False, 0

    def __call__(self, number: int, frame) -> None:
        if self.asked or not self.unsaved:
            raise SystemExit(128 + number)
        self.asked = number

    def agreed(self, step: int, device: torch.device) -> int:
        """What was asked of any process of torchrun's, 0 if nothing. So as not to wait for each other in
        every step, several look every tenth alone."""
        if WORLD == 1:
            return self.asked
        if step % 10 < 9:
            return 0
        asked = torch.tensor(self.asked, device=device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return asked.item()

    def __enter__(self) -> "Signals":
        self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Progress:
    """What happened since the last line: mean loss, speed, time left; on a terminal, shown twice a second."""

    def __init__(self, args: argparse.Namespace):
        self.steps, self.quiet, self.terminal, self.drawn = args.steps, args.quiet, sys.stdout.isatty(), 0.0
        self.begin()

    def begin(self, losses: list[torch.Tensor] = ()) -> None:
        self.start, self.losses, self.images, self.tokens = time.time(), [*losses], 0, 0

    def add(self, step: int, loss: torch.Tensor, images: int, tokens: int) -> None:
        self.losses.append(loss)
        self.images, self.tokens = self.images + images, self.tokens + tokens
        if self.terminal and time.time() - self.drawn > 0.5:
            self.show(self.line(step), "\r")

    def line(self, step: int) -> dict:
        seconds, losses = time.time() - self.start, torch.stack(self.losses)
        skipped = losses.isnan().sum().item()
        return {"step": step + 1, "loss": losses.nanmean().item(),
                **({"skipped": skipped} if skipped else {}),
                "images_per_s": self.images / seconds, "tokens_per_s": self.tokens / seconds,
                "s_left": (self.steps - step - 1) * seconds / len(self.losses)}

    def show(self, line: dict, end: str = "\n") -> None:
        if self.quiet:
            return
        self.drawn = time.time()
        minutes, seconds = divmod(round(line["s_left"]), 60)
        print(f"step {line['step']}/{self.steps}  loss {line['loss']:.4f}  "
              + "".join(f"{name} {line[name]:.4f}  " for name in ("val", "matching") if name in line)
              + (f"{line['skipped']} steps skipped: not finite  " if "skipped" in line else "") +
              f"{line['images_per_s']:.0f} images/s  {line['tokens_per_s']:.0f} tokens/s  "
              f"{minutes}:{seconds:02d} left" + " " * 8 * self.terminal, end=end, flush=True)


# ---------------------------------------------------------------------------------------------------------
# A run

def start_processes(name: str) -> torch.device:
    """Meets torchrun's other processes, if this isn't alone; of all the first prints. Returns the device of
    this one, for the --device `name`."""
    if WORLD > 1 and torch.cuda.is_available() and name != "cpu":
        torch.cuda.set_device(LOCAL)  # which "cuda" means from here on
    device = pick_device(name)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w")
    return device


def make_vlm(args: argparse.Namespace, device: torch.device) -> VLM:
    """The VLM that the options describe, with gradients where they ask for them."""
    dtype = pick_precision(args.precision, device)
    args.precision = str(dtype).removeprefix("torch.")  # wherever it is resumed
    make_absolute(args)
    parts = {"from": args.origin} if args.origin else dict(
        vit=args.vit, llm=args.llm, image_size=args.image_size, layer=args.layer, adapter=args.adapter,
        adapter_sizes=adapter_sizes(args), image_position=args.image_position)
    versions = {name: importlib.metadata.version(name) for name in (
        "torch", "numpy", "tiktoken", "safetensors", "pillow")}
    config = dict(**parts, prompt=args.prompt, split=args.split, train=args.train.split(","),
                  layout=args.layout, processes=WORLD, training=vars(args),
                  versions=dict(python=platform.python_version(), **versions))
    vlm = build(config, dtype, config["train"])
    if args.split and "max_image_size" not in vlm.vit.preprocess.settings:
        raise InputError("--split: this model sees every picture as a whole alone")
    choose_trained(vlm, args)
    vlm.llm.recomputes = args.recompute
    if args.shard and WORLD > 1:
        spread(vlm, device)
    return vlm.to(device).train()


class Run:
    """A training run: what learns, from what, and the folder where it is kept."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.train, val, unseen = caption_sets(args)
        self.streamed, self.device = isinstance(self.train, Shards), start_processes(args.device)
        torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
        torch.manual_seed(args.seed)
        self.vlm = vlm = make_vlm(args, self.device)
        for captions in (self.train, val):
            check_tokens(vlm, captions)
        fixed = not args.split and not any(p.requires_grad for p in vlm.vit.parameters())
        if (args.cache_features or args.features) and (self.streamed or not fixed):
            why = ("shards are streamed, more than can be kept" if self.streamed else
                   "with --split a picture has more than can be kept" if args.split else
                   "the encoder is trained, so that its features change")
            raise InputError(f"--{'cache-' * (not args.features)}features: {why}")
        self.fused, self.layouts = self.device.type != "mps", layout_weights(args.layout)
        self.optimizer = torch.optim.AdamW(parameter_groups(vlm, args), betas=(0.9, 0.98), fused=self.fused)
        if vlm.dtype == torch.float16 and self.device.type == "mps":
            raise InputError("--precision float16: on MPS train in bfloat16 or float32")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=vlm.dtype == torch.float16)
        if (compiling_pays(vlm, args) if args.compile is None else args.compile) and can_compile(self.device):
            vlm.compile_blocks()
        # all begin with the same weights, read or drawn from the seed
        self.forward = nn.parallel.DistributedDataParallel(vlm, init_sync=False) if WORLD > 1 else vlm
        self.trained = list(vlm.trained.values())
        self.size = args.batch // WORLD  # of this process's share of a batch

        self.folder = Path(args.out or f"out/{time.strftime('%Y%m%d-%H%M%S')}-{vlm.config['adapter']}")
        self.log, self.first, self.losses = Log(self.folder, args.tensorboard), 0, []
        if args.resume:
            self.first, self.losses = load_checkpoint(self.folder, vlm, self.optimizer, self.scaler)
        elif not RANK and (self.folder / "config.json").exists():
            raise InputError(f"{self.folder}: there is a run already: --resume it, or give another --out")
        self.log.begin(self.first)
        self.say(f"{self.folder}: {vlm.config['adapter']} adapter, "
                 f"{sum(p.numel() for p in vlm.trained.values()):,} trained parameters, "
                 f"{vlm.adapter.queries} embeddings a picture; {self.device}, {args.precision}")

        self.val, self.unseen = Encoded(vlm, val, args, fixed), unseen
        cache = self.cache_features() if fixed and not self.streamed else False
        if not args.resume and not RANK:
            args.cache_features = cache  # for good: kept features differ from others in the last bits
            write_json(self.folder / "config.json", vlm.config)
        self.kept = Encoded(vlm, self.train, args) if cache else None
        self.bad = self.kept.bad if self.kept else {}  # {index: reason} of what can't be read

    def say(self, text: str) -> None:
        if not self.args.quiet:
            print(text, flush=True)

    def cache_features(self) -> bool:
        """Whether the features of the pictures to train on are kept: in all processes, or in none."""
        args, cache = self.args, self.args.cache_features
        if cache is None:
            size = len(self.train) * self.val.features[0].nbytes
            cache = args.steps * args.batch >= len(self.train) and bool(
                args.features or size < free_memory(self.device) / 2)
            cache = bool(total(torch.tensor(int(cache), device=self.device)) == WORLD)
        return cache

    def pictures(self):
        """Yields this process's share of each step's batch, from step `first` on: indices, and features or,
        where these aren't kept, pixels, as Views."""
        args, size = self.args, self.size
        mine = slice(RANK * size, RANK * size + size)
        if self.kept:
            readable = self.kept.readable
            for batch in shuffled(len(readable), args.batch, args.seed, self.first):
                indices = [readable[i] for i in batch[mine]]
                yield indices, self.kept.of(indices)
        batches = (self.train.batches(size, args.seed, self.first, RANK, WORLD) if self.streamed else
                   (batch[mine] for batch in shuffled(len(self.train), args.batch, args.seed, self.first)))
        for indices, views in self.vlm.read_pictures(self.train, batches, self.bad, args.workers):
            if indices:
                yield indices, views

    def draw(self, indices: list[int], epoch: int) -> tuple[list[tuple[str, str]], list[int], list[str]]:
        """A text and its answer for each picture to train on, in a layout that is drawn, after its shots; of
        the pictures of all texts, in their order, where they are in `indices`, and what they are to spell."""
        args, examples, order = self.args, [], []
        others = indices if self.streamed else None
        for at, i in enumerate(indices):
            layout = draw_layout(self.layouts, args.seed, epoch, i)
            shown = [*draw_shots(indices, at, args.shots, args.seed, epoch), at]
            examples.append(few_shot([self.arrange(layout, self.train, indices[j], epoch, others)
                                      for j in shown]))
            order += shown
        captions = [self.train.pairs(indices[j])[0][1] for j in order] if self.args.spell else []
        return examples, order, captions

    def step(self, step: int, indices: list[int], inputs: Views) -> tuple[torch.Tensor, int]:
        """Trains on this process's share of a batch. Returns the loss of the whole, NaN where its gradients
        weren't finite and changed nothing, and how many tokens were read here."""
        args, vlm = self.args, self.vlm
        # of dropout: a resumed run draws what an unbroken one draws
        torch.manual_seed((args.seed * 1_000_003 + step) * WORLD + RANK)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, args)
        epoch = step if self.streamed else step * args.batch // len(self.train)
        spell = args.spell * (step < 0.6 * args.steps)
        batches = []
        for part in cut(range(len(indices)), self.size // args.accumulate):
            views = inputs.pick(part)
            examples, order, captions = self.draw([indices[i] for i in part], epoch)
            text = vlm.batch(examples, args.max_tokens, (views.tiles[i] for i in order), args.prefix_loss)
            batches.append((text, views, order, vlm.spelling(captions if spell else [])))
        counts = torch.tensor([sum(len(text.targets) for text, *_ in batches),
                               sum(len(letters) for *_, (_, letters) in batches)])
        # targets of the whole batch; tokens to be spelled
        count, letters = total(send(counts, self.device)).clamp(min=1)
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            if WORLD > 1:  # gradients meet in the last part alone, as in DDP's no_sync
                self.forward.require_backward_grad_sync = batch is batches[-1]
            text, views, order, spelling = batch
            if not self.kept:
                views = views._replace(x=vlm.features(views.x))
            nats, spelled = self.forward(text.tokens, views.pick(order).x, text.where, text.targets,
                                         text.pictures, spelling)
            nats = nats.sum() / count
            loss += nats.detach()
            # DDP takes the mean over the processes
            self.scaler.scale(WORLD * (nats + spell / letters * spelled.sum())).backward()
        self.scaler.unscale_(self.optimizer)
        broken = ~nn.utils.clip_grad_norm_(self.trained, args.clip).isfinite()
        self.optimizer.found_inf = broken.float()  # the fused kernel looks, so that the CPU need not wait
        if self.fused or not broken:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total(loss).masked_fill(broken, torch.nan), sum(text.tokens.numel() for text, *_ in batches)

    def arrange(self, layout: str, captions, i: int, epoch: int = 0, others=None) -> tuple[str, str]:
        return arrange(layout, captions, i, self.args.seed, epoch, self.vlm.prompt_for, others)

    # All processes validate alike: for one of them the others would have to wait.
    def validate(self) -> dict[str, float]:
        """Nats a token on the validation set, one caption a picture, whatever layouts are trained; and how
        often it is right about which captions match, where it learns that."""
        self.vlm.eval()
        found = {"val": self.loss(self.val)}
        if "text-image" in self.layouts:
            found["matching"] = self.matching(self.val)
        self.vlm.train()
        return found

    @torch.no_grad()
    def loss(self, data: Encoded) -> float:
        nats = count = 0
        for indices, features in data.batches(self.size):
            examples = [self.arrange("image-text", data.captions, i) for i in indices]
            text = self.vlm.batch(examples, self.args.max_tokens, iter(features.tiles))
            nats += self.forward(text.tokens, features.x, *text[1:]).sum().item()
            count += len(text.targets)
        return nats / count

    @torch.no_grad()
    def matching(self, data: Encoded) -> float:
        """How often the right one of "yes" and "no" is the likelier answer to "match?"."""
        right = 0
        for indices, features in data.batches(self.size):
            asked = [self.arrange("text-image", data.captions, i) for i in indices]
            losses = []  # of all tokens of an answer, (B,): not every tokenizer has one for it
            for answer in ("yes", "no"):
                batch = self.vlm.batch([(text, answer) for text, _ in asked])
                nats = self.forward(batch.tokens, features.x, *batch[1:])
                row = batch.where // batch.tokens.shape[1]
                losses.append(nats.new_zeros(len(asked)).index_add(0, row, nats))
            yes = (losses[0] < losses[1]).tolist()
            right += sum(said == (answer == "yes") for said, (_, answer) in zip(yes, asked))
        return right / len(data.readable)

    def learn(self, signals: Signals) -> None:
        """The steps that are left, with lines of progress, validations and checkpoints."""
        args, folder, source, in_a_row = self.args, self.folder, self.pictures(), 0
        progress = Progress(args)
        for step in range(self.first, args.steps):
            indices, inputs = next(source)
            if step == self.first:
                progress.begin([loss.to(self.device) for loss in self.losses])
            loss, tokens = self.step(step, indices, inputs)
            in_a_row = (in_a_row + 1) * loss.isnan()
            progress.add(step, loss, WORLD * len(indices), WORLD * tokens)
            signals.unsaved = True
            save = (step + 1) % args.save_every == 0 or step + 1 == args.steps
            if save or (step + 1) % args.log_every == 0:
                line = {**progress.line(step), "lr": args.lr * schedule(step, args)}
                if in_a_row >= PATIENCE:
                    raise InputError(
                        f"{folder}: the gradients of the last {in_a_row:.0f} steps were not finite: start "
                        "anew with a lower --lr, a longer --warmup or --precision float32 (the last "
                        "checkpoint, if there is one, is as it was)")
                if save:
                    line |= self.validate()
                    found = [united(self.bad), self.val.bad]
                progress.show(line)
                self.log.add(line)
                if save and not RANK:
                    write_picture(folder / "curves.png", curves(self.log.entries(), folder.name))
                    if reasons := [f"{reason}\n" for bad in found for reason in bad.values()]:
                        write_text(folder / "unreadable.txt", "".join(reasons))
                progress.begin()
            if (asked := signals.agreed(step, self.device)) or save:
                if not RANK:
                    save_checkpoint(folder, step + 1, self.vlm, self.optimizer, self.scaler, progress.losses)
                signals.unsaved = False
            if asked:
                print(f"stopped after step {step + 1}: python train.py --resume {folder} goes on", flush=True)
                sys.exit(128 + asked)
        source.close()

    def score(self) -> dict[str, dict[str, float]]:
        """What it learned, as sample.py will read it: scores of its captions, which the folder keeps."""
        args, vlm, folder, val = self.args, self.vlm, self.folder, self.val.captions
        vlm.eval()
        for part in {"llm", "vit"} & {*args.train.split(",")}:
            getattr(vlm, part).to(vlm.dtype)
        sets = {"val": self.val} if self.unseen is None else {
            "test": self.val, "unseen": Encoded(vlm, self.unseen, args, self.val.features is not None)}
        shots = []
        if args.shots:
            indices, views = next(self.val.batches(args.shots))
            shots = [(x, draw_caption(val, i, args.seed, 0)[1]) for i, x in zip(indices, views.x)]
        scores, sections = {}, []
        for label, data in sets.items():
            texts = caption_set(vlm, data.captions, data.batches(64))
            row, ratings = rate(data.captions, texts)
            scores[f"{label} ({len(texts)})"] = row
            first = len(shots) * (data is self.val)  # no picture comes before itself
            if shots and first < len(data.readable):
                after = caption_set(vlm, data.captions, data.batches(64, first), shots)
                scores[f"{label}, {len(shots)} shots ({len(after)})"] = rate(data.captions, after)[0]
            if "text-image" in self.layouts:
                row["matching"] = self.matching(data)
            if RANK:
                continue
            write_text(folder / f"captions-{label}.jsonl", as_lines(data.captions, texts))
            sections += best_and_worst(label, data.captions, texts, ratings)
        self.log.add({"step": args.steps, "embeddings": vlm.adapter.queries, "scores": scores})
        if not RANK:
            write_picture(folder / "samples.png", contact_sheet(sections))
        return scores


def main() -> None:
    this = Run(read_options())
    with contextlib.closing(this.log), Signals() as signals:
        this.learn(signals)
        scores = this.score()
    this.say(f"{this.folder}: see curves.png and samples.png; "
             f"try it: python sample.py photo.jpg --model {this.folder}")
    print(table(scores))
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main, "--recompute, a higher --accumulate, or a smaller --batch, --max-tokens or --precision")
