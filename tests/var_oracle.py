"""Runs the reference implementation of VAR in a process of its own: it changes torch's layers for the whole process.

    python tests/var_oracle.py REFERENCE CASE OUT

CASE: a file of torch with `kind`, sizes, inputs and seed; OUT: state dicts, tokens, logits and sampled images.
"""

from __future__ import annotations

import sys
from typing import Any

import torch


def main(reference: str, given: str, out: str) -> None:
    sys.path.insert(0, reference)
    from models import VAR, VQVAE  # type: ignore[import-not-found]

    case: dict[str, Any] = torch.load(given, weights_only=True)
    torch.manual_seed(case["seed"])
    codec = VQVAE(
        vocab_size=case["codes"], z_channels=8, ch=32, test_mode=True, share_quant_resi=case["phi"],
        v_patch_nums=case["sides"],
    )  # fmt: skip
    model = VAR(
        vae_local=codec, num_classes=5, depth=3, embed_dim=48, num_heads=4, norm_eps=1e-6, shared_aln=case["shared"],
        cond_drop_rate=0.0, attn_l2_norm=case["normed"], patch_nums=case["sides"],
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in (*model.named_parameters(), *codec.named_parameters()):
            if "scale_mul" not in name and "norm" not in name:
                parameter.copy_(
                    torch.randn(parameter.shape) * (0.3 if parameter.dim() < 2 else parameter[0].numel() ** -0.5)
                )
    model.eval(), codec.eval()
    tokens = codec.img_to_idxBl(case["pixels"])
    latents = codec.quantize.idxBl_to_var_input(tokens)
    with torch.no_grad():
        logits = model(case["labels"], latents)
        images = model.autoregressive_infer_cfg(
            len(case["labels"]), case["labels"], g_seed=7, cfg=2.0, top_k=20, top_p=0.9
        )
    torch.save(
        {
            "transformer": model.state_dict(),
            "tokenizer": codec.state_dict(),
            "tokens": tokens,
            "latents": latents,
            "logits": logits,
            "rebuilt": codec.img_to_reconstructed_img(case["pixels"], last_one=True),
            "images": images,
        },
        out,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
