"""Language models: each family's config.json and tensor names, as data."""
import re

import torch

from formats.files import guard, warn
from formats.weights import (Checkpoint, Family, depth, find_tensors, fused_names, name_table,
                             projection_names)


# ---------------------------------------------------------------------------------------------------------
# Tied heads

def own_head(checkpoint: Checkpoint, family: Family) -> bool:
    """Whether the checkpoint has a head that differs from its embedding, although config.json ties them; then
    warns. Raises InputError."""
    places, _ = find_tensors(("embedding.weight", "head.weight"), family, checkpoint.where)
    embedding = places["embedding.weight"][1][0]
    head = places["head.weight"][1][0]
    with guard(checkpoint.folder, "not whole safetensors files"):
        if embedding not in checkpoint.where or head not in checkpoint.where:
            return False
        if torch.equal(checkpoint.tensor(embedding), checkpoint.tensor(head)):
            return False
    warn(f"{checkpoint.folder}: config.json ties the head to the embedding, but '{head}' differs from "
         f"'{embedding}': the model keeps both")
    return True


def tie(family: Family) -> Family:
    """Returns the family for a model whose head is its embedding: a file holds this tensor under either name,
    or under both."""
    embedding = family.names["embedding"]
    head = family.names["head"]
    names = family.names | {"embedding": f"{embedding}|{head}"}
    heads = "|".join(re.escape(f"{name}.weight") for name in head.split("|"))
    return family._replace(names=names, unused=rf"{family.unused}|(.*\.)?({heads})")


# ---------------------------------------------------------------------------------------------------------
# config.json -> the fields of LLMConfig

def refuse(c: dict, *options: str) -> None:
    """Raises ValueError if config.json sets one of these options."""
    found = [option for option in options if c.get(option)]
    if found:
        raise ValueError(f"{', '.join(found)}: not supported")


def gpt2_config(c: dict) -> dict:
    refuse(c, "scale_attn_by_inverse_layer_idx")
    hidden = c["n_embd"]
    heads = c["n_head"]
    return dict(
        vocabulary=c["vocab_size"],
        hidden=hidden,
        layers=c["n_layer"], heads=heads, kv_heads=heads, head_size=hidden // heads,
        mlp=c.get("n_inner") or 4 * hidden,
        max_positions=c["n_positions"],
        learned_positions=True,
        activation=c.get("activation_function", "gelu_new"), gated=False,
        norm="layer", eps=c.get("layer_norm_epsilon", 1e-5),
        qkv_bias=True, out_bias=True, mlp_bias=True,
        tied=c.get("tie_word_embeddings", True),
        start_token=c.get("bos_token_id"), end_tokens=c.get("eos_token_id"),
    )


def opt_config(c: dict) -> dict:
    width = c["hidden_size"]
    heads = c["num_attention_heads"]
    bias = c.get("enable_bias", True)
    pre = c.get("do_layer_norm_before", True)
    return dict(
        vocabulary=c.get("vocab_size", 50272),
        hidden=c.get("word_embed_proj_dim") or width,
        width=width,
        layers=c["num_hidden_layers"], heads=heads, kv_heads=heads, head_size=width // heads,
        mlp=c["ffn_dim"],
        max_positions=c.get("max_position_embeddings", 2048),
        learned_positions=True,
        activation=c.get("activation_function", "relu"), gated=False,
        norm="layer", eps=1e-5,
        norm_weights=c.get("layer_norm_elementwise_affine", True),
        norm_order="pre" if pre else "post",
        final_norm=pre and not c.get("_remove_final_layer_norm"),
        qkv_bias=bias, out_bias=bias, mlp_bias=bias,
        tied=c.get("tie_word_embeddings", True),
        start_token=c.get("bos_token_id", 2), end_tokens=c.get("eos_token_id", 2),
    )


def llama_config(c: dict, slides=lambda layer: True, **differences) -> dict:
    """Reads Llama's config.json, which most families took over.

    `slides(layer)` tells which layers have the sliding window, if config.json has no `layer_types`.
    `differences` are fields that a family sets otherwise.
    """
    hidden = c["hidden_size"]
    heads = c["num_attention_heads"]
    layers = depth(c["num_hidden_layers"])
    bias = c.get("attention_bias", False)
    rope = make_rope(c, c.get("rope_scaling") or c.get("rope_parameters") or {})

    # Linear scaling makes texts longer, which max_position_embeddings doesn't include
    max_positions = c.get("max_position_embeddings", 2048)
    if rope["scaling"] == "linear":
        max_positions *= rope["factor"]

    # The window of each layer
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    types = c.get("layer_types")
    if not types:
        types = ["sliding_attention" if slides(layer) else "full_attention" for layer in range(layers)]
    if not set(types) <= {"sliding_attention", "full_attention"}:
        raise ValueError(f"layer_types {sorted(set(types))} are not supported")
    windows = tuple(window if kind == "sliding_attention" else None for kind in types)

    fields = dict(
        vocabulary=c["vocab_size"],
        hidden=hidden,
        layers=layers, heads=heads, kv_heads=c.get("num_key_value_heads") or heads,
        head_size=c.get("head_dim") or hidden // heads,
        mlp=c["intermediate_size"],
        max_positions=int(max_positions),
        ropes=(rope,) * layers,
        windows=windows,
        activation=c.get("hidden_act", "silu"),
        eps=c.get("rms_norm_eps", 1e-6),
        qkv_bias=bias, out_bias=bias, mlp_bias=c.get("mlp_bias", False),
        tied=c.get("tie_word_embeddings", False),
        start_token=c.get("bos_token_id"), end_tokens=c.get("eos_token_id"),
    )
    return fields | differences


def make_rope(c: dict, parameters: dict) -> dict:
    """Returns the fields of Rope. `parameters` is config.json's `rope_parameters` or, in older files,
    `rope_scaling`; other keys of config.json hold for what it lacks. Raises ValueError."""
    r = {
        "rope_theta": c.get("rope_theta") or c.get("rotary_emb_base") or 10000.0,
        "partial_rotary_factor": c.get("partial_rotary_factor") or c.get("rotary_pct") or 1.0,
    } | parameters
    scaling = r.get("rope_type") or r.get("type") or "default"
    if scaling not in ("default", "linear", "llama3"):
        raise ValueError(f"rotary scaling {scaling!r} is not supported")

    # By which factor texts are longer than in the first training
    length = c.get("max_position_embeddings", 2048)
    key = "original_max_position_embeddings"
    original = c.get(key) or r.get(key) or length
    factor = r.get("factor") or length / original

    # How many numbers of a head rotate
    head_size = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    size = int(head_size * r["partial_rotary_factor"])
    bands = (float(r.get("low_freq_factor", 1)), float(r.get("high_freq_factor", 4)))
    if not 0 < size <= head_size or size % 2:
        raise ValueError(f"{size} of {head_size} numbers of a head can't be rotary")
    return dict(size=size, theta=float(r["rope_theta"]), scaling=scaling, factor=float(factor),
                original=int(original), bands=bands)


def qwen_config(c: dict, **differences) -> dict:
    c = {"use_sliding_window": False, "sliding_window": 4096} | c
    return llama_config(c, lambda layer: layer >= c.get("max_window_layers", 28), **differences)


def smollm3_config(c: dict) -> dict:
    c = {"use_sliding_window": False, "rope_theta": 2e6, "tie_word_embeddings": True} | c

    # Every fourth layer has no rotary positions
    every = c.get("no_rope_layer_interval", 4)
    rotates = c.get("no_rope_layers")
    if not rotates:
        rotates = [(layer + 1) % every for layer in range(depth(c["num_hidden_layers"]))]
    config = llama_config(c, lambda layer: not rotates[layer])
    config["ropes"] = tuple(rope if on else None for rope, on in zip(config["ropes"], rotates))
    return config


def neox_config(c: dict) -> dict:
    c = {"rotary_pct": 0.25, "attention_bias": True} | c
    return llama_config(c, norm="layer", eps=c.get("layer_norm_eps", 1e-5), gated=False, mlp_bias=True,
                        parallel=c.get("use_parallel_residual", True))


def gemma3_config(c: dict) -> dict:
    refuse(c, "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
    defaults = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
                "max_position_embeddings": 131072, "sliding_window": 4096, "tie_word_embeddings": True,
                "bos_token_id": 2, "eos_token_id": 1}
    c = defaults | c
    config = llama_config(
        c, lambda layer: (layer + 1) % c.get("sliding_window_pattern", 6),
        max_positions=c["max_position_embeddings"],  # rotary scaling included
        activation=c.get("hidden_activation", "gelu_pytorch_tanh"),
        norm_order="both",
        qk_norm=True,
        query_scale=(c["head_dim"] / c.get("query_pre_attn_scalar", 256)) ** 0.5,
        embedding_scale=c["hidden_size"] ** 0.5)

    # Layers with a window have a rotation of their own
    parameters = c.get("rope_parameters") or {
        "full_attention": {"rope_theta": c.get("rope_theta", 1e6)} | (c.get("rope_scaling") or {}),
        "sliding_attention": {"rope_theta": c.get("rope_local_base_freq", 1e4)},
    }
    far = make_rope(c, parameters["full_attention"])
    near = make_rope(c, parameters["sliding_attention"])
    config["ropes"] = tuple(near if window else far for window in config["windows"])
    return config


def nanovlm_config(c: dict) -> dict:
    return llama_config(dict(
        vocab_size=c["lm_vocab_size"],
        hidden_size=c["lm_hidden_dim"],
        intermediate_size=c["lm_inter_dim"],
        num_hidden_layers=c["lm_n_blocks"],
        num_attention_heads=c["lm_n_heads"],
        num_key_value_heads=c["lm_n_kv_heads"],
        max_position_embeddings=c["lm_max_position_embeddings"],
        rope_theta=c["lm_re_base"],
        rms_norm_eps=c["lm_rms_eps"],
        tie_word_embeddings=c["lm_tie_weights"],
        eos_token_id=c.get("lm_eos_token_id"),
    ))


def inner_config(c: dict) -> dict:
    """Reads the language model's part of a multimodal config.json."""
    return FAMILIES[c["text_config"]["model_type"]].config(c["text_config"])


# ---------------------------------------------------------------------------------------------------------
# Tensor names, and functions that make our tensors of theirs

def transpose(tensor: torch.Tensor) -> torch.Tensor:
    """Turns GPT-2's weight (in,out) to (out,in); leaves a bias as it is."""
    return tensor.movedim(-1, 0)


def take_third(i: int):
    """Reads the i-th of q, k, v from GPT-2's fused weight (in, 3 out) or bias (3 out)."""
    return lambda tensor: transpose(tensor).chunk(3)[i]


def add_one(weight: torch.Tensor) -> torch.Tensor:
    """Gemma stores the weights of its norms less one."""
    return weight.float() + 1


GPT2_NAMES = name_table({
    "embedding": "wte", "positions": "wpe", "norm": "ln_f", "head": "lm_head",
}, {
    "norm1": "ln_1", "norm2": "ln_2",
    **fused_names(take_third, "attn.c_attn"),
    "attention.out": (transpose, "attn.c_proj"),
    "mlp.up": (transpose, "mlp.c_fc"), "mlp.down": (transpose, "mlp.c_proj"),
}, "h.{}.")
OPT_NAMES = name_table({
    "embedding": "embed_tokens",
    "project_in": "project_in", "project_out": "project_out",
    "positions": (lambda tensor: tensor[2:], "embed_positions"),  # the first two stand for padding
    "norm": "final_layer_norm", "head": "lm_head",
}, {
    "norm1": "self_attn_layer_norm", "norm2": "final_layer_norm",
    **projection_names("self_attn", "out_proj"),
    "mlp.up": "fc1", "mlp.down": "fc2",
}, "layers.{}.")
LLAMA_NAMES = name_table({
    "embedding": "embed_tokens", "norm": "norm", "head": "lm_head",
}, {
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    **projection_names("self_attn", "o_proj"),
    "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}, "layers.{}.")
GEMMA3_NAMES = name_table(LLAMA_NAMES | {"norm": (add_one, "norm")}, {
    "norm1": (add_one, "input_layernorm"),
    "out_norm1": (add_one, "post_attention_layernorm"),
    "norm2": (add_one, "pre_feedforward_layernorm"),
    "out_norm2": (add_one, "post_feedforward_layernorm"),
    "attention.q_norm": (add_one, "self_attn.q_norm"), "attention.k_norm": (add_one, "self_attn.k_norm"),
}, "layers.{}.")
NANOVLM_NAMES = name_table({
    "embedding": "token_embedding", "norm": "norm", "head": "head",
}, {
    "norm1": "norm1", "norm2": "norm2",
    **projection_names("attn", "out_proj"),
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}, "blocks.{}.")


def phi3_names(config: dict) -> dict:
    """Phi-3 fuses q, k and v, and gate and up: the rows of one follow those of the other."""
    queries = config["heads"] * config["head_size"]
    keys = config["kv_heads"] * config["head_size"]
    mlp = config["mlp"]

    def take(*rows: int):
        return lambda i: lambda tensor: tensor.split(rows)[i]

    return name_table(LLAMA_NAMES, {
        **fused_names(take(queries, keys, keys), "self_attn.qkv_proj"),
        **fused_names(take(mlp, mlp), "mlp.gate_up_proj", ("mlp.gate", "mlp.up")),
    }, "layers.{}.")


def neox_names(config: dict) -> dict:
    """GPT-NeoX fuses q, k and v head by head: (heads · 3 · hd, in)."""
    def take(i: int):
        return lambda tensor: tensor.unflatten(0, (config["heads"], 3, -1))[:, i].flatten(0, 1)

    return name_table({
        "embedding": "embed_in", "norm": "final_layer_norm", "head": "embed_out|lm_head",
    }, {
        "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
        **fused_names(take, "attention.query_key_value"),
        "attention.out": "attention.dense",
        "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
    }, "layers.{}.")


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
