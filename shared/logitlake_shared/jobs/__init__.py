"""Jobs of a service: work that is submitted once, done by processes that outlive the service, and never forgotten.

records     what is known of a job, its attempts and events
states      which state may follow which
store       the jobs in an SQLite file
orders      cancel, pause, resume
observer    who is told what becomes of them
progress    what a running command says of itself; measured has the figures of its work
runner      where attempts run: one interface
processes   as processes of this machine
attempt     the process of an attempt
supervisor  brings jobs from one state to the next
settings    what a service may be told
"""
