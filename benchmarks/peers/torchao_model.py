"""transformers with torchao's weights: the same as transformers_model.py, in the environment that has torchao."""

from serve import serve
from transformers_model import load

if __name__ == "__main__":
    serve(load)
