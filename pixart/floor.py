"""What a PixArt must compute and move at least, site by site; and the peak rates of devices."""

from __future__ import annotations

from dataclasses import dataclass

from pixart.config import PixArtConfig

ELEMENT = 2  # bytes: bf16 or fp16


@dataclass(frozen=True)
class Site:
    """A place of a block: of one pass the FLOPs of its products, and its bytes."""

    name: str
    flops: int
    bytes: int
    backward_flops: int
    backward_bytes: int


def tokens_of(pixels: int, config: PixArtConfig) -> int:
    """Tokens of a square picture, or of any with its area.

    The autoencoder is one of factor 8, as all that PixArt was published with.
    """
    return (pixels // 8 // config.patch_size) ** 2


def product(name: str, rows: int, inputs: int, outputs: int, element: int = ELEMENT) -> Site:
    """A matrix product with weights, and both of its backward: each reads the output's gradient."""
    flops, weight = 2 * rows * inputs * outputs, inputs * outputs
    once = element * (rows * (inputs + outputs) + weight)
    return Site(name, flops, once, 2 * flops, 2 * once)


def block_sites(
    config: PixArtConfig,
    tokens: int,
    text: int,
    batch: int = 1,
    residual: int = ELEMENT,
    *,
    element: int = ELEMENT,
    layer: int = 0,
) -> list[Site]:
    """The sites of one block, in the order of its forward.

    An op reads each of its inputs once and writes each of its outputs once, in elements of
    ``element`` bytes; ``residual`` is the bytes of an element of the residual stream. The
    backward's bytes contain what it makes again. Vectors (tables, biases, lengths, statistics) are
    left out, as are sums of gradients outside of ops. A class model has no sites of text.
    """
    a, r, D, F = element, residual, config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    BN, BL = batch * tokens, batch * text
    image = BN * D  # elements of a tensor of image tokens
    both = a + (a if r != a else 0)  # a branch, or what asks the text, where it needs a copy
    reads_text = config.conditioning != "class"

    def matmul(name: str, rows: int, inputs: int, outputs: int) -> Site:
        return product(name, rows, inputs, outputs, a)

    def attend(name: str, keys: int, of_keys: int) -> Site:
        flops = 4 * batch * tokens * keys * D
        # scores again, and four products; reads q, out, its gradient and k, v, writes three
        return Site(
            name,
            flops,
            a * (2 * image + of_keys),
            5 * flops // 2,
            a * (4 * image + 2 * of_keys),
        )

    def elementwise(name: str, forward: int, backward: int) -> Site:
        return Site(name, 0, forward, 0, backward)

    # as many of each token's keys and values remain
    ratio = config.compression_ratio(layer) ** 2
    kept = 2 * image // ratio
    enter = (2 * r + 2 * a) * image
    add = (2 * r + both) * image
    normalise = (2 * r + 2 * a) * image
    gelu = 2 * a * BN * F
    # backward: x, the branch and the gradients of x and h; of x and of the branch. And again.
    enter_backward = (3 * r + 3 * a) * image + enter
    sites = [
        elementwise("add MLP, LN-modulate", enter, enter_backward),
        matmul("qkv", BN, D, 3 * D),
    ]
    if ratio > 1:
        # backward: k, v and the gradient, their gradient; and again
        compress = a * (2 * image + kept)
        sites.append(elementwise("compress k, v", compress, a * (4 * image + kept) + compress))
    sites += [
        attend("self-attention", tokens // ratio, kept),
        matmul("proj", BN, D, D),
    ]
    if reads_text:
        sites += [
            # backward: the branch, the gradients of x and of the query; of x and of the branch
            elementwise("add attention", add, (2 * r + 3 * a) * image + add),
            matmul("text: q", BN, D, D),
            matmul("text: k, v", BL, D, 2 * D),
            attend("cross-attention", text, 2 * BL * D),
            matmul("text: proj", BN, D, D),
            # backward: x, the gradients of x and h; of x, and rounded for the branch. Again, h
            # alone.
            elementwise(
                "add text, LN-modulate",
                normalise,
                (3 * r + a + (both - a) + r + a) * image,
            ),
        ]
    else:
        sites.append(elementwise("add attention, LN-modulate", enter, enter_backward))
    return [
        *sites,
        matmul("fc1", BN, D, F),
        elementwise("GELU", gelu, gelu * 3 // 2 + gelu),
        matmul("fc2", BN, F, D),
    ]


def model_flops(config: PixArtConfig, tokens: int, text: int, batch: int = 1) -> int:
    """Of one forward of a whole model: matrix products, attention, the first convolution."""
    blocks = (
        site.flops
        for layer in range(config.depth)
        for site in block_sites(config, tokens, text, batch, layer=layer)
    )
    return sum(blocks) + flops_outside(config, tokens, text, batch)


def flops_outside(config: PixArtConfig, tokens: int, text: int, batch: int) -> int:
    """Of a forward, outside its blocks or once for them all."""
    D, p = config.hidden_size, config.patch_size
    ends = batch * tokens * D * p * p * (config.in_channels + config.out_channels)
    captions = batch * text * D * (config.caption_channels + D)
    if config.conditioning == "class":
        captions = 0
    # the final layer's are a table's, or a matrix's as every block's
    modulations = 6 if config.conditioning == "adaln_single" else 6 * config.depth + 2
    times = batch * D * (256 + D + modulations * D)
    return 2 * (ends + captions + times)


def seconds(flops: int, moved: int, tflops: float, gbs: float) -> float:
    """The least that an op takes at these rates: what it waits for longer."""
    return max(flops / (1e12 * tflops), moved / (1e9 * gbs))


@dataclass(frozen=True)
class Device:
    """Of one GPU, from its maker's data sheet: peak dense TFLOP/s of 16-bit matrix products and of
    float32 ones, GB/s and GB of its memory, and the watts it is rated at. Dollars an hour are
    typical of GPU clouds on demand in early 2026, where half and twice as much were asked as well.
    ``driver_name`` is what CUDA calls it: PCIe and Grace variants, of other rates, have others.
    """

    name: str
    driver_name: str
    tflops: float
    float32_tflops: float
    gbs: float
    memory_gb: float
    watts: float
    dollars_per_hour: float


# from NVIDIA's data sheets "V100 Tensor Core GPU" (SXM2), "A100 Tensor Core GPU" (80GB SXM), "H100
# Tensor Core GPU" (SXM) and "H200 Tensor Core GPU" (SXM): what those give with sparsity is halved
DEVICES = {
    # the price: the alpha paper's 28,400 dollars for its 1656 GPU-days
    "v100": Device("NVIDIA V100 SXM2 32 GB", "Tesla V100-SXM2-32GB", 125, 15.7, 900, 32, 300, 0.71),
    "a100": Device(
        "NVIDIA A100 SXM 80 GB", "NVIDIA A100-SXM4-80GB", 312, 19.5, 2039, 80, 400, 2.00
    ),
    "h100": Device("NVIDIA H100 SXM 80 GB", "NVIDIA H100 80GB HBM3", 989, 67, 3350, 80, 700, 3.00),
    "h200": Device("NVIDIA H200 SXM 141 GB", "NVIDIA H200", 989, 67, 4800, 141, 700, 4.00),
}
