"""The adapters, from patch features to embeddings that the LLM reads as words; the `VLM` that joins all.

Adding an adapter takes a class (see `Adapter`) and a line in ADAPTERS; keyword-only arguments are its sizes.

Letters of shapes: P pictures, N features of a picture, Dv their width, G patches along a side, Q embeddings
of a picture, L words of a prompt, W width of an adapter, D of the LLM's embeddings, B texts, T tokens, M
targets.
"""
import collections
import contextlib
import math
import re
from pathlib import Path
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import LAST, OURS, WORD, Batch, Example, Processor, stack
from formats.export import export, export_run
from formats.files import InputError, compare, guard, named, read_json, read_tensors
from formats.hub import find_checkpoint, find_file
from formats.languages import tie
from formats.peft import ROOT, WEIGHTS, Tensors, read_folder
from formats.tokenizer import Tokenizer
from formats.vlms import PUBLIC, family_of
from formats.weights import Checkpoint, Family, collection_paused, depth, load_weights
from llm import LLM, token_losses
from lora import fold_lora, load_lora, lora_layers, make_layers, merge_lora, replace_layers
from support.console import one_of
from support.kernels import PackedLinear, attend, pack
from support.layers import FeedForward
from support.runs import BEST, CHECKPOINT, RESUME_STATE, check_run, read_run, updates_in
from vit import ViT


class Adapter(nn.Module):
    """Maps features (P,N,Dv) of P pictures, as the ViT returns them, to embeddings (P,Q,D) for the LLM.

    An adapter is made of the encoder's width, the LLM's width and the patch grid (patches along a side); its
    keyword arguments are its sizes. The last grid² of the N features are the patches.

    queries: Q.
    side: √Q if embedding i belongs to grid cell i; None for learned queries, which have no position.
    text: how many tokens of the prompt it reads too, at most; 0: none. Above 0, `forward` also gets their
        embeddings (P,L,D), made by the LLM, and a mask (P,L), true where there is a token.
    readers: a regular expression of the names of its modules in which queries attend to patches.

    Sizes of those with learned queries: number of `queries`, `layers`, their `width` and `heads`, and `mlp`,
    the hidden size of the feed-forward layers, by default 4 × width. `text` is as above.

    An adapter with a method `cross_attention` adds the picture between the LLM's blocks. Then the sequence
    holds no image embeddings, only the two markers. `join` tells it how many blocks there are, and how wide.
    """
    queries: int
    side: int | None = None
    text = 0
    readers = "(?!)"  # matches nothing

    def join(self, layers: int, width: int) -> None:
        """Called once with the number of the LLM's blocks and their width."""


# ---------------------------------------------------------------------------------------------------------
# Patch by patch

class Linear(Adapter):
    """One projection of each patch, as LLaVA's first version (Liu et al., 2023, arXiv:2304.08485)."""

    def __init__(self, vision_width: int, width: int, grid: int):
        super().__init__()
        self.side = grid
        self.queries = grid ** 2
        self.projection = nn.Linear(vision_width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.projection(features[:, -self.queries:])


class MLP(Adapter):
    """Two layers with GELU for each patch, as LLaVA-1.5 (Liu et al., 2023, arXiv:2310.03744).

    class_tokens: features before the patches that are projected too. -1 leaves out the first patch, as LLaVA
    checkpoints do that drop the "class token" of an encoder without one.
    """

    def __init__(self, vision_width: int, width: int, grid: int, *, class_tokens: int = 0):
        super().__init__()
        self.side = None if class_tokens else grid
        self.queries = grid ** 2 + class_tokens
        self.up = nn.Linear(vision_width, width)
        self.down = nn.Linear(width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(features[:, -self.queries:])))


class PixelShuffle(Adapter):
    """The connector of Idefics3 (Laurençon et al., 2024, arXiv:2408.12637), SmolVLM and nanoVLM: the features
    of each square of `scale` × `scale` patches, row by row, become one long vector; then one projection. With
    `deep` that of InternVL (Chen et al., 2024, arXiv:2404.16821): a norm, then two layers with GELU. A grid
    that can't be cut in such squares grows by zeros, on the right and below."""

    def __init__(self, vision_width: int, width: int, grid: int, *, scale: int = 2, bias: bool = False,
                 deep: bool = False):
        super().__init__()
        if not 1 <= scale <= grid:
            raise InputError(f"pixelshuffle: {grid} × {grid} patches have no square of {scale} × {scale}")
        self.grid = grid
        self.scale = scale
        self.side = math.ceil(grid / scale)
        self.queries = self.side ** 2
        self.norm = nn.LayerNorm(vision_width * scale ** 2) if deep else nn.Identity()
        self.projection = nn.Linear(vision_width * scale ** 2, width, bias)
        self.down = nn.Linear(width, width) if deep else None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        # The grid of patches, whole squares of it
        x = features[:, -self.grid ** 2:].unflatten(1, (self.grid, self.grid))  # (P,G,G,Dv)
        missing = self.side * self.scale - self.grid
        x = F.pad(x, (0, 0, 0, missing, 0, missing))

        # Squares of s × s, row by row, each one long vector
        s = self.scale
        x = x.unflatten(2, (-1, s)).unflatten(1, (-1, s)).transpose(2, 3)  # (P,Y,X,s,s,Dv)
        x = self.projection(self.norm(x.flatten(3).flatten(1, 2)))
        return x if self.down is None else self.down(F.gelu(x))


# ---------------------------------------------------------------------------------------------------------
# What the transformers among them share

class Attention(nn.Module):
    """Multi-head attention of q (P,Q,W) to k and v (P,N,W'); mask (P,1,Q or 1,N) true where a query sees a
    key."""
    attend = staticmethod(attend)

    def __init__(self, width: int, source_width: int, heads: int, *, shrink: int = 1, bias: bool = True):
        super().__init__()
        inner = width // shrink  # of all heads together
        if heads < 1 or inner < 1 or inner % heads:
            raise InputError(f"the adapter's width {inner} is not a multiple of its {heads} heads")
        self.heads = heads
        self.q = nn.Linear(width, inner, bias)
        self.k = nn.Linear(source_width, inner, bias)
        self.v = nn.Linear(source_width, inner, bias)
        self.out = nn.Linear(inner, width, bias)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (P,H,…,hd)

    def keys_and_values(self, k, v):
        return self.split(self.k(k)), self.split(self.v(v))

    def forward(self, q, k, v, mask=None):
        return self.read(q, self.keys_and_values(k, v), mask)

    def read(self, q, keys_and_values, mask):
        """As `forward`, but with keys and values that are computed already, (P,H,N,hd) each."""
        q = self.split(self.q(q))  # (P,H,Q,hd)
        k, v = keys_and_values
        return self.out(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))


class Words(nn.Module):
    """The first `positions` tokens of a prompt, in an adapter's own width."""

    def __init__(self, llm_width: int, width: int, positions: int):
        super().__init__()
        self.words = nn.Linear(llm_width, width)
        self.positions = nn.Embedding.from_pretrained(drawn(positions, width), freeze=False)

    def forward(self, x, words, seen):
        """Puts words (P,L,D), where they are `seen` (P,L), behind queries x (P,Q,W): (P,Q+L,W), and the mask
        (P,1,1,Q+L) of both."""
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        words = self.words(words) + self.positions(positions)
        mask = F.pad(seen, (x.shape[1], 0), value=True)[:, None, None]
        return torch.cat([x, words], 1), mask


# On the meta device weights have no values, and to draw some takes a second: torch would import its compiler

def drawn(*shape: int) -> torch.Tensor:
    """Small random numbers to begin with."""
    x = torch.empty(shape)
    return x if x.is_meta else torch.randn(shape) * 0.02


def initialise(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)) and not part.weight.is_meta:
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


# ---------------------------------------------------------------------------------------------------------
# The Q-Former

class QFormerBlock(nn.Module):
    """BERT's block, normed after each sublayer. Queries and words attend to each other, the queries alone to
    the picture. Words have a feed-forward layer of their own or, without `text`, end here."""

    def __init__(self, width: int, vision_width: int | None, heads: int, mlp: int, dropout: float, eps: float,
                 text: bool):
        super().__init__()
        self.attention = Attention(width, width, heads)
        self.norm1 = nn.LayerNorm(width, eps)
        self.cross = Attention(width, vision_width, heads) if vision_width else None
        self.norm2 = nn.LayerNorm(width, eps) if vision_width else None
        self.mlp = FeedForward(width, mlp, "gelu")
        self.norm3 = nn.LayerNorm(width, eps)
        self.text_mlp = FeedForward(width, mlp, "gelu") if text else None
        self.text_norm = nn.LayerNorm(width, eps) if text else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask, queries, features):  # x (P,Q+L,W)
        # Queries and words among themselves
        x = self.norm1(x + self.dropout(self.attention(x, x, x, mask)))
        x, text = x[:, :queries], x[:, queries:]

        # Queries to the picture
        if self.cross is not None:
            x = self.norm2(x + self.dropout(self.cross(x, features, features)))
        x = self.norm3(x + self.dropout(self.mlp(x)))

        # Words, which have weights of their own
        if self.text_mlp is None:
            return x
        text = self.text_norm(text + self.dropout(self.text_mlp(text)))
        return torch.cat([x, text], 1)


class QFormer(Adapter):
    """BLIP-2's querying transformer (Li et al., 2023, arXiv:2301.12597).

    Learned queries attend to each other and, in every `every`-th block, to all N features, class token too. A
    projection to the LLM's width follows. With `text` the prompt's words join the queries' attention to each
    other (InstructBLIP: Dai et al., 2023, arXiv:2305.06500).

    dropout: after every sublayer.
    """
    readers = r"blocks\.\d+\.cross"

    def __init__(self, vision_width: int, llm_width: int, grid: int, *, queries: int = 32, layers: int = 4,
                 width: int = 256, heads: int = 8, mlp: int | None = None, dropout: float = 0.0,
                 every: int = 2, text: int = 0, eps: float = 1e-12):
        super().__init__()
        self.queries = queries
        self.text = text
        self.query = nn.Parameter(torch.empty(queries, width))
        self.words = Words(llm_width, width, text) if text else None
        self.norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList()
        for i in range(layers):
            source = None if i % every else vision_width
            words = text > 0 and i + 1 < layers  # no one reads what words the last block would return
            self.blocks.append(QFormerBlock(width, source, heads, mlp or 4 * width, dropout, eps, words))
        self.projection = nn.Linear(width, llm_width)
        if not self.query.is_meta:
            nn.init.normal_(self.query, std=0.02)
        initialise(self)

    def forward(self, features: torch.Tensor, words: torch.Tensor | None = None,
                seen: torch.Tensor | None = None) -> torch.Tensor:
        # The same queries for every picture, and behind them its prompt's words
        x, mask = self.query.expand(len(features), -1, -1), None
        if words is not None:
            x, mask = self.words(x, words, seen)

        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, mask, self.queries, features)
        return self.projection(x[:, :self.queries])


# ---------------------------------------------------------------------------------------------------------
# Flamingo's resampler

class ResamplerBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int, eps: float):
        super().__init__()
        self.source_norm = nn.LayerNorm(width, eps)
        self.norm1 = nn.LayerNorm(width, eps)
        self.norm2 = nn.LayerNorm(width, eps)
        self.attention = Attention(width, width, heads, bias=False)
        self.mlp = FeedForward(width, mlp, "relu", bias=False)

    def forward(self, x, source):  # queries (P,Q,W), patches (P,N,W)
        # Keys and values are the patches and the queries
        y = self.norm1(x)
        both = torch.cat([y, self.source_norm(source)], 1)
        x = x + self.attention(y, both, both)
        return x + self.mlp(self.norm2(x))


class Resampler(Adapter):
    """Flamingo's Perceiver resampler (Alayrac et al., 2022, arXiv:2204.14198): in every block, learned
    queries attend to the patches and to each other at once.

    The paper's embeddings of a frame's time are embeddings of a patch's position, a picture being one frame.
    Norms and the ReLU are those of IDEFICS, its public reproduction.
    """
    readers = r"blocks\.\d+\.attention"

    def __init__(self, vision_width: int, llm_width: int, grid: int, *, queries: int = 32, layers: int = 4,
                 width: int = 256, heads: int = 8, mlp: int | None = None, eps: float = 1e-5):
        super().__init__()
        self.queries = queries
        self.query = nn.Parameter(drawn(queries, width))
        self.places = nn.Parameter(drawn(grid ** 2, width))
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
    """Sines and cosines (grid²,W) of the position of each patch's centre. `matrix` (2,W/2): frequencies along
    x and y, in turns per half picture (Tancik et al., 2020, arXiv:2006.10739)."""
    at = (torch.arange(grid) + 0.5) / grid * 2 - 1
    centres = torch.stack([at.repeat(grid), at.repeat_interleave(grid)], -1)  # (grid²,2): x, y
    angles = 2 * math.pi * centres @ matrix
    return torch.cat([angles.sin(), angles.cos()], -1)


class TwoWayBlock(nn.Module):
    """A block of SAM's mask decoder: tokens read each other and the patches, then the patches read the
    tokens."""

    def __init__(self, width: int, heads: int, mlp: int, shrink: int, eps: float, first: bool):
        super().__init__()
        self.first = first
        self.attention = Attention(width, width, heads)
        self.to_image = Attention(width, width, heads, shrink=shrink)
        self.to_tokens = Attention(width, width, heads, shrink=shrink)
        self.mlp = FeedForward(width, mlp, "relu")
        self.norm1 = nn.LayerNorm(width, eps)
        self.norm2 = nn.LayerNorm(width, eps)
        self.norm3 = nn.LayerNorm(width, eps)
        self.image_norm = nn.LayerNorm(width, eps)

    def forward(self, x, image, initial, places, mask):
        """x: tokens (P,Q+L,W). initial: these before the first block; added to queries and keys, as positions
        are. image: patches (P,G²,W). places: embeddings of their positions (G²,W). mask: of the tokens."""
        # Tokens attend to each other. In SAM's first block x is `initial`: nothing is added, not even x
        if self.first:
            x = self.norm1(self.attention(x, x, x, mask))
        else:
            x = self.norm1(x + self.attention(x + initial, x + initial, x, mask))

        # Tokens to the patches, and the patches to them
        x = self.norm2(x + self.to_image(x + initial, image + places, image))
        x = self.norm3(x + self.mlp(x))
        image = self.image_norm(image + self.to_tokens(image + places, x + initial, x, mask))
        return x, image


class TwoWay(Adapter):
    """The two-way transformer of SAM's mask decoder (Kirillov et al., 2023, arXiv:2304.02643).

    Learned queries, with `text` the words of the prompt too, attend to each other and to the patches, and the
    patches attend to them. Each attention adds to its queries and keys what tells them apart: to a token its
    initial embedding, to a patch its position (random Fourier features).

    width: even. shrink: attentions between tokens and patches have width / shrink numbers in all heads
        together.
    """
    readers = r"(blocks\.\d+\.)?to_image"

    def __init__(self, vision_width: int, llm_width: int, grid: int, *, queries: int = 32, layers: int = 2,
                 width: int = 256, heads: int = 8, mlp: int | None = None, shrink: int = 2, text: int = 0,
                 eps: float = 1e-5):
        super().__init__()
        if width % 2:
            raise InputError(f"twoway: the width {width} is not even")
        self.queries = queries
        self.text = text
        self.query = nn.Parameter(drawn(queries, width))
        self.words = Words(llm_width, width, text) if text else None
        self.project_in = nn.Linear(vision_width, width)
        self.register_buffer("places", torch.empty(grid ** 2, width), persistent=False)
        if not self.places.is_meta:  # see `drawn`
            fixed = torch.Generator().manual_seed(0)  # the same frequencies in every run
            self.places = fourier_places(torch.randn(2, width // 2, generator=fixed), grid)
        self.blocks = nn.ModuleList(
            TwoWayBlock(width, heads, mlp or 4 * width, shrink, eps, first=i == 0) for i in range(layers))
        self.to_image = Attention(width, width, heads, shrink=shrink)
        self.norm = nn.LayerNorm(width, eps)
        self.projection = nn.Linear(width, llm_width)
        initialise(self)

    def forward(self, features: torch.Tensor, words: torch.Tensor | None = None,
                seen: torch.Tensor | None = None) -> torch.Tensor:
        image = self.project_in(features[:, -len(self.places):])  # (P,G²,W)
        x, mask = self.query.expand(len(features), -1, -1), None
        if words is not None:
            x, mask = self.words(x, words, seen)
        initial = x
        for block in self.blocks:
            x, image = block(x, image, initial, self.places, mask)
        x = self.norm(x + self.to_image(x + initial, image + self.places, image))
        return self.projection(x[:, :self.queries])


# ---------------------------------------------------------------------------------------------------------
# Flamingo

class GatedBlock(nn.Module):
    """Gated cross-attention, then a gated feed-forward layer. What each adds is multiplied by the tanh of a
    number that starts at 0, so that the LLM starts as it was."""

    def __init__(self, width: int, source_width: int, heads: int, mlp: int, eps: float):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps)
        self.norm2 = nn.RMSNorm(width, eps)
        self.attention = Attention(width, source_width, heads, bias=False)
        self.mlp = FeedForward(width, mlp, "silu", bias=False, gated=True)
        self.alpha1 = nn.Parameter(torch.zeros(1))
        self.alpha2 = nn.Parameter(torch.zeros(1))

    def forward(self, x, keys_and_values, seen):  # (B,T,W), 2 × (B,H,S,hd), (B,T,S)
        # Words before the first picture see nothing, so that attention adds nothing to them. Their softmax
        # over nothing would be NaN: they attend to everything, and the result is dropped
        blind = ~seen.any(-1, keepdim=True)  # (B,T,1)
        mask = (seen | blind)[:, None]  # (B,1,T,S)
        y = self.attention.read(self.norm1(x), keys_and_values, mask)
        x = x + self.alpha1.tanh() * y.masked_fill(blind, 0)

        # The feed-forward layer changes all words
        return x + self.alpha2.tanh() * self.mlp(self.norm2(x))


class Flamingo(Adapter):
    """Flamingo (Alayrac et al., 2022, arXiv:2204.14198): a gated block stands before every `every`-th block
    of the frozen LLM. In it a token attends to the resampled embeddings of the latest picture before it.

    Norms and feed-forward layers are those of IDEFICS, its public reproduction. The sizes are the
    resampler's; `heads` are those of the gated blocks too, whose feed-forward layers are 4 times as wide as
    the LLM.
    """
    NEVER = 1 << 62  # a position that no word has
    readers = r"resampler\.blocks\.\d+\.attention"

    def __init__(self, vision_width: int, llm_width: int, grid: int, *, queries: int = 32, layers: int = 4,
                 width: int = 256, heads: int = 8, mlp: int | None = None, every: int = 2, eps: float = 1e-6):
        super().__init__()
        self.queries = queries
        self.every = every
        self.sizes = llm_width, heads, eps
        self.resampler = Resampler(vision_width, llm_width, grid, queries=queries, layers=layers, width=width,
                                   heads=heads, mlp=mlp)

    def join(self, layers: int, width: int) -> None:
        llm_width, heads, eps = self.sizes
        self.blocks = nn.ModuleList(GatedBlock(width, llm_width, heads, 4 * width, eps)
                                    for _ in range(0, layers, self.every))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.resampler(features)

    def cross_attention(self, images: torch.Tensor, begins: torch.Tensor) -> Callable:
        """Returns the `cross_attention` of `LLM.hidden`: a function that is called before each block.

        images: embeddings (P,Q,D) of all images, text by text.
        begins: (B,I), in order, the positions where a text's images begin. I is the most images of a text;
            one with fewer has NEVER for the rest.
        """
        # The images of each text. A text with fewer than I gets another's, which none of its words see
        count = (begins < self.NEVER).sum(1, keepdim=True)  # (B,1)
        first = count.cumsum(0) - count  # (B,1): a text's first image among all P
        image = torch.arange(begins.shape[1], device=images.device)  # (I,)
        Q = images.shape[1]
        of_texts = images[(first + image).clamp(max=len(images) - 1)].flatten(1, 2)  # (B,I·Q,D)
        kept = {}  # keys and values of each gated block, which are the same for every word

        def apply(layer: int, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            if layer % self.every:
                return x
            block = self.blocks[layer // self.every]
            held = block.alpha1.dtype  # of the block's weights
            with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != held):
                if layer not in kept:
                    kept[layer] = block.attention.keys_and_values(of_texts, of_texts)
                k, v = kept[layer]
                since = begins
                beams = len(x) // len(begins)  # rows of each text
                if beams > 1:
                    k = k.repeat_interleave(beams, 0)
                    v = v.repeat_interleave(beams, 0)
                    since = begins.repeat_interleave(beams, 0)

                # A token sees the embeddings of the latest image that began before it
                latest = (since[:, None] <= positions[..., None]).sum(-1, keepdim=True) - 1  # (B,T,1)
                seen = (latest == image).repeat_interleave(Q, -1)  # (B,T,I·Q)
                return block(x.to(held), (k, v), seen).to(x.dtype)

        return apply


ADAPTERS = {"linear": Linear, "mlp": MLP, "pixelshuffle": PixelShuffle, "qformer": QFormer,
            "resampler": Resampler, "twoway": TwoWay, "flamingo": Flamingo}


def default_sizes(kind: str) -> dict:
    """An adapter's sizes, by name, and their defaults: its keyword-only arguments."""
    return dict(ADAPTERS[kind].__init__.__kwdefaults__ or {})


def make_adapter(config: dict, vit: ViT, llm: LLM) -> Adapter:
    """The untrained adapter that the config of a run (see `VLM`) names. Raises InputError."""
    kind = one_of(ADAPTERS, "adapter", config["adapter"])
    sizes = config["adapter_sizes"]
    layer = config.get("layer")
    _, width = vit.feature_shape(layer)
    try:
        depth(sizes.get("layers", 1))
        adapter = ADAPTERS[kind](width, llm.config.hidden, vit.config.grid, **sizes)
    except (TypeError, ValueError) as error:
        raise InputError(f"the {kind} adapter: {error}") from None
    adapter.join(llm.config.layers, llm.config.width)
    return adapter


# ---------------------------------------------------------------------------------------------------------
# The VLM

IMAGE_POSITIONS = ("sequence", "shared", "xy", "sequence+xy", "rope-xy")


class Answer(str):
    """What a VLM says, and the mean natural logarithm of its tokens' probabilities, its end's too."""
    log_probability: float | None = None


class VLM(nn.Module):
    """A frozen ViT and a frozen LLM joined by an adapter. It takes tensors and returns tensors; its
    `processor` turns text and pictures into ids and pixels.

    `dtype` is what is computed in, by default that of the LLM's weights. What is trained whole is held in
    float32.

    `config` is what config.json of a run's folder holds:
    - "vit" and "llm" (names), or "from": the name of a public VLM, whose parts it takes
    - "adapter" (a name in ADAPTERS), "adapter_sizes"
    - "image_size" (pixels; null: the checkpoint's own), "layer" (of the ViT, or a list; null: the last)
    - "image_position", see below
    - "prompt", and "split": whether pictures are seen in tiles too, where the family does so
    - "train": what was trained whole, of "adapter", "llm" and "vit"; where it is missing, the adapter
    - and what train.py adds.

    "image_position" says which positions an image's embeddings have in the LLM:
    - `sequence` (the default): one after the other, as words
    - `shared`: all the same one
    - `xy`: as `shared`; also, a learned embedding of its row and one of its column are added to each patch's
      features before the adapter
    - `sequence+xy`: as `sequence`, with the row and column embeddings of `xy`
    - `rope-xy`: a word has (t, t, t), an image's embedding (t, t + row, t + column), as in Qwen2-VL. It takes
      an adapter that keeps the grid of patches, and an LLM with rotary positions.
    """

    prefixes = {}  # of a public one: part -> a regular expression, how the names of its tensors begin

    def __init__(self, vit: ViT, llm: LLM, tokenizer: Tokenizer, config: dict, format=OURS,
                 dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.dtype = dtype or llm.dtype  # it computes in
        self.adapter_dtype = torch.float32
        self.vit = vit.requires_grad_(False)
        self.llm = llm.requires_grad_(False)
        with torch.device("cpu" if format is OURS else "meta"):  # the weights of others come from a file
            self.adapter = make_adapter(config, vit, llm)
        self.in_text = not hasattr(self.adapter, "cross_attention")  # whether images stand among the words
        queries = self.adapter.queries if self.in_text else 0
        self.processor = Processor(tokenizer, llm.config, vit.preprocess, queries, self.adapter.text, config,
                                   format)

        # Positions of an image
        position = config.get("image_position", "sequence")
        self.image_position = one_of(IMAGE_POSITIONS, "image position", position)
        if position == "rope-xy":
            if self.adapter.side is None:
                raise InputError("rope-xy needs an adapter that keeps the grid of patches, "
                                 f"which {config['adapter']} doesn't")
            # t, row and column each rotate at least one pair of numbers
            if min((rope.size for rope in llm.config.ropes if rope), default=0) < 6:
                raise InputError("rope-xy needs a language model that rotates 6 numbers of each head or more")
        _, width = vit.feature_shape(config.get("layer"))
        self.places = None
        if position in ("xy", "sequence+xy"):
            self.places = nn.Parameter(torch.randn(2, vit.config.grid, width) * 0.02)  # rows, columns

        # Several layers: a factor and a summand of each channel, for layers differ in size
        self.channel_scale = self.channel_shift = None
        if format is OURS and isinstance(config.get("layer"), list):
            self.channel_scale = nn.Parameter(torch.ones(width))
            self.channel_shift = nn.Parameter(torch.zeros(width))

        # What begins and what ends an image
        self.markers = None
        if format is OURS:
            scale = llm.embedding.weight.float().std() * llm.config.embedding_scale
            self.markers = nn.Parameter(torch.randn(2, llm.config.hidden) * scale)

    @property
    def device(self) -> torch.device:
        return self.llm.embedding.weight.device

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What a run trains: the adapter, the markers, the embeddings of places, the channels' factors
        and summands, and the LoRA of the backbones, if they have one, or a backbone as a whole."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def layer(self) -> int | list[int] | None:
        """What is read of the encoder: see `ViT.forward`."""
        return self.config.get("layer")

    @property
    def frozen_blocks(self) -> int | None:
        """See `ViT.frozen_blocks`."""
        return self.vit.frozen_blocks(self.layer)

    @property
    def begun_shape(self) -> tuple[int, int]:
        """The shape of what `begin` returns for one picture, unless it is the pixels."""
        return self.vit.feature_shape(self.layer, self.frozen_blocks)

    def weights(self, part: str) -> dict[str, nn.Parameter]:
        """The parameters of "vit" or "llm" by their names here; for "adapter", all that are in neither."""
        if part in ("vit", "llm"):
            return {name: p for name, p in self.named_parameters() if name.startswith(f"{part}.")}
        return {name: p for name, p in self.named_parameters() if not name.startswith(("vit.", "llm."))}

    def autocast(self, held: torch.dtype) -> torch.autocast:
        """Autocast to `dtype` for float32 weights; does nothing for weights already in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=held != self.dtype)

    def _apply(self, *args, **kwargs) -> "VLM":
        """What `to`, `half` and their kind do. If they change dtypes, it computes in the new one."""
        before = self.llm.dtype
        super()._apply(*args, **kwargs)
        if self.llm.dtype != before:
            self.dtype = self.adapter_dtype = self.llm.dtype
        return self

    def train(self, mode: bool = True) -> "VLM":
        """Training mode for the adapter and for LoRAs, which may have dropout; the backbones stay in eval
        mode."""
        super().train(mode)
        for part in (self.vit, self.llm):
            part.eval()
            for layer in lora_layers(part).values():
                layer.train(mode)
        return self

    def pack(self) -> None:
        """Makes it faster on a CPU and fit for inference alone: see kernels.pack."""
        self.llm.pack()
        for part in (self.vit, self.adapter):
            pack(part, self.dtype)

    def pack_frozen(self) -> None:
        """Makes the encoder faster on a CPU, in the blocks before the first that is trained: see
        kernels.pack."""
        frozen = self.frozen_blocks
        if frozen == -1 or self.device.type != "cpu":
            return
        pack(self.vit.blocks[:frozen], self.dtype)  # None: all of them

        # The other weights may lie in the file, mapped into memory: copies of them let go of it
        for p in self.vit.parameters():
            p.data = p.data.clone()

    def compile_blocks(self) -> None:
        """Has torch.compile make each kind of block faster when it first runs. All blocks of a kind are one
        graph, whatever a text's length."""
        torch._dynamo.config.cache_size_limit = 64  # for training, for captions, for batches of one, …
        torch._dynamo.config.optimize_ddp = False  # it would cut blocks in pieces, for buckets of gradients
        for part in (self.vit, self.adapter, self.llm):
            for block in getattr(part, "blocks", ()):
                if not any(isinstance(layer, PackedLinear) for layer in block.modules()):
                    block.compile(dynamic=True)

    # -----------------------------------------------------------------------------------------------------
    # Pictures to embeddings

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (P,3,S,S) to the encoder's features (P,N,Dv), with gradients where any of it is trained."""
        return self.finish(self.begin(pixels))

    @torch.no_grad()
    def begin(self, pixels: torch.Tensor) -> torch.Tensor:
        """Computes the part of `features` that training doesn't change. It is

        - the features (P,N,Dv), if the encoder is frozen
        - the hidden states (P,N,n·D) before the first block that is trained, see `ViT.begin`
        - the pixels, if something before the first block is trained.
        """
        frozen = self.frozen_blocks
        with self.autocast(self.vit.positions.dtype):
            if frozen is None:
                return self.vit(pixels, self.layer)
            return pixels if frozen < 0 else self.vit.begin(pixels, self.layer, frozen)

    def finish(self, begun: torch.Tensor) -> torch.Tensor:
        """The features (P,N,Dv) of what `begin` returned."""
        frozen = self.frozen_blocks
        if frozen is None:
            return begun
        with self.autocast(self.vit.positions.dtype):
            return self.vit(begun, self.layer) if frozen < 0 else self.vit.finish(begun, self.layer, frozen)

    @torch.no_grad()
    def standardise(self, features: torch.Tensor) -> None:
        """Sets the channels' factors and summands, which a VLM that reads several layers has: each channel of
        these features (P,N,Dv) then comes to the adapter with mean 0 and standard deviation 1."""
        std, mean = torch.std_mean(features.float(), (0, 1))
        self.channel_scale.copy_(1 / std.clamp(min=1e-6))
        self.channel_shift.copy_(-mean * self.channel_scale)

    def embed_images(self, features: torch.Tensor | None,
                     prompt: torch.Tensor | None = None) -> torch.Tensor | None:
        """The adapter's embeddings (P,Q,D) of features (P,N,Dv), with the ids (P,L) of `Processor.prompts`,
        if it reads them. None without features."""
        if features is None or not len(features):
            return None
        features = features.to(self.adapter_dtype)
        if self.channel_scale is not None:
            features = features * self.channel_scale + self.channel_shift

        # xy: a patch gets embeddings of its row and of its column
        if self.places is not None:
            rows, columns = self.places
            places = (rows[:, None] + columns).flatten(0, 1)  # (G²,Dv)
            features = features + F.pad(places, (0, 0, features.shape[1] - len(places), 0))

        # The adapter's weights are float32, if nobody changed that; it computes in the VLM's dtype
        with self.autocast(self.adapter_dtype):
            if prompt is None:
                return self.adapter(features).to(self.llm.dtype)
            prompt = prompt.to(self.device)
            embeddings = self.llm.embed(prompt.clamp(min=0)).to(self.adapter_dtype)  # (P,L,D)
            return self.adapter(features, embeddings, prompt >= 0).to(self.llm.dtype)

    # -----------------------------------------------------------------------------------------------------
    # Into the LLM

    def embed(self, tokens: torch.Tensor, image_embeddings: torch.Tensor | None) -> torch.Tensor:
        """Turns ids (B,T) into embeddings (B,T,D). The k-th placeholder becomes the k-th of the embeddings of
        all pictures (P,Q,D) (None if P is 0).

        An id i that is negative is the word -1 - i, even if that is the placeholder's id: an answer may hold
        this id as a word, see `log_probabilities`.
        """
        # Words, by the LLM's own embedding. What markers and placeholders get here is replaced below
        marker = self.processor.marker
        ids = torch.where(tokens < 0, -1 - tokens, tokens)
        x = self.llm.embed(ids.clamp(0, self.llm.config.vocabulary - 1))  # (B,T,D)

        # What begins and ends an image
        if self.markers is not None:
            marks = F.embedding((tokens - marker).clamp(0, 1), self.markers).to(x.dtype)
            x = torch.where((tokens >= marker)[..., None], marks, x)
        if image_embeddings is None or not self.in_text:
            return x

        # Placeholders. Not by masked_scatter: its backward pass would make the CPU wait for the GPU
        image = tokens == self.processor.placeholder
        k = (image.flatten().cumsum(0) - 1).clamp(min=0).view_as(tokens)  # (B,T): which embedding of all
        return torch.where(image[..., None], F.embedding(k, image_embeddings.flatten(0, 1)), x)

    def positions(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The `positions` for `LLM.hidden` of ids (B,T): (B,T), or (B,T,3); None for 0, 1, …"""
        if self.image_position.startswith("sequence"):
            return None

        # From one token to the next: 1 after a word, 0 within an image, `side` after an image
        image = tokens == self.processor.placeholder
        after_image = F.pad(image, (1, 0))[:, :-1]
        side = self.adapter.side if self.image_position == "rope-xy" else 1
        steps = torch.ones_like(tokens).masked_fill(after_image, side).masked_fill(after_image & image, 0)
        t = steps.cumsum(1) - 1
        if self.image_position != "rope-xy":
            return t

        # rope-xy: add row and column to the positions of an image's embeddings
        cell = (image.cumsum(1) - 1) % self.adapter.queries  # (B,T), of the grid, row by row
        nothing = torch.zeros_like(cell)
        offsets = torch.stack([nothing, cell // side, cell % side], -1)  # (B,T,3): t, row, column
        return t[..., None] + offsets.masked_fill(~image[..., None], 0)

    def llm_inputs(self, tokens: torch.Tensor, image_embeddings: torch.Tensor | None,
                   most_images: int | None = None) -> dict:
        """Returns the arguments, by name, with which `LLM.hidden` and `LLM.generate` read ids (B,T) and the
        embeddings of P pictures (P,Q,D) (None if P is 0): `embeddings`, `positions`, and `cross_attention` if
        the adapter has it. most_images: of one text; if it is None, the CPU waits for the GPU to count."""
        positions = self.positions(tokens)
        inputs = dict(embeddings=self.embed(tokens, image_embeddings), positions=positions)
        if self.in_text:
            return inputs

        # Where each image of a text begins: tokens from there on see it. Without pictures there is a blank
        # one, which no token sees
        if image_embeddings is None:
            image_embeddings = self.markers.new_zeros(1, self.adapter.queries, self.llm.config.hidden)
        begin = tokens == self.processor.marker
        if most_images is None:
            most_images = begin.sum(1).max().clamp(min=1)
        at = torch.arange(tokens.shape[1], device=tokens.device) if positions is None else positions
        begins = torch.where(begin, at, self.adapter.NEVER).sort(1).values[:, :most_images]  # (B,I)
        return inputs | dict(cross_attention=self.adapter.cross_attention(image_embeddings, begins))

    def states(self, tokens: torch.Tensor, image_embeddings: torch.Tensor | None,
               target_positions: torch.Tensor, most_images: int | None = None) -> torch.Tensor:
        """The LLM's states (M,D) at `target_positions` (M,) of the flattened ids (B,T)."""
        hidden = self.llm.hidden(**self.llm_inputs(tokens, image_embeddings, most_images))
        return hidden.flatten(0, 1)[target_positions]

    def forward(self, batch: Batch, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the loss of each target (M,) of a batch with features (P,N,Dv) of its pictures, and the
        loss of each embedding (K,) that should spell a token; K is 0 where the batch has no `spelling`."""
        V = self.llm.config.vocabulary
        with self.autocast(self.llm.dtype):
            image_embeddings = self.embed_images(features, batch.prompts)
            states = self.states(batch.tokens, image_embeddings, batch.target_positions, batch.most_images)
            losses = token_losses(states, batch.targets, self.llm.logits, V)
            if batch.spelling is None:
                return losses, losses[:0]
            spelling = image_embeddings.flatten(0, 1)[batch.spelling.positions]  # (K,D)
            weight = self.llm.embedding.weight
            return losses, token_losses(spelling, batch.spelling.targets, lambda x: F.linear(x, weight), V)

    def logits(self, tokens: torch.Tensor, features: torch.Tensor, target_positions: torch.Tensor,
               prompts: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (M,V) of the token after each of the `target_positions` (M,) of the flattened ids (B,T),
        with features (P,N,Dv) and `Processor.prompts` (P,L) of their pictures."""
        with self.autocast(self.llm.dtype):
            image_embeddings = self.embed_images(features, prompts)
            return self.llm.logits(self.states(tokens, image_embeddings, target_positions))

    # -----------------------------------------------------------------------------------------------------
    # Text

    @torch.inference_mode()
    def answer(self, prompts: list[Example], features: torch.Tensor | None, max_tokens: int = 60,
               score: bool = False, **decoding) -> "list[Answer]":
        """Returns the answers to B prompts, as `Processor.encode` returns them. A run of ours answers in one
        line.

        features: (V,N,Dv), of the views of all pictures, prompt by prompt; None: V is 0.
        score: whether each answer gets its log-probability.
        decoding: see `LLM.generate`.
        Raises InputError for an empty prompt.
        """
        processor = self.processor
        rows = [ids for ids, _ in prompts]

        # How long an answer may be depends on its prompt: those that leave as much room go together
        groups = collections.defaultdict(list)  # tokens of an answer -> which prompts
        for i, row in enumerate(rows):
            room = max(1, processor.max_positions - len(row))
            groups[min(max_tokens, room)].append(i)
        if len(groups) > 1:
            answers = {}
            features = torch.zeros(0) if features is None else features
            views = features.split([processor.views(row) for row in rows])
            for length, group in groups.items():
                some_prompts = [prompts[i] for i in group]
                some_features = torch.cat([views[i] for i in group])
                found = self.answer(some_prompts, some_features, length, score, **decoding)
                answers.update(zip(group, found))
            return [answers[i] for i in range(len(rows))]
        [length] = groups

        # What the LLM reads, without the padding: `generate` pads on the other side
        tokens = stack(prompts)[0].to(self.device)
        image_embeddings = self.embed_images(features, processor.prompts(prompts))
        most = max([1] + [processor.views(row) for row in rows])
        inputs = self.llm_inputs(tokens, image_embeddings, most)
        for name in ("embeddings", "positions"):
            if inputs[name] is not None:
                inputs[name] = [x[:len(row)] for x, row in zip(inputs[name], rows)]
        found = self.llm.generate(**inputs, max_tokens=length, end_tokens=processor.ends, keep_end=True,
                                  **decoding)
        answers = [Answer(processor.text(ids).strip()) for ids in found]
        if score:
            for answer, mean in zip(answers, self.log_probabilities(rows, found, image_embeddings)):
                answer.log_probability = mean
        return answers

    def log_probabilities(self, rows: list[list[int]], answers: list[list[int]],
                          image_embeddings: torch.Tensor | None) -> list[float]:
        """The mean natural logarithm of the probability of each answer's ids, after its prompt's ids, with
        the embeddings (P,Q,D) of their pictures."""
        examples = []
        for row, ids in zip(rows, answers):
            examples.append(Example(row + ids, [WORD] * len(row) + [LAST] * len(ids)))
        tokens, positions, targets = [x.to(self.device) for x in stack(examples)]
        for row, prompt in zip(tokens, rows):  # an answer may hold the placeholder, where it is no picture
            said = row[len(prompt):]
            said[said == self.processor.placeholder] = -1 - self.processor.placeholder
        with self.autocast(self.llm.dtype):
            states = self.states(tokens, image_embeddings, positions)
            losses = token_losses(states, targets, self.llm.logits, self.llm.config.vocabulary)
        losses = losses.split([len(ids) for ids in answers])
        return [loss.neg().sum().item() / max(1, len(loss)) for loss in losses]  # 0 without ids

    @torch.inference_mode()
    def caption(self, pictures: list, prompt: str | None = None, raw: bool = False, **decoding) -> list[str]:
        """One caption for each entry of `pictures`, a PIL.Image or a list of them: see `Processor.ask` and
        `answer`."""
        if not pictures:
            return []
        rows, pixels = self.processor.ask(pictures, prompt, raw)
        features = None if pixels is None else self.features(pixels.to(self.device))
        return self.answer(rows, features, **decoding)

    # -----------------------------------------------------------------------------------------------------
    # Files

    def load_lora(self, folder: Path, parts: list[str]) -> None:
        """Gives the `parts` ("llm", "vit") the LoRA in a folder. It may be:

        - a run's lora/, with a folder llm or vit for each part
        - PEFT's, of one part
        - PEFT's, of a whole public VLM: each part takes its own tensors, and the adapter's LoRA is merged
          into its weights.
        Raises InputError, also if the folder changes a part that isn't asked for: half a LoRA is another
        model.
        """
        folders = [part for part in ("llm", "vit") if (folder / part).is_dir()]
        if folders:
            check_lora_parts(folder, folders, parts)
            for part in parts:
                load_lora(getattr(self, part), folder / part if (folder / part).is_dir() else folder)
            return

        # Sort the tensors by part. If one belongs to none, the names aren't a whole VLM's but a single part's
        config, tensors = read_folder(folder)
        found = collections.defaultdict(dict)  # part -> its tensors
        for name, tensor in tensors.items():
            path = name.removeprefix(ROOT)
            owners = [part for part, prefixes in self.prefixes.items() if re.match(prefixes, path)]
            owner = owners[0] if owners else "unknown"
            found[owner][name] = tensor
        if "unknown" in found:
            found = dict.fromkeys(parts, tensors)

        check_lora_parts(folder / WEIGHTS, [part for part in ("llm", "vit") if part in found], parts)
        for part in parts:
            load_lora(getattr(self, part), folder, Tensors(config, found.get(part, {})))
        if "adapter" in found:
            fold_lora(self.adapter, folder, Tensors(config, found["adapter"]))

    def export(self, target: Path) -> None:
        """Writes a run to the folder `target` in a public layout, its LoRA merged: in that of the public VLM
        that it began `from`, else in that of the family that computes the same. Its LoRA stays merged. Raises
        InputError."""
        with guard(target, "can't be written"):
            if target.exists():
                raise InputError(f"{target}: there is something already")
        merge_lora(self)
        if self.llm.config.tied and self.llm.head.weight is not self.llm.embedding.weight:
            raise InputError(f"{target}: the head was trained apart from the embedding, and the layout ties "
                             "them")
        if not self.prefixes:
            export_run(target, self)
            return
        llm_family = tie(self.llm.family) if self.llm.config.tied else self.llm.family
        families = {"vit": self.vit.family, "llm": llm_family, "adapter": self.adapter.family}
        parts = []
        for part, family in families.items():
            parts.append((family, self.prefixes[part], dict(getattr(self, part).named_parameters())))
        export(target, self.config["from"], parts)

    def state(self) -> dict[str, torch.Tensor]:
        """What a run's checkpoint holds of the model: "weight.NAME" of the adapter, of what is trained, and
        of each LoRA, with the weight under it where it was replaced; "scale.NAME" of each LoRA."""
        weights = self.trained
        for part in {"adapter", *self.config.get("train", ())}:
            weights |= self.weights(part)
        scales = {}
        for name, layer in lora_layers(self).items():
            scales[f"scale.{name}"] = torch.tensor(layer.scale, dtype=torch.float64)
            for letter in "ABm":
                if (p := getattr(layer, letter)) is not None:  # layers that share one A each have it
                    weights[f"{name}.{letter}"] = p
            if layer.replaced:
                weights[f"{name}.weight"] = layer.weight.float()
        return {f"weight.{name}": p for name, p in weights.items()} | scales

    def load_state(self, path: Path) -> None:
        """Takes up what `state` gave, from a run's checkpoint, LoRA and all. Raises InputError where a tensor
        there isn't one that the run would write."""
        found = {name: tensor for name, tensor in read_run(path).items()
                 if not name.startswith(RESUME_STATE)}
        with guard(path, "not the checkpoint of this run"), named(path):
            updates = updates_in(found)
            for part, layers in updates.items():
                if layers:
                    module = getattr(self, part)
                    replace_layers(module, make_layers(module, layers))

        # Exactly what the run would write must be there. Then take the weights
        with_lora = [part for part in updates if updates[part]]
        self.mark_saved_beside_lora(found, with_lora)
        expected = {}
        for name, tensor in self.state().items():
            dtype = torch.float64 if name.startswith("scale.") else torch.float32
            expected[name] = torch.empty_like(tensor, dtype=dtype, device="meta")
        compare(expected, found, path)
        self.take(found)

    @torch.no_grad()
    def take(self, found: dict[str, torch.Tensor]) -> None:
        """Takes the weights and the scales of LoRAs that a checkpoint holds, of layers that are here."""
        for name, p in self.named_parameters(remove_duplicate=False):  # a tied head has two names
            if f"weight.{name}" in found:
                p.copy_(found[f"weight.{name}"])
        for name, layer in lora_layers(self).items():
            layer.scale = found[f"scale.{name}"].item()

    def mark_saved_beside_lora(self, found: dict[str, torch.Tensor], with_lora: list[str]) -> None:
        """Marks the parameters of the parts `with_lora` that a checkpoint holds beside A, B and m, so that
        `state` saves them again: weights that came with the LoRA, and norms or biases trained with it."""
        layers = lora_layers(self)
        for name, p in self.named_parameters(remove_duplicate=False):
            part = name.partition(".")[0]
            layer, _, leaf = name.rpartition(".")
            if f"weight.{name}" not in found or part not in with_lora:
                continue
            if layer in layers and leaf == "weight":
                layers[layer].replaced = True
            else:
                p.requires_grad_()

    @classmethod
    @collection_paused()
    def from_pretrained(cls, name: str, dtype: torch.dtype = torch.float32) -> "VLM":
        """Rebuilds a run with its best weights from its folder, or a public VLM (a folder or a hub name):
        backbones in `dtype`, adapter in float32, eval mode. Raises InputError."""
        folder = find_checkpoint(name)
        path = folder / "config.json"
        config = read_json(path)
        with guard(path, "not the folder of a run"):
            if family_of(config) in PUBLIC:
                return build({"from": name}, dtype).eval()
            check_run(config)
        best = folder / BEST
        checkpoint = best if best.is_file() else folder / CHECKPOINT
        if not checkpoint.is_file():
            raise InputError(f"{checkpoint}: no such file (was the run stopped before its first checkpoint?)")
        with guard(path, "not the config of a run"):
            vlm = build(config, dtype, checkpoint=checkpoint)
        vlm.load_state(checkpoint)
        return vlm.eval()


def check_lora_parts(path: Path, changed: list[str], asked: list[str]) -> None:
    """Raises InputError where the LoRA in a file or folder changes more parts than are asked for."""
    if not {*changed} <= {*asked}:
        raise InputError(f"{path}: it changes {' and '.join(changed)}: say --lora-on {','.join(changed)}")


def build(config: dict, dtype: torch.dtype = torch.float32, whole: tuple[str, ...] = (),
          checkpoint: Path | None = None) -> VLM:
    """Builds the VLM that `config` describes, with an untrained adapter or as a public VLM.

    dtype: of the backbones; the adapter is float32. whole: backbones that are held in float32, for they are
        trained. checkpoint: has the tensors that the adapter will take; other sizes in `config` are an
        InputError before any are made.
    """
    vit_dtype = torch.float32 if "vit" in whole else dtype
    llm_dtype = torch.float32 if "llm" in whole else dtype
    if config.get("from"):
        return public(config, dtype, vit_dtype, llm_dtype)
    vit = ViT.from_pretrained(config["vit"], vit_dtype, config.get("image_size"))
    llm = LLM.from_pretrained(config["llm"], llm_dtype)
    tokenizer = Tokenizer.from_pretrained(config["llm"])
    with named(checkpoint.with_name("config.json")) if checkpoint else contextlib.nullcontext():
        with torch.device("meta"):
            adapter = dict(make_adapter(config, vit, llm).named_parameters())
        if checkpoint:
            compare(adapter, read_tensors(checkpoint, "weight.adapter."), checkpoint)
        else:  # ask for all memory at once: if there is too little, many small pieces end the process
            torch.empty(sum(p.nbytes for p in adapter.values()), dtype=torch.uint8)
        return VLM(vit, llm, tokenizer, config, dtype=dtype)


def public(run: dict, dtype: torch.dtype, vit_dtype: torch.dtype, llm_dtype: torch.dtype) -> VLM:
    """Builds the public VLM that a run's config names in "from", with its published weights: see `build`."""
    name = run["from"]
    if (find_checkpoint(name) / CHECKPOINT).is_file():
        raise InputError(f"{name}: a run of ours, no public VLM: --resume goes on with it")
    checkpoint = Checkpoint(name)
    checkpoint.config["model_type"] = family_of(checkpoint.config)
    row, (vision, language, config) = checkpoint.row(PUBLIC)

    # Each part has its own config and its own tensors
    parts = [checkpoint.part(row.vision, vision), checkpoint.part(row.language, language),
             checkpoint.part(row.adapter, checkpoint.config)]
    owned = {tensor for part in parts for tensor in part.where}
    if stray := sorted(checkpoint.where.keys() - owned):
        kind = checkpoint.config["model_type"]
        raise InputError(f"{checkpoint.where[stray[0]]}: tensor '{stray[0]}' is not part of a {kind} model")
    other = config.pop("tokenizer", name)
    tokenizer = Tokenizer.from_pretrained(name if find_file(checkpoint.folder, "tokenizer.json") else other)
    vit = ViT.from_pretrained(parts[0], vit_dtype)
    llm = LLM.from_pretrained(parts[1], llm_dtype)

    # Its special tokens decide how it reads pictures and text
    path = checkpoint.folder / "config.json"
    with guard(path), named(path):
        for token, id in config.pop("tokens", {}).items():
            tokenizer.add(token, id, special=True)
        fitting = [row.formats[token] for token in row.formats if not token or token in tokenizer.special]
        format = config.pop("format", None) or fitting[0]  # the first whose special token the tokenizer has
        vlm = VLM(vit, llm, tokenizer, {"from": name} | config | run, format, dtype)
    vlm.prefixes = {"vit": row.vision, "llm": row.language, "adapter": row.adapter}
    vlm.adapter.family = Family(row.config, row.names, row.unused)
    load_weights(vlm.adapter, parts[2], vlm.adapter.family, torch.float32)
    return vlm
