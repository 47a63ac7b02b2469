"""What does the second call need from the first?"""

import torch

TARGET = "mla.cache:Cache.write"
TESTS = ("tests/mla/test_cache.py",)
WHICH = "not paged and not Paged and not KVCacheEquals"
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
)


def probe(module, generator):
    """Three calls, rows of different lengths, with and without gradients."""
    found = {}
    new = [torch.randn(2, time, 3, generator=generator, requires_grad=True) for time in (2, 1, 3)]
    for name, enabled in (("with gradients", True), ("without", False)):
        cache = module.Cache(2, 9, 3, torch.float32)
        with torch.set_grad_enabled(enabled):
            first = cache.write(new[0])
            second = cache.write(new[1])
            cache.truncate(torch.tensor([3, 1]))
            third = cache.write(new[2])
        found |= {f"first, {name}": first, f"second, {name}": second, f"third, {name}": third}
        found[f"lengths, {name}"] = cache.length
        if enabled:
            sum((part.square() * (i + 1)).sum() for i, part in enumerate((first, second, third))).backward()
            found |= {f"gradient of call {i}": part.grad for i, part in enumerate(new, 1)}
    return found
