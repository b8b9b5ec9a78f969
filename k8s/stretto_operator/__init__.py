"""The operator of ElasticTrainingJobs on Kubernetes.

`desired.wanted` says what should be there, `diff.actions` what to do about it; both are pure, as all they import is.
`reconciler`, `kubernetes`, `watch`, `election` and `controller` act.
"""
