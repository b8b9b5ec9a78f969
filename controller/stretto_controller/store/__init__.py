"""What outlives the controller: one record per job, its events and its generations, saved together."""
