"""`lm serve`: app is the server on connections; protocol, answers, shape are the API; worker runs the engine."""
