"""The adapters, from patch features to embeddings the LLM reads as words, and the `VLM` that joins ViT, adapter, LLM.

An adapter is told the encoder's width, the LLM's width and the patch grid, nothing else. It maps features
(P,N,Dv) of P pictures, as the ViT gives them, to (P,Q,D); `queries` is Q. The last grid² of the N are the patches.
"""
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data import (IMAGE, Checkpoint, Family, InputError, Pixels, attend, find_checkpoint, load_weights, read_json,
                  write_file)
from llm import LLM, Tokenizer
from lora import load_lora, lora_layers, save_lora
from vit import ViT


class Linear(nn.Module):
    """One projection, patch by patch, as LLaVA's first version (Liu et al., 2023, arXiv:2304.08485)."""

    def __init__(self, vision_width: int, width: int, grid: int):
        super().__init__()
        self.queries = grid ** 2
        self.projection = nn.Linear(vision_width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.projection(features[:, -self.queries:])


class MLP(nn.Module):
    """Two layers with GELU, patch by patch, as LLaVA-1.5 (Liu et al., 2023, arXiv:2310.03744)."""

    def __init__(self, vision_width: int, width: int, grid: int):
        super().__init__()
        self.queries = grid ** 2
        self.up, self.down = nn.Linear(vision_width, width), nn.Linear(width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(features[:, -self.queries:])))


class PostNormAttention(nn.Module):
    """BERT's attention: x (B,Q,W) reads `source` (B,N,W'), is added to what it read, and normed."""

    def __init__(self, width: int, source_width: int, heads: int, dropout: float, eps: float):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.q = nn.Linear(width, width)
        self.k, self.v = nn.Linear(source_width, width), nn.Linear(source_width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, x, source):
        q, k, v = (proj(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for proj, y in ((self.q, x), (self.k, source), (self.v, source)))
        return self.norm(x + self.dropout(self.out(attend(q, k, v).transpose(1, 2).flatten(2))))


class QFormerBlock(nn.Module):
    def __init__(self, width: int, vision_width: int | None, heads: int, mlp: int, dropout: float, eps: float):
        super().__init__()
        self.attention = PostNormAttention(width, width, heads, dropout, eps)
        self.cross = PostNormAttention(width, vision_width, heads, dropout, eps) if vision_width else None
        self.up, self.down = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(width, eps)

    def forward(self, x, features):
        x = self.attention(x, x)
        if self.cross is not None:
            x = self.cross(x, features)
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class QFormer(nn.Module):
    """BLIP-2's querying transformer (Li et al., 2023, arXiv:2301.12597): learned queries attend to each other and,
    in every `every`-th block, to the patches (all N features, class token too); then a projection to the LLM's width.

    Sizes: number of `queries`, `layers`, their `width` and `heads`, `mlp` (hidden size of the feed-forward
    layers, 4 × width unless given), `dropout` after every sublayer.
    """

    def __init__(self, vision_width: int, llm_width: int, grid: int, *, queries: int = 32, layers: int = 4,
                 width: int = 256, heads: int = 8, mlp: int | None = None, dropout: float = 0.0, every: int = 2,
                 eps: float = 1e-12):
        super().__init__()
        if width % heads:
            raise InputError(f"the Q-Former's width {width} is not a multiple of its {heads} heads")
        self.queries = queries
        self.query = nn.Parameter(torch.empty(queries, width))
        self.norm, self.dropout = nn.LayerNorm(width, eps), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            QFormerBlock(width, vision_width if i % every == 0 else None, heads, mlp or 4 * width, dropout, eps)
            for i in range(layers))
        self.projection = nn.Linear(width, llm_width)
        nn.init.normal_(self.query, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.norm(self.query)).expand(len(features), -1, -1)  # (P,Q,W)
        for block in self.blocks:
            x = block(x, features)
        return self.projection(x)

    @classmethod
    def from_pretrained(cls, name: str, dtype: torch.dtype = torch.float32) -> "QFormer":
        """Loads the Q-Former and projection of a BLIP-2 checkpoint (a folder or a hub name). Raises InputError."""
        checkpoint = Checkpoint(name)
        family, sizes = checkpoint.family({"blip-2": BLIP2})
        with torch.device("meta"):
            qformer = cls(**sizes)
        load_weights(qformer, checkpoint, family, dtype)
        return qformer.eval()


def blip2_config(c: dict) -> dict:
    q = c.get("qformer_config", {})
    if q.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act {q['hidden_act']!r} is not supported")
    return dict(vision_width=q.get("encoder_hidden_size", 1408), llm_width=c["text_config"]["hidden_size"], grid=0,
                queries=c.get("num_query_tokens", 32), layers=q.get("num_hidden_layers", 12),
                width=q.get("hidden_size", 768), heads=q.get("num_attention_heads", 12),
                mlp=q.get("intermediate_size", 3072), every=q.get("cross_attention_frequency", 2),
                eps=q.get("layer_norm_eps", 1e-12))


BLIP2 = Family(blip2_config, {
    "norm": "layernorm",
    "query": (lambda tensor: tensor[0], "query_tokens"),
    **{f"blocks.{{}}.{ours}.{mine}": f"encoder.layer.{{}}.{theirs}.{name}"
       for ours, theirs in (("attention", "attention"), ("cross", "crossattention"))
       for mine, name in (("q", "attention.query"), ("k", "attention.key"), ("v", "attention.value"),
                          ("out", "output.dense"), ("norm", "output.LayerNorm"))},
    "blocks.{}.up": "encoder.layer.{}.intermediate_query.dense",
    "blocks.{}.down": "encoder.layer.{}.output_query.dense",
    "blocks.{}.norm": "encoder.layer.{}.output_query.LayerNorm",
    "projection": "language_projection",
}, r"(vision_model|language_model)\..*|.*position_ids")

ADAPTERS = {"linear": Linear, "mlp": MLP, "qformer": QFormer}


class VLM(nn.Module):
    """A frozen ViT and a frozen LLM joined by an adapter.

    The vocabulary (V ids) grows by three: V and V+1, learned embeddings (`markers`) that begin and end an image;
    V+2, the placeholder where an image embedding stands, once for each of the adapter's queries. `config` is what
    config.json of a run's folder holds: "vit" and "llm" (names), "image_size" (pixels; null: the
    checkpoint's own), "layer" (of the ViT; null: the last), "adapter"
    (a name in ADAPTERS), "adapter_sizes", "prompt", and what train.py adds.
    """

    def __init__(self, vit: ViT, llm: LLM, tokenizer: Tokenizer, config: dict):
        super().__init__()
        if config["adapter"] not in ADAPTERS:
            raise InputError(f"unknown adapter {config['adapter']!r}: choose from {', '.join(ADAPTERS)}")
        self.vit, self.llm, self.tokenizer, self.config = vit.requires_grad_(False), llm.requires_grad_(False), tokenizer, config
        try:
            vision_width = vit.config.hidden if config.get("layer") is None else vit.config.width
            self.adapter = ADAPTERS[config["adapter"]](vision_width, llm.config.hidden, vit.config.grid,
                                                       **config["adapter_sizes"])
        except TypeError as error:
            raise InputError(f"the {config['adapter']} adapter: {str(error).split(') ')[-1]}") from None
        scale = llm.embedding.weight.float().std() * llm.config.embedding_scale
        self.markers = nn.Parameter(torch.randn(2, llm.config.hidden) * scale)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What a run trains: the adapter, the markers, and the LoRA of the backbones, if they have one."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def train(self, mode: bool = True) -> "VLM":
        super().train(mode)
        for part in (self.vit, self.llm):
            part.eval()
            for layer in lora_layers(part).values():  # whose dropout
                layer.train(mode)
        return self

    def encode(self, text: str, caption: str | None = None, max_tokens: int = 128) -> tuple[list[int], int]:
        """Ids of a sequence: start token, `text` with an image where it says `<image>` (before it, where it doesn't),
        and the caption with the newline that ends it, at most `max_tokens` of them. Also returns how many ids come
        before the caption. Text is data: a special token that it spells is read as plain text."""
        V, config = self.llm.config.vocabulary, self.llm.config
        image = [V, *[V + 2] * self.adapter.queries, V + 1]
        text = text if IMAGE in text else IMAGE + text
        pieces = [self.tokenizer.encode(piece, special=False) for piece in text.split(IMAGE)]
        ids = [] if config.start_token is None else [config.start_token]
        for i, piece in enumerate(pieces):
            ids += image * (i > 0) + piece
        target = []
        if caption is not None:
            gap = " " if pieces[-1] and not text[-1].isspace() else ""
            target = self.tokenizer.encode(f"{gap}{caption}\n", special=False)[:max_tokens]
        return ids + target, len(ids)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (P,3,H,W) to the encoder's features (P,N,Dv), with gradients where something in it is trained."""
        trained = any(p.requires_grad for p in self.vit.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return self.vit(pixels, self.config.get("layer"))

    def embed(self, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Ids (B,T), with as many placeholders as P pictures fill, and features (P,N,Dv) to embeddings (B,T,D)."""
        V, dtype = self.llm.config.vocabulary, self.llm.dtype
        x = self.llm.embed(tokens.clamp(max=V - 1))  # (B,T,D)
        marks = F.embedding((tokens - V).clamp(0, 1), self.markers).to(dtype)
        x = torch.where((tokens >= V)[..., None], marks, x)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            images = self.adapter(features.to(self.markers.dtype)).to(dtype)  # (P,Q,D)
        return x.masked_scatter((tokens == V + 2)[..., None], images)

    def forward(self, tokens: torch.Tensor, features: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Scores (M,V) of the token after each of the places `where` (M,), counted along the flattened ids (B,T)."""
        hidden = self.llm.hidden(self.embed(tokens, features))
        return self.llm.logits(hidden.flatten(0, 1)[where])

    def read_pictures(self, captions, batches, workers: int = 0):
        """Reads the pictures of a caption set, batch by batch of indices. Yields the indices of those that could
        be read, their pixels (P,3,H,W) (None if P is 0), and {index: reason} of the others."""
        cuda = self.markers.is_cuda
        for indices, pixels, bad in torch.utils.data.DataLoader(
                Pixels(captions, self.vit.preprocess), batch_sampler=batches, collate_fn=Pixels.collate,
                num_workers=workers, pin_memory=cuda):
            yield indices, None if pixels is None else pixels.to(self.markers.device, non_blocking=cuda), bad

    def encode_pictures(self, captions, batches, workers: int = 0):
        """As `read_pictures`, but yields features (P,N,Dv) in place of the pixels."""
        for indices, pixels, bad in self.read_pictures(captions, batches, workers):
            yield indices, None if pixels is None else self.features(pixels), bad

    @torch.inference_mode()
    def caption(self, pictures: list = (), prompt: str | None = None, features: torch.Tensor | None = None,
                max_tokens: int = 60, **decoding) -> list[str]:
        """One caption for each picture: one line of text, without its newline.

        An entry of `pictures` is a PIL.Image, or a list of them, one for each `<image>` in `prompt` (the run's
        own prompt unless given). `features` (P,N,Dv), where known, save the encoder's work. `decoding` goes to `LLM.generate`.
        """
        prompt = self.config.get("prompt", "") if prompt is None else prompt
        images = max(1, prompt.count(IMAGE))
        if features is None:
            rows = [picture if isinstance(picture, (list, tuple)) else [picture] for picture in pictures]
            if any(len(row) != images for row in rows):
                raise InputError(f"the prompt has room for {images} pictures, not {max(map(len, rows))}")
            pixels = torch.stack([self.vit.preprocess(picture) for row in rows for picture in row])
            features = self.features(pixels.to(self.markers.device))
        tokens = torch.tensor([self.encode(prompt)[0]] * (len(features) // images), device=self.markers.device)
        ends = self.llm.config.end_tokens + tuple(i for i, token in self.tokenizer.bytes.items() if b"\n" in token)
        ids = self.llm.generate(embeddings=self.embed(tokens, features), max_tokens=max_tokens, end_tokens=ends, **decoding)
        return [self.tokenizer.decode(row, special=False).strip() for row in ids]

    def save(self, folder: Path) -> None:
        """Writes adapter.safetensors and, in PEFT's format, lora/llm/ and lora/vit/, but no backbone."""
        state = {name: p.detach().cpu().contiguous() for name, p in self.trained.items()
                 if not name.startswith(("vit.", "llm."))}
        write_file(folder / "adapter.safetensors", lambda path: save_file(state, path))
        for part in ("llm", "vit"):
            if lora_layers(getattr(self, part)):
                save_lora(getattr(self, part), folder / "lora" / part)

    @classmethod
    def from_pretrained(cls, name: str, dtype: torch.dtype = torch.float32) -> "VLM":
        """Rebuilds a run from its folder: backbones in `dtype`, adapter in float32, eval mode. Raises InputError."""
        folder = find_checkpoint(name)
        config, path = read_json(folder / "config.json"), folder / "adapter.safetensors"
        try:
            vlm = build(config, dtype)
        except KeyError as error:
            raise InputError(f"{folder / 'config.json'}: not the folder of a run ({error} is missing)") from None
        if not path.is_file():
            raise InputError(f"{path}: no such file (was the run stopped before its first checkpoint?)")
        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a whole safetensors file ({error})") from None
        vlm.load_trained(state, path)
        for part in ("llm", "vit"):
            if (folder / "lora" / part).is_dir():
                load_lora(getattr(vlm, part), folder / "lora" / part)
        return vlm.eval()

    def load_trained(self, state: dict[str, torch.Tensor], path: Path) -> None:
        """Takes over what `save` wrote. Raises InputError where names or shapes differ."""
        wanted = self.trained
        for name in wanted.keys() | state.keys():
            found, shape = (tuple(t[name].shape) if name in t else "missing" for t in (state, wanted))
            if found != shape:
                raise InputError(f"{path}: tensor '{name}' is {found}; the {self.config['adapter']} adapter wants {shape}")
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(state[name])


def build(config: dict, dtype: torch.dtype = torch.float32) -> VLM:
    """A VLM with an untrained adapter: frozen backbones in `dtype`, adapter in float32."""
    return VLM(ViT.from_pretrained(config["vit"], dtype, config.get("image_size")), LLM.from_pretrained(config["llm"], dtype),
               Tokenizer.from_pretrained(config["llm"]), config)
