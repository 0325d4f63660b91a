"""The teacher under vLLM.

engine      `VllmEngine`: requests to prompts, answers to rows, and every check in between
frontend    drives vLLM: `AsyncLLM` on a thread of its own, or its core in this process
phases      keeps scoring and sampling out of each other's steps
span_hook   inside vLLM's workers: response rows only, exact tails
rows        vLLM's answers as `TeacherRows`
startup     what an engine must prove before it captures anything
"""

from logitlake_teacher.engines.vllm.engine import Route, VllmEngine

__all__ = ["Route", "VllmEngine"]
