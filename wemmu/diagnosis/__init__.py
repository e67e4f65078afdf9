"""Checks this machine for training; each problem comes with its remedy.

The checks import slow or possibly broken libraries themselves: a failing import is a finding. Nothing here uses the
network beyond 127.0.0.1.
"""
