"""`kubectl sgpu`, also `python -m sgpu cluster`: all nodes' GPUs, and the pods that use them, at a glance.

Runs on an operator's laptop, be it macOS or Windows: nothing here, and nothing that it imports, needs Linux. `command`
is what is run, `proxy` is the way to the API server, `agents` finds the daemons and `ask` asks them; `facts` has what
the answers come to, and `view` says how it looks.
"""
