"""G2RPO post-training of vision-language policies on Megatron-core."""

__version__ = "0.6.2"
