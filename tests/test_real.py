"""Side files of real published checkpoints: tokenizers, configs, tensor names, pixels and prompts equal the
reference's (see fixtures/real_files.py); and the real SmolLM2-135M-Instruct says what it should."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from adapters import VLM, make_adapter
from conftest import ROOT
from fixtures.compare import checksum, close
from formats.files import InputError, read_json
from formats.tokenizer import Tokenizer
from formats.weights import Checkpoint, Family, find_tensors
from formats.encoders import FAMILIES as ENCODERS
from formats.languages import FAMILIES, tie
from formats.vlms import IDEFICS3, LLAVA, PUBLIC
from llm import LLM, LLMConfig
from test_ends import CAPTIONS, vlm_of
from vit import ViT, ViTConfig

GOLDEN = ROOT / "tests" / "fixtures" / "real_files.safetensors"
TOKENIZERS = ("pythia-1.4b-reward", "llama-3", "qwen3", "gemma-3", "llava-1.5-7b-hf",
              "llava-1.5-7b-hf-saved-by-transformers-5", "qwen2-vocab-and-merges", "smollm2-135m")


@pytest.fixture
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct, in the folder where the script that makes it puts it."""
    folder = ROOT.parent / "smollm2-135m"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("the real SmolLM2 is not here")
    return folder


@pytest.fixture(scope="module")
def said() -> dict:
    return json.loads(GOLDEN.with_suffix(".json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------
# Tokenizers

@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_and_texts_equal_the_reference(name, said, shared, request):
    folder = request.getfixturevalue("smollm2") if name == "smollm2-135m" else shared / "real" / name
    tokenizer = Tokenizer.from_pretrained(str(folder))
    assert tokenizer.prefix == said["prefixes"][name]
    for text, wanted in zip(said["strings"], load_file(GOLDEN)[f"tokenizer.{name}"].tolist(), strict=True):
        ids = tokenizer.encode(text)
        plain = tokenizer.encode(text, special=False)
        assert [*map(checksum, (ids, plain, tokenizer.decode(ids)))] == wanted, text


def test_bytes_that_smollm2_lacks(smollm2):
    tokenizer = Tokenizer.from_pretrained(str(smollm2))
    for text, ids in (("!\x04!", [10095]), ("a\x04b", [81, 82]), ("hello\x1dworld", [28120, 6693]),
                      ("\x04\x06", []), ("\U00040000", [218, 218, 218])):
        assert tokenizer.encode(text) == ids


@pytest.mark.slow
@pytest.mark.parametrize("name", ("qwen3", "llama-3", "pythia-1.4b-reward", "llava-1.5-7b-hf"))
def test_a_caption_comes_back_to_its_last_character(name, shared, fixtures):
    tokenizer = Tokenizer.from_pretrained(str(shared / "real" / name))
    vlm = vlm_of(tokenizer, fixtures, start_token=None)
    joined = 0
    for caption in CAPTIONS:
        ids, targets = vlm.processor.encode("", caption)
        learned = [id for id, target in zip(ids, targets) if target]
        assert [id in vlm.processor.ends for id in learned] == [False] * (len(learned) - 1) + [True]
        spelled = tokenizer.decode(tokenizer.encode(caption, special=False))
        assert vlm.processor.text(learned).strip() == spelled.strip()
        joined += len(tokenizer.bytes[learned[-1]]) > 1
    assert joined or name not in ("qwen3", "llama-3")  # a sign and the newline are one token there


# ---------------------------------------------------------------------------------------------------------
# Configs and tensor names

LANGUAGE = {  # folder: what its config says, by our names, and the bytes of its tensors, as its index says
    "distilgpt2": (dict(vocabulary=50257, hidden=768, layers=6, heads=12, kv_heads=12, head_size=64, mlp=3072,
                        max_positions=1024, activation="gelu_new", eps=1e-5, tied=True,
                        end_tokens=(50256,)), None),
    "TinyLlama-1.1B-Chat": (dict(vocabulary=32000, hidden=2048, layers=22, heads=32, kv_heads=4, head_size=64,
                                 mlp=5632, max_positions=2048, activation="silu", eps=1e-5, tied=False,
                                 end_tokens=(2,)), None),
    "Llama-3.2-3B": (dict(vocabulary=128256, hidden=3072, layers=28, heads=24, kv_heads=8, head_size=128,
                          mlp=8192, max_positions=131072, eps=1e-5, tied=True, end_tokens=(128001,)),
                     6425499648 // 2),
    "SmolLM3-3B": (dict(vocabulary=128256, hidden=2048, layers=36, heads=16, kv_heads=4, head_size=128,
                        mlp=11008, max_positions=65536, eps=1e-6, tied=True, end_tokens=(128012,)),
                   3075098624),
    "gemma-3-1b-it": (dict(vocabulary=262144, hidden=1152, layers=26, heads=4, kv_heads=1, head_size=256,
                           mlp=6912, max_positions=32768, activation="gelu_pytorch_tanh", eps=1e-6, tied=True,
                           end_tokens=(1, 106)), 999885952),
}


def parameters_of(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def checkpoint_of(folder: Path, **config) -> Checkpoint:
    """The config and the tensors' names of a folder without weights."""
    checkpoint = Checkpoint.__new__(Checkpoint)
    checkpoint.name, checkpoint.folder = str(folder), folder
    checkpoint.config = read_json(folder / "config.json") | config
    index = folder / "model.safetensors.index.json"
    checkpoint.where = dict.fromkeys(read_json(index)["weight_map"], index) if index.is_file() else {}
    return checkpoint


def missing_and_left(module: torch.nn.Module, family: Family, checkpoint: Checkpoint) -> tuple[set, list]:
    """The names on disk that parameters of ours want and that aren't there; and those that nothing wants."""
    places, left = find_tensors(dict(module.named_parameters()), family, checkpoint.where)
    return {name for _, disk in places.values() for name in disk} - checkpoint.where.keys(), left


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_language_model_has_its_sizes_and_names(name, shared):
    checkpoint = checkpoint_of(shared / "real" / name)
    family, config = checkpoint.family(FAMILIES, LLMConfig)
    fields, size = LANGUAGE[name]
    found = {field: getattr(config, field) for field in fields}
    ends = found["end_tokens"]
    assert found | {"end_tokens": tuple(ends) if isinstance(ends, list) else (ends,)} == fields
    with torch.device("meta"):
        llm = LLM(config)
    assert size is None or parameters_of(llm) == size
    if checkpoint.where:
        assert missing_and_left(llm, tie(family) if config.tied else family, checkpoint) == (set(), [])


def test_what_differs_from_layer_to_layer(shared):
    _, smollm3 = checkpoint_of(shared / "real" / "SmolLM3-3B").family(FAMILIES, LLMConfig)
    assert [rope is None for rope in smollm3.ropes] == [False, False, False, True] * 9
    assert {rope.theta for rope in smollm3.ropes if rope} == {5e6} and {*smollm3.windows} == {None}
    _, gemma = checkpoint_of(shared / "real" / "gemma-3-1b-it").family(FAMILIES, LLMConfig)
    assert [window for window in gemma.windows] == ([512] * 5 + [None]) * 4 + [512] * 2
    assert [rope.theta for rope in gemma.ropes] == ([1e4] * 5 + [1e6]) * 4 + [1e4] * 2
    _, llama = checkpoint_of(shared / "real" / "Llama-3.2-3B").family(FAMILIES, LLMConfig)
    rope, = {*llama.ropes}
    assert (rope.scaling, rope.factor, rope.original) == ("llama3", 32, 8192)
    assert (rope.bands, rope.theta) == ((1, 4), 5e5)


@pytest.mark.parametrize("name, kind, like, unwanted", [
    ("pythia-1.4b-reward", "gpt_neox_reward_model", "gpt_neox", ["out_proj.bias", "out_proj.weight"]),
    ("qwen2-vocab-and-merges", "mineru2_qwen", "qwen2", [])])
def test_a_class_of_its_own_is_refused_by_name(name, kind, like, unwanted, shared):
    folder = shared / "real" / name
    with pytest.raises(InputError, match=f"{folder.name}.config.json: model_type '{kind}' is not one of"):
        checkpoint_of(folder).family(FAMILIES, LLMConfig)
    # what is the family's own in it fits all the same
    checkpoint = checkpoint_of(folder, model_type=like)
    family, config = checkpoint.family(FAMILIES, LLMConfig)
    with torch.device("meta"):
        llm = LLM(config)
    if checkpoint.where:
        missing, left = missing_and_left(llm, family, checkpoint)
        assert left == unwanted and [name.split(".")[-2] for name in missing] == ["embed_out"]
        assert parameters_of(llm) - config.vocabulary * config.hidden == (5246377988 - 4 * (2048 + 1)) // 4
    else:
        assert (config.hidden, config.layers, config.kv_heads, config.vocabulary) == (896, 24, 2, 151654)


ENCODER = {  # width, layers, heads, mlp, patch, image, activation
    "clip-h14-vision": (1280, 32, 16, 5120, 14, 224, "gelu"),
    "clip-l14-vision": (1024, 24, 16, 4096, 14, 224, "quick_gelu"),
    "clip-old-two-dicts": (1024, 24, 16, 4096, 14, 224, "quick_gelu"),
    "dinov2-small": (384, 12, 6, 1536, 14, 518, "gelu")}


@pytest.mark.parametrize("name", ENCODER)
def test_an_encoder_has_its_sizes(name, shared):
    _, c = checkpoint_of(shared / "real" / name).family(ENCODERS, ViTConfig)
    assert (c.width, c.layers, c.heads, c.mlp, c.patch_size, c.image_size, c.activation) == ENCODER[name]
    with torch.device("meta"):
        blocks = ViT(c).blocks
    width, layers, _, mlp, *_ = ENCODER[name]
    each = 4 * (width + 1) * width + (width + 1) * mlp + (mlp + 1) * width + 4 * width
    assert parameters_of(blocks) == layers * (each + 2 * width * name.startswith("dinov2"))


def parts_of(checkpoint: Checkpoint) -> tuple[list, dict]:
    """The encoder, language model and adapter of a public VLM, on the meta device, each with its family
    and its part of the checkpoint; and the names that no part claims."""
    row, (vision, language, config) = checkpoint.row(PUBLIC)
    parts = [checkpoint.part(*which) for which in (
        (row.vision, vision), (row.language, language), (row.adapter, checkpoint.config))]
    with torch.device("meta"):
        family, c = parts[0].family(ENCODERS, ViTConfig)
        vit = ViT(c), family
        family, c = parts[1].family(FAMILIES, LLMConfig)
        llm = LLM(c), tie(family) if c.tied else family
        adapter = make_adapter(config, vit[0], llm[0]), Family(row.config, row.names, row.unused)
    stray = checkpoint.where.keys() - {name for part in parts for name in part.where}
    return [(*pair, part) for pair, part in zip((vit, llm, adapter), parts)], stray


def test_llava_has_its_sizes_and_names(shared):
    parts, stray = parts_of(checkpoint_of(shared / "real" / "llava-1.5-7b-hf"))
    assert not stray
    for module, family, part in parts:
        assert missing_and_left(module, family, part) == (set(), [])
    # Float16. Ours adds the class token to its position, and leaves a last norm unread
    assert sum(parameters_of(module) for module, *_ in parts) + 1024 + 2 * 1024 == 14126854144 // 2


def test_smolvlm2_has_its_sizes(shared):
    parts, _ = parts_of(checkpoint_of(shared / "real" / "SmolVLM2-500M"))
    vit, llm, adapter = (module for module, *_ in parts)
    c = vit.config
    assert (c.width, c.layers, c.heads, c.mlp, c.patch_size, c.image_size) == (768, 12, 12, 3072, 16, 512)
    c = llm.config
    assert (c.hidden, c.layers, c.heads, c.kv_heads, c.mlp, c.vocabulary) == (960, 32, 15, 5, 2560, 49280)
    assert (c.tied, c.ropes[0].theta, adapter.queries) == (False, 1e5, 64)


# ---------------------------------------------------------------------------------------------------------
# Pixels and prompts

@pytest.mark.parametrize("name", (
    "clip-h14-preprocessor", "clip-l14-preprocessor", "dinov2-small", "llava-1.5-7b-hf",
    "llava-1.5-7b-hf-saved-by-transformers-5", "SmolVLM2-500M"))
def test_pixels_equal_the_reference(name, shared, fixtures, tmp_path):
    """Real settings, beside the weights of a small encoder of the family."""
    small = {"dinov2-small": "dinov2", "SmolVLM2-500M": "smolvlm"}.get(name, "clip_vision")
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        if (fixtures / small / file).is_file():
            shutil.copyfile(fixtures / small / file, tmp_path / file)
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (shared / "real" / name / file).is_file():
            shutil.copyfile(shared / "real" / name / file, tmp_path / file)
    load = VLM if small == "smolvlm" else ViT
    vit = load.from_pretrained(str(tmp_path))
    preprocess = vit.vit.preprocess if small == "smolvlm" else vit.preprocess
    for i, path in enumerate(sorted((shared / "flickr8k" / "native").iterdir())[:3]):
        pixels, rows, columns = preprocess.tiles(Image.open(path))
        assert len(pixels) == rows * columns + 1
        close(pixels[..., ::29, ::31], load_file(GOLDEN)[f"pixels.{name}.{i}"], 1e-5)


def test_an_image_processor_of_its_own_is_refused_by_name(shared, fixtures, tmp_path):
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(fixtures / "clip_vision" / file, tmp_path / file)
    shutil.copyfile(shared / "real" / "qwen2-vocab-and-merges" / "preprocessor_config.json",
                    tmp_path / "preprocessor_config.json")
    with pytest.raises(InputError, match="image processor 'Mineru2' is not one of"):
        ViT.from_pretrained(str(tmp_path))


def test_prompts_equal_what_the_chat_templates_render(said):
    for name, format in (("llava-1.5-7b-hf", LLAVA[""]), ("SmolVLM-500M", IDEFICS3["<|im_start|>"])):
        for images, text, wanted in said["prompts"][name]:
            assert format.begin + format.chat(images, text) == wanted


def test_conversations_equal_what_the_chat_templates_render(said):
    for name, format, end in (("llava-1.5-7b-hf", LLAVA[""], "</s>"),
                              ("SmolVLM-500M", IDEFICS3["<|im_start|>"], "<end_of_utterance>")):
        found = format.begin + format.chat(1, "What is it?")
        for answer, question in (("A dog.", "Big?"), ("No.", "Sure?")):
            found += f" {answer}{end}{format.between}{format.chat(0, question)}"
        # LLaVA was trained with an end token after each answer; its template has a space
        assert found.replace("</s>", " ") == said["conversations"][name]


# ---------------------------------------------------------------------------------------------------------
# The real SmolLM2-135M-Instruct

@pytest.mark.slow
@torch.no_grad()
def test_smollm2_says_what_the_reference_says(smollm2, said):
    tokenizer, llm = Tokenizer.from_pretrained(str(smollm2)), LLM.from_pretrained(str(smollm2))
    golden = load_file(GOLDEN)
    prompts = [torch.tensor(tokenizer.encode(text)) for text in said["asked"]]
    for i, prompt in enumerate(prompts):
        close(llm(prompt[None])[0, ::5, ::97], golden[f"smollm2.logits{i}"], 1e-3)
    alone = [llm.generate([prompt], max_tokens=32)[0] for prompt in prompts]
    assert alone == said["answers"]
    assert llm.generate(prompts, max_tokens=32) == said["answers"]  # padded on the left
    assert tokenizer.decode(alone[0]) == "The capital of France is Paris."


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_in_bfloat16_takes_nearly_always_the_same_token(smollm2, said):
    tokenizer = Tokenizer.from_pretrained(str(smollm2))
    llm = LLM.from_pretrained(str(smollm2), torch.bfloat16)
    right = {"rounded": 0, "exact": 0}
    for text, answer in zip(said["asked"], said["answers"]):
        ids = tokenizer.encode(text)
        states = llm.hidden(llm.embed(torch.tensor([ids + answer])))[0, len(ids) - 1:-1]
        for name, logits in (("rounded", llm.logits(states)), ("exact", llm.exact_logits(states))):
            right[name] += (logits.argmax(-1) == torch.tensor(answer)).sum().item()
    count = sum(map(len, said["answers"]))
    assert right["exact"] >= right["rounded"] and right["exact"] >= 0.97 * count, (right, count)
