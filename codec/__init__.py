"""Images to the bytes of a `.rfsq` file and back, with the model of a checkpoint."""

from codec.codec import Codec

__all__ = ["Codec"]
