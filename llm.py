"""The language model: text ↔ ids (`Tokenizer`), ids → logits → text (`LLM`). One `LLM` reads every family."""
import functools
import heapq
import itertools
import math
import re
import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

import regex
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import ACTIVATIONS, Checkpoint, Family, InputError, attend, find_checkpoint, load_weights, read_json


class Rope(NamedTuple):
    """Rotary position embedding (Su et al., 2021, arXiv:2104.09864) of the first `size` numbers of each head."""
    size: int
    theta: float
    kind: str = "default"  # how a longer context is reached: "linear", "dynamic" or "llama3"
    factor: float = 1.0
    original: int = 0  # positions before that
    low: float = 1.0  # llama3: what turns less often than this over the original positions is slowed down
    high: float = 4.0  # and what turns more often is left alone


@dataclass
class LLMConfig:
    vocabulary: int
    hidden: int  # size of the embeddings, and of the states that the head reads
    layers: int
    heads: int
    kv_heads: int  # fewer than heads: grouped-query attention
    head_size: int
    mlp: int  # hidden size of the feed-forward layers
    max_positions: int
    activation: str
    eps: float
    width: int = 0  # size of the states between the blocks: `hidden`, unless given
    norm: str = "rms"  # a name in NORMS
    order: str = "before"  # norms stand before, after or "around" attention and MLP; "parallel": both read the same
    final_norm: bool = True
    ropes: tuple[Rope | None, ...] = ()  # rotary position embedding of each layer
    windows: tuple[int | None, ...] = ()  # how many tokens, itself included, a token sees in each layer; None: all
    position_offset: int | None = None  # row of position 0 in a table of learned positions; None: no table
    embedding_scale: float = 1.0
    query_scale: float = 1.0  # of the scores q kᵀ / √head_size
    gated: bool = True  # SwiGLU's gate
    qk_norm: bool = False  # a norm of each head's queries and keys
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False  # the head is the embedding
    start_token: int | None = None
    end_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        self.width = self.width or self.hidden
        self.ropes, self.windows = (row or (None,) * self.layers for row in (self.ropes, self.windows))
        if self.heads < 1 or self.heads % self.kv_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if not self.layers == len(self.ropes) == len(self.windows):
            raise ValueError(f"layer_types are not {self.layers}")
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError("sliding_window is not positive")
        ACTIVATIONS[self.activation]


class KVCache:
    """Keys and values of the tokens read so far, in buffers of fixed size, one row of the batch each."""

    def __init__(self, config: LLMConfig, batch: int, size: int, like: torch.Tensor):
        shape = (config.layers, 2, batch, config.kv_heads, size, config.head_size)
        self.buffer, self.length = torch.zeros(shape, dtype=like.dtype, device=like.device), 0

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Appends k, v (B,H,T,hd) of one layer; returns all keys and values so far, (2,B,H,length+T,hd)."""
        end = self.length + k.shape[2]
        self.buffer[layer, 0, :, :, self.length:end] = k
        self.buffer[layer, 1, :, :, self.length:end] = v
        return self.buffer[layer, :, :, :, :end]

    def take(self, rows: torch.Tensor) -> None:
        """Goes on with these rows of the batch, in their order; a row may come more than once."""
        self.buffer = self.buffer[:, :, rows]


def rotary(positions: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (B,1,T,size) of the angles at positions (B,T), half-split."""
    exponent = torch.arange(0, rope.size, 2, device=positions.device, dtype=torch.float32) / rope.size
    theta = rope.theta
    if rope.kind == "dynamic":  # grows with each row's length; keys in a cache stay as they were turned
        length = positions.amax(-1)[:, None, None, None] + 1
        stretch = rope.factor * length / rope.original - (rope.factor - 1)
        theta = theta * stretch.clamp(min=1) ** (rope.size / (rope.size - 2))
    frequencies = 1 / theta ** exponent  # radians a token
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original * frequencies / (2 * math.pi)
        fast = ((turns - rope.low) / (rope.high - rope.low)).clamp(0, 1)
        frequencies = frequencies * (fast + (1 - fast) / rope.factor)
    angles = positions[:, None, :, None].float() * frequencies  # (B,1,T,size/2)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x, rest = x[..., :cos.shape[-1]], x[..., cos.shape[-1]:]
    a, b = x.chunk(2, -1)
    x = x * cos.to(x.dtype) + torch.cat([-b, a], -1) * sin.to(x.dtype)
    return torch.cat([x, rest], -1) if rest.shape[-1] else x


class ShiftedRMSNorm(nn.RMSNorm):
    """Gemma's: the weight is stored less one, and applied in float32."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(x.dtype)


NORMS = {"rms": nn.RMSNorm, "shifted rms": ShiftedRMSNorm, "layer": nn.LayerNorm}


def table(rows: int, width: int) -> nn.Embedding:
    # nn.Embedding(rows, width) draws numbers, for which torch imports 800 modules even on the meta device
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Attention(nn.Module):
    def __init__(self, config: LLMConfig):
        super().__init__()
        width, kv_width = config.heads * config.head_size, config.kv_heads * config.head_size
        self.head_size, self.groups = config.head_size, config.heads // config.kv_heads
        self.query_scale = config.query_scale
        self.q = nn.Linear(config.width, width, config.qkv_bias)
        self.k, self.v = (nn.Linear(config.width, kv_width, config.qkv_bias) for _ in "kv")
        self.q_norm, self.k_norm = (NORMS[config.norm](config.head_size, config.eps) if config.qk_norm
                                    else nn.Identity() for _ in "qk")
        self.out = nn.Linear(width, config.width, config.out_bias)

    def forward(self, x, turn, mask, cache, layer):  # x (B,T,D)
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)  # (B,H,T,hd)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        if self.groups > 1:  # every key head serves `groups` query heads
            k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        q = q * self.query_scale if self.query_scale != 1 else q
        y = attend(q, k, v, mask, causal=mask is None and q.shape[2] > 1)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: LLMConfig):
        super().__init__()
        self.order, self.activation = config.order, ACTIVATIONS[config.activation]
        self.norm1, self.norm2 = (NORMS[config.norm](config.width, config.eps) for _ in "12")
        if self.order == "around":
            self.after1, self.after2 = (NORMS[config.norm](config.width, config.eps) for _ in "12")
        self.attention = Attention(config)
        self.gate = nn.Linear(config.width, config.mlp, config.mlp_bias) if config.gated else None
        self.up = nn.Linear(config.width, config.mlp, config.mlp_bias)
        self.down = nn.Linear(config.mlp, config.width, config.mlp_bias)

    def mlp(self, x):
        x = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        return self.down(x)

    def forward(self, x, *context):  # x (B,T,D); context: turn, mask, cache, layer
        match self.order:
            case "before":
                x = x + self.attention(self.norm1(x), *context)
                return x + self.mlp(self.norm2(x))
            case "after":
                x = self.norm1(x + self.attention(x, *context))
                return self.norm2(x + self.mlp(x))
            case "around":
                x = x + self.after1(self.attention(self.norm1(x), *context))
                return x + self.after2(self.mlp(self.norm2(x)))
            case "parallel":
                return x + self.attention(self.norm1(x), *context) + self.mlp(self.norm2(x))


class LLM(nn.Module):
    """A decoder-only transformer of any family in FAMILIES. `embedding` and any `head` hold the vocabulary."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.config = config
        self.embedding = table(config.vocabulary, config.hidden)
        learned, resized = config.position_offset is not None, config.width != config.hidden
        self.positions = table(config.max_positions + config.position_offset, config.width) if learned else None
        self.project_in = nn.Linear(config.hidden, config.width, bias=False) if resized else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = NORMS[config.norm](config.width, config.eps) if config.final_norm else nn.Identity()
        self.project_out = nn.Linear(config.width, config.hidden, bias=False) if resized else nn.Identity()
        self.head = None if config.tied else nn.Linear(config.hidden, config.vocabulary, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Ids (B,T) to embeddings (B,T,D)."""
        x, scale = self.embedding(tokens), self.config.embedding_scale
        return x if scale == 1 else x * torch.tensor(scale, dtype=x.dtype).item()  # rounded as the weights are

    def hidden(self, embeddings: torch.Tensor, positions: torch.Tensor | None = None,
               mask: torch.Tensor | None = None, cache: KVCache | None = None) -> torch.Tensor:
        """Embeddings (B,T,D) to the states (B,T,D) that the head reads.

        positions (B,T): 0, 1, … after what the cache holds, unless given. mask (B,1,T,S): which of the S keys
        (cached ones included) each token sees; causal unless given, and within a layer's window in any case.
        Raises InputError past `max_positions`.
        """
        config, T, start = self.config, embeddings.shape[1], cache.length if cache else 0
        end, device = start + T, embeddings.device
        if end > config.max_positions:
            raise InputError(f"{end} tokens are more than the language model's {config.max_positions} positions")
        if positions is None:
            positions = torch.arange(start, end, device=device)[None]
        query, key = torch.arange(start, end, device=device)[:, None], torch.arange(end, device=device)
        near = {window: window and window < end for window in config.windows}  # which windows hide anything
        if mask is None and (start and T > 1 or any(near.values())):
            mask = key <= query  # (T,S)
        masks = {window: mask & (key > query - window) if cut else mask for window, cut in near.items()}
        turns = {rope: rope and rotary(positions, rope) for rope in config.ropes}
        x = self.project_in(embeddings.to(self.dtype))
        if self.positions is not None:
            x = x + self.positions(positions + config.position_offset)
        for layer, block in enumerate(self.blocks):
            x = block(x, turns[config.ropes[layer]], masks[config.windows[layer]], cache, layer)
        if cache is not None:
            cache.length += T
        return self.project_out(self.norm(x))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """States (…,D) to scores (…,V) of the next token."""
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)

    def forward(self, tokens: torch.Tensor | None = None, *, embeddings: torch.Tensor | None = None) -> torch.Tensor:
        """Ids (B,T), or embeddings (B,T,D), to logits (B,T,V)."""
        return self.logits(self.hidden(self.embed(tokens) if embeddings is None else embeddings))

    @torch.inference_mode()
    def generate(self, tokens=None, *, embeddings=None, max_tokens: int = 50, temperature: float = 0.0,
                 top_k: int = 0, top_p: float = 1.0, beams: int = 1, end_tokens: tuple[int, ...] | None = None,
                 generator: torch.Generator | None = None) -> list[list[int]]:
        """Continues each row until one of `end_tokens` (the checkpoint's own, unless given) or `max_tokens`.

        Takes `tokens` or `embeddings`: (B,T) or (B,T,D), or a list of B rows (T,) or (T,D) of any lengths. Rows are
        padded on the left and get the text each would get alone. temperature 0 is greedy; top_k (0: off) and top_p
        (Holtzman et al., 2020, arXiv:1904.09751) narrow the choice. beams above 1 is beam search, and looks at none
        of these. Returns B lists of new ids, without the end token.
        """
        if embeddings is None:
            embeddings = [self.embed(torch.as_tensor(row, device=self.embedding.weight.device)) for row in tokens]
        end_tokens = self.config.end_tokens if end_tokens is None else end_tokens
        lengths = [len(row) for row in embeddings]
        B, T = len(lengths), max(lengths)
        if not min(lengths):
            raise InputError("there is nothing to continue: a row is empty")
        x = torch.stack([F.pad(row, (0, 0, T - len(row), 0)) for row in embeddings]).to(self.dtype)
        pad = T - torch.tensor(lengths, device=x.device)[:, None]  # (B,1)
        key = torch.arange(T + max_tokens, device=x.device)
        cache = KVCache(self.config, B, T + max_tokens, x)

        def read(x: torch.Tensor) -> torch.Tensor:
            """Embeddings (R,T,D) that go on the rows of the cache to the scores (R,V) of what comes next."""
            seen = key[:cache.length + x.shape[1]]
            query, mask = seen[cache.length:], None
            if min(lengths) < T:  # a padding token sees itself alone: softmax over nothing would be NaN
                mask = (seen <= query[:, None]) & (seen >= pad[:, :, None]) | (seen == query[:, None])  # (R,T,S)
                mask = mask[:, None]
            hidden = self.hidden(x, (query - pad).clamp(min=0), mask, cache)
            return self.logits(hidden[:, -1]).float()

        def go_on(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            """Reads one more token (R,) after each of these rows (R,) of the cache."""
            nonlocal pad
            pad = pad[rows]
            cache.take(rows)
            return read(self.embed(tokens)[:, None])

        if beams > 1:
            return beam_search(read(x), go_on, beams, max_tokens, {*end_tokens})
        ids, done = [], torch.zeros(B, dtype=torch.bool, device=x.device)
        ends = torch.tensor(end_tokens, dtype=torch.long, device=x.device)
        while len(ids) < max_tokens:
            chosen = sample(read(x), temperature, top_k, top_p, generator)  # (B,)
            ids.append(chosen)
            done |= torch.isin(chosen, ends)
            if done.all():
                break
            x = self.embed(chosen)[:, None]
        rows = torch.stack(ids, 1).tolist() if ids else [[]] * B
        return [row[:next((i for i, token in enumerate(row) if token in end_tokens), len(row))] for row in rows]

    @classmethod
    def from_pretrained(cls, name: str, dtype: torch.dtype = torch.float32) -> "LLM":
        """Loads a checkpoint (a folder or a hub name) in eval mode. Raises InputError."""
        checkpoint = Checkpoint(name)
        family, config = checkpoint.family(FAMILIES)
        # generation_config.json, where there is one, knows best what ends a text
        end = checkpoint.json("generation_config.json").get("eos_token_id", config.end_tokens)
        config.end_tokens = tuple(end) if isinstance(end, (list, tuple)) else () if end is None else (end,)
        with torch.device("meta"):
            llm = cls(config)
        names = family.names(config) if callable(family.names) else family.names
        unused = family.unused + rf"|{re.escape(names['head'])}\.weight" * config.tied
        load_weights(llm, checkpoint, family._replace(names=names, unused=unused), dtype)
        return llm.eval()


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
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def beam_search(scores: torch.Tensor, go_on, beams: int, max_tokens: int, ends: set[int]) -> list[list[int]]:
    """Keeps the `beams` likeliest beginnings of each of B rows, and returns the finished text whose tokens, its end
    included, are the likeliest on average.

    scores (B,V) are of the first token; go_on(rows, tokens) continues some of the rows that it (or the caller) read
    last by a token each, and gives the scores (R,V) of the next.
    """
    B, V = scores.shape
    barred = torch.tensor([token for token in ends if token < V], dtype=torch.long, device=scores.device)
    texts, finished = [[[]] for _ in range(B)], [[] for _ in range(B)]  # finished: (score, text), the best first
    done, total = [False] * B, 0.0
    for length in range(1, max_tokens + 1):
        scores = scores.log_softmax(-1).unflatten(0, (B, -1)) + total  # (B,beams,V); at first (B,1,V)
        best, places = scores.flatten(1).topk(beams)
        for b in (b for b in range(B) if not done[b]):
            for score, place in zip(best[b].tolist(), places[b].tolist()):
                beam, token = divmod(place, V)
                if token in ends or length == max_tokens:
                    finished[b].append((score / length, texts[b][beam] + [token] * (token not in ends)))
            finished[b] = sorted(finished[b], key=lambda entry: -entry[0])[:beams]
        best, places = scores.index_fill(-1, barred, -torch.inf).flatten(1).topk(beams)  # (B,beams)
        texts = [[row[place // V] + [place % V] for place in some] for row, some in zip(texts, places.tolist())]
        for b, likeliest in enumerate(best[:, 0].tolist()):  # it is unlikely to become likelier
            done[b] |= len(finished[b]) == beams and likeliest / length <= finished[b][-1][0]
        if all(done) or length == max_tokens:
            break
        first = torch.arange(B, device=places.device)[:, None] * scores.shape[1]
        total, scores = best[..., None], go_on((first + places // V).flatten(), places.flatten() % V)
    return [row[0][1] if row else [] for row in finished]


# ---------------------------------------------------------------------------------------------------------
# Families: what differs from one to the next, as data

def gpt2_config(c: dict) -> LLMConfig:
    hidden, heads = c["n_embd"], c["n_head"]
    if c.get("scale_attn_by_inverse_layer_idx") or not c.get("scale_attn_weights", True):
        raise ValueError("only scores scaled by the head's size are supported")
    return LLMConfig(vocabulary=c["vocab_size"], hidden=hidden, layers=c["n_layer"], heads=heads, kv_heads=heads,
                     head_size=hidden // heads, mlp=c.get("n_inner") or 4 * hidden, max_positions=c["n_positions"],
                     activation=c.get("activation_function", "gelu_new"), eps=c.get("layer_norm_epsilon", 1e-5),
                     norm="layer", position_offset=0, gated=False, qkv_bias=True, out_bias=True, mlp_bias=True,
                     tied=c.get("tie_word_embeddings", True), start_token=c.get("bos_token_id"),
                     end_tokens=c.get("eos_token_id"))


def opt_config(c: dict) -> LLMConfig:
    width, heads, bias = c["hidden_size"], c["num_attention_heads"], c.get("enable_bias", True)
    if not c.get("layer_norm_elementwise_affine", True):
        raise ValueError("norms without a weight are not supported")
    before = c.get("do_layer_norm_before", True)
    return LLMConfig(vocabulary=c.get("vocab_size", 50272), hidden=c.get("word_embed_proj_dim") or width, width=width,
                     layers=c["num_hidden_layers"], heads=heads, kv_heads=heads, head_size=width // heads,
                     mlp=c["ffn_dim"], max_positions=c.get("max_position_embeddings", 2048),
                     activation=c.get("activation_function", "relu"), eps=1e-5, norm="layer",
                     order="before" if before else "after",
                     final_norm=before and not c.get("_remove_final_layer_norm", False), position_offset=2,
                     gated=False, qkv_bias=bias, out_bias=bias, mlp_bias=bias,
                     tied=c.get("tie_word_embeddings", True), start_token=c.get("bos_token_id", 2),
                     end_tokens=c.get("eos_token_id", 2))


def read_rope(c: dict, size: int, **defaults) -> Rope:
    """Rotary position embedding of heads of `size`: `rope_parameters`, or the older `rope_scaling` and its kin."""
    given = {key: c[key] for key in ("rope_theta", "partial_rotary_factor") if c.get(key) is not None}
    r = dict(rope_theta=10000.0, partial_rotary_factor=1.0) | defaults | given
    r |= c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = r.get("rope_type") or r.get("type", "default")
    if kind not in ("default", "linear", "dynamic", "llama3"):
        raise ValueError(f"rotary scaling {kind!r} is not supported")
    original = c.get("original_max_position_embeddings") or r.get("original_max_position_embeddings")
    original = original if original and kind == "llama3" else c.get("max_position_embeddings", 2048)
    return Rope(int(size * r["partial_rotary_factor"]), float(r["rope_theta"]), kind,
                1.0 if kind == "default" else float(r["factor"]), original,
                float(r.get("low_freq_factor", 1.0)), float(r.get("high_freq_factor", 4.0)))


def llama_config(c: dict, **changes) -> LLMConfig:
    heads, bias = c["num_attention_heads"], c.get("attention_bias", False)
    head_size = c.get("head_dim") or c["hidden_size"] // heads
    rope = read_rope(c, head_size)
    longer = rope.factor if rope.kind in ("linear", "dynamic") else 1  # of the positions that these files give
    return LLMConfig(**dict(
        vocabulary=c["vocab_size"], hidden=c["hidden_size"], layers=c["num_hidden_layers"], heads=heads,
        kv_heads=c.get("num_key_value_heads") or heads, head_size=head_size, mlp=c["intermediate_size"],
        max_positions=int(c.get("max_position_embeddings", 2048) * longer), activation=c.get("hidden_act", "silu"),
        eps=c.get("rms_norm_eps", 1e-6), ropes=(rope,) * c["num_hidden_layers"], qkv_bias=bias, out_bias=bias,
        mlp_bias=c.get("mlp_bias", False), tied=c.get("tie_word_embeddings", False), start_token=c.get("bos_token_id"),
        end_tokens=c.get("eos_token_id")) | changes)


def by_layer(c: dict, slides, sliding, full=None) -> tuple:
    """`sliding` for each layer that sees a window only, else `full`: as `layer_types` says, or slides(layer)."""
    kinds = {"sliding_attention": sliding, "full_attention": full}
    types = c.get("layer_types") or [list(kinds)[not slides(i)] for i in range(c["num_hidden_layers"])]
    return tuple(kinds[kind] for kind in types)


def windowed_config(c: dict) -> LLMConfig:
    """Mistral and Phi-3: one window for all layers."""
    return llama_config(c, windows=(c.get("sliding_window"),) * c["num_hidden_layers"])


def qwen_config(c: dict, **changes) -> LLMConfig:
    c = dict(num_key_value_heads=32, max_position_embeddings=32768, sliding_window=4096) | c
    window = c["sliding_window"] if c.get("use_sliding_window") else None
    return llama_config(c, windows=by_layer(c, lambda i: i >= c.get("max_window_layers", 28), window), **changes)


def smollm3_config(c: dict) -> LLMConfig:
    c = dict(num_key_value_heads=4, max_position_embeddings=32768, rope_theta=2e6, tie_word_embeddings=True) | c
    layers, interval = c["num_hidden_layers"], c.get("no_rope_layer_interval", 4)
    turned = c.get("no_rope_layers") or [(i + 1) % interval for i in range(layers)]  # 0: no rotary embedding
    if len(turned) < layers:
        raise ValueError(f"no_rope_layers are not {layers}")
    window = c.get("sliding_window") if c.get("use_sliding_window") else None
    config = llama_config(c, windows=by_layer(c, lambda i: not turned[i], window))
    config.ropes = tuple(rope if turn else None for rope, turn in zip(config.ropes, turned))
    return config


def neox_config(c: dict) -> LLMConfig:
    hidden, heads, bias = c["hidden_size"], c["num_attention_heads"], c.get("attention_bias", True)
    rope = read_rope(c, hidden // heads, rope_theta=c.get("rotary_emb_base", 10000.0),
                     partial_rotary_factor=c.get("rotary_pct", 0.25))
    return llama_config(
        c, norm="layer", eps=c.get("layer_norm_eps", 1e-5), activation=c.get("hidden_act", "gelu"), gated=False,
        order="parallel" if c.get("use_parallel_residual", True) else "before",
        ropes=(rope,) * c["num_hidden_layers"], qkv_bias=bias, out_bias=bias, mlp_bias=True)


def gemma3_config(c: dict) -> LLMConfig:
    c = dict(vocab_size=262208, num_attention_heads=8, num_key_value_heads=4, head_dim=256, bos_token_id=2,
             eos_token_id=1, max_position_embeddings=131072, sliding_window=4096, tie_word_embeddings=True) | c
    if c.get("final_logit_softcapping") or c.get("attn_logit_softcapping") or c.get("use_bidirectional_attention"):
        raise ValueError("soft-capped scores and bidirectional attention are not supported")
    ropes = c.pop("rope_parameters", None) or {}
    wide = read_rope(c | {"rope_parameters": ropes.get("full_attention")}, c["head_dim"], rope_theta=1e6)
    local = {"rope_parameters": ropes.get("sliding_attention"), "rope_scaling": None,
             "rope_theta": c.get("rope_local_base_freq", 1e4)}
    local = read_rope(c | local, c["head_dim"])

    def slides(layer: int) -> bool:
        return (layer + 1) % c.get("sliding_window_pattern", 6) > 0

    return llama_config(
        c, norm="shifted rms", order="around", qk_norm=True, embedding_scale=c["hidden_size"] ** 0.5,
        query_scale=(c["head_dim"] / c.get("query_pre_attn_scalar", 256)) ** 0.5,
        activation=c.get("hidden_activation", "gelu_pytorch_tanh"), max_positions=c["max_position_embeddings"],
        windows=by_layer(c, slides, c["sliding_window"]), ropes=by_layer(c, slides, local, wide))


def text_part(c: dict, kind: str) -> dict:
    """The language model's part of a multimodal model's config.json."""
    found = c["text_config"].get("model_type", kind)
    if found != kind:
        raise ValueError(f"its language model is {found!r}, not {kind!r}")
    return c["text_config"]


def third(i: int):
    """Reads the i-th of q, k, v from GPT-2's fused weight (in, 3 out), stored input first, or its bias (3 out)."""
    return lambda tensor: tensor.movedim(-1, 0).chunk(3)[i]


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """GPT-2 stores its weights input first; a bias stays as it is."""
    return tensor.movedim(-1, 0)


GPT2_NAMES = {
    "embedding": "wte",
    "positions": "wpe",
    "blocks.{}.norm1": "h.{}.ln_1",
    **{f"blocks.{{}}.attention.{part}": (third(i), "h.{}.attn.c_attn") for i, part in enumerate("qkv")},
    "blocks.{}.attention.out": (turned, "h.{}.attn.c_proj"),
    "blocks.{}.norm2": "h.{}.ln_2",
    "blocks.{}.up": (turned, "h.{}.mlp.c_fc"),
    "blocks.{}.down": (turned, "h.{}.mlp.c_proj"),
    "norm": "ln_f",
    "head": "lm_head",
}
OPT_NAMES = {
    "embedding": "embed_tokens",
    "positions": "embed_positions",
    "project_in": "project_in",
    "blocks.{}.norm1": "layers.{}.self_attn_layer_norm",
    **{f"blocks.{{}}.attention.{part}": f"layers.{{}}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")},
    "blocks.{}.norm2": "layers.{}.final_layer_norm",
    "blocks.{}.up": "layers.{}.fc1",
    "blocks.{}.down": "layers.{}.fc2",
    "norm": "final_layer_norm",
    "project_out": "project_out",
    "head": "lm_head",
}
LLAMA_NAMES = {
    "embedding": "embed_tokens",
    "blocks.{}.norm1": "layers.{}.input_layernorm",
    **{f"blocks.{{}}.attention.{part}": f"layers.{{}}.self_attn.{part}_proj" for part in "qkv"},
    **{f"blocks.{{}}.attention.{part}_norm": f"layers.{{}}.self_attn.{part}_norm" for part in "qk"},
    "blocks.{}.attention.out": "layers.{}.self_attn.o_proj",
    "blocks.{}.norm2": "layers.{}.post_attention_layernorm",
    **{f"blocks.{{}}.{part}": f"layers.{{}}.mlp.{part}_proj" for part in ("gate", "up", "down")},
    "norm": "norm",
    "head": "lm_head",
}
GEMMA3_NAMES = LLAMA_NAMES | {
    "blocks.{}.after1": "layers.{}.post_attention_layernorm",
    "blocks.{}.norm2": "layers.{}.pre_feedforward_layernorm",
    "blocks.{}.after2": "layers.{}.post_feedforward_layernorm",
}


def phi3_names(config: LLMConfig) -> dict:
    """Phi-3 fuses q, k and v, of which the latter may have fewer heads, and the gate with what it opens."""
    def part(i: int, *sizes: int):
        return lambda tensor: tensor.split(sizes)[i]

    kv = config.kv_heads * config.head_size
    qkv = (config.heads * config.head_size, kv, kv)
    return LLAMA_NAMES | {
        **{f"blocks.{{}}.attention.{name}": (part(i, *qkv), "layers.{}.self_attn.qkv_proj")
           for i, name in enumerate("qkv")},
        "blocks.{}.gate": (part(0, config.mlp, config.mlp), "layers.{}.mlp.gate_up_proj"),
        "blocks.{}.up": (part(1, config.mlp, config.mlp), "layers.{}.mlp.gate_up_proj"),
    }


def neox_names(config: LLMConfig) -> dict:
    """GPT-NeoX fuses q, k and v of the first head, of the second, …"""
    def part(i: int):
        return lambda tensor: tensor.unflatten(0, (config.heads, 3, -1))[:, i].flatten(0, 1)

    return {
        "embedding": "embed_in",
        "blocks.{}.norm1": "layers.{}.input_layernorm",
        **{f"blocks.{{}}.attention.{name}": (part(i), "layers.{}.attention.query_key_value")
           for i, name in enumerate("qkv")},
        "blocks.{}.attention.out": "layers.{}.attention.dense",
        "blocks.{}.norm2": "layers.{}.post_attention_layernorm",
        "blocks.{}.up": "layers.{}.mlp.dense_h_to_4h",
        "blocks.{}.down": "layers.{}.mlp.dense_4h_to_h",
        "norm": "final_layer_norm",
        "head": "embed_out",
    }


INV_FREQ = r".*\.rotary_emb\.inv_freq"  # old files carry these buffers, and causal masks
FAMILIES = {  # config.json's model_type -> family
    "gpt2": Family(gpt2_config, GPT2_NAMES, r"h\.\d+\.attn\.(masked_)?bias"),
    "opt": Family(opt_config, OPT_NAMES, "(?!)"),
    "blip-2": Family(lambda c: opt_config(text_part(c, "opt")), OPT_NAMES,
                     r"(vision_model|qformer|language_projection)\..*|query_tokens|language_model\.lm_head\.weight"),
    "llama": Family(llama_config, LLAMA_NAMES, INV_FREQ),
    "smollm3": Family(smollm3_config, LLAMA_NAMES, INV_FREQ),
    "mistral": Family(lambda c: windowed_config(dict(num_key_value_heads=8, sliding_window=4096) | c),
                      LLAMA_NAMES, INV_FREQ),
    "qwen2": Family(lambda c: qwen_config(c, qkv_bias=True), LLAMA_NAMES, INV_FREQ),
    "qwen3": Family(lambda c: qwen_config(dict(head_dim=128) | c, qk_norm=True), LLAMA_NAMES, INV_FREQ),
    "phi3": Family(lambda c: windowed_config(dict(rms_norm_eps=1e-5) | c), phi3_names, INV_FREQ),
    "gpt_neox": Family(neox_config, neox_names, INV_FREQ + r"|layers\.\d+\.attention\.(masked_)?bias"),
    "gemma3_text": Family(gemma3_config, GEMMA3_NAMES, INV_FREQ),
    "gemma3": Family(lambda c: gemma3_config(text_part(c, "gemma3_text")), GEMMA3_NAMES,
                     r"(model\.)?(vision_tower|multi_modal_projector)\..*|language_model\.lm_head\.weight"),
}


# ---------------------------------------------------------------------------------------------------------
# Tokenizer

GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# The same with each digit alone: a run of white space before a digit then stays whole, as before the text's end.
# The reference takes these digits from a newer Unicode than its regular expressions do.
DIGIT = r"\p{N}\x{11de0}-\x{11de9}\x{16ff4}-\x{16ff6}"
DIGITS_SPLIT = rf"""[{DIGIT}]|'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+| ?[^\s\p{{L}}{DIGIT}]+|\s+(?![^\s{DIGIT}])|\s+"""
BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # a byte in the files of SentencePiece's kind
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200b)))
# Characters that NFC composes or reorders, but of a newer Unicode than the reference's NFC: it leaves them as they stand
NEWER_CODES = """5c8-5c9 7fd 897-89f 8ca-8d3 9fe b53-b54 c3c cf3 d3b-d3c eba ece 1715 1abf-1af0 1df6-1dfa a82c 105d2-105da
    10d24-10d27 10d69-10d6d 10eab-10eac 10ecb-10eff 10f46-10f50 10f82-10f85 11070 11241 1133b 113b8-113e2 1145e
    11839-1183a 11930 1193d-1193e 11943 119e0 11a34 11a47 11a99 11b60-11b67 11d42 11d44-11d45 11d97 11df0 11f00-11f03
    11f34-11f5a 13440-13455 1611e-1612f 16d63-16d68 16ff0-16ff1 1d127-1d128 1d250-1d281 1e08f 1e130-1e136 1e2ae
    1e2ec-1e2ef 1e4ec-1e4ef 1e5ee-1e5ef 1e6e3-1e6f5"""
NEWER = re.compile("([%s])" % "".join(re.sub(r"\w+", lambda code: chr(int(code[0], 16)), NEWER_CODES).split()))


def nfc(text: str) -> str:
    """Unicode's normalisation form C, as far as the reference knows it."""
    return text if text.isascii() else "".join(unicodedata.normalize("NFC", part) for part in NEWER.split(text))


def as_pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def steps(part: dict | None, inner: str) -> list[dict]:
    """The steps of a part of tokenizer.json: none, the one, or those of a `Sequence`."""
    return [] if part is None else part[inner] if part["type"] == "Sequence" else [part]


class ByteLevel:
    """Byte-level BPE (Radford et al., 2019), by tiktoken: a pattern cuts a text into words, whose bytes are merged."""

    # the characters that stand for the 256 bytes in the files: printable ones for themselves, the rest from U+0100 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(b): b for b in printable}
    alphabet |= {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*printable}))}

    def __init__(self, model: dict, added: dict, split: str, prefix_space: bool = False):
        vocabulary, self.prefix_space = model["vocab"], prefix_space
        # tiktoken wants each token's rank to be its turn to be merged; the file's own ids may follow another order.
        # It merges any two tokens that make a third, the reference only pairs that are listed: the same where the
        # list was made by training or has all pairs, since no other pair that makes a token then comes about.
        ranks = {bytes([b]): i for i, b in enumerate(self.alphabet.values())}
        self.ids = [vocabulary[c] for c in self.alphabet]  # our rank -> the file's id
        for a, b in map(as_pair, model["merges"]):
            if ranks.setdefault(self.spell(a + b), len(ranks)) == len(self.ids):
                self.ids.append(vocabulary[a + b])
        if model.get("ignore_merges"):  # a word in the vocabulary is its token, even where no merge leads to it
            for token in (token for token in vocabulary if token not in added and self.spell(token) not in ranks):
                word = self.spell(token)
                if any(word[:i] in ranks and word[i:] in ranks for i in range(1, len(word))):
                    raise ValueError(f"{token!r} is in the vocabulary, but not the merge that could make it")
                ranks[word] = len(ranks)
                self.ids.append(vocabulary[token])
        # what the pattern leaves between its matches are words too
        split = rf"{split}|(?:(?!{split})[\s\S])+"
        self.encoding = tiktoken.Encoding("checkpoint", pat_str=split, mergeable_ranks=ranks, special_tokens={})

    def spell(self, token: str) -> bytes:
        return bytes(map(self.alphabet.get, token)) if self.alphabet.keys() >= {*token} else token.encode()

    def encode(self, text: str, first: bool) -> list[int]:
        text = " " * (self.prefix_space and text[0] != " ") + text
        return list(map(self.ids.__getitem__, self.encoding.encode_ordinary(text)))


class Pieces:
    """BPE in SentencePiece's manner (Kudo and Richardson, 2018): over characters, "▁" for a space, and bytes for a
    character that the vocabulary lacks."""

    def __init__(self, model: dict, prefix: str | None = None, split: bool = False):
        self.vocabulary, self.prefix = model["vocab"], prefix
        merges = [as_pair(merge) for merge in model["merges"]]
        self.ranks = {(self.vocabulary[a], self.vocabulary[b]): rank for rank, (a, b) in enumerate(merges)}
        self.merged = [self.vocabulary[a + b] for a, b in merges]
        self.unknown, self.fuse = self.vocabulary.get(model.get("unk_token")), model.get("fuse_unk")
        fallback, self.ignore_merges = model.get("byte_fallback"), model.get("ignore_merges")
        self.bytes = [self.vocabulary.get(f"<0x{b:02X}>") if fallback else None for b in range(256)]
        # where no merge reaches over the start of a run of "▁", what lies between two such starts is merged by itself
        across = any("▁" in (a + b).lstrip("▁") for a, b in merges)
        apart = "▁" in self.vocabulary and not across and not self.ignore_merges
        self.words = re.compile("▁[^▁]*|[^▁]+" if split else "▁*[^▁]+|▁+" if apart else r"[\s\S]+")
        self.word = functools.lru_cache(1 << 16)(self.merge)

    def spell(self, token: str) -> bytes:
        byte = BYTE.fullmatch(token)
        return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()

    def encode(self, text: str, first: bool) -> list[int]:
        if self.prefix:
            text = text.replace(" ", "▁")
            text = "▁" * (text[0] != "▁" and (self.prefix == "always" or first and self.prefix == "first")) + text
        return [id for word in self.words.findall(text) for id in self.word(word)]

    def merge(self, word: str) -> tuple[int, ...]:
        """Ids of a word: of all pairs, the one listed first is merged, the leftmost of its kind, until none is left."""
        if self.ignore_merges and word in self.vocabulary:
            return self.vocabulary[word],
        ids = []
        for c in word:
            spelled = [self.vocabulary[c]] if c in self.vocabulary else [self.bytes[b] for b in c.encode()]
            if None in spelled:
                spelled = [] if self.unknown is None or self.fuse and ids[-1:] == [self.unknown] else [self.unknown]
            ids += spelled
        left, right = list(range(-1, len(ids))), [*range(1, len(ids) + 1), -1]  # neighbours, in a ring that
        ids.append(None)  # ends in nothing, which merges with nothing
        heap = [(self.ranks[pair], i) for i, pair in enumerate(itertools.pairwise(ids)) if pair in self.ranks]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = right[i]
            if self.ranks.get((ids[i], ids[j])) == rank:  # neither was merged with another since
                ids[i], ids[j], right[i] = self.merged[rank], None, right[j]
                left[right[i]] = i
                for k in (left[i], i):
                    if (rank := self.ranks.get((ids[k], ids[right[k]]))) is not None:
                        heapq.heappush(heap, (rank, k))
        return tuple(id for id in ids if id is not None)


class Tokenizer:
    """Text to ids and back, exactly as a checkpoint's tokenizer.json says.

    `prefix` are the ids that the file puts before a text (a start token, if any; `encode` leaves them out), `special`
    the ids of the special tokens by their text, `bytes` the bytes each id stands for.
    """

    def __init__(self, file: dict):
        model, self.prefix = file["model"], []
        if model.get("type", "BPE") != "BPE":
            raise ValueError(f"a {model['type']} model is not supported")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise ValueError(f"{option} is not supported")
        self.normalisers = []
        for step in steps(file.get("normalizer"), "normalizers"):
            match step:
                case {"type": "NFC"}:
                    self.normalisers.append(nfc)
                case {"type": "Prepend", "prepend": prefix}:
                    self.normalisers.append(prefix.__add__)
                case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                    self.normalisers.append(lambda text, old=old, new=new: text.replace(old, new))
                case _:
                    raise ValueError(f"the normaliser {step} is not supported")
        added = {token["content"]: token for token in file.get("added_tokens", []) if token["content"]}
        match pre := steps(file.get("pre_tokenizer"), "pretokenizers"):
            case [{"type": "ByteLevel"} as last] if last.get("use_regex", True):
                self.model = ByteLevel(model, added, GPT2_SPLIT, last.get("add_prefix_space"))
            case [{"type": "Digits", "individual_digits": True},
                  {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
                self.model = ByteLevel(model, added, DIGITS_SPLIT)
            case [{"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
                  {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}]:
                self.model = ByteLevel(model, added, split)
            case [{"type": "Metaspace", "replacement": "▁"} as last]:
                self.model = Pieces(model, last.get("prepend_scheme", "always"), last.get("split", True))
            case [{"type": "Split", "pattern": {"String": " "}}] | [] if " " not in self.normalise(" "):
                self.model = Pieces(model)
            case _:
                raise ValueError(f"the pre-tokenizer {pre} is not supported")
        decoder = steps(file.get("decoder"), "decoders")
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        self.strip = " " * (strip in decoder)
        known = [step["type"] for step in decoder] == ["ByteLevel"]
        if isinstance(self.model, Pieces):
            spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
            known = decoder == [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}] + [strip] * len(self.strip)
        if not known:
            raise ValueError(f"the decoder {decoder} is not supported")
        for step in steps(file.get("post_processor"), "processors"):
            if step["type"] == "TemplateProcessing":
                before = itertools.takewhile(lambda part: "SpecialToken" in part, step["single"])
                names = [part["SpecialToken"]["id"] for part in before]
                self.prefix += [id for name in names for id in step["special_tokens"][name]["ids"]]
            elif step["type"] != "ByteLevel":
                raise ValueError(f"the post-processor {step} is not supported")
        self.special = {content: token["id"] for content, token in added.items() if token["special"]}
        self.added = {}, {}  # the tokens that are looked for in the text as it comes, and in the normalised text
        for content, token in added.items():
            normalised = bool(token.get("normalized"))
            self.added[normalised][self.normalise(content) if normalised else content] = token
        self.patterns = [re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
                         for tokens in self.added]
        ids = model["vocab"] | {text: token["id"] for tokens in self.added for text, token in tokens.items()}
        self.bytes = {id: self.model.spell(token) for token, id in ids.items()}
        self.fallback = {id for token, id in ids.items() if isinstance(self.model, Pieces) and BYTE.fullmatch(token)}

    def normalise(self, text: str) -> str:
        for step in self.normalisers:
            text = step(text)
        return text

    def cut(self, text: str, normalised: bool, special: bool):
        """Yields the added tokens in a text and what is between them: (start, None, id) and (start, text, None)."""
        end = 0  # of what has been yielded
        for match in self.patterns[normalised].finditer(text):
            token, (start, stop) = self.added[normalised][match[0]], match.span()
            if token["special"] and not special or token.get("single_word") and (
                    regex.match(r"\w", text[stop:stop + 1]) or regex.match(r"\w", text[start - 1:start])):
                continue
            while token.get("lstrip") and start > end and text[start - 1] in WHITE_SPACE:
                start -= 1
            while token.get("rstrip") and stop < len(text) and text[stop] in WHITE_SPACE:
                stop += 1
            if end < start:
                yield end, text[end:start], None
            yield start, None, token["id"]
            end = stop
        if end < len(text):
            yield end, text[end:], None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Text to ids, without `prefix`. `special=False` reads the text of a special token as plain text: data, not
        control. Half a surrogate pair is read as U+FFFD."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = []
        for start, piece, id in self.cut(text, False, special):
            inner = self.cut(self.normalise(piece), True, special) if piece is not None else [(start, None, id)]
            for begin, piece, id in inner:
                ids += [id] if piece is None else self.model.encode(piece, first=start == begin == 0)
        return ids

    def decode(self, ids: list[int], special: bool = True) -> str:
        """Ids to text; bytes that are not UTF-8 become U+FFFD. `special=False` leaves special tokens out."""
        hidden = () if special else set(self.special.values())
        text, shown = "", (id for id in ids if id in self.bytes and id not in hidden)
        for fallback, run in itertools.groupby(shown, self.fallback.__contains__):
            raw = b"".join(map(self.bytes.get, run))
            try:
                text += raw.decode()
            except UnicodeDecodeError:  # a byte of its own for each, where the file spells characters with bytes
                text += "\ufffd" * len(raw) if fallback else raw.decode(errors="replace")
        return text.removeprefix(self.strip)

    @classmethod
    def from_pretrained(cls, name: str) -> "Tokenizer":
        """Reads the tokenizer of a checkpoint (a folder or a hub name). Raises InputError."""
        folder = find_checkpoint(name)
        path = folder / "tokenizer.json"
        try:
            config = {}
            for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
                config |= read_json(path) if path.is_file() else {}
            path = folder / "tokenizer.json"
            if path.is_file():
                file = read_json(path)
            else:
                path = folder / "vocab.json"
                vocabulary = read_json(path)
                path = folder / "merges.txt"
                lines = path.read_text(encoding="utf-8").split("\n")
                merges = [line for line in lines if line and not line.startswith("#version")]
                level = {"type": "ByteLevel", "add_prefix_space": config.get("add_prefix_space", False)}
                file = {"model": {"vocab": vocabulary, "merges": merges}, "pre_tokenizer": level, "decoder": level}
                config = {"eos_token": "<|endoftext|>"} | config  # GPT-2's, where no file says
            # added tokens that the file leaves out: the others give them in full, or name those with a role
            added = {token["content"]: token for token in file.get("added_tokens") or []}
            for id, token in config.get("added_tokens_decoder", {}).items():
                added.setdefault(token["content"], {**token, "id": int(id)})
            roles = {role: config.get(role) or "" for role in ("bos_token", "eos_token", "unk_token", "pad_token")}
            roles = {role: token["content"] if isinstance(token, dict) else token for role, token in roles.items()}
            vocabulary = file["model"]["vocab"]
            for content in (content for content in roles.values() if content in vocabulary):
                added.setdefault(content, {"content": content, "id": vocabulary[content], "special": True})
            tokenizer = cls({**file, "added_tokens": list(added.values())})
            if config.get("add_bos_token") and not tokenizer.prefix:
                tokenizer.prefix = [added[roles["bos_token"]]["id"]]
            return tokenizer
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            raise InputError(f"{path}: not a tokenizer that can be read ({type(error).__name__}: {error})") from None
