"""What does the second call need from the first?"""

import torch

from exercises.grader.watch import backward

TARGET = "mla.cache:Cache.write"
TESTS = ("tests/mla/test_cache.py",)
WHICH = "not paged and not Paged and not KVCacheEquals and not allocated_once"
BEGIN = "if torch.is_grad_enabled():"
EQUATION = "DeepSeek-V2 section 2.1.2"
LEARN = "New entries are appended to what each row already holds; the result is as long as the longest row."
HINTS = (
    "If a row already holds three tokens, where do its new entries start? What has to be recorded after the call?",
    "start holds each row's length; total is the longest length after the call. Write into entries (batch, "
    "max_length, width), each row from its own start; add time to the lengths; return (batch, total, width). With "
    "gradients enabled, backward still needs the old entries.",
    "clone, slice assignment, or indices from slots(start, time, device); self.lengths",
)
EXPECTS = {
    "new": "(batch, time, width), the dtype of the entries; the caller may overwrite it afterwards",
    "self.entries": "(batch, max_length, width); given above: batch, time, total, and start, each row's length",
    "self.lengths": "a list of ints, one per row; entries beyond a row's length are undefined",
    "returns": "(batch, total, width): all entries so far, without gradients also valid if it is a view",
}
MISTAKES = (
    (
        "self.lengths = [row + time for row in start]",
        "pass",
        "the lengths are not updated: the next call would overwrite these entries",
    ),
    (
        "self.entries[:, start[0] : total] = new",
        "self.entries[:, :time] = new",
        "the entries are written at position 0: append them to what the row holds",
    ),
    (
        "return self.entries[:, :total]",
        "return self.entries",
        "the unused zeros are returned too, and would be attended to: return only the filled part",
    ),
    (
        "return self.entries[:, :total]",
        "return new",
        "only the new entries are returned: a query needs those of all tokens so far",
    ),
    (
        "if min(start) == max(start):",
        "if True:",
        "every row is written at the first row's length: each row has its own",
    ),
    (
        "[row + time for row in start]",
        "[total] * len(start)",
        "every row gets the longest row's length: each row has its own",
    ),
    (
        "if torch.is_grad_enabled():",
        "if False:",
        "written in place with gradients enabled: backward of earlier calls needs the old entries",
    ),
    (
        "return self.entries[:, :total]",
        "return self.entries[:, :total] if any(start) else new",
        "the first call returns the caller's own tensor: it changes when the caller reuses its memory; copy it",
    ),
    (
        "self.lengths = [row + time for row in start]",
        "self.lengths = [row + time for row in start]\n        self.last = new.detach()",
        "the cache keeps a view of the caller's tensor: copy the entries",
    ),
    (
        "self.entries[:, start[0] : total] = new",
        "self.entries[:, start[0] : total] = new.detach()",
        "the new entries are detached: no gradient reaches earlier tokens",
    ),
    (
        "self.entries[:, start[0] : total] = new",
        "self.entries[:, start[0] : total] = new.bfloat16()",
        "the entries are rounded to bf16: keep the dtype of the cache",
    ),
    (
        "return self.entries[:, :total]",
        "return self.entries[:, :total].double()",
        "the result is float64: keep the dtype of the cache",
    ),
    (
        "if torch.is_grad_enabled():",
        "if new.requires_grad:",
        "entries without gradients are written in place: backward of earlier calls needs the old ones; copy whenever gradients are enabled",
    ),
    (
        "self.lengths = [row + time for row in start]",
        "self.lengths = torch.tensor(start) + time",
        "the lengths become a tensor: they are a list of ints",
    ),
)
RIGHT = (
    """
    entries = self.entries.clone() if torch.is_grad_enabled() else self.entries
    for row in range(batch):
        entries[row, start[row] : start[row] + time] = new[row]
    self.entries = entries
    self.lengths = [length + time for length in self.lengths]
    return entries[:, :total]
    """,
    """
    if torch.is_grad_enabled():
        self.entries = self.entries.clone()
    places = torch.tensor(start, device=new.device)[:, None] + torch.arange(time, device=new.device)
    self.entries.scatter_(1, places[..., None].expand(new.shape), new)
    self.lengths = [row + time for row in start]
    return self.entries.narrow(1, 0, total)
    """,
    """
    keep = self.entries.clone() if torch.is_grad_enabled() else self.entries
    rows = torch.arange(batch, device=new.device).repeat_interleave(time)
    columns = torch.cat([torch.arange(s, s + time, device=new.device) for s in start])
    keep[rows, columns] = new.flatten(0, 1)
    self.entries, self.lengths = keep, [s + time for s in start]
    return keep[:, : max(self.lengths)]
    """,
    """
    rows = []
    for row, begin in enumerate(start):
        old = self.entries[row]
        rows.append(torch.cat((old[:begin], new[row], old[begin + time :])))
    self.entries, self.lengths = torch.stack(rows), [begin + time for begin in start]
    return self.entries[:, :total]
    """,
    """
    places = torch.tensor(start, device=new.device)[:, None] + torch.arange(time, device=new.device)
    at = places[..., None] == torch.arange(max_length, device=new.device)  # (batch, time, max_length)
    written = torch.einsum("btm,btw->bmw", at.to(new.dtype), new)
    self.entries = torch.where(at.any(1).unsqueeze(-1), written, self.entries)
    self.lengths = [row + time for row in start]
    return self.entries[:, :total].clone()
    """,
    """
    held = [list(row.unbind(0)) for row in self.entries.clone()]
    for row, begin in enumerate(start):
        for step in range(time):
            held[row][begin + step] = new[row, step]
    self.entries = torch.stack([torch.stack(row) for row in held])
    self.lengths = [length + time for length in self.lengths]
    return self.entries[:, :total]
    """,
    """
    entries = torch.full_like(self.entries, 7.0)
    rows = []
    for b, s in enumerate(start):
        filled = torch.cat((self.entries[b, :s], new[b]))
        rows.append(torch.cat((filled, entries[b, len(filled):])))
    self.entries = torch.stack(rows)
    self.lengths = [s + time for s in start]
    return self.entries[:, :total]
    """,
)


def probe(module, generator):
    """Four calls, rows of different lengths, with and without gradients; the caller reuses its memory."""
    found = {}
    new = [torch.randn(2, time, 3, generator=generator, requires_grad=True) for time in (2, 1, 3)]
    plain = torch.randn(2, 1, 3, generator=generator)  # needs no gradient, but comes after those that do
    for name, enabled in (("with gradients", True), ("without", False)):
        cache = module.Cache(2, 9, 3, torch.float32)
        parts, losses = [], []
        with torch.set_grad_enabled(enabled):
            for call, given in enumerate([*new, plain]):
                if call == 2:
                    cache.truncate(torch.tensor([3, 1]))
                given = given if enabled else given.detach().clone()
                part = cache.write(given)
                held = torch.arange(part.shape[1]) < torch.as_tensor(cache.lengths)[:, None]
                parts.append(part.where(held.unsqueeze(-1), 0))  # a copy: a view may change in later calls
                losses.append((part.square() * (call + 1)).sum())
                if not enabled:
                    given.fill_(float("nan"))
        found |= {f"call {call}, {name}": part for call, part in enumerate(parts, 1)}
        found[f"lengths, {name}"] = torch.as_tensor(cache.lengths)
        found[f"lengths are ints, {name}"] = torch.tensor(all(type(n) is int for n in cache.lengths))
        if enabled:
            backward(sum(losses))
            found |= {f"gradient of call {i}": part.grad for i, part in enumerate(new, 1)}
    return found
