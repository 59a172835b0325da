"""Makes the built-in backbones from scratch: `assets/vit`, which never saw a caption, and `assets/llm`, which
never saw a picture but maps of words; and the example pictures. Seeded; 75 minutes on one CPU core.

    python assets/make.py [vit] [llm] [pictures]
"""

import collections
import itertools
import math
import random
import sys
import time
import zlib
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
from assets.sayings import RULES, by_rule, questions
from support.shapes import COLOURS, SHAPES, SIDE, SIZE_WORDS, SIZES, Scene, judge
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
    num_key_value_heads=4,
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


def optimise(module: nn.Module, loss_of_step, steps: int, lr: float, label: str, matrices=(), matrix_lr=0.0):
    """Warm-up and cosine, bfloat16 autocast; `loss_of_step(step)` gives the loss and what to print.
    `matrices` are parameters for Muon, at `matrix_lr`; AdamW takes the others, at `lr`."""
    taken = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in module.parameters() if id(parameter) not in taken]
    optimizers = [torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.05)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, matrix_lr, weight_decay=0.05,
                                           adjust_lr_fn="match_rms_adamw"))
    start = time.time()
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss, shown = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, (lr, matrix_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
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
# The LLM: text alone. Captions, questions, rules; and maps, which stand where a picture's embeddings will


def lines(scene: Scene, rng: random.Random, most: int = 4) -> list[str]:
    """Some questions of a scene, each with its answer."""
    asked = questions(scene, rng)
    chosen = rng.sample(asked, min(rng.randint(1, most), len(asked)))
    return [f"{question} {answer}" for question, answer in chosen]


def draw_rule(rng: random.Random):
    """A function that says of a scene what one of RULES asks for, or at times any of the four wordings."""
    if rng.random() < 0.2:
        return lambda scene: by_rule(scene, rng.choice(RULES[:4]), rng)
    rule = rng.choice(RULES)
    return lambda scene: by_rule(scene, rule, rng)


def document(seed: str) -> str:
    """Lines about a scene: one to seven captions, at times questions with their answers. Or of several scenes
    a caption each, and what one rule says of it."""
    rng = random.Random(seed)
    scene = Scene.draw_from(seed, unseen=None)
    kind = rng.random()
    if kind < 0.25:
        said, rule = [], draw_rule(rng)
        for i in range(rng.randint(2, 6)):
            scene = Scene.draw_from(f"{seed} {i}", unseen=None)
            said += [scene.wording(rng.randrange(4), rng), rule(scene)]
    else:
        said = [scene.wording(rng.randrange(4), rng) for _ in range(rng.randint(1 if kind < 0.5 else 2, 7))]
        said += lines(scene, rng, 8) if kind < 0.5 else []
    return "".join(f"{line}\n" for line in said)


def make_tokenizer(folder: Path, documents: int = 2_000) -> Tokenizer:
    """Byte-level BPE: merges the commonest pair until every word is one token; <|endoftext|> is id 0."""
    alphabet = {b: c for c, b in ByteLevel.alphabet.items()}
    text = "".join(document(f"tokenizer {i}") for i in range(documents))
    text += " match? yes\n match? no\n" + "\n".join(sorted(set(regex.findall("[a-z]+", text))))
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


GRID = 8  # cells of a map's side, as the ViT has patches
LISTED = 32  # places of a caption that stands where a picture's embeddings will


class Texts:
    """Draws texts for the LLM, in ids and maps.

    A map has 64 cells, row by row. A cell is the sum of the embeddings of a size, a colour and a shape, or
    that of "." where nothing is; or the map has 16 cells, means of 2 × 2. It is noisy, for an adapter's
    embeddings won't be words: words are replaced by others of their kind, words and cells are dropped, and
    noise is added, all times `noise`, 0 to 1. In its place there may be a caption of the scene. Random
    vectors stand before and behind it.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, seed, scenes: int = 40_000, noise: float = 1):
        self.encode = tokenizer.encode
        self.zero = vocabulary  # the id of no word
        self.dot = self.word(".")
        self.kinds = [np.array([self.word(f" {word}") for word in words])
                      for words in (SIZE_WORDS, COLOURS, SHAPES)]
        self.random = random.Random(seed)
        self.numpy = np.random.default_rng(zlib.crc32(str(seed).encode()))
        self.noise = noise
        self.scenes = [Scene.draw_from(f"llm {seed} {i}", unseen=None) for i in range(scenes)]
        self.maps: list[np.ndarray] = []  # (64,3) ids of the words of each cell
        self.sizes: list[int] = []  # 64 cells, 16 or LISTED

    def word(self, text: str) -> int:
        (id,) = self.encode(text)
        return id

    def scene(self) -> Scene:
        return self.random.choice(self.scenes)

    def add_map(self, scene: Scene, size: int) -> list[int]:
        """Keeps a map of the scene, or a caption in its place. Returns what stands for its vectors in a row:
        the map's number k and place i as -1 - (66 k + i); 0 and 1 are the random vectors."""
        cells = np.full((GRID * GRID, 3), self.zero)
        if size == LISTED:
            ids = self.encode(self.caption(scene) + "\n")[:LISTED]
            cells[:LISTED, 0] = ids + [ids[-1]] * (LISTED - len(ids))
        else:
            # Which thing each cell belongs to: the nearest, if it is near enough
            centres = (np.arange(GRID) + 0.5) * SIDE / GRID
            margin = self.random.uniform(-2, 4) if self.noise else 1
            away = np.stack([np.hypot(np.tile(centres, GRID) - thing.x, np.repeat(centres, GRID) - thing.y)
                             - thing.radius for thing in scene.things])
            on = away < margin
            on[np.arange(len(on)), away.argmin(1)] = True  # each thing has a cell
            cells[:, 0] = self.dot
            for thing, mine in zip(scene.things, on & (away == away.min(0))):
                same = [word for word, meaning in SIZE_WORDS.items() if meaning == thing.size]
                cells[mine] = [self.word(f" {word}") for word in (self.random.choice(same), *thing[1:3])]
        first = -1 - 66 * len(self.maps)
        self.maps.append(cells)
        self.sizes.append(size)
        return [first, *range(first - 2, first - 2 - size, -1), first - 1]

    def caption(self, scene: Scene) -> str:
        return scene.wording(self.random.randrange(4), self.random)

    def about_a_map(self, kind: str, size: int) -> list[tuple[list[int], bool]]:
        """A text as parts (ids, whether they are learned)."""
        scene, rng = self.scene(), self.random
        seen, caption = self.add_map(scene, size), self.caption(scene)
        if kind == "caption":
            return [([0, *seen], False), (self.encode(caption + "\n"), True)]
        if kind == "rest":
            words = caption.split(" ")
            at = rng.randrange(len(words))
            head = self.encode(" ".join(words[:at])) if at else []
            return [([0, *head, *seen], False), (self.encode(" ".join(words[at:]) + "\n"), True)]
        if kind == "match":
            answer = rng.random() < 0.5
            if not answer and rng.random() < 0.5:
                other = self.scene()
                caption = self.caption(other)
                answer = sorted(x[:3] for x in other.things) == sorted(x[:3] for x in scene.things)
            elif not answer:
                # One changed colour or shape, of one thing, wherever it is named
                thing = rng.choice(scene.things)
                colour, shape = rng.choice([(colour, shape) for colour in COLOURS for shape in SHAPES
                                            if (colour == thing.colour) != (shape == thing.shape)])
                changed = [thing._replace(colour=colour, shape=shape) if x is thing else x
                           for x in scene.things]
                caption = self.caption(scene._replace(things=tuple(changed)))
            return [([0, *self.encode(caption), *seen, *self.encode(" match?")], False),
                    (self.encode(" yes\n" if answer else " no\n"), True)]
        parts = [([0, *seen], False)]
        asked = questions(scene, rng)
        for question, answer in rng.sample(asked, min(4, len(asked))):
            parts += [(self.encode(question), False), (self.encode(f" {answer}\n"), True)]
        return parts

    def examples(self, size: int, count: int) -> list[tuple[list[int], bool]]:
        """Maps of `count` scenes, each with what one rule says of it; learned from the second on."""
        rule = draw_rule(self.random)
        parts = [([0], False)]
        for i in range(count):
            scene = self.scene()
            parts += [(self.add_map(scene, size), False), (self.encode(rule(scene) + "\n"), i > 0)]
        return parts

    def places(self) -> torch.Tensor | None:
        """Column and row (N,2) of the maps' vectors, -1 to 1; nan for what is no cell. None without maps."""
        if not self.maps:
            return None
        found = torch.full((len(self.maps), 2 + GRID * GRID, 2), math.nan)
        for one, size in zip(found, self.sizes):
            side = {GRID * GRID: GRID, GRID * GRID // 4: GRID // 2}.get(size, 0)
            middles = (torch.arange(side) + 0.5) / max(side, 1) * 2 - 1
            columns, rows = torch.meshgrid(middles, middles, indexing="xy")
            one[2:2 + side * side] = torch.stack([columns.flatten(), rows.flatten()], 1)
        return found.flatten(0, 1)

    def table(self, embedding: torch.Tensor) -> torch.Tensor:
        """What the ids of rows stand for (N,D): the words' embeddings (V,D), a zero, and the maps' vectors,
        66 a map, noisy. Forgets the maps."""
        words = F.pad(embedding, (0, 0, 0, 1))
        return torch.cat([words, self.vectors(words)]) if self.maps else words

    def vectors(self, table: torch.Tensor) -> torch.Tensor:
        """The maps' vectors (N,D) from the words' (V + 1,D)."""
        draw, M = self.numpy, len(self.maps)
        words, size = np.stack(self.maps), torch.tensor(self.sizes)
        listed = (np.array(self.sizes) == LISTED)[:, None, None]

        def share(most: float) -> np.ndarray:
            return draw.uniform(0, most, (M, 1, 1)) * self.noise

        # Replace words by others of their kind, drop words, drop cells
        empty = (words == self.zero) | (words == self.dot)
        others = np.stack([draw.choice(kind, (M, GRID * GRID)) for kind in self.kinds], 2)
        words = np.where((draw.random(words.shape) < share(0.4)) & ~empty & ~listed, others, words)
        words = np.where((draw.random(words.shape) < share(0.2)) & ~(empty | listed), self.zero, words)
        gone = (draw.random((M, GRID * GRID, 1)) < share(0.2)) & ~listed
        words = np.where(gone, np.array([self.dot, self.zero, self.zero]), words)

        # Sum, and take the means of 2 × 2 cells of some
        cells = F.embedding(torch.from_numpy(words), table).sum(2)  # (M,64,D)
        pooled = cells.view(M, GRID // 2, 2, GRID // 2, 2, -1).mean((2, 4)).flatten(1, 2)
        pooled = F.pad(pooled, (0, 0, 0, GRID * GRID - 16))
        cells = torch.where((size == 16)[:, None, None], 2 * pooled, cells)

        # Noise, scale, and what stands before and behind
        rms = table[:-1].detach().pow(2).mean().sqrt()
        noise = draw.standard_normal(cells.shape, np.float32) * share(0.75).astype(np.float32)
        scale = np.exp(0.3 * self.noise * draw.standard_normal((M, 1, 1), np.float32))
        cells = (cells + torch.from_numpy(noise) * rms) * torch.from_numpy(scale)
        ends = torch.from_numpy(draw.standard_normal((M, 2, cells.shape[-1]), np.float32)) * rms
        self.maps, self.sizes = [], []
        return torch.cat([ends, cells], 1).flatten(0, 1)

    def embed(self, rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Rows of ids and of places in the maps, to embeddings."""
        return F.embedding(torch.where(rows < 0, self.zero - rows, rows), table)


def padded(texts: list, length: int, zero: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of parts as rows (B,length), and which of their ids are learned."""
    rows = torch.full((len(texts), length), zero)
    learned = torch.zeros(len(texts), length, dtype=torch.bool)
    for i, parts in enumerate(texts):
        ids = [id for part, _ in parts for id in part][:length]
        rows[i, :len(ids)] = torch.tensor(ids)
        learned[i, :len(ids)] = torch.tensor([flag for part, flag in parts for _ in part][:length])
    return rows, learned


# What a step reads: (kind, cells of a map; rows), of a row's tokens
DIET = [
    (104, [("caption", 64)] * 17 + [("rest", 64)] * 8 + [("match", 64)] * 6 + [("ask", 64)] * 5),
    (72, [("caption", 16)] * 5 + [("rest", 16)] * 2 + [("match", 16)] * 2 + [("ask", 16)]
     + [(kind, LISTED) for kind in ("caption", "rest", "match", "ask")]),
]
WEIGHTS = dict(caption=1.0, rest=0.5, match=0.4, ask=0.4, examples=0.3, plain=0.3, place=0.5)


def make_llm(first: int = 600, steps: int = 6_500, length: int = 256) -> None:
    """`first` steps of plain texts alone, from which it learns to look back; then `steps` of everything.

    From the states of a map's cells between the second block and the third, a layer that is thrown away reads
    the cell's column and row. Captions go from left to right, and rotary positions tell how far words are
    from each other: that every eighth cell lies in the same column an LLM finds out late by itself.
    """
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer(ASSETS / "llm")
    raw = {**LLM, "vocab_size": len(tokenizer.bytes)}
    family = languages.FAMILIES["llama"]
    model = llm_module.LLM(llm_module.LLMConfig(**family.config(raw)))
    initialise(model)
    place = nn.Linear(model.config.hidden, 2)  # of a cell: reads its column and row, -1 to 1
    print(f"llm: {sum(p.numel() for p in model.parameters()):,} parameters, {raw['vocab_size']} tokens")
    texts = Texts(tokenizer, raw["vocab_size"], SEED)

    def stream(label: str):
        """The ids of one document after the other, <|endoftext|> (id 0) before each."""
        for i in itertools.count():
            yield from [0, *tokenizer.encode(document(f"llm {label} {i}"))]

    def plain(source, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.tensor(list(itertools.islice(source, count * length))).view(count, length)
        return rows, torch.ones_like(rows, dtype=torch.bool)

    def draw():
        """The rows of a step, [(kinds, rows, learned)]; a kind for each row."""
        groups = []
        for size, wanted in DIET:
            drawn = [texts.about_a_map(*one) for one in wanted]
            groups.append(([kind for kind, _ in wanted], *padded(drawn, size, texts.zero)))
        few = [texts.examples(*one) for one in ((64, 3), texts.random.choice(((16, 6), (LISTED, 4))))]
        few = zip(padded(few, length, texts.zero), plain(train, 2))
        groups.append((["examples"] * 2 + ["plain"] * 2, *(torch.cat(both) for both in few)))
        return groups

    def read(embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The states that the head reads, and those between the second block and the third."""
        between = []

        def look(layer, x, _):
            if layer == 2:
                between.append(x)
            return x

        return model.hidden(embeddings, cross_attention=look), between[0]

    def losses(groups) -> dict[str, torch.Tensor]:
        """The loss a token of each kind, and that of the cells' places."""
        places = texts.places()
        table = texts.table(model.embedding.weight)
        found = collections.defaultdict(list)
        for kinds, rows, learned in groups:
            states, between = compiled(texts.embed(rows, table))
            learned = learned[:, 1:]
            logits = model.logits(states[:, :-1][learned])
            loss = F.cross_entropy(logits.float(), rows[:, 1:][learned], reduction="none")
            owner = torch.arange(len(rows))[:, None].expand_as(learned)[learned]
            for kind in dict.fromkeys(kinds):
                mine = torch.tensor([kind == one for one in kinds])
                found[kind].append(loss[mine[owner]])
            if places is not None:
                cells = rows < 0
                truth = places[-1 - rows[cells]]
                known = truth[:, 0].isfinite()
                guess = place(between[cells][known]).float()
                found["place"].append(F.smooth_l1_loss(guess, truth[known], reduction="none", beta=0.1))
        return {kind: torch.cat(parts).mean() for kind, parts in found.items()}

    seen = collections.Counter()

    def step(i):
        texts.noise = min(1, 0.05 + i / steps / 0.25)  # little at first, so that reading begins
        found = losses(draw())
        for kind, loss in found.items():
            seen[kind] += loss.item() / 100
        shown = ", ".join(f"{kind} {loss:.3f}" for kind, loss in seen.items())
        if i % 100 == 99:
            seen.clear()
        if i % 1000 == 999:
            save(model, family, "model.", ASSETS / "llm", raw)
        return sum(WEIGHTS[kind] * loss for kind, loss in found.items()), shown

    def first_step(_):
        loss = losses([(["plain"] * 12, *plain(train, 12))])["plain"]
        return loss, f"plain {loss.item():.3f}"

    train, compiled = stream(f"{SEED}"), torch.compile(read, dynamic=False)
    both = nn.ModuleList([model, place])
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    optimise(model, first_step, first, 2e-3, "llm, plain texts", matrices, 4e-3)
    optimise(both, step, steps, 2e-3, "llm", matrices, 4e-3)
    save(model, family, "model.", ASSETS / "llm", raw)
    examine(tokenizer)


def examine(tokenizer: Tokenizer, count: int = 300) -> None:
    """Prints what the LLM makes of clean maps of held-out scenes."""
    model = llm_module.LLM.from_pretrained(str(ASSETS / "llm")).float()
    newline = tuple(tokenizer.encode("\n"))

    def said(draw, seed: int) -> list[tuple[str, str]]:
        """What it says and what it should, of `count` texts, each up to the last part."""
        texts = Texts(tokenizer, model.config.vocabulary, f"examine {seed}", 2_000, 0)
        drawn = [draw(texts) for _ in range(count)]
        prompts = [[id for part, _ in parts[:-1] for id in part] for parts, _ in drawn]
        with torch.no_grad():
            table = texts.table(model.embedding.weight)
            embeddings = [texts.embed(torch.tensor(row), table) for row in prompts]
            ids = model.generate(embeddings=embeddings, max_tokens=40, end_tokens=newline)
        return [(tokenizer.decode(row).strip(), truth) for row, (_, truth) in zip(ids, drawn)]

    for size in (64, 16, LISTED):
        def last(texts, kind):
            parts = texts.about_a_map(kind, size)
            return parts, tokenizer.decode(parts[-1][0]).strip()

        def caption(texts):
            scene = texts.scene()
            return [([0, *texts.add_map(scene, size)], False), ([], True)], scene

        right = sum(judge(text, scene)["exact"] for text, scene in said(caption, 0))
        scores = [f"caption {right}"]
        for kind in ("match", "ask"):
            scores.append(f"{kind} {sum(a == b for a, b in said(lambda texts: last(texts, kind), 1))}")
        print(f"llm: of {count} maps of {size}, right: {', '.join(scores)}", flush=True)

    # What a rule is, only the examples before tell
    def continued(texts, size, shots):
        rule = texts.random.choice(RULES[4:])
        parts = [([0], False)]
        for _ in range(shots + 1):
            scene = texts.scene()
            answer = by_rule(scene, rule)
            parts += [(texts.add_map(scene, size), False), (tokenizer.encode(answer + "\n"), True)]
        return parts, answer

    for size, most in ((64, 2), (16, 4), (LISTED, 4)):
        for shots in (0, 1, 2, 4)[:most.bit_length() + 1]:
            right = sum(a == b for a, b in said(lambda texts: continued(texts, size, shots), 2))
            print(f"llm: maps of {size}, colours, shapes, sizes or count: after {shots} examples {right} of "
                  f"{count} right", flush=True)


def make_pictures() -> None:
    for name, seed in (("example-1", "example 5"), ("example-2", "example 8"), ("example-3", "example 12")):
        Scene.draw_from(seed).picture().save(ASSETS / f"{name}.png")


if __name__ == "__main__":
    for part in sys.argv[1:] or ("vit", "llm", "pictures"):
        {"vit": make_vit, "llm": make_llm, "pictures": make_pictures}[part]()
