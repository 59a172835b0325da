"""The language model: ids → logits → ids (`LLM`), for every family."""
import contextlib
import functools
import math
import re
from dataclasses import dataclass, replace
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

from data import ACTIVATIONS, FeedForward, PackedLinear, attend, pack, project
from formats.files import InputError, guard, warn
from formats.tokenizer import as_id
from formats.weights import Checkpoint, Family, depth, find_tensors, load_weights, name_table


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
    tied: bool = False  # the head is the embedding
    start_token: int | None = None
    end_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        self.width, self.layers = self.width or self.hidden, depth(self.layers)
        self.ropes, self.windows = self.ropes or (None,) * self.layers, self.windows or (None,) * self.layers
        if self.heads < 1 or self.heads % self.kv_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if not len(self.ropes) == len(self.windows) == self.layers:
            raise ValueError(f"layer_types and no_rope_layers must name {self.layers} layers")
        if any(window is not None and (not isinstance(window, int) or window < 1) for window in self.windows):
            raise ValueError(f"sliding_window is {self.windows[0]!r}")
        ACTIVATIONS[self.activation]


class LayerCache(NamedTuple):
    """A layer's part of a KVCache."""
    buffer: torch.Tensor  # (2,B,H,S,hd)
    length: int
    at: torch.Tensor | None

    def update(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Takes in k, v (B,H,T,hd); returns keys and values for their queries, (2,B,H,S,hd)."""
        if self.at is not None:
            return self.buffer.index_copy_(3, self.at, torch.stack((k, v)))
        end = self.length + k.shape[2]
        self.buffer[:, :, :, self.length:end] = torch.stack((k, v))
        return self.buffer[:, :, :, :end]


class KVCache:
    """Keys and values of the tokens read so far, in buffers of fixed size, one row of the batch each. A query
    is given those so far or, once the cache is static, whole buffers, of which a mask must hide the rest:
    then every token is the same work, of the same shapes."""

    def __init__(self, config: LLMConfig, batch: int, size: int, like: torch.Tensor):
        shape = (config.layers, 2, batch, config.kv_heads, size, config.head_size)
        self.buffer, self.length = torch.zeros(shape, dtype=like.dtype, device=like.device), 0
        self.at = None  # (1,), if static: the place of the next token

    def make_static(self) -> None:
        self.at = torch.full((1,), self.length, device=self.buffer.device)

    def places(self, T: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the next T tokens (T,), and of the keys (S,) that they are given."""
        key = torch.arange(self.length + T if self.at is None else self.buffer.shape[-2],
                           device=self.buffer.device)
        return key[self.length:] if self.at is None else self.at, key

    def advance(self, T: int) -> None:
        self.length += T
        if self.at is not None:
            self.at += T

    def layer(self, i: int) -> LayerCache:
        return LayerCache(self.buffer[i], self.length, self.at)

    def select(self, rows: torch.Tensor) -> None:
        """Makes a batch of these rows, of which one may come twice."""
        self.buffer = self.buffer[:, :, rows]


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
    """cos and ±sin (B,1,T,size), half-split, at positions (B,T), or (B,T,3): of a token's (t, y, x) the first
    turns the fastest quarter of the angles, the others 3/8 each (Qwen2-VL: Wang et al., 2024,
    arXiv:2409.12191)."""
    f = frequencies(rope, positions.device)  # (size/2,)
    if positions.dim() == 2:
        positions = positions[..., None]
    else:
        side = 3 * len(f) // 8
        sizes = len(f) - 2 * side, side, side
        positions = torch.cat([x.repeat(1, 1, n) for x, n in zip(positions.split(1, -1), sizes)], -1)
    angles = (positions.float() * f)[:, None]  # (B,1,T,size/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    if (size := cos.shape[-1]) < x.shape[-1]:
        return torch.cat([rotate(x[..., :size], cos, sin), x[..., size:]], -1)
    return torch.addcmul(x * cos, x.roll(size // 2, -1), sin)


def make_norm(config: LLMConfig, size: int) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(size, config.eps)
    return nn.LayerNorm(size, config.eps, elementwise_affine=config.norm_weights)


class Attention(nn.Module):
    joined = ("q", "k", "v"),  # see data.pack

    def __init__(self, config: LLMConfig):
        super().__init__()
        width, kv_width = config.heads * config.head_size, config.kv_heads * config.head_size
        self.head_size, self.scale = config.head_size, config.query_scale
        self.q = nn.Linear(config.width, width, config.qkv_bias)
        self.k, self.v = (nn.Linear(config.width, kv_width, config.qkv_bias) for _ in "kv")
        self.q_norm, self.k_norm = (
            make_norm(config, config.head_size) if config.qk_norm else nn.Identity() for _ in "qk")
        self.out = nn.Linear(width, config.width, config.out_bias)

    def forward(self, x, turn, mask, cache):  # x (B,T,W)
        q, k, v = (y.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
                   for y in project(x, self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)  # (B,H,T,hd)
        if turn is not None:
            q, k = rotate(q, *turn).to(v.dtype), rotate(k, *turn).to(v.dtype)  # float32 angles under autocast
        if self.scale != 1:
            q = q * self.scale
        if cache is not None:
            k, v = cache.update(k, v)
        y = attend(q, k, v, mask, causal=q.shape[2] > 1 and mask is None)  # so ordered a bool, if compiled
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: LLMConfig):
        super().__init__()
        self.order, self.parallel = config.norm_order, config.parallel
        self.norm1, self.norm2 = (make_norm(config, config.width) for _ in "12")
        self.out_norm1, self.out_norm2 = (
            make_norm(config, config.width) if config.norm_order == "both" else nn.Identity() for _ in "12")
        self.attention = Attention(config)
        self.mlp = FeedForward(config.width, config.mlp, config.activation, config.mlp_bias, config.gated)

    def forward(self, x, turn, mask, cache):  # x (B,T,W)
        if self.order == "post":
            x = self.norm1(x + self.attention(x, turn, mask, cache))
            return self.norm2(x + self.mlp(x))
        y = x + self.out_norm1(self.attention(self.norm1(x), turn, mask, cache))
        return y + self.out_norm2(self.mlp(self.norm2(x if self.parallel else y)))


class LLM(nn.Module):
    """A decoder-only transformer of any family in FAMILIES. Where it is tied, `embedding` is the head too."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.config = config
        self.recomputes = False  # what a block kept for the backward pass: a third more time, little memory
        self.static = None  # whether it decodes with a static cache; None: on a GPU, there as a CUDA graph
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
        self.head = None if config.tied else nn.Linear(D, V, bias=False)
        self.plain_head = []  # its weight, once the head is packed

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Ids (B,T) to embeddings (B,T,D)."""
        x, scale = self.embedding(tokens), self.config.embedding_scale
        return x if scale == 1 else x * torch.tensor(scale, dtype=x.dtype)  # Gemma rounds the scale too

    def hidden(self, embeddings: torch.Tensor, positions: torch.Tensor | None = None,
               mask: torch.Tensor | None = None, cache: KVCache | None = None, between=None) -> torch.Tensor:
        """Embeddings (B,T,D) to the states (B,T,D) that the head reads.

        positions (B,T), or (B,T,3) for `rotary`: 0, 1, … after what the cache holds, unless given. mask
        (B,1,T,S): which of the S keys (cached ones included) each token sees, before a layer's window narrows
        it; causal unless given. between(layer, x, positions): what becomes of the states x (B,T,W) before
        each block, if anything. Raises InputError past `max_positions`.
        """
        config, T = self.config, embeddings.shape[1]
        self.check(T + (cache.length if cache else 0))
        query, key = cache.places(T) if cache else [torch.arange(T, device=embeddings.device)] * 2
        if positions is None:
            positions = query[None]
        x = self.project_in(embeddings.to(self.dtype))  # (B,T,W)
        if self.positions is not None:
            x = x + self.positions(positions)
        turns = {rope: rope and rotary(rope, positions, x.dtype) for rope in set(config.ropes)}
        masks = {window: narrow(mask, window, query, key) for window in set(config.windows)}
        for layer, (block, rope, window) in enumerate(zip(self.blocks, config.ropes, config.windows)):
            if between is not None:
                x = between(layer, x, positions)
            inputs = x, turns[rope], masks[window], cache and cache.layer(layer)
            x = recompute(block, *inputs, use_reentrant=False) if self.recomputes else block(*inputs)
        if cache is not None:
            cache.advance(T)
        return self.project_out(self.norm(x))  # (B,T,D)

    def check(self, tokens: int) -> None:
        """Raises InputError where a text of so many tokens has no positions left."""
        if tokens > (most := self.config.max_positions):
            raise InputError(f"{tokens} tokens are more than the language model's {most} positions")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """States (…,D) to scores (…,V) of the next token."""
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)

    def exact_logits(self, hidden: torch.Tensor, few: int = 8) -> torch.Tensor:
        """States (B,D) to float32 scores (B,V), of which the best few are computed in float32.

        Scores that are rounded to bfloat16 tie: about 20 they are an eighth apart. Of a tie the lowest id
        would win, whatever the text says.
        """
        logits = self.logits(hidden).float()
        if hidden.dtype == torch.float32 or not isinstance(self.head, (type(None), nn.Linear, PackedLinear)):
            return logits
        weight, = self.plain_head or [(self.head or self.embedding).weight]  # (V,D)
        best = logits.topk(min(few, logits.shape[-1])).indices  # (B,few)
        exact = weight[best].float() @ hidden.float()[..., None]  # (B,few,1)
        return logits.scatter(1, best, exact[..., 0])

    def pack(self) -> None:
        """See `data.pack`; a tied head gets a packed copy of the embedding."""
        if self.head is None:
            self.head = nn.Linear(1, 1, bias=False)
            self.head.weight = self.embedding.weight
        self.plain_head = [self.head.weight]  # a packed one can't be looked up
        pack(self, self.dtype)

    def forward(self, tokens=None, *, embeddings=None) -> torch.Tensor:
        """Ids (B,T), or embeddings (B,T,D), to logits (B,T,V)."""
        return self.logits(self.hidden(self.embed(tokens) if embeddings is None else embeddings))

    @torch.inference_mode()
    def generate(self, tokens=None, *, embeddings=None, positions=None, between=None, max_tokens: int = 50,
                 temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, beams: int = 1,
                 end_tokens: tuple[int, ...] | None = None, keep_end: bool = False,
                 generator: torch.Generator | None = None) -> list[list[int]]:
        """Continues each row until one of `end_tokens` (the checkpoint's own, unless given) or `max_tokens`.

        Takes `tokens` or `embeddings`: (B,T) or (B,T,D), or a list of B rows (T,) or (T,D) of any lengths.
        Rows are padded on the left and get the text each would get alone. Their `positions` (0, 1, … unless
        given), (B,T) or (B,T,3) or a list of rows, go on after the largest of a row. `between` as for
        `hidden`; with beams it meets each row as often, one after the other. temperature 0 is greedy; top_k
        (0: off) and top_p (Holtzman et al., 2020, arXiv:1904.09751) narrow the choice; beams > 1 search for
        the likeliest text instead. Returns B lists of new ids, with the end token if `keep_end`. Raises
        InputError.
        """
        device = self.embedding.weight.device
        if embeddings is None:
            rows = [torch.as_tensor(row, dtype=torch.long, device=device) for row in tokens]
            if strange := [id for row in rows for id in row.tolist() if not 0 <= id < self.config.vocabulary]:
                raise InputError(f"token {strange[0]} has no embedding: there are {self.config.vocabulary}")
            embeddings = [self.embed(row) for row in rows]
        end_tokens = self.config.end_tokens if end_tokens is None else end_tokens
        lengths = [len(row) for row in embeddings]
        B, T = len(lengths), max(lengths)
        if not min(lengths):
            raise InputError("there is nothing to continue: a row is empty")
        if beams > 1 and temperature:
            raise InputError("beam search draws nothing: leave the temperature at 0")
        if positions is None:
            positions = [torch.arange(n, device=device) for n in lengths]

        def pad_left(rows):  # to (B,T,…)
            return torch.stack([F.pad(row, (0, 0) * (row.dim() - 1) + (T - len(row), 0)) for row in rows])

        x, positions = pad_left(embeddings).to(self.dtype), pad_left(positions)
        pad = T - torch.tensor(lengths, device=device)[:, None]  # (B,1)
        after = positions.flatten(1).amax(1, keepdim=True) + 1  # (B,1)
        size = -(-(T + max_tokens) // 64) * 64  # as a GPU's kernels for attention like it
        cache, ids = KVCache(self.config, B, size, x), []
        done = torch.zeros(B, dtype=torch.bool, device=device)
        ends = pad.new_tensor([id for id in end_tokens if id < self.config.vocabulary])
        search = BeamSearch(B, beams, max_tokens, ends) if beams > 1 else None

        def read(x, positions):  # to the scores (B,V) of the token after x
            mask = None
            if min(lengths) < T or cache.at is not None:
                query, key = cache.places(x.shape[1])
                # a padding token sees itself alone: softmax over nothing would be NaN
                seen = (key >= pad[:, :, None]) | (key == query[:, None])
                mask = (seen & (key <= query[:, None]))[:, None]  # (B,1,T,S)
            return self.exact_logits(self.hidden(x, positions, mask, cache, between)[:, -1])

        def step(chosen, after):
            return read(self.embed(chosen)[:, None], after)

        logits = read(x, positions)
        if not logits.isfinite().all():
            raise InputError(f"the language model's scores are not finite in {str(self.dtype)[6:]}: take "
                             "another --precision, or look whether its weights are whole")
        if (device.type == "cuda" if self.static is None else self.static) and not search:
            cache.make_static()
            step = Recorded(step) if device.type == "cuda" else step
        for n in range(1, max_tokens + 1):
            if search is None:
                chosen = sample(logits, temperature, top_k, top_p, generator)  # (B,)
                ids.append(chosen)
                done |= (chosen[:, None] == ends).any(1)
            else:
                chosen, rows, done = search.step(logits)  # (B·beams,), (B·beams,), (B,)
                cache.select(rows)
                pad, after = pad[rows], after[rows]
            full = T + n > self.config.max_positions
            # a look at what a GPU has done waits for it
            if n == max_tokens or (done.is_cpu or n < 3 or n % 8 == 0 or full) and done.all():
                break
            self.check(T + n)
            logits, after = step(chosen, after), after + 1
        rows = torch.stack(ids, 1).tolist() if ids else search.best() if search else [[]] * B
        lengths = [next((i for i, id in enumerate(row) if id in end_tokens), len(row)) for row in rows]
        return [row[:length + keep_end] for row, length in zip(rows, lengths)]

    @classmethod
    def from_pretrained(cls, name: str | Checkpoint, dtype: torch.dtype = torch.float32) -> "LLM":
        """Loads a checkpoint (a folder, a hub name, or the part of one) in eval mode. Raises InputError."""
        checkpoint = Checkpoint(name) if isinstance(name, str) else name
        family, config = checkpoint.family(FAMILIES)
        # generation_config.json, where there is one, knows best what ends a text
        end = checkpoint.json("generation_config.json").get("eos_token_id", config.end_tokens)
        config.end_tokens = tuple(end) if isinstance(end, (list, tuple)) else () if end is None else (end,)
        config.tied = config.tied and not own_head(checkpoint, family)
        with torch.device("meta"), guard(checkpoint.folder / "config.json"):
            for id in (*config.end_tokens, config.start_token or 0):
                as_id(id)
            llm = cls(config)
        llm.name, llm.family = checkpoint.name, family
        if config.tied:
            family = tie(family)
        load_weights(llm, checkpoint, family, dtype)
        return llm.eval()


def own_head(checkpoint: Checkpoint, family: Family) -> bool:
    """Whether a checkpoint has a head that differs from its embedding, whatever config.json says."""
    places, _ = find_tensors(("embedding.weight", "head.weight"), family, checkpoint.where)
    names = [disk[0] for _, disk in places.values()]
    with guard(checkpoint.folder, "not whole safetensors files"):
        if not checkpoint.where.keys() >= {*names} or torch.equal(*map(checkpoint.tensor, names)):
            return False
    warn(f"{checkpoint.folder}: config.json ties the head to the embedding, but '{names[1]}' differs from "
         f"'{names[0]}': the model keeps both")
    return True


def tie(family: Family) -> Family:
    """The family's names where the head is the embedding: a file holds the one tensor under either name, or
    the same one under both."""
    embedding, head = family.names["embedding"], family.names["head"]
    heads = "|".join(re.escape(f"{name}.weight") for name in head.split("|"))
    return family._replace(names=family.names | {"embedding": f"{embedding}|{head}"},
                           unused=rf"{family.unused}|(.*\.)?({heads})")


def nats(states: torch.Tensor, targets: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor],
         vocabulary: int, rows: int | None = None) -> torch.Tensor:
    """Cross entropy (M,) of targets (M,) by the scores logits(states) (M,V) of states (M,D). The scores of no
    more than `rows` targets exist at a time: those of more are computed part by part, and once more in the
    backward pass. Unless given, these scores take 1 GiB, on a CPU the 32 MiB that its caches hold (half the
    time), but are those of 128 targets at least."""
    def part(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits(states).float(), targets, reduction="none")

    rows = rows or max(128, (1 << (23 if states.is_cpu else 28)) // vocabulary)
    if len(targets) <= rows:
        return part(states, targets)
    return torch.cat([recompute(part, *both, use_reentrant=False)
                      for both in zip(states.split(rows), targets.split(rows))])


@functools.cache
def recording_stream(device: int) -> "torch.cuda.Stream":
    """The one on which graphs are recorded: nothing can be on the usual one, and each has work memory."""
    return torch.cuda.Stream(device)


class Recorded:
    """A function of tensors that is the same work for a GPU in every call: the second is recorded as a CUDA
    graph, which from then on is launched as a whole, not kernel by kernel. What it returns is overwritten by
    the next call."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        self.function, self.inputs, self.graph = function, None, None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        if self.inputs is None:  # kernels are loaded, and workspaces made, when they are used first
            self.inputs = [x.clone() for x in inputs]
            return self.function(*inputs)
        torch._foreach_copy_(self.inputs, inputs)
        if self.graph is None:
            with torch.cuda.device(inputs[0].device):
                self.record()
        self.graph.replay()
        return self.output

    def record(self) -> None:
        """Records the kernels of a call, computing nothing. `torch.cuda.graph` would do so too, but it waits
        for the GPU and gives back all memory that is cached, and of what fails inside it tells another
        error."""
        self.graph, stream = torch.cuda.CUDAGraph(), recording_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # another thread may be pinning the next pictures meanwhile
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.output = self.function(*self.inputs)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # that the recording isn't whole
                    self.graph.capture_end()
                raise
            self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)


def narrow(mask: torch.Tensor | None, window: int | None, query: torch.Tensor,
           key: torch.Tensor) -> torch.Tensor | None:
    """`mask` (None: causal), narrowed to the `window` nearest of the keys at the places `key` (S,) for each
    token at `query` (T,). None where `attend` needs none, being causal by itself."""
    S = len(key)
    window = min(window or S, S)
    if window == S and (mask is not None or len(query) in (1, S)):
        return mask
    distance = query[:, None] - key  # (T,S)
    near = (distance >= 0) & (distance < window)
    return near if mask is None else near & mask


def sample(logits: torch.Tensor, temperature: float, top_k: int, top_p: float,
           generator: torch.Generator | None = None) -> torch.Tensor:
    """Draws the next token of each row of logits (B,V): ids (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:  # the smallest set of tokens whose probabilities reach top_p
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        out = probabilities.cumsum(-1) - probabilities >= top_p
        out[:, 0] = False
        logits = logits.masked_fill(out.scatter(-1, order, out), -torch.inf)
    # as torch.multinomial draws, but that would wait for a GPU
    chances = logits.softmax(-1)
    return (chances / torch.empty_like(chances).exponential_(generator=generator)).argmax(-1)


class BeamSearch:
    """The `beams` likeliest texts of each of B rows go on side by side. Of those that ended, the `beams` best
    by mean log-probability are kept, until the best that goes on is no better than the worst of these."""

    def __init__(self, B: int, beams: int, max_tokens: int, ends: torch.Tensor):
        self.beams, self.max_tokens = beams, max_tokens
        self.ends, self.end_tokens = ends, set(ends.tolist())
        self.texts = [[[]] for _ in range(B)]  # that go on, best first
        self.scores = [[0.0] for _ in range(B)]  # of these
        self.ended = [[] for _ in range(B)]  # (score, text), best first
        self.done = [False] * B

    def step(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (B·k,V) of each row's k texts (one, then `beams`) to the ids (B·beams,) that go on, which of
        the B·k texts each continues, and which rows (B,) are done."""
        B, k, V = len(self.texts), len(self.texts[0]), logits.shape[-1]
        totals = logits.log_softmax(-1).view(B, k, V) + logits.new_tensor(self.scores)[..., None]  # (B,k,V)
        on = totals.index_fill(2, self.ends, -torch.inf)
        best, on = (t.flatten(1).topk(min(self.beams, k * V)) for t in (totals, on))  # (B,beams)
        for b, (scores, places, on_scores, on_places) in enumerate(zip(*(t.tolist() for t in (*best, *on)))):
            texts, on_texts = ([self.texts[b][i // V] + [i % V] for i in which]
                               for which in (places, on_places))
            length = len(texts[0])
            if not self.done[b]:
                self.ended[b] += [(score / length, text) for score, text in zip(scores, texts)
                                  if text[-1] in self.end_tokens or length == self.max_tokens]
                self.ended[b] = sorted(self.ended[b], reverse=True)[:self.beams]
                hopeless = len(self.ended[b]) == self.beams and on_scores[0] / length <= self.ended[b][-1][0]
                self.done[b] = hopeless or length == self.max_tokens
            self.texts[b], self.scores[b] = on_texts, on_scores
        rows = on.indices // V + k * torch.arange(B, device=logits.device)[:, None]
        return (on.indices % V).flatten(), rows.flatten(), torch.tensor(self.done)

    def best(self) -> list[list[int]]:
        return [ended[0][1] if ended else [] for ended in self.ended]


# ---------------------------------------------------------------------------------------------------------
# Families: what differs from one to the next, as data

def refuse(c: dict, *options: str) -> None:
    if on := [option for option in options if c.get(option)]:
        raise ValueError(f"{', '.join(on)}: not supported")


def gpt2_config(c: dict) -> LLMConfig:
    refuse(c, "scale_attn_by_inverse_layer_idx")
    hidden, heads = c["n_embd"], c["n_head"]
    return LLMConfig(
        vocabulary=c["vocab_size"], hidden=hidden, layers=c["n_layer"], heads=heads, kv_heads=heads,
        head_size=hidden // heads, mlp=c.get("n_inner") or 4 * hidden, max_positions=c["n_positions"],
        activation=c.get("activation_function", "gelu_new"), eps=c.get("layer_norm_epsilon", 1e-5),
        norm="layer", learned_positions=True, gated=False, qkv_bias=True, out_bias=True, mlp_bias=True,
        tied=c.get("tie_word_embeddings", True), start_token=c.get("bos_token_id"),
        end_tokens=c.get("eos_token_id"))


def opt_config(c: dict) -> LLMConfig:
    width, heads, bias = c["hidden_size"], c["num_attention_heads"], c.get("enable_bias", True)
    pre = c.get("do_layer_norm_before", True)
    return LLMConfig(
        vocabulary=c.get("vocab_size", 50272), hidden=c.get("word_embed_proj_dim") or width, width=width,
        layers=c["num_hidden_layers"], heads=heads, kv_heads=heads, head_size=width // heads,
        mlp=c["ffn_dim"], max_positions=c.get("max_position_embeddings", 2048),
        activation=c.get("activation_function", "relu"), eps=1e-5, norm="layer",
        norm_weights=c.get("layer_norm_elementwise_affine", True),
        norm_order="pre" if pre else "post", final_norm=pre and not c.get("_remove_final_layer_norm"),
        learned_positions=True, gated=False, qkv_bias=bias, out_bias=bias, mlp_bias=bias,
        tied=c.get("tie_word_embeddings", True), start_token=c.get("bos_token_id", 2),
        end_tokens=c.get("eos_token_id", 2))


def llama_config(c: dict, slides=lambda layer: True, **differences) -> LLMConfig:
    """Llama's config.json, which most families took over. `slides` tells which layers have the sliding
    window, where `layer_types` doesn't; `differences` are fields that a family sets otherwise."""
    hidden, heads, layers = c["hidden_size"], c["num_attention_heads"], depth(c["num_hidden_layers"])
    bias = c.get("attention_bias", False)
    rope = make_rope(c, c.get("rope_scaling") or c.get("rope_parameters") or {})
    reach = rope.factor if rope.scaling == "linear" else 1  # not in max_position_embeddings
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    types = c.get("layer_types") or [f"{'sliding' if slides(i) else 'full'}_attention" for i in range(layers)]
    if not {*types} <= {"sliding_attention", "full_attention"}:
        raise ValueError(f"layer_types {sorted({*types})} are not supported")
    return LLMConfig(**dict(
        vocabulary=c["vocab_size"], hidden=hidden, layers=layers, heads=heads,
        kv_heads=c.get("num_key_value_heads") or heads, head_size=c.get("head_dim") or hidden // heads,
        mlp=c["intermediate_size"], max_positions=int(c.get("max_position_embeddings", 2048) * reach),
        activation=c.get("hidden_act", "silu"), eps=c.get("rms_norm_eps", 1e-6), ropes=(rope,) * layers,
        windows=tuple(window if kind == "sliding_attention" else None for kind in types),
        qkv_bias=bias, out_bias=bias, mlp_bias=c.get("mlp_bias", False),
        tied=c.get("tie_word_embeddings", False), start_token=c.get("bos_token_id"),
        end_tokens=c.get("eos_token_id")) | differences)


def make_rope(c: dict, parameters: dict) -> Rope:
    """`parameters`: config.json's `rope_parameters`, or the older `rope_scaling` and keys of config.json."""
    r = {"rope_theta": c.get("rope_theta") or c.get("rotary_emb_base") or 10000.0,
         "partial_rotary_factor": c.get("partial_rotary_factor") or c.get("rotary_pct") or 1.0} | parameters
    scaling = r.get("rope_type") or r.get("type") or "default"
    if scaling not in ("default", "linear", "llama3"):
        raise ValueError(f"rotary scaling {scaling!r} is not supported")
    head_size = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    length = c.get("max_position_embeddings", 2048)
    original = (c.get("original_max_position_embeddings") or r.get("original_max_position_embeddings")
                or length)
    factor = r.get("factor") or length / original
    size = int(head_size * r["partial_rotary_factor"])
    bands = float(r.get("low_freq_factor", 1)), float(r.get("high_freq_factor", 4))
    if not 0 < size <= head_size or size % 2:
        raise ValueError(f"{size} of {head_size} numbers of a head can't be rotary")
    return Rope(size, float(r["rope_theta"]), scaling, float(factor), int(original), bands)


def qwen_config(c: dict, **differences) -> LLMConfig:
    c = {"use_sliding_window": False, "sliding_window": 4096} | c
    return llama_config(c, lambda layer: layer >= c.get("max_window_layers", 28), **differences)


def smollm3_config(c: dict) -> LLMConfig:
    c = {"use_sliding_window": False, "rope_theta": 2e6, "tie_word_embeddings": True} | c
    every = c.get("no_rope_layer_interval", 4)
    rotates = c.get("no_rope_layers") or [(i + 1) % every for i in range(depth(c["num_hidden_layers"]))]
    config = llama_config(c, lambda layer: not rotates[layer])
    return replace(config, ropes=tuple(rope if on else None for rope, on in zip(config.ropes, rotates)))


def neox_config(c: dict) -> LLMConfig:
    c = {"rotary_pct": 0.25, "attention_bias": True} | c
    return llama_config(c, norm="layer", eps=c.get("layer_norm_eps", 1e-5), gated=False, mlp_bias=True,
                        parallel=c.get("use_parallel_residual", True))


def gemma3_config(c: dict) -> LLMConfig:
    refuse(c, "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
    c = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
         "max_position_embeddings": 131072, "sliding_window": 4096, "tie_word_embeddings": True,
         "bos_token_id": 2, "eos_token_id": 1} | c  # what config.json may leave out
    config = llama_config(
        c, lambda layer: (layer + 1) % c.get("sliding_window_pattern", 6),
        max_positions=c["max_position_embeddings"],  # rotary scaling included
        activation=c.get("hidden_activation", "gelu_pytorch_tanh"), norm_order="both", qk_norm=True,
        query_scale=(c["head_dim"] / c.get("query_pre_attn_scalar", 256)) ** 0.5,
        embedding_scale=c["hidden_size"] ** 0.5)
    both = c.get("rope_parameters") or {
        "full_attention": {"rope_theta": c.get("rope_theta", 1e6)} | (c.get("rope_scaling") or {}),
        "sliding_attention": {"rope_theta": c.get("rope_local_base_freq", 1e4)}}
    far, near = make_rope(c, both["full_attention"]), make_rope(c, both["sliding_attention"])
    return replace(config, ropes=tuple(near if window else far for window in config.windows))


def nanovlm_config(c: dict) -> LLMConfig:
    return llama_config(dict(
        vocab_size=c["lm_vocab_size"], hidden_size=c["lm_hidden_dim"], intermediate_size=c["lm_inter_dim"],
        num_hidden_layers=c["lm_n_blocks"], num_attention_heads=c["lm_n_heads"],
        num_key_value_heads=c["lm_n_kv_heads"], max_position_embeddings=c["lm_max_position_embeddings"],
        rope_theta=c["lm_re_base"], rms_norm_eps=c["lm_rms_eps"],
        tie_word_embeddings=c["lm_tie_weights"], eos_token_id=c.get("lm_eos_token_id")))


def inner_config(c: dict) -> LLMConfig:
    """Of the language model in a model of more than text."""
    return FAMILIES[c["text_config"]["model_type"]].config(c["text_config"])


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """GPT-2 stores its weights input first, (in, out); a bias stays as it is."""
    return tensor.movedim(-1, 0)


def third(i: int):
    """Reads the i-th of q, k, v from GPT-2's fused weight (in, 3 out) or bias (3 out)."""
    return lambda tensor: turned(tensor).chunk(3)[i]


def one_more(weight: torch.Tensor) -> torch.Tensor:
    """Gemma stores how much the weights of its norms differ from one."""
    return weight.float() + 1


GPT2_NAMES = name_table({"embedding": "wte", "positions": "wpe", "norm": "ln_f", "head": "lm_head"}, {
    "norm1": "ln_1", "norm2": "ln_2",
    **{f"attention.{name}": (third(i), "attn.c_attn") for i, name in enumerate("qkv")},
    "attention.out": (turned, "attn.c_proj"),
    "mlp.up": (turned, "mlp.c_fc"), "mlp.down": (turned, "mlp.c_proj")}, "h.{}.")
OPT_NAMES = name_table({
    "embedding": "embed_tokens", "project_in": "project_in", "project_out": "project_out",
    "positions": (lambda tensor: tensor[2:], "embed_positions"),  # the first two stand for padding
    "norm": "final_layer_norm", "head": "lm_head",
}, {
    "norm1": "self_attn_layer_norm", "norm2": "final_layer_norm",
    **{f"attention.{name}": f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")},
    "mlp.up": "fc1", "mlp.down": "fc2"}, "layers.{}.")
LLAMA_NAMES = name_table({"embedding": "embed_tokens", "norm": "norm", "head": "lm_head"}, {
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    **{f"attention.{name}": f"self_attn.{name}_proj" for name in "qkv"}, "attention.out": "self_attn.o_proj",
    **{f"attention.{name}": f"self_attn.{name}" for name in ("q_norm", "k_norm")},
    **{f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}}, "layers.{}.")
GEMMA3_NAMES = name_table(LLAMA_NAMES | {"norm": (one_more, "norm")}, {
    "norm1": (one_more, "input_layernorm"), "out_norm1": (one_more, "post_attention_layernorm"),
    "norm2": (one_more, "pre_feedforward_layernorm"), "out_norm2": (one_more, "post_feedforward_layernorm"),
    **{f"attention.{name}": (one_more, f"self_attn.{name}") for name in ("q_norm", "k_norm")}}, "layers.{}.")


def phi3_names(config: LLMConfig) -> dict:
    """Phi-3 fuses q, k and v, and gate and up, one after the other."""
    def part(i: int, *rows: int):
        return lambda tensor: tensor.split(rows)[i]
    qkv = [heads * config.head_size for heads in (config.heads, config.kv_heads, config.kv_heads)]
    return name_table(LLAMA_NAMES, {
        **{f"attention.{name}": (part(i, *qkv), "self_attn.qkv_proj") for i, name in enumerate("qkv")},
        "mlp.gate": (part(0, config.mlp, config.mlp), "mlp.gate_up_proj"),
        "mlp.up": (part(1, config.mlp, config.mlp), "mlp.gate_up_proj")}, "layers.{}.")


def neox_names(config: LLMConfig) -> dict:
    """GPT-NeoX fuses q, k and v head by head: (heads · 3 · hd, in)."""
    def part(i: int):
        return lambda tensor: tensor.unflatten(0, (config.heads, 3, -1))[:, i].flatten(0, 1)
    return name_table({"embedding": "embed_in", "norm": "final_layer_norm", "head": "embed_out|lm_head"}, {
        "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
        **{f"attention.{name}": (part(i), "attention.query_key_value") for i, name in enumerate("qkv")},
        "attention.out": "attention.dense", "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h"}, "layers.{}.")


NANOVLM_NAMES = name_table({"embedding": "token_embedding", "norm": "norm", "head": "head"}, {
    "norm1": "norm1", "norm2": "norm2",
    **{f"attention.{name}": f"attn.{name}_proj" for name in ("q", "k", "v", "out")},
    **{f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}}, "blocks.{}.")
ROPE_BUFFER = r".*\.rotary_emb\.inv_freq"  # old files hold it, and causal masks

FAMILIES = {  # config.json's model_type -> family
    "gpt2": Family(gpt2_config, GPT2_NAMES, r"h\.\d+\.attn\.(masked_)?bias", "transformer."),
    "opt": Family(opt_config, OPT_NAMES, "", "model.decoder."),
    "blip-2": Family(inner_config, OPT_NAMES, r"(vision_model|qformer|language_projection)\..*|query_tokens",
                     "language_model.model.decoder."),
    "llama": Family(llama_config, LLAMA_NAMES, ROPE_BUFFER, "model."),
    "smollm3": Family(smollm3_config, LLAMA_NAMES, "", "model."),
    "mistral": Family(lambda c: llama_config({"sliding_window": 4096} | c), LLAMA_NAMES, ROPE_BUFFER,
                      "model."),
    "qwen2": Family(lambda c: qwen_config(c, qkv_bias=True), LLAMA_NAMES, ROPE_BUFFER, "model."),
    "qwen3": Family(lambda c: qwen_config(c, qk_norm=True), LLAMA_NAMES, "", "model."),
    "phi3": Family(llama_config, phi3_names, ROPE_BUFFER, "model."),
    "gpt_neox": Family(neox_config, neox_names, ROPE_BUFFER + r"|layers\.\d+\.attention\.(masked_)?bias",
                       "gpt_neox."),
    "nanovlm": Family(nanovlm_config, NANOVLM_NAMES, r"rotary_embd\.inv_freq"),
    "gemma3_text": Family(gemma3_config, GEMMA3_NAMES, "", "model."),
    "gemma3": Family(inner_config, GEMMA3_NAMES, r"(model\.)?(vision_tower|multi_modal_projector)\..*",
                     "model.language_model."),
}
