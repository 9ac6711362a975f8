import pytest
import torch


@pytest.fixture(scope="module", autouse=True)  # a package of no __init__ is the whole session to pytest
def threads_of_the_kernels():
    """Two, on a machine of one core too: the C++ ops share rows out over threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
