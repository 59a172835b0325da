"""Text to ids and back, as a checkpoint's own files say."""
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
# The same with each digit alone: white space before a digit then stays whole, as it does at the text's end.
# The reference takes digits from a newer Unicode than its regular expressions do: the ranges add those.
DIGIT = r"\p{N}\x{11de0}-\x{11de9}\x{16ff4}-\x{16ff6}"
DIGITS_SPLIT = rf"[{DIGIT}]|{WORD}| ?[^\s\p{{L}}{DIGIT}]+|\s+(?![^\s{DIGIT}])|\s+"
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # how SentencePiece's vocabularies spell a byte
WHITE_SPACE = set("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {
    chr(code) for code in range(0x2000, 0x200b)}
# Characters that Python's NFC changes, but not the reference's, whose Unicode is older
NEWER_CODES = """5c8-5c9 7fd 897-89f 8ca-8d3 9fe b53-b54 c3c cf3 d3b-d3c eba ece 1715 1abf-1af0 1df6-1dfa a82c
    105d2-105da 10d24-10d27 10d69-10d6d 10eab-10eac 10ecb-10eff 10f46-10f50 10f82-10f85 11070 11241 1133b
    113b8-113e2 1145e 11839-1183a 11930 1193d-1193e 11943 119e0 11a34 11a47 11a99 11b60-11b67 11d42
    11d44-11d45 11d97 11df0 11f00-11f03 11f34-11f5a 13440-13455 1611e-1612f 16d63-16d68 16ff0-16ff1
    1d127-1d128 1d250-1d281 1e08f 1e130-1e136 1e2ae 1e2ec-1e2ef 1e4ec-1e4ef 1e5ee-1e5ef 1e6e3-1e6f5"""
NEWER = re.compile("([%s])" % re.sub(r"\s*(\w+)", lambda code: chr(int(code[1], 16)), NEWER_CODES))


def nfc(text: str) -> str:
    """Normalises to Unicode's form C, as far as the reference knows it."""
    if text.isascii():
        return text
    return "".join(unicodedata.normalize("NFC", part) for part in NEWER.split(text))


def as_pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def any_of(tokens) -> re.Pattern:
    """Makes a pattern that finds these tokens in a text, the longest first."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def as_id(id: int) -> int:
    """Returns a token's id. Raises ValueError if it is none."""
    if not isinstance(id, int) or not 0 <= id < 1 << 31:
        raise ValueError(f"{id!r} is no token's id")
    return id


def as_text(token: str | dict) -> str:
    """Returns the text of a token, which some files give with its options."""
    return token["content"] if isinstance(token, dict) else token


def list_steps(part: dict | None, inner: str) -> list[dict]:
    """Lists the steps of a part of tokenizer.json: none, the one, or those of a `Sequence`."""
    if part is None:
        return []
    return part[inner] if part["type"] == "Sequence" else [part]


# ---------------------------------------------------------------------------------------------------------
# Models: the ids of a piece of text

class Merges:
    """Byte-pair encoding of a word (Sennrich et al., 2016, arXiv:1508.07909), in the reference's order: merge
    the pair that is listed first, the leftmost of its kind, until no listed pair is left.

    A character that the vocabulary lacks becomes its bytes, spelled "<0x0A>", if the file has
    `byte_fallback`; else the unknown token, one for a run of them with `fuse_unk`. Without an unknown token
    it is dropped, so that its neighbours may merge.
    """

    def __init__(self, model: dict):
        self.vocabulary = model["vocab"]
        self.unknown = self.vocabulary.get(model.get("unk_token"))
        self.fuse = model.get("fuse_unk")
        self.fallback = model.get("byte_fallback")
        self.ignore_merges = model.get("ignore_merges")
        self.ranks = {}  # pair of ids -> its place in the list
        self.merged = []  # the id that each pair makes
        for rank, merge in enumerate(model["merges"]):
            a, b = as_pair(merge)
            self.ranks[self.vocabulary[a], self.vocabulary[b]] = rank
            self.merged.append(self.vocabulary[a + b])

    def spell(self, character: str) -> list[int]:
        """Ids of one character, before any merge."""
        if character in self.vocabulary:
            return [self.vocabulary[character]]
        if self.fallback:
            names = [f"<0x{byte:02X}>" for byte in character.encode()]
            if all(name in self.vocabulary for name in names):
                return [self.vocabulary[name] for name in names]
        return [] if self.unknown is None else [self.unknown]

    def __call__(self, word: str) -> tuple[int, ...]:
        if self.ignore_merges and word in self.vocabulary:
            return (self.vocabulary[word],)
        ids = []
        for character in word:
            spelled = self.spell(character)
            repeats_unknown = spelled == [self.unknown] == ids[-1:]
            if not (self.fuse and repeats_unknown):
                ids += spelled

        # Neighbours of each id, as places in `ids`. The None at the end closes the ring: it never merges
        left = list(range(-1, len(ids)))
        right = list(range(1, len(ids) + 1)) + [-1]
        ids.append(None)

        # The pairs that may merge, by rank, then place
        heap = [(self.ranks[pair], i) for i, pair in enumerate(itertools.pairwise(ids)) if pair in self.ranks]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = right[i]
            if self.ranks.get((ids[i], ids[j])) != rank:  # one of them was merged with another since
                continue
            ids[i] = self.merged[rank]
            ids[j] = None
            right[i] = right[j]
            left[right[i]] = i

            # The new id may merge with either neighbour
            for k in (left[i], i):
                rank = self.ranks.get((ids[k], ids[right[k]]))
                if rank is not None:
                    heapq.heappush(heap, (rank, k))
        return tuple(id for id in ids if id is not None)


def byte_alphabet() -> dict[str, int]:
    """Character -> the byte that it stands for in byte-level vocabularies: a printable character stands for
    itself, U+0100 and on for the others."""
    printable = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    alphabet = {chr(byte): byte for byte in printable}
    others = sorted(set(range(256)) - set(printable))
    for i, byte in enumerate(others):
        alphabet[chr(256 + i)] = byte
    return alphabet


class ByteLevel:
    """Byte-level BPE (Radford et al., 2019): a pattern splits a text into words, whose bytes are merged.

    tiktoken does both fast, but needs a token for every single byte. Public vocabularies lack some (SmolLM2's
    21, Pythia's 13): a text with such a byte is split by tiktoken and merged by `Merges`.
    """
    alphabet = byte_alphabet()
    letters = {byte: character for character, byte in alphabet.items()}

    def __init__(self, model: dict, added: dict, split: str, prefix_space: bool = False):
        self.prefix_space = prefix_space
        ranks = self.rank_tokens(model, added)
        # what the pattern leaves between its matches are words too
        split = rf"{split}|(?:(?!{split})[\s\S])+"
        self.encoding = tiktoken.Encoding("file", pat_str=split, mergeable_ranks=ranks, special_tokens={})
        self.missing = None
        missing = bytes(byte for letter, byte in self.alphabet.items() if letter not in model["vocab"])
        if missing:
            self.missing = re.compile(b"[%s]" % re.escape(missing))
            self.merge_word = functools.lru_cache(1 << 16)(Merges(model))
            # finds the first word of a text: its bytes are its tokens
            single = {bytes([byte]): byte for byte in range(256)}
            self.first = tiktoken.Encoding("first", pat_str=rf"\A(?:{split})", mergeable_ranks=single,
                                           special_tokens={})

    def rank_tokens(self, model: dict, added: dict) -> dict[bytes, int]:
        """Makes tiktoken's {token: rank}, and `ids`, the file's id of each rank.

        tiktoken wants a token's rank to be its turn to be merged; the file's ids may follow another order.
        tiktoken merges any two tokens that make a third, the reference only listed pairs. The two agree if
        the list was made by training or has all pairs: then no other pair that makes a token comes about.
        """
        vocabulary = model["vocab"]
        ranks = {bytes([byte]): i for i, byte in enumerate(self.alphabet.values())}
        self.ids = [vocabulary.get(letter) for letter in self.alphabet]
        for a, b in map(as_pair, model["merges"]):
            token = self.spell(a + b)
            if token not in ranks:
                ranks[token] = len(ranks)
                self.ids.append(vocabulary[a + b])
        if not model.get("ignore_merges"):
            return ranks

        # A word in the vocabulary is its token, even if no merge leads to it
        for token in vocabulary:
            word = self.spell(token)
            if token in added or word in ranks:
                continue
            if any(word[:i] in ranks and word[i:] in ranks for i in range(1, len(word))):
                raise ValueError(f"{token!r} is in the vocabulary, but not the merge that could make it")
            ranks[word] = len(ranks)
            self.ids.append(vocabulary[token])
        return ranks

    def spell(self, token: str) -> bytes:
        """The bytes of a token; one with other characters, such as an added token, is plain text."""
        if set(token) <= self.alphabet.keys():
            return bytes(self.alphabet[letter] for letter in token)
        return token.encode()

    def split_words(self, text: str):
        """Yields a text's words. The pattern sees a window of the text at a time, which goes on so far behind
        the word that later text can't change it."""
        start = 0
        size = 256
        while start < len(text):
            window = text[start:start + size]
            word = bytes(self.first.encode_ordinary(window)).decode()
            if len(window.rstrip()) < len(word) + 8 and start + size < len(text):
                size *= 2
                continue
            yield word
            start += len(word)
            size = 256

    def encode(self, text: str, first: bool) -> list[int]:
        if self.prefix_space and text[0] != " ":
            text = " " + text
        try:
            if self.missing is None or not self.missing.search(text.encode()):
                return [self.ids[rank] for rank in self.encoding.encode_ordinary(text)]
            ids = []
            for word in self.split_words(text):
                ids += self.merge_word("".join(self.letters[byte] for byte in word.encode()))
            return ids
        except BaseException as error:  # tiktoken's panic is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise InputError(f"the tokenizer's pattern can't split this text ({error})") from None


class Pieces:
    """BPE in SentencePiece's manner (Kudo and Richardson, 2018): over characters, "▁" for a space.

    `prefix` ("always", "first", "never") puts "▁" before every piece of text, or the first; None leaves
    spaces to the normaliser. `split` splits words at spaces.
    """

    def __init__(self, model: dict, prefix: str | None = None, split: bool = False):
        self.prefix = prefix
        self.merge_word = functools.lru_cache(1 << 16)(Merges(model))

        # If no merge reaches over the start of a run of "▁", a text can be cut there without a change
        joined = ["".join(as_pair(merge)) for merge in model["merges"]]
        across = any("▁" in token.lstrip("▁") for token in joined)
        if split:
            words = "▁[^▁]*|[^▁]+"
        elif "▁" in model["vocab"] and not across and not model.get("ignore_merges"):
            words = "▁*[^▁]+|▁+"
        else:
            words = r"[\s\S]+"
        self.words = re.compile(words)

    def spell(self, token: str) -> bytes:
        """The bytes of a token."""
        byte = BYTE.fullmatch(token)
        return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()

    def encode(self, text: str, first: bool) -> list[int]:
        if self.prefix:
            text = text.replace(" ", "▁")
            prefixed = self.prefix == "always" or first and self.prefix == "first"
            if prefixed and text[0] != "▁":
                text = "▁" + text
        ids = []
        for word in self.words.findall(text):
            ids += self.merge_word(word)
        return ids


# ---------------------------------------------------------------------------------------------------------
# tokenizer.json

def read_normaliser(step: dict) -> Callable[[str], str]:
    """Makes a function of a step of tokenizer.json's normalizer. Raises ValueError."""
    match step:
        case {"type": "NFC"}:
            return nfc
        case {"type": "Prepend", "prepend": str(prefix)}:
            return lambda text: prefix + text
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if (
                len(new) <= len(old)):  # so that no text grows without bound
            return lambda text: text.replace(old, new)
    raise ValueError(f"the normaliser {step} is not supported")


class Tokenizer:
    """Text to ids and back, exactly as tokenizer.json (`file`) says. Raises ValueError for what it can't do.

    `prefix` has the ids that the file puts before a text (a start token, if any); `encode` leaves them out.
    `special` maps the text of each special token to its id, `bytes` each id to its bytes.
    """

    def __init__(self, file: dict):
        model = file["model"]
        if model.get("type", "BPE") != "BPE":
            raise ValueError(f"a {model['type']} model is not supported")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise ValueError(f"{option} is not supported")
        steps = list_steps(file.get("normalizer"), "normalizers")
        self.normalisers = [read_normaliser(step) for step in steps]
        added = {token["content"]: token for token in file.get("added_tokens", []) if token["content"]}
        self.model = self.read_model(model, added, list_steps(file.get("pre_tokenizer"), "pretokenizers"))
        self.strip = self.read_decoder(list_steps(file.get("decoder"), "decoders"))
        self.prefix = self.read_prefix(list_steps(file.get("post_processor"), "processors"))

        # Added tokens: some are looked for in the text as it comes (False), some after normalisation (True)
        self.special = {content: token["id"] for content, token in added.items() if token["special"]}
        self.added = {False: {}, True: {}}
        for content, token in added.items():
            normalised = bool(token.get("normalized"))
            self.added[normalised][self.normalise(content) if normalised else content] = token
        self.compile_patterns()

        # The bytes of each id
        ids = dict(model["vocab"])
        for tokens in self.added.values():
            for text, token in tokens.items():
                ids[text] = token["id"]
        self.bytes = {as_id(id): self.model.spell(token) for token, id in ids.items()}
        self.prefix = [as_id(id) for id in self.prefix]
        self.fallback = set()  # ids that spell a byte
        if isinstance(self.model, Pieces):
            self.fallback = {id for token, id in ids.items() if BYTE.fullmatch(token)}

    def read_model(self, model: dict, added: dict, steps: list[dict]) -> ByteLevel | Pieces:
        """Chooses the model that the pre-tokenizer's steps ask for."""
        match steps:
            case [{"type": "ByteLevel"} as last] if last.get("use_regex", True):
                return ByteLevel(model, added, GPT2_SPLIT, last.get("add_prefix_space"))
            case [{"type": "Digits", "individual_digits": True},
                  {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
                return ByteLevel(model, added, DIGITS_SPLIT)
            case [{"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
                  {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}]:
                return ByteLevel(model, added, split)
            case [{"type": "Metaspace", "replacement": "▁"} as last]:
                return Pieces(model, last.get("prepend_scheme", "always"), last.get("split", True))
            case [{"type": "Split", "pattern": {"String": " "}}] | [] if " " not in self.normalise(" "):
                return Pieces(model)
        raise ValueError(f"the pre-tokenizer {steps} is not supported")

    def read_decoder(self, steps: list[dict]) -> str:
        """Checks the decoder. Returns the text that it strips from the start: a space, or nothing."""
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        if isinstance(self.model, ByteLevel):
            known = [step["type"] for step in steps] == ["ByteLevel"]
        else:
            spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
            usual = [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]
            known = steps in (usual, usual + [strip])
        if not known:
            raise ValueError(f"the decoder {steps} is not supported")
        return " " if strip in steps else ""

    def read_prefix(self, steps: list[dict]) -> list[int]:
        """The ids that the post-processor puts before a text."""
        prefix = []
        for step in steps:
            if step["type"] == "TemplateProcessing":
                for part in step["single"]:
                    if "SpecialToken" not in part:
                        break
                    prefix += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
            elif step["type"] != "ByteLevel":
                raise ValueError(f"the post-processor {step} is not supported")
        return prefix

    def compile_patterns(self) -> None:
        self.patterns = {normalised: any_of(tokens) for normalised, tokens in self.added.items()}

    def add(self, token: str, id: int, special: bool = False) -> None:
        """Makes `token` stand for `id` in every text; if `special`, only when special tokens are read."""
        self.added[False][token] = {"id": as_id(id), "special": special}
        self.added[True].pop(token, None)
        self.compile_patterns()
        self.special[token] = id
        self.bytes[id] = token.encode()

    def normalise(self, text: str) -> str:
        for step in self.normalisers:
            text = step(text)
        return text

    def find_added(self, text: str, normalised: bool, special: bool, plain: range = range(0)):
        """Yields a text's added tokens and the texts between: (start, None, id) and (start, text, None)."""
        end = 0  # of the text yielded so far
        for match in self.patterns[normalised].finditer(text):
            token = self.added[normalised][match[0]]
            start, stop = match.span()

            # Is it plain text here?
            if token["special"] and (not special or start in plain):
                continue
            around = text[start - 1:start] + text[stop:stop + 1]
            if token.get("single_word") and regex.search(r"\w", around):
                continue

            # Some take in the white space around them
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
        """Turns text into ids, without `prefix`.

        With `special=False`, special tokens are read as plain text: data, not control; so they are among the
        characters `plain`. Half a surrogate pair is read as U+FFFD.
        """
        text = whole(text)
        ids = []
        for start, piece, id in self.find_added(text, False, special, plain):
            if piece is None:
                ids.append(id)
                continue
            in_plain = plain.start < start + len(piece) and start < plain.stop
            inner = self.find_added(self.normalise(piece), True, special and not in_plain)
            for inner_start, part, id in inner:
                if part is None:
                    ids.append(id)
                else:
                    ids += self.model.encode(part, first=start == 0 and inner_start == 0)
        return ids

    def decode(self, ids: list[int], special: bool = True) -> str:
        """Turns ids (a list, or a tensor (T,)) into text; bytes that are not UTF-8 become U+FFFD.
        `special=False` leaves out special tokens."""
        if hasattr(ids, "tolist"):
            ids = ids.tolist()
        hidden = set() if special else set(self.special.values())
        shown = [id for id in ids if id in self.bytes and id not in hidden]
        text = ""
        for is_byte, run in itertools.groupby(shown, self.fallback.__contains__):
            raw = b"".join(self.bytes[id] for id in run)
            try:
                text += raw.decode()
            except UnicodeDecodeError:
                # bytes that spell a character: each becomes one U+FFFD
                text += "\ufffd" * len(raw) if is_byte else raw.decode(errors="replace")
        return text.removeprefix(self.strip)

    @classmethod
    def from_pretrained(cls, name: str) -> "Tokenizer":
        """Reads the tokenizer of a checkpoint (a folder or a hub name). Raises InputError."""
        folder = find_checkpoint(name, weights=False)
        path = find_file(folder, "tokenizer.json") or find_file(folder, "vocab.json")
        if not path:
            hint = " (tokenizer.model isn't read)" if (folder / "tokenizer.model").is_file() else ""
            raise InputError(f"{folder / 'tokenizer.json'}: no such file{hint}")
        config = {}
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            other = find_file(folder, file)
            if other:
                config |= read_json(other)

        with guard(path, "not a tokenizer that can be read"):
            file = read_json(path)
            if path.name == "vocab.json":
                file, config = from_vocabulary(file, config, folder)
            file = with_added_tokens(file, config, folder)
            tokenizer = cls(file)
            if config.get("add_bos_token") and not tokenizer.prefix:
                start = as_text(config.get("bos_token"))
                tokenizer.prefix = [t["id"] for t in file["added_tokens"] if t["content"] == start]
            return tokenizer


# ---------------------------------------------------------------------------------------------------------
# Files beside tokenizer.json, or instead of it

def from_vocabulary(vocabulary: dict, config: dict, folder: Path) -> tuple[dict, dict]:
    """Makes tokenizer.json of vocab.json (`vocabulary`) and merges.txt, and completes `config`,
    tokenizer_config.json, with its class's defaults.

    The class decides how a text is split: `tokenizer_class` or, if config names none, the model's own. Raises
    InputError.
    """
    path = find_file(folder, "merges.txt") or folder / "merges.txt"
    with guard(path):
        lines = path.read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    kind = config.get("tokenizer_class")
    if kind is None:
        model = folder / "config.json"
        kind = read_json(model).get("model_type") if model.is_file() else "gpt2"

    level = {"type": "ByteLevel", "add_prefix_space": bool(config.get("add_prefix_space"))}
    file = {"model": {"vocab": vocabulary, "merges": merges}, "decoder": level}
    match str(kind).removesuffix("Fast"):
        case "GPT2Tokenizer" | "gpt2" | "opt":
            file["pre_tokenizer"] = level
        case "Qwen2Tokenizer" | "qwen2" | "qwen3":
            split = {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated",
                     "invert": False}
            steps = [split, level | {"use_regex": False}]
            file["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
            file["normalizer"] = {"type": "NFC"}
        case _:
            raise InputError(f"{folder / 'vocab.json'}: how {kind} cuts a text isn't known here: "
                             "tokenizer.json would say it")
    return file, {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"} | config


def with_added_tokens(file: dict, config: dict, folder: Path) -> dict:
    """Completes `file`, tokenizer.json, with the added tokens that only other files of the folder have:
    tokenizer_config.json (`config`) gives them in full, or by role; added_tokens.json has their ids."""
    added = {token["content"]: token for token in file.get("added_tokens") or []}
    for id, token in (config.get("added_tokens_decoder") or {}).items():
        added.setdefault(token["content"], token | {"id": int(id)})

    # Tokens with a role are special ones
    roles = [config.get(role) for role in ("bos_token", "eos_token", "unk_token", "pad_token")]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(name) or []
        roles += more.values() if isinstance(more, dict) else more
    roles = [as_text(token) for token in roles]

    # Look up the ids of those that are not given in full
    vocabulary = file["model"]["vocab"]
    path = find_file(folder, "added_tokens.json")
    listed = read_json(path) if path else {}
    for content in roles + list(listed):
        if not content:
            continue
        id = vocabulary.get(content, listed.get(content))
        if id is not None:
            special = content in roles
            added.setdefault(content, dict(content=content, id=id, special=special, normalized=not special))
    return file | {"added_tokens": list(added.values())}
