"""Generation: one model, many sequences at once, over a paged cache.

Read generate, then request and engine. step is a decode step of the whole model, pages the cache, sampling
draws the next token, compiled is the decode step under torch.compile.
"""
