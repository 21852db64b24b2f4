"""qlibero: what does quantization cost a robot policy on LIBERO, and what does it give?"""

__version__ = "0.1.0"
