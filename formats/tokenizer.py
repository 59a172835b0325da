"""Text to ids and back, as a checkpoint's own files say (`Tokenizer`)."""
import functools
import heapq
import itertools
import re
import unicodedata
from pathlib import Path
from typing import Callable

import regex
import tiktoken

from formats.files import InputError, guard, read_json, whole
from formats.hub import find_checkpoint, find_file

WORD = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+"
GPT2_SPLIT = WORD + r"| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same with each digit alone: white space before a digit then stays whole, as before the text's end. The
# reference takes these digits from a newer Unicode than its regular expressions do.
DIGIT = r"\p{N}\x{11de0}-\x{11de9}\x{16ff4}-\x{16ff6}"
DIGITS_SPLIT = rf"[{DIGIT}]|{WORD}| ?[^\s\p{{L}}{DIGIT}]+|\s+(?![^\s{DIGIT}])|\s+"
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # a byte in the files of SentencePiece's kind
WHITE_SPACE = {*"\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000", *map(chr, range(0x2000, 0x200b))}
# What NFC composes or reorders, but of a newer Unicode than the reference's NFC, which leaves it as it stands
NEWER_CODES = """5c8-5c9 7fd 897-89f 8ca-8d3 9fe b53-b54 c3c cf3 d3b-d3c eba ece 1715 1abf-1af0 1df6-1dfa a82c
    105d2-105da 10d24-10d27 10d69-10d6d 10eab-10eac 10ecb-10eff 10f46-10f50 10f82-10f85 11070 11241 1133b
    113b8-113e2 1145e 11839-1183a 11930 1193d-1193e 11943 119e0 11a34 11a47 11a99 11b60-11b67 11d42
    11d44-11d45 11d97 11df0 11f00-11f03 11f34-11f5a 13440-13455 1611e-1612f 16d63-16d68 16ff0-16ff1
    1d127-1d128 1d250-1d281 1e08f 1e130-1e136 1e2ae 1e2ec-1e2ef 1e4ec-1e4ef 1e5ee-1e5ef 1e6e3-1e6f5"""
NEWER = re.compile("([%s])" % re.sub(r"\s*(\w+)", lambda code: chr(int(code[1], 16)), NEWER_CODES))


def nfc(text: str) -> str:
    """Unicode's normalisation form C, as far as the reference knows it."""
    if text.isascii():
        return text
    return "".join(unicodedata.normalize("NFC", part) for part in NEWER.split(text))


def as_pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def any_of(tokens) -> re.Pattern:
    """Finds these tokens in a text, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def as_id(id: int) -> int:
    if not isinstance(id, int) or not 0 <= id < 1 << 31:
        raise ValueError(f"{id!r} is no token's id")
    return id


def steps(part: dict | None, inner: str) -> list[dict]:
    """The steps of a part of tokenizer.json: none, the one, or those of a `Sequence`."""
    return [] if part is None else part[inner] if part["type"] == "Sequence" else [part]


class Merges:
    """Byte-pair encoding of a word (Sennrich et al., 2016, arXiv:1508.07909), as the reference does it: the
    pair listed first, the leftmost of its kind, is merged until none is left.

    A character that the vocabulary lacks becomes its bytes, spelled "<0x0A>", where the file has
    `byte_fallback`; else the unknown token, one for a run of them with `fuse_unk`; and without an unknown
    token nothing, so that its neighbours may merge.
    """

    def __init__(self, model: dict):
        self.vocabulary = model["vocab"]
        merges = [as_pair(merge) for merge in model["merges"]]
        self.ranks = {(self.vocabulary[a], self.vocabulary[b]): rank for rank, (a, b) in enumerate(merges)}
        self.merged = [self.vocabulary[a + b] for a, b in merges]
        self.unknown, self.fuse = self.vocabulary.get(model.get("unk_token")), model.get("fuse_unk")
        self.fallback, self.ignore_merges = model.get("byte_fallback"), model.get("ignore_merges")

    def spelled(self, character: str) -> list[int]:
        """Ids of one character, before any merge."""
        if character in self.vocabulary:
            return [self.vocabulary[character]]
        names = [f"<0x{byte:02X}>" for byte in character.encode()] if self.fallback else [None]
        if all(name in self.vocabulary for name in names):
            return [self.vocabulary[name] for name in names]
        return [] if self.unknown is None else [self.unknown]

    def __call__(self, word: str) -> tuple[int, ...]:
        if self.ignore_merges and word in self.vocabulary:
            return self.vocabulary[word],
        ids = []
        for character in word:
            spelled = self.spelled(character)
            if not (self.fuse and spelled == [self.unknown] == ids[-1:]):
                ids += spelled
        left, right = list(range(-1, len(ids))), [*range(1, len(ids) + 1), -1]  # neighbours, in a ring that
        ids.append(None)  # ends in nothing, which merges with nothing
        heap = [(self.ranks[pair], i) for i, pair in enumerate(itertools.pairwise(ids)) if pair in self.ranks]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = right[i]
            if self.ranks.get((ids[i], ids[j])) == rank:  # neither was merged with another since
                ids[i], ids[j], right[i] = self.merged[rank], None, right[j]
                left[right[i]] = i
                for k in (left[i], i):
                    if (rank := self.ranks.get((ids[k], ids[right[k]]))) is not None:
                        heapq.heappush(heap, (rank, k))
        return tuple(id for id in ids if id is not None)


class ByteLevel:
    """Byte-level BPE (Radford et al., 2019): a pattern cuts a text into words, whose bytes are merged.

    tiktoken does both, and fast, but must have a token for every single byte. Public vocabularies lack some
    (SmolLM2's 21, Pythia's 13): a text with such a byte is cut by tiktoken and merged by `Merges`.
    """

    # what stands for a byte in the files: a printable character for itself, for the others U+0100 and on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(b): b for b in printable}
    alphabet |= {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*printable}))}
    letters = {b: c for c, b in alphabet.items()}

    def __init__(self, model: dict, added: dict, split: str, prefix_space: bool = False):
        vocabulary, self.prefix_space = model["vocab"], prefix_space
        # tiktoken wants each token's rank to be its turn to be merged; the file's own ids may follow another
        # order. It merges any two tokens that make a third, the reference listed pairs alone: the same where
        # the list was made by training or has all pairs: no other pair that makes a token then comes about.
        ranks = {bytes([b]): i for i, b in enumerate(self.alphabet.values())}
        self.ids = [vocabulary.get(c) for c in self.alphabet]  # our rank -> the file's id
        for a, b in map(as_pair, model["merges"]):
            if ranks.setdefault(self.spell(a + b), len(ranks)) == len(self.ids):
                self.ids.append(vocabulary[a + b])
        if model.get("ignore_merges"):  # a word in the vocabulary is its token, even if no merge leads to it
            for token in vocabulary:
                word = self.spell(token)
                if token in added or word in ranks:
                    continue
                if any(word[:i] in ranks and word[i:] in ranks for i in range(1, len(word))):
                    raise ValueError(f"{token!r} is in the vocabulary, but not the merge that could make it")
                ranks[word] = len(ranks)
                self.ids.append(vocabulary[token])
        # what the pattern leaves between its matches are words too
        split = rf"{split}|(?:(?!{split})[\s\S])+"
        self.encoding = tiktoken.Encoding("file", pat_str=split, mergeable_ranks=ranks, special_tokens={})
        self.missing = None
        missing = bytes(b for c, b in self.alphabet.items() if c not in vocabulary)
        if missing:
            self.missing = re.compile(b"[%s]" % re.escape(missing))
            self.word = functools.lru_cache(1 << 16)(Merges(model))
            # finds the first word of a text: its bytes are its tokens
            single = {bytes([b]): b for b in range(256)}
            self.first = tiktoken.Encoding("first", pat_str=rf"\A(?:{split})", mergeable_ranks=single,
                                           special_tokens={})

    def spell(self, token: str) -> bytes:
        return bytes(map(self.alphabet.get, token)) if self.alphabet.keys() >= {*token} else token.encode()

    def words(self, text: str):
        """Yields a text's words, as the pattern cuts it. It looks at a window of the text at a time: one that
        goes on far enough behind the word that what comes later can't change it."""
        start, size = 0, 256
        while start < len(text):
            window = text[start:start + size]
            word = bytes(self.first.encode_ordinary(window)).decode()
            if len(window.rstrip()) < len(word) + 8 and start + size < len(text):
                size *= 2
                continue
            yield word
            start, size = start + len(word), 256

    def encode(self, text: str, first: bool) -> list[int]:
        text = " " * (self.prefix_space and text[0] != " ") + text
        try:
            if self.missing is None or not self.missing.search(text.encode()):
                return list(map(self.ids.__getitem__, self.encoding.encode_ordinary(text)))
            words = ["".join(map(self.letters.get, word.encode())) for word in self.words(text)]
            return [id for word in words for id in self.word(word)]
        except BaseException as error:  # a panic of tiktoken's is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise InputError(f"the tokenizer's pattern can't split this text ({error})") from None


class Pieces:
    """BPE in SentencePiece's manner (Kudo and Richardson, 2018): over characters, "▁" for a space."""

    def __init__(self, model: dict, prefix: str | None = None, split: bool = False):
        merges, self.prefix = [as_pair(merge) for merge in model["merges"]], prefix
        # where no merge reaches over the start of a run of "▁", what lies between two starts is a word
        across = any("▁" in (a + b).lstrip("▁") for a, b in merges)
        apart = "▁" in model["vocab"] and not across and not model.get("ignore_merges")
        self.words = re.compile("▁[^▁]*|[^▁]+" if split else "▁*[^▁]+|▁+" if apart else r"[\s\S]+")
        self.word = functools.lru_cache(1 << 16)(Merges(model))

    def spell(self, token: str) -> bytes:
        byte = BYTE.fullmatch(token)
        return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()

    def encode(self, text: str, first: bool) -> list[int]:
        if self.prefix:
            text = text.replace(" ", "▁")
            prefixed = self.prefix == "always" or first and self.prefix == "first"
            text = "▁" * (text[0] != "▁" and prefixed) + text
        return [id for word in self.words.findall(text) for id in self.word(word)]


def normaliser(step: dict) -> Callable[[str], str]:
    """What a step of tokenizer.json's normalizer makes of a text."""
    match step:
        case {"type": "NFC"}:
            return nfc
        case {"type": "Prepend", "prepend": str(prefix)}:
            return prefix.__add__
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if (
                len(new) <= len(old)):  # so that no text grows without bound
            return lambda text: text.replace(old, new)
    raise ValueError(f"the normaliser {step} is not supported")


class Tokenizer:
    """Text to ids and back, exactly as a checkpoint's tokenizer.json says.

    `prefix` are the ids that the file puts before a text (a start token, if any; `encode` leaves them out),
    `special` the ids of the special tokens by their text, `bytes` the bytes each
    id stands for.
    """

    def __init__(self, file: dict):
        model, self.prefix = file["model"], []
        if model.get("type", "BPE") != "BPE":
            raise ValueError(f"a {model['type']} model is not supported")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise ValueError(f"{option} is not supported")
        self.normalisers = [normaliser(step) for step in steps(file.get("normalizer"), "normalizers")]
        added = {token["content"]: token for token in file.get("added_tokens", []) if token["content"]}
        match pre := steps(file.get("pre_tokenizer"), "pretokenizers"):
            case [{"type": "ByteLevel"} as last] if last.get("use_regex", True):
                self.model = ByteLevel(model, added, GPT2_SPLIT, last.get("add_prefix_space"))
            case [{"type": "Digits", "individual_digits": True},
                  {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
                self.model = ByteLevel(model, added, DIGITS_SPLIT)
            case [{"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
                  {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}]:
                self.model = ByteLevel(model, added, split)
            case [{"type": "Metaspace", "replacement": "▁"} as last]:
                self.model = Pieces(model, last.get("prepend_scheme", "always"), last.get("split", True))
            case [{"type": "Split", "pattern": {"String": " "}}] | [] if " " not in self.normalise(" "):
                self.model = Pieces(model)
            case _:
                raise ValueError(f"the pre-tokenizer {pre} is not supported")
        decoder = steps(file.get("decoder"), "decoders")
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        self.strip = " " * (strip in decoder)
        known = [step["type"] for step in decoder] == ["ByteLevel"]
        if pieces := isinstance(self.model, Pieces):
            spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
            known = decoder == [
                spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *[strip] * len(self.strip)]
        if not known:
            raise ValueError(f"the decoder {decoder} is not supported")
        for step in steps(file.get("post_processor"), "processors"):
            if step["type"] == "TemplateProcessing":
                for part in itertools.takewhile(lambda part: "SpecialToken" in part, step["single"]):
                    self.prefix += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
            elif step["type"] != "ByteLevel":
                raise ValueError(f"the post-processor {step} is not supported")
        self.special = {content: token["id"] for content, token in added.items() if token["special"]}
        self.added = {}, {}  # tokens that are looked for in the text as it comes, and in the normalised text
        for content, token in added.items():
            normalised = bool(token.get("normalized"))
            self.added[normalised][self.normalise(content) if normalised else content] = token
        self.patterns = [any_of(tokens) for tokens in self.added]
        ids = model["vocab"] | {text: token["id"] for tokens in self.added for text, token in tokens.items()}
        self.bytes = {as_id(id): self.model.spell(token) for token, id in ids.items()}
        self.prefix = [*map(as_id, self.prefix)]
        self.fallback = {id for token, id in ids.items() if pieces and BYTE.fullmatch(token)}

    def add(self, token: str, id: int, special: bool = False) -> None:
        """Makes `token` stand for `id`: in every text, or with `special` where special tokens are read."""
        self.added[False][token] = {"id": as_id(id), "special": special}
        self.added[True].pop(token, None)
        self.patterns = [any_of(tokens) for tokens in self.added]
        self.special[token], self.bytes[id] = id, token.encode()

    def normalise(self, text: str) -> str:
        for step in self.normalisers:
            text = step(text)
        return text

    def cut(self, text: str, normalised: bool, special: bool, plain: range = range(0)):
        """Yields a text's added tokens and what is between: (start, None, id) and (start, text, None)."""
        end = 0  # of what has been yielded
        for match in self.patterns[normalised].finditer(text):
            token, (start, stop) = self.added[normalised][match[0]], match.span()
            if token["special"] and (not special or start in plain) or token.get("single_word") and (
                    regex.match(r"\w", text[stop:stop + 1]) or regex.match(r"\w", text[start - 1:start])):
                continue
            while token.get("lstrip") and start > end and text[start - 1] in WHITE_SPACE:
                start -= 1
            while token.get("rstrip") and stop < len(text) and text[stop] in WHITE_SPACE:
                stop += 1
            if end < start:
                yield end, text[end:start], None
            yield start, None, token["id"]
            end = stop
        if end < len(text):
            yield end, text[end:], None

    def encode(self, text: str, special: bool = True, plain: range = range(0)) -> list[int]:
        """Text to ids, without `prefix`. `special=False` reads the text of a special token as plain text:
        data, not control; so it is among the characters `plain`. Half a surrogate pair is read as U+FFFD."""
        text, ids = whole(text), []
        for start, piece, id in self.cut(text, False, special, plain):
            if piece is None:
                ids.append(id)
                continue
            data = plain.start < start + len(piece) and start < plain.stop
            for begin, part, id in self.cut(self.normalise(piece), True, special and not data):
                ids += [id] if part is None else self.model.encode(part, first=start == begin == 0)
        return ids

    def decode(self, ids: list[int], special: bool = True) -> str:
        """Ids to text; bytes that are not UTF-8 become U+FFFD. `special=False` leaves special tokens out."""
        hidden = () if special else set(self.special.values())
        text, shown = "", (id for id in ids if id in self.bytes and id not in hidden)
        for fallback, run in itertools.groupby(shown, self.fallback.__contains__):
            raw = b"".join(map(self.bytes.get, run))
            try:
                text += raw.decode()
            except UnicodeDecodeError:  # one for each byte, where the file spells characters with bytes
                text += "\ufffd" * len(raw) if fallback else raw.decode(errors="replace")
        return text.removeprefix(self.strip)

    @classmethod
    def from_pretrained(cls, name: str) -> "Tokenizer":
        """Reads the tokenizer of a checkpoint (a folder or a hub name). Raises InputError."""
        folder = find_checkpoint(name, weights=False)
        path = find_file(folder, "tokenizer.json") or find_file(folder, "vocab.json")
        if not path:
            path, model = folder / "tokenizer.json", folder / "tokenizer.model"
            raise InputError(f"{path}: no such file" + f" ({model.name} isn't read)" * model.is_file())
        config = {}
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            other = find_file(folder, file)
            config |= read_json(other) if other else {}
        with guard(path, "not a tokenizer that can be read"):
            file = read_json(path)
            if path.name == "vocab.json":
                file, config = from_vocabulary(file, config, folder)
            file = with_added_tokens(file, config, folder)
            tokenizer = cls(file)
            if config.get("add_bos_token") and not tokenizer.prefix:
                start = config["bos_token"]
                start = start["content"] if isinstance(start, dict) else start
                tokenizer.prefix = [t["id"] for t in file["added_tokens"] if t["content"] == start]
            return tokenizer


# ---------------------------------------------------------------------------------------------------------
# Files beside tokenizer.json, or instead of it

def from_vocabulary(vocabulary: dict, config: dict, folder: Path) -> tuple[dict, dict]:
    """What tokenizer.json would say, of a folder with vocab.json and merges.txt in its place; and `config`,
    tokenizer_config.json, with what the class takes where it says nothing. The class tells how a text is cut:
    config's `tokenizer_class` or, where none is named, the model's own. Raises InputError."""
    path = find_file(folder, "merges.txt") or folder / "merges.txt"
    model = folder / "config.json"
    with guard(path):
        lines = path.read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    kind = config.get("tokenizer_class")
    if kind is None:
        kind = read_json(model).get("model_type") if model.is_file() else "gpt2"
    level = {"type": "ByteLevel", "add_prefix_space": bool(config.get("add_prefix_space"))}
    match str(kind).removesuffix("Fast"):
        case "GPT2Tokenizer" | "gpt2" | "opt":
            how = {"pre_tokenizer": level}
        case "Qwen2Tokenizer" | "qwen2" | "qwen3":
            split = {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated",
                     "invert": False}
            steps = {"type": "Sequence", "pretokenizers": [split, level | {"use_regex": False}]}
            how = {"normalizer": {"type": "NFC"}, "pre_tokenizer": steps}
        case _:
            raise InputError(f"{folder / 'vocab.json'}: how {kind} cuts a text isn't known here: "
                             "tokenizer.json would say it")
    file = {"model": {"vocab": vocabulary, "merges": merges}, "decoder": level, **how}
    return file, dict.fromkeys(("eos_token", "unk_token"), "<|endoftext|>") | config


def with_added_tokens(file: dict, config: dict, folder: Path) -> dict:
    """`file`, tokenizer.json, with the added tokens that only other files of the folder tell:
    tokenizer_config.json gives them in full, or names those with a role; added_tokens.json has their ids."""
    added = {token["content"]: token for token in file.get("added_tokens") or []}
    for id, token in (config.get("added_tokens_decoder") or {}).items():
        added.setdefault(token["content"], {**token, "id": int(id)})
    # the tokens with a role are special ones
    roles = [config.get(role) for role in ("bos_token", "eos_token", "unk_token", "pad_token")]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(name) or []
        roles += more.values() if isinstance(more, dict) else more
    roles = [token["content"] if isinstance(token, dict) else token for token in roles]
    known, path = file["model"]["vocab"], find_file(folder, "added_tokens.json")
    listed = read_json(path) if path else {}
    for content in filter(None, [*roles, *listed]):
        id = known.get(content, listed.get(content))
        if id is not None:
            special = content in roles
            added.setdefault(content, dict(content=content, id=id, special=special, normalized=not special))
    return {**file, "added_tokens": list(added.values())}
