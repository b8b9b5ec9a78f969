"""`stretto report`: a run as one page of pictures that needs nothing else."""
