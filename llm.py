"""The language model: ids → logits → ids. One `LLM` reads every family in formats/languages.py.

Letters of shapes: B texts, T tokens, S keys (cached ones included), V vocabulary, D width of the embeddings,
W of the blocks, H heads, hd a head's size.
"""
import math
from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

from formats.files import InputError, guard
from formats.languages import FAMILIES, own_head, tie
from formats.tokenizer import as_id
from formats.weights import Checkpoint, depth, load_weights
from support.decoding import BeamSearch, sample
from support.kernels import Recorded, attend, pack
from support.layers import ACTIVATIONS, FeedForward


class Rope(NamedTuple):
    """Rotary position embedding (Su et al., 2021, arXiv:2104.09864) of each head's first `size` numbers."""
    size: int
    theta: float
    scaling: str  # "default" or, to reach past `original` tokens, "linear" or "llama3"
    factor: float
    original: int
    bands: tuple[float, float]  # llama3: wavelengths per `original` where stretching ends and begins


@dataclass
class LLMConfig:
    vocabulary: int
    hidden: int  # width of the embeddings, as the head reads them
    layers: int
    heads: int
    kv_heads: int  # fewer than heads: grouped-query attention
    head_size: int
    mlp: int  # hidden size of the feed-forward layers
    max_positions: int
    activation: str
    eps: float
    width: int = 0  # of the blocks, where it isn't `hidden`
    norm: str = "rms"  # or "layer"
    norm_weights: bool = True
    norm_order: str = "pre"  # or "both", before and after each sublayer; "post", after the sum with its input
    final_norm: bool = True
    learned_positions: bool = False  # an embedding for each, added to the token's
    ropes: tuple[Rope | None, ...] = ()  # of each layer; None: the layer doesn't rotate
    windows: tuple[int | None, ...] = ()  # how many tokens back, itself included, each layer sees; None: all
    gated: bool = True  # SwiGLU's gate
    parallel: bool = False  # attention and feed-forward layers read the same input
    qk_norm: bool = False  # of each head's queries and keys
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    query_scale: float = 1.0  # of the queries, beside 1 / √head_size
    embedding_scale: float = 1.0
    tied: bool = False  # the head's weight is the embedding's
    start_token: int | None = None
    end_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        self.width = self.width or self.hidden
        self.layers = depth(self.layers)
        ropes = self.ropes or (None,) * self.layers
        self.ropes = tuple(Rope(**rope) if isinstance(rope, dict) else rope for rope in ropes)
        self.windows = self.windows or (None,) * self.layers
        if self.heads < 1 or self.heads % self.kv_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if not len(self.ropes) == len(self.windows) == self.layers:
            raise ValueError(f"layer_types and no_rope_layers must name {self.layers} layers")
        for window in self.windows:
            if window is not None and (not isinstance(window, int) or window < 1):
                raise ValueError(f"sliding_window is {window!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")


# ---------------------------------------------------------------------------------------------------------
# Rotary positions

def frequencies(rope: Rope, device: torch.device) -> torch.Tensor:
    """Radians per position (size/2,)."""
    f = 1 / rope.theta ** (torch.arange(0, rope.size, 2, device=device).float() / rope.size)
    if rope.scaling == "linear":
        f = f / rope.factor
    elif rope.scaling == "llama3":  # low frequencies are stretched, high ones stay, those between are blended
        low, high = rope.bands
        keep = ((rope.original * f / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        f = (1 - keep) * f / rope.factor + keep * f
    return f


def rotary(rope: Rope, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and ±sin (B,1,T,size), half-split, at positions (B,T) or (B,T,3).

    With a triple (t, y, x) the fastest quarter of the frequencies rotates by t, the next 3/8 by y, the last
    3/8 by x (Qwen2-VL: Wang et al., 2024, arXiv:2409.12191).
    """
    f = frequencies(rope, positions.device)  # (size/2,)
    if positions.dim() == 2:
        positions = positions[..., None]  # (B,T,1)
    else:
        n = 3 * len(f) // 8
        t, y, x = positions.split(1, -1)
        parts = [t.repeat(1, 1, len(f) - 2 * n), y.repeat(1, 1, n), x.repeat(1, 1, n)]
        positions = torch.cat(parts, -1)  # (B,T,size/2)
    angles = (positions.float() * f)[:, None]  # (B,1,T,size/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first numbers of each head of x (B,H,T,hd), as many as cos and sin have."""
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat([rotate(x[..., :size], cos, sin), x[..., size:]], -1)
    return torch.addcmul(x * cos, x.roll(size // 2, -1), sin)


# ---------------------------------------------------------------------------------------------------------
# Key-value cache

class LayerCache(NamedTuple):
    """One layer's part of a KVCache."""
    buffer: torch.Tensor  # (2,B,H,S,hd): keys, values
    length: int
    next: torch.Tensor | None  # (1,), if static: the position of the next token

    def update(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Takes in k, v (B,H,T,hd). Returns keys and values for their queries, (2,B,H,S,hd)."""
        if self.next is not None:
            return self.buffer.index_copy_(3, self.next, torch.stack((k, v)))
        end = self.length + k.shape[2]
        self.buffer[:, :, :, self.length:end] = torch.stack((k, v))
        return self.buffer[:, :, :, :end]


class KVCache:
    """Keys and values of the tokens read so far, in buffers of fixed size.

    A query sees those so far. Once the cache is static, it is given whole buffers, and a mask hides the rest:
    then every token is the same work of the same shapes, which a GPU can replay.
    """

    def __init__(self, config: LLMConfig, batch: int, size: int, like: torch.Tensor):
        shape = (config.layers, 2, batch, config.kv_heads, size, config.head_size)
        self.buffer = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.length = 0
        self.next = None  # see LayerCache

    def make_static(self) -> None:
        self.next = torch.full((1,), self.length, device=self.buffer.device)

    def positions(self, T: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of the next T tokens (T,), and of the keys (S,) that they are given."""
        if self.next is not None:
            return self.next, torch.arange(self.buffer.shape[-2], device=self.buffer.device)
        keys = torch.arange(self.length + T, device=self.buffer.device)
        return keys[self.length:], keys

    def advance(self, T: int) -> None:
        self.length += T
        if self.next is not None:
            self.next += T

    def layer(self, i: int) -> LayerCache:
        return LayerCache(self.buffer[i], self.length, self.next)

    def select(self, rows: torch.Tensor) -> None:
        """Keeps these rows of the batch; one may come twice."""
        self.buffer = self.buffer[:, :, rows]


# ---------------------------------------------------------------------------------------------------------
# The transformer

def make_norm(config: LLMConfig, size: int) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(size, config.eps)
    return nn.LayerNorm(size, config.eps, elementwise_affine=config.norm_weights)


class Attention(nn.Module):
    """Causal self-attention with rotary positions, grouped queries and a cache."""
    attend = staticmethod(attend)
    joined = {"qkv": ("q", "k", "v")}  # see kernels.pack

    def __init__(self, config: LLMConfig):
        super().__init__()
        width = config.heads * config.head_size
        kv_width = config.kv_heads * config.head_size
        self.head_size = config.head_size
        self.scale = config.query_scale
        self.q = nn.Linear(config.width, width, config.qkv_bias)
        self.k = nn.Linear(config.width, kv_width, config.qkv_bias)
        self.v = nn.Linear(config.width, kv_width, config.qkv_bias)
        self.q_norm = make_norm(config, config.head_size) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, config.head_size) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(width, config.width, config.out_bias)

    def qkv(self, x):
        return self.q(x), self.k(x), self.v(x)

    def split(self, x):
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (B,H,T,hd)

    def forward(self, x, rotation, mask, cache):  # x (B,T,W)
        # Queries, keys and values of each head
        q, k, v = self.qkv(x)
        q = self.q_norm(self.split(q))
        k = self.k_norm(self.split(k))
        v = self.split(v)

        # Turn queries and keys by their positions
        if rotation is not None:
            q = rotate(q, *rotation).to(v.dtype)  # the angles are float32 under autocast
            k = rotate(k, *rotation).to(v.dtype)
        if self.scale != 1:
            q = q * self.scale

        # Attend to all tokens so far
        if cache is not None:
            k, v = cache.update(k, v)
        causal = q.shape[2] > 1 and mask is None  # in this order a bool, if compiled
        y = self.attend(q, k, v, mask, causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: LLMConfig):
        super().__init__()
        both = config.norm_order == "both"
        self.order = config.norm_order
        self.parallel = config.parallel
        self.norm1 = make_norm(config, config.width)
        self.norm2 = make_norm(config, config.width)
        self.out_norm1 = make_norm(config, config.width) if both else nn.Identity()
        self.out_norm2 = make_norm(config, config.width) if both else nn.Identity()
        self.attention = Attention(config)
        self.mlp = FeedForward(config.width, config.mlp, config.activation, config.mlp_bias, config.gated)

    def forward(self, x, rotation, mask, cache):  # x (B,T,W)
        # OPT-350M: a norm after each sum
        if self.order == "post":
            x = self.norm1(x + self.attention(x, rotation, mask, cache))
            return self.norm2(x + self.mlp(x))

        # All others: a norm before each sublayer, in Gemma 3 after it too
        y = x + self.out_norm1(self.attention(self.norm1(x), rotation, mask, cache))
        return y + self.out_norm2(self.mlp(self.norm2(x if self.parallel else y)))


class LLM(nn.Module):
    """A decoder-only transformer of any family in FAMILIES."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.config = config
        self.recomputes = False  # a block's values for the backward pass: a third more time, little memory
        self.static = "auto"  # whether it decodes with a static cache, True or False; "auto": on a GPU
        V, D, W = config.vocabulary, config.hidden, config.width

        # nn.Embedding(V, D) would draw its weights, for which torch, on the meta device, imports 800 modules
        self.embedding = nn.Embedding.from_pretrained(torch.empty(V, D), freeze=False)
        if not self.embedding.weight.is_meta:
            nn.init.normal_(self.embedding.weight, std=0.02)
        self.project_in = nn.Linear(D, W, bias=False) if W != D else nn.Identity()
        self.positions = nn.Embedding(config.max_positions, W) if config.learned_positions else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config, W) if config.final_norm else nn.Identity()
        self.project_out = nn.Linear(W, D, bias=False) if W != D else nn.Identity()
        self.head = nn.Linear(D, V, bias=False)
        self.tie()
        self.plain_head = []  # the head as it was, once it is packed; in a list, so that it is no part twice

    def tie(self) -> None:
        """Makes the head's weight the embedding's, where they are one."""
        if self.config.tied:
            self.head.weight = self.embedding.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Ids (B,T) to embeddings (B,T,D)."""
        x = self.embedding(tokens)
        scale = self.config.embedding_scale
        return x if scale == 1 else x * torch.tensor(scale, dtype=x.dtype)  # Gemma rounds the scale too

    def hidden(self, embeddings: torch.Tensor, positions: torch.Tensor | None = None,
               mask: torch.Tensor | None = None, cache: KVCache | None = None,
               cross_attention: Callable | None = None) -> torch.Tensor:
        """Embeddings (B,T,D) to the states (B,T,D) that the head reads.

        positions (B,T), or (B,T,3) as in `rotary`: by default 0, 1, … after what the cache holds. mask
        (B,1,T,S): which keys each token sees, before a layer's window narrows it; by default those up to
        itself. cross_attention(layer, x, positions) is called before each block with the states x (B,T,W),
        and returns the states that the block reads. Raises InputError past `max_positions`.
        """
        config = self.config
        T = embeddings.shape[1]
        self.check_length(T + (cache.length if cache else 0))

        # Positions of the tokens, and of the keys that they see
        if cache:
            query, key = cache.positions(T)
        else:
            query = key = torch.arange(T, device=embeddings.device)
        if positions is None:
            positions = query[None]

        # What enters the first block
        x = self.project_in(embeddings.to(self.dtype))  # (B,T,W)
        if self.positions is not None:
            x = x + self.positions(positions)

        # Rotations and masks: layers that agree share one
        rotations = {rope: rope and rotary(rope, positions, x.dtype) for rope in set(config.ropes)}
        masks = {window: narrow(mask, window, query, key) for window in set(config.windows)}

        # Through the blocks
        for layer, block in enumerate(self.blocks):
            if cross_attention is not None:
                x = cross_attention(layer, x, positions)
            rotation = rotations[config.ropes[layer]]
            inputs = x, rotation, masks[config.windows[layer]], cache and cache.layer(layer)
            x = recompute(block, *inputs, use_reentrant=False) if self.recomputes else block(*inputs)
        if cache is not None:
            cache.advance(T)
        return self.project_out(self.norm(x))  # (B,T,D)

    def check_length(self, tokens: int) -> None:
        """Raises InputError where a text of so many tokens has no positions left."""
        most = self.config.max_positions
        if tokens > most:
            raise InputError(f"{tokens} tokens are more than the language model's {most} positions")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """States (…,D) to logits (…,V) of the next token."""
        return self.head(hidden)

    def exact_logits(self, hidden: torch.Tensor, few: int = 8) -> torch.Tensor:
        """States (B,D) to float32 logits (B,V), of which the best few are computed in float32.

        Logits that are rounded to bfloat16 tie: about 20 they are an eighth apart. Of a tie the lowest id
        would win, whatever the text says.
        """
        logits = self.logits(hidden).float()
        head = self.plain_head[0] if self.plain_head else self.head
        if hidden.dtype == torch.float32 or type(head) is not nn.Linear:  # a LoRA's stays rounded
            return logits
        best = logits.topk(min(few, logits.shape[-1])).indices  # (B,few)
        exact = head.weight[best].float() @ hidden.float()[..., None]  # (B,few,1)
        return logits.scatter(1, best, exact[..., 0])

    def pack(self) -> None:
        """Makes it faster on a CPU and fit for inference alone: see kernels.pack."""
        self.plain_head = [self.head]
        pack(self, self.dtype)

    def forward(self, tokens: torch.Tensor | None = None, *,
                embeddings: torch.Tensor | None = None) -> torch.Tensor:
        """Ids (B,T), or embeddings (B,T,D), to logits (B,T,V)."""
        return self.logits(self.hidden(self.embed(tokens) if embeddings is None else embeddings))

    # -----------------------------------------------------------------------------------------------------
    # Text

    @torch.inference_mode()
    def generate(self, tokens=None, *, embeddings=None, positions=None,
                 cross_attention: Callable | None = None, max_tokens: int = 50, temperature: float = 0.0,
                 top_k: int = 0, top_p: float = 1.0, beams: int = 1,
                 end_tokens: tuple[int, ...] | None = None, keep_end: bool = False,
                 generator: torch.Generator | None = None) -> list[list[int]]:
        """Continues each row until an end token or `max_tokens`. Returns B lists of new ids.

        tokens, embeddings: (B,T) or (B,T,D), or a list of B rows (T,) or (T,D) of any lengths. Rows are
            padded on the left, and each gets the text that it would get alone.
        positions: (B,T) or (B,T,3), or a list of rows; by default 0, 1, … They go on after a row's largest.
        cross_attention: as for `hidden`. With beams it meets each row as often, one after the other.
        temperature: 0 is greedy. top_k (0: off) and top_p (Holtzman et al., 2020, arXiv:1904.09751) narrow
            what is drawn from.
        beams: above 1 it searches for the likeliest text instead.
        end_tokens: by default the checkpoint's own; the text comes with its end token if `keep_end`.
        Raises InputError.
        """
        device = self.embedding.weight.device
        end_tokens = self.config.end_tokens if end_tokens is None else end_tokens
        if beams > 1 and temperature:
            raise InputError("beam search draws nothing: leave the temperature at 0")
        if embeddings is None:
            embeddings = self.embed_rows(tokens)

        # Rows of one length, padded on the left
        lengths = [len(row) for row in embeddings]
        B, T = len(lengths), max(lengths)
        if not min(lengths):
            raise InputError("there is nothing to continue: a row is empty")
        if positions is None:
            positions = [torch.arange(n, device=device) for n in lengths]
        x = pad_left(embeddings, T).to(self.dtype)  # (B,T,D)
        positions = pad_left(positions, T)
        pad = T - torch.tensor(lengths, device=device)[:, None]  # (B,1)
        after = positions.flatten(1).amax(1, keepdim=True) + 1  # (B,1): the next position
        size = -(-(T + max_tokens) // 64) * 64  # as a GPU's kernels for attention like it
        cache = KVCache(self.config, B, size, x)

        def read(x, positions):  # (B,T,D) to the logits (B,V) of the token after x
            mask = None
            if min(lengths) < T or cache.next is not None:
                mask = padded_mask(pad, *cache.positions(x.shape[1]))
            hidden = self.hidden(x, positions, mask, cache, cross_attention)
            return self.exact_logits(hidden[:, -1])

        def step(chosen, after):  # ids (B,) to the logits (B,V) of the token after them
            return read(self.embed(chosen)[:, None], after)

        # Prefill
        logits = read(x, positions)
        if not logits.isfinite().all():
            raise InputError(f"the language model's scores are not finite in {str(self.dtype)[6:]}: take "
                             "another --precision, or look whether its weights are whole")
        on_gpu = device.type == "cuda"
        if beams == 1 and (on_gpu if self.static == "auto" else self.static):
            cache.make_static()
            step = Recorded(step) if on_gpu else step

        # Token by token
        ends = pad.new_tensor([id for id in end_tokens if id < self.config.vocabulary])
        search = BeamSearch(B, beams, max_tokens, ends) if beams > 1 else None
        done = torch.zeros(B, dtype=torch.bool, device=device)
        ids = []
        for n in range(1, max_tokens + 1):
            if search is None:
                chosen = sample(logits, temperature, top_k, top_p, generator)  # (B,)
                ids.append(chosen)
                done |= (chosen[:, None] == ends).any(1)
            else:
                chosen, rows, done = search.step(logits)  # (B·beams,), (B·beams,), (B,)
                cache.select(rows)
                pad, after = pad[rows], after[rows]

            # Stop? To look at what a GPU has done is to wait for it, so that it is done now and then
            full = T + n > self.config.max_positions
            look = done.is_cpu or n < 3 or n % 8 == 0 or full
            if n == max_tokens or look and done.all():
                break
            self.check_length(T + n)
            logits = step(chosen, after)
            after = after + 1

        # Cut each row where its text ends
        if ids:
            texts = torch.stack(ids, 1).tolist()
        else:
            texts = search.best() if search else [[]] * B
        for i, text in enumerate(texts):
            end = next((n for n, id in enumerate(text) if id in end_tokens), len(text))
            texts[i] = text[:end + keep_end]
        return texts

    def embed_rows(self, tokens) -> list[torch.Tensor]:
        """Rows of ids to rows of embeddings (T,D). Raises InputError for an id without an embedding."""
        device, V = self.embedding.weight.device, self.config.vocabulary
        rows = [torch.as_tensor(row, dtype=torch.long, device=device) for row in tokens]
        for row in rows:
            for id in row.tolist():
                if not 0 <= id < V:
                    raise InputError(f"token {id} has no embedding: there are {V}")
        return [self.embed(row) for row in rows]

    @classmethod
    def from_pretrained(cls, name: str | Checkpoint, dtype: torch.dtype = torch.float32) -> "LLM":
        """Loads a checkpoint (a folder, a hub name, or the part of one) in eval mode. Raises InputError."""
        checkpoint = Checkpoint(name) if isinstance(name, str) else name
        family, config = checkpoint.family(FAMILIES, LLMConfig)

        # generation_config.json, where there is one, knows best what ends a text
        end = checkpoint.json("generation_config.json").get("eos_token_id", config.end_tokens)
        if not isinstance(end, (list, tuple)):
            end = () if end is None else (end,)
        config.end_tokens = tuple(end)
        config.tied = config.tied and not own_head(checkpoint, family)

        # Make it without memory, then give each parameter its tensor
        with torch.device("meta"), guard(checkpoint.folder / "config.json"):
            for id in (*config.end_tokens, config.start_token or 0):
                as_id(id)
            llm = cls(config)
        llm.name = checkpoint.name
        llm.family = family
        load_weights(llm, checkpoint, tie(family) if config.tied else family, dtype)
        llm.tie()
        return llm.eval()


def pad_left(rows: list[torch.Tensor], T: int) -> torch.Tensor:
    """Rows (…,) of any lengths up to T to one tensor (B,T,…), with zeros before the shorter ones."""
    padded = [F.pad(row, (0, 0) * (row.dim() - 1) + (T - len(row), 0)) for row in rows]
    return torch.stack(padded)


def padded_mask(pad: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Which keys at positions (S,) the queries at (T,) see, (B,1,T,S), where a row begins after pad (B,1)
    tokens of padding. A padding token sees itself alone: softmax over nothing would be NaN."""
    seen = (key >= pad[:, :, None]) | (key == query[:, None])
    return (seen & (key <= query[:, None]))[:, None]


def narrow(mask: torch.Tensor | None, window: int | None, query: torch.Tensor,
           key: torch.Tensor) -> torch.Tensor | None:
    """`mask` (None: causal), narrowed for each token at `query` (T,) to the `window` nearest of the keys at
    `key` (S,). None where `attend` needs no mask, being causal by itself."""
    S = len(key)
    window = min(window or S, S)
    if window == S and (mask is not None or len(query) in (1, S)):
        return mask
    distance = query[:, None] - key  # (T,S)
    near = (distance >= 0) & (distance < window)
    return near if mask is None else near & mask


def token_losses(states: torch.Tensor, targets: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor],
                 vocabulary: int, rows: int | None = None) -> torch.Tensor:
    """Cross entropy (M,) of targets (M,) by the logits(states) (M,V) of states (M,D).

    The logits of no more than `rows` targets exist at a time. Those of more are computed part by part, and
    once more in the backward pass. By default they take 1 GiB, on a CPU the 32 MiB that its caches hold (half
    the time), but are those of 128 targets at least.
    """
    def part(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits(states).float(), targets, reduction="none")

    rows = rows or max(128, (1 << (23 if states.is_cpu else 28)) // vocabulary)
    if len(targets) <= rows:
        return part(states, targets)
    pairs = zip(states.split(rows), targets.split(rows))
    return torch.cat([recompute(part, *pair, use_reentrant=False) for pair in pairs])
