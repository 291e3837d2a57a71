"""timm's Swin transformer, computing as in the published detectors on images of any size."""

from __future__ import annotations

from timm.layers import PatchEmbed
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F


class PadFirstBlock(SwinTransformerBlock):
    """A block that pads its input to whole windows before it shifts them; timm shifts first.

    The detectors of the Swin paper (arXiv 2103.14030) pad first. Both are the same where nothing has to be padded.
    """

    def _attn(self, x: Tensor) -> Tensor:
        """[B, H, W, C] → [B, H, W, C]."""
        height, width = x.shape[1:3]
        window_height, window_width = self.window_size
        padded = F.pad(x, (0, 0, 0, -width % window_width, 0, -height % window_height))
        return super()._attn(padded)[:, :height, :width]


def accept_any_size(body: nn.Module) -> None:
    """Make a Swin transformer pad images to whole patches, and features to whole windows before the shift.

    Other models are left as they are.
    """
    blocks = [module for module in body.modules() if isinstance(module, SwinTransformerBlock)]
    for block in blocks:
        # Same parameters and state, another way to compute.
        block.__class__ = PadFirstBlock
    for module in body.modules():
        if blocks and isinstance(module, PatchEmbed):
            vars(module)["dynamic_img_pad"] = True  # declared final, for TorchScript alone
