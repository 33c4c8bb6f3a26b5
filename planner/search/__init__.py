"""The search over plans: meshes and microbatches without a pipeline, several groups, lost devices."""
