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

MAX_EXAMPLES = 25
# A cursor is opaque: the document cannot say which strings are one, and most are refused.
EXCLUDED = [positive_data_acceptance]


@pytest.fixture
def document(teacher: Callable[..., tuple[Any, str]]) -> str:
    """Its address."""
    return f"{teacher(requests_per_minute=10**6)[1]}/openapi.json"


def test_every_answer_is_as_declared(document: str) -> None:
    operations = [result.ok() for result in schemathesis.openapi.from_url(document).get_all_operations()]
    assert len(operations) == sum(len(methods) for methods in httpx.get(document).json()["paths"].values())
    for operation in operations:

        @settings(max_examples=MAX_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def answers_as_declared(case: Any) -> None:
            case.call_and_validate(excluded_checks=EXCLUDED)

        answers_as_declared()
