"""The Triton kernels of taps_fast, imported as `taps_fast.kernels` when one is first needed."""

if __name__ != "taps_fast.kernels":

    def __getattr__(name: str) -> object:
        # Not when it is imported: programs started in a checkout look whether there is a package of this name.
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"this package is taps_fast.kernels, it cannot be used as {__name__}")
