"""Writing text: one model, many texts at once, in pages of cache.

Read generate, then engine; step is a decode step of the whole model, pages its memory, sampling the choice of
the next token, compiled the same step as compiled code.
"""
