"""What is true of a graph, found by dataflow and structure; no graph is changed here."""
