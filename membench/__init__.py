"""membench: how much of its training set can a diffusion model be made to give back?"""

__version__ = "0.1.0"
