"""Byte n-gram baselines: the losses that a trained model should beat.

Run `python -m lm.corpus.ngram`: it counts train.txt, scores all of validation.txt and writes baselines.json.

"Order" is the number of preceding bytes that a prediction uses: order 0 uses only the frequency of each byte,
order 7 counts runs of 8 bytes. Smoothing is method C of I. H. Witten and T. C. Bell, "The zero-frequency
problem", IEEE Transactions on Information Theory 37(4), 1991, in the interpolated form of S. F. Chen and
J. Goodman, "An empirical study of smoothing techniques for language modeling", 1998.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

METHOD = "interpolated Witten-Bell byte n-grams down to the uniform distribution over 256 bytes"
HIGHEST_ORDER = 7  # a run of 8 bytes fills a 64-bit integer
BYTE = np.uint64(8)  # bits


def runs(text: np.ndarray, length: int) -> np.ndarray:
    """Every run of `length` bytes as one integer, its last byte lowest: (bytes - length + 1,) uint64."""
    count = max(len(text) - length + 1, 0)
    integers = np.zeros(count, np.uint64)
    for offset in range(length):
        integers = integers << BYTE | text[offset : offset + count].astype(np.uint64)
    return integers


def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 if it is not among the sorted keys."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


class WittenBell:
    """Witten-Bell estimates of all orders from 0 to `order`, counted in one text.

    With h the k preceding bytes, h' the last k - 1 of them, N(h) the number of bytes that followed h, N(hc)
    how many of them were c, and T(h) the number of different bytes that followed h:

        P_k(c | h) = (N(hc) + T(h) P_{k-1}(c | h')) / (N(h) + T(h)),    P_{-1}(c) = 1/256,

    and P_k(c | h) = P_{k-1}(c | h') if h does not occur in the text.
    """

    def __init__(self, text: np.ndarray, order: int = HIGHEST_ORDER):
        if not 0 <= order <= HIGHEST_ORDER:
            raise ValueError(f"order={order}: must be from 0 to {HIGHEST_ORDER}")
        if len(text) <= order:
            raise ValueError(f"text has {len(text)} bytes; order={order} needs at least {order + 1}")
        self.order = order
        self.tables = []
        for k in range(order + 1):
            seen, counts = np.unique(runs(text, k + 1), return_counts=True)
            contexts, starts = np.unique(seen >> BYTE, return_index=True)
            kinds = np.diff(starts, append=len(seen))
            self.tables.append((seen, counts, contexts, np.add.reduceat(counts, starts), kinds))

    def refine(self, k: int, wanted: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """P_k of the last byte of each run of k + 1 bytes, given P_{k-1} of the same bytes."""
        seen, counts, contexts, totals, kinds = self.tables[k]
        count = look_up(seen, counts, wanted)
        total = look_up(contexts, totals, wanted >> BYTE)
        kind = look_up(contexts, kinds, wanted >> BYTE)
        return np.where(total > 0, (count + kind * lower) / np.maximum(total + kind, 1), lower)

    def probabilities(self, text: np.ndarray) -> np.ndarray:
        """The probability of each byte of a text given the bytes before it, for every order.

        Returns (order + 1, bytes) float64. A byte with fewer than k bytes before it has the estimate of the
        highest order that fits in row k too.
        """
        current = np.full(len(text), 1 / 256)
        result = []
        for k in range(self.order + 1):
            current = np.concatenate([current[:k], self.refine(k, runs(text, k + 1), current[k:])])
            result.append(current)
        return np.stack(result)

    def distribution(self, context: bytes) -> np.ndarray:
        """The probability of each byte after a context, by the highest order that fits: (256,) float64."""
        following = np.arange(256, dtype=np.uint64)
        current = np.full(256, 1 / 256)
        for k in range(min(self.order, len(context)) + 1):
            preceding = np.uint64(int.from_bytes(context[len(context) - k :], "big"))
            current = self.refine(k, preceding << BYTE | following, current)
        return current


def main() -> None:
    """Score validation.txt by the counts of train.txt and write baselines.json."""
    folder = Path(__file__).parent
    train, validation = ((folder / f"{name}.txt").read_bytes() for name in ("train", "validation"))
    model = WittenBell(np.frombuffer(train, np.uint8))
    losses = -np.log(model.probabilities(np.frombuffer(validation, np.uint8))).mean(axis=1)
    best = int(losses.argmin())
    baselines = {
        "unit": "nats a byte",
        "method": METHOD,
        "train_sha256": hashlib.sha256(train).hexdigest(),
        "validation_sha256": hashlib.sha256(validation).hexdigest(),
        "loss": {str(order): round(loss, 4) for order, loss in enumerate(losses.tolist())},
        "best_order": best,
        "best": round(losses[best].item(), 4),
    }
    (folder / "baselines.json").write_text(json.dumps(baselines, indent=2) + "\n", "utf-8")
    print(json.dumps(baselines, indent=2))


if __name__ == "__main__":
    main()
