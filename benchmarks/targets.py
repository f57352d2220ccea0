"""What the dense X-Sample target costs beside a ResNet-50 training step on a GPU, from operations and bytes.

Target of B images with two views: the product of B embeddings of width d, and about six passes over two float32
matrices [2 B, 2 B] (mask, softmax's maximum, exponential, sum, division, product with the logits). Step: forward and
backward of 2 B images of 224 x 224, 3.8e9 multiply-adds forward each (He et al., arXiv 1512.03385, table 1) and twice
that backward. Both sides at what NVIDIA's data sheet promises of an H200: the product in TF32, the passes at memory
bandwidth, the network in bfloat16. Computed, not measured: a network at a lower share of the peak makes the target's
share smaller.

    python benchmarks/targets.py
"""

from __future__ import annotations

FLOPS_BFLOAT16, FLOPS_TF32, BYTES_A_SECOND = 989e12, 495e12, 4.8e12
FORWARD, PASSES = 2 * 3.8e9, 6


def main() -> None:
    print("| B | d | target ms | ResNet-50 step ms | share |\n|---|---|---|---|---|")
    for images, width in ((1_024, 384), (4_096, 384), (16_384, 384)):
        target = 2 * images**2 * width / FLOPS_TF32 + PASSES * 2 * 4 * (2 * images) ** 2 / BYTES_A_SECOND
        step = 2 * images * 3 * FORWARD / FLOPS_BFLOAT16
        print(f"| {images:,} | {width} | {1e3 * target:.2f} | {1e3 * step:.0f} | {target / step:.2%} |")


if __name__ == "__main__":
    main()
