"""The store for several controllers: etcd says who leads, and refuses the writes of everybody else."""
