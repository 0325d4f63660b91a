"""A service from Python: `Client`.

transport  requests, tokens, problems, lists by the page, events
sql        the answer to a question, read while it comes
jobs       jobs of a service
client     all of it in one place
"""

from logitlake_shared.client.client import Client

__all__ = ["Client"]
