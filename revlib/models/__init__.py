"""Models: thin compositions of timm's layers and :class:`~revlib.ReversibleSequence`.

Importing this registers their published sizes with timm, see :mod:`revlib.models.presets`. They keep timm's
conventions, each beside the model of timm that it is made of; "-" marks what a model does not have. The features of
RevMViT are as wide as one stream, since every stage fuses its two; those of RevViT and RevSwin are as wide as two.

| convention | RevViT | vit | RevSwin | swin | RevMViT | mvitv2 |
|---|---|---|---|---|---|---|
| `forward_features` | NLC | NLC | NHWC | NHWC | NLC | NLC |
| `output_fmt`, `pool_size` | - | - | yes | yes | - | - |
| class token | - | by default | - | - | `class_token` | in some sizes |
| `num_prefix_tokens` | 0 | 1 | 0 | - | 0 or 1 | 0 or 1 |
| `global_pool` | avg, "" | token and seven more | avg, "" | avg and more | avg, token, "" | avg, token, "" |
| `get_classifier()` | head | head | head | head.fc | head.fc | head.fc |
| `drop_rate` | before the classifier | the same | the same | the same | the same | the same |
| `proj_drop_rate`, `attn_drop_rate` | yes | yes | yes | yes | - | - |
| `norm_layer` by name | yes | yes | yes | - | yes | - |
| `act_layer` by name | yes | yes | yes | - | yes | - |
| `device`, `dtype` | yes | yes | yes | yes | yes | yes |
| `set_input_size` | yes | yes | yes | yes | yes | - |
| `dynamic_img_size` | off by default | off by default | on by default | off by default | - | - |
| `forward_intermediates` | yes | yes | yes | yes | yes | yes |
| `get_intermediate_layers` | yes | yes | yes | - | yes | - |
| `features_only`, `getter` | yes | yes | yes | yes | yes | yes |
| `features_only`, `hook` | both streams | yes | both streams | yes | yes | - |
| `features_only`, `fx` | yes | yes | yes | yes | yes | - |
| `torch.fx.symbolic_trace` | yes | yes | yes | yes | yes | - |
| `torch.jit.script` | refused | yes | refused | yes | refused | yes |
| checkpoints of another size | resampled | resampled | resampled | resampled | resampled | resampled |
| `reparameterize_model` | yes | yes | yes | yes | yes | yes |
| `save_for_hf` and back | yes | yes | yes | yes | yes | yes |
| `set_grad_checkpointing` | scheduler | checkpoints | scheduler | checkpoints | scheduler | checkpoints |

A symbolic trace notes reversible stages as one call each, so that a traced network trains in the memory of the
original. Hooks find feature maps at the modules that ``feature_info`` names: ``taps.0`` and so on of RevViT and
RevSwin, which run only while they have hooks. Both of torch's ONNX exporters take the models in evaluation mode.
"""

from typing import TYPE_CHECKING

from revlib.models import presets
from revlib.models.fusion import Concat, ConcatLinear, ConcatMlp, Mean
from revlib.models.minrev import minrev_mvit, minrev_swin, minrev_vit
from revlib.models.mvit import RevMViT
from revlib.models.mvit_kinetics import PublishedRevMViTVideo
from revlib.models.mvit_published import PublishedRevMViT
from revlib.models.swin import RevSwin
from revlib.models.vit import RevViT

if TYPE_CHECKING:
    from revlib.models.video import RevMViTVideo

__all__ = [
    "Concat",
    "ConcatLinear",
    "ConcatMlp",
    "Mean",
    "PublishedRevMViT",
    "PublishedRevMViTVideo",
    "RevMViT",
    "RevMViTVideo",
    "RevSwin",
    "RevViT",
    "minrev_mvit",
    "minrev_swin",
    "minrev_vit",
    "presets",
]


def __getattr__(name: str) -> object:
    """The model of clips is of torchvision's blocks, which are imported for those who ask for it."""
    if name != "RevMViTVideo":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from revlib.models.video import RevMViTVideo

    return RevMViTVideo
