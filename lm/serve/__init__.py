"""`lm serve`: app is the server on connections; protocol, answers, shape the API; worker runs the engine."""
