"""The Triton kernels of taps_fast, imported as `taps_fast.kernels` when one is first needed."""

if __name__ != "taps_fast.kernels":
    raise ImportError(f"this package is taps_fast.kernels, it cannot be imported as {__name__}")
