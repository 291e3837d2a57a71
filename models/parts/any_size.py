"""timm's models where images of any size would have them compute otherwise than their training did."""

from __future__ import annotations

from timm.layers import Conv2dSame, PatchEmbed
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


class EvenConv2dSame(Conv2dSame):
    """A convolution with TensorFlow's padding, of maps whose sides its stride divides.

    timm asks the map's size every time, and a graph for all sizes would ask it, too.
    """

    def padded(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] with what the kernel looks at beside it: more on the right and at the bottom, if uneven."""
        kernels = zip(self.kernel_size, self.stride, self.dilation, strict=True)
        below, beside = (max(dilation * (side - 1) + 1 - stride, 0) for side, stride, dilation in kernels)
        return F.pad(maps, (beside // 2, beside - beside // 2, below // 2, below - below // 2))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C', H / stride, W / stride]."""
        return F.conv2d(self.padded(x), self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


def accept_any_size(body: nn.Module) -> None:
    """Change how a model computes, not its parameters and state.

    A Swin transformer pads images to whole patches, and features to whole windows before the shift. Convolutions with
    TensorFlow's padding take maps whose sides their stride divides, where all others leave such maps; the backbone
    pads images to the model's stride then.
    """
    swin = any(isinstance(module, SwinTransformerBlock) for module in body.modules())
    even = all(_divides(module) for module in body.modules() if type(module) is nn.Conv2d)
    for module in body.modules():
        if isinstance(module, SwinTransformerBlock):
            module.__class__ = PadFirstBlock
        elif even and type(module) is Conv2dSame:
            module.__class__ = EvenConv2dSame
        elif swin and isinstance(module, PatchEmbed):
            vars(module)["dynamic_img_pad"] = True  # declared final, for TorchScript alone


def _divides(convolution: nn.Conv2d) -> bool:
    """Whether a map is as small as its stride says, not smaller for want of padding (as in NASNet's stem)."""
    if isinstance(convolution.padding, str):  # PyTorch's "same" has no stride
        return convolution.padding == "same"
    sides = zip(convolution.kernel_size, convolution.stride, convolution.dilation, convolution.padding, strict=True)
    return all(2 * padding >= dilation * (side - 1) + 1 - stride for side, stride, dilation, padding in sides)
