"""A caption comes back to its last character, with every kind of vocabulary; tokens without an embedding."""
import json
from pathlib import Path

import pytest
import torch

import sample
import train
from adapters import VLM
from data import LAST
from fixtures.pictures import picture
from formats.files import InputError
from formats.tokenizer import Tokenizer
from llm import LLM, LLMConfig
from test_vlm import QUICK_SET, command
from vit import ViT

CAPTIONS = ("A dog runs.", "The discount is 50%", "It is f(x)", 'The sign says "stop"', "What is it?",
            "A dog", "…", "naïve 日本", "\x04", "two  spaces")


def vocabulary(name: str, fixtures: Path, folder: Path) -> Tokenizer:
    """The tokenizer of a fixture; "joined": one whose tokens join a sign and a newline, as Qwen's and Llama
    3's do; "no newline": one that has no token for it."""
    fixture = {"joined": "qwen2", "no newline": "smollm2"}.get(name, name)
    file = json.loads((fixtures / f"tokenizer_{fixture}" / "tokenizer.json").read_text(encoding="utf-8"))
    model = file["model"]
    if name == "joined":
        free = max(model["vocab"].values()) + len(file["added_tokens"]) + 1
        for i, sign in enumerate('.%)"?'):
            model["merges"].append([sign, "Ċ"])
            model["vocab"][sign + "Ċ"] = free + i
    if name == "no newline":
        model["vocab"] = {token: id for token, id in model["vocab"].items() if "Ċ" not in token}
        model["merges"] = [pair for pair in model["merges"] if "Ċ" not in "".join(pair)]
    (folder / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    return Tokenizer.from_pretrained(str(folder))


def vlm_of(tokenizer: Tokenizer, fixtures: Path, **config) -> VLM:
    """A VLM of ours with a random language model for a tokenizer."""
    torch.manual_seed(0)
    sizes = dict(vocabulary=max(tokenizer.bytes) + 1, hidden=16, layers=1, heads=2, kv_heads=1, head_size=8,
                 mlp=24, max_positions=400, activation="silu", eps=1e-6, start_token=0, end_tokens=(0,),
                 tied=True)
    llm = LLM(LLMConfig(**sizes | config)).eval()
    vit = ViT.from_pretrained(str(fixtures / "vit"))
    return VLM(vit, llm, tokenizer, {"adapter": "linear", "adapter_sizes": {}})


@pytest.mark.parametrize(
    "name", ("joined", "no newline", "gpt2", "gaps", "llama3", "llama2", "gemma", "phi3"))
def test_a_caption_comes_back_to_its_last_character(name, fixtures, tmp_path):
    tokenizer = vocabulary(name, fixtures, tmp_path)
    vlm = vlm_of(tokenizer, fixtures)
    for caption in CAPTIONS:
        ids, kinds = vlm.processor.encode("", caption)
        learned = [id for id, kind in zip(ids, kinds) if kind == LAST]
        # generation stops at the last of what is learned, and not before
        assert [id in vlm.processor.ends for id in learned] == [False] * (len(learned) - 1) + [True]
        kept = tokenizer.decode(tokenizer.encode(caption, special=False))  # a byte without a token is lost
        assert vlm.processor.text(learned).strip() == kept.strip()
        assert kept == caption or name in ("gaps", "no newline")
        cut = vlm.processor.encode("", caption * 9, max_tokens=3)
        assert cut.kinds.count(LAST) == 3 or name == "gaps"  # what is cut learns no end
    # what follows the newline in one token is not of the caption
    if name != "no newline":
        assert vlm.processor.text(tokenizer.encode("A dog.\n\nNext")).strip() == "A dog."


@torch.no_grad()
def test_the_end_token_is_kept_on_request(fixtures):
    llm = LLM.from_pretrained(str(fixtures / "llama"))
    start = torch.arange(5)[None]
    whole = llm.generate(start, max_tokens=12, end_tokens=())[0]
    end = dict(max_tokens=12, end_tokens=(whole[4],))
    first = whole.index(whole[4])
    assert llm.generate(start, **end)[0] == whole[:first]
    assert llm.generate(start, keep_end=True, **end)[0] == whole[:first + 1]
    beams = [llm.generate(start, beams=3, keep_end=keep, **end)[0] for keep in (False, True)]
    assert beams[1] in (beams[0], beams[0] + [whole[4]])


def test_a_text_may_have_no_ids(fixtures):
    llm = LLM.from_pretrained(str(fixtures / "llama"))
    with pytest.raises(InputError, match="there is nothing to continue: a row is empty"):
        llm.generate([[], [3]])
    with pytest.raises(InputError, match="token 53 has no embedding: there are 53"):
        llm.generate([[53]])
    tokenizer = Tokenizer.from_pretrained(str(fixtures / "tokenizer_gaps"))
    vlm = vlm_of(tokenizer, fixtures, start_token=None)
    assert tokenizer.encode("\x04\x06") == []
    assert len(vlm.caption([picture(30, 40)], prompt="\x04\x06", max_tokens=3)) == 1
    with pytest.raises(InputError, match="nothing to continue"):
        vlm.caption([[]], prompt="\x04\x06")


def test_a_token_without_an_embedding_is_named(fixtures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    llm = Path("llm")
    llm.mkdir()
    root = Path(train.__file__).parent / "assets" / "llm"
    for path in root.iterdir():
        (llm / path.name).write_bytes(path.read_bytes())
    file = json.loads((llm / "tokenizer.json").read_text())
    token = file["added_tokens"][0] | dict(special=False)
    known = json.loads((llm / "config.json").read_text())["vocab_size"]
    file["added_tokens"] += [token | dict(id=known, content="<loc>"),
                             token | dict(id=known + 1, content="<box>")]
    (llm / "tokenizer.json").write_text(json.dumps(file))
    for i in range(6):
        picture(20 + i, 30).save(f"{i}.png")
    Path("plain.csv").write_text("image,caption\n" + "".join(f"{i}.png,a red circle\n" for i in range(6)))
    Path("odd.csv").write_text("image,caption\n" + "".join(f"{i}.png,a red circle\n" for i in range(5))
                               + "5.png,a <box> circle\n")
    options = ["--llm", llm, *QUICK_SET, "--adapter", "linear", "--workers", "0"]
    # before the first step, and in a prompt; never as the marker that has the same id elsewhere
    assert command(monkeypatch, train, *options, "--data", "odd.csv", "--out", "odd") == 2
    reason = (f"token '<box>' ({known + 1}) has no embedding: the tokenizer was extended, the language model "
              f"wasn't (it has {known})")
    assert f"5.png: {reason}" in capsys.readouterr().err and not Path("odd/metrics.jsonl").exists()
    assert command(monkeypatch, train, *options, "--data", "plain.csv", "--out", "run") == 0
    capsys.readouterr()
    assert command(monkeypatch, sample, "0.png", "--model", "run", "--prompt", "a <box>") == 2
    assert reason in capsys.readouterr().err
    assert command(monkeypatch, sample, "0.png", "--model", "run", "--prompt", "a red") == 0


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("name", ("llama", "llama_wide"))  # tied, and not
@torch.no_grad()
def test_bfloat16_takes_the_likeliest_of_float32_scores(name, packed, fixtures):
    llm = LLM.from_pretrained(str(fixtures / name), torch.bfloat16)
    weight = (llm.head or llm.embedding).weight.float()
    if packed:
        llm.pack()
    states = torch.randn(500, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = (states.float() @ weight.T).argmax(-1)
    assert torch.equal(llm.exact_logits(states).argmax(-1), wanted)
    assert not torch.equal(llm.logits(states).float().argmax(-1), wanted)
