"""The one place that states the version; the build and ``dynaconv.__version__`` both read it here."""

__version__ = "0.1.0"
