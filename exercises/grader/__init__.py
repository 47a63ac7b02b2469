"""`lm exercise` and `lm new`: checks, hints and grades for the exercises. The packages never import it."""
