"""Plain pixels: the control that knows nothing of images."""

import numpy as np

from membench.plugins import Describe, Setup, descriptor


@descriptor(title="Pixels", paper="none: a control")
def pixels(setup: Setup) -> Describe:
    """Pixels in [-1, 1], so centred at mid-grey; `input_size` keeps them few.

    Half of 255 is no pixel, so that not even a constant image has length zero, as it would if its
    own mean were taken off.
    """

    def describe(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1

    return describe
