"""The tokenizer equals the reference implementation, and GPT-2's published vectors."""
import json

import pytest

from llm import Tokenizer


FAMILIES = ("gpt2", "opt", "neox", "prefix_space", "smollm2", "llama3", "qwen2",
            "llama2", "mistral", "metaspace", "phi3", "flags", "gemma", "unknown", "crossing")


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_equals_reference(family, fixtures):
    folder = fixtures / f"tokenizer_{family}"
    tokenizer, golden = Tokenizer.from_pretrained(str(folder)), json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    assert tokenizer.prefix == golden["prefix"]
    for row in golden["texts"]:
        text, ids = row["text"], row["ids"]
        decoded = row.get("decoded", text)
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.encode(text, special=False) == row.get("plain", ids), text
        assert tokenizer.decode(ids) == decoded
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
