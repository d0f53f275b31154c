"""Residual blocks as people write them, and modules that are none, each by a forward of its own."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Textbook(nn.Module):
    """As in d2l.ai: functions, and a convolution for a shortcut where there is one."""

    def __init__(self, C: int, K: int, stride: int = 1):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(C, K, 3, stride, 1), nn.Conv2d(K, K, 3, 1, 1)
        self.conv3 = None if (C, stride) == (K, 1) else nn.Conv2d(C, K, 1, stride)
        self.bn1, self.bn2 = nn.BatchNorm2d(K), nn.BatchNorm2d(K)

    def forward(self, X):
        Y = F.relu(self.bn1(self.conv1(X)))
        Y = self.bn2(self.conv2(Y))
        if self.conv3:
            X = self.conv3(X)
        Y += X
        return F.relu(Y)


class StepByStep(nn.Module):
    """A module a line, and a shortcut that may be None."""

    def __init__(self, C: int, K: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, K, 3, stride, 1, bias=False), nn.BatchNorm2d(K)
        self.conv2, self.bn2 = nn.Conv2d(K, K, 3, 1, 1, bias=False), nn.BatchNorm2d(K)
        self.relu = nn.ReLU(inplace=True)
        project = nn.Sequential(nn.Conv2d(C, K, 1, stride, bias=False), nn.BatchNorm2d(K))
        self.downsample = None if (C, stride) == (K, 1) else project

    def forward(self, x: Tensor) -> Tensor:
        """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut)"""
        identity = x
        out: Tensor = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class Narrow(nn.Module):
    """A bottleneck, whose shortcut is an empty sequence where it is the identity."""

    def __init__(self, C: int, K: int, stride: int = 1):
        super().__init__()
        width = K // 2
        self.conv1, self.bn1 = nn.Conv2d(C, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, K, 1, bias=False), nn.BatchNorm2d(K)
        project = [] if (C, stride) == (K, 1) else [nn.Conv2d(C, K, 1, stride, bias=False), nn.BatchNorm2d(K)]
        self.shortcut = nn.Sequential(*project)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return torch.relu(out)


class InSequence(nn.Module):
    """All in one expression, the units in a sequence."""

    def __init__(self, C: int, K: int, stride: int = 1):
        super().__init__()
        first = nn.Conv2d(C, K, 3, stride, 1), nn.BatchNorm2d(K), nn.ReLU(inplace=True)
        self.residual = nn.Sequential(*first, nn.Conv2d(K, K, 3, 1, 1), nn.BatchNorm2d(K))
        project = [] if (C, stride) == (K, 1) else [nn.Conv2d(C, K, 1, stride), nn.BatchNorm2d(K)]
        self.shortcut = nn.Sequential(*project)

    def forward(self, x):
        return nn.ReLU(inplace=True)(self.shortcut(x) + self.residual(x))


class Flagged(nn.Module):
    """A flag says whether there is a shortcut, whose norm lies beside it."""

    def __init__(self, C: int, K: int, stride: int = 1):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(C, K, 3, stride, 1), nn.BatchNorm2d(K)
        self.b, self.norm_b = nn.Conv2d(K, K, 3, 1, 1), nn.BatchNorm2d(K)
        self.drop = nn.Identity()
        self.projects = (C, stride) != (K, 1)
        if self.projects:
            self.c, self.norm_c = nn.Conv2d(C, K, 1, stride), nn.BatchNorm2d(K)

    def forward(self, x):
        y = self.drop(self.norm_a(self.a(x)).relu())
        shortcut = x if not self.projects else self.norm_c(self.c(x))
        return torch.add(shortcut, self.norm_b(self.b(y))).relu_()


class Layer(nn.Sequential):
    """A convolution, its norm, and perhaps a ReLU: an `nn.Sequential` that is told what to hold."""

    def __init__(self, C: int, K: int, size: int, stride: int = 1, relu: bool = True):
        layers = nn.Conv2d(C, K, size, stride, size // 2, bias=False), nn.BatchNorm2d(K)
        super().__init__(*layers, *[nn.ReLU()] * relu)


class OfLayers(nn.Module):
    """Sequences in sequences, and a shortcut that may begin with a pool."""

    def __init__(self, C: int, K: int, stride: int = 1):
        super().__init__()
        self.residual = nn.Sequential(Layer(C, K, 3, stride), Layer(K, K, 3, relu=False))
        pool = [nn.AvgPool2d(stride, ceil_mode=True)] if stride > 1 else []
        self.shortcut = nn.Sequential(*pool, *[Layer(C, K, 1, relu=False)] * (C != K))
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.residual(x) + self.shortcut(x))


class OfPlainLayers(OfLayers):
    """One whose shortcut is a layer itself."""

    def __init__(self, C: int, K: int, stride: int = 1):
        super().__init__(C, K)
        self.residual[0][0].stride = stride, stride
        self.shortcut = Layer(C, K, 1, stride, relu=False)


class Gate(nn.Module):
    """Squeeze-and-excitation on a matrix of means, as most have copied it."""

    def __init__(self, C: int):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(C, 2), nn.ReLU(inplace=True), nn.Linear(2, C), nn.Sigmoid())

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class GateOfMaps(nn.Module):
    """Squeeze-and-excitation by convolutions of a pixel."""

    def __init__(self, C: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(C, 2, 1), nn.Conv2d(2, C, 1)

    def forward(self, x):
        whole = x
        x = F.relu(self.fc1(x.mean((2, 3), keepdim=True)), inplace=True)
        x = torch.sigmoid(self.fc2(x))
        return x * whole


class GateOfShapes(Gate):
    def forward(self, x):
        y: Tensor = x.mean(dim=[-2, -1])
        gates = self.fc(y).reshape(x.shape[0], -1, 1, 1)
        x = x * gates
        return x


class GateOfAFunction(GateOfMaps):
    def forward(self, x):
        y = self.fc2(self.fc1(F.adaptive_avg_pool2d(x, 1)).relu_()).sigmoid()
        return x * y


class GateOfFlags(nn.Module):
    """One that may give the gates alone, and use a linear layer."""

    def __init__(self, C: int, uses_convs: bool = True):
        super().__init__()
        self.pool, self.uses_convs, self.gives_gates = nn.AdaptiveAvgPool2d(1), uses_convs, False
        if uses_convs:
            self.fc1, self.fc2 = nn.Conv2d(C, 2, 1), nn.Conv2d(2, C, 1)
        else:
            self.linear = nn.Linear(C, C)

    def forward(self, x):
        y = self.pool(x)
        if not self.uses_convs:
            y = y.view(x.size(0), -1)
        y = F.relu(self.fc1(y)) if self.uses_convs else self.linear(y)
        if self.uses_convs:
            y = self.fc2(y)
        else:
            y = y.unsqueeze(2).unsqueeze(3)
        if self.gives_gates:
            return y
        return x * y


class GateOfALinearLayer(GateOfFlags):
    def __init__(self, C: int):
        super().__init__(C, uses_convs=False)


class GateOfPixels(Gate):
    def forward(self, x):
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


GATES = [Gate, GateOfMaps, GateOfShapes, GateOfAFunction, GateOfFlags, GateOfALinearLayer, GateOfPixels]


def named(full_name: str):
    """Lets a class have the name of one of a library that is on no index, and which is known by it."""

    def rename(cls: type[nn.Module]) -> type[nn.Module]:
        cls.__module__, _, cls.__qualname__ = full_name.rpartition(".")
        cls.forward.__module__, cls.forward.__qualname__ = cls.__module__, f"{cls.__qualname__}.forward"
        return cls

    return rename


@named("detectron2.layers.wrappers.Conv2d")
class ConvWithNorm(nn.Conv2d):
    """A convolution that holds its norm, and an activation."""

    def __init__(self, *args, norm: nn.Module | None = None, activation: nn.Module | None = None, **options):
        super().__init__(*args, **options)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


@named("detectron2.layers.batch_norm.FrozenBatchNorm2d")
class ConstantNorm(nn.Module):
    """A norm of constants that gives the type of its input."""

    def __init__(self, C: int):
        super().__init__()
        for name, fill in (("weight", 1.5), ("bias", 0.1), ("running_mean", 0.2), ("running_var", 0.8)):
            self.register_buffer(name, torch.full((C,), fill))
        self.eps = 1e-5

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)


class OfConvsWithNorms(nn.Module):
    def __init__(self, C: int, K: int, stride: int = 1, norm: type[nn.Module] = nn.BatchNorm2d):
        super().__init__()
        self.conv1 = ConvWithNorm(C, K, 3, stride, 1, bias=False, norm=norm(K))
        self.conv2 = ConvWithNorm(K, K, 3, 1, 1, bias=False, norm=norm(K))
        projects = (C, stride) != (K, 1)
        self.shortcut = ConvWithNorm(C, K, 1, stride, bias=False, norm=norm(K)) if projects else None

    def forward(self, x):
        out = F.relu_(self.conv1(x))
        out = self.conv2(out)
        if self.shortcut is not None:
            shortcut = self.shortcut(x)
        else:
            shortcut = x
        out += shortcut
        return F.relu_(out)


class StemOfAConvWithNorm(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d):
        super().__init__()
        self.conv1 = ConvWithNorm(3, 4, 7, 2, 3, bias=False, norm=norm(4))

    def forward(self, x):
        x = self.conv1(x)
        x = F.relu_(x)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class Excited(nn.Module):
    """A block with squeeze-and-excitation after its last norm."""

    gate: type[nn.Module] = Gate

    def __init__(self, C: int, K: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, K, 3, stride, 1, bias=False), nn.BatchNorm2d(K)
        self.conv2, self.bn2 = nn.Conv2d(K, K, 3, 1, 1, bias=False), nn.BatchNorm2d(K)
        self.relu, self.se = nn.ReLU(inplace=True), self.gate(K)
        project = nn.Sequential(nn.Conv2d(C, K, 1, stride, bias=False), nn.BatchNorm2d(K))
        self.downsample = None if (C, stride) == (K, 1) else project

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        out = out + (x if self.downsample is None else self.downsample(x))
        return self.relu(out)


class ExcitedInside(nn.Module):
    """A bottleneck with squeeze-and-excitation before its last convolution, as RegNetY's."""

    def __init__(self, C: int, K: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, K, 1, bias=False), nn.BatchNorm2d(K)
        self.conv2, self.bn2 = nn.Conv2d(K, K, 3, stride, 1, bias=False), nn.BatchNorm2d(K)
        self.conv3, self.bn3 = nn.Conv2d(K, K, 1, bias=False), nn.BatchNorm2d(K)
        self.se = GateOfMaps(K)
        project = nn.Sequential(nn.Conv2d(C, K, 1, stride, bias=False), nn.BatchNorm2d(K))
        self.downsample = None if (C, stride) == (K, 1) else project

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.se(F.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out)


class ConvNorm(nn.Module):
    """A convolution, its norm, and perhaps a ReLU: a module whose flags say what it has."""

    def __init__(self, C: int, K: int, size: int, stride: int = 1, activate: bool = True):
        super().__init__()
        self.pads, self.blurs, self.activates = False, False, activate
        self.conv, self.bn = nn.Conv2d(C, K, size, stride, size // 2, bias=False), nn.BatchNorm2d(K)
        if activate:
            self.activ = nn.ReLU(inplace=True)

    def forward(self, x):
        if self.pads or self.blurs:
            x = self.pad(x)
        x = self.bn(self.conv(x))
        if self.activates:
            x = self.activ(x)
        return x


class Body(nn.Module):
    def __init__(self, C: int, K: int, stride: int):
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(C, K, 3, stride), ConvNorm(K, K, 3, activate=False)

    def forward(self, x):
        x = self.conv1(x)
        x = self.conv2(x)
        return x


class OfUnits(nn.Module):
    """Modules of a class that somebody wrote, in another one."""

    def __init__(self, C: int, K: int, stride: int = 1):
        super().__init__()
        self.body, self.activ = Body(C, K, stride), nn.ReLU(inplace=True)
        self.resizes = (C, stride) != (K, 1)
        if self.resizes:
            self.shortcut = ConvNorm(C, K, 1, stride, activate=False)

    def forward(self, x):
        if self.resizes:
            identity = self.shortcut(x)
        else:
            identity = x
        x = self.body(x)
        x = x + identity
        return self.activ(x)


class OfFunctions(StepByStep):
    """A function in the forward, which may run under a checkpoint, and norms whose names are configured."""

    def __init__(self, C: int, K: int, stride: int = 1):
        super().__init__(C, K, stride)
        self.norm1_name, self.norm2_name, self.checkpoints = "bn1", "bn2", False

    @property
    def norm1(self) -> nn.Module:
        """The first norm."""
        return getattr(self, self.norm1_name)

    @property
    def norm2(self) -> nn.Module:
        return getattr(self, self.norm2_name)

    def forward(self, x):
        def inner(x):
            identity = x
            out = self.norm1(self.conv1(x))
            out = self.relu(out)
            out = self.norm2(self.conv2(out))
            if self.downsample is not None:
                identity = self.downsample(x)
            out += identity
            return out

        if self.checkpoints and x.requires_grad:
            out = torch.utils.checkpoint.checkpoint(inner, x)
        else:
            out = inner(x)
        return self.relu(out)


BLOCKS = [
    OfUnits,
    OfFunctions,
    Textbook,
    StepByStep,
    Narrow,
    InSequence,
    Flagged,
    OfLayers,
    OfPlainLayers,
    Excited,
    ExcitedInside,
]


class PreActivated(nn.Module):
    """Norms and ReLUs precede the convolutions; the shortcut's, where it has one, reads what the first give."""

    def __init__(self, C: int, K: int, stride: int = 1):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(C), nn.Conv2d(C, K, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(K), nn.Conv2d(K, K, 3, 1, 1, bias=False)
        if (C, stride) != (K, 1):
            self.shortcut = nn.Sequential(nn.Conv2d(C, K, 1, stride, bias=False))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class PreActivatedNarrow(nn.Module):
    """A bottleneck of three, the shortcut's convolution an attribute that may be None."""

    def __init__(self, C: int, K: int, stride: int = 1):
        super().__init__()
        width = K // 2
        self.norm1, self.conv1 = nn.BatchNorm2d(C), nn.Conv2d(C, width, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm3, self.conv3 = nn.BatchNorm2d(width), nn.Conv2d(width, K, 1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None if (C, stride) == (K, 1) else nn.Conv2d(C, K, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        before = self.relu(self.norm1(x))
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(before)
        x = self.conv1(before)
        x = self.conv2(self.relu(self.norm2(x)))
        x = self.conv3(self.relu(self.norm3(x)))
        return x + shortcut


class Wide(nn.Module):
    """A Wide ResNet's, by flags: what is normalised takes the input's name where a convolution is the shortcut."""

    def __init__(self, C: int, K: int, stride: int = 1, drop: float = 0.0):
        super().__init__()
        self.bn1, self.relu1, self.conv1 = nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, K, 3, stride, 1, bias=False)
        self.bn2, self.relu2, self.conv2 = nn.BatchNorm2d(K), nn.ReLU(), nn.Conv2d(K, K, 3, 1, 1, bias=False)
        self.drop, self.equal = drop, (C, stride) == (K, 1)
        self.project = None if self.equal else nn.Conv2d(C, K, 1, stride, bias=False)

    def forward(self, x):
        if not self.equal:
            x = self.relu1(self.bn1(x))
        else:
            out = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(out if self.equal else x)))
        if self.drop > 0:
            out = F.dropout(out, self.drop, self.training)
        return torch.add(x if self.equal else self.project(x), self.conv2(out))


class PreActivatedInSequence(nn.Module):
    """A sequence, whose convolutions have biases, beside a convolution of the input as it is."""

    def __init__(self, C: int, K: int, stride: int = 1):
        super().__init__()
        units = nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, K, 3, stride, 1)
        self.residual = nn.Sequential(*units, nn.BatchNorm2d(K), nn.ReLU(), nn.Conv2d(K, K, 3, 1, 1))
        self.shortcut = nn.Sequential() if (C, stride) == (K, 1) else nn.Conv2d(C, K, 1, stride)

    def forward(self, x):
        return self.residual(x) + self.shortcut(x)


PRE_ACTIVATED = [PreActivated, PreActivatedNarrow, Wide, PreActivatedInSequence]


class AddsWhatIsActivated(PreActivated):
    def forward(self, x):
        out = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + out


class AddsANorm(PreActivated):
    def forward(self, x):
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(x))))) + self.bn1(x)


class ActivatesOnce(PreActivated):
    def forward(self, x):
        return self.conv2(self.bn2(self.conv1(F.relu(self.bn1(x))))) + x


class ReadsItsNormAgain(PreActivated):
    def forward(self, x):
        normed = self.bn1(x)
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(normed))))) + self.shortcut(normed)


class AddsToItsInput(PreActivated):
    def forward(self, x):
        x += self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return x


class NormsItsShortcut(PreActivated):
    def __init__(self, C: int, K: int, stride: int = 1):
        super().__init__(C, K, stride)
        self.shortcut = nn.Sequential(nn.Conv2d(C, K, 1, stride, bias=False), nn.BatchNorm2d(K))


class Drops(Wide):
    def __init__(self, C: int, K: int, stride: int = 1):
        super().__init__(C, K, stride, drop=0.5)


class AddsToItsShortcut(PreActivated):
    def forward(self, x):
        shortcut = self.shortcut(x) if hasattr(self, "shortcut") else x
        shortcut += self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return shortcut


class AddsItself(PreActivated):
    def forward(self, x):
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return out + out


OTHERS_PRE_ACTIVATED = [
    AddsWhatIsActivated,
    AddsANorm,
    ActivatesOnce,
    ReadsItsNormAgain,
    AddsToItsInput,
    NormsItsShortcut,
    Drops,
    AddsToItsShortcut,
    AddsItself,
]


class AddsItsGate(Gate):
    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)
        return x + y


class SquaresItsGate(Gate):
    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)
        return y * y


class ReadsItsMeansAgain(GateOfMaps):
    def forward(self, x):
        y = self.fc1(x.mean((2, 3), keepdim=True))
        y.relu_()
        return x * self.fc2(y).sigmoid()


class KeepsAMean(GateOfMaps):
    def forward(self, x):
        y = self.fc1(x.mean((2, 3), keepdim=True))
        z = F.relu_(y)
        return x * self.fc2(y).sigmoid() * z.sum()


class MeansOfRows(GateOfMaps):
    def forward(self, x):
        return x * self.fc2(self.fc1(x.mean((3,), keepdim=True))).sigmoid()


class WithoutMeans(GateOfMaps):
    def forward(self, x):
        return x * self.fc2(self.fc1(x)).sigmoid()


class ChangesItsMap(GateOfMaps):
    def forward(self, x):
        x = self.fc2(self.fc1(x.mean((2, 3), keepdim=True)))
        return x * x.sigmoid()


class CallsWhatItDoesNotUse(GateOfMaps):
    def forward(self, x):
        y = self.fc1(x.mean((2, 3), keepdim=True))
        y = x.mean((2, 3), keepdim=True)
        return x * self.fc2(self.fc1(y)).sigmoid()


class SwapsItsSizes(Gate):
    def forward(self, x):
        c, b, _, _ = x.size()
        y = self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)
        return x * y


class CallsItsMethod(GateOfMaps):
    def fc1(self, x):
        return x

    def forward(self, x):
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True))).sigmoid()


class LeavesAMean(GateOfMaps):
    def forward(self, x):
        z = self.fc1(x.mean((2, 3), keepdim=True))
        y = self.fc1(x.mean((2, 3), keepdim=True))
        z = self.fc2(z)
        return x * self.fc2(y).sigmoid()


class GatesByAMatrix(Gate):
    def forward(self, x):
        return x * self.fc(x.mean((2, 3)))


class TwoForms(GateOfMaps):
    """Convolutions before a matrix, or after one."""

    def __init__(self, C: int):
        super().__init__(C)
        self.linear = nn.Linear(C, C)


class ConvolutionsFirst(TwoForms):
    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.fc2(self.fc1(x.mean((2, 3), keepdim=True))).view(b, c)
        return x * self.linear(y).view(b, c, 1, 1)


class ConvolutionsLast(TwoForms):
    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.linear(x.mean((2, 3))).view(b, c, 1, 1)
        return x * self.fc2(self.fc1(y))


class AddsAnAxisBefore(Gate):
    def forward(self, x):
        return x * self.fc(x.mean((2, 3))).unsqueeze(1).unsqueeze(2)


class GatesInTraining(GateOfMaps):
    def forward(self, x):
        if self.training:
            return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)))
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True))).sigmoid()


class GivesGates(GateOfFlags):
    def __init__(self, C: int):
        super().__init__(C)
        self.gives_gates = True


OTHER_GATES = [
    AddsAnAxisBefore,
    GatesInTraining,
    GivesGates,
    LeavesAMean,
    GatesByAMatrix,
    ConvolutionsFirst,
    ConvolutionsLast,
    AddsItsGate,
    SquaresItsGate,
    ReadsItsMeansAgain,
    KeepsAMean,
    MeansOfRows,
    WithoutMeans,
    ChangesItsMap,
    CallsWhatItDoesNotUse,
    SwapsItsSizes,
    CallsItsMethod,
]


class Parts(nn.Module):
    """What a block is made of."""

    def __init__(self, C: int = 4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, C, 3, 1, 1), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, 1, 1), nn.BatchNorm2d(C)
        self.relu, self.scale = nn.ReLU(), 1.0


class WithoutLastReLU(Parts):
    def forward(self, x):
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x


class NormBeforeConvolution(Parts):
    def forward(self, x):
        out = self.conv1(self.relu(self.bn1(x)))
        return self.relu(self.conv2(self.relu(self.bn2(out))) + x)


class AddsTwice(Parts):
    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x + x)


class Scales(Parts):
    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) * self.scale + x)


class ChangesItsInput(Parts):
    def forward(self, x):
        x += self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(x)


class AddsWhatFollows(Parts):
    def forward(self, x):
        first = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(first)) + first)


class ReadsWhatAReLUHasOverwritten(Parts):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        unused = F.relu(out, inplace=True)  # noqa: F841
        out += x
        return self.relu(out)


class CallsMore(Parts):
    def forward(self, x):
        first = self.bn1(self.conv1(x))
        self.seen = first
        return self.relu(self.bn2(self.conv2(self.relu(first))) + x)


class OneModuleForBoth(Parts):
    def forward(self, x):
        return self.relu(self.bn2(self.conv1(self.relu(self.bn1(self.conv1(x))))) + x)


class WithAnotherReLU(Parts):
    def forward(self, x):
        return relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


def relu(x: Tensor) -> Tensor:
    return x.clamp(0, 6)


class WithAnOption(Parts):
    def forward(self, x, *, doubled=False):
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)
        return out


class AsksItsInput(Parts):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if x.requires_grad:
            return out
        return self.relu(out + x)


class AsksItsClass(Parts):
    @property
    def deep(self):
        return self.scale > 1

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return out if self.deep else self.relu(out + x)


class CallsItsClass(Parts):
    def bn2(self, x):
        return -x

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class CalledInAWayOfItsOwn(Parts):
    def __call__(self, x):
        return -super().__call__(x)

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class ExcitedEarly(Parts):
    """A block whose squeeze-and-excitation no operator ends at."""

    def __init__(self):
        super().__init__()
        self.se = Gate(4)

    def forward(self, x):
        out = self.se(self.relu(self.bn1(self.conv1(x))))
        return self.relu(self.bn2(self.conv2(out)) + x)


class ExcitedTwice(ExcitedEarly):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(self.se(self.se(out)) + x)


class ExcitedWithANormBeside(ExcitedEarly):
    """One whose shortcut is two modules."""

    def __init__(self):
        super().__init__()
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        out = self.se(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(out + self.bn3(self.conv3(x)))


class ExcitedBeforeItsNorm(ExcitedWithANormBeside):
    def forward(self, x):
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(self.bn3(self.se(self.conv3(out))) + x)


class UnitWithMore(ConvNorm):
    """One that holds a pool, which it does not call."""

    def __init__(self, C: int, K: int, size: int, stride: int):
        super().__init__(C, K, size, stride, activate=False)
        self.conv, self.pool, self.bn = self._modules.pop("conv"), nn.AvgPool2d(2), self._modules.pop("bn")


class ShortcutWithMore(OfUnits):
    def __init__(self):
        super().__init__(4, 4)
        self.resizes, self.shortcut = True, UnitWithMore(4, 4, 1, 1)


class UnitInAnotherOrder(ConvNorm):
    """A norm, and then its convolution."""

    def forward(self, x):
        return self.conv(self.bn(x))


class ShortcutInAnotherOrder(OfUnits):
    def __init__(self):
        super().__init__(4, 4)
        self.resizes, self.shortcut = True, UnitInAnotherOrder(4, 4, 1, 1, False)


class UnitThatScales(ConvNorm):
    def forward(self, x):
        return super().forward(x) * 2


class ScalesInside(OfUnits):
    def __init__(self):
        super().__init__(4, 4)
        self.body.conv2 = UnitThatScales(4, 4, 3, 1, False)


class UnitsOfAMethod(OfUnits):
    def __init__(self):
        super().__init__(4, 4)
        self.body.forward = torch.neg


class CheckpointsInside(OfFunctions):
    def __init__(self):
        super().__init__(4, 4)
        self.checkpoints = True


class SeesWhatIsOutside(OfFunctions):
    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x):
        def inner(y):
            return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(y))))) + x

        return self.relu(inner(x))


class HidesTheModule(SeesWhatIsOutside):
    def forward(self, x):
        def inner(self):
            return self.relu(self)

        return inner(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class HasADefault(SeesWhatIsOutside):
    def forward(self, x):
        def inner(y, scale=2):
            return self.relu(y)

        return inner(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class IsDecorated(SeesWhatIsOutside):
    def forward(self, x):
        @torch.compiler.disable
        def inner(y):
            return self.relu(y)

        return inner(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class ReplacesItsFunction(SeesWhatIsOutside):
    def forward(self, x):
        def inner(y):
            return self.bn1(self.conv1(y))

        inner = x  # noqa: F811
        return self.relu(self.bn2(self.conv2(F.relu(inner(x)))) + x)


class HasNoResult(SeesWhatIsOutside):
    def forward(self, x):
        def inner(y):
            y = self.bn1(self.conv1(y))

        return self.relu(self.bn2(self.conv2(F.relu(inner(x)))) + x)


class ReplacesAFunctionInside(SeesWhatIsOutside):
    def forward(self, x):
        def inner(y):
            F = self.functions
            return F.relu(self.bn1(self.conv1(y)))

        return self.relu(self.bn2(self.conv2(inner(x))) + x)


class ComputesAName(OfFunctions):
    def __init__(self):
        super().__init__(4, 4)

    @property
    def norm1(self):
        return getattr(self, self.norm1_name.lower())


class CountsItsNorms(OfFunctions):
    def __init__(self):
        super().__init__(4, 4)
        self.count = 0

    @property
    def norm1(self):
        self.count += 1
        return getattr(self, self.norm1_name)


class NamesNoModule(OfFunctions):
    def __init__(self):
        super().__init__(4, 4)
        self.norm1_name = "norm2"


def with_functions(F) -> type[nn.Module]:
    """A class whose functions are those of what made it."""

    class Local(Parts):
        def forward(self, x):
            return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)

    return Local


OTHERS = [
    ShortcutWithMore,
    ShortcutInAnotherOrder,
    ScalesInside,
    UnitsOfAMethod,
    CheckpointsInside,
    SeesWhatIsOutside,
    HidesTheModule,
    HasADefault,
    IsDecorated,
    ReplacesItsFunction,
    HasNoResult,
    ReplacesAFunctionInside,
    ComputesAName,
    CountsItsNorms,
    NamesNoModule,
    ExcitedEarly,
    ExcitedTwice,
    ExcitedWithANormBeside,
    ExcitedBeforeItsNorm,
    with_functions(SimpleNamespace(relu=torch.neg)),
    WithoutLastReLU,
    NormBeforeConvolution,
    AddsTwice,
    Scales,
    ChangesItsInput,
    AddsWhatFollows,
    ReadsWhatAReLUHasOverwritten,
    CallsMore,
    OneModuleForBoth,
    WithAnotherReLU,
    WithAnOption,
    AsksItsInput,
    AsksItsClass,
    CallsItsClass,
    CalledInAWayOfItsOwn,
]


class Network(nn.Module):
    """A network whose forward names its stem's modules, one a line."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stage = nn.Sequential(StepByStep(8, 8), StepByStep(8, 12, 2))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        """Logits."""
        x = self.conv(x)
        x = self.bn(x)
        x = self.act(x)
        x = self.pool(x)
        x = self.stage(x)
        return self.head(x.mean((2, 3)))


class Delegating(Network):
    """One that does all in another method."""

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)

    def features(self, input: Tensor) -> Tensor:
        input = self.conv(input)
        input = self.bn(input)
        input = self.act(input)
        input = self.pool(input)
        out = self.stage(input)
        out = torch.flatten(out.mean((2, 3)), 1)
        return self.head(out)


class WithoutPool(Network):
    """One for small images."""

    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        x = self.act(x)
        return self.head(self.stage(x).mean((2, 3)))


class LooksIntoItsStage(Network):
    """One that asks a stage for more than its output."""

    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        x = self.act(x)
        x = self.stage(x)
        x = x * len(self.stage)
        return self.head(x.mean((2, 3)))


class InOneExpression(Network):
    """One whose ReLUs are functions, as in networks for CIFAR-10."""

    def forward(self, x):
        out = F.relu(self.bn(self.conv(x)))
        out = self.stage(out)
        out = F.avg_pool2d(F.relu(out), 2)
        return self.head(out.mean((2, 3)))


class InBranches(Network):
    """One that gives away what follows its stem, as encoders do."""

    depth = 2

    def forward(self, x):
        features = [x * 2]
        if self.depth > 0:
            x: Tensor = self.conv(x / 2)
            x = self.bn(x)
            x = torch.relu(x)
            features.append(x)
        if self.depth > 1:
            x = self.pool(x)
            features.append(self.stage(x))
        return self.head(features[-1].mean((2, 3))) + features[0].mean() + features[1].mean()


class Configured(Network):
    """One whose stem, norm and stages are what it was configured with, and which gives what each stage gives."""

    def __init__(self):
        super().__init__()
        self.deep, self.norm_name, self.stages = False, "bn", ["stage"]

    @property
    def norm(self) -> nn.Module:
        return getattr(self, self.norm_name)

    def forward(self, x):
        if self.deep:
            x = self.stem(x)
        else:
            x = self.conv(x)
            x = self.norm(x)
            x = self.act(x)
        x = self.pool(x)
        outs = []
        for i, name in enumerate(self.stages):
            stage = getattr(self, name)
            x = stage(x)
            if i in (0, 1):
                outs.append(x)
        return self.head(outs[-1].mean((2, 3)))


class Deep(Network):
    """One of three convolutions, one after the other."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.conv, self.relu1, self.relu2 = nn.Conv2d(4, 8, 3, 1, 1, bias=False), nn.ReLU(), nn.ReLU()

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.pool(self.act(self.bn(self.conv(x))))
        for i in range(1):
            x = getattr(self, f"stage{'' if i == 0 else i}")(x)
        return self.head(x.mean((2, 3)))


class DeepInSequence(Configured):
    """The same in a sequence."""

    def __init__(self):
        super().__init__()
        self.deep = True
        layers = [Layer(3, 4, 3, 2), Layer(4, 4, 3), Layer(4, 8, 3)]
        self.stem = nn.Sequential(*[module for layer in layers for module in layer])
        del self.conv, self.bn, self.act


class OfAUnit(Network):
    """One whose convolution, norm and ReLU are a module with flags."""

    def __init__(self):
        super().__init__()
        self.unit = ConvNorm(3, 8, 7, 2)
        del self.conv, self.bn, self.act

    def forward(self, x):
        x = self.unit(x)
        x = self.pool(x)
        return self.head(self.stage(x).mean((2, 3)))


class OfAnIdleUnit(Network):
    """One with a module that gives what it gets."""

    def __init__(self):
        super().__init__()
        self.idle = Idle()

    def forward(self, x):
        x = self.idle(self.act(self.bn(self.conv(x))))
        return self.head(self.stage(self.pool(x)).mean((2, 3)))


class Idle(nn.Module):
    def forward(self, x):
        return x


class OfAnotherPool(Network):
    """One whose pool is no stem's."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2)


class AsksItsStageByName(Network):
    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        x = self.stage(x)
        x = x * len(getattr(self, "stage"))  # noqa: B009
        return self.head(x.mean((2, 3)))


class AsksAroundItsStem(Network):
    """One whose flags have nothing to do with what its stem is."""

    def __init__(self):
        super().__init__()
        self.projects, self.doubles = True, False

    def forward(self, x):
        if self.doubles:
            x = x * 2
        if self.projects:
            x = self.conv(x)
            x = self.bn(x)
            x = self.act(x)
        if self.doubles:
            x = x * 2
        return self.head(self.stage(x).mean((2, 3)))


NETWORKS = [
    OfAnIdleUnit,
    OfAnotherPool,
    AsksItsStageByName,
    AsksAroundItsStem,
    Network,
    Delegating,
    WithoutPool,
    LooksIntoItsStage,
    InOneExpression,
    InBranches,
    Configured,
    Deep,
    DeepInSequence,
    OfAUnit,
]


class Unit(nn.Module):
    """A convolution, its norm and a ReLU."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.conv(x)).relu_()


class Half(Parts):
    """A block of which all but the first convolution, norm and ReLU is something else."""

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.gelu(self.bn2(self.conv2(y)) + x)


class KeepsItsStem(Network):
    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        x = self.act(x)
        self.stem = x
        return self.head(self.stage(self.pool(x)).mean((2, 3)))


class ShowsItself(Network):
    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        x = self.act(x)
        return rest(self, x)


def rest(network: Network, x: Tensor) -> Tensor:
    return network.head(network.stage(network.act(x)).mean((2, 3)))


class UsesItsReLUAgain(Network):
    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        x = self.act(x)
        return self.head(self.act(self.stage(x)).mean((2, 3)))


class HasAMethodOfTheName(Network):
    def bn(self, x):
        return -x

    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        x = self.act(x)
        return self.head(self.stage(x).mean((2, 3)))


class SeesItsStages(Network):
    def forward(self, x):
        def mean():
            return x.mean()

        x = self.stage(x)
        between = mean()
        x = self.pool(x)
        return x + between


class ReadsAConvolutionAgain(Network):
    def forward(self, x):
        y = self.conv(x)
        x = F.relu(self.bn(y))
        return self.head(self.stage(x + y).mean((2, 3)))


class RunsItsNormTwice(Network):
    def forward(self, x):
        x = F.relu(self.bn(self.bn(self.conv(x))))
        return self.head(self.stage(x).mean((2, 3)))


class DoesMoreBetween(Network):
    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        x = x * 2
        x = self.act(x)
        return self.head(self.stage(x).mean((2, 3)))


class CallsAMethodBetween(Network):
    def double(self, x):
        return x * 2

    def forward(self, x):
        x = self.conv(x)
        x = self.double(x)
        x = self.bn(x)
        x = self.act(x)
        return self.head(self.stage(x).mean((2, 3)))


class AsksItsParent(Network):
    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        x = self.act(x)
        return super().__getattr__("head")(self.stage(x).mean((2, 3)))


class ReadsItsStemByName(Configured):
    def __init__(self):
        super().__init__()
        self.stages = ["stage", "act"]


class ReadsByAnUnknownName(Configured):
    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        for name in self.stages:
            name = name.lower()
            x = getattr(self, name)(x)
        return self.head(x.mean((2, 3)))


class ReadsByANameThatMayBeItsStems(Network):
    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        return self.head(getattr(self, f"a{'c'}t")(self.stage(x)).mean((2, 3)))


class ReadsItsStemByAConstantName(Network):
    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        return self.head(getattr(self, "act")(self.stage(x)).mean((2, 3)))  # noqa: B009


class NamesItsNormTwice(Configured):
    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        return self.head(self.stage(x).mean((2, 3)) + self.bn.weight.sum())


class AsksItsInputBetween(Configured):
    def forward(self, x):
        x = self.norm(self.conv(x))
        if x.requires_grad:
            x = x * 2
        return self.head(self.stage(self.act(x)).mean((2, 3)))


class DoesMoreInTraining(Network):
    def forward(self, x):
        x = self.bn(self.conv(x))
        if self.training:
            x = x * 2
        x = self.act(x)
        return self.head(self.stage(x).mean((2, 3)))


class UnitThatCountsTwice(ConvNorm):
    def forward(self, x):
        y = self.conv(x)
        other = self.bn(y)  # noqa: F841
        return self.activ(self.bn(y))


class UnitThatGivesItsInput(ConvNorm):
    def forward(self, x):
        y = self.bn(self.conv(x))  # noqa: F841
        return x


def of_unit(cls: type[ConvNorm]) -> type[nn.Module]:
    class OfThisUnit(OfAUnit):
        def __init__(self):
            super().__init__()
            self.unit = cls(3, 8, 7, 2)

    OfThisUnit.__name__ = f"Of{cls.__name__}"
    return OfThisUnit


class RectifiesIfAsked(Network):
    def __init__(self):
        super().__init__()
        self.rectifies = True

    def forward(self, x):
        x = self.bn(self.conv(x))
        if self.rectifies:
            x = F.relu(x)
        return self.head(self.stage(x).mean((2, 3)))


OTHER_NETWORKS = [
    RectifiesIfAsked,
    of_unit(UnitThatCountsTwice),
    of_unit(UnitThatGivesItsInput),
    ReadsItsStemByName,
    ReadsByAnUnknownName,
    ReadsByANameThatMayBeItsStems,
    ReadsItsStemByAConstantName,
    NamesItsNormTwice,
    AsksItsInputBetween,
    DoesMoreInTraining,
    KeepsItsStem,
    ShowsItself,
    UsesItsReLUAgain,
    HasAMethodOfTheName,
    ReadsAConvolutionAgain,
    RunsItsNormTwice,
    DoesMoreBetween,
    CallsAMethodBetween,
    AsksItsParent,
]
