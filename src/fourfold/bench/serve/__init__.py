"""`fourfold bench serve`: a load generator against any OpenAI-compatible server.

In the order of a run: `config` holds the options, `main` is the run from preparation to exit code,
`endpoint` asks the server what it is, `prompts` makes the requests (`lengths` draws their sizes),
`load` sends them when they are due, `answer` times one streamed answer (over `http_client` and
`sse`), `measure` does the arithmetic and `report` shows and records it.
"""
