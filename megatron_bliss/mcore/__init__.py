"""The only package that imports megatron.*."""
