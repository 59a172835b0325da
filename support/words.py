"""The words of a caption, cut as for published scores.

Published BLEU and CIDEr-D count the words that coco-caption's PTBTokenizer finds: those of Stanford CoreNLP
3.4.1, in lower case and without punctuation. `words` finds the same by a table of rules, without Java. It
reads one caption at a time, where the original peeks at the next, and has no rule for what hardly occurs in
captions: markup, e-mail addresses, telephone numbers, faces of signs. `tests/fixtures/words.py` compares the
two.
"""

import re


def any_of(choices: str) -> str:
    return f"(?:{'|'.join(choices.split())})"


# Characters. Emoji are no letters; an accent may be a character of its own
LETTER = r"[^\W\d_¹²³¼-¾⁰⁴-₉⅐-↉①-⓿❶-➓〇〡-〩〸-〺\U00010000-\U0010ffff]"
ACCENT = r"[\u0300-\u036f\u0591-\u05c7\u064b-\u065e\u0901-\u0903\u093c-\u094e\u0e31-\u0e4e]"
ACCENTED = rf"(?:{LETTER}|{ACCENT}|&[AEIOUaeiou](?:acute|grave|uml);)"
ALNUM = rf"(?:{LETTER}|\d)"
APOSTROPHE = "['’]"
INSIDE = "['’‘‛`]"  # what stands for an apostrophe within a word
QUOTES = "`‘-‟‹›«»"
SYMBOL = r"[!-/:-@\[-`{-~¡-©«-±´¶-¸»-¿×÷–-‣…‰-※‾-⁂⁄⁺-⁾₊-₎₠₤€℀-⅏⅓-⅞←-⯿、。〒・！-／：-＠［-｀｛-･￠￡￥￦]"

# Parts of the rules below
CLITIC = rf"{APOSTROPHE}(?i:[smd]|re|ve|ll)"
NOT = rf"(?i:n{INSIDE}t)"
WORD = rf"{ACCENTED}(?:{ACCENTED}|\d)*"
PLAIN = rf"{WORD}(?:[.!?]{WORD})*"  # "end.Start" is one
PIECE = rf"(?:[dolDOL]{INSIDE}{ALNUM})?{ALNUM}+"
JOINED = rf"{PIECE}(?:[-_‐‑]{PIECE})*"  # t-shirt, dog_house, o'clock, 2nd
HYPHENED = r"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9]+))+"  # non-U.S., 1.5-inch
CAPITALS = "[A-Z]+(?:[+&][A-Z]+)+"  # A&W
SIDE = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"  # of a slash

# Abbreviations keep their full stop: some even before a letter, some only before a number
ALWAYS = any_of(
    r"""jan feb mar apr jun jul aug sept? oct nov dec mon tues? wed thu thurs fri al cos? corp ct jr sr rd
    rt sq est etc ext inc ltd plc pty seq sys tel assn bldg blvd bros esq intl univ ed\.d ph\.d ala
    ariz calif colo conn dak fla ga ind kans? ky md mich minn mo mont neb nev okla penn tenn va vt
    wisc? wyo (?=(?-i:[A-Z]))(?:az|ark|del|ill|la|mass|miss|ore|pa|tex|wash)"""
)
BEFORE_OTHERS = any_of(
    r"""mr mrs ms drs? ft lt mt ph ste? vs wm cf adj adm adv ave col cpl det ens gen govs? hon insp maj
    mme mlle pfc pvt reps? rev sens? sfc sgt spc alex asst assoc attys? brig capt co?mdr dept lieut
    messrs natl pres profs? supts? [a-z](?:\.[a-z])*"""
)
BEFORE_NUMBER = any_of("ca nos? op pp art figs? prop")
# A single letter before these ends a sentence: "plan B. The"
FIRST = any_of(
    r"""A About According Additionally After An As At But Earlier He Her Here However If In It Last Many
    More Mr\. Ms\. Now Once One Other Our She Since So Some Such That The Their Then There These They
    This We What When While Yet You"""
)

# Each rule is a word, and what has to follow it. At each place the rule wins that reaches furthest, with what
# has to follow; of equals the first
RULES = [
    # Plain words, some before a clitic: man|'s, do|n't
    (PLAIN, CLITIC),
    (r"[A-Za-z]*[A-MO-Za-mo-z]", NOT),
    (PLAIN, ""),
    # Apostrophes: O'Neil, Hawai'i, c'mon, 't|was, l'|amour, y'|all, 'n', 'em, '90s, '85
    (rf"[A-HJ-XZn]{INSIDE}{LETTER}{{2,}}", ""),
    (rf"{LETTER}+[aeiouyAEIOUY]{INSIDE}[aeiouA-Z]{LETTER}*", ""),
    (r"(?i:c'mon|s'mores)", ""),
    ("'[tT]", "(?i:is|was)"),
    (rf"[ldLD]{APOSTROPHE}", ""),
    (rf"[yY]{APOSTROPHE}", LETTER),
    (rf"(?i:{APOSTROPHE}(?:n{APOSTROPHE}?|em|till?|cause|[2-9]0s))", ""),
    (rf"{APOSTROPHE}\d\d", r"\s"),
    # Addresses, names: http://a.b/c, www.a.b, a.com, @name, #tag
    (r"(?i:https?://|www\.)[^\s\"()<>]*[\w/]", ""),
    (r"(?:[\w-]+\.)+(?:com|org|net|edu)", r"\b"),
    (rf"@[A-Za-z_]\w*|#{ACCENTED}+", ""),
    # Clitics
    (CLITIC, "[^A-Za-z]"),
    (NOT, ""),
    # Numbers: -1,000.5, 3:30, .5, 2 1/2, US$
    (r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)", ""),
    (r"(?:\d{1,4}[- ])?\d{1,4}/\d{1,4}", ""),
    (r"[A-Z]*\$", ""),
    # Slashes: and/or
    (rf"{SIDE}(?:/{SIDE}){{1,2}}", ""),
    # Full stops that belong to a word
    (rf"(?i:{BEFORE_NUMBER}\.)", r"\s?\d"),
    ("[A-Za-z]", rf"\.\s+{FIRST}\s"),
    (rf"(?i:{ALWAYS}\.)", r"[\s\S]{2}"),
    (rf"(?i:{BEFORE_OTHERS}\.)", ""),
    (rf"(?:{PLAIN}|{HYPHENED}|{JOINED}|{CAPITALS})\.", "[,;:、]"),
    # Words with signs, and runs of one sign
    (r"(?i:-[lr][rcs]b-|anti-|pro-|c\+\+|[cf]#|&#\d+;)", ""),
    (r"-+|@+|_+|#+|\*+|[?!]+|[⁰¹²³⁴-⁹]+|[₀-₉]+|\.{3,5}|<<|>>|\\\*", ""),
    # Joined words
    (HYPHENED, ""),
    (JOINED, ""),
    (CAPITALS, ""),
    # Quotes, an opening one before a letter: 'so
    ("'", r"[A-Za-z]\S"),
    (CLITIC, ""),
    (rf"''|[{QUOTES}]{{1,2}}|'", ""),
    (SYMBOL, ""),
]
RULES = [re.compile(f"({word})(?:{following})") for word, following in RULES]
COMMON = re.compile(r"([A-Za-z]+(?=,?\s)|[.,](?=\s)|\s+)")  # needs no rule: most of a caption

# What parts of a caption are read as, and quotes of a word found
READ = {"\n": " ", "\u00ad": ""}
READ |= {"&amp;": "&", "&nbsp;": " ", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&mdash;": "—"}
PLAIN_QUOTES = str.maketrans(dict(zip("‘‛‹’›“«”»", ["`", "`", "`", "'", "'", "``", "``", "''", "''"])))
QUOTED = re.compile(rf"n['{QUOTES}]t|['{QUOTES}]+(?:[smd]|re|ve|ll)?")

# What a word found counts as: punctuation as none, brackets as words
COUNTED = dict.fromkeys("' '' ` `` \" . ... .... ..... … ? ! , : ; - -- --- ---- – — ―".split(), "")
SIGNS = "[ ] { } ¢ £ € ¤ ¼ ½ ¾ ⅓ ⅔".split()
COUNTED |= zip(SIGNS, "-lsb- -rsb- -lcb- -rcb- cents # $ $ 1/4 1/2 3/4 1/3 2/3".split())
for parts in ("can not", "gon na", "got ta", "wan na", "lem me", "gim me"):
    COUNTED[parts.replace(" ", "")] = parts


def words(caption: str) -> list[str]:
    """Splits a caption into the words that scores count: in lower case, clitics apart ("man 's"), without
    punctuation; brackets and signs are words ("-lrb-", "&")."""
    for part, read in READ.items():
        caption = caption.replace(part, read)
    caption += "\n\n"  # something follows every word

    found = []
    place = 0
    while place < len(caption):
        match = COMMON.match(caption, place)
        if not match:
            matches = [match for rule in RULES if (match := rule.match(caption, place))]
            match = max(matches, key=re.Match.end, default=None)
        if not match:  # a character that is no word, such as an emoji
            place += 1
            continue
        place = match.end(1)

        word = match[1].lower().replace("(", "-lrb-").replace(")", "-rrb-")
        if QUOTED.fullmatch(word):
            word = word.translate(PLAIN_QUOTES)
        found += COUNTED.get(word, word).split()
    return found
