"""The training application behind `python -m trainer`: a byte-level GPT trained through the public API.

It is also the example to copy, so it imports `trainer` and nothing below it.
"""
