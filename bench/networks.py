"""Networks of well-known architectures on stock torch alone. They are narrow, small enough to train in a test, or
`scale` times as wide."""

import torch
from torch import nn
from torch.nn import functional as F

from pyops.lenet import StockLeNet


class AlexNet(nn.Module):
    """Convolution, ReLU in place and overlapping pooling; dropout and linear layers."""

    shape = (3, 32, 32)

    def __init__(self, scale=1):
        super().__init__()
        a, b, c = 6 * scale, 8 * scale, 16 * scale
        self.features = nn.Sequential(
            nn.Conv2d(3, a, kernel_size=5, stride=2, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(a, b, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(b, b, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(4 * b, c),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(c, c),
            nn.ReLU(inplace=True),
            nn.Linear(c, 10),
        )

    def forward(self, x):
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class VGG(nn.Module):
    """3x3 convolutions in pairs, with and without batch normalization."""

    shape = (3, 16, 16)

    def __init__(self, scale=1):
        super().__init__()
        layers, channels = [], 3
        for width, norm in ((4 * scale, False), (6 * scale, True)):
            for _ in range(2):
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                layers += [nn.BatchNorm2d(width)] if norm else []
                layers.append(nn.ReLU())
                channels = width
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(channels * 16, 12 * scale), nn.ReLU(True), nn.Dropout(), nn.Linear(12 * scale, 10)
        )

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)  # called twice
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """Residual blocks, in which a value is used twice and added to in place."""

    shape = (3, 24, 24)

    def __init__(self, scale=1):
        super().__init__()
        a, b = 4 * scale, 8 * scale
        self.conv1 = nn.Conv2d(3, a, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(a)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layers = nn.Sequential(BasicBlock(a, a, 1), BasicBlock(a, b, 2))
        self.fc = nn.Linear(b, 10)

    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layers(x).mean((2, 3)))


class MobileNet(nn.Module):
    """Depthwise and pointwise convolutions, ReLU6, and a linear bottleneck with a shortcut."""

    shape = (3, 16, 16)

    def __init__(self, scale=1):
        super().__init__()
        a, b, c = 8 * scale, 24 * scale, 16 * scale
        self.stem = nn.Sequential(nn.Conv2d(3, a, 3, 2, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU6(inplace=True))
        self.expand = nn.Conv2d(a, b, 1)
        self.depthwise = nn.Conv2d(b, b, 3, padding=1, groups=b)
        self.project = nn.Conv2d(b, a, 1, bias=False)
        self.head = nn.Conv2d(a, c, 1)
        self.fc = nn.Linear(c, 10)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu6(self.depthwise(self.expand(x).relu()))
        x = x + self.project(y)
        return self.fc(F.adaptive_avg_pool2d(self.head(x).relu_(), 1).flatten(1))


class LeNet(StockLeNet):
    """The LeNet of the tutorials, which has only one width."""

    shape = (1, 32, 32)

    def __init__(self, scale=1):
        super().__init__()


NETWORKS = {cls.__name__: cls for cls in (LeNet, AlexNet, VGG, ResNet, MobileNet)}
