"""What a press of kvpress leaves of transformers' full cache, in the environment of `setup.py kvpress`."""

from cache_torch import load
from serve import serve

if __name__ == "__main__":
    serve(load)
