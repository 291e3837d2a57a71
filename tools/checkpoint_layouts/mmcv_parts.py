"""Names that detrex and mmdetection share, since both take after mmcv: the neck, and the layers of the transformer."""

from __future__ import annotations

from tools.checkpoint_layouts.conversion import Rule, deformable_attention, parameters, self_attention


def neck(norm: str) -> list[Rule]:
    """Rules for the neck.

    Args:
        norm: name of a normalisation beside its ``conv``.
    """
    return [
        parameters(rf"neck\.{source}\.(\d+)\.{part}", rf"neck.{target}.\1.{index}")
        for source, target in (("convs", "lateral"), ("extra_convs", "extra"))
        for index, part in enumerate(("conv", norm))
    ]


def encoder_layers(prefix: str, attention: str, feed_forward: str) -> list[Rule]:
    """Rules for all encoder layers.

    Args:
        prefix: of everything in a layer, with a group that captures its number.
        attention: what the deformable attention is called below it.
        feed_forward: what the feed-forward block is called below it.
    """
    own = r"encoder.layers.\1"
    return [
        *deformable_attention(rf"{prefix}\.{attention}", f"{own}.attention"),
        parameters(rf"{prefix}\.norms\.0", f"{own}.norm"),
        *feed_forward_blocks(prefix, feed_forward, 1, own),
    ]


def decoder_layers(prefix: str, self_attn: str, cross_attn: str, feed_forward: str) -> list[Rule]:
    """Rules for all decoder layers; arguments as for :func:`encoder_layers`."""
    own = r"decoder.layers.\1"
    return [
        *self_attention(rf"{prefix}\.{self_attn}\.attn", f"{own}.self_attention"),
        *deformable_attention(rf"{prefix}\.{cross_attn}", f"{own}.cross_attention"),
        parameters(rf"{prefix}\.norms\.0", f"{own}.self_norm"),
        parameters(rf"{prefix}\.norms\.1", f"{own}.cross_norm"),
        *feed_forward_blocks(prefix, feed_forward, 2, own),
    ]


def feed_forward_blocks(prefix: str, name: str, norm: int, own: str) -> list[Rule]:
    """Rules for the feed-forward blocks ``name`` of all layers, with the number of the norm after them."""
    return [
        parameters(rf"{prefix}\.{name}\.layers\.0\.0", f"{own}.feed_forward.expand"),
        parameters(rf"{prefix}\.{name}\.layers\.1", f"{own}.feed_forward.contract"),
        parameters(rf"{prefix}\.{name}\.(?:activation|layers\.0\.1)", f"{own}.feed_forward.activation"),
        parameters(rf"{prefix}\.norms\.{norm}", f"{own}.feed_forward.norm"),
    ]
