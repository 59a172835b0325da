"""Compares `Tokenizer` with the reference library, `tokenizers`, family by family: ids, decoded text, speed.

    python tests/compare_tokenizers.py TEXT [--strings 20000] [--vocabulary 8000] [--families NAME ...]
        [--folders FOLDER ...]

TEXT is a file of ordinary text of about a megabyte, on which each family's tokenizer is trained and timed.
A folder is a checkpoint's, with a tokenizer.json to compare as it is. Prints a table.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "fixtures")]

SPACES = (
    "\t\n\v\f\r\x1c\x1f \x85\xa0\u1680\u2000\u2002\u2009\u200a\u200b\u2028\u2029\u202f\u205f\u2060\u3000"
    "\ufeff▁"
)
ASSIGNED = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cs", "Cn", "Co")]
MARKS = [c for c in ASSIGNED if unicodedata.category(c)[0] == "M"]
NUMBERS = [c for c in ASSIGNED if unicodedata.category(c)[0] == "N"]
WORDS = """the a dog Dogs runs ran swimming über naïve café straße ﬁne İstanbul ǅungla ΑΣΣ книга שלום العربية
    हिन्दी ไทย 日本語 한국어 中文字 I'm it's DON'T They'LL we'Ve 'S 'ſ 'Ll ’s don’t isn't'd x'' e.g. U.S.A.
    http://a.b/c?d=e&f#g a_b __init__ camelCase HTTPServer 3.14 1,000,000 2024-01-31 0x1F 1e-9 v2.0b1 ½ ² Ⅻ ٣٤
    १२ 12th 4K #1 $5 50% €9 (a) [b] {c} <d> "e" --- ... ?! ;; // ==""".split()
CODE = [
    "def f(x):\n    return x  # why\n\n",
    "\tif (a[i] != b) {\r\n\t\tx += 1;\r\n\t}\n",
    "<td>\n<b>x</b></td>",
    "a=b+c*d//e",
    "\n\n\n",
    "    " * 3,
]
EMOJI = ["👩‍👩‍👧", "🇫🇷🇩🇪", "👍🏽", "❤️", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "😀", "\u200d", "\ufe0f", "🤷🏿‍♀️"]
FIXED = [
    "",
    " ",
    "  ",
    "▁",
    " ▁",
    "a",
    " a",
    "a ",
    "\0",
    "a\0b",
    "�",
    "\U0010ffff",
    "\ufffe",
    "x" * 300,
    "ab" * 200,
    " " * 700,
    "\n" * 300 + "a",
    "a" + " \n" * 200 + "1",
    "1" * 200,
    "é" * 100,
    "e\u0301" * 100,
    "👍" * 50,
    "<0x0A>",
    "<0x41> <unk>",
    "\r\n a\r\n",
    "'" * 60,
]


def hard_strings(count: int, added: list[str], seed: int = 0):
    """`count` texts in which tokenizers have been known to differ, as (category, text); `added` are spelled
    in some."""
    rng = random.Random(seed)

    def many(make, most: int = 8, between: str = "") -> str:
        return between.join(make() for _ in range(rng.randint(1, most)))

    def spaces() -> str:
        if rng.random() < 0.5:
            return rng.choice(SPACES) * rng.choice((1, 1, 1, 2, 3, 9))
        return " " * rng.choice((1, 1, 2, 3, 7, 20))

    def special() -> str:
        token = rng.choice(added or ["<s>"])
        cut = rng.randrange(len(token) + 1)
        return rng.choice(
            (
                token,
                token,
                token,
                token[:cut],
                token[cut:],
                token[:cut] + " " + token[cut:],
                token.upper(),
                token * 2,
            )
        )

    def plane() -> str:
        c = rng.randrange(rng.choice((0x80, 0x800, 0x10000, 0x20000, 0x110000)))
        return "" if 0xD800 <= c < 0xE000 else chr(c)

    def marks() -> str:
        often = list("\u0301\u0323\u0345\u0334\u1161\u11a8") * 40
        letter = rng.choice("aeonAΑаåகक가ᄀ一1 \U00011935")
        return letter + many(lambda: rng.choice(MARKS + often), 4)

    kinds = dict(
        planes=lambda: many(plane, 12),
        assigned=lambda: many(lambda: rng.choice(ASSIGNED), 12),
        marks=lambda: many(marks, 5),
        spaces=lambda: many(lambda: rng.choice((spaces, spaces, lambda: rng.choice("aZé1٣.'\0日")))(), 8),
        digits=lambda: many(
            lambda: rng.choice(
                (str(rng.randrange(10 ** rng.randint(1, 12))), rng.choice(NUMBERS), " ", "a", ".", " \n")
            ),
            8,
        ),
        words=lambda: many(lambda: rng.choice(WORDS), 8, " "),
        glued=lambda: many(lambda: rng.choice(WORDS + [" ", "  ", "'"]), 8),
        code=lambda: many(lambda: rng.choice(CODE + WORDS + ["\n", " "]), 6),
        emoji=lambda: many(lambda: rng.choice(EMOJI + [" ", "a"]), 6),
        added=lambda: many(lambda: rng.choice((special, special, spaces, lambda: rng.choice(WORDS)))(), 6),
        runs=lambda: rng.choice(repeated) * rng.randint(2, 60) + rng.choice(WORDS + [" x", "1"]),
    )
    repeated = ASSIGNED + list(SPACES) * 300 + list("aA1.'-=é日") * 300
    names = list(kinds)
    for i in range(count):
        if i < len(FIXED):
            yield "fixed", FIXED[i]
        elif rng.random() < 0.25:
            yield "mixed", many(lambda: kinds[rng.choice(names)](), 4)
        else:
            name = names[i % len(names)]
            yield name, kinds[name]()


def differences(tokenizer, reference, texts: list[str], seed: int = 0) -> list[tuple]:
    """The texts, or ids, on which the two differ: encoded with and without special tokens, decoded whole and
    cut."""
    rng, found, size = random.Random(seed), [], reference.get_vocab_size()

    def compare(what: str, given, special: bool, ours, theirs) -> None:
        if ours != theirs:
            found.append((what, special, given, theirs, ours))

    for special in (True, False):
        reference.encode_special_tokens = not special
        for text in texts:
            ids = reference.encode(text, add_special_tokens=False).ids
            compare("encode", text, special, tokenizer.encode(text, special), ids)
            ids = ids[rng.randint(0, 2) : len(ids) - rng.randint(0, 2)]
            ids += rng.choices(range(size), k=rng.randint(0, 3))
            for shown in (True, False):
                theirs = reference.decode(ids, skip_special_tokens=not shown)
                compare("decode", ids, shown, tokenizer.decode(ids, shown), theirs)
    reference.encode_special_tokens = False
    compare("prefix", "a b", True, [*tokenizer.prefix, *tokenizer.encode("a b")], reference.encode("a b").ids)
    return found


def speeds(make_ours, make_reference, texts: list[str], runs: int = 5) -> tuple[float, float, float]:
    """Ours and the reference's MB/s, and the ratio, one text after another: medians of interleaved runs, each
    of a new tokenizer, so that no run finds its words in a cache."""
    size = sum(len(text.encode()) for text in texts) / 1e6

    def seconds(encode) -> float:
        start = time.perf_counter()
        for text in texts:
            encode(text)
        return time.perf_counter() - start

    def reference_ids(encode):
        return lambda text: encode(text, add_special_tokens=False).ids

    pairs = [
        (seconds(make_ours().encode), seconds(reference_ids(make_reference().encode))) for _ in range(runs)
    ]
    ours, theirs = (statistics.median(column) for column in zip(*pairs))
    return size / ours, size / theirs, statistics.median(b / a for a, b in pairs)


def main() -> None:
    import tokenizers
    from make import tokenizer_families, write_tokenizer
    from formats.tokenizer import Tokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path)
    parser.add_argument("--strings", type=int, default=20_000)
    parser.add_argument("--vocabulary", type=int, default=8_000)
    parser.add_argument("--families", nargs="*")
    parser.add_argument("--folders", nargs="*", default=[])
    parser.add_argument("--show", type=int, default=3, help="differences to print for each family")
    args = parser.parse_args()
    lines = args.text.read_text(encoding="utf-8").splitlines(keepends=True)
    print(
        "| family | strings | differences | lines: ours MB/s | reference | ratio "
        "| one text: ours | reference | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")

    def row(name: str, folder: str, reference) -> None:
        tokenizer = Tokenizer.from_pretrained(folder)
        added = [token.content for token in reference.get_added_tokens_decoder().values()]
        found = differences(tokenizer, reference, [text for _, text in hard_strings(args.strings, added)])
        cells = [
            cell
            for texts in (lines, ["".join(lines)])
            for cell in speeds(
                lambda: Tokenizer.from_pretrained(folder),
                lambda: reference.from_str(reference.to_str()),
                texts,
            )
        ]
        cells = [name, args.strings, len(found), *(f"{cell:.2f}" for cell in cells)]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
        for difference in found[: args.show]:
            print(*map(ascii, difference), file=sys.stderr)

    for folder in args.folders:
        row(Path(folder).name, folder, tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json")))
    for name, reference in tokenizer_families(args.vocabulary, lines):
        if args.families is None or name in args.families:
            with tempfile.TemporaryDirectory() as folder:
                write_tokenizer(name, reference, Path(folder))
                row(name, folder, reference)


if __name__ == "__main__":
    main()
