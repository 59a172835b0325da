"""Chooses the next token: the likeliest, a random one, or by beam search."""
import torch


def sample(logits: torch.Tensor, temperature: float, top_k: int, top_p: float,
           generator: torch.Generator | None = None) -> torch.Tensor:
    """Draws the next token of each row of logits (B,V): ids (B,)."""
    if temperature < 1e-6:  # the logits divided by it may be infinite
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:  # the smallest set of tokens whose probabilities reach top_p
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        out = probabilities.cumsum(-1) - probabilities >= top_p
        out[:, 0] = False
        logits = logits.masked_fill(out.scatter(-1, order, out), -torch.inf)
    # Draw as torch.multinomial does, which would wait for the GPU
    chances = logits.softmax(-1)
    return (chances / torch.empty_like(chances).exponential_(generator=generator)).argmax(-1)


class Sampler:
    """Continues each of B texts by a token that is drawn: see `sample`. It has the methods of BeamSearch."""

    def __init__(self, B: int, ends: torch.Tensor, *settings):
        self.B = B
        self.ends = ends
        self.settings = settings  # of `sample`
        self.ids = []
        self.done = torch.zeros(B, dtype=torch.bool, device=ends.device)

    def step(self, logits: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        """Takes logits (B,V). Returns the next ids (B,), no other order of the texts, and which are done."""
        chosen = sample(logits, *self.settings)
        self.ids.append(chosen)
        self.done |= (chosen[:, None] == self.ends).any(1)
        return chosen, None, self.done

    def best(self) -> list[list[int]]:
        return torch.stack(self.ids, 1).tolist() if self.ids else [[]] * self.B


class BeamSearch:
    """Continues the `beams` likeliest texts of each of B rows. Keeps, of the texts that ended, the `beams`
    best by log-probability divided by length to the power of `length_penalty`. A row is done when no text
    that goes on is better than the worst of these."""

    def __init__(self, B: int, beams: int, max_tokens: int, ends: torch.Tensor, length_penalty: float):
        self.beams = beams
        self.length_penalty = length_penalty
        self.max_tokens = max_tokens
        self.ends = ends
        self.end_tokens = set(ends.tolist())
        self.texts = [[[]] for _ in range(B)]  # that go on, best first
        self.scores = [[0.0] for _ in range(B)]  # of these
        self.ended = [[] for _ in range(B)]  # (score, text), best first
        self.done = [False] * B

    def step(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Takes the logits (B·k,V) of each row's k texts (one at first, then `beams`). Returns the next ids
        (B·beams,), the index (B·beams,) of the text that each continues, and which rows (B,) are done."""
        B = len(self.texts)
        k = len(self.texts[0])
        V = logits.shape[-1]
        totals = logits.log_softmax(-1).view(B, k, V) + logits.new_tensor(self.scores)[..., None]  # (B,k,V)

        # The best of all continuations, which may end; and the best of those that go on
        most = min(self.beams, k * V)
        best = totals.flatten(1).topk(most)  # (B,beams)
        on = totals.index_fill(2, self.ends, -torch.inf).flatten(1).topk(most)
        scores = best.values.tolist()
        places = best.indices.tolist()
        on_scores = on.values.tolist()
        on_places = on.indices.tolist()

        # Keep the texts that end, continue the others
        for b in range(B):
            if not self.done[b]:
                self.end(b, scores[b], self.continued(b, places[b], V), on_scores[b][0])
            self.texts[b] = self.continued(b, on_places[b], V)
            self.scores[b] = on_scores[b]
        rows = on.indices // V + k * torch.arange(B, device=logits.device)[:, None]
        return (on.indices % V).flatten(), rows.flatten(), torch.tensor(self.done)

    def continued(self, b: int, places: list[int], V: int) -> list[list[int]]:
        """Returns texts of row b with one more token: place i stands for text i // V, token i % V."""
        return [self.texts[b][i // V] + [i % V] for i in places]

    def end(self, b: int, scores: list[float], texts: list[list[int]], best_on: float) -> None:
        """Keeps those texts of row b that ended, and decides whether the row is done."""
        length = len(texts[0])
        divisor = length ** self.length_penalty
        last = length == self.max_tokens
        for score, text in zip(scores, texts):
            if text[-1] in self.end_tokens or last:
                self.ended[b].append((score / divisor, text))
        self.ended[b] = sorted(self.ended[b], reverse=True)[:self.beams]
        full = len(self.ended[b]) == self.beams
        self.done[b] = last or full and best_on / divisor <= self.ended[b][-1][0]

    def best(self) -> list[list[int]]:
        """Returns the best text of each row."""
        return [ended[0][1] if ended else [] for ended in self.ended]
