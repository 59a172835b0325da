"""Scores of captions: BLEU and CIDEr-D or, for the built-in world, the share of scenes that are right."""
import collections
import math

from support.answers import exact_match, vqa_accuracy
from support.shapes import SKILLS, Shapes, judge
from support.words import words

SHARES = ("exact", *SKILLS, "matching", "exact match", "VQA")  # shown in percent
SHORT = 3  # words of an answer that is right or wrong as a whole


def count_ngrams(tokens: list[str], n: int) -> collections.Counter:
    return collections.Counter(tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1))


def bleu(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """Returns BLEU-1 to -4 of a corpus (Papineni et al., 2002). `candidates` has one caption a picture, in
    words; `references` has several. The brevity penalty takes the reference length closest to each
    candidate's."""
    right = [0] * 4
    total = [0] * 4
    length = 0
    closest_length = 0
    for candidate, refs in zip(candidates, references):
        length += len(candidate)
        closest_length += min((abs(len(ref) - len(candidate)), len(ref)) for ref in refs)[1]

        # An n-gram counts as right at most as often as one reference has it
        for n in range(4):
            most = collections.Counter()
            for ref in refs:
                most |= count_ngrams(ref, n + 1)
            found = count_ngrams(candidate, n + 1)
            right[n] += (found & most).total()
            total[n] += found.total()

    penalty = 1.0
    if length < closest_length:
        penalty = math.exp(1 - closest_length / max(length, 1e-9))
    # The tiny numbers keep an empty count from being 0/0, as in the reference implementation
    logs = [math.log((r + 1e-15) / (t + 1e-9)) for r, t in zip(right, total)]
    return [penalty * math.exp(sum(logs[:n]) / n) for n in range(1, 5)]


def cider(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """Returns CIDEr-D of each picture of a corpus (Vedantam et al., 2015, arXiv:1411.5726). The arguments are
    those of `bleu`. Document frequencies come from the references."""
    scores = [0.0] * len(candidates)
    for n in range(1, 5):
        # In how many pictures' references each n-gram occurs
        frequency = collections.Counter()
        for refs in references:
            frequency.update(set().union(*(count_ngrams(ref, n) for ref in refs)))

        def weigh(tokens: list[str]) -> tuple[dict[tuple, float], float]:
            """The TF-IDF weight of each n-gram, and the length of that vector."""
            weights = {}
            for gram, count in count_ngrams(tokens, n).items():
                weights[gram] = count * math.log(len(references) / max(1, frequency[gram]))
            return weights, math.hypot(*weights.values())

        # Mean over references and n of the clipped cosine, times 10
        for i, (candidate, refs) in enumerate(zip(candidates, references)):
            mine, norm = weigh(candidate)
            for ref in refs:
                theirs, their_norm = weigh(ref)
                dot = sum(min(w, theirs[gram]) * theirs[gram] for gram, w in mine.items() if gram in theirs)
                penalty = math.exp(-(len(candidate) - len(ref)) ** 2 / (2 * 6.0 ** 2))
                scores[i] += 10 * penalty * dot / (norm * their_norm or 1.0) / 4 / len(refs)
    return scores


def rate(captions, texts: dict[int, str]) -> tuple[dict[str, float], dict[int, tuple[float, str]]]:
    """Scores generated captions {index: text} of a set: exact scenes and skills for Shapes, else BLEU and
    CIDEr-D. Returns the scores, and {index: (how good, the same in words)}."""
    return rate_scenes(captions, texts) if isinstance(captions, Shapes) else rate_texts(captions, texts)


def rate_scenes(shapes: Shapes, texts: dict[int, str]):
    verdicts = {i: judge(text, shapes.scene(i)) for i, text in texts.items()}

    # The share of scenes that are right in each skill
    scores = {}
    for skill in ("exact", *SKILLS):
        right = [verdict[skill] for verdict in verdicts.values() if skill in verdict]
        if right:
            scores[skill] = sum(right) / len(right)

    ratings = {}
    for i, verdict in verdicts.items():
        wrong = [skill for skill in SKILLS if not verdict.get(skill, True)]
        words = "exact" if verdict["exact"] else f"wrong: {', '.join(wrong) or 'which is which'}"
        ratings[i] = (verdict["exact"] - len(wrong), words)
    return scores, ratings


def rate_texts(captions, texts: dict[int, str]):
    answers = {i: references(captions, i) for i in texts}
    candidates = [words(text) for text in texts.values()]
    wanted = []
    for captions_of_one in answers.values():
        wanted.append([words(caption) for caption in captions_of_one])

    each = cider(candidates, wanted)
    row = {f"BLEU-{n}": value for n, value in enumerate(bleu(candidates, wanted), start=1)}
    row["CIDEr-D"] = sum(each) / len(each)
    if all(captions.conversations(i)[0][-1][0] for i in texts):  # a question each
        row |= rate_answers(texts, answers)
    return row, {i: (value, f"CIDEr-D {value:.2f}") for i, value in zip(texts, each)}


def rate_answers(texts: dict[int, str], wanted: dict[int, list[str]]) -> dict[str, float]:
    """Scores answers {index: text} against those that are `wanted`, if these are short.

    Short means at most SHORT words as a median.
    Gives exact match and, with several answers each, the accuracy of VQA.
    """
    lengths = sorted(len(answers[0].split()) for answers in wanted.values())
    if lengths[len(lengths) // 2] > SHORT:
        return {}
    found = {"exact match": exact_match}
    if min(map(len, wanted.values())) > 3:
        found["VQA"] = vqa_accuracy
    rows = {}
    for name, score in found.items():
        rows[name] = sum(score(texts[i], wanted[i]) for i in texts) / len(texts)
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """Writes {row: {score: value}} as a Markdown table; the scores in SHARES in percent."""
    # All names, in the order in which they come up
    names = []
    for row in rows.values():
        names += [name for name in row if name not in names]

    lines = [[""] + names, ["---"] + ["---:"] * len(names)]
    for label, row in rows.items():
        cells = [label]
        for name in names:
            if name not in row:
                cells.append("")
            else:
                cells.append(f"{100 * row[name]:.1f} %" if name in SHARES else f"{row[name]:.3f}")
        lines.append(cells)

    # Pad each column: labels on the right, numbers on the left
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = []
    for label, *cells in lines:
        padded = [label.ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        text.append(f"| {' | '.join(padded)} |")
    return "\n".join(text)


def references(captions, i: int) -> list[str]:
    """Returns the answers to the last question of entry i's first conversation: references for a generated
    one."""
    first, *others = captions.conversations(i)
    *earlier, (question, answer) = first
    found = [answer]
    for *turns, (asked, said) in others:
        if turns == earlier and asked == question:
            found.append(said)
    return found
