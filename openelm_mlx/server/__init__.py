"""The server: `openelm serve` answers OpenAI's clients and a page over HTTP.

A request goes from protocol.py (limits of a connection) through log.py (a line for each) and
guard.py (host, key, origin, limits of a body) to the routes of api.py. bodies.py says which
fields are known, asked.py turns them into options of the engine, models.py finds the model, and
worker.py steps it on the one thread that owns the device. answers.py and responses.py make OpenAI's
objects from the events, stream.py sends them while they come; run.py starts and drains the whole.
batch_file.py and batch_run.py do without a server: a file of requests becomes one of answers.
FastAPI, uvicorn and their like (the extra `server`) are imported here only, and when a server runs:
options.py and errors.py need none of them.
"""
