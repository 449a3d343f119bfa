"""RegMean and what it needs, in float64 NumPy."""

import numpy as np


def regmean(kernels, grams, off_diagonal=1.0, weights=None, ridge=0.0):
    """`(sum c_m G_m)^-1 sum c_m G_m W_m`; kernels [in, out], Gram matrices [in, in]."""
    weights = np.ones(len(kernels)) if weights is None else weights
    left, right = 0.0, 0.0
    for kernel, gram, weight in zip(kernels, grams, weights, strict=True):
        gram = np.array(gram, np.float64)
        for i in range(len(gram)):
            for j in range(len(gram)):
                if i != j:
                    gram[i, j] *= off_diagonal
        gram += ridge * np.mean(np.diag(gram)) * np.eye(len(gram))
        left, right = left + weight * gram, right + weight * gram @ np.asarray(kernel, np.float64)
    return np.linalg.solve(left, right)


def patches(x, size, strides, dilation):
    """What each output of a convolution with "SAME" padding sees: [B, H, W, C] to [rows, in]."""
    outputs = [-(-n // s) for n, s in zip(x.shape[1:3], strides, strict=True)]
    padding = []
    for n, out, k, s, d in zip(x.shape[1:3], outputs, size, strides, dilation, strict=True):
        missing = max((out - 1) * s + (k - 1) * d + 1 - n, 0)
        padding.append((missing // 2, missing - missing // 2))
    x = np.pad(x, [(0, 0), *padding, (0, 0)])
    rows = []
    for image in x:
        for top in range(0, outputs[0] * strides[0], strides[0]):
            for left in range(0, outputs[1] * strides[1], strides[1]):
                patch = image[top:, left:][:: dilation[0], :: dilation[1]][: size[0], : size[1]]
                rows.append(patch.ravel())
    return np.stack(rows)


def regmean_plus_plus(models, data, blocks):
    """On chains of `x -> relu(x W + b)`, merged by blocks of layers.

    Args:
        models: for each model its layers `(W [in, out], b [out])`.
        data: for each model its inputs [rows, in].
        blocks: how many layers each block has.
    """
    merged, start = [], 0
    for length in blocks:
        inputs = [forward(merged, x) for x in data]
        block = [model[start : start + length] for model in models]
        for i in range(length):
            # The block's own layers before this one, on what the merged blocks give.
            hidden = [forward(own[:i], x) for own, x in zip(block, inputs, strict=True)]
            grams = [h.T @ h / len(h) for h in hidden]
            kernel = regmean([own[i][0] for own in block], grams)
            bias = np.mean([np.asarray(own[i][1], np.float64) for own in block], axis=0)
            merged.append((kernel, bias))
        start += length
    return merged


def forward(layers, x):
    for kernel, bias in layers:
        x = np.maximum(x @ kernel + bias, 0)
    return np.asarray(x, np.float64)
