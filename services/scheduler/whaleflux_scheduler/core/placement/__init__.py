"""The placement engine: which GPUs a job gets, why, and what stands in its way. Pure: no I/O, no time, no names of jobs."""
