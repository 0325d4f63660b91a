"""Whether this machine can do the work: `logitlake doctor`.

records     one check: ok, warn or blocked, what was found, what to do
software    Python, the system, libraries by their metadata, GPUs by their driver; nothing heavy is imported
storage     where a lake lies: durable writes, names that only one writer gets, space, the clocks of both sides
network     who reaches what this machine offers: Ray's ports, ours, Ray's authentication
safety      what strangers are kept from: the SQL worker's sandbox, the file of tokens, open files
examine     all of them, in the order in which they are shown, and the report as text or JSON

A check is a function of facts, and finding the facts is another one: so every answer can be had in a test. What keeps
the work from being done, or would let strangers in, is `blocked`; what costs time or is missing for a part of it is
`warn`. A check that cannot be made says so as a warning: nothing is passed over.
"""
