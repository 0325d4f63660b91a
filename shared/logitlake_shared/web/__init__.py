"""What both services' HTTP APIs stand on; beside their `api` packages the only place that imports fastapi or starlette.

problems    every error as RFC 9457 problem+json, from one table of codes
ids         typed, sortable ids
tokens      bearer tokens: hashed, scoped, expiring, revocable
doors       who is asking, and what they may do: one function decides
limits      size of bodies, rate and number of requests
headers     request ids, security headers, access log, metrics: around every answer
app         an application with all of it in place, for services to add their routes to
serving     the process: where it may listen, how it ends
lake_files  a lake's files, so that `lake = "https://…"` is a lake
"""
