"""What the tests of this room share."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked():
    """Without the run-time type checks of the tests, which would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
