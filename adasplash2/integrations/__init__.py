"""adasplash2 inside other libraries: one module a library, which is imported by that module alone."""
