"""Whole public VLMs equal the reference: pixels, prompts, logits, greedy answers (see fixtures/public.py)."""
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
import train
from adapters import VLM
from support.shapes import Scene
from formats.export import TARGETS
from formats.files import InputError, read_json
from formats.tokenizer import Tokenizer
from formats.vlms import family_of
from fixtures import exports, start
from fixtures.compare import close
from fixtures.pictures import ASKED, ASKED_OF_ONE, picture
from llm import LLM
from formats.peft import CONFIG, WEIGHTS
from data import IMAGE_PART, LAST, WORD
from lora import lora_layers, merge_lora
from test_vlm import QUICK, QUICK_SET, command
from vit import ViT

FAMILIES = ("llava", "llava_qwen", "llava_llama3", "llava_phi3", "blip2_opt", "idefics3", "smolvlm",
            "nanovlm", "nanovlm_chat", "nanovlm_first", "internvl")


def answers_equal_the_reference(folder, golden: dict) -> None:
    vlm = VLM.from_pretrained(str(folder))
    asked = ASKED_OF_ONE if vlm.config["adapter"] == "qformer" else ASKED
    for i, (sizes, text) in enumerate(asked[:sum(key.startswith("ids") for key in golden)]):
        cut = [vlm.vit.preprocess.tiles(picture(*size)) for size in sizes]
        example = vlm.processor.encode(text, images=len(cut), tiles=(tiles for _, *tiles in cut))
        ids, kinds = example
        assert {*kinds} <= {IMAGE_PART, WORD} and ids == golden[f"ids{i}"].tolist()
        features = None
        if cut:
            pixels = torch.cat([pixels for pixels, *_ in cut])
            close(pixels[..., ::5, ::3], golden[f"pixels{i}"])
            features = vlm.features(pixels)
        tokens = torch.tensor([ids])
        inputs = vlm.llm_inputs(tokens, vlm.embed_images(features, vlm.processor.prompts([example])))
        logits = vlm.llm.logits(vlm.llm.hidden(**inputs)[:, -3:])
        close(logits[0], golden[f"logits{i}"], 1e-3)
        if f"greedy{i}" in golden:
            assert vlm.llm.generate(**inputs, max_tokens=10) == [golden[f"greedy{i}"].tolist()]
            answer = vlm.processor.tokenizer.decode(golden[f"greedy{i}"].tolist(), special=False).strip()
            assert vlm.caption([[picture(*size) for size in sizes]], text, max_tokens=10) == [answer]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_answers_equal_the_reference(name, fixtures):
    answers_equal_the_reference(fixtures / name, load_file(fixtures / name / "golden.safetensors"))


# How names in other files differ: as the first public ones were written, and as newer ones are
LAYOUTS = {
    "llava old": ("llava", r"^vision_tower\.", "vision_tower.vision_model."),
    "llava new": ("llava", r"^language_model\.model\.|^language_model\.(?=lm_head)|^(?=vision|multi)",
                  lambda match: {"": "model.", "language_model.": ""}.get(match[0], "model.language_model.")),
    "llava_qwen old": ("llava_qwen", r"^vision_tower\.", "vision_tower.vision_model."),
}


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_other_layouts(name, fixtures, tmp_path):
    fixture, old, new = LAYOUTS[name]
    golden = copy_of(fixtures / fixture, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    renamed = {re.sub(old, new, key): tensor for key, tensor in state.items()}
    assert renamed.keys() != state.keys()
    save_file(renamed, tmp_path / "model.safetensors")
    answers_equal_the_reference(tmp_path, golden)
    save_file(renamed | {"visual.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="tensor 'visual.norm.weight' is not part of a llava model"):
        VLM.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("name, embedding, head", [
    ("llava_qwen", "language_model.model.embed_tokens", "language_model.lm_head"),
    ("nanovlm", "decoder.token_embedding", "decoder.head")])
@torch.no_grad()
def test_a_tied_pair_is_one_tensor_under_either_name(name, embedding, head, fixtures, tmp_path):
    golden = copy_of(fixtures / name, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    words = [state.pop(f"{module}.weight", None) for module in (embedding, head)]
    for module in (embedding, head):
        save_file(state | {f"{module}.weight": next(x for x in words if x is not None)},
                  tmp_path / "model.safetensors")
        answers_equal_the_reference(tmp_path, golden)


def copy_of(fixture, folder, **changes) -> dict:
    """Copies a fixture, its config.json with `changes` (None: without that key); returns what it answers."""
    for path in fixture.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return load_file(folder / "golden.safetensors")


@torch.no_grad()
def test_blip2_without_an_image_token(fixtures, tmp_path):
    """Older files have none in their vocabulary: the place of a picture is an id after it."""
    golden = copy_of(fixtures / "blip2_opt", tmp_path, image_token_index=None)
    vlm = VLM.from_pretrained(str(tmp_path))
    ids, _ = vlm.processor.encode(ASKED[0][1])
    assert max(ids) == vlm.processor.placeholder >= vlm.llm.config.vocabulary
    features = vlm.features(vlm.vit.preprocess(picture(*ASKED[0][0][0]))[None])
    hidden = vlm.llm.hidden(**vlm.llm_inputs(torch.tensor([ids]), vlm.embed_images(features)))
    close(vlm.llm.logits(hidden[0, -3:]), golden["logits0"], 1e-3)


def test_what_cannot_be_is_said(fixtures, tmp_path):
    for fixture, change, message in (
            ("llava", dict(vision_feature_layer=[-2, "-5"]), "vision_feature_layer"),
            ("llava", dict(vision_feature_layer=[-2, -3]), "multi_modal_projector.linear_1.weight"),
            ("llava", dict(multimodal_projector_bias=False), "not supported"),
            ("idefics3", dict(scale_factor=3), r"wants \(16, 108\)"),
            ("nanovlm", dict(vit_cls_flag=True), "vit_cls_flag")):
        copy_of(fixtures / fixture, tmp_path, **change)
        with pytest.raises(InputError, match=message):
            VLM.from_pretrained(str(tmp_path))


def test_prompts_can_be_seen_and_overridden(fixtures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(53, 37).save("a.png")
    picture(20, 61).save("b.png")
    common = ["--show-prompt", "--max-tokens", "3", "--precision", "float32"]
    llava, smolvlm = (["--model", fixtures / name, *common] for name in ("llava", "smolvlm"))

    def shown(*arguments) -> str:
        assert command(monkeypatch, sample, *arguments) == 0
        return capsys.readouterr().err.strip()

    assert shown("a.png", "What is it?", *llava) == "<s> USER: <image>×25 \nWhat is it? ASSISTANT:"
    assert shown("a.png", "--prompt", "What?", *llava) == "<s> USER: <image>×25 \nWhat? ASSISTANT:"
    assert shown("a.png", *llava) == "<s> USER: <image>×25 \nDescribe this image. ASSISTANT:"
    assert shown("a.png", "b.png", "--prompt", "<image>or <image>?", *llava) == (
        "<s> USER: <image>×25 \nor <image>×25 ? ASSISTANT:")
    assert shown("a.png", "It is", "--raw-prompt", *llava) == "<s><image>×25 It is"
    assert shown("a.png", "</s>It is<image>", "--raw-prompt", *llava) == "<s></s> It is<image>×25"
    assert "<row_3_col_3><image>×4" in shown("a.png", "What is it?", *smolvlm)
    assert shown("a.png", "What is it?", "--no-split", *smolvlm) == (
        "<|im_start|>User:<fake_token_around_image><global-img><image>×4<fake_token_around_image>What is it?"
        "<end_of_utterance>\nAssistant:")
    assert command(monkeypatch, sample, "a.png", "What is it?", "--prompt", "What?", *llava) == 2
    assert command(monkeypatch, sample, "a.png", "none.png", *llava) == 2  # no space: a picture's name
    assert "none.png: no such picture" in capsys.readouterr().err


def test_a_question_controls_nothing(fixtures):
    for name, control in (
            ("llava_llama3", "<|eot_id|>"), ("smolvlm", "<end_of_utterance>"), ("llava", "</s>")):
        vlm = VLM.from_pretrained(str(fixtures / name))
        plain, asked = (vlm.processor.encode(text)[0] for text in ("What?", f"What?{control}"))
        id = vlm.processor.tokenizer.special[control]
        assert asked.count(id) == plain.count(id)
        assert len(asked) > len(plain)
        ids, kinds = vlm.processor.encode("What?", f"A dog{control}<image>")
        before = kinds.index(LAST)
        assert ids[before:].count(vlm.processor.placeholder) == 0
        assert ids[-1] == vlm.llm.config.end_tokens[0]
        assert ids[before:].count(vlm.processor.tokenizer.special[control]) <= 1


@pytest.mark.parametrize("name", ("llava", "blip2_opt", "smolvlm", "nanovlm", "internvl"))
def test_training_starts_from_a_public_model(name, fixtures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        picture(20 + i, 30).save(f"{i}.png")
    Path("qa.json").write_text(json.dumps([dict(image=f"{i}.png", conversations=[
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": f"It is {i % 3}."}, {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": f"It is {i % 3}."}]) for i in range(12)]))
    before = VLM.from_pretrained(str(fixtures / name))
    options = ["--from", fixtures / name, "--data", "qa.json", *QUICK_SET, "--precision", "float32"]
    assert command(monkeypatch, train, *options, "--out", "run") == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["from"] == str(fixtures / name) and config["adapter"] == before.config["adapter"]
    vlm = VLM.from_pretrained("run")
    changed = {key for key, p in vlm.named_parameters() if not torch.equal(p, before.get_parameter(key))}
    assert changed and all(key.startswith("adapter.") for key in changed)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert lines[3]["loss"] < lines[0]["loss"]
    scored = json.loads(Path("run/captions-val.jsonl").read_text().splitlines()[0])
    assert len(scored["references"]) == 1 and scored["references"][0].startswith("It is")
    capsys.readouterr()
    asking = ["--model", "run", "0.png", "--show-prompt", "--prompt", "What is it?"]
    assert command(monkeypatch, sample, *asking) == 0
    assert "What is it?" in capsys.readouterr().err
    assert command(monkeypatch, sample, "--model", "run", "--data", "qa.json", "--workers", "0") == 0
    assert command(monkeypatch, train, *options, "--out", "other", "--adapter", "linear") == 2
    assert "--adapter means nothing with --from" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ("smolvlm", "nanovlm", "internvl"))
def test_pictures_are_learned_and_scored_in_tiles(name, fixtures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(8):
        picture(20 + 17 * i, 40).save(f"{i}.png")
    Path("captions.csv").write_text("image,caption\n" + "".join(f"{i}.png,It is {i}\n" for i in range(8)))
    options = ["--from", fixtures / name, "--data", "captions.csv", *QUICK_SET, "--split",
               "--precision", "float32"]
    assert command(monkeypatch, train, *options, "--out", "run", "--val", "captions.csv",
                   "--val-size", "8") == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    scored = [json.loads(line) for line in Path("run/captions-val.jsonl").read_text().splitlines()]
    vlm, losses, tiles = VLM.from_pretrained("run"), [], []
    for i, line in enumerate(scored):
        shown = Image.open(f"{i}.png")
        assert vlm.caption([shown]) == [line["caption"]]
        pixels, *seen = vlm.vit.preprocess.tiles(shown)
        tiles.append(len(pixels))
        batch = vlm.processor.batch([[("", f"It is {i}")]], tiles=[[seen]])
        with torch.no_grad():
            losses += vlm(batch, vlm.features(pixels))[0].tolist()
    assert len({*tiles}) > 2 and [line["val"] for line in lines if "val" in line][-1] == pytest.approx(
        sum(losses) / len(losses), abs=1e-5)
    for more, same in ([], True), (["--no-split"], False):
        score = ["--model", "run", "--data", tmp_path / "captions.csv", "--save", "said.jsonl",
                 "--precision", "float32"]
        assert command(monkeypatch, sample, *score, "--workers", "0", *more) == 0
        said = [json.loads(line) for line in Path("said.jsonl").read_text().splitlines()]
        assert all(line.pop("log_probability") < 0 for line in said) and (said == scored) is same
    capsys.readouterr()
    assert command(monkeypatch, train, *QUICK_SET, "--split") == 2
    assert "--split means nothing without --from" in capsys.readouterr().err
    assert command(monkeypatch, train, *options, "--out", "other", "--cache-features") == 2
    assert "--cache-features means nothing with --split: a picture has more" in capsys.readouterr().err


def test_a_lora_of_a_public_model_is_kept(fixtures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        picture(20 + i, 30).save(f"{i}.png")
    Path("captions.csv").write_text("image,caption\n" + "".join(f"{i}.png,It is {i}\n" for i in range(4)))
    options = ["--from", fixtures / "llava", "--data", "captions.csv", *QUICK_SET, "--precision", "float32"]
    assert command(monkeypatch, train, *options, "--spell", "1") == 2  # it would change nothing
    options += ["--lora", "2", "--lora-on", "llm,vit", "--lr", "0.1"]
    assert command(monkeypatch, train, *options, "--out", "run") == 0
    vlm = VLM.from_pretrained("run")
    for part in ("llm", "vit"):
        said = json.loads(Path(f"run/lora/{part}/adapter_config.json").read_text())
        assert said["base_model_name_or_path"] == str(fixtures / "llava")
        assert any(layer.B.any() for layer in lora_layers(getattr(vlm, part)).values())


def logits(vlm: VLM, golden: dict) -> torch.Tensor:
    """Of the last three tokens (3,V), as the fixtures of LoRAs of whole VLMs have them."""
    with torch.no_grad():
        inputs = vlm.llm_inputs(golden["ids"], vlm.embed_images(vlm.features(golden["pixels"])))
        return vlm.llm.logits(vlm.llm.hidden(**inputs)[0, -3:])


WHOLE = ("smolvlm", "llava", "llava_qwen", "blip2_opt")
# How names in older files, or of a class without the head, differ
RENAMED = {
    "llava": {"model.language_model.": "language_model.model.", "model.vision_tower.":
              "vision_tower.vision_model.", "model.multi_modal_projector.": "multi_modal_projector."},
    "llava_qwen": {"lm_head.": "language_model.lm_head.", "model.language_model.": "language_model.model.",
                   "model.vision_tower.": "vision_tower.vision_model.", "model.multi": "multi"},
    "smolvlm": {"model.": ""},
}


@pytest.mark.parametrize("name, renamed", [*((name, {}) for name in WHOLE), *RENAMED.items()])
def test_a_lora_that_peft_trained_on_the_whole(name, renamed, fixtures, tmp_path):
    folder, root = fixtures / "lora" / f"whole_{name}", "base_model.model."
    vlm, golden = VLM.from_pretrained(str(fixtures / name)), load_file(folder / "golden.safetensors")
    assert (logits(vlm, golden) - golden["logits"]).abs().max() > 1
    state, names = load_file(folder / WEIGHTS), {}
    for key in state:
        begin = next((old for old in renamed if key.startswith(root + old)), "")
        names[key] = root + renamed.get(begin, "") + key.removeprefix(root + begin)
    (tmp_path / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    save_file({names[key]: tensor for key, tensor in state.items()}, tmp_path / WEIGHTS)

    # A part alone is refused before anything changes
    for part in ("llm", "vit"):
        with pytest.raises(InputError, match="it changes llm and vit: say --lora-on llm,vit"):
            vlm.load_lora(tmp_path, [part])
    assert not lora_layers(vlm)
    vlm.load_lora(tmp_path, ["vit", "llm"])
    close(logits(vlm, golden), golden["logits"], 1e-3)
    assert lora_layers(vlm.llm) and lora_layers(vlm.vit) and not lora_layers(vlm.adapter)


@pytest.mark.slow
def test_a_run_begins_with_a_lora_of_the_whole(fixtures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        picture(20 + i, 30).save(f"{i}.png")
    Path("captions.csv").write_text("image,caption\n" + "".join(f"{i}.png,It is {i}\n" for i in range(4)))
    for name in ("llava_qwen", "smolvlm"):  # with a LoRA of the tied head; with one of the connector
        folder = fixtures / "lora" / f"whole_{name}"
        options = ["--from", fixtures / name, "--data", "captions.csv", *QUICK_SET, "--precision", "float32"]
        options += ["--lora-from", folder, "--steps", "1"]
        assert command(monkeypatch, train, *options, "--out", "none") == 2
        assert "it changes llm and vit: say --lora-on llm,vit" in capsys.readouterr().err
        options += ["--lora-on", "llm,vit"]
        golden = load_file(folder / "golden.safetensors")
        for rate, same in (("0", True), ("0.1", False)):
            run = f"{name}-{rate}"
            assert command(monkeypatch, train, *options, "--lr", rate, "--out", run) == 0
            found = logits(VLM.from_pretrained(run), golden)
            assert ((found - golden["logits"]).abs().max() < 1e-3) == same
        assert command(monkeypatch, sample, "0.png", "--model", run, "--merge-lora", "--max-tokens", "3") == 0


def test_a_lora_of_a_part_has_the_names_of_its_own_class(fixtures, tmp_path):
    """One of the language model alone, trained on that alone: there is no "language_model" in its names."""
    vlm, root = VLM.from_pretrained(str(fixtures / "llava")), "base_model.model."
    folder = fixtures / "lora" / "whole_llava"
    state, inner = load_file(folder / WEIGHTS), f"{root}model.language_model."
    (tmp_path / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | {
        "modules_to_save": None}))
    save_file({key.replace(inner, f"{root}model."): tensor for key, tensor in state.items()
               if key.startswith(inner)}, tmp_path / WEIGHTS)
    vlm.load_lora(tmp_path, ["llm"])
    assert len(lora_layers(vlm.llm)) == len(lora_layers(vlm)) == 4
    with pytest.raises(InputError, match="is not a tensor of this model"):
        VLM.from_pretrained(str(fixtures / "llava")).load_lora(tmp_path, ["vit"])
    save_file({key: tensor for key, tensor in state.items() if key.startswith(inner)}, tmp_path / WEIGHTS)
    vlm = VLM.from_pretrained(str(fixtures / "llava"))
    with pytest.raises(InputError, match="it changes llm: say --lora-on llm"):
        vlm.load_lora(tmp_path, ["vit"])
    with pytest.raises(InputError, match="no low-rank update in it is of this ViT"):
        vlm.load_lora(tmp_path, ["vit", "llm"])


@torch.no_grad()
def test_the_built_in_backbones_as_public_models(tmp_path):
    """Nothing is lost where LLaVA's layout wants a CLIP, normed before its blocks, and BLIP-2's an EVA."""
    start.make(tmp_path)
    vit, llm = ViT.from_pretrained("assets/vit"), LLM.from_pretrained("assets/llm")
    scenes = [Scene.draw_from(f"{i}").picture() for i in range(4)]
    pixels, tokens = torch.stack([vit.preprocess(scene) for scene in scenes]), torch.arange(300)[None]
    for name in ("llava", "blip2"):
        vlm = VLM.from_pretrained(str(tmp_path / name))
        assert all(torch.equal(vlm.vit.preprocess(scene), x) for scene, x in zip(scenes, pixels))
        wanted, features = vit(pixels, vlm.config.get("layer")), vlm.features(pixels)
        if name == "llava":  # a mean that no norm sees, and channels that hold nothing
            assert not features[..., vit.config.width:].any()
            wanted, features = wanted - wanted.mean(-1, keepdim=True), features[..., :vit.config.width]
        close(features, wanted, 2e-3)
        close(vlm.llm(tokens)[..., :-1], llm(tokens))
        assert len(vlm.caption(scenes, max_tokens=3)) == 4


@pytest.mark.parametrize("name", ("llava", "blip2_opt", "smolvlm", "nanovlm", "internvl"))
def test_a_run_goes_back_to_the_layout_it_came_from(name, fixtures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        picture(20 + i, 30).save(f"{i}.png")
    Path("c.csv").write_text("image,caption\n" + "".join(f"{i}.png,It is {i}\n" for i in range(4)))
    options = ["--from", fixtures / name, "--data", "c.csv", "--val", "c.csv", *QUICK_SET, "--batch", "4"]
    options += ["--lora", "2", "--lora-on", "llm,vit", "--lora-targets", "all", "--lr", "0.05"]
    assert command(monkeypatch, train, *options, "--precision", "float32", "--out", "run") == 0
    assert command(monkeypatch, sample, "--model", "run", "--export", "public") == 0
    assert {path.name for path in Path("public").iterdir()} == {
        path.name for path in (fixtures / name).iterdir()} - {"golden.safetensors"}
    before, run, after = (VLM.from_pretrained(str(model)) for model in (fixtures / name, "run", "public"))
    merge_lora(run)
    moved = {key: p for key, p in run.named_parameters() if not torch.equal(p, before.get_parameter(key))}
    assert {key.partition(".")[0] for key in moved} == {"llm", "vit", "adapter"}
    for key, p in run.named_parameters():  # rounded once, as the files are
        assert torch.equal(p.bfloat16(), after.get_parameter(key).bfloat16()), key
    was, now = (load_file(folder / "model.safetensors") for folder in (fixtures / name, Path("public")))
    assert was.keys() == now.keys() and 0 < sum(torch.equal(was[key], now[key]) for key in was) < len(was)
    capsys.readouterr()
    assert command(monkeypatch, sample, "--model", "run", "--export", "public") == 2
    assert "public: there is something already" in capsys.readouterr().err
    assert not [*Path().glob(".*tmp")]


def test_an_export_changes_every_tensor_that_depends_on_what_was_trained(fixtures, tmp_path, capsys):
    """A tied pair that is saved twice; a class token, which ours adds to its position."""
    origin = tmp_path / "origin"
    shutil.copytree(fixtures / "llava_qwen", origin)
    state = load_file(origin / "model.safetensors")
    [embedding] = [name for name in state if name.endswith("embed_tokens.weight")]
    save_file(state | {"lm_head.weight": state[embedding].clone()}, origin / "model.safetensors")
    with torch.no_grad():
        vlm = VLM.from_pretrained(str(origin))
        vlm.llm.embedding.weight[3] += 1
        vlm.export(tmp_path / "qwen")
        vlm = VLM.from_pretrained(str(fixtures / "llava"))
        vlm.vit.prefix += 0.5
        wanted = vlm.vit.prefix.clone()
        vlm.export(tmp_path / "llava")
    again = VLM.from_pretrained(str(tmp_path / "qwen"))
    assert again.llm.head.weight is again.llm.embedding.weight and not capsys.readouterr().err
    assert torch.equal(again.llm.embedding.weight[3].bfloat16(), (state[embedding][3] + 1).bfloat16())
    assert torch.allclose(VLM.from_pretrained(str(tmp_path / "llava")).vit.prefix, wanted, atol=0.02)


@pytest.mark.parametrize("vit, kind, adapter, config", exports.RUNS)
@torch.no_grad()
def test_a_run_of_ours_becomes_a_public_layout(vit, kind, adapter, config, fixtures, tmp_path):
    """Read back it is a member of the family, whose reading by the reference other tests prove, and says the
    same. (What transformers says: fixtures/exports.py.)"""
    torch.manual_seed(0)
    run = exports.own(fixtures / vit, exports.language_model(tmp_path / "llm", kind), adapter, **config)
    run.export(tmp_path / "public")
    again = VLM.from_pretrained(str(tmp_path / "public"))
    assert family_of(read_json(tmp_path / "public/config.json")) == TARGETS[adapter].kind
    shown = picture(30, 30)
    ids, _ = run.processor.encode("a large star", images=1)
    tokens, where = torch.tensor([ids]), torch.arange(len(ids))
    logits = []
    for vlm in (run, again):
        pixels = vlm.vit.preprocess.tiles(shown, split=False)[0]
        logits.append(vlm.logits(tokens, vlm.features(pixels), where))
    close(logits[1][:, :440], logits[0], 1e-3)

    # It reads pictures and text as it did, and answers alike
    assert again.processor.encode("a large star", images=1)[0] == ids
    assert again.caption([shown], "a", max_tokens=8) == run.caption([shown], "a", max_tokens=8)

    # The tokenizer spells an image as it was trained, and what was none of its words is never said
    tokenizer = Tokenizer.from_pretrained(str(tmp_path / "public"))
    template = (tmp_path / "public/chat_template.jinja").read_text()
    [text] = re.findall(r"'image' %}(.*){% else", template)
    if adapter == "pixelshuffle":  # Idefics3's processor puts these around an image
        text = "<fake_token_around_image><global-img><image><fake_token_around_image>"
    if adapter != "qformer":  # their processors repeat it
        text = text.replace("<image>", "<image>" * run.adapter.queries)
    begin = run.processor.marker
    assert tokenizer.prefix + tokenizer.encode(f"{text}a large star") == ids and begin in ids
    said = read_json(tmp_path / "public/generation_config.json")
    assert said["suppress_tokens"] == [begin, begin + 1, begin + 2] and 0 in said["eos_token_id"]
    assert all(b"\n" in tokenizer.bytes[id] for id in said["eos_token_id"] if id)


@pytest.mark.parametrize("vit, adapter, config, reason", (
    ("clip", "linear", {}, "no public layout has the linear adapter"),
    ("clip", "pixelshuffle", dict(adapter_sizes=dict(scale=5)), "no place for an encoder of model_type clip"),
    ("siglip", "mlp", {}, "no place for the output of SigLIP's last norm"),
    ("siglip", "pixelshuffle", dict(adapter_sizes=dict(scale=5), layer=2), "no place for --layer 2"),
    ("siglip", "pixelshuffle", dict(adapter_sizes=dict(scale=4)), "no place for squares beyond the grid"),
    ("clip", "mlp", dict(image_size=24), "an encoder of 24 px, whose file has another size"),
    ("clip", "mlp", dict(image_position="xy"), "no place for --image-position xy")))
def test_what_has_no_public_layout_is_not_exported(vit, adapter, config, reason, fixtures, tmp_path):
    run = exports.own(fixtures / vit, "assets/llm", adapter, **config)
    with pytest.raises(InputError, match=reason):
        run.export(tmp_path / "public")
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_export_by_the_command_line(fixtures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--adapter", "mlp", "--vit", fixtures / "clip", "--out", "run", "--quiet"]
    assert command(monkeypatch, train, *options, *QUICK) == 0
    assert command(monkeypatch, sample, "--model", "run", "--export", "public") == 0
    picture(30, 20).save("a.png")
    assert command(monkeypatch, sample, "a.png", "--model", "public", "--max-tokens", "3") == 0
    capsys.readouterr()
    assert command(monkeypatch, sample, "--model", "run", "--export", "public") == 2
    assert "public: there is something already" in capsys.readouterr().err
    assert command(monkeypatch, train, "--adapter", "linear", "--out", "other", "--quiet", *QUICK) == 0
    assert command(monkeypatch, sample, "--model", "other", "--export", "new") == 2
    assert "no public layout has the linear adapter" in capsys.readouterr().err
    assert command(monkeypatch, sample, "a.png", "--export", "new") == 2
    assert "give one or more pictures, --data, or --export" in capsys.readouterr().err
    assert not Path("new").exists()
