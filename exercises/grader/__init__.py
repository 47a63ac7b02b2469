"""`lm exercise` and `lm new`: the machinery behind the exercises, a program of its own."""
