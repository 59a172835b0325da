"""Language models: how each family's config.json and tensor names become ours, as data."""
import re

import torch

from formats.files import guard, warn
from formats.weights import Checkpoint, Family, depth, find_tensors, name_table


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


def refuse(c: dict, *options: str) -> None:
    if on := [option for option in options if c.get(option)]:
        raise ValueError(f"{', '.join(on)}: not supported")


def gpt2_config(c: dict) -> dict:
    refuse(c, "scale_attn_by_inverse_layer_idx")
    hidden, heads = c["n_embd"], c["n_head"]
    return dict(
        vocabulary=c["vocab_size"], hidden=hidden, layers=c["n_layer"], heads=heads, kv_heads=heads,
        head_size=hidden // heads, mlp=c.get("n_inner") or 4 * hidden, max_positions=c["n_positions"],
        activation=c.get("activation_function", "gelu_new"), eps=c.get("layer_norm_epsilon", 1e-5),
        norm="layer", learned_positions=True, gated=False, qkv_bias=True, out_bias=True, mlp_bias=True,
        tied=c.get("tie_word_embeddings", True), start_token=c.get("bos_token_id"),
        end_tokens=c.get("eos_token_id"))


def opt_config(c: dict) -> dict:
    width, heads, bias = c["hidden_size"], c["num_attention_heads"], c.get("enable_bias", True)
    pre = c.get("do_layer_norm_before", True)
    return dict(
        vocabulary=c.get("vocab_size", 50272), hidden=c.get("word_embed_proj_dim") or width, width=width,
        layers=c["num_hidden_layers"], heads=heads, kv_heads=heads, head_size=width // heads,
        mlp=c["ffn_dim"], max_positions=c.get("max_position_embeddings", 2048),
        activation=c.get("activation_function", "relu"), eps=1e-5, norm="layer",
        norm_weights=c.get("layer_norm_elementwise_affine", True),
        norm_order="pre" if pre else "post", final_norm=pre and not c.get("_remove_final_layer_norm"),
        learned_positions=True, gated=False, qkv_bias=bias, out_bias=bias, mlp_bias=bias,
        tied=c.get("tie_word_embeddings", True), start_token=c.get("bos_token_id", 2),
        end_tokens=c.get("eos_token_id", 2))


def llama_config(c: dict, slides=lambda layer: True, **differences) -> dict:
    """Llama's config.json, which most families took over. `slides` tells which layers have the sliding
    window, where `layer_types` doesn't; `differences` are fields that a family sets otherwise."""
    hidden, heads, layers = c["hidden_size"], c["num_attention_heads"], depth(c["num_hidden_layers"])
    bias = c.get("attention_bias", False)
    rope = make_rope(c, c.get("rope_scaling") or c.get("rope_parameters") or {})
    reach = rope["factor"] if rope["scaling"] == "linear" else 1  # not in max_position_embeddings
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    types = c.get("layer_types") or [f"{'sliding' if slides(i) else 'full'}_attention" for i in range(layers)]
    if not {*types} <= {"sliding_attention", "full_attention"}:
        raise ValueError(f"layer_types {sorted({*types})} are not supported")
    return dict(
        vocabulary=c["vocab_size"], hidden=hidden, layers=layers, heads=heads,
        kv_heads=c.get("num_key_value_heads") or heads, head_size=c.get("head_dim") or hidden // heads,
        mlp=c["intermediate_size"], max_positions=int(c.get("max_position_embeddings", 2048) * reach),
        activation=c.get("hidden_act", "silu"), eps=c.get("rms_norm_eps", 1e-6), ropes=(rope,) * layers,
        windows=tuple(window if kind == "sliding_attention" else None for kind in types),
        qkv_bias=bias, out_bias=bias, mlp_bias=c.get("mlp_bias", False),
        tied=c.get("tie_word_embeddings", False), start_token=c.get("bos_token_id"),
        end_tokens=c.get("eos_token_id")) | differences


def make_rope(c: dict, parameters: dict) -> dict:
    """The fields of Rope. `parameters`: config.json's `rope_parameters`, or the older `rope_scaling` and keys
    of config.json."""
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
    return dict(size=size, theta=float(r["rope_theta"]), scaling=scaling, factor=float(factor),
                original=int(original), bands=bands)


def qwen_config(c: dict, **differences) -> dict:
    c = {"use_sliding_window": False, "sliding_window": 4096} | c
    return llama_config(c, lambda layer: layer >= c.get("max_window_layers", 28), **differences)


def smollm3_config(c: dict) -> dict:
    c = {"use_sliding_window": False, "rope_theta": 2e6, "tie_word_embeddings": True} | c
    every = c.get("no_rope_layer_interval", 4)
    rotates = c.get("no_rope_layers") or [(i + 1) % every for i in range(depth(c["num_hidden_layers"]))]
    config = llama_config(c, lambda layer: not rotates[layer])
    ropes = [rope if on else None for rope, on in zip(config["ropes"], rotates)]
    return config | dict(ropes=tuple(ropes))


def neox_config(c: dict) -> dict:
    c = {"rotary_pct": 0.25, "attention_bias": True} | c
    return llama_config(c, norm="layer", eps=c.get("layer_norm_eps", 1e-5), gated=False, mlp_bias=True,
                        parallel=c.get("use_parallel_residual", True))


def gemma3_config(c: dict) -> dict:
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
    return config | dict(ropes=tuple(near if window else far for window in config["windows"]))


def nanovlm_config(c: dict) -> dict:
    return llama_config(dict(
        vocab_size=c["lm_vocab_size"], hidden_size=c["lm_hidden_dim"], intermediate_size=c["lm_inter_dim"],
        num_hidden_layers=c["lm_n_blocks"], num_attention_heads=c["lm_n_heads"],
        num_key_value_heads=c["lm_n_kv_heads"], max_position_embeddings=c["lm_max_position_embeddings"],
        rope_theta=c["lm_re_base"], rms_norm_eps=c["lm_rms_eps"],
        tie_word_embeddings=c["lm_tie_weights"], eos_token_id=c.get("lm_eos_token_id")))


def inner_config(c: dict) -> dict:
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


def phi3_names(config: dict) -> dict:
    """Phi-3 fuses q, k and v, and gate and up, one after the other."""
    def part(i: int, *rows: int):
        return lambda tensor: tensor.split(rows)[i]
    qkv = [config[heads] * config["head_size"] for heads in ("heads", "kv_heads", "kv_heads")]
    return name_table(LLAMA_NAMES, {
        **{f"attention.{name}": (part(i, *qkv), "self_attn.qkv_proj") for i, name in enumerate("qkv")},
        "mlp.gate": (part(0, config["mlp"], config["mlp"]), "mlp.gate_up_proj"),
        "mlp.up": (part(1, config["mlp"], config["mlp"]), "mlp.gate_up_proj")}, "layers.{}.")


def neox_names(config: dict) -> dict:
    """GPT-NeoX fuses q, k and v head by head: (heads · 3 · hd, in)."""
    def part(i: int):
        return lambda tensor: tensor.unflatten(0, (config["heads"], 3, -1))[:, i].flatten(0, 1)
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
