"""The server: `openelm serve` answers OpenAI's clients and a page over HTTP.

A request goes from protocol.py (limits of a connection) through log.py and metrics.py (a line and
a count for each) and guard.py (host, key, origin, limits of a body) to the routes of api.py, which
reads its JSON as strict.py does. bodies.py and other_bodies.py say which fields are known, asked.py
turns them into options of the engine. handler.py sees to the rest: models.py finds the model and
worker.py steps it on the one thread that owns the device; answers.py, completions.py and
responses.py make OpenAI's objects from the events, and stream.py sends them while they come.
answer_schemas.py describes them in /openapi.json, errors.py has what is told otherwise.
run.py starts and drains the whole, options.py has its options; page.py serves the page at `/`,
live.py shows a line on the terminal.
batch_file.py and batch_run.py do without a server: a file of requests becomes one of answers. They
and what they use need nothing of the extra `server`, which is imported only when a server runs.
"""
