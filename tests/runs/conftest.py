from __future__ import annotations

import pytest

from tests.runs.work import execute


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The rows of a run in one go."""
    return execute(tmp_path_factory.mktemp("whole"))
