"""A step cut into the stages of a pipeline, and who runs which pass when."""
