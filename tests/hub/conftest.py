"""A local Hub."""

import pytest
from support.hub_server import HubServer


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server
