"""Makes a directory that regauge reads of the reference's two checkpoints of VAR.

    python scripts/convert_var.py var_d16.pth vae_ch160v4096z32.pth -o var-d16

The files are pickles; only tensors are read from them. Tensors are kept in the dtype in which they are stored.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from regauge.hosts.regauge.modeling_var import VarForImageGeneration
from regauge.hosts.regauge.reference import config_of, from_reference, unnested


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("transformer", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--heads", type=int, help="of attention, where no learnt scale of it tells")
    parser.add_argument("--groups", type=int, default=32, help="of the norms of the tokenizer")
    said = parser.parse_args()
    transformer = dict(unnested(torch.load(said.transformer, weights_only=True, map_location="cpu")))
    tokenizer = torch.load(said.tokenizer, weights_only=True, map_location="cpu")
    model = VarForImageGeneration(config_of(transformer, tokenizer, said.heads, said.groups))
    model.load_state_dict(from_reference(transformer, tokenizer))
    model.save_pretrained(said.out)
    print(f"{said.out}: {model.config.num_hidden_layers} layers, {model.config.tokens} tokens an image")


if __name__ == "__main__":
    main()
