"""The student trainer: from a lake of teacher logprobs to a small, sparse, stock checkpoint.

config                     the commands' configuration trees and the two presets
data                       rows of the lake to tensors; the check that student and lake belong together
losses/                    distillation, preference, balance; each fast path beside its slow twin
models/                    assembling, upcycling, routing, loading
stages                     what trains in each stage
trainer, checkpoints, run  one stage; its checkpoints; all stages in order
evaluate, answers, metrics what a checkpoint can do on held-out data
export/                    a stock checkpoint or one GGUF file, reloaded and compared before it is kept
model_inputs               what a checkpoint's forward pass takes, for any family
report*                    one page, one JSON file and one table about a run
cli                        the `logitlake-student` command
"""
