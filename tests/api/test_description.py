"""The server does what `/openapi.json` says: requests made from it, right and wrong ones, by schemathesis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from llava_serve.api.app import create_app
from llava_serve.config import ApiOptions
from support.api_server import PacedBackend
from testbed.in_process import in_process_server

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
"""Not whether right fields are accepted: a description cannot say which picture is one, or what fits the context."""
EXAMPLES = 150
SHORT: dict[str, Any] = {"model": "builtin", "max_tokens": 4, "max_completion_tokens": None, "timeout": None}
"""Of a right request: a model that is there, an answer that ends soon, and no 504, which would be right, too."""
DESCRIPTION = schemathesis.openapi.from_dict(create_app(PacedBackend(), ApiOptions()).openapi())
OPERATIONS = {each.ok().label: each.ok() for each in DESCRIPTION.get_all_operations() if isinstance(each, Ok)}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with in_process_server() as url:
        yield url


def test_every_operation_is_described() -> None:
    assert set(OPERATIONS) == {
        "GET /health",
        "GET /metrics",
        "GET /ping",
        "GET /v1/models",
        "GET /v1/models/{name}",
        "GET /version",
        "POST /detokenize",
        "POST /tokenize",
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "POST /v1/responses",
    }


@pytest.mark.extended
@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, GenerationMode.POSITIVE) for name in OPERATIONS), ("POST /v1/chat/completions", GenerationMode.NEGATIVE)],
)
def test_requests_made_from_the_description(url: str, name: str, mode: GenerationMode) -> None:
    @given(case=OPERATIONS[name].as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def ask(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body |= SHORT
        case.call_and_validate(base_url=url, checks=CHECKS, timeout=15)

    ask()
