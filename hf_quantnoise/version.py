"""Version of the package, read by the build without importing it, and name of its format."""

__version__ = "0.1.0"
QUANT_METHOD = "hf_quantnoise"  # in config.json
