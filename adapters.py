"""The adapters, from patch features to embeddings the LLM reads as words, and the `VLM` that joins the parts.

Adding an adapter takes a class (see `Adapter`) and a line in ADAPTERS; keyword-only arguments are its sizes.
"""
import collections
import contextlib
import itertools
import math
import re
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import (IMAGE, Batch, FeedForward, Pixels, attend, gap, ignore_signals, one_of, pack, send, skip,
                  stack)
from llm import LLM, nats
from formats.files import InputError, guard, named, read_json, read_metadata, read_tensors, write_tensors
from formats.hub import find_checkpoint, find_file
from formats.tokenizer import Tokenizer
from formats.weights import Checkpoint, Family, depth, load_weights
from lora import ROOT, WEIGHTS, fold_lora, load_lora, lora_layers, read_peft, save_lora
from vit import ViT


class Adapter(nn.Module):
    """An adapter is told the encoder's width, the LLM's width and the patch grid (patches along a side),
    nothing else. It maps features (P,N,Dv) of P pictures, as the ViT gives them, to (P,Q,D); the last grid²
    of the N are the patches.

    `queries` is Q; `side` is the root of Q where they are places of the picture, row by row, None where they
    are queries, which have no place. With `text` above 0 it reads as many of the prompt's first tokens too,
    as (words, seen): the LLM's embeddings (P,L,D) or, with a `vocabulary` of its own, ids (P,L); and where
    there is a word (P,L).

    Where an adapter has a method `between`, of what happens between the LLM's blocks, nothing of a picture
    stands among the words; of these blocks it is told in `join`.
    """
    queries: int
    side: int | None = None
    text = vocabulary = 0
    readers = "(?!)"  # a regular expression of the names of its modules in which queries attend to patches

    def join(self, layers: int, width: int) -> None:
        """Called once with the number of the LLM's blocks and their width."""


class Linear(Adapter):
    """One projection, patch by patch, as LLaVA's first version (Liu et al., 2023, arXiv:2304.08485)."""

    def __init__(self, vision_width: int, width: int, grid: int):
        super().__init__()
        self.side, self.queries = grid, grid ** 2
        self.projection = nn.Linear(vision_width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.projection(features[:, -self.queries:])


class MLP(Adapter):
    """Two layers with GELU, patch by patch and for the `class_tokens` before them, as LLaVA-1.5 (Liu et al.,
    2023, arXiv:2310.03744)."""

    def __init__(self, vision_width: int, width: int, grid: int, *, class_tokens: int = 0):
        super().__init__()
        self.side, self.queries = None if class_tokens else grid, grid ** 2 + class_tokens
        self.up, self.down = nn.Linear(vision_width, width), nn.Linear(width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(features[:, -self.queries:])))


class PixelShuffle(Adapter):
    """The connector of Idefics3 (Laurençon et al., 2024, arXiv:2408.12637), SmolVLM and nanoVLM: features of
    each square of `scale` × `scale` patches, row by row, are one long vector; then one projection. Raises
    InputError where the patch grid can't be cut in such squares."""

    def __init__(self, vision_width: int, width: int, grid: int, *, scale: int = 2, bias: bool = False):
        super().__init__()
        if scale < 1 or grid % scale:
            raise InputError(
                f"pixelshuffle: {grid} × {grid} patches can't be cut in squares of {scale} × {scale}")
        self.side, self.scale = grid // scale, scale
        self.queries = self.side ** 2
        self.projection = nn.Linear(vision_width * scale ** 2, width, bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = features[:, -self.queries * self.scale ** 2:]
        x = x.unflatten(1, (self.side, self.scale, self.side, self.scale)).transpose(2, 3)  # (P,Y,X,s,s,Dv)
        return self.projection(x.flatten(3).flatten(1, 2))


# ---------------------------------------------------------------------------------------------------------
# What the transformers among them share

class Attention(nn.Module):
    """Multi-head attention of q (P,Q,W) to k and v (P,N,W'); mask (P,1,Q or 1,N) true where a query sees a
    key."""

    def __init__(self, width: int, source_width: int, heads: int, *, shrink: int = 1, bias: bool = True):
        super().__init__()
        inner = width // shrink  # of all heads together
        if heads < 1 or inner < 1 or inner % heads:
            raise InputError(f"the adapter's width {inner} is not a multiple of its {heads} heads")
        self.heads = heads
        self.q = nn.Linear(width, inner, bias)
        self.k, self.v = (nn.Linear(source_width, inner, bias) for _ in "kv")
        self.out = nn.Linear(inner, width, bias)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (P,H,…,hd)

    def keys(self, k, v):
        return self.split(self.k(k)), self.split(self.v(v))

    def forward(self, q, k=None, v=None, mask=None, kv=None):  # kv: what `keys` made of k and v
        q, (k, v) = self.split(self.q(q)), kv or self.keys(k, v)
        return self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class Words(nn.Module):
    """The first `positions` tokens of a prompt in an adapter's own width: ids (P,L) of `vocabulary` words or,
    where it is 0, the LLM's embeddings (P,L,D)."""

    def __init__(self, llm_width: int, width: int, positions: int, vocabulary: int):
        super().__init__()
        self.words = nn.Embedding(vocabulary, width) if vocabulary else nn.Linear(llm_width, width)
        self.positions = nn.Embedding(positions, width)

    def forward(self, x, words, seen):  # queries (P,Q,W) to these and words, (P,Q+L,W), and mask (P,1,1,Q+L)
        words = self.words(words) + self.positions((seen.cumsum(1) - 1).clamp(min=0))
        return torch.cat([x, words], 1), F.pad(seen, (x.shape[1], 0), value=True)[:, None, None]


def initialise(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


# ---------------------------------------------------------------------------------------------------------
# The Q-Former

class QFormerBlock(nn.Module):
    """BERT's block, normed after each sublayer. Queries and words read each other, the queries alone read the
    picture; words have a feed-forward layer of their own or, without `text`, end here."""

    def __init__(self, width: int, vision_width: int | None, heads: int, mlp: int, dropout: float, eps: float,
                 text: bool):
        super().__init__()
        self.attention, self.norm1 = Attention(width, width, heads), nn.LayerNorm(width, eps)
        self.cross = Attention(width, vision_width, heads) if vision_width else None
        self.norm2 = nn.LayerNorm(width, eps) if vision_width else None
        self.mlp, self.norm3 = FeedForward(width, mlp, "gelu"), nn.LayerNorm(width, eps)
        self.text_mlp = FeedForward(width, mlp, "gelu") if text else None
        self.text_norm = nn.LayerNorm(width, eps) if text else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask, queries, features):  # x (P,Q+L,W)
        x = self.norm1(x + self.dropout(self.attention(x, x, x, mask)))
        x, text = x[:, :queries], x[:, queries:]
        if self.cross is not None:
            x = self.norm2(x + self.dropout(self.cross(x, features, features)))
        x = self.norm3(x + self.dropout(self.mlp(x)))
        if self.text_mlp is None:
            return x
        return torch.cat([x, self.text_norm(text + self.dropout(self.text_mlp(text)))], 1)


class QFormer(Adapter):
    """BLIP-2's querying transformer (Li et al., 2023, arXiv:2301.12597): learned queries attend to each other
    and, in every `every`-th block, to the patches (all N features, class token too); then a projection to the
    LLM's width. With `text` the prompt's words join the queries' attention to each other (InstructBLIP: Dai
    et al., 2023, arXiv:2305.06500).

    Sizes: number of `queries`, `layers`, their `width` and `heads`, `mlp` (hidden size of the feed-forward
    layers, 4 × width unless given), `dropout` after every sublayer, `text` (tokens of the prompt it reads; 0:
    none), `vocabulary` (words, where the prompt comes as ids of another tokenizer than the LLM's).
    """
    readers = r"blocks\.\d+\.cross"

    def __init__(self, vision_width: int, llm_width: int, grid: int, *, queries: int = 32, layers: int = 4,
                 width: int = 256, heads: int = 8, mlp: int | None = None, dropout: float = 0.0,
                 every: int = 2, text: int = 0, vocabulary: int = 0, eps: float = 1e-12):
        super().__init__()
        self.queries, self.text, self.vocabulary = queries, text, vocabulary
        self.query = nn.Parameter(torch.empty(queries, width))
        self.words = Words(llm_width, width, text, vocabulary) if text else None
        self.norm, self.dropout = nn.LayerNorm(width, eps), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(  # no one reads what words the last block would give
            QFormerBlock(width, None if i % every else vision_width, heads, mlp or 4 * width, dropout, eps,
                         text=text > 0 and i + 1 < layers) for i in range(layers))
        self.projection = nn.Linear(width, llm_width)
        nn.init.normal_(self.query, std=0.02)
        initialise(self)

    def forward(self, features: torch.Tensor, words: torch.Tensor | None = None,
                seen: torch.Tensor | None = None) -> torch.Tensor:
        x, mask = self.query.expand(len(features), -1, -1), None
        if words is not None:
            x, mask = self.words(x, words, seen)
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, mask, self.queries, features)
        return self.projection(x[:, :self.queries])

    @classmethod
    def from_pretrained(cls, name: str, dtype: torch.dtype = torch.float32) -> "QFormer":
        """Loads the Q-Former and projection of a BLIP-2 or InstructBLIP checkpoint (a folder or a hub name);
        that of InstructBLIP reads ids of BERT's tokenizer. Raises InputError."""
        checkpoint = Checkpoint(name)
        family, sizes = checkpoint.family({"blip-2": BLIP2, "instructblip": INSTRUCTBLIP})
        with torch.device("meta"), guard(path := checkpoint.folder / "config.json"), named(path):
            depth(sizes["layers"])
            qformer = cls(**sizes)
        words = rf"|encoder\.layer\.{sizes['layers'] - 1}\.(intermediate|output)\..*"  # of the last block
        load_weights(qformer, checkpoint, family._replace(unused=family.unused + words), dtype)
        return qformer.eval()


def qformer_sizes(c: dict) -> dict:
    q = c.get("qformer_config", {})
    if q.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act {q['hidden_act']!r} is not supported")
    words = dict(text=q.get("max_position_embeddings", 512), vocabulary=q.get("vocab_size", 30522))
    return dict(queries=c.get("num_query_tokens", 32), layers=q.get("num_hidden_layers", 12),
                width=q.get("hidden_size", 768), heads=q.get("num_attention_heads", 12),
                mlp=q.get("intermediate_size", 3072), every=q.get("cross_attention_frequency", 2),
                eps=q.get("layer_norm_eps", 1e-12), **words if c["model_type"] == "instructblip" else {})


def blip2_config(c: dict) -> dict:
    return dict(vision_width=c.get("qformer_config", {}).get("encoder_hidden_size", 1408),
                llm_width=c["text_config"]["hidden_size"], grid=0, **qformer_sizes(c))


BLIP2 = Family(blip2_config, {
    "norm": "layernorm",
    "query": (lambda tensor: tensor[0], "query_tokens"),
    **{f"blocks.{{}}.{mine}.{ours}": f"encoder.layer.{{}}.{theirs}.{name}"
       for mine, theirs in (("attention", "attention"), ("cross", "crossattention"))
       for ours, name in (("q", "attention.query"), ("k", "attention.key"), ("v", "attention.value"),
                          ("out", "output.dense"))},
    "blocks.{}.norm1": "encoder.layer.{}.attention.output.LayerNorm",
    "blocks.{}.norm2": "encoder.layer.{}.crossattention.output.LayerNorm",
    "blocks.{}.mlp.up": "encoder.layer.{}.intermediate_query.dense",
    "blocks.{}.mlp.down": "encoder.layer.{}.output_query.dense",
    "blocks.{}.norm3": "encoder.layer.{}.output_query.LayerNorm",
    "projection": "language_projection",
}, r"(vision_model|language_model)\..*|.*position_ids")
INSTRUCTBLIP = BLIP2._replace(names=BLIP2.names | {
    "norm": "embeddings.layernorm",
    "words.words": "embeddings.word_embeddings",
    "words.positions": "embeddings.position_embeddings",
    "blocks.{}.text_mlp.up": "encoder.layer.{}.intermediate.dense",
    "blocks.{}.text_mlp.down": "encoder.layer.{}.output.dense",
    "blocks.{}.text_norm": "encoder.layer.{}.output.LayerNorm",
})


# ---------------------------------------------------------------------------------------------------------
# Flamingo's resampler

class ResamplerBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int, eps: float):
        super().__init__()
        self.source_norm, self.norm1, self.norm2 = (nn.LayerNorm(width, eps) for _ in range(3))
        self.attention = Attention(width, width, heads, bias=False)
        self.mlp = FeedForward(width, mlp, "relu", bias=False)

    def forward(self, x, source):  # (P,Q,W), (P,N,W)
        y = self.norm1(x)
        both = torch.cat([y, self.source_norm(source)], 1)
        x = x + self.attention(y, both, both)
        return x + self.mlp(self.norm2(x))


class Resampler(Adapter):
    """Flamingo's Perceiver resampler (Alayrac et al., 2022, arXiv:2204.14198): learned queries attend to the
    patches and to each other at once, in every block. The paper's embeddings of a frame's time are embeddings
    of a patch's place, a picture being one frame; norms and the ReLU are those of IDEFICS, its public
    reproduction.

    Sizes: number of `queries`, `layers`, their `width` and `heads`, `mlp` (hidden size of the feed-forward
    layers, 4 × width unless given).
    """
    readers = r"blocks\.\d+\.attention"

    def __init__(self, vision_width: int, llm_width: int, grid: int, *, queries: int = 32, layers: int = 4,
                 width: int = 256, heads: int = 8, mlp: int | None = None, eps: float = 1e-5):
        super().__init__()
        self.queries = queries
        self.query, self.places = (nn.Parameter(torch.randn(n, width) * 0.02) for n in (queries, grid ** 2))
        self.project_in = nn.Linear(vision_width, width)
        self.blocks = nn.ModuleList(
            ResamplerBlock(width, heads, mlp or 4 * width, eps) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps)
        self.projection = nn.Linear(width, llm_width)
        initialise(self)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        source = self.project_in(features[:, -len(self.places):]) + self.places  # (P,G²,W)
        x = self.query.expand(len(features), -1, -1)  # (P,Q,W)
        for block in self.blocks:
            x = block(x, source)
        return self.projection(self.norm(x))


# ---------------------------------------------------------------------------------------------------------
# SAM's two-way attention

def fourier_places(matrix: torch.Tensor, grid: int) -> torch.Tensor:
    """Sines and cosines (grid²,W) of where each patch's centre lies; `matrix` (2,W/2): frequencies along x
    and y, in turns per half picture (Tancik et al., 2020, arXiv:2006.10739)."""
    at = (torch.arange(grid) + 0.5) / grid * 2 - 1
    angles = 2 * math.pi * torch.stack([at.repeat(grid), at.repeat_interleave(grid)], -1) @ matrix
    return torch.cat([angles.sin(), angles.cos()], -1)


class TwoWayBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int, shrink: int, eps: float, first: bool):
        super().__init__()
        self.first = first
        self.attention = Attention(width, width, heads)
        self.to_image, self.to_tokens = (Attention(width, width, heads, shrink=shrink) for _ in range(2))
        self.mlp = FeedForward(width, mlp, "relu")
        self.norm1, self.norm2, self.norm3, self.image_norm = (nn.LayerNorm(width, eps) for _ in range(4))

    def forward(self, x, image, marks, places, mask):  # tokens (P,Q+L,W), patches (P,G²,W), their positions
        if self.first:  # the tokens are their own marks
            x = self.norm1(self.attention(x, x, x, mask))
        else:
            x = self.norm1(x + self.attention(x + marks, x + marks, x, mask))
        x = self.norm2(x + self.to_image(x + marks, image + places, image))
        x = self.norm3(x + self.mlp(x))
        return x, self.image_norm(image + self.to_tokens(image + places, x + marks, x, mask))


class TwoWay(Adapter):
    """The two-way transformer of SAM's mask decoder (Kirillov et al., 2023, arXiv:2304.02643): learned
    queries, and the words of the prompt with `text`, attend to each other and to the patches, and the patches
    to them; what a token was at first, and where a patch lies (random Fourier features), is added anew at
    every attention.

    Sizes: number of `queries`, `layers`, their `width` (even) and `heads`, `mlp` (hidden size of the
    feed-forward layers, 4 × width unless given), `shrink` (the attentions between tokens and patches have
    width / shrink numbers in all heads together), `text` (tokens of the prompt it reads; 0: none).
    """
    readers = r"(blocks\.\d+\.)?to_image"

    def __init__(self, vision_width: int, llm_width: int, grid: int, *, queries: int = 32, layers: int = 2,
                 width: int = 256, heads: int = 8, mlp: int | None = None, shrink: int = 2, text: int = 0,
                 eps: float = 1e-5):
        super().__init__()
        if width % 2:
            raise InputError(f"twoway: the width {width} is not even")
        self.queries, self.text = queries, text
        self.query = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.words = Words(llm_width, width, text, 0) if text else None
        self.project_in = nn.Linear(vision_width, width)
        matrix = torch.randn(2, width // 2, generator=torch.Generator().manual_seed(0))  # of every run
        self.register_buffer("places", fourier_places(matrix, grid), persistent=False)
        self.blocks = nn.ModuleList(
            TwoWayBlock(width, heads, mlp or 4 * width, shrink, eps, first=i == 0) for i in range(layers))
        self.to_image, self.norm = Attention(width, width, heads, shrink=shrink), nn.LayerNorm(width, eps)
        self.projection = nn.Linear(width, llm_width)
        initialise(self)

    def forward(self, features: torch.Tensor, words: torch.Tensor | None = None,
                seen: torch.Tensor | None = None) -> torch.Tensor:
        image = self.project_in(features[:, -len(self.places):])  # (P,G²,W)
        x, mask = self.query.expand(len(features), -1, -1), None
        if words is not None:
            x, mask = self.words(x, words, seen)
        marks = x
        for block in self.blocks:
            x, image = block(x, image, marks, self.places, mask)
        x = self.norm(x + self.to_image(x + marks, image + self.places, image))
        return self.projection(x[:, :self.queries])


# ---------------------------------------------------------------------------------------------------------
# Flamingo

class GatedBlock(nn.Module):
    """Gated cross-attention, then a gated feed-forward layer: what each adds is multiplied by the tanh of a
    number that starts at 0, so that the LLM starts as it was."""

    def __init__(self, width: int, source_width: int, heads: int, mlp: int, eps: float):
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(width, eps) for _ in "12")
        self.attention = Attention(width, source_width, heads, bias=False)
        self.mlp = FeedForward(width, mlp, "silu", bias=False, gated=True)
        self.alpha1, self.alpha2 = (nn.Parameter(torch.zeros(1)) for _ in "12")

    def forward(self, x, kv, seen):  # (B,T,W), 2 × (B,H,S,hd), (B,T,S)
        blind = ~seen.any(-1, keepdim=True)  # (B,T,1): softmax over nothing would be NaN
        y = self.attention(self.norm1(x), mask=(seen | blind)[:, None], kv=kv)
        x = x + self.alpha1.tanh() * y.masked_fill(blind, 0)
        return x + self.alpha2.tanh() * self.mlp(self.norm2(x))


class Flamingo(Adapter):
    """Flamingo (Alayrac et al., 2022, arXiv:2204.14198): before every `every`-th block of the frozen LLM a
    gated block, in which a word attends to the resampled picture that was the last to come before it. Norms
    and feed-forward layers are those of IDEFICS, its public reproduction.

    Sizes: number of `queries`, `layers`, `width`, `heads` and `mlp` of the resampler; `heads` of the gated
    blocks too, whose feed-forward layers are 4 times as wide as the LLM.
    """
    NEVER = 1 << 62  # a position that no word has
    readers = r"resampler\.blocks\.\d+\.attention"

    def __init__(self, vision_width: int, llm_width: int, grid: int, *, queries: int = 32, layers: int = 4,
                 width: int = 256, heads: int = 8, mlp: int | None = None, every: int = 2, eps: float = 1e-6):
        super().__init__()
        self.queries, self.every, self.sizes = queries, every, (llm_width, heads, eps)
        self.resampler = Resampler(vision_width, llm_width, grid, queries=queries, layers=layers, width=width,
                                   heads=heads, mlp=mlp)

    def join(self, layers: int, width: int) -> None:
        llm_width, heads, eps = self.sizes
        self.blocks = nn.ModuleList(GatedBlock(width, llm_width, heads, 4 * width, eps)
                                    for _ in range(0, layers, self.every))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.resampler(features)

    def between(self, images: torch.Tensor, begins: torch.Tensor):
        """What the LLM calls between its blocks. images (P,Q,D), row by row; begins (B,M): the positions from
        which on the words of a row see its images, of which there are M at most, NEVER for one that it
        doesn't have."""
        count = (begins < self.NEVER).sum(1, keepdim=True)  # (B,1)
        which = torch.arange(begins.shape[1], device=images.device)  # (M,)
        place = count.cumsum(0) - count + which  # (B,M)
        Q, images = images.shape[1], images[place.clamp(max=len(images) - 1)].flatten(1, 2)  # (B,M·Q,D)
        kept = {}  # keys and values of each gated block, which are the same for every word

        def apply(layer: int, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            if layer % self.every:
                return x
            block = self.blocks[layer // self.every]
            with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
                if layer not in kept:
                    kept[layer] = block.attention.keys(images, images)
                beams = len(x) // len(begins)
                *kv, since = (t.repeat_interleave(beams, 0) for t in (*kept[layer], begins))
                last = (since[:, None] <= positions[..., None]).sum(-1, keepdim=True) - 1  # (B,T,1)
                seen = (last == which).repeat_interleave(Q, -1)  # (B,T,M·Q)
                return block(x.float(), kv, seen).to(x.dtype)

        return apply


ADAPTERS = {"linear": Linear, "mlp": MLP, "pixelshuffle": PixelShuffle, "qformer": QFormer,
            "resampler": Resampler, "twoway": TwoWay, "flamingo": Flamingo}


def make_adapter(config: dict, vit: ViT, llm: LLM) -> Adapter:
    """The untrained adapter that the config of a run (see `VLM`) names. Raises InputError."""
    kind, sizes, layer = config["adapter"], config["adapter_sizes"], config.get("layer")
    one_of(ADAPTERS, "adapter", kind)
    if layer is not None and not -len(vit.blocks) - 1 <= layer <= len(vit.blocks):
        raise InputError(f"layer {layer} of an encoder with {len(vit.blocks)} blocks")
    try:
        depth(sizes.get("layers", 1))
        adapter = ADAPTERS[kind](vit.config.hidden if layer is None else vit.config.width, llm.config.hidden,
                                 vit.config.grid, **sizes)
    except (TypeError, ValueError) as error:
        raise InputError(f"the {kind} adapter: {str(error).split(') ')[-1]}") from None
    adapter.join(llm.config.layers, llm.config.width)
    return adapter


# ---------------------------------------------------------------------------------------------------------
# The VLM

class Format(NamedTuple):
    """How a family of VLMs reads pictures and text: strings with IMAGE where a picture or one of its
    embeddings stands.

    `chat` makes a prompt of the number of images that come first and the text after them. `image` spells a
    picture of rows and columns of tiles (0 and 0: seen as a whole), each `queries` embeddings. `question` is
    asked where there is no text. With `images_first`, images at the head of a prompt come even before the
    start token. `end` ends an answer where config.json names no such token.
    """
    chat: Callable[[int, str], str]
    image: Callable[[int, int, int], str] = lambda queries, rows, columns: IMAGE * queries
    question: str = "Describe this image."
    images_first: bool = False
    end: str = ""


BEGIN, END = "<image begin>", "<image end>"
OURS = Format(lambda images, text: IMAGE * images + text,
              lambda queries, rows, columns: BEGIN + IMAGE * queries + END, question="")
WHOLE = itertools.repeat((0, 0))  # rows and columns of tiles of pictures that are seen as a whole
IMAGE_POSITIONS = ("sequence", "shared", "xy", "sequence+xy", "rope-xy")


class VLM(nn.Module):
    """A frozen ViT and a frozen LLM joined by an adapter.

    In the ids of a prompt, `placeholder` stands for each embedding of an image. The vocabulary of a VLM of
    ours grows by three ids that neither the LLM nor the tokenizer has: `marker` and the next one, learned
    embeddings (`markers`) that begin and end an image, and the placeholder. Public VLMs (see PUBLIC) have
    these, if any, in their vocabulary. `dtype` is what is computed in (unless given, that of the LLM's
    weights); what is trained whole is held in float32.

    `config` is what config.json of a run's folder holds: "vit" and "llm" (names) or "from" (the name of a
    public VLM, whose parts it takes), "image_size" (pixels; null: the checkpoint's own), "layer" (of the ViT;
    null: the last), "adapter" (a name in ADAPTERS), "adapter_sizes", "image_position", "prompt", "split"
    (whether pictures are seen in tiles too, where the family does so), "train" (what was trained whole, of
    "adapter", "llm" and "vit"; where it is missing, the adapter), and what train.py adds.

    What an image's embeddings have for positions in the LLM ("image_position"): `sequence` (the default) the
    next one for each, as words; `shared` one for all; `xy` too, but a learned embedding of its row and one of
    its column are added to each patch's features before the adapter; `sequence+xy` both; `rope-xy` gives a
    word (t, t, t) and an image's embedding (t, t + row, t + column), as Qwen2-VL does, which takes an adapter
    that keeps the grid of patches and an LLM with rotary positions.
    """

    prefixes = {}  # of a public one: part -> a regular expression, how the names of its tensors begin

    def __init__(self, vit: ViT, llm: LLM, tokenizer: Tokenizer, config: dict, format: Format = OURS,
                 dtype: torch.dtype | None = None):
        super().__init__()
        self.format, self.dtype, V = format, dtype or llm.dtype, llm.config.vocabulary
        self.reader = None  # the tokenizer of an adapter with a vocabulary of its own
        # a tokenizer may have tokens for which the LLM has no embedding: no id of ours is one of them
        self.marker = max(V, *(id + 1 for id in tokenizer.bytes))
        self.placeholder = config.get("placeholder", self.marker + 2)
        self.no_embedding = {id for id in tokenizer.bytes if id >= V} - {self.placeholder}
        tokenizer.add(IMAGE, self.placeholder)
        self.split = config.get("split", True)
        position = config.get("image_position", "sequence")
        self.image_position = one_of(IMAGE_POSITIONS, "image position", position)
        self.vit, self.llm = vit.requires_grad_(False), llm.requires_grad_(False)
        self.tokenizer, self.config = tokenizer, config
        with torch.device("cpu" if format is OURS else "meta"):  # the weights of others come from a file
            self.adapter = make_adapter(config, vit, llm)
        self.slots = 0 if hasattr(self.adapter, "between") else self.adapter.queries  # of an image in the ids
        if self.image_position == "rope-xy":
            if self.adapter.side is None:
                raise InputError("rope-xy needs an adapter that keeps the grid of patches, "
                                 f"which {config['adapter']} doesn't")
            if min((rope.size for rope in llm.config.ropes if rope), default=0) < 6:  # 1, 1 and 1 angle
                raise InputError("rope-xy needs a language model that rotates 6 numbers of each head or more")
        self.places = None
        if self.image_position in ("xy", "sequence+xy"):
            vision_width = vit.config.hidden if config.get("layer") is None else vit.config.width
            self.places = nn.Parameter(torch.randn(2, vit.config.grid, vision_width) * 0.02)  # rows, columns
        self.start, self.markers = tokenizer.prefix, None
        # end tokens say nothing themselves; in a run of ours a token with a newline ends a caption too
        self.end_tokens = llm.config.end_tokens
        if format.end and not self.end_tokens:
            self.end_tokens = (tokenizer.special[format.end],)
        self.ends = self.end_tokens
        if format is OURS:
            self.start = [] if llm.config.start_token is None else [llm.config.start_token]
            self.ends += tuple(i for i, token in tokenizer.bytes.items() if b"\n" in token)
            tokenizer.add(BEGIN, self.marker, special=True)
            tokenizer.add(END, self.marker + 1, special=True)
            scale = llm.embedding.weight.float().std() * llm.config.embedding_scale
            self.markers = nn.Parameter(torch.randn(2, llm.config.hidden) * scale)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """(N,Dv) of the features of a picture."""
        c = self.vit.config
        return (c.class_tokens + c.registers + c.grid ** 2,
                c.hidden if self.config.get("layer") is None else c.width)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What a run trains: the adapter, the markers, the embeddings of places, and the LoRA of the
        backbones, if they have one, or a backbone as a whole."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def weights(self, part: str) -> dict[str, nn.Parameter]:
        """The parameters of "vit" or "llm" by their own names; for "adapter", all that are in neither."""
        if part in ("vit", "llm"):
            return dict(getattr(self, part).named_parameters())
        return {name: p for name, p in self.named_parameters() if not name.startswith(("vit.", "llm."))}

    def autocast(self, held: torch.dtype) -> torch.autocast:
        """Lets what is held in float32 compute in `dtype`; changes nothing of what is held in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=held != self.dtype)

    def train(self, mode: bool = True) -> "VLM":
        super().train(mode)
        for part in (self.vit, self.llm):
            part.eval()
            for layer in lora_layers(part).values():  # whose dropout
                layer.train(mode)
        return self

    def pack(self) -> None:
        """Makes it faster on a CPU and fit for inference alone: see `data.pack`."""
        self.llm.pack()
        for part in (self.vit, self.adapter):
            pack(part, self.dtype)

    def compile_blocks(self) -> None:
        """Has torch.compile make one kind of block after the other faster when it first runs, in seconds: all
        blocks of a kind are one graph, whatever a text's length."""
        torch._dynamo.config.cache_size_limit = 64  # for training, for captions, for batches of one, …
        torch._dynamo.config.optimize_ddp = False  # it would cut blocks in pieces, for buckets of gradients
        for part in (self.vit, self.adapter, self.llm):
            for block in getattr(part, "blocks", ()):
                block.compile(dynamic=True)

    @property
    def device(self) -> torch.device:
        return self.llm.embedding.weight.device

    def prompt_for(self, question: str) -> str:
        """What is asked of a picture in a caption set: its `question` or, where there is none, the run's own
        prompt."""
        return question or self.config.get("prompt", "")

    def image_tokens(self, rows: int = 0, columns: int = 0) -> list[int]:
        """Ids that a picture of so many tiles becomes; 0 and 0: one that is seen as a whole."""
        return self.tokenizer.encode(self.format.image(self.slots, rows, columns))

    def encode(self, text: str, caption: str | None = None, max_tokens: int = 128,
               images: int = 1, tiles: Iterator[tuple[int, int]] = WHOLE, raw: bool = False,
               prefix: bool = False) -> tuple[list[int], list[bool]]:
        """Ids of a sequence: start token, `text` in the model's prompt format with an image where it says
        `<image>` (before it as many as `images`, where it doesn't), and the caption, at most `max_tokens`
        long, with what ends it: in a run of ours a newline (which may be one token with the sign before it)
        or, where the vocabulary has none, and in a public VLM, the end token. Also returns which of the ids
        are targets: those of the caption, with `prefix` those of the text's words too. Raises InputError
        where a token of the text has no embedding.

        `tiles` yields rows and columns of each picture (unless given, all are seen as a whole). Text is data:
        a special token that it spells is read as plain text. With `raw` it is the whole prompt, special
        tokens are read, and there is no format.
        """
        format = OURS if raw else self.format
        if IMAGE in text:
            images = re.match(f"(?:{IMAGE})*", text).end() // len(IMAGE)
            text = text[images * len(IMAGE):]
        text = text or format.question
        head, _, tail = format.chat(images, "\0" if text else "").partition("\0")
        prompt, plain = head + text + tail, range(len(head), len(head + text) * (not raw))
        ids = self.tokenizer.encode(prompt, plain=plain)
        if ids.count(self.placeholder) != prompt.count(IMAGE):
            raise InputError(f"token {self.placeholder} stands for a picture, and for a word of the prompt "
                             "too")
        first = len(list(itertools.takewhile(self.placeholder.__eq__, ids))) * self.format.images_first
        ids = ids[:first] + self.start + ids[first:]
        ids = [i for id in ids
               for i in (self.image_tokens(*next(tiles)) if id == self.placeholder else (id,))]
        target = []
        if caption is not None:
            space = "" if self.tokenizer.strip else gap(prompt)  # SentencePiece's kind puts it itself
            end = "\n" if self.format is OURS else ""
            target = self.tokenizer.encode(space + caption.replace(IMAGE, " ") + end, special=False)
            cut, ended = len(target) > max_tokens, end and target and target[-1] in self.ends
            target = target[:max_tokens] + ([] if cut or ended else list(self.end_tokens[:1]))
        for id in self.no_embedding.intersection(ids + target):
            token = self.tokenizer.bytes[id].decode(errors="replace")
            raise InputError(f"token {token!r} ({id}) has no embedding: the tokenizer was extended, the "
                             f"language model wasn't (it has {self.llm.config.vocabulary})")
        words = [prefix and id < self.llm.config.vocabulary and id != self.placeholder for id in ids]
        return ids + target, words + [True] * len(target)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (P,3,H,W) to the encoder's features (P,N,Dv), with gradients where any of it is trained."""
        trained, held = any(p.requires_grad for p in self.vit.parameters()), self.vit.positions.dtype
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()), self.autocast(held):
            return self.vit(pixels, self.config.get("layer"))

    def prompt(self, tokens: torch.Tensor, where: torch.Tensor | None = None,
               pictures: int | None = None) -> torch.Tensor | None:
        """Ids (P,L), in the adapter's own vocabulary where it has one, of what it may read with each of P
        pictures: the words in its row of the ids (B,T), up to the first of the places `where` (M,) of
        targets, at most as many as its `text`, then -1. None for an adapter that reads no words. `pictures`
        is P, which a GPU need not be asked for then."""
        if not self.adapter.text:
            return None
        B, T = tokens.shape
        image = tokens == self.placeholder
        seen = (tokens < self.llm.config.vocabulary) & ~image
        if where is not None:
            starts = torch.zeros(B * T, dtype=torch.long, device=where.device).scatter(0, where, 1).view(B, T)
            seen = seen & (starts.cumsum(1) - starts == 0)
        repeats = image.sum(1) // self.slots
        if self.reader is not None:
            reader, rows = self.reader, []
            for row, read in zip(tokens, seen):
                ids = reader.encode(self.tokenizer.decode(row[read].tolist(), special=False), special=False)
                ids = [*reader.prefix, *ids, *reader.suffix][:self.adapter.text]
                rows.append(torch.tensor(ids, device=tokens.device))
            return nn.utils.rnn.pad_sequence(rows, True, -1).repeat_interleave(repeats, 0)
        order = (~seen).byte().argsort(stable=True, dim=1)[:, :self.adapter.text]  # the words first
        words = tokens.masked_fill(~seen, -1).gather(1, order)
        return words.repeat_interleave(repeats, 0, output_size=pictures)

    def images(self, features: torch.Tensor | None,
               prompt: torch.Tensor | None = None) -> torch.Tensor | None:
        """What the adapter makes (P,Q,D) of features (P,N,Dv) and of a `prompt` as `VLM.prompt` gives it.
        None of no features."""
        if features is None:
            return None
        features = features.float()
        if self.places is not None:
            places = (self.places[0][:, None] + self.places[1]).flatten(0, 1)  # (G²,Dv)
            features = features + F.pad(places, (0, 0, features.shape[1] - len(places), 0))
        text = ()
        if prompt is not None:
            words = prompt.clamp(min=0)
            text = (words if self.adapter.vocabulary else self.llm.embed(words).float()), prompt >= 0
        with self.autocast(torch.float32):
            return self.adapter(features, *text).to(self.llm.dtype)

    def embed(self, tokens: torch.Tensor, images: torch.Tensor | None) -> torch.Tensor:
        """Ids (B,T), with as many placeholders as the embeddings of P pictures (P,Q,D) fill (None if P is 0),
        to embeddings (B,T,D)."""
        x = self.llm.embed(tokens.clamp(0, self.llm.config.vocabulary - 1))  # (B,T,D)
        if self.markers is not None:
            marks = F.embedding((tokens - self.marker).clamp(0, 1), self.markers).to(x.dtype)
            x = torch.where((tokens >= self.marker)[..., None], marks, x)
        if images is None or not self.slots:
            return x
        image = tokens == self.placeholder
        which = (image.flatten().cumsum(0) - 1).clamp(min=0).view_as(tokens)
        # a masked_scatter would have a GPU's backward pass wait to be told how many these are
        return torch.where(image[..., None], F.embedding(which, images.flatten(0, 1)), x)

    def positions(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """What `LLM.hidden` takes as positions of the ids (B,T): (B,T), or (B,T,3); None for 0, 1, …"""
        if self.image_position.startswith("sequence"):
            return None
        image = tokens == self.placeholder
        behind = F.pad(image, (1, 0))[:, :-1]  # what comes after an image's embedding
        side = self.adapter.side if self.image_position == "rope-xy" else 1
        t = torch.where(behind, side * ~image, 1).cumsum(1) - 1  # an image as a whole takes `side`
        if self.image_position != "rope-xy":
            return t
        i = (image.cumsum(1) - 1) % self.slots
        return t[..., None] + torch.stack([0 * i, i // side, i % side], -1) * image[..., None]

    def read(self, tokens: torch.Tensor, images: torch.Tensor | None, pictures: int | None = None) -> dict:
        """What `LLM.hidden` and `LLM.generate` are to read of ids (B,T) and the embeddings of P pictures
        (P,Q,D) (None if P is 0): their arguments by name. `pictures`: the most of a row, if known: else a GPU
        must be asked, which waits for it."""
        positions = self.positions(tokens)
        inputs = dict(embeddings=self.embed(tokens, images), positions=positions)
        if self.slots or images is None:
            return inputs
        begin = tokens == self.marker
        at = torch.arange(tokens.shape[1], device=tokens.device) if positions is None else positions
        most = begin.sum(1).max() if pictures is None else pictures
        begins = torch.where(begin, at, self.adapter.NEVER).sort(1).values[:, :most]  # (B,M)
        return inputs | dict(between=self.adapter.between(images, begins))

    def batch(self, examples: list[tuple[str, str]], max_tokens: int = 128,
              tiles: Iterator[tuple[int, int]] = WHOLE, prefix: bool = False) -> Batch:
        """(text, answer) pairs, with pictures of these `tiles`, to what `forward` takes: see `encode`."""
        rows = [self.encode(*pair, max_tokens, tiles=tiles, prefix=prefix) for pair in examples]
        tensors = [send(tensor, self.device) for tensor in stack(rows)]
        return Batch(*tensors, max(ids.count(self.marker) for ids, _ in rows))

    def spelling(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """What P pictures are to spell, a caption each: the places (K,) of their first embeddings among those
        of all pictures, and the captions' tokens (K,). K is 0 with an adapter whose embeddings are places of
        the picture, which can't be put in a caption's order."""
        Q = self.adapter.queries if self.adapter.side is None else 0
        ids = [self.tokenizer.encode(caption, special=False)[:Q] for caption in captions]
        places = [place for i, row in enumerate(ids) for place in range(i * Q, i * Q + len(row))]
        return tuple(send(torch.tensor(x, dtype=torch.long), self.device) for x in (places, sum(ids, [])))

    def forward(self, tokens: torch.Tensor, features: torch.Tensor, where: torch.Tensor,
                targets: torch.Tensor | None = None, pictures: int | None = None,
                spelling: tuple[torch.Tensor, torch.Tensor] | None = None):
        """Scores (M,V) of the token after each of the places `where` (M,), counted along the flattened ids
        (B,T); given the `targets` (M,) that stand there, their nats (M,) instead. With a `spelling`, places
        (K,) among the embeddings of all pictures and what tokens (K,) they are to be, also the nats (K,) of
        these. `pictures`: see `read`."""
        V, words = self.llm.config.vocabulary, self.llm.embedding.weight
        with self.autocast(self.llm.dtype):
            images = self.images(features, self.prompt(tokens, where, len(features)))
            hidden = self.llm.hidden(**self.read(tokens, images, pictures)).flatten(0, 1)[where]
            if targets is None:
                return self.llm.logits(hidden)
            lost = nats(hidden, targets, self.llm.logits, V)
            if spelling is None:
                return lost
            places, letters = spelling
            return lost, nats(images.flatten(0, 1)[places], letters, lambda x: F.linear(x, words), V)

    def read_pictures(self, captions, batches, bad: dict[int, str], workers=0, split: bool | None = None):
        """Reads the pictures of a caption set, batch by batch of indices. Yields the indices of those that
        can be read, and their pixels as Views (None if there are none); counts the others in `bad`, {index:
        reason}. `split`: as for `caption`. Raises InputError as `data.skip` does."""
        pictures = Pixels(captions, self.vit.preprocess, self.split if split is None else split)
        for indices, views, found in torch.utils.data.DataLoader(
                pictures, batch_sampler=batches, collate_fn=Pixels.collate, num_workers=workers,
                pin_memory=self.device.type == "cuda", worker_init_fn=ignore_signals):
            skip(bad, found, captions)
            yield indices, views and views._replace(x=send(views.x, self.device))

    def encode_pictures(self, captions, batches, bad: dict[int, str], workers=0, split: bool | None = None):
        """As `read_pictures`, but yields features, without gradients, in place of the pixels."""
        for indices, views in self.read_pictures(captions, batches, bad, workers, split):
            with torch.no_grad():
                views = views and views._replace(x=self.features(views.x))
            yield indices, views

    def ask(self, pictures: list, prompt: str | None = None, raw: bool = False,
            split: bool | None = None) -> tuple[list[list[int]], torch.Tensor | None]:
        """Ids of a prompt for each entry of `pictures`, and the pixels (V,3,S,S) of all (None if V is 0); see
        `caption`."""
        prompt = self.prompt_for("") if prompt is None else prompt
        split = self.split if split is None else split
        groups = [picture if isinstance(picture, (list, tuple)) else [picture] for picture in pictures]
        if any(len(group) != prompt.count(IMAGE) for group in groups) and IMAGE in prompt:
            raise InputError(f"the prompt has room for {prompt.count(IMAGE)} pictures, "
                             f"not {max(map(len, groups))}")
        cut = [[self.vit.preprocess.tiles(picture, split) for picture in group] for group in groups]
        pixels = [pixels for group in cut for pixels, *_ in group]
        rows = [self.encode(prompt, images=len(group), tiles=(tiles for _, *tiles in group), raw=raw)[0]
                for group in cut]
        return rows, torch.cat(pixels).to(self.device) if pixels else None

    @torch.inference_mode()
    def answer(self, rows: list[list[int]], features: torch.Tensor | None, max_tokens: int = 60,
               **decoding) -> list[str]:
        """The texts that go on after B prompts' ids, with the features (V,N,Dv) of all their pictures' views
        (None if V is 0); a VLM of ours gives one line, newline taken off. `decoding`: see `LLM.generate`.
        Raises InputError where a prompt has neither a token nor a picture."""
        tokens = nn.utils.rnn.pad_sequence(
            [torch.tensor(row, dtype=torch.long, device=self.device) for row in rows], True)
        most = max(row.count(self.marker) for row in rows)
        inputs = self.read(tokens, self.images(features, self.prompt(tokens)), most)
        for name in ("embeddings", "positions"):
            if inputs[name] is not None:
                inputs[name] = [x[:len(row)] for x, row in zip(inputs[name], rows)]
        rows = self.llm.generate(**inputs, max_tokens=max_tokens, end_tokens=self.ends, keep_end=True,
                                 **decoding)
        return [self.text(row).strip() for row in rows]

    def text(self, ids: list[int]) -> str:
        """What the ids of a caption spell, up to what ends it: in a run of ours the first newline."""
        text = self.tokenizer.decode([id for id in ids if id not in self.end_tokens], special=False)
        return text.partition("\n")[0] if self.format is OURS else text

    @torch.inference_mode()
    def caption(self, pictures: list, prompt: str | None = None, raw: bool = False, split: bool | None = None,
                **decoding) -> list[str]:
        """One caption for each entry of `pictures`: a PIL.Image, or a list of any number of them, as many as
        `prompt` (the run's own prompt unless given) says `<image>`, or, where it says none, all before it.
        `raw`: see `encode`. `split`: in tiles, where the family does so (unless given, as the run was
        trained). `decoding`: see `answer`."""
        rows, pixels = self.ask(pictures, prompt, raw, split)
        return self.answer(rows, None if pixels is None else self.features(pixels), **decoding)

    def save(self, folder: Path, step: int) -> None:
        """Writes in PEFT's format lora/llm/ and lora/vit/, under our names a backbone that was trained whole
        as llm.safetensors or vit.safetensors (frozen ones are not copied), and last adapter.safetensors,
        which tells the step."""
        for part in ("llm", "vit"):
            if lora_layers(getattr(self, part)):
                save_lora(getattr(self, part), folder / "lora" / part)
        for part in sorted({"adapter", *self.config.get("train", ())}, reverse=True):
            write_tensors(folder / f"{part}.safetensors", self.weights(part), {"step": str(step)})

    def load_lora(self, folder: Path, parts: list[str]) -> None:
        """Gives the `parts` ("llm", "vit") the LoRA in a folder: a run's lora/, or one of PEFT's, of a part
        or, where this is a public VLM, of the whole. Of the whole each part takes its own tensors, and the
        adapter, which needs no LoRA to be trained, takes its own into its weights. Raises InputError, also
        where the file changes a part that isn't asked for: a half of what was trained is another model."""
        if any((folder / part).is_dir() for part in parts):
            for part in parts:
                load_lora(getattr(self, part), folder / part if (folder / part).is_dir() else folder)
            return

        # Whose tensors are they? Where one has no owner, the names are those of a part's own class.
        config, tensors = read_peft(folder)
        found = collections.defaultdict(dict)  # part -> its tensors
        for name, tensor in tensors.items():
            path = name.removeprefix(ROOT)
            owners = [part for part, prefixes in self.prefixes.items() if re.match(prefixes, path)]
            found[owners[0] if owners else None][name] = tensor
        if None in found:
            found = dict.fromkeys(parts, tensors)

        changed = [part for part in ("llm", "vit") if part in found]
        if not {*changed} <= {*parts}:
            raise InputError(f"{folder / WEIGHTS}: it changes {' and '.join(changed)}: "
                             f"say --lora-on {','.join(changed)}")
        for part in parts:
            load_lora(getattr(self, part), folder, (config, found.get(part, {})))
        if "adapter" in found:
            fold_lora(self.adapter, folder, (config, found["adapter"]))

    def catch_up(self, folder: Path) -> None:
        """A checkpoint's files begin with state.safetensors and end with adapter.safetensors. If the process
        ended in between, they are of two steps, and what the first has of the later one is taken."""
        path = folder / "state.safetensors"
        if not path.is_file():
            return
        steps = [int(read_metadata(file).get("step", -1)) for file in (path, folder / "adapter.safetensors")]
        if steps[0] <= steps[1] or steps[1] < 0:
            return
        weights = read_tensors(path, "weight.")
        for name, layer in lora_layers(self).items():  # what PEFT's files hold in one is apart again
            for leaf in {f"{name}.{leaf}" for leaf in "ABm"} & weights.keys():
                setattr(layer, leaf[-1], nn.Parameter(weights.pop(leaf)))
        take_over({name: self.get_parameter(name) for name in weights}, weights, path)

    @classmethod
    def from_pretrained(cls, name: str, dtype: torch.dtype = torch.float32) -> "VLM":
        """Rebuilds a run from its folder, or a public VLM (a folder or a hub name): backbones in `dtype`,
        adapter in float32, eval mode. Raises InputError."""
        folder = find_checkpoint(name)
        path = folder / "config.json"
        config = read_json(path)
        with guard(path, "not the folder of a run"):
            if family_of(config) in PUBLIC:
                return build({"from": name}, dtype).eval()
            check_run(config)
        files = {part: folder / f"{part}.safetensors" for part in {"adapter", *config.get("train", ())}}
        for file in files.values():
            if not file.is_file():
                raise InputError(f"{file}: no such file (was the run stopped before its first checkpoint?)")
        with guard(path, "not the config of a run"):
            vlm = build(config, dtype, file=files["adapter"])
        for part, file in files.items():
            take_over(vlm.weights(part), read_tensors(file), file)
        for part in ("llm", "vit"):
            if (folder / "lora" / part).is_dir():
                load_lora(getattr(vlm, part), folder / "lora" / part)
        with guard(folder / "state.safetensors"):
            vlm.catch_up(folder)
        return vlm.eval()


# What config.json of a run may hold, beside what train.py adds
KINDS = {"from": str, "vit": str, "llm": str, "adapter": str, "adapter_sizes": dict, "image_position": str,
         "prompt": str, "train": list, "layer": int, "image_size": int, "placeholder": int, "split": bool}


def check_run(config: dict) -> None:
    """Raises ValueError where the config of a run lacks what it takes to build it, or a value is of another
    kind."""
    for name in ("from",) if config.get("from") else ("vit", "llm", "adapter", "adapter_sizes"):
        if config.get(name) is None:
            raise ValueError(f"{name!r} is missing")
    values = [(config.get(name), kind) for name, kind in KINDS.items()]
    values += [(size, (int, float)) for size in (config.get("adapter_sizes") or {}).values()]
    for value, kind in values:
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{value!r} is out of place")
    if not {*config.get("train", ())} <= {"adapter", "llm", "vit"}:
        raise ValueError(f"train is {config['train']!r}")


def compare(parameters: dict[str, nn.Parameter], state: dict[str, torch.Tensor], path: Path) -> None:
    """Raises InputError where the names or shapes of parameters and of a file's tensors differ."""
    for name in parameters.keys() | state.keys():
        found, shape = (tuple(t[name].shape) if name in t else "missing" for t in (state, parameters))
        if found != shape:
            raise InputError(f"{path}: tensor '{name}' is {found}; config.json says {shape}")


@torch.no_grad()
def take_over(parameters: dict[str, nn.Parameter], state: dict[str, torch.Tensor], path: Path) -> None:
    """Copies tensors into the parameters of these names. Raises InputError where names or shapes differ."""
    compare(parameters, state, path)
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


def build(config: dict, dtype: torch.dtype = torch.float32, whole: tuple[str, ...] = (),
          file: Path | None = None) -> VLM:
    """A VLM with an untrained adapter, or a public VLM's: backbones in `dtype`, but in float32 those that are
    to be trained `whole`; adapter in float32. `file` has the tensors that the adapter will take: other sizes
    in `config` are an InputError before any are made."""
    vit, llm = (torch.float32 if part in whole else dtype for part in ("vit", "llm"))
    if config.get("from"):
        return public(config, dtype, vit, llm)
    vit = ViT.from_pretrained(config["vit"], vit, config.get("image_size"))
    llm, tokenizer = LLM.from_pretrained(config["llm"], llm), Tokenizer.from_pretrained(config["llm"])
    with named(file.with_name("config.json")) if file else contextlib.nullcontext():
        if file:
            with torch.device("meta"):
                adapter = dict(make_adapter(config, vit, llm).named_parameters("adapter"))
            found = {name: t for name, t in read_tensors(file).items() if name.startswith("adapter.")}
            compare(adapter, found, file)
        return VLM(vit, llm, tokenizer, config, dtype=dtype)


# ---------------------------------------------------------------------------------------------------------
# Public VLMs: what differs from one family to the next, as data

class Public(NamedTuple):
    """A family of public VLMs. `config` turns config.json into the encoder's and the language model's, and
    what of ours it tells. The tensors of each part are those whose names begin as `vision`, `language` and
    `adapter`, regular expressions, say; `names` and `unused` are the adapter's (see Family). `formats`:
    its Format, by a special token that the tokenizer has ("": any), where config.json doesn't tell."""
    config: Callable[[dict], tuple[dict, dict, dict]]
    vision: str
    language: str
    adapter: str
    names: dict
    formats: dict[str, Format]
    unused: str = ""


def family_of(c: dict) -> str | None:
    """What config.json says it is. nanoVLM's says nothing."""
    return c.get("model_type", "nanovlm" if "mp_pixel_shuffle_factor" in c else None)


def public(run: dict, dtype: torch.dtype, vit: torch.dtype, llm: torch.dtype) -> VLM:
    """The public VLM that the config of a run is "from", its weights as it was published: see `build`."""
    checkpoint = Checkpoint(name := run["from"])
    checkpoint.config["model_type"] = family_of(checkpoint.config)
    row, (vision, language, config) = checkpoint.family(PUBLIC)
    parts = [checkpoint.part(prefixes, part) for prefixes, part in (
        (row.vision, vision), (row.language, language), (row.adapter, checkpoint.config))]
    if stray := sorted(checkpoint.where.keys() - {tensor for part in parts for tensor in part.where}):
        kind = checkpoint.config["model_type"]
        raise InputError(f"{checkpoint.where[stray[0]]}: tensor '{stray[0]}' is not part of a {kind} model")
    other = config.pop("tokenizer", name)
    tokenizer = Tokenizer.from_pretrained(name if find_file(checkpoint.folder, "tokenizer.json") else other)
    vit, llm = ViT.from_pretrained(parts[0], vit), LLM.from_pretrained(parts[1], llm)
    with guard(path := checkpoint.folder / "config.json"), named(path):
        for token, id in config.pop("tokens", {}).items():
            tokenizer.add(token, id, special=True)
        format = config.pop("format", None) or next(
            format for token, format in row.formats.items() if not token or token in tokenizer.special)
        vlm = VLM(vit, llm, tokenizer, {"from": name} | config | run, format, dtype)
    if vlm.adapter.vocabulary:
        vlm.reader = Tokenizer.from_pretrained(str(checkpoint.folder / "qformer_tokenizer"))
    vlm.prefixes = {"vit": row.vision, "llm": row.language, "adapter": row.adapter}
    vlm.adapter.family = Family(row.config, row.names, row.unused)
    load_weights(vlm.adapter, parts[2], vlm.adapter.family, torch.float32)
    return vlm


# What the reference takes where a language model's part of config.json says nothing
DEFAULTS = {
    "llama": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                  num_attention_heads=32, bos_token_id=1, eos_token_id=2),
    "phi3": dict(vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
                 num_attention_heads=32, bos_token_id=1, eos_token_id=32000),
    "opt": dict(hidden_size=768, num_hidden_layers=12, ffn_dim=3072, num_attention_heads=12),
    "qwen2": dict(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
                  num_attention_heads=32, num_key_value_heads=32),
}


def text_config(c: dict, kind: str = "llama") -> dict:
    text = {"model_type": kind} | c.get("text_config", {})
    return DEFAULTS.get(text["model_type"], {}) | text


def llava_config(c: dict) -> tuple[dict, dict, dict]:
    if c.get("projector_hidden_act", "gelu") != "gelu" or not c.get("multimodal_projector_bias", True):
        raise ValueError("a projector without GELU or bias is not supported")
    if not isinstance(layer := c.get("vision_feature_layer", -2), int):
        raise ValueError(f"vision_feature_layer {layer} is not supported")
    vision, text = {"model_type": "clip_vision_model"} | c["vision_config"], text_config(c)
    tied = c.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    class_tokens = "clip" in vision["model_type"]
    dropped = c.get("vision_feature_select_strategy", "default") == "default"  # the first, whatever it is
    return vision, text | {"tie_word_embeddings": tied}, dict(
        adapter="mlp", adapter_sizes=dict(class_tokens=class_tokens - dropped), layer=layer,
        placeholder=c.get("image_token_index", 32000))


IMAGE_LINE = IMAGE + "\n"
LLAVA = {  # its prompts follow the language model's
    "<|im_start|>": Format(lambda images, text: (
        f"<|im_start|>user {IMAGE * images}\n{text}<|im_end|><|im_start|>assistant")),
    "<|start_header_id|>": Format(lambda images, text: (
        f"<|start_header_id|>user<|end_header_id|>\n\n{IMAGE_LINE * images}{text}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")),
    "<|user|>": Format(lambda images, text: f"<|user|>\n{IMAGE_LINE * images}{text}<|end|>\n<|assistant|>\n"),
    "": Format(lambda images, text: f"USER: {IMAGE_LINE * images}{text} ASSISTANT:"),
}


def blip_config(c: dict) -> tuple[dict, dict, dict]:
    placeholder = c.get("image_token_index")  # older files have none
    return c.get("vision_config", {}) | {"model_type": "blip_2_vision_model"}, text_config(c, "opt"), dict(
        adapter="qformer", adapter_sizes=qformer_sizes(c),
        **{"placeholder": placeholder} if placeholder else {})


def idefics3_config(c: dict) -> tuple[dict, dict, dict]:
    vision = c.get("vision_config", {}) | {"model_type": "idefics3_vision"}
    return vision, text_config(c) | {"tie_word_embeddings": c.get("tie_word_embeddings", False)}, dict(
        adapter="pixelshuffle", adapter_sizes=dict(scale=c.get("scale_factor", 2)),
        placeholder=c.get("image_token_id", 128257))


def idefics3_image(queries: int, rows: int, columns: int) -> str:
    around, seen = "<fake_token_around_image>", IMAGE * queries
    tiles = ["".join(f"{around}<row_{y + 1}_col_{x + 1}>{seen}" for x in range(columns)) + "\n"
             for y in range(rows)]
    return "".join(tiles) + "\n" * (rows > 0) + f"{around}<global-img>{seen}{around}"


def idefics3_chat(images: int, text: str) -> str:
    return f"User:{IMAGE * images or ' '}{text}<end_of_utterance>\nAssistant:"


IDEFICS3 = {
    "<|im_start|>": Format(lambda images, text: "<|im_start|>" + idefics3_chat(images, text), idefics3_image),
    "": Format(idefics3_chat, idefics3_image)}
idefics3 = Public(idefics3_config, r"(model\.)?vision_model\.", r"(model\.)?text_model\.|lm_head\.",
                  r"(model\.)?connector\.", {"projection": "modality_projection.proj"}, IDEFICS3)


def nanovlm_config(c: dict) -> tuple[dict, dict, dict]:
    if c.get("vit_cls_flag"):
        raise ValueError("vit_cls_flag is not supported")
    extra = c.get("vlm_extra_tokens") or {}  # a tokenizer of another checkpoint takes them in, in this order
    tokens = {token: c.get("lm_base_vocab_size", 49152) + i for i, token in enumerate(extra.values())}
    pixels = {"image_processor_type": "nanoVLM"}
    if "max_img_size" in c:
        pixels |= dict(resample=3, size=dict(longest_edge=c["max_img_size"]), do_image_splitting=True,
                       max_image_size=dict(longest_edge=c["vit_img_size"]),
                       upscale=c.get("resize_to_max_side_len", False), whole="global_image_token" in extra)
    return c | {"image_processor": pixels}, c, dict(
        adapter="pixelshuffle", adapter_sizes=dict(scale=c["mp_pixel_shuffle_factor"]),
        tokenizer=c["lm_tokenizer"], tokens=tokens, format=nanovlm_format(c, extra),
        **{"placeholder": tokens[extra["image_token"]]} if extra else {})


def nanovlm_format(c: dict, extra: dict) -> Format:
    """Its generations: a question after the image; a chat; tiles, and pictures counted; the whole too."""
    if "lm_chat_template" not in c:
        return Format(lambda images, text: f"{IMAGE * images}Question: {text} Answer:",
                      end="<|im_end|>" if extra else "<|endoftext|>")
    tiled, whole = "max_img_size" in c, "global_image_token" in extra

    def chat(images: int, text: str) -> str:
        counted = (f"<image: {i}>" * (tiled and images > 1) + IMAGE for i in range(images))
        return f"<|im_start|>user\n{''.join(counted)}{text}<|im_end|>\n<|im_start|>assistant\n"

    def image(queries: int, rows: int, columns: int) -> str:
        least = tiled and not whole  # then even one tile has its row and column
        return "<|global_image|>" * whole + IMAGE * queries * (not least) + "".join(
            f"<row_{y + 1}_col_{x + 1}>{IMAGE * queries}"
            for y in range(max(rows, least)) for x in range(max(columns, least)))

    return Format(chat, image, end="<|im_end|>")


BLIP2_CHAT = Format(lambda images, text: IMAGE * images + (f"Question: {text} Answer:" if text else ""),
                    question="", images_first=True)
blip2 = Public(blip_config, r"vision_model\.", r"language_model\.",
               r"qformer\.|language_projection\.|query_tokens", BLIP2.names, {"": BLIP2_CHAT},
               r".*position_ids")
instructblip = blip2._replace(
    names=INSTRUCTBLIP.names,
    unused=r".*position_ids|encoder\.layer\.\d+\.(intermediate|output)\..*",  # of the last block's words
    formats={"": Format(lambda images, text: IMAGE * images + text, images_first=True)})

PUBLIC = {  # config.json's model_type -> family
    "blip-2": blip2, "instructblip": instructblip,
    "llava": Public(llava_config, r"(model\.)?vision_tower\.", r"(model\.)?language_model\.|lm_head\.",
                    r"(model\.)?multi_modal_projector\.", {"up": "linear_1", "down": "linear_2"}, LLAVA),
    "idefics3": idefics3, "smolvlm": idefics3,
    "nanovlm": Public(nanovlm_config, r"vision_encoder\.", r"decoder\.", r"MP\.", {"projection": "proj"}, {}),
}
