"""`lm serve`: app answers HTTP, protocol and answers say what, worker runs the engine on its thread."""
