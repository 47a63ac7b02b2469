"""`lm serve`: app is the HTTP server on connections; protocol, answers and shape are the API; worker runs the engine."""
