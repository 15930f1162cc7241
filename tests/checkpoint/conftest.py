import pytest
from compressed_helpers import write_floats


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """A checkpoint of floats whose rows groups of any size divide; not to be changed."""
    return write_floats(tmp_path_factory.mktemp("floats"))
