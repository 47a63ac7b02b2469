"""How does a vote among samples choose one answer?"""

import torch

TARGET = "rl.scaling:majority"
TESTS = ("tests/rl/test_scaling.py",)
WHICH = "majority or votes_by_hand"
EQUATION = "self-consistency (arXiv 2203.11171) section 2"
LEARN = "Many samples and one vote: accuracy grows without training, as long as the right answer is the most frequent one."
HINTS = (
    "Eight samples: three ended without an answer, two say 12, and three different answers came once. Which one is returned?",
    "Leave out None, count how often each answer occurs, and return the most frequent one. Of equally frequent ones the "
    "answer that came first wins. Without any answer the result is None.",
    "Counter, most_common; or a dict and max with a key",
)
EXPECTS = {
    "answers": "a sequence of str and None, in the order of the samples, not to be changed; None: no answer, no vote; "
    "two answers agree only if their texts are equal",
    "returns": "one of the answers, a str; None if nobody voted",
}
MISTAKES = (
    (
        "Counter(answer for answer in answers if answer is not None)",
        "Counter(answers)",
        "None has a vote: a completion without an answer has none",
    ),
    (
        "Counter(answer for answer in answers if answer is not None)",
        "Counter(answer for answer in reversed(answers) if answer is not None)",
        "of equally frequent answers the last is returned: the first one wins",
    ),
    (
        "Counter(answer for answer in answers if answer is not None)",
        "Counter(sorted(answer for answer in answers if answer is not None))",
        "of equally frequent answers the smallest text is returned: the one that came first wins",
    ),
    (
        "Counter(answer for answer in answers if answer is not None)",
        "Counter(sorted((answer for answer in answers if answer is not None), reverse=True))",
        "of equally frequent answers the largest text is returned: the one that came first wins",
    ),
    (
        "votes.most_common(1)[0][0]",
        "votes.most_common()[-1][0]",
        "the rarest answer is returned: return the most frequent one",
    ),
    (
        "votes.most_common(1)[0][0]",
        "next(iter(votes))",
        "the first answer is returned: count the votes",
    ),
    (
        "votes.most_common(1)[0][0]",
        "max(votes)",
        "the largest answer is returned: compare the counts, not the answers",
    ),
    (
        "votes.most_common(1)[0][0]",
        "votes.most_common(1)[0]",
        "the result holds a count: return the answer alone",
    ),
    (
        "if votes else None",
        "if votes and 2 * max(votes.values()) > len(answers) else None",
        "more than half of the votes are required: the most frequent answer wins with any number",
    ),
    (
        " if votes else None",
        "",
        "without any answer there is an error: return None",
    ),
    (
        "if votes else None",
        'if votes else ""',
        "without any answer the result is an empty text: return None",
    ),
    (
        "if answer is not None",
        "if answer",
        "an empty answer has no vote: only None is left out",
    ),
    (
        "Counter(answer for answer",
        'Counter(answer.lstrip("0") for answer',
        "answers are counted without their leading zeros: 07 and 7 are different texts",
    ),
    (
        "Counter(answer for answer",
        "Counter(answer.strip() for answer",
        "answers are counted without their spaces: compare the texts as they are",
    ),
    (
        "for answer in answers if",
        "for answer in answers[: (list(answers) + [None]).index(None)] if",
        "the vote ends at the first None: leave it out and go on",
    ),
    (
        "for answer in answers if",
        "for answer in (answers.sort(key=str) or answers) if",
        "the answers are sorted in place: the caller's list must not change",
    ),
    (
        "Counter(answer for answer in answers if answer is not None)",
        "Counter({a: 1 + sum(a == b for b, c in zip(answers, answers[1:]) if b == c) for a in answers if a is not None})",
        "only equal neighbours are counted together: votes count wherever they stand",
    ),
)
RIGHT = (
    """
    counts = {}
    for answer in answers:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    return max(counts, key=counts.get, default=None)
    """,
    """
    given = [answer for answer in answers if answer is not None]
    return max(given, key=given.count) if given else None
    """,
    """
    best, most = None, 0
    for answer in answers:
        if answer is None:
            continue
        count = sum(other == answer for other in answers)
        if count > most:
            best, most = answer, count
    return best
    """,
    """
    given = [answer for answer in answers if answer is not None]
    if not given:
        return None
    return sorted(set(given), key=lambda answer: (-given.count(answer), given.index(answer)))[0]
    """,
    """
    import statistics

    given = [answer for answer in answers if answer is not None]
    return statistics.mode(given) if given else None
    """,
    """
    given = [answer for answer in answers if answer is not None]
    order = list(dict.fromkeys(given))
    if not order:
        return None
    numbers = torch.tensor([order.index(answer) for answer in given])
    return order[int(torch.bincount(numbers).argmax())]
    """,
    """
    votes = Counter(answers)
    votes.pop(None, None)
    winners = [answer for answer in votes if votes[answer] == max(votes.values())]
    return winners[0] if winners else None
    """,
)


def probe(module, generator):
    """Clear votes, ties, None in front and in the majority, no votes, empty answers, zeros and spaces."""
    known = ["7", "07", "12", "3", "", " 7", "41", None]
    cases = {
        "clear votes": [["3", "7", "12", "7", "41"], ["12", "3", "3", "7", "3", "41", "12"]],
        "ties": [["3", "12", "12", "3", "41"], ["41", "3"], ["12", "41", "3", "41", "12", "3"]],
        "None in front": [[None, "3", "41", "41"], [None, None, None, "41", "3", "3"]],
        "None in between": [["3", None, "12", None, "12"], ["41", None, None, None]],
        "no votes": [[], [None], [None, None, None]],
        "few votes of many": [["12", "3", "41", "7", "12", None, "07"]],
        "votes apart": [["3", "3", "12", "41", "12", "7", "12"], ["12", "41", "12", "3", "3", "41", "12"]],
        "leading zeros": [["7", "3", "07", "3"], ["07", "07", "7"]],
        "empty answers": [["", "", "3"], ["3", "", None]],
        "spaces": [["7", "3", " 7", "3"], [" 7", " 7", "7"]],
        "random votes": [
            [
                known[int(at)]
                for at in torch.randint(0, 8, (int(size),), generator=generator)
                if at not in (4, 5)
            ]
            for size in torch.randint(1, 14, (23,), generator=generator)
        ],
    }
    found, kinds, kept = {}, [], []
    for name, lists in cases.items():
        numbers = []
        for answers in lists:
            before = list(answers)
            winner = module.majority(answers)
            kinds.append(winner is None or isinstance(winner, str))
            kept.append(answers == before)
            numbers.append(known.index(winner) if winner in known else -1)
        found[name] = torch.tensor(numbers)
    found["the results are str or None"] = torch.tensor(all(kinds))
    return found | {"the answers are unchanged": torch.tensor(all(kept))}
