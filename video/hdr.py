"""High dynamic range to the standard one, as a viewer of an ordinary screen expects it.

FFmpeg's own conversion costs seconds a frame, since it makes its table anew for each.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from av.video.reformatter import ColorTrc

#: The transfer functions of HDR video: PQ and HLG (ITU-R BT.2100).
HDR_TRANSFERS = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
#: cd/m2 of a white page (ITU-R BT.2408), and of the brightest that HLG is made for.
_WHITE, _HLG_PEAK = 203.0, 1000.0
#: Up to here, as a part of white, light is kept; above, it is rolled off, and no light is too much.
_KNEE = 0.6
#: Primaries of BT.2020 to those of BT.709 (ITU-R BT.2087).
_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)


def to_standard_range(pixels_HWC: np.ndarray, transfer: int) -> np.ndarray:
    """Pixels of BT.2020 in uint16, with one of `HDR_TRANSFERS`, to sRGB in uint8."""
    light_HWC = (_light(transfer)[pixels_HWC] @ _TO_BT709.T).clip(min=0)
    above_HWC = (light_HWC - _KNEE).clip(min=0)
    light_HWC = np.minimum(light_HWC, _KNEE) + (1 - _KNEE) * above_HWC / (above_HWC + 1 - _KNEE)
    srgb_HWC = np.where(light_HWC <= 0.0031308, 12.92 * light_HWC, 1.055 * light_HWC ** (1 / 2.4) - 0.055)
    return np.rint(255 * srgb_HWC).astype(np.uint8)


@cache
def _light(transfer: int) -> np.ndarray:
    """Light of each 16-bit code as a part of white, float32 `(65536,)`."""
    code = np.linspace(0, 1, 1 << 16)
    if transfer == ColorTrc.SMPTE2084:
        root = code ** (1 / 78.84375)
        nits = 10_000 * ((root - 0.8359375).clip(min=0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
        nits = _HLG_PEAK * scene**1.2  # the screen's own curve, channel by channel
    return (nits / _WHITE).astype(np.float32)
