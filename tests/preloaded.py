"""What the processes that `tests/forked.py` forks find in memory. It stays, so that none of them need search its
600,000 objects for garbage.
"""

import gc

gc.disable()

import ranks_worker  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401

import flowbp.cli.commands  # noqa: E402, F401

gc.freeze()
gc.enable()
