"""Count the memory and the arithmetic of the LPL term at full size, without a GPU and without the memory.

    python benchmarks/memory.py

Peak of the bytes that are alive while the term's value and gradient are computed, beyond the decoder's weights, and
FLOPs per gated sample. Everything runs on fake tensors: shapes without values. The decoder is in bf16.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderKL, AutoencoderTiny
from torch._subclasses.fake_tensor import FakeTensorMode


sys.path.insert(0, str(Path(__file__).parent.parent))
from counters import LiveBytes, count_flops  # noqa: E402
from lpl_utils import LatentPerceptualLoss  # noqa: E402


WIDTHS = (128, 256, 512, 512)
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
DC_AE = {"scaling_factor": 0.41407, "attention_head_dim": 32, "upsample_block_type": "interpolate"}
DC_AE |= {"encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3, "downsample_block_type": "Conv"}
DC_AE |= {"decoder_block_types": DC_AE["encoder_block_types"], "encoder_layers_per_block": (2, 2, 2, 3, 3, 3)}
VAES = {
    # Stable Diffusion's and SDXL's have the same shape; the second is cross-attention/asymmetric-autoencoder-kl-x-1-5.
    "SD": lambda: AutoencoderKL(block_out_channels=WIDTHS, layers_per_block=2, **BLOCKS),
    "asymmetric x 1.5": lambda: AsymmetricAutoencoderKL(
        down_block_out_channels=WIDTHS,
        layers_per_down_block=2,
        up_block_out_channels=(192, 384, 768, 768),
        layers_per_up_block=3,
        **BLOCKS,
    ),
    "deep compression": lambda: AutoencoderDC(**DC_AE),  # Sana's
    "TAESD": lambda: AutoencoderTiny(),
}


def measure(vae_name, resolution, batch, **options):
    """Peak bytes and FLOPs of one forward and backward pass of the term over a batch."""
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        vae = VAES[vae_name]()
        torch.set_default_dtype(torch.float32)
        lpl = LatentPerceptualLoss(vae, **options)
        side = resolution // getattr(vae, "spatial_compression_ratio", 8)

        def term():
            z0, z0_hat = torch.randn(2, batch, vae.config.latent_channels, side, side)
            lpl(z0_hat.requires_grad_(), z0)[0].sum().backward()

        with LiveBytes() as memory:
            term()
        return memory.peak, count_flops(term)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", choices=VAES, default="SD")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[512, 1024])
    args = parser.parse_args()
    variants = {
        "plain autograd, batch 1": (1, {"chunk_size": 0}),
        "plain autograd, batch 4": (4, {"chunk_size": 0}),
        "streamed, batch 1": (1, {}),
        "streamed, batch 4": (4, {}),
        "streamed, checkpointed": (1, {"gradient_checkpointing": True}),
        "streamed, checkpointed, 3 up blocks": (1, {"gradient_checkpointing": True, "num_blocks": 3}),
        "streamed, 3 up blocks": (1, {"num_blocks": 3}),
        "streamed, 2 up blocks": (1, {"num_blocks": 2}),
    }
    print(f"| {args.vae} VAE | " + " | ".join(f"{r} px: GiB | TFLOP per sample" for r in args.resolutions) + " |")
    print("|---" * (1 + 2 * len(args.resolutions)) + "|")
    for name, (batch, options) in variants.items():
        row = [measure(args.vae, resolution, batch, **options) for resolution in args.resolutions]
        print(
            f"| {name} | " + " | ".join(f"{b / 2**30:.1f} | {f / batch / 1e12:.1f}" for b, f in row) + " |", flush=True
        )


if __name__ == "__main__":
    main()
