"""`lm serve`: app is the HTTP server, protocol and answers the API, worker runs the engine on a thread."""
