"""LoRA does what its equation says, and reads and writes what PEFT does (see fixtures/make.py)."""
import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import sample
import train
from adapters import VLM, QFormer
from data import stack
from formats.files import InputError, read_tensors, write_tensors
from fixtures.compare import close
from fixtures.pictures import picture
from llm import LLM
from formats.peft import CONFIG, IDLE, WEIGHTS
from lora import LoRAEmbedding, LoRALinear, add_lora, load_lora, lora_layers, merge_lora, save_lora
from test_vlm import QUICK, SMALL, command, interrupt, small
from vit import ViT

DECODERS = ("gpt2", "gpt2_wide", "opt", "opt_post", "blip2", "llama", "llama_wide", "smollm3", "mistral",
            "qwen2", "qwen3", "phi3", "phi3_partial", "gpt_neox", "gpt_neox_serial", "gemma3")
ENCODERS = ("vit", "deit", "clip", "clip_vision", "siglip", "siglip_vision", "dinov2", "dinov2_swiglu",
            "dinov2_registers", "blip2_vision", "sam", "sam_vision")


HEADS = {  # fixtures with a LoRA on the embedding, on the head, on both -> the model they change
    "llama_head": "llama", "llama_embedding": "llama", "gpt2_both": "gpt2", "opt_post_both": "opt_post",
    "gemma3_embedding": "gemma3", "blip2_head": "blip2", "llama_wide_both": "llama_wide"}
OTHERS = {"text_model", "pooler", "vision_model", "mask_decoder"}  # what else in those models PEFT changed


def load(fixtures, name: str):
    name = HEADS.get(name, name)
    if name in DECODERS:
        return LLM.from_pretrained(str(fixtures / name))
    return ViT.from_pretrained(str(fixtures / name), image_size=42 if "dino" in name else None)


def shake(module, *parameters: str) -> None:
    """Moves A, B and DoRA's m away from where they start."""
    torch.manual_seed(1)
    for layer in lora_layers(module).values():
        for name in parameters or ("A", "B", "m"):
            if (p := getattr(layer, name)) is not None:
                torch.nn.init.normal_(p, 1.0 if name == "m" else 0.0, 0.2)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------------
# PEFT

@pytest.mark.parametrize("name", (*DECODERS, *ENCODERS, *HEADS))
@torch.no_grad()
def test_what_peft_wrote_is_read_and_written_alike(name, fixtures, tmp_path):
    folder, module = fixtures / "lora" / name, load(fixtures, name)
    golden, peft = load_file(folder / "golden.safetensors"), load_file(folder / WEIGHTS)
    inputs, reference = golden["inputs"], golden["outputs"]
    assert (module(inputs) - reference).abs().max() > 0.1
    load_lora(module, folder)
    close(module(inputs), reference)
    save_lora(module, tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    unsaved = {key for key in peft.keys() - saved.keys() if not key.endswith("base_layer.weight")}
    assert {key.split(".")[2] for key in unsaved} <= OTHERS
    assert all(torch.equal(tensor, peft[key]) for key, tensor in saved.items())
    theirs, ours = (json.loads((path / CONFIG).read_text()) for path in (folder, tmp_path))
    if name != "gpt2_both":  # where a head is targeted too, peft forgets it
        assert ours["fan_in_fan_out"] == theirs["fan_in_fan_out"]
    assert all(ours[key] == theirs[key] for key in ("use_dora", "bias", "lora_dropout"))
    again = load(fixtures, name)
    load_lora(again, tmp_path)  # whose ranks and alphas are spelled out
    assert torch.allclose(again(inputs), module(inputs), atol=1e-5)


# What files in PEFT's layout may say otherwise than the fixtures: (fixture, {a part of its names: theirs})
OTHER = {
    "ViT's class before it was renamed": ("vit", {
        "layers.": "encoder.layer.", "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key", "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}),
    "a ViT with a classifier": ("deit", {"layers.": "deit.layers."}),
    "CLIP's class before it was renamed": ("clip_vision", {"encoder.": "vision_model.encoder."}),
    "a language model's body alone": ("llama", {"model.layers.": "layers."}),
    "Gemma 3 with pictures": ("gemma3", {"model.layers.": "model.language_model.layers."}),
    "GPT-NeoX's class before it was renamed": ("gpt_neox", {"lm_head": "embed_out"}),
}


@pytest.mark.parametrize("case", OTHER)
@torch.no_grad()
def test_other_names_of_the_same(case, fixtures, tmp_path):
    name, renamed = OTHER[case]
    folder, root = fixtures / "lora" / name, "base_model.model."
    shutil.copy(folder / CONFIG, tmp_path)
    state = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        for old, new in renamed.items():
            key = root + key.removeprefix(root).replace(old, new, 1)
        state[key] = tensor
    assert not state.keys() & load_file(folder / WEIGHTS).keys() or name in ("vit", "gpt_neox")
    save_file(state, tmp_path / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text()) | {"modules_to_save": None, "rank_pattern": {}}
    if name == "llama":
        config["rank_pattern"] = {"v_proj": 5, "layers.1.self_attn.q_proj": 2}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    module, golden = load(fixtures, name), load_file(folder / "golden.safetensors")
    load_lora(module, tmp_path)
    close(module(golden["inputs"]), golden["outputs"])


@torch.no_grad()
def test_one_fused_matrix_where_ours_are_apart(fixtures, tmp_path):
    """q and v with an A each are one update of twice the rank; k, which isn't changed, is in it too."""
    for dora in (False, True):
        llm = load(fixtures, "gpt2")
        add_lora(llm, 3, 5, dora=dora)
        shake(llm)
        save_lora(llm, tmp_path)
        again = load(fixtures, "gpt2")
        load_lora(again, tmp_path)
        assert torch.allclose(again(tokens(2, 9)), llm(tokens(2, 9)), atol=1e-5)
        q, k = (again.get_submodule(f"blocks.0.attention.{part}") for part in "qk")
        assert q.A is k.A and len(q.A) == 6 and k.B.count_nonzero() == 0


@torch.no_grad()
def test_an_adapter_has_its_own_names(tmp_path):
    torch.manual_seed(0)
    qformer = QFormer(12, 20, 3, queries=5, layers=2, width=16, heads=2).eval()
    again, features = copy.deepcopy(qformer), torch.randn(2, 10, 12)
    add_lora(qformer, 2, 4, ["cross.q", "projection"])
    shake(qformer)
    save_lora(qformer, tmp_path)
    assert "base_model.model.blocks.0.cross.q.lora_A.weight" in load_file(tmp_path / WEIGHTS)
    load_lora(again, tmp_path)
    assert torch.equal(again(features), qformer(features)) and len(lora_layers(again)) == 2


HEAD, EMBEDDING = "base_model.model.lm_head", "base_model.model.model.embed_tokens"


@torch.no_grad()
def test_of_what_is_tied_only_what_is_targeted_changes(fixtures):
    plain = load(fixtures, "llama")
    for name, changed in (("llama_embedding", "embedding"), ("llama_head", "head")):
        llm = load(fixtures, name)
        load_lora(llm, fixtures / "lora" / name)
        assert [layer for layer in lora_layers(llm) if "." not in layer] == [changed]
        assert llm.head.weight is llm.embedding.weight and not llm.head.weight.requires_grad
        for restore in (lambda: None, merge_lora(llm)):
            hidden = torch.randn(3, 24)
            moved = [(llm.embed(tokens(9)) - llm.embedding.weight[tokens(9)]).abs().max() > 0.1,
                     (llm.logits(hidden) - F.linear(hidden, llm.embedding.weight)).abs().max() > 0.1]
            if changed == "head":
                assert moved == [False, True]
            restore()
        assert torch.equal(plain.embedding.weight, llm.embedding.weight) == (changed == "embedding")


@torch.no_grad()
def test_the_matrix_under_an_update_is_the_one_in_the_file(fixtures, tmp_path):
    """peft saves it beside the update of an embedding or a head, and loads it."""
    same, other = load(fixtures, "llama").embedding.weight, torch.randn(53, 24)
    folder = fixtures / "lora" / "llama_embedding"
    shutil.copytree(folder, tmp_path / "peft")
    for weight in (same, other):
        change(tmp_path / "peft", (), {f"{EMBEDDING}.base_layer.weight": weight.clone()})
        llm = load(fixtures, "llama")
        load_lora(llm, tmp_path / "peft")
        assert torch.equal(llm.embedding.weight, weight) and torch.equal(llm.head.weight, weight)
        save_lora(llm, tmp_path / "ours")
        saved = load_file(tmp_path / "ours" / WEIGHTS)
        assert (f"{EMBEDDING}.base_layer.weight" in saved) == (weight is other)  # it needn't be kept twice
        again = load(fixtures, "llama")
        load_lora(again, tmp_path / "ours")
        assert torch.equal(again(tokens(2, 9)), llm(tokens(2, 9)))


def test_a_base_is_a_hub_name_and_a_revision(fixtures, tmp_path):
    for name, base, revision in (("org/name@v1.0", "org/name", "v1.0"), ("org/name", "org/name", None),
                                 (str(tmp_path / "a@b"), str(tmp_path / "a@b"), None)):
        (tmp_path / "a@b").mkdir(exist_ok=True)
        llm = load(fixtures, "llama")
        add_lora(llm.blocks, 2, 2)
        llm.requires_grad_(False).name = name
        save_lora(llm, tmp_path / "saved")
        config = json.loads((tmp_path / "saved" / CONFIG).read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == (base, revision)


def test_every_option_that_peft_writes_is_known_or_refused(fixtures, tmp_path):
    """Those of peft 0.18 as a LoRA of LLaVA was published with, and of 0.21: at their defaults all pass."""
    old = dict(alora_invocation_tokens=None, arrow_config=None, corda_config=None, ensure_weight_tying=False,
               eva_config=None, layer_replication=None, loftq_config={}, lora_bias=False,
               megatron_config=None, megatron_core="megatron.core", peft_version="0.18.1",
               qalora_group_size=16, target_parameters=None, trainable_token_indices=None, use_qalora=False)
    folder = tmp_path / "llama"
    shutil.copytree(fixtures / "lora" / "llama", folder)
    change(folder, old)
    load_lora(load(fixtures, "llama"), folder)
    changing = {key for key, value in json.loads((folder / CONFIG).read_text()).items() if not value} - {
        "use_dora", "use_rslora", "fan_in_fan_out", "modules_to_save", "lora_dropout", *IDLE}
    assert {"lora_bias", "use_qalora", "ensure_weight_tying", "trainable_token_indices", "kasa_config",
            "layer_replication", "target_parameters", "lora_ga_config"} <= changing
    for key in changing:
        change(folder, {key: [1]})
        with pytest.raises(InputError, match=rf"{key} \[1\] is not supported"):
            load_lora(load(fixtures, "llama"), folder)
        change(folder, {key: None})


def change(folder, config=(), tensors=()) -> None:
    """Other values in a folder of PEFT's; None takes a tensor out."""
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | dict(config)))
    state = load_file(folder / WEIGHTS) | dict(tensors)
    save_file({key: tensor for key, tensor in state.items() if tensor is not None}, folder / WEIGHTS)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
GPT2, LLAMA = "base_model.model.transformer.", "base_model.model.model."
REFUSED = (  # (fixture, other values in its adapter_config.json, other tensors, the error)
    ("llama", {"peft_type": "LOHA"}, {}, "peft_type 'LOHA'"),
    ("llama", {"bias": "all"}, {}, "bias 'all'"),
    ("llama", {"init_lora_weights": "pissa"}, {}, "init_lora_weights 'pissa'"),
    ("llama", {"layer_replication": [[0, 2], [1, 3]]}, {}, "layer_replication"),
    ("llama", {"lora_bias": True}, {}, "lora_bias True"),
    ("llama", {"a_new_option": 1}, {}, "a_new_option 1 is not supported"),
    ("llama", {"r": "many"}, {}, "can't be read"),
    ("llama", {"rank_pattern": {"(": 2}}, {}, "can't be read"),
    ("llama", {"r": 4}, {}, r"A of 'model.layers.0.mlp.up_proj' is \(3, 24\), not \(4, 24\)"),
    ("llama", {"use_dora": True}, {}, "'model.layers.0.mlp.up_proj.weight' has .* in parts: A, B"),
    ("llama", {}, {f"{Q}.lora_B.weight": None}, "'model.layers.0.self_attn.q_proj.weight' has .*: A"),
    ("llama", {}, {f"{Q}.base_layer.weight": torch.zeros(23, 24)}, r"q_proj.weight' is \(23, 24\); blocks"),
    ("llama", {}, {f"{Q}.lora_B.weight": torch.zeros(23, 3)}, r"B of '.*' is \(23, 3\), not \(24, 3\)"),
    ("llama", {}, {f"{Q}.lora_A.weight": torch.zeros(3, 24, dtype=torch.int)}, "is not the low-rank update"),
    ("llama", {}, {f"{LLAMA}embed_tokens.lora_embedding_A": torch.zeros(3, 53)},
     "'model.embed_tokens.weight' has .* in parts: A"),
    ("llama", {}, {f"{LLAMA}embed_tokens.lora_other": torch.zeros(3, 53)}, "embed_tokens.lora_other' is not"),
    ("llama_embedding", {}, {f"{EMBEDDING}.lora_embedding_A": torch.zeros(3, 54)},
     r"A of 'model.embed_tokens' is \(3, 54\), not \(3, 53\)"),
    ("llama_embedding", {}, {f"{EMBEDDING}.base_layer.weight": torch.zeros(61, 24)},
     r"'model.embed_tokens.weight' is \(61, 24\); embedding.weight wants \(53, 24\)"),
    ("gpt2_both", {}, {f"{HEAD}.base_layer.weight": torch.zeros(53, 24)},
     "the embedding and the head under the updates differ"),
    ("llama", {}, {f"{LLAMA}layers.7.mlp.up_proj.lora_A.weight": torch.zeros(3, 24)}, "'model.layers.7.mlp"),
    ("llama", {}, {f"{LLAMA}more.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(3, 24)},
     "more than one model: model., model.more."),
    ("qwen2", {}, {"base_model.model.text.norm.weight": torch.zeros(24)}, "more than one model: norm.weight"),
    ("llama", {}, {f"{LLAMA}norm.lora_A.weight": torch.zeros(3, 24),
                   f"{LLAMA}norm.lora_B.weight": torch.zeros(24, 3)},
     "'model.norm' can't change norm, which is a RMSNorm"),
    ("llama", {}, {"base_model.model.lm_head.weight": torch.zeros(53, 24)}, "'lm_head.weight' is not"),
    ("llama", {}, {f"{LLAMA}embed_tokens.weight": torch.zeros(53, 24)}, "'model.embed_tokens.weight' is not"),
    ("llama", {"modules_to_save": ["lm_head"]}, {}, "'lm_head', one of modules_to_save, are missing"),
    ("gemma3", {}, {f"{LLAMA}norm.weight": torch.zeros(24)}, "'model.norm.weight' is not a tensor of"),
    ("gpt2", {}, {f"{GPT2}h.0.attn.c_proj.weight": torch.rand(24, 24)}, "'transformer.h.0.attn.c_proj.wei"),
    ("gpt2", {}, {f"{GPT2}h.0.attn.c_attn.base_layer.bias": None}, "bias of blocks.0.attention.q is missing"),
    ("gpt2", {}, {f"{GPT2}wpe.weight": torch.rand(41, 24)}, r"'transformer.wpe.weight' is \(41, 24\)"),
    ("sam", {}, {"base_model.model.vision_encoder.neck.conv1.lora_A.weight": torch.zeros(3, 24, 1, 1)},
     "'vision_encoder.neck.conv1"),
)


def test_what_cannot_be_is_refused_by_name(fixtures, tmp_path):
    for number, (name, config, tensors, message) in enumerate(REFUSED):
        folder = tmp_path / str(number)
        shutil.copytree(fixtures / "lora" / name, folder)
        change(folder, config, tensors)
        module = load(fixtures, name)
        before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
        with pytest.raises(InputError, match=message):
            load_lora(module, folder)
        after = module.state_dict()  # nothing was done by halves
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    (tmp_path / "0" / WEIGHTS).write_bytes(b"no tensors")
    shutil.copy(fixtures / "lora" / "llama" / CONFIG, tmp_path / "0")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_lora(load(fixtures, "llama"), tmp_path / "0")
    llm = load(fixtures, "llama")
    load_lora(llm, fixtures / "lora" / "llama")
    with pytest.raises(InputError, match="which is a LoRALinear"):
        load_lora(llm, fixtures / "lora" / "llama")
    sam = load(fixtures, "sam")
    add_lora(sam, 2, 2, "all")
    with pytest.raises(InputError, match="neck.reduce.weight has no place in PEFT's files"):
        save_lora(sam, tmp_path / "sam")
    llm = load(fixtures, "llama")
    add_lora(llm.blocks, 2, 2)  # the embedding, which is the head too, keeps its gradient
    with pytest.raises(InputError, match="embedding.weight has no place in PEFT's files"):
        save_lora(llm, tmp_path / "none")
    with pytest.raises(InputError, match="a model without a LoRA"):
        save_lora(load(fixtures, "llama"), tmp_path / "none")
    for rank, targets, message in ((0, "all", "at least 1"),
                                   (2, ["q", "query"], "called 'query': there are down, gate, k")):
        with pytest.raises(InputError, match=message):
            add_lora(load(fixtures, "llama"), rank, 2, targets)
    assert not (tmp_path / "sam").exists() and not (tmp_path / "none").exists()


# ---------------------------------------------------------------------------------------------------------
# The method

@torch.no_grad()
def test_the_equation():
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(5, 7), torch.randn(3, 5)
    A, B, m = torch.randn(2, 5), torch.randn(7, 2), torch.rand(7) + 1
    layer = LoRALinear(linear, torch.nn.Parameter(A), B, 1.5)
    weight = linear.weight + 1.5 * B @ A
    assert torch.allclose(layer(x), x @ weight.T + linear.bias, atol=1e-5)
    layer = LoRALinear(linear, torch.nn.Parameter(A), B, 1.5, m=m)
    weight = torch.stack([m[i] * row / row.norm() for i, row in enumerate(weight)])
    assert torch.allclose(layer(x), x @ weight.T + linear.bias, atol=1e-5)
    assert torch.allclose(layer.merged().weight, weight, atol=1e-6)
    dropped = LoRALinear(linear, torch.nn.Parameter(A), B, 1.5, dropout=0.5)
    assert not torch.equal(dropped(x), dropped(x)) and torch.equal(dropped.eval()(x), dropped(x))
    embedding, x = torch.nn.Embedding(5, 7), torch.tensor([[3, 0, 3]])
    for m in (None, m):
        layer = LoRAEmbedding(embedding, torch.nn.Parameter(A), B, 1.5, m=m)
        weight = embedding.weight.T + 1.5 * B @ A
        if m is not None:
            weight = m[:, None] * weight / weight.norm(dim=1, keepdim=True)
        assert torch.allclose(layer(x), weight.T[x], atol=1e-5)
        assert torch.equal(layer.merged().weight, layer.merged()(torch.arange(5)))
        assert torch.allclose(layer.merged()(x), layer(x), atol=1e-6)
    for rslora, scale in ((False, 8 / 4), (True, 8 / 2)):
        model = torch.nn.Sequential(torch.nn.Linear(5, 7))
        add_lora(model, 4, 8, "all", rslora=rslora)
        assert model[0].scale == scale


@pytest.mark.parametrize("dora", (False, True))
def test_only_the_update_is_trained_and_all_of_it(dora, fixtures):
    llm = load(fixtures, "llama")
    with torch.no_grad():
        before = llm(tokens(2, 9))
    add_lora(llm, 3, 6, "all", dora=dora)
    after = llm(tokens(2, 9))
    assert torch.allclose(after, before, atol=1e-5) and (dora or torch.equal(after, before))
    trained = [p for p in llm.parameters() if p.requires_grad]
    assert len(lora_layers(llm)) == 21 and len(trained) == 21 * (3 if dora else 2)
    assert {name.rpartition(".")[2] for name, p in llm.named_parameters() if p.requires_grad} == {
        *("ABm" if dora else "AB")}
    optimizer = torch.optim.AdamW(trained, 1e-2)
    frozen = {name: p.clone() for name, p in llm.named_parameters() if not p.requires_grad}
    for _ in range(2):  # B is zero at first: A's gradient is too
        loss = F.cross_entropy(llm(tokens(2, 9)).flatten(0, 1), tokens(18))
        loss.backward()
        optimizer.step()
    # as DistributedDataParallel wants it
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    for name, p in frozen.items():
        assert torch.equal(p, llm.get_parameter(name)) and llm.get_parameter(name).grad is None
    assert optimizer.state.keys() == set(trained)
    assert (llm(tokens(2, 9)) - before).abs().max() > 1e-3


@torch.no_grad()
def test_merged_is_the_same_and_comes_apart_again(fixtures):
    for name in ("gpt2", "qwen3", "dinov2_registers", "gpt2_both", "llama_embedding", "llama_wide_both"):
        module, folder = load(fixtures, name), fixtures / "lora" / name
        inputs = load_file(folder / "golden.safetensors")["inputs"]
        load_lora(module, folder)
        before, weights = module(inputs), {key: tensor.clone() for key, tensor in module.state_dict().items()}
        restore = merge_lora(module)
        assert not lora_layers(module)
        assert (module(inputs) - before).abs().max() < 1e-5 * before.abs().max().clamp(min=1)
        restore()
        after = module.state_dict()
        assert weights.keys() == after.keys()
        assert all(torch.equal(weights[key], after[key]) for key in weights)
        assert torch.equal(module(inputs), before)


def test_the_update_of_an_embedding_alone_is_trained(fixtures):
    for name in ("gpt2_both", "llama_wide_both"):
        llm = load(fixtures, name)
        load_lora(llm, fixtures / "lora" / name)
        names = {name for name, p in llm.named_parameters() if p.requires_grad}
        assert {name.rpartition(".")[2] for name in names} <= {*"ABm"}
        assert {"embedding.A", "embedding.B", "head.A", "head.B"} <= names
        F.cross_entropy(llm(tokens(2, 9)).flatten(0, 1), tokens(18)).backward()
        for name, p in llm.named_parameters():
            assert name not in names or p.grad.abs().sum() > 0


def test_low_precision_around_float32_updates(fixtures):
    """Frozen weights in bfloat16, or autocast over float32 ones: A, B and their gradients stay float32."""
    expected = None
    for dtype in (torch.float32, torch.bfloat16):
        llm = LLM.from_pretrained(str(fixtures / "llama"), dtype)
        torch.manual_seed(0)
        add_lora(llm, 3, 6, "all")
        shake(llm)
        for cast in (False, True):
            llm.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                logits = llm(tokens(2, 9))
            F.cross_entropy(logits.flatten(0, 1).float(), tokens(18)).backward()
            layer = llm.get_submodule("blocks.1.attention.v")
            assert layer.weight.dtype == dtype and layer.A.dtype == layer.A.grad.dtype == torch.float32
            expected = layer.B.grad.clone() if expected is None else expected
            assert F.cosine_similarity(layer.B.grad.flatten(), expected.flatten(), dim=0) > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("name", ("gpt2", "qwen3", "gpt2_both", "llama_wide_both"))  # plain, DoRA, twice
def test_compiled_without_a_break(name, fixtures):
    module, folder = load(fixtures, name), fixtures / "lora" / name
    inputs = load_file(folder / "golden.safetensors")["inputs"]
    load_lora(module, folder)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for part in (inputs[:, :9], inputs):  # the second length makes it a symbol
        outputs = compiled(part)
        assert torch.allclose(outputs, module(part), atol=1e-4)
    outputs.square().mean().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------------------------
# The VLM and its command lines

@pytest.mark.slow
def test_a_run_keeps_its_lora(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--lora", "3", "--lora-targets", "all", "--lora-on", "llm,vit", "--lora-dropout", "0.1"]
    assert command(monkeypatch, train, *SMALL, *QUICK, *options, "--out", "run") == 0
    for part in ("llm", "vit"):
        state = load_file(f"run/lora/{part}/{WEIGHTS}")
        assert all(tensor.abs().sum() > 0 for tensor in state.values())  # B has moved
        assert len(state) == len(lora_layers(getattr(VLM.from_pretrained("run"), part))) * 2
    weights = read_tensors(Path("run/checkpoint.safetensors"), "weight.")
    assert all(name[-2:] in (".A", ".B") for name in weights if name.startswith(("llm.", "vit.")))
    picture(120, 80).save("a.png")
    one, merged = VLM.from_pretrained("run"), VLM.from_pretrained("run")
    with torch.no_grad():
        pixels = one.vit.preprocess(picture(120, 80))[None]
        features = one.features(pixels)
        merge_lora(merged)
        assert not lora_layers(merged) and (merged.features(pixels) - features).abs().max() < 1e-4
        assert (features - ViT.from_pretrained("assets/vit")(pixels)).abs().max() > 1e-3
    capsys.readouterr()
    texts = []
    for how in ([], ["--merge-lora"]):
        assert command(monkeypatch, sample, "a.png", "--model", "run", "--precision", "float32", *how) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != "\n"


@pytest.mark.slow
def test_a_resumed_lora_equals_an_unbroken_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*SMALL, *QUICK, "--layer", "-2"]  # a block of the encoder isn't read
    options += ["--lora", "2", "--lora-on", "llm,vit", "--lora-dropout", "0.2"]
    assert command(monkeypatch, train, *options, "--out", "whole") == 0
    interrupt(monkeypatch, *options, "--out", "parts")
    assert command(monkeypatch, train, "--resume", "parts") == 0
    for file in ("checkpoint.safetensors", f"lora/llm/{WEIGHTS}", f"lora/vit/{WEIGHTS}"):
        whole, parts = (load_file(f"{run}/{file}") for run in ("whole", "parts"))
        assert all(torch.equal(whole[name], parts[name]) for name in whole), file


@pytest.mark.slow
def test_a_run_begins_with_a_lora(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    llm = LLM.from_pretrained("assets/llm")
    add_lora(llm, 5, 5, ["up"], dora=True)
    shake(llm)
    save_lora(llm, "peft")
    options = ["--adapter", "linear", *QUICK, "--steps", "1", "--lr", "0"]
    assert command(monkeypatch, train, *options, "--lora-from", "peft", "--out", "run") == 0
    first, last = load_file(f"peft/{WEIGHTS}"), load_file(f"run/lora/llm/{WEIGHTS}")
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
    assert command(monkeypatch, train, *options, "--lora-from", "run/lora", "--out", "next") == 0
    capsys.readouterr()
    for arguments, message in (
            (["--lora", "2", "--lora-on", "vit", "--layer", "0"], "--lora-on vit means nothing"),
            (["--lora", "2", "--lora-on", "llm,vit", "--layer", "0"], "--lora-on vit means nothing"),
            (["--lora", "2", "--lora-on", "adapter"], "unknown part 'adapter': choose from llm, vit"),
            (["--lora", "2", "--lora-targets", "q,w"], "no linear layer is called 'w'"),
            (["--lora", "2", "--lora-targets", "0.attention.q", "--lora-on", "vit", "--lora-vit-blocks", "2"],
             "no linear layer is called '0.attention.q'"),
            (["--lora", "-1"], "--lora: '-1' is not a whole number from 0 to 10,000"),
            (["--lora", "2", "--lora-from", "peft"], "leave --lora out"),
            (["--lora-from", "nowhere"], "nowhere/adapter_config.json: No such file"),
            (["--lora-from", "peft", "--lora-on", "vit"], "is not a tensor of this model"),
            (["--train", "adapter,vit", "--cache-features"], "its features change")):
        assert command(monkeypatch, train, *options, *arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1, captured.err


@pytest.mark.slow
def test_what_comes_before_the_encoders_lora_is_computed_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoded = []
    patches = ViT.begin

    def begin(self, pixels, layer, blocks):
        encoded.extend([blocks] * len(pixels))
        return patches(self, pixels, layer, blocks)

    monkeypatch.setattr(ViT, "begin", begin)
    options = ["--adapter", "linear", *QUICK, "--layer", "-2,4,2", "--lora", "2", "--lora-targets", "all"]
    options += ["--lora-on", "llm,vit", "--lora-vit-blocks", "3", "--lr", "0.01", "--steps", "2"]
    states = []
    pictures = 48 + 8 + 8  # to train on, to validate on, and unseen ones
    for run, more, blocks, times in (("first", ["--features", "kept"], 2, pictures),
                                     ("again", ["--features", "kept", "--lora", "3"], 2, 0),
                                     ("anew", ["--no-cache-features"], 2, 2 * 16 + 8 + 8),
                                     ("all", ["--lora-vit-blocks", "9", "--cache-features"], 0, pictures)):
        encoded.clear()
        assert command(monkeypatch, train, *options, *more, "--out", run) == 0
        assert encoded == [blocks] * times
        states.append(load_file(f"{run}/checkpoint.safetensors"))

    first, _, anew, whole = states
    with_lora = {name.split(".")[3] for name in first if name.startswith("weight.vit.")}
    assert with_lora == {"2", "3", "4"}
    assert {name.split(".")[3] for name in whole if name.startswith("weight.vit.")} == set("01234")
    weights = [name for name in first if name.startswith("weight.")]
    assert all((first[name] - anew[name]).abs().max() < 1e-4 for name in weights)
    assert all(first[name].any() for name in weights if name.endswith(".B"))
    assert len([*Path("kept").iterdir()]) == 3

    # A target may name a block
    options += ["--lora-on", "vit", "--lora-targets", "3.attention.q", "--cache-features"]
    assert command(monkeypatch, train, *options, "--out", "named") == 0
    named = load_file("named/checkpoint.safetensors")
    [only] = [name for name in named if name.startswith("weight.") and name.endswith(".B")]
    assert only == "weight.vit.blocks.3.attention.q.B"


def test_a_lora_that_trains_what_comes_before_the_first_block(fixtures, tmp_path, monkeypatch, capsys):
    encoder = str(fixtures / "clip_vision")
    monkeypatch.chdir(tmp_path)
    vit = ViT.from_pretrained(encoder).requires_grad_(False)
    add_lora(vit.blocks, 2, 4)
    vit.pre_norm.requires_grad_()
    save_lora(vit, "peft")
    options = ["--vit", encoder, "--adapter", "linear", *QUICK, "--steps", "1", "--warmup", "0"]
    options += ["--lora-from", "peft", "--lora-on", "vit", "--out", "run"]
    assert command(monkeypatch, train, *options, "--cache-features") == 2
    assert "it trains what comes before the encoder's first block" in capsys.readouterr().err
    assert command(monkeypatch, train, *options) == 0
    learned = load_file("run/checkpoint.safetensors")["weight.vit.pre_norm.weight"]
    assert not torch.equal(learned, vit.pre_norm.weight)


@pytest.mark.slow
def test_what_a_lora_trains_beside_it_is_trained_in_float32(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llm = LLM.from_pretrained("assets/llm")
    add_lora(llm, 2, 4)
    llm.blocks[0].norm1.requires_grad_()
    save_lora(llm, "peft")
    options = ["--adapter", "linear", *QUICK, "--steps", "2", "--precision", "bfloat16", "--warmup", "0"]
    assert command(monkeypatch, train, *options, "--lr", "1e-5", "--lora-from", "peft", "--out", "run") == 0
    state = load_file("run/checkpoint.safetensors")
    learned = state["weight.llm.blocks.0.norm1.weight"]
    assert learned.dtype == torch.float32 and (learned != llm.blocks[0].norm1.weight).float().mean() > 0.9
    assert VLM.from_pretrained("run").llm.dtype == torch.float32


@pytest.mark.slow
def test_a_resumed_run_keeps_the_lora_that_it_began_with(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part, load_part in (("llm", LLM), ("vit", ViT)):
        module = load_part.from_pretrained(f"assets/{part}")
        add_lora(module, 2, 4)
        shake(module)
        save_lora(module, f"begun/{part}")
    options = ["--adapter", "linear", *QUICK, "--lora-from", "begun"]
    assert command(monkeypatch, train, *options) == 2
    assert "begun: it changes llm and vit: say --lora-on llm,vit" in capsys.readouterr().err
    options += ["--lora-on", "llm,vit"]
    assert command(monkeypatch, train, *options, "--out", "whole") == 0
    interrupt(monkeypatch, *options, "--out", "parts")
    for part in ("llm", "vit"):  # the run that it came from has gone on since
        path = Path("begun", part, CONFIG)
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(lora_alpha=80)))
    assert command(monkeypatch, train, "--resume", "parts") == 0
    whole, parts = (load_file(f"{run}/checkpoint.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_encoder_gets_gradients_only_where_it_is_trained(fixtures):
    vlm = small(fixtures).train()
    pixels = torch.randn(2, 3, 30, 30)
    assert not vlm.features(pixels).requires_grad
    add_lora(vlm.vit.blocks, 2, 4, "all", dropout=0.5)
    shake(vlm.vit)
    vlm.train()
    assert vlm.features(pixels).requires_grad and not torch.equal(vlm.features(pixels), vlm.features(pixels))
    vlm.eval()
    assert torch.equal(vlm.features(pixels), vlm.features(pixels))  # dropout is over
    token_rows, where, targets = stack([vlm.processor.encode("", "abc"), vlm.processor.encode("", "cba")])
    logits = vlm.logits(token_rows, vlm.features(pixels), where)
    F.cross_entropy(logits, targets).backward()
    assert all(p.grad.abs().sum() > 0 for p in vlm.vit.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ("llama_head", "gpt2_both", "qwen2", "llama_wide_both"))
@torch.no_grad()
def test_a_run_keeps_what_came_with_its_lora(name, fixtures, tmp_path):
    """Also a replaced matrix of a tied pair, and biases: reloaded it is the same, and so is its export."""
    base = json.loads((fixtures / "lora" / name / CONFIG).read_text())["base_model_name_or_path"]
    made, again = (small(fixtures, llm=base) for _ in range(2))
    shutil.copytree(fixtures / "lora" / name, tmp_path / "peft")
    if name == "llama_head":
        weight = torch.randn(53, 24)
        change(tmp_path / "peft", (), {f"{HEAD}.base_layer.weight": weight})
    load_lora(made.llm, tmp_path / "peft")
    made.config["train"] = again.config["train"] = ["adapter"]
    write_tensors(tmp_path / "checkpoint.safetensors", made.state(), {"step": "1"})
    again.load_state(tmp_path / "checkpoint.safetensors")
    ids = tokens(2, 9)
    assert torch.equal(again.llm(ids), made.llm(ids))

    # So it does from a file of an older version, with what came with the LoRA in the dtype that it had
    older = made.state()
    for key in older:
        if key.startswith("weight.llm.") and not key.endswith((".A", ".B", ".m")):
            older[key] = older[key].bfloat16()
    write_tensors(tmp_path / "older.safetensors", older, {"step": "1"})
    rounded = small(fixtures, llm=base)
    rounded.config["train"] = ["adapter"]
    rounded.load_state(tmp_path / "older.safetensors")
    assert all(torch.equal(p, older[key].to(p.dtype)) for key, p in rounded.state().items())
    save_lora(again.llm, tmp_path / "export")
    fresh = load(fixtures, base)
    load_lora(fresh, tmp_path / "export")
    assert torch.allclose(fresh(ids), made.llm(ids), atol=1e-4)


def test_what_a_checkpoint_says_of_a_lora_is_not_trusted(fixtures, tmp_path):
    vlm = small(fixtures)
    vlm.config["train"] = ["adapter"]
    add_lora(vlm.llm.blocks, 2, 4, ["q"], dora=True)
    state, path = vlm.state(), tmp_path / "checkpoint.safetensors"
    name = "llm.blocks.0.attention.q"
    for key, value in ((f"scale.{name}", torch.tensor(torch.nan)), (f"weight.{name}.m", torch.ones(1)),
                       (f"weight.{name}.A", torch.ones(2, 25))):
        write_tensors(path, state | {key: value}, {"step": "1"})
        with pytest.raises(InputError, match="checkpoint.safetensors: .*attention.q"):
            small(fixtures).load_state(path)
