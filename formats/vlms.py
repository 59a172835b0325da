"""Public vision-language models: each family's config.json, tensor names and prompts, as data."""
from typing import Callable, NamedTuple

from formats.captions import IMAGE
from formats.weights import name_table


class Format(NamedTuple):
    """How a family of VLMs spells pictures and text. IMAGE stands for a picture in the result of `chat`, and
    for one embedding in that of `image`.

    `chat(images, text)` makes the prompt for that many pictures, followed by the text. `image(queries, rows,
    columns)` spells a picture cut into rows and columns of tiles (0 and 0: not cut), each tile `queries`
    embeddings. `question` is the text where the user gives none. With `images_first`, pictures at the head of
    a prompt come before the start token. `end` is the token that ends an answer, if config.json names none.
    `begin` stands before the first turn of a conversation, `between` after the end token of each answer.
    """
    chat: Callable[[int, str], str]
    image: Callable[[int, int, int], str] = lambda queries, rows, columns: IMAGE * queries
    question: str = "Describe this image."
    images_first: bool = False
    end: str = ""
    begin: str = ""
    between: str = ""


# ---------------------------------------------------------------------------------------------------------
# BLIP-2's Q-Former

def qformer_sizes(c: dict) -> dict:
    """Reads the Q-Former's sizes from BLIP-2's config.json."""
    q = c.get("qformer_config", {})
    if q.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act {q['hidden_act']!r} is not supported")
    return dict(
        queries=c.get("num_query_tokens", 32),
        layers=q.get("num_hidden_layers", 12),
        width=q.get("hidden_size", 768),
        heads=q.get("num_attention_heads", 12),
        mlp=q.get("intermediate_size", 3072),
        every=q.get("cross_attention_frequency", 2),
        eps=q.get("layer_norm_eps", 1e-12),
    )


QFORMER_NAMES = name_table({
    "norm": "layernorm",
    "query": (lambda tensor: tensor[0], "query_tokens"),
    "projection": "language_projection",
}, {
    "attention.q": "attention.attention.query",
    "attention.k": "attention.attention.key",
    "attention.v": "attention.attention.value",
    "attention.out": "attention.output.dense",
    "cross.q": "crossattention.attention.query",
    "cross.k": "crossattention.attention.key",
    "cross.v": "crossattention.attention.value",
    "cross.out": "crossattention.output.dense",
    "norm1": "attention.output.LayerNorm", "norm2": "crossattention.output.LayerNorm",
    "mlp.up": "intermediate_query.dense", "mlp.down": "output_query.dense",
    "norm3": "output_query.LayerNorm",
}, "encoder.layer.{}.")


# ---------------------------------------------------------------------------------------------------------
# Families

class Public(NamedTuple):
    """A family of public VLMs.

    `config` turns config.json into three dicts: the encoder's, the language model's, and fields of our own.
    `vision`, `language` and `adapter` are regular expressions: they begin the names of each part's tensors.
    `names` and `unused` are the adapter's (see Family). `formats` has a Format for each special token that
    tells one from the other ("": any tokenizer), if config.json doesn't.
    """
    config: Callable[[dict], tuple[dict, dict, dict]]
    vision: str
    language: str
    adapter: str
    names: dict
    formats: dict[str, Format]
    unused: str = ""


def family_of(c: dict) -> str | None:
    """Returns config.json's `model_type`; nanoVLM's has none."""
    if "model_type" in c:
        return c["model_type"]
    return "nanovlm" if "mp_pixel_shuffle_factor" in c else None


# The reference's values for keys that the language model's part of config.json may leave out
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
    layer = c.get("vision_feature_layer", -2)
    if not all(isinstance(one, int) for one in (layer if isinstance(layer, list) and layer else [layer])):
        raise ValueError(f"vision_feature_layer {layer} is not supported")
    vision = {"model_type": "clip_vision_model"} | c["vision_config"]
    text = text_config(c)
    tied = c.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)

    # "default" drops the first feature, even where the encoder has no class token: then a patch (-1)
    class_tokens = int("clip" in vision["model_type"])
    if c.get("vision_feature_select_strategy", "default") == "default":
        class_tokens -= 1
    return vision, text | {"tie_word_embeddings": tied}, dict(
        adapter="mlp",
        adapter_sizes=dict(class_tokens=class_tokens),
        layer=layer,
        placeholder=c.get("image_token_index", 32000),
    )


# The tokens that begin an image, end it, and stand for an embedding of it, in a run of ours and its exports.
# Idefics3's processor itself writes the first two around an image; a tokenizer takes the longest token that
# fits, so that it tells them apart
SPELLED = {"idefics3": ("<fake_token_around_image><global-img>", "<fake_token_around_image>", IMAGE)}
OTHERS = ("<image begin>", "<image end>", IMAGE)


def ours(begin: str, end: str) -> Format:
    """The format of a run of ours, with the tokens that begin and end an image: no word is added."""
    return Format(lambda images, text: IMAGE * images + text,
                  lambda queries, rows, columns: begin + IMAGE * queries + end, question="")


def exported(layout: str) -> dict[str, Format]:
    """A run of ours that was exported in that layout reads as it did: see formats/export.py."""
    begin, end, _ = SPELLED.get(layout, OTHERS)
    return {begin: ours(begin, end)}


IMAGE_LINE = IMAGE + "\n"
LLAVA = exported("llava") | {  # its prompts follow the language model's
    "<|im_start|>": Format(lambda images, text: (
        f"<|im_start|>user {IMAGE * images}\n{text}<|im_end|><|im_start|>assistant")),
    "<|start_header_id|>": Format(lambda images, text: (
        f"<|start_header_id|>user<|end_header_id|>\n\n{IMAGE_LINE * images}{text}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")),
    "<|user|>": Format(lambda images, text: (
        f"<|user|>\n{IMAGE_LINE * images}{text}<|end|>\n<|assistant|>\n"), between="\n"),
    "": Format(lambda images, text: f"USER: {IMAGE_LINE * images}{text} ASSISTANT:"),
}


def blip_config(c: dict) -> tuple[dict, dict, dict]:
    vision = c.get("vision_config", {}) | {"model_type": "blip_2_vision_model"}
    ours = dict(adapter="qformer", adapter_sizes=qformer_sizes(c))
    if c.get("image_token_index"):  # older files have none
        ours["placeholder"] = c["image_token_index"]
    return vision, text_config(c, "opt"), ours


def blip_chat(images: int, text: str) -> str:
    prompt = IMAGE * images
    if text:
        prompt += f"Question: {text} Answer:"
    return prompt


def idefics3_config(c: dict) -> tuple[dict, dict, dict]:
    vision = c.get("vision_config", {}) | {"model_type": "idefics3_vision"}
    text = text_config(c) | {"tie_word_embeddings": c.get("tie_word_embeddings", False)}
    return vision, text, dict(
        adapter="pixelshuffle",
        adapter_sizes=dict(scale=c.get("scale_factor", 2)),
        placeholder=c.get("image_token_id", 128257),
    )


def idefics3_image(queries: int, rows: int, columns: int) -> str:
    around = "<fake_token_around_image>"
    text = ""
    for y in range(rows):
        for x in range(columns):
            text += f"{around}<row_{y + 1}_col_{x + 1}>{IMAGE * queries}"
        text += "\n"
    if rows:
        text += "\n"
    return f"{text}{around}<global-img>{IMAGE * queries}{around}"


def idefics3_chat(images: int, text: str) -> str:
    return f"User:{IMAGE * images or ' '}{text}<end_of_utterance>\nAssistant:"


IDEFICS3 = exported("idefics3") | {
    "<|im_start|>": Format(idefics3_chat, idefics3_image, begin="<|im_start|>", between="\n"),
    "": Format(idefics3_chat, idefics3_image, between="\n"),
}


def nanovlm_config(c: dict) -> tuple[dict, dict, dict]:
    if c.get("vit_cls_flag"):
        raise ValueError("vit_cls_flag is not supported")

    extra = c.get("vlm_extra_tokens") or {}

    # Image settings, as a preprocessor_config.json would have them
    pixels = {"image_processor_type": "nanoVLM"}
    if "max_img_size" in c:
        if "global_image_token" not in extra:
            raise ValueError("tiles without a global_image_token are not supported")
        pixels |= dict(
            resample=3,
            size=dict(longest_edge=c["max_img_size"]),
            do_image_splitting=True,
            max_image_size=dict(longest_edge=c["vit_img_size"]),
            upscale=c.get("resize_to_max_side_len", False),
        )

    # The tokenizer is another checkpoint's: it gets these tokens added, in this order
    first = c.get("lm_base_vocab_size", 49152)
    tokens = {token: first + i for i, token in enumerate(extra.values())}
    ours = dict(
        adapter="pixelshuffle",
        adapter_sizes=dict(scale=c["mp_pixel_shuffle_factor"]),
        tokenizer=c["lm_tokenizer"],
        tokens=tokens,
        format=nanovlm_format(c),
    )
    if extra:
        ours["placeholder"] = tokens[extra["image_token"]]
    return c | {"image_processor": pixels}, c, ours


def nanovlm_format(c: dict) -> Format:
    """Its generations: nanoVLM-222M asks a question after the image; the 450M chats; the 8k ones see tiles
    after the whole picture, and count the pictures."""
    if "lm_chat_template" not in c:
        return Format(lambda images, text: f"{IMAGE * images}Question: {text} Answer:", end="<|endoftext|>")
    tiled = "max_img_size" in c

    def chat(images: int, text: str) -> str:
        pictures = IMAGE * images
        if tiled and images > 1:
            pictures = "".join(f"<image: {i}>{IMAGE}" for i in range(images))
        return f"<|im_start|>user\n{pictures}{text}<|im_end|>\n<|im_start|>assistant\n"

    def image(queries: int, rows: int, columns: int) -> str:
        spelled = IMAGE * queries
        if tiled:
            spelled = "<|global_image|>" + spelled
        for y in range(rows):
            for x in range(columns):
                spelled += f"<row_{y + 1}_col_{x + 1}>{IMAGE * queries}"
        return spelled

    return Format(chat, image, end="<|im_end|>", between="\n")


def internvl_config(c: dict) -> tuple[dict, dict, dict]:
    layer = c.get("vision_feature_layer", -1)
    if not isinstance(layer, int) or c.get("vision_feature_select_strategy", "default") != "default":
        raise ValueError("several feature layers, or features with the class token, are not supported")
    ratio = c.get("downsample_ratio", 0.5)
    if c.get("projector_hidden_act", "gelu") != "gelu" or ratio <= 0 or 1 / ratio % 1:
        raise ValueError(f"downsample_ratio {ratio} or a projector without GELU is not supported")
    text = text_config(c, "qwen2")
    tied = text.get("tie_word_embeddings", c.get("tie_word_embeddings", True))
    vision = c.get("vision_config", {}) | {"model_type": "internvl_vision"}
    return vision, text | {"tie_word_embeddings": tied}, dict(
        adapter="pixelshuffle",
        adapter_sizes=dict(scale=int(1 / ratio), bias=True, deep=True),
        layer=None if layer == -1 else layer,
        placeholder=c.get("image_token_id", 151667),
    )


INTERNVL = Format(
    lambda images, text: (
        f"<|im_start|>user\n{IMAGE_LINE * images}{text}<|im_end|>\n<|im_start|>assistant\n"),
    lambda queries, rows, columns: f"<img>{IMAGE * queries * (rows * columns + 1)}</img>",
    between="\n")


blip2 = Public(
    blip_config,
    vision=r"vision_model\.",
    language=r"language_model\.",
    adapter=r"qformer\.|language_projection\.|query_tokens",
    names=QFORMER_NAMES,
    formats=exported("blip-2") | {"": Format(blip_chat, question="", images_first=True)},
    unused=r".*position_ids")
llava = Public(
    llava_config,
    vision=r"(model\.)?vision_tower\.",
    language=r"(model\.)?language_model\.|lm_head\.",
    adapter=r"(model\.)?multi_modal_projector\.",
    names={"up": "linear_1", "down": "linear_2"},
    formats=LLAVA)
idefics3 = Public(
    idefics3_config,
    vision=r"(model\.)?vision_model\.",
    language=r"(model\.)?text_model\.|lm_head\.",
    adapter=r"(model\.)?connector\.",
    names={"projection": "modality_projection.proj"},
    formats=IDEFICS3)
nanovlm = Public(
    nanovlm_config,
    vision=r"vision_encoder\.",
    language=r"decoder\.",
    adapter=r"MP\.",
    names={"projection": "proj"},
    formats={})
internvl = Public(
    internvl_config,
    vision=r"(model\.)?vision_tower\.",
    language=r"(model\.)?language_model\.|lm_head\.",
    adapter=r"(model\.)?multi_modal_projector\.",
    names={"norm": "layer_norm", "projection": "linear_1", "down": "linear_2"},
    formats={"": INTERNVL})

PUBLIC = {  # config.json's model_type -> family
    "blip-2": blip2, "llava": llava, "idefics3": idefics3, "smolvlm": idefics3, "nanovlm": nanovlm,
    "internvl": internvl}
