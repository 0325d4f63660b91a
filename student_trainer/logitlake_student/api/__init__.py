"""The student trainer over HTTP.

app    the application: routes, checks
jobs   training as jobs
runs   runs, their metrics and checkpoints
pages  the pages at `/`
"""
