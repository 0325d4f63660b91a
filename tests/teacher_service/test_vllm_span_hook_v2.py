"""The span hook in vLLM's second model runner, as far as it can be tried without a GPU.

That runner needs Triton, so no version of it is listed and the hook never runs there. What can be tried is the place
where it would stand: vLLM's own `PromptLogprobsWorker` scores fixed ids with the same arguments, and in the mode that
returns logits it needs no kernel. Both are asked about the same rows of the same steps.
"""

import importlib.util
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from logitlake_teacher.engines.vllm.rows import PackedLayout, rows_of_packed
from logitlake_teacher.engines.vllm.span_hook import SPAN_HOOK_VERSIONS, RowScorer, SpanHook, SpanWorkerV2, span_request

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # vLLM warns about itself while it loads
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None and os.environ.get("LOGITLAKE_REQUIRE_VLLM") != "1",
        reason="vLLM is not installed (logitlake[teacher-cpu])",
    ),
]

VOCAB_SIZE, HIDDEN, K = 30, 8, 4
# One lm_head, two softmaxes over thirty float32 logits.
TOLERANCE = 1e-5


def test_no_version_of_the_second_runner_is_listed() -> None:
    """It has not run with the hook."""
    assert SPAN_HOOK_VERSIONS["v2"] == frozenset()


@pytest.mark.parametrize("cut", [1, 5, 9, 13, 17])
def test_rows_are_those_that_vllm_scores_itself(cut: int) -> None:
    """Two requests, the second chunked at `cut`: labels' logits at vLLM's own rows give the hook's label logprobs."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    generator = torch.Generator().manual_seed(cut)
    head_HV = torch.randn((HIDDEN, VOCAB_SIZE), generator=generator)
    ids = {"a": np.arange(1, 13, dtype=np.int32), "b": np.arange(2, 22, dtype=np.int32)}
    hidden = {name: torch.randn((len(ids_S), HIDDEN), generator=generator) for name, ids_S in ids.items()}
    first_row = {"a": 6, "b": 11}
    worker = SpanWorkerV2(
        PromptLogprobsWorker(4, torch.device("cpu"), logprobs_mode="raw_logits"), SpanHook(RowScorer(K, VOCAB_SIZE, ()))
    )
    labels = {name: ids[name][first + 1 :] for name, first in first_row.items()}
    for index, (name, first) in enumerate(first_row.items()):
        rows_R = np.arange(first, len(ids[name]) - 1)
        worker.add_request(
            f"{name}-hook", index, SamplingParams(extra_args=span_request(rows_R, labels[name]), temperature=0.0)
        )
        worker.add_request(
            f"{name}-vllm",
            2 + index,
            SamplingParams(prompt_logprob_token_ids=labels[name][:, None].astype(np.int32), prompt_logprob_start=first),
        )
    prompt_lens = np.array([len(ids["a"]), len(ids["b"])] * 2)
    answers: dict[str, torch.Tensor] = {}
    for step, pieces in enumerate(({"a": (0, 12), "b": (0, cut)}, {"b": (cut, 20)})):
        assert step == 0 or "b-hook" not in answers
        batch = [(f"{name}-{kind}", *piece) for name, piece in pieces.items() for kind in ("hook", "vllm")]
        lengths = [stop - start for _, start, stop in batch]
        answers |= worker.compute_prompt_token_id_logprobs(
            lambda hidden_RH: hidden_RH @ head_HV,
            torch.cat([hidden[request_id[0]][start:stop] for request_id, start, stop in batch]),
            SimpleNamespace(
                req_ids=[request_id for request_id, _, _ in batch],
                idx_mapping_np=np.array(["ab".index(request_id[0]) for request_id, _, _ in batch]),
                num_computed_prefill_tokens_np=np.array([start for _, start, _ in batch]),
                num_scheduled_tokens=np.array(lengths),
                query_start_loc_np=np.concatenate([[0], np.cumsum(lengths)]),
                prefill_len_np=np.array([len(ids[request_id[0]]) for request_id, _, _ in batch]),
            ),
            prompt_lens,
        )
    assert sorted(answers) == ["a-hook", "a-vllm", "b-hook", "b-vllm"]
    for name, first in first_row.items():
        rows = rows_of_packed(answers[f"{name}-hook"].numpy(), PackedLayout(K, 0), labels[name])
        log_sum_R = (hidden[name][first:-1] @ head_HV).logsumexp(1).numpy()
        expected_R = answers[f"{name}-vllm"][:, 0].numpy() - log_sum_R
        np.testing.assert_allclose(rows.label_logprob_T, expected_R, atol=TOLERANCE, rtol=0)
