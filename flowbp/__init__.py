"""flowbp: align text-to-image flow models by reward backpropagation through surrogate trajectories."""

__version__ = "0.2.0"
