"""Which classes `fuse` knows, by their full names: none of their libraries is imported."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from resnet.fusable import full_name
from resnet.fused import (
    FusedBasicBlock,
    FusedBottleneck,
    FusedResidual,
    FusedResidualBottleneck,
    FusedSmallStem,
    FusedStem,
)
from resnet.fused.block import FusedBlock
from resnet.fusing.blocks import BlockMixin
from resnet.fusing.changed import Changed
from resnet.fusing.layouts import (
    BlockLayout,
    Condition,
    Equal,
    StemLayout,
    rt_detr_stem,
    timm_block,
    timm_regnet,
    torchvision_block,
    torchvision_regnet,
    transformers_block,
)
from resnet.fusing.stems import (
    CutMixin,
    EmbeddingsMixin,
    FeaturesMixin,
    GetterMixin,
    NetworkMixin,
    SequenceMixin,
    StemMixin,
)
from resnet.reference import BasicBlock, Bottleneck, Residual, ResidualBottleneck, SmallStem, Stem
from resnet.sequential import FusedSequential


class Known(NamedTuple):
    """What a class is changed with: one that is listed here, or that was read."""

    mixin: type[Changed]
    layout: BlockLayout | StemLayout
    method: str = "forward"  # what the mixin's `_call` replaces
    conditions: tuple[Condition | Equal, ...] = ()  # under which the layout is that of a module
    keeps_layout: bool = False  # of a stem: see `FoundMixin`
    calls: tuple[str, ...] = ()  # of a network that was read: see `called`

    @property
    def called(self) -> tuple[str, ...]:
        """What the forward of a network calls for its stem; "" is a ReLU that is a function."""
        return self.calls or self.layout.calls


KNOWN = {
    "torch.nn.modules.container.Sequential": Known(CutMixin, StemLayout("0", "1", "2", "3")),
    "resnet.published.ResNet": Known(SequenceMixin, StemLayout("conv1", "bn1", "relu", "maxpool")),
    "torchvision.models.resnet.BasicBlock": Known(BlockMixin, torchvision_block(2)),
    "torchvision.models.resnet.Bottleneck": Known(BlockMixin, torchvision_block(3)),
    "torchvision.models.resnet.ResNet": Known(
        NetworkMixin, StemLayout("conv1", "bn1", "relu", "maxpool"), "_forward_impl"
    ),
    "torchvision.models._utils.IntermediateLayerGetter": Known(
        GetterMixin, StemLayout("conv1", "bn1", "relu", "maxpool")
    ),
    "torchvision.models.regnet.ResBottleneckBlock": Known(BlockMixin, torchvision_regnet()),
    "torchvision.models.regnet.SimpleStemIN": Known(StemMixin, StemLayout("0", "1", "2")),
    "timm.models.regnet.Bottleneck": Known(BlockMixin, timm_regnet()),
    "timm.models.resnet.BasicBlock": Known(BlockMixin, timm_block(2)),
    "timm.models.resnet.Bottleneck": Known(BlockMixin, timm_block(3)),
    **{
        f"timm.models._features.{name}": Known(FeaturesMixin, StemLayout("conv1", "bn1", "act1", "maxpool"), "_collect")
        for name in ("FeatureDictNet", "FeatureListNet")
    },
    "timm.models.resnet.ResNet": Known(NetworkMixin, StemLayout("conv1", "bn1", "act1", "maxpool"), "forward_features"),
    "transformers.models.resnet.modeling_resnet.ResNetBasicLayer": Known(BlockMixin, transformers_block(2)),
    "transformers.models.resnet.modeling_resnet.ResNetBottleNeckLayer": Known(BlockMixin, transformers_block(3)),
    "transformers.models.regnet.modeling_regnet.RegNetXLayer": Known(BlockMixin, transformers_block(3, "RegNet")),
    "transformers.models.regnet.modeling_regnet.RegNetYLayer": Known(
        BlockMixin, transformers_block(3, "RegNet", gate=2)
    ),
    "transformers.models.regnet.modeling_regnet.RegNetEmbeddings": Known(
        EmbeddingsMixin,
        StemLayout(
            conv="embedder.convolution",
            bn="embedder.normalization",
            relu="embedder.activation",
            containers=(("embedder", "RegNetConvLayer"),),
        ),
    ),
    "transformers.models.resnet.modeling_resnet.ResNetEmbeddings": Known(
        EmbeddingsMixin,
        StemLayout(
            conv="embedder.convolution",
            bn="embedder.normalization",
            relu="embedder.activation",
            pool="pooler",
            containers=(("embedder", "ResNetConvLayer"),),
        ),
    ),
    **{
        f"transformers.models.rt_detr.modeling_rt_detr_resnet.{name}": Known(mixin, layout)
        for name, mixin, layout in (
            ("RTDetrResNetBasicLayer", BlockMixin, transformers_block(2, "RTDetrResNet")),
            ("RTDetrResNetBottleNeckLayer", BlockMixin, transformers_block(3, "RTDetrResNet")),
            ("RTDetrResNetEmbeddings", EmbeddingsMixin, rt_detr_stem()),
        )
    },
}
STAGES = {  # that run their blocks one after the other, and do nothing else
    "timm.models.regnet.RegStage",
    "torchvision.models.regnet.AnyStage",
    "transformers.models.resnet.modeling_resnet.ResNetStage",
    "transformers.models.rt_detr.modeling_rt_detr_resnet.RTDetrResNetStage",
}
OWN: dict[type[nn.Module], type[nn.Module]] = {  # which have names already
    BasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
    Residual: FusedResidual,
    ResidualBottleneck: FusedResidualBottleneck,
    SmallStem: FusedSmallStem,
    Stem: FusedStem,
}
EAGER = {fused: eager for eager, fused in OWN.items()} | {FusedSequential: nn.Sequential}


def known(cls: type) -> Known | None:
    return KNOWN.get(full_name(cls))


def eager_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a fused one stands for; any other is its own."""
    return EAGER.get(cls) or vars(cls).get("_eager_class", cls)


def is_known(cls: type) -> bool:
    """Whether a class says what its modules are for. That is not so of `nn.Sequential`."""
    return cls in OWN or (cls is not nn.Sequential and known(cls) is not None)


def is_block(cls: type) -> bool:
    """Whether a class is known as a block's."""
    entry = known(cls)
    return issubclass(OWN.get(cls) or (entry.mixin if entry else object), FusedBlock)
