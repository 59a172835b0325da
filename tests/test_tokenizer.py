"""The tokenizer equals the reference implementation, and GPT-2's published vectors."""
import itertools
import json

import pytest
import torch

from compare_tokenizers import hard_strings
from formats.files import InputError
from formats.tokenizer import Tokenizer


FAMILIES = ("gpt2", "opt", "neox", "prefix_space", "smollm2", "gaps", "gaps_unknown", "gaps_fused",
            "llama3", "qwen2", "qwen2_files",
            "llama2", "mistral", "metaspace", "phi3", "flags", "gemma", "unknown", "crossing")


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_equals_reference(family, fixtures):
    folder = fixtures / f"tokenizer_{family}"
    tokenizer = Tokenizer.from_pretrained(str(folder))
    golden = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    assert tokenizer.prefix == golden["prefix"]
    for row in golden["texts"]:
        text, ids = row["text"], row["ids"]
        decoded = row.get("decoded", text)
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.encode(text, special=False) == row.get("plain", ids), text
        assert tokenizer.decode(ids) == decoded == tokenizer.decode(torch.tensor(ids))
        assert tokenizer.decode(ids, special=False) == row.get("shown", decoded)
    for ids, decoded, shown in golden["cut"]:
        assert tokenizer.decode(ids) == decoded
        assert tokenizer.decode(ids, special=False) == shown


def test_gpt2_vectors(shared):
    folder = shared / "tokenizers" / "gpt2"
    tokenizer = Tokenizer.from_pretrained(str(folder))
    texts = (folder / "vectors.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    lines = (folder / "vectors.out").read_text().splitlines()
    assert len(texts) == len(lines) > 40
    for text, line in zip(texts, lines):
        assert tokenizer.encode(text) == [int(i) for i in line.split()], text


@pytest.mark.parametrize("folder", ("tokenizers/gpt2", "checkpoints/caption-lm-llama"))
def test_real_vocabularies_lose_nothing(folder, shared):
    tokenizer = Tokenizer.from_pretrained(str(shared / folder))
    for _, text in itertools.islice(hard_strings(20_000, list(tokenizer.special), seed=3), 500):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, special=False), special=False) == text


@pytest.mark.parametrize("family", ("gpt2", "llama2", "gemma"))
def test_text_is_data(family, fixtures):
    tokenizer = Tokenizer.from_pretrained(str(fixtures / f"tokenizer_{family}"))
    for token, id in tokenizer.special.items():
        assert tokenizer.encode(token) == [id] and tokenizer.decode([id]) == token
        assert tokenizer.decode([id], special=False) == ""
        assert id not in tokenizer.encode(token, special=False)
    assert tokenizer.decode(tokenizer.encode("half \ud83d")) == "half \ufffd"
    newlines = {id for id, token in tokenizer.bytes.items() if b"\n" in token}
    assert newlines & {*tokenizer.encode("a\nb")} and not newlines & {*tokenizer.encode("a b")}
    assert tokenizer.decode([10 ** 6]) == ""


def test_other_files_add_what_tokenizer_json_lacks(fixtures, tmp_path):
    file = json.loads((fixtures / "tokenizer_gpt2" / "tokenizer.json").read_text(encoding="utf-8"))
    end = file["added_tokens"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    assert Tokenizer.from_pretrained(str(tmp_path)).special == {}
    roles = {"eos_token": end["content"], "bos_token": {"content": "<image>"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(roles))
    image = dict(content="<image>", lstrip=True, rstrip=False, single_word=False, normalized=False,
                 special=True)
    config = {"added_tokens_decoder": {"900": image}, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_pretrained(str(tmp_path))
    assert tokenizer.special == {end["content"]: end["id"], "<image>": 900} and tokenizer.prefix == [900]
    assert tokenizer.encode("a \n<image>") == [*tokenizer.encode("a"), 900]
    (tmp_path / "special_tokens_map.json").unlink()  # nothing says which token begins a text
    assert Tokenizer.from_pretrained(str(tmp_path)).prefix == []


@pytest.mark.parametrize("change, name", [
    ({"model": {"type": "WordPiece", "vocab": {}}}, "WordPiece"),
    ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
    ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
    ({"pre_tokenizer": None}, "pre-tokenizer"),
    ({"decoder": {"type": "Metaspace"}}, "Metaspace"),
    ({"post_processor": {"type": "BertProcessing"}}, "BertProcessing"),
    ({"added_tokens": [{"content": "x"}]}, "special")])
def test_refuses_by_name(change, name, fixtures, tmp_path):
    file = json.loads((fixtures / "tokenizer_gpt2" / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(file | change))
    with pytest.raises(InputError, match=name):
        Tokenizer.from_pretrained(str(tmp_path))


def test_a_byte_without_a_token_is_left_out_before_its_neighbours_merge(fixtures):
    tokenizer = Tokenizer.from_pretrained(str(fixtures / "tokenizer_gaps"))
    assert tokenizer.encode("'\x04'\x06'") == tokenizer.encode("'''") != tokenizer.encode("'") * 3
    assert tokenizer.encode("a\x04") == tokenizer.encode("a") and tokenizer.encode("\x04\x06") == []
    for text in ("the dog runs " * 300, " " * 700 + "a", "a" * 700, "\n" + " " * 300 + "\n!", "it's"):
        assert tokenizer.encode(text + "\x04") == tokenizer.encode(text)  # whatever the window it is cut in


@pytest.mark.parametrize("kind, reason", [
    ("RobertaTokenizer", "how RobertaTokenizer cuts a text isn't known here"), ("GPT2TokenizerFast", None)])
def test_the_class_decides_how_vocab_json_is_read(kind, reason, fixtures, tmp_path):
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).write_bytes((fixtures / "tokenizer_opt" / file).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    if reason is None:
        assert Tokenizer.from_pretrained(str(tmp_path)).encode("a dog")
        (tmp_path / "tokenizer_config.json").unlink()
        (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
        reason = "how roberta cuts a text isn't known here"
    with pytest.raises(InputError, match=reason):
        Tokenizer.from_pretrained(str(tmp_path))


def test_a_model_file_alone_is_not_enough(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file \(tokenizer\.model isn't read\)"):
        Tokenizer.from_pretrained(str(tmp_path))


def test_refuses_a_token_that_a_missing_merge_could_make(fixtures, tmp_path):
    file = json.loads((fixtures / "tokenizer_llama3" / "tokenizer.json").read_text(encoding="utf-8"))
    merges = file["model"]["merges"]
    file["model"]["merges"] = [m for m in merges if "".join(m) != "".join(merges[-1])]
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(InputError, match="merge"):
        Tokenizer.from_pretrained(str(tmp_path))
