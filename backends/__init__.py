"""The backends of adasplash2, importable as ``adasplash2.backends``."""

if __name__ != "adasplash2.backends":
    raise ImportError(
        f"this folder was imported as {__name__!r}; import it as 'adasplash2.backends' "
        "(importing it under two names would make two copies of every backend)"
    )
