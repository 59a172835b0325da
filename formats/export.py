"""Writes a model in a public layout: in the one that it came in, or a run of ours in LLaVA's, Idefics3's or
BLIP-2's."""
import contextlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from formats.files import InputError, guard, write_json, write_tensors, write_text
from formats.languages import tie
from formats.vlms import OTHERS, PUBLIC, SPELLED
from formats.weights import Checkpoint, Family, find_tensors

# Besides the weights: configs, tokenizers, chat templates, licences
SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".md", "")


@contextlib.contextmanager
def new_folder(target: Path):
    """Gives a temporary folder that becomes `target` in the end: it is whole or not there. Raises
    InputError."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with guard(target, "can't be written"):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------
# In the layout that it came in

def export(target: Path, name: str, parts: list[tuple[Family, str, dict[str, torch.Tensor]]]) -> None:
    """Writes the public checkpoint `name` anew to the folder `target`, with the tensors of these parts in the
    place of its own, in its dtypes; all other files are copied.

    parts: (family, a regular expression of how the part's names on disk begin, {our name: tensor}) each.
    Raises InputError where a tensor has no place in that layout.
    """
    checkpoint = Checkpoint(name)
    tensors = {theirs: checkpoint.tensor(theirs).clone() for theirs in checkpoint.where}
    for family, prefixes, ours in parts:
        fill(tensors, checkpoint.part(prefixes, {}), family, ours, target)
    with new_folder(target) as folder:
        for path in sorted(checkpoint.folder.iterdir()):
            if path.is_file() and path.suffix in SMALL_FILES:
                shutil.copyfile(path, folder / path.name)
        for path in set(checkpoint.where.values()):
            of_file = {theirs: x for theirs, x in tensors.items() if checkpoint.where[theirs] == path}
            write_tensors(folder / path.name, of_file, {"format": "pt"})


def fill(tensors: dict[str, torch.Tensor], checkpoint: Checkpoint, family: Family,
         ours: dict[str, torch.Tensor], target: Path) -> dict[str, tuple]:
    """Changes the `tensors` of a checkpoint so that they hold `ours`. Returns which are whose, as
    `find_tensors`."""
    places, left = find_tensors(ours, family._replace(unused=""), checkpoint.where)
    for parameter, (function, disk) in places.items():
        if not all(theirs in tensors for theirs in disk):
            raise InputError(f"{target}: {checkpoint.folder} has no place for {parameter}")
        first = tensors[disk[0]]
        copies = [tensors[theirs] for theirs in left if same(tensors[theirs], first)]  # of a tied pair
        put(ours[parameter], function, [tensors[theirs] for theirs in disk], f"{target}: {parameter}")
        for copy in copies:
            copy.copy_(first)
    return places


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def put(tensor: torch.Tensor, function, theirs: list[torch.Tensor], name: str) -> None:
    """Changes tensors of a file so that `function` makes `tensor` of them. Most functions return a view of
    what they read, a part of it or its transpose, so that what is written to the view is written there.
    Others add something to the last: a class token, its position."""
    view = function(*theirs)
    tensor = tensor.detach().cpu().to(view.dtype)
    if torch.equal(view, tensor):
        return
    view.copy_(tensor)
    last = theirs[-1]
    left = tensor - function(*theirs)
    if left.any() and left.numel() == last.numel():
        last += left.view_as(last)
    if not torch.allclose(function(*theirs), tensor, rtol=2 ** -7, atol=2 ** -7 * tensor.abs().max().item()):
        raise InputError(f"{name} was trained, and can't be written in that layout")


# ---------------------------------------------------------------------------------------------------------
# A run of ours, in the layout of a family that computes the same

class Target(NamedTuple):
    """A layout for runs with one kind of adapter.

    encoders: config.json's `model_type` of the encoders that it takes. language: `Family.path` of its
    language models. vision, text, head, adapter: how the names of their tensors begin.
    """
    kind: str
    architecture: str
    encoders: tuple[str, ...]
    language: str
    vision: str
    text: str
    head: str
    adapter: str


TARGETS = {
    "mlp": Target("llava", "Llava", ("clip", "clip_vision_model", "siglip", "siglip_vision_model"), "model.",
                  "vision_tower.vision_model.", "language_model.model.", "language_model.",
                  "multi_modal_projector."),
    "pixelshuffle": Target("idefics3", "Idefics3", ("siglip", "siglip_vision_model"), "model.",
                           "model.vision_model.", "model.text_model.", "", "model.connector."),
    "qformer": Target("blip-2", "Blip2", ("blip-2", "blip_2_vision_model"), "model.decoder.",
                      "vision_model.", "language_model.model.decoder.", "language_model.", "qformer."),
}


def export_run(target: Path, vlm) -> None:
    """Writes a run of ours, whose LoRA is merged, to the folder `target` in the layout of the family whose
    arithmetic it has. What begins and ends an image become tokens. Raises InputError where there is none."""
    config, sizes = vlm.config, vlm.config["adapter_sizes"]
    layout = TARGETS.get(config["adapter"])
    if layout is None:
        raise InputError(f"{target}: no public layout has the {config['adapter']} adapter: "
                         f"{', '.join(TARGETS)} have one")
    encoder, language = Checkpoint(vlm.vit.name), Checkpoint(vlm.llm.name)
    shown = vlm.vit.preprocess.settings
    layer = config.get("layer")
    grid = vlm.vit.config.grid
    clip = encoder.config["model_type"].startswith("clip")
    tokenizer = language.json("tokenizer.json")
    plain = not (shown.get("do_center_crop") or shown.get("do_pad")) and shown.get("do_resize", True)
    wants = {  # what this layout can't say -> whether the run needs it
        f"an encoder of model_type {encoder.config['model_type']}":
            encoder.config["model_type"] not in layout.encoders,
        f"an encoder of {vlm.vit.config.image_size} px, whose file has another size":
            vlm.vit.config.image_size != vlm.vit.family.config(encoder.config)["image_size"],
        f"a language model of model_type {language.config['model_type']}":
            vlm.llm.family.path != layout.language or vlm.llm.config.embedding_scale != 1,
        f"--image-position {vlm.image_position}": vlm.image_position != "sequence",
        f"--layer {layer}": layer is not None and layout.kind != "llava",
        "the output of SigLIP's last norm (a --layer it could)":
            layer is None and layout.kind == "llava" and not clip,
        "class tokens among the embeddings": bool(sizes.get("class_tokens")),
        "--adapter-text": bool(sizes.get("text")),
        "two layers after the squares": bool(sizes.get("deep")),
        f"squares beyond the grid of {grid} × {grid} patches": grid % sizes.get("scale", 1) > 0,
        "pictures that are cropped or padded": layout.kind == "idefics3" and not plain,
        "a tokenizer without a tokenizer.json of pairs":
            not isinstance(tokenizer.get("model", {}).get("vocab"), dict),
    }
    for what in (what for what, needed in wants.items() if needed):
        raise InputError(f"{target}: {layout.kind}'s layout has no place for {what}")

    with new_folder(target) as folder, torch.no_grad():
        tensors = part_tensors(vlm.vit, encoder, vlm.vit.family, layout.vision, "", target)
        tensors |= adapter_tensors(vlm, layout)
        text, tied = language_tensors(vlm, language, layout, target)
        write_tensors(folder / "model.safetensors", tensors | text, {"format": "pt"})
        dtype = str(next(iter(text.values())).dtype).removeprefix("torch.")
        write_json(folder / "config.json", public_config(vlm, layout, language.config, layer, clip)
                   | dict(dtype=dtype, torch_dtype=dtype, tie_word_embeddings=tied))
        write_processor(folder, vlm, layout, clip)
        write_tokenizer(folder, vlm, layout, tokenizer, language)


def part_tensors(module: torch.nn.Module, checkpoint: Checkpoint, family: Family, prefix: str, head: str,
                 target: Path) -> dict[str, torch.Tensor]:
    """The tensors of a backbone under the names of another layout."""
    tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.where}
    places = fill(tensors, checkpoint, family, dict(module.named_parameters()), target)
    known = {name for _, disk in places.values() for name in disk}
    known |= {name for name in tensors if ".post_layernorm." in f".{name}"}  # CLIP's, which we don't read
    inside = family.source("blocks.0.norm1.weight")[1][0].split("|")[0]
    before = next(name for name in known if f".{name}".endswith(f".{inside}")).removesuffix(inside)
    renamed = {}
    for name in known:
        outside = name.startswith("lm_head.")
        renamed[head + name if outside else prefix + name.removeprefix(before)] = tensors[name]
    return renamed


def language_tensors(vlm, checkpoint: Checkpoint, layout: Target,
                     target: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """The language model's tensors, with rows for what begins and ends an image and stands for it, and
    whether the head is the embedding."""
    llm, ids = vlm.llm, vlm.processor
    tied = llm.config.tied
    family = tie(llm.family) if tied else llm.family
    tensors = part_tensors(llm, checkpoint, family, layout.text, layout.head, target)
    embedding, head = f"{layout.text}embed_tokens.weight", f"{layout.head}lm_head.weight"
    if tied and head in tensors:  # a file may have the two under either name
        tensors[embedding] = tensors.pop(head)
    for name in {embedding, head} & tensors.keys():
        rows = tensors[name]
        more = rows.float().mean(0).expand(ids.placeholder + 1 - len(rows), -1)
        tensors[name] = torch.cat([rows, more.to(rows.dtype)])
    tensors[embedding][ids.marker:ids.marker + 2] = vlm.markers.to(tensors[embedding])
    return tensors, tied


def adapter_tensors(vlm, layout: Target) -> dict[str, torch.Tensor]:
    """The adapter's tensors, in the language model's dtype."""
    row = PUBLIC[layout.kind]
    family = Family(row.config, row.names, row.unused)
    ours = {name: p.detach().cpu().clone() for name, p in vlm.adapter.named_parameters()}
    if vlm.channel_scale is not None:  # the layers' factors and summands go into the layer that reads them
        ours["up.bias"] += ours["up.weight"] @ vlm.channel_shift.detach().cpu()
        ours["up.weight"] *= vlm.channel_scale.detach().cpu()
    tensors = {}
    for name, p in ours.items():
        [disk] = family.source(name)[1]
        outside = disk.startswith(("query_tokens", "language_projection"))
        p = p[None] if disk == "query_tokens" else p
        tensors[disk if outside else layout.adapter + disk] = p.to(vlm.llm.dtype)
    return tensors


def public_config(vlm, layout: Target, language: dict, layer: int | list[int] | None, clip: bool) -> dict:
    """config.json of a run in that layout."""
    vit, sizes, placeholder = vlm.vit.config, vlm.config["adapter_sizes"], vlm.processor.placeholder
    vision = dict(hidden_size=vit.width, intermediate_size=vit.mlp, num_hidden_layers=vit.layers,
                  num_attention_heads=vit.heads, image_size=vit.image_size, patch_size=vit.patch_size,
                  hidden_act=vit.activation, layer_norm_eps=vit.eps, num_channels=3)
    config = dict(architectures=[f"{layout.architecture}ForConditionalGeneration"], model_type=layout.kind,
                  text_config=language | {"vocab_size": placeholder + 1})
    if layout.kind == "llava":
        kind = "clip_vision_model" if clip else "siglip_vision_model"
        more = dict(vision_config=dict(vision, model_type=kind, vision_use_head=False),
                    vision_feature_layer=-1 if layer is None else layer, image_token_index=placeholder,
                    vision_feature_select_strategy="default" if clip else "full",
                    image_seq_length=vlm.adapter.queries)
    elif layout.kind == "idefics3":
        more = dict(vision_config=dict(vision, model_type="idefics3_vision"), image_token_id=placeholder,
                    scale_factor=sizes["scale"])
    else:
        more = dict(vision_config=dict(vision, model_type="blip_2_vision_model", qkv_bias=vit.qkv_bias),
                    image_token_index=placeholder, num_query_tokens=sizes["queries"],
                    use_decoder_only_language_model=True,
                    qformer_config=dict(
                        model_type="blip_2_qformer", hidden_size=sizes["width"],
                        num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"],
                        intermediate_size=sizes["mlp"] or 4 * sizes["width"],
                        cross_attention_frequency=sizes["every"], layer_norm_eps=sizes["eps"],
                        encoder_hidden_size=vit.hidden))
    return config | more


def write_processor(folder: Path, vlm, layout: Target, clip: bool) -> None:
    """Writes how pictures become pixels, and what the processor puts in the place of one."""
    shown = vlm.vit.preprocess
    pixels = {key: value for key, value in shown.settings.items() if key != "edges"}
    pixels["image_processor_type"] = f"{vlm.vit.config.processor}ImageProcessor"
    processor = dict(processor_class=f"{layout.architecture}Processor")
    if layout.kind == "llava":
        processor |= dict(patch_size=vlm.vit.config.patch_size, num_additional_image_tokens=int(clip),
                          vision_feature_select_strategy="default" if clip else "full", image_token="<image>")
    elif layout.kind == "idefics3":  # not resized first, and never cut: then it is stretched to a square
        processor |= dict(image_seq_len=vlm.adapter.queries)
        side = dict(longest_edge=shown.image_size)
        pixels |= dict(image_processor_type="Idefics3ImageProcessor", do_resize=False, size=side,
                       do_image_splitting=False, max_image_size=side)
    else:
        processor |= dict(num_query_tokens=None)  # it would put an image before the start token
    write_json(folder / "preprocessor_config.json", pixels)
    write_json(folder / "processor_config.json", processor)


def write_tokenizer(folder: Path, vlm, layout: Target, tokenizer: dict, language: Checkpoint) -> None:
    """Writes the language model's tokenizer with the three new tokens, the prompt's template, and what ends
    an answer."""
    ids = vlm.processor
    spelled = SPELLED.get(layout.kind, OTHERS)
    added = [token for token in tokenizer.get("added_tokens", ()) if token["content"] not in spelled]
    for id, token in enumerate(spelled, start=ids.marker):
        tokenizer["model"]["vocab"][token] = id
        added.append(dict(id=id, content=token, single_word=False, lstrip=False, rstrip=False,
                          normalized=False, special=True))
    tokenizer["added_tokens"] = added

    # The start token comes first, once
    start = {ids.tokenizer.decode([id]): id for id in ids.start}
    first, second = ({"Sequence": dict(id=name, type_id=0)} for name in "AB")
    tokenizer["post_processor"] = dict(
        type="TemplateProcessing",
        single=[*({"SpecialToken": dict(id=token, type_id=0)} for token in start), first],
        pair=[first, second],
        special_tokens={token: dict(id=token, ids=[id], tokens=[token]) for token, id in start.items()})
    settings = language.json("tokenizer_config.json")
    settings = {key: value for key, value in settings.items()
                if key not in ("added_tokens_decoder", "chat_template", "auto_map", "processor_class")}
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})

    # A turn of a run is its pictures and text, as they come; an answer ends at a newline
    begin, end, image = spelled
    picture = {"idefics3": image, "llava": begin + image + end}.get(
        layout.kind, begin + image * vlm.adapter.queries + end)
    write_text(folder / "chat_template.jinja", (
        "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}"
        + picture + "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"))
    write_json(folder / "generation_config.json", dict(
        eos_token_id=sorted(ids.ends), pad_token_id=min(ids.ends), max_new_tokens=60,
        suppress_tokens=[*range(ids.marker, ids.placeholder + 1)]))
