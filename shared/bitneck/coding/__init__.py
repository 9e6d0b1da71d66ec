"""Symbols to payload bytes and back: quantizer, factorized and conditional models, their codecs, class maps."""
