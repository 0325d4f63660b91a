"""The teacher service over HTTP.

app        the application: routes, checks
documents  what requests and answers hold
caches     caches, snapshots and their files, samples
sql        questions in SQL
queries    questions that are read later
jobs       captures, pairs and plans as jobs
pages      the pages at `/`
files      the lake's files, by range: `lake = "http://…/v1/files"`
"""
