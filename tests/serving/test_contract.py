"""Both services keep to their OpenAPI, whatever they are sent: no error of their own, no answer that is not declared.

Requests are made up from the document by schemathesis. A few suffice to see that an endpoint keeps to it;
`make contract` sends many.
"""

import os
from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from studies.benchmarks.service_process import running

EXAMPLES = int(os.environ.get("CONTRACT_EXAMPLES", "10"))
"""Made-up requests per endpoint and mode."""
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
MADE_UP = settings(
    max_examples=EXAMPLES,
    deadline=None,  # a price takes as long as it takes
    derandomize="CONTRACT_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize(
        "mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value
    ),
]


@pytest.fixture(scope="module")
def price_schema(picture_system, shop_index, tmp_path_factory):
    flags = [
        "--model",
        str(picture_system),
        "--jobs",
        str(tmp_path_factory.mktemp("jobs")),
        "--device",
        "cpu",
    ]
    flags += ["--index", str(shop_index)]
    with running("serving.api", flags) as service:
        yield schemathesis.openapi.from_url(f"{service.address}/openapi.json")


@pytest.fixture(scope="module")
def matching_schema(shop_index):
    with running("product_matching.api", ["--index", str(shop_index), "--device", "cpu"]) as service:
        yield schemathesis.openapi.from_url(f"{service.address}/openapi.json")


def test_the_price_service_keeps_to_its_contract(price_schema, mode):
    checked = keeps_to_its_contract(price_schema, mode)
    assert {"POST /v1/price", "POST /v1/prices", "POST /v1/match", "POST /v1/jobs"} <= checked


def test_the_matching_service_keeps_to_its_contract(matching_schema, mode):
    assert "POST /v1/match" in keeps_to_its_contract(matching_schema, mode)


def keeps_to_its_contract(schema, mode):
    """Send requests to every endpoint: those that its schema allows, or those that break it.

    Returns:
        the endpoints that were asked.
    """
    asked = set()
    for found in schema.get_all_operations():
        operation = found.ok()

        @MADE_UP
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case):
            asked.add(operation.label)  # noqa: B023 - runs before the next operation is found
            case.call_and_validate(checks=CHECKS, timeout=60)

        # nothing can break the schema of an endpoint that takes no input
        with suppress(Unsatisfiable):
            send()
    return asked
