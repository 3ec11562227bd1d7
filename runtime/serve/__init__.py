"""`qvl serve`: OpenAI's HTTP API and a page over one engine. Needs the extra `serve`."""
