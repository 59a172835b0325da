"""The language model: ids → logits → ids.

One class, `LLM`, reads every family in formats/languages.py. A field of `LLMConfig` says where a family
differs.

Letters of shapes: B texts, T tokens, S keys (those in the cache included), V vocabulary, D width of the
embeddings, W width of the blocks, H heads, hd size of a head, M targets.
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
from formats.weights import Checkpoint, collection_paused, depth, load_weights
from support.decoding import BeamSearch, Sampler
from support.kernels import Recorded, attend, pack
from support.layers import ACTIVATIONS, FeedForward, RMSNorm


class Rope(NamedTuple):
    """Rotary position embedding (Su et al., 2021, arXiv:2104.09864) of each head's first `size` numbers."""
    size: int
    theta: float  # the longest wavelength is about 2π · theta tokens
    scaling: str  # "default", or how positions past `original` are reached: "linear" or "llama3"
    factor: float  # by which scaling divides the frequencies
    original: int  # tokens of the longest text before scaling
    bands: tuple[float, float]  # llama3: wavelengths per `original`: (low, high), see `frequencies`


@dataclass
class LLMConfig:
    """The sizes of a language model, and what its family does differently. Raises ValueError if they don't
    fit."""
    vocabulary: int  # V
    hidden: int  # D, width of the embeddings and of the states that the head reads
    layers: int
    heads: int
    kv_heads: int  # heads of keys and values; fewer than `heads`: grouped-query attention
    head_size: int
    mlp: int  # hidden size of the feed-forward layers
    max_positions: int  # tokens of the longest text
    activation: str  # a key of ACTIVATIONS
    eps: float  # of the norms
    width: int = 0  # W, width of the blocks; 0: the same as `hidden`
    norm: str = "rms"  # or "layer"
    norm_weights: bool = True
    norm_order: str = "pre"  # before each sublayer; "both": before and after; "post": after adding its input
    final_norm: bool = True
    learned_positions: bool = False  # GPT-2, OPT: an embedding of each position, added to the token's
    ropes: tuple[Rope | None, ...] = ()  # of each layer; None: the layer doesn't rotate
    windows: tuple[int | None, ...] = ()  # of each layer: tokens seen back from a token, itself included
    gated: bool = True  # SwiGLU's gate
    parallel: bool = False  # attention and feed-forward layer read the same input
    qk_norm: bool = False  # a norm on each head's queries and keys
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    query_scale: float = 1.0  # multiplies the queries, in addition to 1 / √head_size
    embedding_scale: float = 1.0  # Gemma: multiplies the token embeddings
    tied: bool = False  # the head's weight is the embedding's
    start_token: int | None = None
    end_tokens: tuple[int, ...] = ()
    suppressed: tuple[int, ...] = ()  # ids that are never generated

    def __post_init__(self):
        # Defaults that depend on other fields; a rope that comes from JSON is a dict
        self.width = self.width or self.hidden
        self.layers = depth(self.layers)
        ropes = self.ropes or (None,) * self.layers
        self.ropes = tuple(Rope(**rope) if isinstance(rope, dict) else rope for rope in ropes)
        self.windows = self.windows or (None,) * self.layers

        # Errors name the key in config.json
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
    """Angles by which each pair of numbers rotates from one position to the next: (size/2,), radians.

    "linear" divides all frequencies by `factor`. "llama3" (Grattafiori et al., 2024, arXiv:2407.21783)
    divides only the low ones, and blends the two for those between the bands.
    """
    exponents = torch.arange(0, rope.size, 2, device=device).float() / rope.size
    f = 1 / rope.theta ** exponents
    if rope.scaling == "linear":
        f = f / rope.factor
    elif rope.scaling == "llama3":
        # How many wavelengths fit into `original` tokens: below `low` stretch, above `high` keep as it is
        low, high = rope.bands
        keep = ((rope.original * f / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        f = (1 - keep) * f / rope.factor + keep * f
    return f


def rotary(rope: Rope, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cos and ±sin (B,1,T,size) of the angles at positions (B,T) or (B,T,3), for `rotate`.

    Number i is rotated with number i + size/2, as Llama does ("half-split"), not with its neighbour. The
    first half of the sines is negative.

    With a triple (t, y, x) the fastest quarter of the frequencies rotates by t, the next 3/8 by y, the last
    3/8 by x (Qwen2-VL: Wang et al., 2024, arXiv:2409.12191).
    """
    # The position that each frequency rotates by: one for all, or t, y and x for their shares
    f = frequencies(rope, positions.device)  # (size/2,)
    if positions.dim() == 2:
        positions = positions[..., None]  # (B,T,1)
    else:
        n = 3 * len(f) // 8
        t, y, x = positions.split(1, -1)  # (B,T,1) each
        parts = [t.repeat(1, 1, len(f) - 2 * n), y.repeat(1, 1, n), x.repeat(1, 1, n)]
        positions = torch.cat(parts, -1)  # (B,T,size/2)

    # Angles, once for each half of a head
    angles = (positions.float() * f)[:, None]  # (B,1,T,size/2)
    cos = angles.cos()
    sin = angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first `size` numbers of each head of x (B,H,T,hd) by cos and ±sin (B,1,T,size)."""
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat([rotate(x[..., :size], cos, sin), x[..., size:]], -1)

    # x·cos + partner·±sin: rolling by half a head brings each number its partner
    return torch.addcmul(x * cos, x.roll(size // 2, -1), sin)


# ---------------------------------------------------------------------------------------------------------
# Key-value cache

class LayerCache(NamedTuple):
    """One layer's part of a KVCache; H are its heads of keys and values."""
    buffer: torch.Tensor  # (2,B,H,size,hd): keys, values
    length: int  # tokens in it
    next: torch.Tensor | None  # (1,): the position of the next token, if the cache is static

    def update(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Stores k and v (B,H,T,hd) of T new tokens. Returns the keys and values (2,B,H,S,hd) to attend
        to."""
        # Static: one token goes to the place that a tensor names, and the whole buffer comes back
        if self.next is not None:
            return self.buffer.index_copy_(3, self.next, torch.stack((k, v)))

        # Otherwise only the filled part comes back
        end = self.length + k.shape[2]
        self.buffer[:, :, :, self.length:end] = torch.stack((k, v))
        return self.buffer[:, :, :, :end]


class KVCache:
    """Keys and values of the tokens read so far, in one buffer of fixed size.

    A layer attends to the filled part of the buffer, which grows with each token. After `make_static` it
    attends to the whole buffer, and a mask hides the empty part. Then every step has the same shapes, and a
    GPU can replay a recording of it (a CUDA graph).

    batch: B. size: tokens that it has room for. like: a tensor of the dtype and device that it shall have.
    """

    def __init__(self, config: LLMConfig, batch: int, size: int, like: torch.Tensor):
        shape = (config.layers, 2, batch, config.kv_heads, size, config.head_size)
        self.buffer = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.length = 0
        self.next = None  # see LayerCache

    def make_room(self, size: int) -> None:
        """Makes room for at least `size` tokens, which may come several at a time."""
        more = max(0, size - self.buffer.shape[-2])
        self.buffer = F.pad(self.buffer, (0, 0, 0, more))
        self.next = None

    def make_static(self) -> None:
        """From now on every step has the same shapes; tokens come one at a time."""
        self.next = torch.full((1,), self.length, device=self.buffer.device)

    def positions(self, T: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the positions (T,) of the next T tokens, and those (S,) of the keys they attend to."""
        if self.next is not None:
            return self.next, torch.arange(self.buffer.shape[-2], device=self.buffer.device)
        keys = torch.arange(self.length + T, device=self.buffer.device)
        return keys[self.length:], keys

    def advance(self, T: int) -> None:
        """Counts T tokens as read, after every layer has stored them."""
        self.length += T
        if self.next is not None:
            self.next += T

    def layer(self, i: int) -> LayerCache:
        return LayerCache(self.buffer[i], self.length, self.next)

    def select(self, rows: torch.Tensor) -> None:
        """Replaces the batch by these of its rows, for beam search; a row may come twice."""
        self.buffer = self.buffer[:, :, rows]


# ---------------------------------------------------------------------------------------------------------
# The transformer

def make_norm(config: LLMConfig, size: int) -> nn.Module:
    if config.norm == "rms":
        return RMSNorm(size, config.eps)
    return nn.LayerNorm(size, config.eps, elementwise_affine=config.norm_weights)


class Attention(nn.Module):
    """Causal self-attention with rotary positions, grouped queries and a cache."""
    attend = staticmethod(attend)  # an attribute, so that kernels.watch can swap it
    joined = {"qkv": ("q", "k", "v")}  # kernels.pack makes one product of these three

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

    def forward(self, x, rotation, mask, cache):
        """States x (B,T,W) to (B,T,W). rotation: cos and ±sin of `rotary`, or None. mask: (B,1,T,S) or (T,S);
        None is causal. cache: a LayerCache, or None."""
        # Queries, keys and values of each head
        q, k, v = self.qkv(x)
        q = self.q_norm(self.split(q))
        k = self.k_norm(self.split(k))
        v = self.split(v)

        # Rotate queries and keys by their positions
        if rotation is not None:
            q = rotate(q, *rotation).to(v.dtype)  # under autocast cos and sin are float32
            k = rotate(k, *rotation).to(v.dtype)
        if self.scale != 1:
            q = q * self.scale

        # Attend to all tokens so far
        if cache is not None:
            k, v = cache.update(k, v)
        causal = q.shape[2] > 1 and mask is None  # this order makes it a bool under torch.compile
        y = self.attend(q, k, v, mask, causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block: attention and a feed-forward layer. Families put the norms in different places."""

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

        # All others: a norm before each sublayer; in Gemma 3 one after it too. In Pythia the feed-forward
        # layer reads the input of the block, in the others its sum with the attention's output
        y = x + self.out_norm1(self.attention(self.norm1(x), rotation, mask, cache))
        return y + self.out_norm2(self.mlp(self.norm2(x if self.parallel else y)))


class LLM(nn.Module):
    """A decoder-only transformer (Radford et al., 2019, "Language models are unsupervised multitask
    learners") of any family in FAMILIES.

    recomputes: whether training computes each block again in the backward pass instead of keeping its values:
        a third more time, little memory.
    static: whether `generate` uses a static cache: True, False, or "auto": on a GPU.
    """

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.config = config
        self.recomputes = False
        self.static = "auto"
        V, D, W = config.vocabulary, config.hidden, config.width

        # The token embeddings. nn.Embedding(V, D) would draw its weights also on the meta device, and torch
        # imports 800 modules to do so there
        self.embedding = nn.Embedding.from_pretrained(torch.empty(V, D), freeze=False)
        if not self.embedding.weight.is_meta:
            nn.init.normal_(self.embedding.weight, std=0.02)

        # The blocks, and projections to their width and back, where it isn't the embeddings' (OPT-350M)
        self.project_in = nn.Linear(D, W, bias=False) if W != D else nn.Identity()
        self.positions = nn.Embedding(config.max_positions, W) if config.learned_positions else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config, W) if config.final_norm else nn.Identity()
        self.project_out = nn.Linear(W, D, bias=False) if W != D else nn.Identity()

        # The head, from states to logits
        self.head = nn.Linear(D, V, bias=False)
        self.tie()
        self.plain_head = []  # the head before `pack` replaced it; in a list it is no second submodule

    def tie(self) -> None:
        """Makes the embedding's weight the head's too, if the config says they are one tensor."""
        if self.config.tied:
            self.head.weight = self.embedding.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Ids (B,T) to embeddings (B,T,D)."""
        x = self.embedding(tokens)
        scale = self.config.embedding_scale
        if scale == 1:
            return x
        return x * torch.tensor(scale, dtype=x.dtype)  # as Gemma does, which rounds the scale too

    def hidden(self, embeddings: torch.Tensor, positions: torch.Tensor | None = None,
               mask: torch.Tensor | None = None, cache: KVCache | None = None,
               cross_attention: Callable | None = None) -> torch.Tensor:
        """Turns embeddings (B,T,D) into the states (B,T,D) that the head reads.

        positions: (B,T), or triples (B,T,3) as in `rotary`. By default tokens are counted from 0, those in
            the cache included.
        mask: (B,1,T,S), true where a token sees a key. A layer with a window sees fewer. By default a token
            sees itself and all before it.
        cache: holds earlier tokens and takes up these.
        cross_attention: called as cross_attention(layer, x, positions) before each block with the states x
            (B,T,W); returns the states that the block reads.
        Raises InputError if the text is longer than `max_positions`.
        """
        config = self.config
        T = embeddings.shape[1]
        self.check_length(T + (0 if cache is None else cache.length))

        # Indices of tokens and keys in the text decide what a token sees; its `positions` may be others
        if cache is None:
            token_index = key_index = torch.arange(T, device=embeddings.device)
        else:
            token_index, key_index = cache.positions(T)
        if positions is None:
            positions = token_index[None]

        # The input of the first block
        x = self.project_in(embeddings.to(self.dtype))  # (B,T,W)
        if self.positions is not None:
            x = x + self.positions(positions)

        # Layers with the same rope share its angles, layers with the same window share its mask
        rotations = {None: None}
        for rope in {*config.ropes} - {None}:
            rotations[rope] = rotary(rope, positions, x.dtype)
        masks = {window: narrow(mask, window, token_index, key_index) for window in set(config.windows)}

        # Through the blocks
        for layer, block in enumerate(self.blocks):
            if cross_attention is not None:
                x = cross_attention(layer, x, positions)
            rotation = rotations[config.ropes[layer]]
            layer_mask = masks[config.windows[layer]]
            layer_cache = None if cache is None else cache.layer(layer)
            if self.recomputes:
                x = recompute(block, x, rotation, layer_mask, layer_cache, use_reentrant=False)
            else:
                x = block(x, rotation, layer_mask, layer_cache)
        if cache is not None:
            cache.advance(T)
        return self.project_out(self.norm(x))  # (B,T,D)

    def check_length(self, tokens: int) -> None:
        """Raises InputError if a text of this many tokens is longer than the model can read."""
        most = self.config.max_positions
        if tokens > most:
            raise InputError(f"{tokens} tokens are more than the language model's {most} positions")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Turns states (…,D) into logits (…,V) of the next token."""
        return self.head(hidden)

    def exact_logits(self, hidden: torch.Tensor, few: int = 8) -> torch.Tensor:
        """Turns states (B,D) into float32 logits (B,V), and computes the best `few` of them in float32.

        Logits near 20 are an eighth apart in bfloat16, so that several tokens often tie for the first place.
        Greedy decoding would then take the one with the lowest id.
        """
        logits = self.logits(hidden).float()
        head = self.plain_head[0] if self.plain_head else self.head
        if hidden.dtype == torch.float32 or type(head) is not nn.Linear:  # a head with a LoRA stays rounded
            return logits

        # The best few again, in float32
        best = logits.topk(min(few, logits.shape[-1])).indices  # (B,few)
        exact = head.weight[best].float() @ hidden.float()[..., None]  # (B,few,1)
        return logits.scatter(1, best, exact[..., 0])

    def pack(self) -> None:
        """Makes inference faster on a CPU. Afterwards the model can't be trained, saved or moved: see
        kernels.pack."""
        self.plain_head = self.plain_head or [self.head]
        pack(self, self.dtype)

    def forward(self, tokens: torch.Tensor | None = None, *,
                embeddings: torch.Tensor | None = None) -> torch.Tensor:
        """Turns ids (B,T), or embeddings (B,T,D), into logits (B,T,V) of the token after each. Raises
        InputError if the text is longer than `max_positions`."""
        if embeddings is None:
            embeddings = self.embed(tokens)
        return self.logits(self.hidden(embeddings))

    # -----------------------------------------------------------------------------------------------------
    # Text

    @torch.inference_mode()
    def generate(self, tokens=None, *, embeddings=None, positions=None,
                 cross_attention: Callable | None = None, max_tokens: int = 50, temperature: float = 0.0,
                 top_k: int = 0, top_p: float = 1.0, beams: int = 1, length_penalty: float = 1.0,
                 end_tokens: tuple[int, ...] | None = None, keep_end: bool = False,
                 generator: torch.Generator | None = None, cache: KVCache | None = None,
                 on_token: Callable[[int], None] | None = None) -> list[list[int]]:
        """Continues each of B texts. Returns a list of the new ids of each.

        tokens, embeddings: one of the two. Ids (B,T), embeddings (B,T,D), or a list of B rows (T,) or (T,D)
            of any lengths. Shorter rows are padded on the left; a row's result doesn't depend on the others.
        positions: (B,T) or (B,T,3), or a list of rows; by default 0, 1, … New tokens count on from a row's
            largest.
        cross_attention: see `hidden`. With beam search the rows of one text, `beams` of them, are neighbours.
        max_tokens: new ids of a text, at most.
        temperature: divides the logits before a token is drawn; 0 takes the likeliest token.
        top_k: draws among the k likeliest tokens; 0: among all.
        top_p: draws among the fewest tokens whose probabilities sum to p (nucleus sampling: Holtzman et al.,
            2020, arXiv:1904.09751).
        beams: above 1, beam search for the likeliest text, with this many beams.
        length_penalty: beam search returns the text with the highest log-probability divided by its length to
            this power: 1 compares means of a token, 0 sums, which favours short texts.
        end_tokens: ids that end a text; by default the checkpoint's own. keep_end: returns them too.
        generator: what tokens are drawn with.
        cache: keys and values of the beginning of a single text (B = 1), which the embeddings continue.
            Afterwards it holds these too, and the new ids but the last.
        on_token: called with each new id of a single text as it comes.
        Raises InputError for an empty row, an id without an embedding, beam search with a temperature or
        with `on_token`, a text longer than `max_positions`, or logits that aren't finite.
        """
        device = self.embedding.weight.device
        end_tokens = self.config.end_tokens if end_tokens is None else end_tokens
        if beams > 1 and temperature:
            raise InputError("beam search draws nothing: leave the temperature at 0")
        if beams > 1 and on_token:
            raise InputError("beam search has no token to tell of until it ends: leave on_token out")
        if embeddings is None:
            embeddings = self.embed_rows(tokens)
        if not len(embeddings):
            return []

        # Pad the rows on the left to one length
        lengths = [len(row) for row in embeddings]
        B = len(lengths)
        T = max(lengths)
        past = cache.length if cache else 0
        if not min(lengths):
            raise InputError("there is nothing to continue: a row is empty")
        if positions is None:
            positions = [torch.arange(past, past + n, device=device) for n in lengths]
        x = pad_left(embeddings, T).to(self.dtype)  # (B,T,D)
        positions = pad_left(positions, T)
        pad = T - torch.tensor(lengths, device=device)[:, None]  # (B,1): tokens of padding
        next_positions = positions.flatten(1).amax(1, keepdim=True) + 1  # (B,1)

        # Room for what can be read. A multiple of 64 suits the attention kernels of a GPU
        size = -(-min(past + T + max_tokens, self.config.max_positions) // 64) * 64
        if cache is None:
            cache = KVCache(self.config, B, size, x)
        else:
            cache.make_room(size)

        def read(x, positions):  # embeddings (B,T,D) to logits (B,V) of the token after the last
            mask = None
            if min(lengths) < T or cache.next is not None:
                mask = padded_mask(pad, *cache.positions(x.shape[1]))
            hidden = self.hidden(x, positions, mask, cache, cross_attention)
            return self.exact_logits(hidden[:, -1])

        def step(chosen, positions):  # one new id for each text (B,) to logits (B,V) of the token after it
            return read(self.embed(chosen)[:, None], positions)

        # Prefill: read the prompts
        logits = read(x, positions)
        if not logits.isfinite().all():
            raise InputError(f"the language model's scores are not finite in {str(self.dtype)[6:]}: take "
                             "another --precision, or look whether its weights are whole")

        # A static cache lets a GPU replay each step as one graph. Beam search reorders the cache: no graph
        on_gpu = device.type == "cuda"
        static = on_gpu if self.static == "auto" else self.static
        if beams == 1 and static:
            cache.make_static()
            step = Recorded(step) if on_gpu else step

        # Decode, token by token
        ends = pad.new_tensor([id for id in end_tokens if id < self.config.vocabulary])
        if beams > 1:
            search = BeamSearch(B, beams, max_tokens, ends, length_penalty)
        else:
            search = Sampler(B, ends, temperature, top_k, top_p, generator)
        never = pad.new_tensor(self.config.suppressed)
        for n in range(1, max_tokens + 1):
            if len(never):
                logits = logits.index_fill(1, never, -torch.inf)

            # Choose the next token of each text, or of each beam and the row of the batch that it continues
            chosen, rows, done = search.step(logits)  # (B·beams,), None or (B·beams,), (B,)
            if rows is not None:
                cache.select(rows)
                pad = pad[rows]
                next_positions = next_positions[rows]
            if on_token:
                on_token(chosen.item())

            # Stop if all are done. Reading `done` waits for a GPU, so there it is read every eighth token
            if n == max_tokens:
                break
            full = past + T + n > self.config.max_positions
            if done.is_cpu or n < 3 or n % 8 == 0 or full:
                if done.all():
                    break

            # Read the chosen tokens
            self.check_length(past + T + n)
            logits = step(chosen, next_positions)
            next_positions = next_positions + 1

        # Cut each text at its first end token
        texts = []
        for text in search.best():
            length = 0
            while length < len(text) and text[length] not in end_tokens:
                length += 1
            texts.append(text[:length + 1] if keep_end else text[:length])
        return texts

    def embed_rows(self, tokens) -> list[torch.Tensor]:
        """Turns rows of ids into rows of embeddings (T,D). Raises InputError for an id without an
        embedding."""
        device = self.embedding.weight.device
        V = self.config.vocabulary
        rows = [torch.as_tensor(row, dtype=torch.long, device=device) for row in tokens]
        if not all(row.dim() for row in rows):
            raise InputError("generate takes a list of texts' ids: for one text, [ids]")
        for row in rows:
            for id in row.tolist():
                if not 0 <= id < V:
                    raise InputError(f"token {id} has no embedding: there are {V}")
        return [self.embed(row) for row in rows]

    @classmethod
    @collection_paused()
    def from_pretrained(cls, name: str | Checkpoint, dtype: torch.dtype = torch.float32) -> "LLM":
        """Loads a language model from a folder or a hub id, in eval mode.

        name: the folder or hub id, or a Checkpoint, such as the language model's part of a public VLM.
        dtype: of the weights.
        Raises InputError if the files are missing, of an unknown family, or not what config.json says.
        """
        checkpoint = name if isinstance(name, Checkpoint) else Checkpoint(str(name))
        family, config = checkpoint.family(FAMILIES, LLMConfig)

        # End tokens: generation_config.json, if there is one, overrides config.json
        generation = checkpoint.json("generation_config.json")
        end = generation.get("eos_token_id", config.end_tokens)
        if not isinstance(end, (list, tuple)):
            end = () if end is None else (end,)
        config.end_tokens = tuple(end)
        suppressed = generation.get("suppress_tokens") or ()

        # A checkpoint may have a head of its own, whatever config.json says
        config.tied = config.tied and not own_head(checkpoint, family)

        # Make the modules without memory for their weights, then give each parameter its tensor
        with torch.device("meta"), guard(checkpoint.folder / "config.json"):
            config.suppressed = tuple(suppressed)
            for id in (*config.end_tokens, config.start_token or 0):
                as_id(id)
            if not all(0 <= as_id(id) < config.vocabulary for id in config.suppressed):
                raise ValueError("suppress_tokens names ids without an embedding")
            llm = cls(config)
        llm.name = checkpoint.name
        llm.family = family
        load_weights(llm, checkpoint, tie(family) if config.tied else family, dtype)
        llm.tie()
        return llm.eval()


# ---------------------------------------------------------------------------------------------------------
# Padding, masks, losses

def pad_left(rows: list[torch.Tensor], T: int) -> torch.Tensor:
    """Joins B rows, each (up to T,…), in one tensor (B,T,…), with zeros before the shorter ones."""
    padded = []
    for row in rows:
        before_first = (T - len(row), 0)
        other_dimensions = (0, 0) * (row.dim() - 1)  # F.pad counts from the last dimension
        padded.append(F.pad(row, other_dimensions + before_first))
    return torch.stack(padded)


def padded_mask(pad: torch.Tensor, token_index: torch.Tensor, key_index: torch.Tensor) -> torch.Tensor:
    """Returns the causal mask (B,1,T,S) of rows that begin with `pad` (B,1) tokens of padding: true where the
    token with index `token_index` (T,) sees the key with index `key_index` (S,).

    No token sees the padding, except that a token of padding sees itself: softmax over nothing would be NaN.
    """
    is_text = key_index >= pad[:, :, None]  # (B,1,S)
    is_itself = key_index == token_index[:, None]  # (T,S)
    not_later = key_index <= token_index[:, None]  # (T,S)
    return ((is_text | is_itself) & not_later)[:, None]


def narrow(mask: torch.Tensor | None, window: int | None, token_index: torch.Tensor,
           key_index: torch.Tensor) -> torch.Tensor | None:
    """Returns a layer's mask: `mask`, but a token sees only the last `window` keys up to itself.

    mask: (B,1,T,S), or None for a causal mask. window: None for no window. token_index (T,), key_index (S,):
    where tokens and keys stand in the text.
    """
    S = len(key_index)
    if window is None or window >= S:
        window = S
        if mask is not None:
            return mask
        if len(token_index) in (1, S):  # one token sees all keys; a whole text `attend` masks by itself
            return None

    # A key isn't after the token, and less than a window before it
    distance = token_index[:, None] - key_index  # (T,S)
    seen = (distance >= 0) & (distance < window)
    return seen if mask is None else seen & mask


def token_losses(states: torch.Tensor, targets: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor],
                 vocabulary: int, rows: int | None = None) -> torch.Tensor:
    """Returns the cross entropy (M,) of each target (M,) id, from states (M,D).

    logits: a function from states (M,D) to logits (M,V). All M rows of logits would take much memory. If
    there are more than `rows` targets, they are computed in parts of `rows`, and again in the backward pass.
    By default a part takes 1 GiB or, on a CPU, the 32 MiB that fit its caches (half the time), and it has at
    least 128 targets.
    """
    def part(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits(states).float(), targets, reduction="none")

    if not rows:
        numbers = 1 << (23 if states.is_cpu else 28)  # float32: 32 MiB or 1 GiB
        rows = max(128, numbers // vocabulary)
    if len(targets) <= rows:
        return part(states, targets)
    pairs = zip(states.split(rows), targets.split(rows))
    return torch.cat([recompute(part, *pair, use_reentrant=False) for pair in pairs])
