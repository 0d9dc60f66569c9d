"""Where training data comes from, and how it is grouped and described."""

from pixart.data.sources import BadSample, ImageFolder, ImageSample, ImageSource

__all__ = ["BadSample", "ImageFolder", "ImageSample", "ImageSource"]
