"""The language model: text ↔ ids (`Tokenizer`), ids → logits → text (`LLM`). One `LLM` reads every family."""
from dataclasses import dataclass

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import ACTIVATIONS, Checkpoint, Family, InputError, attend, find_checkpoint, load_weights, read_json


@dataclass
class LLMConfig:
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int  # fewer than heads: grouped-query attention
    head_size: int
    mlp: int  # hidden size of the feed-forward layers
    max_positions: int
    activation: str
    eps: float
    norm: str = "rms"  # or "layer"
    position: str = "rope"  # or "learned"
    rope_theta: float = 10000.0
    gated: bool = True  # SwiGLU's gate
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False  # the head is the embedding
    start_token: int | None = None
    end_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        if self.heads < 1 or self.heads % self.kv_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
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


def rotary(positions: torch.Tensor, config: LLMConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (B,1,T,hd) of rotary position embedding (Su et al., 2021, arXiv:2104.09864), half-split."""
    exponent = torch.arange(0, config.head_size, 2, device=positions.device, dtype=torch.float32) / config.head_size
    angles = positions[:, None, :, None].float() * config.rope_theta ** -exponent  # (B,1,T,hd/2)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], -1) * sin.to(x.dtype)


def make_norm(config: LLMConfig) -> nn.Module:
    return (nn.RMSNorm if config.norm == "rms" else nn.LayerNorm)(config.hidden, config.eps)


class Attention(nn.Module):
    def __init__(self, config: LLMConfig):
        super().__init__()
        width, kv_width = config.heads * config.head_size, config.kv_heads * config.head_size
        self.head_size, self.groups = config.head_size, config.heads // config.kv_heads
        self.q = nn.Linear(config.hidden, width, config.qkv_bias)
        self.k, self.v = (nn.Linear(config.hidden, kv_width, config.qkv_bias) for _ in "kv")
        self.out = nn.Linear(width, config.hidden, config.out_bias)

    def forward(self, x, turn, mask, cache, layer):  # x (B,T,D)
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        if self.groups > 1:  # every key head serves `groups` query heads
            k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        y = attend(q, k, v, mask, causal=mask is None and q.shape[2] > 1)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: LLMConfig):
        super().__init__()
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.attention = Attention(config)
        self.gate = nn.Linear(config.hidden, config.mlp, config.mlp_bias) if config.gated else None
        self.up = nn.Linear(config.hidden, config.mlp, config.mlp_bias)
        self.down = nn.Linear(config.mlp, config.hidden, config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x, turn, mask, cache, layer):  # x (B,T,D)
        x = x + self.attention(self.norm1(x), turn, mask, cache, layer)
        y = self.norm2(x)
        y = self.activation(self.up(y)) if self.gate is None else self.activation(self.gate(y)) * self.up(y)
        return x + self.down(y)


class LLM(nn.Module):
    """A decoder-only transformer of any family in FAMILIES. `embedding` and (unless tied) `head` hold the vocabulary."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.positions = nn.Embedding(config.max_positions, config.hidden) if config.position == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.head = None if config.tied else nn.Linear(config.hidden, config.vocabulary, bias=False)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Ids (B,T) to embeddings (B,T,D)."""
        return self.embedding(tokens)

    def hidden(self, embeddings: torch.Tensor, positions: torch.Tensor | None = None,
               mask: torch.Tensor | None = None, cache: KVCache | None = None) -> torch.Tensor:
        """Embeddings (B,T,D) to the states (B,T,D) that the head reads.

        positions (B,T): 0, 1, … after what the cache holds, unless given. mask (B,1,T,S): which of the S keys
        (cached ones included) each token sees; causal unless given. Raises InputError past `max_positions`.
        """
        start, T = cache.length if cache else 0, embeddings.shape[1]
        if positions is None:
            positions = torch.arange(start, start + T, device=embeddings.device)[None]
        if start + T > self.config.max_positions:
            raise InputError(f"{start + T} tokens are more than the language model's {self.config.max_positions} positions")
        if mask is None and start and T > 1:
            mask = torch.ones(T, start + T, dtype=torch.bool, device=embeddings.device).tril(start)
        x = embeddings.to(self.norm.weight.dtype)
        turn = rotary(positions, self.config) if self.positions is None else None
        if self.positions is not None:
            x = x + self.positions(positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, turn, mask, cache, layer)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """States (…,D) to scores (…,V) of the next token."""
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)

    def forward(self, tokens: torch.Tensor | None = None, *, embeddings: torch.Tensor | None = None) -> torch.Tensor:
        """Ids (B,T), or embeddings (B,T,D), to logits (B,T,V)."""
        return self.logits(self.hidden(self.embed(tokens) if embeddings is None else embeddings))

    @torch.inference_mode()
    def generate(self, tokens=None, *, embeddings=None, max_tokens: int = 50, temperature: float = 0.0,
                 top_k: int = 0, top_p: float = 1.0, end_tokens: tuple[int, ...] | None = None,
                 generator: torch.Generator | None = None) -> list[list[int]]:
        """Continues each row until one of `end_tokens` (the checkpoint's own, unless given) or `max_tokens`.

        Takes `tokens` or `embeddings`: (B,T) or (B,T,D), or a list of B rows (T,) or (T,D) of any lengths. Rows are
        padded on the left and get the text each would get alone. temperature 0 is greedy; top_k (0: off) and top_p
        (Holtzman et al., 2020, arXiv:1904.09751) narrow the choice. Returns B lists of new ids, without the end token.
        """
        if embeddings is None:
            embeddings = [self.embed(torch.as_tensor(row, device=self.embedding.weight.device)) for row in tokens]
        end_tokens = self.config.end_tokens if end_tokens is None else end_tokens
        lengths = [len(row) for row in embeddings]
        B, T = len(lengths), max(lengths)
        if not min(lengths):
            raise InputError("there is nothing to continue: a row is empty")
        x = torch.stack([F.pad(row, (0, 0, T - len(row), 0)) for row in embeddings]).to(self.norm.weight.dtype)
        pad = T - torch.tensor(lengths, device=x.device)[:, None]  # (B,1)
        key = torch.arange(T + max_tokens, device=x.device)
        mask = None
        if min(lengths) < T:  # a padding token sees itself alone: softmax over nothing would be NaN
            mask = (key <= key[:, None]) & ((key >= pad[:, :, None]) | (key == key[:, None]))  # (B,S,S)
        cache, ids = KVCache(self.config, B, T + max_tokens, x), []
        done = torch.zeros(B, dtype=torch.bool, device=x.device)
        ends = torch.tensor(end_tokens, dtype=torch.long, device=x.device)
        while len(ids) < max_tokens:
            start, end = cache.length, cache.length + x.shape[1]
            hidden = self.hidden(x, (key[start:end] - pad).clamp(min=0),
                                 None if mask is None else mask[:, None, start:end, :end], cache)
            chosen = sample(self.logits(hidden[:, -1]).float(), temperature, top_k, top_p, generator)  # (B,)
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
        load_weights(llm, checkpoint, family._replace(unused=family.unused + r"|lm_head\.weight" * config.tied), dtype)
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


# ---------------------------------------------------------------------------------------------------------
# Families: what differs from one to the next, as data

def gpt2_config(c: dict) -> LLMConfig:
    hidden, heads = c["n_embd"], c["n_head"]
    return LLMConfig(vocabulary=c["vocab_size"], hidden=hidden, layers=c["n_layer"], heads=heads, kv_heads=heads,
                     head_size=hidden // heads, mlp=c.get("n_inner") or 4 * hidden, max_positions=c["n_positions"],
                     activation=c.get("activation_function", "gelu_new"), eps=c.get("layer_norm_epsilon", 1e-5),
                     norm="layer", position="learned", gated=False, qkv_bias=True, out_bias=True, mlp_bias=True,
                     tied=c.get("tie_word_embeddings", True), start_token=c.get("bos_token_id"),
                     end_tokens=c.get("eos_token_id"))


def llama_config(c: dict) -> LLMConfig:
    heads, rope = c["num_attention_heads"], c.get("rope_parameters") or c.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"rotary scaling {rope} is not supported yet")
    bias = c.get("attention_bias", False)
    return LLMConfig(vocabulary=c["vocab_size"], hidden=c["hidden_size"], layers=c["num_hidden_layers"], heads=heads,
                     kv_heads=c.get("num_key_value_heads") or heads,
                     head_size=c.get("head_dim") or c["hidden_size"] // heads, mlp=c["intermediate_size"],
                     max_positions=c.get("max_position_embeddings", 2048), activation=c.get("hidden_act", "silu"),
                     eps=c.get("rms_norm_eps", 1e-6), rope_theta=rope.get("rope_theta") or c.get("rope_theta", 10000.0),
                     qkv_bias=bias, out_bias=bias, mlp_bias=c.get("mlp_bias", False),
                     tied=c.get("tie_word_embeddings", False), start_token=c.get("bos_token_id"),
                     end_tokens=c.get("eos_token_id"))


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
    "blocks.{}.attention.q": (third(0), "h.{}.attn.c_attn"),
    "blocks.{}.attention.k": (third(1), "h.{}.attn.c_attn"),
    "blocks.{}.attention.v": (third(2), "h.{}.attn.c_attn"),
    "blocks.{}.attention.out": (turned, "h.{}.attn.c_proj"),
    "blocks.{}.norm2": "h.{}.ln_2",
    "blocks.{}.up": (turned, "h.{}.mlp.c_fc"),
    "blocks.{}.down": (turned, "h.{}.mlp.c_proj"),
    "norm": "ln_f",
    "head": "lm_head",
}
LLAMA_NAMES = {
    "embedding": "embed_tokens",
    "blocks.{}.norm1": "layers.{}.input_layernorm",
    "blocks.{}.attention.q": "layers.{}.self_attn.q_proj",
    "blocks.{}.attention.k": "layers.{}.self_attn.k_proj",
    "blocks.{}.attention.v": "layers.{}.self_attn.v_proj",
    "blocks.{}.attention.out": "layers.{}.self_attn.o_proj",
    "blocks.{}.norm2": "layers.{}.post_attention_layernorm",
    "blocks.{}.gate": "layers.{}.mlp.gate_proj",
    "blocks.{}.up": "layers.{}.mlp.up_proj",
    "blocks.{}.down": "layers.{}.mlp.down_proj",
    "norm": "norm",
    "head": "lm_head",
}

FAMILIES = {  # config.json's model_type -> family
    "gpt2": Family(gpt2_config, GPT2_NAMES, r"h\.\d+\.attn\.(masked_)?bias"),  # causal masks of old files
    "llama": Family(llama_config, LLAMA_NAMES, r".*\.rotary_emb\.inv_freq"),
}


# ---------------------------------------------------------------------------------------------------------
# Tokenizer

GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# The same with each digit alone: a run of white space before a digit then stays whole, as before the text's end
DIGITS_SPLIT = r"""\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"""


def byte_alphabet() -> dict[str, int]:
    """The characters that stand for the 256 bytes in the files of byte-level BPE (Radford et al., 2019):
    printable ones for themselves, the rest, in order, from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """Byte-level BPE, run by tiktoken, as a checkpoint's tokenizer.json (or vocab.json and merges.txt) says."""

    def __init__(self, vocabulary: dict[str, int], merges: list, special: dict[str, int], split: str = GPT2_SPLIT):
        alphabet = byte_alphabet()

        def as_bytes(token: str) -> bytes:
            return bytes(alphabet[c] for c in token)

        # tiktoken wants each token's rank to be its turn to be merged; the file's own ids may follow another order
        ranks = {bytes([b]): i for i, b in enumerate(alphabet.values())}
        ids = [vocabulary.get(c, -1) for c in alphabet]
        for merge in merges:
            a, b = merge.split(" ") if isinstance(merge, str) else merge
            if ranks.setdefault(as_bytes(a + b), len(ranks)) == len(ids):
                ids.append(vocabulary[a + b])
        self.special = special
        self.encoding = tiktoken.Encoding("checkpoint", pat_str=split, mergeable_ranks=ranks, special_tokens={
            token: len(ranks) + i for i, token in enumerate(special)})
        self.ids = [*ids, *special.values()]  # our rank -> the file's id
        self.bytes = {id: token for token, rank in ranks.items() for id in [self.ids[rank]]}
        self.bytes |= {id: token.encode() for token, id in special.items()}

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Text to ids. `special=False` reads the text of a special token as plain text: data, not control."""
        try:
            ranks = self.encoding.encode(text, allowed_special="all" if special else set(), disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair
            return self.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), special)
        return [self.ids[rank] for rank in ranks]

    def decode(self, ids: list[int], special: bool = True) -> str:
        """Ids to text; bytes that are not UTF-8 become U+FFFD. `special=False` leaves special tokens out."""
        hidden = () if special else set(self.special.values())
        return b"".join(self.bytes.get(i, b"") for i in ids if i not in hidden).decode(errors="replace")

    @classmethod
    def from_pretrained(cls, name: str) -> "Tokenizer":
        """Reads the tokenizer of a checkpoint (a folder or a hub name). Raises InputError."""
        folder = find_checkpoint(name)
        path = folder / "tokenizer.json"
        try:
            if path.is_file():
                file = read_json(path)
                if file["model"].get("type", "BPE") != "BPE" or file.get("normalizer"):
                    raise ValueError("only byte-level BPE without a normaliser is supported yet")
                special = {token["content"]: token["id"] for token in file.get("added_tokens", [])}
                return cls(file["model"]["vocab"], file["model"]["merges"], special, split_pattern(file["pre_tokenizer"]))
            path = folder / "vocab.json"
            vocabulary = read_json(path)
            path = folder / "merges.txt"
            lines = path.read_text(encoding="utf-8").split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
            special = {t: vocabulary[t] for t in ("<|endoftext|>",) if t in vocabulary}
            return cls(vocabulary, merges, special)
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            raise InputError(f"{path}: not a tokenizer that can be read ({type(error).__name__}: {error})") from None


def split_pattern(pre_tokenizer: dict) -> str:
    """The regular expression that cuts a text into words, from tokenizer.json's `pre_tokenizer`."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    match [(step["type"], step) for step in steps]:
        case [("ByteLevel", last)] if last.get("use_regex", True):
            split = GPT2_SPLIT
        case [("Digits", digits), ("ByteLevel", last)] if digits["individual_digits"] and last.get("use_regex", True):
            split = DIGITS_SPLIT
        case [("Split", first), ("ByteLevel", last)] if not last.get("use_regex", True) and first["behavior"] == "Isolated":
            split = first["pattern"]["Regex"]
        case steps:
            raise ValueError(f"the pre-tokenizer {[kind for kind, _ in steps]} is not supported yet")
    if last.get("add_prefix_space"):
        raise ValueError("add_prefix_space is not supported yet")
    return split
