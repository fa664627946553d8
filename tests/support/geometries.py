"""Geometries of convolutions and poolings at the edges of what the kernels treat in one way."""

import torch
from tensors import random


def operands(input_shape, weight_shape, dtype=torch.float32, where="contiguous", bias=True):
    return [
        random(input_shape, dtype, where),
        random(weight_shape, dtype, where),
        random(weight_shape[:1], dtype) if bias else None,
    ]


# Shapes of input and weight, and options of conv2d.
GEOMETRIES = [
    ((2, 1, 32, 32), (6, 1, 5, 5), {}),  # LeNet
    ((2, 6, 14, 14), (16, 6, 5, 5), {}),
    ((2, 16, 6, 6), (16, 16, 3, 3), {}),
    ((2, 3, 9, 8), (4, 3, 1, 1), {}),
    ((2, 3, 9, 8), (4, 3, 1, 1), {"stride": 2}),
    ((2, 3, 9, 8), (4, 3, 1, 1), {"padding": 2}),  # a border where no tap meets the image
    ((2, 3, 9, 8), (4, 3, 3, 2), {"stride": (2, 1), "padding": (1, 0)}),
    ((2, 3, 9, 8), (4, 3, 3, 2), {"stride": (1, 3), "padding": (0, 2), "dilation": (2, 3)}),
    ((1, 2, 11, 10), (3, 2, 3, 3), {"stride": 2, "padding": 2, "dilation": 2}),
    ((1, 2, 11, 10), (3, 2, 3, 3), {"stride": 3, "dilation": 2}),  # rows of the input that no window covers
    ((1, 2, 11, 10), (3, 2, 2, 2), {"stride": 5}),
    ((2, 2, 5, 6), (3, 2, 5, 6), {}),  # a window as large as the image
    ((2, 2, 3, 3), (3, 2, 5, 5), {"padding": 1}),  # a window larger than the image
    ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    ((1, 2, 1, 40), (3, 2, 1, 7), {"padding": (0, 3)}),
    ((1, 2, 40, 1), (3, 2, 7, 1), {"padding": (3, 0)}),
    ((2, 4, 7, 7), (6, 2, 3, 3), {"groups": 2}),
    ((2, 4, 7, 7), (4, 1, 3, 3), {"groups": 4, "padding": 1}),  # depthwise
    ((2, 4, 7, 7), (12, 1, 3, 3), {"groups": 4, "padding": 1, "stride": 2}),  # with a multiplier
    ((3, 36, 9, 8), (72, 4, 3, 2), {"groups": 9, "padding": 1, "stride": (2, 3)}),  # narrow groups, several phases
    ((1, 20, 5, 5), (20, 2, 3, 3), {"groups": 10, "dilation": 2}),
    ((1, 70, 4, 5), (67, 70, 3, 3), {"padding": 1}),  # K beyond one chunk, odd channels
    ((1, 66, 4, 5), (112, 66, 3, 3), {"padding": 1}),  # K beyond one chunk in whole vectors, panels of 4 and 3
    ((3, 5, 30, 31), (33, 5, 3, 3), {"padding": 1}),
    ((33, 3, 7, 6), (5, 3, 3, 2), {}),  # CHWN blocks, the last one of a single image
    ((33, 6, 8, 7), (14, 6, 3, 2), {}),  # CHWN blocks with more channels than 8 lanes
    ((17, 6, 8, 7), (14, 3, 3, 3), {"groups": 2, "dilation": 2}),
    ((40, 2, 9, 9), (3, 2, 2, 2), {"stride": 2}),
    ((19, 20, 4, 4), (16, 20, 3, 3), {"padding": 2}),  # K beyond one chunk, classes of pixels
    # The gradient of the input by kn2row: sums beyond one chunk, several tasks, odd channels, strides, borders.
    ((5, 19, 8, 7), (150, 19, 5, 4), {}),
    ((70, 33, 6, 6), (40, 33, 4, 4), {"padding": 1}),
    ((3, 300, 5, 6), (34, 300, 3, 5), {}),
    ((4, 17, 11, 13), (35, 17, 3, 3), {"stride": (2, 3), "dilation": (2, 1), "padding": (1, 0)}),
    ((2, 18, 4, 3), (37, 18, 5, 5), {"padding": 2}),  # taps that no pixel meets
    ((1, 48, 41, 31), (96, 48, 3, 3), {}),  # tiles of rows
    ((1, 48, 41, 31), (96, 48, 3, 3), {"stride": (2, 1), "padding": (1, 0)}),
    ((37, 20, 3, 5), (21, 20, 3, 5), {}),  # the gradient of the input as that of a linear layer
    ((2, 24, 9, 8), (12, 8, 3, 3), {"groups": 3}),
    # Several groups share a vector of channels-last images: odd sizes, partial vectors, unequal numbers of channels.
    ((2, 32, 5, 19), (32, 4, 3, 3), {"groups": 8, "padding": 1}),
    ((1, 18, 7, 6), (18, 2, 5, 5), {"groups": 9, "padding": (2, 5)}),
    ((2, 24, 9, 8), (24, 8, 3, 3), {"groups": 3, "padding": 1, "stride": 2}),
    ((3, 40, 1, 1), (40, 4, 3, 3), {"groups": 10, "padding": 1}),
    ((2, 21, 6, 35), (21, 3, 1, 1), {"groups": 7}),
    ((1, 16, 10, 9), (32, 2, 3, 3), {"groups": 8, "padding": 4, "dilation": 2}),
    ((2, 32, 6, 7), (16, 4, 2, 4), {"groups": 8, "stride": (1, 2)}),
    ((2, 32, 6, 7), (32, 16, 5, 5), {"groups": 2, "padding": 2}),  # K beyond one chunk
    ((1, 16, 3, 170), (16, 4, 1, 7), {"groups": 4, "padding": (0, 3)}),  # rows beyond one chunk
    # The kernels reach beyond the image, so that only some of their taps meet it, or none, and the batches fill the
    # vectors. The weights of the other taps have a gradient of zero.
    ((16, 1, 1, 1), (1, 1, 3, 3), {"padding": 1}),  # only the tap in the middle
    ((33, 3, 1, 12), (1, 3, 5, 11), {"padding": (2, 0)}),
    ((17, 1, 18, 7), (1, 1, 3, 7), {"padding": (0, 3), "dilation": 2}),
    ((64, 3, 5, 7), (3, 3, 5, 3), {"padding": (2, 0), "dilation": (2, 1)}),
    ((64, 6, 20, 3), (6, 2, 2, 3), {"groups": 3, "padding": (0, 1), "dilation": 2}),
    ((33, 3, 1, 10), (9, 3, 2, 5), {"padding": "same", "dilation": 2}),
    ((17, 1, 31, 1), (2, 1, 7, 2), {"padding": (2, 1), "dilation": (1, 2)}),  # no tap
    ((33, 24, 9, 1), (48, 2, 2, 2), {"groups": 12, "padding": (0, 1), "dilation": (1, 2)}),  # no tap, in groups
    ((19, 16, 2, 1), (16, 4, 3, 3), {"groups": 4, "padding": 1}),  # several groups in a vector, a column of taps
    ((5, 6, 1, 2), (6, 1, 1, 1), {"groups": 6, "stride": (4, 1), "padding": (3, 2)}),  # no tap, depthwise
    ((2, 40, 1, 1), (36, 40, 2, 2), {"padding": 1, "dilation": 2}),  # no tap, many channels
    ((16, 3, 2, 2), (4, 3, 1, 1), {"stride": 5, "padding": 4}),  # one pixel of the output meets the image
    *[  # depthwise, 3x3: a border at every position in a vector, and rows without a whole vector
        ((2, channels, height, width), (channels, 1, 3, 3), {"groups": channels, "padding": padding})
        for channels, height, width, padding in (
            (3, 3, 3, 0),
            (16, 1, 1, 1),
            (5, 2, 16, 1),
            (33, 9, 15, 2),
            (2, 5, 17, 3),
            (4, 4, 18, 0),
            (17, 7, 33, 1),
        )
    ],
]


# Options of max_pool2d.
WINDOWS = [
    {"kernel_size": 2},
    {"kernel_size": 2, "stride": (3, 2)},
    {"kernel_size": 2, "ceil_mode": True},
    {"kernel_size": 2, "stride": 1},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)},
    {"kernel_size": (2, 5), "stride": (3, 3), "padding": (1, 2), "ceil_mode": True},
    {"kernel_size": 3, "dilation": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": 1, "dilation": (3, 1)},
    {"kernel_size": 3, "stride": 2, "dilation": (1, 2), "padding": 1, "ceil_mode": True},
    {"kernel_size": 1, "stride": 3},  # elements that are in no window
    {"kernel_size": 1},
    {"kernel_size": 4, "stride": 4, "padding": 2},
    {"kernel_size": 7, "stride": 3, "padding": 3},
]
