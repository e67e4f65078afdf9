"""What this machine has, what training will use of it, and what is wrong, each problem with its remedy.

Everything that is slow to import or may be broken is imported inside the checks: a library that cannot be imported is a
finding, not the end. Nothing here reaches for the network beyond 127.0.0.1.
"""
