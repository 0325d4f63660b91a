"""The teacher service: it runs a teacher once and writes what it knows about every response token into a lake.

config     the configuration of the three commands
engines    fake, hf (transformers), vllm: one protocol, one behaviour suite
planner    data sources -> deterministic units of work
capture    one unit of samples -> rows, checked, encoded, committed
pairs      one unit of preference pairs -> the teacher's logprobs, committed
worker     one engine and one cache: what an executor runs
executors  inline, ray
service    a configuration -> a finished cache
cli        the `logitlake-teacher` command
"""
