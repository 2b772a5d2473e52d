"""Linear layers of torchao: the same as linear_torch.py, in the environment that has torchao."""

from linear_torch import load
from serve import serve

if __name__ == "__main__":
    serve(load)
