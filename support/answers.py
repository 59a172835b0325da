"""Scores of short answers: exact match, and the accuracy of VQA (Antol et al., 2015, arXiv:1505.00468), with
the normalisation and the rule of its public evaluation."""
import re

NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                   "0 0 1 2 3 4 5 6 7 8 9 10".split()))
ARTICLES = ("a", "an", "the")
SIGNS = ";:/'[]\"()=+\\_><@`,?"
CONTRACTED = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock
    oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
    something'd something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's
    who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've""".split()
CONTRACTIONS = {word.replace("'", ""): word for word in CONTRACTED}


def without_signs(text: str) -> str:
    """A text without punctuation: a sign beside a space goes, one between letters becomes a space. Where a
    comma stands between digits all signs go. A full stop goes, unless a digit follows."""
    comma = re.search(r"\d,\d", text)
    found = text
    for sign in SIGNS:
        beside = f"{sign} " in text or f" {sign}" in text
        found = found.replace(sign, "" if beside or comma else " ")
    return re.sub(r"\.(?!\d)", "", found, count=32)


def normalise(answer: str) -> str:
    """An answer in lower case, without punctuation and articles, numbers as digits."""
    words = []
    for word in without_signs(" ".join(answer.split())).lower().split():
        word = NUMBERS.get(word, word)
        if word not in ARTICLES:
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


def exact_match(answer: str, references: list[str]) -> float:
    return float(normalise(answer) in [normalise(reference) for reference in references])


def vqa_accuracy(answer: str, references: list[str]) -> float:
    """The mean over the references, each left out in turn, of min(1, how many of the others agree / 3)."""
    answer = normalise(answer)
    if len(set(references)) > 1:
        references = [without_signs(reference) for reference in references]
    agreed = [reference == answer for reference in references]
    shares = [min(1.0, (sum(agreed) - own) / 3) for own in agreed]
    return sum(shares) / len(shares)
