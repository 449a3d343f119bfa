"""Labelled images: embedded sets, folders, TensorFlow Datasets; their order; reading ahead."""

from mixlab.data.dataset import Dataset, LazyImages
from mixlab.data.feed import Feed
from mixlab.data.load import load
from mixlab.data.order import epoch_indices, prefetch

__all__ = ["Dataset", "Feed", "LazyImages", "epoch_indices", "load", "prefetch"]
