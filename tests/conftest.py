from collections.abc import Iterator

import pytest
from accelerate.test_utils.testing import AccelerateTestCase


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the first precision that a process asks for: each test begins without one."""
    yield
    AccelerateTestCase().tearDown()
