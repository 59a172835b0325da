"""Scores of captions: BLEU, CIDEr-D, and what is right about a scene."""
import collections
import math
import re

from support.answers import exact_match, vqa_accuracy
from support.shapes import SKILLS, Shapes, judge

SHARES = ("exact", *SKILLS, "matching", "exact match", "VQA")  # shown in percent
SHORT = 3  # words of an answer that is right or wrong as a whole


def words(caption: str) -> list[str]:
    """A caption's words as scores count them: lower case, no punctuation, clitics apart ("man 's")."""
    text = re.sub(r"n't\b", " n't", caption.lower().replace("cannot", "can not"))
    return re.findall(r"n't|[^\W_]+(?:[-.,/][^\W_]+)*|'(?:s|re|ve|ll|d|m)\b", text)


def ngrams(tokens: list[str], n: int) -> collections.Counter:
    return collections.Counter(zip(*(tokens[i:] for i in range(n))))


def bleu(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """BLEU-1 to -4 of a corpus (Papineni et al., 2002): a list of words a picture, and several to compare it
    with. The brevity penalty takes the reference length closest to each candidate's."""
    right, total, length, wanted = [0] * 4, [0] * 4, 0, 0
    for candidate, refs in zip(candidates, references):
        length += len(candidate)
        wanted += min((abs(len(ref) - len(candidate)), len(ref)) for ref in refs)[1]
        for n in range(4):
            most = collections.Counter()
            for ref in refs:
                most |= ngrams(ref, n + 1)
            found = ngrams(candidate, n + 1)
            right[n] += (found & most).total()
            total[n] += found.total()
    penalty = 1.0 if length >= wanted else math.exp(1 - wanted / max(length, 1e-9))
    # the tiny numbers keep an empty count from being 0/0, as in the reference implementation
    logs = [math.log((r + 1e-15) / (t + 1e-9)) for r, t in zip(right, total)]
    return [penalty * math.exp(sum(logs[:n]) / n) for n in range(1, 5)]


def cider(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """CIDEr-D of each picture of a corpus (Vedantam et al., 2015, arXiv:1411.5726), document frequencies from
    the references."""
    scores = [0.0] * len(candidates)
    for n in range(1, 5):
        frequency = collections.Counter(
            gram for refs in references for gram in {gram for ref in refs for gram in ngrams(ref, n)})

        def vector(tokens):
            weights = {gram: count * math.log(len(references) / max(1, frequency[gram]))
                       for gram, count in ngrams(tokens, n).items()}
            return weights, math.hypot(*weights.values())

        for i, (candidate, refs) in enumerate(zip(candidates, references)):
            mine, norm = vector(candidate)
            for ref in refs:
                theirs, their_norm = vector(ref)
                dot = sum(min(w, theirs[gram]) * theirs[gram] for gram, w in mine.items() if gram in theirs)
                penalty = math.exp(-(len(candidate) - len(ref)) ** 2 / (2 * 6.0 ** 2))
                scores[i] += 10 * penalty * dot / (norm * their_norm or 1.0) / 4 / len(refs)
    return scores


def rate(captions, texts: dict[int, str]) -> tuple[dict[str, float], dict[int, tuple[float, str]]]:
    """Scores of generated captions {index: text} of a set, exact scenes and skills for shapes, else BLEU and
    CIDEr-D; and how good each is, in a number and in words."""
    if isinstance(captions, Shapes):
        judged = {i: judge(text, captions.scene(i)) for i, text in texts.items()}
        kept = {skill: [j[skill] for j in judged.values() if skill in j] for skill in ("exact", *SKILLS)}
        wrong = {i: [skill for skill in SKILLS if not j.get(skill, True)] for i, j in judged.items()}
        return ({skill: sum(right) / len(right) for skill, right in kept.items() if right},
                {i: (j["exact"] - len(wrong[i]), "exact" if j["exact"] else
                     f"wrong: {', '.join(wrong[i]) or 'which is which'}") for i, j in judged.items()})
    candidates = [words(text) for text in texts.values()]
    wanted = [[words(caption) for caption in references(captions, i)] for i in texts]
    each = cider(candidates, wanted)
    row = {f"BLEU-{n + 1}": value for n, value in enumerate(bleu(candidates, wanted))}
    row["CIDEr-D"] = sum(each) / len(each)
    return row | rate_answers(captions, texts), {
        i: (value, f"CIDEr-D {value:.2f}") for i, value in zip(texts, each)}


def rate_answers(captions, texts: dict[int, str]) -> dict[str, float]:
    """Scores of a set whose questions have short answers, at most SHORT words as a median: exact match and,
    with several answers each, the accuracy of VQA. Nothing of another set."""
    wanted = {i: references(captions, i) for i in texts}
    lengths = sorted(len(answers[0].split()) for answers in wanted.values())
    if not all(captions.pairs(i)[0][0] for i in texts) or lengths[len(lengths) // 2] > SHORT:
        return {}
    found = {"exact match": exact_match}
    if min(map(len, wanted.values())) > 3:
        found["VQA"] = vqa_accuracy
    rows = {}
    for name, score in found.items():
        rows[name] = sum(score(texts[i], wanted[i]) for i in texts) / len(texts)
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """Scores by row, as a Markdown table; shares of 1 as they are, those of SHARES in percent."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["", *names], ["---", *["---:"] * len(names)]]
    for label, row in rows.items():
        shown = {name: f"{100 * x:.1f} %" if name in SHARES else f"{x:.3f}" for name, x in row.items()}
        lines.append([label, *(shown.get(name, "") for name in names)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("| " + " | ".join([label.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) + " |"
                     for label, *cells in lines)


def references(captions, i: int) -> list[str]:
    """What a caption of picture `i` is compared with: its captions that answer its first question."""
    pairs = captions.pairs(i)
    return [caption for question, caption in pairs if question == pairs[0][0]]
