"""The tokenizer equals the reference implementation, and GPT-2's published vectors."""
import json

import pytest

from llm import Tokenizer


@pytest.mark.parametrize("name", ("gpt2", "digits", "split"))
def test_tokenizer_equals_reference(name, fixtures):
    folder = fixtures / f"tokenizer_{name}"
    tokenizer = Tokenizer.from_pretrained(str(folder))
    for text, ids, decoded in json.loads((folder / "golden.json").read_text()):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == decoded
    end = tokenizer.special["<|endoftext|>"]
    assert end not in tokenizer.encode("<|endoftext|>", special=False)  # text that spells control is data
    assert tokenizer.decode([end], special=False) == ""
    assert tokenizer.decode(tokenizer.encode("half \ud83d")) == "half \ufffd"


def test_gpt2_vectors(shared):
    folder = shared / "tokenizers" / "gpt2"
    tokenizer = Tokenizer.from_pretrained(str(folder))
    texts = (folder / "vectors.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    lines = (folder / "vectors.out").read_text().splitlines()
    assert len(texts) == len(lines) > 40
    for text, line in zip(texts, lines):
        assert tokenizer.encode(text) == [int(i) for i in line.split()], text
