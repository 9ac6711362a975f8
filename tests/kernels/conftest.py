import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def threads_of_the_kernels():
    """Two, on a machine of one core too: the C++ ops share rows out over threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
