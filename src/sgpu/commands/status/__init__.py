"""`python -m sgpu status`: what the daemon on this node knows, for people. The daemon imports nothing of this.

`command` is what is run, `view` says how it looks.
"""
