"""The parts of `tools/convert_ckpt.py`."""
