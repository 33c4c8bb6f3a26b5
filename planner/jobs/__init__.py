"""A training job given as numbers, laid out on the zoo's model of its shape and priced."""
