"""The API and its OpenAPI document say the same, whatever is asked: schemathesis makes the questions from the document.

No answer is a 5xx, every answer is of a status, a media type and a schema that the document declares.
"""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from tests.teacher_service.api.conftest import Api

from logitlake_shared.web.tokens import TokenStore

MAX_EXAMPLES = 25
# A cursor is opaque: the document cannot say which strings are one, and most are refused.
EXCLUDED = [positive_data_acceptance]


@pytest.fixture
def document(teacher: Callable[..., tuple[Any, str]]) -> str:
    """Its address."""
    return f"{teacher(requests_per_minute=10**6)[1]}/openapi.json"


def check_answers(document: str, headers: dict[str, str], prefix: str = "") -> None:
    """Asks every operation below the prefix."""
    schema = schemathesis.openapi.from_url(document, headers=headers)
    operations = [result.ok() for result in schema.get_all_operations()]
    paths = httpx.get(document, headers=headers).json()["paths"]
    assert len(operations) == sum(len(methods) for methods in paths.values())
    for operation in (one for one in operations if one.path.startswith(prefix)):

        @settings(max_examples=MAX_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def answers_as_declared(case: Any) -> None:
            if isinstance(case.body, dict) and "timeout_ms" in case.body:
                case.body["timeout_ms"] = None  # a question that is given 2 ms is a 504, as it should be
            case.call_and_validate(headers=headers, excluded_checks=EXCLUDED)

        answers_as_declared()


def test_every_answer_is_as_declared(document: str, tokens: TokenStore) -> None:
    """By an administrator: tokens are made on the way, and whoever has none is let in nowhere from then on."""
    check_answers(document, {"Authorization": f"Bearer {tokens.create('root', 'admin')[0]}"})


@pytest.mark.parametrize("prefix", ["/v1/jobs", "/v1/plans"])
def test_every_answer_about_jobs_is_as_declared(api: Api, prefix: str) -> None:
    """Of a service that takes them."""
    check_answers(f"{api().base_url}/openapi.json", {}, prefix)
