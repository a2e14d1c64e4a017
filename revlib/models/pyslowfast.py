"""What a PySlowFast configuration must say for a model here to compute what it computes.

Weights fit by their shapes, and shapes tell neither the heads of a ViT, nor strides, nor where the last norm stands.
PySlowFast's checkpoints hold their configuration, which does.

Source: github.com/facebookresearch/SlowFast (slowfast/config/defaults.py, configs REV_*.yaml).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from revlib.models.mvit_kinetics import PublishedRevMViTVideo
from revlib.models.mvit_published import PublishedRevMViT
from revlib.models.vit import RevViT

__all__ = ["refuse_other_settings"]

SlowFast = RevViT | PublishedRevMViT | PublishedRevMViTVideo


class Setting(NamedTuple):
    """A setting of a configuration: its name, the value that fits the model, and the argument that changes that."""

    name: str
    value: Any
    argument: str = ""


def refuse_other_settings(model: SlowFast, config: str | Mapping[str, Any] | None) -> bool:
    """Whether there is a configuration: a mapping, or YAML. Settings that it leaves out are not looked at.

    Raises: ValueError where one says something else than the model, with what to change.
    """
    if isinstance(config, str):
        import yaml  # type: ignore[import-untyped]  # timm comes with it

        config = yaml.safe_load(config)
    if not isinstance(config, Mapping):
        return False
    wrong = []
    for setting in _settings(model):
        found = _found(config, setting.name)
        if found is None or found == setting.value or found == []:
            continue
        advice = (
            f"change {setting.argument} of the model"
            if setting.argument
            else "no model here has that"
        )
        wrong.append(
            f"{setting.name} is {found}, and {setting.value} of this {type(model).__name__}; {advice}"
        )
    if wrong:
        raise ValueError(
            "\n  ".join(["the configuration of the checkpoint is of another network:", *wrong])
        )
    return True


def _settings(model: SlowFast) -> Iterator[Setting]:
    yield Setting("MVIT.NUM_HEADS", _heads(model), "num_heads")
    yield Setting("MVIT.USE_MEAN_POOLING", not isinstance(model.fc_norm, nn.Identity), "fc_norm")
    yield Setting("MVIT.REV.RESPATH_FUSE", "concat")
    for name in (
        "CLS_EMBED_ON",
        "RESIDUAL_POOLING",
        "POOL_FIRST",
        "REL_POS_SPATIAL",
        "REL_POS_TEMPORAL",
    ):
        yield Setting(f"MVIT.{name}", False)
    if isinstance(model, RevViT):
        return
    depths = [len(stage.pairs) + (stage.transition is not None) for stage in model.stages]
    transitions = list(itertools.accumulate(depths))[:-1]
    first = model.stages[0].pairs[0].F.attn.pool_k
    yield Setting("MVIT.REV.RES_PATH", "conv")
    fusion = "avg" if isinstance(model, PublishedRevMViTVideo) else "concat_linear_2"
    yield Setting("MVIT.REV.PRE_Q_FUSION", fusion)
    yield Setting("MVIT.REV.BUFFER_LAYERS", transitions, "depths")
    yield Setting("MVIT.POOL_Q_STRIDE", [[layer, 1, 2, 2] for layer in transitions], "depths")
    yield Setting(
        "MVIT.POOL_KV_STRIDE_ADAPTIVE", [1, *(first.stride[-2:] if first else (1, 1))], "kv_stride"
    )


def _heads(model: SlowFast) -> int:
    if isinstance(model, RevViT):
        attention: Any = model.blocks.get_submodule("0.F.1")
    else:
        attention = model.stages[0].pairs[0].F.attn
    return attention.num_heads


def _found(config: Mapping[str, Any], name: str) -> Any:
    """The value of a setting by its dotted name, or None if it is left out."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return (
        [list(v) if isinstance(v, tuple) else v for v in value]
        if isinstance(value, (list, tuple))
        else value
    )
