"""A kubelet for machines without containers: pods run as local processes on nodes that exist only in the API server.

What it takes over: the scheduler (placement by requests, taints and node selectors), the kubelet (processes, probes,
status, SIGTERM and SIGKILL on deletion), and whoever takes machines away (`lose_node`, `preempt`, `shut_down_node`).
What it does not do: isolation. Pods share file system and network; each has an address of its own in 127.0.0.0/8.
The API server takes no such address into a Service's endpoints, so Services lead nowhere.
An image is not pulled: its name says what happens (`images.py`).

`python -m local_kubelet --namespace NAME --nodes 3` runs it by itself.
"""
