"""Captions in, trained adapter out: the ViT and the LLM stay frozen, get a LoRA, or are trained whole.

    python train.py --adapter qformer
    python train.py --vit google/siglip-base-patch16-224 --llm HuggingFaceTB/SmolLM2-135M \\
        --data captions.csv --images photos/
    python train.py --from HuggingFaceTB/SmolVLM-256M-Instruct --data questions.json --images photos/

Without --data it learns to caption scenes of the built-in shapes world, in about three minutes on two CPU cores.
"""
import argparse
import collections
import importlib.metadata
import inspect
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from adapters import ADAPTERS, IMAGE_POSITIONS, VLM, build, take_over
from data import (Captions, InputError, Shapes, arrange, draw_caption, draw_layout, draw_shots, few_shot,
                  find_checkpoint, held_out, in_order, layout_weights, list_unreadable, read_json, run,
                  shuffled, skip, stack, write_file, write_json)
from lora import add_lora, load_lora
from sample import as_lines, caption_set, contact_sheet, machine_options, pick_device, pick_precision, score, table

# of an adapter, as options of the command line
SIZES = ("queries", "scale", "layers", "width", "heads", "every", "dropout", "text")
FREE = ("resume", "out", "device", "workers", "log_every", "save_every", "cache_features")  # may change on --resume


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--from", dest="origin", metavar="NAME",
        help="start from a public VLM, a folder or a hub name, and train its adapter on captions, or on the "
             "questions and answers of LLaVA's JSON")
    add("--vit", default="assets/vit", metavar="NAME", help="image encoder: a folder or a hub name (default: assets/vit)")
    add("--llm", default="assets/llm", metavar="NAME", help="language model: a folder or a hub name (default: assets/llm)")
    add("--image-size", type=int, metavar="PX", help="side of the squares the encoder sees, pixels (default: the checkpoint's own)")
    add("--layer", type=int, metavar="I", help="the encoder's layer to read, as hidden_states[I] (default: its last output)")
    add("--adapter", default="qformer", metavar="KIND", help=f"{', '.join(ADAPTERS)} (default: qformer)")
    add("--queries", type=int,
        help="embeddings a picture becomes, where the adapter doesn't keep the patches (default: 32)")
    add("--adapter-scale", type=int,
        help="pixelshuffle: side of the squares of patches that become one embedding (default: 2)")
    add("--adapter-layers", type=int, help="blocks of an adapter with queries (default: 4; twoway: 2)")
    add("--adapter-width", type=int, help="its hidden size (default: 256)")
    add("--adapter-heads", type=int, help="its attention heads (default: 8)")
    add("--adapter-every", type=int, metavar="K",
        help="qformer: every K-th block reads the picture; flamingo: a block that does stands before every "
             "K-th of the language model (default: 2)")
    add("--adapter-dropout", type=float, help="qformer: dropout after every sublayer (default: 0)")
    add("--adapter-text", type=int, nargs="?", const=32, metavar="N",
        help="qformer, twoway: let it read the prompt too, N tokens of it at most "
             "(default: 0; 32, if N is left out)")
    add("--image-position", default="sequence", choices=IMAGE_POSITIONS,
        help="what an image's embeddings have for positions in the LLM: sequence, one after the other, as "
             "words; shared, one for all; xy, shared, and embeddings of row and column are added to the "
             "encoder's features; sequence+xy, both; rope-xy, rotary ones with row and column, for adapters "
             "that keep the grid of patches (default: sequence)")
    add("--train", default="adapter", metavar="PARTS",
        help="the parts that are trained whole, in float32: a list of adapter, llm, vit (default: adapter)")
    add("--lora", type=int, metavar="R", help="train a LoRA of rank R too (default: the backbones stay frozen)")
    add("--lora-alpha", type=float, metavar="A", help="the LoRA's updates are scaled by A / R (default: 2 R)")
    add("--lora-targets", default="q,v", metavar="NAMES", help="layers with a LoRA, of q, k, v, out, gate, up, down; "
                                                               "or all (default: q,v)")
    add("--lora-on", default="llm", metavar="PARTS", help="llm, vit, or llm,vit (default: llm)")
    add("--lora-dropout", type=float, default=0.0, help="of what the LoRA reads (default: 0)")
    add("--lora-from", metavar="FOLDER", help="begin with the LoRA in this folder: PEFT's, or a run's lora/")
    add("--prompt", default="", metavar="TEXT",
        help="text between picture and caption, where the data asks no question; the picture stands where it says "
             "<image>, or before it all (default: none)")

    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--data", default="shapes", metavar="FILE", help="captions: CSV with the header image,caption; JSON lines; COCO's "
                                                         "or LLaVA's JSON (default: shapes, the built-in world)")
    add("--images", metavar="FOLDER", help="where the pictures lie (default: beside the captions)")
    add("--val", metavar="FILE", help="captions to validate on, pictures in --images too (default: a part of --data held out)")
    add("--val-size", type=int, default=500, help="pictures to validate on, at most (default: 500)")
    add("--scenes", type=int, default=20_000, help="with the shapes world: scenes to train on (default: 20000)")

    add("--layout", default="image-text", metavar="MIX",
        help="image-text: the caption is learned after the picture; text-image-text: the picture stands "
             "within its caption, the rest is learned; text-image: whether a caption and a picture match is "
             "learned, and reported; several with weights, as image-text:0.6,text-image-text:0.4 (default: "
             "image-text)")
    add("--shots", type=int, default=0, metavar="K",
        help="0 to K other pairs of the batch, as drawn, come solved before each; these are learned too with "
             "--prefix-loss (default: 0)")
    add("--prefix-loss", action="store_true",
        help="learn all words, those before the picture too (default: what comes last alone)")

    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--steps", type=int, default=700, help="optimizer steps (default: 700)")
    add("--batch", type=int, default=64, help="pictures a step (default: 64)")
    add("--accumulate", type=int, default=1, help="equal parts a step's batch is computed in, to save memory (default: 1)")
    add("--lr", type=float, default=1e-3, help="peak learning rate of adapter and LoRA (default: 1e-3)")
    add("--lr-llm", type=float, default=1e-4, help="that of the LLM, if trained whole (default: 1e-4)")
    add("--lr-vit", type=float, default=1e-4, help="that of the encoder, if trained whole (default: 1e-4)")
    add("--warmup", type=int, default=100, help="steps of linear warm-up before the cosine to zero (default: 100)")
    add("--weight-decay", type=float, default=0.05, help="AdamW's, of matrices (default: 0.05)")
    add("--clip", type=float, default=1.0, help="longest gradient, Euclidean norm (default: 1)")
    add("--spell", type=float, metavar="W",
        help="weight of a second loss in the first 60 %% of the steps: the embeddings of an image spell its "
             "first caption, a token each, in order; for adapters with queries (default: 1 in the shapes "
             "world, else 0)")
    add("--max-tokens", type=int, default=128, help="longest caption, tokens; longer ones are cut (default: 128)")
    add("--seed", type=int, default=0, help="of weights, order, captions drawn, scenes (default: 0)")

    speed = parser.add_argument_group("speed")
    add = speed.add_argument
    machine_options(speed)
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the step (default: on a CUDA GPU)")
    add("--cache-features", action=argparse.BooleanOptionalAction,
        help="encode every picture once, before the first step, and keep the features in memory (default: when they take "
             "less than half of what is free, and the steps see each picture at least once)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="processes that read pictures (default: one a core, at most 8)")

    files = parser.add_argument_group("files")
    add = files.add_argument
    add("--out", metavar="FOLDER", help="where the run goes (default: out/<time>-<adapter>)")
    add("--resume", metavar="FOLDER", help="continue the run in this folder, with its own options")
    add("--log-every", type=int, default=100, help="steps between lines of progress and of metrics.jsonl (default: 100)")
    add("--save-every", type=int, default=500, help="steps between validations and checkpoints (default: 500)")
    return parser


def read_options() -> argparse.Namespace:
    """The command line; with --resume, the run's own options, which the command line may only repeat."""
    parser = make_parser()
    args = parser.parse_args()
    if args.resume:
        path = find_checkpoint(args.resume) / "config.json"
        saved = read_json(path).get("training")
        if not isinstance(saved, dict):
            raise InputError(f"{path}: not the folder of a run")
        parser.set_defaults(**saved)
        args = parser.parse_args()
        for name, value in saved.items():
            if name not in FREE and getattr(args, name, value) != value:
                raise InputError(f"--{name.replace('_', '-')} can't change on --resume: the run has {value}")
        args.out = args.resume
    if args.origin:
        for name in ("vit", "llm", "image_size", "layer", "adapter", "image_position", "layout",
                     "shots", "prefix_loss",
                     *(size if size == "queries" else f"adapter_{size}" for size in SIZES)):
            if getattr(args, name) != parser.get_default(name):
                raise InputError(f"--{name.replace('_', '-')} means nothing with --from: "
                                 f"{args.origin} has its own")
    layout_weights(args.layout)
    whole = args.train.split(",")
    if not {*whole} <= {"adapter", "llm", "vit"}:
        raise InputError(f"--train {args.train}: a list of adapter, llm and vit")
    if "adapter" not in whole and not args.origin:
        raise InputError(f"--train {args.train}: a new adapter must be trained too")
    if args.spell is None:
        args.spell = float(args.data == "shapes" and not args.origin)
    if not {*args.lora_on.split(",")} <= {"llm", "vit"}:
        raise InputError(f"--lora-on {args.lora_on}: choose from llm, vit and llm,vit")
    if (args.lora or args.lora_from) and (both := {*whole} & {*args.lora_on.split(",")}):
        raise InputError(f"--train {args.train}: {both.pop()} can't be trained whole and get a LoRA")
    if args.lora and args.lora_from:
        raise InputError("--lora-from brings its own rank: leave --lora out")
    if args.adapter not in ADAPTERS:
        raise InputError(f"unknown adapter '{args.adapter}': choose from {', '.join(ADAPTERS)}")
    for name in ("steps", "batch", "accumulate", "scenes", "val_size", "max_tokens", "log_every", "save_every"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.batch % args.accumulate:
        raise InputError(f"--batch {args.batch} can't be cut in --accumulate {args.accumulate} equal parts")
    if not 0 <= args.shots < args.batch // args.accumulate:
        raise InputError(f"--shots {args.shots}: from 0 to what a batch (or part of it) has beside each pair")
    return args


def adapter_sizes(args: argparse.Namespace) -> dict:
    """All sizes of the chosen adapter: those on the command line, else its defaults."""
    signature = inspect.signature(ADAPTERS[args.adapter]).parameters.values()
    sizes = {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY}
    for size in SIZES:
        option = size if size == "queries" else f"adapter_{size}"
        if (value := getattr(args, option)) is not None:
            if size not in sizes:
                raise InputError(f"--{option.replace('_', '-')} means nothing to the {args.adapter} adapter")
            if value < (least := 0 if size in ("dropout", "text") else 1):
                raise InputError(f"--{option.replace('_', '-')} must be at least {least}, not {value}")
            sizes[size] = value
    return sizes


def choose_trained(vlm: VLM, args: argparse.Namespace) -> None:
    """Leaves gradients to the parts that --train names, and gives the backbones the LoRA that the command
    line asks for, if any."""
    for part in ("adapter", "llm", "vit"):
        for p in vlm.weights(part).values():
            p.requires_grad_(part in args.train.split(","))
    for part in args.lora_on.split(","):
        module = getattr(vlm, part)
        if args.lora_from:
            folder = Path(args.lora_from)
            load_lora(module, folder / part if (folder / part).is_dir() else folder)
        elif args.lora is not None:
            targets = "all" if args.lora_targets == "all" else args.lora_targets.split(",")
            add_lora(module.blocks, args.lora, args.lora_alpha or 2 * args.lora, targets, args.lora_dropout)
    if (layer := vlm.config.get("layer")) is not None:  # no gradient reaches what isn't read
        blocks = vlm.vit.blocks
        for unread in (blocks[layer % (len(blocks) + 1):], vlm.vit.norm, vlm.vit.neck):
            unread.requires_grad_(False)


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


def save_checkpoint(folder: Path, step: int, vlm: VLM, optimizer, scaler) -> None:
    """adapter.safetensors for whoever uses the run; state.safetensors, complete in itself, for --resume."""
    vlm.save(folder)
    state = {f"{key}.{name}": value.detach().cpu().contiguous() for name, p in vlm.trained.items()
             for key, value in {"weight": p, **optimizer.state[p]}.items()}
    state["scale"] = torch.tensor(scaler.get_scale())
    write_file(folder / "state.safetensors", lambda path: save_file(state, path, {"step": str(step)}))


def load_checkpoint(folder: Path, vlm: VLM, optimizer, scaler) -> int:
    """Takes up what `save_checkpoint` left; returns the number of steps done."""
    path = folder / "state.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: no such file: the run was stopped before its first checkpoint, start it anew")
    try:
        with safe_open(path, framework="pt") as file:
            step, state = int(file.metadata()["step"]), {name: file.get_tensor(name) for name in file.keys()}
        weights = {name[7:]: value for name, value in state.items() if name.startswith("weight.")}
        take_over(vlm.trained, weights, path)
        for name, p in vlm.trained.items():
            optimizer.state[p] = {key: state[f"{key}.{name}"].to(p.device) for key in ("step", "exp_avg", "exp_avg_sq")}
        scaler.load_state_dict({**scaler.state_dict(), "scale": state["scale"].item()} if scaler.is_enabled() else {})
        return step
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a whole checkpoint ({error})") from None


class Progress:
    """What happened since the last line: mean loss, speed, time left. On a terminal the line is rewritten in place twice
    a second; in a log it appears every `--log-every` steps."""

    def __init__(self, args: argparse.Namespace):
        self.steps, self.terminal, self.drawn = args.steps, sys.stdout.isatty(), 0.0
        self.begin()

    def begin(self) -> None:
        self.start, self.losses, self.images, self.tokens = time.time(), [], 0, 0

    def add(self, step: int, loss: torch.Tensor, images: int, tokens: int) -> None:
        self.losses.append(loss)
        self.images, self.tokens = self.images + images, self.tokens + tokens
        if self.terminal and time.time() - self.drawn > 0.5:
            self.show(self.line(step), "\r")

    def line(self, step: int) -> dict:
        seconds = time.time() - self.start
        return {"step": step + 1, "loss": torch.stack(self.losses).mean().item(), "images_per_s": self.images / seconds,
                "tokens_per_s": self.tokens / seconds, "s_left": (self.steps - step - 1) * seconds / len(self.losses)}

    def show(self, line: dict, end: str = "\n") -> None:
        self.drawn = time.time()
        minutes, seconds = divmod(round(line["s_left"]), 60)
        print(f"step {line['step']}/{self.steps}  loss {line['loss']:.4f}  "
              + "".join(f"{name} {line[name]:.4f}  " for name in ("val", "matching") if name in line) +
              f"{line['images_per_s']:.0f} images/s  {line['tokens_per_s']:.0f} tokens/s  {minutes}:{seconds:02d} left"
              + " " * 8 * self.terminal, end=end, flush=True)


def main() -> None:
    args = read_options()

    # Captions
    if args.data == "shapes":
        train = Shapes(args.scenes, "train", args.seed)
        val, unseen = Shapes(args.val_size, "test"), Shapes(args.val_size, "unseen")
    else:
        train, unseen = Captions(args.data, args.images), None
        if args.val:
            val = Captions(args.val, args.images or Path(args.data).parent)
            val = held_out(val, min(args.val_size, len(val)), args.seed)[1]
        elif len(train) > 1:
            train, val = held_out(train, min(args.val_size, max(1, len(train) // 20)), args.seed)
        else:
            raise InputError(f"{args.data}: one picture can't be parted in training and validation: give --val")

    # Model
    device = pick_device(args.device)
    dtype = pick_precision(args.precision, device)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
    torch.manual_seed(args.seed)
    # so that the run is found again from any working directory
    for name in ("origin", "vit", "llm", "data", "images", "val", "lora_from"):
        if (value := getattr(args, name)) and Path(value).exists() and not value.startswith("assets/"):
            setattr(args, name, str(Path(value).resolve()))
    parts = {"from": args.origin} if args.origin else dict(
        vit=args.vit, llm=args.llm, image_size=args.image_size, layer=args.layer, adapter=args.adapter,
        adapter_sizes=adapter_sizes(args), image_position=args.image_position)
    whole = tuple(args.train.split(","))
    config = dict(**parts, prompt=args.prompt, train=whole, layout=args.layout, training=vars(args),
                  versions=dict(
                      python=platform.python_version(), **{name: importlib.metadata.version(name) for name in (
                          "torch", "numpy", "tiktoken", "safetensors", "pillow")}))
    vlm = build(config, dtype, whole)
    choose_trained(vlm, args)
    vlm.to(device).train()
    fixed = not any(p.requires_grad for p in vlm.vit.parameters())  # a picture's features stay the same
    if args.cache_features and not fixed:
        raise InputError("--cache-features: the encoder is trained, so that its features change")
    trained = vlm.trained
    optimizer = torch.optim.AdamW(parameter_groups(vlm, args), betas=(0.9, 0.98), fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    forward = torch.compile(vlm) if (device.type == "cuda" if args.compile is None else args.compile) else vlm

    # The run's folder
    folder = Path(args.out or f"out/{time.strftime('%Y%m%d-%H%M%S')}-{vlm.config['adapter']}")
    first = 0
    if args.resume:
        first = load_checkpoint(folder, vlm, optimizer, scaler)
    elif (folder / "config.json").exists():
        raise InputError(f"{folder}: there is a run already: --resume it, or give another --out")
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror}") from None
        write_json(folder / "config.json", vlm.config)
    print(f"{folder}: {vlm.config['adapter']} adapter, "
          f"{sum(p.numel() for p in trained.values()):,} trained parameters, "
          f"{vlm.adapter.queries} embeddings a picture; {device}, {str(dtype).removeprefix('torch.')}")

    # Pictures, encoded once or step by step
    unreadable = [{}, {}, {}]  # of train, val, unseen: {index: reason}

    @torch.no_grad()
    def encode_all(captions, bad: dict[int, str]) -> tuple[list[int], torch.Tensor]:
        """Indices of the pictures that can be read, and their features (P,N,Dv)."""
        start, parts = time.time(), []
        for indices, features, found in vlm.encode_pictures(captions, in_order(len(captions), 64), args.workers):
            skip(bad, found, captions)
            if indices:
                parts.append((indices, features))
        print(f"encoded {len(captions) - len(bad)} pictures in {time.time() - start:.0f} s", flush=True)
        return [i for indices, _ in parts for i in indices], torch.cat([features for _, features in parts])

    def pictures():
        """Indices of each step's batch, from step `first` on; its features or, where these aren't kept, pixels."""
        if cache:
            kept, features = encode_all(train, unreadable[0])
            for batch in shuffled(len(kept), args.batch, args.seed, first):
                yield [kept[i] for i in batch], features[batch]
        else:
            batches = shuffled(len(train), args.batch, args.seed, first)
            for indices, pixels, found in vlm.read_pictures(train, batches, args.workers):
                skip(unreadable[0], found, train)
                yield indices, pixels

    val_kept, val_features = encode_all(val, unreadable[1])
    cache = args.cache_features
    if cache is None:
        fits = len(train) * val_features[0].nbytes < free_memory(device) / 2
        cache = fixed and fits and args.steps * args.batch >= len(train)

    layouts = layout_weights(args.layout)

    def batch_of(examples: list[tuple[str, str]], prefix: bool = False,
                 captions: list[str] | None = None) -> list[torch.Tensor]:
        """Texts and answers as `stack` joins them and, where there are `captions`, as many as pictures or none,
        what is to be spelled."""
        tokens, where, targets = stack([
            vlm.encode(text, answer, args.max_tokens, prefix=prefix) for text, answer in examples])
        spelling = () if captions is None else vlm.spelling(captions)
        return [tensor.to(device, non_blocking=True) for tensor in (tokens, where, targets, *spelling)]

    def draw(indices: list[int], epoch: int) -> tuple[list[tuple[str, str]], list[int], list[str]]:
        """A text and its answer for each picture to train on, in a layout that is drawn, after its shots; of
        the pictures of all texts, in their order, where they are in `indices`, and what they are to spell."""
        examples, order = [], []
        for at, i in enumerate(indices):
            layout = draw_layout(layouts, args.seed, epoch, i)
            shown = [*draw_shots(indices, at, args.shots, args.seed, epoch), at]
            examples.append(few_shot([
                arrange(layout, train, indices[j], args.seed, epoch, vlm.prompt_for) for j in shown]))
            order += shown
        return examples, order, [train.captions(indices[j])[0] for j in order]

    @torch.no_grad()
    def validate() -> float:
        """Nats per token on the validation set, one caption a picture, whatever layouts are trained."""
        nonlocal val_features
        if not fixed:
            val_features = encode_all(val, unreadable[1])[1]
        total = count = 0
        for i in range(0, len(val_kept), args.batch):
            tokens, where, targets = batch_of([arrange("image-text", val, j, args.seed, 0, vlm.prompt_for)
                                               for j in val_kept[i:i + args.batch]])
            logits = forward(tokens, val_features[i:i + args.batch], where)
            total += F.cross_entropy(logits.float(), targets, reduction="sum").item()
            count += len(targets)
        return total / count

    @torch.no_grad()
    def matching(captions, kept: list[int], features: torch.Tensor) -> float:
        """How often the right one of "yes" and "no" is the likelier answer to "match?"."""
        right = 0
        for i in range(0, len(kept), args.batch):
            asked = [arrange("text-image", captions, j, args.seed, 0, vlm.prompt_for)
                     for j in kept[i:i + args.batch]]
            losses = []  # of all tokens of an answer, (B,): not every tokenizer has one for it
            for answer in ("yes", "no"):
                tokens, where, targets = batch_of([(text, answer) for text, _ in asked])
                logits = forward(tokens, features[i:i + args.batch], where)
                loss = F.cross_entropy(logits.float(), targets, reduction="none")
                row = where // tokens.shape[1]
                losses.append(torch.zeros(len(asked), device=device).index_add(0, row, loss))
            yes = (losses[0] < losses[1]).tolist()
            right += sum(said == (answer == "yes") for said, (_, answer) in zip(yes, asked))
        return right / len(kept)

    # Training
    source, progress = pictures(), Progress(args)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        for step in range(first, args.steps):
            indices, inputs = next(source)
            if step == first:
                progress.begin()
            torch.manual_seed(args.seed * 1_000_003 + step)  # of dropout: a resumed run draws what an unbroken one draws
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, args)
            parts = [slice(i, i + args.batch // args.accumulate) for i in range(0, len(indices), args.batch // args.accumulate)]
            epoch = step * args.batch // len(train)
            drawn = [draw(indices[part], epoch) for part in parts]
            spell = args.spell * (step < 0.6 * args.steps)
            batches = [batch_of(examples, args.prefix_loss, captions if spell else [])
                       for examples, _, captions in drawn]
            count, letters = (sum(len(batch[i]) for batch in batches) for i in (2, 4))  # of targets; to be spelled
            loss = torch.zeros((), device=device)
            for part, (_, order, _), (tokens, where, targets, spelled, words) in zip(parts, drawn, batches):
                features = inputs[part] if cache else vlm.features(inputs[part])
                logits, images = forward(tokens, features[order], where, spelled)
                part_loss = F.cross_entropy(logits.float(), targets, reduction="sum") / count
                loss += part_loss.detach()
                part_loss += spell / max(1, letters) * F.cross_entropy(images.float(), words, reduction="sum")
                scaler.scale(part_loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained.values(), args.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            progress.add(step, loss, len(indices), sum(batch[0].numel() for batch in batches))

            save = (step + 1) % args.save_every == 0 or step + 1 == args.steps
            if save or (step + 1) % args.log_every == 0:
                line = {**progress.line(step), "lr": args.lr * schedule(step, args)}
                if save:
                    vlm.eval()
                    line["val"] = validate()
                    if "text-image" in layouts:
                        line["matching"] = matching(val, val_kept, val_features)
                    vlm.train()
                    save_checkpoint(folder, step + 1, vlm, optimizer, scaler)
                    list_unreadable(folder, unreadable)
                progress.show(line)
                metrics.write(json.dumps(line) + "\n")
                metrics.flush()
                progress.begin()
        source.close()

        # What it learned, as sample.py will read it
        vlm.eval()
        for part in {"llm", "vit"} & {*whole}:
            getattr(vlm, part).to(dtype)
        if "vit" in whole:
            val_features = encode_all(val, unreadable[1])[1]
        sets = {"test" if unseen else "val": (val, val_kept, val_features)}
        if unseen:
            sets["unseen"] = (unseen, *encode_all(unseen, unreadable[2]))
        scores = {}
        shots = [(val_features[j], draw_caption(val.captions(i), args.seed, 0, i))
                 for j, i in enumerate(val_kept[:args.shots])]
        for label, (captions, kept, features) in sets.items():
            def captioned(first: int, shots: list = ()) -> dict[int, str]:
                batches = ((kept[i:i + 64], features[i:i + 64]) for i in range(first, len(kept), 64))
                return caption_set(vlm, captions, batches, {}, shots)

            texts = captioned(0)
            scores[f"{label} ({len(kept)})"] = row = score(captions, texts)
            first = len(shots) * (captions is val)  # no picture comes before itself
            if shots and first < len(kept):
                after = captioned(first, shots)
                scores[f"{label}, {len(shots)} shots ({len(after)})"] = score(captions, after)
            if "text-image" in layouts:
                row["matching"] = matching(captions, kept, features)
            lines = as_lines(captions, texts)
            write_file(folder / f"captions-{label}.jsonl", lambda path: path.write_text(lines, encoding="utf-8"))
            sheet = contact_sheet(captions, texts)
            write_file(folder / f"captions-{label}.png", lambda path: sheet.save(path, "PNG"))
        metrics.write(json.dumps({"step": args.steps, "embeddings": vlm.adapter.queries, "scores": scores}) + "\n")
    print(table(scores))


if __name__ == "__main__":
    run(main)
