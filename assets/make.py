"""Makes the built-in backbones from scratch: `assets/vit`, which never saw a caption, and `assets/llm`, which
never saw a picture; and the example pictures. Seeded; about 45 minutes on one CPU core.

    python assets/make.py [vit] [llm] [pictures]
"""

import collections
import itertools
import math
import random
import sys
import time
from pathlib import Path

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

import numpy as np
import regex
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from formats import encoders, languages
from formats.tokenizer import GPT2_SPLIT, ByteLevel, Tokenizer
import llm as llm_module
import vit as vit_module
from formats.captions import flat
from support.shapes import COLOURS, SHAPES, SIDE, SIZES, Scene, judge
from formats.files import write_json

SEED = 1234
VIT = dict(
    architectures=["ViTModel"],
    model_type="vit",
    hidden_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=512,
    hidden_act="gelu",
    image_size=SIDE,
    patch_size=12,
    num_channels=3,
    qkv_bias=True,
    layer_norm_eps=1e-6,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
LLM = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    hidden_act="silu",
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)


def initialise(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(
                parameter,
                std=0.02
                if parameter.dim() == 2 and "embed" in name
                else min(0.1, parameter[0].numel() ** -0.5),
            )


def optimise(module: nn.Module, loss_of_step, steps: int, lr: float, label: str) -> None:
    """AdamW with warm-up and cosine, bfloat16 autocast; `loss_of_step(step)` gives the loss and what to
    print."""
    optimizer = torch.optim.AdamW(module.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.05)
    start = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        with torch.autocast("cpu", torch.bfloat16):
            loss, shown = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99 or step == steps - 1:
            print(f"{label} {step + 1}/{steps}: {shown}, {time.time() - start:.0f} s", flush=True)


def save(module: nn.Module, family, prefix: str, folder: Path, config: dict) -> None:
    """Writes a model in the public layout, in bfloat16: the family's table of names read the other way
    round."""
    state = {}
    for name, parameter in module.named_parameters():
        value = parameter.detach()
        if name == "prefix":  # the class token and its position, together: the file's position is zero
            disk, value = "embeddings.cls_token", value[None]
        elif name == "positions":
            disk, value = "embeddings.position_embeddings", F.pad(value, (0, 0, 1, 0))[None]
        else:
            (disk,) = family.source(name)[1]
        state[disk if disk == "lm_head.weight" else prefix + disk] = value.to(torch.bfloat16).contiguous()
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {**config, "dtype": "bfloat16"})


# ---------------------------------------------------------------------------------------------------------
# The ViT: supervised patch by patch, as a detector is; no words


def targets(scene: Scene, grid: int, patch: int) -> np.ndarray:
    """For each patch: shape, colour, size of the thing it lies on, that thing's place from the left (0:
    none), and its centre, in patches."""
    out = np.zeros((grid * grid, 6), np.float32)
    centres = (np.arange(grid) + 0.5) * patch
    x, y = np.tile(centres, grid), np.repeat(centres, grid)
    for place, thing in enumerate(scene.things, 1):
        on = np.hypot(x - thing.x, y - thing.y) < thing.radius + 2
        out[on] = (
            SHAPES.index(thing.shape) + 1,
            list(COLOURS).index(thing.colour) + 1,
            list(SIZES).index(thing.size) + 1,
            place,
            thing.x / patch,
            thing.y / patch,
        )
    return out


def make_vit(scenes: int = 60_000, steps: int = 4_800, batch: int = 128) -> None:
    torch.manual_seed(SEED)
    config = vit_module.ViTConfig(**encoders.FAMILIES["vit"].config(VIT))
    model = vit_module.ViT(config)
    initialise(model)
    heads = nn.ModuleList(
        nn.Linear(config.hidden, n) for n in (len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1, 4, 2)
    )

    def draw(seeds):
        drawn = [Scene.draw_from(seed, unseen=None) for seed in seeds]
        return (
            np.stack([np.asarray(scene.picture()) for scene in drawn]),
            np.stack([targets(scene, config.grid, config.patch_size) for scene in drawn]),
        )

    def loss_of(pictures, labels):
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        labels = torch.from_numpy(labels).flatten(0, 1)
        features = model(pixels)[:, config.class_tokens :].flatten(0, 1)
        *kinds, centre = [head(features).float() for head in heads]
        on = labels[:, 0] > 0
        loss = F.l1_loss(centre[on], labels[on, 4:])
        right = on
        for logits, label in zip(kinds, labels.T):
            loss = loss + F.cross_entropy(logits, label.long())
            right = right & (logits.argmax(-1) == label)
        return loss, (right.sum() / on.sum()).item()

    pictures, labels = draw(f"vit {SEED} {i}" for i in range(scenes))
    print(f"vit: drew {scenes} scenes", flush=True)
    generator = torch.Generator().manual_seed(SEED)

    def step(_):
        chosen = torch.randint(scenes, (batch,), generator=generator).numpy()
        loss, right = loss_of(pictures[chosen], labels[chosen])
        return loss, f"loss {loss.item():.3f}, patches on things right {right:.3f}"

    optimise(nn.ModuleList([model, heads]), step, steps, 1.5e-3, "vit")
    model.eval()
    with torch.no_grad():
        _, right = loss_of(*draw(f"vit held-out {i}" for i in range(1000)))
    print(
        f"vit: of the patches on things in 1000 held-out scenes, {100 * right:.2f} % have shape, colour, "
        "size and place right"
    )
    save(model, encoders.FAMILIES["vit"], "", ASSETS / "vit", VIT)
    write_json(
        ASSETS / "vit" / "preprocessor_config.json",
        dict(
            image_processor_type="ViTImageProcessor",
            do_resize=True,
            size=dict(height=SIDE, width=SIDE),
            resample=3,
            do_rescale=True,
            rescale_factor=1 / 255,
            do_normalize=True,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
    )


# ---------------------------------------------------------------------------------------------------------
# The LLM: captions alone, those of one scene after each other, so that it learns to read what came before


def document(seed: str) -> str:
    """Two to seven captions of one scene, each ended by a newline."""
    rng = random.Random(seed)
    scene = Scene.draw_from(seed, unseen=None)
    captions = [scene.caption(rng, rng.randrange(4)) for _ in range(rng.randint(2, 7))]
    return "".join(f"{flat(caption)}\n" for caption in captions)


def make_tokenizer(folder: Path, documents: int = 2_000) -> Tokenizer:
    """Byte-level BPE: merges the commonest pair until every word is one token; <|endoftext|> is id 0."""
    alphabet = {b: c for c, b in ByteLevel.alphabet.items()}
    text = "".join(document(f"tokenizer {i}") for i in range(documents))
    words = collections.Counter(regex.findall(GPT2_SPLIT, text))
    words = {tuple(alphabet[b] for b in word.encode()): n for word, n in words.items()}
    merges = []
    while True:
        pairs = collections.Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        merged = {}
        for word, n in words.items():
            out, i = [], 0
            while i < len(word):
                step = 2 if word[i : i + 2] == best else 1
                out.append("".join(word[i : i + step]))
                i += step
            merged[tuple(out)] = n
        words = merged
    vocabulary = {
        token: i
        for i, token in enumerate(["<|endoftext|>", *alphabet.values(), *("".join(pair) for pair in merges)])
    }
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    folder.mkdir(exist_ok=True)
    write_json(
        folder / "tokenizer.json",
        dict(
            version="1.0",
            truncation=None,
            padding=None,
            normalizer=None,
            pre_tokenizer=level,
            post_processor=None,
            decoder=level,
            added_tokens=[
                dict(
                    id=0,
                    content="<|endoftext|>",
                    single_word=False,
                    lstrip=False,
                    rstrip=False,
                    normalized=False,
                    special=True,
                )
            ],
            model=dict(
                type="BPE",
                dropout=None,
                unk_token=None,
                continuing_subword_prefix=None,
                end_of_word_suffix=None,
                fuse_unk=False,
                byte_fallback=False,
                ignore_merges=False,
                vocab=vocabulary,
                merges=merges,
            ),
        ),
    )
    write_json(
        folder / "tokenizer_config.json",
        dict(
            tokenizer_class="GPT2Tokenizer",
            bos_token="<|endoftext|>",
            eos_token="<|endoftext|>",
            unk_token="<|endoftext|>",
        ),
    )
    return Tokenizer.from_pretrained(str(folder))


def make_llm(steps: int = 4_000, batch: int = 16, length: int = 256) -> None:
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer(ASSETS / "llm")
    raw = {**LLM, "vocab_size": len(tokenizer.bytes)}
    family = languages.FAMILIES["llama"]
    model = llm_module.LLM(llm_module.LLMConfig(**family.config(raw)))
    initialise(model)

    def stream(label: str):
        """The ids of one document after the other, <|endoftext|> (id 0) before each."""
        for i in itertools.count():
            yield from [0, *tokenizer.encode(document(f"llm {label} {i}"))]

    def rows(source, count: int) -> torch.Tensor:
        return torch.tensor(list(itertools.islice(source, count * (length + 1)))).view(count, length + 1)

    def loss_of(tokens):
        return F.cross_entropy(forward(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())

    def step(_):
        loss = loss_of(rows(train, batch))
        return loss, f"loss {loss.item():.3f} a token"

    train, forward = stream(f"{SEED}"), torch.compile(model)
    optimise(model, step, steps, 2e-3, "llm")
    save(model, family, "model.", ASSETS / "llm", raw)
    model = llm_module.LLM.from_pretrained(str(ASSETS / "llm"))
    forward = model
    with torch.no_grad():
        print(
            f"llm: {loss_of(rows(stream('held-out'), 500)).item():.4f} a token on held-out documents"
        )
    scenes = [Scene.draw_from(f"llm held-out {i}", unseen=None) for i in range(500)]
    prompts = [
        torch.tensor([0, *tokenizer.encode(scene.captions()[i % 4] + "\n")]) for i, scene in enumerate(scenes)
    ]
    said = model.generate(prompts, max_tokens=40, end_tokens=tuple(tokenizer.encode("\n")))
    right = sum(judge(tokenizer.decode(ids), scene)["exact"] for ids, scene in zip(said, scenes))
    print(f"llm: having read one caption of a scene, it gives another: {right} of 500 right and complete")


def make_pictures() -> None:
    for name, seed in (("example-1", "example 5"), ("example-2", "example 8"), ("example-3", "example 12")):
        Scene.draw_from(seed).picture().save(ASSETS / f"{name}.png")


if __name__ == "__main__":
    for part in sys.argv[1:] or ("vit", "llm", "pictures"):
        {"vit": make_vit, "llm": make_llm, "pictures": make_pictures}[part]()
