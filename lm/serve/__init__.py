"""`lm serve`: app is the HTTP server on connections, protocol and answers the API, worker runs the engine."""
