"""What both services' HTTP APIs stand on; beside their `api` packages the only place that imports fastapi or starlette.

app         an application with all of it in place, for services to add their routes to
settings    what a service may be told
frame       around every answer: request ids, security headers, access log, metrics
doors       who is asking, and what they may do: one function decides
tokens      bearer tokens: hashed, scoped, expiring, revocable; token_routes has them over HTTP
sessions    how a browser shows its token
limits      size of bodies and how long they may take, rate and number of requests
connections those that say nothing end
problems    every error as RFC 9457 problem+json, from one table of codes
html        pages, and errors as pages
cursors     lists by the page
logs        lines of JSON, without secrets
traces      spans for a collector, where one is wanted
serving     the process: where it may listen, how it ends
jobs        jobs over HTTP; feed has their events, job_edits what can be edited, job_pages their pages, job_figures
            and job_metrics what Prometheus reads of them
lake_files  a lake's files, so that `lake = "https://…"` is a lake
"""
