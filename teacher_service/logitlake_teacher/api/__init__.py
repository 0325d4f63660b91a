"""The teacher service over HTTP.

app        the application: routes, checks
documents  what requests and answers hold
caches     caches, snapshots and their files, samples
files      the lake's files, by range: `lake = "http://…/v1/files"`
"""
