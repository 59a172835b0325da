"""Public vision-language models: how each family's config.json, tensor names and prompts become ours, as
data."""
from typing import Callable, NamedTuple

from formats.captions import IMAGE


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


def qformer_sizes(c: dict) -> dict:
    q = c.get("qformer_config", {})
    if q.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act {q['hidden_act']!r} is not supported")
    return dict(queries=c.get("num_query_tokens", 32), layers=q.get("num_hidden_layers", 12),
                width=q.get("hidden_size", 768), heads=q.get("num_attention_heads", 12),
                mlp=q.get("intermediate_size", 3072), every=q.get("cross_attention_frequency", 2),
                eps=q.get("layer_norm_eps", 1e-12))


QFORMER_NAMES = {  # of BLIP-2's Q-Former, see Family
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
}


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
                       upscale=c.get("resize_to_max_side_len", False))
        if "global_image_token" not in extra:
            raise ValueError("tiles without a global_image_token are not supported")
    return c | {"image_processor": pixels}, c, dict(
        adapter="pixelshuffle", adapter_sizes=dict(scale=c["mp_pixel_shuffle_factor"]),
        tokenizer=c["lm_tokenizer"], tokens=tokens, format=nanovlm_format(c, extra),
        **{"placeholder": tokens[extra["image_token"]]} if extra else {})


def nanovlm_format(c: dict, extra: dict) -> Format:
    """Its generations: nanoVLM-222M asks a question after the image; the 450M chats; the 8k ones see tiles
    after the whole picture, and count the pictures."""
    if "lm_chat_template" not in c:
        return Format(lambda images, text: f"{IMAGE * images}Question: {text} Answer:", end="<|endoftext|>")
    tiled = "max_img_size" in c

    def chat(images: int, text: str) -> str:
        counted = (f"<image: {i}>" * (tiled and images > 1) + IMAGE for i in range(images))
        return f"<|im_start|>user\n{''.join(counted)}{text}<|im_end|>\n<|im_start|>assistant\n"

    def image(queries: int, rows: int, columns: int) -> str:
        whole = ("<|global_image|>" if tiled else "") + IMAGE * queries
        tiles = [f"<row_{y + 1}_col_{x + 1}>{IMAGE * queries}" for y in range(rows) for x in range(columns)]
        return whole + "".join(tiles)

    return Format(chat, image, end="<|im_end|>")


BLIP2_CHAT = Format(lambda images, text: IMAGE * images + (f"Question: {text} Answer:" if text else ""),
                    question="", images_first=True)
blip2 = Public(blip_config, r"vision_model\.", r"language_model\.",
               r"qformer\.|language_projection\.|query_tokens", QFORMER_NAMES, {"": BLIP2_CHAT},
               r".*position_ids")

PUBLIC = {  # config.json's model_type -> family
    "blip-2": blip2,
    "llava": Public(llava_config, r"(model\.)?vision_tower\.", r"(model\.)?language_model\.|lm_head\.",
                    r"(model\.)?multi_modal_projector\.", {"up": "linear_1", "down": "linear_2"}, LLAVA),
    "idefics3": idefics3, "smolvlm": idefics3,
    "nanovlm": Public(nanovlm_config, r"vision_encoder\.", r"decoder\.", r"MP\.", {"projection": "proj"}, {}),
}
