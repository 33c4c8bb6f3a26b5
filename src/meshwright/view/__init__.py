"""Plans and audits for human eyes: text for terminals, HTML for notebooks."""
