"""Measures this project against what a user would otherwise run: transformers and, given --nanovlm, nanoVLM's
own code.

    python tests/bench.py all                                  # every row, one Markdown table
    python tests/bench.py train decode --sizes small --nanovlm nanoVLM

Models have real sizes and random weights, saved once in the public layout. Ours and the others take turns in
one process on the same inputs; the figures are medians. Needs transformers beside our own packages. nanoVLM
has its weights in float32 and computes in float32 or, as its training script does, under bfloat16 autocast;
with weights in bfloat16 its language model doesn't run.
"""
import argparse
import gc
import importlib
import io
import itertools
import json
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from PIL import Image

TEXT, NEW, PROMPT = 32, 48, 512  # tokens: of a caption to train on, to decode, to prefill
SIGLIP = "SiglipVisionModel", "SiglipVisionConfig", dict(hidden_size=768, intermediate_size=3072)
CLIP_L = "CLIPVisionModel", "CLIPVisionConfig", dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)


def decoder(kind: str, vocabulary: int, width: int, mlp: int, layers: int, heads: int, kv_heads: int,
            tied: bool = True) -> tuple:
    return f"{kind}ForCausalLM", f"{kind}Config", dict(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied)


QWEN = decoder("Qwen2", 151936, 896, 4864, 24, 14, 2)  # Qwen2.5-0.5B
SIZES = {  # name -> vision model, language model: (transformers' class, its config class, config)
    "toy": ((*SIGLIP[:2], dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                               num_attention_heads=4)), decoder("Llama", 40960, 64, 96, 2, 4, 2)),
    "small": (SIGLIP, decoder("Llama", 49152, 576, 1536, 30, 9, 3)),  # SigLIP-B/16-224, SmolLM2-135M
    "SmolLM2-360M": (SIGLIP, decoder("Llama", 49152, 960, 2560, 32, 15, 5)),
    "Qwen2.5-0.5B": (SIGLIP, QWEN),
    "medium": (CLIP_L, QWEN),  # CLIP-L/14-224
    "1.5b": (CLIP_L, decoder("Qwen2", 151936, 1536, 8960, 28, 12, 2)),
    "7b": (CLIP_L, decoder("Qwen2", 152064, 3584, 18944, 28, 28, 4, tied=False)),
}

# ---------------------------------------------------------------------------------------------------------
# What is compared: each has encode, loss, prefill, decode and caption


class Ours:
    def __init__(self, folder: Path, args, packed: bool = False, side: int | None = None, scale: int = 2,
                 recompute: bool = False, compiled: bool = False):
        from adapters import build
        from data import Batch
        from formats.pictures import open_picture
        config = dict(vit=str(folder / "vit"), llm=str(folder / "llm"), image_size=side,
                      adapter="pixelshuffle", adapter_sizes=dict(scale=scale))
        self.vlm = build(config, args.dtype).to(args.device)
        self.vlm.processor.ends = ()
        self.llm = self.vlm.llm
        self.trained = list(self.vlm.adapter.parameters())
        self.llm.recomputes = recompute
        if packed:
            self.vlm.pack()
        else:
            self.vlm.pack_frozen()
        if compiled:
            self.vlm.compile_blocks()
        self.open, self.preprocess, self.batch = open_picture, self.vlm.vit.preprocess, Batch

    def encode(self, pixels):
        return self.vlm.features(pixels)

    def loss(self, tokens, pixels=None, features=None):
        (B, T), Q = tokens.shape, self.vlm.adapter.queries
        features = self.encode(pixels) if features is None else features
        ids = F.pad(tokens, (Q, 0), value=self.vlm.processor.placeholder)
        where = torch.arange(B * (Q + T), device=ids.device).view(B, -1)[:, Q - 1:-1].flatten()
        losses, _ = self.vlm(self.batch(ids, where, tokens.flatten(), None, 1, []), features)
        return losses.mean()

    def parts(self, B: int) -> int:
        """How many parts train.py computes a batch of captions in by default."""
        from train import parts_of_a_step
        return parts_of_a_step(SimpleNamespace(batch=B, data="captions", shots=0), self.vlm.device)

    def prefill(self, tokens):
        self.llm.generate(tokens, max_tokens=1, end_tokens=())

    def decode(self, tokens):
        self.llm.generate(tokens, max_tokens=NEW, end_tokens=())

    def caption(self, pictures):
        return self.vlm.caption(pictures, max_tokens=20)


class Transformers:
    def __init__(self, folder: Path, args, static: bool = False, compiled: bool = False):
        import transformers as tf
        self.dtype, self.static, self.device = args.dtype, static, args.device
        (vision, _, _), (language, _, _) = SIZES[folder.name]
        self.vit, self.llm = (
            getattr(tf, name).from_pretrained(folder / part, dtype=args.dtype).to(args.device).eval()
            for name, part in ((vision, "vit"), (language, "llm")))
        self.vit.requires_grad_(False), self.llm.requires_grad_(False)
        if compiled:
            self.vit.compile(), self.llm.compile()
        c, width = self.vit.config, self.llm.config.hidden_size
        self.grid = c.image_size // c.patch_size
        self.adapter = torch.nn.Linear(4 * c.hidden_size, width, bias=False).to(args.device)
        self.trained = list(self.adapter.parameters())
        processor = tf.SiglipImageProcessor if "Siglip" in vision else tf.CLIPImageProcessor
        processor = processor()  # with torchvision, where there is one
        self.open = lambda file: Image.open(file).convert("RGB")
        self.preprocess = lambda picture: processor(picture, return_tensors="pt").pixel_values[0]

    @torch.no_grad()
    def encode(self, pixels):
        return self.vit(pixel_values=pixels.to(self.dtype)).last_hidden_state

    def embed(self, tokens, features):
        g = self.grid // 2
        x = features[:, -4 * g * g:].unflatten(1, (g, 2, g, 2)).transpose(2, 3).flatten(3).flatten(1, 2)
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            x = self.adapter(x.float())
        return torch.cat([x.to(self.dtype), self.llm.get_input_embeddings()(tokens)], 1)

    def loss(self, tokens, pixels=None, features=None):
        x = self.embed(tokens, self.encode(pixels) if features is None else features)
        labels = F.pad(tokens, (x.shape[1] - tokens.shape[1], 0), value=-100)
        return self.llm(inputs_embeds=x, labels=labels, use_cache=False).loss

    def prefill(self, tokens):
        self.llm(tokens, use_cache=True, logits_to_keep=1)

    def decode(self, tokens, new: int = NEW, **inputs):
        cache = dict(cache_implementation="static") if self.static else {}
        prompt = inputs["inputs_embeds"] if tokens is None else tokens
        mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=self.device)
        return self.llm.generate(tokens, attention_mask=mask, max_new_tokens=new, min_new_tokens=new,
                                 do_sample=False, pad_token_id=0, **cache, **inputs)

    def caption(self, pictures):
        features = self.encode(torch.stack([*map(self.preprocess, pictures)]).to(self.device))
        start = torch.zeros(len(pictures), 0, dtype=torch.long, device=self.device)
        return self.decode(None, 20, inputs_embeds=self.embed(start, features))


class NanoVLM:
    def __init__(self, folder: Path, args, autocast: bool = False):
        if str(args.nanovlm) not in sys.path:
            sys.path.append(str(args.nanovlm))
        # its image processor, which isn't measured, wants torchvision; its tokenizer, the network
        sys.modules["data.processors"] = SimpleNamespace(get_tokenizer=lambda *_: SimpleNamespace(
            image_token_id=1, eos_token_id=None))
        from models.config import VLMConfig
        from models.vision_language_model import VisionLanguageModel
        v, c = (SIZES[folder.name][i][2] for i in (0, 1))
        patch = v.get("patch_size", 16)
        self.queries = (224 // patch // 2) ** 2
        self.model = VisionLanguageModel(VLMConfig(  # no class token: its adapter would not leave it out
            vit_hidden_dim=v["hidden_size"], vit_inter_dim=v["intermediate_size"], vit_img_size=224,
            vit_patch_size=patch, vit_n_heads=v.get("num_attention_heads", 12),
            vit_n_blocks=v.get("num_hidden_layers", 12),
            lm_hidden_dim=c["hidden_size"], lm_inter_dim=c["intermediate_size"],
            lm_n_heads=c["num_attention_heads"], lm_n_kv_heads=c["num_key_value_heads"],
            lm_n_blocks=c["num_hidden_layers"], lm_vocab_size=c["vocab_size"],
            mp_pixel_shuffle_factor=2, mp_image_token_length=self.queries), load_backbone=False)
        self.model.to(args.device).eval().requires_grad_(False)
        self.trained = list(self.model.MP.requires_grad_(True).parameters())
        self.autocast = torch.autocast(args.device, torch.bfloat16, enabled=autocast)

    def encode(self, pixels):
        with self.autocast:
            return self.model.vision_encoder(pixels)

    def loss(self, tokens, pixels):
        ids = F.pad(tokens, (self.queries, 0), value=1)
        targets = F.pad(tokens, (self.queries - 1, 1), value=-100)  # its labels are shifted by the collator
        with self.autocast:
            return self.model(ids, pixels, targets=targets)[1]

    def prefill(self, tokens):
        with self.autocast:
            decoder = self.model.decoder
            decoder.head(decoder(decoder.token_embedding(tokens))[0][:, -1])

    def decode(self, tokens):
        with self.autocast:
            self.model.generate(tokens, None, max_new_tokens=NEW, greedy=True)


def peers(size: str, args, kind: str, **sizes) -> dict:
    """What runs a row: {name: function that makes it}; `sizes`: those of Ours."""
    folder = args.folder / size
    found = {"ours": lambda: Ours(folder, args, packed=kind != "train", **sizes),
             "transformers": lambda: Transformers(folder, args)}
    if kind == "train" or args.device == "cuda" and kind in ("encode", "prefill", "decode"):
        found["ours, compiled"] = lambda: Ours(folder, args, compiled=True, **sizes)
    if args.device == "cuda" and kind in ("encode", "train"):
        found["transformers, compiled"] = lambda: Transformers(folder, args, compiled=True)
    if kind == "decode":
        found["transformers, static cache"] = lambda: Transformers(folder, args, static=True)
    if args.nanovlm:
        found["nanoVLM, float32"] = lambda: NanoVLM(folder, args)
        found["nanoVLM, autocast"] = lambda: NanoVLM(folder, args, autocast=True)
    return {name: make for name, make in found.items()
            if not args.peers or any(p in name for p in args.peers)}


def prepare(size: str, args) -> None:
    """Random checkpoints of a size in the public layout, unless they are there."""
    import transformers as tf
    for part, (model, config, values) in zip(("vit", "llm"), SIZES[size]):
        if not (args.folder / size / part / "config.json").exists():
            torch.manual_seed(0)
            torch.set_default_dtype(torch.bfloat16)
            with torch.device(args.device):
                model = getattr(tf, model)(getattr(tf, config)(**values))
            torch.set_default_dtype(torch.float32)
            model.save_pretrained(args.folder / size / part)
    tokenizer = ROOT / "assets/llm/tokenizer.json"
    (args.folder / size / "llm/tokenizer.json").write_bytes(tokenizer.read_bytes())


# ---------------------------------------------------------------------------------------------------------
# Measuring

def seconds(run, args) -> float:
    clock = time.process_time if args.cpu_time else time.perf_counter
    finish = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    finish()
    start = clock()
    run()
    finish()
    return clock() - start


def race(models: dict, run, args) -> dict[str, float]:
    """Median seconds of run(model), of models that take turns, after a turn that isn't counted."""
    turns = [{name: seconds(lambda: run(model), args) for name, model in models.items()}
             for _ in range(args.repeats + 1)][1:]
    return {name: statistics.median(turn[name] for turn in turns) for name in models}


def limits(args) -> dict[str, float]:
    """What the machine can do: operations a second in products of 2048² matrices, bytes read a second."""
    def best(run):
        return min(seconds(run, args) for _ in range(8))
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(2048, 2048, device=args.device).to(dtype)
        rates[str(dtype)[6:]] = 2 * 2048 ** 3 / best(lambda: a @ a)
    x = torch.ones(1 << 28, device=args.device)
    rates["memory"] = x.nbytes / best(x.sum)
    return rates


def table(row: str, unit: str, work: float, times: dict[str, float], limit: str = "",
          share: float = 0.0) -> None:
    """Prints a Markdown line for each that ran: `work` a second, ratio to ours, ours' share of the limit."""
    for name, took in times.items():
        value = took * 1e3 if unit == "ms" else work / took
        part = f"{share / took:.0%} of {limit}" if share and name == "ours" else ""
        print(f"| {row} | {name} | {value:,.4g} {unit} | {took / times['ours']:.2f} | {part} |", flush=True)


def linear_size(folder: Path) -> int:
    """Numbers in the matrices of a checkpoint's blocks."""
    from formats.weights import Checkpoint
    checkpoint = Checkpoint(str(folder))
    return sum(checkpoint.tensor(name).numel() for name in checkpoint.where if ".layers." in name)


def high_water(device: str = "cpu") -> int:
    """Most bytes of memory this process has held; ru_maxrss would count those of the one that started it."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def child(function: str, *arguments):
    """What a function of this file returns, called in a process of its own."""
    code = ("import json, sys; sys.path.insert(0, 'tests'); import bench; "
            "print(json.dumps(getattr(bench, sys.argv[1])(*map(json.loads, sys.argv[2:]))))")
    command = [sys.executable, "-c", code, function, *(json.dumps(x, default=str) for x in arguments)]
    printed = subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True).stdout
    return json.loads(printed.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------
# Rows

def made(size: str, args, kind: str) -> dict:
    prepare(size, args)
    return {name: make() for name, make in peers(size, args, kind).items()}


@torch.inference_mode()
def encode(size: str, args) -> None:
    models, B = made(size, args, "encode"), 8
    pixels = torch.randn(B, 3, 224, 224, device=args.device)
    times = race(models, lambda model: model.encode(pixels), args)
    config = models["ours"].vlm.vit.config
    N = config.grid ** 2 + config.class_tokens
    work = 2 * B * N * (linear_size(args.folder / size / "vit") + 2 * N * config.width * config.layers)
    share = work / args.rates[str(args.dtype)[6:]]
    table(f"{size}: encode images, batch {B}", "images/s", B, times, "products", share)


def step(model, optimizer, **inputs) -> None:
    parts = model.parts(len(inputs["tokens"])) if isinstance(model, Ours) else 1
    chunks = [x.chunk(parts) for x in inputs.values()]
    for part in zip(*chunks):
        loss = model.loss(**dict(zip(inputs, part)))
        (loss / parts).backward()
    torch.nn.utils.clip_grad_norm_(model.trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train(size: str, args) -> None:
    models = {name: (model, torch.optim.AdamW(model.trained, fused=True))
              for name, model in made(size, args, "train").items()}
    ours = models["ours"][0]
    vit, llm = ours.vlm.vit.config, ours.vlm.llm.config
    N, T = vit.grid ** 2 + vit.class_tokens, vit.grid ** 2 // 4 + TEXT
    eye = 2 * N * (linear_size(args.folder / size / "vit") + 2 * N * vit.width * vit.layers)
    attention = 2 * T * llm.heads * llm.head_size * llm.layers
    words = 4 * (T * (linear_size(args.folder / size / "llm") + attention)
                 + TEXT * llm.hidden * llm.vocabulary)  # forward, and to the inputs backward
    for B in args.batches:
        tokens, pixels = torch.randint(9, 40000, (B, TEXT)), torch.randn(B, 3, 224, 224)
        inputs = dict(tokens=tokens.to(args.device), pixels=pixels.to(args.device))
        times = race(models, lambda model: step(*model, **inputs), args)
        kept = dict(tokens=inputs["tokens"], features=ours.encode(inputs["pixels"]))
        cached = {f"{name}, cached features": model for name, model in models.items() if "nano" not in name}
        times |= race(cached, lambda model: step(*model, **kept), args)
        rate = args.rates[str(args.dtype)[6:]]
        table(f"{size}: train step, batch {B}", "images/s", B, times, "products", B * (eye + words) / rate)
    del ours, models, cached
    rows = [(name, kept) for kept in (False, True) for name in peers(size, args, "train")
            if not (kept and "nano" in name)]
    for B in args.batches if args.device == "cpu" else ():
        peaks = [child("alone", name, size, B, vars(args), kept, {})[1] for name, kept in rows]
        for (name, kept), bytes in zip(rows, peaks):
            print(f"| {size}: train step, batch {B}, peak memory | {name}{', cached features' * kept} | "
                  f"{bytes / 2 ** 20:,.0f} MiB | {bytes / peaks[0]:.2f} | |", flush=True)


def alone(name: str, size: str, B: int, settings: dict, kept: bool, sizes: dict) -> tuple[float, int, int]:
    """Median seconds of a training step; bytes that loading and steps add at the peak; how many of these are
    no weights. `kept`: the encoder's features are; `sizes`: those of Ours."""
    args, side = SimpleNamespace(**settings), sizes.get("side", 224)
    args.folder, args.dtype = Path(args.folder), getattr(torch, args.dtype.removeprefix("torch."))
    if "ours" not in name:
        importlib.import_module("transformers")  # now: its code is no part of the figure
    before = high_water(args.device)
    model = peers(size, args, "train", **sizes)[name]()
    tokens = torch.randint(9, 40000, (B, TEXT), device=args.device)
    pixels = torch.randn(1 if kept else B, 3, side, side, device=args.device)
    inputs = dict(features=model.encode(pixels).repeat(B, 1, 1)) if kept else dict(pixels=pixels)
    optimizer = torch.optim.AdamW(model.trained, fused=True)
    took, = race({name: model}, lambda model: step(model, optimizer, tokens=tokens, **inputs), args).values()
    peak = high_water(args.device) - before
    return took, peak, peak - weights_of(model)


def weights_of(model) -> int:
    """Bytes of the weights of a model's parts, packed ones too."""
    from support.kernels import PackedLinear
    weights = set()
    for part in vars(model).values():
        if isinstance(part, torch.nn.Module):
            weights.update(part.parameters())
            weights.update(layer.weight for layer in part.modules() if isinstance(layer, PackedLinear))
    return sum(w.numel() * w.element_size() for w in weights)


def cost(_, args) -> None:
    """What a training step of ours takes with kept features of 256 patches, one thing varied at a time."""
    usual = dict(size="small", B=8, scale=2, recompute=False)
    varied = [{}, *(dict(B=B) for B in (16, 32, 64)), dict(scale=4), dict(scale=1), dict(size="SmolLM2-360M"),
              dict(size="Qwen2.5-0.5B"), dict(recompute=True), dict(B=64, recompute=True)]
    print("\n| LLM | batch | embeddings an image | recomputed | s a step | MiB above the weights |")
    print("| --- | ---: | ---: | --- | ---: | ---: |")
    for setting in varied:
        size, B, scale, recompute = (usual | setting).values()
        prepare(size, args)
        sizes = dict(side=256, scale=scale, recompute=recompute)
        took, _, bytes = child("alone", "ours", size, B, vars(args), True, sizes)
        print(f"| {size} | {B} | {256 // scale ** 2} | {'yes' * recompute} | {took:.2f} | "
              f"{bytes / 2 ** 20:,.0f} |", flush=True)


@torch.inference_mode()
def prefill(size: str, args) -> None:
    models = made(size, args, "prefill")
    tokens = torch.randint(9, 40000, (1, PROMPT), device=args.device)
    times = race(models, lambda model: model.prefill(tokens), args)
    work = 2 * PROMPT * linear_size(args.folder / size / "llm") / args.rates[str(args.dtype)[6:]]
    table(f"{size}: prefill, {PROMPT} tokens", "tokens/s", PROMPT, times, "products", work)


@torch.inference_mode()
def decode(size: str, args) -> None:
    models, config = made(size, args, "decode"), SIZES[size][1][2]
    weights = linear_size(args.folder / size / "llm") + config["vocab_size"] * config["hidden_size"]
    for B in (1, 16):
        tokens = torch.randint(9, 40000, (B, 16), device=args.device)
        times = race(models, lambda model: model.decode(tokens), args)
        table(f"{size}: decode, batch {B}", "tokens/s", B * NEW, times, "memory bandwidth",
              NEW * weights * args.dtype.itemsize / args.rates["memory"])


def caption(size: str, args) -> None:
    pictures, models = [Image.open(io.BytesIO(photo(i))) for i in range(16)], made(size, args, "caption")
    models = {name: model for name, model in models.items() if hasattr(model, "caption")}
    with torch.inference_mode():
        warm = race(models, lambda model: model.caption(pictures[:1]), args)
        many = race(models, lambda model: model.caption(pictures), args)
        makers = {name: make for name, make in peers(size, args, "caption").items() if name in models}
        cold = race(makers, lambda make: make().caption(pictures[:1]), args)
    table(f"{size}: picture to 20 tokens, warm", "ms", 1, warm)
    table(f"{size}: picture to 20 tokens, loading included", "ms", 1, cold)
    table(f"{size}: pictures to 20 tokens, batch 16", "captions/s", 16, many)


def photo(seed: int) -> bytes:
    """A JPEG of 500×375 px with the detail of a photograph: noise of several scales."""
    torch.manual_seed(seed)
    layers = [F.interpolate(torch.rand(1, 3, side, side), (375, 500), mode="bicubic")
              for side in (4, 16, 64, 256)]
    x = sum(layer / 1.5 ** i for i, layer in enumerate(layers)) / 2.4
    file = io.BytesIO()
    Image.fromarray((x[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
    return file.getvalue()


def data(size: str, args) -> None:
    models = {name: model for name, model in made(size, args, "data").items() if hasattr(model, "preprocess")}
    files = [args.folder / f"{i}.jpg" for i in range(16)]
    for i, file in enumerate(files):
        file.write_bytes(photo(i))
    times = race(models, lambda model: [model.preprocess(model.open(file)) for file in files], args)
    table(f"{size}: JPEG to pixels", "images/s", len(files), times)


def tokenizer(size: str, args) -> None:
    """Of both a new one for each turn, so that no turn finds its words in a cache."""
    import tokenizers
    from formats.tokenizer import Tokenizer
    text, path = "\n".join(pydoc_data.topics.topics.values()), str(ROOT / "assets/llm")
    file = f"{path}/tokenizer.json"
    times = {"ours": [], "tokenizers": []}
    for _ in range(args.repeats):
        ours, theirs = Tokenizer.from_pretrained(path), tokenizers.Tokenizer.from_file(file)
        times["ours"].append(seconds(lambda: ours.processor.encode(text), args))
        times["tokenizers"].append(seconds(lambda: theirs.encode(text), args))
    medians = {name: statistics.median(t) for name, t in times.items()}
    table("tokenizer", "MB/s", len(text.encode()) / 1e6, medians)


def load_part(who: str, model: str, folder: str, dtype: str, cpu_time: bool) -> tuple[float, int, int]:
    """Seconds of loading, bytes that it adds at the peak, bytes of the weights."""
    if who == "ours":
        import llm
        import vit
        load = (llm.LLM if "Causal" in model else vit.ViT).from_pretrained
    else:
        load = getattr(importlib.import_module("transformers"), model).from_pretrained
    clock = time.process_time if cpu_time else time.perf_counter
    before, start = high_water(), clock()
    parameters = list(load(folder, dtype=getattr(torch, dtype)).parameters())
    sum(p.sum().item() for p in parameters)  # every weight has been read
    return clock() - start, high_water() - before, sum(p.nbytes for p in parameters)


def load(size: str, args) -> None:
    prepare(size, args)
    for part, (model, _, _) in zip(("vit", "llm"), SIZES[size]):
        for dtype in ("bfloat16", "float32"):
            turns = [[child("load_part", who, model, args.folder / size / part, dtype, args.cpu_time)
                      for who in ("ours", "transformers")] for _ in range(args.repeats)]
            for who, column in zip(("ours", "transformers"), zip(*turns)):
                took, peak, weights = map(statistics.median, zip(*column))
                ratio = statistics.median(turn[who != "ours"][0] / turn[0][0] for turn in turns)
                print(f"| {size}: load {part} from bfloat16 as {dtype} | {who} | {took:.2f} s | {ratio:.2f} "
                      f"| peak memory {peak / weights:.2f} × weights |", flush=True)


def stream_pairs(names: str, pairs: int) -> tuple[float, float, int, float]:
    """Pairs a second read, and read and decoded; different pairs seen; GiB at the peak."""
    from data import Pixels
    from formats.shards import Shards
    from vit import ViT
    torch.set_num_threads(1)
    shards, preprocess, start = Shards(names), ViT.from_pretrained("assets/vit").preprocess, time.time()
    for batch in itertools.islice(shards.batches(100, 0), pairs // 100):
        pass
    read, start = time.time() - start, time.time()
    pixels = Pixels(shards, preprocess)
    items = ([(pair, (pair,)) for pair in batch] for batch in shards.batches(100, 0))
    loader = torch.utils.data.DataLoader(pixels, batch_sampler=items, collate_fn=pixels.collate)
    seen = {str(index) for indices, _, _ in itertools.islice(loader, pairs // 100) for index in indices}
    return pairs / read, pairs / (time.time() - start), len(seen), high_water() / 2 ** 30


def stream(_, args) -> None:
    """Reads an epoch of small JPEGs, alone and with their decoding, in a process of its own."""
    print("\n| pairs | read, pairs/s | and decoded, 96 px, pairs/s | different pairs | peak memory, GiB |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for pairs in (10_000, 100_000):
            for shard in range(10):
                with tarfile.open(f"{folder}/{pairs}-{shard}.tar", "w") as tar:
                    for i in range(shard * pairs // 10, (shard + 1) * pairs // 10):
                        picture = io.BytesIO()
                        colour = (i % 256, i // 256 % 256, i // 65536)
                        Image.new("RGB", (96, 96), colour).save(picture, "JPEG")
                        for kind, content in (("jpg", picture.getvalue()), ("txt", f"picture {i}".encode())):
                            member = tarfile.TarInfo(f"{i:09}.{kind}")
                            member.size = len(content)
                            tar.addfile(member, io.BytesIO(content))
            read, decoded, seen, peak = child("stream_pairs", f"{folder}/{pairs}-*.tar", pairs)
            print(f"| {pairs:,} | {read:,.0f} | {decoded:,.0f} | {seen:,} | {peak:.3f} |", flush=True)


ROWS = dict(load=load, encode=encode, train=train, prefill=prefill, decode=decode, caption=caption, data=data,
            tokenizer=tokenizer, stream=stream, cost=cost)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", choices=("all", *ROWS))
    parser.add_argument("--sizes", nargs="*", choices=SIZES, help="default: small, medium; on a GPU all")
    parser.add_argument("--nanovlm", type=Path, metavar="FOLDER", help="a clone of nanoVLM")
    parser.add_argument("--folder", type=Path,
                        help="where the random checkpoints are kept (default: a temporary folder)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", type=lambda name: getattr(torch, name))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 64], help="of the training steps")
    parser.add_argument("--peers", nargs="*", help="only those with one of these in their names")
    parser.add_argument("--cpu-time", action="store_true",
                        help="processor time: for a machine that others use too, with one thread")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = (args.folder or Path(temporary)).resolve()
        args.nanovlm = args.nanovlm and args.nanovlm.resolve()
        args.folder.mkdir(parents=True, exist_ok=True)
        args.rates = limits(args)
        cuda = args.device == "cuda"
        machine = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
        rates = [f"{name} {rate / 1e9:,.0f} {'GB/s' if name == 'memory' else 'GFLOP/s'}"
                 for name, rate in args.rates.items()]
        print(f"{machine}: {', '.join(rates)}\n")
        print("| row | who | measured | time, ours = 1 | ours' share of the limit |")
        print("| --- | --- | ---: | ---: | --- |")
        for row in ROWS if "all" in args.rows else args.rows:
            for size in args.sizes or ["small", "medium", "1.5b", "7b"][:4 if cuda else 2]:
                if row not in ("cost", "tokenizer", "stream") or size == (args.sizes or ["small"])[0]:
                    ROWS[row](size, args)
                    gc.collect()
